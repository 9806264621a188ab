"""taps_ext: lossless speculative decoding with several drafters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from .checkpoints import CorpusStore as CorpusStore
    from .checkpoints import average_drafters as average_drafters
    from .checkpoints import export_drafter as export_drafter
    from .checkpoints import load_drafter as load_drafter
    from .checkpoints import load_drafters as load_drafters
    from .checkpoints import save_drafter as save_drafter
    from .checkpoints import validate_drafter as validate_drafter
    from .decode.budget import CostTable as CostTable
    from .decode.decoder import GenerationResult as GenerationResult
    from .decode.decoder import SpeculativeDecoder as SpeculativeDecoder
    from .decode.plain import plain_generate as plain_generate
    from .decode.stats import DecodeStats as DecodeStats
    from .drafters import Drafter as Drafter
    from .drafters import DrafterState as DrafterState
    from .drafters import DraftVocabulary as DraftVocabulary
    from .drafters import LookupDrafter as LookupDrafter
    from .sampling import SamplingParams as SamplingParams
    from .sampling import row_seed as row_seed
    from .target.model import TargetModel as TargetModel
    from .tree import DraftTree as DraftTree
    from .tree import Lengths as Lengths
    from .tree import TreeShape as TreeShape

__version__ = "0.1.0"

# Each public name and the module that has it; loaded on first use, so that `import taps_ext` costs nothing.
_HOMES = {
    "CorpusStore": "checkpoints",
    "CostTable": "decode.budget",
    "DecodeStats": "decode.stats",
    "DraftTree": "tree",
    "DraftVocabulary": "drafters",
    "Drafter": "drafters",
    "DrafterState": "drafters",
    "GenerationResult": "decode.decoder",
    "Lengths": "tree",
    "LookupDrafter": "drafters",
    "SamplingParams": "sampling",
    "SpeculativeDecoder": "decode.decoder",
    "TargetModel": "target.model",
    "TreeShape": "tree",
    "average_drafters": "checkpoints",
    "export_drafter": "checkpoints",
    "load_drafter": "checkpoints",
    "load_drafters": "checkpoints",
    "plain_generate": "decode.plain",
    "row_seed": "sampling",
    "save_drafter": "checkpoints",
    "validate_drafter": "checkpoints",
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
