"""Keep, discard, or measure again: the verdict on a commit. Pure functions of numbers, no files.

A single val_bpb is the true one plus the noise of one run. The rule should end the night with the lowest true val_bpb,
however long the night is. It has three parts:

- the bar: an experiment must measure a number of standard errors below the estimated true val_bpb of the tip (the
  latest keep). This number to beat is known before the experiment is run: `bar`.
- the doubt: after many failures in a row the tip itself is run again: `doubted`. If its gain over the keep before it
  does not hold, the branch steps back to that one: `holds`.
- the noise: σ is estimated from the repeats of this night, with more weight on newer ones, and is bounded by the spread
  of the latest results: `estimate`.

`Search` is all that the rule knows of a branch. `begin`, `ended`, `remeasured` and `stepped_back` return the next one;
a reader of the log replays it through these four. All values are val_bpb, σ too; failures and runs are counts.

The constants come from tests/simulate_nights.py. docs/verdict.md has its table and says how they were found.
"""

import math
from typing import NamedTuple

BASELINE_RUNS = 3  # under three seeds: two degrees of freedom for σ before the first experiment

# By random search over the simulated settings (docs/verdict.md), then rounded. The unit is the standard error of the
# mean of the runs, σ/√runs, unless a comment says otherwise.
BIAS = 0.95  # a keep was chosen for measuring low (winner's curse): its true value is estimated as its mean plus this
BAR = 1.15  # what an experiment must gain over the estimated true value of the tip
PROOF = 0.5  # what it must gain beyond BAR for each unit of `unproven`; what gains BAR but not this is run again
PROVEN = 3.0  # σ: once the night has gained this much over the baseline, there are gains to be had
PATIENCE = 20  # experiments: how soon a night without gains makes the rule stricter
MOST_RUNS = 3  # of one experiment
HOLD = 0.6  # what the mean of a doubted tip must gain over the keep before it
FAILURES = 4.0  # in a row before the tip is run again
FAILURES_RICH = 130  # and this many more for each σ that a run has gained on average in the night: if gains are
#   frequent, a repeat costs too much, and the next keep ends the doubt
EARLY = 20  # runs added to those of the night in that mean, so that a single early keep does not dominate it
UNPROVEN_SOONER = 0.6  # that number of failures shrinks by exp(−this·unproven)
AGAIN = 2.0  # the n-th repeat of a tip comes n**AGAIN times as late
MOST_TIP_RUNS = 8
REPEATS, FIRST_REPEATS = 0.12, 3  # repeats there may be for each experiment, and how many more

HALF_LIFE = 12  # repeats after which an older one counts half in σ: the noise changes with the code
SELECTED = 1.2  # the second run of a close call differs more from the first than two other runs do, as the first was
#   selected for being close: dividing the squared difference by this makes σ² right on average
RECENT = 12  # experiments whose spread bounds σ
SHORTEST_HALF = 1.349  # width in σ of the shortest interval that holds half of a normal distribution
SPREAD = 1.4  # σ is at most this times the σ from that interval, which for 12 normal values is a quarter too short
RESOLUTION = 1e-6  # val_bpb is printed with six decimals: σ is never smaller than this

SIMPLER = 0.5  # σ that a simplification may be worse than the best mean on the branch
HOPELESS = 2.0  # σ above it: the second run of a simplification would have to be extraordinary


class Bar(NamedTuple):
    keep: float  # a mean below this is kept
    confirm: float  # from `keep` up to here the commit is run again; if not above `keep`, nothing is run again


class Verdict(NamedTuple):
    status: str  # keep, discard or confirm
    gain: float | None  # of the mean of the runs over the estimated true value of the tip, in σ; None: σ is unknown
    why: str


class Commit(NamedTuple):
    values: tuple  # val_bpb of its runs, in the order they were made
    failures: int = 0  # experiments measured against it and discarded
    simpler: bool = False  # kept for being simpler: it need not be better

    @property
    def runs(self):
        return len(distinct(self.values))

    @property
    def mean(self):
        return mean(distinct(self.values))


class Search(NamedTuple):
    """What the rule knows of a branch."""

    line: tuple  # of Commit: the baseline, and the keeps that the branch is made of; the last one is the tip
    squares: float  # squared differences between runs of one commit, faded
    dof: float  # how many there are, faded
    sigma: float | None = None  # as estimated when the tip was last kept or run; None: nothing ran twice
    recent: tuple = ()  # first run less the mean of the tip, of the latest experiments
    experiments: int = 0  # that ended, kept or not, without the baseline
    repeats: int = 0  # runs of a commit that had run before, without the baseline's first ones
    runs: int = 0  # all complete runs

    @property
    def tip(self):
        return self.line[-1]


def mean(values):
    return sum(values) / len(values)


def distinct(values):
    """The same val_bpb twice means that the seed changed nothing: that is one measurement, not two."""
    return tuple(dict.fromkeys(values))


def finite(values):
    values = tuple(float(v) for v in values)
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"val_bpb must be finite numbers, at least one, but got {values}: a crash is not a result")
    return values


# ---------------------------------------------------------------------------------------------------
# Events, in order


def begin(values):
    """A branch whose baseline has these runs."""
    values = finite(values)
    own = distinct(values)
    squares = sum((v - mean(own)) ** 2 for v in own)
    search = Search((Commit(values),), squares, len(own) - 1, runs=len(values))
    return search._replace(sigma=estimate(search))


def faded(search, squared):
    fade = 0.5 ** (1 / HALF_LIFE)
    return search._replace(squares=search.squares * fade + squared, dof=search.dof * fade + 1)


def ended(search, values, keep, simpler=False, on_tip=True):
    """An experiment with these runs was kept or discarded. on_tip: it was measured against the present tip; if not (a
    team's tip has changed meanwhile), it counts for the noise but not for the tip."""
    values = finite(values)
    tip, own = search.tip, distinct(values)
    for n in range(1, len(own)):
        search = faded(search, (own[n] - mean(own[:n])) ** 2 * n / (n + 1) / SELECTED)
    recent = (*search.recent, values[0] - tip.mean)[-RECENT:] if on_tip else search.recent
    line = search.line
    if keep:
        line = (*line, Commit(values, simpler=simpler))
    elif on_tip:
        line = (*line[:-1], tip._replace(failures=tip.failures + 1))
    search = search._replace(
        line=line, recent=recent, experiments=search.experiments + 1,
        repeats=search.repeats + len(values) - 1, runs=search.runs + len(values),
    )  # fmt: skip
    return search._replace(sigma=estimate(search)) if keep else search  # no discard moves the number to beat


def remeasured(search, value, back=0):
    """The tip was run once more, or the commit `back` keeps before it."""
    (value,), place = finite([value]), len(search.line) - 1 - back
    commit = search.line[place]
    if value not in commit.values:
        search = faded(search, (value - belief(search, back)) ** 2 * commit.runs / (commit.runs + 1))
    again = commit._replace(values=(*commit.values, value))
    line = (*search.line[:place], again, *search.line[place + 1 :])
    search = search._replace(line=line, repeats=search.repeats + 1, runs=search.runs + 1)
    return search._replace(sigma=estimate(search))


def stepped_back(search):
    """The tip was given up: the keep before it is the tip again."""
    if len(search.line) == 1:
        raise ValueError("the baseline is the tip: there is nothing to step back to")
    return search._replace(line=search.line[:-1])


# ---------------------------------------------------------------------------------------------------
# Estimates and verdicts


def estimate(search):
    """σ, the standard deviation between runs of one commit, for the present branch; None if nothing ran twice.

    It is pooled over repeats, with more weight on newer ones, and bounded by the spread of the latest results: effects
    only widen that spread, so if the results are close together, σ is small."""
    if search.dof <= 0:
        return None
    sigma = math.sqrt(search.squares / search.dof)
    if len(search.recent) == RECENT:
        ordered, half = sorted(search.recent), RECENT // 2
        shortest = min(high - low for low, high in zip(ordered, ordered[half:], strict=False))
        sigma = min(sigma, SPREAD * shortest / SHORTEST_HALF)
    return max(sigma, RESOLUTION)


def belief(search, back=0):
    """The estimated true val_bpb of the tip, or of the commit `back` keeps before it. The baseline was not selected, so
    its estimate is its mean."""
    place = len(search.line) - 1 - back
    commit = search.line[place]
    if place == 0 or search.sigma is None:
        return commit.mean
    return commit.mean + BIAS * search.sigma / math.sqrt(commit.runs)


def earned(search):
    """What the night has gained over the baseline, in σ; 0 if σ is unknown."""
    return max(0.0, search.line[0].mean - belief(search)) / search.sigma if search.sigma is not None else 0.0


def unproven(search):
    """How strong the evidence is for a night without gains: 0 at first and once PROVEN σ are gained. Otherwise it grows
    with the logarithm of the number of experiments without a gain."""
    return max(0.0, 1 - earned(search) / PROVEN) * math.log1p(search.experiments / PATIENCE)


def affordable(search, more=0):
    """Whether one more repeat may be asked for, after `more` that are not in the search yet."""
    return search.repeats + more < FIRST_REPEATS + REPEATS * search.experiments


def best_mean(search):
    return min(commit.mean for commit in search.line)


def bar(search, runs=1, made=None, simpler=False):
    """What the mean of this many runs of an experiment must be below, known before they are made.

    made: all its runs, those with the same result as another included. simpler: the change removes more than it adds,
    and may be SIMPLER σ worse than the best mean of the branch in two runs."""
    made, sigma, best = made or runs, search.sigma, best_mean(search)
    if sigma is None:
        keep = math.nextafter(best, math.inf) if simpler else best  # a simplification may be exactly as good
        return Bar(keep, keep)
    error = sigma / math.sqrt(runs)
    known = belief(search)
    keep = known - (BAR + PROOF * unproven(search)) * error
    confirm = known - BAR * error if made < MOST_RUNS and affordable(search, made - 1) else keep
    if simpler and made == 1:
        confirm = best + HOPELESS * sigma
    elif simpler:
        keep = max(keep, best + SIMPLER * sigma)
    return Bar(keep, max(keep, confirm))


def judge(search, values, simpler=False):
    """The verdict on an experiment with these runs; search: what was known before the first of them."""
    values = finite(values)
    own = distinct(values)
    middle, sigma = mean(own), search.sigma
    limit = bar(search, len(own), len(values), simpler)
    runs = "one run" if len(own) == 1 else f"the mean of {len(own)} runs"
    gain = (belief(search) - middle) / sigma if sigma is not None else None
    why = f"{runs} must be below {limit.keep:.6f}"
    if simpler and len(values) > 1 and sigma is not None:
        why = f"as it is simpler, {why}, {SIMPLER}σ above the lowest mean on the branch"
    elif simpler and sigma is not None:
        why = f"as it is simpler, a second run decides unless the first is below {limit.keep:.6f} or above {limit.confirm:.6f}"
    if sigma is None:
        why += ": plain comparison, as σ is not known: no commit ran twice"
    if middle < limit.keep:
        return Verdict("keep", gain, why)
    if middle < limit.confirm:
        if simpler:
            return Verdict("confirm", gain, why)
        return Verdict("confirm", gain, f"{why}, and is run again below {limit.confirm:.6f}")
    return Verdict("discard", gain, why)


def judge_baseline(values):
    """The baseline is kept whatever it is worth, once it has run often enough to know σ."""
    n = len(values)
    if n < BASELINE_RUNS:
        return Verdict("confirm", None, f"the baseline runs {BASELINE_RUNS} times, to measure the noise: {n} done")
    return Verdict("keep", None, "the baseline, that others are measured against")


def doubted(search):
    """Whether the tip should be run once more now: after this many failures in a row it was probably kept for a lucky
    run."""
    tip = search.tip
    if search.sigma is None or len(tip.values) >= MOST_TIP_RUNS or not affordable(search):
        return False
    patience = FAILURES * math.exp(-UNPROVEN_SOONER * unproven(search))
    patience += FAILURES_RICH * earned(search) / (search.runs + EARLY)
    return tip.failures >= patience * len(tip.values) ** AGAIN


def holds(search):
    """Whether the tip, run again, is still a gain over the keep before it. If not, the branch steps back."""
    tip, sigma = search.tip, search.sigma
    if len(search.line) == 1 or sigma is None:
        return True
    if tip.simpler:
        return tip.mean < best_mean(stepped_back(search)) + SIMPLER * sigma
    gain = belief(search, back=1) - belief(search)
    return gain >= HOLD * sigma / math.sqrt(tip.runs)
