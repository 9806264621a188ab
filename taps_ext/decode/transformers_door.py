"""transformers' `generate(custom_generate=decoder)`: its arguments as a `Request`, our result as its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..sampling import SamplingParams
from .processors import split_warpers
from .request import Request
from .stats import DecodeStats


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the decoder's `stats`."""

    stats: DecodeStats | None = None


def request_from_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    **model_kwargs: Any,
) -> Request:
    """What `generate` prepared, checked. With `do_sample` the seed is drawn once from torch's global generator."""
    if generation_config.num_beams > 1:
        raise ValueError(f"speculative decoding draws one text a row, got num_beams={generation_config.num_beams}")
    for wanted in ("output_scores", "output_logits", "output_hidden_states", "output_attentions"):
        if getattr(generation_config, wanted, False):
            raise ValueError(f"{wanted} is not available from speculative decoding; leave it out, or decode plainly")
    for name in ("cache", "past_key_values"):  # the second before transformers 5.24
        given = model_kwargs.get(name)
        if given is not None and given.get_seq_length() > 0:
            raise ValueError(f"speculative decoding keeps its own cache, got {name} that holds tokens; leave it out")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("speculative decoding needs input_ids, got inputs_embeds")
    parameters, processors = split_warpers(logits_processor)
    sampling = SamplingParams()
    if generation_config.do_sample:
        seed = int(torch.randint(2**62, ()))
        sampling = SamplingParams(**parameters, seed=seed)  # type: ignore[arg-type]
    eos = generation_config.eos_token_id
    return Request.build(
        model,
        input_ids,
        attention_mask,
        sampling,
        generation_config.max_length - input_ids.shape[1],
        () if eos is None else eos,
        logits_processor=processors,
        criteria=[_named(one) for one in stopping_criteria if not _is_built_in(one)],
        pad_token_id=generation_config.pad_token_id,
    )


def output(sequences: Tensor, stats: DecodeStats, generation_config: Any) -> Tensor | SpeculativeOutput:
    """The sequences, or with `return_dict_in_generate` transformers' output with the stats."""
    if not generation_config.return_dict_in_generate:
        return sequences
    return SpeculativeOutput(sequences=cast(torch.LongTensor, sequences), stats=stats)


def _is_built_in(criterion: Any) -> bool:
    """EOS and length are the decoder's own stop rules."""
    return isinstance(criterion, (EosTokenCriteria, MaxLengthCriteria))


def _named(criterion: Any) -> tuple[str, Any]:
    return ("stop_string" if isinstance(criterion, StopStringCriteria) else "stopping_criteria", criterion)
