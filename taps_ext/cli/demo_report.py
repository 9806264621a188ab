"""The demonstration's files: the figures as JSON, and a picture of how far into a draft the target agrees."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..checkpoints.files import json_text, write_text, write_whole
from .demo import CONTROL, MERGED, Cell, DemoResult

MIN_STEPS_SHOWN = 10  # a share over fewer steps is noise, and stays out of the picture


def save(result: DemoResult, folder: Path) -> list[Path]:
    """The files written: `demo.json` and `acceptance_by_depth.png`. A reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    figures, picture = folder / "demo.json", folder / "acceptance_by_depth.png"
    write_text(figures, json_text(result.to_dict()) + "\n")
    write_whole(picture, [draw_acceptance_by_depth(result)])
    return [figures, picture]


def draw_acceptance_by_depth(result: DemoResult) -> bytes:
    """A PNG: a panel a domain, a line a variant, the share of drafts accepted at each depth given the one before."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"the picture needs {error.name}: pip install 'taps_ext[cli]'") from error

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, len(result.domains), sharey=True, squeeze=False)[0]
    for panel, domain in zip(axes, result.domains, strict=True):
        for variant, style in _line_styles(result).items():
            cell = result.cell(variant, domain)
            shares = _shown_shares(cell)
            panel.plot(range(1, len(shares) + 1), shares, label=variant, **style)
        panel.set(title=f"{domain} prompts", xlabel="depth in the draft tree", ylim=(0, 1.03))
        panel.set_xticks(range(1, result.settings.shape.depth + 1))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accepted, given the depth before was")
    figure.suptitle("How far into a draft the target agrees")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _shown_shares(cell: Cell) -> list[float]:
    """The shares down to the last depth that enough steps reached."""
    num_reached, shown = float(cell.num_steps), []
    for share in cell.acceptance_by_depth:
        if num_reached < MIN_STEPS_SHOWN:
            break
        shown.append(share)
        num_reached *= share
    return shown


def _line_styles(result: DemoResult) -> dict[str, dict[str, Any]]:
    """Colours by kind: the specialists solid and bright, the compositions dashed, the headline a band."""
    styles: dict[str, dict[str, Any]] = {}
    colours = iter(["#0b7fab", "#b5338a", "#2f7d32", "#c77700", "#6a51a3", "#8c564b"])
    for variant in result.variants():
        if variant == MERGED:
            styles[variant] = {"color": "0.8", "linewidth": 8, "zorder": 1}  # a band under the lines that it follows
        elif variant == CONTROL:
            styles[variant] = {"color": "0.45", "linestyle": ":", "marker": "s", "markersize": 4}
        else:
            is_single = variant.startswith("single")
            dashes = "-" if is_single else "--"
            styles[variant] = {"color": next(colours, "0.6"), "linestyle": dashes, "marker": "o", "markersize": 4}
    return styles
