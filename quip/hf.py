"""Transformers integration: importing this module registers the quantization method `quip`."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import NoReturn

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quip import families
from quip.errors import QuipError
from quip.fuse import fuse
from quip.kernels import QuantizedLinear
from quip.lora import register_lora
from quip.methods import choose
from quip.verify import check_files, check_values

FORMAT = 2  # of packed codes and seeded transforms; a reader refuses what it does not know
STORED = {"rescale": False, "incoherence": "kron", "permute": True}  # choices that a checkpoint stores, with defaults
RUN = ("samples", "seq_len", "seed", "offload", "progress")  # arguments of `quip.quantize` that are no choices


@register_quantization_config("quip")
class QuipConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: what must be known before its tensors are read.

    `bits` (2, 3 or 4), `rescale` (whether layers store D̃), `incoherence` and `permute` (what V and U are) hold for
    every quantized layer, except that `bits_for` gives the width of layers, by full name, where it is another. Those
    named in `modules_to_not_convert` are ordinary ones. `format` is the version of the file format.

    With a `dataset` (calibration text, as `quip.quantize` takes it: a name, a file, strings), `from_pretrained`
    quantizes an ordinary model as it loads it. Then both lists of names may hold patterns such as `*.down_proj`,
    `tokenizer` is the model's own unless given, and further arguments (samples, seq_len, seed, preset, method, …) are
    those of `quip.quantize`. None of these is stored. Raises `QuipError` for anything else.
    """

    def __init__(
        self,
        bits: int = 2,
        modules_to_not_convert: list[str] | None = None,
        bits_for: dict[str, int] | None = None,
        format: int = FORMAT,
        quant_method: str = "quip",
        dataset: str | Iterable[str] | torch.Tensor | None = None,
        tokenizer=None,
        **options,
    ):
        unknown = options.keys() - STORED if dataset is None else ()
        if unknown:
            refuse(f"unknown field {min(unknown)!r}")
        self.quant_method = "quip"
        self.bits, self.format = bits, format
        self.rescale, self.incoherence, self.permute = (options.get(key, default) for key, default in STORED.items())
        self.modules_to_not_convert = [] if modules_to_not_convert is None else modules_to_not_convert
        self.bits_for = {} if bits_for is None else bits_for
        self.check()
        if dataset is not None:
            choose(**{key: value for key, value in options.items() if key not in RUN})
        self.dataset, self.tokenizer, self.options = dataset, tokenizer, options

    def to_dict(self) -> dict:
        """What a checkpoint stores of it."""
        return {k: copy.deepcopy(v) for k, v in vars(self).items() if k not in ("dataset", "tokenizer", "options")}

    def to_diff_dict(self) -> dict:
        """All of it; Transformers 5.0 asks for this to show the configuration."""
        return self.to_dict()

    def check(self) -> None:
        """Raise `QuipError` unless every field has a value that can be."""
        if type(self.format) is not int or self.format != FORMAT:
            refuse(f"this version of quip reads format {FORMAT}, not {self.format!r}")
        if not isinstance(self.bits_for, dict):
            refuse(f"bits_for must map names of layers to widths, got {self.bits_for!r}")
        for name, bits in (("bits", self.bits), *((f"bits_for {name!r}", b) for name, b in self.bits_for.items())):
            if type(bits) is not int or bits not in (2, 3, 4):
                refuse(f"{name} must be 2, 3 or 4, got {bits!r}")
        for name in ("rescale", "permute"):
            if type(getattr(self, name)) is not bool:
                refuse(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.incoherence not in ("kron", "none"):
            refuse(f"incoherence must be 'kron' or 'none', got {self.incoherence!r}")
        kept = self.modules_to_not_convert
        if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
            refuse(f"modules_to_not_convert must be a list of names, got {kept!r}")


def refuse(message: str) -> NoReturn:
    raise QuipError(f"quantization_config: {message}")


@register_quantizer("quip")
class QuipHfQuantizer(HfQuantizer):
    """Loads and saves quip checkpoints, and quantizes ordinary models as they are loaded, if there is a `dataset`."""

    quantization_config: QuipConfig

    def __init__(self, quantization_config: QuipConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        calibrated = quantization_config.dataset is not None
        if self.pre_quantized and calibrated:
            refuse("a dataset is of no use: the model is quantized already")
        if not self.pre_quantized and not calibrated:
            refuse("the model is not quantized yet: to do it while loading takes a dataset")
        register_lora()

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        if not self.pre_quantized:
            return
        stored = config.rescale, config.incoherence, config.permute
        for name, (layer, bits) in layers_to_convert(model, config).items():
            m, n = families.weight(layer).shape
            with torch.device("meta"):
                empty = QuantizedLinear(n, m, bits, layer.bias is not None, *stored)
            model.set_submodule(name, empty)
            parent = model.get_submodule(name.rpartition(".")[0])
            if not [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]:
                parent._is_hf_initialized = True  # else GPT-2 would start the weights of `c_proj`, which is no more
        check_files(model, checkpoint_files or (), file_prefix(model))
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            quantize_loaded(model, self.quantization_config)
            return model
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                if layer.qweight.is_meta:
                    raise QuipError(f"{name}: packed codes cannot be left on disk; load without offload_buffers")
                layer.build(name)
                check_values(name, layer)
        for name, p in model.named_parameters():
            # some Transformers (5.0, 5.15) leave what they rename or merge in the 16 bits of the file
            if p.dtype in (torch.float16, torch.bfloat16) and p.dtype != self.dtypes.get(name, p.dtype):
                p.data = p.data.to(self.dtypes[name])
        return fuse(model)

    def get_state_dict_and_metadata(self, model, *args, **kwargs):
        return stored_state(model), {}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True  # adapters beside the layers, that is: gradients pass through them


def quantize_loaded(model: PreTrainedModel, config: QuipConfig) -> None:
    """Quantize an ordinary model that has just been loaded, as its `QuipConfig` with a dataset says.

    Raises `QuipError` if part of the model is not in memory, and as `quip.quantize` does.
    """
    from quip.pipeline import quantize  # which imports this module

    if any(p.is_meta for p in model.parameters()):
        raise QuipError("a model is quantized in memory: load it with a device_map that leaves nothing on disk")
    prefix, _ = families.decoder_blocks(model)
    outside = {name for name in families.quantizable(model) if not name.startswith(f"{prefix}.")}
    tokenizer = config.tokenizer or model.name_or_path
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    skip = [name for name in config.modules_to_not_convert if name not in outside]  # the head is never quantized
    options = {"skip": skip, "bits_for": config.bits_for, **config.options}
    quantize(model, tokenizer, config.bits, calibration=config.dataset, **options)


def layers_to_convert(model: PreTrainedModel, config: QuipConfig) -> dict[str, tuple[torch.nn.Module, int]]:
    """The layers of the decoder blocks that are quantized in a checkpoint, by name in this model, and their widths.

    Raises `QuipError` for a name that is no such layer.
    """
    prefix, blocks = families.decoder_blocks(model)
    layers = {f"{prefix}.{name}": layer for name, layer in families.quantizable(blocks).items()}
    base = file_prefix(model)
    bits_for = {name.removeprefix(base): bits for name, bits in config.bits_for.items()}
    kept = {name.removeprefix(base) for name in config.modules_to_not_convert}
    unknown = sorted(bits_for.keys() - (layers.keys() - kept))
    if unknown:
        refuse(f"bits_for names {unknown[0]}, which is no quantized layer of {type(model).__name__}")
    return {name: (layer, bits_for.get(name, config.bits)) for name, layer in layers.items() if name not in kept}


def file_prefix(model: PreTrainedModel) -> str:
    """What names in a checkpoint begin with that they lack in this model: "" for a causal model, whose names they are;
    for its base alone, as `AutoModel` makes it, the base's name."""
    return f"{model.base_model_prefix}." if model.base_model is model else ""


def storage_dtype(model: PreTrainedModel) -> torch.dtype:
    """The 16-bit type for unquantized weights: the model's own if it has 16 bits, else float16."""
    return model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.float16


def stored_state(model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The model's state with unquantized floats in 16 bits; tied weights stay one tensor; grid scales keep float32.

    `dtype`: which 16 bits, for a part of a model, which cannot be asked for `storage_dtype`.
    """
    dtype, seen, state = dtype or storage_dtype(model), {}, {}
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
