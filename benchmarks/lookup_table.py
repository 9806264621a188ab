"""Fit the table of look-up drafters (csrc/lookup/hit_table.h) to greedy texts, and check their scores on other texts.

    python benchmarks/lookup_table.py fit texts.json     print the table's rows
    python benchmarks/lookup_table.py check texts.json   print mean score and accepted share of drafted nodes, by tenths

texts.json is a list of {"prompt_ids": [...], "new_ids": [...]}. `fit` searches each text in Python, without the
corrections that a row's own text makes; `check` asks the native index, corrections included.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taps_ext import native

MAX_CONTEXT, NUM_CONTINUATIONS = 8, 16
LENGTHS, TOTALS, CHILDREN, MISSES = (1, 2, 3, 4, 6), (1, 2, 4, 8), (1, 2, 4), (0, 1)  # the last value of each group
NAMES = {"kByLength": LENGTHS, "kByTotal": TOTALS, "kByChildren": CHILDREN, "kByMisses": MISSES}
PENALTY = 0.25  # of the squares of the logits
Event = tuple[list[int], bool]  # the groups of a context with a past, and whether it hit


def group(value: int, ends: Sequence[int]) -> int:
    return sum(value > end for end in ends)


def events(text: Sequence[int], prompt_length: int) -> Iterator[Event]:
    """Yield the contexts that each new token was looked up in, the longest first, up to the one that hit."""
    followers: dict[tuple[int, ...], dict[int, int]] = {}  # by context: counts, the newest last
    for place, token in enumerate(text):
        contexts = [tuple(text[place - length : place]) for length in range(min(MAX_CONTEXT, place), 0, -1)]
        if place >= prompt_length:
            yield from _looked_up(contexts, followers, token)
        for context in contexts:
            counts = followers.setdefault(context, {})
            counts[token] = counts.pop(token, 0) + 1


def _looked_up(
    contexts: Sequence[tuple[int, ...]], followers: dict[tuple[int, ...], dict[int, int]], token: int
) -> Iterator[Event]:
    seen: set[int] = set()
    misses = 0
    for context in contexts:
        counts = followers.get(context, {})
        further = set(list(counts)[-NUM_CONTINUATIONS:]) - seen
        if not further:
            continue
        values = (len(context), sum(counts.values()), len(counts), misses)
        yield [group(value, ends) for value, ends in zip(values, NAMES.values(), strict=True)], token in further
        if token in further:
            return
        seen |= further
        misses += 1


def fit(texts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the logits of each group, by maximum likelihood."""
    found = [one for row in texts for one in events(row["prompt_ids"] + row["new_ids"], len(row["prompt_ids"]))]
    groups, hits = torch.tensor([one for one, _ in found]), torch.tensor([float(hit) for _, hit in found])
    tables = [torch.zeros(len(ends) + 1, requires_grad=True) for ends in NAMES.values()]
    optimizer = torch.optim.LBFGS(tables, max_iter=300)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = torch.stack([table[groups[:, column]] for column, table in enumerate(tables)]).sum(dim=0)
        error = torch.nn.functional.binary_cross_entropy_with_logits(logits, hits, reduction="sum")
        total: Tensor = error + PENALTY * torch.stack([table.square().sum() for table in tables]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call, arg-type]
    return {name: table.detach() for name, table in zip(NAMES, tables, strict=True)}


def check(text: Sequence[int], prompt_length: int, depth: int, max_nodes: int) -> Iterator[tuple[float, bool]]:
    """Yield the probability of each drafted node, and whether the text went through it; every token begins a tree."""
    index = native.load().LookupIndex(MAX_CONTEXT)
    index.append(torch.tensor(text[:prompt_length]), True)
    for place in range(prompt_length, len(text) - depth):
        tokens, parents = torch.zeros(2, max_nodes, dtype=torch.int64)
        scores, entropies = torch.zeros(2, max_nodes)
        count = index.propose(depth, 10, -math.inf, None, tokens, parents, scores, entropies)
        depths = {0: 0}  # of the nodes that the text went through
        for node in range(1, count):
            above = depths.get(int(parents[node]))
            is_accepted = above is not None and int(tokens[node]) == text[place + above]
            if above is not None and is_accepted:
                depths[node] = above + 1
            yield math.exp(float(scores[node])), is_accepted
        index.append(torch.tensor(text[place : place + 1]), False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fit", "check"))
    parser.add_argument("texts", type=Path)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--max-nodes", type=int, default=32)
    arguments = parser.parse_args()
    texts = json.loads(arguments.texts.read_text())
    print(json.dumps(print_fit(texts) if arguments.what == "fit" else print_check(texts, arguments)))


def print_fit(texts: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    tables = {name: table.tolist() for name, table in fit(texts).items()}
    for name, values in tables.items():
        print(f"{name}: {', '.join(f'{value:.2f}' for value in values)}")
    return tables


def print_check(texts: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, float]]:
    limits = arguments.depth, arguments.max_nodes
    rows = [(row["prompt_ids"] + row["new_ids"], len(row["prompt_ids"])) for row in texts]
    pairs = torch.tensor([pair for row in rows for pair in check(*row, *limits)], dtype=torch.float64)
    tenths = (10 * pairs[:, 0]).long().clamp(max=9)
    found = []
    for tenth in range(10):
        chosen = pairs[tenths == tenth]
        score, accepted = chosen.mean(dim=0).tolist()
        found.append({"num_nodes": len(chosen), "score": score, "accepted": accepted})
        print(f"{tenth / 10:.1f}: {len(chosen)} nodes, mean score {score:.3f}, accepted {accepted:.3f}")
    return found


if __name__ == "__main__":
    main()
