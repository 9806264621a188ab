"""A folder of a target's features by text: made ahead or as a run goes, by any number of processes, read at random."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.files import check_writable, write_text
from ..checkpoints.load import TargetIdentity
from .config import DtypeName
from .dataset import TokenBatch, TokenDataset
from .feature_shards import COMMAND, DTYPES, FORMAT, SHARDS, FeatureKind, Shard, open_shard, write_shard

MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 30  # features that wait in memory until they are written as one file
LONGEST_WAIT_S = 300.0  # or until the first of them has waited so long: more is never lost
ABANDONED_S = 3600.0  # an unfinished file that nobody has written to for so long belongs to a process that was killed


@dataclass(frozen=True)
class SpaceEstimate:
    """What the features that a store does not have yet will take."""

    folder: Path
    num_sequences: int
    num_tokens: int
    position_bytes: int
    free_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all features, without the few of headers and indices."""
        return self.num_tokens * self.position_bytes

    def __str__(self) -> str:
        return (
            f"the features of {self.num_sequences:,} sequences ({self.num_tokens:,} tokens x {self.position_bytes:,} "
            f"bytes) take {size(self.num_bytes)} in {self.folder}, where {size(self.free_bytes)} are free"
        )

    def check(self) -> None:
        """OSError when they would not fit."""
        if self.num_bytes > self.free_bytes:
            raise OSError(
                f"{self}; give a folder on a larger disk, a smaller features.dtype, or features.mode online, "
                f"which needs no disk"
            )


class FeatureStore:
    """Features by the content id of a text, in files of about `shard_bytes` that are written once and never changed.

    What is added waits in memory for its file, and is read from there meanwhile. Files of other processes are found
    when the store is opened and at each `flush`.
    """

    def __init__(self, folder: Path, target: TargetIdentity, dtype: DtypeName, shard_bytes: int = SHARD_BYTES) -> None:
        """Use `create_store` or `open_store`."""
        self.folder = folder
        self.target = target
        self.kind = FeatureKind(target.weights or target.ends, target.hidden_size, dtype)
        self.shard_bytes = shard_bytes
        self._places: dict[int, tuple[Shard, int]] = {}  # by id: file and row
        self._known: set[Path] = set()
        self._waiting: dict[int, Tensor] = {}  # by id: [length, H]
        self._waiting_bytes, self._waiting_since = 0, 0.0
        self._find_shards()

    def __contains__(self, content_id: int) -> bool:
        return content_id in self._places or content_id in self._waiting

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def missing(self, datasets: Sequence[TokenDataset]) -> list[tuple[TokenDataset, list[int]]]:
        """The sequences of each dataset that have no features here; equal ones once."""
        wanted: set[int] = set()
        found = []
        for data in datasets:
            new = {id: i for i, id in enumerate(data.ids) if id not in self and id not in wanted}
            wanted.update(new)
            found.append((data, list(new.values())))
        return found

    def space_for(self, datasets: Sequence[TokenDataset]) -> SpaceEstimate:
        """The disk space that the missing features will take."""
        lengths = [data.length(i) for data, indices in self.missing(datasets) for i in indices]
        free = shutil.disk_usage(self.folder).free
        return SpaceEstimate(self.folder, len(lengths), sum(lengths), self.kind.position_bytes, free)

    def require(self, datasets: Sequence[TokenDataset]) -> None:
        """ValueError unless all features of these are here."""
        if missing := sum(len(indices) for _, indices in self.missing(datasets)):
            total = len({id for data in datasets for id in data.ids})
            raise ValueError(
                f"{missing:,} of {total:,} sequences have no features in {self.folder}; run `{COMMAND}` with this "
                f"recipe, which computes only what is missing, or set features.mode to cached"
            )

    def add(self, content_id: int, features: Tensor) -> None:
        """Keep features [length, H]; they go to disk with others, or at the next `flush`.

        Raises ValueError when they are not finite, OSError when the disk is full, in a sentence.
        """
        if content_id in self:
            return
        rounded = features.to("cpu", self.kind.torch_dtype, copy=True).contiguous()
        if not bool(rounded.isfinite().all()):
            raise ValueError(
                f"the target's features of a sequence are not finite in {self.kind.dtype}; use bfloat16 or float32 "
                f"for target_dtype and features.dtype"
            )
        if not self._waiting:
            self._waiting_since = time.monotonic()
        self._waiting[content_id] = rounded
        self._waiting_bytes += len(rounded) * self.kind.position_bytes
        if self._waiting_bytes >= self.shard_bytes or time.monotonic() - self._waiting_since > LONGEST_WAIT_S:
            self.flush()

    def flush(self) -> None:
        """Bring to disk what waits in memory, and find what other processes have written meanwhile."""
        if self._waiting:
            write_shard(self.folder, self.kind, self._waiting)
        self._find_shards()
        self._waiting, self._waiting_bytes = {}, 0

    def read(self, batch: TokenBatch, device: torch.device) -> Tensor:
        """The features of a batch as float32 [B, L, H], those of padding 0.

        Raises ValueError when some are missing or their file is damaged.
        """
        out = torch.zeros(*batch.tokens.shape, self.kind.hidden_size, device=device)
        for row, (content_id, length) in enumerate(zip(batch.ids, batch.lengths.tolist(), strict=True)):
            out[row, :length] = self._read(content_id)
        return out

    def _read(self, content_id: int) -> Tensor:
        """[length, H] in the store's dtype."""
        if (waiting := self._waiting.get(content_id)) is not None:
            return waiting
        if place := self._places.get(content_id):
            shard, row = place
            return shard.read(row)
        raise ValueError(f"{self.folder} has no features of sequence {content_id:016x}; run `{COMMAND}`")

    def _find_shards(self) -> None:
        """Index the files that were not here before; of several with the same sequence the first one stays."""
        for path in sorted(set(self.folder.glob(SHARDS)) - self._known):
            shard = open_shard(path, self.kind)
            for row, content_id in enumerate(shard.ids.view("u8").tolist()):
                self._places.setdefault(content_id, (shard, row))
            self._known.add(path)


def create_store(
    folder: str | os.PathLike[str], target: TargetIdentity, dtype: DtypeName, shard_bytes: int = SHARD_BYTES
) -> FeatureStore:
    """The store in a folder, for adding to it: a new one, or the one of this target and dtype that is there.

    Raises ValueError or OSError, in a sentence, when the folder holds other features or damaged ones.
    """
    folder = Path(folder).expanduser()
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    has_shards = any(folder.glob(SHARDS))  # looked up first: another process may be making the store
    if not (folder / MANIFEST).exists():
        if has_shards:
            raise ValueError(f"{folder} has features and no {MANIFEST} that says whose; move them elsewhere")
        manifest = {"format": FORMAT, "target": asdict(target), "dtype": dtype}
        write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    found, found_dtype = _read_manifest(folder)
    found.check_same(target, folder)
    if found_dtype != dtype:
        raise ValueError(f"{folder} holds {found_dtype} features, not {dtype}; set features.dtype to {found_dtype}")
    _remove_abandoned(folder)
    return FeatureStore(folder, found, dtype, shard_bytes)


def open_store(folder: str | os.PathLike[str]) -> FeatureStore:
    """The store that is in a folder, for reading. Raises ValueError or FileNotFoundError, in a sentence."""
    folder = Path(folder).expanduser()
    return FeatureStore(folder, *_read_manifest(folder))


def _read_manifest(folder: Path) -> tuple[TargetIdentity, DtypeName]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"{folder} is a feature store of format {manifest['format']} and this version reads {FORMAT}; "
                f"use the version of taps_ext that wrote it, or another folder"
            )
        target, dtype = TargetIdentity(**manifest["target"]), manifest["dtype"]
        DTYPES[dtype]
    except FileNotFoundError:
        raise FileNotFoundError(f"no features in {folder}: there is no {MANIFEST}; run `{COMMAND}`") from None
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged; delete {folder} and run `{COMMAND}` again") from error
    return target, dtype


def _remove_abandoned(folder: Path) -> None:
    """Delete what killed processes were writing."""
    for path in (*folder.glob(f".{SHARDS}.*.tmp"), *folder.glob(f".{MANIFEST}.*.tmp")):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()
        except FileNotFoundError:
            pass  # its writer finished it, or another process was faster


def size(num_bytes: int) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:,.1f} MiB"
