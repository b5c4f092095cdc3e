"""A night as it lies on disk: the one reader of results.tsv, for the notebook and the dashboard.

    night = read_night(Path("."))        results.tsv of any harness; runs.jsonl and runs/ where they are there

It asks neither git nor a run, and writes nothing. Lower val_bpb is better. A crash is missing data: its 0.000000 is
never taken for a value.
"""

import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lab import results, tsv
from lab.errors import os_reason
from lab.history import History
from lab.status import pace

RECORD = {"run_id", "tag", "commit", "short", "row", "verdict", "description", "baseline", "code", "parent", "header",
          "summary", "mean", "n", "start", "end"}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    number: int  # of its row in results.tsv, from 1
    commit: str  # as the row has it, mostly short
    val_bpb: float | None  # None for a crash, and for what is no finite positive number
    memory_gb: float | None  # None where it is unknown, which a run on a CPU writes as 0.0
    status: str  # keep, discard, crash; or as another harness wrote it ("ok")
    description: str  # one line of plain text
    runs: tuple[dict, ...]  # the records in runs.jsonl of this commit, oldest first
    archive: Path | None  # runs/NNNN-<commit>/, where it exists

    @property
    def kept(self):
        return self.status == "keep" and self.val_bpb is not None

    @property
    def training_minutes(self):
        """Of all its complete runs; None where there are none in runs.jsonl."""
        seconds = [r["summary"]["training_seconds"] for r in self.runs if r["summary"]]
        return sum(seconds) / 60 if seconds else None


@dataclass(frozen=True)
class Night:
    tree: Path
    experiments: tuple[Experiment, ...]
    sigma: float | None = None  # noise of one run, in val_bpb; None where runs.jsonl tells of no repeat
    runs_per_hour: float | None = None  # repeats count
    notes: tuple[str, ...] = ()  # what could not be read: line number and why

    @property
    def baseline(self):
        """The first experiment that is not a crash; None where there is none. This is the definition."""
        return next((e for e in self.experiments if e.val_bpb is not None), None)

    @property
    def standing(self):
        """What may be the best: the kept ones and the baseline, in order. A baseline that was itself discarded
        stands only where nothing was kept."""
        kept = [e for e in self.experiments if e.kept]
        baseline = self.baseline
        if baseline and not baseline.kept and not (kept and baseline.status == "discard"):
            kept = [baseline, *kept]
        return tuple(kept)

    @property
    def best(self):
        """The lowest of those that stand, the first of equals; None before there is one."""
        return min(self.standing, key=lambda e: e.val_bpb, default=None)

    def running_best(self):
        """For each experiment the lowest val_bpb that stood once it was done; None before there was one."""
        standing, best, line = {e.number for e in self.standing}, None, []
        for e in self.experiments:
            if e.number in standing:
                best = e.val_bpb if best is None else min(best, e.val_bpb)
            line.append(best)
        return line

    def gains(self):
        """(kept experiment, how far it is below the best before it) in order; below 0 for a simplification that
        costs a little. The first of a night has nothing before it and is not listed."""
        before = [None, *self.running_best()]
        pairs = zip(self.experiments, before[:-1], strict=True)
        return [(e, best - e.val_bpb) for e, best in pairs if e.kept and best is not None]


# ---------------------------------------------------------------------------------------------------
# runs.jsonl


def instant(text):
    """Whether the text is a time with its zone, or there is none."""
    try:
        return text is None or datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # NaN is not


def sound(record):
    """Whether a record is as lab record writes them: no reader after this has to doubt its fields."""
    summary, header = record.get("summary"), record.get("header")
    return (
        RECORD <= record.keys()
        and all(isinstance(record[key], str) for key in ("run_id", "tag", "commit", "verdict", "code"))
        and (record["row"] is None or isinstance(record["row"], int))
        and (header is None or isinstance(header, dict))
        and instant(record["start"]) and instant(record["end"])
        and (summary is None or isinstance(summary, dict) and is_number(summary.get("val_bpb"))
             and all(is_number(summary.get(key)) for key in ("training_seconds", "total_tokens_M", "peak_vram_mb")))
    )  # fmt: skip


def read_records(path):
    """(sound records of the branch that the file speaks of last, notes)"""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a reader of a pipe would wait for ever
            return [], ["runs.jsonl cannot be read: it is no file"]
        records, foreign = results.read_runs(path)
    except OSError as error:
        return [], [f"runs.jsonl cannot be read: {os_reason(error)}"]
    good = [r for r in records if sound(r)]
    bad = len(foreign) + len(records) - len(good)
    notes = [f"runs.jsonl: {bad} line{'s are' if bad > 1 else ' is'} no record of a run; left out"] * bool(bad)
    return [r for r in good if r["tag"] == good[-1]["tag"]], notes


def runs_by_row(rows, records):
    """For each row the records of its commit, oldest first. A commit in several rows is told apart by their number."""
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


# ---------------------------------------------------------------------------------------------------
# The night


def archive_of(tree, commit, i):
    if not re.fullmatch(r"[0-9a-f]{4,40}", commit):
        return None
    place = tree / "runs" / f"{i:04d}-{commit}"
    return place if place.is_dir() else None


def read_night(tree, results=None):
    """The Night of a working tree. results: the table, where it is not the tree's own results.tsv; runs.jsonl is
    looked for beside it.

    A table that is missing or empty is a night without experiments. Raises Refused, with one line, for a file that
    is no results.tsv."""
    tree = Path(tree)
    path = tree / "results.tsv" if results is None else Path(results)
    rows, notes = tsv.parse(tsv.text_of(path), path)
    records, more = read_records(path.parent / "runs.jsonl")
    runs = runs_by_row(rows, records)
    if rows and not any(runs):  # what is left of another night
        records = []
    experiments = []
    for i, (row, own) in enumerate(zip(rows, runs, strict=True), 1):
        status = tsv.status(row["status"])
        crash = status == "crash"
        experiments.append(Experiment(
            i, row["commit"], None if crash else tsv.number(row["val_bpb"]),
            None if crash else tsv.number(row["memory_gb"]), status, row["description"], own,
            archive_of(tree, row["commit"], i),
        ))  # fmt: skip
    sigma = History(records).noise().sigma if records else None
    return Night(tree, tuple(experiments), sigma, pace(records) if records else None, (*notes, *more))
