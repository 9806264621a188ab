"""One meaning of a request: a generation config gives the same text through every way of calling."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import EOS, VOCAB, prompts, trained_drafters, trained_target
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

import taps_ext as taps
from taps_ext.evaluation.lossless import check_lossless
from taps_ext.evaluation.lossless_report import LosslessSettings
from taps_ext.target.kv_cache import cache_keyword

SHAPE = taps.TreeShape(depth=4, branching=4, max_nodes=16)
MAX_NEW_TOKENS = 14


@contextmanager
def configured(values: dict[str, Any]) -> Iterator[Any]:
    """The trained target under another generation config."""
    target = trained_target()
    before = target.generation_config
    target.generation_config = GenerationConfig(**{"eos_token_id": EOS, **values})
    try:
        yield target
    finally:
        target.generation_config = before


def generated_config(seed: int, length: int) -> dict[str, Any]:
    """A few settings of any kind; `length` is the prompt's."""
    rng = random.Random(seed)
    token = lambda: rng.randrange(4, VOCAB)  # noqa: E731
    settings: list[dict[str, Any]] = [
        {"repetition_penalty": rng.choice([1.05, 1.3, 0.8])},
        {"no_repeat_ngram_size": rng.choice([2, 3])},
        {"suppress_tokens": [token() for _ in range(6)]},
        {"begin_suppress_tokens": [token() for _ in range(12)]},
        {"bad_words_ids": [[token()], [token(), token()]]},
        {"sequence_bias": [[[token()], 4.0], [[token(), token()], -6.0]]},
        {"forced_eos_token_id": EOS},
        {"min_new_tokens": rng.choice([3, 9])},
        {"min_length": length + 6},
        {"exponential_decay_length_penalty": (rng.choice([2, 5]), 1.4)},
        {"encoder_repetition_penalty": rng.choice([0.7, 1.5])},
        {"renormalize_logits": True},
        {"remove_invalid_values": True},
        {"eos_token_id": [EOS, token(), token()]},
    ]
    values = {name: value for setting in rng.sample(settings, rng.randint(1, 4)) for name, value in setting.items()}
    if "min_length" in values or "min_new_tokens" in values:
        values.pop("exponential_decay_length_penalty", None)  # transformers 4.57 then makes NaN of EOS
    if rng.random() < 0.5:
        values |= {"do_sample": True, "temperature": rng.choice([0.6, 1.0, 1.4])}
        values |= rng.choice([{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.9}])
    return values


def texts(target: Any, ids: Tensor, mask: Tensor) -> dict[str, list[list[int]]]:
    """The new tokens by way of calling, each behind the same global seed."""
    decoder = taps.SpeculativeDecoder(target, trained_drafters(), "merged", shape=SHAPE)
    ends = set(torch.as_tensor(target.generation_config.eos_token_id).flatten().tolist())

    def streamed() -> list[list[int]]:
        new: list[list[int]] = [[] for _ in ids]
        for event in decoder.stream(ids, mask, max_new_tokens=MAX_NEW_TOKENS):
            new = [text + more for text, more in zip(new, event.new_tokens, strict=True)]
        return new

    def from_sequences(sequences: Tensor) -> list[list[int]]:
        rows = sequences[:, ids.shape[1] :].tolist()
        return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]

    theirs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": MAX_NEW_TOKENS}
    ways = {
        "generate": lambda: decoder.generate(ids, mask, max_new_tokens=MAX_NEW_TOKENS).new_tokens,
        "stream": streamed,
        "plain_generate": lambda: taps.plain_generate(target, ids, mask, max_new_tokens=MAX_NEW_TOKENS).new_tokens,
        "transformers": lambda: from_sequences(target.generate(ids, custom_generate=decoder, **theirs)),
    }
    if not target.generation_config.do_sample:
        ways["stock"] = lambda: from_sequences(target.generate(ids, **theirs))
    found = {}
    for name, way in ways.items():
        torch.manual_seed(5)
        found[name] = way()
    return found


@pytest.mark.parametrize("seed", range(24))
def test_a_generation_config_gives_one_text_through_every_way_of_calling(seed: int) -> None:
    ids, mask = prompts(3)
    with configured(generated_config(seed, ids.shape[1])) as target:
        found = texts(target, ids, mask)
    for name, text in found.items():
        assert text == found["plain_generate"], (name, generated_config(seed, ids.shape[1]))


def test_the_generated_configs_change_texts_and_end_rows() -> None:
    """Else the claim above would be hollow."""
    ids, mask = prompts(3)
    with configured({}) as target:
        plain = taps.plain_generate(target, ids, mask, max_new_tokens=MAX_NEW_TOKENS).new_tokens
    changed = 0
    for seed in range(24):
        with configured(generated_config(seed, ids.shape[1])) as target:
            torch.manual_seed(5)
            changed += taps.plain_generate(target, ids, mask, max_new_tokens=MAX_NEW_TOKENS).new_tokens != plain
    assert changed > 16


def test_padding_on_the_right_means_what_padding_on_the_left_means() -> None:
    """Processors that look at the prompt see it behind its padding, whatever the side."""
    ids, mask = prompts(3)
    order = torch.argsort(mask, dim=1, descending=True, stable=True)
    right, right_mask = ids.gather(1, order), mask.gather(1, order)
    assert not torch.equal(right, ids)
    with configured({"no_repeat_ngram_size": 2, "begin_suppress_tokens": [7, 8, 9]}) as target:
        decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
        expected = decoder.generate(ids, mask, max_new_tokens=MAX_NEW_TOKENS).new_tokens
        assert decoder.generate(right, right_mask, max_new_tokens=MAX_NEW_TOKENS).new_tokens == expected


def test_sampling_that_is_given_replaces_the_configs_and_keeps_its_processors() -> None:
    ids, mask = prompts(2)
    sampling = taps.SamplingParams([0.0, 0.9], seed=4)
    with configured({"repetition_penalty": 1.5}) as target:
        expected = taps.plain_generate(target, ids, mask, sampling=sampling, max_new_tokens=MAX_NEW_TOKENS).new_tokens
    with configured({"repetition_penalty": 1.5, "do_sample": True, "top_k": 2, "temperature": 0.3}) as target:
        found = taps.plain_generate(target, ids, mask, sampling=sampling, max_new_tokens=MAX_NEW_TOKENS).new_tokens
    assert found == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "num_beams=2 is not available"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 is not available"),
    "DoLa": ({"dola_layers": "high"}, "dola_layers='high' is not available"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 is not available"),
    "guidance": ({"guidance_scale": 1.5}, "ClassifierFreeGuidance.* cannot run on a tree"),
    "typical": ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper works behind the temperature"),
    "no cache": ({"use_cache": False}, "use_cache=False is not available"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_honoured_is_refused_by_name_through_every_way_of_calling(
    values: dict[str, Any], message: str
) -> None:
    ids, _ = prompts(1)
    with configured(values) as target:
        decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
        for call in (
            lambda: decoder.generate(ids, max_new_tokens=4),
            lambda: decoder.stream(ids, max_new_tokens=4),
            lambda: taps.plain_generate(target, ids, max_new_tokens=4),
            lambda: target.generate(ids, custom_generate=decoder, max_new_tokens=4),
        ):
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_arguments_that_nobody_uses_are_refused_by_name() -> None:
    ids, mask = prompts(2)
    target = trained_target()
    decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
    counted = (mask.cumsum(dim=1) - 1).clamp_min(0)
    call: dict[str, Any] = {"attention_mask": mask, "custom_generate": decoder, "max_new_tokens": 4}
    expected = target.generate(ids, **call)
    assert torch.equal(target.generate(ids, position_ids=counted, **call), expected)
    with pytest.raises(ValueError, match="position_ids must count the real tokens"):
        target.generate(ids, position_ids=counted + 3, **call)
    held = target(ids[:, :1], use_cache=True)
    cache = getattr(held, "cache", None) or held.past_key_values
    assert isinstance(cache, DynamicCache)
    names = ("cache", "past_key_values") if cache_keyword(target) == "cache" else ("past_key_values",)
    for name in names:
        with pytest.raises(ValueError, match=r"cache \(past_key_values\) holds tokens"):
            target.generate(ids, **{name: cache}, **call)
    with pytest.raises(ValueError, match="does not use inputs_embeds"):
        target.generate(ids, inputs_embeds=target.get_input_embeddings()(ids), **call)


def test_unknown_options_are_refused_by_name() -> None:
    decoder = taps.SpeculativeDecoder(trained_target(), trained_drafters(), shape=SHAPE)
    ids, _ = prompts(1)
    with pytest.raises(
        TypeError, match="unknown option repetition_penalty, top_q; the options of a call are sampling, max_new"
    ):
        decoder.generate(ids, repetition_penalty=1.1, top_q=3)  # type: ignore[call-arg]


def test_rows_that_ended_are_padded_as_transformers_pads_them() -> None:
    """With the pad token, or without one with the first EOS token."""
    ids, mask = prompts(3)
    for values in ({"eos_token_id": [9, EOS]}, {"eos_token_id": [EOS, 9]}, {"pad_token_id": 2}):
        with configured(values) as target:
            decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
            options: dict[str, Any] = {"max_new_tokens": 30}
            stock = target.generate(ids, attention_mask=mask, **options)
            found = decoder.generate(ids, mask, **options).sequences
            assert torch.equal(found[:, : stock.shape[1]], stock)


def test_a_check_of_losslessness_is_of_the_targets_own_distributions() -> None:
    """Settings of the generation config that change texts are left out, and are there again afterwards."""
    with configured({"repetition_penalty": 1.8, "do_sample": True, "top_k": 3}) as target:
        config = target.generation_config
        settings = LosslessSettings((0.0, 1.0), max_new_tokens=10, num_draws=400, shape=SHAPE)
        ids, mask = prompts(3)
        rows = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
        report = check_lossless(target, trained_drafters(), {"merged": {"composition": "merged"}}, rows, settings)
        assert report.verdict == "lossless"
        assert target.generation_config is config
