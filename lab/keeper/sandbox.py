"""Runs a training where it can do no harm: no network, a read-only file system, $HOME out of sight.

    uv run -m lab sandbox > run.log 2>&1                         uv run train.py, in the sandbox
    uv run -m lab sandbox -- uv run train.py > run.log 2>&1      the same
    uv run -m lab sandbox -- COMMAND ...                         any other command

bubblewrap makes the sandbox (Linux). A run may create new files in the working tree and write checkpoint.pt and the
compile cache, and it has a /tmp of its own. It can change nothing else.
"""

import argparse
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

from frozen.device import kernel_cache
from lab.base.errors import Refused
from lab.base.processes import children, is_alive, psutil, send
from lab.store import names

HELP = "run a training without network, with a read-only file system and $HOME hidden (Linux, bubblewrap)"
DESCRIPTION = """\
Runs COMMAND (`uv run train.py` if none is given) in a bubblewrap sandbox:

  no network; other processes are not visible and cannot be reached
  read-only: the whole file system, with the prepared data and the Hugging Face cache
  writable: the compile cache, checkpoint.pt, and new files in this directory. What already exists here (git's
    metadata, the virtual environment, the frozen files, the results) is read-only: a training needs to write
    none of it. New code or configuration that the run leaves in this directory is moved to .lab/left, and the
    exit status is 1
  empty: $HOME, /tmp and /run, except for the Python, the caches and the working tree that are in them
  GPU devices are visible; environment variables whose names look like secrets are removed

`uv run X` is run by the Python that runs this command: uv itself would need a writable cache. The exit status
is the command's. SIGTERM and SIGINT are passed on to the command, so a training prints "preempted". To run every
training of a night in the sandbox, write `-m lab sandbox` instead of `train.py` in the run command of program.md."""

WRITABLE = re.compile(r"checkpoint\.pt(\..*)?")  # existing files that the run may still write
# Files that other programs in this directory would run or obey if the run left them there: modules that shadow others,
# and settings and instructions for agents, git and uv.
OBEYED = re.compile(r"\..*|.*\.(py|pyc|pyd|so|pth|toml|ini|cfg)|(CLAUDE|AGENTS|GEMINI).*", re.IGNORECASE)
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


def cache_root():
    """The prepared data and the compile cache: the same folder as prepare.cache_dir(), without importing prepare."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def arguments(tree):
    """bubblewrap's arguments for a run in `tree`. Later ones override earlier ones, so the order is: hide, show what is
    needed, allow writing, protect what must not be written."""
    args = ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--new-session"]
    args += ["--cap-drop", "ALL"]
    if os.geteuid() == 0:  # root in a container, in a tree that another user owns
        args += ["--cap-add", "CAP_DAC_OVERRIDE"]
    args += ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for node in sorted(node for pattern in DEVICES for node in glob(pattern)):
        args += ["--dev-bind", node, node]
    for path in [*HIDDEN, os.path.realpath(Path.home())]:
        if os.path.isdir(path) and path != "/":
            args += ["--tmpfs", path]
    compiled = cache_root() / "compile"
    compiled.mkdir(parents=True, exist_ok=True)
    shown = [Path(path) for path in (*SHOWN, *python_places(), cache_root(), kernel_cache())]
    shown += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH", "ROCM_PATH") if os.environ.get(name)]
    for place in dict.fromkeys(place for path in shown for place in (path.absolute(), path.resolve())):
        if place.is_dir() and place != Path("/"):
            args += ["--ro-bind", str(place), str(place)]
    for path in (compiled.resolve(), tree):
        args += ["--bind", str(path), str(path)]
    (tree / "__pycache__").mkdir(exist_ok=True)  # or a run could leave a compiled prepare.py for the next one there
    for path in sorted(tree.iterdir()):
        if not WRITABLE.fullmatch(path.name) and not path.is_symlink():
            args += ["--ro-bind", str(path), str(path)]
    for name in sorted(filter(SECRET.search, os.environ)):
        args += ["--unsetenv", name]
    return [*args, "--setenv", "HF_HUB_OFFLINE", "1", "--unsetenv", "TMPDIR", "--chdir", str(tree)]


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
    reader, writer = os.pipe()
    line = [bwrap, *arguments(tree), "--info-fd", str(writer), "--", sys.executable, "-ISc", RESTORE_SIGNALS, *command]
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
