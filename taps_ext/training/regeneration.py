"""Conversations whose answers the target writes itself, as JSON lines: the texts that a drafter learns best from."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ..checkpoints.files import check_writable
from ..checkpoints.load import identify
from ..decode.plain import plain_generate
from ..sampling import NOISE, SamplingParams, row_seed
from ..target.end_tokens import end_tokens
from .conversations import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..decode.decoder import SpeculativeDecoder

Progress = Callable[[int, int], None]  # conversations done, of how many

POOL_BATCHES = 8  # batches that are sorted by length together, and written to disk together

# Why a conversation ends early.
NO_END = "an answer without an end"
NO_TEXT = "an empty answer"
NO_ROOM = "a prompt longer than the target's context"
REFUSED = "a conversation that the chat template refuses"


@dataclass(frozen=True)
class RegenerationReport:
    """What became of the conversations."""

    num_written: int
    num_answers: int  # in those written
    cut: dict[str, int]  # by reason: how many conversations end early
    num_dropped: int  # of these: have no answer left, and are not written
    end_tokens: dict[str, int]  # by name: what ends an answer


def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    output: Path,
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    decoder: SpeculativeDecoder | None = None,
    progress: Progress | None = None,
) -> RegenerationReport:
    """Write the conversations to `output` with every answer written anew, each after the target's own earlier ones.

    A run that was stopped goes on from `<output>.partial`, where finished conversations are collected.

    Args:
        max_new_tokens: an answer that has not ended by then is left out, with the rest of its conversation.
        seed: conversation i draws with row_seed(seed, i), so that its text does not depend on its neighbours.
        decoder: of this target, to write the same text faster.
    """
    check(output, max_new_tokens, batch_size)
    if not conversations:
        raise ValueError("there is no conversation to answer; give at least one")
    if not tokenizer.chat_template:
        raise ValueError("the target's tokenizer has no chat template, which says where an answer begins; give one")
    writer = _Writer(target, tokenizer, max_new_tokens, temperature, seed, decoder)
    output.parent.mkdir(parents=True, exist_ok=True)
    collected = output.with_name(f"{output.name}.partial")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "noise": NOISE}
    num_done = _resume(collected, settings | _materials(target, tokenizer, conversations))
    with collected.open("a", encoding="utf-8") as file:
        while num_done < len(conversations):
            if progress:
                progress(num_done, len(conversations))
            pool = conversations[num_done : num_done + batch_size * POOL_BATCHES]
            drafts = [_Draft(num_done + i, list(one.messages)) for i, one in enumerate(pool)]
            for num_answered in writer.answer_all(drafts, batch_size):
                if progress:
                    progress(num_done + num_answered, len(conversations))
            file.writelines(_line({"messages": draft.messages, "cut": draft.cut}) for draft in drafts)
            _sync(file)
            num_done += len(drafts)
    return _finish(collected, output, writer.end_tokens)


@dataclass
class _Draft:
    """A conversation in the making."""

    index: int
    messages: list[Message]
    cut: str | None = None  # why it ends early
    todo: list[int] = field(init=False)  # positions of the messages to answer anew

    def __post_init__(self) -> None:
        self.todo = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if self.messages[-1]["role"] == "user":  # which nobody has answered yet
            self.todo.append(len(self.messages))

    def take(self, answer: str, cut: str | None) -> None:
        """The next answer; or why there is none, and then the conversation ends before its question."""
        position = self.todo.pop(0)
        if not cut:
            self.messages[position : position + 1] = [{"role": "assistant", "content": answer}]
            return
        kept = self.messages[: position - 1]
        self.messages = kept if any(message["role"] == "assistant" for message in kept) else []
        self.todo, self.cut = [], cut


class _Writer:
    """Lets the target answer."""

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        decoder: SpeculativeDecoder | None,
    ) -> None:
        if decoder and decoder.target.model is not target:
            raise ValueError("the decoder drives another target; build a SpeculativeDecoder for this one")
        self._tokenizer = tokenizer
        self._sampling, self._seed = SamplingParams(temperature, seed=seed), seed
        self._max_new_tokens = max_new_tokens
        self._generate: Callable[..., Any] = decoder.generate if decoder else partial(plain_generate, target)
        self._max_length = getattr(target.config.get_text_config(), "max_position_embeddings", None)
        self.end_tokens = end_tokens(target, tokenizer)
        if not self.end_tokens:
            raise ValueError(
                "neither the target nor its tokenizer names an end-of-turn token; set eos_token_id in either"
            )

    def answer_all(self, drafts: Sequence[_Draft], batch_size: int) -> Iterator[int]:
        """Write every answer: the first of all conversations, then the second of those that have one, ...

        Yield after each batch how many conversations are done.
        """
        while waiting := [draft for draft in drafts if draft.todo]:
            prompts = []
            for draft in waiting:
                prompt = self._prompt(draft)
                if prompt is None:
                    draft.take("", REFUSED)
                elif self._room(prompt) < 1:
                    draft.take("", NO_ROOM)
                else:
                    prompts.append((prompt, draft))
            prompts.sort(key=lambda one: len(one[0]))
            for start in range(0, len(prompts), batch_size):
                self._answer(prompts[start : start + batch_size])
                yield sum(not draft.todo for draft in drafts)

    def _prompt(self, draft: _Draft) -> list[int] | None:
        """The conversation in the chat template, up to where its next answer begins; None if the template refuses."""
        from jinja2 import TemplateError

        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                draft.messages[: draft.todo[0]], add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except (TemplateError, TypeError, ValueError):  # of the tokenizer: half a surrogate pair, which is no text
            return None
        return list(encoded["input_ids"])

    def _room(self, prompt: list[int]) -> int:
        """How many tokens an answer may have."""
        return min(self._max_new_tokens, self._max_length - len(prompt)) if self._max_length else self._max_new_tokens

    def _answer(self, prompts: Sequence[tuple[list[int], _Draft]]) -> None:
        """One batch, padded on the left."""
        longest = max(len(prompt) for prompt, _ in prompts)
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, (prompt, _) in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, longest - len(prompt) :] = 1
        result = self._generate(
            input_ids,
            attention_mask,
            sampling=replace(self._sampling, seed=[row_seed(self._seed, draft.index) for _, draft in prompts]),
            max_new_tokens=[self._room(prompt) for prompt, _ in prompts],
            eos_token_id=list(self.end_tokens.values()),
            tokenizer=self._tokenizer,
            num_return_sequences=1,
        )
        for (_, draft), tokens, reason in zip(prompts, result.new_tokens, result.finish_reasons, strict=True):
            answer = str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            draft.take(answer, NO_END if reason not in ("eos", "stop_string") else None if answer.strip() else NO_TEXT)


def check(output: Path, max_new_tokens: int, batch_size: int) -> None:
    """OSError or ValueError, in a sentence, unless the file can be written and the numbers make sense."""
    if output.exists():
        raise FileExistsError(f"{output} exists already; give another name for the output, or delete it")
    check_writable(output.parent)
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


# ---- what is on disk: a line of settings, then a line for each finished conversation, in order


def _materials(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> dict[str, str]:
    """What tells the target, its template and the conversations from others."""
    return {
        "conversations": _digest([one.messages for one in conversations]),
        "chat template": _digest(tokenizer.get_chat_template()),
        "target": str(identify(target).weights),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _resume(collected: Path, settings: dict[str, Any]) -> int:
    """How many conversations are finished; begins the file if there is none, and drops a last line that is torn."""
    end = collected.read_bytes().rfind(b"\n") + 1 if collected.exists() else 0
    if not end:
        collected.write_text(_line(settings), encoding="utf-8")
        return 0
    os.truncate(collected, end)
    with collected.open(encoding="utf-8") as file:
        found = json.loads(next(file))
        if differing := [name for name in settings if settings[name] != found.get(name)]:
            raise ValueError(
                f"{collected} was begun with other {', '.join(differing)}; "
                "give the same again to go on with it, or delete it to begin anew"
            )
        return sum(1 for _ in file)


def _finish(collected: Path, output: Path, ends: dict[str, int]) -> RegenerationReport:
    """Write the conversations that have answers to `output`, and count."""
    cut, count = Counter[str](), Counter[str]()
    new = output.with_name(f".{output.name}.new")
    with collected.open(encoding="utf-8") as lines, new.open("w", encoding="utf-8") as file:
        next(lines)
        for line in map(json.loads, lines):
            cut.update([line["cut"]] if line["cut"] else [])
            count["written" if line["messages"] else "dropped"] += 1
            count["answers"] += sum(message["role"] == "assistant" for message in line["messages"])
            if line["messages"]:
                file.write(_line({"messages": line["messages"]}))
        _sync(file)
    if not count["written"]:
        new.unlink()
        collected.unlink()
        reasons = ", ".join(f"{reason} ({number} times)" for reason, number in cut.most_common())
        way_out = "allow more new tokens in another run" if cut[NO_END] else "give other conversations"
        raise ValueError(f"no conversation is left to write: {reasons}; {way_out}")
    new.replace(output)
    collected.unlink()
    return RegenerationReport(count["written"], count["answers"], dict(cut), count["dropped"], ends)


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


def _sync(file: IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
