"""The working trees of a fleet. The whole plan is saved first, then the trees are made one after the other, so that the
next launch completes one that was killed or ran out of disk space.

A slot's branch begins at the commit of HEAD, or at a commit on top of it that replaces program.md. (It is a separate
commit because uncommitted edits would be lost with the tree, and an experiment's commit may contain only train.py.)
"""

import os
import shutil
from pathlib import Path

from lab.base.errors import Refused, Stop, Unfinished
from lab.share.membership import TEAM
from lab.store import names
from lab.store.names import PREFIX
from lab.store.repository import Repo

FREE_PER_SLOT = 1e9  # bytes: the first few checkpoints of a night, of 0.2 GB each with the default model
AGENT_FOLDERS = (".claude", ".codex", ".agents")  # an agent's settings and skills: git does not carry them to a slot
OTHER_TREES = shutil.ignore_patterns("worktrees")  # Claude Code's own working trees, below .claude
NO_COMMIT = "0" * 40  # as git update-ref writes "the ref must not exist yet"


def branch_of(tag, name):
    return f"{PREFIX}{tag}-{name}"


def check_name(repo, tag, team):
    """Raises Refused for a tag that no branch of a night can have, or whose team name (None: no team) the slots would refuse."""
    is_branch = "/" not in tag and repo.ask("check-ref-format", f"refs/heads/{branch_of(tag, 'gpu0')}") is not None
    if not is_branch or team is not None and not TEAM.fullmatch(team):
        raise Refused(f"{tag!r} cannot name a fleet: use at most 63 letters (a to z), digits, - and _, a letter or digit first")


def check_checkout(repo):
    if repo.ask("symbolic-ref", "--quiet", "HEAD") is None:
        raise Refused("HEAD is detached: git switch to the branch that the slots should start from")
    repo.head()
    if changed := repo.git("status", "--porcelain", "--untracked-files=no").split("\n")[0][3:]:
        raise Refused(f"{changed} has uncommitted changes, which the slots would not get: commit them, or git stash")


def check_free(repo, tag, folders):
    """Raises Refused if a branch, a recorded experiment or a folder of these names exists. folders: {name: Path}"""
    for name, folder in folders.items():
        branch = branch_of(tag, name)
        if repo.exists(f"refs/heads/{branch}"):
            raise Refused(f"the branch {branch} exists and does not belong to a fleet: choose another TAG")
        if repo.numbers(f"{tag}-{name}"):
            raise Refused(f"refs/{branch}/ holds experiments of an earlier night: choose another TAG")
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise Refused(f"{folder} exists: choose another TAG, or another --folder")


def check_room(folder, slots):
    """Raises Refused if the disk has too little space for the slots. Called before anything is made."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < slots * FREE_PER_SLOT:
        needed = f"each slot needs {FREE_PER_SLOT / 1e9:.0f} GB"
        raise Refused(f"{folder} has {free / 1e9:.1f} GB free, and {needed}: free some, or choose another --folder")


def programs_of(paths, slots):
    """The bytes of each slot's program.md; None for the checkout's own. If there are fewer programs than slots, they
    repeat from the first."""
    texts = []
    for path in paths or []:
        try:
            texts.append(Path(path).read_bytes())
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}: a slot needs this program") from None
        if not texts[-1].strip():
            raise Refused(f"{path} is empty: a slot needs a program")
    if len(texts) > slots:
        raise Refused(f"{len(texts)} programs for {slots} slots: use more slots or fewer programs")
    return [texts[i % len(texts)] if texts else None for i in range(slots)]


def beginning(repo, program, name):
    """The commit that a slot's branch begins at: HEAD, or a new commit on top of it with the slot's program.md."""
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
    """Whether git lists a working tree at that path, even if the folder does not exist."""
    lines = repo.git("worktree", "list", "--porcelain").split("\n")
    return f"worktree {os.path.realpath(folder)}" in lines


def make(repo, state, slot):
    """Makes the slot's branch and working tree, or completes them."""
    branch, folder = slot["branch"], Path(slot["folder"])
    there = repo.ask("rev-parse", "--verify", "--quiet", f"refs/heads/{branch}")
    if there is None:
        repo.git("update-ref", f"refs/heads/{branch}", slot["start"], NO_COMMIT)
    elif there != slot["start"]:
        raise Refused(f"the branch {branch} was made by somebody else in the meantime: choose another TAG")
    try:
        if registered(repo, folder):
            drop_half_made(repo, folder)
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise Refused(f"{folder} was made by somebody else in the meantime: move it away")
        folder.parent.mkdir(parents=True, exist_ok=True)
        repo.git("worktree", "add", "--quiet", str(folder), branch)
        (folder / names.LAB).mkdir(exist_ok=True)
        link = folder / ".venv"
        if state["python"] and not os.path.lexists(link):
            os.symlink(state["python"], link, target_is_directory=True)
        for name in AGENT_FOLDERS:
            if (repo.top / name).is_dir():  # copied: Codex follows no symbolic link
                shutil.copytree(repo.top / name, folder / name, symlinks=True, dirs_exist_ok=True, ignore=OTHER_TREES)
    except Refused:
        raise
    except Stop as stop:
        raise Unfinished(f"{folder}: {stop}; nothing is lost: the same command completes it") from None


def drop_half_made(repo, folder):
    """Removes a working tree whose launch was killed before a night could start in it. Refused if it holds a night."""
    if any((folder / name).exists() for name in (names.RESULTS_TSV, names.RUNS_JSONL, names.RUN_LOG, names.NIGHT_LOG)):
        raise Refused(f"{folder} holds a night, though its launch was not completed: move it away")
    repo.ask("worktree", "unlock", str(folder))
    if (folder / ".git").exists():
        repo.git("worktree", "remove", "--force", "--force", str(folder))
    elif folder.is_dir():  # git was killed before it had written anything into the folder
        shutil.rmtree(folder)
    repo.git("worktree", "prune")


def check_made(repo, slot):
    """Raises Refused if a tree that was made is gone or is on another branch."""
    folder = Path(slot["folder"])
    if not (folder / ".git").exists():
        raise Refused(f"{folder} is gone with its results: restore it, or git worktree prune and choose another TAG")
    there = Repo(folder).ask("symbolic-ref", "--quiet", "--short", "HEAD")
    if there != slot["branch"]:
        raise Refused(f"{folder} is on {there or 'no branch'}: there, git switch {slot['branch']}")
