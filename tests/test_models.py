"""A whole model: what a checkpoint holds is the model that was quantized, whatever its family, and nothing is lost."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_llama, tiny_opt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quip import load_model, models, save_model
from quip.checkpoint import REPORT
from quip.errors import QuipError
from quip.families import block_calls, run_block
from quip.kernels import QuantizedLinear
from quip.proxy import relative_proxy_loss

SETTINGS = {"model": "tiny"}


def quantized(model, ids, **kwargs):
    return models.quantize_model(model, ids, progress=False, **kwargs)


def logits(model, ids):
    with torch.no_grad():
        return model(ids[:2]).logits.float()


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


FAMILIES = {
    "llama": tiny_llama,
    "llama with biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "llama, untied": lambda: tiny_llama(tie_word_embeddings=False),
    "llama, prime widths": lambda: tiny_llama(intermediate_size=97),
    "opt": tiny_opt,
}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_checkpoint_gives_the_logits_of_the_model_in_memory(family, bits, tmp_path, tokenizer, token_ids):
    model = FAMILIES[family]()
    before = logits(model, token_ids)
    reports = quantized(model, token_ids, bits=bits)
    expected = logits(model, token_ids)
    assert relative_error(expected, before) > 1e-3  # it was quantized at all
    save_model(model, tokenizer, tmp_path / "out", reports, SETTINGS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert relative_error(logits(loaded, token_ids), expected) < 1e-5
    assert sum(isinstance(m, QuantizedLinear) for m in loaded.modules()) == len(reports)


def test_paper_preset_stores_its_rescaling(tmp_path, tokenizer, token_ids):
    model = tiny_llama()
    reports = quantized(model, token_ids, bits=3, preset="paper")
    assert {r["rho"] for r in reports.values()} == {2.4}
    save_model(model, tokenizer, tmp_path / "out", reports, SETTINGS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.model.layers[0].mlp.down_proj.rescale.std() > 0
    assert relative_error(logits(loaded, token_ids), logits(model, token_ids)) < 1e-5


def test_importing_quip_is_all_that_loading_needs(tmp_path, tokenizer, token_ids):
    model = tiny_llama()
    save_model(model, tokenizer, tmp_path / "out", quantized(model, token_ids), SETTINGS)
    code = (
        "import sys, quip; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(m.generate(**t('hello', return_tensors='pt'), max_new_tokens=3, do_sample=False).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 8])", done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_type_and_their_scales(dtype, tmp_path, tokenizer, token_ids):
    tiny_llama().save_pretrained(tmp_path / "model")  # `.to(dtype)` would cast rotary frequencies too
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    save_model(model, tokenizer, tmp_path / "out", quantized(model, token_ids, bits=4), SETTINGS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, model.model.layers[0].mlp.down_proj.scale)
    assert relative_error(logits(loaded, token_ids), logits(model, token_ids)) < 1e-5


def test_a_loaded_checkpoint_saves_again_to_the_same_tensors(tmp_path, tokenizer, token_ids):
    model = tiny_llama()
    save_model(model, tokenizer, tmp_path / "a", quantized(model, token_ids), SETTINGS)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    a, b = load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "b/model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k].to(a[k].dtype)) for k in a)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert relative_error(logits(again, token_ids), logits(model, token_ids)) < 1e-5


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, tokenizer, token_ids):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = tiny_llama()
        save_model(model, tokenizer, tmp_path / name, quantized(model, token_ids, seed=seed), SETTINGS)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()


def test_file_holds_packed_integers_16_bit_rest_and_one_copy_of_tied_weights(tmp_path, tokenizer, token_ids):
    model = tiny_llama()
    save_model(model, tokenizer, tmp_path / "out", quantized(model, token_ids, bits=3), SETTINGS)
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as f:
        kinds = {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118
    assert kinds.pop("model.embed_tokens.weight") == "F16" and "lm_head.weight" not in kinds
    assert {k.rsplit(".")[-1]: kind for k, kind in kinds.items()} == {
        "qweight": "U8",
        "scale": "F32",
        "transforms": "I64",
        "weight": "F16",
    }
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["modules_to_not_convert"]) == ("quip", 3, ["lm_head"])


def test_layers_that_share_an_input_share_its_transform(token_ids):
    model = tiny_llama()
    quantized(model, token_ids)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    layers = {**dict(attention.named_children()), **dict(mlp.named_children())}
    seeds = {n: m.transforms[:, 0].tolist() for n, m in layers.items() if isinstance(m, QuantizedLinear)}
    V, U = {n: s[0] for n, s in seeds.items()}, {n: s[1] for n, s in seeds.items()}
    assert V["q_proj"] == V["k_proj"] == V["v_proj"]
    assert V["gate_proj"] == V["up_proj"]
    assert len(set(V.values())) == 4 and len(set(U.values())) == 7


def test_moments_are_the_mean_outer_products_of_each_layers_inputs(token_ids):
    model = tiny_llama()
    block = model.model.layers[0]
    hidden, calls = block_calls(model, token_ids)
    seen = []
    with torch.no_grad(), models.hooks({block.mlp.down_proj: lambda module, args: seen.append(args[0].double())}):
        moments = {tuple(names): m for names, m in models.input_moments(block, hidden, calls[0])}
        seen.clear()
        for x in hidden:
            run_block(block, x, calls[0])
    X = torch.cat(seen).flatten(0, 1)
    assert list(moments) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert torch.allclose(moments["mlp.down_proj",].H, X.T @ X / len(X), rtol=1e-5, atol=1e-7)


def test_later_blocks_are_calibrated_on_what_quantized_blocks_produce(token_ids):
    model, dense = tiny_llama(), tiny_llama()
    models.round_to_16_bits(dense.named_parameters(), torch.float16)
    reports = quantized(model, token_ids, bits=2)
    hidden, calls = block_calls(model, token_ids)
    with torch.no_grad():
        hidden = [run_block(model.model.layers[0], x, calls[0]) for x in hidden]
    H = models.input_moments(dense.model.layers[1], hidden, calls[1])[0][1].H
    layer = model.model.layers[1].self_attn.q_proj
    What = layer(torch.eye(48)).T.double().detach()
    loss = relative_proxy_loss(What, dense.model.layers[1].self_attn.q_proj.weight.double(), H)
    assert loss == pytest.approx(reports["model.layers.1.self_attn.q_proj"]["relative_proxy_loss"], rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_are_an_error_that_names_the_layer(value, token_ids):
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = value
    with pytest.raises(QuipError, match=r"model\.layers\.1\.self_attn\.q_proj.*NaN or infinite"):
        quantized(model, token_ids)


def test_bad_weights_are_an_error_that_names_the_layer(token_ids):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[5, 7] = float("nan")
    with pytest.raises(QuipError, match=r"model\.layers\.0\.mlp\.(up|down)_proj.*NaN or infinite"):
        quantized(model, token_ids)


@pytest.mark.parametrize("change", [{"bits": 1}, {"bits": 5}, {"preset": "best"}, {"seed": -1}])
def test_bad_arguments_leave_the_model_alone(change, token_ids):
    model = tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(QuipError, match=str(next(iter(change.values())))):
        quantized(model, token_ids, **change)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_nothing_or_the_old_checkpoint(failure, tmp_path, tokenizer, token_ids, monkeypatch):
    model = tiny_llama()
    reports = quantized(model, token_ids)

    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as m:
        m.setattr(type(tokenizer), "save_pretrained", fail)
        with pytest.raises(failure):
            save_model(model, tokenizer, tmp_path / "out", reports, SETTINGS)
        assert list(tmp_path.iterdir()) == []
    save_model(model, tokenizer, tmp_path / "out", reports, SETTINGS)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(failure):
        save_model(model, tokenizer, tmp_path / "out", reports, SETTINGS, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_nothing_but_our_own_checkpoints_is_replaced(tmp_path, tokenizer, token_ids):
    model = tiny_llama()
    reports = quantized(model, token_ids)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(QuipError, match="not a quip checkpoint"):
            save_model(model, tokenizer, other, reports, SETTINGS, overwrite)
    save_model(model, tokenizer, tmp_path / "out", reports, SETTINGS)
    with pytest.raises(QuipError, match="exists"):
        save_model(model, tokenizer, tmp_path / "out", reports, SETTINGS)
    save_model(model, tokenizer, tmp_path / "out", reports, {"model": "again"}, overwrite=True)
    assert json.loads((tmp_path / "out" / REPORT).read_text())["settings"] == {"model": "again"}


def checkpoint(folder, tokenizer, ids):
    model = tiny_llama()
    return save_model(model, tokenizer, folder, quantized(model, ids), SETTINGS)


def test_a_transform_that_is_not_the_files_own_is_refused(tmp_path, tokenizer, token_ids):
    out = checkpoint(tmp_path / "out", tokenizer, token_ids)
    state = load_file(out / "model.safetensors")
    state["model.layers.1.mlp.up_proj.transforms"][0, 0] += 1  # another seed, the old fingerprint
    save_file(state, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuipError, match=r"model\.layers\.1\.mlp\.up_proj: the transform of seed"):
        load_model(str(out))


@pytest.mark.parametrize("damage", ["truncate", "bits", "format", "no weights", "config"])
def test_damaged_checkpoints_are_refused_in_one_error(damage, tmp_path, tokenizer, token_ids):
    out = checkpoint(tmp_path / "out", tokenizer, token_ids)
    weights, config = out / "model.safetensors", out / "config.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config":
        config.write_text(config.read_text()[:-20])
    else:
        content = json.loads(config.read_text())
        content["quantization_config"][damage] = 7
        config.write_text(json.dumps(content))
    with pytest.raises(QuipError):
        load_model(str(out))


def test_unknown_models_are_an_error(tmp_path):
    for source in ("no/such-model-anywhere", str(tmp_path), str(tmp_path / "missing.gguf")):
        with pytest.raises(QuipError):
            load_model(source)


def test_what_does_not_fit_16_bits_is_an_error_that_names_it(token_ids):
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = 1e5
    with pytest.raises(QuipError, match=r"layers\.1\.input_layernorm\.weight: entries too large for torch\.float16"):
        quantized(model, token_ids)
    model = tiny_llama()
    model.model.norm.weight.data[3] = -65519.0  # rounds to the largest float16
    assert quantized(model, token_ids)
