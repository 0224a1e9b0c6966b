"""Nearest, stochastic and adaptive rounding."""

from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.errors import QuipError
from quip.proxy import proxy_loss
from quip.rounding import adaptive_round, nearest, stochastic

sizes = st.integers(1, 9)
small = st.integers(1, 6)
seeds = st.integers(0, 2**31)
rules = {"nearest": lambda seed: nearest, "stochastic": lambda seed: partial(stochastic, generator=generator(seed))}
each_rule = pytest.mark.parametrize("rule", rules)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return 8 * torch.rand(*shape, generator=generator(seed), dtype=torch.float64) - 4


def random_feedback(n, seed):
    return torch.randn(n, n, generator=generator(seed), dtype=torch.float64).triu(1)


def random_hessian(n, seed):
    X = torch.randn(n + 2, n, generator=generator(seed), dtype=torch.float64)
    return X.T @ X / len(X)


def losses_of_rows(What, W, H):
    return (((What - W) @ H) * (What - W)).sum(1)


def inverse(U):
    return torch.linalg.inv(U + torch.eye(len(U), dtype=U.dtype))


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


@pytest.mark.parametrize("entry", [(0, 0), (7, 7), (5, 2), (7, 0)])
@pytest.mark.parametrize("value", [1e-9, torch.nan])
def test_feedback_that_would_look_ahead_is_refused(entry, value):
    U = random_feedback(8, 1)
    U[entry] = value
    with pytest.raises(QuipError, match="strictly upper triangular"):
        adaptive_round(rand(3, 8), U)


@pytest.mark.parametrize(
    "shapes", [((2, 4), (3, 3)), ((2, 4), (4, 3)), ((2, 4), (4,)), ((4,), (4, 4)), ((2, 0, 0), (0, 0))]
)
def test_shapes_that_do_not_fit_are_refused_and_named(shapes):
    with pytest.raises(QuipError, match="do not fit") as caught:
        adaptive_round(*map(torch.zeros, shapes))
    assert all(str(shape) in str(caught.value) for shape in shapes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_is_refused(where, value):
    pair = [rand(2, 3), random_feedback(3, 0)]
    pair[where][0, 2] = value
    with pytest.raises(QuipError, match="NaN or infinite"):
        adaptive_round(*pair)


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


@each_rule
@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, seed=seeds, maxq=st.sampled_from([None, 3]))
def test_the_change_of_the_weights_is_eta_over_u_plus_i(rule, m, n, seed, maxq):
    W, U, H = rand(m, n, seed=seed), random_feedback(n, seed + 1) / n, random_hessian(n, seed + 2)
    What = adaptive_round(W, U, partial(rules[rule](seed), maxq=maxq))
    eta = What - (W + (W - What) @ U)
    assert torch.allclose(What - W, eta @ inverse(U))
    loss = torch.trace(eta @ inverse(U) @ H @ inverse(U).T @ eta.T).item()
    assert proxy_loss(What, W, H) == pytest.approx(loss, rel=1e-8)
    if maxq is None:
        assert eta.abs().max() <= {"nearest": 0.5, "stochastic": 1}[rule] + 1e-9


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, seed=seeds)
def test_no_weight_moves_farther_than_the_feedback_reaches(m, n, seed):
    W, U = rand(m, n, seed=seed), random_feedback(n, seed + 1)
    reach = inverse(U).abs().sum(0) / 2
    assert ((adaptive_round(W, U) - W).abs() <= reach + 1e-9).all()


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, seed=seeds)
def test_feeding_back_the_last_error_only_is_the_same_family(m, n, seed):
    W, B = rand(m, n, seed=seed), random_feedback(n, seed + 1)
    What, eta = torch.zeros_like(W), torch.zeros_like(W)
    for k in range(n):
        target = W[:, k] + eta[:, :k] @ B[:k, k]
        What[:, k] = nearest(target)
        eta[:, k] = What[:, k] - target
    U = (inverse(B) - torch.eye(n)).triu(1)
    assert torch.equal(adaptive_round(W, U), What)


@settings(deadline=None, max_examples=60)
@given(r=st.floats(0, 0.97), seed=seeds)
def test_when_the_nearest_pair_is_not_the_best(r, seed):
    H = torch.tensor([[1.0, r], [r, 1.0]], dtype=torch.float64)
    steps = torch.tensor(list(product(range(-3, 4), repeat=2)), dtype=torch.float64)
    delta = torch.rand(200, 2, generator=generator(seed), dtype=torch.float64) - 0.5  # nearest minus weights
    losses = torch.stack([losses_of_rows(delta + z, torch.zeros(2), H) for z in steps])
    beaten = losses.min(0).values < losses_of_rows(delta, torch.zeros(2), H) - 1e-12
    predicted = ((delta + r * delta.flip(1)).abs() > 0.5).any(1)
    assert torch.equal(beaten, predicted)


@pytest.mark.parametrize("r", [0.0, 0.3, 0.9, 0.999])
def test_how_often_the_nearest_pair_is_not_the_best(r):
    side = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000 - 0.5
    delta = torch.cartesian_prod(side, side)
    share = ((delta + r * delta.flip(1)).abs() > 0.5).any(1).double().mean().item()
    assert share == pytest.approx(r / (2 * (1 + r)), abs=2e-3)


@settings(deadline=None, max_examples=40)
@given(shares=st.lists(st.floats(0.001, 1), min_size=1, max_size=6), lowest=st.integers(-4, 2), seed=seeds)
def test_no_unbiased_rule_varies_less_than_stochastic_rounding(shares, lowest, seed):
    p = torch.tensor(shares, dtype=torch.float64) / sum(shares)  # probabilities of consecutive integers
    values = lowest + torch.arange(len(p))
    z = (p * values).sum()
    variance, f = (p * (values - z) ** 2).sum().item(), (z - z.floor()).item()
    assert variance >= f * (1 - f) - 1e-12
    codes = stochastic(z.expand(20_000), generator=generator(seed))
    assert codes.var().item() <= variance + 0.02


@settings(deadline=None, max_examples=15)
@given(n=small, seed=seeds)
def test_stochastic_rounding_costs_what_its_fractional_parts_say(n, seed):
    row, H = rand(1, n, seed=seed), random_hessian(n, seed + 1)
    W = row.expand(20_000, n)
    losses, f = losses_of_rows(stochastic(W, generator=generator(seed)), W, H), row - row.floor()
    expected = (f * (1 - f) * H.diagonal()).sum()
    assert expected <= H.trace() / 4
    assert abs(losses.mean() - expected) <= 7 * losses.std() / len(W) ** 0.5 + 1e-9


def test_stochastic_rounding_attains_its_worst_case_at_one_half():
    W, H = torch.full((40_000, 5), 2.5, dtype=torch.float64), random_hessian(5, 3)
    loss = proxy_loss(stochastic(W, generator=generator(1)), W, H) / len(W)
    assert loss == pytest.approx(H.trace().item() / 4, rel=0.03)


@settings(deadline=None, max_examples=40)
@given(n=small, seed=seeds)
def test_the_worst_case_of_nearest_rounding_is_a_corner(n, seed):
    H, signs = random_hessian(n, seed), torch.tensor(list(product([-1.0, 1.0], repeat=n)), dtype=torch.float64)
    worst = losses_of_rows(nearest(1 + signs / 2), 1 + signs / 2, H).max()  # ties go to even: every error is s/2
    assert torch.allclose(worst, losses_of_rows(signs, torch.zeros(n), H).max() / 4)
    assert H.trace() / 4 - 1e-12 <= worst <= n * torch.linalg.eigvalsh(H)[-1] / 4 + 1e-12
    W = rand(500, n, seed=seed)
    assert losses_of_rows(nearest(W), W, H).max() <= worst + 1e-12


def test_the_worst_case_of_nearest_rounding_is_n_times_the_other_when_all_inputs_agree():
    n = 16
    W, H = torch.full((3, n), 0.5, dtype=torch.float64), torch.ones(n, n, dtype=torch.float64)
    assert proxy_loss(nearest(W), W, H) == 3 * n * n / 4
    assert proxy_loss(nearest(W), W, torch.diag(H.diagonal())) == 3 * n / 4


@each_rule
@settings(deadline=None, max_examples=15)
@given(n=small, seed=seeds)
def test_average_loss_of_plain_rounding(rule, n, seed):
    W, H = rand(20_000, n, seed=seed), random_hessian(n, seed + 1)
    losses = losses_of_rows(rules[rule](seed + 2)(W), W, H)
    expected = H.trace() / {"nearest": 12, "stochastic": 6}[rule]
    assert abs(losses.mean() - expected) <= 7 * losses.std() / len(W) ** 0.5
