"""The corpus store: what followed a context in some documents, and files that are whole or refused."""

from __future__ import annotations

import doctest
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

import taps_ext as taps
from taps_ext import tiny
from taps_ext.checkpoints import corpus
from taps_ext.checkpoints.corpus import MAX_CONTEXT, Continuations, CorpusStore, tokenizer_fingerprint, write_store
from taps_ext.cli import main

Documents = list[list[int]]
FILES = ("store.json", "text.npy", "order.npy")


def random_documents(random: Random) -> tuple[Documents, int]:
    """Few tokens, so that contexts recur; copied passages, repeated ones, documents of no and of one token."""
    vocabulary = random.choice([1, 2, 3, 8, 50_000])
    documents: Documents = []
    for _ in range(random.randint(1, 6)):
        tokens = [random.randrange(vocabulary) for _ in range(random.choice([0, 1, 5, 40]))]
        if documents and random.random() < 0.5:
            other = random.choice(documents)
            start = random.randrange(len(other) + 1)
            tokens += other[start : start + random.randint(0, 30)]
        documents.append(tokens * random.choice([1, 1, 4]))
    documents.append([random.randrange(vocabulary) for _ in range(3)])
    return documents, vocabulary


def random_context(random: Random, documents: Documents, vocabulary: int) -> list[int]:
    document = random.choice(documents)
    end = random.randrange(len(document) + 1)
    known = document[max(0, end - random.randint(0, 20)) : end]
    return [random.randrange(vocabulary) for _ in range(random.randint(0, 3))] + known


def naive(documents: Documents, context: list[int], max_context: int, max_length: int) -> tuple[int, Documents]:
    """The longest match's length, and what followed each of its occurrences, sorted."""
    for length in range(min(max_context, MAX_CONTEXT, len(context)), 0, -1):
        followed = [
            document[end : end + max_length]
            for document in documents
            for end in range(length, len(document))
            if document[end - length : end] == context[-length:]
        ]
        if followed:
            return length, sorted(followed)
    return 0, []


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    write_store(folder, [[5, 1, 2, 3], [6, 1, 2, 4, 7]] * 20, vocab_size=10, tokenizer="words")
    return folder


def check_store(folder: Path, seed: int) -> set[int]:
    """Write a store of random documents, compare it with a naive search, and return the lengths of its matches."""
    random, lengths = Random(seed), set()
    documents, vocabulary = random_documents(random)
    write_store(folder, documents, vocabulary, "")
    opened = CorpusStore(folder, vocabulary)
    assert (opened.num_documents, opened.num_tokens) == (len(documents), sum(map(len, documents)))
    for _ in range(60):
        context = random_context(random, documents, vocabulary)
        max_context, max_length = random.choice([1, 2, 5, 8, 40]), random.choice([1, 3, 8])
        found = opened.continuations(context, max_context, 10_000, max_length)
        length, followed = naive(documents, context, max_context, max_length)
        assert (found.length, sorted(found.tokens)) == (length, followed), f"seed {seed}, {context}"
        assert found.num_occurrences == len(followed)
        lengths.add(length)
    return lengths


def test_a_store_finds_what_a_search_through_all_documents_finds(tmp_path: Path, num_cases: int) -> None:
    lengths = set[int]().union(*(check_store(tmp_path / "store", seed) for seed in range(num_cases // 3)))
    assert lengths >= set(range(9)) | {MAX_CONTEXT}


@pytest.mark.long
def test_many_stores_find_what_a_naive_search_finds_and_none_is_read_once_corrupted(tmp_path: Path) -> None:
    """102,000 look-ups in 1,700 stores, each of which is then corrupted ten times."""
    store = tmp_path / "store"
    for seed in range(10**6, 10**6 + 1_700):
        check_store(store, seed)
        for number in range(10):
            with corrupted(store, Random(f"{seed} {number}")):
                assert_refused(store, "damaged|not JSON|not of a corpus store|of version|is missing from|no corpus")


def test_a_limit_takes_occurrences_evenly(tmp_path: Path) -> None:
    """Sorted by the tokens before the match, so that every kind of context is among them."""
    documents = [[first, 1, 100 + first] for first in range(10, 50)]
    write_store(tmp_path / "store", documents, 200, "")
    opened = CorpusStore(tmp_path / "store")
    assert opened.continuations([1], max_count=4) == Continuations(1, 40, [[110], [120], [130], [140]])
    assert opened.continuations([17, 1], max_count=4) == Continuations(2, 1, [[117]])
    assert opened.continuations([3]) == opened.continuations([]) == Continuations(0, 0, [])


def test_a_match_does_not_reach_into_the_document_before_nor_a_continuation_into_the_next(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [[1, 2, 3], [4, 5]], 10, "")
    opened = CorpusStore(tmp_path / "store")
    assert opened.continuations([3, 4]) == Continuations(1, 1, [[5]])
    assert opened.continuations([1]) == Continuations(1, 1, [[2, 3]])
    assert opened.continuations([2, 3]).length == 0, "nothing follows a document's last token"


def test_the_example_in_the_docstring_is_true() -> None:
    assert doctest.testmod(corpus) == (0, 4)


def test_a_context_outside_the_vocabulary_is_refused(store: Path) -> None:
    for context in ([1, -1], [1, 10], [1, 2**40]):
        with pytest.raises(ValueError, match=r"context must hold tokens of the vocabulary 0\.\.9, got "):
            CorpusStore(store).continuations(context)


# ---- files


def test_equal_documents_give_equal_bytes(store: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "other", [[5, 1, 2, 3], [6, 1, 2, 4, 7]] * 20, vocab_size=10, tokenizer="words")
    assert all((store / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in FILES)
    assert sorted(path.name for path in store.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_store_with_another_byte_in_any_file_is_refused_in_one_sentence(store: Path, name: str) -> None:
    path = store / name
    whole, random = path.read_bytes(), Random(7)
    for _ in range(150):
        place = random.randrange(len(whole))
        flipped = whole[place] ^ random.choice([1, 0x20, 0x80, 0xFF])
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        if name == "store.json" and json_of(path) == json.loads(whole):
            continue  # white space
        assert_refused(store, r"damaged|not JSON|not of a corpus store|of version")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_refused_in_one_sentence(store: Path, name: str) -> None:
    path = store / name
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        assert_refused(store, "damaged|not JSON")
    path.unlink()
    assert_refused(store, "no corpus store at|is missing from its corpus store")


@contextmanager
def corrupted(store: Path, random: Random) -> Iterator[None]:
    """Change, cut, lengthen, swap or remove a file for a while, other than by white space of its JSON."""
    path = store / random.choice(FILES)
    whole, place = path.read_bytes(), random.randrange(path.stat().st_size)
    changes = {
        "change": whole[:place] + bytes([whole[place] ^ random.randint(1, 255)]) + whole[place + 1 :],
        "cut": whole[:place],
        "lengthen": whole + bytes(random.choices(b"x\0", k=random.randint(1, 9))),
        "swap": (store / random.choice([name for name in FILES if name != path.name])).read_bytes(),
        "remove": None,
    }
    other = changes[random.choice(list(changes))]
    if other is None:
        path.unlink()
    else:
        path.write_bytes(other)
        if path.suffix == ".json" and json_of(path) == json.loads(whole):
            path.write_bytes(b"")
    yield
    path.write_bytes(whole)


def json_of(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def assert_refused(store: Path, said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        CorpusStore(store)
    assert "\n" not in str(caught.value)
    assert str(store) in str(caught.value)


def test_a_foreign_store_is_refused_in_one_sentence(store: Path, tmp_path: Path, monkeypatch) -> None:
    CorpusStore(store, 10, "words")
    with pytest.raises(ValueError, match="is of a vocabulary of 10 tokens, and the target has 11"):
        CorpusStore(store, 11)
    with pytest.raises(ValueError, match="was made with another tokenizer than the target's"):
        CorpusStore(store, 10, "letters")
    with pytest.raises(FileNotFoundError, match=f"no corpus store at {tmp_path}"):
        CorpusStore(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "store.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is not of a corpus store"):
        CorpusStore(tmp_path / "other")
    monkeypatch.setattr(corpus, "VERSION", 2)
    with pytest.raises(ValueError, match="of version 1, and this taps_ext reads version 2"):
        CorpusStore(store)


def test_documents_that_no_store_can_hold_are_refused_and_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    def write(documents: Documents) -> None:
        write_store(tmp_path / "store", documents, 10, "")

    with pytest.raises(ValueError, match=r"tokens must lie in the vocabulary 0\.\.9, document 2 has 10"):
        write([[1], [2, 10]])
    with pytest.raises(ValueError, match=r"the vocabulary 0\.\.9, document 1 has -1"):
        write([[-1]])
    for nothing in ([], [[]], [[], []]):
        with pytest.raises(ValueError, match="hold no token"):
            write(nothing)
    monkeypatch.setattr(corpus, "MOST_TOKENS", 5)
    with pytest.raises(ValueError, match="at most 5 tokens"):
        write([[1, 2], [3, 4]])
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_other_files_is_not_replaced(store: Path) -> None:
    (store / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\)"):
        write_store(store, [[1, 2]], 10, "")


def write_for_ever(folder: Path) -> None:
    while True:
        for token in (1, 2):
            write_store(folder, [[token, token, 3]] * 2000, 10, "")


def test_a_killed_build_leaves_the_old_store_or_the_new_one(tmp_path: Path) -> None:
    random, folder = Random(3), tmp_path / "store"
    write_store(folder, [[1, 1, 3]] * 2000, 10, "")
    num_leftovers = 0
    for number in range(12):
        before = set(tmp_path.iterdir())
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(folder,))
        writer.start()
        while set(tmp_path.iterdir()) <= before:  # until a store is being written beside the old one
            assert writer.is_alive()
        time.sleep(random.uniform(0, 0.05) * (number % 2))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        opened = CorpusStore(folder, 10)
        assert {opened.continuations([token]).num_occurrences for token in (1, 2)} == {0, 4000}
        num_leftovers += len(list(tmp_path.iterdir())) > 1
    assert num_leftovers > 0, "no kill came while something was being written"
    write_store(folder, [[1, 2]], 10, "")
    assert list(tmp_path.iterdir()) == [folder], "the next build removes what killed ones left"


def test_documents_that_end_in_an_error_leave_the_old_store(store: Path) -> None:
    def documents() -> Iterator[list[int]]:
        yield [1, 2]
        raise KeyboardInterrupt

    before = {name: (store / name).read_bytes() for name in FILES}
    with pytest.raises(KeyboardInterrupt):
        write_store(store, documents(), 10, "")
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    assert list(store.parent.iterdir()) == [store]


def test_an_open_store_stays_when_another_takes_its_place(store: Path) -> None:
    opened = CorpusStore(store)
    write_store(store, [[8, 9]], 10, "")
    assert opened.continuations([1, 2]).num_occurrences == 40
    shutil.rmtree(store)
    assert opened.continuations([1, 2]).num_occurrences == 40


# ---- the command


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    records = [{"text": "The sum of two and three is five."}, {"text": ""}, {"text": "The sum is seven.", "id": 3}]
    path.write_text("".join(json.dumps(record) + "\n\n" for record in records), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["index", *arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_index_writes_the_texts_as_the_targets_tokens(texts: Path, tmp_path: Path, capsys) -> None:
    code, out, _ = run(capsys, str(texts), "-o", str(tmp_path / "store"), "--target", "tiny", "--json")
    target, tokenizer = tiny.load_target()
    told = json.loads(out)
    assert code == 0 and told["num_documents"] == 3
    opened = taps.CorpusStore(tmp_path / "store", target.config.vocab_size, tokenizer_fingerprint(tokenizer))
    first = tokenizer("The sum of two and three is five.", add_special_tokens=False)["input_ids"]
    assert opened.continuations(first[:-3], MAX_CONTEXT).tokens == [first[-3:]], "the other texts differ there"
    assert opened.num_tokens == told["num_tokens"] > len(first)
    code, out, _ = run(capsys, str(texts), "-o", str(tmp_path / "store"))
    assert (code, out) == (0, f"wrote {tmp_path / 'store'}: 3 documents, {opened.num_tokens} tokens\n")


def test_index_says_which_line_holds_no_text(texts: Path, tmp_path: Path, capsys) -> None:
    for line, said in (
        ('{"txt": "a"}', 'holds no {"text"'),
        ("[1]", "holds no"),
        ('{"text": 3}', "holds no"),
        ("{", ""),
    ):
        texts.write_text(f'{{"text": "a b"}}\n{line}\n', encoding="utf-8")
        code, out, err = run(capsys, str(texts), "-o", str(tmp_path / "store"))
        assert (code, out) == (2, "") and f"{texts}:2" in err and said in err and err.count("\n") == 1
    code, _, err = run(capsys, str(tmp_path / "none"), "-o", str(tmp_path / "store"))
    assert code == 2 and "is not a file; give JSON Lines" in err
    assert not (tmp_path / "store").exists()
