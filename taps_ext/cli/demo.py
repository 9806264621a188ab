"""taps-ext demo: every composition on the embedded models, beside plain decoding in the same process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .. import native, tiny
from ..checkpoints import average_drafters, load_drafter, load_drafters
from ..checkpoints.files import check_writable, json_text, write_text
from ..decode.decoder import SpeculativeDecoder, check_drafting
from ..decode.plain import plain_generate
from ..decode.stats import DecodeStats
from ..drafters import Drafter
from ..native import choose_device
from ..sampling import SamplingParams, row_seed
from ..tree import TreeShape
from . import terminal
from .terminal import Palette, Span, Transcript, join_spans, number

PLAIN, MERGED = "plain decoding", "merged"
SINGLE = "single "  # begins the names of the variants with one drafter
CONTROL = "single, union's size"  # the domain's best single drafter with as many nodes as the union has on average
Tell = Callable[[str], None]  # called with the domain after each prompt, once for the variants, once for the control


def demo(
    limit: terminal.Limit[int] = 8,
    max_new_tokens: terminal.MaxNewTokens = 96,
    temperature: terminal.Temperature = 0.0,
    seed: terminal.Seed = 0,
    drafting: terminal.Drafting = "coupled",
    device: terminal.Device = None,
    output: terminal.Output[Path] = Path("out/demo"),
    as_json: terminal.AsJson = False,
) -> None:
    """Decode with two specialist drafters and every composition of them, beside plain decoding.

    The models are the embedded ones. All figures go to demo.json in the --output directory.
    """
    SamplingParams(temperature, seed=seed)  # checks both before the models are loaded
    check_writable(output)
    place, drafting = str(choose_device(device)), check_drafting(drafting)
    settings = DemoSettings(limit, max_new_tokens, temperature, seed, place, drafting)
    done, total = count(1), 2 * len(tiny.DOMAINS) * limit
    with terminal.progress() as update, one_thread():
        result = run(settings, lambda domain: update(f"{domain} prompts", next(done), total))
    facts, file = asdict(result), output / "demo.json"
    output.mkdir(parents=True, exist_ok=True)
    write_text(file, json_text(facts) + "\n")
    terminal.show(as_json, facts, *_page(result), f"wrote {file}")


# ---- what is measured


@dataclass(frozen=True)
class DemoSettings:
    """What to measure: `prompts` held-out prompts per domain, each continued by up to `max_new_tokens` tokens."""

    prompts: int
    max_new_tokens: int
    temperature: float
    seed: int
    device: str
    drafting: str
    shape: TreeShape = field(default_factory=TreeShape)


@dataclass(frozen=True)
class Cell:
    """The figures of one variant over one domain's prompts."""

    variant: str
    domain: str
    acceptance_length: float
    target_forwards_per_token: float
    nodes_per_step: float  # that the target scored, root included
    tokens_per_second: float
    plain_tokens_per_second: float  # of plain decoding, whose runs alternate with this variant's
    num_identical: int  # prompts whose text equals plain decoding's
    num_prompts: int
    num_tokens: int
    num_steps: int
    acceptance_by_depth: list[float]  # entry d - 1: of the steps that accepted depth d - 1, the share that accepted d
    proposer_share: dict[str, float]

    @property
    def speedup(self) -> float:
        """Tokens per second, divided by plain decoding's."""
        return self.tokens_per_second / self.plain_tokens_per_second


@dataclass(frozen=True)
class DemoResult:
    """All figures of the demo, and where it ran."""

    settings: DemoSettings
    drafters: list[str]
    domains: list[str]
    num_target_parameters: int
    cells: list[Cell]  # variant by variant within a domain, in the table's order
    samples: list[dict[str, Any]]  # a text of the merged tree per domain: domain, prompt, spans
    environment: dict[str, Any]


@contextmanager
def one_thread() -> Iterator[None]:
    """Give torch one thread: on models of this size more threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def run(settings: DemoSettings, tell: Tell) -> DemoResult:
    """Run the whole demo."""
    model: Any
    model, tokenizer = tiny.load_target()
    model.to(settings.device)
    drafters = load_drafters({name: str(path) for name, path in tiny.drafter_paths().items()}, model)
    decoder = partial(SpeculativeDecoder, model, shape=settings.shape, drafting=settings.drafting)
    variants = _variants(decoder, drafters, settings.shape.max_nodes)
    cells, samples = list[Cell](), []
    for domain in tiny.DOMAINS:
        prompts = _prompts(domain, tokenizer, settings)
        measured = _measure(model, domain, prompts, variants, tell)
        shape = replace(settings.shape, max_nodes=round(measured[-1].nodes_per_step))  # the last is the union
        best = max(measured[: len(drafters)], key=lambda cell: cell.acceptance_length)  # the first are single drafters
        control = decoder(drafters, "single", drafter=best.variant.removeprefix(SINGLE), shape=shape)
        cells += [*measured, *_measure(model, domain, prompts, {CONTROL: control}, tell)]
        turns = tiny.prompts(domain, 1, settings.seed)[0]
        question = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        transcript, spans = Transcript(tokenizer), list[Span]()
        for event in variants[MERGED].stream(**prompts[0]):
            spans += transcript.add(event.new_tokens[0], event.accepted_proposers[0])
        samples.append({"domain": domain, "prompt": question, "spans": join_spans(spans + transcript.finish())})
    environment = native.installation().to_dict()
    return DemoResult(settings, [*drafters], [*tiny.DOMAINS], model.num_parameters(), cells, samples, environment)


def _variants(
    decoder: partial[SpeculativeDecoder], drafters: Mapping[str, Drafter], max_nodes: int
) -> dict[str, SpeculativeDecoder]:
    """Return a decoder per row of the table; all share the target and the drafters."""
    with tempfile.TemporaryDirectory() as folder:  # averaged weights: the plain alternative to several drafters
        average_drafters(list(tiny.drafter_paths().values()), None, folder)
        average = load_drafter(folder, *decoder.args)
    budgeted = f"{MERGED}, {max_nodes} nodes"
    return {
        **{f"{SINGLE}{name}": decoder(drafters, "single", drafter=name) for name in drafters},
        "averaged weights": decoder({"average": average}, "single", drafting="topk"),  # it has no calibration
        **{name: decoder(drafters, name) for name in ("confidence", "entropy", "evidence")},
        f"{budgeted}, no evidence": decoder(drafters, "merged", max_nodes=max_nodes, evidence_decay=0),
        budgeted: decoder(drafters, "merged", max_nodes=max_nodes),
        MERGED: decoder(drafters, "merged"),
    }


def _prompts(domain: str, tokenizer: Any, settings: DemoSettings) -> list[dict[str, Any]]:
    """Return the arguments of `generate` per prompt."""
    prompts = []
    for row, turns in enumerate(tiny.prompts(domain, settings.prompts, settings.seed)):
        input_ids = terminal.encode(tokenizer, turns)["input_ids"]
        sampling = SamplingParams(settings.temperature, seed=row_seed(settings.seed, row))
        prompts.append({"input_ids": input_ids, "sampling": sampling, "max_new_tokens": settings.max_new_tokens})
    return prompts


def _measure(
    model: Any, domain: str, prompts: Sequence[dict[str, Any]], variants: Mapping[str, SpeculativeDecoder], tell: Tell
) -> list[Cell]:
    """Return one cell per variant.

    Plain decoding and the variants take turns on each prompt, so that load on the machine affects all of them equally.
    The first prompt runs once before, unmeasured.
    """
    ways: dict[str, Callable[..., Any]] = {PLAIN: partial(plain_generate, model)}
    ways |= {name: decoder.generate for name, decoder in variants.items()}
    for generate in ways.values():
        generate(prompts[0]["input_ids"], max_new_tokens=4)
    runs: dict[str, list[tuple[Any, float]]] = {name: [] for name in ways}
    for prompt in prompts:
        for name, generate in ways.items():
            started = time.perf_counter()
            out = generate(**prompt)
            runs[name].append((out, time.perf_counter() - started))
        tell(domain)
    return [_cell(name, domain, runs[name], runs[PLAIN]) for name in variants]


def _cell(variant: str, domain: str, runs: Sequence[tuple[Any, float]], plain: Sequence[tuple[Any, float]]) -> Cell:
    stats = DecodeStats.joined([out.stats for out, _ in runs])
    num_tokens = sum(stats.num_tokens)
    return Cell(
        variant=variant,
        domain=domain,
        acceptance_length=stats.acceptance_length,
        target_forwards_per_token=stats.num_target_forwards / num_tokens,
        nodes_per_step=sum(map(sum, stats.num_nodes)) / max(stats.num_steps, 1),
        tokens_per_second=_speed(runs),
        plain_tokens_per_second=_speed(plain),
        num_identical=sum(own.new_tokens == other.new_tokens for (own, _), (other, _) in zip(runs, plain, strict=True)),
        num_prompts=len(runs),
        num_tokens=num_tokens,
        num_steps=stats.num_steps,
        acceptance_by_depth=stats.acceptance_by_depth,
        proposer_share=stats.proposer_share,
    )


def _speed(runs: Sequence[tuple[Any, float]]) -> float:
    return sum(len(out.new_tokens[0]) for out, _ in runs) / sum(seconds for _, seconds in runs)


# ---- what is shown


def _page(result: DemoResult) -> list[Any]:
    """Return the table, the conclusions, and the coloured texts with their legend."""
    palette, coloured = Palette(result.drafters), terminal.has_colours(Console())
    parts = [_table(result), "", Group(*map(Text, _conclusions(result))), "", palette.legend(coloured)]
    for sample in result.samples:
        body = Text.assemble((sample["prompt"], "dim"), "\n", palette.text(sample["spans"], coloured))
        title = f"{sample['domain']}: the merged tree's text"
        parts.append(Panel(body, title=title, title_align="left", width=100))
    return parts


def _conclusions(result: DemoResult) -> list[str]:
    """Return in sentences whether the texts are the target's, and what they cost on this machine."""
    num_texts = sum(cell.num_prompts for cell in result.cells)
    num_other = num_texts - sum(cell.num_identical for cell in result.cells)
    merged = [cell for cell in result.cells if cell.variant == MERGED]
    speed = mean(cell.speedup for cell in merged)
    forwards = mean(cell.target_forwards_per_token for cell in merged)
    place = "one torch thread" if result.settings.device == "cpu" else result.settings.device
    sentences = [
        f"{num_other} of {num_texts} texts differ from plain decoding's: a bug, please report it."
        if num_other
        else f"All {num_texts} texts equal plain decoding's, token by token.",
        f"The merged tree runs at {speed:.2f} times the speed of plain decoding ({place}) and takes {forwards:.2f} "
        "target forwards per token, where plain decoding takes 1.",
    ]
    if speed < 1:
        sentences.append(
            f"A target of {result.num_target_parameters / 1e6:.1f} million parameters is too small to gain: its "
            "forward costs about as much as a drafter's, and a step drafts several levels. With a large target, saved "
            "forwards are saved time."
        )
    return sentences


def _table(result: DemoResult) -> Table:
    """Return a row per variant; each column holds one figure for every domain, side by side."""
    rows: dict[str, list[Cell]] = {PLAIN: []}
    for cell in result.cells:
        rows.setdefault(cell.variant, []).append(cell)
    ones = {"acceptance_length": 1, "target_forwards_per_token": 1, "nodes_per_step": 1}
    for cell in rows[MERGED]:
        plain: dict[str, Any] = {**ones, "num_identical": cell.num_prompts}
        rows[PLAIN].append(replace(cell, tokens_per_second=cell.plain_tokens_per_second, **plain))
    table = Table("\n\nvariant", box=None, padding=(0, 1, 0, 0))  # 80 columns
    for heading, width, _ in COLUMNS:
        table.add_column(f"{heading}\n{' '.join(f'{domain:>{width}}' for domain in result.domains)}", no_wrap=True)
    for name, cells in rows.items():
        entries = (" ".join(f"{figure(cell):>{width}}" for cell in cells) for _, width, figure in COLUMNS)
        table.add_row(name, *entries, style="bold" if name == MERGED else "")
    return table


# headings, the width of a figure, and the figure of a cell
COLUMNS: tuple[tuple[str, int, Callable[[Cell], str]], ...] = (
    ("tokens/s and\ntimes plain's", 10, lambda cell: f"{cell.tokens_per_second:.0f} {cell.speedup:.2f}x"),
    ("acceptance\nlength", 4, lambda cell: number(cell.acceptance_length)),
    ("forwards\nper token", 4, lambda cell: f"{cell.target_forwards_per_token:.2f}"),
    ("nodes\nper step", 4, lambda cell: f"{cell.nodes_per_step:.0f}"),
    ("equal\ntexts", 4, lambda cell: f"{cell.num_identical}/{cell.num_prompts}"),
)
