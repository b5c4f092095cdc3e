"""Many working trees in one table: the slots of a fleet, the tasks of a Slurm array, those of several users.

read(path) reads one tree from its files only, without git; table() formats many as text. A tree may be a night's
working tree, or a folder with its runs.jsonl or results.tsv.
"""

import glob
import math
import os
import time
from datetime import datetime, timezone
from pathlib import Path

from lab.analysis.history import LOWEST, Night, kind, read_night
from lab.base import locks
from lab.base.errors import Refused, os_reason
from lab.base.text import aligned
from lab.store import names, run_log, runs_jsonl

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
        "best": best and {key: best[key] for key in ("mean", "n", "row", "short", "description")},
        "baseline": history.kept[0]["mean"] if history.kept else None, "sigma": history.sigma,
        "last": max(ends).timestamp() if ends else None, "kind": kind(header), "by_estimate": history.by_estimate,
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
        "baseline": night.baseline and night.baseline.val_bpb, "notes": list(night.notes),
        "last": (path / names.RESULTS_TSV).stat().st_mtime,
    }  # fmt: skip


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
    """[(kind, its trees, the best first)]: those with the most rows first."""
    found = {}
    for tree in trees:
        found.setdefault(tuple(tree["kind"]) if tree["kind"] else None, []).append(tree)
    ordered = sorted(found.items(), key=lambda item: -sum(tree["rows"] for tree in item[1]))
    return [(k, sorted(members, key=lambda t: t["best"]["mean"] if t["best"] else math.inf)) for k, members in ordered]


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
        lines += [f"{describe(k)}:", head, *own]
        if best := members[0]["best"]:
            where = f"{members[0]['tree']}, row {best['row']:04d} {best['short']}"
            lowest = "" if members[0]["by_estimate"] else f"; {LOWEST}"
            lines.append(f"best: {best['mean']:.6f} ({where}: {best['description'][:BRIEF]}{lowest})")
        lines.append("")
    if len(started) > 1:
        lines.append("these are different hardware, data or rules (the time budget is one): values of one part are not to be compared with another's")  # fmt: skip
    if any(len(members) > 1 for _, members in started):
        lines.append(
            "the lowest of several nights has a selection bias (winner's curse): `lab prove` compares commits under fresh seeds"
        )
    lines += [f"note: {tree['tree']}: {note}" for tree in trees for note in tree["notes"][:SHOWN_NOTES]]
    return "\n".join(lines).rstrip()


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
