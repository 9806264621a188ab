"""What a drafter learns from: the target's features of a text, computed or stored, shifted into the drafter's slots."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.files import check_writable, write_text, write_whole
from ..checkpoints.load import TargetEnds, TargetIdentity
from ..drafters import DraftVocabulary
from ..drafters.growth import LogitRule
from ..target.model import refuse_unlike_head
from .masks import TokenBatch, TokenDataset
from .recipe import DtypeName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]  # features [..., H] to float32 logits [..., V]

FORMAT = 2  # of a feature store
MANIFEST, SHARDS = "manifest.json", "features-*.safetensors"
COMMAND = "taps-ext features"  # it makes what is not there
SHARD_BYTES = 1 << 28  # features that wait in memory until they are written as one file
LONGEST_WAIT_S = 300.0  # or until the first of them has waited so long: a kill loses no more
ABANDONED_S = 3600.0  # an unfinished file that nobody has written to for so long belongs to a process that was killed
FORWARD_TOKENS = 16384  # of one forward of the target, with padding, when features are computed ahead


@dataclass(frozen=True)
class DraftBatch:
    """A text of L tokens as T = L - 1 drafter slots: slot i has feature i and token i + 1, and guesses feature i + 1.

    `loss_mask` marks the slots whose guess, through the lm_head, draws a token that is to be learned (token i + 2).
    Shapes: B rows, T slots, H hidden.
    """

    features: Tensor  # float [B, T, H], the target's, of positions 0 .. T-1
    next_embeddings: Tensor  # float [B, T, H], the target's embeddings of tokens 1 .. T
    next_features: Tensor  # float [B, T, H], the target's, of positions 1 .. T
    loss_mask: Tensor  # bool [B, T]
    lengths: Tensor  # int64 [B], slots that are no padding
    ids: tuple[int, ...]  # B, of the sequences: a hash of their content


class FeatureSource:
    """What the trainer asks of the target, whether it is at hand or only its features are."""

    def __init__(self, embedding: Tensor, head: Tensor, rule: LogitRule) -> None:
        self.embedding, self._head, self._rule = embedding, head, rule  # [V, H] both

    def features(self, batch: TokenBatch) -> Tensor:
        """Return float32 [B, L, H] after the target's final norm; those of padding mean nothing."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        """Return float32 [..., V] of features [..., H]; gradients flow to the features only."""
        return _logits(features, self._head, self._rule)

    def draft_head(self, vocabulary: DraftVocabulary) -> Head:
        """Return the part of `logits` that makes the logits [..., D] of a draft vocabulary, its rows copied once."""
        return partial(_logits, head=self._head[vocabulary.tokens.to(self._head.device)], rule=self._rule)

    @torch.no_grad()
    def draft_batch(self, batch: TokenBatch) -> DraftBatch:
        """Return the batch, moved to the device of the features, as drafter slots."""
        features = self.features(batch)
        batch = batch.to(features.device)
        learned = F.pad(batch.loss_mask[:, 2:], (0, 1), value=False)
        embeddings = F.embedding(batch.tokens[:, 1:].to(self.embedding.device), self.embedding).to(features)
        return DraftBatch(features[:, :-1], embeddings, features[:, 1:], learned, batch.lengths - 1, batch.ids)


def _logits(features: Tensor, head: Tensor, rule: LogitRule) -> Tensor:
    """Return float32 [..., V] of features [..., H] and an lm_head [V, H], whose product has the lm_head's precision.

    So does drafting; and a large lm_head must not be cast for every few hundred slots, as autocast would.
    """
    with torch.autocast(head.device.type, enabled=False):
        return rule.apply(F.linear(features.to(head.dtype), head).float())


class FrozenTarget(FeatureSource):
    """Runs the target as the text comes; nothing of the target is changed."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raise ValueError for a target whose embedding or lm_head does more than look up and multiply."""
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert isinstance(embedding, Tensor) and isinstance(head, Tensor)
        super().__init__(embedding.detach(), head.detach(), LogitRule.of(model.config.get_text_config()))
        self.model = model
        self._check_ends()

    @torch.no_grad()
    def _check_ends(self) -> None:
        """Raise ValueError unless two matrices, and a scale and cap of logits, are all that is beside the layers."""
        tokens = torch.arange(min(8, len(self.embedding)), device=self.embedding.device)[None]
        one, other = self.model.get_input_embeddings()(tokens).float(), F.embedding(tokens, self.embedding).float()
        if (one - other).abs().max() > 0.02 * other.abs().max():  # what two ways of computing in bfloat16 differ by
            name = type(self.model).__name__
            raise ValueError(f"the target {name} changes its embeddings (scaling), which drafters are not trained for")
        refuse_unlike_head(self.model, self.logits)

    @torch.no_grad()
    def features(self, batch: TokenBatch) -> Tensor:
        """Return float32 [B, L, H] by one forward."""
        tokens = batch.tokens.to(self.embedding.device)
        hidden: Tensor = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden.float()


# ---- stored features


class FeatureStore:
    """A directory of features by the content id of a text, in files that are written once and never changed.

    What is added waits in memory for its file and is read from the disk after `flush`, which also finds the files that
    other processes have written.
    """

    def __init__(self, folder: Path, target: TargetIdentity, dtype: DtypeName, shard_bytes: int = SHARD_BYTES) -> None:
        """Use `create_store` or `open_store`."""
        self.folder, self.target, self.dtype, self.shard_bytes = folder, target, dtype, shard_bytes
        self._places: dict[int, tuple[Any, int, int]] = {}  # by id: the features of a file, from where, to where
        self._known: set[Path] = set()
        self._waiting: dict[int, Tensor] = {}  # by id: [length, H]
        self._waiting_bytes, self._waiting_since = 0, 0.0
        self._find_shards()

    def __contains__(self, content_id: int) -> bool:
        return content_id in self._places or content_id in self._waiting

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    @property
    def position_bytes(self) -> int:
        """Return the bytes of the features of one token."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.target.hidden_size * dtype.itemsize

    def missing(self, datasets: Sequence[TokenDataset]) -> list[tuple[TokenDataset, list[int]]]:
        """Return the sequences of each dataset that have no features here; equal ones once."""
        wanted: set[int] = set()
        found = []
        for data in datasets:
            new = {id: i for i, id in enumerate(data.ids) if id not in self and id not in wanted}
            wanted.update(new)
            found.append((data, list(new.values())))
        return found

    def require(self, datasets: Sequence[TokenDataset]) -> None:
        """Raise ValueError unless all features of these are here."""
        if missing := sum(len(indices) for _, indices in self.missing(datasets)):
            total = len({id for data in datasets for id in data.ids})
            raise ValueError(
                f"{missing:,} of {total:,} sequences have no features in {self.folder}; run `{COMMAND}` with this "
                f"recipe, which computes only what is missing, or set features.mode to online"
            )

    def add(self, content_id: int, features: Tensor) -> None:
        """Keep features [length, H]; they go to disk with others, or at the next `flush`.

        Raise ValueError when they are not finite, OSError when the disk is full, in a sentence.
        """
        if content_id in self:
            return
        rounded = features.to("cpu", getattr(torch, self.dtype), copy=True)
        if not bool(rounded.isfinite().all()):
            raise ValueError(
                f"the target's features of a sequence are not finite in {self.dtype}; use bfloat16 or float32 "
                f"for target_dtype and features.dtype"
            )
        if not self._waiting:
            self._waiting_since = time.monotonic()
        self._waiting[content_id] = rounded
        self._waiting_bytes += len(rounded) * self.position_bytes
        if self._waiting_bytes >= self.shard_bytes or time.monotonic() - self._waiting_since > LONGEST_WAIT_S:
            self.flush()

    def flush(self) -> None:
        """Bring to disk what waits in memory, and find what other processes have written meanwhile."""
        if self._waiting:
            self._write(self._waiting)
        self._waiting, self._waiting_bytes = {}, 0
        self._find_shards()

    def read(self, batch: TokenBatch, device: torch.device) -> Tensor:
        """Return the features of a batch as float32 [B, L, H], those of padding 0; ValueError if some are missing."""
        out = torch.zeros(*batch.tokens.shape, self.target.hidden_size, device=device)
        for row, (content_id, length) in enumerate(zip(batch.ids, batch.lengths.tolist(), strict=True)):
            if content_id not in self._places:
                raise ValueError(f"{self.folder} has no features of sequence {content_id:016x}; run `{COMMAND}`")
            features, start, end = self._places[content_id]
            out[row, :length] = features[start:end]
        return out

    def _write(self, features: dict[int, Tensor]) -> None:
        from safetensors.torch import save

        ids = torch.tensor(list(features), dtype=torch.uint64).view(torch.int64)
        lengths = torch.tensor([len(tensor) for tensor in features.values()])
        path = self.folder / SHARDS.replace("*", uuid.uuid4().hex[:12])
        try:
            write_whole(path, [save({"ids": ids, "lengths": lengths, "features": torch.cat([*features.values()])})])
        except OSError as error:
            raise OSError(
                f"{size(self._waiting_bytes)} of features could not be written to {self.folder} ({error.strerror}); "
                f"free some space and run it again: what is stored there stays"
            ) from error

    def _find_shards(self) -> None:
        """Index the files that were not here before; of several with the same sequence the first one stays."""
        from safetensors import SafetensorError, safe_open

        for path in sorted(set(self.folder.glob(SHARDS)) - self._known):
            try:
                file = safe_open(path, "pt")
                ids, lengths = (file.get_tensor(name) for name in ("ids", "lengths"))
                features = file.get_slice("features")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} is damaged; delete it and run `{COMMAND}`, which computes only what is missing"
                ) from error
            ends = lengths.cumsum(0).tolist()
            for id, start, end in zip(ids.view(torch.uint64).tolist(), [0, *ends], ends, strict=False):
                self._places.setdefault(id, (features, start, end))
            self._known.add(path)


def create_store(
    folder: Path, target: TargetIdentity, dtype: DtypeName, shard_bytes: int = SHARD_BYTES
) -> FeatureStore:
    """Return the store in a directory, for adding to it: a new one, or the one of this target and dtype that is there.

    Raise ValueError or OSError, in a sentence, when the directory holds other features.
    """
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        manifest = {"format": FORMAT, "target": asdict(target), "dtype": dtype}
        write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    found, found_dtype = _read_manifest(folder)
    found.check_same(target, folder)
    if found_dtype != dtype:
        raise ValueError(f"{folder} holds {found_dtype} features, not {dtype}; set features.dtype to {found_dtype}")
    for path in folder.glob(f".{SHARDS}.*.tmp"):  # of processes that were killed
        if time.time() - path.stat().st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)
    return FeatureStore(folder, found, dtype, shard_bytes)


def open_store(folder: Path) -> FeatureStore:
    """Return the store in a directory, for reading. Raise ValueError or FileNotFoundError, in a sentence."""
    return FeatureStore(folder, *_read_manifest(folder))


def _read_manifest(folder: Path) -> tuple[TargetIdentity, DtypeName]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"{folder} is a feature store of another version; give another features.path")
        getattr(torch, manifest["dtype"])
        return TargetIdentity(**manifest["target"]), manifest["dtype"]
    except FileNotFoundError:
        raise FileNotFoundError(f"no features in {folder}: there is no {MANIFEST}; run `{COMMAND}`") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged; delete {folder} and run `{COMMAND}` again") from error


class StoredFeatures(FeatureSource):
    """Reads all features from a store; of the target it has the embedding and the lm_head."""

    def __init__(self, store: FeatureStore, ends: TargetEnds, device: torch.device) -> None:
        """Raise ValueError when the store is of another target."""
        store.target.check_same(ends.identity, store.folder)
        super().__init__(ends.embedding.to(device), ends.head.to(device), LogitRule.of(ends.config))
        self._store = store

    def features(self, batch: TokenBatch) -> Tensor:
        """Return float32 [B, L, H] from the store, 0 for padding. Raise ValueError when a row is missing."""
        return self._store.read(batch, self.embedding.device)


@dataclass(frozen=True)
class SpaceEstimate:
    """The features that a store does not have yet, and the room on its disk."""

    folder: Path
    num_sequences: int
    num_tokens: int
    position_bytes: int
    free_bytes: int

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all features, without the few of headers and indices."""
        return self.num_tokens * self.position_bytes

    def __str__(self) -> str:
        return (
            f"the features of {self.num_sequences:,} sequences ({self.num_tokens:,} tokens x {self.position_bytes:,} "
            f"bytes) take {size(self.num_bytes)} in {self.folder}, where {size(self.free_bytes)} are free"
        )

    def check(self) -> None:
        """Raise OSError when they would not fit."""
        if self.num_bytes > self.free_bytes:
            raise OSError(
                f"{self}; give a directory on a larger disk, a smaller features.dtype, or features.mode online, "
                f"which needs no disk"
            )


def space_for(store: FeatureStore, datasets: Sequence[TokenDataset]) -> SpaceEstimate:
    """Return the disk space that the missing features will take; the directory need not be there yet."""
    lengths = [data.length(i) for data, indices in store.missing(datasets) for i in indices]
    existing = next(folder for folder in (store.folder, *store.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    return SpaceEstimate(store.folder, len(lengths), sum(lengths), store.position_bytes, free)


def extract(
    target: FrozenTarget,
    datasets: Sequence[TokenDataset],
    store: FeatureStore,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> int:
    """Compute this process's share of the features that the store does not have; return how many sequences it had.

    `report(done, total)` counts this process's tokens. Raise OSError, in a sentence, when the disk is too small.
    """
    space_for(store, datasets).check()
    shares = [
        (data, [i for i in indices if data.ids[i] % num_processes == process_index])
        for data, indices in store.missing(datasets)
    ]
    done, total = 0, sum(data.length(i) for data, indices in shares for i in indices)
    for batch in (batch for data, indices in shares for batch in _batches(data, indices)):
        for id, features, length in zip(batch.ids, target.features(batch), batch.lengths.tolist(), strict=True):
            store.add(id, features[:length])
        done += int(batch.lengths.sum())
        if report is not None:
            report(done, total)
    store.flush()
    return sum(len(indices) for _, indices in shares)


def _batches(data: TokenDataset, indices: Sequence[int]) -> Iterator[TokenBatch]:
    """Yield batches of similar length, the longest first: if memory is short, that shows at once."""
    indices = sorted(indices, key=data.length, reverse=True)
    while indices:
        size = max(1, FORWARD_TOKENS // data.length(indices[0]))
        yield data.batch(indices[:size])
        indices = indices[size:]


def size(num_bytes: int) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:,.1f} MiB"
