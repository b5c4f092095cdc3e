"""Runs git: waiting for locks, or read-only in a repository that is not trusted."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

from lab.base import processes
from lab.base.errors import Refused, Stop, Unfinished

TRUSTED = {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
LOCK_PATIENCE = 5  # seconds that another git command may hold a lock


class GitError(Stop):
    def __init__(self, args, message, missing=False, status=None):
        super().__init__(f"git {args[0]}: {message}")
        self.missing, self.status = missing, status  # status: git's exit status
        self.shown = ""  # what git printed before it failed, of with_remote


def git(path, *args, stdin=None, env=None, raw=False):
    """Runs git in `path` and returns its output: str, or bytes if `raw`. Waits for a lock that another git holds, and
    removes one that a killed git left behind. Raises GitError with git's own message, and Unfinished if a running git
    keeps its lock, or if this git was killed."""
    env = os.environ | TRUSTED | (env or {})
    data = stdin.encode() if isinstance(stdin, str) else stdin
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            done = subprocess.run(["git", *args], cwd=path, input=data, capture_output=True, env=env)
        except FileNotFoundError:
            raise GitError(args, "not installed", missing=True) from None
        if done.returncode == 0:
            return done.stdout if raw else done.stdout.decode(errors="surrogateescape")
        if done.returncode < 0:  # it said nothing: not a refusal of git's, whoever asks must not take it for an answer
            raise Unfinished(f"git {args[0]} was killed (signal {-done.returncode}): run this again")
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
    """Removes the lock file if it has not changed for `patience` seconds and no running git could hold it. Returns
    whether it is gone or has been replaced."""
    lock, places = Path(lock), [path]
    if lock.name not in ("index.lock", "HEAD.lock"):  # it is of the repository, which other working trees share
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
    """Changes when the file is replaced or written; None if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def git_is_running(path):
    """Whether a git process of this user runs in `path` or below it; True if psutil is not installed to find out."""
    try:
        psutil = processes.psutil()
    except Refused:
        return True
    top = Path(path).resolve()
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or belongs to another user
            if p.name().startswith("git") and Path(p.cwd()).is_relative_to(top):
                return True
    return False


# ---------------------------------------------------------------------------------------------------
# Refs that several processes write: compare-and-swap


REFS = "--format=%(refname) %(objectname)"


def change_refs(path, changes):
    """Changes refs of the repository at `path`, all or none. changes: [(ref, new, old)] of object names; old None: there must
    be no such ref; new None: it is deleted. Returns whether that was done: False, with nothing changed, if a ref is not
    what `old` says. Raises GitError if git fails for another reason."""
    lines = []
    for ref, new, old in changes:
        if old is None:
            lines.append(f"create {ref} {new}\n")
        else:
            lines.append(f"update {ref} {new} {old}\n" if new else f"delete {ref} {old}\n")
    try:
        git(path, "update-ref", "--stdin", stdin="".join(lines))
    except GitError:
        there = refs(path, *(ref for ref, _, _ in changes))
        if all(there.get(ref) == old for ref, _, old in changes):
            raise
        return False
    return True


def refs(path, *patterns):
    """{ref: object name} of the refs with these names, or below these names where they end with a slash."""
    return refs_in(git(path, "for-each-ref", REFS, *patterns))


def refs_in(listed):
    """{ref: object name} of what `git for-each-ref` prints with REFS."""
    return dict(line.split() for line in listed.splitlines())


# ---------------------------------------------------------------------------------------------------
# Other repositories: with a time limit, and never a prompt

# A slow connection is given up by the time limit of the whole call, a dead one sooner.
PATIENT = ["http.lowSpeedLimit=1000", "http.lowSpeedTime=10", "gc.auto=0", "maintenance.auto=false", "core.askPass=",
           "credential.interactive=false"]  # fmt: skip
SSH = "-o BatchMode=yes -o ConnectTimeout=10"


_ssh = {}  # path: its core.sshCommand; asked again after a call that failed, as somebody may have mended it


def with_remote(path, *args, seconds, stdin=None, config=()):
    """Runs a git command that talks to another repository (fetch, push, ls-remote) and returns what it prints. Nothing asks
    for a password or a host key: that fails. No garbage is collected meanwhile. config: [(name, value)] of settings for
    this call. Raises GitError, also after `seconds`; GitError.shown then has the output up to there."""
    try:
        return talked(path, args, seconds, stdin, config)
    except GitError:
        _ssh.pop(path, None)
        raise


def talked(path, args, seconds, stdin, config):
    """with_remote, which forgets what this has remembered if it fails."""
    if path not in _ssh:
        _ssh[path] = (read_only(path, "config", "core.sshCommand") or "").strip()
    ssh = next(filter(None, (os.environ.get("GIT_SSH_COMMAND"), _ssh[path], os.environ.get("GIT_SSH"))), "ssh")
    env = os.environ | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "GIT_SSH_COMMAND": f"{ssh} {SSH}"}
    config = [*PATIENT, *(f"{name}={value}" for name, value in config)]
    command = ["git", *(part for setting in config for part in ("-c", setting)), *args]
    pipes = {"stdin": subprocess.PIPE if stdin else subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        process = subprocess.Popen(command, cwd=path, env=env, start_new_session=True, **pipes)
    except FileNotFoundError:
        raise GitError(args, "not installed", missing=True) from None
    try:
        out, err = process.communicate(stdin.encode() if stdin else None, timeout=seconds)
    except subprocess.TimeoutExpired:
        end_group(process)
        raise GitError(args, f"no answer within {seconds:g} s") from None
    except BaseException:  # an interrupt
        end_group(process)
        raise
    shown = out.decode(errors="replace")
    if process.returncode:
        message = " ".join(err.decode(errors="replace").split())
        error = GitError(args, message or f"exit status {process.returncode}", status=process.returncode)
        error.shown = shown
        raise error
    return shown


# ---------------------------------------------------------------------------------------------------
# Reading a repository that is not trusted

# An agent can write .git/config. So everything that this file could make git start is switched off: hooks, a pager,
# gpg, a fetch of missing objects.
OFF = ["core.hooksPath=/dev/null", "core.fsmonitor=false", "log.showSignature=false", "protocol.allow=never"]
QUIET = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1",
         "GIT_PAGER": "cat", "LC_ALL": "C"}  # fmt: skip


def read_only(path, *args, stdin=None, raw=False, limit=1 << 20, seconds=5):
    """Runs git without prompts, locks or other programs. Returns the first `limit` bytes that it prints, decoded unless
    `raw`; None if it fails or takes longer than `seconds`."""
    command = ["git", "--no-pager", *(part for setting in OFF for part in ("-c", setting)), *args]
    pipes = {"stdin": subprocess.PIPE if stdin else subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        process = subprocess.Popen(command, cwd=path, env=os.environ | QUIET, start_new_session=True, **pipes)
    except OSError:
        return None
    timer = threading.Timer(seconds, kill_group, [process])
    timer.start()
    feeder = threading.Thread(target=feed, args=(process.stdin, stdin))  # git answers before it has read all of it
    if stdin:
        feeder.start()
    with process:
        shown = process.stdout.read(limit)
        cut = len(shown) == limit
        if cut:
            kill_group(process)
        if stdin:
            feeder.join()
    timer.cancel()
    if not cut and process.returncode:
        return None
    return shown if raw else shown.decode(errors="replace")


def feed(pipe, text):
    """Writes the text to a process that may end before it has read it, and closes the pipe."""
    for step in (lambda: pipe.write(text.encode()), pipe.close):
        with contextlib.suppress(OSError):
            step()


def kill_group(process, number=None):
    """Kills the process and everything that it started, by this signal or SIGKILL (which Windows lacks)."""
    number = number or signal.SIGKILL
    if process.returncode is None:
        try:
            os.killpg(process.pid, number)
        except OSError:  # it has ended
            process.send_signal(number)


def end_group(process):
    """Ends the process and everything that it started: by SIGTERM, at which the git of a remote that is a folder removes its
    lock files, or else by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        kill_group(process, number)
        with contextlib.suppress(subprocess.TimeoutExpired):  # on a dead network file system not even SIGKILL ends it
            process.communicate(timeout=1)
            return


def worktrees(path):
    """Paths of all working trees of the repository at `path`, including those that no longer exist; [] if git fails."""
    listed = read_only(path, "worktree", "list", "--porcelain") or ""
    return [Path(line[9:]) for line in listed.splitlines() if line.startswith("worktree ")]


# ---------------------------------------------------------------------------------------------------
# Many objects by one git


CHUNK = 100  # names that are written before their answers are read: less than a pipe holds, so neither side waits for ever
SMALL = 1 << 20  # bytes of an unwanted object that are read and dropped; before a larger one git is ended
DEATHS = 20  # times that git may end at an object that it cannot read


class Objects:
    """Reads objects of the repository at `path` through one `git cat-file --batch`, which runs until close().

        with Objects(path) as objects:
            objects.read(["HEAD:train.py"], 1 << 20, "blob")

    trusted=False: git starts nothing that the configuration names, as in read_only, and ends after `seconds` or `most`
    bytes."""

    def __init__(self, path, trusted=True, seconds=20, most=1 << 28):
        self.path, self.trusted, self.seconds, self.left = path, trusted, seconds, most
        self.process, self.timer, self.deaths = None, None, 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def start(self):
        off = [] if self.trusted else ["--no-pager", *(part for setting in OFF for part in ("-c", setting))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        env = os.environ | (TRUSTED if self.trusted else QUIET)
        try:
            self.process = subprocess.Popen(
                ["git", *off, "cat-file", "--batch"], cwd=self.path, env=env, start_new_session=not self.trusted, **pipes
            )
        except OSError as error:
            raise GitError(("cat-file",), f"it does not start ({error.strerror})", missing=isinstance(error, FileNotFoundError)) from None
        if not self.trusted:
            self.timer = threading.Timer(self.seconds, kill_group, [self.process])
            self.timer.start()

    def close(self):
        """Ends git; its exit status, negative if a signal ended it, or None if it did not run."""
        if self.process is None:
            return None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        status = self.process.wait()
        if self.timer:
            self.timer.cancel()
        self.process = self.timer = None
        return status

    def read(self, wanted, largest, of_type):
        """{name as given: (object name, bytes)} of those objects that are here, of this type and at most this large: what
        is larger is never read. Raises GitError, and Unfinished if git was killed."""
        found, left = {}, list(dict.fromkeys(wanted))
        while left:
            answered = self.answers(left[:CHUNK], largest, of_type.encode(), found)
            left = left[answered:]
        return found

    def answers(self, names, largest, of_type, found):
        """Puts objects with these names into `found`; how many of the names were answered."""
        if self.process is None:
            self.start()
        i, out = 0, self.process.stdout
        try:
            self.process.stdin.write("".join(f"{name}\n" for name in names).encode())
            self.process.stdin.flush()
            for i, name in enumerate(names):
                line = out.readline()
                about = line.split()
                if not line.endswith(b"\n"):
                    raise EOFError
                if len(about) != 3 or not about[2].isdigit():  # "missing", "ambiguous"
                    continue
                size, wanted = int(about[2]), about[1] == of_type and int(about[2]) <= largest
                if not wanted and size > SMALL:
                    kill_group(self.process) if not self.trusted else self.process.kill()
                    self.close()
                    return i + 1
                data = out.read(size + 1)
                if len(data) <= size:
                    raise EOFError
                self.left -= size
                if not self.trusted and self.left < 0:
                    raise GitError(("cat-file",), "it printed too much")
                if wanted:
                    found[name] = about[0].decode(), data[:-1]
        except (EOFError, OSError):
            status, self.deaths = self.close(), self.deaths + 1
            if self.trusted and status < 0:
                raise Unfinished(f"git cat-file was killed (signal {-status}): run this again") from None
            if status < 0 or self.deaths > DEATHS:
                raise GitError(("cat-file",), "it failed or took too long") from None
            return i + 1  # git ends at an object that is damaged
        return len(names)
