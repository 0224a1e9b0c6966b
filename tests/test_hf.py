"""Transformers loads, places, saves and pushes a quantized model as it does any other."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import tiny_llama
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from quip import load_model, quantize, quantize_model, save_model
from quip.errors import QuipError
from quip.fuse import fuse, unfuse
from quip.hf import QuipConfig
from quip.kernels import QuantizedLinear


@pytest.fixture
def model(token_ids):
    model = tiny_llama(attention_bias=True)
    quantize_model(model, token_ids, bits=3)
    return model


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    return save_model(model, tokenizer, tmp_path / "out", {}, {})


@torch.no_grad()
def logits(model, ids):
    return model(ids[:2]).logits.float()


def same_logits(loaded, model, ids):
    """Whether two models give the same: but for rounding if one is fused, and all but exactly if neither is."""
    close = torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-3)
    plain = [logits(unfuse(m), ids) for m in (loaded, model)]
    fuse(loaded), fuse(model)
    return close and torch.allclose(*plain, atol=1e-5)


def test_layers_of_other_widths(model, token_ids, tokenizer, tmp_path):
    wider = tiny_llama(attention_bias=True)
    quantize_model(wider, token_ids, bits=4)
    widths = {"model.layers.0.mlp.down_proj": 4, "model.layers.1.self_attn.q_proj": 4}
    for name in widths:
        model.set_submodule(name, wider.get_submodule(name))
    model.config.quantization_config.bits_for = widths
    save_model(model, tokenizer, tmp_path / "out", {}, {})
    for cls, base in ((AutoModelForCausalLM, ""), (AutoModel, "model.")):
        loaded = cls.from_pretrained(tmp_path / "out")
        layers = {name: m.bits for name, m in loaded.named_modules() if isinstance(m, QuantizedLinear)}
        assert len(layers) == 14
        assert {name: bits for name, bits in layers.items() if bits != 3} == {
            name.removeprefix(base): bits for name, bits in widths.items()
        }
        loaded.save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_logits(loaded, model, token_ids)


def test_layers_that_were_left_alone(model, token_ids, tokenizer, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    plain = tiny_llama(attention_bias=True).get_submodule(name)
    model.set_submodule(name, plain)
    model.config.quantization_config.modules_to_not_convert.append(name)
    save_model(model, tokenizer, tmp_path / "out", {}, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_submodule(name).weight, plain.weight.half().float())
    assert isinstance(loaded.get_submodule(name.replace("1", "0")), QuantizedLinear)


def test_the_base_alone_and_other_heads(model, folder, token_ids):
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected, got = (m(token_ids).last_hidden_state for m in (model.model, base))
    assert torch.allclose(got, expected, atol=1e-5)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=256)
    assert classifier(token_ids).logits.shape == (6, 3)
    assert isinstance(classifier.score, torch.nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "auto"])
def test_dtype(dtype, folder, model, token_ids):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
    layer, original = loaded.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.scale, original.scale) and layer.scale.dtype == torch.float32
    expected = logits(model, token_ids)
    assert (logits(loaded, token_ids) - expected).norm() < 0.02 * expected.norm()


PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
BLOCKS = ("model.layers.0", "model.layers.1")
PLACES = {
    "cpu": "cpu",
    "auto": "auto",
    "all on one": {"": "cpu"},
    "a block on disk": {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"},
    "blocks on disk": {**dict.fromkeys(PARTS, "cpu"), **dict.fromkeys(BLOCKS, "disk")},
}


@pytest.mark.parametrize("places", PLACES)
def test_device_map(places, folder, model, token_ids, tmp_path):
    """What is put on disk is the parameters; packed codes stay in memory."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=PLACES[places], offload_folder=tmp_path / "off")
    assert same_logits(loaded, model, token_ids)
    norm = loaded.model.layers[1].input_layernorm.weight
    assert norm.device.type == ("meta" if "disk" in places else "cpu")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert loaded.generate(token_ids[:1], attention_mask=torch.ones(1, 64), **options).shape == (1, 68)


def test_packed_codes_on_disk_are_refused(folder, tmp_path):
    with pytest.raises(QuipError, match="offload_buffers"):
        AutoModelForCausalLM.from_pretrained(
            folder, device_map=PLACES["a block on disk"], offload_folder=tmp_path / "off", offload_buffers=True
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands in for the hub: what is committed to a repository is copied there."""

    def create_repo(*args, repo_id=None, **kwargs):
        return type("Repo", (), {"repo_id": repo_id or args[-1]})()

    def create_commit(*args, repo_id=None, operations=None, **kwargs):
        repo = tmp_path / "hub" / (repo_id or next(a for a in args if isinstance(a, str)))
        for operation in operations:
            target = repo / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, target)

    for owner in (HfApi, transformers.utils.hub, transformers.modeling_utils):
        for name, function in (("create_repo", create_repo), ("create_commit", create_commit)):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, function)
    return tmp_path / "hub"


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_to_hub(way, model, tokenizer, token_ids, hub, tmp_path):
    if way == "push_to_hub":
        model.push_to_hub("somebody/tiny-2bit")
    else:
        model.save_pretrained(str(tmp_path / "local"), push_to_hub=True, repo_id="somebody/tiny-2bit")
    tokenizer.push_to_hub("somebody/tiny-2bit")
    repo = hub / "somebody/tiny-2bit"
    loaded, _ = load_model(str(repo))
    assert torch.allclose(logits(loaded, token_ids), logits(model, token_ids), atol=1e-5)
    assert AutoTokenizer.from_pretrained(repo)("hello").input_ids == tokenizer("hello").input_ids
    assert json.loads((repo / "config.json").read_text())["quantization_config"]["quant_method"] == "quip"
    assert load_file(repo / "model.safetensors").keys() == {k for k in model.state_dict() if k != "lm_head.weight"}


def test_config_as_text_and_back():
    config = QuipConfig(bits=3, bits_for={"a": 4}, modules_to_not_convert=["lm_head"])
    assert QuipConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
    with pytest.raises(QuipError, match="unknown field 'bit'"):
        QuipConfig(bit=2)


@pytest.fixture
def quantize_on_load(model_folder):
    """Loads the ordinary model of a folder, quantized: what `QuipConfig` is given decides how."""
    small = {"samples": 4, "seq_len": 32}

    def load(config=None, **options):
        config = config or QuipConfig(**{"dataset": "python-docs", **small, **options})
        return AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=config)

    return load


@pytest.mark.parametrize("given", ["name", "file", "strings", "tokens"])
def test_from_pretrained_quantizes_an_ordinary_model(
    given, quantize_on_load, model_folder, tokenizer, text_file, tmp_path, token_ids
):
    texts = text_file.read_text().split(" and ")
    dataset = {"name": "python-docs", "file": str(text_file), "strings": texts, "tokens": token_ids.flatten()}[given]
    loaded = quantize_on_load(bits=3, dataset=dataset)
    assert sum(isinstance(m, QuantizedLinear) for m in loaded.modules()) == 14
    same = AutoModelForCausalLM.from_pretrained(model_folder)
    quantize(same, tokenizer, 3, calibration=dataset, samples=4, seq_len=32)
    assert torch.equal(logits(loaded, token_ids), logits(same, token_ids))
    assert loaded.generate(token_ids[:1], attention_mask=torch.ones(1, 64), max_new_tokens=3).shape[1] > 64
    loaded.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(again, token_ids), logits(loaded, token_ids), atol=1e-5)
    stored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert stored.keys() == QuipConfig().to_dict().keys() and "dataset" not in stored


def test_everything_that_quantize_takes_can_be_said_in_the_config(quantize_on_load, tokenizer, model_folder):
    options = {"preset": "paper", "seed": 3, "permute": False, "tokenizer": tokenizer}
    patterns = {"modules_to_not_convert": ["*.0.mlp.up_proj", "lm_head"], "bits_for": {"*.down_proj": 4}}
    loaded = quantize_on_load(bits=2, **options, **patterns)
    config = loaded.config.quantization_config
    assert (config.bits, config.rescale, config.permute, config.incoherence) == (2, True, False, "kron")
    assert config.modules_to_not_convert == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert config.bits_for == {f"model.layers.{i}.mlp.down_proj": 4 for i in range(2)}
    assert "tokenizer" not in repr(config)
    quantize_on_load(bits=2, tokenizer=str(model_folder))


def test_what_cannot_be_quantized_on_load_is_an_error(quantize_on_load, model_folder, folder, tmp_path):
    with pytest.raises(QuipError, match="takes a dataset"):
        quantize_on_load(QuipConfig(bits=2))
    with pytest.raises(QuipError, match="unknown choice sample"):
        QuipConfig(dataset="c4", sample=4)
    with pytest.raises(QuipError, match="unknown method 'gptq'"):
        QuipConfig(dataset="c4", method="gptq")
    with pytest.raises(QuipError, match="unknown data 'wikitext9'"):
        quantize_on_load(dataset="wikitext9")
    with pytest.raises(QuipError, match="text too short"):
        quantize_on_load(dataset=["two words"])
    places = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}
    with pytest.raises(QuipError, match="leaves nothing on disk"):
        AutoModelForCausalLM.from_pretrained(
            model_folder,
            quantization_config=QuipConfig(dataset="python-docs"),
            device_map=places,
            offload_folder=tmp_path / "off",
        )
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuipConfig(dataset="python-docs"))
    assert again.config.quantization_config.bits == 3
