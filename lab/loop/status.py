"""Where a night stands, from what is on disk: the first thing to read for an agent that has lost its context.

Changes nothing, and imports neither train.py nor prepare.py nor torch. gather(path) is all that is known of one
working tree, as plain data; text() is the screen made of it.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from lab.analysis.history import Night
from lab.base import locks
from lab.base.errors import Refused
from lab.loop import checks
from lab.store import archive, journal, names, records_in_git, run_log
from lab.store.repository import Repo

HELP = "where the night stands, and what to do next"
NEAR = -0.5  # σ: a discard that gained at least this much is a near miss
LAST_ROWS, LAST_DEAD_ENDS, LAST_NEAR_MISSES = 8, 15, 6  # on one screen; --all shows all
WIDTH = 90  # characters of a description


def add_arguments(parser):
    parser.description = (
        "Prints the best so far, the noise, the last rows, what was tried in vain, what nearly worked, whether a run "
        "is going on, and what to do next. Changes nothing."
    )
    parser.add_argument("--all", action="store_true", help="every row, dead end and near miss")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    parser.add_argument(
        "--trees", nargs="+", metavar="GLOB", help="many working trees in one table: '/scratch/*/autoresearch/task*'"
    )


# ---------------------------------------------------------------------------------------------------
# What is known


def gather(path):
    """All that is known of the working tree at `path`, as plain data."""
    repo = Repo.find(path)
    known = {"path": str(repo.top), "tag": None, "in_progress": locks.run_in_progress(repo.top)}
    known["progress"] = run_log.progress(repo.top / names.RUN_LOG) if known["in_progress"] else ""
    try:
        known["tag"] = repo.tag()
    except Refused as refused:
        return {**known, "next": f"{refused}"}
    records = archive.records_of(repo.top, known["tag"])
    history, note = Night(records=records), records_in_git.restored(known["tag"], archive.in_file(repo.top, known["tag"]), records)
    noise, best, waiting = history.noise(), history.best_record, history.waiting
    return {
        **known,
        "best": best and row(best) | {"best_known": history.best_known(best, noise)},
        "baseline": history.kept[0]["mean"] if history.kept else None,
        "sigma": noise.sigma, "dof": noise.dof,
        "counts": Counter(r["verdict"] for r in history.rows),
        "runs": len(history.records), "runs_an_hour": history.runs_per_hour,
        "rows": [row(r) for r in history.rows],
        "dead_ends": [row(r) for r in history.rows if r["verdict"] != "keep" and not near(r)],
        "near_misses": [row(r) for r in history.rows if near(r) and not combined(r, history.rows)],
        "waiting": waiting and waiting["short"],
        "notes": [note] * bool(note),
        "next": what_next(repo, history),
    }  # fmt: skip


def row(r):
    return {key: r[key] for key in ("row", "short", "verdict", "mean", "n", "gain", "memory_gb", "description")}


def near(r):
    """Whether a discard came close to what was the best: a second look, or two of them together, may be a gain."""
    return r["verdict"] == "discard" and r["gain"] is not None and r["gain"] >= NEAR


def combined(r, rows):
    """Whether a later description names the row, as in "0012 and 0015 together"."""
    named = re.compile(rf"(?<!\d){r['row']:04d}(?!\d)")
    return any(named.search(other["description"]) for other in rows if other["row"] > r["row"])


def what_next(repo, history):
    """One sentence: what an agent that knows nothing else does now."""
    run, head = checks.run_command(repo.top), repo.short(repo.head())
    if journal.pending(repo.top):
        return "a record was interrupted: uv run -m lab record"
    if locks.run_in_progress(repo.top):
        return "a run is going on: wait until it ends, then record it"
    try:
        records_in_git.check_not_lost(repo, repo.tag(), history.records)
    except Refused as refused:
        return f"{refused}"
    if not repo.train_is_committed():
        if checks.is_uncommitted_run(repo.top, history):
            return f"the last run is of train.py as it stands, which is not committed: {checks.COMMIT_RUN}"
        return f"train.py has changes that are not committed: commit them as the next experiment (or git checkout -- train.py), then: {run}"  # fmt: skip
    code = hashlib.sha256((repo.top / names.TRAIN).read_bytes()).hexdigest()
    waiting, log = history.waiting, run_log.read(repo.top / names.RUN_LOG)
    if waiting and waiting["code"] == code:
        run = checks.repeat_command(repo.top, history, code)
    if log and is_news(repo, history, log, code):
        if log.ended in ("complete", "crash"):
            described = "" if waiting and waiting["code"] == code else ' "what this tried"'
            described = described if history.anchors else ' "baseline"'
            return f"the run of {head} is over and not recorded: uv run -m lab record{described}"
        return f"the last run was {log.ended}, it is no result: {run}"
    if waiting and waiting["code"] == code:
        return f"{waiting['short']} waits for a repeat: {run}"
    if not history.anchors:
        return f"the baseline has not run: {run}"
    recorded = next((r for r in reversed(history.records) if r["code"] == code), None)
    if recorded and (recorded["verdict"] == "keep" or code in [r["code"] for r in history.anchors]):
        return f"{head} is recorded: edit train.py, commit it as the next experiment, then: {run}"
    if recorded:
        return f"{head} was tried already (row {recorded['row'] or 0:04d}): git reset --keep {history.anchors[0]['short']}"
    return f"{head} has not run yet: {run}"


def is_news(repo, history, log, code):
    """Whether run.log is of HEAD's train.py and may be recorded: not yet, nor as good as that (check_seed)."""
    if log.ended == "nothing" or any(r["run_id"] == log.run_id or r["log"] == log.identity for r in history.records):
        return False
    if log.ended == "complete" and log.header["seed"] in [r["header"]["seed"] for r in history.runs(code)]:
        return False
    if log.ended == "crash" and any(r["code"] == code and r["verdict"] == "crash" for r in history.rows):
        return False
    if log.header:
        return log.header["train_sha256"] == code
    return log.ended == "crash" and (repo.top / names.RUN_LOG).stat().st_mtime >= int(repo.git("log", "-1", "--format=%ct"))


# ---------------------------------------------------------------------------------------------------
# The screen


def short(text):
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def line(r):
    value = "crash   " if r["verdict"] == "crash" else f"{r['mean']:.6f}"
    gain = "" if r["gain"] is None else f"{r['gain']:+.1f}σ"
    return f"  {r['row']:04d} {r['short']} {value} {gain:>7} {r['verdict']:<7} {short(r['description'])}"


def listed(title, rows, limit):
    if not rows:
        return []
    shown = rows if limit is None else rows[-limit:]
    more = f", the last {len(shown)} of {len(rows)} (--all shows all)" if len(shown) < len(rows) else ""
    return [f"{title}{more}:", *map(line, shown)]


def text(known, everything=False):
    if known["tag"] is None:
        return f"next: {known['next']}"
    counts, limit = known["counts"], (lambda n: None if everything else n)
    lines = [f"night: autoresearch/{known['tag']}, {known['runs']} runs recorded" + (
        f", {known['runs_an_hour']:.1f} an hour" if known["runs_an_hour"] else "")]  # fmt: skip
    if best := known["best"]:
        gain = f", {known['baseline'] - best['mean']:.6f} below the baseline" if known["baseline"] != best["mean"] else ""
        lines.append(f"best: {best['mean']:.6f} (mean of {best['n']}), row {best['row']:04d} {best['short']}{gain}")
        lines.append(f"      believed to be worth {best['best_known']:.6f}: what the next one must beat")
    sigma = "not known yet" if known["sigma"] is None else f"σ {known['sigma']:.6f}"
    lines.append(f"noise: {sigma}, {known['dof']} degrees of freedom")
    lines.append(f"rows: {counts['keep']} keep, {counts['discard']} discard, {counts['crash']} crash")
    lines += listed("last rows", known["rows"], limit(LAST_ROWS))
    lines += listed("dead ends, not to be tried again", known["dead_ends"], limit(LAST_DEAD_ENDS))
    near = "near misses (when you try two together, name their numbers in the description)"
    lines += listed(near, known["near_misses"], limit(LAST_NEAR_MISSES))
    if known["in_progress"]:
        lines.append(f"run in progress: {known['progress'] or 'setting up'}")
    return "\n".join([*lines, *(f"note: {note}" for note in known["notes"]), f"next: {known['next']}"])


def run(args):
    if args.trees:
        from lab.loop import many_trees

        data = json.dumps(many_trees.as_data(args.trees), ensure_ascii=False) if args.json else many_trees.text(args.trees)
        print(data)
        return 0
    known = gather(Path.cwd())
    print(json.dumps(known, ensure_ascii=False) if args.json else text(known, args.all))
    return 0
