"""The speculative decoder: propose, score, verify, commit, observe."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..composition import Composed, make_composition, share_budget
from ..drafters import Drafter, GroupedDrafters
from ..sampling import SamplingParams
from ..target.model import TargetModel
from ..tree import DraftTree, TreeShape
from . import processors, transformers_door
from .request import Request
from .state import DecodeState, RowText, StepEvent, StepRecord
from .stats import DecodeStats
from .used_drafters import used_drafters, warn_of_uncalibrated
from .verification import Acceptance, verify


@dataclass(frozen=True)
class GenerationResult:
    """The texts of one call, and how they came about."""

    sequences: Tensor  # int64 [B, P + longest]: the prompts as given, each row's new tokens, padding
    new_tokens: list[list[int]]
    finish_reasons: list[str]  # "eos", "length", "stop_string", "stopping_criteria" or "invalid_logits", per row
    stats: DecodeStats
    log_probs: list[list[float]] | None  # of each new token under the target's raw distribution; when asked for


class SpeculativeDecoder:
    """Drives a stock target with one or several drafters; the text is the target's own, token by token.

    Immutable: every call owns its `DecodeState`, so that threads can share one decoder. It is also a
    `custom_generate` for `target.generate(...)`.

    Args:
        target: a Hugging Face causal LM, or a `TargetModel`.
        drafters: by name, from `load_drafters`; their order breaks ties.
        composition: "single", "confidence", "entropy", "evidence" or "merged".
        drafter: the name to use with "single" when there are several.
        shape: the tree that each drafter grows.
        max_nodes: the node budget of a merged tree; None verifies the whole union.
        drafting: "coupled" lets calibrated drafters look at the noise that the target will draw with, so that they
            propose what it is about to draw; "topk" proposes what is likely. The same at temperature 0.
        evidence_decay: what is left of the evidence for a drafter after a token, 0.95 by default. "merged" weights its
            scores by evidence where there is `max_nodes` to share out, or a decay is given; 0 is for no weights.
        joint_budget: the nodes that all rows of a batch verify together in a step, roots included: the best ones,
            wherever they are.
    """

    def __init__(
        self,
        target: PreTrainedModel | TargetModel,
        drafters: Mapping[str, Drafter],
        composition: str = "merged",
        *,
        drafter: str | None = None,
        shape: TreeShape | None = None,
        max_nodes: int | None = None,
        drafting: str = "coupled",
        evidence_decay: float | None = None,
        joint_budget: int | None = None,
    ) -> None:
        self.composition = make_composition(composition, max_nodes, evidence_decay)
        self.drafting = check_drafting(drafting)
        self.joint_budget = _check_joint_budget(joint_budget)
        self.target = target if isinstance(target, TargetModel) else TargetModel(target)
        self.shape = shape or TreeShape()
        self.drafters = used_drafters(drafters, composition, drafter, self.target)
        self._composition_name = composition
        self.grouped_drafters = GroupedDrafters(list(self.drafters.values()))

    def with_drafters(self, drafters: Mapping[str, Drafter], drafter: str | None = None) -> SpeculativeDecoder:
        """The same decoder with other drafters: to load or drop one while the target stays. Running calls keep theirs.

        `drafter` is the name to use with "single", by default the same as here where it is still there.

        >>> decoder = decoder.with_drafters({**decoder.drafters, "code": load_drafter("code", model)})  # doctest: +SKIP
        """
        name = next(iter(self.drafters))
        if (
            self._composition_name == "single"
            and drafter is None
            and isinstance(drafters, Mapping)
            and name in drafters
        ):
            drafter = name
        other = copy(self)
        other.drafters = used_drafters(drafters, self._composition_name, drafter, self.target)
        other.grouped_drafters = GroupedDrafters(list(other.drafters.values()))
        return other

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | Sequence[int] = 128,
        eos_token_id: int | Collection[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        logits_processor: Any = None,
        streamer: Any = None,
        return_log_probs: bool = False,
    ) -> GenerationResult:
        """Generate from prompts int64 [B, P], padded anywhere as `attention_mask` says.

        Args:
            sampling: temperature, filters and seed, one or one a row; greedy by default.
            max_new_tokens: exact, one or one a row.
            eos_token_id: one, several, or () for none; default: the target's generation config.
            stop_strings, tokenizer: end a row with the token that completes one of the strings.
            logits_processor: further transformers logits processors, applied before the temperature, per node.
            streamer: transformers' protocol (`put`, `end`), for a batch of one.
            return_log_probs: also return each new token's log-probability under the raw target distribution.
        """
        request = Request.build(
            self.target.model,
            input_ids,
            attention_mask,
            sampling,
            max_new_tokens,
            eos_token_id,
            stop_strings,
            tokenizer,
            logits_processor,
            return_log_probs=return_log_probs,
        )
        return self._run(request, streamer)

    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Generator[StepEvent, None, GenerationResult]:
        """`generate`, step by step (its arguments but `streamer`): the first event brings each row's first token.

        The generator's return value (`result = yield from decoder.stream(...)`) is what `generate` returns.
        """
        request = Request.build(self.target.model, input_ids, attention_mask, **kwargs)
        return self._events(request, self._begin(request))

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, taps_streamer: Any = None, **kwargs: Any) -> Any:
        """transformers' door: `target.generate(**inputs, custom_generate=decoder, ...)`.

        transformers drops `streamer` and `tokenizer` for callables: pass `taps_streamer=...`, and stop strings as
        `stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, [...])])`.
        """
        if model is not self.target.model:
            raise ValueError("this decoder drives another model; build a SpeculativeDecoder for the one that generates")
        request = transformers_door.request_from_generate(model, input_ids, **kwargs)
        result = self._run(request, taps_streamer)
        return transformers_door.output(result.sequences, result.stats, kwargs["generation_config"])

    def _run(self, request: Request, streamer: Any) -> GenerationResult:
        if streamer is not None and len(request.input_ids) > 1:
            raise ValueError(f"a streamer takes a batch of one, got {len(request.input_ids)} rows; use stream()")
        state = self._begin(request)
        if streamer is not None:
            streamer.put(request.input_ids.cpu())
        for event in self._events(request, state):
            if streamer is not None and event.new_tokens[0]:
                streamer.put(torch.tensor(event.new_tokens[0]))
        if streamer is not None:
            streamer.end()
        return _result(request, state)

    def _events(self, request: Request, state: DecodeState) -> Generator[StepEvent, None, GenerationResult]:
        yield self._prefill(request, state)
        while not state.is_finished:
            yield self._step(request, state)
        return _result(request, state)

    def _begin(self, request: Request) -> DecodeState:
        """A call's own state; the last checks before any work."""
        batch_size, device = len(request.input_ids), self.target.device
        longest = [a + b for a, b in zip(request.prompt_lengths, request.rules.max_new_tokens, strict=True)]
        self.target.refuse_longer_than_exact(max(longest))
        if self.joint_budget is not None and self.joint_budget < batch_size:
            raise ValueError(f"joint_budget {self.joint_budget} is less than a node for each of the {batch_size} rows")
        sampling = request.sampling.rows(batch_size, device)
        looks = self.drafting == "coupled" and request.sampling.is_sampled
        if looks:
            warn_of_uncalibrated(self.drafters)
        return DecodeState(
            kv=self.target.new_cache(batch_size),
            drafter_states=self.grouped_drafters.reset(batch_size, sampling if looks else None, self.composition.decay),
            sampling=sampling,
            rules=request.rules,
            rows=[RowText(prompt) for prompt in request.input_ids.tolist()],
            stats=DecodeStats(tuple(self.drafters), batch_size),
            prefix_lengths=torch.zeros(batch_size, dtype=torch.int64, device=device),
            last_positions=torch.tensor(longest, device=device) - 2,
            root_tokens=torch.zeros(batch_size, dtype=torch.int64, device=device),
            active=torch.ones(batch_size, dtype=torch.bool, device=device),
        )

    @torch.inference_mode()
    def _prefill(self, request: Request, state: DecodeState) -> StepEvent:
        """Commit the prompts, draw each row's first token, and show both to the drafters."""
        tokens = request.packed(self.target.device)
        scored = self.target.prefill(tokens, request.prompt_lengths, state.kv)
        lengths = torch.tensor(request.prompt_lengths, device=tokens.device)
        last = lengths[:, None] - 1
        root = DraftTree.of_roots(tokens.gather(1, last)[:, 0])
        acceptance, log_probs = self._verify(request, state, root, scored.logits, positions=lengths)
        event = state.advance(StepRecord.fetch(root, acceptance, lengths, log_probs=log_probs, is_prefill=True))
        state.prefix_lengths = lengths
        state.root_tokens = acceptance.bonus_tokens.clamp_min(0)
        next_tokens = tokens.roll(-1, dims=1).scatter(1, last, state.root_tokens[:, None])
        self._observe(state, scored.features, next_tokens, lengths, request.prompt_lengths)
        return event

    @torch.inference_mode()
    def _step(self, request: Request, state: DecodeState) -> StepEvent:
        """One decode step of every row that still decodes; the others ride along as padding."""
        composed = self._propose(state)
        scored = self.target.score(composed.tree, state.prefix_lengths, state.kv, state.last_positions)
        positions = state.prefix_lengths + 1
        acceptance, log_probs = self._verify(request, state, composed.tree, scored.logits, positions)
        num_committed = torch.where(state.active, acceptance.num_accepted + 1, 0)
        lengths = state.prefix_lengths + num_committed
        record = StepRecord.fetch(composed.tree, acceptance, lengths, composed.choice, log_probs)
        self.target.commit(acceptance.path, num_committed - 1, state.prefix_lengths, state.kv, record.lengths)
        state.prefix_lengths = lengths
        state.root_tokens = torch.where(state.active, acceptance.bonus_tokens.clamp_min(0), state.root_tokens)
        event = replace(state.advance(record), tree=composed.tree, path=acceptance.path)
        path = acceptance.path[:, : max(record.num_accepted) + 1].clamp_min(0)
        features = scored.features.gather(1, path[:, :, None].expand(-1, -1, scored.features.shape[-1]))
        tokens = acceptance.tokens[:, : path.shape[1]].clamp_min(0)
        self._observe(state, features, tokens, num_committed, [count + 1 for count in record.num_accepted])
        return event

    def _propose(self, state: DecodeState) -> Composed:
        """The tree to verify. Where one drafter is chosen before any drafts, the host waits to know which."""
        drafters, evidence = self.grouped_drafters, None
        if self.composition.decay is not None:
            evidence = drafters.evidence(state.drafter_states).to(state.root_tokens.device)
        choice = self.composition.choose(evidence)
        chosen = None
        if choice is not None:  # nobody drafts for a row that has ended
            ended = [row.finish_reason is not None for row in state.rows]
            chosen = [-1 if over else drafter for over, drafter in zip(ended, choice.tolist(), strict=True)]
        trees = drafters.propose(state.drafter_states, state.root_tokens, self.shape, state.active, chosen)
        composed = self.composition.compose(trees, evidence)
        if self.joint_budget is not None:
            composed = replace(composed, tree=share_budget(composed.tree, self.joint_budget))
        if composed.tree.tokens.device.type != "cpu":
            return composed  # there the static capacity saves a host synchronisation
        return replace(composed, tree=composed.tree.trimmed(int(composed.tree.num_nodes.max())))

    def _verify(
        self, request: Request, state: DecodeState, tree: DraftTree, logits: Tensor, positions: Tensor
    ) -> tuple[Acceptance, Tensor | None]:
        """The acceptance, and on request the raw log-probabilities [B, most accepted + 1] of its tokens."""
        processed = logits
        if request.processors:
            prefixes = [row.prompt + row.new_tokens for row in state.rows]
            processed = processors.process(request.processors, logits, tree, prefixes)
        acceptance = verify(processed, tree, state.sampling, positions)
        if not request.return_log_probs:
            return acceptance, None
        width = min(self.shape.depth + 1, tree.capacity)  # the longest path there can be: the host knows no more yet
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        log_probs = logits[rows, acceptance.path[:, :width].clamp_min(0)].float().log_softmax(dim=-1)
        return acceptance, log_probs.gather(2, acceptance.tokens[:, :width].clamp_min(0)[:, :, None])[:, :, 0]

    def _observe(
        self, state: DecodeState, features: Tensor, next_tokens: Tensor, num_tokens: Tensor, counts: Sequence[int]
    ) -> None:
        """Show the drafters what was committed; `counts` is `num_tokens` on the host. Finished rows see no more."""
        if state.is_finished:
            return
        num_tokens = torch.where(state.active, num_tokens, 0)
        counts = [0 if row.finish_reason else count for row, count in zip(state.rows, counts, strict=True)]
        self.grouped_drafters.observe(state.drafter_states, features, next_tokens, num_tokens, counts)


def _result(request: Request, state: DecodeState) -> GenerationResult:
    return GenerationResult(
        sequences=request.sequences(state.rows),
        new_tokens=[row.new_tokens for row in state.rows],
        finish_reasons=[row.finish_reason or "" for row in state.rows],
        stats=state.stats,
        log_probs=[row.log_probs for row in state.rows] if request.return_log_probs else None,
    )


def check_drafting(drafting: str) -> str:
    """`drafting`; ValueError unless it is one of the two."""
    if drafting not in ("coupled", "topk"):
        raise ValueError(f"drafting must be coupled or topk, got {drafting!r}")
    return drafting


def _check_joint_budget(joint_budget: int | None) -> int | None:
    if joint_budget is None or (isinstance(joint_budget, int) and joint_budget is not True and joint_budget >= 1):
        return joint_budget
    raise ValueError(f"joint_budget must be an integer of at least 1, got {joint_budget!r}")
