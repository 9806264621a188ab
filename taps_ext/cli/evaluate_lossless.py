"""taps-ext check-lossless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..tiny import TINY
from .common import DEVICE_HELP, JSON_HELP, drafter_folders, keep_logs_clean, load_target, progress, target_config
from .generate import DRAFTING_HELP

if TYPE_CHECKING:
    from ..evaluation.divergence import Divergence
    from ..evaluation.lossless_report import FrequencyCheck, LosslessReport, TextCheck
    from ..evaluation.tasks import Question
    from ..target.model import TargetModel

SENTENCES = (
    "What is the difference between weather and climate?",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Explain your steps.",
    "Write a short poem about a lighthouse in winter.",
    "Explain to a ten-year-old why the sky is blue.",
    "List five things to check before renting a flat.",
    "If 3 pens cost 4.50, what do 7 pens cost?",
    "Write a Python function that tells whether a word is a palindrome.",
    "Summarise in two sentences what photosynthesis does.",
)
MOST_DIVERGENCES = 12  # shown; --json has all
STYLES = {"equal": "green", "as expected": "green", "near-ties": "yellow"}
FAULT = "bold red"


def check_lossless(
    target: Annotated[str, typer.Option(help="Folder or hub id of the target; 'tiny' is the embedded one.")] = TINY,
    drafter: Annotated[
        list[str] | None, typer.Option(help="[NAME=]FOLDER-OR-HUB-ID, repeatable; tiny/math, tiny/chat.")
    ] = None,
    composition: Annotated[
        list[str] | None,
        typer.Option(help="single, confidence, entropy, evidence or merged; repeatable; default: all."),
    ] = None,
    merged_nodes: Annotated[
        int | None, typer.Option(help="Node budget of the merged tree; default: the union.")
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable; default: 0, 0.5 and 1.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Your own prompts, a file of JSON lines; default: built-in ones.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many of the prompts, evenly spread.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Of the longest texts.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 8,
    draws: Annotated[
        int, typer.Option(help="For the frequencies of the first tokens; 20000 is a strong check, 0 none.")
    ] = 1000,
    depth: Annotated[int, typer.Option(help="Levels that a drafter drafts.")] = 6,
    branching: Annotated[int, typer.Option(help="Children per expanded node.")] = 10,
    max_nodes: Annotated[int, typer.Option(help="Nodes of a drafter's tree, root included.")] = 60,
    drafting: Annotated[str, typer.Option(help=DRAFTING_HELP)] = "coupled",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Check that your drafters leave your target's text as it is; exit code 1 if they do not.

    Greedy texts and texts drawn with the same noise must equal plain decoding's, and the first tokens of many draws
    must come as often as the target's probabilities say. In bfloat16 and float16 texts may part at near-ties: these
    are shown with the logits there, and told apart from faults. A thousand draws find only a coarse fault in the
    frequencies; --draws 20000 is the strong check.
    """
    from ..checkpoints import load_drafters
    from ..decode.decoder import check_drafting
    from ..device import choose
    from ..evaluation import contestants, lossless, lossless_report
    from ..target.model import TargetModel
    from ..tree import TreeShape

    settings = lossless_report.LosslessSettings(
        temperatures=tuple(temperature or lossless_report.TEMPERATURES),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        num_draws=draws,
        seed=seed,
        shape=TreeShape(depth, branching, max_nodes),
    )
    paths = drafter_folders(target, drafter or [])
    ways = lossless.make_ways(list(paths), composition or [], check_drafting(drafting), merged_nodes)
    questions, place = _questions(target, prompts, limit), choose(device)
    contestants.check_drafters(paths, target_config(target))
    keep_logs_clean()
    with progress() as bars:
        bar = bars.add_task("loading", total=lossless.count_units(ways, len(questions), settings))
        model, tokenizer = load_target(target, dtype, place)
        taken = TargetModel(model)
        report = lossless.check_lossless(
            taken,
            load_drafters(paths, taken),
            ways,
            _encoded(tokenizer, questions, taken, max(max_new_tokens, settings.num_first_tokens)),
            settings,
            lambda done: bars.update(bar, advance=1, description=done),
        )
    if as_json:
        from ..checkpoints.files import json_text

        print(json_text(report.to_dict()))
    else:
        Console(highlight=False, soft_wrap=True).print(_page(report, tokenizer))
    if not report.passed:
        raise typer.Exit(1)


def _questions(target: str, prompts: Path | None, limit: int) -> list[Question]:
    from ..evaluation.tasks import TASKS, Question, load_prompts

    if prompts is not None:
        return load_prompts(prompts, limit)
    if target == TINY:
        chat = limit // 2
        math = TASKS["tiny_math"].load(limit=limit - chat)
        return [*math, *(TASKS["tiny_chat"].load(limit=chat) if chat else [])]
    built_in = [Question(str(number), "built-in", (text,)) for number, text in enumerate(SENTENCES)]
    return built_in[:limit]


def _encoded(
    tokenizer: Any, questions: Sequence[Question], target: TargetModel, max_new_tokens: int
) -> list[list[int]]:
    """The tokens of the questions' first turns; ValueError where one leaves the target no room for its text."""
    from ..evaluation.prompting import refuse_long

    found = []
    for question in questions:
        found.append(_encode(tokenizer, question))
        refuse_long(question, len(found[-1]) + max_new_tokens, target)
    return found


def _encode(tokenizer: Any, question: Question) -> list[int]:
    """The tokens of a question's first turn: through the chat template where there is one, else as it is."""
    from ..evaluation.prompting import Prompter

    if getattr(tokenizer, "chat_template", None):
        return Prompter(tokenizer).encode(question, [])
    texts = [*(message["content"] for message in question.history), question.turns[0]]
    tokens: list[int] = tokenizer("\n".join(texts))["input_ids"]
    return tokens


def _page(report: LosslessReport, tokenizer: Any) -> Group:
    """The verdicts, the places where texts part, and what to make of it."""
    parts: list[RenderableType] = [_verdicts(report), *_drawn(report), Text(), *_divergences(report, tokenizer)]
    style = FAULT if not report.passed else "bold green" if report.verdict == "lossless" else "bold yellow"
    parts += [Text(report.verdict, style=style), *map(Text, report.notes)]
    return Group(*parts)


def _drawn(report: LosslessReport) -> list[Text]:
    """What the frequencies are of: all rows of the same noise, so that several are no more evidence than one."""
    return [
        Text(
            f"first tokens: {report.settings.num_first_tokens} in each of {one.num_draws} draws at T = "
            f"{one.temperature:g}, with the same noise in each row"
        )
        for one in report.frequencies[:1]
    ]


def _verdicts(report: LosslessReport) -> Table:
    """A row a way: its texts at each temperature, and the frequencies of its first tokens."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("texts equal\nto plain's", no_wrap=True)
    for temperature in report.settings.temperatures:
        table.add_column(f"\nT = {temperature:g}", no_wrap=True)
    table.add_column("acceptance\nlength", justify="right", no_wrap=True)
    if report.frequencies:
        table.add_column("first tokens\nchi-square", no_wrap=True)
        table.add_column("\np-value", no_wrap=True)
    frequencies = {check.way: check for check in report.frequencies}
    for way in dict.fromkeys([*frequencies, *(check.way for check in report.texts)]):
        checks = [check for check in report.texts if check.way == way]
        cells = [_text_cell(check) for check in checks] or [Text("")] * len(report.settings.temperatures)
        lengths = [check.acceptance_length for check in checks if not math.isnan(check.acceptance_length)]
        length = f"{sum(lengths) / len(lengths):.2f}" if lengths else ""
        table.add_row(way, *cells, length, *(_frequency_cells(frequencies[way]) if way in frequencies else ()))
    return table


def _text_cell(check: TextCheck) -> Text:
    equal = f"{check.num_texts - len(check.divergences)}/{check.num_texts}"
    words = equal if check.verdict == "equal" else f"{equal} {check.verdict}"
    return Text(words, style=STYLES.get(check.verdict, FAULT))


def _frequency_cells(check: FrequencyCheck) -> tuple[str, Text]:
    is_expected = "" if check.verdict == "as expected" else f", {check.verdict}"
    words = Text(f"{check.test.p_value:.2g}{is_expected}", style=STYLES.get(check.verdict, FAULT))
    return f"{check.test.statistic:.1f} in {check.test.num_cells} cells", words


def _divergences(report: LosslessReport, tokenizer: Any) -> list[Text]:
    """Where texts part, faults first, and what the logits say there."""
    found = [(check, one) for check in report.texts for one in check.divergences]
    found.sort(key=lambda pair: pair[1].is_near_tie)
    lines = []
    for check, one in found[:MOST_DIVERGENCES]:
        here, plain = (_spelled(tokenizer, token) for token in (one.token, one.plain_token))
        where = f"{check.way}, T = {check.temperature:g}, text {one.row}, token {one.place}: {here} instead of {plain}"
        style = "yellow" if one.is_near_tie else FAULT
        lines.append(Text.assemble((where, style), f"\n  {_reason(one, here, report.dtype)}"))
    if len(found) > MOST_DIVERGENCES:
        lines.append(Text(f"... and {len(found) - MOST_DIVERGENCES} more; --json has all"))
    return [*lines, Text()] if lines else []


def _reason(one: Divergence, token: str, dtype: str) -> str:
    evidence = one.evidence
    if evidence is None:
        return "fault: one text goes on and the other does not, which no rounding explains"
    leads = f"{token} leads by {evidence.tree_lead:+.4g} in the tree, by {evidence.plain_lead:+.4g} in the plain step"
    apart, rounding = (value / evidence.spacing for value in (evidence.difference, evidence.rounding))
    logits = f"their logits are up to {apart:.3g} spacings of {dtype} apart, and rounding moves them by {rounding:.3g}"
    if one.is_near_tie:
        return f"near-tie: {leads}; {logits}"
    is_drawn = "the tree's logits are not the target's" if evidence.is_drawn else "not what these logits draw"
    return f"fault, {is_drawn}: {leads}; {logits}"


def _spelled(tokenizer: Any, token: int | None) -> str:
    return "the end" if token is None else repr(tokenizer.decode([token]))
