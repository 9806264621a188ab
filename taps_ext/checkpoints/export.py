"""Export drafters to other programs (EAGLE, HASS, vLLM, SGLang), and validate drafters; see docs/checkpoints.md.

The demands of each program were read in its sources: EAGLE (eagle/model/cnets1.py, configs.py), HASS (model/cnets.py),
vLLM (llama_eagle.py, llama.py) and SGLang (llama_eagle.py, llama.py).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..drafters.network import EagleConfig, rope_of
from ..sampling import warn
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
    OFFSETS,
    QKV_BIASES,
    SPECIAL_TOKENS,
    VOCABULARY,
    check_finite,
    check_fits,
    check_names,
    check_shapes,
    checked_config,
    dtype_name,
    network_config,
    published_config,
    read_calibration,
    read_vocabulary,
)
from .load import TARGET_EMBEDDINGS, TargetFiles, open_target, same_up_to_rounding

SGLANG_ARCHITECTURE = "LlamaForCausalLMEagle"
EAGLES, SERVERS = ("eagle", "hass"), ("vllm", "sglang")
LOADERS = (*EAGLES, *SERVERS)
T = TypeVar("T")
Status = Literal["ok", "warning", "failed"]
NO_DRAFT_VOCABULARY = "a draft vocabulary is inside, which it reads in EAGLE-3 drafters only"
PUBLISHED = "published"  # the demands on config.json that do not depend on the program


def export_drafter(
    drafter: PathOrId,
    to: str,
    output: PathOrId,
    *,
    target: PathOrId | None = None,
    dtype: str | None = None,
    also_bin: bool = False,
    whole_vocabulary: bool = False,
) -> Path:
    """Write a drafter in the form that a program reads, and return the directory.

    Args:
        drafter: directory or hub id, in any form that `load_drafter` reads, or a training state.
        to: eagle, hass, vllm (these read the canonical directory) or sglang.
        target: directory or hub id; gives the config and embedding that the drafter lacks, and the context length.
            Only these are read.
        dtype: float32, bfloat16 or float16 for the tensors; None: the drafter's own.
        also_bin: write pytorch_model.bin too, for programs that do not read safetensors.
        whole_vocabulary: leave out the draft vocabulary, which none of these programs reads in such a drafter. They
            then compute the logits of every token; the drafter's own weights are the same.

    Raise ValueError with the reasons where the program could not read the drafter.
    """
    if to not in LOADERS:
        raise ValueError(f"a drafter can be exported to {', '.join(LOADERS)}, got {to!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_drafter_output(Path(output))
    target_files = None if target is None else open_target(target)
    held = read_drafter_files(drafter)
    if OFFSETS in held.tensors and not whole_vocabulary:
        raise ValueError(f"{drafter} cannot be exported to {to}: {NO_DRAFT_VOCABULARY}; give --whole-vocabulary")
    files = _canonical(held, target_files, dtype)
    assert files.config is not None
    if to == "sglang":
        files.config["architectures"] = [SGLANG_ARCHITECTURE]
        weight = files.tensors["fc.weight"]
        files.tensors.setdefault(FC_BIAS, weight.new_zeros(len(weight)))  # its network has one
    if reasons := problems(to, files, None if target_files is None else target_files.config):
        raise ValueError(f"{drafter} cannot be exported to {to}: {'; '.join(reasons)}")
    return write_drafter_files(output, files.config, files.tensors, files.provenance, also_bin)


def _canonical(files: DrafterFiles, target: TargetFiles | None, dtype: str | None) -> DrafterFiles:
    """Return the canonical form of any drafter's files. Raise ValueError where something is missing or wrong."""
    if FC_BIAS in files.tensors and not bool(files.tensors[FC_BIAS].any()):
        del files.tensors[FC_BIAS]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no config.json")  # the target was named to fill this in
        config = checked_config(files, target and target.config)
    tensors = {EMBEDDING: _embedding(files, target), **files.tensors}
    chosen = DTYPES[dtype] if dtype else tensors["fc.weight"].dtype
    kept = tensors.keys() - {*LM_HEADS, *VOCABULARY}
    tensors = {name: _cast(name, tensor, chosen) for name, tensor in tensors.items() if name in kept}
    # The special tokens are the drafter's own where its config.json has them, the context length is the target's.
    of_target = {} if target is None else target.config.to_dict()
    own = {name: value for name, value in (files.config or {}).items() if name in SPECIAL_TOKENS}
    taps = files.provenance or {"imported_from": files.folder.resolve().name}
    if target is not None and not files.provenance:
        taps["target"] = {"name": Path(target.name).resolve().name if Path(target.name).is_dir() else target.name}
    return DrafterFiles(files.folder, {**published_config(config, chosen, of_target | own), "taps": taps}, tensors)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not torch.equal(torch.isfinite(cast), torch.isfinite(tensor)):
        raise ValueError(f"{name} holds values that {dtype_name(dtype)} cannot; use bfloat16")
    return cast


def _embedding(files: DrafterFiles, target: TargetFiles | None) -> Tensor:
    """Return the drafter's own embedding, which must be the target's where both are known; else the target's."""
    held = files.tensors.get(EMBEDDING)
    if held is None:
        if target is None:
            raise ValueError(f"{files.folder} holds no embedding; name its target, whose embedding is put in: --target")
        return target.matrix(TARGET_EMBEDDINGS)
    check_finite(files, [EMBEDDING])
    if target is not None and not same_up_to_rounding(held, target.matrix(TARGET_EMBEDDINGS)):
        raise ValueError(
            f"the embedding in {files.folder} differs from that of {target.name}; give the target that it was trained "
            f"for, or none to keep the embedding"
        )
    return held


# --- what each program demands --------------------------------------------------------------------------------------


def problems(program: str, files: DrafterFiles, target_config: Any | None = None) -> list[str]:
    """Return the reasons why a program would misread these files; none when it reads them as they are meant.

    The program PUBLISHED stands for every reader of the published format.
    """
    if files.config is None:
        return ["there is no config.json; export writes one"]
    broken = _broken_demands(files, files.config, target_config)
    return [reason for programs, reason in broken if program in programs]


def _broken_demands(
    files: DrafterFiles, config: dict[str, Any], target_config: Any | None
) -> Iterator[tuple[Collection[str], str]]:
    """Yield the programs and the reason for each demand that the files do not meet.

    EAGLE loads without `strict`: tensors that do not fit are dropped or stay random, silently. HASS loads with it.
    """
    everyone, architectures = (PUBLISHED, *LOADERS), config.get("architectures")
    if config.get("model_type") != "llama":
        yield everyone, f"model_type in config.json is {config.get('model_type')}, not llama"
    if architectures not in ([ARCHITECTURE], [SGLANG_ARCHITECTURE]):
        yield everyone, f"architectures in config.json is {architectures}, not [{ARCHITECTURE}]"
    if architectures != [ARCHITECTURE]:
        yield ["vllm"], f"architectures must be [{ARCHITECTURE}], which it prefixes with Eagle"
    if architectures != [SGLANG_ARCHITECTURE]:
        yield ["sglang"], f"architectures must be [{SGLANG_ARCHITECTURE}]"
    if config.get("num_hidden_layers") != 1:
        yield everyone, "num_hidden_layers in config.json is not 1"
    if files.is_renamed:
        yield everyone, "the tensors are not under their published names"
    if OFFSETS in files.tensors:
        yield LOADERS, NO_DRAFT_VOCABULARY
    if files.is_sharded:
        yield EAGLES, f"the weights are in shards; it reads one {BIN_FILE} or {SAFETENSORS_FILE}"
    if EMBEDDING not in files.tensors:
        yield ["hass"], "the embedding is not inside"
    if lm_head := next((name for name in LM_HEADS if name in files.tensors), None):
        yield ("hass", *SERVERS), f"{lm_head} is inside, which it does not know"
    if config.get("hidden_act", "silu") != "silu":
        yield SERVERS, f"hidden_act is {config['hidden_act']}, and it knows silu only"
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config.get("head_dim")
    if hidden % heads or (head_dim and head_dim * heads != hidden):
        yield EAGLES, f"head_dim is {head_dim}, and it takes hidden_size / num_attention_heads and nothing else"
    length, needed = config.get("max_position_embeddings") or 2048, getattr(target_config, "max_position_embeddings", 0)
    if length < needed:
        reason = f"max_position_embeddings {length} is below the target's {needed}"
        yield SERVERS, f"{reason}: it refuses longer texts, or fails at them"
    yield from _broken_by_biases(files, config)
    yield from _broken_by_rope(config)


def _broken_by_biases(files: DrafterFiles, config: dict[str, Any]) -> Iterator[tuple[Collection[str], str]]:
    """Yield what is wrong with biases; `bias` is of fc, and true by default, to EAGLE, and of attention to servers."""
    is_inside, has_qkv_bias = FC_BIAS in files.tensors, QKV_BIASES[0] in files.tensors
    if is_inside != bool(config.get("bias", True)):
        claim = f"bias {json.dumps(config['bias'])}" if "bias" in config else "no bias key, which means true"
        readers = EAGLES if config.get("architectures") == [SGLANG_ARCHITECTURE] else (PUBLISHED, *EAGLES)
        yield readers, f"fc.bias is {'inside' if is_inside else 'not inside'}, and config.json has {claim}"
    if is_inside:
        yield ["vllm"], "fc.bias is inside, and its network has none: the drafter would be another one"
    else:
        yield ["sglang"], "fc.bias is not inside, and its network has one: it would stay random"
    if has_qkv_bias != bool(config.get("qkv_bias")):
        yield (*EAGLES, "vllm"), "the q, k and v biases and qkv_bias in config.json disagree"
    if has_qkv_bias:
        yield ["sglang"], "it knows biases of all four attention projections or of none, and this drafter has three"
    if config.get("bias") or config.get("attention_bias"):
        claim = "bias or attention_bias in config.json is true"
        yield SERVERS, f"{claim}, which it takes for biases of all four projections"
    if config.get("mlp_bias"):
        yield SERVERS, "mlp_bias in config.json is true, and the drafter has no such biases"


def _broken_by_rope(config: dict[str, Any]) -> Iterator[tuple[Collection[str], str]]:
    theta, scaling = rope_of(config)
    if config.get("rope_theta") is None and theta not in (None, 10000.0):
        reason = "rope_theta is not at the top of config.json, and a reader of that spelling would use 10000"
        yield (PUBLISHED, *LOADERS), reason
    if scaling is None:
        return
    written = config.get("rope_scaling")
    if scaling["rope_type"] != "linear":
        yield EAGLES, f"rope scaling {scaling['rope_type']} is unknown to it"
    elif not (isinstance(written, dict) and written.keys() == {"type", "factor"}):
        yield EAGLES, 'rope_scaling must be {"type": "linear", "factor": ...} and nothing else'
    elif not isinstance(written["factor"], float) or written["factor"] <= 1:
        yield EAGLES, f"the factor of rope_scaling must be a float above 1, got {written['factor']!r}"
    if theta not in (None, 10000.0):
        reason = "with scaled rope it takes a theta of 10000 whatever config.json says"
        yield EAGLES, f"{reason}, and this one is {theta:g}"


# --- validation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    status: Status
    message: str


@dataclass(frozen=True)
class ValidationReport:
    """All checks, and for each program the reasons why it cannot read the directory (none: it can)."""

    drafter: str
    target: str | None
    checks: tuple[Check, ...]
    loaders: dict[str, tuple[str, ...]]

    @property
    def passed(self) -> bool:
        """Return whether no check failed; a program that cannot read the directory is no failure."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        loaders = {name: {"reads": not why, "reasons": list(why)} for name, why in self.loaders.items()}
        return {**asdict(self), "passed": self.passed, "loaders": loaders}


def validate_drafter(drafter: PathOrId, target: PathOrId | None = None) -> ValidationReport:
    """Check a drafter's directory or hub repository, also against its target's config and embedding if it is named.

    A bad drafter gives a report with failures. Raise FileNotFoundError or ValueError for a target that cannot be read.
    """
    target_files = None if target is None else open_target(target)
    target_config = None if target_files is None else target_files.config
    checks: list[Check] = []
    loaders: dict[str, tuple[str, ...]] = {}
    files = _check(checks, "files", lambda: read_drafter_files(drafter), _described)
    if files is not None and _check_files(checks, files, target_files):
        loaders = {loader: tuple(problems(loader, files, target_config)) for loader in LOADERS}
    name = None if target_files is None else target_files.name
    return ValidationReport(os.fspath(drafter), name, tuple(checks), loaders)


def _check_files(checks: list[Check], files: DrafterFiles, target: TargetFiles | None) -> bool:
    """Add the checks that can be made, without those that depend on one that failed; return whether the shapes fit."""
    add = partial(_check, checks)
    config = add("network", lambda: network_config(files, target and target.config), _described_network)
    if config is not None or files.config is None:
        add("config", lambda: _published(files))
    add("provenance", lambda: _made(files))
    add("calibration", lambda: _calibration(files))
    if config is None:
        return False
    shapes = add("names", lambda: check_names(files, config), "exactly the published ones")
    if shapes is None:
        return False
    add("extras", lambda: _extras(files))
    dtypes = add("shapes", lambda: check_shapes(files, shapes), "as config.json says")
    if dtypes is None:
        return False
    add("dtype", lambda: _one_dtype(dtypes))
    add("values", lambda: check_finite(files, files.tensors), "all finite")
    if target is not None:
        fits = "vocabulary, hidden size and rope are the target's"
        add("target", lambda: check_fits(files, config, target.config), fits)
        add("context", lambda: _length(config, target))
        add("embedding", lambda: _embedding_of(files, target))
    return True


def _check(checks: list[Check], name: str, check: Callable[[], T], says: Callable[[T], str] | str = str) -> T | None:
    """Add a check and return its value: it failed (None) if it raises an error, and is a warning if it warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            value = check()
        except (ValueError, OSError) as error:
            checks.append(Check(name, "failed", " ".join(str(error).split())))
            return None
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    sentence = "; ".join(texts) or (says if isinstance(says, str) else says(value))
    checks.append(Check(name, "warning" if texts else "ok", sentence))
    return value


def _described(files: DrafterFiles) -> str:
    num_bytes = sum(tensor.nbytes for tensor in files.tensors.values())
    digest = ", and the weights are those that were written with config.json" if files.digest else ""
    return f"{len(files.tensors)} tensors, {num_bytes / 1e6:,.1f} MB{digest}"


def _described_network(config: EagleConfig) -> str:
    heads = f"{config.num_attention_heads} heads over {config.num_key_value_heads} of size {config.head_dim}"
    biases = " and ".join(name for name in ("fc_bias", "qkv_bias") if getattr(config, name)) or "no biases"
    return f"hidden {config.hidden_size}, MLP {config.intermediate_size}, {heads}, {biases}"


# --- checks: each returns a sentence, warns with one, or raises ValueError with one ----------------------------------


def _published(files: DrafterFiles) -> str:
    if reasons := problems(PUBLISHED, files):
        raise ValueError("; ".join(reasons))
    return "in the published form"


def _made(files: DrafterFiles) -> str:
    facts = {**files.provenance, "target": files.target.get("name")}
    if not files.provenance:
        warn("config.json does not say how the drafter was made (taps)")
    texts = [f"{name} {facts[name]}" for name in ("algorithm", "target", "domain", "imported_from") if facts.get(name)]
    return ", ".join(texts) or f"config.json gives {', '.join(files.provenance)}"


def _calibration(files: DrafterFiles) -> str:
    calibration = read_calibration(files.folder, files.digest)
    if calibration is None:
        command = f"taps-ext calibrate {files.folder} --target TARGET --data CONVERSATIONS"
        warn(f"none, so it cannot draft with the target's noise: {command}")
        return ""
    temperatures = ", ".join(f"{temperature:g}" for temperature in calibration.temperatures)
    return f"of these weights, at the temperatures {temperatures}, {calibration.depth} deep"


def _extras(files: DrafterFiles) -> str:
    if (vocabulary := read_vocabulary(files)) is not None:
        return f"a draft vocabulary of {len(vocabulary):,} of {vocabulary.vocab_size:,} tokens"
    if heads := [name for name in LM_HEADS if name in files.tensors]:
        warn(f"{heads[0]} is inside: the target's is used; export leaves it out")
    elif EMBEDDING not in files.tensors:
        warn("the embedding is not inside, which HASS needs; export --target puts it in")
    return "the embedding is inside, no lm_head is"


def _one_dtype(dtypes: set[str]) -> str:
    if len(dtypes) > 1:
        warn(" and ".join(sorted(dtypes)))
    return min(dtypes)


def _length(config: EagleConfig, target: TargetFiles) -> str:
    own, length = config.max_position_embeddings, target.config.max_position_embeddings
    sentence = f"max_position_embeddings {own}, the target's {length}"
    if own < length:
        warn(sentence)
    return sentence


def _embedding_of(files: DrafterFiles, target: TargetFiles) -> str:
    if EMBEDDING not in files.tensors:
        if OFFSETS not in files.tensors:
            warn("not inside, the target's is used")
        return "not inside, as with every draft vocabulary; the target's is used"
    own, expected = files.tensors[EMBEDDING], target.matrix(TARGET_EMBEDDINGS)
    if torch.equal(own, expected.to(own.dtype)):
        return "the target's, bit for bit"
    if same_up_to_rounding(own, expected):
        return "the target's, up to rounding"
    raise ValueError(f"differs from that of {target.name}: the drafter is of another target")
