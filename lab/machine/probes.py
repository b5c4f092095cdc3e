"""What doctor asks of the machine: programs, files, locks, and torch, which is only imported in a child process.

Nothing here judges: checks.py does. Tests replace methods of Machine to describe machines that they do not have.
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from lab.base import locks
from lab.base.git import read_only
from lab.store import names

PROGRAM_SECONDS = 20  # that a program such as nvidia-smi may take
FACTS_SECONDS = 180  # that importing torch and train.py may take, on a cold disk
# lab is the one that runs here; prepare.py and train.py are the tree's.
CHILD = """
import sys
sys.path.insert(0, {lab!r})
from lab.machine import measurements
sys.path.insert(0, {tree!r})
measurements.main()
"""


class Machine:
    """This machine, seen from the working tree `tree`."""

    def __init__(self, tree):
        self.tree = Path(tree)

    def system(self):
        """{"system", "release", "machine", "python", "cores", "load"}: load is that of the last minute, or None."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return {
            "system": platform.system(), "release": platform.release(), "machine": platform.machine(),
            "python": platform.python_version(), "cores": cores or 1, "load": load,
        }  # fmt: skip

    def environ(self, name):
        return os.environ.get(name)

    def which(self, program):
        return shutil.which(program)

    def exists(self, path):
        return Path(path).exists()

    def output(self, *command):
        """(exit status, what it printed) of a small program; (None, why) if it cannot be started or does not end."""
        try:
            done = subprocess.run(
                command, cwd=self.tree, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=PROGRAM_SECONDS, env=os.environ | {"LC_ALL": "C"},
            )  # fmt: skip
        except (OSError, ValueError) as error:
            return None, str(error)
        except subprocess.TimeoutExpired:
            return None, f"no answer in {PROGRAM_SECONDS} s"
        return done.returncode, done.stdout if done.returncode == 0 else f"{done.stdout}\n{done.stderr}".strip()

    def git(self, *args):
        """What git prints in the tree, stripped; None if it fails."""
        shown = read_only(self.tree, *args)
        return None if shown is None else shown.strip()

    def nvidia_hardware(self):
        """Whether a GPU of NVIDIA is on the PCI bus, with or without a driver (Linux)."""
        for device in Path("/sys/bus/pci/devices").glob("*"):
            with contextlib.suppress(OSError):
                if (device / "class").read_text().startswith("0x03") and (
                    device / "vendor"
                ).read_text().strip() == "0x10de":
                    return True
        return False

    def amd_hardware(self):
        """Whether the kernel has an AMD GPU that can compute (Linux): CPUs are nodes too, with a gpu_id of 0."""
        nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
        with contextlib.suppress(OSError):
            return any(node.read_text().strip() not in ("", "0") for node in nodes)
        return False

    def in_progress(self):
        return locks.run_in_progress(self.tree)

    def writable(self, path):
        """Whether files can be created in the folder, or in the nearest one above it that exists."""
        path = Path(path)
        while not path.exists() and path != path.parent:
            path = path.parent
        return path.is_dir() and os.access(path, os.W_OK | os.X_OK)

    def free(self, path):
        """Free bytes for this user on the file system of the path (of what exists of it)."""
        path = Path(path)
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free

    def temporary_folder(self):
        """The folder for temporary files; None if there is none that can be written."""
        try:
            return Path(tempfile.gettempdir())
        except OSError:
            return None

    # --- torch, in a child process ---

    def facts(self, touch_gpu):
        """{"torch": ..., "train": ...}: what torch and train.py report of this machine (measurements.py has the keys).
        A part that failed is {"error": sentence}. Without touch_gpu nothing is allocated on the GPU."""
        return self.child({"stages": ["torch", "train"], "touch_gpu": touch_gpu}, FACTS_SECONDS)

    def measure(self, stages, seconds, limit, cache):
        """{stage: numbers, or {"error": sentence}}, each of `stages` in one child, which compiles into the folder `cache`."""
        env = {"TORCHINDUCTOR_CACHE_DIR": str(Path(cache, "inductor")), "TRITON_CACHE_DIR": str(Path(cache, "triton"))}
        return self.child({"stages": stages, "seconds": seconds}, limit, TMPDIR=str(cache), **env)

    def child(self, wanted, limit, **env):
        """Runs stages of measurements.py in a child process. It prints each as a line: those that it completed before it
        crashed or ran out of time count. Needs no file, so that it works on a full disk."""
        code = CHILD.format(lab=str(Path(__file__).resolve().parents[2]), tree=str(self.tree.resolve()))
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(wanted)], cwd=self.tree,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | env, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        late = False
        try:
            answers, words = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            late = True
            kill_group(process)
            answers, words = process.communicate()
        finally:  # the workers that compile, too
            kill_group(process)
        found = {}
        for line in answers.splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut
                found |= json.loads(line)
        last = next((f" ({line.strip()[:200]})" for line in reversed(words.splitlines()) if line.strip()), "")
        ended = f"it took longer than {limit:.0f} s" if late else f"it ended with status {process.returncode}{last}"
        for stage in wanted["stages"]:
            found.setdefault(stage, {"error": ended})
        return found


def kill_group(process):
    with contextlib.suppress(OSError, AttributeError):  # all have ended; Windows has no process groups
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def tree_of(path):
    """The working tree that contains the path; the path itself outside a checkout."""
    top = read_only(path, "rev-parse", "--show-toplevel")
    top = Path(top.strip()) if top else Path(path)
    return top if (top / names.TRAIN).is_file() else Path(path)
