"""The other systems' methods in benchmarks/peers do what they claim: else a comparison with them would mean nothing."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from test_verification_rule import chi_square_p_value
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from peers import PaperWay, Peer, RecursiveRejection, paper, recursive_rejection
from peers.loop import distribution, keeps
from peers.static_tree import StaticTree, best_tree, expected_acceptance, first_rates, measured_rates

from taps_ext.decode.decoder import SpeculativeDecoder
from taps_ext.decode.plain import plain_generate
from taps_ext.decode.stats import DecodeStats
from taps_ext.drafters.eagle import EagleConfig, EagleDrafter, EagleNetwork
from taps_ext.reference import Filters, kept_tokens
from taps_ext.target.model import TargetModel
from taps_ext.tree import DraftTree, Lengths, TreeShape

# ---- a target of six tokens: every text of three tokens has a known probability

VOCABULARY, LENGTH = 6, 3
PROMPT = torch.tensor([1, 4, 2])
PLAIN = Filters()


@cache
def six_tokens() -> tuple[TargetModel, dict[str, EagleDrafter]]:
    """A random target without EOS, and two random drafters whose guesses differ from it and from each other."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **sizes, eos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 20
    target = TargetModel(model)
    drafters = {}
    for name in ("first", "second"):
        network = EagleNetwork(EagleConfig.for_target(config)).eval()
        network.fc.weight.data *= 2
        drafters[name] = EagleDrafter(network, target.embedding, target.lm_head, name)
    return target, drafters


@torch.inference_mode()
def joint_distribution(filters: Filters, length: int) -> Tensor:
    """float64 [V ** length]: the probability of each continuation of PROMPT, exact."""
    texts = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=length)))
    ids = torch.cat([PROMPT.expand(len(texts), -1), texts], dim=1)
    logits = six_tokens()[0].model(input_ids=ids).logits[:, len(PROMPT) - 1 : -1]
    return distribution(logits, filters).gather(2, texts[:, :, None])[:, :, 0].prod(dim=1)


def p_value(peer: Peer, filters: Filters, num_nodes: int, trials: int, length: int = LENGTH) -> float:
    """Of the joint frequency of the first tokens of many texts."""
    parts = [
        peer.generate([PROMPT] * 2000, filters.temperature, num_nodes, length, seed, *filters[1:])
        for seed in range(trials // 2000)
    ]
    accepted = DecodeStats.joined([part.stats for part in parts]).acceptance_length
    assert accepted > 1.5, "hollow: almost nothing is accepted"
    texts = torch.tensor([tokens for part in parts for tokens in part.new_tokens])
    cells = (texts * VOCABULARY ** torch.arange(length - 1, -1, -1)).sum(dim=1).bincount(minlength=VOCABULARY**length)
    return chi_square_p_value(cells, joint_distribution(filters, length))


def with_shape(shape: StaticTree, monkeypatch: pytest.MonkeyPatch, sharpness: float = 1.0) -> RecursiveRejection:
    target, drafters = six_tokens()
    monkeypatch.setattr(recursive_rejection, "best_tree", lambda rates, num_nodes: shape)
    peer = RecursiveRejection(target, drafters["first"], [])
    monkeypatch.setattr(peer, "tuning", lambda filters: recursive_rejection.Tuning(sharpness, ()))
    return peer


BUSHY = StaticTree((-1, 0, 0, 0, 1, 1, 2, 4))


@pytest.mark.parametrize("filters", [PLAIN, Filters(0.6, top_k=4), Filters(1.3, top_p=0.8), Filters(min_p=0.2)])
def test_recursive_rejection_has_the_targets_joint_frequency(filters: Filters, monkeypatch: pytest.MonkeyPatch) -> None:
    assert p_value(with_shape(BUSHY, monkeypatch), filters, 8, trials=8_000) > 1e-3


def test_a_sharpened_drafter_leaves_the_frequency_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert p_value(with_shape(BUSHY, monkeypatch, sharpness=2.0), PLAIN, 8, trials=8_000) > 1e-3


def test_children_that_are_treated_as_drawn_with_replacement_give_another_frequency(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = with_shape(BUSHY, monkeypatch)
    monkeypatch.setattr(recursive_rejection, "_without", lambda q_logits, token: q_logits)
    assert p_value(peer, PLAIN, 8, trials=8_000) < 1e-8


def test_a_residual_that_is_not_taken_gives_another_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = with_shape(BUSHY, monkeypatch)
    monkeypatch.setattr(recursive_rejection, "_residual", lambda p, q: p)
    assert p_value(peer, PLAIN, 8, trials=8_000) < 1e-8


@pytest.mark.parametrize("composition", ["single", "routed", "merged"])
def test_the_papers_way_has_the_targets_joint_frequency(composition: str) -> None:
    assert p_value(papers_way(composition), PLAIN, 9, trials=4_000, length=2) > 1e-3


def test_a_candidate_that_is_tried_once_a_copy_without_being_zeroed_gives_another_frequency(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(p: np.ndarray, candidates: list[int], uniform: Callable[[], float]) -> int | None:
        return next((token for token in candidates if uniform() < p[token]), None)

    monkeypatch.setattr(paper, "_first_accepted", wrong)
    assert p_value(papers_way("merged"), PLAIN, 9, trials=4_000, length=2) < 1e-8


def papers_way(composition: str) -> PaperWay:
    target, drafters = six_tokens()
    used = {"first": drafters["first"]} if composition == "single" else drafters
    return PaperWay(target, used, composition)


# ---- one node, many draws


def test_a_node_emits_the_target_whatever_its_drafter_and_number_of_children() -> None:
    """Children beyond what the drafter's filters keep included: they come last, and are drawn without replacement."""
    trials, generator = 40_000, torch.Generator().manual_seed(0)
    p_logits, q_logits = torch.randn(2, 5, generator=generator) * 1.5
    for filters, num_children in itertools.product([PLAIN, Filters(0.5, top_k=2)], [1, 3, 5]):
        shape = StaticTree((-1, *[0] * num_children))
        run = recursive_rejection.StaticRun(None, shape, filters, seed=1)  # type: ignore[arg-type]
        tokens = torch.zeros(trials, num_children + 1, dtype=torch.int64)
        draft_logits = recursive_rejection.masked(q_logits, filters, recursive_rejection.DROPPED)
        draft_logits = draft_logits.expand(trials, 1, 5)
        run._sample_children(tokens, [0], draft_logits)
        assert all(len(set(row)) == num_children for row in tokens[:100, 1:].tolist())
        logits = p_logits.expand(trials, num_children + 1, 5)
        path, bonus = recursive_rejection.recursive_rejection(
            logits, tokens, draft_logits, shape, filters, run.generator
        )
        child = path[:, 1]
        emitted = torch.where(child > 0, tokens.gather(1, child.clamp_min(0)[:, None])[:, 0], bonus)
        expected = distribution(p_logits, filters)
        assert chi_square_p_value(emitted.bincount(minlength=5), expected) > 1e-3, (filters, num_children)


# ---- real small models


@cache
def peers(depth: int = 4) -> dict[str, Peer]:
    target, drafters = TargetModel(small_models.trained_target()), small_models.trained_drafters()
    tuning = [small_models.sentences("math", 1, 8, seed=40 + i) for i in range(8)]
    return {
        "recursive rejection": RecursiveRejection(target, drafters["math"], tuning, depth, tuning_tokens=24),
        "single": PaperWay(target, {"math": drafters["math"]}, "single", depth),
        "routed": PaperWay(target, drafters, "routed", depth),
        "merged": PaperWay(target, drafters, "merged", depth),
    }


def ragged_prompts(count: int) -> list[Tensor]:
    return [small_models.sentences("math", 1, 6 + row % 5, seed=70 + row) for row in range(count)]


@pytest.mark.parametrize("name", ["recursive rejection", "single", "routed", "merged"])
def test_greedy_text_is_the_targets_own(name: str) -> None:
    prompts, peer = ragged_prompts(6), peers()[name]
    found = peer.generate(prompts, 0.0, 20, 24, seed=0)
    model = small_models.trained_target()
    assert found.new_tokens == [plain_generate(model, one, max_new_tokens=24).new_tokens[0] for one in prompts]
    assert found.stats.acceptance_length > 2, "hollow: almost nothing is accepted"
    assert found.stats.num_tokens == [len(tokens) for tokens in found.new_tokens]


@pytest.mark.parametrize("name, composition", [("single", "single"), ("routed", "confidence")])
def test_the_papers_way_accepts_at_temperature_0_what_the_library_accepts_without_coupling(
    name: str, composition: str
) -> None:
    """Step by step: the same trees, committed and observed alike."""
    prompts, peer = ragged_prompts(4), peers()[name]
    assert isinstance(peer, PaperWay)
    found = peer.generate(prompts, 0.0, 20, 24, seed=0).stats
    decoder = SpeculativeDecoder(peer.target, peer.drafters, composition, shape=TreeShape(4, 10, 20))
    for row, prompt in enumerate(prompts):
        theirs = decoder.generate(prompt, max_new_tokens=24).stats
        assert found.num_accepted[row] == theirs.num_accepted[0]
        assert found.choices[row] == theirs.choices[0] or name == "single"


@pytest.mark.parametrize("name", ["recursive rejection", "single", "routed", "merged"])
@pytest.mark.parametrize("num_nodes", [2, 9, 30])
def test_every_tree_has_the_nodes_asked_for_and_no_more_levels(name: str, num_nodes: int) -> None:
    found = peers()[name].generate(ragged_prompts(3), 1.0, num_nodes, 12, seed=0)
    assert {count for row in found.stats.num_nodes for count in row} == {num_nodes}
    assert max(count for row in found.stats.num_accepted for count in row) <= min(4, num_nodes - 1)


def test_a_seed_gives_its_text_again_and_another_seed_another_text() -> None:
    for peer in peers().values():
        first, again, other = (peer.generate(ragged_prompts(4), 1.0, 12, 12, seed).new_tokens for seed in (0, 0, 1))
        assert first == again != other


def test_sampled_children_follow_flat_draws_better_than_the_likeliest_ones() -> None:
    """The reason why recursive rejection is the peer to beat."""
    used = peers()
    sampled, likeliest = (
        used[name].generate(ragged_prompts(24), 1.5, 16, 32, 0).stats.acceptance_length
        for name in ("recursive rejection", "single")
    )
    assert sampled > likeliest + 0.1


def test_a_static_tree_asks_the_drafter_what_the_library_asks_it() -> None:
    """Node by node: the log-probabilities that the library's own tree has for the same paths."""
    target, drafter = TargetModel(small_models.trained_target()), small_models.trained_drafters()["math"]
    ids, mask = small_models.prompts(4)
    lengths = mask.sum(dim=1)
    packed = torch.stack([row.roll(int(count)) for row, count in zip(ids, lengths, strict=True)])
    state, roots = drafter.reset(4), torch.arange(10, 14)
    with torch.inference_mode():
        known = Lengths(lengths, tuple(lengths.tolist()))
        scored = target.prefill(packed, known, target.new_cache(4))
        next_tokens = packed.roll(-1, dims=1).scatter(1, lengths[:, None] - 1, roots[:, None])
        drafter.observe(state, scored.features, next_tokens, known)
        theirs = drafter.propose(state, roots, TreeShape(4, 10, 200), torch.ones(4, dtype=torch.bool))
        shape = best_tree(first_rates(4, 16), 40)
        mine = recursive_rejection.StaticRun(drafter, shape, Filters(0.0), 0).propose([state], roots, roots > 0)
    for row in range(4):
        known = dict(zip(paths(theirs, row), theirs.scores[row].tolist(), strict=False))
        scores, found = [0.0], paths(mine.tree, row)
        for node, parent in enumerate(shape.parents[1:], start=1):
            step = mine.draft_logits[row, shape.inner.index(parent)].log_softmax(-1)[found[node][-1]]
            scores.append(scores[parent] + float(step))
        both = [node for node, path in enumerate(found) if path in known]
        assert len(both) > 20 and max(len(found[node]) for node in both) == 4
        for node in both:
            assert abs(scores[node] - known[found[node]]) < 1e-4  # float32, sums in another order


def paths(tree: DraftTree, row: int) -> list[tuple[int, ...]]:
    """The tokens on the way to each node, without the root's."""
    found: list[tuple[int, ...]] = [()]
    for node in range(1, int(tree.num_nodes[row])):
        found.append((*found[int(tree.parents[row, node])], int(tree.tokens[row, node])))
    return found


# ---- the parts


@pytest.mark.parametrize(
    "filters", [Filters(0.7, top_k=3), Filters(top_p=0.6), Filters(1.4, min_p=0.3), Filters(0.5, 5, 0.9, 0.1)]
)
def test_filters_keep_what_the_specification_keeps(filters: Filters) -> None:
    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * 2
    expected = torch.stack([kept_tokens(row, filters) for row in logits])
    assert torch.equal(keeps(logits.double() / filters.temperature, filters), expected)
    assert torch.equal(distribution(logits, filters) > 0, expected)


def test_the_static_tree_is_the_best_of_its_size() -> None:
    """Against every tree of that size: how many nodes each of a node's children heads, by recursion."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rates = torch.rand(3, 3, generator=generator).softmax(1).sort(dim=1, descending=True).values.tolist()
        for num_nodes in (1, 2, 5, 9):
            shape = best_tree(rates, num_nodes)
            assert len(shape.parents) == num_nodes and max(shape.depths) <= 3
            assert expected_acceptance(shape, rates) == pytest.approx(best_acceptance(rates, num_nodes - 1, 0, 0))


def best_acceptance(rates: list[list[float]], num_nodes: int, depth: int, rank: int) -> float:
    """Of `num_nodes` nodes below one node, of which the children before `rank` are taken already."""
    if num_nodes == 0 or depth == len(rates) or rank == len(rates[depth]):
        return 0.0 if num_nodes == 0 else -np.inf
    return max(
        rates[depth][rank] * (1 + best_acceptance(rates, below, depth + 1, 0))
        + best_acceptance(rates, num_nodes - 1 - below, depth, rank + 1)
        for below in range(num_nodes)
    )


def test_measured_rates_are_those_of_the_paths() -> None:
    rates = [[0.5, 0.2, 0.1], [0.7, 0.1, 0.05]]
    shape = best_tree(rates, 9)
    generator, walks = np.random.default_rng(0), []
    for _ in range(6_000):
        path = [0]
        while (children := shape.children[path[-1]]) and len(path) <= 2:
            odds = [*rates[shape.depths[path[-1]]][: len(children)]]
            pick = generator.choice(len(children) + 1, p=[*odds, 1 - sum(odds)])
            if pick == len(children):
                break
            path.append(children[pick])
        walks.append(path)
    found = measured_rates(shape, walks, first_rates(2, 3))
    for depth, rank in itertools.product(range(2), range(3)):
        if any(shape.depths[n] == depth and len(shape.children[n]) > rank for n in range(9)):
            assert found[depth][rank] == pytest.approx(rates[depth][rank], abs=0.03)


def test_merged_trees_stand_side_by_side_and_repeat_what_both_propose() -> None:
    assert paper.shared_sizes(119, 2) == [60, 60]
    assert paper.shared_sizes(60, 2) == [31, 30]
    target, drafters = TargetModel(small_models.trained_target()), small_models.trained_drafters()
    run = paper.PaperRun(PaperWay(target, drafters, "merged"), 40, PLAIN, 0)
    states = [drafter.reset(1) for drafter in drafters.values()]
    features = torch.randn(1, 3, small_models.HIDDEN, generator=torch.Generator().manual_seed(0))
    for drafter, state in zip(drafters.values(), states, strict=True):
        drafter.observe(state, features, torch.tensor([[5, 6, 7]]), Lengths.of([3]))
    tree = run.propose(states, torch.tensor([7]), torch.tensor([True])).tree
    own = [
        paths(drafter.propose(state, torch.tensor([7]), shape, torch.tensor([True])), 0)
        for drafter, state, shape in zip(drafters.values(), states, run.shapes, strict=True)
    ]
    assert paths(tree, 0) == own[0] + own[1][1:]
    assert max(Counter(paths(tree, 0)).values()) == 2


def test_routing_takes_the_higher_mean_confidence_and_of_equals_the_first() -> None:
    tree = DraftTree(torch.zeros(2, 3).long(), torch.tensor([[-1, 0, 0]] * 2),
                     torch.tensor([[0.0, -1.0, -2.0], [0.0, -1.0, -float("inf")]]), torch.tensor([3, 2]))  # fmt: skip
    expected = [(np.exp(-1) + np.exp(-2)) / 2, np.exp(-1)]
    assert paper.mean_confidence(tree).tolist() == pytest.approx(expected)
    assert paper.mean_confidence(tree)[None].repeat(2, 1).argmax(dim=0).tolist() == [0, 0]


def test_a_token_that_stands_twice_is_one_candidate_and_both_copies_are_followed() -> None:
    """Node 3 repeats node 1's path with another child: the union of their children is tried."""
    tokens, parents, proposers = [0, 1, 2, 1, 3], [-1, 0, 1, 0, 3], [3, 1, 1, 2, 2]
    certain = {0: [0, 1, 0, 0], 1: [0, 0, 0, 1.0], 4: [1.0, 0, 0, 0]}
    verdict = paper.accept_zero_renormalise(
        lambda node: np.array(certain[node], dtype=float), tokens, parents, proposers, lambda: 0.5
    )
    assert (verdict.path, verdict.bonus_token, verdict.proposers) == ([0, 3, 4], 0, [3, 2])
