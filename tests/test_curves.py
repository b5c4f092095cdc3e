"""Loss curves: kept of every run, compared at the same progress, and shown; nights without curves read as before."""

import fcntl
import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakenight import FakeNight
from starlette.testclient import TestClient

from lab.analysis import curves
from lab.analysis.history import Experiment, Night, read_night
from lab.charts import figures, plotly_charts, view
from lab.loop import status
from lab.store import run_log, runs_jsonl
from lab.web import app, working_trees

OLD = Path(__file__).parent / "data" / "night_55ea82e"  # a recorded night, without curves


def falling(shift=0.0, since=0.0, noise=0.01, seed=1, n=31):
    """A curve of n points that falls as training losses do; `shift` nats higher at the end, growing after `since`."""
    rng, xs = random.Random(seed), [max(i, 0.03) / (n - 1) for i in range(n)]
    rise = [shift * max(0.0, x - since) / (1 - since) for x in xs]
    return [[round(x, 4), 2 + 5 * math.exp(-8 * x) + up + rng.gauss(0, noise), 1e6] for x, up in zip(xs, rise, strict=True)]


def lines(curve):
    """The progress lines of a run with this curve."""
    return "".join(
        f"step {10 * i + 2:05d} ({x:.1%}) | loss {y:.6f} | lrm 1.00 | 318 ms | {speed:,.0f} tok/s | mfu 39.8% | epoch 1 | 9 s left\n"
        for i, (x, y, speed) in enumerate(curve)
    )


def told(text):
    return [found for line in text.splitlines() if (found := run_log.progress_of(line))]


# --- from the log ---------------------------------------------------------------


def test_the_curve_is_what_the_progress_lines_say():
    curve = run_log.curve_of(told(lines(falling())))
    assert curve == [[pytest.approx(x, abs=0.0005), pytest.approx(y, abs=1e-6), 1e6] for x, y, _ in falling()]
    assert run_log.is_curve(curve) and run_log.curve_of([]) == []


def test_a_log_of_many_lines_becomes_fifty_points_from_its_first_to_its_last():
    text = "".join(f"step {i:05d} ({i / 10}%) | loss {1000 - i}.5 | {i % 20 + 1} tok/s\n" for i in range(1, 1001))
    curve = run_log.curve_of(told(text))
    assert len(curve) == 50 and curve[0] == [0.02, 980.5, 10.5] and curve[-1] == [1.0, 0.5, 10.5]
    assert run_log.is_curve(curve)


def test_lines_that_say_nothing_about_the_loss_are_left_out():
    text = (
        "step 1 (1.0%) | loss 5.0 | 10 tok/s\nstep 2 (2.0%)\nstep 3 (3.0%) | loss nan\nstep 4 (4.0%) | loss 4.0\n"
        "step 5 (4.0%) | loss 3.9\nstep 6 (2.0%) | loss 1.0\nstep 7 (200.0%) | loss 1.0\n"
        f"step 8 (5.0%) | loss 1{'0' * 40}\n"
    )
    assert run_log.curve_of(told(text)) == [[0.01, 5.0, 10.0], [0.04, 3.9, None]]


@pytest.mark.parametrize(("cut", "end"), [(29, "loss 3.1"), (60, "318 ms | 1,6")])
def test_a_line_cut_where_a_long_log_is_not_read_is_no_point(tmp_path, cut, end):
    """The first part that is read ends within this line's loss, or within its number of tokens/s."""
    line = "step 00002 (50.0%) | loss 3.141593 | lrm 1.00 | 318 ms | 1,648,000 tok/s\n"
    first = "step 00001 (10.0%) | loss 5.000000 | 10 tok/s\n"
    noise = "x" * (run_log.PART - len(first) - cut - 1) + "\n"
    text = first + noise + line + "y\n" * run_log.PART + "step 00003 (90.0%) | loss 2.000000 | 10 tok/s\n"
    assert (first + noise + line)[: run_log.PART].endswith(end)
    (tmp_path / "run.log").write_text(text)
    log = run_log.read(tmp_path / "run.log")
    assert log.curve == [[0.1, 5.0, 10.0], [0.9, 2.0, 10.0]]
    (tmp_path / "run.log").write_text(text.replace("y\n", ""))
    assert [point[:2] for point in run_log.read(tmp_path / "run.log").curve] == [[0.1, 5.0], [0.5, 3.141593], [0.9, 2.0]]


@pytest.mark.parametrize(
    "value", [5, {}, [1], [[0.1, 2.0]], [[0.1, None, 1.0]], [[0.1, math.nan, 1.0]], [[0.2, 1, 1], [0.1, 1, 1]],
              [[i / 100, 1.0, 1.0] for i in range(51)], [[0.1, "2", 1.0]], [[True, 2.0, 1.0]]],
)  # fmt: skip
def test_what_is_not_a_curve_makes_a_record_unsound(value):
    record = json.loads((OLD / "runs.jsonl").read_text().splitlines()[0])
    assert runs_jsonl.sound(record) and runs_jsonl.whole(record)
    assert runs_jsonl.sound(record | {"curve": [[0.1, 2.0, None]]}) and runs_jsonl.whole(record | {"curve": []})
    assert not runs_jsonl.sound(record | {"curve": value}) and not runs_jsonl.whole(record | {"curve": value})


# --- compared ----------------------------------------------------------------------


def test_how_far_behind_is_read_at_the_last_common_progress():
    best = [[0.0, 6.0, 1.0], [0.5, 4.0, 1.0], [1.0, 2.0, 1.0]]
    assert curves.behind([[0.25, 5.5, 1.0]], best) == (0.25, 0.5)
    assert curves.behind([[0.75, 2.5, 1.0], [1.1, 1.0, 1.0]], best) == (0.75, -0.5)
    assert curves.behind(best, []) is None and curves.behind([], best) is None
    assert curves.in_progress([[0.1, 6.0, 1.0], [0.4, 4.431, 1.0]], best) == "at 40 %: 0.031 behind the best at 40 %"
    assert curves.in_progress([[0.4, 4.3, 1.0]], best) == "at 40 %: 0.100 ahead of the best at 40 %"
    assert curves.in_progress([[0.4, 4.3, 1.0]], []) is None


@pytest.mark.parametrize("shift", [0.2, -0.2])
def test_curves_part_where_their_difference_leaves_the_noise_for_good(shift):
    for seed in range(20):
        x = curves.parting(falling(shift, since=0.4, seed=seed), falling(seed=100 + seed))
        assert 0.35 < x < 0.75, "the difference begins at 0.4 and is five times the noise at 0.55"


def test_curves_that_differ_by_noise_alone_seldom_part():
    parted = [curves.parting(falling(seed=seed), falling(seed=1000 + seed)) for seed in range(200)]
    assert sum(x is not None for x in parted) < 10
    assert curves.parting(falling(), falling()) is None, "a curve does not part from itself"
    assert curves.parting(falling(1.0)[:4], falling()) is None, "four points are not enough to tell"


def a_run(curve, complete=True, slowed=0.0, commit="a" * 40, **more):
    """As much of a record as the curve of an experiment depends on."""
    return {"commit": commit, "parent": None, "row": None, "summary": {"val_bpb": 1.0} if complete else None, "slowed": slowed, "curve": curve} | more


def an_experiment(*runs, number=1):
    return Experiment(number, runs[0]["commit"][:7], 1.0, None, "keep", "an idea", runs, None)


def higher(curve, by):
    return [[x, y + by, speed] for x, y, speed in curve]


def test_what_the_seed_alone_does_is_no_parting():
    """Two seeds differ by an offset that lasts; only the repeats of a night tell how large it is."""
    repeats = [a_run(falling(seed=1)), a_run(higher(falling(seed=2), 0.1)), a_run(higher(falling(seed=3), 0.03))]
    night = SimpleNamespace(experiments=[an_experiment(*repeats), an_experiment(a_run(falling(seed=4)))])
    floor = curves.spread(night)
    assert 0.1 < floor < 0.4
    assert curves.parting(repeats[1]["curve"], repeats[0]["curve"]) is not None, "the offset is many times the noise"
    assert curves.parting(repeats[1]["curve"], repeats[0]["curve"], floor) is None
    assert curves.parting(higher(falling(seed=5), 0.6), repeats[0]["curve"], floor) is not None
    crashed = an_experiment(repeats[0], a_run(higher(falling(seed=2), 9.0), complete=False))
    assert curves.spread(SimpleNamespace(experiments=[crashed, an_experiment(a_run([]))])) == 0.0


def test_the_curve_of_an_experiment_is_that_of_its_last_fair_measurement():
    whole, crashed, slow, twin = falling(seed=1), falling(seed=2)[:12], falling(seed=3), falling(seed=4)
    first = a_run(whole)
    assert curves.of(an_experiment(first, a_run(crashed, complete=False))) == whole, "a repeat that crashed says less"
    assert curves.of(an_experiment(first, a_run(slow, slowed=0.2))) == whole
    assert curves.of(an_experiment(first, a_run(twin, same_seed=True))) == whole
    assert curves.of(an_experiment(first, a_run(twin), a_run([]))) == twin
    assert curves.of(an_experiment(a_run(slow, slowed=0.2), a_run(crashed, complete=False))) == slow
    assert curves.of(an_experiment(a_run(crashed, complete=False), a_run(crashed[:1]))) == crashed
    assert curves.of(an_experiment(a_run([]))) == []


def test_an_experiment_is_compared_with_the_best_and_the_parent_of_its_team():
    """The team's night has the experiment too, as another object; its names are the trees' and the rows there."""
    def labelled(letter, number, tree, shift, **more):
        run = a_run(falling(shift), commit=letter * 40, row=number, label=f"{tree}/0001", **more)
        return an_experiment(run, number=number)

    parent, best = labelled("a", 1, "one", 0.3), labelled("b", 2, "t<b>", 0.1)
    own = an_experiment(a_run(falling(0.2), commit="c" * 40, row=1, parent="a" * 40))
    team = SimpleNamespace(best=best, experiments=[parent, best, labelled("c", 3, "mine", 0.2)])
    assert curves.compared_with(team, own) == [("best", best), ("parent", parent)]
    assert ["(t<b>/0001)" in curves.sentences(team, own)[0], "(one/0001)" in curves.sentences(team, own)[1]] == [True, True]
    shown = plotly_charts.loss_curves(team, own)["data"]
    assert [trace["name"] for trace in shown] == ["best (t&lt;b&gt;/0001)", "parent (one/0001)", "row 1"]
    team.best = team.experiments[2]
    assert curves.compared_with(team, own) == [("parent", parent)], "it is the team's best itself"


def test_a_run_that_diverged_does_not_flatten_the_others():
    diverged = [[i / 10, 3.0 + 40 * i / 10, 1e6] for i in range(11)]
    best, other = an_experiment(a_run(falling())), an_experiment(a_run(diverged, commit="b" * 40), number=2)
    night = SimpleNamespace(best=best, experiments=[best, other])
    low, high = plotly_charts.loss_curves(night, other)["layout"]["yaxis"]["range"]
    bottom, top = view.loss_range([curves.of(best)])
    height = top - bottom
    assert bottom - 0.3 * height < low < bottom + 0.1 * height and top + 1.9 * height < high < top + 2.3 * height
    night.best = None
    assert plotly_charts.loss_curves(night, other)["layout"]["yaxis"]["range"][1] > 40, "alone it is shown as a whole"
    night.best, other = best, an_experiment(a_run(falling(0.5), commit="b" * 40), number=2)
    within = plotly_charts.loss_curves(night, other)["layout"]["yaxis"]["range"]
    assert within == list(view.loss_range([curves.of(best), curves.of(other)])), "an ordinary one is seen as a whole"


def test_curves_that_part_at_the_very_beginning_part():
    best, other = ([[i / 10, y, 1e6] for i in range(11)] for y in (2.0, 2.5))
    both = [an_experiment(a_run(best)), an_experiment(a_run(other, commit="b" * 40), number=2)]
    night = SimpleNamespace(best=both[0], experiments=both)
    assert curves.parting(other, best) == 0.0
    assert curves.sentences(night, both[1]) == ("parts from the best (row 1) at 0%; at 100% the training loss is 0.500 above it",)


# --- recorded, and shown ------------------------------------------------------------


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Three baselines, a keep, a discard that parts from it at 40 %, and a crash in the middle of training."""
    night = FakeNight(tmp_path_factory.mktemp("curves") / "tree")
    for i, (value, shift) in enumerate([(1.0, 0.3), (1.002, 0.31), (0.998, 0.29)]):
        night.run(value, seed=42 + i, progress=lines(falling(shift, seed=i)))
        night.recorded("baseline")
    for name, value, curve, tail in [
        ("better <b>", 0.99, falling(0.1, seed=7), None),
        ("worse", 1.2, falling(0.6, since=0.4, seed=8), None),
        ("broken", None, falling(seed=9)[:12], "Traceback (most recent call last):\nRuntimeError: a shape\n"),
    ]:
        night.change_train()
        night.commit(name)
        night.run(value, tail=tail, progress=lines(curve))
        night.recorded(name)
    return night


def test_every_run_has_its_curve_in_the_file_and_in_git(night):
    records = night.records()
    assert [r["verdict"] for r in records] == ["confirm", "confirm", "keep", "keep", "discard", "crash"]
    assert [len(r["curve"]) for r in records] == [31, 31, 31, 31, 31, 12]
    assert records[4]["curve"][-1] == [1.0, pytest.approx(2.6, abs=0.05), 1e6]
    night.check()  # git's records are those of the file
    assert len((night.path / "runs.jsonl").read_text().splitlines()[4]) < 4000


def test_a_lost_runs_jsonl_is_rebuilt_with_its_curves(night, tmp_path):
    twin = night.copy(tmp_path / "twin")
    (twin.path / "runs.jsonl").unlink()
    twin.change_train()
    twin.commit("again")
    twin.run(1.5)
    twin.recorded("again")
    assert [r["curve"] for r in twin.records()[:-1]] == [r["curve"] for r in night.records()]


def test_status_compares_a_run_in_progress_with_the_best(night, tmp_path):
    twin = night.copy(tmp_path / "twin")
    twin.change_train()
    twin.commit("idea")
    best = night.records()[3]["curve"]
    twin.run(tail="", progress=lines([[x, y + 0.25, s] for x, y, s in best[:13]]))
    fd = os.open(twin.path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        text, data = twin.lab("status").out, json.loads(twin.lab("status", "--json").out)
    finally:
        os.close(fd)
    assert data["beside_the_best"] == "at 40 %: 0.250 behind the best at 40 %"
    assert f"\n  {data['beside_the_best']}\n" in text.partition("run in progress: ")[2]
    assert json.loads(twin.lab("status", "--json").out)["beside_the_best"] is None, "the run is over"


def test_a_run_is_not_compared_with_a_best_of_another_kind_nor_once_it_is_over(night, tmp_path):
    twin, known = night.copy(tmp_path / "twin"), read_night(night.path)
    twin.change_train()
    progress = lines(night.records()[3]["curve"][:13])

    def told(**run):
        twin.run(**({"tail": "", "progress": progress} | run))
        return status.beside_the_best(twin.path, known)

    assert told() == "at 40 %: 0.000 ahead of the best at 40 %"
    assert told(device="cuda (a fake)") is None and told(rules_sha256="c" * 64) is None and told(dataset="other") is None
    assert told(val_bpb=1.0, tail=None, progress=lines(night.records()[3]["curve"])) is None, "the log of a finished run"
    assert told(val_bpb=1.0, tail=None, seconds=-1.0) is None, "one that contradicts itself"
    assert status.beside_the_best(night.path, known) is None, "the log of the last recorded run, which crashed"
    (twin.path / "run.log").write_text(progress)
    assert status.beside_the_best(twin.path, known) is None, "a log without a header"


def test_the_page_shows_the_curve_over_the_best_and_the_parent(night):
    client = TestClient(app.create(working_trees.find([night.path])), base_url="http://127.0.0.1:8000")
    short = [e["commit"] for e in client.get("/api/experiments").json()["experiments"]]
    worse = client.get(f"/api/curves/{short[2]}").json()
    assert [trace["name"] for trace in worse["data"]] == ["best and parent (row 2)", "row 3"]
    (line,), (note,) = worse["layout"]["shapes"], worse["layout"]["annotations"]
    assert 0.4 < line["x0"] == line["x1"] < 0.6 and note["text"] == " parts from the best and parent "
    page = client.get(f"/experiment/{short[2]}").text
    assert f"<p>It parts from the best and parent (row 2) at {line['x0']:.0%}; at 100% the training loss is 0." in page
    assert " above it.</p>" in page
    assert f'data-commit="{short[2]}"' in page and "/static/experiment.js" in page
    names = [[trace["name"] for trace in client.get(f"/api/curves/{commit}").json()["data"]] for commit in short]
    assert names == [["best (row 2)", "row 1"], ["parent (row 1)", "row 2"], names[2], ["best and parent (row 2)", "row 4"]]
    for name in ("chart.js", "experiment.js"):
        assert client.get(f"/static/{name}").status_code == 200
    assert client.get("/api/curves/0123456").status_code == 404


def test_the_figure_has_a_line_for_each_run_and_colours_only_kept_ones(night):
    axes = figures.loss_curves(read_night(night.path)).axes[0]
    grey = [line for line in axes.lines if line.get_color() == figures.OTHER]
    assert len(axes.lines) == 6 and len(grey) == 2  # three of the baseline and one keep; a discard and a crash
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1 baseline", "2 better <b> (best)"]
    low, high = axes.get_ylim()
    assert low < 2.1 and 3 < high < 5, "the steep first tenth of the run is out of view"


# --- nights without curves ----------------------------------------------------------


def test_a_night_without_curves_is_shown_as_before(tmp_path):
    for name in ("results.tsv", "runs.jsonl"):
        (tmp_path / name).write_bytes((OLD / name).read_bytes())
    night = read_night(tmp_path)
    assert night.notes == () and len(night.records) == 31
    (text,) = figures.loss_curves(night).axes[0].texts
    assert text.get_text() == "runs.jsonl has no loss curves"
    assert [curves.sentences(night, e) for e in night.experiments] == [()] * 28
    assert all(plotly_charts.loss_curves(night, e)["data"] == [] for e in night.experiments)
    client = TestClient(app.create(working_trees.find([tmp_path], alone=True)), base_url="http://127.0.0.1:8000")
    page = client.get(f"/experiment/{night.best.commit}").text
    assert "Training loss" not in page and "<script" not in page


def test_a_night_with_some_curves_shows_those(tmp_path):
    """The recorded night, as if its last ten runs had been recorded by this version."""
    records = [json.loads(line) for line in (OLD / "runs.jsonl").read_text().splitlines()]
    for i, r in enumerate(records[-10:]):
        r["curve"] = falling(0.1 * i, seed=i)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "results.tsv").write_bytes((OLD / "results.tsv").read_bytes())
    night, before = read_night(tmp_path), read_night(OLD)
    assert night.notes == () and night.best.number == before.best.number and night.worth == before.worth
    assert len(figures.loss_curves(night).axes[0].lines) == 10
    assert sum(bool(curves.of(e)) for e in Night(records=night.records).experiments) >= 9


def test_the_range_of_the_losses_leaves_out_the_steep_beginning():
    low, high = view.loss_range([[[0.01, 9.0, None], [0.2, 3.0, None], [1.0, 2.0, None]]])
    assert 1.8 < low < 2 and 3 < high < 3.2
    assert view.loss_range([]) is None and view.loss_range([[[0.05, 9.0, None]]])[1] > 9
