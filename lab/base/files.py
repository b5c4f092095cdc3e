"""Writing a file whole or not at all."""

import errno
import os
import tempfile
from pathlib import Path

ROOM = 1 << 16  # bytes: with less than that free the disk is full


def write(path, content):
    """Replaces the file with `content` (str as UTF-8, or bytes). Readers see either the old file or the new one, also
    after a power cut. A symbolic link stays: the file that it points to is replaced. If it raises OSError, the old
    file is unchanged."""
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content.encode("utf-8") if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interrupt too
        temporary.unlink(missing_ok=True)
        raise


def disk_is_full(folder):
    """Whether no more than a few lines can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as f:
            return f.write(bytes(ROOM)) < ROOM
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)


def flush(path):
    """Returns once the file is on the disk, where a power cut leaves it whole. Raises OSError. Some network file systems
    refuse this to a file that was opened to be read: it is then as safe as they make it."""
    how = os.O_RDWR | os.O_BINARY if os.name == "nt" else os.O_RDONLY  # Windows flushes only what may be written
    fd = os.open(path, how)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.EBADF, errno.ENOSYS):
            raise
    finally:
        os.close(fd)
