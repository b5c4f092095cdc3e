"""runs.jsonl: one JSON object per run, repeats included. results.tsv is derived from it."""

import json
import os
import re

from lab.base.errors import os_reason
from lab.base.files import write
from lab.base.text import json_of
from lab.store import run_log
from lab.store.run_log import is_number

FIELDS = {"run_id", "tag", "commit", "short", "row", "verdict", "description", "baseline", "code", "parent", "header",
          "summary", "mean", "n", "start", "end"}  # fmt: skip
KEYS = ("run_id", "tag", "commit", "verdict")  # without these a line is not a record at all
VERDICTS = ("keep", "discard", "crash", "confirm", "elsewhere")  # the last: another tree of the team decides it
SHORT = re.compile(r"[0-9a-f]{4,64}")
_last = {}  # path: (inode, size and time of the file, what was in it); one `lab record` reads it a dozen times
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def read_runs(path):
    """(records, lines that are not records). A last line cut short by a kill is left out."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            info = os.fstat(f.fileno())
            stamp = info.st_ino, info.st_size, info.st_mtime_ns
            if stamp != _last.get(str(path), (None,))[0]:
                _last[str(path)] = stamp, parse(f.read())
    except FileNotFoundError:
        return [], []
    records, foreign = _last[str(path)][1]
    return list(records), list(foreign)


def parse(text):
    """(records, lines that are not records) of the text of the file."""
    *lines, last = text.split("\n")  # last: empty, or cut short
    records, foreign = [], []
    for line in lines + [last] * last.endswith("}"):
        try:
            record = json_of(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in KEYS):
            records.append(record)
        elif line.strip() and line is not last:
            foreign.append(line)
    return records, foreign


def whole(record):
    """Whether a record has all fields that `lab record` writes, with the right types, so that a verdict can rely on
    it."""
    try:
        header, summary, crash = record["header"], record["summary"], record["verdict"] == "crash"
        return (
            all(isinstance(record[key], str) for key in (*KEYS, "log", "short", "description", "why", "code", "blob", "ended"))
            and all(isinstance(record[key], bool) for key in ("discard", "simpler", "baseline"))
            and all(isinstance(record[key], int) and 0 <= record[key] < 1e9 for key in ("n", "dof"))
            and all(record[key] is None or is_number(record[key]) for key in ("mean", "gain", "best_known", "sigma"))
            and newer(record)
            and is_number(record["memory_gb"]) and instant(record["start"]) and instant(record["end"])
            and record["verdict"] in VERDICTS and COMMIT.fullmatch(record["commit"]) is not None
            and SHORT.fullmatch(record["short"]) is not None
            and (record["parent"] is None or COMMIT.fullmatch(record["parent"]) is not None)
            and (record["row"] is None or type(record["row"]) is int and 0 < record["row"] < 1e9)
            and (header is None or isinstance(header, dict) and run_log.is_header(header))
            and (summary is None or all(is_number(summary[key]) for key in run_log.SUMMARY) and summary["val_bpb"] > 0)
            and (crash or header is not None and summary is not None and record["mean"] is not None)
        )  # fmt: skip
    except (KeyError, TypeError):
        return False


def newer(record):
    """Whether the fields that older records lack have the right types."""
    curve = record.get("curve")
    numbers = all(record.get(key) is None or is_number(record[key]) for key in ("slowed", "tokens"))
    return numbers and (curve is None or run_log.is_curve(curve))


def merged(records, changed):
    """The records, each changed one replacing the one with its run_id, or appended."""
    found = {record["run_id"]: record for record in records}
    return list((found | {record["run_id"]: record for record in changed}).values())


def save_runs(path, runs):
    """Writes these records in their order, below what else the file holds."""
    records, foreign = read_runs(path)
    ours = {record["run_id"] for record in runs}
    others = [record for record in records if record["run_id"] not in ours]
    write(path, "".join(f"{line}\n" for line in [*foreign, *map(line_of, [*others, *runs])]))


def line_of(record):
    """A record as a line of the file, without the line break."""
    return json.dumps(record, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------
# For readers that show a night: damaged lines are left out and named


def instant(text):
    """Whether the text is a time with a time zone, or None."""
    return text is None or run_log.is_time(text)


def sound(record):
    """Whether a record is as lab record writes it, so that readers need not check its fields."""
    summary, header = record.get("summary"), record.get("header")
    return (
        FIELDS <= record.keys()
        and all(isinstance(record[key], str) for key in ("run_id", "tag", "commit", "verdict", "code"))
        and (record["row"] is None or isinstance(record["row"], int))
        and (record["parent"] is None or isinstance(record["parent"], str))
        and (header is None or isinstance(header, dict))
        and instant(record["start"]) and instant(record["end"]) and newer(record)
        and (summary is not None or record["verdict"] not in ("keep", "discard", "confirm", "elsewhere"))
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
