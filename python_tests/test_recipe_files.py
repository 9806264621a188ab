"""Claims about recipes: types, overrides, the sentences of errors, what is written, and those that are shipped."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from taps_ext.training.recipe import (
    DataConfig,
    FeatureConfig,
    ObjectiveConfig,
    Recipe,
    SourceConfig,
    TrainingConfig,
    as_tree,
    dump_recipe,
    is_text,
    load_recipe,
    type_at,
)

SHIPPED = Path(__file__).parent.parent / "recipes"
BASE = """
target: some/target
output: drafters/mine
data:
  sources: [a.jsonl, {path: b.jsonl, count: 12}]
training:
  epochs: 2
"""
# text that is something else to some reader of YAML, or that a writer must not leave as it is
HARD_TEXTS = (
    "3e-5",
    "1e3",
    "no",
    "Yes",
    "on",
    "1:30",
    "010",
    "null",
    "~",
    "true",
    ".5",
    "-",
    "a: b",
    "a #b",
    "#",
    "[x]",
)
HARD_TEXTS += (
    "{x}",
    "'",
    '"',
    "é 😀 漢",
    "two\nlines\n",
    " blanks ",
    "2024-01-01",
    "0x10",
    "1_000",
    "none",
    "=",
    "<<",
    "*a",
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def any_text(rng: Random) -> str:
    letters = "abcXYZ019 .:/-_#'\"{}[],&*!|>%@`\n\t\\é漢"
    return rng.choice((rng.choice(HARD_TEXTS), "x" + "".join(rng.choices(letters, k=rng.randint(1, 12)))))


def any_number(rng: Random) -> float:
    return rng.choice((rng.random(), 10.0 ** rng.randint(-12, 12), rng.random() * 10.0 ** rng.randint(-9, 9)))


def maybe(rng: Random, value: Any) -> Any:
    return rng.choice((None, value))


def any_sources(rng: Random) -> tuple[SourceConfig, ...]:
    weighted = rng.random() < 0.5
    return tuple(
        SourceConfig(
            any_text(rng),
            split=any_text(rng),
            name=maybe(rng, any_text(rng)),
            count=None if weighted else maybe(rng, rng.randint(1, 10**6)),
            weight=any_number(rng) + 1e-9 if weighted else None,
        )
        for _ in range(rng.randint(1, 3))
    )


def any_recipe(seed: int) -> Recipe:
    rng = Random(seed)
    steps, epochs = rng.choice(((rng.randint(1, 10**7), None), (None, any_number(rng) + 1e-9)))
    return Recipe(
        target=any_text(rng),
        output=any_text(rng),
        data=DataConfig(
            any_sources(rng),
            max_length=rng.randint(3, 10**5),
            validation=rng.randint(0, 999),
            system_prompt=maybe(rng, any_text(rng)),
            chat_template=maybe(rng, any_text(rng)),
            deduplicate=rng.random() < 0.5,
            seed=rng.randint(-5, 5),
        ),
        training=TrainingConfig(
            steps=steps,
            epochs=epochs,
            micro_batch_size=maybe(rng, rng.randint(1, 9)),
            learning_rate=any_number(rng) + 1e-12,
            betas=(rng.random(), rng.random()),
            clip_norm=maybe(rng, any_number(rng) + 1e-12),
            precision=rng.choice(("fp32", "bf16")),
            tracker=any_text(rng),
        ),
        objective=ObjectiveConfig(rng.choice(("eagle2", "hass")), noise=any_number(rng)),
        features=rng.choice((FeatureConfig(), FeatureConfig("stored", any_text(rng), "float16"))),
        target_revision=maybe(rng, any_text(rng)),
        target_dtype=rng.choice(("auto", "float32")),
        start=maybe(rng, any_text(rng)),
    )


def leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every key that holds no section; lists of plain values are leaves."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    if isinstance(tree, list) and isinstance(tree[0], dict):
        return [leaf for key, value in enumerate(tree) for leaf in leaves(value, (*path, str(key)))]
    return [(path, tree)]


LEAVES = leaves(as_tree(Recipe("t", "o", DataConfig((SourceConfig("a"),)), TrainingConfig(steps=1))))


def error_of(paths: list[Path], *overrides: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_recipe(paths, overrides)
    return str(caught.value)


# --- reading and writing ---------------------------------------------------------------------------------------------


def test_a_written_recipe_reads_as_an_equal_one(tmp_path: Path) -> None:
    for seed in range(40):
        recipe, path = any_recipe(seed), tmp_path / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe([path]) == recipe, seed


def test_a_written_recipe_means_the_same_to_every_reader_of_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    for seed in range(40):
        recipe = any_recipe(seed)
        assert yaml.safe_load(dump_recipe(recipe)) == as_tree(recipe), seed


def test_a_written_recipe_names_every_key() -> None:
    written = {path for path, _ in leaves(as_tree(any_recipe(1)))}
    for section, kind in ((), Recipe), (("training",), TrainingConfig), (("data", "sources", "0"), SourceConfig):
        for field in dataclasses.fields(kind):
            assert any(path[: len(section) + 1] == (*section, field.name) for path in written)


def test_overrides_reach_every_key(base: Path) -> None:
    """Any recipe can be made from any other by overrides alone, written as JSON, which is YAML too."""
    for seed in range(25):
        recipe = any_recipe(seed)
        tree = as_tree(recipe)
        overrides = [f"data.sources={json.dumps(tree['data']['sources'], ensure_ascii=False)}"]
        overrides += [f"{'.'.join(path)}={json.dumps(value, ensure_ascii=False)}" for path, value in leaves(tree)]
        assert load_recipe([base], overrides) == recipe, seed


def test_text_on_the_command_line_needs_no_quotes(base: Path) -> None:
    for text in HARD_TEXTS:
        if text not in ("null", "~", "'", '"'):
            assert load_recipe([base], [f"output={text}"]).output == text
            assert load_recipe([base], [f"data.sources.0.path={text}"]).data.sources[0].path == text
    assert load_recipe([base], ["start=null"]).start is None
    assert load_recipe([base], ["start='null'"]).start == "null"


def test_a_word_in_a_text_field_of_a_file_needs_no_quotes_and_null_is_nothing(base: Path) -> None:
    for word in ("no", "on", "true", "3e-5", "010", "1:30", "2024-01-01", "1_000"):
        base.write_text(BASE.replace("some/target", word) + f"start: {word}\ntarget_revision: null\n")
        recipe = load_recipe([base])
        assert (recipe.target, recipe.start, recipe.target_revision) == (word, word, None)


def test_a_value_may_name_another_key(base: Path) -> None:
    assert load_recipe([base], ["output=drafters/${training.seed}"]).output == "drafters/0"
    assert "seeed" in error_of([base], "output=drafters/${training.seeed}")


def test_later_files_and_overrides_come_over_earlier_ones(base: Path, tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("training: {learning_rate: 3e-4, seed: 3}\nobjective: {name: hass}\nfeatures:\n")
    recipe = load_recipe([base, later], ["training.seed=4", "training={log_every: 7}", "target=other"])
    expected = TrainingConfig(epochs=2.0, learning_rate=3e-4, seed=4, log_every=7)
    assert (recipe.training, recipe.objective.name, recipe.target) == (expected, "hass", "other")
    assert recipe.data == load_recipe([base]).data, "what is not named stays"


def test_a_recipe_may_come_from_another_editor(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_bytes(b"\xef\xbb\xbf" + BASE.encode().replace(b"\n", b"\r\n"))
    assert load_recipe([other]) == load_recipe([base])


def test_a_source_may_be_only_a_path_and_can_be_reached_by_its_number(base: Path) -> None:
    assert load_recipe([base]).data.sources == (SourceConfig("a.jsonl"), SourceConfig("b.jsonl", count=12))
    changed = load_recipe([base], ["data.sources.0.count=35k", "data.sources.1.count=null"]).data.sources
    assert changed == (SourceConfig("a.jsonl", count=35_000), SourceConfig("b.jsonl"))
    replaced = load_recipe([base], ["data.sources=[c.jsonl, {path: d/e, weight: 2}]", "data.sources.0.weight=1"])
    assert replaced.data.sources == (SourceConfig("c.jsonl", weight=1.0), SourceConfig("d/e", weight=2.0))


@pytest.mark.parametrize(
    "text, number",
    [("35k", 35_000), ("35K", 35_000), ("1.5m", 1_500_000), ("0.25k", 250), ("1.2345k", None), ("7", 7), ("1e3", 1000)]
    + [
        ("70_000", 70_000),
        ("1.0005k", None),
        ("12.0000k", 12_000),
        ("2.5", None),
        ("k", None),
        ("1 k", None),
        ("true", None),
    ],
)
def test_counts_may_be_short(base: Path, text: str, number: int | None) -> None:
    if number is None:
        assert error_of([base], f"training.steps={text}").startswith("training.steps must be an integer or null, got ")
    else:
        steps = load_recipe([base], [f"training.steps={text}"]).training.steps
        assert steps == number and type(steps) is int


@pytest.mark.parametrize("text", ["3e-5", "3E-5", "0.00003", "+3.0e-05", "3.e-5", ".3e-4"])
def test_numbers_without_a_point_are_numbers(base: Path, text: str) -> None:
    base.write_text(f"{BASE}  learning_rate: {text}\n")
    assert load_recipe([base]).training.learning_rate == pytest.approx(3e-5)
    assert load_recipe([base], [f"training.learning_rate={text}"]).training.learning_rate == pytest.approx(3e-5)


def test_of_steps_and_epochs_the_later_one_holds(base: Path, tmp_path: Path) -> None:
    def length(*overrides: str, files: tuple[Path, ...] = (base,)) -> tuple[int | None, float | None]:
        training = load_recipe(files, overrides).training
        return training.steps, training.epochs

    later = tmp_path / "later.yaml"
    later.write_text("training: {steps: 9}")
    assert length() == (None, 2)
    assert length("training.steps=5") == (5, None)
    assert length("training={steps: 5}") == (5, None)
    assert length(files=(base, later)) == (9, None)
    assert length("training.epochs=0.5", files=(base, later)) == (None, 0.5)
    assert length("training.seed=1", files=(base, later)) == (9, None)
    assert length("training.steps=5", "training.epochs=1") == (None, 1)
    both = "training={steps: 5, epochs: 1}"
    assert "exactly one of training.steps and training.epochs" in error_of([base], both)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_misspelled_key_is_told_the_right_one(base: Path) -> None:
    """One letter of any key lost, doubled or swapped; at least two letters are needed to tell what was meant."""
    for number, (path, _) in enumerate(LEAVES):
        name, rng = path[-1], Random(number)
        at = rng.randrange(1, len(name) - 1)
        swapped = name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]
        for wrong in {name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], swapped} - {name}:
            message = error_of([base], f"{'.'.join((*path[:-1], wrong))}=1")
            assert message == f"{'.'.join((*path[:-1], wrong))} is not known; did you mean {'.'.join(path)}?"


def test_a_key_in_the_wrong_section_is_told_the_right_one(base: Path) -> None:
    for path, _ in LEAVES:
        if path[:-1] != ("objective",):
            message = error_of([base], f"objective.{path[-1]}x=1")
            assert message.startswith(f"objective.{path[-1]}x is not known; ")
        known_there = type_at(("objective", path[-1])) is not None
        if len(path) > 1 and not known_there:
            message = error_of([base], f"objective.{path[-1]}=1")
            assert message.startswith(f"objective.{path[-1]} is not known; did you mean ") and ".".join(path) in message


def test_every_unknown_key_is_named_and_nothing_is_nearest_to_nonsense(base: Path) -> None:
    message = error_of([base], "zzz=1", "features.qqqq=1", "trainning.steps=1")
    third, first, second = sorted(message.splitlines(), key=lambda line: "zzz features".find(line[:3]))
    assert first.startswith("zzz is not known; a recipe has target, output, data, ")
    assert second == "features.qqqq is not known; features has mode, path, dtype"
    assert third == "trainning is not known; did you mean training?"


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("training.batch_size=many", "training.batch_size must be an integer, got 'many'"),
        ("training.batch_size=true", "training.batch_size must be an integer, got 'true'"),
        ("training.learning_rate=fast", "training.learning_rate must be a number, got 'fast'"),
        ("training.clip_value=none", "training.clip_value must be a number or null, got 'none'"),
        ("training.gradient_checkpointing=maybe", "training.gradient_checkpointing must be true or false, got 'maybe'"),
        ("training.betas=[0.9]", "training.betas must be a list of 2 numbers, got ['0.9']"),
        ("training.betas=[0.9, 0.95, 0.99]", "training.betas must be a list of 2 numbers, got ['0.9', '0.95', '0.99']"),
        ("training.betas=0.9", "training.betas must be a list of 2 numbers, got '0.9'"),
        ("training.betas=[0.9, 1]", "training.betas must be at least 0 and below 1, got (0.9, 1.0)"),
        ("training.batch_size=0", "training.batch_size must be at least 1, got 0"),
        ("training.weight_decay=inf", "training.weight_decay must be finite, got inf"),
        ("training.learning_rate=nan", "training.learning_rate must be positive, got nan"),
        ("training=5", "training must be a section of keys and values, got '5'"),
        ("objective.name=eagle3", "objective.name must be 'eagle2' or 'hass', got 'eagle3'"),
        ("target_dtype=int8", "target_dtype must be 'auto', 'bfloat16', 'float16' or 'float32', got 'int8'"),
        ("target=null", "target must be text, got null"),
        ("target=' '", "target is empty; give a directory or a hub id"),
        ("data.sources=a.jsonl", "data.sources must be a list, got 'a.jsonl'"),
        ("data.sources=[[5]]", "data.sources.0 must be a section of keys and values, got ['5']"),
        ("data.sources=[{count: 5}]", "the recipe has no data.sources.0.path; give data.sources.0.path=..."),
        ("data.sources.0.count=0", "data.sources[].count must be at least 1, got 0"),
        ("data.sources.2.count=5", "there is no data.sources.2.count: a list has fewer entries, which count from 0"),
        ("data.sources.x.count=5", "there is no data.sources.x.count: a list has fewer entries, which count from 0"),
        ("data.sources=[]", "data.sources is empty; give at least one, such as {path: conversations.jsonl}"),
        ("features.mode=cached", "features.mode must be 'online' or 'stored', got 'cached'"),
        ("target", "'target' is no override; write key=value, such as training.learning_rate=5e-5"),
        ("=5", "'=5' is no override; write key=value, such as training.learning_rate=5e-5"),
        ("data..seed=5", "'data..seed=5' is no override; write key=value, such as training.learning_rate=5e-5"),
        (
            "training.betas=[",
            "the value of training.betas is not YAML: expected the node content, but found '<stream end>'",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(base: Path, override: str, sentence: str) -> None:
    assert error_of([base], override) == sentence


def test_wrong_types_anywhere_are_named_by_their_whole_key(base: Path) -> None:
    for path, _ in LEAVES:
        key = ".".join(path)
        message = error_of([base], f"{key}={{a: [1]}}" if not is_text(type_at(path)) else f"{'.'.join(path[:-1])}.x=1")
        assert len(message.splitlines()) == 1
        if not is_text(type_at(path)):
            assert message.startswith(f"{key} must be ") and message.endswith("got {'a': ['1']}")


def test_a_recipe_without_its_essentials_is_told_how_to_give_them() -> None:
    for part in error_of([]).splitlines():
        assert part.startswith("the recipe has no ") and "; give " in part
    assert [line.split()[4].rstrip(";") for line in error_of([]).splitlines()] == [
        "target",
        "output",
        "data",
        "training",
    ]
    whole = load_recipe([], ["target=a/b", "output=c", "data.sources=[d.jsonl]", "training.steps=1k"])
    assert whole == Recipe("a/b", "c", DataConfig((SourceConfig("d.jsonl"),)), TrainingConfig(steps=1000))


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"target: a\noutput: [\n", ":3 is not YAML"),
        (b"training: {seed: 1}\ntraining: {steps: 1}\n", ":2 is not YAML: training is given twice"),
        (b"- a\n", " must hold keys and values, such as target: DIRECTORY, got list"),
        (b"", " must hold keys and values, such as target: DIRECTORY, got NoneType"),
        (b"target: \xff\n", " cannot be read"),
        (b"target: !!python/object:os.system {}\n", ":1 is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = error_of([path])
    assert f"{path}{sentence}" in message and "\n" not in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert error_of([tmp_path / "gone.yaml"]) == f"there is no recipe {tmp_path / 'gone.yaml'}"


def test_only_reading_needs_omegaconf(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    recipe = any_recipe(3)
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    assert dump_recipe(recipe)
    assert error_of([base]) == "recipes need omegaconf: pip install 'taps_ext[train]'"


# --- the shipped recipes ---------------------------------------------------------------------------------------------


def shipped(objective: str, *overrides: str) -> Recipe:
    return load_recipe([SHIPPED / f"{objective}.yaml"], overrides)


@pytest.mark.parametrize(
    "objective, length, batch, epochs, passes, schedule",
    [("eagle2", 2048, 16, 21, 1, (500, 200_000)), ("hass", 1024, 32, 20, 3, (404, None))],
)
def test_shipped_recipes_hold_what_the_paper_used(
    objective: str, length: int, batch: int, epochs: int, passes: int, schedule: tuple[int, int | None]
) -> None:
    recipe = shipped(objective)
    training = recipe.training
    assert (recipe.objective.name, recipe.objective.num_passes) == (objective, passes)
    assert (recipe.data.max_length, training.batch_size, training.epochs) == (length, batch, epochs)
    assert (training.learning_rate, training.betas, training.clip_value) == (3e-5, (0.9, 0.95), 0.5)
    assert (training.precision, training.micro_batch_size, training.weight_decay) == ("bf16", batch // 4, 0.01)
    assert (training.warmup_steps, training.decay_steps) == schedule


@pytest.mark.parametrize("objective", ["eagle2", "hass"])
def test_the_comments_of_a_shipped_recipe_are_overrides_that_work(objective: str) -> None:
    """Other targets and other specialists, as a shell would read them."""
    comments = "\n".join(re.findall(r"^#   (.+)", (SHIPPED / f"{objective}.yaml").read_text(), re.M))
    lines = [shlex.split(line) for line in comments.replace("\\\n", " ").splitlines()]
    changes = [[word for word in line if "=" in word and not word.startswith("-")] for line in lines]
    recipes = [shipped(objective, *change) for change in changes if change]
    assert {recipe.target for recipe in recipes} >= {"Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "lmsys/vicuna-13b-v1.3"}
    assert {len(recipe.data.sources) for recipe in recipes} == {1, 2}
    for recipe in recipes:
        template = recipe.data.chat_template
        assert template is None or (SHIPPED.parent / template).is_file()
        assert (template is not None) == ("vicuna" in recipe.target)
