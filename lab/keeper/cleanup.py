"""What a night that was killed left behind, and is cleared away before the next one starts in the same tree.

A kill -9, a lost node or a power cut can come at any moment. Files are moved in whole and record has its journal;
what is left to do is to end an agent that outlived its keeper, and to remove git's lock files, at which the next
agent's `git commit` would fail.
"""

import os
from pathlib import Path

from lab.base.errors import Stop
from lab.base.git import remove_stale
from lab.base.processes import end, marked
from lab.store.repository import Repo

MARK = "AUTORESEARCH_NIGHT"  # environment variable of all that a night starts: the tree


def environment(root):
    """What an agent's environment has beside ours: the mark, and git told to be sure that what it wrote is on the
    disk before it says so (a power cut could leave a branch that points at an empty file)."""
    n = os.environ.get("GIT_CONFIG_COUNT", "")
    n = int(n) if n.isdecimal() else 0
    return {
        MARK: os.path.realpath(root), "GIT_CONFIG_COUNT": str(n + 1),
        f"GIT_CONFIG_KEY_{n}": "core.fsync", f"GIT_CONFIG_VALUE_{n}": "all",
    }  # fmt: skip


def orphans(root):
    """Processes that an earlier night started in this tree and that outlived it."""
    return marked(MARK, os.path.realpath(root))


def git_locks(root):
    """Lock files in git's folders: of this tree, and of the repository that it shares with others."""
    try:
        own, shared = Repo(root).git("rev-parse", "--absolute-git-dir", "--git-common-dir").split("\n")[:2]
    except Stop:  # no git checkout
        return []
    shared = Path(root, shared)
    found = [*Path(own).glob("*.lock"), *shared.glob("*.lock"), *(shared / "refs").rglob("*.lock")]
    return sorted({path.resolve() for path in found})


def clear(root, say):
    """Before a start of the agent, when nothing of the last one may be running: clears what is left of it.
    say(sentence) is told what was found."""
    if left := orphans(root):
        say(f"{len(left)} processes outlived the night that started them: ended")
        end(lambda: orphans(root))
    for lock in git_locks(root):
        if remove_stale(root, lock, patience=1.0) and not lock.exists():
            say(f"removed {lock.name}, which a git that was killed had left")
