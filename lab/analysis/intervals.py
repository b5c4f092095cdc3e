"""Standard deviations and 95 % intervals of a few runs. Pure functions of numbers.

The interval of the gain between two commits is Welch's: their noise may differ, and is known only from the spread of
their own few runs. tests/test_intervals.py compares it with scipy's ttest_ind, and simulates how often it covers the truth.
"""

import math
from statistics import mean, stdev, variance
from typing import NamedTuple

from lab.analysis.verdict import distinct
from lab.base.errors import Refused

LEVEL = 0.95


class Interval(NamedTuple):
    low: float
    high: float


def distributions():
    """The module scipy.stats. Raises Refused if scipy is not installed."""
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise Refused("scipy is needed for the intervals: uv run --group proof -m lab prove") from None
    return stats


def spread(values):
    """The standard deviation of one run; None for fewer than two."""
    return stdev(values) if len(values) > 1 else None


def gain(before, after):
    """(mean of before - mean of after, its Interval): positive if val_bpb fell. Equal values count as one. The interval
    is None if either has fewer than two."""
    before, after = distinct(before), distinct(after)
    difference = mean(before) - mean(after)
    if min(len(before), len(after)) < 2:
        return difference, None
    parts = [variance(values) / len(values) for values in (before, after)]
    squared = sum(parts)
    dof = squared**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (before, after), strict=True))
    half = float(distributions().t.ppf((1 + LEVEL) / 2, dof)) * math.sqrt(squared)
    return difference, Interval(difference - half, difference + half)


def spread_interval(values):
    """The Interval of the standard deviation of one run, by the chi-squared distribution; None for fewer than two."""
    if len(values) < 2:
        return None
    dof, squares = len(values) - 1, variance(values) * (len(values) - 1)
    low, high = map(float, distributions().chi2.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], dof))
    return Interval(math.sqrt(squares / low), math.sqrt(squares / high))
