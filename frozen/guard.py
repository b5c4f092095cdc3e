"""What a run may load and read: the code that git holds, and data through prepare.py alone.

Three checks. `running_code_differs`: the code that runs is the one whose hash the header has. `foreign_module`: all
modules of the run's folder are train.py or frozen. And an audit hook on open(), from the import of prepare on, which
refuses

- the prepared data;
- files of the run's folder that are neither code in git nor written by the run;
- what an earlier run may have left: files older than this process in the home, in folders for temporary files and
  beside the run's folder, and data formats anywhere. Installed packages, downloaded kernels and compile caches are
  exempt; in the last only what is not a data format.

It also refuses to connect to another machine. The hook stops what Python opens: open, torch.load, numpy.load,
safetensors, imports, sockets. Native readers (pyarrow, torch.jit.load) and child processes raise no event. README.md
names the command that hides files from those. A file's age is its time of modification, which a program that wants to
deceive can set.
"""

import os
import re
import socket
import stat
import sys
import threading
import time
from contextlib import contextmanager
from functools import cache
from importlib.machinery import all_suffixes
from ipaddress import ip_address
from pathlib import Path
from types import CodeType, SimpleNamespace

from corpus import rules
from corpus.layout import cache_dir
from frozen.device import FA3_KERNEL, kernel_cache
from frozen.process import process_age

FROZEN = {*rules.FILES, "corpus/download.py"}  # download.py only downloads: what it fetched is hashed itself
FLAGS = re.IGNORECASE | re.MULTILINE  # of names, one a line
WEIGHTS = re.compile(r"\.(pt|pth|ckpt|safetensors|gguf)(\.|$)", FLAGS)
DATA = re.compile(r"\.(npy|npz|bin|dat|pkl|pickle|parquet|arrow|h5|hdf5|zip|tar)(\.|$)", FLAGS)
CODE = tuple(all_suffixes())
INSTALLED = re.compile(r"[/\\](site|dist)-packages([/\\]|$)")
# Folders in the home or among temporary files where compilers of kernels (and matplotlib: its list of fonts) keep what
# they made for the next process. Those with a variable of their own are in CACHES.
COMPILED = re.compile(r"inductor|triton|torch_extensions|quack|cutlass|cute_dsl|flash_att|matplotlib", re.IGNORECASE)
CACHES = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CUDA_CACHE_PATH", "MPLCONFIGDIR"
TEMPORARY = "/tmp", "/var/tmp", "/dev/shm"
SYSTEM = "/bin", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/run", "/sbin", "/sys", "/usr", "/var"

_state = SimpleNamespace(folder=None, since=0.0, refusal=None, hooked=False, packages=(), logins=(), places=(), environment={})
_older = set()  # files older than the run that it has opened to write without emptying them: their age no longer tells
_thread = threading.local()


@contextmanager
def prepare_reads():
    """Inside this block the current thread may read everything."""
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1


def forbid(train_file):
    """From now on this process reads nothing but what a run of train_file may read."""
    folder = Path(train_file).resolve().parent
    _state.train_file = Path(train_file).name
    if not _state.hooked:
        _state.since = time.time() - process_age()
        _state.packages = [path for path in sys.path if path]  # before train.py could add to it or to the environment
        _state.environment = dict(os.environ)
    _state.places = places(folder)
    _state.folder = os.path.realpath(folder) + os.sep
    if not _state.hooked:
        _state.hooked = True
        sys.addaudithook(_on_event)


def places(folder):
    """[(beginning of a path, kind)], the longest first: the first that a file's path has decides what the file is. Of two
    kinds for one path the first counts, so no variable makes a cache of the whole home, say.

    folder: of the run. data: prepare's. temporary, home: what earlier runs may have left. packages. sources: other
    folders that Python imports from. compiled: caches. system: the rest."""
    found = {}

    def add(kind, *paths, end=os.sep):
        for path in filter(None, paths):
            for form in (os.path.abspath(path), os.path.realpath(path)):
                found.setdefault(form.rstrip(os.sep) + end, kind)

    below = os.path.realpath(folder) + os.sep

    def elsewhere(paths):  # what is beside train.py stays the run's folder, whatever a variable says
        return [path for path in paths if path and not (os.path.realpath(path) + os.sep).startswith(below)]

    home, get = os.path.expanduser("~"), _state.environment.get
    add("folder", folder)
    add("data", cache_dir())
    add("home", home)
    add("temporary", *TEMPORARY, *elsewhere(map(get, ("TMPDIR", "TEMP", "TMP"))))
    add("system", *SYSTEM)
    if folder.parent != folder.parent.parent:
        add("home", folder.parent)  # the working trees beside this one
    add("packages", sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, Path(folder, ".venv"))
    for path in elsewhere(_state.packages):  # a wide PYTHONPATH may contain whole projects, with their checkpoints
        add("packages" if INSTALLED.search(path) else "sources", path)
    add("packages", sys.pycache_prefix, *(entry.partition("=")[2] for entry in get("LOCAL_KERNELS", "").split(":")))
    add("compiled", *elsewhere(map(get, CACHES)), cache_dir() / "compile")
    hub, kernel = kernel_cache(), FA3_KERNEL["repo_id"].replace("/", "--")
    add("packages", hub / f"models--{kernel}")
    add("packages", hub / "kernels--", end="")
    # Its login, and what it knows of the agents that call it: huggingface_hub reads these whatever it is asked for.
    login = get("HF_HOME") or os.path.join(get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    login = os.path.expanduser(os.path.expandvars(login))
    files = [os.path.join(login, name) for name in ("token", "stored_tokens", ".agent_harnesses.json")]
    _state.logins = [os.path.realpath(path) for path in (get("HF_TOKEN_PATH"), *files) if path]
    return sorted(found.items(), key=lambda item: -len(item[0]))


def allow():
    """Lifts the restrictions: the run in this process is over, or is a test with a clock of its own."""
    _state.folder = _state.refusal = None


def _on_event(event, args):
    if _state.folder is None or getattr(_thread, "depth", 0):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and not is_local(*args):
        refuse("a run may not use the network: what it learns comes from make_dataloader")
    if event != "open":
        return
    path, mode, flags = args
    if isinstance(path, int) or not (path := os.fspath(path)):
        return
    if mode is None:
        writes, empties = flags & (os.O_WRONLY | os.O_TRUNC), flags & os.O_TRUNC
    else:
        writes, empties = not mode.startswith("r") and not ("a" in mode and "+" in mode), mode[:1] in "wx"
    for named in map(os.fsdecode, [path] if mode else below_open_folders(path)):
        if writes:
            note_older(named, empties and (mode or os.path.isabs(path)))
        elif sentence := why_not(named):
            refuse(sentence)


def refuse(sentence):
    _state.refusal = sentence
    raise SystemExit(sentence)


def is_local(connection, address):
    """Whether it stays on this machine: a Unix socket, or the loopback interface."""
    if address is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return True  # None: to the address that it is connected with
    try:
        return address[0] == "localhost" or ip_address(address[0]).is_loopback
    except ValueError:  # a name
        return False


def below_open_folders(path):
    """The files that os.open may mean by this path: its dir_fd, which the event leaves out, is one of the open folders."""
    yield path
    if not os.path.isabs(path):
        for fd in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
            folder = os.path.realpath(f"/proc/self/fd/{fd}")
            if os.path.isdir(folder):
                yield os.path.join(folder, os.fsdecode(path))


def note_older(path, empties):
    """A line that is appended makes a file new, but not what else is in it."""
    path = os.path.realpath(path)
    try:
        if empties:
            _older.discard(path)
        elif os.stat(path).st_mtime < _state.since:
            _older.add(path)
    except (OSError, ValueError):
        pass


def place(path):
    """(beginning, kind) of an absolute path, as in `places`."""
    return next((item for item in _state.places if path.startswith(item[0])), ("", "system"))


def is_shared(path):
    """Whether this folder is all of the home or of a folder for temporary files."""
    return bool(path) and place(path := os.path.realpath(path) + os.sep) in ((path, "home"), (path, "temporary"))


def why_not(path):
    """A sentence if a run may not read this file, else None."""
    named, path = os.path.abspath(path), os.path.realpath(path)
    (prefix, kind), name = place(path), f"{os.path.basename(named)}\n{os.path.basename(path)}"
    kinds = kind, place(named)[1]  # named: a package's files may be links into the installer's cache
    if "packages" in kinds or "sources" in kinds and not WEIGHTS.search(name) or path in _state.logins:
        return None
    if kind == "data":
        return f"{path} is not for train.py to read: take data from make_dataloader, which prepare.py reads"
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_mtime >= _state.since and path not in _older:
        return None  # a folder, a device; the run wrote it
    if WEIGHTS.search(name):
        return f"{path} holds weights: a run may not read any, it starts from fresh ones"
    if kind == "folder":
        if allowed(path, _state.folder, _state.train_file):
            return None
        return f"{path} is neither train.py nor frozen, so a run may not read it: put code and constants into train.py"
    code = kind == "home" and path.endswith(CODE)  # a package that is installed as a link to its sources
    left = kind in ("home", "temporary") and not code and not COMPILED.search(os.path.dirname(path[len(prefix) :]))
    if left or DATA.search(name):
        return f"{path} is older than this run, which may not read what an earlier one could have left: compute it in train.py"
    return None


def allowed(path, folder, train_file):
    """Whether the file, which is below `folder`, is train.py or frozen, or the cached bytecode of one of them."""
    name = os.path.relpath(path, folder).replace(os.sep, "/")
    place, _, file = name.rpartition("/")
    if place.endswith("__pycache__"):
        name = f"{place.removesuffix('__pycache__')}{file.partition('.')[0]}.py"
    return name in FROZEN or name == train_file


def check_refusals():
    """A refusal that train.py has caught still counts."""
    if _state.refusal:
        raise SystemExit(_state.refusal)


@cache
def real_file(path):
    """The path without symbolic links; None if there is no such file, as for torch.ops. Cached: a run asks for some 2,000
    modules at each check."""
    return os.path.realpath(path) if os.path.exists(path) else None


def foreign_module(train_file):
    """A sentence about a loaded module of train_file's folder that is neither it nor frozen; None if all are."""
    folder, file_name = os.path.realpath(Path(train_file).resolve().parent) + os.sep, Path(train_file).name
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        file = real_file(file) if isinstance(file, str) else None
        if file and file.startswith(folder) and place(file)[1] == "folder" and not allowed(file, folder, file_name):
            return f"module {name} ({file}) is neither train.py nor frozen: a run is train.py alone, put its code there"
    return None


def running_code_differs(train_file):
    """A sentence if the code that runs is not the one in train_file now; None if it is.

    Compares the code of every caller from that file with the compiled file: bytecode, constants and line numbers, so
    an edited comment is no difference unless it moves lines."""
    path = os.path.realpath(train_file)
    frames, frame = [], sys._getframe()
    while frame:
        if os.path.realpath(frame.f_code.co_filename) == path:
            frames.append(frame)
        frame = frame.f_back
    if not frames:
        return f"begin_run was called by another file than {train_file}: call begin_run(__file__) in train.py"
    try:
        compiled = compile(Path(path).read_bytes(), str(train_file), "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        compiled = None
    codes = set(nested(compiled)) if compiled else ()
    if any(frame.f_code not in codes for frame in frames):
        return f"{train_file} changed since this process read it, so the log would name code that did not run: run it again"
    return None


def nested(code):
    """The code objects of a module: its own and those of all functions and classes in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)
