"""Runs that are killed at given steps, each resumed to its end: a script, since a fork wants a process of its own.

A step is a file or folder that is flushed to the disk, which is what a run does before and after every rename.
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from quip import checkpoint
from quip.pipeline import quantize_to_folder


def forked(function) -> int:
    """Run a function in a child process; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as e:
            print(type(e).__name__, e, file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def main(source: str, calibration: str, steps: list[int], folder: str, **more) -> list[dict]:
    torch.set_num_threads(1)

    def run(out: Path, kill_at: int | None = None) -> None:
        flush, count = checkpoint.flush, 0

        def flush_or_die(path):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        checkpoint.flush = flush_or_die
        arguments = {"calibration": calibration, "samples": 4, "seq_len": 64, "passes": 0, **more}
        quantize_to_folder(source, out, **arguments)

    results = []
    for step in steps:
        out = Path(folder) / f"killed-{step}"
        first = forked(lambda out=out, step=step: run(out, step))
        left = sorted(p.name for p in Path(folder, f"{out.name}.part").glob("*"))
        published = out.exists()
        second = forked(lambda out=out: run(out))
        results.append({"step": step, "signals": [first, second], "left": left, "published": published})
    return results


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
