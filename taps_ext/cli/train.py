"""taps-ext train | features | regenerate."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table

from ..checkpoints.load import TargetIdentity, identify, open_target
from ..native import choose_device
from ..sampling import SamplingParams
from ..tiny import resolve
from ..training import features as feature_files
from ..training import regenerate as regeneration
from ..training.data import Conversation, prepare, read_sources, what_was_dropped, with_chat_template
from ..training.features import size
from ..training.recipe import DataConfig, Recipe, SourceConfig, load_recipe
from . import terminal, watching
from .terminal import duration, facts_table, note, show
from .watching import percents

if TYPE_CHECKING:
    from ..training.masks import TokenDataset
    from ..training.run import DryRun
    from ..training.trainer import TrainingResult

LOG = "log.jsonl"

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

    with watching.screen() as observer:
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
        drawn = watching.save_picture(log)
    except (ValueError, OSError) as error:  # the run itself is done
        note(str(error))
    records = watching.read_log(log, "validation")
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
