"""Questions from a file of JSON lines: a benchmark's, or someone's own prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .questions import Message, Question

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
KINDS = ("turns", "prompt", "messages")
EXAMPLE = '{"prompt": "..."}, {"turns": ["...", "..."]} or {"messages": [{"role": "user", "content": "..."}]}'


def read_questions(path: Path) -> list[Question]:
    """The questions of a file of JSON lines; ValueError, in a sentence with the line, for anything malformed.

    A line holds one of `"prompt"`, a text; `"turns"`, texts that are asked one after the other; or `"messages"`, a
    conversation that ends with a user's. Also, if there are any, `"reference"` (one text a turn, or null), `"category"`
    and `"id"` (or FastChat's `"question_id"`). Blank lines do not count, and other keys are left alone.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give one of JSON lines, a question a line")
    questions: dict[str, Question] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            question = _question(_parse(line), path.stem, number)
            if question.id in questions:
                raise ValueError(f"the id {question.id!r} was there before, and ids tell answers apart")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        questions[question.id] = question
    if not questions:
        raise ValueError(f"{path} has no questions; give a JSON object a line, such as {EXAMPLE}")
    return list(questions.values())


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: too deeply nested") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, at character {error.pos + 1}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a question is a JSON object, got {type(record).__name__}")
    return record


def _question(record: Mapping[str, Any], stem: str, number: int) -> Question:
    given = [kind for kind in KINDS if record.get(kind) is not None]
    if len(given) != 1:
        raise ValueError(f"a question has one of {', '.join(KINDS)}, got {' and '.join(given) or 'none'}: {EXAMPLE}")
    history, turns = _asked(given[0], record[given[0]])
    name, category = (_label(record, keys) for keys in (("id", "question_id"), ("category",)))
    references = _references(record.get("reference"), len(turns))
    return Question(name or f"{stem}-{number}", category or stem, turns, references, history)


def _asked(kind: str, value: Any) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """What was said before, and the turns."""
    if kind == "messages":
        return _conversation(value)
    turns = [value] if kind == "prompt" else value
    if not _are_texts(turns) or not turns or not all(turn.strip() for turn in turns):
        raise ValueError(f'"{kind}" must be {"a text" if kind == "prompt" else "a list of texts"}, and not empty')
    return (), tuple(turns)


def _conversation(value: Any) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """A user's last message, and what was said before it: maybe a system's message, then user and assistant."""
    messages = value if isinstance(value, list) else []
    contents: list[Any] = [message.get("content") if isinstance(message, dict) else None for message in messages]
    if not messages or not _are_texts(contents) or not all(text.strip() for text in contents):
        raise ValueError('"messages" must be a list of {"role": ..., "content": a text}, and none of them empty')
    roles = [message.get("role") for message in messages]
    said = roles[1:] if roles[0] == "system" else roles
    if said != [("user", "assistant")[place % 2] for place in range(len(said))] or len(said) % 2 == 0:
        raise ValueError(
            '"messages" must be the user\'s and the assistant\'s in turns (a "system" one may come first) and end with '
            f"the user's, got the roles {', '.join(map(str, roles))}"
        )
    history = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    return tuple(history[:-1]), (contents[-1],)


def _references(value: Any, num_turns: int) -> tuple[str, ...] | None:
    if value is None:
        return None
    references = [value] if isinstance(value, str) else value
    if not _are_texts(references) or len(references) != num_turns:
        turns = "a text" if num_turns == 1 else f"a list of {num_turns} texts, one a turn"
        raise ValueError(f'"reference" must be {turns}, or null')
    return tuple(references)


def _label(record: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys that is there, as a text."""
    value = next((record[key] for key in keys if record.get(key) is not None), None)
    if value is None or (isinstance(value, (str, int)) and not isinstance(value, bool) and _are_texts([str(value)])):
        return None if value is None else str(value)
    raise ValueError(f'"{keys[0]}" must be a text or an integer, got {value!r}')


def _are_texts(values: Any) -> bool:
    """Whether it is a list of texts. Half of a surrogate pair, which JSON can spell, is none: no tokenizer reads it."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return False
    return not any("\ud800" <= letter <= "\udfff" for value in values for letter in value)
