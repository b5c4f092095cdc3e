"""The working trees that the dashboard shows, each read again only when its files have changed."""

import math
import os
import re
import signal
import subprocess
import threading
import unicodedata
import zlib
from pathlib import Path

from lab import locks, runlog
from lab.errors import Refused, Stop, os_reason
from lab.nights import Night, read_night

STEP = re.compile(r"step (\d{1,12}) \((\d{1,3}(?:\.\d+)?)%\)(.*)")  # a run prints what it likes
LIVE = {"loss": r"loss ([\d.]+)", "milliseconds": r"([\d,]+) ms", "tokens_per_second": r"([\d,]+) tok/s",
        "mfu_percent": r"mfu ([\d.]+)%", "epoch": r"epoch (\d+)", "seconds_left": r"(\d+) s left"}  # fmt: skip


def find(paths, alone=False):
    """{name: Tree} of the working trees at these paths, and, unless alone, of the worktrees that git knows of."""
    places = []
    for path in paths:
        if not path.is_dir():
            raise Refused(f"{path} is no folder: --tree takes a working tree")
        places += [path.resolve(), *([] if alone else worktrees(path))]
    found = {}
    for place in dict.fromkeys(places):
        own = printable(branch_of(place) or place.name) or "tree"
        name, i = own, 1
        while name in found:
            i += 1
            name = f"{own} ({i})"
        found[name] = Tree(name, place)
    return found


# An agent can write .git/config: what that may start (a hook, a pager, gpg, a fetch of missing objects) is off.
OFF = ["core.hooksPath=/dev/null", "core.fsmonitor=false", "log.showSignature=false", "protocol.allow=never"]
QUIET = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1",
         "GIT_PAGER": "cat", "LC_ALL": "C"}  # fmt: skip


def git(path, *args, limit=1 << 20, seconds=5):
    """What git prints, at most `limit` bytes of it, decoded; None where it fails or takes longer. It asks no one,
    starts no other program, and takes no lock."""
    command = ["git", "--no-pager", *(part for setting in OFF for part in ("-c", setting)), *args]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        process = subprocess.Popen(command, cwd=path, env=os.environ | QUIET, start_new_session=True, **pipes)
    except OSError:
        return None
    timer = threading.Timer(seconds, end, [process])
    timer.start()
    with process:
        shown = process.stdout.read(limit)
        cut = len(shown) == limit
        if cut:
            end(process)
    timer.cancel()
    return shown.decode(errors="replace") if cut or process.returncode == 0 else None


def end(process):
    """Ends it, and what it may have started after all."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:  # it has ended
            process.kill()


def printable(text):
    """The text without control characters, without what turns its direction, and without halves of characters, which
    no answer could hold (a name on disk that is no UTF-8)."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def worktrees(path):
    listed = git(path, "worktree", "list", "--porcelain") or ""
    places = [Path(line[9:]) for line in listed.splitlines() if line.startswith("worktree ")]
    return [place.resolve() for place in places if place.is_dir()]


def branch_of(path):
    return (git(path, "symbolic-ref", "--quiet", "--short", "HEAD") or "").strip().removeprefix("autoresearch/")


def stamp(path):
    """What changes when the file does."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


class Tree:
    def __init__(self, name, path):
        self.name, self.path = name, path
        self.lock, self.seen, self.known = threading.Lock(), object(), None
        self.version = ""  # another one whenever the night on disk is

    def night(self):
        """(Night, sentence): the sentence says why there is nothing to see, or is None."""
        with self.lock:
            now = [self.path.is_dir(), *(stamp(self.path / name) for name in ("results.tsv", "runs.jsonl", "runs"))]
            if now != self.seen:
                self.known, self.seen, self.version = self.read(), now, f"{zlib.crc32(repr(now).encode()):08x}"
            return self.known

    def read(self):
        if not self.path.is_dir():
            return Night(self.path, ()), "this working tree is gone"
        try:
            return read_night(self.path), None
        except Stop as stop:
            return Night(self.path, ()), printable(str(stop))
        except OSError as error:
            return Night(self.path, ()), f"results.tsv cannot be read: {os_reason(error)}"

    def live(self):
        """What the run in progress says of itself; {"running": False} where none goes on."""
        try:
            if not locks.run_in_progress(self.path):
                return {"running": False}
        except OSError:  # the tree is gone
            return {"running": False}
        found, log = {"running": True, "stage": "set-up"}, self.path / "run.log"
        step = STEP.match(runlog.progress(log)) if log.is_file() else None
        if not step:
            return found
        found |= {"step": int(step[1]), "percent": number(step[2])}
        found["stage"] = "evaluation" if found["percent"] >= 100 else "training"
        for key, pattern in LIVE.items():
            match = re.search(pattern, step[3])
            found[key] = number(match[1]) if match else None
        return found


def number(text):
    """The finite number that a text shows, or None."""
    try:
        value = float(str(text).replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
