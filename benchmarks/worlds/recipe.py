"""Make the embedded models again: `PYTHONPATH=benchmarks python -m worlds.recipe --output DIR` (see runs/tiny.sh).

It writes target/, texts/ that the target writes itself, runs/ of both objectives on every mixture of the two domains,
drafters/ with the shipped specialists, prompts.jsonl with held-out prompts, and recipe.json, which says how all of it
was made. Its options make other worlds: more domains, specialists of several methods or seeds (see runs/worlds.sh).
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from taps_ext.checkpoints import average_drafters
from taps_ext.cli.train import screen
from taps_ext.tiny import DOMAINS, PROMPTS
from taps_ext.training import TokenDataset
from taps_ext.training.calibrate import CalibrationSettings, calibrate_drafter, calibration_texts
from taps_ext.training.data import Conversation, prepare
from taps_ext.training.masks import ChatFormat
from taps_ext.training.recipe import DataConfig, ObjectiveConfig, SourceConfig, TrainingConfig
from taps_ext.training.recipe import Recipe as TrainingRecipe
from taps_ext.training.regenerate import regenerate
from taps_ext.training.run import train

from .corpus import (
    ALL_DOMAINS,
    DRAFTER_SEED,
    TARGET_SEED,
    TRAINING_CONVERSATIONS,
    conversations,
    prompt_lines,
    switching_conversations,
)
from .pretraining import PretrainingConfig, new_target, pretrain, save_tokenizer, train_tokenizer

MAX_LENGTH = 512  # tokens of a training text
WRITING_BATCH = 128  # conversations that the target answers at once
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}  # half of a domain's texts each
MIXED_HALF, MIXED_FULL = "mixed-half", "mixed-full"  # half of each domain's texts, all of all domains'
# For about equal times: the texts of chat are the longest.
UPDATES = {"math": 200, "chat": 120, "code": 160, "tables": 160, MIXED_HALF: 120, MIXED_FULL: 120}
TARGET_STEPS = 1600  # of a domain


@dataclass(frozen=True)
class Method:
    """An objective, with how many updates for each of `UPDATES`, and whether on mixed texts as well as a domain's."""

    objective: ObjectiveConfig
    share: float = 1.0
    is_mixed: bool = True

    def mixtures(self, domains: tuple[str, ...]) -> tuple[str, ...]:
        """What there is a drafter of."""
        return (*domains, MIXED_HALF, MIXED_FULL) if self.is_mixed else domains

    def steps(self, mixture: str) -> int:
        """Updates on a mixture."""
        return max(1, round(self.share * UPDATES[mixture]))


def _methods() -> dict[str, Method]:
    """The objectives for equal times, as an update of HASS takes 2.5 times as long: the first three, and the long two.

    `hass-long` has as many updates as `eagle2`, too. The shipped drafters stop at the short time: of the 7 tokens that
    a step can add they add 4 to 6, so that what tells drafters and compositions apart can still show.
    """
    eagle2, hass = ObjectiveConfig("eagle2"), ObjectiveConfig("hass")
    return {
        "eagle2": Method(eagle2),
        "hass": Method(hass, 0.4),
        "hass-two-passes": Method(replace(hass, alignment_passes=2), 0.57, is_mixed=False),
        "eagle2-long": Method(eagle2, 2.5, is_mixed=False),
        "hass-long": Method(hass, 1.0, is_mixed=False),
    }


@dataclass(frozen=True)
class Recipe:
    """Everything that the assets depend on, besides the code and the versions."""

    domains: tuple[str, ...] = DOMAINS
    num_conversations: int = TRAINING_CONVERSATIONS[TARGET_SEED]  # of each domain, for the tokenizer and the target
    num_switching: int = 0  # conversations that change the domain, for the target too
    num_own_texts: int = TRAINING_CONVERSATIONS[DRAFTER_SEED]  # of each domain, for drafters: written by the target
    other_share: float = 0.05  # of a specialist's texts that are of other domains
    max_new_tokens: int = 256  # of an answer that the target writes
    threads: int = 1
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    methods: dict[str, Method] = field(default_factory=_methods)
    shipped: tuple[str, ...] = ("eagle2",)  # the methods of the specialists in drafters/
    batch_size: int = 8
    learning_rate: float = 8e-3
    warmup_steps: int = 30
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)  # its seed is that of the drafter
    seed: int = 1  # of the texts that the target writes
    seeds: tuple[int, ...] = (1,)  # of drafters: their first weights and the order of their texts

    def folder(self, method: str, domain: str, seed: int) -> str:
        """Where in drafters/ a specialist is: by its domain, and what tells it from others of that domain."""
        name = domain if method == self.shipped[0] else f"{domain}-{method}"
        return name if len(self.seeds) == 1 else f"{seed}/{name}"

    def run(self, method: str, mixture: str, seed: int) -> str:
        """The name of a run."""
        return f"{method}-{mixture}" if len(self.seeds) == 1 else f"{method}-{mixture}-{seed}"


def main(arguments: list[str] | None = None) -> None:
    """Make the assets in the folder given by the command line."""
    parser = argparse.ArgumentParser(prog="python -m worlds.recipe", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for all of it")
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    parser.add_argument("--target-steps", type=int, help=f"default: {TARGET_STEPS} a domain")
    parser.add_argument("--keep-target", action="store_true", help="train only drafters, for the target found there")
    parser.add_argument("--domains", nargs="+", choices=ALL_DOMAINS, default=list(DOMAINS))
    parser.add_argument("--switching", type=int, default=0, help="texts of the target that change the domain half-way")
    parser.add_argument(
        "--methods", nargs="+", choices=list(_methods()), help="only these, only specialists, and all into drafters/"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(Recipe.seeds), help="a specialist for each")
    given = parser.parse_args(arguments)
    recipe = Recipe(
        domains=tuple(given.domains),
        num_switching=given.switching,
        seeds=tuple(given.seeds),
        threads=given.threads,
        pretraining=PretrainingConfig(steps=given.target_steps or TARGET_STEPS * len(given.domains)),
    )
    if given.methods:
        methods = {name: replace(recipe.methods[name], is_mixed=False) for name in given.methods}
        recipe = replace(recipe, methods=methods, shipped=tuple(given.methods))
    make(recipe, given.output, given.keep_target)


def make(recipe: Recipe, output: Path, has_target: bool = False) -> None:
    """Train everything and write it under `output`."""
    for name in ("texts", "runs", "drafters"):
        if (output / name).exists():
            raise FileExistsError(f"{output / name} exists already; give another folder, or delete it")
    torch.set_num_threads(recipe.threads)
    facts: dict[str, Any] = _read_facts(output) if has_target else {}
    if not has_target:
        facts["target"] = _make_target(recipe, output / "target")
        _write_facts(recipe, facts, output)
    facts["texts"] = _write_texts(recipe, output)
    facts["runs"] = _train_all(recipe, output)
    facts["drafters"] = _ship(recipe, output)
    (output / PROMPTS).write_text(prompt_lines(recipe.domains))
    for path in output.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    _write_facts(recipe, facts, output)


def _ship(recipe: Recipe, output: Path) -> dict[str, Any]:
    """The specialists in drafters/, calibrated on what was held out of their texts; facts about them."""
    fresh, facts = output / ".drafters", {}
    shutil.rmtree(fresh, ignore_errors=True)
    target = AutoModelForCausalLM.from_pretrained(output / "target", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "target")
    for method, domain, seed in product(recipe.shipped, recipe.domains, recipe.seeds):
        run, folder = recipe.run(method, domain, seed), recipe.folder(method, domain, seed)
        shutil.copytree(output / "runs" / run / "final", fresh / folder)
        asked = _training_recipe(recipe, recipe.methods[method], domain, seed, output / "runs" / run)
        data = prepare(asked.data, tokenizer)
        dataset, texts = calibration_texts(data.training, data.validation)
        settings = replace(recipe.calibration, seed=seed)
        calibrate_drafter(fresh / folder, target, dataset, settings, target_name="target", texts=texts)
        facts[folder] = {"run": run}
    fresh.rename(output / "drafters")
    return facts


def _make_target(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train tokenizer and target, save both (bfloat16); what there is to say about it."""
    texts = [text for domain in recipe.domains for text in conversations(domain, recipe.num_conversations, TARGET_SEED)]
    texts += switching_conversations(recipe.domains, recipe.num_switching, TARGET_SEED)
    tokenizer = train_tokenizer(message["content"] for text in texts for message in text)
    chat_format = ChatFormat(tokenizer)
    dataset = TokenDataset(chat_format.encode(text).cut(MAX_LENGTH) for text in texts)
    model = new_target(tokenizer, recipe.pretraining.seed)
    start = time.monotonic()
    loss = pretrain(model, dataset, recipe.pretraining, _say_step)
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


def _write_texts(recipe: Recipe, output: Path) -> dict[str, Any]:
    """What the target says in the corpus's conversations: a file of each domain and temperature; facts about them."""
    target = AutoModelForCausalLM.from_pretrained(output / "target", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "target")
    facts: dict[str, Any] = {}
    for domain in recipe.domains:
        texts = [
            Conversation(tuple(text), f"{domain}:{number}")
            for number, text in enumerate(conversations(domain, recipe.num_own_texts, DRAFTER_SEED))
        ]
        for part, (name, temperature) in enumerate(TEMPERATURES.items()):
            start = time.monotonic()
            report = regenerate(
                target,
                tokenizer,
                texts[part :: len(TEMPERATURES)],
                _texts(output, domain, name),
                max_new_tokens=recipe.max_new_tokens,
                temperature=temperature,
                seed=recipe.seed,
                batch_size=WRITING_BATCH,
                progress=partial(_say_texts, f"{domain}, {name}"),
            )
            facts[f"{domain}-{name}"] = asdict(report) | {"seconds": round(time.monotonic() - start, 1)}
    return facts


def _texts(output: Path, domain: str, name: str) -> Path:
    return output / "texts" / f"{domain}-{name}.jsonl"


def _train_all(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Every method and seed on each of its mixtures, and the average of its specialists; facts about the runs."""
    facts = {}
    for (name, method), seed in product(recipe.methods.items(), recipe.seeds):
        for mixture in method.mixtures(recipe.domains):
            run = recipe.run(name, mixture, seed)
            _say(run)
            start = time.process_time()  # equal times are compared, whatever else the machine does
            with screen() as observer:
                result = train(_training_recipe(recipe, method, mixture, seed, output / "runs" / run), observer)
            seconds = round(time.process_time() - start, 1)
            assert result.validation
            facts[run] = {"steps": method.steps(mixture), "cpu_seconds": seconds, "estimate": asdict(result.validation)}
        specialists = [output / "runs" / recipe.run(name, domain, seed) / "final" for domain in recipe.domains]
        average_drafters(specialists, None, output / "runs" / recipe.run(name, "averaged", seed) / "final")
    return facts


def _training_recipe(recipe: Recipe, method: Method, mixture: str, seed: int, run: Path) -> TrainingRecipe:
    steps, output = method.steps(mixture), run.parent.parent
    return TrainingRecipe(
        target=str(output / "target"),
        target_dtype="float32",
        output=str(run),
        data=DataConfig(tuple(sources(recipe, mixture, output)), max_length=MAX_LENGTH, validation=64),
        objective=method.objective,
        training=TrainingConfig(
            steps=steps,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.warmup_steps,
            clip_norm=1.0,
            clip_value=None,
            seed=seed,
            validate_every=steps,
            save_every=steps,
            calibrate=False,  # outside the time that is compared, and of those in drafters/ alone
        ),
    )


def sources(recipe: Recipe, mixture: str, output: Path) -> Iterator[SourceConfig]:
    """The files of a mixture: all of a domain's texts, or as many of each file as make its share."""
    others = recipe.other_share / (1 - recipe.other_share) / max(1, len(recipe.domains) - 1)
    for domain in recipe.domains:
        share = {MIXED_HALF: 0.5, MIXED_FULL: 1.0, domain: 1.0}.get(mixture, others)
        count = None if share == 1 else round(share * recipe.num_own_texts / len(TEMPERATURES))
        for name in TEMPERATURES:
            yield SourceConfig(str(_texts(output, domain, name)), count=count)


def _write_facts(recipe: Recipe, facts: dict[str, Any], output: Path) -> None:
    names = ("domains", "num_conversations", "num_switching", "num_own_texts", "other_share", "max_new_tokens")
    facts["corpus"] = {name: getattr(recipe, name) for name in names}
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


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


def _say_step(step: int, loss: float) -> None:
    if step % 100 == 0:
        _say(f"target: step {step}, loss {loss:.3f}")


def _say_texts(what: str, done: int, total: int) -> None:
    _say(f"texts, {what}: {done} of {total}")


if __name__ == "__main__":
    main()
