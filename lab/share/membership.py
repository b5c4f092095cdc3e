"""Whether this working tree is a member of a team, and under which name it writes.

    git config autoresearch.team gpus            joins the team "gpus": all working trees of this checkout
    git config autoresearch.remote PATH-OR-URL   shares with other machines, through a git remote that all members can push to

A member is a working tree. Its name is random and in its own git folder, so two clones with the same branch never write the
same ref. Without autoresearch.team nothing in lab.share is used.
"""

import hashlib
import os
import platform
import re
import secrets
from pathlib import Path
from typing import NamedTuple

from lab.base.errors import Refused
from lab.base.files import write
from lab.store import names

NAME = re.compile(r"[0-9a-f]{12}")
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
    remote = (repo.ask("config", names.REMOTE) or "").strip() or None
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
    """The name in the file, which is of the working tree `top`; a new one if there is none, or if the file was copied from
    a tree that still has it."""
    name, place = read(path)
    if name and place == str(top):
        return name
    if name is None or read(Path(place) / ".git" / names.MEMBER)[0] == name:
        name = secrets.token_hex(6)
    if not path.exists():
        return first(path, name, top)
    write(path, f"{name} {top}\n")  # the tree may have been moved
    return name


def first(path, name, top):
    """Writes the file unless another process was faster; returns the name that it has."""
    beside = path.with_name(f"{path.name}.{name}")
    write(beside, f"{name} {top}\n")
    try:
        os.link(beside, path)
    except FileExistsError:
        name = read(path)[0] or name
    except OSError:  # a file system without links
        os.replace(beside, path)
    beside.unlink(missing_ok=True)
    return name


def read(path):
    """(name, the working tree that it was given to) in the file; (None, "") if there is no such file, or it is damaged."""
    try:
        name, _, place = path.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
    except OSError:
        return None, ""
    return (name, place) if NAME.fullmatch(name) and place else (None, "")
