"""Families of models: what is found in each to quantize, and that a checkpoint gives the model that was quantized."""

import copy
import logging

import pytest
import torch
import transformers as T

from quip import families, quantize_model, save_model
from quip.errors import QuipError
from quip.kernels import QuantizedLinear

TOKENS = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
LLAMA = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GEMMA = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
FALCON = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
OPT = {
    **TOKENS,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "init_std": 0.1,
}
LLAMA_LAYERS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
FUSED_LAYERS = "query_key_value dense dense_h_to_4h dense_4h_to_h"

# family -> its configuration, what its blocks are called, and their layers, by last name
FAMILIES = {
    "opt": (T.OPTConfig(**OPT), "model.decoder.layers", "k_proj v_proj q_proj out_proj fc1 fc2"),
    "opt-350m": (
        T.OPTConfig(**{**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        "model.decoder.layers",
        "k_proj v_proj q_proj out_proj fc1 fc2",
    ),
    "llama": (T.LlamaConfig(**LLAMA, tie_word_embeddings=True), "model.layers", LLAMA_LAYERS),
    "llama, untied": (T.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True), "model.layers", LLAMA_LAYERS),
    "mistral": (T.MistralConfig(**LLAMA, sliding_window=16), "model.layers", LLAMA_LAYERS),
    "qwen2": (T.Qwen2Config(**LLAMA), "model.layers", LLAMA_LAYERS),
    "qwen3": (T.Qwen3Config(**LLAMA, head_dim=8), "model.layers", LLAMA_LAYERS),
    "gemma2": (T.Gemma2Config(**GEMMA), "model.layers", LLAMA_LAYERS),
    "gemma3": (
        T.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"]),
        "model.layers",
        LLAMA_LAYERS,
    ),
    "phi": (T.PhiConfig(**LLAMA), "model.layers", "q_proj k_proj v_proj dense fc1 fc2"),
    "gpt-neox": (T.GPTNeoXConfig(**NEOX), "gpt_neox.layers", FUSED_LAYERS),
    "gpt2": (
        T.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1),
        "transformer.h",
        "c_attn c_proj c_fc c_proj",
    ),
    "falcon-7b": (T.FalconConfig(**FALCON), "transformer.h", FUSED_LAYERS),
    "falcon-rw": (
        T.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, bias=True, alibi=True),
        "transformer.h",
        FUSED_LAYERS,
    ),
    "falcon-40b": (
        T.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
        "transformer.h",
        FUSED_LAYERS,
    ),
    "bloom": (
        T.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1),
        "transformer.h",
        FUSED_LAYERS,
    ),
    "starcoder2": (
        T.Starcoder2Config(**LLAMA, sliding_window=16),
        "model.layers",
        "q_proj k_proj v_proj o_proj c_fc c_proj",
    ),
    "olmo": (T.OlmoConfig(**LLAMA), "model.layers", LLAMA_LAYERS),
    "olmo2": (T.Olmo2Config(**LLAMA), "model.layers", LLAMA_LAYERS),
    "mixtral": (T.MixtralConfig(**LLAMA, num_local_experts=4), "model.layers", "q_proj k_proj v_proj o_proj"),
    "qwen3-moe": (
        T.Qwen3MoeConfig(**LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        "model.layers",
        "q_proj k_proj v_proj o_proj",
    ),
}
EXPERTS = ("mixtral", "qwen3-moe")


def tiny(family: str):
    """A model of the family with random weights, biases too, which Transformers starts at zero."""
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family][0])).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_their_layers_are_found(family):
    model, (_, blocks_name, layers) = tiny(family), FAMILIES[family]
    prefix, blocks = families.decoder_blocks(model)
    assert (prefix, len(blocks)) == (blocks_name, 2)
    found = families.quantizable(blocks[1])
    assert [name.rpartition(".")[2] for name in found] == layers.split()
    with torch.no_grad():
        for layer in found.values():
            m, n = families.weight(layer).shape
            x = torch.randn(3, n)
            bias = 0 if layer.bias is None else layer.bias
            assert torch.allclose(layer(x), x @ families.weight(layer).T + bias, atol=1e-5)
            families.weight(layer).copy_(torch.ones(m, n))
            assert (layer.weight == 1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_run_as_the_model_runs_them(family, ids):
    """Masks, positions and alibi of each block; what a block alone computes is what it computes in the model."""
    model = tiny(family)
    _, blocks = families.decoder_blocks(model)
    hidden, calls = families.block_calls(model, ids)
    outputs = []
    hooks = [b.register_forward_hook(lambda _, args, out: outputs.append(out)) for b in blocks]
    with torch.no_grad():
        model(ids[4:5], use_cache=False)
        for hook in hooks:
            hook.remove()
        x = hidden[4]
        for block, call, out in zip(blocks, calls, outputs, strict=True):
            x = families.run_block(block, x, call)
            assert type(x) is torch.Tensor
            assert torch.equal(x, out if isinstance(out, torch.Tensor) else out[0])


def test_listening_touches_no_weight_of_a_block_and_leaves_the_model_as_it_was(ids):
    model = tiny("gemma3")
    expected = model(ids[:1]).logits
    _, blocks = families.decoder_blocks(model)
    state = {k: v.clone() for k, v in blocks.state_dict().items()}
    blocks.to("meta")
    _, calls = families.block_calls(model, ids)
    assert calls[0][1]["attention_mask"] is not calls[1][1]["attention_mask"]
    assert not torch.equal(calls[0][1]["position_embeddings"][0], calls[1][1]["position_embeddings"][0])
    blocks.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(ids[:1]).logits, expected)


def test_what_differs_from_sample_to_sample_is_an_error(ids):
    model = tiny("llama")
    block = model.model.layers[0]
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, **kwargs: [x.sum() + y for y in rotary(x, **kwargs)]
    with pytest.raises(QuipError, match=r"model\.layers\.0: argument 'position_embeddings' differs between samples"):
        families.block_calls(model, ids)
    assert "forward" not in block.__dict__


def test_what_blocks_hand_to_each_other_is_an_error(ids):
    model = tiny("llama")
    model.model.rotary_emb.forward = lambda x, **kwargs: {}
    with pytest.raises(QuipError, match=r"model\.layers\.0: argument 'position_embeddings' is filled by other blocks"):
        families.block_calls(model, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_quantized_is_named_once(family, caplog):
    with caplog.at_level(logging.WARNING, "quip"):
        families.warn_unquantizable(tiny(family))
    assert all("cannot be quantized and stay in 16 bits" in message for message in caplog.messages)
    names = {message.split()[0] for message in caplog.messages}
    if family in EXPERTS:
        assert any("(gate_up_proj and down_proj of " in message for message in caplog.messages)
    assert names == ({"model.layers.*.mlp.gate", "model.layers.*.mlp.experts"} if family in EXPERTS else set())


def test_a_model_without_blocks_is_an_error():
    with pytest.raises(QuipError, match="Linear has no list of decoder blocks"):
        families.decoder_blocks(torch.nn.Linear(2, 2))


def test_experts_in_a_list_are_not_the_blocks():
    expert = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(9)])
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([expert]), "other": torch.nn.ModuleList([expert[0]] * 3)}
    )
    assert families.decoder_blocks(model)[0] == "layers"


@pytest.fixture
def reloaded(tmp_path, tokenizer):
    """Saves a quantized model and loads what was saved, in a class of its own or as a causal model."""

    def reload(model, reports, cls=T.AutoModelForCausalLM):
        save_model(model, tokenizer, tmp_path / "out", reports, {"model": "tiny"})
        return cls.from_pretrained(tmp_path / "out")

    return reload


@torch.no_grad()
def logits(model, ids):
    return model(ids[:2]).logits.float()


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_checkpoint_is_the_model_that_was_quantized(family, ids, reloaded):
    model = tiny(family)
    before = logits(model, ids)
    reports = quantize_model(model, ids, bits=3)
    expected = logits(model, ids)
    assert 1e-3 < relative_error(expected, before) < 1
    loaded = reloaded(model, reports)
    assert relative_error(logits(loaded, ids), expected) < 1e-5
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    layers = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == len(reports) == 2 * len(FAMILIES[family][2].split())
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    text = loaded.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
    assert text.shape == (1, 45)
    assert torch.equal(text, model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options))
