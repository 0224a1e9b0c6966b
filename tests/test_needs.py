"""What whole models need: the arithmetic, against models that exist and runs that were measured."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig

from quip import needs

RECORD = json.loads((Path(__file__).parent.parent / "book/results/needs.json").read_text())
CONFIGS = {
    "TinyLlama 1.1B": (2048, 5632, 22, 32, 4),
    "Llama 2 7B": (4096, 11008, 32, 32, 32),
    "Llama 2 70B": (8192, 28672, 80, 64, 8),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_models(name):
    hidden, intermediate, blocks, heads, keys = CONFIGS[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=keys,
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    shapes = needs.MODELS[name]
    assert shapes.block == sum(p.numel() for p in matrices)
    assert sorted(n for n, rows in shapes.inputs for _ in rows) == sorted(p.shape[1] for p in matrices)
    assert shapes.outside == 2 * model.lm_head.weight.numel() and shapes.blocks == blocks


def test_the_record_is_what_the_parts_give():
    for row in RECORD["rows"]:
        for key, value in needs.needs(needs.MODELS[row["model"]], RECORD["parts"], row["bits"]).items():
            assert value == pytest.approx(row[key], rel=2e-3), (row["model"], key)


def test_needs_grow_as_they_should():
    shapes, parts = needs.MODELS["Llama 2 7B"], RECORD["parts"]
    few, many = (needs.needs(shapes, parts, samples=samples) for samples in (8, 64))
    assert many["memory"] - few["memory"] == many["file"] - few["file"] == 4 * 56 * 1024 * 4096
    assert few["offloaded"] == many["offloaded"] and few["seconds"] < many["seconds"]
    assert needs.needs(shapes, parts, bits=4)["disk"] > few["disk"]
    # blocks alone, in 2 bits, twice; embedding and head in 16
    assert few["disk"] == pytest.approx(2 * 32 * shapes.block / 4 + 2 * 2 * 32000 * 4096)


def test_parts_can_be_measured():
    parts = needs.measure_parts(n=256, tokens=512)
    assert parts.keys() == RECORD["parts"].keys()
    assert parts["base"] > 1e8 and parts["moment"] > 0 and parts["forward"] > 0


def test_peak_sees_what_a_function_adds():
    def function():
        x = torch.ones(25_000_000)  # 100 MB
        return (x + 1).sum()

    assert 1.9e8 < needs.peak(function) < 2.6e8
