"""The pictures of a night: drawn for paper and notebook (matplotlib), and as plain data for plotly in the dashboard.

    progress_figure(night)    every experiment in order      progress_plotly(night)
    memory_figure(night)      memory against val_bpb         memory_plotly(night)

Both kinds show the same. What is kept is a disc, what is not is faint, what has no value (a crash) is a cross on the
lower edge and never a value. What lies far off is a triangle at the edge of the view: one run that diverged does not
flatten a night. Colours are told apart by the colour-blind too, shapes by all.
"""

import html
from statistics import median
from typing import NamedTuple

FLAT = 20  # a first gain this many times as large as all later ones together is left beyond the edge
NOTHING = "no experiment has a value yet"
WIDTH, LONGEST = 60, 240  # characters a line and in all of a description in the dashboard's charts
# Colours on a page that may be light or dark: contrast at least 3 against white and against near black.
KEPT, OTHER, MISSING = "#2b8cd0", "#8b9099", "#d9601a"
RIM = {"width": 1, "color": "white"}
TEXT, GRID, CLEAR, BAND = "#767b84", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)", "rgba(43,140,208,0.18)"


# ---------------------------------------------------------------------------------------------------
# What is drawn, the same for both


class View(NamedTuple):
    kept: list  # experiments, in order; a baseline that stands is among them
    others: list
    missing: list  # without a value
    low: float  # the range of val_bpb that is shown
    high: float

    def clamped(self, experiment):
        """Its val_bpb, or the edge of the view that it lies beyond."""
        return min(max(experiment.val_bpb, self.low), self.high)

    def beyond(self, experiments):
        return [e for e in experiments if self.clamped(e) != e.val_bpb]


def view(night):
    """The View of a night: the whole way of the running best, and of the rest what lies not too far from it."""
    running = night.running_best()
    numbers = {e.number for e in night.standing}
    kept = [e for e in night.experiments if e.number in numbers]
    missing = [e for e in night.experiments if e.val_bpb is None]
    others = [e for e in night.experiments if e.val_bpb is not None and e.number not in numbers]
    line = sorted({best for best in running if best is not None}, reverse=True)
    while len(line) > 2 and line[0] - line[1] > FLAT * (line[1] - line[-1]):
        del line[0]
    if not line:
        return View(kept, others, missing, 0.0, 1.0)
    top, low, sigma = line[0], line[-1], night.sigma or 0.0
    off = [abs(e.val_bpb - running[e.number - 1]) for e in others if running[e.number - 1] is not None]
    typical = 3 * median(off) if off else 0.0
    most = (
        max(3 * (top - low), 0.02 * top) if top > low else 0.25 * top
    )  # where nothing is gained, nothing is flattened
    reach = max(0.35 * (top - low), 4 * sigma, min(typical, most), 1e-4 * top)
    shown = [e.val_bpb for e in kept + others if low - reach <= e.val_bpb <= top + reach]
    margin = 0.08 * (max(shown) - min(shown)) + 1.5 * sigma + 1e-4 * top
    return View(kept, others, missing, min(shown) - margin, max(shown) + margin)


def band(night):
    """(numbers, values) of the polygon one σ round the running best, as steps; empty where σ is not known."""
    best = [(e.number, value) for e, value in zip(night.experiments, night.running_best(), strict=True) if value]
    if night.sigma is None or not best:
        return [], []
    xs, ys = [best[0][0]], [best[0][1]]
    for x, y in best[1:]:
        xs += [x, x]
        ys += [ys[-1], y]
    xs, ys = [*xs, xs[-1] + 0.5], [*ys, ys[-1]]
    return [*xs, *xs[::-1]], [*(y + night.sigma for y in ys), *(y - night.sigma for y in ys[::-1])]


def name_of_kept(experiments):
    """A baseline that another harness calls "ok" stands like a kept one."""
    kept = sum(e.kept for e in experiments)
    return "kept" if kept == len(experiments) else "kept, and baseline" if kept else "baseline"


def name_of_missing(experiments):
    return "crashed" if all(e.status == "crash" for e in experiments) else "crashed or no value"


def title(night):
    n, seen = len(night.experiments), view(night)
    text = f"{n} experiment{'s' * (n != 1)}, {sum(e.kept for e in seen.kept)} kept"
    if night.best and night.best is not night.baseline:
        text += f": val_bpb {night.baseline.val_bpb:.4f} → {night.best.val_bpb:.4f}"
    return text


# ---------------------------------------------------------------------------------------------------
# matplotlib, which is loaded only where it draws


def progress_figure(night):
    """The matplotlib Figure of every experiment in order."""
    from lab import drawing

    return drawing.progress(night)


def memory_figure(night):
    """The matplotlib Figure of memory against val_bpb."""
    from lab import drawing

    return drawing.memory(night)


def png(figure):
    """The picture as bytes."""
    from lab import drawing

    return drawing.png(figure)


# ---------------------------------------------------------------------------------------------------
# plotly: dictionaries with data and layout, for its script in a page


def escaped(text):
    """The text as plotly shows it letter by letter: it takes <b> and &lt; in texts for markup. Broken into lines."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "…"
    lines = [""]
    for word in text.split():
        while len(word) > WIDTH:
            lines, word = [*lines, word[:WIDTH]], word[WIDTH:]
        if len(lines[-1]) + len(word) < WIDTH:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word)
    return "<br>".join(html.escape(line, quote=False) for line in lines if line)


def points(name, experiments, xs, ys, marker, **more):
    """A trace; customdata of each point: row number, commit, val_bpb as text, status."""
    return {
        "type": "scatter", "mode": "markers", "name": f"{name} ({len(experiments)})", "x": xs, "y": ys,
        "text": [escaped(e.description) for e in experiments],
        "customdata": [[e.number, html.escape(e.commit), "no value" if e.val_bpb is None else f"{e.val_bpb:.6f}",
                        html.escape(e.status)] for e in experiments],
        "hovertemplate": "<b>%{customdata[0]}</b> %{customdata[1]} %{customdata[3]}<br><b>%{customdata[2]}</b>"
                         "<br>%{text}<extra></extra>",
        "marker": marker, **more,
    }  # fmt: skip


def traces(night, x):
    """The traces of kept and other experiments at x(experiment); beyond the view, a triangle on its edge."""
    seen = view(night)
    size = 5 if len(seen.kept) + len(seen.others) > 300 else 7
    styles = [
        ("not kept", seen.others, {"color": OTHER, "opacity": 0.6, "size": size}),
        (name_of_kept(seen.kept), seen.kept, {"color": KEPT, "size": size + 4, "line": RIM}),
    ]
    made = []
    for name, experiments, marker in styles:
        experiments = [e for e in experiments if x(e) is not None]
        marker["symbol"] = [
            "circle" if seen.clamped(e) == e.val_bpb else f"triangle-{'up' if e.val_bpb > seen.high else 'down'}"
            for e in experiments
        ]
        made.append(points(name, experiments, [x(e) for e in experiments], [*map(seen.clamped, experiments)], marker))
    return made


def layout(night, x_title):
    seen = view(night)
    room = 0.03 * (seen.high - seen.low)  # a triangle on the edge is seen whole
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True}
    made = {
        "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "font": {"color": TEXT, "size": 13}, "hovermode": "closest",
        "margin": {"l": 70, "r": 20, "t": 40, "b": 55}, "uirevision": "night",  # a refresh leaves the zoom alone
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "bgcolor": "#22262b", "font": {"color": "#f4f5f7"}},
        "modebar": {"bgcolor": CLEAR, "color": TEXT},
        "xaxis": {**axis, "title": {"text": x_title}},
        "yaxis": {**axis, "title": {"text": "val_bpb (lower is better)"}, "range": [seen.low - room, seen.high + room],
                  "exponentformat": "none"},
    }  # fmt: skip
    if not seen.kept and not seen.others:
        made["yaxis"] |= {"showticklabels": False, "showgrid": False}
        text = NOTHING if night.experiments else "no experiments yet"
        made["annotations"] = [{"text": text, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}]
    return made


def progress_plotly(night):
    """{"data": [...], "layout": {...}} of every experiment in order: traces named after what they hold, in the order
    ±σ, best so far, not kept, kept, crashed; each there although it be empty."""
    xs, ys = band(night)
    numbers, seen = [e.number for e in night.experiments], view(night)
    silent = {"type": "scatter", "mode": "lines", "hoverinfo": "skip"}
    others, kept = traces(night, lambda e: e.number)
    crossed = {"color": MISSING, "size": 9, "symbol": "x-thin", "line": {"width": 2, "color": MISSING}}
    made = layout(night, "experiment")
    made["xaxis"] |= {"range": [0.3, max(len(numbers), 4) + 0.7], "tickformat": "d", "rangemode": "nonnegative"}
    made["yaxis2"] = {"overlaying": "y", "range": [0, 1], "fixedrange": True, "visible": False}
    return {
        "data": [
            {**silent, "name": "±σ", "x": xs, "y": ys, "fill": "toself", "fillcolor": BAND, "line": {"width": 0}},
            {**silent, "name": "best so far", "x": numbers, "y": night.running_best(),
             "line": {"shape": "hv", "color": KEPT, "width": 2}},
            others,
            kept,
            points(name_of_missing(seen.missing), seen.missing, [e.number for e in seen.missing],
                   [0.02] * len(seen.missing), crossed, yaxis="y2"),
        ],
        "layout": made,
    }  # fmt: skip


def memory_plotly(night):
    """The same of memory against val_bpb, without crashes; an empty chart with a sentence where no memory is known."""
    made = layout(night, "memory (GB)")
    data = traces(night, lambda e: e.memory_gb)
    if not any(trace["x"] for trace in data):
        text = "no row has both a value and its memory"
        made["annotations"] = [{"text": text, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}]
    return {"data": data, "layout": made}
