"""Greedy passes, the bounded feedback and E8: against their plain forms, and what they promise."""

import math
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quip.algorithm import Basis, quantize_matrix, to_grid
from quip.errors import QuipError
from quip.grids import admm_rounder, bounded_feedback, greedy_pass, greedy_passes, greedy_rounder, nearest_e8
from quip.incoherence import KroneckerTransform
from quip.layers import load_layers
from quip.ldlq import damp_to_definite, ldl, ldlq, ldlq_rounder
from quip.proxy import proxy_loss
from quip.rounding import nearest, stochastic

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


@pytest.fixture(scope="module")
def real_layers():
    """W and H of the two real layers of the book, in their own basis and rotated."""
    basis = Basis(*(KroneckerTransform(576, seed, torch.float64) for seed in (0, 1)))
    layers = []
    for W, H in load_layers(Path(__file__).parents[1] / "book/data/smollm2.safetensors").values():
        H = damp_to_definite(H, 0.1, "median")[0]
        layers += [(W, H), basis.enter(W, H)]
    return layers


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clamped_ldlq_does_not_lose_to_nearest_on_real_layers(real_layers, bits):
    for W, H in real_layers:
        ldlq_, rms = ldlq_rounder(H), W.square().mean().sqrt()
        for reach in (1.6, 4.0, 10.0):
            T = to_grid(W, reach * rms, bits)
            assert proxy_loss(ldlq_(T, 2**bits - 1), T, H) < proxy_loss(nearest(T, 2**bits - 1), T, H)


def test_the_bounded_feedback_of_a_real_layer_is_feasible_and_little_worse_than_ldlq(real_layers):
    H = real_layers[3][1]
    R = shape(bounded_feedback(H, 1.0))
    assert 1.999 < R.square().sum(0).max() <= 2 * (1 + 1e-9)
    assert 1 < objective(R, H) / ldl(H)[1].sum() < 1.02


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


def test_passes_that_change_nothing_end_early(monkeypatch):
    W, codes, H, maxq = problem(4, 6, 2)
    calls = []
    monkeypatch.setattr("quip.grids.greedy_pass", lambda *a: calls.append(0) or greedy_pass(*a))
    settled = greedy_passes(W, codes, H, maxq, 1000)
    assert len(calls) < 1000
    assert torch.equal(greedy_pass(W, settled, H, maxq), settled)


@pytest.mark.parametrize("passes", [0, 1, 10])
def test_the_greedy_rounder_is_nearest_then_passes(passes):
    W, _, H, maxq = problem(8, 24, 2)
    codes = greedy_rounder(H, passes)(W, maxq)
    assert torch.equal(codes, greedy_passes(W, nearest(W, maxq), H, maxq, passes))
    assert proxy_loss(codes, W, H) <= proxy_loss(nearest(W, maxq), W, H)


def shape(U):
    """R = (U + I)⁻¹: a row of Ŵ − W is ηR."""
    return torch.linalg.inv(U + torch.eye(len(U), dtype=U.dtype))


def objective(R, H):
    return torch.trace(R @ H @ R.T).item()


def descend_gradient(H, c, steps=3000):
    """The least objective by accelerated gradient steps, each projected onto the constraint."""
    eye, X, t = torch.eye(len(H), dtype=H.dtype), torch.zeros_like(H), 1.0
    ahead, step = X, 0.5 / torch.linalg.eigvalsh(H)[-1]
    for _ in range(steps):
        new = ahead - step * 2 * ((ahead + eye) @ H).triu(1)
        new = new * (math.sqrt(c) / new.norm(dim=0).clamp(min=math.sqrt(c)))
        t, old = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        ahead, X = new + (old - 1) / t * (new - X), new
    return objective(X + eye, H)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(1, 20), st.floats(0.01, 4), st.integers(0, 1000))
@example(1, 0.1, 0)
@example(2, 0.01, 0)
def test_the_bounded_feedback_is_feasible_and_the_best(n, c, seed):
    H = problem(1, n, 2, seed)[2]
    U = bounded_feedback(H, c, tolerance=1e-4)
    R = shape(U)
    assert not U.tril().any()
    assert R.square().sum(0).max() <= (1 + c) * (1 + 1e-9)
    best = descend_gradient(H, c)
    assert best * (1 - 1e-3) <= objective(R, H) <= best * (1 + 2e-4)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_a_wide_bound_leaves_ldlq(n):
    H = problem(1, n, 2)[2]
    assert torch.equal(bounded_feedback(H, 1e9), ldl(H)[0])
    assert torch.equal(bounded_feedback(H, math.inf), ldl(H)[0])


def test_a_bound_that_just_acts_changes_the_feedback():
    H = problem(1, 30, 2)[2]
    largest = shape(ldl(H)[0]).square().sum(0).max().item()
    assert torch.equal(bounded_feedback(H, largest - 1 + 1e-9), ldl(H)[0])
    U = bounded_feedback(H, 0.9 * (largest - 1), tolerance=1e-6)
    assert math.isclose(shape(U).square().sum(0).max().item(), 1 + 0.9 * (largest - 1), rel_tol=1e-6)


def test_a_tight_bound_leaves_hardly_any_feedback():
    H = problem(1, 12, 2)[2]
    assert bounded_feedback(H, 1e-6, tolerance=1e-5).abs().max() < 2e-3


def test_a_looser_bound_never_costs_more():
    H = problem(1, 30, 2)[2]
    losses = [objective(shape(bounded_feedback(H, c, tolerance=1e-6)), H) for c in (0.01, 0.1, 0.5, 1, 2, 5, 50)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < H.trace()
    assert math.isclose(losses[-1], ldl(H)[1].sum(), rel_tol=1e-9)


def test_the_bounded_feedback_does_not_depend_on_the_unit_of_h():
    H = problem(1, 20, 2)[2]
    assert torch.allclose(bounded_feedback(1e-12 * H, 0.3), bounded_feedback(H, 0.3), atol=1e-9)


def test_the_bounded_feedback_of_a_float32_hessian_is_computed_in_float64():
    H = problem(1, 20, 2)[2].float()
    assert torch.equal(bounded_feedback(H, 0.3), bounded_feedback(H.double(), 0.3))


@pytest.mark.parametrize("c", [0, -1.0, math.nan])
def test_a_bound_that_is_not_positive_is_refused(c):
    with pytest.raises(QuipError, match="must be positive"):
        bounded_feedback(torch.eye(3), c)


@pytest.mark.parametrize("steps", [5, 20])
def test_a_program_that_does_not_converge_is_no_result(steps):
    with pytest.raises(QuipError, match=f"after {steps} steps"):
        bounded_feedback(problem(1, 30, 2)[2], 0.1, tolerance=1e-15, steps=steps)


def test_bounded_feedback_keeps_the_counterexample_near_nearest():
    W, H = counterexample(256)
    assert proxy_loss(admm_rounder(H)(W, 3), W, H) < 2 * proxy_loss(nearest(W, 3), W, H)


def test_the_admm_rounder_is_stochastic_rounding_with_the_bounded_feedback():
    W, _, H, maxq = problem(6, 12, 3)
    U, g = bounded_feedback(H, 0.5), torch.Generator().manual_seed(7)
    expected = torch.empty_like(W)
    for k in range(12):
        expected[:, k] = stochastic(W[:, k] + (W - expected)[:, :k] @ U[:k, k], maxq, g)
    round_ = admm_rounder(H, c=0.5, seed=7)
    assert torch.equal(round_(W, maxq), expected)
    assert torch.equal(round_(W, maxq), expected)  # the same draws again
    assert not torch.equal(admm_rounder(H, c=0.5, seed=8)(W, maxq), expected)


def test_inside_the_grid_the_admm_rounder_has_no_bias_and_the_variance_of_the_bound():
    c, rows = 0.5, 4000
    _, _, H, _ = problem(1, 6, 4)
    w = 7 + torch.rand(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    E = admm_rounder(H, c)(w.expand(rows, 6), 15) - w
    assert E.mean(0).abs().max() < 4 * math.sqrt((1 + c) / 4 / rows)
    assert E.var(0).max() <= (1 + c) / 4 * 1.1


ROUNDERS = {
    "ldlq": ldlq_rounder,
    "greedy": greedy_rounder,
    "admm": admm_rounder,
    "ldlq-rg": lambda H: lambda W, q: greedy_passes(W, ldlq_rounder(H)(W, q), H, q, 10),
}


@pytest.mark.parametrize("method", ROUNDERS)
@settings(deadline=None, max_examples=12, derandomize=True)
@given(m=st.integers(1, 6), n=st.integers(1, 30), bits=widths, seed=st.integers(0, 1000), single=st.booleans())
@example(m=1, n=1, bits=2, seed=0, single=True)
@example(m=2, n=2, bits=2, seed=0, single=False)
def test_every_rounder_stays_on_its_grid(method, m, n, bits, seed, single):
    W, _, H, maxq = problem(m, n, bits, seed)
    W = W.float() if single else W
    before = W.clone()
    round_ = ROUNDERS[method](H)
    codes = round_(W, maxq)
    assert codes.shape == W.shape
    assert codes.dtype == W.dtype
    assert torch.equal(codes, codes.round().clamp(0, maxq))
    assert torch.equal(round_(W, maxq), codes)
    assert torch.equal(W, before)
    assert torch.equal(round_(codes, maxq), codes)  # weights on the grid stay


@pytest.mark.parametrize("method", ["greedy", "admm"])
def test_rounders_serve_quantize_matrix(method):
    W, _, H, _ = problem(24, 40, 2)
    q = quantize_matrix(W, H, 2, rounder=ROUNDERS[method])
    assert 0 < q.report["relative_proxy_loss"] < 1


@pytest.mark.parametrize("rounder", [greedy_rounder, admm_rounder, bounded_feedback])
@pytest.mark.parametrize(
    ("H", "words"),
    [
        (torch.ones(2, 3), "square"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "NaN"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
    ],
)
def test_a_bad_hessian_is_refused(rounder, H, words):
    with pytest.raises(QuipError, match=words):
        rounder(H)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"W": torch.zeros(8, 11)}, "shapes do not fit"),
        ({"What": torch.zeros(7, 12)}, "shapes do not fit"),
        ({"H": torch.eye(11)}, "shapes do not fit"),
        ({"H": torch.zeros(12, 12)}, "positive"),
        ({"H": torch.full((12, 12), math.nan)}, "positive"),
        ({"W": torch.full((8, 12), math.nan)}, "NaN"),
    ],
)
def test_a_pass_refuses_what_does_not_fit(change, words):
    arguments = {"W": torch.zeros(8, 12), "What": torch.zeros(8, 12), "H": torch.eye(12)} | change
    with pytest.raises(QuipError, match=words):
        greedy_pass(*arguments.values(), 3)


HALVES = torch.tensor([x for x in product((-0.5, 0.5), repeat=8) if sum(x) % 2 == 0], dtype=torch.float64)


def e8_around(x):
    """The points of E8 next to x `(8,)`: both integers around each entry, or both halves, where the sum is even."""
    low, high = x.floor(), (x - 0.5).floor() + 0.5
    corners = torch.tensor(list(product((0.0, 1.0), repeat=8)), dtype=torch.float64)
    points = torch.cat([low + corners, high + corners])
    return points[points.sum(1) % 2 == 0]


@quick
@given(st.lists(st.floats(-20, 20), min_size=8, max_size=8))
@example([0.5] * 8)
@example([0.25] * 8)
@example([1.0] + [0.0] * 7)
def test_the_nearest_point_of_e8_is_that_of_brute_force(x):
    x = torch.tensor(x, dtype=torch.float64)
    point = nearest_e8(x)
    assert point.sum() % 2 == 0
    assert torch.equal(point, point.round()) or torch.equal(point - 0.5, (point - 0.5).round())
    assert math.isclose((x - point).norm(), (x - e8_around(x)).norm(dim=1).min(), abs_tol=1e-9)


def test_points_of_e8_are_their_own_nearest_points():
    points = torch.cat([e8_around(torch.tensor([5.3, -2, 0, 0.7, 8, -3.5, 1, 1], dtype=torch.float64)), HALVES])
    assert torch.equal(nearest_e8(points), points)
    assert torch.equal(nearest_e8(points.reshape(2, -1, 8)), points.reshape(2, -1, 8))
    assert torch.equal(nearest_e8(points.float()), points.float())


@pytest.mark.parametrize("x", [torch.zeros(7), torch.tensor(1.0), torch.full((3, 8), math.inf)])
def test_e8_refuses_other_vectors(x):
    with pytest.raises(QuipError, match="vectors of 8"):
        nearest_e8(x)
