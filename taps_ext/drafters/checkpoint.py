"""Drafter checkpoints: the published EAGLE-2 and HASS formats as they are found, loaded against a target, and saved.

What a file holds decides, not what its config claims: `fc.bias` and the q/k/v biases exist when their tensors do, the
embedding may be inside or not. Everything else that is unexpected or missing is an error that lists it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_files import DrafterFiles, read_folder, write_folder
from .eagle import EagleDrafter, compute_dtype_and_device
from .eagle_network import EagleConfig, EagleNetwork, rope_of

__all__ = ["average_drafters", "load_drafter", "load_drafters", "load_network", "save_drafter"]

PathOrId = str | os.PathLike[str]

EMBEDDING = "embed_tokens.weight"
LM_HEADS = ("lm_head.weight", "head.weight")  # some trainers save the target's frozen lm_head with the drafter
COMPARED_ROWS = 8192  # of two embeddings at a time, to bound the memory


@dataclass(frozen=True)
class _Target:
    """What a drafter needs of a target."""

    embedding: nn.Module
    lm_head: nn.Module
    config: Any


def load_drafters(paths: Mapping[str, PathOrId], target: Any) -> dict[str, EagleDrafter]:
    """A drafter for each name, in the order given (which breaks ties between drafters); see `load_drafter`."""
    return {name: load_drafter(path, target, name) for name, path in paths.items()}


def load_drafter(path_or_id: PathOrId, target: Any, name: str | None = None) -> EagleDrafter:
    """The drafter in a folder or hub repository, sharing the target's embedding and lm_head.

    Args:
        path_or_id: a folder with config.json and model.safetensors or pytorch_model.bin (also sharded, also the state
            folder of accelerate), or a hub id. Code in it is never run.
        target: a transformers model with an lm_head, or a `TargetModel`.
        name: how stats and compositions call it; by default the last part of `path_or_id`.

    Raises ValueError or FileNotFoundError, in one sentence, when the checkpoint does not fit the target.
    """
    part = _target_part(target)
    files = read_folder(path_or_id)
    network = _network(files, part)
    _warn_of_foreign(files, EMBEDDING, "embedding", part.embedding)
    for key in LM_HEADS:
        _warn_of_foreign(files, key, "lm_head", part.lm_head)
    dtype, device = compute_dtype_and_device(part.lm_head, part.embedding)
    network = network.to(device, dtype).eval().requires_grad_(False)
    return EagleDrafter(network, part.embedding, part.lm_head, name or Path(path_or_id).resolve().name)


def load_network(path_or_id: PathOrId) -> EagleNetwork:
    """The trainable network of a checkpoint, in the dtype of its file and without a target: to go on training it."""
    return _network(read_folder(path_or_id), None)


def save_drafter(
    network: EagleNetwork,
    folder: PathOrId,
    *,
    embedding: nn.Module | Tensor,
    target_config: Any,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """The folder written: exactly the published keys, the embedding included, in the network's dtype.

    Args:
        embedding: the target's, a module or its weight [V, H].
        target_config: of the target; it gives special tokens and the context length.
        metadata: provenance, JSON values (algorithm, target, domain, trained length, ...); kept in config.json under
            `taps` and in the header of model.safetensors.
    """
    weight = embedding if isinstance(embedding, Tensor) else embedding.weight
    assert isinstance(weight, Tensor)
    config = network.config
    if weight.shape != (config.vocab_size, config.hidden_size):
        raise ValueError(
            f"the embedding must be {[config.vocab_size, config.hidden_size]}, got {list(weight.shape)}; "
            f"save a drafter with the embedding of its own target"
        )
    dtype = network.fc.weight.dtype
    tensors = {EMBEDDING: weight.detach().to(dtype), **network.state_dict()}
    metadata = dict(metadata or {})
    return write_folder(folder, _published_config(config, dtype, target_config, metadata), tensors, metadata)


def average_drafters(folders: Sequence[PathOrId], weights: Sequence[float] | None, output: PathOrId) -> Path:
    """The folder of the weighted average of several checkpoints, computed in float32; tensors that are equal stay so.

    `weights` must sum to 1 (None: equal weights). Differing shapes, keys or rope raise ValueError.
    """
    weights = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    if len(folders) < 2 or len(weights) != len(folders) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"averaging takes at least 2 drafters and as many weights that sum to 1, "
            f"got {len(folders)} drafters and the weights {weights}"
        )
    inputs = [read_folder(folder) for folder in folders]
    config = _shared_config(inputs)
    keys = [key for key in inputs[0].tensors if key not in LM_HEADS]
    tensors = {key: _average([files.tensors[key] for files in inputs], weights) for key in keys}
    names = [Path(folder).resolve().name for folder in folders]
    parents = [
        {"name": name, **(files.config or {}).get("taps", {})} for name, files in zip(names, inputs, strict=True)
    ]
    metadata = {"algorithm": "average", "weights": weights, "parents": parents}
    first_config = SimpleNamespace(**(inputs[0].config or {}))
    published = _published_config(config, tensors["fc.weight"].dtype, first_config, metadata)
    return write_folder(output, published, tensors, metadata)


def _shared_config(inputs: list[DrafterFiles]) -> EagleConfig:
    """The config that all inputs have (the context length aside: the longest); ValueError names what differs."""
    configs = [_eagle_config(files, None) for files in inputs]
    longest = max(config.max_position_embeddings for config in configs)
    first, *others = (replace(config, max_position_embeddings=longest) for config in configs)
    _check_tensors(inputs[0], first)
    for files, config in zip(inputs[1:], others, strict=True):
        _check_tensors(files, config)
        pair = f"{files.folder} and {inputs[0].folder}"
        names = [field.name for field in fields(config) if getattr(config, field.name) != getattr(first, field.name)]
        if names:
            raise ValueError(f"{pair} differ in {', '.join(names)}; only drafters of one shape can be averaged")
        if keys := sorted((files.tensors.keys() ^ inputs[0].tensors.keys()) - {*LM_HEADS}):
            raise ValueError(f"{pair} do not both hold {', '.join(keys)}; only drafters of one shape can be averaged")
    return first


def _average(tensors: list[Tensor], weights: Sequence[float]) -> Tensor:
    first = tensors[0]
    if all(first.dtype == other.dtype and torch.equal(first, other) for other in tensors[1:]):
        return first
    total = sum((weight * tensor.float() for weight, tensor in zip(weights, tensors, strict=True)), torch.zeros(()))
    return total.to(first.dtype)


def _target_part(target: Any) -> _Target:
    model: Any = target if hasattr(target, "get_output_embeddings") else getattr(target, "model", None)
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"the target must be a transformers model or a TargetModel, got {type(target).__name__}")
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or lm_head is None:
        raise ValueError(f"the target {type(model).__name__} has no lm_head; load it with AutoModelForCausalLM")
    config = model.config
    return _Target(embedding, lm_head, config.get_text_config() if hasattr(config, "get_text_config") else config)


def _network(files: DrafterFiles, target: _Target | None) -> EagleNetwork:
    """The network of the files, checked against its own shapes and, when there is one, against the target."""
    config = _eagle_config(files, target)
    if target is not None:
        _check_fits(files, config, target.config)
    _check_tensors(files, config)
    with torch.device("meta"):
        network = EagleNetwork(config)
    network.load_state_dict({key: files.tensors[key] for key in network.state_dict()}, assign=True)
    return network


def _eagle_config(files: DrafterFiles, target: _Target | None) -> EagleConfig:
    """The network's shape: config.json for the sizes, the tensors present for the biases."""
    config, tensors = files.config, files.tensors
    biases = {"fc_bias": "fc.bias" in tensors, "qkv_bias": "layers.0.self_attn.q_proj.bias" in tensors}
    if config is None:
        return _config_without_file(files, target, biases)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in sizes if not isinstance(config.get(name), int)]:
        raise ValueError(f"config.json in {files.folder} does not give {', '.join(missing)}")
    heads = config["num_attention_heads"]
    theta, scaling = rope_of(config)
    return EagleConfig(
        **{name: config[name] for name in sizes},
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=10000.0 if theta is None else theta,
        rope_scaling=scaling,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        hidden_act=config.get("hidden_act", "silu"),
        **biases,
    )


def _config_without_file(files: DrafterFiles, target: _Target | None, biases: dict[str, bool]) -> EagleConfig:
    """Training states come without config.json: the target's own shape, with the drafter's MLP width."""
    gate = files.tensors.get("layers.0.mlp.gate_proj.weight")
    if target is None or gate is None:
        raise FileNotFoundError(f"no config.json in {files.folder}; copy the one of the drafter's training there")
    warnings.warn(
        f"no config.json in {files.folder}: heads, rope and norm are taken from the target; "
        f"copy the one of the drafter's training there",
        stacklevel=2,
    )
    return EagleConfig.for_target(target.config, intermediate_size=gate.shape[0], **biases)


def _check_fits(files: DrafterFiles, config: EagleConfig, target: Any) -> None:
    """The drafter belongs to this target: vocabulary, hidden size, rope."""
    if config.vocab_size != target.vocab_size:
        raise ValueError(
            f"drafter vocabulary {config.vocab_size} differs from target vocabulary {target.vocab_size}; "
            f"use a drafter trained on this target's tokenizer"
        )
    if config.hidden_size != target.hidden_size:
        raise ValueError(
            f"drafter hidden size {config.hidden_size} differs from target hidden size {target.hidden_size}; "
            f"use a drafter trained on this target's features"
        )
    theta, scaling = rope_of(target)
    if theta is not None and config.rope_theta != theta:
        raise ValueError(
            f"drafter rope theta {config.rope_theta:g} differs from target rope theta {theta:g}; "
            f"use a drafter of this target, or correct rope_theta in {files.folder / 'config.json'}"
        )
    if (config.rope_scaling or {}).get("rope_type") != (scaling or {}).get("rope_type"):
        # No error: published drafters of targets with scaled rope were trained without it, and work.
        warnings.warn(
            f"drafter rope scaling {config.rope_scaling} differs from target rope scaling {scaling}; "
            f"the drafter keeps the one in its config.json",
            stacklevel=2,
        )


def _check_tensors(files: DrafterFiles, config: EagleConfig) -> None:
    """Exactly the network's tensors (the embedding and lm_head aside), each of its shape, all numbers finite."""
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in EagleNetwork(config).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in files.tensors.items() if key not in LM_HEADS}
    if found.keys() >= {"d2t"} or any(key.startswith("midlayer.") for key in found):
        raise ValueError(f"{files.folder} holds an EAGLE-3 drafter; only EAGLE-2 and HASS drafters are supported")
    expected_or_embedding = {**expected, EMBEDDING: (config.vocab_size, config.hidden_size)}
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected_or_embedding.keys())
    if missing or unexpected:
        raise ValueError(
            f"{files.folder} is not an EAGLE-2 drafter: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(unexpected) or 'nothing'}"
        )
    for key, shape in found.items():
        if shape != expected_or_embedding[key]:
            raise ValueError(
                f"{key} in {files.folder} must be {list(expected_or_embedding[key])} by its config, got {list(shape)}"
            )
    for key in expected:
        if not bool(torch.isfinite(files.tensors[key]).all()):
            raise ValueError(f"{key} in {files.folder} holds NaN or infinite values; the checkpoint is broken")


def _warn_of_foreign(files: DrafterFiles, key: str, what: str, module: nn.Module) -> None:
    """Warn when the checkpoint carries another embedding or lm_head than the target's, which is the one used."""
    held, own = files.tensors.get(key), getattr(module, "weight", None)
    if held is None or own is None or own.device.type == "meta" or not own.is_floating_point():
        return  # nothing to compare: quantised or offloaded weights
    own = own.detach()
    same = held.shape == own.shape and all(
        torch.allclose(a.to(own.device, own.dtype), b, rtol=1e-2, atol=1e-4)  # the file may be rounded to float16
        for a, b in zip(torch.split(held, COMPARED_ROWS), torch.split(own, COMPARED_ROWS), strict=True)
    )
    if not same:
        warnings.warn(
            f"the {what} in {files.folder} differs from the target's, which is used instead; "
            f"the drafter may have been trained for another target",
            stacklevel=3,
        )


def _published_config(
    config: EagleConfig, dtype: torch.dtype, target_config: Any, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json in both spellings, written by hand: transformers 5 drops the top-level rope_theta and torch_dtype,
    and readers of the published format then fall back to a theta of 10000 without a word.
    """
    scaling = config.rope_scaling
    legacy_scaling = scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        legacy_scaling = {"type": "linear", "factor": scaling["factor"]}  # the only form that EAGLE's reader takes
    dtype_name = str(dtype).removeprefix("torch.")
    target_length = getattr(target_config, "max_position_embeddings", None) or 0
    published = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": max(config.max_position_embeddings, target_length),
        "rope_theta": config.rope_theta,
        "rope_scaling": legacy_scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
        "bias": False,
        "attention_bias": config.qkv_bias,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "transformers_version": "4.28.1",
    }
    if config.fc_bias:
        del published["bias"]  # readers of the published format then assume fc.bias, rightly
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        published["head_dim"] = config.head_dim
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        published[name] = getattr(target_config, name, None)
    return {**published, "taps": dict(metadata)}
