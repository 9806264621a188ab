"""The network against the formulas of the papers, written out in float64 on the tensors of the file, without a cache.

Sources: EAGLE-2 (arXiv 2406.16858), Llama (arXiv 2302.13971), RoPE (arXiv 2104.09864). The formulas share only the
config with the network. Dims: T slots, H hidden, A attention heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from drafter_files import any_shape, make_network, make_target, network_of_shape, save, save_shape
from torch import Tensor

from taps_ext.checkpoints.files import DrafterFiles, read_drafter_files
from taps_ext.checkpoints.load import network_of
from taps_ext.drafters import EagleConfig, EagleNetwork

LAYER = "layers.0."
NUM_SLOTS = 12  # enough for attention to matter
TOLERANCE = 2e-6  # relative, of float32 sums over a few dozen products against float64


def drafter_output(files: DrafterFiles, config: EagleConfig, embeddings: Tensor, features: Tensor) -> Tensor:
    """The predicted next features, float64 [T, H], of slots 0 .. T - 1; embeddings and features are float64 [T, H]."""
    x = _linear(files, "fc", torch.cat((embeddings, features), dim=-1))
    x = x + _linear(files, LAYER + "self_attn.o_proj", _attention(files, config, x))
    scale = files.tensors[LAYER + "post_attention_layernorm.weight"].double()
    normed = x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * scale
    gate, up = (_linear(files, f"{LAYER}mlp.{part}_proj", normed) for part in ("gate", "up"))
    return x + _linear(files, LAYER + "mlp.down_proj", _activation(config, gate) * up)


def _linear(files: DrafterFiles, name: str, x: Tensor) -> Tensor:
    out = x @ files.tensors[f"{name}.weight"].double().T
    bias = files.tensors.get(f"{name}.bias")
    return out if bias is None else out + bias.double()


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


def error_of(network: EagleNetwork, files: DrafterFiles) -> float:
    """How far a network, in float32, is from the formulas, relative, on a seeded input."""
    generator = torch.Generator().manual_seed(0)
    embeddings, features = torch.randn(2, NUM_SLOTS, network.config.hidden_size, generator=generator)
    expected = drafter_output(files, network.config, embeddings.double(), features.double())
    with torch.no_grad():
        computed: Tensor = network.float()(embeddings[None], features[None], torch.arange(NUM_SLOTS)[None])[0]
    return float((computed.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", range(20))
def test_a_loaded_network_of_every_shape_computes_the_formulas_to_float32(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    network = network_of_shape(any_shape(random), seed).to(random.choice((torch.float32, torch.bfloat16)))
    files = read_drafter_files(save_shape(tmp_path / "d", network))
    assert error_of(network_of(files), files) < TOLERANCE


def wrong_attention(network: EagleNetwork) -> None:
    network.attend = lambda query, key, value, mask: torch.zeros_like(query).transpose(1, 2).flatten(2)  # type: ignore


def wrong_norm(network: EagleNetwork) -> None:
    network.layer.post_attention_layernorm.variance_epsilon = 0.1


def wrong_rotation(network: EagleNetwork) -> None:
    network.rotary._exact = network.rotary._exact * 2


def swapped_halves(network: EagleNetwork) -> None:
    network.project = lambda embeddings, features: network.fc(torch.cat((features, embeddings), -1))  # type: ignore


@pytest.mark.parametrize("change", [wrong_attention, wrong_norm, wrong_rotation, swapped_halves])
def test_a_network_that_computes_something_else_is_noticed(
    change: Callable[[EagleNetwork], None], tmp_path: Path
) -> None:
    target = make_target()
    files = read_drafter_files(save(target, tmp_path / "d", make_network(target)))
    network = network_of(files)
    change(network)
    assert error_of(network, files) > 100 * TOLERANCE
