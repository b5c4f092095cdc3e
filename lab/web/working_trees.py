"""The working trees that the dashboard shows, each read again only when its files have changed."""

import threading
import zlib

from lab.analysis.history import Night, read_night
from lab.base import git, locks
from lab.base.errors import Refused, Stop, os_reason
from lab.base.text import printable
from lab.store import names, run_log


def find(paths, alone=False):
    """{name: Tree} of the working trees at these paths, and, unless alone, of the worktrees that git knows of."""
    places = []
    for path in paths:
        if not path.is_dir():
            raise Refused(f"{path} is no folder: --tree takes a working tree")
        places += [path.resolve(), *([] if alone else [place.resolve() for place in git.worktrees(path) if place.is_dir()])]
    found = {}
    for place in dict.fromkeys(places):
        own = printable(branch_of(place) or place.name) or "tree"
        name, i = own, 1
        while name in found:
            i += 1
            name = f"{own} ({i})"
        found[name] = Tree(name, place)
    return found


def branch_of(path):
    return (git.read_only(path, "symbolic-ref", "--quiet", "--short", "HEAD") or "").strip().removeprefix(names.PREFIX)


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
            now = [self.path.is_dir(), *(stamp(self.path / name) for name in (names.RESULTS_TSV, names.RUNS_JSONL, names.RUNS))]
            if now != self.seen:
                self.known, self.seen, self.version = self.read(), now, f"{zlib.crc32(repr(now).encode()):08x}"
            return self.known

    def read(self):
        if not self.path.is_dir():
            return Night((), tree=self.path), "this working tree is gone"
        try:
            return read_night(self.path), None
        except Stop as stop:
            return Night((), tree=self.path), printable(str(stop))
        except OSError as error:
            return Night((), tree=self.path), f"results.tsv cannot be read: {os_reason(error)}"

    def live(self):
        """What the run in progress says of itself; {"running": False} where none goes on."""
        try:
            if not locks.run_in_progress(self.path):
                return {"running": False}
        except OSError:  # the tree is gone
            return {"running": False}
        found, log = {"running": True, "stage": "set-up"}, self.path / names.RUN_LOG
        told = run_log.progress_of(run_log.progress(log)) if log.is_file() else None
        if not told:
            return found
        return found | told | {"stage": "evaluation" if told["percent"] >= 100 else "training"}
