"""Many working trees in one table: the slots of a fleet, the tasks of a Slurm array, those of several users.

read(path) reads one tree from its files only, without git; as_teams() then reads those that are members of a team as one
night, from the refs that are here; table() formats many as text. A tree may be a night's working tree, or a folder with its
runs.jsonl or results.tsv.
"""

import glob
import math
import os
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from lab.analysis.history import LOWEST, Night, kept_record, kind, read_night
from lab.base import locks
from lab.base.errors import Refused, os_reason
from lab.base.git import GitError
from lab.base.text import aligned, printable
from lab.share import exchange
from lab.share.membership import team_name
from lab.share.team import team_seen
from lab.store import names, run_log, runs_jsonl
from lab.store.repository import Untrusted

RECENT = 60  # seconds since run.log grew: a run is in progress, perhaps on another machine (it prints every ten)
UNITS = ((86400, "d"), (3600, "h"), (60, "min"))  # seconds
SHOWN_NOTES, BRIEF, HASH = 3, 80, 8  # notes of a tree; characters of a description, of a hash
COLUMNS = ["tree", "user", "branch", "rows", "keep", "best", "below", "σ", "last", "state"]


def read(path):
    """One tree as plain data. A tree that cannot be read raises OSError."""
    path = Path(path)
    present = set(os.listdir(path))
    tree = {
        "tree": str(path), "user": owner(path), "branch": "", "counts": {}, "rows": 0, "best": None, "baseline": None,
        "sigma": None, "last": None, "state": state(path, present), "kind": None, "notes": [], "by_estimate": False,
        "team": None, "may_be_in_a_team": True,
    }  # fmt: skip
    tree["is_night"] = bool(present & {names.RUNS_JSONL, names.RESULTS_TSV}) or {names.TRAIN, names.PROGRAM} <= present
    records, tree["notes"] = runs_jsonl.read_sound(path / names.RUNS_JSONL) if names.RUNS_JSONL in present else ([], [])
    if records:
        return tree | of_records(records)
    table = of_table(path) if names.RESULTS_TSV in present else {}
    return tree | table | {"notes": [*tree["notes"], *table.get("notes", [])]}


def of_records(records):
    history = Night(records=records)
    best, header = history.best_record, history.first["header"] if history.first else {}
    ends = [datetime.fromisoformat(r["end"]) for r in records if r["end"]]
    return {
        "branch": records[-1]["tag"], "counts": count(r["verdict"] for r in history.rows), "rows": len(history.rows),
        "best": best and short_of(best, history),
        "baseline": history.mean_of(history.kept[0])["mean"] if history.kept else None, "sigma": history.sigma,
        "last": max(ends).timestamp() if ends else None, "kind": kind(header), "by_estimate": history.by_estimate,
        "may_be_in_a_team": any(r.get("seq") for r in records),
    }  # fmt: skip


def of_table(path):
    """A tree that has only a results.tsv, such as another harness's, as plain data."""
    try:
        night = read_night(path)
    except Refused as refused:
        return {"notes": [str(refused)]}
    best = night.best and {
        "mean": night.best.val_bpb, "n": 1, "row": night.best.number, "short": night.best.commit,
        "description": night.best.description,
    }  # fmt: skip
    return {
        "counts": count(e.status for e in night.experiments), "rows": len(night.experiments), "best": best,
        "may_be_in_a_team": not night.experiments,
        "baseline": night.baseline and night.baseline.val_bpb, "notes": list(night.notes),
        "last": (path / names.RESULTS_TSV).stat().st_mtime,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Teams


def as_teams(trees):
    """Changes what the trees of a team (of read()) say of themselves to what they are for the team: their rows are the
    experiments that they were the first to try, their keeps those of the team's line, noise and baseline the team's.
    tree["team"] is {"name", "place", "best", "found_by", "rows", "notes"} of all of the team that compares with
    it. A team's trees are those that share a remote or a checkout. What git does not read here stays a night of its own."""
    checkouts = {}
    for tree in trees:
        if tree.pop("may_be_in_a_team") and (found := team_at(Path(tree["tree"]))):
            key, common, repo = found
            checkouts.setdefault(key, {}).setdefault(common, (repo, []))[1].append(tree)
    for (name, place), parts in checkouts.items():
        try:
            team = team_seen([repo for repo, _ in parts.values()], name)
        except (GitError, ValueError, OSError):
            continue
        headers = {str(kind(r["header"])): r["header"] for tree in team.trees for r in tree.records if r["header"]}
        views = {key: team.comparing(header) for key, header in headers.items()}
        for _, members in parts.values():
            for tree in members:
                view = views.get(str(tree["kind"]), team)
                tree["kind"] = tree["kind"] or kind(view.header)  # it has recorded nothing yet
                tree |= of_member(view, tree["tree"]) | {"team": of_team(view, name, place)}


def team_at(path):
    """((name of the team, where its members meet), git's common folder, the Untrusted repository) of the tree at `path`;
    None if it is in no team, or git does not read it."""
    if not (path / ".git").exists():
        return None
    repo = Untrusted(path)
    try:
        name = team_name(repo)
    except Refused:
        return None
    common = repo.ask("rev-parse", "--git-common-dir") if name else None
    if common is None:
        return None
    common = str((path / common).resolve())
    remote = (repo.ask("config", names.REMOTE) or "").strip()
    address = (repo.ask("config", f"remote.{remote}.url") or remote) if remote else ""
    if address and (path / address).exists():
        address = str((path / address).resolve())
    return (name, address or common), common, repo


def of_member(team, path):
    """What the tree at `path` did for the team, by the runs in its runs.jsonl."""
    own = {r["run_id"] for r in runs_jsonl.read_sound(Path(path) / names.RUNS_JSONL)[0]}
    rows = [r for r in team.night.rows if r["run_id"] in own]
    numbers, night = {r["row"] for r in rows}, team.night
    standing = [e for e in night.standing if e.number in numbers]
    best = kept_record(min(standing, key=lambda e: night.worth[e.number])) if standing else None
    return {
        "counts": count(r["verdict"] for r in rows), "rows": len(rows), "best": best and short_of(best, night) | {"row": best["home_row"]},
        "baseline": night.mean_of(night.kept[0])["mean"] if night.kept else None, "sigma": night.sigma, "by_estimate": night.by_estimate,
    }  # fmt: skip


def of_team(team, name, place):
    best = team.night.best_record
    return {
        "name": name, "place": printable(exchange.clean(place)), "rows": len(team.night.rows),
        "by_estimate": team.night.by_estimate,
        "best": best and short_of(best, team.night) | {"label": printable(best["label"])},
        "found_by": best and printable(best["found_by"]), "notes": [printable(note) for note in team.notes],
    }  # fmt: skip


def short_of(r, night):
    return {key: r[key] for key in ("row", "short", "description")} | night.mean_of(r)


def count(verdicts):
    counts = {}
    for verdict in verdicts:
        counts[verdict] = counts.get(verdict, 0) + 1
    return counts


def owner(path):
    try:
        return path.owner()
    except (KeyError, OSError, NotImplementedError):  # no such user here; Windows
        return "?"


def state(path, present):
    """Whether a run or a night is in progress, as far as this machine can tell."""
    log = path / names.RUN_LOG
    if locks.run_in_progress(path):
        return "run: " + (run_log.progress(log).partition("|")[0].strip() or "setting up")
    if names.RUN_LOG in present and 0 <= (age := time.time() - log.stat().st_mtime) < RECENT:
        return f"run.log {age:.0f} s old"
    return "night" if names.LAB in present and locks.is_held(path / names.LAB / names.NIGHT_LOCK) else ""


# ---------------------------------------------------------------------------------------------------
# Many


def gather(patterns):
    """(trees, [(path, why it cannot be read)], folders that hold no night) of what the patterns match."""
    found, unread, others = [], dict(closed(patterns)), 0
    for path in sorted({os.path.abspath(p) for pattern in patterns for p in glob.glob(os.path.expanduser(pattern))}):
        if not os.path.isdir(path):
            continue
        try:
            tree = read(path)
        except OSError as error:
            unread[path] = os_reason(error)
            continue
        found += [tree] * tree["is_night"]
        others += not tree["is_night"]
    as_teams(found)
    return found, sorted(unread.items()), others


def closed(patterns):
    """Folders in the patterns' paths that may not be listed: glob silently leaves out what is in them."""
    for pattern in patterns:
        place = Path(os.path.abspath(os.path.expanduser(pattern)))
        for parent in list(place.parents)[:-1]:
            for path in glob.glob(str(parent)):
                if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
                    yield path, "permission denied, so whatever is in it is left out"


def ago(then):
    seconds = max(0, time.time() - then)
    for size, unit in UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def cells(tree):
    best, counts = tree["best"], tree["counts"]
    below = tree["baseline"] - best["mean"] if best and tree["baseline"] else None
    return [
        tree["tree"], tree["user"], tree["branch"], str(tree["rows"]), str(counts.get("keep", 0)),
        f"{best['mean']:.6f}" if best else "-", "-" if below is None else f"{below:.6f}",
        f"{tree['sigma']:.6f}" if tree["sigma"] else "-", f"{ago(tree['last'])} ago" if tree["last"] else "never",
        tree["state"],
    ]  # fmt: skip


def describe(kind):
    if kind is None:
        return "hardware and rules unknown"
    device, dataset, rules, data = (value or "?" for value in kind)
    return f"{device}, {dataset}, rules {rules[:HASH]}, data {data[:HASH]}"


def groups(trees):
    """[(kind, its trees, the best first)]: those with the most rows first. A team's trees are a group of their own."""
    found = {}
    for tree in trees:
        team = tree["team"] and (tree["team"]["name"], tree["team"]["place"])
        found.setdefault((tuple(tree["kind"]) if tree["kind"] else None, team), []).append(tree)
    ordered = sorted(found.items(), key=lambda item: -sum(tree["rows"] for tree in item[1]))
    return [(k, sorted(members, key=lambda t: t["best"]["mean"] if t["best"] else math.inf)) for (k, _), members in ordered]


def table(trees):
    """One table, a part for each kind of hardware, data and rules, and the best of each part."""
    parts = groups(trees)
    started = [(k, members) for k, members in parts if any(tree["rows"] for tree in members)]
    columns = [i for i in range(len(COLUMNS)) if COLUMNS[i] != "user" or len({tree["user"] for tree in trees}) > 1]
    every = [COLUMNS, *(cells(tree) for _, members in parts for tree in members)]
    left = [i for i, column in enumerate(columns) if COLUMNS[column] in ("tree", "user", "branch", "state")]
    head, *body = aligned([[row[i] for i in columns] for row in every], left)
    lines = []
    for k, members in parts:
        own, body = body[: len(members)], body[len(members) :]
        team = members[0]["team"]
        lines += [(f"team {team['name']}, " if team else "") + f"{describe(k)}:", head, *own]
        if team:
            lines += lines_of(team, members)
        elif best := members[0]["best"]:
            where = f"{members[0]['tree']}, row {best['row']:04d} {best['short']}"
            lowest = "" if members[0]["by_estimate"] else f"; {LOWEST}"
            lines.append(f"best: {best['mean']:.6f} ({where}: {best['description'][:BRIEF]}{lowest})")
        lines.append("")
    if len({k for k, _ in started}) > 1:
        lines.append("these are different hardware, data or rules (the time budget is one): values of one part are not to be compared with another's")  # fmt: skip
    nights = Counter(k for k, members in started for _ in (members[:1] if members[0]["team"] else members))
    if any(n > 1 for n in nights.values()):
        lines.append(
            "the lowest of several nights has a selection bias (winner's curse): `lab prove` compares commits under fresh seeds"
        )
    lines += [f"note: {tree['tree']}: {note}" for tree in trees for note in tree["notes"][:SHOWN_NOTES]]
    lines += dict.fromkeys(f"note: team {t['team']['name']}: {note}" for t in trees if t["team"] for note in t["team"]["notes"][:SHOWN_NOTES])
    return "\n".join(lines).rstrip()


def lines_of(team, members):
    """What follows the rows of a team: how much of it is not among them, and its best."""
    rows = team["rows"] - sum(tree["rows"] for tree in members)
    lines = [f"and {rows} rows of other trees of the team"] if rows > 0 else []
    if best := team["best"]:
        lowest = "" if team["by_estimate"] else f"; {LOWEST}"
        lines.append(f"best of the team: {best['mean']:.6f} ({best['label']} {best['short']}, found by {team['found_by']}: {best['description'][:BRIEF]}{lowest})")
    return lines


def text(patterns):
    found, unread, others = gather(patterns)
    if not found and not unread:
        raise Refused(f"no night in what {' '.join(patterns)} matches: give the folders of working trees, as '/scratch/*/night*'")  # fmt: skip
    lines = [table(found)] if found else []
    lines += [f"not read: {path}: {why}" for path, why in unread]
    if others:
        lines.append(f"{others} folders hold no night")
    return "\n".join(lines)


def as_data(patterns):
    found, unread, _ = gather(patterns)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"when": when, "trees": found, "not_read": [{"path": path, "why": why} for path, why in unread]}
