"""A model whose weights stay in safetensors files until they are asked for: the skeleton, and block after block."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterable, MutableSequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from quip.errors import QuipError
from quip.families import Call
from quip.kernels import QuantizedLinear
from quip.plan import Plan
from quip.resume import KeptBlocks, WorkFolder
from quip.verify import tensor_headers

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(where: str, local_files_only: bool = False) -> list[Path]:
    """The safetensors files of a model in a folder or on the hub, downloaded if need be; none if it has none.

    Raises `QuipError` if the index that lists them is damaged, or lists files elsewhere.
    """
    folder = Path(where)
    if not folder.is_dir():
        patterns = ["model*.safetensors", INDEX]
        folder = Path(snapshot_download(where, allow_patterns=patterns, local_files_only=local_files_only))
    if not (folder / INDEX).is_file():
        return [file for file in [folder / SINGLE] if file.is_file()]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if any(name != Path(name).name for name in names):
            raise ValueError(f"it lists {names[0]}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise QuipError(f"{folder / INDEX} is damaged: {e}") from None
    return [folder / name for name in names]


def skeleton(
    where: str, config: PreTrainedConfig, dtype: torch.dtype | str, trust_remote_code: bool = False, **more
) -> PreTrainedModel:
    """The model without its weights: parameters on the meta device, and buffers that no file holds, in eval mode."""
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(where, **more)
        except OSError:  # there is none: as Transformers does
            model.generation_config = GenerationConfig.from_pretrained(
                where, config_file_name="config.json", _from_model_config=True, **more
            )
    return model.eval()


class Unfit(Exception):
    """Why a model cannot be read block by block."""


class Shards:
    """The tensors of safetensors files by the names that a model has for them.

    Raises `QuipError` if the files are damaged or of another model, and `Unfit` if not every tensor of the model is in
    them, under its name or with the prefix of the base model more or less: such files Transformers can convert, at once
    and in memory.
    """

    def __init__(self, files: Iterable[Path], model: PreTrainedModel):
        state = model.state_dict(keep_vars=True)
        base, self.where = f"{model.base_model_prefix}.", {}
        for key, (file, shape) in {key: (f, h[1]) for f in files for key, h in tensor_headers(f).items()}.items():
            name = next((n for n in (key, base + key, key.removeprefix(base)) if n in state), None)
            if name is not None and tuple(state[name].shape) != shape:
                raise QuipError(f"{file} is not of this model: {key} is {shape}, not {tuple(state[name].shape)}")
            if name is not None:
                self.where[name] = file, key
        self.tied = [names for names in same_parameter(state) if len(names) > 1]
        for names in self.tied:
            self.check_tied([name for name in names if name in self.where])
            self.where |= {name: self.where[n] for n in names if n in self.where for name in names}
        missing = [name for name in state if name not in self.where]
        if missing or converted(model, self.where):
            raise Unfit(f"{missing[0]} is not in its files" if missing else "its tensors are converted when loaded")

    def check_tied(self, there: list[str]) -> None:
        """Raise `Unfit` if the files hold one parameter twice and differently: then it is not one."""
        tensors = list(self.read(there).values())
        if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
            raise Unfit(f"{' and '.join(there)} should be the same and are not")

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, still mapped from their files: they take memory as they are touched."""
        tensors, by_file = {}, {}
        for name in names:
            file, key = self.where[name]
            by_file.setdefault(file, []).append((name, key))
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as f:
                tensors |= {name: f.get_tensor(key) for name, key in wanted}
        return tensors


def same_parameter(state: dict[str, torch.Tensor]) -> list[list[str]]:
    """The names of each parameter, of which tied ones have several."""
    groups: dict[int, list[str]] = {}
    for name, p in state.items():
        groups.setdefault(id(p), []).append(name)
    return list(groups.values())


def converted(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether Transformers would change the tensors as it loads them (merge experts, say), and not only their names."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # a version that never does
        return False
    mapping = [m for m in get_model_conversion_mapping(model) or () if isinstance(m, WeightConverter)]
    return any(m.rename_source_key(name)[1] is not None for m in mapping for name in names)


class ShardedBlocks(KeptBlocks):
    """Blocks that are read from files when the walk comes to them, and leave memory once they are kept on disk."""

    def __init__(
        self, model: PreTrainedModel, plan: Plan, work: WorkFolder, shards: Shards, device: torch.device | str
    ):
        super().__init__(model, plan, work)
        map_large_memory()
        self.shards, self.device = shards, device
        again = {name for names in shards.tied for name in names[1:]}
        self.outside = [n for n in model.state_dict() if not n.startswith(f"{self.prefix}.") and n not in again]
        for module in model.modules():
            for name, x in module.named_buffers(recurse=False):
                if not x.is_meta:
                    setattr(module, name, x.to(device))

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Make these the model's own tensors, under all of their names."""
        self.model.load_state_dict(tensors, strict=False, assign=True)
        for first, *others in self.shards.tied:
            for name in others:
                parent, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(parent), attribute, self.model.get_parameter(first))

    def fetch(self, names: list[str]) -> None:
        """Read tensors into the model, in its dtype and on the device."""
        state = self.model.state_dict()
        mapped = self.shards.read(names)
        self.put({name: x.to(self.device, state[name].dtype, copy=True) for name, x in mapped.items()})

    def enter(self, samples: torch.Tensor, hidden: MutableSequence[torch.Tensor]) -> list[Call]:
        head = self.model.get_output_embeddings()
        own = {id(p) for p in head.parameters()} if head is not None else set()
        tied = {id(self.model.get_parameter(names[0])) for names in self.shards.tied}
        state = self.model.state_dict(keep_vars=True)
        wanted = [name for name in self.outside if id(state[name]) not in own - tied]  # an untied head does not run
        self.fetch(wanted)
        calls = super().enter(samples, hidden)
        self.put({name: x.to("meta") for name, x in self.model.state_dict().items() if name in set(wanted)})
        return calls

    def load(self, i: int) -> torch.nn.Module:
        self.fetch([name for name in self.model.state_dict() if name.startswith(f"{self.prefix}.{i}.")])
        return super().load(i)

    def finish(self, i: int, packed: dict[str, QuantizedLinear], report: dict[str, dict]) -> None:
        super().finish(i, packed, report)
        self.blocks[i].to("meta")

    def assemble(self) -> None:
        """The whole quantized model, its tensors mapped from the files of blocks and of the original, in 16 bits."""
        state = self.model.state_dict()
        for name in self.outside:
            self.put({name: in_16_bits(self.shards.read([name])[name], state[name].dtype, self.dtype)})
        for i in range(len(self.blocks)):
            self.put({f"{self.prefix}.{i}.{name}": x for name, x in self.work.read(i)[0].items()})


def map_large_memory() -> None:
    """Let glibc map whatever has a megabyte or more, and unmap it once it is free.

    Left alone it keeps all that is smaller than 32 MB in one heap, whose holes grow with every block: half a gigabyte.
    """
    M_MMAP_THRESHOLD = -3
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def in_16_bits(x: torch.Tensor, dtype: torch.dtype, stored: torch.dtype) -> torch.Tensor:
    """A tensor as it is stored, if the model runs in `dtype`; the tensor itself, if that is what it is."""
    if not x.is_floating_point() or x.dtype == stored:
        return x
    rounded = torch.empty_like(x, dtype=stored)
    parts = (t.view(-1).split(1 << 22) for t in (rounded, x))  # a vocabulary is large
    for target, part in zip(*parts, strict=True):
        target.copy_(part.to(dtype))
    return rounded
