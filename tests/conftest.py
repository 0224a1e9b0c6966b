"""Small models and texts that tests share: random weights, no network."""

import logging
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

# A browser for the tests of pages and of interactive parts, which are skipped without one.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("QUIP_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def random_codes(m: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    """Codes `(m, n)` uint8, uniform."""
    return torch.randint(2**bits, (m, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """Two blocks, 48 wide (no power of two), grouped-query attention, tied embeddings."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 257,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 256,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def tiny_opt(seed: int = 0) -> OPTForCausalLM:
    """Two blocks with biases, learned positions and ReLU."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=257,
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.1,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    model = OPTForCausalLM(config).eval()
    for name, p in model.named_parameters():  # Transformers starts biases at zero, which would hide a lost one
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture(autouse=True)
def own_handlers(monkeypatch):
    """The command line logs to a stderr that ends with the test."""
    monkeypatch.setattr(logging.getLogger("quip"), "handlers", [])


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def token_ids():
    return torch.randint(0, 256, (6, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text_file(tmp_path):
    """Some words, 6000 bytes of them."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "sleeps", "under", "oak", "trees"]
    order = torch.randint(0, len(words), (1400,), generator=torch.Generator().manual_seed(2)).tolist()
    path = tmp_path / "words.txt"
    path.write_text(" ".join(words[i] for i in order)[:6000])
    return path


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    """A tiny Llama saved as an ordinary model."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
