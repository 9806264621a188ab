"""The EAGLE-2 network: one Llama layer over target features. HASS trains the same network with another objective.

Slot i of the drafter carries the target's feature of position i and the embedding of token i + 1. Its output predicts
the feature of position i + 1, and the target's own lm_head turns that prediction into logits for token i + 2.

Source: EAGLE-2 (arXiv 2406.16858); HASS (arXiv 2408.15766). Dims: B batch, T slots, S keys, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

# Rope types whose frequencies do not depend on the length of the text. The other types rewrite a buffer in the forward
# pass, which reads the device and is not safe when two threads share a drafter.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The names of a size, by family of targets; transformers' own aliases (n_embd, n_head, ...) come on top.
FEATURE_SIZES = ("word_embed_proj_dim", "hidden_size")  # the first is OPT's, whose layers may be wider
MLP_SIZES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


def size_of(config: Any, names: tuple[str, ...], default: int | None = None) -> int:
    """Return the first of these sizes that a transformers config has as a number; `default` if it has none of them."""
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    if default is None:
        raise ValueError(f"the target's config ({type(config).__name__}) gives no {' or '.join(names)}")
    return default


def rope_of(config: Any) -> tuple[float | None, dict[str, Any] | None]:
    """Return (theta, scaling) of a config, each None if the config does not name it.

    `config` is a dict or a transformers config, in either spelling: rope_theta with rope_scaling (4.x, `type` or
    `rope_type`), or rope_parameters (5.x, by layer type where a model has several).
    """

    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, dict) else getattr(config, name, None)

    parameters = {
        "rope_theta": get("rope_theta"),
        **_one_rope(get("rope_scaling")),
        **_one_rope(get("rope_parameters")),
    }
    theta = parameters.pop("rope_theta")
    rope_type = parameters.pop("type", None)
    rope_type = parameters.setdefault("rope_type", rope_type or "default")
    return None if theta is None else float(theta), None if rope_type == "default" else parameters


def _one_rope(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Return the rope of full attention, where ropes are named by layer type; else the first one.

    A type without positions has None.
    """
    ropes = {kind: rope for kind, rope in (parameters or {}).items() if isinstance(rope, dict)}
    return ropes.get("full_attention") or next(iter(ropes.values()), parameters or {})


@dataclass(frozen=True)
class EagleConfig:
    """Describe the shape of an EAGLE-2 network; `rope_scaling` is transformers' dict (`rope_type`, ...) or None."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    fc_bias: bool = False
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        rope_type = (self.rope_scaling or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"drafter rope type must be one of {', '.join(ROPE_TYPES)}, got {rope_type}")

    @classmethod
    def for_target(cls, target_config: Any, **overrides: Any) -> EagleConfig:
        """Return the config of the published drafters: the target's widths, heads and rope; `overrides` are fields."""
        target_config = target_config.get_text_config()
        theta, scaling = rope_of(target_config)
        hidden_size, heads = size_of(target_config, FEATURE_SIZES), size_of(target_config, ("num_attention_heads",))
        fields: dict[str, Any] = {
            "hidden_size": hidden_size,
            "intermediate_size": size_of(target_config, MLP_SIZES, 4 * hidden_size),
            "num_attention_heads": heads,
            "num_key_value_heads": size_of(target_config, ("num_key_value_heads",), heads),
            "head_dim": size_of(target_config, ("head_dim",), hidden_size // heads),
            "vocab_size": target_config.vocab_size,
            "rms_norm_eps": getattr(target_config, "rms_norm_eps", None) or cls.rms_norm_eps,
            "rope_theta": cls.rope_theta if theta is None else theta,
            "rope_scaling": scaling,
            "max_position_embeddings": size_of(target_config, CONTEXT_LENGTHS, cls.max_position_embeddings),
        }
        return cls(**{**fields, **overrides})

    def as_llama(self) -> LlamaConfig:
        """Return the same shape for transformers' Llama blocks; 4.57 and 5.x both accept these names."""
        fields: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else dict(self.rope_scaling),
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": self.hidden_act,
        }
        return LlamaConfig(**fields)


class RotaryAngles(nn.Module):
    """Compute cos and sin of rotary positions; the frequencies stay float32 when the network is cast to bfloat16."""

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        with torch.device("cpu"):
            source = LlamaRotaryEmbedding(config)
        self._exact = source.inv_freq.detach().clone().float()
        self.scaling = float(source.attention_scaling)
        self.inv_freq = self._exact

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryAngles:
        self.inv_freq = self._exact.to(fn(self.inv_freq).device)
        return self

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [B, T, head_dim] in `dtype`, of int64 positions [B, T]."""
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


class EagleAttention(nn.Module):
    """Hold the four projections of the layer's attention; `EagleNetwork` composes them."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)


class EagleLayer(nn.Module):
    """One Llama decoder layer without an input norm."""

    def __init__(self, config: EagleConfig, llama: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = EagleAttention(config)
        self.mlp = LlamaMLP(llama)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class EagleNetwork(nn.Module):
    """Hold the trained part of an EAGLE-2 drafter; parameters carry the published names, the embedding is not included.

    Training calls `forward`, the drafter `extend` (over its KV cache). The four stages `project`, `qkv`, `attend` and
    `finish` are public because HASS composes them over several streams: it concatenates keys and values on dim 2 and
    passes a bool mask.
    """

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        llama = config.as_llama()
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList([EagleLayer(config, llama)])
        self.rotary = RotaryAngles(llama)

    @property
    def layer(self) -> EagleLayer:
        """Return the only decoder layer."""
        layer: EagleLayer = self.layers[0]  # type: ignore[assignment]
        return layer

    def project(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Return the layer's input [B, T, H], of embeddings (token i + 1) and features (position i), both [B, T, H]."""
        projected: Tensor = self.fc(torch.cat((embeddings, features), dim=-1))
        return projected

    def qkv(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries [B, heads, T, head_dim], rotated keys and plain values [B, kv_heads, T, head_dim]."""
        attention = self.layer.self_attn
        split = (*x.shape[:-1], -1, self.config.head_dim)
        query, key, value = (
            projection(x).view(split).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = (angle[:, None] for angle in self.rotary(position_ids, x.dtype))
        return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return what each query reads, [B, T, heads * head_dim].

        `mask` is bool [T, S] or [B, 1, T, S] (True: attend); None is causal over T = S slots. Every query must see at
        least one key.
        """
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        if mask is None:
            out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups > 1)
            return out.transpose(1, 2).flatten(2)
        # No fused kernel does masked attention of grouped heads: the heads that share a key become rows of one head.
        batch_size, _, num_slots, head_dim = query.shape
        rows = query.view(batch_size, -1, groups, num_slots, head_dim).transpose(2, 3).flatten(2, 3)
        out = scaled_dot_product_attention(rows, key, value, attn_mask=mask.repeat_interleave(groups, dim=-2))
        return out.view(batch_size, -1, num_slots, groups, head_dim).transpose(1, 2).flatten(2)

    def finish(self, x: Tensor, attention_out: Tensor) -> Tensor:
        """Return the layer's output [B, T, H]: both residual branches, no final norm."""
        hidden = x + self.layer.self_attn.o_proj(attention_out)
        finished: Tensor = hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))
        return finished

    def forward(self, embeddings: Tensor, features: Tensor, position_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the predicted next features [B, T, H], of embeddings and features [B, T, H] at positions [B, T].

        `mask` as in `attend`; position_ids, int64, may be [1, T] for all rows.
        """
        x = self.project(embeddings, features)
        query, key, value = self.qkv(x, position_ids)
        return self.finish(x, self.attend(query, key, value, mask))

    def extend(
        self,
        embeddings: Tensor,
        features: Tensor,
        position_ids: Tensor,
        keys: Tensor,
        values: Tensor,
        columns: Tensor | slice,
        mask: Tensor | None,
    ) -> Tensor:
        """Return `forward`'s outputs [B, T, H] of new slots behind cached ones, and write the new keys and values.

        Args:
            keys, values: the caches, [B, kv_heads, S, head_dim].
            columns: where the new slots go in the caches, a slice or int64 [B, T].
            mask: bool [B, 1, T, S]; None: causal, for T = S.
        """
        x = self.project(embeddings, features)
        query, key, value = self.qkv(x, position_ids)
        _write(keys, columns, key)
        _write(values, columns, value)
        return self.finish(x, self.attend(query, keys, values, mask))


def rotate_half(x: Tensor) -> Tensor:
    """Return x with the halves of its last axis swapped and the new first half negated."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _write(cache: Tensor, columns: Tensor | slice, states: Tensor) -> None:
    """Write states [B, heads, T, head_dim] into columns of the cache [B, heads, S, head_dim]."""
    if isinstance(columns, slice):
        cache[:, :, columns] = states
    else:
        rows = torch.arange(len(cache), device=cache.device)[:, None]
        cache[rows, :, columns] = states.transpose(1, 2).to(cache.dtype)
