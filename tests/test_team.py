"""A team: runs of several working trees and machines in one order, judged by one rule, shared through git."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from faketeam import Teammate

from lab.analysis import verdict
from lab.analysis.history import replay
from lab.base.errors import Refused
from lab.base.git import GitError, change_refs, refs
from lab.loop import team_status
from lab.queue import wait
from lab.queue.board import Board
from lab.share import exchange, team
from lab.share.membership import Member, membership
from lab.store import archive, names
from lab.store.repository import Repo
from lab.verify import audit, commits

HEADER = {"run_id": "", "start": "2026-11-21T00:00:00+00:00", "train_sha256": "", "rules_sha256": "r", "data_sha256": "d",
          "dataset": "stdlib", "seed": 42, "device": "cpu", "clock": "monotonic"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# One order, one line: records made by hand


class Trees:
    """Trees of a team whose records are made by hand: add("a", "wider", 0.99, "keep", on="base")."""

    def __init__(self, *tags):
        self.records, self.last, self.n = {tag: [] for tag in tags}, 0, 0

    def add(self, tag, code, value, said, on=None, seq=None, row=True, seed=None, beat=None, device="cpu", **more):
        self.n += 1
        own = self.records[tag]
        self.last = self.last + 1 if seq is None else seq
        when = datetime(2026, 11, 21, tzinfo=timezone.utc) + timedelta(minutes=6 * self.n)
        record = {
            "run_id": f"run{self.n}", "tag": tag, "commit": f"{tag}-{code}", "short": code, "code": code, "blob": code, "verdict": said,
            "row": 1 + max((r["row"] or 0 for r in own), default=0) if row and said != "confirm" else None, "seq": self.last,
            "parent": on and next(r["commit"] for t in self.records.values() for r in t if r["code"] == on), "beat": beat,
            "mean": value, "n": 1, "gain": None, "memory_gb": 1.0, "description": f"{code} of {tag}", "why": "", "simpler": False,
            "baseline": on is None, "start": when.isoformat(), "end": (when + timedelta(minutes=5)).isoformat(),
            "header": HEADER | {"seed": 42 + self.n if seed is None else seed, "device": device},
            "summary": None if value is None else {"val_bpb": value, "training_seconds": 300.0, "num_steps": 900, "total_tokens_M": 1.0},
        }  # fmt: skip
        own.append(record | more)
        return self

    def baseline(self, tag="a"):
        for i, value in enumerate((1.0, 1.002, 0.998)):
            self.add(tag, "base", value, "confirm" if i < 2 else "keep")
        return self

    def seen(self, own, device="cpu"):
        """The Team as the tree `own` sees it."""
        trees = [team.Tree(name_of(tag), tag, records, {}, tag == own, True) for tag, records in self.records.items()]
        trees.sort(key=lambda tree: not tree.is_own)
        return team.assembled(Member("gpus", name_of(own), None, Path()), own, tuple(trees), (), HEADER | {"device": device})


def name_of(tag):
    return hashlib.sha256(tag.encode()).hexdigest()[:12]


def decided(found):
    """What the team says of each run; whether a repeat is still to come is said for the own tree only."""
    return [(r["run_id"], r["verdict"].replace("elsewhere", "confirm"), r["row"]) for r in found.night.records]


def line(found):
    return [r["code"] for r in found.night.replayed[1]]


def test_the_baseline_is_run_three_times_by_the_team_and_not_by_each_tree():
    trees = Trees("a", "b", "c")
    for tag, value in [("a", 1.0), ("b", 1.002), ("c", 0.998)]:
        assert trees.seen("a").night.tip is None
        trees.add(tag, "base", value, "confirm")
    night = trees.seen("a").night
    assert night.tip["code"] == "base" and night.sigma == pytest.approx(0.002) and night.search.tip.runs == 3
    assert night.waiting is None


def test_the_baselines_value_is_the_mean_of_all_its_runs_though_a_tree_closed_its_own_earlier():
    """As a worker does that records its first experiment: its own run of the baseline becomes a keep."""
    trees = Trees("a", "b").add("b", "base", 1.0, "confirm", seed=43).add("a", "base", 1.004, "keep", seed=42)
    trees.add("b", "base", 1.008, "keep", seed=44).add("a", "wide", 0.98, "keep", on="base")
    night = trees.seen("a").night
    assert [(r["code"], r["mean"], r["n"]) for r in night.kept] == [("base", pytest.approx(1.004), 3), ("wide", 0.98, 1)]
    trees.records["b"].pop()  # nobody has run it a third time: what the tree went on from counts
    night = trees.seen("a").night
    assert [(r["code"], r["mean"], r["n"]) for r in night.kept] == [("base", pytest.approx(1.002), 2), ("wide", 0.98, 1)]


@pytest.mark.parametrize("slowed", [0, 1, 2])
def test_a_baseline_one_of_whose_runs_the_machine_slowed_is_kept_after_three(slowed):
    """As `lab record` counts them: otherwise the team would measure it for ever."""
    trees = Trees("a", "b")
    for i, value in enumerate((1.0, 1.004, 1.008)):
        trees.add("a", "base", value, "confirm" if i < 2 else "keep", slowed=0.05 * (i == slowed), seed=42 + i)
    for own in "ab":
        (kept,) = trees.seen(own).night.kept
        assert (kept["mean"], kept["n"]) == (pytest.approx(1.004), 3)


def test_two_runs_under_one_seed_count_as_one():
    trees = Trees("a", "b").add("a", "base", 1.0, "confirm", seed=42).add("b", "base", 1.004, "confirm", seed=42)
    trees.add("a", "base", 1.002, "confirm", seed=43)
    assert trees.seen("a").night.tip is None and trees.seen("b").night.values("base") == [1.0, 1.002]
    trees.add("b", "base", 0.998, "keep", seed=50)
    assert trees.seen("a").night.values("base") == [1.0, 1.002, 0.998]


def test_the_best_of_the_team_is_everybodys_bar():
    trees = Trees("a", "b").baseline().add("b", "wide", 0.98, "keep", on="base")
    for own in "ab":
        seen = trees.seen(own)
        assert line(seen) == ["base", "wide"] and verdict.bar(seen.night.search).keep < 0.98
        assert seen.night.best_record["code"] == "wide" and seen.night.best.val_bpb == 0.98
    assert trees.seen("a").best["label"] == "b/0001" and trees.seen("b").best["label"] == "row 0001"
    assert trees.seen("a").who(trees.seen("a").best) == "b" and trees.seen("b").who(trees.seen("b").best) == "this tree"


def test_of_two_keeps_made_at_the_same_time_the_second_must_beat_the_first():
    for second, is_late in [(0.985, True), (0.97, False)]:
        trees = Trees("a", "b").baseline()
        trees.add("a", "wide", 0.98, "keep", on="base", beat="base", seq=9).add("b", "deep", second, "keep", on="base", beat="base", seq=10)
        for own in "ab":
            seen = trees.seen(own)
            assert line(seen) == ["base", "wide"] + ["deep"] * (not is_late)
            deep = next(r for r in seen.night.records if r["code"] == "deep")
            assert bool(deep.get("late")) == is_late and deep["verdict"] == ("discard" if is_late else "keep")
    assert trees.records["b"][-1]["verdict"] == "keep" and "late" not in trees.records["b"][-1], "the tree's own record has changed"


def test_a_keep_that_was_measured_against_the_best_counts_as_it_was_recorded():
    trees = Trees("a", "b").baseline().add("a", "wide", 0.98, "keep", on="base")
    trees.add("b", "simple", 0.9805, "keep", on="wide", beat="wide", simpler=True)
    assert line(trees.seen("a")) == ["base", "wide", "simple"]


def test_another_tree_may_find_that_a_gain_does_not_hold():
    trees = Trees("a", "b").baseline().add("a", "wide", 0.98, "keep", on="base").add("a", "narrow", 1.01, "discard", on="wide")
    trees.add("b", "wide", 1.03, "discard", row=False, seed=99, baseline=False)
    for own in "ab":
        seen = trees.seen(own)
        assert line(seen) == ["base"] and [r["code"] for r in seen.night.given_up] == ["wide"]
        assert seen.night.best_record["code"] == "base" and seen.night.by_estimate
    assert trees.records["a"][-2]["verdict"] == "keep", "a tree has changed another's record"
    trees.add("a", "deep", 0.97, "keep", on="wide", beat="base")
    assert line(trees.seen("b")) == ["base", "deep"]


def test_the_bests_value_is_the_mean_of_all_its_runs_whoever_made_them():
    trees = Trees("a", "b").baseline().add("a", "wide", 0.99, "keep", on="base")
    trees.add("b", "wide", 0.992, "keep", on="base", row=False).add("b", "base", 1.004, "keep", row=False)
    for tag in "ab":
        night = trees.seen(tag).night
        assert night.mean_of(night.best_record) == {"mean": pytest.approx(0.991), "n": 2} and night.best_record["mean"] == 0.99
        assert night.mean_of(night.kept[0]) == {"mean": pytest.approx(1.001), "n": 4}


def test_repeats_of_the_best_that_crashed_in_another_tree_count_for_everybody():
    trees = Trees("a", "b").baseline().add("a", "wide", 0.996, "keep", on="base", seed=42)
    for i in range(12):
        trees.add("a", f"worse{i}", 1.02 + i / 100, "discard", on="wide")
    assert trees.seen("a").night.doubted
    trees.add("b", "wide", None, "crash", on="base", row=False, seed=43)
    night = trees.seen("a").night
    assert night.doubted and night.seeds("wide") == [42, 43]
    night = trees.add("a", "wide", None, "crash", on="base", row=False, seed=44).seen("b").night
    assert not night.doubted and night.crashed_repeats == 2 and night.tip["code"] == "wide"


def test_results_of_other_hardware_are_ideas_and_never_values():
    trees = Trees("a", "b").baseline()
    for value in (0.5, 0.51, 0.52):
        trees.add("b", "base", value, "confirm" if value < 0.52 else "keep", device="cuda")
    trees.add("b", "wide", 0.4, "keep", on="base", device="cuda")
    seen = trees.seen("a")
    assert line(seen) == ["base"] and {r["tag"] for r in seen.night.records} == {"a"}
    assert {r["code"] for r in seen.ideas} == {"base", "wide"}
    assert line(trees.seen("b", "cuda")) == ["base", "wide"]


def test_records_of_a_tree_that_was_copied_count_once():
    trees = Trees("a", "b").baseline().add("a", "wide", 0.98, "keep", on="base")
    trees.records["b"] = [dict(r) for r in trees.records["a"]]
    assert len(trees.seen("a").night.records) == len(trees.seen("b").night.records) == 4


def test_the_same_code_has_one_row_whoever_tried_it():
    trees = Trees("a", "b").baseline().add("a", "wide", 1.01, "discard", on="base").add("b", "wide", 1.02, "discard", on="base")
    night = trees.seen("a").night
    assert [r["code"] for r in night.rows] == ["base", "wide"] and len(night.runs("wide")) == 2


def test_a_code_that_one_tree_gave_up_and_another_kept_is_kept_once():
    """Whoever sees it: a worker was taken for dead, and completed its record after all."""
    trees = Trees("a", "b").baseline().add("a", "wide", 1.0, "discard", on="base", closed_by="x")
    trees.add("b", "wide", 0.98, "keep", on="base", row=True).add("a", "deep", 0.96, "keep", on="wide")
    for tag in "ab":
        night = trees.seen(tag).night
        assert [(r["code"], r["verdict"], r["row"]) for r in night.rows] == [("base", "keep", 1), ("wide", "keep", 2), ("deep", "keep", 3)]
        assert len(night.runs("wide")) == 2 and night.waiting is None and line(trees.seen(tag)) == ["base", "wide", "deep"]


def test_every_member_sees_the_same_line_whatever_the_clocks_say():
    """Random teams: who looks and how far its clock is off changes nothing, and the replay is the Night's own."""
    rng, late, lines = random.Random(4), 0, 0
    for _ in range(40):
        tags = "abcd"[: rng.randint(2, 4)]
        trees = Trees(*tags).baseline(rng.choice(tags))
        for i in range(25):
            tag, best = rng.choice(tags), rng.choice(line(trees.seen(rng.choice(tags))))
            value, seq = rng.gauss(0.998 - i * 0.0005, 0.006), trees.last + rng.randint(-1, 1)
            said = "keep" if value < 0.995 - i * 0.0005 else rng.choice(["discard", "crash"])
            trees.add(tag, f"x{i}", None if said == "crash" else value, said, on=best, seq=seq, beat=best)
            if rng.random() < 0.2:
                keep = rng.choice(line(trees.seen(tag)))
                trees.add(tag, keep, value, rng.choice(["keep", "discard"]), row=False, on=None, baseline=False)
        before = decided(trees.seen("a"))
        for tag in tags:
            shift = timedelta(minutes=rng.choice([-10, 0, 10]))
            for r in trees.records[tag]:
                r.update({key: (datetime.fromisoformat(r[key]) + shift).isoformat() for key in ("start", "end")})
        for tag in tags:
            seen = trees.seen(tag)
            assert decided(seen) == before
            search, again = replay(seen.night.records)
            assert (search, [r["code"] for r in again]) == (seen.night.search, line(seen))
            assert seen.night.best_record in seen.night.replayed[1]
        late += sum(bool(r.get("late")) for r in seen.night.records)
        lines += len(line(seen))
    assert late > 20 and lines > 100, "the random teams were too simple"


def test_a_dead_end_is_listed_once():
    trees = Trees("a", "b").baseline()
    trees.add("a", "x1", 1.01, "discard", on="base", description="wider MLP").add("b", "x2", 1.02, "discard", on="base", description="Wider  mlp")
    trees.add("b", "x3", 1.02, "discard", on="x2", description="wider MLP").add("b", "x4", 1.02, "discard", on="base", description="deeper")
    night = trees.seen("a").night
    assert [r["code"] for r in team_status.once(night.rows[1:], night.records)] == ["x1", "x3", "x4"]


def test_a_near_miss_that_was_tried_with_another_is_known_by_tree_and_number():
    trees = Trees("a", "b").baseline()
    for tag in "ab":
        trees.add(tag, f"x{tag}", 1.001, "discard", on="base").add(tag, f"y{tag}", 1.001, "discard", on="base")
    trees.add("a", "both", 1.0, "discard", on="base", description="0002 and b/0002 together")
    trees.add("a", "decay", 1.01, "discard", on="base", description="weight decay 0.001 -> .0003, 0.0003 for wte")
    night = trees.seen("a").night
    tried = team_status.is_tried_together(night.rows)
    assert [r["code"] for r in night.rows if tried(r)] == ["xa", "yb"], "a number is not a row"


# ---------------------------------------------------------------------------------------------------
# Through git


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A night of its own, in no team: a baseline, and a keep at 0.99."""
    night = Teammate(tmp_path_factory.mktemp("team") / "a", team=None)
    night.baseline()
    night.experiment("wider", 0.99)
    return night


@pytest.fixture
def first(template, tmp_path):
    """A copy of it, member of the team "gpus"."""
    night = template.copy(tmp_path / "a")
    night.git("config", "autoresearch.team", "gpus")
    return night


@pytest.fixture
def shared(first):
    """(the first, a second machine with a clone, a bare repository that both share through); the first has published."""
    hub = first.hub()
    second = first.clone("b", hub)
    assert publish(first) is None
    return first, second, hub


def publish(night, minutes=0):
    """minutes: how long ago it said what it does."""
    repo = night.repo
    tag, when = repo.tag(), datetime.now(timezone.utc) - timedelta(minutes=minutes)
    state = exchange.state_of(repo, tag, "makes the next experiment") | {"when": when.isoformat()}
    return exchange.publish(repo, membership(repo), tag, state)


def fetch(night, **kwargs):
    return exchange.fetch(night.repo, membership(night.repo), **kwargs)


def seen(night, device="cpu (a fake)"):
    """The Team as this tree sees it. The header says what it compares with."""
    repo = night.repo
    header = night.header(device=device)
    return team.team_night(repo, membership(repo), repo.tag(), archive.records_of(repo.top, repo.tag()), header)


def test_without_a_team_nothing_is_shared(template):
    assert membership(template.repo) is None
    assert not list((template.path / ".git").glob("autoresearch*"))
    assert "autoresearch-team" not in template.git("for-each-ref") and "seq" not in template.records()[-1]
    refused = template.lab("adopt")
    assert refused.rc == 1 and "in no team: git config autoresearch.team" in refused.err and len(refused.err.splitlines()) == 1


def test_a_member_keeps_its_name_and_no_other_tree_has_it(first):
    second, third, name = first.worktree("b"), first.clone("c", "nowhere"), membership(first.repo).name
    copied = first.at(first.path.parent / "copied")
    shutil.copytree(first.path, copied.path, symlinks=True)
    found = [membership(night.repo) for night in (first, second, third, copied)]
    assert found[0].name == name and len({member.name for member in found}) == 4 and {member.team for member in found} == {"gpus"}
    assert [membership(night.repo).name for night in (first, second, third)] == [member.name for member in found[:3]]
    assert found[0].shared == found[1].shared != found[2].shared and found[2].remote == "nowhere"
    first.path.rename(first.path.parent / "moved")
    assert membership(first.at(first.path.parent / "moved").repo).name == found[0].name


@pytest.mark.parametrize("how", ["cp -a", "cp -r", "mv"])
def test_a_copy_of_a_tree_that_is_out_of_sight_gets_a_name_and_says_so_once(first, how, capsys):
    """As on another machine: the path is the same, and the tree that it was copied from cannot be seen."""
    hub, name = first.hub(), membership(first.repo).name
    first.git("config", "autoresearch.remote", str(hub))
    assert publish(first) is None
    away, place = first.at(first.path.parent / "away"), first.path
    first.path.rename(away.path)
    subprocess.run([*how.split(), str(away.path), str(place)], check=True)
    if how == "mv":
        os.utime(place / ".git" / names.MADE)  # sets the time of the last change, too: so does chown
    found = [membership(first.repo).name for _ in range(3)]
    shown = capsys.readouterr().err
    if how == "mv":
        assert found == 3 * [name] and shown == ""
        return
    assert name not in found and len(set(found)) == 1
    assert shown == f"lab: this working tree is a copy of {place}: in the team it is a member of its own, {found[0][:4]}\n"
    assert membership(away.repo).name == name
    assert publish(first) is None and len(refs(hub, "refs/")) == 2
    assert away.experiment("deeper", 0.95)[1].verdict == "keep"
    fetch(first)
    assert first.best == "deeper", "the copied ref of the other member is older than what it publishes"


def test_a_linked_tree_that_was_copied_without_git_is_refused(first):
    second = first.worktree("b")
    name = membership(second.repo).name
    shutil.copytree(second.path, first.path.parent / "c", symlinks=True)
    with pytest.raises(Refused, match="is a copy of the working tree .*/b and uses its git folder"):
        membership(first.at(first.path.parent / "c").repo)
    assert membership(second.repo).name == name
    second.path.rename(first.path.parent / "moved")
    assert membership(first.at(first.path.parent / "moved").repo).name == name


@pytest.mark.parametrize("key, value", [("team", "a/b"), ("team", "x" * 99), ("team", "\x1b[31m"), ("remote", "--upload-pack=x")])
def test_a_team_that_cannot_be_is_refused(first, key, value):
    first.git("config", f"autoresearch.{key}", value)
    with pytest.raises(Refused, match="git config autoresearch"):
        membership(first.repo)


def test_two_trees_of_a_checkout_find_one_best(first):
    """A late gain, taking over, and going on from there, with the real commands."""
    publish(first)
    second = first.worktree("b")
    assert "the team's best is" in second.next() and second.next().endswith("uv run -m lab adopt")
    commit, late = second.experiment("narrow", 0.992)
    assert late.verdict == "discard" and "beats test/0001" in late.out and "not test/0002" in late.out
    assert late.out.splitlines()[-2].endswith("uv run -m lab adopt") and f"git cherry-pick {commit[:7]}" in late.out.splitlines()[-1]
    assert second.records()[-1]["late"] is True and second.rows()[0][3] == "discard"
    (second.path / "program.md").write_text("# the human is editing this\n")  # as it may at any time
    (second.path / "notes.txt").write_text("of the agent\n")  # not tracked, as what the harness writes
    second.adopted()
    best = (first.path / "train.py").read_bytes()
    assert (second.path / "train.py").read_bytes() == best and second.read("program.md") == "# the human is editing this\n"
    assert second.read("notes.txt") == "of the agent\n"
    assert second.chain()[0].startswith("adopt ") and "wider" in second.chain()[0] and second.git("log", "--format=%h", "-1", "--stat")
    assert second.git("diff", "--name-only", "HEAD~1", "HEAD") == "train.py"
    assert "edit train.py" in second.next()
    refused = second.lab("adopt")
    assert refused.rc == 1 and "nothing is better" in refused.err
    assert second.experiment("deeper", 0.97)[1].verdict == "keep"
    shown = first.lab("status").out
    assert "best: 0.970000 (mean of 1), b/0002" in shown and "found by b" in shown
    second.check_team()


def test_adopt_and_wait_name_the_mean_of_all_runs_of_the_best(first):
    first.run(0.992, seed=43)
    assert first.recorded().verdict == "keep"
    second = first.worktree("b")
    second.adopted()
    assert "val_bpb 0.991000 (mean of 2), found by test" in second.git("log", "-1", "--format=%b")
    queue = Board(second.repo, membership(second.repo)).look(fresh=0)
    assert wait.situation(second.repo, queue)[0][0].startswith("best: 0.991000, test/0002")


def test_an_experiment_on_an_own_baseline_that_the_team_completed_names_it_as_the_team_does(tmp_path):
    """The tree ran the baseline once, and has no row of it."""
    a = Teammate(tmp_path / "a")
    b = a.worktree("b")
    a.run(1.0, seed=42)
    a.recorded("baseline")
    b.run(1.002, seed=50)
    b.recorded("baseline")
    a.run(0.998, seed=43)
    assert a.recorded().verdict == "keep"
    a.experiment("gain", 0.98)
    _, late = b.experiment("own idea", 0.985)
    assert late.verdict == "discard" and "it beats test/0001, on which it is based, but not test/0002" in late.out
    base = b.git("rev-parse", "--short", "HEAD")
    _, worse = b.experiment("worse", 1.2)
    assert worse.verdict == "discard" and f"based on: test/0001 {base} (1.000000); the best is another by now" in worse.out


def test_two_machines_share_through_a_remote(shared):
    first, second, hub = shared
    assert fetch(second) is None
    found = seen(second)
    assert [r["code"] for r in found.night.replayed[1]] == [r["code"] for r in first.records()[2:]]
    assert found.best["description"] == "wider" and found.trees[1].state["next"] == "makes the next experiment"
    assert all(r["commit"] == second.git("rev-parse", r["commit"]) for r in first.records()), "the commits are here"
    assert refs(second.path, "refs/autoresearch/") == {}, "what was fetched is no record of its own"
    second.adopted()
    assert second.experiment("deeper", 0.97)[1].verdict == "keep"
    assert seen(first).best["description"] == "wider"
    fetch(first)
    assert seen(first).best["description"] == "deeper" and "deeper" in first.next()
    assert exchange.unpublished(second.repo, membership(second.repo)) == 0


def test_what_a_tree_said_that_it_does_is_shown_for_an_hour_and_only_if_nobody_can_look(shared):
    first, second, _ = shared
    third = first.worktree("c")
    third.adopted()
    assert third.experiment("narrow", 1.02)[1].verdict == "discard" and publish(third) is None
    for minutes, shown in ((1, "makes the next experiment"), (61, "")):
        assert publish(first, minutes) is None and fetch(second) is None
        found = {tree["name"]: tree for tree in team_status.gather(second.repo, seen(second))["trees"]}
        assert found["test"]["runs"] == shown and not found["test"]["here"]
    first.git("worktree", "remove", "--force", str(third.path))
    found = {tree["name"]: tree for tree in team_status.gather(first.repo, seen(first))["trees"]}
    assert found["c"]["runs"] == "" and found["c"]["here"]


def test_a_tree_that_ran_on_another_device_has_a_baseline_of_its_own(first):
    """What run.log says of the device counts before anything is recorded: not what most of the team have."""
    publish(first)
    second = first.worktree("b")
    assert second.team.best["description"] == "wider"
    second.run(2.0, device="another")
    assert second.team.best is None and {r["description"] for r in second.team.ideas} == {"baseline", "wider"}
    assert 'not recorded: uv run -m lab record "baseline"' in second.next()
    assert second.recorded("baseline").verdict == "confirm" and second.team.night.values(second.records()[0]["code"]) == [2.0]
    shown = first.lab("status").out
    assert "other hardware, data or rules" in shown and "best: 0.990000" in shown


def test_what_another_member_tried_is_not_run_again(first):
    publish(first)
    second = first.worktree("b")
    second.adopted()
    second.change_train(first.git("show", f"{first.experiment('narrow', 1.02)[0]}:train.py") + "\n")
    commit = second.commit("the same edit")
    assert second.next().startswith(f"next: {commit[:7]} was tried already (test/0003): git reset --keep ")
    second.run(1.02)
    assert "this very train.py was tried before under seed 42 (test/0003)" in second.refused("the same edit")
    assert second.next().startswith(f"next: {commit[:7]} was tried already (test/0003): git reset --keep ")


def test_prove_and_the_notebook_read_the_team_as_one_night(shared):
    first, second, _ = shared
    assert team.read_night(second.path).experiments == () and fetch(second) is None
    night = team.read_night(second.path)
    assert [e.description for e in night.experiments] == ["baseline", "wider"] and night.best.val_bpb == 0.99
    assert night.sigma == pytest.approx(0.002) and night.by_estimate
    assert commits.default(second.repo) == [first.records()[0]["commit"], first.records()[-1]["commit"]]
    assert {r["run_id"] for r in commits.present(second.repo)} == {r["run_id"] for r in first.records()}
    second.git("switch", "-q", "main")
    assert team.read_night(second.path).experiments == () and commits.present(second.repo) == ()


def test_members_with_one_branch_name_do_not_overwrite_each_other(first):
    hub = first.hub()
    second = first.clone("b", hub, branch="test")
    publish(first)
    second.run(1.001, seed=77)
    assert second.recorded("baseline").verdict == "keep"
    there = refs(hub, "refs/")
    assert sorted(there) == sorted(membership(n.repo).ref("test") for n in (first, second))
    fetch(first)
    found = seen(first)
    assert {tree.member for tree in found.trees} == {membership(n.repo).name for n in (first, second)}
    assert found.name_of(found.night.records[0]) != found.name_of(found.night.records[-1])


SLOW = [pytest.param(away, marks=pytest.mark.slow) for away in ("no repository", "read-only")]


@pytest.mark.parametrize("away", ["removed", "wants a password", "silent", *SLOW])
def test_a_remote_that_is_gone_never_stops_a_record(shared, away, tmp_path, monkeypatch):
    first, _, hub = shared
    kept, wanted = tmp_path / "kept.git", []
    env = {"GIT_SSH_COMMAND": "false", "GIT_ASKPASS": "", "DISPLAY": ":9", "SSH_ASKPASS": "/bin/cat"}
    if away == "removed":
        hub.rename(kept)
    elif away == "no repository":
        first.git("config", "autoresearch.remote", str(tmp_path))
        wanted = ["not a git repository"]
    elif away == "read-only":
        (hub / "hooks").mkdir(exist_ok=True)
        (hub / "hooks" / "pre-receive").write_text("#!/bin/sh\necho read-only >&2; exit 1\n")
        (hub / "hooks" / "pre-receive").chmod(0o755)
    elif away == "wants a password":
        asks = tmp_path / "ssh"
        asks.write_text('#!/bin/sh\ncase "$*" in *BatchMode=yes*) echo "Permission denied (publickey,password)." >&2; exit 255;; esac\n'
                        "sleep 600\n")  # fmt: skip
        asks.chmod(0o755)
        first.git("config", "autoresearch.remote", "ssh://somebody@example.org/x.git")
        env["GIT_SSH_COMMAND"], wanted = str(asks), ["wants a password"]
    else:
        monkeypatch.setenv("GIT_SSH_COMMAND", "sleep 600;#")
        first.git("config", "autoresearch.remote", "ssh://example.org/x.git")
        note = fetch(first, seconds=1)  # git itself would wait ten minutes
        assert "no answer within 1 s" in note and fetch(first, seconds=1, fresh=60) == note
        return
    result = first.experiment("deeper", 0.97)[1] if away != "wants a password" else None
    if result is None:
        first.change_train()
        first.commit("deeper")
        first.run(0.97)
        result = first.lab("record", "deeper", **env)
    assert result.rc == 0 and result.verdict == "keep", result.err
    (note,) = [line for line in result.out.splitlines() if "not shared with the team" in line]
    assert all(text in note for text in wanted) and len(note) < 500
    if away in ("removed", "read-only"):
        assert "1 record of this tree is not on the team's remote yet" in first.lab("status").out
        if away == "removed":
            kept.rename(hub)
        else:
            (hub / "hooks" / "pre-receive").unlink()
        first.experiment("no gain", 1.1)
        assert exchange.unpublished(first.repo, membership(first.repo)) == 0
        assert len(exchange.runs_in(Repo(hub), refs(hub, "refs/")[membership(first.repo).ref("test")])) == 6


def test_a_remote_of_another_project_is_left_alone(first, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for args in (["init", "-q"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "another"]):
        subprocess.run(["git", *args], cwd=other, check=True)
    first.git("config", "autoresearch.remote", str(other))
    assert "holds another project" in publish(first) and "holds another project" in fetch(first)
    assert list(refs(other, "refs/")) == [ref for ref in refs(other, "refs/") if ref.startswith("refs/heads/")]


def test_what_somebody_rewrites_or_removes_on_the_remote_stays_known_here(shared):
    first, second, hub = shared
    assert fetch(second) is None
    ref = membership(first.repo).ref("test")
    old = refs(second.path, "refs/autoresearch-mirror/")
    subprocess.run(["git", "update-ref", "-d", ref], cwd=hub, check=True)
    assert "removed or rewrote" in fetch(second) and refs(second.path, "refs/autoresearch-mirror/") == old
    subprocess.run(["git", "update-ref", ref, first.start], cwd=hub, check=False)
    first.git("push", "-q", str(hub), f"+{first.start}:{ref}")
    assert "removed or rewrote" in fetch(second) and refs(second.path, "refs/autoresearch-mirror/") == old
    assert seen(second).best["description"] == "wider"
    assert publish(first) is None and refs(hub, ref) == refs(first.path, ref), "its own member repairs it"
    assert fetch(second) is None


BAD = {
    "not JSON": lambda r: "{",
    "a list": lambda r: [r],
    "no commit": lambda r: {k: v for k, v in r.items() if k != "commit"},
    "a value that is not finite": lambda r: r | {"summary": r["summary"] | {"val_bpb": float("nan")}},
    "an extra number that is not finite": lambda r: r | {"header": r["header"] | {"x": float("-inf")}},
    "a number that is too large": lambda r: json.dumps(r).replace("300.0", "1e999"),
    "a negative val_bpb": lambda r: r | {"summary": r["summary"] | {"val_bpb": -1.0}},
    "huge": lambda r: r | {"description": "x" * 10**6},
    "nested": lambda r: r | {"header": r["header"] | {"x": json.loads("[" * 60 + "]" * 60)}},
    "control characters": lambda r: r | {"description": "wider \x1b[31m\x07"},
    "a change of direction": lambda r: r | {"why": "\u202egniht"},
    "two lines": lambda r: r | {"description": "wider\ndeeper"},
    "a hash of another train.py": lambda r: r | {"code": "0" * 64},
    "the train.py of another commit": lambda r: r | {"commit": r["parent"]},
    "another blob": lambda r: r | {"blob": "0" * 40},
    "a commit that is not there": lambda r: r | {"commit": "0" * 40},
    "another branch": lambda r: r | {"tag": "elsewhere"},
    "another run": lambda r: r | {"run_id": "0" * 32},
    "a number in the order that is no number": lambda r: r | {"seq": "9"},
    "a number in the order that is huge": lambda r: r | {"seq": 10**12},
}


def foreign(hub, record, written, name="0" * 12, tag="evil"):
    """Puts a ref of another member into the hub, whose one record is `written`."""
    text = written if isinstance(written, str) else json.dumps(written, ensure_ascii=False)
    data = text.encode()
    ref = f"refs/autoresearch-team/gpus/{name}/{tag}"
    stream = f"commit {ref}\ncommitter x <x@x> 1700000000 +0000\ndata 0\nmerge {record['commit']}\n".encode()
    stream += f"M 100644 inline 0000/0001-{record['run_id']}.json\ndata {len(data)}\n".encode() + data + b"\n"
    stream += b"M 100644 inline state.json\ndata 3\n[1]\n"
    subprocess.run(["git", "fast-import", "--quiet", "--force"], cwd=hub, input=stream, check=True)


def test_bad_records_from_elsewhere_are_left_out(shared):
    first, second, hub = shared
    good = first.records()[-1] | {"tag": "evil", "run_id": "f" * 32, "mean": 0.5}
    good |= {"summary": good["summary"] | {"val_bpb": 0.5}, "header": good["header"] | {"seed": 99}}
    for i, change in enumerate(BAD.values()):
        foreign(hub, good, change(good), name=f"{i:012x}")
    foreign(hub, good, good, name="f" * 12, tag="good")  # of another branch than its place
    assert fetch(second) is None
    found = seen(second)
    assert [r["description"] for r in found.night.records] == [r["description"] for r in first.records()]
    assert found.best["description"] == "wider" and found.night.values(good["code"]) == [0.99]
    assert len(found.notes) == team.SHOWN_NOTES + 1 and all("left out" in note for note in found.notes[:-1])
    assert not any(c in note for note in found.notes for c in "\x1b\x07\n")
    for i in range(len(BAD)):
        assert found.trees[1 + i].records == [], list(BAD)[i]
    foreign(hub, good, good, name="e" * 12)  # the same record without a fault does count
    assert fetch(second) is None
    assert seen(second).night.values(good["code"]) in ([0.99, 0.5], [0.5, 0.99])


def test_a_ref_that_is_no_members_is_left_out(shared):
    first, second, hub = shared
    for ref in ("gpus/someone/x", "gpus/" + "0" * 12 + "/a/b"):
        subprocess.run(["git", "update-ref", f"refs/autoresearch-team/{ref}", first.start], cwd=first.path, check=True)
        first.git("push", "-q", str(hub), f"refs/autoresearch-team/{ref}")
    blob = first.git("hash-object", "-w", "--stdin", stdin="x")
    first.git("push", "-q", str(hub), f"{blob}:refs/autoresearch-team/gpus/{'1' * 12}/blob")
    fetch(second)
    notes = " ".join(seen(second).notes)
    assert notes.count("not what a member publishes") == 2 and "cannot be read" in notes
    assert seen(second).best["description"] == "wider"


NO_ADOPTION = {
    "dirty": "train.py has changes that are not committed", "another file": "prepare.py has changes that are not committed",
    "removed": "prepare.py has changes that are not committed", "experiment at HEAD": "is not recorded: run and record it",
    "interrupted": "a record was interrupted", "off a branch": "HEAD is detached", "nobody": "no run of the team compares",
}  # fmt: skip


@pytest.mark.parametrize("case", NO_ADOPTION)
def test_adopt_refuses_in_one_line_and_changes_nothing(first, case):
    publish(first)
    second = first.worktree("b")
    if case == "dirty":
        second.change_train()
    elif case in ("another file", "removed"):
        (second.path / "prepare.py").write_text("# an edit\n")
        if case == "removed":
            second.git("rm", "-q", "-f", "prepare.py")
    elif case == "experiment at HEAD":
        second.change_train()
        second.commit("an idea")
    elif case == "interrupted":
        plan = {"run_id": "x", "tag": "b", "records": [first.records()[-1]], "best": None, "drop": [], "say": ["x"]}
        (second.path / ".lab").mkdir(exist_ok=True)
        (second.path / ".lab" / "journal.json").write_text(json.dumps(plan))
    elif case == "off a branch":
        second.git("switch", "-q", "--detach")
    else:
        first.git("update-ref", "-d", membership(first.repo).ref("test"))
    before = second.state()
    result = second.lab("adopt")
    assert result.rc == 1 and result.out == "" and len(result.err.splitlines()) == 1 and result.err.startswith("lab adopt: ")
    assert NO_ADOPTION[case] in result.err
    assert second.state() == before


# ---------------------------------------------------------------------------------------------------
# Compare-and-swap


def test_a_ref_is_changed_only_if_it_is_what_is_expected(first):
    ref, (old, new) = names.queue_ref("gpus", "1"), first.git("rev-list", "-2", "HEAD").split()
    assert change_refs(first.path, [(ref, old, None)]) and not change_refs(first.path, [(ref, old, None)])
    assert not change_refs(first.path, [(ref, new, new)]) and refs(first.path, ref) == {ref: old}
    other = names.queue_ref("gpus", "2")
    assert not change_refs(first.path, [(other, new, None), (ref, new, new)]) and refs(first.path, other) == {}
    assert change_refs(first.path, [(other, new, None), (ref, new, old)]) and refs(first.path, ref, other) == {ref: new, other: new}
    assert not change_refs(first.path, [(ref, None, old)]) and change_refs(first.path, [(ref, None, new)])
    with pytest.raises(GitError):
        change_refs(first.path, [("refs/not a ref", new, None)])


def test_a_ref_of_the_remote_is_changed_only_if_it_is_what_is_expected(shared):
    first, _, hub = shared
    repo, member = first.repo, membership(first.repo)
    ref, (old, new) = names.queue_ref("gpus", "1", "claim"), first.git("rev-list", "-2", "HEAD").split()
    other = names.queue_ref("gpus", "2", "claim")
    assert exchange.swap(repo, member, [(ref, old, None)]) == "done" and exchange.swap(repo, member, [(ref, old, None)]) == "same"
    assert exchange.swap(repo, member, [(ref, new, None)]) == "refused" and refs(hub, ref) == {ref: old}
    assert exchange.swap(repo, member, [(other, new, None), (ref, new, new)]) == "refused" and refs(hub, other) == {}
    assert exchange.swap(repo, member, [(other, new, None), (ref, new, old)]) == "done" and refs(hub, ref) == {ref: new}
    assert exchange.swap(repo, member, [(ref, None, old)]) == "refused" and exchange.swap(repo, member, [(ref, None, new)]) == "done"
    first.git("config", "autoresearch.remote", "/nowhere")
    with pytest.raises(GitError):
        exchange.swap(repo, membership(first.repo), [(ref, old, None)])
    fetch_of_queue = refs(hub, names.queue_ref("gpus", ""))
    assert list(fetch_of_queue) == [other]


# ---------------------------------------------------------------------------------------------------
# Two machines, over a network


SHIFTED = """\
import datetime, time
SHIFT = {shift}
real, clock = datetime.datetime, time.time
class Shifted(real):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=SHIFT)
datetime.datetime = Shifted
time.time = lambda: clock() + SHIFT
"""


@pytest.fixture
def daemon(tmp_path):
    """A bare repository behind `git daemon`; its URL."""
    if not (Path(subprocess.check_output(["git", "--exec-path"], text=True).strip()) / "git-daemon").exists():
        pytest.skip("git has no daemon here")
    subprocess.run(["git", "init", "-q", "--bare", str(tmp_path / "served" / "hub.git")], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["git", "daemon", f"--base-path={tmp_path / 'served'}", "--export-all", "--enable=receive-pack", "--reuseaddr",
               "--listen=127.0.0.1", f"--port={port}"]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    url, deadline = f"git://127.0.0.1:{port}/hub.git", time.monotonic() + 60
    while subprocess.run(["git", "ls-remote", url], capture_output=True).returncode:
        assert process.poll() is None and time.monotonic() < deadline, "git daemon does not answer"
        time.sleep(0.1)
    yield url
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_two_machines_whose_clocks_are_ten_minutes_apart_find_one_best(tmp_path, daemon):
    """Both go on at the same time, over git's own protocol; what they see in the end is the same."""
    first = Teammate(tmp_path / "a")
    second = first.clone("b", daemon)
    for night, shift in [(first, 0), (second, -600)]:
        folder = tmp_path / f"clock{shift}"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SHIFTED.format(shift=shift))
        night.shift, night.env = shift, night.env | {
            "PYTHONPATH": f"{folder}:{night.env['PYTHONPATH']}", "GIT_COMMITTER_DATE": f"@{int(time.time()) + shift} +0000"}  # fmt: skip

    def runs(night, value, seed):
        when = datetime.now(timezone.utc) + timedelta(seconds=night.shift)
        night.run(value, seed=seed, start=when.isoformat(timespec="seconds"))
        os.utime(night.path / "run.log", (when.timestamp() + 1, when.timestamp() + 1))

    for i, value in enumerate((1.0, 1.002, 0.998)):
        runs((first, second)[i % 2], value, 42 + i)
        (first, second)[i % 2].recorded("baseline")
    assert second.records()[-1]["recorded"] < first.records()[0]["recorded"], "the clocks are not apart"
    rng, tried = random.Random(1), 0
    for i in range(14):
        night = (first, second)[rng.random() < 0.5]
        if night.next().endswith("lab adopt"):
            night.adopted()
        night.change_train()
        night.commit(f"idea {i}")
        runs(night, 0.999 - 0.002 * i + rng.gauss(0, 0.004), 42)
        result = night.recorded(f"idea {i}")
        while result.verdict == "confirm":
            runs(night, 0.999 - 0.002 * i, 50 + tried)
            tried, result = tried + 1, night.recorded()
    found = []
    for night in (first, second):
        fetch(night)
        seen_here = night.team
        found.append(decided(seen_here))
        assert {r["verdict"] for r in seen_here.night.rows} >= {"keep", "discard"} and not seen_here.notes
        night.check_team()
    assert found[0] == found[1] and len(found[0]) == len(first.records()) + len(second.records())
    assert first.team.best["code"] == second.team.best["code"]
    lists = [json.loads(night.lab("status", "--json").out) for night in (first, second)]
    for key in ("dead_ends", "near_misses"):
        assert [r["short"] for r in lists[0][key]] == [r["short"] for r in lists[1][key]]
    assert lists[0]["best"]["short"] == lists[1]["best"]["short"] and lists[0]["dead_ends"]


def test_status_on_main_says_that_a_team_takes_any_branch(first):
    first.git("switch", "-q", "-C", "main")
    assert "git switch -c autoresearch/TAG" in (shown := first.lab("status").out) and "team gpus sees every branch" in shown
    first.git("config", "--unset", "autoresearch.team")
    assert "team" not in first.lab("status").out


def test_a_tree_that_feeds_workers_audits_what_they_have_archived(first):
    """It keeps nothing itself. Two other trees of its checkout do, one of them elsewhere by now."""
    agent, other = first.worktree("agent"), first.worktree("other")
    publish(first)
    other.adopted()
    other.experiment("wider still", 0.97)
    args = SimpleNamespace(best=False, numbers=[])

    def chosen(**changed):
        history, here = audit.night_of(agent.repo)
        return audit.chosen(history, here, SimpleNamespace(**{**vars(args), **changed}))

    assert [audit.named(r) for r in chosen()] == ["test/0001", "test/0002", "other/0001"]
    assert [audit.named(r) for r in chosen(best=True)] == ["test/0001", "other/0001"]
    folders = [audit.folder_of(agent.path, r) for r in chosen()]
    assert all((folder / "train.py").is_file() for folder in folders)
    assert [folder.parent.parent for folder in folders] == [first.path, first.path, other.path]
    with pytest.raises(Refused, match="--tree"):
        chosen(numbers=[2])
    # Another night's archive of the same commit is not this one's run.
    shutil.copytree(folders[0], other.path / "runs" / folders[0].name)
    log = other.path / "runs" / folders[0].name / "run.log"
    log.write_text(re.sub(r'"run_id": "\w+"', '"run_id": "another"', log.read_text()))
    assert audit.folder_of(agent.path, chosen()[0]) == folders[0]
    shutil.rmtree(other.path / "runs")
    assert [audit.named(r) for r in chosen()] == ["test/0001", "test/0002"]
    with pytest.raises(Refused, match="the best .other/0001. is archived on another machine"):
        chosen(best=True)
    assert [audit.named(r) for r in audit.night_of(first.repo)[1]] == ["0001", "0002"]
    shutil.rmtree(first.path / "runs")
    with pytest.raises(Refused, match="in no working tree of this checkout"):
        chosen()


@pytest.mark.slow
def test_records_made_at_the_same_moment_are_all_there(first):
    """Four trees of one checkout record eight times each, all at once, through one remote."""
    hub = first.hub()
    first.git("config", "autoresearch.remote", str(hub))
    publish(first)
    trees = [first.worktree(name) for name in "bcde"]

    def work(night):
        for i in range(8):
            if night.next().endswith("lab adopt"):
                night.adopted()
            night.experiment(f"idea {i}", 1.0 - 0.003 * i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, trees))
    for night in trees:  # not while others still write: git fsck then misses what it has not listed
        night.check_team()
    elsewhere = first.clone("z", hub)
    assert fetch(elsewhere) is None
    found = seen(elsewhere)
    runs = sorted(r["run_id"] for night in (first, *trees) for r in night.records())
    assert sorted(r["run_id"] for r in found.night.records) == runs and len(set(runs)) == len(runs)
    assert all(decided(night.team) == decided(found) for night in trees)
