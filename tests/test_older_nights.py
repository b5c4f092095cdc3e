"""A night that was begun under an older version: read as before, and continued as long as its branch keeps its rules."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from fakenight import ROOT, FakeNight

from lab.analysis.history import Night, read_night
from lab.base.errors import Refused
from lab.store import names, rules
from lab.verify import audit

OLD = Path(__file__).parent / "data" / "night_55ea82e"
FROZEN = ("constants.py", "prepare.py")
HASHES = {"corpus/packing.py": "1" * 64}  # a file that newer rules have


def records_of(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def old_header():
    return records_of(OLD)[0]["header"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The old night in a repository of its own: its frozen files on main, its keeps as commits, its records."""
    night = FakeNight(tmp_path_factory.mktemp("older") / "night", branch=None)
    for name in FROZEN:
        shutil.copy(OLD / f"{name}.txt", night.path / name)
    (night.path / "corpus").mkdir()
    (night.path / "corpus" / "build.py").write_text("# makes the data\n")
    night.git("add", ".")
    night.git("commit", "-q", "-m", "frozen files of the old version")
    night.git("switch", "-q", "-c", "autoresearch/nov21")
    commits, codes, made = {}, {}, []
    records = records_of(OLD)
    kept = {r["commit"] for r in records if r["verdict"] == "keep"}
    for r in records:
        if r["commit"] in kept and r["commit"] not in commits:
            night.change_train(f"# {r['short']}\n")
            commits[r["commit"]] = night.commit(r["description"])
            codes[r["commit"]] = hashlib.sha256(f"# {r['short']}\n".encode()).hexdigest()
        new = {**r, "parent": commits.get(r["parent"])}
        if r["commit"] in commits:
            commit = commits[r["commit"]]
            blob = night.git("rev-parse", f"{commit}:train.py")
            new |= {"commit": commit, "short": commit[:7], "code": codes[r["commit"]], "blob": blob}
        made.append(new)
    (night.path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    for r in made:
        if r["row"] and r["verdict"] == "keep":
            night.git("update-ref", f"refs/autoresearch/nov21/{r['row']:04d}", r["commit"])
            (night.path / "runs" / f"{r['row']:04d}-{r['short']}").mkdir(parents=True)
    return night


@pytest.fixture
def night(template, tmp_path):
    return template.copy(tmp_path / "night")


def idea(night, val_bpb, **changes):
    """An experiment that ran as the old version runs it, unless `changes` say otherwise."""
    night.change_train()
    commit = night.commit("idea")
    same = {key: old_header()[key] for key in ("rules_sha256", "data_sha256", "dataset", "device")}
    night.run(val_bpb, seconds=60.0, **(same | changes))
    return commit


def new_header(night):
    """As a newer prepare.py prints it: a list of files and a hash over them."""
    files = {name: names.sha256(night.path / name) for name in FROZEN} | HASHES
    return {"rules_sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(), "rules_files": files}


def test_it_is_read_as_before():
    night = read_night(OLD)
    assert night.notes == () and len(night.experiments) == 28 and len(night.records) == 31
    assert night.sigma == pytest.approx(0.0128, abs=0.0001) and night.by_estimate  # 0.026 by the baseline alone
    assert (night.best.number, night.best.val_bpb, night.best_record["row"]) == (26, 1.252324, 26)
    assert night.baseline.val_bpb == 1.625862 and [len(e.runs) for e in night.experiments[:4]] == [3, 1, 1, 2]
    again = Night(records=night.records)
    assert [(e.number, e.commit, e.val_bpb, e.status) for e in again.experiments] == [
        (e.number, e.commit, pytest.approx(e.val_bpb, abs=1e-6), e.status) for e in night.experiments
    ]
    assert again.best_record == night.best_record and again.worth == night.worth


def test_the_published_night_is_read_as_before():
    night = read_night(ROOT / "docs" / "night")
    assert night.notes == () and len(night.experiments) == 23 and not night.by_estimate
    assert (night.best.number, night.best.val_bpb, night.baseline.val_bpb) == (14, 1.700053, 1.836054)
    assert sum(e.kept for e in night.experiments) == 7


def test_it_goes_on_where_it_stood(night):
    assert "is recorded: edit train.py" in night.lab("status").out
    before, head = night.records(), night.head()
    idea(night, 1.3)
    assert "is over and not recorded" in night.lab("status").out
    assert night.recorded("worse").verdict == "discard" and night.head() == head
    commit = idea(night, 1.1)
    assert night.recorded("much better").verdict == "keep" and night.head() == commit
    assert [row[3] for row in night.rows()[-2:]] == ["discard", "keep"] and len(night.rows()) == 30
    assert night.records()[: len(before)] == before, "an old record was rewritten"
    assert night.records()[-1]["sigma"] == read_night(night.path).sigma < 0.7 * before[-1]["sigma"]  # the new rule's
    assert "best: 1.100000" in night.lab("status").out


def test_its_runs_are_audited_under_its_own_files(night, monkeypatch):
    record, scores = night.records()[2], {"val": 1.625862, "holdout": 1.7, "data_sha256": old_header()["data_sha256"]}
    monkeypatch.setattr(audit, "score", lambda *args: scores | {"device": "cpu"})
    monkeypatch.setattr(audit, "logged", lambda folder: (record["header"], 1.625862))
    monkeypatch.setattr(audit.scoring, "off", lambda *args: None)
    found = audit.examine(night.path, record, None, {})
    assert found["flags"] == [] and found["holdout"] == 1.7
    (night.path / "prepare.py").write_text("# another\n")
    (flag,) = audit.examine(night.path, record, None, {})["flags"]
    assert "other rules" in flag and "prepare.py differs" in flag


@pytest.mark.parametrize("file", FROZEN)
def test_where_its_rules_changed_record_names_the_file_and_both_ways_on(night, file):
    began = night.records()[0]["short"]
    with open(night.path / file, "a") as f:
        f.write("# of the new version\n")
    night.commit("the new version", file)
    commit = idea(night, 1.1, **new_header(night))
    refusal = night.refused("idea")
    other = next(name for name in FROZEN if name != file)
    assert f"{file} changed" in refusal and f"{other} changed" not in refusal and f", {other}" not in refusal
    assert refusal.removeprefix("lab record: ").strip() in night.lab("status").out
    restore = re.search(rf"git (checkout {began} -- constants.py corpus prepare.py)", refusal)
    assert restore, refusal
    night.git(*restore[1].split())  # the first way on
    night.git("commit", "-q", "-m", "the rules of this night")
    night.run(1.1, seconds=60.0, **{key: old_header()[key] for key in ("rules_sha256", "data_sha256", "dataset", "device")})
    assert night.recorded("idea").verdict == "keep" and night.rows()[-1][0] == commit[:7]


def test_where_its_rules_changed_a_new_branch_begins_with_its_baseline(night):
    with open(night.path / "prepare.py", "a") as f:
        f.write("# of the new version\n")
    night.commit("the new version", "prepare.py")
    night.run(1.6, seconds=60.0, **new_header(night))
    assert "git switch -c autoresearch/ANOTHER-TAG" in night.refused("again")
    night.git("switch", "-q", "-c", "autoresearch/nov22")
    result = night.recorded("baseline")
    assert result.verdict == "confirm" and "runs/nov21 now holds" in result.out
    assert len(night.records()) == 1 and len((night.path / "runs/nov21/runs.jsonl").read_text().splitlines()) == 31


# --- the rules of a header -----------------------------------------------------------


def test_the_old_header_is_that_of_its_files():
    read = rules.tree(OLD)
    assert rules.changed(old_header(), lambda path: read(f"{path}.txt")) == []


@pytest.fixture
def frozen(tmp_path):
    """(folder, header) of a tree whose rules are four files."""
    for name in (*FROZEN, "corpus/packing.py", "frozen/clock.py", "corpus/download.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    listed = (*FROZEN, "corpus/packing.py", "frozen/clock.py")
    files = rules.hashes(rules.tree(tmp_path), listed) | {"corpus/removed.py": None}
    return tmp_path, {"rules_files": files, "rules_sha256": "d" * 64}


@pytest.mark.parametrize("name", [*FROZEN, "corpus/packing.py", "frozen/clock.py", "corpus/removed.py"])
def test_one_byte_in_any_file_of_the_list_is_another_set_of_rules(frozen, name):
    folder, header = frozen
    assert rules.changed(header, rules.tree(folder)) == []
    with open(folder / name, "a") as f:
        f.write("#")
    assert rules.changed(header, rules.tree(folder)) == [name]
    other = {**header, "rules_files": rules.hashes(rules.tree(folder), header["rules_files"]), "rules_sha256": "e" * 64}
    assert rules.differing(header, other, rules.tree(folder), rules.tree(folder)) == [name]
    if name != "corpus/removed.py":
        (folder / name).unlink()
        assert rules.changed(header, rules.tree(folder)) == [name]


def test_a_file_that_is_not_in_the_list_does_not_count(frozen):
    folder, header = frozen
    (folder / "corpus" / "download.py").write_text("# downloads in another way\n")
    assert rules.changed(header, rules.tree(folder)) == []


@pytest.mark.parametrize(
    "files", [None, {}, [], "x", {"constants.py": "a"}, {"../x": "a"}, {"/etc/passwd": "a"}, {"a/../../b": "a"}, {"x": 1}]
)
def test_a_list_that_no_prepare_py_writes_is_not_believed(frozen, files):
    folder, header = frozen
    both = {name: header["rules_files"][name] for name in FROZEN}
    files = {**both, **files} if isinstance(files, dict) and files and "constants.py" not in files else files
    assert rules.listed({"rules_files": files}) is None
    assert rules.changed({"rules_files": files, "rules_sha256": "d" * 64}, rules.tree(folder)) == [rules.UNKNOWN]


def test_two_old_hashes_that_nothing_explains_are_told_without_a_file():
    nothing = {}.get
    one, other = {"rules_sha256": "a" * 64}, {"rules_sha256": "b" * 64}
    assert rules.differing(one, other, nothing, nothing) == [rules.UNKNOWN]
    assert rules.differing(one, dict(one), nothing, nothing) == []


def test_commits_are_compared_by_the_files_that_a_run_of_theirs_lists(night, monkeypatch):
    """Without a list a changed downloader makes two commits other rules; with one it does not."""
    from lab.verify import commits

    a = night.head()
    (night.path / "corpus" / "build.py").write_text("# makes the same data faster\n")
    night.commit("corpus", "corpus/build.py")
    night.change_train()
    b = night.commit("idea")
    with pytest.raises(Refused, match=r"different rules or data code \(corpus/build.py\)"):
        commits.find([a, b], [night.path])
    lines = [r | {"header": r["header"] | {"rules_files": dict.fromkeys(FROZEN, "0" * 64)}} for r in night.records()]
    (night.path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    arms, _ = commits.find([a, b], [night.path])
    assert [arm.commit for arm in arms] == [a, b]
    (night.path / "constants.py").write_text("TIME_BUDGET = 61\n")
    c = night.commit("rules", "constants.py")
    night.change_train()
    c = night.commit("idea")
    with pytest.raises(Refused, match=r"different rules or data code \(constants.py\)"):
        commits.find([a, c], [night.path])
