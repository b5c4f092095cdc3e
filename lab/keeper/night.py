"""Keeps a night going: starts the agent's command, starts it again when it ends or stalls, ends it in the morning.

    uv run -m lab night --hours 8 --agent 'claude -p "Read program.md and follow it" --settings agents/claude.json'

Writes night.log (what the keeper did, a line each), .lab/agent.log (what the agent printed) and
.lab/night.lock (held while a night goes on in this tree; holds the keeper's process id).
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from datetime import datetime
from pathlib import Path

from constants import GRACE, TIME_BUDGET
from lab.base.errors import Refused
from lab.base.locks import run_in_progress, take
from lab.base.processes import adopt_orphans, descendants, end_descendants, reap, send
from lab.keeper import cleanup
from lab.store import names

HELP = "keep an agent at work for some hours: start it, restart it, end it in the morning"
DESCRIPTION = """\
Starts the agent's command in this tree, and starts it again when it ends, or when nothing was recorded
for --stall-minutes: it is then ended with all that it started, though a training in progress may finish
first. An agent that ends while its training goes on is started again when that training is over.

When the hours are over, a training in progress is not thrown away: it may end, and the agent has a few
minutes to record it. Then the agent and all that it started are ended. Ctrl-C or `kill` ends everything
at once: the training says "preempted" and counts as not run. Closing the terminal does not end a night.

After a start that recorded nothing, or was too short for an experiment, the next one waits, longer each
time, and there are at most --restarts of them an hour: a broken agent does not spin, and one whose model
is down for a while finds the night still there.

Exit status: 0 the hours are over; 1 nothing was recorded, or there is no such command; 2 another night is
at work in this tree, or the options are wrong; 130 stopped by Ctrl-C; 143 stopped by `kill`."""

LONGEST_RUN = TIME_BUDGET + 2 * GRACE + 60  # seconds; the run's own watchdog ends it sooner
SHORTEST = TIME_BUDGET / 2  # seconds: a shorter start can have made no experiment but one that crashed
TIME_TO_RECORD = 180  # seconds that the agent has, at the end of the night, to record a run that is over
TIME_FOR_LEFTOVERS = 60  # seconds that what an agent left behind may take, if it is no training
BACKOFF, LONGEST_BACKOFF = 10, 600  # seconds before the next start after one in vain, doubled each time
HOPELESS = 3  # starts in a row that the shell answers with 126 or 127: no such command
POLL = 1.0  # seconds


def add_arguments(parser):
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--agent", required=True, metavar="COMMAND", help="shell command that starts the agent")
    parser.add_argument("--hours", type=float, default=8, help="how long the night is (8)")
    parser.add_argument("--stall-minutes", type=float, default=30, help="without a record, before a restart (30)")
    parser.add_argument("--restarts", type=int, default=6, help="such starts an hour, at most (6)")


# ---------------------------------------------------------------------------------------------------
# The tree that the night is about


def recorded(root):
    """What grows with every recorded run: the sizes of runs.jsonl and results.tsv."""
    files = root / names.RUNS_JSONL, root / names.RESULTS_TSV
    return [path.stat().st_size if path.exists() else 0 for path in files]


def unrecorded(root):
    """Whether run.log was written after the last record."""
    log, runs = root / names.RUN_LOG, root / names.RUNS_JSONL
    return log.exists() and not (runs.exists() and runs.stat().st_mtime >= log.stat().st_mtime)


# ---------------------------------------------------------------------------------------------------
# The night


class Keeper:
    """One night in the tree `root`. now and sleep are injectable: a test's hours pass in seconds."""

    def __init__(self, root, agent, hours, stall_minutes, restarts, now, sleep):
        self.root, self.command, self.now, self.sleep = root, agent, now, sleep
        self.log, self.agent_log = root / names.NIGHT_LOG, root / names.LAB / names.AGENT_LOG
        self.end = now() + hours * 3600
        self.stall, self.restarts = stall_minutes * 60, restarts
        self.stopped_by = None  # the signal that ends the night early
        self.starts, self.not_found = 0, 0
        self.fruitless, self.in_a_row = deque(), 0  # when starts were in vain; how many of them in a row

    def say(self, sentence):
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {sentence}"
        with contextlib.suppress(OSError):  # a full disk
            with open(self.log, "a") as f:
                f.write(line + "\n")
        with contextlib.suppress(OSError):  # the terminal was closed; the log goes on
            print(line, flush=True)

    def signalled(self, number, frame):
        if self.stopped_by:  # asked twice: no more patience
            send(signal.SIGKILL, descendants(os.getpid()))
        self.stopped_by = number

    def over(self):
        return self.stopped_by or self.now() >= self.end

    def wait_while(self, busy, seconds):
        """Waits until busy() is false, the seconds are over, or the night is stopped."""
        until = self.now() + seconds
        while busy() and self.now() < until and not self.stopped_by:
            self.sleep(POLL)

    # --- the agent ---

    def start(self):
        cleanup.clear(self.root, self.say)
        self.starts += 1
        self.state, self.fruitful = recorded(self.root), False
        self.last = self.began = self.now()
        if self.agent_log.exists() and self.agent_log.stat().st_size > 100e6:
            os.replace(self.agent_log, self.agent_log.with_suffix(".log.1"))
        with open(self.agent_log, "ab", buffering=0) as f:
            with contextlib.suppress(OSError):  # a full disk
                f.write(f"\n--- start {self.starts}, {datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
            self.words_start = f.tell()
            self.process = subprocess.Popen(
                self.command, shell=True, cwd=self.root, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                start_new_session=True, env=os.environ | cleanup.environment(self.root),
            )  # fmt: skip
        self.say(f"start {self.starts} of the agent, process {self.process.pid}")

    def last_words(self):
        with open(self.agent_log, "rb") as f:
            f.seek(max(self.words_start, self.agent_log.stat().st_size - 400))
            words = " ".join(f.read().decode(errors="replace").split())
        return f": {words[-200:]}" if words else ", and printed nothing"

    def look(self):
        """Notes what was recorded; the sentence why the agent must be started again, or None."""
        status = self.process.poll()  # before the look at the files: its last record counts
        if (state := recorded(self.root)) != self.state:
            self.state, self.last, self.fruitful = state, self.now(), True
        if status is not None:
            self.not_found = self.not_found + 1 if status in (126, 127) else 0
            return f"the agent ended with status {status}{self.last_words()}"
        idle = self.now() - self.last
        if idle > self.stall and (idle > self.stall + LONGEST_RUN or not run_in_progress(self.root)):
            return f"nothing was recorded for {idle / 60:.0f} minutes: the agent is ended"
        return None

    def pause(self):
        """Seconds before the next start: none after one that recorded something and was no flash in the pan."""
        now = self.now()
        if self.fruitful and now - self.began >= SHORTEST:
            self.in_a_row = 0
            return 0
        self.fruitless.append(now)
        wait = min(BACKOFF * 2**self.in_a_row, LONGEST_BACKOFF)
        self.in_a_row += 1
        if len(self.fruitless) >= self.restarts:  # the next may come when the oldest of them is an hour old
            wait = max(wait, self.fruitless.popleft() + 3600 - now)
        return wait

    def end_agent(self):
        if killed := end_descendants():
            self.say(f"{killed} processes did not end by SIGTERM and were killed")

    # --- the night ---

    def between(self):
        """From the end of one agent to the start of the next."""
        if self.process.returncode is not None and reap():  # a training, perhaps, or a sample in the making
            self.say("what it started goes on: waiting for that")
            patience = self.now() + TIME_FOR_LEFTOVERS
            self.wait_while(lambda: reap() and (self.now() < patience or run_in_progress(self.root)), LONGEST_RUN)
        self.end_agent()
        if (wait := self.pause()) and not self.over():
            why = f", {self.restarts} such starts an hour are the limit" if wait > LONGEST_BACKOFF else ""
            vain = "took no time" if self.fruitful else "recorded nothing"
            self.say(f"that start {vain}: the next in {wait:.0f} s{why}")
            self.wait_while(lambda: not self.over(), wait)

    def last_run(self):
        """When the hours are over: a training in progress may end, and the agent record it."""
        if run_in_progress(self.root):
            self.say("the hours are over: waiting for the training in progress and its record")
            self.wait_while(lambda: run_in_progress(self.root), LONGEST_RUN)
        self.wait_while(lambda: self.process.poll() is None and unrecorded(self.root), TIME_TO_RECORD)

    def watch(self):
        """The night from start to end; its exit status."""
        self.say(f"night of {(self.end - self.now()) / 3600:.2f} hours, stop it with `kill {os.getpid()}`")
        self.say(f"agent: {self.command}")
        at_first = recorded(self.root)
        while not self.over():
            self.start()
            why = None
            while not self.over() and not (why := self.look()):
                self.sleep(POLL)
            if not why:
                if not self.stopped_by:
                    self.last_run()
                break
            self.say(why)
            if self.not_found >= HOPELESS:
                self.say("given up: the shell does not find this command, or may not run it")
                break
            self.between()
        self.end_agent()
        by = signal.Signals(self.stopped_by).name if self.stopped_by else "morning"
        nothing = recorded(self.root) == at_first
        self.say(f"the night ended by {by} after {self.starts} starts of the agent" + ", nothing recorded" * nothing)
        return 128 + self.stopped_by if self.stopped_by else int(nothing)


def run(args, now=time.monotonic, sleep=time.sleep):
    if args.hours <= 0 or args.stall_minutes <= 0 or args.restarts < 1:
        print("--hours and --stall-minutes must be above 0, --restarts at least 1", file=sys.stderr)
        return 2
    if sys.platform == "win32":
        raise Refused("a night needs Linux or macOS: on Windows run it in WSL, or start the agent by hand")
    root = Path.cwd()
    (root / names.LAB).mkdir(exist_ok=True)
    with open(root / names.LAB / names.NIGHT_LOCK, "a+") as lock:
        if not take(lock):
            lock.seek(0)
            print(f"a night is at work in this tree already: process {lock.read().strip()}", file=sys.stderr)
            return 2
        lock.truncate(0)
        with contextlib.suppress(OSError):  # a full disk
            print(os.getpid(), end="", file=lock, flush=True)
        adopt_orphans()
        keeper = Keeper(root, args.agent, args.hours, args.stall_minutes, args.restarts, now, sleep)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, keeper.signalled)
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # not SIG_IGN, which the agent would inherit
        try:
            return keeper.watch()
        finally:
            end_descendants()  # whatever happened: an agent without a keeper would go on for ever
