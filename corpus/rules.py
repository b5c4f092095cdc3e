"""Which files decide a score, and the hash over them that every run prints in its header.

A header holds `rules_files`, the SHA-256 of each file, and `rules_sha256`, one hash over all of them: two runs are
comparable only if it is the same.

Imports nothing but the standard library, so that `lab` can read headers without loading the data or torch.
"""

import hashlib
import json
from pathlib import Path

# Everything that a training run loads from its folder, except train.py. corpus/download.py is missing on purpose: it only
# downloads, no run imports it, and what it downloaded is covered by data_sha256.
FILES = (
    "constants.py",
    "prepare.py",
    "corpus/__init__.py",
    "corpus/build.py",
    "corpus/datasets.py",
    "corpus/layout.py",
    "corpus/packing.py",
    "corpus/rules.py",
    "corpus/shards.py",
    "corpus/system.py",
    "corpus/tokenizer.py",
    "frozen/__init__.py",
    "frozen/audit.py",
    "frozen/device.py",
    "frozen/guard.py",
    "frozen/metric.py",
    "frozen/process.py",
)


def file_hashes(folder, names=FILES):
    """{name: SHA-256 in hex, or None if the file is missing} of files below `folder`."""
    paths = {name: Path(folder) / name for name in names}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for name, path in paths.items()
    }


def combined_hash(hashes):
    """The rules_sha256 of a header whose rules_files are `hashes`."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
