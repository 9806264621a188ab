"""From a recipe's sources to the token sequences of a run: read, deduplicate, encode, mix, hold out, report.

JSON lines are read here, a record at a time by its place in the file, so that a torn line costs that line and a reason
names file and line; `datasets` reads parquet and the hub. (This file is long: what a record may look like, where it
comes from and what becomes of it share their reasons and their report.)
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoints.files import sha256
from .masks import SPOKEN, ChatFormat, Example, MaskError, TokenDataset, content_id
from .recipe import DataConfig, SourceConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant" | "tool", "content": ...} and what templates read
Progress = Callable[[int, int | None], None]  # conversations done, of how many; None while that is unknown

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
COMMIT = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")  # of files
MAX_VALIDATION_SHARE = 10  # at most one conversation in so many is held out
NUM_SHOWN = 5  # places of a reason that a sentence names; data.json names all

ROLES = {  # the names that are in use, and ours
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
TURNS = re.compile("(ua(t+a)*)+")  # the first letters of the roles
NAMES = ("role", "from", "content", "value")  # of a message's fields that are read here; the template gets the others

# Why a record is dropped.
NOT_TEXT = "not UTF-8 text"
NOT_JSON = "not JSON"
NO_FIELDS = "no messages, no conversations, and no instruction with output"
BAD_MESSAGE = "a message without role and text"
UNKNOWN_ROLE = "a role other than system, user, assistant and tool"
OTHER_CONTENT = "content other than text"
EMPTY_MESSAGE = "an empty message"
NO_ANSWER = "no assistant message"
NOT_USER_FIRST = "does not begin with a user message"
NOT_ALTERNATING = "user and assistant do not alternate"
REPEATED = "a repeat of an earlier conversation"

# What is mended, and counted.
CUT_QUESTION = "a last user message without an answer was left out"
EMPTY_SYSTEM = "an empty system message was left out"


class BadRecord(ValueError):  # noqa: N818 (read as: raise BadRecord(reason))
    """A record that is no conversation; its text is one of the reasons above."""


# ---- records as conversations


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turns; the assistant speaks last, unless it is asked."""

    messages: tuple[Message, ...]
    origin: str  # "file:line", or "data set/split:row"
    notes: tuple[str, ...] = ()  # what was mended
    tools: Any = None  # that the assistant may call

    def with_system(self, prompt: str | None) -> Conversation:
        """Return the conversation with a system message in front, if there is a prompt and it has none of its own."""
        if prompt is None or self.messages[0]["role"] == "system":
            return self
        return replace(self, messages=({"role": "system", "content": prompt}, *self.messages))


def parse(record: object, origin: str, keeps_questions: bool = False) -> Conversation:
    """Return the conversation in a record of one of three kinds; raise BadRecord if there is none.

    `messages` or `conversations`: a list of {role, content} or {from, value}. Or `instruction`, maybe `input`, and
    `output`. Content may be a list of text parts; other fields are kept for the chat template. A last user message that
    nobody answers is left out, and so is an empty system message. `keeps_questions` is for conversations that are to be
    answered anew: the last user message stays, and there need be no answer or `output`.
    """
    messages = [_message(raw) for raw in _raw_messages(record, keeps_questions)]
    notes = []
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        del messages[0]
        notes.append(EMPTY_SYSTEM)
    if not all(message["content"].strip() or any(map(message.get, SPOKEN)) for message in messages):
        raise BadRecord(EMPTY_MESSAGE)
    is_asked = bool(messages) and messages[-1]["role"] == "user"
    if is_asked and not keeps_questions and any(m["role"] == "assistant" for m in messages):
        del messages[-1]
        notes.append(CUT_QUESTION)
    _check_turns("".join(m["role"][0] for m in messages) + "a" * (is_asked and keeps_questions))
    tools = record.get("tools") if isinstance(record, dict) else None
    return Conversation(tuple(messages), origin, tuple(notes), _from_text(tools) or None)


def _check_turns(roles: str) -> None:
    turns = roles.removeprefix("s")
    if "a" not in turns:
        raise BadRecord(NO_ANSWER)
    if turns[0] != "u":
        raise BadRecord(NOT_USER_FIRST)
    if not TURNS.fullmatch(turns):
        raise BadRecord(NOT_ALTERNATING)


def _raw_messages(record: object, keeps_questions: bool) -> Sequence[object]:
    if isinstance(record, dict):
        for key in ("messages", "conversations"):
            if isinstance(record.get(key), list):
                messages: list[object] = record[key]
                return messages
        question, answer = (_number_as_text(record.get(key)) for key in ("instruction", "output"))
        if isinstance(question, str) and (isinstance(answer, str) or keeps_questions):
            details = _number_as_text(record.get("input")) or ""
            if not isinstance(details, str):
                raise BadRecord(OTHER_CONTENT)
            question = f"{question}\n\n{details}" if details.strip() else question
            asked = {"role": "user", "content": question}
            return [asked, {"role": "assistant", "content": answer}] if isinstance(answer, str) else [asked]
    raise BadRecord(NO_FIELDS)


def _message(raw: object) -> Message:
    if not isinstance(raw, dict):
        raise BadRecord(BAD_MESSAGE)
    others = {name: value for name, value in raw.items() if name not in NAMES and value not in (None, [], {}, "")}
    if "tool_calls" in others:
        others["tool_calls"] = _from_text(others["tool_calls"])
    role, content = _first(raw, "role", "from"), _number_as_text(_first(raw, "content", "value"))
    if content is None and any(map(others.get, SPOKEN)):
        content = ""
    if not isinstance(role, str) or content is None:
        raise BadRecord(BAD_MESSAGE)
    if role not in ROLES:
        raise BadRecord(UNKNOWN_ROLE)
    return {"role": ROLES[role], "content": _text(content), **others}


def _first(raw: dict[str, Any], *keys: str) -> Any:
    """Return the value of the first key that has one: columns of a data set hold None where a row has nothing."""
    return next((raw[key] for key in keys if raw.get(key) is not None), None)


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _from_text(value: Any) -> Any:
    """Return what data sets write as JSON text, as they do where rows differ in shape."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


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


# ---- sources: records by number, in any order; a million of them are not held in memory


class Records(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...

    def origin(self, index: int) -> str:
        """Return where a record stands, for people."""
        ...

    def record(self, index: int) -> object:
        """Return what is there, to be parsed; raise BadRecord if that cannot be read."""
        ...


class JsonLines:
    """A file with one JSON object a line. Blank lines do not count; the last line may lack its end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._starts, self._lines = array("q"), array("q")
        position = 0
        with Path(path).expanduser().open("rb") as file:
            for number, line in enumerate(file, 1):  # bytes: only \n ends a line, whatever the strings hold
                if line.removeprefix(BYTE_ORDER_MARK).strip():
                    self._starts.append(position)
                    self._lines.append(number)
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def origin(self, index: int) -> str:
        """Return file:line, from 1."""
        return f"{self.path}:{self._lines[index]}"

    def record(self, index: int) -> object:
        """Return what a line holds, of those that are not blank, by its number from 0."""
        with Path(self.path).expanduser().open("rb") as file:
            file.seek(self._starts[index])
            return _from_json(file.readline())


@dataclass(frozen=True)
class Rows:
    """A JSON array, or a table that `datasets` has read."""

    place: str
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self, index: int) -> str:
        """Return place[row], from 0."""
        return f"{self.place}[{index}]"

    def record(self, index: int) -> object:
        """Return a row."""
        return self.rows[index]


@dataclass(frozen=True)
class Files:
    """The records of several files, one after the other: each file may have columns of its own."""

    files: Sequence[Records]

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def origin(self, index: int) -> str:
        """Return where a record stands in its file."""
        file, index = self._find(index)
        return file.origin(index)

    def record(self, index: int) -> object:
        """Return a record of one of the files."""
        file, index = self._find(index)
        return file.record(index)

    def _find(self, index: int) -> tuple[Records, int]:
        for file in self.files:
            if index < len(file):
                return file, index
            index -= len(file)
        raise IndexError(index)


@dataclass(frozen=True)
class Source:
    """The records of one source, and where they come from."""

    records: Records
    name: str  # without the directories of this machine
    split: str | None = None  # of a directory or a data set
    sha256: str | None = None  # of a file or files
    revision: str | None = None  # commit of a data set on the hub


def open_source(config: SourceConfig) -> Source:
    """Return the records of a source; raise ValueError in one sentence when there is no such thing."""
    path = Path(config.path).expanduser()
    if path.is_file():
        if config.split != "train" or config.name is not None:
            raise ValueError(f"{config.path} is a file; split and name are for data sets, leave them out")
        return Source(_open_file(config.path), path.name, sha256=_checksum([path]))
    if path.is_dir():
        if config.name is not None:
            raise ValueError(f"{config.path} is a directory; name is for data sets of the hub, leave it out")
        files = _files_of(path, config)
        records = Files([_open_file(str(file)) for file in files])
        return Source(records, path.resolve().name, config.split, _checksum(files))
    if HUB_NAME.fullmatch(config.path) and path.suffix not in SUFFIXES:
        rows = _load(config.path, config.name, split=config.split)
        commits = map(COMMIT.match, rows.info.download_checksums or {})
        revision = next((match[1] for match in commits if match), None)
        return Source(Rows(f"{config.path}/{config.split}", rows), config.path, config.split, revision=revision)
    raise ValueError(
        f"there is no {config.path}; give a .jsonl, .json, .csv or .parquet file, a directory of them, or a data set "
        "of the hub as owner/name"
    )


def _checksum(files: Sequence[Path]) -> str:
    """Return the SHA-256 of a file, or that of the checksums of several."""
    checksums = [sha256(file) for file in files]
    return checksums[0] if len(files) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()


def _open_file(name: str) -> Records:
    path = Path(name).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{name} is none of {', '.join(SUFFIXES)}")
    if path.suffix in (".jsonl", ".json"):
        with path.open("rb") as file:
            is_array = file.read(1024).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
        if path.suffix == ".jsonl" or not is_array:
            return JsonLines(name)
        try:
            return Rows(name, _from_json(path.read_bytes()))
        except BadRecord as error:
            raise ValueError(f"{name} begins like a JSON array but is {error}") from error
    if path.suffix == ".csv":  # not by `datasets`, which makes numbers of 007 and 1.50, and nothing of NA
        csv.field_size_limit(2**31 - 1)
        try:
            with path.open(newline="", encoding="utf-8-sig") as table:
                return Rows(name, list(csv.DictReader(table)))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{name} is no CSV in UTF-8: {error}") from error
    return Rows(name, _load("parquet", data_files=str(path), split="train"))


def _files_of(folder: Path, config: SourceConfig) -> list[Path]:
    """Return the files of a split, by the rules of `datasets` for their names."""
    try:
        from datasets.data_files import DataFilesDict, get_data_patterns
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {config.path} needs {error.name}: pip install 'taps_ext[train]'") from error
    try:
        splits = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except FileNotFoundError:
        splits = {}
    files = {
        str(name): sorted(path for path in map(Path, paths) if path.suffix in SUFFIXES)
        for name, paths in splits.items()
    }
    if not files.get(config.split):
        there = f"; it has {', '.join(name for name in files if files[name])}" if any(files.values()) else ""
        raise ValueError(f"{config.path} has no {', '.join(SUFFIXES)} files of the split {config.split}{there}")
    return files[config.split]


def _from_json(content: bytes) -> Any:
    try:
        return json.loads(content.removeprefix(BYTE_ORDER_MARK).decode())
    except UnicodeDecodeError:
        raise BadRecord(NOT_TEXT) from None
    except (ValueError, RecursionError):
        raise BadRecord(NOT_JSON) from None


def _load(path: str, *arguments: Any, **options: Any) -> Any:
    place = options.get("data_files", path)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {place} needs {error.name}: pip install 'taps_ext[train]'") from error
    try:
        return datasets.load_dataset(path, *arguments, **options)
    except Exception as error:  # hub, disk, format, configuration: each has exceptions of its own
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise ValueError(f"data set {place} (split {options['split']}) cannot be loaded: {reason}") from error


# ---- from sources to sequences


class Reading:
    """Reads the conversations of a source in an order of the seed, and keeps account of those that it leaves out."""

    def __init__(self, config: SourceConfig, seed: str, seen: set[bytes] | None, keeps_questions: bool = False) -> None:
        """`seen` has the conversations of all sources so far; None: repeats are kept."""
        self.config, self.source = config, open_source(config)
        self.dropped, self.notes = Ledger(), Ledger()
        self._seed, self._seen, self._keeps_questions = seed, seen, keeps_questions

    def __iter__(self) -> Iterator[Conversation]:
        records = self.source.records
        for index in Random(self._seed).sample(range(len(records)), len(records)):
            origin = records.origin(index)
            try:
                conversation = parse(records.record(index), origin, self._keeps_questions)
                self._check_new(conversation)
            except BadRecord as error:
                self.dropped.add(str(error), origin)
                continue
            for note in conversation.notes:
                self.notes.add(note, origin)
            yield conversation

    def _check_new(self, conversation: Conversation) -> None:
        key = fingerprint(conversation)
        if self._seen is not None and key in self._seen:
            raise BadRecord(REPEATED)
        if self._seen is not None:
            self._seen.add(key)

    def check_count(self, num_usable: int) -> None:
        """Raise ValueError if the recipe asks for more than there is."""
        path, count = self.config.path, self.config.count
        if self.config.weight is not None and not num_usable:
            raise ValueError(f"{path} has a weight but no usable conversation{what_was_dropped([self])}")
        if count is not None and num_usable < count:
            raise ValueError(
                f"{path} has {num_usable:,} usable conversations, fewer than its count of {count:,}; "
                f"lower the count{what_was_dropped([self])}"
            )


def read_sources(data: DataConfig, keeps_questions: bool = False) -> list[Reading]:
    """Return the sources of a recipe, to be read one after the other.

    A conversation that occurs again, but for white space, is left out. `keeps_questions`: as in `parse`.
    """
    seen: set[bytes] | None = set() if data.deduplicate else None
    return [Reading(config, f"{data.seed}/{n}", seen, keeps_questions) for n, config in enumerate(data.sources)]


def fingerprint(conversation: Conversation) -> bytes:
    """Return 16 bytes that two conversations share when they differ in white space at most."""
    digest = hashlib.blake2b(digest_size=16)
    for message in conversation.messages:
        others = {name: value for name, value in message.items() if name not in NAMES}
        said = " ".join(message["content"].split())
        digest.update(f"{message['role']}\0{said}\0{json.dumps(others) if others else ''}\0".encode())
    return digest.digest()


def quotas(sources: Sequence[SourceConfig], available: Sequence[int]) -> list[int]:
    """Return how many conversations the mixture takes of each source: its count, its share, or all of them.

    Weights are shares: the source that has least for its share gives all that it has, the others in proportion.
    """
    if sources[0].weight is None:
        return [least if one.count is None else one.count for one, least in zip(sources, available, strict=True)]
    weights = [config.weight or 0.0 for config in sources]
    scarcest = min(range(len(sources)), key=lambda i: available[i] / weights[i])
    shares = (available[scarcest] * weight / weights[scarcest] for weight in weights)
    return [min(round(share), left) for share, left in zip(shares, available, strict=True)]


@dataclass(frozen=True)
class PreparedData:
    """What a run reads."""

    training: TokenDataset
    validation: TokenDataset | None
    report: DataReport


@dataclass
class _Encoded:
    """The conversations of one source, each as a range of encoded examples."""

    reading: Reading
    conversations: list[range] = field(default_factory=list)
    was_cut: list[bool] = field(default_factory=list)


def prepare(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, report_progress: Progress | None = None
) -> PreparedData:
    """Return the training and validation sequences of a recipe, the same on every machine and process.

    A source with a count gives exactly so many conversations (validation included): where one is dropped, another takes
    its place. Raise ValueError, in one sentence, if a source is missing, has too few, or nothing is left.
    """
    chat_format = ChatFormat(with_chat_template(tokenizer, data.chat_template))
    parts = [_Encoded(reading) for reading in read_sources(data)]
    examples = _encode_all(parts, data, chat_format, report_progress)
    if (first := next(examples, None)) is None:
        num_read = sum(len(part.reading.source.records) for part in parts)
        paths = ", ".join(config.path for config in data.sources)
        why = what_was_dropped([part.reading for part in parts])
        raise ValueError(f"no conversation is left to train on of {num_read:,} that were read from {paths}{why}")
    encoded = TokenDataset(chain([first], examples))
    counts = quotas(data.sources, [len(part.conversations) for part in parts])
    for part, count in zip(parts, counts, strict=True):
        del part.conversations[count:]
    taken = [conversation for part in parts for conversation in part.conversations]
    held_out = _held_out(encoded, taken, data)
    kept = [index for one in taken if one not in held_out for index in one]
    Random(f"{data.seed}/order").shuffle(kept)
    validation = TokenDataset(encoded[i] for one in taken if one in held_out for i in one) if held_out else None
    reports = tuple(_source_report(part, encoded, held_out) for part in parts)
    num_training = sum(report.num_training for report in reports)
    report = DataReport(reports, num_training, len(held_out), data.validation, chat_format.has_end_of_turn)
    return PreparedData(TokenDataset(encoded[i] for i in kept), validation, report)


def with_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the chat template in a file, or as it is; raise ValueError if there is no file."""
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


def _encode_all(
    parts: Sequence[_Encoded], data: DataConfig, chat_format: ChatFormat, report_progress: Progress | None
) -> Iterator[Example]:
    """Yield the examples of every source in turn, up to its count; only one conversation is held as objects."""
    seen: set[tuple[int, ...]] = set()  # contents: two conversations may be the same up to where they are cut
    totals = [len(part.reading.source.records) for part in parts]
    total = sum(min(config.count or size, size) for config, size in zip(data.sources, totals, strict=True))
    num_examples = num_done = 0
    for part in parts:
        for conversation in part.reading:
            num_done += 1
            if report_progress:
                report_progress(min(num_done, total), total)
            try:
                whole = chat_format.examples(conversation.with_system(data.system_prompt).messages, conversation.tools)
            except MaskError as error:
                part.reading.dropped.add(str(error), conversation.origin)
                continue
            examples = [cut for one in whole if (cut := one.cut(data.max_length)).num_learned]
            key = tuple(map(content_id, examples))
            if not examples or (data.deduplicate and key in seen):
                nothing = f"nothing to learn in its first {data.max_length:,} tokens"
                part.reading.dropped.add(REPEATED if examples else nothing, conversation.origin)
                continue
            seen.add(key)
            part.conversations.append(range(num_examples, num_examples + len(examples)))
            part.was_cut.append(any(len(one.tokens) > data.max_length for one in whole))
            num_examples += len(examples)
            yield from examples
            if len(part.conversations) == part.reading.config.count:
                break
        part.reading.check_count(len(part.conversations))


def _held_out(encoded: TokenDataset, taken: Sequence[range], data: DataConfig) -> set[range]:
    """Return the validation conversations, chosen by their content: more data or another order changes few of them.

    Conversations of one content stay together, so that none is on both sides where repeats are kept.
    """
    alike: dict[tuple[int, ...], list[range]] = {}
    for conversation in taken:
        alike.setdefault(tuple(encoded.ids[index] for index in conversation), []).append(conversation)
    room = min(data.validation, len(taken) // MAX_VALIDATION_SHARE)
    held_out: set[range] = set()

    def place(key: tuple[int, ...]) -> bytes:
        return hashlib.blake2b(f"{data.seed}/{'-'.join(map(str, key))}".encode(), digest_size=8).digest()

    for key in sorted(alike, key=place):
        if len(held_out) + len(alike[key]) <= room:
            held_out.update(alike[key])
    return held_out


def _source_report(part: _Encoded, encoded: TokenDataset, held_out: set[range]) -> SourceReport:
    source, used = part.reading.source, [index for one in part.conversations for index in one]
    num_validation = sum(one in held_out for one in part.conversations)
    return SourceReport(
        path=part.reading.config.path,
        name=source.name,
        split=source.split,
        revision=source.revision,
        sha256=source.sha256,
        num_read=len(source.records),
        dropped=part.reading.dropped.tallies(),
        notes=part.reading.notes.tallies(),
        num_training=len(part.conversations) - num_validation,
        num_validation=num_validation,
        num_cut=sum(part.was_cut[: len(part.conversations)]),
        num_tokens=sum(encoded.length(i) for i in used),
        num_learned=sum(encoded.num_learned[i] for i in used),
    )


# ---- the report


def what_was_dropped(readings: Sequence[Reading]) -> str:
    """Return the end of a sentence: reasons, numbers and places; empty if nothing was dropped."""
    tallies = [item for reading in readings for item in reading.dropped.tallies().items()]
    return " (dropped: " + "; ".join(f"{reason}: {tally}" for reason, tally in tallies) + ")" if tallies else ""


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
        """Count one more."""
        self._places.setdefault(reason, []).append(place)

    def tallies(self) -> dict[str, Tally]:
        """Return the tallies by reason, the most frequent first, with places in their order."""
        by_count = sorted(self._places.items(), key=lambda one: -len(one[1]))
        return {reason: Tally(len(places), tuple(sorted(places, key=_in_file))) for reason, places in by_count}


def _in_file(place: str) -> list[tuple[str, int]]:
    """Return what sorts places by file and then by line: a.jsonl:9 before a.jsonl:10."""
    return [(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", place)]


@dataclass(frozen=True)
class SourceReport:
    """One source. What is neither dropped nor used was left over: the recipe asked for fewer."""

    path: str  # as the recipe has it
    name: str  # without the folders of this machine
    split: str | None  # of a data set
    revision: str | None  # commit of a data set on the hub
    sha256: str | None  # of the file or files; None: a data set of the hub, which has a revision
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
        """Return the number of conversations that could not be used."""
        return sum(tally.count for tally in self.dropped.values())

    def lines(self) -> Iterator[str]:
        """Yield sentences for people."""
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
        """Return sentences for people: every source, and what was dropped of it, where and why."""
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
        """Return all of it, for data.json."""
        return asdict(self)

    def provenance(self) -> list[dict[str, Any]]:
        """Return what a drafter says about its data: name, split, checksum and number of conversations by source."""
        return [
            {"path": one.name, "split": one.split, "revision": one.revision, "sha256": one.sha256}
            | {"count": one.num_training}
            for one in self.sources
        ]
