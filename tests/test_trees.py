"""lab status --trees: the nights of many working trees in one table, and what in it may be compared."""

import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
from fakenight import FakeNight

from lab.loop import many_trees


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A baseline at 1.0, a keep at 0.99, a discard, a crash."""
    night = FakeNight(tmp_path_factory.mktemp("trees") / "night")
    night.baseline()
    night.experiment("wider", 0.99)
    night.experiment("narrower", 1.02)
    night.change_train()
    night.commit("crash")
    night.run(tail="FAIL: loss is nan\n")
    night.recorded("explodes")
    return night


@pytest.fixture
def many(template, tmp_path):
    """many(name, best=..., device=...) makes a tree with what a night leaves on disk, and no git."""

    def make(name, best=0.99, user="", **header):
        place = tmp_path / "scratch" / user / name
        place.mkdir(parents=True)
        text = template.read("runs.jsonl").replace("0.99,", f"{best},")
        records = [json.loads(line) | {"tag": name} for line in text.splitlines()]
        records = [r | {"header": r["header"] | header} for r in records]
        (place / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (place / "results.tsv").write_text(template.read("results.tsv").replace("0.990000", f"{best:.6f}"))
        return place

    return make


def show(template, *globs, wrap=(), **kwargs):
    done = subprocess.run(
        [*wrap, sys.executable, "-m", "lab", "status", "--trees", *map(str, globs)], cwd="/", env=template.env,
        capture_output=True, text=True, timeout=60, **kwargs,
    )  # fmt: skip
    return done


def lines_of(out, word):
    return [line for line in out.splitlines() if word in line]


def test_each_tree_is_a_row_and_the_lowest_is_the_best(template, many, tmp_path):
    for name, best in [("one", 0.985), ("two", 0.97), ("three", 0.98)]:
        many(name, best)
    done = show(template, tmp_path / "scratch" / "*")
    assert done.returncode == 0 and done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert [row[1:7] for row in rows] == [
        ["two", "4", "2", "0.970000", "0.030000", "0.002000"],
        ["three", "4", "2", "0.980000", "0.020000", "0.002000"],
        ["one", "4", "2", "0.985000", "0.015000", "0.002000"],
    ]
    assert "best: 0.970000" in done.stdout and "two, row 0002" in done.stdout and "wider" in done.stdout
    assert "not to be compared" not in done.stdout and "selection bias" in done.stdout


@pytest.mark.parametrize("key", ["device", "rules_sha256", "data_sha256", "dataset"])
def test_what_differs_in_hardware_rules_or_data_is_kept_apart(template, many, tmp_path, key):
    many("one", 0.985)
    many("two", 0.97, **{key: "cafebabe of another kind"})
    out = show(template, tmp_path / "scratch" / "*").stdout
    assert "values of one part are not to be compared with another's" in out
    assert len(lines_of(out, "best: ")) == 2
    assert len(lines_of(out, "cafebabe")) == 1


def test_many_globs_and_what_the_shell_expanded_are_one_table(template, many, tmp_path):
    a, b = many("a"), many("b")
    (tmp_path / "scratch" / "unrelated").mkdir()
    out = show(template, a, b, a, tmp_path / "scratch" / "*").stdout
    assert len(lines_of(out, "0.990000")) == 3  # a, b, the best
    assert "1 folders hold no night" in out


def test_trees_that_may_not_be_read_are_named_and_the_others_shown(template, many, tmp_path, no_privileges):
    many("open", user="ann")
    closed_tree = many("closed", user="ann")
    many("hidden", user="bob")
    unreadable = many("table", user="ann")
    closed_tree.chmod(0)
    (tmp_path / "scratch" / "bob").chmod(0)
    (unreadable / "runs.jsonl").chmod(0)
    try:
        done = show(template, tmp_path / "scratch" / "*" / "*", wrap=no_privileges)
    finally:
        (tmp_path / "scratch" / "bob").chmod(0o755)
        closed_tree.chmod(0o755)
    assert done.returncode == 0 and done.stderr == ""
    named = lines_of(done.stdout, "not read: ")
    assert [str(tmp_path / "scratch" / place) in line for place, line in zip(["ann/closed", "bob"], named, strict=True)]
    assert all("ermission denied" in line for line in named)
    assert "runs.jsonl cannot be read" in done.stdout
    assert lines_of(done.stdout, "ann/open")


def test_users_are_shown_where_there_are_several(many, tmp_path, monkeypatch):
    many("one", user="ann")
    many("two", user="bob")
    pattern = [str(tmp_path / "scratch" / "*" / "*")]
    assert "  user  " not in many_trees.text(pattern)
    monkeypatch.setattr(many_trees, "owner", lambda path: path.parent.name)
    assert " ann " in many_trees.text(pattern) and " bob " in many_trees.text(pattern)


def test_a_run_in_progress_is_seen_by_its_lock_or_by_its_growing_log(many, tmp_path):
    here, elsewhere, idle = many("here"), many("elsewhere"), many("idle")
    for place in (here, elsewhere, idle):
        (place / "run.log").write_text("step 00123 (41.0%) | loss 3.1 | lrm 1.00\n")
    for place in (here, idle):
        os.utime(place / "run.log", (time.time() - 900,) * 2)
    fd = os.open(here, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        found, _, _ = many_trees.gather([str(tmp_path / "scratch" / "*")])
    finally:
        os.close(fd)
    states = {os.path.basename(tree["tree"]): tree["state"] for tree in found}
    assert states["here"] == "run: step 00123 (41.0%)" and states["idle"] == ""
    assert states["elsewhere"].startswith("run.log ")


def test_another_harnesss_table_and_a_fresh_tree_are_rows_too(many, tmp_path):
    place = many("table")
    (place / "runs.jsonl").unlink()
    fresh = tmp_path / "scratch" / "fresh"
    fresh.mkdir()
    for name in ("train.py", "program.md"):
        (fresh / name).write_text("")
    found, _, _ = many_trees.gather([str(tmp_path / "scratch" / "*")])
    known = {os.path.basename(tree["tree"]): tree for tree in found}
    assert known["table"]["best"]["mean"] == 0.99 and known["table"]["kind"] is None and known["table"]["rows"] == 4
    assert known["fresh"]["rows"] == 0 and known["fresh"]["best"] is None
    assert "hardware and rules unknown" in many_trees.table(found)


def test_broken_files_are_notes(many, tmp_path):
    place = many("one")
    with open(place / "runs.jsonl", "a") as f:
        f.write('{"half a li\nnonsense\n')
    other = many("two")
    (other / "runs.jsonl").write_bytes(b"\xff\xfe\0\n" * 3)
    (other / "results.tsv").write_text("not\ta table\n")
    text = many_trees.text([str(tmp_path / "scratch" / "*")])
    assert "best: 0.990000" in text and len(lines_of(text, "note: ")) == 3


def test_no_night_at_all_is_one_line(template, tmp_path):
    done = show(template, tmp_path / "nothing*")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "no night in what" in done.stderr


def test_json_is_for_programs(template, many, tmp_path):
    many("one")
    done = show(template, tmp_path / "scratch" / "*", "--json")
    data = json.loads(done.stdout)
    assert data["trees"][0]["best"]["mean"] == 0.99 and data["trees"][0]["kind"][1] == "stdlib"
    assert data["not_read"] == []


def test_reading_a_tree_asks_no_git_and_changes_nothing(many, monkeypatch):
    place = many("one")
    before = sorted(os.listdir(place))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    assert many_trees.read(place)["rows"] == 4 and sorted(os.listdir(place)) == before
