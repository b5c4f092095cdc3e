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
        """{stage: numbers, or {"error": sentence}}; each of `stages` in one child, which compiles into `cache`."""
        return self.child({"stages": stages, "seconds": seconds, "touch_gpu": True}, limit, cache)

    def child(self, wanted, limit, cache=None):
        """Runs stages of measurements.py in a child process, which reports each as a line of a file: those that were
        completed before it crashed or ran out of time count."""
        with tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True) as place:
            answer, cache = Path(place) / "answer", Path(cache or place)
            env = os.environ | {
                "PYTHONDONTWRITEBYTECODE": "1",
                "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
                "TRITON_CACHE_DIR": str(cache / "triton"),
            }
            code = CHILD.format(lab=str(Path(__file__).resolve().parents[2]), tree=str(self.tree.resolve()))
            command = [sys.executable, "-c", code, json.dumps(wanted | {"answer": str(answer)})]
            with open(Path(place) / "output", "w+", errors="replace") as printed:
                process = subprocess.Popen(
                    command, cwd=self.tree, env=env, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
                    start_new_session=True,
                )  # fmt: skip
                try:
                    ended = f"it ended with status {process.wait(limit)}"
                except subprocess.TimeoutExpired:
                    ended = f"it took longer than {limit:.0f} s"
                finally:  # the workers that compile, too
                    kill_group(process)
                printed.seek(0)
                words = [line.strip() for line in printed if line.strip()]
            found = read_answer(answer)
        missing = [stage for stage in wanted["stages"] if stage not in found]
        last = f" ({words[-1][:200]})" if words else ""
        return (
            found
            | {stage: {"error": f"{ended}{last}"} for stage in missing[:1]}
            | {stage: {"error": f"{missing[0]} did not finish"} for stage in missing[1:]}
        )


def read_answer(path):
    """{stage: what it found} from the child's file; a line that was cut is left out."""
    found = {}
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found |= json.loads(line)
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
