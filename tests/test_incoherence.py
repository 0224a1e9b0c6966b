"""Incoherence, what bounds it, and the seeded transforms: against dense matrices, at every kind of width."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import quip.incoherence
from quip.errors import QuipError
from quip.incoherence import (
    KroneckerTransform,
    factor_pair,
    haar_orthogonal,
    kronecker_multiply,
    kronecker_stages,
    mu_bound,
    mu_hessian,
    mu_weights,
)
from quip.ldlq import feedback_round, ldl, ldlq
from quip.proxy import proxy_loss
from quip.rounding import nearest, stochastic

quick = settings(deadline=None, max_examples=25, derandomize=True)
widths = st.integers(1, 200)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def haar(n, rng):
    return torch.from_numpy(haar_orthogonal(n, rng))


def spiky(*shape, seed=0, power=1):
    """Normal entries to an odd power: the higher, the heavier the tails."""
    return normal(*shape, seed=seed) ** power


def kronecker_matrix(sizes, rng):
    M = eye(1)
    for p in sizes:
        M = torch.kron(M, haar(p, rng))
    return M


def without_permutation(transform, x):
    for i, offset in enumerate(transform.offsets):
        x = kronecker_multiply(x, getattr(transform, f"left{i}"), getattr(transform, f"right{i}"), offset)
    return x


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
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([1, 3, 9, 15]), seeds)
@example(1, 1, 1, 0)
@example(1, 2, 9, 0)
def test_mu_lies_between_one_and_the_root_of_the_number_of_entries(m, n, power, seed):
    W = spiky(m, n, seed=seed, power=power)
    assert 1 - 1e-12 <= mu_weights(W) <= math.sqrt(m * n) + 1e-12
    assert 1 - 1e-12 <= mu_hessian(W.T @ W) <= math.sqrt(n) + 1e-12


@quick
@given(st.integers(1, 20), st.integers(1, 20), seeds)
def test_mu_weights_is_one_only_if_all_sizes_are_equal(m, n, seed):
    W = normal(m, n, seed=seed).sign()
    assert math.isclose(mu_weights(W), 1)
    W[0, 0] *= 1.5
    assert mu_weights(W) > 1 + 1e-6 or m * n == 1


def test_mu_weights_needs_no_room_for_squares():
    W = torch.ones(64, 64, dtype=torch.float64)
    W[3, 5] = 2
    for scale, dtype in ((30_000, torch.float16), (1e30, torch.float32), (1e-30, torch.float32)):
        assert math.isclose(mu_weights((scale * W).to(dtype)), mu_weights(W), rel_tol=1e-3)
    assert math.isclose(mu_weights(W.long()), mu_weights(W), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (torch.zeros(2, 3), r"\(2, 3\) are all zero"),
        (torch.empty(0, 3), r"\(0, 3\) have no entries"),
        (torch.tensor([1.0, math.nan]), "NaN or infinite"),
        (torch.tensor([[1.0, -math.inf]]), "NaN or infinite"),
    ],
)
def test_mu_weights_refuses_what_has_no_incoherence(W, message):
    with pytest.raises(QuipError, match=message):
        mu_weights(W)


@pytest.mark.parametrize(
    ("H", "message"),
    [
        (torch.ones(2, 3), r"square, got shape \(2, 3\)"),
        (torch.ones(3), r"square, got shape \(3,\)"),
        (torch.full((2, 2), math.nan), "NaN or infinite"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "not symmetric"),
    ],
)
def test_mu_hessian_refuses_what_is_no_hessian(H, message):
    with pytest.raises(QuipError, match=message):
        mu_hessian(H)


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


@pytest.mark.parametrize("p", [1, 2, 3, 10, 100])
def test_entries_of_random_directions_have_the_moments_of_the_lemma(p):
    # A row of a Haar matrix is a normalised Gaussian; its moments are (2r - 1)!! / (p (p + 2) …).
    u = normal(200_000, p)
    a = normal(p, seed=1)
    x = u @ a / u.norm(dim=1)
    for r, double_factorial in ((1, 1), (2, 3), (3, 15)):
        exact = double_factorial * a.norm() ** (2 * r) / math.prod(p + 2 * i for i in range(r))
        assert math.isclose((x ** (2 * r)).mean(), exact, rel_tol=0.06)
        assert exact <= double_factorial * (a.norm() ** 2 / p) ** r * (1 + 1e-12)
    for s in (0.5, 1, 2, 3):
        assert (x.abs() >= s * a.norm() / math.sqrt(p)).double().mean() <= 2 * math.exp(-(s**2) / 2)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_rows_of_haar_matrices_are_random_directions(n):
    rng = np.random.RandomState(0)
    rows = np.stack([haar_orthogonal(n, rng)[-1] for _ in range(4000)])
    assert np.abs(rows.T @ rows / len(rows) - np.eye(n) / n).max() < 0.03
    assert math.isclose((rows[:, 0] ** 4).mean(), 3 / (n * (n + 2)), rel_tol=0.1)


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


@quick
@given(st.integers(65, 150).filter(lambda n: len(kronecker_stages(n)) == 2), seeds)
@example(67, 0)
def test_two_overlapping_products_leave_only_one_corner_of_zeros(n, seed):
    _, p, q = kronecker_stages(n)[0]
    M = dense(KroneckerTransform(n, seed, torch.float64)) != 0
    assert M.sum(0).sort().values.tolist() == [p * q] * (n - p * q) + [n] * (p * q)
    assert M.sum(1).tolist() == [p * q] * (n - p * q) + [n] * (p * q)


@pytest.mark.parametrize("function", [factor_pair, kronecker_stages, lambda n: haar_orthogonal(n, np.random)])
@pytest.mark.parametrize("n", [0, -3])
def test_widths_are_positive(function, n):
    with pytest.raises(QuipError, match=f"{n}$"):
        function(n)


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


@quick
@given(st.integers(1, 40), st.integers(1, 40), seeds)
@example(1, 1, 0)
@example(2, 37, 0)
def test_the_proxy_loss_is_the_same_in_either_basis(m, n, seed):
    W, What, X = normal(m, n, seed=seed), normal(m, n, seed=seed + 1), normal(n, n, seed=seed + 2)
    U, V = KroneckerTransform(m, 1, torch.float64), KroneckerTransform(n, 2, torch.float64)

    def turned(W):
        return U(V(W).T).T

    assert torch.allclose(turned(W).norm(), W.norm())
    loss, loss_ = proxy_loss(What, W, X.T @ X), proxy_loss(turned(What), turned(W), V.both_sides(X.T @ X))
    assert math.isclose(loss, loss_, rel_tol=1e-9)
    spectra = [torch.linalg.eigvalsh(H) for H in (X.T @ X, V.both_sides(X.T @ X))]
    assert torch.allclose(*spectra, atol=1e-9)


@pytest.mark.parametrize(
    ("x", "L", "R", "offset"),
    [
        (12, (3, 4), (4, 4), 0),
        (12, (3, 3), (4, 3), 0),
        (12, (3, 3), (5, 5), 0),
        (12, (3, 3), (4, 4), 1),
        (12, (2, 2), (3, 3), -1),
    ],
)
def test_a_product_that_does_not_fit_is_refused(x, L, R, offset):
    with pytest.raises(QuipError, match=r"must be square|does not fit x \(2, 12\)"):
        kronecker_multiply(normal(2, x), normal(*L), normal(*R), offset)


@pytest.mark.parametrize(("n", "seed"), [(0, 0), (-1, 0), (4, -1), (4, 2**32)])
def test_a_transform_of_no_width_or_no_seed_is_refused(n, seed):
    with pytest.raises(QuipError, match=f"n = {n}, seed = {seed}$"):
        KroneckerTransform(n, seed)


@pytest.mark.parametrize("shape", [(2, 95), (2, 97), (96, 1), ()])
def test_inputs_of_another_width_are_refused(shape):
    # The permutation would cut a wider input off without a word.
    V = KroneckerTransform(96, 0)
    for function in (V, V.inverse, V.both_sides):
        with pytest.raises(QuipError, match="does not fit a transform of width 96"):
            function(torch.ones(shape))
    with pytest.raises(QuipError, match="width 96"):
        V.both_sides(torch.ones(95, 96))


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


@quick
@given(st.integers(2, 12), st.integers(2, 12), seeds)
def test_without_permutation_products_stay_products(p, q, seed):
    rng = np.random.RandomState(seed)
    L, R, a, b = haar(p, rng), haar(q, rng), normal(p, seed=seed), normal(q, seed=seed + 1)
    spread = kronecker_multiply(torch.kron(a, b), L, R)
    assert torch.allclose(spread, torch.kron(L @ a, R @ b), atol=1e-12)
    assert math.isclose(mu_weights(spread), mu_weights(L @ a) * mu_weights(R @ b), rel_tol=1e-9)


@pytest.mark.parametrize("n", [1009, 1024, 1536, 10007, 18944])
def test_the_permutation_spreads_what_products_do_not(n):
    _, p, q = kronecker_stages(n)[0]
    x = torch.zeros(n, dtype=torch.float64)
    x[: p * q : q] = 1  # 1 ⊗ e_1
    transforms = [KroneckerTransform(n, seed, torch.float64) for seed in range(6)]
    without = np.mean([mu_weights(without_permutation(V, x)) for V in transforms])
    assert np.mean([mu_weights(V(x)) for V in transforms]) < 0.8 * without


# Lemma 5


@quick
@given(st.integers(1, 10**12), st.integers(1, 6), st.floats(1e-9, 0.999))
def test_mu_bound_takes_the_least_moment_that_the_union_bound_allows(entries, k, delta):
    r = mu_bound(entries, k, delta) ** (2 / k) / 2
    assert math.isclose(r, round(r), rel_tol=1e-9)

    def probability(r):  # that any of the entries exceeds (2r)^(k/2) / √n
        return entries * 2 ** (k / 2) * math.exp(-k * r)

    assert probability(round(r)) <= delta * (1 + 1e-9)
    assert probability(round(r) - 1) > delta * (1 - 1e-9)


def test_mu_bound_of_real_sizes():
    assert math.isclose(mu_bound(576**2, 2, 0.05), 18)
    assert math.isclose(mu_bound(576**2, 1, 0.05), math.sqrt(34))
    assert math.isclose(mu_bound(4096 * 11008, 4, 0.01), 12**2)


@pytest.mark.parametrize(("entries", "factors", "delta"), [(0, 2, 0.1), (4, 0, 0.1), (4, 2, 0.0), (4, 2, 1.0)])
def test_mu_bound_refuses_what_it_does_not_cover(entries, factors, delta):
    with pytest.raises(QuipError, match=f"{entries} entries, {factors} factors and δ = {delta}"):
        mu_bound(entries, factors, delta)


@pytest.mark.parametrize("r", range(1, 60))
def test_the_double_factorial_is_below_its_stirling_bound(r):
    assert math.prod(range(1, 2 * r, 2)) <= math.sqrt(2) * (2 * r / math.e) ** r


@quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.booleans(), seeds)
@example([2], True, 0)
@example([1, 1], False, 0)
def test_lemma_5_bounds_mu_of_transformed_h_and_w(sizes, axes, seed):
    rng = np.random.RandomState(seed)
    n, k = math.prod(sizes), len(sizes)
    Q = eye(n) if axes else haar(n, rng)
    U, V = kronecker_matrix(sizes, rng), kronecker_matrix(sizes, rng)
    assert mu_weights(V @ Q) <= mu_bound(n * n, k, 1e-6)
    assert mu_weights(U @ spiky(n, n, seed=seed, power=9) @ V.T) <= mu_bound(n * n, 2 * k, 1e-6)


@pytest.mark.parametrize(("n", "k"), [(64, 1), (256, 1), (64, 2), (4096, 2)])
def test_lemma_5_is_not_far_from_what_is_measured(n, k):
    # The least incoherent H: its eigenvectors become the columns of V, whose largest entry is known from the factors.
    p = round(n ** (1 / k))
    rng = np.random.RandomState(0)
    mu = [math.prod(math.sqrt(p) * np.abs(haar_orthogonal(p, rng)).max() for _ in range(k)) for _ in range(40)]
    bound = mu_bound(n * n, k, 0.5)
    assert np.mean(np.array(mu) > bound) <= 0.5
    assert np.mean(mu) > 0.4 * bound


@pytest.mark.parametrize("n", [67, 127, 257])
def test_lemma_5_holds_where_two_products_overlap(n):
    _, p, q = kronecker_stages(n)[0]
    bound = math.sqrt(n / (p * q)) * mu_bound(n * n, 2, 0.01)
    for seed in range(5):
        V = KroneckerTransform(n, seed, torch.float64)
        assert mu_weights(V(eye(n))) <= bound
        assert mu_weights(V(haar(n, np.random.RandomState(seed)))) <= bound


# Theorem 4


@quick
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 6), seeds)
@example(1, 1, 0, 0)
def test_a_diagonal_hessian_leaves_plain_rounding(m, n, decay, seed):
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.rand(n, generator=g, dtype=torch.float64) ** decay + 1e-6
    W = 4 * torch.randn(m, n, generator=g, dtype=torch.float64)
    U, D = ldl(spectrum.diag())
    assert not U.any()
    assert torch.allclose(D, spectrum)
    assert torch.equal(ldlq(W, spectrum.diag()), nearest(W))

    def draws():
        generator = torch.Generator().manual_seed(seed)
        return lambda x: stochastic(x, generator=generator)

    rounding = draws()
    columns = torch.stack([rounding(w) for w in W.T], 1)
    assert torch.equal(feedback_round(W, U, draws()), columns)


@quick
@given(st.integers(1, 30), st.integers(0, 6), seeds)
@example(1, 0, 0)
@example(2, 6, 0)
def test_no_basis_has_a_trace_above_the_diagonal_one_or_below_the_geometric_mean(n, decay, seed):
    spectrum = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** decay + 1e-3
    Q = haar(n, np.random.RandomState(seed))
    H = Q * spectrum @ Q.T
    trace = ldl((H + H.T) / 2)[1].sum().item()
    assert n * spectrum.log().mean().exp().item() * (1 - 1e-9) <= trace <= spectrum.sum().item() * (1 + 1e-9)


def test_the_best_basis_of_the_exercise():
    H = torch.tensor([[3.0, math.sqrt(2)], [math.sqrt(2), 2.0]], dtype=torch.float64)
    assert torch.allclose(torch.linalg.eigvalsh(H), torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert torch.allclose(ldl(H)[1], torch.full((2,), 2.0, dtype=torch.float64))


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
