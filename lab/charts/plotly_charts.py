"""The dashboard's chart: a dictionary with data and layout, which plotly's script draws in the page."""

import html

from lab.charts.view import EDGE, MANY, NOTHING, band, name_of_kept, name_of_missing, view

WIDTH, LONGEST = 60, 240  # characters of a description in a hover box: per line, and in all
# The page may be light or dark: these colours have a contrast of at least 3 against white and against near black.
KEPT, OTHER, MISSING = "#2b8cd0", "#8b9099", "#d9601a"
RIM = {"width": 1, "color": "white"}
TEXT, GRID, CLEAR, BAND = "#767b84", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)", "rgba(43,140,208,0.18)"
SMALL, LARGE = 5, 7  # pixels: size of a disc in a chart with more than MANY points, and with fewer
KEPT_LARGER = 4  # pixels: how much larger a kept one is


def escaped(text):
    """The text in lines of WIDTH, escaped: plotly would interpret <b> and &lt; as markup."""
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
    """A trace of plotly. customdata of each point: row number, commit, val_bpb as text, status."""
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
    """The traces of other and kept experiments at x(experiment). One that is outside the view is a triangle at its
    edge."""
    seen = view(night)
    size = SMALL if len(seen.kept) + len(seen.others) > MANY else LARGE
    styles = [
        ("not kept", seen.others, {"color": OTHER, "opacity": 0.6, "size": size}),
        (name_of_kept(seen.kept), seen.kept, {"color": KEPT, "size": size + KEPT_LARGER, "line": RIM}),
    ]
    made = []
    for name, experiments, marker in styles:
        experiments = [e for e in experiments if x(e) is not None]
        marker["symbol"] = [
            ("circle-open" if e.given_up else "circle") if seen.clamped(e) == e.val_bpb else f"triangle-{'up' if e.val_bpb > seen.high else 'down'}"
            for e in experiments
        ]
        made.append(points(name, experiments, [x(e) for e in experiments], [*map(seen.clamped, experiments)], marker))
    return made


def layout(night, x_title):
    """plotly's layout, with axes for the view of the night."""
    seen = view(night)
    room = 0.03 * (seen.high - seen.low)  # so that a triangle at the edge is not cut off
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True}
    made = {
        "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "font": {"color": TEXT, "size": 13}, "hovermode": "closest",
        "margin": {"l": 70, "r": 20, "t": 40, "b": 55}, "uirevision": "night",  # keeps the zoom when the data is refreshed
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
    """{"data": [...], "layout": {...}} of every experiment in order. The traces are ±σ, best so far, not kept, kept,
    crashed, in this order and with these names; a trace without points is there too."""
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
                   [EDGE] * len(seen.missing), crossed, yaxis="y2"),
        ],
        "layout": made,
    }  # fmt: skip
