"""The team's queue as refs: what they hold, and how they are read. Nothing is changed here (lab.queue does that).

refs/autoresearch-team/TEAM/queue/ID is one proposal, from the moment it is made to its verdict. The ref points at a commit
whose message is one line of JSON, the state; its parent is the experiment. Whoever changes the state makes a new commit and
moves the ref by compare-and-swap, so a proposal has one state, one claim and one verdict, however many workers try.

    open      waits for a worker
    claimed   a worker has it; it makes a new commit before each run, by which others see that it is alive
    decided   it has a verdict; the proposer's `wait` removes the oldest of these once it has told them (records stay)
    returned  handed back to its proposer: a conflict, or nobody could run it

IDs that are not random: worker-MEMBER says that a worker is running; baseline-SEED and again-... are claims on runs that the
rule wants and nobody proposed. With a remote, its refs are what counts, as the mirror has them after a fetch; a ref of the
queue that is only here has not reached the remote yet, or was made before there was one.
"""

import json
import re
import time
from typing import NamedTuple

from lab.base import git as base_git
from lab.base import text
from lab.share.membership import NAME
from lab.share.team import objects
from lab.store import names

KINDS = ("open", "claimed", "decided", "returned", "worker")
TASKS = ("experiment", "baseline", "again", "worker")
LARGEST = 1 << 15  # bytes of a state
MOST = 20_000  # refs that are read
LINE, TEXT = 400, 6000  # characters
KEPT = 100  # decided proposals that stay in the queue, at least: a thousand made status 0.6 s slower and a fetch 0.13 s
ID = re.compile(r"[0-9a-z][0-9a-z-]{0,80}")
HASH = re.compile(r"([0-9a-f]{40}([0-9a-f]{24})?)?")
FIELDS = {  # what a state says; all are always there
    "kind": "", "task": "", "nonce": "",
    "seq": 0, "member": "", "branch": "", "description": "", "simpler": False, "experiment": "", "base": "", "code": "",
    "proposed": "",
    "attempts": 0, "failed": [],  # runs that failed because of a worker's machine, and why
    "worker": "", "worker_branch": "", "host": "", "machine": "", "tree": "", "attempt": "", "renewed": 0, "doing": "",
    "running": "", "since": "",
    "verdict": "", "text": "", "label": "", "mean": None, "gain": None, "commit": "", "when": "",
}  # fmt: skip
HASHES = ("experiment", "base", "commit")


class Item(NamedTuple):
    id: str
    ref: str  # where it is changed: the same name here and on the remote
    commit: str  # its state; a change must name it
    state: dict  # as FIELDS
    unpublished: bool  # the remote does not have it yet

    @property
    def kind(self):
        return self.state["kind"]


class Queue(NamedTuple):
    items: tuple  # of Item: the proposals, oldest first
    slots: tuple  # of Item: claims on runs that nobody proposed
    workers: tuple  # of Item
    notes: tuple  # sentences on what was left out

    def of(self, *kinds):
        return [item for item in self.items if item.kind in kinds]

    @property
    def running(self):
        return [item for item in (*self.items, *self.slots) if item.kind == "claimed"]

    @property
    def next_seq(self):
        """Orders proposals whatever the clocks of their machines say."""
        return 1 + max((item.state["seq"] for item in self.items), default=0)

    def find(self, id):
        return next((item for item in (*self.items, *self.slots, *self.workers) if item.id == id), None)


# ---------------------------------------------------------------------------------------------------
# The format of a state


def new(state, **changes):
    """The state with these changes, as FIELDS."""
    unknown = changes.keys() - FIELDS.keys()
    assert not unknown, f"a state has no {unknown}"
    return {**FIELDS, **state, **changes}


_trees = {}  # (top, commit): its tree


def written(repo, state, parent):
    """Writes the state as a commit; its name. parent: the experiment, so that the ref carries it to the remote; for a state
    without one any commit. Two calls never write the same object: `nonce` is random. Raises GitError."""
    if (repo.top, parent) not in _trees:
        found = repo.git("rev-parse", f"{parent}^{{commit}}", f"{parent}^{{tree}}").split()
        if parent == found[0]:  # a commit's own name, which always means the same
            _trees[repo.top, parent] = found[1]
        parent, tree = found
    else:
        tree = _trees[repo.top, parent]
    who = f"autoresearch <autoresearch@localhost> {int(time.time())} +0000"
    line = json.dumps(state, ensure_ascii=False)
    body = f"tree {tree}\nparent {parent}\nauthor {who}\ncommitter {who}\n\n{line}\n"
    return repo.git("hash-object", "-t", "commit", "-w", "--stdin", stdin=body).strip()


def parse(data):
    """The state in these bytes of a commit; None for what lab would not write. Strings are safe to print."""
    try:
        head, _, message = data.decode().partition("\n\n")
        found = text.json_of(message)
    except (AttributeError, ValueError):
        return None
    if not isinstance(found, dict) or not FIELDS.keys() <= found.keys():
        return None
    state = {}
    for key, default in FIELDS.items():
        value = found[key]
        if key in ("mean", "gain"):
            ok = value is None or type(value) in (int, float) and abs(value) < 1e9
        elif key == "failed":
            ok = isinstance(value, list) and len(value) <= 20 and all(isinstance(line, str) for line in value)
            value = [text.one_line(line, LINE) for line in value] if ok else value
        else:
            ok = type(value) is type(default) and (not isinstance(value, int) or 0 <= value < 1e9)
        if not ok:
            return None
        if isinstance(value, str):
            value = "\n".join(text.printable(value, "\n").split("\n"))[:TEXT] if key == "text" else text.one_line(value, TEXT)
        state[key] = value
    parents = re.findall(r"^parent (\w+)$", head, re.MULTILINE)
    known = state["kind"] in KINDS and state["task"] in TASKS and all(HASH.fullmatch(state[key]) for key in HASHES)
    carried = state["task"] != "experiment" or state["experiment"] and parents == [state["experiment"]]
    return state if known and carried else None


# ---------------------------------------------------------------------------------------------------
# Reading


_read = {}  # {name of a commit: its state, or None}: a state never changes


def read(repo, member, refs=None):
    """The Queue as it is here: fetch first if the team has a remote. refs: lab.share.exchange.refs_of, if just read."""
    prefix = f"{names.queue_ref(member.team)}/"
    mirror = names.mirror_of(prefix)
    refs = base_git.refs(repo.top, prefix, *[mirror] * bool(member.remote)) if refs is None else refs
    there = {prefix + ref.removeprefix(mirror): commit for ref, commit in refs.items() if ref.startswith(mirror)}
    found = {ref: commit for ref, commit in refs.items() if ref.startswith(prefix)} | there
    notes = [f"the queue has {len(found)} entries: {MOST} are read"] * (len(found) > MOST)
    found = dict(sorted(found.items())[:MOST])
    wanted = [commit for commit in found.values() if commit not in _read]
    if wanted:
        data = objects(repo, wanted, LARGEST, "commit")
        _read.update({commit: parse(data[commit]) for commit in wanted if commit in data})  # what git could not read is asked again
    items, bad = [], 0
    for ref, commit in found.items():
        id, state = ref.removeprefix(prefix), _read.get(commit)
        if state is None or not ID.fullmatch(id) or state["task"] == "worker" and not NAME.fullmatch(state["worker"]):
            bad += 1
            continue
        items.append(Item(id, ref, commit, state, bool(member.remote) and ref not in there))
    notes += [f"{bad} entries of the queue are not what lab writes: left out"] * bool(bad)
    by_task = {task: [item for item in items if item.state["task"] == task] for task in TASKS}
    proposals = sorted(by_task["experiment"], key=lambda item: (item.state["seq"], item.id))
    slots = [item for item in (*by_task["baseline"], *by_task["again"]) if item.kind == "claimed"]
    return Queue(tuple(proposals), tuple(slots), tuple(by_task["worker"]), tuple(notes))


# ---------------------------------------------------------------------------------------------------
# For the screen


def as_data(queue):
    """The queue as plain data, for status."""
    waiting, shown = queue.of("open"), ("branch", "description")
    running = [{key: item.state[key] for key in (*shown, "worker_branch", "doing", "since", "tree")} for item in queue.running]
    decided = [{key: item.state[key] for key in (*shown, "verdict", "mean", "when")} for item in queue.of("decided")]
    returned = [{key: item.state[key] for key in (*shown, "when")} for item in queue.of("returned")]
    return {
        "waiting": [{key: item.state[key] for key in shown} for item in waiting], "running": running, "decided": decided,
        "returned": returned, "workers": [item.state["worker_branch"] for item in queue.workers],
        "unpublished": sum(item.unpublished for item in queue.items),
    }  # fmt: skip


def lines(data, limit=4):
    """as_data() as lines for the screen; [] if nobody uses a queue."""
    if not any(data[key] for key in ("waiting", "running", "decided", "returned", "workers")):
        return []
    numbers = [f"{len(data['waiting'])} proposals wait", f"{len(data['running'])} run"]
    numbers += [f"{len(data['decided'])} decided{' lately' * (len(data['decided']) >= KEPT)}"]
    numbers += [f"{len(data['returned'])} handed back"] * bool(data["returned"])
    numbers += [f"{data['unpublished']} not on the remote yet"] * bool(data["unpublished"])
    shown = [f"queue: {', '.join(numbers)}; workers: {len(data['workers'])}"]
    for run in data["running"][:limit]:
        shown.append(f"  {run['worker_branch']}: {text.one_line(run['description'], 70)} ({run['doing']})")
    if len(data["running"]) > limit:
        shown.append(f"  and {len(data['running']) - limit} more")
    waiting = [text.one_line(item["description"], 70) for item in data["waiting"]]
    shown += [f"  waits: {description}" for description in waiting[: 2 * limit]]
    if len(waiting) > 2 * limit:
        shown.append(f"  and {len(waiting) - 2 * limit} more wait")
    return shown


def instead(queue, member, has_trained, step):
    """What comes next for a tree that feeds workers: a sentence in place of the Step's, or None for one that trains itself.
    has_trained: whether it has records of its own."""
    workers = {item.state["worker"] for item in queue.workers}
    feeds = not has_trained or any(item.state["member"] == member.name for item in queue.items)
    if not workers or member.name in workers or not feeds or step.kind not in ("commit", "run", "repeat", "doubt", "edit"):
        return None
    if step.kind == "commit":
        return (
            'train.py has changes that are not committed: git commit -m "what it tries" train.py, then: '
            'uv run -m lab propose "what it tries" (or git checkout -- train.py)'
        )
    if step.kind == "run" and step.why.endswith("has not run yet"):
        return f'{step.why}: uv run -m lab propose "what it tries"'
    return (
        f"{len(workers)} workers run, {len(queue.of('open'))} proposals wait: edit train.py, commit it, uv run -m lab propose "
        '"what it tries"; once the queue is full: uv run -m lab wait'
    )
