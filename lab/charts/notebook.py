"""Sentences and tables of a night for analysis.ipynb. The tables are pandas DataFrames, for further use in other cells.

The numbers come from lab.analysis.history.
"""

from collections import Counter
from datetime import datetime
from pathlib import Path

import pandas as pd

from lab.analysis import holdout
from lab.base import files
from lab.base.errors import Stop, os_reason
from lab.charts import figures, view
from lab.share.team import found_by, read_night
from lab.store import results_tsv

LARGEST = 15  # gains in the table: as many as fit on a page
BRIEF = 80  # characters of a description in a sentence
ROWS = 200  # of a longer table pandas shows the first and the last; a night has about 100 experiments
NOTES = 10  # lines of a broken file that are named one by one


class InNotebook(Stop):
    """A failure that a notebook shows as one sentence, without a traceback."""

    def _render_traceback_(self):  # IPython calls this
        return [str(self)]


def plain_tables():
    """Makes pandas show descriptions as they are: without TeX between two $, and not cut after 50 characters. HTML is
    escaped by default."""
    pd.set_option("display.html.use_mathjax", False)
    pd.set_option("display.max_colwidth", None)
    pd.set_option("display.max_rows", ROWS)
    pd.set_option("display.width", None)
    pd.set_option("display.max_columns", None)
    pd.set_option("display.expand_frame_repr", False)


def load(tree="."):
    """The Night of the tree. Prints which lines could not be read. A file that is not a results.tsv ends the notebook
    with one sentence."""
    plain_tables()
    try:
        night = read_night(Path(tree))
    except Stop as stop:
        raise InNotebook(str(stop)) from None
    more = len(night.notes) - NOTES
    for note in [*night.notes[:NOTES], *([f"and {more} more lines"] if more > 0 else [])]:
        print(f"note: {note}")
    return night


def save(figure, path):
    """Writes the figure to the path as PNG, whole or not at all. Returns its bytes, to be shown."""
    picture = figures.png(figure)
    try:
        files.write(path, picture)
    except OSError as error:
        raise InNotebook(f"{path} is not written: {os_reason(error)}") from None
    return picture


def plural(n, what):
    return f"{n} {what}{'s' * (n != 1)}"


def table(rows, columns):
    """The rows (dicts) as a DataFrame with these columns, indexed by the row number in results.tsv."""
    return pd.DataFrame(rows, columns=["row", *columns]).set_index("row")


# ---------------------------------------------------------------------------------------------------
# The sections of the notebook


def outcomes(night):
    """Counts, fraction of kept experiments, baseline and best."""
    counts = Counter(e.status.lower() or "no status" for e in night.experiments)
    order = [*(s for s in results_tsv.STATUSES if s in counts), *sorted(counts.keys() - set(results_tsv.STATUSES))]
    each = ", ".join(f"{counts[s]} {s}" for s in order)
    lines = [f"{plural(len(night.experiments), 'experiment')}: {each or 'results.tsv is missing or empty'}"]
    tried = [e for e in night.experiments if e is not night.baseline]
    if tried:
        kept = sum(e.kept for e in tried)
        lines.append(f"kept: {kept} of {len(tried)} after the baseline ({kept / len(tried):.0%})")
    if base := night.baseline:
        best, sigma = night.best, night.sigma
        gain = base.val_bpb - best.val_bpb
        in_sigma = f" = {gain / sigma:.1f}σ" if sigma else ""
        noise = f"σ {sigma:.6f}" if sigma else "not known, because runs.jsonl has no repeated run"
        how = "" if night.by_estimate else "; it is the lowest kept value, as runs.jsonl has no runs to estimate from"
        lines += [
            f"baseline: {base.val_bpb:.6f} (row {base.number}, the first that is not a crash)",
            f"best: {best.val_bpb:.6f} (row {best.number}, {best.commit}), {gain:.6f}{in_sigma} below the baseline{how}",
            f"noise of one run: {noise}",
        ]
        back = [e for e in night.experiments if e.given_up]
        lines += [f"stepped back: row {e.number} ({e.description[:BRIEF]}): {e.given_up}" for e in back]
        lines += filter(None, [holdout.sentence(holdout.read_gaps(night.tree)) if night.tree else None])
    elif night.experiments:
        lines.append(view.NOTHING)
    return "\n".join(lines)


def experiments(night):
    """DataFrame of all experiments. val_bpb is NaN for a crash; minutes are of training, over all runs of the commit;
    runs and minutes are from runs.jsonl. Of a team, tree is who made it."""
    found = found_by(night)
    rows = [
        {"row": e.number, "commit": e.commit, "val_bpb": e.val_bpb, "best": best, "memory_gb": e.memory_gb,
         "status": e.status, "runs": len(e.runs), "minutes": e.training_minutes, "tree": found.get(e.number), "description": e.description}
        for e, best in zip(night.experiments, night.running_best(), strict=True)
    ]  # fmt: skip
    columns = ["commit", "val_bpb", "best", "memory_gb", "status", "runs", "minutes", *(["tree"] if found else []), "description"]
    numbers = {"val_bpb": float, "best": float, "memory_gb": float, "runs": int, "minutes": float}
    return table(rows, columns).astype(numbers).round({"minutes": 1})


def gains(night):
    """DataFrame of the largest gains over the best before them; prints how many there are."""
    found = sorted((pair for pair in night.gains() if pair[1] > 0), key=lambda pair: -pair[1])
    columns = ["commit", "val_bpb", "gain", *(["in σ"] if night.sigma else []), "description"]
    rows = [
        {"row": e.number, "commit": e.commit, "val_bpb": e.val_bpb, "gain": round(gain, 6),
         "in σ": round(gain / night.sigma, 1) if night.sigma else None, "description": e.description}
        for e, gain in found[:LARGEST]
    ]  # fmt: skip
    which = f"the {LARGEST} largest of {len(found)} gains" if len(found) > LARGEST else plural(len(found), "gain")
    print(f"{which} over the best before" if found else "no experiment has gained anything yet")
    return table(rows, columns)


def effort(night):
    """DataFrame of what each gain cost: the experiments since the gain before it, including its own, and their minutes
    of training. Prints the mean."""
    found = {e.number: gain for e, gain in night.gains() if gain > 0}
    timed = any(e.runs for e in night.experiments)
    rows, since = [], []
    for e in night.experiments:
        if e is night.baseline:
            since = []
            continue
        since.append(e)
        if e.number in found:
            minutes = sum(s.training_minutes or 0 for s in since)
            rows.append({"row": e.number, "experiments": len(since), "minutes": round(minutes),
                         "gain": round(found[e.number], 6), "description": e.description})  # fmt: skip
            since = []
    made = table(rows, ["experiments", *(["minutes"] if timed else []), "gain", "description"])
    after = plural(len(since), "experiment")
    if not rows:
        print(f"no gain yet in {after}")
        return made
    minutes = f" and {made['minutes'].mean():.0f} minutes of training" if timed else ""
    print(f"{plural(len(rows), 'gain')}, each at the cost of {made['experiments'].mean():.1f} experiments{minutes}; "
          f"{after} since the last")  # fmt: skip
    return made


def pace(night):
    """Experiments and runs an hour, and the fraction of the time that was training, in the mean over a team's trees."""
    runs = [r for e in night.experiments for r in e.runs]
    times = [datetime.fromisoformat(r[key]) for r in runs for key in ("start", "end") if r[key]]
    hours = (max(times) - min(times)).total_seconds() / 3600 if times else 0
    if not hours:
        return "experiments an hour: not known, because runs.jsonl has no times of their runs"
    ran = sum(bool(e.runs) for e in night.experiments)
    trees = len(set(found_by(night).values())) or 1  # of a team, which train at the same time
    training = sum(e.training_minutes or 0 for e in night.experiments) / 60 / trees
    return (
        f"{ran / hours:.1f} experiments an hour: {plural(ran, 'experiment')} in {plural(len(runs), 'run')} and "
        f"{hours:.2f} hours{f' on {trees} trees' * (trees > 1)}, of which {training / hours:.0%} was training"
    )
