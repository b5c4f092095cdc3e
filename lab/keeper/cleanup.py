"""Clears away what a killed night left behind, before the next one starts in the same tree.

A kill -9, a lost node or a power cut can come at any moment. Files are written whole or not at all, and record has its
journal. What remains is to end an agent that outlived its keeper, and to remove git's lock files, which would make the
next agent's `git commit` fail.
"""

import os
from pathlib import Path

from lab.base.errors import Stop
from lab.base.git import remove_stale
from lab.base.processes import end, marked, named
from lab.store.repository import Repo

MARK = "AUTORESEARCH_NIGHT"  # environment variable of every process that a night starts; its value is the tree


GIT_SETTINGS = {
    "core.fsync": "all",  # or a power cut could leave a branch that points at an empty file
    "commit.gpgsign": "false", "tag.gpgsign": "false",  # nobody types the passphrase of a key
}  # fmt: skip
# For git, an editor that leaves the text as it is; the variables override core.editor. No question about a password.
GIT_VARIABLES = {"GIT_EDITOR": "true", "GIT_SEQUENCE_EDITOR": "true", "GIT_TERMINAL_PROMPT": "0"}


def environment(root):
    """Variables that are added to the agent's environment: the mark, and settings by which git is safe against power
    cuts and never waits for a person."""
    n = os.environ.get("GIT_CONFIG_COUNT", "")
    n = int(n) if n.isdecimal() else 0
    env = {MARK: os.path.realpath(root), "GIT_CONFIG_COUNT": str(n + len(GIT_SETTINGS)), **GIT_VARIABLES}
    for i, (key, value) in enumerate(GIT_SETTINGS.items(), n):
        env |= {f"GIT_CONFIG_KEY_{i}": key, f"GIT_CONFIG_VALUE_{i}": value}
    return env


def orphans(root):
    """Ids of processes that an earlier night started in this tree and that outlived it."""
    return marked(MARK, os.path.realpath(root))


def git_locks(root):
    """Lock files in git's folders: that of this tree, and that of the repository, which other trees may share."""
    try:
        own, shared = Repo(root).git("rev-parse", "--absolute-git-dir", "--git-common-dir").split("\n")[:2]
    except Stop:  # not a git checkout
        return []
    shared = Path(root, shared)
    found = [*Path(own).glob("*.lock"), *shared.glob("*.lock"), *(shared / "refs").rglob("*.lock")]
    return sorted({path.resolve() for path in found})


def clear(root, say):
    """Ends processes and removes git's lock files that an earlier start of the agent left, before the next one. Calls
    say(sentence) for what it found."""
    if left := orphans(root):
        say(f"ended {len(left)} processes that outlived the night that started them")
        if alive := end(lambda: orphans(root)).left:
            say(f"{named(alive)} of an earlier night cannot be ended and may slow the trainings down")
    for lock in git_locks(root):
        if remove_stale(root, lock, patience=1.0) and not lock.exists():
            say(f"removed {lock.name}, which a killed git had left")
