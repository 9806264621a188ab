"""The report's intervals and AUCs, against the definitions written out."""

from __future__ import annotations

import numpy as np
import pytest

from taps_ext.evaluation.report.statistics import (
    NUM_RESAMPLES,
    Sampled,
    auc,
    mean,
    pairs_won,
    ratio,
    resamples,
)


def histograms(seed: int, num_questions: int = 7, num_bins: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shape = (num_questions, num_bins)
    return random.integers(0, 4, size=shape).astype(float), random.integers(0, 9, size=shape).astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order_with_ties_half(seed: int) -> None:
    high, low = (part.sum(axis=0) for part in histograms(seed))
    first, second = (np.repeat(np.arange(len(part)), part.astype(int)) for part in (high, low))
    order = np.sign(first[:, None] - second[None, :])
    assert auc(high, low) == pytest.approx(((order + 1) / 2).mean(), abs=1e-12)
    assert auc(high, low) + auc(low, high) == pytest.approx(1.0, abs=1e-12)


def test_auc_of_separate_groups_is_one_of_equal_groups_a_half_of_an_empty_group_nothing() -> None:
    left, right = np.array([3.0, 1.0, 0.0]), np.array([0.0, 0.0, 5.0])
    assert auc(right, left) == 1.0
    assert auc(left, left) == 0.5
    assert np.isnan(auc(left, np.zeros(3)))


def test_pairs_are_counted_within_each_question_alone() -> None:
    high, low = histograms(3)
    expected = [auc(one, other) * one.sum() * other.sum() for one, other in zip(high, low, strict=True)]
    np.testing.assert_allclose(pairs_won(high, low), expected)


def test_resamples_draw_as_many_questions_as_there_are_and_are_a_function_of_their_arguments() -> None:
    weights = resamples("gsm8k", 40)
    assert weights.shape == (NUM_RESAMPLES, 40) and (weights.sum(axis=1) == 40).all()
    resamples.cache_clear()
    np.testing.assert_array_equal(weights, resamples("gsm8k", 40))
    assert (weights != resamples("svamp", 40)).any()
    assert weights.mean(axis=0) == pytest.approx(np.ones(40), abs=0.15)  # a question's mean has a deviation of 0.022


def test_a_ratio_is_that_of_the_sums_in_each_resample_too() -> None:
    random = np.random.default_rng(0)
    top, bottom = random.uniform(1, 5, size=15), random.uniform(1, 3, size=15)
    found, weights = ratio(top, bottom, "gsm8k"), resamples("gsm8k", 15)
    assert found.value == pytest.approx(top.sum() / bottom.sum())
    for index in (0, 7, 1999):
        drawn = np.repeat(np.arange(15), weights[index].astype(int))
        assert found.samples[index] == pytest.approx(top[drawn].sum() / bottom[drawn].sum())
    low, high = np.percentile(found.samples, [2.5, 97.5])
    assert (found.estimate.low, found.estimate.high) == pytest.approx((low, high))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """95% asked; 400 trials of 60 questions deviate by 1.1%, and the bootstrap holds a little less."""
    random = np.random.default_rng(1)
    trials = [ratio(random.gamma(2.0, 1.0, size=60), np.ones(60), "gsm8k").estimate for _ in range(400)]
    held = np.mean([trial.low <= 2.0 <= trial.high for trial in trials])
    assert 0.90 <= held <= 0.98


def test_a_paired_difference_knows_that_hard_questions_are_hard_for_both() -> None:
    random = np.random.default_rng(2)
    hardness = random.normal(3.0, 1.0, size=50)
    one, other = (hardness + random.normal(shift, 0.05, size=50) for shift in (0.1, 0.0))
    ones = np.ones(50)
    paired = (ratio(one, ones, "gsm8k") - ratio(other, ones, "gsm8k")).estimate
    assert paired.low > 0.05 and paired.high < 0.15
    unpaired = (ratio(one, ones, "gsm8k") - ratio(other, ones, "svamp")).estimate
    assert unpaired.high - unpaired.low > 10 * (paired.high - paired.low)


def test_the_mean_over_tasks_counts_each_task_the_same_and_resamples_within_tasks() -> None:
    small, large = ratio(np.ones(4), np.ones(4), "a"), ratio(3 * np.arange(1.0, 101), np.full(100, 50.5), "b")
    both = mean([small, large])
    assert both.value == pytest.approx(2.0)
    assert both.samples == pytest.approx((small.samples + large.samples) / 2)


def test_a_figure_without_a_value_has_no_interval() -> None:
    for found in (ratio(np.zeros(3), np.zeros(3), "a"), ratio(np.zeros(0), np.zeros(0), "a")):
        assert np.isnan(found.value) and np.isnan(found.estimate.low)
    quotient = Sampled(1.0, np.ones(NUM_RESAMPLES)) / Sampled(0.0, np.zeros(NUM_RESAMPLES))
    assert np.isnan(quotient.estimate.value)
