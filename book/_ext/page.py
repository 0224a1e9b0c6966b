"""Sphinx extension: what every page needs, whoever wrote it.

Search engines and shared links show a description, so a page gets one: its first paragraph. A browser may break a line
between a formula and the comma behind it, so the two are kept together. And Jupyter Book puts Thebe into every page,
which runs code on a server far away and declares its constants twice, an error; it is taken out.
"""

import re
from html import escape

from docutils import nodes

AFTER = re.compile(r"^[,.;:!?)\]’”]+")  # what must not begin a line
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


def keep_together(app, doctree) -> None:
    for formula in list(doctree.findall(nodes.math)):
        follower = formula.next_node(descend=False, siblings=True)
        if not isinstance(follower, nodes.Text) or not (mark := AFTER.match(follower)):
            continue
        formula.parent.replace(follower, nodes.Text(follower[mark.end() :]))
        together = nodes.inline(classes=["together"])
        formula.replace_self(together)
        together += [formula, nodes.Text(mark[0])]


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
