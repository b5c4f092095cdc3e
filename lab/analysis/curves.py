"""Loss curves: how far a run is behind another, where two of them part, and which ones an experiment is compared with.

A curve is what a record has as "curve" (lab.store.run_log.curve_of): points [progress, smoothed training loss in nats,
tokens/s], at most 50. Older records have none. All runs of a night have one budget, so their losses are compared at the
same progress. That says nothing if an edit changes what the training loss is: label smoothing, an auxiliary loss, or a
schedule of the row length, as tokens with less context before them have a higher loss.
"""

from itertools import pairwise
from math import sqrt
from statistics import median

from lab.analysis.history import is_measurement, label, measured

NOISES = 2.0  # two curves have parted where their difference exceeds this many standard deviations of its own noise
LEAST = 3  # points from there to the end: fewer may exceed that by chance


def loss_at(curve, progress):
    """The training loss at this progress, linear between two points; None outside of the curve."""
    for (x0, y0, _), (x1, y1, _) in zip(curve, curve[1:], strict=False):
        if x0 <= progress <= x1:
            return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)
    return None


def differences(curve, other):
    """[(progress, loss of the curve - loss of the other)] at the points of the curve that are within the other."""
    return [(x, y - at) for x, y, _ in curve if (at := loss_at(other, x)) is not None]


def behind(curve, other):
    """(progress, how far the curve is above the other there) at the last progress that both have; None without one."""
    return next(reversed(differences(curve, other)), None)


def parting(curve, other, floor=0.0):
    """The progress from which on the curve stays above the other, or stays below it, by more than noise; None if they do not
    part. floor: what two runs of one code differ by (spread), in nats.

    The noise of the difference is estimated from its second differences, which a slow drift does not change. Two seeds, or
    two speeds of the machine, differ by a drift: only repeats tell how large it is."""
    found = differences(curve, other)
    if len(found) < LEAST + 2:
        return None
    values = [d for _, d in found]
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    noise = 1.4826 * median(bends) / sqrt(6)  # of normal noise: median to σ, and σ of a second difference to σ
    limit = max(NOISES * noise, floor)
    sign = 1 if values[-1] > 0 else -1
    first = len(values)
    while first and sign * values[first - 1] > limit:
        first -= 1
    return found[first][0] if len(values) - first >= LEAST else None


# ---------------------------------------------------------------------------------------------------
# Of an experiment (lab.analysis.history)


def of(experiment):
    """The curve of its last run that counts as a measurement, else of its last run: of those with a curve of two points or
    more; [] if no run has one. A repeat that crashed would hide where the complete runs ended."""
    runs = [r for r in experiment.runs if len(r.get("curve") or ()) > 1]
    counted = measured([r for r in runs if is_measurement(r)]) or runs
    return counted[-1]["curve"] if counted else []


def spread(night):
    """NOISES standard deviations of what the training losses of two runs of the same code differ by, in nats, from the night's
    repeats, after the first tenth of a run; 0.0 without repeats that have curves."""
    pairs = []
    for experiment in night.experiments:
        made = [r["curve"] for r in measured([r for r in experiment.runs if is_measurement(r)]) if len(r.get("curve") or ()) > 1]
        pairs += pairwise(made)
    found = [abs(d) for curve, other in pairs for x, d in differences(curve, other) if x >= 0.1]
    return NOISES * 1.4826 * median(found) if found else 0.0


def parent_of(night, experiment):
    """The Experiment that it was an edit of; None for a baseline, and if the records do not say."""
    parent = next((r["parent"] for r in experiment.runs if r["parent"]), None)
    return next((e for e in night.experiments if parent and any(r["commit"] == parent for r in e.runs)), None)


def name_of(experiment):
    """What to call it: "row 7", or of a team's Night the tree and the row there."""
    return next((label(r) for r in experiment.runs if "label" in r and r["row"] == experiment.number), f"row {experiment.number}")


def compared_with(night, experiment):
    """[(name, Experiment)] that its curve is shown with: the night's best and its parent, those that have a curve. The night
    may be that of the experiment's team, which has the experiment as another object."""
    own = {r["commit"] for r in experiment.runs}
    best, parent = night.best, parent_of(night, experiment)
    found = [("best and parent", best)] if best is parent else [("best", best), ("parent", parent)]
    return [(name, e) for name, e in found if e and own.isdisjoint(r["commit"] for r in e.runs) and of(e)]


def sentences(night, experiment):
    """What the curve shows beside those that it is compared with, one sentence each; () without a curve."""
    curve, made = of(experiment), []
    for name, other in compared_with(night, experiment) if curve else ():
        last = behind(curve, of(other))
        if last is None:
            continue
        x = parting(curve, of(other), spread(night))
        called = f"{name} ({name_of(other)})"
        parts = f"parts from the {called} at {x:.0%}" if x is not None else f"does not part from the {called}"
        side = "above" if last[1] > 0 else "below"
        made.append(f"{parts}; at {last[0]:.0%} the training loss is {abs(last[1]):.3f} {side} it")
    return tuple(made)


def in_progress(curve, best):
    """"at 40 %: 0.031 behind the best at 40 %", of the curve so far of a run and that of the best; None without both."""
    last = behind(curve, best)
    if last is None:
        return None
    at = f"{100 * last[0]:.0f} %"
    return f"at {at}: {abs(last[1]):.3f} {'behind' if last[1] > 0 else 'ahead of'} the best at {at}"
