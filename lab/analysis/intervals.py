"""Means, spreads and 95 % intervals of a few runs. Pure functions of numbers.

The gain between two commits has Welch's interval: the two may be noisy to different degrees, and with three runs each
nothing better than their own spread is known. tests/test_intervals.py simulates how often it covers the truth.
"""

import math
from typing import NamedTuple

from lab.base.errors import Refused

LEVEL = 0.95


class Interval(NamedTuple):
    low: float
    high: float

def distributions():
    """scipy.stats; a refusal where it is not installed."""
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise Refused("scipy is needed for the intervals: uv run --group proof -m lab prove") from None
    return stats


def mean(values):
    return sum(values) / len(values)


def variance(values):
    """Of one run, from n of them (n - 1 below the line)."""
    middle = mean(values)
    return sum((v - middle) ** 2 for v in values) / (len(values) - 1)


def spread(values):
    """The standard deviation of one run; None from fewer than two."""
    return math.sqrt(variance(values)) if len(values) > 1 else None


def gain(before, after):
    """(mean of before - mean of after, its Interval): above 0 is better, as val_bpb is to be low. The interval is None
    where either has fewer than two runs."""
    difference = mean(before) - mean(after)
    if min(len(before), len(after)) < 2:
        return difference, None
    parts = [variance(values) / len(values) for values in (before, after)]
    squared = sum(parts)
    if squared == 0:  # bit for bit the same runs: a clock or a seed that was held
        return difference, Interval(difference, difference)
    dof = squared**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (before, after), strict=True))
    half = float(distributions().t.ppf((1 + LEVEL) / 2, dof)) * math.sqrt(squared)
    return difference, Interval(difference - half, difference + half)


def spread_interval(values):
    """The Interval of the standard deviation of one run, by the chi-squared distribution; None from fewer than two."""
    if len(values) < 2:
        return None
    dof, squares = len(values) - 1, variance(values) * (len(values) - 1)
    low, high = map(float, distributions().chi2.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], dof))
    return Interval(math.sqrt(squares / low), math.sqrt(squares / high))
