"""results.tsv: one row per commit. Written from the records of runs.jsonl; read tolerantly, as other tools may have
written it.

Seen in real files: a byte order mark, CRLF, quotes as a spreadsheet writes them, blank and ragged lines, columns in
another order or beside others, bytes that are not UTF-8, a status in capitals, a word instead of a number.
"""

import re
import stat
from pathlib import Path

from lab.base.errors import Refused, os_reason
from lab.base.files import write
from lab.base.text import one_line, printable

COLUMNS = ["commit", "val_bpb", "memory_gb", "status", "description"]
STATUSES = ["keep", "discard", "crash"]
DESCRIPTION = 200  # characters in results.tsv; runs.jsonl has LONG_DESCRIPTION
LONG_DESCRIPTION = 2000

# ---------------------------------------------------------------------------------------------------
# Writing

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
    """Writes results.tsv. If it holds lines that do not follow from the records (written by hand, another header), it is
    copied to the folder `aside` first. Returns the copy's path, or None."""
    text, path = table(records), Path(path)
    try:
        old = path.read_bytes()
    except FileNotFoundError:
        old = b""
    lines = old.decode("utf-8", "replace").replace("\r\n", "\n").lstrip("\ufeff").split("\n")
    # A row that replaced another one (a kill, a closed confirm) is known by its commit.
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


# ---------------------------------------------------------------------------------------------------
# Reading

LONGEST = 64 * 2**20  # bytes: no results.tsv is longer
SMALLEST, LARGEST = 1e-6, 1e6  # bits per byte, or GB
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
SPELLINGS = {s: s for s in STATUSES} | {"kept": "keep", "discarded": "discard", "crashed": "crash"}


def unquoted(field):
    """The field without the quotes that a writer of .tsv puts around a field with quotes in it."""
    field = field.strip()
    inner = field[1:-1]
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return field


def fields_of(line):
    return [printable(unquoted(field)).strip() for field in line.split("\t")]


def number(text):
    """The text as a positive number that a run can measure, or None."""
    value = float(text) if NUMBER.fullmatch(text) else 0.0
    return value if SMALLEST <= value <= LARGEST else None


def status(text):
    """keep, discard or crash, however it is spelled; another harness's word unchanged."""
    return SPELLINGS.get(text.lower(), text)


def text_of(path):
    """The text of results.tsv; "" if there is no such file. Refuses anything but a text file."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise Refused(f"{path} is not a file: give a results.tsv")
        if info.st_size > LONGEST:
            raise Refused(f"{path} has {info.st_size >> 20} MB, which is too large for a results.tsv")
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Refused(f"cannot read {path}: {os_reason(error) if isinstance(error, OSError) else error}") from None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(encoding, "replace").replace("\r\n", "\n")
    if "\0" in text:
        raise Refused(f"{path} is binary, not text: is this a results.tsv?")
    return text if "\n" in text else text.replace("\r", "\n")


def parse(text, path):
    """([fields of a row by column], notes) of the text of a results.tsv. Columns may be in any order, among others.
    Refuses a text without the five columns."""
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return [], []
    columns, notes = [name.lower() for name in fields_of(lines[0][1])], []
    if is_row(lines[0][1]):
        columns, notes = COLUMNS, ["line 1: a row, where the names of the columns are expected"]
    else:
        lines = lines[1:]
    if missing := [name for name in COLUMNS if name not in columns]:
        raise Refused(f"{path}: there is no column {', '.join(missing)}: is this a results.tsv?")
    place = {name: columns.index(name) for name in COLUMNS}
    needed = max(place[name] for name in COLUMNS[:4])
    rows = []
    for i, line in lines:
        fields = fields_of(line)
        if [field.lower() for field in fields] == columns:
            notes.append(f"line {i}: the names of the columns once more; left out")
            continue
        if len(fields) <= needed:
            notes.append(f"line {i}: {len(fields)} of {len(columns)} fields; left out")
            continue
        while len(fields) > len(columns) and not fields[-1]:
            fields.pop()
        if len(fields) > len(columns) and place["description"] == len(columns) - 1:
            fields[len(columns) - 1 :] = [" ".join(fields[len(columns) - 1 :])]
            notes.append(f"line {i}: more fields than columns; the last ones are taken for the description")
        elif len(fields) != len(columns):
            notes.append(f"line {i}: {len(fields)} of {len(columns)} fields")
        rows.append({name: fields[at] if at < len(fields) else "" for name, at in place.items()})
    return rows, notes
