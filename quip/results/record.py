"""A record: what was measured, with everything that it depends on, as JSON that a diff can show."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from quip import data
from quip.cli import pick_device
from quip.info import finite
from quip.loading import load_model


def calibrated(args: argparse.Namespace) -> tuple:
    """The model, its tokenizer, calibration samples `(count, seq_len)`, and what a record says of them and this run."""
    text = data.load_text(args.calib, "calibration")
    model, tokenizer = load_model(args.model, pick_device(args.device))
    chosen = data.samples(data.tokenize(tokenizer, text), args.samples, args.seq_len, args.seed, text.source)
    about = {
        "command": args.command,  # as it was given, but for the folders of files: nobody else has them
        "model": short_name(args.model),
        "calibration": text.source,
        "tokens": chosen.numel(),
        "seed": args.seed,
        **provenance(model.device),
    }
    return model, tokenizer, chosen, about


def short_name(model: str) -> str:
    """A model's name; of a folder, only the last part."""
    return Path(model).name if Path(model).exists() else model


def provenance(device: torch.device) -> dict:
    """Commit, device and versions: what else a figure depends on."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "transformers", "numpy")},
    }


def read_record(path: str | Path) -> dict:
    """A record as it is; empty if there is none yet."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}


def write_record(path: str | Path, record: dict, quiet: bool = False) -> None:
    """Write a record as JSON, its figures to four digits, and null what is not finite; all at once or not at all."""

    def short(x):
        if isinstance(x, dict):
            return {key: short(value) for key, value in x.items()}
        if isinstance(x, list):
            return [short(value) for value in x]
        return float(f"{x:.4g}") if isinstance(x, float) else x

    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(out.name + ".part")
    lines = json.dumps(finite(short(record)), indent=1, ensure_ascii=False, allow_nan=False)
    # a list of figures on one line, so that a diff shows figures and not brackets
    flat = re.sub(r"\[\s*([^\[\]{}]*?)\s*\]", lambda m: f"[{' '.join(m[1].split())}]", lines)
    staging.write_text(flat + "\n", encoding="utf-8")
    staging.replace(out)
    if not quiet:
        print(out)
