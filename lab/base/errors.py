"""How a command of lab fails: one sentence on stderr that says what to do, and an exit status.

0 done; 1 refused, nothing was changed; 2 wrong usage (argparse); 3 stopped half-way by the machine (disk full, a folder
that cannot be written): nothing is lost, the same command completes it; 75 the run was killed, preempted or ended by a
failure of the machine, and is not a result: run it again.
"""

import errno


class Stop(Exception):
    """Ends the command: the sentence goes to stderr, `code` is the exit status."""

    code = 1


class Refused(Stop):
    """Nothing was changed."""


class Damaged(Refused):
    """Nothing can be said of the night before this is repaired."""


class Unfinished(Stop):
    """Stopped half-way; the same command completes it."""

    code = 3


class Again(Stop):
    """The run is not a result, because the machine ended it: run it again."""

    code = 75


def os_reason(error):
    """The OSError as a clause of a sentence: "the disk is full (runs/0007-1a2b3c4)"."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full" if full else (error.strerror or str(error))
    return f"{what} ({error.filename})" if error.filename else what
