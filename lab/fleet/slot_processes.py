"""The processes of a fleet's slots: the command that starts one, whether it runs, how all of it is ended."""

import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

from lab.base import locks, processes
from lab.store import names

SETTINGS = ["AUTORESEARCH_CACHE", "AUTORESEARCH_DATASET"]  # of the shell that launches: the same in every slot
MARK = "AUTORESEARCH_FLEET"  # environment variable of all that a slot starts
PATIENCE = processes.PATIENCE + 15  # seconds that a keeper has to end its agent, before it is killed


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
    return Path(slot["folder"], names.LAB, names.NIGHT_LOCK)


def lives(slot):
    """Whether a night goes on in the slot's tree, whoever started it."""
    return locks.is_held(lock_of(slot))


def keeper(slot):
    """The process of the night that goes on there; None where there is none."""
    said = lock_of(slot).read_text() if lives(slot) else ""
    return int(said) if said.isdecimal() else None


def processes_of(state, slot):
    """Ids of all that launch started for this slot, including agents that outlived their keeper."""
    return processes.marked(MARK, mark(state, slot))


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
