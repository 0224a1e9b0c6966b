"""Real layers as a file: weights W and second moments H in float16, small enough to be part of a book."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quip.errors import QuipError


def save_layers(
    path: str | Path,
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]],  # name -> W (m, n), H (n, n)
    metadata: dict[str, str] | None = None,
) -> None:
    """Write layers as float16 safetensors: W, and of H the lower triangle of its Cholesky factor, packed.

    The factor has half the range of H on a logarithmic scale, and whatever rounding does to it, the H that is read back
    is positive definite. Raises `QuipError`, naming the layer, if H is not positive definite or float16 overflows.
    """
    tensors = {}
    for name, (W, H) in layers.items():
        L, failed = torch.linalg.cholesky_ex(H.double())
        if failed:
            raise QuipError(f"{name}: H is not positive definite")
        rows, columns = torch.tril_indices(*H.shape)
        tensors[f"{name}.W"] = W.half().contiguous()
        tensors[f"{name}.L"] = L[rows, columns].half()
        if not all(torch.isfinite(tensors[f"{name}.{part}"]).all() for part in "WL"):
            raise QuipError(f"{name}: entries too large for float16")
    save_file(tensors, path, metadata)


def load_layers(path: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The layers of a file by name, each `W (m, n)` and `H = L Lᵀ (n, n)` in float64.

    Raises `QuipError` if the file is missing, damaged, or not written by `save_layers`.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise QuipError(f"cannot read layers from {path}: {e}") from None
    layers = {}
    for name in sorted(key.removesuffix(".W") for key in tensors if key.endswith(".W")):
        W, packed = tensors[f"{name}.W"].double(), tensors.get(f"{name}.L", torch.empty(0)).double()
        n = W.shape[-1]
        if W.ndim != 2 or packed.shape != (n * (n + 1) // 2,):
            raise QuipError(f"{path} is damaged: {name} has no W (m, n) with a factor of n (n + 1)/2 entries")
        L = torch.zeros(n, n, dtype=torch.float64)
        rows, columns = torch.tril_indices(n, n)
        L[rows, columns] = packed
        layers[name] = W, L @ L.T
    if not layers:
        raise QuipError(f"{path} holds no layers")
    return layers
