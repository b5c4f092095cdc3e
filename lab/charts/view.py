"""What every chart of a night shows, whoever draws it: figures.py (matplotlib) and plotly_charts.py (the dashboard).

A kept experiment is a disc, a discard is faint, and one without a value (a crash) is a cross on the lower edge and never
a value. What lies far off is a triangle at the edge of the view: one run that diverged does not flatten the night.
Colours are told apart by the colour-blind too, shapes by all.
"""

from statistics import median
from typing import NamedTuple

FLAT = 20  # a first gain this many times as large as all later ones together is left beyond the edge
NOTHING = "no experiment has a value yet"

class View(NamedTuple):
    kept: list  # experiments, in order; a baseline that stands is among them
    others: list
    missing: list  # without a value
    low: float  # the range of val_bpb that is shown
    high: float

    def clamped(self, experiment):
        """Its val_bpb, or the edge of the view that it lies beyond."""
        return min(max(experiment.val_bpb, self.low), self.high)

    def beyond(self, experiments):
        return [e for e in experiments if self.clamped(e) != e.val_bpb]


def view(night):
    """The View of a night: the whole way of the running best, and of the rest what lies not too far from it."""
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
    typical = 3 * median(off) if off else 0.0
    most = (
        max(3 * (top - low), 0.02 * top) if top > low else 0.25 * top
    )  # where nothing is gained, nothing is flattened
    reach = max(0.35 * (top - low), 4 * sigma, min(typical, most), 1e-4 * top)
    shown = [e.val_bpb for e in kept + others if low - reach <= e.val_bpb <= top + reach]
    margin = 0.08 * (max(shown) - min(shown)) + 1.5 * sigma + 1e-4 * top
    return View(kept, others, missing, min(shown) - margin, max(shown) + margin)


def band(night):
    """(numbers, values) of the polygon one σ round the running best, as steps; empty where σ is not known."""
    best = [(e.number, value) for e, value in zip(night.experiments, night.running_best(), strict=True) if value]
    if night.sigma is None or not best:
        return [], []
    xs, ys = [best[0][0]], [best[0][1]]
    for x, y in best[1:]:
        xs += [x, x]
        ys += [ys[-1], y]
    xs, ys = [*xs, xs[-1] + 0.5], [*ys, ys[-1]]
    return [*xs, *xs[::-1]], [*(y + night.sigma for y in ys), *(y - night.sigma for y in ys[::-1])]


def name_of_kept(experiments):
    """A baseline that another harness calls "ok" stands like a kept one."""
    kept = sum(e.kept for e in experiments)
    return "kept" if kept == len(experiments) else "kept, and baseline" if kept else "baseline"


def name_of_missing(experiments):
    return "crashed" if all(e.status == "crash" for e in experiments) else "crashed or no value"


def title(night):
    n, seen = len(night.experiments), view(night)
    text = f"{n} experiment{'s' * (n != 1)}, {sum(e.kept for e in seen.kept)} kept"
    if night.best and night.best is not night.baseline:
        text += f": val_bpb {night.baseline.val_bpb:.4f} → {night.best.val_bpb:.4f}"
    return text
