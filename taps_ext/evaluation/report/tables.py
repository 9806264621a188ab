"""A table, and what it looks like in Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import Estimate

NOTHING, MINUS = "\u2013", "\u2212"

Entry = str | int | float | Estimate | None


@dataclass(frozen=True)
class Column:
    """A heading, and how its numbers are written: "" is text, else a format such as ".2f", "+.2f", ".1%" or ",d"."""

    title: str
    form: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of entries; an estimate is a value with its interval, None is nothing."""

    name: str  # of the CSV file, without its ending
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"table {self.name} has {len(self.columns)} columns, got a row of {len(wrong[0])}")


def _value(entry: Entry) -> float | None:
    number = entry.value if isinstance(entry, Estimate) else entry
    return None if number is None or isinstance(number, str) or math.isnan(number) else float(number)


def _number(value: float, form: str) -> str:
    """A number with a real minus sign; a difference that rounds to nothing has no sign."""
    text = format(int(value) if form.endswith("d") else value, form)
    if not any(digit in "123456789" for digit in text):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def _parts(entry: Entry, form: str) -> tuple[str, str]:
    """The value and the interval, as text."""
    if isinstance(entry, str):
        return entry, ""
    value = _value(entry)
    if value is None:
        return NOTHING, ""
    if not isinstance(entry, Estimate):
        return _number(value, form or "g"), ""
    if form.startswith("+"):
        form = _finer(entry, form)
    if form.endswith("%"):  # the value bears the sign, so that the interval stays short
        inner = f"{form[:-1]}f"
        return _number(value, form), f"{_number(100 * entry.low, inner)} to {_number(100 * entry.high, inner)}"
    return _number(value, form), f"{_number(entry.low, form)} to {_number(entry.high, form)}"


def _finer(estimate: Estimate, form: str) -> str:
    """The form with as many digits as an interval needs that is without 0, so that it does not end in one."""
    digits = int(form[2:-1])
    while (
        digits < 6
        and estimate.low * estimate.high > 0
        and not all(float(format(end, f".{digits}{form[-1]}").rstrip("%")) for end in (estimate.low, estimate.high))
    ):
        digits += 1
    return f"{form[:2]}{digits}{form[-1]}"


def markdown(table: Table) -> str:
    """The table of a Markdown file, its title a heading before it."""
    lines = [_md_row([column.title for column in table.columns])]
    lines.append(_md_row(["---:" if column.form else "---" for column in table.columns]))
    for row in table.rows:
        lines.append(_md_row([_md_entry(*pair) for pair in zip(row, table.columns, strict=True)]))
    note = f"{table.note}\n\n" if table.note else ""
    return f"### {table.title}\n\n{note}" + "\n".join(lines) + "\n"


def _md_row(entries: Sequence[str]) -> str:
    return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |"


def _md_entry(entry: Entry, column: Column) -> str:
    value, interval = _parts(entry, column.form)
    return f"{value} ({interval})" if interval else value


def as_csv(table: Table) -> str:
    """The numbers unrounded to six digits; an estimate is three columns: value, low, high."""
    has_interval = [any(isinstance(row[i], Estimate) for row in table.rows) for i in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [_csv_heads(column, wide) for column, wide in zip(table.columns, has_interval, strict=True)]
    writer.writerow([name for names in heads for name in names])
    for row in table.rows:
        cells = [_csv_cells(entry, wide) for entry, wide in zip(row, has_interval, strict=True)]
        writer.writerow([cell for part in cells for cell in part])
    return out.getvalue()


def _csv_heads(column: Column, has_interval: bool) -> list[str]:
    return [column.title, f"{column.title} low", f"{column.title} high"] if has_interval else [column.title]


def _csv_cells(entry: Entry, has_interval: bool) -> list[str]:
    figures = [entry.value, entry.low, entry.high] if isinstance(entry, Estimate) else [entry]
    texts = [_csv_number(figure) for figure in figures]
    return texts + [""] * (3 - len(texts)) if has_interval else texts


def _csv_number(figure: str | float | None) -> str:
    if figure is None or isinstance(figure, str):
        return figure or ""
    return "" if math.isnan(figure) else f"{figure:.6g}"


def as_html(table: Table) -> str:
    """A figure element: caption, note, and a table that scrolls sideways under its first column."""
    classes = ["" if column.form else ' class="text"' for column in table.columns]
    heads = "".join(
        f'<th scope="col"{kind}>{html.escape(column.title)}</th>'
        for column, kind in zip(table.columns, classes, strict=True)
    )
    rows = "\n".join(f"<tr>{_html_row(row, table.columns)}</tr>" for row in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f'<figure class="table" id="table-{html.escape(table.name)}">\n'
        f"<figcaption><h3>{html.escape(table.title)}</h3>{note}</figcaption>\n"
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>\n</figure>"
    )


def _html_row(row: Sequence[Entry], columns: Sequence[Column]) -> str:
    cells = []
    for index, (entry, column) in enumerate(zip(row, columns, strict=True)):
        value, interval = (html.escape(text) for text in _parts(entry, column.form))
        content = f"{value}<small>{interval}</small>" if interval else value
        kind = "" if column.form else ' class="text"'
        if index == 0:  # a variant's name may break after its marks
            breakable = re.sub("([:,+@=])", r"\1<wbr>", content)
            cells.append(f'<th scope="row"{kind}>{breakable}</th>')
        else:
            cells.append(f"<td{kind}>{content}</td>")
    return "".join(cells)
