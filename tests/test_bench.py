"""The benchmark reports what it measured."""

import json
from itertools import product

import pytest

from quip import bench_cuda, cpu, cuda
from quip.bench import bench_kernels, bench_quantize
from quip.cli import main, parse_size
from quip.errors import QuipError
from quip.kernels import packed_width
from quip.results import command


def test_rows():
    rows = bench_quantize([(8, 24), (24, 8)], bits=3, repeats=1)
    assert [(r["m"], r["n"], r["method"]) for r in rows] == [
        (8, 24, "ldlq"),
        (8, 24, "greedy pass"),
        (24, 8, "ldlq"),
        (24, 8, "greedy pass"),
    ]
    for r in rows:
        assert r["bits"] == 3 and r["seconds"] > 0 and r["product_seconds"] > 0
        assert r["ratio"] == pytest.approx(r["seconds"] / r["product_seconds"])


def test_command_line(tmp_path, capsys):
    main(["bench", "quantize", "--sizes", "16x16", "8X32", "--repeats", "1", "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [(r["m"], r["n"]) for r in rows] == [(16, 16), (16, 16), (8, 32), (8, 32)]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_kernel_rows(monkeypatch):
    monkeypatch.setattr("quip.bench.STREAMED", 2**14)
    rows = list(bench_kernels([(24, 70), (96, 64)], widths=(2, 3), batches=(1, 3), repeats=1))
    stages = ["multiply", "layer"] if cpu.library() else ["layer"]
    assert [(r["m"], r["n"], r["bits"], r["batch"], r["stage"]) for r in rows] == [
        (m, n, bits, batch, stage)
        for (m, n), bits, batch, stage in product([(24, 70), (96, 64)], (2, 3), (1, 3), stages)
    ]
    for r in rows:
        assert r["error"] < 2e-4
        assert min(r["ms"], r["bandwidth"], r["ratio_fp32"], r["ratio_bf16"]) > 0
        assert r["gb_per_s"] == pytest.approx(r["m"] * packed_width(r["n"], r["bits"]) / r["ms"] / 1e6)


def test_a_size_that_does_not_fit_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr("quip.bench.STREAMED", 2**14)
    monkeypatch.setattr("quip.bench.free_memory", lambda: 16 * 64 * 64)
    rows = list(bench_kernels([(64, 65), (64, 64)], widths=(2,), batches=(1,), repeats=1))
    assert {(r["m"], r["n"]) for r in rows} == {(64, 64)}
    assert capsys.readouterr().err == "64x65 is left out: its dense copies do not fit into memory\n"


def test_generation(model_folder, tmp_path, capsys):
    checkpoint = tmp_path / "q"
    text = tmp_path / "text.txt"
    text.write_text("a few words and a few more " * 200)
    some = ["--calib", str(text), "--samples", "4", "--seq-len", "32"]
    main(["quantize", str(model_folder), str(checkpoint), "--bits", "2", *some])
    models = [str(checkpoint), str(model_folder)]
    main(["bench", "generate", *models, "--tokens", "3", "--repeats", "1", "--json", str(tmp_path / "g.json")])
    rows = json.loads((tmp_path / "g.json").read_text())
    assert [(r["model"], r["dtype"]) for r in rows] == [(name, "bfloat16") for name in models]
    for r in rows:
        assert r["ms_per_token"] == pytest.approx(1000 / r["tokens_per_s"])
        assert r["of_it_linear"] + r["of_it_head"] + r["of_it_rest"] == pytest.approx(1)
        assert min(r["of_it_linear"], r["of_it_head"], r["of_it_rest"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "bench generate needs the models to compare"),
        (["generate", "x", "--dtype", "int8"], "--dtype must be a floating-point type"),
        (["kernels", "--bits", "5"], "--bits must be 2, 3 or 4"),
        (["kernels", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", ["16", "16x", "x16", "0x16", "16x-1", "axb"])
def test_bad_sizes(text):
    with pytest.raises(QuipError, match="a size is two positive integers"):
        parse_size(text)


@pytest.mark.slow
def test_rounding_is_bound_by_matrix_products():
    # the aim is 1.5; twice that leaves room for whatever else the machine does
    rows = bench_quantize([(4096, 4096)], repeats=3)
    assert all(r["ratio"] < 3 for r in rows)


@pytest.mark.skipif(cuda.available(), reason="there is a GPU")
def test_benchmarks_of_a_gpu_say_that_there_is_none(capsys):
    for run in (bench_cuda.bench_kernels, bench_cuda.bench_decode):
        with pytest.raises(QuipError, match="no CUDA kernels here: "):
            next(run())
    with pytest.raises(SystemExit) as stopped:
        command.main(["cuda"])
    assert stopped.value.code == 2 and "no CUDA kernels here" in capsys.readouterr().err
