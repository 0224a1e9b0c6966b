"""Compiles CUDA C++ against `emulate.h` and runs its kernels on CPU tensors."""

import ctypes
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from quip.cuda import _Place

HEADER = Path(__file__).with_name("emulate.h")
COMPILER = shutil.which(os.environ.get("CXX", "g++")) if sys.platform == "linux" else None  # fibers are POSIX
_folder = tempfile.TemporaryDirectory(prefix="quip-emulation-", ignore_cleanup_errors=True)


class EmulationError(AssertionError):
    """What a kernel did wrong, and where."""


class Argument(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("bytes", ctypes.c_longlong), ("number", ctypes.c_double)]

    @classmethod
    def of(cls, value):
        if isinstance(value, torch.Tensor):
            return cls(value.data_ptr(), value.nbytes, 0)
        return cls(None, 0, value or 0)


def compile_kernels(source: str, bits: int | str):
    """A shared library of the kernels in a source (without `quip.cuda.DEVICE`), each as `run_NAME`."""
    names = re.findall(r"^(?:LARGE_)?KERNEL(?:_\d+)? (\w+)\(", source, re.MULTILINE)
    text = f'#include "{HEADER.name}"\n#define BITS {bits}\n#line 1\n{source}\n'
    text += "".join(f"EXPORT({name})\n" for name in names)
    stem = Path(_folder.name) / hashlib.sha256(text.encode()).hexdigest()[:16]
    library = stem.with_suffix(".so")
    if not library.exists():
        stem.with_suffix(".cpp").write_text(text)
        _compile("-shared", str(stem.with_suffix(".cpp")), "-o", str(library))
    return ctypes.CDLL(str(library))


def _compile(*arguments):
    header = Path(_folder.name) / HEADER.name
    if not header.exists():  # compiled once, which saves most of the time of all later compilations
        shutil.copy(HEADER, header)
        _compile("-x", "c++-header", str(header), "-o", f"{header}.gch")
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    done = subprocess.run([COMPILER, *flags, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(done.stderr[:2000])


def part(place: _Place, tensor: torch.Tensor) -> torch.Tensor:
    """What lies at a place of a tensor."""
    if not place.shape:
        return tensor
    end = place.offset + math.prod(place.shape) * place.dtype.itemsize
    return tensor[place.offset : end].view(place.dtype).view(place.shape)


class Emulator:
    """Stands in for what `quip.cuda` loads for a device: called with a kernel's name, a grid and its arguments."""

    room, multiprocessors, bfloat = 65536, 2, True  # shared memory of a block, as on the smallest of the real ones

    def __init__(self, source: str, bits: int | str, seed: int = 0):
        self.library, self.seed = compile_kernels(source, bits), seed

    def stream(self):
        return 0

    def recording(self):
        return False

    def finish(self):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *exception):
        pass

    def run(self, plan, *tensors: torch.Tensor):
        """All kernels of a `quip.cuda._Plan`, with nothing in y and in their room at first but NaN."""
        _, y, room = tensors
        y.fill_(torch.nan)
        room.fill_(255)
        for launch in plan.launches:
            args = [part(a, tensors[a.tensor]) if isinstance(a, _Place) else a for a in launch.args]
            self(launch.name, launch.grid, *args, **launch.options)

    def __call__(self, name: str, grid: tuple[int, int], *args, threads: int = 256, shared: int = 0, early=False):
        run = getattr(self.library, f"run_{name}")
        run.restype = ctypes.c_char_p
        values = (Argument * len(args))(*map(Argument.of, args))
        message = run(*grid, threads, shared, len(args), values, self.seed)
        if message:
            raise EmulationError(f"{name}: {message.decode()}")
