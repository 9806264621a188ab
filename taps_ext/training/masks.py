"""Conversations as tokens, and exactly which of them the assistant says, read off the tokenizer's own chat template."""

from __future__ import annotations

import copy
import hashlib
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # role, content, and whatever else a chat template reads
Span = tuple[int, int]  # characters of a rendered conversation, end exclusive

NUM_UNDRAFTED = 2  # tokens 0 and 1 are never guessed: the first slot of a drafter guesses token 2
UNFINISHED = "unfinished"  # a message's field, true where an answer was cut off: its end is not learned
SPOKEN = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")  # said besides the content

# ---- texts as tokens with loss masks


@dataclass(frozen=True)
class Example:
    """One training text: its tokens, and which of them the loss is about."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.loss_mask):
            raise ValueError(f"loss_mask must have {len(self.tokens)} entries like tokens, got {len(self.loss_mask)}")

    @property
    def num_learned(self) -> int:
        """Return the number of tokens that a drafter learns from this text."""
        return sum(self.loss_mask[NUM_UNDRAFTED:])

    def cut(self, max_length: int) -> Example:
        """Return the first `max_length` tokens."""
        return Example(self.tokens[:max_length], self.loss_mask[:max_length])


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right. Under a causal mask the padding is never seen by a real token.

    Shapes: B rows, L the longest row.
    """

    tokens: Tensor  # int64 [B, L], padding 0
    loss_mask: Tensor  # bool [B, L], padding False
    lengths: Tensor  # int64 [B]
    ids: tuple[int, ...]  # B, of the sequences: a hash of their content

    def to(self, device: torch.device) -> TokenBatch:
        """Return the same on a device."""
        return TokenBatch(self.tokens.to(device), self.loss_mask.to(device), self.lengths.to(device), self.ids)


class TokenDataset:
    """Sequences in three flat arrays, five bytes a token: a million conversations fit, a million objects do not."""

    def __init__(self, examples: Iterable[Example]) -> None:
        """Raise ValueError for an example without a token to learn, and for no example."""
        tokens, loss_mask, ends = array("i"), array("b"), array("q", [0])
        num_learned, ids = array("i"), array("Q")
        for index, example in enumerate(examples):
            if not example.num_learned:
                raise ValueError(f"sequence {index} has no token to learn among its {len(example.tokens)} tokens")
            tokens.extend(example.tokens)
            loss_mask.extend(example.loss_mask)
            ends.append(len(tokens))
            num_learned.append(example.num_learned)
            ids.append(content_id(example))
        if not num_learned:
            raise ValueError("a dataset needs at least one sequence, got none")
        self._tokens = torch.frombuffer(tokens, dtype=torch.int32)
        self._loss_mask = torch.frombuffer(loss_mask, dtype=torch.int8)
        self._ends = ends
        self.num_learned: Sequence[int] = num_learned  # of each sequence
        self.ids: Sequence[int] = ids  # of each sequence: a hash of its content

    def __len__(self) -> int:
        return len(self.num_learned)

    def __getitem__(self, index: int) -> Example:
        start, end = self._ends[index], self._ends[index + 1]
        mask = self._loss_mask[start:end].bool().tolist()
        return Example(tuple(self._tokens[start:end].tolist()), tuple(mask))

    def length(self, index: int) -> int:
        """Return the number of tokens of a sequence."""
        return self._ends[index + 1] - self._ends[index]

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all sequences."""
        return len(self._tokens)

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """Return the sequences as one batch, padded on the right with token 0."""
        lengths = [self.length(i) for i in indices]
        tokens = torch.zeros(len(indices), max(lengths), dtype=torch.int64)
        loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            start = self._ends[index]
            tokens[row, :length] = self._tokens[start : start + length]
            loss_mask[row, :length] = self._loss_mask[start : start + length].bool()
        return TokenBatch(tokens, loss_mask, torch.tensor(lengths), tuple(self.ids[i] for i in indices))

    def learned_counts(self, vocab_size: int) -> Tensor:
        """Return how often each token is learned, int64 [V]."""
        return torch.bincount(self._tokens[self._loss_mask.bool()].long(), minlength=vocab_size)

    @property
    def checksum(self) -> str:
        """Return the SHA-256 of all sequences in order, in hex: the same data, template and cut give the same."""
        digest = hashlib.sha256()
        for part in (self._tokens, self._loss_mask):
            digest.update(part.numpy().data)
        digest.update(self._ends.tobytes())
        return digest.hexdigest()


def collate(examples: Sequence[Example]) -> TokenBatch:
    """Return a few examples as one batch."""
    dataset = TokenDataset(examples)
    return dataset.batch(range(len(dataset)))


def content_id(example: Example) -> int:
    """Return 64 bits that two examples share only when their tokens and masks are the same."""
    digest = hashlib.blake2b(array("i", example.tokens).tobytes(), digest_size=8)
    digest.update(bytes(example.loss_mask))
    return int.from_bytes(digest.digest(), "little")


# ---- conversations as texts

# A stand-in for the content of a message. Only conversations made of nothing but stand-ins hold any, so what real
# contents hold does not matter: icons live among the private-use characters too.
OPEN, CLOSE = "\ue000", "\ue001"
END = "\ue002"  # put after a rendered text, so that its last literal is never empty
STAND_IN = re.compile(f"{OPEN}([0-9]+){CLOSE}")
PROBE = ("user", "assistant", "user", "assistant")


class MaskError(ValueError):
    """A conversation whose assistant tokens cannot be found exactly, and why: leave it out."""


class RewrittenError(MaskError):
    """A conversation whose tokens cannot be found as a whole; those of single turns may be."""


@dataclass(frozen=True)
class Outline:
    """What a chat template writes around the contents of messages of some roles: literal, content, ..., literal."""

    literals: tuple[str, ...]
    order: tuple[int, ...]  # of the contents: which message each one is of; one shorter than literals

    def place(self, text: str, contents: Sequence[str]) -> list[Span] | None:
        """Return where the contents are in a rendered text, in `order`; None when it is not this outline filled in.

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
        """Raise ValueError for a tokenizer without a chat template, or one that does not say where tokens come from."""
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
        self._outlines: dict[tuple[str, ...], Outline] = {}
        self._ends = self._find_ends()

    @property
    def has_end_of_turn(self) -> bool:
        """Return whether the template ends an answer with a special token; if not, only contents are learned."""
        return bool(self._ends)

    def examples(self, messages: Sequence[Message], tools: Any = None) -> list[Example]:
        """Return the conversation as one example; as one a turn where the template rewrites what was said earlier.

        Each turn is then rendered as the template renders it at that moment, when it is the last one: templates drop
        the reasoning of earlier answers. `tools` are those that the target may call. Raise MaskError, with the reason,
        when the template refuses the conversation, does not read what it holds, or rewrites it beyond recognition.
        """
        _check(messages)
        if tools and self._render(messages, tools=tools) == self._render(messages):
            raise MaskError("the chat template does not read tools")
        if not any(message.get(name) for message in messages for name in SPOKEN):
            try:
                return [self.encode(messages, tools)]
            except RewrittenError:
                pass
        ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
        return [self._last_answer(messages[:end], tools) for end in ends]

    def encode(self, messages: Sequence[Message], tools: Any = None) -> Example:
        """Return the conversation's tokens, as `apply_chat_template` makes them, and which of them the assistant says.

        Raise MaskError, with the reason, when the template refuses the conversation or rewrites what is said.
        """
        _check(messages)
        text = self._render(messages, tools=tools)
        if (spans := self._place(text, messages, tools)) is None:
            raise RewrittenError("the chat template rewrites the content of a message")
        return self._example(text, spans)

    def _last_answer(self, messages: Sequence[Message], tools: Any) -> Example:
        """Return the conversation up to an answer, of which only that answer is learned."""
        *earlier, last = messages
        text = self._render(messages, tools=tools)
        for name in filter(last.get, SPOKEN):
            if text == self._render([*earlier, {**last, name: None}], tools=tools):
                raise MaskError(f"the chat template does not read {name}")
        if not any(map(last.get, SPOKEN)) and (spans := self._place(text, messages, tools)):
            return self._example(text, spans[-1:])
        prompt = self._render(earlier, add_generation_prompt=True, tools=tools)
        after = self._outline(tuple(message["role"] for message in messages), tools).literals[-1]
        end, has_header = len(text) - len(after), prompt != self._render(earlier, tools=tools)
        if not (has_header and text.startswith(prompt) and text.endswith(after) and end >= len(prompt)):
            raise MaskError(
                "the chat template rewrites the content of a message, and where the answer begins cannot be found"
            )
        return self._example(text, [(len(prompt), end + len(self._end_of_turn(after, last)))])

    def _example(self, text: str, spans: Sequence[Span]) -> Example:
        """Return the tokens of a rendered text, learned where they have a character of a span."""
        learned = bytearray(len(text) + 1)  # by character; one more, where a token without characters may stand
        for start, end in spans:
            learned[start:end] = b"\1" * (end - start)
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError):  # what the tokenizers library makes of a lone surrogate
            raise MaskError("a message holds half a surrogate pair, which is no Unicode text") from None
        places = (self._own_span(text, *pair) for pair in zip(encoding.ids, encoding.offsets, strict=True))
        mask = tuple(learned.find(1, start, max(end, start + 1)) >= 0 for start, end in places)
        return Example(tuple(encoding.ids), mask)

    def _own_span(self, text: str, token: int, span: Span) -> Span:
        """Return the span without the blanks that an added token swallows: these may be a content's, it is not."""
        start, end = span
        if token not in self._added_tokens:
            return span
        return end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())

    def _place(self, text: str, messages: Sequence[Message], tools: Any) -> list[Span] | None:
        """Return the characters that are learned; None when the text is not the outline of the roles filled in."""
        roles = tuple(message["role"] for message in messages)
        contents = [message["content"] for message in messages]
        outline = self._outline(roles, tools)
        places = outline.place(text, contents)
        if places is None:  # a template may write today's date, and it is past midnight
            self._outlines.pop(roles, None)
            outline = self._outline(roles, tools)
            places = outline.place(text, contents)
        said = [index for index, role in enumerate(roles) if role == "assistant"]
        if [index for index in sorted(outline.order) if index in said] != said:
            raise MaskError("the chat template leaves out an assistant message, or writes it twice")
        if places is None:
            return None
        slots = zip(places, outline.order, outline.literals[1:], strict=True)
        return [
            (start, end + len(self._end_of_turn(after, messages[index])))
            for (start, end), index, after in slots
            if index in said
        ]

    def _end_of_turn(self, literal: str, message: Message) -> str:
        end = self._up_to_special(literal)
        return end if end in self._ends and not message.get(UNFINISHED) else ""

    def _up_to_special(self, literal: str) -> str:
        found = self._special.search(literal)
        return literal[: found.end()] if found else ""

    def _find_ends(self) -> frozenset[str]:
        try:
            outline = self._outline(PROBE)
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

    def _outline(self, roles: tuple[str, ...], tools: Any = None) -> Outline:
        if (known := self._outlines.get(roles)) is not None and not tools:
            return known
        stand_ins = [{"role": role, "content": f"{OPEN}{index}{CLOSE}"} for index, role in enumerate(roles)]
        parts = STAND_IN.split(self._render(stand_ins, tools=tools))
        outline = Outline(tuple(parts[::2]), tuple(map(int, parts[1::2])))
        if not tools:
            self._outlines[roles] = outline
        return outline

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Any = None) -> str:
        from jinja2 import TemplateError

        plain = [{name: v for name, v in one.items() if name != UNFINISHED and v is not None} for one in messages]
        try:
            text: Any = self._tokenizer.apply_chat_template(
                plain,
                tools=tools or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise MaskError(f"the chat template refuses the conversation: {error}") from error
        return str(text)


def stripped(content: str) -> list[str]:
    """Return a content as it is, then as templates strip it: blanks or only newlines, at either end."""
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
    """Return the tokenizer's own `tokenizers.Tokenizer`, copied, without what shortens offsets, cuts or pads."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None  # besides special tokens that no template wants, it takes blanks out of offsets
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
    backend.no_truncation()
    backend.no_padding()
    return backend
