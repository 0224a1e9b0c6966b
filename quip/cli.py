"""The command line: quip quantize, eval, generate, info, bench."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from quip import __version__
from quip.errors import QuipError
from quip.tasks import TASKS


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exit status: 0, 2 for bad input (one line on stderr), 130 when interrupted."""
    show_own_warnings()
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except QuipError as e:
        sys.exit(fail(str(e), 2))
    except KeyboardInterrupt as e:
        sys.exit(fail(f"interrupted: {e}" if str(e) else "interrupted", 130))


def show_own_warnings() -> None:
    """Warnings of this package go to stderr; what other packages log stays out of the way."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("quip: %(message)s"))
    logging.getLogger("quip").handlers = [handler]


def fail(message: str, status: int) -> int:
    print(f"quip: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, the function that carries it out."""
    parser = argparse.ArgumentParser(prog="quip", description="QuIP: 2-, 3- and 4-bit language models.")
    parser.add_argument("--version", action="version", version=f"quip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model = "a hub name, a folder, a .gguf file, or smollm2"
    data = "wikitext2, c4, ptb, python-docs, or a .txt or .jsonl file"

    p = commands.add_parser("quantize", help="quantize a model and save it as a checkpoint")
    p.add_argument("model", help=model)
    p.add_argument("out", help="folder to write")
    p.add_argument("--bits", type=int, required=True, help="2, 3 or 4")
    p.add_argument("--calib", default="c4", metavar="DATA", help=f"calibration text: {data} (default: c4)")
    p.add_argument("--samples", type=int, default=64, help="calibration samples (default: 64)")
    p.add_argument("--seq-len", type=int, default=1024, help="tokens in a sample (default: 1024)")
    p.add_argument("--seed", type=int, default=0, help="of samples and transforms (default: 0)")
    layers = p.add_argument_group("layers", "patterns for full names, such as model.layers.0.mlp.up_proj")
    layers.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="keep in 16 bits; repeatable")
    layers.add_argument("--bits-for", action="append", default=[], metavar="PATTERN=B", help="other widths; repeatable")
    add_choices(p.add_argument_group("method"))
    p.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    p.add_argument("--offload", metavar="FOLDER", help="keep activations in a file there instead of in memory")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it is a checkpoint of quip")
    p.add_argument("--restart", action="store_true", help="throw away the work of an unfinished run in OUT.part")
    add_trust(p)
    p.set_defaults(run=run_quantize)

    p = commands.add_parser("eval", help="measure perplexity, or accuracy on zero-shot tasks")
    p.add_argument("model", help=f"{model}, or a checkpoint")
    p.add_argument("--data", help=f"text for perplexity: {data} (default: wikitext2; with --tasks: none)")
    p.add_argument("--seq-len", type=int, help="tokens in a window (default: 2048)")
    p.add_argument("--max-tokens", type=int, help="read no more than this many tokens")
    tasks = p.add_argument_group("zero-shot tasks", "as lm-eval has them (pip install 'quip-llm[tasks]')")
    tasks.add_argument(
        "--tasks",
        metavar="NAMES",
        help=f"of {', '.join(TASKS)}, joined by commas; in place of perplexity, or beside it if --data is given",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    tasks.add_argument("--batch-size", type=int, metavar="N", help="texts at a time (default: 8)")
    p.add_argument("--json", metavar="FILE", help="write the result to FILE")
    p.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    add_trust(p)
    p.set_defaults(run=run_eval)

    p = commands.add_parser("generate", help="continue a prompt")
    p.add_argument("model", metavar="DIR", help=f"a checkpoint, or {model}")
    p.add_argument("prompt")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    add_trust(p)
    p.set_defaults(run=run_generate)

    p = commands.add_parser("info", help="show what a checkpoint holds")
    p.add_argument("folder", metavar="DIR")
    p.add_argument("--json", metavar="FILE", help="write it to FILE")
    p.set_defaults(run=run_info)

    p = commands.add_parser("bench", help="measure the speed of this machine")
    p.add_argument(
        "what",
        choices=("quantize", "kernels", "generate"),
        help="quantize: LDLQ and greedy passes beside one matrix product; kernels: packed layers beside dense ones; "
        "generate: decoding with a checkpoint beside the model it was made from",
    )
    p.add_argument("models", nargs="*", metavar="MODEL", help="of generate: the checkpoint, and the model beside it")
    p.add_argument("--bits", type=int, nargs="+", help="2, 3 or 4 (default: 2 for quantize, all for kernels)")
    p.add_argument("--sizes", metavar="MxN", nargs="+", help="of the weights, such as 4096x4096 (default: several)")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="of kernels (default: 1 8 32)")
    p.add_argument("--tokens", type=int, default=64, help="of generate (default: 64)")
    p.add_argument("--dtype", default="bfloat16", help="of generate: of both models (default: bfloat16)")
    p.add_argument("--device", help="of kernels and generate: cpu, cuda, … (default: cuda if there is one)")
    p.add_argument("--threads", type=int, help="of the CPU (default: as torch has it)")
    p.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts (default: 3)")
    p.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    p.set_defaults(run=run_bench)
    return parser


def add_trust(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; never done otherwise",
    )


def add_choices(p: argparse._ArgumentGroup) -> None:
    """Options for every step of the method; what is not given is the preset's (`quip.methods.choose`)."""
    on_or_off = argparse.BooleanOptionalAction
    p.add_argument("--preset", default="default", help="default, or paper: the published setting")
    p.add_argument("--method", help="near, stoch, ldlq, optq, ldlq-rg, greedy or admm, in place of the preset's")
    p.add_argument("--passes", type=int, help="greedy passes after rounding")
    p.add_argument("--incoherence", metavar="KIND", help="kron (Kronecker transforms) or none")
    p.add_argument("--permute", action=on_or_off, help="a random permutation in each transform")
    p.add_argument(
        "--rescale", action=on_or_off, help="rescale the columns of W by the fourth root of diag(H)/diag(WᵀW)"
    )
    p.add_argument("--order", action=on_or_off, help="round the columns of largest diag(H) first")
    p.add_argument(
        "--range", dest="rho", metavar="RHO", help="the grid's half width in RMS of the weights, search, or max"
    )
    p.add_argument("--pre-clamp", action=on_or_off, help="clamp W to the grid before it is rounded")
    p.add_argument("--alpha", type=float, help="damping, as a share of the centre of diag(H)")
    p.add_argument("--center", metavar="KIND", help="of diag(H): mean or median")


CHOICES = ("method", "passes", "incoherence", "permute", "rescale", "order", "rho", "pre_clamp", "alpha", "center")


def given_choices(args: argparse.Namespace) -> dict:
    """The options of `add_choices` that were given, by name."""
    changes = {key: getattr(args, key) for key in CHOICES if getattr(args, key) is not None}
    if changes.get("rho", "search") not in ("search", "max"):
        try:
            changes["rho"] = float(changes["rho"])
        except ValueError:
            raise QuipError(f"--range must be a number, search or max, got {changes['rho']!r}") from None
    return changes


def pick_device(name: str | None) -> str:
    """The device of that name, or a GPU if there is one. Raises `QuipError` if torch cannot use it."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise QuipError(f"cannot use device {name!r}: {str(e).splitlines()[0]}") from None
    return name


def write_json(file: str, content: dict | list) -> None:
    from quip.info import finite

    try:
        Path(file).write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as e:
        raise QuipError(f"cannot write {file}: {e.strerror}") from None


class ProgressBar:
    """A bar on stderr that `progress` of `quip.quantize` and others moves on, block by block."""

    def __init__(self):
        self.bar = None

    def __call__(self, done: int, count: int, reports: dict[str, dict]) -> None:
        from tqdm import tqdm

        self.bar = self.bar or tqdm(total=count, desc="quantize", unit="block")
        self.bar.update(done - self.bar.n)
        if done == count:
            self.bar.close()


def run_quantize(args: argparse.Namespace) -> None:
    from quip.info import mean_loss
    from quip.pipeline import quantize_to_folder

    quiet_transformers()
    start = time.perf_counter()
    changes, bits_for = given_choices(args), dict(map(parse_width, args.bits_for))
    result = quantize_to_folder(
        args.model,
        args.out,
        args.bits,
        calibration=args.calib,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
        preset=args.preset,
        skip=args.skip,
        bits_for=bits_for,
        device=pick_device(args.device),
        offload=args.offload,
        overwrite=args.overwrite,
        restart=args.restart,
        trust_remote_code=args.trust_remote_code,
        progress=ProgressBar(),
        **changes,
    )
    layers = result["layers"]
    widths = " and ".join(map(str, sorted({r["bits"] for r in layers.values()})))
    print(f"{args.out}: {len(layers)} layers in {widths} bits, mean relative proxy loss {mean_loss(layers):.4f}")
    print(f"calibrated on {result['settings']['calibration']}, {time.perf_counter() - start:.0f} s")


def parse_width(text: str) -> tuple[str, int]:
    """`*.down_proj=4` as a pattern and a width."""
    pattern, equals, bits = text.rpartition("=")
    if not equals or not pattern or not bits.isdecimal():
        raise QuipError(f"--bits-for takes PATTERN=B such as *.down_proj=4, got {text!r}")
    return pattern, int(bits)


def run_eval(args: argparse.Namespace) -> None:
    from quip import data, evaluate, load_model, tasks

    quiet_transformers()
    device = pick_device(args.device)
    check_eval(args)
    text = data.load_text(args.data or "wikitext2", "evaluation") if args.data or args.tasks is None else None
    loaded = [] if args.tasks is None else tasks.load_tasks([name.strip() for name in args.tasks.split(",")])
    model, tokenizer = load_model(args.model, device, trust_remote_code=args.trust_remote_code)
    result = {"model": args.model}
    if text:
        ids = data.tokenize(tokenizer, text)[: args.max_tokens]
        result |= {"data": text.source, **evaluate.perplexity(model, ids, args.seq_len)}
        print(f"perplexity {result['ppl']:.3f} on {result['tokens']} tokens of {text.source}", flush=True)
    if loaded:
        rows = tasks.run_tasks(model, tokenizer, loaded, args.limit, args.batch_size)
        result |= {"tasks": rows, "limit": args.limit, "lm_eval": version("lm-eval")}
        print_tasks(rows)
    if args.json:
        write_json(args.json, result)


def check_eval(args: argparse.Namespace) -> None:
    """Fill in defaults. Raises `QuipError` for a size out of range, and for an option that nothing would heed."""
    if args.tasks is None and (args.limit is not None or args.batch_size is not None):
        raise QuipError("--limit and --batch-size are for --tasks")
    if args.tasks is not None and not args.data and (args.seq_len is not None or args.max_tokens is not None):
        raise QuipError("--seq-len and --max-tokens are for perplexity: with --tasks, give its --data as well")
    args.seq_len = 2048 if args.seq_len is None else args.seq_len
    args.batch_size = 8 if args.batch_size is None else args.batch_size
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise QuipError(f"--limit and --batch-size must be at least 1, got {args.limit} and {args.batch_size}")
    if args.max_tokens is not None and args.max_tokens < args.seq_len:
        raise QuipError(f"--max-tokens {args.max_tokens} is less than one window of {args.seq_len}")


def print_tasks(rows: list[dict]) -> None:
    """A line for each task and metric."""
    for row in rows:
        value, *error = (f"{x:.4f}" if x < 1e4 else f"{x:.4g}" for x in (row["value"], row["stderr"]) if x is not None)
        where = f"{row['documents']} documents of {row['source']}"
        print(f"{row['task']:14} {row['metric']:10} {' ± '.join([f'{value:>9}', *error])} on {where}")


def run_generate(args: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from quip import load_model

    quiet_transformers()
    if args.max_new_tokens < 1:
        raise QuipError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    model, tokenizer = load_model(args.model, pick_device(args.device), trust_remote_code=args.trust_remote_code)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    if inputs.input_ids.shape[1] == 0:
        raise QuipError("the prompt is empty")
    model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, streamer=TextStreamer(tokenizer))


def run_info(args: argparse.Namespace) -> None:
    from quip.info import checkpoint_info

    info = checkpoint_info(args.folder)
    if args.json:
        write_json(args.json, info)
    print_layers(info["layers"])
    t = info["totals"]
    print(
        f"{t['quantized_weights']:,} weights in {t['bits_per_weight']:.3f} bits each with all overhead; "
        f"{t['other_parameters']:,} other parameters in 16 bits; weight files {t['file_bytes'] / 1e6:.1f} MB"
    )


def run_bench(args: argparse.Namespace) -> None:
    import torch

    bits = args.bits or ([2] if args.what == "quantize" else [2, 3, 4])
    if not set(bits) <= {2, 3, 4} or min(args.repeats, args.tokens, *args.batch) < 1:
        raise QuipError("--bits must be 2, 3 or 4, and --repeats, --tokens and --batch at least 1")
    if args.threads is not None and args.threads < 1:
        raise QuipError(f"--threads must be at least 1, got {args.threads}")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    rows = list(print_rows(bench_rows(args, bits)))
    if args.json:
        write_json(args.json, rows)


def bench_rows(args: argparse.Namespace, bits: list[int]) -> Iterator[dict]:
    """The rows of the benchmark that was asked for, as they come."""
    from quip import bench, bench_cuda, cpu

    sizes = [parse_size(size) for size in args.sizes or ()]
    if args.what == "quantize":
        return (row for b in bits for row in bench.bench_quantize(sizes or bench.SIZES, b, args.repeats))
    device = pick_device(args.device)
    if device == "cpu":
        print(f"CPU kernel: {cpu.backend()}{f' ({cpu.load()[1]})' if cpu.load()[1] else ''}", file=sys.stderr)
    if args.what == "kernels" and device.startswith("cuda"):
        return bench_cuda.bench_kernels(sizes or bench_cuda.SIZES, bits, args.batch)
    if args.what == "kernels" and device != "cpu":
        raise QuipError(f"bench kernels takes a CPU or a CUDA device, got {device!r}")
    if args.what == "kernels":
        return bench.bench_kernels(sizes or bench.KERNEL_SIZES, bits, args.batch, args.repeats)
    return iter(bench_generate(args, device))


def bench_generate(args: argparse.Namespace, device: str) -> list[dict]:
    """Load the models to compare, and time them."""
    import torch

    from quip import bench, load_model

    if not args.models:
        raise QuipError("bench generate needs the models to compare, such as a checkpoint and smollm2")
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise QuipError(f"--dtype must be a floating-point type such as bfloat16, got {args.dtype!r}")
    loaded = {name: load_model(name, device, dtype) for name in args.models}
    tokenizer = next(iter(loaded.values()))[1]
    only = {name: model for name, (model, _) in loaded.items()}
    return bench.bench_generate(only, tokenizer, "The three states of matter are", args.tokens, args.repeats)


def print_rows(rows: Iterable[dict]) -> Iterator[dict]:
    """Pass rows on, printing each as a line of a table, below the names of its columns where these change."""
    widths = {}
    for row in rows:
        shown = {key: f"{x:.4g}" if isinstance(x, float) else str(x) for key, x in row.items()}
        if shown.keys() != widths.keys():
            widths = {key: max(len(key), len(text), 8) for key, text in shown.items()}
            print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
        print("  ".join(f"{text:>{widths[key]}}" for key, text in shown.items()), flush=True)
        yield row


def parse_size(text: str) -> tuple[int, int]:
    """`4096x4096` as two positive integers."""
    m, x, n = text.lower().partition("x")
    if not x or not m.isdecimal() or not n.isdecimal() or min(int(m), int(n)) < 1:
        raise QuipError(f"a size is two positive integers such as 576x1536, got {text!r}")
    return int(m), int(n)


def print_layers(layers: dict[str, dict]) -> None:
    """A line for each layer: its size, then what the theory says of it (chapter 6), then the loss that was measured.

    Then a line for everything that was unusual.
    """
    from quip.info import notes

    name_width = max(map(len, layers))
    print(f"{'':{name_width}}             bits/             own → rotated basis     relative proxy loss")
    print(f"{'layer':{name_width}}     shape  weight     ρ    μ(W)      μ(H)      trD/trH  predicted  measured")
    for name, x in layers.items():
        shape = "×".join(map(str, x["shape"]))
        mu_W, mu_H = pair(x.get("mu_weights"), ".1f"), pair(x.get("mu_hessian"), ".1f")
        predicted, loss = number(x.get("predicted_loss")), number(x["relative_proxy_loss"])
        print(
            f"{name:{name_width}} {shape:>9} {x['bits_per_weight']:7.3f} {x['rho']:5.2f}  {mu_W:9} {mu_H:9}"
            f" {pair(x.get('trace_ratio'), '.2f'):9} {predicted:>8}  {loss:>8}"
        )
    for name, x in layers.items():
        for note in notes(x):
            print(f"{name}: {note}")


def pair(values: list[float] | None, form: str) -> str:
    """`before→after`, or a dash where the report lacks it."""
    return "→".join(format(x, form) for x in values) if values else "-"


def number(value: float | None) -> str:
    """Two digits, or a dash where the report has no figure."""
    return "-" if value is None else f"{value:.2g}"


def quiet_transformers() -> None:
    """Only errors from Transformers and the hub's client; their progress bars hide ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as hf_logging

    hub_logging.set_verbosity_error()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
