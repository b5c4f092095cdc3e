"""What corpus/ and prepare.py need from the operating system: cores, hashes of files, files written whole or not at
all, and the message of an error on one line."""

import hashlib
import os
from contextlib import contextmanager


def usable_cores():
    """Number of CPU cores that this process may run on. macOS and Windows do not report it: there it is all cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sha256_files(*paths):
    """SHA-256, in hex, of the files' contents one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path):
    """Yields a path beside `path` to write to; renames it to `path` if the block succeeds, removes it otherwise."""
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temp
        with open(temp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__
