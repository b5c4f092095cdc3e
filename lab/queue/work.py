"""A worker: takes proposals from the team's queue one after the other, runs them, records them, and says what came of it.

    git worktree add -b autoresearch/nov21-w1 ../w1 && cd ../w1 && uv run -m lab work --hours 8

It needs a working tree of its own, which nobody else edits, and one GPU. Writes run.log, what `lab record` writes, night.log
(one line for each thing that it did) and .lab/worker.lock (locked while it runs; contains its name in the team). It holds .lab/night.lock as well, as an agent's night
does: one tree, one of them.

Killed at any moment it loses at most the run in progress: what it had claimed is in the queue, what it had recorded is in
git, and the next start in this tree, or another worker, finds both.
"""

import argparse
import contextlib
import ctypes
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from constants import GRACE, TIME_BUDGET
from lab.analysis import verdict
from lab.analysis.history import label
from lab.base import files, locks
from lab.base.errors import Again, Refused, Stop, os_reason
from lab.base.git import GitError
from lab.base.processes import psutil
from lab.base.text import one_line
from lab.keeper import cleanup
from lab.loop import adopt, checks, record
from lab.queue.board import LONGEST, Board, machine, now
from lab.queue.bring import bring
from lab.queue.propose import member_of
from lab.share import exchange
from lab.share.membership import membership, remote_of
from lab.share.queue_refs import Item
from lab.share.team import team_night
from lab.store import ends, journal, names, rules, run_log
from lab.store.repository import Repo

HELP = "run the team's proposals on this GPU, one after the other (a worker)"
DESCRIPTION = """\
Takes the oldest proposal of the team's queue, brings it onto the team's best, runs train.py into run.log, records it as
`lab record` does, repeats what the rule wants repeated, tries a late gain again, and takes the next. If the team has no
baseline yet, it measures that first. A proposal that conflicts with the team's best goes back to its proposer.

Start it in a working tree of its own, on a branch autoresearch/..., one for each GPU. Trainings run in the sandbox if
bubblewrap works here (--no-sandbox: not). SIGTERM and Ctrl-C end it at once: the training prints "preempted", and its
proposal goes back into the queue. When the hours are over, it completes the proposal that it has.

Exit status: 0 the hours are over; 1 refused, or stopped because this machine failed 5 proposals in a row; 130 stopped by
Ctrl-C; 143 stopped by `kill`."""

FIRST_SEED = 42  # the seed of a run that names none
SPREAD = 2  # workers: for as many more, a worker chooses among one more of the oldest proposals
PACKED_AFTER = 50  # proposals, after which git may pack what they made
CROWD = 4  # workers: fewer always take the oldest
FAULTS = 5  # proposals in a row that failed because of this machine: then the worker stops
ATTEMPTS = 3  # times that workers fail a proposal before it goes back
RERUNS = 3  # times that a run that was ended from outside is run again
ROUNDS = 3  # times that an experiment is brought onto a newer best: a late gain is tried again
POLL, REMOTE_POLL = 1.0, 15.0  # seconds between two looks at an empty queue; a remote may have to serve many workers
SIGN_OF_LIFE = LONGEST / 4  # seconds between two of them while there is nothing to run
BACKOFF, LONGEST_BACKOFF = 5, 60  # seconds before the next attempt after an error, doubled each time
RECORD_SECONDS = 120  # that recording a run may take: part of LONGEST
CLAIM_SECONDS = 30  # between a claim and its run, else it is renewed
KILL_WAIT = 20  # seconds between SIGTERM and SIGKILL for a training
OWN_TREE = ("next:", "then:", "closed:", "left:", "note:", "best:", "noise:", "keep below", "time:")  # lines of record that are the worker's affair
RUN_LIMIT = TIME_BUDGET + 2 * GRACE + 60  # seconds; the run's own watchdog ends it sooner


def add_arguments(parser):
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--hours", type=float, default=8, help="how long it takes new proposals (8)")
    parser.add_argument("--no-sandbox", action="store_true", help="run trainings without the sandbox")
    parser.add_argument(
        "--ideas", action="store_true",
        help="run although device, rules or data are not those of the team's first run: results are ideas to the others",
    )  # fmt: skip


class Fault(Exception):
    """A run failed for a reason of this machine, not of train.py."""


class Lost(Exception):
    """Another worker has the claim: this one was taken for dead. What it ran is discarded."""


class Stopped(Exception):
    """A signal asks for the end."""


class Hopeless(Exception):
    """Nothing that this worker could run would be of use."""


class Worker:
    def __init__(self, repo, member, hours, ideas=False, command=None, board=None, now=time.monotonic, sleep=time.sleep):
        """command: what runs a training. now, sleep: for tests."""
        self.repo, self.member, self.ideas, self.tag = repo, member, ideas, repo.tag()
        repo.tag = lambda: self.tag  # git is asked a dozen times for one proposal otherwise; each record asks it again
        self.command = command or [sys.executable, names.TRAIN]
        self.board = board or Board(repo, member)
        self.now, self.sleep = now, sleep
        self.end = now() + hours * 3600
        self.stopped_by, self.training = None, None
        self.faults = []  # why the last proposals failed, since the last that did not
        self.said, self.signed = None, float("-inf")
        self.shown = None, 0.0, 0.0  # the claim by which others see last that this worker is alive, when it was made by two clocks
        self.done = 0
        self.own = None  # see own_night
        self.behind = False  # whether catch_up did not see what others have decided
        self.identity = {
            "worker": member.name, "worker_branch": self.tag, "host": os.uname().nodename if hasattr(os, "uname") else "",
            "machine": machine(), "tree": str(repo.top.resolve()),
        }  # fmt: skip

    def say(self, sentence, once=False):
        """Writes the sentence to night.log and to the terminal; `once`: not twice in a row."""
        if once and sentence == self.said:
            return
        self.said = sentence
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {sentence}"
        with contextlib.suppress(OSError):  # a full disk
            with open(self.repo.top / names.NIGHT_LOG, "a", encoding="utf-8", errors="replace") as f:
                f.write(line + "\n")
        with contextlib.suppress(OSError):  # the terminal was closed
            print(line, flush=True)

    def signalled(self, number, frame=None):
        if self.stopped_by and self.training:  # the second one: no more waiting
            kill(self.training, signal.SIGKILL)
        self.stopped_by = number
        if self.training:
            kill(self.training, signal.SIGTERM)

    def over(self):
        return self.stopped_by or self.now() >= self.end

    def pause(self, seconds):
        until = self.now() + seconds
        while self.now() < until and not self.stopped_by:
            self.sleep(min(0.2, seconds))

    def patiently(self, change, patient=True):
        """Calls change() until it neither runs out of disk nor misses the remote; what it returns. Raises Stopped. patient=False:
        it is called once, and what it raises is raised. If another remote was configured meanwhile, the next call goes there."""
        wait = BACKOFF
        while True:
            try:
                return change()
            except (Stop, OSError) as error:
                if not patient or isinstance(error, Refused) or isinstance(error, Again):
                    raise
                if self.stopped_by or self.now() > self.end + LONGEST:
                    raise Stopped from None
                self.say(f"it is tried again every {LONGEST_BACKOFF} s: {sentence_of(error)}", once=True)
            self.pause(wait)
            wait = min(2 * wait, LONGEST_BACKOFF)
            if self.member.remote:  # dead or mistyped, and by now another one is configured; a first one: swap takes the claim there
                self.follow()

    # --- the queue ---

    def follow(self):
        """Takes over the team's remote, if another one was configured since the last call, or none any more. Whether so."""
        try:
            if remote_of(self.repo) == self.member.remote:
                return False
            member = membership(self.repo)
        except (Stop, OSError):  # the old one is good enough until git answers
            return False
        if not member or member[:2] != self.member[:2] or member.remote == self.member.remote:
            return False
        self.member = self.repo.member = self.board.member = member
        self.board.refs, self.behind = None, True
        self.say(f"from now on the team shares through {exchange.clean(member.remote) if member.remote else 'this checkout alone'}")
        return True

    def taken_along(self, refs):
        """Takes what is only here to a remote that is new, and raises Stop as long as it does not have these refs."""
        queue = self.board.look(fresh=0)
        left = [item for item in (*queue.items, *queue.slots, *queue.workers) if item.unpublished and item.ref in refs]
        if self.board.note or left:
            raise Stop(self.board.note or "the remote did not take this worker's claim")

    def team(self, refs=None):
        """The Team of what compares with most of its runs, which this worker's must; with --ideas, with its own, and nothing
        does before its first run has said which device it has. refs: the team's refs, if just read."""
        own = self.own_night()
        if not self.ideas:
            return team_night(self.repo, self.member, self.tag, own.records, refs=refs)
        team, log = checks.team_of(self.repo, own), run_log.read(self.repo.top / names.RUN_LOG)
        return team if own.first or log and log.header else team.comparing(None)

    def own_night(self):
        """The Night of this branch, which only this worker continues."""
        if self.own is None:
            self.own = checks.night_of(self.repo)
        return self.own

    def change(self, item, publish=False, patient=True, **changes):
        """Moves the item to its state with these changes; the Item as it is then. publish: what was recorded goes to the
        remote in the same push. patient: see patiently. Raises Lost if the item is not as it was."""
        began = self.now(), time.time()
        parent = item.state["experiment"] or "HEAD"
        commit, state = self.patiently(lambda: self.board.written(item.state, parent, **changes), patient)
        if not self.swap([(item.ref, commit, item.commit)], publish, patient):
            raise Lost
        self.shown = commit, *began
        return item._replace(commit=commit, state=state)

    def swap(self, changes, publish=False, patient=True):
        """Board.swap, for as long as it takes. publish, patient: see change; if the remote does not take both at once, what was recorded
        goes there by itself."""
        if not self.member.remote and self.follow():  # the claim may be there by now, and nothing that runs is lost
            self.patiently(lambda: self.taken_along([ref for ref, _, _ in changes]), patient)
        refused = False
        if publish and self.member.remote:
            with contextlib.suppress(Stop, OSError):
                if self.board.swap(changes, publish=True):
                    return True
                refused = True  # the item was lost: nothing is published before catch_up has looked who has it
            if not refused:
                self.publish()
        done = self.patiently(lambda: self.board.swap(changes), patient)
        if done and publish:  # it may not be where the item is
            self.publish()
        return done

    def publish(self):
        """Pushes what was recorded. If that fails, the next push takes it along."""
        if note := exchange.pushed(self.repo, self.member):
            self.say(note, once=True)

    def claim(self, item, doing="begins", **changes):
        """The Item as this worker's; None if another was faster. Raises GitError if the remote does not take it, or does not
        answer: should it have it, it is the first that this worker tries next."""
        attempt = {"attempt": secrets.token_hex(8), "renewed": 0, "doing": doing, "since": now()}
        with contextlib.suppress(Lost):
            return self.change(item, patient=False, kind="claimed", verdict="", **self.identity, **attempt, **changes)
        return None

    def age(self, item):
        """Seconds since this worker last showed by this claim that it is alive; the larger number of two clocks, as one of
        them stops while the machine sleeps and the other may be set."""
        commit, *began = self.shown
        return max(self.now() - began[0], time.time() - began[1]) if commit == item.commit else float("inf")

    def is_held(self, item):
        """Whether this worker certainly has the claim, and for long enough to record a run: it was renewed a while before
        anybody may think it void, and just now it is what the others see."""
        return self.age(item) < LONGEST - RECORD_SECONDS and self.board.has(item)

    def renew(self, item, doing, code):
        """Shows that this worker is alive, and finds out whether the others think so. Raises Lost."""
        return self.change(item, renewed=item.state["renewed"] + 1, doing=doing, running=code, since=now())

    def slot(self, queue, id, task, description):
        """A claim on a run that nobody proposed; None if another worker has it."""
        ref, there = names.queue_ref(self.member.team, id), queue.find(id)
        if there and not self.is_mine(there) and not self.board.is_void(there):
            return None
        commit, state = self.board.written(
            {}, "HEAD", kind="claimed", task=task, description=description, attempt=secrets.token_hex(8), since=now(),
            doing="begins", **self.identity,
        )  # fmt: skip
        if not self.patiently(lambda: self.board.swap([(ref, commit, there and there.commit)])):
            return None
        return Item(id, ref, commit, state, False)

    def drop(self, item, publish=False):
        """Removes a claim on a run that nobody proposed. publish: as of change."""
        if not self.swap([(item.ref, None, item.commit)], publish) and publish:
            self.publish()

    def is_mine(self, item):
        return item.state["worker"] == self.member.name

    def free(self, queue, late=()):
        """Proposals that may be taken, oldest first; those that failed here come last. late: commits whose gain was a late one;
        a proposal that was told as a keep by one of them, as two workers judged at the same time, is tried again."""
        found = [item for item in queue.of("open") if not item.unpublished]
        found += [item for item in queue.of("claimed") if self.is_mine(item) or self.board.is_void(item)]
        found += [item for item in queue.of("decided") if item.state["verdict"] == "keep" and item.state["commit"] in late]
        return sorted(found, key=lambda item: (not self.is_claimed_here(item), self.failed_here(item), item.state["seq"], item.id))

    def is_claimed_here(self, item):
        return item.kind == "claimed" and self.is_mine(item)

    def failed_here(self, item):
        return any(line.startswith(f"{self.tag}: ") for line in item.state["failed"])

    def sign(self, queue):
        """Shows from time to time that this worker is there, while it has nothing to run."""
        if self.now() - self.signed < SIGN_OF_LIFE:
            return
        ref = names.queue_ref(self.member.team, f"worker-{self.member.name}")
        there = queue.find(f"worker-{self.member.name}")
        commit, _ = self.board.written({}, "HEAD", kind="worker", task="worker", since=now(), **self.identity)
        if self.board.swap([(ref, commit, there and there.commit)]):
            self.signed = self.now()

    # --- the tree ---

    def tidy(self, team):
        """Takes an experiment that was not recorded off the branch, as a killed worker or a lost claim leaves it."""
        if not self.repo.train_is_committed():
            self.repo.git("checkout", "--quiet", "HEAD", "--", names.TRAIN)
        if team.best and names.sha256(self.repo.top / names.TRAIN) == team.best["code"]:
            return
        with contextlib.suppress(checks.NotBased):
            place = checks.place(self.repo, self.own_night(), team)
            if place.edits:
                self.repo.drop(place.edits)

    def stand_on_best(self, team):
        """Makes train.py that of the team's best."""
        self.tidy(team)
        if names.sha256(self.repo.top / names.TRAIN) != team.best["code"]:
            adopt.adopt(self.repo, team)

    def put(self, item, brought, best):
        """Commits the experiment on this branch, under its author's name."""
        state = item.state
        blob = self.repo.git("hash-object", "-w", "--stdin", stdin=brought.content).strip()
        author = (self.repo.ask("show", "--no-patch", "--format=%an%x00%ae", state["experiment"]) or "").split("\0")
        title = one_line(state["description"], adopt.TITLE)
        message = f"{title}\n\nproposed by {state['branch']}, proposal {item.id}\n"
        record.name_author(self.repo)
        if not self.repo.restore(best["blob"], blob, message, author if len(author) == 2 and all(author) else None):
            raise Refused("the branch was changed by somebody else: a worker needs a working tree of its own")

    # --- a run ---

    def train(self, seed):
        """One run of train.py into run.log; its exit status."""
        env = {k: v for k, v in os.environ.items() if k != "AUTORESEARCH_SEED"} | cleanup.environment(self.repo.top)
        env |= {"AUTORESEARCH_SEED": str(seed)} if seed else {}
        with open(self.repo.top / names.RUN_LOG, "wb") as log:
            if self.stopped_by:
                raise Stopped
            self.training = subprocess.Popen(
                self.command, cwd=self.repo.top, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                start_new_session=True, preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
        process, limit, asked = self.training, self.now() + RUN_LIMIT, None
        try:
            if self.stopped_by:  # a signal between the two lines above
                kill(process, signal.SIGTERM)
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)  # a signal is handled meanwhile
                asked = asked or (self.stopped_by and self.now())
                if self.now() > limit or asked and self.now() > asked + KILL_WAIT:
                    kill(process, signal.SIGKILL)
        finally:
            kill(process, signal.SIGKILL)  # what it started and left behind
            process.wait()
            self.training = None
        return process.returncode

    def result(self, code):
        """The RunLog in run.log if it is of this code and not recorded; None otherwise."""
        log = run_log.read(self.repo.top / names.RUN_LOG)
        of_code = log and log.header and log.header["train_sha256"] == code
        return log if of_code and not self.own_night().record_of(log) else None

    def run_until_ended(self, item, code, seed, doing):
        """(the claim, the RunLog) of a run that ended by itself. Raises Fault, Lost, Stopped."""
        log = self.result(code)
        if log and log.ended in ("complete", "crash"):  # this worker was killed before it recorded it
            return item, log
        for attempt in range(1 + RERUNS):
            said = doing if not attempt else f"{doing}, again"
            if (item.state["doing"], item.state["running"]) != (said, code) or self.age(item) > CLAIM_SECONDS:
                item = self.renew(item, said, code)
            status = self.train(seed)
            if self.stopped_by:
                raise Stopped
            log = run_log.read(self.repo.top / names.RUN_LOG)
            ended = log.ended if log else "nothing"
            last = log.lines[-1][:200] if log and log.lines else "it printed nothing"
            if ended != "complete" and files.disk_is_full(self.repo.top / names.LAB):  # the log may be cut off, so it says nothing
                raise self.fault("the disk is full")
            if ended in ("complete", "contradictory", "crash"):
                break
            if ended == "machine":  # the next proposal would end like this, too
                raise self.fault(f"the run crashed because of this machine ({log.fault})")
            if ended == "overran":  # by a stall of the machine, or by the edit, which then always does it
                if ends.before(self.repo.top, code, log.run_id) >= ends.REPEATS:
                    break
                ends.note(self.repo.top, code, log.run_id)
            if ended in ("refused", "nothing", "incomplete"):
                raise self.fault(f"the run did not begin or did not end (exit status {status}): {last}")
            self.say(f"the run {'overran its time' if ended == 'overran' else f'was {ended}'}: it is run again")
        else:
            raise self.fault(f"{1 + RERUNS} runs in a row were ended from outside ({ended}): {last}")
        return item, log

    def fault(self, why, exception=Fault):
        """The exception, once the log of the run is out of the way: the next attempt would take it for a result."""
        with contextlib.suppress(OSError):
            os.replace(self.repo.top / names.RUN_LOG, self.repo.top / names.LAB / names.FAULT_LOG)
        return exception(why)

    def check_kind(self, log, own):
        """Raises Hopeless if the run does not compare with those of this branch, or of the team before it has any: each proposal
        would be handed back. own: the Night of this branch."""
        if not log.header or self.ideas and not own.first:
            return
        keys = ["device", "dataset", "data_sha256"]
        if own.first:  # this worker was started again elsewhere, or its frozen files were changed
            try:
                checks.check_rules(self.repo, own.first, log.header)
            except Refused as refused:
                raise self.fault(str(refused), Hopeless) from None
            whose, first = "those of this branch", own.first["header"]
            remedy = "start it in a new working tree, on a branch of its own (git worktree add)"
        else:
            keys.append("rules_sha256")
            whose, first = "the team's", team_night(self.repo, self.member, self.tag, own.records).header
            remedy = "start it with --ideas if they shall be ideas to the others"
        differ = [f"{key} {log.header.get(key)}, not {first.get(key)}" for key in keys if first and log.header.get(key) != first.get(key)]
        if differ:
            why = f"this worker's runs do not compare with {whose} ({one_line('; '.join(differ), 300)}): {remedy}"
            raise self.fault(why, Hopeless)

    def recorded(self, description, simpler=False, task="experiment"):
        """Records the run in run.log; what that prints. It is not pushed yet. Raises Refused, Again."""
        args = argparse.Namespace(description=description, discard=False, simpler=simpler, worker=task)

        fresh = [True]  # the team's refs, as of the fetch before this

        def once():
            repo = Repo(self.repo.top)
            tag, repo.member = repo.tag(), self.member
            if not fresh:  # an attempt failed, and a while has passed
                self.board.fetch()
            fresh.clear()
            repo.tag, repo.team_refs = lambda: tag, self.board.refs
            plan, lines = record.recorded(repo, args, for_queue=True)
            record.sample(repo, plan)
            return "\n".join(lines)

        try:
            return self.patiently(once)
        finally:
            self.own = None

    def experiment(self, item, code, description, seed=None, first="run 1", newer=""):
        """Runs and records HEAD's train.py until it has a verdict; (the claim, its record, what was said). first: what a
        run that nobody proposed is called; newer: of a late gain, that this is not its first best."""
        n = 0
        while True:
            n += 1
            item, log = self.run_until_ended(item, code, seed, f"run {n}{newer}" if item.state["task"] == "experiment" else first)
            own = self.own_night()
            self.check_kind(log, own)
            again = own.waiting is not None and own.waiting["code"] == code
            if not self.is_held(item):
                item = self.renew(item, "records", code)
                self.board.fetch()
            try:
                said = self.recorded(description, item.state["simpler"] and not again, item.state["task"])
            except Again as again:  # the disk filled up after the run had ended
                raise self.fault(str(again)) from None
            except checks.SeedUsed:  # it was taken for dead, and its run is published
                seed = self.seed_of(self.team().night, code)
                (self.repo.top / names.RUN_LOG).unlink(missing_ok=True)
                continue
            except checks.DecidedElsewhere as decided:  # by a worker that was taken for dead, and came back
                (self.repo.top / names.RUN_LOG).unlink(missing_ok=True)
                return item, decided.record, f"{decided}\n"
            r = self.own_night().latest(code)
            if r is None:
                raise Refused("the run was not recorded")
            if item.state["task"] != "experiment" or r["verdict"] != "confirm":
                return item, r, said
            self.publish()
            self.say(f"confirm: {description[: checks.BRIEF]}: it is run again")
            if self.stopped_by:
                raise Stopped
            seed = self.seed_of(self.team().night, code)

    def seed_of(self, night, code):
        """The seed of the next run of this code; None: the one that a run has by itself."""
        found = re.match(r"AUTORESEARCH_SEED=(\d+)", checks.next_run(self.repo.top, night, code))
        return int(found[1]) if found else None

    # --- a proposal ---

    def process(self, item, team, brought=None):
        """From a claim to a verdict. brought: the Brought for which it was claimed, on this team's best. Raises Fault, Lost,
        Stopped."""
        description = item.state["description"]
        for attempt in range(ROUNDS):
            newer = f" on the best found since, {attempt + 1}. try" if attempt else ""
            team, running = team or self.team(), item.state["running"]
            if running and (r := team.decided(running)) and not r.get("late"):
                return self.settle(item, r, r["why"])  # its worker was killed before it could say so
            if brought or not self.goes_on(item, team):
                brought = brought or bring(self.repo, item.state, team.best)
                if brought.content is None:
                    return self.give_back(item, brought.why)
                if r := team.decided(brought.code):
                    return self.settle(item, r, f"this very train.py was tried before: {label(r)}, {r['verdict']}\n")
                self.stand_on_best(team)
                self.put(item, brought, team.best)
            code = names.sha256(self.repo.top / names.TRAIN)
            try:
                item, r, said = self.experiment(item, code, description, self.seed_of(team.night, code), newer=newer)
            except Refused as refused:
                return self.give_back(item, f"it could not be recorded: {refused}")
            if r["verdict"] == "keep" and (late := self.late_by_now(code)):
                r, said = {**r, **late}, late["why"]
            if not r.get("late") or attempt == ROUNDS - 1:
                return self.settle(item, r, said)
            self.publish()
            self.say(f"a late gain: {description[: checks.BRIEF]}: it is tried again on the team's best")
            item, team, brought = self.renew(item, "a late gain, tried again on the team's best", ""), None, None
        return None

    def late_by_now(self, code):
        """What makes a keep of this worker a late gain: {"verdict", "late", "why"}, or None. Another worker may have recorded a
        better one meanwhile. If it publishes that even later, step sees it."""
        self.board.fetch()
        r = self.team(self.board.refs).night.latest(code)
        return {key: r[key] for key in ("verdict", "late", "why")} if r and r.get("late") else None

    def goes_on(self, item, team):
        """Whether HEAD is this claim's experiment, of a worker that was killed."""
        code = item.state["running"]
        if not code or not self.repo.train_is_committed() or names.sha256(self.repo.top / names.TRAIN) != code:
            return False
        try:
            return bool(checks.place(self.repo, self.own_night(), team).edits) and not team.decided(code)
        except checks.NotBased:
            return False

    def settle(self, item, r, said):
        """Publishes the verdict, by compare-and-swap of the claim, and what was recorded. Raises Lost."""
        shown = "\n".join(line for line in said.splitlines() if not line.startswith(OWN_TREE))
        where = label(r) if r.get("label") else f"{r['tag']}/{r['row']:04d}" if r["row"] else r["tag"]
        self.change(
            item, publish=True, kind="decided", verdict=r["verdict"], text=shown, label=where, mean=r["mean"], gain=r["gain"],
            commit=r["commit"], when=now(), doing="", running="",
        )  # fmt: skip
        self.faults, self.done = [], self.done + 1
        value = "" if r["mean"] is None else f" {r['mean']:.6f}"
        self.say(f"{r['verdict']}{value}: {item.state['description'][: checks.BRIEF]}")
        if self.done % PACKED_AFTER == 0:
            self.pack()

    def give_back(self, item, why):
        """Hands the proposal back to its proposer, with the reason."""
        self.change(item, kind="returned", text=why, when=now(), doing="", running="")
        with contextlib.suppress(Refused):
            self.tidy(self.team())
        self.say(f"handed back: {item.state['description'][: checks.BRIEF]}: {one_line(why, 200)}")

    def release(self, item, why=None):
        """Puts the proposal back into the queue, for this or another worker. why: this machine's fault, which counts. If its
        run is recorded and only the verdict was not published, the next one finds the record by `running`."""
        recorded = self.own_night().latest(item.state["running"])
        is_decided = recorded is not None and recorded["row"] is not None
        attempts = item.state["attempts"] + bool(why)
        failed = [*item.state["failed"], f"{self.tag}: {one_line(why, 200)}"][-20:] if why else item.state["failed"]
        nobody = dict.fromkeys(("worker", "worker_branch", "host", "machine", "tree", "attempt", "doing"), "")
        nobody |= {} if is_decided else {"running": ""}
        if attempts >= ATTEMPTS:
            text = f"workers failed to run it {attempts} times:\n" + "\n".join(failed)
            self.change(item, kind="returned", text=text, when=now(), attempts=attempts, failed=failed, doing="", running="")
        else:
            self.change(item, publish=is_decided, kind="open", attempts=attempts, failed=failed, **nobody)

    # --- runs that nobody proposed ---

    def measure_baseline(self, queue, team):
        """Runs the team's baseline under a seed that nobody has run or runs. Whether there was one."""
        first = team.night.baseline_record
        if first:
            self.stand_on_best(team)
        else:
            self.tidy(team)
        code = names.sha256(self.repo.top / names.TRAIN)
        runs, used = team.night.runs(code), set(team.night.seeds(code))
        missing = max(1, verdict.BASELINE_RUNS - len(verdict.distinct([r["summary"]["val_bpb"] for r in runs])))
        seeds = [seed for seed in range(FIRST_SEED, FIRST_SEED + len(used) + missing) if seed not in used][:missing]
        for seed in seeds:
            if item := self.slot(queue, f"baseline-{seed}", "baseline", "baseline"):
                self.say(f"the team's baseline, seed {seed}")
                self.run_slot(item, code, "baseline", seed)
                return True
        return False

    def repeat_best(self, queue, team):
        """Runs the team's best again if the rule doubts it. Whether this worker did."""
        tip = team.night.tip
        if not team.night.doubted:
            return False
        id = f"again-{tip['code'][:12]}-{len(team.night.runs(tip['code']))}"
        item = self.slot(queue, id, "again", f"{tip['description']}: in doubt, again")
        if not item:
            return False
        self.stand_on_best(team)
        self.say(f"the team's best is in doubt, and runs again: {tip['description'][: checks.BRIEF]}")
        self.run_slot(item, tip["code"], "", self.seed_of(team.night, tip["code"]))
        return True

    def run_slot(self, item, code, description, seed):
        """Runs and records HEAD's train.py, as nobody proposed."""
        try:
            item, r, _ = self.experiment(item, code, description, seed, f"seed {seed}")
        except Lost:
            return
        except BaseException:
            with contextlib.suppress(Stop, OSError, Stopped):
                self.drop(self.latest(item))
            raise
        self.drop(item, publish=True)
        if r["verdict"] == "crash":
            raise Fault(f"the baseline crashed: {r['why']}" if item.state["task"] == "baseline" else "the team's best crashed here")
        self.faults = []
        self.say(f"{r['summary']['val_bpb']:.6f}: {item.state['description'][: checks.BRIEF]}")

    def latest(self, item):
        """The claim as it is in the queue, if it is this worker's."""
        there = self.board.look(fresh=0).find(item.id)
        is_here = there and there.kind == "claimed" and there.state["attempt"] == item.state["attempt"]
        return there if is_here else item  # a change of `item` then fails: another worker has it, or its verdict was published

    # --- the night ---

    def begin(self):
        """Mends what an earlier worker in this tree left behind."""
        cleanup.clear(self.repo.top, self.say)
        if journal.pending(self.repo.top):
            with locks.one_at_a_time(self.repo.top / names.LAB):
                record.finish_interrupted(self.repo, for_queue=True)  # catch_up pushes it, or leaves it to another worker
            self.own = None
            self.say("a record that was interrupted is complete")
        self.catch_up()
        self.pack()

    def catch_up(self):
        """Publishes what was recorded and not published, by a worker that was killed or given up. Without the remote step
        does it later: what another worker has decided meanwhile is left to that one."""
        queue = self.board.look(fresh=0)
        self.behind = bool(self.board.note)
        if self.behind:
            return
        self.disown(queue)
        if checks.night_of(self.repo).records:
            exchange.publish(self.repo, self.member, self.tag, exchange.state_of(self.repo, self.tag))

    def pack(self):
        """Has git pack loose objects if there are many. A commit by hand does that; a worker makes some 75 objects a run, and
        none of its calls of git does."""
        with contextlib.suppress(Stop, OSError):
            self.repo.git("-c", "gc.autoDetach=false", "gc", "--auto", "--quiet")

    def disown(self, queue):
        """Leaves the verdict on the last proposal to the worker that has decided it, if this one recorded it and could not
        publish that: it was given up meanwhile. If the other one still runs it, this verdict counts."""
        last = next(iter(checks.night_of(self.repo).records[-1:]), None)
        if not last or not last["row"] or last["baseline"] or last.get("lost"):
            return
        if any(item.state["commit"] == last["commit"] and self.is_mine(item) for item in queue.items):
            return
        code, trees = last["code"], self.team().trees[1:]
        theirs = {r["commit"] for tree in trees for r in tree.records if r["code"] == code and r["row"]}
        is_decided = any(item.state["commit"] in theirs and not self.is_mine(item) for item in queue.of("decided"))
        # `wait` may have removed the decision. What the remote has of this tree was never another's to decide.
        if is_decided or theirs and exchange.unpublished(self.repo, self.member):
            with locks.one_at_a_time(self.repo.top / names.LAB):
                record.disown(self.repo, last)
            self.own = None
            self.say(f"another worker has decided what this one recorded and did not publish: {last['description'][: checks.BRIEF]}")

    def check_rules(self):
        team = self.team()
        headers = [r["header"] for tree in team.trees for r in tree.records if r["header"]]
        if headers and not team.header and not self.ideas:
            changed = ", ".join(rules.changed(headers[0], rules.tree(self.repo.top))[:3])
            raise Hopeless(f"{changed} is not that of the team's runs: start from the team's commit, or --ideas")

    def step(self):
        """Does one thing of what is to be done. Whether there was something."""
        self.follow()
        queue, self.own = self.board.look(), None
        if self.board.note:
            self.say(self.board.note, once=True)
            return False
        if self.behind:
            self.catch_up()
            return True
        self.sign(queue)
        if left := [item for item in queue.slots if self.is_mine(item)]:  # of a worker that was killed in this tree
            for item in left:
                self.drop(item)
            return True
        team = self.team(self.board.refs)
        if not team.night.tip:
            return self.measure_baseline(queue, team)
        mine = [item for item in queue.of("claimed") if self.is_mine(item)]
        if not mine and self.repeat_best(queue, team):
            return True
        late, failed = {r["commit"] for r in team.night.records if r.get("late")}, None
        for item in self.next(queue, late)[:3]:
            brought = self.brought(item, team)
            try:
                claimed = self.claim(item, "run 1", running=brought.code) if brought else self.claim(item)
            except GitError as error:
                if error.status is None or self.stopped_by:  # no answer: it may be claimed, and nobody has two
                    raise
                failed = error  # of this proposal alone, such as a lock in the remote: others can run
                continue
            if claimed:
                self.take(claimed, team if brought else None, brought)
                return True
        if failed:
            raise failed
        return False

    def next(self, queue, late=()):
        """Proposals to try to claim, in this order: the oldest first. With many workers one of the oldest, or all of them
        would try to claim the same one."""
        found, workers = self.free(queue, late), max(len(queue.workers), len(queue.running))
        few = found[: 1 + (workers // SPREAD if workers >= CROWD else 0)]
        if all(item.kind == "open" and not self.failed_here(item) for item in few):
            random.shuffle(few)
        return [*few, *found[len(few) :]]

    def brought(self, item, team):
        """The Brought of a proposal that waits, if it can run: then the claim is the sign of life before the run, too. None:
        it is claimed first, and everything else found out then."""
        running = item.state["running"]
        if item.kind != "open" or running and (r := team.decided(running)) and not r.get("late"):
            return None  # decided: only its verdict is missing, see release
        try:
            found = bring(self.repo, item.state, team.best)
        except Refused:
            return None
        return found if found.content is not None and not team.decided(found.code) else None

    def take(self, item, team, brought):
        """A claimed proposal, to whatever end."""
        self.say(f"takes: {item.state['description'][: checks.BRIEF]} (of {item.state['branch']})")
        try:
            self.process(item, team, brought)
        except Lost:
            (self.repo.top / names.RUN_LOG).unlink(missing_ok=True)
            self.say("another worker has taken this proposal over: what was run is discarded")
            self.patiently(self.catch_up)
        except Stopped:
            with contextlib.suppress(Lost, Stopped, Stop, OSError):
                self.release(self.latest(item))
            raise
        except Hopeless:
            with contextlib.suppress(Lost):
                self.release(self.latest(item))
            raise
        except (Fault, Refused) as fault:  # Refused: this tree is not as a worker needs it
            with contextlib.suppress(Lost):
                self.release(self.latest(item), str(fault))
            raise Fault(str(fault)) from None

    def watch(self):
        """Works until the hours are over. Returns the exit status."""
        self.say(f"worker {self.tag} of team {self.member.team}, stop it with `kill {os.getpid()}`; runs: {' '.join(self.command)}")
        wait = BACKOFF
        try:
            self.patiently(self.begin)
            self.check_rules()
            while not self.over():
                try:
                    busy, wait = self.step(), BACKOFF
                except Fault as fault:
                    self.faults.append(str(fault))
                    self.say(f"failed because of this machine ({len(self.faults)} in a row): {fault}")
                    if len(self.faults) >= FAULTS:
                        raise Hopeless(f"{FAULTS} in a row failed because of this machine, at last: {fault}") from None
                    self.pause(min(len(self.faults), BACKOFF))
                    continue
                except (Stop, OSError) as error:
                    self.say(f"{sentence_of(error)}: tried again in a while", once=True)
                    self.pause(wait)
                    wait = min(2 * wait, LONGEST_BACKOFF)
                    continue
                if not busy:
                    if not self.board.note:
                        self.say("nothing to run: waiting for proposals", once=True)
                    self.pause(REMOTE_POLL if self.member.remote else POLL)
            how = signal.Signals(self.stopped_by).name if self.stopped_by else "the hours are over"
        except Stopped:
            how = signal.Signals(self.stopped_by).name if self.stopped_by else "the remote did not answer"
        except Hopeless as hopeless:
            self.leave()
            self.say(f"stopped: {hopeless}")
            print(f"lab work: {hopeless}", file=sys.stderr)
            return 1
        self.leave()
        self.say(f"the worker ended: {how}; {self.done} proposals decided")
        return 128 + self.stopped_by if self.stopped_by else 0

    def leave(self):
        """Takes this worker's ref away, and what is not recorded off its branch."""
        with contextlib.suppress(Stop, OSError):
            self.tidy(self.team())
        with contextlib.suppress(Stop, OSError):
            if there := self.board.look(fresh=0).find(f"worker-{self.member.name}"):
                self.board.swap([(there.ref, None, there.commit)])


def kill(process, number):
    """Sends the signal to the training: to all of its group if it shall end at once."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        elif process.returncode is None:
            os.kill(process.pid, number)


def end_with_parent():
    """In the training, before it starts: Linux sends it SIGTERM when the worker dies, whatever kills it."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def sentence_of(error):
    return os_reason(error) if isinstance(error, OSError) else one_line(str(error), 300)


def training_command(top, wanted):
    """(what runs a training, why): in the sandbox where that works."""
    if not wanted:
        return [sys.executable, names.TRAIN], "without a sandbox, as asked for"
    sandbox = [sys.executable, "-m", "lab", "sandbox"]
    try:
        done = subprocess.run([*sandbox, "--", "true"], cwd=top, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    except subprocess.TimeoutExpired:
        return [sys.executable, names.TRAIN], "without a sandbox, which did not start within 60 s"
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        return [sys.executable, names.TRAIN], f"without a sandbox ({one_line(words, 120)})"
    return sandbox, "in the sandbox"


def check_tree(repo, member, lock):
    """Refuses a tree in which somebody else may work: what a worker finds there it takes off the branch."""
    with contextlib.suppress(OSError):
        if lock.read_text(encoding="utf-8", errors="replace").strip() == member.name:
            return  # it was this worker's before
    if not repo.train_is_committed():
        raise Refused("train.py has changes that are not committed: give the worker a working tree of its own (git worktree add)")
    with contextlib.suppress(checks.NotBased):
        if checks.place(repo, checks.night_of(repo), checks.team_of(repo, checks.night_of(repo))).edits:
            raise Refused("HEAD is an experiment that is not recorded: propose it, and give the worker a working tree of its own")


def run(args):
    if args.hours <= 0:
        print("--hours must be above 0", file=sys.stderr)
        return 2
    if sys.platform == "win32":
        raise Refused("a worker needs Linux or macOS: on Windows run it in WSL")
    psutil()  # refuses now if it is missing, and not in the middle of the night
    repo = Repo.find(Path.cwd())
    repo.tag()
    os.chdir(repo.top)
    member = member_of(repo)
    (repo.top / names.LAB).mkdir(exist_ok=True)
    lock, night = repo.top / names.LAB / names.WORKER_LOCK, repo.top / names.LAB / names.NIGHT_LOCK
    with locks.hold(night) as alone, locks.hold(lock) as held:
        if not alone or not held:
            raise Refused("a worker or a night is running in this tree: give each worker a working tree of its own (git worktree add)")
        check_tree(repo, member, lock)
        with contextlib.suppress(OSError):  # a full disk
            night.write_text(str(os.getpid()))  # `lab fleet stop` signals it
        lock.write_text(member.name, encoding="utf-8")
        command, why = training_command(repo.top, not args.no_sandbox)
        worker = Worker(repo, member, args.hours, args.ideas, command)
        worker.say(f"trainings run {why}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, worker.signalled)
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # not SIG_IGN, which a training would inherit
        return worker.watch()
