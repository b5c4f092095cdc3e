"""What a run may load and read: the code that git holds, and data through prepare.py alone.

Three checks. `running_code_differs`: the code that runs is the one whose hash the header has. `foreign_module`: all
modules of the run's folder are train.py or frozen. And an audit hook on open(), from the import of prepare on, which
refuses weights, prepared data, and files of the run's folder that are neither code in git nor written by the run.

The hook stops what Python opens: open, torch.load, numpy.load, safetensors, imports. Native readers (pyarrow,
torch.jit.load) and child processes raise no event. README.md names the command that hides files from those.
"""

import os
import re
import sys
import threading
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace

from corpus import rules
from corpus.layout import cache_dir

FROZEN = {*rules.FILES, "corpus/download.py"}  # download.py only downloads: what it fetched is hashed itself
WEIGHTS = re.compile(r"\.(pt|pth|ckpt|safetensors|gguf)(\.|$)", re.IGNORECASE)

_state = SimpleNamespace(folder=None, since=0.0, refusal=None, hooked=False)
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
    environments = [sys.prefix, sys.base_prefix, Path(folder, ".venv")]
    caches = [os.environ.get(name) for name in ("HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
    caches = [*filter(None, caches), cache_dir() / "compile"]
    _state.elsewhere = tuple(os.path.realpath(path) + os.sep for path in [*environments, *caches])
    _state.since = _state.since or time.time()
    _state.train_file = Path(train_file).name
    _state.cache = os.path.realpath(cache_dir()) + os.sep
    _state.folder = os.path.realpath(folder) + os.sep
    if not _state.hooked:
        _state.hooked = True
        sys.addaudithook(_on_event)


def allow():
    """Lifts the restrictions: the run in this process is over, or is a test with a clock of its own."""
    _state.folder = _state.refusal = None


def _on_event(event, args):
    if event != "open" or _state.folder is None or getattr(_thread, "depth", 0):
        return
    path, mode, flags = args
    if isinstance(path, int) or not (path := os.fspath(path)):
        return
    writes = flags & (os.O_WRONLY | os.O_TRUNC) if mode is None else not mode.startswith("r")
    if not writes and (sentence := why_not(os.fsdecode(path))):
        _state.refusal = sentence
        raise SystemExit(sentence)


def why_not(path):
    """A sentence if a run may not read this file, else None."""
    path = os.path.realpath(path)
    if path.startswith(_state.elsewhere):
        return None
    if path.startswith(_state.cache):
        return f"{path} is not for train.py to read: take data from make_dataloader, which prepare.py reads"
    try:
        status = os.stat(path)
    except OSError:
        return None
    if os.path.isdir(path) or status.st_mtime >= _state.since:  # the run wrote it itself
        return None
    if WEIGHTS.search(os.path.basename(path)):
        return f"{path} holds weights: a run may not read any, it starts from fresh ones"
    if path.startswith(_state.folder) and not allowed(path, _state.folder, _state.train_file):
        return f"{path} is neither train.py nor frozen, so a run may not read it: put code and constants into train.py"
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
    environments = tuple(os.path.realpath(p) + os.sep for p in (sys.prefix, sys.base_prefix, Path(folder, ".venv")))
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        file = real_file(file) if isinstance(file, str) else None
        if file and file.startswith(folder) and not file.startswith(environments):
            if not allowed(file, folder, file_name):
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
