"""Formats of a drafter's files: config.json and tensors to a network's shape and back, and calibration.json.

The tensors decide, not the config: `fc.bias` and the q, k and v biases exist when their tensors do, and the embedding
and the two maps of a draft vocabulary may be inside or not. Everything else that is unexpected or missing is an error
that lists it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

import torch

from ..drafters.base import DraftVocabulary
from ..drafters.coupling import Calibration
from ..drafters.network import FEATURE_SIZES, EagleConfig, EagleNetwork, rope_of, size_of
from ..sampling import warn
from .files import CALIBRATION_FILE, CONFIG_FILE, DrafterFiles, write_text

EMBEDDING = "embed_tokens.weight"
FC_BIAS = "fc.bias"
QKV_BIASES = tuple(f"layers.0.self_attn.{part}_proj.bias" for part in "qkv")
LM_HEADS = ("lm_head.weight", "head.weight")  # some trainers save the target's frozen lm_head with the drafter
OFFSETS, MASK = VOCABULARY = ("d2t", "t2d")  # a draft vocabulary, under EAGLE-3's names
OPTIONAL = {EMBEDDING, *LM_HEADS, *VOCABULARY}
EAGLE3_NAMES = ("midlayer.", "layers.0.hidden_norm.")  # what names of its tensors begin with, and ours do not
ARCHITECTURE = "LlamaForCausalLM"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN_DTYPES = (torch.float64, *DTYPES.values())  # others are quantised
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
DRAFT_SIZE = "draft_vocab_size"
VALUES = (  # of config.json: names, types, and what is allowed
    (
        (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", DRAFT_SIZE),
        (int,),
        "a positive whole number",
    ),
    (("rms_norm_eps", "rope_theta"), (int, float), "a positive number"),
    (("rope_scaling", "rope_parameters"), (dict,), "an object or null"),
)
CHECKED_ROWS = 8192  # of a tensor at a time, to bound the memory
CALIBRATION_FORMAT = 1


def network_config(files: DrafterFiles, target_config: Any | None) -> EagleConfig:
    """Return the network's shape: the sizes from config.json, the biases from the tensors that are present."""
    config, tensors = files.config, files.tensors
    biases = {"fc_bias": FC_BIAS in tensors, "qkv_bias": QKV_BIASES[0] in tensors}
    if config is None:
        return _config_without_file(files, target_config, biases)
    given = {name: value for name, value in config.items() if value is not None}
    if missing := [name for name in SIZES if name not in given]:
        raise ValueError(f"config.json in {files.folder} does not give {', '.join(missing)}")
    for names, types, allowed in VALUES:
        for name, value in given.items():
            if name in names and not (type(value) in types and (types == (dict,) or 0 < value < inf)):
                raise ValueError(f"{name} in {files.folder / CONFIG_FILE} must be {allowed}, got {value!r}")
    heads = given["num_attention_heads"]
    defaults = {"num_key_value_heads": heads, "head_dim": given["hidden_size"] // heads, "rms_norm_eps": 1e-6}
    theta, scaling = rope_of(config)
    rope = {"rope_theta": 10000.0 if theta is None else theta, "rope_scaling": scaling}
    own = {field.name: given[field.name] for field in fields(EagleConfig) if field.name in given}
    try:
        return EagleConfig(**{**defaults, **own, **rope, **biases})
    except ValueError as error:
        raise ValueError(f"config.json in {files.folder}: {error}") from error


def published_config(
    config: EagleConfig, dtype: torch.dtype, target_config: Any, vocabulary: DraftVocabulary | None = None
) -> dict[str, Any]:
    """Return config.json in the spellings of transformers 4 and 5.

    transformers 5 leaves out the top-level rope_theta and torch_dtype, and readers of the published format then use a
    theta of 10000 without a warning. `target_config`, a dict or a transformers config, gives the special tokens and the
    context length.
    """

    def of_target(name: str) -> Any:
        return target_config.get(name) if isinstance(target_config, dict) else getattr(target_config, name, None)

    scaling = legacy_scaling = config.rope_scaling
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
        **({} if config.fc_bias else {"bias": False}),  # without the key readers assume fc.bias, rightly
        "attention_bias": False,  # of all four projections; the drafter's own are of three: qkv_bias
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "transformers_version": "4.28.1",
    }
    if config.qkv_bias:
        published["qkv_bias"] = True
    if vocabulary is not None:
        published[DRAFT_SIZE] = len(vocabulary)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        published["head_dim"] = config.head_dim
    return published | {name: of_target(name) for name in SPECIAL_TOKENS}


def checked_config(files: DrafterFiles, target_config: Any | None = None) -> EagleConfig:
    """Return the network's shape after every check of the files; they must fit the target's config if it is given.

    The embedding, an lm_head and a draft vocabulary may be among the tensors. Raise ValueError in one sentence.
    """
    config = network_config(files, target_config)
    if target_config is not None:
        check_fits(files, config, target_config)
    check_shapes(files, check_names(files, config))
    check_finite(files, [name for name in files.tensors if name not in OPTIONAL])
    read_vocabulary(files)
    return config


def read_vocabulary(files: DrafterFiles) -> DraftVocabulary | None:
    """Return the draft vocabulary among a drafter's tensors, None for one that drafts over the whole vocabulary.

    Raise ValueError in one sentence for maps that are damaged, or of other sizes than config.json says.
    """
    if not {OFFSETS, MASK} <= files.tensors.keys():  # one alone: see `check_names`
        return None
    try:
        vocabulary = DraftVocabulary.of_maps(files.tensors[OFFSETS], files.tensors[MASK])
    except ValueError as error:
        raise ValueError(f"{files.folder} holds no draft vocabulary that can be used: {error}; save it anew") from error
    said = [(files.config or {}).get(name) for name in (DRAFT_SIZE, "vocab_size")]
    sizes = [len(vocabulary), vocabulary.vocab_size]
    if any(number not in (None, size) for number, size in zip(said, sizes, strict=True)):
        raise ValueError(
            f"the draft vocabulary in {files.folder} has {sizes[0]} of {sizes[1]} tokens, by its config.json "
            f"{said[0]} of {said[1]}; fetch the drafter again"
        )
    return vocabulary


def check_fits(files: DrafterFiles, config: EagleConfig, target_config: Any) -> None:
    """Raise ValueError unless vocabulary, hidden size and rope theta are the target's; warn of other rope scaling."""
    theta, scaling = rope_of(target_config)
    path = files.folder / CONFIG_FILE
    for name, own, other, way_out in (
        ("vocabulary", config.vocab_size, target_config.vocab_size, "use a drafter trained on this target's tokenizer"),
        (
            "hidden size",
            config.hidden_size,
            size_of(target_config, FEATURE_SIZES),
            "use a drafter trained on this target's features",
        ),
        ("rope theta", config.rope_theta, theta, f"use a drafter of this target, or correct rope_theta in {path}"),
    ):
        if other is not None and own != other:
            raise ValueError(f"drafter {name} {own:.12g} differs from target {name} {other:.12g}; {way_out}")
    if (config.rope_scaling or {}).get("rope_type") != (scaling or {}).get("rope_type"):
        # No error: published drafters of targets with scaled rope were trained without it, and work.
        warn(
            f"drafter rope scaling {config.rope_scaling} differs from target rope scaling {scaling}; "
            f"the drafter keeps the one in its config.json"
        )


def check_names(files: DrafterFiles, config: EagleConfig) -> dict[str, list[int]]:
    """Return the shapes of the network's tensors and the embedding; raise ValueError if other tensors are there."""
    try:
        with torch.device("meta"):
            network = EagleNetwork(config)
    except Exception as error:  # transformers raises anything for an unknown rope or activation
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"config.json in {files.folder} describes no network that can be built ({reason})") from error
    shapes = {name: [*value.shape] for name, value in network.state_dict().items()}
    present, expected = files.tensors.keys() - OPTIONAL, shapes.keys()
    has_one_map = (OFFSETS in files.tensors) != (MASK in files.tensors)
    if has_one_map or any(name.startswith(EAGLE3_NAMES) for name in present):
        raise ValueError(f"{files.folder} holds an EAGLE-3 drafter; only EAGLE-2 and HASS drafters are supported")
    if expected != present:
        missing, unexpected = (", ".join(sorted(names)) for names in (expected - present, present - expected))
        raise ValueError(
            f"{files.folder} is not an EAGLE-2 drafter: missing {missing or 'nothing'}; "
            f"unexpected {unexpected or 'nothing'}"
        )
    return shapes | {EMBEDDING: [config.vocab_size, config.hidden_size]}


def check_shapes(files: DrafterFiles, expected: Mapping[str, list[int]]) -> set[str]:
    """Return the names of the dtypes; raise ValueError unless every tensor has its expected shape and holds floats."""
    held = {name: tensor for name, tensor in files.tensors.items() if name not in VOCABULARY}
    for name, tensor in held.items():
        where = f"{name} in {files.folder}"
        if name not in LM_HEADS and [*tensor.shape] != expected[name]:
            raise ValueError(f"{where} must be {expected[name]} by its config, got {[*tensor.shape]}")
        if tensor.dtype not in PLAIN_DTYPES:
            raise ValueError(f"{where} is of {dtype_name(tensor.dtype)}; quantised drafters are not supported")
    return {dtype_name(tensor.dtype) for tensor in held.values()}


def check_finite(files: DrafterFiles, names: Iterable[str]) -> None:
    """Raise ValueError if one of these tensors holds NaN or an infinite value."""
    for name in names:
        if not all(bool(torch.isfinite(part).all()) for part in files.tensors[name].split(CHECKED_ROWS)):
            raise ValueError(f"{name} in {files.folder} holds NaN or infinite values; the checkpoint is broken")


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class CalibrationRecord:
    """A calibration and how it was made: the content of calibration.json."""

    calibration: Calibration
    facts: Mapping[str, Any]  # JSON values: target, data, seed, the gain; nothing that differs from run to run


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
    """Write calibration.json into a drafter's directory, whole or not at all, and return its path.

    `digest` is the SHA-256 of the drafter's weights, None where config.json does not give one.
    """
    path = folder / CALIBRATION_FILE
    content = {"format": CALIBRATION_FORMAT, **record.calibration.to_dict(), "drafter": digest, **record.facts}
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


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
    return EagleConfig.for_target(target_config, intermediate_size=len(gate), **biases)
