"""results.tsv and runs.jsonl: the night's memory on disk.

runs.jsonl holds one JSON object a run, repeats included, and is the truth. results.tsv, with one row a commit,
follows from it: the runs that carry a "row" number. Both are written beside their place and moved in.
"""

import json
import os
import re
import unicodedata
from pathlib import Path

COLUMNS = ["commit", "val_bpb", "memory_gb", "status", "description"]
STATUSES = ["keep", "discard", "crash"]
DESCRIPTION = 200  # characters in results.tsv; runs.jsonl has LONG_DESCRIPTION
LONG_DESCRIPTION = 2000


def one_line(text, limit):
    """The text on one line: no control characters, no double quotes (many readers of .tsv give them a meaning)."""
    text = text.encode("utf-8", "replace").decode()
    blank = ("Cc", "Zl", "Zp", "Zs")
    text = "".join(" " if unicodedata.category(c) in blank else c for c in text).replace('"', "'")
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def write(path, text):
    """Replaces the file whole or not at all, also through a power cut."""
    path = Path(path)
    beside = path.parent / ".lab" if (path.parent / ".lab").is_dir() else path.parent
    temporary = beside / f"{path.name}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------
# runs.jsonl


def read_runs(path):
    """(records, lines that are none). A last line cut short by a kill is left out."""
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
    """The records with each changed one in place of the one with its run_id, or at the end."""
    found = {record["run_id"]: record for record in records}
    return list((found | {record["run_id"]: record for record in changed}).values())


def save_runs(path, changed):
    records, foreign = read_runs(path)
    lines = foreign + [json.dumps(record, ensure_ascii=False) for record in merged(records, changed)]
    write(path, "".join(f"{line}\n" for line in lines))


# ---------------------------------------------------------------------------------------------------
# results.tsv


def row(record):
    """The five fields of a record's row."""
    crash = record["verdict"] == "crash"
    return [
        record["short"],
        "0.000000" if crash else f"{record['mean']:.6f}",
        "0.0" if crash else f"{record['memory_gb']:.1f}",
        record["verdict"],
        one_line(record["description"], DESCRIPTION),
    ]


def table(records):
    """The text of results.tsv."""
    rows = sorted((r for r in records if r.get("row")), key=lambda r: r["row"])
    return "".join("\t".join(fields) + "\n" for fields in [COLUMNS, *map(row, rows)])


def is_row(line):
    """Whether a line is a row as record writes them."""
    fields = line.split("\t")
    return (
        len(fields) == len(COLUMNS)
        and re.fullmatch(r"[0-9a-f]{4,40}", fields[0]) is not None
        and re.fullmatch(r"\d+\.\d{6}", fields[1]) is not None
        and re.fullmatch(r"\d+\.\d", fields[2]) is not None
        and fields[3] in STATUSES
        and (fields[3] == "crash") == (float(fields[1]) == 0)
        and fields[4].strip() != ""
    )


def save_table(path, records, aside):
    """Writes results.tsv. Where it holds lines that do not follow from the records (written by hand, another
    header), it is copied to the folder `aside` first; the copy's path, or None."""
    text, path = table(records), Path(path)
    try:
        old = path.read_bytes()
    except FileNotFoundError:
        old = b""
    lines = old.decode("utf-8", "replace").replace("\r\n", "\n").lstrip("\ufeff").split("\n")
    # A row that was put in place of another (a kill, a closed confirm) is no stranger: what counts is its commit.
    known = {line.split("\t")[0] for line in text.split("\n")[1:]}
    strange = [ln for ln in lines if ln.strip() and ln != text.split("\n")[0]]
    strange = [ln for ln in strange if not (is_row(ln) and ln.split("\t")[0] in known)]
    copy = None
    if strange:
        copy = next(p for i in range(1, 10**6) if not (p := aside / f"results-{i}.tsv").exists())
        write(copy, old.decode("utf-8", "replace"))
    if old != text.encode():
        write(path, text)
    return copy
