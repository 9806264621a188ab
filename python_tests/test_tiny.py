"""Claims about the tiny world: right arithmetic, seeded and disjoint texts, and what the shipped drafters are worth."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean, stdev

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from worlds import corpus
from worlds import recipe as tiny_recipe
from worlds.arithmetic import Problem, generate_problem
from worlds.pretraining import PretrainingConfig, new_target, pretrain, train_tokenizer

import taps_ext as taps
from taps_ext import tiny
from taps_ext.checkpoints import average_drafters
from taps_ext.training import TokenDataset
from taps_ext.training.calibrate import CalibrationSettings
from taps_ext.training.masks import ChatFormat
from taps_ext.training.recipe import ObjectiveConfig

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (?:(\d+) \+ (\d+) = )?(\d+)")


def problems(count: int) -> Iterator[Problem]:
    rng = Random(11)
    return (generate_problem(rng) for _ in range(count))


def apply(left: int, operator: str, right: int) -> int:
    if operator == "/":
        assert left % right == 0, f"{left} / {right} leaves a remainder"
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]


# --- corpus ----------------------------------------------------------------------------------------------------------


def test_every_worked_solution_is_right_and_leads_to_its_answer() -> None:
    for problem in problems(2000):
        results = []
        for left, operator, right, first, second, result in EQUATION.findall(problem.solution.split("Check:")[0]):
            assert apply(int(left), operator, int(right)) == int(result), problem.solution
            if first:  # tens and ones worked out on the way
                assert int(first) + int(second) == int(result), problem.solution
            results.append(int(result))
        assert len(results) == len(problem.steps), problem.solution
        assert results[-1] == problem.answer >= 0
        assert re.search(rf"(answer is|Answer:) {problem.answer}\b", problem.solution), problem.solution
        for check in re.findall(r"Check: (\d+) ([-+*/]) (\d+) = (\d+)\.", problem.solution):
            assert apply(int(check[0]), check[1], int(check[2])) == int(check[3]), problem.solution


def test_every_step_uses_numbers_of_the_question_or_earlier_results() -> None:
    words = {"doubles": 2, "triples": 3, "four": 4, "half": 2, "third": 3, "quarter": 4, "fifth": 5, "sixth": 6}
    for problem in problems(2000):
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        known |= {value for word, value in words.items() if word in problem.question}
        for step in problem.steps:
            assert step.left in known and step.right in known, (problem.question, step)
            known.add(step.result)


def test_problems_vary_in_length_operators_and_carries() -> None:
    drawn = list(problems(1000))
    assert {len(problem.steps) for problem in drawn} >= {1, 2, 3, 4}
    assert {step.operator for problem in drawn for step in problem.steps} == set("+-*/")
    carries = [s for p in drawn for s in p.steps if s.operator == "+" and s.left % 10 + s.right % 10 > 9]
    assert len(carries) > 100
    assert len({problem.question for problem in drawn}) > 990


def test_dialogues_alternate_and_seldom_repeat() -> None:
    dialogues = corpus.conversations("chat", 500, seed=3)
    for dialogue in dialogues:
        assert [message["role"] for message in dialogue] == ["user", "assistant"] * (len(dialogue) // 2)
    assert {len(dialogue) // 2 for dialogue in dialogues} == {1, 2, 3, 4}
    answers = [message["content"] for dialogue in dialogues for message in dialogue[1::2]]
    assert len(set(answers)) > 0.97 * len(answers)
    assert len({word for answer in answers for word in re.findall(r"[a-z]+", answer.lower())}) > 700


@pytest.mark.parametrize("domain", corpus.ALL_DOMAINS)
def test_texts_are_a_function_of_the_seed_and_prompts_are_held_out(domain: str) -> None:
    assert (
        corpus.prompts(domain, 5, seed=1) == corpus.prompts(domain, 9, seed=1)[:5] != corpus.prompts(domain, 5, seed=2)
    )
    assert corpus.conversations(domain, 5, seed=0) == corpus.conversations(domain, 9, seed=0)[:5]
    assert all(prompt[-1]["role"] == "user" for prompt in corpus.prompts(domain, 50))
    for seed, count in corpus.TRAINING_CONVERSATIONS.items():
        trained = corpus.conversations(domain, count, seed)
        seen = {repr(text[: turn + 1]) for text in trained for turn in range(0, len(text), 2)}
        assert not any(repr(prompt) in seen for prompt in corpus.prompts(domain, 100))


def test_an_unknown_domain_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="domain 'law' is not one of math, chat, code, tables"):
        corpus.prompts("law", 1)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_the_chat_format_marks_what_the_assistant_says() -> None:
    tokenizer = tiny.load_target()[1]
    for domain in corpus.ALL_DOMAINS:
        for conversation in corpus.conversations(domain, 20, seed=5):
            example = ChatFormat(tokenizer).encode(conversation)
            learned = [token for token, is_learned in zip(example.tokens, example.loss_mask, strict=True) if is_learned]
            assert tokenizer.decode(learned) == "".join(f"{m['content']}<|end|>" for m in conversation[1::2])
            text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in conversation)
            assert tokenizer.decode(example.tokens) == f"<|begin|>{text}"


def test_the_tokenizer_is_a_function_of_its_texts() -> None:
    texts = [message["content"] for text in corpus.conversations("chat", 200, seed=5) for message in text]
    first, again = train_tokenizer(texts), train_tokenizer(texts)
    assert first.get_vocab() == again.get_vocab()
    assert len(first) <= 1024


# --- assets ----------------------------------------------------------------------------------------------------------


def test_the_target_arrives_in_float32_with_its_end_token() -> None:
    target, tokenizer = tiny.load_target()
    assert target.dtype == torch.float32 and not target.training
    assert tokenizer.decode([target.generation_config.eos_token_id]) == tokenizer.eos_token == "<|end|>"
    assert target.config.vocab_size == len(tokenizer) == 1024
    assert target.config.num_key_value_heads < target.config.num_attention_heads
    assert not target.config.tie_word_embeddings


def test_the_assets_are_small_and_say_how_they_were_made() -> None:
    files = [path for path in tiny.assets().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 14_000_000
    recipe = json.loads((tiny.assets() / "recipe.json").read_text())
    assert set(recipe["drafters"]) == set(tiny.DOMAINS)
    assert {"config", "final_loss", "seconds"} <= set(recipe["target"])
    for path in files:
        if path.suffix in (".json", ".jinja"):
            assert not re.search(r"/(home|root|work|tmp|usr)/", path.read_text()), f"{path.name} names a machine path"


def test_drafters_come_in_the_order_that_breaks_ties() -> None:
    assert list(tiny.drafter_paths()) == ["math", "chat"]


def test_the_embedded_prompts_are_the_first_that_the_generator_holds_out() -> None:
    text = (tiny.assets() / tiny.PROMPTS).read_text(encoding="utf-8")
    assert text == corpus.prompt_lines(tiny.DOMAINS)
    for domain in tiny.DOMAINS:
        assert tiny.prompts(domain, 80) == corpus.prompts(domain, 80)


def test_a_seed_shuffles_the_embedded_prompts() -> None:
    first, second = (tiny.prompts("chat", 80, seed) for seed in (1, 2))
    assert first != second and tiny.prompts("chat", 5, seed=1) == first[:5] != tiny.prompts("chat", 5)
    assert sorted(map(repr, first)) == sorted(map(repr, second)) == sorted(map(repr, tiny.prompts("chat", 80)))


@pytest.mark.parametrize(
    ("domain", "count", "sentence"),
    [
        ("law", 1, "domain 'law' not found; embedded prompts exist for math, chat"),
        ("math", 81, "81 prompts of math were asked for, and 80 are embedded; ask for at most 80, or"),
    ],
)
def test_prompts_that_are_not_embedded_are_refused(domain: str, count: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny.prompts(domain, count)


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_a_mixture_holds_as_many_texts_of_each_domain_as_it_says() -> None:
    recipe = tiny_recipe.Recipe(num_own_texts=1200)
    for mixture, expected in {
        "math": {"math": 1200, "chat": 64},
        "chat": {"math": 64, "chat": 1200},
        "mixed-half": {"math": 600, "chat": 600},
        "mixed-full": {"math": 1200, "chat": 1200},
    }.items():
        assert num_texts(recipe, mixture) == expected
    of_four = replace(recipe, domains=corpus.ALL_DOMAINS)
    assert num_texts(of_four, "code") == {"math": 22, "chat": 22, "code": 1200, "tables": 22}
    assert num_texts(of_four, "mixed-half") == dict.fromkeys(corpus.ALL_DOMAINS, 600)


def num_texts(recipe: tiny_recipe.Recipe, mixture: str) -> Counter[str]:
    """How many of each domain a mixture takes; a file holds half of a domain's texts."""
    counts = Counter[str]()
    for source in tiny_recipe.sources(recipe, mixture, Path("world")):
        counts[Path(source.path).stem.split("-")[0]] += 600 if source.count is None else source.count
    return counts


def test_a_specialist_is_named_by_what_tells_it_from_others() -> None:
    recipe = tiny_recipe.Recipe()
    assert recipe.folder("eagle2", "math", 1) == "math"
    assert replace(recipe, shipped=("eagle2", "hass")).folder("hass", "math", 1) == "math-hass"
    assert replace(recipe, seeds=(1, 2)).folder("eagle2", "math", 2) == "2/math"


def test_the_recipe_makes_a_world_that_can_be_loaded(tmp_path: Path) -> None:
    """In small: few texts, one update, two seeds, and the target that is there already."""
    world = tmp_path / "world"
    shutil.copytree(tiny.assets() / "target", world / "target")
    method = tiny_recipe.Method(ObjectiveConfig("hass"), share=0.01, is_mixed=False)
    recipe = tiny_recipe.Recipe(
        num_own_texts=20,
        calibration=CalibrationSettings((1.0,), depth=2, positions=200),
        threads=torch.get_num_threads(),
        batch_size=4,
        methods={"quick": method},
        shipped=("quick",),
        seeds=(1, 2),
    )
    tiny_recipe.make(recipe, world, has_target=True)
    target, _ = tiny.load_target()
    folders = {
        f"{seed}/{domain}": world / "drafters" / str(seed) / domain for seed in (1, 2) for domain in tiny.DOMAINS
    }
    taps.load_drafters({**folders, "average": world / "runs" / "quick-averaged-2" / "final"}, target)
    facts = json.loads((world / "recipe.json").read_text())
    assert set(facts["runs"]) == {"quick-math-1", "quick-chat-1", "quick-math-2", "quick-chat-2"}
    assert {name: drafter["run"] for name, drafter in facts["drafters"].items()} == {
        f"{seed}/{domain}": f"quick-{domain}-{seed}" for seed in (1, 2) for domain in tiny.DOMAINS
    }
    assert len({next(folder.glob("*.safetensors")).read_bytes() for folder in folders.values()}) == 4
    assert (world / tiny.PROMPTS).read_bytes() == (tiny.assets() / tiny.PROMPTS).read_bytes()
    for folder in folders.values():
        assert str(tmp_path) not in (folder / "config.json").read_text()
    with pytest.raises(FileExistsError, match="texts exists already; give another folder"):
        tiny_recipe.make(recipe, world, has_target=True)


# --- what the drafters are worth -------------------------------------------------------------------------------------


def acceptance(domain: str, composition: str, drafters: dict[str, Path], num_prompts: int) -> tuple[float, list[float]]:
    """The micro average at T = 0, and each prompt's own."""
    target, tokenizer = tiny.load_target()
    decoder = taps.SpeculativeDecoder(target, taps.load_drafters(drafters, target), composition, shape=taps.TreeShape())
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        corpus.prompts(domain, num_prompts, seed=42),
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    stats = decoder.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=96).stats
    return stats.acceptance_length, [1 + mean(row) for row in stats.num_accepted if row]


def test_each_specialist_is_clearly_better_on_its_own_domain() -> None:
    paths = tiny.drafter_paths()
    for own, other in (("math", "chat"), ("chat", "math")):
        mine, theirs = (acceptance(own, "single", {name: paths[name]}, 10)[0] for name in (own, other))
        assert mine >= theirs + 1.0
        assert 3.0 <= mine <= 5.9  # of 7: hard enough that differences can show


@pytest.mark.long
def test_compositions_stand_to_each_other_as_published(tmp_path: Path) -> None:
    paths = tiny.drafter_paths()
    average = average_drafters(list(paths.values()), None, tmp_path / "average")
    for domain in tiny.DOMAINS:
        singles = {name: acceptance(domain, "single", {name: path}, 40) for name, path in paths.items()}
        averaged = acceptance(domain, "single", {"average": average}, 40)[0]
        merged, confidence = (acceptance(domain, composition, paths, 40) for composition in ("merged", "confidence"))
        best = max(singles.values())
        assert averaged < singles[domain][0]
        gaps = [a - b for a, b in zip(merged[1], best[1], strict=True)]
        assert mean(gaps) >= -stdev(gaps) / len(gaps) ** 0.5
        assert confidence[0] >= 0.95 * best[0]


def test_a_target_whose_training_was_stopped_is_the_one_whose_training_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = corpus.conversations("math", 40, seed=5)
    tokenizer = train_tokenizer((message["content"] for text in texts for message in text), vocab_size=400)
    dataset = TokenDataset(ChatFormat(tokenizer).encode(text).cut(256) for text in texts)
    config = PretrainingConfig(steps=6, batch_size=4)
    monkeypatch.setattr("worlds.pretraining.CHECKPOINT_STEPS", 2)

    def stop(step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    stopped, whole = (new_target(tokenizer, seed=3, hidden_size=64, num_layers=1) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        pretrain(stopped, dataset, config, stop, tmp_path / "checkpoint.pt")
    resumed, steps = new_target(tokenizer, seed=4, hidden_size=64, num_layers=1), []
    loss = pretrain(resumed, dataset, config, lambda step, loss: steps.append(step), tmp_path / "checkpoint.pt")
    assert steps == [5, 6]
    assert loss == pretrain(whole, dataset, config, lambda step, loss: None)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    for other, changed in (
        (new_target(tokenizer, seed=3, hidden_size=128, num_layers=1), config),
        (stopped, replace(config, seed=9)),
    ):
        with pytest.raises(ValueError, match="is of another training"):
            pretrain(other, dataset, changed, stop, tmp_path / "checkpoint.pt")
