"""What the slots of a fleet are: which GPU or cores each one has, its working tree, and the command that starts it.

Torch is not imported: the count comes from the user's or the cluster's own setting, from nvidia-smi, or from the
devices that the kernel shows.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import locks, processes
from lab.errors import Refused

CUDA, ROCM = ["CUDA_VISIBLE_DEVICES"], ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]
SETTINGS = ["AUTORESEARCH_CACHE", "AUTORESEARCH_DATASET"]  # of the shell that launches: the same in every slot
MARK = "AUTORESEARCH_FLEET"  # environment variable of all that a slot starts
PATIENCE = processes.PATIENCE + 15  # seconds that a keeper has to end its agent, before it is killed


# ---------------------------------------------------------------------------------------------------
# The machine


def for_rocm():
    """Whether the installed torch is ROCm's build."""
    found = importlib.util.find_spec("torch")  # finds it and does not import it
    version = found and found.origin and Path(found.origin).with_name("version.py")
    return bool(version and version.is_file() and re.search(r"(?m)^hip\b[^=]*=\s*['\"]", version.read_text()))


def gpus():
    """(the variable that makes GPUs visible, their names in it, where they were counted). The names are [] where
    there is no GPU."""
    variables = ROCM if for_rocm() else CUDA
    variable = variables[0]
    for name in variables:  # what the user or the cluster gave is divided further
        if name in os.environ:
            given = [part.strip() for part in os.environ[name].split(",") if part.strip()]
            return name, ([] if given == ["-1"] else given), f"{name}={os.environ[name]}"
    if variables is ROCM:
        nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
        count = sum(node.read_text().strip() not in ("", "0") for node in nodes)
        return variable, [str(i) for i in range(count)], "/sys/class/kfd"
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if done.returncode == 0:
            return variable, listed(done.stdout), "nvidia-smi"
    return variable, [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))], "/dev"


def listed(text):
    """The names of what `nvidia-smi -L` lists: numbers of GPUs; where a GPU is cut into MIG slices, those."""
    found = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+): ", line):
            found.append((gpu[1], []))
        elif (piece := re.search(r"\(UUID: (MIG-[^)]+)\)", line)) and found:
            found[-1][1].append(piece[1])
    return [name for number, pieces in found for name in (pieces or [number])]


def cores():
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def shares(slots):
    """For each slot (environment, its own cores or []), and a sentence on what was divided; a refusal where there
    are fewer GPUs."""
    variable, names, source = gpus()
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if apple:
        names, source = ["the one"], "Apple silicon"
    if names:
        if slots > len(names):
            one = "one GPU" if len(names) == 1 else f"{len(names)} GPUs"
            raise Refused(f"{slots} slots and {one} ({source}): two trainings on one GPU measure each other. --slots {len(names)}")  # fmt: skip
        return [
            ({} if apple else {variable: name}, []) for name in names[:slots]
        ], f"{slots} of {len(names)} GPUs ({source})"
    own = cores()
    each = len(own) // slots
    if not each:
        note = f"no GPU ({source}), and {slots} slots share {len(own)} cores: each disturbs the others' results"
        return [({"OMP_NUM_THREADS": "1"}, [])] * slots, note
    parts = [own[i * each : (i + 1) * each] for i in range(slots)]
    return [({"OMP_NUM_THREADS": str(each)}, part) for part in parts], f"no GPU ({source}): {each} cores a slot"


# ---------------------------------------------------------------------------------------------------
# What starts a slot


def environment_folder():
    """The folder of the Python environment that all slots share; None where this Python has none of its own."""
    given = os.environ.get("UV_PROJECT_ENVIRONMENT")
    return os.path.abspath(given) if given else sys.prefix if sys.prefix != sys.base_prefix else None


def settings():
    """What of the launching shell's environment all slots must share, as absolute as it can be."""
    found = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
    if "AUTORESEARCH_CACHE" in found:
        found["AUTORESEARCH_CACHE"] = os.path.abspath(os.path.expanduser(found["AUTORESEARCH_CACHE"]))
    return found


def mark(state, slot):
    """The value of MARK: names one slot of one fleet."""
    return f"{state['id']}:{slot['number']}"


def command(state, slot, hours):
    """The shell command of a slot's night. The environment is the checkout's own and nothing is synchronised:
    no slot may change a package under another's training."""
    values = {**state["settings"], **slot["environment"], MARK: mark(state, slot)}
    if state["python"]:
        values |= {"UV_PROJECT_ENVIRONMENT": state["python"], "UV_NO_SYNC": "1"}
    pinned = ["taskset", "-c", ",".join(map(str, slot["cores"]))] if slot["cores"] and shutil.which("taskset") else []
    night = ["uv", "run", "-m", "lab", "night", "--hours", f"{hours:g}", "--agent", state["agent"]]
    words = ["env", *(f"{name}={value}" for name, value in values.items()), *pinned, *night]
    return f"cd {shlex.quote(slot['folder'])} && {shlex.join(words)}"


# ---------------------------------------------------------------------------------------------------
# What lives


def lock_of(slot):
    return Path(slot["folder"], ".lab", "night.lock")


def lives(slot):
    """Whether a night goes on in the slot's tree, whoever started it."""
    return locks.is_held(lock_of(slot))


def keeper(slot):
    """The process of the night that goes on there; None where there is none."""
    said = lock_of(slot).read_text() if lives(slot) else ""
    return int(said) if said.isdecimal() else None


def processes_of(state, slot):
    """All that launch started for this slot and what came of it, agents that outlived their keeper included.
    Where there is no /proc: the keeper and what is below it."""
    if os.path.isdir("/proc/self"):
        return processes.marked(MARK, mark(state, slot))
    pid = keeper(slot)
    return [pid, *processes.descendants(pid)] if pid else []


def stop(state):
    """Ends what launch started. The keepers are asked, and end what they started; what is left is ended here.
    Returns (slots that were stopped, processes that had to be killed, slots whose night somebody else started)."""
    ours = {slot["number"]: processes_of(state, slot) for slot in state["slots"]}
    alive = [slot for slot in state["slots"] if lives(slot)]
    asked = [slot for slot in alive if keeper(slot) in ours[slot["number"]]]
    processes.send(signal.SIGTERM, [pid for slot in asked if (pid := keeper(slot))])
    deadline = time.monotonic() + PATIENCE
    while any(map(lives, asked)) and time.monotonic() < deadline:
        time.sleep(0.1)
    killed = processes.end(lambda: [pid for slot in state["slots"] for pid in processes_of(state, slot)], patience=5)
    return sum(map(bool, ours.values())), killed, [slot for slot in alive if slot not in asked]
