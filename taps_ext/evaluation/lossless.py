"""Whether speculation leaves the target's text as it is: three checks on one's own target, drafters and compositions.

Greedy texts must equal plain decoding's; so must texts drawn with the same noise; and the first tokens of many draws
must come as often as the target's own probabilities say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..composition import COMPOSITIONS
from ..decoder import SpeculativeDecoder
from ..drafters import Drafter
from ..plain_generation import plain_generate
from ..sampling import SamplingParams
from ..stats import DecodeStats
from ..target import TargetModel
from ..tree import TreeShape
from .divergence import Batch, Divergence, ListeningTarget, find_divergences
from .frequencies import LEAST_COUNT, ChiSquare, chi_square, common_beginnings

PLAIN = "plain"
TEMPERATURES = (0.0, 0.5, 1.0)
SIGNIFICANCE = 1e-6  # a p-value below it does not happen by chance, in however many rows of a table
SMALL = TreeShape(depth=2, branching=4, max_nodes=12)  # for draws of a few tokens; three need no deeper tree

Way = Mapping[str, Any]  # arguments of SpeculativeDecoder: composition, drafter, max_nodes, drafting, ...
Report = Callable[[str], None]  # told what was done, once a unit of `count_units`


@dataclass(frozen=True)
class LosslessSettings:
    """How much is checked."""

    temperatures: tuple[float, ...] = TEMPERATURES
    max_new_tokens: int = 32  # of the longest rows; those beside them end sooner
    batch_size: int = 8
    num_draws: int = 1000  # for the frequencies, at the highest temperature; 0 leaves them out
    num_first_tokens: int = 3
    draws_together: int = 64
    seed: int = 0
    shape: TreeShape = field(default_factory=TreeShape)

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("num_draws", 0), ("draws_together", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"give one or more different temperatures, got {list(self.temperatures)}")
        for temperature in self.temperatures:
            SamplingParams(temperature)

    @property
    def draws(self) -> bool:
        """Whether frequencies are compared."""
        return self.num_draws > 0 and max(self.temperatures) > 0


@dataclass(frozen=True)
class TextCheck:
    """A way's texts at one temperature beside the plain ones."""

    way: str
    temperature: float
    num_texts: int
    acceptance_length: float
    divergences: list[Divergence]

    @property
    def verdict(self) -> str:
        """equal, near-ties or different."""
        if not self.divergences:
            return "equal"
        return "near-ties" if all(one.is_near_tie for one in self.divergences) else "different"


@dataclass(frozen=True)
class FrequencyCheck:
    """The first tokens of a way's draws beside the target's probabilities."""

    way: str
    temperature: float
    num_draws: int
    test: ChiSquare

    @property
    def verdict(self) -> str:
        """as expected or not as expected."""
        return "as expected" if self.test.p_value >= SIGNIFICANCE else "not as expected"


@dataclass(frozen=True)
class LosslessReport:
    """All that was found."""

    dtype: str
    settings: LosslessSettings
    texts: list[TextCheck]
    frequencies: list[FrequencyCheck]

    @property
    def passed(self) -> bool:
        """Whether nothing was found but equal texts, near-ties and expected frequencies."""
        verdicts = {check.verdict for check in self.texts} | {check.verdict for check in self.frequencies}
        return not verdicts & {"different", "not as expected"}

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.passed:
            return "not lossless"
        if any(check.verdict == "near-ties" for check in self.texts):
            return f"lossless, up to near-ties of {self.dtype}"
        return "lossless"

    @property
    def notes(self) -> list[str]:
        """What takes weight from the verdict."""
        notes = []
        if idle := [one.way for one in self.texts if one.acceptance_length <= 1]:
            notes.append(f"no draft token was accepted by {', '.join(dict.fromkeys(idle))}: equal texts prove little")
        if any(check.test.num_cells < 2 for check in self.frequencies):
            notes.append("the first tokens are all but certain: their frequencies prove nothing; try other prompts")
        if not self.frequencies:
            notes.append("the frequencies of the first tokens were not checked")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        texts = [
            {**asdict(check), "verdict": check.verdict, "divergences": [_as_dict(one) for one in check.divergences]}
            for check in self.texts
        ]
        frequencies = [{**asdict(check), "verdict": check.verdict} for check in self.frequencies]
        head = {"verdict": self.verdict, "passed": self.passed, "notes": self.notes, "dtype": self.dtype}
        return {**head, "settings": asdict(self.settings), "texts": texts, "frequencies": frequencies}


def _as_dict(divergence: Divergence) -> dict[str, Any]:
    return {**asdict(divergence), "is_near_tie": divergence.is_near_tie}


def make_ways(
    drafters: Sequence[str], compositions: Sequence[str] = (), drafting: str = "coupled", max_nodes: int | None = None
) -> dict[str, dict[str, Any]]:
    """The ways of decoding with these compositions, by default with all of them; "single" is one a drafter.

    `max_nodes` is the budget of the merged tree.
    """
    ways: dict[str, dict[str, Any]] = {}
    for name in compositions or COMPOSITIONS:
        if name == "single":
            ways.update({f"single:{one}": {"composition": name, "drafter": one} for one in drafters})
        elif name == "merged" and max_nodes is not None:
            ways[f"merged@{max_nodes}"] = {"composition": name, "max_nodes": max_nodes}
        else:
            ways[name] = {"composition": name}
    return {label: {**way, "drafting": drafting} for label, way in ways.items()}


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
) -> LosslessReport:
    """Decode the prompts (token ids) in every one of the `ways` and plainly, and compare."""
    settings = settings or LosslessSettings()
    if not prompts or not ways:
        raise ValueError("give at least one prompt and one composition")
    listening = ListeningTarget(target if isinstance(target, TargetModel) else TargetModel(target))
    decoders, small = (
        {label: SpeculativeDecoder(listening, drafters, **way, shape=shape) for label, way in ways.items()}
        for shape in (settings.shape, SMALL)
    )
    texts = [
        check
        for temperature in settings.temperatures
        for check in _text_checks(decoders, _batches(prompts, temperature, settings), report)
    ]
    frequencies = list(_frequency_checks(listening, small, prompts, settings, report)) if settings.draws else []
    return LosslessReport(str(listening.model.dtype).removeprefix("torch."), settings, texts, frequencies)


def _batches(prompts: Sequence[Sequence[int]], temperature: float, settings: LosslessSettings) -> list[Batch]:
    """Prompts of different lengths side by side, whose texts end at different lengths."""
    batches = []
    for start in range(0, len(prompts), settings.batch_size):
        rows = prompts[start : start + settings.batch_size]
        width = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
        for row, prompt in enumerate(rows):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        seeds = [settings.seed + start + row for row in range(len(rows))]
        lengths = [max(1, settings.max_new_tokens - 3 * (row % 4)) for row in range(len(rows))]
        batches.append(Batch(ids, mask, temperature, seeds, lengths))
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
    """A check of plain decoding, whose draws are ours too, and one a decoder."""
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
    seeds = [settings.seed + number for number in numbers]
    return Batch(ids, torch.ones_like(ids), temperature, seeds, [settings.num_first_tokens] * len(numbers))
