"""A team for those that look at it from outside: the dashboard's page, and `lab status --trees`."""

import fcntl
import json
import os
import re
import shutil
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakenight import PROGRESS
from faketeam import Teammate
from starlette.testclient import TestClient

from lab.analysis import history
from lab.base import git
from lab.charts import notebook, plotly_charts, view
from lab.loop import checks, many_trees
from lab.share import exchange, team
from lab.share.membership import membership
from lab.store import names
from lab.store.repository import Repo, Untrusted
from lab.web import app, working_trees

NASTY = "<script>alert(1)</script> & <b>bold</b> {{ 7 * 7 }}"
LOCAL = "http://127.0.0.1:8000"
FALLING = "".join(PROGRESS.replace("41.0", f"{9 * i}").replace("3.14", f"{9 - 0.5 * i}") for i in range(12))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """autoresearch/test: baseline 1.0, "wider" 0.99. autoresearch/b: a keep with a nasty description, a
    crash. autoresearch/c: a late gain. main: the checkout that a human looks from."""
    first = Teammate(tmp_path_factory.mktemp("team") / "a")
    for i, value in enumerate((1.0, 1.002, 0.998)):
        first.run(value, seed=42 + i, progress=FALLING)
        first.recorded("baseline")
    third = first.worktree("c")
    first.experiment("wider", 0.99, progress=FALLING)
    second = first.worktree("b")
    second.experiment(NASTY, 0.97, progress=FALLING)
    second.experiment("broken", None, tail="Traceback (most recent call last):\nRuntimeError: a shape\n")
    third.experiment("longer", 0.995, progress=FALLING)
    first.git("worktree", "add", "-q", str(first.path.parent / "main"), "main")
    return first


@pytest.fixture(scope="module")
def client(first):
    return TestClient(app.create(working_trees.find([first.path])), base_url=LOCAL)


def everything_below(path):
    return sorted((str(p), p.lstat().st_mtime_ns) for p in Path(path).rglob("*"))


# --- the dashboard ---------------------------------------------------------------


def test_the_team_is_one_night_with_one_best_from_wherever_one_looks(first, client):
    shown = [client.get("/api/team", params={"tree": tree}).json() for tree in ("test", "b", "main")]
    assert all(other | {"tree": ""} == shown[0] | {"tree": ""} for other in shown)
    told = shown[0]
    assert told["team"] == "gpus" and told["runs"] == 7 and told["sigma"] == pytest.approx(0.002)
    rows = [(e["found_by"], e["description"], e["val_bpb"], e["status"], e["late"]) for e in told["experiments"]]
    assert rows == [
        ("test", "baseline", 1.0, "keep", False), ("test", "wider", 0.99, "keep", False), ("b", NASTY, 0.97, "keep", False),
        ("b", "broken", None, "crash", False), ("c", "longer", 0.995, "discard", True),
    ]  # fmt: skip
    assert told["best"] == told["experiments"][2] and told["best"]["label"] == "b/0001" and told["baseline"]["number"] == 1
    found = {m["name"]: (m["kept"], m["experiments"], m["gain"] and round(m["gain"], 6), m["best"]) for m in told["members"]}
    assert found == {"b": (1, 2, 0.02, 0.97), "test": (2, 2, 0.01, 0.99), "c": (0, 1, None, None)}
    assert [m["name"] for m in told["members"]] == ["b", "test", "c"]
    own = checks.team_of(first.repo, checks.night_of(first.repo))
    assert own.best["commit"].startswith(told["best"]["commit"]), "the members see the same best"


def test_the_chart_has_a_colour_a_tree_and_one_running_best(client):
    traces = client.get("/api/team/chart").json()["data"]
    assert [t["y"] for t in traces if t["name"] == "best so far"] == [[1.0, 0.99, 0.97, 0.97, 0.97]]
    marked = [t for t in traces if "marker" in t and t["x"]]
    assert [(t["name"], t["x"], t["marker"]["color"]) for t in marked] == [
        ("test (2 of 2 kept)", [1, 2], view.TREES[0]), ("b (1 of 2 kept)", [3], view.TREES[1]),
        ("b (1 of 2 kept)", [4], view.TREES[1]), ("c (0 of 1 kept)", [5], view.TREES[2]),
    ]  # fmt: skip
    assert marked[2]["yaxis"] == "y2" and marked[3]["marker"]["symbol"] == ["circle-open"], "a crash is no value, a late gain a ring"
    assert marked[1]["customdata"][0][4:] == ["b", "b"] and "<script" not in marked[1]["text"][0]
    colours = {m["name"]: m["colour"] for m in client.get("/api/team").json()["members"]}
    assert colours == {"test": view.TREES[0], "b": view.TREES[1], "c": view.TREES[2]}


def test_64_trees_can_be_told_apart_on_light_and_on_dark():
    assert len({plotly_charts.mark(i)[:2] for i in range(64)}) == len({(plotly_charts.mark(i)[0], plotly_charts.mark(i)[2]) for i in range(64)}) == 64

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for colour in view.TREES:
        for page in ("#fbfbfa", "#ffffff", "#14171a", "#1c2024"):
            high, low = sorted((light(colour), light(page)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, page)


def test_the_page_holds_every_row_and_nothing_of_it_is_markup(client):
    text = client.get("/team?tree=test").text
    assert text.count('<tr class="') == 5 and text.count("data-member=") == 3 and "b/0001, found by b" in text
    assert "&lt;script&gt;alert(1)" in text and "<script>" not in text and "<b>bold" not in text and "{{ 7 * 7 }}" in text
    links = re.findall(r'href="(/experiment/[0-9a-f]+\?tree=\w+)"', text)
    assert [link.partition("tree=")[2] for link in links] == ["test", "test", "b", "b", "c"]
    assert {client.get(link).status_code for link in links} == {200}
    assert '<a href="/team?tree=b">gpus</a>' in client.get("/?tree=b").text


def test_the_page_of_an_experiment_has_the_curves_of_the_teams_best_and_of_another_trees_parent(client):
    """b/0001 is the team's best, c/0001 is worse, and the parent of both is the baseline, which test/0001 ran."""
    found = {}
    for e in client.get("/api/team").json()["experiments"]:
        shown = client.get(f"/api/curves/{e['commit']}", params={"tree": e["found_by"]}).json()["data"]
        found[e["description"]] = [trace["name"] for trace in shown]
    assert found == {
        "baseline": ["best (b/0001)", "row 1"], "wider": ["best (b/0001)", "parent (test/0001)", "row 2"],
        NASTY: ["parent (test/0001)", "row 1"], "longer": ["best (b/0001)", "parent (test/0001)", "row 1"], "broken": [],
    }  # fmt: skip
    commit = client.get("/api/experiments", params={"tree": "c"}).json()["experiments"][0]["commit"]
    text = client.get(f"/experiment/{commit}?tree=c").text
    assert "from the best (b/0001)" in text and "from the parent (test/0001)" in text


def test_a_tree_in_no_team_says_so(tmp_path):
    lonely = Teammate(tmp_path / "a", team=None)
    client = TestClient(app.create(working_trees.find([lonely.path])), base_url=LOCAL)
    for path in ("/team", "/api/team", "/api/team/live", "/api/team/chart"):
        answer = client.get(path)
        assert answer.status_code == 404 and "in no team" in answer.text
    assert "/team?" not in client.get("/").text
    lonely.git("config", names.TEAM, "a/b")
    assert client.get("/api/team").status_code == 404 and client.get("/").status_code == 200
    (lonely.path / "below").mkdir()  # a folder of a checkout is no member
    lonely.git("config", names.TEAM, "gpus")
    assert next(iter(working_trees.find([lonely.path / "below"], alone=True).values())).team_name() is None
    assert client.get("/api/team").json()["experiments"] == [] and client.get("/team").status_code == 200


def test_looking_writes_nothing_names_nobody_and_starts_nothing(first, tmp_path):
    ran = tmp_path / "ran"
    ran.mkdir()
    program = tmp_path / "trap"
    program.write_text(f"#!/bin/sh\ntouch {ran}/trap\n")
    program.chmod(0o755)
    twin = first.copy(tmp_path / "twin")
    for tree in (twin.path / ".git" / "worktrees").iterdir():
        (tree / names.MEMBER).unlink(missing_ok=True)
    (twin.path / ".git" / names.MEMBER).unlink(missing_ok=True)
    for key in ("core.pager", "core.fsmonitor", "gpg.program", "core.sshCommand", "diff.external"):
        twin.git("config", key, str(program))
    for key, value in [("log.showSignature", "true"), ("core.hooksPath", str(tmp_path)), ("core.repositoryFormatVersion", "1"),
                       ("extensions.partialClone", "origin"), ("remote.origin.url", f"ext::{program} x"), (names.REMOTE, "origin"),
                       ("remote.origin.promisor", "true"), ("protocol.ext.allow", "always")]:  # fmt: skip
        twin.git("config", key, value)
    # A record of a commit that is not here: git would fetch it.
    record = first.at(first.path.parent / "b").records()[-1] | {"tag": "x", "commit": "0123456789" * 4}
    stored = twin.git("hash-object", "-w", "--stdin", stdin=json.dumps(record) + "\n")
    folder = twin.git("mktree", stdin=f"100644 blob {stored}\t0001-{record['run_id']}.json\n")
    commit = twin.git("commit-tree", twin.git("mktree", stdin=f"040000 tree {folder}\t0000\n"), "-m", "x")
    twin.git("update-ref", f"{names.MIRROR_REFS}gpus/{'0' * 12}/x", commit)
    shared = twin.path / ".git" / names.SHARE
    if shared.is_dir():
        for path in shared.iterdir():
            path.unlink()
        os.mkfifo(shared / "gpus-checked")  # a reader of it would wait for ever
    before = everything_below(twin.path)
    client = TestClient(app.create(working_trees.find([twin.path], alone=True)), base_url=LOCAL)
    team._read.clear()
    for path in ("/team", "/api/team", "/api/team/chart", "/api/team/live", "/"):
        assert client.get(path).status_code == 200
    told = client.get("/api/team").json()
    assert len(told["experiments"]) == 5 and "1 record left out: has a hash that does not fit its commit" in told["notes"][0]
    assert "best of the team: 0.970000" in many_trees.text([str(twin.path)])
    assert everything_below(twin.path) == before and os.listdir(ran) == []


def test_new_records_show_without_a_restart_and_old_ones_are_forgotten(first, tmp_path):
    twin = first.copy(tmp_path / "twin")
    (tree,) = working_trees.find([twin.path], alone=True).values()
    client = TestClient(app.create({"test": tree}), base_url=LOCAL)
    before = client.get("/api/team/live").json()
    known = tree.team()[0]
    assert tree.team()[0] is known and client.get("/api/team/live").json() == before
    assert twin.experiment("narrower", 1.2)[1].rc == 0
    after = client.get("/api/team/live").json()
    assert after["version"] != before["version"] and f'data-version="{after["version"]}"' in client.get("/team").text
    assert client.get("/api/team").json()["experiments"][-1]["description"] == "narrower"
    assert exchange.publish(twin.repo, membership(twin.repo), "test", exchange.state_of(twin.repo, "test", "thinks")) is None
    assert client.get("/api/team/live").json()["version"] not in (before["version"], after["version"])
    assert {commit for commit, _ in team._read} == {member.commit for member in tree.team()[0].trees}


def test_what_a_tree_runs_is_seen_by_its_lock(first, client):
    at = first.path.parent / "b"
    log, holder = at / "run.log", os.open(at, os.O_RDONLY)
    before = log.read_bytes()
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        log.write_text("step 00123 (41.0%) | loss 3.1 | lrm 1.00\n")
        assert {m["name"]: m["runs_now"] for m in client.get("/api/team/live").json()["members"]} == {"test": "", "b": "training, 41 %", "c": ""}
    finally:
        os.close(holder)
        log.write_bytes(before)


def test_hostile_refs_are_notes_and_text(first, tmp_path):
    """A branch whose name is markup, refs that are no member's, a ref that is no commit, a state that is a script."""
    twin = first.copy(tmp_path / "twin")
    ref = next(ref for ref in Repo(twin.path).refs(f"{names.TEAM_REFS}gpus/") if ref.endswith("/b"))
    state = dict.fromkeys(("tree", "host", "branch", "next", "code"), NASTY) | {"when": datetime.now(timezone.utc).isoformat()}
    state = twin.git("hash-object", "-w", "--stdin", stdin=json.dumps(state))
    folder = twin.git("mktree", stdin=f"100644 blob {state}\t{names.STATE}\n")
    commit = twin.git("commit-tree", folder, "-m", "x")
    where = f"{names.MIRROR_REFS}gpus"
    twin.git("update-ref", f"{where}/{'0' * 12}/<img>", commit)
    twin.git("update-ref", f"{where}/{'1' * 12}/\u202eodd", ref)
    twin.git("update-ref", f"{where}/nobody/x", commit)
    twin.git("update-ref", f"{where}/{'2' * 12}/blob", state)
    client = TestClient(app.create(working_trees.find([twin.path], alone=True)), base_url=LOCAL)
    told, text = client.get("/api/team").json(), client.get("/team").text
    assert len(told["experiments"]) == 5 and {m["name"] for m in told["members"]} == {"b", "test", "c", "<img>", "odd", "blob"}
    assert any("not what a member publishes" in note for note in told["notes"]) and any("blob" in note for note in told["notes"])
    assert "<img>" not in text and "&lt;img&gt;" in text and "<script>" not in text and "\u202e" not in text + json.dumps(told, ensure_ascii=False)
    assert next(m for m in told["members"] if m["name"] == "<img>")["runs_now"] == NASTY
    assert client.get("/api/team/chart").status_code == 200


def test_git_gets_and_gives_more_than_a_pipe_holds(first):
    head = first.head()
    asked = f"{head}\n" * 5_000  # 200 kB
    shown = git.read_only(first.path, "cat-file", "--batch-check", stdin=asked, limit=1 << 24, seconds=60)
    assert shown.count("\n") == 5_000 and set(shown.splitlines()) == {f"{head} commit {first.git('cat-file', '-s', head)}"}
    assert git.read_only(first.path, "cat-file", "-e", "0" * 40, stdin=asked) is None, "git ends before it has read it all"
    assert Untrusted(first.path).refs("refs/heads/") == Repo(first.path).refs("refs/heads/") != {}
    with pytest.raises(git.GitError):
        Untrusted(first.path).git("cat-file", "-e", "0" * 40)


# --- the notebook ----------------------------------------------------------------


def test_the_notebook_knows_who_found_what(first):
    night = team.read_night(first.path)
    assert team.found_by(night) == {1: "test", 2: "test", 3: "b", 4: "b", 5: "c"} and night.best.number == 3
    assert team.found_by(history.read_night(first.path)) == {}


def test_trees_that_train_at_the_same_time_share_the_hours():
    """Two trees, each with two runs of 5 minutes in 24."""
    times = [{"start": f"2026-11-21T00:{m:02}:00+00:00", "end": f"2026-11-21T00:{m + 6:02}:00+00:00"} for m in (0, 0, 18, 18)]
    made = [SimpleNamespace(runs=[time], training_minutes=5.0) for time in times]
    rows = [{"row": i, "found_by": f"w{i % 2}"} for i in range(4)]
    assert notebook.pace(SimpleNamespace(experiments=made, rows=rows)) == (
        "10.0 experiments an hour: 4 experiments in 4 runs and 0.40 hours on 2 trees, of which 42% was training"
    )


# --- lab status --trees -----------------------------------------------------------


def test_a_team_is_one_group_with_one_best(first):
    first.git("worktree", "prune")
    parent = first.path.parent
    out = many_trees.text([str(parent / name) for name in ("a", "b", "c")])
    assert out.count("team gpus, cpu (a fake)") == out.count("best") - 1 == 1 and "selection bias" not in out
    assert "best of the team: 0.970000 (b/0001 " in out and "found by b: <script>" in out
    found = {Path(tree["tree"]).name: tree for tree in many_trees.as_data([str(parent / "*")])["trees"]}
    told = {name: (t["rows"], t["counts"].get("keep", 0), t["best"] and t["best"]["mean"], t["baseline"]) for name, t in found.items() if t["rows"]}
    assert told == {"a": (2, 2, 0.99, 1.0), "b": (2, 1, 0.97, 1.0), "c": (1, 0, None, 1.0)}
    assert {t["team"]["best"]["label"] for t in found.values()} == {"b/0001"} and found["b"]["best"]["row"] == 1
    one = many_trees.text([str(parent / "a")])
    assert "and 3 rows of other trees of the team" in one and "best of the team: 0.970000" in one


def test_clones_that_share_a_remote_are_one_team_and_other_nights_are_not(first, tmp_path):
    twin = first.copy(tmp_path / "before")
    hub = twin.hub()
    clone, member = twin.clone("clone", hub), membership(twin.repo)
    assert exchange.publish(twin.repo, member, "test", exchange.state_of(twin.repo, "test")) is None
    shutil.copytree(first.path, tmp_path / "alone", ignore=shutil.ignore_patterns(".git"))
    assert clone.experiment("deeper", 0.9)[1].verdict == "keep"
    found = {Path(tree["tree"]).name: tree for tree in many_trees.as_data([str(tmp_path / "*")])["trees"]}
    assert found["alone"]["team"] is None and found["alone"]["best"]["mean"] == 0.99
    assert found["before"]["team"] == found["clone"]["team"] and found["clone"]["team"]["found_by"] == "clone"
    assert found["clone"]["team"]["place"] == str(hub), "seen in the clone's own refs, before the other has fetched"
    out = many_trees.text([str(tmp_path / "*")])
    assert out.count("team gpus") == 1 and "selection bias" in out and "different hardware" not in out
    (clone.path / ".git").rename(clone.path / "git")  # what git does not read is a night of its own
    found = {Path(tree["tree"]).name: tree for tree in many_trees.as_data([str(tmp_path / "*")])["trees"]}
    assert found["clone"]["team"] is None and found["clone"]["rows"] == 1 and found["before"]["team"]["found_by"] == "b"
