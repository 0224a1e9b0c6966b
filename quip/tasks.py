"""Zero-shot tasks as lm-eval defines and scores them, on rows from the folder in QUIP_DATA or from the hub."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quip.errors import QuipError


def lambada_row(row: dict) -> dict:
    """The hub's columns of a row of LAMBADA: `text`, or `context` and `continuation`, a last word without its space.

    lm-eval's definition cuts the text at its last space again, so the continuation must be one word, else `ValueError`.
    """
    if "text" in row:
        return {"text": row["text"]}
    if not row["continuation"] or " " in row["continuation"]:
        raise ValueError("the continuation is not one word")
    return {"text": f"{row['context']} {row['continuation']}"}


def piqa_row(row: dict) -> dict:
    """The hub's columns of a row of PIQA: `goal`, `sol1`, `sol2` and `label`, else `KeyError` or `ValueError`."""
    if row["label"] not in (0, 1):
        raise ValueError("the label is neither 0 nor 1")
    return {key: row[key] for key in ("goal", "sol1", "sol2", "label")}


def arc_row(row: dict) -> dict:
    """The hub's columns of a row of ARC: `question`, and `choices` of `text` and `label` with an `answerKey`, or a list
    of `choices` with `gold`, the index of the right one; else `KeyError` or `ValueError`."""
    if "answerKey" in row:
        texts, labels, answer = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
    else:
        texts, labels = row["choices"], [chr(ord("A") + i) for i in range(len(row["choices"]))]
        answer = dict(enumerate(labels)).get(row["gold"])
    if answer not in labels or len(texts) != len(labels):
        raise ValueError("the answer is none of the choices")
    return {"question": row["question"], "choices": {"text": texts, "label": labels}, "answerKey": answer}


# name -> folder of its definition in lm_eval/tasks, file in the folder QUIP_DATA/zeroshot, and what makes the hub's
# columns, which the definition reads, of a row of that file; a row that has the hub's columns stays as it is
TASKS: dict[str, tuple[str, str, Callable[[dict], dict]]] = {
    "lambada_openai": ("lambada", "lambada_openai.jsonl", lambada_row),
    "piqa": ("piqa", "piqa_valid.jsonl", piqa_row),
    "arc_easy": ("arc", "arc_easy_test.jsonl", arc_row),
    "arc_challenge": ("arc", "arc_challenge_test.jsonl", arc_row),
}


@dataclass(frozen=True)
class Loaded:
    """A task: lm-eval's own object (`lm_eval.api.task.ConfigurableTask`), and where its rows came from, in one line."""

    name: str
    task: object
    source: str


def evaluate_tasks(
    model,
    tokenizer,
    names: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
    data: str | Path | None = None,
) -> list[dict]:
    """Accuracy, and on LAMBADA perplexity, of a causal model on zero-shot tasks: `load_tasks`, then `run_tasks`."""
    return run_tasks(model, tokenizer, load_tasks(names, data), limit, batch_size)


def load_tasks(names: Sequence[str], data: str | Path | None = None) -> list[Loaded]:
    """The tasks of these names (of `TASKS`) as lm-eval defines them, with local rows if there are any, else the hub's.

    `data`: a folder that may have a `zeroshot/piqa_valid.jsonl`, …, of rows that `piqa_row`, … take; the one in the
    variable QUIP_DATA if not given. Raises `QuipError` for an unknown name, rows that cannot be read or had, or if
    lm-eval is missing.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise QuipError(f"unknown task {', '.join(unknown)!r}: choose of {', '.join(TASKS)}")
    data = data or os.environ.get("QUIP_DATA")
    if data and not Path(data).is_dir():
        raise QuipError(f"the folder of data (QUIP_DATA) is not there: {data}")
    with quiet():
        return [load_task(name, Path(data, "zeroshot", TASKS[name][1]) if data else None) for name in names]


def load_task(name: str, file: Path | None) -> Loaded:
    """One task, with the rows of `file` if it exists. Only the rows are replaced, nothing of the definition."""
    manager = task_manager()
    definition = manager.task_index[name].cfg
    split = definition.get("test_split") or definition["validation_split"]
    if file is None or not file.is_file():
        return Loaded(name, task_from_hub(manager, name, file), f"{definition['dataset_path']}, {split}")
    from datasets import Dataset

    rows = Dataset.from_list(read_rows(name, file))
    only = {key: None for key in ("training_split", "validation_split", "test_split")} | {"test_split": split}
    local = {**definition, **only, "custom_dataset": lambda **_: {split: rows}}
    return Loaded(name, manager.load([local])["tasks"][name], f"zeroshot/{file.name}")


def read_rows(name: str, file: Path) -> list[dict]:
    """The rows of a .jsonl file, in the hub's columns. Raises `QuipError` naming file and line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 in a string, too
    except (OSError, UnicodeDecodeError) as e:
        raise QuipError(f"cannot read {file} as UTF-8 text: {e}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(TASKS[name][2](json.loads(line)))
        except KeyError as e:
            raise QuipError(f"{file}, line {number}: a row of {name} needs {e}") from None
        except (ValueError, TypeError, AttributeError) as e:
            raise QuipError(f"{file}, line {number}: no row of {name}: {e}") from None
    if not rows:
        raise QuipError(f"{file} has no rows")
    return rows


def task_manager():
    """What knows lm-eval's definitions, of our few tasks alone: to read all thousands takes seconds."""
    try:
        import lm_eval.tasks
    except ImportError as e:
        raise QuipError(f'zero-shot tasks need lm-eval: pip install "quip-llm[tasks]" ({e})') from None
    root = Path(lm_eval.tasks.__file__).parent
    folders = sorted({root / folder for folder, _, _ in TASKS.values()})
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)


def task_from_hub(manager, name: str, file: Path | None) -> object:
    """lm-eval's task with the rows that its definition names, which lie on the hub or in the cache of `datasets`."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if not HF_HUB_OFFLINE:  # fails at once without a network, where load_dataset retries
            HfApi().dataset_info(manager.task_index[name].cfg["dataset_path"], timeout=5)
        return manager.load([name])["tasks"][name]
    except Exception as e:  # the hub fails in too many ways to list
        where = file or f"QUIP_DATA/zeroshot/{TASKS[name][1]} (QUIP_DATA is not set)"
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise QuipError(f"no rows for {name}: there is no {where}, and the hub cannot be had: {reason}") from None


def run_tasks(
    model,
    tokenizer,
    tasks: Sequence[Loaded],
    limit: int | None = None,
    batch_size: int = 8,
) -> list[dict]:
    """Rows of `task`, `metric`, `value`, `stderr` (None for one document), `documents`, `source`; all by lm-eval.

    `limit`: only so many documents of each task, the first ones. Log-likelihoods are in the model's own type, as in
    lm-eval: those of a bfloat16 model have three digits. The standard error of a perplexity is that of its logarithm
    times the perplexity (first order), where lm-eval draws 100,000 bootstrap samples in a pool of processes.
    Raises `QuipError` for a size below 1, and if the model's output is NaN or its perplexity no float.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise QuipError(f"limit and batch size must be at least 1, got {limit} and {batch_size}")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet():
        # a copy, since lm-eval gives a tokenizer without a padding token one
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        for x in tasks:
            x.task.set_config("num_fewshot", 0)
        try:
            found = evaluate(lm, {"tasks": {x.name: x.task for x in tasks}}, limit=limit, bootstrap_iters=0)
        except OverflowError:
            raise QuipError("the perplexity is larger than any float: this model is broken") from None
    return [row for x in tasks for row in task_rows(x, found["results"][x.name], found["samples"][x.name])]


def task_rows(loaded: Loaded, result: dict, samples: list[dict]) -> Iterator[dict]:
    """A row for each metric, from lm-eval's result and its record of every document."""
    from lm_eval.api.metrics import mean_stderr

    if any(math.isnan(response[0][0]) for sample in samples for response in sample["resps"]):
        raise QuipError(f"the model's output is NaN on {loaded.name}")
    for metric in samples[0]["metrics"]:
        value = float(result[f"{metric},none"])
        stderr = float(mean_stderr([sample[metric] for sample in samples])) if len(samples) > 1 else None
        if metric == "perplexity" and stderr is not None:  # of the mean log-likelihood, of which this is exp(-x)
            stderr *= value
        row = {"task": loaded.name, "metric": metric, "value": value, "stderr": stderr}
        yield row | {"documents": len(samples), "source": loaded.source}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only errors from lm-eval, which warns of everything that it is given instead of having made it itself."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
