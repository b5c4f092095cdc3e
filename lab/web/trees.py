"""The working trees that the dashboard shows, each read again only when its files have changed."""

import math
import os
import re
import subprocess
import threading
from pathlib import Path

from lab import locks, runlog
from lab.errors import Refused, Stop, os_reason
from lab.nights import Night, read_night

STEP = re.compile(r"step (\d+) \(([\d.]+)%\)(.*)")
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
        name, i = branch_of(place) or place.name, 1
        while name in found:
            i += 1
            name = f"{branch_of(place) or place.name} ({i})"
        found[name] = Tree(name, place)
    return found


def git(path, *args, limit=None, seconds=5):
    """What git prints, at most so many bytes of it, decoded; None where it fails. It asks no one, runs no hook, no pager,
    no external diff, and takes no lock."""
    command = ["git", "--no-pager", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", *args]
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_PAGER": "cat", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=path, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout[:limit].decode(errors="replace") if done.returncode == 0 else None


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

    def night(self):
        """(Night, sentence): the sentence says why there is nothing to see, or is None."""
        with self.lock:
            now = [stamp(self.path / name) for name in ("results.tsv", "runs.jsonl", "runs", "")]
            if now != self.seen:
                self.known, self.seen = self.read(), now
            return self.known

    def read(self):
        if not self.path.is_dir():
            return Night(self.path, ()), "this working tree is gone"
        try:
            return read_night(self.path), None
        except Stop as stop:
            return Night(self.path, ()), str(stop)
        except OSError as error:
            return Night(self.path, ()), f"results.tsv cannot be read: {os_reason(error)}"

    def live(self):
        """What the run in progress says of itself; {"running": False} where none goes on."""
        if not self.path.is_dir() or not locks.run_in_progress(self.path):
            return {"running": False}
        found = {"running": True, "stage": "set-up"}
        step = STEP.match(runlog.progress(self.path / "run.log"))
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
