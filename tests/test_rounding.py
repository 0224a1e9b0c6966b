"""Nearest, stochastic and adaptive rounding."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.proxy import proxy_loss
from quip.rounding import adaptive_round, nearest, stochastic

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return 8 * torch.rand(*shape, generator=generator(seed), dtype=torch.float64) - 4


def random_feedback(n, seed):
    return torch.randn(n, n, generator=generator(seed), dtype=torch.float64).triu(1)


def one_weight_at_a_time(W, U, rounding):
    What = torch.zeros_like(W)
    for k in range(W.shape[1]):
        shifted = [W[i, k] + sum((W[i, j] - What[i, j]) * U[j, k] for j in range(k)) for i in range(len(W))]
        What[:, k] = rounding(torch.stack(shifted))
    return What


def test_nearest_is_never_more_than_a_half_away():
    x = rand(10_000)
    assert torch.equal(nearest(x), nearest(x).round())
    assert (nearest(x) - x).abs().max() <= 0.5


def test_nearest_breaks_ties_to_even():
    assert nearest(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])).tolist() == [-2, 0, 0, 2, 2]


@pytest.mark.parametrize("rounding", [nearest, stochastic])
def test_codes_are_clamped_to_the_grid_and_no_further(rounding):
    codes = rounding(rand(10_000), maxq=3)
    assert codes.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("rounding", [nearest, stochastic])
def test_the_input_stays_as_it_was(rounding):
    x = rand(100)
    before = x.clone()
    rounding(x, maxq=1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_goes_to_a_neighbour_and_leaves_integers_alone(dtype):
    x = rand(10_000).to(dtype)
    codes = stochastic(x, generator=generator())
    assert ((codes == x.floor()) | (codes == x.ceil())).all()
    assert codes.dtype == dtype
    integers = torch.full((200_000,), 2.0**20 + 1, dtype=dtype)
    assert torch.equal(stochastic(integers, generator=generator()), integers)


@pytest.mark.parametrize("x", [-1.7, -0.2, 0.01, 0.5, 2.9])
def test_stochastic_has_no_bias_and_its_variance_is_f_1_minus_f(x):
    count, f = 100_000, x % 1
    codes = stochastic(torch.full((count,), x, dtype=torch.float64), generator=generator(1))
    assert codes.mean().item() == pytest.approx(x, abs=5 * (f * (1 - f) / count) ** 0.5)
    assert codes.var().item() == pytest.approx(f * (1 - f), rel=0.05)


@pytest.mark.parametrize(
    ("rounding", "mean_square"), [(nearest, 1 / 12), (lambda x: stochastic(x, generator=generator(1)), 1 / 6)]
)
def test_mean_square_of_the_error(rounding, mean_square):
    x = rand(200_000)
    assert (rounding(x) - x).square().mean().item() == pytest.approx(mean_square, rel=0.02)


def test_stochastic_repeats_with_its_seed_and_differs_with_another():
    x = rand(1000)
    assert torch.equal(stochastic(x, generator=generator(3)), stochastic(x, generator=generator(3)))
    assert not torch.equal(stochastic(x, generator=generator(3)), stochastic(x, generator=generator(4)))


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, seed=seeds)
def test_adaptive_rounding_is_one_weight_at_a_time(m, n, seed):
    W, U = rand(m, n, seed=seed), random_feedback(n, seed + 1)
    assert torch.equal(adaptive_round(W, U), one_weight_at_a_time(W, U, nearest))
    ours, naive = (partial(stochastic, maxq=3, generator=generator(seed)) for _ in range(2))
    assert torch.equal(adaptive_round(W, U, ours), one_weight_at_a_time(W, U, naive))


@settings(deadline=None, max_examples=20)
@given(m=sizes, n=sizes, seed=seeds)
def test_without_feedback_it_is_plain_rounding(m, n, seed):
    W = rand(m, n, seed=seed)
    assert torch.equal(adaptive_round(W, torch.zeros(n, n, dtype=W.dtype)), nearest(W))


def test_feedback_is_read_above_the_diagonal_only():
    W, U = rand(20, 8), random_feedback(8, 1)
    below = torch.ones(8, 8, dtype=W.dtype).tril()
    assert torch.equal(adaptive_round(W, U + below), adaptive_round(W, U))
    assert torch.equal(adaptive_round(W, below), nearest(W))


def test_no_column_looks_ahead_and_no_row_aside():
    W, U = rand(6, 8), random_feedback(8, 1)
    before = adaptive_round(W, U)
    changed = W.clone()
    changed[2, 5] += 1.4
    after = adaptive_round(changed, U)
    same = torch.ones(6, 8, dtype=torch.bool)
    same[2, 5:] = False
    assert torch.equal(before[same], after[same])
    assert before[2, 5] != after[2, 5]


def test_the_second_weight_makes_up_for_the_first():
    W = torch.tensor([[0.3, 0.4]])
    assert nearest(W).tolist() == [[0, 0]]
    assert adaptive_round(W, torch.tensor([[0, 0.9], [0, 0]])).tolist() == [[0, 1]]


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, seed=seeds, maxq=st.sampled_from([None, 3]))
def test_the_change_of_the_weights_is_eta_over_u_plus_i(m, n, seed, maxq):
    W, U = rand(m, n, seed=seed), random_feedback(n, seed + 1) / n
    X = torch.randn(2 * n, n, generator=generator(seed), dtype=W.dtype)
    H, inverse = X.T @ X / len(X), torch.linalg.inv(U + torch.eye(n))
    What = adaptive_round(W, U, lambda x: nearest(x, maxq))
    eta = What - (W + (W - What) @ U)
    assert torch.allclose(What - W, eta @ inverse)
    loss = torch.trace(eta @ inverse @ H @ inverse.T @ eta.T).item()
    assert proxy_loss(What, W, H) == pytest.approx(loss, rel=1e-8)
    if maxq is None:
        assert eta.abs().max() <= 0.5 + 1e-9
