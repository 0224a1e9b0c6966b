"""The README and its neighbours: code runs, tables are those of the records, files and targets that they name exist."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

import quip

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "book/using.md")}
README = PAGES["README.md"]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def readme_tool():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = examples(README)
    assert len(example.strip().splitlines()) <= 10
    monkeypatch.chdir(ROOT)
    assert '"OUT"' in example
    names = {}
    exec(example.replace('"OUT"', repr(str(tmp_path / "OUT"))), names)
    assert capsys.readouterr().out.count("Return a list of")
    assert sum(isinstance(layer, quip.QuantizedLinear) for layer in names["model"].modules()) == len(names["reports"])


def test_the_example_of_one_matrix_runs():
    (example,) = (code for code in examples(PAGES["book/using.md"]) if "quantize_matrix" in code)
    names = {}
    exec(example, names)
    assert names["q"].codes.shape == names["W"].shape
    assert 0 < names["q"].report["relative_proxy_loss"] < 0.5


def test_tables_and_picture_are_those_of_the_records():
    for path, text in readme_tool().wanted().items():
        assert path.read_text(encoding="utf-8") == text, "run `python tools/readme.py`"


def test_a_changed_figure_would_be_noticed():
    tool = readme_tool()
    changed = re.sub(r"(\| 2 bits \|.*\| )(\d+\.\d)( \|)", r"\g<1>12.3\3", README)
    assert changed != README
    rows = tool.chosen()
    parts = {"measured: models": tool.model_table(rows), "measured: speed": tool.speed_table()}
    assert tool.filled(changed, parts) == README


def test_a_better_record_takes_the_place_of_another(tmp_path, monkeypatch):
    tool = readme_tool()
    old = tool.chosen()
    for path in tool.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    row = {"model": "smollm2", "parameters": 10**6, "evaluation": {"wikitext2 (test.jsonl)": 10**9}, "command": "x"}
    rows = [row | {"variant": "16 bits", "bits": 16, "perplexity": {"wikitext2 (test.jsonl)": 20.0}}]
    row |= {"calibration": {"text": "c4", "samples": 64, "seq_len": 1024}, "file_bytes": 1e6, "bits_per_weight": 2.5}
    for variant, factor in {"default": 1, "ldlq": 10}.items():
        for bits in tool.WIDTHS:
            rows.append(
                row | {"variant": variant, "bits": bits, "perplexity": {"wikitext2 (test.jsonl)": factor * 30.0}}
            )
    (tmp_path / "methods.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    new = tool.chosen()
    assert new.keys() == old.keys()
    assert {row["ppl"] for row in new.values()} == {20.0, 30.0, 300.0}
    assert "| 2 bits | 2.500 | 1.0 MB | 30.0 |" in tool.model_table(new)
    assert "65,536 tokens of C4" in tool.model_table(new)
    assert "300.0" in tool.picture(new)


@pytest.mark.parametrize("name", PAGES)
def test_every_make_target_exists(name):
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", PAGES[name], re.MULTILINE))
    assert targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    linked = {target for target in re.findall(r"\]\(([^)#]+)\)", PAGES[name]) if "://" not in target}
    named = set(re.findall(r"`((?:book|quip|tests|tools)/[\w./]+)`", PAGES[name]))
    assert linked | named
    assert not [path for path in sorted(linked | named) if not (ROOT / path).exists()]


def test_citation_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    page = (ROOT / "book" / "citing.md").read_text(encoding="utf-8")
    assert citation["version"] == quip.__version__
    assert citation["repository-code"] == CONFIG["repository"]["url"]
    assert f"{{{quip.__version__}}}" in page
    assert f"{{{CONFIG['repository']['url']}}}" in page
    assert f"{{{citation['title']}}}" in " ".join(page.split())
