"""The working trees that the dashboard shows. Each is read again only when its files, or its team's refs, have changed."""

import threading
import zlib

from lab.analysis.history import Night, read_night
from lab.base import git, locks
from lab.base.errors import Refused, Stop, os_reason
from lab.base.text import printable
from lab.share.membership import team_name
from lab.share.team import team_seen
from lab.store import names, run_log
from lab.store.repository import Untrusted

READING = threading.Lock()  # of a team: what was read is remembered for all trees together


def find(paths, alone=False):
    """{name: Tree} of the working trees at these paths and, unless `alone`, of the worktrees that git lists."""
    places = []
    for path in paths:
        if not path.is_dir():
            raise Refused(f"{path} is not a folder: --tree takes a working tree")
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
    """A value that changes when the file does; None if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


class Tree:
    """A working tree and its night, as last read. Safe to use from several threads."""

    def __init__(self, name, path):
        self.name, self.path = name, path
        self.lock, self.seen, self.known = threading.Lock(), object(), None
        self.version = ""  # changes whenever the night's files change
        self.team_refs, self.known_team = None, None

    def night(self):
        """(Night, problem): the problem is a sentence that says why nothing can be shown, or None."""
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

    def team_name(self):
        """The name of its team; None if it is in none. Raises Refused if the name cannot be used."""
        is_checkout = (self.path / ".git").exists()  # and not a folder in one, such as docs/night
        return team_name(Untrusted(self.path)) if is_checkout else None

    def team(self):
        """(lab.share.team.Team, version) of its team, by the refs that are here; (None, "") if it is in none. The version
        changes whenever a member's records do. Raises Refused, and GitError if git fails."""
        if not (name := self.team_name()):
            return None, ""
        repo = Untrusted(self.path)
        with READING:
            refs = repo.refs(f"{names.TEAM_REFS}{name}/", f"{names.MIRROR_REFS}{name}/")
            now = name, branch_of(self.path), refs
            if now != self.team_refs:
                self.known_team = team_seen([repo], name, now[1])
                self.team_refs = now
            return self.known_team, f"{zlib.crc32(repr(refs).encode()):08x}"

    def live(self):
        """The run in progress as its log reports it; {"running": False} if there is no run."""
        try:
            if not locks.run_in_progress(self.path):
                return {"running": False}
        except OSError:  # the tree is gone
            return {"running": False}
        found, log = {"running": True, "stage": "set-up"}, self.path / names.RUN_LOG
        progress = run_log.progress_of(run_log.progress(log)) if log.is_file() else None
        if not progress:
            return found
        return found | progress | {"stage": "evaluation" if progress["percent"] >= 100 else "training"}
