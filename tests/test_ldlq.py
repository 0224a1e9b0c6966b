"""The LDL decomposition, feedback in blocks, and LDLQ."""

from functools import partial
from time import perf_counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.errors import QuipError
from quip.ldlq import damp_to_definite, feedback_round, ldl, ldlq, ldlq_rounder
from quip.proxy import damp, proxy_loss
from quip.rounding import adaptive_round, nearest, stochastic

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return 8 * torch.rand(*shape, generator=generator(seed), dtype=torch.float64) - 4


def random_hessian(n, seed=0):
    """Of correlated inputs, and well enough conditioned to compare to many digits."""
    g = generator(seed)
    X = torch.randn(4 * n, n, generator=g, dtype=torch.float64) @ torch.randn(n, n, generator=g, dtype=torch.float64)
    H = X.T @ X / len(X)
    return H + 0.01 * H.diagonal().mean() * torch.eye(n)


def random_feedback(n, seed=0):
    return torch.randn(n, n, generator=generator(seed), dtype=torch.float64).triu(1) / n


def ldl_by_elimination(H):
    rest, R, d = H.clone(), torch.zeros_like(H), torch.zeros(len(H), dtype=H.dtype)
    for k in reversed(range(len(H))):
        d[k] = rest[k, k]
        R[:, k] = rest[:, k] / d[k]
        rest -= d[k] * torch.outer(R[:, k], R[:, k])
    return R.triu(1), d


def rules(seed=0):
    """Each a fresh rounding on every call, so that two runs draw the same numbers."""
    return {
        "nearest": lambda: nearest,
        "clamped": lambda: partial(nearest, maxq=3),
        "stochastic": lambda: partial(stochastic, generator=generator(seed)),
    }


@settings(deadline=None, max_examples=40)
@given(n=sizes, seed=seeds)
def test_the_factors_are_triangular_and_multiply_to_h(n, seed):
    H = random_hessian(n, seed)
    U, d = ldl(H)
    R = U + torch.eye(n)
    assert torch.equal(U, U.triu(1))
    assert (d > 0).all()
    assert torch.allclose(R * d @ R.T, H)
    for ours, eliminated in zip((U, d), ldl_by_elimination(H), strict=True):
        assert torch.allclose(ours, eliminated, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("H", "why"),
    [
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), r"not positive definite but indefinite: .* from -1 to 3, so"),
        (torch.ones(2, 2), r"not positive definite but singular up to rounding: .* from .* to 2; use more damping"),
        (torch.zeros(1, 1), "singular up to rounding: its eigenvalues go from 0 to 0"),
        (-torch.eye(3), "negative diagonal"),
        (torch.full((2, 2), torch.nan), "NaN"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.ones(2, 3), r"square, got shape \(2, 3\)"),
        (torch.ones(3), r"square, got shape \(3,\)"),
    ],
)
def test_ldl_says_what_is_wrong_with_h(H, why):
    for function in (ldl, ldlq_rounder, lambda H: ldlq(torch.zeros(1, len(H), dtype=H.dtype), H)):
        with pytest.raises(QuipError, match=why):
            function(H)


def test_where_single_precision_fails_ldl_takes_double():
    X = torch.randint(-3, 4, (10, 200), generator=generator()).double()
    H = X.T @ X + 2**-16 * torch.eye(200)  # exact in float32, whose 190 smallest pivots are noise
    assert torch.equal(H.float().double(), H)
    assert torch.linalg.cholesky_ex(H.float().flip(0, 1))[1]
    single, double = ldl(H.float()), ldl(H)
    for ours, exact in zip(single, double, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, exact.float())


@settings(deadline=None, max_examples=40)
@given(n=sizes, tokens=sizes, seed=seeds, alpha=st.sampled_from([0, 1e-12, 0.01, 0.3, 2.0]))
def test_enough_damping_for_a_factor_and_no_more(n, tokens, seed, alpha):
    X = torch.randn(tokens, n, generator=generator(seed), dtype=torch.float64)
    H = (X.T @ X / tokens).float()  # singular where there are fewer tokens than inputs, and rounded
    damped, used = damp_to_definite(H, alpha, "median")
    assert damped.dtype == torch.float64
    assert torch.equal(damped, damp(H.double(), used, "median"))
    ldl(damped)
    tried = [alpha * 10.0**k for k in range(16)] if alpha else [0, *(10.0**k for k in range(-6, 1))]
    assert used in tried[:1] + [a for a in tried if a <= 1]
    for less in tried[: tried.index(used)]:
        assert torch.linalg.cholesky_ex(damp(H.double(), less, "median"))[1]


def test_damping_grows_tenfold_until_the_factorisation_works():
    X = torch.randn(1000, 3, generator=generator(3), dtype=torch.float64)
    X = X @ torch.randn(3, 64, generator=generator(4), dtype=torch.float64)
    H = (X.T @ X / 1000).float()
    lift = -torch.linalg.eigvalsh(H.double()).min() / H.diagonal().mean()
    assert 1.1e-7 < lift < 0.9e-6  # what float32 did to its zeros: the next power of ten is 1e-6
    for alpha, used in ((0.01, 0.01), (0, 1e-6), (3e-9, 3e-6 if lift > 3e-7 else 3e-7), (1e-8, 1e-6)):
        assert damp_to_definite(H, alpha)[1] == pytest.approx(used)


def test_inputs_that_are_always_zero_are_damped_too():
    damped, used = damp_to_definite(torch.zeros(2, 2), 0)
    assert used == 1e-6
    assert torch.equal(damped, 1e-6 * torch.eye(2, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 12), seed=seeds, share=st.sampled_from([0.002, 0.3]), alpha=st.sampled_from([0, 0.01, 0.1, 1]))
def test_no_damping_hides_that_h_is_indefinite(n, seed, share, alpha):
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=torch.float64))[0]
    values = torch.ones(n, dtype=torch.float64)
    values[0] = -share
    H = (Q * values) @ Q.T
    H = (H + H.T) / 2 + torch.diag((-H.diagonal()).clamp(min=0))  # a negative diagonal would be noticed before
    if torch.linalg.eigvalsh(H)[0] > -0.0015:
        return
    with pytest.raises(
        QuipError, match=r"layer 7 .* indefinite: its eigenvalues go from -.* to .*, so it is no second"
    ):
        damp_to_definite(H, alpha, name="layer 7")


def test_no_damping_hides_an_indefinite_h_whose_rows_sum_to_zero():
    H = torch.tensor([[0.5, 1.5, -2.0], [1.5, 0.5, -2.0], [-2.0, -2.0, 4.0]])
    for H_ in (H, torch.tensor([[1.0, -2.0], [-2.0, 1.0]])):
        with pytest.raises(QuipError, match="indefinite"):
            damp_to_definite(H_, 100.0)


@pytest.mark.parametrize(
    ("H", "alpha", "why"),
    [
        (torch.ones(2, 3), 0.01, "layer 7: the Hessian must be square"),
        (torch.full((2, 2), torch.inf), 0.01, "layer 7: the Hessian has NaN or infinite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 0.01, "layer 7: the Hessian is not symmetric"),
        (torch.eye(2), -0.01, "layer 7: the damping alpha must be 0 or a positive number, got -0.01"),
        (torch.eye(2), float("nan"), "layer 7: the damping alpha"),
    ],
)
def test_damping_names_the_layer(H, alpha, why):
    with pytest.raises(QuipError, match=why):
        damp_to_definite(H, alpha, name="layer 7")


def test_damping_that_never_suffices_says_so():
    # The median is 1 and cannot lift the noise of an input that is 10^8 times stronger.
    H = torch.eye(5, dtype=torch.float64)
    H[:2, :2] = 1e8 * torch.tensor([[1, 1 + 1e-7], [1 + 1e-7, 1]], dtype=torch.float64)
    with pytest.raises(
        QuipError, match=r"layer 7 is not positive definite, even with a damping alpha of 1: .* from -10 to"
    ):
        damp_to_definite(H, 0.01, "median", "layer 7")
    assert damp_to_definite(H, 1e-9, "mean")[1] == pytest.approx(1e-6)


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, seed=seeds, rule=st.sampled_from(["nearest", "clamped", "stochastic"]))
def test_ldl_feedback_leaves_tr_eta_d_eta(m, n, seed, rule):
    H, W = random_hessian(n, seed), rand(m, n, seed=seed + 1)
    U, d = ldl(H)
    What = feedback_round(W, U, rules(seed)[rule]())
    eta = What - (W + (W - What) @ U)
    assert proxy_loss(What, W, H) == pytest.approx((eta.square() * d).sum().item(), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(n=sizes, seed=seeds, scale=st.sampled_from([0.01, 0.1, 1.0]))
def test_no_other_feedback_does_better_on_average(n, seed, scale):
    H = random_hessian(n, seed)
    U, d = ldl(H)

    def average(F):
        inverse = torch.linalg.inv(F + torch.eye(n))
        return torch.trace(inverse @ H @ inverse.T).item()

    assert average(U) == pytest.approx(d.sum().item(), rel=1e-6)
    assert average(U + scale * random_feedback(n, seed)) >= average(U) * (1 - 1e-9)


@pytest.mark.parametrize(("rule", "c"), [("nearest", 12), ("stochastic", 6)])
def test_average_loss_is_tr_d_over_c(rule, c):
    H = random_hessian(24)
    U, d = ldl(H)
    W = torch.rand(20_000, 24, generator=generator(1), dtype=torch.float64)
    loss = proxy_loss(feedback_round(W, U, rules(2)[rule]()), W, H) / len(W)
    assert loss == pytest.approx(d.sum().item() / c, rel=0.02)
    assert loss < 0.8 * H.trace().item() / c


def test_no_weights_lose_more_than_a_quarter_of_tr_d():
    # eta = 1/2 everywhere, the worst there is: W = What - eta (U + I)^-1.
    H = random_hessian(10)
    U, d = ldl(H)
    eta = torch.full((3, 10), 0.5 - 1e-9, dtype=H.dtype)
    W = 5 - eta @ torch.linalg.inv(U + torch.eye(10))
    What = ldlq(W, H)
    assert torch.equal(What, torch.full_like(W, 5))
    assert proxy_loss(What, W, H) == pytest.approx(3 / 4 * d.sum().item(), rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    m=sizes,
    n=st.integers(1, 40),
    leaf=st.integers(1, 40),
    rule=st.sampled_from(["nearest", "clamped", "stochastic"]),
    seed=seeds,
)
def test_blocks_give_the_codes_of_the_plain_loop(m, n, leaf, rule, seed):
    W, U = rand(m, n, seed=seed), random_feedback(n, seed + 1)
    plain = adaptive_round(W, U, rules(seed)[rule]())
    assert torch.equal(feedback_round(W, U, rules(seed)[rule](), leaf=leaf), plain)


def test_blocks_give_the_codes_of_the_plain_loop_at_a_layer_s_width():
    W, U = rand(64, 576), ldl(random_hessian(576))[0]
    assert torch.equal(feedback_round(W, U), adaptive_round(W, U))
    assert not torch.equal(feedback_round(W, U), nearest(W))


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=st.integers(1, 24), leaf=st.integers(1, 8), seed=seeds)
def test_with_a_target_the_errors_are_still_those_of_w(m, n, leaf, seed):
    W, target, U = rand(m, n, seed=seed), rand(m, n, seed=seed + 1), random_feedback(n, seed + 2)
    What = torch.empty_like(W)
    for k in range(n):
        What[:, k] = nearest(target[:, k] + (W[:, :k] - What[:, :k]) @ U[:k, k])
    assert torch.equal(feedback_round(W, U, target=target, leaf=leaf), What)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"W": rand(20)}, r"shapes do not fit: W \(20,\)"),
        ({"U": random_feedback(19)}, r"U \(19, 19\)"),
        ({"target": rand(4, 20)}, r"target \(4, 20\)"),
        ({"U": random_feedback(20).float()}, "one dtype, got torch.float64, torch.float32"),
        ({"W": torch.full((5, 20), torch.nan, dtype=torch.float64)}, "NaN"),
        ({"U": random_feedback(20).T}, "strictly upper triangular"),
        ({"U": random_feedback(20) + torch.eye(20)}, "strictly upper triangular"),
        ({"leaf": 0}, "leaf must be at least 1 column, got 0"),
    ],
)
def test_feedback_round_says_what_does_not_fit(change, why):
    with pytest.raises(QuipError, match=why):
        feedback_round(**({"W": rand(5, 20), "U": random_feedback(20)} | change))


def test_the_arguments_stay_as_they_were():
    arguments = [rand(5, 20), random_feedback(20), rand(5, 20, seed=1)]
    before = [x.clone() for x in arguments]
    W, U, target = arguments
    feedback_round(W, U, partial(nearest, maxq=3), target)
    ldlq(W, random_hessian(20), maxq=3)
    assert all(map(torch.equal, arguments, before))


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, seed=seeds, maxq=st.sampled_from([None, 3, 15]))
def test_ldlq_is_adaptive_rounding_with_the_ldl_factor(m, n, seed, maxq):
    H, W = random_hessian(n, seed), rand(m, n, seed=seed + 1)
    codes = ldlq(W, H, maxq)
    assert torch.equal(codes, adaptive_round(W, ldl(H)[0], partial(nearest, maxq=maxq)))
    assert torch.equal(codes, codes.round())
    if maxq is not None:
        assert codes.min() >= 0
        assert codes.max() <= maxq


@settings(deadline=None, max_examples=20)
@given(m=sizes, n=sizes, seed=seeds)
def test_uncorrelated_inputs_leave_nearest_rounding(m, n, seed):
    W = rand(m, n, seed=seed)
    H = torch.diag(torch.rand(n, generator=generator(seed), dtype=torch.float64) + 0.1)
    assert torch.equal(ldlq(W, H), nearest(W))


@pytest.mark.parametrize("maxq", [None, 3])
def test_ldlq_beats_nearest_on_correlated_inputs(maxq):
    H = random_hessian(64)
    W = 3 * torch.rand(50, 64, generator=generator(), dtype=torch.float64)
    assert proxy_loss(ldlq(W, H, maxq), W, H) < 0.8 * proxy_loss(nearest(W, maxq), W, H)


def test_it_factors_in_float64_and_rounds_in_the_dtype_of_w():
    H = torch.ones(40, 40) + 2**-14 * torch.eye(40)  # exact in float32, where its factors are not
    W = rand(500, 40).float()
    codes = ldlq(W, H)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, feedback_round(W, ldl(H.double())[0].float()))
    assert not torch.equal(codes, feedback_round(W, ldl(H)[0]))


def test_a_rounder_factors_once_and_serves_any_number_of_matrices():
    H = random_hessian(12)
    rounder = ldlq_rounder(H)
    H_before = H.clone()
    H.zero_()  # the rounder has no more need of it
    for seed, maxq in ((1, None), (2, 3)):
        W = rand(6, 12, seed=seed)
        assert torch.equal(rounder(W, maxq), ldlq(W, H_before, maxq))


def test_ldlq_refuses_what_it_cannot_factor():
    with pytest.raises(QuipError, match="not positive definite"):
        ldlq(rand(2, 3), torch.ones(3, 3))


@pytest.mark.slow
def test_blocks_are_ten_times_faster_than_the_plain_loop():
    n = 2048
    U = ldl(random_hessian(n))[0].float()
    W = 3 * torch.rand(n, n, generator=generator(), dtype=torch.float32)

    def seconds(function):
        start = perf_counter()
        function(W, U)
        return perf_counter() - start

    # In turn, so that both meet the same load; the best of each is the least disturbed.
    runs = [(seconds(adaptive_round), seconds(feedback_round), seconds(feedback_round)) for _ in range(3)]
    plain, blocks = min(run[0] for run in runs), min(min(run[1:]) for run in runs)
    print(f"\nplain loop {plain:.3f} s, blocks {blocks:.3f} s: {plain / blocks:.1f} times faster")
    assert plain / blocks >= 10
