"""What a checkpoint holds: every layer's shape, bits per weight with all overhead, and proxy loss; and totals."""

from __future__ import annotations

import json
import math
from pathlib import Path

from quip.checkpoint import REPORT
from quip.errors import QuipError
from quip.verify import tensor_headers

DTYPE_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}

# Of the report of a layer: a number, that some do not have, or whose value is none; and pairs of numbers.
NUMBERS = ("relative_proxy_loss", "predicted_loss", "alpha", "alpha_asked", "tokens", "dead_inputs", "largest_input")
PAIRS = ("mu_weights", "mu_hessian", "trace_ratio")


def checkpoint_info(folder: str | Path) -> dict:
    """Sizes read from the checkpoint's tensors, losses from the report of the run that made it.

    Returns `settings`; `layers`, for each name shape, bits_per_weight (codes, scale, D̃ and seeds; not the bias, which
    was there before) and the report of that run: rho, relative_proxy_loss and what `quip.bounds.layer_report` says; and
    `totals`: quantized_weights, bits_per_weight, other_parameters (in 16 bits) and file_bytes (all weight files).
    Raises `QuipError` if the folder is not a checkpoint, or is damaged.
    """
    folder = Path(folder)
    settings, losses = read_report(folder)
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: size for file in files for name, size in tensor_sizes(file).items()}
    layers, weights, packed = {}, 0, 0
    for name, loss in losses.items():
        own = {k: n for k, n in tensors.items() if k.startswith(f"{name}.") and not k.endswith(".bias")}
        if f"{name}.qweight" not in own:
            raise QuipError(f"{folder} is damaged: its weight files lack {name}.qweight")
        count = math.prod(loss["shape"])
        size = sum(octets for octets, _ in own.values())
        layers[name] = {**loss, "bits_per_weight": 8 * size / count}
        weights, packed = weights + count, packed + size
        for k in own:
            del tensors[k]
    totals = {
        "quantized_weights": weights,
        "bits_per_weight": 8 * packed / weights,
        "other_parameters": sum(count for _, count in tensors.values()),
        "file_bytes": sum(file.stat().st_size for file in files),
    }
    return {"settings": settings, "layers": layers, "totals": totals}


def read_report(folder: Path) -> tuple[dict, dict[str, dict]]:
    """The `settings` and `layers` of the report in a checkpoint. Raises `QuipError` if it is none that quip writes."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        settings, layers = report["settings"], report["layers"]
        if not (isinstance(settings, dict) and isinstance(layers, dict) and layers):
            raise ValueError("no settings and layers")
        for name, values in layers.items():
            check_values(name, values)
    except (FileNotFoundError, NotADirectoryError):
        raise QuipError(f"{folder} is not a quip checkpoint: it has no {REPORT}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
        raise QuipError(f"{folder / REPORT} is damaged: {e}") from None
    return settings, layers


def check_values(name: str, values: dict) -> None:
    """Raise `ValueError`, naming the layer, for what cannot be the report of a layer."""
    present = {key: value for key, value in values.items() if value is not None}
    if missing := {"shape", "rho", "relative_proxy_loss"} - values.keys():
        raise ValueError(f"{name} has no {min(missing)}")
    for key in ("rho", *(key for key in NUMBERS if key in present)):
        if not isinstance(values[key], (int, float)):
            raise ValueError(f"{key} of {name} is no number")
    for key in ("shape", *(key for key in PAIRS if key in present)):
        pair = values[key]
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, (int, float)) for x in pair)):
            raise ValueError(f"{key} of {name} is no pair of numbers")
    if not all(isinstance(x, int) and x > 0 for x in values["shape"]):
        raise ValueError(f"shape of {name} is not positive")


def notes(layer: dict) -> list[str]:
    """What was unusual about a layer, from its entry in the report: a line each, most often none."""
    n, lines = layer["shape"][1], []
    tokens = layer.get("tokens", n)
    if tokens < n:
        lines.append(f"{tokens} calibration tokens for {n} inputs: what they do not show is left to the damping")
    if "alpha_asked" in layer:
        lines.append(f"H would not factor; damping raised from {layer['alpha_asked']:.2g} to {layer['alpha']:.2g}")
    if layer.get("dead_inputs"):
        lines.append(f"{layer['dead_inputs']} of {n} inputs are 0 on all calibration text")
    if n > 1 and layer.get("largest_input", 0) > 0.9:
        lines.append(f"massive activation: one input has {layer['largest_input']:.2%} of tr H")
    if layer["relative_proxy_loss"] is None:
        lines.append("its outputs are 0 on all calibration text, those of the quantized layer are not")
    return lines


def mean_loss(layers: dict[str, dict]) -> float:
    """Mean relative proxy loss of the layers that have one."""
    losses = [x["relative_proxy_loss"] for x in layers.values() if x["relative_proxy_loss"] is not None]
    return sum(losses) / len(losses) if losses else 0.0


def finite(content):
    """`content` with every NaN and infinity, at any depth, replaced by None: JSON has neither."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def tensor_sizes(file: Path) -> dict[str, tuple[int, int]]:
    """Bytes and number of entries of every tensor in a safetensors file, from its header."""
    sizes = {}
    for name, (dtype, shape) in tensor_headers(file).items():
        count = math.prod(shape)
        if dtype not in DTYPE_BYTES:
            raise QuipError(f"{file}: {name} is of type {dtype}, which no checkpoint of quip has")
        sizes[name] = (count * DTYPE_BYTES[dtype], count)
    return sizes
