"""The rules of a run: the files that decide a score. Whether two runs, a run and a tree, or two commits have the same.

A run prints them in its header: `rules_files`, {path: sha256, or null for a file that was missing}, and `rules_sha256`,
one hash over them. Older headers have no list, only a rules_sha256 of constants.py and prepare.py one after the other.
Which files count is read from the header, so a night that was begun under other frozen files is compared by its own
list. Nothing here imports the frozen code.
"""

import hashlib
import re
from pathlib import Path

from lab.store import names

FIRST_FILES = (names.CONSTANTS, "prepare.py")  # the rules of a header without a list; every list has them
FOLDERS = ("corpus", "frozen")  # of the frozen half: it needs them, and a list of the rules names files in them
UNKNOWN = "constants.py or prepare.py"  # all that can be said of two hashes over both
PATH = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)  # below the tree: an agent can write the header


def listed(header):
    """{path: sha256, or None} of a header; None if it has no list of files, or a malformed one."""
    files = header.get("rules_files")
    ok = isinstance(files, dict) and all(name in files for name in FIRST_FILES)
    ok = ok and all(PATH.fullmatch(name) and (digest is None or isinstance(digest, str)) for name, digest in files.items())
    return files if ok else None


def hashes(read, paths):
    """{path: sha256, or None if the file is missing}. read: as tree() and commit() return it."""
    contents = {path: read(path) for path in paths}
    return {path: None if data is None else hashlib.sha256(data).hexdigest() for path, data in contents.items()}


def tree(top):
    """A function from a path to the bytes of the file in the folder `top`; to None if there is no such file."""
    return lambda path: (Path(top) / path).read_bytes() if (Path(top) / path).is_file() else None


def commit(repo, name):
    """As tree(), of a commit: the files come from git."""

    def read(path):
        there = repo.ask("cat-file", "-e", f"{name}:{path}") is not None
        return repo.git("show", f"{name}:{path}", raw=True) if there else None

    return read


def explains(header, read):
    """Whether a header without a list has the hash of these files."""
    contents = [read(path) for path in FIRST_FILES]
    return None not in contents and hashlib.sha256(b"".join(contents)).hexdigest() == header["rules_sha256"]


def changed(header, read):
    """Paths of the rules' files that are not what the run of this header had; [] if its rules are these."""
    if files := listed(header):
        now = hashes(read, files)
        return sorted(path for path in files if files[path] != now[path])
    return [] if explains(header, read) else [UNKNOWN]


def differing(first, other, read_first, read_other):
    """Paths of the rules' files in which two runs differ; [] if they ran under the same rules. A header without a list
    is compared by the files of its run, if read_first and read_other still find them."""
    ours, theirs = listed(first), listed(other)
    if ours and theirs:
        return sorted(path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path))
    if first["rules_sha256"] == other["rules_sha256"]:
        return []
    if ours is None and explains(first, read_first):
        ours = hashes(read_first, FIRST_FILES)
    if theirs is None and explains(other, read_other):
        theirs = hashes(read_other, FIRST_FILES)
    named = [path for path in FIRST_FILES if ours and theirs and ours.get(path) != theirs.get(path)]
    return named or [UNKNOWN]


# ---------------------------------------------------------------------------------------------------
# All frozen files, for what has no header: a commit that never ran, cached scores


def files_in(top):
    """Paths of the frozen files in a tree: all that a list of the rules may name, and others such as
    corpus/download.py."""
    top = Path(top)
    found = [path.relative_to(top).as_posix() for folder in FOLDERS for path in (top / folder).rglob("*.py")]
    return [*(name for name in FIRST_FILES if (top / name).is_file()), *sorted(found)]


def places_in(repo, name):
    """constants.py, prepare.py and the frozen folders that the commit has: what a run of it needs beside train.py."""
    return repo.git("ls-tree", "--name-only", name, "--", *FIRST_FILES, *FOLDERS).split()


def objects_of(repo, name):
    """{path: git's name for the contents} of all frozen files of a commit."""
    lines = repo.git("ls-tree", "-r", name, "--", *FIRST_FILES, *FOLDERS).splitlines()
    return {path: entry.split()[2] for entry, _, path in (line.partition("\t") for line in lines)}
