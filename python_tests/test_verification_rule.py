"""Why sample-then-match is right: equal to EAGLE's rule in exact numbers, and to the target in frequencies."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from tree_cases import batch, row

from taps_ext import ops, reference
from taps_ext.reference import Filters
from taps_ext.tree import DraftTree

# ---- one node, exact numbers

Distribution = dict[int, Fraction]


def eagle_rule(target: list[Fraction], candidates: list[int]) -> tuple[Distribution, Distribution]:
    """EAGLE's loop at one node, as probabilities: of accepting each candidate, and of emitting each token.

    For each candidate in order: accept it with its probability under the current distribution; otherwise set that
    probability to zero and renormalise. When none is accepted, sample from what is left.
    """
    left = list(target)
    reached = Fraction(1)
    accepted: Distribution = dict.fromkeys(candidates, Fraction(0))
    for candidate in candidates:
        accepted[candidate] += reached * left[candidate]
        reached *= 1 - left[candidate]
        left[candidate] = Fraction(0)
        rest = sum(left)
        left = [p / rest for p in left] if rest else left
    emitted = {token: accepted.get(token, Fraction(0)) + reached * left[token] for token in range(len(target))}
    return accepted, emitted


def double_counting_rule(target: list[Fraction], candidates: list[int]) -> Distribution:
    """A wrong rule: one coin against the candidates' summed probabilities, a duplicate counted each time."""
    emitted: Distribution = dict.fromkeys(range(len(target)), Fraction(0))
    total = Fraction(0)
    for candidate in candidates:
        share = min(target[candidate], 1 - total)
        emitted[candidate] += share
        total += share
    rest = sum(p for token, p in enumerate(target) if token not in candidates)
    for token, p in enumerate(target):
        if token not in candidates and rest:
            emitted[token] += (1 - total) * p / rest
    return emitted


def random_target(rng: random.Random, vocabulary: int) -> list[Fraction]:
    weights = [rng.choice([0, 1, 1, 2, 5, 30]) for _ in range(vocabulary - 1)] + [1]
    return [Fraction(weight, sum(weights)) for weight in weights]


def test_eagles_rule_emits_the_target_distribution_and_accepts_what_matching_accepts(num_cases: int) -> None:
    """Matching accepts a candidate exactly when the draw is that candidate: with the target's probability of it."""
    for seed in range(num_cases // 3):
        rng = random.Random(seed)
        vocabulary = rng.randint(2, 8)
        target = random_target(rng, vocabulary)
        candidates = rng.sample(range(vocabulary), rng.randint(0, vocabulary))
        accepted, emitted = eagle_rule(target, candidates)
        assert emitted == dict(enumerate(target)), f"seed {seed}"
        assert accepted == {candidate: target[candidate] for candidate in candidates}, f"seed {seed}"


def test_counting_a_duplicate_twice_is_wrong() -> None:
    """The published counterexample: q = (.2, .3, .5) with candidates (0, 0) becomes (.4, .225, .375)."""
    target = [Fraction(2, 10), Fraction(3, 10), Fraction(5, 10)]
    assert list(double_counting_rule(target, [0, 0]).values()) == [Fraction(4, 10), Fraction(9, 40), Fraction(3, 8)]
    assert list(double_counting_rule(target, [0, 1]).values()) == target  # distinct candidates: right


@pytest.mark.parametrize("candidates", [[], [0], [3, 0], [1, 2, 3], [4, 3, 2, 1, 0]])
def test_one_node_emits_softmax_whatever_its_children(candidates: list[int]) -> None:
    trials = 20_000
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, -2.0])
    tree = batch([row([-1] + [0] * len(candidates), tokens=[0, *candidates])] * trials)
    result = verify(logits.expand(trials, tree.capacity, 5), tree, torch.arange(trials), torch.zeros(trials).long())
    first_child = result.path[:, 1] if tree.capacity > 1 else torch.full((trials,), -1)
    emitted = torch.where(
        first_child >= 0, tree.tokens.gather(1, first_child.clamp(min=0)[:, None])[:, 0], result.bonus_tokens
    )
    assert chi_square_p_value(emitted.bincount(minlength=5), logits.double().softmax(-1)) > 1e-3
    accepted = float((result.num_accepted > 0).double().mean())
    assert abs(accepted - float(logits.softmax(-1)[candidates].sum())) < 4 * 0.5 / trials**0.5


# ---- three tokens, frequencies

VOCABULARY = 4
DEPTH = 3
PREFIXES = [prefix for length in range(DEPTH) for prefix in itertools.product(range(VOCABULARY), repeat=length)]
BEYOND = len(PREFIXES)  # every longer prefix: nothing behind the third token counts
TRIALS = 24_000

PLAIN = Filters()
Rule = Callable[[Tensor, DraftTree, Tensor, Tensor], ops.VerifiedPaths]
Candidates = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[DraftTree, Tensor]]


def table_of_logits() -> Tensor:
    """[prefixes + 1, V]: a target whose logits follow from the whole prefix."""
    return torch.randn(len(PREFIXES) + 1, VOCABULARY, generator=torch.Generator().manual_seed(11)) * 1.2


def next_prefix() -> Tensor:
    """[prefixes + 1, V]: the prefix that a token leads to."""
    number = {prefix: i for i, prefix in enumerate(PREFIXES)}
    steps = [[number.get((*prefix, token), BEYOND) for token in range(VOCABULARY)] for prefix in PREFIXES]
    return torch.tensor([*steps, [BEYOND] * VOCABULARY])


def trees_of(prefixes: Tensor, best: Callable[[Tensor, int], Tensor]) -> tuple[DraftTree, Tensor]:
    """For each prefix two tokens, two after each, as `best(prefixes, depth)` [..., 2] says; and each node's prefix."""
    follow = next_prefix()
    first = best(prefixes[:, None], 0)[:, 0]
    at = follow[prefixes[:, None], first]
    second = best(at, 1)
    tokens = torch.cat([torch.zeros_like(prefixes[:, None]), first, second.flatten(1)], dim=1)
    at = torch.cat([prefixes[:, None], at, follow[at[..., None], second].flatten(1)], dim=1)
    size = len(prefixes)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 2]] * size)
    return DraftTree(tokens, parents, torch.zeros(size, 7), torch.full((size,), 7)), at


def likely_trees(prefixes: Tensor, logits: Tensor, seeds: Tensor, positions: Tensor) -> tuple[DraftTree, Tensor]:
    """The two likeliest tokens, and the two likeliest after each; the prefix at each node is [B, 7]."""
    return trees_of(prefixes, lambda at, depth: logits[at].topk(2, dim=-1).indices)


def coupled_trees(prefixes: Tensor, logits: Tensor, seeds: Tensor, positions: Tensor) -> tuple[DraftTree, Tensor]:
    """Those that a drafter, no good one, expects the target to draw with the noise that it will use."""
    known = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(12)) * 4.0
    ones = torch.ones(len(seeds))

    def best(at: Tensor, depth: int) -> Tensor:
        coupling = ops.Coupling(seeds, positions + depth, ones, ones, ones)
        return ops.expand_frontier(known[at], torch.zeros(at.shape), 2, coupling).tokens

    return trees_of(prefixes, best)


def eagle_verify(logits: Tensor, tree: DraftTree, seeds: Tensor, positions: Tensor) -> ops.VerifiedPaths:
    """EAGLE's last step: where no child was taken, a fresh draw from what is left of the distribution."""
    walk = verify(logits, tree, seeds, positions)
    everyone = torch.arange(len(seeds))
    last = walk.path[everyone, walk.num_accepted]
    left = logits[everyone, last].clone()
    for child in range(1, 7):
        is_child = tree.parents[:, child] == last
        left[everyone[is_child], tree.tokens[is_child, child]] = -torch.inf
    nothing = DraftTree(*(field[:, :1] for field in (tree.tokens, tree.parents, tree.scores)), torch.ones_like(seeds))
    fresh = verify(left[:, None], nothing, seeds, positions + walk.num_accepted + 1_000_000)
    return walk._replace(bonus_tokens=fresh.bonus_tokens)


def three_tokens(rule: Rule, candidates: Candidates = likely_trees) -> tuple[Tensor, float]:
    """The first three tokens of every trial, int64 [TRIALS, 3], and the mean of accepted tokens a step."""
    logits, follow = table_of_logits(), next_prefix()
    text = torch.full((TRIALS, DEPTH + 3), -1)
    lengths, prefixes = torch.zeros(TRIALS, dtype=torch.int64), torch.zeros(TRIALS, dtype=torch.int64)
    accepted = []
    while (active := (lengths < DEPTH).nonzero().flatten()).numel():
        seeds, positions = active + 1_000_000, lengths[active]
        tree, at = candidates(prefixes[active], logits, seeds, positions)
        result = rule(logits[at], tree, seeds, positions)
        for step in range(3):
            has_token = result.num_accepted >= step
            node = result.path[:, min(step + 1, 2)].clamp(min=0)
            drafted = tree.tokens.gather(1, node[:, None])[:, 0]
            token = torch.where(result.num_accepted > step, drafted, result.bonus_tokens)
            rows, token = active[has_token], token[has_token]
            text[rows, lengths[rows]] = token
            prefixes[rows] = follow[prefixes[rows], token]
            lengths[rows] += 1
        accepted.append(result.num_accepted.double())
    return text[:, :DEPTH], float(torch.cat(accepted).mean())


def verify(
    logits: Tensor, tree: DraftTree, seeds: Tensor, positions: Tensor, filters: Filters = PLAIN
) -> ops.VerifiedPaths:
    size = len(seeds)
    return ops.verify_tree(
        logits,
        tree,
        torch.full((size,), filters.temperature),
        torch.full((size,), filters.top_k),
        torch.full((size,), filters.top_p),
        torch.full((size,), filters.min_p),
        seeds,
        positions,
    )


def wrong_verify(logits: Tensor, tree: DraftTree, seeds: Tensor, positions: Tensor) -> ops.VerifiedPaths:
    """One coin a node against summed probabilities, the likeliest child in the tree twice and counted twice."""
    generator = torch.Generator().manual_seed(5)
    size = len(seeds)
    everyone = torch.arange(size)
    path = torch.full((size, 7), -1)
    path[:, 0] = 0
    num_accepted, bonus = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    node, walking = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool)
    for depth in range(3):
        p = logits[everyone, node].double().softmax(-1)
        coin = torch.rand(size, generator=generator, dtype=torch.float64)
        has_children = node < 3
        children = torch.where(has_children[:, None], 2 * node[:, None] + torch.tensor([1, 2]), 0)
        p_children = p.gather(1, tree.tokens.gather(1, children)) * has_children[:, None]
        first, both = 2 * p_children[:, 0], 2 * p_children[:, 0] + p_children[:, 1]
        chosen = torch.where(coin < first, children[:, 0], torch.where(coin < both, children[:, 1], 0))
        rest = p.scatter(1, tree.tokens.gather(1, children), 0.0) if depth < 2 else p
        rest = torch.where(has_children[:, None], rest, p)
        drawn = torch.multinomial(rest, 1, generator=generator)[:, 0]
        descends, stops = walking & (chosen > 0), walking & (chosen == 0)
        bonus[stops], num_accepted[stops] = drawn[stops], depth
        path[descends, depth + 1] = chosen[descends]
        node = torch.where(descends, chosen, node)
        walking = descends
    return ops.VerifiedPaths(path, num_accepted, bonus, torch.zeros(size, dtype=torch.int64))


def joint_distribution(filters: Filters) -> Tensor:
    """float64 [V * V * V], exact."""
    logits, follow = table_of_logits(), next_prefix()
    rows = []
    for one in logits:
        z = one.double() / filters.temperature
        rows.append(z.masked_fill(~reference.kept_tokens(one, filters), -torch.inf).softmax(-1))
    joint = []
    for text in itertools.product(range(VOCABULARY), repeat=DEPTH):
        probability, prefix = 1.0, 0
        for token in text:
            probability *= float(rows[prefix][token])
            prefix = int(follow[prefix, token])
        joint.append(probability)
    return torch.tensor(joint, dtype=torch.float64)


def chi_square_p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's test; cells that expect fewer than five are one cell; a count where nothing may be gives 0."""
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def histogram(text: Tensor) -> Tensor:
    powers = VOCABULARY ** torch.arange(DEPTH - 1, -1, -1)
    return (text * powers).sum(-1).bincount(minlength=VOCABULARY**DEPTH)


@pytest.mark.parametrize("candidates", [likely_trees, coupled_trees])
@pytest.mark.parametrize(
    "filters", [Filters(), Filters(temperature=0.7, top_k=3), Filters(top_p=0.75), Filters(temperature=1.5, min_p=0.25)]
)
def test_three_tokens_through_trees_have_the_targets_joint_frequency(filters: Filters, candidates: Candidates) -> None:
    text, accepted = three_tokens(lambda *arguments: verify(*arguments, filters), candidates)
    assert accepted > 0.5, "hollow: almost nothing is accepted"
    assert chi_square_p_value(histogram(text), joint_distribution(filters)) > 1e-3


def test_candidates_chosen_by_the_noise_change_no_text_and_are_accepted_more() -> None:
    likely, coupled = (three_tokens(verify, candidates) for candidates in (likely_trees, coupled_trees))
    assert likely[0].equal(coupled[0])
    assert coupled[1] > likely[1] + 0.1


def test_the_same_test_fails_for_a_rule_that_counts_a_duplicate_twice() -> None:
    text, _ = three_tokens(wrong_verify)
    assert chi_square_p_value(histogram(text), joint_distribution(PLAIN)) < 1e-12


def test_the_same_test_fails_for_a_draw_beside_candidates_that_saw_the_noise() -> None:
    """Which EAGLE's rule makes, and rightly where the candidates know nothing of it."""
    for candidates, is_right in ((likely_trees, True), (coupled_trees, False)):
        text, _ = three_tokens(eagle_verify, candidates)
        p_value = chi_square_p_value(histogram(text), joint_distribution(PLAIN))
        assert p_value > 1e-3 if is_right else p_value < 1e-12
