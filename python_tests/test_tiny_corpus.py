"""Claims about the corpus's programs and tables, and about prompts that change the subject."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from worlds import corpus
from worlds.corpus import TRAINING_CONVERSATIONS, Message
from worlds.programs import Programmer
from worlds.tables import FORMS, SUM, Clerk

ROOT = Path(__file__).resolve().parent.parent
TALKS = {domain: corpus.conversations(domain, 600, seed=3) for domain in ("code", "tables")}


def answers(domain: str) -> Iterator[tuple[str, str]]:
    """Every question with its answer."""
    for talk in TALKS[domain]:
        yield from ((q["content"], a["content"]) for q, a in zip(talk[::2], talk[1::2], strict=True))


# --- of both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("domain", "digest"), [("math", "7835fb5bec4b4c6b"), ("chat", "bc16036eed89d469")])
def test_the_texts_of_the_shipped_models_stay_as_they_were(domain: str, digest: str) -> None:
    texts = [corpus.conversations(domain, 200, 0), corpus.conversations(domain, 200, 1), corpus.prompts(domain, 50)]
    assert hashlib.sha256(repr(texts).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("domain", TALKS)
def test_talks_alternate_and_seldom_repeat(domain: str) -> None:
    for talk in TALKS[domain]:
        assert [message["role"] for message in talk] == ["user", "assistant"] * (len(talk) // 2)
        assert all(message["content"] == message["content"].strip() != "" for message in talk)
    assert {len(talk) // 2 for talk in TALKS[domain]} == {1, 2, 3}
    assert len({talk[0]["content"] for talk in TALKS[domain]}) > 0.97 * len(TALKS[domain])
    assert len({answer for _, answer in answers(domain)}) > 0.95 * sum(1 for _ in answers(domain))


# --- programs --------------------------------------------------------------------------------------------------------

WHICH: dict[str, Callable[..., bool]] = {
    r"above (\d+)": lambda x, n: x > n,
    r"below (\d+)": lambda x, n: x < n,
    r"of at least (\d+)": lambda x, n: x >= n,
    r"up to (\d+)": lambda x, n: x <= n,
    r"divisible by (\d+)": lambda x, n: x % n == 0,
    r"that are odd": lambda x: x % 2 == 1,
    r"from (\d+) to (\d+)": lambda x, n, m: n <= x <= m,
    r"that start with (\w)": lambda x, c: x[0] == c,
    r"that end in (\w)": lambda x, c: x[-1] == c,
    r"with the letter (\w)": lambda x, c: c in x,
    r"longer than (\d+) letters": lambda x, n: len(x) > n,
    r"of (\d+) letters": lambda x, n: len(x) == n,
}
MADE: dict[str, Callable[..., Any]] = {
    r"times (\d+)": lambda x, n: x * n,
    r"plus (\d+)": lambda x, n: x + n,
    r"minus (\d+)": lambda x, n: x - n,
    r"squared": lambda x: x * x,
    r"in capitals": lambda x: x.upper(),
    r"backwards": lambda x: "".join(reversed(x)),
    r"cut to (\d+) letters": lambda x, n: x[:n],
    r"said twice": lambda x: x + x,
}
KEYS: dict[str, Callable[..., Any]] = {
    "length": len,
    "first letter": lambda x: x[0],
    "last digit": lambda x: x % 10,
    "tens": lambda x: x // 10,
}


def understood(phrase: str, meanings: dict[str, Callable[..., Any]]) -> Callable[[Any], Any]:
    """What a phrase says, as a function of one item."""
    for pattern, function in meanings.items():
        if found := re.fullmatch(pattern, phrase):
            values = [int(group) if group.isdigit() else group for group in found.groups()]
            return lambda x: function(x, *values)
    raise AssertionError(phrase)


def expected(task: str, items: list[Any]) -> Any:
    """What a function of a list is to return, by the words of its task alone."""
    made = re.fullmatch(r"takes the \w+ (.+) and returns them (.+)", task)
    grouped = re.fullmatch(r"groups the \w+ (.+) by (length|first letter|last digit|tens)", task)
    other = re.fullmatch(r"(.*?) the(?:re are)? ?(?:first of the )?\w+ (.+?)(, or None)?", task)
    which = (made or grouped or other)[2 if not (made or grouped) else 1]  # type: ignore[index]
    kept = [item for item in items if understood(which, WHICH)(item)]
    if made:
        return [understood(made[2], MADE)(item) for item in kept]
    if grouped:
        keys = [KEYS[grouped[2]](item) for item in kept]
        return {key: [item for item, its in zip(kept, keys, strict=True) if its == key] for key in keys}
    start = task.split(" the")[0]
    results = {"adds up": sum, "counts": len, "keeps only": list, "tells whether": bool}
    return results[start](kept) if start in results else next(iter(kept), None)


def test_every_function_of_a_list_does_what_its_request_says() -> None:
    rng, seen = Random(5), set()
    for _ in range(1500):
        programmer = Programmer(rng)
        question, answer = programmer.first_turn()
        program = programmer.program
        if program.parameter in ("", "n"):
            continue
        assert program.task in question
        space: dict[str, Any] = {}
        exec(program.code(), space)
        assert program.code() in answer
        items = eval(f"[{programmer.samples(program.types[0] == 'list[str]')}]")
        assert space[program.name](items) == expected(program.task, items), (question, answer)
        seen.add((program.task.split()[0], program.is_short))
    assert len(seen) == 13  # seven kinds, of which grouping has no short form


def test_every_program_runs_and_prints_what_its_comments_say() -> None:
    num_examples = 0
    for talk in TALKS["code"]:
        lines: list[str] = []  # of all that was said, so that a later call finds its program
        for message in talk[1::2]:
            text = re.sub(r"^[A-Z][^\n]*:\n", "", message["content"])
            if text.startswith(("It looks", "As long as", "It keeps")):
                continue
            lines += text.splitlines()
        printed = StringIO()
        with redirect_stdout(printed):
            exec("\n".join(lines), {})
        comments = [line.split("  # ")[1] for line in lines if line.startswith("print(")]
        assert printed.getvalue().splitlines() == comments, talk
        num_examples += len(comments)
    assert num_examples > 150


def test_a_program_is_renamed_and_documented_where_asked() -> None:
    asked = {"renamed": 0, "documented": 0}
    for question, answer in answers("code"):
        if found := re.fullmatch(r"(?:Rename it to|Can you call it) (\w+)[.?]", question):
            assert re.search(rf"^(def {found[1]}\(|class {found[1]}:)", answer), answer
            asked["renamed"] += 1
        if question.endswith(("Add a docstring.", "Please document it.")):
            assert '"""' in answer
            asked["documented"] += 1
    assert min(asked.values()) > 20


# --- tables ----------------------------------------------------------------------------------------------------------


def parsed(text: str) -> tuple[list[str], list[tuple[str, list[int]]]]:
    """Columns and rows of a table in any form; empty where there is none."""
    lines = text.splitlines()
    if marked := [line for line in lines if re.match(r"(- |\d+\. )", line)]:
        rows = [re.sub(r"^(- |\d+\. )", "", line).split(": ") for line in marked]
        columns = re.findall(r"(\w+) \d+", rows[0][1])
        return columns, [(name, [int(n) for n in re.findall(r"\d+", counted)]) for name, counted in rows]
    lines = [line for line in lines if line.startswith("| ") or re.fullmatch(r"\w+(,\w+)+", line)]
    cells = [re.findall(r"\w+|---", line) for line in lines if "---" not in line]
    return (cells[0][1:], [(name, [int(n) for n in numbers]) for name, *numbers in cells[1:]]) if cells else ([], [])


def test_the_first_answer_is_what_was_asked_for_and_of_the_same_data() -> None:
    num_sorted = num_sums = 0
    for question, answer in ((talk[0]["content"], talk[1]["content"]) for talk in TALKS["tables"]):
        columns, rows = parsed(answer)
        assert rows and all(len(numbers) == len(columns) for _, numbers in rows), answer
        if question.startswith("Make up"):
            continue
        if inline := re.findall(r"(\w+) \((.+?)\)", question):
            given = {name: dict(re.findall(r"(\w+) (\d+)", counted)) for name, counted in inline}
        else:
            names, table = parsed(question)
            given = {name: dict(zip(names, map(str, numbers), strict=True)) for name, numbers in table}
        for name, numbers in rows:
            cells = dict(zip(columns, map(str, numbers), strict=True))
            assert {column: cells[column] for column in cells if column != SUM} == given[name]
            if "sum of each row" in question:
                assert numbers[-1] == sum(numbers[:-1])
                num_sums += 1
        names = [name for name, _ in rows]
        if asked := re.search(r"sorted by (\w+), (\w+) first", question):
            keys = [numbers[columns.index(asked[1])] for _, numbers in rows]
            assert keys == sorted(keys, reverse=asked[2] == "highest")
            num_sorted += 1
        if "alphabetical" in question:
            assert names == sorted(names, key=str.lower)
        if asked := re.search(r"only those with (\w+) of at least (\d+)", question):
            assert {*names} == {name for name, cells in given.items() if int(cells[asked[1]]) >= int(asked[2])}
        else:
            assert {*names} == {*given}
    assert num_sorted > 50 and num_sums > 50


def test_answers_about_a_table_are_true_of_the_table_before() -> None:
    num_answers = 0
    for talk in TALKS["tables"]:
        columns: list[str] = []
        rows: list[tuple[str, list[int]]] = []
        for question, answer in zip(talk[::2], talk[1::2], strict=True):
            asked, said = question["content"], answer["content"]
            columns, rows = parsed(said) if parsed(said)[1] else (columns, rows)
            cells = {(name, c): n for name, numbers in rows for c, n in zip(columns, numbers, strict=True)}
            if found := re.fullmatch(r"Which \w+ has the (highest|lowest) (\w+)\?", asked):
                number = int(re.findall(r"\d+", said)[-1])
                values = [n for (_, column), n in cells.items() if column == found[2]]
                assert number == (max if found[1] == "highest" else min)(values)
                assert cells[said.split(",")[0].split(" ")[0], found[2]] == number
            elif (found := re.fullmatch(r"What is the sum of (\w+)\?", asked)) and found[1] in columns:
                *parts, total = map(int, re.findall(r"\d+", said))
                assert parts == [n for (_, column), n in cells.items() if column == found[1]]
                assert total == sum(parts)
            elif found := re.fullmatch(r"What is the (\w+) of (\w+)\?", asked):
                assert int(re.findall(r"\d+", said)[0]) == cells[found[2], found[1]]
            elif asked.startswith("How many"):
                assert re.findall(r"\d+", said) == [str(len(rows))]
            else:
                continue
            num_answers += 1
    assert num_answers > 100


def test_a_change_of_a_table_is_the_change_that_was_asked_for() -> None:
    seen = set()
    for talk in TALKS["tables"]:
        before: dict[str, list[int]] = {}
        for question, answer in zip(talk[::2], talk[1::2], strict=True):
            asked, (columns, rows) = question["content"], parsed(answer["content"])
            if not rows:
                continue
            after = dict(rows)
            if SUM in columns:
                assert all(numbers[-1] == sum(numbers[:-1]) for numbers in after.values())
            if found := re.fullmatch(r"Add (\w+) with (.+)\.", asked):
                assert after.keys() - before.keys() == {found[1]}
                numbers = [int(n) for n in re.findall(r"\d+", found[2])]
                assert after[found[1]][: len(numbers)] == numbers
            elif found := re.fullmatch(r"(?:Remove|Leave out) (\w+)\.", asked):
                assert before.keys() - after.keys() == {found[1]}
            elif found := re.fullmatch(r"The (\w+) of (\w+) should be (\d+)\.", asked):
                index = columns.index(found[1])
                before[found[2]][index] = int(found[3])
                assert after == before
            elif before:
                assert after.keys() <= before.keys()
            if found:
                seen.add((asked.split()[0], SUM in columns))
            before = after
    assert seen >= {("Add", True), ("Add", False), ("Remove", False), ("The", False)}


def test_a_table_reads_the_same_in_every_form() -> None:
    for clerk in (Clerk(Random(seed)) for seed in range(50)):
        forms = [parsed(clerk.table.written(form)) for form in FORMS]
        assert all(form == forms[0] for form in forms)
        assert forms[0] == (list(clerk.table.columns), [(name, list(numbers)) for name, numbers in clerk.table.rows])


# --- prompts that change the subject ---------------------------------------------------------------------------------


def domain_of(question: Message) -> str:
    text = question["content"]
    if re.search(r"\b(function|class)\b", text, re.IGNORECASE):
        return "code"
    if re.search(r"\w \((\w+ \d+(, )?)+\)|\w+,\w+|Make up|- \w+: \w+ \d+", text):
        return "tables"
    return "math" if re.search(r"\d", text) else "chat"


def test_switching_prompts_visit_every_pair_of_domains_and_are_held_out() -> None:
    drawn = corpus.switching_prompts(corpus.ALL_DOMAINS, 60)
    assert drawn[:7] == corpus.switching_prompts(corpus.ALL_DOMAINS, 7)
    assert drawn != corpus.switching_prompts(corpus.ALL_DOMAINS, 60, seed=1)
    pairs = [(domain_of(prompt[0]), domain_of(prompt[2])) for prompt in drawn]
    assert pairs[:12] == list(permutations(corpus.ALL_DOMAINS, 2))
    trained = [
        text for seed, count in TRAINING_CONVERSATIONS.items() for text in corpus.conversations("chat", count, seed)
    ]
    known = {text[0]["content"] for text in trained}  # of chat, the domain whose questions come again most often
    for prompt in drawn:
        assert [message["role"] for message in prompt] == ["user", "assistant", "user"]
        assert not known & {question["content"] for question in prompt[::2]}


def test_switching_conversations_join_exchanges_of_the_training_texts() -> None:
    joined = corpus.switching_conversations(("chat", "tables"), 4, seed=0)
    texts = {domain: corpus.conversations(domain, 4, seed=0) for domain in ("chat", "tables")}
    orders = (("chat", "tables"), ("tables", "chat"))
    assert joined == [
        [*texts[first][i][:2], *texts[second][i][:2]] for i, (first, second) in zip(range(4), 2 * orders, strict=True)
    ]


def test_a_switch_needs_two_domains() -> None:
    with pytest.raises(ValueError, match="a prompt that switches needs two domains, got math"):
        corpus.switching_prompts(["math", "math"], 1)


# --- the command that docs/training.md begins with -------------------------------------------------------------------


def test_the_command_prints_the_texts_that_drafters_learn_from() -> None:
    command = [sys.executable, "-m", "worlds.corpus", "math", "3"]
    environment = {**os.environ, "PYTHONPATH": "benchmarks"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    texts = [json.loads(line)["messages"] for line in done.stdout.splitlines()]
    assert texts == corpus.conversations("math", 3, corpus.DRAFTER_SEED)
