"""What a process started, found and ended: for the helpers that must leave nothing running behind them."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PATIENCE = 20  # seconds between SIGTERM and SIGKILL
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def adopt_orphans():
    """Makes this process the parent of what its descendants leave behind, in whatever session (Linux). A
    training that an agent started in the background stays in reach after the agent died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def parents():
    """{process id: parent's process id} of all that runs here; not of the dead whom nobody has collected yet."""
    table = {}
    if Path("/proc/self/stat").exists():
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            if fields[0] != "Z":
                table[int(pid)] = int(fields[1])
    else:
        lines = subprocess.run(["ps", "-Ao", "pid=,ppid=,stat="], capture_output=True, text=True).stdout.splitlines()
        table = {int(pid): int(parent) for pid, parent, state in map(str.split, lines) if state[0] != "Z"}
    return table


def descendants(pid):
    """All processes below `pid`, parents before their children."""
    table, found = parents(), [pid]
    for ancestor in found:  # grows while it is walked
        found += [child for child, parent in table.items() if parent == ancestor]
    return found[1:]


def send(number, pids):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def reap():
    """Collects this process's children that have ended; what still runs below it."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:  # there are none
        pass
    return descendants(os.getpid())


def marked(name, value):
    """Processes of this user whose environment says name=value, but for this one and those that it descends
    from. [] where there is no /proc."""
    line, table, found = f"\0{name}={value}\0".encode(errors="surrogateescape"), parents(), []
    own, above = set(), os.getpid()
    while above and above not in own:
        own.add(above)
        above = table.get(above)
    for pid in table.keys() - own:
        try:
            place = Path("/proc", str(pid), "environ")
            if place.stat().st_uid == os.geteuid() and line in b"\0" + place.read_bytes() + b"\0":
                found.append(pid)
        except OSError:  # ended meanwhile, or not ours to look at
            continue
    return sorted(found)


def end(find, patience=PATIENCE):
    """Ends what find() finds, until it finds nothing: SIGTERM to each, once, so that a training can say
    "preempted" (to those too that were just being started), then SIGKILL. Returns how many had to be killed."""
    deadline, asked, killed = time.monotonic() + patience, set(), set()
    while left := set(find()):
        send(signal.SIGTERM, left - asked)
        asked |= left
        if time.monotonic() > deadline:
            killed |= left
            send(signal.SIGKILL, left)
        time.sleep(0.05)
    return len(killed)


def end_descendants(patience=PATIENCE):
    """Ends all that this process started."""
    return end(reap, patience)
