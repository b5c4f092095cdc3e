"""How many runs of one train.py in a row ended without a result and without an error of train.py, in .lab/ends.json.

A machine that fails ends a run, and the run is repeated. But train.py may end its own process in a way that looks the same
(too much memory, so that the system kills it), and would be repeated without end. `lab record` notes such a run when it
refuses it. A night that is killed together with its run, and starts again, goes by `lab status`, which notes nothing. A
run that is killed before its header is not counted either: its log names no code.
"""

import contextlib
import json

from lab.base.files import write
from lab.base.text import json_of
from lab.store import names

REPEATS = 2  # such a run is repeated so often; the next one is a crash
COUNTED = ("killed", "machine", "overran")  # of RunLog.ended; what preempts or interrupts a run is not its train.py


def noted(top, code):
    """The ids of the runs of this code that were noted since the last record, oldest first."""
    try:
        found = json_of((top / names.LAB / names.ENDS).read_bytes().decode())
    except (OSError, ValueError):
        return []
    runs = found.get("runs") if isinstance(found, dict) and found.get("code") == code else None
    return [run for run in runs if isinstance(run, str)] if isinstance(runs, list) else []


def before(top, code, run_id):
    """How many were noted besides this run."""
    return sum(run != run_id for run in noted(top, code))


def note(top, code, run_id):
    """Notes the run, once, and forgets those of other code. On a full disk it is not counted: that is no end of train.py's."""
    runs = noted(top, code)
    if run_id not in runs:
        with contextlib.suppress(OSError):
            write(top / names.LAB / names.ENDS, json.dumps({"code": code, "runs": [*runs, run_id]}))


def forget(top):
    """A run was recorded."""
    with contextlib.suppress(OSError):
        (top / names.LAB / names.ENDS).unlink()
