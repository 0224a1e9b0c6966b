"""Whole models quantized in every way that an experiment lists: perplexity, loss, size and time of each."""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from quip import checkpoint, data, evaluate, models, tasks
from quip.cli import ProgressBar, pick_device, print_rows
from quip.errors import QuipError
from quip.info import checkpoint_info, mean_loss
from quip.loading import load_model
from quip.methods import choose
from quip.results.record import provenance, read_record, short_name, write_record
from quip.results.rows import quantize_rows, row_sizes
from quip.results.runs import SELF, Run, select


def experiment(name: str, runs_of: Callable[[argparse.Namespace], list[Run]]) -> Callable[[argparse.Namespace], None]:
    """The experiment `name`: its runs on `--model`, whose rows are added to what its record has already."""

    def run(args: argparse.Namespace) -> None:
        chosen = select(runs_of(args), args.variants)
        bench = Bench(args, name == "zeroshot")
        out = Path(args.out or f"book/results/{name}.json")
        for _ in print_rows(shown(row) for row in bench.rows([None, *chosen], out)):
            pass

    run.__doc__ = runs_of.__doc__
    return run


def shown(row: dict) -> dict:
    """What of a row is worth a line on the screen."""
    accuracy = {f"{x['task']} {x['metric']}": x["value"] for x in row.get("accuracy", ())}
    return {"model": row["model"], "variant": row["variant"], "bits": row["bits"], **row["perplexity"], **accuracy}


class Bench:
    """A model, and the texts, or else the zero-shot tasks, on which every quantized copy of it is measured."""

    def __init__(self, args: argparse.Namespace, zeroshot: bool = False):
        dtype = getattr(torch, args.dtype, None) if args.dtype else None
        if args.dtype and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise QuipError(f"--dtype must be a floating-point type such as bfloat16, got {args.dtype!r}")
        self.name, self.command = short_name(args.model), args.command
        self.model, self.tokenizer = load_model(args.model, pick_device(args.device), dtype)
        self.window = min(args.eval_len, getattr(self.model.config, "max_position_embeddings", args.eval_len))
        self.tasks = tasks.load_tasks(args.tasks) if zeroshot else []
        self.limit = args.limit
        texts = [] if zeroshot else [data.load_text(name, "evaluation") for name in args.eval]
        self.texts = {text.source: data.tokenize(self.tokenizer, text)[: args.max_tokens] for text in texts}
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def rows(self, runs: list[Run | None], out: Path) -> Iterator[dict]:
        """The row of each run, None being the model as it is: from a record in the folder of `out`, else measured.

        Each is in `out` before it is passed on, so that a run that ends early goes on where it stopped.
        """
        for run in runs:
            wanted = self.describe(run)
            mine = recorded(out)
            row = next((x for x in mine if key(x) == key(wanted) and x["variant"] == wanted["variant"]), None)
            if row is None:
                others = (recorded(path) for path in sorted(out.parent.glob("*.json")))
                row = find(wanted, mine, *others) or self.measure(run, wanted)
                row = {**row, "variant": wanted["variant"]}
                write_record(out, {"rows": [*recorded(out), row]}, quiet=True)
            yield row

    def describe(self, run: Run | None) -> dict:
        """All that the figures of a run depend on, but for the machine and the versions."""
        row = {
            "model": self.name,
            "parameters": self.parameters,
            "variant": run.variant if run else "16 bits",
            "bits": run.bits if run else 16,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "evaluation": {source: len(ids) // self.window * self.window for source, ids in self.texts.items()},
            "window": self.window,
        }
        if self.tasks:
            row["tasks"] = {"sources": [task.source for task in self.tasks], "limit": self.limit}
        if run:
            source = SELF if run.calib == SELF else data.load_text(run.calib, "calibration").source
            row["calibration"] = {"text": source, "samples": run.samples, "seq_len": run.seq_len}
            row["seed"] = run.seed
            row["choices"] = choose(**run.changes)
            row["scales"] = "rows" if run.rows else "matrix"
        return row

    def measure(self, run: Run | None, wanted: dict) -> dict:
        """Quantize a copy of the model and measure it."""
        copied, more = copy.deepcopy(self.model), {}
        if run:
            samples = self.samples(run)
            start, quantize = time.perf_counter(), quantize_rows if run.rows else models.quantize_model
            reports = quantize(copied, samples, run.bits, run.seed, progress=ProgressBar(), **run.changes)
            more["seconds"] = round(time.perf_counter() - start)
            more["mean_loss"] = mean_loss(reports)
            more |= row_sizes(reports, run.bits) if run.rows else self.sizes(copied, reports)
        more["perplexity"] = {source: self.perplexity(copied, ids) for source, ids in self.texts.items()}
        if self.tasks:
            more["accuracy"] = tasks.run_tasks(copied, self.tokenizer, self.tasks, self.limit)
        return {**wanted, **more, "command": self.command, **provenance(self.model.device)}

    def samples(self, run: Run) -> torch.Tensor:
        """The calibration set of a run, `(samples, seq_len)`."""
        if run.calib == SELF:
            return written_by(self.model, run.samples, run.seq_len, run.seed)
        text = data.load_text(run.calib, "calibration")
        return data.samples(data.tokenize(self.tokenizer, text), run.samples, run.seq_len, run.seed, text.source)

    def sizes(self, model: PreTrainedModel, reports: dict[str, dict]) -> dict:
        """Bits per quantized weight with all overhead, and the bytes of all weight files, from a checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save_model(model, self.tokenizer, Path(folder, "model"), reports, {})
            totals = checkpoint_info(Path(folder, "model"))["totals"]
        return {key: totals[key] for key in ("bits_per_weight", "file_bytes")}

    def perplexity(self, model: PreTrainedModel, ids: torch.Tensor) -> float | None:
        """None if the model's output is not finite."""
        try:
            return evaluate.perplexity(model, ids, self.window, progress=False)["ppl"]
        except QuipError as e:
            if "NaN" in str(e):
                return None
            raise


@torch.no_grad()
def written_by(model: PreTrainedModel, samples: int, seq_len: int, seed: int, batch: int = 16) -> torch.Tensor:
    """Token ids `(samples, seq_len)` drawn from the model itself, token by token.

    A text begins with the model's own first token, or with any token if it has none.
    """
    torch.manual_seed(seed)
    bos, texts = model.config.bos_token_id, []
    for begin in range(0, samples, batch):
        count = min(batch, samples - begin)
        start = torch.randint(model.config.vocab_size, (count, 1)) if bos is None else torch.full((count, 1), bos)
        start = start.to(model.device)
        texts.append(
            model.generate(
                start,
                attention_mask=torch.ones_like(start),
                min_new_tokens=seq_len - 1,
                max_new_tokens=seq_len - 1,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
            ).cpu()
        )
    return torch.cat(texts)


KEY = ("model", "bits", "dtype", "evaluation", "window", "calibration", "seed", "choices", "scales", "tasks")


def key(row: dict) -> list:
    """What two rows have in common if they are the same measurement."""
    return [row.get(name) for name in KEY]


def find(wanted: dict, *records: list[dict]) -> dict | None:
    """A row of the same measurement, whatever it is called."""
    return next((row for rows in records for row in rows if key(row) == key(wanted)), None)


def recorded(path: Path) -> list[dict]:
    """The rows of a record of whole models; none if there is no such file, or it is another kind of record."""
    return [row for row in read_record(path).get("rows", []) if "perplexity" in row]
