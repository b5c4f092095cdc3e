"""What makes a record safe to kill at any moment.

Before anything is changed, the whole plan of a record is written to .lab/journal.json. Its steps are then carried out
in order. A step that was already carried out changes nothing. A record that finds a journal finishes it first.

A journal that is damaged (by a disk, by hand) holds no plan: the record that was interrupted is then made again from
run.log, and the damaged contents are kept in a file beside it.
"""

import json
import os

from lab.base.errors import Refused
from lab.base.files import write
from lab.base.text import json_of
from lab.store import names, runs_jsonl

PLAN = {"run_id": str, "tag": str, "records": list, "best": str | None, "drop": list, "say": list}
RESTORE = ("from", "to", "message")  # of plan["restore"], None if the branch does not step back: two blobs, a text


def read(top):
    """(plan or None, whether the file is damaged)"""
    try:
        plan = json_of((top / names.LAB / names.JOURNAL).read_bytes().decode())
    except FileNotFoundError:
        return None, False
    except ValueError:
        return None, True
    return (plan, False) if sound(plan) else (None, True)


def sound(plan):
    return (
        isinstance(plan, dict)
        and all(key in plan and isinstance(plan[key], kind) for key, kind in PLAN.items())
        and all(isinstance(item, str) for key in ("drop", "say") for item in plan[key])
        and restoration(plan.get("restore"))
        and bool(plan["records"]) and bool(plan["say"]) and all(map(runs_jsonl.whole, plan["records"]))
    )  # fmt: skip


def restoration(value):
    """Whether it is None, or all that a step back needs."""
    return value is None or isinstance(value, dict) and all(isinstance(value.get(key), str) for key in RESTORE)


def pending(top):
    """The plan of a record that was interrupted; None if no such plan can be read."""
    return read(top)[0]


def carry_out(top, plan, steps):
    """Writes the plan down, carries out each step(plan), forgets the plan. Returns the sentences that the steps
    returned."""
    if not sound(plan):  # it could not be read again after a kill
        raise Refused(f"the run has values that no record can hold: see {names.RUN_LOG}")
    path, notes = top / names.LAB / names.JOURNAL, []
    old, damaged = read(top)
    if damaged:
        aside = path.with_name(names.DAMAGED_JOURNAL)
        os.replace(path, aside)
        notes.append(f"the plan of an interrupted record could not be read: it is kept in {aside.relative_to(top)}")
    if old != plan:
        write(path, json.dumps(plan, ensure_ascii=False))
    notes += [note for step in steps if (note := step(plan))]
    os.unlink(path)
    return notes
