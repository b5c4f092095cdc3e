"""The statistics of a proof: against scipy's own, against what is known in closed form, and by simulation."""

import random

import pytest
from scipy import stats

from lab.analysis import intervals


def test_the_gain_is_welchs_interval_of_before_minus_after():
    before, after = [1.0, 1.2, 1.1, 1.15], [0.9, 0.95, 0.7]
    difference, interval = intervals.gain(before, after)
    expected = stats.ttest_ind(before, after, equal_var=False).confidence_interval(0.95)
    assert difference == pytest.approx(1.1125 - 0.85) and difference > 0
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_one_run_and_equal_runs_have_no_interval_and_a_value_that_came_twice_counts_once():
    assert intervals.gain([1.0], [0.9, 0.8])[1] is None
    assert intervals.gain([1.0, 1.0], [0.75, 0.75]) == (0.25, None)
    assert intervals.gain([1.0, 1.2, 1.1], [0.75, 0.75])[1] is None
    assert intervals.gain([1.0, 1.2, 1.2], [0.7, 0.8]) == intervals.gain([1.0, 1.2], [0.7, 0.8])
    assert intervals.spread([1.0]) is None and intervals.spread_interval([1.0]) is None


@pytest.mark.parametrize("truth", [0.0, 0.01])
@pytest.mark.parametrize("sigmas", [(0.002, 0.002), (0.001, 0.004)])
def test_the_interval_covers_the_truth_as_often_as_it_says(truth, sigmas):
    """Three runs each, as in a proof: about 96 % for equal noise, 93 % where one is four times as noisy."""
    rng, n, covered, called_real = random.Random(7), 3000, 0, 0
    for _ in range(n):
        before = [rng.gauss(1.0, sigmas[0]) for _ in range(3)]
        after = [rng.gauss(1.0 - truth, sigmas[1]) for _ in range(3)]
        interval = intervals.gain(before, after)[1]
        covered += interval.low <= truth <= interval.high
        called_real += interval.low > 0
    assert 0.92 < covered / n < 0.98
    assert called_real / n < 0.04 if truth == 0 else called_real / n > 0.5


def test_the_interval_of_the_noise_covers_it():
    rng, n = random.Random(8), 3000
    samples = ([rng.gauss(0, 0.002) for _ in range(3)] for _ in range(n))
    covered = sum(i.low <= 0.002 <= i.high for i in map(intervals.spread_interval, samples))
    assert 0.935 < covered / n < 0.965
