"""Transformers integration: importing this module registers the quantization method `quip`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from quip.errors import QuipError
from quip.fuse import fuse
from quip.kernels import QuantizedLinear

FORMAT = 2  # of packed codes and seeded transforms; a reader refuses what it does not know


@register_quantization_config("quip")
class QuipConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: what must be known before its tensors are read.

    `bits` (2, 3 or 4), `rescale` (whether layers store D̃), `incoherence` and `permute` (what V and U are) hold for
    every quantized layer; the linear layers named in `modules_to_not_convert` are ordinary ones. `format` is the
    version of the file format.
    """

    def __init__(
        self,
        bits: int = 2,
        rescale: bool = False,
        incoherence: str = "kron",
        permute: bool = True,
        modules_to_not_convert: list[str] | None = None,
        format: int = FORMAT,
        **kwargs,
    ):
        self.quant_method = "quip"
        self.bits, self.rescale, self.format = bits, rescale, format
        self.incoherence, self.permute = incoherence, permute
        self.modules_to_not_convert = modules_to_not_convert or []
        if bits not in (2, 3, 4) or isinstance(bits, bool):
            raise QuipError(f"quantization_config: bits must be 2, 3 or 4, got {bits!r}")
        if incoherence not in ("kron", "none"):
            raise QuipError(f"quantization_config: incoherence must be 'kron' or 'none', got {incoherence!r}")
        if format != FORMAT:
            raise QuipError(f"quantization_config: this version of quip reads format {FORMAT}, not {format!r}")


@register_quantizer("quip")
class QuipHfQuantizer(HfQuantizer):
    """Loads and saves quip checkpoints; quantizing needs calibration text, so `quip quantize` does it beforehand."""

    requires_calibration = True
    quantization_config: QuipConfig

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        stored = config.rescale, config.incoherence, config.permute
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and should_convert_module(name, config.modules_to_not_convert):
                with torch.device("meta"):
                    size = layer.in_features, layer.out_features
                    empty = QuantizedLinear(*size, config.bits, layer.bias is not None, *stored)
                model.set_submodule(name, empty)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                layer.build(name)
        return fuse(model)

    def get_state_dict_and_metadata(self, model, *args, **kwargs):
        return stored_state(model), {}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


def storage_dtype(model: PreTrainedModel) -> torch.dtype:
    """The 16-bit type for unquantized weights: the model's own if it has 16 bits, else float16."""
    return model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.float16


def stored_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's state with unquantized floats in 16 bits; tied weights stay one tensor; grid scales keep float32."""
    dtype, seen, state = storage_dtype(model), {}, {}
    exact = {
        f"{name}.{key}"
        for name, m in model.named_modules()
        if isinstance(m, QuantizedLinear)
        for key in ("scale", "rescale")
    }
    for name, x in model.state_dict().items():
        if x.is_floating_point() and name not in exact:
            x = seen.setdefault(x.data_ptr(), x.to(dtype))
        state[name] = x
    return state
