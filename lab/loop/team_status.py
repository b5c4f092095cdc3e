"""What `lab status` says of a team: who is in it, what each tree runs, what was tried by anybody."""

import os
import re
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from lab.analysis.history import label
from lab.base import locks
from lab.base.text import aligned, one_line
from lab.share import exchange
from lab.share.team import ABANDONED
from lab.store import names, run_log
from lab.store.names import PREFIX

SHOWN_TREES, SHOWN_IDEAS = 8, 4
BRIEF = 60  # characters of what a tree runs
TOKEN = re.compile(r"(?<![\w/.])(?:[\w.-]+/)?\d{4}(?!\d)|(?<!\w)[0-9a-f]{7,40}(?!\w)")


def gather(repo, team):
    """The team as plain data."""
    here = working_trees(repo)
    trees = [tree_of(team, tree, here) for tree in team.trees]
    known = {tree["branch"] for tree in trees if tree["here"]}
    trees += [
        {"name": tag, "branch": PREFIX + tag, "host": "", "here": True, "own": False, "rows": 0, "kept": 0, "last": None,
         "runs": what_it_runs(at), "compares": True}
        for tag, at in here.items() if PREFIX + tag not in known
    ]  # fmt: skip
    best = team.night.best_record
    return {
        "name": team.member.team, "member": team.member.name, "remote": team.member.remote and exchange.clean(team.member.remote),
        "trees": trees, "runs": sum(len(tree.records) for tree in team.trees), "runs_an_hour": runs_an_hour(team.night.records),
        "best_of": team.who(best) if best else None,
        "ideas": [{"label": label(r), "device": device_of(r), **{k: r[k] for k in ("verdict", "gain", "description")}}
                  for r in kept_ideas(team)],
    }  # fmt: skip


def kept_ideas(team):
    """Records of what members kept on other hardware, data or rules."""
    return [r for r in team.ideas if r["verdict"] == "keep" and r["home_row"] and not r["baseline"]]


def tree_of(team, tree, here):
    ends = [datetime.fromisoformat(r["end"]).timestamp() for r in tree.records if r["end"]]
    last = next((r for r in reversed(tree.records)), None)
    own_name = {"member": tree.member, "tag": tree.tag}
    runs = what_it_runs(here[tree.tag]) if tree.is_here and tree.tag in here else "" if tree.is_here else what_it_said(tree)
    return {
        "name": team.name_of(own_name), "branch": PREFIX + tree.tag, "host": tree.state.get("host", ""), "here": tree.is_here,
        "own": tree.is_own, "rows": sum(bool(r["row"]) for r in tree.records),
        "kept": sum(bool(r["row"]) and r["verdict"] == "keep" for r in tree.records),
        "last": {"when": max(ends, default=None), "description": last["description"] if last else ""}, "runs": runs,
        "compares": tree.is_own or tree.kind is None or team.header is not None and tree.kind == team.trees[0]._replace(
            records=[{"header": team.header}]).kind,
    }  # fmt: skip


def working_trees(repo):
    """{tag: (path, subject of HEAD)} of the working trees of this checkout that are on a night's branch."""
    listed, found = repo.ask("worktree", "list", "--porcelain") or "", {}
    for block in listed.split("\n\n"):
        about = dict(line.partition(" ")[::2] for line in block.splitlines())
        branch = about.get("branch", "").removeprefix("refs/heads/")
        if branch.startswith(PREFIX) and "HEAD" in about:
            found[branch.removeprefix(PREFIX)] = Path(about["worktree"]), about["HEAD"]
    heads = sorted({head for _, head in found.values()})
    shown = (repo.ask("log", "--no-walk", "--format=%H %s", *heads) or "") if heads else ""
    subjects = dict(line.partition(" ")[::2] for line in shown.splitlines())
    return {tag: (path, subjects.get(head, "")) for tag, (path, head) in found.items()}


def what_it_runs(at):
    """What runs in a working tree right now; "" if nothing does."""
    path, subject = at
    if not locks.run_in_progress(path):
        return ""
    step = run_log.progress(path / names.RUN_LOG).partition("|")[0].strip() or "setting up"
    return f"runs {one_line(subject, BRIEF)!r}: {step}"


def what_it_said(tree):
    """What a tree said that it does; "" if that is so long ago that it is over, or that the tree may be gone."""
    if not tree.state:
        return ""
    age = datetime.now(timezone.utc) - datetime.fromisoformat(tree.state["when"])
    return tree.state["next"] if abs(age.total_seconds()) < ABANDONED else ""


def living(queue):
    """The Queue for the screen: without the workers that can be seen to be gone and their claims; what they had claimed waits.
    Nothing is changed: whoever works with the queue removes what they left (lab.queue.board)."""
    items = [
        item._replace(state=item.state | {"kind": "open"}) if item.kind == "claimed" and is_gone(item.state) else item for item in queue.items
    ]
    slots, workers = (tuple(item for item in found if not is_gone(item.state)) for found in (queue.slots, queue.workers))
    return queue._replace(items=tuple(items), slots=slots, workers=workers)


def is_gone(state):
    """Whether the worker of this sign or claim can be seen to be gone: it ran on the machine of this name, also before that was
    rebooted, and nobody holds the lock that has the worker's name in it. lab.queue.board, which takes claims away, also wants
    the same boot: another machine may have the same name."""
    if not hasattr(os, "uname") or state["host"] != os.uname().nodename or not Path(state["tree"]).is_absolute():
        return False
    lock = Path(state["tree"], names.LAB, names.WORKER_LOCK)
    try:
        named = lock.is_file() and lock.read_text(encoding="utf-8", errors="replace").strip() == state["worker"]
    except (OSError, ValueError):  # the name of the tree is what somebody published
        return False
    return named and locks.is_free(lock)


def runs_an_hour(records):
    """Runs of all trees per hour, from the first start to the last end; None before there are two."""
    times = [datetime.fromisoformat(r[key]) for r in records for key in ("start", "end") if r[key]]
    hours = (max(times) - min(times)).total_seconds() / 3600 if times else 0
    return len(records) / hours if len(records) > 1 and hours > 0 else None


def device_of(r):
    return str((r["header"] or {}).get("device", "?"))


def behind(repo, member):
    """A sentence if the remote lacks records of this tree; None otherwise."""
    n = exchange.unpublished(repo, member)
    return f"{n} record{'s' * (n > 1)} of this tree {'are' if n > 1 else 'is'} not on the team's remote yet" if n else None


# ---------------------------------------------------------------------------------------------------
# One list of what everybody tried


def once(rows, records):
    """The rows without those that say the same of the same base: the first one stays."""
    code_of, seen, found = {r["commit"]: r["code"] for r in records}, set(), []
    for r in rows:
        key = " ".join(r["description"].lower().split()), code_of.get(str(r["parent"]))
        if key not in seen:
            seen.add(key)
            found.append(r)
    return found


def is_tried_together(rows):
    """A function that says of a row whether a later description names it: by its short hash, as TREE/NNNN, or, in the same
    tree, as NNNN."""
    last = {}
    for r in rows:
        for token in TOKEN.findall(r["description"]):
            if "/" not in token and len(token) == 4:
                token = f"{r['member']}/{r['tag']}/{token}"
            last[token] = r["row"]

    def tried(r):
        number = f"{r['home_row']:04d}" if r["home_row"] else "none"
        names_of_it = (f"{r['member']}/{r['tag']}/{number}", f"{r['tag']}/{number}", r["short"], r["commit"])
        return any(last.get(name, 0) > r["row"] for name in names_of_it)

    return tried


# ---------------------------------------------------------------------------------------------------
# The screen


def lines(team, everything=False):
    hourly = f", {team['runs_an_hour']:.1f} an hour together" if team["runs_an_hour"] else ""
    where = f", shared through {team['remote']}" if team["remote"] else ""
    said = [f"team: {team['name']}, {len(team['trees'])} trees, {team['runs']} runs recorded{hourly}{where}"]
    others = [tree for tree in team["trees"] if not tree["own"]]
    others.sort(key=lambda tree: (not tree["runs"], -(tree["last"] or {}).get("when", 0) if tree["last"] and tree["last"]["when"] else 0))
    shown = others if everything else others[:SHOWN_TREES]
    said += aligned([["  " + tree["name"], counts(tree), now(tree)] for tree in shown], left=(0, 1))
    if len(shown) < len(others):
        said.append(f"  and {len(others) - len(shown)} more trees (--all shows all)")
    if ideas := team["ideas"]:
        listed = ideas if everything else ideas[-SHOWN_IDEAS:]
        devices = Counter(idea["device"] for idea in ideas).most_common(2)
        said.append(f"ideas from other hardware, data or rules ({', '.join(one_line(d, BRIEF) for d, _ in devices)}), values do not compare:")
        said += [f"  {idea['label']} {idea['verdict']}: {one_line(idea['description'], 90)}" for idea in listed]
    return said


def counts(tree):
    return f"{tree['rows']} rows, {tree['kept']} kept"


def now(tree):
    last = tree["last"] or {}
    ago = ""
    if last.get("when"):
        minutes = max(0, (datetime.now(timezone.utc).timestamp() - last["when"]) / 60)
        ago = f"last record {minutes:.0f} min ago ({one_line(last['description'], BRIEF)})"
    other = "" if tree["compares"] else "other hardware, data or rules"
    host = "" if tree["here"] else f"on {tree['host']}" if tree["host"] else "elsewhere"
    return "; ".join(filter(None, [host, other, tree["runs"], ago]))
