"""What ends an answer: one union of what the target's files and its chat template name, and every command stops there.

The embedded target writes `<|end|>` behind its answers. Tests let other places name it than its files do.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taps_ext import tiny
from taps_ext.cli import main
from taps_ext.decode import plain
from taps_ext.evaluation import lossless, results
from taps_ext.target.end_tokens import end_tokens

END, USER, ASSISTANT, PAD = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
EACH = "{% for m in messages %}<|{{ m.role }}|>"
PROMPT = "Liam has 4 eggs and buys 3 more. How many eggs are there?"


@pytest.fixture
def models() -> tuple[Any, Any]:
    """A target and its tokenizer, which has a second special token that may end a turn."""
    model, tokenizer = tiny.load_target()
    tokenizer.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT, "<|turn|>"]})
    model.config.vocab_size = len(tokenizer)
    return model, tokenizer


def ids(tokenizer: Any, *names: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(name) for name in names}


def set_eos(model: Any, generation_config: Any, config: Any) -> None:
    model.generation_config.eos_token_id, model.config.eos_token_id = generation_config, config


def test_every_place_that_names_an_end_counts_and_differences_are_listed(models: Any) -> None:
    model, tokenizer = models
    own = ids(tokenizer, END)[END]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert end_tokens(model, tokenizer) == {END: own}
        set_eos(model, own, None)  # generation follows the generation config
        assert end_tokens(model, tokenizer) == {END: own}
    set_eos(model, [1, own], 7)
    tokenizer.chat_template = tokenizer.chat_template.replace(END, "<|turn|>")
    one, seven = tokenizer.convert_ids_to_tokens([1, 7])
    with pytest.warns(UserWarning, match="each of them") as said:
        assert end_tokens(model, tokenizer) == {one: 1, END: own, seven: 7} | ids(tokenizer, "<|turn|>")
    assert str(said[0].message) == (
        f"end-of-text tokens differ: the generation config {one}, {END}; the config {seven}; the tokenizer {END}; "
        "the chat template <|turn|>; each of them ends an answer"
    )


@pytest.mark.parametrize("place", ["the generation config", "the tokenizer"])
def test_a_place_that_names_no_end_where_others_do_is_a_difference(models: Any, place: str) -> None:
    model, tokenizer = models
    if place == "the tokenizer":
        tokenizer.eos_token = None
    else:
        set_eos(model, None, None)
    with pytest.warns(UserWarning, match=f"{place} none;"):
        assert end_tokens(model, tokenizer) == {END: 5}


@pytest.mark.parametrize(
    "eos, found, said",
    [
        (
            [5, 2000],
            {END: 5},
            f"the generation config {END}, 2000; .*, except 2000, which the target's vocabulary lacks",
        ),
        (-1, {END: 5}, "the generation config -1; .*, except -1, which"),
        ([5, 1030], {END: 5, "1030": 1030}, f"the generation config {END}, 1030; .*; each of them ends an answer$"),
    ],
)
def test_tokens_that_the_tokenizer_lacks_are_named_by_number(models: Any, eos: Any, found: Any, said: str) -> None:
    """What can be written ends an answer all the same: vocabularies are often padded."""
    model, tokenizer = models
    model.config.vocab_size = 1100
    set_eos(model, eos, 5)
    with pytest.warns(UserWarning, match=said):
        assert end_tokens(model, tokenizer) == found


def test_an_eos_token_that_is_no_number_is_refused(models: Any) -> None:
    model, tokenizer = models
    set_eos(model, ["</s>"], 5)
    with pytest.raises(ValueError, match=r"eos_token_id must be a number or a list of numbers, got \['</s>'\]"):
        end_tokens(model, tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        EACH + "{{ m.content }}<|turn|>{% endfor %}",
        EACH + "{{ m.content | upper }}<|turn|>{% endfor %}",
        EACH + "{{ m.content.split('</think>')[-1] | trim | replace(' ', '_') }}\n<|turn|>{{ eos_token }}{% endfor %}",
        EACH + "{% for part in m.content %}{{ part.text }}{% endfor %}<|turn|>{% endfor %}",
        EACH + "{{ m.content[0]['text'] }}<|turn|>{% endfor %}",
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        + EACH
        + "{{ m.content }}<|turn|>{% endfor %}",
    ],
)
def test_the_end_of_turn_is_found_whatever_the_template_does_to_the_answer(models: Any, template: str) -> None:
    model, tokenizer = models
    tokenizer.chat_template = template
    with pytest.warns(UserWarning, match=r"the chat template <\|turn\|>"):
        assert end_tokens(model, tokenizer) == ids(tokenizer, END, "<|turn|>")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}\n{% endfor %}<|assistant|>",
        EACH + "{{ m.content }}\n### End\n{% endfor %}",
        "{{ messages[0].content + 1 }}",
        "{{ raise_exception('never') }}",
        {"rag": EACH + "{{ m.content }}<|turn|>{% endfor %}"},
    ],
)
def test_a_template_that_fails_or_shows_no_end_adds_none(models: Any, template: Any) -> None:
    model, tokenizer = models
    tokenizer.chat_template = template
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert end_tokens(model, tokenizer) == {END: 5}


# ---- the commands


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A target in a directory whose chat template alone names the token that it ends its answers with."""
    model, tokenizer = tiny.load_target()
    set_eos(model, *ids(tokenizer, USER, ASSISTANT).values())
    tokenizer.add_special_tokens({"eos_token": PAD, "additional_special_tokens": [END]})
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], str]]:
    """Runs a command with --json: its result, and what it says on stderr."""

    def run(*arguments: object) -> tuple[dict[str, Any], str]:
        with pytest.raises(SystemExit) as exit:
            main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert not exit.value.code, captured.err
        return json.loads(captured.out), captured.err

    return run


def check(told: dict[str, Any], said: str) -> None:
    assert told["end_tokens"] == {USER: 2, ASSISTANT: 3, PAD: 0, END: 5}
    assert said.count("warning: end-of-text tokens differ: the generation config <|user|>; the config") == 1


def test_generate_stops_where_the_template_ends_a_turn(run: Any, target: Path) -> None:
    told, said = run("generate", "--target", target, "--drafter=lookup", "--prompt", PROMPT)
    check(told, said)
    assert (told["finish_reason"], told["new_tokens"][-1]) == ("eos", 5)


def test_evaluate_stops_where_the_template_ends_a_turn(run: Any, target: Path, tmp_path: Path) -> None:
    arguments = ("--task=tiny_math", "--limit=1", "--temperature=0", "--max-new-tokens=128", "-o", tmp_path / "out")
    check(*run("evaluate", "--target", target, "--drafter=lookup", *arguments))
    turns = [turn for line in results.read_lines(tmp_path / "out") for turn in line["turns"]]
    assert [(turn["finish_reason"], turn["tokens"][-1]) for turn in turns] == [("eos", 5)] * 2


def test_regenerate_stops_where_the_template_ends_a_turn(run: Any, target: Path, tmp_path: Path) -> None:
    conversation = {"messages": [{"role": "user", "content": PROMPT}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(conversation) + "\n")
    arguments = ("--data", tmp_path / "data.jsonl", "--max-new-tokens=128", "-o", tmp_path / "own.jsonl")
    told, said = run("regenerate", "--target", target, *arguments)
    check(told, said)
    assert (told["num_answers"], told["cut"]) == (1, {})
    model, tokenizer = tiny.load_target()
    prompt = tokenizer.apply_chat_template(
        conversation["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = plain.plain_generate(model, prompt["input_ids"], max_new_tokens=128).new_tokens[0]
    [written] = (tmp_path / "own.jsonl").read_text().splitlines()
    assert json.loads(written)["messages"][1]["content"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_check_lossless_stops_where_the_template_ends_a_turn(
    run: Any, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[plain.PlainResult] = []

    def listen(*arguments: Any, **options: Any) -> Any:
        texts.append(plain.plain_generate(*arguments, **options))
        return texts[-1]

    monkeypatch.setattr(lossless, "plain_generate", listen)
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    arguments = (f"--prompts={tmp_path / 'mine.jsonl'}", "--temperature=0", "--max-new-tokens=128", "--draws=0")
    check(*run("check-lossless", "--target", target, "--drafter=lookup", "--composition=merged", *arguments))
    assert [(text.finish_reasons, text.new_tokens[0][-1]) for text in texts] == [(["eos"], 5)]
