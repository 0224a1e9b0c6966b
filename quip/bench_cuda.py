"""Benchmarks on a GPU: layers and whole models, recorded as CUDA graphs, so that no time of Python's is in them.

But for `bench_calls`, which measures that.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import torch

from quip import cuda
from quip.errors import QuipError
from quip.incoherence import make_transform
from quip.kernels import QuantizedLinear

SIZES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672), (576, 1536))
STREAMED = 2**28  # bytes of weights that take turns: more than caches hold
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}  # of 7B


def graph_seconds(run: Callable[[int], object], calls: int = 64, repeats: int = 9) -> float:
    """Seconds of one of `run(0)`, `run(1)`, … when they are replayed one after the other; the median of some rounds."""
    run(0)  # compiles and loads
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i)
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return sorted(times)[repeats // 2]


def read_bandwidth() -> float:
    """Bytes a second at which the device reads a gigabyte, by torch's sum."""
    data = torch.ones(2**27, dtype=torch.int64, device="cuda")
    return data.nbytes / graph_seconds(lambda i: data.sum(), calls=4)


def need_device() -> None:
    if not cuda.available():
        raise QuipError(f"no CUDA kernels here: {cuda.reason()}")


@torch.no_grad()
def bench_kernels(sizes=SIZES, widths=(2, 3, 4), batches=(1, 8, 32), dtype=torch.float16) -> Iterator[dict]:
    """Time packed layers beside `torch.nn.functional.linear` of the same type, weights streamed from memory.

    Rows: m, n, bits, batch, dtype, us (of the layer), forward_us, multiply_us, backward_us (its kernels, each timed by
    itself; a long prompt has unpack_us and product_us instead of multiply_us), dense_us, ratio (dense over ours),
    gb_per_s (of packed weights, in the multiplication), bandwidth (that over what the device reads), and error
    (relative, float64).
    """
    need_device()
    limit = read_bandwidth()
    for m, n in sizes:
        dense = torch.randn(min(STREAMED // (2 * m * n) + 1, 64), m, n, device="cuda").to(dtype)
        for bits in widths:
            layers = random_calls(m, n, bits)
            for batch in batches:
                x = torch.randn(batch, n, device="cuda").to(dtype)
                row = {"m": m, "n": n, "bits": bits, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
                for call in layers:  # what only a first call does is not to be recorded
                    call(x), call(x)
                ours = graph_seconds(lambda i, c=layers, x=x: c[i % len(c)](x))
                plain = graph_seconds(lambda i, W=dense, x=x: torch.nn.functional.linear(x, W[i % len(W)]))
                row |= {"us": 1e6 * ours, **kernel_times(layers, x), "dense_us": 1e6 * plain, "ratio": plain / ours}
                if "multiply_us" in row:
                    speed = m * cuda.row_bytes(n, bits) / row["multiply_us"] * 1e6
                    row |= {"gb_per_s": speed / 1e9, "bandwidth": speed / limit}
                yield row | {"error": layer_error(layers[0], x[:1])}
            del layers
        del dense


def random_calls(m: int, n: int, bits: int) -> list[cuda.Call]:
    """Layers of random codes, as many as memory streams."""
    V, U = (make_transform(width, seed).to("cuda") for width, seed in ((n, 1), (m, 2)))
    count = min(STREAMED // (m * cuda.row_bytes(n, bits)) + 1, 64)
    packed = torch.randint(256, (count, m, cuda.row_bytes(n, bits)), dtype=torch.uint8, device="cuda")
    scale = torch.ones(1, device="cuda")
    return [cuda.Call(n, codes, scale, bits, None, None, *V.tensors(), *U.tensors()) for codes in packed]


def kernel_times(calls: list[cuda.Call], x: torch.Tensor) -> dict[str, float]:
    """Microseconds of the kernels of a layer, each by itself."""
    if len(x) > cuda.FUSED or not calls[0].fused:
        return prompt_times(calls, x)
    y = x.new_empty(len(x), calls[0].m)
    plans = [call.plan(len(x), x.dtype) for call in calls]
    tensors = x, y, plans[0].room(x.device)
    calls[0].kernels.run(plans[0], *tensors)  # leaves in the room what each part reads
    times = {}
    for key, names in {"forward": ("first", "forward"), "multiply": "multiply", "backward": "backward"}.items():
        parts = [plan.only(names) for plan in plans]
        seconds = graph_seconds(lambda i, p=parts: calls[0].kernels.run(p[i % len(p)], *tensors))
        times[f"{key}_us"] = 1e6 * seconds
    return times


def prompt_times(calls: list[cuda.Call], x: torch.Tensor) -> dict[str, float]:
    """Microseconds of both sides of a long prompt, of unpacking, and of the product."""
    call, count = calls[0], len(calls)
    forward, backward = call._rounded(x.dtype)
    C = cuda.unpack(call.qweight, call.bits, call.n, x.dtype)
    z = forward(x) @ C.T
    parts = {
        "forward": lambda i: forward(x),
        "unpack": lambda i: cuda.unpack(calls[i % count].qweight, call.bits, call.n, x.dtype),
        "product": lambda i: x @ C.T,
        "backward": lambda i: backward(z, call.scale, 1.0, call.bias),
    }
    return {f"{name}_us": 1e6 * graph_seconds(run, calls=16) for name, run in parts.items()}


def layer_error(call: cuda.Call, x: torch.Tensor) -> float:
    """Relative error of one output against float64, whose matrix is unpacked some rows at a time."""
    V, U = make_transform(call.n, 1, torch.float64), make_transform(call.m, 2, torch.float64)
    z, y = V(x.double().cpu()).cuda(), torch.empty(1, call.m, dtype=torch.float64, device="cuda")
    for i in range(0, call.m, 512):
        rows = cuda.unpack(call.qweight[i : i + 512], call.bits, call.n, torch.float32)
        levels = 2**call.bits - 1
        y[:, i : i + 512] = z @ ((rows.double() * levels).round() / levels).T
    y = U.inverse(y.cpu())
    return ((call(x).double().cpu() - y).norm() / y.norm()).item()


@torch.no_grad()
def bench_decode(widths=(2, 3, 4, 16), layers: int = 32, shape: dict = LLAMA) -> Iterator[dict]:
    """Time one token of a Llama with random weights, batch 1, in float16: at each width, 16 being no quantization.

    The step of the model with a static cache of 256 tokens is replayed as a CUDA graph. Rows: bits, layers, weights_gb
    (memory that the model takes), ms_per_token, tokens_per_s, and ratio (time in 16 bits over ours, if it is measured).
    """
    need_device()
    rows = []
    for bits in sorted(widths, reverse=True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = random_llama(bits, layers, shape)
        memory = torch.cuda.memory_allocated() - before
        seconds = decode_seconds(model)
        row = {"bits": bits, "layers": layers, "weights_gb": memory / 1e9, "ms_per_token": 1e3 * seconds}
        rows.append(row | {"tokens_per_s": 1 / seconds})
        if rows[0]["bits"] == 16:
            rows[-1]["ratio"] = rows[0]["ms_per_token"] / rows[-1]["ms_per_token"]
        yield rows[-1]
        del model


def random_llama(bits: int, layers: int, shape: dict) -> torch.nn.Module:
    """A Llama with random weights in float16 on the GPU; its linear layers, but for the head, of random codes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, num_hidden_layers=layers, num_key_value_heads=shape["num_attention_heads"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    transforms = {}  # of each width, copied into each layer
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear) and bits < 16:
            packed = random_layer(layer.out_features, layer.in_features, bits, transforms)
            model.model.layers.set_submodule(name, packed)
    for name, old in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        value = torch.ones(old.shape) if old.dim() < 2 else torch.empty(old.shape, device="cuda").normal_(0, 0.02)
        setattr(model.get_submodule(owner), key, torch.nn.Parameter(value.half().to("cuda"), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to("cuda")
    return model.eval()


def random_layer(m: int, n: int, bits: int, transforms: dict) -> QuantizedLinear:
    """A layer of random codes on the GPU; `transforms` has those of each width that was needed so far."""
    layer = QuantizedLinear(n, m, bits).to("cuda")
    layer.qweight.random_(0, 256)
    layer.scale.fill_(0.02)
    for side, width in (("V", n), ("U", m)):
        if width not in transforms:
            transforms[width] = make_transform(width, 1).to("cuda")
        setattr(layer, side, copy.deepcopy(transforms[width]))
    return layer


@torch.no_grad()
def bench_calls(sizes=SIZES[:1], widths=(2,), calls: int = 1000) -> Iterator[dict]:
    """Time layers in float16 that Python calls one after the other, batch 1, as a model does without a CUDA graph.

    Rows: m, n, bits, us (of the layer), dense_us (of `torch.nn.Linear`).
    """
    need_device()
    for m, n in sizes:
        x = torch.randn(1, n, dtype=torch.float16, device="cuda")
        dense = torch.nn.Linear(n, m, bias=False, dtype=torch.float16, device="cuda")
        for bits in widths:
            ours, plain = (1e6 * call_seconds(f, x, calls) for f in (random_layer(m, n, bits, {}), dense))
            yield {"m": m, "n": n, "bits": bits, "us": ours, "dense_us": plain}


def call_seconds(run: Callable, x: torch.Tensor, calls: int) -> float:
    """Seconds of a call from Python, when many follow one another."""
    for _ in range(10):
        run(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run(x)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def decode_seconds(model: torch.nn.Module, steps: int = 50) -> float:
    """Seconds of a step of decoding, replayed as a CUDA graph."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=256)
    token, at = torch.ones(1, 1, dtype=torch.int64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step(i: int = 0) -> torch.Tensor:
        return model(token, past_key_values=cache, cache_position=at, position_ids=at[None], use_cache=True).logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # twice before it is recorded: memory, kernels and cache are then there
        step(), step()
    torch.cuda.current_stream().wait_stream(side)
    return graph_seconds(step, calls=1, repeats=steps)
