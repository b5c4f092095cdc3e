"""The dashboard's chart: a dictionary with data and layout, which plotly's script draws in the page."""

import html

from lab.analysis import curves
from lab.base.text import printable
from lab.charts.view import EDGE, MANY, NOTHING, TREES, band, loss_range, name_of_kept, name_of_missing, view

WIDTH, LONGEST = 60, 240  # characters of a description in a hover box: per line, and in all
# The page may be light or dark: these colours have a contrast of at least 3 against white and against near black.
KEPT, OTHER, MISSING = "#2b8cd0", "#8b9099", "#d9601a"
RIM = {"width": 1, "color": "white"}
TEXT, GRID, CLEAR, BAND = "#767b84", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)", "rgba(43,140,208,0.18)"
# Of the trees of a team: the ninth tree has the first colour and another symbol. Beside each symbol the character that
# stands for it in a text.
SYMBOLS = (("circle", "●"), ("square", "■"), ("diamond", "◆"), ("star", "★"), ("cross", "✚"), ("pentagon", "⬟"), ("hourglass", "⧗"),
           ("bowtie", "⋈"))  # fmt: skip
DASHES = {"best": "dash", "parent": "dot", "best and parent": "dash"}
SMALL, LARGE = 5, 7  # pixels: size of a disc in a chart with more than MANY points, and with fewer
LEGEND = 16  # trees of a team: a legend of more would leave no room for the chart
KEPT_LARGER = 4  # pixels: how much larger a kept one is
BEYOND = 2  # heights of the other loss curves: shown above and below them, at most


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


def frame(x_title, y_title, y_range):
    """plotly's layout of a chart with these axes."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True}
    return {
        "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "font": {"color": TEXT, "size": 13}, "hovermode": "closest",
        "margin": {"l": 70, "r": 20, "t": 40, "b": 55}, "uirevision": "night",  # keeps the zoom when the data is refreshed
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "bgcolor": "#22262b", "font": {"color": "#f4f5f7"}},
        "modebar": {"bgcolor": CLEAR, "color": TEXT},
        "xaxis": {**axis, "title": {"text": x_title}},
        "yaxis": {**axis, "title": {"text": y_title}, "range": y_range, "exponentformat": "none"},
    }  # fmt: skip


def layout(night, x_title):
    """plotly's layout, with axes for the view of the night."""
    seen = view(night)
    room = 0.03 * (seen.high - seen.low)  # so that a triangle at the edge is not cut off
    made = frame(x_title, "val_bpb (lower is better)", [seen.low - room, seen.high + room])
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


def mark(i):
    """(colour, plotly's symbol, the character for it) of the i-th tree of a team."""
    return TREES[i % len(TREES)], *SYMBOLS[i // len(TREES) % len(SYMBOLS)]


def team(night, found_by, pages):
    """{"data": [...], "layout": {...}} of a team's night: ±σ and best so far of all trees together, then two traces for each
    tree, in the order of their first experiments: those with a value (large: kept; a ring: given up, or a late gain), and
    crashes. found_by: {number of the experiment: name of its tree}; pages: {such a name: the working tree whose page a
    click on one of its points opens}. customdata ends with both names."""
    made, seen = progress(night), view(night)
    band, line = made["data"][:2]
    traces, kept, missing = [], {e.number for e in seen.kept}, {e.number for e in seen.missing}
    size = SMALL if len(night.experiments) > MANY else LARGE
    for i, name in enumerate(dict.fromkeys(found_by.values())):
        colour, symbol, _ = mark(i)
        own = [e for e in night.experiments if found_by[e.number] == name]
        shown, crashed = [e for e in own if e.number not in missing], [e for e in own if e.number in missing]
        rings = [bool(e.given_up or any(r.get("late") and r["row"] for r in e.runs)) for e in shown]
        marker = {
            "color": colour, "size": [size + KEPT_LARGER * (e.number in kept) for e in shown],
            "opacity": [1 if e.number in kept or ring else 0.6 for e, ring in zip(shown, rings, strict=True)],
            "symbol": [(symbol + "-open" * ring) if seen.clamped(e) == e.val_bpb else f"triangle-{'up' if e.val_bpb > seen.high else 'down'}"
                       for e, ring in zip(shown, rings, strict=True)],
        }  # fmt: skip
        crossed = {"color": colour, "size": 9, "symbol": "x-thin", "line": {"width": 2, "color": colour}}
        label, group = escaped(printable(name)), f"tree {i}"
        traces += [
            points(label, shown, [e.number for e in shown], [*map(seen.clamped, shown)], marker, legendgroup=group),
            points(label, crashed, [e.number for e in crashed], [EDGE] * len(crashed), crossed, yaxis="y2", legendgroup=group, showlegend=False),
        ]  # fmt: skip
        for trace in traces[-2:]:
            trace["name"] = f"{label} ({sum(e.number in kept for e in own)} of {len(own)} kept)"
            trace["hovertemplate"] = "%{customdata[4]}<br>" + trace["hovertemplate"]
            trace["customdata"] = [[*known, label, pages.get(name)] for known in trace["customdata"]]
    made["data"] = [band | {"fillcolor": GRID}, line | {"line": line["line"] | {"color": TEXT}}, *traces]
    made["layout"]["showlegend"] = len(traces) <= 2 * LEGEND
    made["layout"]["xaxis"]["title"] = {"text": "experiment of the team"}
    return made


def loss_curves(night, experiment):
    """{"data": [...], "layout": {...}} of the experiment's curve (the last trace) over those of its parent and of the best,
    with a vertical line where it parts from each. Without a curve there are no traces."""
    own = curves.of(experiment)
    others = curves.compared_with(night, experiment) if own else []
    lines = [(f"{name} ({escaped(printable(curves.name_of(e)))})", curves.of(e), {"color": OTHER, "width": 2, "dash": DASHES[name]}) for name, e in others]
    lines += [(f"row {experiment.number}", own, {"color": KEPT, "width": 3})] if own else []
    drawn = [curve for _, curve, _ in lines]
    if shown := loss_range([curves.of(e) for _, e in others]):  # a run that diverged would flatten the others
        room = BEYOND * (shown[1] - shown[0])
        least, most = shown[0] - room, shown[1] + room
        drawn = [[(x, min(max(y, least), most), speed) for x, y, speed in curve] for curve in drawn]
    low, high = loss_range(drawn) or (0, 1)
    made = frame("progress", "training loss, smoothed (nats)", [low, high])
    made["xaxis"] |= {"range": [0, 1.02], "tickformat": ".0%"}
    made["hovermode"] = "x unified"
    made["shapes"], made["annotations"] = [], []
    for level, (name, e) in enumerate(others):
        if (x := curves.parting(own, curves.of(e), curves.spread(night))) is not None:
            made["shapes"].append({"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1,
                                   "line": {"color": MISSING, "width": 1, "dash": DASHES[name]}})  # fmt: skip
            made["annotations"].append({"x": x, "yref": "paper", "y": 0.98 - 0.08 * level, "showarrow": False,
                                        "xanchor": "left" if x < 0.7 else "right", "text": f" parts from the {name} "})  # fmt: skip
    return {
        "data": [
            {"type": "scatter", "mode": "lines", "name": name, "x": [p[0] for p in curve], "y": [p[1] for p in curve],
             "customdata": ["–" if p[2] is None else f"{p[2]:,.0f}" for p in curve],
             "hovertemplate": "%{y:.4f}, %{customdata} tokens/s", "line": line}
            for name, curve, line in lines
        ],
        "layout": made,
    }  # fmt: skip
