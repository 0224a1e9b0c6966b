"""One interactive part of a page: HTML that can be read as it is, and the script and style that bring it to life."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from html import escape
from importlib.resources import files
from numbers import Real

MARKUP = re.compile(r"`([^`]+)`|\*([^*]+)\*|_\{([^{}]+)\}|\^\{([^{}]+)\}")
TAGS = ("code", "em", "sub", "sup")
NONE = "–"  # in the place of a value that is missing


class Component:
    """What a notebook shows in a page, in Jupyter and in Colab: the last value of a cell.

    The output carries all that it needs and asks for nothing from elsewhere, since Colab shows each output in a frame
    of its own. It is the same for the same arguments, so that stored outputs can be compared. `kind` names the script
    and the style in `static`; `body` is HTML that says everything where no script runs; `data` goes to the script.
    """

    def __init__(self, kind: str, label: str, body: str, data: object = None):
        self.kind, self.label, self.body, self.data = kind, label, body, data

    def __repr__(self) -> str:
        return f"<{self.label}>"

    def _repr_html_(self) -> str:
        kind = self.kind
        data = "" if self.data is None else f'<script type="application/json">{to_json(self.data)}</script>\n'
        root = f'<div class="quip quip-{kind}" data-quip="{kind}">\n{self.body}\n{data}</div>'
        start = f"""for (const root of document.querySelectorAll('[data-quip="{kind}"]:not([data-on])')) {{
root.dataset.on = "";
start(root);
}}"""
        script = f"(() => {{\n{asset(f'{kind}.js')}\n{start}\n}})();"
        return f"<style>\n{asset('base.css')}\n{asset(f'{kind}.css')}\n</style>\n{root}\n<script>\n{script}\n</script>"


@cache
def asset(name: str) -> str:
    """A file of `static`, without indentation, empty lines and lines that are comments."""
    text = files("quip.interactive").joinpath("static", name).read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith(("//", "/*")))


def to_json(data: object) -> str:
    """JSON that can stand in a `<script>`: nothing in it closes the element. NaN and infinities become null."""
    text = json.dumps(finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def finite(data: object) -> object:
    """The same with None for each number that JSON does not know."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def inline(text: str) -> str:
    """HTML of a line of text with `code`, *emphasis*, sub_{script} and super^{script}; all else is escaped.

    Formulas are written with these and with Unicode: an output in Colab has no MathJax.
    """

    def tag(match: re.Match) -> str:
        name = TAGS[match.lastindex - 1]
        inside = match[match.lastindex]
        return f"<{name}>{inside if name == 'code' else MARKUP.sub(tag, inside)}</{name}>"

    return MARKUP.sub(tag, escape(text, quote=True))


def is_number(value: object) -> bool:
    """Whether it is a number that can be drawn and sorted: real, finite, no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_missing(value: object) -> bool:
    """Whether it is None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))
