"""Bits against memory: which GPU holds a model, and how fast it could write with it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from quip.errors import QuipError
from quip.interactive.component import NONE, Component, is_number

# Layers and width of a decoder with N weights: N = 12 · layers · width², width = 128 · layers. This gives the caches of
# GPT-3, of Llama 2 7B and 13B, and with `share` 8 that of Llama 2 70B, to within 4 %.
WIDTH_PER_LAYER = 128
CACHE_BYTES = 2  # of a number in the KV cache


def cache_bytes(weights: float, tokens: int, share: int = 1) -> float:
    """Bytes of the KV cache of a model with that many weights, for one text of `tokens` tokens.

    Each layer keeps two vectors a token in 16 bits, a key and a value, as wide as the model, or `share` times narrower
    where that many query heads share one pair. The number of layers is an estimate from the number of weights.
    """
    layers = (weights / (12 * WIDTH_PER_LAYER**2)) ** (1 / 3)
    return 2 * CACHE_BYTES * layers * layers * WIDTH_PER_LAYER / share * tokens


def memory_wall(
    gpus: Mapping[str, tuple[float, float]],  # name: memory in GB, bandwidth in GB/s
    weights: float = 70e9,
    bits: int = 2,
) -> Component:
    """A simulation: size of a model against the memory of GPUs, with the bound on tokens per second; :eq:`token-rate`.

    The reader chooses the number of weights, the bits of each, and a KV cache, which is read for every token as the
    weights are. It starts with `weights` and `bits`, and is a table of these where no script runs. Raises `QuipError`
    for no GPU, one without two positive numbers, weights outside 10⁸ … 10¹², and bits outside 1 … 16.
    """
    check_memory(gpus, weights, bits)
    size = weights * bits / 8e9
    lines = []
    for name, (memory, bandwidth) in gpus.items():
        fits = size < memory
        left, rate = (f"{memory - size:.1f}", f"{bandwidth / size:.1f}") if fits else (NONE, NONE)
        lines.append(
            f"<tr><th scope=row>{escape(name)}<span class=soft>{memory:g} GB</span></th>"
            f"<td class=bar></td><td class=n>{left}</td><td class=n>{rate}</td></tr>"
        )
    body = (
        f"<div class=controls></div>\n<p class=sum role=status>{weights / 1e9:g} billion weights of {bits} bits take "
        f"{size:.1f} GB.</p>\n<table><thead><tr><th scope=col>GPU</th><th scope=col class=bar></th>"
        "<th scope=col class=n>GB left</th><th scope=col class=n>tokens/s, at most</th></tr></thead>\n<tbody>\n"
    )
    shape = {"perLayer": WIDTH_PER_LAYER, "cacheBytes": CACHE_BYTES}
    data = {"gpus": list(gpus.values()), "weights": weights, "bits": bits} | shape
    return Component("memory", "simulation: memory wall", body + "\n".join(lines) + "\n</tbody></table>", data)


def check_memory(gpus: Mapping, weights: float, bits: int) -> None:
    """Raise `QuipError` for what `memory_wall` cannot draw."""
    if not gpus:
        raise QuipError("the memory wall needs at least one GPU")
    for name, values in gpus.items():
        if len(values) != 2 or not all(is_number(value) and value > 0 for value in values):
            raise QuipError(f"GPU {name!r} needs its memory in GB and its bandwidth in GB/s, got {values!r}")
    if not (is_number(weights) and 1e8 <= weights <= 1e12):
        raise QuipError(f"the number of weights must be 10⁸ … 10¹², got {weights!r}")
    if bits not in range(1, 17):
        raise QuipError(f"bits must be 1 … 16, got {bits!r}")
