"""Move the repository to another address: write it wherever a file names the old one.

    python tools/address.py https://github.com/OWNER/NAME

pyproject.toml says which address counts; tests/test_in_step.py finds every file that names another.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def address() -> str:
    """The repository's address, as pyproject.toml gives it."""
    return re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def files() -> list[Path]:
    """Every file of the project, but for data."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name and not name.startswith("book/data/")]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def move(new: str) -> list[Path]:
    """Write `new` for the old address, and its pages on GitHub; the files that changed."""
    old, changed = address(), []
    owner, name = old.split("/")[-2:]
    new_owner, new_name = new.split("/")[-2:]
    names = {f"github.com/{owner}/{name}", f"/github/{owner}/{name}", f"{owner}.github.io/{name}"}
    for path in files():
        text = moved = path.read_bytes().decode("utf-8", "replace")
        for known in names:
            end = r"(?![\w-])"  # not the beginning of a longer name
            moved = re.sub(re.escape(known) + end, known.replace(owner, new_owner).replace(name, new_name), moved)
        if moved != text:
            path.write_text(moved, encoding="utf-8", newline="")
            changed.append(path)
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2 or not re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", sys.argv[1]):
        sys.exit(__doc__)
    print(*(path.relative_to(ROOT) for path in move(sys.argv[1])), sep="\n")
