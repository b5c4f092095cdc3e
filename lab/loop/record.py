"""Records the run in run.log: checks it against git, judges it, and leaves the branch ready for the next run.

Reads run.log, checkpoint.pt and git; writes runs.jsonl, results.tsv, runs/, the branch, and in
refs/autoresearch/TAG/ the recorded commits (NNNN) and the records of all runs (log). In a team it judges by everybody's
runs, and publishes its own (lab.share).
It never imports train.py, prepare.py or torch.
"""

import argparse
import sys
from datetime import datetime, timezone
from pathlib import Path

from lab.analysis import verdict
from lab.analysis.history import SLOWED, Night, label, measured, steps_per_second
from lab.base import locks
from lab.base.errors import Refused, Stop, Unfinished, os_reason
from lab.loop import checks, report
from lab.loop.next_step import next_step
from lab.share import exchange
from lab.store import archive, ends, journal, names, records_in_git, results_tsv, run_log, runs_jsonl
from lab.store.names import PREFIX
from lab.store.repository import Repo

HELP = "judge and write down the run in run.log; a commit that is no gain is undone"
DESCRIPTION = """\
Records the run in run.log for the commit that HEAD is, on a branch autoresearch/TAG, and says the verdict:

  keep      the branch advances; the run is archived in runs/NNNN-COMMIT, and runs/best is the best of them
  discard   exactly the experiment's commit is undone; the human's commits and uncommitted edits stay
  crash     there is no summary: the same, and the end of the trace is shown
  confirm   too close to call: nothing moves; do what the line `next:` says

`keep below` is the number that the next experiment must beat. After many failures `next:` asks for another run of what is
kept. If its gain does not hold, the verdict on it is discard, and a new commit makes train.py that of the keep before it.

The first code recorded on a branch is its baseline, and runs three times under three seeds. Every command that a
repeat needs is printed. What was recorded stays: `git show refs/autoresearch/TAG/NNNN`.

Exit status: 0 recorded; 1 refused, nothing was changed; 2 wrong usage; 3 stopped half-way, the same command
completes it; 75 this machine ended the run (killed, preempted, a full disk, a lost GPU, a stall), which is run again rather
than recorded. The third run of one train.py in a row that ends like this, preemption aside, is a crash."""

# val_bpb that a lost fraction of the steps costs, as a fraction of val_bpb: in published logs of an H100 1 % of the speed
# is worth 0.0005 to 0.001 at a val_bpb of 1.0. On a CPU it may be worth more; then fewer runs are repeated than could be.
WORTH = 0.1
DOING = {"repeat": "runs its commit again", "doubt": "runs the best again", "adopt": "takes over the best",
         "edit": "makes the next experiment", "queue": "runs what is proposed"}  # kind of the next step: what the team is told


def add_arguments(parser):
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.set_defaults(worker=None)  # lab.queue.work names its task: the queue says whose a proposal is
    parser.add_argument("description", nargs="?", help="what this tried, in a few words; a repeat needs none")
    stricter = parser.add_mutually_exclusive_group()
    stricter.add_argument("--discard", action="store_true", help="not worth its complexity, or given up")
    stricter.add_argument(
        "--simpler", action="store_true",
        help=f"removes more lines than it adds: kept if the mean of two runs is at most {verdict.SIMPLER}σ above the lowest",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# The plan: what will be written, decided before anything is


def new_record(case, args, team):
    """The record of the run, without its verdict."""
    log, waiting = case.log, case.history.waiting
    tip = team and team.night.tip
    shared = {"seq": team.next_seq, "beat": tip and tip["code"]} if team else {}
    # A proposal was simpler than what it was made from; beside what was kept since, it may not be.
    simpler = args.simpler and not (case.edits and checks.not_simpler(case.repo, case.anchor["commit"], case.commit))
    simpler = simpler or bool(waiting and waiting["code"] == case.code and waiting["simpler"])
    return {
        "run_id": log.run_id, "log": log.identity, "tag": case.tag, "commit": case.commit,
        "short": case.repo.short(case.commit), "parent": case.anchor["commit"] if case.edits else None,
        "row": None, "verdict": None, "description": case.description, "mean": None, "n": 0, "gain": None,
        "best_known": None, "sigma": None, "dof": 0, "memory_gb": 0.0, "why": "", "discard": args.discard,
        "simpler": simpler, "baseline": case.baseline, "code": case.code, "blob": case.blob, "ended": log.ended,
        "start": log.header["start"] if log.header else None, "end": log.end,
        "recorded": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "header": log.header, "summary": None if args.discard and log.ended != "complete" else log.summary,
        "curve": log.curve, **shared,
    }  # fmt: skip


def judge(case, history, record):
    """Puts the verdict into the record; history: the Night that judges, with everything recorded before it."""
    if record["summary"] and run_log.not_finite(record["summary"]):
        record["summary"] = None  # given up by --discard, or it would have been refused
    if record["summary"] is None:
        log, before = case.log, ends.before(case.repo.top, case.code, case.log.run_id)
        how = "" if log.ended == "crash" else f" ({log.fault or log.ended})"
        if log.ended in ends.COUNTED and before >= ends.REPEATS:
            how = f", nor in those of the {before} runs before it{how}"
        record.update(verdict="crash", why=f"no summary in run.log{how}")
        return
    runs = [*history.runs(case.code), record]
    record.update(tokens=case.log.tokens, slowed=round(slowed(case.log, runs), 4))
    counted = measured(runs) if case.edits else runs
    values = [r["summary"]["val_bpb"] for r in counted]
    if not case.edits and not case.baseline and (known := history.kept_values(case.code)):
        values = [*known, record["summary"]["val_bpb"]]
    record.update(mean=verdict.mean(values), n=len(values))
    record["memory_gb"] = max(r["summary"]["peak_vram_mb"] for r in runs) / 1024
    if case.baseline:
        judged = verdict.judge_baseline(values)
    elif not case.edits:
        judged = judge_again(history, record)
    else:
        search = history.search
        judged = verdict.judge(search, values, record["simpler"])
        record["best_known"] = verdict.belief(search)
        if record["discard"]:
            judged = verdict.Verdict("discard", judged.gain, "as you say")
        elif judged.status == "discard" and len(runs) == 1:
            judged = doubt_the_machine(search, judged, record)
        elif judged.status == "confirm" and len(runs) >= verdict.MOST_RUNS:
            why = f"{len(runs)} runs did not decide it, as the machine slowed {len(runs) - len(counted)} of them"
            judged = verdict.Verdict("discard", judged.gain, why)
        if case.team and judged.status == "discard" and not record["discard"]:
            judged = late_gain(case, history, record, values) or judged
    record.update(verdict=judged.status, gain=judged.gain, why=judged.why)


def late_gain(case, history, record, values):
    """The verdict on an experiment that beats what it is based on, and not what the team found since; None if it does not.
    It is tried again on the team's best."""
    place = next((i for i, keep in enumerate(history.replayed[1]) if keep["code"] == case.anchor["code"]), None)
    if place is None or keep_is_tip(history, case.anchor):
        return None
    base = history.search._replace(line=history.search.line[: place + 1])
    judged = verdict.judge(base, values, record["simpler"])
    if judged.status != "keep":
        return None
    record["late"] = True
    tip, gain = history.tip, (verdict.belief(history.search) - record["mean"]) / history.sigma if history.sigma else None
    base = label(history.replayed[1][place])  # the team's record: the own one has no row if others completed the baseline
    why = f"it beats {base}, on which it is based, but not {label(tip)}, the best since: it is tried again there"
    return verdict.Verdict("discard", gain, why)


def keep_is_tip(history, keep):
    return history.tip is not None and history.tip["code"] == keep["code"]


def judge_again(history, record):
    """The verdict on another run of what is kept. Discard: it is the tip, and its gain does not hold."""
    same = verdict.Verdict("keep", None, "another run of what is kept: it tells more about the noise and about this commit")
    after = Night(records=[*history.records, {**record, "verdict": "keep"}])
    if not keep_is_tip(after, record) or verdict.holds(after.search):
        return same
    before = after.replayed[1][-2]
    why = f"its gain over {label(before)} does not hold, so the branch steps back to {before['short']}"
    return verdict.Verdict("discard", None, why)


def slowed(log, runs):
    """How far something other than the code slowed the latest of these runs of one code. log: that run's. It is the
    larger of two estimates: from the spread of the run's own steps, and from faster runs of the same code."""
    pace, fastest = steps_per_second(runs[-1]), max(map(steps_per_second, runs))
    return max(0.0, log.slowed, 1 - pace / fastest if fastest else 0.0)


def doubt_the_machine(search, judged, record):
    """Confirm instead of a discard if the machine slowed the run so much that this could explain the discard."""
    explained = WORTH * record["slowed"] * record["mean"]
    if record["slowed"] <= SLOWED or record["mean"] - explained >= verdict.bar(search).keep or not verdict.affordable(search):
        return judged
    why = (
        f"{judged.why}, but something slowed the steps of this run by {record['slowed']:.0%}, which may have cost up to "
        f"{explained:.6f}: it is run again, and this run does not count if that one is faster"
    )
    return verdict.Verdict("confirm", judged.gain, why)


def step_back(history, own, record):
    """(the changed record of the keep that is given up, what the plan has as `restore`) if the record says that the gain
    of the tip does not hold; else (None, None). history: the Night that judges, with everything recorded before it; own:
    that of the branch. The record of another member is not changed: its own tree will read this one."""
    if record["verdict"] != "discard" or record["parent"] or record["row"]:
        return None, None
    *_, before, tip = history.replayed[1]
    why = f"{record['n']} runs did not confirm its gain, so the branch stepped back to {label(before)}"
    given_up = next((r for r in own.records if r["run_id"] == tip["run_id"] and r["row"]), None)
    if given_up:
        given_up = {**given_up, "verdict": "discard", "given_up": record["run_id"], "why": why}
        given_up |= {"mean": record["mean"], "n": record["n"], "gain": None}
    message = f"back to {before['short']}: {before['description']}"
    return given_up, {"from": tip["blob"], "to": before["blob"], "message": message}


def close(waiting, history, row, run_id):
    """The record of a commit whose repeat never came: an experiment is discarded, a baseline kept."""
    runs = history.runs(waiting["code"])
    values = [r["summary"]["val_bpb"] for r in (runs if waiting["baseline"] else measured(runs))]
    status = "keep" if waiting["baseline"] else "discard"
    why = "given up" if run_id == waiting["run_id"] else "another commit was recorded before its repeat"
    closed = {**waiting, "verdict": status, "row": row, "why": why, "closed_by": run_id}
    return {**closed, "mean": verdict.mean(values), "n": len(values)}


def leave(waiting, run_id):
    """The record of a commit whose repeat is another tree's: that one decides it, and this run of it counts there, too."""
    return {**waiting, "verdict": "elsewhere", "why": "another tree of the team decides it", "closed_by": run_id}


def make_plan(case, args):
    """All that a record will write."""
    history, waiting, team, changed = case.history, case.history.waiting, case.team, []
    row = 1 + max([0, *case.repo.numbers(case.tag), *(r["row"] for r in history.rows)])
    if waiting and (waiting["code"] != case.code or waiting["run_id"] == case.log.run_id):
        # A worker has handed on what it did not decide. Closed here, it might have two verdicts.
        is_left = not waiting["baseline"] and team and (args.worker or team.decided(waiting["code"]))
        changed.append(leave(waiting, case.log.run_id) if is_left else close(waiting, case.rule, row, case.log.run_id))
        history = Night(records=[changed[0] if r is waiting else r for r in history.records])
        team = team and team.after(changed)
        row += not is_left
    restore = None
    if waiting and waiting["run_id"] == case.log.run_id:
        record = changed[0]
    else:
        record, rule = new_record(case, args, team), team.night if team else history
        judge(case, rule, record)
        if record["verdict"] != "confirm" and (case.edits or case.baseline and record["verdict"] == "keep"):
            record["row"] = row
        given_up, restore = step_back(rule, history, record)
        changed += [given_up] * bool(given_up) + [record]
        history = Night(records=runs_jsonl.merged(history.records, changed))
        team = team and team.after(changed)
        rule = team.night if team else history
        if record["summary"]:  # as the rule knows it now, this run included
            record.update(sigma=rule.sigma, dof=round(rule.search.dof))
    undone = record["verdict"] in ("discard", "crash")
    best = history.best_record
    return {
        "run_id": record["run_id"], "tag": case.tag, "records": changed,
        "best": names.archive(best) if best else None,
        "drop": case.edits if undone else [], "restore": restore,
        "say": report.lines(case, record, history, changed[:-1], team),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# The steps: each may be killed at any moment and carried out again


def steps(repo):
    """In this order. Each takes the plan and may return a sentence for the reader."""

    def change_branch(plan):
        return archive.change_branch(repo.top, plan["tag"])

    def archive_keeps(plan):
        table = results_tsv.table(all_records(plan))
        keeps = [r for r in plan["records"] if r["verdict"] == "keep" and r["row"]]
        return "; ".join(note for r in keeps if (note := archive.make(repo, r, table)))

    def number_commits(plan):
        for r in plan["records"]:
            if r["row"]:
                repo.set_number(plan["tag"], r["row"], r["commit"])

    whole_night = []  # its records with the plan's, once change_branch has restored what this branch left

    def all_records(plan):
        if not whole_night:
            whole_night.extend(runs_jsonl.merged(archive.records_of(repo.top, plan["tag"]), plan["records"]))
        return whole_night

    def write_log(plan):
        return records_in_git.save(repo, plan["tag"], all_records(plan), plan["records"])

    def write_runs(plan):
        known, new = archive.in_file(repo.top, plan["tag"]), {r["run_id"] for r in plan["records"]}
        records = all_records(plan)
        runs_jsonl.save_runs(repo.top / names.RUNS_JSONL, records)
        return records_in_git.restored(plan["tag"], known, [r for r in records if r["run_id"] not in new])

    def write_rows(plan):
        copy = results_tsv.save_table(repo.top / names.RESULTS_TSV, all_records(plan), repo.top / names.LAB)
        return copy and f"results.tsv held what record did not write: it is kept in {copy.relative_to(repo.top)}"

    def point_best(plan):
        if plan["best"] and (repo.top / names.RUNS / plan["best"]).is_dir():
            archive.point_best(repo.top, plan["best"])

    def name_committer(plan):
        return name_author(repo)

    def undo(plan):
        if not repo.drop(plan["drop"]):
            return "the branch stays as it is, as a newer commit to train.py stands on this one"

    def go_back(plan):
        restore = plan.get("restore")
        if restore and not repo.restore(restore["from"], restore["to"], restore["message"]):
            return "the branch stays as it is, as train.py was committed anew meanwhile"

    return [
        change_branch, archive_keeps, number_commits, write_log, write_runs, write_rows, point_best, name_committer, undo,
        go_back,
    ]  # fmt: skip


_named = set()  # working trees in which git knows a name


def name_author(repo):
    """Gives git a name to commit by if it knows none. Returns a sentence for the reader, or None."""
    if repo.top in _named:
        return None
    if repo.ask("var", "GIT_COMMITTER_IDENT"):
        _named.add(repo.top)
        return None
    for key, value in [("user.email", "autoresearch@localhost"), ("user.name", "autoresearch")]:
        if not repo.ask("config", key) and repo.ask("config", "--local", key, value) is None:
            return "git knows no name to commit by, and its configuration cannot be written"
    return "git knew no name to commit by: in this checkout it is autoresearch now"


def complete(repo, plan, for_queue=False):
    """Carries the plan out; the lines to print. for_queue: a worker asks, which needs no
    advice on what comes next, and pushes the record with its verdict."""
    try:
        notes = journal.carry_out(repo.top, plan, steps(repo))
    except Stop as stop:
        raise Unfinished(f"{stop}; nothing is lost: run the same command again once that is mended") from None
    except OSError as error:
        reason = os_reason(error)
        raise Unfinished(f"{reason}; nothing is lost: run the same command again once that is mended") from None
    step = None if for_queue else next_step(repo)
    kind = step.kind if step else "repeat" if plan["records"][-1]["verdict"] == "confirm" else "queue"
    if member := checks.member_of(repo):
        code = names.sha256(repo.top / names.TRAIN) if kind in ("repeat", "doubt") else ""
        state = exchange.state_of(repo, plan["tag"], DOING.get(kind, ""), code)
        notes += filter(None, [exchange.publish(repo, member, plan["tag"], state, push=not for_queue)])
    return [*plan["say"], *(f"note: {note}" for note in notes), *(report.what_next(step, plan) if step else [])]


def disown(repo, record):
    """Marks a record of this branch as lost: another worker has its proposal, and the team takes that one's verdict. The run
    counts all the same. Raises Unfinished."""
    best = checks.night_of(repo).best_record
    complete(repo, {
        "run_id": record["run_id"], "tag": record["tag"], "records": [{**record, "lost": True}],
        "best": names.archive(best) if best else None, "drop": [], "restore": None, "say": ["lost"],
    })  # fmt: skip


def finish_interrupted(repo, for_queue=False):
    """Completes a record that was killed: (its plan, its lines), or None."""
    plan = journal.pending(repo.top)
    if not plan:
        return None
    if repo.tag() != plan["tag"]:
        raise Refused(f"a record on {PREFIX}{plan['tag']} was interrupted: git switch {PREFIX}{plan['tag']}, record there")
    return plan, complete(repo, plan, for_queue)


def recorded(repo, args, for_queue=False):
    """Records the run in run.log; (its plan, the lines to print). args: as the command line's. An interrupted record is
    completed first."""
    with locks.one_at_a_time(repo.top / names.LAB):
        finished, first = finish_interrupted(repo, for_queue), []
        if finished:
            plan, lines = finished
            log = run_log.read(repo.top / names.RUN_LOG)
            if log and log.run_id != plan["run_id"]:
                first = [f"first, an interrupted record was completed: {plan['say'][0]}"]
                finished = None
        if not finished:
            try:
                case = checks.examine(repo, args.description, args.discard, args.simpler, args.worker == "experiment")
            except checks.NotAResult as refused:
                if refused.counted:
                    ends.note(repo.top, *refused.counted)
                raise
            plan = make_plan(case, args)
            lines = complete(repo, plan, for_queue)
            ends.forget(repo.top)
    return plan, [*first, *lines]


def sample(repo, plan):
    """Starts `lab sample` for what the plan has kept."""
    for r in plan["records"]:
        if r["verdict"] == "keep" and r["row"]:
            archive.sample_in_background(repo.top, names.archive(r))


def run(args):
    repo = Repo.find(Path.cwd())
    member = checks.member_of(repo)
    note = exchange.fetch(repo, member) if member else None
    plan, lines = recorded(repo, args)
    print("\n".join(lines))
    if note:
        print(f"note: {note}")
    sys.stdout.flush()
    sample(repo, plan)
    return 0
