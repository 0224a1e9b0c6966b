"""Every rounding method of the paper behind one interface, and the choices that a run can make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from quip.algorithm import PRESETS, Rounder
from quip.errors import QuipError
from quip.grids import admm_rounder, greedy_passes, greedy_rounder
from quip.ldlq import ldlq_rounder, optq
from quip.rounding import nearest, stochastic


@dataclass(frozen=True)
class Method:
    """`rounder(H, seed)` returns the function that rounds W `(m, n)` in units of the grid to `0 … maxq`.

    `order`: columns of largest diag(H) first. `passes`: greedy passes over the rounder's codes.
    """

    rounder: Callable[[torch.Tensor, int], Rounder]
    order: bool = False
    passes: int = 0


def stochastic_rounder(H: torch.Tensor, seed: int) -> Rounder:
    """Stochastic rounding of every weight by itself; each call draws the same numbers."""

    def round_(W: torch.Tensor, maxq: int) -> torch.Tensor:
        return stochastic(W, maxq, torch.Generator(W.device).manual_seed(seed))

    return round_


def optq_rounder(H: torch.Tensor, seed: int) -> Rounder:
    """OPTQ as its authors write it, with the inverse of H: the codes of LDLQ, more slowly (chapter 3)."""
    return lambda W, maxq: optq(W, H, maxq)


METHODS = {
    "near": Method(lambda H, seed: nearest),
    "stoch": Method(stochastic_rounder),
    "ldlq": Method(lambda H, seed: ldlq_rounder(H)),
    "optq": Method(optq_rounder),
    "ldlq-rg": Method(lambda H, seed: ldlq_rounder(H), order=True, passes=10),
    "greedy": Method(lambda H, seed: greedy_rounder(H, passes=10)),
    "admm": Method(lambda H, seed: admm_rounder(H, seed=seed)),
}
# A preset's method, and its greedy passes. QuIP is LDLQ in an incoherent basis.
PRESET_METHODS = {"paper": ("ldlq", 0), "default": ("ldlq-rg", 3)}


def choose(preset: str = "default", method: str | None = None, **changes) -> dict:
    """All choices of a run, by name: those of the preset, with `method` in place of its own, and `changes`.

    Names: method, passes, and the arguments of `quip.algorithm.quantize_matrix` rescale, order, rho, pre_clamp, alpha,
    center, incoherence and permute; "search" as rho is None there. A `method` brings its own order and passes; changes
    that are None count as not given. Raises `QuipError` for a name or a value that does not exist.
    """
    if preset not in PRESETS:
        raise QuipError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if method is not None and method not in METHODS:
        raise QuipError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    name, passes = PRESET_METHODS[preset]
    choices = {"method": name, "passes": passes, "incoherence": "kron", "permute": True, **PRESETS[preset]}
    if method is not None:
        choices |= {"method": method, "passes": METHODS[method].passes, "order": METHODS[method].order}
    unknown = changes.keys() - choices.keys()
    if unknown:
        raise QuipError(f"unknown choice {', '.join(sorted(unknown))}: there are {', '.join(choices)}")
    choices |= {key: value for key, value in changes.items() if value is not None}
    if choices["rho"] == "search":
        choices["rho"] = None
    check_choices(choices)
    return choices


def check_choices(choices: dict) -> None:
    """Raise `QuipError` for a value out of range, before any work is done."""
    if choices["passes"] < 0:
        raise QuipError(f"passes must be at least 0, got {choices['passes']}")
    if isinstance(choices["rho"], str) and choices["rho"] != "max":
        raise QuipError(f"the range rho must be a number, 'search' or 'max', got {choices['rho']!r}")
    if isinstance(choices["rho"], float | int) and not 0 < choices["rho"] < float("inf"):
        raise QuipError(f"the range rho must be a positive number, got {choices['rho']}")
    if not 0 <= choices["alpha"] < float("inf"):
        raise QuipError(f"the damping alpha must be a number of at least 0, got {choices['alpha']}")
    if choices["center"] not in ("mean", "median"):
        raise QuipError(f"damping center must be 'mean' or 'median', got {choices['center']!r}")
    if choices["incoherence"] not in ("kron", "none"):
        raise QuipError(f"incoherence must be 'kron' or 'none', got {choices['incoherence']!r}")


def matrix_arguments(choices: dict, seed: int = 0) -> dict:
    """The choices as arguments of `quip.algorithm.quantize_matrix`; `seed` is for the methods that draw numbers."""
    rest = {key: value for key, value in choices.items() if key not in ("method", "passes")}
    method, passes = METHODS[choices["method"]], choices["passes"]
    refine = partial(greedy_passes, passes=passes) if passes else None
    return {**rest, "rounder": partial(method.rounder, seed=seed), "refine": refine}
