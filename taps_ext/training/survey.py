"""What a recipe's sources hold, and how many conversations the mixture takes of each. Texts are read, not kept."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from random import Random

from .conversations import BadRecord, Conversation, parse
from .data_report import Ledger, Tally
from .recipe import DataConfig, SourceConfig
from .sources import open_source

REPEATED = "a repeat of an earlier conversation"

Progress = Callable[[int, int | None], None]  # conversations done, of how many; None while that is unknown


class SurveyedSource:
    """A source that was read once: which of its records are conversations, and what is wrong with the others."""

    def __init__(self, config: SourceConfig, keeps_questions: bool = False) -> None:
        self.config, self._keeps_questions = config, keeps_questions
        self.source = open_source(config)
        self.usable = array("q")  # numbers of records, ascending
        self.dropped, self.notes = Ledger(), Ledger()
        self.sha256 = self.source.sha256 or ""

    def look(self, seen: set[bytes] | None) -> Iterator[None]:
        """Reads one record after another; `seen` has all sources' conversations so far, None: repeats are kept."""
        digest = hashlib.sha256()
        for index in range(len(self.source)):
            yield
            try:
                conversation = self._conversation(index)
            except BadRecord as error:
                self.dropped.add(str(error), self.source.origin(index))
                digest.update(f"{error}\n".encode())
                continue
            digest.update(json.dumps(conversation.messages).encode())
            self._take(index, conversation, seen)
        self.sha256 = self.source.sha256 or digest.hexdigest()

    def _take(self, index: int, conversation: Conversation, seen: set[bytes] | None) -> None:
        key = fingerprint(conversation)
        if seen is not None and key in seen:
            self.dropped.add(REPEATED, conversation.origin)
            return
        if seen is not None:
            seen.add(key)
        for note in conversation.notes:
            self.notes.add(note, conversation.origin)
        self.usable.append(index)

    def conversations(self, seed: str | None = None) -> Iterator[Conversation]:
        """The usable conversations, each read again; in the order of the source, or in one of the seed."""
        for index in self.usable if seed is None else Random(seed).sample(self.usable, len(self.usable)):
            yield self._conversation(index)

    def _conversation(self, index: int) -> Conversation:
        return parse(self.source.record(index), self.source.origin(index), self._keeps_questions)

    def check(self, num_usable: int) -> None:
        """ValueError if the recipe asks for more than there is."""
        if self.config.weight is not None and not num_usable:
            raise ValueError(f"{self.config.path} has a weight but no usable conversation{what_was_dropped([self])}")
        if self.config.count is not None and num_usable < self.config.count:
            raise ValueError(
                f"{self.config.path} has {num_usable:,} usable conversations, fewer than its count of "
                f"{self.config.count:,}; lower the count{what_was_dropped([self])}"
            )


def survey(
    data: DataConfig, report_progress: Progress | None = None, keeps_questions: bool = False
) -> list[SurveyedSource]:
    """Reads every source; a conversation that occurs again, but for white space, is kept where it occurs first.

    `keeps_questions`: as in `parse`.
    """
    surveyed = [SurveyedSource(config, keeps_questions) for config in data.sources]
    seen: set[bytes] | None = set() if data.deduplicate else None
    num_read = 0
    for source in surveyed:
        for _ in source.look(seen):
            num_read += 1
            if report_progress:
                report_progress(num_read, None)
        source.check(len(source.usable))
    return surveyed


def quotas(sources: Sequence[SourceConfig], available: Sequence[int]) -> list[int]:
    """How many conversations the mixture takes of each source: its count, its share, or all of them.

    Weights are shares: the source that has least for its share gives all that it has, the others in proportion.
    """
    if sources[0].weight is None:
        return [
            least if config.count is None else config.count for config, least in zip(sources, available, strict=True)
        ]
    weights = [config.weight or 0.0 for config in sources]
    scarcest = min(range(len(sources)), key=lambda i: available[i] / weights[i])
    shares = (available[scarcest] * weight / weights[scarcest] for weight in weights)
    return [min(round(share), left) for share, left in zip(shares, available, strict=True)]


def what_was_dropped(sources: Sequence[SurveyedSource]) -> str:
    """The end of a sentence: reasons, numbers and places; empty if nothing was dropped."""
    tallies: list[tuple[str, Tally]] = [item for source in sources for item in source.dropped.tallies().items()]
    return " (dropped: " + "; ".join(f"{reason}: {tally}" for reason, tally in tallies) + ")" if tallies else ""


def fingerprint(conversation: Conversation) -> bytes:
    """16 bytes that two conversations share when they differ in white space at most."""
    digest = hashlib.blake2b(digest_size=16)
    for message in conversation.messages:
        digest.update(f"{message['role']}\0{' '.join(message['content'].split())}\0".encode())
    return digest.digest()
