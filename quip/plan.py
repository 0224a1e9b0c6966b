"""What a run does to which layer: the method and its choices, layers that are left out, and the width of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from quip.errors import QuipError
from quip.families import decoder_blocks, quantizable, warn_unquantizable
from quip.methods import choose


@dataclass(frozen=True)
class Plan:
    """`widths`: the full name of every layer that is quantized, and its bits, mostly `bits`; `choices` as `choose`."""

    bits: int
    seed: int
    choices: dict
    widths: dict[str, int]


def make_plan(
    model: torch.nn.Module,
    bits: int = 2,
    seed: int = 0,
    preset: str = "default",
    *,
    skip: Iterable[str] = (),
    bits_for: dict[str, int] | None = None,
    **changes,
) -> Plan:
    """The plan for a model, whose weights need not be there.

    `skip` holds patterns (`*`, `?`, `[…]`) on the full names of layers, such as `*.down_proj`, that stay in 16 bits;
    `bits_for` maps patterns to widths, of which the last that matches counts. `preset` and `changes` as in
    `quip.methods.choose`. Raises `QuipError` for what cannot be, a pattern that matches no layer included. What the
    blocks hold that cannot be quantized is logged.
    """
    choices = check_arguments(bits, seed, preset, bits_for, **changes)
    prefix, blocks = decoder_blocks(model)
    names = [f"{prefix}.{name}" for name in quantizable(blocks)]
    if not names:
        raise QuipError(f"{type(model).__name__} has no linear layers in {prefix} that could be quantized")
    skipped = {name for pattern in skip for name in matching(pattern, names)}
    widths = {name: bits for name in names if name not in skipped}
    for pattern, width in (bits_for or {}).items():
        widths |= {name: width for name in matching(pattern, names) if name in widths}
    if not widths:
        raise QuipError("every layer is skipped: nothing is left to quantize")
    warn_unquantizable(model)
    return Plan(bits, seed, choices, widths)


def check_arguments(bits: int, seed: int, preset: str = "default", bits_for: dict | None = None, **changes) -> dict:
    """All choices of a run, from `quip.methods.choose`. Raises `QuipError` for what cannot be, before any work."""
    for of, width in (("", bits), *((f" for {pattern}", b) for pattern, b in (bits_for or {}).items())):
        if width not in (2, 3, 4):
            raise QuipError(f"bits{of} must be 2, 3 or 4, got {width}")
    if seed < 0 or seed >= 2**32:
        raise QuipError(f"the seed must be between 0 and 2^32 - 1, got {seed}")
    return choose(preset, **changes)


def matching(pattern: str, names: list[str]) -> list[str]:
    """The names that match a pattern. Raises `QuipError` if none does."""
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise QuipError(f"the pattern {pattern!r} matches no layer: their names are like {names[0]}")
    return found
