"""Look-up drafters: draft what followed the same words before, in the row's own prompt and text. No model, no training.

Each row has an index (C++, on the host) of the tokens that followed its last 1 to `max_context` tokens before, and of
how probably they follow again: prediction by partial matching (Cleary and Witten, 1984), with hit rates that the row's
own text corrects as it grows. `csrc/lookup/lookup_index.h` says how. The work per token and per tree is bounded by
`max_context` and the tree's size, and does not grow with the text.

Dims: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..sampling import SamplingRows
from ..tree import DraftTree, Lengths, TreeShape
from .base import Drafter, DrafterState

MAX_CONTEXT = 32  # the longest that the native index takes


@dataclass(eq=False)
class LookupState(DrafterState):
    """Hold the index of each row, and the evidence for the drafter."""

    indices: list[Any]  # native LookupIndex, one per row
    noise: list[tuple[int, float]]  # per row, seed and temperature; temperature 0: drafts without the noise
    decay: float | None = None  # per token, of the evidence; None: keeps none
    evidence: Tensor | None = None  # float32 [B]


class LookupDrafter(Drafter):
    """Draft continuations that the row's own text has already had; it needs no training and no forward.

    Args:
        vocab_size: V, the target's.
        name: the drafter's name in stats and compositions.
        max_context: the longest run of tokens that is looked up, 1 to 32. Longer contexts find fewer, surer
            continuations; each one costs the same work and memory per token.

    >>> drafter = LookupDrafter(vocab_size=100)
    >>> state = drafter.reset(batch_size=1)
    >>> text = torch.tensor([[5, 6, 7, 8, 5, 6]])
    >>> drafter.observe(state, None, text, Lengths.of([6]))
    >>> drafter.propose(state, text[:, -1], TreeShape(depth=2, branching=1, max_nodes=3), torch.tensor([True])).tokens
    tensor([[6, 7, 8]])
    """

    uses_features = False
    hidden_size = 0

    def __init__(self, vocab_size: int, name: str = "lookup", max_context: int = 8) -> None:
        if isinstance(max_context, bool) or not isinstance(max_context, int) or not 1 <= max_context <= MAX_CONTEXT:
            raise ValueError(f"max_context must be an integer from 1 to {MAX_CONTEXT}, got {max_context!r}")
        self.name, self.vocab_size, self.max_context = name, vocab_size, max_context

    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> LookupState:
        """See `Drafter.reset`."""
        noise = [(0, 0.0)] * batch_size
        if sampling is not None:
            noise = list(zip(sampling.seeds.tolist(), sampling.temperature.tolist(), strict=True))
        return LookupState(
            indices=[native.load().LookupIndex(self.max_context) for _ in range(batch_size)],
            noise=noise,
            decay=decay,
            evidence=None if decay is None else torch.zeros(batch_size),
        )

    def observe(self, state: DrafterState, features: Tensor | None, next_tokens: Tensor, num_tokens: Lengths) -> None:
        """See `Drafter.observe`: the tokens of the text, on the host; there are no features."""
        state = _own_state(state)
        for row, (index, count) in enumerate(zip(state.indices, num_tokens.host, strict=True)):
            # The first observation is the prompt and one token behind it.
            log_probs = index.append(next_tokens[row, :count], is_prompt=index.size == 0)
            if state.evidence is not None and state.decay is not None and count:
                weights = state.decay ** torch.arange(count - 1, -1, -1)
                state.evidence[row] = state.evidence[row] * state.decay**count + (weights * log_probs).sum()

    def propose(self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> DraftTree:
        """See `Drafter.propose`."""
        return self.propose_rows(state, root_tokens, shape, active, range(len(root_tokens)))

    def propose_rows(
        self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor, rows: Sequence[int]
    ) -> DraftTree:
        """See `Drafter.propose_rows`."""
        state, batch_size = _own_state(state), len(root_tokens)
        capacity = shape.capacity(self.vocab_size)
        tokens, parents = (torch.zeros(batch_size, capacity, dtype=torch.int64) for _ in range(2))
        scores, entropies = torch.full((batch_size, capacity), -torch.inf), torch.zeros(batch_size, capacity)
        parents[:, 0], scores[:, 0] = -1, 0.0
        limits = shape.depth, shape.branching, -torch.inf if shape.min_score is None else shape.min_score
        counts = [1] * batch_size
        for row in rows:
            if state.indices[row].size:
                tree = tokens[row], parents[row], scores[row], entropies[row]
                counts[row] = state.indices[row].propose(*limits, *state.noise[row], *tree)
        # `active` may lie on a device, where the host must not read it: its rows are masked there.
        device = root_tokens.device
        num_nodes = torch.where(active, torch.tensor(counts).to(device, non_blocking=True), 1)
        grown = [values.to(device, non_blocking=True) for values in (tokens, parents, scores, entropies)]
        return _masked(DraftTree(grown[0], grown[1], grown[2], num_nodes, entropies=grown[3]), root_tokens)


def _masked(tree: DraftTree, root_tokens: Tensor) -> DraftTree:
    """Return the trees with their roots, and padding behind each row's nodes."""
    is_node = tree.is_node()
    tokens = torch.where(is_node, tree.tokens, 0)
    tokens[:, 0] = root_tokens
    assert tree.entropies is not None
    return DraftTree(
        tokens=tokens,
        parents=torch.where(is_node, tree.parents, 0),
        scores=torch.where(is_node, tree.scores, -torch.inf),
        num_nodes=tree.num_nodes,
        entropies=torch.where(is_node, tree.entropies, 0),
    )


def _own_state(state: DrafterState) -> LookupState:
    if not isinstance(state, LookupState):
        raise TypeError(f"a look-up drafter needs the state that its reset() made, got {type(state).__name__}")
    return state
