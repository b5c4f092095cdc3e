"""Locks that the system lets go of when their holder dies. Where Python has no fcntl (Windows) there are none:
two records at once, and a record during a run, are then the caller's to avoid."""

import contextlib
import os
import time

try:
    import fcntl
except ImportError:
    fcntl = None

from lab.errors import Refused

PATIENCE = 20  # seconds that another record may take


@contextlib.contextmanager
def one_at_a_time(folder):
    """Holds folder/lock: one record a tree."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "a") as f:
        deadline = time.monotonic() + PATIENCE
        while fcntl:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Refused("another record is at work in this tree: wait for it to end") from None
                time.sleep(0.05)
        yield


def run_in_progress(top):
    """Whether a run goes on in this tree: it holds a lock on the directory of its train.py."""
    if not fcntl:
        return False
    fd = os.open(top, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: no run can hold one there
        return False
    finally:
        os.close(fd)
