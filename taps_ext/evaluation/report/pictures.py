"""Pictures as plain data, drawn by matplotlib: dots with intervals, lines, stacked shares, and histograms.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; shape, dash and a direct label say the same.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .statistics import Estimate

INK, QUIET, GRID, PAPER = "#1b1f24", "#6b7280", "#e2e5ea", "#fefefe"  # each used for nothing else: page.py swaps them
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
BROWN, PURPLE = "#7f5f17", "#7a3fb0"
SHARES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)
DOTS_PER_INCH = 110
NAME_GAP = 0.066  # of a panel's height, between the names of lines


@dataclass(frozen=True)
class Style:
    """How a variant looks, in every picture."""

    colour: str = INK
    marker: str = "o"
    dashes: str = "-"

    @property
    def size(self) -> float:
        """Of a marker: a star of the same size looks smaller."""
        return 9.5 if self.marker == "*" else 5.5


@dataclass(frozen=True)
class Line:
    """Points joined by a line, with its name at its end; `low` and `high` make a band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Dot:
    """A figure with its interval, on a row."""

    row: str
    estimate: Estimate
    style: Style


@dataclass(frozen=True)
class Shares:
    """A row of parts that sum to 1."""

    row: str
    parts: dict[str, float]


@dataclass(frozen=True)
class Steps:
    """A histogram: its density over bins between `edges`."""

    name: str
    edges: Sequence[float]
    density: Sequence[float]
    colour: str


Mark = Line | Dot | Shares | Steps


@dataclass(frozen=True)
class Panel:
    """A part of a picture; all its marks are of one kind."""

    title: str
    marks: tuple[Mark, ...]
    reference: float | None = None  # a line to compare with: upright for dots, level for lines


@dataclass(frozen=True)
class Picture:
    """Panels in rows; `name` is that of the files."""

    name: str
    title: str
    caption: str
    panels: tuple[tuple[Panel, ...], ...]
    x: str = ""
    y: str = ""
    ticks: dict[str, float] = field(default_factory=dict)  # of x, by label; none: matplotlib's


def drawable(picture: Picture) -> Picture | None:
    """The picture without panels that have no marks; None if there are no others."""
    rows = [tuple(panel for panel in row if panel.marks) for row in picture.panels]
    panels = tuple(row for row in rows if row)
    return replace(picture, panels=panels) if panels else None


def draw(picture: Picture) -> tuple[bytes, str]:
    """The picture, a `drawable` one, as PNG and as SVG. ValueError, in a sentence, where matplotlib is missing."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"the pictures need {error.name}: pip install 'taps_ext[cli]'") from error

    look: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), INK),
        **dict.fromkeys(("grid.color", "axes.edgecolor", "xtick.color", "ytick.color"), GRID),
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor"), PAPER),
        "axes.facecolor": "none",
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "svg.hashsalt": picture.name,
    }
    with mpl.rc_context(look):
        figure: Any = Figure(figsize=_size(picture), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
        _draw(figure, picture)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
        figure.set_layout_engine("none")  # it stays as it was laid out, which takes as long as drawing
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return png.getvalue(), svg.getvalue()


def _rows(picture: Picture) -> list[str]:
    """The names of the rows of dots or shares, top down."""
    marks = [mark for row in picture.panels for panel in row for mark in panel.marks]
    return list(dict.fromkeys(mark.row for mark in marks if isinstance(mark, (Dot, Shares))))


def _size(picture: Picture) -> tuple[float, float]:
    """Inches: wide enough for the panels and their labels."""
    num_columns = max(map(len, picture.panels))
    if rows := _rows(picture):
        labels = 0.075 * max(map(len, rows))
        height = 0.62 + 0.27 * len(rows) + (0.35 if isinstance(picture.panels[0][0].marks[0], Shares) else 0)
        return max(6.0, labels + 0.5 + 2.1 * num_columns), 0.35 + height * len(picture.panels)
    if isinstance(picture.panels[0][0].marks[0], Steps):
        return max(6.0, 0.5 + 2.5 * num_columns), 0.6 + 1.75 * len(picture.panels)
    names = [mark.name for row in picture.panels for panel in row for mark in panel.marks if isinstance(mark, Line)]
    return max(6.0, 0.6 + 2.5 * num_columns + 0.075 * max(map(len, names), default=0)), 3.5 * len(picture.panels)


def _draw(figure: Any, picture: Picture) -> None:
    num_columns = max(map(len, picture.panels))
    shape = (len(picture.panels), num_columns)
    rows = _rows(picture)
    is_histogram = isinstance(picture.panels[0][0].marks[0], Steps)
    axes = figure.subplots(*shape, squeeze=False, sharex=bool(picture.ticks or rows), sharey=not is_histogram)
    for row, panels in zip(axes, picture.panels, strict=True):
        for number, panel_axes in enumerate(row):
            if number >= len(panels):
                panel_axes.set_axis_off()
                continue
            _draw_panel(panel_axes, panels[number], rows)
            if picture.ticks:
                panel_axes.set_xticks(list(picture.ticks.values()), list(picture.ticks))
        _name_ends(row[len(panels) - 1], [mark for panel in panels for mark in panel.marks if isinstance(mark, Line)])
        if picture.y:
            row[0].set_ylabel(picture.y)
    for panel_axes in axes[-1]:
        panel_axes.set_xlabel(picture.x)
    if rows and not isinstance(picture.panels[0][0].marks[0], Shares):
        return
    _legend(figure, picture)


def _legend(figure: Any, picture: Picture) -> None:
    """Names of shares and histograms; lines and dots have theirs beside them."""
    from matplotlib.patches import Patch

    marks = [mark for row in picture.panels for panel in row for mark in panel.marks]
    shares = list(dict.fromkeys(name for mark in marks if isinstance(mark, Shares) for name in mark.parts))
    colours = dict(zip(shares, SHARES * len(shares), strict=False))
    colours |= {mark.name: mark.colour for mark in marks if isinstance(mark, Steps)}
    if colours:
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=8, frameon=False, handlelength=1, handleheight=1)


def _draw_panel(axes: Any, panel: Panel, rows: Sequence[str]) -> None:
    axes.set_title(panel.title)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x" if rows else "both", linewidth=0.8)
    if rows:
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.4, -0.6)
    if panel.reference is not None:
        line = axes.axvline if rows else axes.axhline
        line(panel.reference, color=QUIET, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    shares = list(dict.fromkeys(name for mark in panel.marks if isinstance(mark, Shares) for name in mark.parts))
    for mark in panel.marks:
        if isinstance(mark, Line):
            _draw_line(axes, mark)
        elif isinstance(mark, Dot):
            _draw_dot(axes, mark, rows.index(mark.row))
        elif isinstance(mark, Shares):
            _draw_shares(axes, mark, rows.index(mark.row), dict(zip(shares, SHARES * len(shares), strict=False)))
        else:
            axes.stairs(mark.density, mark.edges, fill=True, color=mark.colour, alpha=0.22)
            axes.stairs(mark.density, mark.edges, color=mark.colour, linewidth=1.3)
    if any(isinstance(mark, Steps) for mark in panel.marks):
        axes.set_yticks([])
        axes.set_ylim(bottom=0)


def _draw_line(axes: Any, line: Line) -> None:
    style = {"color": line.style.colour, "linestyle": line.style.dashes, "marker": line.style.marker}
    axes.plot(line.x, line.y, **style, markersize=line.style.size - 1, linewidth=1.6)
    if line.low and len(line.x) == 1:
        axes.plot(list(line.x) * 2, [*line.low, *line.high], color=line.style.colour, linewidth=1.2)
    elif line.low:
        axes.fill_between(line.x, line.low, line.high, color=line.style.colour, alpha=0.12, linewidth=0)


def _name_ends(axes: Any, lines: Sequence[Line]) -> None:
    """Each name right of the last panel, level with the end of its last line, or as near as names do not overlap."""
    low, high = axes.get_ylim()
    ends = sorted({line.name: line for line in lines}.values(), key=lambda line: line.y[-1])
    places = spread([(line.y[-1] - low) / (high - low) for line in ends], NAME_GAP)
    for place, line in zip(places, ends, strict=True):
        where = {"xycoords": "axes fraction", "va": "center", "annotation_clip": False}
        axes.annotate(line.name, (1.03, place), color=line.style.colour, **where)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved apart to at least `gap`: first up, then down again where they leave 1 at the top."""
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + gap) if places else height)
    for index in range(len(places) - 1, -1, -1):
        above = places[index + 1] - gap if index + 1 < len(places) else max(1.0, heights[-1])
        places[index] = min(places[index], above)
    return places


def _draw_dot(axes: Any, dot: Dot, row: int) -> None:
    figure = dot.estimate
    axes.plot([figure.low, figure.high], [row, row], color=dot.style.colour, linewidth=1.8, solid_capstyle="round")
    face = PAPER if dot.style.dashes != "-" else dot.style.colour
    axes.plot(
        figure.value, row, dot.style.marker, color=dot.style.colour, markerfacecolor=face, markersize=dot.style.size
    )


def _draw_shares(axes: Any, shares: Shares, row: int, colours: dict[str, str]) -> None:
    left = 0.0
    for name, part in shares.parts.items():
        axes.barh(row, part, left=left, height=0.68, color=colours[name], edgecolor=PAPER, linewidth=1)
        if part >= 0.14:  # wide enough for its label
            axes.text(left + part / 2, row, f"{part:.0%}", ha="center", va="center", color="white", fontsize=8.5)
        left += part
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
