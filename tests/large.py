"""A Llama of random weights and a billion parameters in bfloat16 shards, half of them in eleven blocks of the shapes of
TinyLlama, half in the vocabulary of Llama 3; and the peak memory of quantizing it, in a process of its own:
`python tests/large.py MODEL OUT TEXT`."""

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

CONFIG = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 11,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def write_model(folder: Path, blocks_in_shard: int = 4, **changes) -> int:
    """Write the model, a shard at a time; returns its number of parameters."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**CONFIG | changes, dtype=torch.bfloat16)
    with init_empty_weights():
        shapes = {name: x.shape for name, x in AutoModelForCausalLM.from_config(config).state_dict().items()}
    parts: dict[int, list[str]] = {}
    for name in shapes:
        found = name.split("layers.")[1:]
        parts.setdefault(1 + int(found[0].split(".")[0]) // blocks_in_shard if found else 0, []).append(name)
    weight_map = {}
    for i, names in parts.items():
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: random_tensor(name, shapes[name]) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shape.numel() for shape in shapes.values())


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)


def quantize(folder: Path, out: Path, text: Path, **changes) -> dict:
    """Quantize it with few short samples, no search and no greedy passes, so that it takes minutes; what that took."""
    from quip.pipeline import quantize_to_folder

    start = time.perf_counter()

    def progress(done, count, reports):
        line = f"{done} of {count}: {time.perf_counter() - start:.0f} s, {peak() / 1e9:.2f} GB"
        print(line, file=sys.stderr, flush=True)

    arguments = {
        "calibration": str(text),
        "samples": 4,
        "seq_len": 128,
        "passes": 0,
        "rho": 1.6,
        "progress": progress,
    } | changes
    result = quantize_to_folder(str(folder), out, **arguments)
    return {"layers": len(result["layers"]), "seconds": time.perf_counter() - start, "peak": peak()}


def peak() -> int:
    """The largest resident size of this process so far, in bytes (Linux counts in KiB, macOS in bytes)."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


if __name__ == "__main__":
    folder, out, text = map(Path, sys.argv[1:])
    print(json.dumps(quantize(folder, out, text)))
