"""The CUDA kernels without a GPU: run on the CPU by an emulation that finds what is wrong, and compiled by NVRTC."""

import copy
import ctypes
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quip.cuda as cuda
from quip.algorithm import quantize_matrix
from quip.errors import QuipError
from quip.incoherence import IdentityTransform, KroneckerTransform
from quip.kernels import QuantizedLinear

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
from emulate import COMPILER, EmulationError, Emulator

emulated = pytest.mark.skipif(COMPILER is None, reason="the emulation needs a C++ compiler")
BITS, TYPES = (2, 3, 4), tuple(cuda.TYPES)


def naive_pack(codes, bits):
    """The format bit by bit: a stream of low parts, and for 3 bits another of bits 2."""
    m, n = codes.shape
    groups, low = -(-n // 64), 4 if bits == 4 else 2
    rows = [bytearray(groups * 8 * bits) for _ in range(m)]
    for row, codes_of_row in zip(rows, codes.tolist(), strict=True):
        for j, code in enumerate(codes_of_row):
            for i in range(bits):
                bit = low * j + i if i < low else groups * 8 * 2 * 8 + j
                row[bit // 8] |= (code >> i & 1) << bit % 8
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8)


def parts(transform):
    names = [f"{side}{i}" for i in range(len(getattr(transform, "offsets", []))) for side in ("left", "right")]
    return getattr(transform, "perm", None), [getattr(transform, name) for name in names]


def random_layer(m, n, batch, bits, dtype, seed, transforms=True, extras=True):
    """Arguments of `linear`, and what it should return, in float64."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (m, n), generator=g)
    x, scale = torch.randn(batch, n, generator=g).to(dtype), torch.rand(1, generator=g) + 0.5
    rescale = torch.rand(n, generator=g) + 0.5 if extras else None
    bias = torch.randn(m, generator=g).to(dtype) if extras else None
    make = KroneckerTransform if transforms else lambda n, seed, dtype: IdentityTransform(n)
    V, U, Vd, Ud = (make(k, s, t) for t in (torch.float32, torch.float64) for k, s in ((n, 1), (m, 2)))
    C = (2 * codes - (2**bits - 1)).double() / (2**bits - 1)
    exact = Ud.inverse(Vd(x.double() / (1 if rescale is None else rescale)) @ C.T * scale)
    exact = exact if bias is None else exact + bias.double()
    args = (x, naive_pack(codes, bits), scale, bits, parts(V), parts(U), rescale, bias)
    return args, exact, SimpleNamespace(C=C, V=V, U=U)


@pytest.fixture
def emulate(monkeypatch):
    """Puts the emulation in the place of a device, with a seed for the order of threads."""

    def put(seed=0):
        monkeypatch.setattr(cuda, "_load", lambda device, kind: Emulator(cuda.source(kind), kind, seed))

    return put


def relative(y, exact):
    return ((y.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@emulated
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 90),
    n=st.one_of(st.integers(1, 90), st.integers(250, 330)),
    batch=st.sampled_from([0, 1, 1, 2, 5, 8, 9, 17, 32, 33]),
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(TYPES),
    transforms=st.booleans(),
    extras=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layer_of_any_shape(emulate, m, n, batch, bits, dtype, transforms, extras, seed):
    emulate(seed)
    args, exact, _ = random_layer(m, n, batch, bits, dtype, seed, transforms, extras)
    y = cuda.linear(*args)
    assert y.shape == (batch, m) and y.dtype == dtype and torch.isfinite(y).all()
    worst = (y.double() - exact).abs().max().item() if batch else 0
    assert worst <= 4 * TOLERANCE[dtype] * (1 + exact.abs().max().item() if batch else 1)


@emulated
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", BITS)
def test_every_schedule_gives_the_same(emulate, bits, dtype):
    # Nothing depends on who comes first, so not a bit may differ. 67 is a prime: two Kronecker stages on that side.
    args, exact, _ = random_layer(67, 134, 9, bits, dtype, 0)
    results = []
    for seed in range(3):
        emulate(seed)
        results.append(cuda.linear(*args))
    assert all(torch.equal(y, results[0]) for y in results)
    assert relative(results[0], exact) < TOLERANCE[dtype]


@emulated
@pytest.mark.parametrize("dtype", TYPES)
def test_error_is_at_most_twice_that_of_the_plain_form(emulate, dtype):
    emulate(1)
    (x, packed, scale, bits, v, u, rescale, bias), exact, layer = random_layer(96, 320, 8, 2, dtype, 3)
    y = cuda.linear(x, packed, scale, bits, v, u, rescale, bias)
    plain = layer.V.to(dtype)(x / rescale.to(dtype)) @ layer.C.to(dtype).T * scale.to(dtype)
    plain = layer.U.to(dtype).inverse(plain) + bias
    assert relative(y, exact) < 2 * relative(plain, exact)


@emulated
@pytest.mark.parametrize("bits", BITS)
def test_multiply_and_unpack(emulate, bits):
    emulate(2)
    (x, packed, scale, *_), exact, layer = random_layer(21, 200, 3, bits, torch.float16, 5, False, False)
    assert relative(cuda.multiply(x, packed, scale, bits), exact) < 1e-3
    for dtype in TYPES:
        assert torch.equal(cuda.unpack(packed, bits, 200, dtype), layer.C.float().to(dtype))


@emulated
@pytest.mark.parametrize(
    ("m", "n", "dtype", "bits"),
    [
        (576, 1536, torch.float16, 2),  # down_proj of SmolLM2-135M
        pytest.param(40, 11008, torch.bfloat16, 3, marks=pytest.mark.slow),  # as wide as Llama 2's
        pytest.param(40, 11008, torch.float32, 4, marks=pytest.mark.slow),
    ],
)
def test_shapes_of_real_layers(emulate, m, n, dtype, bits):
    emulate(3)
    args, exact, _ = random_layer(m, n, 1, bits, dtype, 0)
    assert relative(cuda.linear(*args), exact) < TOLERANCE[dtype]


@emulated
def test_one_input_one_output(emulate):
    emulate(1)
    for bits in BITS:
        args, exact, _ = random_layer(1, 1, 1, bits, torch.float16, 0)
        assert relative(cuda.linear(*args), exact) < 2e-3


@emulated
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_any_size(emulate, dtype, size):
    # they are scaled into the range of float16, and scaled back
    emulate(1)
    (x, packed, scale, *_), exact, _ = random_layer(21, 300, 3, 2, dtype, 5, False, False)
    scaled = (x * size).to(dtype)
    exact = exact * (scaled.double().norm() / x.double().norm())
    assert relative(cuda.multiply(scaled, packed, scale, 2), exact) < TOLERANCE[dtype]


@emulated
def test_one_large_entry_beside_small_ones(emulate):
    emulate(1)
    args, _, layer = random_layer(64, 256, 2, 2, torch.float32, 0, extras=False)
    x = args[0]
    x[0, 7] = 3000
    exact = layer.U.double().inverse(layer.V.double()(x.double()) @ layer.C.T * args[2])
    assert relative(cuda.linear(x, *args[1:]), exact) < 4 * TOLERANCE[torch.float32]


@emulated
def test_zero_infinite_and_undefined_activations(emulate):
    emulate(1)
    (x, *rest), _, _ = random_layer(24, 70, 3, 2, torch.float32, 0, extras=False)
    x[0], x[1, 3], x[2, 5] = 0, torch.inf, torch.nan
    y = cuda.linear(x, *rest)
    assert (y[0] == 0).all() and not torch.isfinite(y[1:]).any()


@emulated
@pytest.mark.parametrize("rescale", [False, True])
def test_the_call_of_a_quantized_layer(emulate, rescale):
    emulate(1)
    W = torch.randn(24, 70, generator=torch.Generator().manual_seed(0))
    layer = QuantizedLinear.from_matrix(quantize_matrix(W, torch.eye(70), 3, rescale=rescale), torch.ones(24))
    call, x = cuda.Call(layer.in_features, *layer.tensors()), torch.randn(2, 3, 70)
    assert call.takes(x) and call.is_current(layer._buffers) and not call.takes(x[..., :69])
    assert relative(call(x), layer(x)) < 1e-4  # the CPU's kernel rounds x to two digits
    layer.scale = layer.scale.clone()
    assert not call.is_current(layer._buffers)
    layer.call = call
    assert copy.deepcopy(layer).call is None and pickle.loads(pickle.dumps(call)) is None


@emulated
def test_strided_and_unaligned_inputs(emulate):
    emulate(1)
    (x, packed, scale, bits, (perm, V), u, rescale, bias), exact, _ = random_layer(24, 70, 3, 2, torch.float16, 0)
    x = x.repeat_interleave(2, 1)[:, ::2]
    buffer = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    unaligned = buffer[1:].view_as(packed).copy_(packed)
    V = [matrix.T.contiguous().T for matrix in V]
    rescale, perm = rescale.repeat_interleave(2)[::2], perm.repeat_interleave(2)[::2]
    y = cuda.linear(x, unaligned, scale, bits, (perm, V), u, rescale, bias.double())
    assert relative(y, exact) < TOLERANCE[torch.float16]


@emulated
def test_no_outputs_or_no_vectors(emulate):
    emulate(1)
    args, _, _ = random_layer(5, 70, 0, 2, torch.float16, 0)
    assert cuda.linear(*args).shape == (0, 5)
    none = torch.zeros(0, cuda.row_bytes(70, 2), dtype=torch.uint8)
    assert cuda.multiply(torch.ones(3, 70), none, torch.ones(1), 2).shape == (3, 0)
    assert cuda.unpack(none, 2, 70, torch.float16).shape == (0, 70)


@emulated
def test_layers_too_wide_for_shared_memory_go_the_dense_way(emulate, monkeypatch):
    emulate(1)
    monkeypatch.setattr(Emulator, "room", 1024 + 16 * 18)
    monkeypatch.setattr(cuda.Call, "_forward", None)
    args, exact, _ = random_layer(24, 70, 3, 2, torch.float32, 0)
    assert relative(cuda.linear(*args), exact) < 1e-5


def test_limits_are_those_of_the_sources():
    assert "MOST_WARPS = 8;" in cuda.TENSOR and "STRIP = 4;" in cuda.KRONECKER  # 256 threads; `_strips`
    assert cuda._threads(10**6, 1) == 1024 and cuda._threads(10**6, 99) == 128
    assert cuda.DEVICE.count("__launch_bounds__(1024, 1)") == 1


# Planted bugs: each is one change of a source, and what the emulation must say of it.

SORT = """
KERNEL sort(PTR(half16) out, PTR(float) sums, PTR(const float) x, int n) {
    long long start = (long long)blockIdx.x * n;
    for (int j = threadIdx.x; j < padded_width(n); j += blockDim.x) {
        half16 digit;
        from_float(j < n ? x[start + j] * 256 / (1 << lift(j)) : 0.0f, digit);
        out[place(j, blockIdx.x, n)] = digit;
    }
    if (threadIdx.x == 0) {
        float sum = 0;
        for (int j = 0; j < n; j++) sum += x[start + j] * 256;
        sums[blockIdx.x * 2] = 1.0f / 256;
        sums[blockIdx.x * 2 + 1] = sum;
    }
}
"""


def run_multiply(source, bits=3, m=21, n=300, batch=9, seed=1):
    (x, packed, scale, *_), exact, _ = random_layer(m, n, batch, bits, torch.float16, 0, False, False)
    kernels = Emulator(cuda.COMMON + source + SORT, bits, seed)
    ready = torch.full((-(-batch // 8) * 8, -(-n // 256) * 256), torch.nan, dtype=torch.float16)
    sums, z = torch.full((batch, 2), torch.nan), torch.full((batch, m), torch.nan)
    kernels("sort", (batch, 1), ready, sums, x.float(), n)
    tile = 8 if batch <= 8 else 16 if batch <= 16 else 32
    grid = -(-batch // tile), -(-m // 16)
    kernels(f"multiply_{tile}", grid, z, ready, sums, packed, scale, m, n, batch, 1, 1)
    return relative(z, exact)


def run_wide(source):
    return run_multiply(source, batch=17)


def run_layer(source, m=42, n=70, seed=1):
    args, exact, _ = random_layer(m, n, 2, 2, torch.float32, 0)
    text = "\n".join((cuda.COMMON, cuda.UNPACK, cuda.TENSOR, source))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_load", lambda device, bits: Emulator(text, bits, seed))
        return relative(cuda.linear(*args), exact)


def barrier(source, number):
    """The source without one of its barriers."""
    pieces = source.split("__syncthreads()")
    return "__syncthreads()".join(pieces[:number]) + "0" + "__syncthreads()".join(pieces[number:])


TENSOR, KRONECKER = (run_multiply, cuda.TENSOR), (run_layer, cuda.KRONECKER)
BUGS = {
    "no barrier before the sums are added": (*TENSOR, 1, None, "writes|nobody has written"),
    "16 bytes at odd multiples of 8": (*TENSOR, "if (BITS == 3) {  // an", "if (0) {  // an", "not aligned"),
    "rows that do not exist": (*TENSOR, "row < m && group", "group", "of a buffer of"),
    "groups that do not exist": (*TENSOR, " && group * 64 < n", "", "of a buffer of"),
    "outputs that do not exist": (*TENSOR, "if (first_row + row < m) z[", "z[", "of a buffer of|another thread's"),
    "vectors that do not exist": (run_wide, cuda.TENSOR, "if (8 * j + g < count)\n", "\n", "of a buffer of"),
    "rows exchanged": (*TENSOR, "g + i / 2 * 8] =", "g + (1 - i / 2) * 8] =", None),
    "high bits of the wrong columns": (*TENSOR, "0x3120", "0x3210", None),
    "a code that is not taken as it lies": (*TENSOR, "k * FIELD < 8 ?", "true ?", None),
    "sums of x left out": (*TENSOR, " - offset[v]", "", None),
    "x read before it is there": (*TENSOR, "wait_for_previous();", "", "may still be writing"),
    "a tensor instruction that not all lanes reach": (
        *TENSOR,
        "multiply_tile(sum",
        "if (lane) multiply_tile(sum",
        "ended|wait|lines",
    ),
    "no barrier between the products": (*KRONECKER, 1, None, "writes|nobody has written"),
    "no barrier after x is loaded": (*KRONECKER, 2, None, "writes|nobody has"),
    "no barrier before sums are added": (*KRONECKER, 3, None, "writes|nobody has"),
    "no barrier after the factor is loaded": (*KRONECKER, 4, None, "writes|nobody has"),
    "strips beyond the end": (*KRONECKER, " && first + s < inner", "", "of a buffer of|another"),
    "factors beyond the end": (*KRONECKER, "if (first + i >= inner) return 0.0f;", "", "of a buffer of"),
    "arrays that overlap": (*KRONECKER, "memory + 16 * inner", "memory", "overlap"),
    "an array beyond what was asked for": (
        *KRONECKER,
        "memory + 16 * inner",
        "memory + 32 * inner + outer",
        "takes bytes",
    ),
    "z read before it is there": (*KRONECKER, "wait_for_previous(), ", "", "may still be writing"),
    "a lane too few in a sum": (*KRONECKER, "TRANSPOSED ? 32 : 8); mask", "TRANSPOSED ? 32 : 4); mask", None),
    "padding that nobody writes": (*KRONECKER, "n, padded_width(n));", "n, n);", None),
}


@emulated
def test_without_a_bug_nothing_is_said():
    assert run_multiply(cuda.TENSOR) < 1e-6 and run_wide(cuda.TENSOR) < 1e-6 and run_layer(cuda.KRONECKER) < 1e-6


@emulated
@pytest.mark.parametrize(("run", "source", "old", "new", "says"), BUGS.values(), ids=BUGS.keys())
def test_planted_bug_is_found(run, source, old, new, says):
    changed = barrier(source, old) if isinstance(old, int) else source.replace(old, new)
    assert changed != source
    if says is None:  # nothing forbidden, but wrong
        assert not run(changed) < 1e-3
    else:
        with pytest.raises(EmulationError, match=says):
            run(changed)


# The emulation itself.

TOY = """
KERNEL copy(PTR(float) y, PTR(const float) x, int n) {
    SHARED(float, buffer, 64);
    int i = threadIdx.x;
    buffer[i] = x[i];
    __syncthreads();
    y[i] = buffer[63 - i];
}
KERNEL halves(PTR(half16) h, PTR(bfloat16) b, PTR(const float) x, int n) {
    for (int i = threadIdx.x; i < n; i += 64) {
        half16 a;
        bfloat16 c;
        from_float(x[i], a), from_float(x[i], c);
        h[i] = a, b[i] = c;
    }
}
KERNEL floats(PTR(float) h, PTR(float) b, PTR(const half16) x, PTR(const bfloat16) y, int n) {
    for (int i = threadIdx.x; i < n; i += 64) h[i] = to_float(x[i]), b[i] = to_float(y[i]);
}
KERNEL deadlock(PTR(float) y) {
    if (threadIdx.x < 32) __syncthreads();
    else y[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, threadIdx.x == 33 ? 1 : 2);
    if (threadIdx.x >= 32) __syncthreads();
}
"""


@emulated
def test_emulation_runs_threads_that_exchange_through_shared_memory():
    x, y = torch.arange(64.0), torch.zeros(64)
    for seed in range(5):
        Emulator(TOY, 2, seed)("copy", (1, 1), y, x, 64, threads=64)
        assert torch.equal(y, x.flip(0))


@emulated
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    __syncthreads();\n    y", "    y", "barrier|nobody has written"),
        ("buffer[63 - i]", "buffer[64 - i]", "entry 64 of shared buffer, which has 64"),
        ("x[i];", "x[i + 1];", "element 64 of a buffer of 64"),
        ("x[i];", "x[i - 1];", "element -1 of a buffer of 64"),
        ("y[i] =", "y[i / 2] =", "another thread's"),
        ("    y[i] =", "    if (i > 63 - i) buffer[0] = 1;\n    y[i] =", "no barrier between"),
        (
            "    __syncthreads();\n    y",
            "    if (i) __syncthreads();\n    y",
            "waits at the barrier|has ended|no barrier|nobody",
        ),
    ],
)
def test_emulation_finds(old, new, says):
    assert old in TOY
    for seed in (0, 1, 2):
        with pytest.raises(EmulationError, match=says):
            y = torch.zeros(64)
            Emulator(TOY.replace(old, new, 1), 2, seed)("copy", (1, 1), y, torch.ones(64), 64, threads=64)


@emulated
def test_emulation_reports_barriers_at_different_places():
    with pytest.raises(EmulationError, match=r"at that of line|lines"):
        Emulator(TOY, 2, 1)("deadlock", (1, 1), torch.zeros(64), threads=64)


@emulated
def test_emulated_halves_are_those_of_torch():
    kernels = Emulator(TOY, 2)
    bits = torch.arange(2**16).to(torch.uint16)
    h, b = bits.view(torch.float16), bits.view(torch.bfloat16)
    wide = torch.zeros(2**16), torch.zeros(2**16)
    kernels("floats", (1, 1), *wide, h, b, 2**16, threads=64)
    for ours, theirs in zip(wide, (h, b), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0, equal_nan=True)
    # all exponents, halfway cases and both sides of them
    x = torch.randint(-(2**31), 2**31, (2**15,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    middle = (h.float()[:31743] + h.float()[1:31744]) / 2
    x = torch.cat([x, middle, middle * (1 + 2**-20), middle * (1 - 2**-20), torch.tensor([0.0, -0.0, 65519.9, 65520])])
    narrow = torch.zeros(len(x), dtype=torch.float16), torch.zeros(len(x), dtype=torch.bfloat16)
    kernels("halves", (1, 1), *narrow, x, len(x), threads=64)
    for y in narrow:
        torch.testing.assert_close(y, x.to(y.dtype), rtol=0, atol=0, equal_nan=True)


# Compiling for GPUs.


def nvrtc_version():
    try:
        return cuda._nvrtc()[1]
    except QuipError:
        return None


compiles = pytest.mark.skipif(nvrtc_version() is None, reason="NVRTC is not installed")


def check_budget(bits, arch):
    """No spills; registers for two or three blocks of 256 threads, or one of 1024."""
    image, log = cuda.compile_kernels(bits, arch)
    assert image[:4] == b"\x7fELF"
    kernels = re.findall(r"entry function '(\w+)'", log)
    types = cuda.TYPES.values()
    names = {f"{name}_{kind}" for name in ("forward", "first", "backward", "unpack") for kind in types}
    assert set(kernels) == names | {f"multiply_{vectors}" for vectors in (8, 16, 32)}
    registers = dict(zip(kernels, map(int, re.findall(r"Used (\d+) registers", log)), strict=True))
    limits = {"multiply_8": 128, "multiply_16": 128, "multiply_32": 255}
    for name, count in registers.items():
        assert count <= limits.get(name, 80 if name.startswith("unpack") else 64), (name, count)
    for pattern in (r"(\d+) bytes stack frame", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"):
        counts = [int(count) for count in re.findall(pattern, log)]
        assert len(counts) == len(kernels) and max(counts) == 0, log
    assert max(int(size) for size in re.findall(r"(\d+) bytes smem", log)) <= 17 * 1024


@compiles
@pytest.mark.parametrize("target", [(3, 75), (4, 80), (2, 90)])
def test_compiles_within_the_budget(target):
    check_budget(*target)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("arch", [75, 80, 89, 90])
def test_all_combinations_compile_within_the_budget(arch, bits):
    check_budget(bits, arch)


@compiles
def test_a_processor_newer_than_the_compiler_gets_ptx():
    image, _ = cuda.compile_kernels(2, 999)
    assert b".target sm_" in image and b".entry multiply_8" in image
    assert b" "[0] == 32 and bytes(1)[0] == 0  # Python shares them, and NVRTC writes into what it is given


@compiles
def test_what_does_not_compile_is_a_quip_error(monkeypatch):
    with pytest.raises(QuipError, match="sm_70"):
        cuda.compile_kernels(2, 70)
    monkeypatch.setattr(cuda, "COMMON", "no C++")
    with pytest.raises(QuipError, match=r"NVRTC does not compile for sm_80: quip\.cu"):
        cuda.compile_kernels(2, 80)


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A cache folder of its own, and a compiler that counts."""
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "_nvrtc", lambda: (None, [13, 0]))
    monkeypatch.setattr(cuda, "compile_kernels", lambda *a: (calls.append(a), (f"program {a}".encode(), "log"))[1])
    return calls


def test_cache_compiles_once(counted, tmp_path):
    first = cuda.cached_kernels(2, 80)
    assert cuda.cached_kernels(2, 80) == first and len(counted) == 1
    assert [path.suffix for path in (tmp_path / "quip").iterdir()] == [".cubin"]


def test_cache_key_has_all_that_matters(counted, monkeypatch):
    for args in [(2, 80), (3, 80), (2, 90)]:
        assert cuda.cached_kernels(*args) == f"program {args}".encode()
    monkeypatch.setattr(cuda, "_nvrtc", lambda: (None, [13, 1]))
    cuda.cached_kernels(2, 80)
    monkeypatch.setattr(cuda, "DEVICE", cuda.DEVICE + " ")
    cuda.cached_kernels(2, 80)
    monkeypatch.setattr(cuda, "TENSOR", cuda.TENSOR + " ")
    cuda.cached_kernels(2, 80)
    assert len(counted) == 6


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40] + b"x" + b[41:], lambda b: b""])
def test_damaged_cache_file_is_compiled_anew(counted, tmp_path, damage):
    good = cuda.cached_kernels(2, 80)
    (path,) = (tmp_path / "quip").iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert cuda.cached_kernels(2, 80) == good and len(counted) == 2
    assert path.read_bytes() == content


def test_without_a_folder_to_write_there_is_no_cache(counted, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert cuda.cached_kernels(2, 80)
    assert len(counted) == 2


# Where it cannot be used.


@pytest.fixture
def fresh_reason():
    cuda.reason.cache_clear()
    yield
    cuda.reason.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(fresh_reason):
    assert cuda.available() is False
    assert "\n" not in cuda.reason() and len(cuda.reason()) > 10


def pretend(monkeypatch, capability=(8, 0), hip=None):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(cuda, "_capability", lambda device: 10 * capability[0] + capability[1])


def test_reasons(fresh_reason, monkeypatch):
    def reason(**changes):
        cuda.reason.cache_clear()
        pretend(monkeypatch, **changes)
        return cuda.reason()

    assert "ROCm" in reason(hip="6.0")
    assert "a card is sm_70" in reason(capability=(7, 0))
    monkeypatch.setattr(cuda, "_loaded", lambda *a: None)
    assert reason() == "" and cuda.available()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(cuda, "_loaded", lambda *a: cuda.cached_kernels(2, 80))
    assert "pip install quip-llm[cuda]" in reason()

    def broken(*a):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(cuda, "_loaded", broken)
    assert reason() == "two lines"
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert cuda.reason() == "two lines"


def test_tensors_must_be_on_a_cuda_device():
    args, _, _ = random_layer(5, 70, 1, 2, torch.float16, 0)
    for run in (lambda: cuda.linear(*args), lambda: cuda.unpack(args[1], 2, 70, torch.float16)):
        with pytest.raises(QuipError, match="CUDA device, got x on cpu"):
            run()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.ones(2, 70, dtype=torch.float64)}, "x must be float32"),
        ({"x": torch.ones(70)}, "x must be"),
        ({"x": torch.ones(2, 65 + 64)}, "2-bit weights of 129 inputs"),
        ({"x": torch.ones(2, 0), "qweight": torch.ones(5, 0, dtype=torch.uint8)}, "weights of 0 inputs"),
        ({"bits": 5}, "bits must be"),
        ({"bits": 3}, "3-bit weights of 70 inputs must be uint8"),
        ({"qweight": torch.zeros(5, 32)}, "uint8"),
        ({"qweight": torch.zeros(5, 32, 1, dtype=torch.uint8)}, "uint8"),
        ({"scale": torch.ones(2)}, "one float32"),
        ({"scale": torch.ones(1, dtype=torch.float64)}, "one float32"),
        ({"scale": torch.ones(1, device="meta")}, "all must be on cpu"),
        ({"x": torch.ones(2, 70, device="meta")}, "x must be on cpu"),
        ({"v": (None, [torch.eye(7)])}, "no, two or four factors"),
        ({"v": (None, [torch.eye(7), torch.eye(9)])}, "make up its width 70"),
        ({"v": (None, [torch.eye(7), torch.ones(10, 9)])}, "factors of V"),
        ({"v": (None, [torch.eye(7).half(), torch.eye(10).half()])}, "factors of V must be float32"),
        ({"v": (None, [torch.eye(7), torch.eye(9), torch.eye(9), torch.eye(9)])}, "make up its width"),
        ({"v": (torch.arange(69), [])}, "permutation of V"),
        ({"v": (torch.arange(70).int(), [])}, "permutation of V"),
        ({"u": (torch.arange(70), [])}, "permutation of U"),
        ({"u": (None, [torch.eye(5), torch.eye(1, device="meta")])}, "factors of U"),
        ({"rescale": torch.ones(5)}, "rescale"),
        ({"rescale": torch.ones(70, device="meta")}, "all must be on cpu"),
        ({"bias": torch.ones(70)}, "bias"),
        ({"bias": torch.ones(5).int()}, "bias"),
    ],
)
def test_what_does_not_fit_is_a_quip_error(changes, says):
    names = ("x", "qweight", "scale", "bits", "v", "u", "rescale", "bias")
    args, _, _ = random_layer(5, 70, 2, 2, torch.float32, 0)
    with pytest.raises(QuipError, match=says):
        cuda.linear(**{**dict(zip(names, args, strict=True)), **changes})


class FakeDriver:
    """Stands in for the driver, and reads what it gets as the real one does."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=1,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=2,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=3,
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="early")
    CUlaunchConfig = SimpleNamespace

    def __init__(self, capability):
        self.attributes, self.stack, self.launched, self.set = {1: 99000, 2: 40, 3: capability}, [], [], []

    def CUlaunchAttribute(self):
        return SimpleNamespace(value=SimpleNamespace())

    def cuDeviceGet(self, index):
        return 0, ("device", index)

    def cuDeviceGetAttribute(self, code, device):
        return 0, self.attributes[code]

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, ("context", device)

    def cuCtxPushCurrent(self, context):
        self.stack.append(context)
        return (0,)

    def cuCtxPopCurrent(self):
        return 0, self.stack.pop()

    def cuModuleLoadData(self, image):
        return 0, image

    def cuModuleGetFunction(self, module, name):
        return 0, (module, name)

    def cuFuncSetAttribute(self, *args):
        self.set.append(args)
        return (0,)

    def read(self, parameters):
        pointers = (ctypes.c_void_p * 4).from_address(parameters)
        types = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
        return [t.from_address(p).value for t, p in zip(types, pointers, strict=True)]

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        self.launched.append((function, (gx, gy, gz), (bx, by, bz), shared, stream, self.read(parameters)))
        return (0,)

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        (attribute,) = config.attrs
        assert (attribute.id, attribute.value.programmaticStreamSerializationAllowed, config.numAttrs) == (
            "early",
            1,
            1,
        )
        grid, block = (tuple(getattr(config, f"{what}Dim{x}") for x in "XYZ") for what in ("grid", "block"))
        where = grid, block, config.sharedMemBytes, config.hStream
        self.launched.append(("early", function, *where, self.read(parameters)))
        return (0,)


@pytest.mark.parametrize("capability", [7, 9])
def test_arguments_of_a_launch(monkeypatch, capability):
    driver = FakeDriver(capability)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    kernels, x = cuda._Kernels(torch.device("cuda", 1), b"program"), torch.ones(3)
    assert (kernels.room, kernels.multiprocessors) == (99000, 40) and driver.stack == []
    values, function = [x.data_ptr(), None, -4, 0.5], (b"program", b"multiply_8")
    with kernels:
        assert driver.stack == [kernels.context]
        kernels("multiply_8", (2, 3), x, None, -4, 0.5)
        kernels("multiply_8", (2, 3), x, None, -4, 0.5, threads=128, shared=50000, early=True)
    late = [] if capability < 9 else ["early"]
    assert driver.launched == [
        (function, (2, 3, 1), (256, 1, 1), 0, 77, values),
        (*late, function, (2, 3, 1), (128, 1, 1), 50000, 77, values),
    ]
    assert driver.set == [(function, "shared", 50000)]
    assert driver.stack == [] and kernels.context == ("context", ("device", 1))


@pytest.mark.parametrize("capability", [7, 9])
def test_a_plan_is_prepared_once_and_filled_in_each_time(monkeypatch, capability):
    driver, stream = FakeDriver(capability), [77]
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream[0], raising=False)
    kernels, plan = cuda._Kernels(torch.device("cuda", 1), b"program"), cuda._Plan()
    first, second = plan.take(5), plan.take(3, 2, dtype=torch.float16)
    assert (first.offset, second.offset, plan.bytes) == (0, 256, 512)
    plan.add("a", (2, 3), cuda._Place(cuda._X), second, -4, 0.5, early=True)
    plan.add("b", (1, 1), second, cuda._Place(cuda._Y), 7, 1.5, threads=64)
    calls = [[torch.ones(4), torch.ones(4), plan.room("cpu")] for _ in range(3)]
    for stream[0], tensors in zip((77, 77, 78), calls, strict=True):
        kernels.run(plan, *tensors)
    expected = []
    for number, (x, y, room) in zip((77, 77, 78), calls, strict=True):
        a = (b"program", b"a"), (2, 3, 1), (256, 1, 1), 0, number, [x.data_ptr(), room.data_ptr() + 256, -4, 0.5]
        b = (b"program", b"b"), (1, 1, 1), (64, 1, 1), 0, number, [room.data_ptr() + 256, y.data_ptr(), 7, 1.5]
        expected += [("early", *a) if capability >= 9 else a, b]
    assert driver.launched == expected and driver.stack == []
    assert len(plan.prepared) == 2  # one for each stream
    with ThreadPoolExecutor(1) as pool:
        pool.submit(kernels.run, plan, *calls[0]).result()
    assert len(plan.prepared) == 3  # and another for a second thread, that could come in between


@emulated
@pytest.mark.parametrize("dtype", TYPES)
def test_plans_of_a_layer(emulate, dtype):
    emulate()
    (x, *rest), exact, _ = random_layer(67, 134, 9, 2, dtype, 0)
    call = cuda.Call(134, *rest[:3], *rest[5:], *rest[3], *rest[4])
    for batch in (9, 2, 9, 40, 9):  # the first is not kept: its first kernel must not start early
        assert relative(call(x[:batch]), exact[:batch]) < 4 * TOLERANCE[dtype]
    assert list(call.plans) == [(2, dtype), (9, dtype)]
    plan = call.plans[9, dtype]
    assert all(launch.options["early"] for launch in plan.launches)
    first, second = call(x), call(x)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    assert [x.name for x in plan.only("multiply").launches] == [
        "multiply_32" if dtype == torch.float32 else "multiply_16"
    ]
    bias = rest[6]
    bias += 1  # where it lies: a plan holds addresses, not values
    assert relative(call(x), exact + 1) < 4 * TOLERANCE[dtype]


@emulated
def test_a_call_is_current_while_its_tensors_stay_where_they_were(emulate):
    emulate()
    names = "qweight", "scale", "rescale", "bias"
    (_, packed, scale, bits, V, U, rescale, bias), _, _ = random_layer(20, 30, 2, 2, torch.float32, 0)
    buffers = dict(zip(names, (packed, scale, rescale, bias), strict=True))
    call = cuda.Call(30, packed, scale, bits, rescale, bias, *V, *U)
    assert call.is_current(buffers)
    assert not call.is_current(buffers | {"bias": bias.clone()})
    packed.data = packed.clone()
    assert not call.is_current(buffers)


@emulated
def test_prompts_round_the_factors_once_but_not_in_a_recording(emulate, monkeypatch):
    emulate()
    args, exact, _ = random_layer(67, 42, 40, 2, torch.float16, 0)
    x, packed, scale, bits, V, U, rescale, bias = args
    call = cuda.Call(42, packed, scale, bits, rescale, bias, *V, *U)
    monkeypatch.setattr(Emulator, "recording", lambda self: True)
    assert relative(call(x), exact) < 4 * TOLERANCE[torch.float16] and not call.halves
    monkeypatch.setattr(Emulator, "recording", lambda self: False)
    call(x)
    (kept,) = call.halves.values()
    assert relative(call(x), exact) < 4 * TOLERANCE[torch.float16] and call._rounded(torch.float16) is kept


@emulated
def test_prompts_see_what_is_changed_in_place(emulate):
    emulate()
    (x, packed, scale, bits, V, U, rescale, bias), exact, _ = random_layer(48, 96, 40, 2, torch.float16, 0)
    call = cuda.Call(96, packed, scale, bits, rescale, bias, *V, *U)
    assert relative(call(x), exact) < 4 * TOLERANCE[torch.float16]
    rescale.mul_(2), scale.mul_(2)
    assert relative(call(x), exact) < 4 * TOLERANCE[torch.float16]
    bias.add_(1)
    assert relative(call(x), exact + 1) < 4 * TOLERANCE[torch.float16]


@emulated
def test_a_bias_of_another_type_is_rounded_anew(emulate):
    emulate()
    (x, *rest), exact, _ = random_layer(20, 30, 2, 2, torch.float16, 0)
    call = cuda.Call(30, *rest[:2], 2, rest[5], bias := rest[6].float(), *rest[3], *rest[4])
    call(x)
    call(x)
    bias += 1
    assert relative(call(x), exact + 1) < 4 * TOLERANCE[torch.float16]


def test_an_error_of_the_driver_is_a_quip_error():
    class Code(int):
        name = "CUDA_ERROR_NO_BINARY_FOR_GPU"

    with pytest.raises(QuipError, match="CUDA says CUDA_ERROR_NO_BINARY_FOR_GPU"):
        cuda._succeed((Code(209),))
