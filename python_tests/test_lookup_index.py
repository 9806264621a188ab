"""The index of look-ups against a search of the whole text, and what it costs."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import pytest
import torch
from literal_lookup import NUM_OTHERS, LiteralLookup

from taps_ext import DraftTree

pytestmark = pytest.mark.backends("cpu", "simt")  # host code: under the stand-in, it is run with the sanitizers
TOLERANCE = 2e-4  # nats: float32 sums of a few logarithms


Noise = tuple[int, float, float] | None


def proposal(
    index: Any, depth: int, branching: int, max_nodes: int, min_score: float, noise: Noise = None, root: int = 0
) -> DraftTree:
    tokens, parents = torch.zeros(1, max_nodes, dtype=torch.int64), torch.zeros(1, max_nodes, dtype=torch.int64)
    scores, entropies = torch.full((1, max_nodes), -torch.inf), torch.zeros(1, max_nodes)
    tokens[0, 0], parents[0, 0], scores[0, 0] = root, -1, 0
    count = index.propose(depth, branching, min_score, noise, tokens[0], parents[0], scores[0], entropies[0])
    return DraftTree(tokens, parents, scores, torch.tensor([count]), entropies=entropies)


def random_text(rng: random.Random) -> list[int]:
    """Few words, or many, with copied passages."""
    text: list[int] = []
    size, vocab = rng.randint(1, 60), rng.choice([1, 2, 3, 5, 30, 2**31 - 1])
    while len(text) < size:
        if text and rng.random() < 0.3:
            start = rng.randrange(len(text))
            text += text[start : start + rng.randint(1, 12)]
        else:
            text.append(rng.randrange(vocab))
    return text


def check_tree(tree: DraftTree, literal: LiteralLookup, shape: tuple[int, int, int, float, Noise]) -> None:
    """The nodes are the best continuations by the literal search, each with its score."""
    depth, branching, max_nodes, min_score, noise = shape
    tree.validate()
    count = int(tree.num_nodes[0])
    tokens, parents, scores = (values[0, :count].tolist() for values in (tree.tokens, tree.parents, tree.scores))
    paths: list[list[int]] = [[]]
    for node in range(1, count):
        paths.append([*paths[parents[node]], tokens[node]])
    left_out = []
    for node, path in enumerate(paths):
        found, escape = literal.outlook(path)[:2] if noise is None else literal.coupled(path, noise)
        children = [child for child in range(1, count) if parents[child] == node]
        assert len(children) <= branching
        for child in children:
            assert scores[child] - scores[node] == pytest.approx(math.log(found[tokens[child]]), abs=TOLERANCE)
            entropy = -sum(p * math.log(p) for p in found.values()) - escape * math.log(escape / NUM_OTHERS)
            assert float(tree.entropies[0, child]) == pytest.approx(entropy, abs=2e-3)  # type: ignore[index]
        others = sorted((p for token, p in found.items() if token not in {tokens[c] for c in children}), reverse=True)
        if len(path) < depth and len(children) < branching and others:
            left_out.append(scores[node] + math.log(others[0]))
    assert max(map(len, paths)) <= depth and count <= max_nodes
    assert min(scores) >= min_score - TOLERANCE
    bar = min_score if count < max_nodes else min(scores)
    assert all(score <= bar + TOLERANCE for score in left_out)


def random_runs(rng: random.Random, text: list[int]) -> list[list[int]]:
    """Passages of the text, and other ones."""
    sources = [text, [rng.choice(text) for _ in range(20)], [rng.randrange(2**31) for _ in range(9)]]
    starts = [(rng.choice(sources), rng.randrange(9)) for _ in range(rng.choice([0, 1, 3, 30]))]
    return [run for source, start in starts if (run := source[start : start + rng.randint(1, 8)])]


def check_text(backend: Any, seed: int) -> None:
    """Every token's log-probability, and trees at random places, where a store says something and where it does not."""
    rng = random.Random(seed)
    text, max_context = random_text(rng), rng.choice([1, 2, 3, 8])
    index, literal = backend.LookupIndex(max_context), LiteralLookup(max_context)
    place = 0
    while place < len(text):
        block, is_prompt = text[place : place + rng.choice([0, 1, 2, 30])], rng.random() < 0.3
        log_probs = index.append(torch.tensor(block, dtype=torch.int64), is_prompt)
        expected = [literal.append(token, is_prompt) for token in block]
        assert log_probs.tolist() == pytest.approx(expected, abs=TOLERANCE)
        place += len(block)
        assert index.size == place
        if rng.random() < 0.5:
            length, runs = rng.randint(1, 12), random_runs(rng, text)
            index.take_runs(length, runs)
            literal.take_runs(length, runs)
        shape: Any = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 12), rng.choice([-math.inf, -2.0])
        noise = (rng.getrandbits(62), rng.choice([0.5, 1.0, 3.0]), rng.choice([0.0, 0.4, 0.9]))
        largest = max([*literal.text, *(token for run in literal.runs for token in run)], default=0)
        is_coupled = rng.random() < 0.3 and largest < 100  # the literal noise is the vocabulary's
        shape = (*shape, noise if is_coupled else None)
        check_tree(proposal(index, *shape, root=literal.text[-1] if place else 0), literal, shape)


def test_the_index_proposes_what_a_search_of_the_whole_text_finds(backend: Any, num_cases: int) -> None:
    for seed in range(num_cases):
        check_text(backend, seed)


@pytest.mark.long
@pytest.mark.backends("cpu")
def test_the_index_proposes_what_a_search_finds_in_many_texts(backend: Any) -> None:
    """More than 100,000 trees, and two million tokens."""
    for seed in range(10**6, 10**6 + 20_000):
        check_text(backend, seed)


def test_an_index_without_text_proposes_only_the_root(backend: Any) -> None:
    index = backend.LookupIndex(8)
    assert index.append(torch.zeros(0, dtype=torch.int64), True).tolist() == []
    assert int(proposal(index, 4, 4, 8, -math.inf, root=5).num_nodes) == 1


def test_proposing_and_copying_change_nothing(backend: Any) -> None:
    index, text = backend.LookupIndex(8), torch.tensor([4, 5, 6, 4, 5, 6, 4])
    index.append(text, True)
    first, second = (proposal(index, 4, 4, 8, -math.inf, root=4) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.scores, second.scores)
    assert first.tokens[0, 1:4].tolist() == [5, 6, 4]
    strided = backend.LookupIndex(8)
    strided.append(torch.stack([text, text + 1], dim=1)[:, 0], True)
    assert torch.equal(proposal(strided, 4, 4, 8, -math.inf, root=4).scores, first.scores)


def test_the_offsets_learn_how_a_text_repeats_itself(backend: Any) -> None:
    """One match is believed more behind a text of fixed pairs than behind one of words in any order."""
    rng = random.Random(1)
    pairs, words = backend.LookupIndex(8), backend.LookupIndex(8)
    halves = [half for _ in range(8) for half in rng.sample(range(25), 25)]
    pairs.append(torch.tensor([token for half in halves for token in (2 * half, 2 * half + 1)]), False)
    words.append(torch.tensor([token for _ in range(8) for token in rng.sample(range(50), 50)]), False)
    scores = []
    for index in (pairs, words):
        index.append(torch.tensor([100, 101, 100]), False)
        scores.append(float(proposal(index, 1, 1, 2, -math.inf, root=100).scores[0, 1]))
    assert scores[0] > scores[1] + 0.1


def processor_time(index: Any, tokens: list[int]) -> float:
    """Seconds of steps that append a token and propose a tree."""
    started = time.process_time()
    for token in tokens:
        index.append(torch.tensor([token]), False)
        proposal(index, 8, 10, 60, -math.inf, root=token)
    return time.process_time() - started


@pytest.mark.backends("cpu")
def test_a_long_text_costs_no_more_a_step_than_a_short_one(backend: Any) -> None:
    """100,000 tokens against 1,000: a search of the text would take a hundred times as long.

    The margin is for caches, which hold all of a short text's index and none of a long one's. Steps alternate.
    """
    rng = random.Random(3)
    words = [rng.sample(range(4000), rng.randint(2, 12)) for _ in range(300)]

    def text(size: int) -> list[int]:
        return [token for _ in range(size) for token in rng.choice(words)][:size]

    indices = {size: backend.LookupIndex(8) for size in (1_000, 100_000)}
    for size, index in indices.items():
        index.append(torch.tensor(text(size)), True)
        assert index.num_bytes / size < 1_100  # memory, of vectors that double
    times = dict.fromkeys(indices, math.inf)
    for _ in range(8):
        steps = text(40)
        for size, index in indices.items():
            times[size] = min(times[size], processor_time(index, steps))
    assert times[100_000] < 5 * times[1_000]


def test_bad_rows_get_one_sentence(backend: Any) -> None:
    index = backend.LookupIndex(8)
    for tokens in (torch.tensor([-1]), torch.tensor([2**31])):
        with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.2147483647"):
            index.append(tokens, True)
    for tokens in (torch.tensor([1.0]), torch.tensor([[1]])):
        with pytest.raises(ValueError, match=r"tokens must be int64 \[T\] on the CPU, got"):
            index.append(tokens, True)
    with pytest.raises(ValueError, match="runs must follow a match of at least 1 token, got a length of 0"):
        index.take_runs(0, [[1]])
    with pytest.raises(ValueError, match="runs must not hold negative tokens, got 1 -1"):
        index.take_runs(1, [[1, -1]])
    for length in (0, 33):
        with pytest.raises(ValueError, match=rf"max_context must lie in 1\.\.32, got {length}"):
            backend.LookupIndex(length)
    with pytest.raises(ValueError, match="must be at least 1, got 0, 1 and 3"):
        proposal(index, 0, 1, 3, 0.0)
    row = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must be contiguous \[N\] on the CPU, got \[2\]"):
        index.propose(1, 1, 0.0, None, row, row[:2], torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"noise must be .*, got a scale of 1 and a beta of 1"):
        proposal(index, 1, 1, 3, 0.0, (1, 1.0, 1.0))
