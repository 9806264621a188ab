"""A batch of questions, answered by one variant: turn after turn, each after the variant's own answers before it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..decode.plain import plain_generate
from ..sampling import SamplingParams
from .prompting import Prompter, padded
from .steps import RowSteps, Signals, analyse, sum_signals

if TYPE_CHECKING:
    from ..decode.decoder import SpeculativeDecoder
    from ..decode.state import StepEvent
    from ..target.model import TargetModel
    from .tasks import Question
    from .variants import Variant


@dataclass(frozen=True)
class Contestant:
    """A variant and what decodes it: None is plain decoding."""

    variant: Variant
    decoder: SpeculativeDecoder | None

    @property
    def proposers(self) -> tuple[str, ...]:
        """Names of all that propose nodes, in the order of the bits of a node's proposers."""
        return self.decoder.proposers if self.decoder else ()


@dataclass(frozen=True)
class Turn:
    """An answer, and how it came about."""

    prompt_length: int  # tokens
    tokens: list[int]
    text: str
    finish_reason: str
    seconds: float  # of the whole batch
    steps: RowSteps


@dataclass
class Answer:
    """What one question got."""

    turns: list[Turn] = field(default_factory=list)
    signals: dict[str, Any] = field(default_factory=dict)  # of all turns; see `steps.Signals`


@dataclass(frozen=True)
class Answering:
    """How questions are answered, by whatever variant."""

    target: TargetModel
    prompter: Prompter
    max_new_tokens: int
    end_tokens: Sequence[int]  # of `end_tokens`

    def answer(
        self, contestant: Contestant, questions: Sequence[Question], seeds: Sequence[int], temperature: float
    ) -> list[Answer]:
        """The answers to a batch of questions of equally many turns, each with its own noise."""
        answers = [Answer() for _ in questions]
        sampling = SamplingParams(temperature, seed=list(seeds))
        found: list[Signals] = []
        for _ in questions[0].turns:
            said = [[turn.text for turn in answer.turns] for answer in answers]
            prompts = [self.prompter.encode(*asked) for asked in zip(questions, said, strict=True)]
            found += self._turn(contestant, prompts, sampling, answers)
        if found:
            for answer, told in zip(answers, sum_signals(found).to_dicts(contestant.proposers), strict=True):
                answer.signals = told
        return answers

    def _turn(
        self, contestant: Contestant, prompts: list[list[int]], sampling: SamplingParams, answers: list[Answer]
    ) -> list[Signals]:
        """One more turn for each of the answers; its signals, where anything was drafted."""
        arguments = {**padded(prompts), "sampling": sampling, "max_new_tokens": self.max_new_tokens}
        arguments |= {"eos_token_id": self.end_tokens, "tokenizer": self.prompter.tokenizer, "num_return_sequences": 1}
        self._wait()
        started = time.perf_counter()
        tokens, reasons, events = self._generate(contestant.decoder, arguments)
        self._wait()
        seconds = time.perf_counter() - started
        signals: list[Signals] = []
        if contestant.decoder is None:
            steps = [RowSteps.plain(len(row)) for row in tokens]
        else:
            steps, found = analyse(events, len(prompts), len(contestant.proposers))
            signals.append(found)
        for answer, prompt, row, reason, taken in zip(answers, prompts, tokens, reasons, steps, strict=True):
            text = self.prompter.decode(row)
            answer.turns.append(Turn(len(prompt), row, text, reason, seconds, taken))
        return signals

    def _generate(
        self, decoder: SpeculativeDecoder | None, arguments: dict[str, Any]
    ) -> tuple[list[list[int]], list[str], list[StepEvent]]:
        """New tokens, finish reasons and what happened in each step, which is looked at later."""
        if decoder is None:
            plain = plain_generate(self.target, **arguments)
            return plain.new_tokens, plain.finish_reasons, []
        events, stream = [], decoder.stream(**arguments)
        while True:
            try:
                events.append(next(stream))
            except StopIteration as end:
                return end.value.new_tokens, end.value.finish_reasons, events

    def _wait(self) -> None:
        """Until the device has done what it was given: the clock counts work, not orders."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
