"""The generated corpus: seeded conversations of two domains, and held-out prompts that share no seed with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from .advice import generate_dialogue
from .arithmetic import generate_problem

Message = dict[str, str]
Conversation = list[Message]

DOMAINS = ("math", "chat")


def conversations(domain: str, count: int, seed: int) -> list[Conversation]:
    """`count` whole conversations of the domain, for training; the same seed gives the same ones."""
    return [conversation for _, conversation in zip(range(count), _stream(domain, f"train/{seed}"), strict=False)]


def prompts(domain: str, count: int, seed: int = 0) -> list[Conversation]:
    """`count` held-out prompts: conversations cut after a user turn, from seeds that training never uses."""
    return _starts(domain, count, f"held-out/{seed}")


def training_prompts(domain: str, count: int, seed: int) -> list[Conversation]:
    """Like `prompts`, from the seeds of training."""
    return _starts(domain, count, f"train/{seed}")


def _starts(domain: str, count: int, key: str) -> list[Conversation]:
    """Conversations up to one of their user turns, mostly the first."""
    starts = []
    for index, conversation in zip(range(count), _stream(domain, key), strict=False):
        rng = Random(f"cut/{domain}/{key}/{index}")
        turn = rng.choice((0, rng.randrange(len(conversation) // 2)))
        starts.append(conversation[: 2 * turn + 1])
    return starts


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
