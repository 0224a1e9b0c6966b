"""A checkpoint is data: whatever is done to its files, it is refused in one line, or loads as what it now says."""

import json
import shutil
import struct

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file

from quip import cli, load_model, quantize_model, save_model
from quip.errors import QuipError

LAYER = "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint whose layers have all that a layer can have: codes, scale, transforms, D̃, and bias."""
    folder = tmp_path_factory.mktemp("original") / "out"
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    reports = quantize_model(model, ids, bits=3, preset="paper")
    return save_model(model, byte_tokenizer(), folder, reports, {"model": "tiny"})


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "out")


@pytest.fixture
def refused(folder, capsys):
    """Asserts that the checkpoint is refused in one line that has the given words: by the library and on the command
    line, with status 2."""

    def check(*words):
        with pytest.raises(QuipError) as e:
            load_model(str(folder))
        message = str(e.value)
        assert message.strip() and "\n" not in message.strip()
        assert all(word in message for word in words), message
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            cli.main(["generate", str(folder), "hello", "--max-new-tokens", "1"])
        assert e.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("quip: error: "), lines

    return check


def edit_config(folder, edit, name="config.json"):
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def dense(model):
    """Every weight of a model, and what each quantized layer multiplies by."""
    weights = {name: p for name, p in model.named_parameters() if not name.endswith("bias")}
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            weights[name] = layer(torch.eye(layer.in_features))
    return weights


CONFIG = [
    *(("bits", x, "bits must be 2, 3 or 4") for x in (1, 5, -3, 3.0, "3", True, None, [3], {})),
    *(("bits", x, "in the model") for x in (2, 4)),
    *(("format", x, "reads format") for x in (1, 99, 2.0, "2", True, None)),
    *(("rescale", x, "rescale must be true or false") for x in (1, "yes", None)),
    ("rescale", False, "rescale is no tensor of a layer"),
    *(("incoherence", x, "incoherence must be") for x in ("hadamard", None, 3, ["kron"])),
    ("incoherence", "none", "is not the one this checkpoint was made with"),
    *(("permute", x, "permute must be true or false") for x in (0, "", None)),
    ("permute", False, "is not the one this checkpoint was made with"),
    *(("modules_to_not_convert", x, "must be a list of names") for x in ("lm_head", [1], {}, 0)),
    ("modules_to_not_convert", [LAYER], f"{LAYER}.qweight: the model has no quantized layer"),
    *(("bits_for", x, "bits_for must map") for x in ([], "x", 0, False)),
    *(("bits_for", {LAYER: x}, f"bits_for '{LAYER}' must be 2, 3 or 4") for x in (7, None, "2", True)),
    ("bits_for", {LAYER: 2}, f"{LAYER}.qweight is U8"),
    ("bits_for", {"lm_head": 2}, "bits_for names lm_head"),
    ("bits_for", {"model.layers.7.mlp.up_proj": 2}, "bits_for names model.layers.7.mlp.up_proj"),
    ("loading", "fast", "unknown field 'loading'"),
    ("samples", 4, "unknown field 'samples'"),
    ("dataset", "c4", "a dataset is of no use"),
    *(("quant_method", x, "") for x in ("gptq", "awq", "mxfp4", "none", 7, None, ["quip"])),
]


@pytest.mark.parametrize("field, value, words", CONFIG)
def test_every_field_of_the_quantization_config_is_checked(field, value, words, folder, refused):
    edit_config(folder, lambda c: c["quantization_config"].update({field: value}))
    refused(words)


@pytest.mark.parametrize("field", ["bits", "rescale", "quant_method"])
def test_what_a_quantization_config_must_say(field, folder, refused):
    edit_config(folder, lambda c: c["quantization_config"].pop(field))
    refused()


@pytest.mark.parametrize("value", [None, [], {}, "quip", 3])
def test_a_checkpoint_without_its_quantization_config_is_refused(value, folder, refused):
    edit_config(folder, lambda c: c.update(quantization_config=value))
    refused()


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", 64),
        ("hidden_size", 48_000_000_000),
        ("hidden_size", -48),
        ("intermediate_size", 96),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("num_key_value_heads", 4),
        ("vocab_size", 258),
        ("vocab_size", 10**12),
        ("attention_bias", False),
        ("tie_word_embeddings", False),
        ("model_type", "no-such-model"),
        ("model_type", "opt"),
        ("hidden_act", "no-such-function"),
        ("dtype", "float17"),
    ],
)
def test_sizes_are_checked_against_the_files_before_anything_is_allocated(field, value, folder, refused):
    edit_config(folder, lambda c: c.update({field: value}))
    refused()


def test_names_that_change_nothing_are_accepted(folder, original):
    edit_config(folder, lambda c: c["quantization_config"].update(modules_to_not_convert=[], bits_for={LAYER: 3}))
    a, b = (dense(load_model(str(f))[0]) for f in (original, folder))
    assert all(torch.equal(x, b[name]) for name, x in a.items())


def wrong_headers(x):
    """Tensors that are not of x's dtype and shape."""
    yield "cut off", x[:-1]
    yield "longer", torch.cat((x, x[:1]))
    yield "another dimension", x[None].clone()
    yield "empty", x[:0]
    yield "wide integers", x.to(torch.int32)
    yield "double", x.double()
    yield "boolean", x.bool()


@pytest.mark.parametrize("part", ["qweight", "scale", "transforms", "rescale", "bias"])
def test_every_tensor_of_a_layer_is_checked(part, original, tmp_path):
    """Through the library alone: these are many."""
    key = f"{LAYER}.{part}"
    folder = shutil.copytree(original, tmp_path / "out")
    tensors = load_file(original / "model.safetensors")
    for what, x in (("missing", None), *wrong_headers(tensors[key])):
        changed = {name: y for name, y in {**tensors, key: x}.items() if y is not None}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(QuipError, match=f"^{key}[^\n]*$".replace(".", r"\.").replace(r"[^\n]\.", r"[^\n]")):
            load_model(str(folder))
            pytest.fail(f"{what}: accepted")


@pytest.mark.parametrize("key", [f"{LAYER}.weight", f"{LAYER}.g_idx", "model.layers.7.mlp.up_proj.qweight", "stranger"])
def test_tensors_that_belong_to_nothing_are_refused(key, folder, refused):
    edit_tensors(folder, lambda t: t.update({key: torch.zeros(48, 48)}))
    refused(key)


@pytest.mark.parametrize(
    "key", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"]
)
def test_other_tensors_are_checked(key, folder, refused):
    original = load_file(folder / "model.safetensors")[key]
    for x in (original[:-1], original.long(), original[None].clone()):
        edit_tensors(folder, lambda t, x=x: t.update({key: x}))
        refused(key)
    edit_tensors(folder, lambda t: t.pop(key))
    refused("missing in its files")


@pytest.mark.parametrize(
    "part, index, value",
    [
        *(("scale", 0, x) for x in (float("nan"), float("inf"), -1.0)),
        *(("rescale", 7, x) for x in (float("nan"), float("inf"), 0.0, -1.0, 1e-45)),
        *(("bias", 3, x) for x in (float("nan"), float("-inf"))),
        *(("transforms", (0, 0), x) for x in (5, -1, 2**32, 2**63 - 1, -(2**63))),
        *(("transforms", (1, 1), x) for x in (0, 2**63 - 1, -(2**63))),
    ],
)
def test_values_that_no_quantization_makes_are_refused(part, index, value, folder, refused):
    def edit(tensors):
        tensors[f"{LAYER}.{part}"][index] = value

    edit_tensors(folder, edit)
    refused(LAYER)


@pytest.mark.parametrize(
    "part, change",
    [
        ("qweight", lambda x: x[5, 3].bitwise_xor_(8)),
        ("scale", lambda x: x.mul_(2)),
        ("scale", lambda x: x.zero_()),
        ("rescale", lambda x: x[4].mul_(3)),
        ("bias", lambda x: x[0].add_(1)),
    ],
)
def test_values_that_could_be_are_loaded_and_change_their_layer_alone(part, change, folder, original):
    edit_tensors(folder, lambda t: change(t[f"{LAYER}.{part}"]))
    a, b = (dense(load_model(str(f))[0]) for f in (original, folder))
    assert [name for name in a if not torch.equal(a[name], b[name])] == [LAYER]


def test_bits_between_the_rows_of_codes_mean_nothing(folder, original):
    """48 codes of 3 bits fill 18 of the 24 bytes of a row."""
    edit_tensors(folder, lambda t: t[f"{LAYER}.qweight"][:, [13, 15, 23]].fill_(255))
    a, b = (dense(load_model(str(f))[0]) for f in (original, folder))
    assert all(torch.equal(x, b[name]) for name, x in a.items())


def header_of(file):
    (size,) = struct.unpack("<Q", file[:8])
    return size, json.loads(file[8 : 8 + size])


def with_header(file, header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + file[8 + header_of(file)[0] :]


def test_weight_files_cut_anywhere_are_refused(folder, original):
    whole = (original / "model.safetensors").read_bytes()
    size, _ = header_of(whole)
    places = {0, 1, 7, 8, 9, size // 2, size + 7, size + 8, size + 9, len(whole) - 1}
    places |= set(range(0, len(whole), len(whole) // 23))
    for place in sorted(places - {len(whole)}):
        (folder / "model.safetensors").write_bytes(whole[:place])
        with pytest.raises(QuipError, match=r"^[^\n]*model\.safetensors[^\n]*$"):
            load_model(str(folder))


@pytest.mark.parametrize("length", [0, 1, 7, 100, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_a_wrong_length_is_refused(length, folder, refused):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + whole[8:])
    refused("model.safetensors")


HEADERS = {
    "enormous": {"shape": [2**40, 2**40]},
    "overflowing": {"shape": [2**63, 2]},
    "negative": {"shape": [-48, -24]},
    "beyond the end": {"data_offsets": [0, 2**50]},
    "backwards": {"data_offsets": [100, 50]},
    "overlapping": {"data_offsets": [0, 24 * 24]},
    "no such type": {"dtype": "F128"},
    "no shape": {"shape": None},
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_lie_are_refused(what, folder, refused):
    whole = (folder / "model.safetensors").read_bytes()
    header = header_of(whole)[1]
    header[f"{LAYER}.qweight"].update(HEADERS[what])
    (folder / "model.safetensors").write_bytes(with_header(whole, header))
    refused("model.safetensors")


def test_a_header_with_any_byte_changed_is_refused_or_says_the_same(folder, original):
    whole = (original / "model.safetensors").read_bytes()
    size, _ = header_of(whole)
    expected = dense(load_model(str(original))[0])
    g = torch.Generator().manual_seed(0)
    outcomes = []
    for place in torch.randint(8, 8 + size, (40,), generator=g).tolist():
        changed = bytearray(whole)
        changed[place] ^= 1 << torch.randint(0, 7, (), generator=g).item()
        (folder / "model.safetensors").write_bytes(changed)
        try:
            model = load_model(str(folder))[0]
        except QuipError as e:
            assert "\n" not in str(e).strip()
            outcomes.append("refused")
        else:
            assert all(torch.equal(x, expected[name]) for name, x in dense(model).items())
            outcomes.append("the same")
    assert outcomes.count("refused") >= 30


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_other_files_cut_anywhere_are_refused(name, folder, original):
    whole = (original / name).read_text()
    for place in (0, 1, len(whole) // 3, len(whole) // 2, len(whole.rstrip()) - 1):
        (folder / name).write_text(whole[:place])
        with pytest.raises(QuipError) as e:
            load_model(str(folder))
        assert "\n" not in str(e.value).strip()


@pytest.mark.parametrize("content", ["[]", "3", '"quip"', "null", "[" * 100_000, '{"model_type": {}}', "\x00\xff"])
def test_a_config_that_is_none_is_refused(content, folder, refused):
    (folder / "config.json").write_text(content)
    refused()


@pytest.fixture
def sharded(folder):
    """The checkpoint in several files, with an index."""
    model, _ = load_model(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert load_model(str(folder))
    return folder


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("damage", ["cut index", "missing file", "cut file", "elsewhere", "no map", "not all", "twice"])
def test_sharded_checkpoints_are_checked_as_a_whole(damage, sharded, refused):
    files = sorted(sharded.glob("*.safetensors"))
    index = json.loads((sharded / INDEX).read_text())
    if damage == "cut index":
        (sharded / INDEX).write_text((sharded / INDEX).read_text()[:-20])
    elif damage == "missing file":
        files[1].unlink()
    elif damage == "cut file":
        files[-1].write_bytes(files[-1].read_bytes()[:-1])
    elif damage == "elsewhere":
        index["weight_map"] = {key: f"../{name}" for key, name in index["weight_map"].items()}
    elif damage == "no map":
        index["weight_map"] = 7
    elif damage == "not all":  # the file is there, but the index does not name it
        index["weight_map"] = {k: name for k, name in index["weight_map"].items() if name != files[1].name}
    elif damage == "twice":
        save_file({**load_file(files[0]), **load_file(files[1])}, files[1], {"format": "pt"})
    if damage not in ("cut index", "missing file", "cut file", "twice"):
        (sharded / INDEX).write_text(json.dumps(index))
    refused()


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("quantized", [True, False])
def test_no_pickle_is_opened(quantized, folder, refused, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    if not quantized:
        edit_config(folder, lambda c: c.pop("quantization_config"))
    refused()
    assert not (tmp_path / "ran").exists()


def test_weights_in_a_pickle_are_refused_even_if_they_fit(folder, refused):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused("pytorch_model.bin")


CODE = """
from pathlib import Path
Path({path!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "stranger"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_runs_only_if_asked_for(part, folder, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # nobody to answer "run it?"
    (folder / "stranger.py").write_text(CODE.format(path=str(tmp_path / "ran")))
    if part == "model":
        names = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
        edit_config(folder, lambda c: c.update(model_type="stranger", auto_map=names))
    else:
        name = {"AutoTokenizer": [None, "stranger.Tokenizer"]}
        edit_config(folder, lambda c: c.update(tokenizer_class="Tokenizer", auto_map=name), "tokenizer_config.json")
    refused("custom code")
    assert not (tmp_path / "ran").exists()
    cli.main(["generate", str(folder), "hello", "--max-new-tokens", "1", "--trust-remote-code"])
    model, _ = load_model(str(folder), trust_remote_code=True)
    assert (tmp_path / "ran").exists() and model(torch.tensor([[1, 2]])).logits.isfinite().all()


REPORTS = {
    "no layers": lambda r: r.pop("layers"),
    "empty": lambda r: r["layers"].clear(),
    "a list": lambda r: r.update(layers=[1]),
    "settings": lambda r: r.update(settings=3),
    "no shape": lambda r: r["layers"][LAYER].pop("shape"),
    "shape": lambda r: r["layers"][LAYER].update(shape=[0, 48]),
    "rho": lambda r: r["layers"][LAYER].update(rho="wide"),
    "mu": lambda r: r["layers"][LAYER].update(mu_weights=[1, "x"]),
    "loss": lambda r: r["layers"][LAYER].pop("relative_proxy_loss"),
    "stranger": lambda r: r["layers"].update(stranger=r["layers"][LAYER]),
    "no layer": lambda r: r["layers"].update({LAYER: None}),
}


@pytest.mark.parametrize("damage", [*REPORTS, "cut", "deep", "cut weights"])
def test_info_refuses_a_damaged_checkpoint(damage, folder, capsys):
    report = folder / "quip_report.json"
    if damage in REPORTS:
        edit_config(folder, REPORTS[damage], report.name)
    elif damage == "cut weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    else:
        report.write_text(report.read_text()[:-9] if damage == "cut" else "[" * 100_000)
    with pytest.raises(SystemExit) as e:
        cli.main(["info", str(folder)])
    assert e.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("quip: error: "), lines


def test_a_model_with_code_of_its_own_is_quantized_only_if_asked_for(tmp_path, capsys, text_file):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_llama().save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    (source / "stranger.py").write_text(CODE.format(path=str(tmp_path / "ran")))
    names = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    edit_config(source, lambda c: c.update(model_type="stranger", auto_map=names))
    command = ["quantize", str(source), str(out), "--bits", "4", "--calib", str(text_file)]
    command += ["--samples", "2", "--seq-len", "32"]
    with pytest.raises(SystemExit) as e:
        cli.main(command)
    assert e.value.code == 2 and "custom code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not out.exists()
    cli.main([*command, "--trust-remote-code"])
    assert load_model(str(out), trust_remote_code=True)[0].config.quantization_config.bits == 4
    with pytest.raises(QuipError, match="custom code"):
        load_model(str(out))
