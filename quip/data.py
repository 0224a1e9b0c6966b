"""Text for calibration and evaluation: a file, the folder in QUIP_DATA, the hub, or Python's own documentation."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from quip.errors import QuipError

log = logging.getLogger("quip")

# name -> hub repository, configuration, revision, {purpose: split}, column. The hub's parquet copy stands in for a
# repository that is still a script, which `datasets` no longer runs.
HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, ("train", "test"), "text"),
    "c4": ("allenai/c4", "en", None, ("train", "validation"), "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "refs/convert/parquet", ("train", "test"), "sentence"),
}
JOINT = {"ptb": " "}  # between rows; two newlines elsewhere, as OPTQ and QuIP join WikiText-2
HUB_ROWS = 4096  # read of C4, whose training split has 365 million
NAMES = (*HUB, "python-docs")
PURPOSES = ("calibration", "evaluation")
# files that hold each purpose's rows in the folder QUIP_DATA/NAME, first match wins
FILES = {"calibration": ("calibration", "train*"), "evaluation": ("evaluation", "test", "validation")}


@dataclass(frozen=True)
class Text:
    """Some text and where it came from: `source` is one line that reports repeat."""

    text: str
    source: str


def load_text(name: str, purpose: str = "evaluation") -> Text:
    """The text of a file, or of a data set by name, for "calibration" or "evaluation", which are never the same text.

    `name`: a .txt, .md or .jsonl file (of strings, or of objects with a `text`), or one of `NAMES`. A data set is
    looked for in the folder `QUIP_DATA`, then on the Hugging Face hub; if it is at neither, Python's own documentation
    is taken instead, which the log and `source` say. Raises `QuipError` for an unknown name or an unreadable file.
    """
    if purpose not in PURPOSES:
        raise QuipError(f"purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}")
    path = Path(name)
    if path.is_file():
        return Text(read_file(path), f"file {path.name}")
    if name not in NAMES:
        raise QuipError(f"unknown data {name!r}: neither a file nor one of {', '.join(NAMES)}")
    if name == "python-docs":
        return python_docs(purpose)
    found = from_folder(name, purpose) or from_hub(name, purpose)
    if found is None:
        found = python_docs(purpose)
        found = Text(found.text, f"{found.source}, in place of {name}")
        log.warning("%s is neither in QUIP_DATA nor on a reachable hub: using %s", name, found.source)
    return found


def read_file(path: Path, joint: str = "\n\n") -> str:
    """The text of a file; the rows of a .jsonl file are joined by `joint`. Raises `QuipError` naming file and line."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise QuipError(f"cannot read {path} as UTF-8 text: {e}") from None
    if path.suffix != ".jsonl":
        return content
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else ""
            rows.append(row if isinstance(row, str) else row["text"])
        except (ValueError, KeyError, TypeError):
            raise QuipError(f'{path}, line {number}: expected a JSON string or an object with a "text"') from None
    return joint.join(rows)


def from_folder(name: str, purpose: str) -> Text | None:
    """The data set from the folder named by the environment variable QUIP_DATA, if it is there."""
    root = os.environ.get("QUIP_DATA")
    if not root:
        return None
    if not Path(root).is_dir():
        raise QuipError(f"QUIP_DATA is not a folder: {root}")
    for stem in FILES[purpose]:
        for path in sorted(Path(root, name).glob(f"{stem}.*")):
            if path.suffix in (".jsonl", ".txt"):
                return Text(read_file(path, JOINT.get(name, "\n\n")), f"{name} ({path.name})")
    return None


def from_hub(name: str, purpose: str) -> Text | None:
    """The data set from the Hugging Face hub, or None if the hub or the `datasets` package cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return None
    repository, configuration, revision, splits, column = HUB[name]
    split = splits[PURPOSES.index(purpose)]
    try:
        from datasets import load_dataset

        HfApi().dataset_info(repository, timeout=5)  # fails at once without a network, where load_dataset retries
        rows = load_dataset(repository, configuration, split=split, revision=revision, streaming=True)
        texts = [row[column] for row in (rows.take(HUB_ROWS) if name == "c4" else rows)]
    except Exception as e:  # the hub fails in too many ways to list; each means: look elsewhere
        log.info("%s cannot be had from the hub: %s", name, e)
        return None
    return Text(JOINT.get(name, "\n\n").join(texts), f"{name} ({repository}, {split})")


def python_docs(purpose: str) -> Text:
    """Python's language reference, which every Python carries: every fourth topic to evaluate, the others to calibrate.

    Topics repeat each other's paragraphs; what is evaluated is left out of the calibration text.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    evaluation = [paragraph for name in names[::4] for paragraph in topics[name].strip().split("\n\n")]
    held_out = set(evaluation)
    others = (paragraph for i, name in enumerate(names) if i % 4 for paragraph in topics[name].strip().split("\n\n"))
    paragraphs = evaluation if purpose == "evaluation" else [p for p in others if p not in held_out]
    return Text("\n\n".join(paragraphs), f"python-docs ({purpose} topics of this Python's pydoc)")


def tokenize(tokenizer, text: Text) -> torch.Tensor:
    """Token ids `(tokens,)` of the whole text, with whatever special tokens the tokenizer adds at its ends."""
    return tokenizer(text.text, return_tensors="pt", verbose=False).input_ids[0]


def samples(ids: torch.Tensor, count: int, seq_len: int, seed: int = 0, source: str = "text") -> torch.Tensor:
    """`count` windows of `seq_len` tokens that do not overlap, chosen by seed: `(count, seq_len)`.

    Raises `QuipError` if the text has fewer than `count` windows.
    """
    import numpy as np

    if count < 1 or seq_len < 1:
        raise QuipError(f"samples and sequence length must be at least 1, got {count} and {seq_len}")
    windows = len(ids) // seq_len
    if windows < count:
        raise QuipError(
            f"text too short: {source} has {len(ids)} tokens, {count} samples of {seq_len} need {count * seq_len}"
        )
    chosen = np.random.RandomState(seed).permutation(windows)[:count]
    return ids[: windows * seq_len].view(windows, seq_len)[torch.from_numpy(np.sort(chosen))]
