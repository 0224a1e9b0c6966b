"""What it takes to quantize a model of given shapes: memory, disk and hours, computed from parts that were measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from quip.algorithm import quantize_matrix
from quip.bounds import MU_WIDTH, layer_report
from quip.errors import QuipError
from quip.kernels import packed_width
from quip.methods import choose, matrix_arguments
from quip.proxy import SecondMoment


@dataclass(frozen=True)
class Shapes:
    """A model's shapes: `inputs` maps the width n of each distinct input of a block to the rows m of its layers.

    `outside` counts the parameters of embeddings and head, `vocabulary` those of the embedding alone.
    """

    blocks: int
    hidden: int
    vocabulary: int
    outside: int
    inputs: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def block(self) -> int:
        """Weights of one block."""
        return sum(n * m for n, rows in self.inputs for m in rows)


def llama(blocks: int, hidden: int, intermediate: int, keys: int, vocabulary: int) -> Shapes:
    """The shapes of a Llama with an untied head; `keys` is the width of its keys and values."""
    inputs = [(hidden, [hidden, keys, keys]), (hidden, [hidden])]
    inputs += [(hidden, [intermediate, intermediate]), (intermediate, [hidden])]
    return Shapes(blocks, hidden, vocabulary * hidden, 2 * vocabulary * hidden, inputs)


MODELS = {
    "TinyLlama 1.1B": llama(22, 2048, 5632, 256, 32000),
    "Llama 2 7B": llama(32, 4096, 11008, 4096, 32000),
    "Llama 2 70B": llama(80, 8192, 28672, 1024, 32000),
}


def needs(shapes: Shapes, parts: dict, bits: int = 2, samples: int = 64, seq_len: int = 1024) -> dict[str, float]:
    """What a run on a CPU takes: `memory` and `disk` in bytes, `seconds`. `parts` as `measure_parts` returns them.

    Memory: one block in float32, the activations, and what its largest layer needs, for its second moment and for its
    weights; or, before the first block, the embedding in float32 and in 16 bits. `offloaded`: with the activations in a
    file, of so many bytes. Disk: beside the model itself, finished blocks, and the checkpoint that is made of them.
    """
    activations = 4 * samples * seq_len * shapes.hidden
    layer = max(parts["workspace"] * n**2 + parts["rows"] * m * n for n, rows in shapes.inputs for m in rows)
    block = 4 * shapes.block + 8 * layer
    offloaded = parts["base"] + max(block, 6 * shapes.vocabulary)
    packed = shapes.blocks * sum(m * packed_width(n, bits) for n, rows in shapes.inputs for m in rows)
    tokens, spent = samples * seq_len, 0.0
    for n, rows in shapes.inputs:
        spent += len(rows) * parts["factor"] * n**3 + sum(rows) * parts["round"] * n**2
        spent += parts["moment"] * tokens * n**2 + (parts["eigen"] * n**3 if n <= MU_WIDTH else 0)
    spent += 2 * parts["forward"] * tokens * shapes.block  # for the second moments, and with the quantized weights
    return {
        "parameters": shapes.blocks * shapes.block + shapes.outside,
        "memory": offloaded + activations,
        "offloaded": offloaded,
        "disk": 2 * packed + 2 * shapes.outside,
        "file": activations,
        "seconds": shapes.blocks * spent,
    }


def measure_parts(n: int = 2048, tokens: int = 8192) -> dict[str, float]:
    """Measure, on one thread, what `needs` multiplies.

    `workspace` and `rows`: at the peak of quantizing a layer and of its report, how many matrices of `n × n` and how
    many of `m × n` are in memory, in float64, the second moment included. `base`: bytes of a process that has loaded
    everything. Seconds: `factor` for each of n³ and `round` for each of m n² of a layer, by the default method; `eigen`
    for each of n³, `moment` for each token and each of n², `forward` for each token and weight.
    """
    torch.set_num_threads(1)
    base, g = resident(), torch.Generator().manual_seed(0)
    X, W = torch.randn(tokens, n, generator=g), torch.randn(n, n, generator=g) / n**0.5
    moment = SecondMoment(n)
    parts = {"base": base, "moment": seconds(lambda: (moment.update(X), moment.H)) / tokens / n**2}
    H = moment.H

    def layer(m: int) -> None:
        q = quantize_matrix(W[:m], H, 2, **matrix_arguments(choose(), 0))
        layer_report(W[:m], H, q, Q)

    parts["eigen"] = seconds(lambda: torch.linalg.eigh(H.float())) / n**3
    Q = torch.linalg.eigh(H.float()).eigenvectors
    few, many = (seconds(lambda m=m: layer(m)) for m in (n // 8, n))
    parts["round"] = (many - few) / (n - n // 8) / n**2
    parts["factor"] = (few - parts["round"] * n // 8 * n**2) / n**3
    parts["forward"] = seconds(lambda: X @ W) / tokens / n**2
    few, many = (peak(lambda m=m: layer(m)) / (8 * n**2) for m in (n // 8, n))
    parts["rows"] = (many - few) / (1 - 1 / 8)
    parts["workspace"] = 1 + few - parts["rows"] / 8
    return parts


def seconds(function: Callable) -> float:
    """The processor's seconds, which other processes of the machine lengthen less than the clock's."""
    start = time.process_time()
    function()
    return time.process_time() - start


def resident() -> int:
    """Bytes of this process that are in memory now. Raises `QuipError` where the system does not say (not on Linux)."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096
    except OSError:
        raise QuipError("memory can only be measured on Linux") from None


def peak(function: Callable) -> int:
    """The most bytes that a function adds to the process, seen every 2 ms."""
    before, most, done = resident(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return most
