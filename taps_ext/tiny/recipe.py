"""Re-makes the tiny world: `python -m taps_ext.tiny.recipe --output DIR` (see benchmarks/runs/tiny.sh).

Corpus, tokenizer, target, texts that the target writes itself, one drafter a domain; recipe.json beside them says how.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..training import Example, TokenDataset, TrainingConfig, chat_sequence, train_drafter
from .corpus import DOMAINS, DRAFTER_SEED, TARGET_SEED, TRAINING_CONVERSATIONS, conversations, training_prompts
from .pretraining import PretrainingConfig, new_target, pretrain
from .regeneration import regenerate
from .tokenizer import save_tokenizer, train_tokenizer

MAX_LENGTH = 512  # tokens of a training text


@dataclass(frozen=True)
class Recipe:
    """Everything the assets depend on, besides the code and the versions."""

    num_conversations: int = TRAINING_CONVERSATIONS[TARGET_SEED]  # of each domain, for the tokenizer and the target
    num_own_texts: int = TRAINING_CONVERSATIONS[
        DRAFTER_SEED
    ]  # for a drafter: written by the target, of the drafter's own domain
    other_share: float = 0.1  # of a drafter's texts that are of the other domain
    max_new_tokens: int = 128  # of a text that the target writes
    threads: int = 2
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    drafter: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=150, batch_size=8, learning_rate=4e-3))


def main(arguments: list[str] | None = None) -> None:
    """Make the assets in the folder given by the command line."""
    parser = argparse.ArgumentParser(prog="python -m taps_ext.tiny.recipe", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for target/, drafters/ and recipe.json")
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    parser.add_argument("--target-steps", type=int, default=PretrainingConfig.steps)
    parser.add_argument("--drafter-steps", type=int, default=Recipe().drafter.steps)
    parser.add_argument(
        "--keep-target", action="store_true", help="train only the drafters, for the target found there"
    )
    given = parser.parse_args(arguments)
    recipe = Recipe(threads=given.threads)
    recipe = replace(
        recipe,
        pretraining=replace(recipe.pretraining, steps=given.target_steps),
        drafter=replace(recipe.drafter, steps=given.drafter_steps),
    )
    make(recipe, given.output, given.keep_target)


def make(recipe: Recipe, output: Path, has_target: bool = False) -> None:
    """Train everything and write target/, drafters/<domain>/ and recipe.json under `output`."""
    torch.set_num_threads(recipe.threads)
    facts: dict[str, Any] = _read_facts(output) if has_target else {}
    if not has_target:
        facts["target"] = _make_target(recipe, output / "target")
    target = AutoModelForCausalLM.from_pretrained(output / "target", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "target")
    start = time.monotonic()
    texts = {domain: _own_texts(recipe, target, tokenizer, domain) for domain in DOMAINS}
    facts["texts_seconds"] = round(time.monotonic() - start, 1)
    facts["drafters"] = {domain: _make_drafter(recipe, target, texts, domain, output) for domain in DOMAINS}
    for path in output.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    _write_facts(recipe, facts, output)


def _make_target(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train tokenizer and target, save both (bfloat16); what there is to say about it."""
    texts = [text for domain in DOMAINS for text in conversations(domain, recipe.num_conversations, TARGET_SEED)]
    tokenizer = train_tokenizer(message["content"] for text in texts for message in text)
    dataset = TokenDataset([chat_sequence(tokenizer, text) for text in texts], MAX_LENGTH)
    model = new_target(tokenizer, recipe.pretraining.seed)
    report = _progress_line("target", recipe.pretraining.steps)
    start = time.monotonic()
    loss = pretrain(model, dataset, recipe.pretraining, report)
    seconds = time.monotonic() - start
    model.bfloat16().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return {
        "config": asdict(recipe.pretraining),
        "final_loss": round(loss, 4),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": len(tokenizer),
        "seconds": round(seconds, 1),
    }


def _make_drafter(
    recipe: Recipe, target: PreTrainedModel, texts: dict[str, list[Example]], domain: str, output: Path
) -> dict[str, Any]:
    """Train and save one specialist; what there is to say about it."""
    config = replace(recipe.drafter, seed=recipe.drafter.seed + 1 + DOMAINS.index(domain))
    start = time.monotonic()
    result = train_drafter(
        target,
        TokenDataset(_mixture(recipe, texts, domain), MAX_LENGTH),
        config,
        output / "drafters" / domain,
        metadata={"target": "tiny", "domain": domain, "trained_length": MAX_LENGTH},
        report=_progress_line(f"drafter {domain}", config.steps),
    )
    return {
        "config": asdict(config),
        "final_loss": round(result.losses[-1], 4),
        "num_parameters": sum(p.numel() for p in result.network.parameters()),
        "seconds": round(time.monotonic() - start, 1),
    }


def _own_texts(
    recipe: Recipe, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domain: str
) -> list[Example]:
    """Prompts of one domain with answers that the target wrote: what a drafter will have to foresee."""
    starts = training_prompts(domain, recipe.num_own_texts, DRAFTER_SEED)
    report = _progress_line(f"texts {domain}", len(starts))
    return regenerate(target, tokenizer, starts, recipe.max_new_tokens, recipe.drafter.seed, report)


def _mixture(recipe: Recipe, texts: dict[str, list[Example]], domain: str) -> list[Example]:
    """Mostly the domain's texts, and `other_share` of the other's."""
    others = [example for other in DOMAINS if other != domain for example in texts[other]]
    num_others = round(len(texts[domain]) * recipe.other_share / (1 - recipe.other_share))
    return texts[domain] + others[:num_others]


def _write_facts(recipe: Recipe, facts: dict[str, Any], output: Path) -> None:
    facts["corpus"] = {name: getattr(recipe, name) for name in ("num_conversations", "num_own_texts", "other_share")}
    facts["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    facts["threads"] = recipe.threads
    (output / "recipe.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _read_facts(output: Path) -> dict[str, Any]:
    path = output / "recipe.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {"target": facts.get("target")}


def _progress_line(what: str, total: int) -> Callable[[int, float], None]:
    """A report that rewrites one line on a terminal and adds a line now and then in a log."""
    start = time.monotonic()
    every = 10 if sys.stderr.isatty() else max(1, total // 10)

    def report(done: int, value: float) -> None:
        if done % every == 0 or done == total:
            end = "\n" if done == total or not sys.stderr.isatty() else ""
            sys.stderr.write(f"\r{what}: {done}/{total}, {value:.3f}, {time.monotonic() - start:.0f} s{end}")
            sys.stderr.flush()

    return report


if __name__ == "__main__":
    main()
