"""Recorded experiments, on a tiny model."""

import json
import math
from functools import partial

import pytest
import torch

from quip import bench, cpu, results
from quip.layers import load_layers


@pytest.fixture
def arguments(model_folder, text_file, tmp_path):
    return ["--model", str(model_folder), "--calib", str(text_file), "--samples", "8", "--seq-len", "64"]


def test_layers(arguments, tmp_path):
    out = tmp_path / "new" / "layers.json"
    results.main(["layers", *arguments, "--out", str(out)])
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
    results.main(["defaults", *arguments, "--bits", "2", "4", "--every", "2", "--out", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert "--samples 8 --seq-len 64 --bits 2 4 --every 2" in record["about"]["command"]
    assert record["about"]["tokens"] == 8 * 64 and record["about"]["held_out_tokens"] == 2 * 64
    assert len(record["layers"]) == 7 and all(name.startswith("model.layers.1.") for name in record["layers"])
    for by_bits in record["layers"].values():
        for losses in by_bits.values():
            assert losses.keys() == results.VARIANTS.keys()
            assert losses["10 passes"][0] <= losses["default"][0] * 1.05 <= losses["0 passes"][0] * 1.1
        assert by_bits["4"]["default"][0] < by_bits["2"]["default"][0]


def test_perplexity(arguments, tmp_path, monkeypatch, text_file, capsys):
    (tmp_path / "texts" / "wikitext2").mkdir(parents=True)
    (tmp_path / "texts" / "wikitext2" / "test.txt").write_text(text_file.read_text())
    monkeypatch.setenv("QUIP_DATA", str(tmp_path / "texts"))
    out = tmp_path / "perplexity.json"
    few = ["--max-tokens", "600", "--eval-len", "128", "--out", str(out)]
    results.main(["perplexity", *arguments, *few, "--bits", "4", "--variants", "default"])
    first = json.loads(out.read_text(encoding="utf-8"))["rows"]
    results.main(["perplexity", *arguments, *few, "--bits", "4", "--variants", "default", "paper"])
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(r["variant"], r["bits"]) for r in rows] == [("16 bits", 16), ("default", 4), ("paper", 4)]
    assert all(r["tokens"] == 512 and r["ppl"] > 1 for r in rows)
    assert rows[:2] == first, "rows that are there are kept, their seconds included"
    assert rows[1]["ppl"] != rows[0]["ppl"] and rows[1]["mean_loss"] < rows[2]["mean_loss"]
    with pytest.raises(SystemExit):
        results.main(["perplexity", *arguments, *few, "--bits", "4", "--seed", "1"])
    assert "perplexity.json is about another seed" in capsys.readouterr().err
    assert json.loads(out.read_text(encoding="utf-8"))["rows"] == rows


def test_example_layers(arguments, tmp_path, monkeypatch, capsys):
    name = "model.layers.1.self_attn.o_proj"
    monkeypatch.setattr(results, "EXAMPLES", (name,))
    results.main(["example-layers", *arguments, "--out", str(tmp_path / "x.safetensors")])
    W, H = load_layers(tmp_path / "x.safetensors")[name]
    assert W.shape == H.shape == (48, 48)
    assert torch.isfinite(H).all() and name in capsys.readouterr().out


def test_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr("quip.bench.STREAMED", 2**14)
    small = partial(bench.bench_kernels, [(24, 70)])
    monkeypatch.setattr(bench, "bench_kernels", lambda **given: small(**given | {"repeats": 1}))
    threads = torch.get_num_threads()
    results.main(["kernels", "--bits", "2", "--out", str(tmp_path / "k.json")])
    torch.set_num_threads(threads)
    record = json.loads((tmp_path / "k.json").read_text(encoding="utf-8"))
    assert record["about"]["backend"] == cpu.backend() and record["about"]["threads"] == 1
    assert {(r["m"], r["n"], r["bits"]) for r in record["rows"]} == {(24, 70, 2)}
    assert {r["batch"] for r in record["rows"]} == {1, 8, 32}


def test_generate(arguments, tmp_path, monkeypatch):
    few = bench.bench_generate
    monkeypatch.setattr(
        bench, "bench_generate", lambda *what, **given: few(*what, **given | {"tokens": 2, "repeats": 1})
    )
    threads = torch.get_num_threads()
    results.main(["generate", *arguments, "--bits", "2", "--out", str(tmp_path / "g.json")])
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


def test_bad_input_is_one_line(arguments, tmp_path, capsys):
    for wrong, message in (
        (["example-layers", *arguments, "--out", str(tmp_path / "x")], "has no layer model.layers.10.self_attn.q_proj"),
        (["layers", *arguments[:-1], "9999"], "text too short"),
        (["perplexity", *arguments, "--variants", "best"], "unknown variant best: there are default"),
    ):
        with pytest.raises(SystemExit) as stop:
            results.main(wrong)
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.err.splitlines()[-1].startswith("quip: error:") and message in captured.err
    assert not (tmp_path / "x").exists()
