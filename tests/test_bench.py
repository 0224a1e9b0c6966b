"""The benchmark reports what it measured."""

import json

import pytest

from quip.bench import bench_quantize
from quip.cli import main, parse_size
from quip.errors import QuipError


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


@pytest.mark.parametrize("text", ["16", "16x", "x16", "0x16", "16x-1", "axb"])
def test_bad_sizes(text):
    with pytest.raises(QuipError, match="a size is two positive integers"):
        parse_size(text)


@pytest.mark.slow
def test_rounding_is_bound_by_matrix_products():
    # the aim is 1.5; twice that leaves room for whatever else the machine does
    rows = bench_quantize([(4096, 4096)], repeats=3)
    assert all(r["ratio"] < 3 for r in rows)
