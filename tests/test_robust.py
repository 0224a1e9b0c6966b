"""Nasty numbers: each is dealt with, with an entry in the report, or refused in one error that names the layer."""

import json
import math

import pytest
import torch
from conftest import tiny_llama, tiny_opt
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from quip import cli, models, save_model
from quip.algorithm import quantize_matrix
from quip.bounds import decompose, layer_report
from quip.checkpoint import REPORT
from quip.errors import QuipError
from quip.info import finite, mean_loss, notes
from quip.kernels import QuantizedLinear, linear_torch
from quip.methods import METHODS, choose, matrix_arguments
from quip.proxy import SecondMoment, power_of_two, relative_proxy_loss
from quip.results.record import write_record

CHOICES = {
    "default": {},
    "paper": {"preset": "paper"},
    "own basis": {"incoherence": "none"},
    **{name: {"method": name} for name in METHODS},
}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment_of(X):
    moment = SecondMoment(X.shape[1])
    moment.update(X)
    return moment.H


def strict(report):
    """The report, through JSON in which NaN and infinity do not exist."""
    return json.loads(json.dumps(report, allow_nan=False))


W, X = normal(24, 40), normal(600, 40, seed=1)
H = moment_of(X)


def massive(value=1e4, count=6):
    """Inputs of 1e-2, but for one channel at a few tokens."""
    Y = X * 1e-2
    Y[: count * 100 : 100, 7] = value
    return Y


def without(channels):
    Y = X.clone()
    Y[:, channels] = 0
    return Y


CONSTANT = torch.cat([W[:20], torch.full((2, 40), 0.7), torch.zeros(2, 40)]).double()
MATRICES = {
    "massive activation": (W, moment_of(massive())),
    "one massive token": (W, moment_of(massive(1e4, 1))),
    "dead inputs": (W, moment_of(without([3, 17, 18]))),
    "one live input": (W, moment_of(without(list(range(1, 40))))),
    "no live input": (W, 0 * H),
    "one token": (W, moment_of(X[:1])),
    "fewer tokens than columns": (W, moment_of(X[:7])),
    "constant rows": (CONSTANT, H),
    "all weights equal": (torch.full((24, 40), -0.3), H),
    "zero matrix": (0 * W, H),
    "all zero": (0 * W, 0 * H),
    "one column": (W[:, :1], H[:1, :1]),
    "one row": (W[:1], H),
    "one weight": (W[:1, :1], H[:1, :1]),
    "half precision": (W.half(), H.half()),
    "bfloat16": (W.bfloat16(), H.bfloat16()),
    "tiny inputs": (W, 1e-200 * H),
    "huge inputs": (W, 1e200 * H),
    "tiny weights": (1e-30 * W, H),
    "huge weights": (1e30 * W, H),
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("case", MATRICES)
def test_a_nasty_matrix_becomes_a_layer_that_computes_what_the_report_says(case, choice, bits):
    W, H = MATRICES[case]
    q = quantize_matrix(W, H, bits, **matrix_arguments(choose(**CHOICES[choice])))
    report = strict({**q.report, **layer_report(W, H, q)})
    assert report["relative_proxy_loss"] < (0.65 if bits == 2 else 0.15)
    What = q.dequantize()
    assert torch.isfinite(What).all()
    W, unit = W.double(), power_of_two(H)
    assert report["relative_proxy_loss"] == pytest.approx(relative_proxy_loss(What, W, H.double() / unit), abs=1e-12)
    layer = QuantizedLinear.from_matrix(q)
    y = layer(torch.eye(W.shape[1])).T.double()
    assert (y - What).norm() <= 1e-3 * What.norm()


@settings(deadline=None, max_examples=20)
@given(st.integers(-60, 60), st.integers(-100, 100), st.sampled_from([2, 3, 4]))
def test_units_of_weights_and_inputs_do_not_matter(unit_W, unit_H, bits):
    plain = quantize_matrix(W, H, bits)
    other = quantize_matrix(W * 2.0**unit_W, H * 2.0**unit_H, bits)
    assert torch.equal(plain.codes, other.codes)
    assert torch.equal(plain.dequantize() * 2.0**unit_W, other.dequantize())
    assert plain.report == other.report


@pytest.mark.parametrize("choice", CHOICES)
def test_weights_that_no_live_input_reads_have_no_relative_loss(choice):
    X = without(list(range(10)))
    W = normal(24, 40)
    W[:, 10:] = 0  # all outputs are zero, and Ŵ's are not
    q = quantize_matrix(W, moment_of(X), 2, **matrix_arguments(choose(**CHOICES[choice])))
    loss = strict(q.report)["relative_proxy_loss"]
    assert loss == (0 if choice == "own basis" and not (q.dequantize()[:, 10:]).any() else None)


def test_the_report_says_what_was_unusual():
    dead = quantize_matrix(*MATRICES["dead inputs"]).report
    assert dead["dead_inputs"] == 3
    huge = quantize_matrix(*MATRICES["massive activation"]).report
    assert huge["largest_input"] > 0.99999 and "dead_inputs" not in huge
    plain = quantize_matrix(W, H).report
    assert plain["largest_input"] < 0.05 and not {"dead_inputs", "alpha_asked"} & plain.keys()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_massive_activation_costs_ordinary_tokens_little(bits):
    ordinary = moment_of(X)
    with_massive = quantize_matrix(W, moment_of(massive()), bits).dequantize()
    loss = relative_proxy_loss(with_massive, W, ordinary)
    assert loss < 2.5 * quantize_matrix(W, ordinary, bits).report["relative_proxy_loss"]


def test_too_large_weights_are_refused():
    with pytest.raises(QuipError, match="up_proj: the weights are too large"):
        quantize_matrix(1e38 * W, H, name="up_proj")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({}, None),
        ({"tokens": 40}, None),
        ({"tokens": 7}, "7 calibration tokens for 40 inputs"),
        ({"alpha": 0.1, "alpha_asked": 0.01}, "damping raised from 0.01 to 0.1"),
        ({"dead_inputs": 3}, "3 of 40 inputs are 0"),
        ({"largest_input": 0.996}, "one input has 99.60% of tr H"),
        ({"relative_proxy_loss": None}, "its outputs are 0"),
    ],
)
def test_info_has_a_line_for_each(entry, words):
    lines = notes({"shape": [24, 40], "relative_proxy_loss": 0.1, "largest_input": 0.3, **entry})
    assert len(lines) == (words is not None)
    assert not lines or words in lines[0]


def test_the_mean_leaves_out_layers_without_a_relative_loss():
    layers = {name: {"relative_proxy_loss": loss} for name, loss in {"a": 0.1, "b": None, "c": 0.3}.items()}
    assert mean_loss(layers) == pytest.approx(0.2)
    assert mean_loss({"b": layers["b"]}) == 0


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_what_is_not_finite_is_written_as_null(tmp_path):
    content = {"ppl": math.inf, "rows": [{"x": (math.nan, 1.5, -math.inf)}, 3, "NaN", None, True]}
    expected = {"ppl": None, "rows": [{"x": [None, 1.5, None]}, 3, "NaN", None, True]}
    assert finite(content) == expected
    for write in (cli.write_json, write_record):
        write(str(tmp_path / "file.json"), content)
        text = (tmp_path / "file.json").read_text(encoding="utf-8")
        assert json.loads(text, parse_constant=no_constant) == expected


def test_a_checkpoint_of_a_layer_without_relative_loss(tmp_path, tokenizer, token_ids, capsys):
    """From quantizing to `quip info`: the report is strict JSON, and what was unusual has its line."""
    model = dead_relu()
    model.model.decoder.layers[1].fc2.weight.data[:, ::2] = 0
    model.model.decoder.layers[0].fc1.bias.data[:48] = -1e3
    model.model.decoder.layers[0].fc2.weight.data[:, 48:] = 0  # reads dead units only
    reports = models.quantize_model(model, token_ids, 2, progress=False)
    assert reports["model.decoder.layers.0.fc2"]["relative_proxy_loss"] is None
    save_model(model, tokenizer, tmp_path / "out", reports, {"bits": 2})
    text = (tmp_path / "out" / REPORT).read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=no_constant)["layers"] == reports
    cli.main(["info", str(tmp_path / "out"), "--json", str(tmp_path / "info.json")])
    json.loads((tmp_path / "info.json").read_text(encoding="utf-8"), parse_constant=no_constant)
    lines = capsys.readouterr().out.splitlines()
    assert "model.decoder.layers.0.fc2: 48 of 96 inputs are 0 on all calibration text" in lines
    assert "model.decoder.layers.1.fc2: 96 of 96 inputs are 0 on all calibration text" in lines
    assert "model.decoder.layers.0.fc2: its outputs are 0 on all calibration text" in "\n".join(lines)


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decomposition_that_does_not_converge_is_tried_again(dtype, failures, monkeypatch):
    H = moment_of(X[:7]).to(dtype)
    calls, eigh = [], torch.linalg.eigh

    def stubborn(A):
        calls.append(A)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    values, Q = decompose(H)
    assert len(calls) == failures + 1 and values.dtype == Q.dtype == dtype
    assert torch.allclose(Q * values @ Q.T, H, atol=1e-5 * H.max())


# the second moment


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_second_moments_do_not_depend_on_the_dtype(dtype):
    X = massive(10000.0).to(dtype)
    exact = X.double().T @ X.double() / len(X)
    error = (moment_of(X) - exact).abs() / torch.outer(exact.diagonal(), exact.diagonal()).sqrt()
    assert error.max() < 1e-6


@settings(deadline=None, max_examples=30)
@given(st.integers(-125, 120))
def test_second_moments_of_inputs_of_any_size(exponent):
    X = normal(50, 6, seed=3).float()
    unit = 2.0**exponent
    small, plain = moment_of(X[:, :5] * unit) / unit / unit, moment_of(X[:, :5])
    assert torch.allclose(small, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bad_inputs_stay_in_the_second_moment(value, dtype):
    moment = SecondMoment(40, buffer=100)
    Y = X.to(dtype)
    Y[5, 3] = value
    for batch in Y.split(50):
        moment.update(batch)
    assert not torch.isfinite(moment.H).all()


def test_power_of_two_is_the_leading_bit():
    for x, unit in ((1.0, 1.0), (1.99, 1.0), (-2.0, 2.0), (0.3, 0.25), (5e-324, 5e-324), (1.7e308, 2.0**1023)):
        assert power_of_two(torch.tensor([0.0, x], dtype=torch.float64)) == unit
    for x in ([], [0.0], [math.nan], [math.inf, 1.0]):
        assert power_of_two(torch.tensor(x)) == 1


# the layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("apply", [QuantizedLinear.__call__, lambda layer, x: linear_torch(x, *layer.tensors())])
def test_massive_inputs_overflow_only_where_the_output_does(apply, dtype):
    """A token of norm 60000·√40 has a V x beyond float16, and outputs that are not."""
    q = quantize_matrix(0.03 * normal(24, 768), moment_of(normal(900, 768, seed=2)), 4)
    x = 0.1 * normal(3, 768, seed=4)
    x[0, :40] = 60000
    x = x.to(dtype)
    y, exact = apply(QuantizedLinear.from_matrix(q), x), x.double() @ q.dequantize().T
    assert y.dtype == dtype and exact.abs().max() < 65000
    assert ((y - exact).norm(dim=1) < 0.02 * exact.norm(dim=1)).all()


# whole models


def dead_relu():
    """An OPT in which a third of each MLP's units never fire, and one block in which none does."""
    model = tiny_opt()
    first, second = model.model.decoder.layers
    first.fc1.bias.data[:32] = -1e3
    second.fc1.bias.data[:] = -1e3
    return model


def zero_matrices():
    model = tiny_llama()
    model.model.layers[0].self_attn.v_proj.weight.data.zero_()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    return model


def constant_rows():
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.data[:9] = 0.3
    model.model.layers[1].mlp.up_proj.weight.data[:] = -0.01
    return model


def massive_token(dtype=torch.float32):
    """Token 0 lights up one channel of block 0's MLP, as the first token does in real models."""
    model = tiny_llama()
    model.model.embed_tokens.weight.data[:, 5] = 0
    model.model.embed_tokens.weight.data[0, 5] = 10
    for name in ("gate_proj", "up_proj"):
        getattr(model.model.layers[0].mlp, name).weight.data[7, 5] = 12
    return model.to(dtype)


SOUND = {
    "dead ReLU units": dead_relu,
    "zero matrices": zero_matrices,
    "constant rows": constant_rows,
    "massive token": massive_token,
    "massive token, float16": lambda: massive_token(torch.float16),
    "massive token, bfloat16": lambda: massive_token(torch.bfloat16),
    "one column, one row": lambda: tiny_llama(intermediate_size=1),
    "a head of two": lambda: tiny_llama(num_key_value_heads=1, head_dim=2),
}


@pytest.fixture
def ids(token_ids):
    token_ids[:, 0] = 0
    return token_ids


def quantized(model, ids, bits=4):
    """Its report, and the relative change of its logits."""
    with torch.no_grad():
        before = model(ids).logits.float()
        reports = models.quantize_model(model, ids, bits, progress=False)
        after = model(ids).logits.float()
    assert torch.isfinite(after).all()
    return strict(reports), ((after - before).norm() / before.norm()).item()


@pytest.mark.parametrize("case", SOUND)
def test_nasty_models_are_quantized(case, ids):
    reports, change = quantized(SOUND[case](), ids)
    assert change < 0.4
    assert all(report["relative_proxy_loss"] < 0.05 for report in reports.values())


def test_reports_of_models_say_what_was_unusual(ids):
    reports, _ = quantized(dead_relu(), ids)
    fc2 = [reports[f"model.decoder.layers.{i}.fc2"] for i in range(2)]
    assert fc2[0]["dead_inputs"] >= 32 and fc2[1]["dead_inputs"] == 96
    reports, _ = quantized(massive_token(), ids)
    assert reports["model.layers.0.mlp.down_proj"]["largest_input"] > 0.99


@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 8), (3, 2)])
@pytest.mark.parametrize("family", [tiny_llama, tiny_opt])
def test_few_tokens_are_enough_to_run(family, count, length, ids):
    model = family()
    reports = models.quantize_model(model, ids[:count, :length], 2, progress=False)
    assert all(report["relative_proxy_loss"] < 0.3 for report in strict(reports).values())
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


class Routed(torch.nn.Module):
    """An MLP of three experts, one for tokens of each sign of their first channel, one for none."""

    def __init__(self, width):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x):
        y = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (x[..., 0] > 0, x[..., 0] <= 0), strict=False):
            if chosen.any():
                y[chosen] = expert(x[chosen])
        return y


def test_experts_that_few_or_no_tokens_reach(tmp_path, tokenizer, caplog):
    torch.manual_seed(0)
    model = tiny_llama()
    model.model.layers[0].mlp = Routed(48)
    normed = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: normed.append(args[0][0, :, 0] > 0))
    with torch.no_grad():
        for token in range(256):
            model(torch.tensor([[token]]))
    hook.remove()
    sign = torch.cat(normed)  # of the first token of a sequence
    ids = torch.stack([x.nonzero()[:1, 0] for x in (sign, sign, ~sign)])  # the second expert waits for the third sample
    reports = strict(models.quantize_model(model, ids, 4))
    experts = {name[-1]: report for name, report in reports.items() if "experts" in name}
    assert {name: report["tokens"] for name, report in experts.items()} == {"0": 2, "1": 1}
    assert "model.layers.0.mlp.experts.2 saw no calibration token and stays in 16 bits" in caplog.text
    assert notes(experts["1"])[0].startswith("1 calibration tokens for 48 inputs")
    third = model.model.layers[0].mlp.experts[2]
    assert isinstance(third, torch.nn.Linear) and torch.equal(third.weight, third.weight.half().float())


def overflowing() -> LlamaForCausalLM:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data *= 3000
    model.model.layers[0].mlp.gate_proj.weight.data *= 100
    return model


def test_activations_beyond_float16_name_the_layer_and_the_way_out(ids):
    with pytest.raises(QuipError, match=r"layers\.0\.mlp\.down_proj: .*NaN or infinite.*bfloat16"):
        models.quantize_model(overflowing().half(), ids, 4, progress=False)
    for dtype in (torch.bfloat16, torch.float32):
        _, change = quantized(overflowing().to(dtype), ids)
        assert change < 0.5


def test_a_broken_token_names_the_first_layer(ids):
    model = tiny_llama()
    model.model.embed_tokens.weight.data[ids[3, 7]] = math.nan
    with pytest.raises(QuipError, match=r"layers\.0\.self_attn\.q_proj: .*NaN or infinite"):
        models.quantize_model(model, ids, 4, progress=False)
