"""What record and status ask of git, and the few changes that record makes, by git's own command line.

A chain is the first-parent history of HEAD, newest first. A commit that touches train.py is an experiment's; any other
is the human's, who commits to program.md on the same branch.
"""

import re
from pathlib import Path
from typing import NamedTuple

from lab.base.errors import Damaged, Refused
from lab.base.git import REFS, GitError, Objects, git, read_only, refs_in
from lab.store import names
from lab.store.names import PREFIX

LARGEST, SECONDS = 1 << 28, 20  # bytes that git may print, and time that it may take, in a tree that is not trusted
DEPTH = 500  # commits to train.py that the search for the last kept one looks through


class Edit(NamedTuple):
    """A commit that changed train.py, and the blob that it left there."""

    commit: str
    blob: str


class Repo:
    def __init__(self, top):
        self.top = Path(top)
        self.shorts = {}  # {commit: its short name}
        self.team_refs = None  # the team's refs, if they are to be taken as they were read: see lab.share.exchange.refs_of

    @classmethod
    def find(cls, path):
        try:
            return cls(git(path, "rev-parse", "--show-toplevel").strip())
        except GitError as error:
            if error.missing:
                raise Refused("git is not installed") from None
            raise Refused(f"{path} is not in a git checkout: call it in your clone of autoresearch") from None

    def git(self, *args, **kwargs):
        return git(self.top, *args, **kwargs)

    def ask(self, *args, **kwargs):
        """What git prints, stripped; None if it fails."""
        try:
            return self.git(*args, **kwargs).strip()
        except GitError:
            return None

    def refs(self, *patterns):
        """{ref: object name}, as lab.base.git.refs."""
        return refs_in(self.git("for-each-ref", REFS, *patterns))

    def reader(self):
        """Reads many objects by one git: lab.base.git.Objects, to be closed."""
        return Objects(self.top)

    def tag(self):
        """nov21 on the branch autoresearch/nov21; a refusal elsewhere."""
        branch = self.ask("symbolic-ref", "--quiet", "--short", "HEAD")
        if branch is None:
            raise Refused(f"HEAD is detached: git switch {PREFIX}TAG, the branch of this night")
        if not branch.startswith(PREFIX) or branch == PREFIX:
            raise Refused(f"on branch {branch}: git switch {PREFIX}TAG, or git switch -c {PREFIX}TAG for a new night")
        tag = branch[len(PREFIX) :]
        if "/" in tag:  # in git a ref cannot be both a file and a folder, as a/log would be beside a
            flat = tag.replace("/", "-")
            raise Refused(f"a night's name has no / in it: git branch -m {branch} {PREFIX}{flat}")
        return tag

    def head(self):
        head = self.ask("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        if not head:
            raise Refused("this branch has no commit yet: commit train.py first")
        return head

    def short(self, commit):
        if commit not in self.shorts:
            self.shorts[commit] = self.git("rev-parse", "--short", commit).strip()
        return self.shorts[commit]

    def exists(self, commit):
        return self.ask("cat-file", "-e", f"{commit}^{{commit}}") is not None

    def train_is_committed(self):
        if not (self.top / names.TRAIN).is_file():
            return False
        try:
            self.git("diff", "--quiet", "HEAD", "--", names.TRAIN)
        except GitError as error:
            if error.status == 1:
                return False
            index = self.ask("rev-parse", "--git-path", "index")
            if index and re.search(r"\bindex\b", f"{error}"):
                raise Damaged(f"git cannot read its index ({error}): rm {index}, then git reset") from None
            raise
        return True

    def edits(self):
        """The commits of the chain that changed train.py, newest first."""
        lines = self.git(
            "log", "--first-parent", "-m", "--raw", "--no-abbrev", "--no-renames", f"-n{DEPTH}", "--format=%H",
            "HEAD", "--", names.TRAIN,
        ).split("\n")  # fmt: skip
        edits, commit = [], None
        for line in lines:
            if line.startswith(":"):
                edits.append(Edit(commit, line.split()[3]))
            elif line:
                commit = line
        return edits

    def files(self, commits):
        """{commit: names of the files that it touches}, against the first parent."""
        if not commits:
            return {}
        shown = self.git(
            "-c", "core.quotePath=off", "show", "--first-parent", "-m", "--name-only", "--no-renames",
            "--format=%x01%H", *commits,
        )  # fmt: skip
        blocks = [block.strip("\n").split("\n") for block in shown.split("\x01")[1:]]
        return {lines[0]: [line for line in lines[1:] if line] for lines in blocks}

    def own_edits(self, tag):
        """Commits to train.py that are on no other branch; [] if there is no other branch to compare with."""
        refs = self.git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes", "refs/tags").split()
        others = [ref for ref in refs if not ref.endswith(f"/{PREFIX}{tag}")]
        if not others:
            return []
        # The names go in by stdin: there may be more of them than a command line holds.
        wanted = "HEAD\n" + "".join(f"^{ref}\n" for ref in others)
        return self.git("rev-list", "--first-parent", "--stdin", "--", names.TRAIN, stdin=wanted).split()

    def line_counts(self, old, new):
        """(added, removed) lines of train.py, blank ones and white space left out."""
        shown = self.git("diff", "-w", "--ignore-blank-lines", "--no-color", "-U0", old, new, "--", names.TRAIN)
        body = [line for line in shown.split("\n")[4:] if line[1:].strip()]
        return sum(line.startswith("+") for line in body), sum(line.startswith("-") for line in body)

    def numbers(self, tag):
        """{NNNN: commit} of refs/autoresearch/TAG."""
        where = f"refs/{PREFIX}{tag}/"
        listed = self.git("for-each-ref", "--format=%(refname) %(objectname)", where).split("\n")
        pairs = [line[len(where) :].split() for line in listed if line]
        return {int(number): commit for number, commit in pairs if number.isdecimal()}

    def set_number(self, tag, number, commit):
        self.git("update-ref", f"refs/{PREFIX}{tag}/{number:04d}", commit)

    def has_ref(self, ref):
        """Whether there is such a ref, a damaged one too."""
        if self.ask("rev-parse", "--verify", "--quiet", ref):
            return True
        common = self.ask("rev-parse", "--git-common-dir")
        return common is not None and (self.top / common / ref).is_file()

    def remove_ref(self, ref):
        """Removes a ref, a damaged one too."""
        if self.ask("update-ref", "-d", ref) is None or self.has_ref(ref):
            (self.top / self.git("rev-parse", "--git-common-dir").strip() / ref).unlink(missing_ok=True)

    def drop(self, commits):
        """Removes the commits from the chain of HEAD. The human's commits on top of them and between them stay, with
        their messages, authors and dates, and so do uncommitted edits. Dropped commits touch only train.py, and the
        others do not touch it, so each remaining commit keeps its tree except for train.py. A second call changes
        nothing. Returns False, and changes nothing, if a commit to train.py that is not dropped is on top of a dropped
        one."""
        edits = self.edits()
        on_chain = [i for i, edit in enumerate(edits) if edit.commit in commits]
        if not on_chain:
            return True
        if {edit.commit for edit in edits[: on_chain[-1] + 1]} - set(commits):
            return False
        last = edits[on_chain[-1]].commit
        base, before, head, top = self.git("rev-parse", f"{last}^", f"{last}^:train.py", "HEAD:train.py", "HEAD").split()
        tip = base
        for line in [] if top == last else self.git("rev-list", "--first-parent", "--reverse", f"{base}..HEAD").split():
            if line not in commits:
                tip = self.transplant(line, tip, self.git("ls-tree", base, "--", names.TRAIN).split())
        there = self.ask("hash-object", "--path=train.py", names.TRAIN)
        if there == before != head:
            self.git("checkout", "--quiet", "HEAD", "--", names.TRAIN)  # a reset that was killed came this far
        self.refresh(there == head)  # a commit that was killed may have left an older index
        self.git("reset", "--quiet", "--keep", tip)
        self.index.unlink(missing_ok=True)
        return True

    def restore(self, old, new, message, author=None):
        """Adds a commit that makes train.py, whose blob is `old`, the blob `new`; nothing else changes, uncommitted edits
        included. author: (name, email) if it is another's work. A second call changes nothing. Returns False if train.py
        of HEAD is neither: then nothing is changed."""
        entries = self.git("ls-tree", "-z", "HEAD", raw=True).split(b"\0")
        entry = next(entry for entry in entries if entry.endswith(b"\t" + names.TRAIN.encode()))
        mode, _, blob = entry.decode().split()[:3]
        there = self.ask("hash-object", "--path=train.py", names.TRAIN)
        if blob not in (old, new):
            return False
        if there == new and blob == old:
            self.git("checkout", "--quiet", "HEAD", "--", names.TRAIN)  # a reset that was killed came this far
        self.refresh(there == blob)
        if blob == old:
            changed = f"{mode} blob {new}\t{names.TRAIN}".encode()
            tree = self.git("mktree", "-z", stdin=b"\0".join(changed if e == entry else e for e in entries)).strip()
            env = dict(zip(("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL"), author, strict=True)) if author else None
            commit = self.git("commit-tree", tree, "-p", "HEAD", "-m", message, env=env).strip()
            self.git("reset", "--quiet", "--keep", commit)
        self.index.unlink(missing_ok=True)
        return True

    def refresh(self, train):
        """Makes git's index know the files as they are, or a file that was only touched would look edited; train: puts
        train.py into it."""
        if self.ask("update-index", "-q", *[names.TRAIN] * train, "--refresh") is None and train:
            self.git("update-index", "--", names.TRAIN)
            self.ask("update-index", "-q", "--refresh")

    def transplant(self, commit, parent, entry):
        """The commit again on another parent, with train.py as in `entry` (mode, type, blob, name); its new name."""
        index = {"GIT_INDEX_FILE": str(self.index)}
        self.git("read-tree", commit, env=index)
        self.git("update-index", "--add", "--cacheinfo", f"{entry[0]},{entry[2]},train.py", env=index)
        tree = self.git("write-tree", env=index).strip()
        head, _, message = self.git("cat-file", "commit", commit, raw=True).partition(b"\n\n")
        lines, parents, signed = [], 0, False
        for line in head.split(b"\n"):
            signed = line.startswith(b"gpgsig") or (signed and line.startswith(b" "))
            if signed:  # the signature would no longer be valid
                continue
            if line.startswith(b"tree "):
                line = b"tree " + tree.encode()
            elif line.startswith(b"parent "):
                line, parents = (b"parent " + parent.encode() if parents == 0 else line), parents + 1
            lines.append(line)
        body = b"\n".join(lines) + b"\n\n" + message
        return self.git("hash-object", "-t", "commit", "-w", "--stdin", stdin=body).strip()

    @property
    def index(self):
        """A second index file, to make trees in."""
        return self.top / names.LAB / names.INDEX


class Untrusted(Repo):
    """A working tree that an agent may have prepared: git starts nothing that its configuration names, waits for nothing and
    changes nothing (lab.base.git.read_only)."""

    def git(self, *args, stdin=None, raw=False):
        shown = read_only(self.top, *args, stdin=stdin, raw=True, limit=LARGEST, seconds=SECONDS)
        if shown is None or len(shown) == LARGEST:
            raise GitError(args, "it failed, took too long or printed too much")
        return shown if raw else shown.decode(errors="replace")

    def reader(self):
        return Objects(self.top, trusted=False, seconds=SECONDS, most=LARGEST)
