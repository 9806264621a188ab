"""The report's files: everything is made in memory and written beside the output before anything there is replaced."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ...checkpoints.files import check_writable, written
from ..variants import MERGED
from .cells import Run
from .figures import ROUTING, Figure, View, equal_to_plain, forwards_per_token, mean_over, micro, views
from .page import page
from .pictures import Picture, draw
from .saved import dump
from .sections import Section, sections
from .tables import as_csv, markdown

MARKDOWN, PAGE, COUNTS, TABLES, PICTURES = "report.md", "index.html", "report.json", "tables", "pictures"
PARTS = (MARKDOWN, PAGE, TABLES, PICTURES, COUNTS)

Report = Callable[[int, int], None]  # told how many of the pictures are drawn


def check_output(output: Path) -> None:
    """ValueError or OSError, in a sentence, unless a report can be written there without touching what is none."""
    check_writable(output)
    foreign = [name for name in PARTS if (output / name).exists()]
    if foreign and not (output / COUNTS).is_file():
        raise ValueError(f"{output} has a {foreign[0]} that is of no report; give another --output")


def write(runs: Sequence[Run], output: Path, report: Report = lambda done, total: None) -> list[Path]:
    """The files written. A report that was there is replaced; other files of the folder stay."""
    check_output(output)
    files = make(runs, report)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written("the report", output.parent, "make room and report again"):
        output.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=output) as name:
            fresh, old = Path(name) / "new", Path(name) / "old"
            for path, content in files.items():
                (fresh / path).parent.mkdir(parents=True, exist_ok=True)
                (fresh / path).write_bytes(content)
            old.mkdir()
            for part in PARTS:
                if (output / part).exists():
                    shutil.move(output / part, old / part)
                if (fresh / part).exists():
                    (fresh / part).rename(output / part)
    return [output / path for path in files]


def make(runs: Sequence[Run], report: Report = lambda done, total: None) -> dict[str, bytes]:
    """The content of every file of the report, by its path in the folder."""
    seen = views(runs)
    parts = sections(seen)
    pictures = [picture for section in parts for picture in section.pictures]
    drawings = {}
    for number, picture in enumerate(pictures):
        report(number, len(pictures))
        drawings[picture.name] = draw(picture)
    tables = [table for section in parts for table in section.tables]
    title, lead, tiles = "Evaluation", _lead(runs, seen), _tiles(seen)
    texts = {
        MARKDOWN: _markdown(title, lead, parts),
        PAGE: page(title, lead, tiles, parts, {name: svg for name, (_, svg) in drawings.items()}),
        COUNTS: dump(runs),
        **{f"{TABLES}/{table.name}.csv": as_csv(table) for table in tables},
        **{f"{PICTURES}/{name}.svg": svg for name, (_, svg) in drawings.items()},
    }
    images = {f"{PICTURES}/{name}.png": png for name, (png, _) in drawings.items()}
    return {**{name: text.encode() for name, text in texts.items()}, **images}


def _lead(runs: Sequence[Run], seen: Sequence[View]) -> str:
    """Of what the report is, in a sentence or two."""
    targets = _listed(str(run.configuration["target"]["name"]) for run in runs)
    labels = _listed(view.label for view in seen if view.label)
    drafters = _listed(name for view in seen for name in view.drafters)
    tasks = _listed(view.title(task) for view in seen for task in view.tasks)
    temperatures = _listed(f"{view.temperature:g}" for view in seen)
    told = f"Target {targets}, drafters {drafters}{f' ({labels})' if labels else ''}, on {tasks}; T = {temperatures}."
    return f"{told} Acceptance length is tokens a decode step, the target's own included, everywhere."


def _listed(names: Iterable[str]) -> str:
    *rest, last = dict.fromkeys(names) or [""]
    return f"{', '.join(rest)} and {last}" if rest else last


def _tiles(seen: Sequence[View]) -> list[tuple[str, str]]:
    """The first figures that a reader looks for, of the first view; losslessness is that of all."""
    view = seen[0]
    tiles: list[tuple[str, str]] = []
    lengths, singles = _means(view, micro), view.singles()
    names = sorted(lengths, key=lambda one: -lengths[one])
    several = [one for one in names if one in view.variants(*ROUTING, MERGED)]
    for words, found in (("several drafters", several), ("a single drafter", [one for one in names if one in singles])):
        if found:
            told = f"tokens a step, mean over tasks ({view.name}): the best of {words}, {view.told(found[0])}"
            tiles.append((f"{lengths[found[0]]:.2f}", told))
    if names and (forwards := _means(view, forwards_per_token).get(names[0])) is not None:
        tiles.append((f"{forwards:.2f}", f"target forwards a token: {view.told(names[0])}; plain decoding has 1"))
    cells = [cell for view in seen for one in view.variants() for task in view.tasks if (cell := view.cell(one, task))]
    equal, turns = (sum(int(equal_to_plain(cell)[side].sum()) for cell in cells) for side in (0, 1))
    if turns:
        tiles.append((f"{equal:,} of {turns:,}", "turns answered as plain decoding does, token by token"))
    return tiles


def _means(view: View, figure: Figure) -> dict[str, float]:
    """Of the usual variants, each over all tasks and its drafter seeds, as the main table has it."""
    found = {one: mean_over([view.value(one, task, figure) for task in view.tasks]) for one in view.usual()}
    return {one: mean.value for one, mean in found.items() if mean is not None}


def _markdown(title: str, lead: str, parts: Sequence[Section]) -> str:
    text = [f"# {title}\n\n{lead}\n"]
    for section in parts:
        text.append(f"## {section.title}\n\n{section.text}\n")
        text += [_md_picture(picture) for picture in section.pictures]
        text += [markdown(table) for table in section.tables]
    return "\n".join(text)


def _md_picture(picture: Picture) -> str:
    return f"![{picture.title}]({PICTURES}/{picture.name}.png)\n\n{picture.caption}\n"
