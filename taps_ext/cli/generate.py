"""taps-ext generate | tune | info."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import native
from ..checkpoints import CorpusStore, load_drafters
from ..checkpoints.corpus import tokenizer_fingerprint
from ..checkpoints.files import check_writable, json_text, write_text
from ..composition import make_composition
from ..decode.budget import CostTable
from ..decode.decoder import GenerationResult, SpeculativeDecoder, check_drafting
from ..decode.stats import DecodeStats
from ..native import choose_device
from ..sampling import SamplingParams
from ..target.end_tokens import end_tokens
from ..tiny import TINY
from ..tree import TreeShape
from . import terminal
from .terminal import facts_table, show


def generate(
    target: terminal.Target[str] = TINY,
    drafter: terminal.Drafters = None,
    composition: terminal.Composition = "merged",
    single_drafter: Annotated[str | None, typer.Option(help="Name of the drafter that 'single' uses.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt text. Without it and --prompt-file, standard input is read.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text of one prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the tokenizer's chat template.")] = False,
    max_new_tokens: terminal.MaxNewTokens = 128,
    temperature: Annotated[float | None, typer.Option(help=terminal.TEMPERATURE_HELP)] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens; 0 is off.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this probability; 1 is off.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less probable than this times the likeliest; 0 is off.")
    ] = None,
    seed: terminal.Seed = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End with the token that completes this text. Repeatable.")
    ] = None,
    depth: terminal.Depth[int | None] = None,
    branching: terminal.Branching[int | None] = None,
    max_nodes: terminal.MaxNodes[int | None] = None,
    merged_nodes: terminal.MergedNodes = None,
    min_score: Annotated[
        float | None, typer.Option(help="Drop nodes whose path has a log-probability below this, such as -5.")
    ] = None,
    drafting: terminal.Drafting = "coupled",
    evidence_decay: Annotated[
        float | None,
        typer.Option(help="Factor by which evidence fades per token; 0 turns it off in 'merged'. Default: 0.95."),
    ] = None,
    costs: terminal.Costs = None,
    extend: terminal.Extend = False,
    store: Annotated[
        Path | None, typer.Option(help="With --extend: corpus store of 'taps-ext index' that continues each root, too.")
    ] = None,
    dtype: terminal.Dtype = "auto",
    device: terminal.Device = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Generate a text, streamed in the colours of the drafters that proposed each piece, then print the figures.

    The text is a function of target, prompt and seed: no drafter or composition changes it. Without --temperature the
    target's generation config decides whether and how the text is sampled. Without --depth, --branching and
    --max-nodes each step takes the tree that pays best by what a step costs on this machine, which is measured at the
    first use, in a few seconds.
    """
    text, place = _read_prompt(prompt, prompt_file), choose_device(device)
    sampling = _sampling({"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}, seed)
    options: dict[str, Any] = {
        "shape": _shape({"depth": depth, "branching": branching, "max_nodes": max_nodes, "min_score": min_score}),
        "drafter": single_drafter,
        "max_nodes": merged_nodes,
        "drafting": check_drafting(drafting),
        "evidence_decay": evidence_decay,
        "costs": terminal.read_costs(costs),
        "extend": extend,
    }
    make_composition(composition, merged_nodes, evidence_decay)  # checks it before a large target is loaded
    if store is not None and not extend:
        raise ValueError(f"--store goes with --extend; to draft from the store, give --drafter NAME={store}")
    paths = terminal.drafter_folders(target, drafter)
    if composition == "single":
        _check_single(single_drafter, list(paths))
    model, tokenizer = terminal.load_target_and_tokenizer(target, dtype, place)
    options["store"] = _open_store(store, model, tokenizer)
    decoder = SpeculativeDecoder(model, load_drafters(paths, model, tokenizer), composition, **options)
    inputs = _inputs(model, tokenizer, text, raw, max_new_tokens)
    ends = end_tokens(model, tokenizer)
    inputs |= {"sampling": sampling, "stop_strings": stop, "tokenizer": tokenizer, "eos_token_id": list(ends.values())}
    inputs["num_return_sequences"] = 1
    torch.manual_seed(seed)  # of the noise where the generation config samples
    started = time.perf_counter()
    result = decoder.generate(**inputs) if as_json else _stream(decoder, tokenizer, inputs)
    seconds = time.perf_counter() - started
    facts = {
        "prompt": text,
        "text": tokenizer.decode(result.new_tokens[0], skip_special_tokens=True),
        "new_tokens": result.new_tokens[0],
        "finish_reason": result.finish_reasons[0],
        "end_tokens": ends,
        "seconds": seconds,
        "stats": result.stats.to_dict(),
    }
    show(as_json, facts, facts_table(_figures(result.stats, seconds)))


def tune(
    target: terminal.Target[str] = TINY,
    drafter: terminal.Drafters = None,
    batch_size: terminal.BatchSize = 1,
    dtype: terminal.Dtype = "auto",
    device: terminal.Device = None,
    output: terminal.Output[Path | None] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Measure what the parts of a decode step cost on this machine, and keep the figures for later calls.

    Steps whose tree adapts use them. A file written with --output can be given to --costs of generate and evaluate,
    so that another run takes the same trees.
    """
    paths, place = terminal.drafter_folders(target, drafter), choose_device(device)
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    if output is not None:
        check_writable(output.parent)
        if output.is_dir():
            raise ValueError(f"--output {output} is a directory; give the name of a file")
    model, tokenizer = terminal.load_target_and_tokenizer(target, dtype, place)
    table = SpeculativeDecoder(model, load_drafters(paths, model, tokenizer)).cost_table(batch_size, measure=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json_text(table.to_dict()))
    show(as_json, table.to_dict(), *_cost_tables(table))


def _cost_tables(table: CostTable) -> Iterator[Table]:
    """Yield the costs as tables, with bars."""
    plain, most = table.step_ms[0], max(table.step_ms)
    steps = Table("nodes per row", "step, ms", "times one node", "", **terminal.PLAIN)
    for size, ms in zip(table.sizes, table.step_ms, strict=True):
        steps.add_row(str(size), f"{ms:.1f}", f"{ms / plain:.2f}", "#" * round(40 * ms / most))
    yield steps
    drafting = Table("drafter", "first level, ms", "further level, ms", **terminal.PLAIN)
    for name, (first, more) in table.draft_ms.items():
        drafting.add_row(name, f"{first:.1f}", f"{more:.1f}")
    yield drafting


def info(as_json: terminal.AsJson = False) -> None:
    """Print versions, what was built and why, and what torch finds on this machine."""
    facts = native.installation()
    show(as_json, facts.to_dict(), _info_table(facts))


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    if prompt_file is not None:
        if not prompt_file.is_file():
            raise ValueError(f"--prompt-file {prompt_file} is not a file; give a file with the text of one prompt")
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {prompt_file} is not UTF-8 text ({error.reason}); convert it") from error
    elif prompt is None:
        if sys.stdin.isatty():
            print("reading the prompt from standard input, end it with Ctrl-D", file=sys.stderr)
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise ValueError("the prompt is empty; give --prompt, --prompt-file or text on standard input")
    return prompt


def _shape(limits: dict[str, Any]) -> TreeShape:
    """Return a shape of the sizes that were given, or one that adapts if none was."""
    given = {name: value for name, value in limits.items() if value is not None}
    sizes = given.keys() - {"min_score"}
    return TreeShape(**given) if sizes else replace(TreeShape.auto(), **given)


def _open_store(path: Path | None, model: Any, tokenizer: Any) -> CorpusStore | None:
    if path is None:
        return None
    return CorpusStore(path, model.config.get_text_config().vocab_size, tokenizer_fingerprint(tokenizer))


def _sampling(options: dict[str, Any], seed: int) -> SamplingParams | None:
    """Return what the options ask for; None if they ask for nothing: then the generation config decides."""
    filters = {name: value for name, value in options.items() if value is not None}
    sampling = SamplingParams(**filters, seed=seed)  # checks the seed, whoever draws with it
    if not filters:
        return None
    if "temperature" not in filters:
        raise ValueError(f"--{next(iter(filters)).replace('_', '-')} filters what is sampled; give --temperature too")
    return sampling


def _check_single(drafter: str | None, names: Sequence[str]) -> None:
    """Raise ValueError unless it is clear which drafter 'single' uses."""
    if len(names) > 1 and drafter not in names:
        given = "" if drafter is None else f", got {drafter!r}"
        raise ValueError(f"--composition single needs --single-drafter, one of {', '.join(names)}{given}")


def _inputs(model: Any, tokenizer: Any, text: str, raw: bool, max_new_tokens: int) -> dict[str, Any]:
    """Return the encoded prompt and its limit; raise ValueError for a text that leaves the target's context."""
    if not raw:
        terminal.note_without_template(tokenizer)
    inputs = terminal.encode(tokenizer, [{"role": "user", "content": text if raw else text.strip()}], raw)
    length = inputs["input_ids"].shape[1] + max_new_tokens
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(
            f"prompt and new tokens can reach {length} tokens, and the target's context is {context}; shorten the "
            "prompt, or lower --max-new-tokens"
        )
    return {**inputs, "max_new_tokens": max_new_tokens}


def _stream(decoder: SpeculativeDecoder, tokenizer: Any, inputs: dict[str, Any]) -> GenerationResult:
    """Print the text of each step as it arrives, and what the colours mean."""
    console = Console(highlight=False, soft_wrap=True)
    palette, transcript = terminal.Palette(decoder.proposers), terminal.Transcript(tokenizer)
    events = decoder.stream(**inputs)
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            result: GenerationResult = end.value
            break
        console.print(palette.text(transcript.add(event.new_tokens[0], event.accepted_proposers[0])), end="")
    console.print(palette.text(transcript.finish()), end="\n\n")
    if terminal.has_colours(console):
        console.print(palette.legend())
    return result


def _figures(stats: DecodeStats, seconds: float) -> Iterator[tuple[str, str]]:
    """Yield the figures of one generation."""
    num_tokens, shares = sum(stats.num_tokens), stats.proposer_share
    yield "speed", f"{num_tokens / seconds:.1f} tokens/s, prefill included"
    yield "acceptance length", f"{terminal.number(stats.acceptance_length)} tokens a step"
    yield "target forwards", f"{stats.num_target_forwards} for {num_tokens} tokens, prefill included"
    yield "accepted by depth", "  ".join(f"{share:.0%}" for share in stats.acceptance_by_depth) or "none"
    yield "proposed by", "  ".join(f"{name} {terminal.percent(share)}" for name, share in shares.items())
    if stats.choice_share:
        yield "chosen", "  ".join(f"{name} {share:.0%}" for name, share in stats.choice_share.items())


def _info_table(facts: native.Installation) -> Table:
    cuda, built = facts.cuda, facts.native
    gpus = [f"{gpu.name} ({gpu.capability})" + ("" if gpu.has_kernels else ": no CUDA ops for it") for gpu in cuda.gpus]
    rows = [("taps_ext", facts.taps_ext), ("python", f"{facts.python} on {facts.platform}")]
    rows += [(name, version or "not installed") for name, version in facts.versions.items()]
    rows += [("native module", "available" if built.available else f"not available: {built.reason}")]
    rows += [(f"  built: {key}", value) for key, value in (built.build or {}).items()]
    rows += [("CUDA ops", f"{'built' if cuda.ops_built else 'not built'}: {cuda.reason}")]
    rows += [("CUDA in torch", cuda.torch_cuda or "none"), ("GPUs", "\n".join(gpus) or "none visible")]
    return facts_table([*rows, ("threads", f"{facts.num_threads} of torch, {facts.num_cpus} CPUs")])
