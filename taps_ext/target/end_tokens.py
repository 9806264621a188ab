"""Find the tokens that end an answer: those that the target's files name, and the end of turn of a chat template.

This relieves `decode/request.py`: a request knows the EOS tokens of a generation config alone, as transformers does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from operator import eq
from typing import Any

from transformers import PreTrainedModel

from ..sampling import warn

ANSWERS = ("1", "2")  # two answers that no filter of a template makes equal


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> dict[str, int]:
    """Return every token that ends an answer, by name, for commands that answer through a chat template.

    These are the EOS tokens of the target's generation config, of its config and of the tokenizer, and the token that
    ends an assistant's turn in the chat template, in this order. If they name different tokens, or the generation
    config or the tokenizer names none, a warning lists them. A token that the tokenizer lacks is named by its number;
    what is not in the target's vocabulary never comes, and is left out.
    """
    config = model.config.get_text_config()
    sources = {
        "the generation config": _listed(getattr(model.generation_config, "eos_token_id", None)),
        "the config": _listed(getattr(config, "eos_token_id", None)),
        "the tokenizer": _listed(tokenizer.eos_token_id),
        "the chat template": _end_of_turn(tokenizer),
    }
    every = list(dict.fromkeys(token for tokens in sources.values() for token in tokens))
    needed = ("the generation config", "the tokenizer")
    if any(set(tokens) != set(every) for source, tokens in sources.items() if tokens or source in needed):
        names = {source: ", ".join(_name(tokenizer, token) for token in ids) for source, ids in sources.items()}
        named = [f"{source} {listed or 'none'}" for source, listed in names.items()]
        foreign = [str(token) for token in every if not 0 <= token < config.vocab_size]
        but = f", except {', '.join(foreign)}, which the target's vocabulary lacks" if foreign else ""
        warn(f"end-of-text tokens differ: {'; '.join(named)}; each of them ends an answer{but}")
    return {_name(tokenizer, token): token for token in every if 0 <= token < config.vocab_size}


def _listed(tokens: Any) -> list[int]:
    """Return the token ids of a configuration's entry: none, one or several."""
    ids = [] if tokens is None else list(tokens) if isinstance(tokens, (list, tuple)) else [tokens]
    if not all(isinstance(token, int) for token in ids):
        raise ValueError(f"the target's eos_token_id must be a number or a list of numbers, got {tokens!r}")
    return ids


def _name(tokenizer: Any, token: int) -> str:
    is_known = 0 <= token < len(tokenizer)
    return (tokenizer.convert_ids_to_tokens(token) if is_known else None) or str(token)


def _end_of_turn(tokenizer: Any) -> list[int]:
    """Return the first special token behind an assistant's answer in the chat template, if there is one.

    What stands behind the answer is what conversations with different answers end with alike. Where they are all the
    same, the template does not show answers, and nothing is known.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(token for token, facts in added.items() if facts.special)}
    for one, other in _renderings(tokenizer):
        if one != other:
            num_alike = sum(1 for _ in takewhile(bool, map(eq, reversed(one), reversed(other))))
            tokens = tokenizer(one[len(one) - num_alike :], add_special_tokens=False)["input_ids"]
            return [token for token in tokens if token in special][:1]
    return []


def _renderings(tokenizer: Any) -> Iterator[list[str]]:
    """Yield a conversation's text with each of the answers: as text, in parts, behind a system message."""
    for before in ([], [("system", "Be brief.")]):
        for content in (str, lambda text: [{"type": "text", "text": text}]):
            turns = [[*before, ("user", "Hello."), ("assistant", answer)] for answer in ANSWERS]
            chats = [[{"role": role, "content": content(text)} for role, text in texts] for texts in turns]
            try:
                yield [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
            except Exception:  # a template is a program, and raises anything for what it does not expect
                continue
