"""taps_ext: lossless speculative decoding with several drafters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from .decoder import GenerationResult as GenerationResult
    from .decoder import SpeculativeDecoder as SpeculativeDecoder
    from .drafters import average_drafters as average_drafters
    from .drafters import export_drafter as export_drafter
    from .drafters import load_drafter as load_drafter
    from .drafters import load_drafters as load_drafters
    from .drafters import save_drafter as save_drafter
    from .drafters import validate_drafter as validate_drafter
    from .plain_generation import plain_generate as plain_generate
    from .sampling import SamplingParams as SamplingParams
    from .stats import DecodeStats as DecodeStats
    from .target import TargetModel as TargetModel
    from .tree import DraftTree as DraftTree
    from .tree import TreeShape as TreeShape

__version__ = "0.1.0"

# Each public name and the module that has it; loaded on first use, so that `import taps_ext` costs nothing.
_HOMES = {
    "DecodeStats": "stats",
    "DraftTree": "tree",
    "GenerationResult": "decoder",
    "SamplingParams": "sampling",
    "SpeculativeDecoder": "decoder",
    "TargetModel": "target",
    "TreeShape": "tree",
    "average_drafters": "drafters",
    "export_drafter": "drafters",
    "load_drafter": "drafters",
    "load_drafters": "drafters",
    "plain_generate": "plain_generation",
    "save_drafter": "drafters",
    "validate_drafter": "drafters",
}

__all__ = [*_HOMES, "__version__", "ops"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
