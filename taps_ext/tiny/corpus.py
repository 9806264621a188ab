"""The generated corpus: seeded conversations of two domains, and held-out prompts that training never saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from random import Random

from .advice import generate_dialogue
from .arithmetic import generate_problem

Message = dict[str, str]
Conversation = list[Message]

DOMAINS = ("math", "chat")
TARGET_SEED, DRAFTER_SEED = 0, 1
TRAINING_CONVERSATIONS = {TARGET_SEED: 8_000, DRAFTER_SEED: 1_200}  # by seed, of each domain: what training reads


def conversations(domain: str, count: int, seed: int) -> list[Conversation]:
    """`count` whole conversations of the domain, for training; the same seed gives the same ones."""
    return list(islice(_stream(domain, f"train/{seed}"), count))


def prompts(domain: str, count: int, seed: int = 0) -> list[Conversation]:
    """`count` held-out prompts: conversations cut after a user turn, none of them a prompt that training has seen."""
    seen = _trained_prompts(domain)
    unseen = (start for start in _starts(domain, f"held-out/{seed}") if repr(start) not in seen)
    return list(islice(unseen, count))


def _starts(domain: str, key: str) -> Iterator[Conversation]:
    """Conversations up to one of their user turns, mostly the first."""
    for index, conversation in enumerate(_stream(domain, key)):
        rng = Random(f"cut/{domain}/{key}/{index}")
        turn = rng.choice((0, rng.randrange(len(conversation) // 2)))
        yield conversation[: 2 * turn + 1]


@cache
def _trained_prompts(domain: str) -> frozenset[str]:
    """Every prompt inside the conversations that the shipped models were trained on, at any turn."""
    trained = (text for seed, count in TRAINING_CONVERSATIONS.items() for text in conversations(domain, count, seed))
    return frozenset(repr(text[: turn + 1]) for text in trained for turn in range(0, len(text), 2))


def _stream(domain: str, key: str) -> Iterator[Conversation]:
    if domain not in _GENERATORS:
        raise ValueError(f"domain {domain!r} is not one of {', '.join(DOMAINS)}")
    rng = Random(f"{domain}/{key}")
    while True:
        yield _GENERATORS[domain](rng)


def _problem(rng: Random) -> Conversation:
    problem = generate_problem(rng)
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.solution}]


_GENERATORS: dict[str, Callable[[Random], Conversation]] = {"math": _problem, "chat": generate_dialogue}
