"""Which files decide a score, and the hash over them that every run prints in its header.

A header holds `rules_files`, the SHA-256 of each file, and `rules_sha256`, one hash over all of them: runs compare
only if it is the same. Runs made before there was a `rules_files` hashed constants.py and prepare.py alone.

Imports nothing but the standard library, so that `lab` can read headers without loading the data or torch.
"""

import hashlib
import json
from pathlib import Path

# Everything that a training run loads from its folder, except train.py. corpus/hub.py is missing on purpose: it only
# downloads, no run imports it, and what it downloaded is covered by data_sha256.
FILES = (
    "constants.py",
    "prepare.py",
    "corpus/__init__.py",
    "corpus/build.py",
    "corpus/documents.py",
    "corpus/layout.py",
    "corpus/packing.py",
    "corpus/rules.py",
    "corpus/shards.py",
    "corpus/system.py",
    "corpus/tokenizer.py",
    "frozen/__init__.py",
    "frozen/device.py",
    "frozen/process.py",
)
FIRST_FILES = ("constants.py", "prepare.py")  # of a header without rules_files


def file_hashes(folder, names=FILES):
    """{name: SHA-256 in hex, or None if the file is missing} of files below `folder`."""
    paths = {name: Path(folder) / name for name in names}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for name, path in paths.items()
    }


def combined_hash(hashes):
    """The rules_sha256 of a header whose rules_files are `hashes`."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def hash_as_in(header, folder):
    """The rules_sha256 that the files in `folder` would give a run which computes it as the run of `header` did."""
    if "rules_files" in header:
        there = [name for name in FILES if (Path(folder) / name).is_file()]  # an older tree has fewer
        return combined_hash(file_hashes(folder, {*there, *header["rules_files"]}))
    files = [Path(folder) / name for name in FIRST_FILES]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def differing_files(one, other):
    """Names of the files in which the rules of two headers differ; None if they differ and a header has no list."""
    if one["rules_sha256"] == other["rules_sha256"]:
        return []
    if not (one.get("rules_files") and other.get("rules_files")):
        return None
    ours, theirs = one["rules_files"], other["rules_files"]
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
