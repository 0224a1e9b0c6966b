"""The command line of recorded experiments: python -m quip.results NAME."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import quip.results
from quip import tasks
from quip.cli import fail, quiet_transformers, show_own_warnings
from quip.errors import QuipError
from quip.results import defaults, hessians, runs, speed, whole

EXPERIMENTS = {
    **{name: whole.experiment(name, runs_of) for name, runs_of in runs.EXPERIMENTS.items()},
    "layers": hessians.run_layers,
    "example-layers": hessians.run_example_layers,
    "defaults": defaults.run_defaults,
    "kernels": speed.run_kernels,
    "prompts": speed.run_prompts,
    "generate": speed.run_generate,
    "cuda": speed.run_cuda,
    "needs": speed.run_needs,
    "cost": speed.run_cost,
}


def main(argv: list[str] | None = None) -> None:
    """Run one experiment and write its file. Exit status 2 and one line on stderr for bad input."""
    given = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(given)
    shown = (Path(x).name if Path(x).is_absolute() or Path(x).exists() else x for x in given)
    args.command = shlex.join(["python", "-m", "quip.results", *shown])
    show_own_warnings()
    quiet_transformers()
    try:
        EXPERIMENTS[args.name](args)
    except QuipError as e:
        sys.exit(fail(str(e), 2))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m quip.results", description=quip.results.__doc__)
    described = "; ".join(f"{name}: {run.__doc__}" for name, run in EXPERIMENTS.items())
    parser.add_argument("name", choices=EXPERIMENTS, metavar="NAME", help=described)
    parser.add_argument("--model", default="smollm2", help="as for quip quantize (default: smollm2)")
    parser.add_argument("--calib", default="c4", metavar="DATA", help="calibration text (default: c4)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="of all but layers (default: 2 3 4)")
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    parser.add_argument("--out", help="file to write (default: in book/results or book/data)")
    p = parser.add_argument_group(f"of {', '.join(runs.EXPERIMENTS)}")
    p.add_argument("--variants", nargs="+", metavar="V", help="only these")
    p.add_argument("--dtype", help="of the model, such as bfloat16 (default: float32 on a CPU, else the model's own)")
    p.add_argument("--eval", nargs="+", default=["wikitext2", "c4"], metavar="DATA", help="(default: wikitext2 c4)")
    p.add_argument("--max-tokens", type=int, default=12288, help="of each text (default: 12288)")
    p.add_argument("--eval-len", type=int, default=2048, help="tokens in a window (default: 2048, or as many as fit)")
    p = parser.add_argument_group("of zeroshot")
    p.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), metavar="TASK", help=f"({', '.join(tasks.TASKS)})")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    p = parser.add_argument_group("of defaults")
    p.add_argument("--every", type=int, default=5, metavar="N", help="one block in N (default: 5)")
    return parser
