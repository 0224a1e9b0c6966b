"""Perplexity: the formula, its landmarks, its windows, and what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.errors import QuipError
from quip.evaluate import perplexity, token_nll

VOCAB = 11


class Model(torch.nn.Module):
    """A model whose logits `(1, tokens, vocabulary)` are any function of its token ids."""

    device = torch.device("cpu")

    def __init__(self, logits, positions=None):
        super().__init__()
        self.logits, self.config = logits, SimpleNamespace(max_position_embeddings=positions)

    def forward(self, ids, use_cache):
        return SimpleNamespace(logits=self.logits(ids))


def uniform(ids):
    return torch.zeros(*ids.shape, VOCAB)


def counts_up(ids):
    """Certain that every token is followed by the next higher one, and after the highest by 0."""
    return 1000.0 * torch.nn.functional.one_hot((ids + 1) % VOCAB, VOCAB)


def random_ids(tokens, seed=0):
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


def measure(model, ids, seq_len):
    return perplexity(model, ids, seq_len, progress=False)


@torch.no_grad()
def naive_perplexity(model, ids, seq_len):
    """The formula word for word: each token from a pass over nothing but the tokens before it in its window."""
    nll = []
    for start in range(0, len(ids) - seq_len + 1, seq_len):
        window = ids[start : start + seq_len]
        for t in range(1, seq_len):
            logits = model(window[None, :t], use_cache=False).logits[0, -1]
            nll.append(-logits.double().log_softmax(-1)[window[t]].item())
    return math.exp(sum(nll) / len(nll))


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 9), st.integers(0, 20), st.integers(0, 99))
def test_equals_the_naive_formula(seq_len, extra, seed):
    model = tiny_llama(vocab_size=VOCAB, eos_token_id=None, initializer_range=0.5)
    ids = random_ids(seq_len + extra, seed)
    assert measure(model, ids, seq_len)["ppl"] == pytest.approx(naive_perplexity(model, ids, seq_len), rel=1e-4)


def test_uniform_model_has_the_size_of_its_vocabulary():
    assert measure(Model(uniform), random_ids(100), 7)["ppl"] == pytest.approx(VOCAB, rel=1e-6)


def test_model_that_foresees_every_token_has_perplexity_one():
    assert measure(Model(counts_up), torch.arange(100) % VOCAB, 7)["ppl"] == 1


def test_incomplete_last_window_is_dropped():
    ids = random_ids(23)
    result = measure(tiny_llama(), ids, 8)
    assert (result["tokens"], result["seq_len"]) == (16, 8)
    assert measure(tiny_llama(), ids[:16], 8)["nll"] == result["nll"]


def test_windows_know_nothing_of_each_other():
    ids = random_ids(24)
    swapped = ids.view(3, 8).flip(0).flatten()
    assert measure(tiny_llama(), swapped, 8)["nll"] == pytest.approx(measure(tiny_llama(), ids, 8)["nll"], rel=1e-6)


def test_a_text_of_one_window_of_two_tokens_is_enough():
    assert measure(Model(uniform), random_ids(2), 2)["tokens"] == 2


def test_a_window_may_fill_all_positions():
    assert measure(Model(uniform, positions=8), random_ids(8), 8)["tokens"] == 8


def test_chunks_do_not_change_the_sum():
    logits, targets = torch.randn(10, VOCAB), random_ids(10)
    assert token_nll(logits, targets, chunk=3) == pytest.approx(token_nll(logits, targets), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_summed_in_float32(dtype):
    logits, targets = 5 * torch.randn(500, VOCAB).to(dtype), random_ids(500)
    exact = -logits.double().log_softmax(-1).gather(1, targets[:, None]).sum().item()
    assert token_nll(logits, targets) == pytest.approx(exact, rel=1e-6)


def test_a_hopeless_model_has_infinite_perplexity():
    result = measure(Model(counts_up), torch.zeros(10, dtype=torch.long), 5)
    assert (result["nll"], result["ppl"]) == (1000, math.inf)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_too_short_a_text_is_an_error(tokens):
    with pytest.raises(QuipError, match=f"text too short: it has {tokens} tokens, one window of 8 is needed"):
        measure(Model(uniform), random_ids(tokens), 8)


@pytest.mark.parametrize("seq_len", [-2, 0, 1, 65])
def test_a_window_length_out_of_range_is_an_error(seq_len):
    with pytest.raises(QuipError, match=f"sequence length {seq_len} is out of range: this model takes 2 to 64 tokens"):
        measure(Model(uniform, positions=64), random_ids(100), seq_len)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    with pytest.raises(QuipError, match="NaN or infinite"):
        measure(Model(lambda ids: uniform(ids) + value), random_ids(10), 5)
