"""Where text comes from, and that it is cut as asked."""

import logging

import pytest
import torch

from quip import data
from quip.errors import QuipError


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv("QUIP_DATA", raising=False)


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    text = data.load_text(str(tmp_path / "a.txt"))
    assert text.text == "one\ntwo" and "a.txt" in text.source


def test_rows_of_a_jsonl_file_are_joined(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n"two"\n', encoding="utf-8")
    assert data.load_text(str(tmp_path / "a.jsonl")).text == "one\n\ntwo"


@pytest.mark.parametrize("line", ['{"txt": 1}', "{", "3"])
def test_a_bad_row_is_named(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'"one"\n{line}\n')
    with pytest.raises(QuipError, match=r"a\.jsonl, line 2"):
        data.load_text(str(tmp_path / "a.jsonl"))


def test_unknown_names_and_unreadable_files_are_errors(tmp_path):
    with pytest.raises(QuipError, match="unknown data 'wikitext3'"):
        data.load_text("wikitext3")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QuipError, match=r"a\.txt"):
        data.load_text(str(tmp_path / "a.txt"))
    with pytest.raises(QuipError, match="training"):
        data.load_text("c4", "training")


def test_the_folder_in_quip_data_comes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/test.jsonl").write_text('{"text": "evaluate me"}\n')
    (tmp_path / "wikitext2/train-part.txt").write_text("calibrate me")
    monkeypatch.setenv("QUIP_DATA", str(tmp_path))
    assert data.load_text("wikitext2", "evaluation").text == "evaluate me"
    assert data.load_text("wikitext2", "calibration").text == "calibrate me"
    monkeypatch.setenv("QUIP_DATA", str(tmp_path / "missing"))
    with pytest.raises(QuipError, match="QUIP_DATA"):
        data.load_text("wikitext2")


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_without_folder_and_hub_python_docs_stand_in_and_say_so(name, caplog):
    with caplog.at_level(logging.WARNING, "quip"):
        text = data.load_text(name)
    assert text.source.endswith(f"in place of {name}") and text.source.startswith("python-docs")
    assert name in caplog.text
    assert text.text == data.load_text("python-docs").text


def test_python_docs_never_evaluate_on_what_they_calibrate():
    calibration, evaluation = (data.load_text("python-docs", p).text for p in data.PURPOSES)
    assert len(calibration) > 200_000 and len(evaluation) > 50_000
    assert not set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))


def test_samples_are_distinct_windows_chosen_by_seed():
    ids = torch.arange(1000)
    a, b, c = (data.samples(ids, 5, 64, seed) for seed in (0, 0, 1))
    assert a.shape == (5, 64) and torch.equal(a, b) and not torch.equal(a, c)
    assert (a[:, 0] % 64 == 0).all() and len(a[:, 0].unique()) == 5
    assert torch.equal(a - a[:, :1], torch.arange(64).expand(5, 64))
    assert data.samples(ids, 15, 64).shape == (15, 64)


def test_too_little_text_is_an_error_with_both_numbers():
    with pytest.raises(QuipError, match="text too short: words has 1000 tokens, 16 samples of 64 need 1024"):
        data.samples(torch.arange(1000), 16, 64, source="words")
    with pytest.raises(QuipError, match="at least 1"):
        data.samples(torch.arange(1000), 0, 64)
