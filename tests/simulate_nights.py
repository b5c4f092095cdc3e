"""Simulated nights: what the verdict's rule is worth against "lower wins" and against the rule it replaced.

    uv run python tests/simulate_nights.py                          the table of docs/verdict.md (about 20 minutes)
    uv run python tests/simulate_nights.py --nights 300             rougher ones
    uv run python tests/simulate_nights.py --runs 100 --only full   some of the rows
    uv run python tests/simulate_nights.py --set BAR=1.3            with another constant of lab/analysis/verdict.py

An idea changes the true val_bpb of the commit it is tried on by a random effect; a run measures the truth with noise
σ, which the rule has to find out. Thousands of nights are played side by side, an array element each. So the rule
stands here a second time, in numpy; tests/test_verdict.py plays the same nights with lab/analysis/verdict.py, run for run.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.analysis import verdict  # noqa: E402

# A published night of 126 experiments on an H100: of 124 ideas 22 gained. Quantiles of the gains (a quarter below
# 0.0002, median 0.00046, mean 0.00128, the largest 0.0119) and of the losses (quartiles 0.0004, 0.0008, 0.0016);
# between them log-linear, ends chosen so that the means agree.
SHARE_OF_GAINS = 22 / 124
GAINS = [(0, 2e-5), (0.25, 0.0002), (0.5, 0.00046), (0.75, 0.0012), (0.9, 0.0035), (1, 0.0119)]
LOSSES = [(0, 2e-5), (0.25, 0.0004), (0.5, 0.0008), (0.75, 0.0016), (1, 0.02)]
HEAVY = 3  # times as noisy is one run in 20 where the noise is heavy-tailed
FALLING = (0.0075, 0.0003, 0.01)  # σ at the baseline, σ once this much is gained, and from there on; log-linear
OVERLAP = 0.2  # of the latest keep's gain is lost when the next experiment is kept on top of it
LENGTHS = (100, 400, 1600)  # runs
CHUNK = 250  # nights side by side: their arrays stay in the cache


class Setting(NamedTuple):
    ideas: str  # full, plateau (only the lower half of the gains), losses, zero (no effect), dry (no gains from half on)
    sigma: float | None  # None: falling
    special: str = ""  # heavy, overlap

    @property
    def name(self):
        return f"{self.ideas}, {self.special}" if self.special else self.ideas


SIX = [Setting(ideas, sigma) for ideas in ("full", "plateau") for sigma in (0.0003, 0.0007, 0.002)]
SETTINGS = [
    *SIX,
    *(Setting(ideas, sigma) for ideas in ("losses", "zero") for sigma in (0.0003, 0.0007, 0.002)),
    *(Setting("dry", sigma) for sigma in (0.0003, 0.0007, 0.002)),
    Setting("full", 0.0007, "heavy"), Setting("full", 0.002, "heavy"),
    Setting("plateau", 0.0007, "heavy"), Setting("plateau", 0.002, "heavy"),
    Setting("full", 0.0007, "overlap"), Setting("full", 0.002, "overlap"),
    Setting("full", None, "σ falls"),
]  # fmt: skip


def quantile(table, u):
    places, values = zip(*table, strict=True)
    return np.exp(np.interp(u, places, np.log(values)))


class Nights:
    """The ideas of so many nights in the order they come to mind, and the noise of their runs in σ."""

    def __init__(self, setting, runs, nights, seed=0):
        key = sum(map(ord, setting.name)) + int(1e6 * (setting.sigma or 0))
        rng = np.random.default_rng([seed, runs, key])
        self.setting, self.runs, self.n = setting, runs, nights
        shape = (nights, runs)
        gain, u = rng.random(shape) < SHARE_OF_GAINS, rng.random(shape)
        gains = -quantile(GAINS, u * 0.5 if setting.ideas == "plateau" else u)
        losses = quantile(LOSSES, u)
        if setting.ideas in ("losses", "zero"):
            gain[:] = False
        if setting.ideas == "dry":
            gain[:, runs // 2 :] = False
        self.effects = np.zeros(shape) if setting.ideas == "zero" else np.where(gain, gains, losses)
        self.noise = rng.standard_normal(shape)
        if setting.special == "heavy":
            self.noise *= np.where(rng.random(shape) < 1 / 20, HEAVY, 1)

    def sigma(self, truth):
        """True σ of commits with this true val_bpb."""
        if self.setting.sigma:
            return np.full(np.shape(truth), self.setting.sigma)
        start, end, over = FALLING
        return start * (end / start) ** np.clip(-truth / over, 0, 1)


NEW, REPEAT, TIP = 0, 1, 2  # what runs next: a new idea, the same experiment again, the tip again
KEEP, DISCARD, CONFIRM, REMEASURED, BACK = range(5)  # what a rule answers to a run


def play(nights, rule):
    """Plays all nights by the rule. A dict of arrays, one element a night: end (true val_bpb at the end, the baseline's
    is 0), turn (the same half-way), keeps, false (keeps whose true effect is no gain), loss (what these add up to),
    experiments, backs (steps back; what was undone by one counts neither as a keep nor as a false one)."""
    n, runs, rows = nights.n, nights.runs, np.arange(nights.n)
    truth, gain_before, turn = np.zeros(n), np.zeros(n), np.zeros(n)
    truths, effects, depth = np.zeros((n, runs)), np.zeros((n, runs)), np.zeros(n, int)
    keeps, false, loss, experiments, backs, idea, action = (np.zeros(n) for _ in range(7))
    idea, first = idea.astype(int), verdict.BASELINE_RUNS
    overlap = OVERLAP if nights.setting.special == "overlap" else 0
    rule.begin(nights.noise[:, :first] * nights.sigma(truth)[:, None], nights)
    for run in range(first, runs):
        new, tip = action == NEW, action == TIP
        if run >= runs // 2:
            if run == runs // 2:
                turn = truth.copy()
            if nights.setting.ideas == "dry":
                idea = np.where(new, np.maximum(idea, run), idea)
        effect = nights.effects[rows, idea] + overlap * gain_before
        at = np.where(tip, truth, truth + effect)
        answer, action = rule.step(action, at + nights.noise[:, run] * nights.sigma(at), nights.sigma(truth))
        kept, back = answer == KEEP, answer == BACK
        experiments += new
        idea = np.minimum(idea + (kept | (answer == DISCARD)), runs - 1)
        depth += kept
        truth = np.where(kept, at, truth)
        truths[rows, depth] = truth
        effects[rows, depth] = np.where(kept, effect, effects[rows, depth])
        here, change = effects[rows, depth], kept * 1 - back
        keeps, false, backs = keeps + change, false + change * (here >= 0), backs + back
        loss += change * np.maximum(here, 0)
        depth -= back
        truth = truths[rows, depth]
        gain_before = np.maximum(-effects[rows, depth], 0)
    return dict(
        end=truth, turn=turn, keeps=keeps, false=false, loss=loss, experiments=experiments, backs=backs,
    )  # fmt: skip


class LowerWins:
    """Whatever measures lower than anything before is kept."""

    def begin(self, baseline, nights):
        self.best = baseline.mean(1)

    def step(self, action, x, sigma):
        kept = x < self.best
        self.best = np.where(kept, x, self.best)
        return np.where(kept, KEEP, DISCARD), np.zeros(len(x))


class OldRule:
    """The rule that docs/verdict.md described before this one, with its constants: one run must gain 1.1σ over the tip's
    mean plus (0.4 + 0.3·ln(1 + failures))·σ/√runs, the mean of two runs 0.7σ; two where that is worth a run."""

    def begin(self, baseline, nights):
        n = len(baseline)
        self.mean = self.first = baseline.mean(1)
        self.squares, self.dof = ((baseline - self.first[:, None]) ** 2).sum(1), np.full(n, 2.0)
        self.kept_runs, self.failures, self.before, self.runs = np.zeros(n), np.zeros(n), np.zeros(n), baseline.shape[1]

    def step(self, action, x, sigma):
        repeat, self.runs = action == REPEAT, self.runs + 1
        self.squares = self.squares + np.where(repeat, (x - self.before) ** 2 / 2 / 1.2, 0)
        self.dof = self.dof + repeat
        sigma = np.maximum(np.sqrt(self.squares / self.dof), 1e-6)
        middle = np.where(repeat, (x + self.before) / 2, x)
        growth = (0.4 + 0.3 * np.log1p(self.failures)) * sigma / np.sqrt(np.maximum(self.kept_runs, 1))
        best = self.mean + np.where(self.kept_runs > 0, growth, 0)
        gain = (best - middle) / sigma
        price = (0.0002 * 6 + np.maximum(0, self.first - best)) / (6 + self.runs)
        far = np.abs(gain - 1.1) / 0.5
        worth = 0.5 * sigma * (np.exp(-far * far / 2) / math.sqrt(2 * math.pi) - far * erfc(far / math.sqrt(2)) / 2)
        confirm = ~repeat & (worth > price)
        kept = ~confirm & (gain > np.where(repeat, 0.7, 1.1))
        self.before = x
        self.mean, self.kept_runs = np.where(kept, middle, self.mean), np.where(kept, 1 + repeat, self.kept_runs)
        self.failures = np.where(kept, 0, self.failures + ~confirm)
        answer = np.where(confirm, CONFIRM, np.where(kept, KEEP, DISCARD))
        return answer, np.where(confirm, REPEAT, NEW)


ERFC = np.array([math.erfc(i / 1000) for i in range(8000)])


def erfc(x):
    """For x >= 0, to 1e-3 of a step in x: numpy has none."""
    return np.interp(x, np.arange(len(ERFC)) / 1000, ERFC, right=0)


class Rule:
    """lab/analysis/verdict.py in numpy. told: it is told the true σ of the tip instead of measuring it."""

    def __init__(self, told=False):
        self.told = told

    def begin(self, baseline, nights):
        n = len(baseline)
        self.rows = np.arange(n)
        self.means, self.counts, self.fails = (np.zeros((n, nights.runs)) for _ in range(3))
        self.depth = np.zeros(n, int)
        self.means[:, 0], self.counts[:, 0] = baseline.mean(1), baseline.shape[1]
        self.squares, self.dof = ((baseline - baseline.mean(1)[:, None]) ** 2).sum(1), np.full(n, baseline.shape[1] - 1.0)
        self.recent, self.turn = np.full((n, verdict.RECENT), np.nan), np.zeros(n, int)
        self.mean, self.count, self.first, self.own = (np.zeros(n) for _ in range(4))
        self.own_squares = np.zeros((n, verdict.MOST_RUNS))
        self.experiments, self.repeats, self.runs = np.zeros(n), np.zeros(n), np.full(n, float(baseline.shape[1]))
        self.sigma = self.estimate()

    def estimate(self):
        ordered, half = np.sort(self.recent, 1), verdict.RECENT // 2
        shortest = (ordered[:, half:] - ordered[:, :-half]).min(1)  # nan as long as there are too few
        spread = verdict.SPREAD * shortest / verdict.SHORTEST_HALF
        return np.maximum(np.fmin(np.sqrt(self.squares / self.dof), spread), verdict.RESOLUTION)

    def belief(self, depth, sigma):
        bias = np.where(depth > 0, verdict.BIAS / np.sqrt(self.counts[self.rows, depth]), 0)
        return self.means[self.rows, depth] + bias * sigma

    def night(self, sigma):
        """(earned in σ, unproven)"""
        earned = np.maximum(0, self.means[:, 0] - self.belief(self.depth, sigma)) / sigma
        return earned, np.maximum(0, 1 - earned / verdict.PROVEN) * np.log1p(self.experiments / verdict.PATIENCE)

    def fade(self, where, squared):
        keep = np.where(where, 0.5 ** (1 / verdict.HALF_LIFE), 1)
        self.squares, self.dof = self.squares * keep + np.where(where, squared, 0), self.dof * keep + where

    def step(self, action, x, true):
        rows, tip, repeat, new = self.rows, action == TIP, action == REPEAT, action == NEW
        sigma = true if self.told else self.sigma
        known = self.belief(self.depth, sigma)
        # the tip again
        n = np.where(tip, self.counts[rows, self.depth], 1)
        self.fade(tip, (x - known) ** 2 * n / (n + 1))
        old = self.means[rows, self.depth]
        self.means[rows, self.depth] = np.where(tip, old + (x - old) / (n + 1), old)
        self.counts[rows, self.depth] += tip
        self.repeats, self.runs = self.repeats + tip, self.runs + tip
        # an experiment
        count = np.where(new, 1, self.count + repeat)
        before = np.maximum(count - 1, 1)
        squared = (x - self.mean) ** 2 * before / (before + 1) / verdict.SELECTED
        self.own_squares[rows, np.where(repeat, count - 1, 0).astype(int)] = np.where(repeat, squared, 0)
        self.mean = np.where(new, x, np.where(repeat, self.mean + (x - self.mean) / np.maximum(count, 1), self.mean))
        self.count, self.first = count, np.where(new, x, self.first)
        _, unproven = self.night(sigma)
        error = sigma / np.sqrt(np.maximum(count, 1))
        keep = ~tip & (self.mean < known - (verdict.BAR + verdict.PROOF * unproven) * error)
        affordable = self.repeats + count - 1 < verdict.FIRST_REPEATS + verdict.REPEATS * self.experiments
        again = affordable & (count < verdict.MOST_RUNS)
        confirm = ~tip & ~keep & again & (self.mean < known - verdict.BAR * error)
        discard = ~tip & ~keep & ~confirm
        ended = keep | discard
        for i in range(1, verdict.MOST_RUNS):
            self.fade(ended & (count > i), self.own_squares[:, i])
        difference = self.first - self.means[rows, self.depth]
        self.recent[rows, self.turn] = np.where(ended, difference, self.recent[rows, self.turn])
        self.turn = (self.turn + ended) % verdict.RECENT
        self.experiments, self.repeats = self.experiments + ended, self.repeats + np.where(ended, count - 1, 0)
        self.runs = self.runs + np.where(ended, count, 0)
        self.fails[rows, self.depth] += discard
        self.depth = self.depth + keep
        for array, value in [(self.means, self.mean), (self.counts, count), (self.fails, 0)]:
            array[rows, self.depth] = np.where(keep, value, array[rows, self.depth])
        # what follows
        self.sigma = np.where(tip | keep, self.estimate(), self.sigma)
        sigma = true if self.told else self.sigma
        gain = self.belief(np.maximum(self.depth - 1, 0), sigma) - self.belief(self.depth, sigma)
        holds = gain >= verdict.HOLD * sigma / np.sqrt(self.counts[rows, self.depth])
        back = tip & (self.depth > 0) & ~holds
        self.depth = self.depth - back
        earned, unproven = self.night(sigma)
        count = self.counts[rows, self.depth]
        patience = verdict.FAILURES * np.exp(-verdict.UNPROVEN_SOONER * unproven)
        patience = patience + verdict.FAILURES_RICH * earned / (self.runs + verdict.EARLY)
        doubted = (self.fails[rows, self.depth] >= patience * count**verdict.AGAIN) & (count < verdict.MOST_TIP_RUNS)
        doubted &= self.repeats < verdict.FIRST_REPEATS + verdict.REPEATS * self.experiments
        answer = np.select([back, tip, confirm, keep], [BACK, REMEASURED, CONFIRM, KEEP], DISCARD)
        return answer, np.where(confirm, REPEAT, np.where(doubted, TIP, NEW))


def compare(setting, runs, nights, seed=1):
    """{rule: what play returns} of the same nights by "lower wins", the old rule and the rule; where σ falls also by
    the rule that is told it."""
    rules = {"lower": LowerWins, "old": OldRule, "new": Rule}
    if setting.sigma is None:
        rules["told"] = lambda: Rule(told=True)
    parts = {name: [] for name in rules}
    for start in range(0, nights, CHUNK):
        some = Nights(setting, runs, min(CHUNK, nights - start), seed * 100_000 + start)
        for name, rule in rules.items():
            parts[name].append(play(some, rule()))
    return {name: {k: np.concatenate([p[k] for p in some]) for k in some[0]} for name, some in parts.items()}


def misses(setting, runs, result):
    """What of the aims in docs/verdict.md this row falls short of, in words."""
    new, lower, old = result["new"], result["lower"], result["old"]
    end, found = new["end"].mean(), []
    upper = end + 1.96 * new["end"].std() / math.sqrt(len(new["end"]))
    best = min(lower["end"].mean(), old["end"].mean())
    if setting.ideas == "full" and not setting.special and end > 0.99 * best:
        found.append(f"{100 * (1 - end / best):.1f} % higher than the better")
    if setting.ideas == "plateau" and not setting.special:
        if upper > 5e-5:
            found.append("above the baseline")
        if end > lower["end"].mean():
            found.append("above lower wins")
    if setting.ideas in ("losses", "zero"):
        if end > 1e-4:
            found.append("above +0.1")
        if 100 * new["false"].mean() / runs > 1:
            found.append("false keeps")
    if setting.ideas != "zero" and new["loss"].mean() > 0.75 * lower["loss"].mean():
        found.append("loss")
    if setting.ideas == "dry" and end > 0.95 * new["turn"].mean():
        found.append("dries up")
    if runs / new["experiments"].mean() > 1.2:
        found.append("runs")
    if "told" in result and end > 0.95 * result["told"]["end"].mean():
        found.append("σ")
    return found


HEAD = """\
| ideas | σ | runs | lower wins | old rule | rule | keeps | false keeps | their loss | runs/exp. | back | short of |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def row(setting, runs, result):
    new, lower, old = result["new"], result["lower"], result["old"]
    end, error = 1e3 * new["end"].mean(), 1.96e3 * new["end"].std() / math.sqrt(len(new["end"]))
    more = f" (told σ: {1e3 * result['told']['end'].mean():.2f})" if "told" in result else ""
    if setting.ideas == "dry":
        more = f" ({100 * new['end'].mean() / new['turn'].mean():.1f} % kept)"
    loss = f"{100 * (new['loss'].mean() / lower['loss'].mean() - 1):+.0f} %" if lower["loss"].any() else ""
    return (
        f"| {setting.name} | {setting.sigma or ''} | {runs:,} | {1e3 * lower['end'].mean():.2f} "
        f"| {1e3 * old['end'].mean():.2f} | **{end:.2f}** ± {error:.2f}{more} | {new['keeps'].mean():.1f} "
        f"| {lower['false'].mean():.1f}, {old['false'].mean():.1f} → {new['false'].mean():.1f} | {loss} "
        f"| {runs / new['experiments'].mean():.2f} | {new['backs'].mean():.1f} | {'; '.join(misses(setting, runs, result))} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nights", type=int, default=2000)
    parser.add_argument("--runs", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="CONSTANT=VALUE")
    args = parser.parse_args()
    for name, value in (pair.split("=") for pair in args.set):
        setattr(verdict, name, type(getattr(verdict, name))(float(value)))
    print(HEAD)
    for runs in args.runs:
        for setting in SETTINGS:
            if args.only in setting.name:
                print(row(setting, runs, compare(setting, runs, args.nights, args.seed)), flush=True)


if __name__ == "__main__":
    main()
