"""Greedy passes: against coordinate descent column by column, and what they promise."""

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quip.algorithm import quantize_matrix
from quip.grids import greedy_pass, greedy_passes
from quip.ldlq import ldlq
from quip.proxy import proxy_loss
from quip.rounding import nearest

quick = settings(deadline=None, max_examples=25, derandomize=True)
sizes = st.integers(1, 40)
widths = st.sampled_from([2, 3, 4])


def problem(m, n, bits, seed=0):
    """Weights in units of the grid, some beyond its ends; arbitrary codes; a positive definite H; the largest code."""
    g = torch.Generator().manual_seed(seed)
    maxq = 2**bits - 1
    W = (torch.randn(m, n, generator=g, dtype=torch.float64) + 1) * maxq / 2
    A = torch.randn(n, n, generator=g, dtype=torch.float64)
    codes = torch.randint(maxq + 1, (m, n), generator=g).double()
    return W, codes, A @ A.T + 0.1 * torch.eye(n, dtype=torch.float64), maxq


def descend(W, What, H, maxq):
    """Coordinate descent, trying every point of the grid in every column."""
    What = What.clone()
    for k in range(W.shape[1]):
        tries = torch.stack([What] * (maxq + 1))  # (maxq + 1, m, n)
        tries[:, :, k] = torch.arange(maxq + 1.0)[:, None]
        E = tries - W
        What[:, k] = ((E @ H) * E).sum(-1).argmin(0).double()
    return What


def counterexample(n, c=0.01, rows=8):
    """The layer of chapter 7 on which clamped LDLQ loses n²/4 a row."""
    H = torch.ones(n, n, dtype=torch.float64) + torch.eye(n, dtype=torch.float64)
    H[-1, -1] = 1
    H[0, 1:-1] += 2 * c
    H[1:-1, 0] += 2 * c
    H[0, -1] += c
    H[-1, 0] += c
    H[0, 0] += 4 * c + n * c**2
    return (0.499 + 0.002 * (torch.arange(n) % 2)).double().expand(rows, n), H


@quick
@given(sizes, sizes, widths, st.integers(0, 1000))
@example(1, 1, 2, 0)
@example(3, 2, 2, 0)
def test_a_pass_is_coordinate_descent(m, n, bits, seed):
    W, codes, H, maxq = problem(m, n, bits, seed)
    assert torch.equal(greedy_pass(W, codes, H, maxq), descend(W, codes, H, maxq))


@quick
@given(sizes, sizes, widths, st.integers(0, 1000), st.booleans())
def test_a_pass_never_raises_the_loss(m, n, bits, seed, from_ldlq):
    W, codes, H, maxq = problem(m, n, bits, seed)
    codes = ldlq(W, H, maxq) if from_ldlq else codes
    after = greedy_pass(W, codes, H, maxq)
    assert proxy_loss(after, W, H) <= proxy_loss(codes, W, H) * (1 + 1e-12)
    assert torch.equal(after, after.round().clamp(0, maxq))


@quick
@given(sizes, sizes, widths)
def test_a_pass_in_float32_raises_the_loss_by_rounding_errors_at_most(m, n, bits):
    W, codes, H, maxq = problem(m, n, bits)
    after = greedy_pass(W.float(), codes.float(), H.float(), maxq).double()
    assert proxy_loss(after, W, H) <= proxy_loss(codes, W, H) * (1 + 1e-5)


def test_passes_end_where_no_single_code_can_be_improved():
    W, codes, H, maxq = problem(16, 24, 2)
    while True:
        after = greedy_pass(W, codes, H, maxq)
        if torch.equal(after, codes):
            break
        assert proxy_loss(after, W, H) < proxy_loss(codes, W, H)
        codes = after
    assert torch.equal(descend(W, codes, H, maxq), codes)


def test_a_pass_is_nearest_rounding_where_inputs_are_uncorrelated():
    W, codes, H, maxq = problem(8, 12, 3)
    assert torch.equal(greedy_pass(W, codes, H.diagonal().diag(), maxq), nearest(W, maxq))


def test_a_pass_leaves_its_arguments_alone():
    arguments = problem(8, 12, 3)[:3]
    before = [x.clone() for x in arguments]
    greedy_pass(*arguments, 7)
    assert all(map(torch.equal, arguments, before))


def test_clamped_ldlq_loses_to_nearest_on_the_counterexample():
    W, H = counterexample(256)
    assert math.isclose(proxy_loss(ldlq(W, H, 3), W, H), 127498, rel_tol=1e-5)
    assert math.isclose(proxy_loss(nearest(W, 3), W, H), 508, rel_tol=1e-3)


@pytest.mark.parametrize("n", [64, 128, 256])
def test_one_pass_repairs_the_counterexample(n):
    W, H = counterexample(n)
    clamped = ldlq(W, H, 3)
    assert proxy_loss(clamped, W, H) > 8 * n**2 / 4 * 0.8
    assert proxy_loss(greedy_pass(W, clamped, H, 3), W, H) < 1.01 * proxy_loss(nearest(W, 3), W, H)


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_greedy_passes_are_so_many_passes(passes):
    W, codes, H, maxq = problem(8, 24, 2)
    expected = codes
    for _ in range(passes):
        expected = greedy_pass(W, expected, H, maxq)
    assert torch.equal(greedy_passes(W, codes, H, maxq, passes), expected)


def test_float32_weights_may_be_refined_with_a_float64_hessian():
    W, codes, H, maxq = problem(8, 24, 2)
    refined = greedy_passes(W.float(), codes.float(), H, maxq)
    assert refined.dtype == torch.float32
    assert (refined != greedy_passes(W, codes, H, maxq)).double().mean() < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_passes_improve_a_quantized_matrix(bits):
    W, _, H, _ = problem(24, 40, bits)
    without, with_two = (
        quantize_matrix(W, H, bits, rho=2.0, refine=partial(greedy_passes, passes=passes)).report["relative_proxy_loss"]
        for passes in (0, 2)
    )
    assert with_two < without
