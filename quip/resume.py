"""The work folder of a run: every finished block on disk, so that a run that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from quip.algorithm import Basis, QuantizedMatrix
from quip.checkpoint import publish, write_atomically, write_files
from quip.errors import QuipError
from quip.families import weight
from quip.hf import stored_state
from quip.incoherence import make_transform
from quip.kernels import QuantizedLinear, unpack
from quip.models import Blocks, Done
from quip.plan import Plan

ARGUMENTS, CHECKPOINT, READY, REPLACED = "arguments.json", "checkpoint", "ready", "replaced"


class WorkFolder:
    """`OUT.part` beside OUT: the run's arguments, a file for each finished block, and at the end the checkpoint.

    A folder that is there already is taken over if its `arguments` are the same, in every entry. Raises `QuipError` if
    they are not, saying which differ, or if another process works in it.
    """

    def __init__(self, out: Path, arguments: dict, restart: bool = False):
        self.out, self.path = out, part(out)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise QuipError(f"cannot write {self.path}: {e.strerror}") from None
        self.lock = lock(self.path)
        try:
            self.begin(arguments, restart)
        except BaseException:
            os.close(self.lock)
            raise

    def begin(self, arguments: dict, restart: bool) -> None:
        """Take over what is there, or write down the arguments of a new run."""
        file, there = self.path / ARGUMENTS, [p for p in self.path.iterdir() if p.name != "lock"]
        if not file.exists() and any(p.suffix != ".tmp" for p in there):
            raise QuipError(f"{self.path} exists and is no work folder of quip: choose another OUT")
        if file.exists() and not restart:
            self.compare(json.loads(file.read_text(encoding="utf-8")), arguments)
        else:
            self.clear(there)
            text = json.dumps(arguments, indent=1) + "\n"
            write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Let other processes in; leave nothing behind if no block is done; tell a person who interrupts what is."""
        done = len(list(self.path.glob("block-*.safetensors")))
        if not done:
            self.remove()
        os.close(self.lock)
        if kind is KeyboardInterrupt and done:
            kept = f"the blocks that are done ({done}) are kept in {self.path}"
            raise KeyboardInterrupt(f"{kept}; the same command goes on from there") from None

    def clear(self, there: list[Path]) -> None:
        """Remove these files; but a checkpoint that was about to be replaced goes back to its place."""
        if (self.path / REPLACED).exists() and not self.out.exists():
            (self.path / REPLACED).rename(self.out)
        for p in there:
            shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)

    def compare(self, begun: dict, arguments: dict) -> None:
        arguments = json.loads(json.dumps(arguments))  # as JSON has them: lists for tuples
        differ = [key for key in begun.keys() | arguments.keys() if begun.get(key) != arguments.get(key)]
        if differ:
            changes = "; ".join(change(key, begun.get(key), arguments.get(key)) for key in sorted(differ))
            raise QuipError(
                f"{self.path} holds an unfinished run with other arguments: {changes}. Repeat the command as it was to "
                "go on with it, or add --restart to throw its work away"
            )

    def file(self, i: int) -> Path:
        return self.path / f"block-{i:05d}.safetensors"

    def keep(self, i: int, tensors: dict[str, torch.Tensor], reports: dict[str, dict]) -> None:
        """Write a finished block, all of it or nothing."""
        tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
        write_atomically(self.file(i), lambda part: save_file(tensors, part, {"reports": json.dumps(reports)}))

    def read(self, i: int) -> tuple[dict[str, torch.Tensor], dict[str, dict]] | None:
        """The tensors of a finished block, mapped from its file, and its layers' reports; None if it is not done."""
        if not self.file(i).exists():
            return None
        try:
            with safe_open(self.file(i), framework="pt") as f:
                return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["reports"])  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as e:
            raise QuipError(f"{self.file(i)} is damaged ({e}): remove it to do that block again") from None

    def publish(self, model: PreTrainedModel, tokenizer, reports: dict, settings: dict, dtype: torch.dtype) -> None:
        """Write the checkpoint and put it in its place."""
        new = self.path / CHECKPOINT
        (self.path / READY).unlink(missing_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        write_files(new, model, tokenizer, reports, settings, dtype)
        write_atomically(self.path / READY, Path.touch)
        publish(new, self.out, self.path / REPLACED)

    @staticmethod
    def ready(out: Path) -> bool:
        """Whether a checkpoint was written here, and perhaps put in its place."""
        return (part(out) / READY).exists()

    def published(self) -> bool:
        """Whether the checkpoint is in its place, so that nothing is left to do but to remove this folder."""
        return self.ready(self.out) and self.out.exists() and not (self.path / CHECKPOINT).exists()

    def remove(self) -> None:
        """Remove the folder, under another name, so that what is left if that is interrupted is not taken for work."""
        if self.path.exists():
            trash = self.path.with_name(f".{self.path.name}.removed")
            shutil.rmtree(trash, ignore_errors=True)
            self.path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def part(out: Path) -> Path:
    """The work folder of a checkpoint."""
    return out.with_name(f"{out.name}.part")


def change(key: str, old, new) -> str:
    """What changed, in words; fingerprints are not shown."""
    return f"{key} changed" if key.endswith("fingerprint") else f"{key} was {old!r} and is now {new!r}"


def lock(folder: Path) -> int:
    """Keep other processes out of a folder, where the system can, until the handle that is returned is closed."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise QuipError(f"another process is working in {folder}") from None
    return handle


class KeptBlocks(Blocks):
    """Blocks of which every finished one is kept in a work folder, and taken from it instead of being done again.

    The activations are not kept: blocks that are finished run again, on Ŵ, which the file gives back bit for bit. That
    takes one forward pass, and no disk.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, work: WorkFolder):
        super().__init__(model, plan)
        self.work = work

    def finished(self, i: int) -> Done | None:
        kept = self.work.read(i)
        if kept is None:
            return None
        packed = {}
        for name, layer in self.layers(i).items():
            own = {key.removeprefix(f"{name}."): x for key, x in kept[0].items() if key.startswith(f"{name}.")}
            if "qweight" in own:
                packed[name] = self.restored(layer, own, f"{self.prefix}.{i}.{name}")
                W = weight(layer)
                W.copy_(as_matrix(packed[name]).dequantize())
        return packed, kept[1]

    def restored(self, layer: torch.nn.Module, tensors: dict[str, torch.Tensor], full: str) -> QuantizedLinear:
        """The packed layer that was made of `layer`."""
        (m, n), choices = weight(layer).shape, self.plan.choices
        kind = layer.bias is not None, "rescale" in tensors, choices["incoherence"], choices["permute"]
        packed = QuantizedLinear(n, m, self.plan.widths[full], *kind).to(layer.weight.device)
        packed.load_state_dict(tensors)
        return packed.build(full)

    def finish(self, i: int, packed: dict[str, QuantizedLinear], report: dict[str, dict]) -> None:
        super().finish(i, packed, report)
        if not self.work.file(i).exists():
            self.work.keep(i, stored_state(self.blocks[i], self.dtype), report)

    def assemble(self) -> None:
        """The whole quantized model: it is in memory already."""


def as_matrix(layer: QuantizedLinear) -> QuantizedMatrix:
    """The quantized matrix of a packed layer, exactly as it was before it was packed."""
    kind = {"incoherence": layer.incoherence, "permute": layer.permute, "dtype": torch.float64}
    sizes, seeds = (layer.in_features, layer.out_features), layer.transforms[:, 0].tolist()
    V, U = (make_transform(k, s, **kind).to(layer.qweight.device) for k, s in zip(sizes, seeds, strict=True))
    basis = Basis(V, U, None if layer.rescale is None else layer.rescale.double())
    return QuantizedMatrix(unpack(layer.qweight, layer.bits, layer.in_features), layer.scale.item(), layer.bits, basis)
