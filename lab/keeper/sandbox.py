"""Runs a training where it can do no harm: no network, a read-only file system, $HOME out of sight.

    uv run -m lab sandbox > run.log 2>&1                         uv run train.py, in the sandbox
    uv run -m lab sandbox -- uv run train.py > run.log 2>&1      the same
    uv run -m lab sandbox -- COMMAND ...                         any other command

Made by bubblewrap (Linux). A run may make new files in the working tree, write checkpoint.pt and the compile
cache, and has a /tmp of its own. Nothing else changes by it.
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

from lab.base.errors import Refused
from lab.base.processes import parents, send
from lab.store import names

HELP = "run a training without network, with a read-only file system and $HOME hidden (Linux, bubblewrap)"
DESCRIPTION = """\
Runs COMMAND (`uv run train.py` where none is given) in a bubblewrap sandbox:

  no network; no other process in sight, nor a way to talk to one
  read-only: the whole file system, the prepared data and the Hugging Face cache included
  writable: the compile cache, checkpoint.pt, and new files in this directory. What is in it already (git's
    metadata, the virtual environment, the frozen files, the results) is read-only: a training needs none of it.
    New code or configuration that it leaves in this directory is moved to .lab/left, and the exit status is 1
  empty: $HOME, /tmp and /run, but for the Python, the caches and the working tree that lie there
  GPU device nodes are there; environment variables that look like secrets are not

`uv run X` is run by the Python that runs this: uv itself would want a writable cache. The exit status is the
command's. SIGTERM and SIGINT reach the command, so a training says "preempted". To have every run of a night
sandboxed, write `-m lab sandbox` in place of `train.py` in the run command of program.md."""

WRITABLE = re.compile(r"checkpoint\.pt(\..*)?")  # what is there already and yet may be written
# What other programs in this directory would run or obey, were it left there: modules that shadow others,
# settings and instructions of agents, of git and of uv.
OBEYED = re.compile(r"\..*|.*\.(py|pyc|pyd|so|pth|toml|ini|cfg)|(CLAUDE|AGENTS|GEMINI).*", re.IGNORECASE)
HIDDEN = ["/tmp", "/run"]  # and $HOME: keys, other people's files, sockets of agents and container engines
SHOWN = ["/run/opengl-driver", "/run/current-system"]  # where NixOS keeps its GPU driver
DEVICES = ["/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/dxg"]  # NVIDIA; all; AMD; NVIDIA under WSL
SECRET = re.compile(r"(?i)key|token|secret|passw|credential|^ssh_")
HOW_TO_GET = "get it: apt-get install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora)"
SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # not on Windows
# In front of the command: what bubblewrap was told to ignore, the command heeds again.
HEED = """
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
    """`uv run X` as uv would run it in this environment, without uv; another command as it is."""
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
    """Directories that this Python is made of: the environment, and the installation behind it, which uv and
    pyenv keep in $HOME and reach by symbolic links."""
    places, link = [sys.prefix, sys.base_prefix], Path(sys.executable)
    while link.is_symlink():
        link = Path(os.path.normpath(link.parent / os.readlink(link)))
        places.append(link.parent.parent)
    return places


def cache_root():
    """As prepare.cache_dir() has it, whose import would load half of the environment."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def hub_cache():
    """Where Hugging Face keeps what it downloaded (and not its login, which lies one level up)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(cache) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def arguments(tree):
    """bubblewrap's arguments for a run in `tree`. Later ones win, so: hide, show what is needed, let the run
    write, protect what it must not."""
    args = ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--new-session"]
    args += ["--cap-drop", "ALL"]
    if os.geteuid() == 0:  # root in a container, in a tree that is somebody else's
        args += ["--cap-add", "CAP_DAC_OVERRIDE"]
    args += ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for node in sorted(node for pattern in DEVICES for node in glob(pattern)):
        args += ["--dev-bind", node, node]
    for path in [*HIDDEN, os.path.realpath(Path.home())]:
        if os.path.isdir(path) and path != "/":
            args += ["--tmpfs", path]
    compiled = cache_root() / "compile"
    compiled.mkdir(parents=True, exist_ok=True)
    shown = [Path(path) for path in (*SHOWN, *python_places(), cache_root(), hub_cache())]
    shown += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH", "ROCM_PATH") if os.environ.get(name)]
    for place in dict.fromkeys(place for path in shown for place in (path.absolute(), path.resolve())):
        if place.is_dir() and place != Path("/"):
            args += ["--ro-bind", str(place), str(place)]
    for path in (compiled.resolve(), tree):
        args += ["--bind", str(path), str(path)]
    (tree / "__pycache__").mkdir(exist_ok=True)  # or a run could put another prepare.py there for the next one
    for path in sorted(tree.iterdir()):
        if not WRITABLE.fullmatch(path.name) and not path.is_symlink():
            args += ["--ro-bind", str(path), str(path)]
    for name in sorted(filter(SECRET.search, os.environ)):
        args += ["--unsetenv", name]
    return [*args, "--setenv", "HF_HUB_OFFLINE", "1", "--unsetenv", "TMPDIR", "--chdir", str(tree)]


def signal_command(init, number):
    """Sends to the command: the child of the sandbox's first process, which may still be about to start it."""
    while init in (table := parents()):
        if command := [pid for pid, parent in table.items() if parent == init]:
            return send(number, command)
        time.sleep(0.01)


def put_aside(tree, before):
    """Moves what the run left and others would run or obey to .lab/left; its names."""
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
        how = HOW_TO_GET if sys.platform == "linux" else "it is for Linux only"
        print(f"sandbox: bubblewrap (bwrap) is not there: {how}; or run without a sandbox", file=sys.stderr)
        return 1
    tree = Path.cwd()
    (tree / names.LAB).mkdir(exist_ok=True)  # or the run could make one
    reader, writer = os.pipe()
    line = [bwrap, *arguments(tree), "--info-fd", str(writer), "--", sys.executable, "-ISc", HEED, *command]
    before = {path.name for path in tree.iterdir()}
    init, early = None, []  # the sandbox's first process; signals that came before it was there

    def forward(number, frame=None):
        signal_command(init, number) if init else early.append(number)

    def ignore():  # in bubblewrap: it would end by SIGTERM, and take the command with it by SIGKILL
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    for number in SIGNALS:
        signal.signal(number, forward)
    process = subprocess.Popen(line, pass_fds=[writer], start_new_session=True, preexec_fn=ignore)
    os.close(writer)
    with os.fdopen(reader) as f:
        info = f.read()  # empty where bubblewrap ended before it had a sandbox
    if info:
        init = json.loads(info)["child-pid"]
        for number in early:
            forward(number)
    status = process.wait()
    if not info:
        print(
            "sandbox: bubblewrap made none, its reason is above. User namespaces may be forbidden here (Ubuntu: "
            "sysctl kernel.apparmor_restrict_unprivileged_userns), or this is a container without privileges; "
            "run without a sandbox, or allow them",
            file=sys.stderr,
        )
        return 1
    if left := put_aside(tree, before):
        print(f"sandbox: the run left {', '.join(left)} in the working tree: moved to .lab/left", file=sys.stderr)
        status = status or 1
    return status if status >= 0 else 128 - status
