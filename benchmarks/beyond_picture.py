"""The picture of `bench_beyond.py`: acceptance against nodes, and the compositions by domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beyond_cells import REJECTION, SWITCHING
from beyond_figures import MIXTURE, WAYS, Figures, Panel

LINES = {
    "coupled": {"color": "#0b7fab", "marker": "o"},
    REJECTION: {"color": "#c77700", "marker": "s"},
    "topk": {"color": "#b5338a", "marker": "^"},
}
SHOWN = {
    "best single there": "0.3",
    "evidence": "#0b7fab",
    "merged, 60 nodes, evidence": "#2f7d32",
    "merged, 60 nodes": "#c77700",
    "confidence": "#b5338a",
}


def draw(figures: Figures, path: Path) -> None:
    """One row of panels for one drafter, one for several."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    domains, temperatures, _, _ = figures.axes()
    over = [(domain, temperature) for domain in domains for temperature in temperatures]
    panels = [(panel, temperature) for panel in figures.panels()[-1:] for temperature in panel.temperatures]
    rows = [row for row in (over, panels) if row]
    if not rows:
        return
    figure = plt.figure(figsize=(12, 4.2 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        axes = part.subplots(1, len(row), sharey=True, squeeze=False)[0]
        for ax, what in zip(axes, row, strict=True):
            if row is over:
                _draw_nodes(ax, figures, *what)
            else:
                _draw_domains(ax, figures, *what)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.25)
            ax.set_axisbelow(True)
        axes[0].set_ylabel("acceptance length")
        part.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _draw_nodes(ax: Any, figures: Figures, domain: str, temperature: float) -> None:
    nodes = figures.axes()[2]
    for how, style in LINES.items():
        lengths = [figures.single(domain, temperature, count, how).length for count in nodes]
        ax.plot(nodes, lengths, label={"topk": "top-k"}.get(how, how), **style)
    greedy = [figures.single(domain, 0.0, count, "coupled").length for count in nodes]
    ax.plot(nodes, greedy, label="T = 0", color="0.4", linestyle="--")
    ax.set(title=f"{domain}, T = {temperature:g}", xlabel="nodes", xscale="log")
    ax.set_xticks(nodes, [str(count) for count in nodes])
    ax.minorticks_off()


def _draw_domains(ax: Any, figures: Figures, panel: Panel, temperature: float) -> None:
    columns = [*figures.domains[panel.world], MIXTURE, *([SWITCHING] if figures.switches(panel) else [])]
    width = 0.8 / len(SHOWN)
    for place, (name, colour) in enumerate(SHOWN.items()):
        found = [
            figures.composed(panel, column, temperature, **WAYS[name])
            if name in WAYS
            else figures.matched(panel, column, temperature)
            for column in columns
        ]
        at = [index + (place - (len(SHOWN) - 1) / 2) * width for index in range(len(columns))]
        ax.bar(at, [sample.length for sample in found], width, label=name, color=colour)
    ax.set_xticks(range(len(columns)), columns)
    ax.set(title=f"{panel.title}, T = {temperature:g}")
