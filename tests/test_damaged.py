"""Whatever state a night's files are in, record, status and the dashboard answer: one line that a person can act on or a
result, and an exit status; never a trace.

The states are made by a seeded generator from a night in good order (a baseline, a keep, a discard, an experiment that
has run): each of its files is cut, emptied, overwritten, nested, re-encoded, made a link or a folder. Commands run in
this process: `python -m lab` in a process of its own would take a second each.
"""

import json
import os
import random
import re
import shutil
import sys

import pytest
from fakenight import FakeNight

FILES = ["runs.jsonl", "results.tsv", "run.log", ".lab/journal.json", ".git/index", "refs"]
FAST, ALL = 18, 246  # states; the whole number is for the slow test


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    night = FakeNight(tmp_path_factory.mktemp("damaged") / "night")
    night.baseline()
    night.experiment("good", 0.99)
    night.experiment("bad", 1.01)
    night.change_train()
    night.commit("idea")
    night.run(0.98)
    return night


# --- damage ---------------------------------------------------------------------------------

NESTED = "[" * 100_000 + "]" * 100_000
DEEP = "[" * 900 + "]" * 900  # json reads it, and is too deep for what comes after
VALUES = [None, True, -1, 0, 1e400, 10**40, "", "text", "\ud800", [], {}, [[]], {"a": None}, json.loads(DEEP), float("nan")]


def cut(rng, data):
    return data[: rng.randrange(len(data) + 1)]


def flipped(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 5, 50])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def middle_gone(rng, data):
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[b:]


def zeroed(rng, data):
    """As some file systems leave a file after a power cut."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes(len(data) - at)


def line_changed(rng, data):
    """One line doubled, dropped, moved, or followed by junk."""
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    junk = rng.choice([NESTED.encode(), DEEP.encode(), b"{}", b"[]", b"null", b'{"run_id": []}', b"\xff\xfe\x00", b"\0" * 50, b"\x1b[31m"])
    lines[i : i + 1] = rng.choice([[lines[i]] * 2, [], [lines[i], junk], [junk, lines[i]]])
    rng.random() < 0.2 and rng.shuffle(lines)
    return b"\n".join(lines)


def field_changed(rng, data):
    """One field of one JSON object in the file is of another kind, or gone."""
    text = data.decode(errors="replace")
    found = list(re.finditer(r"\{.*\}", text))
    if not found:
        return b"{}"
    match = rng.choice(found)
    try:
        value = json.loads(match[0])
    except ValueError:
        return cut(rng, data)
    inside = rng.choice([value, *(v for v in value.values() if isinstance(v, dict))])
    inside = rng.choice([inside, *(v[0] for v in inside.values() if isinstance(v, list) and v and isinstance(v[0], dict))])
    for key in rng.sample(sorted(inside), min(len(inside), rng.choice([1, 1, 3]))):
        if rng.random() < 0.3:
            del inside[key]
        else:
            inside[key] = rng.choice(VALUES)
    return (text[: match.start()] + json.dumps(value) + text[match.end() :]).encode()


def other_encoding(rng, data):
    return data.decode(errors="replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"]))


def replaced(rng, data):
    return rng.choice([b"", b"\n", b"\0" * 1000, rng.randbytes(2000), NESTED.encode(), b"[]", b"{}", b"null", b'"', b"\xef\xbb\xbf"])


CONTENT = [cut, flipped, middle_gone, zeroed, line_changed, field_changed, field_changed, other_encoding, replaced]


def damage_file(rng, path):
    """Puts another content, a folder, a link or nothing in the place of the file; what was done."""
    kind = rng.choice([*CONTENT, "gone", "folder", "link to itself", "link to nowhere"] if rng.random() < 0.5 else CONTENT)
    if callable(kind):
        data = path.read_bytes()
        path.write_bytes(kind(rng, data))
        return kind.__name__
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind.startswith("link"):
        path.symlink_to(path if "itself" in kind else path.with_name("nowhere") / "nothing")
    return kind


def damage_refs(rng, night, refs):
    git = night.path / ".git"
    kind = rng.choice(["garbage in a ref", "a ref to nothing", "refs gone", "log gone", "HEAD", "objects gone", "a ref is a folder"])
    ref = rng.choice(refs)
    if kind == "garbage in a ref":
        ref.write_bytes(rng.choice([b"", b"\0" * 41, b"garbage\n", b"ref: refs/heads/none\n"]))
    elif kind == "a ref to nothing":
        ref.write_text(rng.choice(["1" * 40, night.git("rev-parse", "HEAD:train.py")]) + "\n")
    elif kind == "refs gone":
        shutil.rmtree(git / "refs" / "autoresearch")
    elif kind == "log gone":
        (git / "refs/autoresearch/test/log").unlink(missing_ok=True)
        if rng.random() < 0.5 and not (night.path / "runs.jsonl").is_dir():
            (night.path / "runs.jsonl").unlink(missing_ok=True)
    elif kind == "HEAD":
        (git / "HEAD").write_bytes(rng.choice([b"", b"ref: refs/heads/none\n", b"1" * 40, b"ref: refs/heads/autoresearch/a/b\n"]))
    elif kind == "objects gone":
        objects = sorted((git / "objects").glob("??/*"))
        for path in rng.sample(objects, 3):
            path.unlink() if rng.random() < 0.5 else damage_content(rng, path)
    elif kind == "a ref is a folder":
        ref.unlink(missing_ok=True)
        (ref / "x").mkdir(parents=True)
    return kind


def damage_content(rng, path):
    path.chmod(0o644)
    path.write_bytes(rng.choice([cut, zeroed, flipped])(rng, path.read_bytes()))


def damage(seed, night):
    """Damages one of the files, sometimes two; what was done."""
    rng, done = random.Random(seed), []
    records, refs = night.records()[-1:], [night.path / ".git" / line.split()[0] for line in night.refs().splitlines()]
    for name in [FILES[seed % len(FILES)], *rng.sample(FILES, rng.random() < 0.2)]:
        path = night.path / name
        if name == "refs":
            done.append(damage_refs(rng, night, refs))
            continue
        if name == ".lab/journal.json":
            plan = {"run_id": "r", "tag": "test", "records": records, "best": None, "drop": [], "say": ["said"], "next": ["go"]}
            path.write_text(json.dumps(plan))
        if path.is_file() and not path.is_symlink():
            done.append(f"{name}: {damage_file(rng, path)}")
    return done


# --- what must hold ---------------------------------------------------------------------------


def called(night, capsys, *args):
    """(exit status, stdout, stderr) of `lab ARGS` in this process."""
    from lab.__main__ import main

    capsys.readouterr()
    try:
        rc = main(list(args))
    except SystemExit as end:
        rc = end.code
    out, err = capsys.readouterr()
    return rc, out, err


def check_answers(night, capsys, monkeypatch):
    """Runs the commands in the damaged night; each answers."""
    for key in ("GIT_CONFIG_NOSYSTEM", "GIT_CONFIG_GLOBAL", "AUTORESEARCH_NO_SAMPLE"):
        monkeypatch.setenv(key, night.env[key])
    monkeypatch.chdir(night.path)
    for args in [("status",), ("status", "--json"), ("record", "idea"), ("record", "--discard", "idea"), ("status",)]:
        rc, out, err = called(night, capsys, *args)
        shown = f"{args}: exit {rc}\n{out}{err}"
        assert rc in (0, 1, 3, 75), shown
        assert len(err.splitlines()) == (rc != 0), shown
        assert rc or out.strip(), shown
        assert not rc or err.startswith(f"lab {args[0]}: ") and len(err) < 2000, shown
        assert "Traceback" not in err + (out if args[0] == "status" else ""), shown


def check_pages(night):
    """The dashboard's API and pages answer without a server error."""
    from starlette.testclient import TestClient

    from lab.web import app, working_trees

    client = TestClient(app.create(working_trees.find([night.path], alone=True), local_only=False), raise_server_exceptions=False)
    commits = night.git("log", "--format=%h", check=False).split()
    for path in ["/", "/api/experiments", "/api/latest", "/api/live", "/api/chart", *(f"/api/experiments/{c}" for c in commits[:3])]:
        response = client.get(path)
        assert response.status_code < 500, f"{path}: {response.status_code}"


def survives(seed, template, place, capsys, monkeypatch):
    night = template.copy(place)
    done = damage(seed, night)
    try:
        check_pages(night)
        check_answers(night, capsys, monkeypatch)
    except Exception as error:
        raise AssertionError(f"state {seed} ({'; '.join(done)}): {type(error).__name__}: {error}") from error
    os.chdir("/")
    shutil.rmtree(place)
    return done


@pytest.mark.parametrize("seed", range(FAST))
def test_a_damaged_night_is_answered_in_a_sentence(template, tmp_path, capsys, monkeypatch, seed):
    assert survives(seed, template, tmp_path / "night", capsys, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_damaged_nights_are_answered_in_a_sentence(template, tmp_path, capsys, monkeypatch):
    kinds, failed = set(), []
    for seed in range(FAST, ALL):
        try:
            kinds |= set(survives(seed, template, tmp_path / f"night{seed}", capsys, monkeypatch))
        except AssertionError as error:
            failed.append(str(error))
    print(f"{ALL - FAST} states, {len(kinds)} kinds", file=sys.stderr)
    assert not failed, f"{len(failed)} of {ALL - FAST}:\n" + "\n\n".join(failed)
    assert len(kinds) > 50, "the generator has lost its variety"
