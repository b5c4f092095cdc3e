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
BETWEEN = b"\x01"  # a line that no program has


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
    """(the merged bytes, whether there are conflicts). Lines that one side has changed and the other has not are no conflict,
    though they are neighbours: the knobs of train.py are, and in a real night of a team every conflict was of two of them.
    git takes the lines for separate where a line between them is the same, so a second try puts one between any two."""
    merged, conflicts = merged_by_git(ours, before, theirs, labels)
    if conflicts and not any(BETWEEN in side for side in (ours, before, theirs)):
        apart = [side.replace(b"\n", b"\n" + BETWEEN + b"\n") for side in (ours, before, theirs)]
        again, still = merged_by_git(*apart, labels)
        again = again.replace(b"\n" + BETWEEN + b"\n", b"\n")
        if not still and is_python(again):
            return again, False
    return merged, conflicts


def is_python(content):
    try:
        ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def merged_by_git(ours, before, theirs, labels):
    """(the merged bytes, whether there are conflicts), by git's three-way merge of a file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, content in [("ours", ours), ("before", before), ("theirs", theirs)]:
            paths.append(Path(folder, name))
            paths[-1].write_bytes(content)
        options = [part for label in labels for part in ("-L", label)]
        done = subprocess.run(["git", "merge-file", "-p", *options, *map(str, paths)], capture_output=True, cwd=folder)
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
