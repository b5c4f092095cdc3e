"""What makes a record safe to kill at any moment.

Before anything is changed, the whole plan of a record is written to .lab/journal.json. Its steps are then carried
out in order, each of which changes nothing where it was carried out before. A record that finds a journal
finishes it first.
"""

import json
import os

from lab.base.files import write
from lab.store import names


def pending(top):
    """The plan of a record that was interrupted; None where there is none."""
    try:
        with open(top / names.LAB / names.JOURNAL, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None


def carry_out(top, plan, steps):
    """Writes the plan down, carries out each step(plan), forgets the plan. Returns what the steps had to say."""
    if pending(top) != plan:
        write(top / names.LAB / names.JOURNAL, json.dumps(plan, ensure_ascii=False))
    notes = [note for step in steps if (note := step(plan))]
    os.unlink(top / names.LAB / names.JOURNAL)
    return notes
