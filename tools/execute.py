"""Run notebooks from a fresh kernel and store their outputs.

    python tools/execute.py book/01_proxy.ipynb ...

Cell ids stay, execution counts run from 1, and the metadata is the same whoever runs it, so that a diff shows
only what changed. A notebook with a cell that fails is left as it was.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(path: Path) -> None:
    nb = nbformat.read(path, as_version=4)
    nb.metadata["kernelspec"] = KERNEL
    client = NotebookClient(
        nb,
        timeout=1200,
        record_timing=False,
        store_widget_state=False,  # a page with widgets fetches their scripts from the network
        coalesce_streams=True,  # in one piece: how a kernel cuts a stream up differs from run to run
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute(cwd=str(path.parent))
    nb.metadata["language_info"] = {"name": "python"}  # not the version of Python that happened to run it
    nbformat.validate(nb)
    nbformat.write(nb, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        execute(Path(name))
