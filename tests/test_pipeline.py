"""From a model's files to a checkpoint: in the memory of a block, killed and resumed, and always to the same bytes."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import large
import pytest
import torch
from conftest import tiny_llama, tiny_opt
from safetensors.torch import load_file, save_file
from test_families import EXPERTS, tiny
from test_families import FAMILIES as families
from transformers import GenerationConfig

import quip
from quip import data, load_model, models, quantize_model, save_model
from quip.errors import QuipError
from quip.info import checkpoint_info
from quip.kernels import QuantizedLinear
from quip.pipeline import quantize_to_folder
from quip.states import OffloadedStates, hidden_states


def contents(folder):
    """Every file below a folder, as bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def shards(tmp_path, tokenizer):
    """Writes a model as safetensors of at most 40 kB each."""

    def write(model, name="shards", dtype=torch.float32):
        model.to(dtype).save_pretrained(tmp_path / name, max_shard_size="40KB")
        tokenizer.save_pretrained(tmp_path / name)
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 2
        return tmp_path / name

    return write


@pytest.fixture
def run(text_file):
    """Quantizes with little calibration text."""

    def go(source, out, **changes):
        arguments = {"calibration": str(text_file), "samples": 4, "seq_len": 64, "passes": 0} | changes
        return quantize_to_folder(str(source), out, **arguments)

    return go


def in_memory(source, out, text_file, dtype=None, **changes):
    """What `run` does, with the whole model in memory."""
    model, tokenizer = load_model(str(source), dtype=dtype)
    ids = data.tokenize(tokenizer, data.load_text(str(text_file)))
    reports = quantize_model(model, data.samples(ids, 4, 64), passes=0, **changes)
    return model, tokenizer, reports


FAMILIES = {
    "llama": (tiny_llama, torch.float32, None),
    "llama, untied": (lambda: tiny_llama(tie_word_embeddings=False), torch.float32, None),
    "llama with biases": (lambda: tiny_llama(attention_bias=True, mlp_bias=True), torch.float32, None),
    "opt": (tiny_opt, torch.float32, None),
    "bfloat16 files, in float32": (tiny_llama, torch.bfloat16, None),
    "bfloat16": (tiny_llama, torch.bfloat16, torch.bfloat16),
    "float32 files, in float16": (tiny_llama, torch.float32, torch.float16),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_from_shards_as_in_memory(family, shards, run, text_file, tmp_path):
    make, stored, dtype = FAMILIES[family]
    source = shards(make(), dtype=stored)
    result = run(source, tmp_path / "out", dtype=dtype)
    model, tokenizer, reports = in_memory(source, tmp_path / "memory", text_file, dtype)
    save_model(model, tokenizer, tmp_path / "memory", reports, result["settings"])
    assert contents(tmp_path / "out") == contents(tmp_path / "memory")
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("family", sorted(families.keys() - EXPERTS))
def test_every_family_from_shards_as_in_memory(family, run, tokenizer, text_file, tmp_path):
    model = tiny(family)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", tmp_path / "out", skip=["*.0.*"])
    model, tokenizer, reports = in_memory(tmp_path / "model", tmp_path / "memory", text_file, skip=["*.0.*"])
    save_model(model, tokenizer, tmp_path / "memory", reports, result["settings"])
    assert contents(tmp_path / "out") == contents(tmp_path / "memory")


def test_fused_experts_are_read_whole_and_said_so(run, tokenizer, tmp_path, caplog):
    tiny("mixtral").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", tmp_path / "out")
    assert "is read whole, not block by block" in caplog.text and "experts" in caplog.text
    loaded, _ = load_model(str(tmp_path / "out"))
    assert len(result["layers"]) == sum(isinstance(m, QuantizedLinear) for m in loaded.modules()) == 8


def test_a_model_in_memory_goes_the_same_way(shards, run, tmp_path, monkeypatch):
    """What a GGUF file or a pickled checkpoint is: read whole, and then the same walk, kept and resumed."""
    source = shards(tiny_llama())
    run(source, tmp_path / "a")
    monkeypatch.setattr("quip.pipeline.weight_files", lambda where, **more: [])
    run(source, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_large_checkpoints_are_sharded_alike(shards, run, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("quip.checkpoint.SHARD", "20KB")
    source = shards(tiny_llama())
    result = run(source, tmp_path / "out")
    model, tokenizer, reports = in_memory(source, tmp_path / "memory", text_file)
    save_model(model, tokenizer, tmp_path / "memory", reports, result["settings"])
    assert contents(tmp_path / "out") == contents(tmp_path / "memory")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded, _ = load_model(str(tmp_path / "out"))
    ids = torch.arange(64)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4)
    assert checkpoint_info(tmp_path / "out")["totals"]["quantized_weights"] > 0


def test_activations_in_a_file_change_nothing_and_leave_nothing(shards, run, tmp_path):
    source = shards(tiny_llama())
    run(source, tmp_path / "a")
    run(source, tmp_path / "b", offload=tmp_path / "scratch")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.fixture
def offloaded(tmp_path):
    with hidden_states(tmp_path) as states:
        yield states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offloaded_states_are_a_sequence_of_tensors(dtype, offloaded, tmp_path):
    tensors = [torch.randn(1, 5, 7, dtype=dtype) for _ in range(3)]
    states = offloaded
    states.extend(tensors)
    states[1] = -tensors[1]
    assert len(states) == 3 and [torch.equal(x, t) for x, t in zip(states, tensors, strict=True)] == [True, False, True]
    assert torch.equal(states[1], -tensors[1])
    with pytest.raises(IndexError):
        states[3]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QuipError, match="cannot keep activations"):
        OffloadedStates(tmp_path / "file")


def materialized():
    """Bytes of all parameters, outside of the meta device, that are alive anywhere in this process."""
    parameters = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter and not x.is_meta]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}.values())


def test_no_more_than_one_block_is_in_memory(shards, run, tmp_path, monkeypatch):
    source = shards(tiny_llama(num_hidden_layers=6, tie_word_embeddings=False))
    whole = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    block = sum(p.numel() * 4 for p in tiny_llama().model.layers[0].parameters())
    gc.collect()
    before, seen = materialized(), []
    original = models.quantize_matrix

    def probe(*args, **kwargs):
        seen.append(materialized() - before)
        return original(*args, **kwargs)

    monkeypatch.setattr(models, "quantize_matrix", probe)
    run(source, tmp_path / "out")
    assert len(seen) == 6 * 7
    assert set(seen) == {block}
    assert whole > 6 * block


def killed(tmp_path, source, text_file, steps, **more):
    """Run tests/killed.py, which kills runs at each of these steps and resumes them; what it says of each."""
    arguments = {"source": str(source), "calibration": str(text_file), "steps": steps, "folder": str(tmp_path), **more}
    script = Path(__file__).with_name("killed.py")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, script, json.dumps(arguments)], capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("where", ["shards", "memory"])
def test_a_run_killed_anywhere_resumes_to_the_same_bytes(where, shards, run, text_file, tmp_path, tokenizer):
    model = tiny_llama(num_hidden_layers=4)
    if where == "shards":
        source = shards(model)
    else:  # no safetensors: read whole
        source = tmp_path / "pickled"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        torch.save(model.state_dict(), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    run(source, tmp_path / "whole")
    results = killed(tmp_path, source, text_file, steps=[2, 3, 6, 14, 19, 20] if where == "shards" else [7])
    for result in results:
        assert result["signals"] == [signal.SIGKILL, 0], result
        assert contents(tmp_path / f"killed-{result['step']}") == contents(tmp_path / "whole"), result
        assert not (tmp_path / f"killed-{result['step']}.part").exists()
    if where == "shards":
        left = [[name.removesuffix(".safetensors") for name in result["left"] if name != "lock"] for result in results]
        done = ["arguments.json", "block-00000", "block-00001", "block-00002", "block-00003", "checkpoint"]
        assert left[:3] == [done[:1], [*done[:1], "block-00000.safetensors.tmp"], done[:3]]
        assert left[3:] == [done, [*done, "ready"], [*done[:-1], "ready"]]
        assert [result["published"] for result in results] == [False] * 5 + [True]


def interrupted(monkeypatch, run, source, out, after=1, error=KeyboardInterrupt, **changes):
    """A run that ends with an error, as if the user pressed Ctrl-C, in block `after`."""
    original, calls = models.quantize_block, []

    def quantize_block(*args):
        calls.append(1)
        if len(calls) > after:
            raise error
        return original(*args)

    with monkeypatch.context() as m:
        m.setattr(models, "quantize_block", quantize_block)
        with pytest.raises(error) as caught:
            run(source, out, **changes)
    return caught.value


def flip(path):
    """Change one bit of a weight file, near its end."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


CHANGED = {
    "bits": {"bits": 3},
    "samples": {"samples": 5},
    "seq_len": {"seq_len": 32},
    "seed": {"seed": 1},
    "method": {"method": "near"},
    "preset": {"preset": "paper"},
    "passes": {"passes": 1},
    "skip": {"skip": ["*.down_proj"]},
    "bits_for": {"bits_for": {"*.down_proj": 4}},
    "dtype": {"dtype": torch.bfloat16},
    "calibration": {"calibration": "python-docs"},
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_changed_argument_refuses_to_resume_and_is_named(key, shards, run, tmp_path, monkeypatch):
    source, out = shards(tiny_llama()), tmp_path / "out"
    interrupted(monkeypatch, run, source, out)
    before = contents(tmp_path / "out.part")
    with pytest.raises(QuipError, match=rf"out\.part .*\b{key} was .* and is now .*--restart"):
        run(source, out, **CHANGED[key])
    assert contents(tmp_path / "out.part") == before and not out.exists()


@pytest.mark.parametrize("what", ["weights", "config", "tokenizer", "text"])
def test_a_changed_file_refuses_to_resume_and_is_named(what, shards, run, text_file, tmp_path, monkeypatch):
    source, out = shards(tiny_llama()), tmp_path / "out"
    interrupted(monkeypatch, run, source, out)
    if what == "weights":
        flip(sorted(source.glob("*.safetensors"))[-1])
    elif what == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    elif what == "tokenizer":
        (source / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text() + "\n")
    else:
        text_file.write_text(text_file.read_text().upper())
    with pytest.raises(QuipError, match=f"{'calibration' if what == 'text' else 'model'} fingerprint changed"):
        run(source, out)


def test_restart_throws_the_work_away(shards, run, tmp_path, monkeypatch):
    source = shards(tiny_llama())
    run(source, tmp_path / "expected", bits=3)
    interrupted(monkeypatch, run, source, tmp_path / "out", bits=2)
    run(source, tmp_path / "out", bits=3, restart=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_an_interrupted_run_says_how_to_go_on_and_resumes(shards, run, tmp_path, monkeypatch):
    source = shards(tiny_llama(num_hidden_layers=4))
    run(source, tmp_path / "expected")
    said = interrupted(monkeypatch, run, source, tmp_path / "out", after=3)
    kept = f"the blocks that are done (3) are kept in {tmp_path / 'out.part'}"
    assert str(said) == f"{kept}; the same command goes on from there"
    again, original = [], models.quantize_block
    monkeypatch.setattr(models, "quantize_block", lambda *args: again.append(args[2]) or original(*args))
    run(source, tmp_path / "out")
    assert again == ["model.layers.3"]  # only that one is left
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("error", [KeyboardInterrupt, QuipError, OSError])
def test_a_run_that_ends_in_its_first_block_leaves_nothing(error, shards, run, tmp_path, monkeypatch):
    source = shards(tiny_llama())
    before = set(tmp_path.iterdir())
    assert not str(interrupted(monkeypatch, run, source, tmp_path / "out", after=0, error=error))
    assert set(tmp_path.iterdir()) == before


def test_overwriting_keeps_the_old_checkpoint_until_the_new_one_is_there(shards, run, tmp_path, monkeypatch):
    source, out = shards(tiny_llama()), tmp_path / "out"
    run(source, out)
    old = contents(out)
    with pytest.raises(QuipError, match="--overwrite"):
        run(source, out, bits=3)
    interrupted(monkeypatch, run, source, out, bits=3, overwrite=True)
    assert contents(out) == old
    run(source, out, bits=3, overwrite=True)
    run(source, tmp_path / "expected", bits=3)
    assert contents(out) == contents(tmp_path / "expected")
    assert not (tmp_path / "out.part").exists()


def test_a_run_killed_after_its_last_rename_is_done(shards, run, tmp_path, monkeypatch):
    """The checkpoint is in its place, the work folder is not removed yet: the same command ends it."""
    source, out = shards(tiny_llama()), tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr("quip.resume.WorkFolder.remove", lambda self: None)
        first = run(source, out)
    assert (tmp_path / "out.part").exists()
    expected = contents(out)
    assert run(source, out) == first
    assert contents(out) == expected and not (tmp_path / "out.part").exists()


def test_two_runs_do_not_write_the_same_checkpoint(shards, run, tmp_path, monkeypatch):
    source, out = shards(tiny_llama()), tmp_path / "out"

    def other(done, count, reports):
        with pytest.raises(QuipError, match="another process is working in"):
            run(source, out)

    run(source, out, progress=other)


def test_a_folder_that_is_not_ours_is_left_alone(shards, run, tmp_path):
    source, part = shards(tiny_llama()), tmp_path / "out.part"
    part.mkdir()
    (part / "thesis.tex").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(QuipError, match="no work folder of quip"):
            run(source, tmp_path / "out", restart=restart)
    assert (part / "thesis.tex").read_text() == "years of work"


def test_a_damaged_block_is_named(shards, run, tmp_path, monkeypatch):
    source = shards(tiny_llama())
    interrupted(monkeypatch, run, source, tmp_path / "out")
    block = tmp_path / "out.part/block-00000.safetensors"
    block.write_bytes(block.read_bytes()[:-50])
    with pytest.raises(QuipError, match=r"block-00000\.safetensors is damaged"):
        run(source, tmp_path / "out")
    block.unlink()
    run(source, tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "shape", "missing", "no files"])
def test_damaged_shards_are_an_error_before_anything_is_written(damage, shards, run, tmp_path):
    source = shards(tiny_llama())
    file = sorted(source.glob("*.safetensors"))[1]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    elif damage == "missing":
        file.unlink()
    elif damage == "no files":
        for file in source.glob("model*"):
            file.unlink()
    else:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(QuipError):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_a_quantized_model_is_not_quantized_again(shards, run, tmp_path):
    run(shards(tiny_llama()), tmp_path / "out")
    with pytest.raises(QuipError, match="quantized already"):
        run(tmp_path / "out", tmp_path / "again")


def test_base_model_prefix_more_or_less(shards, run, tmp_path, tokenizer):
    """Older checkpoints, of the base model alone, lack its prefix."""
    model = tiny_llama()
    run(shards(model), tmp_path / "a")
    model.model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "base")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "base")
    run(tmp_path / "base", tmp_path / "b")
    assert contents(tmp_path / "a")["model.safetensors"] == contents(tmp_path / "b")["model.safetensors"]


def test_both_of_two_tied_tensors_in_the_files(shards, run, tmp_path, caplog):
    """Equal, they are one; different, Transformers does not tie them either, and reads the model whole."""
    source = shards(tiny_llama())
    run(source, tmp_path / "expected")
    file = next(f for f in source.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(f))
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, file, {"format": "pt"})
    run(source, tmp_path / "same")
    assert contents(tmp_path / "same")["model.safetensors"] == contents(tmp_path / "expected")["model.safetensors"]
    assert not caplog.records


def test_skip_and_bits_for(shards, run, tmp_path):
    source, out = shards(tiny_llama()), tmp_path / "out"
    run(source, out, skip=["*.layers.0.*.k_proj"], bits_for={"*.down_proj": 4, "*.1.mlp.down_proj": 3})
    loaded, _ = load_model(str(out))
    widths = {n: m.bits for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(widths) == 13 and type(loaded.model.layers[0].self_attn.k_proj) is torch.nn.Linear
    others = {n: b for n, b in widths.items() if b != 2}
    assert others == {"model.layers.0.mlp.down_proj": 4, "model.layers.1.mlp.down_proj": 3}
    original = tiny_llama().model.layers[0].self_attn.k_proj.weight
    assert torch.equal(loaded.model.layers[0].self_attn.k_proj.weight, original.half().float())
    info = checkpoint_info(out)
    assert {n for n, layer in info["layers"].items() if layer["bits"] == 4} == {"model.layers.0.mlp.down_proj"}
    assert info["settings"]["skip"] == ["*.layers.0.*.k_proj"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"skip": ["*.no_such_layer"]}, r"'\*\.no_such_layer' matches no layer"),
        ({"bits_for": {"lm_head": 4}}, "'lm_head' matches no layer"),
        ({"bits_for": {"*.down_proj": 5}}, r"bits for \*\.down_proj must be 2, 3 or 4, got 5"),
        ({"skip": ["*"]}, "nothing is left"),
        ({"seq_len": 512}, "sequence length 512"),
        ({"samples": 1000}, "text too short"),
    ],
)
def test_arguments_that_cannot_be_leave_nothing(change, words, shards, run, tmp_path):
    source = shards(tiny_llama())
    before = set(tmp_path.iterdir())
    with pytest.raises(QuipError, match=words):
        run(source, tmp_path / "out", **change)
    assert set(tmp_path.iterdir()) == before


def test_as_a_library(tokenizer, text_file, caplog, capfd):
    """Text by name, as strings, as token ids; progress to a callable; nothing is printed."""
    strings = text_file.read_text().split(" over ")
    joined = data.Text("\n\n".join(strings), "")
    ids = data.tokenize(tokenizer, joined)
    seen = []
    results = []
    for calibration in (strings, ids, data.samples(ids, 4, 64)):
        model = tiny_llama()
        more = {"samples": 4, "seq_len": 64, "passes": 0}
        with caplog.at_level(logging.INFO, "quip"):
            reports = quip.quantize(
                model, tokenizer, bits=3, calibration=calibration, progress=lambda *args: seen.append(args), **more
            )
        results.append((reports, model.state_dict()))
    for reports, state in results[1:]:
        assert reports == results[0][0]
        assert all(torch.equal(x, results[0][1][name]) for name, x in state.items())
    assert [args[:2] for args in seen[:2]] == [(1, 2), (2, 2)]
    assert seen[0][2].keys() | seen[1][2].keys() == results[0][0].keys()
    assert "block 2 of 2" in caplog.text
    assert capfd.readouterr() == ("", "")
    by_name = quip.quantize(tiny_llama(), tokenizer, calibration=str(text_file), samples=4, seq_len=64, passes=0)
    assert len(by_name) == 14
    with pytest.raises(QuipError, match="tokenizer"):
        quip.quantize(tiny_llama(), calibration="c4")
    with pytest.raises(QuipError, match="sequence length"):
        quip.quantize(tiny_llama(), calibration=ids[:600].view(2, 300))


@pytest.mark.slow
def test_a_billion_parameters_in_less_than_three_gigabytes(tmp_path, tokenizer, text_file):
    """Few short samples, no search and no greedy passes: it takes minutes; none of these takes much memory."""
    parameters = large.write_model(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert parameters > 1e9
    command = [sys.executable, large.__file__, tmp_path / "model", tmp_path / "out", text_file]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(ended.stdout)
    print(result)
    assert result["layers"] == 11 * 7
    assert result["peak"] < 3e9
    info = checkpoint_info(tmp_path / "out")
    assert info["totals"]["quantized_weights"] + info["totals"]["other_parameters"] == parameters
