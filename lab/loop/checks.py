"""The checks that `lab record` makes before it changes anything. Each refusal is one sentence that says what to do
instead. lab.loop.next_step makes the same checks."""

import hashlib
import re
import shlex
from typing import NamedTuple

from lab.analysis.history import Night, label
from lab.base import files, locks, text
from lab.base.errors import Again, Refused
from lab.share.membership import membership
from lab.share.team import Team, team_night
from lab.store import archive, ends, names, records_in_git, results_tsv, rules, run_log
from lab.store.names import PREFIX
from lab.store.repository import Repo

RUN = "uv run train.py > run.log 2>&1"
ADOPT = "uv run -m lab adopt"
COMMIT_RUN = 'git commit -m "..." -- train.py (no second run is needed), then: uv run -m lab record "what this tried"'
SEEDS = range(43, 63)  # of repeats in a team: those that the permission files in agents/ allow
BRIEF = 80  # characters of a description
TOUCHED = 3  # files that a refusal names, of those that an experiment may not touch


class NothingToRecord(Refused):
    """run.log has no run that is still to be recorded: what comes next depends only on the branch."""


class SeedUsed(NothingToRecord):
    """The code waits for a repeat, or is kept, and has run under the seed of this run."""


class RunInProgress(Refused):
    pass


class NotBased(Refused):
    """HEAD's train.py comes from nothing that was kept."""


class Uncommitted(Refused):
    """train.py differs from HEAD's, and run.log is of neither."""


class DecidedElsewhere(Refused):
    """The team has decided this code while this worker ran it. record: how."""

    def __init__(self, record):
        self.record = record
        super().__init__(f"this very train.py was decided meanwhile ({label(record)}, {record['verdict']})")


class NotAResult(Again):
    """The machine ended the run. why: a clause; command: what runs it again; counted: (code, run id) if the run is one of
    those that are not repeated without end (lab.store.ends)."""

    def __init__(self, ended, command, fault=None, counted=None):
        self.why, self.command, self.counted = f"the last run was {ended}, it is no result", command, counted
        if ended == "machine":
            self.why = f"this machine ended the last run ({fault}), it is no result; mend that first"
        elif ended == "overran":
            self.why = f"a stall of this machine, or the edit, made the last run too long ({fault}), it is no result"
        limit = f"; {ends.REPEATS + 1} such runs in a row are a crash" if counted else ""
        super().__init__(f"{self.why}. Run it again: {command}; to give the idea up: record it with --discard{limit}")


class Place(NamedTuple):
    """Where HEAD's train.py is on the branch."""

    commit: str  # the experiment's, or of the anchor if this is another run of the anchor
    blob: str  # git's name for train.py
    anchor: dict | None  # the record that the experiment is based on; None for the first run of a baseline
    edits: list  # commits of the experiment, newest first; [] for the baseline and for another run of the anchor
    baseline: bool  # whether this is a run of the baseline before it is kept
    base: str | None  # the commit on the branch that the experiment is based on; it has the anchor's train.py


class Case(NamedTuple):
    """A run that may be recorded."""

    repo: Repo
    tag: str
    description: str
    history: Night
    log: run_log.RunLog
    code: str  # sha256 of train.py
    commit: str  # these as in Place
    blob: str
    anchor: dict | None
    edits: list
    baseline: bool
    base: str | None
    team: Team | None

    @property
    def rule(self):
        """The Night that judges the run: the team's, or the branch's own."""
        return self.team.night if self.team else self.history


def night_of(repo):
    """The Night of the branch alone."""
    return Night(records=archive.records_of(repo.top, repo.tag()))


def member_of(repo):
    """The lab.share.membership.Member that the working tree is, or None."""
    if not hasattr(repo, "member"):  # git is asked once a command
        repo.member = membership(repo)
    return repo.member


def team_of(repo, history):
    """The lab.share.team.Team of the working tree, or None. history: the Night of its branch. Before its first record, the
    run in run.log says which device and data the tree has."""
    member, header = member_of(repo), None
    if member and not history.first:
        log = run_log.read(repo.top / names.RUN_LOG)
        known = log is not None and log.header is not None and not rules.changed(log.header, rules.tree(repo.top))
        header = log.header if known else None
    return team_night(repo, member, repo.tag(), history.records, header, repo.team_refs) if member else None


def waiting(history, team):
    """The own record that waits for a repeat, or None. A baseline that the team has measured often enough does not, nor does
    an experiment that another tree has decided."""
    found = history.waiting
    if found and team and (team.night.kept if found["baseline"] else team.decided(found["code"])):
        return None
    return found


def run_command(top):
    """The command that starts a run: the human may have changed it in program.md (to run in the sandbox)."""
    try:
        text = (top / names.PROGRAM).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return RUN
    found = re.search(r"uv run [\w./ -]+ > run\.log 2>&1", text)
    return found[0] if found else RUN


def next_run(top, history, code):
    """The command for the next run of this code: a repeat has a seed that the code has not run under, complete or not. So
    has the first run of a team's baseline: the members may begin at the same time."""
    used = history.seeds(code)
    if not used and (not history.spread or history.anchors):
        return run_command(top)
    begin = (history.spread - 1) % len(SEEDS) if history.spread else 0
    free = [seed for seed in [*SEEDS[begin:], *SEEDS[:begin]] if seed not in used] if history.spread else []
    return f"AUTORESEARCH_SEED={free[0] if free else max(used) + 1} {run_command(top)}"


def examine(repo, description, discard=False, simpler=False, proposed=False):
    """The Case of the run in run.log. Raises NothingToRecord, RunInProgress, NotAResult, or Refused with what to do
    before this run can be recorded; for a proposal that a worker runs DecidedElsewhere, too."""
    history, head = night_of(repo), repo.head()
    if locks.run_in_progress(repo.top):
        raise RunInProgress("a run is still going on: wait until it ends, then record it")
    records_in_git.check_not_lost(repo, repo.tag(), history.records)
    log, train = run_log.read(repo.top / names.RUN_LOG), repo.top / names.TRAIN
    if not repo.train_is_committed():
        refuse_uncommitted(repo, history, log)
    code = names.sha256(train)
    team = team_of(repo, history)
    rule = team.night if team else history
    check_new(repo, history, team, rule, log, code, discard)
    if proposed and team and (r := team.decided(code)) and team.who(r) != "this tree":
        raise DecidedElsewhere(r)
    check_identity(repo, history, rule, log, head, code)
    check_end(repo, log, code, discard, next_run(repo.top, rule, code))
    found = place(repo, history, team)
    earlier = history.latest(code) or rule.latest(code)
    description = text.one_line(description or "", results_tsv.LONG_DESCRIPTION)
    description = description or (earlier["description"] if earlier else "baseline" if found.baseline else "")
    case = Case(repo, repo.tag(), description, history, log, code, *found, team)
    if not description:
        raise Refused('say in a few words what this tried: uv run -m lab record "..."')
    check_seed(repo, case)
    if simpler and not proposed:
        check_simpler(repo, case)
    if discard and not case.edits:
        raise Refused("this is the code that others are measured against: it cannot be discarded")
    return case


def refuse_uncommitted(repo, history, log):
    """train.py has uncommitted changes: what to do depends on whose run is in run.log."""
    train, ran = repo.top / names.TRAIN, log and log.header and log.header["train_sha256"]
    is_new = log and log.ended in ("complete", "crash", *ends.COUNTED) and not history.record_of(log)
    if is_new and train.is_file() and ran == names.sha256(train):
        raise Refused(f"the last run is of train.py as it is now, which is not committed: {COMMIT_RUN}")
    committed = rules.commit(repo, "HEAD")(names.TRAIN)
    if is_new and committed is not None and ran == hashlib.sha256(committed).hexdigest():
        raise Refused(
            "the last run is of HEAD, and train.py has newer changes that are not committed: git stash push -- train.py, "
            'then: uv run -m lab record "what this tried", then: git stash pop'
        )
    raise Uncommitted(
        "train.py has changes that are not committed, and run.log is not of them: commit them as the next experiment "
        f"(or git checkout -- train.py), then: {run_command(repo.top)}"
    )


def check_new(repo, history, team, rule, log, code, discard):
    """There is a log, and its run is not recorded yet. A recorded run can only be given up, while it waits for a
    repeat."""
    if log is None:
        raise NothingToRecord(f"there is no run.log: {next_run(repo.top, rule, code)}")
    if log.ended == "nothing":
        again = next_run(repo.top, rule, code)
        raise NothingToRecord(f"run.log is empty, the run did not begin or was killed: {again}")
    r = history.record_of(log)
    if r and not (discard and r is waiting(history, team) and not r["baseline"]):
        row = f"row {r['row']:04d}, " if r["row"] else ""
        raise NothingToRecord(f"this run is recorded already ({row}{r['verdict']}): go on as `uv run -m lab status` says")


def check_identity(repo, history, rule, log, head, code):
    """The run is of HEAD's train.py, under the rules, data and device of the branch."""
    again, header, first = next_run(repo.top, rule, code), log.header, history.first
    if header is None:
        committed = int(repo.git("log", "-1", "--format=%ct", head))
        if (repo.top / names.RUN_LOG).stat().st_mtime < committed:
            raise NothingToRecord(f"run.log is older than HEAD: {again}")
        return
    if header["train_sha256"] != code:
        raise NothingToRecord(f"run.log is of another train.py than HEAD's: {again}")
    if header["clock"] != "monotonic":
        raise Refused(f"this run's clock was not the real one, which is for tests: {again}")
    if not first:
        return
    check_rules(repo, first, header)
    for key, name, remedy in [
        ("dataset", "the dataset", "set AUTORESEARCH_DATASET as before, or begin a new branch"),
        ("data_sha256", "the prepared data", "use the same cache as before, or begin a new branch"),
        ("device", "the device", "run on the same device, or begin a new branch"),
    ]:
        old, new = first["header"][key], header[key]
        if old != new:
            shown = f" ({old} → {new})" if key in ("dataset", "device") else ""
            raise Refused(f"{name} changed since this branch's first run{shown}, so nothing compares: {remedy}")


def check_rules(repo, first, header):
    """The run had the rules of the branch's first run, whichever version of the frozen files that was."""
    began = first["commit"]
    read = rules.commit(repo, began)
    others = rules.differing(first["header"], header, read, rules.tree(repo.top))
    if not others:
        return
    if repo.exists(began) and not rules.changed(first["header"], read):
        places = " ".join(rules.places_in(repo, began))
        remedy = f"git checkout {first['short']} -- {places}, commit that without train.py and run again"
    else:  # the first run was of files that were never committed, or the commit is gone
        remedy = "restore them as they were (git log) and run again"
    raise Refused(
        f"{', '.join(others[:TOUCHED])} changed since this branch's first run, so nothing compares. To finish this night "
        f"under its own rules: {remedy}. For a night under the new ones: git switch -c {PREFIX}ANOTHER-TAG"
    )


def check_end(repo, log, code, discard, again):
    """The run ended with a result or a crash. With --discard any end is given up as a crash, and so is the third in a row
    that may be the machine's doing."""
    last = log.lines[-1][:300] if log.lines else ""
    if log.summary and (wrong := run_log.not_finite(log.summary)) and not discard:
        raise Refused(
            f"{', '.join(wrong)} in the summary is not a possible number: fix train.py, or record it with --discard"
        )
    if log.ended == "contradictory" and not discard:
        raise Refused(f"run.log {log.wrong}. Fix train.py and run it again: {again}")
    if discard or log.ended == "complete":
        return
    if files.disk_is_full(repo.top / names.LAB):  # the log may be cut off, so it says nothing
        raise NotAResult("machine", again, "the disk is full")
    if log.ended == "crash" or log.ended in ends.COUNTED and ends.before(repo.top, code, log.run_id) >= ends.REPEATS:
        return
    if log.ended in ends.COUNTED:
        raise NotAResult(log.ended, again, log.fault, counted=(code, log.run_id))
    if log.ended in ("preempted", "interrupted"):
        raise NotAResult(log.ended, again)
    if log.ended == "incomplete":
        raise Refused(f"the summary in run.log is not complete. Run it again: {again}")
    raise Refused(f"the run did not begin ({last}). Mend that, then: {again}")


def place(repo, history, team=None):
    """The Place of HEAD; a refusal if no experiment can be recorded there. In a team it may be based on what any member
    kept, which is recognised by its train.py."""
    edits = repo.edits()
    blob = edits[0].blob if edits else repo.git("rev-parse", f"HEAD:{names.TRAIN}").strip()
    anchors = [*history.anchors, *(team.bases if team else [])]
    if not anchors:
        own = repo.own_edits(repo.tag())
        if own and not history.records:  # if the baseline itself crashed, mending it comes first
            first = repo.short(own[-1])
            raise Refused(
                f"the baseline comes first, and {first} changes train.py already: git reset --keep {first}^, run and "
                f"record that three times, then git cherry-pick {repo.short(own[0])}"
            )
        return Place(repo.head(), blob, None, [], baseline=True, base=None)
    by_commit = {r["commit"]: r for r in reversed(anchors)}
    by_blob = {r["blob"]: r for r in reversed(anchors)}
    for depth, edit in enumerate(edits):  # noqa: B007 (it is used below)
        if anchor := by_commit.get(edit.commit) or by_blob.get(edit.blob):
            break
    else:
        if team and team.best:
            raise NotBased(f"HEAD is not based on anything that the team kept: {ADOPT}")
        raise Refused(f"HEAD is not based on anything kept: git reset --keep {history.anchors[0]['short']}, go on there")
    mine, base = [edit.commit for edit in edits[:depth]], repo.short(edit.commit)
    if not mine:
        return Place(anchor["commit"], blob, anchor, [], not (history.kept or team and team.night.kept), base)
    for commit, touched in repo.files(mine).items():
        if others := [name for name in touched if name != names.TRAIN]:
            short = repo.short(commit)
            raise Refused(
                f"{short} touches {', '.join(others[:TOUCHED])}, and an experiment may change train.py alone: "
                f"git reset --soft {short}^; git commit -m ... -- train.py; {undo_of(repo, commit, others)}. "
                f"What train.py needs of them, put into train.py. Then: {run_command(repo.top)}"
            )
    return Place(mine[0], blob, anchor, mine, False, base)


def undo_of(repo, commit, others):
    """The commands that make the files other than train.py as they were before the commit, so that no file remains that
    a run could load and git does not hold."""
    old = [name for name in others if repo.ask("cat-file", "-e", f"{commit}^:{name}") is not None]
    new = [name for name in others if name not in old]
    commands = [f"git checkout {repo.short(commit)}^ -- {shlex.join(old)}"] * bool(old)
    return " && ".join(commands + [f"git rm -f -- {shlex.join(new)}"] * bool(new))


def check_seed(repo, case):
    """A repeat runs under a new seed: a used one would give no new information. Nor would a second crash."""
    runs = case.rule.runs(case.code)
    crashed = next((label(r) for r in case.rule.rows if r["code"] == case.code and r["verdict"] == "crash"), None)
    if case.edits and crashed and not case.log.summary:
        raise NothingToRecord(
            f"this very train.py crashed before ({crashed}): git reset --keep {case.base} and make another "
            "experiment"
        )
    if not case.log.summary or case.log.header["seed"] not in [r["header"]["seed"] for r in runs]:
        return
    if case.log.run_id in [r["run_id"] for r in runs]:  # it is being given up
        return
    seed, row = case.log.header["seed"], next((label(r) for r in reversed(runs) if r["row"]), None)
    if case.edits and row:
        raise NothingToRecord(
            f"this very train.py was tried before under seed {seed} ({row}): git reset --keep "
            f"{case.base} and make another experiment"
        )
    if row:
        raise SeedUsed(
            f"HEAD's train.py is what is kept ({row}), and ran under seed {seed} before: make the next experiment"
        )
    again = next_run(repo.top, case.rule, case.code)
    raise SeedUsed(f"a repeat under seed {seed} says nothing new: {again}")


def check_simpler(repo, case):
    if case.baseline or not case.edits:
        raise Refused("--simpler is for an experiment that removes lines: record this one without it")
    if why := not_simpler(repo, case.anchor["commit"], case.commit):
        raise Refused(f"{why}; record it without --simpler")


def not_simpler(repo, base, commit):
    """Why the commit's train.py is not simpler than the base's; None if it is."""
    added, removed = repo.line_counts(base, commit)
    return None if removed > added else f"not simpler: it adds {added} lines and removes {removed}"
