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

FIRST_CAPACITY = 256  # token slots; doubles whenever prompt, text and tree no longer fit


@dataclass(frozen=True)
class KVSpec:
    """What one layer writes for one token: the shape and place of its keys (or values)."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    head_dim: int


class TreeKVCache:
    """The keys and values of one call: `kv_length` committed columns, then room for the next tree.

    Row b owns columns 0..prefix_lengths[b]-1; columns up to `kv_length`, the longest row's, are padding for it. What
    the host knows of the lengths is here, so that nobody asks the device: the longest, and whether any row is shorter.
    """

    def __init__(self, specs: Sequence[tuple[KVSpec, KVSpec]], batch_size: int) -> None:
        self.kv_length = 0
        self.is_ragged = False
        self.capacity = 0
        self._batch_size = batch_size
        self._places: list[tuple[tuple[KVSpec, int], tuple[KVSpec, int]]] = []
        self._counts: dict[KVSpec, int] = {}
        for keys, values in specs:
            self._places.append((self._place(keys), self._place(values)))
        self.buffers: dict[KVSpec, Tensor] = {}  # [places, B, heads, capacity, head_dim]
        self.cache: Cache = Cache(layers=[_TreeKVLayer(self, layer) for layer in range(len(self._places))])

    def _place(self, spec: KVSpec) -> tuple[KVSpec, int]:
        self._counts[spec] = self._counts.get(spec, 0) + 1
        return spec, self._counts[spec] - 1

    @torch.inference_mode(False)  # ordinary tensors, so that every mode may write to them later
    @torch.no_grad()
    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` columns behind the committed ones; at least doubles when it grows."""
        needed = self.kv_length + num_tokens
        if needed <= self.capacity:
            return
        capacity = max(needed, 2 * self.capacity, FIRST_CAPACITY)
        for spec, places in self._counts.items():
            shape = (places, self._batch_size, spec.num_heads, capacity, spec.head_dim)
            grown = torch.zeros(shape, dtype=spec.dtype, device=spec.device)
            if spec in self.buffers:
                grown[:, :, :, : self.kv_length] = self.buffers[spec][:, :, :, : self.kv_length]
            self.buffers[spec] = grown
        self.capacity = capacity

    def hold(self, lengths: Sequence[int]) -> None:
        """Row b now owns `lengths[b]` columns, at least 1; what lies behind them is free."""
        self.kv_length, self.is_ragged = max(lengths), min(lengths) < max(lengths)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The layer's key and value buffers, [B, heads, capacity, head_dim], as views."""
        (key_spec, key_place), (value_spec, value_place) = self._places[index]
        return self.buffers[key_spec][key_place], self.buffers[value_spec][value_place]

    def compact(self, path: Tensor, num_accepted: Tensor, prefix_lengths: Tensor) -> None:
        """Move each row's accepted path (num_accepted -1: nothing) behind its prefix, in every layer."""
        for spec, buffer in self.buffers.items():
            rows = (path.to(spec.device), num_accepted.to(spec.device), prefix_lengths.to(spec.device))
            ops.compact_kv(buffer, *rows, self.kv_length)


class _TreeKVLayer(CacheLayerMixin):
    """One layer's window on a `TreeKVCache`, in the form that transformers' models write to.

    `get_max_cache_shape` is transformers 4's name of `get_max_length`; `get_mask_sizes` takes the query's length, or
    in transformers 4 its positions.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, owner: TreeKVCache, index: int) -> None:
        super().__init__()
        self._owner, self._index = owner, index
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the owner allocates."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self._owner.kv_length
        stop = start + key_states.shape[-2]
        keys, values = (buffer[:, :, :stop] for buffer in self._owner.layer(self._index))
        # A tree stands behind a prefix: a node that overflows must not reach, through its masked column, those that it
        # is no part of. A prompt's row is its own affair.
        write = _write_finite if start > 0 else Tensor.copy_
        write(keys[:, :, start:], key_states)
        write(values[:, :, start:], value_states)
        return keys, values

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        query_length = query if isinstance(query, int) else query.shape[0]
        return self._owner.kv_length + query_length, 0

    def get_seq_length(self, *args: Any) -> int:
        return self._owner.kv_length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def cache_keyword(module: torch.nn.Module) -> str:
    """Return the name under which `module.forward` takes its cache: `cache` since transformers 5.24, before that
    `past_key_values`. Models whose code lies in their checkpoint may still use the older name."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def _write_finite(columns: Tensor, states: Tensor) -> None:
    """Write 0 for NaN and infinities, which a mask does not stop: 0 times NaN is NaN."""
    torch.nan_to_num(states, nan=0.0, posinf=0.0, neginf=0.0, out=columns)
