"""Keep, discard, or measure once more: the verdict on a commit. Pure functions of numbers, no files.

The branch should advance where that makes the night end with the lowest true val_bpb; a single val_bpb is that
truth plus the noise of one run. So differences are measured in σ, the standard deviation between runs of one
commit under different seeds, which the night itself measures: the baseline runs three times, and close calls are
run once more. Whether the whole night's gain is real is another question, for fresh seeds in the morning.

The constants come from tests/simulate_nights.py, which plays nights of 100 runs with the gains and losses of a
published one. docs/verdict.md has its table and says how they were found.
"""

import math
from typing import NamedTuple

BASELINE_RUNS = 3  # under three seeds: two degrees of freedom for σ before the first experiment
BAR = 1.1  # σ that one run must gain, where a second run is not worth its time
BAR_OF_MEAN = 0.7  # σ that the mean of two runs must gain
REACH = 0.5  # σ: how far from BAR a second run may still change the verdict
LUCK, LUCK_GROWTH = 0.4, 0.3  # σ by which a kept value is flattered: it was chosen for being low. And the more
#   experiments have failed against it, the likelier it is that it was luck: LUCK + LUCK_GROWTH·ln(1 + failures)
EARNED, EARNED_RUNS = 0.0002, 6  # what a run earns, in val_bpb: 0.028 in 126 runs of a published night; and how
#   many runs' worth of evidence that is against what this night's own runs have earned
SELECTED = 1.2  # two runs of a close call differ more than any two, as the first was selected for being close: with
#   their squared difference divided by this, σ² is right in the mean over simulated nights
SIMPLER = 0.5  # σ that a simplification may be worse than the best ever
HOPELESS = 2.0  # σ above the best ever: the second run of a simplification would have to be extraordinary
RESOLUTION = 1e-6  # val_bpb is printed with six decimals: σ is never taken for smaller


class Noise(NamedTuple):
    sigma: float | None  # None: no commit has run twice
    dof: int  # degrees of freedom behind it


class Verdict(NamedTuple):
    status: str  # keep, discard or confirm
    gain: float | None  # of the mean of the runs over the best known, in σ; None where σ is not known
    why: str


def mean(values):
    return sum(values) / len(values)


def noise(baseline, others):
    """σ pooled over repeats. baseline: its val_bpb; others: a list of val_bpb for every other commit.

    The first run of a commit is selected (its value decided that there is a second), so it counts only where
    there is but one other to compare, and then corrected. The baseline's runs are nobody's choice: all count."""
    squares, dof = 0.0, 0
    for values in [baseline, *(values[1:] for values in others if len(values) > 2)]:
        if len(values) > 1:
            middle = mean(values)
            squares, dof = squares + sum((v - middle) ** 2 for v in values), dof + len(values) - 1
    for values in others:
        if len(values) == 2:
            squares, dof = squares + (values[0] - values[1]) ** 2 / 2 / SELECTED, dof + 1
    return Noise(max(math.sqrt(squares / dof), RESOLUTION) if dof else None, dof)


def best_known(values, failures, noise, baseline=False):
    """What a kept commit is believed to be worth. failures: experiments that did not beat it."""
    if baseline or noise.sigma is None:
        return mean(values)
    return mean(values) + (LUCK + LUCK_GROWTH * math.log1p(failures)) * noise.sigma / math.sqrt(len(values))


def price(first, best, runs):
    """What a run has earned so far, in val_bpb: what a second run of the same commit costs.
    first: the baseline's val_bpb; best: the best known; runs: all complete runs so far."""
    return (EARNED * EARNED_RUNS + max(0.0, first - best)) / (EARNED_RUNS + runs)


def worth(gain, sigma):
    """What a second run promises, in val_bpb: the better decision that it may lead to. It is REACH·σ times the
    expected excess of a standard normal over the distance to the bar, counted in REACH."""
    x = abs(gain - BAR) / REACH
    excess = math.exp(-x * x / 2) / math.sqrt(2 * math.pi) - x * math.erfc(x / math.sqrt(2)) / 2
    return REACH * sigma * excess


def judge(values, best, noise, price, best_ever=None):
    """The verdict on a commit with these val_bpb, against the best known.

    best_ever: the lowest mean that was kept, where a simplification is claimed; it may then be SIMPLER σ worse."""
    n, middle = len(values), mean(values)
    if noise.sigma is None:
        good = middle < best if best_ever is None else middle <= best_ever
        return Verdict("keep" if good else "discard", None, "plain comparison, as σ is not known: no commit ran twice")
    gain = (best - middle) / noise.sigma
    if n == 1:
        if worth(gain, noise.sigma) > price:
            return Verdict("confirm", gain, "too close to call from one run")
        if gain > BAR:
            return Verdict("keep", gain, f"one run must gain {BAR}σ")
        if best_ever is not None and (best_ever - middle) / noise.sigma > -HOPELESS:
            return Verdict("confirm", gain, "a simplification is judged by two runs")
        return Verdict("discard", gain, f"one run must gain {BAR}σ")
    if gain > BAR_OF_MEAN:
        return Verdict("keep", gain, f"the mean of {n} runs must gain {BAR_OF_MEAN}σ")
    if best_ever is not None and (best_ever - middle) / noise.sigma >= -SIMPLER:
        return Verdict("keep", gain, f"simpler, and at most {SIMPLER}σ worse than the best ever")
    return Verdict("discard", gain, f"the mean of {n} runs must gain {BAR_OF_MEAN}σ")


def judge_baseline(values):
    """The baseline is kept whatever it is worth, once it has run often enough to know σ."""
    n = len(values)
    if n < BASELINE_RUNS:
        return Verdict("confirm", None, f"the baseline runs {BASELINE_RUNS} times, to measure the noise: {n} done")
    return Verdict("keep", None, "the baseline, that others are measured against")
