"""lab night: starts an agent, starts it again, ends it, and leaves nothing running. Agents here are shell commands."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import kill_group

from lab.base import locks
from lab.base.processes import is_alive
from lab.keeper import night
from lab.machine import devices
from lab.store import names

ROOT = Path(__file__).resolve().parent.parent

# The command as `python -m lab night` runs it, with a clock that goes SPEED times as fast (argument 1), but a
# poll that takes longer than 50 ms counts as 50: on a busy machine the agent is slow too, and does not stand still.
NIGHT = """
import argparse, sys, time
from lab.base import processes
from lab.keeper import night
speed, patience = float(sys.argv.pop(1)), float(sys.argv.pop(1))
night.end_descendants = lambda: processes.end_descendants(patience)
parser = argparse.ArgumentParser(prog="lab night")
night.add_arguments(parser)
clock, woke = 0.0, time.monotonic()
def sleep(seconds):
    global clock, woke
    time.sleep(seconds / speed)
    clock, woke = clock + min(time.monotonic() - woke, max(0.05, seconds / speed)) * speed, time.monotonic()
raise SystemExit(night.run(parser.parse_args(), now=lambda: clock, sleep=sleep))
"""
# A training: it holds the directory, as prepare.begin_run does, in a session of its own, as an agent's tools may.
TRAIN = """
import fcntl, os, signal, sys, time
def preempted(*_):
    print("preempted", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, preempted)
fd = os.open(".", os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("up", flush=True)
time.sleep(float(sys.argv[1]))
print("val_bpb: 1.0", flush=True)
"""
RECORD = "echo '{}' >> runs.jsonl"
IN_BACKGROUND = "setsid {python} train.py {seconds} > run.log 2>&1 &"


class Tree:
    """A working tree with a night in it; everything in it is ended with the test."""

    def __init__(self, path):
        self.path, self.started = path, []
        (path / "constants.py").write_text("TIME_BUDGET, GRACE = 300, 300\n")
        (path / "train.py").write_text(TRAIN)

    def night(self, agent, *options, hours=8, speed=1000, patience=10):
        """The Popen of a night of `hours` that are 3600 / speed seconds long."""
        command = [sys.executable, "-c", NIGHT, speed, patience, "--hours", hours, "--agent", agent, *options]
        process = subprocess.Popen(
            list(map(str, command)), cwd=self.path, env=os.environ | {"PYTHONPATH": f"{self.path}:{ROOT}"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def through(self, *args, timeout=120, **kwargs):
        """A whole night: (exit status, night.log)."""
        process = self.night(*args, **kwargs)
        out, err = process.communicate(timeout=timeout)
        assert not err, err
        assert out == self.log(), "what it prints is not what it logs"
        return process.returncode, out

    def log(self):
        return self.read("night.log")

    def read(self, name):
        path = self.path / name
        return path.read_text() if path.exists() else ""

    def count(self, name):
        return len(self.read(name).splitlines())

    def training(self, seconds):
        return IN_BACKGROUND.format(python=sys.executable, seconds=seconds)

    def until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not come to pass; night.log:\n{self.log()}"
            time.sleep(0.01)

    def processes(self):
        """Command lines of what runs in this tree."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "cwd") == str(self.path):
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


@pytest.fixture
def tree(tmp_path):
    if not Path("/proc/self").exists():
        pytest.skip("the test looks for processes in /proc")
    path = tmp_path / "tree"
    path.mkdir()
    tree = Tree(path)
    yield tree
    for process in tree.started:
        kill_group(process)
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(path):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


# --- restarts -----------------------------------------------------------------


def test_what_an_agent_prints_is_logged_under_a_locale_that_lacks_its_characters(tree, monkeypatch):
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}.items():
        monkeypatch.setenv(name, value)
    status, log = tree.through(r"printf '\342\234\223 done\n'; exit 7", hours=0.2)
    assert status == 1 and "the agent ended with status 7: " in log and "✓ done\n" in log
    assert "the night ended by morning" in log


def test_an_agent_that_ends_is_started_again_until_the_hours_are_over(tree):
    status, log = tree.through(f"echo x >> starts; {RECORD}; sleep 0.2", hours=0.4)
    assert status == 0
    assert 3 <= tree.count("starts") <= 8  # 1.44 s, each start 0.2 s and its being noticed
    assert log.count("of the agent, process") == tree.count("starts") == tree.count("runs.jsonl")
    assert "recorded nothing" not in log  # so none of them waited
    assert "the night ended by morning" in log
    assert not tree.processes()


def test_an_agent_that_records_nothing_waits_longer_each_time_and_is_limited(tree):
    status, log = tree.through(
        "echo x >> starts; echo it is broken; exit 3", "--restarts", 5, hours=3, speed=4000
    )
    assert status == 1  # nothing was recorded all night
    waits = [int(s) for s in re.findall(r"recorded nothing: the next in (\d+) s", log)]
    assert waits[:4] == [10, 20, 40, 80]
    assert "5 such starts an hour are the limit" in log
    assert 9 <= tree.count("starts") <= 15  # five an hour, not one a second
    assert "the agent ended with status 3: it is broken" in log
    assert ", nothing recorded" in log


def test_the_waits_begin_anew_after_a_record(tree):
    agent = f"echo x >> starts; [ $(wc -l < starts) = 3 ] && {{ {RECORD}; sleep 1; }}; exit 0"
    _, log = tree.through(agent, hours=0.12, speed=200)
    waits = [int(s) for s in re.findall(r"recorded nothing: the next in (\d+) s", log)]
    assert waits[:4] == [10, 20, 10, 20]


def test_an_agent_that_only_records_crashes_does_not_spin(tree):
    """Each record takes a second: nothing was trained."""
    status, log = tree.through(f"echo x >> starts; {RECORD}; exit 0", hours=0.3, speed=400)
    assert status == 0
    waits = [int(s) for s in re.findall(r"that start was too short: the next in (\d+) s", log)]
    assert waits[:4] == [10, 20, 40, 80] and tree.count("starts") <= 8


def test_a_command_that_does_not_exist_is_given_up(tree):
    began = time.monotonic()
    status, log = tree.through("no-such-agent --please", hours=8, speed=100)
    assert status == 1
    assert log.count("of the agent, process") == 3
    assert "given up: the shell does not find this command" in log
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_stalled_agent_is_ended_with_its_training_and_started_again(tree):
    # The first start trains for ever, in another session, and never records; the second one records.
    agent = f"echo x >> starts; [ $(wc -l < starts) = 1 ] && {{ {tree.training(900)} sleep 900; }}; {RECORD}; sleep 900"
    night = tree.night(agent, speed=600)
    tree.until(lambda: tree.count("starts") == 2 and tree.count("runs.jsonl") == 1, seconds=120)
    assert "preempted" in tree.read("run.log")
    minutes = [int(m) for m in re.findall(r"nothing was recorded for (\d+) minutes", tree.log())]
    assert len(minutes) == 1 and 46 <= minutes[0] <= 60  # half an hour, and as long as a run may take
    night.terminate()
    night.communicate(timeout=60)
    assert not tree.processes()


def test_a_stalled_agent_that_trains_not_is_ended_after_half_an_hour(tree):
    _, log = tree.through("sleep 900", hours=0.7, speed=1000)
    minutes = [int(m) for m in re.findall(r"nothing was recorded for (\d+) minutes", log)]
    assert len(minutes) == 1 and 30 <= minutes[0] <= 40
    assert not tree.processes()


@pytest.mark.slow
def test_records_keep_a_slow_agent_from_being_stalled(tree):
    agent = f"while sleep 0.3; do {RECORD}; done"
    status, log = tree.through(agent, "--stall-minutes", 20, hours=0.8, speed=700)
    assert status == 0 and log.count("of the agent, process") == 1


def test_an_agent_that_feeds_workers_is_stalled_once_it_neither_proposes_nor_waits(tmp_path):
    """It records nothing itself. A wait in progress counts as a training in progress does."""
    clock, lab = [0.0], tmp_path / ".lab"
    lab.mkdir()
    keeper = night.Keeper(tmp_path, None, "agent", 8, 30, 6, lambda: clock[0], None)
    keeper.process, keeper.last, keeper.began = SimpleNamespace(poll=lambda: None), 0.0, 0.0
    keeper.state, keeper.fruitful = night.recorded(tmp_path), False
    for i, name in enumerate((names.PROPOSED, names.WAITED, names.WAITED, names.PROPOSED), 1):
        clock[0] += 29 * 60
        (lab / name).touch()
        os.utime(lab / name, (i, i))
        assert keeper.look() is None and keeper.fruitful, f"{name} is new"
    with locks.hold(lab / "waited.lock") as held:
        assert held
        clock[0] += 31 * 60
        assert keeper.look() is None, "it waits for the workers"
        clock[0] += night.LONGEST_RUN
        assert "nothing was recorded for 47 minutes" in keeper.look(), "no wait takes so long"
    clock[0] -= night.LONGEST_RUN
    assert "nothing was recorded for 31 minutes" in keeper.look()


def test_a_dead_agents_training_is_not_disturbed(tree):
    """The next agent starts when the training that the dead one left is over, and finds its log."""
    agent = f"cp run.log found; echo x >> starts; [ $(wc -l < starts) = 1 ] || {{ {RECORD}; sleep 900; }}; "
    agent += tree.training(1.5) + " sleep 0.5; kill -9 $$"
    tree.night(agent, speed=100)
    tree.until(lambda: tree.count("starts") == 2 and tree.count("runs.jsonl") == 1)
    assert tree.read("found") == "up\nval_bpb: 1.0\n"
    assert "what it started is still running: waiting for that" in tree.log()


def test_a_sample_in_the_making_is_finished(tree):
    agent = f"{RECORD}; (setsid sh -c 'sleep 0.7; echo text >> sample' &); exit 0"
    tree.night(agent, speed=50)
    tree.until(lambda: tree.count("runs.jsonl") >= 3)
    assert tree.count("sample") >= 2


def test_what_a_dead_agent_left_for_longer_is_ended(tree):
    agent = f"echo x >> starts; {RECORD}; (setsid sleep 931 &); [ $(wc -l < starts) = 1 ] || sleep 900"
    tree.night(agent, speed=100)
    tree.until(lambda: tree.count("starts") == 2)
    assert sum(command.startswith("sleep 931") for command in tree.processes()) <= 1


# --- the end ------------------------------------------------------------------


def test_the_agent_is_told_when_the_night_ends(tree):
    began = time.time()
    status, _ = tree.through(f"echo $AUTORESEARCH_NIGHT_ENDS >> ends; {RECORD}; sleep 0.2", hours=0.4)
    ends = [float(line) for line in tree.read("ends").split()]
    assert status == 0 and began + 1000 <= ends[0] <= time.time() + 1440  # of 1440 s, which pass a thousand times as fast


def test_a_training_in_progress_when_the_hours_are_over_ends_and_is_recorded(tree):
    agent = f"{sys.executable} train.py 2 > run.log 2>&1; sleep 0.3; {RECORD}; echo x >> ended; sleep 900"
    status, log = tree.through(agent, hours=0.05, speed=100)  # 1.8 s
    assert status == 0
    assert tree.read("run.log") == "up\nval_bpb: 1.0\n"
    assert tree.count("runs.jsonl") == tree.count("ended") == 1
    assert "waiting for the training in progress and its record" in log
    assert log.count("of the agent, process") == 1
    assert not tree.processes()


def test_an_agent_that_does_not_record_its_last_run_is_not_waited_for_for_ever(tree):
    agent = f"{sys.executable} train.py 1 > run.log 2>&1; sleep 900"
    began = time.monotonic()
    status, log = tree.through(agent, hours=0.03, speed=200)
    assert status == 1 and "the night ended by morning" in log
    assert time.monotonic() - began < 1 + 0.9 + 8
    assert not tree.processes()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_agent_and_training_at_once(tree, number, status):
    night = tree.night(f"{tree.training(900)} sh -c 'sleep 901' & sleep 902", speed=1)
    tree.until(lambda: "up" in tree.read("run.log"))
    began = time.monotonic()
    night.send_signal(number)
    night.communicate(timeout=60)
    assert night.returncode == status
    assert time.monotonic() - began < 5
    assert tree.read("run.log") == "up\npreempted\n"
    assert f"the night ended by {number.name}" in tree.log() and "the hours are over" not in tree.log()
    assert not tree.processes()


def test_what_a_dead_agent_left_in_another_session_is_still_in_reach(tree):
    if sys.platform != "linux":
        pytest.skip("only Linux lets a process adopt orphans")
    night = tree.night(f"{tree.training(900)} exit 1", speed=1)
    tree.until(lambda: "what it started is still running" in tree.log() and "up" in tree.read("run.log"))
    night.terminate()
    night.communicate(timeout=60)
    assert tree.read("run.log") == "up\npreempted\n" and not tree.processes()


def test_what_ignores_sigterm_is_killed(tree):
    night = tree.night("trap '' TERM; echo x > up; while true; do sleep 0.1; done", speed=1, patience=0.5)
    tree.until(lambda: tree.read("up"))
    night.terminate()
    night.communicate(timeout=60)
    assert "did not end by SIGTERM and were killed" in tree.log()
    assert not tree.processes()


def test_asked_twice_it_kills(tree):
    night = tree.night("trap '' TERM; echo x > up; while true; do sleep 0.1; done", speed=1, patience=60)
    tree.until(lambda: tree.read("up"))
    night.terminate()
    time.sleep(1.5)
    assert night.poll() is None
    night.terminate()
    night.communicate(timeout=60)
    assert night.returncode == 143 and not tree.processes()


def test_a_closed_terminal_does_not_end_the_night(tree):
    night = tree.night("sleep 900", speed=1)
    tree.until(lambda: "of the agent, process" in tree.log())
    night.stdout.close()
    night.send_signal(signal.SIGHUP)
    time.sleep(1.5)
    assert night.poll() is None
    night.terminate()
    night.wait(timeout=60)
    assert night.returncode == 143 and "the night ended by SIGTERM" in tree.log()


# --- several GPUs -------------------------------------------------------------


def test_a_gpu_of_amd_that_a_container_hides_is_not_counted(tmp_path):
    (tmp_path / "gpu_id").write_text("51234\n")
    assert devices.number(tmp_path / "gpu_id") == "51234"
    assert devices.number(tmp_path) == devices.number(tmp_path / "none") == "", "the kernel answers with an error"


@pytest.mark.parametrize(
    "visible, gpus, seen, said",
    [
        (None, 4, "0", "4 GPUs (nvidia-smi): trainings use CUDA_VISIBLE_DEVICES=0;"),
        (None, 1, "unset", ""),
        ("2,3", 4, "2,3", ""),
        ("", 4, "", ""),
    ],
)
def test_on_a_machine_with_several_gpus_the_agent_gets_one(tree, tmp_path, monkeypatch, visible, gpus, seen, said):
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    lines = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i})\n" for i in range(gpus))
    smi.write_text(f"#!/bin/sh\ncat <<END\n{lines}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    night = tree.night("echo ${CUDA_VISIBLE_DEVICES-unset} > seen; sleep 900", speed=1)
    tree.until(lambda: tree.read("seen"))
    assert tree.read("seen") == f"{seen}\n"
    assert said in tree.log() and ("trainings use" in tree.log()) == bool(said)
    night.terminate()
    night.communicate(timeout=60)


# --- one night a tree ---------------------------------------------------------


def test_two_nights_in_one_tree_are_refused(tree):
    first = tree.night("sleep 900", speed=1)
    tree.until(lambda: "of the agent, process" in tree.log())
    second = tree.night("echo x > second", speed=1)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert err == f"a night is already running in this tree: process {first.pid}\n"
    assert not tree.read("second") and first.poll() is None
    first.kill()  # leaves no lock behind
    first.wait()
    third = tree.night("echo x > third; sleep 900", speed=1)
    tree.until(lambda: tree.read("third"))
    assert tree.read(".lab/night.lock") == str(third.pid)


CLEAN = "rm -rf .lab night.log"  # as `git clean -fdx` does


def test_an_agent_that_cleans_the_tree_ends_no_night_and_frees_no_lock(tree):
    first = tree.night(f"echo x >> starts; {RECORD}; [ $(wc -l < starts) = 3 ] && exec sleep 900; {CLEAN}; sleep 0.3")
    tree.until(lambda: tree.count("starts") == 3 and tree.read(".lab/night.lock") == str(first.pid))
    assert "what it printed cannot be read (No such file or directory" in tree.log()
    second = tree.night("echo x > second", speed=1)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2 and not tree.read("second")
    assert err == f"a night is already running in this tree: process {first.pid}\n"
    first.terminate()
    first.communicate(timeout=60)
    assert first.returncode == 143 and not tree.processes()


def test_of_two_nights_the_one_that_lost_its_lock_ends_and_leaves_the_others_agent_alone(tree):
    """The lock was removed, and the second night came before the first one looked."""
    first = tree.night("sleep 900", speed=1)
    tree.until(lambda: "of the agent, process" in tree.log())
    first.send_signal(signal.SIGSTOP)
    (tree.path / ".lab" / "night.lock").unlink()
    second = tree.night("echo $$ > second; exec sleep 900", speed=1)
    tree.until(lambda: tree.read("second"))
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 2, err
    assert "another night has begun in this tree: this one ends" in tree.log()
    assert tree.read(".lab/night.lock") == str(second.pid) and second.poll() is None
    assert is_alive(int(tree.read("second"))) and sum(command.startswith("sleep 900") for command in tree.processes()) == 1


def test_a_file_that_vanishes_between_two_looks_is_no_record(tmp_path):
    nothing = [0, 0, 0, 0]
    assert night.recorded(tmp_path) == nothing and not night.unrecorded(tmp_path)
    (tmp_path / "run.log").write_text("x")
    assert night.unrecorded(tmp_path)

    class Vanishing(type(tmp_path)):
        def exists(self, **kwargs):  # it was there a moment ago
            return True

    assert night.recorded(Vanishing(tmp_path)) == nothing and night.unrecorded(Vanishing(tmp_path))


@pytest.mark.parametrize("options", [("--hours", "0"), ("--stall-minutes", "-1"), ("--restarts", "0")])
def test_senseless_options_are_refused(tree, options):
    night = tree.night("true", *options)
    _, err = night.communicate(timeout=60)
    assert night.returncode == 2 and len(err.splitlines()) == 1
    assert not tree.log()


def test_the_keeper_loads_no_torch(tree):
    code = "import sys, lab.keeper.night; assert not {'torch', 'numpy', 'psutil', 'filelock'} & set(sys.modules)"
    env = os.environ | {"PYTHONPATH": f"{tree.path}:{ROOT}"}
    subprocess.run([sys.executable, "-c", code], cwd=tree.path, env=env, check=True)


def test_what_the_agent_prints_is_kept_apart(tree):
    tree.through(f"echo many words; {RECORD}; sleep 900", hours=0.2, speed=1000)
    assert "many words" in tree.read(".lab/agent.log") and "many words" not in tree.log().split("agent: ")[0]
