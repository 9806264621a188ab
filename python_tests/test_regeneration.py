"""Claims about regeneration: the answers are the target's own, whatever the batches and interruptions."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from worlds import corpus

import taps_ext as taps
from taps_ext import tiny
from taps_ext.training.data import Conversation, Message, prepare
from taps_ext.training.masks import UNFINISHED, ChatFormat
from taps_ext.training.recipe import DataConfig, SourceConfig
from taps_ext.training.regenerate import NO_ROOM, NO_TEXT, REFUSED, TOOLS, RegenerationReport, regenerate

SYSTEM: Message = {"role": "system", "content": "Be brief."}


@cache
def models() -> Any:
    return tiny.load_target()


@cache
def conversations(count: int = 14) -> list[Conversation]:
    """Of both domains, one to four turns; every third begins with a system message."""
    texts = [text for domain in tiny.DOMAINS for text in corpus.conversations(domain, count // 2, seed=9)]
    return [Conversation((SYSTEM, *text) if i % 3 == 0 else tuple(text), f"here:{i}") for i, text in enumerate(texts)]


def run(output: Path, given: Sequence[Conversation] | None = None, **options: Any) -> RegenerationReport:
    target, tokenizer = models()
    options = {"max_new_tokens": 160, "temperature": 1.0, "seed": 5, **options}
    return regenerate(target, tokenizer, conversations() if given is None else given, output, **options)


def read(output: Path) -> list[list[Message]]:
    return [json.loads(line)["messages"] for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that an undisturbed run writes."""
    output = tmp_path_factory.mktemp("regeneration") / "whole.jsonl"
    run(output)
    return output


def left_alone(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "assistant"]


def answers(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_is_what_the_target_says_after_its_own_earlier_answers(temperature: float, tmp_path: Path) -> None:
    target, tokenizer = models()
    given = conversations()[4:8]
    run(tmp_path / "out.jsonl", given, temperature=temperature)
    for index, messages in enumerate(read(tmp_path / "out.jsonl")):
        is_whole = UNFINISHED not in messages[-1]
        asked = left_alone(given[index].messages)
        assert left_alone(messages) == (asked if is_whole else asked[: len(left_alone(messages))])
        for position in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            prompt = tokenizer.apply_chat_template(
                messages[:position], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            sampling = taps.SamplingParams(temperature, seed=taps.row_seed(5, index))
            alone = taps.plain_generate(target, prompt, sampling=sampling, max_new_tokens=160).new_tokens[0]
            end = "" if UNFINISHED in messages[position] else tokenizer.eos_token
            assert tokenizer.decode(alone) == messages[position]["content"] + end


def test_an_open_question_is_answered_as_if_it_had_had_an_answer(whole: Path, tmp_path: Path) -> None:
    open_ones = [Conversation(one.messages[:-1], one.origin) for one in conversations()]
    run(tmp_path / "out.jsonl", open_ones)
    assert (tmp_path / "out.jsonl").read_text() == whole.read_text()


def test_the_text_does_not_depend_on_batches(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "narrow.jsonl", batch_size=3)
    assert (tmp_path / "narrow.jsonl").read_bytes() == whole.read_bytes()


def test_drafters_do_not_change_the_text(whole: Path, tmp_path: Path) -> None:
    target, _ = models()
    decoder = taps.SpeculativeDecoder(target, taps.load_drafters(tiny.drafter_paths(), target))
    run(tmp_path / "drafted.jsonl", conversations()[:4], decoder=decoder)
    assert read(tmp_path / "drafted.jsonl") == read(whole)[:4]


def test_another_seed_gives_other_texts(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "other.jsonl", conversations()[:5], seed=6)
    pairs = zip(read(tmp_path / "other.jsonl"), read(whole)[:5], strict=True)
    assert all(other != one for other, one in pairs)


def test_what_is_written_can_be_trained_on_without_a_loss(whole: Path) -> None:
    _, tokenizer = models()
    data = prepare(DataConfig([SourceConfig(str(whole))], validation=0), tokenizer)
    assert len(data.training) == len(conversations())
    for messages in read(whole):
        example = ChatFormat(tokenizer).encode(messages)
        learned = [token for token, is_learned in zip(example.tokens, example.loss_mask, strict=True) if is_learned]
        assert tokenizer.decode(learned) == "".join(answer + tokenizer.eos_token for answer in answers(messages))


# --- answers that cannot be kept -------------------------------------------------------------------------------------


def test_an_answer_without_an_end_is_kept_and_ends_its_conversation(whole: Path, tmp_path: Path) -> None:
    _, tokenizer = models()
    report = run(tmp_path / "out.jsonl", max_new_tokens=36)
    num_unfinished = 0
    for before, after in zip(read(whole), read(tmp_path / "out.jsonl"), strict=True):
        lengths = [len(tokenizer(answer)["input_ids"]) for answer in answers(before)]  # without their end tokens
        number = next((i for i, length in enumerate(lengths) if length >= 36), None)
        num_unfinished += number is not None
        if number is None:
            assert after == before
            continue
        *same, last = after
        assert same == before[: len(same)] and len(answers(after)) == number + 1
        assert last[UNFINISHED] and answers(before)[number].startswith(last["content"])
    assert num_unfinished and report.num_unfinished == num_unfinished
    assert (report.num_written, report.cut, report.num_dropped) == (len(conversations()), {}, 0)


def test_no_end_is_learned_of_an_unfinished_answer(tmp_path: Path) -> None:
    _, tokenizer = models()
    run(tmp_path / "out.jsonl", max_new_tokens=36)
    data = prepare(DataConfig([SourceConfig(str(tmp_path / "out.jsonl"))], validation=0), tokenizer)
    assert len(data.training) == len(conversations()), "none is lost"
    num_ends = sum(
        token == tokenizer.eos_token_id
        for i in range(len(data.training))
        for token, is_learned in zip(data.training[i].tokens, data.training[i].loss_mask, strict=True)
        if is_learned
    )
    messages = [message for one in read(tmp_path / "out.jsonl") for message in one if message["role"] == "assistant"]
    assert num_ends == sum(UNFINISHED not in message for message in messages) < len(messages)


def test_results_of_tools_that_another_model_called_end_a_conversation(tmp_path: Path) -> None:
    messages = [*conversations()[1].messages[:2], {"role": "tool", "content": "7"}]
    messages += [{"role": "assistant", "content": "7"}]
    report = run(tmp_path / "out.jsonl", [conversations()[1], Conversation(tuple(messages), "here")])
    assert report.cut == {TOOLS: 1} and (report.num_written, report.num_dropped) == (1, 1)


def test_no_text_grows_beyond_the_targets_context(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, tokenizer = models()
    monkeypatch.setattr(target.config, "max_position_embeddings", 70)
    report = run(tmp_path / "out.jsonl")
    complete = read(whole)
    assert report.cut.keys() == {NO_ROOM} and report.num_unfinished
    for messages in read(tmp_path / "out.jsonl"):
        assert len(ChatFormat(tokenizer).encode(messages).tokens) <= 70 + 2, "with the end that an unfinished one lacks"
        *same, last = messages
        assert any(
            one[: len(same)] == same and one[len(same)]["content"].startswith(last["content"]) for one in complete
        )


def test_a_conversation_that_the_template_refuses_ends_there(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = models()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusal + tokenizer.chat_template)
    report = run(tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [messages for messages in read(whole) if messages[0] != SYSTEM]
    assert report.cut == {REFUSED: report.num_dropped}


def test_an_empty_answer_is_not_kept(tmp_path: Path) -> None:
    target, tokenizer = models()

    def generate(input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        answers = [[*tokenizer("Yes.")["input_ids"]] if len(row) % 2 else [] for row in input_ids]
        return SimpleNamespace(
            new_tokens=[[*answer, tokenizer.eos_token_id] for answer in answers], finish_reasons=["eos"] * len(answers)
        )

    decoder: Any = SimpleNamespace(target=SimpleNamespace(model=target), generate=generate)
    report = run(tmp_path / "out.jsonl", decoder=decoder, batch_size=1)
    assert report.cut[NO_TEXT] > 0
    assert {answer for messages in read(tmp_path / "out.jsonl") for answer in answers(messages)} == {"Yes."}


# --- interruptions ---------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def stop_after(num_done: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done >= num_done:
            raise StoppedError

    return progress


def test_a_stopped_run_goes_on_to_the_same_file(whole: Path, tmp_path: Path) -> None:
    """Stopped between two writes; then what it left is torn at any byte, as a full disk or a killed process does."""
    output, rng, begun = tmp_path / "out.jsonl", Random(3), []
    with pytest.raises(StoppedError):
        run(output, batch_size=1, progress=stop_after(9))
    partial = tmp_path / "out.jsonl.partial"
    left = partial.read_bytes()
    assert left.count(b"\n") == 1 + 9, "each was written when it was finished"
    for end in (3, rng.randrange(len(left) // 2, len(left))):
        partial.write_bytes(left[:end])
        run(output, batch_size=16, progress=lambda done, total: begun.append(done))
        assert output.read_bytes() == whole.read_bytes()
        assert begun[0] == max(0, left[:end].count(b"\n") - 1), "finished conversations were written again"
        assert list(tmp_path.iterdir()) == [output]
        output.unlink()
        begun.clear()


def test_a_run_does_not_go_on_with_what_another_began(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(StoppedError):
        run(output, batch_size=1, progress=stop_after(9))
    left = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(ValueError, match=r"out.jsonl.partial was begun with other temperature, seed; .* delete it"):
        run(output, seed=6, temperature=0.5)
    with pytest.raises(ValueError, match="was begun with other conversations;"):
        run(output, conversations()[:-1])
    assert (tmp_path / "out.jsonl.partial").read_bytes() == left
    settings, *lines = left.splitlines(keepends=True)
    del (older := json.loads(settings))["noise"]  # written when a seed meant other noise
    (tmp_path / "out.jsonl.partial").write_bytes(json.dumps(older).encode() + b"\n" + b"".join(lines))
    with pytest.raises(ValueError, match="was begun with other noise;"):
        run(output)


def test_seeds_are_64_bits_wide(tmp_path: Path) -> None:
    run(tmp_path / "out.jsonl", conversations()[:2], seed=2**63 - 1)
    with pytest.raises(ValueError, match=r"^seed must be a 64-bit integer, got 9223372036854775808$"):
        run(tmp_path / "other.jsonl", conversations()[:2], seed=2**63)
    assert list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


def test_nothing_left_to_write_is_an_error_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models()[0].config, "max_position_embeddings", 3)
    with pytest.raises(ValueError, match=r"no conversation is left to write: a prompt longer than .* \(14 times\)"):
        run(tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


# --- the door --------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(FileExistsError, match=r"out.jsonl exists already; give another name"):
        run(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ({"given": []}, "there is no conversation to answer"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path / "out.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models()[1], "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template"):
        run(tmp_path / "out.jsonl")


def test_a_decoder_of_another_target_is_refused(tmp_path: Path) -> None:
    other, _ = tiny.load_target()
    decoder = taps.SpeculativeDecoder(other, taps.load_drafters(tiny.drafter_paths(), other))
    with pytest.raises(ValueError, match="the decoder drives another target"):
        run(tmp_path / "out.jsonl", decoder=decoder)
