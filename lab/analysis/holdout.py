"""Whether a night fits its validation rows: the gap between the gains on val and on the holdout, over the kept commits in
order. Pure functions of numbers, and the reader of audit.tsv.

A branch that is selected hundreds of times on one validation set overfits it: part of each gain is then on val alone.
Both scores are of the same checkpoint, so the noise of training is in both and the gap is steadier than either gain.
"""

import csv
import io
import math

from lab.base.errors import Refused
from lab.store import names, results_tsv

FEWEST = 6  # kept commits: fewer have no trend
SURE = 2  # standard errors by which the later half must exceed the earlier one


def widening(gaps):
    """(mean gap of the earlier half, of the later half) if it widens, else None. gaps: of the kept commits, in order.

    The noise is estimated from successive differences, which a slow trend hardly changes (von Neumann et al. 1941)."""
    n = len(gaps)
    if n < FEWEST:
        return None
    half = n // 2
    early, late = sum(gaps[:half]) / half, sum(gaps[half:]) / (n - half)
    squares = sum((b - a) ** 2 for a, b in zip(gaps, gaps[1:], strict=False)) / (2 * (n - 1))
    return (early, late) if late - early > SURE * math.sqrt(squares * (1 / half + 1 / (n - half))) else None


def sentence(gaps):
    """The sentence about the gaps, for the audit and the notebook; None if there are no gaps."""
    if not gaps:
        return None
    if found := widening(gaps):
        return (
            f"the gap between the gains on val and holdout widens: {found[0]:+.6f} in the earlier half of the kept commits, "
            f"{found[1]:+.6f} in the later half. The branch is fitting the validation rows"
        )
    if len(gaps) < FEWEST:
        return f"gap between the gains on val and holdout: {gaps[-1]:+.6f} at the last kept commit, too few to see a trend"
    return f"the gap between the gains on val and holdout does not widen: {gaps[-1]:+.6f} at the last kept commit"


def read_gaps(tree):
    """The gaps in a tree's audit.tsv, in the order of its rows; [] if there is no such file or no scores in it."""
    try:
        text = results_tsv.text_of(tree / names.AUDIT_TSV)
    except Refused:
        return []
    rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    pairs = [(number(row.get("val_gain")), number(row.get("holdout_gain"))) for row in rows]
    return [val - holdout for val, holdout in pairs if val is not None and holdout is not None]


def number(text):
    """The finite number that a cell shows, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
