"""A table that its reader sorts and filters, and that is a plain table where no script runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from quip.errors import QuipError
from quip.interactive.component import NONE, Component, inline, is_missing, is_number


def sortable_table(
    rows: Sequence[Mapping],
    columns: Sequence[str] | Mapping[str, str],
    caption: str = "",
    formats: Mapping[str, str] | None = None,
    filters: Sequence[str] = (),
) -> Component:
    """A table whose headers sort it, with a box to search in it: the last value of a notebook's cell.

    `rows` are dicts; `columns` names their keys in order, as a list or as {key: heading}; the first heads its row.
    `formats` gives number formats, {"perplexity": ".2f"}; without one, floats have four digits, or none after the point
    from 1000 on. A key that a row lacks, None and NaN are shown as a dash and sorted last. For each column in `filters`
    there is a choice among its values. Headings and caption may have the markup of `inline`; cells are plain text.
    Sorting is by number where a cell holds one, else by text. Raises `QuipError` if there are no rows or columns, for a
    column or filter that no row has, and for a format that does not fit.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    check_table(rows, headings, formats or {}, filters)
    numeric = {key for key in headings if all(is_number(row.get(key)) or is_missing(row.get(key)) for row in rows)}
    head = "".join(f"<th scope=col{right(key in numeric)}>{inline(heading)}</th>" for key, heading in headings.items())
    lines = [table_row(row, list(headings), formats or {}, numeric) for row in rows]
    title = f"<caption>{inline(caption)}</caption>" if caption else ""
    body = f"<div class=scroll><table>{title}\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines)
    positions = [list(headings).index(key) for key in filters]
    label = f"table of {len(rows)} rows and {len(headings)} columns"
    return Component("table", label, f"{body}\n</tbody></table></div>", {"filters": positions})


def check_table(rows, headings, formats, filters) -> None:
    """Raise `QuipError`, naming the row or column, for what cannot be a table."""
    if not rows or not headings:
        raise QuipError("a table needs at least one row and one column")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise QuipError(f"row {i} of the table is no dict but a {type(row).__name__}")
    for key in (*headings, *formats):
        if not any(key in row for row in rows):
            raise QuipError(f"no row of the table has the column {key!r}")
    for key in filters:
        if key not in headings:
            raise QuipError(f"the table has no column {key!r} to filter by")


def right(numeric: bool) -> str:
    return " class=n" if numeric else ""


def table_row(row: Mapping, keys: Sequence[str], formats: Mapping[str, str], numeric: set[str]) -> str:
    """`<tr>` whose first cell is the header of the row."""
    cells = []
    for key in keys:
        tag, value = "td" if cells else "th scope=row", row.get(key)
        number = f' data-v="{float(value)!r}"' if is_number(value) else ""
        text = escape(cell_text(value, formats.get(key)))
        cells.append(f"<{tag}{right(key in numeric)}{number}>{text}</{tag[:2]}>")
    return f"<tr>{''.join(cells)}</tr>"


def cell_text(value: object, spec: str | None) -> str:
    """A value as its reader sees it, with a true minus sign."""
    if is_missing(value):
        return NONE
    if not is_number(value):
        return str(value)
    try:
        plain = "d" if isinstance(value, int) else ".0f" if abs(value) >= 1000 else ".4g"
        return format(value, spec or plain).replace("-", "−")
    except ValueError as e:
        raise QuipError(f"the format {spec!r} does not fit the value {value!r} of the table: {e}") from None
