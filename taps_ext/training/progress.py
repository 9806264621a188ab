"""What a run tells while it goes: records of steps and validations, and the observers that show them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO


@dataclass(frozen=True)
class StepRecord:
    """One update, over all processes."""

    step: int  # from 1
    epoch: float  # data read so far, in epochs
    loss: float  # mean over the learned slots, summed over the passes
    accuracy: tuple[float, ...]  # by pass: share of learned slots whose likeliest token is the target's likeliest
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens_per_second: float


@dataclass(frozen=True)
class ValidationRecord:
    """The held-out conversations, after an update. See `acceptance_estimate.py` for what is estimated."""

    step: int
    loss: float
    accuracy: tuple[float, ...]  # by depth (from 1): share of drafts that are accepted when all before them were
    acceptance_length: float  # 1 + the mean number of accepted drafts of a chain without branches
    is_best: bool


class Observer(Protocol):
    """Follows a run on the main process."""

    def preparing(self, done: int, total: int | None) -> None:
        """So many conversations are read (total None: of an unknown number) or turned into tokens; called for each."""

    def start(self, first_step: int, num_steps: int) -> None:
        """The run begins after update `first_step` (0, or where it resumed) and ends with update `num_steps`."""

    def step(self, record: StepRecord) -> None:
        """An update is done; called for every one."""

    def validated(self, record: ValidationRecord) -> None:
        """A validation is done."""

    def note(self, sentence: str) -> None:
        """Something that a person should read."""

    def stop(self) -> None:
        """The run ended, whatever the reason."""


Progress = Callable[[str, int, int | None], None]  # called with what is done, how many, and of how many (None: unknown)

TELL_EVERY_S = 30.0
TELL_EVERY = 100  # conversations


def choose(log_every: int, stream: TextIO) -> Observer:
    """A bar on a terminal; lines elsewhere, and where rich is not installed."""
    if stream.isatty():
        try:
            return BarObserver(log_every, stream)
        except ModuleNotFoundError:
            pass
    return LineObserver(log_every, stream)


class TimedLines:
    """A line about every 30 s on how far long work is, and the time left at the speed since the line before."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._told = self._since = clock()
        self._done: int | None = None  # at the time `_since`; a run that resumes does not begin with 0

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """So much of the work is done (total None: of an unknown amount); called as often as one likes."""
        now = self._clock()
        if self._done is None or done < self._done:  # the first or next stage of the work
            self._since, self._done = now, done
        if now - self._told >= TELL_EVERY_S:
            sentence = so_far(what, done, total)
            if total is not None and done > self._done:
                left = (now - self._since) / (done - self._done) * (total - done)
                sentence += f", {duration(left)} left"
            self._say(sentence)
            self._told, self._since, self._done = now, now, done


class LineObserver:
    """Plain lines, aligned: one every `log_every` updates, one a validation."""

    def __init__(self, log_every: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._log_every = log_every
        self._stream = stream
        self._clock = clock
        self._recent = _Recent(log_every)
        self._preparation = TimedLines(self.note, clock)

    def preparing(self, done: int, total: int | None) -> None:
        """A line now and then."""
        self._preparation("conversations", done, total)

    def start(self, first_step: int, num_steps: int) -> None:
        """Say where a resumed run goes on."""
        self._first_step, self._num_steps, self._started = first_step, num_steps, self._clock()
        if 0 < first_step < num_steps:
            self.note(resumption(first_step, num_steps))

    def step(self, record: StepRecord) -> None:
        """A line with the means since the line before, the speed and the time left."""
        self._recent.add(record)
        if record.step % self._log_every == 0 or record.step == self._num_steps:
            seconds = (self._clock() - self._started) / (record.step - self._first_step)
            left = duration(seconds * (self._num_steps - record.step))
            speed = f"{record.tokens_per_second:,.0f} tokens/s"
            figures = f"loss {self._recent.loss:7.4f}  accuracy {percents(self._recent.accuracy)}"
            self._line(record.step, f"{figures}  {speed}  {left} left")

    def validated(self, record: ValidationRecord) -> None:
        """A line with the figures of the held-out conversations."""
        self._line(record.step, validation_text(record))

    def note(self, sentence: str) -> None:
        """The sentence, on a line of its own."""
        print(sentence, file=self._stream, flush=True)

    def stop(self) -> None:
        """Nothing is open."""

    def _line(self, step: int, text: str) -> None:
        width = len(str(self._num_steps))
        self.note(f"step {step:{width}}/{self._num_steps}  {text}")


class BarObserver:
    """A bar at the bottom of a terminal, with a line above it for each validation. Needs rich."""

    def __init__(self, log_every: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        step = TextColumn("step {task.completed}/{task.total}")
        columns = (step, BarColumn(bar_width=6), TextColumn("{task.description}"))  # with the time: 80 characters
        console = Console(file=stream, highlight=False, soft_wrap=True)
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=300
        )
        self._recent = _Recent(log_every)
        self._acceptance = ""
        self._status = console.status("")

    def preparing(self, done: int, total: int | None) -> None:
        """A line that counts, until something else is said."""
        if done % TELL_EVERY == 0:
            self._status.update(so_far("conversations", done, total))
            self._status.start()

    def start(self, first_step: int, num_steps: int) -> None:
        """Show the bar."""
        if 0 < first_step < num_steps:
            self.note(resumption(first_step, num_steps))
        self._bar = self._progress.add_task("", total=num_steps, completed=first_step)
        self._progress.start()

    def step(self, record: StepRecord) -> None:
        """Move the bar."""
        self._recent.add(record)
        accuracy = " ".join(f"{share:.0%}" for share in self._recent.accuracy)
        figures = f"loss {self._recent.loss:.3f}, {accuracy}{self._acceptance}"
        self._progress.update(self._bar, completed=record.step, description=figures)

    def validated(self, record: ValidationRecord) -> None:
        """A line above the bar, and the new acceptance length beside it."""
        self._acceptance = f", acceptance length {record.acceptance_length:.2f}"
        self.note(f"step {record.step}  {validation_text(record)}")

    def note(self, sentence: str) -> None:
        """The sentence, above the bar."""
        self._status.stop()
        self._progress.console.print(sentence, markup=False)

    def stop(self) -> None:
        """Take the bar away and leave the lines."""
        self._progress.stop()


class _Recent:
    """The means over the latest updates: the loss of a single one jumps."""

    def __init__(self, num_steps: int) -> None:
        self._records: deque[StepRecord] = deque(maxlen=num_steps)

    def add(self, record: StepRecord) -> None:
        self._records.append(record)

    @property
    def loss(self) -> float:
        return sum(record.loss for record in self._records) / len(self._records)

    @property
    def accuracy(self) -> list[float]:
        by_pass = zip(*(record.accuracy for record in self._records), strict=True)
        return [sum(one) / len(self._records) for one in by_pass]


def so_far(what: str, done: int, total: int | None) -> str:
    """How far the work is."""
    return f"{what}: {done:,}" if total is None else f"{what}: {done:,} of {total:,}"


def resumption(first_step: int, num_steps: int) -> str:
    """That a run goes on, and from where."""
    return f"resuming after step {first_step} of {num_steps}"


def validation_text(record: ValidationRecord) -> str:
    """The figures of a validation in one line."""
    best = ", the best so far" if record.is_best else ""
    figures = f"held out: loss {record.loss:7.4f}  accuracy by depth {percents(record.accuracy)}"
    return f"{figures}  estimated acceptance length {record.acceptance_length:.2f}{best}"


def duration(seconds: float) -> str:
    """A time in the two largest units that matter: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def percents(shares: Sequence[float]) -> str:
    """The shares as percentages of one width; a dash for a share of nothing."""
    return " ".join("   -" if math.isnan(share) else f"{share:4.0%}" for share in shares)
