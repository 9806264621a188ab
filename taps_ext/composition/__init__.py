"""How several drafters make one tree: a policy a file, by name in `COMPOSITIONS`."""

from __future__ import annotations

from collections.abc import Callable

from .base import Composed, Composition
from .budget import share_budget
from .merging import Merging
from .routing import ConfidenceRouting, EntropyRouting, EvidenceRouting
from .single import Single

__all__ = ["COMPOSITIONS", "EVIDENCE_DECAY", "Composed", "Composition", "make_composition", "share_budget"]

EVIDENCE_DECAY = 0.95  # a token; the evidence of 45 tokens ago counts a tenth

COMPOSITIONS: dict[str, Callable[[int | None, float | None], Composition]] = {
    "single": lambda max_nodes, decay: Single(),
    "confidence": lambda max_nodes, decay: ConfidenceRouting(),
    "entropy": lambda max_nodes, decay: EntropyRouting(),
    "evidence": lambda max_nodes, decay: EvidenceRouting(EVIDENCE_DECAY if decay is None else decay),
    "merged": lambda max_nodes, decay: _merging(max_nodes, decay),
}


def make_composition(name: str, max_nodes: int | None = None, evidence_decay: float | None = None) -> Composition:
    """The composition of that name.

    Args:
        max_nodes: the node budget of a merged tree; None: the whole union.
        evidence_decay: how much of the evidence for a drafter is left after a token, 0.95 by default. "merged" weights
            its scores by evidence where there is `max_nodes` to share out, or a decay is given; 0 is for no weights.
    """
    if name not in COMPOSITIONS:
        raise ValueError(f"composition must be one of {', '.join(COMPOSITIONS)}, got {name!r}")
    if max_nodes is not None and name != "merged":
        raise ValueError(f"max_nodes budgets a merged tree, got composition {name!r}; set TreeShape.max_nodes instead")
    if evidence_decay is not None and name not in ("evidence", "merged"):
        raise ValueError(f"evidence_decay goes with composition evidence or merged, got {name!r}")
    return COMPOSITIONS[name](max_nodes, evidence_decay)


def _merging(max_nodes: int | None, decay: float | None) -> Merging:
    """Weighted by evidence where there is a budget to share out, or where asked for."""
    if decay is None and max_nodes is not None:
        decay = EVIDENCE_DECAY
    return Merging(max_nodes, None if decay == 0 else decay)
