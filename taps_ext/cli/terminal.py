"""How the command line looks: tables, legends, and text coloured by the drafter that proposed it (rich)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..decode.stats import DecodeStats
    from ..native import Gpu, Installation
    from .demo import Cell, DemoResult
    from .transcript import Span

COLOURS = ("bright_cyan", "bright_magenta", "bright_yellow", "bright_blue", "bright_red")
SEVERAL = "bright_green"
HEADINGS = ("acceptance\nlength", "forwards\nper token", "tokens/s\nto plain's", "nodes\na step", "text\nas plain")


class Palette:
    """A colour a drafter, one more for tokens that several proposed; the target's own tokens stay plain."""

    def __init__(self, drafters: Sequence[str]) -> None:
        self._styles = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(drafters)}

    def style(self, proposers: Sequence[str]) -> str:
        """The style of a token with these proposers."""
        if len(proposers) > 1:
            return SEVERAL
        return self._styles[proposers[0]] if proposers else ""

    def text(self, spans: Iterable[Span], has_colours: bool = True) -> Text:
        """The spans in colour; without colours, in brackets that name the drafters."""
        text = Text()
        for span in spans:
            if has_colours or not span.proposers:
                text.append(span.text, style=self.style(span.proposers))
            else:
                text.append(f"[{'+'.join(span.proposers)}:{span.text}]")
        return text

    def legend(self, has_colours: bool = True) -> Text:
        """What the colours, or the brackets, mean."""
        if not has_colours:
            return Text(
                "accepted drafts in brackets, with the drafters that proposed them; the rest is the target's own"
            )
        names = [(name, style) for name, style in self._styles.items()]
        if len(names) > 1:
            names.append(("several" if len(names) > 2 else "both", SEVERAL))
        legend = Text("proposed by ")
        for name, style in names:
            legend.append(name, style=style).append("  ")
        return legend.append("the target's own token")


def has_colours(console: Console) -> bool:
    """Whether what is printed there can be told apart by colour."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def stats_table(stats: DecodeStats, seconds: float) -> Table:
    """The figures of one generation."""
    num_tokens = sum(stats.num_tokens)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("acceptance length", f"{_number(stats.acceptance_length)} tokens a step")
    table.add_row("target forwards", f"{stats.num_target_forwards} for {num_tokens} tokens (prefill included)")
    table.add_row("accepted by depth", "  ".join(f"{share:.0%}" for share in stats.acceptance_by_depth) or "none")
    table.add_row("proposed by", "  ".join(f"{name} {_percent(share)}" for name, share in stats.proposer_share.items()))
    if stats.choice_share:
        table.add_row("chosen", "  ".join(f"{name} {share:.0%}" for name, share in stats.choice_share.items()))
    table.add_row("speed", f"{num_tokens / seconds:.1f} tokens/s, prefill included")
    return table


def demo_report(result: DemoResult, console: Console) -> Group:
    """The table, what to make of it, and the coloured texts."""
    palette, coloured = Palette(result.drafters), has_colours(console)
    parts: list[RenderableType] = [_demo_table(result), Text()]
    parts += [Text(sentence) for sentence in result.conclusions()]
    parts += [Text(), palette.legend(coloured)]
    for sample in result.samples:
        body = Text.assemble((sample.prompt, "dim"), "\n", palette.text(sample.spans, coloured))
        parts.append(Panel(body, title=f"{sample.domain}: as the merged tree decodes it", title_align="left"))
    return Group(*parts)


def _demo_table(result: DemoResult) -> Table:
    """A row a variant; each column holds one figure for every domain, side by side."""
    first = [result.cell(result.variants()[0], domain) for domain in result.domains]
    rows = {"plain decoding": [_plain_figures(cell) for cell in first]}
    for variant in result.variants():
        rows[variant] = [_figures(result.cell(variant, domain)) for domain in result.domains]
    table = Table("\n\nvariant", box=None, padding=(0, 2, 0, 0))
    columns = []
    for index, heading in enumerate(HEADINGS):
        domains, *column = _aligned([result.domains, *([figures[index] for figures in row] for row in rows.values())])
        table.add_column(f"{heading}\n{domains}", no_wrap=True)
        columns.append(column)
    for name, *cells in zip(rows, *columns, strict=True):
        table.add_row(name, *cells, style="bold" if name == result.headline else "")
    return table


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Each row's entries side by side, right-aligned with those of the other rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [" ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True)) for row in rows]


def _plain_figures(cell: Cell) -> list[str]:
    return ["1   ", "1   ", f"{cell.plain_tokens_per_second:.0f}/s", "1", ""]


def _figures(cell: Cell) -> list[str]:
    return [
        _number(cell.acceptance_length),
        f"{cell.target_forwards_per_token:.2f}",
        f"{cell.tokens_per_second / cell.plain_tokens_per_second:.2f}x",
        f"{cell.nodes_per_step:.0f}",
        f"{cell.num_identical}/{cell.num_prompts}",
    ]


def info_table(facts: Installation) -> Table:
    """What `taps-ext info` prints."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("taps_ext", facts.taps_ext)
    table.add_row("python", f"{facts.python} on {facts.platform}")
    for name, version in facts.versions.items():
        table.add_row(name, version or "not installed")
    table.add_row("native module", "available" if facts.native.available else f"not available: {facts.native.reason}")
    for key, value in (facts.native.build or {}).items():
        table.add_row(f"  built: {key}", value)
    decision = "built" if facts.cuda.ops_built else "not built"
    table.add_row("CUDA ops", f"{decision}: {facts.cuda.reason}")
    table.add_row("CUDA in torch", facts.cuda.torch_cuda or "none")
    table.add_row("GPUs", "\n".join(map(_gpu_text, facts.cuda.gpus)) or "none visible")
    table.add_row("threads", f"{facts.num_threads} of torch, {facts.num_cpus} CPUs")
    return table


def _gpu_text(gpu: Gpu) -> str:
    return f"{gpu.name} ({gpu.capability})" + ("" if gpu.has_kernels else ": no CUDA ops were built for it")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"
