"""Locks on files and folders, which the system releases when their holder dies.

hold() is for one command at a time in a folder; filelock makes it work on Windows too. A run locks the folder of its
train.py itself (prepare.py, with flock: not on Windows), and is_held only looks.
"""

import contextlib
import errno
import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from lab.base.errors import Refused

PATIENCE = 20  # seconds that another record may take
LOOKING = 0.5  # seconds to wait for a lock that nobody should hold: is_held takes it for a moment
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # from a file system without


@contextlib.contextmanager
def hold(path, patience=LOOKING):
    """Holds the lock file at `path`, which stays there; yields whether that worked within `patience` seconds. On a file
    system without locks it yields True. Raises OSError if the file cannot be opened."""
    from filelock import FileLock, Timeout  # 0.07 s, which commands that only look are spared

    lock = FileLock(path, fallback_to_soft=False)  # the other kind of lock would outlive a holder that was killed
    try:
        lock.acquire(timeout=patience)
        held = True
    except Timeout:
        held = False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        held = True
    try:
        yield held
    finally:
        lock.release()


@contextlib.contextmanager
def one_at_a_time(folder, what="record", patience=PATIENCE):
    """Holds folder/lock. Raises Refused if another process still holds it after `patience` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / "lock", patience) as held:
        if not held:
            raise Refused(f"another {what} is running in this tree: wait for it to end")
        yield


class Kept:
    """The lock file at `path`, held from take() to close(). If somebody removes it in between (an agent's `git clean -fdx`),
    still_held() makes it and takes it again, or others would find it free."""

    def __init__(self, path, text):
        self.path, self.text = path, text
        self.holding, self.identity = contextlib.ExitStack(), None

    def take(self):
        """Returns whether the lock is held now. Raises OSError if the file cannot be opened."""
        self.close()
        held = self.holding.enter_context(hold(self.path))
        if held:
            with contextlib.suppress(OSError):  # a full disk
                self.path.write_text(self.text)
            self.identity = self.identity_now()
        return held

    def still_held(self):
        """False if another process holds it in a file of its own; it has removed this one, or came just after that."""
        if self.identity_now() == self.identity:
            return True
        try:
            self.path.parent.mkdir(exist_ok=True)
            return self.take()
        except OSError:  # a file system that cannot be written just now
            return True

    def identity_now(self):
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None
        except OSError:
            return self.identity
        return status.st_dev, status.st_ino

    def close(self):
        self.holding.close()


def is_held(path):
    """Whether a process holds the lock of this file or folder. False on Windows, on a file system without locks, and if
    the path does not exist or cannot be opened."""
    if not fcntl:
        return False
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those that look do not see each other
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def is_free(path):
    """Whether certainly no process of this machine holds the lock of this file. False if that cannot be found out: not the
    opposite of is_held."""
    if not fcntl:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def run_in_progress(top):
    """Whether a run is in progress in this tree: it holds a lock on the folder of its train.py."""
    return is_held(top)
