"""Changes the team's queue: every change is a compare-and-swap of what was read.

Without a remote the refs of this checkout count. With one, the remote's do; a proposal is then first a ref here, and whoever
looks at the queue from this checkout takes it to the remote.
"""

import contextlib
import secrets
import time
from datetime import datetime, timezone
from pathlib import Path

from constants import GRACE, TIME_BUDGET
from lab.base import git as base_git
from lab.base import locks
from lab.base.errors import Stop
from lab.base.git import GitError
from lab.share import exchange, queue_refs
from lab.store import names

LONGEST = TIME_BUDGET + 2 * GRACE + 120  # seconds between two signs of life of a worker that runs: a run and its record
FETCH_AGE = 2.0  # seconds: several workers of one checkout share a fetch
PROPOSE_SECONDS = 10  # that a push of a proposal may take


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine():
    """Names this machine's present boot: locks of processes can be seen where it is the same. "" if that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class Board:
    """The queue as one member sees and changes it."""

    def __init__(self, repo, member, longest=LONGEST, clock=time.monotonic):
        self.repo, self.member, self.longest, self.clock = repo, member, longest, clock
        self.seen = {}  # ref: (commit, when it was first seen, by this process's own clock)
        self.note = None  # what was wrong with the last fetch
        self.refs = None  # {ref: commit} of the team as of the last look
        self.fetched = None  # exchange.last_fetch of it

    # --- looking ---

    def look(self, fresh=FETCH_AGE):
        """The queue_refs.Queue after a fetch, after what is only here was taken to the remote, and after bury(): proposals that did
        not reach it, and all that workers of this checkout had claimed before there was a remote."""
        self.fetch(fresh)
        queue = queue_refs.read(self.repo, self.member, self.refs)
        if self.note:  # the workers may not have reached the remote either: what was not seen to change may be alive
            self.seen.clear()
        else:
            self.forget_copies()
            late = [item for item in (*queue.items, *queue.slots, *queue.workers) if item.unpublished]
            if late and self.publish(late) is None:
                queue = queue_refs.read(self.repo, self.member)
        self.watch(queue)
        return queue if self.note else self.bury(queue)

    def forget_copies(self):
        """Removes proposals here that the remote has, from a push whose answer was lost: one that is removed there later would
        come back from here."""
        prefix = f"{names.queue_ref(self.member.team)}/"
        both = [(ref, None, at) for ref, at in self.refs.items() if ref.startswith(prefix) and names.mirror_of(ref) in self.refs]
        if self.member.remote and both and base_git.change_refs(self.repo.top, both):
            self.refs = {ref: commit for ref, commit in self.refs.items() if (ref, None, commit) not in both}

    def fetch(self, fresh=0.0):
        """Reads the team's refs into `refs` after a fetch; what is wrong with that into `note`."""
        alone = self.fetched == exchange.last_fetch(self.member)  # other processes of this checkout may have fetched since
        before = self.refs if alone else None
        self.note, refs = exchange.fetch_and_look(self.repo, self.member, fresh=fresh, before=before)
        self.refs, self.fetched = exchange.refs_of(self.repo, self.member) if refs is None else refs, exchange.last_fetch(self.member)
        if self.note and self.note.startswith(exchange.REWRITTEN):  # the fetch worked, and nothing is lost: status says it
            self.note = None

    def publish(self, items):
        """Takes items that are only here to the remote. Returns a sentence if it did not take them, or None."""
        for item in items:
            try:
                done = exchange.swap(self.repo, self.member, [(item.ref, item.commit, None)], PROPOSE_SECONDS)
            except GitError as error:
                return f"the remote does not have the proposal yet: {exchange.reason(error)}"
            # If it was refused, an earlier push had reached the remote, and a worker was quick: forget_copies will see that.
            # But a host may refuse for a reason of its own, and then the proposal is nowhere but here.
            if done == "refused":
                self.fetch()
                if names.mirror_of(item.ref) not in self.refs:
                    return "the remote refuses the proposal, so that no worker elsewhere sees it"
            else:
                base_git.change_refs(self.repo.top, [(item.ref, None, item.commit)])
        return None

    # --- changing ---

    def written(self, state, parent, **changes):
        """A commit of the state with these changes; (its name, the state)."""
        state = queue_refs.new(state, nonce=secrets.token_hex(16), **changes)
        return queue_refs.written(self.repo, state, parent), state

    def swap(self, changes, publish=False):
        """Changes refs of the queue, all or none: [(ref, new commit or None, commit that it must have or None)]. Whether that
        was done, by this call or by an earlier one whose answer was lost. publish: the member's own refs go to the remote in
        the same push. Raises GitError if the remote does not answer."""
        if not self.member.remote:
            if base_git.change_refs(self.repo.top, changes):
                return True
            there = base_git.refs(self.repo.top, *(ref for ref, _, _ in changes))
            return all(there.get(ref) == new for ref, new, _ in changes)
        return exchange.swap(self.repo, self.member, changes, publish=publish) != "refused"

    def has(self, item):
        """Whether the item is, as of now, what the others see it to be; False, too, if that cannot be found out. Fetches."""
        self.fetch()
        ref = names.mirror_of(item.ref) if self.member.remote else item.ref
        return not self.note and self.refs.get(ref) == item.commit

    # --- who is alive ---

    def watch(self, queue):
        """Notes when each claim, and each worker's ref, was first seen as it is."""
        known, self.seen = self.seen, {}
        for item in (*queue.running, *queue.workers):
            commit, since = known.get(item.ref, (None, 0.0))
            self.seen[item.ref] = (commit, since) if commit == item.commit else (item.commit, self.clock())

    def is_void(self, item):
        """Whether the worker that has this claim is certainly gone: its lock can be seen to be free, or nothing was heard of
        it for longer than a run can take."""
        commit, since = self.seen.get(item.ref, (None, 0.0))
        return lock_is_free(item.state) or commit == item.commit and self.clock() - since > self.longest

    def bury(self, queue):
        """The queue without what workers left that are certainly gone: the sign that they are there, which status counts, and
        claims on runs that nobody proposed. Both are removed. A proposal is for another worker to claim."""
        alive = {*self.alive(queue), self.member.name}
        gone = [item for item in (*queue.workers, *queue.slots) if item.state["worker"] not in alive and not item.unpublished]
        with contextlib.suppress(Stop, OSError):  # the next look tries again
            if gone and self.swap([(item.ref, None, item.commit) for item in gone]):
                left = [tuple(item for item in items if item not in gone) for items in (queue.slots, queue.workers)]
                return queue._replace(slots=left[0], workers=left[1])
        return queue

    def alive(self, queue):
        """Names of the members whose workers may be running."""
        signs = (*queue.running, *queue.workers)
        return {item.state["worker"] for item in signs if not self.is_void(item)}


def lock_is_free(state):
    """Whether the worker of this claim can be seen to be gone: it ran on this machine, and nobody holds the lock that has its
    name in it."""
    here = machine()
    if not here or state["machine"] != here or not Path(state["tree"]).is_absolute():
        return False
    lock = Path(state["tree"], names.LAB, names.WORKER_LOCK)
    try:
        named = lock.is_file() and lock.read_text(encoding="utf-8", errors="replace").strip() == state["worker"]
    except OSError:
        return False
    return named and locks.is_free(lock)
