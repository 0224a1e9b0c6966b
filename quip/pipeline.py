"""From a model's name to a checkpoint, in the memory of one block, to be killed and resumed at any time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from quip import data
from quip.checkpoint import REPORT, check_output
from quip.errors import QuipError
from quip.loading import default_dtype, explained, find_model, load_model, load_tokenizer
from quip.models import Progress, attach_config, quantize_model, walk
from quip.plan import check_arguments, make_plan
from quip.resume import KeptBlocks, WorkFolder
from quip.shards import ShardedBlocks, Shards, Unfit, skeleton, weight_files
from quip.states import hidden_states

log = logging.getLogger("quip")

CONTENT = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")  # files that a model is made of


def quantize(
    model: PreTrainedModel,
    tokenizer=None,
    bits: int = 2,
    *,
    calibration: str | Iterable[str] | torch.Tensor = "c4",
    samples: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    **options,
) -> dict[str, dict]:
    """Quantize a model in memory, in place; returns the report of each layer.

    `calibration`: text, as `quip.data.load_text` knows it by name or file, or as strings, which are joined by empty
    lines; or token ids, `(tokens,)`, or samples `(count, seq_len)`. Of all but samples, `samples` windows of `seq_len`
    tokens are chosen by `seed`. Only token ids need no `tokenizer`. `options` (preset, skip, bits_for, offload,
    progress, method, …) as in `quip.models.quantize_model`. Raises `QuipError`, before the model is touched, for what
    cannot be.
    """
    if isinstance(calibration, torch.Tensor) and calibration.ndim == 2:
        chosen = calibration
    else:
        ids, source = token_ids(calibration, tokenizer)
        chosen = data.samples(ids, samples, seq_len, seed, source)
    check_length(model, chosen.shape[1])
    return quantize_model(model, chosen, bits, seed, **options)


def token_ids(calibration: str | Iterable[str] | torch.Tensor, tokenizer) -> tuple[torch.Tensor, str]:
    """Token ids `(tokens,)` of whatever is given as calibration text, and its source."""
    if isinstance(calibration, torch.Tensor):
        return calibration, "calibration"
    if tokenizer is None:
        raise QuipError("calibration text needs a tokenizer; only token ids do not")
    if isinstance(calibration, str):
        text = data.load_text(calibration, "calibration")
    else:
        text = data.Text("\n\n".join(calibration), "the strings given")
    return data.tokenize(tokenizer, text), text.source


def check_length(model: PreTrainedModel, seq_len: int) -> None:
    """Raise `QuipError` if a model has no positions for sequences of that length."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and seq_len > positions:
        raise QuipError(f"sequence length {seq_len} is out of range: this model takes up to {positions} tokens")


def quantize_to_folder(
    source: str,
    out: str | Path,
    bits: int = 2,
    *,
    calibration: str = "c4",
    samples: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    preset: str = "default",
    skip: Iterable[str] = (),
    bits_for: dict[str, int] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    offload: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **changes,
) -> dict:
    """Quantize the model `source` (as `quip.loading.load_model` finds it) into the checkpoint folder `out`.

    Of weights in safetensors, no more than one block is in memory at a time. Each finished block is kept in `OUT.part`,
    from which the same call goes on if this one ends early; it refuses if an argument, the model's files or the
    calibration text have changed, unless `restart` is given. Other arguments as in `quip.models.quantize_model` and
    `quip.loading.load_model`. The result is what `quip_report.json` in `out` says: `settings` and `layers`.
    """
    out, skip, bits_for = Path(out), list(skip), bits_for or {}
    choices = check_arguments(bits, seed, preset, bits_for, **changes)
    if not WorkFolder.ready(out):
        check_output(out, overwrite)
    text = data.load_text(calibration, "calibration")
    model, tokenizer, shards = open_model(source, device, dtype, trust_remote_code)
    check_length(model, seq_len)
    chosen = data.samples(data.tokenize(tokenizer, text), samples, seq_len, seed, text.source)
    plan = make_plan(model, bits, seed, preset, skip=skip, bits_for=bits_for, **changes)
    settings = {
        "model": source,
        "bits": bits,
        "skip": skip,
        "bits_for": bits_for,
        "preset": preset,
        **choices,
        "seed": seed,
        "calibration": text.source,
        "samples": samples,
        "seq_len": seq_len,
        "quip": version("quip-llm"),
    }
    arguments = {
        **settings,
        "device": str(torch.device(device)),
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "model fingerprint": fingerprint(source),
        "calibration fingerprint": hashlib.sha256(chosen.numpy().tobytes()).hexdigest(),
    }
    with WorkFolder(out, arguments, restart) as work:
        if not work.published():
            blocks = KeptBlocks(model, plan, work)
            if shards is not None:
                blocks = ShardedBlocks(model, plan, work, shards, device)
            with hidden_states(offload) as hidden:
                reports = walk(blocks, chosen, hidden, progress)
            attach_config(model, plan)
            dtype = model.dtype
            blocks.assemble()
            work.publish(model, tokenizer, reports, settings, dtype)
        work.remove()
    return json.loads((out / REPORT).read_text(encoding="utf-8"))


def open_model(
    source: str, device: str, dtype: torch.dtype | None, trust: bool = False
) -> tuple[PreTrainedModel, object, Shards | None]:
    """A model, its tokenizer and its shards, of which nothing is read yet; or no shards, and all of it in memory."""
    where, more = find_model(source)
    with explained(source):
        if "gguf_file" not in more:
            config = AutoConfig.from_pretrained(where, trust_remote_code=trust, **more)
            if getattr(config, "quantization_config", None) is not None:
                raise QuipError(f"{source} is quantized already")
            files = weight_files(where, **more)
            try:
                model = skeleton(where, config, default_dtype(device, dtype), trust, **more)
                return model, load_tokenizer(where, trust, **more), Shards(files, model)
            except Unfit as e:
                log.warning("%s is read whole, not block by block: %s", source, e)
    return *load_model(source, device, dtype, trust), None


def fingerprint(source: str) -> str:
    """A hash of all files of a model that lies here; the commit, of one in the hub's cache."""
    where, more = find_model(source)
    folder = Path(where)
    if not folder.is_dir():
        return Path(cached_file(where, "config.json", local_files_only=True)).parent.name
    files = [folder / more["gguf_file"]] if more else sorted(p for p in folder.iterdir() if p.suffix in CONTENT)
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as f:
            while part := f.read(1 << 24):
                whole.update(part)
    return whole.hexdigest()
