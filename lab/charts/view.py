"""What the charts of a night have in common: figures.py draws them with matplotlib, plotly_charts.py for the dashboard.

A kept experiment is a disc and a discard a faint disc, with a ring if the branch stepped back from it. An experiment
without a value (a crash) is a cross near the lower edge, never a value. A value far outside is a triangle at the edge
of the view, so that one diverged run does not squeeze all others into a line. Colour-blind readers can distinguish the
colours, and the shapes differ without colours.
"""

from statistics import median
from typing import NamedTuple

NOTHING = "no experiment has a value yet"
EDGE = 0.02  # height of the crosses, as a fraction of the axes: just above the lower edge
MANY = 300  # points; with more of them the discs are smaller

# How much of val_bpb is in view. Tried on nights of 1 to 1000 rows, simulated and published: the gains should take a
# large part of the height, and most discards should be visible.
FLAT = 20  # a first gain this many times as large as all later gains together is drawn at the edge: a broken baseline
ROOM = 0.35  # of the range of the running best: shown above and below it at least
SIGMAS = 4  # σ: shown above and below at least, which holds nearly every repeat of one commit
TYPICAL = 3  # times the median distance of discards from the best: shown, so that ordinary discards are in view
MOST = 3, 0.02  # the room for discards is at most 3 ranges of the running best, or 2 % of val_bpb if that is more
MOST_WITHOUT_GAIN = 0.25  # of val_bpb: as long as nothing is gained, there are no small steps that must be visible
LEAST = 1e-4  # of val_bpb: equal values need a range too
STEEP = 0.1  # of progress: before it the training loss falls so far that the rest would be a flat line
MARGIN = 0.08, 1.5  # around what is shown: a fraction of its range, and σ, so that the band fits


class View(NamedTuple):
    kept: list  # experiments that may be the best, in order: the kept ones and the baseline (Night.standing)
    others: list
    missing: list  # without a value
    low: float  # the range of val_bpb that is shown
    high: float

    def clamped(self, experiment):
        """Its val_bpb, moved to the edge of the view if it is outside."""
        return min(max(experiment.val_bpb, self.low), self.high)

    def beyond(self, experiments):
        """Those of the experiments whose val_bpb is outside the view."""
        return [e for e in experiments if self.clamped(e) != e.val_bpb]


def view(night):
    """The View of a night: all values of the running best, and those of the others that are near it."""
    running = night.running_best()
    numbers = {e.number for e in night.standing}
    kept = [e for e in night.experiments if e.number in numbers]
    missing = [e for e in night.experiments if e.val_bpb is None]
    others = [e for e in night.experiments if e.val_bpb is not None and e.number not in numbers]
    line = sorted({best for best in running if best is not None}, reverse=True)
    while len(line) > 2 and line[0] - line[1] > FLAT * (line[1] - line[-1]):
        del line[0]
    if not line:
        return View(kept, others, missing, 0.0, 1.0)
    top, low, sigma = line[0], line[-1], night.sigma or 0.0
    off = [abs(e.val_bpb - running[e.number - 1]) for e in others if running[e.number - 1] is not None]
    typical = TYPICAL * median(off) if off else 0.0
    most = max(MOST[0] * (top - low), MOST[1] * top) if top > low else MOST_WITHOUT_GAIN * top
    reach = max(ROOM * (top - low), SIGMAS * sigma, min(typical, most), LEAST * top)
    shown = [e.val_bpb for e in kept + others if low - reach <= e.val_bpb <= top + reach]
    margin = MARGIN[0] * (max(shown) - min(shown)) + MARGIN[1] * sigma + LEAST * top
    return View(kept, others, missing, min(shown) - margin, max(shown) + margin)


def band(night):
    """(experiment numbers, values) of a polygon: the steps of the running best ± σ. Empty if σ is not known."""
    best = [(e.number, value) for e, value in zip(night.experiments, night.running_best(), strict=True) if value]
    if night.sigma is None or not best:
        return [], []
    xs, ys = [best[0][0]], [best[0][1]]
    for x, y in best[1:]:
        xs += [x, x]
        ys += [ys[-1], y]
    xs, ys = [*xs, xs[-1] + 0.5], [*ys, ys[-1]]
    return [*xs, *xs[::-1]], [*(y + night.sigma for y in ys), *(y - night.sigma for y in ys[::-1])]


def loss_range(curves):
    """(low, high) of training loss that shows these curves (lab.analysis.curves) from STEEP of progress on; None without
    any such point."""
    shown = [y for curve in curves for x, y, _ in curve if x >= STEEP] or [y for curve in curves for _, y, _ in curve]
    if not shown:
        return None
    margin = MARGIN[0] * (max(shown) - min(shown)) or LEAST * max(shown) or LEAST
    return min(shown) - margin, max(shown) + margin


def name_of_kept(experiments):
    """The legend's name of View.kept. A baseline that another harness calls "ok" is drawn like a kept experiment."""
    kept = sum(e.kept for e in experiments)
    return "kept" if kept == len(experiments) else "kept, and baseline" if kept else "baseline"


def name_of_missing(experiments):
    """The legend's name of View.missing."""
    return "crashed" if all(e.status == "crash" for e in experiments) else "crashed or no value"


def title(night):
    """The heading of the picture: counts, and val_bpb of baseline and best."""
    n, seen = len(night.experiments), view(night)
    text = f"{n} experiment{'s' * (n != 1)}, {sum(e.kept for e in seen.kept)} kept"
    if night.best and night.best is not night.baseline:
        text += f": val_bpb {night.baseline.val_bpb:.4f} → {night.best.val_bpb:.4f}"
    return text
