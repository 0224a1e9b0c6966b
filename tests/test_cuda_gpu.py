"""The CUDA kernels on a GPU. On a machine without one, all of these are skipped."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cuda import BITS, TOLERANCE, TYPES, random_layer, relative
from test_prompts import bound
from test_prompts import make as make_side

import quip.cuda as cuda
from quip import bench_cuda, data, load_model
from quip.algorithm import quantize_matrix
from quip.evaluate import perplexity
from quip.kernels import QuantizedLinear
from quip.pipeline import quantize_to_folder
from quip.prompts import KernelSide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.available(), reason=cuda.reason() or "available"),
    pytest.mark.filterwarnings("ignore:quip has no CPU kernel"),  # it may not have been built there
]


def to(value, device="cuda"):
    if isinstance(value, (tuple, list)):
        return type(value)(to(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (67, 134), (576, 1536), (1000, 1000)])
def test_layer(m, n, bits, dtype):
    (x, *rest), exact = to(random_layer(m, n, 100, bits, dtype, 0)[:2])
    for batch in (1, 3, 8, 9, 17, 32, 33, 100):
        y = cuda.linear(x[:batch], *rest)
        assert y.dtype == dtype and torch.isfinite(y).all()
        assert relative(y, exact[:batch]) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", BITS)
def test_multiply_and_unpack(bits, dtype):
    (x, packed, scale, *_), exact, layer = random_layer(100, 333, 5, bits, dtype, 0, False, False)
    assert relative(cuda.multiply(*to((x, packed, scale)), bits).cpu(), exact) < 4 * TOLERANCE[dtype]
    assert torch.equal(cuda.unpack(packed.cuda(), bits, 333, dtype).cpu(), layer.C.float().to(dtype))


def test_on_a_stream_of_its_own():
    args, exact, _ = random_layer(576, 576, 1, 2, torch.float16, 0)
    args, stream = to(args), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = cuda.linear(*args)
    stream.synchronize()
    assert relative(y.cpu(), exact) < 4 * TOLERANCE[torch.float16]


def test_in_a_cuda_graph():
    args, exact, _ = random_layer(576, 576, 1, 2, torch.float16, 0)
    args = to(args)
    cuda.linear(*args)  # compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.linear(*args)
    args[0].mul_(2)
    graph.replay()
    args[0].div_(2)
    assert not torch.equal(y, cuda.linear(*args))
    graph.replay()
    assert relative(y.cpu(), exact) < 4 * TOLERANCE[torch.float16]


def on_device(call_args):
    x, packed, scale, bits, V, U, rescale, bias = to(call_args)
    return x, cuda.Call(x.shape[1], packed, scale, bits, rescale, bias, *V, *U)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "kernels"),
    [(1, 1, 2), (576, 1536, 2), (323, 1763, 2), (11008, 4096, 2), (192, 14336, 2), (64, 27648, 2), (67, 576, 1)],
)
def test_prompts(m, n, kernels, extras, dtype):
    args, exact, _ = random_layer(m, n, 67, 2, dtype, 0, extras=extras)
    x, call = on_device(args)
    for batch in (33, 64, 67):
        assert relative(call(x[:batch]).cpu(), exact[:batch]) < 4 * TOLERANCE[dtype]
    sides = call._rounded(dtype)
    assert sum(isinstance(side, KernelSide) for side in sides) == kernels or torch.cuda.get_device_capability()[0] < 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("p", "q"), [(64, 64), (86, 128), (128, 224), (144, 192), (43, 41), (24, 24), (1, 7)])
def test_sides_of_a_prompt(p, q, permuted, back, dtype):
    side, args, exact = make_side(p, q, 7, dtype, 3, back, permuted, kernels=cuda._load)
    for vectors in range(1, side.vectors + 1):  # of a block
        side.vectors = vectors
        y = side(*args).cpu()
        assert relative(y, exact) < bound(y)


def test_prompts_on_a_stream_of_their_own():
    args, exact, _ = random_layer(576, 1536, 67, 2, torch.float16, 0)
    x, call = on_device(args)
    call(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ys = [call(x) for _ in range(3)]
    stream.synchronize()
    assert list(call.halves) == [torch.float16]  # made once, and finished before any stream uses them
    assert all(relative(y.cpu(), exact) < 4 * TOLERANCE[torch.float16] for y in ys)


@pytest.mark.parametrize("called", [False, True])
def test_prompts_in_a_cuda_graph(called):
    args, exact, _ = random_layer(576, 1536, 67, 2, torch.float16, 0)
    x, call = on_device(args)
    if called:
        call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    for factor in (2, 0.5):
        x.mul_(factor)
        graph.replay()
    assert relative(y.cpu(), exact) < 4 * TOLERANCE[torch.float16]


def test_many_layers_one_after_the_other():
    # each starts before the one before it has ended, and must not read or overwrite what that one still needs
    args, _, _ = random_layer(512, 512, 1, 2, torch.float16, 0, extras=False)
    x, *rest = to(args)
    rest[1].fill_(1 / (0.745 * 512**0.5))  # neither grows nor shrinks much
    chain, expected = x, x
    for _ in range(200):
        chain = cuda.linear(chain, *rest)
    for _ in range(200):
        expected = cuda.linear(expected, *rest)
        torch.cuda.synchronize()
    assert torch.equal(chain, expected) and torch.isfinite(chain).all()


def test_a_quantized_layer():
    W = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    layer = QuantizedLinear.from_matrix(quantize_matrix(W, torch.eye(160), 2))
    x = torch.randn(2, 3, 160)
    expected = layer(x)
    moved = layer.to("cuda")
    for _ in range(2):  # the second time by the call that the first has prepared
        assert relative(moved(x.cuda()).cpu(), expected.double()) < 1e-4
    assert isinstance(moved.call, cuda.Call)
    assert relative(moved.to("cpu")(x), expected.double()) < 1e-6


def test_a_layer_called_again_and_again():
    args, exact, _ = random_layer(576, 1536, 40, 2, torch.float16, 0)
    x, packed, scale, bits, V, U, rescale, bias = to(args)
    call = cuda.Call(1536, packed, scale, bits, rescale, bias, *V, *U)

    def run(batches):
        with torch.cuda.stream(torch.cuda.Stream()):
            for batch in batches:
                y = call(x[40 - batch :])
                assert relative(y.cpu(), exact[40 - batch :]) < 4 * TOLERANCE[torch.float16]

    run([1, 3, 1, 40, 8, 1, 3])
    with ThreadPoolExecutor(4) as pool:  # each its own stream, all of them one layer
        list(pool.map(run, [[1, 8, 1] * 20] * 4))


def test_benchmarks(monkeypatch):
    monkeypatch.setattr(bench_cuda, "STREAMED", 2**20)
    (row,) = bench_cuda.bench_kernels([(256, 512)], widths=(2,), batches=(1,))
    assert row["us"] > 0 and row["ratio"] == pytest.approx(row["dense_us"] / row["us"]) and row["error"] < 1e-3
    (row,) = bench_cuda.bench_calls([(256, 512)], calls=10)
    assert row["us"] > 0 and row["dense_us"] > 0
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 512}
    rows = list(bench_cuda.bench_decode((2, 16), layers=2, shape=shape))
    assert [row["bits"] for row in rows] == [16, 2] and all(row["ms_per_token"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_on_another_device():
    args, exact, _ = random_layer(64, 64, 1, 2, torch.float16, 0)
    y = cuda.linear(*to(args, "cuda:1"))
    assert y.device.index == 1 and relative(y.cpu(), exact) < 4 * TOLERANCE[torch.float16]


OPT = Path(__file__).parent.parent / "book/data/opt"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The folder of the small OPT, quantized to 4 bits on the device."""
    out = tmp_path_factory.mktemp("gpu") / "opt"
    text = str(OPT / "calibration.txt")
    quantize_to_folder(str(OPT), out, bits=4, calibration=text, samples=48, seq_len=256, device="cuda")
    return out


def test_a_model_quantized_on_the_device(quantized):
    # statistics, rounding, packing, saving; what is saved runs there and on a CPU
    text = data.load_text(str(OPT / "evaluation.txt"))
    ppl = {}
    for name, source, device in (("dense", OPT, "cpu"), ("cpu", quantized, "cpu"), ("cuda", quantized, "cuda")):
        model, tokenizer = load_model(str(source), device, torch.float32)
        ppl[name] = perplexity(model, data.tokenize(tokenizer, text)[:8192], 256, progress=False)["ppl"]
    assert ppl["cuda"] == pytest.approx(ppl["cpu"], rel=1e-3)
    assert ppl["cuda"] < 1.03 * ppl["dense"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_text_from_a_quantized_model(quantized, dtype):
    model, tokenizer = load_model(str(quantized), "cuda", dtype)
    ids = tokenizer("import", return_tensors="pt").input_ids.cuda()
    # the very token may differ by rounding; what both think of one text may not
    text = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert text.shape == (1, ids.shape[1] + 20)
    expected = load_model(str(quantized), "cpu")[0](text.cpu()).logits
    assert relative(model(text).logits.cpu(), expected.double()) < 0.03


def test_a_quantized_model_compiles(quantized):
    model, tokenizer = load_model(str(quantized), "cuda", torch.float16)
    ids = tokenizer("import torch", return_tensors="pt").input_ids.cuda()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    assert relative(compiled, expected.double()) < 0.02
