"""Look-up drafters: they propose what followed the last tokens earlier in the same text, without training or forwards.

Each row has an index of its own text, in C++ on the host (`csrc/lookup`), that says which tokens followed the row's
last 1 to `max_context` tokens before, and how probably they follow again. The row's own hits and misses correct these
probabilities as the text grows, also while nothing is drafted. A corpus store adds what followed these tokens in other
texts: it is asked once a step and row, for the end of the text.

Dims: B rows, T slots, N nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import native
from ..sampling import SamplingRows
from ..tree import DraftTree, Lengths, TreeShape
from . import evidence
from .base import Drafter, DrafterState
from .coupling import Calibration, CoupledRows

MAX_CONTEXT = 8  # contexts of 12 and 16 tokens accept no more, and take half as much and twice as much memory again

STORE_CONTEXT = 16  # tokens at the end of a text that a store is asked for

Noise = tuple[int, float, float]  # seed, alpha / T and beta


@dataclass(frozen=True)
class Continuations:
    """Hold what followed a context in some documents."""

    length: int  # of the longest match, in tokens; 0: the context's last token is nowhere followed by another one
    num_occurrences: int  # of a match of this length
    tokens: list[list[int]]  # that followed some of them, each at least one token and within its document


class Store(Protocol):
    """What a look-up drafter reads beside the row's own text: a `taps.CorpusStore`, or anything that does the same."""

    vocab_size: int

    def continuations(self, context: Sequence[int], max_context: int) -> Continuations:
        """Return what followed the longest match, of at most `max_context` tokens, of the context's last tokens."""


@dataclass(eq=False)
class LookupState(DrafterState):
    """Hold the index of each row's text."""

    indices: list[Any]  # native LookupIndex, one per row
    tails: list[list[int]]  # the last `STORE_CONTEXT` tokens of each row, if there is a store
    noises: list[Noise | None]  # per row; None: drafts without the noise
    decay: float | None  # of the evidence; None: it is not kept
    evidence: Tensor | None = None


class LookupDrafter(Drafter):
    """Draft what followed the text's last tokens before: for any target, without training.

    `taps.load_drafters({"lookup": "lookup"}, target)` makes one, too. A step costs microseconds, whatever the length of
    the text. With a `taps.CorpusStore`, it also drafts what followed in other texts.

    >>> drafter = LookupDrafter(vocab_size=10)
    >>> state = drafter.reset(1)
    >>> drafter.observe(state, None, torch.tensor([[7, 8, 9, 7]]), Lengths.of([4]))
    >>> drafter.propose(state, torch.tensor([7]), TreeShape(2, 1, 3), torch.tensor([True])).tokens
    tensor([[7, 8, 9]])
    """

    uses_features = False
    # Fitted to texts that SmolLM2-135M-Instruct drew at T = 0.4, 0.7 and 1 (64 each). Look-ups know the target less
    # well than a network does, so the noise counts less.
    calibration = Calibration(temperatures=(1.0,), alpha=((0.87,),), beta=((0.47,),))

    def __init__(
        self, vocab_size: int, name: str = "lookup", max_context: int = MAX_CONTEXT, store: Store | None = None
    ) -> None:
        """Take the target's vocabulary size, and what to look up.

        Args:
            max_context: the number of tokens of the longest context to look up in the row's own text.
            store: a `taps.CorpusStore` of this vocabulary to read, too; all rows and calls share it.
        """
        if store is not None and store.vocab_size != vocab_size:
            raise ValueError(
                f"the store has vocabulary {store.vocab_size}, the target {vocab_size}; build one with taps-ext index "
                "--target"
            )
        self.name = name
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.store = store
        native.load().LookupIndex(max_context)  # raises ValueError for a length that no index has

    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> LookupState:
        """See `Drafter.reset`."""
        new_index = native.load().LookupIndex
        indices = [new_index(self.max_context) for _ in range(batch_size)]
        with torch.inference_mode(False):  # an ordinary tensor, so that every mode may write to it later
            kept = None if decay is None else torch.zeros(batch_size)
        tails: list[list[int]] = [[] for _ in range(batch_size)]
        return LookupState(indices, tails, _noises(self.calibration, sampling, batch_size), decay, kept)

    def observe(self, state: DrafterState, features: Tensor | None, next_tokens: Tensor, num_tokens: Lengths) -> None:
        """See `Drafter.observe`: the rows' own texts, on the CPU."""
        assert isinstance(state, LookupState)
        for row, (index, count) in enumerate(zip(state.indices, num_tokens.host, strict=True)):
            is_prompt = index.size == 0
            log_probs = index.append(next_tokens[row, :count], is_prompt)
            if state.evidence is not None and state.decay is not None:
                gained = evidence.of_text(log_probs, is_prompt, state.decay)
                state.evidence[row] = state.evidence[row] * state.decay**count + gained
            if self.store is not None and count > 0:
                first = max(0, count - STORE_CONTEXT)
                tail = (state.tails[row] + next_tokens[row, first:count].tolist())[-STORE_CONTEXT:]
                found = self.store.continuations(tail, STORE_CONTEXT)
                index.take_runs(found.length, found.tokens)
                state.tails[row] = tail

    def propose(self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> DraftTree:
        """See `Drafter.propose`. Rows that are not active are drafted too: the host does not wait to know them."""
        assert isinstance(state, LookupState)
        capacity = shape.capacity(self.vocab_size)
        least = -math.inf if shape.min_score is None else shape.min_score
        tree = DraftTree.of_roots(torch.zeros(len(state.indices), dtype=torch.int64)).padded(capacity)
        rows = zip(tree.tokens, tree.parents, tree.scores, tree.entropies, strict=True)  # type: ignore[arg-type]
        counts = [
            index.propose(shape.depth, shape.branching, least, noise, *row)
            for index, noise, row in zip(state.indices, state.noises, rows, strict=True)
        ]
        tree.num_nodes.copy_(torch.tensor(counts))
        return tree.to(root_tokens.device).rooted(root_tokens, active)


def _noises(calibration: Calibration, sampling: SamplingRows | None, batch_size: int) -> list[Noise | None]:
    """Return how each row uses the noise of the target's draws; None without a sampling and at temperature 0."""
    if sampling is None:
        return [None] * batch_size
    rows = CoupledRows.of(calibration, sampling, torch.device("cpu"))
    columns = (rows.seeds, rows.temperature, rows.alpha[0], rows.beta[0])
    settings = zip(*(column.tolist() for column in columns), strict=True)
    return [(seed, alpha / t, beta) if t > 0 else None for seed, t, alpha, beta in settings]
