"""Speed and size: of packed layers, of decoding, and of quantizing whole models."""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from quip import bench, bench_cuda, cpu, models, needs
from quip.cli import ProgressBar, print_rows
from quip.errors import QuipError
from quip.info import checkpoint_info
from quip.results.record import calibrated, provenance, read_record, short_name, write_record


def run_kernels(args: argparse.Namespace) -> None:
    """Speed of packed layers on one thread of the CPU beside dense ones, weights streamed from memory"""
    torch.set_num_threads(1)
    about = {"command": args.command, **provenance(torch.device("cpu")), "backend": cpu.backend(), "threads": 1}
    rows = list(print_rows(bench.bench_kernels(widths=args.bits, batches=(1, 8, 32), repeats=4)))
    write_record(args.out or "book/results/kernels.json", {"about": about, "rows": rows})


PROMPTS = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))


def run_prompts(args: argparse.Namespace) -> None:
    """Speed of packed layers on one thread of the CPU for prompts of 32 to 2048 tokens, beside dense ones"""
    torch.set_num_threads(1)
    about = {"command": args.command, **provenance(torch.device("cpu")), "backend": cpu.backend(), "threads": 1}
    found = bench.bench_kernels(PROMPTS, args.bits, batches=(32, 128, 512, 2048))
    rows = list(print_rows(row for row in found if row["stage"] == "layer"))
    write_record(args.out or "book/results/prompts.json", {"about": about, "rows": rows})


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
    out = Path(args.out or "book/results/cuda.json")
    old = read_record(out)  # what kernels that are no more took on that card stays
    gone = {key: old[key] for key in ("first", "steps") if key in old}
    about = {"command": args.command, **provenance(torch.device("cuda"))}
    about["read_gb_per_s"] = bench_cuda.read_bandwidth() / 1e9
    rows = list(print_rows(bench_cuda.bench_kernels(widths=args.bits, batches=(1, 4, 8, 16, 32, 512, 2048))))
    wide = bench_cuda.bench_kernels(bench_cuda.SIZES[:1], args.bits[:1], (1,), torch.float32)
    rows += print_rows(wide)
    decode = list(print_rows(bench_cuda.bench_decode((*args.bits, 16))))
    eager = list(print_rows(bench_cuda.bench_calls(widths=args.bits)))
    write_record(out, {"about": about, "rows": rows, **gone, "decode": decode, "eager": eager})


def run_needs(args: argparse.Namespace) -> None:
    """Memory, disk and time that whole models take, computed from parts measured here on one thread"""
    about = {"command": args.command, **provenance(torch.device("cpu")), "threads": 1}
    parts = needs.measure_parts(4096)
    rows = [{"model": name, "bits": 2, **needs.needs(shapes, parts)} for name, shapes in needs.MODELS.items()]
    write_record(args.out or "book/results/needs.json", {"about": about, "parts": parts, "rows": rows})


def run_cost(args: argparse.Namespace) -> None:
    """Time and memory of quip quantize at each of --bits, as a process of its own, and the size of the result"""
    about = {"command": args.command, **provenance(torch.device("cpu")), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        rows = list(print_rows(quantize_cost(args, bits, Path(folder, str(bits))) for bits in args.bits))
    write_record(args.out or "book/results/cost.json", {"about": about, "rows": rows})


def quantize_cost(args: argparse.Namespace, bits: int, out: Path) -> dict:
    """Seconds, and peak memory of the process in GB, of one `quip quantize`; what its checkpoint holds."""
    options = {"bits": bits, "calib": args.calib, "samples": args.samples, "seq-len": args.seq_len, "seed": args.seed}
    command = [sys.executable, "-m", "quip", "quantize", args.model, str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, *(f"--{key}={value}" for key, value in options.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process.stderr:
        message = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        reason = message.strip().splitlines()[-1].removeprefix("quip: error: ")
        raise QuipError(f"quip quantize failed: {reason}")
    seconds, totals = time.perf_counter() - start, checkpoint_info(out)["totals"]
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    row = {"model": short_name(args.model), "bits": bits, "tokens": args.samples * args.seq_len, "seconds": seconds}
    sizes = {key: totals[key] for key in ("bits_per_weight", "file_bytes", "quantized_weights")}
    return {**row, "peak_gb": used.ru_maxrss * unit / 1e9, **sizes}
