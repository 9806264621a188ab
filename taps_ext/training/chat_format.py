"""Conversations as tokens, and exactly which of them the assistant says, read off the tokenizer's own chat template."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from .dataset import Example

Message = Mapping[str, str]
Span = tuple[int, int]  # characters of a rendered conversation, end exclusive

# A stand-in for the content of a message. Only conversations made of nothing but stand-ins hold any, so what real
# contents hold does not matter: icons live among the private-use characters too.
OPEN, CLOSE = "\ue000", "\ue001"
END = "\ue002"  # put after a rendered text, so that its last literal is never empty
STAND_IN = re.compile(f"{OPEN}([0-9]+){CLOSE}")
PROBE = ("user", "assistant", "user", "assistant")


class MaskError(ValueError):
    """A conversation whose assistant tokens cannot be told exactly, and why: leave it out."""


@dataclass(frozen=True)
class Outline:
    """What a chat template writes around the contents of messages of some roles: literal, content, ..., literal."""

    literals: tuple[str, ...]
    order: tuple[int, ...]  # of the contents: which message each one is of; one shorter than literals

    def place(self, text: str, contents: Sequence[str]) -> list[Span] | None:
        """Where the contents are in a rendered text, in `order`; None when the text is not this outline filled in.

        Templates strip contents as they like. What they left is unambiguous, as each content ends at a known literal.
        """
        first, *others = (*self.literals[:-1], self.literals[-1] + END)
        text += END
        spans, start = [], len(first)
        for index, literal in zip(self.order, others, strict=True):
            fitting = [content for content in stripped(contents[index]) if text.startswith(content + literal, start)]
            if not fitting:
                return None
            spans.append((start, start + len(fitting[0])))
            start += len(fitting[0]) + len(literal)
        return spans if text.startswith(first) and start == len(text) else None


class ChatFormat:
    """How a tokenizer's chat template writes conversations, and which tokens of them are learned.

    Learned are the tokens of each assistant message's content and of the end of its turn. The end of a turn is what
    follows up to the first special token, when that token follows an answer between turns as well as at the end of a
    conversation and does not open one (so it is no header's), or when it is the tokenizer's end-of-sequence token.
    A token that the content shares with its neighbourhood, as the `▁Hello` of `ASSISTANT: Hello`, is learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """ValueError for a tokenizer without a chat template, or one that cannot say where its tokens come from."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not tokenizer.is_fast or backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters a token comes from, so answers cannot be "
                "masked exactly; use a fast tokenizer (a folder with a tokenizer.json)"
            )
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; use the target's instruction-tuned version, or give "
                "data.chat_template, a jinja file"
            )
        self._tokenizer = tokenizer
        self._template = tokenizer.get_chat_template()
        self._backend = _with_whole_offsets(tokenizer)
        added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items() if str(entry).strip()}
        self._added_tokens = frozenset(added)
        self._special = re.compile("|".join(map(re.escape, added.values())) or r"(?!)")
        self._outlines: dict[tuple[tuple[str, ...], bool], Outline] = {}
        self._ends = self._find_ends()

    @property
    def has_end_of_turn(self) -> bool:
        """Whether the template ends an answer with a special token; without one, only contents are learned."""
        return bool(self._ends)

    def encode(self, messages: Sequence[Message]) -> Example:
        """The conversation's tokens, as `apply_chat_template` makes them, and which of them the assistant says.

        Raises MaskError, with the reason, when the template refuses the conversation or rewrites what is said.
        """
        _check(messages)
        text = self._render(messages)
        learned = bytearray(len(text) + 1)  # by character; one more, where a token without characters may stand
        for start, end in self._spans(text, messages):
            learned[start:end] = b"\1" * (end - start)
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError):  # what the tokenizers library makes of a lone surrogate
            raise MaskError("a message holds half a surrogate pair, which is no Unicode text") from None
        spans = (self._own_span(text, *pair) for pair in zip(encoding.ids, encoding.offsets, strict=True))
        mask = tuple(learned.find(1, start, max(end, start + 1)) >= 0 for start, end in spans)
        return Example(tuple(encoding.ids), mask)

    def _own_span(self, text: str, token: int, span: Span) -> Span:
        """An added token may swallow the blanks beside it, which may be a content's: that does not make it content."""
        start, end = span
        if token not in self._added_tokens:
            return span
        return end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())

    def _spans(self, text: str, messages: Sequence[Message]) -> list[Span]:
        """The characters that are learned."""
        spans = self._place(text, messages)
        return self._spans_by_prompt(text, messages) if spans is None else spans

    def _place(self, text: str, messages: Sequence[Message], is_prompt: bool = False) -> list[Span] | None:
        """The same; None when the text is not the outline of the messages' roles filled in."""
        roles = tuple(message["role"] for message in messages)
        contents = [message["content"] for message in messages]
        outline = self._outline(roles, is_prompt)
        places = outline.place(text, contents)
        if places is None:  # a template may write today's date, and it is past midnight
            del self._outlines[roles, is_prompt]
            outline = self._outline(roles, is_prompt)
            places = outline.place(text, contents)
        said = [index for index, role in enumerate(roles) if role == "assistant"]
        if [index for index in sorted(outline.order) if index in said] != said:
            raise MaskError("the chat template leaves out an assistant message, or writes it twice")
        if places is None:
            return None
        slots = zip(places, outline.order, outline.literals[1:], strict=True)
        return [(start, end + len(self._end_of_turn(after))) for (start, end), index, after in slots if index in said]

    def _spans_by_prompt(self, text: str, messages: Sequence[Message]) -> list[Span]:
        """The same where the template rewrites the last answer (its reasoning, say): all that follows its prompt."""
        *earlier, last = messages
        rewritten = MaskError(
            "the chat template rewrites the content of a message (it may drop the reasoning of earlier answers); "
            "make a conversation of every turn"
        )
        if last["role"] != "assistant" or not earlier:
            raise rewritten
        prompt = self._render(earlier, add_generation_prompt=True)
        spans: list[Span] | None = []
        if any(message["role"] == "assistant" for message in earlier):
            spans = self._place(prompt, earlier, is_prompt=True)
        after = self._outline(tuple(message["role"] for message in messages), False).literals[-1]
        end = len(text) - len(after)
        has_header = text.startswith(prompt) and prompt != self._render(earlier)
        if spans is None or not has_header or not text.endswith(after) or end < len(prompt):
            raise rewritten
        return [*spans, (len(prompt), end + len(self._end_of_turn(after)))]

    def _end_of_turn(self, literal: str) -> str:
        end = self._up_to_special(literal)
        return end if end in self._ends else ""

    def _up_to_special(self, literal: str) -> str:
        found = self._special.search(literal)
        return literal[: found.end()] if found else ""

    def _find_ends(self) -> frozenset[str]:
        try:
            outline = self._outline(PROBE, False)
        except MaskError as error:
            raise ValueError(f"the chat template cannot write a plain conversation: {error}") from error
        after = dict(zip(outline.order, outline.literals[1:], strict=True))
        between, last = (self._up_to_special(after.get(index, "")) for index in (1, 3))
        eos = self._tokenizer.eos_token
        ends = {end for end in (between, last) if end and eos and end.endswith(eos)}
        if between == last and not self._opens(between, outline.literals[0]):
            ends |= {last} - {""}
        return frozenset(ends)

    def _opens(self, end: str, literal: str) -> bool:
        """Whether a conversation that begins with a literal opens its first message with the special token of `end`."""
        tokens = [token for token in self._special.findall(literal) if token != self._tokenizer.bos_token]
        return bool(tokens) and end.endswith(tokens[0])

    def _outline(self, roles: tuple[str, ...], add_generation_prompt: bool) -> Outline:
        key = (roles, add_generation_prompt)
        if key not in self._outlines:
            stand_ins = [{"role": role, "content": f"{OPEN}{index}{CLOSE}"} for index, role in enumerate(roles)]
            parts = STAND_IN.split(self._render(stand_ins, add_generation_prompt))
            self._outlines[key] = Outline(tuple(parts[::2]), tuple(map(int, parts[1::2])))
        return self._outlines[key]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise MaskError(f"the chat template refuses the conversation: {error}") from error
        return str(text)


def stripped(content: str) -> list[str]:
    """A content as it is, then as templates strip it: blanks or only newlines, at either end."""
    if content == content.strip():
        return [content]
    ways = product((None, "\n", ""), repeat=2)
    return [content, *(content.lstrip(left).rstrip(right) for left, right in ways)]


def _check(messages: Sequence[Message]) -> None:
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise MaskError("a message has no role, or no content that is text")
    if not any(message["role"] == "assistant" for message in messages):
        raise MaskError("no message is the assistant's")


def _with_whole_offsets(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's own `tokenizers.Tokenizer`, copied, without what shortens offsets, cuts or pads."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None  # besides special tokens that no template wants, it takes blanks out of offsets
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
    backend.no_truncation()
    backend.no_padding()
    return backend
