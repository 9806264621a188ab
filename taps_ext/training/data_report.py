"""What became of the conversations: of each source, what was dropped and why, and what is learned from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

NUM_SHOWN = 5  # places of a reason that a sentence names; data.json names all


@dataclass(frozen=True)
class Tally:
    """How often something happened, and where."""

    count: int
    places: tuple[str, ...]

    def __str__(self) -> str:
        more = ", ..." if self.count > NUM_SHOWN else ""
        return f"{self.count:,} ({', '.join(self.places[:NUM_SHOWN])}{more})"


class Ledger:
    """Counts places by reason."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        """One more."""
        self._places.setdefault(reason, []).append(place)

    def tallies(self) -> dict[str, Tally]:
        """By reason, the most frequent first."""
        by_count = sorted(self._places.items(), key=lambda one: -len(one[1]))
        return {reason: Tally(len(places), tuple(places)) for reason, places in by_count}


@dataclass(frozen=True)
class SourceReport:
    """One source. What is neither dropped nor used was left over: the recipe asked for fewer."""

    path: str  # as the recipe has it
    name: str  # without the folders of this machine
    split: str | None  # of a data set
    revision: str | None  # commit of a data set on the hub
    sha256: str  # of the file; of a data set, over what was read from it, in order
    num_read: int  # records: lines that are not blank, or rows
    dropped: Mapping[str, Tally]  # by reason; of those tried, where the recipe asked for fewer
    notes: Mapping[str, Tally]  # what was mended
    num_training: int
    num_validation: int
    num_cut: int  # of the used ones: longer than max_length
    num_tokens: int  # of the used ones, after the cut
    num_learned: int  # of these tokens

    @property
    def num_dropped(self) -> int:
        """Conversations that could not be used."""
        return sum(tally.count for tally in self.dropped.values())

    def lines(self) -> Iterator[str]:
        """Sentences for people."""
        yield (
            f"{self.path}: {self.num_read:,} read, {self.num_dropped:,} dropped, {self.num_training:,} for training "
            f"and {self.num_validation:,} for validation; {self.num_tokens:,} tokens, {self.num_learned:,} of them "
            f"learned; {self.num_cut:,} cut"
        )
        for reason, tally in self.dropped.items():
            yield f"  dropped, {reason}: {tally}"
        for note, tally in self.notes.items():
            yield f"  kept, {note}: {tally}"


@dataclass(frozen=True)
class DataReport:
    """All sources, in the order of the recipe."""

    sources: tuple[SourceReport, ...]
    num_training: int
    num_validation: int
    num_validation_asked: int
    has_end_of_turn: bool  # whether the template ends an answer with a special token

    def lines(self) -> list[str]:
        """Sentences for people: every source, and what was dropped of it, where and why."""
        sentences = [line for source in self.sources for line in source.lines()]
        if self.num_validation < self.num_validation_asked:
            sentences.append(
                f"{self.num_validation:,} conversations are held out, a tenth of all at most; "
                f"validation asks for {self.num_validation_asked:,}"
            )
        if not self.has_end_of_turn:
            sentences.append("the chat template ends answers with no special token: only their contents are learned")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """All of it, for data.json."""
        return asdict(self)

    def provenance(self) -> list[dict[str, Any]]:
        """What a drafter says about its data: of each source its name, split, checksum and conversations trained on."""
        facts = [
            {"path": source.name, "split": source.split, "revision": source.revision, "sha256": source.sha256}
            for source in self.sources
        ]
        counts = [{"count": source.num_training} for source in self.sources]
        return [{**fact, **count} for fact, count in zip(facts, counts, strict=True)]
