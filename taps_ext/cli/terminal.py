"""What the commands share: options, models by name, progress bars, results, and text coloured by its proposers.

An option has one definition here, so that it is spelled the same and means the same in every command. Options that only
one command has stand in its file.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Annotated, Any, TypeVar

import torch
import transformers
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from typer import Argument, Option

from .. import tiny
from ..checkpoints.files import first_line, json_text
from ..checkpoints.load import loading, open_target
from ..decode.budget import CostTable
from ..evaluation.results import COSTS

T = TypeVar("T")
Report = Callable[[str, int, int | None], None]  # of progress: what is done, how many, and of how many

Target = Annotated[T, Option(help="Target model: directory or hub id; 'tiny' is the embedded one.")]
DRAFTER_HELP = (
    "Drafter as [NAME=]DIRECTORY-OR-HUB-ID; 'lookup' drafts what the text said before, for any target, and a directory "
    "of 'taps-ext index' what its texts said, too; embedded: tiny/math, tiny/chat. Repeatable."
)
Drafters = Annotated[list[str] | None, Option(help=DRAFTER_HELP)]
DrafterArgument = Annotated[T, Argument(metavar="DRAFTER", help="Directory or hub id; embedded: tiny/math, tiny/chat.")]
COMPOSITION_HELP = "How several drafters make one tree: single, confidence, entropy, evidence or merged."
Composition = Annotated[str, Option(help=COMPOSITION_HELP)]
Compositions = Annotated[list[str], Option(help=f"{COMPOSITION_HELP} Repeatable.")]
DRAFTING_HELP = "'coupled' drafts with the target's noise at temperatures above 0; 'topk' drafts the likeliest tokens."
Drafting = Annotated[str, Option(help=DRAFTING_HELP)]
Depth = Annotated[T, Option(help="Number of levels that a drafter drafts, below the root.")]
Branching = Annotated[T, Option(help="Number of children kept per expanded node.")]
MaxNodes = Annotated[T, Option(help="Number of nodes per drafter's tree, root included.")]
MergedNodes = Annotated[int | None, Option(help="Number of nodes kept in the merged tree. Default: the whole union.")]
Costs = Annotated[
    Path | None, Option("--costs", help="Costs by which trees adapt: a file of 'taps-ext tune', or a run.json.")
]
Extend = Annotated[bool, Option("--extend", help="Continue drafted paths with what followed them earlier in the text.")]
TEMPERATURE_HELP = "Sampling temperature; 0 is greedy decoding."
Temperature = Annotated[float, Option(help=TEMPERATURE_HELP)]
Temperatures = Annotated[list[float], Option(help=f"{TEMPERATURE_HELP} Repeatable.")]
Seed = Annotated[int, Option(help="Random seed; the same seed gives the same result.")]
MaxNewTokens = Annotated[int, Option(min=1, help="Maximum number of new tokens per text or answer.")]
BatchSize = Annotated[int, Option(help="Number of texts decoded together.")]
Prompts = Annotated[Path | None, Option(help='File of your own prompts, JSON Lines: {"prompt": "..."}.')]
Limit = Annotated[T, Option(min=1, help="Maximum number of prompts; in demo and evaluate: from each domain or task.")]
Data = Annotated[list[str], Option(help="Conversations: a file, directory or data set of the hub. Repeatable.")]
ChatTemplate = Annotated[str | None, Option(help="Jinja file of the chat template. Default: the tokenizer's.")]
SystemPrompt = Annotated[str | None, Option(help="System prompt for conversations that have none.")]
Dtype = Annotated[str, Option(help="Data type: float32, bfloat16, float16, or auto (as stored).")]
DEVICE_HELP = "cpu, cuda or cuda:NUMBER. Default: a GPU if there is one and its ops are built, else cpu."
Device = Annotated[str | None, Option(help=DEVICE_HELP)]
Output = Annotated[T, Option("--output", "-o", help="Path to write the result to.")]
AsJson = Annotated[bool, Option("--json", help="Print the result as one JSON object and nothing else.")]
DRY_RUN_HELP = "Report what the run would take (time, memory, disk); write nothing."
DryRun = Annotated[bool, Option("--dry-run", help=DRY_RUN_HELP)]

DTYPES = ("auto", "float32", "bfloat16", "float16")
PLAIN: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0)}  # of tables
PIPE_WIDTH = 200  # columns, where stdout is no terminal
COLOURS = ("bright_cyan", "bright_magenta", "bright_yellow", "bright_blue", "bright_red")
SEVERAL = "bright_green"
STOPPED = 130  # the exit code after Ctrl-C: for scripts, neither success nor failure
LOADING_AFTER_S = 5.0
LINE_EVERY_S = 30.0  # where stderr is no terminal
UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a longer character to


# ---- what is loaded


def check_dtype(dtype: str) -> str:
    """Return `dtype`; raise ValueError for an unknown one."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    return dtype


def encode(tokenizer: Any, messages: Sequence[dict[str, str]], raw: bool = False) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of chat messages, through the chat template if there is one.

    Raise ValueError where the template refuses them.
    """
    if raw or not getattr(tokenizer, "chat_template", None):
        encoded = tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt")
    else:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and raises anything
            raise ValueError(
                f"the tokenizer's chat template refuses the prompt: {first_line(error)}; give --raw"
            ) from error
        encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def note_without_template(tokenizer: Any) -> None:
    """Say if prompts are decoded as they are, since the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        note("the tokenizer has no chat template, so that prompts are decoded as they are")


def load_target_and_tokenizer(target: str, dtype: str, device: Any) -> tuple[Any, Any]:
    """Load a target (directory, hub id or `tiny`) in evaluation mode on a device, and its tokenizer."""
    chosen = None if check_dtype(dtype) == "auto" else getattr(torch, dtype)
    model: Any
    if target == tiny.TINY:
        model, tokenizer = tiny.load_target()
    else:
        open_target(target)  # raises an error of one sentence if there is none
        with loading(f"the tokenizer of the target {target}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(target)
        with loading(f"the target {target}"), noting_later(f"loading {target}"):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained
            model, report = loaded(target, dtype=chosen or "auto", output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"the target {target} lacks weights that its config asks for, such as {missing[0]}")
    return model.to(device=device, dtype=chosen).eval(), tokenizer


def drafter_folders(target: str, drafters: Sequence[str] | None) -> dict[str, str]:
    """Return the directory or hub id of each drafter by name; without any, the embedded target has its own."""
    if not drafters and target != tiny.TINY:
        raise ValueError(
            "give at least one drafter: --drafter NAME=DIRECTORY-OR-HUB-ID, or --drafter lookup, which needs no files "
            "(the embedded ones are for --target tiny)"
        )
    paths: dict[str, str] = {}
    for entry in drafters or [f"{tiny.TINY}/{name}" for name in tiny.drafter_paths()]:
        name, path = entry.split("=", 1) if "=" in entry else (Path(entry).name, entry)
        if not (name and path):
            raise ValueError(f"--drafter must be NAME=DIRECTORY-OR-HUB-ID, got {entry!r}")
        if name in paths:
            raise ValueError(f"the drafter name {name!r} is given twice; names must differ")
        paths[name] = tiny.resolve(path)
    return paths


def read_costs(path: Path | None) -> CostTable | None:
    """Return the costs that `tune` wrote to a file, or those that an evaluation recorded in its run.json."""
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return CostTable.from_dict(values.get(COSTS, values) if isinstance(values, dict) else values)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise ValueError(
            f"--costs {path} holds no costs ({reason}); give a file of taps-ext tune -o, or the run.json of "
            "an evaluation with a variant that adapts"
        ) from error


# ---- what is printed: results on stdout, everything else on stderr, by one process of a launch


def process_index() -> int:
    """Return the index of this process in its launch (torchrun, accelerate launch); the main process, 0, prints."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def progress(what: str = "loading") -> Iterator[Report]:
    """Show a bar on stderr, or lines if it is no terminal; call the value with what is done, how many, of how many."""
    if process_index() or not sys.stderr.isatty():
        yield TimedLines(note)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda what, done, total: bars.update(bar, description=what, completed=done, total=total)


class TimedLines:
    """A line about every 30 s on how far long work is, and the time left at the speed since the line before."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._last_line = self._since = clock()
        self._done: int | None = None  # at the time `_since`; a run that resumes does not begin with 0

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Receive how much of the work is done (total None: of an unknown amount); call it as often as you like."""
        now = self._clock()
        if self._done is None or done < self._done:  # the first or next stage of the work
            self._since, self._done = now, done
        if now - self._last_line >= LINE_EVERY_S:
            sentence = f"{what}: {done:,}" if total is None else f"{what}: {done:,} of {total:,}"
            if total is not None and done > self._done:
                left = (now - self._since) / (done - self._done) * (total - done)
                sentence += f", {duration(left)} left"
            self._say(sentence)
            self._last_line, self._since, self._done = now, now, done


def note(*sentences: str) -> None:
    """Print lines on stderr."""
    for sentence in () if process_index() else sentences:
        print(sentence, file=sys.stderr, flush=True)


@contextmanager
def noting_later(sentence: str) -> Iterator[None]:
    """Print a line on stderr if the block takes long."""
    timer = Timer(LOADING_AFTER_S, note, [sentence])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def show(as_json: bool, facts: dict[str, Any], *parts: RenderableType) -> None:
    """Print a result on stdout: `facts` as JSON for programs, or `parts` for people."""
    if process_index():
        return
    if as_json:
        print(json_text(facts))
        return
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, (str, Text)))


# ---- text in the colours of its proposers


@dataclass(frozen=True)
class Span:
    """A piece of text and the drafters that proposed its tokens: none (the target's own token), one, or several."""

    text: str
    proposers: tuple[str, ...]


class Transcript:
    """Turn the tokens of one row into text as they arrive; hold tokens back while a character is unfinished."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._tokens: list[int] = []
        self._window = 0  # decoding starts here: a token's text depends on the one before it (leading spaces)
        self._shown = 0  # tokens whose text has been returned

    def add(self, tokens: Sequence[int], proposers: Sequence[Sequence[str]]) -> list[Span]:
        """Return the spans that a step adds; `proposers` has one entry per accepted draft token."""
        spans = []
        for index, token in enumerate(tokens):
            self._tokens.append(int(token))
            names = tuple(proposers[index]) if index < len(proposers) else ()
            spans.append(Span(self._new_text(), names))
        return join_spans(spans)

    def finish(self) -> list[Span]:
        """Return the text that is still held back when no more tokens come: an unfinished character, if any."""
        return join_spans([Span(self._new_text(final=True), ())])

    def _new_text(self, final: bool = False) -> str:
        before: str = self._decode(self._tokens[self._window : self._shown])
        after: str = self._decode(self._tokens[self._window :])
        if after.endswith(UNFINISHED) and not final:
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return after[len(before) :]


def join_spans(spans: Iterable[Span]) -> list[Span]:
    """Join neighbours of the same proposers and drop empty spans; the text stays the same."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].proposers == span.proposers:
            joined[-1] = Span(joined[-1].text + span.text, span.proposers)
        elif span.text:
            joined.append(span)
    return joined


class Palette:
    """Colour text by proposer: one colour per drafter, one for several; the target's own tokens have none."""

    def __init__(self, drafters: Sequence[str]) -> None:
        self._styles = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(drafters)}

    def style(self, proposers: Sequence[str]) -> str:
        """Return the style of a token with these proposers."""
        if len(proposers) > 1:
            return SEVERAL
        return self._styles[proposers[0]] if proposers else ""

    def text(self, spans: Iterable[Span], has_colours: bool = True) -> Text:
        """Return the spans in colour, or without colours in brackets that name the drafters."""
        text = Text()
        for span in spans:
            if has_colours or not span.proposers:
                text.append(span.text, style=self.style(span.proposers))
            else:
                text.append(f"[{'+'.join(span.proposers)}:{span.text}]")
        return text

    def legend(self, has_colours: bool = True) -> Text:
        """Return what the colours or the brackets mean."""
        if not has_colours:
            return Text("[drafters: accepted draft], everything else is the target's own")
        names = [*self._styles.items()]
        if len(names) > 1:
            names.append(("several" if len(names) > 2 else "both", SEVERAL))
        legend = Text("proposed by ")
        for name, style in names:
            legend.append(name, style=style).append("  ")
        return legend.append("the target's own token")


def has_colours(console: Console) -> bool:
    """Return whether the console shows colours."""
    return console.is_terminal and console.color_system is not None and not console.no_color


# ---- figures


def number(value: float) -> str:
    """Return a figure with two decimals, or a dash for a mean of nothing."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def percent(share: float) -> str:
    """Return a share in percent, or a dash for a share of nothing."""
    return "-" if math.isnan(share) else f"{share:.0%}"


def duration(seconds: float) -> str:
    """Return a time in the two largest units that matter: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def facts_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and facts."""
    table = Table(show_header=False, **PLAIN)
    for row in rows:
        table.add_row(*row)
    return table
