"""Finding a model: the first that is to be had, whatever this machine can reach."""

import pytest
from conftest import tiny_llama

from quip import loading
from quip.errors import QuipError
from quip.loading import first_found


def test_the_first_model_that_can_be_had(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "here")
    here = str(tmp_path / "here")
    assert first_found("facebook/opt-125m", here) == here  # no hub in tests
    asked = []
    monkeypatch.setattr(loading, "hub_answers", lambda name: asked.append(name) or True)
    assert first_found("facebook/opt-125m", here) == "facebook/opt-125m"
    assert first_found(str(tmp_path / "not here"), here) == here  # a path is no name on the hub
    assert asked == ["facebook/opt-125m"]
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert first_found("smollm2", here) == here


def test_no_model_to_be_had(tmp_path):
    with pytest.raises(QuipError, match=r"none of these models is to be had here: facebook/opt-125m, .*missing"):
        first_found("facebook/opt-125m", str(tmp_path / "missing"))
