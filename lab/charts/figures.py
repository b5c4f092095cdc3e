"""Draws a night with matplotlib: progress(night) and memory(night) return figures, png(figure) returns the bytes."""

import io
import math
from functools import cache

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lab.analysis import curves
from lab.charts import label_placement, view

KEPT, OTHER, MISSING, INK = "#0072b2", "#8b9099", "#d55e00", "#22262b"
KEEPS = colormaps["plasma"]  # of kept curves, in their order: readable without telling red from green
LABEL = 44  # characters of a description beside its point: about a quarter of the picture's width
MOST = 40  # labels that are tried, most important first: placing takes time, and few more would find room
LARGE, SMALL = 34, 14  # points²: area of a disc in a chart with up to view.MANY experiments, and with more
FRAME = 4, 24, 2, 22  # pixels at left, bottom, right, top that labels leave free: crosses and triangles are there
LEADER = 25  # pixels from a point to its label, beyond which a line is drawn between them
NAMED = 12  # kept experiments whose curve the legend names: the best, and the latest ones
# Triangles for values outside the view: their height as a fraction of the axes (the lower ones are above the crosses),
# and the fraction of the width that a value written beside one needs.
ABOVE, BELOW, ROOM_FOR_VALUE = 0.985, 0.07, 0.07


@cache
def drawable():
    """The code points that matplotlib's own font has."""
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def shortened(text):
    """At most LABEL characters of the text, cut between words if that keeps half of them. A character that the font does
    not have becomes □."""
    text = "".join(c if ord(c) in drawable() else "□" for c in text[: LABEL + 1])
    if len(text) <= LABEL:
        return text
    end = text.rfind(" ", LABEL // 2, LABEL)
    return text[: end if end > 0 else LABEL - 1].rstrip(" ,;:-") + "…"


def png(figure):
    """The figure as the bytes of a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def blank(width, height, title, y_label="val_bpb (lower is better)"):
    """(figure, axes) of width x height inches; without pyplot, which would keep the figure in memory."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=10)
    axes.ticklabel_format(useOffset=False)
    axes.set_title(title, loc="left", fontsize=14, weight="bold", color=INK, pad=30)
    axes.set_ylabel(y_label, fontsize=11, color=INK)
    return figure, axes


def say(axes, sentence):
    """Writes the sentence in the middle of empty axes."""
    axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", va="center", fontsize=13, color=OTHER)


def scatter(axes, seen, x):
    """Draws kept and other experiments at x(experiment). One that is outside the view is a triangle at its edge."""
    size = LARGE if len(seen.kept) + len(seen.others) <= view.MANY else SMALL
    styles = [
        ("not kept", seen.others, {"s": 0.8 * size, "color": OTHER, "alpha": 0.5, "linewidths": 0, "zorder": 2.5}),
        (
            view.name_of_kept(seen.kept),
            seen.kept,
            {"s": 1.6 * size, "color": KEPT, "edgecolors": "white", "linewidths": 0.8, "zorder": 4},
        ),
    ]
    for name, experiments, style in styles:
        if near := [e for e in experiments if seen.clamped(e) == e.val_bpb]:
            axes.scatter([x(e) for e in near], [e.val_bpb for e in near], label=f"{name} ({len(experiments)})", **style)
    if back := [e for e in seen.others if e.given_up and seen.clamped(e) == e.val_bpb]:
        axes.scatter([x(e) for e in back], [e.val_bpb for e in back], s=1.6 * size, facecolors="none", edgecolors=KEPT,
                     linewidths=1.2, zorder=4, label=f"given up ({len(back)})")  # fmt: skip
    far = seen.beyond(seen.kept + seen.others)
    for name, height, marker, out in [
        ("above the view", ABOVE, "^", [e for e in far if e.val_bpb > seen.high]),
        ("below the view", BELOW, "v", [e for e in far if e.val_bpb < seen.low]),
    ]:
        if not out:
            continue
        axes.scatter([x(e) for e in out], [height] * len(out), s=1.3 * size, color=OTHER, marker=marker, zorder=4,
                     transform=axes.get_xaxis_transform(), clip_on=False, label=f"{name} ({len(out)})")  # fmt: skip
        room = ROOM_FOR_VALUE * (axes.get_xlim()[1] - axes.get_xlim()[0])
        for e, after in zip(out, [*map(x, out[1:]), axes.get_xlim()[1]], strict=True):
            if after - x(e) > room:
                axes.annotate(f"{e.val_bpb:.4g}", (x(e), height), xycoords=axes.get_xaxis_transform(), xytext=(7, -3),
                              textcoords="offset points", fontsize=9, color=OTHER)  # fmt: skip
    axes.set_ylim(seen.low, seen.high)


def write_legend(axes):
    """Writes the legend on one line above the axes, the most important entry first."""
    order = ["kept", "kept,", "baseline", "best", "±σ", "not", "given", "crashed", "above", "below"]
    entries = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda e: order.index(e[1].split()[0]))
    if entries:
        axes.legend(*zip(*entries, strict=True), loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(entries),
                    frameon=False, fontsize=10, labelcolor=INK, handletextpad=0.4, columnspacing=1.4, handlelength=1.6,
                    borderaxespad=0.2)  # fmt: skip


def write_labels(axes, experiments, x, bold, line, soft):
    """Writes the descriptions of the experiments, most important first, beside their points if there is room.

    bold: the experiment whose label is bold; line: (n, 2), points in data coordinates that no label may cover;
    soft: (n, 2), points that labels should rather not cover."""
    axes.figure.draw_without_rendering()  # fixes the layout: pixel coordinates do not change after this
    axes.figure.set_layout_engine("none")
    texts = [
        axes.text(0, 0, shortened(e.description) or e.commit, fontsize=9, color=INK, parse_math=False, zorder=6,
                  va="bottom", weight="bold" if e is bold else "normal",
                  path_effects=[withStroke(linewidth=2.5, foreground="white")])
        for e in experiments
    ]  # fmt: skip
    boxes = [text.get_window_extent(axes.figure.canvas.get_renderer()) for text in texts]
    points = axes.transData.transform(np.array([(x(e), e.val_bpb) for e in experiments]))
    area, pixels = axes.get_window_extent(), axes.transData.transform
    found = label_placement.place(
        points, [(box.width, box.height) for box in boxes],
        (area.x0 + FRAME[0], area.y0 + FRAME[1], area.x1 - FRAME[2], area.y1 - FRAME[3]),
        np.concatenate([points, pixels(line)]) if len(line) else points,
        pixels(soft) if len(soft) else np.empty((0, 2)),
    )  # fmt: skip
    back = axes.transData.inverted().transform
    for text, box, point in zip(texts, found, points, strict=True):
        if box is None:
            text.remove()
            continue
        text.set_position(back(box[:2]))
        path = label_placement.leader(point, box, 2)
        if math.dist(*path) > LEADER:
            axes.plot(*back(path).T, color=INK, linewidth=0.6, alpha=0.45, zorder=3)


def important(night, experiments):
    """The first MOST of the experiments by the importance of their labels: best and baseline, then by gain."""
    gains = {e.number: gain for e, gain in night.gains()}
    first = (night.best, night.baseline)
    order = sorted(experiments, key=lambda e: (e not in first, -gains.get(e.number, 0)))
    return order[:MOST]


def steps(night, seen):
    """(n, 2): points along the line of the running best, so dense that no label fits between two of them."""
    best = night.running_best()
    made = []
    for e, before, now in zip(night.experiments, [None, *best[:-1]], best, strict=True):
        if now is not None:
            made += [(e.number + part, now) for part in np.linspace(0, 1, 5)]
        if before is not None and before != now:
            made += [(e.number, value) for value in np.linspace(before, now, 30)]
    return np.array([p for p in made if seen.low <= p[1] <= seen.high]).reshape(-1, 2)


def progress(night):
    """Figure of val_bpb against the number of the experiment."""
    figure, axes = blank(12, 6.75, view.title(night))
    seen, n = view.view(night), len(night.experiments)
    axes.set_xlim(0.3, max(n, 4) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel("experiment", fontsize=11, color=INK)
    if seen.kept or seen.others:
        scatter(axes, seen, lambda e: e.number)
    else:
        axes.set_yticks([])
        say(axes, view.NOTHING if n else "no experiments yet")
    if seen.kept:
        xs, ys = view.band(night)
        if xs:
            axes.fill(xs, ys, color=KEPT, alpha=0.13, linewidth=0, zorder=1.5, label=f"±σ ({night.sigma:.2g})")
        best = [math.nan if value is None else value for value in night.running_best()]
        axes.step([*range(1, n + 1), n + 0.5], [*best, best[-1]], where="post", color=KEPT, linewidth=1.6, alpha=0.75,
                  zorder=3, label="best so far")  # fmt: skip
    if seen.missing:
        axes.scatter([e.number for e in seen.missing], [view.EDGE] * len(seen.missing), s=30, color=MISSING, marker="x",
                     linewidths=1.4, transform=axes.get_xaxis_transform(), zorder=4,
                     label=f"{view.name_of_missing(seen.missing)} ({len(seen.missing)})")  # fmt: skip
    write_legend(axes)
    if inside := [e for e in seen.kept if seen.clamped(e) == e.val_bpb]:
        soft = np.array([(e.number, e.val_bpb) for e in seen.others]).reshape(-1, 2)
        write_labels(axes, important(night, inside), lambda e: e.number, night.best, steps(night, seen), soft)
    return figure


def memory(night):
    """Figure of val_bpb against memory, of the experiments that have both."""
    figure, axes = blank(8, 5, "Memory against val_bpb")
    axes.set_xlabel("memory (GB)", fontsize=11, color=INK)
    seen = view.view(night)
    seen = seen._replace(kept=[e for e in seen.kept if e.memory_gb], others=[e for e in seen.others if e.memory_gb])
    if not seen.kept and not seen.others:
        axes.set_xticks([])
        axes.set_yticks([])
        say(axes, "no row has both val_bpb and memory_gb")
        return figure
    known = [e.memory_gb for e in seen.kept + seen.others]
    margin = 0.06 * (max(known) - min(known)) or 0.05 * max(known)
    axes.set_xlim(min(known) - margin, max(known) + margin)
    scatter(axes, seen, lambda e: e.memory_gb)
    write_legend(axes)
    ends = [e for e in seen.kept if e in (night.best, night.baseline) and seen.clamped(e) == e.val_bpb]
    if ends:
        everything = np.array([(e.memory_gb, e.val_bpb) for e in seen.kept + seen.others])
        write_labels(axes, ends, lambda e: e.memory_gb, night.best, everything, everything)
    return figure


def loss_curves(night):
    """Figure of training loss against progress: a line for each run, kept experiments in colour, from the first keep (dark)
    to the last one (bright), the others grey."""
    figure, axes = blank(12, 6.75, "Training loss", "training loss, smoothed (nats)")
    axes.set_xlabel("progress", fontsize=11, color=INK)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    drawn = [e for e in night.experiments if curves.of(e)]
    if not drawn:
        axes.set_yticks([])
        say(axes, "runs.jsonl has no loss curves")
        return figure
    standing, best = {e.number for e in night.standing}, night.best
    kept = [e for e in drawn if e.number in standing]
    named = [best, *[e for e in kept if e is not best][-NAMED:]]
    for e in drawn:
        if e.number not in standing:
            draw_runs(axes, e, color=OTHER, linewidth=0.8, alpha=0.45, zorder=2)
    for e, shade in zip(kept, np.linspace(0.1, 0.9, max(len(kept), 1)), strict=True):
        name = f"{e.number} {shortened(e.description) or e.commit}{' (best)' if e is best else ''}"
        width = {"linewidth": 2.6, "zorder": 4} if e is best else {"linewidth": 1.5, "zorder": 3}
        draw_runs(axes, e, color=KEEPS(shade), label=name if e in named else None, **width)
    axes.set_ylim(*view.loss_range([curves.of(e) for e in kept or drawn]))
    if kept:
        for text in axes.legend(loc="upper right", fontsize=9, labelcolor=INK, title="kept", framealpha=0.9).get_texts():
            text.set_parse_math(False)
    return figure


def draw_runs(axes, experiment, label=None, **style):
    """Draws the curve of each of its runs; the label is that of one of them."""
    for run in experiment.runs:
        if run.get("curve"):
            x, y, _ = zip(*run["curve"], strict=True)
            axes.plot(x, y, label=label, **style)
            label = None
