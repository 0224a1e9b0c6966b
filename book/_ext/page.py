"""Sphinx extension: what every page needs, whoever wrote it.

Search engines and shared links show a description, so a page gets one: its first paragraph, without formulas. And a
browser may break a line between a formula and the comma behind it, so the two are kept together.
"""

import re
from html import escape

from docutils import nodes

AFTER = re.compile(r"^[,.;:!?)\]’”]+")  # what must not begin a line
LONGEST = 300  # characters of a description


def description(doctree: nodes.document) -> str:
    """The text of the first paragraph that is not only a formula, cut at a word."""
    for paragraph in doctree.findall(nodes.paragraph):
        words = "".join(child.astext() for child in paragraph.children).split()
        text = " ".join(words)
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


def setup(app) -> dict:
    app.connect("doctree-read", keep_together)
    app.connect("html-page-context", add_description)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
