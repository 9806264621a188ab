"""Formats of a drafter's files: config.json and tensors to a network's shape and back, and calibration.json.

The tensors decide, not the config: `fc.bias` and the q, k and v biases exist when their tensors do, and the embedding
may be inside or not. Everything else that is unexpected or missing is an error that lists it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from ..drafters.coupling import Calibration
from ..drafters.network import EagleConfig, EagleNetwork, rope_of
from ..sampling import warn
from .files import CALIBRATION_FILE, DrafterFiles, write_text

EMBEDDING = "embed_tokens.weight"
FC_BIAS = "fc.bias"
QKV_BIASES = tuple(f"layers.0.self_attn.{part}_proj.bias" for part in "qkv")
LM_HEADS = ("lm_head.weight", "head.weight")  # some trainers save the target's frozen lm_head with the drafter
ARCHITECTURE = "LlamaForCausalLM"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN_DTYPES = (torch.float64, *DTYPES.values())  # others are quantised
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
CHECKED_ROWS = 8192  # of a tensor at a time, to bound the memory
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
CALIBRATION_FORMAT = 1


def network_config(files: DrafterFiles, target_config: Any | None) -> EagleConfig:
    """Return the network's shape: the sizes from config.json, the biases from the tensors that are present."""
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
    """Return config.json in the spellings of transformers 4 and 5.

    transformers 5 leaves out the top-level rope_theta and torch_dtype, and readers of the published format then use a
    theta of 10000 without a warning. `target_config`, a dict or a transformers config, gives the special tokens and the
    context length.
    """

    def of_target(name: str) -> Any:
        return target_config.get(name) if isinstance(target_config, dict) else getattr(target_config, name, None)

    scaling = config.rope_scaling
    legacy_scaling = scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        # The only form that EAGLE's reader takes, and only with a float.
        legacy_scaling = {"type": "linear", "factor": float(scaling["factor"])}
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
        "torch_dtype": dtype_name(dtype),
        "dtype": dtype_name(dtype),
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
    """Raise ValueError unless vocabulary, hidden size and rope theta are the target's; warn of other rope scaling."""
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
        warn(
            f"drafter rope scaling {config.rope_scaling} differs from target rope scaling {scaling}; "
            f"the drafter keeps the one in its config.json"
        )


def check_tensors(files: DrafterFiles, config: EagleConfig) -> None:
    """Raise ValueError unless exactly the network's tensors are there, in its shapes, with finite numbers.

    The embedding and an lm_head may be there too.
    """
    check_names(files, config)
    check_shapes(files, config)
    check_finite(files, [name for name in files.tensors if name not in (EMBEDDING, *LM_HEADS)])


def check_names(files: DrafterFiles, config: EagleConfig) -> None:
    """Raise ValueError if a tensor of the network is missing, or if there is one that the network does not have."""
    present, expected = files.tensors.keys() - {EMBEDDING, *LM_HEADS}, network_shapes(files, config).keys()
    if "d2t" in present or any(name.startswith("midlayer.") for name in present):
        raise ValueError(f"{files.folder} holds an EAGLE-3 drafter; only EAGLE-2 and HASS drafters are supported")
    missing, unexpected = sorted(expected - present), sorted(present - expected)
    if missing or unexpected:
        raise ValueError(
            f"{files.folder} is not an EAGLE-2 drafter: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(unexpected) or 'nothing'}"
        )


def check_shapes(files: DrafterFiles, config: EagleConfig) -> None:
    """Raise ValueError unless every tensor has the shape that the config gives it, and holds floats."""
    expected = {**network_shapes(files, config), EMBEDDING: (config.vocab_size, config.hidden_size)}
    for name, tensor in files.tensors.items():
        if name not in LM_HEADS and tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} in {files.folder} must be {list(expected[name])} by its config, got {list(tensor.shape)}"
            )
        if tensor.dtype not in PLAIN_DTYPES:
            raise ValueError(
                f"{name} in {files.folder} is of {dtype_name(tensor.dtype)}; quantised drafters are not supported"
            )


def check_finite(files: DrafterFiles, names: list[str]) -> None:
    """Raise ValueError if one of these tensors holds NaN or an infinite value."""
    for name in names:
        if not all(bool(torch.isfinite(part).all()) for part in files.tensors[name].split(CHECKED_ROWS)):
            raise ValueError(f"{name} in {files.folder} holds NaN or infinite values; the checkpoint is broken")


def network_shapes(files: DrafterFiles, config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of the network's tensors by name, without the embedding."""
    try:
        with torch.device("meta"):
            network = EagleNetwork(config)
    except Exception as error:  # transformers raises anything for an unknown rope or activation
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"config.json in {files.folder} describes no network that can be built ({reason})") from error
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class CalibrationRecord:
    """A calibration and how it was made: the content of calibration.json."""

    calibration: Calibration
    facts: Mapping[str, Any]  # JSON values: target, data, seed, the gain; nothing that differs from run to run

    def text(self, digest: str | None) -> str:
        """Return the file's content; `digest` is the SHA-256 of its drafter's weights, None where they have none."""
        content = {"format": CALIBRATION_FORMAT, **self.calibration.to_dict(), "drafter": digest, **self.facts}
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"


def read_calibration(folder: Path, digest: str | None) -> Calibration | None:
    """Return the calibration in a drafter's directory, None where there is none.

    `digest` is the SHA-256 of the drafter's weights, where it is known. Raise ValueError in one sentence for a damaged
    file and for the calibration of other weights.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != CALIBRATION_FORMAT:
            raise ValueError(f"its format is not {CALIBRATION_FORMAT}")
        calibration = Calibration.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); calibrate the drafter anew, or delete the file") from error
    drafter = content.get("drafter")
    if digest is not None and drafter is not None and drafter != digest:
        raise ValueError(f"{path} belongs to other weights; calibrate the drafter anew, or delete the file")
    return calibration


def write_calibration(folder: Path, record: CalibrationRecord, digest: str | None) -> Path:
    """Write calibration.json into a drafter's directory, whole or not at all, and return its path."""
    path = folder / CALIBRATION_FILE
    write_text(path, record.text(digest))
    return path


def _check_values(files: DrafterFiles, config: dict[str, Any]) -> None:
    """Raise ValueError unless the values of config.json have the types that the format gives them."""
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
    """Return the target's own shape with the drafter's MLP width, for training states, which have no config.json."""
    gate = files.tensors.get("layers.0.mlp.gate_proj.weight")
    if target_config is None or gate is None:
        raise FileNotFoundError(
            f"no config.json in {files.folder}; copy the one of the drafter's training there, or name the target"
        )
    warn(
        f"no config.json in {files.folder}: heads, rope and norm are taken from the target; "
        f"copy the one of the drafter's training there"
    )
    return EagleConfig.for_target(target_config, intermediate_size=gate.shape[0], **biases)
