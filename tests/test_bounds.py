"""Every inequality of chapter 6 on random matrices, the formula for a random basis, and the report of a layer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip import QuipError, bounds, quantize_matrix
from quip.algorithm import PRESETS, column_order, to_grid
from quip.incoherence import KroneckerTransform, haar_orthogonal, mu_hessian, mu_weights
from quip.ldlq import feedback_round, ldl
from quip.proxy import damp, proxy_loss
from quip.rounding import stochastic

sizes, seeds = st.integers(1, 24), st.integers(0, 2**31)
powers = st.floats(0, 6)


def second_moment(n, seed, power=2.0, tokens=None):
    """H of n inputs, from even strengths (power 0) to very uneven ones."""
    g = torch.Generator().manual_seed(seed)
    strengths = torch.rand(n, generator=g, dtype=torch.float64) ** power
    X = torch.randn(tokens or 2 * n, n, generator=g, dtype=torch.float64) * strengths
    X = X + 0.5 * X.mean(1, keepdim=True)
    return X.T @ X / len(X)


def in_random_basis(eigenvalues, seed):
    Q = torch.from_numpy(haar_orthogonal(len(eigenvalues), np.random.RandomState(seed)))
    H = (Q * eigenvalues) @ Q.T
    return (H + H.T) / 2


# the chain


@given(n=sizes, seed=seeds, power=powers)
@settings(max_examples=60, deadline=None)
def test_every_link_of_the_chain(n, seed, power):
    H = damp(second_moment(n, seed, power), 1e-6)
    lemma, cauchy, both = bounds.lemma_2(H), bounds.cauchy_schwarz(H), bounds.combination(H, m=4)
    assert lemma.holds() and cauchy.holds() and both.holds()
    # the links are one chain: the end of one is the start of the next
    mu, k = mu_hessian(H), bounds.rank(H)
    assert math.isclose(lemma.right, mu**2 / n * cauchy.left, rel_tol=1e-6)
    assert math.isclose(both.left, lemma.left, rel_tol=1e-9)  # 4/4 tr D
    assert math.isclose(both.right, mu**2 / n * cauchy.right, rel_tol=1e-6)
    assert bounds.least_trace(H).holds()
    assert 1 - 1e-9 <= bounds.effective_rank(H) <= k * (1 + 1e-9)


@given(n=sizes, m=st.integers(1, 5), seed=seeds, power=powers)
@settings(max_examples=60, deadline=None)
def test_losses_stay_below_their_worst_cases(n, m, seed, power):
    H = damp(second_moment(n, seed, power), 1e-6)
    W = 4 * torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert bounds.theorem_1(W, H).holds()
    assert all(bound.holds() for bound in bounds.lemma_3(W, H).values())


def test_an_inequality_that_fails_says_so():
    assert not bounds.Inequality(1.001, 1.0).holds()
    assert bounds.Inequality(1.0, 1.0).holds()


def test_expected_loss_of_stochastic_rounding_is_what_it_loses_on_average():
    n, H = 5, second_moment(5, 3)
    w = torch.rand(1, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W = w.expand(40_000, n)
    rows = stochastic(W, generator=torch.Generator().manual_seed(1)) - W
    losses = ((rows @ H) * rows).sum(1)
    error = losses.mean() - bounds.lemma_3(w, H)["stochastic"].left
    assert abs(error) < 5 * losses.std() / 200


def test_the_ends_of_the_chain_are_reached():
    # stochastic: every fractional part one half. Nearest: all errors along the heaviest direction.
    H = torch.eye(4, dtype=torch.float64)
    stoch = bounds.lemma_3(torch.full((2, 4), 0.5), H)["stochastic"]
    assert stoch.left == stoch.right
    ones = torch.ones(6, 6, dtype=torch.float64)
    near = bounds.lemma_3(torch.full((1, 6), 0.5 - 1e-9, dtype=torch.float64), ones)["nearest"]
    assert math.isclose(near.left, near.right, rel_tol=1e-6)
    # Lemma 2 and what no basis can beat, for equal eigenvalues in the coordinate basis of a Hadamard matrix's size 1
    one = torch.full((1, 1), 3.0)
    assert bounds.lemma_2(one).left == pytest.approx(bounds.lemma_2(one).right)
    assert bounds.least_trace(2 * H).left == pytest.approx(8) == bounds.least_trace(2 * H).right


def test_rank_and_effective_rank():
    H = second_moment(12, 0, power=0, tokens=5)
    assert bounds.rank(H) == 5
    assert bounds.effective_rank(H) <= 5
    assert bounds.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert bounds.cauchy_schwarz(torch.diag(torch.tensor([2.0, 2.0, 0.0]))) == pytest.approx((8, 8))


# a random basis


@pytest.mark.parametrize(
    "eigenvalues",
    [
        torch.arange(1, 145, dtype=torch.float64) ** -1,
        torch.arange(1, 145, dtype=torch.float64) ** -2,
        torch.cat([torch.ones(72), torch.full((72,), 0.01)]).double(),
        torch.rand(144, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1,
    ],
    ids=["1/j", "1/j^2", "two levels", "even"],
)
def test_trace_in_a_random_basis(eigenvalues):
    traces = torch.stack([ldl(in_random_basis(eigenvalues, seed))[1].sum() for seed in range(40)])
    assert bounds.random_basis_trace(eigenvalues) == pytest.approx(traces.mean().item(), rel=0.05)
    assert traces.min() > bounds.least_trace(torch.diag(eigenvalues)).left


@given(n=st.integers(1, 30), value=st.floats(1e-8, 1e8))
@settings(max_examples=30, deadline=None)
def test_equal_eigenvalues_leave_nothing_to_predict(n, value):
    assert bounds.random_basis_trace(torch.full((n,), value, dtype=torch.float64)) == pytest.approx(n * value, rel=1e-6)


# the report


def unclamped(W, H, q):
    """What LDLQ loses on q's grid when nothing is clamped, over the energy, and the basis that it used."""
    W_, H_ = q.basis.enter(W, damp(H, q.settings["alpha"], q.settings["center"]))
    columns = column_order(H_, q.settings["order"])
    target = to_grid(W_, q.scale, q.bits)[:, columns]
    codes = feedback_round(target, ldl(H_[columns][:, columns])[0])[:, columns.argsort()]
    step = 2 * q.scale / (2**q.bits - 1)
    error = q.basis.leave((codes - target[:, columns.argsort()]) * step)
    return proxy_loss(error, torch.zeros_like(W), H) / proxy_loss(torch.zeros_like(W), W, H), W_, H_


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bits", [2, 4])
def test_report_of_a_layer(preset, bits):
    g = torch.Generator().manual_seed(4)
    W, H = torch.randn(400, 36, generator=g, dtype=torch.float64), second_moment(36, 1)
    q = quantize_matrix(W, H, bits, **PRESETS[preset])
    report = bounds.layer_report(W, H, q)
    measured, W_, H_ = unclamped(W, H, q)
    assert report["predicted_loss"] == pytest.approx(measured, rel=0.05)
    assert report["mu_weights"] == pytest.approx([mu_weights(W), mu_weights(W_)])
    assert report["mu_hessian"] == pytest.approx([mu_hessian(H), mu_hessian(H_)], rel=1e-4)
    before, after = report["trace_ratio"]
    columns = column_order(H_, q.settings["order"])
    assert after == pytest.approx((ldl(H_[columns][:, columns])[1].sum() / H_.trace()).item())
    assert 0 < before <= 1


def test_report_takes_eigenvectors_and_leaves_wide_layers_out(monkeypatch):
    W, H = torch.randn(6, 20, dtype=torch.float64), second_moment(20, 2)
    q = quantize_matrix(W, H)
    Q = torch.linalg.eigh(H).eigenvectors
    assert bounds.layer_report(W, H, q, Q)["mu_hessian"] == pytest.approx(bounds.layer_report(W, H, q)["mu_hessian"])
    monkeypatch.setattr(bounds, "MU_WIDTH", 19)
    assert bounds.layer_report(W, H, q)["mu_hessian"] is None


def test_report_of_a_zero_layer():
    W, H = torch.zeros(3, 8), second_moment(8, 0)
    report = bounds.layer_report(W, H, quantize_matrix(W, H))
    assert report["predicted_loss"] == 0 and report["mu_weights"] is None


# bad input


@pytest.mark.parametrize("function", ["lemma_2", "cauchy_schwarz", "combination", "least_trace", "effective_rank"])
def test_bad_input_is_named(function):
    call = getattr(bounds, function)
    H = second_moment(5, 0)
    with pytest.raises(QuipError, match="must be square"):
        call(H[:, :4])
    with pytest.raises(QuipError, match="NaN"):
        call(H * math.nan)
    with pytest.raises(QuipError, match="not symmetric"):
        call(H.triu())
    with pytest.raises(QuipError, match="indefinite"):
        call(2 * torch.ones(5, 5) - torch.eye(5))


def test_weights_that_do_not_fit():
    with pytest.raises(QuipError):
        bounds.theorem_1(torch.zeros(2, 4), second_moment(5, 0))
    with pytest.raises(QuipError):
        bounds.lemma_3(torch.zeros(2, 4), second_moment(5, 0))


def test_kronecker_basis_is_nearly_as_good_as_a_uniform_one():
    values = torch.arange(1, 577, dtype=torch.float64) ** -1
    H = KroneckerTransform(576, 0, torch.float64).both_sides(torch.diag(values))
    assert ldl(H)[1].sum() == pytest.approx(bounds.random_basis_trace(values), rel=0.02)
