"""Chat formats from their public definitions, each as a template with a small real tokenizer, and again by hand.

By hand means `pieces`: the text of a conversation piece by piece, and which pieces a drafter learns. No template and no
code of the library has a part in it, so it is what masks are tested against.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from taps_ext.tiny import assets

Messages = Sequence[Mapping[str, str]]
Piece = tuple[str, bool]  # text, and whether it is learned

# --- the formats ------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml_pieces(messages: Messages) -> Iterator[Piece]:
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield message["content"] + "<|im_end|>", message["role"] == "assistant"
        yield "\n", False


LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama3_pieces(messages: Messages) -> Iterator[Piece]:
    yield "<|begin_of_text|>", False
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"


# The later versions always have a system message, with the date of the day.
LLAMA32 = (
    "{{ bos_token }}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: '"
    " + strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' }}" + LLAMA3.removeprefix("{{ bos_token }}")
)


def llama32_pieces(messages: Messages) -> Iterator[Piece]:
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"].strip(), messages[1:]
    yield "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", False
    yield "Cutting Knowledge Date: December 2023\n", False
    yield f"Today Date: {datetime.now().strftime('%d %b %Y')}\n\n{system}<|eot_id|>", False
    yield from list(llama3_pieces(messages))[1:]


# An answer to the last question is given a reasoning block, an empty one if need be; earlier answers lose theirs.
QWEN3 = r"""{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > last.question and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
            {%- set content = content.lstrip('\n') %}
        {%- endif %}
    {%- endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""


def qwen3_pieces(messages: Messages) -> Iterator[Piece]:
    """Of messages without reasoning."""
    *earlier, last = messages
    yield from chatml_pieces(earlier)
    if last["role"] == "assistant":
        yield "<|im_start|>assistant\n<think>\n\n</think>\n\n", False
        yield last["content"].lstrip("\n") + "<|im_end|>", True
        yield "\n", False
    else:
        yield from chatml_pieces([last])


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}"
    '{% else %}{{ "' + VICUNA_SYSTEM + ' " }}{% endif %}{% for message in messages %}'
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vicuna_pieces(messages: Messages) -> Iterator[Piece]:
    system, *rest = messages if messages[0]["role"] == "system" else [{"content": VICUNA_SYSTEM}, *messages]
    yield system["content"] + " ", False
    for message in rest:
        if message["role"] == "user":
            yield f"USER: {message['content']} ", False
        else:
            yield "ASSISTANT: ", False
            yield message["content"] + "</s>", True


def tiny_pieces(messages: Messages) -> Iterator[Piece]:
    yield "<|begin|>", False
    for message in messages:
        yield f"<|{message['role']}|>", False
        yield message["content"] + "<|end|>", message["role"] == "assistant"


# --- the tokenizers ---------------------------------------------------------------------------------------------------

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN3_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
CORPUS = (
    "The assistant answers the user. USER: how many? ASSISTANT: 12 345, I think.\n\nsystem and user and assistant\n"
    "Hello there! What's the sum of 3 and 4?  It is 7.\n  - one\n  - two\n\n\n    def f(x):\n        return x\n"
    "Grüße, señor; naïve café. Привет мир. こんにちは世界 😀👩‍👩‍👧 <|im_end|> think <think> [INST] ### :\n "
) * 4


def byte_level(words: str, special: Sequence[str | AddedToken], template: str, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama-3, Qwen and ChatML models have it, with the offsets that leave blanks out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens(list(special))
    post: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=True)]
    if bos := named.get("bos_token"):  # which the template writes too: it must not be there twice
        post.append(processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]))
    tokenizer.post_processor = processors.Sequence(post)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def llama3_tokenizer(template: str = LLAMA3) -> PreTrainedTokenizerFast:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|eot_id|>"}
    return byte_level(LLAMA3_WORDS, special, template, **named)


def chatml_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(LLAMA3_WORDS, special, template, eos_token="<|im_end|>", pad_token="<|im_end|>")


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(QWEN3_WORDS, special, QWEN3, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def vicuna_tokenizer(template: str = VICUNA, *special: str) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as Llama-2 has it: `▁` for a blank, one more where a text begins, bytes for what is rare."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(CORPUS.splitlines(), trainers.BpeTrainer(vocab_size=600, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab += [token for token in model["vocab"] if token not in {"\n", "😀", "ñ"}]  # these become bytes
    merges = [tuple(merge) for merge in model["merges"] if not {"\n", "😀", "ñ"} & set("".join(merge))]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>", *special)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


# --- both together ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A chat format: its tokenizer with the template, the same by hand, and the token that ends an answer."""

    make_tokenizer: Callable[[], PreTrainedTokenizerFast]
    pieces: Callable[[Messages], Iterator[Piece]]
    end: str
    token_bytes: Callable[[str], bytes]
    normalize: Callable[[str], str] = str

    def expected_mask(self, tokens: Sequence[str], messages: Messages) -> list[bool]:
        """Which tokens are learned, by counting their bytes along the pieces."""
        pieces = [(self.normalize(text).encode(), is_learned) for text, is_learned in self.pieces(messages)]
        learned = [is_learned for text, is_learned in pieces for _ in text]
        mask, start, is_first = [], 0, True
        for token in tokens:
            text = self.token_bytes(token)
            is_special = token in SPECIAL
            # Where a text begins, SentencePiece puts a blank that the text does not have.
            has_extra = is_first and self.token_bytes is sentencepiece_bytes and not is_special
            end = start + len(text) - has_extra
            mask.append(any(learned[start : max(end, start + 1)]))
            start, is_first = end, is_special
        assert start == len(learned)
        return mask


SPECIAL = {"</s>", "<s>", "<unk>"}  # SentencePiece's
BYTE_OF = {
    chr(code): byte
    for byte, code in zip(
        [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173],
        [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)],
        strict=True,
    )
}


@lru_cache(4096)
def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token, after GPT-2's table of visible characters."""
    return token.encode() if set(token) - set(BYTE_OF) else bytes(BYTE_OF[c] for c in token)


@lru_cache(4096)
def sentencepiece_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece token."""
    if token.startswith("<0x") and len(token) == 6:
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


FORMATS = {
    "llama3": Format(llama3_tokenizer, llama3_pieces, "<|eot_id|>", byte_level_bytes),
    "llama3.2": Format(lambda: llama3_tokenizer(LLAMA32), llama32_pieces, "<|eot_id|>", byte_level_bytes),
    "qwen3": Format(
        qwen3_tokenizer, qwen3_pieces, "<|im_end|>", byte_level_bytes, lambda text: unicodedata.normalize("NFC", text)
    ),
    "vicuna": Format(vicuna_tokenizer, vicuna_pieces, "</s>", sentencepiece_bytes),
    "chatml": Format(chatml_tokenizer, chatml_pieces, "<|im_end|>", byte_level_bytes),
    "tiny": Format(
        lambda: PreTrainedTokenizerFast.from_pretrained(assets() / "target"), tiny_pieces, "<|end|>", byte_level_bytes
    ),
}


@lru_cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of FORMATS, made once."""
    return FORMATS[name].make_tokenizer()
