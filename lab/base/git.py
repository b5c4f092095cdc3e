"""Running git's own command line: with patience for locks, or read-only and guarded against the repository."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

from lab.base.errors import Stop, Unfinished

LOCK_PATIENCE = 5  # seconds that another git command may hold a lock


class GitError(Stop):
    def __init__(self, args, message, missing=False, status=None):
        super().__init__(f"git {args[0]}: {message}")
        self.missing, self.status = missing, status  # status: git's exit status


def git(path, *args, stdin=None, env=None, raw=False):
    """Runs git in `path` and returns its output: str, or bytes if `raw`. Waits for a lock that another git holds, and
    removes one that a killed git left behind. Raises GitError with git's own message."""
    env = os.environ | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"} | (env or {})
    data = stdin.encode() if isinstance(stdin, str) else stdin
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            done = subprocess.run(["git", *args], cwd=path, input=data, capture_output=True, env=env)
        except FileNotFoundError:
            raise GitError(args, "not installed", missing=True) from None
        if done.returncode == 0:
            return done.stdout if raw else done.stdout.decode(errors="surrogateescape")
        message = " ".join(done.stderr.decode(errors="replace").split())
        lock = re.search(r"'([^']+\.lock)': File exists", message)
        if not lock:
            raise GitError(args, message or f"exit status {done.returncode}", status=done.returncode)
        if time.monotonic() > deadline:
            if not remove_stale(path, lock[1], patience=0.5):
                raise Unfinished(f"another git holds {lock[1]}: wait for it to end, then run this again")
            deadline += 1
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------
# Locks that a killed git left behind


def remove_stale(path, lock, patience=LOCK_PATIENCE):
    """Removes the lock file if it stays the same for `patience` seconds and no running git could hold it. Returns
    whether it is gone or has been replaced."""
    lock, places = Path(lock), [path]
    if lock.name not in ("index.lock", "HEAD.lock"):  # of the repository, which other working trees share
        places += worktrees(path)
    deadline, first = time.monotonic() + patience, identity(lock)
    while first == identity(lock) is not None:
        if time.monotonic() > deadline:
            if any(map(git_is_running, places)):
                return False
            lock.unlink(missing_ok=True)
        time.sleep(0.05)
    return True


def identity(path):
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def git_is_running(path):
    """Whether a git process runs below `path`; True if that cannot be told."""
    if not os.path.isdir("/proc/self"):
        return True
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path("/proc", pid, "comm").read_text().startswith("git"):
                if Path(os.readlink(f"/proc/{pid}/cwd")).is_relative_to(Path(path).resolve()):
                    return True
        except OSError:  # it has ended, or is another user's
            continue
    return False


# ---------------------------------------------------------------------------------------------------
# Reading a repository that is not trusted

# An agent can write .git/config: everything that it could start (a hook, a pager, gpg, a fetch of missing objects) is
# switched off.
OFF = ["core.hooksPath=/dev/null", "core.fsmonitor=false", "log.showSignature=false", "protocol.allow=never"]
QUIET = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1",
         "GIT_PAGER": "cat", "LC_ALL": "C"}  # fmt: skip


def read_only(path, *args, limit=1 << 20, seconds=5):
    """What git prints, at most `limit` bytes, decoded; None if it fails or takes longer than `seconds`. It prompts for
    nothing, starts no other program, and takes no lock."""
    command = ["git", "--no-pager", *(part for setting in OFF for part in ("-c", setting)), *args]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        process = subprocess.Popen(command, cwd=path, env=os.environ | QUIET, start_new_session=True, **pipes)
    except OSError:
        return None
    timer = threading.Timer(seconds, kill_group, [process])
    timer.start()
    with process:
        shown = process.stdout.read(limit)
        cut = len(shown) == limit
        if cut:
            kill_group(process)
    timer.cancel()
    return shown.decode(errors="replace") if cut or process.returncode == 0 else None


def kill_group(process):
    """Kills the process and everything that it started."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:  # it has ended
            process.kill()


def worktrees(path):
    """Paths of all working trees of the repository at `path`, the existing and the missing ones; [] if git fails."""
    listed = read_only(path, "worktree", "list", "--porcelain") or ""
    return [Path(line[9:]) for line in listed.splitlines() if line.startswith("worktree ")]
