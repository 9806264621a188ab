"""The drafter's formulas, written out: what any program that reads the file must compute. Slow, in float64, no cache.

Source: EAGLE-2 (arXiv 2406.16858), Llama (arXiv 2302.13971), RoPE (arXiv 2104.09864). Dims: T slots, H hidden,
A attention heads, D size of a head. It shares nothing with `eagle_network.py` but the config.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..drafters.network import EagleConfig
from .files import DrafterFiles

LAYER = "layers.0."


def drafter_output(files: DrafterFiles, config: EagleConfig, embeddings: Tensor, features: Tensor) -> Tensor:
    """The guessed next features, float64 [T, H], of slots 0 .. T - 1; embeddings and features are float64 [T, H]."""
    x = _linear(files, "fc", torch.cat((embeddings, features), dim=-1))
    x = x + _linear(files, LAYER + "self_attn.o_proj", _attention(files, config, x))
    scale = files.tensors[LAYER + "post_attention_layernorm.weight"].read().double()
    normed = x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * scale
    gate, up = (_linear(files, f"{LAYER}mlp.{part}_proj", normed) for part in ("gate", "up"))
    return x + _linear(files, LAYER + "mlp.down_proj", _activation(config, gate) * up)


def _linear(files: DrafterFiles, name: str, x: Tensor) -> Tensor:
    out = x @ files.tensors[f"{name}.weight"].read().double().T
    bias = files.tensors.get(f"{name}.bias")
    return out if bias is None else out + bias.read().double()


def _activation(config: EagleConfig, x: Tensor) -> Tensor:
    from transformers.activations import ACT2FN

    if config.hidden_act == "silu":
        return x / (1 + torch.exp(-x))
    activated: Tensor = ACT2FN[config.hidden_act](x)
    return activated


def _attention(files: DrafterFiles, config: EagleConfig, x: Tensor) -> Tensor:
    """[T, A * D]: every slot reads the slots up to itself; a key-value head serves A / num_key_value_heads queries."""
    query, key, value = (
        _linear(files, f"{LAYER}self_attn.{part}_proj", x).view(len(x), -1, config.head_dim) for part in "qkv"
    )
    query, key = (_rotated(part, config) for part in (query, key))
    group = config.num_attention_heads // config.num_key_value_heads
    future = torch.ones(len(x), len(x)).triu(1).bool()
    heads = []
    for head in range(config.num_attention_heads):
        scores = query[:, head] @ key[:, head // group].T / sqrt(config.head_dim)
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, head // group])
    return torch.cat(heads, dim=-1)


def _rotated(x: Tensor, config: EagleConfig) -> Tensor:
    """[T, A, D]: the pair (i, i + D / 2) of slot t is turned by t times its frequency."""
    frequencies, scale = _rope(config)
    angles = torch.arange(len(x)).double()[:, None, None] * frequencies
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.full_like(angles, scale), angles)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def _rope(config: EagleConfig) -> tuple[Tensor, float]:
    """The frequency of each pair, float64 [D / 2], and the factor that goes with it."""
    plain = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    scaling: dict[str, Any] = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "default":
        return plain, 1.0
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"], 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # the recipes of llama3 and yarn are long

    frequencies, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config.as_llama(), torch.device("cpu"))
    return frequencies.double(), float(scale)
