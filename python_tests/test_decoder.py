"""The decoder's contract: lengths, stops, reasons, streams, log-probabilities, processors, transformers' door."""

from __future__ import annotations

import itertools
import linecache
import string
import warnings
from collections.abc import Callable, Generator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from small_models import (
    CALIBRATIONS,
    DOMAIN_TOKENS,
    EOS,
    PAD,
    VOCAB,
    new_target,
    prompts,
    trained_drafters,
    trained_target,
)
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    WatermarkLogitsProcessor,
)

import taps_ext as taps
from taps_ext.composition import Merging
from taps_ext.drafters import EagleConfig, EagleDrafter, EagleNetwork

SHAPE = taps.TreeShape(depth=4, branching=4, max_nodes=16)


def make_decoder(composition: str = "merged", **kwargs: Any) -> taps.SpeculativeDecoder:
    return taps.SpeculativeDecoder(trained_target(), trained_drafters(), composition, shape=SHAPE, **kwargs)


CHARACTERS = string.ascii_letters + string.digits + "-_"


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One letter a token, 64 of them."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(CHARACTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_max_new_tokens_is_exact(length: int) -> None:
    ids, mask = prompts(3)
    result = make_decoder().generate(ids, mask, max_new_tokens=length, eos_token_id=())
    assert [len(tokens) for tokens in result.new_tokens] == [length] * 3
    assert result.finish_reasons == ["length"] * 3
    assert result.sequences.shape == (3, ids.shape[1] + length)
    assert torch.equal(result.sequences[:, : ids.shape[1]], ids)


def test_eos_inside_an_accepted_run_cuts_it_there() -> None:
    ids, mask = prompts(6)
    decoder = make_decoder()
    free = decoder.generate(ids, mask, max_new_tokens=40, eos_token_id=())
    row, eos = 0, free.new_tokens[0][17]
    inside = 0
    for row, tokens in enumerate(free.new_tokens):
        for eos in set(tokens):
            result = decoder.generate(
                ids[row : row + 1], mask[row : row + 1], max_new_tokens=40, eos_token_id=[eos, EOS]
            )
            first = min(tokens.index(t) for t in (eos, EOS) if t in tokens)
            assert result.new_tokens[0] == tokens[: first + 1]
            assert result.finish_reasons == ["eos"]
            inside += sum(result.stats.num_accepted[0]) + len(result.stats.num_accepted[0]) + 1 > first + 1
    assert inside > 0, "no EOS fell inside an accepted run: the test would prove nothing"


def test_a_batch_takes_as_many_forwards_as_its_slowest_row() -> None:
    ids, mask = prompts(5)
    result = make_decoder().generate(ids, mask, max_new_tokens=[4, 30, 11, 2, 25], eos_token_id=())
    assert result.stats.num_target_forwards == 1 + max(len(row) for row in result.stats.num_accepted)
    assert result.stats.num_tokens == [4, 30, 11, 2, 25]


def test_padding_may_lie_anywhere() -> None:
    ids, mask = prompts(5)
    expected = make_decoder().generate(ids, mask, max_new_tokens=12).new_tokens
    right = torch.stack([torch.cat([row[m.bool()], row[~m.bool()]]) for row, m in zip(ids, mask, strict=True)])
    right_mask = mask.sort(dim=1, descending=True).values
    assert make_decoder().generate(right, right_mask, max_new_tokens=12).new_tokens == expected


def test_stop_strings_end_a_row_as_transformers_ends_it() -> None:
    tokenizer = letter_tokenizer()
    ids, mask = prompts(4)
    free = make_decoder().generate(ids, mask, max_new_tokens=30, eos_token_id=())
    stops = [tokenizer.decode(free.new_tokens[0][8:10]), tokenizer.decode(free.new_tokens[1][4:7])]
    stock = trained_target().generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=30, stop_strings=stops, tokenizer=tokenizer
    )
    result = make_decoder().generate(ids, mask, max_new_tokens=30, stop_strings=stops, tokenizer=tokenizer)
    assert torch.equal(result.sequences, stock)
    assert result.finish_reasons[0] == "stop_string"
    with pytest.raises(ValueError, match="stop_strings hold an empty string"):
        make_decoder().generate(ids, mask, stop_strings=["", stops[0]], tokenizer=tokenizer)
    one = make_decoder().generate(ids, mask, max_new_tokens=30, stop_strings=stops[0], tokenizer=tokenizer)
    assert one.new_tokens[0] == result.new_tokens[0]
    door = trained_target().generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=30,
        stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, stops)]),
        custom_generate=make_decoder(),
    )
    assert torch.equal(door, stock)


def test_the_text_arrives_before_the_last_step() -> None:
    ids, mask = prompts(2)
    decoder = make_decoder()
    whole = decoder.generate(ids, mask, max_new_tokens=30, eos_token_id=())
    events = list(decoder.stream(ids, mask, max_new_tokens=30, eos_token_id=()))
    assert len(events) == whole.stats.num_target_forwards
    assert [len(tokens) for tokens in events[0].new_tokens] == [1, 1]
    for row in range(2):
        assert [token for event in events for token in event.new_tokens[row]] == whole.new_tokens[row]
        steps = [event.num_accepted[row] for event in events if event.num_accepted[row] is not None]
        assert steps == whole.stats.num_accepted[row]
    assert events[0].tree is None and events[0].path is None
    for event in events[1:]:
        assert event.tree is not None and event.path is not None
        for row in range(2):
            if event.num_accepted[row] is not None:
                path = event.path[row, 1 : event.num_accepted[row] + 1]
                accepted = event.tree.tokens[row, path].tolist()
                assert accepted[: len(event.new_tokens[row])] == event.new_tokens[row][: len(accepted)]

    def drain() -> Generator[Any, None, None]:
        result = yield from decoder.stream(ids, mask, max_new_tokens=30, eos_token_id=())
        assert torch.equal(result.sequences, whole.sequences)
        assert result.stats.to_dict() == whole.stats.to_dict()

    assert len(list(drain())) == len(events)


def test_a_streamer_receives_prompt_and_text() -> None:
    tokenizer = letter_tokenizer()
    ids, _ = prompts(1)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    result = make_decoder().generate(ids, max_new_tokens=20, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(result.new_tokens[0])
    with pytest.raises(ValueError, match="batch of one"):
        make_decoder().generate(*prompts(2), max_new_tokens=4, streamer=streamer)


@torch.inference_mode()
def test_log_probs_are_the_raw_targets() -> None:
    ids, mask = prompts(3)
    sampling = taps.SamplingParams(temperature=0.7, top_k=5, seed=2)
    result = make_decoder().generate(ids, mask, sampling=sampling, max_new_tokens=15, return_log_probs=True)
    assert result.log_probs is not None
    for row in range(3):
        prompt = ids[row][mask[row].bool()].tolist()
        tokens = result.new_tokens[row]
        logits = trained_target()(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(result.log_probs[row]), expected, rtol=1e-3, atol=1e-4)


def test_invalid_logits_end_their_row_and_touch_no_other() -> None:
    ids, mask = prompts(3)
    clean = make_decoder().generate(ids, mask, max_new_tokens=10)
    poisoned = deepcopy(trained_target())
    poisoned.get_input_embeddings().weight.data[DOMAIN_TOKENS["chat"]] = torch.nan  # opens row 1, occurs nowhere else
    result = taps.SpeculativeDecoder(poisoned, trained_drafters(), shape=SHAPE).generate(ids, mask, max_new_tokens=10)
    assert result.finish_reasons[1] == "invalid_logits"
    assert result.new_tokens == [clean.new_tokens[0], [], clean.new_tokens[2]]
    plain = taps.plain_generate(poisoned, ids, mask, max_new_tokens=10)
    assert plain.new_tokens == result.new_tokens
    assert plain.finish_reasons == result.finish_reasons


def test_a_drafted_token_that_overflows_the_target_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = prompts(3)
    drafted: set[int] = set()
    compose = Merging.compose

    def spy(self: Merging, *arguments: Any) -> Any:
        composed = compose(self, *arguments)
        drafted.update(composed.tree.tokens[:, 1:][composed.tree.is_node()[:, 1:]].tolist())
        return composed

    monkeypatch.setattr(Merging, "compose", spy)
    clean = make_decoder().generate(ids, mask, max_new_tokens=30)
    merely_drafted = drafted - set(clean.sequences.flatten().tolist())
    assert len(merely_drafted) >= 3
    overflowing = deepcopy(trained_target())
    overflowing.get_input_embeddings().weight.data[list(merely_drafted)] = torch.nan
    result = taps.SpeculativeDecoder(overflowing, trained_drafters(), shape=SHAPE).generate(
        ids, mask, max_new_tokens=30
    )
    assert torch.equal(result.sequences, clean.sequences)
    assert result.finish_reasons == clean.finish_reasons


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9},
        {"suppress_tokens": [5, 9, 21], "repetition_penalty": 1.2},
    ],
)
def test_other_processors_give_the_text_of_stock_generate(arguments: dict[str, Any]) -> None:
    ids, mask = prompts(4)
    call = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 24, **arguments}
    stock = trained_target().generate(ids, **call)
    assert torch.equal(trained_target().generate(ids, custom_generate=make_decoder(), **call), stock)


def test_processors_can_be_given_directly_and_apply_before_the_temperature() -> None:
    ids, mask = prompts(2)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5), NoRepeatNGramLogitsProcessor(3)])
    sampling = taps.SamplingParams(temperature=0.8, seed=9)
    shapes = (taps.TreeShape(1, 1, 2), SHAPE)
    plain = taps.plain_generate(
        trained_target(), ids, mask, sampling=sampling, max_new_tokens=20, logits_processor=processors
    )
    for shape in shapes:
        decoder = taps.SpeculativeDecoder(trained_target(), trained_drafters(), shape=shape)
        result = decoder.generate(ids, mask, sampling=sampling, max_new_tokens=20, logits_processor=processors)
        assert torch.equal(result.sequences, plain.sequences)


def test_the_transformers_door_reproduces_by_manual_seed_and_returns_stats() -> None:
    ids, mask = prompts(2)
    decoder = make_decoder()
    call = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": True, "temperature": 0.9, "top_p": 0.95}

    def run(seed: int) -> Any:
        torch.manual_seed(seed)
        return trained_target().generate(ids, custom_generate=decoder, return_dict_in_generate=True, **call)

    first, second, other = run(1), run(1), run(2)
    assert torch.equal(first.sequences, second.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    assert first.stats.num_steps > 0
    torch.manual_seed(1)
    sampling = taps.SamplingParams(0.9, top_k=50, top_p=0.95, seed=int(torch.randint(2**62, ())))
    assert torch.equal(decoder.generate(ids, mask, sampling=sampling, max_new_tokens=16).sequences, first.sequences)


def test_the_transformers_door_streams_and_returns_several_sequences() -> None:
    ids, _ = prompts(1)
    tokenizer = letter_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    target = trained_target()
    out = target.generate(
        ids, custom_generate=make_decoder(), taps_streamer=streamer, do_sample=False, max_new_tokens=9
    )
    assert "".join(streamer) == tokenizer.decode(out[0, ids.shape[1] :])
    torch.manual_seed(0)
    many = target.generate(
        ids, custom_generate=make_decoder(), do_sample=True, num_return_sequences=4, max_new_tokens=12
    )
    assert many.shape[0] == 4
    assert len({tuple(row) for row in many.tolist()}) > 1


def test_stats_say_who_proposed_what() -> None:
    ids, mask = prompts(4)
    merged = make_decoder().generate(ids, mask, max_new_tokens=30, eos_token_id=()).stats
    routed = make_decoder("confidence").generate(ids, mask, max_new_tokens=30, eos_token_id=()).stats
    for row in range(4):
        for count, choice, proposers in zip(
            merged.num_accepted[row], merged.choices[row], merged.accepted_proposers[row], strict=True
        ):
            assert len(proposers) == count
            assert all(names and set(names) <= {"math", "chat"} for names in proposers)
            assert choice == (proposers[-1] if proposers else ())
        assert set(routed.choices[row]) <= {"math", "chat"}
        for choice, proposers in zip(routed.choices[row], routed.accepted_proposers[row], strict=True):
            assert all(names == (choice,) for names in proposers)
    assert sum(routed.choice_share.values()) == pytest.approx(1.0)


def drafters_named(*names: str) -> dict[str, EagleDrafter]:
    """The trained ones; any other name is an untrained one."""
    target = trained_target()
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    found = {}
    for name in names:
        torch.manual_seed(len(name))
        network = EagleNetwork(EagleConfig.for_target(target.config)).requires_grad_(False)
        other = EagleDrafter(network, embedding, lm_head, name, CALIBRATIONS["math"])
        found[name] = trained_drafters().get(name, other)
    return found


@pytest.mark.parametrize("composition", ["merged", "evidence"])
def test_drafters_come_and_go_and_change_no_text(composition: str) -> None:
    """Between two calls, and during one: a call that has begun keeps those it began with."""
    ids, mask = prompts(4)
    arguments: dict[str, Any] = {"sampling": taps.SamplingParams([0.0, 0.7, 1.0, 1.0], seed=3), "max_new_tokens": 24}
    expected = taps.plain_generate(trained_target(), ids, mask, **arguments)
    decoder = make_decoder(composition)
    begun = decoder.stream(ids, mask, **arguments)
    events = [next(begun)]
    for names in (("math", "chat", "code"), ("code",), ("chat", "math"), ("chat", "code", "lists", "math")):
        other = decoder.with_drafters(drafters_named(*names))
        result = other.generate(ids, mask, **arguments)
        assert torch.equal(result.sequences, expected.sequences)
        events.append(next(begun))
        assert list(other.drafters) == list(result.stats.drafters) == list(names)
        used = {name for row in result.stats.accepted_proposers for step in row for node in step for name in node}
        assert used & {"math", "chat"} == set(names) & {"math", "chat"}
        assert other.target is decoder.target
        assert (other.shape, other.drafting, other.composition) == (SHAPE, "coupled", decoder.composition)
        decoder = other
    events += begun
    again = make_decoder(composition).generate(ids, mask, **arguments)
    for row in range(4):
        assert [token for event in events for token in event.new_tokens[row]] == expected.new_tokens[row]
        counts = [event.num_accepted[row] for event in events if event.num_accepted[row] is not None]
        assert counts == again.stats.num_accepted[row]
    back = decoder.with_drafters(trained_drafters()).generate(ids, mask, **arguments)
    assert back.stats.to_dict() == again.stats.to_dict()


def test_drafters_that_do_not_fit_are_refused_when_they_come() -> None:
    decoder, embedding, lm_head = make_decoder(), nn.Embedding(32, 32), nn.Linear(32, 32)

    def sized(**sizes: int) -> dict[str, EagleDrafter]:
        config = EagleConfig.for_target(trained_target().config, **sizes)
        return {"other": EagleDrafter(EagleNetwork(config), embedding, lm_head, "other")}

    with pytest.raises(ValueError, match="drafter 'other' has vocabulary 32, the target 64"):
        decoder.with_drafters(sized(vocab_size=32))
    with pytest.raises(ValueError, match="'other' takes features of size 32, the target's have 64"):
        decoder.with_drafters(sized(hidden_size=32))
    with pytest.raises(ValueError, match="give 1 to 63 drafters, got 0"):
        decoder.with_drafters({})
    with pytest.raises(ValueError, match="a dict from name to drafter, got list"):
        decoder.with_drafters(list(trained_drafters().values()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drafter='chat' goes with composition=\"single\", got 'merged'"):
        decoder.with_drafters(trained_drafters(), "chat")


def test_a_single_drafter_stays_the_one_while_it_is_there() -> None:
    single = make_decoder("single", drafter="math")
    for names, drafter, used in (
        (("chat", "math"), None, "math"),
        (("chat", "math"), "chat", "chat"),
        (("chat",), None, "chat"),
        (("chat", "code"), "code", "code"),
    ):
        assert list(single.with_drafters(drafters_named(*names), drafter).drafters) == [used]
    only = taps.SpeculativeDecoder(trained_target(), drafters_named("chat"), "single", shape=SHAPE)
    assert list(only.with_drafters(drafters_named("math", "chat")).drafters) == ["chat"]
    with pytest.raises(ValueError, match=r"needs drafter=\.\.\., one of chat, code"):
        single.with_drafters(drafters_named("chat", "code"))
    with pytest.raises(ValueError, match="drafter must be one of chat, got 'lists'"):
        single.with_drafters(drafters_named("chat"), "lists")


def uncalibrated(*names: str) -> taps.SpeculativeDecoder:
    """A decoder of which the named drafters are not calibrated."""
    drafters = {
        name: EagleDrafter(one.network, one.embedding, one.lm_head, name, None if name in names else one.calibration)
        for name, one in trained_drafters().items()
    }
    return taps.SpeculativeDecoder(trained_target(), drafters, shape=SHAPE)


def calls(decoder: taps.SpeculativeDecoder, sampling: taps.SamplingParams) -> list[Callable[[], Any]]:
    """The three doors of a decoder: `generate`, `stream` and transformers'."""
    ids, _ = prompts(1)
    own: dict[str, Any] = {"sampling": sampling, "max_new_tokens": 3}
    chance = {"do_sample": True, "temperature": sampling.temperature} if sampling.is_sampled else {"do_sample": False}
    theirs: dict[str, Any] = {"custom_generate": decoder, "max_new_tokens": 3, **chance}
    return [
        lambda: decoder.generate(ids, **own),
        lambda: decoder.stream(ids, **own),
        lambda: trained_target().generate(ids, **theirs),
    ]


@pytest.mark.parametrize("door", [0, 1, 2], ids=["generate", "stream", "transformers"])
def test_drafters_without_calibration_are_named_with_the_command_where_they_are_used(door: int) -> None:
    call = calls(uncalibrated("chat"), taps.SamplingParams(0.7))[door]
    with pytest.warns(UserWarning, match="not calibrated") as caught:
        call()
    (warning,) = [one for one in caught if "not calibrated" in str(one.message)]
    assert "drafting='topk': chat;" in str(warning.message)
    assert "run: taps-ext calibrate DRAFTER --target" in str(warning.message)
    called = ("decoder.generate(", "decoder.stream(", "trained_target().generate(")[door]
    assert warning.filename == __file__ and called in linecache.getline(__file__, warning.lineno)


@pytest.mark.parametrize("door", [0, 1, 2], ids=["generate", "stream", "transformers"])
def test_nothing_is_said_of_calibration_where_it_does_not_matter(door: int) -> None:
    silent = [
        calls(uncalibrated("chat", "math"), taps.SamplingParams())[door],
        calls(uncalibrated(), taps.SamplingParams(0.7))[door],
        calls(uncalibrated("chat").with_drafters(trained_drafters()), taps.SamplingParams(0.7))[door],
    ]
    without = uncalibrated("chat")
    without.drafting = "topk"
    silent.append(calls(without, taps.SamplingParams(0.7))[door])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in silent:
            call()


def test_drafters_without_calibration_draft_as_without_a_look_at_the_noise() -> None:
    ids, mask = prompts(4)
    arguments: dict[str, Any] = {"sampling": taps.SamplingParams(1.0, seed=3), "max_new_tokens": 24}
    with pytest.warns(UserWarning, match="not calibrated, and drafted as with drafting='topk': math, chat;"):
        found = uncalibrated("math", "chat").generate(ids, mask, **arguments).stats
    assert found.to_dict() == make_decoder(drafting="topk").generate(ids, mask, **arguments).stats.to_dict()
    assert found.to_dict() != make_decoder().generate(ids, mask, **arguments).stats.to_dict()


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "ids of one dimension": ({"input_ids": torch.tensor([1, 2])}, r"input_ids must be int64 \[B, P\]"),
    "ids beyond the vocabulary": ({"input_ids": torch.tensor([[1, VOCAB]])}, "the target's vocabulary"),
    "an empty prompt": (
        {"input_ids": torch.tensor([[5], [PAD]]), "attention_mask": torch.tensor([[1], [0]])},
        "prompt 1 has no token",
    ),
    "a mask of another shape": ({"attention_mask": torch.ones(1, 3)}, "attention_mask must be"),
    "a list of ids": ({"input_ids": [[1, 2]]}, "input_ids must be a tensor, got list"),
    "half a token": ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    "too many lengths": ({"max_new_tokens": [3, 4]}, "2 values for a batch of 1"),
    "stop strings without tokenizer": ({"stop_strings": ["x"]}, "need the tokenizer"),
    "half a place of a mask": ({"attention_mask": torch.tensor([[0.5, 1.0]])}, "attention_mask must hold 0 and 1 only"),
    "a mask of words": ({"attention_mask": [["a", "b"]]}, "attention_mask must be a tensor or lists"),
    "a word for EOS": ({"eos_token_id": "</s>"}, "eos_token_id must be a token id, several, .* got '</s>'"),
    "half an EOS": ({"eos_token_id": 1.5}, "eos_token_id must be a token id, several, .* got 1.5"),
    "no EOS among several": ({"eos_token_id": [None, 1]}, r"eos_token_id must be .* got \[None, 1\]"),
    "a dict for sampling": ({"sampling": {"seed": 1}}, r"sampling must be a SamplingParams or None, got \{'seed': 1\}"),
    "one processor": ({"logits_processor": print}, "must be a list of logits processors, got <.*; put it in"),
    "a number for a processor": ({"logits_processor": [1.3]}, "must be a list of logits processors, got 1.3 in it"),
    "no texts": ({"num_return_sequences": 0}, "num_return_sequences must be an integer of at least 1, got 0"),
    "seeds for another batch": ({"sampling": taps.SamplingParams(seed=[1, 2])}, "seed has 2 values for a batch of 1"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_get_one_sentence_before_any_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_decoder().generate(**{"input_ids": torch.tensor([[5, 6]]), **arguments})


def test_bad_decoders_get_one_sentence() -> None:
    target, drafters = trained_target(), trained_drafters()
    with pytest.raises(ValueError, match="one of single, confidence"):
        taps.SpeculativeDecoder(target, drafters, "average")
    with pytest.raises(ValueError, match=r"needs drafter=\.\.\., one of math, chat"):
        taps.SpeculativeDecoder(target, drafters, "single")
    with pytest.raises(ValueError, match="drafter must be one of math, chat"):
        taps.SpeculativeDecoder(target, drafters, "single", drafter="code")
    with pytest.raises(ValueError, match="1 to 63 drafters, got 0"):
        taps.SpeculativeDecoder(target, {})
    with pytest.raises(ValueError, match="budgets a merged tree"):
        taps.SpeculativeDecoder(target, drafters, "confidence", max_nodes=5)
    with pytest.raises(ValueError, match="a dict from name to drafter, got list"):
        taps.SpeculativeDecoder(target, list(drafters.values()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features of size 64, the target's have 32"):
        taps.SpeculativeDecoder(new_target(hidden_size=32, intermediate_size=32), drafters)
    with pytest.raises(ValueError, match="vocabulary 64, the target 32"):
        taps.SpeculativeDecoder(new_target(vocab_size=32), drafters)
    with pytest.raises(ValueError, match="drafting must be coupled or topk, got 'x'"):
        taps.SpeculativeDecoder(target, drafters, drafting="x")
    with pytest.raises(ValueError, match=r"evidence_decay must be above 0 and at most 1, or 0 with merged, got 1\.5"):
        taps.SpeculativeDecoder(target, drafters, "evidence", evidence_decay=1.5)
    for composition in ("confidence", "entropy"):
        with pytest.raises(ValueError, match=f"goes with composition evidence or merged, got '{composition}'"):
            taps.SpeculativeDecoder(target, drafters, composition, evidence_decay=0.9)
    for budget in (0, -3, 2.5, True, "9"):
        with pytest.raises(ValueError, match=f"joint_budget must be an integer of at least 1, got {budget!r}"):
            taps.SpeculativeDecoder(target, drafters, joint_budget=budget)
    with pytest.raises(ValueError, match="drives another model"):
        new_target().generate(torch.tensor([[5]]), custom_generate=make_decoder(), max_new_tokens=2)


def test_beams_and_warpers_without_an_op_are_refused_with_the_reason() -> None:
    ids, _ = prompts(1)
    with pytest.raises(ValueError, match="num_beams=3"):
        trained_target().generate(ids, custom_generate=make_decoder(), num_beams=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="output_scores=True is not available"):
        trained_target().generate(
            ids, custom_generate=make_decoder(), output_scores=True, return_dict_in_generate=True, max_new_tokens=4
        )

    class Own(WatermarkLogitsProcessor):
        """A subclass is refused like its class."""

    with pytest.raises(ValueError, match="WatermarkLogitsProcessor cannot run on a tree: it draws from a generator"):
        make_decoder().generate(ids, logits_processor=[Own(VOCAB, "cpu")])
    with pytest.raises(ValueError, match="TypicalLogitsWarper works behind the temperature"):
        trained_target().generate(ids, custom_generate=make_decoder(), do_sample=True, typical_p=0.5, max_new_tokens=4)


def by_generate(ids: Tensor, mask: Tensor, sampling: taps.SamplingParams) -> list[list[int]]:
    return make_decoder().generate(ids, mask, sampling=sampling, max_new_tokens=16).new_tokens


def by_plain_generate(ids: Tensor, mask: Tensor, sampling: taps.SamplingParams) -> list[list[int]]:
    return taps.plain_generate(trained_target(), ids, mask, sampling=sampling, max_new_tokens=16).new_tokens


def by_stream(ids: Tensor, mask: Tensor, sampling: taps.SamplingParams) -> list[list[int]]:
    events = list(make_decoder().stream(ids, mask, sampling=sampling, max_new_tokens=16))
    return [[token for event in events for token in event.new_tokens[row]] for row in range(len(ids))]


DOORS = {"generate": by_generate, "plain_generate": by_plain_generate, "stream": by_stream}


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("door", DOORS)
def test_a_row_alone_with_its_row_seed_has_the_text_that_it_has_in_the_batch(door: str, seed: int) -> None:
    ids, mask = prompts(4)
    together = DOORS[door](ids, mask, taps.SamplingParams(1.0, seed=seed))
    for row in range(4):
        own = taps.SamplingParams(np.float32(1.0), seed=np.int64(taps.row_seed(seed, row)))  # numpy's numbers are too
        assert DOORS[door](ids[row : row + 1], mask[row : row + 1], own) == [together[row]]


@pytest.mark.parametrize("manual_seed", range(3))
def test_a_row_of_the_transformers_door_can_be_repeated_alone(manual_seed: int) -> None:
    (ids, mask), decoder = prompts(4), make_decoder()
    torch.manual_seed(manual_seed)
    together = trained_target().generate(
        ids, attention_mask=mask, custom_generate=decoder, do_sample=True, top_k=0, max_new_tokens=16
    )
    torch.manual_seed(manual_seed)
    seed = int(torch.randint(2**62, ()))  # which the door draws
    for row in range(4):
        (alone,) = by_generate(
            ids[row : row + 1], mask[row : row + 1], taps.SamplingParams(1.0, seed=taps.row_seed(seed, row))
        )
        assert together[row, ids.shape[1] :].tolist()[: len(alone)] == alone


@pytest.mark.parametrize("door", DOORS)
def test_batches_of_consecutive_seeds_do_not_repeat_each_others_texts(door: str) -> None:
    """One prompt in all rows, warm: 16 texts that differ."""
    ids, mask = (tensor[:1].repeat(4, 1) for tensor in prompts(1))
    batches = [DOORS[door](ids, mask, taps.SamplingParams(1.5, seed=seed)) for seed in range(4)]
    assert len({tuple(text) for batch in batches for text in batch}) == 16


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_rows_that_ended_are_padded_as_by_transformers(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first EOS where there is no pad token, through every door; the rows end at tokens of their texts."""
    ids, mask = prompts(6)
    free = make_decoder().generate(ids, mask, max_new_tokens=40, eos_token_id=()).new_tokens
    ends = list(dict.fromkeys(free[row][place] for row, place in ((0, 9), (1, 17), (2, 4))))
    assert len(ends) == 3
    config = trained_target().generation_config
    monkeypatch.setattr(config, "pad_token_id", None)
    monkeypatch.setattr(config, "eos_token_id", [ends[i] for i in order])
    call: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 40}
    stock = trained_target().generate(ids, **call)
    assert (stock[:, -2:] == ends[order[0]]).all(-1).any()  # a row that ended sooner than another
    assert torch.equal(trained_target().generate(ids, custom_generate=make_decoder(), **call), stock)
    assert torch.equal(make_decoder().generate(ids, mask, max_new_tokens=40).sequences, stock)
    assert torch.equal(taps.plain_generate(trained_target(), ids, mask, max_new_tokens=40).sequences, stock)


def test_own_criteria_may_answer_with_a_bool() -> None:
    ids, _ = prompts(1)
    result = trained_target().generate(
        ids,
        custom_generate=make_decoder(),
        do_sample=False,
        max_new_tokens=20,
        stopping_criteria=StoppingCriteriaList([lambda tokens, scores, **kwargs: tokens.shape[1] >= ids.shape[1] + 7]),
    )
    assert result.shape[1] == ids.shape[1] + 7
