"""Every choice that the default could have made otherwise, on text that no layer was calibrated on."""

from __future__ import annotations

import argparse
import time

import torch

from quip import models
from quip.algorithm import quantize_matrix
from quip.methods import choose, matrix_arguments
from quip.proxy import relative_proxy_loss
from quip.results.hessians import layer_moments
from quip.results.record import calibrated, write_record

VARIANTS = {  # what could be chosen otherwise, as changes to the default
    "default": {},
    "paper": {"preset": "paper"},
    "own basis": {"incoherence": "none"},
    "no permutation": {"permute": False},
    "rescaled": {"rescale": True},
    "columns as they stand": {"order": False},
    "range 2.4": {"rho": 2.4},
    "clamped before": {"pre_clamp": True},
    "damping 0.01, mean": {"alpha": 0.01, "center": "mean"},
    "damping 0.01, median": {"alpha": 0.01},
    "damping 1, median": {"alpha": 1.0},
    **{f"{passes} passes": {"passes": passes} for passes in (0, 1, 2, 5, 10)},
}


def run_defaults(args: argparse.Namespace) -> None:
    """Proxy loss on held-out text of every choice that the default could have made otherwise"""
    start = time.perf_counter()
    wanted = args.samples
    args.samples += max(wanted // 4, 1)  # windows that no layer is calibrated on
    model, _, samples, about = calibrated(args)
    fresh = torch.linspace(0, len(samples) - 1, len(samples) - wanted).round().long()
    seen = torch.tensor([i for i in range(len(samples)) if i not in fresh.tolist()])
    about |= {"tokens": samples[seen].numel(), "held_out_tokens": samples[fresh].numel(), "every": args.every}
    layers = {}
    pairs = zip(layer_moments(model, samples[seen]), layer_moments(model, samples[fresh]), strict=True)
    for (weights, H), (_, H_fresh) in pairs:
        for name, W in weights.items():
            if int(name.split(".")[-3]) % args.every == args.every // 2:
                layers[name] = {bits: compare(W, H, H_fresh, bits, name, args.seed) for bits in args.bits}
    about["seconds"] = round(time.perf_counter() - start)
    write_record(args.out or "book/results/defaults.json", {"about": about, "layers": layers})


def compare(W: torch.Tensor, H: torch.Tensor, H_fresh: torch.Tensor, bits: int, name: str, seed: int) -> dict:
    """Relative proxy loss of every variant, on the text it was calibrated on and on fresh text."""
    losses = {}
    for variant, changes in VARIANTS.items():
        arguments = matrix_arguments(choose(**changes), seed)
        seeds = (models.layer_seed(seed, f"{name}/V"), models.layer_seed(seed, f"{name}/U"))
        q = quantize_matrix(W, H, bits, seeds=seeds, name=name, **arguments)
        fresh = relative_proxy_loss(q.dequantize(), W.double(), H_fresh)
        losses[variant] = [q.report["relative_proxy_loss"], fresh]
    return losses
