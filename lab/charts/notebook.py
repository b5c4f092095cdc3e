"""What analysis.ipynb says of a night: sentences and tables. The numbers come from lab.analysis.history."""

import html
import os
from collections import Counter
from datetime import datetime
from pathlib import Path

from lab.analysis.history import read_night
from lab.base.errors import Stop, os_reason
from lab.charts import figures, view
from lab.store import results_tsv

HITS = 15  # rows of the table of gains
NOTES = 10  # lines that could not be read, of which each is told


class InNotebook(Stop):
    """A failure that a notebook shows as its sentence, without a trace."""

    def _render_traceback_(self):  # IPython asks for this
        return [str(self)]


class Table:
    """Rows of text, as HTML in a notebook and in columns elsewhere. Everything in them is plain text."""

    def __init__(self, caption, columns, rows):
        self.caption, self.columns, self.rows = caption, columns, [[str(cell) for cell in row] for row in rows]

    def __repr__(self):
        lines = [self.columns, *self.rows] if self.rows else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        told = [
            "  ".join(c.rjust(w) for c, w in zip(line[:-1], widths, strict=False)) + f"  {line[-1]}" for line in lines
        ]
        return "\n".join([self.caption, *told])

    def _repr_html_(self):
        def row(tag, cells):
            left = ["right"] * (len(cells) - 1) + ["left"]
            told = zip(cells, left, strict=True)
            return (
                "<tr>" + "".join(f'<{tag} style="text-align:{a}">{html.escape(c)}</{tag}>' for c, a in told) + "</tr>"
            )

        caption = f"<p>{html.escape(self.caption)}</p>"
        if not self.rows:
            return caption
        lines = [row("th", self.columns), *(row("td", cells) for cells in self.rows)]
        # The class tells a notebook's MathJax that a $ in a description is a dollar.
        return f'<div class="tex2jax_ignore mathjax_ignore">{caption}<table>{"".join(lines)}</table></div>'


def load(tree="."):
    """The Night of the tree. Prints what could not be read; a file that is no results.tsv ends the notebook."""
    try:
        night = read_night(Path(tree))
    except Stop as stop:
        raise InNotebook(str(stop)) from None
    more = len(night.notes) - NOTES
    for note in [*night.notes[:NOTES], *([f"and {more} more lines"] if more > 0 else [])]:
        print(f"note: {note}")
    return night


def save(figure, path):
    """Writes the picture to the path, whole or not at all; its bytes, to be shown."""
    path, picture = Path(path), figures.png(figure)
    beside = path.with_name(f"{path.name}.tmp")
    try:
        beside.write_bytes(picture)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InNotebook(f"{path} is not written: {os_reason(error)}") from None
    return picture


def plural(n, what):
    return f"{n} {what}{'s' * (n != 1)}"


# ---------------------------------------------------------------------------------------------------
# The sections of the notebook


def outcomes(night):
    """Counts, keep rate, baseline and best."""
    counts = Counter(e.status.lower() or "no status" for e in night.experiments)
    order = [*(s for s in results_tsv.STATUSES if s in counts), *sorted(counts.keys() - set(results_tsv.STATUSES))]
    told = ", ".join(f"{counts[s]} {s}" for s in order)
    lines = [f"{plural(len(night.experiments), 'experiment')}: {told or 'results.tsv is missing or empty'}"]
    tried = [e for e in night.experiments if e is not night.baseline]
    if tried:
        kept = sum(e.kept for e in tried)
        lines.append(f"kept: {kept} of {len(tried)} after the baseline ({kept / len(tried):.0%})")
    if base := night.baseline:
        lines.append(f"baseline: {base.val_bpb:.6f} (row {base.number}, the first that is not a crash)")
        best, sigma = night.best, night.sigma
        gain = base.val_bpb - best.val_bpb
        in_sigma = f" = {gain / sigma:.1f}σ" if sigma else ""
        lines.append(
            f"best: {best.val_bpb:.6f} (row {best.number}, {best.commit}), {gain:.6f}{in_sigma} below the baseline"
        )
        lines.append(
            f"noise of one run: {f'σ {sigma:.6f}' if sigma else 'not known, as runs.jsonl tells of no repeat'}"
        )
    elif night.experiments:
        lines.append(view.NOTHING)
    return "\n".join(lines)


def hits(night):
    """The largest gains over the best before them."""
    found = sorted((pair for pair in night.gains() if pair[1] > 0), key=lambda pair: -pair[1])
    columns = ["row", "commit", "val_bpb", "gain", *(["in σ"] if night.sigma else []), "description"]
    rows = [
        [e.number, e.commit, f"{e.val_bpb:.6f}", f"{gain:.6f}",
         *([f"{gain / night.sigma:.1f}"] if night.sigma else []), e.description]
        for e, gain in found[:HITS]
    ]  # fmt: skip
    which = f"the {HITS} largest of {len(found)} gains" if len(found) > HITS else plural(len(found), "gain")
    return Table(f"{which} over the best before" if found else "nothing was gained yet", columns, rows)


def effort(night):
    """What each gain cost: experiments since the gain before it, its own included, and their minutes of training."""
    gains = {e.number: gain for e, gain in night.gains() if gain > 0}
    timed = any(e.runs for e in night.experiments)
    rows, since, total = [], [], []
    for e in night.experiments:
        if e is night.baseline:
            since = []
            continue
        since.append(e)
        if e.number in gains:
            minutes = sum(s.training_minutes or 0 for s in since)
            rows.append([e.number, len(since), *([f"{minutes:.0f}"] if timed else []), f"{gains[e.number]:.6f}",
                         e.description])  # fmt: skip
            total, since = [*total, *since], []
    caption = "nothing was gained yet"
    if rows:
        minutes = sum(s.training_minutes or 0 for s in total) / len(rows)
        each = f"{len(total) / len(rows):.1f} experiments" + (
            f" and {minutes:.0f} minutes of training" if timed else ""
        )
        caption = f"{plural(len(rows), 'gain')}, each at the cost of {each}"
    after = (
        f"; {plural(len(since), 'experiment')} since the last" if rows else f" in {plural(len(since), 'experiment')}"
    )
    return Table(caption + after, ["row", "experiments", *(["minutes"] if timed else []), "gain", "description"], rows)


def pace(night):
    """Experiments and runs an hour, and how much of the time was training."""
    runs = [r for e in night.experiments for r in e.runs]
    times = [datetime.fromisoformat(r[key]) for r in runs for key in ("start", "end") if r[key]]
    hours = (max(times) - min(times)).total_seconds() / 3600 if times else 0
    if not hours:
        return "experiments an hour: not known, as runs.jsonl tells of no run of theirs"
    ran = sum(bool(e.runs) for e in night.experiments)
    training = sum(e.training_minutes or 0 for e in night.experiments) / 60
    return (
        f"{ran / hours:.1f} experiments an hour: {plural(ran, 'experiment')} in {plural(len(runs), 'run')} and "
        f"{hours:.2f} hours, of which {training / hours:.0%} was training"
    )
