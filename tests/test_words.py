"""The words of the book: one spelling each, and a glossary that explains what the chapters say."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
# How the book does not write a word, and how it does. Code, formulas and addresses may.
OTHERWISE = {
    r"percent": "per cent",
    r"cent(er|ered|ering)": "centre",
    r"factorization": "factorisation",
    r"(de)?quantis\w+": "quantize, as in the field",
    r"(mini|maxi)miz\w+|(opti|normal|organ)iz\w+": "minimise, optimise, …",
    r"neighbors?|colors?|gray|modeling": "neighbour, colour, grey, modelling",
    r"data ?set": "text, or data",
    r"checksums? of the transform": "fingerprint",
    r"(proxy|quadratic) objective": "proxy loss",
    r"round[- ]to[- ]nearest|RTN": "nearest rounding, rounding to nearest",
    r"e\.g\.|i\.e\.|etc\.": "for instance, that is, and so on",
}


def prose(path: Path) -> str:
    """The text of a page without code, formulas, roles' targets, and the bodies of links."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, 4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    text = re.sub(r"^```.*?^```$|\$\$.*?\$\$", " ", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\{(ref|doc|term)\}`([^`<]*?)(\s*<[^>`]*>)?`", r"\2", text)
    text = re.sub(r"\{[\w:]+\}`[^`]*`|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|^:label:.*$", " ", text, flags=re.MULTILINE)
    return re.sub(r"\s+", " ", text)


PAGES = {
    path.relative_to(ROOT).as_posix(): prose(path)
    for path in sorted([*(ROOT / "book").glob("*.ipynb"), *(ROOT / "book").glob("*.md"), *ROOT.glob("*.md")])
}
ELSEWHERE = " ".join(text for name, text in PAGES.items() if name != "book/notation.md").lower()
NOTATION = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
TERMS = re.findall(r"^(\S.*)\n  \S", NOTATION.split(":::{glossary}")[1].rsplit(":::", 1)[0], re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_one_spelling_for_a_word(name):
    found = {m[0]: better for bad, better in OTHERWISE.items() for m in re.finditer(rf"\b({bad})\b", PAGES[name], re.I)}
    assert not found


def test_glossary_is_sorted_and_every_term_is_used():
    assert len(TERMS) > 40
    assert sorted(TERMS, key=lambda term: term.lower().replace("-", " ")) == TERMS
    stems = {term: re.sub(r"(ing|s|ed|y|matrix)$", "", term.lower()).strip() for term in TERMS}
    assert not [term for term, stem in stems.items() if stem not in ELSEWHERE]
