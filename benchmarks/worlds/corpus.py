"""Generate seeded conversations of four domains, and held-out prompts that training never saw.

    PYTHONPATH=benchmarks python -m worlds.corpus math 1200 > math.jsonl

The command prints training texts as JSON lines, those that the embedded drafters learned from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import cycle, islice, permutations
from random import Random
from typing import Any

from taps_ext.tiny import DOMAINS

from .advice import generate_dialogue
from .arithmetic import generate_problem
from .programs import generate_program_talk
from .tables import generate_table_talk

Message = dict[str, str]
Conversation = list[Message]

ALL_DOMAINS = (*DOMAINS, "code", "tables")
NUM_PROMPTS = 80  # held-out prompts per domain that a world keeps in its prompts.jsonl
TARGET_SEED, DRAFTER_SEED = 0, 1
TRAINING_CONVERSATIONS = {TARGET_SEED: 8_000, DRAFTER_SEED: 1_200}  # by seed, of each domain: what training reads


def conversations(domain: str, count: int, seed: int) -> list[Conversation]:
    """`count` whole conversations of the domain, for training; the same seed gives the same ones."""
    return list(islice(_stream(domain, f"train/{seed}"), count))


def prompts(domain: str, count: int, seed: int = 0) -> list[Conversation]:
    """`count` held-out prompts: conversations cut after a user turn, none of them a prompt that training has seen."""
    return [start[:-1] for start in answered_prompts(domain, count, seed)]


def answered_prompts(domain: str, count: int, seed: int = 0) -> list[Conversation]:
    """`prompts`, each with the answer that the generator gives behind it."""
    seen = _trained_prompts(domain)
    unseen = (start for start in _starts(domain, f"held-out/{seed}") if repr(start[:-1]) not in seen)
    return list(islice(unseen, count))


def prompt_lines(domains: Sequence[str]) -> str:
    """The first `NUM_PROMPTS` held-out prompts per domain and their answers, as a question file of JSON lines."""
    records: Iterator[dict[str, Any]] = (
        {
            "id": f"tiny_{domain}-{number:03}",
            "category": domain,
            "messages": messages,
            "reference": answer["content"],
        }
        for domain in domains
        for number, (*messages, answer) in enumerate(answered_prompts(domain, NUM_PROMPTS))
    )
    return "".join(f"{json.dumps(record)}\n" for record in records)


def switching_conversations(domains: Sequence[str], count: int, seed: int) -> list[Conversation]:
    """`count` conversations that change the subject, for training: an exchange of one domain, then one of another.

    The ordered pairs of the domains take turns. The exchanges are from `conversations` of the seed.
    """
    return list(islice(_switching({domain: _stream(domain, f"train/{seed}") for domain in domains}), count))


def switching_prompts(domains: Sequence[str], count: int, seed: int = 0) -> list[Conversation]:
    """`count` held-out prompts that change the subject: an exchange of one domain, then a question of another.

    The ordered pairs of the domains take turns. A target answers in the new domain if it was trained on such changes:
    the shipped one was not, and mostly stays with the old one. ValueError if there is no pair.
    """
    if len(set(domains)) < 2:
        raise ValueError(f"a prompt that switches needs two domains, got {', '.join(domains) or 'none'}")
    unseen = _switching({domain: _unseen(domain, f"switch/{seed}") for domain in domains})
    return [conversation[:-1] for conversation in islice(unseen, count)]


def _switching(streams: dict[str, Iterator[Conversation]]) -> Iterator[Conversation]:
    for first, second in cycle(permutations(streams, 2)):
        yield [*next(streams[first])[:2], *next(streams[second])[:2]]


def _unseen(domain: str, key: str) -> Iterator[Conversation]:
    """Whole conversations that begin with a question that training has not seen."""
    seen = _trained_prompts(domain)
    return (conversation for conversation in _stream(domain, key) if repr(conversation[:1]) not in seen)


def _starts(domain: str, key: str) -> Iterator[Conversation]:
    """Conversations up to the answer to one of their user turns, mostly the first."""
    for index, conversation in enumerate(_stream(domain, key)):
        rng = Random(f"cut/{domain}/{key}/{index}")
        turn = rng.choice((0, rng.randrange(len(conversation) // 2)))
        yield conversation[: 2 * turn + 2]


@cache
def _trained_prompts(domain: str) -> frozenset[str]:
    """Every prompt inside the conversations that the shipped models were trained on, at any turn."""
    trained = (text for seed, count in TRAINING_CONVERSATIONS.items() for text in conversations(domain, count, seed))
    return frozenset(repr(text[: turn + 1]) for text in trained for turn in range(0, len(text), 2))


def _stream(domain: str, key: str) -> Iterator[Conversation]:
    if domain not in _GENERATORS:
        raise ValueError(f"domain {domain!r} is not one of {', '.join(ALL_DOMAINS)}")
    rng = Random(f"{domain}/{key}")
    while True:
        yield _GENERATORS[domain](rng)


def _problem(rng: Random) -> Conversation:
    problem = generate_problem(rng)
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.solution}]


_GENERATORS: dict[str, Callable[[Random], Conversation]] = {
    "math": _problem,
    "chat": generate_dialogue,
    "code": generate_program_talk,
    "tables": generate_table_talk,
}


def main() -> None:
    """Print training texts of a domain."""
    parser = argparse.ArgumentParser(prog="python -m worlds.corpus", description=__doc__)
    parser.add_argument("domain", choices=ALL_DOMAINS)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=DRAFTER_SEED, help=f"default: {DRAFTER_SEED}")
    given = parser.parse_args()
    for messages in conversations(given.domain, given.count, given.seed):
        print(json.dumps({"messages": messages}))


if __name__ == "__main__":
    main()
