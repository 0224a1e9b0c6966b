"""The CPU kernel: an optional extension. Without a compiler, or with one that is too old, an install goes on."""

import os
import platform
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-w", "-Wno-psabi"]  # -w leaves notes
MORE = os.environ.get("QUIP_CFLAGS", "").split()  # to compile and link with, such as -fsanitize=address


class BuildKernel(build_ext):
    """Builds with threads, where the compiler has OpenMP."""

    def build_extension(self, ext: Extension) -> None:
        openmp = ["-fopenmp"] if self.has_openmp() else []
        ext.extra_compile_args = [*FLAGS, *openmp, *MORE]
        ext.extra_link_args = [*openmp, *MORE]
        super().build_extension(ext)

    def has_openmp(self) -> bool:
        """Whether a program with it compiles, and links."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "try.c"
            source.write_text("#include <omp.h>\nint main() { return omp_get_num_threads() != 1; }\n")
            try:
                command = [self.compiler.compiler_so[0], "-fopenmp", str(source), "-o", f"{source}.out"]
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False


kernel = Extension(
    "quip._cpu",
    sorted(str(path) for path in Path("quip/csrc").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("quip/csrc").glob("*.[hi]*")),
    language="c++",
    optional=True,  # a build that fails is a warning
)
# It is written with the vectors of GCC and Clang; other compilers need not try.
setup(ext_modules=[] if platform.system() == "Windows" else [kernel], cmdclass={"build_ext": BuildKernel})
