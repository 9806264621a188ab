"""From a recipe's sources to the token sequences of a run: read, deduplicate, mix, encode, hold out, report."""

from __future__ import annotations

import copy
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from .chat_format import ChatFormat, MaskError
from .conversations import Conversation
from .data_report import DataReport, Ledger, SourceReport
from .dataset import Example, TokenDataset, content_id
from .recipe import DataConfig
from .survey import REPEATED, Progress, SurveyedSource, quotas, survey, what_was_dropped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_VALIDATION_SHARE = 10  # at most one conversation in so many is held out


@dataclass(frozen=True)
class PreparedData:
    """What a run reads."""

    training: TokenDataset
    validation: TokenDataset | None
    report: DataReport


def prepare(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, report_progress: Progress | None = None
) -> PreparedData:
    """The training and validation sequences of a recipe, the same on every machine and process.

    The files are read twice, a record at a time: once to look, once for what the mixture takes. A source with a count
    gives exactly so many (validation included): where one of its conversations is dropped, another takes its place.
    ValueError, in one sentence, if a source is missing, has too few, or nothing is left.
    """
    chat_format = ChatFormat(with_chat_template(tokenizer, data.chat_template))
    encoder = _Encoder(data, chat_format, survey(data, report_progress))
    encoded = encoder.encode_all(report_progress)
    taken = encoder.taken()
    held_out = _held_out(encoded, taken, data)
    kept = sorted(set(taken) - set(held_out))
    Random(f"{data.seed}/order").shuffle(kept)
    return PreparedData(
        TokenDataset(encoded[i] for i in kept),
        TokenDataset(encoded[i] for i in held_out) if held_out else None,
        encoder.report(encoded, set(held_out)),
    )


def with_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template in a file; the same tokenizer for None. ValueError if there is no file."""
    if path is None:
        return tokenizer
    if not (file := Path(path).expanduser()).is_file():
        raise ValueError(f"there is no chat template {path}; data.chat_template is a jinja file")
    tokenizer = copy.copy(tokenizer)
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {path} is not UTF-8 text ({error.reason}); give a jinja file") from error
    return tokenizer


@dataclass
class _Part:
    """The sequences of one source, which lie together among the encoded ones."""

    start: int
    length: int = 0

    @property
    def indices(self) -> range:
        return range(self.start, self.start + self.length)


class _Encoder:
    """Encodes what the mixture asks of each source and goes on past conversations that cannot be used."""

    def __init__(self, data: DataConfig, chat_format: ChatFormat, sources: Sequence[SurveyedSource]) -> None:
        self.data, self.chat_format, self.sources = data, chat_format, sources
        self.parts: list[_Part] = []
        self._was_cut = array("b")  # of each sequence
        self._seen: set[int] = set()  # contents: two conversations may be the same up to where they are cut

    def encode_all(self, report_progress: Progress | None) -> TokenDataset:
        """The sequences of every source in turn; packed as they come, so that only one is held as objects."""
        examples = self._examples(report_progress)
        first = next(examples, None)
        if first is None:
            num_read = sum(len(source.source) for source in self.sources)
            paths = ", ".join(config.path for config in self.data.sources)
            why = what_was_dropped(self.sources)
            raise ValueError(f"no conversation is left to train on of {num_read:,} that were read from {paths}{why}")
        return TokenDataset(chain([first], examples))

    def taken(self) -> list[int]:
        """The sequences of the mixture: where a weighted source lost some, the others give less too."""
        asked = self._quotas()
        usable = [len(source.usable) for source in self.sources]
        left = [p.length if p.length < ask else num for p, ask, num in zip(self.parts, asked, usable, strict=True)]
        lengths = quotas(self.data.sources, left)
        self.parts = [_Part(p.start, min(p.length, n)) for p, n in zip(self.parts, lengths, strict=True)]
        return [index for part in self.parts for index in part.indices]

    def report(self, encoded: TokenDataset, held_out: set[int]) -> DataReport:
        """What became of every source."""
        reports = [self._source_report(n, encoded, held_out) for n in range(len(self.sources))]
        num_training = sum(report.num_training for report in reports)
        has_end = self.chat_format.has_end_of_turn
        return DataReport(tuple(reports), num_training, len(held_out), self.data.validation, has_end)

    def _quotas(self) -> list[int]:
        return quotas(self.data.sources, [len(source.usable) for source in self.sources])

    def _examples(self, report_progress: Progress | None) -> Iterator[Example]:
        asked = self._quotas()
        for number, source in enumerate(self.sources):
            self.parts.append(part := _Part(len(self._was_cut)))
            for conversation in source.conversations(f"{self.data.seed}/{number}"):
                if part.length == asked[number]:
                    break
                if (example := self._encode(conversation, source.dropped)) is None:
                    continue
                part.length += 1
                if report_progress:
                    report_progress(len(self._was_cut), sum(asked))
                yield example
            source.check(part.length)

    def _encode(self, conversation: Conversation, dropped: Ledger) -> Example | None:
        try:
            whole = self.chat_format.encode(conversation.with_system(self.data.system_prompt).messages)
        except MaskError as error:
            dropped.add(str(error), conversation.origin)
            return None
        example = whole.cut(self.data.max_length)
        if not example.num_learned:
            dropped.add(f"nothing to learn in its first {self.data.max_length:,} tokens", conversation.origin)
            return None
        if self.data.deduplicate:
            if (key := content_id(example)) in self._seen:
                dropped.add(REPEATED, conversation.origin)
                return None
            self._seen.add(key)
        self._was_cut.append(len(whole.tokens) > self.data.max_length)
        return example

    def _source_report(self, number: int, encoded: TokenDataset, held_out: set[int]) -> SourceReport:
        surveyed, indices = self.sources[number], self.parts[number].indices
        source = surveyed.source
        num_validation = sum(i in held_out for i in indices)
        return SourceReport(
            path=surveyed.config.path,
            name=source.name,
            split=None if source.sha256 else surveyed.config.split,
            revision=source.revision,
            sha256=surveyed.sha256,
            num_read=len(source),
            dropped=surveyed.dropped.tallies(),
            notes=surveyed.notes.tallies(),
            num_training=len(indices) - num_validation,
            num_validation=num_validation,
            num_cut=sum(self._was_cut[i] for i in indices),
            num_tokens=sum(encoded.length(i) for i in indices),
            num_learned=sum(encoded.num_learned[i] for i in indices),
        )


def _held_out(encoded: TokenDataset, taken: Sequence[int], data: DataConfig) -> list[int]:
    """The validation sequences, chosen by their content: more data or another order changes few of them.

    Sequences of one content stay together, so that none is on both sides where repeats are kept.
    """
    alike: dict[int, list[int]] = {}
    for index in taken:
        alike.setdefault(encoded.ids[index], []).append(index)
    room = min(data.validation, len(taken) // MAX_VALIDATION_SHARE)
    held_out: list[int] = []
    for key in sorted(alike, key=lambda key: hashlib.blake2b(f"{data.seed}/{key}".encode(), digest_size=8).digest()):
        if len(held_out) + len(alike[key]) <= room:
            held_out += alike[key]
    return held_out
