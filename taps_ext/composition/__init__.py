"""How several drafters make one tree: a policy a file, by name in `COMPOSITIONS`."""

from __future__ import annotations

from collections.abc import Callable

from .base import Composed, Composition
from .merging import Merging
from .routing import ConfidenceRouting, EntropyRouting
from .single import Single

__all__ = ["COMPOSITIONS", "Composed", "Composition", "make_composition"]

COMPOSITIONS: dict[str, Callable[[int | None], Composition]] = {
    "single": lambda max_nodes: Single(),
    "confidence": lambda max_nodes: ConfidenceRouting(),
    "entropy": lambda max_nodes: EntropyRouting(),
    "merged": Merging,
}


def make_composition(name: str, max_nodes: int | None = None) -> Composition:
    """The composition of that name; `max_nodes` is the node budget of a merged tree (None: the whole union)."""
    if name not in COMPOSITIONS:
        raise ValueError(f"composition must be one of {', '.join(COMPOSITIONS)}, got {name!r}")
    if max_nodes is not None and name != "merged":
        raise ValueError(f"max_nodes budgets a merged tree, got composition {name!r}; set TreeShape.max_nodes instead")
    return COMPOSITIONS[name](max_nodes)
