"""Requests, checked before any work: prompts, sampling, stop rules and logits processors, however a call is made.

The arguments of transformers' `generate(custom_generate=decoder)` become a `Request` too, and the result its output.
transformers' logits processors run on a tree in Python, node by node, since each node has its own prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import logits_process
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..sampling import SamplingParams
from ..target.prompts import PreparedPrompts, inputs_beside_text, prepare_prompts
from ..tree import DraftTree
from .state import RowText, StopRules
from .stats import DecodeStats

# Processors that cannot run per node, and why.
UNSUPPORTED_PROCESSORS = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "it runs the model itself along one sequence",
    "WatermarkLogitsProcessor": "it draws from a generator in sequence order",
    "SynthIDTextWatermarkLogitsProcessor": "it keeps a state along one sequence",
}
# Applied behind the temperature by transformers, beside top-k, top-p and min-p; verification has no such filter.
WARPERS_WITHOUT_OP = ("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper")
WARPER_PARAMETERS: dict[Any, str] = {
    logits_process.TemperatureLogitsWarper: "temperature",
    logits_process.TopKLogitsWarper: "top_k",
    logits_process.TopPLogitsWarper: "top_p",
    logits_process.MinPLogitsWarper: "min_p",
}
# Settings of a generation config that change the text, the output or the cache and are not honoured, with the values
# that switch them off.
NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), (0, 1)),
    **dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), (False,)),
    **dict.fromkeys(("token_healing", "is_assistant"), (False,)),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit"), ()),
    **dict.fromkeys(("constraints", "force_words_ids", "cache_implementation"), ()),
    "use_cache": (True,),
}
NOT_SAMPLED = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # silences what greedy does not use
WARPERS_WITH_OP = tuple(warper.__name__ for warper in WARPER_PARAMETERS)


class GenerateOptions(TypedDict, total=False):
    """List the options of `generate`, `stream` and `plain_generate`, beside prompts and attention mask.

    sampling: temperature, filters and seed, each one value or one per row. None: as the target's generation config
        says; where that samples, the seed is drawn once from torch's global generator.
    max_new_tokens: exact, one value or one per row; 128 by default.
    eos_token_id: one, several, or () for none; by default the target's generation config decides.
    stop_strings, tokenizer: end a row with the token that completes one of the strings; the tokenizer finds them.
    logits_processor: further transformers logits processors, applied before the temperature, per node.
    return_log_probs: also return each new token's log-probability under the raw target distribution.
    """

    sampling: SamplingParams | None
    max_new_tokens: int | Sequence[int]
    eos_token_id: int | Collection[int] | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Any
    logits_processor: Any
    return_log_probs: bool


@dataclass(frozen=True)
class _Prepared:
    """Hold what transformers' `generate` gives to a `custom_generate`."""

    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: Any
    model_kwargs: dict[str, Any]

    @classmethod
    def collect(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> _Prepared:
        """Return the arguments; this is a `custom_generate` that generates nothing."""
        return cls(logits_processor, stopping_criteria, generation_config, model_kwargs)


@dataclass(frozen=True)
class Request:
    """Hold what to generate: everything checked, nothing computed yet."""

    input_ids: Tensor  # int64 [B, P], as given
    attention_mask: Tensor  # int64 [B, P], 1 at real tokens
    prompt_lengths: tuple[int, ...]  # real tokens of each row
    sampling: SamplingParams
    rules: StopRules
    pad_token: int
    processors: LogitsProcessorList  # other than temperature, top-k, top-p and min-p: run in Python, per node
    return_log_probs: bool
    prepared: PreparedPrompts | None = None  # prompts with more than text; None: the tokens are all

    @classmethod
    def build(
        cls, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, options: GenerateOptions
    ) -> Request:
        """Return the checked request; transformers' `generate` turns the target's generation config into its parts."""
        if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
            allowed = ", ".join(GenerateOptions.__annotations__)
            raise TypeError(
                f"unknown option {', '.join(unknown)}; the options of a call are {allowed}; others are settings of the "
                "target's generation_config"
            )
        mask = _check_prompts(input_ids, attention_mask, model.config.get_text_config().vocab_size)
        lengths = _lengths(options.get("max_new_tokens", 128), len(input_ids))
        sampling, processors = options.get("sampling"), LogitsProcessorList(options.get("logits_processor") or ())
        if sampling is not None:
            sampling.rows(len(input_ids))
        refuse_processors(processors)
        ids, mask_on_left = _moved_left(input_ids, mask)
        arguments: dict[str, Any] = {} if sampling is None else dict(NOT_SAMPLED)
        if (eos := options.get("eos_token_id")) is not None:
            arguments["eos_token_id"] = _token_list(eos)
            if not arguments["eos_token_id"] and model.generation_config.pad_token_id is None:
                arguments["pad_token_id"] = 0  # transformers would take the first EOS
        generate: Any = model.generate
        prepared: _Prepared = generate(
            ids,
            attention_mask=mask_on_left,
            custom_generate=_Prepared.collect,
            max_new_tokens=max(lengths),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList(_stop_strings(options)),
            **arguments,
        )
        made = cls._of(prepared, input_ids, mask, lengths, sampling)
        return replace(made, return_log_probs=options.get("return_log_probs", False))

    @classmethod
    def from_generate(cls, model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Request:
        """Return the request that transformers' `generate` prepared, checked."""
        prepared = _Prepared.collect(model, input_ids, **kwargs)
        mask = prepared.model_kwargs.get("attention_mask")
        more = inputs_beside_text(model, prepared.model_kwargs, torch.ones_like(input_ids) if mask is None else mask)
        mask = _check_prompts(input_ids, mask, model.config.get_text_config().vocab_size)
        max_new_tokens = prepared.generation_config.max_length - input_ids.shape[1]
        made = cls._of(prepared, input_ids, mask, _lengths(max_new_tokens, len(input_ids)), None)
        prompts = prepare_prompts(model, input_ids, mask, prepared.model_kwargs, more) if more else None
        return replace(made, prepared=prompts)

    @classmethod
    def _of(
        cls,
        prepared: _Prepared,
        input_ids: Tensor,
        mask: Tensor,
        max_new_tokens: tuple[int, ...],
        sampling: SamplingParams | None,
    ) -> Request:
        """Return the request of what transformers prepared; `sampling` None: as the generation config says."""
        config = prepared.generation_config
        _refuse_not_honoured(config)
        if config.forced_eos_token_id is not None and len(set(max_new_tokens)) > 1:
            raise ValueError(
                "forced_eos_token_id forces one length for all rows, got max_new_tokens per row; give one value"
            )
        parameters, processors = split_warpers(prepared.logits_processor)
        refuse_processors(processors)
        if sampling is None:
            sampling = SamplingParams()
            if config.do_sample:
                seed = int(torch.randint(2**62, ()))
                sampling = SamplingParams(**parameters, seed=seed)  # type: ignore[arg-type]
        eos_tokens = _token_list(config.eos_token_id)
        # EOS and length are the decoder's own stop rules.
        built_in = (EosTokenCriteria, MaxLengthCriteria)
        criteria = [_named(one) for one in prepared.stopping_criteria if not isinstance(one, built_in)]
        return cls(
            input_ids=input_ids,
            attention_mask=mask,
            prompt_lengths=tuple(mask.sum(dim=1).tolist()),
            sampling=sampling,
            rules=StopRules(max_new_tokens, frozenset(eos_tokens), tuple(criteria)),
            pad_token=config.pad_token_id if isinstance(config.pad_token_id, int) else next(iter(eos_tokens), 0),
            processors=processors,
            return_log_probs=False,
        )

    def rows(self) -> list[RowText]:
        """Return the rows without new tokens; processors and criteria are shown prompts that are padded on the left."""
        return [RowText(prompt) for prompt in _moved_left(self.input_ids, self.attention_mask)[0].tolist()]

    def prompts(self) -> list[list[int]]:
        """Return the real tokens of each prompt."""
        rows = self.input_ids.gather(1, self.columns()).tolist()
        return [row[:length] for row, length in zip(rows, self.prompt_lengths, strict=True)]

    def columns(self) -> Tensor:
        """Return where each row's real tokens stand in the prompts, int64 [B, longest], repeating the last one."""
        real_first = torch.argsort(self.attention_mask, dim=1, descending=True, stable=True)
        counts = torch.arange(max(self.prompt_lengths), device=real_first.device)
        return real_first.gather(1, counts.minimum(self.attention_mask.sum(dim=1, keepdim=True) - 1))

    def sequences(self, rows: Sequence[RowText]) -> Tensor:
        """Return the prompts as given, each row's new tokens, then padding: int64 [B, P + longest]."""
        longest = max(len(row.new_tokens) for row in rows)
        new = [row.new_tokens + [self.pad_token] * (longest - len(row.new_tokens)) for row in rows]
        tail = torch.tensor(new, dtype=torch.int64, device=self.input_ids.device).reshape(len(rows), longest)
        return torch.cat([self.input_ids, tail], dim=1)


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Extend transformers' output by the decoder's `stats`."""

    stats: DecodeStats | None = None


def generate_output(sequences: Tensor, stats: DecodeStats, generation_config: Any) -> Tensor | SpeculativeOutput:
    """Return the sequences, or with `return_dict_in_generate` transformers' output with the stats."""
    if not generation_config.return_dict_in_generate:
        return sequences
    return SpeculativeOutput(sequences=cast(torch.LongTensor, sequences), stats=stats)


def refuse_processors(processors: LogitsProcessorList) -> None:
    """Raise ValueError for a processor that would not mean on a tree what it means on a text."""
    for processor in processors:
        for name in (kind.__name__ for kind in type(processor).__mro__):
            if name in WARPERS_WITH_OP:
                raise ValueError(f"{name} is a sampling parameter; set it in SamplingParams")
            if name in WARPERS_WITHOUT_OP:
                raise ValueError(
                    f"{name} works behind the temperature, where only top-k, top-p and min-p are supported"
                )
            if name in UNSUPPORTED_PROCESSORS:
                raise ValueError(f"{name} cannot run on a tree: {UNSUPPORTED_PROCESSORS[name]}; decode plainly with it")


def process_logits(
    processors: LogitsProcessorList, logits: Tensor, tree: DraftTree, prefixes: Sequence[list[int]]
) -> Tensor:
    """Return the logits [B, N, V], processed for each node with its own text: the row's prefix, then root to node.

    `prefixes[b]` ends with the row's root token (for the prefill: with the prompt). Some processors hold a value per
    row of the batch, so each is given the node's text in every row, and the node's own row is taken.
    """
    processed = logits.to(torch.float32, copy=True)
    batch_size = len(prefixes)
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    for row, (prefix, count) in enumerate(zip(prefixes, tree.num_nodes.tolist(), strict=True)):
        texts: list[list[int]] = []
        for node in range(count):
            texts.append(prefix if node == 0 else texts[parents[row][node]] + [tokens[row][node]])
            ids = torch.tensor([texts[node]], device=logits.device).repeat(batch_size, 1)
            processed[row, node] = processors(cast(Any, ids), cast(Any, processed[row, node].repeat(batch_size, 1)))[
                row
            ]
    return processed


def split_warpers(processors: LogitsProcessorList) -> tuple[dict[str, float], LogitsProcessorList]:
    """Split transformers' prepared list into temperature, top_k, top_p, min_p and the processors before them."""
    parameters: dict[str, float] = {}
    rest = LogitsProcessorList()
    for processor in processors:
        for warper, name in WARPER_PARAMETERS.items():
            if isinstance(processor, warper):
                if name in parameters:
                    raise ValueError(f"{warper.__name__} is given twice; {name} can be set once")
                parameters[name] = getattr(processor, name)
                break
        else:
            rest.append(processor)
    return {"temperature": 1.0, **parameters}, rest


def _refuse_not_honoured(config: Any) -> None:
    """Raise ValueError for a setting of the generation config that speculative decoding does not honour."""
    for name, neutral in NOT_HONOURED.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            raise ValueError(
                f"{name}={value!r} is not available from speculative decoding; leave it out, or decode without it"
            )


def _named(criterion: Any) -> tuple[str, Any]:
    return ("stop_string" if isinstance(criterion, StopStringCriteria) else "stopping_criteria", criterion)


def _stop_strings(options: GenerateOptions) -> list[Any]:
    """Return the criterion for `stop_strings`, if there are any."""
    strings, tokenizer = options.get("stop_strings"), options.get("tokenizer")
    if not strings:
        return []
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer to find them in the text; pass tokenizer=...")
    strings = [strings] if isinstance(strings, str) else list(strings)
    if "" in strings:
        raise ValueError("stop_strings hold an empty string, which every text ends with; leave it out")
    return [StopStringCriteria(tokenizer, strings)]


def _moved_left(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return prompts and mask with the padding moved to the left, the order of the real tokens kept."""
    order = torch.argsort(mask, dim=1, stable=True)
    return input_ids.gather(1, order), mask.gather(1, order)


def _check_prompts(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """Return the attention mask as int64 [B, P]; raise ValueError for prompts that cannot be decoded."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids must be a tensor, got {type(input_ids).__name__}; tokenize with return_tensors='pt' and give "
            "generate(**inputs)"
        )
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be int64 [B, P] with at least one row and token, got {input_ids.dtype} "
            f"{list(input_ids.shape)}"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device, torch.int64)
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {list(input_ids.shape)} like input_ids, got {list(mask.shape)}")
    if bool((mask * (1 - mask)).any()):
        raise ValueError("attention_mask must hold 0 and 1 only")
    lengths = mask.sum(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError(f"prompt {int(lengths.argmin())} has no token; give every row at least one")
    if bool(((input_ids < 0) | (input_ids >= vocab_size))[mask.bool()].any()):
        raise ValueError(f"input_ids must lie in 0..{vocab_size - 1}, the target's vocabulary; check the tokenizer")
    return mask


def _lengths(max_new_tokens: int | Sequence[int], batch_size: int) -> tuple[int, ...]:
    given = max_new_tokens if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * batch_size
    if not all(isinstance(length, Integral) for length in given):
        raise ValueError(f"max_new_tokens must be an integer, or one per row, got {max_new_tokens!r}")
    lengths = tuple(int(length) for length in given)
    if len(lengths) != batch_size:
        raise ValueError(
            f"max_new_tokens has {len(lengths)} values for a batch of {batch_size}; give one, or one per row"
        )
    if any(length < 1 for length in lengths):
        raise ValueError(f"max_new_tokens must be at least 1, got {min(lengths)}")
    return lengths


def _token_list(tokens: int | Collection[int] | Tensor | None) -> list[int]:
    """Return token ids in the order given."""
    if tokens is None:
        return []
    flat = tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens
    return [int(flat)] if isinstance(flat, Integral) else [int(token) for token in flat]  # type: ignore[union-attr]
