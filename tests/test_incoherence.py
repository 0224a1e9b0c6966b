"""Incoherence and the seeded transforms: against dense matrices, at every kind of width."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import quip.incoherence
from quip.incoherence import (
    KroneckerTransform,
    factor_pair,
    haar_orthogonal,
    kronecker_multiply,
    kronecker_stages,
    mu_hessian,
    mu_weights,
)

quick = settings(deadline=None, max_examples=25, derandomize=True)
widths = st.integers(1, 200)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def dense(transform):
    """The matrix of a transform, from its permutation and factors, with nothing folded."""
    M = eye(transform.n)[transform.perm]
    for i, offset in enumerate(transform.offsets):
        product = torch.kron(getattr(transform, f"left{i}"), getattr(transform, f"right{i}"))
        stage = eye(transform.n)
        stage[offset : offset + len(product), offset : offset + len(product)] = product
        M = stage @ M
    return M


# measures


@quick
@given(widths, widths)
def test_mu_weights_is_the_largest_entry_in_units_of_the_rms(m, n):
    W = normal(m, n)
    entries = W.flatten().tolist()
    assert math.isclose(mu_weights(W), max(map(abs, entries)) / (sum(x * x for x in entries) / len(entries)) ** 0.5)


def test_mu_weights_at_its_extremes():
    single = torch.zeros(4, 9)
    single[2, 3] = -7
    assert math.isclose(mu_weights(single), 6)
    assert math.isclose(mu_weights(-torch.ones(4, 9)), 1)


@quick
@given(st.integers(1, 40))
def test_mu_hessian_of_a_diagonal_matrix_is_the_root_of_n(n):
    assert math.isclose(mu_hessian(torch.arange(1, n + 1).diag()), math.sqrt(n))


@quick
@given(st.integers(1, 40), seeds)
def test_mu_hessian_finds_the_eigenvectors(n, seed):
    Q = torch.from_numpy(haar_orthogonal(n, np.random.RandomState(seed)))
    H = Q * torch.arange(1.0, n + 1) @ Q.T
    assert math.isclose(mu_hessian(H), mu_weights(Q), rel_tol=1e-6)
    assert 1 - 1e-12 <= mu_hessian(H) <= math.sqrt(n) + 1e-12


# factors


@quick
@given(widths, seeds)
def test_haar_matrices_are_orthogonal(n, seed):
    Q = haar_orthogonal(n, np.random.RandomState(seed))
    assert np.allclose(Q @ Q.T, np.eye(n), atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_haar_matrices_prefer_no_sign(n):
    # LAPACK's own Q has a diagonal of fixed sign.
    rng = np.random.RandomState(0)
    diagonals = np.array([np.diag(haar_orthogonal(n, rng)) for _ in range(400)])
    assert np.abs(np.sign(diagonals).mean(0)).max() < 0.2


@given(st.integers(1, 5000))
def test_factor_pair_is_the_nearest_to_the_root(n):
    p, q = factor_pair(n)
    assert p <= q and p * q == n
    assert not [d for d in range(p + 1, math.isqrt(n) + 1) if n % d == 0]


@pytest.mark.parametrize("n", [1, 2, 3, 61, 64, 67, 127, 576, 577, 1536, 1538, 4096, 4099, 11008])
def test_stages_cover_every_entry(n):
    stages = kronecker_stages(n)
    covered = set()
    for offset, p, q in stages:
        assert offset >= 0
        assert offset + p * q <= n
        covered |= set(range(offset, offset + p * q))
    assert covered == set(range(n))
    assert n <= 64 or all(q <= 4 * p for _, p, q in stages)
    assert sum(p * p + q * q for _, p, q in stages) <= max(64 * 64 + 1, 9 * n)


def test_two_stages_overlap_at_every_width():
    for n in range(1, 2000):
        stages = kronecker_stages(n)
        assert len(stages) == 1 or 2 * stages[0][1] * stages[0][2] > n


# the product and the transform


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 4), st.integers(0, 3))
def test_kronecker_multiply_is_the_kronecker_product(p, q, before, after, rows):
    x, L, R = normal(rows, before + p * q + after), normal(p, p, seed=1), normal(q, q, seed=2)
    expected = x.clone()
    expected[:, before : before + p * q] = x[:, before : before + p * q] @ torch.kron(L, R).T
    assert torch.allclose(kronecker_multiply(x, L, R, before), expected, atol=1e-12)


@quick
@given(widths, seeds)
@example(1, 0)
@example(2, 0)
@example(127, 0)
@example(193, 7)
def test_transform_is_its_dense_orthogonal_matrix(n, seed):
    V = KroneckerTransform(n, seed, torch.float64)
    M, x = dense(V), normal(3, n)
    assert torch.allclose(M @ M.T, eye(n), atol=1e-12)
    assert torch.allclose(V(x), x @ M.T, atol=1e-12)
    assert torch.allclose(V.inverse(x), x @ M, atol=1e-12)
    H = x.T @ x
    assert torch.allclose(V.both_sides(H), M @ H @ M.T, atol=1e-12)


def test_transform_acts_on_the_last_of_any_dimensions():
    V, x = KroneckerTransform(67, 0, torch.float64), normal(2, 3, 67)
    assert torch.allclose(V(x)[1, 2], V(x[1, 2]), atol=1e-12)
    assert V(x[:0]).shape == (0, 3, 67)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_transform_computes_in_the_type_of_its_input(dtype):
    V, x = KroneckerTransform(96, 0), normal(5, 96)
    exact = KroneckerTransform(96, 0, torch.float64)(x)
    y = V(x.to(dtype))
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() < 20 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("n", [576, 577, 1000])
def test_an_outlier_is_spread(n):
    w = torch.ones(n, dtype=torch.float64)
    w[0] = 100
    spread = KroneckerTransform(n, 0, torch.float64)(w)
    assert mu_weights(w) > 20
    assert mu_weights(spread) < 8


@pytest.mark.parametrize("n", [144, 257, 576])
def test_a_diagonal_hessian_becomes_incoherent(n):
    H = (1 / torch.arange(1, n + 1, dtype=torch.float64)).diag()
    assert mu_hessian(KroneckerTransform(n, 0, torch.float64).both_sides(H)) < 2 * math.log(n) < mu_hessian(H) * 1.1


# the seed as a file format


@pytest.mark.parametrize(("n", "seed", "fingerprint"), [(576, 0, -4136621), (576, 1, 2330100), (577, 0, 2436102)])
def test_seeds_give_the_transforms_they_always_gave(n, seed, fingerprint):
    assert abs(KroneckerTransform(n, seed).fingerprint - fingerprint) <= 1


@quick
@given(widths, seeds)
def test_a_seed_gives_one_transform(n, seed):
    one, two = KroneckerTransform(n, seed), KroneckerTransform(n, seed)
    x = normal(n).float()
    assert torch.equal(one(x), two(x))
    assert one.fingerprint == two.fingerprint


def test_fingerprint_does_not_depend_on_the_type():
    assert KroneckerTransform(96, 3, torch.float64).fingerprint == KroneckerTransform(96, 3).fingerprint


def changed_factors(monkeypatch, change):
    """The fingerprint of one transform when `change(calls, Q)` is applied to each of its four factors."""
    calls = []

    def changed(n, rng):
        Q = haar_orthogonal(n, rng)
        calls.append(n)
        return change(len(calls), Q)

    with monkeypatch.context() as patch:
        patch.setattr(quip.incoherence, "haar_orthogonal", changed)
        return KroneckerTransform(127, 0).fingerprint


@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_fingerprint_notices_a_change_of_any_factor(monkeypatch, which):
    def flip_one_sign(call, Q):
        if call == which:
            Q[:, -1] *= -1
        return Q

    assert abs(changed_factors(monkeypatch, flip_one_sign) - KroneckerTransform(127, 0).fingerprint) > 100


def test_fingerprint_ignores_last_bits(monkeypatch):
    noise = np.random.RandomState(1)
    noisy = changed_factors(monkeypatch, lambda call, Q: Q + 1e-15 * noise.standard_normal(Q.shape))
    assert abs(noisy - KroneckerTransform(127, 0).fingerprint) <= 1


def test_fingerprint_notices_two_entries_swapped(monkeypatch):
    original = KroneckerTransform(96, 0)
    swapped = original.perm.numpy().copy()
    swapped[[3, 50]] = swapped[[50, 3]]

    class Swapping(np.random.RandomState):
        def permutation(self, n):
            super().permutation(n)
            return swapped

    monkeypatch.setattr(np.random, "RandomState", Swapping)
    assert abs(KroneckerTransform(96, 0).fingerprint - original.fingerprint) > 100


def test_nothing_but_the_seed_is_saved():
    V = KroneckerTransform(96, 0)
    assert V.state_dict() == {}
    assert V.double().left0.dtype == torch.float64  # but the factors follow the module
