"""Write what is measured in the README, two tables and the picture, from the records in book/results.

    python tools/readme.py

The table of speeds is in the user's guide too. A test fails if any of it differs: run it when a record has changed.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "book" / "using.md"
PICTURE, RESULTS = ROOT / "book" / "_static" / "readme.svg", ROOT / "book" / "results"
MODEL, TEXT = "smollm2", "wikitext2"
VARIANTS = {"default": "default", "ldlq": "own basis", "16 bits": "16 bits"}
WIDTHS = (4, 3, 2)


def record(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def measured() -> Iterator[dict]:
    """What the records of whole models say of MODEL on TEXT: their rows, with ppl, tokens and calibrated added."""
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8")).get("rows", []):
            if row.get("model") != MODEL or row.get("variant") not in VARIANTS or row.get("seed"):
                continue
            source = next((text for text in row.get("perplexity", ()) if text.startswith(TEXT)), None)
            calibration = row.get("calibration", {"samples": 0, "seq_len": 0})
            if source and row["perplexity"][source]:
                yield {
                    **row,
                    "variant": VARIANTS[row["variant"]],
                    "ppl": row["perplexity"][source],
                    "tokens": row["evaluation"][source],
                    "calibrated": calibration["samples"] * calibration["seq_len"],
                }


def chosen() -> dict[tuple[str, int], dict]:
    """The row of each variant and width: of several, that on most tokens, then the best calibrated."""
    rows: dict[tuple[str, int], dict] = {}
    for row in measured():
        key = row["variant"], row["bits"]
        if key not in rows or (row["tokens"], row["calibrated"]) > (rows[key]["tokens"], rows[key]["calibrated"]):
            rows[key] = row
    most = max(row["tokens"] for row in rows.values())
    return {key: row for key, row in rows.items() if row["tokens"] == most}


def model_table(rows: dict[tuple[str, int], dict]) -> str:
    speed = record("generate")
    threads = max(row["threads"] for row in speed["rows"])
    rates = {
        row["model"].split(",")[0]: row["tokens_per_s"]
        for row in speed["rows"]
        if row["threads"] == threads and row["dtype"] == "bfloat16"
    }
    lines = [
        "| | bits per quantized weight, all counted | weight files | perplexity | tokens a second |",
        "|---|---|---|---|---|",
    ]
    for bits in (16, *WIDTHS):
        row = rows["16 bits" if bits == 16 else "default", bits]
        size = row.get("file_bytes", 2 * row["parameters"])
        each = f"{row['bits_per_weight']:.3f}" if bits < 16 else "16"
        rate = rates.get(MODEL if bits == 16 else f"{bits} bits")
        shown = f"{rate:.0f}" if rate else "–"
        lines.append(f"| {bits} bits | {each} | {size / 1e6:.1f} MB | {row['ppl']:.1f} | {shown} |")
    example = rows["default", 2]
    return "\n".join(lines) + (
        f"\n\nSmolLM2-135M-Instruct, calibrated on {example['calibrated']:,} tokens of C4; perplexity (lower is better)"
        f" on {example['tokens']:,} tokens of the WikiText-2 test set, `{example['command']}`; tokens a second in"
        f" bfloat16 on {threads} threads of an {speed['about']['device']}, `{speed['about']['command']}`."
    )


def speed_table() -> str:
    def find(rows: list[dict], **wanted) -> dict:
        return next(row for row in rows if all(row.get(key) == value for key, value in wanted.items()))

    cpu, gpu = record("kernels"), record("cuda")
    card = gpu["about"]["device"].removeprefix("NVIDIA ")
    lines = ["| 2 bits, one text at a time | beside | times as fast |", "|---|---|---|"]
    for m, n in ((4096, 4096), (8192, 28672)):
        row = find(cpu["rows"], m=m, n=n, bits=2, batch=1, stage="layer")
        lines.append(f"| a layer of {m} × {n}, one CPU thread | bfloat16 | {row['ratio_bf16']:.1f} |")
    for m, n in ((4096, 4096), (8192, 28672)):
        row = find(gpu["rows"], m=m, n=n, bits=2, batch=1, dtype="float16")
        lines.append(f"| a layer of {m} × {n}, {card} | float16 | {row['ratio']:.1f} |")
    row = find(gpu["decode"], bits=2)
    whole = find(gpu["decode"], bits=16)["weights_gb"] / row["weights_gb"]
    lines.append(f"| a Llama of 7B's shape, {card}, in {1 / whole:.0%} of the memory | float16 | {row['ratio']:.1f} |")
    return "\n".join(lines) + (
        f"\n\nThe CPU is an {cpu['about']['device']} ({cpu['about']['backend']}), `{cpu['about']['command']}`; on"
        f" the GPU calls are recorded as CUDA graphs, `{gpu['about']['command']}`."
    )


def picture(rows: dict[tuple[str, int], dict]) -> str:
    """Perplexity against bits, with and without the rotation, as SVG in colours that show on white and on black."""
    full = rows["16 bits", 16]["ppl"]
    series = {
        "in the model's own basis": ("#d9622b", [rows["own basis", b]["ppl"] for b in WIDTHS]),
        "in a random basis (quip)": ("#3b82f6", [rows["default", b]["ppl"] for b in WIDTHS]),
    }
    width, height, left, top, bottom = 660, 290, 86, 30, 250
    high = math.ceil(math.log10(max(max(values) for _, values in series.values())))

    def y(value: float) -> float:
        return bottom - (bottom - top) * (math.log10(value) - 1) / (high - 1)

    xs = {b: left + 60 + 140 * i for i, b in enumerate(WIDTHS)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" font-size="14" fill="#7d8590">',
        "<title>Perplexity of SmolLM2-135M against bits per weight, on a logarithmic scale</title>",
    ]
    for power in range(1, high + 1):
        at = y(10**power)
        parts.append(f'<path d="M{left} {at:.1f}H{width - 20}" stroke="#7d8590" stroke-opacity=".3"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 5:.1f}" text-anchor="end">{10**power:,}</text>')
    parts.append(f'<path d="M{left} {y(full):.1f}H{width - 20}" stroke="#7d8590" stroke-dasharray="6 4"/>')
    parts.append(f'<text x="{width - 20}" y="{y(full) + 16:.1f}" text-anchor="end">16 bits: {full:.1f}</text>')
    for name, (colour, values) in series.items():
        points = [(xs[b], y(v)) for b, v in zip(WIDTHS, values, strict=True)]
        line = " ".join(f"{x},{at:.1f}" for x, at in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, at), value in zip(points, values, strict=True):
            label = f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
            parts.append(f'<circle cx="{x}" cy="{at:.1f}" r="5" fill="{colour}"/>')
            parts.append(f'<text x="{x}" y="{at - 11:.1f}" text-anchor="middle" fill="{colour}">{label}</text>')
        x, at = points[-1]
        parts.append(f'<text x="{x + 26}" y="{at + 19:.1f}" fill="{colour}">{name}</text>')
    for b, x in xs.items():
        parts.append(f'<text x="{x}" y="{bottom + 24}" text-anchor="middle">{b} bits</text>')
    parts.append(f'<text x="{left - 76}" y="18">perplexity, lower is better</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def filled(text: str, parts: dict[str, str]) -> str:
    """`text` with what stands between the comments `<!-- NAME -->` and `<!-- end -->` replaced."""
    for name, part in parts.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        text = f"{before}<!-- {name} -->\n{part}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def wanted() -> dict[Path, str]:
    """Every file that this tool writes into, as the records have it."""
    rows = chosen()
    speed = {"measured: speed": speed_table()}
    return {
        README: filled(README.read_text(encoding="utf-8"), {"measured: models": model_table(rows), **speed}),
        GUIDE: filled(GUIDE.read_text(encoding="utf-8"), speed),
        PICTURE: picture(rows),
    }


if __name__ == "__main__":
    for path, text in wanted().items():
        path.write_text(text, encoding="utf-8")
