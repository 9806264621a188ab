"""A corpus store: which tokens followed any few tokens in a set of documents, read from files that are mapped.

It stands here because this directory alone knows files; a drafter is given an open `CorpusStore`. A store is a
directory of three files. `text.npy` holds the documents backwards; `order.npy` holds the places of this text, sorted by
the `MAX_CONTEXT` tokens from there on: a suffix array, cut at that length. Backwards, a context begins at its last
token, so that one binary search finds the longest match. A token t is the number t + 1 with the high byte first, and 0
separates documents: slices of bytes then compare as their tokens do. `store.json` says what the other two hold.
"""

from __future__ import annotations

import hashlib
import json
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..drafters.lookup import Continuations
from .files import PathOrId, check_output, json_text, read_json, replacing_directory, sha256

FORMAT, VERSION = "taps_ext corpus store", 1
HEADER_FILE, TEXT_FILE, ORDER_FILE = "store.json", "text.npy", "order.npy"
MAX_CONTEXT = 16  # tokens of the longest context that is found; each doubling takes one more sort of the corpus
MOST_TOKENS = 2**31 - 1
NUMBER, WIDTH = ">u4", 4  # of a token, in numpy's words, and its bytes
REBUILD = "build it again with taps-ext index"


class CorpusStore:
    """Find what followed the end of a context in a set of documents.

    The files are mapped and read-only: processes share their memory, and threads may share a store.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> summary = write_store(folder, [[5, 1, 2, 3], [6, 1, 2, 4, 7]], vocab_size=10, tokenizer="")
    >>> CorpusStore(folder, vocab_size=10).continuations([9, 1, 2])
    Continuations(length=2, num_occurrences=2, tokens=[[3], [4, 7]])
    """

    def __init__(self, folder: PathOrId, vocab_size: int | None = None, tokenizer: str | None = None) -> None:
        """Open a store, reading it once to compare its checksums.

        Args:
            folder: the directory that `taps-ext index` wrote.
            vocab_size: of the target. tokenizer: `tokenizer_fingerprint` of its tokenizer. None: not compared.

        Raises FileNotFoundError or ValueError, in one sentence, if there is no store, if a byte of it changed, or if it
        was made for another vocabulary or tokenizer.
        """
        self.folder = Path(folder).expanduser()
        header = _read_header(self.folder)
        _refuse_foreign(self.folder, header, vocab_size, tokenizer)
        self.vocab_size: int = header["vocab_size"]
        self.num_documents: int = header["num_documents"]
        self.num_tokens: int = header["num_tokens"]
        # Python's views: to look at an item takes a fifth of the time that numpy needs
        self._text = memoryview(_mapped(self.folder / TEXT_FILE, header).view(np.uint8))
        self._order = memoryview(_mapped(self.folder / ORDER_FILE, header))

    def continuations(
        self, context: Sequence[int], max_context: int = 8, max_count: int = 16, max_length: int = 8
    ) -> Continuations:
        """Return what followed the longest match of the context's last tokens.

        A match lies within a document and has a token behind it. Of many occurrences, `max_count` are taken, evenly
        among those that the tokens before the match sort; of each, at most `max_length` tokens.

        Args:
            context: token ids of the vocabulary; the last ones are looked up, at most `max_context` and `MAX_CONTEXT`.
        """
        wanted = self._packed(context[-min(max_context, MAX_CONTEXT) :][::-1])
        text, order = self._text, self._order
        place = bisect_left(order, wanted, key=lambda i: text[WIDTH * i : WIDTH * i + len(wanted)].tobytes())
        neighbours = [WIDTH * order[i] for i in (place - 1, place) if 0 <= i < len(order)]
        length = max((_num_common(wanted, text[i : i + len(wanted)].tobytes()) for i in neighbours), default=0)
        if length == 0:
            return Continuations(0, 0, [])
        matched = wanted[: WIDTH * length]
        first = bisect_left(order, matched, hi=place, key=lambda i: text[WIDTH * i : WIDTH * (i + length)].tobytes())
        end = bisect_right(order, matched, lo=place, key=lambda i: text[WIDTH * i : WIDTH * (i + length)].tobytes())
        count = min(max_count, end - first)
        taken = [order[first + index * (end - first) // count] for index in range(count)]
        return Continuations(length, end - first, [self._following(i, max_length) for i in taken])

    def _packed(self, tokens: Sequence[int]) -> bytes:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise ValueError(f"context must hold tokens of the vocabulary 0..{self.vocab_size - 1}, got {list(tokens)}")
        return struct.pack(f">{len(tokens)}I", *(token + 1 for token in tokens))

    def _following(self, place: int, max_length: int) -> list[int]:
        """Return the tokens behind a place, up to the separator."""
        count = min(place, max_length)
        numbers = struct.unpack_from(f">{count}I", self._text, WIDTH * (place - count))[::-1]
        return [number - 1 for number in (numbers[: numbers.index(0)] if 0 in numbers else numbers)]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's vocabulary, in which tokens of other tokenizers mean something else."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def write_store(
    folder: PathOrId, documents: Iterable[Sequence[int]], vocab_size: int, tokenizer: str
) -> dict[str, Any]:
    """Write the store of some documents, whole or not at all, and return its header.

    A store in that directory is replaced; a directory with anything else in it raises ValueError. It takes 8 bytes a
    token on disk, and about 80 in memory while it is built.

    Args:
        documents: the token ids of each, in 0..vocab_size - 1.
        tokenizer: `tokenizer_fingerprint` of the tokenizer that made them.
    """
    folder = Path(folder).expanduser()
    check_output(folder, {HEADER_FILE, TEXT_FILE, ORDER_FILE})
    text, num_documents = _backwards(documents, vocab_size)
    order = _sorted_places(text)
    with replacing_directory(folder) as fresh:
        np.save(fresh / TEXT_FILE, text.astype(NUMBER))
        np.save(fresh / ORDER_FILE, order)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": vocab_size,
            "tokenizer": tokenizer,
            "num_documents": num_documents,
            "num_tokens": len(text) - num_documents,
            "max_context": MAX_CONTEXT,
            "sha256": {name: sha256(fresh / name) for name in (TEXT_FILE, ORDER_FILE)},
        }
        (fresh / HEADER_FILE).write_text(json_text({**header, "digest": _digest(header)}) + "\n", encoding="utf-8")
    return header


# --- building --------------------------------------------------------------------------------------------------------


def _backwards(documents: Iterable[Sequence[int]], vocab_size: int) -> tuple[NDArray[np.uint32], int]:
    """Return the documents with a separator behind each, from the last token to the first, and how many there are."""
    parts, num_tokens = [], 0
    for number, document in enumerate(documents, 1):
        tokens = np.asarray(document, dtype=np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
            raise ValueError(f"tokens must lie in the vocabulary 0..{vocab_size - 1}, document {number} has {bad}")
        parts.append(np.append(tokens + 1, 0).astype(np.uint32))
        num_tokens += len(tokens) + 1
        if num_tokens > MOST_TOKENS:
            raise ValueError(f"a store holds at most {MOST_TOKENS} tokens, and these documents have more; split them")
    if num_tokens == len(parts):
        raise ValueError("the documents hold no token; give at least one text")
    return np.concatenate(parts)[::-1], len(parts)


def _sorted_places(text: NDArray[np.uint32]) -> NDArray[np.int32]:
    """Return the places whose token is followed in its document, sorted by what stands there.

    Prefix doubling: the ranks by twice as many tokens are those of pairs of ranks. Beyond the end ranks as the least
    text, which begins with a separator: a look-up holds none, so what stands behind the first one decides nothing.
    """
    ranks = text.astype(np.int64)
    length = 1
    while length < MAX_CONTEXT:
        keys = ranks * (ranks.max() + 1)
        keys[:-length] += ranks[length:]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        ranks[order] = np.append(0, np.cumsum(keys[1:] != keys[:-1]))
        length *= 2
    is_followed = np.append(False, text[:-1] > 0)
    places: NDArray[np.int32] = order[is_followed[order]].astype(np.int32)
    return places


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_header(folder: Path) -> dict[str, Any]:
    if not (folder / HEADER_FILE).is_file():
        raise FileNotFoundError(f"no corpus store at {folder}: there is no {HEADER_FILE}; {REBUILD}")
    header = read_json(folder / HEADER_FILE)
    if header.get("format") != FORMAT:
        raise ValueError(f"{folder / HEADER_FILE} is not of a corpus store; give a directory that taps-ext index wrote")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{folder} is a corpus store of version {header.get('version')}, and this taps_ext reads version "
            f"{VERSION}; {REBUILD}"
        )
    if header.pop("digest", None) != _digest(header):
        raise ValueError(f"{folder / HEADER_FILE} is damaged or was changed; {REBUILD}")
    return header


def _refuse_foreign(folder: Path, header: dict[str, Any], vocab_size: int | None, tokenizer: str | None) -> None:
    if vocab_size is not None and header["vocab_size"] != vocab_size:
        raise ValueError(
            f"the corpus store {folder} is of a vocabulary of {header['vocab_size']} tokens, and the target has "
            f"{vocab_size}; build one with taps-ext index --target"
        )
    if tokenizer is not None and header["tokenizer"] != tokenizer:
        raise ValueError(
            f"the corpus store {folder} was made with another tokenizer than the target's; build one with taps-ext "
            "index --target"
        )


def _mapped(path: Path, header: dict[str, Any]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from its corpus store; {REBUILD}")
    if sha256(path) != header["sha256"][path.name]:
        raise ValueError(f"{path} is damaged or was changed: its SHA-256 is not that in {HEADER_FILE}; {REBUILD}")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _num_common(one: bytes, other: bytes) -> int:
    """Return how many first tokens are the same."""
    places = range(0, len(one), WIDTH)
    return next((i // WIDTH for i in places if one[i : i + WIDTH] != other[i : i + WIDTH]), len(places))
