"""Where the prepared data are, what they depend on, and the manifest that describes them.

    ~/.cache/autoresearch/ (AUTORESEARCH_CACHE replaces it)
        <dataset>/raw/                      downloaded parquet files
        <dataset>/<hash of DATA_RULES>/     tokenizer.tiktoken, train_NNNNN.npy and ..._offsets.npy, val_rows.npy,
                                            holdout_rows.npy, and manifest.json, which is written last
"""

import hashlib
import json
import os
import platform
from pathlib import Path

from constants import DATASET, EVAL_TOKENS, MAX_SEQ_LEN, VOCAB_SIZE
from corpus.packing import PACKING_BUFFER
from corpus.tokenizer import SPLIT_PATTERN

DATA_RULES = {  # everything the data depend on: if a value differs, they are prepared again in another folder
    "format": 1, "dataset": DATASET, "max_seq_len": MAX_SEQ_LEN, "eval_tokens": EVAL_TOKENS, "vocab_size": VOCAB_SIZE,
    "split_pattern": SPLIT_PATTERN, "packing_buffer": PACKING_BUFFER,
    "python": platform.python_version() if DATASET == "stdlib" else "any",
}  # fmt: skip
NO_LONGER_READ = "token_bytes.npy"  # listed in the manifests of older versions; the tokenizer has what was in it


def cache_dir():
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def raw_dir():
    return cache_dir() / DATASET / "raw"


def data_dir():
    digest = hashlib.sha256(json.dumps(DATA_RULES, sort_keys=True).encode()).hexdigest()
    return cache_dir() / DATASET / digest[:12]


def data_hash(files):
    """One hash for the prepared data, from the manifest's entries of their files."""
    digests = {name: entry["sha256"] for name, entry in files.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def read_manifest(path):
    """The manifest at `path`, with its data_sha256; None if it is missing, damaged, or was written for other rules.

    A manifest of an older version gives the same data_sha256 as one written today for the same data."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["rules"] != DATA_RULES:
            return None
        manifest["files"].pop(NO_LONGER_READ, None)
        return manifest | {"data_sha256": data_hash(manifest["files"])}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def damaged_file(root, files):
    """A sentence about the first file whose size differs from its manifest entry; None if all sizes are right."""
    for name, entry in files.items():
        size = (root / name).stat().st_size if (root / name).exists() else 0
        if size != entry["bytes"]:
            return f"{root / name} is damaged: {size:,} of {entry['bytes']:,} bytes are there"
    return None


def load_manifest():
    """The manifest of the prepared data. SystemExit with the command to run if they are missing or damaged."""
    root = data_dir()
    command = f"run `{'' if DATASET == 'climbmix' else f'AUTORESEARCH_DATASET={DATASET} '}uv run prepare.py`"
    if not (manifest := read_manifest(root / "manifest.json")):
        raise SystemExit(f"{DATASET} is not prepared in {root}: {command} once")
    if sentence := damaged_file(root, manifest["files"]):
        raise SystemExit(f"{sentence}: {command} to mend it")
    return manifest
