"""The LDL decomposition, LDLQ and what it guarantees, feedback in blocks, and OPTQ."""

from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.errors import QuipError
from quip.layers import load_layers
from quip.ldlq import damp_to_definite, feedback_round, ldl, ldlq, ldlq_rounder, optq
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


def shaped(H, F):
    """`M_F = (F + I)⁻¹ H (F + I)⁻ᵀ`, under which rounding with feedback F is plain rounding."""
    inverse = torch.linalg.inv(F + torch.eye(len(H)))
    return inverse @ H @ inverse.T


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
        return shaped(H, F).trace().item()

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


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 7), seed=seeds, scale=st.sampled_from([0.0, 0.1, 1.0, "ldl"]))
def test_the_worst_case_of_nearest_rounding_is_the_worst_sign_pattern(n, seed, scale):
    H = random_hessian(n, seed)
    U, d = ldl(H)
    F = U if scale == "ldl" else n * scale * random_feedback(n, seed + 1)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
    losses = ((signs @ shaped(H, F)) * signs).sum(1) / 4
    assert losses.max() >= losses.mean() * (1 - 1e-9) >= d.sum() / 4 * (1 - 1e-6)
    # Every pattern can be had: eta is a hair less than s/2 in all of them, and their rows lose what is predicted.
    eps = 1e-4
    W = 5 - (0.5 - eps) * signs @ torch.linalg.inv(F + torch.eye(n))
    What = adaptive_round(W, F)
    assert torch.equal(What, torch.full_like(W, 5))
    measured = (((What - W) @ H) * (What - W)).sum(1)
    assert torch.allclose(measured, (1 - 2 * eps) ** 2 * losses, rtol=1e-6)
    if scale == "ldl":
        assert torch.allclose(losses, d.sum() / 4, rtol=1e-6)
    # And no row loses more.
    W = rand(50, n, seed=seed)
    E = adaptive_round(W, F) - W
    assert ((E @ H) * E).sum(1).max() <= losses.max() * (1 + 1e-9)


def expected_loss(w, H, F):
    """Of stochastic rounding, exactly: the sum over all 2ⁿ outcomes, each with its probability."""
    total = 0.0
    for ups in product((0, 1), repeat=len(w)):
        what, probability = torch.zeros_like(w), 1.0
        for k, up in enumerate(ups):
            z = w[k] + (w[:k] - what[:k]) @ F[:k, k]
            f = z - z.floor()
            what[k] = z.floor() + up
            probability = probability * (f if up else 1 - f)
        total += probability * (what - w) @ H @ (what - w)
    return float(total)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 5), seed=seeds, scale=st.sampled_from([0.0, 0.5, "ldl"]))
def test_stochastic_rounding_expects_at_most_a_quarter_of_the_trace(n, seed, scale):
    H = random_hessian(n, seed)
    F = ldl(H)[0] if scale == "ldl" else n * scale * random_feedback(n, seed + 1)
    bound = shaped(H, F).trace().item() / 4
    assert 0 <= expected_loss(rand(n, seed=seed + 2), H, F) <= bound * (1 + 1e-9)
    w = torch.zeros(n, dtype=torch.float64)
    w[0] = 0.5  # the first fractional part is free, and reaches the bound alone
    assert expected_loss(w[:1], H[:1, :1], F[:1, :1]) == pytest.approx(H[0, 0].item() / 4)


def test_with_stochastic_rounding_another_feedback_can_have_a_better_worst_case():
    U = torch.tensor([[0.0, 0.3], [0.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[0.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    H = (U + torch.eye(2)) @ (U + torch.eye(2)).T
    assert torch.allclose(ldl(H)[0], U)
    grid = torch.arange(20, dtype=torch.float64) / 20
    worst = {F: max(expected_loss(w, H, F) for w in torch.cartesian_prod(grid, grid)) for F in (U, other)}
    assert worst[U] == pytest.approx((2 - 0.3**2) / 4)  # less than tr D / 4 = 0.5, and not the least:
    assert worst[other] == pytest.approx((2 - 0.3 + 0.3**2) / 4)


@settings(deadline=None, max_examples=10)
@given(n=st.integers(2, 8), seed=seeds, scale=st.sampled_from([0.0, 0.3]))
def test_descent_on_the_average_loss_ends_at_ldl(n, seed, scale):
    H = random_hessian(n, seed)
    U, d = ldl(H)
    R = (U + torch.eye(n)) * (d / d.sum()).sqrt()
    F, seen = (n * scale * random_feedback(n, seed)).requires_grad_(), []
    optimiser = torch.optim.LBFGS(
        [F], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=0
    )

    def loss():
        optimiser.zero_grad()
        value = torch.linalg.solve_triangular(F.triu(1) + torch.eye(n), R, upper=True).square().sum()
        value.backward()
        seen.append(value.item())
        return value

    optimiser.step(loss)
    assert 1 - 1e-9 < min(seen) < 1.01


@settings(deadline=None, max_examples=40)
@given(n=sizes, seed=seeds)
def test_the_product_of_d_is_the_same_in_any_order(n, seed):
    H = random_hessian(n, seed)
    order = torch.randperm(n, generator=generator(seed))
    d, shuffled = ldl(H)[1], ldl(H[order][:, order])[1]
    assert torch.allclose(d.log().sum(), shuffled.log().sum(), atol=1e-6)
    assert torch.allclose(d.log().sum(), H.logdet(), atol=1e-6)
    assert (d.log().mean().exp() * n <= d.sum() * (1 + 1e-9)).item()


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
def test_with_a_start_columns_to_come_count_with_their_old_errors(m, n, leaf, seed):
    W, start, U = rand(m, n, seed=seed), rand(m, n, seed=seed + 1).round(), 0.3 * rand(n, n, seed=seed + 2)
    U.fill_diagonal_(0)
    E = W - start
    for k in range(n):
        E[:, k] = W[:, k] - nearest(W[:, k] + E @ U[:, k])
    assert torch.allclose(feedback_round(W, U, start=start, leaf=leaf), W - E)
    assert torch.equal(feedback_round(W, U.triu(), start=start, leaf=leaf), feedback_round(W, U.triu(), leaf=leaf))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"W": rand(20)}, r"shapes do not fit: W \(20,\)"),
        ({"U": random_feedback(19)}, r"U \(19, 19\)"),
        ({"start": rand(4, 20)}, r"start \(4, 20\)"),
        ({"start": rand(5, 20).float()}, "one dtype, got torch.float64, torch.float64, torch.float32"),
        ({"start": rand(5, 20), "U": torch.ones(20, 20, dtype=torch.float64)}, "zero on the diagonal"),
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
    W, U, start = arguments
    feedback_round(W, U, partial(nearest, maxq=3), start)
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


def naive_optq(W, H, rounding):
    """The inverse of H for the columns that are left, kept by elimination; the rest of W moves after every column."""
    W, P, codes = W.clone(), torch.linalg.inv(H), torch.zeros_like(W)
    for k in range(W.shape[1]):
        codes[:, k] = rounding(W[:, k])
        W[:, k + 1 :] -= torch.outer(W[:, k] - codes[:, k], P[k, k + 1 :] / P[k, k])
        P = P - torch.outer(P[:, k], P[k]) / P[k, k]
    return codes


@settings(deadline=None, max_examples=60)
@given(m=sizes, n=st.integers(1, 30), seed=seeds, rule=st.sampled_from(["nearest", "clamped", "stochastic"]))
def test_optq_gives_the_codes_of_ldlq(m, n, seed, rule):
    H, W = random_hessian(n, seed), rand(m, n, seed=seed + 1)
    maxq = 3 if rule == "clamped" else None
    rounding = partial(stochastic, generator=generator(seed)) if rule == "stochastic" else nearest
    codes = optq(W, H, maxq, rounding)
    assert torch.equal(codes, feedback_round(W, ldl(H)[0], rules(seed)[rule]()))
    assert torch.equal(codes, naive_optq(W, H, rules(seed)[rule]()))


def test_optq_gives_the_codes_of_ldlq_on_real_layers():
    layers = load_layers(Path(__file__).parent.parent / "book/data/smollm2.safetensors")
    for W, H in layers.values():
        H = damp_to_definite(H)[0]
        W = W[:48] / W.std()
        codes = ldlq(W, H)
        assert torch.equal(codes, optq(W, H))
        U, d = ldl(H)
        eta = codes - (W + (W - codes) @ U)
        assert proxy_loss(codes, W, H) == pytest.approx((eta.square() * d).sum().item(), rel=1e-9)
        assert proxy_loss(codes, W, H) < proxy_loss(nearest(W), W, H) / 4


@settings(deadline=None, max_examples=40)
@given(n=sizes, seed=seeds)
def test_the_rows_of_optq_s_factor_are_those_of_the_inverse_of_u_plus_i(n, seed):
    H = random_hessian(n, seed)
    T = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    U, d = ldl(H)
    inverse = torch.linalg.inv(U + torch.eye(n))
    assert torch.allclose(T / T.diagonal()[:, None], inverse, rtol=1e-5, atol=1e-6)
    assert torch.allclose(T.diagonal() ** -2, d, rtol=1e-6)


def test_optq_keeps_the_dtype_and_the_arguments():
    W, H = rand(20, 16).float(), random_hessian(16)
    before = W.clone(), H.clone()
    assert optq(W, H, 3).dtype == torch.float32
    assert all(map(torch.equal, (W, H), before))


@pytest.mark.parametrize("method", [ldlq, optq])
@pytest.mark.parametrize(
    ("W", "H", "why"),
    [
        (rand(2, 4), torch.eye(3), r"weights \(2, 4\) do not fit a Hessian \(3, 3\)"),
        (rand(3), torch.eye(3), r"weights \(3,\) do not fit"),
        (torch.full((2, 3), torch.inf), torch.eye(3), "weights have NaN or infinite"),
        (rand(2, 3), torch.ones(3, 3), "singular up to rounding"),
        (rand(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "indefinite"),
        (rand(2, 3), torch.eye(3)[:2], "square"),
    ],
)
def test_bad_input_is_refused_in_one_line(method, W, H, why):
    with pytest.raises(QuipError, match=why):
        method(W, H)


def test_the_other_order_is_ldlq_of_the_reversed_problem_and_differs():
    """The code of the QuIP paper: a lower factor, columns from last to first."""
    W, H = rand(20, 16), random_hessian(16)
    L = torch.linalg.cholesky(H)
    L = L / L.diagonal()
    What = torch.empty_like(W)
    for k in reversed(range(16)):
        What[:, k] = nearest(W[:, k] + (W[:, k + 1 :] - What[:, k + 1 :]) @ L[k + 1 :, k])
    assert torch.equal(What, ldlq(W.flip(1), H.flip(0, 1)).flip(1))
    assert not torch.equal(What, ldlq(W, H))


def test_a_rounder_factors_once_and_serves_any_number_of_matrices():
    H = random_hessian(12)
    rounder = ldlq_rounder(H)
    H_before = H.clone()
    H.zero_()  # the rounder has no more need of it
    for seed, maxq in ((1, None), (2, 3)):
        W = rand(6, 12, seed=seed)
        assert torch.equal(rounder(W, maxq), ldlq(W, H_before, maxq))


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
