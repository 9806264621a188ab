"""An evaluation: variants x tasks x temperatures, every question of each, in a folder that a stopped run goes on in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from .. import native
from ..checkpoints.load import TargetIdentity, identify
from ..sampling import row_seed
from ..target.end_tokens import end_tokens
from ..target.model import TargetModel
from . import results
from .answering import Answering, Contestant
from .contestants import (
    Folders,
    check_drafters,
    load_participants,
    make_contestants,
    measure_costs,
    refuse_strangers,
)
from .plan import Batch, Plan, batches
from .prompting import Prompter, refuse_long
from .record import Asked, line_of
from .tasks import TASKS

WARM_UP_TOKENS = 4

Report = Callable[[str, int, int], None]  # told what is answered, and how many batches are done, of how many


@dataclass(frozen=True)
class Processes:
    """The processes of a launch (torchrun, accelerate launch), and which of them this one is."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_this_launch(cls, device: torch.device) -> Processes:
        """Joined with the others, if there are any; `device` is this one's."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ModuleNotFoundError as missing:
            raise ValueError(f"several processes need {missing.name}: pip install 'taps_ext[eval]'") from missing
        # Without cpu=True processes on CPUs do not know of each other; one that is done waits for the slowest.
        state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=30))
        return cls(state.process_index, state.num_processes)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


def evaluate(
    target: Any,
    tokenizer: Any,
    drafter_folders: Folders,
    plan: Plan,
    folder: Path,
    report: Report = lambda what, done, total: None,
    *,
    target_name: str | None = None,
    command: str = "",
) -> None:
    """Answer every question of the plan with every variant, a line each in `folder` (`record.py` says of what).

    What a stopped run has written is not done again, whatever the number of processes was; lines are the same as those
    of a run that was not stopped, times aside. Everything that cannot be evaluated is refused before any work, in a
    sentence (ValueError, OSError).

    Args:
        target: a transformers causal LM in evaluation mode.
        drafter_folders: a folder or hub id by name; `plan.drafters` are their facts.
        command: the command line, for the record.
    """
    processes = Processes.of_this_launch(target.device)
    identity = identify(target)
    refuse_strangers(check_drafters(drafter_folders, target.config.get_text_config()), identity)
    model, prompter = TargetModel(target), Prompter(tokenizer, plan.settings.system_prompt)
    _refuse_long_questions(plan, prompter, model)
    name = target_name or Path(identity.name).name
    configuration = _configuration(plan, identity, name, target.dtype)
    results.check_folder(folder, configuration)
    participants = load_participants(model, drafter_folders, plan.variants, tokenizer)
    if plan.adapts and processes.index == 0 and (plan.costs or results.read_costs(folder)) is None:
        configuration[results.COSTS] = measure_costs(
            model, plan.variants, participants, plan.settings.batch_size
        ).to_dict()
    ends = end_tokens(target, tokenizer)
    with _folder(folder, configuration, _provenance(command, model, processes, ends), processes):
        contestants = make_contestants(model, plan.variants, participants, plan.settings, results.read_costs(folder))
        answers = results.Answers(folder, processes.index, plan.variants[0].label)
        answering = Answering(model, prompter, plan.settings.max_new_tokens, list(ends.values()))
        _Run(plan, contestants, answering, answers, name, report).run(processes)
        answers.close()
        processes.wait()


def _configuration(plan: Plan, identity: TargetIdentity, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON values."""
    facts = {"name": name, "commit": identity.revision, "fingerprint": identity.fingerprint}
    configuration = {"target": facts, **plan.configuration()}
    configuration["settings"]["dtype"] = str(dtype).removeprefix("torch.")
    return configuration


class _Run:
    """One process' share of an evaluation."""

    def __init__(
        self,
        plan: Plan,
        contestants: Sequence[Contestant],
        answering: Answering,
        answers: results.Answers,
        target_name: str,
        report: Report,
    ) -> None:
        self._plan, self._contestants, self._answering = plan, contestants, answering
        self._answers, self._target_name, self._report = answers, target_name, report
        self._warm: set[tuple[str, bool]] = set()

    def run(self, processes: Processes) -> None:
        """Batch after batch; on each, plain decoding and then the variants, so that the machine's mood falls on all."""
        mine = batches(self._plan)[processes.index :: processes.count]
        todo = [
            (batch, contestant)
            for batch in mine
            for contestant in self._contestants
            if contestant.variant.runs_at(batch.temperature)
        ]
        for done, (batch, contestant) in enumerate(todo):
            asked = [self._asked(batch, place) for place in range(len(batch.questions))]
            label = contestant.variant.label
            missing = [place for place, one in enumerate(asked) if one.key(label) not in self._answers]
            if missing:
                self._report(f"{batch.task}, T = {batch.temperature:g}, {label}", done, len(todo))
                self._answer(batch, contestant, asked, missing)
        self._report("done", len(todo), len(todo))

    def _answer(self, batch: Batch, contestant: Contestant, asked: Sequence[Asked], missing: Sequence[int]) -> None:
        """The lines of a batch that are missing. All of it is decoded, as its rows are what they were decoded with."""
        self._warm_up(batch, contestant)
        seeds = [one.seed for one in asked]
        given = self._answering.answer(contestant, batch.questions, seeds, batch.temperature)
        lines = []
        for place in missing:
            own = [turn.tokens for turn in given[place].turns]
            plain = (
                own
                if contestant.variant.is_plain
                else self._answers.plain_tokens(asked[place].key(contestant.variant.label))
            )
            lines.append(line_of(asked[place], given[place], contestant, plain, self._target_name))
        self._answers.add(lines)

    def _asked(self, batch: Batch, place: int) -> Asked:
        is_right = TASKS[batch.task].is_right if batch.task in TASKS else None
        seed = row_seed(self._plan.settings.seed, batch.first + place)
        return Asked(batch.questions[place], batch.task, batch.temperature, seed, len(batch.questions), is_right)

    def _warm_up(self, batch: Batch, contestant: Contestant) -> None:
        """A few tokens that nobody measures, once a variant with noise and once without."""
        if (mark := (contestant.variant.label, batch.temperature > 0)) not in self._warm:
            self._warm.add(mark)
            short = replace(self._answering, max_new_tokens=WARM_UP_TOKENS)
            short.answer(contestant, batch.questions, [0] * len(batch.questions), batch.temperature)


@contextmanager
def _folder(
    folder: Path, configuration: Mapping[str, Any], provenance: Mapping[str, Any], processes: Processes
) -> Iterator[None]:
    """The main process makes the folder ready and holds it; the others wait for that."""
    lock = results.begin(folder, configuration, provenance) if processes.index == 0 else None
    processes.wait()
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _refuse_long_questions(plan: Plan, prompter: Prompter, target: TargetModel) -> None:
    for questions in plan.tasks.values():
        for question in questions:
            prompt = len(prompter.encode(question, [""] * (len(question.turns) - 1)))
            refuse_long(question, prompt + len(question.turns) * plan.settings.max_new_tokens, target)


def _provenance(command: str, target: TargetModel, processes: Processes, ends: Mapping[str, int]) -> dict[str, Any]:
    """How the results came about, as JSON values; none of it must be the same when a run goes on."""
    is_cuda = target.device.type == "cuda"
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **native.installation().provenance(),
        "device": torch.cuda.get_device_name(target.device) if is_cuda else "cpu",
        "num_processes": processes.count,
        "end_tokens": dict(ends),
    }
