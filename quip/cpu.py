"""The CPU kernel of `quip/csrc`, called through ctypes. Without it, layers run in pure PyTorch (chapter 9)."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch

from quip.errors import QuipError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum quip_dtype
LONG = 32  # activations, from which on other ways may pay
PAYS = {"avx512": 1 / 2, "neon": 1 / 2, "avx2": 1 / 4, "portable": 1 / 32}  # and does; for each column
MADE, LIGHT = 2, 2700  # see Call.pays_dense
WIDEST = 2**16  # columns whose sums certainly fit 32 bits


class Stage(ctypes.Structure):
    """struct quip_stage"""

    _fields_ = [(k, ctypes.c_int64) for k in ("offset", "p", "q")] + [(k, ctypes.c_void_p) for k in ("L", "R", "Rt")]


class Transform(ctypes.Structure):
    """struct quip_transform"""

    _fields_ = [("perm", ctypes.c_void_p), ("stages", ctypes.c_int64), ("stage", Stage * 2)]


class Layer(ctypes.Structure):
    """struct quip_layer"""

    _fields_ = [
        *((k, ctypes.c_int64) for k in ("m", "n", "bits")),
        *((k, ctypes.c_void_p) for k in ("codes", "scale", "rescale", "bias")),
        ("bias_dtype", ctypes.c_int64),
        *((k, Transform) for k in "VU"),
    ]


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The extension, or None and why there is none. Raises `QuipError` if QUIP_CPU asks for what cannot be."""
    asked = os.environ.get("QUIP_CPU", "")
    spec = find_spec("quip._cpu")
    if asked == "torch":
        return None, "QUIP_CPU=torch asks for none"
    if spec is None:
        return None, "it was not built; installing quip where there is a C++ compiler, GCC or Clang, builds it"
    try:
        lib = ctypes.CDLL(spec.origin)
        if lib.quip_layer_size() != ctypes.sizeof(Layer):
            return None, "it was built from another version of its source: install quip again"
        lib.quip_backends.restype = lib.quip_backend.restype = ctypes.c_char_p
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        lib.quip_linears.argtypes = [pointer, size, pointer, pointer, size, size, size]
        lib.quip_prompt.argtypes = [pointer] * 3 + [size] * 2
        lib.quip_gated.argtypes = [pointer] * 5 + [size] * 3
        lib.quip_dense.argtypes = [pointer, pointer, size, size]
        norm = [pointer] * 3 + [size, size, ctypes.c_double, size]
        lib.quip_rms_norm.argtypes, lib.quip_rms_norm.restype = norm, None
        lib.quip_block_in.argtypes = [pointer] * 7 + [size]
        lib.quip_block_out.argtypes = [pointer] * 5 + [size] * 3 + [pointer, size]
        lib.quip_multiply.argtypes = [pointer] * 3 + [size] * 2
        lib.quip_read.argtypes, lib.quip_read.restype = [pointer, size, size], ctypes.c_uint64
    except (OSError, AttributeError) as e:
        return None, f"it cannot be loaded: {e}"
    names = ", ".join(lib.quip_backends().decode().split())
    if asked and lib.quip_use(asked.encode()):
        raise QuipError(f"QUIP_CPU={asked}: this processor runs {names}, torch")
    return lib, ""


@cache
def library() -> ctypes.CDLL | None:
    """The extension if there is one; else None and, once, a warning, unless QUIP_CPU asks for none."""
    lib, why = load()
    if lib is None and os.environ.get("QUIP_CPU") != "torch":
        warnings.warn(f"quip has no CPU kernel: {why}. Layers run in pure PyTorch, several times slower", stacklevel=2)
    return lib


def backends() -> list[str]:
    """The backends that this processor can run, best first; the last is `torch`, which is none."""
    lib = load()[0]
    return [*(lib.quip_backends().decode().split() if lib else []), "torch"]


def backend() -> str:
    """The backend in use: amx, avx512, avx2, neon, portable, or torch. The environment variable QUIP_CPU forces one."""
    lib = load()[0]
    return lib.quip_backend().decode() if lib else "torch"


def use(name: str) -> None:
    """Use another backend of the kernel, for tests and benchmarks. Raises `QuipError` if there is no such one here."""
    if name == "torch" or name not in backends():
        raise QuipError(f"the CPU kernel has no backend {name!r} here: there are {', '.join(backends()[:-1])}")
    load()[0].quip_use(name.encode())


class Unsaved:
    """What is made of a module's tensors when needed, and holds their addresses: a copy has to make its own."""

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class Call(Unsaved):
    """The kernel's call for one layer: its structure, made once. Keeps the tensors, whose addresses are in it, alive.

    The arguments are those of `quip.kernels.linear` after x. Raises `QuipError` for tensors that do not fit together,
    since the kernel would read beyond their end.
    """

    def __init__(
        self, n, qweight, scale, bits, rescale=None, bias=None, v_perm=None, v_factors=(), u_perm=None, u_factors=()
    ):
        self.n, self.m, self.tensors = n, qweight.shape[0], (qweight, scale, rescale, bias)
        if qweight.shape[1] != -(-n // 64) * 8 * bits or n > WIDEST:
            raise QuipError(f"packed codes {tuple(qweight.shape)} of {bits} bits do not fit {n} columns")
        for what, t, size in ("scale", scale, 1), ("rescale", rescale, n), ("bias", bias, self.m):
            if t is not None and t.numel() != size:
                raise QuipError(f"{what} {tuple(t.shape)} does not fit a layer of {n} inputs and {self.m} outputs")
        check_transform("V", n, v_perm, v_factors)
        check_transform("U", self.m, u_perm, u_factors)
        self.V, self.U = (v_perm, *v_factors), (u_perm, *u_factors)
        self.transposed = [[R.T.contiguous() for R in factors[1::2]] for factors in (v_factors, u_factors)]
        self.addresses = tuple(map(address, self.tensors))
        self.structure = Layer(
            *(self.m, n, bits, *self.addresses, DTYPES[torch.float32 if bias is None else bias.dtype]),
            transform(n, v_perm, v_factors, self.transposed[0]),
            transform(self.m, u_perm, u_factors, self.transposed[1]),
        )
        self.at = ctypes.addressof(self.structure)

    def is_current(self, buffers: dict) -> bool:
        """Whether the layer's tensors are still where they were."""
        now = buffers["qweight"], buffers["scale"], buffers["rescale"], buffers["bias"]
        return tuple(map(address, now)) == self.addresses

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x, plain, has the right width, and lies row by row."""
        return x.shape[-1:] == (self.n,) and x.is_contiguous()

    def input_like(self, other: Call) -> bool:
        """Whether this layer and another have the same width, bits and V."""
        if (self.n, self.structure.bits, len(self.V)) != (other.n, other.structure.bits, len(other.V)):
            return False
        pairs = zip(self.V, other.V, strict=True)
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # (…, n), contiguous, in one of DTYPES -> (…, m)
        if not self.is_long(x):
            return linears([self], x)[0]
        return self.by_dense(x) if self.pays_dense(x) else self.by_prompt(x)

    def is_long(self, x: torch.Tensor) -> bool:
        """Whether x has so many vectors that another way is faster: `by_dense`, or `by_prompt`."""
        prompt = x.dtype == torch.bfloat16 and backend() == "amx"
        return x.numel() >= LONG * self.n and (prompt or self.pays_dense(x))

    def pays_dense(self, x: torch.Tensor) -> bool:
        """Whether a dense matrix, once it is made, earns back what making it costs. By measurement.

        With AMX, never but in bfloat16: there, making it costs `MADE` times as much for each of its m n weights as the
        transforms of `by_prompt` for each of the n + m numbers of a vector. But its product of codes is faster than a
        dense one: with every `LIGHT` weights, that saves as much as one number costs.
        """
        batch = x.numel() // self.n
        if backend() == "amx":
            weights = self.n * self.m
            return x.dtype == torch.bfloat16 and batch * (self.n + self.m - weights / LIGHT) >= MADE * weights
        return batch >= self.n * PAYS[backend()]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`scale · x Cᵀ` alone, of contiguous float32 x `(batch, n)`."""
        y = x.new_empty(len(x), self.m)
        failed = library().quip_multiply(self.at, x.data_ptr(), y.data_ptr(), len(x), torch.get_num_threads())
        return enough_memory(failed, y)

    def by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """The layer for many vectors in bfloat16, which has AMX multiply by codes that become bfloat16 in the cache."""
        y = x.new_empty(*x.shape[:-1], self.m)
        batch, threads = x.numel() // self.n, torch.get_num_threads()
        return enough_memory(library().quip_prompt(self.at, x.data_ptr(), y.data_ptr(), batch, threads), y)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The layer's weights `(m, n)` as an ordinary matrix, `Uᵀ (s C) V D̃⁻¹`."""
        W = torch.empty(self.m, self.n, dtype=dtype)
        failed = library().quip_dense(self.at, W.data_ptr(), DTYPES[dtype], torch.get_num_threads())
        return enough_memory(failed, W)

    def by_dense(self, x: torch.Tensor) -> torch.Tensor:
        """The layer for very many vectors: one dense product; in float32, where 16 bits would be slower."""
        dtype = x.dtype if x.dtype == torch.bfloat16 and backend() == "amx" else torch.float32
        bias = self.tensors[3]
        y = torch.nn.functional.linear(x.to(dtype), self.dense(dtype), None if bias is None else bias.to(dtype))
        return y.to(x.dtype)


def linears(calls: list[Call], x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of layers that share an input x, (…, n), contiguous: of one, or of several that `share_input`."""
    ys = [x.new_empty(*x.shape[:-1], call.m) for call in calls]
    layers, out = pointers([call.at for call in calls]), pointers([y.data_ptr() for y in ys])
    batch, dtype = x.numel() // calls[0].n, DTYPES[x.dtype]
    done = library().quip_linears(layers, len(ys), x.data_ptr(), out, batch, dtype, torch.get_num_threads())
    return enough_memory(done, ys)


def pointers(addresses: list[int]) -> ctypes.Array:
    return (ctypes.c_void_p * len(addresses))(*addresses)


def enough_memory(failed: int, result):
    if failed:
        raise MemoryError("no memory for the product with packed weights")
    return result


def address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def transform(width: int, perm: torch.Tensor | None, factors: list[torch.Tensor], transposed: list) -> Transform:
    """The structure of a transform; see `quip.incoherence.kronecker_transform`."""
    made = Transform(perm=address(perm), stages=len(transposed))
    for i, Rt in enumerate(transposed):
        L, R = factors[2 * i : 2 * i + 2]
        made.stage[i] = Stage(width - len(L) * len(R) if i else 0, len(L), len(R), *map(address, (L, R, Rt)))
    return made


def check_transform(name: str, width: int, perm: torch.Tensor | None, factors: list[torch.Tensor]) -> None:
    """Raise `QuipError` unless permutation and factors are those of a transform of this width."""
    sizes = [len(F) for F in factors]
    square = all(F.shape == (n, n) for F, n in zip(factors, sizes, strict=True))
    fit = all(p * q <= width for p, q in zip(sizes[::2], sizes[1::2], strict=True)) and len(sizes) in (0, 2, 4)
    if not (square and fit and (perm is None or (perm.shape == (width,) and perm.dtype == torch.int64))):
        raise QuipError(f"the factors of {name} {[tuple(F.shape) for F in factors]} do not fit width {width}")


def untraced() -> bool:
    """Whether nobody watches: no tracer, dispatch mode, functional transform or forward-mode differentiation."""
    traced = torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
    return not traced and not transformed()


def transformed() -> bool:
    """Whether a functional transform (vmap, jvp, …) or forward-mode differentiation is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def is_plain(x: torch.Tensor, kind: str = "cpu") -> bool:
    """Whether x is just numbers on such a device: nobody who traces or differentiates has to see what becomes of it."""
    return (
        not torch.compiler.is_compiling()
        and untraced()
        and type(x) is torch.Tensor
        and x.dtype in DTYPES
        and x.device.type == kind
        and not x.requires_grad
    )


def can_run(x: torch.Tensor, *tensors) -> bool:
    """Whether the kernel takes x and the other arguments of `quip.kernels.linear`: on the CPU, of types it reads."""
    return x.is_cpu and x.dtype in DTYPES and x.shape[-1] <= WIDEST and can_hold(*tensors)


def can_hold(*tensors) -> bool:
    """Whether the kernel takes the arguments of `quip.kernels.linear` after x."""
    qweight, scale, _, rescale, bias, v_perm, v_factors, u_perm, u_factors = tensors
    floats = [t for t in (scale, rescale, *v_factors, *u_factors) if t is not None]
    every = [t for t in (qweight, bias, v_perm, u_perm, *floats) if t is not None]
    return (
        (bias is None or bias.dtype in DTYPES)
        and qweight.dtype == torch.uint8
        and all(t.dtype == torch.float32 for t in floats)
        and all(t.is_cpu and t.is_contiguous() for t in every)
        and library() is not None
    )


def linear(x: torch.Tensor, *tensors) -> torch.Tensor:  # (batch, n), contiguous -> (batch, m)
    """The whole layer: V, the product with packed codes, Uᵀ, bias. For arguments see `quip.kernels.linear`."""
    return Call(x.shape[-1], *tensors)(x)


def multiply(x: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """`scale · x Cᵀ` alone, of float32 x `(batch, n)`; the product in the middle of `linear`."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise QuipError(f"x must be contiguous float32, got {x.dtype}")
    return Call(x.shape[-1], qweight, scale, bits).multiply(x)


def read(data: torch.Tensor) -> int:
    """Read every byte of a tensor, and do as little as possible with it: what memory allows, for benchmarks."""
    return library().quip_read(data.data_ptr(), data.nbytes, torch.get_num_threads())
