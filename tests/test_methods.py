"""Every method of the paper, in either basis, from the library and through a whole model."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from quip import QuipError, load_model, quantize_matrix, quantize_model, save_model
from quip.algorithm import PRESETS
from quip.hf import QuipConfig
from quip.incoherence import IdentityTransform, KroneckerTransform, make_transform
from quip.ldlq import ldlq
from quip.methods import METHODS, choose, matrix_arguments
from quip.proxy import proxy_loss

METHOD_NAMES = list(METHODS)


def layer(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * n + 8, n, generator=g, dtype=torch.float64) @ torch.randn(
        n, n, generator=g, dtype=torch.float64
    )
    return torch.randn(m, n, generator=g, dtype=torch.float64), X.T @ X / len(X)


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 20),
    bits=st.integers(2, 4),
    method=st.sampled_from(METHOD_NAMES),
    incoherence=st.sampled_from(["kron", "none"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_every_method_stays_on_its_grid(m, n, bits, method, incoherence, seed):
    W, H = layer(m, n, seed)
    arguments = matrix_arguments(choose(method=method, incoherence=incoherence, passes=2), seed)
    q = quantize_matrix(W, H, bits, **arguments)
    assert q.codes.shape == (m, n) and q.codes.dtype == torch.uint8
    assert q.codes.max() < 2**bits
    again = quantize_matrix(W, H, bits, **arguments)
    assert torch.equal(q.codes, again.codes)  # stochastic methods too: their draws have a seed


@pytest.mark.parametrize("incoherence", ["kron", "none"])
def test_what_the_methods_are_worth(incoherence):
    W, H = layer(64, 48)
    loss = {
        name: quantize_matrix(W, H, 2, **matrix_arguments(choose(method=name, incoherence=incoherence)))
        for name in METHODS
    }
    loss = {name: q.report["relative_proxy_loss"] for name, q in loss.items()}
    assert loss["ldlq"] < loss["near"] < loss["stoch"]
    assert loss["optq"] == pytest.approx(loss["ldlq"], rel=0.02)
    assert loss["ldlq-rg"] < loss["ldlq"] and loss["greedy"] < loss["near"]
    assert loss["admm"] < loss["stoch"]


def test_optq_gives_the_codes_of_ldlq():
    W, H = layer(40, 30)
    codes = [METHODS[name].rounder(H, 0)(2 * W, 3) for name in ("ldlq", "optq")]
    assert torch.equal(*codes) and torch.equal(codes[0], ldlq(2 * W, H, 3))


def test_another_seed_draws_other_numbers():
    W, H = layer(20, 16)
    for name in ("stoch", "admm"):
        one, other = (METHODS[name].rounder(H, seed)(W, 3) for seed in (0, 1))
        assert not torch.equal(one, other)


# choices


def test_presets_are_the_choices_that_they_were():
    assert choose()["method"] == "ldlq-rg" and choose()["passes"] == 3
    assert choose("paper")["method"] == "ldlq" and choose("paper")["passes"] == 0
    for preset, kept in PRESETS.items():
        assert kept.items() <= choose(preset).items()


def test_a_method_brings_its_own_order_and_passes():
    assert choose(method="ldlq") == choose() | {"method": "ldlq", "passes": 0, "order": False}
    assert choose(method="ldlq-rg")["passes"] == 10 and choose(method="ldlq-rg")["order"]
    assert choose(method="near", passes=4, order=True)["passes"] == 4
    assert choose(rescale=None, rho="search") == choose()
    assert choose("paper", rho="search")["rho"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "best"}, "unknown preset 'best'"),
        ({"method": "gptq"}, "unknown method 'gptq': choose one of near, stoch"),
        ({"pass": 1}, "unknown choice pass"),
        ({"passes": -1}, "passes must be at least 0, got -1"),
        ({"rho": 0.0}, "the range rho must be a positive number, got 0.0"),
        ({"alpha": float("nan")}, "the damping alpha must be a number of at least 0"),
        ({"center": "mode"}, "damping center must be 'mean' or 'median'"),
        ({"incoherence": "hadamard"}, "incoherence must be 'kron' or 'none', got 'hadamard'"),
    ],
)
def test_choices_that_do_not_exist(changes, message):
    with pytest.raises(QuipError, match=message):
        choose(**changes)


# the basis


def test_no_transform_is_the_layers_own_basis():
    W, H = layer(10, 14)
    q = quantize_matrix(W, H, 4, incoherence="none")
    assert isinstance(q.basis.V, IdentityTransform) and q.basis.V.fingerprint == 0
    assert all(torch.equal(a, b) for a, b in zip(q.basis.enter(W, H), (W, H), strict=True))
    step = 2 * q.scale / 15
    assert torch.allclose((q.dequantize() + q.scale) / step, q.codes.double(), atol=1e-9)


def test_permutation_can_be_left_out():
    with_it, without = (KroneckerTransform(30, 5, torch.float64, permute=p) for p in (True, False))
    x = torch.randn(4, 30, dtype=torch.float64)
    assert torch.equal(with_it.left0, without.left0)
    assert torch.allclose(without(x[:, with_it.perm]), with_it(x))
    assert torch.allclose(without.inverse(without(x)), x)
    assert with_it.fingerprint != without.fingerprint
    W, H = layer(8, 30)
    assert not torch.equal(quantize_matrix(W, H).codes, quantize_matrix(W, H, permute=False).codes)
    with pytest.raises(QuipError, match="incoherence must be"):
        make_transform(4, 0, incoherence="haar")


def test_the_proxy_loss_is_that_of_the_basis():
    W, H = layer(9, 12)
    for choices in ({"incoherence": "none"}, {"permute": False}, {}):
        q = quantize_matrix(W, H, 3, **choices)
        E, H_ = q.basis.enter(q.dequantize() - W, H)
        assert proxy_loss(E, torch.zeros_like(E), H_) == pytest.approx(proxy_loss(q.dequantize(), W, H))


def test_a_config_of_an_unknown_transform_is_refused():
    with pytest.raises(QuipError, match="quantization_config: incoherence must be 'kron' or 'none', got 'haar'"):
        QuipConfig(incoherence="haar")


# a whole model


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "near", "incoherence": "none"},
        {"method": "optq", "incoherence": "none", "rescale": True},
        {"method": "admm", "permute": False},
        {"preset": "paper", "method": "greedy", "passes": 1, "rho": 2.0},
    ],
    ids=lambda c: c["method"],
)
def test_quantize_save_load(changes, tmp_path, tokenizer, token_ids):
    model = tiny_llama()
    reports = quantize_model(model, token_ids, bits=3, progress=False, **changes)
    expected = model(token_ids[:2]).logits
    save_model(model, tokenizer, tmp_path / "out", reports, choose(**changes))
    loaded, _ = load_model(str(tmp_path / "out"))
    got = loaded(token_ids[:2]).logits
    assert (got - expected).norm() < 2e-3 * expected.norm()
    config = loaded.config.quantization_config
    assert config.incoherence == changes.get("incoherence", "kron")
    assert choose(**changes)["rescale"] == config.rescale
