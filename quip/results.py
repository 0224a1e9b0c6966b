"""Recorded experiments: `python -m quip.results NAME` measures once what the book's figures show."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from quip import data, models
from quip.cli import fail, pick_device, quiet_transformers, show_own_warnings
from quip.errors import QuipError
from quip.layers import save_layers

EXAMPLES = ("model.layers.0.self_attn.o_proj", "model.layers.10.self_attn.q_proj")  # the layers that chapters show


def main(argv: list[str] | None = None) -> None:
    """Run one experiment and write its file. Exit status 2 and one line on stderr for bad input."""
    parser = argparse.ArgumentParser(prog="python -m quip.results", description=__doc__)
    parser.add_argument(
        "name", choices=EXPERIMENTS, help="; ".join(f"{k}: {f.__doc__}" for k, f in EXPERIMENTS.items())
    )
    parser.add_argument("--model", default="smollm2", help="as for quip quantize (default: smollm2)")
    parser.add_argument("--calib", default="c4", metavar="DATA", help="calibration text (default: c4)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    parser.add_argument("--out", help="file to write (default: in book/results or book/data)")
    args = parser.parse_args(argv)
    show_own_warnings()
    quiet_transformers()
    try:
        EXPERIMENTS[args.name](args)
    except QuipError as e:
        sys.exit(fail(str(e), 2))


def calibrated(args: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor, dict]:
    """The model, its calibration samples `(count, seq_len)`, and what a record says about both and about this run."""
    text = data.load_text(args.calib, "calibration")
    model, tokenizer = models.load_model(args.model, pick_device(args.device))
    chosen = data.samples(data.tokenize(tokenizer, text), args.samples, args.seq_len, args.seed, text.source)
    about = {
        "command": f"python -m quip.results {args.name} --calib {args.calib}"
        f" --samples {args.samples} --seq-len {args.seq_len} --seed {args.seed}",
        "model": args.model,
        "calibration": text.source,
        "tokens": chosen.numel(),
        "seed": args.seed,
        **provenance(model.device),
    }
    return model, chosen, about


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


@torch.no_grad()
def layer_moments(
    model: torch.nn.Module, samples: torch.Tensor, last: int | None = None
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """H of every linear layer's inputs in the unquantized model, block by block, up to block `last`.

    Yields ({full name: W (m, n)}, H (n, n)), once for all the layers that share an input.
    """
    prefix, blocks = models.decoder_blocks(model)
    hidden, others = models.block_inputs(model, samples)
    for i, block in enumerate(tqdm(blocks[: None if last is None else last + 1], unit="block")):
        layers = models.linear_layers(block)
        for names, moment in models.input_moments(block, hidden, others):
            yield {f"{prefix}.{i}.{name}": layers[name].weight for name in names}, moment.H
        hidden = [models.run_block(block, x, others) for x in hidden]


def run_example_layers(args: argparse.Namespace) -> None:
    """W and H of the two layers that the chapters show"""
    model, samples, about = calibrated(args)
    last = max(int(name.split(".")[2]) for name in EXAMPLES)
    found = {
        name: (W, H)
        for weights, H in layer_moments(model, samples, last)
        for name, W in weights.items()
        if name in EXAMPLES
    }
    missing = set(EXAMPLES) - set(found)
    if missing:
        raise QuipError(f"{args.model} has no layer {', '.join(sorted(missing))}")
    out = Path(args.out or "book/data/smollm2.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_layers(out, found, {"about": json.dumps(about)})
    print(f"{out}: {', '.join(found)}, {out.stat().st_size / 1e6:.2f} MB")


EXPERIMENTS = {"example-layers": run_example_layers}

if __name__ == "__main__":
    main()
