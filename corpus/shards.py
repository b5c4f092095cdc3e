"""The training shards: tokens as uint16 (N,), and beside them document offsets as int64 (documents + 1,)."""

from itertools import repeat

import numpy as np

from corpus.layout import data_dir, load_manifest
from corpus.system import replacing

OFFSETS_AT_ONCE = 1 << 16  # document offsets turned into Python ints together: 0.5 MB, and few numpy calls


def shard_path(root, i):
    return root / f"train_{i:05d}.npy"


def offsets_path(shard):
    return shard.with_name(shard.stem + "_offsets.npy")


def write_shard(path, encoded):
    """Writes tokens to `path`, and document offsets beside it, as they come: memory does not grow with the shard.

    encoded: iterator of (tokens uint16, length of each document). Returns the counts for the manifest."""
    header = {"descr": "<u2", "fortran_order": False}
    lengths, total = [np.zeros(1, dtype=np.int64)], 0
    with replacing(path) as temp:
        with open(temp, "wb") as f:
            np.lib.format.write_array_header_1_0(f, header | {"shape": (0,)})  # leaves room for a longer shape
            header_size = f.tell()
            for tokens, document_lengths in encoded:
                f.write(tokens.tobytes())
                lengths.append(document_lengths)
                total += len(tokens)
            f.seek(0)
            np.lib.format.write_array_header_1_0(f, header | {"shape": (total,)})
            assert f.tell() == header_size, f"the header grew from {header_size} to {f.tell()} bytes"
        with replacing(offsets_path(path)) as offsets_temp, open(offsets_temp, "wb") as f:
            np.save(f, np.cumsum(np.concatenate(lengths)))
    return {"tokens": total, "documents": sum(map(len, lengths)) - 1}


def open_shards():
    """The prepared shards as [(tokens, offsets)], memory-mapped."""
    paths = [shard_path(data_dir(), i) for i in range(load_manifest()["train_shards"])]
    return [(np.asarray(np.load(p, mmap_mode="r")), np.load(offsets_path(p), mmap_mode="r")) for p in paths]


def endless_documents(shards, state):
    """Yields (length, tokens, start) of each document, in order, again and again. state, a Counter: "epoch"."""
    while True:
        state["epoch"] += 1
        for tokens, offsets in shards:
            for i in range(0, len(offsets) - 1, OFFSETS_AT_ONCE):
                bounds = np.asarray(offsets[i : i + OFFSETS_AT_ONCE + 1])
                yield from zip(np.diff(bounds).tolist(), repeat(tokens), bounds[:-1].tolist())  # noqa: B905 (repeat)
