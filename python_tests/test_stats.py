"""Stats: the definitions of the house, on a case small enough to count by hand."""

from __future__ import annotations

import json
import math

import pytest

from taps_ext.decode.stats import DecodeStats


def counted() -> DecodeStats:
    """Two rows: steps that accept 2, 0 and 1 tokens, and one that accepts 3."""
    stats = DecodeStats(("math", "chat"), 2)
    for masks in ([1, 3], [], [2]):
        stats.record(0, num_nodes=10, choice=None, proposer_masks=masks)
    stats.record(1, num_nodes=8, choice=1, proposer_masks=[2, 2, 2])
    stats.num_tokens = [7, 5]
    stats.num_target_forwards = 4
    return stats


def test_acceptance_length_is_the_micro_average_plus_one() -> None:
    assert counted().acceptance_length == pytest.approx((2 + 0 + 1 + 3) / 4 + 1)
    assert counted().acceptance_length_macro == pytest.approx(((2 + 0 + 1) / 3 + 1 + 4) / 2)
    assert counted().tokens_per_forward == pytest.approx(12 / (4 + 2))


def test_acceptance_by_depth_is_conditional() -> None:
    assert counted().acceptance_by_depth == pytest.approx([3 / 4, 2 / 3, 1 / 2])


def test_shared_proposals_count_for_each_proposer() -> None:
    assert counted().proposer_share == pytest.approx({"math": 2 / 6, "chat": 5 / 6})
    assert counted().choices == [[("math", "chat"), (), ("chat",)], ["chat"]]
    assert counted().choice_share == {"math": 0.0, "chat": 1.0}


def test_no_step_is_no_number_and_everything_is_json() -> None:
    empty = DecodeStats(("math",), 1)
    assert math.isnan(empty.acceptance_length)
    assert empty.acceptance_by_depth == []
    assert json.loads(json.dumps(counted().to_dict()))["num_steps"] == 4


def test_joined_runs_count_as_the_rows_of_one() -> None:
    both = DecodeStats.joined([counted(), counted()])
    assert both.batch_size == 4
    assert both.num_target_forwards == 8
    assert both.acceptance_length == pytest.approx(counted().acceptance_length)
    assert both.num_accepted == counted().num_accepted * 2
