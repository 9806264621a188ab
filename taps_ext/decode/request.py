"""Requests, checked before any work: prompts, sampling and stop rules, however a call is made.

transformers' own `generate` turns a generation config into logits processors and criteria, for every way of calling:
`Request.build` calls it, and `generate(custom_generate=decoder)` comes from it. So a setting has one meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ..sampling import SamplingParams
from ..target.prompts import (
    PreparedPrompts,
    check_ids,
    check_mask,
    inferred_mask,
    inputs_beside_text,
    moved_left,
    prepare_prompts,
)
from .processors import checked_processors, refuse_processors, split_warpers
from .state import RowText, StopRules

# Settings of a generation config that change the text, the output or the cache and are not honoured, with the values
# that switch them off. The others are honoured by transformers' `generate`, or mean nothing without these.
NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), (0, 1)),
    **dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), (False,)),
    **dict.fromkeys(("token_healing", "is_assistant"), (False,)),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit"), ()),
    **dict.fromkeys(("constraints", "force_words_ids"), ([],)),
    "cache_implementation": ("dynamic", "hybrid"),  # transformers takes the second, of old configs, for none
}
DEFAULT_NEW_TOKENS = 128
NOT_SAMPLED = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # silences what greedy does not use


class GenerateOptions(TypedDict, total=False):
    """List the options of `generate`, `stream` and `plain_generate`, beside prompts and attention mask.

    A row of the batch is a text: `num_return_sequences` rows for each prompt, next to each other.

    sampling: temperature, filters and seed, each one value or one per row. None: as the target's generation config
        says; where that samples, the seed is drawn once from torch's global generator.
    max_new_tokens: exact, one value or one per row; by default the generation config decides (max_new_tokens,
        max_length), or it is 128.
    num_return_sequences: texts per prompt; by default the generation config decides.
    eos_token_id: one, several, or () for none; by default the generation config decides.
    stop_strings, tokenizer: end a row with the token that completes one of the strings, by default those of the
        generation config; the tokenizer finds them.
    logits_processor: a list of further transformers logits processors, applied before the temperature, per node.
    return_log_probs: also return each new token's log-probability under the raw target distribution.
    """

    sampling: SamplingParams | None
    max_new_tokens: int | Sequence[int] | None
    num_return_sequences: int | None
    eos_token_id: int | Collection[int] | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Any
    logits_processor: Any
    return_log_probs: bool


@dataclass(frozen=True)
class _Prepared:
    """Hold what transformers' `generate` gives to a `custom_generate`."""

    input_ids: Tensor  # padded on the left; each prompt as often as there are texts of it
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
        return cls(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    @property
    def new_tokens(self) -> int:
        """How many tokens the generation config, the call's arguments included, allows."""
        length: int = self.generation_config.max_length - self.input_ids.shape[1]
        return length


@dataclass(frozen=True)
class Request:
    """Hold what to generate: everything checked, nothing computed yet."""

    input_ids: Tensor  # int64 [B, P], as given
    attention_mask: Tensor  # int64 [B, P], 1 at real tokens
    moved_left: Tensor  # int64 [B, P], `input_ids` with all padding on the left, as processors and criteria see it
    prompt_lengths: tuple[int, ...]  # real tokens of each row
    sampling: SamplingParams
    rules: StopRules
    pad_token: int
    processors: LogitsProcessorList  # other than temperature, top-k, top-p and min-p: run in Python, per node
    return_log_probs: bool
    prepared: PreparedPrompts | None = None  # prompts with more than text; None: the tokens are all

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | Sequence[Sequence[int]] | None,
        options: GenerateOptions,
    ) -> Request:
        """Return the checked request; transformers' `generate` turns the target's generation config into its parts."""
        config = _generation_config(model, options)
        ends, pads = _end_tokens(config, options), _token_list(config.pad_token_id, "pad_token_id")
        ids = check_ids(input_ids)
        mask = inferred_mask(ids, pads, ends) if attention_mask is None else check_mask(ids, attention_mask)
        lengths = _given_lengths(config, options)
        generate: Any = model.generate
        prepared: _Prepared = generate(
            moved_left(ids, mask, model.config.get_text_config().vocab_size, pads),
            attention_mask=mask.sort(dim=1).values,
            custom_generate=_Prepared.collect,
            eos_token_id=ends,
            pad_token_id=_pad_token(pads, ends),
            **_arguments(config, options, lengths),
        )
        copies = len(prepared.input_ids) // len(ids)
        ids, mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
        made = cls._of(prepared, ids, mask, lengths or [prepared.new_tokens], options.get("sampling"))
        return replace(made, return_log_probs=options.get("return_log_probs", False))

    @classmethod
    def from_generate(cls, model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Request:
        """Return the request that transformers' `generate` prepared, checked."""
        prepared = _Prepared.collect(model, input_ids, **kwargs)
        _refuse_not_honoured(prepared.generation_config)
        more = inputs_beside_text(model, prepared.model_kwargs)
        check_ids(input_ids)
        mask = prepared.model_kwargs.get("attention_mask")  # None: all ones, as given or as inferred from pad tokens
        mask = torch.ones_like(input_ids) if mask is None else check_mask(input_ids, mask)
        pads = _token_list(prepared.generation_config.pad_token_id, "pad_token_id")
        moved = moved_left(input_ids, mask, model.config.get_text_config().vocab_size, pads)
        prompts = prepare_prompts(model, input_ids, mask, prepared.model_kwargs, more)
        made = cls._of(replace(prepared, input_ids=moved), input_ids, mask, [prepared.new_tokens], None)
        return replace(made, prepared=prompts)

    @classmethod
    def _of(
        cls,
        prepared: _Prepared,
        input_ids: Tensor,
        mask: Tensor,
        max_new_tokens: Sequence[int],
        sampling: SamplingParams | None,
    ) -> Request:
        """Return the request of what transformers prepared; `sampling` None: as the generation config says."""
        config = prepared.generation_config
        lengths = _lengths_of_rows(max_new_tokens, len(input_ids))
        if config.forced_eos_token_id is not None and len(set(lengths)) > 1:
            raise ValueError(
                "forced_eos_token_id forces one length for all rows, got max_new_tokens per row; give one value"
            )
        parameters, processors = split_warpers(prepared.logits_processor, keep_others=sampling is None)
        refuse_processors(processors)
        if sampling is None:
            sampling = SamplingParams()
            if config.do_sample:
                seed = int(torch.randint(2**62, ()))
                sampling = SamplingParams(**parameters, seed=seed)  # type: ignore[arg-type]
        sampling.rows(len(input_ids))  # raises ValueError for values of another batch
        ends, pads = _token_list(config.eos_token_id), _token_list(config.pad_token_id, "pad_token_id")
        # EOS and length are the decoder's own stop rules.
        built_in = (EosTokenCriteria, MaxLengthCriteria)
        criteria = [_named(one) for one in prepared.stopping_criteria if not isinstance(one, built_in)]
        return cls(
            input_ids=input_ids,
            attention_mask=mask,
            moved_left=prepared.input_ids,
            prompt_lengths=tuple(mask.sum(dim=1).tolist()),
            sampling=sampling,
            rules=StopRules(lengths, frozenset(ends), tuple(criteria)),
            pad_token=_pad_token(pads, ends),
            processors=processors,
            return_log_probs=False,
        )

    def rows(self) -> list[RowText]:
        """Return the rows without new tokens; processors and criteria are shown prompts that are padded on the left."""
        return [RowText(prompt) for prompt in self.moved_left.tolist()]

    def prompts(self) -> list[list[int]]:
        """Return the real tokens of each prompt."""
        rows = self.moved_left.tolist()
        return [row[-length:] for row, length in zip(rows, self.prompt_lengths, strict=True)]

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


def _generation_config(model: PreTrainedModel, options: GenerateOptions) -> Any:
    """Return the target's generation config; raise where it, or an option, asks for what is not honoured."""
    if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
        raise TypeError(
            f"unknown option {', '.join(unknown)}; the options of a call are "
            f"{', '.join(GenerateOptions.__annotations__)}; other settings belong in the target's generation_config. "
            "A prompt is input_ids and attention_mask: tokenize with return_token_type_ids=False, and give pictures "
            "to target.generate(**inputs, custom_generate=decoder)"
        )
    config: Any = model.generation_config
    if config is None:
        raise ValueError(
            "the target's generation_config is None; set one, such as transformers.GenerationConfig(eos_token_id=...)"
        )
    _refuse_not_honoured(config)
    return config


def _arguments(config: Any, options: GenerateOptions, lengths: Sequence[int] | None) -> dict[str, Any]:
    """Return arguments of transformers' `generate` for the options, EOS aside."""
    arguments: dict[str, Any] = {
        "logits_processor": checked_processors(options.get("logits_processor")),
        "stopping_criteria": StoppingCriteriaList(_stop_strings(config, options)),
        "stop_strings": None,  # transformers hands no tokenizer to a custom_generate
    }
    if (sampling := options.get("sampling")) is not None:
        arguments |= {**NOT_SAMPLED, "do_sample": _check_sampling(sampling).is_sampled}
    if lengths is not None:
        arguments |= {"max_new_tokens": max(lengths), "max_length": None}  # else transformers warns of two lengths
    copies: Any = options.get("num_return_sequences")
    if copies is not None:
        if not isinstance(copies, Integral) or copies < 1:
            raise ValueError(f"num_return_sequences must be an integer of at least 1, got {copies!r}")
        arguments["num_return_sequences"] = int(copies)
    return arguments


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


def _stop_strings(config: Any, options: GenerateOptions) -> list[Any]:
    """Return the criterion for the stop strings of the call, or else of the generation config, if there are any."""
    given = options.get("stop_strings")
    strings = config.stop_strings if given is None else given
    if not strings:
        return []
    if options.get("tokenizer") is None:
        raise ValueError(
            f"stop_strings {strings!r} need the tokenizer to find them in the text; pass tokenizer=..., or no stop "
            "strings: stop_strings=()"
        )
    strings = [strings] if isinstance(strings, str) else list(strings)
    if "" in strings:
        raise ValueError("stop_strings hold an empty string, which every text ends with; leave it out")
    return [StopStringCriteria(options["tokenizer"], strings)]


def _check_sampling(sampling: Any) -> SamplingParams:
    if not isinstance(sampling, SamplingParams):
        raise ValueError(
            f"sampling must be a SamplingParams or None, got {sampling!r}; "
            "give taps_ext.SamplingParams(temperature=..., seed=...)"
        )
    return sampling


def _given_lengths(config: Any, options: GenerateOptions) -> list[int] | None:
    """Return max_new_tokens, one value or one per row; None where the generation config decides."""
    given = options.get("max_new_tokens")
    if given is None:
        is_silent = config.max_new_tokens is None and config.max_length in (None, GenerationConfig().max_length)
        return [DEFAULT_NEW_TOKENS] if is_silent else None
    values = list(given) if isinstance(given, Sequence) else [given]
    if not all(isinstance(length, Integral) for length in values) or not values:
        raise ValueError(f"max_new_tokens must be an integer, or one per row, got {given!r}")
    if any(length < 1 for length in values):
        raise ValueError(f"max_new_tokens must be at least 1, got {min(values)}")
    return [int(length) for length in values]


def _lengths_of_rows(lengths: Sequence[int], batch_size: int) -> tuple[int, ...]:
    if len(lengths) not in (1, batch_size):
        raise ValueError(
            f"max_new_tokens has {len(lengths)} values for a batch of {batch_size}; give one, or one per row"
        )
    return tuple(lengths) * (batch_size if len(lengths) == 1 else 1)


def _end_tokens(config: Any, options: GenerateOptions) -> list[int]:
    """Return the EOS tokens of the call, or else of the generation config."""
    given = options.get("eos_token_id")
    return _token_list(config.eos_token_id if given is None else given)


def _pad_token(pads: Sequence[int], ends: Sequence[int]) -> int:
    """Return what stands behind a row that has ended: the pad token, or else the first EOS, as in transformers."""
    return next(iter([*pads, *ends]), 0)


def _token_list(tokens: Any, name: str = "eos_token_id") -> list[int]:
    """Return token ids in the order given."""
    if tokens is None:
        return []
    flat = tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens
    listed = list(flat) if isinstance(flat, Iterable) and not isinstance(flat, str) else [flat]
    if not all(isinstance(token, Integral) for token in listed):
        raise ValueError(
            f"{name} must be a token id, several, or () for none, got {tokens!r}; "
            "tokenizer.convert_tokens_to_ids(...) gives the id of a token"
        )
    return [int(token) for token in listed]
