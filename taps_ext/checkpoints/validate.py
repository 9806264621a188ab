"""Validate a drafter's directory: complete, as it says, of its target, and readable by which programs.

Nothing is changed, and only the drafter and two files of the target are read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..drafters.network import EagleConfig
from .export import LOADERS, SGLANG_ARCHITECTURE, bias_problems, problems, problems_of_all
from .files import DrafterFiles, PathOrId, read_drafter_files
from .formats import (
    EMBEDDING,
    LM_HEADS,
    check_finite,
    check_fits,
    check_names,
    check_shapes,
    dtype_name,
    network_config,
    read_calibration,
)
from .load import TargetFiles, open_target, same_up_to_rounding

Status = Literal["ok", "warning", "failed"]


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
        return {
            "drafter": self.drafter,
            "target": self.target,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "loaders": {name: {"reads": not why, "reasons": list(why)} for name, why in self.loaders.items()},
        }


def validate_drafter(drafter: PathOrId, target: PathOrId | None = None) -> ValidationReport:
    """Check a drafter's directory or hub repository, also against its target's config and embedding if it is named.

    A bad drafter gives a report with failures. Raise FileNotFoundError or ValueError for a target that cannot be read.
    """
    target_files = None if target is None else open_target(target)
    checks: list[Check] = []
    loaders: dict[str, tuple[str, ...]] = {}
    files = _attempt(checks, "files", lambda: read_drafter_files(drafter), _describe)
    if files is not None:
        _check_all(checks, files, target_files)
        target_config = None if target_files is None else target_files.config
        if any(check.name == "shapes" and check.status == "ok" for check in checks):
            loaders = {loader: tuple(problems(loader, files, target_config)) for loader in LOADERS}
    name = None if target_files is None else target_files.name
    return ValidationReport(os.fspath(drafter), name, tuple(checks), loaders)


def _check_all(checks: list[Check], files: DrafterFiles, target: TargetFiles | None) -> None:
    """Add the checks that can be made; a check that depends on one that failed is left out."""
    config = _attempt(checks, "network", lambda: network_config(files, target and target.config), _describe_network)
    if config is not None or files.config is None:
        checks.append(_config_check(files))
    checks.append(_provenance_check(files))
    checks.append(_calibration_check(files))
    if config is None or not _holds(checks, "names", lambda: check_names(files, config), "exactly the published ones"):
        return
    checks.append(_extra_check(files))
    if not _holds(checks, "shapes", lambda: check_shapes(files, config), "as config.json says"):
        return
    checks.append(_dtype_check(files))
    _holds(checks, "values", lambda: check_finite(files, list(files.tensors)), "all finite")
    if target is not None:
        fits = "vocabulary, hidden size and rope are the target's"
        _holds(checks, "target", lambda: check_fits(files, config, target.config), fits)
        checks.append(_length_check(config, target))
        checks.append(_embedding_check(files, target))


def _attempt(checks: list[Check], name: str, make: Callable[[], Any], describe: Callable[[Any], str]) -> Any:
    """Add a check that `make` raises no error (failed) and no warning, and return its value; None after an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            made = make()
        except (ValueError, OSError) as error:
            checks.append(Check(name, "failed", " ".join(str(error).split())))
            return None
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    checks.append(Check(name, "warning" if texts else "ok", "; ".join(texts) or describe(made)))
    return made


def _holds(checks: list[Check], name: str, check: Callable[[], None], message: str) -> bool:
    _attempt(checks, name, check, lambda _: message)
    return checks[-1].status != "failed"


def _describe(files: DrafterFiles) -> str:
    num_bytes = sum(tensor.nbytes for tensor in files.tensors.values())
    digest = ", and the weights are those that were written with config.json" if files.digest else ""
    return f"{len(files.tensors)} tensors, {num_bytes / 1e6:,.1f} MB{digest}"


def _describe_network(config: EagleConfig) -> str:
    heads = f"{config.num_attention_heads} heads over {config.num_key_value_heads} of size {config.head_dim}"
    biases = " and ".join(name for name in ("fc_bias", "qkv_bias") if getattr(config, name)) or "no biases"
    return f"hidden {config.hidden_size}, MLP {config.intermediate_size}, {heads}, {biases}"


def _config_check(files: DrafterFiles) -> Check:
    reasons = problems_of_all(files)
    if files.config is not None and files.config.get("architectures") != [SGLANG_ARCHITECTURE]:
        reasons += bias_problems(files, files.config)
    return Check("config", "failed" if reasons else "ok", "; ".join(reasons) or "in the published form")


def _provenance_check(files: DrafterFiles) -> Check:
    if not files.provenance:
        return Check("provenance", "warning", "config.json does not say how the drafter was made (taps)")
    facts = {**files.provenance, "target": files.target.get("name")}
    texts = [f"{name} {facts[name]}" for name in ("algorithm", "target", "domain", "imported_from") if facts.get(name)]
    return Check("provenance", "ok", ", ".join(texts) or f"config.json gives {', '.join(files.provenance)}")


def _calibration_check(files: DrafterFiles) -> Check:
    try:
        calibration = read_calibration(files.folder, files.digest)
    except ValueError as error:
        return Check("calibration", "failed", str(error))
    if calibration is None:
        command = f"taps-ext calibrate {files.folder} --target TARGET --data CONVERSATIONS"
        return Check("calibration", "warning", f"none, so it cannot draft with the target's noise: {command}")
    temperatures = ", ".join(f"{temperature:g}" for temperature in calibration.temperatures)
    return Check("calibration", "ok", f"of these weights, at the temperatures {temperatures}, {calibration.depth} deep")


def _extra_check(files: DrafterFiles) -> Check:
    if heads := [name for name in LM_HEADS if name in files.tensors]:
        return Check("extras", "warning", f"{heads[0]} is inside: the target's is used; export leaves it out")
    if EMBEDDING not in files.tensors:
        return Check("extras", "warning", "the embedding is not inside, which HASS needs; export --target puts it in")
    return Check("extras", "ok", "the embedding is inside, no lm_head is")


def _dtype_check(files: DrafterFiles) -> Check:
    dtypes = sorted({dtype_name(tensor.dtype) for tensor in files.tensors.values()})
    return Check("dtype", "ok" if len(dtypes) == 1 else "warning", " and ".join(dtypes))


def _length_check(config: EagleConfig, target: TargetFiles) -> Check:
    own, length = config.max_position_embeddings, target.config.max_position_embeddings
    short = own < length
    return Check("context", "warning" if short else "ok", f"max_position_embeddings {own}, the target's {length}")


def _embedding_check(files: DrafterFiles, target: TargetFiles) -> Check:
    if EMBEDDING not in files.tensors:
        return Check("embedding", "warning", "not inside, the target's is used")
    own, expected = files.tensors[EMBEDDING], target.embedding()
    if torch.equal(own, expected.to(own.dtype)):
        return Check("embedding", "ok", "the target's, bit for bit")
    if same_up_to_rounding(own, expected):
        return Check("embedding", "ok", "the target's, up to rounding")
    return Check("embedding", "failed", f"differs from that of {target.name}: the drafter is of another target")
