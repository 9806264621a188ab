"""What the readers of the published format ask of a drafter's files; for each demand that is not met, the reason.

The facts are from the readers' sources: EAGLE (eagle/model/cnets1.py, configs.py), HASS (model/cnets.py), vLLM
(llama_eagle.py, llama.py) and SGLang (llama_eagle.py, llama.py). docs/checkpoints.md tells them at length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from ..drafters.network import rope_of
from .files import BIN_FILE, SAFETENSORS_FILE, DrafterFiles
from .formats import ARCHITECTURE, EMBEDDING, FC_BIAS, LM_HEADS, QKV_BIASES

SGLANG_ARCHITECTURE = "LlamaForCausalLMEagle"


def problems(loader: str, files: DrafterFiles, target_config: Any | None = None) -> list[str]:
    """Why the loader would not read these files as they are meant, nothing when it would; `target_config` if known."""
    if files.config is None:
        return problems_of_all(files)
    return [*problems_of_all(files), *LOADERS[loader](files, files.config, target_config)]


def problems_of_all(files: DrafterFiles) -> list[str]:
    """Why no reader of the published format would read these files as they are meant."""
    return ["there is no config.json; export writes one"] if files.config is None else [*_of_all(files, files.config)]


def _of_all(files: DrafterFiles, config: dict[str, Any]) -> Iterator[str]:
    if config.get("model_type") != "llama":
        yield f"model_type in config.json is {config.get('model_type')}, not llama"
    if config.get("architectures") not in ([ARCHITECTURE], [SGLANG_ARCHITECTURE]):
        yield f"architectures in config.json is {config.get('architectures')}, not [{ARCHITECTURE}]"
    if config.get("num_hidden_layers") != 1:
        yield "num_hidden_layers in config.json is not 1"
    if config.get("rope_theta") is None and rope_of(config)[0] not in (None, 10000.0):
        yield "rope_theta is not at the top of config.json, and a reader of that spelling would use 10000"
    if any(tensor.file is not None and tensor.name != name for name, tensor in files.tensors.items()):
        yield "the tensors are not under their published names"


def bias_problems(files: DrafterFiles, config: dict[str, Any]) -> Iterator[str]:
    """Where fc.bias and config.json disagree: its `bias`, true where the key is missing."""
    if (FC_BIAS in files.tensors) != bool(config.get("bias", True)):
        claim = f"bias {json.dumps(config['bias'])}" if "bias" in config else "no bias key, which means true"
        yield f"fc.bias is {'inside' if FC_BIAS in files.tensors else 'not inside'}, and config.json has {claim}"


def _eagle(files: DrafterFiles, config: dict[str, Any], target_config: Any | None) -> Iterator[str]:
    """EAGLE loads without `strict`: what does not fit is dropped or left random, in silence."""
    names = {tensor.file.name for tensor in files.tensors.values() if tensor.file}
    if not names <= {SAFETENSORS_FILE, BIN_FILE}:
        yield f"the weights are in shards; it reads one {BIN_FILE} or {SAFETENSORS_FILE}"
    yield from bias_problems(files, config)
    if (QKV_BIASES[0] in files.tensors) != bool(config.get("qkv_bias", False)):
        yield "the q, k and v biases and qkv_bias in config.json disagree"
    head_dim = config.get("head_dim")
    if config["hidden_size"] % config["num_attention_heads"] or (
        head_dim and head_dim * config["num_attention_heads"] != config["hidden_size"]
    ):
        yield f"head_dim is {head_dim}, and it takes hidden_size / num_attention_heads and nothing else"
    yield from _eagle_rope(config)


def _eagle_rope(config: dict[str, Any]) -> Iterator[str]:
    theta, scaling = rope_of(config)
    if scaling is None:
        return
    written = config.get("rope_scaling")
    if scaling["rope_type"] != "linear":
        yield f"rope scaling {scaling['rope_type']} is unknown to it"
    elif not (isinstance(written, dict) and written.keys() == {"type", "factor"}):
        yield 'rope_scaling must be {"type": "linear", "factor": ...} and nothing else'
    elif not isinstance(written["factor"], float) or written["factor"] <= 1:
        yield f"the factor of rope_scaling must be a float above 1, got {written['factor']!r}"
    if theta not in (None, 10000.0):
        yield f"with scaled rope it takes a theta of 10000 whatever config.json says, and this one is {theta:g}"


def _hass(files: DrafterFiles, config: dict[str, Any], target_config: Any | None) -> Iterator[str]:
    """HASS loads with `strict`: what does not fit is an error."""
    yield from _eagle(files, config, target_config)
    if EMBEDDING not in files.tensors:
        yield "the embedding is not inside"
    if heads := [name for name in LM_HEADS if name in files.tensors]:
        yield f"{heads[0]} is inside, which it does not know"


def _vllm(files: DrafterFiles, config: dict[str, Any], target_config: Any | None) -> Iterator[str]:
    if config.get("architectures") != [ARCHITECTURE]:
        yield f"architectures must be [{ARCHITECTURE}], which it prefixes with Eagle"
    if FC_BIAS in files.tensors:
        yield "fc.bias is inside, and its network has none: the drafter would be another one"
    if config.get("bias") or config.get("attention_bias"):
        yield "bias or attention_bias in config.json is true, which it takes for biases of all four projections"
    if (QKV_BIASES[0] in files.tensors) != bool(config.get("qkv_bias", False)):
        yield "the q, k and v biases and qkv_bias in config.json disagree"
    yield from _server(files, config, target_config)


def _sglang(files: DrafterFiles, config: dict[str, Any], target_config: Any | None) -> Iterator[str]:
    if config.get("architectures") != [SGLANG_ARCHITECTURE]:
        yield f"architectures must be [{SGLANG_ARCHITECTURE}]"
    if FC_BIAS not in files.tensors:
        yield "fc.bias is not inside, and its network has one: it would stay random"
    if QKV_BIASES[0] in files.tensors:
        yield "it knows biases of all four attention projections or of none, and this drafter has three"
    if config.get("bias") or config.get("attention_bias"):
        yield "bias or attention_bias in config.json is true, which it takes for biases of all four projections"
    yield from _server(files, config, target_config)


def _server(files: DrafterFiles, config: dict[str, Any], target_config: Any | None) -> Iterator[str]:
    """What vLLM and SGLang have in common."""
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act is {config['hidden_act']}, and it knows silu only"
    if config.get("mlp_bias"):
        yield "mlp_bias in config.json is true, and the drafter has no such biases"
    if heads := [name for name in LM_HEADS if name in files.tensors]:
        yield f"{heads[0]} is inside, which it does not know"
    length = getattr(target_config, "max_position_embeddings", None)
    if length and (config.get("max_position_embeddings") or 2048) < length:
        yield (
            f"max_position_embeddings {config.get('max_position_embeddings', 2048)} is below the target's {length}: "
            f"it refuses longer texts, or fails at them"
        )


Demands = Callable[[DrafterFiles, dict[str, Any], Any | None], Iterator[str]]
LOADERS: dict[str, Demands] = {"eagle": _eagle, "hass": _hass, "vllm": _vllm, "sglang": _sglang}
