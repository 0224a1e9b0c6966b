"""The proxy loss, the second moment and damping."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.errors import QuipError
from quip.proxy import SecondMoment, check_hessian, damp, proxy_loss, relative_proxy_loss

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def second_moment(X):
    return X.T.double() @ X.double() / len(X)


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, tokens=sizes, seed=seeds)
def test_loss_is_the_mean_squared_error_of_the_outputs(m, n, tokens, seed):
    What, W, X = randn(m + m + tokens, n, seed=seed).split([m, m, tokens])
    direct = ((X @ (What - W).T) ** 2).sum(1).mean().item()
    assert proxy_loss(What, W, second_moment(X)) == pytest.approx(direct, rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, seed=seeds)
def test_loss_is_the_sum_over_rows(m, n, seed):
    What, W = randn(2 * m, n, seed=seed).split(m)
    H = second_moment(randn(2 * n, n, seed=seed + 1))
    rows = [proxy_loss(What[[i]], W[[i]], H) for i in range(m)]
    assert proxy_loss(What, W, H) == pytest.approx(sum(rows), rel=1e-9)


def test_loss_is_summed_in_the_precision_of_the_hessian():
    W = torch.zeros(1, 100_000)
    What = torch.full_like(W, 0.1)
    exact = 100_000 * What[0, 0].double().item() ** 2
    assert proxy_loss(What.view(-1, 1), W.view(-1, 1), torch.ones(1, 1).double()) == pytest.approx(exact, rel=1e-12)


def test_relative_loss_is_1_for_the_zero_matrix_and_0_for_the_weights():
    W, H = randn(3, 5), second_moment(randn(20, 5, seed=1))
    assert relative_proxy_loss(torch.zeros_like(W), W, H) == 1
    assert relative_proxy_loss(W, W, H) == 0
    assert relative_proxy_loss(0.9 * W, W, H) == pytest.approx(0.01)


def test_relative_loss_of_a_layer_without_output_is_0_or_infinite():
    H = torch.diag(torch.tensor([1.0, 0.0]))
    W = torch.tensor([[0.0, 3.0]])
    assert relative_proxy_loss(torch.tensor([[0.0, 2.0]]), W, H) == 0
    assert relative_proxy_loss(torch.tensor([[1e-3, 3.0]]), W, H) == math.inf
    assert relative_proxy_loss(torch.ones(2, 3), torch.zeros(2, 3), torch.eye(3)) == math.inf
    assert relative_proxy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0


def test_nan_is_not_hidden():
    nan = torch.full((1, 1), torch.nan)
    assert math.isnan(relative_proxy_loss(torch.ones(1, 1), torch.ones(1, 1), nan))
    assert math.isnan(relative_proxy_loss(nan, torch.zeros(1, 1), torch.ones(1, 1)))


@pytest.mark.parametrize("loss", [proxy_loss, relative_proxy_loss])
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (2, 3), (2, 2)),
        ((2, 3), (2, 3), (3, 4)),
        ((2, 3), (2, 3), (3,)),
        ((1, 3), (2, 3), (3, 3)),
        ((3, 2), (2, 3), (3, 3)),
        ((3,), (3,), (3, 3)),
        ((1, 2, 3), (1, 2, 3), (3, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_named(loss, shapes):
    with pytest.raises(QuipError, match="do not fit") as caught:
        loss(*map(torch.ones, shapes))
    assert all(str(shape) in str(caught.value) for shape in shapes)


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, tokens=sizes, seed=seeds)
def test_a_second_moment_is_symmetric_and_no_loss_is_negative(m, n, tokens, seed):
    moment = SecondMoment(n)
    moment.update(randn(tokens, n, seed=seed))
    check_hessian(moment.H)
    W = randn(m, n, seed=seed + 1)
    assert proxy_loss(W, torch.zeros_like(W), moment.H) >= -1e-6 * proxy_loss(W, 0 * W, torch.eye(n).double())


def up_or_down(W):
    """Every way to round the entries of W up or down."""
    choices = product([0.0, 1.0], repeat=W.numel())
    return [W.floor() + torch.tensor(c, dtype=W.dtype).view_as(W) for c in choices]


@settings(deadline=None, max_examples=15)
@given(m=st.integers(1, 3), n=st.integers(1, 3), seed=seeds)
def test_the_best_matrix_has_the_best_rows(m, n, seed):
    W, H = 3 * randn(m, n, seed=seed), second_moment(randn(n + 2, n, seed=seed + 1))
    together = min(proxy_loss(What, W, H) for What in up_or_down(W))
    apart = sum(min(proxy_loss(row, W[[i]], H) for row in up_or_down(W[[i]])) for i in range(m))
    assert together == pytest.approx(apart, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 6), seed=seeds, same=st.booleans())
def test_without_correlation_nearest_is_best(n, seed, same):
    W, strengths = 3 * randn(1, n, seed=seed), torch.ones(n) if same else randn(n, seed=seed + 1).exp()
    H = torch.diag(strengths).double()
    assert min(proxy_loss(What, W, H) for What in up_or_down(W)) == pytest.approx(
        proxy_loss(W.round(), W, H), rel=1e-12
    )


@settings(deadline=None, max_examples=10)
@given(m=st.integers(1, 3), n=st.integers(1, 4), tokens=sizes, seed=seeds)
def test_second_order_term_of_a_task_loss(m, n, tokens, seed):
    W, X = randn(m, n, seed=seed), randn(tokens, n, seed=seed + 1)
    A = randn(m, m, seed=seed + 2)
    A, H = A @ A.T, second_moment(X)

    def hessian(f):
        return torch.autograd.functional.hessian(f, W).reshape(m * n, m * n)

    # f(y) = yᵀ A y: G = 2 A for every token, so the Hessian is 2 A ⊗ H; 2 H in each row if A is the identity
    assert torch.allclose(hessian(lambda W: ((X @ W.T @ A) * (X @ W.T)).sum() / tokens), torch.kron(2 * A, H))
    target = randn(m, n, seed=seed + 3)
    expected = torch.kron(torch.eye(m).double(), 2 * H)
    assert torch.allclose(hessian(lambda W: ((X @ (W - target).T) ** 2).sum() / tokens), expected)


@settings(deadline=None, max_examples=40)
@given(
    n=sizes,
    batches=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    buffer=st.integers(1, 12),
    strip=st.integers(1, 10),
    seed=seeds,
)
def test_streaming_is_the_direct_sum_however_it_is_cut(n, batches, buffer, strip, seed):
    X = randn(sum(batches) + 1, n, seed=seed)
    moment = SecondMoment(n, buffer=buffer, strip=strip)
    for batch in X.split([*batches, 1]):
        moment.update(batch)
    H = moment.H
    assert moment.tokens == len(X)
    assert H.dtype == torch.float64
    assert torch.equal(H, H.T)
    assert torch.allclose(H, second_moment(X), rtol=1e-5, atol=1e-5)


def test_every_leading_dimension_counts_as_tokens():
    X = randn(30, 4)
    moment = SecondMoment(4)
    moment.update(X.view(2, 3, 5, 4))
    assert moment.tokens == 30
    assert torch.allclose(moment.H, second_moment(X), atol=1e-5)


def test_a_single_token_may_come_without_leading_dimension():
    moment = SecondMoment(3)
    moment.update(torch.tensor([1.0, 2.0, 3.0]))
    assert moment.tokens == 1
    assert moment.H[1, 2] == 6


def test_reading_the_estimate_does_not_disturb_the_stream():
    X = randn(10, 3)
    moment = SecondMoment(3)
    moment.update(X[:4])
    assert torch.allclose(moment.H, second_moment(X[:4]), atol=1e-5)
    moment.update(X[4:])
    assert torch.allclose(moment.H, second_moment(X), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_inputs_are_not_squared_in_half_precision(dtype):
    moment = SecondMoment(1)
    moment.update(torch.full((8, 1), 1000.0, dtype=dtype))  # 1000² overflows float16
    assert moment.H.item() == pytest.approx(1e6)


def test_inputs_may_change_after_they_were_added():
    X = randn(5, 3, dtype=torch.float32)
    moment = SecondMoment(3)
    expected = second_moment(X)
    moment.update(X)
    X.zero_()
    assert torch.allclose(moment.H, expected, atol=1e-5)


def test_no_graph_is_kept():
    moment = SecondMoment(2)
    moment.update(torch.ones(1, 2, requires_grad=True))
    assert not moment.H.requires_grad


def test_many_small_batches_lose_nothing_beside_a_large_one():
    moment = SecondMoment(1, buffer=1)
    moment.update(torch.tensor([[1e4]]))
    for _ in range(1000):
        moment.update(torch.ones(1, 1))  # 1e8 + 1 is 1e8 in float32
    assert moment.H.item() * 1001 == pytest.approx(1e8 + 1000, abs=0.5)


def uneven_inputs(tokens, dtype):
    """Means that are not zero, strengths over four powers of ten, one input far ahead: width 16."""
    scale = torch.logspace(-1, 1, 16, dtype=torch.float64)
    scale[0] = 1000
    return ((randn(tokens, 16) + 1) * scale).to(dtype)


def largest_error(H, X):
    direct = second_moment(X)
    return ((H - direct).abs() / torch.outer(direct.diagonal(), direct.diagonal()).sqrt()).max().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("products", "accuracy"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_accuracy_against_the_direct_sum(dtype, products, accuracy):
    X = uneven_inputs(2**16, dtype)
    moment = SecondMoment(16, products=products)
    for batch in X.split(700):
        moment.update(batch)
    assert largest_error(moment.H, X) < accuracy


def test_it_is_more_accurate_than_a_running_sum_in_float32():
    X, total, moment = uneven_inputs(2**18, torch.float32), torch.zeros(16, 16), SecondMoment(16)
    for batch in X.split(256):
        total += batch.T @ batch
        moment.update(batch)
    assert largest_error(moment.H, X) < 0.5 * largest_error(total.double() / len(X), X)


def test_a_nan_is_found_by_the_check_however_many_tokens_follow():
    moment = SecondMoment(3, buffer=4)
    moment.update(torch.tensor([[1.0, torch.nan, 2.0]]))
    for _ in range(10):
        moment.update(torch.ones(5, 3))
    with pytest.raises(QuipError, match="up_proj: the Hessian has NaN"):
        check_hessian(moment.H, "up_proj")


def test_no_tokens_no_estimate():
    with pytest.raises(QuipError, match="no calibration tokens"):
        _ = SecondMoment(3).H


@pytest.mark.parametrize("shape", [(2, 4), (2, 3), (6, 1), (24,), ()])
def test_inputs_of_another_width_are_refused(shape):
    moment = SecondMoment(8)
    with pytest.raises(QuipError, match="width 8"):
        moment.update(torch.ones(shape))
    assert moment.tokens == 0


def test_a_second_moment_passes_the_check():
    check_hessian(second_moment(randn(3, 6)))
    check_hessian(torch.zeros(2, 2))
    check_hessian(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("H", "complaint"),
    [
        (torch.ones(2, 3), r"square.*\(2, 3\)"),
        (torch.ones(4), r"square.*\(4,\)"),
        (torch.ones(0, 0), r"square.*\(0, 0\)"),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), "NaN or infinite"),
        (torch.tensor([[torch.inf, 0.0], [0.0, 1.0]]), "NaN or infinite"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "negative diagonal"),
    ],
)
def test_what_is_no_second_moment_is_refused_by_name(H, complaint):
    with pytest.raises(QuipError, match=complaint) as caught:
        check_hessian(H, "layers.3.down_proj")
    assert str(caught.value).startswith("layers.3.down_proj: ")


@settings(deadline=None, max_examples=40)
@given(n=sizes, tokens=sizes, center=st.sampled_from(["mean", "median"]), seed=seeds)
def test_damping_adds_the_center_of_the_diagonal(n, tokens, center, seed):
    H = second_moment(randn(tokens, n, seed=seed))
    before = H.clone()
    c = getattr(H.diagonal(), center)()
    assert torch.allclose(damp(H, 0.03, center), H + 0.03 * c * torch.eye(n))
    assert torch.equal(H, before)
    assert torch.linalg.eigvalsh(damp(H, 0.03, center)).min() > 0.029 * c


def test_one_massive_input_moves_the_mean_and_not_the_median():
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1e6]))
    assert (damp(H, 0.01, "mean") - H)[0, 0] > 2000
    assert (damp(H, 0.01, "median") - H)[0, 0].item() == pytest.approx(0.01, rel=1e-4)


def test_dead_inputs_do_not_make_the_median_zero():
    H = torch.diag(torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0]))
    assert (damp(H, 0.5, "median") - H)[0, 0] == 1


@pytest.mark.parametrize("center", ["mean", "median"])
def test_a_zero_hessian_is_damped_to_a_multiple_of_the_identity(center):
    assert torch.equal(damp(torch.zeros(3, 3), 0.25, center), 0.25 * torch.eye(3))


def test_an_unknown_center_is_refused():
    with pytest.raises(QuipError, match="'mean' or 'median', got 'mode'"):
        damp(torch.eye(2), center="mode")


@pytest.mark.parametrize("alpha", [-0.01, -math.inf, math.inf, math.nan])
def test_an_impossible_amount_of_damping_is_refused(alpha):
    with pytest.raises(QuipError, match=f"alpha .* got {alpha}"):
        damp(torch.eye(2), alpha)


def test_no_damping_is_allowed_and_a_copy():
    H = torch.eye(2)
    damped = damp(H, 0)
    assert torch.equal(damped, H)
    assert damped is not H


@pytest.mark.parametrize("H", [torch.ones(2, 3), torch.full((2, 2), torch.nan), torch.tensor([[1.0, 1.0], [0.0, 1.0]])])
def test_only_a_hessian_is_damped(H):
    with pytest.raises(QuipError, match="the Hessian"):
        damp(H)


def test_the_mean_counts_dead_inputs():
    H = torch.diag(torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0]))
    assert (damp(H, 0.5, "mean") - H)[0, 0].item() == pytest.approx(0.5 * 4 / 5)


@settings(deadline=None, max_examples=20)
@given(n=sizes, tokens=sizes, alpha=st.floats(0, 2), seed=seeds)
def test_damping_raises_every_eigenvalue_alike(n, tokens, alpha, seed):
    H = second_moment(randn(tokens, n, seed=seed))
    raised = torch.linalg.eigvalsh(H) + alpha * H.diagonal().mean()
    assert torch.allclose(torch.linalg.eigvalsh(damp(H, alpha)), raised, atol=1e-9)
