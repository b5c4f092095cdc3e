"""The text of a results.tsv as rows of plain text, whoever wrote it; nights.py makes a night of them.

Known from the field: a byte order mark, CRLF, quotes as a spreadsheet puts them, blank and ragged lines, columns in
another order or beside others, bytes that are no UTF-8, a status in capitals, a word in the place of a number.
"""

import re
import stat
import unicodedata

from lab import results
from lab.errors import Refused, os_reason

LONGEST = 64 * 2**20  # bytes: no results.tsv is longer
SMALLEST, LARGEST = 1e-6, 1e6  # bits per byte, or GB
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
STATUSES = {s: s for s in results.STATUSES} | {"kept": "keep", "discarded": "discard", "crashed": "crash"}
TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reverse the text that follows


def plain(text):
    """One line of text: no control characters, nothing that turns the direction of what follows."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text if c not in TURNS)
    return text.strip()


def unquoted(field):
    """The field without the quotes that a writer of .tsv puts round one that holds quotes."""
    field = field.strip()
    inner = field[1:-1]
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return field


def fields_of(line):
    return [plain(unquoted(field)) for field in line.split("\t")]


def number(text):
    """The positive number that the text is, or None; what no run can measure is none."""
    value = float(text) if NUMBER.fullmatch(text) else 0.0
    return value if SMALLEST <= value <= LARGEST else None


def status(text):
    """keep, discard and crash however they are spelled; another harness's word as it is."""
    return STATUSES.get(text.lower(), text)


def text_of(path):
    """The text of results.tsv; "" where there is none. Refuses what is no text file."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise Refused(f"{path} is no file: a results.tsv is wanted")
        if info.st_size > LONGEST:
            raise Refused(f"{path} has {info.st_size >> 20} MB: no results.tsv is that large")
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Refused(f"cannot read {path}: {os_reason(error) if isinstance(error, OSError) else error}") from None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(encoding, "replace").replace("\r\n", "\n")
    if "\0" in text:
        raise Refused(f"{path} is binary, no text: is this a results.tsv?")
    return text if "\n" in text else text.replace("\r", "\n")


def parse(text, path):
    """([fields of a row by column], notes) of the text of a results.tsv. Columns may stand in any order, beside
    others. Refuses a text without the five columns."""
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return [], []
    columns, notes = [name.lower() for name in fields_of(lines[0][1])], []
    if results.is_row(lines[0][1]):
        columns, notes = results.COLUMNS, ["line 1: a row, where the names of the columns are expected"]
    else:
        lines = lines[1:]
    if missing := [name for name in results.COLUMNS if name not in columns]:
        raise Refused(f"{path}: there is no column {', '.join(missing)}: is this a results.tsv?")
    place = {name: columns.index(name) for name in results.COLUMNS}
    needed = max(place[name] for name in results.COLUMNS[:4])
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
