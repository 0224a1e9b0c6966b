"""OPT on trained weights, without a network: the small model of book/data/opt, on text that it was not trained on."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM

from quip import data, load_model, models, save_model
from quip.evaluate import perplexity
from quip.info import checkpoint_info
from quip.kernels import QuantizedLinear

FOLDER = Path(__file__).parent.parent / "book/data/opt"
LENGTH = 256


@pytest.fixture(scope="module")
def opt():
    return load_model(str(FOLDER))


def ids_of(tokenizer, name):
    return data.tokenize(tokenizer, data.load_text(str(FOLDER / name)))


def perplexity_of(model, ids):
    return perplexity(model, ids, LENGTH, progress=False)["ppl"]


@pytest.fixture(scope="module")
def ids(opt):
    return ids_of(opt[1], "evaluation.txt")


@pytest.fixture(scope="module")
def dense(opt, ids):
    """Perplexity in 16 bits."""
    return perplexity_of(opt[0], ids)


@pytest.fixture(scope="module")
def samples(opt):
    return data.samples(ids_of(opt[1], "calibration.txt"), 48, LENGTH)


def quantized(samples, bits, **choices):
    model, _ = load_model(str(FOLDER))
    return model, models.quantize_model(model, samples, bits, progress=False, **choices)


@pytest.fixture(scope="module")
def defaults(samples):
    """The default at each width: the model and its report."""
    return {bits: quantized(samples, bits) for bits in (2, 3, 4)}


def test_data_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) < 4e6
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "evaluation.txt"} <= files.keys()


def test_it_is_an_opt_with_all_its_peculiarities(opt):
    model, _ = opt
    config, state = model.config, model.state_dict()
    assert isinstance(model, OPTForCausalLM) and config.activation_function == "relu"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert config.word_embed_proj_dim != config.hidden_size
    assert {"model.decoder.project_in.weight", "model.decoder.project_out.weight"} <= state.keys()
    assert "model.decoder.embed_positions.weight" in state
    biases = {name: x.abs().mean().item() for name, x in state.items() if re.search(r"(proj|fc\d)\.bias$", name)}
    assert len(biases) == 6 * config.num_hidden_layers
    shared = {name for name in biases if name.endswith("k_proj.bias")}  # softmax does not see them
    assert min(x for name, x in biases.items() if name not in shared) > 0.01


def test_text_survives_the_tokenizer_and_begins_as_in_opt(opt):
    _, tokenizer = opt
    for text in ("Return the number of items.", "    if x == 1:\n\tpass  # naïve ∀ 𝕏\r\n", ""):
        ids = tokenizer(text).input_ids
        assert ids[0] == 2 and tokenizer.decode(ids[1:]) == text


def test_its_perplexity_is_what_its_readme_says(dense):
    stated = re.search(r"perplexity of (\d+\.\d+)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert dense == pytest.approx(float(stated[1]), rel=2e-3)


def test_it_has_learnt(opt, ids, dense):
    counts = torch.bincount(ids, minlength=opt[0].config.vocab_size).double()
    frequencies = counts[counts > 0] / len(ids)
    unigram = math.exp(-(frequencies * frequencies.log()).sum())  # the best that any order-free model can do here
    random = OPTForCausalLM(opt[0].config).eval()
    assert dense < unigram / 6 and dense < perplexity_of(random, ids[:2048]) / 20


def test_no_paragraph_was_trained_on():
    """The calibration text is training text: the two files share nothing."""
    texts = {(FOLDER / f"{name}.txt").read_text(encoding="utf-8") for name in data.PURPOSES}
    first, second = ({p for p in text.strip().split("\n\n") if len(p) > 60} for text in texts)
    assert len(first) > 100 and len(second) > 100 and not first & second


@pytest.fixture(scope="module")
def damage(ids, dense, defaults):
    """What each width adds to the mean negative log-likelihood of a token."""
    return {bits: math.log(perplexity_of(model, ids) / dense) for bits, (model, _) in defaults.items()}


def test_each_width_keeps_its_share(damage):
    assert 0 < damage[4] < damage[3] < damage[2], damage
    assert damage[4] < 0.005 and damage[3] < 0.015 and damage[2] < 0.05, damage


def test_at_two_bits_rounding_to_nearest_does_many_times_the_damage(ids, dense, samples, damage):
    nearest, _ = quantized(samples, 2, method="near", incoherence="none")
    assert math.log(perplexity_of(nearest, ids) / dense) > 5 * damage[2]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loaded_again_it_is_the_same_model(bits, opt, ids, defaults, tmp_path):
    model, reports = defaults[bits]
    save_model(model, opt[1], tmp_path / "out", reports, {"bits": bits})
    loaded, tokenizer = load_model(str(tmp_path / "out"))
    assert sum(isinstance(m, QuantizedLinear) for m in loaded.modules()) == 6 * opt[0].config.num_hidden_layers
    with torch.no_grad():
        expected, got = (m(ids[None, :LENGTH]).logits for m in (model, loaded))
    assert (got - expected).norm() < 1e-5 * expected.norm()
    info = checkpoint_info(tmp_path / "out")
    assert bits < info["totals"]["bits_per_weight"] < bits + 0.01  # its widths are multiples of 64
    prompt = tokenizer("The following", return_tensors="pt")
    first, second = (m.generate(**prompt, max_new_tokens=12, do_sample=False) for m in (model, loaded))
    assert torch.equal(first, second) and first.shape[1] > prompt.input_ids.shape[1]


def test_biases_are_kept_and_matter(opt, ids, defaults):
    model, _ = defaults[4]
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(layer.bias, opt[0].get_submodule(name).bias), name
    without, _ = load_model(str(FOLDER))
    for name, p in without.named_parameters():
        if re.search(r"(proj|fc\d)\.bias$", name):
            p.data.zero_()
    short = ids[:4096]
    assert perplexity_of(without, short) > 1.03 * perplexity_of(opt[0], short)


@pytest.mark.slow
def test_the_script_that_made_it_makes_the_same_tokenizer_and_files(tmp_path):
    script = FOLDER.parents[2] / "tools/train_opt.py"
    options = "--steps", "3", "--length", "64"
    for name in ("a", "b"):
        done = subprocess.run(
            [sys.executable, script, tmp_path / name, *options], capture_output=True, text=True, check=True
        )
        assert "perplexity" in done.stdout
    files = {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    if sys.version_info[:3] == (3, 11, 7):  # the text of the Python that made it
        for file in ("tokenizer.json", "config.json", "evaluation.txt", "calibration.txt"):
            assert (tmp_path / "a" / file).read_bytes() == (FOLDER / file).read_bytes(), file
