"""The claims of docs/fleet.md about teams, on fewer nights than its table."""

import numpy as np
import pytest
from simulate_team import RUNS, Team, play

from lab.analysis import verdict


def night(members, effects, sigma, seed=1, runs=RUNS, **options):
    return Team(members, effects, sigma, np.random.default_rng(seed), runs=runs, **options)


@pytest.mark.parametrize("members", [1, 3, 8])
def test_each_member_makes_all_its_runs(members):
    team = night(members, np.full(5000, -0.01), 0.001, runs=20)
    assert team.search.runs == 20 * members


def test_gains_that_are_far_above_the_noise_are_all_kept_by_one_member():
    team = night(1, np.full(5000, -0.01), 0.0001, runs=50)
    ended = 50 - verdict.BASELINE_RUNS
    assert team.search.experiments == ended and team.truths[-1] == pytest.approx(-0.01 * ended)


def test_a_late_gain_is_tried_again_and_not_lost():
    """All ideas gain; without further attempts those that another keep overtook would be lost."""
    effects = np.full(5000, -0.01)
    again, lost = (night(8, effects, 0.0001, runs=40, retry=retry) for retry in (True, False))
    assert again.late > 50 and lost.late == 0
    assert again.next_idea < lost.next_idea  # the list lasts longer


def test_a_team_where_nothing_gains_ends_near_the_baseline():
    ends = [night(8, np.full(5000, 0.001), 0.0007, seed=s).truths[-1] for s in range(5)]
    assert np.mean(ends) < 0.001


@pytest.mark.slow
@pytest.mark.parametrize(("members", "nights", "share"), [(4, 60, 0.88), (16, 16, 0.65)])
def test_what_a_team_reaches_of_one_alone_with_as_many_runs(members, nights, share):
    found = {name: gains.mean() for name, gains in play(members, nights).items()}
    assert found["team"] >= share * found["alone"]
    assert found["team"] > 2 * found["side by side"]
