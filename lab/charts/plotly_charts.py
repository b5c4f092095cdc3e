"""The dashboard's charts: dictionaries with data and layout, for plotly's script in a page."""

import html

from lab.charts.view import NOTHING, band, name_of_kept, name_of_missing, view

WIDTH, LONGEST = 60, 240  # characters per line, and in all of a description
# Colours on a page that may be light or dark: contrast at least 3 against white and against near black.
KEPT, OTHER, MISSING = "#2b8cd0", "#8b9099", "#d9601a"
RIM = {"width": 1, "color": "white"}
TEXT, GRID, CLEAR, BAND = "#767b84", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)", "rgba(43,140,208,0.18)"

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


def progress(night):
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
