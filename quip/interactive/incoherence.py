"""Weights before and after incoherence processing, computed in the browser as `quip.incoherence` computes them."""

from __future__ import annotations

import numpy as np
import torch

from quip.errors import QuipError
from quip.incoherence import KroneckerTransform, mu_weights
from quip.interactive.component import Component

M, N = 64, 96  # shape of the simulated W
WEIGHT_SEED = 1_000_000  # added to the seed of W, so that W and the transforms share no stream
FIRST_REACH, REACH_STEP = 0.5, 0.125  # grids that are tried, in units of the RMS
MOST = {"lone": 60, "columns": 4, "size": 40}  # what the sliders go up to


def outlier_matrix(lone: int, columns: int, size: float, seed: int = 0) -> np.ndarray:
    """Gaussian weights `(64, 96)` of variance 1, some columns `size`/3 times as large, lone entries of ± `size`."""
    rng = np.random.RandomState(WEIGHT_SEED + seed)
    W = rng.standard_normal((M, N))
    W[:, rng.permutation(N)[:columns]] *= max(size / 3, 1)
    places = rng.permutation(M * N)[:lone]
    W.flat[places] = size * np.sign(W.flat[places])
    return W


def turned(W: np.ndarray, seed: int = 0, permute: bool = True) -> np.ndarray:
    """`U W Vᵀ` with V of this seed and U of the next one."""
    V, U = (KroneckerTransform(n, s, torch.float64, permute) for n, s in ((N, seed), (M, seed + 1)))
    return U(V(torch.from_numpy(W)).T).T.numpy()


def two_bit_error(W: np.ndarray) -> float:
    """Relative squared error of rounding to four levels from −t to t, for the best of the reaches t."""
    w = W.flatten() / np.sqrt(np.mean(W**2))
    reaches = np.arange(FIRST_REACH, np.abs(w).max() + REACH_STEP, REACH_STEP)
    steps = 2 * reaches / 3
    return min(
        np.mean((np.clip(np.round((w + t) / step), 0, 3) * step - t - w) ** 2)
        for t, step in zip(reaches, steps, strict=True)
    )


def incoherence_lab(lone: int = 12, columns: int = 2, size: int = 15) -> Component:
    """A simulation: W and `U W Vᵀ` as pictures of the sizes of their entries, their histograms, μ and error at 2 bits.

    The reader chooses the outliers, the seeds, and the transform with its permutation or without. The script draws the
    very W and the very transform that `outlier_matrix` and `quip.incoherence` draw for these seeds. It starts with the
    arguments, and is a table of their figures where no script runs. Raises `QuipError` for what no slider reaches.
    """
    settings = {"lone": lone, "columns": columns, "size": size}
    for name, value in settings.items():
        least = 1 if name == "size" else 0
        if not isinstance(value, int) or not least <= value <= MOST[name]:
            raise QuipError(f"{name} must be an integer of {least} … {MOST[name]}, got {value!r}")
    W = outlier_matrix(lone, columns, size)
    mu, error = zip(*[(mu_weights(torch.from_numpy(X)), two_bit_error(X)) for X in (W, turned(W))], strict=True)
    rows = (("μ, the largest entry over the RMS", mu, ".2f"), ("error at 2 bits", error, ".1%"))
    lines = "\n".join(
        f"<tr><th scope=row>{name}</th><td>{before:{form}}</td><td>{after:{form}}</td></tr>"
        for name, (before, after), form in rows
    )
    body = (
        "<div class=controls></div>\n<div class=maps></div>\n<table><thead><tr><td></td><th scope=col>W</th>"
        f"<th scope=col>U W Vᵀ</th></tr></thead>\n<tbody>\n{lines}\n</tbody></table>\n<div class=histogram></div>"
    )
    shape = {"m": M, "n": N, "weightSeed": WEIGHT_SEED, "firstReach": FIRST_REACH, "reachStep": REACH_STEP}
    return Component("incoherence", "simulation: incoherence", body, {**settings, "most": MOST, **shape})
