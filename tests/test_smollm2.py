"""The real model (slow): SmolLM2-135M-Instruct through quantize, save, load, and perplexity."""

import pytest
import torch

from quip import data, load_model, models, save_model
from quip.evaluate import perplexity
from quip.info import checkpoint_info

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts():
    _, tokenizer = load_model("smollm2")
    calibration, evaluation = (
        data.tokenize(tokenizer, data.load_text("python-docs", purpose)) for purpose in data.PURPOSES
    )
    return data.samples(calibration, 8, 512), evaluation[:4096]


@pytest.fixture(scope="module")
def original(texts):
    model, _ = load_model("smollm2")
    return perplexity(model, texts[1], 2048, progress=False)["ppl"]


@pytest.mark.parametrize(("bits", "worst"), [(4, 1.4), (3, 2.2), (2, 10.0)])
def test_smollm2_survives_the_whole_way(bits, worst, texts, original, tmp_path):
    samples, evaluation = texts
    model, tokenizer = load_model("smollm2")
    reports = models.quantize_model(model, samples, bits, progress=False)
    save_model(model, tokenizer, tmp_path / "out", reports, {"bits": bits})
    with torch.no_grad():
        expected = model(evaluation[None, :256]).logits
        loaded, _ = load_model(str(tmp_path / "out"))
        got = loaded(evaluation[None, :256]).logits
    assert (got - expected).norm() / expected.norm() < 1e-3
    assert len(reports) == 210
    info = checkpoint_info(tmp_path / "out")
    assert info["totals"]["quantized_weights"] == 106_168_320
    assert bits < info["totals"]["bits_per_weight"] < bits + 0.002
    assert original < perplexity(loaded, evaluation, 2048, progress=False)["ppl"] < worst * original
