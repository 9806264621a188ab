"""One file of a feature store: safetensors, written whole or not at all, in which no changed byte goes unnoticed.

The features have a checksum a sequence, which is compared when the sequence is read. The index has one too. The header
is a function of the index and of what all files of the store share, so it is compared with what it would have to be.
"""

from __future__ import annotations

import json
import struct
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.files import write_whole
from .config import DtypeName

FORMAT = 1
COMMAND = "taps-ext features"  # it makes what is not there
SHARDS = "features-*.safetensors"
INDEX = ("ids", "lengths", "checksums")  # int64, one of each a sequence, before the features
DTYPES: dict[DtypeName, tuple[str, torch.dtype]] = {  # the format's name, torch's
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}
LONGEST_HEADER = 1 << 16  # bytes; ours has some 600


@dataclass(frozen=True)
class FeatureKind:
    """What all features of a store have in common."""

    target: str  # fingerprint
    hidden_size: int
    dtype: DtypeName

    def __str__(self) -> str:
        return f"{self.dtype} features [{self.hidden_size}] of the target {self.target[:12]}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the features on disk."""
        return DTYPES[self.dtype][1]

    @property
    def position_bytes(self) -> int:
        """Bytes of the features of one token."""
        return self.hidden_size * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file that was found whole: S sequences, their features one after the other."""

    path: Path
    kind: FeatureKind
    ids: np.ndarray[Any, Any]  # int64 [S], the bits of the content ids
    lengths: np.ndarray[Any, Any]  # int64 [S], tokens
    checksums: np.ndarray[Any, Any]  # int64 [S], CRC-32 of the bytes of the features
    starts: np.ndarray[Any, Any]  # int64 [S], where they begin in the file

    def read(self, row: int) -> Tensor:
        """The features [length, H] of a sequence. Raises ValueError unless they are as they were written."""
        features = torch.empty(int(self.lengths[row]), self.kind.hidden_size, dtype=self.kind.torch_dtype)
        memory = _bytes_of(features)
        try:
            with self.path.open("rb") as file:
                file.seek(int(self.starts[row]))
                num_bytes = file.readinto(memory)
        except FileNotFoundError:
            raise ValueError(f"{self.path} is gone; run `{COMMAND}`, which computes only what is missing") from None
        if num_bytes != len(memory) or zlib.crc32(memory) != self.checksums[row]:
            raise damaged(self.path, f"sequence {row} is not as it was written")
        return features


def write_shard(folder: Path, kind: FeatureKind, features: Mapping[int, Tensor]) -> Path:
    """The new file of the features [length, H] of each id. Raises OSError, in a sentence, on a full disk."""
    memories = [_bytes_of(tensor) for tensor in features.values()]
    ids = np.array(list(features), dtype=np.uint64).view(np.int64)
    lengths = [len(tensor) for tensor in features.values()]
    index = np.array([ids, lengths, [zlib.crc32(memory) for memory in memories]], dtype="<i8").tobytes()
    path = folder / SHARDS.replace("*", uuid.uuid4().hex[:12])
    try:
        write_whole(path, [_header(kind, len(ids), sum(lengths), index), index, *memories])
    except OSError as error:
        num_bytes = sum(map(len, memories))
        raise OSError(
            f"{num_bytes / 2**30:.1f} GiB of features could not be written to {folder} ({error.strerror}); "
            f"free some space and run it again: what is stored there stays"
        ) from error
    return path


def open_shard(path: Path, kind: FeatureKind) -> Shard:
    """What a file holds, its features unread. Raises ValueError when it is damaged or of another kind."""
    try:
        found, index, data_start = _read_index(path)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise damaged(path, "its header or length is not as it was written") from error
    if found != kind:
        raise ValueError(f"{path} holds {found}, and its folder is for {kind}; move that file elsewhere")
    ids, lengths, checksums = index
    starts = data_start + kind.position_bytes * (np.cumsum(lengths) - lengths)
    return Shard(path, kind, ids, lengths, checksums, starts)


def damaged(path: Path, reason: str) -> ValueError:
    """The error that names a file which is not as it was written."""
    return ValueError(
        f"{path} is damaged ({reason}); delete it and run `{COMMAND}`, which computes only what is missing"
    )


def _header(kind: FeatureKind, num_sequences: int, num_positions: int, index: bytes) -> bytes:
    """The length and text that a file with this index begins with."""
    metadata = {"format": "pt", "taps_features": f"{FORMAT}", "target": kind.target}
    checksum = zlib.crc32(index, zlib.crc32(json.dumps([metadata, kind.dtype, kind.hidden_size]).encode()))
    header: dict[str, Any] = {"__metadata__": {**metadata, "index_checksum": f"{checksum:08x}"}}
    for column, name in enumerate(INDEX):
        offsets = [8 * num_sequences * column, 8 * num_sequences * (column + 1)]
        header[name] = {"dtype": "I64", "shape": [num_sequences], "data_offsets": offsets}
    offsets = [len(index), len(index) + num_positions * kind.position_bytes]
    shape = [num_positions, kind.hidden_size]
    header["features"] = {"dtype": DTYPES[kind.dtype][0], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_index(path: Path) -> tuple[FeatureKind, np.ndarray[Any, Any], int]:
    """The kind, the index [3, S] and where the features begin; any error of a damaged file is let through."""
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(min(*struct.unpack("<Q", start), LONGEST_HEADER))
        header = json.loads(start[8:])
        codes = {code: dtype for dtype, (code, _) in DTYPES.items()}
        num_positions, hidden_size = header["features"]["shape"]
        kind = FeatureKind(header["__metadata__"]["target"], hidden_size, codes[header["features"]["dtype"]])
        (num_sequences,) = header["ids"]["shape"]
        data_start = len(start) + 8 * len(INDEX) * num_sequences
        if path.stat().st_size != data_start + num_positions * kind.position_bytes:
            raise ValueError("the length of the file is not what its header says")
        index = file.read(data_start - len(start))
    if start != _header(kind, num_sequences, num_positions, index):
        raise ValueError("the header is not that of this index")
    return kind, np.frombuffer(index, dtype="<i8").reshape(len(INDEX), num_sequences), data_start


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.detach().view(torch.uint8).numpy().data.cast("B")
