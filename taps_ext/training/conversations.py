"""Conversations, and how a record of someone's data becomes one or is refused with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}, what chat templates read

ROLES = {  # the names that are in use, and ours
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}

# Why a record is dropped.
NOT_TEXT = "not UTF-8 text"
NOT_JSON = "not JSON"
NO_FIELDS = "no messages, no conversations, and no instruction with output"
BAD_MESSAGE = "a message without role and text"
UNKNOWN_ROLE = "a role other than system, user and assistant"
OTHER_CONTENT = "content other than text"
EMPTY_MESSAGE = "an empty message"
NO_ANSWER = "no assistant message"
NOT_USER_FIRST = "does not begin with a user message"
NOT_ALTERNATING = "user and assistant do not alternate"

# What is mended, and counted.
CUT_QUESTION = "a last user message without an answer was left out"
EMPTY_SYSTEM = "an empty system message was left out"


class BadRecord(ValueError):  # noqa: N818 (read as: raise BadRecord(reason))
    """A record that is no conversation; its text is one of the reasons above."""


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turns; the assistant speaks last, unless it is asked."""

    messages: tuple[Message, ...]
    origin: str  # "file:line", or "data set/split:row"
    notes: tuple[str, ...] = ()  # what was mended

    def with_system(self, prompt: str | None) -> Conversation:
        """The conversation with a system message in front, if there is a prompt and it has none of its own."""
        if prompt is None or self.messages[0]["role"] == "system":
            return self
        return replace(self, messages=({"role": "system", "content": prompt}, *self.messages))


def parse(record: object, origin: str, keeps_questions: bool = False) -> Conversation:
    """The conversation in a record of one of three kinds; BadRecord if there is none.

    `messages` or `conversations`: a list of {role, content} or {from, value}. Or `instruction`, maybe `input`, and
    `output`. Content may be a list of text parts. A last user message that nobody answers is left out, and so is an
    empty system message. `keeps_questions` is for conversations that are to be answered anew: the last user message
    stays, and there need be no answer or `output`.
    """
    messages = [_message(raw) for raw in _raw_messages(record, keeps_questions)]
    notes = []
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        del messages[0]
        notes.append(EMPTY_SYSTEM)
    if not all(message["content"].strip() for message in messages):
        raise BadRecord(EMPTY_MESSAGE)
    is_asked = bool(messages) and messages[-1]["role"] == "user"
    if is_asked and not keeps_questions and any(m["role"] == "assistant" for m in messages):
        del messages[-1]
        notes.append(CUT_QUESTION)
    answers = [{"role": "assistant", "content": ""}] if is_asked and keeps_questions else []
    _check_turns([message["role"] for message in messages + answers])
    return Conversation(tuple(messages), origin, tuple(notes))


def _check_turns(roles: list[str]) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in turns:
        raise BadRecord(NO_ANSWER)
    if turns[0] != "user":
        raise BadRecord(NOT_USER_FIRST)
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRecord(NOT_ALTERNATING)


def _raw_messages(record: object, keeps_questions: bool) -> Iterable[object]:
    if isinstance(record, dict):
        for key in ("messages", "conversations"):
            if isinstance(record.get(key), list):
                messages: list[object] = record[key]
                return messages
        if all(isinstance(record.get(key), str) for key in ("instruction", "output")):
            return _instruction(record)
        if keeps_questions and isinstance(record.get("instruction"), str):
            return _instruction({**record, "output": ""})[:1]
    raise BadRecord(NO_FIELDS)


def _instruction(record: dict[str, Any]) -> list[Message]:
    question, details = record["instruction"], record.get("input") or ""
    if not isinstance(details, str):
        raise BadRecord(OTHER_CONTENT)
    if details.strip():
        question = f"{question}\n\n{details}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _message(raw: object) -> Message:
    if not isinstance(raw, dict):
        raise BadRecord(BAD_MESSAGE)
    role, content = _first(raw, "role", "from"), _first(raw, "content", "value")
    if not isinstance(role, str) or content is None:
        raise BadRecord(BAD_MESSAGE)
    if role not in ROLES:
        raise BadRecord(UNKNOWN_ROLE)
    return {"role": ROLES[role], "content": _text(content)}


def _first(raw: dict[str, Any], *keys: str) -> Any:
    """The value of the first key that has one: columns of a data set hold None where a row has nothing."""
    return next((raw[key] for key in keys if raw.get(key) is not None), None)


def _text(content: object) -> str:
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise BadRecord(OTHER_CONTENT)
    try:
        content.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and no tokenizer reads
        raise BadRecord(NOT_TEXT) from None
    return content


def _part(part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        part = part.get("text")
    if not isinstance(part, str):
        raise BadRecord(OTHER_CONTENT)
    return part
