"""expand_frontier with a coupling: children ranked and scored by logits plus the noise of the target's own draws.

Also with the ids of a draft vocabulary, with a coupling and without.
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from test_tree_expansion import SCORE_TOLERANCE, random_logits, random_vocabulary
from torch import Tensor
from tree_cases import LOGIT_DTYPES, assert_same, strided

from taps_ext import native, ops, reference
from taps_ext.ops import Coupling
from taps_ext.tree import DraftTree

pytestmark = pytest.mark.usefixtures("backend")

TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.0, 1.5)
EXTREME_TEMPERATURES = (1e-3, 100.0)
SEEDS = (0, 7, -1, -(2**63), 2**63 - 1, 2**32)
POSITIONS = (0, 5, 2**32 - 1, 2**32 + 3, 2**62)


def coupling_of(*rows: tuple[int, int, float, float, float]) -> Coupling:
    """(seed, position, temperature, alpha, beta) a row."""
    columns = list(zip(*rows, strict=True))
    integers = (torch.tensor(column, dtype=torch.int64) for column in columns[:2])
    return Coupling(*integers, *(torch.tensor(column, dtype=torch.float32) for column in columns[2:]))


def random_coupling(rng: random.Random, batch_size: int) -> Coupling:
    """Some rows are of one request, as those of several drafters are, and may differ in all but seed and position."""
    temperatures = TEMPERATURES if rng.random() < 0.8 else EXTREME_TEMPERATURES
    requests = [
        (rng.choice([*SEEDS, rng.getrandbits(62)]), rng.choice([*POSITIONS, rng.randrange(10_000)]))
        for _ in range(batch_size)
    ]
    if rng.random() < 0.5:
        requests = rng.choices(requests, k=batch_size)
    betas = ([0.0, rng.uniform(0.2, 2.5), rng.uniform(0.2, 2.5), 30.0] for _ in requests)
    return coupling_of(
        *(
            (*request, rng.choice(temperatures), rng.uniform(0.2, 2.5), rng.choice(beta))
            for request, beta in zip(requests, betas, strict=True)
        )
    )


class Case(NamedTuple):
    logits: Tensor  # [B, F, V]
    scores: Tensor  # [B, F]
    branching: int
    coupling: Coupling | None
    token_ids: Tensor | None = None


def coupled_case(seed: int, batch_size: int | None = None, vocabulary: int | None = None) -> Case:
    rng = random.Random(seed)
    vocabulary = vocabulary or (1 if seed % 60 == 11 else random_vocabulary(rng, seed))
    size = (1, 2) if vocabulary > 33_000 else (batch_size or rng.randint(1, 3), rng.randint(1, 6))
    logits = random_logits(rng, *size, vocabulary)
    scores = torch.tensor([[-rng.expovariate(0.5) for _ in range(size[1])] for _ in range(size[0])])
    branching = rng.randint(1, min(vocabulary, 10)) if seed % 9 else min(vocabulary, 64)
    return Case(strided(logits) if seed % 5 == 0 else logits, scores, branching, random_coupling(rng, size[0]))


def random_token_ids(rng: random.Random, count: int) -> Tensor:
    """Ascending ids: of all tokens, dense, spread over a large vocabulary, or the largest that there are."""
    step = rng.choice([1, 3, 40, (2**31 - 1) // count])
    ids = torch.tensor([rng.randint(1, step) for _ in range(count)]).cumsum(0) - 1
    return ids + (2**31 - 1 - int(ids[-1]) if rng.random() < 0.1 else 0)


def draft_vocabulary_case(seed: int) -> Case:
    case = coupled_case(seed)
    ids = random_token_ids(random.Random(seed), case.logits.shape[-1])
    return case._replace(token_ids=ids, coupling=case.coupling if seed % 3 else None)


def tolerance(case: Case) -> Tensor:
    """[B]: what float32 may lose in a coupled logit. Its two terms and their sum are rounded, the scale too, and the
    noise is right to 2e-6 where it is 16 or more, to 1e-6 and less elsewhere."""
    x = case.logits.double().flatten(1)
    largest = x.masked_fill(~x.isfinite(), 0).abs().amax(-1)
    if case.coupling is None:
        return torch.zeros(len(x))
    _, _, temperature, alpha, beta = case.coupling
    scaled = torch.where(temperature > 0, alpha / temperature, 0).double() * largest
    return torch.where(temperature > 0, 2.0**-23 * (scaled + 8 * beta) + 1.5e-6 * beta, 0)


# ---- the reference


def test_coupled_expansion_equals_the_reference(num_cases: int) -> None:
    """Rows of temperature 0 among others, NaN and -inf, V = 1 to 262,144, K = V, T = 1e-3 and 100, beta = 0 and 30.

    Float32 may exchange children whose coupled logits are as good as equal: those rows are few, and not looked at.
    """
    assert_equals_the_reference([coupled_case(seed) for seed in range(num_cases // 3)])


def assert_equals_the_reference(cases: list[Case]) -> None:
    undecided = rows = 0
    for seed, case in enumerate(cases):
        actual = ops.expand_frontier(*case)
        expected = reference.expand_frontier(*case)
        margins = reference.expansion_margin(*case)
        where = f"seed {seed}, {list(case.logits.shape)} {case.logits.dtype}, {case.coupling}"
        for b, slack in enumerate(tolerance(case).tolist()):
            close = {"atol": 2 * slack + SCORE_TOLERANCE["atol"], "rtol": SCORE_TOLERANCE["rtol"]}
            torch.testing.assert_close(actual.scores[b], expected.scores[b], **close, msg=f"{where}, scores of row {b}")
            is_close = torch.allclose(actual.entropies[b], expected.entropies[b], atol=1e-5 + 4 * slack, rtol=1e-5)
            assert is_close, f"{where}, entropies of row {b}"
            rows += 1
            if margins[b] < 1e-5 + 4 * slack:
                undecided += 1
                continue
            assert_same(actual.tokens[b], expected.tokens[b], f"{where}, children of row {b}")
            assert_same(actual.frontier[b], expected.frontier[b], f"{where}, frontier of row {b}")
    assert undecided <= 0.1 * rows


@pytest.mark.backends("simt", "cuda")
def test_the_kernel_chooses_the_children_that_the_cpu_chooses(backend: Any, num_cases: int) -> None:
    """Coupled logits are spelled out, so that they are the same bits everywhere; only sums have another order."""
    for seed in range(num_cases // 3):
        logits, scores, branching, coupling, _ = coupled_case(seed)
        actual = backend.expand_frontier(logits, scores, branching, *coupling, None)
        expected = native.load().expand_frontier(logits, scores, branching, *coupling, None)
        assert_same(actual[0], expected[0], f"seed {seed}, {list(logits.shape)}, {coupling}")


# ---- a draft vocabulary


def small_ids(case: Case) -> bool:
    """The reference computes the noise of all tokens up to the last one."""
    return case.token_ids is not None and int(case.token_ids[-1]) < 100_000


def test_children_in_a_draft_vocabulary_equal_the_reference(num_cases: int) -> None:
    assert_equals_the_reference([*filter(small_ids, map(draft_vocabulary_case, range(num_cases // 3)))])


@pytest.mark.backends("simt", "cuda")
def test_the_kernel_chooses_the_tokens_of_a_draft_vocabulary_that_the_cpu_chooses(backend: Any, num_cases: int) -> None:
    for seed in range(num_cases // 3):
        logits, scores, branching, coupling, ids = draft_vocabulary_case(seed)
        given = (logits, scores, branching, *(coupling or [None] * 5), ids)
        actual, expected = backend.expand_frontier(*given), native.load().expand_frontier(*given)
        assert_same(actual[0], expected[0], f"seed {seed}, {list(logits.shape)}, {coupling}")


def test_a_draft_vocabulary_drafts_as_if_all_other_tokens_were_impossible(num_cases: int) -> None:
    """The tokens, their noise and their scores are those of a full row that is -inf outside the draft vocabulary."""
    for seed in range(num_cases // 3):
        case = draft_vocabulary_case(seed)
        if not small_ids(case) or case.logits.shape[-1] > 5_000:
            continue
        ids = case.token_ids
        full = case.logits.new_full(
            (*case.logits.shape[:2], int(ids[-1]) + random.Random(seed).randint(1, 90)), -math.inf
        )
        full[..., ids] = case.logits
        actual = ops.expand_frontier(*case)
        expected = ops.expand_frontier(full, *case[1:4])
        is_child = actual.scores > -math.inf
        where = f"seed {seed}, {list(case.logits.shape)} of {full.shape[-1]}"
        assert_same(is_child, expected.scores > -math.inf, where)
        assert_same(actual.tokens[is_child], expected.tokens[is_child], f"{where}, tokens")
        torch.testing.assert_close(actual.scores, expected.scores, atol=1e-5, rtol=1e-6, msg=where)


# ---- rows that are not coupled


def test_rows_of_temperature_0_are_as_if_nothing_were_coupled(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        logits, scores, branching, coupling, _ = coupled_case(seed, batch_size=3)
        greedy = torch.arange(len(logits)) % 2 == seed % 2
        coupling = coupling._replace(temperature=coupling.temperature.clamp(min=0.3).masked_fill(greedy, 0.0))
        mixed = ops.expand_frontier(logits, scores, branching, coupling)
        for actual, expected in zip(mixed, ops.expand_frontier(logits, scores, branching), strict=True):
            assert_same(actual[greedy], expected[greedy], f"seed {seed}")


def test_without_noise_and_scale_a_coupling_changes_no_child(num_cases: int) -> None:
    for seed in range(num_cases // 6):
        logits, scores, branching, *_ = coupled_case(seed)
        coupling = coupling_of(*[(seed, 3, 1.0, 1.0, 0.0)] * len(logits))
        for actual, expected in zip(
            ops.expand_frontier(logits, scores, branching, coupling),
            ops.expand_frontier(logits, scores, branching),
            strict=True,
        ):
            assert_same(actual, expected, f"seed {seed}")


# ---- what a tree needs


def test_no_child_outscores_its_parent_and_children_come_best_first(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        case = coupled_case(seed)
        expanded = ops.expand_frontier(*case)
        assert (expanded.scores <= case.scores[..., None]).all(), f"seed {seed}"
        assert (expanded.scores[..., 1:] <= expanded.scores[..., :-1]).all(), f"seed {seed}"
        assert (expanded.entropies >= 0).all(), f"seed {seed}"
        assert (expanded.entropies <= math.log(case.logits.shape[-1]) + 1e-5).all(), f"seed {seed}"


def test_a_coupled_row_does_not_depend_on_its_neighbours(num_cases: int) -> None:
    """Alone, and in a batch whose other rows have other noise, temperatures and logits."""
    for seed in range(num_cases // 6):
        logits, scores, branching, coupling, _ = coupled_case(seed, batch_size=3)
        whole = ops.expand_frontier(logits, scores, branching, coupling)
        for b in range(len(logits)):
            one = slice(b, b + 1)
            alone = Coupling(*(column[one] for column in coupling))
            for actual, expected in zip(
                ops.expand_frontier(logits[one].contiguous(), scores[one], branching, alone), whole, strict=True
            ):
                assert_same(actual, expected[one], f"seed {seed}, row {b}")


@pytest.mark.backends("cpu")
def test_threads_do_not_change_a_bit_of_a_coupled_row() -> None:
    case = coupled_case(3, vocabulary=5_001)
    one = ops.expand_frontier(*case)
    torch.set_num_threads(2)
    for actual, expected in zip(ops.expand_frontier(*case), one, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_what_a_filter_has_cut_is_never_a_child(dtype: torch.dtype) -> None:
    """A request's filters act as -inf in the logits; no noise and no scale brings such a token back."""
    logits = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    is_kept = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.01
    is_kept[..., 17] = True
    logits = logits.masked_fill(~is_kept, -math.inf)
    for temperature in (1e-3, 1.0, 100.0):
        expanded = ops.expand_frontier(
            logits, torch.zeros(2, 3), 12, coupling_of(*[(5, 9, temperature, 1.0, 30.0)] * 2)
        )
        is_child = expanded.scores > -math.inf
        assert torch.equal(is_child.sum(-1), is_kept.sum(-1).clamp(max=12))
        assert torch.equal(is_kept.gather(-1, expanded.tokens), is_child)
        assert expanded.entropies.isfinite().all()


@pytest.mark.parametrize(
    "numbers", [(1.0, 1.0, 1.0), (1e-38, 1e30, 0.0), (1e-38, 1e30, 3e38), (1e30, 1e-38, 1.0), (1e30, 1e-38, 3e38)]
)
def test_infinite_logits_stay_infinite_whatever_the_coefficients(numbers: tuple[float, float, float]) -> None:
    """No product of 0 and infinity, no difference of infinities: alpha / T from 0 to infinity, beta to the end."""
    logits = torch.zeros(1, 5, 40)
    logits[0, 0, 3:] = -math.inf
    logits[0, 1, 3:] = math.nan
    for node, fill in ((2, -math.inf), (3, math.nan)):
        logits[0, node] = fill
    logits[0, 4, 7] = math.inf
    expanded = ops.expand_frontier(logits, torch.zeros(1, 5), 5, coupling_of((1, 2, *numbers)))
    assert expanded.tokens[0, :2, :3].sort(-1).values.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(expanded.scores[0, :2, :3].exp().sum(-1), torch.ones(2))
    assert (expanded.scores[0, :2, 3:] == -math.inf).all()
    assert (expanded.scores[0, 2:] == -math.inf).all() and (expanded.entropies[0, 2:] == 0).all()
    assert not any(field.isnan().any() for field in expanded)


# ---- the target's own draw


def drawn(logits: Tensor, coupling: Coupling) -> Tensor:
    """int64 [B]: what the target draws from logits [B, 1, V]."""
    zero = torch.zeros(len(logits), 1, dtype=torch.int64)
    roots = DraftTree(zero, zero - 1, zero.float(), zero[:, 0] + 1)
    one, off = torch.ones(len(logits)), torch.zeros(len(logits), dtype=torch.int64)
    seeds, positions, temperature, _, _ = coupling
    return ops.verify_tree(logits, roots, temperature, off, one, one * 0, seeds, positions).bonus_tokens


def test_a_drafter_that_knows_the_target_ranks_first_the_token_that_the_target_draws(num_cases: int) -> None:
    """x = the target's logits, alpha = beta = 1: the rule by which the target draws, in float32."""
    surprises = 0
    for seed in range(num_cases // 3):
        rng = random.Random(seed)
        vocabulary = rng.randint(2, 5_000)
        logits = torch.randn(2, 1, vocabulary, generator=torch.Generator().manual_seed(seed)) * rng.choice([0.5, 2, 6])
        logits = logits.to(rng.choice(LOGIT_DTYPES))
        sampling = [(seed - 1, 2**33 + seed, rng.choice([0.0, 0.3, 0.7, 1.0, 1.5]), 1.0, 1.0) for _ in range(2)]
        coupling = coupling_of(*sampling)
        first = ops.expand_frontier(logits, torch.zeros(2, 1), 1, coupling).tokens[:, 0, 0]
        expected = drawn(logits, coupling)
        for b, (one, position, temperature, _, _) in enumerate(sampling):
            filters = reference.Filters(float(coupling.temperature[b]))
            margin = reference.draw_margin(logits[b, 0], filters, one, position)
            if margin > 2e-5 / (temperature or 1):
                assert first[b] == expected[b], f"seed {seed}, row {b}"
                surprises += bool(expected[b] != logits[b, 0].argmax())
    assert surprises > num_cases / 9, "draws that are not the likeliest token"
