"""Both sides of long prompts on a GPU, without one: run on the CPU by the emulation, and compiled by NVRTC."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cuda import EmulationError, Emulator, barrier, compiles, emulate, emulated, random_layer, relative

import quip.cuda as cuda
import quip.prompts as prompts
from quip.errors import QuipError
from quip.incoherence import haar_orthogonal, kronecker_multiply

assert emulate  # a fixture
HALVES = (torch.float16, torch.bfloat16)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # the largest relative error of rounding
ROUNDINGS = 6  # x / D̃, both factors, what lies between the products, the result, and the sum with the bias


def bound(y):
    """Of the relative error: a unit for each rounding; with many entries, independent errors add up in squares."""
    return (ROUNDINGS if y.numel() < 256 else ROUNDINGS**0.5) * UNIT[y.dtype]


def seeded_orthogonal(n, seed):
    return torch.from_numpy(haar_orthogonal(n, np.random.RandomState(seed)))


def make(p, q, batch, dtype, seed, back=False, permuted=True, extras=True, room=65536, source=None, kernels=None):
    """A side by the kernel, emulated unless a function loads `kernels`; arguments; what it should return (float64)."""
    g = torch.Generator().manual_seed(seed)
    L, R = seeded_orthogonal(p, seed), seeded_orthogonal(q, seed + 1)
    perm = torch.randperm(p * q, generator=g) if permuted else None
    x = torch.randn(batch, p * q, generator=g).to(dtype)
    rescale = torch.rand(p * q, generator=g) + 0.5 if extras and not back else None
    scale = torch.rand(1, generator=g) + 0.5 if extras and back else None
    bias = torch.randn(p * q, generator=g).to(dtype) if extras and back else None
    device, kind = "cuda:0" if kernels else "cpu", cuda.TYPES[dtype]
    if kernels is None:
        kernels = Emulator(source or cuda.source(kind), kind, seed)
        kernels.room = room
    else:
        kernels = kernels(torch.device(device), kind)
    moved = [None if tensor is None else tensor.to(device) for tensor in (perm, L.float(), R.float(), rescale)]
    side = prompts.KernelSide(kernels, dtype, moved[0], [(0, p, q, *moved[1:3])], moved[3], back)
    side.few = 0  # as with many vectors
    move = [None if tensor is None else tensor.to(device) for tensor in (x, scale, bias)]
    if back:
        z = kronecker_multiply(x.double() * (1 if scale is None else 1.5 * scale.double()), L.T, R.T)
        z = z if perm is None else torch.empty_like(z).index_copy(1, perm, z)
        return side, (*move[:2], 1.5 if extras else 1.0, move[2]), z + (0 if bias is None else bias.double())
    z = x.double() / (1 if rescale is None else rescale.double())
    return side, move[:1], kronecker_multiply(z if perm is None else z[:, perm], L, R)


@emulated
@pytest.mark.parametrize(("p", "q"), [(64, 64), (43, 41)])
def test_one_large_output_does_not_overflow_on_the_way(p, q):
    L, R = seeded_orthogonal(p, 3), seeded_orthogonal(q, 4)
    side, _, _ = make(p, q, 1, torch.float16, 3, back=True, permuted=False)
    y = torch.randn(6, p * q, generator=torch.Generator().manual_seed(0)) / 2
    y[torch.arange(6), torch.arange(6) * 97] = 15000
    scale = torch.tensor([0.032])
    x = (kronecker_multiply(y.double(), L, R) / (scale.double() * 4 / 3)).half()
    assert x.isfinite().all() and relative(side(x, scale, 4 / 3, None), y.double()) < 1e-3


@emulated
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    p=st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 80, 130])),
    q=st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 130])),
    batch=st.integers(1, 5),
    dtype=st.sampled_from(HALVES),
    back=st.booleans(),
    permuted=st.booleans(),
    extras=st.booleans(),
    room=st.sampled_from([65536, None]),
    seed=st.integers(0, 99),
)
def test_sides_of_any_shape(p, q, batch, dtype, back, permuted, extras, room, seed):
    room = room or prompts.shared_bytes(p, q, 1)  # for one vector
    if room < prompts.shared_bytes(p, q, 1):
        return
    side, args, exact = make(p, q, batch, dtype, seed, back, permuted, extras, room)
    y = side(*args)
    assert y.dtype == dtype and y.shape == exact.shape and torch.isfinite(y).all()
    assert relative(y, exact) < bound(y)


@emulated
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("back", [False, True])
def test_every_schedule_gives_the_same(dtype, back):
    results = []
    for seed in range(3):
        side, args, exact = make(33, 24, 3, dtype, 7, back)
        side.kernels.seed = seed
        results.append(side(*args))
    assert all(torch.equal(y, results[0]) for y in results)
    assert relative(results[0], exact) < bound(results[0])


@emulated
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("back", [False, True])
def test_error_is_no_larger_than_that_of_the_same_steps_by_torch(dtype, back):
    side, args, exact = make(48, 64, 6, dtype, 3, back)
    g = torch.Generator().manual_seed(3)
    perm = torch.randperm(48 * 64, generator=g)
    torch.randn(6, 48 * 64, generator=g)
    rescale = None if back else torch.rand(48 * 64, generator=g) + 0.5
    stages = [(0, 48, 64, seeded_orthogonal(48, 3).float(), seeded_orthogonal(64, 4).float())]
    plain = prompts.TorchSide(dtype, perm, stages, rescale, back)(*args)
    assert relative(plain, exact) < bound(plain)  # the reference is that of the kernel
    assert relative(side(*args), exact) < 1.1 * relative(plain, exact)


@emulated
@pytest.mark.parametrize(
    ("p", "q", "dtype", "back"),
    [
        (24, 24, torch.bfloat16, False),
        (64, 64, torch.float16, True),
        (86, 128, torch.float16, False),
        pytest.param(128, 224, torch.bfloat16, True, marks=pytest.mark.slow),
        pytest.param(144, 192, torch.float16, False, marks=pytest.mark.slow),
    ],
)
def test_factors_of_real_layers(p, q, dtype, back):
    side, args, exact = make(p, q, 3, dtype, 1, back)
    y = side(*args)
    assert relative(y, exact) < bound(y)


@emulated
def test_an_infinite_entry_stays_in_its_vector():
    side, (x,), exact = make(24, 32, 3, torch.float16, 1)
    x[1, 5] = torch.inf
    y = side(x)
    assert not torch.isfinite(y[1]).any()
    assert relative(y[::2], exact[::2]) < bound(y)


@emulated
def test_few_vectors_take_a_block_each(monkeypatch):
    started = []
    run = Emulator.__call__
    monkeypatch.setattr(Emulator, "__call__", lambda self, *a, **b: started.append(a[:2]) or run(self, *a, **b))
    side, (x,), _ = make(24, 32, 5, torch.float16, 1)
    both = side(x)
    side.few = 5
    assert torch.equal(side(x), both)
    assert started == [("side_4_2", (3, 1)), ("side_4_1", (5, 1))]


@emulated
def test_strided_and_unaligned_vectors():
    side, (x,), exact = make(24, 32, 3, torch.float16, 1)
    buffer = torch.zeros(x.numel() + 1, dtype=x.dtype)
    unaligned = buffer[1:].view_as(x).copy_(x)
    strided = x.repeat_interleave(2, 1)[:, ::2]
    for values in (unaligned, strided):
        assert torch.equal(side(values), side(x))
    assert relative(side(x), exact) < bound(x)


# Which layers go this way.


def kinds(m, n, dtype, transforms=True, **changes):
    call_args, exact, _ = random_layer(m, n, 34, 2, dtype, 0, transforms)
    x, packed, scale, bits, V, U, rescale, bias = call_args
    call = cuda.Call(n, packed, scale, bits, rescale, bias, *V, *U)
    for name, value in changes.items():
        setattr(call.kernels, name, value)
    assert relative(call(x), exact) < 2 * ROUNDINGS * UNIT.get(dtype, 1e-6)  # two sides
    return [type(side) for side in call._rounded(dtype)]


@emulated
def test_kernels_take_one_stage_in_16_bits(emulate):
    emulate(1)
    kernel, torch_side = prompts.KernelSide, prompts.TorchSide
    for dtype in HALVES:
        assert kinds(24, 70, dtype) == [kernel, kernel]
        assert kinds(24, 134, dtype) == [torch_side, kernel]  # twice a prime, 67: two stages
        assert kinds(67, 70, dtype) == [kernel, torch_side]
        assert kinds(24, 70, dtype, transforms=False) == [torch_side, torch_side]
    assert kinds(24, 70, torch.float32) == [torch_side, torch_side]


@emulated
def test_kernels_take_bfloat16_only_where_tensor_cores_do(emulate):
    emulate(1)
    assert kinds(24, 70, torch.bfloat16, bfloat=False) == [prompts.TorchSide] * 2
    assert kinds(24, 70, torch.float16, bfloat=False) == [prompts.KernelSide] * 2


@pytest.mark.parametrize(
    ("p", "q", "room", "vectors"),
    [
        (64, 64, 65536, 2),
        (86, 128, 65536, 2),  # 11008, on a T4
        (128, 224, 65536, 1),  # 28672, there
        (128, 224, 232448, 2),  # and on an H100
        (144, 192, 232448, 1),
        (128, 224, 61439, 0),
        (193, 16, 232448, 0),
        (16, 257, 232448, 0),
        (192, 192, 232448, 0),  # more than 16 bits with a sign count
        (1, 1, 2047, 1),
    ],
)
def test_vectors_of_a_block(p, q, room, vectors):
    assert prompts.most_vectors(p, q, room) == vectors
    if vectors:
        name = prompts.kernel_name(p, q, vectors)
        tiles = int(name.split("_")[1])
        assert p <= 16 * tiles and prompts.shared_bytes(p, q, vectors) <= room
        assert re.search(rf"KERNEL{'' if tiles == 4 else '_512'} {name}\(", prompts.SIDE)
        assert 2 * -(-q // 16) * 16 <= (256 if tiles == 4 else 512)  # threads


# Layouts.


def test_tiles_of_the_factors_lie_as_tensor_cores_take_them():
    p, q = 40, 24
    L, R = torch.randn(p, p), torch.randn(q, q)
    right, left = prompts.right_tiles(R).flatten(), prompts.left_tiles(L).flatten()
    assert (right.numel(), left.numel()) == (32 * 32, 48 * 64)

    def entry(matrix, row, column):
        return matrix[row, column].item() if row < len(matrix) and column < len(matrix) else 0

    for lane in range(32):
        g, t = lane // 4, lane % 4
        for word in range(4):
            for i in range(2):
                # register `word` of A: rows g, g + 8 in turn; the columns 4 t … 4 t + 3 stand for 2 t, 2 t + 1 and 8 on
                at = ((1 * 2 + 0) * 32 + lane) * 8 + 2 * word + i  # tile (1, 0)
                assert right[at] == entry(R, 16 + g + word % 2 * 8, 4 * t + word // 2 * 2 + i)
                # of B: two registers each of two tiles, column g
                at = ((3 * 2 + 1) * 32 + lane) * 8 + 2 * word + i  # rows 24 …, columns 32 …
                assert left[at] == entry(L, 24 + g, 32 + word // 2 * 16 + word % 2 * 8 + 2 * t + i)


def test_orders_are_the_permutation_filled_up():
    p, q = 18, 24
    perm = torch.randperm(p * q)
    read = prompts.read_order(perm, p, q)
    assert read.shape == (32, 32) and torch.equal(read[:p, :q], perm.view(p, q).short())
    assert (read[p:] == p * q).all() and (read[:, q:] == p * q).all()
    write = prompts.write_order(perm, p, q).flatten()
    assert sorted(write[write >= 0].tolist()) == list(range(p * q)) and (write < 0).sum() == 32 * 32 - p * q
    for lane, j in ((0, 0), (13, 3), (31, 7)):  # of the tile of rows 0 … 15, columns 16 … 31
        row, column = j // 4 * 8 + 2 * (lane % 4) + j % 2, 16 + lane // 4 + j // 2 % 2 * 8
        expected = perm[row * q + column].item() if column < q else -1
        assert write[((1 * 2 + 0) * 32 + lane) * 8 + j] == expected


def test_no_two_lanes_meet_in_a_bank():
    # Loads of 8 bytes are served for 16 lanes at a time, of 4 for 32; a bank has 4 bytes of every 128.
    assert "width | 16, width + (vectors == 2 ? 4 : 8)}" in prompts.SIDE
    assert "return vectors == 2 ? threadIdx.x / 4 % 2 : 0;" in prompts.SIDE
    for width in range(16, 257, 16):
        stride, steps = width | 16, {1: width + 8, 2: width + 4}
        for lanes in (range(16), range(16, 32)):
            words = {(lane // 4 * stride + 4 * (lane % 4)) // 2 + i for lane in lanes for i in range(2)}
            assert len({word % 32 for word in words}) == 32
        for vectors, step in steps.items():
            words = {(2 * (lane % 4) * step + lane // 4) * vectors // 2 for lane in range(32)}
            assert len({word % 32 for word in words}) == len(words)
            assert step * vectors % 8 == 0  # rows begin at 16 bytes
    # Loads of 16 bytes, for eight lanes at a time; of two vectors, a lane's second 16 bytes lie behind its first.
    for lanes in (range(8), range(24, 32)):
        for half in range(2):
            words = {8 * lane + 4 * (half ^ lane // 4 % 2) + i for lane in lanes for i in range(4)}
            assert len({word % 32 for word in words}) == 32


# Planted bugs: each is one change of the source, and what the emulation must say of it.


def run_side(source, p=18, q=24, back=False, permuted=True, room=65536):
    only = re.sub(r"^KERNEL\w* side_(?!4_2).*\n", "", source, flags=re.MULTILINE)  # compiles in a fraction of the time
    text = f"typedef half16 Real;\n{only}"
    side, args, exact = make(p, q, 3, torch.float16, 1, back, permuted, room=room, source=text)
    return relative(side(*args), exact)


def run_back(source):
    return run_side(source, back=True)


def run_narrow(source):  # rows that do not begin at multiples of 16 bytes
    return max(run_side(source, q=21), run_side(source, q=21, back=True))


def run_plain(source):  # neither permuted
    return max(run_side(source, permuted=False), run_side(source, back=True, permuted=False))


RUNS = (run_side, run_back, run_narrow, run_plain)
UNSYNCED = "nobody has written|no barrier between"
BUGS = {
    "no barrier before the entries are read in another order": (run_side, 1, None, UNSYNCED),
    "no barrier before rows overwrite them": (run_side, 2, None, UNSYNCED),
    "no barrier before the first product": (run_side, 3, None, UNSYNCED),
    "no barrier between the products": (run_back, 4, None, UNSYNCED),
    "no barrier before the result is read": (run_back, 5, None, UNSYNCED),
    "rows without what fills them up": (run_side, "start <= s.n", "start < s.n", "nobody has written"),
    "vectors that do not exist": (run_plain, "&& first + v < batch", "", "of a buffer of"),
    "vectors that do not exist, slowly": (run_narrow, "&& vector < batch", "", "of a buffer of"),
    "outputs that do not exist": (run_back, "if (vector < batch) store", "store", "of a buffer of"),
    "outputs that do not exist, slowly": (run_narrow, "if (vector < batch) y", "y", "of a buffer of"),
    "what fills up goes somewhere": (run_back, "if (!to || place < s.n)", "", "entry .* of shared"),
    "rows that are not aligned": (run_narrow, "if (q % 8 == 0)", "if (true)", "not aligned"),
    "a stride that is not aligned": (run_side, "width | 16", "width | 18", "not aligned"),
    "a vector too much in shared memory": (run_side, "memory, 0, VECTORS", "memory, 0, 3", "takes bytes"),
    "a tensor instruction that not all lanes reach": (
        run_side,
        "multiply_tile(sum[half][v], middle[k][v]",
        "if (lane) multiply_tile(sum[half][v], middle[k][v]",
        "ended|wait|lines",
    ),
    "tiles of R of another warp": (run_side, "first = threadIdx.x / 32 * count", "first = 0", None),
    "halves of a tile exchanged": (run_side, "sum[i][j / 2][v]", "sum[i][1 - j / 2][v]", None),
    "pairs exchanged": (
        run_side,
        "c[j % 2 * 2] * unit, c[j % 2 * 2 + 1]",
        "c[j % 2 * 2 + 1] * unit, c[j % 2 * 2]",
        None,
    ),
    "a vector of its neighbour": (run_side, "v * s.size + at", "at", None),
    "no scale": (run_back, "scale[0] * factor", "factor", None),
    "no factor": (run_back, "scale[0] * factor", "scale[0]", None),
    "no bias": (run_back, "value + to_float(number(more, j))", "value", None),
    "not divided": (run_side, "value * __uint_as_float(by[j])", "value", None),
    "not divided, slowly": (run_narrow, "(rescale ? rescale[j] : 1.0f)", "1.0f", None),
    "high for low": (run_side, "0x7632", "0x5410", None),
}


@emulated
def test_without_a_bug_nothing_is_said():
    for run in RUNS:
        assert run(prompts.SIDE) < ROUNDINGS**0.5 * UNIT[torch.float16]


@emulated
@pytest.mark.parametrize(("run", "old", "new", "says"), BUGS.values(), ids=BUGS.keys())
def test_planted_bug_is_found(run, old, new, says):
    changed = barrier(prompts.SIDE, old) if isinstance(old, int) else prompts.SIDE.replace(old, new)
    assert changed != prompts.SIDE
    if says is None:  # nothing forbidden, but wrong
        assert not run(changed) < 0.02
    else:
        with pytest.raises(EmulationError, match=says):
            run(changed)


# What the emulation says of shared memory that is used again, and of wide accesses to it.

TOY = """
KERNEL twice(PTR(float) y, PTR(const float) x) {
    DYNAMIC(u16, memory, 0, 256);
    int i = threadIdx.x;
    put(memory, 2 * i, (float)x[i]);
    __syncthreads();
    float value = take<float>(memory, 2 * (63 - i));
    __syncthreads();
    REUSED(memory);
    put(memory, 4 * i, make_float4(value, value, 0, 0));
    __syncthreads();
    y[i] = take<float>(memory, 4 * (63 - i));
}
"""


def run_toy(source, seed):
    y = torch.zeros(64)
    # two floats a thread in 8 bytes
    source = source.replace("make_float4(value, value, 0, 0)", "uint2{__float_as_uint(value), 0}")
    Emulator(source, 2, seed)("twice", (1, 1), y, torch.arange(64.0), threads=64, shared=512)
    return y


@emulated
def test_shared_memory_can_be_used_again():
    for seed in range(4):
        assert torch.equal(run_toy(TOY, seed), torch.arange(64.0))


@emulated
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    __syncthreads();\n    REUSED", "    REUSED", UNSYNCED),  # others still read
        ("    put(memory, 4 * i,", "    if (i) put(memory, 4 * i,", "nobody has written"),  # it is not what was there
        ("take<float>(memory, 4 * (63", "take<float>(memory, 1 + 4 * (63", "4 bytes at entry .*: not aligned"),
        ("put(memory, 4 * i", "put(memory, 4 * i + 2", "8 bytes at entry .*: not aligned"),
        ("take<float>(memory, 4 * (63", "take<float>(memory, 4 * (64", "entry 25[67] of shared memory"),
    ],
)
def test_emulation_finds(old, new, says):
    assert old in TOY
    for seed in (0, 1, 2):
        with pytest.raises(EmulationError, match=says):
            run_toy(TOY.replace(old, new, 1), seed)


# Compiling for GPUs.


def check_budget(kind, arch):
    """No spills; registers for three blocks of 256 threads, or one of 512."""
    image, log = cuda.compile_kernels(kind, arch)
    assert image[:4] == b"\x7fELF"
    names = re.findall(r"entry function '(\w+)'", log)
    assert set(names) == {"side_4_1", "side_4_2", "side_8_1", "side_8_2", "side_12_1"}
    registers = map(int, re.findall(r"Used (\d+) registers", log))
    for name, count in zip(names, registers, strict=True):
        assert count <= (80 if name.startswith("side_4") else 128), (name, count)
    for pattern in (r"(\d+) bytes stack frame", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"):
        counts = [int(count) for count in re.findall(pattern, log)]
        assert len(counts) == len(names) and max(counts) == 0, log


@compiles
@pytest.mark.parametrize("target", [("half", 75), ("bfloat", 80), ("half", 90)])
def test_compiles_within_the_budget(target):
    check_budget(*target)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("target", [("half", 80), ("half", 89), ("bfloat", 89), ("bfloat", 90)])
def test_all_combinations_compile_within_the_budget(target):
    check_budget(*target)


@compiles
def test_bfloat16_does_not_compile_for_the_first_tensor_cores():
    with pytest.raises(QuipError, match="does not compile for sm_75"):
        cuda.compile_kernels("bfloat", 75)


def test_the_device_says_what_its_tensor_cores_take(monkeypatch):
    # what `Call._side` asks before it loads the kernels
    loaded = []
    monkeypatch.setattr(
        cuda, "_load", lambda device, kind: loaded.append(kind) or SimpleNamespace(room=65536, multiprocessors=2)
    )
    for bfloat, recording in ((False, False), (True, True), (True, False)):  # in a recording nothing can be loaded
        kernels = SimpleNamespace(bfloat=bfloat, room=65536, recording=lambda recording=recording: recording)
        call = SimpleNamespace(kernels=kernels, qweight=torch.zeros(1))
        stages = [(0, 4, 5, torch.eye(4), torch.eye(5))]
        side = cuda.Call._side(call, torch.bfloat16, None, stages, None, False)
        assert isinstance(side, prompts.KernelSide if bfloat and not recording else prompts.TorchSide)
    assert loaded == ["bfloat"]
