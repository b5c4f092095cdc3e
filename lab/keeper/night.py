"""Keeps an agent running for a night: starts its command, restarts it when it ends or stalls, ends it in the morning.

    uv run -m lab night --hours 8 --agent 'claude -p "Read program.md and follow it" --settings agents/claude.json'

Writes night.log (one line for each thing that the keeper did), .lab/agent.log (what the agent printed) and
.lab/night.lock (locked while a night runs in this tree; contains the keeper's process id).
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
from lab.base.errors import Refused, os_reason
from lab.base.locks import Kept, is_held, run_in_progress
from lab.base.processes import adopt_orphans, descendants, end, end_descendants, named, psutil, reap, send
from lab.keeper import cleanup
from lab.machine import devices
from lab.store import names

HELP = "keep an agent running for some hours: start it, restart it, end it in the morning"
DESCRIPTION = """\
Starts the agent's command in this tree, and starts it again when it ends, or when nothing was recorded
for --stall-minutes: then the agent and all that it started are ended, after a training in progress has
finished. If an agent ends while its training is running, the next start waits for that training.
Of an agent that feeds workers and records nothing itself, every `lab propose`, every return of `lab wait` and
every one refused because no worker runs its proposals counts as a record, and a `lab wait` in progress as a
training in progress.
On a machine with several GPUs, the trainings use the first, unless CUDA_VISIBLE_DEVICES is set.

When the hours are over, a training in progress may finish, and the agent has a few minutes to record it.
Then the agent and all that it started are ended. Ctrl-C or `kill` ends everything at once: the training
prints "preempted" and counts as not run. Closing the terminal does not end a night.

After a start that recorded nothing, or that was too short for an experiment, the next one waits, longer
each time, and there are at most --restarts of them an hour. So a broken agent does not restart in a tight
loop, and an agent whose model is unavailable for a while continues when the model is back.

Exit status: 0 the hours are over; 1 nothing was recorded, or there is no such command; 2 another night is
running in this tree, or the options are wrong; 130 stopped by Ctrl-C; 143 stopped by `kill`."""

LONGEST_RUN = TIME_BUDGET + 2 * GRACE + 60  # seconds; the run's own watchdog ends it sooner
SHORTEST = TIME_BUDGET / 2  # seconds: a shorter start has no time for a complete run
TIME_TO_RECORD = 180  # seconds that the agent has, at the end of the night, to record a finished run
TIME_FOR_LEFTOVERS = 60  # seconds that processes which an agent left running may take, unless one is a training
BACKOFF, LONGEST_BACKOFF = 10, 600  # seconds before the next start after one without result, doubled each time
FAILURES = 10  # in a row that the system may refuse (no memory, no process, a full table of files) before the night ends
HOPELESS = 3  # starts in a row that end with 126 or 127, with which a shell says that there is no such command
LARGEST_AGENT_LOG = 100e6  # bytes: a larger agent.log is set aside at the next start, so that it cannot fill the disk
POLL = 1.0  # seconds


def add_arguments(parser):
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--agent", required=True, metavar="COMMAND", help="shell command that starts the agent")
    parser.add_argument("--hours", type=float, default=8, help="length of the night (8)")
    parser.add_argument("--stall-minutes", type=float, default=30, help="minutes without a record before a restart (30)")
    parser.add_argument("--restarts", type=int, default=6, help="starts without result an hour, at most (6)")


# ---------------------------------------------------------------------------------------------------
# What was recorded in the tree


def recorded(root):
    """What changes with every step of an agent: the sizes in bytes of runs.jsonl and results.tsv, one of which grows with
    every recorded run, and, of an agent that feeds workers, when it proposed last, or found no worker
    for what it proposed, and when `lab wait` returned last, in ns."""
    sizes = [status_of(root / name) for name in (names.RUNS_JSONL, names.RESULTS_TSV)]
    times = [status_of(root / names.LAB / name) for name in (names.PROPOSED, names.WAITED)]
    return [s.st_size if s else 0 for s in sizes] + [s.st_mtime_ns if s else 0 for s in times]


def is_busy(root):
    """Whether a training is in progress in the tree, or a `lab wait`, which may take as long."""
    return run_in_progress(root) or is_held((root / names.LAB / names.WAITED).with_suffix(".lock"))


def unrecorded(root):
    """Whether run.log was written after the last record."""
    log, runs = status_of(root / names.RUN_LOG), status_of(root / names.RUNS_JSONL)
    return log is not None and not (runs and runs.st_mtime >= log.st_mtime)


def status_of(path):
    """The file's os.stat_result; None if it is not there, or was removed just now."""
    try:
        return path.stat()
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------------
# The night


class Keeper:
    """One night in the tree `root`, whose lock (Kept) is held. now and sleep are arguments so that the hours of a test
    pass in seconds."""

    def __init__(self, root, lock, agent, hours, stall_minutes, restarts, now, sleep):
        self.root, self.lock, self.command, self.now, self.sleep = root, lock, agent, now, sleep
        self.log, self.agent_log = root / names.NIGHT_LOG, root / names.LAB / names.AGENT_LOG
        self.end = now() + hours * 3600
        self.stall, self.restarts = stall_minutes * 60, restarts
        self.stopped_by = None  # the signal that ends the night early
        self.gpu = {}  # what selects one of several GPUs for the agent's trainings
        self.ousted = False  # another night has this tree's lock
        self.starts, self.not_found, self.failures = 0, 0, 0
        self.fruitless, self.in_a_row = deque(), 0  # times of starts without result; how many of them in a row

    def say(self, sentence):
        """Writes the sentence to night.log and to the terminal."""
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {sentence}"
        with contextlib.suppress(OSError):  # a full disk
            with open(self.log, "a", encoding="utf-8", errors="replace") as f:
                f.write(line + "\n")
        with contextlib.suppress(OSError):  # the terminal was closed, the log is still written
            print(line, flush=True)

    def signalled(self, number, frame):
        """Handler of SIGINT and SIGTERM."""
        if self.stopped_by:  # the second one: no more waiting
            send(signal.SIGKILL, descendants(os.getpid()))
        self.stopped_by = number

    def over(self):
        return not self.keeps_the_tree() or self.stopped_by or self.now() >= self.end

    def keeps_the_tree(self):
        """Whether no other night has begun in this tree. Takes the lock again where an agent has removed its file."""
        if not self.ousted and not self.lock.still_held():
            self.ousted = True
            self.say("another night has begun in this tree: this one ends")
        return not self.ousted

    def wait_while(self, busy, seconds):
        """Waits until busy() is false, the seconds have passed, or the night is stopped."""
        until = self.now() + seconds
        while busy() and self.now() < until and not self.stopped_by and not self.ousted:
            self.sleep(POLL)

    # --- the agent ---

    def start(self):
        self.last = self.began = self.now()
        self.process, self.fruitful = None, False
        cleanup.clear(self.root, self.say)
        self.starts += 1
        self.state = recorded(self.root)
        if self.agent_log.exists() and self.agent_log.stat().st_size > LARGEST_AGENT_LOG:
            os.replace(self.agent_log, self.agent_log.with_suffix(".log.1"))
        with open(self.agent_log, "ab", buffering=0) as f:
            with contextlib.suppress(OSError):  # a full disk
                f.write(f"\n--- start {self.starts}, {datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
            self.words_start = f.tell()
            ends = {names.NIGHT_ENDS: f"{time.time() + self.end - self.now():.0f}"}
            self.process = subprocess.Popen(
                self.command, shell=True, cwd=self.root, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                start_new_session=True, env=os.environ | cleanup.environment(self.root) | ends | self.gpu,
            )  # fmt: skip
        self.say(f"start {self.starts} of the agent, process {self.process.pid}")

    def last_words(self):
        """The end of what this start of the agent printed, as the end of a sentence."""
        try:
            with open(self.agent_log, "rb") as f:
                f.seek(max(self.words_start, self.agent_log.stat().st_size - 400))
                words = " ".join(f.read().decode(errors="replace").split())
        except OSError as error:
            return f", and what it printed cannot be read ({os_reason(error)})"
        return f": {words[-200:]}" if words else ", and printed nothing"

    def look(self):
        """Notes what was recorded. Returns a sentence that says why the agent must be started again, or None."""
        status = self.process.poll()  # before the files are read, so that its last record counts
        if (state := recorded(self.root)) != self.state:
            self.state, self.last, self.fruitful = state, self.now(), True
        if status is not None:
            self.not_found = self.not_found + 1 if status in (126, 127) else 0
            return f"the agent ended with status {status}{self.last_words()}"
        idle = self.now() - self.last
        if idle > self.stall and (idle > self.stall + LONGEST_RUN or not is_busy(self.root)):
            return f"nothing was recorded for {idle / 60:.0f} minutes: the agent is ended"
        return None

    def pause(self):
        """Seconds before the next start: 0 if the last one recorded something and was long enough for an experiment."""
        now = self.now()
        if self.fruitful and now - self.began >= SHORTEST:
            self.in_a_row = 0
            return 0
        self.fruitless.append(now)
        wait = min(BACKOFF * 2**self.in_a_row, LONGEST_BACKOFF)
        self.in_a_row += 1
        if len(self.fruitless) >= self.restarts:  # the next one waits until the oldest is an hour old
            wait = max(wait, self.fruitless.popleft() + 3600 - now)
        return wait

    def end_agent(self):
        ended = end_descendants()
        if ended.killed:
            self.say(f"{ended.killed} processes did not end by SIGTERM and were killed")
        if ended.left:
            self.say(f"{named(ended.left)} cannot be ended and may slow the trainings down")

    # --- the night ---

    def between(self):
        """From the end of one agent to the start of the next."""
        with contextlib.suppress(OSError):  # the next start looks again for what is left (cleanup.clear)
            if self.process and self.process.returncode is not None and reap():  # a training, or a sample in the making
                self.say("what it started is still running: waiting for that")
                patience = self.now() + TIME_FOR_LEFTOVERS
                self.wait_while(lambda: reap() and (self.now() < patience or run_in_progress(self.root)), LONGEST_RUN)
            self.end_agent()
        if (wait := self.pause()) and not self.over():
            why = f", {self.restarts} such starts an hour are the limit" if wait > LONGEST_BACKOFF else ""
            how = "was too short" if self.fruitful else "recorded nothing"
            self.say(f"that start {how}: the next in {wait:.0f} s{why}")
            self.wait_while(lambda: not self.over(), wait)

    def last_run(self):
        """After the hours are over: lets a training in progress finish, and the agent record it."""
        if run_in_progress(self.root):
            self.say("the hours are over: waiting for the training in progress and its record")
            self.wait_while(lambda: run_in_progress(self.root) and self.keeps_the_tree(), LONGEST_RUN)
        self.wait_while(lambda: self.process.poll() is None and unrecorded(self.root) and self.keeps_the_tree(), TIME_TO_RECORD)

    def one_start(self):
        """Starts the agent and waits. Returns why it must be started again; None when the night is over."""
        self.start()
        while not self.over():
            if why := self.look():
                self.failures = 0
                return why
            self.sleep(POLL)
        return None

    def watch(self):
        """Runs the night from start to end. Returns its exit status. Raises OSError if one start after another fails."""
        self.say(f"night of {(self.end - self.now()) / 3600:.2f} hours, stop it with `kill {os.getpid()}`")
        self.say(f"agent: {self.command}")
        self.gpu, sentence = devices.one_of_several()
        if sentence:
            self.say(sentence)
        at_first = recorded(self.root)
        while not self.over():
            try:
                why = self.one_start()
            except OSError as error:  # often it is over soon: another program has taken the memory
                self.failures += 1
                why = f"the keeper failed ({os_reason(error)}), {self.failures} times in a row: the agent is ended"
                if self.failures >= FAILURES:
                    self.say(f"given up: {why}")
                    raise
            if not why:
                if not self.stopped_by and not self.ousted:
                    self.last_run()
                break
            self.say(why)
            if self.not_found >= HOPELESS:
                self.say("given up: the shell does not find this command, or is not allowed to run it")
                break
            self.between()
        self.end_agent()
        by = signal.Signals(self.stopped_by).name if self.stopped_by else "another night" if self.ousted else "morning"
        nothing = recorded(self.root) == at_first
        self.say(f"the night ended by {by} after {self.starts} starts of the agent" + ", nothing recorded" * nothing)
        return 128 + self.stopped_by if self.stopped_by else 2 if self.ousted else int(nothing)


def run(args, now=time.monotonic, sleep=time.sleep):
    if args.hours <= 0 or args.stall_minutes <= 0 or args.restarts < 1:
        print("--hours and --stall-minutes must be above 0, --restarts at least 1", file=sys.stderr)
        return 2
    if sys.platform == "win32":
        raise Refused("a night needs Linux or macOS: on Windows run it in WSL, or start the agent by hand")
    psutil()  # refuses now if it is missing, and not in the middle of the night
    root = Path.cwd()
    (root / names.LAB).mkdir(exist_ok=True)
    with contextlib.closing(Kept(root / names.LAB / names.NIGHT_LOCK, str(os.getpid()))) as lock:
        if not lock.take():
            print(f"a night is already running in this tree: process {lock.path.read_text().strip()}", file=sys.stderr)
            return 2
        adopt_orphans()
        keeper = Keeper(root, lock, args.agent, args.hours, args.stall_minutes, args.restarts, now, sleep)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, keeper.signalled)
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # not SIG_IGN, which the agent would inherit
        try:
            return keeper.watch()
        except BaseException:  # whatever happened: an agent without a keeper would run without an end
            keeper.end_agent()
            raise
        finally:
            if not keeper.ousted and lock.still_held():  # or it would be the other night's agent
                end(lambda: cleanup.orphans(root))  # on macOS an orphan is not among the descendants
