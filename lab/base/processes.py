"""Finds and ends what a process has started, so that a command leaves nothing running behind it.

psutil reads the process table of Linux, macOS and Windows. It is imported when it is first needed: record and status
do not need it.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from typing import NamedTuple

from lab.base.errors import Refused

PATIENCE = 20  # seconds between SIGTERM and SIGKILL
AFTER_KILL = 20  # seconds between SIGKILL and giving a process up: it is in an uninterruptible sleep, or another user's
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def psutil():
    """The module psutil. Raises Refused if it is not installed."""
    try:
        import psutil
    except ModuleNotFoundError:
        raise Refused("psutil is not installed, and processes cannot be found without it: run `uv sync`") from None
    return psutil


def adopt_orphans():
    """Makes this process the parent of what its descendants leave behind, in any session (Linux). A training that an
    agent started in the background can then still be found after the agent has died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def is_alive(pid):
    """Whether the process runs; False for a zombie."""
    try:
        return psutil().Process(pid).status() != psutil().STATUS_ZOMBIE
    except psutil().NoSuchProcess:
        return False


def children(pid, recursive=False):
    """Ids of the processes whose parent is `pid`, or of all below it, parents first; without zombies."""
    try:
        found = psutil().Process(pid).children(recursive)
    except psutil().NoSuchProcess:
        return []
    return [p.pid for p in found if is_alive(p.pid)]


def descendants(pid):
    """Ids of all processes below `pid`, parents before their children; without zombies."""
    return children(pid, recursive=True)


def send(number, pids):
    """Sends the signal to each of the processes that still exists and that this user may end (not root's, of a sudo)."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap():
    """Collects the exit statuses of this process's children that have ended. Returns what still runs below it."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:  # it has no children
        pass
    return descendants(os.getpid())


def marked(name, value):
    """Ids of this user's processes that have name=value in their environment, without this process and its ancestors.
    macOS hides the environment of its own programs, /bin/sh among them: those are not found there."""
    own = psutil().Process()
    skipped, user, found = {own.pid, *(p.pid for p in own.parents())}, own.username(), []
    for p in psutil().process_iter():
        with contextlib.suppress(psutil().Error, OSError):  # it has ended, or belongs to another user
            if p.pid not in skipped and p.environ().get(name) == value and p.username() == user:
                found.append(p.pid)
    return sorted(found)


class Ended(NamedTuple):
    killed: int  # how many ended by SIGKILL only
    left: list  # ids of those that are still running


def end(find, patience=PATIENCE):
    """Ends the processes that find() returns, until it returns none. Each gets SIGTERM once, so that a training can
    print "preempted", also one that was just being started; after `patience` seconds SIGKILL. What runs AFTER_KILL
    seconds later cannot be ended. Returns Ended."""
    deadline, asked, killed = time.monotonic() + patience, set(), set()
    while left := set(find()):
        send(signal.SIGTERM, left - asked)
        asked |= left
        if time.monotonic() > deadline + AFTER_KILL:
            break
        if time.monotonic() > deadline:
            killed |= left
            send(signal.SIGKILL, left)
        time.sleep(0.05)
    return Ended(len(killed - left), sorted(left))


def named(pids):
    """The processes in a sentence: "process 12", "processes 12, 13"."""
    return f"process{'es' * (len(pids) > 1)} {', '.join(map(str, pids))}"


def end_descendants(patience=PATIENCE):
    """Ends all that this process has started."""
    return end(reap, patience)
