"""What the commands of lab rest on: locks, and processes that are found and ended, on every system."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.base import git, locks, processes
from lab.base.errors import Refused
from lab.keeper import night

fcntl = pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parent.parent
SLEEP = "import time; time.sleep(600)"

# --- locks --------------------------------------------------------------------


def test_a_file_system_without_locks_is_no_reason_to_stop(monkeypatch, tmp_path):
    asked = []

    def flock(f, how):
        asked.append(how)
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.one_at_a_time(tmp_path), locks.one_at_a_time(tmp_path):
        assert not locks.is_held(tmp_path / "lock")
    assert len(asked) >= 3 and (tmp_path / "lock").is_file()


def test_looking_at_a_lock_does_not_take_it_away_from_its_holder(tmp_path):
    lock = tmp_path / "lock"
    assert not locks.is_held(lock) and not lock.exists()
    with locks.hold(lock) as held:
        lock.write_text("1234")
        assert held and locks.is_held(lock)
        with locks.hold(lock, patience=0.1) as second:
            assert not second
        assert locks.is_held(lock) and lock.read_text() == "1234"  # the second has not emptied the file
    assert not locks.is_held(lock)


def test_a_lock_is_held_against_other_processes_and_released_when_its_holder_is_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from lab.base import locks\n"
    code += "with locks.one_at_a_time(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n" and locks.is_held(tmp_path / "lock")
    with pytest.raises(Refused, match="another record is running in this tree: wait for it to end"):
        with locks.one_at_a_time(tmp_path, patience=0.2):
            pass
    holder.kill()
    holder.communicate()
    assert not locks.is_held(tmp_path / "lock")
    with locks.one_at_a_time(tmp_path, patience=0.2):
        assert locks.is_held(tmp_path / "lock")


# --- processes ----------------------------------------------------------------


def test_processes_are_found_by_parent_and_zombies_are_not(tmp_path):
    """A shell with a child, and a child that has ended and that nobody has waited for."""
    zombie = subprocess.Popen(["true"])
    shell = subprocess.Popen(["sh", "-c", "sleep 623 & wait"])
    try:
        wait_for(lambda: processes.descendants(shell.pid))
        wait_for(lambda: not processes.is_alive(zombie.pid))
        (sleeping,) = processes.descendants(shell.pid)
        below = processes.descendants(os.getpid())
        assert {shell.pid, sleeping} <= set(below) and below.index(shell.pid) < below.index(sleeping)
        assert zombie.pid not in below and zombie.pid not in processes.children(os.getpid())
        assert processes.is_alive(shell.pid) and sleeping not in processes.children(os.getpid())
        assert processes.end(lambda: processes.descendants(shell.pid), patience=5) == (0, [])
        assert not processes.is_alive(sleeping)
    finally:
        zombie.wait()
        shell.kill()
        shell.wait()
    assert processes.descendants(shell.pid) == [] and not processes.is_alive(shell.pid)


def test_marked_processes_are_found_in_any_session_by_the_whole_value(tmp_path):
    value = f"{tmp_path}/a tree with=signs\udcff"
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    subprocess.run([sys.executable, "-c", code, SLEEP], env=os.environ | {"LAB_TEST_MARK": value}, check=True)
    other = subprocess.Popen([sys.executable, "-c", SLEEP], env=os.environ | {"LAB_TEST_MARK": value + "0"})
    try:
        (found,) = processes.marked("LAB_TEST_MARK", value)
        assert found not in (os.getpid(), other.pid)
        assert processes.end(lambda: processes.marked("LAB_TEST_MARK", value), patience=5) == (0, [])
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        processes.end(lambda: processes.marked("LAB_TEST_MARK", value), patience=0)


def test_a_process_that_looks_for_marked_ones_finds_neither_itself_nor_its_parent(tmp_path):
    """As an agent that starts `lab prove`, or a night in the window of a fleet: they would end themselves."""
    look = "import os; from lab.base.processes import marked; print(len(marked('LAB_TEST_MARK', os.environ['LAB_TEST_MARK'])))"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    env = os.environ | {"LAB_TEST_MARK": str(tmp_path)}
    for command in ([look], [parent, look]):
        done = subprocess.run([sys.executable, "-c", *command], env=env, cwd=ROOT, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("0\n", "")
    bystander = subprocess.Popen([sys.executable, "-c", SLEEP], env=env)
    try:
        done = subprocess.run([sys.executable, "-c", look], env=env, cwd=ROOT, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("1\n", "")
    finally:
        bystander.kill()
        bystander.wait()


def test_what_cannot_be_ended_is_given_up_and_named(monkeypatch):
    """A process in an uninterruptible sleep survives SIGKILL, and root's, of a sudo, gets no signal at all."""
    sent, root, stuck = [], 4_000_001, 4_000_002

    def kill(pid, number):
        if pid == root:
            raise PermissionError(1, "Operation not permitted")
        sent.append(number)

    monkeypatch.setattr(processes.os, "kill", kill)
    monkeypatch.setattr(processes, "AFTER_KILL", 0.2)
    assert processes.end(lambda: [stuck, root], patience=0.2) == (0, [root, stuck])
    assert sent[0] == signal.SIGTERM and set(sent[1:]) == {signal.SIGKILL}
    assert processes.named([root, stuck]) == "processes 4000001, 4000002" and processes.named([7]) == "process 7"


def test_without_psutil_a_night_is_refused_in_one_sentence_and_a_lock_of_git_is_kept(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(Refused, match="^psutil is not installed, .*: run `uv sync`$"):
        night.run(argparse.Namespace(hours=1, stall_minutes=1, restarts=1, agent="true"))
    lock = tmp_path / "index.lock"
    lock.touch()
    assert git.git_is_running(tmp_path) and not git.remove_stale(tmp_path, lock, patience=0.1) and lock.exists()


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
