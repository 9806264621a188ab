"""taps-ext demo | generate | info."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..checkpoints.files import json_text
from ..tiny import TINY
from .common import DEVICE_HELP, JSON_HELP, drafter_folders, keep_logs_clean, load_target, progress

if TYPE_CHECKING:
    from ..decode.decoder import GenerationResult, SpeculativeDecoder
    from ..decode.state import StepEvent
    from .terminal import Palette

DRAFTING_HELP = "coupled: look at the target's noise above temperature 0; topk: propose what is likely."


def demo(
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts per domain.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 96,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the prompts and of the noise.")] = 0,
    drafting: Annotated[str, typer.Option(help=DRAFTING_HELP)] = "coupled",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    output: Annotated[Path, typer.Option(help="Folder for demo.json and the picture.")] = Path("out/demo"),
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Two specialist drafters and their compositions on the embedded models, beside plain decoding."""
    from ..device import choose
    from . import demo as demonstration
    from . import demo_report, terminal

    keep_logs_clean()
    settings = demonstration.DemoSettings(prompts, max_new_tokens, temperature, seed, str(choose(device)), drafting)
    with progress() as bars:
        bar = bars.add_task("loading", total=demonstration.count_reports(settings))
        result = demonstration.run(settings, lambda done: bars.update(bar, advance=1, description=f"{done} prompts"))
    files = demo_report.save(result, output)
    if as_json:
        print(json_text(result.to_dict()))
        return
    console = Console(highlight=False)
    console.print(terminal.demo_report(result, console))
    for path in files:
        print(f"wrote {path}")


def generate(
    target: Annotated[str, typer.Option(help="Folder or hub id of the target; 'tiny' is the embedded one.")] = TINY,
    drafter: Annotated[
        list[str] | None, typer.Option(help="[NAME=]FOLDER-OR-HUB-ID, repeatable; tiny/math, tiny/chat.")
    ] = None,
    composition: Annotated[str, typer.Option(help="single, confidence, entropy, evidence or merged.")] = "merged",
    single_drafter: Annotated[str | None, typer.Option(help="The drafter that 'single' uses.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt; without it and --prompt-file: standard input.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the tokenizer's chat template out.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The text is a function of target, prompt and seed.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End with the token that completes this text; repeatable.")
    ] = None,
    depth: Annotated[int, typer.Option(help="Levels that a drafter drafts.")] = 6,
    branching: Annotated[int, typer.Option(help="Children per expanded node.")] = 10,
    max_nodes: Annotated[int, typer.Option(help="Nodes of a drafter's tree, root included.")] = 60,
    merged_nodes: Annotated[
        int | None, typer.Option(help="Node budget of the merged tree; default: the union.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(help="Drop nodes less probable than exp of this, such as -5.")
    ] = None,
    drafting: Annotated[str, typer.Option(help=DRAFTING_HELP)] = "coupled",
    evidence_decay: Annotated[
        float | None, typer.Option(help="What a token leaves of it; default 0.95. 0: none in 'merged'.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Stream a text, each accepted run in the colour of the drafter that proposed it, then the figures."""
    text = _read_prompt(prompt, prompt_file)
    from ..checkpoints import load_drafters
    from ..composition import make_composition
    from ..decode.decoder import SpeculativeDecoder, check_drafting
    from ..device import choose
    from ..sampling import SamplingParams
    from ..tree import TreeShape

    place = choose(device)
    make_composition(
        composition, merged_nodes, evidence_decay
    )  # a wrong name should not wait for a large target to load
    check_drafting(drafting)
    sampling = SamplingParams(temperature, top_k, top_p, min_p, seed)
    shape = TreeShape(depth, branching, max_nodes, min_score)
    paths = drafter_folders(target, drafter or [])
    if composition == "single" and len(paths) > 1 and single_drafter not in paths:
        raise ValueError(f"--composition single needs --single-drafter, one of {', '.join(paths)}")
    keep_logs_clean()
    model, tokenizer = load_target(target, dtype, place)
    decoder = SpeculativeDecoder(
        model,
        load_drafters(paths, model),
        composition,
        drafter=single_drafter,
        shape=shape,
        max_nodes=merged_nodes,
        drafting=drafting,
        evidence_decay=evidence_decay,
    )
    inputs = {**_encode(tokenizer, text, raw), "sampling": sampling, "max_new_tokens": max_new_tokens}
    inputs |= {"stop_strings": stop, "tokenizer": tokenizer}
    if as_json:
        _print_json(decoder, tokenizer, text, inputs)
    else:
        _stream(decoder, tokenizer, inputs)


def info(as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False) -> None:
    """Versions, what was built and why, and what torch finds on this machine."""
    from .. import info as installation
    from . import terminal

    facts = installation.collect()
    if as_json:
        print(json_text(facts.to_dict()))
    else:
        Console(highlight=False, soft_wrap=True).print(terminal.info_table(facts))


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    if prompt_file is not None:
        prompt = prompt_file.read_text(encoding="utf-8")
    elif prompt is None:
        if sys.stdin.isatty():
            print("reading the prompt from standard input, end it with Ctrl-D", file=sys.stderr)
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise ValueError("the prompt is empty; give --prompt, --prompt-file or text on standard input")
    return prompt


def _encode(tokenizer: Any, text: str, raw: bool) -> dict[str, Any]:
    """The prompt as `input_ids` and `attention_mask`: a user's turn where the tokenizer knows chats, else as it is."""
    if not raw and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text.strip()}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        encoded = tokenizer(text, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _print_json(decoder: SpeculativeDecoder, tokenizer: Any, prompt: str, inputs: dict[str, Any]) -> None:

    started = time.perf_counter()
    out = decoder.generate(**inputs)
    seconds = time.perf_counter() - started
    fields = {
        "prompt": prompt,
        "text": tokenizer.decode(out.new_tokens[0], skip_special_tokens=True),
        "new_tokens": out.new_tokens[0],
        "finish_reason": out.finish_reasons[0],
        "seconds": seconds,
        "stats": out.stats.to_dict(),
    }
    print(json_text(fields))


def _stream(decoder: SpeculativeDecoder, tokenizer: Any, inputs: dict[str, Any]) -> None:
    from . import terminal

    console = Console(highlight=False, soft_wrap=True)
    palette = terminal.Palette(list(decoder.drafters))
    started = time.perf_counter()
    result = _print_steps(decoder.stream(**inputs), tokenizer, palette, console)
    seconds = time.perf_counter() - started
    if terminal.has_colours(console):
        console.print(palette.legend())
    console.print(terminal.stats_table(result.stats, seconds))


def _print_steps(
    events: Generator[StepEvent, None, GenerationResult], tokenizer: Any, palette: Palette, console: Console
) -> GenerationResult:
    """Print each step's text as it comes; what is left is the generator's result."""
    from .transcript import Transcript

    transcript = Transcript(tokenizer)
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            console.print(palette.text(transcript.finish()))
            console.print()
            result: GenerationResult = end.value
            return result
        console.print(palette.text(transcript.add(event.new_tokens[0], event.accepted_proposers[0])), end="")
