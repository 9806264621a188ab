"""Figures of an evaluation: ratios with bootstrapped intervals, and the tables and pictures that show them."""

from __future__ import annotations

import base64
import io
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import bootstrap

from .counts import View

Array = NDArray[np.float64]
Row = dict[str, Any]
Counts = Callable[[pd.DataFrame], tuple[Any, Any]]  # numerators and denominators per question: a ratio of sums

NUM_RESAMPLES, LEVEL = 2000, 95  # an interval holds LEVEL percent of the resamples
MEAN = "mean over tasks"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5f17", "#7a3fb0")  # Okabe and Ito's
LOOK: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e2e5ea",
}
LOOK |= {"axes.spines.right": False, "axes.spines.top": False, "axes.axisbelow": True}


@dataclass(frozen=True, eq=False)
class Sampled:
    """A figure and its value in each resample of the questions, float64 [NUM_RESAMPLES] (NaN: no value)."""

    value: float
    samples: Array

    @property
    def interval(self) -> tuple[float, float]:
        """Return the percentile interval; NaN where there are fewer than two questions."""
        known = self.samples[np.isfinite(self.samples)]
        low, high = np.percentile(known, [(100 - LEVEL) / 2, (100 + LEVEL) / 2]) if len(known) else (np.nan, np.nan)
        return float(low), float(high)


def ratio(task: str, *sums: Any) -> Sampled | None:
    """Return the ratio of two sums over questions, or the difference of two such ratios, with its resamples.

    `sums` are two or four arrays [Q]: numerators and denominators, then those to subtract. `scipy.stats.bootstrap`
    draws whole questions, paired: all figures of a task with as many questions meet the same draws. Return None where
    a ratio has no value.
    """

    def statistic(*parts: Array, axis: int = -1) -> Any:
        totals = [part.sum(axis=axis) for part in parts]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = [top / bottom for top, bottom in zip(totals[::2], totals[1::2], strict=True)]
        return ratios[0] - sum(ratios[1:])

    arrays = [np.asarray(part, dtype=np.float64) for part in sums]
    value = float(statistic(*arrays)) if len(arrays[0]) else np.nan
    if not np.isfinite(value):
        return None
    if len(arrays[0]) < 2:
        return Sampled(value, np.full(NUM_RESAMPLES, np.nan))
    random = np.random.default_rng(zlib.crc32(task.encode()))
    with np.errstate(all="ignore"):
        drawn = bootstrap(
            arrays, statistic, paired=True, method="percentile", n_resamples=NUM_RESAMPLES, rng=random, vectorized=True
        )
    return Sampled(value, drawn.bootstrap_distribution)


def mean_over(figures: Sequence[Any]) -> Any:
    """Return the mean over tasks of figures or numbers, each counting the same; None unless every task has one."""
    if not figures or any(figure is None for figure in figures):
        return None
    if not isinstance(figures[0], Sampled):
        return sum(figures) / len(figures)
    samples = np.mean([figure.samples for figure in figures], axis=0)
    return Sampled(float(np.mean([figure.value for figure in figures])), samples)


def acceptance_length(counts: pd.DataFrame) -> tuple[Any, Any]:
    """Return tokens per decode step over all steps (micro average)."""
    return counts["accepted"] + counts["steps"], counts["steps"]


def macro_acceptance_length(counts: pd.DataFrame) -> tuple[Any, Any]:
    """Return the questions' own acceptance lengths; questions without a step are left out."""
    has_steps = counts["steps"] > 0
    return (1 + counts["accepted"] / counts["steps"].where(has_steps, 1)) * has_steps, has_steps


def value(view: View, variant: str, task: str, counts: Counts, seeds: Sequence[int] | None = None) -> Sampled | None:
    """Return a variant's figure on a task; None where it did not run, or the figure has no value."""
    cell = view.cell(variant, task, seeds)
    return None if cell is None else ratio(task, *counts(cell))


def plain_value(view: View, counts: Counts) -> Callable[[str, str], float | None]:
    """Return the figure as a function of variant and task, without an interval."""

    def by_task(variant: str, task: str) -> float | None:
        cell = view.cell(variant, task)
        top, bottom = (0, 0) if cell is None else (part.sum() for part in counts(cell))
        return float(top / bottom) if bottom else None

    return by_task


def difference(view: View, one: str, other: str, task: str) -> Sampled | None:
    """Return one - other in acceptance length over the same questions and drafter seeds, paired by question."""
    pair = view.aligned([one, other], task)
    return None if pair is None else ratio(task, *acceptance_length(pair[0]), *acceptance_length(pair[1]))


def best(view: View, variants: Sequence[str], task: str, sign: int = 1) -> str | None:
    """Return the variant that accepts most on the task (sign -1: least), over what all that ran on it have."""
    there = [name for name in variants if view.seeds(name, task)]
    cells = view.aligned(there, task) if there else None
    pairs = [acceptance_length(cell.sum()) for cell in cells or ()]
    lengths = {name: sign * top / bottom for name, (top, bottom) in zip(there, pairs, strict=False) if bottom}
    return max(lengths, key=lambda name: lengths[name], default=None)


# ---- tables


@dataclass(frozen=True, eq=False)
class Table:
    """A table: `rows` hold numbers, an interval as "HEADING low" and "HEADING high"; `forms` say how to write them."""

    name: str  # of the CSV file, without its ending
    title: str
    note: str
    rows: pd.DataFrame
    forms: Mapping[str, str]  # by heading: "" is text, else a format such as ".2f", "+.2f" or ".1%"

    @classmethod
    def of(cls, name: str, title: str, note: str, rows: Sequence[Row], forms: Mapping[str, str]) -> Table:
        """Return the table of these rows, its numbers rounded to six digits."""
        parts = [[head, f"{head} low", f"{head} high"] for head in forms]
        columns = [part for heads in parts for part in heads if part in forms or any(part in row for row in rows)]
        rounded = [{name: _round(value) for name, value in row.items()} for row in rows]
        return cls(name, title, note, pd.DataFrame(rounded, columns=columns, dtype=object), forms)

    @property
    def cells(self) -> list[list[tuple[str, str]]]:
        """Return each row's values and intervals as text."""
        return [[_texts(row, head, form) for head, form in self.forms.items()] for row in self.records]

    @property
    def records(self) -> list[Row]:
        """Return the rows as JSON values, None where there is nothing."""
        return [
            {str(name): None if pd.isna(v) else v for name, v in row.items()} for row in self.rows.to_dict("records")
        ]

    @property
    def csv(self) -> str:
        """Return the table as CSV."""
        return str(self.rows.to_csv(index=False, lineterminator="\n"))

    @property
    def markdown(self) -> str:
        """Return the table as Markdown, under its title."""
        heads = [list(self.forms), ["---:" if form else "---" for form in self.forms.values()]]
        rows = [[f"{value} ({interval})" if interval else value for value, interval in row] for row in self.cells]
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in heads + rows]
        return "\n".join([f"### {self.title}\n", *([f"{self.note}\n"] if self.note else []), *body, ""])


def _round(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _texts(row: Row, head: str, form: str) -> tuple[str, str]:
    """Return an entry and its interval as text, with a real minus sign and no sign before nothing."""
    value, low, high = (row.get(name) for name in (head, f"{head} low", f"{head} high"))
    if value is None or isinstance(value, str):
        return value or "\u2013", ""
    if low is None or high is None:
        return _number(value, form), ""
    if form.startswith("+"):  # as many digits as an interval without 0 needs, so that it does not end in one
        digits = int(form[2:-1])
        while digits < 6 and low * high > 0 and not all(float(f"{end:.{digits}f}") for end in (low, high)):
            digits += 1
        form = f"+.{digits}{form[-1]}"
    scale, inner = (100, f"{form.lstrip('+')[:-1]}f") if form.endswith("%") else (1, form)
    return _number(value, form), f"{_number(scale * low, inner)} to {_number(scale * high, inner)}"


def _number(value: float, form: str) -> str:
    text = format(value, form or "g")
    return (text if any(digit in "123456789" for digit in text) else text.lstrip("+-")).replace("-", "\u2212")


def entry(head: str, figure: Sampled | float | None) -> Row:
    """Return a row's part under a heading: the value and, where it was resampled, its interval."""
    if not isinstance(figure, Sampled):
        return {head: figure}
    low, high = figure.interval
    return {head: figure.value, f"{head} low": low, f"{head} high": high}


def variant_table(
    view: View,
    name: str,
    title: str,
    note: str,
    figure: Callable[[str, str], Sampled | float | None],
    form: str = ".2f",
    variants: Sequence[str] | None = None,
    extra: Mapping[str, tuple[str, Callable[[str], Any]]] | None = None,
) -> Table:
    """Return a row per variant with `figure(variant, task)` per task and their mean; no empty rows or columns.

    `extra` adds columns: by heading the format, and the entry of a variant.
    """
    values = {one: {task: figure(one, task) for task in view.tasks} for one in variants or view.variants()}
    values = {one: by_task for one, by_task in values.items() if any(v is not None for v in by_task.values())}
    tasks = [task for task in view.tasks if any(by_task[task] is not None for by_task in values.values())]
    heads = {task: view.tasks[task] for task in tasks} | ({"": MEAN} if len(tasks) > 1 else {})
    rows = []
    for one, by_task in values.items():
        row: Row = {"variant": one} | {head: of(one) for head, (_, of) in (extra or {}).items()}
        for task, head in heads.items():
            row |= entry(head, by_task[task] if task else mean_over([by_task[task] for task in tasks]))
        rows.append(row)
    forms = (
        {"variant": ""}
        | {head: kind for head, (kind, _) in (extra or {}).items()}
        | dict.fromkeys(heads.values(), form)
    )
    return Table.of(f"{name}-{view.slug}", f"{title}: {view.name}", note, rows, forms)


# ---- pictures


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure and its words; `name` is that of its file."""

    name: str
    title: str
    caption: str
    figure: Figure

    @cached_property
    def png(self) -> bytes:
        """Return the picture's file, the same bytes each time."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        return file.getvalue()

    @property
    def source(self) -> str:
        """Return the picture as the source of an image within the page."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def panels(
    titles: Sequence[str], width: float, height: float, margin: float = 0.6, num_columns: int | None = None
) -> tuple[Figure, dict[str, Any]]:
    """Return a figure and its axes by title, row by row (default: one row); the sizes are a panel's, in inches."""
    num_columns = num_columns or len(titles)
    num_rows = math.ceil(len(titles) / num_columns)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(margin + width * num_columns, height * num_rows), layout="constrained")
        axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).ravel()
        for title, axis in zip(titles, axes, strict=False):
            axis.set_title(title)
            axis.tick_params(length=0)
    return figure, dict(zip(titles, axes, strict=False))


def dots(table: Table, caption: str, label: str, reference: float | None = None) -> Picture:
    """Return a picture of a table's numbers: a line per row, a panel per column, with intervals where there are any."""
    first, *columns = [head for head, form in table.forms.items() if form or head == next(iter(table.forms))]
    rows = table.records
    figure, axes = panels(columns, 1.9, 0.9 + 0.24 * len(rows), 0.3 + 0.07 * max(len(row[first]) for row in rows))
    for head, axis in axes.items():
        for place, row in enumerate(rows):
            if row[head] is not None:
                axis.plot([row.get(f"{head} {end}") or row[head] for end in ("low", "high")], [place] * 2, COLOURS[0])
                axis.plot(row[head], place, "o", color=COLOURS[0], markersize=4.5)
        axis.set(yticks=range(len(rows)), yticklabels=[row[first] for row in rows], xlabel=label)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.locator_params(axis="x", nbins=3)
        if reference is not None:
            axis.axvline(reference, color="#6b7280", linestyle="--", linewidth=1)
    return Picture(table.name, table.title, caption, figure)


def lines(table: Table, caption: str, marks: Mapping[str, Mapping[str, pd.Series]], x: str, y: str) -> Picture:
    """Return a picture of lines, by panel and name: values `y` over an index `x`."""
    figure, axes = panels(list(marks), max(2.6, 5.4 / len(marks)), 3.8)
    names = list(dict.fromkeys(name for series in marks.values() for name in series))
    handles = {}
    for panel, axis in axes.items():
        axis.set_xlabel(x)
        for name, series in marks[panel].items():
            turn, place = divmod(names.index(name), len(COLOURS))
            style = {"color": COLOURS[place], "linestyle": ("-", "--", ":")[turn % 3], "marker": "os^D"[place % 4]}
            handles[name] = axis.plot(series.index, series, markersize=4, linewidth=1.4, **style)[0]
    next(iter(axes.values())).set_ylabel(y)
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=max(len(marks), 2), frameon=False)
    return Picture(table.name, table.title, caption, figure)


def shares(table: Table, heads: Sequence[str]) -> Picture:
    """Return a picture of stacked bars, a bar per row of the table and a part per heading."""
    rows = table.rows.set_index(table.rows["task"] + ", " + table.rows["variant"])[list(heads)].fillna(0).astype(float)
    figure, axes = panels([""], 7.5, 1.1 + 0.22 * len(rows))
    rows.iloc[::-1].plot.barh(stacked=True, ax=axes[""], color=COLOURS, legend=False, width=0.75, xlim=(0, 1))
    figure.legend(loc="outside upper left", ncols=6, frameon=False)
    return Picture(table.name, table.title, "", figure)
