"""Decoding with `extend=True`: leaves go on with what followed their paths in the row's own text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import prompts, trained_drafters, trained_target

import taps_ext as taps
from taps_ext.decode import step as device_half
from taps_ext.decode.decoder import EXTENSION
from taps_ext.decode.state import DecodeState

SHAPE = taps.TreeShape(depth=3, branching=3, max_nodes=12)


def make_decoder(**options: Any) -> taps.SpeculativeDecoder:
    return taps.SpeculativeDecoder(
        trained_target(), trained_drafters(), **{"shape": SHAPE, "drafter": None, "extend": True, **options}
    )


def stats_of(decoder: taps.SpeculativeDecoder, **options: Any) -> taps.DecodeStats:
    return decoder.generate(*prompts(4), **{"max_new_tokens": 120, "eos_token_id": (), **options}).stats


def test_a_text_that_repeats_itself_is_accepted_beyond_the_drafted_depth() -> None:
    """Greedy texts of the small target run in circles of a few dozen tokens."""
    plain, extended = stats_of(make_decoder(extend=False)), stats_of(make_decoder())
    deepest = max(count for row in extended.num_accepted for count in row)
    assert max(count for row in plain.num_accepted for count in row) <= SHAPE.depth
    assert deepest > SHAPE.depth + 5
    assert extended.acceptance_length > 1.5 * plain.acceptance_length
    assert extended.num_tokens == plain.num_tokens


def test_accepted_nodes_name_the_extension_and_stand_below_those_of_drafters() -> None:
    stats = stats_of(make_decoder())
    assert stats.drafters == ("math", "chat", EXTENSION)
    accepted = [step for row in stats.accepted_proposers for step in row if step]
    for names in accepted:
        new = [EXTENSION in one for one in names]
        assert new == sorted(new), "a drafter's node stands below an extended one"
        assert all(one == (EXTENSION,) for one, is_new in zip(names, new, strict=True) if is_new)
    assert 0.2 < stats.proposer_share[EXTENSION] < 0.9
    choices = stats_of(make_decoder(composition="single", drafter="math")).choice_share
    assert choices == {"math": 1.0, EXTENSION: 0.0}


def test_a_step_verifies_no_more_nodes_than_without() -> None:
    """New nodes compete for the slots that there are."""
    for options in ({"composition": "confidence"}, {"max_nodes": 12, "evidence_decay": 0}, {"joint_budget": 30}):
        stats = stats_of(make_decoder(**options))
        steps = [[row[s] for row in stats.num_nodes if s < len(row)] for s in range(len(stats.num_nodes[0]))]
        most = 30 if "joint_budget" in options else 12 * 4
        assert all(sum(nodes) <= most for nodes in steps)
        assert stats.proposer_share[EXTENSION] > 0.1


def test_min_score_holds_for_extended_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest: list[float] = []
    extended = device_half.DecodeStep._extended

    def watched(*arguments: Any) -> taps.DraftTree:
        tree = extended(*arguments)
        lowest.append(float(tree.scores[tree.is_node()].min()))
        return tree

    monkeypatch.setattr(device_half.DecodeStep, "_extended", watched)
    shape = taps.TreeShape(3, 3, 12, min_score=-1.0)
    stats_of(make_decoder(composition="confidence", shape=shape), max_new_tokens=60)
    assert -1.0 <= min(lowest) < -0.8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_on_the_device_is_the_text_of_each_row(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and new tokens, the root at the end, for rows of different lengths."""
    checked = 0
    extended = device_half.DecodeStep._extended

    def watched(self: Any, tree: taps.DraftTree, text: torch.Tensor, shape: Any, state: DecodeState) -> taps.DraftTree:
        nonlocal checked
        for b, row in enumerate(state.rows):
            if row.finish_reason is None:
                prompt = ids[b][mask[b] == 1].tolist()
                length = int(state.kv.lengths.tensor[b]) + 1
                assert text[b, :length].tolist() == prompt + row.new_tokens
                checked += 1
        return extended(self, tree, text, shape, state)

    monkeypatch.setattr(device_half.DecodeStep, "_extended", watched)
    ids, mask = prompts(5)
    sampling = taps.SamplingParams(temperature, seed=4)
    lengths = [9, 40, 1, 25, 60]
    result = make_decoder().generate(ids, mask, sampling=sampling, max_new_tokens=lengths, eos_token_id=())
    assert checked > 15
    assert [len(row) for row in result.new_tokens] == lengths


def test_rows_that_have_ended_are_not_extended() -> None:
    decoder = make_decoder()
    stream = decoder.stream(*prompts(2), max_new_tokens=[5, 90], eos_token_id=())
    trees = [event.tree for event in stream if event.tree is not None and not event.new_tokens[0]]
    assert len(trees) > 5
    assert all(tree.num_nodes[0] == 1 for tree in trees)


def test_other_drafters_are_taken_with_the_extension() -> None:
    decoder = make_decoder()
    one = decoder.with_drafters({"chat": decoder.drafters["chat"]})
    assert one.proposers == ("chat", EXTENSION)
    assert stats_of(one, max_new_tokens=40).drafters == ("chat", EXTENSION)


def test_a_drafter_named_as_the_extension_is_and_a_63rd_are_refused() -> None:
    drafter = trained_drafters()["math"]
    for drafters in ({EXTENSION: drafter}, {str(index): drafter for index in range(63)}):
        with pytest.raises(ValueError, match="give at most 62 drafters, none of them named 'extension'"):
            taps.SpeculativeDecoder(trained_target(), drafters, extend=True)
        taps.SpeculativeDecoder(trained_target(), drafters)
