"""Benchmarks: each measures a method beside its limit in one run, since only ratios survive a noisy machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch

from quip.grids import greedy_pass
from quip.ldlq import feedback_round, ldl
from quip.rounding import nearest

SIZES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096))


def bench_quantize(sizes=SIZES, bits: int = 2, repeats: int = 3, seed: int = 0) -> list[dict]:
    """Time LDLQ and one greedy pass in float32 against one product of W `(m, n)` with a matrix `(n, n)`.

    LDLQ needs the errors of all columns before a column, `m n²/2` multiply-adds, and a greedy pass those of all other
    columns, `m n²`: the product, `m n²`, is what the processor needs for as many in the best case. Method and product
    take turns, and of each the fastest of `repeats` counts. Rows: m, n, bits, method, seconds, product_seconds, ratio.
    """
    rows = []
    for m, n in sizes:
        W, H, U = layer(m, n, bits, seed)
        rounding = partial(nearest, maxq=2**bits - 1)
        codes = feedback_round(W, U, rounding)
        methods = {
            "ldlq": lambda W=W, U=U, rounding=rounding: feedback_round(W, U, rounding),
            "greedy pass": lambda W=W, H=H, codes=codes: greedy_pass(W, codes, H, 2**bits - 1),
        }
        for name, method in methods.items():
            seconds, product = fastest_pair(method, lambda W=W, H=H: W @ H, repeats)
            row = {"m": m, "n": n, "bits": bits, "method": name, "seconds": seconds, "product_seconds": product}
            rows.append(row | {"ratio": seconds / product})
    return rows


def layer(m: int, n: int, bits: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W `(m, n)` in units of the grid, H `(n, n)` of correlated inputs and its feedback U `(n, n)`, all float32."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n + 64, n, generator=g)
    H = X.T @ X / len(X) + 0.1 * torch.eye(n)
    W = (2**bits - 1) / 2 * (1 + torch.randn(m, n, generator=g) / 1.6)
    return W, H, ldl(H.double())[0].float()


def fastest_pair(one: Callable, other: Callable, repeats: int) -> tuple[float, float]:
    """The least seconds of each of two functions, called in turns."""
    times = ([], [])
    for _ in range(repeats):
        for function, taken in zip((one, other), times, strict=True):
            start = perf_counter()
            function()
            taken.append(perf_counter() - start)
    return min(times[0]), min(times[1])
