"""Waits until something was decided in the team's queue, and says what.

.lab/waited.json has what was told before, so that nothing is told twice and nothing is missed between two calls.
"""

import contextlib
import json
import time
from pathlib import Path

from lab.base import locks
from lab.base.errors import Refused, Stop
from lab.base.files import write
from lab.base.text import json_of, one_line
from lab.loop import checks, report
from lab.queue.board import Board, machine
from lab.queue.propose import member_of
from lab.share import queue_refs
from lab.store import names
from lab.store.repository import Repo

HELP = "wait until the team's workers have decided something, and say what"
TIMEOUT = 15 * 60  # seconds: below the limit that agents have for a command
POLL, REMOTE_POLL = 1.0, 5.0  # seconds
SHOWN = 20  # decisions that are told at length
TEXT_LINES = 14  # of what a worker said of one
MOST_EXPIRED = 200  # proposals that one call removes


def add_arguments(parser):
    parser.description = (
        "Returns when a proposal has been decided or handed back since the last call, and says: the verdicts, the team's best, "
        "what runs now, and how long the queue is. Adopts nothing. Refuses if there is nothing to wait for: the queue is empty, "
        "or no worker is running."
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help=f"return after so long at the latest ({TIMEOUT})")


# ---------------------------------------------------------------------------------------------------
# What was told before


def told_before(path):
    """{"told": {id: nonce of the state that was told}, "machine": ..., "seen": {ref: [commit, seconds]}}, or None."""
    try:
        known = json_of(path.read_text(encoding="utf-8"))
        told, seen = known["told"], known["seen"]
        good = all(isinstance(v, str) for v in told.values()) and all(isinstance(v[0], str) and v[1] >= 0 for v in seen.values())
        return {"told": told, "seen": {ref: tuple(v[:2]) for ref, v in seen.items()}, "machine": known["machine"]} if good else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def remember(path, board, told):
    write(path, json.dumps({"told": told, "machine": machine(), "seen": board.seen}))


# ---------------------------------------------------------------------------------------------------
# What is told


def decision(item, member):
    """The lines on a proposal that was decided or handed back."""
    state, whose = item.state, "" if item.state["member"] == member.name else f" (proposed by {item.state['branch']})"
    if item.kind == "returned":
        head = f"handed back: {state['description']}{whose}"
        again = f"git show {state['experiment'][:7]} -- train.py"  # after a conflict git apply would fail, too
        again += "" if "<<<<<<<" in state["text"] else " | git apply --include=train.py"
        tail = [f"the edit is in {state['experiment'][:7]}: {again}"] * (state["member"] == member.name)
    else:
        value = "" if state["mean"] is None else f" {state['mean']:.6f}"
        gain = "" if state["gain"] is None else f" ({state['gain']:+.1f}σ)"
        head, tail = f"{state['verdict']}:{value}{gain} {state['description']} [{state['label']}]{whose}", []
    lines = [line for line in state["text"].split("\n") if line.strip()]
    more = [f"({len(lines) - TEXT_LINES} more lines)"] * (len(lines) > TEXT_LINES and item.kind != "returned")
    shown = lines if item.kind == "returned" else lines[:TEXT_LINES]
    return [head, *(f"  {line}" for line in [*shown, *more, *tail])]


def situation(repo, queue):
    """The lines on the team: its best, what runs, the queue."""
    team = checks.team_of(repo, checks.night_of(repo))
    lines = []
    if best := team.best:
        mean = team.night.mean_of(best)["mean"]
        value = "" if mean is None else f"{mean:.6f}, "
        lines.append(f"best: {value}{best['label']} {best['short']} ({one_line(best['description'], checks.BRIEF)}), found by {team.who(best)}")
        lines += filter(None, [report.to_beat(team.night)])
    lines += queue_refs.lines(queue_refs.as_data(queue), limit=16)
    return lines, team


def what_next(repo, queue, team):
    own = names.sha256(repo.top / names.TRAIN)
    if team.best and own != team.best["code"]:
        return f"{checks.ADOPT}, then propose on it"
    if len(queue.of("open")) < max(1, len(queue.workers)):
        return "the queue runs empty: edit train.py, commit, propose the next ideas"
    return "propose more, or: uv run -m lab wait"


def expire(board, queue, told):
    """Removes decided proposals of this member from the queue, which it has told, but not the latest: each makes every look
    at the queue slower. Their records and commits are those of the worker's branch. What was handed back stays, as nothing
    else holds its edit. Never fails: the next call does the rest."""
    old = [item for item in queue.of("decided")[: -queue_refs.KEPT] if item.state["member"] == board.member.name]
    old = [item for item in old if told.get(item.id) == item.state["nonce"]][:MOST_EXPIRED]
    if old and not board.note:
        with contextlib.suppress(Stop, OSError):
            board.swap([(item.ref, None, item.commit) for item in old])


# ---------------------------------------------------------------------------------------------------


def check(board, queue):
    """Refuses if the queue cannot move."""
    alive = board.alive(queue)
    if queue.running and alive:
        return
    waiting = queue.of("open")
    if not waiting and not queue.of("claimed"):
        raise Refused("the queue is empty, so there is nothing to wait for: edit train.py, commit it, uv run -m lab propose \"...\"")
    if not alive:
        with contextlib.suppress(OSError):  # a full disk
            (board.repo.top / names.LAB / names.PROPOSED).touch()  # so that `lab night` lets an agent wait for the first worker
        raise Refused(
            f"no worker is running, and {len(waiting) + len(queue.of('claimed'))} proposals wait: start one in a working tree of its "
            "own: uv run -m lab work --hours 8"
        )


def run(args):
    repo = Repo.find(Path.cwd())
    repo.tag()
    member, path = member_of(repo), repo.top / names.LAB / names.WAITED
    board, began = Board(repo, member), time.monotonic()
    path.parent.mkdir(exist_ok=True)
    with locks.hold(path.with_suffix(".lock")) as held:
        if not held:
            raise Refused("another wait is running in this tree")
        known = told_before(path)
        if known and known["machine"] == machine():
            board.seen = known["seen"]  # this machine's monotonic clock goes on from call to call
        told = known["told"] if known else None
        while True:
            queue = board.look()
            over = queue.of("decided", "returned")
            if told is None:  # the first call: what others proposed before is no news
                told = {item.id: item.state["nonce"] for item in over if item.state["member"] != member.name}
            new = [item for item in over if told.get(item.id) != item.state["nonce"]]
            if new or time.monotonic() - began > args.timeout:
                break
            if not board.note:
                check(board, queue)
            time.sleep(REMOTE_POLL if member.remote else POLL)
        lines = [line for item in new[:SHOWN] for line in decision(item, member)]
        lines += [f"and {item.state['verdict'] or 'handed back'}: {one_line(item.state['description'], 80)}" for item in new[SHOWN:]]
        if not new:
            lines.append(f"nothing was decided in {args.timeout:.0f} s")
        about, team = situation(repo, queue)
        notes = [f"note: {note}" for note in [*queue.notes, board.note] if note]
        lines += [*about, *notes, f"next: {what_next(repo, queue, team)}"]
        print("\n".join(lines), flush=True)
        told |= {item.id: item.state["nonce"] for item in new}
        there = {item.id for item in queue.items}
        remember(path, board, told if board.note else {id: nonce for id, nonce in told.items() if id in there})
        expire(board, queue, told)
    return 0
