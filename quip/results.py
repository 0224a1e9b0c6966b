"""Recorded experiments: `python -m quip.results NAME` measures once what the book's figures show."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from quip import bench, bench_cuda, bounds, cpu, data, evaluate, models, needs
from quip.algorithm import PRESETS, column_order, quantize_matrix, to_grid
from quip.cli import ProgressBar, fail, pick_device, print_rows, quiet_transformers, show_own_warnings
from quip.errors import QuipError
from quip.families import block_calls, decoder_blocks, quantizable, run_block, weight
from quip.incoherence import KroneckerTransform, mu_weights
from quip.info import finite, mean_loss
from quip.layers import save_layers
from quip.ldlq import feedback_round, ldl
from quip.loading import load_model
from quip.methods import choose, matrix_arguments
from quip.proxy import damp, proxy_loss, relative_proxy_loss
from quip.rounding import nearest

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
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="of all but layers (default: 2 3 4)")
    parser.add_argument("--every", type=int, default=5, metavar="N", help="of defaults: one block in N (default: 5)")
    parser.add_argument("--variants", nargs="+", default=["default"], help=f"of perplexity: {', '.join(VARIANTS)}")
    parser.add_argument("--max-tokens", type=int, default=12288, help="of perplexity (default: 12288)")
    parser.add_argument("--eval-len", type=int, default=2048, help="of perplexity: tokens in a window (default: 2048)")
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    parser.add_argument("--out", help="file to write (default: in book/results or book/data)")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    shown = (Path(x).name if Path(x).is_absolute() or Path(x).exists() else x for x in given)
    args.command = shlex.join(["python", "-m", "quip.results", *shown])
    show_own_warnings()
    quiet_transformers()
    try:
        EXPERIMENTS[args.name](args)
    except QuipError as e:
        sys.exit(fail(str(e), 2))


def calibrated(args: argparse.Namespace) -> tuple:
    """The model, its tokenizer, calibration samples `(count, seq_len)`, and what a record says of them and this run."""
    text = data.load_text(args.calib, "calibration")
    model, tokenizer = load_model(args.model, pick_device(args.device))
    chosen = data.samples(data.tokenize(tokenizer, text), args.samples, args.seq_len, args.seed, text.source)
    about = {
        "command": args.command,  # as it was given, but for the folders of files: nobody else has them
        "model": Path(args.model).name if Path(args.model).exists() else args.model,
        "calibration": text.source,
        "tokens": chosen.numel(),
        "seed": args.seed,
        **provenance(model.device),
    }
    return model, tokenizer, chosen, about


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


def run_perplexity(args: argparse.Namespace) -> None:
    """Perplexity on WikiText-2 of the model quantized with each of --variants, at each of --bits; resumes its file"""
    unknown = set(args.variants) - VARIANTS.keys()
    if unknown:
        raise QuipError(f"unknown variant {', '.join(sorted(unknown))}: there are {', '.join(VARIANTS)}")
    model, tokenizer, samples, about = calibrated(args)
    text = data.load_text("wikitext2", "evaluation")
    ids = data.tokenize(tokenizer, text)[: args.max_tokens]
    about |= {"evaluation": text.source, "evaluation_tokens": len(ids), "evaluation_window": args.eval_len}
    out = args.out or "book/results/perplexity.json"
    rows = recorded_rows(out, about)
    wanted = [("16 bits", 16), *((variant, bits) for variant in args.variants for bits in args.bits)]
    for variant, bits in wanted:
        if any((row["variant"], row["bits"]) == (variant, bits) for row in rows):
            continue
        start, copied, more = time.perf_counter(), copy.deepcopy(model), {}
        if bits < 16:
            changes = {"progress": ProgressBar(), **VARIANTS[variant]}
            reports = models.quantize_model(copied, samples, bits, args.seed, **changes)
            more["mean_loss"] = mean_loss(reports)
        more |= evaluate.perplexity(copied, ids, args.eval_len)
        more |= {"seconds": round(time.perf_counter() - start), "commit": about["commit"]}
        rows.append({"variant": variant, "bits": bits, **more})
        write_record(out, {"about": about, "rows": rows})


def recorded_rows(path: str, about: dict) -> list[dict]:
    """The rows that a record already has, if what it is about is the same but for who ran it, when and on what."""
    if not Path(path).exists():
        return []
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    free = {"command", "commit", "device", "versions"}
    differ = [key for key in sorted(about.keys() - free) if record["about"].get(key) != about[key]]
    if differ:
        raise QuipError(f"{path} is about another {', '.join(differ)}: move it away, or name another --out")
    return record["rows"]


def run_kernels(args: argparse.Namespace) -> None:
    """Speed of packed layers on one thread of the CPU beside dense ones, weights streamed from memory"""
    torch.set_num_threads(1)
    about = {"command": args.command, **provenance(torch.device("cpu")), "backend": cpu.backend(), "threads": 1}
    rows = list(print_rows(bench.bench_kernels(widths=args.bits, batches=(1, 8, 32), repeats=4)))
    write_record(args.out or "book/results/kernels.json", {"about": about, "rows": rows})


def run_generate(args: argparse.Namespace) -> None:
    """Tokens a second of --model quantized (calibrated on --samples), beside --model in bfloat16, batch 1"""
    model, tokenizer, samples, about = calibrated(args)
    compared = {f"{about['model']}, bfloat16": copy.deepcopy(model).bfloat16()}
    for bits in args.bits:
        copied = copy.deepcopy(model)
        # the codes make no difference to the speed
        models.quantize_model(copied, samples, bits, args.seed, passes=0, progress=ProgressBar())
        for dtype in ("bfloat16", "float32"):
            compared[f"{bits} bits, {dtype}"] = copy.deepcopy(copied).to(getattr(torch, dtype))
    about |= {"backend": cpu.backend(), "prompt": "The three states of matter are"}
    rows = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        measured = bench.bench_generate(compared, tokenizer, about["prompt"], tokens=48, repeats=5)
        rows += print_rows({"threads": threads, **row} for row in measured)
    write_record(args.out or "book/results/generate.json", {"about": about, "rows": rows})


def run_cuda(args: argparse.Namespace) -> None:
    """Speed of packed layers, and of a Llama of 7B's shape with random weights, on a GPU beside float16"""
    bench_cuda.need_device()
    about = {"command": args.command, **provenance(torch.device("cuda"))}
    about["read_gb_per_s"] = bench_cuda.read_bandwidth() / 1e9
    rows = list(print_rows(bench_cuda.bench_kernels(widths=args.bits, batches=(1, 4, 8, 16, 32, 512))))
    wide = bench_cuda.bench_kernels(bench_cuda.SIZES[:1], args.bits[:1], (1,), torch.float32)
    rows += print_rows(wide)
    decode = list(print_rows(bench_cuda.bench_decode((*args.bits, 16))))
    write_record(args.out or "book/results/cuda.json", {"about": about, "rows": rows, "decode": decode})


def run_needs(args: argparse.Namespace) -> None:
    """Memory, disk and time that whole models take, computed from parts measured here on one thread"""
    about = {"command": args.command, **provenance(torch.device("cpu")), "threads": 1}
    parts = needs.measure_parts(4096)
    rows = [{"model": name, "bits": 2, **needs.needs(shapes, parts)} for name, shapes in needs.MODELS.items()]
    write_record(args.out or "book/results/needs.json", {"about": about, "parts": parts, "rows": rows})


def write_record(path: str, record: dict) -> None:
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
    print(out)


EXPERIMENTS = {
    "layers": run_layers,
    "example-layers": run_example_layers,
    "defaults": run_defaults,
    "perplexity": run_perplexity,
    "kernels": run_kernels,
    "generate": run_generate,
    "cuda": run_cuda,
    "needs": run_needs,
}

if __name__ == "__main__":
    main()
