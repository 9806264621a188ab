"""Tasks: questions from files, from the hub's rows and from the embedded corpus, and what is said of malformed ones."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from taps_ext import tiny
from taps_ext.evaluation.tasks import TASKS, Question, find_task, load_prompts
from taps_ext.evaluation.tasks.hub import HubSet

Write = Callable[..., Path]
HUB_TASKS = ("mt_bench", "gsm8k", "math500", "svamp")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A file of these lines: text as it is, anything else as JSON."""

    def write(*lines: Any) -> Path:
        path = tmp_path / "own.jsonl"
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_tasks_file_is_read_as_it_stands(write: Write) -> None:
    line = {"id": "q7", "category": "sums", "turns": ["1 + 1?", "and 1?"], "reference": ["2", "3"]}
    assert TASKS["gsm8k"].load(write(line)) == [Question("q7", "sums", ("1 + 1?", "and 1?"), ("2", "3"))]


def test_own_prompts_come_in_three_forms(write: Write) -> None:
    system = {"role": "system", "content": "Be brief."}
    conversation = [system, user("Hello"), assistant("Good day."), user("And now?")]
    path = write(
        {"prompt": "Why?"}, "", {"turns": ["a", "b"]}, {"messages": conversation}, "  ", {"prompt": " x\u2028"}
    )
    assert load_prompts(path) == [
        Question("own-1", "own", ("Why?",)),
        Question("own-3", "own", ("a", "b")),
        Question("own-4", "own", ("And now?",), history=tuple(conversation[:-1])),
        Question("own-6", "own", (" x\u2028",)),
    ]


def test_names_of_other_makers_are_read(write: Write) -> None:
    line = {"question_id": 81, "category": "writing", "turns": ["a"], "reference": "b", "level": 3}
    assert load_prompts(write(line)) == [Question("81", "writing", ("a",), ("b",))]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_question(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert [(question.id, question.turns) for question in load_prompts(path)] == [("p-1", ("a",)), ("p-3", ("b",))]


MALFORMED: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"prompt": "a"', "not JSON: "),
    "a list": (["a"], "a question is a JSON object, got list"),
    "nothing asked": ({"question": "a"}, "has one of turns, prompt, messages, got none"),
    "asked twice": ({"prompt": "a", "turns": ["b"]}, "got turns and prompt"),
    "turns are a text": ({"turns": "a"}, '"turns" must be a list of texts, and not empty'),
    "a turn is a number": ({"turns": ["a", 3]}, '"turns" must be a list of texts'),
    "no turns": ({"turns": []}, '"turns" must be'),
    "a blank prompt": ({"prompt": " \n"}, '"prompt" must be a text, and not empty'),
    "half a letter": ('{"prompt": "\\ud83d"}', '"prompt" must be a text'),
    "one reference for two": ({"turns": ["a", "b"], "reference": "c"}, '"reference" must be a list of 2 texts'),
    "a reference that is a number": ({"prompt": "a", "reference": 3}, '"reference" must be a text, or null'),
    "messages of no form": ({"messages": ["a"]}, '"messages" must be a list of {"role"'),
    "an empty message": ({"messages": [user("")]}, "none of them empty"),
    "an answered conversation": ({"messages": [user("a"), assistant("b")]}, "got the roles user, assistant"),
    "two questions in a row": ({"messages": [user("a"), user("b"), user("c")]}, "in turns"),
    "a system's message alone": ({"messages": [{"role": "system", "content": "a"}]}, "got the roles system"),
    "an id that is a list": ({"prompt": "a", "id": ["b"]}, '"id" must be a text or an integer'),
    "a repeated id": ({"prompt": "b", "id": "first"}, "the id 'first' was there before"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_named_with_its_number(write: Write, case: str) -> None:
    line, words = MALFORMED[case]
    path = write("", {"prompt": "fine", "id": "first"}, "", line, {"prompt": "fine too"})
    with pytest.raises(ValueError, match="line 4: ") as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}, line 4: ")
    assert words in str(error.value)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\n{"prompt": "a"}\n\xff\xfe\n')
    with pytest.raises(ValueError, match="line 3: not UTF-8 text"):
        load_prompts(path)


def test_no_file_and_no_questions_are_said(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ValueError, match=r"there\.jsonl is no file"):
        load_prompts(tmp_path / "there.jsonl")
    with pytest.raises(ValueError, match="has no questions; give a JSON object a line"):
        TASKS["svamp"].load(write("", " "))


def test_a_limit_takes_from_everywhere_in_order(write: Write) -> None:
    path = write(*({"prompt": str(number)} for number in range(10)))
    for load in (load_prompts, TASKS["gsm8k"].load):
        assert [question.turns[0] for question in load(path, 4)] == ["0", "2", "5", "7"]
        assert len(load(path, 10)) == len(load(path, 99)) == len(load(path)) == 10
        with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
            load(path, 0)


def test_an_unknown_task_is_answered_with_those_there_are() -> None:
    assert find_task("gsm8k") is TASKS["gsm8k"]
    with pytest.raises(ValueError, match="one of mt_bench, gsm8k, math500, svamp, tiny_math, tiny_chat, got 'gsm'"):
        find_task("gsm")


def test_tasks_are_filed_under_their_names() -> None:
    assert all(task.name == name for name, task in TASKS.items())
    assert {name for name, task in TASKS.items() if task.is_right} == {"gsm8k", "math500", "svamp", "tiny_math"}


# ---- the hub

ROWS: dict[str, list[dict[str, Any]]] = {  # the columns that the hub's sets have
    "mt_bench": [
        {"prompt": ["Write.", "Again."], "reference": [], "category": "writing", "prompt_id": 81},
        {"prompt": ["Why?", "So?"], "reference": ["x", "y"], "category": "stem", "prompt_id": 82},
    ],
    "gsm8k": [{"question": "6 * 7?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}],
    "math500": [
        {
            "problem": "Halve $x$.",
            "solution": "It is $\\boxed{\\frac x2}$.",
            "answer": "\\frac x2",
            "subject": "Counting & Probability",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        }
    ],
    "svamp": [
        {
            "ID": "chal-9",
            "Body": "Ann has 5 pens. ",
            "Question": "How many has she? ",
            "Equation": "5",
            "Answer": "5.0",
            "Type": "Common-Division",
            "question_concat": "...",
        }
    ],
}
ASKED = {
    "mt_bench": [
        Question("mt_bench-81", "writing", ("Write.", "Again.")),
        Question("mt_bench-82", "stem", ("Why?", "So?"), ("x", "y")),
    ],
    "gsm8k": [Question("gsm8k-test-0000", "grade-school-math", ("6 * 7?",), (ROWS["gsm8k"][0]["answer"],))],
    "math500": [
        Question("math500-000", "counting_and_probability", ("Halve $x$.",), (ROWS["math500"][0]["solution"],))
    ],
    "svamp": [Question("svamp-chal-9", "common-division", ("Ann has 5 pens. How many has she?",), ("5.0",))],
}


@pytest.mark.parametrize("name", HUB_TASKS)
def test_rows_of_the_hub_become_questions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked_for.append((*arguments, options["split"]))
        return datasets.Dataset.from_list(ROWS[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = TASKS[name]
    assert task.load() == ASKED[name]
    assert isinstance(task.source, HubSet)
    assert asked_for == [(task.source.path, task.source.config, task.source.split)]


def test_without_datasets_the_extra_and_a_local_file_are_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs datasets: pip install 'taps_ext\[eval\]', or give a local file"):
        TASKS["gsm8k"].load()


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("could not\n reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"HuggingFaceH4/MATH-500 cannot be read from the hub \(could not reach it\)"):
        TASKS["math500"].load()


def test_a_column_that_is_gone_is_named() -> None:
    source = TASKS["svamp"].source
    assert isinstance(source, HubSet)
    with pytest.raises(ValueError, match="no longer has the column 'Body'; give a local file"):
        source.of_rows([{"Text": "a"}])


# ---- the embedded corpus


@pytest.mark.parametrize("domain", ["math", "chat"])
def test_tiny_tasks_are_the_held_out_prompts(domain: str) -> None:
    questions = TASKS[f"tiny_{domain}"].load(limit=80)
    asked = [[*question.history, {"role": "user", "content": question.turns[0]}] for question in questions]
    assert asked == tiny.prompts(domain, 80, seed=0)
    assert any(question.history for question in questions) == (domain == "chat")
    assert len({question.id for question in questions}) == 80


def test_tiny_references_are_the_answers() -> None:
    task = TASKS["tiny_math"]
    questions = task.load()
    references = [question.references[0] for question in questions if question.references]
    assert task.is_right is not None
    assert all(task.is_right(one, one) for one in references)
    assert sum(task.is_right(one, other) for one, other in itertools.pairwise(references)) <= 4
