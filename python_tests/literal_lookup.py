"""What an index of look-ups says, by searching the whole text each time: the specification of csrc/lookup.

The numbers of the table are read from hit_table.h; what they are for is written again here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from taps_ext.reference import gumbel_noise

HEADERS = Path(__file__).parent.parent / "csrc" / "lookup"
NUM_CONTINUATIONS, NUM_CANDIDATES, LEAST_ESCAPE, NUM_OTHERS = 16, 48, 0.02, 1000
RATE, PROMPT_RATE, MOST_OFFSET = 0.1, 0.03, 4.0
LENGTHS, TOTALS, CHILDREN = (1, 2, 3, 4, 6), (1, 2, 4, 8), (1, 2, 4)  # the last of each group but the last group


def _table(name: str) -> list[float]:
    numbers = re.search(rf"{name}\[\w*\] = \{{([^}}]*)\}}", (HEADERS / "hit_table.h").read_text())
    assert numbers is not None
    return [float(number.strip().rstrip("f")) for number in numbers[1].split(",")]


BY_LENGTH, BY_TOTAL, BY_CHILDREN, BY_MISSES = map(_table, ("kByLength", "kByTotal", "kByChildren", "kByMisses"))
NEWEST, STORE_OFFSET = (
    float(re.search(rf"{name} = (-?[\d.]+)f", (HEADERS / "hit_table.h").read_text())[1])  # type: ignore[index]
    for name in ("kNewest", "kStoreOffset")
)


def group(value: int, ends: tuple[int, ...]) -> int:
    return sum(value > end for end in ends)


def continuations(text: list[int], context: list[int]) -> dict[int, int]:
    """What followed the context inside the text, with counts, the newest first."""
    counts: dict[int, int] = {}
    for end in range(len(text) - 1, len(context) - 1, -1):
        if text[end - len(context) : end] == context:
            counts[text[end]] = counts.get(text[end], 0) + 1
    return counts


def run_continuations(runs: list[list[int]], passed: list[int]) -> dict[int, int]:
    """What follows in the runs that begin with the passed tokens, with counts, the last run first."""
    counts: dict[int, int] = {}
    for run in reversed(runs):
        if run[: len(passed)] == passed and len(run) > len(passed):
            token = run[len(passed)]
            counts[token] = counts.get(token, 0) + 1
    return counts


class LiteralLookup:
    """One row's text, what a store says of its end, and the offsets that it has taught."""

    def __init__(self, max_context: int) -> None:
        self.max_context = max_context
        self.text: list[int] = []
        self.offsets = [0.0] * len(BY_LENGTH) + [STORE_OFFSET] * len(BY_LENGTH)
        self.runs: list[list[int]] = []
        self.match_length, self.taken_at = 0, 0

    def take_runs(self, match_length: int, runs: list[list[int]]) -> None:
        """Take what followed a match of the text's end elsewhere."""
        self.match_length, self.runs, self.taken_at = match_length, runs, len(self.text)

    def contexts(self, path: list[int]) -> Iterator[tuple[int, int, dict[int, int], bool]]:
        """Yield (group of offsets, length, what followed, whether in the store) of every context, in their order."""
        passed = path[self.taken_at :]
        stored = self.match_length + len(passed)
        for length in range(self.max_context, 0, -1):
            if length <= len(path):
                yield group(length, LENGTHS), length, continuations(self.text, path[-length:]), False
            if length == min(stored, self.max_context):
                yield group(stored, LENGTHS) + len(BY_LENGTH), stored, run_continuations(self.runs, passed), True

    def outlook(self, drafted: list[int]) -> tuple[dict[int, float], float, list[tuple[int, float, list[int]]]]:
        """Behind the text and a drafted path: probabilities by token, the escape, and (group, hit, tokens) by level."""
        path = self.text + drafted
        found: dict[int, float] = {}
        escape, levels = 1.0, []
        for place, length, counts, is_stored in self.contexts(path):
            if escape <= LEAST_ESCAPE:
                break
            tokens = [token for token in list(counts)[:NUM_CONTINUATIONS] if token not in found]
            tokens = tokens[: NUM_CANDIDATES - len(found)]
            if not tokens:
                continue
            logit = BY_LENGTH[group(length, LENGTHS)] + BY_TOTAL[group(sum(counts.values()), TOTALS)]
            logit += BY_CHILDREN[group(len(counts), CHILDREN)] + BY_MISSES[min(len(levels), 2)] + self.offsets[place]
            hit = 1 / (1 + math.exp(-logit))
            bonus = 1 if is_stored else NEWEST
            weights = [math.sqrt(counts[token]) * (bonus if n == 0 else 1) for n, token in enumerate(tokens)]
            shares = [escape * hit * weight / sum(weights) for weight in weights]
            found |= dict(zip(tokens, shares, strict=True))
            levels.append((place, hit, tokens))
            escape *= 1 - hit
        return found, escape, levels

    def coupled(self, drafted: list[int], noise: tuple[int, float, float]) -> tuple[dict[int, float], float]:
        """The probabilities and the escape behind a path, where the noise of the draw behind it is known."""
        found, escape, _ = self.outlook(drafted)
        seed, scale, beta = noise
        drawn = gumbel_noise(seed, len(self.text) + len(drafted), max(found, default=0) + 1)
        weights = {token: p**scale * math.exp(beta * float(drawn[token])) for token, p in found.items()}
        others = escape**scale * math.gamma(1 - beta)
        total = sum(weights.values()) + others
        return {token: weight / total for token, weight in weights.items()}, others / total

    def append(self, token: int, is_prompt: bool) -> float:
        """Take in a token; return the log-probability that it had."""
        found, escape, levels = self.outlook([])
        for place, hit, tokens in levels:
            step = (PROMPT_RATE if is_prompt else RATE) * ((token in tokens) - hit)
            self.offsets[place] = max(-MOST_OFFSET, min(MOST_OFFSET, self.offsets[place] + step))
            if token in tokens:
                break
        self.text.append(token)
        return math.log(found.get(token, escape / NUM_OTHERS))
