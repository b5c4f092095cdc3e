"""A team without training: working trees of one checkout, and clones that share through a bare repository.

    first = Teammate(tmp_path / "a")            a FakeNight on autoresearch/test, member of the team "gpus"
    second = first.worktree("b")                another working tree of its checkout, on autoresearch/b
    third = first.clone("c", hub)               another machine, on autoresearch/c; hub: a bare repository both share through
"""

import copy
import hashlib
from pathlib import Path

from fakenight import FakeNight

from lab.loop import checks
from lab.store.repository import Repo


class Teammate(FakeNight):
    def __init__(self, path, team="gpus"):
        super().__init__(path)
        self.start = self.head()
        if team:
            self.git("config", "autoresearch.team", team)

    def header(self, seed=42, **changes):
        frozen = hashlib.sha256((self.path / "prepare.py").read_bytes()).hexdigest()
        return super().header(seed, rules_files={"constants.py": None, "prepare.py": frozen}, **changes)

    def at(self, path):
        twin = copy.copy(self)
        twin.path = Path(path)
        twin.ideas = 100 * (1 + sum(map(ord, twin.path.name)) % 97)  # other edits than the others make
        return twin

    def worktree(self, name):
        self.git("worktree", "add", "-q", "-b", f"autoresearch/{name}", str(self.path.parent / name), self.start)
        return self.at(self.path.parent / name)

    def clone(self, name, hub, branch=None):
        place = self.path.parent / name
        self.git("clone", "-q", "--no-local", str(self.path), str(place))
        twin = self.at(place)
        twin.git("switch", "-q", "-C", f"autoresearch/{branch or name}", self.start)
        for tree in (self, twin):
            tree.git("config", "autoresearch.team", "gpus")
            tree.git("config", "autoresearch.remote", str(hub))
        return twin

    def hub(self, name="hub.git"):
        place = self.path.parent / name
        self.git("init", "-q", "--bare", str(place))
        return place

    # --- what this tree sees ---

    @property
    def repo(self):
        return Repo.find(self.path)

    @property
    def team(self):
        """Its Team, as of now."""
        repo = self.repo
        return checks.team_of(repo, checks.night_of(repo))

    @property
    def best(self):
        return self.team.best["description"]

    def next(self):
        """What status says comes next."""
        return self.lab("status").out.strip().splitlines()[-1]

    def adopted(self):
        result = self.lab("adopt")
        assert result.rc == 0, result.err
        return result

    def member(self):
        return checks.member_of(self.repo).name

    def check_team(self):
        """What must hold of what this tree has published."""
        ref = checks.member_of(self.repo).ref(self.repo.tag())
        shown = self.git("ls-tree", "-r", "--name-only", ref).splitlines()
        assert shown == [*self.git("ls-tree", "-r", "--name-only", f"refs/autoresearch/{self.repo.tag()}/log").splitlines(), "state.json"]
        for r in self.records():
            self.git("merge-base", "--is-ancestor", r["commit"], ref)
        assert self.git("fsck", "--strict", "--connectivity-only", "--no-dangling") == ""
