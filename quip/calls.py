"""Calls of the CPU kernel for more than one layer: a gated block, a norm, and a decoder block, one token at a time."""

from __future__ import annotations

import ctypes

import torch

from quip.cpu import DTYPES, Call, Unsaved, enough_memory, library


class Block(ctypes.Structure):
    """struct quip_block"""

    _fields_ = [
        *((k, ctypes.c_void_p) for k in ("q", "k", "v", "o", "gate", "up", "down", "before", "between")),
        *((k, ctypes.c_double) for k in ("before_eps", "between_eps", "scaling")),
        *((k, ctypes.c_int64) for k in ("heads", "shared", "size", "dtype")),
    ]


class BlockCall(Unsaved):
    """The kernel's calls for a decoder block: its structure, made once.

    Of the calls of its layers (q, k, v, o, gate, up, down; q, k, v and gate, up share their inputs), of the norms'
    weights and epsilons, of the attention's scaling and the size of its heads. All must fit together.
    """

    def __init__(self, calls: list[Call], weights: list[torch.Tensor], eps: list[float], scaling: float, size: int):
        self.calls, self.weights = calls, weights
        self.addresses, self.dtype = [w.data_ptr() for w in weights], weights[0].dtype
        self.heads, self.shared, self.size, self.n = calls[0].m // size, calls[1].m // size, size, calls[0].n
        numbers = *eps, scaling, self.heads, self.shared, size, DTYPES[self.dtype]
        self.structure = Block(*(call.at for call in calls), *self.addresses, *numbers)
        self.at = ctypes.addressof(self.structure)

    def is_of(self, calls: list[Call], weights: list[torch.Tensor]) -> bool:
        """Whether it was made of these."""
        return (
            calls == self.calls and [w.data_ptr() for w in weights] == self.addresses and weights[0].dtype == self.dtype
        )

    def turns_by(self, angles: torch.Tensor) -> bool:
        """Whether cosines or sines are those of one position, of the right type."""
        return angles.dtype == self.dtype and angles.numel() == self.size and angles.is_contiguous() and angles.is_cpu

    def enter(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q `(1, heads, 1, size)`, k and v `(1, shared, 1, size)` of x `(1, 1, n)`, turned by cos and sin."""
        q = x.new_empty(1, self.heads, 1, self.size)
        k, v = (x.new_empty(1, self.shared, 1, self.size) for _ in range(2))
        tensors = (t.data_ptr() for t in (x, cos, sin, q, k, v))
        failed = library().quip_block_in(self.at, *tensors, torch.get_num_threads())
        return enough_memory(failed, (q, k, v))

    def leave(self, x: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What the block makes of x, and of its q and all keys and values `(1, shared, count, size)`."""
        keys, values = keys.contiguous(), values.contiguous()  # as a cache has them
        y, count = torch.empty_like(x), keys.shape[2]
        tensors = (t.data_ptr() for t in (x, q, keys, values))
        steps = count * self.size, self.size
        failed = library().quip_block_out(self.at, *tensors, count, *steps, y.data_ptr(), torch.get_num_threads())
        return enough_memory(failed, y)


def gated(gate: Call, up: Call, down: Call, x: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) · up(x))`, x `(…, n)` as for `quip.cpu.linears`, of a gate and an up that `share_input`."""
    y = x.new_empty(*x.shape[:-1], down.m)
    batch, dtype = x.numel() // gate.n, DTYPES[x.dtype]
    layers = gate.at, up.at, down.at
    failed = library().quip_gated(*layers, x.data_ptr(), y.data_ptr(), batch, dtype, torch.get_num_threads())
    return enough_memory(failed, y)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """`weight · x / sqrt(mean(x²) + eps)` over the last dimension of a plain x; None if the kernel does not take it."""
    n = weight.numel()
    if x.shape[-1:] != (n,) or weight.dtype != x.dtype or not (weight.is_cpu and x.is_contiguous() and n):
        return None
    y = torch.empty_like(x)
    library().quip_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // n, n, eps, DTYPES[x.dtype])
    return y


def share_input(calls: list[Call]) -> bool:
    """Whether layers, if there are several, have one V, one number of bits and no D̃: one set of digits does for all."""
    several = len(calls) > 1
    return not several or all(c.structure.rescale is None and c.input_like(calls[0]) for c in calls)
