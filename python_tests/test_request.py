"""One meaning of a request: a generation config gives the same text through every way of calling."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_models import EOS, PAD, VOCAB, prompts, trained_drafters, trained_target
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StopStringCriteria

import taps_ext as taps
from taps_ext import tiny
from taps_ext.cli import main
from taps_ext.decode.request import NOT_HONOURED
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


@cache
def letters() -> PreTrainedTokenizerFast:
    """One letter a token, 64 of them."""
    characters = string.ascii_letters + string.digits + "+/"
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(characters)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


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
        {"use_cache": False},
        {"max_time": 1000.0},
    ]
    values = {name: value for setting in rng.sample(settings, rng.randint(1, 4)) for name, value in setting.items()}
    if "min_length" in values or "min_new_tokens" in values:
        values.pop("exponential_decay_length_penalty", None)  # transformers 4.57 then makes NaN of EOS
    if rng.random() < 0.5:
        values |= {"do_sample": True, "temperature": rng.choice([0.6, 1.0, 1.4])}
        values |= rng.choice([{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.9}])
        values |= rng.choice([{}, {"num_return_sequences": 2}])
    values |= rng.choice([{}, {"pad_token_id": PAD}, {"pad_token_id": PAD}, {"pad_token_id": EOS}])
    values |= rng.choice([{}, {"max_new_tokens": 11}, {"max_length": length + 9}])
    values |= rng.choice([{}, {}, {"stop_strings": [letters().decode([token()]) for _ in range(6)]}])
    return values


def generated_call(seed: int) -> dict[str, Any]:
    """The arguments of a call under `generated_config(seed, ...)`: some have no mask, some leave the length to it."""
    rng = random.Random(seed + 1000)
    ids, mask = prompts(3)
    call: dict[str, Any] = {"input_ids": ids}
    if rng.random() < 0.6:
        call["attention_mask"] = mask
    if rng.random() < 0.5 or not {"max_new_tokens", "max_length"} & generated_config(seed, ids.shape[1]).keys():
        call["max_new_tokens"] = MAX_NEW_TOKENS
    return call


def sequences_by_way(target: Any, call: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The texts, with prompts and padding, by way of calling, each behind the same global seed."""
    decoder = taps.SpeculativeDecoder(target, trained_drafters(), "merged", shape=SHAPE)
    strings, tokenizer = target.generation_config.stop_strings, letters()
    by_door: dict[str, Any] = {"custom_generate": decoder, "stop_strings": None}
    if strings:
        by_door["stopping_criteria"] = [StopStringCriteria(tokenizer, strings)]
    ours = {**call, "tokenizer": tokenizer}
    ways = {
        "generate": lambda: decoder.generate(**ours).sequences,
        "stream": lambda: streamed(decoder, ours),
        "plain_generate": lambda: taps.plain_generate(target, **ours).sequences,
        "transformers": lambda: target.generate(**call, **by_door),
    }
    if not target.generation_config.do_sample:
        ways["stock"] = lambda: target.generate(**call, tokenizer=tokenizer)
    found = {}
    for name, way in ways.items():
        torch.manual_seed(5)
        found[name] = way().tolist()
    return found


def streamed(decoder: taps.SpeculativeDecoder, arguments: dict[str, Any]) -> Tensor:
    """The sequences that a stream returns, which its events brought piece by piece."""
    stream, events = decoder.stream(**arguments), []
    while True:
        try:
            events.append(next(stream).new_tokens)
        except StopIteration as end:
            for row, tokens in enumerate(end.value.new_tokens):
                assert [token for event in events for token in event[row]] == tokens
            sequences: Tensor = end.value.sequences
            return sequences


@pytest.mark.parametrize("seed", range(24))
def test_a_generation_config_gives_one_text_through_every_way_of_calling(seed: int) -> None:
    values, call = generated_config(seed, 12), generated_call(seed)
    with configured(values) as target:
        found = sequences_by_way(target, call)
    for name, text in found.items():
        assert text == found["plain_generate"], (name, values, call.keys())


def test_the_generated_configs_change_texts_and_end_rows() -> None:
    """Else the claim above would be hollow."""
    with configured({}) as target:
        plain = taps.plain_generate(target, *prompts(3), max_new_tokens=MAX_NEW_TOKENS).new_tokens
    changed, reasons, unmasked = 0, set(), 0
    for seed in range(24):
        values, call = generated_config(seed, 12), generated_call(seed)
        with configured(values) as target:
            torch.manual_seed(5)
            result = taps.plain_generate(target, **call, tokenizer=letters())
        changed += result.new_tokens != plain
        reasons |= set(result.finish_reasons)
        unmasked += "attention_mask" not in call and values.get("pad_token_id") == PAD
    assert changed > 16
    assert reasons == {"eos", "length", "stop_string"}
    assert unmasked > 2


def test_a_generation_config_gives_one_text_on_the_command_line_and_in_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given the same end tokens; the prompt is the command's."""
    model, tokenizer = tiny.load_target()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3, "max_time": 1000.0, "max_new_tokens": 3},
        {"do_sample": True, "temperature": 1.3, "top_k": 9, "num_return_sequences": 2, "stop_strings": ["e", "1"]},
    ]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 30?"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids if isinstance(ids, Tensor) else ids["input_ids"]
    for values in settings:
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **values)
        model.generation_config.save_pretrained(tmp_path)
        with pytest.raises(SystemExit, match=r"^0$"):
            main(
                ["generate", "--target", str(tmp_path), "--drafter", "tiny/math", "--prompt", "What is 12 + 30?"]
                + ["--max-new-tokens", "20", "--depth", "3", "--branching", "4", "--max-nodes", "10", "--json"]
            )
        shown = json.loads(capsys.readouterr().out)
        torch.manual_seed(0)  # the default of --seed
        options: dict[str, Any] = {"max_new_tokens": 20, "tokenizer": tokenizer}
        options["eos_token_id"] = list(shown["end_tokens"].values())
        plain = taps.plain_generate(model, ids, **options)
        assert shown["new_tokens"] == plain.new_tokens[0]
        assert shown["finish_reason"] == plain.finish_reasons[0]


# Settings of a generation config by what becomes of them, beside those that are refused by name: transformers' own
# `generate` turns the first ones into processors, criteria, sampling parameters and shapes.
SETTINGS = {
    "honoured": """max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample temperature top_k
        top_p min_p repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias num_return_sequences
        pad_token_id eos_token_id""",
    "refused as processors": "typical_p top_h epsilon_cutoff eta_cutoff guidance_scale watermarking_config",
    "for beams": "early_stopping length_penalty diversity_penalty low_memory",
    "for encoders, or for no prompt": "decoder_start_token_id bos_token_id",
    "for an assistant": """num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold use_mtp
        assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type max_matching_ngram_size""",
    "for transformers' own cache, compilation and batches": """use_cache cache_config max_cache_len prefill_chunk_size
        return_legacy_cache compile_config disable_compile continuous_batching_config""",
    "for the output of transformers' generate": "return_dict_in_generate",
    "of the file": "transformers_version _from_model_config _commit_hash _original_object_hash",
}


def test_every_setting_of_a_generation_config_is_honoured_or_refused_or_without_meaning() -> None:
    """A release of transformers with another setting fails here: then it belongs in this table, or is to be refused."""
    known = {*NOT_HONOURED, *" ".join(SETTINGS.values()).split()}
    assert not vars(GenerationConfig()).keys() - known


WITHOUT_MEANING: list[dict[str, Any]] = [
    {"use_cache": False},
    {"cache_implementation": "dynamic"},
    {"constraints": []},
    {"force_words_ids": []},
    {"max_time": 1000.0},
]


@pytest.mark.parametrize("values", WITHOUT_MEANING, ids=str)
def test_settings_that_change_no_text_are_not_refused(values: dict[str, Any]) -> None:
    ids, mask = prompts(2)
    with configured({}) as target:
        expected = target.generate(ids, attention_mask=mask, max_new_tokens=8)
    with configured(values) as target:
        decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
        assert torch.equal(decoder.generate(ids, mask, max_new_tokens=8).sequences, expected)
        assert torch.equal(taps.plain_generate(target, ids, mask, max_new_tokens=8).sequences, expected)
        by_door = target.generate(ids, attention_mask=mask, custom_generate=decoder, max_new_tokens=8)
        assert torch.equal(by_door, expected)


def test_sequences_per_prompt_are_rows_with_their_own_seeds_lengths_and_sampling() -> None:
    """Also where the call's sampling replaces that of the generation config, filters that no one supports included."""
    ids, mask = prompts(2)
    sampling = taps.SamplingParams([0.8, 1.0, 0.0, 1.2], seed=9)
    options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": [5, 9, 7, 3]}
    twice = ids.repeat_interleave(2, dim=0), mask.repeat_interleave(2, dim=0)
    with configured({}) as target:
        expected = taps.plain_generate(target, *twice, **options).new_tokens
        found = taps.plain_generate(target, ids, mask, num_return_sequences=2, **options)
        assert found.new_tokens == expected
    with configured({"do_sample": True, "num_return_sequences": 2, "typical_p": 0.5}) as target:
        decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
        assert decoder.generate(ids, mask, **options).new_tokens == expected
        with pytest.raises(ValueError, match="num_return_sequences"):
            decoder.generate(ids, mask, sampling=taps.SamplingParams())
        one = decoder.generate(ids, mask, sampling=taps.SamplingParams(), num_return_sequences=1, max_new_tokens=4)
        assert len(one.new_tokens) == 2


def test_a_prompt_of_pad_tokens_alone_is_refused() -> None:
    with configured({"pad_token_id": PAD}) as target, pytest.raises(ValueError, match="pad_token_id 0 is padding"):
        taps.plain_generate(target, torch.tensor([[PAD, PAD], [PAD, 7]]))


@pytest.mark.parametrize("stranger", [-100, VOCAB, 10**6])
def test_ids_in_padded_places_need_not_be_in_the_vocabulary(stranger: int) -> None:
    ids, mask = prompts(3)
    with configured({"repetition_penalty": 1.3, "encoder_repetition_penalty": 1.2, "pad_token_id": PAD}) as target:
        decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
        call: dict[str, Any] = {"input_ids": torch.where(mask.bool(), ids, stranger), "attention_mask": mask}
        expected = taps.plain_generate(target, ids, mask, max_new_tokens=8).new_tokens
        assert decoder.generate(**call, max_new_tokens=8).new_tokens == expected
        assert taps.plain_generate(target, **call, max_new_tokens=8).new_tokens == expected
        assert torch.equal(decoder.generate(**call, max_new_tokens=8).sequences[:, : ids.shape[1]], call["input_ids"])
        target.generation_config.encoder_repetition_penalty = None
        expected = taps.plain_generate(target, ids, mask, max_new_tokens=8).new_tokens
        found = target.generate(**call, custom_generate=decoder, max_new_tokens=8)
        for row, tokens in zip(found[:, ids.shape[1] :].tolist(), expected, strict=True):
            assert row[: len(tokens)] == tokens


def test_masks_may_be_lists_and_padding_may_lie_on_the_right_without_a_mask() -> None:
    ids, mask = prompts(3)
    with configured({"pad_token_id": PAD}) as target:
        decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
        expected = taps.plain_generate(target, ids, mask, max_new_tokens=8).new_tokens
        right = ids.gather(1, torch.argsort(mask, dim=1, descending=True, stable=True))
        for generate in (decoder.generate, partial(taps.plain_generate, target)):
            assert generate(ids, mask.tolist(), max_new_tokens=8).new_tokens == expected
            assert generate(right, max_new_tokens=8).new_tokens == expected


def test_a_target_without_a_generation_config_gets_one_sentence() -> None:
    with configured({}) as target:
        target.generation_config = None
        with pytest.raises(ValueError, match="generation_config is None; set one"):
            taps.plain_generate(target, torch.tensor([[5, 6]]))


LEARNT_PROMPTS = {
    "prompt tuning": (peft.PromptTuningConfig, "inputs_embeds in their place"),
    "prefix tuning": (peft.PrefixTuningConfig, "past_key_values in their place"),
}


@pytest.mark.parametrize(("method", "message"), LEARNT_PROMPTS.values(), ids=LEARNT_PROMPTS)
def test_learnt_prompts_are_refused_where_the_decoder_is_of_the_inner_model(method: Any, message: str) -> None:
    ids, mask = prompts(2)
    inner = deepcopy(trained_target())
    decoder = taps.SpeculativeDecoder(inner, trained_drafters(), shape=SHAPE)
    tuned = peft.get_peft_model(inner, method(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with pytest.raises(ValueError, match=message):
        tuned.generate(input_ids=ids, attention_mask=mask, custom_generate=decoder, max_new_tokens=4)
    if method is peft.PromptTuningConfig:  # stock generation itself loses prefixes: it is given two caches
        own = tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
        assert torch.equal(taps.plain_generate(tuned, ids, mask, max_new_tokens=4).sequences, own)
    expected = trained_target().generate(ids, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(inner.generate(ids, attention_mask=mask, custom_generate=decoder, max_new_tokens=4), expected)


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
    "another cache": ({"cache_implementation": "static"}, "cache_implementation='static' is not available"),
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
    with pytest.raises(ValueError, match=r"position_ids must count .* int64 \[2, 12\], got \[2, 5\]"):
        target.generate(ids, position_ids=counted[:, :5], **call)
    held = target(ids[:, :1], use_cache=True)
    cache = getattr(held, "cache", None) or held.past_key_values
    assert isinstance(cache, DynamicCache)
    names = ("cache", "past_key_values") if cache_keyword(target) == "cache" else ("past_key_values",)
    for name in names:
        with pytest.raises(ValueError, match=r"cache \(past_key_values\) holds tokens"):
            target.generate(ids, **{name: cache}, **call)
    with pytest.raises(ValueError, match="does not use inputs_embeds"):
        target.generate(ids, inputs_embeds=target.get_input_embeddings()(ids), **call)


def test_ids_that_are_not_int64_are_refused_through_every_way_of_calling() -> None:
    ids, mask = prompts(2)
    target = trained_target()
    decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
    for call in (
        lambda: decoder.generate(ids.int(), mask, max_new_tokens=4),
        lambda: taps.plain_generate(target, ids.int(), mask, max_new_tokens=4),
        lambda: target.generate(ids.int(), attention_mask=mask, custom_generate=decoder, max_new_tokens=4),
    ):
        with pytest.raises(ValueError, match=r"input_ids must be int64 \[B, P\] .*, got torch\.int32 \[2, 12\]"):
            call()


def test_the_eos_token_of_a_call_reaches_the_processors_of_every_way_of_calling() -> None:
    """The config has a processor that favours the end of a text, and no end."""
    ids, mask = prompts(3)
    values = {"eos_token_id": None, "pad_token_id": PAD, "exponential_decay_length_penalty": (2, 1.5)}
    with configured(values) as target:
        call: dict[str, Any] = {"attention_mask": mask, "eos_token_id": EOS, "max_new_tokens": 14}
        stock = target.generate(ids, **call)
        decoder = taps.SpeculativeDecoder(target, trained_drafters(), shape=SHAPE)
        for found in (decoder.generate(ids, **call), taps.plain_generate(target, ids, **call)):
            assert torch.equal(found.sequences, stock)


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
