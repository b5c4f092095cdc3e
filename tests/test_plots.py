"""The pictures of a night: as many points as rows, no crash as a value, labels clear of each other."""

import io
import json
import random
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex

from lab.analysis.history import Experiment, Night
from lab.charts import figures, label_placement, plotly_charts, view


def night_of(*rows, sigma=None):
    """The Night of rows (status, val_bpb, description, memory), the last two if wanted; val_bpb None for a crash."""
    made = []
    for i, (status, value, *more) in enumerate(rows, 1):
        text, memory = [*more, *["idea", 44.0][len(more) :]]
        made.append(Experiment(i, f"{i:07x}", value, value and memory, status, text, (), None))
    return Night(made, tree=Path("."), sigma=sigma)


def simulated(n, seed=1, gains=0.25, sigma=0.0007):
    """A night that falls as real ones do: a keep now and then, discards above, a crash in ten."""
    r, best, rows = random.Random(seed), 0.9979, [("keep", 0.9979, "baseline")]
    for i in range(1, n):
        text = " ".join(r.choices(["depth", "9", "wider", "learning rate", "0.05", "window", "2**18", "momentum"], k=4))
        if r.random() < 0.1:
            rows.append(("crash", None, text))
        elif r.random() < gains:
            best -= r.expovariate(1 / 0.0013) * (4 if i < 6 else 1)
            rows.append(("keep", best, text))
        else:
            rows.append(("discard", best + abs(r.gauss(0, 0.002)), text, 44 + r.random()))
    return night_of(*rows, sigma=sigma)


SMALL = night_of(
    ("keep", 1.0, "baseline"), ("discard", 1.004), ("keep", 0.99, "costs $5 and $6, _more_ <b>"), ("crash", None),
    ("discard", 5.31, "diverged"), ("keep", 0.985, "batch 2**18"), ("keep", None, "no value"), sigma=0.002,
)  # fmt: skip
NIGHTS = {
    "none": night_of(),
    "only crashes": night_of(("crash", None), ("crash", None)),
    "one row": night_of(("keep", 1.0, "baseline")),
    "small": SMALL,
    "another harness": night_of(("ok", 1.0), ("ok", 0.9), ("crash", None)),
    "no memory": night_of(("keep", 1.0, "baseline", None), ("keep", 0.9, "x", None)),
    "20": simulated(20),
    "100": simulated(100),
    "1000": simulated(1000, gains=0.15),
}
on_all = pytest.mark.parametrize("night", NIGHTS.values(), ids=NIGHTS)


def collections(axes):
    """Label without its count -> (offsets as given, whether they are data)."""
    return {
        c.get_label().split(" (")[0]: (np.asarray(c.get_offsets()), c.get_offset_transform() == axes.transData)
        for c in axes.collections
    }


def test_a_teams_picture_and_table_name_the_trees(monkeypatch):
    from lab.charts import notebook

    assert "tree" not in notebook.experiments(SMALL).columns and not figures.progress(SMALL).axes[0].artists
    found = {1: "a", 2: "b", 3: "b", 4: "c", 5: "a", 6: "$x_1$", 7: "c"}
    for module in (figures, notebook):
        monkeypatch.setattr(module, "found_by", lambda night: found)
    assert list(notebook.experiments(SMALL)["tree"]) == list(found.values())
    axes = figures.progress(SMALL).axes[0]
    painted = {(x, y): to_hex(c.get_facecolor()[0]) for c in axes.collections if c.get_zorder() == 4.1 for x, y in c.get_offsets()}
    assert painted == {(1, 1.0): view.TREES[0], (3, 0.99): view.TREES[1], (6, 0.985): view.TREES[3]}
    texts = [text for artist in axes.artists for text in artist.get_texts()]
    assert [text.get_text() for text in texts] == ["a (1 kept)", "b (1 kept)", "$x_1$ (1 kept)", "c (0 kept)"]
    assert not any(text.get_parse_math() for text in texts)
    found.update({i: f"tree {i}" for i in range(1, 8)} | {i: f"tree {i}" for i in range(8, 30)})
    assert figures.progress(SMALL).axes[0].artists[0].get_texts()[-1].get_text() == "and 17 more trees"


# ---------------------------------------------------------------------------------------------------
# What is in view


def share(night):
    """The part of the view's height that the running best takes."""
    line, seen = [v for v in night.running_best() if v], view.view(night)
    return (max(line) - min(line)) / (seen.high - seen.low)


def gaining(*others):
    return [("keep", 1.0), *others, ("keep", 0.99), ("keep", 0.985)]


@pytest.mark.parametrize(
    "others",
    [
        [("discard", 5.31)],
        [("discard", 1e9)],
        [("discard", 0.001)],
        [("discard", 5.0 + i) for i in range(20)],
        [("discard", 1.0 + i / 1000) for i in range(9)] + [("discard", 3.0), ("discard", 11.0)],
    ],
)
def test_runs_that_diverged_do_not_flatten_the_night(others):
    night = night_of(*gaining(*others))
    assert share(night) > 0.18
    far = view.view(night).beyond(view.view(night).others)
    assert {e.val_bpb for e in far} >= {v for _, v in others if abs(v - 1) > 0.5}


def test_the_whole_way_of_the_running_best_is_in_view_and_so_are_ordinary_discards():
    night = night_of(*gaining(*[("discard", 1.0 + i / 1000) for i in range(9)]), sigma=0.001)
    seen = view.view(night)
    assert seen.beyond(seen.kept) == seen.beyond(seen.others) == []
    assert seen.low < 0.984 and seen.high > 1.009


def test_a_baseline_that_diverged_is_left_to_the_edge_and_a_great_first_gain_is_not():
    diverged = view.view(night_of(("keep", 9.0), ("keep", 1.0), ("keep", 0.99), ("keep", 0.98)))
    assert diverged.high < 1.1 and [e.number for e in diverged.beyond(diverged.kept)] == [1]
    great = view.view(night_of(("keep", 1.2), ("keep", 1.0), ("keep", 0.99), ("keep", 0.98)))
    assert great.high > 1.2


def test_rows_of_one_and_the_same_value_have_a_view():
    for sigma in (None, 0.002):
        seen = view.view(night_of(("keep", 1.0), ("discard", 1.0), sigma=sigma))
        assert seen.low < 1.0 < seen.high and seen.high - seen.low < 0.02


def test_the_band_is_one_sigma_to_both_sides_of_the_running_best():
    xs, ys = view.band(SMALL)
    best = SMALL.running_best()
    for e, value in zip(SMALL.experiments, best, strict=True):
        at = [y for x, y in zip(xs, ys, strict=True) if x == e.number]
        assert value + 0.002 in at and value - 0.002 in at
    assert max(ys) == max(best) + 0.002 and min(ys) == min(best) - 0.002
    assert view.band(night_of(("keep", 1.0))) == ([], [])


# ---------------------------------------------------------------------------------------------------
# matplotlib


@on_all
def test_every_experiment_is_drawn_once_and_none_without_a_value_is_a_value(night):
    (axes,) = figures.progress(night).axes
    drawn, seen = collections(axes), view.view(night)
    data = np.concatenate([offsets for offsets, is_data in drawn.values() if is_data] or [np.empty((0, 2))])
    edge = np.concatenate([offsets for offsets, is_data in drawn.values() if not is_data] or [np.empty((0, 2))])
    valued = {(e.number, e.val_bpb) for e in night.experiments if e.val_bpb is not None}
    inside = {(n, v) for n, v in valued if seen.low <= v <= seen.high}
    assert len(data) + len(edge) == len(night.experiments)
    assert set(map(tuple, data)) == inside
    crosses = sorted(n for n, y in edge if y == view.EDGE)
    assert crosses == [e.number for e in night.experiments if e.val_bpb is None]
    assert ((edge[:, 1] >= 0) & (edge[:, 1] <= 1)).all()


def test_what_is_drawn_is_counted_in_the_legend():
    (axes,) = figures.progress(SMALL).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "kept (3)", "best so far", "±σ (0.002)", "not kept (2)", "crashed or no value (2)", "above the view (1)",
    ]  # fmt: skip
    assert "5.31" in [text.get_text() for text in axes.texts]
    assert axes.get_title(loc="left") == "7 experiments, 3 kept: val_bpb 1.0000 → 0.9850"


def test_the_step_line_is_the_running_best():
    (axes,) = figures.progress(SMALL).axes
    line = next(line for line in axes.lines if line.get_label() == "best so far")
    assert line.get_drawstyle() == "steps-post"
    assert list(line.get_ydata())[:7] == SMALL.running_best() and list(line.get_xdata())[:7] == [1, 2, 3, 4, 5, 6, 7]
    late = night_of(("crash", None), ("keep", 1.0))
    line = next(line for line in figures.progress(late).axes[0].lines if line.get_label() == "best so far")
    assert np.isnan(line.get_ydata()[0]) and line.get_ydata()[1] == 1.0


def test_the_noise_is_drawn_only_where_it_is_known():
    assert len(figures.progress(SMALL).axes[0].patches) == 1
    assert len(figures.progress(NIGHTS["one row"]).axes[0].patches) == 0


@pytest.mark.parametrize(
    "night", [SMALL, NIGHTS["20"], NIGHTS["100"], NIGHTS["1000"]], ids=["small", "20", "100", "1000"]
)
def test_labels_lie_neither_on_each_other_nor_on_a_kept_point_and_stay_inside(night):
    figure = figures.progress(night)
    (axes,), renderer = figure.axes, figure.canvas.get_renderer()
    texts = [text for text in axes.texts if not text.get_text().replace(".", "").isdigit()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    kept = axes.transData.transform([(e.number, e.val_bpb) for e in night.standing])
    area = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]
        assert not any(box.contains(*point) for point in kept), texts[i]
        assert area.x0 <= box.x0 and box.x1 <= area.x1 and area.y0 <= box.y0 and box.y1 <= area.y1
    wanted = min(len(night.standing), 30)
    assert len(texts) >= 0.7 * wanted
    assert [text.get_text() for text in texts if text.get_weight() == "bold"] == [
        figures.shortened(night.best.description)
    ]


def test_descriptions_are_drawn_letter_by_letter_and_a_letter_the_font_lacks_warns_nobody():
    night = night_of(("keep", 1.0, "$x_{$ \\frac"), ("keep", 0.9, "模型 🚀 wider"), ("keep", 0.8, ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.progress(night)
        figures.png(figure)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"$x_{$ \\frac", "□□ □ wider", "0000003"}


def test_long_descriptions_are_cut():
    assert figures.shortened("x" * 10_000) == "x" * (figures.LABEL - 1) + "…"
    assert figures.shortened("x" * figures.LABEL) == "x" * figures.LABEL
    assert figures.shortened("one two, " * 10) == "one two, one two, one two, one two, one…"


@pytest.mark.parametrize("night", [NIGHTS["none"], SMALL, NIGHTS["1000"]], ids=["none", "small", "1000"])
def test_the_picture_has_its_size_and_ink_on_it(night):
    picture = matplotlib.image.imread(io.BytesIO(figures.png(figures.progress(night))))
    assert picture.shape[:2] == (1012, 1800)
    assert (picture[:, :, :3].min(axis=2) < 0.5).sum() > 2000  # there is ink on it


@on_all
def test_memory_is_drawn_of_what_has_both(night):
    (axes,) = figures.memory(night).axes
    drawn = collections(axes)
    both = [e for e in night.experiments if e.val_bpb and e.memory_gb]
    assert sum(len(offsets) for offsets, _ in drawn.values()) == len(both)
    if not both:
        assert [text.get_text() for text in axes.texts] == ["no row has both val_bpb and memory_gb"]
    else:
        assert drawn[view.name_of_kept(list(night.standing))][0][0][0] == night.baseline.memory_gb


# ---------------------------------------------------------------------------------------------------
# plotly


@on_all
def test_plotly_gets_plain_data_that_it_takes(night):
    import plotly.graph_objects

    for made in [plotly_charts.progress(night)]:
        assert json.loads(json.dumps(made, allow_nan=False)) == made
        plotly.graph_objects.Figure(made)  # raises where a name or a value is none of plotly's


@on_all
def test_plotly_has_every_experiment_once_with_number_and_commit(night):
    sigma, best, others, kept, missing = plotly_charts.progress(night)["data"]
    found = [tuple(data[:2]) for trace in (others, kept, missing) for data in trace["customdata"]]
    assert sorted(found) == [(e.number, e.commit) for e in night.experiments]
    for trace in (others, kept, missing):
        n = len(trace["customdata"])
        assert len(trace["x"]) == len(trace["y"]) == len(trace["text"]) == n and trace["name"].endswith(f"({n})")
        assert [data[0] for data in trace["customdata"]] == trace["x"]
    assert {data[0] for data in kept["customdata"]} == {e.number for e in night.standing}
    assert [data[0] for data in missing["customdata"]] == [e.number for e in night.experiments if e.val_bpb is None]
    assert best["y"] == night.running_best() and best["line"]["shape"] == "hv"
    assert bool(sigma["x"]) == (night.sigma is not None)


def test_plotly_has_crashes_on_an_axis_of_their_own_and_what_is_far_off_on_the_edge():
    made = plotly_charts.progress(SMALL)
    _, _, others, kept, missing = made["data"]
    assert missing["yaxis"] == "y2" and made["layout"]["yaxis2"]["range"] == [0, 1] and set(missing["y"]) == {0.02}
    assert [data[2] for data in missing["customdata"]] == ["no value"] * 2
    seen = view.view(SMALL)
    assert others["y"] == [1.004, seen.high] and others["marker"]["symbol"] == ["circle", "triangle-up"]
    assert others["customdata"][1][2] == "5.310000"
    low, high = made["layout"]["yaxis"]["range"]
    assert low < seen.low and seen.high < high < 1.1
    assert kept["y"] == [1.0, 0.99, 0.985]


def test_plotly_shows_markup_letter_by_letter():
    text = "<script>alert(1)</script> <a href='x'>y</a> &lt;b&gt; %{y} " + "w" * 500
    e = night_of(("<i>", 1.0, text), ("crash", None, text))
    *_, kept, missing = plotly_charts.progress(e)["data"]
    for trace in (kept, missing):
        assert trace["text"][0].replace("<br>", "").count("<") == 0
        assert (
            trace["text"][0].startswith("&lt;script&gt;alert(1)&lt;/script&gt;")
            and "&amp;lt;b&amp;gt;" in trace["text"][0]
        )
        assert all(len(line) <= 200 for line in trace["text"][0].split("<br>")) and len(trace["text"][0]) < 600
    assert kept["customdata"][0][3] == "&lt;i&gt;"


def test_an_empty_chart_says_why():
    def said(night):
        return [note["text"] for note in plotly_charts.progress(night)["layout"].get("annotations", [])]

    assert said(NIGHTS["none"]) == ["no experiments yet"]
    assert said(NIGHTS["only crashes"]) == [view.NOTHING]
    assert said(SMALL) == []


# ---------------------------------------------------------------------------------------------------
# Colours


def linear(colour):
    """Linear RGB in [0, 1] of "#rrggbb"."""
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return linear(colour) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_on_a_light_and_on_a_dark_page_there_is_contrast(page):
    def contrast(colour):
        low, high = sorted([luminance(colour), luminance(page)])
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(colour) >= 3 for colour in (plotly_charts.KEPT, plotly_charts.OTHER, plotly_charts.MISSING))
    assert contrast(plotly_charts.TEXT) >= 4
    assert plotly_charts.progress(SMALL)["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"


# Machado, Oliveira and Fernandes 2009, severity 1: what a protanope and a deuteranope see, in linear RGB.
BLIND = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
]


@pytest.mark.parametrize("module", [plotly_charts, figures])
@pytest.mark.parametrize("eye", [np.eye(3), *map(np.array, BLIND)], ids=["full", "protan", "deutan"])
def test_kept_crashed_and_the_rest_differ_for_the_colour_blind(module, eye):
    def lab(colour):
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        x, y, z = np.cbrt(np.clip(np.array(to_xyz) @ (eye @ linear(colour)) / [0.9505, 1, 1.089], 0, None))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    colours = [lab(colour) for colour in (module.KEPT, module.OTHER, module.MISSING)]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[:i]) > 25


# ---------------------------------------------------------------------------------------------------
# Where labels go


def test_the_first_label_has_the_best_place_and_one_without_room_has_none():
    area, none = (0, 0, 200, 100), np.empty((0, 2))
    points = [(100.0, 50.0)] * 12
    boxes = label_placement.place(points, [(80, 20)] * 12, area, np.array(points), none)
    assert boxes[0][2] < 100 and boxes[0][3] < 50  # to the lower left
    assert None in boxes and sum(box is not None for box in boxes) >= 3


def test_a_label_keeps_clear_of_what_it_had_better_not_cover():
    point, size, area = [(100.0, 100.0)], [(60, 12)], (0, 0, 200, 200)
    free = label_placement.place(point, size, area, np.array(point), np.empty((0, 2)))[0]
    covered = np.array([[(free[0] + free[2]) / 2, (free[1] + free[3]) / 2]])
    other = label_placement.place(point, size, area, np.array(point), covered)[0]
    assert label_placement.inside(covered, free) == 1 and label_placement.inside(covered, other) == 0
