"""Claims about the estimated acceptance length: it is the decoder's own, without decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from random import Random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from taps_ext import tiny
from taps_ext.checkpoints import load_drafter
from taps_ext.decode.decoder import SpeculativeDecoder
from taps_ext.decode.stats import DecodeStats
from taps_ext.drafters import EagleDrafter
from taps_ext.training.features import FrozenTarget
from taps_ext.training.masks import Example, TokenBatch, collate
from taps_ext.training.objectives import (
    AcceptanceEstimate,
    ObjectivePass,
    accepted_drafts,
    estimate,
    next_stream,
    steps,
)
from taps_ext.training.recipe import ObjectiveConfig
from taps_ext.tree import Lengths, TreeShape

DEPTH = 6
CHAIN = TreeShape(depth=DEPTH, branching=1, max_nodes=DEPTH + 1)
OBJECTIVE = ObjectiveConfig()


@dataclass(frozen=True)
class Decoded:
    """Texts that the target wrote at temperature 0 with a drafter's chains, and how the decoder fared."""

    target: PreTrainedModel
    drafter: EagleDrafter
    examples: list[Example]
    num_accepted: list[list[int]]  # by text and step
    stats: DecodeStats


@cache
def decoded() -> Decoded:
    target, tokenizer = tiny.load_target()
    drafter = load_drafter(next(iter(tiny.drafter_paths().values())), target)
    decoder = SpeculativeDecoder(target, {"only": drafter}, "single", shape=CHAIN)
    chats = [*tiny.prompts("math", 8), *tiny.prompts("chat", 2)]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    result = decoder.generate(padded, mask, max_new_tokens=160)
    assert set(result.finish_reasons) == {"eos"}
    examples = [
        Example((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))
        for prompt, answer in zip(prompts, result.new_tokens, strict=True)
    ]
    return Decoded(target, drafter, examples, result.stats.num_accepted, result.stats)


def estimated(batches: list[TokenBatch], config: ObjectiveConfig = OBJECTIVE, depth: int = DEPTH) -> AcceptanceEstimate:
    source = FrozenTarget(decoded().target)
    return estimate(ObjectivePass(decoded().drafter.network, source.logits, config), source, batches, config, depth)


def correct_by_pass(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """bool [D, B, T] of `DEPTH` passes, and the learned slots [B, T]."""
    source = FrozenTarget(decoded().target)
    model, draft = ObjectivePass(decoded().drafter.network, source.logits, OBJECTIVE), source.draft_batch(batch)
    streams, found = [draft.features], []
    for _ in range(DEPTH):
        output = model(draft, streams)
        found.append(output.is_correct)
        streams.append(next_stream(streams[-1], output.guesses))
    return torch.stack(found), draft.loss_mask


# --- against decoding ------------------------------------------------------------------------------------------------


def test_on_the_targets_own_text_every_step_is_the_decoders() -> None:
    world = decoded()
    num_steps = 0
    for example, expected in zip(world.examples, world.num_accepted, strict=True):
        is_correct, learned = correct_by_pass(collate([example]))
        found = steps(learned, accepted_drafts(is_correct))
        assert found[:-1] == expected[:-1] and len(found) == len(expected)
        assert found[-1] <= expected[-1]  # a decoder may accept drafts behind the end of the text
        num_steps += len(found)
    kinds = {count for row in world.num_accepted for count in row}
    assert kinds >= {0, 1, 2, DEPTH} and num_steps > 60, "the claim would be hollow"


def test_the_estimate_is_the_decoders_acceptance_length() -> None:
    world = decoded()
    found = estimated([collate(world.examples[:7]), collate(world.examples[7:])])
    # Only the last step of a text can differ, by the drafts behind its end: one step in ten or more, and by little.
    assert found.acceptance_length == pytest.approx(world.stats.acceptance_length, rel=0.05)
    assert found.accuracy == pytest.approx(world.stats.acceptance_by_depth, abs=0.1)


def test_chains_from_any_slot_are_what_the_drafter_drafts() -> None:
    world = decoded()
    example = max(world.examples[:8], key=lambda one: len(one.tokens))  # of math, where the drafter is good
    is_correct, learned = correct_by_pass(collate([example]))
    accepted, tokens = accepted_drafts(is_correct), torch.tensor([example.tokens])
    features = FrozenTarget(world.target).features(collate([example]))
    counts = []
    for slot in learned[0].nonzero()[:, 0].tolist():
        state, length = world.drafter.reset(1), Lengths.of([slot + 1])
        world.drafter.observe(state, features[:, : slot + 1], tokens[:, 1 : slot + 2], length)
        drafts = world.drafter.propose(state, tokens[:, slot + 1], CHAIN, torch.tensor([True])).tokens[0, 1:]
        text = tokens[0, slot + 2 :][:DEPTH]
        counts.append(int((drafts[: len(text)] == text).long().cumprod(0).sum()))  # this text is the target's choice
        assert counts[-1] == accepted[0, slot], slot
    assert max(counts) == DEPTH and min(counts) == 0


# --- by itself -------------------------------------------------------------------------------------------------------


def random_case(seed: int) -> tuple[list[list[bool]], list[list[list[bool]]]]:
    """Learned slots [B][T] with gaps, and which of them each pass [D][B][T] has right."""
    rng = Random(seed)
    num_rows, num_slots, depth = rng.randint(1, 3), rng.randint(1, 14), rng.randint(1, 4)
    learned = [[rng.random() < 0.8 for _ in range(num_slots)] for _ in range(num_rows)]
    right = [[[is_learned and rng.random() < 0.7 for is_learned in row] for row in learned] for _ in range(depth)]
    return learned, right


def test_a_chain_lives_while_every_slot_is_right_in_its_pass() -> None:
    for seed in range(300):
        _, right = random_case(seed)
        found = accepted_drafts(torch.tensor(right)).tolist()
        for b, row in enumerate(found):
            for t, count in enumerate(row):
                expected = 0
                while expected < len(right) and t + expected < len(row) and right[expected][b][t + expected]:
                    expected += 1
                assert count == expected


def test_steps_cover_each_answer_but_its_first_token() -> None:
    """Every learned token of an answer is its first, a draft that was accepted, or a bonus token."""
    for seed in range(300):
        learned, right = random_case(seed)
        num_accepted = accepted_drafts(torch.tensor(right))
        expected = []
        for b, row in enumerate(learned):
            ends = [-1, *(t for t, is_learned in enumerate(row) if not is_learned), len(row)]
            for before, end in pairwise(ends):
                left = end - before - 2  # tokens of this answer behind its first
                slot = before + 2
                while left > 0:
                    expected.append(int(num_accepted[b, slot]))
                    slot, left = slot + expected[-1] + 1, left - expected[-1] - 1
        assert steps(torch.tensor(learned), num_accepted) == expected


def test_how_texts_are_batched_and_spread_over_processes_changes_nothing() -> None:
    examples = decoded().examples[:6]
    whole = estimated([collate(examples)])
    parts = [collate(examples[:1]), collate(examples[1:4]), collate(examples[4:])]
    split = estimated(parts)
    assert (split.accuracy, split.acceptance_length) == (whole.accuracy, whole.acceptance_length)
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)

    shares: list[Tensor] = []
    source = FrozenTarget(decoded().target)
    model = ObjectivePass(decoded().drafter.network, source.logits, OBJECTIVE)

    def collect(sums: Tensor) -> Tensor:
        assert sums.dtype == torch.float64
        shares.append(sums)
        return torch.stack(shares).sum(0)

    masked = replace(parts[0], loss_mask=torch.zeros_like(parts[0].loss_mask))  # what fills up a process's batches
    estimate(model, source, parts[:1], OBJECTIVE, reduce=collect)
    both = estimate(model, source, [masked, *parts[1:]], OBJECTIVE, reduce=collect)
    assert both == split


def test_the_loss_is_the_objectives_without_noise_over_the_passes_it_trains() -> None:
    batch = collate(decoded().examples[:3])
    source = FrozenTarget(decoded().target)
    draft, found = source.draft_batch(batch), {}
    for name in ("eagle2", "hass"):
        config = ObjectiveConfig(name=name)  # type: ignore[arg-type]
        model, streams, loss = ObjectivePass(decoded().drafter.network, source.logits, config), [draft.features], 0.0
        for _ in range(config.num_passes):
            output = model(draft, streams)
            loss += output.loss.item()
            streams.append(next_stream(streams[-1], output.guesses))
        for depth in (1, 4):  # fewer than the passes that HASS trains, and more
            found[name, depth] = estimated([batch], config, depth)
            assert found[name, depth].loss == pytest.approx(loss / int(draft.loss_mask.sum()), rel=1e-6)
            assert len(found[name, depth].accuracy) == depth
    for depth in (1, 4):
        assert replace(found["eagle2", depth], loss=0.0) == replace(found["hass", depth], loss=0.0)
