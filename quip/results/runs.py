"""The runs of each experiment on whole models: what is varied, and what stays as the default has it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace

from quip.errors import QuipError

SELF = "self"  # calibration text that the unquantized model wrote


@dataclass(frozen=True)
class Run:
    """One model to be quantized: `changes` as in `quip.methods.choose`, and the calibration set.

    `rows`: with a scale for each row of W in place of one for the matrix.
    """

    variant: str
    bits: int
    changes: dict = field(default_factory=dict)
    calib: str = "c4"
    samples: int = 64
    seq_len: int = 1024
    seed: int = 0
    rows: bool = False


NONE = {"incoherence": "none"}
# As OPTQ has it: the grid of a row reaches its largest weight.
OWN = {**NONE, "alpha": 0.01, "center": "mean", "rho": "max"}
METHODS = {
    "near": {"method": "near", **OWN},
    "optq": {"method": "optq", **OWN},
    "ldlq": {"method": "ldlq", **OWN},
    "ldlq-rg": {"method": "ldlq-rg", **OWN},
    "greedy": {"method": "greedy", **OWN},
    "near + incoherence": {"method": "near"},
    "quip": {"method": "ldlq"},
    "quip-rg": {"method": "ldlq-rg"},
    "published": {"preset": "paper"},
    "default": {},
}

# From the published setting without any of its processing, to all of it, to ours; ldlq throughout.
PLAIN = {"preset": "paper", "rescale": False, "rho": "max", "pre_clamp": False}
STEPS = {
    "none": {**PLAIN, **NONE},
    "rescale": {**PLAIN, **NONE, "rescale": True},
    "transform": PLAIN,
    "rescale + transform": {**PLAIN, "rescale": True},
    "rescale + transform + range": {"preset": "paper"},
    "transform + range searched": {**PLAIN, "rho": "search"},
    "default": {},
    "default, rescaled": {"rescale": True},
}


def varied(args: argparse.Namespace, variants: dict[str, dict]) -> list[Run]:
    """Each of the variants at each of `--bits`; what calibrates them is given on the command line."""
    rest = {"calib": args.calib, "samples": args.samples, "seq_len": args.seq_len, "seed": args.seed}
    return [Run(name, bits, changes, **rest) for name, changes in variants.items() for bits in args.bits]


def methods(args: argparse.Namespace) -> list[Run]:
    """Every rounding method, in the model's own basis, with a scale for each row, and in an incoherent one"""
    return [replace(run, rows="incoherence" in run.changes) for run in varied(args, METHODS)]


def incoherence(args: argparse.Namespace) -> list[Run]:
    """The steps of incoherence processing, with and without the permutation in its transforms"""
    rotated = {name: x for name, x in STEPS.items() if NONE.items() - x.items()}
    straight = {f"{name}, no permutation": {**x, "permute": False} for name, x in rotated.items()}
    return varied(args, STEPS | straight)


def passes(args: argparse.Namespace) -> list[Run]:
    """Greedy passes after the default's rounding"""
    return varied(args, {f"{count} passes": {"passes": count} for count in (0, 1, 2, 3, 5, 10)})


def calibration(args: argparse.Namespace) -> list[Run]:
    """Calibration sets from 2k to 256k tokens, and text that the model wrote itself beside the text given"""
    own = [replace(run, variant="its own text", calib=SELF) for run in varied(args, {"": {}})]
    # the smallest first: a text that runs short ends the experiment
    sizes = [
        replace(run, variant=f"{2 << k}k tokens", samples=(2048 << k) // args.seq_len)
        for k in range(8)
        if 2048 << k >= args.seq_len
        for run in varied(args, {"": {}})
    ]
    return own + sizes


def seeds(args: argparse.Namespace) -> list[Run]:
    """Five seeds, each with its own transforms and its own choice of calibration samples"""
    five = range(args.seed, args.seed + 5)
    return [replace(run, variant=f"seed {seed}", seed=seed) for seed in five for run in varied(args, {"": {}})]


def zeroshot(args: argparse.Namespace) -> list[Run]:
    """Zero-shot tasks: the default, and the published setting"""
    return varied(args, {name: METHODS[name] for name in ("default", "published")})


EXPERIMENTS = {f.__name__: f for f in (methods, incoherence, passes, calibration, seeds, zeroshot)}


def select(runs: list[Run], variants: list[str] | None) -> list[Run]:
    """The runs of the variants that were asked for. Raises `QuipError` for a variant that the experiment has not."""
    known = dict.fromkeys(run.variant for run in runs)
    if unknown := [name for name in variants or () if name not in known]:
        raise QuipError(f"unknown variant {', '.join(unknown)}: there are {', '.join(known)}")
    return [run for run in runs if variants is None or run.variant in variants]
