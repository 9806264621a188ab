"""Claims about the data of a training run: what is read, what is dropped and named, how sources are mixed."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from taps_ext.tiny import assets
from taps_ext.training import data as reasons
from taps_ext.training.data import (
    COMMIT,
    REPEATED,
    BadRecord,
    Conversation,
    Message,
    PreparedData,
    Reading,
    Tally,
    parse,
    prepare,
    quotas,
    read_sources,
    with_chat_template,
)
from taps_ext.training.masks import ChatFormat, Example, TokenDataset
from taps_ext.training.recipe import DataConfig, SourceConfig
from taps_ext.training.trainer import POOL_BATCHES, BatchOrder

REASONS = ("NOT_TEXT", "NOT_JSON", "NO_FIELDS", "BAD_MESSAGE", "UNKNOWN_ROLE", "OTHER_CONTENT", "EMPTY_MESSAGE")
REASONS += ("NO_ANSWER", "NOT_USER_FIRST", "NOT_ALTERNATING", "CUT_QUESTION", "EMPTY_SYSTEM")
Record = dict[str, Any]
WORDS = (
    "one",
    "two",
    "apples",
    "gives",
    "how many",
    "Größe",
    "漢字",
    "\u2028",
    "🙂",
    "\\boxed{7}",
    "$x^2$",
    "<|end|>",
    "\t",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(assets() / "target")
    return loaded


def text(rng: Random, marker: str) -> str:
    return f"{marker} {' '.join(rng.choices(WORDS, k=rng.randint(1, 8)))}"


def talk(rng: Random, marker: str, turns: int | None = None, system: bool | None = None) -> list[Message]:
    """A conversation that no other marker has."""
    has_system = rng.random() < 0.3 if system is None else system
    roles = ["system"] * has_system + ["user", "assistant"] * (turns or rng.randint(1, 3))
    return [{"role": role, "content": text(rng, f"{marker}/{index}")} for index, role in enumerate(roles)]


def spelled(rng: Random, messages: Sequence[Message]) -> Record:
    """The conversation in one of the forms that are read."""
    short = {"system": "system", "user": "human", "assistant": "gpt"}
    forms: list[Record] = [
        {"messages": list(messages), "id": 7},
        {"conversations": list(messages), "messages": None},
        {"conversations": [{"from": short[m["role"]], "value": m["content"]} for m in messages]},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]},
        {"messages": [{**m, "content": [m["content"][:2], m["content"][2:]], "value": None} for m in messages]},
    ]
    if [m["role"] for m in messages] == ["user", "assistant"]:
        forms.append({"instruction": messages[0]["content"], "input": "", "output": messages[1]["content"]})
        forms.append({"instruction": messages[0]["content"], "output": messages[1]["content"], "source": "x"})
    return rng.choice(forms)


def as_line(record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def defective(rng: Random, marker: str) -> tuple[bytes, str]:
    """A line that is no conversation, and the reason."""
    good = talk(rng, marker, turns=2, system=False)
    at = rng.randrange(4)

    def line(messages: object) -> bytes:
        return as_line({"messages": messages})

    def changed(**change: Any) -> bytes:
        return line([{**m, **change} if i == at else m for i, m in enumerate(good)])

    return rng.choice(
        (
            (as_line({"messages": good})[: rng.randint(1, 40)], reasons.NOT_JSON),
            (b"[" * 100_000, reasons.NOT_JSON),
            (as_line({"messages": good}).replace(b"/", b"\xff", 1), reasons.NOT_TEXT),
            (json.dumps({"messages": [good[0], {**good[1], "content": "half \ud83d"}]}).encode(), reasons.NOT_TEXT),
            (as_line(rng.choice(({}, [], 3, None, "text", {"messages": None}, {"text": "x"}))), reasons.NO_FIELDS),
            (as_line({"instruction": "x", "output": None}), reasons.NO_FIELDS),
            (line([*good[:at], rng.choice(("text", None, {}, {"role": "user"}, {"content": "x"})), *good[at:]]),)
            + (reasons.BAD_MESSAGE,),
            (changed(content=None), reasons.BAD_MESSAGE),
            (changed(role=rng.choice(("critic", "User", "function", ""))), reasons.UNKNOWN_ROLE),
            (changed(content=rng.choice(({"a": 1}, [{"type": "image", "url": "x"}]))), reasons.OTHER_CONTENT),
            (as_line({"instruction": "x", "input": ["y"], "output": "z"}), reasons.OTHER_CONTENT),
            (changed(content=rng.choice(("", " \n", []))), reasons.EMPTY_MESSAGE),
            (as_line({"instruction": "x", "output": " "}), reasons.EMPTY_MESSAGE),
            (line(rng.choice(([], good[:1], good[::2]))), reasons.NO_ANSWER),
            (line(good[1:]), reasons.NOT_USER_FIRST),
            (line([{"role": "system", "content": "s"}, *good[1:]]), reasons.NOT_USER_FIRST),
            (line(rng.choice((good[:1] + good, good[:2] + good[1:], good + good[:1] * 2))), reasons.NOT_ALTERNATING),
            (line([*good, {"role": "system", "content": "s"}]), reasons.NOT_ALTERNATING),
        )
    )


def mended(rng: Random, marker: str) -> tuple[bytes, list[Message], str]:
    """A line that is mended, the conversation that is left, and the note."""
    good = talk(rng, marker, system=False)
    if rng.random() < 0.5:
        question = {"role": "user", "content": "and then?"}
        return as_line(spelled(rng, [*good, question])), good, reasons.CUT_QUESTION
    return as_line(spelled(rng, [{"role": "system", "content": " "}, *good])), good, reasons.EMPTY_SYSTEM


class Planted:
    """A file with all kinds of lines, and what is to be found in it."""

    def __init__(self, path: Path, seed: int, num_lines: int = 60) -> None:
        rng = Random(seed)
        self.path = path
        self.good: list[Conversation] = []
        self.places: dict[str, list[str]] = {}
        self.num_read = 0
        lines = [self._line(rng, number) for number in range(1, num_lines + 1)]
        end = rng.choice((b"\n", b"\r\n"))
        content = rng.choice((b"", b"\xef\xbb\xbf")) + end.join(lines) + rng.choice((b"", end))
        path.write_bytes(content)

    def _line(self, rng: Random, number: int) -> bytes:
        kind, marker, place = rng.random(), f"m{number}", f"{self.path}:{number}"
        if kind < 0.1:
            return rng.choice((b"", b"  ", b"\t"))
        self.num_read += 1
        if kind < 0.4:
            line, reason = defective(rng, marker)
            self.places.setdefault(reason, []).append(place)
            return line
        if kind < 0.5:
            line, messages, note = mended(rng, marker)
            self.places.setdefault(note, []).append(place)
            self.good.append(Conversation(tuple(messages), place, (note,)))
            return line
        messages = talk(rng, marker)
        self.good.append(Conversation(tuple(messages), place))
        return as_line(spelled(rng, messages))

    def tallies(self) -> dict[str, Tally]:
        return {reason: Tally(len(found), tuple(found)) for reason, found in self.places.items()}


def place(origin: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", origin.rpartition("/")[2])))


def by_origin(reading: Reading) -> list[Conversation]:
    return sorted(reading, key=lambda conversation: place(conversation.origin))


def in_order(tally: Tally) -> Tally:
    return Tally(tally.count, tuple(sorted(tally.places, key=place)))


def write_talks(path: Path, talks: Sequence[Sequence[Message]]) -> str:
    path.write_bytes(b"".join(as_line({"messages": list(messages)}) + b"\n" for messages in talks))
    return str(path)


def talks(prefix: str, count: int, seed: int = 0) -> list[list[Message]]:
    rng = Random(f"{prefix}/{seed}")
    return [talk(rng, f"{prefix}{number}", system=False) for number in range(count)]


def data(*sources: SourceConfig | str | Path, **more: Any) -> DataConfig:
    configs = tuple(s if isinstance(s, SourceConfig) else SourceConfig(str(s)) for s in sources)
    return DataConfig([*configs], **{"max_length": 400, "validation": 0, **more})


def contents(dataset: TokenDataset | None) -> Counter[Example]:
    return Counter(dataset[i] for i in range(len(dataset))) if dataset else Counter()


def encoded(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Sequence[Message]], cut: int = 400) -> Counter[Example]:
    chat_format = ChatFormat(tokenizer)
    return Counter(chat_format.encode(messages).cut(cut) for messages in talks)


def sentence(*sources: SourceConfig | str | Path, tokenizer: PreTrainedTokenizerBase, **more: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        prepare(data(*sources, **more), tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_each_bad_line_is_counted_at_its_place_and_nothing_else_is_dropped(tmp_path: Path) -> None:
    seen_reasons = set()
    for seed in range(60):
        planted = Planted(tmp_path / f"{seed}.jsonl", seed)
        (found,) = read_sources(data(planted.path))
        assert by_origin(found) == planted.good, seed
        tallies = {
            reason: in_order(tally) for reason, tally in (found.dropped.tallies() | found.notes.tallies()).items()
        }
        assert tallies == planted.tallies(), seed
        assert len(found.source.records) == planted.num_read
        seen_reasons |= set(planted.places)
    assert seen_reasons == {getattr(reasons, name) for name in REASONS}, "a reason that no line was planted for"


def test_a_json_array_reads_as_the_same_lines_would(tmp_path: Path) -> None:
    rng = Random(1)
    records = [spelled(rng, talk(rng, f"m{number}")) for number in range(20)] + [{"no": "conversation"}]
    array, lines = tmp_path / "array.json", tmp_path / "lines.json"
    array.write_text(json.dumps(records, indent=1), encoding="utf-8-sig")
    lines.write_text("\n".join(map(json.dumps, records)), encoding="utf-8-sig")
    first, second = read_sources(data(array, lines, deduplicate=False))
    one, other = ([c.messages for c in by_origin(reading)] for reading in (first, second))
    assert one == other and len(one) == 20
    assert first.dropped.tallies() == {reasons.NO_FIELDS: Tally(1, (f"{array}[20]",))}
    assert second.dropped.tallies() == {reasons.NO_FIELDS: Tally(1, (f"{lines}:21",))}


def test_an_instruction_with_input_is_one_question(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_line({"instruction": "Add.", "input": "2 and 3", "output": "5"}))
    (conversation,) = read_sources(data(path))[0]
    assert [m["content"] for m in conversation.messages] == ["Add.\n\n2 and 3", "5"]


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_of_files_reads_as_the_file_would(
    tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    import datasets

    rows: list[Record] = [{"conversations": [{"from": "human", "value": "hi"}], "source": "x"}]  # without an answer
    rows += [{"conversations": [{**m, "from": None} for m in one], "source": None} for one in talks("m", 12)]
    rows += [{"instruction": "Add 2 and 3.", "output": "5"}]
    folder, lines = tmp_path / "folder", tmp_path / "lines.jsonl"
    folder.mkdir()
    lines.write_bytes(b"\n".join(map(as_line, rows)))
    keys = ("conversations", "instruction", "output")
    columns = datasets.Dataset.from_list([{key: row.get(key) for key in keys} for row in rows])
    if kind == "jsonl":
        columns.to_json(folder / "train.jsonl")
    else:
        columns.to_parquet(folder / "train.parquet")
    from_folder, from_file = prepare(data(folder), tokenizer), prepare(data(lines), tokenizer)
    assert contents(from_folder.training) == contents(from_file.training)
    origin = f"{folder}/train.jsonl:1" if kind == "jsonl" else f"{folder}/train.parquet[0]"
    assert from_folder.report.sources[0].dropped == {reasons.NO_ANSWER: Tally(1, (origin,))}
    (provenance,) = from_folder.report.provenance()
    assert (provenance["path"], provenance["split"], provenance["count"]) == ("folder", "train", 13)
    assert len(provenance["sha256"]) == 64
    missing = sentence(SourceConfig(str(folder), split="test"), tokenizer=tokenizer)
    assert missing == f"{folder} has no .jsonl, .json, .csv, .parquet files of the split test; it has train"


@pytest.mark.usefixtures("datasets_cache")
def test_a_folder_that_mixes_shapes_reads_each_record_by_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    import datasets

    folder, some = tmp_path / "folder", talks("m", 6)
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(
        as_line({"messages": some[0]}) + b"\n" + as_line({"instruction": "Add.", "output": "5"}) + b"\n{torn"
    )
    (folder / "b.csv").write_text("instruction,output\nTwo?,2\n")
    datasets.Dataset.from_list([{"messages": one} for one in some[1:]]).to_parquet(folder / "c.parquet")
    prepared = prepare(data(folder), tokenizer)
    assert len(prepared.training) == 1 + 1 + 1 + 5
    assert prepared.report.sources[0].dropped == {reasons.NOT_JSON: Tally(1, (f"{folder}/a.jsonl:3",))}


@pytest.mark.usefixtures("datasets_cache")
def test_a_file_that_datasets_cannot_read_is_named_with_the_cause(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    said = sentence(tmp_path / "a.parquet", tokenizer=tokenizer)
    assert said.startswith(f"data set {tmp_path}/a.parquet (split train) cannot be loaded: ")
    assert "error occurred while generating" not in said and "arquet" in said.split("loaded: ")[1]


@pytest.mark.usefixtures("datasets_cache")
def test_answers_of_a_csv_are_text_though_they_look_like_numbers(tmp_path: Path) -> None:
    answers = ["2", "007", "1.50", "1e3", "NA", "None", "true", "-", "1,000"]
    rows = "".join(f'question {n},"{answer}"\n' for n, answer in enumerate(answers))
    (tmp_path / "a.csv").write_text("instruction,output\n" + rows)
    (found,) = read_sources(data(tmp_path / "a.csv"))
    assert [one.messages[1]["content"] for one in by_origin(found)] == answers and not found.dropped.tallies()


@pytest.mark.parametrize(("value", "said"), [(2, "2"), (2.5, "2.5"), (0, "0"), (-7, "-7")])
def test_a_number_is_an_answer(value: float, said: str) -> None:
    assert parse({"instruction": "How many?", "output": value}, "here").messages[1]["content"] == said
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": value}]
    assert parse({"messages": messages}, "here").messages[1]["content"] == said


def test_fields_that_a_template_may_read_stay_with_the_conversation(tmp_path: Path) -> None:
    """The three of message_fields.jsonl."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    asked = {"role": "user", "content": "Weather in Bern?"}
    one = parse({"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]}, "here")
    assert one.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    said = {"role": "assistant", "reasoning_content": "Two and two.", "content": "Four.", "tool_calls": None}
    two = parse({"messages": [asked, said]}, "here")
    assert two.messages[1] == {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    for given in (tools, json.dumps(tools)):
        assert parse({"tools": given, "messages": [asked, {"role": "assistant", "content": "Hi."}]}, "x").tools == tools


def test_a_record_whose_fields_the_template_does_not_read_is_dropped_with_the_reason(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = {"role": "user", "content": "2+2?"}
    lines = [{"messages": [asked, {"role": "assistant", "reasoning_content": "Two and two.", "content": "Four."}]}]
    lines += [{"tools": [{"type": "function"}], "messages": [asked, {"role": "assistant", "content": "Hi."}]}]
    lines += [{"messages": [{**asked, "id": 7}, {"role": "assistant", "content": "4", "weight": 1}], "topic": "sums"}]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(map(as_line, lines)))
    prepared = prepare(data(path), tokenizer)
    assert len(prepared.training) == 1, "what is about a message, and not said in it, costs no record"
    assert prepared.report.sources[0].dropped == {
        "the chat template does not read reasoning_content": Tally(1, (f"{path}:1",)),
        "the chat template does not read tools": Tally(1, (f"{path}:2",)),
    }


@pytest.mark.usefixtures("datasets_cache")
def test_the_checksum_of_a_folder_follows_its_content_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def checksum(name: str, rows: Sequence[Sequence[Message]]) -> str | None:
        (tmp_path / name).mkdir()
        write_talks(tmp_path / name / f"{name}.jsonl", rows)
        return read_sources(data(tmp_path / name))[0].source.sha256

    rows = talks("m", 5)
    assert checksum("a", rows) == checksum("b", rows)
    assert len({checksum("c", rows), checksum("d", rows[::-1]), checksum("e", rows[:4])}) == 3


def test_the_revision_of_a_data_set_of_the_hub_is_its_commit() -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    match = COMMIT.match(f"hf://datasets/owner/name@{commit}/folder/file.json")
    assert match and match[1] == commit
    assert not COMMIT.match("/home/someone/data.json")


# --- repeats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "roles"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, ["user"]),
        ({"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]}, None),
        ({"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}]}, ["system", "user"]),
        ({"instruction": "a", "input": "b"}, ["user"]),
        ({"instruction": "a", "output": "b"}, ["user", "assistant"]),
    ],
)
def test_questions_without_an_answer_are_kept_for_those_who_will_answer(record: Any, roles: list[str] | None) -> None:
    kept = parse(record, "here", keeps_questions=True)
    assert [message["role"] for message in kept.messages] == (roles or ["user", "assistant", "user"]) and not kept.notes
    if roles is None:  # there is an answer before the question
        assert parse(record, "here").notes == (reasons.CUT_QUESTION,)
    elif roles[-1] == "user":
        with pytest.raises(BadRecord):
            parse(record, "here")


@pytest.mark.parametrize("roles", [("assistant",), ("user", "user"), ("system",), ("user", "assistant", "assistant")])
def test_who_will_answer_needs_a_question_in_its_place(roles: tuple[str, ...]) -> None:
    record = {"messages": [{"role": role, "content": "a"} for role in roles]}
    with pytest.raises(BadRecord):
        parse(record, "here", keeps_questions=True)


def test_repeats_are_dropped_within_and_across_sources_whatever_their_blanks(tmp_path: Path) -> None:
    for seed in range(20):
        rng = Random(seed)
        distinct = talks("m", 12, seed)
        lines = [(number, rng.choice((" ", "\n", "  ", "\t "))) for number in rng.choices(range(12), k=40)]
        spaced = [[{**m, "content": m["content"].replace(" ", blank)} for m in distinct[n]] for n, blank in lines]
        first = write_talks(tmp_path / "a.jsonl", spaced[:25])
        second = write_talks(tmp_path / "b.jsonl", spaced[25:])
        found = read_sources(data(first, second))
        kept = [" ".join(c.messages[0]["content"].split()) for source in found for c in source]
        assert len(kept) == len(set(kept)) == len({number for number, _ in lines})
        dropped = [source.dropped.tallies().get(REPEATED, Tally(0, ())).count for source in found]
        assert sum(dropped) == 40 - len(kept)
        assert sum(1 for source in read_sources(data(first, second, deduplicate=False)) for _ in source) == 40


def test_conversations_that_are_equal_up_to_the_cut_are_repeats(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    long = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one two three " * 50}]
    path = write_talks(tmp_path / "a.jsonl", [long, [*long, *talks("m", 1)[0]], *talks("x", 3)])
    prepared = prepare(data(path, max_length=60), tokenizer)
    assert max(contents(prepared.training).values()) == 1
    tally = prepared.report.sources[0].dropped[REPEATED]
    assert tally.count == 1 and set(tally.places) <= {f"{path}:1", f"{path}:2"}
    assert len(prepare(data(path, max_length=60, deduplicate=False), tokenizer).training) == len(prepared.training) + 1


# --- mixing ----------------------------------------------------------------------------------------------------------


def unlearnable(number: int) -> list[Message]:
    """Nothing of the answer is within 400 tokens."""
    return [{"role": "user", "content": f"why {number} " * 400}, {"role": "assistant", "content": "because"}]


def test_counts_are_reached_past_conversations_that_cannot_be_used(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    a, b = talks("a", 30), talks("b", 30)
    mixed = [unlearnable(n) if n % 3 == 0 else one for n, one in enumerate(a)]
    first, second = write_talks(tmp_path / "a.jsonl", mixed), write_talks(tmp_path / "b.jsonl", b)
    for seed in range(4):
        wanted = data(SourceConfig(first, count=18), SourceConfig(second, count=7), seed=seed)
        prepared = prepare(wanted, tokenizer)
        found = contents(prepared.training)
        usable = encoded(tokenizer, [one for n, one in enumerate(a) if n % 3])
        assert sum((found & usable).values()) == 18
        assert sum((found & encoded(tokenizer, b)).values()) == 7
        assert len(prepared.training) == 25 and max(found.values()) == 1
        reports = prepared.report.sources
        assert [report.num_training for report in reports] == [18, 7]
        assert reports[0].num_dropped <= 10 and not reports[1].dropped
        assert reports[0].num_dropped == 0 or list(reports[0].dropped) == ["nothing to learn in its first 400 tokens"]


def test_a_count_takes_a_sample_that_the_seed_decides(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = talks("m", 60)
    source = SourceConfig(write_talks(tmp_path / "a.jsonl", lines), count=20)
    samples = [contents(prepare(data(source, seed=seed), tokenizer).training) for seed in range(3)]
    samples.append(encoded(tokenizer, lines[:20]))
    assert all(2 <= sum((a & b).values()) <= 13 for a, b in combinations(samples, 2)), "6.7 on average, deviation 1.8"


def test_a_count_that_cannot_be_reached_says_what_there_is(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = [*talks("a", 8), unlearnable(1), unlearnable(2)]
    path = write_talks(tmp_path / "a.jsonl", lines)
    with Path(path).open("ab") as file:
        file.write(b"no JSON\n")
    early = sentence(SourceConfig(path, count=11), tokenizer=tokenizer)
    first, second = (9, 10) if early.index(":9") < early.index(":10") else (10, 9)
    assert early == (
        f"{path} has 8 usable conversations, fewer than its count of 11; lower the count "
        f"(dropped: nothing to learn in its first 400 tokens: 2 ({path}:{first}, {path}:{second}); "
        f"not JSON: 1 ({path}:11))"
    )
    late = sentence(SourceConfig(path, count=9), tokenizer=tokenizer)
    assert late.startswith(f"{path} has 8 usable conversations, fewer than its count of 9; ")
    assert "nothing to learn in its first 400 tokens: 2" in late
    assert len(prepare(data(SourceConfig(path, count=8)), tokenizer).training) == 8


def test_weights_are_shares_and_the_scarcest_source_gives_all() -> None:
    for seed in range(200):
        rng = Random(seed)
        available = [rng.randint(1, 5000) for _ in range(rng.randint(1, 4))]
        weights = [rng.choice((1.0, 2.0, rng.random() + 0.01)) for _ in available]
        taken = quotas([SourceConfig("x", weight=w) for w in weights], available)
        assert all(0 <= n <= m for n, m in zip(taken, available, strict=True))
        assert any(n == m for n, m in zip(taken, available, strict=True))
        total = min(m / w for m, w in zip(available, weights, strict=True))
        assert all(abs(n - total * w) <= 0.5001 for n, w in zip(taken, weights, strict=True))


def test_a_weighted_source_that_loses_conversations_lowers_the_others(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    scarce = [*talks("a", 8), unlearnable(1), unlearnable(2)]
    first, second = write_talks(tmp_path / "a.jsonl", scarce), write_talks(tmp_path / "b.jsonl", talks("b", 40))
    prepared = prepare(data(SourceConfig(first, weight=1), SourceConfig(second, weight=3)), tokenizer)
    assert [report.num_training for report in prepared.report.sources] == [8, 24]
    assert (
        len(prepared.training) == 32 and sum((contents(prepared.training) & encoded(tokenizer, scarce)).values()) == 8
    )


def test_without_counts_everything_is_used_in_a_mixed_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    a, b = talks("a", 25), talks("b", 25)
    paths = write_talks(tmp_path / "a.jsonl", a), write_talks(tmp_path / "b.jsonl", b)
    training = prepare(data(*paths), tokenizer).training
    assert contents(training) == encoded(tokenizer, a + b)
    of_a = encoded(tokenizer, a)
    turns = [training[i] in of_a for i in range(50)]
    assert sum(x != y for x, y in pairwise(turns)) > 10, "the sources lie one after the other"


# --- validation ------------------------------------------------------------------------------------------------------


def test_validation_and_training_share_nothing_and_lose_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for seed in range(6):
        rng = Random(seed)
        distinct = talks("m", rng.randint(15, 40), seed)
        lines = [*distinct, *rng.choices(distinct, k=rng.randint(0, 30))]
        path, deduplicate = write_talks(tmp_path / "a.jsonl", lines), seed % 2 == 0
        wanted = rng.choice((1, 3, 100))
        prepared = prepare(data(path, validation=wanted, deduplicate=deduplicate, seed=seed), tokenizer)
        training, validation = contents(prepared.training), contents(prepared.validation)
        assert not training & validation
        assert training + validation == encoded(tokenizer, distinct if deduplicate else lines)
        total, held_out = len(distinct if deduplicate else lines), sum(validation.values())
        limit = min(wanted, total // 10)
        assert held_out == limit if deduplicate else limit - 4 <= held_out <= limit
        assert (prepared.report.num_training, prepared.report.num_validation) == (total - held_out, held_out)


def test_too_few_conversations_leave_no_validation_and_say_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_talks(tmp_path / "a.jsonl", talks("m", 9))
    prepared = prepare(data(path, validation=5), tokenizer)
    assert prepared.validation is None and len(prepared.training) == 9
    assert prepared.report.lines()[-1].startswith("0 conversations are held out, a tenth of all at most")
    assert len(prepare(data(path), tokenizer).report.lines()) == 1


def test_more_data_leaves_most_of_the_validation_as_it_was(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = talks("m", 60)
    before, after = (
        write_talks(tmp_path / "a.jsonl", lines),
        write_talks(tmp_path / "b.jsonl", talks("n", 6) + lines[::-1]),
    )
    first, second = (contents(prepare(data(p, validation=5), tokenizer).validation) for p in (before, after))
    assert sum((first & second).values()) >= 4


# --- the same everywhere ---------------------------------------------------------------------------------------------


def test_data_is_a_function_of_the_recipe_and_the_files_content(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lines = talks("m", 40)
    here, there = tmp_path / "a.jsonl", tmp_path / "elsewhere" / "b.jsonl"
    there.parent.mkdir()
    write_talks(here, lines), write_talks(there, lines)

    def checksums(prepared: PreparedData) -> tuple[str, str]:
        assert prepared.validation is not None
        return prepared.training.checksum, prepared.validation.checksum

    config = data(SourceConfig(str(here), count=20), validation=2)
    first = checksums(prepare(config, tokenizer))
    assert checksums(prepare(config, tokenizer)) == first
    assert checksums(prepare(replace(config, sources=(SourceConfig(str(there), count=20),)), tokenizer)) == first
    assert len({first, checksums(prepare(replace(config, seed=1), tokenizer))}) == 2


# --- the order of batches --------------------------------------------------------------------------------------------


def test_an_epoch_reads_each_sequence_at_most_once_and_epochs_read_them_all() -> None:
    """Also the longest ones, and where the last pool of batches is not full."""
    for seed in range(60):
        rng = Random(seed)
        batch_size, extra = rng.randint(2, 6), rng.random()
        num_batches = rng.choice((rng.randint(1, POOL_BATCHES - 1), rng.randint(POOL_BATCHES, 3 * POOL_BATCHES)))
        count = num_batches * batch_size + round(extra * (batch_size - 1))
        dataset = TokenDataset(Example((1,) * n, (True,) * n) for n in rng.choices(range(3, 99), k=count))
        order = BatchOrder(dataset, batch_size, seed)
        assert order.batches_per_epoch == num_batches
        seen: set[int] = set()
        for epoch in range(60):
            batches = [order[epoch * num_batches + number] for number in range(num_batches)]
            rows = {row for batch in batches for row in batch}
            assert all(len(batch) == batch_size for batch in batches) and len(rows) == num_batches * batch_size
            assert rows <= set(range(count))
            seen |= rows
        assert len(seen) == count, (seed, count - len(seen))


def test_the_batches_of_a_step_are_the_same_whatever_was_read_before() -> None:
    lengths = Random(0).choices(range(3, 40), k=90)
    dataset = TokenDataset(Example((1,) * n, (True,) * n) for n in lengths)
    in_order = [BatchOrder(dataset, 4, 7)[step] for step in range(70)]
    again = BatchOrder(dataset, 4, 7)
    for step in Random(1).sample(range(70), 70):
        assert again[step] == in_order[step]
    assert in_order[:22] != in_order[22:44], "epochs repeat each other"
    assert in_order != [BatchOrder(dataset, 4, 8)[step] for step in range(70)]


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_adds_up_and_goes_into_json(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(4):
        planted = Planted(tmp_path / f"{seed}.jsonl", seed, num_lines=80)
        prepared = prepare(data(SourceConfig(str(planted.path), count=20), max_length=40, validation=1), tokenizer)
        (source,) = prepared.report.sources
        datasets = [d for d in (prepared.training, prepared.validation) if d]
        assert (source.num_training, source.num_validation) == (len(prepared.training), 1 if prepared.validation else 0)
        assert source.num_read == planted.num_read >= source.num_dropped + 20
        assert source.num_tokens == sum(d.num_tokens for d in datasets)
        assert source.num_learned == sum(sum(d.num_learned) for d in datasets)
        longer = {
            e.cut(40) for e in encoded(tokenizer, [c.messages for c in planted.good], 10**6) if len(e.tokens) > 40
        }
        assert source.num_cut == sum((contents(prepared.training) + contents(prepared.validation))[e] for e in longer)
        told = json.loads(json.dumps(prepared.report.to_dict()))["sources"][0]
        for reason, tally in planted.tallies().items():
            if reason in source.dropped:
                dropped = source.dropped[reason]
                assert told["dropped"][reason] == {"count": dropped.count, "places": list(dropped.places)}
                assert set(dropped.places) <= set(tally.places), "as many as were looked at for 20"
                assert f"  dropped, {reason}: {dropped}" in prepared.report.lines()


def test_only_what_is_longer_than_max_length_is_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_talks(tmp_path / "a.jsonl", talks("m", 1))
    (length,) = (len(example.tokens) for example in encoded(tokenizer, talks("m", 1)))
    for max_length, num_cut in (length + 1, 0), (length, 0), (length - 1, 1):
        prepared = prepare(data(path, max_length=max_length), tokenizer)
        assert prepared.report.sources[0].num_cut == num_cut
        assert prepared.training.num_tokens == min(length, max_length)


def test_provenance_names_files_and_not_the_machine(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    import hashlib

    path = write_talks(tmp_path / "a.jsonl", talks("m", 20))
    prepared = prepare(data(path, validation=2), tokenizer)
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    expected = {"path": "a.jsonl", "split": None, "revision": None, "sha256": sha256, "count": 18}
    assert prepared.report.provenance() == [expected]


def test_progress_counts_conversations_up_to_what_the_recipe_asks_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    paths = write_talks(tmp_path / "a.jsonl", talks("a", 6)), write_talks(tmp_path / "b.jsonl", talks("b", 5))
    calls: list[tuple[int, int | None]] = []
    sources = SourceConfig(paths[0], count=4), SourceConfig(paths[1])
    prepare(data(*sources), tokenizer, lambda done, total: calls.append((done, total)))
    assert calls == [(n, 9) for n in range(1, 10)]


# --- templates and system prompts ------------------------------------------------------------------------------------


def test_a_system_prompt_goes_before_conversations_that_bring_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng = Random(0)
    lines = [talk(rng, f"m{number}", system=number % 2 == 0) for number in range(8)]
    path = write_talks(tmp_path / "a.jsonl", lines)
    prepared = prepare(data(path, system_prompt="Be brief."), tokenizer)
    system = {"role": "system", "content": "Be brief."}
    assert contents(prepared.training) == encoded(
        tokenizer, [m if m[0]["role"] == "system" else [system, *m] for m in lines]
    )


def test_a_chat_template_from_a_file_is_used_and_the_tokenizer_stays_as_it_was(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}", encoding="utf-8"
    )
    before, path = tokenizer.chat_template, write_talks(tmp_path / "a.jsonl", talks("m", 6))
    training = prepare(data(path, chat_template=str(template)), tokenizer).training
    assert tokenizer.chat_template == before
    assert tokenizer.decode(list(training[0].tokens)).startswith("user: m")
    assert contents(training) == encoded(with_chat_template(tokenizer, str(template)), talks("m", 6))
    gone = sentence(path, tokenizer=tokenizer, chat_template="gone.jinja")
    assert gone == "there is no chat template gone.jinja; data.chat_template is a jinja file"


def test_the_shipped_vicuna_template_writes_the_published_format(tokenizer: PreTrainedTokenizerBase) -> None:
    file = Path(__file__).parent.parent / "recipes" / "vicuna.jinja"
    vicuna = with_chat_template(tokenizer, str(file))
    vicuna.bos_token, vicuna.eos_token = "<s>", "</s>"
    talk = [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, "qrst", strict=True)]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    written = f"<s>{system} USER: q ASSISTANT: r</s>USER: s ASSISTANT: t</s>"
    assert vicuna.apply_chat_template(talk, tokenize=False) == written
    prompt = vicuna.apply_chat_template(talk[:3], tokenize=False, add_generation_prompt=True)
    assert prompt == f"<s>{system} USER: q ASSISTANT: r</s>USER: s ASSISTANT:"
    own = vicuna.apply_chat_template([{"role": "system", "content": "S."}, *talk], tokenize=False)
    assert own == written.replace(system, "S.")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_nothing_left_says_what_was_dropped_and_where(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('nonsense\n\n{"text": "x"}\nmore nonsense\n')
    (reading,) = read_sources(data(path))
    assert not list(reading)
    first, second = reading.dropped.tallies()[reasons.NOT_JSON].places
    assert sentence(path, tokenizer=tokenizer) == (
        f"no conversation is left to train on of 3 that were read from {path} "
        f"(dropped: not JSON: 2 ({first}, {second}); {reasons.NO_FIELDS}: 1 ({path}:3))"
    )
    path.write_text("")
    assert sentence(path, tokenizer=tokenizer).endswith(f"left to train on of 0 that were read from {path}")
    weighted = sentence(SourceConfig(str(path), weight=1.0), tokenizer=tokenizer)
    assert weighted == f"{path} has a weight but no usable conversation"


def test_a_source_that_is_none_is_one_sentence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, lines = tmp_path / "a.txt", write_talks(tmp_path / "a.jsonl", talks("m", 3))
    other.write_text("x")
    for path in ("gone.jsonl", "deep/gone.json", "a/b/c", str(tmp_path / "gone"), "gone"):
        assert sentence(path, tokenizer=tokenizer).startswith(
            f"there is no {path}; give a .jsonl, .json, .csv or .parquet file, a directory of them, or"
        )
    assert "is none of .jsonl, .json, .csv, .parquet" in sentence(other, tokenizer=tokenizer)
    assert "split and name are for data sets" in sentence(SourceConfig(lines, split="test"), tokenizer=tokenizer)
    named = sentence(SourceConfig(str(tmp_path), name="x"), tokenizer=tokenizer)
    assert named == f"{tmp_path} is a directory; name is for data sets of the hub, leave it out"
    broken = tmp_path / "broken.json"
    broken.write_text('[{"messages": []}')
    assert sentence(broken, tokenizer=tokenizer) == f"{broken} begins like a JSON array but is not JSON"
    monkeypatch.setitem(sys.modules, "datasets", None)
    needs = sentence("owner/name", tokenizer=tokenizer)
    assert needs == "reading owner/name needs datasets: pip install 'taps_ext[train]'"


def test_a_source_keeps_no_text_in_memory(tmp_path: Path) -> None:
    """Conversations are read where they are needed: the file may be larger than the memory."""
    path = write_talks(tmp_path / "a.jsonl", talks("m", 50))
    reading = Reading(SourceConfig(path), "seed", None)
    Path(path).write_bytes(Path(path).read_bytes().replace(b"m7/", b"M7/"))
    assert [c.messages[0]["content"][:2] for c in reading].count("M7") == 1
