"""Simulated teams: what several GPUs that share one search reach, against one GPU for as many times the hours.

    uv run python tests/simulate_team.py                   200 nights a row
    uv run python tests/simulate_team.py --nights 50       a rougher one

Each member makes 100 runs, which take 0.95 to 1.05 units of time; members begin at different times. All of them draw
from one list of ideas and share one lab/analysis/verdict.py `Search`. An experiment is measured on the tip as it was
when the experiment began. If the tip is another one when it ends, it is kept only if it beats that one; if it would
have been kept on its own base only (a late gain), the same member tries the idea again on the new tip.
"""

import argparse
import heapq
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulate_nights import Nights, Setting  # noqa: E402

from lab.analysis import verdict  # noqa: E402

RUNS = 100  # of each member


class Team:
    """One night of a team. effects: true effects of the ideas, in the order of the list; sigma: of the noise."""

    def __init__(self, members, effects, sigma, rng, retry=True, runs=RUNS):
        self.effects, self.sigma, self.rng, self.retry = effects, sigma, rng, retry
        self.truths = [0.0]  # of the commits of the branch: the baseline, and the keeps
        self.search = verdict.begin(self.measure(0.0) for _ in range(verdict.BASELINE_RUNS))
        self.next_idea, self.tip_runs, self.keeps, self.late = 0, 0, 0, 0
        # The baseline's three runs are made once for the team, by three members if there are as many.
        ends = [(rng.uniform(0, 1), member) for member in range(members)]
        left = [runs - len(range(i, verdict.BASELINE_RUNS, members)) for i in range(members)]
        doing = [self.begin() for _ in range(members)]
        heapq.heapify(ends)
        while ends:
            at, member = heapq.heappop(ends)
            if not left[member]:
                continue
            left[member] -= 1
            doing[member] = self.end(doing[member])
            heapq.heappush(ends, (at + rng.uniform(0.95, 1.05), member))

    def measure(self, truth):
        return truth + self.sigma * self.rng.standard_normal()

    def begin(self, idea=None):
        """What a free member runs: the doubted tip, or the idea (the next of the list) on the tip."""
        if idea is None and not self.tip_runs and verdict.doubted(self.search):
            self.tip_runs += 1
            return dict(kind="tip", tip=len(self.truths) - 1, truth=self.truths[-1], keeps=self.keeps)
        if idea is None:
            idea, self.next_idea = self.next_idea, self.next_idea + 1
        truth = self.truths[-1] + self.effects[idea % len(self.effects)]
        return dict(kind="idea", idea=idea, truth=truth, values=[], base=self.search, keeps=self.keeps)

    def end(self, run):
        """A run has ended: the next one of this member."""
        value = self.measure(run["truth"])
        on_tip = run["keeps"] == self.keeps  # nobody has moved the tip since
        if run["kind"] == "tip":
            self.tip_runs -= 1
            if on_tip:
                self.search = verdict.remeasured(self.search, value)
                if not verdict.holds(self.search):
                    self.search, self.keeps = verdict.stepped_back(self.search), self.keeps + 1
                    self.truths.pop()
            return self.begin()
        run["values"].append(value)
        said = verdict.judge(self.search, run["values"])
        if said.status == "confirm" and on_tip:
            return run
        kept = said.status == "keep"
        late = not kept and not on_tip and verdict.judge(run["base"], run["values"]).status == "keep"
        self.search = verdict.ended(self.search, run["values"], kept, on_tip=on_tip)
        if kept:
            self.truths.append(run["truth"])
            self.keeps += 1
        if late and self.retry:
            self.late += 1
            return self.begin(run["idea"])
        return self.begin()


def play(members, nights, sigma=0.0007, ideas="full", seed=1):
    """{name: array of the gains of so many nights, in val_bpb}: the team, one member alone with as many runs as all of
    them, and side by side (the best of `members` nights of their own, each from the top of the same list)."""
    runs = RUNS * members
    source = Nights(Setting(ideas, sigma), runs, nights, seed)
    gains = {"team": [], "alone": [], "side by side": [], "without late gains": []}
    for i in range(nights):
        effects = source.effects[i]

        def rng(*more, i=i):
            return np.random.default_rng([seed, members, i, *more])

        gains["team"].append(-Team(members, effects, sigma, rng(0)).truths[-1])
        gains["without late gains"].append(-Team(members, effects, sigma, rng(0), retry=False).truths[-1])
        gains["alone"].append(-Team(1, effects, sigma, rng(1), runs=runs).truths[-1])
        own = [Team(1, effects, sigma, rng(2, member)) for member in range(members)]
        best = min(own, key=lambda night: verdict.belief(night.search))
        gains["side by side"].append(-best.truths[-1])
    return {name: np.array(values) for name, values in gains.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nights", type=int, default=200)
    parser.add_argument("--members", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--sigma", type=float, default=0.0007)
    parser.add_argument("--ideas", default="full")
    args = parser.parse_args()
    print("| members | one alone, as many runs | team | of that | late gains not tried again | side by side |")
    print("|---|---|---|---|---|---|")
    for members in args.members:
        found = play(members, args.nights, args.sigma, args.ideas)
        alone, team = found["alone"].mean(), found["team"]
        error = 1.96e3 * team.std() / len(team) ** 0.5
        print(
            f"| {members} | -{1e3 * alone:.1f} | **-{1e3 * team.mean():.1f}** ± {error:.1f} | {100 * team.mean() / alone:.0f} % "
            f"| -{1e3 * found['without late gains'].mean():.1f} | -{1e3 * found['side by side'].mean():.1f} |",
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
