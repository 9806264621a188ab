"""Conversations whose answers the target writes itself, as JSON lines: the texts that a drafter learns best from."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ..checkpoints.files import check_writable
from ..checkpoints.load import identify
from ..decode.plain import plain_generate
from ..sampling import NOISE, SamplingParams, row_seed
from ..target.end_tokens import end_tokens
from .data import Conversation, Message
from .masks import UNFINISHED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..decode.decoder import SpeculativeDecoder

# Why a conversation ends early.
NO_TEXT = "an empty answer"
NO_ROOM = "a prompt longer than the target's context"
REFUSED = "a conversation that the chat template refuses"
TOOLS = "results of tools that another model has called"


@dataclass(frozen=True)
class RegenerationReport:
    """What became of the conversations."""

    num_written: int
    num_answers: int  # in those written
    num_unfinished: int  # of these answers: cut off at the limit, so that no end is learned
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
    progress: Callable[[int, int], None] | None = None,
) -> RegenerationReport:
    """Write the conversations to `output` with every answer written anew, each after the target's own earlier ones.

    Each conversation goes to `<output>.partial` as soon as it is finished; a run that was stopped goes on from there.

    Args:
        max_new_tokens: an answer that has not ended by then is kept as unfinished, and ends its conversation.
        seed: conversation i draws with row_seed(seed, i), so that its text does not depend on its neighbours.
        decoder: of this target, to write the same text faster.
        progress: gets the number of finished conversations, and of all.
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
    done = _resume(collected, settings | _materials(target, tokenizer, conversations))
    drafts = [_Draft(i, one, list(one.messages)) for i, one in enumerate(conversations) if i not in done]
    drafts.sort(key=lambda draft: sum(len(message["content"]) for message in draft.messages))  # little padding
    num_done, live, waiting = len(done), list[_Draft](), iter(drafts)
    with collected.open("a", encoding="utf-8") as file:
        while live := [*live, *islice(waiting, batch_size - len(live))]:
            if progress:
                progress(num_done, len(conversations))
            writer.answer(live)
            finished = [draft for draft in live if not draft.todo]
            file.writelines(map(_Draft.line, finished))
            _sync(file)
            num_done, live = num_done + len(finished), [draft for draft in live if draft.todo]
    return _finish(collected, output, writer.end_tokens)


@dataclass
class _Draft:
    """A conversation in the making."""

    index: int
    given: Conversation
    messages: list[Message]
    cut: str | None = None  # why it ends early
    todo: list[int] = field(init=False)  # positions of the messages to answer anew

    def __post_init__(self) -> None:
        self.todo = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if self.messages[-1]["role"] == "user":  # which nobody has answered yet
            self.todo.append(len(self.messages))

    def take(self, answer: str, is_finished: bool) -> None:
        """Take the next answer; an unfinished one is the last."""
        position = self.todo.pop(0)
        said: Message = {"role": "assistant", "content": answer}
        self.messages[position : position + 1] = [said if is_finished else {**said, UNFINISHED: True}]
        if not is_finished:
            self.messages, self.todo = self.messages[: position + 1], []

    def end(self, reason: str) -> None:
        """End before the question that gets no answer."""
        kept = self.messages[: self.todo[0] - 1]
        self.messages = kept if any(message["role"] == "assistant" for message in kept) else []
        self.todo, self.cut = [], reason

    def line(self) -> str:
        """Return what is collected of it."""
        record = {"messages": self.messages, **({"tools": self.given.tools} if self.given.tools else {})}
        return _line({"index": self.index, "cut": self.cut, "record": record})


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

    def answer(self, drafts: Sequence[_Draft]) -> None:
        """Write the next answer of each conversation, or end it."""
        prompts = []
        for draft in drafts:
            prompt = self._prompt(draft)
            if any(message["role"] == "tool" for message in draft.messages):
                draft.end(TOOLS)
            elif prompt is None:
                draft.end(REFUSED)
            elif self._room(prompt) < 1:
                draft.end(NO_ROOM)
            else:
                prompts.append((prompt, draft))
        if prompts:
            self._answer(prompts)

    def _prompt(self, draft: _Draft) -> list[int] | None:
        """Return the conversation up to where its next answer begins, as tokens; None if the template refuses."""
        from jinja2 import TemplateError

        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                draft.messages[: draft.todo[0]],
                tools=draft.given.tools,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )
        except (TemplateError, TypeError, ValueError):  # of the tokenizer: half a surrogate pair, which is no text
            return None
        return list(encoded["input_ids"])

    def _room(self, prompt: list[int]) -> int:
        """Return how many tokens an answer may have."""
        return min(self._max_new_tokens, self._max_length - len(prompt)) if self._max_length else self._max_new_tokens

    def _answer(self, prompts: Sequence[tuple[list[int], _Draft]]) -> None:
        """Answer one batch, padded on the left."""
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
            if answer.strip():
                draft.take(answer, is_finished=reason in ("eos", "stop_string"))
            else:
                draft.end(NO_TEXT)


def check(output: Path, max_new_tokens: int, batch_size: int) -> None:
    """Raise OSError or ValueError, in a sentence, unless the file can be written and the numbers make sense."""
    if output.exists():
        raise FileExistsError(f"{output} exists already; give another name for the output, or delete it")
    check_writable(output.parent)
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


# ---- what is on disk: a line of settings, then a line for each finished conversation


def _materials(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> dict[str, str]:
    """Return what tells the target, its template and the conversations from others."""
    return {
        "conversations": _digest([[one.messages, one.tools] for one in conversations]),
        "chat template": _digest(tokenizer.get_chat_template()),
        "target": str(identify(target).weights),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _resume(collected: Path, settings: dict[str, Any]) -> set[int]:
    """Return which conversations are finished; a torn last line is cut off, and a new file begins with the settings."""
    end = collected.read_bytes().rfind(b"\n") + 1 if collected.exists() else 0
    if not end:
        collected.write_text(_line(settings), encoding="utf-8")
        return set()
    os.truncate(collected, end)
    with collected.open(encoding="utf-8") as file:
        found = json.loads(next(file))
        if differing := [name for name in settings if settings[name] != found.get(name)]:
            raise ValueError(
                f"{collected} was begun with other {', '.join(differing)}; "
                "give the same again to go on with it, or delete it to begin anew"
            )
        return {json.loads(line)["index"] for line in file}


def _finish(collected: Path, output: Path, ends: dict[str, int]) -> RegenerationReport:
    """Write the conversations that have answers to `output`, in the order in which they were given, and count."""
    with collected.open(encoding="utf-8") as file:
        next(file)
        lines = sorted(map(json.loads, file), key=lambda line: int(line["index"]))
    cut = Counter(line["cut"] for line in lines if line["cut"])
    written = [line["record"] for line in lines if line["record"]["messages"]]
    if not written:
        collected.unlink()
        reasons = ", ".join(f"{reason} ({number} times)" for reason, number in cut.most_common())
        raise ValueError(f"no conversation is left to write: {reasons}; give other conversations")
    new = output.with_name(f".{output.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, written))
        _sync(file)
    new.replace(output)
    collected.unlink()
    answers = [one for record in written for one in record["messages"] if one["role"] == "assistant"]
    num_unfinished = sum(UNFINISHED in one for one in answers)
    return RegenerationReport(len(written), len(answers), num_unfinished, dict(cut), len(lines) - len(written), ends)


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


def _sync(file: IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
