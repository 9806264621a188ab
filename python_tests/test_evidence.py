"""Running evidence: what each drafter said of the text so far, and that only the one it points to is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from literal_drafter import LoneDrafter, Text, Together, literal_layer, make_drafter
from literal_drafter import new_target as new_literal_target
from small_models import CALIBRATIONS, DOMAIN_TOKENS, PAD, prompts, sentences, trained_drafters, trained_target
from torch import Tensor
from transformers import LogitsProcessor

import taps_ext as taps
from taps_ext import ops
from taps_ext.composition import EVIDENCE_DECAY, make_composition
from taps_ext.decode.step import DecodeStep
from taps_ext.drafters import EagleConfig, EagleDrafter, EagleNetwork, evidence, growth
from taps_ext.drafters.growth import SharedEnds
from taps_ext.tree import TreeShape

SHAPE = TreeShape(depth=4, branching=4, max_nodes=16)


def discounted(log_q: Tensor, prompt_length: int, decay: float) -> float:
    """Of float64 log-probabilities [T], token by token, what evidence sums; `prompt_length` tokens were seen at first.

    The last one of these is the answer's first.
    """
    counted = {j: 1.0 if j >= prompt_length - 1 else evidence.PROMPT_WEIGHT for j in range(1, len(log_q))}
    counted = {j: weight for j, weight in counted.items() if j > prompt_length - evidence.MAX_SLOTS}
    return sum(weight * float(log_q[j]) * decay ** (len(log_q) - 1 - j) for j, weight in counted.items())


def told_of(output: Tensor, head: Tensor, next_tokens: Tensor) -> Tensor:
    """float64 [T]: what outputs [T, H] say of each next token [T]; of the first, that no slot predicts, nothing."""
    log_q = (output[:-1] @ head.double().T).log_softmax(-1)
    return torch.cat([torch.zeros(1), log_q.gather(1, next_tokens[1:, None])[:, 0]])


# ---- the sum


def drafters_of_all_kinds() -> list[EagleDrafter]:
    """Two alike, one of another cache shape between them, one that drafts alone."""
    target = new_literal_target()
    drafters = [make_drafter(target, seed) for seed in range(2)]
    drafters.insert(1, make_drafter(target, 7, num_key_value_heads=4))
    one = make_drafter(target, 8)
    return [*drafters, LoneDrafter(one.network, one.embedding, one.lm_head, "lone")]


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_evidence_is_the_discounted_log_probability_of_the_text(decay: float) -> None:
    """By full recomputation in float64, over prompts longer and shorter than what of a prompt counts."""
    drafters = drafters_of_all_kinds()
    grouped, text = Together(drafters), Text(new_literal_target(), 5, 130)
    states = grouped.reset(5, decay=decay)
    prompt_lengths = [100, 12, evidence.MAX_SLOTS + 1, 1, 4]
    # A row may end, and observe no more, and a row may begin after the others.
    for counts in ([*prompt_lengths[:4], 0], [1, 3, 0, 4, prompt_lengths[4]], [2, 0, 0, 1, 1], [0, 0, 5, 2, 3]):
        grouped.observe(states, *text.block(counts))
        found = grouped.evidence(states)
        assert found.shape == (4, 5) and found.dtype == torch.float32
        assert found[:, [length == 0 for length in text.fed]].eq(0).all()
        for (d, drafter), b in ((pair, b) for pair in enumerate(drafters) for b in range(5) if text.fed[b] > 0):
            tokens = text.tokens[b, 1 : text.fed[b] + 1]
            output = literal_layer(drafter, text.features[b, : text.fed[b]].double(), tokens)
            expected = discounted(told_of(output, drafter.lm_head.weight, tokens), prompt_lengths[b], decay)
            assert float(found[d, b]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_prompts_logits_are_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary those of 64 slots would be gigabytes."""
    drafters = drafters_of_all_kinds()[::2]

    def run() -> tuple[Tensor, list[Tensor], int]:
        grouped, text = Together(drafters), Text(new_literal_target(), 3, 110)
        states, sizes = grouped.reset(3, decay=0.9), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SharedEnds, "logits", noted(SharedEnds.logits, lambda self, out: sizes.append(out.numel())))
            for counts in ([100, 12, 1], [1, 3, 2]):
                grouped.observe(states, *text.block(counts))
        trees = grouped.propose(states, text.roots(), SHAPE, torch.ones(3, dtype=torch.bool))
        return grouped.evidence(states), [tree.scores for tree in trees], max(sizes)

    whole, whole_scores, whole_size = run()
    vocab_size = drafters[0].vocab_size
    monkeypatch.setattr(evidence, "MAX_ELEMENTS", 3 * vocab_size * 5)  # of 64 slots of 3 rows, 5
    pieces, pieces_scores, size = run()
    torch.testing.assert_close(pieces, whole)
    for scores, expected in zip(pieces_scores, whole_scores, strict=True):
        torch.testing.assert_close(scores, expected)
    assert size <= whole_size * 5 / evidence.MAX_SLOTS


def noted(function: Any, note: Callable[..., Any]) -> Any:
    """The function, with a note of its arguments before each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def ragged_prompts(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Left-padded prompts of both domains in turn."""
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        ids[row, -length:] = sentences(("math", "chat")[row % 2], 1, length, seed=70 + row)[0]
    return ids, (ids != PAD).long()


def texts_and_evidence(decoder: taps.SpeculativeDecoder, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, Tensor]]:
    """At each decode step: the rows' new tokens so far (None: the row has ended), and the evidence [D, B] then."""
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        summed = DecodeStep._evidence
        patch.setattr(DecodeStep, "_evidence", lambda *args: seen.append(summed(*args)) or seen[-1])
        events = list(decoder.stream(*args, **kwargs))
    texts: list[list[int]] = [[] for _ in events[0].new_tokens]
    for event, following, found in zip(events, events[1:], seen, strict=False):
        texts = [text + new for text, new in zip(texts, event.new_tokens, strict=True)]
        yield (
            [
                None if count is None else (text, choice)
                for text, count, choice in zip(texts, following.num_accepted, following.choices, strict=True)
            ],
            found,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"composition": "evidence"},
        {"composition": "evidence", "evidence_decay": 0.5, "drafting": "topk"},
        {"composition": "merged", "evidence_decay": 1.0, "max_nodes": 20},
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_decoder_goes_by_the_evidence_of_the_committed_text(options: dict[str, Any]) -> None:
    """Prompts longer and shorter than 64 tokens, rows that end early; the text's own training forward in float64."""
    target, drafters = trained_target(), trained_drafters()
    decoder = taps.SpeculativeDecoder(target, drafters, shape=SHAPE, **options)
    lengths = [100, 9, 65, 30]
    ids, mask = ragged_prompts(lengths)
    sampling = taps.SamplingParams([1.0, 0.0, 0.7, 1.0], seed=5)
    steps = texts_and_evidence(decoder, ids, mask, sampling=sampling, max_new_tokens=[30, 4, 22, 30], eos_token_id=())
    networks = [deepcopy(drafter.network).double() for drafter in drafters.values()]
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    decay, num_checked, choices = options.get("evidence_decay", EVIDENCE_DECAY), 0, set()
    for rows, found in steps:
        assert bool(found.isfinite().all())
        for b, row in enumerate(rows):
            if row is None:
                continue
            text = torch.tensor([ids[b, -lengths[b] :].tolist() + row[0]])
            features, positions = target.get_decoder()(input_ids=text).last_hidden_state, torch.arange(text.shape[1])
            expected = []
            for network in networks:
                output = network(embedding(text[:, 1:]).double(), features[:, :-1].double(), positions[None, :-1])
                told = told_of(output[0], lm_head.weight, text[0, 1:])
                expected.append(discounted(told, lengths[b], decay))
            assert found[:, b].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)
            if options["composition"] == "evidence":
                assert row[1] == list(drafters)[expected.index(max(expected))]
                choices.add(row[1])
            num_checked += 1
    assert num_checked > 20
    assert options["composition"] == "merged" or len(choices) == 2


# ---- the choice


def test_ties_go_to_the_first_drafter() -> None:
    found = torch.tensor([[-3.0, -9.0, 0.0], [-3.0, -1.0, 0.0], [-5.0, -1.0, 0.0]])
    choice = make_composition("evidence").choose(found)
    assert choice is not None and choice.tolist() == [0, 1, 0]
    one = trained_drafters()["chat"]
    twins = {name: EagleDrafter(one.network, one.embedding, one.lm_head, name, one.calibration) for name in "ab"}
    decoder = taps.SpeculativeDecoder(trained_target(), twins, "evidence", shape=SHAPE)
    stats = decoder.generate(*prompts(4), sampling=taps.SamplingParams(1.0), max_new_tokens=20).stats
    assert stats.choice_share == {"a": 1.0, "b": 0.0}


class Work:
    """What is spent on drafting: rows of frontiers expanded, of them by each network, and of the lm_head."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: Counter[str] = Counter()
        self.by_network: Counter[int] = Counter()
        patch.setattr(ops, "expand_frontier", noted(ops.expand_frontier, self._expand))
        patch.setattr(growth._Frontier, "forward", noted(growth._Frontier.forward, self._forward))
        patch.setattr(SharedEnds, "logits", noted(SharedEnds.logits, self._logits))

    def _expand(self, logits: Tensor, *rest: Any) -> None:
        self.rows["expanded"] += len(logits)

    def _forward(self, frontier: Any, *rest: Any) -> None:
        for network in frontier.networks:
            self.rows["forward"] += len(frontier.lengths)
            self.by_network[id(network)] += len(frontier.lengths)

    def _logits(self, ends: SharedEnds, out: Tensor) -> None:
        self.rows["lm_head"] += out.shape[:-1].numel()


def work_of(composition: str, drafters: dict[str, EagleDrafter], ids: Tensor, **kwargs: Any) -> tuple[Work, Any]:
    """What a call spends on drafting, and what it returns."""
    decoder = taps.SpeculativeDecoder(trained_target(), drafters, composition, shape=SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        work = Work(patch)
        return work, decoder.generate(ids, eos_token_id=(), **kwargs)


def test_drafters_that_are_not_chosen_expand_nothing() -> None:
    """The same frontiers are expanded as by the specialist alone; the others only say what they think of the text."""
    own = trained_drafters()
    math, chat = own["math"], own["chat"]
    lone = LoneDrafter(math.network, math.embedding, math.lm_head, "lone", math.calibration)  # ties go to the first
    wider = random_drafter(num_key_value_heads=4)
    ids = sentences("chat", 1, 20, seed=3)
    arguments: dict[str, Any] = {"sampling": taps.SamplingParams(1.0, seed=4), "max_new_tokens": 40}
    alone, expected = work_of("single", {"chat": chat}, ids, **arguments)
    everyone = {"math": math, "wider": wider, "chat": chat, "lone": lone}
    together, result = work_of("evidence", everyone, ids, **arguments)
    assert result.new_tokens == expected.new_tokens
    assert result.stats.choice_share["chat"] == 1.0
    assert result.stats.num_accepted == expected.stats.num_accepted
    assert together.by_network == alone.by_network == {id(chat.network): alone.rows["forward"]}
    assert together.rows["expanded"] == alone.rows["expanded"]
    # Beyond them the lm_head says what each of the four thinks of the prompt's and of each step's tokens.
    num_observed = 20 + sum(count + 1 for count in result.stats.num_accepted[0][:-1])
    num_steps = len(result.stats.num_accepted[0])  # the first level's logits are known already
    assert together.rows["lm_head"] - alone.rows["lm_head"] == 4 * num_observed - num_steps


def random_drafter(**overrides: Any) -> EagleDrafter:
    """An untrained drafter for the trained target."""
    target = trained_target()
    torch.manual_seed(5)
    network = EagleNetwork(EagleConfig.for_target(target.config, **overrides)).requires_grad_(False).eval()
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    return EagleDrafter(network, embedding, lm_head, "random", CALIBRATIONS["math"])


class Script(LogitsProcessor):
    """Leaves one token possible at each place: that of a text."""

    def __init__(self, text: Tensor) -> None:
        self.text = text.tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = min(input_ids.shape[1], len(self.text) - 1)
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.text[column]]), 0.0)


def test_the_choice_follows_a_text_that_switches_its_domain() -> None:
    """Another drafter then drafts on, from a context that it has observed all along."""
    text = torch.cat([sentences("math", 1, 30, seed=8), sentences("chat", 1, 40, seed=9)], dim=1)[0]
    assert int(text[30]) == DOMAIN_TOKENS["chat"]
    arguments: dict[str, Any] = {"logits_processor": [Script(text)], "max_new_tokens": 58}
    for decay in (0.5, EVIDENCE_DECAY):
        decoder = taps.SpeculativeDecoder(
            trained_target(), trained_drafters(), "evidence", shape=SHAPE, evidence_decay=decay
        )
        result = decoder.generate(text[None, :12], eos_token_id=(), **arguments)
        assert result.new_tokens[0] == text[12:].tolist()
        places, place = [], 13
        for count, choice in zip(result.stats.num_accepted[0], result.stats.choices[0], strict=True):
            places.append((place, choice))
            place += count + 1
        assert {choice for place, choice in places if place <= 30} == {"math"}
        settled = [choice for place, choice in places if place > 34 + 10 * (decay > 0.5)]
        assert set(settled) == {"chat"}
        switched = [
            count
            for count, (place, choice) in zip(result.stats.num_accepted[0], places, strict=True)
            if choice == "chat"
        ]
        assert sum(switched) / len(switched) > 1
