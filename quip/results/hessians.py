"""The inputs of every linear layer of a model: their H, its spectrum and the bounds of chapter 6."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from quip import bounds, models
from quip.algorithm import PRESETS, column_order, quantize_matrix, to_grid
from quip.errors import QuipError
from quip.families import block_calls, decoder_blocks, quantizable, run_block, weight
from quip.incoherence import KroneckerTransform, mu_weights
from quip.layers import save_layers
from quip.ldlq import feedback_round, ldl
from quip.methods import choose, matrix_arguments
from quip.proxy import damp, proxy_loss
from quip.results.record import calibrated, write_record
from quip.rounding import nearest

EXAMPLES = ("model.layers.0.self_attn.o_proj", "model.layers.10.self_attn.q_proj")  # the layers that chapters show


@torch.no_grad()
def layer_moments(
    model: torch.nn.Module, samples: torch.Tensor, last: int | None = None
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """H of every linear layer's inputs in the unquantized model, block by block, up to block `last`.

    Yields ({full name: W (m, n)}, H (n, n)), once for all the layers that share an input.
    """
    prefix, blocks = decoder_blocks(model)
    hidden, calls = block_calls(model, samples)
    for i, block in enumerate(tqdm(blocks[: None if last is None else last + 1], unit="block")):
        layers, call = quantizable(block), calls[i]
        for names, moment in models.input_moments(block, hidden, call):
            yield {f"{prefix}.{i}.{name}": weight(layers[name]).detach() for name in names}, moment.H
        hidden = [run_block(block, x, call) for x in hidden]


def run_example_layers(args: argparse.Namespace) -> None:
    """W and H of the two layers that the chapters show"""
    model, _, samples, about = calibrated(args)
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


def run_layers(args: argparse.Namespace) -> None:
    """H of every layer's inputs, the bounds of chapter 6, and what LDLQ loses beside them"""
    start = time.perf_counter()
    model, _, samples, about = calibrated(args)
    inputs, layers = {}, {}
    for weights, H in layer_moments(model, samples):
        first = next(iter(weights))
        V_seed = models.layer_seed(args.seed, f"{first}/V")
        inputs[first] = {"layers": list(weights), **describe_hessian(H), "traces": describe_traces(H, V_seed)}
        for name, W in weights.items():
            seeds = (V_seed, models.layer_seed(args.seed, f"{name}/U"))
            layers[name] = {"input": first, **measure_layer(W, H, seeds, name)}
    about["seconds"] = round(time.perf_counter() - start)
    write_record(args.out or "book/results/layers.json", {"about": about, "inputs": inputs, "layers": layers})


def describe_hessian(H: torch.Tensor) -> dict:
    """The spectrum of H, in shares of tr H, and the channels that its heaviest eigenvectors are made of."""
    values, Q = bounds.eigen(H)
    values, Q, n = values.flip(0), Q.flip(1), len(H)
    ranks = sorted({round(x) for x in torch.logspace(0, math.log10(n), 48, dtype=torch.float64).tolist()})
    top = []
    for j in range(3):
        weight, channel = Q[:, j].square().topk(3)
        channels = [[c, w] for c, w in zip(channel.tolist(), weight.tolist(), strict=True)]
        top.append({"share": (values[j] / values.sum()).item(), "channels": channels})
    return {
        "n": n,
        "trace": H.trace().item(),
        "effective_rank": bounds.effective_rank(H),
        "rank_1percent": int((values > 0.01 * values[0]).sum()),
        "ranks": ranks,
        "eigenvalues": [(values[r - 1] / values.sum()).item() for r in ranks],
        "top": top,
        "diagonal": {"max_over_median": (H.diagonal().max() / H.diagonal().median()).item()},
    }


def describe_traces(H: torch.Tensor, seed: int) -> dict:
    """Every term of the chain of bounds over tr H, H damped: in the layer's own basis, then in that of the seed."""
    H = damp(H, PRESETS["default"]["alpha"], PRESETS["default"]["center"])
    rotated = KroneckerTransform(len(H), seed, torch.float64).both_sides(H)
    columns = column_order(rotated)
    (values, Q), t = bounds.eigen(H), H.trace()
    mus = [math.sqrt(len(H)) * X.abs().max().item() for X in (Q, bounds.eigen(rotated)[1])]
    root = values.sqrt().sum() ** 2 / len(H) / t
    return {
        "mu": mus,
        "lemma_2": [(mu**2 * root).item() for mu in mus],
        "effective_rank": bounds.effective_rank(H),
        "least": bounds.least_trace(H).left / t.item(),
        "formula": bounds.random_basis_trace(values) / t.item(),
        "own": (ldl(H)[1].sum() / t).item(),
        "rotated": (ldl(rotated)[1].sum() / t).item(),
        "sorted": (ldl(rotated[columns][:, columns])[1].sum() / t).item(),
    }


def measure_layer(W: torch.Tensor, H: torch.Tensor, seeds: tuple[int, int], name: str) -> dict:
    """Losses of one layer in units of (m/12) tr H steps², on the default's 2-bit grid, against the damped H.

    `ldlq` and `nearest` round to all integers; `quip` is the default in full: clamped, then improved by greedy passes.
    """
    W = W.double()
    q = quantize_matrix(W, H, 2, seeds=seeds, name=name, **matrix_arguments(choose()))
    W_, H_ = q.basis.enter(W, damp(H, q.settings["alpha"], q.settings["center"]))
    columns = column_order(H_)
    H_, target, codes = H_[columns][:, columns], to_grid(W_, q.scale, q.bits)[:, columns], q.codes[:, columns].double()
    roundings = {"ldlq": feedback_round(target, ldl(H_)[0]), "nearest": nearest(target), "quip": codes}
    unit = len(W) / 12 * H_.trace().item()
    return {
        "shape": list(W.shape),
        "mu_weights": [mu_weights(W), mu_weights(W_)],
        "losses": {rule: proxy_loss(x, target, H_) / unit for rule, x in roundings.items()},
        "report": q.report,
    }
