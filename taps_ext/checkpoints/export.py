"""Export drafters to other programs: EAGLE, HASS, vLLM and SGLang. docs/checkpoints.md says what each variant changes.

The demands of each program were read in its sources: EAGLE (eagle/model/cnets1.py, configs.py), HASS (model/cnets.py),
vLLM (llama_eagle.py, llama.py) and SGLang (llama_eagle.py, llama.py).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drafters.network import EagleConfig, rope_of
from .files import (
    BIN_FILE,
    SAFETENSORS_FILE,
    DrafterFiles,
    PathOrId,
    check_drafter_output,
    read_drafter_files,
    write_drafter_files,
)
from .formats import (
    ARCHITECTURE,
    DTYPES,
    EMBEDDING,
    FC_BIAS,
    LM_HEADS,
    QKV_BIASES,
    check_finite,
    check_fits,
    check_tensors,
    dtype_name,
    network_config,
    published_config,
)
from .load import TargetFiles, open_target, same_up_to_rounding

SGLANG_ARCHITECTURE = "LlamaForCausalLMEagle"


def export_drafter(
    drafter: PathOrId,
    to: str,
    output: PathOrId,
    *,
    target: PathOrId | None = None,
    dtype: str | None = None,
    also_bin: bool = False,
) -> Path:
    """Write a drafter in the form that a program reads, and return the directory.

    Args:
        drafter: directory or hub id, in any form that `load_drafter` reads, or a training state.
        to: eagle, hass, vllm (these read the canonical directory) or sglang.
        target: directory or hub id; gives the config and embedding that the drafter lacks, and the context length.
            Only these are read.
        dtype: float32, bfloat16 or float16 for the tensors; None: the drafter's own.
        also_bin: write pytorch_model.bin too, for programs that do not read safetensors.

    Raise ValueError with the reasons where the program could not read the drafter.
    """
    if to not in LOADERS:
        raise ValueError(f"a drafter can be exported to {', '.join(LOADERS)}, got {to!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_drafter_output(Path(output))
    target_files = None if target is None else open_target(target)
    files = canonical(read_drafter_files(drafter), target_files, dtype)
    if to == "sglang":
        files = _for_sglang(files)
    if reasons := problems(to, files, None if target_files is None else target_files.config):
        raise ValueError(f"{drafter} cannot be exported to {to}: {'; '.join(reasons)}")
    assert files.config is not None
    return write_drafter_files(output, files.config, files.tensors, files.provenance, also_bin)


def canonical(files: DrafterFiles, target: TargetFiles | None, dtype: str | None = None) -> DrafterFiles:
    """Return the canonical form of any drafter's files. Raise ValueError where something is missing or wrong."""
    if FC_BIAS in files.tensors and not bool(files.tensors[FC_BIAS].any()):
        files = replace(files, tensors={name: part for name, part in files.tensors.items() if name != FC_BIAS})
    config = _checked_config(files, target)
    tensors = {EMBEDDING: _embedding(files, target), **files.tensors}
    chosen = DTYPES[dtype] if dtype else tensors["fc.weight"].dtype
    tensors = {name: _cast(name, tensor, chosen) for name, tensor in tensors.items() if name not in LM_HEADS}
    published = published_config(config, chosen, _known_of_target(files, target))
    return DrafterFiles(files.folder, {**published, "taps": _provenance(files, target)}, tensors)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not torch.equal(torch.isfinite(cast), torch.isfinite(tensor)):
        raise ValueError(f"{name} holds values that {dtype_name(dtype)} cannot; use bfloat16")
    return cast


def _checked_config(files: DrafterFiles, target: TargetFiles | None) -> EagleConfig:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no config.json")  # the target was named to fill this in
        config = network_config(files, target and target.config)
    if target is not None:
        check_fits(files, config, target.config)
    check_tensors(files, config)
    return config


def _embedding(files: DrafterFiles, target: TargetFiles | None) -> Tensor:
    """Return the drafter's own embedding, which must be the target's where both are known; else the target's."""
    held = files.tensors.get(EMBEDDING)
    if held is None:
        if target is None:
            raise ValueError(f"{files.folder} holds no embedding; name its target, whose embedding is put in: --target")
        return target.embedding()
    check_finite(files, [EMBEDDING])
    if target is not None and not same_up_to_rounding(held, target.embedding()):
        raise ValueError(
            f"the embedding in {files.folder} differs from that of {target.name}; give the target that it was trained "
            f"for, or none to keep the embedding"
        )
    return held


def _known_of_target(files: DrafterFiles, target: TargetFiles | None) -> dict[str, Any]:
    """Return the special tokens and the context length; the drafter's own config goes first for the tokens."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    of_target = {} if target is None else {name: getattr(target.config, name, None) for name in names}
    own = files.config or {}
    return {**of_target, **{name: own[name] for name in names[:3] if name in own}}


def _provenance(files: DrafterFiles, target: TargetFiles | None) -> dict[str, Any]:
    """Return the drafter's own provenance, else the name of its directory and of its target."""
    if files.provenance:
        return files.provenance
    imported = {"imported_from": files.folder.resolve().name}
    return imported if target is None else {**imported, "target": {"name": target.short_name}}


def _for_sglang(files: DrafterFiles) -> DrafterFiles:
    """Use SGLang's architecture name and add the fc.bias that its network has: zeros where the drafter has none."""
    weight = files.tensors["fc.weight"]
    return replace(
        files,
        config={**(files.config or {}), "architectures": [SGLANG_ARCHITECTURE]},
        tensors={FC_BIAS: weight.new_zeros(len(weight)), **files.tensors},
    )


# --- what each program demands --------------------------------------------------------------------------------------


def problems(loader: str, files: DrafterFiles, target_config: Any | None = None) -> list[str]:
    """Return the reasons why a program would misread these files; none when it reads them as they are meant."""
    if files.config is None:
        return problems_of_all(files)
    return [*problems_of_all(files), *LOADERS[loader](files, files.config, target_config)]


def problems_of_all(files: DrafterFiles) -> list[str]:
    """Return the reasons why every program that reads the published format would misread these files."""
    return ["there is no config.json; export writes one"] if files.config is None else [*_common(files, files.config)]


def _common(files: DrafterFiles, config: dict[str, Any]) -> Iterator[str]:
    if config.get("model_type") != "llama":
        yield f"model_type in config.json is {config.get('model_type')}, not llama"
    if config.get("architectures") not in ([ARCHITECTURE], [SGLANG_ARCHITECTURE]):
        yield f"architectures in config.json is {config.get('architectures')}, not [{ARCHITECTURE}]"
    if config.get("num_hidden_layers") != 1:
        yield "num_hidden_layers in config.json is not 1"
    if config.get("rope_theta") is None and rope_of(config)[0] not in (None, 10000.0):
        yield "rope_theta is not at the top of config.json, and a reader of that spelling would use 10000"
    if files.is_renamed:
        yield "the tensors are not under their published names"


def bias_problems(files: DrafterFiles, config: dict[str, Any]) -> Iterator[str]:
    """Say where fc.bias and `bias` in config.json disagree; a missing key means true."""
    if (FC_BIAS in files.tensors) != bool(config.get("bias", True)):
        claim = f"bias {json.dumps(config['bias'])}" if "bias" in config else "no bias key, which means true"
        yield f"fc.bias is {'inside' if FC_BIAS in files.tensors else 'not inside'}, and config.json has {claim}"


def _eagle(files: DrafterFiles, config: dict[str, Any], target_config: Any | None) -> Iterator[str]:
    """List EAGLE's demands. It loads without `strict`: tensors that do not fit are dropped or stay random, silently."""
    if files.is_sharded:
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
    """List HASS's demands. It loads with `strict`: what does not fit is an error."""
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
    yield from _server(files, config, target_config)


def _server(files: DrafterFiles, config: dict[str, Any], target_config: Any | None) -> Iterator[str]:
    """List the demands that vLLM and SGLang have in common."""
    if config.get("bias") or config.get("attention_bias"):
        yield "bias or attention_bias in config.json is true, which it takes for biases of all four projections"
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
