"""QuIP for one matrix: against dense matrices and plain loops, and at its edges."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quip.algorithm import (
    PRESETS,
    Basis,
    from_grid,
    quantize_matrix,
    rescaling,
    round_matrix,
    search_range,
    to_grid,
)
from quip.errors import QuipError
from quip.incoherence import KroneckerTransform
from quip.layers import load_layers
from quip.ldlq import ldl, ldlq_rounder
from quip.proxy import damp, proxy_loss, relative_proxy_loss
from quip.rounding import adaptive_round, nearest

ROOT = Path(__file__).resolve().parent.parent
quick = settings(deadline=None, max_examples=15, derandomize=True)
sizes = st.integers(1, 40)
widths = st.sampled_from([2, 3, 4])
presets = pytest.mark.parametrize("preset", PRESETS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(m, n, seed=0):
    """Weights with a heavy column and an outlier, and the second moment of correlated inputs of unequal strength."""
    W, X = normal(m, n, seed=seed), normal(4 * n, n, seed=seed + 1) @ normal(n, n, seed=seed + 2)
    X *= torch.exp(0.5 * normal(n, seed=seed + 3))
    W[:, 0] *= 4
    W[-1, -1] = 10
    return W, X.T @ X / len(X)


def dense(transform):
    return transform(torch.eye(transform.n, dtype=torch.float64)).T


def candidates(W):
    """Every ρ that is tried: up to 4, and on until nothing is clamped."""
    mu = (W.abs().max() / W.square().mean().sqrt()).item()
    return [4 ** (j / 23) for j in range(200) if j <= 23 or 4 ** ((j - 1) / 23) < mu]


def naive(W, H, bits, seeds, rescale, order, rho, pre_clamp, alpha, center):
    """Algorithms 1 to 3 line by line: dense orthogonal matrices, plain loops, float64. Returns codes, ρ and Ŵ."""
    (m, n), maxq = W.shape, 2**bits - 1
    h = H.diagonal()
    H = H + alpha * (h.mean() if center == "mean" else h[h > 0].median()) * torch.eye(n)
    d = (H.diagonal() / (W.T @ W).diagonal()) ** 0.25 if rescale else torch.ones(n, dtype=torch.float64)
    V, U = (dense(KroneckerTransform(k, s, torch.float64)) for k, s in zip((n, m), seeds, strict=True))
    W_, H_ = U @ (W * d) @ V.T, V @ (H / torch.outer(d, d)) @ V.T
    columns = sorted(range(n), key=lambda k: -H_[k, k].item()) if order else list(range(n))
    feedback, _ = ldl(H_[columns][:, columns])

    def codes_for(rho):
        s = rho * W_.norm() / math.sqrt(m * n)
        T = maxq / 2 * (W_ / s + 1)
        codes = torch.empty_like(T)
        T = T.clamp(0, maxq) if pre_clamp else T
        codes[:, columns] = adaptive_round(T[:, columns], feedback, lambda x: nearest(x, maxq))
        return codes, s * (2 * codes / maxq - 1)

    if rho is None:
        rho = min(candidates(W_), key=lambda r: proxy_loss(codes_for(r)[1], W_, H_))
    codes, What_ = codes_for(rho)
    return codes, rho, U.T @ What_ @ V / d


# the pieces


@quick
@given(widths, st.floats(1e-3, 1e3))
def test_codes_go_to_weights_and_back(bits, scale):
    codes = torch.arange(2**bits, dtype=torch.float64)
    weights = from_grid(codes, scale, bits)
    assert torch.allclose(weights[[0, -1]], torch.tensor([-scale, scale], dtype=torch.float64))
    assert torch.allclose(weights.diff(), weights.diff().mean())
    assert torch.allclose(to_grid(weights, scale, bits), codes, atol=1e-12)


@quick
@given(sizes, sizes, st.integers(0, 1000))
def test_rescaling_meets_the_bound_of_cauchy_and_schwarz(m, n, seed):
    W, H = layer(m, n, seed)

    def product(d):
        return ((H.diagonal() / d**2).sum() * (W * d).square().sum()).item()

    d = rescaling(W, H)
    bound = (H.diagonal() * W.square().sum(0)).sqrt().sum().item() ** 2
    assert math.isclose(product(d), bound, rel_tol=1e-10)
    assert product(d * torch.exp(0.1 * normal(n, seed=seed))) >= bound * (1 - 1e-12)


def test_rescaling_leaves_dead_inputs_and_columns_alone():
    W, H = layer(4, 6)
    W[:, 2] = 0
    H[3] = H[:, 3] = 0
    d = rescaling(W, H)
    assert (d[2], d[3]) == (1, 1)
    assert torch.isfinite(d).all() and (d > 0).all()


@quick
@given(sizes, sizes, st.booleans())
@example(1, 1, True)
@example(2, 1, True)
def test_basis_keeps_the_proxy_loss(m, n, rescale):
    W, H = layer(m, n)
    V, U = KroneckerTransform(n, 0, torch.float64), KroneckerTransform(m, 1, torch.float64)
    basis = Basis(V, U, rescaling(W, H) if rescale else None)
    d = basis.rescale if rescale else torch.ones(n, dtype=torch.float64)
    W_, H_ = basis.enter(W, H)
    assert torch.allclose(W_, dense(U) @ (W * d) @ dense(V).T, atol=1e-10)
    assert torch.allclose(H_, dense(V) @ (H / torch.outer(d, d)) @ dense(V).T, rtol=1e-8, atol=1e-8)
    assert torch.allclose(basis.leave(W_), W, atol=1e-10)
    What_ = W_.round()
    assert math.isclose(proxy_loss(What_, W_, H_), proxy_loss(basis.leave(What_), W, H), rel_tol=1e-6, abs_tol=1e-8)


@quick
@given(sizes, sizes, widths)
def test_the_heaviest_columns_are_rounded_first(m, n, bits):
    W, H = layer(m, n)
    X, H, maxq = to_grid(W, 2.0 * W.square().mean().sqrt(), bits), damp(H), 2**bits - 1
    columns = sorted(range(n), key=lambda k: -H[k, k].item())
    expected = torch.empty_like(X)
    feedback, _ = ldl(H[columns][:, columns])
    expected[:, columns] = adaptive_round(X[:, columns], feedback, lambda x: nearest(x, maxq))
    assert torch.equal(round_matrix(W, H, bits, rho=2.0)[0].double(), expected)


@quick
@given(sizes, sizes, widths)
def test_search_range_finds_the_best_of_its_candidates(m, n, bits):
    W, H = layer(m, n)
    H = damp(H)
    rounder = ldlq_rounder(H)

    def loss(rho):
        scale = rho * W.square().mean().sqrt()
        return proxy_loss(from_grid(rounder(to_grid(W, scale, bits), 2**bits - 1), scale, bits), W, H)

    best = min(loss(rho) for rho in candidates(W))
    assert math.isclose(loss(search_range(W, H, bits, rounder)), best, rel_tol=1e-9, abs_tol=1e-12)


def test_a_range_is_found_for_outliers_too():
    # a real layer in its own basis: weights of 36 RMS, which a grid that ends at 4 would cut off
    W, H = load_layers(ROOT / "book/data/smollm2.safetensors")["model.layers.0.self_attn.o_proj"]
    q = quantize_matrix(W, H, 4, incoherence="none")
    assert q.report["rho"] > 8
    four = quantize_matrix(W, H, 4, incoherence="none", rho=4.0)
    assert q.report["relative_proxy_loss"] < four.report["relative_proxy_loss"] / 50


def test_the_search_clamps_first_where_the_rounding_does():
    W, H = layer(40, 32)
    losses = {
        rho: quantize_matrix(W, H, 2, pre_clamp=True, rho=rho).report["relative_proxy_loss"]
        for rho in (None, 1.2, 1.6, 2.0, 2.4, 2.8)
    }
    assert losses[None] <= 1.02 * min(losses.values())


def test_search_range_looks_at_rows_from_end_to_end():
    W, H = layer(9, 12)
    seen = []

    def spy(X, maxq):
        seen.append(X)
        return nearest(X, maxq)

    search_range(W, H, 2, spy, rows=3)
    first = to_grid(W, W.square().mean().sqrt(), 2)  # ρ = 1
    assert torch.allclose(seen[0][:3], first[[0, 4, 8]])
    assert len(seen[0]) == len(candidates(W)) * 3


# the whole


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 24), (24, 1), (2, 2), (24, 40), (67, 71)])
@presets
def test_quantize_matrix_is_the_algorithm_line_by_line(preset, m, n, bits):
    W, H = layer(m, n)
    q = quantize_matrix(W, H, bits, seeds=(5, 6), **PRESETS[preset])
    codes, rho, What = naive(W, H, bits, (5, 6), **PRESETS[preset])
    assert math.isclose(q.report["rho"], rho, rel_tol=1e-6)
    # Rounding runs in float32: what lies within its precision of a tie may go the other way.
    assert (q.codes != codes).double().mean() < 0.01
    if torch.equal(q.codes.double(), codes):
        assert torch.allclose(q.dequantize(), What, rtol=1e-5, atol=1e-5)
    assert math.isclose(q.report["relative_proxy_loss"], relative_proxy_loss(What, W, H), rel_tol=1e-3, abs_tol=1e-9)


@presets
def test_product_needs_no_dequantized_weights(preset):
    W, H = layer(24, 40)
    q = quantize_matrix(W, H, 2, **PRESETS[preset])
    x = normal(5, 40, seed=9)
    z = x if q.basis.rescale is None else x / q.basis.rescale
    y = q.basis.U.inverse(q.basis.V(z) @ from_grid(q.codes.double(), q.scale, 2).T)
    assert torch.allclose(y, x @ q.dequantize().T, atol=1e-12)


@presets
def test_report_is_true(preset):
    W, H = layer(24, 40)
    q = quantize_matrix(W, H, 3, **PRESETS[preset])
    assert math.isclose(q.report["relative_proxy_loss"], relative_proxy_loss(q.dequantize(), W, H), rel_tol=1e-9)
    assert math.isclose(q.report["clamped"], ((q.codes == 0) | (q.codes == 7)).double().mean().item(), rel_tol=1e-6)
    W_, _ = q.basis.enter(W, H)
    assert math.isclose(q.scale, q.report["rho"] * W_.square().mean().sqrt().item(), rel_tol=1e-6)
    assert q.codes.dtype == torch.uint8 and q.codes.max() <= 7


@presets
def test_what_is_stored_is_what_was_computed_with(preset):
    # Scale and D̃ are saved in float32.
    q = quantize_matrix(*layer(24, 40), 2, **PRESETS[preset])
    assert q.scale == torch.tensor(q.scale, dtype=torch.float32).item()
    assert q.basis.rescale is None or torch.equal(q.basis.rescale, q.basis.rescale.float().double())


@presets
def test_more_bits_lose_less(preset):
    W, H = layer(32, 48)
    losses = [quantize_matrix(W, H, bits, **PRESETS[preset]).report["relative_proxy_loss"] for bits in (2, 3, 4)]
    assert losses[0] > 2 * losses[1] > 4 * losses[2]


def test_same_seeds_same_codes_and_others_others():
    W, H = layer(24, 40)
    a, b, c, d = (quantize_matrix(W, H, 2, seeds=s).codes for s in ((0, 1), (0, 1), (2, 1), (0, 2)))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, d)


@presets
def test_units_of_the_weights_do_not_matter(preset):
    W, H = layer(24, 40)
    one, other = (quantize_matrix(c * W, H, 2, **PRESETS[preset]) for c in (1, 2.0**-20))
    assert torch.equal(one.codes, other.codes)
    assert torch.allclose(other.dequantize() * 2**20, one.dequantize())


def test_default_withstands_a_massive_activation():
    W, H = layer(32, 48)
    massive = H.clone()
    massive[7, 7] *= 1e5
    losses = {
        preset: relative_proxy_loss(quantize_matrix(W, massive, 4, **choices).dequantize(), W, H)
        for preset, choices in PRESETS.items()
    }
    assert losses["default"] < losses["paper"] / 2


# the edges


@presets
def test_a_zero_matrix_stays_zero(preset):
    def rounder(H):
        def round_(X, maxq):
            assert torch.isfinite(X).all()
            return ldlq_rounder(H)(X, maxq)

        return round_

    _, H = layer(6, 10)
    q = quantize_matrix(torch.zeros(6, 10), H, 2, rounder=rounder, **PRESETS[preset])
    assert torch.equal(q.dequantize(), torch.zeros(6, 10, dtype=torch.float64))
    assert q.report["relative_proxy_loss"] == 0


@presets
def test_inputs_that_never_occur(preset):
    W, H = layer(12, 20)
    H[4] = H[:, 4] = 0
    q = quantize_matrix(W, H, 4, **PRESETS[preset])
    assert q.report["relative_proxy_loss"] < 0.05
    assert quantize_matrix(W, 0 * H, 4, **PRESETS[preset]).report["relative_proxy_loss"] == 0


def test_a_singular_hessian_gets_more_damping_and_the_report_says_so():
    W, H = layer(12, 20)
    H = torch.outer(H[0], H[0])  # one token, twenty inputs
    q = quantize_matrix(W, H, 4, alpha=0)
    assert 0 < q.report["alpha"] <= 1e-3 and q.report["alpha_asked"] == 0
    assert q.report["relative_proxy_loss"] < 0.05
    report = quantize_matrix(W, H, 4, alpha=0.01).report
    assert report["alpha"] == 0.01 and "alpha_asked" not in report


def test_takes_a_parameter_and_leaves_its_arguments_alone():
    W, H = layer(12, 20)
    weight = torch.nn.Parameter(W.bfloat16())
    before, H_before = weight.detach().clone(), H.clone()
    q = quantize_matrix(weight, H)
    assert not q.dequantize().requires_grad
    assert torch.equal(weight, before)
    assert torch.equal(H, H_before)


def broken(**changes):
    W, H = layer(4, 6)
    return {"W": W, "H": H, "bits": 2, "name": "model.q_proj"} | changes


W0, H0 = layer(4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (broken(bits=5), "bits must be 2, 3 or 4, got 5"),
        (broken(W=W0[:, :5]), r"model.q_proj: weights \(4, 5\) do not fit a Hessian \(6, 6\)"),
        (broken(W=W0[0]), r"model.q_proj: weights \(6,\) do not fit"),
        (broken(W=W0 * math.nan), "model.q_proj: the weights have NaN"),
        (broken(H=H0[:, :5]), "model.q_proj: the Hessian must be square"),
        (broken(H=H0 / 0), "model.q_proj: the Hessian has NaN"),
        (broken(H=H0.triu()), "model.q_proj: the Hessian is not symmetric"),
        (broken(H=-H0), "model.q_proj: the Hessian has a negative diagonal entry"),
        (
            broken(H=2 * torch.ones(6, 6) - torch.eye(6)),
            "model.q_proj is not positive definite but indefinite: its eigenvalues go from -1",
        ),
        (broken(center="mode"), "damping center must be 'mean' or 'median', got 'mode'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(QuipError, match=message):
        quantize_matrix(**arguments)
