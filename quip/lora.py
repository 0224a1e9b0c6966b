"""LoRA on quantized layers: where `peft` is installed, its LoRA takes them as targets, as it takes ordinary ones."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from quip.errors import QuipError
from quip.kernels import QuantizedLinear


@cache
def register_lora() -> None:
    """Teach the LoRA of `peft`, if that is installed, about `QuantizedLinear`, which it would refuse as unknown.

    It has no way to be told but a private option of each `LoraConfig`, so the function with which it chooses the layer
    for a target is wrapped. Nothing changes for any other layer.
    """
    if find_spec("peft") is None:
        return
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    original, adapted = LoraModel._create_new_module, lora_layer()

    def create(lora_config, adapter_name, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantizedLinear):
            return adapted(target, adapter_name, config=lora_config, **kwargs)
        return original(lora_config, adapter_name, target, **kwargs)

    LoraModel._create_new_module = staticmethod(create)


@cache
def lora_layer() -> type:
    """The class of a quantized layer with LoRA adapters beside it: `y = Ŵ x + b + scaling · B A x`.

    The packed codes are not trained. What needs the weights themselves raises `QuipError`: merging an adapter into
    them, and ways to start one from them (DoRA, PiSSA, …).
    """
    from peft.tuners.lora import Linear

    class QuantizedLoraLinear(Linear):
        def __init__(self, base_layer, adapter_name, config, **kwargs):
            if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
                raise QuipError("on quantized layers, LoRA starts at zero (init_lora_weights=True), without DoRA")
            super().__init__(base_layer, adapter_name, config=config, **kwargs)

        def _get_in_out_features(self, module):
            return module.in_features, module.out_features  # peft warns of layers that it does not know

        def merge(self, *args, **kwargs):
            raise QuipError("an adapter cannot be merged into packed codes: keep it beside them")

    return QuantizedLoraLinear
