"""The one model of a night: its experiments, what is kept, the noise, and which experiment is the best.

    night = read_night(Path("."))              a working tree: results.tsv of any harness, runs.jsonl if it exists
    night = Night(records=records)             the records of one branch, for the commands that judge

Lower val_bpb is better. A crash is missing data: its 0.000000 is never a value. Runs of the same train.py (`code`, its
sha256) belong together, whatever commit they came in.

Night.search is the night as the rule knows it (lab.analysis.verdict): its records, replayed in their order. Recorded
verdicts are used as they are, even if they come from an older rule.

The best is the kept experiment with the lowest estimated true val_bpb. That is the tip of the branch, or, if a
`--simpler` keep is a little worse, the keep before it; it is not always the one with the lowest number, as a single run
may have measured too low. Without records, the best is the lowest kept value in the table; by_estimate says which of
the two applies.
"""

import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from statistics import median

from lab.analysis import verdict
from lab.store import names, results_tsv, runs_jsonl

SLOWED = 0.03  # a run that something other than its code slowed by more does not measure the code fairly
CRASHED_REPEATS = 2  # runs of a doubted tip that crash: then it does not run again
PACE = 10  # runs: only the latest ones give the time that an experiment takes, as an edit may change it
LOWEST = "the lowest kept value, as runs.jsonl has no records to estimate it from"  # what a best is if not by_estimate


@dataclass(frozen=True)
class Experiment:
    number: int  # of its row in results.tsv, from 1
    commit: str  # as in the row, usually short
    val_bpb: float | None  # None for a crash, and for anything but a finite positive number
    memory_gb: float | None  # None if unknown, which a run on a CPU writes as 0.0
    status: str  # keep, discard, crash; or as another harness wrote it ("ok")
    description: str  # one line of plain text
    runs: tuple[dict, ...]  # the records in runs.jsonl of this commit, oldest first
    archive: Path | None  # runs/NNNN-<commit>/, if it exists

    @property
    def kept(self):
        return self.status == "keep" and self.val_bpb is not None

    @property
    def given_up(self):
        """Why the branch stepped back from it, if it was kept at first; None otherwise."""
        return next((str(r.get("why")) for r in self.runs if r.get("given_up") and r["row"] and r["verdict"] == "discard"), None)

    @property
    def training_minutes(self):
        """Minutes of training of all its complete runs; None if runs.jsonl has no such run."""
        seconds = [r["summary"]["training_seconds"] for r in self.runs if r["summary"]]
        return sum(seconds) / 60 if seconds else None


class Night:
    """experiments: the rows of results.tsv, or None for those that follow from the records.
    records: runs.jsonl of one branch, oldest first; () for a table of another harness.
    notes: what could not be read. sigma: noise of one run in val_bpb, if there are no records to estimate it from.
    spread: of a team's member, from 1: where it begins in the list of seeds, as others may run the same code now."""

    def __init__(self, experiments=None, records=(), tree=None, notes=(), sigma=None, spread=0):
        self.records, self.tree, self.notes, self.spread = list(records), tree, tuple(notes), spread
        self._sigma = sigma
        self.first = next((r for r in self.records if r["header"]), None)  # whose rules, data and device count
        self.baseline_record = next((r for r in self.records if r["baseline"] and r["summary"]), None)
        self.kept = [r for r in self.records if r["verdict"] == "keep" and r["row"]]
        self.rows = sorted((r for r in self.records if r["row"]), key=lambda r: r["row"])
        self.by_code = {}
        for r in self.records:
            if is_measurement(r):
                self.by_code.setdefault(r["code"], []).append(r)
        self.experiments = tuple(self.from_records() if experiments is None else experiments)

    def from_records(self):
        """The Experiments that follow from the rows of the records."""
        by_commit = {}
        for r in self.records:
            by_commit.setdefault(r["commit"], []).append(r)
        return [
            Experiment(r["row"], r["short"], r["mean"], r["memory_gb"] or None, r["verdict"], r["description"],
                       tuple(by_commit[r["commit"]]), None)
            for r in self.rows
        ]  # fmt: skip

    # --- runs ---

    def runs(self, code):
        """Complete runs of this code, oldest first."""
        return self.by_code.get(code, [])

    def values(self, code):
        return [r["summary"]["val_bpb"] for r in self.runs(code)]

    def seeds(self, code):
        """Seeds that a repeat of this code should not have: those of its complete runs and of its runs that crashed, as it may
        crash under them again. [] before the first complete run: what stopped it was no matter of the seed."""
        crashed = [r for r in self.records if r["code"] == code and r["verdict"] == "crash" and r["header"]]
        runs = self.runs(code)
        return [r["header"]["seed"] for r in [*runs, *crashed]] if runs else []

    def latest(self, code):
        """The last record of this code, complete or not; None if it never ran."""
        return next((r for r in reversed(self.records) if r["code"] == code), None)

    def record_of(self, log):
        """The record of the run in this run_log.RunLog; None if it was not recorded."""
        return next((r for r in self.records if r["run_id"] == log.run_id or r["log"] == log.identity), None)

    def is_kept(self, code):
        return any(r["code"] == code for r in self.kept)

    def is_baseline(self, code):
        return self.baseline_record is not None and code == self.baseline_record["code"]

    @property
    def anchors(self):
        """What an experiment may be based on: keeps, and the baseline while it is being repeated. Latest first."""
        return self.kept[::-1] or ([self.baseline_record] if self.baseline_record else [])

    @property
    def waiting(self):
        """The latest run of the commit that waits for a repeat; None if no commit does."""
        if self.baseline_record and not self.kept:
            return self.runs(self.baseline_record["code"])[-1]
        latest = {r["code"]: r for r in self.records}
        return next((r for r in latest.values() if r["verdict"] == "confirm"), None)

    # --- what the rule knows ---

    @cached_property
    def replayed(self):
        """(Search, the records of the keeps in its line); (None, []) before the first complete run of a baseline."""
        return replay(self.records)

    @property
    def search(self):
        """The lab.analysis.verdict.Search of the branch; None before the first complete run of its baseline."""
        return self.replayed[0]

    @property
    def tip(self):
        """The record of the keep that experiments are measured against; None before the baseline is kept."""
        line = self.replayed[1]
        return line[-1] if line and line[-1]["row"] else None

    @property
    def sigma(self):
        """Noise of one run in val_bpb; None if it is not known."""
        return (self.search and self.search.sigma) if self.records else self._sigma

    @property
    def doubted(self):
        """Whether the next run should be one of the tip."""
        if self.tip is None or self.waiting or self.crashed_repeats >= CRASHED_REPEATS:
            return False
        return verdict.doubted(self.search)

    @property
    def crashed_repeats(self):
        """How many runs of the tip crashed since it was kept; 0 without a tip."""
        tip = self.tip
        since = takewhile(lambda r: r is not tip, reversed(self.records)) if tip else ()
        return sum(r["code"] == tip["code"] and r["verdict"] == "crash" for r in since)

    @property
    def given_up(self):
        """Records of the keeps that the branch stepped back from, in the order of their rows."""
        return [r for r in self.rows if r.get("given_up") and r["verdict"] == "discard"]

    def kept_values(self, code):
        """val_bpb of the runs that count of a keep in the line, those made after it was kept, too; () of other code."""
        search, line = self.replayed
        return next((search.line[i].values for i, keep in enumerate(line) if keep["code"] == code), ())

    def mean_of(self, r):
        """{"mean": val_bpb, "n": runs} of the keep that r records, by all its runs. The row has those that decided it."""
        values = self.kept_values(r["code"])
        return {"mean": verdict.mean(values), "n": len(values)} if values else {"mean": r["mean"], "n": r["n"]}

    @cached_property
    def estimates(self):
        """{row number: what the rule believes it to be worth, in val_bpb} of the keeps in the records."""
        search, line = self.replayed
        return {r["row"]: verdict.belief(search, len(line) - 1 - i) for i, r in enumerate(line) if r["row"]}

    # --- the best: one definition ---

    @property
    def baseline(self):
        """The first experiment that is not a crash; None before there is one."""
        return next((e for e in self.experiments if e.val_bpb is not None), None)

    @cached_property
    def standing(self):
        """What may be the best: the kept experiments and the baseline, in order. A baseline that was itself discarded
        counts only if nothing was kept."""
        kept = [e for e in self.experiments if e.kept]
        baseline = self.baseline
        if baseline and not baseline.kept and not (kept and baseline.status == "discard"):
            kept = [baseline, *kept]
        return tuple(kept)

    @cached_property
    def worth(self):
        """{experiment number: the val_bpb that it is compared by} of `standing`: the estimated true one, or the table's
        value if any of them is not in the records."""
        return self.estimated if self.by_estimate else {e.number: e.val_bpb for e in self.standing}

    @cached_property
    def estimated(self):
        """{experiment number: estimated true val_bpb} of those in `standing` and in the records."""
        rows = {e.number: kept_record(e) for e in self.standing}
        return {number: self.estimates[r["row"]] for number, r in rows.items() if r and r["row"] in self.estimates}

    @cached_property
    def by_estimate(self):
        """Whether the best is the one with the lowest estimate, and not with the lowest value in the table."""
        return bool(self.standing) and len(self.estimated) == len(self.standing)

    def is_better(self, e, best):
        """Whether e, the later of the two, replaces the best. Of equal estimates the later one wins, as the branch
        continued from there; of equal values the first one wins."""
        new, old = self.worth[e.number], self.worth[best.number]
        return new <= old if self.by_estimate else new < old

    @cached_property
    def best_so_far(self):
        """For each experiment the best of those up to it, as it is judged today; None before there was one."""
        standing, best, found = {e.number for e in self.standing}, None, []
        for e in self.experiments:
            if e.number in standing and (best is None or self.is_better(e, best)):
                best = e
            found.append(best)
        return found

    @property
    def best(self):
        """The best Experiment; None before there is one."""
        return self.best_so_far[-1] if self.best_so_far else None

    @property
    def best_record(self):
        """The record by which the best was kept; None before there is one, or if it is not in the records."""
        return kept_record(self.best) if self.best else None

    def running_best(self):
        """val_bpb of best_so_far."""
        return [best and best.val_bpb for best in self.best_so_far]

    def gains(self):
        """(kept experiment, how far it is below the best before it) in order; below 0 for a simplification that
        costs a little. The first of a night has nothing before it and is not listed."""
        before = [None, *self.running_best()]
        pairs = zip(self.experiments, before[:-1], strict=True)
        return [(e, best - e.val_bpb) for e, best in pairs if e.kept and best is not None]

    @property
    def runs_per_hour(self):
        """Runs per hour, repeats included, from the first run's start to the last one's end; None before there are
        two."""
        ends = self.records[:1] + self.records[-1:]
        times = [datetime.fromisoformat(r[key]) for r in ends for key in ("start", "end") if r[key]]
        hours = (max(times) - min(times)).total_seconds() / 3600 if times else 0
        return len(self.records) / hours if len(self.records) > 1 and hours > 0 else None


    @property
    def cost(self):
        """(seconds from one run to the next, seconds of it that are training): means over the latest complete runs;
        None before there is one. The first includes the median gap between runs, not the mean: an interrupted night has
        a gap of hours."""
        recent = [r for r in self.records if r["summary"] and "total_seconds" in r["summary"]][-PACE:]
        if not recent:
            return None
        times = [(r["start"], r["end"]) for r in self.records[-PACE - 1 :] if r["start"] and r["end"]]
        times = [tuple(map(datetime.fromisoformat, pair)) for pair in times]
        gaps = [max(0.0, (b[0] - a[1]).total_seconds()) for a, b in zip(times, times[1:], strict=False)]
        total, training = (verdict.mean([r["summary"][key] for r in recent]) for key in ("total_seconds", "training_seconds"))
        return total + (median(gaps) if gaps else 0.0), training


# ---------------------------------------------------------------------------------------------------
# What the rule receives


class Replay:
    """Replays records one after the other, oldest first: `search` is the verdict.Search of those that were added (None
    before the first complete run of a baseline), `line` has the records of the keeps that it consists of.

    records: all that will be added; they need not be complete yet."""

    def __init__(self, records):
        self.search, self.line, self.runs = None, [], {}
        self.run_ids = {r["run_id"] for r in records}
        self.code_of = {r["commit"]: r["code"] for r in records}

    def kept(self, r):
        """Whether the record says that its commit was kept, at least up to a later step back."""
        return r["verdict"] == "keep" or str(r.get("given_up")) in self.run_ids

    def on_tip(self, r):
        return bool(self.line) and self.code_of.get(str(r["parent"])) == self.line[-1]["code"]

    def counted(self, r):
        """val_bpb of the runs of this code that count, r's included."""
        own = self.runs.get(r["code"], [])
        return [other["summary"]["val_bpb"] for other in measured(own if own and own[-1] is r else [*own, r])]

    def add(self, r):
        """A record that decides an experiment has a row. One of the same code without a row is another run of a keep; if
        its verdict is discard, the branch stepped back from that keep, whose row then says `given_up`: it counts as a keep
        up to there. Crashes are left out: they measured nothing. So is a second run under a seed that the code has run
        under, which two members of a team may make at the same time."""
        if not is_measurement(r):
            return
        own, line = self.runs.setdefault(r["code"], []), self.line
        own.append(r)
        codes, kept = [keep["code"] for keep in line], self.kept(r)
        if not line or r["baseline"] and r["code"] == codes[0] and not line[0]["row"]:
            if r["baseline"] or kept:  # without its baseline a damaged log begins with its first keep
                self.search, self.line = verdict.begin([other["summary"]["val_bpb"] for other in own]), [r]
        elif r["row"] and r["verdict"] in ("keep", "discard"):
            self.search = verdict.ended(self.search, self.counted(r), kept, bool(r.get("simpler")), self.on_tip(r))
            self.line = [*line, r] if kept else line
        elif r["code"] in codes and r["verdict"] in ("keep", "discard"):
            self.search = verdict.remeasured(self.search, r["summary"]["val_bpb"], codes[::-1].index(r["code"]))
            if r["verdict"] == "discard" and r["code"] == codes[-1] and len(line) > 1:
                self.search, self.line = verdict.stepped_back(self.search), line[:-1]


def replay(records):
    """(verdict.Search, the records of the keeps in its line) of the records of a branch, or of a team, oldest first."""
    whole = Replay(records)
    for r in records:
        whole.add(r)
    return whole.search, whole.line


def is_measurement(r):
    """Whether the record is of a complete run that counts."""
    return r["summary"] is not None and not r.get("same_seed")


def kind(header):
    """What two values must share to be compared: hardware, data set, rules (which include the budget), data."""
    if not header:
        return None
    return [header.get(key) for key in ("device", "dataset", "rules_sha256", "data_sha256")]


def measured(runs):
    """The runs of an experiment that count: those that the machine slowed are ignored once there is one that it did not
    slow. The choice depends on speed and not on value, so it adds no bias."""
    return not_slowed(runs) or list(runs)


def not_slowed(runs):
    return [r for r in runs if (r.get("slowed") or 0.0) <= SLOWED]


def steps_per_second(run):
    """Steps per second of a complete run; 0.0 if it did not train."""
    seconds = run["summary"]["training_seconds"]
    return run["summary"].get("num_steps", 0) / seconds if seconds > 0 else 0.0


def label(r):
    """What to call a record's experiment: its row, in a team the tree and the row there, and without a row its commit."""
    return r.get("label") or (f"row {r['row']:04d}" if r["row"] else r["short"])


def kept_record(experiment):
    """The record by which it was kept; None if runs.jsonl does not have it."""
    return next((r for r in experiment.runs if r["verdict"] == "keep" and r["row"]), None)


def speed(runs):
    """Mean tokens per second of these runs, as counted, or by the summary's rounded number; None if it is unknown."""
    speeds = [
        (r.get("tokens") or r["summary"]["total_tokens_M"] * 1e6) / r["summary"]["training_seconds"]
        for r in runs
        if r["summary"]["training_seconds"] > 0 and r["summary"]["total_tokens_M"] > 0
    ]
    return verdict.mean(speeds) if speeds else None


# ---------------------------------------------------------------------------------------------------
# From disk


def runs_by_row(rows, records):
    """For each row the records of its commit, oldest first. If several rows have the same commit, each gets the records
    of its own row number."""
    by_commit = {}
    lengths = {len(row["commit"]) for row in rows if len(row["commit"]) >= 4}
    for r in records:
        for length in lengths:
            by_commit.setdefault(r["commit"][:length], []).append(r)
    times = Counter(row["commit"] for row in rows)
    return [
        tuple(r for r in by_commit.get(row["commit"], []) if times[row["commit"]] == 1 or r["row"] == i)
        for i, row in enumerate(rows, 1)
    ]


def archive_of(tree, commit, i):
    if not re.fullmatch(r"[0-9a-f]{4,40}", commit):
        return None
    place = tree / names.RUNS / f"{i:04d}-{commit}"
    return place if place.is_dir() else None


def read_night(tree, results=None):
    """The Night of a working tree. results: the table, if it is not the tree's own results.tsv; runs.jsonl is looked
    for beside it.

    A table that is missing or empty is a night without experiments. Raises Refused, with one line, for a file that
    is not a results.tsv."""
    tree = Path(tree)
    path = tree / names.RESULTS_TSV if results is None else Path(results)
    rows, notes = results_tsv.parse(results_tsv.text_of(path), path)
    records, more = runs_jsonl.read_sound(path.parent / names.RUNS_JSONL)
    runs = runs_by_row(rows, records)
    if rows and not any(runs):  # left over from another night
        records = []
    experiments = []
    for i, (row, own) in enumerate(zip(rows, runs, strict=True), 1):
        status = results_tsv.status(row["status"])
        crash = status == "crash"
        experiments.append(Experiment(
            i, row["commit"], None if crash else results_tsv.number(row["val_bpb"]),
            None if crash else results_tsv.number(row["memory_gb"]), status, row["description"], own,
            archive_of(tree, row["commit"], i),
        ))  # fmt: skip
    return Night(experiments, records, tree, (*notes, *more))
