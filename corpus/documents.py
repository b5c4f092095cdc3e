"""The documents of each data set and split, as batches of strings in a fixed order."""

import hashlib
import re
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq

from constants import DATASET, MAX_SEQ_LEN
from corpus.hub import one_line

CLIMBMIX_VAL, CLIMBMIX_HOLDOUT = 6542, 6541  # pinned shards; 0 ... 6540 may be trained on
TINYSTORIES_EVAL_ROWS = 10_000  # rows 0-9,999 are holdout, the next 10,000 val, the rest train
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


def parquet_batches(path, first=0, stop=None):
    """Column `text`, rows first ... stop - 1, as lists of at most 1,024 strings; null and empty ones left out."""
    row = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as parquet:
            for batch in parquet.iter_batches(1024, columns=["text"]):
                lo, hi = max(first - row, 0), len(batch) if stop is None else min(stop - row, len(batch))
                row += len(batch)
                if lo < hi and (texts := [t for t in batch.column(0)[lo:hi].to_pylist() if t]):
                    yield texts
                if stop is not None and row >= stop:
                    return
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"{path} cannot be read near row {row} ({one_line(e)}): delete it, then run again") from e


def cut_module(source):
    """Cuts a module before each `def`, `class` and decorator in column 0, and what is much longer than a row also
    at empty lines: packing crops long documents away. Of CPython 3.11's tokens in whole modules it would keep next
    to none, cut at definitions alone 22 %, cut like this 53 % (the rest are tables without an empty line)."""
    pieces, decorated = [[]], False
    for line in source.splitlines(keepends=True):
        if start := re.match(r"(@|(?:async +)?def\b|class\b)", line):
            if not decorated:
                pieces.append([])
            decorated = start[1] == "@"  # what follows belongs to its decorator
        pieces[-1].append(line)
    for piece in map("".join, pieces):
        document = ""
        for paragraph in re.split(r"(?<=\n)(?=\s*\n)", piece):
            if len(document) + len(paragraph) > 3 * MAX_SEQ_LEN:  # a token of code is about 3 characters
                yield document
                document = ""
            document += paragraph
        yield document


def stdlib_documents(split):
    """The standard library's modules, cut into pieces. A package and all below it lie in one split."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if STDLIB_LEFT_OUT.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
            package = relative.parts[0].removesuffix(".py").lower()
            # The 1 is a salt, chosen so that no single package makes up more than a quarter of val or of holdout.
            bucket = int(hashlib.sha256(f"1:{package}".encode()).hexdigest(), 16) % 10
            if {0: "val", 1: "holdout"}.get(bucket, "train") == split:
                for i, piece in enumerate(cut_module(path.read_text(encoding="utf-8", errors="replace"))):
                    if piece.strip():
                        documents.append((hashlib.sha256(f"{relative.as_posix()}:{i}".encode()).digest(), piece))
    return [piece for _, piece in sorted(documents)]  # by hash: no package is met all at once


def raw_sources(split, num_shards):
    """Where a split's documents are: (file, first row, stop row) of parquet files, or ("stdlib", split)."""
    if DATASET == "stdlib":
        return [("stdlib", split)]
    if DATASET == "tinystories":
        first = {"holdout": 0, "val": TINYSTORIES_EVAL_ROWS, "train": 2 * TINYSTORIES_EVAL_ROWS}[split]
        return [("tinystories_gpt4_clean.parquet", first, None if split == "train" else first + TINYSTORIES_EVAL_ROWS)]
    shards = {"val": [CLIMBMIX_VAL], "holdout": [CLIMBMIX_HOLDOUT], "train": range(num_shards)}[split]
    return [(f"shard_{i:05d}.parquet", 0, None) for i in shards]


def document_batches(raw, sources):
    for name, *rows in sources:
        if name == "stdlib":
            documents = stdlib_documents(*rows)
            yield from (documents[i : i + 1024] for i in range(0, len(documents), 1024))
        else:
            yield from parquet_batches(raw / name, *rows)
