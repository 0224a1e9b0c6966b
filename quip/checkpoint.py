"""A checkpoint on disk: written beside its place and moved there at the end, all at once or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from quip.errors import QuipError

REPORT = "quip_report.json"
SHARD = "2GB"  # the most that a weight file holds; writing takes as much memory


def save_model(
    model: PreTrainedModel,
    tokenizer,
    out: str | Path,
    reports: dict[str, dict],
    settings: dict,
    overwrite: bool = False,
) -> Path:
    """Write a quantized model as a checkpoint folder: all at once, or, if anything fails or interrupts, not at all.

    Safetensors, config.json, the tokenizer's files and `quip_report.json` (`settings` and the layers' `reports`).
    Raises `QuipError` if `out` exists and `overwrite` is not given, or is something other than a checkpoint of ours.
    """
    out = Path(out)
    check_output(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_files(staging / "new", model, tokenizer, reports, settings)
        publish(staging / "new", out, staging / "old")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def check_output(out: Path, overwrite: bool) -> None:
    """Raise `QuipError` unless a checkpoint may be written to `out`: only our own checkpoints are ever replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / REPORT).is_file():
        raise QuipError(f"{out} exists and is not a quip checkpoint: choose another name")
    if not overwrite:
        raise QuipError(f"{out} exists: choose another name, or allow it to be overwritten (--overwrite)")


def write_files(
    folder: Path, model: PreTrainedModel, tokenizer, reports: dict, settings: dict, dtype: torch.dtype | None = None
) -> None:
    """The files of a checkpoint, in a new folder and all on the disk; `dtype`, if given, is what it will load in."""
    folder.mkdir()
    model.save_pretrained(folder, max_shard_size=SHARD)
    if dtype is not None:
        model.config.dtype = dtype
        model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {"settings": settings, "layers": reports}
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        flush(path)


def publish(folder: Path, out: Path, replaced: Path) -> None:
    """Rename a finished folder to `out`; what was there, if anything, is renamed to `replaced` first."""
    if out.exists():
        out.rename(replaced)
    try:
        folder.rename(out)
    except BaseException:
        if replaced.exists():
            replaced.rename(out)
        raise
    flush(out.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary path)`, and rename what it wrote to `path` once it is on the disk."""
    part = path.with_name(f"{path.name}.tmp")
    write(part)
    flush(part)
    part.replace(path)
    flush(path.parent)
