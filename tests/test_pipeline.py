"""From a model's files to a checkpoint: in the memory of a block, killed and resumed, and always to the same bytes."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_opt

from quip import data, load_model, models, quantize_model, save_model
from quip.errors import QuipError
from quip.info import checkpoint_info
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
    steps = [3, 4, 5, 6, 12, 20] if where == "shards" else [1, 4, 7, 11, 13, 18]
    results = killed(tmp_path, source, text_file, steps)
    print(results)
    for result in results:
        assert result["signals"] == [signal.SIGKILL, 0], result
        assert contents(tmp_path / f"killed-{result['step']}") == contents(tmp_path / "whole"), result
        assert not (tmp_path / f"killed-{result['step']}.part").exists()
