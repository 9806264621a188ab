"""The line that an answered question leaves, and what its fields mean: a superset of Spec-Bench's.

A line is a JSON object, of one question as one variant answered it at one temperature:

    question_id, category, answer_id, model_id, tstamp                      as Spec-Bench has them; tstamp in seconds
    choices    [{"index": 0, "turns": [text], "decoding_steps": [int], "new_tokens": [int], "wall_time": [seconds],
                 "accept_lengths": [num_accepted + 1 of every step of every turn]}]
    variant, task, temperature, seed                                        the seed is that of this question's noise
    rows       questions that were decoded together; `wall_time` is that of all of them, so that a question's share of
               the time is wall_time / rows
    turns      a turn each:
        prompt_length, tokens, finish_reason                                new tokens, as ids
        num_accepted   a number a decode step: draft tokens kept, before a cut by EOS or length, without the bonus token
        num_nodes      a number a step: nodes that the target verified, the root included
        num_proposed   a number a step: summed over the drafted nodes, how many drafters proposed each
        chosen         a step's drafter by name, or null where the tree is of several, or of none
        proposers      a step's accepted nodes, each a bit mask over `drafters`
        equals_plain   whether the tokens are those that plain decoding gave in the same turn
        is_right       whether the answer is the reference's; null where there is none, or the task is not scored
    drafters   names, in the order of the bits; a drafter of averaged weights is "average"; with `extend` the last one
        is "extension", which continues the trees' leaves
    signals    {drafter: {"confidence" | "entropy": {"accepted" | "rejected": {"count", "sum", "bins": {bin: count}}}}}
        over the drafted nodes (no root) of all turns that this drafter proposed; accepted: on the accepted path.
        confidence: exp(score), the drafter's probability of the path to the node, in bin min(99, floor(100 c^(1/3))).
        entropy: nats, of the distribution that proposed the node, in bin min(99, floor(10 h)). In merged trees a score
        is the highest of its proposers', weighted as the variant says, and entropies are not known: count 0. Where a
        drafter drafts coupled, above temperature 0, both are of softmax(alpha log q / T + beta noise), not of its q.

The prefill, and the token that it gives, are no decode step: the acceptance length is
(sum of num_accepted + steps) / steps. Plain decoding has a step a token but the first, with 0 accepted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answering import Answer, Contestant
    from .tasks import Question

Key = tuple[str, str, float, str]  # variant, task, temperature, question: what a line is of
IsRight = Callable[[str, str], bool]


@dataclass(frozen=True)
class Asked:
    """A question in its place: of which task, at which temperature, with which noise, beside how many others."""

    question: Question
    task: str
    temperature: float
    seed: int
    rows: int
    is_right: IsRight | None  # of the task, where answers are scored

    def key(self, variant: str) -> Key:
        """Of the line that a variant's answer becomes."""
        return variant, self.task, self.temperature, self.question.id


def key_of(line: dict[str, Any]) -> Key:
    """Which answer a line holds."""
    return line["variant"], line["task"], line["temperature"], line["question_id"]


def line_of(
    asked: Asked, answer: Answer, contestant: Contestant, plain: Sequence[Sequence[int]], target_name: str
) -> dict[str, Any]:
    """The line of an answer; `plain` are the tokens of plain decoding, a turn each."""
    label, turns = contestant.variant.label, answer.turns
    accepted = [count for turn in turns for count in turn.steps.num_accepted]
    choice = {
        "index": 0,
        "turns": [turn.text for turn in turns],
        "decoding_steps": [len(turn.steps.num_accepted) for turn in turns],
        "new_tokens": [len(turn.tokens) for turn in turns],
        "wall_time": [round(turn.seconds, 6) for turn in turns],
        "accept_lengths": [count + 1 for count in accepted],
    }
    return {
        "question_id": asked.question.id,
        "category": asked.question.category,
        "answer_id": hashlib.sha256(json.dumps(asked.key(label)).encode()).hexdigest()[:22],
        "model_id": f"{target_name}/{label}",
        "tstamp": round(time.time(), 3),
        "choices": [choice],
        "variant": label,
        "task": asked.task,
        "temperature": asked.temperature,
        "seed": asked.seed,
        "rows": asked.rows,
        "turns": [_turn(asked, number, answer, plain[number]) for number in range(len(turns))],
        "drafters": list(contestant.proposers),
        "signals": answer.signals,
    }


def _turn(asked: Asked, number: int, answer: Answer, plain: Sequence[int]) -> dict[str, Any]:
    turn, references, is_right = answer.turns[number], asked.question.references, None
    if asked.is_right is not None and references is not None:
        is_right = asked.is_right(turn.text, references[number])
    return {
        "prompt_length": turn.prompt_length,
        "tokens": turn.tokens,
        "finish_reason": turn.finish_reason,
        "num_accepted": turn.steps.num_accepted,
        "num_nodes": turn.steps.num_nodes,
        "num_proposed": turn.steps.num_proposed,
        "chosen": turn.steps.chosen,
        "proposers": turn.steps.proposers,
        "equals_plain": turn.tokens == list(plain),
        "is_right": is_right,
    }


def text_of(line: dict[str, Any]) -> str:
    """The line as it stands in a file."""
    return json.dumps(line, separators=(",", ":")) + "\n"
