"""Fused modules: the same numbers, and the ordinary form whenever somebody watches."""

import copy
import pickle

import pytest
import torch
from conftest import tiny_llama
from transformers import AutoModelForCausalLM, StaticCache

from quip import cpu
from quip.decode import Block
from quip.forms import Fused, Gated, Member, Norm, Shared
from quip.fuse import fuse, unfuse
from quip.kernels import QuantizedLinear
from quip.models import quantize_model

pytestmark = pytest.mark.skipif(cpu.load()[0] is None, reason=f"no CPU kernel: {cpu.load()[1]}")
IDS = torch.randint(256, (1, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def quantized():
    """A tiny Llama at 2 bits, as `quantize_model` leaves it: fused."""
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    samples = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    quantize_model(model, samples, 2, progress=False, passes=0)
    return model


@pytest.fixture
def both(quantized):
    """The model fused, and a copy of it unfused."""
    return copy.deepcopy(quantized), unfuse(copy.deepcopy(quantized))


def forms(model):
    """How many modules have which form."""
    found = [type(m.forward.__self__) for m in model.modules() if "forward" in m.__dict__]
    return {kind: found.count(kind) for kind in set(found)}


@torch.no_grad()
def decode(model, tokens=5, **kwargs):
    """Logits of a prompt and of single tokens after it, `(tokens + prompt, vocabulary)`."""
    out = model(IDS, use_cache=True, **kwargs)
    logits = [out.logits[0]]
    for token in range(tokens):
        out = model(torch.tensor([[7 * token]]), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits).float()


def relative_error(y, exact):
    return ((y - exact).norm() / exact.norm()).item()


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernel's functions, in the order in which they are called."""
    seen = []
    for name in ("quip_linears", "quip_gated", "quip_rms_norm", "quip_block_in", "quip_block_out"):
        function = getattr(cpu.library(), name)
        monkeypatch.setattr(cpu.library(), name, lambda *a, n=name, f=function: (seen.append(n), f(*a))[1])
    return seen


# the same numbers


def test_every_part_has_its_form(quantized):
    assert forms(quantized) == {Norm: 5, Gated: 2, Block: 2, Member: 10}
    assert not forms(unfuse(copy.deepcopy(quantized)))


@pytest.mark.parametrize("backend", cpu.backends()[:-1])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=str)
def test_decoding_gives_the_same(both, backend, dtype, limit):
    before = cpu.backend()
    cpu.use(backend)
    fused, plain = (model.to(dtype) for model in both)
    assert relative_error(decode(fused), decode(plain)) < limit
    cpu.use(before)


def test_one_token_is_two_calls_a_block(both, calls):
    with torch.no_grad():
        past = both[0](IDS, use_cache=True).past_key_values
        calls.clear()
        both[0](torch.tensor([[1]]), past_key_values=past)
    assert calls == ["quip_block_in", "quip_block_out"] * 2 + ["quip_rms_norm"]


def test_a_prompt_takes_one_call_for_q_k_v_and_one_for_the_gated_block(both, calls):
    with torch.no_grad():
        both[0](IDS, use_cache=False)
    block = ["quip_rms_norm", "quip_linears", "quip_linears", "quip_rms_norm", "quip_gated"]  # q, k, v; o
    assert calls == block * 2 + ["quip_rms_norm"]


def test_layers_that_share_an_input_give_the_same_to_the_last_bit(both):
    attentions = [model.model.layers[0].self_attn for model in both]
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(*(attention.get_submodule(name)(x) for attention in attentions))


def test_generate_writes_the_same(both):
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    assert torch.equal(*(model.generate(IDS, **settings) for model in both))


# saving and copying


def test_names_and_files_are_those_of_the_model(both, tmp_path):
    fused, plain = both
    assert fused.state_dict().keys() == plain.state_dict().keys()
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert forms(loaded) == forms(fused)
    assert torch.equal(decode(loaded), decode(fused))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_fused_and_its_own(both, copied):
    fused = both[0]
    before = decode(fused)
    twin = copied(fused)
    assert forms(twin) == forms(fused)
    assert all(m.forward.__self__.module is m for m in twin.modules() if "forward" in m.__dict__)
    assert torch.equal(decode(twin), before)
    twin.model.layers[0].mlp.up_proj.qweight.fill_(0b01010101)
    twin.model.layers[1].input_layernorm.weight.data.mul_(2)
    assert relative_error(decode(twin), decode(unfuse(copy.deepcopy(twin)))) < 1e-3
    assert not torch.equal(decode(twin), before) and torch.equal(decode(fused), before)


@pytest.mark.parametrize("change", ["codes", "moved codes", "norm", "another norm", "scaling of nothing", "seed"])
def test_changes_after_the_first_token_count(both, change):
    fused, plain = both
    decode(fused)
    for model in both:
        block = model.model.layers[1]
        if change == "codes":
            block.self_attn.k_proj.qweight.fill_(0b11100100)
        elif change == "moved codes":
            block.mlp.gate_proj.qweight.data = block.mlp.gate_proj.qweight.flip(0)
        elif change == "norm":
            block.post_attention_layernorm.weight.data = block.post_attention_layernorm.weight * 3
        elif change == "another norm":
            block.input_layernorm = torch.nn.LayerNorm(64)
        elif change == "seed":
            block.self_attn.v_proj.transforms[0] = block.self_attn.o_proj.transforms[0]
            block.self_attn.v_proj.build()
        else:
            block.self_attn.q_proj = torch.nn.Linear(64, 64, bias=False)
            torch.nn.init.constant_(block.self_attn.q_proj.weight, 0.01)
    assert relative_error(decode(fused), decode(plain)) < 1e-3


# somebody watches


def test_gradients(both):
    found = []
    for model in both:
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.sum().backward()
        found.append((embedded.grad, model.model.layers[0].input_layernorm.weight.grad))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_gradients_of_norms_alone(both):
    norm = both[0].model.norm
    y = norm(torch.ones(1, 64))
    assert y.requires_grad
    assert norm(torch.ones(1, 64)).grad_fn is not None


@pytest.mark.parametrize(
    "name", ["self_attn", "self_attn.k_proj", "mlp", "mlp.up_proj", "mlp.act_fn", "input_layernorm"]
)
def test_hooks_see_every_call(both, name):
    fused, plain = both
    expected, seen = decode(plain), []
    module = fused.model.layers[1].get_submodule(name)
    module.register_forward_hook(lambda module, args, output: seen.append(1))
    assert relative_error(decode(fused), expected) < 1e-3
    assert len(seen) == 6


def test_global_hooks_see_every_call(both):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    decode(both[0])
    handle.remove()
    assert seen.count(QuantizedLinear) == 6 * 14


def test_attentions_and_hidden_states(both):
    outputs = []
    for model in both:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            past = model(IDS, use_cache=True).past_key_values
            out = model(torch.tensor([[5]]), past_key_values=past, output_attentions=True, output_hidden_states=True)
        outputs.append([*out.attentions, *out.hidden_states])
    assert len(outputs[0]) == len(outputs[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*outputs, strict=True))


def test_padding_and_several_sequences(both):
    ids, mask = IDS.repeat(2, 1), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(*(model.generate(ids, **settings) for model in both))


def test_another_cache(both):
    caches = [StaticCache(model.config, max_cache_len=32) for model in both]
    fused, plain = (decode(model, past_key_values=cache) for model, cache in zip(both, caches, strict=True))
    assert relative_error(fused, plain) < 1e-3


def test_a_compiler_sees_the_ordinary_form(both):
    compiled = torch.compile(both[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(IDS, use_cache=False).logits, both[1](IDS, use_cache=False).logits) < 1e-3


class Adapter(torch.nn.Module):
    """A layer with something added, as adapters do it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.more(x)


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
)
def test_adapters(both, name):
    fused, plain = both
    adapters = []
    for model in both:
        torch.manual_seed(0)
        block = model.model.layers[0]
        adapters.append(Adapter(block.get_submodule(name)))
        block.set_submodule(name, adapters[-1])
    assert relative_error(decode(fused), decode(plain)) < 1e-3
    for model, adapter in zip(both, adapters, strict=True):
        model(IDS).logits.sum().backward()
        assert adapter.more.weight.grad.abs().sum() > 0


def test_an_input_changed_between_two_layers_is_seen(both):
    attention = both[0].model.layers[0].self_attn
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        attention.q_proj(x)
        x.mul_(2)
        k = attention.k_proj(x)
        assert torch.equal(k, both[1].model.layers[0].self_attn.k_proj(x))
    assert attention.k_proj.forward.__self__.shared.given_up  # results that nobody asked for


def test_results_that_nobody_asks_for_are_not_computed_again(both, calls):
    q = both[0].model.layers[0].self_attn.q_proj
    with torch.no_grad():
        found = [q(torch.full((1, 64), float(i))) for i in range(4)]
    assert len(calls) == 4 and q.forward.__self__.shared.waiting is None
    assert len({y.sum().item() for y in found}) == 4


def test_inference_mode(both):
    expected = decode(both[1])
    with torch.inference_mode():
        assert relative_error(decode(both[0]), expected) < 1e-3


# what is not fused


def test_an_environment_variable_turns_it_off(both, monkeypatch):
    monkeypatch.setenv("QUIP_FUSE", "0")
    assert not forms(fuse(both[0]))


def test_somebody_elses_forward_is_left_alone(both):
    model = both[1]
    mine = model.model.norm.forward
    model.model.norm.forward = lambda x: mine(x)
    other = model.model.norm.forward
    assert fuse(model).model.norm.forward is other
    assert unfuse(model).model.norm.forward is other


class Shifted(torch.nn.Module):
    """Gemma's norm: multiplied by 1 + weight."""

    def __init__(self, n):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(n)), 1e-6

    def forward(self, x):
        return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def test_modules_that_compute_something_else_stay_as_they_are(both):
    model = both[1]
    block = model.model.layers[0]
    block.input_layernorm = Shifted(64)
    block.mlp.act_fn = torch.nn.GELU()
    expected = decode(copy.deepcopy(model))
    assert forms(fuse(model)) == {Norm: 4, Gated: 1, Block: 1, Member: 10}
    assert relative_error(decode(model), expected) < 1e-3


def test_a_block_with_another_sum_stays_as_it_is(both, monkeypatch):
    block = both[1].model.layers[0]
    forward = type(block).forward
    monkeypatch.setattr(type(block), "forward", lambda self, x, **kwargs: x + 0.22 * (forward(self, x, **kwargs) - x))
    assert Block.fits(block) and not Block(block).agrees()
    monkeypatch.setattr(type(block), "forward", lambda self, x, ple: x)
    assert not Block(block).agrees()


def test_a_model_without_quantized_layers():
    model = tiny_llama()
    fuse(model)
    assert forms(model) == {Norm: 5}
    assert isinstance(model.model.norm.forward.__self__, Fused) and Shared([]).waiting is None
