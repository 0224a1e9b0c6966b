"""Sphinx extension: label the cells that are exported into the package.

nbdev reads comments at the top of a code cell: `#| default_exp NAME` names the notebook's module, `#| export` sends the
cell to it. A reader of the book has no use for these lines, but wants to know which cells the package is made of. So
they are removed from the page, and an exported cell gets a line above it that links to its module's reference.
"""

import re

from docutils import nodes
from sphinx import addnodes

PACKAGE = "quip"
DIRECTIVE = re.compile(r"#\|\s*(\w+)[ \t]*(.*)")


def split(source: str) -> tuple[dict[str, str], str]:
    """The directives at the top of a cell as {name: argument}, and the code below them."""
    directives, lines = {}, source.splitlines()
    while lines and (match := DIRECTIVE.match(lines[0])):
        directives[match[1]] = match[2].strip()
        lines.pop(0)
    return directives, "\n".join(lines).strip("\n")


def label(module: str) -> nodes.paragraph:
    name = f"{PACKAGE}.{module}"
    link = addnodes.pending_xref(
        "", nodes.literal(text=name), refdomain="py", reftype="mod", reftarget=name, refexplicit=True
    )
    return nodes.paragraph("", "", nodes.Text("exported to "), link, classes=["export-label"])


def is_code_cell(node) -> bool:
    return isinstance(node, nodes.container) and node.get("nb_element") == "cell_code"


def label_cells(app, doctree) -> None:
    module = None
    for cell in list(doctree.findall(is_code_cell)):
        block = next(cell.findall(nodes.literal_block), None)
        if block is None:
            continue
        directives, code = split(block.rawsource)
        if not directives:
            continue
        module = directives.get("default_exp", module)
        # The highlighter takes a block whose text is not its rawsource for one that has markup of its own.
        block.rawsource = code
        block.children = [nodes.Text(code)]
        parent = cell.parent
        if "export" in directives:
            parent.insert(parent.index(cell), label(directives["export"] or module))
        if not code:
            parent.remove(cell)


def setup(app) -> dict:
    app.connect("doctree-read", label_cells)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
