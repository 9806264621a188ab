"""Sampling: the parameters, the noise, the filters, and single draws at their limits.

Bug checklist items are named in the docstrings ("checklist: ...").
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from test_tree_verification import draws
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from tree_cases import LOGIT_DTYPES

from taps_ext import reference
from taps_ext.reference import Filters
from taps_ext.sampling import SamplingParams, row_seed

# ---- parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", [1.0, -1.0]),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("min_p", 2.0),
        ("min_p", [0.1, math.nan]),
        ("seed", 0.5),
        ("seed", 2**63),
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: object) -> None:
    """Checklist: top_k <= 0, top_p out of 0..1, non-finite temperature."""
    with pytest.raises(ValueError, match=f"^{name} must be "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_an_int_seed_is_mixed_with_the_row_and_other_values_repeat() -> None:
    rows = SamplingParams(temperature=0.7, top_k=5, seed=41).rows(3)
    assert rows.seeds.tolist() == [row_seed(41, b) for b in range(3)] and rows.top_k.tolist() == [5, 5, 5]
    assert torch.equal(rows.temperature, torch.full((3,), 0.7)) and rows.top_p.tolist() == [1, 1, 1]


def test_a_value_a_row_is_taken_as_it_is() -> None:
    rows = SamplingParams(temperature=[0.0, 1.0], seed=[7, 7]).rows(2)
    assert rows.temperature.tolist() == [0.0, 1.0] and rows.seeds.tolist() == [7, 7]
    with pytest.raises(ValueError, match="temperature has 2 values for a batch of 3"):
        SamplingParams(temperature=[0.0, 1.0]).rows(3)


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
    ],
)
def test_rows_behind_the_first_have_the_outputs_of_splitmix64(seed: int, outputs: list[int]) -> None:
    """The published first outputs of the generator."""
    assert [row_seed(seed, b) % 2**64 for b in range(1, 5)] == outputs
    assert row_seed(seed, 0) == seed and row_seed(7, 1) == 7191089600892374487  # the docstring's example


@pytest.mark.parametrize("first", [-200, 0, 10**9, 2**62, -(2**63), 2**63 - 400])
def test_batches_of_consecutive_seeds_share_no_row_seed(first: int) -> None:
    num_seeds, num_rows = 400, 128
    batches = [SamplingParams(seed=first + i).rows(num_rows).seeds for i in range(num_seeds)]
    assert [int(seeds[0]) for seeds in batches] == list(range(first, first + num_seeds))
    assert len(torch.cat(batches).unique()) == num_seeds * num_rows


@pytest.mark.parametrize(
    ("seed", "row", "sentence"),
    [
        (2**63, 0, "seed must be a 64-bit integer, got 9223372036854775808"),
        ([1, 2], 0, r"seed must be a 64-bit integer, got \[1, 2\]"),
        (0.5, 0, "seed must be a 64-bit integer, got 0.5"),
        (0, -1, "row must be an integer of at least 0, got -1"),
        (0, 1.0, "row must be an integer of at least 0, got 1.0"),
    ],
)
def test_seeds_and_rows_that_cannot_be_are_named(seed: Any, row: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        row_seed(seed, row)


# ---- noise


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_the_generator_is_philox_4x32_7(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known answers of its authors' library, Random123."""
    assert [int(word) for word in reference.philox4x32(counter, key)] == words


def test_the_noise_is_standard_gumbel() -> None:
    noise = torch.cat([reference.gumbel_noise(seed, 3, 50_000) for seed in range(4)])
    assert abs(float(noise.mean()) - 0.5772157) < 0.015
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    assert noise.isfinite().all()


def test_every_input_bit_changes_every_output_bit_half_of_the_time() -> None:
    """So at seven rounds, over counters and keys as close as those of neighbouring tokens, positions and seeds."""
    size = 4096
    tokens, ones = torch.arange(size), torch.ones(size, dtype=torch.int64)
    inputs = [tokens, 0 * ones, tokens % 61, 0 * ones, tokens % 7, 0 * ones]
    words = torch.stack(reference.philox4x32(inputs[:4], inputs[4:]))
    for place, bit in itertools.product((0, 2, 3, 4, 5), range(32)):  # the counter's second word is always 0
        changed = [word ^ (1 << bit) * ones if i == place else word for i, word in enumerate(inputs)]
        flipped = words ^ torch.stack(reference.philox4x32(changed[:4], changed[4:]))
        rates = torch.stack([(flipped >> i & 1).double().mean(-1) for i in range(32)])
        assert float((rates - 0.5).abs().max()) < 6 * 0.5 / size**0.5, (place, bit)


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 2, 2**32 - 1])
def test_no_word_gives_infinite_noise(word: int) -> None:
    """Checklist: coin 0 and 1 - 2^-24 (in float32, -log(-log(u)) is +inf: a random token every 300)."""
    u = (word + 0.5) * 2.0**-32
    assert -3.15 < -math.log(-math.log1p(-u)) < 22.89


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 5), (2, 5)), ((1, 5), (1 + 2**32, 5)), ((1, 5), (1, 6)), ((1, 5), (1, 5 + 2**32)), ((-1, 5), (2**32 - 1, 5))],
)
def test_every_bit_of_seed_and_position_counts(one: tuple[int, int], other: tuple[int, int]) -> None:
    logits = torch.zeros(1, 10_000)
    assert draws(logits, Filters(), *one) != draws(logits, Filters(), *other)
    assert draws(logits, Filters(), *one) == [int(reference.gumbel_noise(*one, 10_000).argmax())]


@pytest.mark.usefixtures("backend")
def test_tokens_that_cannot_be_drawn_change_nothing_for_the_others() -> None:
    """Checklist: padded vocabulary (V_pad > V), V not a multiple of 8."""
    for vocabulary in range(2, 40):
        logits = torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
        expected = draws(logits, Filters(top_p=0.9))
        for padding in (1, 2, 3, 5, 8, 64):
            padded = torch.nn.functional.pad(logits, (0, padding), value=-math.inf)
            assert draws(padded, Filters(top_p=0.9)) == expected, (vocabulary, padding)


# ---- filters


def warped(logits: Tensor, filters: Filters) -> Tensor:
    """bool: what transformers' own warpers keep, in the order in which `generate` applies them."""
    no_ids = torch.empty(len(logits), 0, dtype=torch.int64)
    scores = TemperatureLogitsWarper(filters.temperature)(no_ids, logits) if filters.temperature != 1 else logits
    if filters.top_k:
        scores = TopKLogitsWarper(filters.top_k)(no_ids, scores)
    if filters.top_p < 1:
        scores = TopPLogitsWarper(filters.top_p)(no_ids, scores)
    if filters.min_p > 0:
        scores = MinPLogitsWarper(filters.min_p)(no_ids, scores)
    return scores > -math.inf


def random_filters(rng: random.Random) -> Filters:
    return Filters(
        rng.choice([0.5, 1.0, 2.0]),
        rng.choice([0, 1, 3, 10, 1_000]),
        rng.choice([1.0, 0.95, 0.7, 0.3, 0.01]),
        rng.choice([0.0, 0.01, 0.2, 0.9]),
    )


def test_the_filters_keep_what_transformers_keeps(num_cases: int) -> None:
    """On logits without ties (and no cut within rounding of them), in float64."""
    for seed in range(num_cases // 3):
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(4, rng.randint(2, 300), generator=generator, dtype=torch.float64) * rng.choice([1.0, 4.0])
        filters = random_filters(rng)
        expected = warped(logits, filters)
        for b in range(4):
            kept = reference.kept_tokens(logits[b], filters)
            assert torch.equal(kept, expected[b]), f"seed {seed}, {filters}"


@pytest.mark.usefixtures("backend")
@pytest.mark.backends("cpu", "cuda")  # statistics: many thousands of rows
@pytest.mark.parametrize(
    "filters",
    [
        Filters(top_k=4),
        Filters(top_p=0.8),
        Filters(min_p=0.1),
        Filters(temperature=2.0, top_k=6, top_p=0.9, min_p=0.2),
        Filters(temperature=0.5, top_k=5, top_p=0.7),
    ],
)
def test_draws_reach_every_kept_token_and_no_other(filters: Filters) -> None:
    """Checklist: top-k then top-p against the joint order (SGLang #36173): 20,000 draws show the kept set."""
    logits = torch.tensor([2.0, 1.5, 1.1, 0.4, 0.9, -0.3, 1.3, -1.0, 0.1, -4.0])
    kept = warped(logits.double()[None], filters)[0]
    assert sorted(set(draws(logits.expand(20_000, 10), filters))) == kept.nonzero().flatten().tolist()


@pytest.mark.usefixtures("backend")
def test_equal_tokens_share_their_fate_at_every_cut() -> None:
    """Checklist: ties at the cut. (In transformers top-k keeps ties; a sort decides which of them survive top-p.)"""
    logits = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, -2.0]).expand(500, 6)
    assert set(draws(logits, Filters(top_k=1))) == {1, 3}
    assert set(draws(logits, Filters(top_k=3))) == {0, 1, 2, 3, 4}
    assert set(draws(logits, Filters(top_p=0.1))) == {1, 3}
    assert set(draws(logits, Filters(top_p=0.9))) == {0, 1, 2, 3, 4}  # the threes hold 0.83
    assert set(draws(logits, Filters(min_p=1.0))) == {1, 3}


# ---- limits

OFF = [Filters(), Filters(top_k=50_000), Filters(top_k=2**30), Filters(top_k=300), Filters(top_p=1.0, min_p=0.0)]
GREEDY = [
    Filters(temperature=0.0),
    Filters(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9),
    Filters(temperature=1e-6),
    Filters(temperature=1e-45),
    Filters(top_k=1),
    Filters(top_p=0.0),
    Filters(top_p=1e-30),
    Filters(min_p=1.0),
]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("filters", OFF)
def test_filters_that_are_off_are_off(filters: Filters) -> None:
    """Checklist: top_k 0, > V, 2^30; top_p 1."""
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    assert draws(logits, filters) == draws(logits)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
@pytest.mark.parametrize("filters", GREEDY)
def test_the_extremes_of_every_filter_are_greedy(filters: Filters, dtype: torch.dtype) -> None:
    """Checklist: T = 0 and 1e-6; top_p 0 and tiny; top_k 1."""
    logits = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(b)) for b in range(50)]).to(dtype)
    logits = logits[:, :256] / 16
    best = logits.float().amax(-1, keepdim=True)
    unique = ((logits.float() == best).sum(-1) == 1).nonzero().flatten()
    assert len(unique) > 20
    expected = logits.float().argmax(-1)[unique].tolist()
    drawn = draws(logits, filters)
    assert [drawn[b] for b in unique] == expected


@pytest.mark.usefixtures("backend")
def test_greedy_ties_go_to_the_lowest_token() -> None:
    """Checklist: exact ties, -0.0 against 0.0."""
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0], [0.0, -0.0, 0.0, -5.0], [7.0, 7.0, 7.0, 7.0]])
    assert draws(logits, Filters(temperature=0.0)) == [1, 0, 0]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e30])
def test_logits_at_the_ends_of_float32_work(temperature: float) -> None:
    """Checklist: overflow of x - max."""
    largest = float(torch.finfo(torch.float32).max)
    logits = torch.tensor([[-largest, largest, -largest, 0.0]])
    assert draws(logits, Filters(temperature)) == [
        reference.draw_token(logits[0], Filters(float(torch.tensor(temperature))), 0, 0)
    ]
    assert draws(logits, Filters(1.0)) == [1]


@pytest.mark.usefixtures("backend")
def test_a_single_finite_token_is_drawn() -> None:
    for token in (0, 7, 99):
        logits = torch.full((20, 100), -math.inf)
        logits[:, token] = -3.0
        for filters in (*OFF, *GREEDY):
            assert set(draws(logits, filters)) == {token}


@pytest.mark.usefixtures("backend")
@pytest.mark.backends("cpu", "cuda")  # statistics: many thousands of rows
def test_a_high_temperature_is_uniform() -> None:
    logits = torch.arange(8.0).expand(16_000, 8)
    counts = torch.tensor(draws(logits, Filters(temperature=1e6))).bincount(minlength=8)
    assert (counts - 2_000).abs().max() < 5 * 2_000**0.5


@pytest.mark.usefixtures("backend")
@pytest.mark.backends("cpu", "cuda")  # statistics: many thousands of rows
def test_minus_infinity_is_never_drawn() -> None:
    """Checklist: coin 0 accepts a token of probability zero (SGLang #35771)."""
    logits = torch.zeros(20_000, 5)
    logits[:, [0, 4]] = -math.inf
    for filters in (Filters(), Filters(temperature=1e30), Filters(top_k=4), Filters(top_p=0.9999999)):
        assert set(draws(logits, filters)) == {1, 2, 3}
