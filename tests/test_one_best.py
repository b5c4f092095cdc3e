"""One best: status, runs/best, sample, prove, audit, dashboard, page, notebook and picture name the same experiment, on
nights in which the lowest number and the lowest estimate are two different ones."""

import argparse
import re
import types

import hypothesis.strategies as st
import pytest
from fakenight import TRAIN, FakeNight
from hypothesis import given, settings
from starlette.testclient import TestClient

from lab.analysis.history import LOWEST, Night, read_night
from lab.charts import notebook, view
from lab.loop import many_trees
from lab.store import archive
from lab.store.repository import Repo
from lab.verify import audit, commits, sample
from lab.web import app, working_trees


def twice(night, description, values, *args, text=None):
    """An experiment that is run again under another seed."""
    night.change_train(text)
    night.commit(description)
    for i, value in enumerate(values):
        night.run(value, seed=42 + i)
        result = night.recorded(*([description] if i == 0 else []), *args)
    assert result.verdict == "keep", result.out


def simpler_and_trusted(night):
    """The simplification has the higher number, and the lower estimate, as it has two runs."""
    night.experiment("wider", 0.99)
    shorter = night.read("train.py").replace("WIDTH = 512\n", "")
    twice(night, "no width", [0.9902, 0.9904], "--simpler", text=shorter)
    return 2, 3  # rows: the lowest number, the best


def simpler_and_worse(night):
    """The simplification is kept, and is the best by neither."""
    twice(night, "wider", [0.99, 0.9901])
    twice(night, "no width", [0.9905, 0.9907], "--simpler", text=TRAIN.format(1).replace("WIDTH = 512\n", ""))
    return 2, 2


def lucky(night):
    """A low number that does not hold when it is run again: the branch steps back, and the lowest number is no keep."""
    night.experiment("wider", 0.99)
    night.experiment("lucky", 0.9889)
    for seed in (43, 44):
        night.run(0.9915, seed=seed)
        night.recorded()
        if night.read("train.py") != TRAIN.format(2):
            return 2, 2
    raise AssertionError("the gain was taken to hold")


@pytest.fixture(scope="module", params=[simpler_and_trusted, simpler_and_worse, lucky], ids=lambda play: play.__name__)
def played(request, tmp_path_factory):
    """(night, row with the lowest number, row of the best)"""
    night = FakeNight(tmp_path_factory.mktemp("best") / "night")
    night.baseline()
    lowest, best = request.param(night)
    kept = [row for row in night.rows() if row[3] == "keep"]
    assert min(kept, key=lambda row: float(row[1])) == night.rows()[lowest - 1], "the lowest number is another one"
    return night, lowest, best


def named_by(text, pattern):
    (found,) = re.findall(pattern, text)
    return int(found)


def everybody(night):
    """{who: the row that it calls the best}"""
    client = TestClient(app.create(working_trees.find([night.path])), base_url="http://127.0.0.1:8000")
    whole, page = client.get("/api/experiments").json(), client.get("/").text
    read, history = read_night(night.path), Night(records=archive.records_of(night.path, "test"))
    tree = many_trees.read(night.path)
    by_commit = {r["commit"]: r["row"] for r in night.records() if r["row"]}
    chosen = audit.chosen(history, history.kept, argparse.Namespace(best=True, numbers=[]))
    value = {f"{e.val_bpb:.4f}": e.number for e in read.standing}
    return {
        "status": named_by(night.lab("status").out, r"best: [\d.]+ \(mean of \d\), row (\d{4})"),
        "status --trees": tree["best"]["row"],
        "runs/best": int((night.path / "runs" / "best").resolve().name[:4]),
        "sample": int(sample.find_run("runs/best", night.path).resolve().name[:4]),
        "prove": by_commit[commits.default(Repo(night.path))[-1]],
        "audit": chosen[-1]["row"],
        "records": history.best.number,
        "API": whole["best"]["number"],
        "API, list": [e["number"] for e in whole["experiments"] if e["best"]][-1],
        "API, latest": client.get("/api/latest").json()["best"]["number"],
        "page": named_by(page, r"<small>row (\d+)"),
        "page, table": named_by(page, r'<tr class="[^"]* best">\s*<td class="c-number">(\d+)'),
        "notebook": named_by(notebook.outcomes(read), r"best: [\d.]+ \(row (\d+),"),
        "picture": value[view.title(read).rpartition("→ ")[2]],
        "line of the picture": value[f"{read.running_best()[-1]:.4f}"],
    }  # fmt: skip


def test_everybody_names_the_same_experiment(played):
    night, _, best = played
    assert everybody(night) == dict.fromkeys(everybody(night), best)


def test_a_table_without_records_has_its_lowest_kept_value_and_says_so(played, tmp_path):
    night, lowest, _ = played
    (tmp_path / "results.tsv").write_text(night.read("results.tsv"))
    read = read_night(tmp_path)
    assert read.best.number == lowest and not read.by_estimate and read.best_record is None
    tree = many_trees.read(tmp_path)
    assert tree["best"]["row"] == lowest and not tree["by_estimate"] and LOWEST in many_trees.table([tree])
    client = TestClient(app.create(working_trees.find([tmp_path], alone=True)), base_url="http://127.0.0.1:8000")
    whole, page = client.get("/api/experiments").json(), client.get("/").text
    assert whole["best"]["number"] == lowest and whole["best_by_estimate"] is False and "the lowest kept value" in page


def test_a_night_with_records_does_not_say_so(played):
    night, _, _ = played
    client = TestClient(app.create(working_trees.find([night.path])), base_url="http://127.0.0.1:8000")
    assert client.get("/api/experiments").json()["best_by_estimate"] is True
    assert "the lowest kept value" not in client.get("/").text
    assert LOWEST not in many_trees.text([str(night.path)])


# ---------------------------------------------------------------------------------------------------
# What holds for every night

VALUES = st.integers(90, 110).map(lambda n: n / 100)  # few of them: equal values come often
MORE = st.lists(st.tuples(st.sampled_from(["keep", "discard", "crash"]), VALUES, st.integers(1, 3)), max_size=12)


def records(baseline, more):
    """The records that `lab record` would write of such a night, as far as a Night looks at them."""
    made, anchor = [], "0" * 40
    for row, (status, value, n) in enumerate([("keep", baseline, 3), *more], 1):
        commit, first = f"{row:040x}", row == 1
        for i in range(1 if status == "crash" else n):
            last = status == "crash" or i == n - 1
            summary = {"val_bpb": value + 0.001 * i, "training_seconds": 300.0, "total_tokens_M": 1.0, "peak_vram_mb": 0.0}
            made.append({
                "run_id": f"{row}-{i}", "log": f"{row}-{i}", "tag": "t", "commit": commit, "short": commit[-7:],
                "row": row if last else None, "verdict": status if last else "confirm", "description": "x",
                "baseline": first, "code": commit, "parent": None if first else anchor, "start": None, "end": None,
                "header": {"seed": 42 + i}, "summary": None if status == "crash" else summary,
                "mean": None if status == "crash" else value + 0.0005 * i, "n": i + 1, "memory_gb": 0.0,
            })  # fmt: skip
        if status == "keep":
            anchor = commit
    return made


def table(more):
    """A Night of another harness: rows without records."""
    experiments = Night(records=records(1.0, more)).experiments
    return Night([types.SimpleNamespace(**vars(e) | {"runs": (), "kept": e.kept}) for e in experiments])


def holds(night):
    best, line, standing = night.best, night.running_best(), night.standing
    assert line[-1] == best.val_bpb and best in standing
    equals = [e for e in standing if night.worth[e.number] == min(night.worth.values())]
    assert best is equals[-1 if night.by_estimate else 0]
    assert len(line) == len(night.experiments)
    changes = [e for e, before, now in zip(night.experiments[1:], line, line[1:], strict=False) if before != now]
    assert all(e in standing for e in changes)
    gains = {e.number: gain for e, gain in night.gains()}
    assert set(gains) == {e.number for e in night.experiments[1:] if e.kept}
    assert sum(gains[e.number] for e in changes) == pytest.approx(night.baseline.val_bpb - best.val_bpb)


@settings(max_examples=300, deadline=None)
@given(VALUES, MORE)
def test_the_line_ends_at_the_best_and_the_gains_add_up_to_it(baseline, more):
    night = Night(records=records(baseline, more))
    assert night.by_estimate and night.estimates.keys() == {r["row"] for r in night.kept}
    assert night.best_record is next(r for r in night.kept if r["row"] == night.best.number)
    assert night.worth[night.best.number] == min(night.estimates.values())
    holds(night)


@settings(max_examples=300, deadline=None)
@given(MORE)
def test_so_it_is_for_a_table_alone_whose_best_is_the_lowest_kept_value(more):
    night = table(more)
    assert not night.by_estimate and night.best.val_bpb == min(e.val_bpb for e in night.experiments if e.kept)
    holds(night)


@settings(max_examples=100, deadline=None)
@given(VALUES, MORE, VALUES)
def test_what_was_discarded_is_never_the_best_however_low_it_is(baseline, more, value):
    night = Night(records=records(baseline, [*more, ("discard", value / 2, 1)]))
    assert night.best.kept and night.best.val_bpb > value / 2
