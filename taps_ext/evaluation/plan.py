"""What an evaluation is to do, as far as it is known before the target is loaded; and in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ..decode.budget import CostTable
from ..sampling import NOISE, SamplingParams
from ..tree import TreeShape
from .results import COSTS
from .tasks import TASKS, Question
from .variants import Variant


@dataclass(frozen=True)
class Settings:
    """What holds for every variant."""

    max_new_tokens: int = 64
    batch_size: int = 8  # questions that are decoded together
    depth: int = 6
    branching: int = 10
    max_nodes: int = 60  # of a drafter's tree, root included, where a variant says no other number
    seed: int = 0  # question i of a task is drawn with the noise of row_seed(seed, i)
    system_prompt: str = ""  # put before conversations that bring none
    extend: bool = False  # whether every variant continues its trees' leaves with the row's own text

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 2), ("batch_size", 1)):  # the first token is no decode step's
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        TreeShape(self.depth, self.branching, self.max_nodes)


@dataclass(frozen=True)
class Plan:
    """What an evaluation is to do: all that can be known before the target is loaded."""

    tasks: Mapping[str, Sequence[Question]]
    variants: Sequence[Variant]
    temperatures: Sequence[float]
    settings: Settings
    drafters: Mapping[str, Any]  # which they are: `contestants.drafter_facts`
    sources: Mapping[str, str]  # of the tasks' questions
    label: str = ""
    costs: CostTable | None = None  # of variants that adapt; None: of the run that goes on, or measured

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks.values()):
            raise ValueError("an evaluation needs a task with questions")
        if [one.is_plain for one in self.variants] != [True] + [False] * (len(self.variants) - 1):
            raise ValueError("an evaluation needs plain decoding, first and once, to compare texts and speed with")
        self._check_costs()
        if not self.temperatures:
            raise ValueError("an evaluation needs a temperature")
        SamplingParams(tuple(self.temperatures))
        SamplingParams(seed=self.settings.seed)
        for name, questions in self.tasks.items():
            ids = [question.id for question in questions]
            if repeated := [one for one in ids if ids.count(one) > 1]:
                raise ValueError(f"the task {name!r} has the question id {repeated[0]!r} twice; ids tell answers apart")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"a temperature is given twice: {', '.join(map(str, self.temperatures))}")

    def _check_costs(self) -> None:
        if self.costs is None:
            return
        drafting = {name for variant in self.variants if variant.adapts for name in variant.drafting_names}
        if not drafting:
            raise ValueError("a table of costs is for variants that adapt; give one, such as merged,auto")
        if missing := sorted(drafting - self.costs.draft_ms.keys()):
            raise ValueError(f"the table of costs lacks drafter {missing[0]!r}; give one measured with these drafters")

    @property
    def adapts(self) -> bool:
        """Whether a variant takes the tree that pays in each step, for which it needs costs."""
        return any(variant.adapts for variant in self.variants)

    def configuration(self) -> dict[str, Any]:
        """What must be the same when a run goes on, as JSON values; the target, its dtype and costs come to it."""
        return {
            "label": self.label,
            "drafters": dict(self.drafters),
            "variants": {variant.label: variant.to_dict() for variant in self.variants},
            "tasks": {name: self._task(name) for name in self.tasks},
            "temperatures": [float(value) for value in self.temperatures],
            "settings": asdict(self.settings),
            "noise": NOISE,
            **({} if self.costs is None else {COSTS: self.costs.to_dict()}),
        }

    def _task(self, name: str) -> dict[str, Any]:
        questions = self.tasks[name]
        told = [[one.id, one.turns, one.references, [dict(message) for message in one.history]] for one in questions]
        return {
            "title": TASKS[name].title if name in TASKS else name,
            "source": self.sources.get(name, ""),
            "num_questions": len(questions),
            "sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
            "is_scored": name in TASKS and TASKS[name].is_right is not None,
        }


@dataclass(frozen=True)
class Batch:
    """Questions of one task that are decoded together, of equally many turns."""

    task: str
    temperature: float
    first: int  # the place of the first one in the task
    questions: Sequence[Question]


def batches(plan: Plan) -> list[Batch]:
    """Task after task, temperature after temperature, the questions in order."""
    found: list[Batch] = []
    for task, questions in plan.tasks.items():
        starts = [0]
        for place, (before, here) in enumerate(pairwise(questions), start=1):
            if place - starts[-1] == plan.settings.batch_size or len(here.turns) != len(before.turns):
                starts.append(place)
        ends = [*starts[1:], len(questions)]
        for temperature in plan.temperatures:
            pairs = zip(starts, ends, strict=True)
            found += [Batch(task, float(temperature), start, questions[start:end]) for start, end in pairs]
    return found
