"""Drafting with a look at the noise: trees equal a literal recomputation, and every row minds its own business."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from literal_drafter import (
    Draw,
    LoneDrafter,
    Text,
    Together,
    assert_same_bits,
    assert_same_tree,
    literal_tree,
    make_drafter,
    paths_of,
)
from literal_drafter import new_target as new_literal_target
from small_models import new_target

import taps_ext as taps
from taps_ext.drafters import EagleConfig, EagleDrafter, EagleNetwork
from taps_ext.drafters.coupling import Calibration
from taps_ext.tree import DraftTree, Lengths, TreeShape

# Coefficients that differ by temperature and by depth, fewer depths than the trees have.
CALIBRATION = Calibration((0.5, 1.0), alpha=((1.3, 0.9), (0.8, 1.1)), beta=((0.5, 1.2), (1.4, 0.7)))
OTHER = Calibration((0.9,), alpha=((0.6,),), beta=((1.6,),))
SHAPE = TreeShape(depth=4, branching=3, max_nodes=26)


def draws(temperatures: list[float], seed: int = 40) -> tuple[taps.SamplingParams, list[Draw]]:
    """The sampling of a batch, and of each row by itself."""
    rows = [Draw(taps.row_seed(seed, b), t) for b, t in enumerate(temperatures)]
    return taps.SamplingParams(temperatures, seed=seed), rows


@pytest.mark.parametrize("min_score", [None, -4.0])
def test_coupled_trees_of_a_ragged_batch_equal_full_recomputation(min_score: float | None) -> None:
    """At temperatures below, between and above those of the calibration, and at 0."""
    target = new_literal_target()
    drafter, shape = make_drafter(target, calibration=CALIBRATION), TreeShape(4, 3, 26, min_score)
    sampling, rows = draws([0.3, 0.8, 0.0, 1.5])
    text, state = Text(target, 4, 40), drafter.reset(4, sampling.rows(4))
    for counts in ([9, 4, 14, 1], [1, 3, 2, 2], [0, 5, 1, 4]):
        text.feed(drafter, state, counts)
        tree = text.propose(drafter, state, shape)
        tree.validate()
        for b, fed in enumerate(text.fed):
            expected = literal_tree(drafter, text.features[b, :fed], text.tokens[b, 1 : fed + 1], shape, rows[b])
            assert_same_tree(paths_of(tree, b), expected)


def proposals(drafters: list[EagleDrafter], sampling: taps.SamplingParams | None, batch_size: int) -> list[DraftTree]:
    """What each drafter proposes in a group, two steps of a ragged batch."""
    grouped, text = Together(drafters), Text(new_literal_target(), batch_size, 40)
    states = grouped.reset(batch_size, None if sampling is None else sampling.rows(batch_size))
    trees: list[DraftTree] = []
    for counts in ([9, 4, 14, 6], [1, 3, 2, 0]):
        grouped.observe(states, *text.block(counts[:batch_size]))
        trees += grouped.propose(states, text.roots(), SHAPE, torch.ones(batch_size, dtype=torch.bool))
    return trees


def test_rows_at_temperature_0_are_drafted_to_the_bit_as_without_a_look_at_the_noise() -> None:
    drafters = [make_drafter(new_literal_target(), seed, CALIBRATION) for seed in range(2)]
    coupled = proposals(drafters, taps.SamplingParams([0.0, 1.0, 0.0, 0.7], seed=1), 4)
    for tree, plain in zip(coupled, proposals(drafters, None, 4), strict=True):
        for row in range(4):
            if row in (0, 2):
                assert_same_bits(tree, plain, row)
            else:
                assert not tree.scores[row].equal(plain.scores[row])


@pytest.mark.parametrize("alike", [True, False])
def test_each_drafter_of_a_group_minds_its_own_calibration(alike: bool) -> None:
    """One that has none drafts beside the others as without a look at the noise."""
    target, sampling = new_literal_target(), taps.SamplingParams([1.0, 0.6, 0.0], seed=9)
    drafters = [make_drafter(target, seed, known) for seed, known in enumerate((CALIBRATION, None, OTHER))]
    if not alike:
        first = drafters[0]
        drafters[1] = make_drafter(target, 1, None, num_key_value_heads=4)
        drafters.append(LoneDrafter(first.network, first.embedding, first.lm_head, "lone", CALIBRATION))
    together = proposals(drafters, sampling, 3)
    for d, drafter in enumerate(drafters):
        for tree, alone in zip(together[d :: len(drafters)], proposals([drafter], sampling, 3), strict=True):
            for row in range(3):
                assert_same_tree(paths_of(tree, row), paths_of(alone, row))
    for tree, plain in zip(together[1 :: len(drafters)], proposals([drafters[1]], None, 3), strict=True):
        for row in range(3):
            assert_same_tree(paths_of(tree, row), paths_of(plain, row))


def test_a_coupled_row_drafts_the_same_alone_and_in_a_batch() -> None:
    """Its seed, its temperature and its length are its own; chosen rows of the batch draft what all of them would."""
    target = new_literal_target()
    drafters = [make_drafter(target, seed, known) for seed, known in enumerate((CALIBRATION, OTHER))]
    grouped, sampling = Together(drafters), taps.SamplingParams([1.2, 0.7, 0.0, 0.7], seed=[3, -5, 7, 3])
    together, states = Text(target, 4, 40), grouped.reset(4, sampling.rows(4), decay=0.9)
    alone = Text(target, 4, 40)
    lone_states = []
    for b in range(4):
        one = taps.SamplingParams(sampling.temperature[b], seed=sampling.seed[b])
        lone_states.append(grouped.reset(1, one.rows(1), decay=0.9))
    active = torch.ones(4, dtype=torch.bool)
    for counts, choice in (([12, 3, 7, 1], [0, 1, 1, 0]), ([1, 2, 0, 3], [1, 1, 0, 1]), ([2, 4, 1, 1], [1] * 4)):
        grouped.observe(states, *together.block(counts))
        trees = grouped.propose(states, together.roots(), SHAPE, active)
        chosen = grouped.propose(states, together.roots(), SHAPE, active, choice)
        features, tokens, _ = alone.block(counts)
        for b in range(4):
            row = slice(b, b + 1)
            grouped.observe(lone_states[b], features[row], tokens[row], Lengths.of(counts[row]))
            singles = grouped.propose(lone_states[b], alone.roots()[row], SHAPE, active[row])
            for d in range(2):
                assert_same_tree(paths_of(trees[d], b), paths_of(singles[d], 0))
                assert_same_tree(paths_of(chosen[d], b), paths_of(trees[d], b) if choice[b] == d else [])
                assert chosen[d].capacity == trees[d].capacity


def bigram_models() -> tuple[Any, EagleDrafter]:
    """A target whose logits follow from the last token, and a drafter that computes the very same."""
    torch.manual_seed(3)
    target = new_target(eos_token_id=None).requires_grad_(False)
    network = EagleNetwork(EagleConfig.for_target(target.config)).requires_grad_(False).eval()
    for layer in (*target.model.layers, network.layer):
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    embedding.weight.normal_()  # the padding token's row too
    embedding.weight /= embedding.weight.square().mean(dim=1, keepdim=True).sqrt()  # the final norm changes nothing
    lm_head.weight.normal_(std=0.2)
    hidden = target.config.hidden_size
    network.fc.weight.copy_(torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1))
    ones = ((1.0,), (1.0,))
    return target, EagleDrafter(network, embedding, lm_head, "perfect", Calibration((0.3, 1.5), ones, ones))


def full_steps(drafting: str, depth: int) -> list[bool]:
    """Of each step of chains of that depth but a row's last, rows at temperature 0 left out: was it accepted whole?"""
    target, drafter = bigram_models()
    decoder = taps.SpeculativeDecoder(
        target, {"perfect": drafter}, shape=TreeShape(depth, 1, depth + 1), drafting=drafting
    )
    sampling = taps.SamplingParams([0.0, 0.3, 0.7, 1.0, 1.5], seed=2)
    ids = torch.randint(0, 64, (5, 3), generator=torch.Generator().manual_seed(1))
    result = decoder.generate(ids, sampling=sampling, max_new_tokens=61)
    plain = taps.plain_generate(target, ids, sampling=sampling, max_new_tokens=61)
    assert torch.equal(result.sequences, plain.sequences)
    return [count == depth for row in result.stats.num_accepted[1:] for count in row[:-1]]


@pytest.mark.parametrize("depth", [1, 6])
def test_a_drafter_that_knows_the_target_proposes_exactly_what_it_draws(depth: int) -> None:
    """One node a level is enough, whatever the temperature; without a look at the noise it is seldom right."""
    assert all(full_steps("coupled", depth))
    without = full_steps("topk", depth)
    assert sum(without) < len(without) * 0.6
