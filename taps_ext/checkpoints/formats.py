"""What the files of a drafter mean: config.json and tensors to a network's shape, and back to the published form.

What a file holds decides, not what its config claims: `fc.bias` and the q/k/v biases exist when their tensors do, the
embedding may be inside or not. Everything else that is unexpected or missing is an error that lists it.
"""

from __future__ import annotations

import warnings
from math import isfinite
from typing import Any

import torch

from ..drafters.network import EagleConfig, EagleNetwork, rope_of
from .files import DrafterFiles

EMBEDDING = "embed_tokens.weight"
FC_BIAS = "fc.bias"
QKV_BIASES = tuple(f"layers.0.self_attn.{part}_proj.bias" for part in "qkv")
LM_HEADS = ("lm_head.weight", "head.weight")  # some trainers save the target's frozen lm_head with the drafter
ARCHITECTURE = "LlamaForCausalLM"
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
CHECKED_ROWS = 8192  # of a tensor at a time, to bound the memory
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def network_config(files: DrafterFiles, target_config: Any | None) -> EagleConfig:
    """The network's shape: config.json for the sizes, the tensors present for the biases."""
    config, tensors = files.config, files.tensors
    biases = {"fc_bias": FC_BIAS in tensors, "qkv_bias": QKV_BIASES[0] in tensors}
    if config is None:
        return _config_without_file(files, target_config, biases)
    _check_values(files, config)
    heads = config["num_attention_heads"]
    theta, scaling = rope_of(config)
    try:
        return EagleConfig(
            **{name: config[name] for name in SIZES},
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=10000.0 if theta is None else theta,
            rope_scaling=scaling,
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            hidden_act=config.get("hidden_act", "silu"),
            **biases,
        )
    except ValueError as error:
        raise ValueError(f"config.json in {files.folder}: {error}") from error


def published_config(config: EagleConfig, dtype: torch.dtype, target_config: Any) -> dict[str, Any]:
    """config.json in both spellings, written by hand: transformers 5 drops the top-level rope_theta and torch_dtype,
    and readers of the published format then fall back to a theta of 10000 without a word.

    `target_config` gives special tokens and the context length: the target's, or what is known of it; a dict or a
    transformers config.
    """

    def of_target(name: str) -> Any:
        return target_config.get(name) if isinstance(target_config, dict) else getattr(target_config, name, None)

    scaling = config.rope_scaling
    legacy_scaling = scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        # The only form that EAGLE's reader takes, and only with a float.
        legacy_scaling = {"type": "linear", "factor": float(scaling["factor"])}
    dtype_name = str(dtype).removeprefix("torch.")
    published = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": max(config.max_position_embeddings, of_target("max_position_embeddings") or 0),
        "rope_theta": config.rope_theta,
        "rope_scaling": legacy_scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
        "bias": False,
        "attention_bias": False,  # of all four projections; the drafter's own are of three: qkv_bias
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "transformers_version": "4.28.1",
    }
    if config.fc_bias:
        del published["bias"]  # readers of the published format then assume fc.bias, rightly
    if config.qkv_bias:
        published["qkv_bias"] = True
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        published["head_dim"] = config.head_dim
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        published[name] = of_target(name)
    return published


def check_fits(files: DrafterFiles, config: EagleConfig, target_config: Any) -> None:
    """The drafter belongs to this target: vocabulary, hidden size, rope. Raises ValueError, or warns."""
    if config.vocab_size != target_config.vocab_size:
        raise ValueError(
            f"drafter vocabulary {config.vocab_size} differs from target vocabulary {target_config.vocab_size}; "
            f"use a drafter trained on this target's tokenizer"
        )
    if config.hidden_size != target_config.hidden_size:
        raise ValueError(
            f"drafter hidden size {config.hidden_size} differs from target hidden size {target_config.hidden_size}; "
            f"use a drafter trained on this target's features"
        )
    theta, scaling = rope_of(target_config)
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


def check_tensors(files: DrafterFiles, config: EagleConfig) -> None:
    """Exactly the network's tensors (the embedding and lm_head aside), each of its shape, all numbers finite."""
    check_names(files, config)
    check_shapes(files, config)
    check_finite(files, [name for name in files.tensors if name not in (EMBEDDING, *LM_HEADS)])


def check_names(files: DrafterFiles, config: EagleConfig) -> None:
    """No tensor of the network is missing and nothing else is there. Raises ValueError."""
    found, expected = files.tensors.keys() - {EMBEDDING, *LM_HEADS}, network_shapes(files, config).keys()
    if "d2t" in found or any(name.startswith("midlayer.") for name in found):
        raise ValueError(f"{files.folder} holds an EAGLE-3 drafter; only EAGLE-2 and HASS drafters are supported")
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        raise ValueError(
            f"{files.folder} is not an EAGLE-2 drafter: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(unexpected) or 'nothing'}"
        )


def check_shapes(files: DrafterFiles, config: EagleConfig) -> None:
    """Every tensor has the shape that its config says, and is of floats. Raises ValueError."""
    expected = {**network_shapes(files, config), EMBEDDING: (config.vocab_size, config.hidden_size)}
    for name, tensor in files.tensors.items():
        if name not in LM_HEADS and tensor.shape != expected[name]:
            raise ValueError(
                f"{name} in {files.folder} must be {list(expected[name])} by its config, got {list(tensor.shape)}"
            )
        if not tensor.dtype.is_floating_point:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} in {files.folder} is of {dtype}; quantised drafters are not supported")


def check_finite(files: DrafterFiles, names: list[str]) -> None:
    """No NaN and no infinite value is in these tensors. Raises ValueError."""
    for name in names:
        if not all(bool(torch.isfinite(part).all()) for part in files.tensors[name].read().split(CHECKED_ROWS)):
            raise ValueError(f"{name} in {files.folder} holds NaN or infinite values; the checkpoint is broken")


def network_shapes(files: DrafterFiles, config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """The network's tensors by name, without the embedding."""
    try:
        with torch.device("meta"):
            network = EagleNetwork(config)
    except Exception as error:  # transformers says in many ways that a rope or an activation cannot be
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"config.json in {files.folder} describes no network that can be built ({reason})") from error
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _check_values(files: DrafterFiles, config: dict[str, Any]) -> None:
    """The values of config.json are of their types: it may be from anywhere."""
    if missing := [name for name in SIZES if not isinstance(config.get(name), int)]:
        raise ValueError(f"config.json in {files.folder} does not give {', '.join(missing)}")

    def wrong(name: str, expected: str) -> ValueError:
        return ValueError(f"{name} in {files.folder / 'config.json'} must be {expected}, got {config[name]!r}")

    for name in (*SIZES, *OPTIONAL_SIZES):
        value = config.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise wrong(name, "a positive whole number")
    for name in ("rms_norm_eps", "rope_theta"):
        value = config.get(name, 1.0)
        if value is not None and not (isinstance(value, (int, float)) and isfinite(value) and value > 0):
            raise wrong(name, "a positive number")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise wrong(name, "an object or null")


def _config_without_file(files: DrafterFiles, target_config: Any | None, biases: dict[str, bool]) -> EagleConfig:
    """Training states come without config.json: the target's own shape, with the drafter's MLP width."""
    gate = files.tensors.get("layers.0.mlp.gate_proj.weight")
    if target_config is None or gate is None:
        raise FileNotFoundError(
            f"no config.json in {files.folder}; copy the one of the drafter's training there, or name the target"
        )
    warnings.warn(
        f"no config.json in {files.folder}: heads, rope and norm are taken from the target; "
        f"copy the one of the drafter's training there",
        stacklevel=2,
    )
    return EagleConfig.for_target(target_config, intermediate_size=gate.shape[0], **biases)
