"""taps-ext train | features | regenerate, and what a person sees of a run: lines or a bar, and a picture of its log."""

from __future__ import annotations

import io
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table

from ..checkpoints.files import write_whole
from ..checkpoints.load import TargetIdentity, identify, open_target
from ..native import choose_device
from ..sampling import SamplingParams
from ..tiny import resolve
from ..training import features as feature_files
from ..training import regenerate as regeneration
from ..training.data import Conversation, prepare, read_sources, what_was_dropped, with_chat_template
from ..training.features import size
from ..training.recipe import DataConfig, Recipe, SourceConfig, load_recipe
from ..training.trainer import LOG, Observer, TrainingResult, UpdateRecord, ValidationRecord
from . import terminal
from .terminal import Report, duration, facts_table, note, show

if TYPE_CHECKING:
    from ..training.masks import TokenDataset
    from ..training.run import DryRun

TRAINING, HELD_OUT = "0.6", "#0b7fab"  # colours of the picture

Config = Annotated[
    list[Path] | None, typer.Option("--config", help="Recipe (YAML). Repeatable; later files override earlier ones.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe, such as training.steps=500.")
]


def train(
    overrides: Overrides = None,
    config: Config = None,
    dry_run: terminal.DryRun = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Train a drafter by a recipe, or resume a run that was stopped. See docs/training.md."""
    recipe = _read_recipe(config, overrides)
    from ..training import run

    with screen() as observer:
        observer.note(f"{recipe.objective.name} drafter for {recipe.target}, in {recipe.output}")
        started = time.monotonic()
        done = run.dry_run(recipe, observer) if dry_run else run.train(recipe, observer)
    if isinstance(done, run.DryRun):
        show(as_json, asdict(done), facts_table(_dry_run_rows(done)))
        return
    if not terminal.process_index():
        _show_run(recipe, done, time.monotonic() - started, as_json)
    if not done.is_finished:
        raise typer.Exit(terminal.STOPPED)


def features(
    overrides: Overrides = None,
    config: Config = None,
    dry_run: terminal.DryRun = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Compute the target's features of a recipe's data ahead of training, into features.path.

    What is there already is kept, so that the same command resumes a run that was stopped.
    """
    recipe = _read_recipe(config, overrides)
    if recipe.features.mode == "online" and recipe.features.path is None:
        note(f"features go to {recipe.features_path}; features.path names another directory")
    from accelerate import PartialState

    from ..training import run

    with terminal.progress() as update:
        data = prepare(recipe.data, run.load_tokenizer(recipe), partial(update, "conversations"))
    datasets = run.datasets(data)
    space = feature_files.space_for(_store(recipe), datasets)
    note(*data.report.lines())
    facts = {**asdict(space), "folder": str(space.folder), "num_bytes": space.num_bytes}
    if dry_run:
        show(as_json, facts, str(space))
        return
    note(str(space))
    space.check()
    _compute(recipe, datasets, PartialState(cpu=not torch.cuda.is_available()))
    way = f"features.path={recipe.features.path}" if recipe.features.path else "the same output"
    show(as_json, facts, f"{space.folder} has them all; train with features.mode=stored and {way}")


def regenerate(
    target: terminal.Target[str],
    data: terminal.Data,
    output: terminal.Output[Path],
    count: Annotated[
        int | None, typer.Option(help="Number of conversations to take from each --data, chosen by the seed.")
    ] = None,
    max_new_tokens: terminal.MaxNewTokens = 1024,
    temperature: terminal.Temperature = 0.0,
    seed: terminal.Seed = 0,
    batch_size: terminal.BatchSize = 16,
    chat_template: terminal.ChatTemplate = None,
    system_prompt: terminal.SystemPrompt = None,
    device: terminal.Device = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Let the target write the answers of conversations anew, for drafters to learn from.

    The result is a JSON Lines file. An answer that has not ended after --max-new-tokens is kept as unfinished: no end
    is learned there, and its conversation ends. The same command resumes a run that was stopped.
    """
    SamplingParams(temperature, seed=seed)  # checks both before the model is loaded
    place = choose_device(device)
    regeneration.check(output, max_new_tokens, batch_size)
    conversations = [one.with_system(system_prompt) for one in _conversations(data, count, seed)]
    model, tokenizer = terminal.load_target_and_tokenizer(target, "auto", place)
    tokenizer = with_chat_template(tokenizer, chat_template)
    with terminal.progress("conversations") as update:
        done = regeneration.regenerate(
            model,
            tokenizer,
            conversations,
            output,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=partial(update, "conversations"),
        )
    note(*(f"conversations that end early, before {reason}: {number:,}" for reason, number in done.cut.items()))
    if done.num_unfinished:
        note(f"answers cut off after {max_new_tokens:,} tokens, of which no end is learned: {done.num_unfinished:,}")
    dropped = f"; {done.num_dropped:,} had no answer left" if done.num_dropped else ""
    sentence = f"wrote {done.num_written:,} conversations with {done.num_answers:,} answers to {output}{dropped}"
    show(as_json, {"output": str(output), **asdict(done)}, sentence)


def _read_recipe(paths: Sequence[Path] | None, overrides: Sequence[str] | None) -> Recipe:
    """Return the recipe; raise ValueError with everything that is wrong with it on one line."""
    try:
        return load_recipe(paths or (), overrides or ())
    except ValueError as error:
        raise ValueError("; ".join(str(error).splitlines())) from error


# ---- features and conversations


def _store(recipe: Recipe) -> feature_files.FeatureStore:
    """Return the store that there is, or one that is still to be made, of which only the sizes are known."""
    if (recipe.features_path / feature_files.MANIFEST).exists():
        return feature_files.open_store(recipe.features_path)
    config = open_target(resolve(recipe.target), recipe.target_revision).config
    target = TargetIdentity(recipe.target, None, config.hidden_size, "", None)
    return feature_files.FeatureStore(recipe.features_path, target, recipe.features.dtype)


def _compute(recipe: Recipe, datasets: Sequence[TokenDataset], processes: Any) -> None:
    """Compute the missing features, a share in each process; `processes` is accelerate's PartialState."""
    from ..training.run import load_frozen_target

    target = load_frozen_target(recipe, processes.device)
    store = feature_files.create_store(recipe.features_path, identify(target.model), recipe.features.dtype)
    share = {"process_index": processes.process_index, "num_processes": processes.num_processes}
    with terminal.progress("tokens") as update:
        feature_files.extract(target, datasets, store, **share, report=partial(update, "tokens"))
    processes.wait_for_everyone()
    store.flush()  # finds what the other processes have written
    store.require(datasets)


def _conversations(data: Sequence[str], count: int | None, seed: int) -> Iterator[Conversation]:
    """Yield the usable conversations of every source, or `count` of each; note what was dropped."""
    config = DataConfig([SourceConfig(path, count=count) for path in data], seed=seed)
    with terminal.progress() as update:
        for reading in read_sources(config, keeps_questions=True):
            found: list[Conversation] = []
            for conversation in islice(reading, count):
                update("conversations", len(found), count)
                found.append(conversation)
            reading.check_count(len(found))
            note(f"{reading.config.path}: {len(found):,} usable conversations{what_was_dropped([reading])}")
            yield from found


# ---- what a run was, for people and programs


def _show_run(recipe: Recipe, result: TrainingResult, seconds: float, as_json: bool) -> None:
    """Print the step of a run, its best and latest drafter, its files and what to do next."""
    log = Path(recipe.output).expanduser() / LOG
    drawn = None
    try:
        drawn = save_picture(log)
    except (ValueError, OSError) as error:  # the run itself is done
        note(str(error))
    records = read_log(log, "validation")
    best = max(records, key=lambda record: float(record["acceptance_length"]), default=None)
    latest = records[-1] if records else None
    facts: dict[str, Any] = {
        "finished": result.is_finished,
        "step": result.step,
        "num_steps": result.num_steps,
        "seconds": seconds,
        "best": _figures(result.best, best),
        "final": _figures(result.final, latest),
        "log": str(log),
        "picture": drawn and str(drawn),
    }
    table = Table("", "step", "loss", "estimated\nacceptance length", "accuracy by depth", **terminal.PLAIN)
    for name, record in (("best", best), ("final" if result.is_finished else "latest", latest)):
        if record is not None:
            length, accuracy = f"{record['acceptance_length']:.2f}", percents(record["accuracy"])
            table.add_row(name, f"{record['step']:,}", f"{record['loss']:.4f}", length, accuracy)
    paths = {"best drafter": result.best, "final drafter": result.final, "log": log, "picture": drawn}
    lines = [f"{name}: {path}" for name, path in paths.items() if path]
    lines.append(f"{result.step:,} of {result.num_steps:,} steps, {duration(seconds)} in this command")
    drafter = result.best or result.final
    if drafter is not None and result.is_finished:
        folder, target = shlex.quote(str(drafter)), shlex.quote(recipe.target)
        lines += ["", "next:", f"  taps-ext validate {folder} --target {target}"]
        lines += [f'  taps-ext generate --target {target} --drafter {folder} --prompt "..."']
    parts: list[Any] = [table, "", *lines] if records else lines
    show(as_json, facts, *parts)


def _figures(folder: Path | None, record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    names = ("step", "loss", "accuracy", "acceptance_length")
    return {"folder": str(folder), **{name: record and record[name] for name in names}}


def _dry_run_rows(facts: DryRun) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{facts.num_parameters:,}"
    yield "training data", f"{facts.num_sequences:,} conversations, {facts.num_tokens:,} tokens"
    yield "steps", f"{facts.num_steps:,} of {facts.seconds_per_step:.3g} s"
    yield "time", f"{duration(3600 * facts.hours)}, without validations"
    yield "peak memory", f"{size(facts.peak_memory_bytes)}, of this process or its GPU"
    yield "each checkpoint", size(facts.checkpoint_bytes)
    yield "stored features", "none" if facts.feature_bytes is None else size(facts.feature_bytes)


# ---- what a person sees of a run


@contextmanager
def screen() -> Iterator[Screen]:
    """Yield an observer that shows a run on stderr: a bar on a terminal, lines elsewhere."""
    with terminal.progress() as report:
        yield Screen(report, has_bar=not isinstance(report, terminal.TimedLines))


class Screen(Observer):
    """Shows a run. Without a bar: a line for each record of the log, and one every half minute between them."""

    def __init__(self, report: Report, has_bar: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._report, self._has_bar, self._clock = report, has_bar, clock
        self._last_line, self._num_steps = clock(), 0

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Show how far some work besides updates is."""
        self._report(what, done, total)

    def start(self, first_step: int, num_steps: int) -> None:
        """Say where a resumed run goes on."""
        self._num_steps = num_steps
        if 0 < first_step < num_steps:
            note(f"resuming after step {first_step} of {num_steps}")

    def step(self, record: UpdateRecord, is_logged: bool) -> None:
        """Show the means since the last record of the log, the speed and the time left."""
        left = f"{duration(record.seconds_left)} left"
        if self._has_bar:  # which has 80 columns, and counts the steps
            accuracy = " ".join(f"{share:.0%}" for share in record.accuracy)
            self._report(f"loss {record.loss:.4f}, {accuracy}, {left}", record.step, self._num_steps)
        elif is_logged or self._clock() - self._last_line >= terminal.LINE_EVERY_S:
            numbers = f"loss {record.loss:7.4f}  accuracy {percents(record.accuracy)}"
            self._line(record.step, f"{numbers}  {record.tokens_per_second:,.0f} tokens/s  {left}")

    def validated(self, record: ValidationRecord) -> None:
        """Show the figures of the held-out conversations in one line."""
        best = ", the best so far" if record.is_best else ""
        numbers = f"held out: loss {record.loss:7.4f}  accuracy by depth {percents(record.accuracy)}"
        self._line(record.step, f"{numbers}  estimated acceptance length {record.acceptance_length:.2f}{best}")

    def note(self, sentence: str) -> None:
        """Print a sentence, above the bar if there is one."""
        note(sentence)

    def _line(self, step: int, text: str) -> None:
        note(f"step {step:{len(str(self._num_steps))}}/{self._num_steps}  {text}")
        self._last_line = self._clock()


def percents(shares: Sequence[float]) -> str:
    """Return the shares as percentages of one width; a dash for a share of nothing."""
    return " ".join("   -" if math.isnan(share) else f"{share:4.0%}" for share in shares)


# ---- the picture of a run, drawn from its log alone


def save_picture(log: Path) -> Path:
    """Write training.png beside the log, and return its path; raise ValueError where matplotlib is missing."""
    path = log.with_name("training.png")
    write_whole(path, [draw_picture(log)])
    return path


def draw_picture(log: Path) -> bytes:
    """Return a PNG: on the left the loss of training and of the held-out conversations, on the right the estimate."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ValueError(f"the picture needs {error.name}: pip install 'taps_ext[cli]'") from error

    steps, validations = read_log(log, "step"), read_log(log, "validation")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*_curve(steps, "loss"), color=TRAINING, label="training")
    left.set(title="loss", xlabel="step")
    right.set(title="estimated acceptance length", xlabel="step")
    if validations:
        left.plot(*_curve(validations, "loss"), color=HELD_OUT, marker="o", markersize=4, label="held out")
        right.plot(*_curve(validations, "acceptance_length"), color=HELD_OUT, marker="o", markersize=4)
        best = max(validations, key=lambda record: float(record["acceptance_length"]))
        right.annotate(
            f"{best['acceptance_length']:.2f}",
            (best["step"], best["acceptance_length"]),
            (4, -12),
            textcoords="offset points",
        )
        left.legend(frameon=False)
    else:
        right.text(0.5, 0.5, "nothing was held out", ha="center", transform=right.transAxes)
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in records], [record[name] for record in records]


def read_log(log: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of a kind, "step" or "validation"; a torn last line, which a kill leaves, is skipped."""
    records = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == kind:
            records.append(record)
    return records
