"""One decode step on the device: propose, score, verify, commit, observe.

This half takes and returns tensors; the host half is `decoder.py`. It reads no value from a device, with two
exceptions: a composition that chooses one drafter before any drafts (`evidence`) makes the host wait for the choice,
and transformers' logits processors run on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from ..composition import Composed, Composition, add_tree, share_budget
from ..drafters import Drafter, DrafterState, LookupDrafter
from ..drafters.lookup import Store
from ..sampling import SamplingRows
from ..target.model import TargetModel
from ..tree import DraftTree, Lengths, TreeShape
from .budget import StepPlan
from .processors import process_logits
from .request import Request
from .state import Acceptance, DecodeState, Observation, StepOutput

# How often the token behind a match of 1, 2, ... tokens of a row's own text is the next one: measured on the answers of
# SmolLM2-135M-Instruct to 128 questions, greedy.
MATCH_CONFIDENCES = (0.25, 0.57, 0.64, 0.66, 0.71, 0.78, 0.8, 0.8, 0.8, 0.8, 0.82, 0.91)
MATCH_LOG_PROBS = [math.log(confidence) for confidence in MATCH_CONFIDENCES]
MATCH_WINDOW = 4096  # tokens: a step costs the same in a text of any length
MAX_EXTENSION = 8  # nodes below a leaf


class DecodeStep:
    """Run decode steps with a target, drafters and a composition. Immutable: what changes is in the `DecodeState`."""

    def __init__(
        self,
        target: TargetModel,
        drafters: Sequence[Drafter],
        composition: Composition,
        shape: TreeShape,
        joint_budget: int | None,
        extend: bool,
        store: Store | None,
    ) -> None:
        self.target = target
        self.drafters = tuple(drafters)
        self.composition = composition
        self.shape = shape
        self.joint_budget = joint_budget
        self.extend = extend
        self.root_drafter = None if store is None else LookupDrafter(target.vocab_size, store=store)
        self.groups = group_drafters(self.drafters)

    def reset(self, batch_size: int, sampling: SamplingRows | None) -> list[DrafterState]:
        """Return a fresh state per drafter; `sampling` is for coupled drafting, None for drafting without the noise."""
        return [drafter.reset(batch_size, sampling, self.composition.decay) for drafter in self.drafters]

    def prefill(self, request: Request, state: DecodeState) -> StepOutput:
        """Commit the prompts and draw each row's first token."""
        columns, lengths = request.columns(), Lengths.of(request.prompt_lengths, self.target.device)
        tokens = request.input_ids.gather(1, columns).to(self.target.device)
        if request.prepared is None:
            scored = self.target.prefill(tokens, lengths, state.kv)
        else:
            scored = self.target.prefill_prepared(request.prepared, columns.to(tokens.device), lengths, state.kv)
        last = lengths.tensor[:, None] - 1
        roots = DraftTree.of_roots(tokens.gather(1, last)[:, 0])
        acceptance, log_probs = self.verify(request, state, roots, scored.logits, lengths.tensor)
        state.root_tokens = acceptance.bonus_tokens.clamp_min(0)
        next_tokens = tokens.roll(-1, dims=1).scatter(1, last, state.root_tokens[:, None])
        if state.text is not None:
            state.text[:, 0] = tokens[:, 0]
            state.text[:, 1 : 1 + tokens.shape[1]] = next_tokens
        return StepOutput(
            roots, acceptance, scored.features, next_tokens, lengths.tensor, log_probs=log_probs, is_prefill=True
        )

    def run(self, request: Request, state: DecodeState) -> StepOutput:
        """Propose, score and verify one tree per row; finished rows take part as padding."""
        plan = state.budget.plan() if state.budget is not None else StepPlan(self.shape, (True,) * len(self.drafters))
        if not any(plan.drafts):
            return self._run_plain(request, state)
        composed, outlook = self.propose(plan, state), None
        if state.budget is not None and state.budget.is_concerned(composed.tree, self._is_costly(plan)):
            tree, outlook = state.budget.cut(composed.tree, state.active)
            composed = replace(composed, tree=_trimmed(tree))
        scored = self.target.score(composed.tree, state.kv, state.last_positions)
        positions = state.kv.lengths.tensor + 1
        acceptance, log_probs = self.verify(request, state, composed.tree, scored.logits, positions)
        return StepOutput(
            tree=composed.tree,
            acceptance=acceptance,
            features=scored.features,
            next_tokens=acceptance.tokens.clamp_min(0),
            num_committed=torch.where(state.active, acceptance.num_accepted + 1, 0),
            choice=composed.choice,
            log_probs=log_probs,
            outlook=outlook,
        )

    def _run_plain(self, request: Request, state: DecodeState) -> StepOutput:
        """Score and verify the roots alone; this costs what a step of plain decoding does, so each op counts."""
        roots = replace(state.roots, tokens=state.root_tokens[:, None])
        scored = self.target.score(roots, state.kv, state.last_positions if len(state.rows) > 1 else None)
        acceptance, log_probs = self.verify(request, state, roots, scored.logits, state.kv.lengths.tensor + 1)
        next_tokens = acceptance.tokens.clamp_min(0)
        return StepOutput(roots, acceptance, scored.features, next_tokens, state.active.long(), log_probs=log_probs)

    def propose(self, plan: StepPlan, state: DecodeState) -> Composed:
        """Return the tree to verify, made by the planned drafters, or of those that the composition chooses."""
        with state.kv.products.running():
            composed = self._compose(plan, state)
        return replace(composed, tree=_trimmed(composed.tree))

    def _compose(self, plan: StepPlan, state: DecodeState) -> Composed:
        """Return one tree of the planned drafters' trees."""
        evidence = None
        if self.composition.decay is not None:
            evidence = self._evidence(plan, state).to(state.root_tokens.device)
        choice = self.composition.choose(evidence)
        rows = state.root_tokens, plan.shape, state.active
        if choice is None:
            trees = self._draft(plan, state)
        else:  # nobody drafts for a row that has ended
            is_over = [row.finish_reason is not None for row in state.rows]
            chosen = [-1 if over else index for over, index in zip(is_over, choice.tolist(), strict=True)]
            trees = draft_chosen(self.drafters, chosen, state.drafter_states, *rows)
        self._refuse_other_capacities(trees, plan.shape)
        composed = self.composition.compose(trees, evidence)
        if state.text is not None:
            composed = replace(composed, tree=self._extended(composed.tree, state.text, plan.shape, state))
        if self.joint_budget is not None:
            composed = replace(composed, tree=share_budget(composed.tree, self.joint_budget))
        return composed

    def _is_costly(self, plan: StepPlan) -> bool:
        """Return whether a network drafts."""
        return any(drafts and drafter.uses_features for drafter, drafts in zip(self.drafters, plan.drafts, strict=True))

    def _draft(self, plan: StepPlan, state: DecodeState) -> list[DraftTree]:
        """Return a tree per drafter, only roots for those that the plan leaves out."""
        groups = [part for group in self.groups if (part := [index for index in group if plan.drafts[index]])]
        for index in (index for group in groups for index in group):
            self._catch_up(index, state)
        trees = draft(self.drafters, groups, state.drafter_states, state.root_tokens, plan.shape, state.active)
        roots = DraftTree.of_roots(state.root_tokens)
        return [
            trees[index] if index in trees else roots.padded(plan.shape.capacity(drafter.vocab_size))
            for index, drafter in enumerate(self.drafters)
        ]

    def verify(
        self, request: Request, state: DecodeState, tree: DraftTree, logits: Tensor, positions: Tensor
    ) -> tuple[Acceptance, Tensor | None]:
        """Return the acceptance and, if asked for, the raw log-probabilities [B, N] of its tokens.

        `positions`, int64 [B], are those of the tokens drawn at the roots.
        """
        processed = logits
        if request.processors:
            prefixes = [row.prompt + row.new_tokens for row in state.rows]
            processed = process_logits(request.processors, logits, tree, prefixes)
        acceptance = verify(processed, tree, state.sampling, positions)
        if not request.return_log_probs:
            return acceptance, None
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        log_probs = logits[rows, acceptance.path.clamp_min(0)].float().log_softmax(dim=-1)
        return acceptance, log_probs.gather(2, acceptance.tokens.clamp_min(0)[:, :, None])[:, :, 0]

    def commit(self, output: StepOutput, committed: Lengths, state: DecodeState) -> None:
        """Keep the accepted paths in the target's cache; the bonus tokens become the new roots.

        `committed` are `output.num_committed`, with their copy on the host.
        """
        if state.text is not None:
            _append(state.text, state.kv.lengths.tensor + 1, output.acceptance.tokens, output.num_committed)
        self.target.commit(output.acceptance.path, state.kv.lengths.plus(committed), state.kv)
        state.root_tokens = output.acceptance.bonus_tokens.clamp_min(0)

    def observe(self, output: StepOutput, num_tokens: Lengths, state: DecodeState) -> None:
        """Keep the committed tokens with the target's features, `num_tokens` of each row, for the drafters.

        A drafter observes them when it drafts next: one that is left out for some steps then observes all at once.
        """
        num_slots = num_tokens.longest
        if num_slots == 0:
            return
        features, next_tokens = output.features, output.next_tokens
        if not output.is_prefill and output.tree.capacity > 1:
            path = output.acceptance.path[:, :num_slots].clamp_min(0)
            features = features.gather(1, path[:, :, None].expand(-1, -1, features.shape[-1]))
            next_tokens = next_tokens[:, :num_slots]
        observation = Observation(features, next_tokens, num_tokens)
        for drafter, pending in zip(self.drafters, state.pending, strict=True):
            if drafter.uses_features:
                pending.append(observation)

    def _extended(self, tree: DraftTree, text: Tensor, shape: TreeShape, state: DecodeState) -> DraftTree:
        """Return the best nodes of the trees, of what a store says of their roots, and of what their leaves continue in
        the rows' own texts.

        The number of slots stays, and the new nodes have a proposer bit of their own, behind the drafters'.
        """
        bit, capacity = 1 << len(self.drafters), tree.capacity
        if self.root_drafter is not None and state.root_state is not None:
            deep = replace(shape, depth=MAX_EXTENSION)
            looked_up = self.root_drafter.propose(state.root_state, state.root_tokens, deep, state.active)
            tree = add_tree(tree, looked_up, bit)
        lengths = torch.where(state.active, state.kv.lengths.tensor + 1, 0)
        longer = ops.extend_tree(tree, text, lengths, MATCH_LOG_PROBS, MAX_EXTENSION, MATCH_WINDOW, bit)
        if shape.min_score is not None:
            is_low = (longer.proposers == bit) & (longer.scores < shape.min_score)
            longer = replace(longer, scores=longer.scores.masked_fill(is_low, -torch.inf))
        return ops.prune_tree(longer, capacity)

    def _catch_up(self, index: int, state: DecodeState) -> None:
        """Show a drafter what it has not observed yet."""
        pending = state.pending[index]
        if pending:
            observed = Observation.join(pending)
            pending.clear()
            self.drafters[index].observe(state.drafter_states[index], *vars(observed).values())

    def _refuse_other_capacities(self, trees: Sequence[DraftTree], shape: TreeShape) -> None:
        for drafter, tree in zip(self.drafters, trees, strict=True):
            capacity = shape.capacity(drafter.vocab_size)
            if (num_slots := tree.tokens.shape[1]) != capacity:
                raise ValueError(
                    f"drafter {drafter.name!r} proposed a tree of {num_slots} slots; pad it to the {capacity} of "
                    "shape.capacity(vocab_size)"
                )

    def _evidence(self, plan: StepPlan, state: DecodeState) -> Tensor:
        """Return the evidence for every drafter, float32 [D, B]; -inf for those that are left out of this step."""
        parts = []
        for index, (drafter, own) in enumerate(zip(self.drafters, state.drafter_states, strict=True)):
            if plan.drafts[index]:
                self._catch_up(index, state)
            if own.evidence is None:
                raise ValueError(
                    f"drafter {drafter.name!r} keeps no evidence; use another composition, or evidence_decay=0 with "
                    "merged"
                )
            parts.append(own.evidence if plan.drafts[index] else torch.full_like(own.evidence, -torch.inf))
        return torch.stack([part.to(parts[0].device) for part in parts])


def _trimmed(tree: DraftTree) -> DraftTree:
    """Return the trees without unused slots; on a device the host would have to wait to know them."""
    return tree.trimmed(int(tree.num_nodes.max())) if tree.tokens.is_cpu else tree


def _append(text: Tensor, lengths: Tensor, tokens: Tensor, counts: Tensor) -> None:
    """Write the first `counts` [B] of `tokens` [B, N] behind each row's text; the last column takes the rest.

    That column is never read: it keeps the indices in range where the host does not know the lengths.
    """
    slots = torch.arange(tokens.shape[1], device=tokens.device)
    last = text.shape[1] - 1
    places = torch.where(slots < counts[:, None], lengths[:, None] + slots, last)
    text.scatter_(1, places.clamp_max(last), tokens)


def verify(logits: Tensor, tree: DraftTree, sampling: SamplingRows, positions: Tensor) -> Acceptance:
    """Walk each tree with the target's own draws: sample, then match.

    `positions`, int64 [B], are those of the tokens drawn at the roots.
    """
    walk = ops.verify_tree(
        logits,
        tree,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seeds,
        positions,
    )
    tokens = walk.bonus_tokens[:, None]
    if tree.capacity > 1:
        followers = pad(walk.path[:, 1:], (0, 1), value=-1)
        accepted = torch.where(followers >= 0, tree.tokens.gather(1, followers.clamp_min(0)), -1)
        tokens = accepted.scatter(1, walk.num_accepted[:, None], tokens)
    return Acceptance(walk.path, walk.num_accepted, tokens, walk.bonus_tokens, walk.status != 0)


def group_drafters(drafters: Sequence[Drafter]) -> list[list[int]]:
    """Return groups of indices: drafters that draft together share a group, in their order."""
    groups: list[list[int]] = []
    for index, drafter in enumerate(drafters):
        for group in groups:
            if drafters[group[0]].drafts_with(drafter):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def draft(
    drafters: Sequence[Drafter],
    groups: Sequence[Sequence[int]],
    states: Sequence[DrafterState],
    root_tokens: Tensor,
    shape: TreeShape,
    active: Tensor,
) -> dict[int, DraftTree]:
    """Return the tree of each drafter in `groups` (see `group_drafters`), by its index."""
    trees: dict[int, DraftTree] = {}
    for group in groups:
        first, *others = (drafters[index] for index in group)
        own_states = [states[index] for index in group]
        if others:
            together = first.propose_together(others, own_states, root_tokens, shape, active)
        else:
            together = [first.propose(own_states[0], root_tokens, shape, active)]
        trees |= zip(group, together, strict=True)
    return trees


def draft_chosen(
    drafters: Sequence[Drafter],
    chosen: Sequence[int],
    states: Sequence[DrafterState],
    root_tokens: Tensor,
    shape: TreeShape,
    active: Tensor,
) -> list[DraftTree]:
    """Return a tree per drafter, where row b is drafted by drafter `chosen[b]` only (-1: by none)."""
    trees = []
    for index, (drafter, state) in enumerate(zip(drafters, states, strict=True)):
        rows = [row for row, drafting in enumerate(chosen) if drafting == index]
        if not rows:
            trees.append(DraftTree.of_roots(root_tokens).padded(shape.capacity(drafter.vocab_size)))
        elif len(rows) == len(chosen):
            trees.append(drafter.propose(state, root_tokens, shape, active))
        else:
            trees.append(drafter.propose_rows(state, root_tokens, shape, active, rows))
    return trees
