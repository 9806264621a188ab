"""The speculative decoder, host half: requests in, rows of text and events out. The device half is `step.py`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..composition import make_composition
from ..drafters import Drafter
from ..drafters.lookup import Store
from ..sampling import SamplingParams, warn
from ..target.model import TargetModel
from ..tree import DraftTree, Lengths, TreeShape
from .budget import CostTable, TreeBudget
from .costs import ForcedBudget, load_or_measure
from .request import GenerateOptions, Request
from .state import DecodeState, StepEvent, StepRecord
from .stats import DecodeStats
from .step import DecodeStep

EXTENSION = "extension"  # the proposer of nodes that no drafter drafted


@dataclass(frozen=True)
class GenerationResult:
    """Hold the texts of one call, and how they came about."""

    sequences: Tensor  # int64 [B, P + longest]: the prompts as given, each row's new tokens, padding
    new_tokens: list[list[int]]
    finish_reasons: list[str]  # "eos", "length", "stop_string", "stopping_criteria" or "invalid_logits", per row
    stats: DecodeStats
    log_probs: list[list[float]] | None  # of each new token under the target's raw distribution, if asked for


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Extend transformers' output by the decoder's `stats`."""

    stats: DecodeStats | None = None


class SpeculativeDecoder:
    """Decode with a stock target and one or several drafters; the text is the target's own, token by token.

    Immutable: every call owns its `DecodeState`, so that threads can share one decoder. It is also a
    `custom_generate` for `target.generate(...)`.

    Args:
        target: a Hugging Face causal LM, or a `TargetModel`.
        drafters: by name, from `load_drafters`; their order breaks ties.
        composition: "single", "confidence", "entropy", "evidence" or "merged".
        drafter: the name to use with "single" if there are several.
        shape: the tree that each drafter grows.
        max_nodes: the node budget of a merged tree; None verifies the whole union.
        drafting: "coupled" lets calibrated drafters use the noise that the target will draw with, so that they propose
            what it is about to draw; "topk" proposes what is likely. Both are the same at temperature 0.
        evidence_decay: the factor by which the evidence for a drafter shrinks per token, 0.95 by default. "merged"
            weights its scores by evidence if it has a budget (`max_nodes`) or if a decay is given; 0 switches the
            weights off.
        joint_budget: the number of nodes that all rows of a batch verify together in a step, roots included: the best
            ones, wherever they are.
        costs: what a step costs on this machine, for a shape that adapts (`TreeShape.auto()`); by default it is
            measured at the first call with a batch size, in a few seconds, and kept in a file for later processes.
        extend: continue the leaves of each tree with what followed their paths earlier in the row's own text. The new
            nodes cost no drafting and compete for the slots of the tree; statistics name their proposer "extension".
        store: with `extend`, a `CorpusStore` from which the root of each tree is continued too, whoever drafted.
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
        costs: CostTable | None = None,
        extend: bool = False,
        store: Store | None = None,
    ) -> None:
        self.composition = make_composition(composition, max_nodes, evidence_decay)
        self.drafting = check_drafting(drafting)
        self.joint_budget = _check_joint_budget(joint_budget)
        self.target = target if isinstance(target, TargetModel) else TargetModel(target)
        self.shape = shape or TreeShape.auto()
        self.costs = costs
        self.extend = extend
        self.store = store
        if store is not None and not extend:
            raise ValueError(
                "a store continues the roots of extended trees; give extend=True, or LookupDrafter(store=...)"
            )
        self._composition_name = composition
        self._use(drafters, drafter)

    def with_drafters(self, drafters: Mapping[str, Drafter], drafter: str | None = None) -> SpeculativeDecoder:
        """Return the same decoder with other drafters; the target stays loaded, running calls keep their drafters.

        `drafter` is the name to use with "single", by default the same as here if it is still there.

        >>> decoder = decoder.with_drafters({**decoder.drafters, "code": load_drafter("code", model)})  # doctest: +SKIP
        """
        if self._composition_name == "single" and drafter is None and isinstance(drafters, Mapping):
            drafter = next((name for name in self.drafters if name in drafters), None)
        other = copy(self)
        other._use(drafters, drafter)
        return other

    @property
    def proposers(self) -> tuple[str, ...]:
        """Names of all that propose nodes, in the order of their bits: the drafters, then the extension if it is on."""
        return (*self.drafters, *([EXTENSION] if self.extend else []))

    def _use(self, drafters: Mapping[str, Drafter], drafter: str | None) -> None:
        self.drafters = _select_drafters(drafters, self._composition_name, drafter)
        for name, one in self.drafters.items():
            _refuse_other_sizes(name, one, self.target)
            if self.costs is not None and self.shape.adapts and name not in self.costs.draft_ms:
                raise ValueError(f"the cost table has no cost of drafter {name!r}; measure one with these drafters")
        if self.extend and (EXTENSION in self.drafters or len(self.drafters) > 62):
            raise ValueError(f"with extend=True give at most 62 drafters, none of them named {EXTENSION!r}")
        chosen = list(self.drafters.values())
        self._device_half = DecodeStep(
            self.target, chosen, self.composition, self.shape, self.joint_budget, self.extend, self.store
        )
        self._tables: dict[int, CostTable] = {}

    def cost_table(self, batch_size: int = 1, measure: bool = False) -> CostTable:
        """Return what the parts of a step of `batch_size` rows cost on this machine, in milliseconds.

        It is the one given as `costs`, or the one that was measured before, or it is measured now, in a few seconds;
        with `measure` it is measured now in any case, and kept for later calls and processes.
        """
        if self.costs is not None and not measure:
            return self.costs
        if measure or batch_size not in self._tables:
            self._tables[batch_size] = load_or_measure(
                self._device_half, tuple(self.drafters), self._start, batch_size, measure
            )
        return self._tables[batch_size]

    def _start(self, input_ids: Tensor, new_tokens: int, probe: ForcedBudget) -> Callable[[], object]:
        """Begin a call with a probe for a budget; return what runs one step of it."""
        options: GenerateOptions = {"sampling": SamplingParams(), "max_new_tokens": new_tokens, "eos_token_id": ()}
        options |= {"num_return_sequences": 1, "stop_strings": ()}
        request = Request.build(self.target.model, input_ids, torch.ones_like(input_ids), options)
        request = replace(request, rules=replace(request.rules, criteria=()))  # no max_time
        state = self._begin(request, probe)
        self._prefill(request, state)
        return lambda: self._step(request, state)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        streamer: Any = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationResult:
        """Generate from prompts int64 [B, P], padded anywhere as `attention_mask` says.

        Without a mask, pad tokens are padding, unless the pad token is an EOS token; this is transformers' rule.

        Args:
            streamer: transformers' protocol (`put`, `end`), for a batch of one.
            options: see `GenerateOptions`: sampling, max_new_tokens, num_return_sequences, eos_token_id, stop_strings
                with tokenizer, logits_processor, return_log_probs.
        """
        request = Request.build(self.target.model, input_ids, attention_mask, options)
        return self._run(request, streamer)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[StepEvent, None, GenerationResult]:
        """Generate step by step, with the options of `generate`; the first event brings each row's first token.

        The generator's return value (`result = yield from decoder.stream(...)`) is what `generate` returns.
        """
        request = Request.build(self.target.model, input_ids, attention_mask, options)
        return self._events(request, self._begin(request))

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, taps_streamer: Any = None, **kwargs: Any) -> Any:
        """Serve transformers' `target.generate(**inputs, custom_generate=decoder, ...)`.

        transformers drops `streamer` and `tokenizer` for callables: pass `taps_streamer=...`, and stop strings as
        `stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, [...])])`, with `stop_strings=None` if
        the generation config has some.
        """
        if model is not self.target.model:
            raise ValueError("this decoder drives another model; build a SpeculativeDecoder for the one that generates")
        request = Request.from_generate(model, input_ids, **kwargs)
        result = self._run(request, taps_streamer)
        return _generate_output(result.sequences, result.stats, kwargs["generation_config"])

    def _is_coupled(self, request: Request) -> bool:
        return self.drafting == "coupled" and request.sampling.is_sampled

    def _warn_of_uncalibrated(self, request: Request) -> None:
        """Warn of drafters that cannot use the noise, and name the command that calibrates them."""
        names = [name for name, one in self.drafters.items() if one.uses_features and one.calibration is None]
        if names and self._is_coupled(request):
            warn(
                f"not calibrated, and drafted as with drafting='topk': {', '.join(names)}; to accept more at "
                "temperatures above 0, run: taps-ext calibrate DRAFTER --target TARGET --data FILE"
            )

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

    def _begin(self, request: Request, budget: TreeBudget | None = None) -> DecodeState:
        """Return the call's own state, after the last checks before any work."""
        batch_size, device = len(request.input_ids), self.target.device
        longest = [a + b for a, b in zip(request.prompt_lengths, request.rules.max_new_tokens, strict=True)]
        self.target.refuse_longer_than_exact(max(longest))
        if self.joint_budget is not None and self.joint_budget < batch_size:
            raise ValueError(f"joint_budget {self.joint_budget} is less than a node for each of the {batch_size} rows")
        self._warn_of_uncalibrated(request)
        sampling = request.sampling.rows(batch_size, device)
        seen, root_drafter = sampling if self._is_coupled(request) else None, self._device_half.root_drafter
        with torch.inference_mode(False):  # ordinary tensors, so that every mode may write to them later
            active = torch.ones(batch_size, dtype=torch.bool, device=device)
            text = torch.zeros(batch_size, max(longest) + 1, dtype=torch.int64, device=device) if self.extend else None
            root_tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
            roots = replace(DraftTree.of_roots(root_tokens), proposers=torch.zeros_like(root_tokens)[:, None])
        return DecodeState(
            kv=self.target.new_cache(batch_size),
            drafter_states=self._device_half.reset(batch_size, seen),
            sampling=sampling,
            rules=request.rules,
            rows=request.rows(),
            stats=DecodeStats(self.proposers, batch_size),
            last_positions=torch.tensor(longest, device=device) - 2,
            root_tokens=root_tokens,
            roots=roots,
            active=active,
            text=text,
            pending=[[] for _ in self.drafters],
            budget=budget or self._budget(batch_size),
            root_state=None if root_drafter is None else root_drafter.reset(batch_size, seen),
        )

    def _budget(self, batch_size: int) -> TreeBudget | None:
        if not self.shape.adapts:
            return None
        return TreeBudget(self.cost_table(batch_size), self.shape, tuple(self.drafters), batch_size)

    @torch.inference_mode()
    def _prefill(self, request: Request, state: DecodeState) -> StepEvent:
        """Commit the prompts and draw each row's first token."""
        output = self._device_half.prefill(request, state)
        record = StepRecord.fetch(output)
        event = state.advance(output, record)
        self._device_half.observe(output, state.running(state.kv.lengths), state)
        self._show_texts([a + b for a, b in zip(request.prompts(), record.tokens, strict=True)], state)
        return event

    @torch.inference_mode()
    def _step(self, request: Request, state: DecodeState) -> StepEvent:
        """Run one decode step of every row that still decodes."""
        output = self._device_half.run(request, state)
        record = StepRecord.fetch(output)
        committed = state.committed(output, record)
        event = state.advance(output, record)
        self._device_half.commit(output, committed, state)
        self._device_half.observe(output, state.running(committed), state)
        self._show_texts(record.tokens, state)
        return event

    def _show_texts(self, texts: Sequence[list[int]], state: DecodeState) -> None:
        """Show the drafters that use no features what each row's text has grown by."""
        pairs: list[tuple[Any, Any]] = list(zip(self.drafters.values(), state.drafter_states, strict=True))
        pairs.append((self._device_half.root_drafter, state.root_state))
        reading = [(drafter, own) for drafter, own in pairs if drafter is not None and not drafter.uses_features]
        if not reading:
            return
        texts = [[] if row.finish_reason else text for row, text in zip(state.rows, texts, strict=True)]
        num_tokens = Lengths.of([len(text) for text in texts])
        tokens = torch.tensor([text + [0] * (num_tokens.longest - len(text)) for text in texts], dtype=torch.int64)
        for drafter, own_state in reading:
            drafter.observe(own_state, None, tokens, num_tokens)


def _result(request: Request, state: DecodeState) -> GenerationResult:
    return GenerationResult(
        sequences=request.sequences(state.rows),
        new_tokens=[row.new_tokens for row in state.rows],
        finish_reasons=[row.finish_reason or "" for row in state.rows],
        stats=state.stats,
        log_probs=[row.log_probs for row in state.rows] if request.return_log_probs else None,
    )


def _generate_output(sequences: Tensor, stats: DecodeStats, generation_config: Any) -> Tensor | SpeculativeOutput:
    """Return the sequences, or with `return_dict_in_generate` transformers' output with the stats."""
    if not generation_config.return_dict_in_generate:
        return sequences
    return SpeculativeOutput(sequences=cast(torch.LongTensor, sequences), stats=stats)


def check_drafting(drafting: str) -> str:
    """Return `drafting`; raise ValueError unless it is coupled or topk."""
    if drafting not in ("coupled", "topk"):
        raise ValueError(f"drafting must be coupled or topk, got {drafting!r}")
    return drafting


def _check_joint_budget(joint_budget: int | None) -> int | None:
    if joint_budget is None or (isinstance(joint_budget, int) and joint_budget is not True and joint_budget >= 1):
        return joint_budget
    raise ValueError(f"joint_budget must be an integer of at least 1, got {joint_budget!r}")


def _select_drafters(drafters: Mapping[str, Drafter], composition: str, name: str | None) -> dict[str, Drafter]:
    """Return the drafters that the composition uses, by name."""
    if not isinstance(drafters, Mapping):
        raise ValueError(f"drafters must be a dict from name to drafter, got {type(drafters).__name__}")
    if not 1 <= len(drafters) <= 63:
        raise ValueError(f"give 1 to 63 drafters, got {len(drafters)}")
    for one, drafter in drafters.items():
        if not isinstance(drafter, Drafter):
            raise ValueError(f"drafter {one!r} must be a taps.Drafter, got {type(drafter).__name__}; subclass it")
    if composition != "single":
        if name is not None:
            raise ValueError(f'drafter={name!r} goes with composition="single", got {composition!r}')
        return dict(drafters)
    if name is None and len(drafters) > 1:
        raise ValueError(f'composition="single" needs drafter=..., one of {", ".join(drafters)}')
    name = next(iter(drafters)) if name is None else name
    if name not in drafters:
        raise ValueError(f"drafter must be one of {', '.join(drafters)}, got {name!r}")
    return {name: drafters[name]}


def _refuse_other_sizes(name: str, drafter: Drafter, target: TargetModel) -> None:
    if drafter.vocab_size != target.vocab_size:
        raise ValueError(
            f"drafter {name!r} has vocabulary {drafter.vocab_size}, the target {target.vocab_size}; "
            "use a drafter trained on this target's tokenizer"
        )
    if drafter.uses_features and drafter.hidden_size != target.hidden_size:
        raise ValueError(
            f"drafter {name!r} takes features of size {drafter.hidden_size}, the target's have "
            f"{target.hidden_size}; use a drafter trained for this target"
        )
