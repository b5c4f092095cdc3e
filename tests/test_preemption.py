"""Whatever a night is killed by, and whenever: the same command goes on, and the morning finds what it would have
found. The interrupted commit is run again first."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed import NEVER, Killed, agent_command, kill_all, processes_in

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="the test looks for processes in /proc")


@pytest.fixture
def night(tmp_path):
    night = Killed(tmp_path)
    yield night
    kill_all(night.path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a night that nothing disturbs ends with, and how often it called git."""
    night = Killed(tmp_path_factory.mktemp("undisturbed"))
    night.start()
    try:
        assert night.wait()
    finally:
        night.kill()
    outcome = night.outcome()
    assert [row[1] for row in outcome["rows"]] == ["keep", "discard", "keep", "discard", "crash", "keep"]
    assert outcome["sigma"] and len(outcome["runs"]) == 3 + 6 and outcome["best"] == "0006"
    return outcome, len((night.place / "calls").read_text().splitlines())


def finish(night, undisturbed):
    """The night goes on to its end, as if nothing had been."""
    night.start()
    assert night.wait(), night.read(".lab/agent.log")[-2000:]
    night.kill()
    night.check()
    assert night.outcome() == undisturbed[0]


def through(night, undisturbed, rng, most):
    """A night that is killed again and again: at calls of git, or at times."""
    kills = 0
    while kills < most:
        how = rng.choice(["before", "locked", "after", "time", "time"])
        limit, seconds = rng.randint(5, 90), rng.uniform(0.2, 2.5)
        night.start(NEVER if how == "time" else limit, how)
        if night.wait(seconds if how == "time" else 60):
            break
        night.kill()
        kills += 1
    if night.keeper.poll() is None:
        night.kill()
    finish(night, undisturbed)
    return kills


def test_a_night_that_is_killed_at_ten_moments(night, undisturbed):
    assert through(night, undisturbed, random.Random(1), 10) >= 5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 8))
def test_a_night_that_is_killed_at_many_moments(night, undisturbed, seed):
    through(night, undisturbed, random.Random(seed), 60)
