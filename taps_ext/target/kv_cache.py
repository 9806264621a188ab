"""The target's KV cache: preallocated, growing, compacted in place after each step.

One buffer per (device, dtype, heads, head_dim) holds the keys and values of all its layers, so that `ops.compact_kv`
moves an accepted path through every layer in one call and needs no table of pointers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import ops
from ..products import PackedProducts
from ..tree import Lengths

FIRST_CAPACITY = 256  # token slots; doubles whenever prompt, text and tree no longer fit


@dataclass(frozen=True)
class KVSpec:
    """Describe what one layer writes for one token: the shape and place of its keys (or values)."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    head_dim: int

    @classmethod
    def of(cls, states: Tensor) -> KVSpec:
        """Return the description of keys or values [B, heads, T, head_dim]."""
        return cls(states.device, states.dtype, states.shape[1], states.shape[3])


class TreeKVCache:
    """Hold the keys and values of one call: the committed columns, then room for the next tree.

    Row b owns columns 0..lengths[b]-1; columns up to the longest row's length are padding for it. The next tree begins
    at the longest row's length.
    """

    def __init__(self, specs: Sequence[tuple[KVSpec, KVSpec]], lengths: Lengths) -> None:
        self.lengths = lengths  # committed columns per row
        self.position_offsets: Tensor | None = None  # int64 [B], to add to a column for its position; None: nothing
        self.products = PackedProducts()  # the packed weights that the call has checked
        self.capacity = 0
        self._slots: list[tuple[tuple[KVSpec, int], tuple[KVSpec, int]]] = []
        self._counts: dict[KVSpec, int] = {}
        for keys, values in specs:
            self._slots.append((self._slot(keys), self._slot(values)))
        self.buffers: dict[KVSpec, Tensor] = {}  # [keys and values of all layers, B, heads, capacity, head_dim]
        self.layers: list[tuple[Tensor, Tensor]] = []  # each layer's keys and values [B, heads, capacity, head_dim]
        self.cache: Cache = Cache(layers=[_TreeKVLayer(self, layer) for layer in range(len(self._slots))])

    def _slot(self, spec: KVSpec) -> tuple[KVSpec, int]:
        self._counts[spec] = self._counts.get(spec, 0) + 1
        return spec, self._counts[spec] - 1

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` columns behind the committed ones; the capacity at least doubles if it grows."""
        needed = self.lengths.longest + num_tokens
        if needed > self.capacity:
            self._grow(max(needed, 2 * self.capacity, FIRST_CAPACITY))

    @torch.inference_mode(False)  # ordinary tensors, so that every mode may write to them later
    @torch.no_grad()
    def _grow(self, capacity: int) -> None:
        committed = self.lengths.longest
        for spec, count in self._counts.items():
            shape = (count, len(self.lengths.host), spec.num_heads, capacity, spec.head_dim)
            grown = torch.zeros(shape, dtype=spec.dtype, device=spec.device)
            if spec in self.buffers:
                grown[:, :, :, :committed] = self.buffers[spec][:, :, :, :committed]
            self.buffers[spec] = grown
        self.capacity = capacity
        self.layers = [(self.buffers[keys][k], self.buffers[values][v]) for (keys, k), (values, v) in self._slots]

    def pack(self, columns: Tensor) -> None:
        """Move each row's columns int64 [B, longest] to the front, in every layer."""
        for spec, buffer in self.buffers.items():
            order = columns.to(spec.device)[:, None, :, None].expand(-1, spec.num_heads, -1, spec.head_dim)
            for states in buffer:
                states[:, :, : columns.shape[1]] = states.gather(2, order)

    def compact(self, path: Tensor, lengths: Lengths) -> None:
        """Move each row's accepted path behind its prefix, in every layer, up to the row's new length."""
        if path.shape[1] == 1 and not self.lengths.is_ragged:
            return  # the roots were written there
        num_accepted = lengths.tensor - self.lengths.tensor - 1
        for spec, buffer in self.buffers.items():
            rows = (path.to(spec.device), num_accepted.to(spec.device), self.lengths.tensor.to(spec.device))
            ops.compact_kv(buffer, *rows, self.lengths.longest)


class _TreeKVLayer(CacheLayerMixin):
    """Give transformers' models one layer of a `TreeKVCache` to write to.

    `get_max_cache_shape` is the name of `get_max_length` in transformers 4; `get_mask_sizes` takes the query's length,
    in transformers 4 its positions.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, owner: TreeKVCache, index: int) -> None:
        super().__init__()
        self._owner, self._index = owner, index
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the owner allocates."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, count = self._owner.lengths.longest, key_states.shape[-2]
        keys, values = self._owner.layers[self._index]
        # A tree stands behind a prefix: an overflow in one node must not reach other nodes through its masked column.
        # In a prefill, a row's overflow stays in that row.
        write = _write_finite if start > 0 else Tensor.copy_
        for buffer, states in ((keys, key_states), (values, value_states)):
            if states.dtype != buffer.dtype or states.device != buffer.device:
                _refuse_converted(buffer, states)
            write(buffer.narrow(2, start, count), states)
        return keys.narrow(2, 0, start + count), values.narrow(2, 0, start + count)

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        query_length = query if isinstance(query, int) else query.shape[0]
        return self._owner.lengths.longest + query_length, 0

    def get_seq_length(self, *args: Any) -> int:
        return self._owner.lengths.longest

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def cache_keyword(module: torch.nn.Module) -> str:
    """Return the name under which `module.forward` takes its cache.

    It is `cache` since transformers 5.24 and `past_key_values` before; models whose code is part of their checkpoint
    may still use the older name.
    """
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def _refuse_converted(buffer: Tensor, states: Tensor) -> None:
    """Raise ValueError for states of a model that was converted; under autocast float32 holds either half precision."""
    if states.device != buffer.device or not torch.is_autocast_enabled(states.device.type):
        raise ValueError(
            f"the target was in {buffer.dtype} on {buffer.device} when it was taken for speculation, but now computes "
            f"in {states.dtype} on {states.device}; make a new TargetModel or SpeculativeDecoder"
        )


def _write_finite(columns: Tensor, states: Tensor) -> None:
    """Write 0 for NaN and infinities, which a mask does not stop: 0 times NaN is NaN."""
    if states.dtype != columns.dtype:  # under autocast
        states = states.to(columns.dtype)
    torch.nan_to_num(states, 0.0, 0.0, 0.0, out=columns)
