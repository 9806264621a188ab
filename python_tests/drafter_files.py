"""Drafters' folders in every form that is found in the wild, of one small target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from taps_ext.checkpoints import save_drafter
from taps_ext.drafters import EagleConfig, EagleNetwork

V, H = 61, 32
PUBLISHED_KEYS = {
    "embed_tokens.weight",
    "fc.weight",
    *(f"layers.0.self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "layers.0.post_attention_layernorm.weight",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Tensors = dict[str, Tensor]


def make_target(**overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": H,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": V,
        "rope_theta": 500000.0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).eval()


def make_network(target: LlamaForCausalLM, seed: int = 1, **overrides: Any) -> EagleNetwork:
    torch.manual_seed(seed)
    return EagleNetwork(EagleConfig.for_target(target.config, **overrides))


def published_tensors(target: LlamaForCausalLM, network: EagleNetwork) -> Tensors:
    embedding = target.get_input_embeddings().weight.detach().clone()
    return {"embed_tokens.weight": embedding, **{key: value.clone() for key, value in network.state_dict().items()}}


def published_config(**overrides: Any) -> dict[str, Any]:
    """A config.json as the published repositories have it: 4.x spellings, no head_dim, `bias` false."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": V,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "torch_dtype": "float16",
        "bias": False,
        "transformers_version": "4.28.1",
    }
    return {key: value for key, value in {**config, **overrides}.items() if value is not None}


def write(
    folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, name: str = "model.safetensors"
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or published_config()))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    return folder


def write_sharded(folder: Path, tensors: Tensors, name: str) -> Path:
    """Two shards and their index, as transformers writes them."""
    stem, suffix = name.rsplit(".", 1)
    shards = {key: f"{stem}-0000{i % 2 + 1}-of-00002.{suffix}" for i, key in enumerate(tensors)}
    for shard in set(shards.values()):
        write(folder, {key: tensors[key] for key, home in shards.items() if home == shard}, name=shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + key: value for key, value in tensors.items()}


def without(tensors: Tensors, *keys: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key not in keys}


def accelerate_state(folder: Path, tensors: Tensors) -> Path:
    torch.save({"weight": torch.zeros(V, H)}, write(folder, tensors, name="pytorch_model.bin") / "pytorch_model_1.bin")
    (folder / "optimizer.bin").write_bytes(b"not read")
    return folder


FORMS: dict[str, Callable[[Path, Tensors], Path]] = {
    "safetensors": lambda folder, tensors: write(folder, tensors),
    "bin": lambda folder, tensors: write(folder, tensors, name="pytorch_model.bin"),
    "sharded safetensors": lambda folder, tensors: write_sharded(folder, tensors, "model.safetensors"),
    "sharded bin": lambda folder, tensors: write_sharded(folder, tensors, "pytorch_model.bin"),
    "no embedding": lambda folder, tensors: write(folder, without(tensors, "embed_tokens.weight")),
    "accelerate state": accelerate_state,
    "module. prefix": lambda folder, tensors: write(folder, prefixed(tensors, "module.")),
    "ea_layer. prefix": lambda folder, tensors: write(folder, prefixed(tensors, "model.ea_layer.")),
    "rotary buffers": lambda folder, tensors: write(
        folder, {**tensors, "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, name="pytorch_model.bin"
    ),
    "bias claimed, none inside": lambda folder, tensors: write(folder, tensors, published_config(bias=True)),
    "no bias key": lambda folder, tensors: write(folder, tensors, published_config(bias=None)),
    "both files": lambda folder, tensors: write(
        write(folder, {"junk": torch.zeros(1)}, name="pytorch_model.bin"), tensors
    ),
    "5.x spellings": lambda folder, tensors: write(
        folder,
        tensors,
        published_config(rope_theta=None, torch_dtype=None, dtype="float16", rope_parameters={"rope_theta": 500000.0}),
    ),
}


def save(target: LlamaForCausalLM, folder: Path, network: EagleNetwork, metadata: dict[str, Any] | None = None) -> Path:
    """The canonical folder of a network of this target."""
    embedding = target.get_input_embeddings()
    return save_drafter(network, folder, embedding=embedding, target_config=target.config, metadata=metadata)


def stored(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def files_in(folder: Path) -> dict[str, bytes]:
    """All that lies below a folder, hidden files too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ROPES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": LLAMA3_ROPE,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def any_shape(random: Random, **fixed: Any) -> EagleConfig:
    """A small network of any shape that the format has."""
    head_dim, kv_heads, groups = random.choice((4, 8)), random.choice((1, 2)), random.choice((1, 2, 3))
    heads = kv_heads * groups
    hidden = heads * (head_dim if random.random() < 0.7 else 6)
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": random.choice((5, 16, 24)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": random.choice((7, 33)),
        "rms_norm_eps": random.choice((1e-5, 1e-6)),
        "rope_theta": random.choice((10000.0, 500000.0)),
        "rope_scaling": random.choice(tuple(ROPES.values())),
        "max_position_embeddings": random.choice((256, 4096)),
        "fc_bias": random.random() < 0.3,
        "qkv_bias": random.random() < 0.3,
    }
    return EagleConfig(**{**shape, **fixed})


def network_of_shape(config: EagleConfig, seed: int) -> EagleNetwork:
    """With weights that are all different from zero and one."""
    torch.manual_seed(seed)
    network = EagleNetwork(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def save_shape(folder: Path, network: EagleNetwork, metadata: dict[str, Any] | None = None) -> Path:
    """The canonical folder, with an embedding that depends on the shape alone."""
    config = network.config
    generator = torch.Generator().manual_seed(config.vocab_size)
    embedding = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    known = {"max_position_embeddings": config.max_position_embeddings, "bos_token_id": 1, "eos_token_id": [2, 3]}
    return save_drafter(network, folder, embedding=embedding, target_config=known, metadata=metadata)
