"""The README's code runs, and the targets that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_without_files_runs():
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "quantize_matrix" in code)
    names = {}
    exec(example, names)
    assert names["q"].codes.shape == names["W"].shape
    assert 0 < names["q"].report["relative_proxy_loss"] < 0.5


def test_every_make_target_exists():
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
