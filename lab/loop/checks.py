"""What a record looks at before it changes anything, and what it refuses: each refusal is one sentence that says
what to do instead."""

import hashlib
import re
import shlex
from typing import NamedTuple

from lab.analysis.history import Night
from lab.base import locks, text
from lab.base.errors import Again, Refused
from lab.store import archive, names, records_in_git, results_tsv, run_log
from lab.store.repository import Repo

RUN = "uv run train.py > run.log 2>&1"
COMMIT_RUN = 'git commit -m "..." -- train.py (no second run is needed), then: uv run -m lab record "what this tried"'


class Case(NamedTuple):
    """A run that may be recorded."""

    repo: Repo
    tag: str
    description: str
    history: Night
    log: run_log.RunLog
    code: str  # sha256 of train.py
    blob: str  # git's name for it
    commit: str  # the experiment's, or of the anchor where this is another run of the anchor
    anchor: dict | None  # the record that the experiment stands on; None for the first run of a baseline
    edits: list  # commits of the experiment, newest first; [] for the baseline and for another run of the anchor
    baseline: bool  # whether this is a run of the baseline before it is kept


def run_command(top):
    """The command that starts a run: the human may have changed it in program.md (to run in the sandbox)."""
    try:
        text = (top / names.PROGRAM).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return RUN
    found = re.search(r"uv run [\w./ -]+ > run\.log 2>&1", text)
    return found[0] if found else RUN


def repeat_command(top, history, code):
    """A run of the same code under a seed that it has not run under."""
    seeds = [r["header"]["seed"] for r in history.runs(code)]
    return f"AUTORESEARCH_SEED={max(seeds, default=41) + 1} {run_command(top)}"


def examine(repo, description, discard, simpler):
    """The Case of the run in run.log, or a refusal."""
    tag, head = repo.tag(), repo.head()
    if locks.run_in_progress(repo.top):
        raise Refused("a run is still going: wait until it ends, then record it")
    history = Night(records=archive.records_of(repo.top, tag))
    records_in_git.check_not_lost(repo, tag, history.records)
    if not repo.train_is_committed():
        if is_uncommitted_run(repo.top, history):
            raise Refused("the run is of train.py as it stands, which is not committed: " + COMMIT_RUN)
        raise Refused(
            "train.py has changes that are not committed: run.log is of other code, or they are the next experiment "
            "(git stash push -- train.py, record, git stash pop)"
        )
    log = read_log(repo, history, discard)
    code = hashlib.sha256((repo.top / names.TRAIN).read_bytes()).hexdigest()
    check_identity(repo, history, log, head, code)
    check_end(repo, log, discard)
    case = place(repo, tag, history, log, code, head)
    earlier = next((r for r in reversed(history.records) if r["code"] == code), None)
    description = text.one_line(description or "", results_tsv.LONG_DESCRIPTION)
    description = description or (earlier["description"] if earlier else "baseline" if case.baseline else "")
    if not description:
        raise Refused('say in a few words what this tried: uv run -m lab record "..."')
    check_seed(repo, case)
    if simpler:
        check_simpler(repo, case)
    if discard and not case.edits:
        raise Refused("this is the code that others are measured against: it cannot be discarded")
    return case._replace(description=description)


def read_log(repo, history, discard):
    """What run.log says; a run that was recorded may only be given up while it waits for a repeat."""
    log = run_log.read(repo.top / names.RUN_LOG)
    if log is None:
        raise Refused(f"there is no run.log: {run_command(repo.top)}")
    if log.ended == "nothing":
        raise Refused(f"run.log is empty, the run did not begin or was killed: {run_command(repo.top)}")
    for r in history.records:
        if r["run_id"] == log.run_id or r["log"] == log.identity:
            if discard and r is history.waiting and not r["baseline"]:
                break
            row = f"row {r['row']:04d}, " if r["row"] else ""
            raise Refused(f"this run is recorded already ({row}{r['verdict']}): go on as `uv run -m lab status` says")
    return log


def is_uncommitted_run(top, history):
    """Whether run.log is a result of the very train.py that is there, which somebody forgot to commit."""
    log, train = run_log.read(top / names.RUN_LOG), top / names.TRAIN
    if not log or not log.header or log.ended not in ("complete", "crash") or not train.is_file():
        return False
    is_new = all(r["run_id"] != log.run_id for r in history.records)
    return is_new and log.header["train_sha256"] == hashlib.sha256(train.read_bytes()).hexdigest()


def check_identity(repo, history, log, head, code):
    """The run is of HEAD's train.py, under the rules, data and device of the branch."""
    again, header, first = run_command(repo.top), log.header, history.first
    if header is None:
        committed = int(repo.git("log", "-1", "--format=%ct", head))
        if (repo.top / names.RUN_LOG).stat().st_mtime < committed:
            raise Refused(f"run.log is older than HEAD: {again}")
        return
    if header["clock"] != "monotonic":
        raise Refused(f"this run's clock was not the real one, which is for tests: {again}")
    if header["train_sha256"] != code:
        raise Refused(f"run.log is of another train.py than HEAD's: {again}")
    if not first:
        return
    for key, name, remedy in [
        ("rules_sha256", "constants.py or prepare.py", "put them back as they were (git log), or begin a new branch"),
        ("dataset", "the dataset", "set AUTORESEARCH_DATASET as before, or begin a new branch"),
        ("data_sha256", "the prepared data", "use the same cache as before, or begin a new branch"),
        ("device", "the device", "run on the same device, or begin a new branch"),
    ]:
        old, new = first["header"][key], header[key]
        if old != new:
            shown = f" ({old} → {new})" if key in ("dataset", "device") else ""
            raise Refused(f"{name} changed since this branch's first run{shown}, so nothing compares: {remedy}")


def check_end(repo, log, discard):
    """The run came to an end that is a result or a crash. With --discard any end is given up as a crash."""
    again = f"{run_command(repo.top)}; to give the idea up: record it with --discard"
    last = log.lines[-1][:300] if log.lines else ""
    if log.summary and (wrong := run_log.not_finite(log.summary)) and not discard:
        raise Refused(f"{', '.join(wrong)} in the summary is no possible number: mend train.py; or --discard")
    if log.ended == "contradictory" and not discard:
        raise Refused(f"run.log {log.wrong}. Mend train.py and run it again: {again}")
    if discard or log.ended in ("complete", "crash"):
        return
    if log.ended in ("preempted", "interrupted"):
        raise Again(f"the run was {log.ended}, which is neither a result nor a crash. Run it again: {again}")
    if log.ended == "killed":
        raise Again(f"the run was killed in the middle, which is no result. Run it again: {again}")
    if log.ended == "incomplete":
        raise Refused(f"the summary in run.log is not complete. Run it again: {again}")
    raise Refused(f"the run did not begin ({last}). Mend that, then: {again}")


def place(repo, tag, history, log, code, head):
    """Where the run stands on the branch: of the baseline, of what is kept, or an experiment on top of that."""
    edits = repo.edits()
    blob = edits[0].blob if edits else repo.git("rev-parse", "HEAD:train.py").strip()
    case = Case(repo, tag, "", history, log, code, blob, head, None, [], False)
    if not history.anchors:
        own = repo.own_edits(tag)
        if own and not history.records:  # where the baseline itself crashed, mending it comes first
            first = repo.short(own[-1])
            raise Refused(
                f"the baseline comes first, and {first} changes train.py already: git reset --keep {first}^, run and "
                f"record that three times, then git cherry-pick {repo.short(own[0])}"
            )
        return case._replace(baseline=True)
    by_commit = {r["commit"]: r for r in reversed(history.anchors)}
    by_blob = {r["blob"]: r for r in reversed(history.anchors)}
    for depth, edit in enumerate(edits):  # noqa: B007 (it is used below)
        if anchor := by_commit.get(edit.commit) or by_blob.get(edit.blob):
            break
    else:
        raise Refused(f"HEAD does not stand on anything kept: git reset --keep {history.anchors[0]['short']}, go on there")
    mine = [edit.commit for edit in edits[:depth]]
    if not mine:
        return case._replace(commit=anchor["commit"], anchor=anchor, baseline=not history.kept)
    for commit, files in repo.files(mine).items():
        if others := [name for name in files if name != names.TRAIN]:
            short = repo.short(commit)
            raise Refused(
                f"{short} touches {', '.join(others[:3])}, and an experiment may change train.py alone: "
                f"git reset --soft {short}^; git commit -m ... -- train.py; {undo_of(repo, commit, others)}. "
                f"What train.py needs of them, put into train.py. Then: {run_command(repo.top)}"
            )
    return case._replace(commit=mine[0], anchor=anchor, edits=mine)


def undo_of(repo, commit, others):
    """The commands that make the files other than train.py as they were before the commit, so that nothing is left
    that a run could load and git does not hold."""
    old = [name for name in others if repo.ask("cat-file", "-e", f"{commit}^:{name}") is not None]
    new = [name for name in others if name not in old]
    commands = [f"git checkout {repo.short(commit)}^ -- {shlex.join(old)}"] * bool(old)
    return " && ".join(commands + [f"git rm -f -- {shlex.join(new)}"] * bool(new))


def check_seed(repo, case):
    """A repeat runs under a new seed: a used one would say nothing new. Nor would a second crash."""
    runs = case.history.runs(case.code)
    crashed = next((r["row"] for r in case.history.rows if r["code"] == case.code and r["verdict"] == "crash"), None)
    if case.edits and crashed and not case.log.summary:
        raise Refused(
            f"this very train.py crashed before (row {crashed:04d}): git reset --keep {case.anchor['short']} and make "
            "another experiment"
        )
    if not case.log.summary or case.log.header["seed"] not in [r["header"]["seed"] for r in runs]:
        return
    if case.log.run_id in [r["run_id"] for r in runs]:  # it is being given up
        return
    seed, row = case.log.header["seed"], next((r["row"] for r in reversed(runs) if r["row"]), None)
    if case.edits and row:
        raise Refused(
            f"this very train.py was tried before under seed {seed} (row {row:04d}): git reset --keep "
            f"{case.anchor['short']} and make another experiment"
        )
    if row:
        raise Refused(
            f"HEAD's train.py is what is kept (row {row:04d}), and ran under seed {seed} before: make the next experiment"
        )
    raise Refused(f"a repeat under seed {seed} says nothing new: {repeat_command(repo.top, case.history, case.code)}")


def check_simpler(repo, case):
    if case.baseline or not case.edits:
        raise Refused("--simpler is for an experiment that removes lines: record this one without it")
    added, removed = repo.line_counts(case.anchor["commit"], case.commit)
    if removed <= added:
        raise Refused(f"not simpler: it adds {added} lines and removes {removed}; record it without --simpler")
