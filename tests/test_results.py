"""Recorded experiments, on a tiny model."""

import argparse
import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from quip import bench, cpu
from quip.layers import load_layers
from quip.loading import load_model
from quip.methods import choose
from quip.results import runs
from quip.results import whole as whole_models
from quip.results.command import main
from quip.results.defaults import VARIANTS
from quip.results.rows import quantize_rows, row_sizes


@pytest.fixture
def arguments(model_folder, text_file, tmp_path):
    return ["--model", str(model_folder), "--calib", str(text_file), "--samples", "8", "--seq-len", "64"]


def test_layers(arguments, tmp_path):
    out = tmp_path / "new" / "layers.json"
    main(["layers", *arguments, "--out", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    about, inputs, layers = record["about"], record["inputs"], record["layers"]
    assert about["tokens"] == 8 * 64 and about["calibration"] == "file words.txt" and about["seconds"] >= 0
    assert str(tmp_path) not in json.dumps(about)
    assert about["command"].startswith("python -m quip.results layers --model model --calib words.txt --samples 8 ")
    assert len(layers) == 14 and len(inputs) == 8  # q, k and v share an input, gate and up another
    assert {name for x in inputs.values() for name in x["layers"]} == set(layers)
    for x in inputs.values():
        assert 1 <= x["effective_rank"] <= x["n"] and x["ranks"][-1] == x["n"]
        assert x["eigenvalues"] == sorted(x["eigenvalues"], reverse=True)
        t = x["traces"]
        assert t["least"] <= t["sorted"] and t["least"] <= t["own"] <= t["lemma_2"][0]
        assert t["rotated"] <= t["lemma_2"][1] and 0 < t["formula"] <= 1
    for x in layers.values():
        t = inputs[x["input"]]["traces"]
        assert x["losses"]["ldlq"] == pytest.approx(t["sorted"], rel=0.25)
        assert x["losses"]["nearest"] == pytest.approx(1, abs=0.4)
        assert all(math.isfinite(v) for v in x["losses"].values())


def test_defaults(arguments, tmp_path):
    out = tmp_path / "defaults.json"
    main(["defaults", *arguments, "--bits", "2", "4", "--every", "2", "--out", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert "--samples 8 --seq-len 64 --bits 2 4 --every 2" in record["about"]["command"]
    assert record["about"]["tokens"] == 8 * 64 and record["about"]["held_out_tokens"] == 2 * 64
    assert len(record["layers"]) == 7 and all(name.startswith("model.layers.1.") for name in record["layers"])
    for by_bits in record["layers"].values():
        for losses in by_bits.values():
            assert losses.keys() == VARIANTS.keys()
            assert losses["10 passes"][0] <= losses["default"][0] * 1.05 <= losses["0 passes"][0] * 1.1
        assert by_bits["4"]["default"][0] < by_bits["2"]["default"][0]


@pytest.fixture
def whole(arguments, tmp_path, monkeypatch, text_file):
    """Arguments of an experiment on the tiny model, with its evaluation text and its own folder of records."""
    (tmp_path / "texts" / "wikitext2").mkdir(parents=True)
    (tmp_path / "texts" / "wikitext2" / "test.txt").write_text(text_file.read_text())
    monkeypatch.setenv("QUIP_DATA", str(tmp_path / "texts"))
    few = ["--eval", "wikitext2", str(text_file), "--max-tokens", "600", "--eval-len", "128"]
    (tmp_path / "records").mkdir()
    return lambda name, *more: [name, *arguments, *few, "--out", str(tmp_path / "records" / f"{name}.json"), *more]


def rows_of(command):
    return json.loads(Path(command[command.index("--out") + 1]).read_text(encoding="utf-8"))["rows"]


def test_whole_models(whole, capsys):
    command = whole("methods", "--bits", "4")
    main([*command, "--variants", "default"])
    first = rows_of(command)
    main([*command, "--variants", "default", "published", "near"])
    rows = rows_of(command)
    assert [(r["variant"], r["bits"]) for r in rows] == [("16 bits", 16), ("default", 4), ("near", 4), ("published", 4)]
    assert rows[:2] == first, "rows that are there are kept, their seconds included"
    sources = ["wikitext2 (test.txt)", "file words.txt"]
    for row in rows:
        assert row["evaluation"] == {source: 512 for source in sources} and list(row["perplexity"]) == sources
        assert all(1 < x < 1e6 for x in row["perplexity"].values())
        assert row["model"] == "model" and row["command"].startswith("python -m quip.results methods --model model ")
    _, default, near, published = rows
    assert default["perplexity"] != rows[0]["perplexity"] and default["mean_loss"] < published["mean_loss"]
    assert near["choices"]["method"] == "near" and near["choices"]["incoherence"] == "none"
    assert published["choices"]["rho"] == 2.4 and published["bits_per_weight"] > default["bits_per_weight"] > 4
    assert default["calibration"] == {"text": "file words.txt", "samples": 8, "seq_len": 64}
    assert "published" in capsys.readouterr().out


def test_a_row_serves_every_experiment_that_asks_for_it(whole):
    methods = whole("methods", "--bits", "2", "--variants", "default")
    main(methods)
    passes = whole("passes", "--bits", "2", "--variants", "0 passes", "3 passes")
    main(passes)
    default, (_, none, three) = rows_of(methods)[1], rows_of(passes)
    assert three == {**default, "variant": "3 passes"}, "the default is three passes: measured once"
    assert none["mean_loss"] > three["mean_loss"]
    main([*whole("methods", "--bits", "2", "--variants", "default", "--seed", "1")])
    seeds = [row["seed"] for row in rows_of(methods) if row["bits"] == 2]
    assert seeds == [0, 1], "another seed is another row"


def test_calibration_and_seeds(whole):
    sizes = whole("calibration", "--bits", "3", "--variants", "2k tokens", "its own text")
    main(sizes)
    _, own, small = rows_of(sizes)
    assert small["calibration"]["samples"] * 64 == 2048 and own["calibration"]["text"] == "self"
    seeds = whole("seeds", "--bits", "2", "--variants", "seed 0", "seed 4")
    main(seeds)
    _, first, last = rows_of(seeds)
    assert (first["seed"], last["seed"]) == (0, 4) and first["mean_loss"] != last["mean_loss"]


@pytest.mark.parametrize("bos", [None, 7])
def test_text_of_its_own(model_folder, bos):
    model, _ = load_model(str(model_folder))
    model.config.bos_token_id = bos
    texts = whole_models.written_by(model, 3, 16, seed=0, batch=2)
    assert texts.shape == (3, 16) and (bos is None or (texts[:, 0] == bos).all())
    assert len({tuple(text.tolist()) for text in texts}) == 3
    assert torch.equal(texts, whole_models.written_by(model, 3, 16, seed=0, batch=2))
    assert not torch.equal(texts, whole_models.written_by(model, 3, 16, seed=1, batch=2))


def test_runs_are_complete():
    args = argparse.Namespace(calib="c4", samples=64, seq_len=1024, seed=0, bits=[2, 3])
    for name, runs_of in runs.EXPERIMENTS.items():
        listed = runs_of(args)
        assert len({(run.variant, run.bits) for run in listed}) == len(listed) > 0, name
        for run in listed:
            choose(**run.changes)
    long = argparse.Namespace(calib="c4", samples=64, seq_len=4096, seed=0, bits=[2])
    assert [run.samples for run in runs.calibration(long)][1:] == [1, 2, 4, 8, 16, 32, 64]
    steps = {run.variant: choose(**run.changes) for run in runs.incoherence(args)}
    assert steps["rescale + transform + range"] == choose("paper")
    assert steps["none"]["incoherence"] == "none" and "none, no permutation" not in steps
    assert not steps["transform, no permutation"]["permute"] and steps["transform"]["permute"]


def test_example_layers(arguments, tmp_path, monkeypatch, capsys):
    name = "model.layers.1.self_attn.o_proj"
    monkeypatch.setattr("quip.results.hessians.EXAMPLES", (name,))
    main(["example-layers", *arguments, "--out", str(tmp_path / "x.safetensors")])
    W, H = load_layers(tmp_path / "x.safetensors")[name]
    assert W.shape == H.shape == (48, 48)
    assert torch.isfinite(H).all() and name in capsys.readouterr().out


def test_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr("quip.bench.STREAMED", 2**14)
    small = partial(bench.bench_kernels, [(24, 70)])
    monkeypatch.setattr(bench, "bench_kernels", lambda **given: small(**given | {"repeats": 1}))
    threads = torch.get_num_threads()
    main(["kernels", "--bits", "2", "--out", str(tmp_path / "k.json")])
    torch.set_num_threads(threads)
    record = json.loads((tmp_path / "k.json").read_text(encoding="utf-8"))
    assert record["about"]["backend"] == cpu.backend() and record["about"]["threads"] == 1
    assert {(r["m"], r["n"], r["bits"]) for r in record["rows"]} == {(24, 70, 2)}
    assert {r["batch"] for r in record["rows"]} == {1, 8, 32}


def test_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr("quip.bench.STREAMED", 2**14)
    monkeypatch.setattr("quip.results.speed.PROMPTS", ((24, 70),))
    threads = torch.get_num_threads()
    main(["prompts", "--bits", "3", "--out", str(tmp_path / "p.json")])
    torch.set_num_threads(threads)
    record = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert record["about"]["threads"] == 1
    assert [(r["m"], r["n"], r["bits"], r["batch"], r["stage"]) for r in record["rows"]] == [
        (24, 70, 3, batch, "layer") for batch in (32, 128, 512, 2048)
    ]
    assert all(r["ratio_bf16"] > 0 and r["ratio_fp32"] > 0 for r in record["rows"])


def test_generate(arguments, tmp_path, monkeypatch):
    few = bench.bench_generate
    monkeypatch.setattr(
        bench, "bench_generate", lambda *what, **given: few(*what, **given | {"tokens": 2, "repeats": 1})
    )
    threads = torch.get_num_threads()
    main(["generate", *arguments, "--bits", "2", "--out", str(tmp_path / "g.json")])
    torch.set_num_threads(threads)
    record = json.loads((tmp_path / "g.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(record)
    names = [(r["model"], r["dtype"]) for r in record["rows"] if r["threads"] == 1]
    assert names == [
        ("model, bfloat16", "bfloat16"),
        ("2 bits, bfloat16", "bfloat16"),
        ("2 bits, float32", "float32"),
    ]
    assert all(r["tokens_per_s"] > 0 for r in record["rows"])


def test_cost(arguments, tmp_path, capsys):
    out = tmp_path / "cost.json"
    main(["cost", *arguments, "--bits", "3", "--out", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    (row,) = record["rows"]
    assert str(tmp_path) not in json.dumps(record)
    assert row["model"] == "model" and row["tokens"] == 8 * 64 and row["seconds"] > 0
    assert 0.1 < row["peak_gb"] < 8 and 3 < row["bits_per_weight"] < 5 and row["file_bytes"] > 0
    with pytest.raises(SystemExit):
        main(["cost", *arguments, "--samples", "99999", "--bits", "3", "--out", str(out)])
    assert "quip quantize failed: text too short" in capsys.readouterr().err
    assert json.loads(out.read_text(encoding="utf-8")) == record


def test_zeroshot(whole, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "texts" / "zeroshot").mkdir()
    rows = [{"goal": f"open {i}", "sol1": "a door", "sol2": "no door", "label": i % 2} for i in range(6)]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "texts" / "zeroshot" / "piqa_valid.jsonl").write_text(text, encoding="utf-8")
    command = whole("zeroshot", "--bits", "2", "--variants", "default", "--tasks", "piqa", "--limit", "4")
    main(command)
    plain, quantized = rows_of(command)
    for row in (plain, quantized):
        assert row["tasks"] == {"sources": ["zeroshot/piqa_valid.jsonl"], "limit": 4} and row["perplexity"] == {}
        assert {x["metric"] for x in row["accuracy"]} == {"acc", "acc_norm"}
        assert all(x["documents"] == 4 and 0 <= x["value"] <= 1 for x in row["accuracy"])
    assert quantized["mean_loss"] > 0


def test_bad_input_is_one_line(arguments, tmp_path, capsys):
    for wrong, message in (
        (["example-layers", *arguments, "--out", str(tmp_path / "x")], "has no layer model.layers.10.self_attn.q_proj"),
        (["layers", *arguments[:-1], "9999"], "text too short"),
        (["methods", *arguments, "--variants", "near", "best"], "unknown variant best: there are near, optq"),
        (["methods", *arguments, "--dtype", "int8"], "--dtype must be a floating-point type such as bfloat16, got"),
        (["methods", *arguments, "--dtype", "best"], "--dtype must be a floating-point type such as bfloat16, got"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.err.splitlines()[-1].startswith("quip: error:") and message in captured.err
    assert not (tmp_path / "x").exists()


def test_scales_of_rows(model_folder):
    model, _ = load_model(str(model_folder))
    exact = copy.deepcopy(model)
    with torch.no_grad():  # rows of very different sizes: one scale for all would round the small ones to nothing
        for name, p in model.named_parameters():
            if "proj" in name:
                p *= torch.logspace(-2, 0, len(p))[:, None]
    before = copy.deepcopy(model)
    samples = torch.randint(257, (4, 32), generator=torch.Generator().manual_seed(0))
    reports = quantize_rows(model, samples, 3, method="near", incoherence="none")
    weights = sum(W.numel() for name, W in before.named_parameters() if "proj" in name)
    rows = sum(len(W) for name, W in before.named_parameters() if "proj" in name)
    assert len(reports) == 14 and row_sizes(reports, 3) == {"bits_per_weight": 3 + 32 * rows / weights}
    for name, p in model.named_parameters():
        W = before.get_parameter(name)
        if "proj" not in name:
            assert torch.equal(p, W)
            continue
        assert all(len(row.unique()) <= 8 for row in p)
        error = (p - W).norm(dim=1) / W.norm(dim=1)
        assert error.min() > 0 and error.max() < 0.35, "every row has a grid of its own size"
    plain = quantize_rows(exact, samples, 3, method="ldlq", incoherence="none")
    assert plain.keys() == reports.keys()
