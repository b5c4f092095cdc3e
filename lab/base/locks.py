"""Locks that the system lets go of when their holder dies. Where Python has no fcntl (Windows) there are none:
two records at once, and a record during a run, are then the caller's to avoid."""

import contextlib
import os
import time

try:
    import fcntl
except ImportError:
    fcntl = None

from lab.base.errors import Refused

PATIENCE = 20  # seconds that another record may take


def take(f, patience=0.5):
    """Locks the open file until it is closed. False where another process holds it all the while (the patience, in
    seconds, is for those that only look); True, without a lock, on a file system that has none."""
    deadline = time.monotonic() + patience
    while fcntl:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError:
            break
    return True


def is_held(path):
    """Whether a process holds the lock file at `path`."""
    try:
        with open(path, "rb") as f:
            if fcntl:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # there is no such file, it is another user's, or the file system has no locks
        return False


@contextlib.contextmanager
def one_at_a_time(folder, what="record", patience=PATIENCE):
    """Holds folder/lock: one record a tree, one change of the fleets a checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as f:
        if not take(f, patience):
            raise Refused(f"another {what} is at work in this tree: wait for it to end")
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
