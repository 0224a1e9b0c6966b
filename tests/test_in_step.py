"""What must agree: the package and its reference, chapters and Colab, prose and figures, links and the repository."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

import quip

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted(BOOK.glob("*.ipynb"))}
REFERENCE = (BOOK / "api.md").read_text(encoding="utf-8")
EXPORTED = {}  # module: the notebook that exports it
for stem, nb in NOTEBOOKS.items():
    if found := re.search(r"^#\| *default_exp +(\S+)", "\n".join(cell.source for cell in nb.cells), re.MULTILINE):
        EXPORTED[found[1]] = stem
# Modules that nobody imports, or only the package itself: not in the reference.
INTERNAL = {"__init__", "__main__", "_modidx", "calls", "cli", "decode", "forms", "fuse"}

each_notebook = pytest.mark.parametrize("stem", NOTEBOOKS)
each_module = pytest.mark.parametrize("module", EXPORTED)

sys.path.insert(0, str(ROOT / "tools"))
from address import address, files  # noqa: E402

sys.path.pop(0)


def cells(stem: str, kind: str):
    return [cell for cell in NOTEBOOKS[stem].cells if cell.cell_type == kind]


# The package and the book


def test_every_public_name_is_in_a_chapter():
    pages = [cell.source for nb in NOTEBOOKS.values() for cell in nb.cells]
    text = "\n".join([*pages, (BOOK / "using.md").read_text(encoding="utf-8")])
    assert not [name for name in quip.__all__ if not re.search(rf"\b{name}\b", text)]


def test_every_public_name_is_in_the_reference():
    modules = re.findall(r"automodule:: (\S+)\n +:members:", REFERENCE)
    assert not [name for name in quip.__all__ if getattr(quip, name).__module__ not in modules]
    assert not [name for name in quip.__all__ if not getattr(quip, name).__doc__]


def test_every_module_is_in_the_reference():
    modules = {path.stem if path.is_file() else path.name for path in (ROOT / "quip").iterdir()}
    modules = {m for m in modules if (ROOT / f"quip/{m}.py").exists() or (ROOT / f"quip/{m}/__init__.py").exists()}
    assert modules - INTERNAL == set(re.findall(r"automodule:: quip\.(\w+)$", REFERENCE, re.MULTILINE))


@each_module
def test_exported_names_are_documented_and_used_by_their_chapter(module):
    exported = importlib.import_module(f"quip.{module}")
    text = "\n".join(cell.source for nb in NOTEBOOKS.values() for cell in nb.cells)
    for name in exported.__all__:
        if callable(value := getattr(exported, name)) and getattr(value, "__module__", "") == exported.__name__:
            assert value.__doc__, name
        assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{name} is exported and no cell uses it"


@each_module
def test_docstrings_name_their_chapter(module):
    # The reference links to it, and each function to its cell: see book/_ext/export_label.py and tests/test_pages.py.
    number = int(EXPORTED[module].partition("_")[0])
    assert importlib.import_module(f"quip.{module}").__doc__.rstrip().endswith(f"(chapter {number}).")


# Colab


def colab_cell(stem: str) -> str:
    (cell,) = (cell for cell in cells(stem, "code") if cell.id == "colab")
    assert cell is cells(stem, "code")[0]
    assert cell.metadata.tags == ["remove-cell"]  # from the page, where it would say nothing
    return cell.source


def test_every_notebook_starts_with_the_same_cell_for_colab():
    assert len({colab_cell(stem) for stem in NOTEBOOKS}) == 1


@pytest.mark.parametrize(
    ("on_colab", "fetched", "installed", "steps"),
    [
        (False, False, False, []),
        (True, False, False, ["git clone", "pip install"]),
        (True, True, False, ["pip install"]),
        (True, True, True, []),
    ],
)
def test_the_cell_for_colab_does_what_is_missing(monkeypatch, on_colab, fetched, installed, steps):
    commands, folders = [], []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(" ".join(command)) or check or 1 / 0)
    monkeypatch.setattr(os, "chdir", folders.append)
    monkeypatch.setattr(os.path, "isdir", lambda folder: fetched)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    if on_colab:
        monkeypatch.setitem(sys.modules, "google.colab", sys)
    exec(colab_cell("intro"), {})
    assert len(commands) == len(steps)
    assert all(step in command for step, command in zip(steps, commands, strict=True))
    assert len(folders) == on_colab
    assert all(folder.endswith("/book") for folder in folders)


@each_notebook
def test_chapters_import_what_the_cell_for_colab_installs(stem):
    imported = set()
    for cell in cells(stem, "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    ours = {"quip", "torch", "numpy", "safetensors", "transformers", "tqdm", "matplotlib"}
    theirs = {"IPython", "PIL", "tokenizers"}  # of Jupyter, matplotlib, transformers
    optional = {"cuda", "emulate"}  # the chapter goes on without
    assert imported <= ours | theirs | optional | sys.stdlib_module_names


@each_notebook
def test_directives_read_as_text_on_colab(stem):
    # A fence of backquotes would be shown there as a block of code, with its markup.
    assert not [cell.id for cell in cells(stem, "markdown") if re.search(r"^ *```\{", cell.source, re.MULTILINE)]


# Figures


@each_notebook
def test_every_figure_says_what_it_shows(stem):
    for cell in cells(stem, "code"):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 60, cell.id


# Numbers of prose that no cell prints and no record holds, as formats, papers and models give them or two lines of
# arithmetic do.
GIVEN = {
    "04_incoherence": {"33.3"},  # a third of 100
    "07_grids": {"0.501"},  # 0.499 + 0.002
    "05_quip": {"288"},  # bits of 36 bytes
    "08_results": {"74.2", "1536"},  # the paper's, of a permutation; inputs of SmolLM2's down_proj
    "09_kernels": {"7680", "30720", "32767", "65504", "2013"},  # sums of 60 × 128, ends of int16 and float16, a year
    "09_cuda": {"1023", "58.7"},  # largest code of ten bits; MB of 8192 × 28672 weights of 2 bits
    "10_models": {"1.07"},  # GB of 64 × 1024 × 4096 numbers
}
WIDTHS = {"128", "256", "1024", "2048", "4096", "28672", "65536"}  # of layers and blocks, tokens of a piece
NUMBER = re.compile(r"(?<![\w.^_{/–-])(\d+(?:[\u202f\u2009 ,]\d{3})*(?:\.\d+)?)(?![\w}])")


def numbers_in_prose(stem: str) -> set[str]:
    """Numbers of three digits and more in the text of a chapter, without formulas and code."""
    found = set()
    for cell in cells(stem, "markdown"):
        text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)", " ", cell.source, flags=re.DOTALL)
        found |= {re.sub(r"[\u202f\u2009 ,]", "", match[1]) for match in NUMBER.finditer(text)}
    digits = {
        number: (number if "." in number else number.rstrip("0")).replace(".", "").lstrip("0") for number in found
    }
    return {number for number in found if len(digits[number]) >= 3}


def leaves(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    elif isinstance(value, int | float):
        yield float(value)


def printed(stem: str) -> tuple[list[float], list[float]]:
    """The numbers in a chapter's code and outputs, and those of the records that it reads."""
    code = "\n".join(cell.source for cell in cells(stem, "code"))
    outputs = [output for cell in cells(stem, "code") for output in cell.outputs]
    texts = [output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    numbers = [float(x) for x in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", "\n".join([code, *texts]).replace(",", ""))]
    names = [name for name in set(re.findall(r"(\w+)\.json", code)) if (BOOK / "results" / f"{name}.json").exists()]
    records = [json.loads((BOOK / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    return numbers, [x for record in records for x in leaves(record)]


@each_notebook
def test_a_cell_or_a_record_has_every_number_of_the_prose(stem):
    numbers, recorded = printed(stem)
    missing = []
    for number in numbers_in_prose(stem) - GIVEN.get(stem, set()) - WIDTHS:
        digits = len(number.partition(".")[2])
        candidates = [x * unit for x in numbers for unit in (1, 100, 0.01, 1000, 0.001)] + recorded
        if not any(round(x, digits) == float(number) for x in candidates):
            missing.append(number)
    assert not missing


# The address of the repository: pyproject.toml has it, and tools/address.py changes it everywhere


def test_every_link_to_the_repository_has_its_address():
    owner, name = address().split("/")[-2:]
    link = re.compile(
        r"(?:github\.com/|/github/)([\w-]+)/([\w.-]+?)(?=\.git\b|[^\w.-]|\.?$)|\b([\w-]+)\.github\.io/([\w.-]+)"
    )
    others = []
    for path in files():
        if path.suffix in (".md", ".ipynb", ".yml", ".toml", ".py", ".cff", ".bib", ".html"):
            for match in link.finditer(path.read_text(encoding="utf-8")):
                there = (match[1] or match[3], match[2] or match[4])
                if there != (owner, name) and (there[0] == owner or there[1] == name):
                    others.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert not others, "run tools/address.py with the address that is meant"


def test_what_is_derived_from_the_address_uses_it():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    derived = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "quip/_modidx.py")}
    derived |= {"book/citing.md": (BOOK / "citing.md").read_text(encoding="utf-8"), "Colab": colab_cell("intro")}
    derived |= {"_config.yml": config["repository"]["url"]}
    stale = [name for name, text in derived.items() if not re.search(re.escape(address()) + r"(?![\w-])", text)]
    assert not stale, "run tools/address.py, before pyproject.toml is changed, with the address that is meant"
    assert config["launch_buttons"]["colab_url"] == "https://colab.research.google.com"
