"""What comes next in a night: the one answer, given by `lab status` and at the end of `lab record`.

A run that may be recorded is recorded first. If a check refuses it, its sentence is what comes next. If there is nothing
to record, the state of the branch decides. No check is made twice: all of them are lab.loop.checks'.
"""

from typing import NamedTuple

from lab.analysis.history import CRASHED_REPEATS, label
from lab.base.errors import Damaged, Stop
from lab.loop import checks
from lab.store import journal, names

RECORD = "uv run -m lab record"
ANYTHING = "what this tried"  # in place of the description that the agent will give


class Step(NamedTuple):
    kind: str  # record, wait, rerun, commit, run, repeat, doubt, edit, adopt, undo, mend; "first": what a refusal asks for
    why: str  # the state of the night; "" if `do` says it
    do: str  # the command, or an instruction with its command last

    @property
    def sentence(self):
        return f"{self.why}: {self.do}" if self.why else self.do


def next_step(repo):
    """The Step of this working tree, from what is on disk and in git; changes nothing."""
    try:
        if journal.pending(repo.top):
            return Step("record", "a record was interrupted", RECORD)
        return after_the_run(repo)
    except checks.NotAResult as refused:
        return Step("rerun", refused.why, refused.command)
    except checks.RunInProgress as refused:
        return Step("wait", "", str(refused))
    except checks.Uncommitted as refused:
        return Step("commit", "", str(refused))
    except Damaged:
        raise
    except Stop as refused:
        return Step("first", "", str(refused))


def after_the_run(repo):
    """The Step if the run in run.log can be recorded; raises what examine and place raise."""
    try:
        case = checks.examine(repo, ANYTHING)
    except checks.NothingToRecord:
        return on_the_branch(repo)
    return Step("record", f"the run of {repo.short(repo.head())} is over and not recorded", RECORD + description_for(case))


def description_for(case):
    """The description that `lab record` needs for the run: none if a record of this code has it."""
    if case.history.latest(case.code):
        return ""
    return ' "baseline"' if case.baseline else f' "{ANYTHING}"'


def on_the_branch(repo):
    """The Step if there is nothing to record."""
    own, code = checks.night_of(repo), names.sha256(repo.top / names.TRAIN)
    team = checks.team_of(repo, own)
    night = team.night if team else own
    head, run, latest = repo.short(repo.head()), checks.next_run(repo.top, night, code), own.latest(code)
    try:
        place = checks.place(repo, own, team)  # refuses before a run is wasted
    except checks.NotBased:
        return adopt(team)
    if latest and latest["verdict"] == "crash" and not latest["row"] and not night.is_kept(code):
        return Step("mend", f"{head} crashed", f"mend what stops the run, commit it if it is in train.py, then: {run}")
    if (waiting := checks.waiting(own, team)) and waiting["code"] == code:
        return Step("repeat", f"{waiting['short']} waits for a repeat", run)
    latest = latest or night.latest(code)
    if not night.anchors:
        return Step("run", "the baseline has not run", run)
    if team and not night.kept and night.is_baseline(code):
        return Step("repeat", "the team has not measured its baseline often enough", run)
    if team and not place.edits and night.tip and code != night.tip["code"]:
        return adopt(team)
    if night.doubted and code == night.tip["code"] and not (team and team.runs_it(code)):
        return Step("doubt", doubt(night), run)
    if not place.edits or (latest and latest["verdict"] == "keep"):
        return Step("edit", f"{head} is recorded", f"edit train.py, commit it as the next experiment, then: {checks.run_command(repo.top)}")
    if latest:
        tried = next((label(r) for r in night.rows if r["code"] == code), "row 0000")
        return Step("undo", f"{head} was tried already ({tried})", f"git reset --keep {place.base}")
    return Step("run", f"{head} has not run yet", run)


def adopt(team):
    """What to do if the team has something better than HEAD's train.py."""
    best = team.best
    return Step("adopt", f"the team's best is {best['short']} of {team.who(best)} ({best['description'][: checks.BRIEF]})", checks.ADOPT)


def doubt(night):
    """Why the tip runs again, or no longer does though it was doubted; None if it was not doubted."""
    if not night.tip:
        return None
    failures, n = night.search.tip.failures, len(night.search.tip.values)
    runs = f"{n} run{'s' * (n > 1)}"
    if night.crashed_repeats >= CRASHED_REPEATS:
        return f"{night.crashed_repeats} more runs of {label(night.tip)} crashed, so {runs} alone decided it and it does not run again"
    if not night.doubted:
        return None
    return (
        f"{failures} experiments in a row did not beat {label(night.tip)}, which {runs} "
        f"decided: {night.tip['short']} runs again"
    )
