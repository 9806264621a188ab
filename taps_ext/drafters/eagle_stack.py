"""EAGLE networks of one shape as one: each linear layer is a single batched product over all of them.

The stack owns the weights and the networks' own parameters are slices of it, so that memory is paid once. Decoders over
the same drafters in the same order share one stack, those over other selections have one each. The memory of a stack is
freed with its last decoder: a network that outlives it takes its weights with it.

Dims: D networks, B rows, T slots, S keys, H hidden.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .network import EagleNetwork, rotate_half

LINEARS = (
    "fc",
    *(f"layers.0.self_attn.{part}_proj" for part in "qkvo"),
    *(f"layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
)
NORM = "layers.0.post_attention_layernorm.weight"


def layout(network: EagleNetwork) -> tuple[Any, ...] | None:
    """What the networks of one stack have in common, to be compared; None for a network that must run by itself.

    All but the rope has to be equal: configuration, dtypes and devices. By itself runs a network in training, which its
    optimizer owns, and one whose layers were replaced, by quantised ones say.
    """
    parameters = dict(network.named_parameters())
    is_plain = type(network) is EagleNetwork and all(type(network.get_submodule(name)) is nn.Linear for name in LINEARS)
    if not is_plain or any(parameter.requires_grad for parameter in parameters.values()):
        return None
    config = replace(network.config, rope_theta=0.0, rope_scaling=None, max_position_embeddings=0)
    return config, {name: (parameter.dtype, parameter.device) for name, parameter in parameters.items()}


class EagleStack:
    """The stages of `EagleNetwork` over [D, ...]: what each of the networks gives for its own slots, up to rounding.

    A stack of one is the network itself, with its own bits. Networks of a longer one are alike (`layout`), and their
    parameters are replaced by slices of the stack, equal in value; threads that use them meanwhile are not disturbed.
    """

    def __init__(self, networks: Sequence[EagleNetwork]) -> None:
        self.networks = list(networks)
        self.config = self.networks[0].config
        self._alone = self.networks[0] if len(self.networks) == 1 else None
        if self._alone is None:
            self._held = _held_weights(self.networks)
            ropes = [network.rotary for network in self.networks]
            with torch.inference_mode(False):
                self._inv_freq = torch.stack([rope.inv_freq for rope in ropes])[:, None, None]
                scaling = torch.tensor(
                    [rope.scaling for rope in ropes], dtype=torch.float32, device=self._inv_freq.device
                )
                self._rope_scaling = scaling[:, None, None, None]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles stack their own networks."""
        return EagleStack, (self.networks,)

    def project(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """The layers' input [D, B, T, H], see `EagleNetwork.project`; both are [D, B, T, H]."""
        if self._alone is not None:
            return self._alone.project(embeddings[0], features[0])[None]
        return self._linear("fc", torch.cat((embeddings, features), dim=-1))

    def qkv(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [D, B, heads, T, head_dim], rotated keys and plain values [D, B, kv_heads, T, head_dim].

        `position_ids` is int64 [B, T], for all networks; each has its own rope.
        """
        if self._alone is not None:
            query, key, value = self._alone.qkv(x[0], position_ids)
            return query[None], key[None], value[None]
        split = (-1, self.config.head_dim)
        query, key, value = (
            self._linear(f"layers.0.self_attn.{part}_proj", x).unflatten(-1, split).transpose(2, 3) for part in "qkv"
        )
        cos, sin = (angle[:, :, None] for angle in self._angles(position_ids, x.dtype))
        return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """What each query reads, [D, B, T, heads * head_dim], see `EagleNetwork.attend`; `mask` bool [D, B, 1, T, S].

        No weights take part: the rows of all networks are rows of one batch.
        """
        rows = None if mask is None else mask.flatten(0, 1)
        out = self.networks[0].attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), rows)
        return out.view(*query.shape[:2], *out.shape[1:])

    def finish(self, x: Tensor, attention_out: Tensor) -> Tensor:
        """The layers' output [D, B, T, H], see `EagleNetwork.finish`."""
        if self._alone is not None:
            return self._alone.finish(x[0], attention_out[0])[None]
        hidden = x + self._linear("layers.0.self_attn.o_proj", attention_out)
        normal = self._norm(hidden)
        gate, up = (self._linear(f"layers.0.mlp.{part}_proj", normal) for part in ("gate", "up"))
        return hidden + self._linear("layers.0.mlp.down_proj", self.networks[0].layer.mlp.act_fn(gate) * up)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """The linear layers' [D, B, T, out] of x [D, B, T, in]."""
        weight, bias = self._held.tensors[f"{name}.weight"], self._held.tensors.get(f"{name}.bias")
        rows = x.flatten(1, 2)
        product = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
        return product.view(*x.shape[:3], -1)

    def _norm(self, hidden: Tensor) -> Tensor:
        """The root-mean-square norms, in float32 as the networks' own are."""
        exact = hidden.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self._held.tensors[NORM][:, None, None] * exact.to(hidden.dtype)

    def _angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [D, B, T, head_dim], see `RotaryAngles`."""
        angles = position_ids[..., None].float() * self._inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._rope_scaling).to(dtype), (angles.sin() * self._rope_scaling).to(dtype)


class _HeldWeights:
    """The parameters of several networks, each [D, ...]; the networks' own are slices of them while this lives."""

    def __init__(self, networks: Sequence[EagleNetwork]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._members = [weakref.ref(network) for network in networks]
        for name, _ in networks[0].named_parameters():
            self.tensors[name] = torch.stack([network.get_parameter(name) for network in networks])
            for network, own in zip(networks, self.tensors[name], strict=True):
                _put(network, name, own)
        weakref.finalize(self, _hand_back, self._members, self.tensors).atexit = False

    def is_of(self, networks: Sequence[EagleNetwork]) -> bool:
        """Whether these are the networks, and all their parameters are still here."""
        places = {id(network): place for place, network in enumerate(networks)}  # of one given twice the last
        return [member() for member in self._members] == list(networks) and all(
            _is_slice(networks[place], name, stacked[place])
            for name, stacked in self.tensors.items()
            for place in places.values()
        )


# Of one selection of networks, in their order, while any decoder uses it.
_HELD: weakref.WeakValueDictionary[tuple[int, ...], _HeldWeights] = weakref.WeakValueDictionary()
_LOCK = (
    threading.RLock()
)  # of _HELD and of the networks' parameters; re-entrant, because weights are handed back anywhere


def _held_weights(networks: Sequence[EagleNetwork]) -> _HeldWeights:
    """The weights of these networks, held by another stack already or from now on."""
    layouts = [layout(network) for network in networks]
    if any(one is None or one != layouts[0] for one in layouts):
        raise ValueError("networks of one stack must be frozen and alike in all but their rope; let others draft alone")
    key = tuple(map(id, networks))
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        held = _HELD.get(key)
        if held is None or not held.is_of(networks):
            held = _HELD[key] = _HeldWeights(networks)
        return held


def _hand_back(members: list[weakref.ref[EagleNetwork]], tensors: dict[str, Tensor]) -> None:
    """Give the networks that outlive their stack weights of their own, so that its memory is freed, bit by bit."""
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        networks = [member() for member in members]
        for name in list(tensors):
            for network, own in zip(networks, tensors.pop(name), strict=True):
                # One in training since then stays where it is: its optimizer knows the very parameters.
                if (
                    network is not None
                    and _is_slice(network, name, own)
                    and not network.get_parameter(name).requires_grad
                ):
                    _put(network, name, own.clone())


def _is_slice(network: EagleNetwork, name: str, own: Tensor) -> bool:
    parameter = dict(network.named_parameters()).get(name)
    return parameter is not None and parameter.data_ptr() == own.data_ptr()


def _put(network: EagleNetwork, name: str, value: Tensor) -> None:
    """Replace a parameter. A new object, not new data in the old one: a thread may be computing with that."""
    module, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))
