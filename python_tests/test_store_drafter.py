"""Look-up drafters that read a corpus store, and extended trees whose roots go on from one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from small_models import VOCAB, prompts, trained_drafters, trained_target

import taps_ext as taps
from taps_ext import tiny
from taps_ext.checkpoints.corpus import write_store
from taps_ext.decode.decoder import EXTENSION
from taps_ext.drafters.lookup import Continuations
from taps_ext.evaluation import contestants

SHAPE = taps.TreeShape(depth=4, branching=4, max_nodes=16)


def open_store(folder: Path, documents: list[list[int]], vocab_size: int = VOCAB) -> taps.CorpusStore:
    write_store(folder, documents, vocab_size, "words")
    return taps.CorpusStore(folder, vocab_size)


def proposal(store: Any, *blocks: list[int], shape: taps.TreeShape = SHAPE) -> taps.DraftTree:
    """The tree of one row that has observed these blocks."""
    drafter = taps.LookupDrafter(VOCAB, store=store)
    state = drafter.reset(1)
    for block in blocks:
        drafter.observe(state, None, torch.tensor([block]), taps.Lengths.of([len(block)]))
    tree = drafter.propose(state, torch.tensor([blocks[-1][-1]]), shape, torch.tensor([True]))
    tree.validate()
    return tree


def children(tree: taps.DraftTree, node: int = 0) -> dict[int, float]:
    """Probabilities by token, the likeliest first."""
    nodes = zip(tree.tokens[0].tolist(), tree.parents[0].tolist(), tree.scores[0].exp().tolist(), strict=True)
    found = {token: p for token, parent, p in list(nodes)[1 : int(tree.num_nodes[0])] if parent == node}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def test_a_row_without_a_past_drafts_what_followed_in_the_store(tmp_path: Path) -> None:
    tree = proposal(open_store(tmp_path / "s", [[5, 6, 7, 8, 9, 10]]), [30, 5, 6])
    assert tree.tokens[0, :5].tolist() == [6, 7, 8, 9, 10] and tree.parents[0, :5].tolist() == [-1, 0, 1, 2, 3]
    assert int(proposal(None, [30, 5, 6]).num_nodes) == 1


def test_continuations_of_store_and_text_share_their_common_beginning(tmp_path: Path) -> None:
    """And the row's own past counts more: of two continuations of the same context it is the likelier one."""
    store = open_store(tmp_path / "s", [[5, 6, 7, 8, 20]])
    tree = proposal(store, [5, 6, 7, 8, 10, 11, 5, 6])
    assert list(children(tree)) == [7]
    assert list(children(tree, 1)) == [8]
    last = children(tree, 2)
    assert list(last) == [10, 20] and last[10] > 2 * last[20]


def test_a_longer_match_in_the_store_counts_more_than_a_short_one_in_the_text(tmp_path: Path) -> None:
    found = children(proposal(open_store(tmp_path / "s", [[1, 2, 3, 4, 5, 6, 7, 40]]), [7, 41, 1, 2, 3, 4, 5, 6, 7]))
    assert list(found) == [40, 41]


def test_hits_and_misses_correct_what_the_store_is_worth(tmp_path: Path) -> None:
    """A text that the store follows, against one that leaves it behind every pair of tokens."""
    pairs = [[token, token + 1] for token in range(10, 60, 2)]
    store = open_store(tmp_path / "s", [[first, second, 3] for first, second in pairs])
    scores = []
    for follower in (3, 4):
        blocks = [token for first, second in pairs[:20] for token in (first, second, follower)]
        scores.append(children(proposal(store, [2], *([token] for token in blocks), pairs[-1]))[3])
    assert scores[0] > 2 * scores[1]


class Watched:
    """Keeps what a store is asked for."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        self.contexts: list[list[int]] = []

    def continuations(self, context: Sequence[int], max_context: int) -> Continuations:
        self.contexts.append(list(context))
        return Continuations(0, 0, [])


def test_the_store_is_asked_once_a_step_and_row_for_the_end_of_the_text() -> None:
    store = Watched()
    decoder = taps.SpeculativeDecoder(trained_target(), {"lookup": taps.LookupDrafter(VOCAB, store=store)}, shape=SHAPE)
    ids, mask = prompts(1)
    result = decoder.generate(ids, mask, max_new_tokens=30, eos_token_id=())
    text = ids[0][mask[0].bool()].tolist() + result.new_tokens[0]
    ends = [int(mask.sum()) + 1]
    for accepted in result.stats.num_accepted[0]:
        ends.append(ends[-1] + accepted + 1)
    assert store.contexts == [text[max(0, end - 16) : end] for end in ends[:-1]]


def test_rows_and_threads_share_a_store(tmp_path: Path) -> None:
    random = Random(2)
    store = open_store(tmp_path / "s", [[random.randrange(9) for _ in range(60)] for _ in range(9)])
    drafter = taps.LookupDrafter(VOCAB, store=store)
    rows = [[random.randrange(9) for _ in range(20)] for _ in range(6)]
    roots = torch.tensor([row[-1] for row in rows])
    state = drafter.reset(6)
    drafter.observe(state, None, torch.tensor(rows), taps.Lengths.of([20] * 6))
    together = drafter.propose(state, roots, SHAPE, torch.ones(6, dtype=torch.bool))
    with ThreadPoolExecutor(3) as pool:
        alone = list(pool.map(lambda row: proposal(store, row), rows))
    for row, tree in enumerate(alone):
        assert torch.equal(tree.tokens[0], together.tokens[row]) and torch.equal(tree.scores[0], together.scores[row])


# ---- what is refused


def test_a_store_of_another_vocabulary_or_tokenizer_is_refused_in_one_sentence(tmp_path: Path) -> None:
    target, folder = trained_target(), tmp_path / "s"
    store = open_store(folder, [[1, 2]], VOCAB + 1)
    said = f"vocabulary of {VOCAB + 1} tokens, and the target has {VOCAB}; build one with taps-ext index --target"
    with pytest.raises(ValueError, match=said):
        taps.load_drafters({"code": folder}, target)
    with pytest.raises(ValueError, match=f"drafter 'code': .*{said}"):
        contestants.check_drafters({"code": folder}, target.config)
    for make in (
        lambda: taps.LookupDrafter(VOCAB, store=store),
        lambda: taps.SpeculativeDecoder(target, trained_drafters(), extend=True, store=store),
    ):
        with pytest.raises(ValueError, match=f"the store has vocabulary {VOCAB + 1}, the target {VOCAB}; build one"):
            make()
    with pytest.raises(ValueError, match="a store continues the roots of extended trees; give extend=True"):
        taps.SpeculativeDecoder(target, trained_drafters(), store=store)
    tokenizer = tiny.load_target()[1]
    open_store(folder, [[1, 2]])
    assert isinstance(taps.load_drafter(folder, target), taps.LookupDrafter)
    with pytest.raises(ValueError, match="was made with another tokenizer than the target's"):
        taps.load_drafter(folder, target, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["store.json", "text.npy", "order.npy"])
def test_a_damaged_store_is_refused_as_a_drafter_in_one_sentence(tmp_path: Path, name: str) -> None:
    folder, random = tmp_path / "s", Random(3)
    open_store(folder, [[1, 2, 3]] * 30)
    whole = (folder / name).read_bytes()
    for _ in range(20):
        place = random.randrange(len(whole))
        (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|not JSON|not of a corpus store|of version") as caught:
            taps.load_drafters({"code": folder}, trained_target())
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_the_store_of_an_evaluation_is_known_by_its_checksum(tmp_path: Path) -> None:
    folders: dict[str, Any] = {"code": tmp_path / "s", "lookup": "lookup"}
    seen = []
    for documents in ([[1, 2]], [[1, 3]]):
        open_store(tmp_path / "s", documents)
        assert contestants.check_drafters(folders, trained_target().config) == {}
        seen.append(contestants.drafter_facts({}, folders))
    assert seen[0]["lookup"] == {"name": "lookup", "sha256": ""} and seen[0]["code"]["name"] == "s"
    assert len(seen[0]["code"]["sha256"]) == 64 and seen[0]["code"]["sha256"] != seen[1]["code"]["sha256"]


# ---- extended trees


@pytest.mark.parametrize("composition", ["confidence", "evidence", "merged"])
def test_the_root_goes_on_from_the_store_whoever_drafted(composition: str, tmp_path: Path) -> None:
    """A store of the answers themselves is followed beyond the drafted depth; nodes keep their drafters' names."""
    ids, mask = prompts(4)
    plain = taps.plain_generate(trained_target(), ids, mask, max_new_tokens=30, eos_token_id=())
    texts = [row[seen == 1].tolist() + new for row, seen, new in zip(ids, mask, plain.new_tokens, strict=True)]
    options: dict[str, Any] = {"composition": composition, "shape": taps.TreeShape(3, 3, 12), "extend": True}
    decoder = taps.SpeculativeDecoder(
        trained_target(), trained_drafters(), store=open_store(tmp_path / "s", texts), **options
    )
    result = decoder.generate(ids, mask, max_new_tokens=30, eos_token_id=())
    assert result.new_tokens == plain.new_tokens
    without = taps.SpeculativeDecoder(trained_target(), trained_drafters(), **options)
    less = without.generate(ids, mask, max_new_tokens=30, eos_token_id=()).stats
    assert result.stats.acceptance_length > 1.3 * less.acceptance_length
    assert max(count for row in result.stats.num_accepted for count in row) >= 8
    assert result.stats.proposer_share[EXTENSION] > 0.8
    assert sum(result.stats.proposer_share[name] for name in trained_drafters()) > 0.2


# ---- costs


def least_times(runs: dict[int, Any], rounds: int = 8) -> dict[int, float]:
    """The least processor time of each, in turns."""
    times = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for size, run in runs.items():
            started = time.process_time()
            for _ in range(40):
                run()
            times[size] = min(times[size], time.process_time() - started)
    return times


def text_of(words: list[list[int]], size: int, random: Random) -> list[int]:
    return [token for _ in range(size) for token in random.choice(words)][:size]


def test_a_step_costs_no_more_behind_a_long_text_or_over_a_large_store(tmp_path: Path) -> None:
    """100,000 tokens of both against 1,000. The margin is for caches, and for the store's 7 more halvings."""
    random = Random(3)
    words = [random.sample(range(4000), random.randint(2, 12)) for _ in range(300)]

    def step_of(size: int) -> Any:
        store = open_store(tmp_path / str(size), [text_of(words, size, random)], 4000)
        drafter = taps.LookupDrafter(4000, store=store)
        state, text = drafter.reset(1), text_of(words, size, random)
        drafter.observe(state, None, torch.tensor([text]), taps.Lengths.of([size]))
        coming, active = iter(text_of(words, 1_000, random)), torch.tensor([True])

        def step() -> None:
            token = torch.tensor([next(coming)])
            drafter.observe(state, None, token[None], taps.Lengths.of([1]))
            drafter.propose(state, token, taps.TreeShape(8, 4, 16), active)

        return step

    times = least_times({size: step_of(size) for size in (1_000, 100_000)})
    assert times[100_000] < 3 * times[1_000]


def test_extending_a_tree_costs_no_more_behind_a_long_text() -> None:
    """100,000 tokens against 4,096, which are those that count."""
    random = Random(4)
    words = [random.sample(range(4000), random.randint(2, 12)) for _ in range(300)]

    def extension_of(size: int) -> Any:
        text = torch.tensor([text_of(words, size, random)])
        tree = taps.DraftTree.of_roots(text[:, -1])
        return lambda: taps.ops.extend_tree(tree, text, torch.tensor([size]), [-1.0] * 12, 8, 4096)

    times = least_times({size: extension_of(size) for size in (4_096, 100_000)})
    assert times[100_000] < 3 * times[4_096]
