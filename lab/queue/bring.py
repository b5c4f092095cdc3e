"""Brings an experiment onto the team's best: train.py as the experiment would have left it, had it begun there.

Only the text of train.py is taken from a proposal, whatever else its commit holds.
"""

import ast
import hashlib
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from lab.base.errors import Refused
from lab.base.text import printable
from lab.share.team import LARGEST_TRAIN, objects
from lab.store import names

SHOWN_LINES = 60  # of the conflicts that go back to the proposer
START, END = "<<<<<<<", ">>>>>>>"
MARK = 40  # characters of a conflict's marker: no line of a program begins with as many of one


class Brought(NamedTuple):
    content: bytes | None  # of train.py; None: see `why`
    why: str = ""  # why the proposal goes back: a sentence, and lines with the conflict

    @property
    def code(self):
        return hashlib.sha256(self.content).hexdigest()


def trains_of(repo, commits):
    """{commit: its train.py}. commits: {commit: what it is}. Raises Refused if one cannot be read."""
    wanted = {commit: f"{commit}:{names.TRAIN}" for commit in commits}
    found = objects(repo, wanted.values(), LARGEST_TRAIN, "blob")
    for commit, what in commits.items():
        if wanted[commit] not in found:
            raise Refused(f"{names.TRAIN} of {what} ({commit[:7]}) cannot be read, or is too large")
    return {commit: found[name] for commit, name in wanted.items()}


def bring(repo, state, best):
    """The Brought of a proposal's state; best: the record to bring it onto."""
    try:
        whose = [(state["base"], "what it was based on"), (state["experiment"], "the experiment"), (best["commit"], "the team's best")]
        trains = trains_of(repo, dict(whose))
        before, after, ours = (trains[commit] for commit, _ in whose)
    except Refused as refused:
        return Brought(None, str(refused))
    if ours == before:
        return Brought(after)
    merged, conflicts = merge(ours, before, after, [f"the team's best, {best['short']}", "base", f"the experiment, {state['experiment'][:7]}"])
    if conflicts:
        return Brought(None, f"it conflicts with the team's best ({best['short']}: {best['description'][:80]}):\n{hunks(merged)}")
    if merged == ours:
        return Brought(None, f"nothing is left of it: the team's best ({best['short']}) has this change already")
    return Brought(merged)


def merge(ours, before, theirs, labels):
    """(the merged bytes, whether there are conflicts), by git's three-way merge of a file. Where both sides have changed single
    lines that are neighbours, but not the same line, both changes are taken: the knobs of train.py are neighbours, and in two
    real nights of a team every conflict was of two of them."""
    merged, conflicts = merged_by_git(ours, before, theirs, labels)
    if conflicts:
        taken = side_by_side(merged_by_git(ours, before, theirs, labels, "--diff3", f"--marker-size={MARK}")[0])
        if taken is not None and is_python(taken):
            return taken, False
    return merged, conflicts


def side_by_side(shown):
    """What `git merge-file --diff3` shows, with each conflict resolved line by line; None if one has a line that both sides
    have changed, added or removed."""
    out, parts = [], None
    for line in shown.split(b"\n"):
        if line.startswith(b"<" * MARK):
            parts = [[]]
        elif parts is not None and line.startswith((b"|" * MARK, b"=" * MARK)):
            parts.append([])
        elif parts is not None and line.startswith(b">" * MARK):
            if len({len(part) for part in parts}) > 1 or len(parts) != 3:
                return None
            for ours, before, theirs in zip(*parts, strict=True):
                if before not in (ours, theirs) and ours != theirs:
                    return None
                out.append(theirs if ours == before else ours)
            parts = None
        else:
            (out if parts is None else parts[-1]).append(line)
    return b"\n".join(out)


def is_python(content):
    try:
        ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def merged_by_git(ours, before, theirs, labels, *more):
    """(the merged bytes, whether there are conflicts), by git's three-way merge of a file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, content in [("ours", ours), ("before", before), ("theirs", theirs)]:
            paths.append(Path(folder, name))
            paths[-1].write_bytes(content)
        options = [part for label in labels for part in ("-L", label)]
        done = subprocess.run(["git", "merge-file", "-p", *more, *options, *map(str, paths)], capture_output=True, cwd=folder)
    if done.returncode < 0 or done.returncode > 127:
        raise Refused(f"git merge-file: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout, done.returncode > 0


def hunks(merged):
    """The lines of the conflicts."""
    shown, inside = [], False
    for line in printable(merged.decode(errors="replace"), "\n").split("\n"):
        inside = inside or line.startswith(START)
        if inside:
            shown.append(line[:200])
        inside = inside and not line.startswith(END)
    more = [f"({len(shown) - SHOWN_LINES} more lines)"] * (len(shown) > SHOWN_LINES)
    return "\n".join([*shown[:SHOWN_LINES], *more])
