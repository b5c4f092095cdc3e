"""Makes text safe to print on a terminal or a page, shortens it, and aligns it in columns."""

import json
import math
import re
import unicodedata

ANSI = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])")  # colours, cursor moves, titles
BLANK = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"  # controls that separate words or lines
DEPTH = 20  # of JSON; a record has three levels
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they change the direction of the text that follows


def printable(text, keep=""):
    """The text without control characters, direction overrides and lone surrogates (which UTF-8 cannot encode). Control
    characters that separate words become spaces. Those in `keep` stay."""

    def shown(c):
        if c in keep:
            return c
        if c in BLANK:
            return " "
        return "" if c in BIDI or unicodedata.category(c) in ("Cc", "Cs") else c

    return "".join(map(shown, text))


def without_colours(text):
    """The text without ANSI escape sequences."""
    return ANSI.sub("", text)


def one_line(text, limit):
    """The text on one line of at most `limit` characters, without double quotes (many readers of .tsv interpret
    them)."""
    text = " ".join(printable(text).replace('"', "'").split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def finite(text):
    """The number of a JSON text. Raises ValueError for one that is too large, and for NaN and Infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


FINITE = json.JSONDecoder(parse_float=finite, parse_constant=finite)


def json_of(text, decode=json.loads):
    """The value of a JSON text. Raises ValueError for anything that this program never writes: nested deeper than DEPTH
    (to print or write such a value ends in a RecursionError), or with lone surrogates (no file can hold them). decode:
    FINITE.decode refuses numbers that are not finite, too."""
    try:
        value = decode(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if text.count("[") + text.count("{") > DEPTH:
        level, depth = [value], 0
        while level := [v for item in level for v in children(item)]:
            depth += 1
            if depth > DEPTH:
                raise ValueError("JSON that is nested too deeply")
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def children(value):
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def aligned(rows, left=()):
    """The rows (lists of str, of equal length) as lines with aligned columns, two spaces apart. Columns are right-aligned,
    except those whose index is in `left`; the last one is not padded."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = []
    for *cells, last in rows:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        lines.append("  ".join([*padded, last]).rstrip())
    return lines
