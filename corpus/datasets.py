"""The documents of each data set and split, as batches of strings in a fixed order."""

import hashlib
import re
import sysconfig
from pathlib import Path

from constants import DATASET, MAX_SEQ_LEN
from corpus.system import one_line

HUB = {  # repositories on the Hugging Face hub
    "climbmix": "karpathy/climbmix-400b-shuffle",
    "tinystories": "karpathy/tinystories-gpt4-clean",
}
DEFAULT_SHARDS = 10  # of climbmix
CLIMBMIX_VAL, CLIMBMIX_HOLDOUT = 6542, 6541  # these two shards are fixed; 0 ... 6540 may be trained on
TINYSTORIES_EVAL_ROWS = 10_000  # rows 0-9,999 are holdout, the next 10,000 val, the rest train
BATCH_DOCUMENTS = 1024  # documents that are read and tokenised together
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
STDLIB_SALT = 1  # of the hash that assigns packages to splits: no package makes up more than a quarter of val or holdout
PIECE_CHARACTERS = 3 * MAX_SEQ_LEN  # about one row, as a token of code is about 3 characters


def parquet_batches(path, first=0, stop=None):
    """Column `text` of rows first ... stop - 1, as lists of at most BATCH_DOCUMENTS strings, without null and empty
    ones. SystemExit if the file is damaged."""
    import pyarrow  # here, so that a run on stdlib does not load it
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as parquet:
            for batch in parquet.iter_batches(BATCH_DOCUMENTS, columns=["text"]):
                lo, hi = max(first - row, 0), len(batch) if stop is None else min(stop - row, len(batch))
                row += len(batch)
                if lo < hi and (texts := [t for t in batch.column(0)[lo:hi].to_pylist() if t]):
                    yield texts
                if stop is not None and row >= stop:
                    return
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"{path} cannot be read near row {row} ({one_line(e)}): delete it, then run again") from e


def cut_module(source):
    """Yields the pieces of a module, cut before each `def`, `class` and decorator in column 0. Pieces much longer than
    a row are also cut at empty lines, because packing crops long documents. Packing would keep almost none of CPython
    3.11's tokens from whole modules, 22 % from modules cut at definitions only, and keeps 53 % from these pieces (the
    rest are tables without an empty line)."""
    pieces, decorated = [[]], False
    for line in source.splitlines(keepends=True):
        if start := re.match(r"(@|(?:async +)?def\b|class\b)", line):
            if not decorated:
                pieces.append([])
            decorated = start[1] == "@"  # the next line still belongs to the decorator
        pieces[-1].append(line)
    for piece in map("".join, pieces):
        document = ""
        for paragraph in re.split(r"(?<=\n)(?=\s*\n)", piece):
            if len(document) + len(paragraph) > PIECE_CHARACTERS:
                yield document
                document = ""
            document += paragraph
        yield document


def stdlib_documents(split):
    """The standard library's modules, cut into pieces. A package with everything in it belongs to one split."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if STDLIB_LEFT_OUT.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
            package = relative.parts[0].removesuffix(".py").lower()
            bucket = int(hashlib.sha256(f"{STDLIB_SALT}:{package}".encode()).hexdigest(), 16) % 10
            if {0: "val", 1: "holdout"}.get(bucket, "train") == split:
                for i, piece in enumerate(cut_module(path.read_text(encoding="utf-8", errors="replace"))):
                    if piece.strip():
                        documents.append((hashlib.sha256(f"{relative.as_posix()}:{i}".encode()).digest(), piece))
    return [piece for _, piece in sorted(documents)]  # by hash: spreads each package over the whole split


def raw_sources(split, num_shards):
    """The sources of a split's documents: (file, first row, stop row) of parquet files, or ("stdlib", split)."""
    if DATASET == "stdlib":
        return [("stdlib", split)]
    if DATASET == "tinystories":
        first = {"holdout": 0, "val": TINYSTORIES_EVAL_ROWS, "train": 2 * TINYSTORIES_EVAL_ROWS}[split]
        return [("tinystories_gpt4_clean.parquet", first, None if split == "train" else first + TINYSTORIES_EVAL_ROWS)]
    shards = {"val": [CLIMBMIX_VAL], "holdout": [CLIMBMIX_HOLDOUT], "train": range(num_shards)}[split]
    return [(f"shard_{i:05d}.parquet", 0, None) for i in shards]


def document_batches(raw, sources):
    """Lists of strings from `sources`; raw is the folder with the parquet files."""
    for name, *rows in sources:
        if name == "stdlib":
            documents = stdlib_documents(*rows)
            yield from (documents[i : i + BATCH_DOCUMENTS] for i in range(0, len(documents), BATCH_DOCUMENTS))
        else:
            yield from parquet_batches(raw / name, *rows)
