"""Simulated nights: what the verdict's rule is worth against "lower wins". The rule is lab/analysis/verdict.py's own.

    uv run python tests/simulate_nights.py                  the table of docs/verdict.md (about three minutes)
    uv run python tests/simulate_nights.py --nights 300     a rougher one
    uv run python tests/simulate_nights.py --fixed-window   with a simpler rule in place of the verdict's

A night is 100 runs, the first three the baseline's under either rule. An idea changes the true val_bpb of the
commit it is tried on by a random effect; a run measures the truth with noise σ, which the rule has to find out.
A false keep is one whose true effect is no gain.
"""

import argparse
import bisect
import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.analysis import verdict  # noqa: E402

# A published night of 126 experiments on an H100: of 124 ideas 22 gained. Quantiles of the gains (a quarter below
# 0.0002, median 0.00046, mean 0.00128, the largest 0.0119) and of the losses (quartiles 0.0004, 0.0008, 0.0016);
# between them log-linear, ends chosen so that the means agree.
SHARE_OF_GAINS = 22 / 124
GAINS = [(0, 2e-5), (0.25, 0.0002), (0.5, 0.00046), (0.75, 0.0012), (0.9, 0.0035), (1, 0.0119)]
LOSSES = [(0, 2e-5), (0.25, 0.0004), (0.5, 0.0008), (0.75, 0.0016), (1, 0.02)]
RUNS = 100
SETTINGS = [(world, sigma) for world in ("full", "plateau") for sigma in (0.0003, 0.0007, 0.002)]


def quantile(table, u):
    i = max(1, bisect.bisect_left(table, (u,)))
    (u0, v0), (u1, v1) = table[i - 1], table[i]
    return math.exp(math.log(v0) + (u - u0) / (u1 - u0) * (math.log(v1) - math.log(v0)))


def idea(rng, world):
    """The true effect of an idea on val_bpb. On a plateau only the lower half of the gains is left."""
    if rng.random() < SHARE_OF_GAINS:
        return -quantile(GAINS, rng.random() * (0.5 if world == "plateau" else 1))
    return quantile(LOSSES, rng.random())


def night(world, sigma, seed):
    """(true effects of the ideas in the order they come to mind, noise of the runs in the order they are made)"""
    rng = random.Random(seed)
    return iter([idea(rng, world) for _ in range(RUNS)]), iter([rng.gauss(0, sigma) for _ in range(RUNS)])


def lower_wins(ideas, errors, baseline_runs=verdict.BASELINE_RUNS):
    """(true val_bpb at the end, keeps, false keeps, experiments) where whatever measures lower is kept."""
    best = verdict.mean([next(errors) for _ in range(baseline_runs)])
    truth, keeps, false = 0.0, 0, 0
    for error, effect in zip(errors, ideas, strict=False):
        if truth + effect + error < best:
            best, truth, keeps, false = truth + effect + error, truth + effect, keeps + 1, false + (effect >= 0)
    return truth, keeps, false, RUNS - baseline_runs


def fixed_window(values, best, noise, price):
    """A simpler rule: below 0.3σ discard, above 3σ keep, between them the mean of two must gain 0.7σ."""
    gain = (best - verdict.mean(values)) / noise.sigma
    if len(values) == 1 and 0.3 <= gain <= 3:
        return verdict.Verdict("confirm", gain, "")
    return verdict.Verdict("keep" if gain > (3 if len(values) == 1 else 0.7) else "discard", gain, "")


def fixed_luck(values, failures, noise, baseline=False):
    return verdict.mean(values) + (0 if baseline else 0.8 * noise.sigma / math.sqrt(len(values)))


def by_fixed_window(ideas, errors):
    return by_verdict(ideas, errors, fixed_window, fixed_luck)


def by_verdict(ideas, errors, judge=verdict.judge, best_known=verdict.best_known):
    """The same by lab/analysis/verdict.py, fed as record feeds it."""
    baseline = [next(errors) for _ in range(verdict.BASELINE_RUNS)]
    first, kept, is_baseline, failures = verdict.mean(baseline), baseline, True, 0
    repeated = []  # the val_bpb of commits that ran twice; those that ran once say nothing about the noise
    truth, keeps, false, experiments, done = 0.0, 0, 0, 0, len(baseline)
    noise = verdict.noise(baseline, repeated)
    while done < RUNS:
        effect = next(ideas)
        values = [truth + effect + next(errors)]
        experiments, done = experiments + 1, done + 1
        best = best_known(kept, failures, noise, is_baseline)
        judged = judge(values, best, noise, verdict.price(first, best, done))
        if judged.status == "confirm" and done < RUNS:
            values.append(truth + effect + next(errors))
            done += 1
            repeated.append(values)
            noise = verdict.noise(baseline, repeated)
            best = best_known(kept, failures, noise, is_baseline)
            judged = judge(values, best, noise, verdict.price(first, best, done))
        if judged.status == "keep":
            kept, is_baseline, failures = values, False, 0
            truth, keeps, false = truth + effect, keeps + 1, false + (effect >= 0)
        else:
            failures += 1
    return truth, keeps, false, experiments


def compare(nights, seed=1, rule=by_verdict):
    """For each setting: world, σ, means (end, keeps, false keeps, experiments) of "lower wins" and of the verdict,
    how much lower the verdict ends with its standard error, and where "lower wins" ends whose baseline runs once.
    All of them see the same ideas and the same noise."""
    for world, sigma in SETTINGS:
        seeds = [f"{seed} {world} {sigma} {i}" for i in range(nights)]
        lower = [lower_wins(*night(world, sigma, s)) for s in seeds]
        ours = [rule(*night(world, sigma, s)) for s in seeds]
        once = [lower_wins(*night(world, sigma, s), baseline_runs=1)[0] for s in seeds]
        gains = [a[0] - b[0] for a, b in zip(lower, ours, strict=True)]
        means = [[verdict.mean(column) for column in zip(*rows, strict=True)] for rows in (lower, ours)]
        yield world, sigma, *means, verdict.mean(gains), statistics.stdev(gains) / nights**0.5, verdict.mean(once)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nights", type=int, default=10_000)
    parser.add_argument("--fixed-window", action="store_true")
    args = parser.parse_args()
    print("| gains | σ | lower wins | verdict | lower by | keeps | false keeps | runs/experiment | baseline once |")
    print("|---|---|---|---|---|---|---|---|---|")
    for world, sigma, lower, ours, gain, error, once in compare(args.nights, rule=by_fixed_window if args.fixed_window else by_verdict):
        print(
            f"| {world} | {sigma} | {1e3 * lower[0]:.2f} | {1e3 * ours[0]:.2f} | {1e3 * gain:.2f} ± {1e3 * error:.2f} "
            f"| {lower[1]:.1f} → {ours[1]:.1f} | {lower[2]:.2f} → {ours[2]:.2f} ({100 * (ours[2] / lower[2] - 1):+.0f} %) "
            f"| {RUNS / ours[3]:.2f} | {1e3 * once:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
