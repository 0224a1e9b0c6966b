"""A checkpoint is data, perhaps of a stranger: its weight files are checked against the model before they are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from quip.errors import QuipError
from quip.families import decoder_blocks, unquantizable
from quip.kernels import QuantizedLinear

Header = tuple[str, tuple[int, ...]]  # a tensor's dtype as safetensors names it, and its shape

DTYPES = {torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32"}  # of what a quantized layer stores exactly
FLOATS = ("F16", "BF16", "F32")  # of its bias


def tensor_headers(file: str | Path) -> dict[str, Header]:
    """Dtype and shape of every tensor in a safetensors file, from its header, which must fit the file's size.

    Raises `QuipError` if it is damaged, or no safetensors file at all: a pickle can run code, and is never opened.
    """
    try:
        with safe_open(file, framework="numpy") as f:
            parts = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError) as e:
        raise QuipError(f"{file} is damaged: {e}") from None


def check_files(model: torch.nn.Module, files: Iterable[str | Path], base: str = "") -> None:
    """Raise `QuipError`, naming the tensor, unless the weight files fit an empty model with quantized layers.

    Quantized layers must have all their tensors and no others, in their dtypes and shapes; of the rest, what is in the
    files must have the shape that the model has for it. `base` is a prefix of the files' names that the model lacks.
    """
    found: dict[str, Header] = {}
    for file in files:
        headers = tensor_headers(file)
        if twice := sorted(found.keys() & headers.keys()):
            raise QuipError(f"{file} is damaged: {twice[0]} is in another weight file too")
        found |= headers
    layers = {base + name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, layer in layers.items():
        check_layer(name, layer, {key: header for key, header in found.items() if key.startswith(f"{name}.")})
    for key in found:
        layer, _, part = key.rpartition(".")
        if part in ("qweight", "transforms") and layer not in layers:
            raise QuipError(f"{key}: the model has no quantized layer of this name")
    check_rest(model, found, base, layers)


def check_layer(name: str, layer: QuantizedLinear, found: dict[str, Header]) -> None:
    """Raise `QuipError` unless `found` are the tensors of this layer."""
    wanted = {f"{name}.{key}": x for key, x in layer.state_dict().items()}
    for key in sorted(wanted.keys() ^ found.keys()):
        raise QuipError(f"{key} is missing" if key in wanted else f"{key} is no tensor of a layer stored so")
    for key, x in wanted.items():
        dtypes = FLOATS if key == f"{name}.bias" else (DTYPES[x.dtype],)
        check_header(key, found[key], dtypes, tuple(x.shape))


def check_rest(model: torch.nn.Module, found: dict[str, Header], base: str, layers: dict) -> None:
    """Raise `QuipError` if another tensor has not the shape or the kind of numbers that the model has for it.

    Experts are left out: Transformers may store them in pieces.
    """
    prefix, blocks = decoder_blocks(model)
    other = {f"{base}{prefix}.{name}" for name in unquantizable(blocks)} | layers.keys()
    for name, x in model.state_dict().items():
        key = base + name
        if key in found and key.rpartition(".")[0] not in other:
            kind = (*FLOATS, "F64") if x.is_floating_point() else (found[key][0],)
            check_header(key, found[key], kind, tuple(x.shape))


def check_header(key: str, found: Header, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raise `QuipError` unless a tensor in a file has one of these dtypes, and this shape."""
    if found[0] not in dtypes or found[1] != shape:
        raise QuipError(f"{key} is {found[0]} {list(found[1])} in the file, and {dtypes[0]} {list(shape)} in the model")


def check_values(name: str, layer: QuantizedLinear) -> None:
    """Raise `QuipError`, naming the layer, for a scale, D̃ or bias that no quantization makes."""
    for key, least in (("scale", 0), ("rescale", torch.finfo(torch.float32).tiny), ("bias", None)):
        x = getattr(layer, key)
        if x is not None and not (torch.isfinite(x).all() and (least is None or (x >= least).all())):
            raise QuipError(f"{name}.{key} has entries that are NaN, infinite or out of range")


def check_loading(model: PreTrainedModel, info: dict) -> None:
    """Raise `QuipError` for weights that a checkpoint lacks, which Transformers would draw at random.

    `info` is what `from_pretrained(output_loading_info=True)` returns beside the model. In a checkpoint of ours,
    nothing may be left over either.
    """
    quantized = getattr(getattr(model.config, "quantization_config", None), "quant_method", None) == "quip"
    for what in ("missing_keys", "unexpected_keys") if quantized else ("missing_keys",):
        if names := sorted(info.get(what) or ()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise QuipError(
                f"{names[0]}{more}: {'missing in' if what == 'missing_keys' else 'not expected in'} its files"
            )
