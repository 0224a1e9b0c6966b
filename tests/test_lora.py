"""LoRA by peft on a quantized model: it trains, through the quantized layers, and they stay as they are."""

import copy

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from quip import quantize_model, save_model
from quip.errors import QuipError

peft = pytest.importorskip("peft")

# peft 0.21 asks Transformers by a name that has a newer one
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, out = tiny_llama(), tmp_path_factory.mktemp("lora") / "out"
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    reports = quantize_model(model, ids, bits=3)
    return save_model(model, byte_tokenizer(), out, reports, {"model": "tiny"})


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def adapted(model, **options):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, r=4, **options))


def test_training_lowers_the_loss_and_leaves_the_codes(model, folder, token_ids):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    tuned = adapted(model)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * len(TARGETS)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0] and losses[-1] < losses[0] - 0.1
    assert all(torch.equal(x, before[name]) for name, x in tuned.unload().state_dict().items())


def test_gradients_are_those_of_the_dense_model(model, token_ids):
    """Of every adapter: those of the first block learn through all the quantized layers after it."""
    dense = AutoModelForCausalLM.from_config(model.config.__class__(**tiny_llama().config.to_dict()))
    state = {name: x for name, x in model.state_dict().items() if name in dense.state_dict()}
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            state[f"{name}.weight"] = layer(torch.eye(layer.in_features)).T.detach()
    dense.load_state_dict(state)
    gradients = []
    for base in (model, dense.eval()):
        tuned = adapted(base)
        for name, p in tuned.named_parameters():
            if "lora_B" in name:  # zero, as LoRA starts, would hide half of the gradients
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(3))
        tuned(input_ids=token_ids, labels=token_ids).loss.backward()
        gradients.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys() and len(ours) == 12
    for name, g in ours.items():
        assert (g - theirs[name]).norm() < 1e-3 * theirs[name].norm(), name


def test_an_adapter_is_saved_and_loaded(model, folder, token_ids, tmp_path):
    tuned = adapted(model)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with torch.no_grad():
        expected = tuned.eval()(token_ids).logits
        assert torch.equal(again(token_ids).logits, expected)
        with again.disable_adapter():
            assert not torch.allclose(again(token_ids).logits, expected, atol=1e-3)


def test_transformers_adds_an_adapter_itself(model, token_ids):
    model.add_adapter(peft.LoraConfig(target_modules=TARGETS, r=4))
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    assert sum(p.grad is not None for p in model.parameters()) == 12


def test_a_model_quantized_in_memory_takes_adapters_too(token_ids):
    model = tiny_llama()
    quantize_model(model, token_ids, bits=2)
    assert adapted(model)(token_ids).logits.isfinite().all()


def test_what_needs_the_weights_themselves_is_an_error(model):
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(QuipError, match="LoRA starts at zero"):
            adapted(copy.deepcopy(model), **options)
    with pytest.raises(QuipError, match="cannot be merged into packed codes"):
        adapted(model).merge_and_unload()


def test_other_layers_get_the_adapters_that_they_always_had():
    tuned = adapted(tiny_llama())
    assert {type(m).__module__ for m in tuned.modules() if hasattr(m, "lora_A")} == {"peft.tuners.lora.layer"}
