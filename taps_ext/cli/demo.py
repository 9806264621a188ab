"""The demonstration: variants x domains on the embedded models, measured beside plain decoding in the same process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import native, tiny
from ..checkpoints import average_drafters, load_drafter, load_drafters
from ..decode.decoder import SpeculativeDecoder
from ..decode.plain import plain_generate
from ..decode.stats import DecodeStats
from ..drafters import Drafter
from ..sampling import SamplingParams
from ..tree import TreeShape
from .transcript import Span, Transcript, join_spans

MERGED = "merged"
CONTROL = "single, union's size"  # the domain's best single drafter with as many nodes as the union has

Report = Callable[[str], None]  # told what was done, once a step of `count_reports`


@dataclass(frozen=True)
class DemoSettings:
    """What to measure: `prompts` held-out prompts a domain, each continued by up to `max_new_tokens` tokens."""

    prompts: int = 8
    max_new_tokens: int = 96
    temperature: float = 0.0
    seed: int = 0
    device: str = "cpu"
    drafting: str = "coupled"
    shape: TreeShape = field(default_factory=TreeShape)

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Cell:
    """What one variant did on one domain's prompts, in sum."""

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


@dataclass(frozen=True)
class Sample:
    """A text of the merged tree, in spans of equal proposers."""

    domain: str
    prompt: str
    spans: list[Span]


@dataclass(frozen=True)
class DemoResult:
    """All that the demonstration found, and where it ran."""

    settings: DemoSettings
    drafters: list[str]
    domains: list[str]
    num_target_parameters: int
    cells: list[Cell]  # variant by variant within a domain, in the table's order
    samples: list[Sample]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    @property
    def headline(self) -> str:
        """The variant that the demonstration is about."""
        return MERGED

    def variants(self) -> list[str]:
        """The variants' names, in the table's order."""
        return list(dict.fromkeys(cell.variant for cell in self.cells))

    def cell(self, variant: str, domain: str) -> Cell:
        """The cell of that row and column."""
        return next(cell for cell in self.cells if (cell.variant, cell.domain) == (variant, domain))

    @property
    def _place(self) -> str:
        return "one torch thread" if self.settings.device == "cpu" else self.settings.device

    def conclusions(self) -> list[str]:
        """What the figures say, in sentences: first whether the text is the target's, then what it costs here."""
        num_texts = sum(cell.num_prompts for cell in self.cells)
        num_other = num_texts - sum(cell.num_identical for cell in self.cells)
        merged = [self.cell(MERGED, domain) for domain in self.domains]
        speed = sum(cell.tokens_per_second / cell.plain_tokens_per_second for cell in merged) / len(merged)
        forwards = sum(cell.target_forwards_per_token for cell in merged) / len(merged)
        lossless = f"All {num_texts} texts equal plain decoding's, token by token."
        broken = f"{num_other} of {num_texts} texts differ from plain decoding's: a bug, please report it."
        cost = (
            f"The merged tree takes {forwards:.2f} target forwards a token where plain decoding takes 1, "
            f"and runs at {speed:.2f} times its speed ({self._place})."
        )
        why = (
            f"A target of {self.num_target_parameters / 1e6:.1f} million parameters is too small to gain: its "
            "forward costs about as much as a drafter's, and a step drafts several levels. Forwards are what a large "
            "target saves."
        )
        return [broken if num_other else lossless, cost, *([why] if speed < 1 else [])]


def count_reports(settings: DemoSettings) -> int:
    """How often `run` reports: once a prompt and pass; one pass measures the variants, one the fair control."""
    return 2 * len(tiny.DOMAINS) * settings.prompts


def run(settings: DemoSettings, report: Report) -> DemoResult:
    """The whole demonstration on the embedded models, on one torch thread: more only wait for each other here."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(settings, report)
    finally:
        torch.set_num_threads(num_threads)


def _run(settings: DemoSettings, report: Report) -> DemoResult:
    model: Any
    model, tokenizer = tiny.load_target()
    model.to(settings.device)
    paths = {name: str(path) for name, path in tiny.drafter_paths().items()}
    drafters = load_drafters(paths, model)
    variants = _variants(model, drafters, _load_average(list(paths.values()), model), settings)
    cells: list[Cell] = []
    for domain in tiny.DOMAINS:
        prompts = _Prompts.of(domain, tokenizer, settings)
        measured = _measure(model, prompts, variants, settings, report)
        control = {CONTROL: _control(model, drafters, measured, settings)}
        cells += measured + _measure(model, prompts, control, settings, report)
    return DemoResult(
        settings=settings,
        drafters=list(drafters),
        domains=list(tiny.DOMAINS),
        num_target_parameters=sum(parameter.numel() for parameter in model.parameters()),
        cells=cells,
        samples=[_sample(variants[MERGED], tokenizer, domain, settings) for domain in tiny.DOMAINS],
        environment=native.installation().to_dict(),
    )


def _variants(
    model: Any, drafters: Mapping[str, Drafter], average: Drafter, settings: DemoSettings
) -> dict[str, SpeculativeDecoder]:
    """A decoder a row of the table; all share the target and the drafters."""
    shape = settings.shape

    def decoder(composition: str, **options: Any) -> SpeculativeDecoder:
        return SpeculativeDecoder(model, drafters, composition, shape=shape, drafting=settings.drafting, **options)

    budgeted = f"{MERGED}, {shape.max_nodes} nodes"
    return {
        **{_single(name): decoder("single", drafter=name) for name in drafters},
        "averaged weights": SpeculativeDecoder(
            model, {"average": average}, "single", shape=shape, drafting=settings.drafting
        ),
        "confidence": decoder("confidence"),
        "entropy": decoder("entropy"),
        "evidence": decoder("evidence"),
        budgeted: decoder("merged", max_nodes=shape.max_nodes, evidence_decay=0),
        f"{budgeted}, evidence": decoder("merged", max_nodes=shape.max_nodes),
        MERGED: decoder("merged"),
    }


def _single(name: str) -> str:
    return f"single {name}"


def _load_average(paths: Sequence[str], model: Any) -> Drafter:
    """The drafter of averaged weights: the plain alternative to keeping the specialists apart."""
    with tempfile.TemporaryDirectory() as folder:
        average_drafters(paths, None, folder)
        return load_drafter(folder, model)


def _control(
    model: Any, drafters: Mapping[str, Drafter], measured: Sequence[Cell], settings: DemoSettings
) -> SpeculativeDecoder:
    """The fair control: the domain's best single drafter with as many nodes as the union had on average."""
    by_variant = {cell.variant: cell for cell in measured}
    best = max(drafters, key=lambda name: by_variant[_single(name)].acceptance_length)
    num_nodes = round(by_variant[MERGED].nodes_per_step)
    shape = replace(settings.shape, max_nodes=num_nodes)
    return SpeculativeDecoder(model, drafters, "single", drafter=best, shape=shape, drafting=settings.drafting)


@dataclass(frozen=True)
class _Prompts:
    domain: str
    texts: list[str]
    input_ids: list[Tensor]  # each int64 [1, P]
    sampling: list[SamplingParams]

    @classmethod
    def of(cls, domain: str, tokenizer: Any, settings: DemoSettings) -> _Prompts:
        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in tiny.prompts(domain, settings.prompts, settings.seed)
        ]
        return cls(
            domain=domain,
            texts=texts,
            input_ids=[tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts],
            sampling=[SamplingParams(settings.temperature, seed=settings.seed + row) for row in range(len(texts))],
        )


@dataclass
class _Tally:
    """What a variant did so far: its stats by prompt, its time, how many texts were plain decoding's."""

    runs: list[DecodeStats] = field(default_factory=list)
    seconds: float = 0.0
    num_identical: int = 0


def _measure(
    model: Any,
    prompts: _Prompts,
    variants: Mapping[str, SpeculativeDecoder],
    settings: DemoSettings,
    report: Report,
) -> list[Cell]:
    """One cell a variant. Plain decoding and the variants take turns on each prompt, so that the machine's mood
    falls on all of them alike; the first prompt runs once unmeasured."""
    tallies = {name: _Tally() for name in variants}
    plain_seconds, num_tokens = 0.0, 0
    _warm_up(model, prompts, variants)
    for input_ids, sampling in zip(prompts.input_ids, prompts.sampling, strict=True):
        arguments: dict[str, Any] = {"sampling": sampling, "max_new_tokens": settings.max_new_tokens}
        started = time.perf_counter()
        plain = plain_generate(model, input_ids, **arguments)
        plain_seconds += time.perf_counter() - started
        num_tokens += len(plain.new_tokens[0])
        for name, tally in tallies.items():
            started = time.perf_counter()
            out = variants[name].generate(input_ids, **arguments)
            tally.seconds += time.perf_counter() - started
            tally.num_identical += out.new_tokens == plain.new_tokens
            tally.runs.append(out.stats)
        report(prompts.domain)
    return [_cell(name, prompts.domain, tally, num_tokens / plain_seconds) for name, tally in tallies.items()]


def _warm_up(model: Any, prompts: _Prompts, variants: Mapping[str, SpeculativeDecoder]) -> None:
    plain_generate(model, prompts.input_ids[0], max_new_tokens=4)
    for decoder in variants.values():
        decoder.generate(prompts.input_ids[0], max_new_tokens=4)


def _cell(variant: str, domain: str, tally: _Tally, plain_tokens_per_second: float) -> Cell:
    stats = DecodeStats.joined(tally.runs)
    num_tokens = sum(stats.num_tokens)
    return Cell(
        variant=variant,
        domain=domain,
        acceptance_length=stats.acceptance_length,
        target_forwards_per_token=stats.num_target_forwards / num_tokens,
        nodes_per_step=sum(map(sum, stats.num_nodes)) / max(stats.num_steps, 1),
        tokens_per_second=num_tokens / tally.seconds,
        plain_tokens_per_second=plain_tokens_per_second,
        num_identical=tally.num_identical,
        num_prompts=len(tally.runs),
        num_tokens=num_tokens,
        num_steps=stats.num_steps,
        acceptance_by_depth=stats.acceptance_by_depth,
        proposer_share=stats.proposer_share,
    )


def _sample(decoder: SpeculativeDecoder, tokenizer: Any, domain: str, settings: DemoSettings) -> Sample:
    """The first prompt's text as the merged tree decodes it."""
    prompts = _Prompts.of(domain, tokenizer, replace(settings, prompts=1))
    transcript, spans = Transcript(tokenizer), []
    for event in decoder.stream(
        prompts.input_ids[0], sampling=prompts.sampling[0], max_new_tokens=settings.max_new_tokens
    ):
        spans += transcript.add(event.new_tokens[0], event.accepted_proposers[0])
    turns = tiny.prompts(domain, 1, settings.seed)[0]
    question = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    return Sample(domain, question, join_spans(spans + transcript.finish()))
