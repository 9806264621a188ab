"""Requests, checked before any work: prompts, sampling, stop rules and logits processors, however a call is made.

The arguments of transformers' `generate(custom_generate=decoder)` become a `Request` too, and the result its output.
transformers' logits processors run on a tree in Python, node by node, since each node has its own prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
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
WARPERS_WITH_OP = tuple(warper.__name__ for warper in WARPER_PARAMETERS)


class GenerateOptions(TypedDict, total=False):
    """List the options of `generate`, `stream` and `plain_generate`, beside prompts and attention mask.

    sampling: temperature, filters and seed, each one value or one per row; greedy by default.
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

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        options: GenerateOptions,
        criteria: Sequence[tuple[str, Any]] = (),
        pad_token_id: int | None = None,
    ) -> Request:
        """Return the checked request; EOS and padding default to the target's generation config."""
        if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
            allowed = ", ".join(GenerateOptions.__annotations__)
            raise TypeError(f"generate does not know {', '.join(unknown)}; its options are {allowed}")
        mask = _check_prompts(input_ids, attention_mask, model.config.get_text_config().vocab_size)
        sampling = options.get("sampling") or SamplingParams()
        sampling.rows(len(input_ids))
        eos = options.get("eos_token_id")
        eos_tokens = _token_ids(model.generation_config.eos_token_id if eos is None else eos)
        processors = LogitsProcessorList(options.get("logits_processor") or ())
        refuse_processors(processors)
        pad = model.generation_config.pad_token_id if pad_token_id is None else pad_token_id
        lengths = _lengths(options.get("max_new_tokens", 128), len(input_ids))
        return cls(
            input_ids=input_ids,
            attention_mask=mask,
            prompt_lengths=tuple(mask.sum(dim=1).tolist()),
            sampling=sampling,
            rules=StopRules(lengths, frozenset(eos_tokens), (*criteria, *_stop_strings(options))),
            pad_token=pad if isinstance(pad, int) else next(iter(eos_tokens), 0),
            processors=processors,
            return_log_probs=options.get("return_log_probs", False),
        )

    @classmethod
    def from_generate(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        attention_mask: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Request:
        """Return what transformers' `generate` prepared, checked.

        With `do_sample` the seed is drawn once from torch's global generator.
        """
        _refuse_generate_arguments(generation_config, model_kwargs)
        parameters, processors = split_warpers(logits_processor)
        sampling = SamplingParams()
        if generation_config.do_sample:
            seed = int(torch.randint(2**62, ()))
            sampling = SamplingParams(**parameters, seed=seed)  # type: ignore[arg-type]
        eos = generation_config.eos_token_id
        options = GenerateOptions(
            sampling=sampling,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            eos_token_id=() if eos is None else eos,
            logits_processor=processors,
        )
        # EOS and length are the decoder's own stop rules.
        built_in = (EosTokenCriteria, MaxLengthCriteria)
        criteria = [_named(one) for one in stopping_criteria if not isinstance(one, built_in)]
        return cls.build(model, input_ids, attention_mask, options, criteria, generation_config.pad_token_id)

    def packed(self, device: torch.device) -> Tensor:
        """Return the prompts moved to column 0, int64 [B, longest], with token 0 behind them."""
        first_real = torch.argsort(self.attention_mask, dim=1, descending=True, stable=True)
        tokens = self.input_ids.gather(1, first_real)[:, : max(self.prompt_lengths)]
        is_real = self.attention_mask.gather(1, first_real)[:, : tokens.shape[1]]
        return (tokens * is_real).to(device)

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


def _refuse_generate_arguments(generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    if generation_config.num_beams > 1:
        raise ValueError(f"speculative decoding draws one text per row, got num_beams={generation_config.num_beams}")
    for wanted in ("output_scores", "output_logits", "output_hidden_states", "output_attentions"):
        if getattr(generation_config, wanted, False):
            raise ValueError(f"{wanted} is not available from speculative decoding; leave it out, or decode plainly")
    for name in ("cache", "past_key_values"):  # the second before transformers 5.24
        cache = model_kwargs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"speculative decoding keeps its own cache, got {name} that holds tokens; leave it out")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("speculative decoding needs input_ids, got inputs_embeds")


def _named(criterion: Any) -> tuple[str, Any]:
    return ("stop_string" if isinstance(criterion, StopStringCriteria) else "stopping_criteria", criterion)


def _stop_strings(options: GenerateOptions) -> list[tuple[str, Any]]:
    """Return the criterion for `stop_strings`, if there are any."""
    strings, tokenizer = options.get("stop_strings"), options.get("tokenizer")
    if not strings:
        return []
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer to find them in the text; pass tokenizer=...")
    strings = [strings] if isinstance(strings, str) else list(strings)
    return [("stop_string", StopStringCriteria(tokenizer, strings))]


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


def _token_ids(tokens: int | Collection[int] | Tensor | None) -> tuple[int, ...]:
    """Return the tokens in the order given: without a pad token transformers pads with the first EOS."""
    if tokens is None:
        return ()
    flat = tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens
    return (int(flat),) if isinstance(flat, Integral) else tuple(int(token) for token in flat)  # type: ignore[union-attr]
