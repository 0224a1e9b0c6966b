"""The CPU kernel: every backend computes the same integers, and the layer as exactly as its digits allow."""

import functools
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import random_codes
from hypothesis import given, settings
from hypothesis import strategies as st

from quip import calls as cpu_calls
from quip import cpu
from quip.errors import QuipError
from quip.incoherence import KroneckerTransform
from quip.kernels import QuantizedLinear, centred, linear, linear_torch, pack

ROOT = Path(__file__).parent.parent
BACKENDS = cpu.backends()[:-1]
needs_kernel = pytest.mark.skipif(not BACKENDS, reason=f"no CPU kernel: {cpu.load()[1]}")
widths = st.integers(1, 300) | st.sampled_from([576, 1100, 4096])


@pytest.fixture(params=BACKENDS)
def backend(request):
    before = cpu.backend()
    cpu.use(request.param)
    yield request.param
    cpu.use(before)


def matrix(m, n, bits, seed=0):
    """Packed codes, a scale, and the dense matrix that they stand for, in float64."""
    codes, scale = random_codes(m, n, bits, seed), torch.tensor([0.7])
    return pack(codes, bits), scale, centred(codes, bits, torch.float64) * scale.double() / (1 - 2.0**-bits)


def inputs(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(m, n, bits, rescale=True, bias=True, transforms=True):
    """All that `linear` takes but x."""
    qweight, scale, _ = matrix(m, n, bits)
    V, U = (KroneckerTransform(k, seed).tensors() if transforms else (None, []) for k, seed in ((n, 1), (m, 2)))
    return qweight, scale, bits, inputs(n).abs() + 0.5 if rescale else None, inputs(m) if bias else None, *V, *U


def exact(x, qweight, scale, bits, rescale, bias, *transforms):
    double = [t.double() if t is not None else None for t in (rescale, bias)]
    return linear_torch(x.double(), qweight, scale.double(), bits, *double, *transforms)


def kernel(x, *tensors):
    """The layer by the kernel, however many activations there are."""
    return cpu.linears([cpu.Call(x.shape[-1], *tensors)], x)[0]


def error(y, reference):
    return ((y.double() - reference).norm() / reference.norm()).item()


# the product


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(widths, widths, st.sampled_from([2, 3, 4]), st.integers(1, 9), st.integers(0, 99))
def test_every_backend_gives_the_same_numbers_and_they_are_right(m, n, bits, batch, seed):
    qweight, scale, W = matrix(m, n, bits, seed)
    x, before, found = inputs(batch, n, seed=seed), cpu.backend(), []
    for name in BACKENDS:
        cpu.use(name)
        found.append(cpu.multiply(x, qweight, scale, bits))
    cpu.use(before)
    assert all(torch.equal(y, found[0]) for y in found)
    # an activation is off by at most half a step, 1/65278 of the largest
    bound = x.abs().amax(1, keepdim=True).double() / 65278 * W.abs().sum(1) + 1e-6 * (x.double().abs() @ W.abs().T)
    assert ((found[0].double() - x.double() @ W.T).abs() <= bound).all()


@needs_kernel
def test_relative_error_is_below_2e_4_at_4096():
    for bits in (2, 3, 4):
        qweight, scale, W = matrix(512, 4096, bits)
        x = inputs(2, 4096)
        assert error(cpu.multiply(x, qweight, scale, bits), x.double() @ W.T) < 2e-4


@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_threads_change_nothing(backend, bits):
    qweight, scale, _ = matrix(150, 200, bits)
    x, before = inputs(3, 200), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(cpu.multiply(x, qweight, scale, bits))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_kernel
def test_sums_of_the_widest_and_largest_fit():
    n = cpu.WIDEST
    for bits in (2, 3, 4):
        qweight, scale = pack(torch.full((1, n), 2**bits - 1), bits), torch.ones(1)
        for name in BACKENDS if bits == 4 else BACKENDS[:1]:
            cpu.use(name)
            assert cpu.multiply(torch.ones(1, n), qweight, scale, bits).item() == n
        cpu.use(BACKENDS[0])


@needs_kernel
def test_wider_layers_run_without_the_kernel():
    n = cpu.WIDEST + 64
    layer = QuantizedLinear(n, 2, 2)
    layer.V, layer.U = KroneckerTransform(n, 1), KroneckerTransform(2, 2)
    layer.qweight.copy_(pack(random_codes(2, n, 2), 2))
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), linear_torch(x, *layer.tensors()))
    assert layer.prepared() is None


# the layer


@needs_kernel
@settings(deadline=None, max_examples=40)
@given(widths, widths, st.sampled_from([2, 3, 4]), st.integers(1, 40), st.booleans(), st.booleans(), st.booleans())
def test_layer_equals_the_layer_in_float64(m, n, bits, batch, rescale, bias, transforms):
    tensors = arguments(m, n, bits, rescale, bias, transforms)
    x = inputs(batch, n)
    y, reference = linear(x, *tensors), exact(x, *tensors)
    assert y.shape == (batch, m) and y.dtype == torch.float32
    # against what could be: a narrow layer's output may be near zero by chance
    size = reference.norm() + tensors[1].item() * (x / (1 if tensors[3] is None else tensors[3])).norm() * m**0.5
    assert (y.double() - reference).norm() < 2e-4 * size


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_16_bit_error_is_at_most_twice_the_naive_forms(backend, bits, dtype):
    tensors = arguments(96, 120, bits)
    tensors = (*tensors[:4], tensors[4].to(dtype), *tensors[5:])
    x = inputs(6, 120).to(dtype)
    reference = exact(x, *tensors)
    assert cpu.linear(x, *tensors).dtype == dtype
    assert error(cpu.linear(x, *tensors), reference) < 2 * error(linear_torch(x, *tensors), reference)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_and_written_right(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one, scale = pack(torch.tensor([[3]]), 2), torch.ones(1)  # the layer y = x
    y = kernel(every[:, None], one, scale, 2)[:, 0]
    finite = every.isfinite()
    assert torch.equal(y[finite], every[finite])
    assert y[~finite].isnan().all()
    # and numbers between two of that type are rounded to even
    wide = (every[finite].float() * 1.0009765625).clamp(-6e4, 6e4)
    bias = wide.to(dtype)
    zeros = pack(torch.zeros(len(wide), 1), 2)
    assert torch.equal(cpu.linear(torch.zeros(1, 1), zeros, scale, 2, None, bias)[0], bias.float())
    y = cpu.linear(torch.zeros(1, 1, dtype=dtype), zeros, scale, 2, None, wide)[0]
    assert torch.equal(y, wide.to(dtype))


@needs_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_activation_spoils_its_own_row_only(backend, bad):
    tensors = arguments(20, 70, 2)
    x = inputs(3, 70)
    clean = cpu.linear(x, *tensors)
    x[1, 5] = bad
    y = cpu.linear(x, *tensors)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@needs_kernel
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-20, 1e30])
def test_activations_of_any_size(backend, size):
    tensors = arguments(20, 70, 2, rescale=False, bias=False)
    x = inputs(3, 70) * size
    y, reference = cpu.linear(x, *tensors), exact(x, *tensors)
    assert (y.double() - reference).norm() <= 1e-4 * reference.norm() + 1e-43


@needs_kernel
def test_a_massive_activation_leaves_the_others_exact_enough():
    tensors = arguments(64, 576, 2, rescale=False, bias=False)
    x = inputs(1, 576) * 0.01
    x[0, 7] = 3000.0
    assert error(cpu.linear(x, *tensors), exact(x, *tensors)) < 2e-4


@needs_kernel
def test_many_activations_are_many_single_ones(backend):
    tensors = arguments(20, 70, 3)
    x = inputs(150, 70)
    one = torch.cat([cpu.linear(row[None], *tensors) for row in x])
    assert error(one, exact(x, *tensors)) < 2e-4
    assert torch.equal(kernel(x, *tensors), one)


@needs_kernel
@settings(deadline=None, max_examples=40)
@given(widths, widths, st.sampled_from([2, 3, 4]), st.booleans(), st.booleans(), st.sampled_from([1, 3]))
def test_the_dense_matrix_of_a_layer(m, n, bits, rescale, transforms, threads):
    tensors = arguments(min(m, 600), n, bits, rescale, False, transforms)
    call, before = cpu.Call(n, *tensors), torch.get_num_threads()
    columns = exact(torch.eye(n), *tensors).T
    torch.set_num_threads(threads)
    for name in BACKENDS:
        cpu.use(name)
        W = call.dense(torch.float32)
        assert W.shape == columns.shape and error(W, columns) < 1e-5
        assert torch.equal(call.dense(torch.float16), W.half())
        half = call.dense(torch.bfloat16)  # with AMX, everything on the way to it is in 16 bits
        assert torch.equal(half, W.bfloat16()) or (name == "amx" and error(half, columns) < 8e-3)
    cpu.use(BACKENDS[0])
    torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("size", [8, 64, 72, 1000, 4096, 100000])
def test_reading_reads_every_word_once(size):
    data = torch.randint(-(2**62), 2**62, (size // 8,))
    words = [w % 2**64 for w in data.tolist()]
    assert cpu.read(data) == functools.reduce(operator.xor, words)


@pytest.fixture
def ways(monkeypatch):
    """The ways in which layers compute, as they take them."""
    taken = []
    for name, way in ("by_dense", cpu.Call.by_dense), ("by_prompt", cpu.Call.by_prompt):

        def noted(self, x, name=name, way=way):
            taken.append(name)
            return way(self, x)

        monkeypatch.setattr(cpu.Call, name, noted)
    return taken


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_long_prompts_go_another_way(backend, dtype, ways):
    tensors = arguments(40, 70, 2)
    x, call = inputs(3, 100, 70).to(dtype), cpu.Call(70, *tensors)
    y = call(x)
    limit = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (
        y.dtype == dtype
        and y.shape == (3, 100, 40)
        and error(y, exact(x.float().flatten(0, 1), *tensors).view(3, 100, 40)) < limit
    )
    call(x[:, :15])  # 45 in all
    call(x[:, :10])  # 30
    expected = ["by_dense", "by_dense"]
    if backend == "amx":  # 45 are too few for a dense matrix
        expected = ["by_dense", "by_prompt"] if dtype == torch.bfloat16 else []
    assert ways == expected


# long prompts in bfloat16, with AMX

needs_amx = pytest.mark.skipif("amx" not in BACKENDS, reason="this processor has no AMX")


def by_prompt(x, *tensors):
    return cpu.Call(x.shape[-1], *tensors).by_prompt(x)


@needs_kernel
@settings(deadline=None, max_examples=50)
@given(
    widths,
    widths,
    st.sampled_from([2, 3, 4]),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["kron", "no permutation", "none"]),
    st.sampled_from([1, 2]),
)
def test_a_prompt_in_bfloat16_over_all_shapes(m, n, bits, batch, rescale, bias, transforms, threads):
    tensors = arguments(m, n, bits, rescale, bias, transforms != "none")
    if transforms == "no permutation":
        tensors = (*tensors[:5], None, tensors[6], None, tensors[8])
    x, before = inputs(batch, n).bfloat16(), torch.get_num_threads()
    torch.set_num_threads(threads)
    y, reference = by_prompt(x, *tensors), exact(x, *tensors)
    torch.set_num_threads(before)
    assert y.shape == (batch, m) and y.dtype == torch.bfloat16
    # against what could be: a narrow layer's output may be near zero by chance
    size = reference.norm() + tensors[1].item() * (x / (1 if tensors[3] is None else tensors[3])).norm() * m**0.5
    assert (y.double() - reference).norm() < 8e-3 * size


@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("m", "n"), [(96, 120), (131, 257), (576, 576), (344, 1376)])
def test_its_error_is_below_the_naive_forms(m, n, bits):
    tensors = arguments(m, n, bits)
    x, bias = inputs(40, n).bfloat16(), tensors[4].bfloat16()
    reference, found = exact(x, *tensors), error(by_prompt(x, *tensors), exact(x, *tensors))
    dense = torch.nn.functional.linear(x, cpu.Call(n, *tensors).dense(torch.float32).bfloat16(), bias)
    assert found < error(linear_torch(x, *tensors), reference) and found < 2.5 * error(dense, reference)


@needs_amx
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_prompt_is_its_tokens_whatever_the_threads(bits):
    tensors = arguments(150, 200, bits)
    x, before, found = inputs(150, 200).bfloat16(), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(by_prompt(x, *tensors))
    torch.set_num_threads(before)
    one = torch.cat([by_prompt(row[None], *tensors) for row in x])
    assert all(torch.equal(y, one) for y in found)


@needs_amx
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("m", "n"), [(96, 120), (131, 257), (576, 576), (344, 1376)])
def test_the_dense_matrix_in_bfloat16_is_as_exact_as_a_prompt(m, n, bits):
    tensors = arguments(m, n, bits)
    columns = exact(torch.eye(n), *tensors).T - tensors[4][:, None]
    call, before, found = cpu.Call(n, *tensors), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(call.dense(torch.bfloat16))
    torch.set_num_threads(before)
    assert all(torch.equal(W, found[0]) for W in found)
    x = inputs(40, n).bfloat16()
    assert error(found[0], columns) < 1.2 * error(call.by_prompt(x), exact(x, *tensors))


@needs_amx
def test_more_tokens_than_at_a_time():
    tensors = arguments(20, 70, 3)
    x = inputs(1100, 70).bfloat16()
    halves = torch.cat([by_prompt(part.contiguous(), *tensors) for part in x.split(550)])
    assert torch.equal(by_prompt(x, *tensors), halves)
    assert by_prompt(x[:0], *tensors).shape == (0, 20)


@needs_amx
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_activation_spoils_its_own_token_only(bad):
    tensors = arguments(20, 70, 2)
    x = inputs(40, 70).bfloat16()
    clean = by_prompt(x, *tensors)
    x[1, 5] = bad
    y = by_prompt(x, *tensors)
    assert y[1].isnan().all()
    others = [t for t in range(40) if t != 1]
    assert torch.equal(y[others], clean[others])


@needs_kernel
def test_without_amx_a_prompt_is_many_activations():
    tensors = arguments(20, 70, 2)
    x = inputs(40, 70).bfloat16()
    for name in BACKENDS:
        cpu.use(name)
        assert name == "amx" or torch.equal(by_prompt(x, *tensors), kernel(x, *tensors))
    cpu.use(BACKENDS[0])


@needs_kernel
def test_layers_that_share_their_input():
    first = arguments(20, 70, 2, rescale=False)
    others = [
        (*arguments(m, 70, 2, rescale=False, bias=m == 33)[:5], *first[5:7], *KroneckerTransform(m, m).tensors())
        for m in (33, 1)
    ]
    calls = [cpu.Call(70, *tensors) for tensors in (first, *others)]
    assert cpu_calls.share_input(calls)
    for batch in (1, 5, 40):
        x = inputs(batch, 70)
        for call, y in zip(calls, cpu.linears(calls, x), strict=True):
            assert torch.equal(y, cpu.linears([call], x)[0])
    strangers = (
        arguments(20, 70, 3, rescale=False),
        arguments(20, 70, 2, rescale=True),
        arguments(20, 70, 2, transforms=False),
    )
    assert not any(cpu_calls.share_input([calls[0], cpu.Call(70, *tensors)]) for tensors in strangers)


@needs_kernel
def test_no_activations_give_no_outputs():
    assert linear(torch.zeros(0, 70), *arguments(20, 70, 2)).shape == (0, 20)


@needs_kernel
def test_codes_of_another_width_are_an_error():
    tensors = arguments(20, 70, 2)
    with pytest.raises(QuipError, match=r"packed codes \(20, 32\) of 2 bits do not fit 200 columns"):
        cpu.linear(inputs(1, 200), *tensors)


# which backend


def in_a_new_process(code, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", [*BACKENDS, "torch"])
def test_an_environment_variable_forces_a_backend(name):
    code = "from quip import cpu; import torch; cpu.library(); print(cpu.backend())"
    assert in_a_new_process(code, QUIP_CPU=name).stdout.split() == [name]


@needs_kernel
def test_a_backend_that_cannot_run_here_is_an_error():
    ended = in_a_new_process("from quip import cpu; cpu.load()", QUIP_CPU="riscv")
    assert ended.stderr.splitlines()[-1].endswith(f"QUIP_CPU=riscv: this processor runs {', '.join(BACKENDS)}, torch")
    with pytest.raises(QuipError, match="no backend 'riscv' here"):
        cpu.use("riscv")


@pytest.fixture
def reloaded():
    """Forget the library for a test, and afterwards what the test made of it."""
    cpu.load.cache_clear()
    cpu.library.cache_clear()
    yield
    cpu.load.cache_clear()
    cpu.library.cache_clear()


def test_without_the_extension_a_warning_and_the_same_results(monkeypatch, reloaded, tmp_path):
    monkeypatch.delenv("QUIP_CPU", raising=False)
    monkeypatch.setattr(cpu, "find_spec", lambda name: None)
    tensors = arguments(20, 70, 2)
    x = inputs(3, 70)
    with pytest.warns(UserWarning, match="no CPU kernel: it was not built; .* GCC or Clang") as caught:
        y = linear(x, *tensors)
    assert len(caught) == 1 and len(str(caught[0].message).splitlines()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear(x, *tensors)  # once is enough
    assert error(y, exact(x, *tensors)) < 1e-5
    assert cpu.backends() == ["torch"] and cpu.backend() == "torch"


def test_a_damaged_extension_is_the_same_as_none(monkeypatch, reloaded, tmp_path):
    monkeypatch.delenv("QUIP_CPU", raising=False)
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"\x7fELF")
    monkeypatch.setattr(cpu, "find_spec", lambda name: type("Spec", (), {"origin": str(broken)}))
    with pytest.warns(UserWarning, match="no CPU kernel: it cannot be loaded"):
        assert cpu.library() is None


# without Python


def compile_check(compiler, out, *flags):
    sources = [ROOT / "tests" / "csrc" / "check.cpp", *sorted((ROOT / "quip" / "csrc").glob("*.cpp"))]
    command = [compiler, "-std=c++17", "-w", "-Wno-psabi", "-fopenmp", f"-I{ROOT / 'quip' / 'csrc'}", *flags]
    return subprocess.run([*command, *map(str, sources), "-o", str(out)], capture_output=True, text=True)


def run_check(*command):
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert ended.returncode == 0 and ended.stdout.endswith(" 0 failures\n"), ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_access_out_of_bounds_and_nothing_undefined(tmp_path):
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = compile_check("g++", tmp_path / "check", *flags)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("g++ has no sanitizers here")
    assert built.returncode == 0, built.stderr
    assert "portable" in run_check(tmp_path / "check")


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ for x86-64")
@pytest.mark.parametrize("name", ["amx", "avx512", "factors", "panels", "strips"])
def test_no_function_lacks_its_files_instructions(name, tmp_path):
    """An implicit constructor would, as no pragma holds for it: vectors are then passed in another way."""
    source = ROOT / "quip" / "csrc" / f"{name}.cpp"
    command = ["g++", "-std=c++17", "-O0", "-Wpsabi", "-c", str(source), "-o", str(tmp_path / "out.o")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0 and not re.search("AVX512F vector|changes the ABI.*AVX512", built.stderr), built.stderr


@pytest.mark.skipif(
    platform.machine() == "aarch64" or not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs g++ for 64-bit Arm and qemu-aarch64",
)
def test_arm_in_an_emulator(tmp_path):
    built = compile_check("aarch64-linux-gnu-g++", tmp_path / "check", "-O2", "-static")
    assert built.returncode == 0, built.stderr
    assert run_check("qemu-aarch64", tmp_path / "check").startswith("neon portable ")
    old = run_check("qemu-aarch64", "-cpu", "cortex-a53", tmp_path / "check")
    assert old.startswith("portable "), "a processor without the dot product"


@needs_kernel
@pytest.mark.parametrize(
    ("i", "wrong", "message"),
    [
        (1, torch.ones(2), r"scale \(2,\) does not fit a layer of 70 inputs and 20 outputs"),
        (3, torch.ones(69), r"rescale \(69,\) does not fit"),
        (4, torch.ones(3), r"bias \(3,\) does not fit"),
        (5, torch.arange(69), r"factors of V \[\(7, 7\), \(10, 10\)\] do not fit width 70"),
        (6, [torch.eye(7), torch.eye(11)], r"factors of V \[\(7, 7\), \(11, 11\)\] do not fit width 70"),
        (8, [torch.eye(4), torch.ones(5, 4)], r"factors of U \[\(4, 4\), \(5, 4\)\] do not fit width 20"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(i, wrong, message):
    tensors = list(arguments(20, 70, 2))
    tensors[i] = wrong
    with pytest.raises(QuipError, match=message):
        cpu.linear(inputs(1, 70), *tensors)


def test_an_extension_of_another_version_is_not_used(monkeypatch, reloaded):
    monkeypatch.setattr(cpu.ctypes, "sizeof", lambda what: 8)
    assert cpu.load()[0] is None
