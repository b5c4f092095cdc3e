"""runs.jsonl: one JSON object per run, repeats included. It is the truth from which results.tsv follows."""

import json
from datetime import datetime
from pathlib import Path

from lab.base.errors import os_reason
from lab.base.files import write

FIELDS = {"run_id", "tag", "commit", "short", "row", "verdict", "description", "baseline", "code", "parent", "header",
          "summary", "mean", "n", "start", "end"}  # fmt: skip
LARGEST = 1e15  # far above anything measured, and exact as a float


def read_runs(path):
    """(records, lines that are not records). A last line cut short by a kill is left out."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], []
    *lines, last = text.split("\n")  # last: empty, or cut short
    records, foreign = [], []
    for line in lines + [last] * last.endswith("}"):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and {"run_id", "tag", "commit", "verdict"} <= record.keys():
            records.append(record)
        elif line.strip() and line is not last:
            foreign.append(line)
    return records, foreign


def merged(records, changed):
    """The records, each changed one replacing the one with its run_id, or appended."""
    found = {record["run_id"]: record for record in records}
    return list((found | {record["run_id"]: record for record in changed}).values())


def save_runs(path, changed):
    records, foreign = read_runs(path)
    lines = foreign + [json.dumps(record, ensure_ascii=False) for record in merged(records, changed)]
    write(path, "".join(f"{line}\n" for line in lines))


# ---------------------------------------------------------------------------------------------------
# For readers that show a night: damaged lines are left out and named


def instant(text):
    """Whether the text is a time with a time zone, or None."""
    try:
        return text is None or datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def is_number(value):
    """Whether it is a finite number that a run can measure; NaN fails the comparison."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def sound(record):
    """Whether a record is as lab record writes it, so that readers need not check its fields."""
    summary, header = record.get("summary"), record.get("header")
    return (
        FIELDS <= record.keys()
        and all(isinstance(record[key], str) for key in ("run_id", "tag", "commit", "verdict", "code"))
        and (record["row"] is None or isinstance(record["row"], int))
        and (header is None or isinstance(header, dict))
        and instant(record["start"]) and instant(record["end"])
        and (summary is None or isinstance(summary, dict) and is_number(summary.get("val_bpb"))
             and all(is_number(summary.get(key)) for key in ("training_seconds", "total_tokens_M", "peak_vram_mb")))
    )  # fmt: skip


def read_sound(path):
    """(sound records of the branch of the file's last record, notes)"""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would block for ever
            return [], ["runs.jsonl cannot be read: it is not a file"]
        records, foreign = read_runs(path)
    except OSError as error:
        return [], [f"runs.jsonl cannot be read: {os_reason(error)}"]
    good = [r for r in records if sound(r)]
    bad = len(foreign) + len(records) - len(good)
    notes = [f"runs.jsonl: {bad} line{'s are' if bad > 1 else ' is'} no record of a run; left out"] * bool(bad)
    return [r for r in good if r["tag"] == good[-1]["tag"]], notes
