"""Whether this working tree is a member of a team, and under which name it writes.

    git config autoresearch.team gpus            joins the team "gpus": all working trees of this checkout
    git config autoresearch.remote PATH-OR-URL   shares with other machines, through a git remote that all members can push to

A member is a working tree. Its name is random and in its own git folder, so two clones with the same branch never write the
same ref. A copy of a working tree notices that it is one, and gets another name. Without autoresearch.team nothing in lab.share is used.
"""

import hashlib
import os
import platform
import re
import secrets
import sys
from pathlib import Path
from typing import NamedTuple

from lab.base import locks
from lab.base.errors import Refused
from lab.base.files import write
from lab.store import names

NAME = re.compile(r"[0-9a-f]{12}")
STAMP = re.compile(r"\d+:\d+")
LOCK_SECONDS = 5  # that another process may need to draw a name
TEAM = re.compile(r"[A-Za-z0-9][\w-]{0,62}", re.ASCII)


class Member(NamedTuple):
    team: str
    name: str  # of this working tree in the team: 12 hexadecimal digits
    remote: str | None  # name, path or URL of the git remote that the team shares through; None: this checkout only
    shared: Path | None  # folder in the git folder that all working trees of this checkout share; for caches and locks
    apart: int = 1  # from which of a team's seeds this member begins: trees of one checkout have numbers in a row

    def ref(self, tag):
        """The ref that this member publishes its branch autoresearch/TAG to; nobody else writes it."""
        return names.member_ref(self.team, self.name, tag)

    @property
    def refs(self):
        """The prefix of all refs of the team, of every member and of the queue."""
        return f"{names.TEAM_REFS}{self.team}/"

    @property
    def mirror(self):
        """The prefix of what was fetched of them."""
        return f"{names.MIRROR_REFS}{self.team}/"


def membership(repo):
    """The Member that this working tree is; None if it is in no team. Gives the tree its name on the first call. Raises
    Refused if the configuration cannot be used."""
    team = team_name(repo)
    if not team:
        return None
    own, common = repo.git("rev-parse", "--absolute-git-dir", "--git-common-dir").splitlines()
    remote = remote_of(repo)
    if remote and remote.startswith("-"):
        raise Refused(f"{remote[:80]!r} is not a git remote: git config {names.REMOTE} NAME-OR-PATH-OR-URL")
    shared = (repo.top / common).resolve() / names.SHARE
    return Member(team, name_of(Path(own) / names.MEMBER, repo.top.resolve()), remote, shared, apart(Path(own), shared, remote))


def team_name(repo):
    """The name of the team that this working tree is in; None if it is in none. Raises Refused if it cannot be used."""
    team = (repo.ask("config", names.TEAM) or "").strip()
    if team and not TEAM.fullmatch(team):
        raise Refused(f"a team's name has letters, digits, - and _ only: git config {names.TEAM} gpus (it is {team[:80]!r})")
    return team or None


def remote_of(repo):
    """The git remote that the configuration names for the team; None without one."""
    return (repo.ask("config", names.REMOTE) or "").strip() or None


def apart(own, shared, remote):
    """The number of the working tree in its checkout, from 1; with a remote, where checkouts do not know of each other,
    from a number that follows from machine and path."""
    begin = hashlib.sha256(f"{platform.node()} {shared}".encode()).digest()[0] if remote else 0
    try:
        others = sorted(path.name for path in (shared.parent / "worktrees").iterdir())
    except OSError:
        others = []
    return 1 + begin + (1 + others.index(own.name) if own.name in others else 0)


def name_of(path, top):
    """The name in the file, which is of the working tree `top`; a new one if there is none, or if the git folder is a copy of
    another tree's, which then still uses that name: two writers of one ref would overwrite each other's records."""
    name, made, place = read(path)
    if name and is_original(path, made) and place == str(top):
        return name
    with locks.hold(path.with_name(f"{path.name}-drawn"), LOCK_SECONDS):  # another process may be faster
        name, made, place = read(path)
        if name and is_original(path, made) and (place == str(top) or not is_copy(path, name, Path(place), top)):
            drawn = name  # the tree may have been moved
        else:
            drawn, marker = secrets.token_hex(6), path.with_name(names.MADE)
            if not marker.exists():
                marker.touch()
            made = stamp_of(marker)
        write(path, f"{drawn} {made} {top}\n")
    if name and drawn != name:
        print(f"lab: this working tree is a copy of {place}: in the team it is a member of its own, {drawn[:4]}", file=sys.stderr)
    return drawn


def read(path):
    """(name, the stamp of the file beside it, the working tree that it was given to) in the file; (None, None, "") if there
    is no such file, or it is damaged."""
    try:
        name, made, place = path.read_text(encoding="utf-8", errors="replace").strip().split(" ", 2)
    except (OSError, ValueError):
        return None, None, ""
    return (name, made, place) if NAME.fullmatch(name) and STAMP.fullmatch(made) and place else (None, None, "")


def stamp_of(marker):
    """Inode number and time of the last change of a file that is written once. No copy has both, whatever made it: cp -a,
    rsync, tar. A tree that was moved has them, and so has one that another machine or a container mounts, under whatever host
    name: a machine's name is not asked."""
    about = marker.stat()
    return f"{about.st_ino}:{about.st_ctime_ns}"


def is_original(path, made):
    """Whether the git folder is the one that the name was given to. One of the two numbers is enough: a change of the owner
    sets the time, some network file systems number their files anew with each mount."""
    try:
        now = stamp_of(path.with_name(names.MADE))
    except OSError:
        return False
    return any(a == b != "0" for a, b in zip(now.split(":"), made.split(":"), strict=True))


def is_copy(path, name, place, top):
    """Whether the tree that had the name is still there, so that `top` is not where it was moved to. Raises Refused if both
    have one git folder: a linked working tree was copied without git, and each commit of one moves the other's HEAD."""
    try:
        same = os.path.samefile(place / ".git", top / ".git")
    except OSError:
        return False
    if same:  # one folder under two names
        return False
    if (place / ".git").is_dir():
        return read(place / ".git" / names.MEMBER)[0] == name
    if (place / ".git").read_bytes() == (top / ".git").read_bytes():
        raise Refused(f"this folder is a copy of the working tree {place} and uses its git folder: make another one by git worktree add")
    return False


def members_here(common):
    """Names of the members that are working trees of this checkout; common: its git folder."""
    try:
        linked = [*(common / "worktrees").iterdir()]
    except OSError:
        linked = []
    found = [(folder / names.MEMBER, *read(folder / names.MEMBER)) for folder in (common, *linked)]
    return {name for path, name, made, _ in found if name and is_original(path, made)}
