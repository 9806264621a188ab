"""Features that are kept: computed ahead for a whole data set, read without the target, or kept as a run needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..checkpoints.load import TargetEnds
from ..drafters import DraftVocabulary
from ..drafters.growth import LogitRule
from .dataset import TokenBatch, TokenDataset
from .feature_store import FeatureStore
from .features import DraftBatch, FrozenTarget, Head, head_logits, head_rows, shift

FORWARD_TOKENS = 16384  # of one forward of the target, with padding, when features are computed ahead
ONE_BY_ONE = ("cpu",)  # devices where rows are computed one by one: see `_computed`

Report = Callable[[int, int], None]  # tokens done, tokens in all


class StoredFeatures:
    """A `FeatureSource` that reads all features from a store; of the target it has the embedding and the lm_head."""

    def __init__(self, store: FeatureStore, ends: TargetEnds, device: torch.device) -> None:
        """Raises ValueError when the store is of another target."""
        store.target.check_same(ends.identity, store.folder)
        self._store = store
        self._head, self._rule = ends.head.to(device), LogitRule.of(ends.config)
        self.embedding = ends.embedding.to(device)  # [V, H]

    def logits(self, features: Tensor) -> Tensor:
        """float32 [..., V] of features [..., H], in the features' own precision."""
        return head_logits(features, self._head, self._rule)

    def draft_head(self, vocabulary: DraftVocabulary) -> Head:
        """See `FeatureSource.draft_head`."""
        return head_rows(self._head, self._rule, vocabulary)

    def draft_batch(self, batch: TokenBatch) -> DraftBatch:
        """The batch as drafter slots. Raises ValueError when a row is missing or its file is damaged."""
        return _stored_batch(self._store, batch, self.embedding)

    def flush(self) -> None:
        """Nothing: nothing is computed here."""


class CachedFeatures:
    """A `FeatureSource` that computes what the store does not have, and keeps it: later epochs and runs read it.

    What is kept is read back from the store also when it was computed just now, so that it is rounded in the same way.
    """

    def __init__(self, target: FrozenTarget, store: FeatureStore) -> None:
        self._target = target
        self._store = store

    @property
    def embedding(self) -> Tensor:
        """The input embedding [V, H]."""
        return self._target.embedding

    def logits(self, features: Tensor) -> Tensor:
        """float32 [..., V] of features [..., H], in the features' own precision."""
        return self._target.logits(features)

    def draft_head(self, vocabulary: DraftVocabulary) -> Head:
        """See `FeatureSource.draft_head`."""
        return self._target.draft_head(vocabulary)

    def draft_batch(self, batch: TokenBatch) -> DraftBatch:
        """The batch as drafter slots."""
        missing = [row for row, content_id in enumerate(batch.ids) if content_id not in self._store]
        for row, features in _computed(self._target, batch, missing):
            self._store.add(batch.ids[row], features)
        return _stored_batch(self._store, batch, self.embedding)

    def flush(self) -> None:
        """Bring to disk what was computed."""
        self._store.flush()


def extract(
    target: FrozenTarget,
    datasets: Sequence[TokenDataset],
    store: FeatureStore,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    report: Report | None = None,
) -> int:
    """The number of sequences whose features this process computed: its share of those that the store does not have.

    A run that was killed loses what waited for its file, `SHARD_BYTES` or five minutes at most; the next one goes on.
    `report(done, total)` counts this process's tokens. Raises OSError, in a sentence, when the disk is too small.
    """
    store.space_for(datasets).check()
    shares = [
        (data, [i for i in indices if data.ids[i] % num_processes == process_index])
        for data, indices in store.missing(datasets)
    ]
    done, total = 0, sum(data.length(i) for data, indices in shares for i in indices)
    for batch in (batch for data, indices in shares for batch in _batches(data, indices)):
        for row, features in _computed(target, batch, range(len(batch.ids))):
            store.add(batch.ids[row], features)
        done += int(batch.lengths.sum())
        if report is not None:
            report(done, total)
    store.flush()
    return sum(len(indices) for _, indices in shares)


def _batches(data: TokenDataset, indices: Sequence[int]) -> Iterator[TokenBatch]:
    """Batches of similar length, the longest first: if memory is short, that shows at once."""
    indices = sorted(indices, key=data.length, reverse=True)
    while indices:
        size = max(1, FORWARD_TOKENS // data.length(indices[0]))
        yield data.batch(indices[:size])
        indices = indices[size:]


def _computed(target: FrozenTarget, batch: TokenBatch, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """The features [length, H] of some rows of a batch.

    The last bits of a forward depend on the shape of its batch. On the CPU a row is therefore computed on its own, so
    that its features are a function of its text, whoever computes them when. A GPU is too fast for that: there the
    whole batch is computed, so that a resumed run, which finds some of its rows stored, computes the others as before.
    """
    lengths = batch.lengths.tolist()
    if not rows:
        return
    if target.embedding.device.type not in ONE_BY_ONE:
        features = target.features(batch)
        yield from ((row, features[row, : lengths[row]]) for row in rows)
        return
    for row in rows:
        part = slice(row, row + 1), slice(lengths[row])
        alone = TokenBatch(batch.tokens[part], batch.loss_mask[part], batch.lengths[row : row + 1], (batch.ids[row],))
        yield row, target.features(alone)[0]


def _stored_batch(store: FeatureStore, batch: TokenBatch, embedding: Tensor) -> DraftBatch:
    return shift(store.read(batch, embedding.device), batch, embedding)
