"""Claims about loss masks: what a drafter learns of a conversation is what the assistant says, and no token besides."""

from __future__ import annotations

import copy
import pickle
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import groupby
from random import Random
from typing import Any

import pytest
from chat_templates import (
    CHATML,
    FORMATS,
    LLAMA32,
    Piece,
    chatml_tokenizer,
    llama3_tokenizer,
    tokenizer_of,
    vicuna_tokenizer,
)
from tokenizers import AddedToken
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from taps_ext.training.masks import ChatFormat, MaskError

Messages = list[dict[str, str]]
CASES = 300  # conversations a format

WORDS = (
    *("Hello", "the", "a", "I", "of", "sum", "12", "3.14", "2024", "x=1", "don't", ".", "!", "?\n", "```\n"),
    *("naïve", "e\u0301", "Привет", "こんにちは", "नमस्ते", "😀", "👩‍👩‍👧", "\u200b", "\ue0000\ue001", "\ue0001\ue001"),
    *("assistant", "user", "system", "USER:", "ASSISTANT:", "ASSISTANT: ", "[INST]", "### Assistant:", "{{ x }}"),
    *("<|im_start", "|im_end|>", "<|eot_id", "</s", "<|end", "<s ", "<0x0A>", "{% if %}"),
    *("\n", "\n\n", "  ", "\t", " \n ", "\r\n", "\u00a0", "\u3000"),
)
EDGES = ("", "", "", " ", "  ", "\n", "\n\n", "\t", " \n", "\n ", "\u00a0")


def make_content(rng: Random) -> str:
    words = "".join(rng.choice(WORDS) + rng.choice(("", " ", " ")) for _ in range(rng.choice((0, 0, 1, 2, 5, 12, 30))))
    return rng.choice(EDGES) + rng.choice(("a", "7", "é", "Yes", "😀", "assistant")) + words + rng.choice(EDGES)


def make_conversation(rng: Random) -> Messages:
    """One to four turns, half of them with a system message, some ending in a question, with repeated contents."""
    contents = [make_content(rng) for _ in range(8)]
    messages = [{"role": "system", "content": rng.choice(contents)}] * rng.randint(0, 1)
    for _ in range(rng.randint(1, 4)):
        messages += [{"role": role, "content": rng.choice(contents)} for role in ("user", "assistant")]
    if rng.random() < 0.15:
        messages.append({"role": "user", "content": rng.choice(contents)})
    return messages


def turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TURNS = turn("one", "two") + turn("three", "four")


def learned_texts(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[str]:
    """The text of each run of learned tokens, over all examples of a conversation."""
    examples = ChatFormat(tokenizer).examples(messages)
    assert list(examples[-1].tokens) == tokenize(tokenizer, messages)
    pairs = (pair for one in examples for pair in zip(one.tokens, one.loss_mask, strict=True))
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for is_learned, run in runs if is_learned]


def tokenize(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    tokens: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    return tokens


# --- the formats of Llama-3, Qwen3, Vicuna, ChatML and the tiny world -------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_exactly_what_the_assistant_says_is_learned(name: str) -> None:
    form, tokenizer, rng = FORMATS[name], tokenizer_of(name), Random(name)
    chat_format = ChatFormat(tokenizer)
    assert chat_format.has_end_of_turn
    for _ in range(CASES):
        messages = make_conversation(rng)
        by_hand = "".join(text for text, _ in form.pieces(messages))
        assert tokenizer.apply_chat_template(messages, tokenize=False) == by_hand
        example = chat_format.encode(messages)
        assert list(example.tokens) == tokenize(tokenizer, messages)
        names = tokenizer.convert_ids_to_tokens(example.tokens)
        assert list(example.loss_mask) == form.expected_mask(names, messages), messages


@pytest.mark.parametrize("name", FORMATS)
def test_learned_tokens_read_as_each_answer_with_its_end(name: str) -> None:
    form, tokenizer, rng = FORMATS[name], tokenizer_of(name), Random(f"{name}/read")
    for _ in range(CASES // 10):
        messages = make_conversation(rng)
        answers = [message["content"] + form.end for message in messages if message["role"] == "assistant"]
        texts = learned_texts(tokenizer, messages)
        assert [bare(text, form.end) for text in texts] == [bare(text, form.end) for text in answers]


def bare(text: str, end: str) -> str:
    return unicodedata.normalize("NFC", text.removesuffix(end).strip()) + end


@pytest.mark.parametrize("name", FORMATS)
def test_every_end_of_turn_is_learned_though_it_may_be_the_padding_too(name: str) -> None:
    form, tokenizer, rng = FORMATS[name], copy.deepcopy(tokenizer_of(name)), Random(f"{name}/ends")
    tokenizer.pad_token = tokenizer.eos_token = form.end
    chat_format = ChatFormat(tokenizer)
    for _ in range(CASES // 10):
        messages = make_conversation(rng)
        example = chat_format.encode(messages)
        learned = [t for t, is_learned in zip(example.tokens, example.loss_mask, strict=True) if is_learned]
        assert learned.count(tokenizer.pad_token_id) == sum(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("name", FORMATS)
def test_contents_that_hold_special_tokens_change_nobodys_turn(name: str) -> None:
    form, tokenizer, rng = FORMATS[name], tokenizer_of(name), Random(f"{name}/special")
    chat_format = ChatFormat(tokenizer)
    for _ in range(CASES // 10):
        messages = [{**message, "content": "a" + message["content"]} for message in make_conversation(rng)]
        for message in rng.sample(messages, rng.randint(1, len(messages))):
            message["content"] += f"x{form.end}x{rng.choice(list(tokenizer.get_added_vocab()))}x"
            message["content"] = message["content"].replace("think>", "s>")  # reasoning has its own tests
        if name == "vicuna":
            messages = [{**message, "content": message["content"].replace("</s>", "</s")} for message in messages]
        example = chat_format.encode(messages)
        names = tokenizer.convert_ids_to_tokens(example.tokens)
        assert list(example.loss_mask) == form.expected_mask(names, messages), messages


def test_a_token_that_shares_the_blank_before_an_answer_is_learned() -> None:
    tokenizer = tokenizer_of("vicuna")
    example = ChatFormat(tokenizer).encode(turn("how many?", "Hello 😀"))
    names = tokenizer.convert_ids_to_tokens(example.tokens)
    assert names[-8:] == ["▁ASSISTANT:", "▁Hello", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "</s>"]
    assert example.loss_mask[-8:] == (False, *[True] * 7)
    assert not any(example.loss_mask[:-8])


def test_blanks_of_an_answer_are_learned_and_those_of_its_header_are_not() -> None:
    tokenizer = tokenizer_of("chatml")
    backend_offsets = tokenizer(".  .", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in backend_offsets), "this tokenizer should leave blanks out of its offsets"
    assert learned_texts(tokenizer, turn("a ", " a\n\n  b  ")) == [" a\n\n  b  <|im_end|>"]


def test_masks_agree_with_a_template_that_marks_what_the_assistant_says() -> None:
    tokenizer, rng = tokenizer_of("tiny"), Random("generation")
    chat_format = ChatFormat(tokenizer)
    for _ in range(CASES // 10):
        messages = [{**m, "content": m["content"].strip()} for m in make_conversation(rng)]
        marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert list(chat_format.encode(messages).loss_mask) == [bool(flag) for flag in marked["assistant_masks"]]


def test_a_template_may_write_the_date_and_midnight_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = llama3_tokenizer(LLAMA32)
    chat_format = ChatFormat(tokenizer)
    messages = [*turn("a", "b"), *turn("c", "d"), {"role": "user", "content": "e"}]
    before = chat_format.encode(messages)

    class Tomorrow:
        @staticmethod
        def now() -> datetime:
            return datetime.now() + timedelta(days=40)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    after = chat_format.encode(messages)
    assert after.tokens != before.tokens and list(after.tokens) == tokenize(tokenizer, messages)
    assert sum(after.loss_mask) == sum(before.loss_mask) == 4


@pytest.mark.parametrize(
    "switches", [{"truncation": True, "max_length": 3}, {"padding": "max_length", "max_length": 99}]
)
def test_what_a_tokenizer_was_last_asked_for_does_not_matter(switches: dict[str, Any]) -> None:
    tokenizer = llama3_tokenizer()
    assert len(tokenizer("one two three four", **switches)["input_ids"]) == switches["max_length"]  # and it stays so
    chat_format = ChatFormat(tokenizer)
    assert list(chat_format.encode(TURNS).tokens) == tokenize(tokenizer, TURNS)
    assert pickle.loads(pickle.dumps(chat_format)).encode(TURNS) == chat_format.encode(TURNS)


def test_the_end_of_a_turn_need_not_be_the_eos() -> None:
    for name in ("llama3", "llama3.2", "qwen3", "chatml"):
        tokenizer = copy.deepcopy(tokenizer_of(name))
        for eos in ("<|endoftext|>", None):
            tokenizer.eos_token = eos
            end = FORMATS[name].end
            assert learned_texts(tokenizer, TURNS) == ["two" + end, "four" + end]


# --- reasoning --------------------------------------------------------------------------------------------------------

REASONED = "<think>\nthree and four\n</think>\n\nIt is 7."


def test_the_reasoning_of_the_last_answer_is_learned() -> None:
    texts = learned_texts(tokenizer_of("qwen3"), turn("2 + 2?", "4") + turn("3 + 4?", REASONED))
    assert texts == ["4<|im_end|>", REASONED + "<|im_end|>"]


def test_reasoning_that_a_template_writes_differently_is_learned_as_it_is_written() -> None:
    texts = learned_texts(tokenizer_of("qwen3"), turn("3 + 4?", "<think>three and four</think>It is 7."))
    assert texts == [REASONED + "<|im_end|>"]
    separate = [*turn("3 + 4?", "It is 7.")]
    separate[1]["reasoning_content"] = "three and four"
    assert learned_texts(tokenizer_of("qwen3"), separate) == [REASONED + "<|im_end|>"]


@pytest.mark.parametrize("is_separate", [False, True])
def test_a_conversation_of_two_thinking_turns_is_one_example_a_turn(is_separate: bool) -> None:
    """Each as the template renders it at that moment: with its own reasoning, and without that of earlier answers."""
    tokenizer = tokenizer_of("qwen3")
    messages = turn("3 + 4?", REASONED) + turn("2 + 2?", "<think>\nfour\n</think>\n\nIt is 4.")
    if is_separate:
        reasons = {1: "three and four", 3: "four"}
        messages = [
            {**m, "content": m["content"].split("\n\n")[-1], "reasoning_content": reasons[i]} if i in reasons else m
            for i, m in enumerate(messages)
        ]
    first, second = ChatFormat(tokenizer).examples(messages)
    assert list(first.tokens) == tokenize(tokenizer, messages[:2])
    assert list(second.tokens) == tokenize(tokenizer, messages)
    assert "three and four" not in tokenizer.decode(second.tokens), "the template drops earlier reasoning"
    expected = [REASONED, "<think>\nfour\n</think>\n\nIt is 4."]
    assert learned_texts(tokenizer, messages) == [text + "<|im_end|>" for text in expected]


def test_a_plain_answer_after_a_thinking_one_is_an_example_of_its_own() -> None:
    texts = learned_texts(tokenizer_of("qwen3"), turn("3 + 4?", REASONED) + turn("2 + 2?", "4"))
    assert texts == [REASONED + "<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"], "as it is written at that moment"


# --- other fields of messages ----------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tool_calls_are_learned_where_the_template_writes_them() -> None:
    messages: Messages = [{"role": "user", "content": "Weather in Bern?"}]
    messages += [{"role": "assistant", "content": "I look.", "tool_calls": [CALL]}]
    messages += [{"role": "tool", "content": "Rain."}, {"role": "assistant", "content": "It rains."}]
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    assert learned_texts(chatml_tokenizer(WITH_TOOLS), messages) == [f"I look.{call}<|im_end|>", "It rains.<|im_end|>"]


def test_tools_are_written_and_not_learned() -> None:
    tokenizer, tools = chatml_tokenizer(WITH_TOOLS), [CALL["function"]]
    (example,) = ChatFormat(tokenizer).examples(TURNS, tools)
    assert tokenizer.decode(example.tokens).startswith("<|im_start|>system\nTools: ")
    learned = [t for t, is_learned in zip(example.tokens, example.loss_mask, strict=True) if is_learned]
    assert tokenizer.decode(learned) == "two<|im_end|>four<|im_end|>"


@pytest.mark.parametrize(
    "fields, tools",
    [({"tool_calls": [CALL]}, None), ({"reasoning_content": "Two and two."}, None), ({}, [CALL["function"]])],
)
def test_what_a_template_does_not_read_is_no_example(fields: dict[str, Any], tools: Any) -> None:
    messages = turn("2 + 2?", "Four.")
    messages[1] |= fields
    name = next(iter(fields), "tools")
    with pytest.raises(MaskError, match=f"^the chat template does not read {name}$"):
        ChatFormat(tokenizer_of("chatml")).examples(messages, tools)


@pytest.mark.parametrize("name", FORMATS)
def test_of_an_unfinished_answer_the_content_is_learned_and_no_end(name: str) -> None:
    tokenizer, end = tokenizer_of(name), FORMATS[name].end
    messages = turn("one", "two") + turn("three", "four and")
    whole = learned_texts(tokenizer, messages)
    messages[-1]["unfinished"] = True
    assert learned_texts(tokenizer, messages) == [whole[0], whole[1].removesuffix(end)]


# --- other templates --------------------------------------------------------------------------------------------------


def with_template(template: str, *special: str) -> PreTrainedTokenizerBase:
    """ChatML's tokenizer with more special tokens and another template."""
    tokenizer = chatml_tokenizer(template)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def each(user: str, assistant: str, begin: str = "") -> str:
    """A template from what is written for a user's and an assistant's message, both Jinja expressions."""
    return (
        f"{{{{ '{begin}' }}}}{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ {user} }}}}"
        f"{{% else %}}{{{{ {assistant} }}}}{{% endif %}}{{% endfor %}}"
    )


OPENERS = ("<|user|>", "<|assistant|>")
U, A = "'<|user|>\n' + m.content", "'<|assistant|>\n' + m.content"


@pytest.mark.parametrize(
    "case, template, expected",
    [
        ("between turns only", each(U, A + " + ('' if loop.last else eos_token)"), ["two<|im_end|>", "four"]),
        ("at the end only", each(U, A + " + (eos_token if loop.last else '')"), ["two", "four<|im_end|>"]),
        ("one not the eos", each(U, A + " + ('<|endoftext|>' if loop.last else eos_token)"), ["two<|im_end|>", "four"]),
        ("never", each(U, A), ["two", "four"]),
        ("the same opener throughout", each("'<|user|>' + m.content", "'<|user|>' + m.content"), ["two", "four"]),
        ("a prompt always", each(U, A) + "<|assistant|>\n", ["two", "four"]),
        ("the same opener, a prompt always", each(U, "'<|user|>' + m.content") + "<|user|>", ["two", "four"]),
        ("that, after a bos", each(U, "'<|user|>' + m.content", "<|endoftext|>") + "<|user|>", ["two", "four"]),
        ("not the eos", each(U, A + " + '<|endoftext|>\n'"), ["two<|endoftext|>", "four<|endoftext|>"]),
        ("text before it", each(U, A + " + '\n<|im_end|>\n'"), ["two\n<|im_end|>", "four\n<|im_end|>"]),
        ("blanks are one token", each(U, A + " + '\n\n'"), ["two", "four"]),
        ("the eos begins too", each(U, A + " + eos_token", "<|im_end|>"), ["two<|im_end|>", "four<|im_end|>"]),
    ],
)
def test_the_end_of_a_turn_is_no_opener_of_another(case: str, template: str, expected: list[str]) -> None:
    tokenizer = with_template(template, *OPENERS, "\n\n")
    tokenizer.bos_token = "<|endoftext|>"
    assert learned_texts(tokenizer, TURNS) == expected
    assert ChatFormat(tokenizer).has_end_of_turn == (expected != ["two", "four"])


def test_without_special_tokens_only_contents_are_learned() -> None:
    tokenizer = with_template(each("'### User: ' + m.content + '\n\n'", "'### Assistant: ' + m.content + '\n\n'"))
    assert learned_texts(tokenizer, TURNS) == [" two", " four"]
    assert learned_texts(tokenizer, turn("one", "The.")) == [" The.\n\n"]  # where words and blanks share tokens
    assert not ChatFormat(tokenizer).has_end_of_turn


def test_llama2_ends_an_answer_with_a_blank_and_its_token() -> None:
    template = each("bos_token + '[INST] ' + m.content + ' [/INST]'", "' ' + m.content.strip() + ' ' + eos_token")
    assert learned_texts(vicuna_tokenizer(template), TURNS) == ["two </s>", "four </s>"]


def test_a_system_message_may_be_written_inside_another() -> None:
    template = (
        "{% set system = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + (' ' + system if loop.index0 > 1 else '') + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    with_system = "{% if messages[0].role == 'system' %}" + template + "{% else %}" + CHATML + "{% endif %}"
    messages = [{"role": "system", "content": "two"}, *TURNS]
    assert learned_texts(with_template(with_system), messages) == ["two<|im_end|>", "four<|im_end|>"]


STRIPS: dict[str, Callable[[str], str]] = {
    "": str,
    "|trim": str.strip,
    ".strip()": str.strip,
    ".lstrip()": str.lstrip,
    ".rstrip()": str.rstrip,
    ".lstrip('\\n')": lambda text: text.lstrip("\n"),
    ".strip('\\n')": lambda text: text.strip("\n"),
}


@pytest.mark.parametrize("strip", STRIPS)
@pytest.mark.parametrize("after", ["", "\n", " \n\n", " <|im_end|>\n"])
def test_templates_strip_contents_as_they_like(strip: str, after: str) -> None:
    end, rest = (after[:-1], after[-1:]) if "<" in after else ("", after)

    def pieces(messages: Sequence[Mapping[str, str]]) -> Iterator[Piece]:
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            yield "<|user|>\n " + user["content"], False
            yield "<|assistant|> \n", False
            yield STRIPS[strip](assistant["content"]) + end, True
            yield rest, False

    template = each("'<|user|>\n ' + m.content", f"'<|assistant|> \n' + (m.content{strip}) + {after!r}")
    tokenizer = with_template(template, *OPENERS)
    form, chat_format = replace(FORMATS["chatml"], pieces=pieces), ChatFormat(tokenizer)
    for content in ("two", " \n two\n \n\n", "\n\ntwo", "two\n\n", "two \n", " \n\t"):
        for messages in (turn(content, content), turn(content, content) + turn("x", content)):
            example = chat_format.encode(messages)
            names = tokenizer.convert_ids_to_tokens(example.tokens)
            assert list(example.loss_mask) == form.expected_mask(names, messages), content


def test_blanks_that_a_header_swallows_are_no_answer() -> None:
    tokenizer = chatml_tokenizer(each(U, A + " + '<|im_end|>\n'"))
    greedy = [AddedToken(text, special=True, normalized=False, rstrip=True) for text in OPENERS]
    tokenizer.add_tokens(greedy)
    example = ChatFormat(tokenizer).encode(turn("one", "  two"))
    names = tokenizer.convert_ids_to_tokens(example.tokens)
    assert names.count("<|assistant|>") == 1 and not example.loss_mask[names.index("<|assistant|>")]
    assert learned_texts(tokenizer, turn("one", "  two")) == ["two<|im_end|>"]


def test_an_answer_of_nothing_is_its_end() -> None:
    assert learned_texts(tokenizer_of("chatml"), turn("one", "")) == ["<|im_end|>"]
    assert learned_texts(tokenizer_of("llama3"), turn(" ", " \n ")) == ["<|eot_id|>"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_a_template_raises_is_the_reason() -> None:
    with pytest.raises(MaskError, match="refuses the conversation: Conversation roles must alternate"):
        ChatFormat(tokenizer_of("vicuna")).examples([*TURNS, *TURNS[1:]])


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "no message is the assistant's"),
        (TURNS[:1], "no message is the assistant's"),
        ([TURNS[0], {"role": "assistant"}], "no content that is text"),
        ([TURNS[0], {"role": "assistant", "content": ["x"]}], "no content that is text"),
        (turn("half: \ud83d", "b"), "half a surrogate pair"),
    ],
)
def test_what_cannot_be_masked_is_refused_with_its_reason(messages: Messages, reason: str) -> None:
    with pytest.raises(MaskError, match=reason):
        ChatFormat(tokenizer_of("chatml")).examples(messages)


@pytest.mark.parametrize(
    "assistant, reason",
    [
        (A + ".upper()", "rewrites the content"),
        (A + ".replace('o', '0')", "rewrites the content"),
        (A + " + m.content", "writes it twice"),
        ("'<|assistant|>'", "leaves out an assistant message"),
    ],
)
def test_a_template_that_rewrites_answers_is_refused(assistant: str, reason: str) -> None:
    chat_format = ChatFormat(with_template(each(U, assistant), *OPENERS))
    with pytest.raises(MaskError, match=reason):
        chat_format.examples(TURNS)


PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"


@pytest.mark.parametrize(
    "case, template",
    [
        ("its header is not known", each(U, A + ".upper() + eos_token")),
        ("another header", each(U, A + ".upper() + eos_token") + PROMPT.replace("\n", "#")),
        ("its end is not known", each(U, A + " + ('! and so on' if m.content == 'two' else eos_token)") + PROMPT),
        ("nothing is left", each(U, "'<|assistant|>\n' + (m.content + '\n' if m.content != 'two' else '')") + PROMPT),
    ],
)
def test_a_rewritten_last_answer_is_refused_where_it_cannot_be_told_from_its_prompt(case: str, template: str) -> None:
    chat_format = ChatFormat(with_template(template, *OPENERS))
    with pytest.raises(MaskError, match="rewrites the content"):
        chat_format.examples(TURNS[:2])


def test_a_rewritten_last_answer_is_learned_as_it_is_written() -> None:
    template = each(U, A + " + eos_token").replace("m.content + eos", "m.content.replace('f', 'F') + eos") + PROMPT
    assert learned_texts(with_template(template, *OPENERS), TURNS) == ["two<|im_end|>", "Four<|im_end|>"]


def test_tokenizers_that_cannot_serve_are_refused() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatFormat(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(ValueError, match=r"cannot write a plain conversation: .*only tools"):
        ChatFormat(tokenizer)
    slow = ByT5Tokenizer()
    slow.chat_template = CHATML
    with pytest.raises(ValueError, match="ByT5Tokenizer does not say which characters"):
        ChatFormat(slow)
