"""The notebooks as files: executed, clean, and in step with the package."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "book").glob("*.ipynb"))}
LOCAL_PATH = re.compile(
    r"site-packages|ipykernel_\d|/(home|root|Users|tmp|var|opt|usr|mnt|content)/|" + re.escape(str(ROOT))
)

each_notebook = pytest.mark.parametrize("nb", NOTEBOOKS.values(), ids=NOTEBOOKS.keys())


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def output_texts(nb):
    for cell in code_cells(nb):
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (data for mime, data in output.get("data", {}).items() if mime.startswith("text/"))


@each_notebook
def test_executed_in_order(nb):
    # nbval compares no output of a cell that has no count.
    counts = [cell.execution_count for cell in code_cells(nb)]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_cell_ids(nb):
    # They are in the headers of the exported modules, so a new id is a difference there.
    ids = [cell.get("id") for cell in nb.cells]
    assert all(ids)
    assert len(set(ids)) == len(ids)


@each_notebook
def test_no_error_outputs(nb):
    assert not [cell.source for cell in code_cells(nb) for output in cell.outputs if output.output_type == "error"]


@each_notebook
def test_no_local_paths(nb):
    assert not [text for text in output_texts(nb) if LOCAL_PATH.search(text)]


@each_notebook
def test_metadata_names_no_machine(nb):
    assert nb.metadata.kernelspec.name == "python3"
    assert nb.metadata.language_info == {"name": "python"}
    assert "widgets" not in nb.metadata  # their scripts would come from the network


def test_one_notebook_a_module():
    # Of two notebooks that name the same module, nbdev keeps what the last one exports, and says nothing.
    sources = [cell.source for nb in NOTEBOOKS.values() for cell in code_cells(nb)]
    modules = Counter(re.findall(r"^#\| *default_exp +(\S+)", "\n".join(sources), re.MULTILINE))
    assert not [module for module, count in modules.items() if count > 1]


def test_every_notebook_is_in_the_toc():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    pages = chapters + [page for chapter in chapters for page in chapter.get("sections", [])]
    files = {toc["root"]} | {page["file"] for page in pages}
    assert {f"book/{name}" for name in NOTEBOOKS} <= files


def test_modules_are_what_the_notebooks_export():
    run = subprocess.run([sys.executable, ROOT / "tools" / "drift.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
