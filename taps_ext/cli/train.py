"""taps-ext train | features | regenerate."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from .common import DEVICE_HELP, JSON_HELP, is_main_process, keep_logs_clean, load_target, progress

if TYPE_CHECKING:
    from ..training.config import Recipe
    from ..training.dataset import TokenDataset
    from ..training.feature_store import SpaceEstimate

STOPPED = 130  # the exit code of a run that was stopped and can go on: for scripts, neither success nor failure

Config = Annotated[list[Path] | None, typer.Option(help="A recipe (YAML); repeatable, later ones win.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As training.steps=500.")]
AsJson = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


def train(
    overrides: Overrides = None,
    config: Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load all, make two steps, say what it takes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a drafter as a recipe says, or go on with a run that was stopped. See docs/training.md."""
    recipe = _read_recipe(config, overrides)
    from ..training import progress as watching
    from ..training import run
    from ..training.trainer import LOG
    from . import training_tables as tables

    keep_logs_clean()
    observer = watching.choose(recipe.training.log_every, sys.stderr) if is_main_process() else None
    if observer:
        observer.note(f"{recipe.objective.name} drafter for {recipe.target}, in {recipe.output}")
    if dry_run:
        facts = run.dry_run(recipe, observer)
        _show(lambda: tables.dry_run_report(facts), tables.dry_run_dict(facts), as_json)
        return
    started = time.monotonic()
    result = run.train(recipe, observer)
    if observer:
        log = Path(recipe.output).expanduser() / LOG
        outcome = tables.Outcome.read(result, time.monotonic() - started, log, _draw(log, observer.note))
        _show(lambda: outcome.report(recipe.target), outcome.to_dict(), as_json)
    if not result.is_finished:
        raise typer.Exit(STOPPED)


def features(
    overrides: Overrides = None,
    config: Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print how much space they take.")] = False,
) -> None:
    """Compute the target's features of a recipe's data ahead, into features.path; goes on where it was stopped."""
    recipe = _read_recipe(config, overrides)
    if recipe.features.path is None:
        raise ValueError("the recipe has no features.path; give features.path=FOLDER")
    from ..checkpoints.load import identify
    from ..training import materials
    from ..training.data import prepare
    from ..training.feature_sources import extract
    from ..training.feature_store import create_store

    keep_logs_clean()
    data = prepare(recipe.data, materials.load_tokenizer(recipe))
    datasets, space = materials.datasets(data), _space(recipe, materials.datasets(data))
    _say(*data.report.lines(), str(space))
    if dry_run:
        return
    space.check()
    import torch
    from accelerate import PartialState

    processes = PartialState(cpu=not torch.cuda.is_available())  # else processes on CPUs do not know of each other
    target = materials.load_target(recipe, processes.device)
    store = create_store(recipe.features.path, identify(target.model), recipe.features.dtype)
    with _bar("tokens") as report:
        extract(
            target,
            datasets,
            store,
            process_index=processes.process_index,
            num_processes=processes.num_processes,
            report=report,
        )
    processes.wait_for_everyone()
    store.flush()  # finds what the other processes have written
    store.require(datasets)
    _say(f"{recipe.features.path} has them all; train with features.mode=stored features.path={recipe.features.path}")


def regenerate(
    target: Annotated[str, typer.Option(help="Folder or hub id of the target; 'tiny' is the embedded one.")],
    data: Annotated[list[str], typer.Option(help="Conversations: a file, folder or data set; repeatable.")],
    output: Annotated[Path, typer.Option(help="The JSON lines file to write.")],
    count: Annotated[int | None, typer.Option(help="Take so many of each --data, chosen by the seed.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="A longer answer is left out, with what follows it.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the choice and of the answers.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Answers at once.")] = 16,
    chat_template: Annotated[str | None, typer.Option(help="A jinja file; default: the tokenizer's own.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Put before conversations that bring none.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
) -> None:
    """Let the target write the answers of conversations, for drafters to learn from; goes on where it was stopped."""
    from ..device import choose
    from ..training import regeneration, survey
    from ..training.config import DataConfig, SourceConfig
    from ..training.data import with_chat_template

    place = choose(device)
    regeneration.check_output(output)
    sources = tuple(SourceConfig(path, count=count) for path in data)
    surveyed = survey.survey(DataConfig(sources), keeps_questions=True)
    conversations = [
        conversation
        for number, source in enumerate(surveyed)
        for conversation in list(source.conversations(f"{seed}/{number}"))[:count]
    ]
    for source in surveyed:
        usable = f"{source.config.path}: {len(source.usable):,} usable conversations"
        _say(usable + survey.what_was_dropped([source]))
    keep_logs_clean()
    model, tokenizer = load_target(target, "auto", place)
    tokenizer = with_chat_template(tokenizer, chat_template)
    conversations = [conversation.with_system(system_prompt) for conversation in conversations]
    with _bar("conversations") as report:
        done = regeneration.regenerate(
            model,
            tokenizer,
            conversations,
            output,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=report,
        )
    _say(*(f"conversations that end early, before {reason}: {number:,}" for reason, number in done.cut.items()))
    dropped = f"; {done.num_dropped:,} had no answer left" if done.num_dropped else ""
    _say(f"wrote {done.num_written:,} conversations with {done.num_answers:,} answers to {output}{dropped}")


def _read_recipe(paths: Sequence[Path] | None, overrides: Sequence[str] | None) -> Recipe:
    """The recipe; what is wrong with it on one line."""
    from ..training.recipe_files import load_recipe

    try:
        return load_recipe(paths or (), overrides or ())
    except ValueError as error:
        raise ValueError("; ".join(str(error).splitlines())) from error


def _space(recipe: Recipe, datasets: Sequence[TokenDataset]) -> SpaceEstimate:
    """What the features that are missing will take; looked up without making the folder."""
    from ..checkpoints.load import open_target
    from ..tiny import resolve
    from ..training import feature_store
    from ..training.feature_shards import DTYPES

    folder = Path(recipe.features.path or "").expanduser()
    if (folder / feature_store.MANIFEST).exists():
        return feature_store.open_store(folder).space_for(datasets)
    config = open_target(resolve(recipe.target), recipe.target_revision).config
    lengths = {id: data.length(i) for data in datasets for i, id in enumerate(data.ids)}
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return feature_store.SpaceEstimate(
        folder,
        num_sequences=len(lengths),
        num_tokens=sum(lengths.values()),
        position_bytes=config.hidden_size * DTYPES[recipe.features.dtype][1].itemsize,
        free_bytes=shutil.disk_usage(existing).free,
    )


def _draw(log: Path, note: Callable[[str], None]) -> Path | None:
    """The picture of a run; where it cannot be drawn, a note says why: the run is done all the same."""
    from ..training import picture

    try:
        return picture.save(log)
    except (ValueError, OSError) as error:
        note(str(error))
        return None


def _show(report: Callable[[], RenderableType], values: dict[str, Any], as_json: bool) -> None:
    """The result on stdout, of the main process."""
    if not is_main_process():
        return
    if as_json:
        from ..checkpoints.files import json_text

        print(json_text(values))
    else:
        Console(highlight=False, soft_wrap=True).print(report())


def _say(*sentences: str) -> None:
    """Lines on stdout, of the main process."""
    for sentence in sentences if is_main_process() else ():
        print(sentence, flush=True)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by (done, total)."""
    with progress(is_shown=is_main_process()) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
