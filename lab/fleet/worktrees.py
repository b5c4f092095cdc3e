"""The working trees of a fleet: planned whole, written down, then made one after the other, so that a launch which
was killed, or found no room, is completed by the next one.

A slot's branch begins at the commit that HEAD was, or at one on top of it that puts another program.md in place. (A
commit of its own, as uncommitted edits would not outlive the tree, and an experiment's commit may hold nothing else.)
"""

import os
import shutil
from pathlib import Path

from lab.base.errors import Refused, Stop, Unfinished
from lab.store import names
from lab.store.names import PREFIX
from lab.store.repository import Repo

ROOM = 1e9  # bytes that a slot should find free: a night archives some twenty checkpoints
NOWHERE = "0" * 40


def branch_of(tag, number):
    return f"{PREFIX}{tag}-gpu{number}"


def check_name(repo, tag):
    if repo.ask("check-ref-format", f"refs/heads/{branch_of(tag, 0)}") is None or tag.startswith("-"):
        raise Refused(f"{tag!r} cannot be part of a branch's name: take letters, digits and hyphens")


def check_checkout(repo):
    if repo.ask("symbolic-ref", "--quiet", "HEAD") is None:
        raise Refused("HEAD is detached: git switch BRANCH, the one that the slots shall begin from")
    repo.head()
    if changed := repo.git("status", "--porcelain", "--untracked-files=no").split("\n")[0][3:]:
        raise Refused(f"{changed} has uncommitted changes, which the slots would not have: commit them, or git stash")


def check_free(repo, tag, folders):
    """Nothing of these names is there: no branch, no recorded experiment, no folder."""
    for number, folder in enumerate(folders):
        branch = branch_of(tag, number)
        if repo.exists(f"refs/heads/{branch}"):
            raise Refused(f"the branch {branch} exists and is no part of a fleet: take another TAG")
        if repo.numbers(f"{tag}-gpu{number}"):
            raise Refused(f"refs/{branch}/ holds experiments of an earlier night: take another TAG")
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise Refused(f"{folder} exists: take another TAG, or another --folder")


def check_room(folder, slots):
    """Before anything is made: there is room for the nights, not only for their beginning."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < slots * ROOM:
        raise Refused(f"{folder} has {free / 1e9:.1f} GB free, and each slot wants {ROOM / 1e9:.0f} GB: make room, or give a --folder elsewhere")  # fmt: skip


def programs_of(paths, slots):
    """The bytes of each slot's program.md; None for the checkout's own. Fewer programs than slots are dealt again
    from the first one on."""
    texts = []
    for path in paths or []:
        try:
            texts.append(Path(path).read_bytes())
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}: no program for a slot") from None
        if not texts[-1].strip():
            raise Refused(f"{path} is empty: no program for a slot")
    if len(texts) > slots:
        raise Refused(f"{len(texts)} programs for {slots} slots: more slots, or fewer programs")
    return [texts[i % len(texts)] if texts else None for i in range(slots)]


def beginning(repo, program, name):
    """The commit that a slot's branch begins with."""
    head = repo.head()
    if program is None or repo.ask("cat-file", "blob", "HEAD:program.md", raw=True) == program.strip():
        return head
    index = {"GIT_INDEX_FILE": str(repo.index)}
    blob = repo.git("hash-object", "-w", "--stdin", stdin=program).strip()
    repo.git("read-tree", head, env=index)
    repo.git("update-index", "--add", "--cacheinfo", f"100644,{blob},program.md", env=index)
    tree = repo.git("write-tree", env=index).strip()
    repo.index.unlink(missing_ok=True)
    if tree == repo.git("rev-parse", f"{head}^{{tree}}").strip():
        return head
    who = {}
    if repo.ask("var", "GIT_COMMITTER_IDENT") is None:
        for role in ("AUTHOR", "COMMITTER"):
            who |= {f"GIT_{role}_NAME": "autoresearch", f"GIT_{role}_EMAIL": "autoresearch@localhost"}
    return repo.git("commit-tree", tree, "-p", head, "-m", f"program of this slot: {name}", env=who).strip()


def registered(repo, folder):
    """Whether git knows a working tree of that place, be it there or not."""
    lines = repo.git("worktree", "list", "--porcelain").split("\n")
    return f"worktree {os.path.realpath(folder)}" in lines


def make(repo, state, slot):
    """Makes the slot's branch and working tree, or completes them."""
    branch, folder = slot["branch"], Path(slot["folder"])
    there = repo.ask("rev-parse", "--verify", "--quiet", f"refs/heads/{branch}")
    if there is None:
        repo.git("update-ref", f"refs/heads/{branch}", slot["start"], NOWHERE)
    elif there != slot["start"]:
        raise Refused(f"the branch {branch} was made by somebody else meanwhile: take another TAG")
    try:
        if registered(repo, folder):
            drop_half_made(repo, folder)
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise Refused(f"{folder} was made by somebody else meanwhile: move it away")
        folder.parent.mkdir(parents=True, exist_ok=True)
        repo.git("worktree", "add", "--quiet", str(folder), branch)
        (folder / names.LAB).mkdir(exist_ok=True)
        link = folder / ".venv"
        if state["python"] and not os.path.lexists(link):
            os.symlink(state["python"], link, target_is_directory=True)
    except Refused:
        raise
    except Stop as stop:
        raise Unfinished(f"{folder}: {stop}; nothing is lost: the same command completes it") from None


def drop_half_made(repo, folder):
    """Takes away a working tree in which no night can have begun, as its launch was killed."""
    if any((folder / name).exists() for name in (names.RESULTS_TSV, names.RUNS_JSONL, names.RUN_LOG, names.NIGHT_LOG)):
        raise Refused(f"{folder} holds a night, though its launch was not completed: move it away")
    repo.ask("worktree", "unlock", str(folder))
    if (folder / ".git").exists():
        repo.git("worktree", "remove", "--force", "--force", str(folder))
    elif folder.is_dir():  # killed before git had written anything into it but its name
        shutil.rmtree(folder)
    repo.git("worktree", "prune")


def check_made(repo, slot):
    """A tree that was made is still there, on its branch."""
    folder = Path(slot["folder"])
    if not (folder / ".git").exists():
        raise Refused(f"{folder} is gone, and the results in it: bring it back, or git worktree prune and take another TAG")  # fmt: skip
    there = Repo(folder).ask("symbolic-ref", "--quiet", "--short", "HEAD")
    if there != slot["branch"]:
        raise Refused(f"{folder} is on {there or 'no branch'}: there, git switch {slot['branch']}")
