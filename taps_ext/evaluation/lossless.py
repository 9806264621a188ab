"""Whether speculation leaves the target's text as it is: three checks on one's own target, drafters and compositions.

Greedy texts must equal plain decoding's; so must texts drawn with the same noise; and the first tokens of many draws
must come as often as the target's own probabilities say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..composition import COMPOSITIONS, make_composition
from ..decode.decoder import SpeculativeDecoder
from ..decode.plain import plain_generate
from ..decode.stats import DecodeStats
from ..drafters import Drafter
from ..sampling import row_seed
from ..target.model import TargetModel
from ..tree import TreeShape
from .divergence import Batch, Divergence, ListeningTarget, find_divergences
from .frequencies import LEAST_COUNT, chi_square, common_beginnings
from .lossless_report import FrequencyCheck, LosslessReport, LosslessSettings, TextCheck
from .prompting import padded

PLAIN = "plain"
SMALL = TreeShape(depth=2, branching=4, max_nodes=12)  # for draws of a few tokens; three need no deeper tree

Way = Mapping[str, Any]  # arguments of SpeculativeDecoder: composition, drafter, max_nodes, drafting, ...
Report = Callable[[str], None]  # told what was done, once a unit of `count_units`


def make_ways(
    drafters: Sequence[str],
    compositions: Sequence[str] = (),
    drafting: str = "coupled",
    max_nodes: int | None = None,
    extend: bool = False,
) -> dict[str, dict[str, Any]]:
    """The ways of decoding with these compositions, by default with all of them; "single" is one a drafter.

    `max_nodes` is the budget of the merged tree; `extend` continues the leaves of every tree. ValueError for what no
    decoder takes.
    """
    names = list(compositions or COMPOSITIONS)
    if max_nodes is not None and max_nodes < 1:
        raise ValueError(f"the node budget of the merged tree must be at least 1, got {max_nodes}")
    if max_nodes is not None and "merged" not in names:
        raise ValueError(f"a node budget is for the merged tree, got composition {', '.join(names)}; add merged")
    ways: dict[str, dict[str, Any]] = {}
    for name in names:
        make_composition(name)
        if name == "single":
            ways.update({f"single:{one}": {"composition": name, "drafter": one} for one in drafters})
        elif name == "merged" and max_nodes is not None:
            ways[f"merged@{max_nodes}"] = {"composition": name, "max_nodes": max_nodes}
        else:
            ways[name] = {"composition": name}
    return {label: {**way, "drafting": drafting, "extend": extend} for label, way in ways.items()}


def count_units(ways: Mapping[str, Way], num_prompts: int, settings: LosslessSettings) -> int:
    """How often `check_lossless` reports."""
    num_batches = -(-num_prompts // settings.batch_size)
    return (1 + len(ways)) * (num_batches * len(settings.temperatures) + settings.draws)


def check_lossless(
    target: PreTrainedModel | TargetModel,
    drafters: Mapping[str, Drafter],
    ways: Mapping[str, Way],
    prompts: Sequence[Sequence[int]],
    settings: LosslessSettings | None = None,
    report: Report = lambda done: None,
    end_tokens: Sequence[int] | None = None,
) -> LosslessReport:
    """Decode the prompts (token ids) in every one of the `ways` and plainly, and compare.

    Texts end at `end_tokens`, by default at the EOS tokens of the target's generation config. Everything else in that
    config (penalties, suppressed tokens, filters) is left out: the target's own distributions are compared.
    """
    settings = settings or LosslessSettings()
    if not prompts or not ways:
        raise ValueError("give at least one prompt and one composition")
    listening = ListeningTarget(target if isinstance(target, TargetModel) else TargetModel(target))
    decoders, small = (
        {label: SpeculativeDecoder(listening, drafters, **way, shape=shape) for label, way in ways.items()}
        for shape in (settings.shape, SMALL)
    )
    with _own_distributions(listening.model, end_tokens):
        texts = [
            check
            for temperature in settings.temperatures
            for check in _text_checks(decoders, _batches(prompts, temperature, settings), report)
        ]
        frequencies = list(_frequency_checks(listening, small, prompts, settings, report)) if settings.draws else []
    return LosslessReport(str(listening.model.dtype).removeprefix("torch."), settings, texts, frequencies)


@contextmanager
def _own_distributions(model: PreTrainedModel, end_tokens: Sequence[int] | None) -> Iterator[None]:
    """Give the model a generation config of EOS and padding tokens alone, for a while."""
    before = model.generation_config
    eos = before.eos_token_id if end_tokens is None else list(end_tokens)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=before.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = before


def _batches(prompts: Sequence[Sequence[int]], temperature: float, settings: LosslessSettings) -> list[Batch]:
    """Prompts of different lengths side by side, whose texts end at different lengths."""
    batches = []
    for start in range(0, len(prompts), settings.batch_size):
        rows = prompts[start : start + settings.batch_size]
        seeds = [row_seed(settings.seed, start + row) for row in range(len(rows))]
        lengths = [max(1, settings.max_new_tokens - 3 * (row % 4)) for row in range(len(rows))]
        batches.append(Batch(**padded(rows), temperature=temperature, seeds=seeds, max_new_tokens=lengths))
    return batches


def _text_checks(
    decoders: Mapping[str, SpeculativeDecoder], batches: Sequence[Batch], report: Report
) -> Iterator[TextCheck]:
    """A check a decoder, all at one temperature."""
    target = next(iter(decoders.values())).target
    found: dict[str, list[Divergence]] = {label: [] for label in decoders}
    stats: dict[str, list[DecodeStats]] = {label: [] for label in decoders}
    num_texts = 0
    for batch in batches:
        plain = plain_generate(target, **batch.arguments).new_tokens
        report(PLAIN)
        for label, decoder in decoders.items():
            divergences, figures = find_divergences(decoder, batch, plain)
            found[label] += [one.in_row(num_texts + one.row) for one in divergences]
            stats[label].append(figures)
            report(label)
        num_texts += len(plain)
    for label in decoders:
        acceptance_length = DecodeStats.joined(stats[label]).acceptance_length
        yield TextCheck(label, batches[0].temperature, num_texts, acceptance_length, found[label])


def _frequency_checks(
    target: TargetModel,
    decoders: Mapping[str, SpeculativeDecoder],
    prompts: Sequence[Sequence[int]],
    settings: LosslessSettings,
    report: Report,
) -> Iterator[FrequencyCheck]:
    """A check of plain decoding, whose draws are ours too, and one a decoder.

    All draw with the same seeds, and lossless ones the same texts: a deviation by chance is in every check.
    """
    temperature, num_draws = max(settings.temperatures), settings.num_draws
    prompt = min(prompts, key=len)
    beginnings = common_beginnings(
        target.model,
        prompt,
        temperature,
        settings.num_first_tokens,
        LEAST_COUNT / num_draws,
        settings.draws_together,
    )
    for label, decoder in {PLAIN: None, **decoders}.items():
        texts: list[list[int]] = []
        while len(texts) < num_draws:
            batch = _draws(prompt, temperature, range(len(texts), num_draws)[: settings.draws_together], settings)
            if decoder is None:
                texts += plain_generate(target, **batch.arguments, eos_token_id=()).new_tokens
            else:
                texts += decoder.generate(**batch.arguments, eos_token_id=()).new_tokens
        yield FrequencyCheck(label, temperature, num_draws, chi_square(texts, beginnings))
        report(label)


def _draws(prompt: Sequence[int], temperature: float, numbers: range, settings: LosslessSettings) -> Batch:
    ids = torch.tensor([list(prompt)]).repeat(len(numbers), 1)
    seeds = [row_seed(settings.seed, number) for number in numbers]
    return Batch(ids, torch.ones_like(ids), temperature, seeds, [settings.num_first_tokens] * len(numbers))
