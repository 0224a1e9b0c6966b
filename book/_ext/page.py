"""Sphinx extension: what every page needs, whoever wrote it.

Search engines and shared links show a description, so a page gets one: its first paragraph. A browser may break a line
between a formula or code and the comma behind it or the bracket before it, so these are kept together; and within 10 %
and 4096 × 4096, so the blanks there become such as do not break. And Jupyter Book puts Thebe into every page, which
runs code on a server far away and declares its constants twice, an error; it is taken out.
"""

import re
from html import escape

from docutils import nodes

AFTER = re.compile(r"^[,.;:!?)\]’”]+")  # what must not begin a line
BEFORE = re.compile(r"[(\[‘“]+$")  # what must not end one
WITHIN = re.compile(r"(?<=\d) (?=[%×])|(?<=×) (?=\d)")  # blanks that do not break
LONGEST = 300  # characters of a description


def description(doctree: nodes.document) -> str:
    """The text of the first paragraph of some length, cut at a word."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if len(text) > 40:
            return text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0] + " …"
    return ""


def add_description(app, pagename, templatename, context, doctree) -> None:
    if doctree is not None and (text := description(doctree)):
        context["metatags"] = context.get("metatags", "") + f'\n<meta name="description" content="{escape(text)}" />'


def cut(neighbour: nodes.Node, marks: re.Pattern) -> str:
    """What of `marks` a neighbouring text has next to the formula; it is taken out of the text."""
    if not isinstance(neighbour, nodes.Text) or not (mark := marks.search(neighbour)):
        return ""
    neighbour.parent.replace(neighbour, nodes.Text(neighbour[: mark.start()] + neighbour[mark.end() :]))
    return mark[0]


def keep_together(app, doctree) -> None:
    for formula in list(doctree.findall(lambda node: isinstance(node, (nodes.math, nodes.literal)))):
        place, siblings = formula.parent.index(formula), formula.parent.children
        before = cut(siblings[place - 1], BEFORE) if place else ""
        after = cut(siblings[place + 1], AFTER) if place + 1 < len(siblings) else ""
        if before or after:
            together = nodes.inline(classes=["together"])
            formula.replace_self(together)
            together += [nodes.Text(before), formula, nodes.Text(after)]
    code = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw)
    for element in doctree.findall(lambda node: isinstance(node, nodes.Element) and not isinstance(node, code)):
        for i, child in enumerate(element.children):
            if isinstance(child, nodes.Text) and WITHIN.search(child):
                element[i] = nodes.Text(WITHIN.sub("\N{NO-BREAK SPACE}", child))


def leave_out_thebe(app, config) -> None:
    for listener in [listener for listeners in app.events.listeners.values() for listener in listeners]:
        if listener.handler.__module__ == "sphinx_thebe":
            app.disconnect(listener.id)
    styles = app.registry.css_files  # its own would be linked from every page, and is not there
    styles[:] = [style for style in styles if style[0] != "sphinx-thebe.css"]


def setup(app) -> dict:
    app.connect("config-inited", leave_out_thebe)
    app.connect("doctree-read", keep_together)
    app.connect("html-page-context", add_description)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
