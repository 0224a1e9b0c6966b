"""Benchmarks: each measures a method beside its limit in one run, since only ratios survive a noisy machine."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from time import perf_counter, thread_time

import torch

from quip import cpu
from quip.algorithm import Basis, QuantizedMatrix
from quip.grids import greedy_pass
from quip.incoherence import KroneckerTransform
from quip.kernels import QuantizedLinear, centred, packed_width, unpack
from quip.ldlq import feedback_round, ldl
from quip.pages import in_huge_pages
from quip.rounding import nearest

SIZES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096))
KERNEL_SIZES = ((576, 1536), (4096, 4096), (11008, 4096), (8192, 28672))
STREAMED = 128 * 2**20  # bytes of weights that take turns: more than caches hold, so that each is read from memory
TURN = 0.25  # seconds


def bench_quantize(sizes=SIZES, bits: int = 2, repeats: int = 3, seed: int = 0) -> list[dict]:
    """Time LDLQ and one greedy pass in float32 against one product of W `(m, n)` with a matrix `(n, n)`.

    LDLQ needs the errors of all columns before a column, `m n²/2` multiply-adds, and a greedy pass those of all other
    columns, `m n²`: the product, `m n²`, is what the processor needs for as many in the best case. Method and product
    take turns, and of each the fastest of `repeats` counts. Rows: m, n, bits, method, seconds, product_seconds, ratio.
    """
    rows = []
    for m, n in sizes:
        W, H, U = layer(m, n, bits, seed)
        rounding = partial(nearest, maxq=2**bits - 1)
        codes = feedback_round(W, U, rounding)
        methods = {
            "ldlq": lambda W=W, U=U, rounding=rounding: feedback_round(W, U, rounding),
            "greedy pass": lambda W=W, H=H, codes=codes: greedy_pass(W, codes, H, 2**bits - 1),
        }
        for name, method in methods.items():
            seconds, product = fastest_pair(method, lambda W=W, H=H: W @ H, repeats)
            row = {"m": m, "n": n, "bits": bits, "method": name, "seconds": seconds, "product_seconds": product}
            rows.append(row | {"ratio": seconds / product})
    return rows


def layer(m: int, n: int, bits: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W `(m, n)` in units of the grid, H `(n, n)` of correlated inputs and its feedback U `(n, n)`, all float32."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n + 64, n, generator=g)
    H = X.T @ X / len(X) + 0.1 * torch.eye(n)
    W = (2**bits - 1) / 2 * (1 + torch.randn(m, n, generator=g) / 1.6)
    return W, H, ldl(H.double())[0].float()


def fastest_pair(one: Callable, other: Callable, repeats: int) -> tuple[float, float]:
    """The least seconds of each of two functions, called in turns."""
    times = ([], [])
    for _ in range(repeats):
        for function, taken in zip((one, other), times, strict=True):
            start = perf_counter()
            function()
            taken.append(perf_counter() - start)
    return min(times[0]), min(times[1])


@torch.no_grad()
def bench_kernels(sizes=KERNEL_SIZES, widths=(2, 3, 4), batches=(1, 8, 32), repeats=3, seed=0) -> Iterator[dict]:
    """Time packed layers on the CPU beside `torch.nn.functional.linear`, weights streamed from memory.

    Stages: `multiply`, the product with packed codes alone (CPU kernel), and `layer`, with both transforms. The three
    take turns, and of each the fastest of `repeats` or more counts (by `cpu_clock`). A size is left out if memory is
    short. Rows: m, n, bits, batch, stage, ms, gb_per_s (of packed weights), bandwidth (that over what the machine reads
    at best), ratio_fp32, ratio_bf16 (torch's time over ours; a layer's with inputs of the same type, `ms` with those of
    float32), and error (relative, against float64).
    """
    limit = 0.0
    for m, n in sizes:
        limit = max(limit, read_bandwidth())  # the best so far: a machine that others use has its moments
        if 16 * m * n > free_memory():  # two copies of each, and room to make them
            print(f"{m}x{n} is left out: its dense copies do not fit into memory", file=sys.stderr)
            continue
        dense = {}
        for dtype in (torch.float32, torch.bfloat16):
            copies = max(STREAMED // (m * n * dtype.itemsize), 1) + 1
            dense[dtype] = [torch.randn(m, n).to(dtype) for _ in range(copies)]
        for bits in widths:
            layers = random_layers(m, n, bits, seed)
            for batch in batches:
                x = torch.randn(batch, n)
                for stage, function in stages().items():
                    times = fastest_streams(
                        {
                            "ours": [partial(function, layer, x) for layer in layers],
                            "half": [partial(function, layer, x.bfloat16()) for layer in layers if stage == "layer"],
                            **{d: [partial(torch.nn.functional.linear, x.to(d), W) for W in dense[d]] for d in dense},
                        },
                        repeats,
                    )
                    speed = m * packed_width(n, bits) / times["ours"]
                    yield {
                        **{"m": m, "n": n, "bits": bits, "batch": batch, "stage": stage, "ms": 1e3 * times["ours"]},
                        **{"gb_per_s": speed / 1e9, "bandwidth": speed / limit},
                        "ratio_fp32": times[torch.float32] / times["ours"],
                        "ratio_bf16": times[torch.bfloat16] / times["half" if stage == "layer" else "ours"],
                        "error": layer_error(function, layers[0], x[:1], stage),
                    }
            del layers
        del dense


def stages() -> dict[str, Callable]:
    """What is timed: functions of a layer and its inputs. The product alone is timed where the CPU kernel runs."""
    layer = {"layer": lambda layer, x: layer(x)}
    if cpu.library() is None:
        return layer
    return {"multiply": lambda layer, x: layer.prepared().multiply(x), **layer}


def random_layers(m: int, n: int, bits: int, seed: int) -> list[QuantizedLinear]:
    """Layers of random codes with one pair of transforms, as many as memory streams."""
    g = torch.Generator().manual_seed(seed)
    basis = Basis(KroneckerTransform(n, seed), KroneckerTransform(m, seed + 1), None)
    codes = torch.randint(2**bits, (m, n), generator=g, dtype=torch.uint8)
    first = QuantizedLinear.from_matrix(QuantizedMatrix(codes, 1.0, bits, basis, {}, {}))
    layers = [first]
    for _ in range(STREAMED // first.qweight.nbytes):
        layers.append(QuantizedLinear(n, m, bits))
        layers[-1].qweight, layers[-1].scale = first.qweight.roll(len(layers), 0), first.scale
        layers[-1].V, layers[-1].U = first.V, first.U
    return layers


def fastest_streams(what: dict[object, list[Callable]], repeats: int) -> dict[object, float]:
    """Seconds a call of each kind, its functions called one after the other; the least of `repeats` turns or more.

    Every function is called once before, since a layer's first call prepares the others. A turn ends after 32 calls or
    `TURN` seconds, as a longer one would meet more of what disturbs; where they are long, there are more.
    """
    clock = cpu_clock()
    calls, best, longest = {}, {}, 0.0
    for kind, functions in what.items():
        if not functions:
            continue
        start = clock()
        for function in functions:
            function()
        seconds = max((clock() - start) / len(functions), 1e-9)
        count = max(1, min(len(functions), 32, int(TURN / seconds)))
        calls[kind], best[kind], longest = (cycle(functions), count), float("inf"), max(longest, count * seconds)
    for _ in range(repeats * (4 if longest > TURN / 4 else 1)):
        for kind, (functions, count) in calls.items():
            turn = list(islice(functions, count))
            start = clock()
            for function in turn:
                function()
            best[kind] = min(best[kind], (clock() - start) / count)
    return best


def cpu_clock() -> Callable[[], float]:
    """A clock for work on the CPU: on one thread, of the time that it had, whatever else the machine does meanwhile."""
    return thread_time if torch.get_num_threads() == 1 else perf_counter


def now(device: torch.device) -> float:
    """The time at which everything asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def layer_error(function: Callable, layer: QuantizedLinear, x: torch.Tensor, stage: str) -> float:
    """Relative error of one output vector against float64."""
    z, y = x.double(), torch.empty(1, layer.out_features, dtype=torch.float64)
    z = z if stage == "multiply" else layer.V(z)
    for i in range(0, layer.out_features, 512):  # rows, since a large matrix in float64 may not fit
        rows = unpack(layer.qweight[i : i + 512], layer.bits, layer.in_features)
        y[:, i : i + 512] = z @ centred(rows, layer.bits, torch.float64).T
    y *= layer.scale.double() / (1 - 2.0**-layer.bits)
    y = y if stage == "multiply" else layer.U.inverse(y)
    return ((function(layer, x).double() - y).norm() / y.norm()).item()


def free_memory() -> int:
    """Bytes of memory that are free, as far as the system says; otherwise, no limit."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**62


def read_bandwidth() -> float:
    """Bytes a second that this machine reads from memory, in huge pages, as packed weights lie: the best of twenty.

    On as many threads as torch uses.
    """
    data = in_huge_pages(torch.ones(2**28, dtype=torch.uint8))
    read = partial(cpu.read, data) if cpu.library() is not None else data.view(torch.int64).sum
    clock, best = cpu_clock(), float("inf")
    for _ in range(20):
        start = clock()
        read()
        best = min(best, clock() - start)
    return len(data) / best


@torch.no_grad()
def bench_generate(models: dict[str, torch.nn.Module], tokenizer, prompt: str, tokens: int, repeats: int) -> list[dict]:
    """Tokens a second of `model.generate` after a prompt, batch 1, greedy, the models taking turns.

    The time of the prompt is left out: it is that of two tokens taken from that of `tokens + 2`. Rows: model, dtype,
    tokens_per_s (the best of `repeats`), ms_per_token, of_it_linear (in the linear layers of its blocks), of_it_head
    (the output head), of_it_rest (attention, norms, and Python).
    """
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    best = dict.fromkeys(models, float("inf"))
    for _ in range(repeats):
        for name, model in models.items():
            seconds = generate_seconds(model, ids, tokens + 2) - generate_seconds(model, ids, 2)
            best[name] = min(best[name], seconds / tokens)
    rows = []
    for name, model in models.items():
        parts = time_parts(model, ids, tokens)
        row = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "tokens_per_s": 1 / best[name]}
        rows.append(row | {"ms_per_token": 1e3 * best[name]} | parts)
    return rows


def generate_seconds(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> float:
    """Seconds that it takes to generate exactly so many tokens, greedily."""
    ids = ids.to(model.device)
    start = now(model.device)
    exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.generate(ids, attention_mask=torch.ones_like(ids), **exactly)
    return now(model.device) - start


KERNEL = ("quip_linears", "quip_gated", "quip_rms_norm", "quip_block_in", "quip_block_out")


def time_parts(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> dict[str, float]:
    """What part of the time of generating goes into linear layers, and into the output head.

    Linear layers and the head are timed by hooks around each. Quantized layers are timed where the kernel is called,
    since hooks would keep modules from being one call; where it does norms and attention as well, they count as linear.
    """
    spent, head = {"linear": 0.0, "head": 0.0}, model.get_output_embeddings()
    kinds = torch.nn.Linear if cpu.library() else (torch.nn.Linear, QuantizedLinear)
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, kinds):
                stack.enter_context(timed(module, model.device, spent, "head" if module is head else "linear"))
        if cpu.library():
            stack.enter_context(timed_kernel(spent))
        total = generate_seconds(model, ids, tokens)
    parts = {f"of_it_{kind}": seconds / total for kind, seconds in spent.items()}
    return parts | {"of_it_rest": 1 - sum(parts.values())}


@contextlib.contextmanager
def timed(module: torch.nn.Module, device: torch.device, spent: dict[str, float], kind: str) -> Iterator[None]:
    """Add the time of a module's calls to `spent[kind]`."""
    started = []

    def stop(*_) -> None:
        spent[kind] += now(device) - started.pop()

    before = module.register_forward_pre_hook(lambda *_: started.append(now(device)))
    after = module.register_forward_hook(stop)
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextlib.contextmanager
def timed_kernel(spent: dict[str, float]) -> Iterator[None]:
    """Add the time of the CPU kernel's calls to `spent["linear"]`."""
    library = cpu.library()
    functions = {name: getattr(library, name) for name in KERNEL}

    def measured(function: Callable) -> Callable:
        def call(*args):
            start = perf_counter()
            result = function(*args)
            spent["linear"] += perf_counter() - start
            return result

        return call

    try:
        for name, function in functions.items():
            setattr(library, name, measured(function))
        yield
    finally:
        for name, function in functions.items():
            setattr(library, name, function)
