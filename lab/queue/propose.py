"""Puts the experiment at HEAD into the team's queue, and the branch back to where it was before it.

The proposal is a ref before the branch moves, so a kill between the two loses nothing: the same command completes it.
"""

import contextlib
import secrets
from pathlib import Path

from lab.base import git as base_git
from lab.base import locks
from lab.base.errors import Refused
from lab.base.text import one_line
from lab.loop import checks, team_status
from lab.queue.board import Board, now
from lab.share import queue_refs
from lab.share.team import read_trees
from lab.store import names, results_tsv
from lab.store.repository import Repo

HELP = "put the experiment at HEAD into the team's queue, for a worker to run"
TOUCHED = 3  # files that a refusal names


def add_arguments(parser):
    parser.description = (
        "Puts the commit at HEAD, which may change train.py alone, into the team's queue, and takes it off this branch. A "
        "worker (`lab work`) brings it onto the team's best, runs and records it; `lab wait` says what came of it."
    )
    parser.add_argument("description", help="what this tries, in a few words, as for lab record")
    parser.add_argument("--simpler", action="store_true", help="it removes more lines than it adds, as for lab record")


def member_of(repo):
    """The working tree's Member. Refuses a tree that is in no team."""
    member = checks.member_of(repo)
    if not member:
        raise Refused(f"a queue needs a team: git config {names.TEAM} NAME (any name; workers of the same name take from it)")
    return member


def check(repo, tag):
    """(the experiment at HEAD, its parent); a refusal if it cannot be proposed. Uncommitted edits of other files than
    train.py are the human's, and stay."""
    head = repo.head()
    if not repo.train_is_committed():
        raise Refused('train.py has changes that are not committed: git commit -m "..." train.py, then propose')
    files = repo.files([head]).get(head, [])
    parent = repo.ask("rev-parse", "--verify", "--quiet", f"{head}^")
    if names.TRAIN not in files or not parent:
        raise Refused(f"HEAD ({repo.short(head)}) is no experiment, as it does not change train.py: edit train.py, commit it, then propose")
    if others := [name for name in files if name != names.TRAIN]:
        short, more = repo.short(head), ", ".join(others[:TOUCHED])
        raise Refused(
            f"{short} touches {more}, and an experiment may change train.py alone: git reset --soft {short}^; "
            f"git commit -m ... -- train.py; {checks.undo_of(repo, head, others)}"
        )
    if len(repo.git("rev-list", "--parents", "-n1", head).split()) > 2:
        raise Refused(f"{repo.short(head)} is a merge, and an experiment is a commit on its own")
    listed = repo.git("for-each-ref", "--format=%(refname)", "--contains", head, "refs/heads", "refs/remotes", "refs/tags")
    if others := [ref for ref in listed.split() if ref != f"refs/heads/{names.PREFIX}{tag}"]:
        raise Refused(f"HEAD ({repo.short(head)}) is on {others[0]} too: commit the experiment on this branch alone")
    return head, parent


def check_new(repo, tag, member, queue, code, head):
    """Refuses code that was recorded or is queued; returns the Item if it was this very commit that was queued, by a call
    that was killed."""
    found = next((item for item in queue.of("open", "claimed") if item.state["code"] == code), None)
    if found and found.state["member"] == member.name and found.state["experiment"] == head:
        return found
    if found:
        how = "waits in the queue" if found.kind == "open" else "runs"
        raise Refused(
            f"this very train.py {how} already ({found.state['description'][: checks.BRIEF]}): git reset --keep HEAD^ and "
            "propose something else"
        )
    own = checks.night_of(repo)
    r = own.latest(code)
    if r is None:
        trees, _ = read_trees([repo], member, tag)
        r = next((r for tree in trees for r in tree.records if r["code"] == code and r["verdict"] != "elsewhere"), None)
    if r:
        verdict = f"{r['tag']}, {r['verdict']}"
        raise Refused(
            f"this very train.py was recorded already ({verdict}: {r['description'][: checks.BRIEF]}): "
            "git reset --keep HEAD^ and propose something else"
        )
    return None


def run(args):
    repo = Repo.find(Path.cwd())
    tag, member = repo.tag(), member_of(repo)
    description = one_line(args.description, results_tsv.LONG_DESCRIPTION)
    if not description:
        raise Refused('say in a few words what this tries: uv run -m lab propose "..."')
    if locks.is_held(repo.top / names.LAB / names.WORKER_LOCK):
        raise Refused("a worker runs in this tree, which resets it as it needs: propose from another working tree (git worktree add)")
    with locks.one_at_a_time(repo.top / names.LAB, "record or propose"):
        head, parent = check(repo, tag)
        if args.simpler and (why := checks.not_simpler(repo, parent, head)):
            raise Refused(f"{why}: propose it without --simpler")
        code, board = names.sha256(repo.top / names.TRAIN), Board(repo, member)
        queue = queue_refs.read(repo, member)
        item = check_new(repo, tag, member, queue, code, head)
        if not item:
            id = secrets.token_hex(8)
            ref = names.queue_ref(member.team, id)
            commit, state = board.written(
                {}, head, kind="open", task="experiment", seq=queue.next_seq, member=member.name, branch=tag,
                description=description, simpler=args.simpler, experiment=head, base=parent, code=code, proposed=now(),
            )  # fmt: skip
            if not base_git.change_refs(repo.top, [(ref, commit, None)]):
                raise Refused("the queue has changed meanwhile: call it again")
            item = queue_refs.Item(id, ref, commit, state, bool(member.remote))
        if not repo.drop([head]):
            raise Refused("the branch has moved meanwhile: the experiment is queued, and stays on the branch too")
        with contextlib.suppress(OSError):  # a full disk
            (repo.top / names.LAB / names.PROPOSED).touch()  # so that `lab night` sees that its agent makes progress
    note = board.publish([item]) if item.unpublished else None
    queue = team_status.living(queue_refs.read(repo, member))
    waiting, running = len(queue.of("open")), len(queue.running)
    print(f"proposed: {one_line(item.state['description'], checks.BRIEF)}")
    print(f"queue: {waiting} wait, {running} run; HEAD is {repo.short(repo.head())} again")
    if note:
        print(f"note: {note}; the next propose or wait takes it along")
    if not queue.workers:
        print("note: no worker is running yet: uv run -m lab work --hours 8, in a working tree of its own")
    print("next: edit train.py and propose the next idea, or: uv run -m lab wait")
    return 0
