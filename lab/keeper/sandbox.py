"""Runs a training where it can do no harm: no network, a read-only file system, $HOME out of sight.

    uv run -m lab sandbox > run.log 2>&1                         uv run train.py, in the sandbox
    uv run -m lab sandbox -- uv run train.py > run.log 2>&1      the same
    uv run -m lab sandbox -- COMMAND ...                         any other command

bubblewrap makes the sandbox (Linux). A run may create new files in the working tree and write checkpoint.pt and the
compile caches, and it has a /tmp of its own. It can change nothing else. Of earlier runs it sees no weights, of the data
only what prepare.py reads in the same process: the prepared training and validation rows.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path

from corpus import layout
from frozen.device import kernel_cache
from frozen.guard import CACHES, SYSTEM, TEMPORARY, WEIGHTS
from lab.base.errors import Refused
from lab.base.git import read_only, worktrees
from lab.base.locks import hold, run_in_progress
from lab.base.processes import children, is_alive, psutil, send
from lab.store import names

HELP = "run a training without network, with a read-only file system and $HOME hidden (Linux, bubblewrap)"
DESCRIPTION = """\
Runs COMMAND (`uv run train.py` if none is given) in a bubblewrap sandbox:

  no network; other processes are not visible and cannot be reached
  read-only: the whole file system, with the prepared rows and the Hugging Face cache
  writable: the compile caches, checkpoint.pt, and new files in this directory. What already exists here (git's
    metadata, the virtual environment, the frozen files, the results) is read-only: a training needs to write
    none of it. New code or configuration that the run leaves in this directory is moved to .lab/left, and the
    exit status is 1
  empty: $HOME, /tmp and /run, except for the Python, the caches and the working tree that are in them
  hidden, unless --archives is given: runs/, .lab/ and weights in this directory (the last run's checkpoint.pt is moved
    to .lab/ meanwhile), the other working trees of this checkout, other datasets, the downloaded files of this one,
    and the holdout
  GPU devices are visible; environment variables whose names look like secrets are removed

`uv run X` is run by the Python that runs this command: uv itself would need a writable cache. The exit status
is the command's. SIGTERM and SIGINT are passed on to the command, so a training prints "preempted". To run every
training of a night in the sandbox, write `-m lab sandbox` instead of `train.py` in the run command of program.md."""

WRITABLE = re.compile(r"checkpoint\.pt(\..*)?")  # existing files that the run may still write
# Files that other programs in this directory would run or obey if the run left them there: modules that shadow others,
# and settings and instructions for agents, git and uv.
OBEYED = re.compile(r"\..*|.*\.(py|pyc|pyd|so|pth|toml|ini|cfg)|(CLAUDE|AGENTS|GEMINI).*", re.IGNORECASE)
EMPTY, SHOW, WRITE = "--tmpfs", "--ro-bind", "--bind"  # bubblewrap's options
HIDDEN = ["/tmp", "/run"]  # and $HOME: they hold keys, other users' files, sockets of agents and container engines
SHOWN = ["/run/opengl-driver", "/run/current-system"]  # where NixOS keeps its GPU driver
DEVICES = ["/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/dxg"]  # NVIDIA; all; AMD; NVIDIA under WSL
SECRET = re.compile(r"(?i)key|token|secret|passw|credential|^ssh_")
HOW_TO_GET = "get it: apt-get install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora)"
SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # not on Windows
# Runs before the command: bubblewrap ignores these signals, and the command must not inherit that.
RESTORE_SIGNALS = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    sys.exit(f"sandbox: {sys.argv[1]}: {error.strerror}")
"""


def add_arguments(parser):
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--archives", action="store_true", help="hide no weights and no data: for lab audit and lab sample")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="default: uv run train.py")


def resolve(command):
    """The command that `uv run X` would run in this environment, without uv; another command is returned unchanged.
    Raises Refused for options of uv that this does not know."""
    if command[:2] != ["uv", "run"]:
        return command
    rest = command[2:]
    while rest and rest[0] in ("--no-sync", "--frozen", "--locked", "--offline", "--quiet", "-q"):
        rest = rest[1:]
    if not rest or (rest[0].startswith("-") and rest[0] != "-m"):
        raise Refused(f"{' '.join(command)}: only `uv run [-m MODULE | FILE.py | COMMAND]` is understood")
    if rest[0] == "-m" or rest[0].endswith(".py"):
        return [sys.executable, *rest]
    return [sys.executable if rest[0] in ("python", "python3") else rest[0], *rest[1:]]


def python_places():
    """Directories that this Python needs: the environment, and the installation that it links to, which uv and pyenv
    keep in $HOME."""
    places, link = [sys.prefix, sys.base_prefix], Path(sys.executable)
    while link.is_symlink():
        link = Path(os.path.normpath(link.parent / os.readlink(link)))
        places.append(link.parent.parent)
    return places


def mounts(tree, archives):
    """{place: (option, source)} of what differs from a read-only file system; source is None for an empty folder."""
    hidden = [Path(path) for path in (*HIDDEN, os.path.realpath(Path.home())) if os.path.isdir(path) and path != "/"]
    found = dict.fromkeys(hidden, (EMPTY, None))

    def places(path):
        given, real = path.absolute(), path.resolve()
        # A link in a hidden folder is gone, so a folder stands for it. In the tree a link stays what it is.
        gone = any(map(given.is_relative_to, hidden)) and not (given.is_relative_to(tree) and given != tree)
        places = [real, given] if gone else [real]
        return [place for place in places if place.is_dir() and place != Path("/")]

    def put(option, *paths):
        for place in (place for path in paths for place in places(Path(path))):
            found[place] = (option, None if option == EMPTY else place)

    cache, data, others = layout.cache_dir(), layout.data_dir(), other_trees(tree)
    put(SHOW, *SHOWN, *python_places(), kernel_cache())
    put(SHOW, *(os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH", "ROCM_PATH") if os.environ.get(name)))
    put(WRITE, tree)
    (tree / "__pycache__").mkdir(exist_ok=True)  # or a run could leave a compiled prepare.py for the next one there
    for path in sorted(tree.iterdir()):
        if not WRITABLE.fullmatch(path.name) and not path.is_symlink():
            found[path] = (SHOW, path)
    if archives:
        put(SHOW, cache, *(path / names.RUNS for path in others))
    else:
        put(EMPTY, cache, tree / names.RUNS, tree / names.LAB, *others)
        put(SHOW, data)
        for path in tree.iterdir():
            if WEIGHTS.search(path.name) and not WRITABLE.fullmatch(path.name) and path.is_file():
                found[path.resolve()] = (SHOW, Path(os.devnull))
        if (holdout := data / "holdout_rows.npy").is_file():
            found |= {place / holdout.name: (SHOW, blank(tree, holdout)) for place in places(data)}
    put(WRITE, *named_caches(tree, list(found)), compile_cache(cache))
    if common := read_only(tree, "rev-parse", "--git-common-dir"):  # of a working tree it is in another one
        put(SHOW, tree / common.strip())
    return found


def other_trees(tree):
    """The other working trees of this checkout that exist."""
    return [path for path in worktrees(tree) if path.is_dir() and path.resolve() != tree.resolve()]


def compile_cache(cache):
    folder = cache / "compile"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def named_caches(tree, taken):
    """The folders of the compile caches that the environment names, each created. One that is all of $HOME or $TMPDIR, say,
    or contains a folder of `taken`, moves one folder down, as in prepare.choose_compile_cache: the run may write no more."""
    temporary = filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP")))
    taken = [*taken, *(Path(path).resolve() for path in (*TEMPORARY, *SYSTEM, *temporary))]
    found = []
    for name in CACHES:
        folder = Path(os.environ.get(name) or tree).resolve()
        # What is in the tree stays read-only. Matplotlib's folder also holds settings that other programs obey.
        if folder.is_relative_to(tree.resolve()) or name == "MPLCONFIGDIR":
            continue
        if any(place.is_relative_to(folder) for place in taken):
            os.environ[name] = os.path.join(os.environ[name], "torchinductor")
        with contextlib.suppress(OSError):  # nobody may write there: the run says so, with or without a sandbox
            os.makedirs(os.environ[name], exist_ok=True)
        found.append(os.environ[name])
    return found


def blank(tree, path):
    """A file as long as the one at `path`, without its content: prepare.py compares the lengths of all prepared files."""
    made, size = tree / names.LAB / names.BLANK, path.stat().st_size
    if not made.exists() or made.stat().st_size != size:  # or a run in progress would find it empty for a moment
        with open(made, "wb") as f:
            f.truncate(size)
    return made


def arguments(tree, archives=False):
    """bubblewrap's arguments for a run in `tree`. archives: earlier runs and all data are visible. Creates the compile
    cache and what the mounts need."""
    args = ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--new-session"]
    args += ["--cap-drop", "ALL"]
    if os.geteuid() == 0:  # root in a container, in a tree that another user owns
        args += ["--cap-add", "CAP_DAC_OVERRIDE"]
    args += ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for node in sorted(node for pattern in DEVICES for node in glob(pattern)):
        args += ["--dev-bind", node, node]
    found = mounts(tree, archives)
    scratch = [*HIDDEN, os.path.realpath(Path.home())]
    for place in sorted(found, key=lambda place: len(place.parts)):  # what is inside of a place comes after it
        option, source = found[place]
        args += [option, *[str(source)] * (source is not None), str(place)]
    for place, (option, _) in found.items():
        if option == EMPTY and str(place) not in scratch:
            args += ["--remount-ro", str(place)]
    for name in sorted(filter(SECRET.search, os.environ)):
        args += ["--unsetenv", name]
    return [*args, "--setenv", "HF_HUB_OFFLINE", "1", "--unsetenv", "TMPDIR", "--chdir", str(tree)]


@contextlib.contextmanager
def without_checkpoint(tree):
    """Keeps the last run's checkpoint, which bubblewrap cannot hide without making it read-only, in .lab/ for a while. It
    comes back afterwards, unless there is a new one: the last run may not be recorded yet."""
    aside = tree / names.LAB / names.ASIDE
    aside.mkdir(exist_ok=True)
    with hold(tree / names.LAB / names.ASIDE_LOCK) as alone:
        if not alone or run_in_progress(tree):  # another sandbox brings it back; or a run without one is writing it
            yield
            return
        for path in tree.iterdir():
            if WRITABLE.fullmatch(path.name):
                os.replace(path, aside / path.name)
        try:
            yield
        finally:
            for path in list(aside.glob("*")):
                with contextlib.suppress(FileNotFoundError):  # `lab record` has archived it
                    path.unlink() if (tree / path.name).exists() else os.replace(path, tree / path.name)


def signal_command(init, number):
    """Sends the signal to the command. It is the child of the sandbox's first process, which may not have started it
    yet."""
    while is_alive(init):
        if command := children(init):
            return send(number, command)
        time.sleep(0.01)


def put_aside(tree, before):
    """Moves new files that other programs would run or obey to .lab/left. Returns their names. before: the names of the
    files that were in the tree before the run."""
    found = [
        path.name for path in sorted(tree.iterdir())
        if path.name not in before and (OBEYED.fullmatch(path.name) or (path / "__init__.py").exists())
    ]  # fmt: skip
    for name in found:
        left = tree / names.LAB / names.LEFT / f"{time.time_ns()}-{name}"
        left.parent.mkdir(parents=True, exist_ok=True)
        os.replace(tree / name, left)
    return found


def run(args):
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    command = resolve(command or ["uv", "run", names.TRAIN])
    bwrap = shutil.which("bwrap")
    if not bwrap:
        how = HOW_TO_GET if sys.platform == "linux" else "it exists for Linux only"
        print(f"sandbox: bubblewrap (bwrap) is not installed: {how}; or run without a sandbox", file=sys.stderr)
        return 1
    psutil()  # refuses now if it is missing, and not when a signal comes
    tree = Path.cwd()
    (tree / names.LAB).mkdir(exist_ok=True)  # or the run could create it
    with contextlib.nullcontext() if args.archives else without_checkpoint(tree):
        return sandboxed(tree, bwrap, command, args.archives)


def sandboxed(tree, bwrap, command, archives):
    """Runs the command in the sandbox. Returns its exit status, or 1 if there is no sandbox or it left code behind."""
    reader, writer = os.pipe()
    line = [bwrap, *arguments(tree, archives), "--info-fd", str(writer), "--", sys.executable, "-ISc", RESTORE_SIGNALS, *command]
    before = {path.name for path in tree.iterdir()}
    init, early = None, []  # the sandbox's first process; signals that came before it existed

    def forward(number, frame=None):
        signal_command(init, number) if init else early.append(number)

    def ignore():  # in bubblewrap, which SIGTERM would end, and with it the command by SIGKILL
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    for number in SIGNALS:
        signal.signal(number, forward)
    process = subprocess.Popen(line, pass_fds=[writer], start_new_session=True, preexec_fn=ignore)
    os.close(writer)
    with os.fdopen(reader) as f:
        info = f.read()  # empty if bubblewrap ended before it had made a sandbox
    if info:
        init = json.loads(info)["child-pid"]
        for number in early:
            forward(number)
    status = process.wait()
    if not info:
        print(
            "sandbox: bubblewrap could not make a sandbox, for the reason above. User namespaces may be forbidden (Ubuntu: "
            "sysctl kernel.apparmor_restrict_unprivileged_userns), or this is a container without privileges; "
            "run without a sandbox, or allow them",
            file=sys.stderr,
        )
        return 1
    if left := put_aside(tree, before):
        print(f"sandbox: the run left {', '.join(left)} in the working tree: moved to .lab/left", file=sys.stderr)
        status = status or 1
    return status if status >= 0 else 128 - status
