"""The drafters that a decoder uses: which they are, whether they fit its target, whether they can be coupled."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping

from ..drafters import Drafter
from ..target.model import TargetModel

LIBRARIES = ("taps_ext", "transformers", "torch")  # through which a call may come


def used_drafters(
    drafters: Mapping[str, Drafter], composition: str, name: str | None, target: TargetModel
) -> dict[str, Drafter]:
    """Those that the composition uses, each of the target's sizes."""
    if not isinstance(drafters, Mapping):
        raise ValueError(f"drafters must be a dict from name to drafter, got {type(drafters).__name__}")
    if not 1 <= len(drafters) <= 63:
        raise ValueError(f"give 1 to 63 drafters, got {len(drafters)}")
    used = dict(drafters)
    if composition == "single":
        used = _single_drafter(used, name)
    elif name is not None:
        raise ValueError(f'drafter={name!r} goes with composition="single", got {composition!r}')
    for one, drafter in used.items():
        _refuse_other_sizes(one, drafter, target)
    return used


def _single_drafter(drafters: dict[str, Drafter], name: str | None) -> dict[str, Drafter]:
    if name is None and len(drafters) > 1:
        raise ValueError(f'composition="single" needs drafter=..., one of {", ".join(drafters)}')
    chosen = name if name is not None else next(iter(drafters))
    if chosen not in drafters:
        raise ValueError(f"drafter must be one of {', '.join(drafters)}, got {chosen!r}")
    return {chosen: drafters[chosen]}


def _refuse_other_sizes(name: str, drafter: Drafter, target: TargetModel) -> None:
    if drafter.vocab_size != target.vocab_size:
        raise ValueError(
            f"drafter {name!r} has vocabulary {drafter.vocab_size}, the target {target.vocab_size}; "
            "use a drafter trained on this target's tokenizer"
        )
    if drafter.hidden_size != target.config.hidden_size:
        raise ValueError(
            f"drafter {name!r} takes features of size {drafter.hidden_size}, the target's have "
            f"{target.config.hidden_size}; use a drafter trained for this target"
        )


def warn_of_uncalibrated(drafters: Mapping[str, Drafter]) -> None:
    """Warn whoever called the library of drafters that cannot look at the noise, with the command that mends it."""
    if names := ", ".join(name for name, drafter in drafters.items() if drafter.calibration is None):
        warnings.warn(
            f"not calibrated, and drafted as with drafting='topk': {names}; to accept more at temperatures above 0, "
            f"run: taps-ext calibrate DRAFTER --target TARGET --data FILE",
            stacklevel=_level_of_caller(),
        )


def _level_of_caller() -> int:
    """The `stacklevel` of whoever called this library, whether or not transformers stands between."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
