"""The processes of a fleet's slots: the command that starts a slot, whether it is running, how it is stopped."""

import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

from lab.base import locks, processes
from lab.store import names

SETTINGS = ["AUTORESEARCH_CACHE", "AUTORESEARCH_DATASET"]  # taken from the launching shell: the same in every slot
MARK = "AUTORESEARCH_FLEET"  # environment variable of every process that a slot starts
STOP_LIMIT = processes.PATIENCE + 15  # seconds that a keeper has to end its agent before it is killed


# ---------------------------------------------------------------------------------------------------
# What starts a slot


def environment_folder():
    """The folder of the Python environment that all slots share; None outside a virtual environment."""
    given = os.environ.get("UV_PROJECT_ENVIRONMENT")
    return os.path.abspath(given) if given else sys.prefix if sys.prefix != sys.base_prefix else None


def settings():
    """The variables of the launching shell that all slots must share; the cache folder as an absolute path."""
    found = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
    if "AUTORESEARCH_CACHE" in found:
        found["AUTORESEARCH_CACHE"] = os.path.abspath(os.path.expanduser(found["AUTORESEARCH_CACHE"]))
    return found


def mark(state, slot):
    """The value of MARK, which identifies one slot of one fleet."""
    return f"{state['id']}:{slot['number']}"


def name_of(slot):
    """What a slot is called in its branch, its folder and its window: gpu0, or agent0 for an agent without a GPU."""
    return slot.get("name") or f"gpu{slot['number']}"


def command(state, slot, hours):
    """The shell command of a slot's night, or of its worker. It uses the checkout's Python environment without synchronising it, because
    no slot may change a package that another slot's training uses."""
    values = {**state["settings"], **slot["environment"], MARK: mark(state, slot)}
    if state["python"]:
        values |= {"UV_PROJECT_ENVIRONMENT": state["python"], "UV_NO_SYNC": "1"}
    pinned = ["taskset", "-c", ",".join(map(str, slot["cores"]))] if slot["cores"] and shutil.which("taskset") else []
    if slot.get("works"):
        what = ["work", "--hours", f"{hours:g}"]
    else:
        what = ["night", "--hours", f"{hours:g}", "--agent", state["agent"]]
    words = ["env", *(f"{name}={value}" for name, value in values.items()), *pinned, "uv", "run", "-m", "lab", *what]
    return f"cd {shlex.quote(slot['folder'])} && {shlex.join(words)}"


# ---------------------------------------------------------------------------------------------------
# What is running


def lock_of(slot):
    return Path(slot["folder"], names.LAB, names.NIGHT_LOCK)


def is_running(slot):
    """Whether a night is running in the slot's tree, started by this fleet or not."""
    return locks.is_held(lock_of(slot))


def keeper(slot):
    """The process id of the night that is running there; None if there is no such night."""
    said = lock_of(slot).read_text() if is_running(slot) else ""
    return int(said) if said.isdecimal() else None


def processes_of(state, slot):
    """Ids of all that launch started for this slot, including agents that outlived their keeper."""
    return processes.marked(MARK, mark(state, slot))


def stop(state):
    """Ends what launch started: keepers get SIGTERM and end their agents; whatever is left after that is killed.
    Returns (number of slots stopped, the Ended of what was left, slots whose night this fleet did not start)."""
    ours = {slot["number"]: processes_of(state, slot) for slot in state["slots"]}
    alive = [slot for slot in state["slots"] if is_running(slot)]
    asked = [slot for slot in alive if keeper(slot) in ours[slot["number"]]]
    processes.send(signal.SIGTERM, [pid for slot in asked if (pid := keeper(slot))])
    deadline = time.monotonic() + STOP_LIMIT
    while any(map(is_running, asked)) and time.monotonic() < deadline:
        time.sleep(0.1)
    ended = processes.end(lambda: [pid for slot in state["slots"] for pid in processes_of(state, slot)], patience=5)
    return sum(map(bool, ours.values())), ended, [slot for slot in alive if slot not in asked]
