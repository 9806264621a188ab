"""The proofs of losslessness: the text is the target's own, whatever drafts.

Drafters that accept make them worth something: `test_the_proofs_are_not_hollow` asserts that they do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from small_models import CALIBRATIONS, FAMILIES, PAD, new_target, prompts, trained_drafters, trained_target
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import taps_ext as taps
from taps_ext.checkpoints.corpus import write_store
from taps_ext.composition import COMPOSITIONS
from taps_ext.decode import step as device_half
from taps_ext.decode.budget import CostTable
from taps_ext.decode.state import Acceptance
from taps_ext.decode.step import verify
from taps_ext.drafters import DraftVocabulary
from taps_ext.drafters.eagle import EagleConfig, EagleDrafter, EagleNetwork
from taps_ext.target.kv_cache import FIRST_CAPACITY

pytestmark = pytest.mark.filterwarnings("error:not calibrated")
SHAPE = taps.TreeShape(depth=4, branching=4, max_nodes=16)
SAMPLINGS = {  # of a batch of mixed temperatures
    name: taps.SamplingParams(temperature=[0.0, 0.3, 0.7, 1.0, 1.5], seed=11, **filters)
    for name, filters in {
        "unfiltered": {},
        "top_k": {"top_k": 3},
        "top_p": {"top_p": 0.8},
        "min_p": {"min_p": 0.1},
        "all": {"top_k": 12, "top_p": 0.9, "min_p": 0.05},
        "by row": {"top_k": [0, 0, 0, 2, 0], "top_p": [1.0, 1.0, 0.6, 1.0, 1.0], "min_p": [0.0, 0.0, 0.0, 0.0, 0.2]},
    }.items()
}
BY_EVIDENCE = {"composition": "merged", "evidence_decay": 0.95}
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"composition": name} for name in COMPOSITIONS},
    "merged, 9 nodes": {"max_nodes": 9, "evidence_decay": 0},
    "merged by evidence": BY_EVIDENCE,
    "merged by evidence, 4 nodes": {**BY_EVIDENCE, "max_nodes": 4},
    "merged by evidence, 9 nodes": {**BY_EVIDENCE, "max_nodes": 9},
    "joint budget": {"joint_budget": 27},
    "min_score": {"shape": replace(SHAPE, min_score=-2.5)},
    "evidence, all limits": {"composition": "evidence", "joint_budget": 19, "shape": replace(SHAPE, min_score=-3.5)},
    "merged, extended": {"extend": True},
    "evidence, all limits, extended": {
        "composition": "evidence",
        "joint_budget": 19,
        "shape": replace(SHAPE, min_score=-3.5),
        "extend": True,
    },
    "merged, one uncalibrated": {**BY_EVIDENCE, "uncalibrated": "chat"},
    "evidence, one uncalibrated": {"composition": "evidence", "uncalibrated": "math"},
    "look-ups": {"composition": "single", "lookup": True},
    "confidence, look-ups": {"composition": "confidence", "lookup": True},
    "evidence, look-ups": {"composition": "evidence", "lookup": True},
    "merged by evidence, look-ups, 9 nodes": {**BY_EVIDENCE, "max_nodes": 9, "lookup": True},
    "look-ups in a store": {"composition": "single", "lookup": True, "store": True},
    "evidence, look-ups in a store": {"composition": "evidence", "lookup": True, "store": True},
    "merged, look-ups in a store, 9 nodes": {"max_nodes": 9, "lookup": True, "store": True},
    "merged, extended from a store": {"extend": True, "store": True},
    "evidence, all limits, extended from a store": {
        "composition": "evidence",
        "joint_budget": 19,
        "shape": replace(SHAPE, min_score=-3.5),
        "extend": True,
        "lookup": True,
        "store": True,
    },
}
# Every way under every filter, and once without a look at the noise.
GRID = [(way, name, "coupled") for way in WAYS for name in SAMPLINGS]
GRID += [(way, name, "topk") for way, name in zip(WAYS, itertools.cycle(SAMPLINGS), strict=False)]


@cache
def store_of_texts() -> taps.CorpusStore:
    """Sampled texts of the target: a look-up finds right and wrong continuations in them."""
    ids, _ = prompts(5)
    texts = [
        taps.plain_generate(
            trained_target(), ids, sampling=taps.SamplingParams(t, seed=11), max_new_tokens=32
        ).sequences
        for t in (0.0, 0.7, 1.0)
    ]
    with TemporaryDirectory() as folder:  # what is open stays
        write_store(folder, torch.cat(texts).tolist(), trained_target().config.vocab_size, "")
        return taps.CorpusStore(folder)


def make_decoder(
    family: str = "llama",
    composition: str = "merged",
    uncalibrated: str = "",
    lookup: bool = False,
    store: bool = False,
    **kwargs: object,
) -> taps.SpeculativeDecoder:
    """With `store`, look-ups and the extension read one."""
    drafters: dict[str, taps.Drafter] = dict(trained_drafters(family))
    opened = store_of_texts() if store else None
    if lookup:
        drafters["lookup"] = taps.LookupDrafter(trained_target(family).config.vocab_size, store=opened)
    if "extend" in kwargs:
        kwargs["store"] = opened
    drafter = ("lookup" if lookup else "math") if composition == "single" else None
    if uncalibrated:
        one = drafters[uncalibrated]
        drafters[uncalibrated] = EagleDrafter(one.network, one.embedding, one.lm_head, uncalibrated)
    return taps.SpeculativeDecoder(
        trained_target(family), drafters, composition, drafter=drafter, **{"shape": SHAPE, **kwargs}
    )


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize(("family", "lookup"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_greedy_text_is_that_of_stock_generate(family: str, lookup: bool, composition: str, batch_size: int) -> None:
    ids, mask = prompts(batch_size)
    stock = trained_target(family).generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40)
    result = make_decoder(family, composition, lookup=lookup).generate(ids, mask, max_new_tokens=40)
    assert torch.equal(result.sequences, stock)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("store", [False, True])
def test_greedy_text_with_extended_trees_is_that_of_stock_generate(
    store: bool, composition: str, batch_size: int
) -> None:
    ids, mask = prompts(batch_size)
    stock = trained_target().generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=80, eos_token_id=None)
    decoder = make_decoder(composition=composition, extend=True, lookup=store, store=store)
    result = decoder.generate(ids, mask, max_new_tokens=80, eos_token_id=())
    assert torch.equal(result.sequences, stock)


@cache
def plain_text(name: str) -> taps.PlainResult:
    """What plain sampling gives for `prompts(5)`."""
    return taps.plain_generate(trained_target(), *prompts(5), sampling=SAMPLINGS[name], max_new_tokens=32)


@pytest.mark.parametrize(("way", "name", "drafting"), GRID, ids=map(", ".join, GRID))
def test_sampled_text_is_that_of_plain_sampling_with_the_same_noise(way: str, name: str, drafting: str) -> None:
    decoder = make_decoder(**WAYS[way], drafting=drafting)
    warns = drafting == "coupled" and "uncalibrated" in WAYS[way]
    with pytest.warns(UserWarning, match="not calibrated") if warns else nullcontext():
        result = decoder.generate(*prompts(5), sampling=SAMPLINGS[name], max_new_tokens=32)
    assert torch.equal(result.sequences, plain_text(name).sequences)
    assert result.finish_reasons == plain_text(name).finish_reasons


@pytest.mark.parametrize(
    "sampling", [taps.SamplingParams(1.0, seed=11), taps.SamplingParams(0.7, 12, 0.9, 0.05, seed=11)], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_is_plain_samplings_whatever_the_tree(family: str, sampling: taps.SamplingParams) -> None:
    ids, mask = prompts(3)
    plain = taps.plain_generate(trained_target(family), ids, mask, sampling=sampling, max_new_tokens=24).sequences
    shapes = [taps.TreeShape(1, 1, 2), taps.TreeShape(3, 2, 8), taps.TreeShape(6, 5, 40)]
    texts = [
        make_decoder(family, shape=shape).generate(ids, mask, sampling=sampling, max_new_tokens=24).sequences
        for shape in shapes
    ]
    texts.append(make_decoder(family, max_nodes=9).generate(ids, mask, sampling=sampling, max_new_tokens=24).sequences)
    assert all(torch.equal(text, plain) for text in texts)


@pytest.mark.parametrize(
    ("temperature", "way"),
    [
        *((0.0, "merged"), (1.0, "merged"), (1.0, "evidence"), (1.0, "merged by evidence, 9 nodes")),
        *((0.0, "look-ups"), (1.0, "look-ups"), (1.0, "merged by evidence, look-ups, 9 nodes")),
        *((0.0, "merged, extended from a store"), (1.0, "merged, look-ups in a store, 9 nodes")),
    ],
)
def test_a_rows_text_does_not_depend_on_its_neighbours(temperature: float, way: str) -> None:
    """Neither do its trees: as much of them is accepted."""
    ids, mask = prompts(5)
    decoder = make_decoder(**WAYS[way])
    together = decoder.generate(ids, mask, sampling=taps.SamplingParams(temperature, seed=3), max_new_tokens=30)
    for row in range(5):
        alone = decoder.generate(
            ids[row : row + 1],
            mask[row : row + 1],
            sampling=taps.SamplingParams(temperature, seed=taps.row_seed(3, row)),
            max_new_tokens=30,
        )
        assert alone.new_tokens[0] == together.new_tokens[row]
        assert alone.stats.num_accepted[0] == together.stats.num_accepted[row]


def test_rows_with_their_own_parameters_equal_single_runs() -> None:
    ids, mask = prompts(4)
    sampling = taps.SamplingParams([0.0, 0.7, 1.0, 1.0], [0, 8, 0, 5], [1.0, 1.0, 0.8, 1.0], 0.0, [1, 2, 3, 4])
    lengths = [7, 21, 13, 30]
    decoder = make_decoder()
    together = decoder.generate(ids, mask, sampling=sampling, max_new_tokens=lengths, eos_token_id=())
    assert [len(tokens) for tokens in together.new_tokens] == lengths
    for row, (t, k, p, seed) in enumerate(
        zip(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, strict=True)
    ):
        alone = decoder.generate(
            ids[row : row + 1],
            mask[row : row + 1],
            sampling=taps.SamplingParams(t, k, p, seed=seed),
            max_new_tokens=lengths[row],
            eos_token_id=(),
        )
        assert alone.new_tokens[0] == together.new_tokens[row]


def test_two_threads_on_one_decoder_give_the_texts_of_two_runs_in_sequence() -> None:
    decoder = make_decoder()
    jobs = [(prompts(2, seed=seed), taps.SamplingParams(temperature=1.0, seed=seed)) for seed in range(6)]

    def run(job: tuple[tuple[Tensor, Tensor], taps.SamplingParams]) -> Tensor:
        (ids, mask), sampling = job
        return decoder.generate(ids, mask, sampling=sampling, max_new_tokens=24).sequences

    in_sequence = [run(job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(run, jobs))
    assert all(torch.equal(a, b) for a, b in zip(in_sequence, at_once, strict=True))


def test_a_prompt_longer_than_the_first_cache_and_a_cache_that_grows() -> None:
    long_ids, _ = prompts(2, longest=FIRST_CAPACITY + 70)
    short_ids = torch.cat([torch.full_like(long_ids[:, :-9], PAD), long_ids[:, -9:]], dim=1)
    ids = torch.cat([long_ids, short_ids])
    mask = (ids != PAD).long()
    target = trained_target()
    stock = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=60, eos_token_id=None)
    result = make_decoder().generate(ids, mask, max_new_tokens=60, eos_token_id=())
    assert torch.equal(result.sequences, stock)
    grown = make_decoder().generate(ids[:, -9:], max_new_tokens=FIRST_CAPACITY + 40, eos_token_id=())
    plain = taps.plain_generate(target, ids[:, -9:], max_new_tokens=FIRST_CAPACITY + 40, eos_token_id=())
    assert torch.equal(grown.sequences, plain.sequences)


def test_the_proofs_are_not_hollow() -> None:
    """At least a fifth of the steps accept two tokens or more, and kept paths leave gaps in the tree."""
    gaps = 0
    ids, mask = prompts(6)

    def spy(*arguments: Any) -> Acceptance:
        nonlocal gaps
        acceptance = verify(*arguments)
        kept = [[n for n in path if n >= 0] for path in acceptance.path.tolist()]
        gaps += sum(path != list(range(len(path))) for path in kept)
        return acceptance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_half, "verify", spy)
        for temperature, composition in itertools.product((0.0, 1.0), ("confidence", "evidence", "merged")):
            sampling = taps.SamplingParams(temperature, seed=1)
            stats = (
                make_decoder(composition=composition).generate(ids, mask, sampling=sampling, max_new_tokens=40).stats
            )
            counts = [count for row in stats.num_accepted for count in row]
            assert sum(count >= 2 for count in counts) >= len(counts) / 5
            assert min(counts) < SHAPE.depth
    assert gaps > 20


def test_neither_are_those_with_a_store() -> None:
    """What it holds is accepted, and rejected, and reaches deeper than drafters do."""
    for way in ("look-ups in a store", "merged, extended from a store"):
        stats = make_decoder(**WAYS[way]).generate(*prompts(5), sampling=SAMPLINGS["unfiltered"]).stats
        counts = [count for row in stats.num_accepted for count in row]
        assert sum(count >= 2 for count in counts) >= len(counts) / 5 and min(counts) == 0
        least = stats.proposer_share["lookup" if "look-ups" in way else "extension"]
        assert least > 0.3


def acceptance_length(way: str, **kwargs: Any) -> float:
    decoder = make_decoder(**WAYS[way], **kwargs)
    runs = [
        decoder.generate(*prompts(8), sampling=taps.SamplingParams(1.0, seed=s), max_new_tokens=60, eos_token_id=())
        for s in range(3)
    ]
    return taps.DecodeStats.joined([run.stats for run in runs]).acceptance_length


@pytest.mark.parametrize("way", ["confidence", "evidence", "merged by evidence, 9 nodes", "joint budget"])
def test_a_look_at_the_noise_accepts_more_at_temperature_1(way: str) -> None:
    """By a fifth or more: drafting that looks at the wrong noise gives the same text, and accepts less than without.

    A joint budget gains least: over 28 single seeds 19%, with a standard deviation of 4%.
    """
    assert acceptance_length(way) > 1.1 * acceptance_length(way, drafting="topk")


# ---- three tokens, frequencies

SMALL_VOCAB = 5
BATCH = 1_000  # the draws of one call
UNFILTERED, FILTERED = taps.SamplingParams(1.0), taps.SamplingParams(0.7, top_k=3, top_p=0.9)
SMALL_CASES: dict[str, tuple[dict[str, Any], taps.SamplingParams]] = {
    "merged, draft vocabularies": ({"draft_tokens": [0, 2, 3]}, UNFILTERED),
    "evidence, adapting": ({"composition": "evidence", "shape": taps.TreeShape.auto(max_nodes=4)}, UNFILTERED),
    "merged by evidence, 4 nodes": ({**BY_EVIDENCE, "max_nodes": 4}, UNFILTERED),
    "merged, extended from a store": ({"extend": True, "lookup": True, "store": True}, UNFILTERED),
    "joint budget, filtered": ({"joint_budget": 3 * BATCH}, FILTERED),
    "look-ups in a store": ({"composition": "single", "lookup": True, "store": True}, UNFILTERED),
}
Rule = Callable[[Tensor, taps.DraftTree, Any, Tensor], Acceptance]


def small_vocabulary_decoder(
    lookup: bool = False, store: bool = False, draft_tokens: Sequence[int] = (), **kwargs: Any
) -> taps.SpeculativeDecoder:
    """Two random drafters that look at the noise, over a target of five tokens."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    target = new_target(vocab_size=SMALL_VOCAB, pad_token_id=None, eos_token_id=None, **sizes).requires_grad_(False)
    for parameter in target.parameters():
        parameter *= 3.0  # a random model is flat: make its distribution worth drawing from
    target.get_output_embeddings().weight.mul_(4.0)
    config = EagleConfig.for_target(target.config)
    networks = [EagleNetwork(config).eval().requires_grad_(False) for _ in range(2)]
    vocabulary = DraftVocabulary(torch.tensor(draft_tokens), SMALL_VOCAB) if draft_tokens else None
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    drafters: dict[str, taps.Drafter] = {
        name: EagleDrafter(network, embedding, lm_head, name, CALIBRATIONS[name], vocabulary=vocabulary)
        for name, network in zip(CALIBRATIONS, networks, strict=True)
    }
    if lookup:
        drafters["lookup"] = taps.LookupDrafter(SMALL_VOCAB, store=small_store() if store else None)
    if "extend" in kwargs:
        kwargs["store"] = small_store()
    if "shape" in kwargs:  # nodes cost so little that most steps draft
        kwargs["costs"] = CostTable((1, 2, 4), (1.0, 1.02, 1.1), dict.fromkeys(drafters, (0.01, 0.01)), 2)
    drafter = "lookup" if kwargs.get("composition") == "single" else None
    return taps.SpeculativeDecoder(target, drafters, drafter=drafter, **{"shape": taps.TreeShape(2, 2, 4), **kwargs})


@cache
def small_store() -> taps.CorpusStore:
    """Every pair of tokens, each followed by several others."""
    with TemporaryDirectory() as folder:  # what is open stays
        triples = itertools.product(range(SMALL_VOCAB), repeat=3)
        texts = [[first, second, (first * second + last // 2) % SMALL_VOCAB] for first, second, last in triples]
        write_store(folder, texts, SMALL_VOCAB, "")
        return taps.CorpusStore(folder)


def expected_joint(decoder: taps.SpeculativeDecoder, prompt: Tensor, sampling: taps.SamplingParams) -> Tensor:
    """P(first three tokens), [V, V, V], by running the stock target and transformers' filters over every prefix."""
    joint = torch.zeros(SMALL_VOCAB, SMALL_VOCAB, SMALL_VOCAB)
    pairs = list(itertools.product(range(SMALL_VOCAB), repeat=2))
    ids = torch.cat([prompt.expand(len(pairs), -1), torch.tensor(pairs)], dim=1)
    logits = decoder.target.model(input_ids=ids).logits[:, -3:].flatten(0, 1)
    top_k = TopKLogitsWarper(sampling.top_k or SMALL_VOCAB)
    warpers = [TemperatureLogitsWarper(sampling.temperature), top_k, TopPLogitsWarper(sampling.top_p)]
    logits = LogitsProcessorList(warpers)(ids, logits)
    probabilities = logits.softmax(-1).unflatten(0, (len(pairs), 3))
    for row, (first, second) in enumerate(pairs):
        p = probabilities[row]
        joint[first, second] = p[0, first] * p[1, second] * p[2]
    return joint


def chi_square_excess(
    decoder: taps.SpeculativeDecoder, sampling: taps.SamplingParams = UNFILTERED, num_draws: int = 20_000
) -> float:
    """The chi-square of the first three tokens, in standard deviations above its mean."""
    prompt = torch.tensor([[1, 2, 0, 3]])
    expected = expected_joint(decoder, prompt, sampling).flatten() * num_draws
    observed = torch.zeros_like(expected)
    for start in range(0, num_draws, BATCH):
        result = decoder.generate(
            prompt.expand(BATCH, -1).contiguous(), sampling=replace(sampling, seed=start), max_new_tokens=3
        )
        a, b, c = torch.tensor(result.new_tokens).T
        observed += torch.bincount((a * SMALL_VOCAB + b) * SMALL_VOCAB + c, minlength=len(expected))
    common = expected >= 5
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None].clamp_min(1e-3)])
    degrees = len(expected) - 1
    return float((((observed - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize("case", SMALL_CASES)
@torch.inference_mode()
def test_the_joint_frequency_of_three_tokens_is_the_targets(case: str) -> None:
    way, sampling = SMALL_CASES[case]
    assert chi_square_excess(small_vocabulary_decoder(**way), sampling) < 4


def count_twice(logits: Tensor, tree: taps.DraftTree, sampling: Any, positions: Tensor) -> Acceptance:
    """A second draw for trees of which the first took nothing: every sibling counts twice."""
    first = verify(logits, tree, sampling, positions)
    second = verify(logits, tree, sampling, positions + 1_000_000)
    take = (first.num_accepted == 0) & (second.num_accepted > 0)
    pick = {name: (getattr(second, name), getattr(first, name)) for name in Acceptance.__dataclass_fields__}
    return Acceptance(
        **{name: torch.where(take if a.ndim == 1 else take[:, None], a, b) for name, (a, b) in pick.items()}
    )


def trust_the_drafter(logits: Tensor, tree: taps.DraftTree, sampling: Any, positions: Tensor) -> Acceptance:
    """The drafter saw the noise: its first child is taken for the draw where none carries it."""
    found = verify(logits, tree, sampling, positions)
    take = (found.num_accepted == 0) & (tree.num_nodes > 1)
    if not take.any():
        return found
    child = tree.tokens[:, 1]
    bonus = torch.where(
        take,
        verify(logits[:, 1:2], taps.DraftTree.of_roots(child), sampling, positions + 1).bonus_tokens,
        found.bonus_tokens,
    )
    path, tokens = found.path.clone(), found.tokens.clone()
    path[take, 1] = 1
    tokens[take, 0], tokens[take, 1] = child[take], bonus[take]
    return Acceptance(path, torch.where(take, 1, found.num_accepted), tokens, bonus, found.is_invalid)


def redraw_beside_the_candidates(logits: Tensor, tree: taps.DraftTree, sampling: Any, positions: Tensor) -> Acceptance:
    """EAGLE's way: where no child is accepted, a fresh draw from what is left of the distribution."""
    found = verify(logits, tree, sampling, positions)
    rows = torch.arange(len(logits))
    last = found.path[rows, found.num_accepted]
    is_child = (tree.parents == last[:, None]) & tree.is_node()
    left = logits[rows, last].clone()
    left[rows[:, None].expand_as(is_child)[is_child], tree.tokens[is_child]] = -torch.inf
    fresh = verify(
        left[:, None], taps.DraftTree.of_roots(tree.tokens[:, 0]), sampling, positions + found.num_accepted + 1_000_000
    )
    tokens = found.tokens.scatter(1, found.num_accepted[:, None], fresh.bonus_tokens[:, None])
    return Acceptance(found.path, found.num_accepted, tokens, fresh.bonus_tokens, found.is_invalid)


WRONG_RULES = (count_twice, trust_the_drafter, redraw_beside_the_candidates)
# What a look-up proposes tells less of the draw: a redraw beside it would show in more draws only.
NOTICED = [
    *itertools.product(WRONG_RULES, ["merged, draft vocabularies", "evidence, adapting", "joint budget, filtered"])
]
NOTICED += [(rule, "look-ups in a store") for rule in WRONG_RULES[:2]]


@pytest.mark.parametrize(("rule", "case"), NOTICED)
@torch.inference_mode()
def test_the_chi_square_notices_what_coupling_invites(rule: Rule, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_half, "verify", rule)
    way, sampling = SMALL_CASES[case]
    excess = chi_square_excess(small_vocabulary_decoder(**way), sampling, num_draws=6_000)
    assert excess > 6  # counted twice, filtered: 18 on average, with a standard deviation of 4


@torch.inference_mode()
def test_a_draw_beside_the_candidates_is_right_only_without_a_look_at_the_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why verification draws before it looks at the tree: a coupled drafter's candidates tell what was drawn."""
    monkeypatch.setattr(device_half, "verify", redraw_beside_the_candidates)
    assert chi_square_excess(small_vocabulary_decoder(drafting="topk"), num_draws=6_000) < 4


def look_elsewhere(logits: Tensor, tree: taps.DraftTree, sampling: Any, positions: Tensor) -> Acceptance:
    """The noise of the next position: right in frequency, and not the text of plain sampling."""
    return verify(logits, tree, sampling, positions + 1)


@pytest.mark.parametrize("rule", [trust_the_drafter, redraw_beside_the_candidates, look_elsewhere])
def test_equality_with_plain_sampling_notices_it_too(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain_text("unfiltered").sequences
    monkeypatch.setattr(device_half, "verify", rule)
    result = make_decoder().generate(*prompts(5), sampling=SAMPLINGS["unfiltered"], max_new_tokens=32)
    assert not torch.equal(result.sequences, expected)
