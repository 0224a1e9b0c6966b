"""Claims of chapter 5 that belong to no single function: units of the grid, exponents, what U is for, bytes stored."""

import math

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quip.algorithm import Basis, from_grid, quantize_matrix, rescaling, to_grid
from quip.incoherence import IdentityTransform, KroneckerTransform, mu_weights
from quip.kernels import QuantizedLinear
from quip.ldlq import ldl
from quip.proxy import damp, proxy_loss
from quip.rounding import nearest

quick = settings(deadline=None, max_examples=15, derandomize=True)
sizes = st.integers(1, 40)
widths = st.sampled_from([2, 3, 4])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(m, n, seed=0):
    W, X = normal(m, n, seed=seed), normal(2 * n + 1, n, seed=seed + 1) * torch.exp(normal(n, seed=seed + 2))
    return W, X.T @ X / len(X)


@quick
@given(sizes, sizes, widths, st.floats(0.1, 10))
@example(1, 1, 2, 1.0)
@example(2, 1, 3, 1.0)
def test_the_loss_in_units_of_the_grid(m, n, bits, scale):
    (W, H), maxq = layer(m, n), 2**bits - 1
    codes = torch.randint(maxq + 1, (m, n), generator=torch.Generator().manual_seed(bits)).double()
    loss = proxy_loss(from_grid(codes, scale, bits), W, H)
    assert math.isclose(loss, (2 * scale / maxq) ** 2 * proxy_loss(codes, to_grid(W, scale, bits), H), rel_tol=1e-9)


@quick
@given(sizes, sizes, st.floats(0, 10))
def test_damping_is_a_price_on_changes(m, n, alpha):
    W, H = layer(m, n)
    change = normal(m, n, seed=7)
    eps = alpha * H.diagonal().mean()
    expected = proxy_loss(W + change, W, H) + (eps * change.square().sum()).item()
    assert math.isclose(proxy_loss(W + change, W, damp(H, alpha)), expected, rel_tol=1e-9)


@quick
@given(sizes, st.integers(2, 40), st.floats(-1, 1))
def test_only_the_fourth_root_is_best_and_a_square_root_does_nothing(m, n, e):
    W, H = layer(m, n)

    def product(d):
        return ((H.diagonal() / d**2).sum() * (W * d).square().sum()).item()

    d = rescaling(W, H) ** 4
    assert math.isclose(product(d**e), product(d ** (0.5 - e)), rel_tol=1e-9)
    assert product(d**e) >= product(d**0.25) * (1 - 1e-12)
    assert math.isclose(product(d**0.5), H.trace().item() * W.square().sum().item(), rel_tol=1e-9)


@quick
@given(sizes, st.integers(1, 40))
def test_without_a_rotation_rescaling_divides_d(m, n):
    W, H = layer(m, n)
    H = damp(H, 0.1)
    d = rescaling(W, H)
    assert torch.allclose(ldl(H / torch.outer(d, d))[1], ldl(H)[1] / d**2)


def test_nearest_rounding_loses_what_is_predicted():
    (W, H), (V, U) = layer(96, 96), (KroneckerTransform(96, s, torch.float64) for s in (0, 1))
    for d in (None, rescaling(W, H)):
        W_, H_ = Basis(V, U, d).enter(W, H)
        rho = mu_weights(W_)
        s = rho * W_.square().mean().sqrt()
        loss = proxy_loss(from_grid(nearest(to_grid(W_, s, 4), 15), s, 4), W_, H_)
        predicted = rho**2 / (3 * 96 * 15**2) * H_.trace() * W_.square().sum()
        assert abs(loss / predicted - 1) < 0.15


def test_a_heavy_row_is_for_u_and_h_does_not_know_u():
    W, H = layer(64, 96)
    W[20] *= 15
    V, U = KroneckerTransform(96, 0, torch.float64), KroneckerTransform(64, 1, torch.float64)
    (with_v, H_v), (with_both, H_both) = (Basis(V, u).enter(W, H) for u in (IdentityTransform(64), U))
    assert torch.equal(H_v, H_both)
    norms = [x.norm(dim=1) for x in (W, with_v, with_both)]
    assert torch.allclose(norms[0], norms[1])
    assert norms[2].max() < 0.7 * norms[1].max()


@quick
@given(sizes, sizes, widths, st.booleans())
@example(1, 1, 2, True)
@example(3, 9, 3, False)
def test_bytes_stored_are_those_of_the_formula(m, n, bits, rescale):
    expected = 8 * m * bits * math.ceil(n / 64) + 4 + 32 + 4 * n * rescale
    file = safetensors.torch.save(QuantizedLinear(n, m, bits, rescale=rescale).state_dict())
    assert len(file) - 8 - int.from_bytes(file[:8], "little") == expected


@pytest.mark.parametrize("rescale", [False, True])
def test_output_error_is_the_loss_in_either_basis(rescale):
    W, H = layer(24, 40)
    q = quantize_matrix(W, H, 2, rescale=rescale)
    X = normal(200, 40, seed=3)
    X = torch.linalg.solve_triangular(torch.linalg.cholesky(X.T @ X / 200), X.T, upper=False).T
    X = X @ torch.linalg.cholesky(H).T  # its second moment is H
    Z = X if q.basis.rescale is None else X / q.basis.rescale
    What_ = from_grid(q.codes.double(), q.scale, 2)
    error = (q.basis.U.inverse(q.basis.V(Z) @ What_.T) - X @ W.T).square().sum(1).mean().item()
    W_, H_ = q.basis.enter(W, H)
    assert math.isclose(error, proxy_loss(What_, W_, H_), rel_tol=1e-6)
    assert math.isclose(error, proxy_loss(q.dequantize(), W, H), rel_tol=1e-6)
