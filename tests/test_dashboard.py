"""lab dashboard: what it shows and answers, what it refuses, and that nothing in a night becomes markup or a path."""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from fakenight import PROGRESS, FakeNight
from starlette.testclient import TestClient

from lab.analysis.history import Experiment, Night
from lab.base import git
from lab.base.errors import Refused
from lab.store.results_tsv import COLUMNS
from lab.web import app, content, dashboard, working_trees

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too' {{ 7 * 7 }} ${x} javascript:alert(3)"
TOKEN = "a-token-of-24-characters"
LOCAL = "http://127.0.0.1:8000"
SECRET = "line that only the file has"


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Five rows: baseline, a keep with a nasty description and sample, a discard, a crash, a keep."""
    night = FakeNight(tmp_path_factory.mktemp("night") / "tree")
    night.baseline()
    night.experiment(NASTY, 0.99)
    night.experiment("worse", 1.2)
    night.experiment("broken", None, tail="Traceback (most recent call last):\nRuntimeError: a shape\n")
    night.experiment("better still", 0.95)
    (archive,) = (night.path / "runs").glob("0002-*")
    (archive / "sample_output.txt").write_text(f"Once upon a time {NASTY}\x00\x1b[31m\n")
    return night


@pytest.fixture(scope="module")
def client(night):
    return TestClient(app.create(working_trees.find([night.path])), base_url=LOCAL)


def commit_of(client, number):
    return client.get("/api/experiments").json()["experiments"][number - 1]["commit"]


def everything_below(path):
    return sorted((str(p), p.lstat().st_mtime_ns) for p in Path(path).rglob("*"))


# --- what it says --------------------------------------------------------------


def test_the_api_tells_the_night(client, night):
    told = client.get("/api/experiments").json()
    assert [e["status"] for e in told["experiments"]] == ["keep", "keep", "discard", "crash", "keep"]
    assert [e["val_bpb"] for e in told["experiments"]] == [1.0, 0.99, 1.2, None, 0.95]
    assert told["counts"] == {"keep": 3, "discard": 1, "crash": 1} and told["tree"] == "test"
    assert told["best"]["number"] == 5 and told["baseline"]["number"] == 1 and told["sigma"] == pytest.approx(0.002)
    assert told["experiments"][4]["gain"] == pytest.approx(0.04) and told["experiments"][2]["gain"] is None
    assert [e["runs"] for e in told["experiments"]][:2] == [3, 1]
    latest = client.get("/api/latest").json()
    assert latest["experiment"] == latest["best"] == told["experiments"][4] and latest["live"]["running"] is False


def test_an_experiment_has_its_diff_its_runs_its_log_and_its_sample(client):
    detail = client.get(f"/api/experiments/{commit_of(client, 2)}").json()
    assert re.search(r"^\+# line \d", detail["diff"], re.MULTILINE) and detail["diff"].startswith(
        "diff --git a/train.py"
    )
    assert detail["run_facts"][0]["seed"] == 42 and detail["run_facts"][0]["val_bpb"] == 0.99
    assert "val_bpb:          0.990000" in detail["log"] and "| loss" not in detail["log"]
    sample = client.get(f"/api/samples/{commit_of(client, 2)}").json()
    assert sample["text"] == f"Once upon a time {NASTY}[31m"  # as text; control characters are gone
    assert client.get(f"/api/samples/{commit_of(client, 3)}").json()["reason"] == "only kept runs are sampled"
    full = client.get("/api/experiments").json()["experiments"][1]["commit"]
    assert client.get(f"/api/experiments/{full[:5]}").json()["number"] == 2


def test_the_chart_has_a_point_an_experiment(client):
    figure = client.get("/api/chart").json()
    assert sum(len(trace["x"]) for trace in figure["data"][2:]) == 5


def test_pages_are_there_and_hold_every_row(client):
    page = client.get("/")
    assert page.status_code == 200 and page.text.count('<tr class="') == 5
    assert 'class="crash"' in page.text and ">0.990000<" in page.text
    assert client.get("/docs").text.count("<h2><code>/") == 11
    assert client.get("/health").json() == {"status": "ok"}


def test_the_strip_follows_a_run_in_progress(night):
    import fcntl

    tree = next(iter(working_trees.find([night.path]).values()))
    log = night.path / "run.log"
    before = log.read_bytes()
    holder = os.open(night.path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        log.write_text("run: {}\n")
        assert tree.live() == {"running": True, "stage": "set-up"}
        log.write_text("run: {}\n" + PROGRESS)
        live = tree.live()
        assert (live["step"], live["percent"], live["loss"], live["seconds_left"]) == (123, 41.0, 3.141593, 177)
        assert (live["tokens_per_second"], live["stage"]) == (1648000, "training")
        log.write_text(PROGRESS.replace("41.0%", "100.0%"))
        assert tree.live()["stage"] == "evaluation"
        served = TestClient(app.create({"test": tree}), base_url=LOCAL)
        for told in ("step 1 (1.2.3%) | loss 1", "step 1 (.%) | loss", f"step {'9' * 4000} (1%)", "step 1 (nan%)"):
            log.write_text(f"run: {{}}\n{told}\n")  # whatever an agent's train.py prints
            assert tree.live() == {"running": True, "stage": "set-up"}, told[:40]
        log.write_text(PROGRESS.replace("3.141593", "1.2.3").replace("177", "9" * 999).replace("1,648,000", ",,"))
        assert [tree.live()[key] for key in ("step", "loss", "seconds_left", "tokens_per_second")] == [
            123,
            None,
            None,
            None,
        ]
        assert [served.get(path).status_code for path in ("/", "/api/live", "/api/latest")] == [200, 200, 200]
    finally:
        os.close(holder)
        log.write_bytes(before)
    assert tree.live() == {"running": False}


def test_new_rows_show_without_a_restart(night, tmp_path):
    twin = night.copy(tmp_path / "twin")
    client = TestClient(app.create(working_trees.find([twin.path])), base_url=LOCAL)
    before = client.get("/api/live").json()
    assert before["experiments"] == 5 and client.get("/api/live").json() == before
    twin.experiment("one more", 1.1)
    after = client.get("/api/live").json()
    assert after["experiments"] == 6 and after["version"] != before["version"]
    assert f'data-version="{after["version"]}"' in client.get("/").text


def test_a_table_that_a_record_made_old_has_no_newer_version(client, night, monkeypatch):
    """Or the page would keep it: it reloads when the version changes."""
    all_briefs = content.all_briefs

    def and_a_record(shown):
        found, results = all_briefs(shown), night.path / "results.tsv"
        os.utime(results, ns=(0, results.stat().st_mtime_ns + 10**9))
        return found

    monkeypatch.setattr(content, "all_briefs", and_a_record)
    page = client.get("/").text
    assert "data-version" in page and f'data-version="{client.get("/api/live").json()["version"]}"' not in page


def test_a_commit_is_found_by_its_whole_name_or_a_beginning_that_only_it_has():
    def row(number, commit, *whole):
        runs = tuple({"commit": name} for name in whole)
        return Experiment(number, commit, 1.0, None, "keep", "x", runs, None)

    rows = (
        row(1, "abcd"),
        row(2, "abcde12", "abcde12" + "0" * 33),
        row(3, "abff111"),
        row(4, "abff111"),
        row(5, "<b>"),
    )
    night = Night(rows, tree=Path("."))

    def found(commit):
        experiment = content.lookup(night, commit)
        return experiment and experiment.number

    assert [found(c) for c in ("abcd", "abcde", "abcde120", "abcde12" + "0" * 33, "abff")] == [1, 2, 2, 2, 4]
    assert [found(c) for c in ("ab", "abc", "abcde12f", "abcd0", "ffff", "<b>", "")] == [None] * 7


def test_without_git_the_change_is_read_from_the_archives(night, tmp_path):
    twin = night.copy(tmp_path / "twin")
    shutil.rmtree(twin.path / ".git")
    client = TestClient(app.create(working_trees.find([twin.path])), base_url=LOCAL)
    told = [client.get(f"/api/experiments/{commit_of(client, number)}").json() for number in (1, 2, 3, 5)]
    assert told[3]["diff_of"] == "the archived train.py against row 2's"
    assert "\n-# line 1\n+# line 4\n" in told[3]["diff"] and "LR" in told[3]["diff"]
    assert "-# line 0" in told[1]["diff"]
    assert [t["diff"] for t in (told[0], told[2])] == [None, None] and "git does not know" in told[2]["diff_of"]


def test_worktrees_are_found_by_themselves_and_told_apart(night, tmp_path):
    twin = night.copy(tmp_path / "twin")
    twin.git("worktree", "add", "-q", "-b", "autoresearch/second", str(tmp_path / "second"))
    twin.git("worktree", "add", "-q", "--detach", str(tmp_path / "test"))
    found = working_trees.find([twin.path])
    assert set(found) == {"test", "second", "test (2)"}
    assert list(working_trees.find([twin.path], alone=True)) == ["test"]
    client = TestClient(app.create(found), base_url=LOCAL)
    assert client.get("/api/experiments", params={"tree": "second"}).json()["experiments"] == []
    assert client.get("/", params={"tree": "test (2)"}).status_code == 200
    assert client.get("/", params={"tree": "../twin"}).status_code == 404


@pytest.mark.parametrize(
    "content, says",
    [
        (None, None),
        ("", None),
        ("commit\tval_bpb\n", "column"),
        ("\x00\x01", "results.tsv"),
        ("<b>not a table</b>\n", "results.tsv"),
    ],
)
def test_a_tree_without_a_night_is_a_sentence(tmp_path, content, says):
    tree = tmp_path / "tree"
    tree.mkdir()
    if content is not None:
        (tree / "results.tsv").write_text(content)
    client = TestClient(app.create(working_trees.find([tree])), base_url=LOCAL)
    told = client.get("/api/experiments").json()
    assert told["experiments"] == [] and (says in told["problem"] if says else told["problem"] is None)
    assert client.get("/").status_code == client.get("/api/chart").status_code == 200
    assert "<b>not" not in client.get("/").text
    if content is None:
        tree.rmdir()
        assert client.get("/api/experiments").json()["problem"] == "this working tree is gone"
        assert client.get("/").status_code == client.get("/api/live").status_code == 200


@pytest.mark.parametrize(
    "field", ["verdict", "description", "start", "header", "seed", "device", "summary", "depth", "parent"]
)
def test_a_damaged_record_is_no_server_error(night, tmp_path, field):
    shutil.copy(night.path / "results.tsv", tmp_path)
    client = TestClient(app.create(working_trees.find([tmp_path])), base_url=LOCAL)
    commit = commit_of(client, 2)
    for value in ("\ud800", 10**400, float("nan"), [], {"a": 1}, None, "<b>"):
        records, changed = night.records(), 0
        for record in records:
            for holder in (record, record["header"] or {}, record["summary"] or {}):
                if field in holder:
                    holder[field] = value
                    changed += 1
        assert changed >= 5
        (tmp_path / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        for path in ("/", "/api/experiments", "/api/chart", f"/experiment/{commit}", f"/api/experiments/{commit}"):
            assert client.get(path).status_code == 200, (path, value)


@pytest.mark.parametrize("name", ["results.tsv", "runs.jsonl", "run.log"])
def test_a_pipe_in_place_of_a_file_stops_no_one(night, tmp_path, name):
    shutil.copy(night.path / "results.tsv", tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    code = """
import sys
from pathlib import Path
from starlette.testclient import TestClient
from lab.web import app, working_trees
client = TestClient(app.create(working_trees.find([Path(sys.argv[1])])), base_url="http://127.0.0.1:8000")
print(client.get("/").status_code, client.get("/api/latest").status_code, len(client.get("/api/experiments").json()["experiments"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=night.env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"200 200 {0 if name == 'results.tsv' else 5}\n", done.stderr


# --- what it does not let happen --------------------------------------------------


def test_git_starts_nothing_that_an_agent_put_into_its_configuration(tmp_path):
    """Hooks, a pager, an external diff, a text converter, gpg, a fetch of what is missing."""
    night, ran = FakeNight(tmp_path / "tree"), tmp_path / "ran"
    ran.mkdir()

    def trap(name):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ntouch {ran}/{name}\n")
        program.chmod(0o755)
        return str(program)

    night.change_train()
    signature = "gpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END PGP SIGNATURE-----"
    signed = night.git("cat-file", "commit", night.commit()).replace("\n\n", f"\n{signature}\n\n", 1) + "\n"
    commit, absent = night.git("hash-object", "-t", "commit", "-w", "--stdin", stdin=signed), "0123456789" * 4
    (night.path / ".git" / "info" / "attributes").write_text("train.py diff=x\n")
    for key in ("core.pager", "core.fsmonitor", "diff.external", "diff.x.textconv", "gpg.program", "core.sshCommand"):
        night.git("config", key, trap(key))
    for key, value in [("log.showSignature", "true"), ("core.repositoryFormatVersion", "1"), ("core.hooksPath", str(tmp_path)),
                       ("extensions.partialClone", "origin"), ("remote.origin.url", f"ext::{trap('fetch')} x"),
                       ("remote.origin.promisor", "true"), ("protocol.ext.allow", "always")]:  # fmt: skip
        night.git("config", key, value)
    header = "\t".join(COLUMNS)
    (night.path / "results.tsv").write_text(f"{header}\n{commit}\t1\t1\tkeep\tx\n{absent}\t1\t1\tkeep\ty\n")
    client = TestClient(app.create(working_trees.find([night.path])), base_url=LOCAL)
    assert "+# line 1" in client.get(f"/api/experiments/{commit}").json()["diff"]
    assert client.get(f"/api/experiments/{absent}").json()["diff"] is None
    assert os.listdir(ran) == []
    for args in (["show", commit], ["show", absent], ["show", "--ext-diff", commit]):  # they are traps indeed
        subprocess.run(["git", *args], cwd=night.path, env=night.env, capture_output=True, timeout=60)
    assert {"gpg.program", "diff.x.textconv", "fetch", "diff.external"} <= set(os.listdir(ran))


def test_git_is_cut_short(night):
    assert git.read_only(night.path, "log", "--format=%H", limit=7) == night.head()[:7]
    began = time.monotonic()
    assert git.read_only(night.path, "-c", "alias.wait=!exec sleep 30", "wait", seconds=0.2) is None
    assert time.monotonic() - began < 10


def test_links_and_pipes_of_an_archive_are_not_followed(night, tmp_path):
    twin = night.copy(tmp_path / "twin")
    (archive,) = (twin.path / "runs").glob("0002-*")
    (tmp_path / "elsewhere").write_text(SECRET)
    for name in ("sample_output.txt", "run.log", "train.py"):
        (archive / name).unlink()
        (archive / name).symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(twin.path / ".git")
    (twin.path / "run.log").unlink()
    os.mkfifo(twin.path / "run.log")  # a reader of it would wait for ever
    client = TestClient(app.create(working_trees.find([twin.path])), base_url=LOCAL)
    for number in (2, 5):
        page = client.get(f"/experiment/{commit_of(client, number)}")
        assert page.status_code == 200 and SECRET not in page.text
    assert "no sample yet" in client.get(f"/api/samples/{commit_of(client, 2)}").json()["reason"]
    archive.rename(tmp_path / "moved")
    (tmp_path / "moved" / "sample_output.txt").unlink()
    (tmp_path / "moved" / "sample_output.txt").write_text(SECRET)
    archive.symlink_to(tmp_path / "moved")
    assert SECRET not in client.get(f"/api/samples/{commit_of(client, 2)}").text


def test_nothing_of_a_night_becomes_markup(client):
    for path in ("/", f"/experiment/{commit_of(client, 2)}"):
        text = client.get(path).text
        assert "alert(1)" in text and "&lt;script&gt;alert(1)" in text and "{{ 7 * 7 }}" in text
        assert "<script>" not in text and "<img" not in text and "onerror=alert" in text.replace("&#39;", "")
        assert re.findall(r"<script[^>]*>", text) in (
            [],
            [f'<script src="/static/{name}.js" defer>' for name in ("plotly.min", "chart", "app")],
        )
    figure = client.get("/api/chart").json()
    assert not [t for trace in figure["data"] for t in trace.get("text", []) if "<script" in t or "<img" in t]


ATTACKS = [
    "..", "../..", "../../etc/passwd", "/etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2fetc%2fpasswd", "....//etc/passwd",
    "%00", "abcdef%00", "abcd%2f..%2f..", "C:%5cwindows", "--help", "-O%2ftmp%2fx", "HEAD", "main", "a" * 10240, "abc", "ABCDEF12", "0" * 41,
    "%ff%fe", "abcd;ls", "..;/", "abcdef1/", "$(id)", "best", "0002-abcdef0", "train.py", "results.tsv",
]  # fmt: skip


@pytest.mark.parametrize("route", ["/api/experiments/", "/api/samples/", "/experiment/", "/static/", "/api/", "/"])
def test_no_url_reaches_a_file(client, night, route):
    (night.path / "secret.txt").write_text(SECRET)
    for attack in [*ATTACKS, "secret.txt", "../secret.txt"]:
        for tail in ("", "?tree=../../etc", "?tree=" + attack.replace("?", "")):
            response = client.get(route + attack + tail, follow_redirects=False)
            if route + attack + tail in ("/", "/?tree=", "/.."):
                continue
            normal = response.url.path in (
                "/",
                "/api",
                "/docs",
                "/health",
                "/openapi.json",
                "/api/experiments",
                "/experiment",
            )
            assert response.status_code in (404, 422) or normal, (route + attack + tail, response.status_code)
            assert SECRET not in response.text and "root:" not in response.text and len(response.text) < 30_000
    (night.path / "secret.txt").unlink()


def test_other_methods_are_refused_and_head_has_no_body(client):
    for path in ("/", "/api/experiments", "/health", "/static/app.js"):
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert client.request(method, path).status_code == 405
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    refused = client.post("/", headers={"accept": "text/html"})
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET") and "<h1>405</h1>" in refused.text


def test_it_writes_nothing(client, night):
    before = everything_below(night.path)
    for path in (
        "/",
        "/api/experiments",
        "/api/latest",
        "/api/live",
        "/api/chart",
        f"/experiment/{commit_of(client, 2)}",
        f"/api/experiments/{commit_of(client, 3)}",
    ):
        assert client.get(path).status_code == 200
    assert everything_below(night.path) == before


def test_every_answer_has_the_headers(client):
    for path in ("/", "/api/experiments", "/nothing", "/static/plotly.min.js", "/api/experiments/zz"):
        headers = client.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert (
            policy["default-src"] == "'none'"
            and policy["script-src"] == "'self'"
            and policy["frame-ancestors"] == "'none'"
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert "unsafe" not in "".join(policy[key] for key in policy if key != "style-src-attr")


def test_a_page_of_another_name_cannot_read_a_local_dashboard(client):
    assert client.get("/api/experiments", headers={"host": "evil.example:8000"}).status_code == 400
    assert client.get("/health", headers={"host": "127.0.0.1.evil.example"}).status_code == 400
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "127.0.0.2:8000", "LOCALHOST"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in ("", "localhost.evil.example", "127.0.0.1:80.evil.example", "localhost:x", "evil.example#127.0.0.1"):
        assert client.get("/health", headers={"host": host}).status_code == 400


# --- the token -----------------------------------------------------------------


@pytest.fixture
def guarded(night):
    return TestClient(app.create(working_trees.find([night.path]), token=TOKEN, local_only=False), base_url="http://box:80")


def test_without_the_token_nothing_but_health(guarded):
    for path in (
        "/",
        "/api/experiments",
        "/openapi.json",
        "/docs",
        "/static/app.js",
        "/nothing",
        "/api/experiments/../..",
    ):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {TOKEN}"},
            {"cookie": "autoresearch=x"},
            {"cookie": f"autoresearch={TOKEN}"},
        ):
            response = guarded.get(path, headers=headers)
            assert response.status_code == 401 and "experiments" not in response.text, path
    assert guarded.get("/?token=wrong").status_code == 401
    page = guarded.get("/?tree=%22%3E%3Cb%3E&token=wrong", headers={"accept": "text/html"})
    assert page.status_code == 401 and 'type="password"' in page.text and page.headers["x-frame-options"] == "DENY"
    assert 'name="tree" value="&#34;&gt;&lt;b&gt;"' in page.text and page.text.count('name="token"') == 1
    assert guarded.get("/health").json() == {"status": "ok"}


def test_the_token_opens_by_header_and_by_a_cookie_that_is_not_the_token(guarded):
    assert guarded.get("/api/experiments", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guarded.get("/api/experiments", headers={"authorization": f"bearer  {TOKEN}"}).status_code == 200
    assert guarded.get("/api/experiments", headers={"authorization": TOKEN}).status_code == 401
    answer = guarded.get(f"/?tree=test&token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/?tree=test")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
    assert guarded.get("/").status_code == 200  # the client keeps the cookie
    assert (
        guarded.get(f"//evil.example/?token={TOKEN}", follow_redirects=False).headers.get("location", "/")[:2] != "//"
    )


def test_when_a_token_is_needed():
    assert dashboard.check_token(None, "127.0.0.1") is None and dashboard.check_token("", "localhost") is None
    assert dashboard.check_token(TOKEN, "0.0.0.0") == TOKEN
    for token, host, says in [(None, "0.0.0.0", "open to others"), ("", "192.168.1.2", "open to others"), (None, "::", "open to others"),
                              ("short", "127.0.0.1", "16 or more"), ("ä" * 20, "::", "ASCII"), ("with a space in it", "::", "no space")]:  # fmt: skip
        with pytest.raises(Refused, match=says):
            dashboard.check_token(token, host)


# --- the description for programs ------------------------------------------------


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(night):
    """Nor an answer that the description does not have. Both kinds of input: as described, and not."""
    description = schemathesis.openapi.from_asgi(
        "/openapi.json", app.create(working_trees.find([night.path]), local_only=False)
    )
    operations = [found.ok() for found in description.get_all_operations()]
    assert len(operations) == 11
    calls = []
    for operation in operations:
        for mode in schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE:

            @hypothesis.settings(
                max_examples=12, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )  # fmt: skip
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                calls.append(case.call().status_code)
                case.call_and_validate()

            try:
                check()
            except hypothesis.errors.Unsatisfiable:
                assert (
                    mode is schemathesis.GenerationMode.NEGATIVE
                )  # a route that takes nothing can't be called wrongly
    assert {200, 404, 422} <= set(calls) and max(calls) < 500


# --- the command ---------------------------------------------------------------


@pytest.fixture
def start(night):
    """start(*args): `lab dashboard` as a process; whatever a test makes of it, it is ended."""
    begun = []

    def start_one(*args):
        command = [sys.executable, "-m", "lab", "dashboard", "--tree", str(night.path), *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen(command, cwd=night.path, env=night.env, **pipes))
        return begun[-1]

    yield start_one
    for process in begun:
        process.kill()
        process.wait()


def test_the_command_serves_until_it_is_ended(start):
    import urllib.request

    for number in (signal.SIGINT, signal.SIGTERM):
        process = start("--port", "0")
        url = re.match(r"(http://127\.0\.0\.1:\d+/)  test  \(Ctrl-C ends it\)", process.stdout.readline())[1]
        deadline = time.monotonic() + 200
        while True:
            try:
                with urllib.request.urlopen(url + "health", timeout=5) as answer:
                    assert json.load(answer) == {"status": "ok"}
                break
            except OSError:
                assert time.monotonic() < deadline
        process.send_signal(number)
        out, err = process.communicate(timeout=200)
        assert (process.returncode, out, err) == (0, "", "")


def test_a_signal_ends_it_before_the_server_listens_for_one(night, monkeypatch, capsys):
    import uvicorn

    def run(self, sockets):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        pytest.fail("it went on")

    monkeypatch.setattr(uvicorn.Server, "run", run)
    args = argparse.Namespace(tree=[str(night.path)], host="127.0.0.1", port=0, token=None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert dashboard.run(args) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("name", ["plotly", "jinja2", "uvicorn"])
def test_without_its_group_it_names_the_command(night, tmp_path, name):
    blocked = f"""
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == {name!r} else find(name, *args)
if {name!r} != "plotly":
    sys.modules[{name!r}] = None
sys.argv = ["lab", "dashboard", "--port", "0"]
runpy.run_module("lab", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", blocked], cwd=night.path, env=night.env, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"lab dashboard: {name} is not installed: uv run --group dashboard -m lab dashboard\n"


def test_what_cannot_be_served_is_one_line(start, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for args, says in [(["--port", str(port)], "Address already in use"), (["--host", "0.0.0.0"], "give a --token"),
                           (["--tree", str(tmp_path / "no")], "is not a folder"), (["--port", "99999"], "no such port"),
                           (["--host", "no.such.host.invalid", "--token", TOKEN], "cannot listen on")]:  # fmt: skip
            process = start(*args)
            out, err = process.communicate(timeout=200)
            assert process.returncode == 1 and out == "" and says in err and err.count("\n") == 1, (args, err)
