"""The embedded models: a target of 1.6 million parameters, two specialist drafters for it, and held-out prompts.

They are files in `assets/`. `benchmarks/worlds/` generates their texts and trains them.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = "tiny"  # names the embedded target; before a slash, an embedded drafter: tiny/math
DOMAINS = ("math", "chat")  # a drafter each, in the order that breaks ties
PROMPTS = "prompts.jsonl"  # in `assets()`: a question file of `taps-ext evaluate --prompts`, 80 questions per domain


def assets() -> Path:
    """Return the directory with target/, drafters/, recipe.json and prompts.jsonl.

    Raises FileNotFoundError if this installation does not have it.
    """
    directory = Path(__file__).parent / "assets"
    if not (directory / "target" / "config.json").exists():
        raise FileNotFoundError(
            f"embedded models not found in {directory}; install taps_ext again, or make them from a checkout: "
            "NEW_TARGET=1 benchmarks/runs/tiny.sh DIRECTORY"
        )
    return directory


def load_target() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the embedded target in float32, in evaluation mode, and its tokenizer, which has a chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = assets() / "target"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def drafter_paths() -> dict[str, Path]:
    """Return the directory of each embedded drafter, by domain."""
    return {domain: assets() / "drafters" / domain for domain in DOMAINS}


def prompts(domain: str, count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return the first `count` held-out prompts of a domain: chat messages, the last one a user's.

    No prompt was in the training of the embedded models. Seed 0 keeps the order of the file; another seed shuffles it.
    Raises ValueError for an unknown domain, or for more prompts than the file has.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} not found; embedded prompts exist for {', '.join(DOMAINS)}")
    lines = (assets() / PROMPTS).read_text(encoding="utf-8").splitlines()
    held_out = [record["messages"] for record in map(json.loads, lines) if record["category"] == domain]
    if not 0 <= count <= len(held_out):
        raise ValueError(
            f"{count} prompts of {domain} were asked for, and {len(held_out)} are embedded; ask for at most "
            f"{len(held_out)}, or give your own with taps-ext evaluate --prompts FILE"
        )
    if seed:
        Random(f"prompts/{domain}/{seed}").shuffle(held_out)
    return held_out[:count]


def resolve(path_or_id: str) -> str:
    """Return the directory of an embedded model (tiny, tiny/math, tiny/chat); return any other name unchanged.

    Raises ValueError for an embedded drafter that does not exist.
    """
    if path_or_id == TINY:
        return str(assets() / "target")
    if not path_or_id.startswith(f"{TINY}/"):
        return path_or_id
    domain, drafters = path_or_id.removeprefix(f"{TINY}/"), drafter_paths()
    if domain not in drafters:
        names = ", ".join(f"{TINY}/{name}" for name in drafters)
        raise ValueError(f"there is no embedded drafter {path_or_id}; there are {names}")
    return str(drafters[domain])
