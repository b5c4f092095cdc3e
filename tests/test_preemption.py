"""Whatever a night is killed by, and whenever: the same command goes on, and the morning finds what it would have
found. The interrupted commit is run again first."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed import NEVER, Killed, kill_all, processes_in

from lab.base import git, locks, processes
from lab.keeper import cleanup

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
    assert [row[1] for row in outcome["rows"]] == ["keep", "discard", "discard", "keep", "crash"]
    assert outcome["sigma"] and len(outcome["runs"]) == 3 + 1 + 2 + 2 and outcome["best"] == "0004"
    return outcome, len((night.place / "calls").read_text().splitlines())


def next_of(night):
    return night.lab("status").out.rpartition("next: ")[2].strip()


def in_a_run(night):
    """An experiment's commit has begun to run, after the baseline is recorded; its commit."""
    night.start()
    night.wait(until=lambda: "# effect" in night.read("train.py") and locks.run_in_progress(night.path))
    night.wait(until=lambda: "step 00000" in night.read("run.log"))
    return night.head()


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
        if night.wait(seconds if how == "time" else 200):
            break
        night.kill()
        kills += 1
    if night.keeper.poll() is None:
        night.kill()
    finish(night, undisturbed)
    return kills


@pytest.mark.slow
def test_a_night_that_is_killed_at_three_moments(night, undisturbed):
    assert through(night, undisturbed, random.Random(1), 3) == 3


@pytest.mark.slow
def test_a_night_that_is_killed_at_each_call_of_git_of_one_experiment(night, undisturbed):
    """Before, in the middle and after, from the agent's look at the state to the record of a discard."""
    night.start()
    night.wait(until=lambda: len(night.records()) == 3)
    night.kill()
    for limit in range(1, 120, 3):
        night.start(limit, ["before", "locked", "after"][limit // 3 % 3])
        if night.wait():
            break
        night.kill()
    night.kill()
    finish(night, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 8))
def test_a_night_that_is_killed_at_many_moments(night, undisturbed, seed):
    through(night, undisturbed, random.Random(seed), 60)


# --- what it was killed by ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "preempted"])
def test_the_interrupted_commit_is_run_again_first(night, undisturbed, how):
    night.night_env["FAKE_EFFECT_SECONDS"] = "60"
    commit = in_a_run(night)
    if how == "preempted":
        night.keeper.send_signal(signal.SIGTERM)
        assert night.keeper.wait(timeout=30) == 143
        assert not processes_in(night.path)
    night.kill()
    assert night.head() == commit and len(night.records()) == 3
    assert next_of(night) == f"the last run was {how}, it is no result: uv run train.py > run.log 2>&1"
    night.night_env["FAKE_EFFECT_SECONDS"] = "0.1"
    night.start()
    night.wait(until=lambda: len(night.records()) == 4)
    night.kill()
    assert night.records()[3]["commit"] == commit
    if how == "killed":
        finish(night, undisturbed)


def test_an_agent_that_outlived_its_keeper_is_ended_before_the_next_one_starts(night):
    night.night_env["FAKE_SECONDS"] = "30"
    night.start()
    night.wait(until=lambda: "step 00000" in night.read("run.log") or "run: {" in night.read("run.log"))
    night.keeper.kill()
    night.keeper.wait()
    outlived = processes_in(night.path)
    assert len(outlived) >= 2  # the agent, and the training that it waits for
    bystander = subprocess.Popen(["sleep", "621"], cwd=night.path)  # somebody else's, in the same tree
    night.start()
    night.wait(until=lambda: night.read("night.log").count("of the agent, process") == 2)
    left = processes_in(night.path)
    assert not set(outlived) & set(left) and bystander.pid in left
    assert "processes that outlived the night that started them" in night.read("night.log")
    bystander.kill()
    bystander.wait()


def test_locks_of_a_killed_git_are_removed_and_those_of_a_living_one_are_not(night):
    private, shared = (
        night.path / ".git" / "index.lock",
        night.path / ".git" / "refs" / "heads" / "autoresearch" / "test.lock",
    )
    said = []
    with open(night.place / "git", "w") as f:
        f.write("#!/bin/sh\nread forever\n")
    os.chmod(night.place / "git", 0o755)
    for lock in (private, shared):
        lock.touch()
    busy = subprocess.Popen([night.place / "git"], cwd=night.path, stdin=subprocess.PIPE)  # its name is git
    until_named(busy, "git")
    cleanup.clear(night.path, said.append)
    assert private.exists() and shared.exists() and said == []
    busy.kill()
    busy.wait()
    cleanup.clear(night.path, said.append)
    assert not private.exists() and not shared.exists()
    assert sorted(said) == [f"removed {name}.lock, which a killed git had left" for name in ("index", "test")]


def until_named(process, name):
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process.pid}/comm").read_text().strip() != name:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lock_that_comes_and_goes_is_left_alone(night, monkeypatch):
    lock = night.path / ".git" / "index.lock"
    lock.touch()
    seen = iter(range(100))
    monkeypatch.setattr(git, "identity", lambda path: next(seen))
    assert git.remove_stale(night.path, lock) and lock.exists()


def test_a_commit_that_was_killed_before_it_wrote_the_index_is_discarded_whole(night):
    """git moves the branch first and the index last."""
    night.baseline()
    index = (night.path / ".git" / "index").read_bytes()
    before = night.read("train.py")
    night.change_train(before + "# worse\n")
    night.commit("worse")
    (night.path / ".git" / "index").write_bytes(index)
    night.run(1.05)
    assert night.recorded("worse").verdict == "discard"
    assert night.read("train.py") == before and night.git("status", "--porcelain") == ""


def test_a_full_disk_ends_no_keeper(night):
    for name in ("night.log", ".lab/agent.log"):
        (night.path / name).parent.mkdir(exist_ok=True)
        (night.path / name).symlink_to("/dev/full")  # never read it: it has no end
    night.start()
    deadline = time.monotonic() + 30
    while not (night.path / "run.log").exists():
        assert time.monotonic() < deadline and night.keeper.poll() is None, (night.place / "out").read_text()
        time.sleep(0.02)
    assert "start 1 of the agent" in (night.place / "out").read_text()
    night.keeper.terminate()
    assert night.keeper.wait(timeout=30) == 143


FAILING = """
import sys; from lab import __main__; from lab.keeper import night
def look(self): raise OSError(5, 'input or output is wrong')
night.Keeper.look, night.BACKOFF, night.FAILURES = look, 0, 2
sys.exit(__main__.main())
"""


def test_a_keeper_that_fails_leaves_no_agent_behind(night):
    """It tries again, as the reason may be gone; then it ends."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", FAILING, "night", "--agent", "sleep 622"], cwd=night.path, env=night.night_env,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3 and "input or output is wrong" in done.stderr
    assert time.monotonic() - began < 2 * processes.PATIENCE  # SIGTERM reached what the shell was just starting
    assert not processes_in(night.path)
    log = night.read("night.log")
    assert log.count("of the agent, process") == 2 and "given up: the keeper failed (input or output is wrong), 2 times in a row" in log


def test_a_start_that_the_system_refuses_is_tried_again(night):
    """As with EAGAIN for want of processes, or ENOMEM; the agent of the second start records."""
    code = """
import subprocess, sys; from lab import __main__; from lab.keeper import night
real, calls = subprocess.Popen, []
def popen(command, *args, **kwargs):
    if kwargs.get("shell"):
        calls.append(command)
        if len(calls) in (1, 2, 4):
            raise BlockingIOError(11, "Resource temporarily unavailable")
    return real(command, *args, **kwargs)
subprocess.Popen, night.BACKOFF, night.FAILURES, night.SHORTEST = popen, 0.01, 3, 0
sys.exit(__main__.main())
"""
    agent = "echo '{}' >> runs.jsonl; echo x >> starts; [ $(wc -l < starts) = 1 ] || sleep 622"
    keeper = subprocess.Popen(
        [sys.executable, "-c", code, "night", "--agent", agent], cwd=night.path, env=night.night_env,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while night.read("starts") != "x\nx\n":
            assert time.monotonic() < deadline and keeper.poll() is None, keeper.communicate()
            time.sleep(0.02)
    finally:
        keeper.terminate()
        keeper.communicate(timeout=60)
    log = night.read("night.log")
    assert [int(n) for n in re.findall(r"Resource temporarily unavailable\), (\d) times in a row", log)] == [1, 2, 1]
    assert keeper.returncode == 143


def test_an_agents_git_is_told_to_be_sure_and_keeps_what_else_it_was_told(monkeypatch, tmp_path):
    given = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Some One"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    env = os.environ | cleanup.environment(tmp_path)
    for key, value in [("user.name", "Some One"), *cleanup.GIT_SETTINGS.items()]:
        shown = subprocess.run(["git", "config", key], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert shown.stdout.strip() == value
    assert env["AUTORESEARCH_NIGHT"] == os.path.realpath(tmp_path)


def test_neither_a_signature_nor_an_editor_stops_an_agent(night):
    """A person's settings, under which a commit by hand fails, or waits."""
    for key, value in [("commit.gpgsign", "true"), ("tag.gpgsign", "true"), ("gpg.program", "false"), ("core.editor", "false")]:
        night.git("config", key, value)
    by_hand = night.env | {"GIT_EDITOR": "false"}
    of_an_agent = by_hand | cleanup.environment(night.path)
    night.change_train(night.read("train.py") + "# wider\n")
    for words in (["commit", "-qm", "wider", "train.py"], ["commit", "--amend"], ["revert", "HEAD"], ["tag", "-a", "-m", "x", "night"]):
        command = ["git", *night.who, *words]
        assert subprocess.run(command, cwd=night.path, env=by_hand, capture_output=True).returncode, f"{words} works by hand too"
        if words[0] == "revert":
            night.git("reset", "-q", "--hard")  # it stopped half-way
        done = subprocess.run(command, cwd=night.path, env=of_an_agent, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
