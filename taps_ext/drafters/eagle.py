"""The EAGLE-2 drafter: one network over the target's features, with the target's own embedding and lm_head.

Committed slots lie in row layout: row b owns columns 0 .. lengths[b] - 1 of the caches, and slot i has rotary position
i. How trees grow from there, for one drafter or for several together, is in `growth.py`.

Source: EAGLE-2 (arXiv 2406.16858), section 4. Dims: B rows, T slots, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..products import pack_products
from ..sampling import SamplingRows
from ..tree import DraftTree, Lengths, TreeShape
from . import evidence
from .base import Drafter, DrafterState, DraftVocabulary
from .coupling import Calibration, CoupledRows
from .growth import EagleState, LogitRule, SharedEnds, grow
from .network import EagleConfig, EagleNetwork

__all__ = ["EagleConfig", "EagleDrafter", "EagleNetwork", "EagleState", "LogitRule", "compute_dtype_and_device"]


class EagleDrafter(Drafter):
    """Draft with an EAGLE-2 network and the target's own embedding and lm_head, held by reference.

    Only the rows of a draft vocabulary are copied of the lm_head.
    """

    def __init__(
        self,
        network: EagleNetwork,
        embedding: nn.Module,
        lm_head: nn.Module,
        name: str = "eagle",
        calibration: Calibration | None = None,
        rule: LogitRule | None = None,
        vocabulary: DraftVocabulary | None = None,
    ) -> None:
        """Take a network that is on the lm_head's device; one that is being trained can be measured and stays as it is.

        `calibration` is needed for coupled drafting; without it the drafter drafts as EAGLE-2 does. `rule` is what the
        target does with the lm_head's product, None: nothing. A wrong rule costs acceptance and never changes the text.
        `vocabulary` is what it can propose, None: every token. Raise ValueError if it is another target's, or if the
        lm_head's rows cannot be taken.
        """
        if vocabulary is not None and vocabulary.vocab_size != network.config.vocab_size:
            raise ValueError(
                f"the draft vocabulary is of {vocabulary.vocab_size} tokens, the drafter of {network.config.vocab_size}"
            )
        self.name = name
        self.vocab_size = network.config.vocab_size
        self.hidden_size = network.config.hidden_size
        self.network = network
        pack_products(network)
        self.calibration = calibration
        self.embedding = embedding
        self.lm_head = lm_head
        self.dtype, self.device = network.fc.weight.dtype, network.fc.weight.device
        head_dtype, _ = compute_dtype_and_device(lm_head, embedding)
        self.ends = SharedEnds(embedding, lm_head, head_dtype, rule or LogitRule(), vocabulary)

    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> EagleState:
        """See `Drafter.reset`. The caches are allocated by the first `observe`, when their size is known."""
        config, coupled = self.network.config, None
        if sampling is not None and self.calibration is not None:
            coupled = CoupledRows.of(self.calibration, sampling, self.device)
        with torch.inference_mode(False):  # ordinary tensors, so that every mode may write to them later
            empty = torch.zeros(
                batch_size, config.num_key_value_heads, 0, config.head_dim, dtype=self.dtype, device=self.device
            )
            return EagleState(
                lengths=Lengths.of([0] * batch_size, self.device),
                last_output=torch.zeros(batch_size, config.hidden_size, dtype=self.dtype, device=self.device),
                keys=empty,
                values=empty,
                coupled=coupled,
                decay=decay,
                evidence=None if decay is None else torch.zeros(batch_size, device=self.device),
            )

    @torch.no_grad()
    def observe(self, state: DrafterState, features: Tensor | None, next_tokens: Tensor, num_tokens: Lengths) -> None:
        """See `Drafter.observe`."""
        assert features is not None
        state = _own_state(state)
        assert features is not None
        self._check_observed(state, features, next_tokens, num_tokens)
        num_slots = num_tokens.longest
        if num_slots == 0:
            return
        counts = num_tokens.tensor.to(self.device)
        slots = torch.arange(num_slots, device=self.device)
        is_slot = slots < counts[:, None]
        # Padding may hold anything, NaN included, and zero times NaN would reach a row through its masked columns.
        tokens = torch.where(is_slot, next_tokens[:, :num_slots].to(self.device), 0)
        features = torch.where(is_slot[..., None], features[:, :num_slots].to(self.device, self.dtype), 0)
        outputs = self._extend_committed(state, self.ends.embed(tokens, features), features, slots)
        if state.decay is not None:
            self._keep_evidence(state, outputs, tokens, counts, state.decay)
        last = (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, outputs.shape[-1])
        state.last_output = torch.where((counts > 0)[:, None], outputs.gather(1, last)[:, 0], state.last_output)
        state.lengths = state.lengths.plus(num_tokens)

    def propose(self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> DraftTree:
        """See `Drafter.propose`."""
        return self.propose_together((), [state], root_tokens, shape, active)[0]

    @torch.no_grad()
    def propose_rows(
        self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor, rows: Sequence[int]
    ) -> DraftTree:
        """See `Drafter.propose_rows`: the other rows take no part in any forward."""
        if type(self) is not EagleDrafter:  # a subclass may propose otherwise
            return super().propose_rows(state, root_tokens, shape, active, rows)
        state = _own_state(state)
        places, device = torch.tensor(rows, device=self.device), root_tokens.device
        root_tokens, active = root_tokens.to(self.device), active.to(self.device)
        num_slots = state.lengths.longest + shape.frontier_slots(self.vocab_size)
        state.reserve(num_slots)  # or each copy would grow
        part = state.select(rows, places, num_slots)
        grown = grow([self.network], [part], self.ends, root_tokens[places], shape, active[places])
        return DraftTree.of_roots(root_tokens).padded(grown.capacity).with_rows(places, grown).to(device)

    def drafts_with(self, other: Drafter) -> bool:
        """See `Drafter.drafts_with`: both share the ends, dtype and device. A subclass drafts alone."""
        return (
            type(self) is type(other) is EagleDrafter
            and self.ends == other.ends
            and (self.dtype, self.device) == (other.dtype, other.device)
        )

    @torch.no_grad()
    def propose_together(
        self,
        others: Sequence[Drafter],
        states: Sequence[DrafterState],
        root_tokens: Tensor,
        shape: TreeShape,
        active: Tensor,
    ) -> list[DraftTree]:
        """See `Drafter.propose_together`."""
        networks = [self.network, *(other.network for other in others if isinstance(other, EagleDrafter))]
        here = root_tokens.to(self.device), shape, active.to(self.device)
        grown = grow(networks, [_own_state(state) for state in states], self.ends, *here)
        return [tree.to(root_tokens.device) for tree in _split(grown, len(networks))]

    def _extend_committed(self, state: EagleState, embeddings: Tensor, features: Tensor, slots: Tensor) -> Tensor:
        """Return the outputs [B, T, H] of new slots behind each row's committed ones.

        A row's padding lands behind its new length, where no mask shows it to anyone.
        """
        start = state.lengths.longest
        end = start + len(slots)
        state.reserve(end)
        keys, values = state.keys[:, :, :end], state.values[:, :, :end]
        columns = state.lengths.tensor[:, None] + slots
        if start == 0:  # nothing observed yet: plain causal attention among the new slots
            return self.network.extend(embeddings, features, columns, keys, values, slice(0, end), None)
        visible = torch.arange(end, device=self.device) <= columns[..., None]
        return self.network.extend(embeddings, features, columns, keys, values, columns, visible[:, None])

    def _keep_evidence(self, state: EagleState, outputs: Tensor, tokens: Tensor, counts: Tensor, decay: float) -> None:
        """Discount the evidence by the observed tokens, and add the log-probabilities that the drafter gave them."""
        assert state.evidence is not None
        tokens = self.ends.indices(tokens)
        is_prompt = state.lengths.tensor == 0
        gained, logits = evidence.of_observation(
            outputs, tokens, counts, is_prompt, decay, self.ends.logits, self.vocab_size
        )
        is_observed = counts > 0
        if state.last_logits is not None:  # the first token was predicted by the slot before
            first = evidence.token_log_probs(state.last_logits, tokens[:, 0], self.vocab_size)
            is_predicted = is_observed & (state.lengths.tensor > 0)
            gained = gained + torch.where(is_predicted, first * decay ** (counts - 1).clamp(min=0).float(), 0)
            logits = torch.where(is_observed[:, None], logits, state.last_logits)
        state.last_logits = logits
        state.evidence = state.evidence * decay ** counts.float() + gained

    def _check_observed(self, state: EagleState, features: Tensor, next_tokens: Tensor, num_tokens: Lengths) -> None:
        batch_size = len(state.lengths.host)
        if next_tokens.ndim != 2 or next_tokens.shape[0] != batch_size:
            raise ValueError(f"next_tokens must be [{batch_size}, T], got {list(next_tokens.shape)}")
        if features.shape != (*next_tokens.shape, self.hidden_size):
            raise ValueError(f"features must be {[*next_tokens.shape, self.hidden_size]}, got {list(features.shape)}")
        if len(num_tokens.host) != batch_size:
            raise ValueError(f"num_tokens must be [{batch_size}], got [{len(num_tokens.host)}]")
        if num_tokens.longest > next_tokens.shape[1]:
            raise ValueError(
                f"num_tokens must lie in 0..{next_tokens.shape[1]} (the slots given), got {num_tokens.longest}"
            )


def compute_dtype_and_device(lm_head: nn.Module, embedding: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the lm_head's dtype and device; a quantised lm_head has no dtype to compute in: then the embedding's."""
    embedded = next(embedding.parameters())
    weight = next(lm_head.parameters(), embedded)
    computes = weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return (weight if computes else embedded).dtype, weight.device


def _own_state(state: DrafterState) -> EagleState:
    if not isinstance(state, EagleState):
        raise TypeError(f"an EAGLE drafter needs the state that its reset() made, got {type(state).__name__}")
    return state


def _split(trees: DraftTree, num_drafters: int) -> list[DraftTree]:
    """Return each drafter's trees, of the trees of all, drafter by drafter."""
    assert trees.entropies is not None
    parts = (trees.tokens, trees.parents, trees.scores, trees.num_nodes, trees.entropies)
    return [
        DraftTree(tokens, parents, scores, num_nodes, entropies=entropies)
        for tokens, parents, scores, num_nodes, entropies in zip(
            *(part.chunk(num_drafters) for part in parts), strict=True
        )
    ]
