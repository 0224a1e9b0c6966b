"""Perplexity against the number of weights, or their size, with a line for each method and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from quip.errors import QuipError
from quip.interactive.component import NONE, Component, is_number

MEASURED = "measured"
PAPER = "Chee et al. 2023"

# WikiText-2, of the tables in Chee et al. 2023 that the book quotes; none of these was measured by this project.
PUBLISHED = [
    {"model": model, "family": family, "parameters": parameters, "bits": bits, "method": method, "perplexity": ppl}
    | {"source": PAPER}
    for model, family, parameters, bits, method, ppl in (
        ("OPT-30B", "OPT", 30e9, 16, "unquantized", 9.56),
        ("OPT-30B", "OPT", 30e9, 2, "OPTQ", 71.70),
        ("OPT-30B", "OPT", 30e9, 2, "LDLQ-RG", 49.40),
        ("OPT-30B", "OPT", 30e9, 2, "nearest", 41547.8),
        ("OPT-30B", "OPT", 30e9, 2, "QuIP", 11.48),
        ("OPT-30B", "OPT", 30e9, 2, "nearest + incoherence", 12.04),
        ("Llama 2 70B", "Llama 2", 70e9, 16, "unquantized", 3.32),
        ("Llama 2 70B", "Llama 2", 70e9, 4, "OPTQ", 3.60),
        ("Llama 2 70B", "Llama 2", 70e9, 4, "QuIP", 3.53),
        ("Llama 2 70B", "Llama 2", 70e9, 3, "OPTQ", 4.91),
        ("Llama 2 70B", "Llama 2", 70e9, 3, "QuIP", 3.85),
        ("Llama 2 70B", "Llama 2", 70e9, 2, "OPTQ", 123.9),
        ("Llama 2 70B", "Llama 2", 70e9, 2, "QuIP", 6.33),
    )
]


def perplexity_chart(rows: Sequence[Mapping], caption: str = "", x: str = "size") -> Component:
    """A chart with logarithmic axes whose methods, widths and sources can be switched on and off.

    Each row is `{"model", "parameters", "bits", "method", "perplexity", "source"}`: `parameters` the number of weights
    (135e6), `source` "measured" for what this project measured, or else who reports it, which is drawn hollow, with
    broken lines, and named so wherever the point is read out; `PUBLISHED` are rows of that kind. A row may have a
    `family` ("OPT"). The reader chooses what is on the x axis, `x` is what it starts with: "size", bytes of the
    weights, with lines that join the widths of one model and method, up to the row of that model and source with the
    most bits; or "parameters", with lines that join the models of one family, method and width. Without scripts, and
    folded up under the chart, it is a table. Raises `QuipError` for no rows, and for one that is not of this form.
    """
    if x not in ("size", "parameters"):
        raise QuipError(f"the x axis is 'size' or 'parameters', not {x!r}")
    if not rows:
        raise QuipError("a chart of perplexities needs at least one row")
    rows = [checked(i, row) for i, row in enumerate(rows)]
    lines = (
        f"<tr><td>{escape(r['model'])}<td>{escape(r['method'])}<td>{r['bits']:g}<td>{r['perplexity']:g}"
        f"<td>{size_text(r['parameters'] * r['bits'] / 8)}<td>{escape(r['source'])}"
        for r in rows
    )
    body = (
        "<div class=controls></div>\n<div class=plot></div>\n<p class=read role=status></p>\n"
        + (f"<p class=soft>{escape(caption)}</p>\n" if caption else "")
        + "<details open><summary>The same figures as a table</summary><div class=scroll><table><thead><tr><th>model"
        "<th>method<th>bits<th>perplexity<th>weights<th>source</thead>\n<tbody>\n" + "\n".join(lines)
    )
    label = f"chart of {len(rows)} perplexities"
    return Component("perplexity", label, f"{body}\n</tbody></table></div></details>", {"rows": rows, "x": x})


def checked(i: int, row: Mapping) -> dict:
    """The row with just the keys of the chart; raises `QuipError` naming the row and the key that is wrong."""
    if not isinstance(row, Mapping):
        raise QuipError(f"row {i} of the chart is no dict but a {type(row).__name__}")
    for key in ("model", "method", "source"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise QuipError(f"row {i} of the chart: {key!r} must be a text, got {row.get(key)!r}")
    for key, least in (("parameters", 1), ("bits", 0.1), ("perplexity", 1)):
        if not is_number(row.get(key)) or row[key] < least:
            raise QuipError(f"row {i} of the chart: {key!r} must be a number ≥ {least}, got {row.get(key)!r}")
    if not isinstance(row.get("family", NONE), str):
        raise QuipError(f"row {i} of the chart: 'family' must be a text, got {row['family']!r}")
    numbers = {key: float(row[key]) for key in ("parameters", "bits", "perplexity")}
    return {key: row[key] for key in ("model", "method", "source")} | {"family": row.get("family", NONE)} | numbers


def size_text(size: float) -> str:
    """Bytes in GB or MB, three digits."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
