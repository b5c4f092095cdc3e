"""Makes train.py that of the team's best: one commit on the own branch, and no run, as its hash says what it is.

Nothing is reset: the human's commits stay. If files that git tracks, other than program.md, have changes
that are not committed, nothing is done.
"""

import hashlib
from pathlib import Path

from lab.analysis.history import label
from lab.base import locks
from lab.base.errors import Refused
from lab.base.text import one_line
from lab.loop import checks, team_status
from lab.loop.next_step import next_step
from lab.loop.record import name_author
from lab.share import exchange, queue_refs
from lab.store import journal, names
from lab.store.repository import Repo

HELP = "take over the team's best train.py, as one commit on this branch"
TITLE = 72  # characters of a commit's first line
NAMED = 3  # files that a refusal names


def add_arguments(parser):
    parser.description = (
        "Adds one commit to this branch that makes train.py that of the team's best, whoever found it. It needs no run. "
        "Refuses if a tracked file other than program.md has changes that are not committed, if an experiment at HEAD is not recorded, and if nothing is "
        "better than what is here."
    )


def check_clean(repo):
    """Refuses if a tracked file has changes that are not committed, but for train.py, of which check() says more, and
    program.md, which the human may edit at any time. Files that git does not track are no matter: the harness writes some, and
    the commit touches train.py alone."""
    shown = repo.git("-c", "core.quotePath=off", "status", "--porcelain", "--no-renames", "--untracked-files=no", "--ignore-submodules=none")
    dirty = [one_line(line[3:], 80) for line in shown.splitlines() if line[3:] not in (names.TRAIN, names.PROGRAM)]
    if not dirty:
        return
    more = f" and {len(dirty) - NAMED} more" if len(dirty) > NAMED else ""
    have = "have" if len(dirty) > 1 else "has"
    raise Refused(
        f"{', '.join(dirty[:NAMED])}{more} {have} changes that are not committed: commit them without train.py, or git stash, then adopt"
    )


def check(repo, team):
    """Refuses where adopting would hide something; returns the record to adopt."""
    own = checks.night_of(repo)
    if journal.pending(repo.top):
        raise Refused("a record was interrupted: uv run -m lab record, then adopt")
    if locks.run_in_progress(repo.top):
        raise Refused("a run is still going on: wait until it ends, record it, then adopt")
    if not repo.train_is_committed():
        raise Refused("train.py has changes that are not committed: commit them as an experiment, or git checkout -- train.py")
    best = team.best
    if not best:
        raise Refused("nothing is better: no run of the team compares with this tree's")
    if names.sha256(repo.top / names.TRAIN) == best["code"]:
        raise Refused(f"nothing is better: train.py is the team's best already ({label(best)}, {team.who(best)})")
    try:
        place = checks.place(repo, own, team)
    except checks.NotBased:
        return best
    if place.edits:
        short = repo.short(place.commit)
        raise Refused(f"the experiment {short} is not recorded: run and record it, or git reset --keep {place.base}, then adopt")
    return best


def adopt(repo, team):
    """Adds the commit; returns the record that was adopted. Raises Refused."""
    best = check(repo, team)
    content = repo.git("cat-file", "blob", best["blob"], raw=True)
    if hashlib.sha256(content).hexdigest() != best["code"]:
        raise Refused(f"train.py of {best['short']} is not what its record says: nothing was changed")
    author = (repo.ask("show", "--no-patch", "--format=%an%x00%ae", best["commit"]) or "").split("\0")
    title = one_line(f"adopt {best['short']}: {best['description']}", TITLE)
    known = team.night.mean_of(best)
    value = "" if known["mean"] is None else f"val_bpb {known['mean']:.6f} (mean of {known['n']}), "
    message = f"{title}\n\n{value}found by {team.who(best)}\n"
    name_author(repo)
    blob = repo.git("rev-parse", f"HEAD:{names.TRAIN}").strip()
    if not repo.restore(blob, best["blob"], message, author if len(author) == 2 and all(author) else None):
        raise Refused("the branch has moved meanwhile: call it again")
    return best


def run(args):
    repo = Repo.find(Path.cwd())
    repo.tag()  # refuses elsewhere than on a night's branch
    member = checks.member_of(repo)
    if not member:
        raise Refused(f"this working tree is in no team: git config {names.TEAM} NAME")
    note = exchange.fetch(repo, member)
    with locks.one_at_a_time(repo.top / names.LAB):
        check_clean(repo)
        team = checks.team_of(repo, checks.night_of(repo))
        best = adopt(repo, team)
    print(f"adopted: {label(best)} {best['short']} ({best['description'][: checks.BRIEF]}), found by {team.who(best)}: no run is needed")
    if note:
        print(f"note: {note}")
    step = next_step(Repo(repo.top))
    queue = team_status.living(queue_refs.read(repo, member))
    print(f"next: {queue_refs.instead(queue, member, bool(checks.night_of(repo).records), step) or step.sentence}")
    return 0
