"""The state of a night, from what is on disk: the first thing to read for an agent that has lost its context.

Changes nothing, and imports neither train.py nor prepare.py nor torch. gather(path) returns the state as plain data;
text() formats it for the screen.
"""

import json
import re
from collections import Counter
from pathlib import Path

from lab.analysis import curves, verdict
from lab.analysis.history import kind, label
from lab.base import locks
from lab.base.errors import Refused
from lab.loop import checks, report, team_status
from lab.loop.next_step import doubt, next_step
from lab.share import exchange, queue_refs
from lab.store import archive, names, records_in_git, run_log
from lab.store.repository import Repo

HELP = "where the night stands, and what to do next"
NEAR = -0.5  # σ: a discard that gained at least this much is a near miss
LAST_ROWS, LAST_DEAD_ENDS, LAST_NEAR_MISSES, LAST_STEPS_BACK = 8, 15, 6, 2  # on one screen; --all shows all
WIDTH = 90  # characters of a description
FRESH = 30  # seconds: so old may what was fetched from a team's remote be


def add_arguments(parser):
    parser.description = (
        "Prints the best so far, the number to beat, the noise, the last rows, what failed, what nearly worked, whether a run "
        "is going on, and what to do next. Changes nothing."
    )
    parser.add_argument("--all", action="store_true", help="every row, dead end and near miss")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    parser.add_argument(
        "--trees", nargs="+", metavar="GLOB", help="many working trees in one table: '/scratch/*/autoresearch/task*'"
    )


# ---------------------------------------------------------------------------------------------------
# The state of the night


def gather(path, fetch=False):
    """The state of the night in the working tree at `path`, as plain data. fetch: of a team, get what others published to
    its remote first."""
    repo = Repo.find(path)
    known = {"path": str(repo.top), "tag": None, "in_progress": locks.run_in_progress(repo.top)}
    known["progress"] = run_log.progress(repo.top / names.RUN_LOG) if known["in_progress"] else ""
    try:
        known["tag"] = repo.tag()
    except Refused as refused:
        team = (repo.ask("config", names.TEAM) or "").strip()
        return {**known, "next": f"{refused}" + f" (any TAG: team {team} sees every branch of this checkout)" * bool(team)}
    own = checks.night_of(repo)
    notes = [records_in_git.restored(known["tag"], archive.in_file(repo.top, known["tag"]), own.records)]
    member = checks.member_of(repo)
    notes += [exchange.fetch(repo, member, fresh=FRESH)] if member and fetch else []
    team = checks.team_of(repo, own)
    notes += [*team.notes, team_status.behind(repo, member)] if team else []
    history = team.night if team else own
    queue, step = team_status.living(queue_refs.read(repo, member)) if team else None, next_step(repo)
    best, waiting, search = history.best_record, checks.waiting(own, team), history.search
    is_tried = team_status.is_tried_together(history.rows) if team else lambda r: combined(r, history.rows)
    rows = own.rows or history.rows  # who feeds workers has no rows of its own, and wants to see theirs
    dead_ends, codes = [r for r in history.rows if r["verdict"] != "keep" and not near(r)], report.codes_of(history)
    dead_ends = team_status.once(dead_ends, history.records) if team else dead_ends
    return {
        **known,
        "team": team and team_status.gather(repo, team),
        "queue": queue and queue_refs.as_data(queue),
        "beside_the_best": beside_the_best(repo.top, history) if known["in_progress"] else None,
        "best": best and row(best) | history.mean_of(best) | {"best_known": history.estimates.get(best["row"])},
        "baseline": history.mean_of(history.kept[0])["mean"] if history.kept else None,
        "sigma": history.sigma, "dof": round(search.dof) if search else 0,
        "keep_below": verdict.bar(search).keep if history.tip else None,
        "lately": report.lately(history), "to_beat": report.to_beat(history), "plateau": report.plateau(history),
        "cost": report.cost(own), "doubt": doubt(history),
        "given_up": [row(r) | {"why": r["why"]} for r in history.given_up],
        "counts": Counter(r["verdict"] for r in rows),
        "runs": len(own.records), "runs_an_hour": own.runs_per_hour,
        "rows": [row(r) for r in rows],
        "dead_ends": [row(r) | {"slower": report.slower(r, codes, history)} for r in dead_ends],
        "near_misses": [row(r) for r in history.rows if near(r) and not is_tried(r) and not tried_again(r, history.rows)],
        "waiting": waiting and waiting["short"],
        "notes": [note for note in [*notes, *(queue.notes if queue else ())] if note],
        "next": queue and queue_refs.instead(queue, member, bool(own.records), step) or step.sentence,
    }  # fmt: skip


def beside_the_best(top, history):
    """A sentence: how far the run in progress is behind the best at the same progress; None if that is not known, if the
    two do not compare (another device, budget or data set), or if run.log is of a run that is over."""
    log, best = run_log.read(top / names.RUN_LOG), history.best_record
    if not log or not log.header or not best or kind(log.header) != kind(best["header"]):
        return None
    is_over = log.summary or log.wrong or history.record_of(log)
    return None if is_over else curves.in_progress(log.curve, curves.of(history.best))


def row(r):
    found = {key: r[key] for key in ("row", "short", "verdict", "mean", "n", "gain", "memory_gb", "description")}
    return found | ({"label": r["label"], "row": r["home_row"]} if "label" in r else {})


def near(r):
    """Whether a discard came close to the tip of its time: two of them together may be a gain. A late gain of a team is
    one, too."""
    if r.get("late"):
        return True
    return r["verdict"] == "discard" and not r.get("given_up") and r["gain"] is not None and r["gain"] >= NEAR


def tried_again(r, rows):
    """Whether a late gain had another try on a newer best: that one's row says what came of it."""
    return bool(r.get("late")) and any(
        other["description"] == r["description"] and other["row"] > r["row"] and other["code"] != r["code"] for other in rows
    )


def combined(r, rows):
    """Whether a later description names the row, as in "0012 and 0015 together"."""
    named = re.compile(rf"(?<![\d.]){r['row']:04d}(?!\d)")
    return any(named.search(other["description"]) for other in rows if other["row"] > r["row"])


# ---------------------------------------------------------------------------------------------------
# The screen


def short(text):
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def line(r):
    value = "crash   " if r["verdict"] == "crash" else f"{r['mean']:.6f}"
    gain = "" if r["gain"] is None else f"{r['gain']:+.1f}σ"
    where = r["label"].removeprefix("row ") if "label" in r else f"{r['row']:04d}"
    slow = f" ({r['slower']:.0%} slower than its base: was the machine busy?)" if r.get("slower") else ""
    return f"  {where} {r['short']} {value} {gain:>7} {r['verdict']:<7} {short(r['description'])}{slow}"


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
    lines += team_status.lines(known["team"], everything) if known["team"] else []
    lines += queue_refs.lines(known["queue"]) if known["queue"] else []
    if best := known["best"]:
        gain = f", {known['baseline'] - best['mean']:.6f} below the baseline" if known["baseline"] != best["mean"] else ""
        finder = f", found by {known['team']['best_of']}" if known["team"] else ""
        lines.append(f"best: {best['mean']:.6f} (mean of {best['n']}), {label(best)} {best['short']}{gain}{finder}")
    sigma = "not known yet" if known["sigma"] is None else f"σ {known['sigma']:.6f}, {known['dof']} degrees of freedom"
    lines.append(f"noise: {sigma}" + (f"; {known['lately']}" if known["lately"] else ""))
    lines += filter(None, [known["to_beat"], known["plateau"], known["doubt"] and f"doubt: {known['doubt']}", known["cost"]])
    lines.append(f"rows: {counts['keep']} keep, {counts['discard']} discard, {counts['crash']} crash")
    back = known["given_up"] if everything else known["given_up"][-LAST_STEPS_BACK:]
    lines += [f"stepped back: {label(r)} {r['short']} ({short(r['description'])}): {r['why']}" for r in back]
    lines += listed("last rows", known["rows"], limit(LAST_ROWS))
    lines += listed("dead ends, not to be tried again", known["dead_ends"], limit(LAST_DEAD_ENDS))
    near = "near misses (when you try two together, name their numbers in the description)"
    lines += listed(near, known["near_misses"], limit(LAST_NEAR_MISSES))
    if known["in_progress"]:
        lines.append(f"run in progress: {known['progress'] or 'setting up'}")
        lines += [f"  {known['beside_the_best']}"] if known["beside_the_best"] else []
    return "\n".join([*lines, *(f"note: {note}" for note in known["notes"]), f"next: {known['next']}"])


def run(args):
    if args.trees:
        from lab.loop import many_trees

        data = json.dumps(many_trees.as_data(args.trees), ensure_ascii=False) if args.json else many_trees.text(args.trees)
        print(data)
        return 0
    known = gather(Path.cwd(), fetch=True)
    print(json.dumps(known, ensure_ascii=False) if args.json else text(known, args.all))
    return 0
