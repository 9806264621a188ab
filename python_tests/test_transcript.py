"""Tokens as text while they arrive: nothing lost, nothing shown twice, each piece under the right name."""

from __future__ import annotations

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from taps_ext.cli.terminal import SEVERAL, Palette, Span, Transcript, join_spans

TEXT = "naïve café, 東京 is 20°C, said the 🦉"


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: every character beyond ASCII arrives in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_the_spans_join_to_the_whole_text(byte_tokenizer: PreTrainedTokenizerFast, step: int) -> None:
    tokens = byte_tokenizer(TEXT)["input_ids"]
    transcript = Transcript(byte_tokenizer)
    spans: list[Span] = []
    for start in range(0, len(tokens), step):
        spans += transcript.add(tokens[start : start + step], [("math",)])
    assert "".join(span.text for span in spans + transcript.finish()) == TEXT


def test_an_unfinished_character_is_held_back_and_shown_at_the_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    transcript = Transcript(byte_tokenizer)
    first_half = byte_tokenizer("é")["input_ids"][:1]
    assert transcript.add(first_half, []) == []
    assert [span.text for span in transcript.finish()] == ["\ufffd"]
    assert transcript.finish() == []


def test_the_token_after_the_accepted_ones_is_the_targets_own(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = byte_tokenizer("abcd")["input_ids"]
    spans = Transcript(byte_tokenizer).add(tokens, [("math",), ("math",), ("math", "chat")])
    assert spans == [Span("ab", ("math",)), Span("c", ("math", "chat")), Span("d", ())]


def test_an_accepted_run_cut_by_eos_keeps_its_names(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = byte_tokenizer("ab")["input_ids"]
    assert Transcript(byte_tokenizer).add(tokens, [("chat",)] * 5) == [Span("ab", ("chat",))]


def test_neighbouring_spans_of_the_same_proposers_become_one() -> None:
    spans = [Span("a", ()), Span("", ("math",)), Span("b", ()), Span("c", ("math",))]
    assert join_spans(spans) == [Span("ab", ()), Span("c", ("math",))]


def test_colours_tell_each_drafter_several_and_the_target_apart() -> None:
    palette = Palette(["math", "chat"])
    styles = [palette.style(names) for names in (("math",), ("chat",), ("math", "chat"), ())]
    assert len(set(styles)) == 4
    assert styles[2:] == [SEVERAL, ""]


def test_without_colours_brackets_name_the_drafters() -> None:
    text = Palette(["math", "chat"]).text([Span("so ", ()), Span("6", ("math", "chat"))], has_colours=False)
    assert text.plain == "so [math+chat:6]"


def test_square_brackets_in_a_text_are_not_taken_for_markup() -> None:
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(Palette(["math"]).text([Span("[bold]x[/bold]", ())]), end="")
    assert capture.get() == "[bold]x[/bold]"
