"""One agent, many workers: lab propose, lab work, lab wait. Made-up trainings, real git."""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakequeue import Proposer, inside, scores

from lab.base import files, locks
from lab.base import git as base_git
from lab.keeper import night
from lab.loop import checks, record
from lab.queue import wait, work
from lab.queue.board import Board, machine
from lab.queue.bring import merge
from lab.share import queue_refs
from lab.store import names

KEEP = {"A": 0.01}  # a gain of 10 σ and more
PATIENCE = 120  # seconds that anything may take on a busy machine


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A team whose baseline is measured, in the agent's own tree."""
    agent = Proposer(tmp_path_factory.mktemp("team") / "agent")
    agent.work()
    assert agent.team.night.tip["description"] == "baseline" and agent.team.night.tip["n"] == 3
    (agent.path / ".lab" / "worker.lock").unlink()
    return agent


@pytest.fixture
def agent(measured, tmp_path):
    return measured.copy(tmp_path / "agent")


def waits(agent, *args, rc=0):
    result = agent.lab("wait", *args)
    assert result.rc == rc, result.out + result.err
    return result.out if rc == 0 else result.err


def refused(tree, *args, needle):
    before = tree.state(), tree.git("for-each-ref")
    result = tree.lab(*args)
    assert result.rc == 1 and not result.out and len(result.err.splitlines()) == 1, result.out + result.err
    assert needle in result.err, result.err
    assert (tree.state(), tree.git("for-each-ref")) == before


def one_verdict_each(tree):
    """Every proposal has one verdict or was handed back, no run is twice in a log, and no code has two rows."""
    for item in tree.queue.items:
        assert item.kind in ("decided", "returned"), item
    rows = [r["code"] for r in tree.team.night.rows]
    runs = [r["run_id"] for r in tree.team.night.records]
    assert len(rows) == len(set(rows)) and len(runs) == len(set(runs))
    return tree.kinds()


# --- propose ------------------------------------------------------------------


@pytest.mark.slow
def test_propose_takes_the_experiment_off_the_branch_and_leaves_the_humans_edits(agent):
    before = agent.head()
    agent.idea("more A", **KEEP)
    (agent.path / "program.md").write_text("the human is writing this\n")
    refused(agent, "propose", "more A", "--simpler", needle="not simpler: it adds 1 lines and removes 1: propose it without")
    result = agent.lab("propose", "more A")
    assert result.rc == 0, result.err
    assert agent.head() == before and agent.read("program.md") == "the human is writing this\n"
    (item,) = agent.queue.items
    assert item.kind == "open" and not item.state["simpler"] and item.state["base"] == before
    assert "A = 0.01\n" in agent.git("show", f"{item.state['experiment']}:train.py")
    agent.git("gc", "--quiet", "--prune=now")
    agent.git("cat-file", "-e", item.state["experiment"])


def test_propose_refuses_what_is_no_experiment_of_this_branch(agent):
    refused(agent, "propose", "nothing", needle="is on refs/heads/main too: commit the experiment")
    agent.edit(**KEEP)
    refused(agent, "propose", "dirty", needle="not committed")
    agent.commit("more A")
    refused(agent, "propose", "  ", needle="in a few words")
    agent.git("reset", "-q", "--hard", "main")
    agent.proposed("more B", B=0.01)
    agent.git("switch", "-q", "--detach")
    refused(agent, "propose", "x", needle="detached")
    agent.git("switch", "-q", "autoresearch/test")
    agent.git("reset", "-q", "--hard", "main")
    agent.edit(B=0.01)
    agent.commit("B again")
    refused(agent, "propose", "the same code", needle="waits in the queue already (more B)")
    assert "queue: 1 proposals wait" in (shown := agent.lab("status").out) and "\n  waits: more B\n" in shown
    agent.git("reset", "-q", "--hard", "main")
    (agent.path / "more.py").write_text("1\n")
    agent.edit(C=0.01)
    agent.commit("two files", "train.py", "more.py")
    refused(agent, "propose", "two files", needle="touches more.py")
    agent.git("reset", "-q", "--hard", "main")
    agent.human_commits("a new program")
    refused(agent, "propose", "x", needle="does not change train.py")
    (agent.path / "train.py").write_text("# the baseline, in other words\n")
    agent.commit("away")
    agent.edit()
    agent.commit("the baseline's code")
    refused(agent, "propose", "the baseline", needle="recorded already (test, keep: baseline)")
    agent.git("config", "--unset", "autoresearch.team")
    refused(agent, "propose", "x", needle="git config autoresearch.team")


def test_a_propose_that_was_killed_before_the_branch_moved_is_completed(agent):
    agent.idea("more A", **KEEP)
    head = agent.head()
    assert agent.lab("propose", "more A").rc == 0
    agent.git("reset", "-q", "--hard", head)
    assert agent.lab("propose", "more A").rc == 0
    assert agent.head() != head and len(agent.queue.items) == 1


# --- a worker -----------------------------------------------------------------


def test_a_worker_runs_what_was_proposed_and_wait_tells_it_once(agent):
    progress = [night.recorded(agent.path)]  # as `lab night` sees it, which ends an agent without any
    agent.proposed("more A", **KEEP)
    progress.append(night.recorded(agent.path))
    agent.proposed("worse B", B=-0.02)
    agent.proposed("an error", END="crash")
    agent.proposed("less A", A=-0.01)
    progress.append(night.recorded(agent.path))
    assert "no worker is running, and 4 proposals wait" in waits(agent, rc=1)
    progress.append(night.recorded(agent.path))  # a cluster may take hours to start the workers
    tree = agent.worktree("w1")
    tree.work()
    assert one_verdict_each(agent) == {"more A": "keep", "worse B": "discard", "an error": "crash", "less A": "returned"}
    told = waits(agent)
    progress.append(night.recorded(agent.path))
    assert all(before != after for before, after in itertools.pairwise(progress)), progress
    for words in ["keep: 0.98", "discard: 1.0", "crash: an error", "ValueError: made up", "handed back: less A", "A = 0.01\n",
                  "A = -0.01\n", "[w1/0001]", "queue: 0 proposals wait", "next: uv run -m lab adopt"]:  # fmt: skip
        assert words in told, told
    assert "the queue is empty" in waits(agent, rc=1)
    assert night.recorded(agent.path) == progress[-1], "an agent that should propose is not kept"
    assert tree.git("log", "-1", "--format=%an %s") == "Some One more A"
    agent.adopted()
    agent.edit(A=0.02)
    agent.commit("more A yet")
    assert agent.lab("propose", "more A yet").rc == 0
    tree.work()
    assert agent.kinds()["more A yet"] == "keep" and "more A yet" in waits(agent)


@pytest.mark.slow
def test_without_a_baseline_the_workers_measure_it_first(tmp_path):
    agent = Proposer(tmp_path / "agent")
    agent.proposed("more A", **KEEP)
    first, second = agent.worktree("w1"), agent.worktree("w2")
    with inside(second):
        other = second.worker()
        queue = other.board.look()
        assert other.slot(queue, "baseline-42", "baseline", "baseline")  # and it takes long
        with locks.hold(second.path / ".lab" / "worker.lock"):
            (second.path / ".lab" / "worker.lock").write_text(other.member.name)
            worker = first.work()
    seeds = [r["header"]["seed"] for r in agent.team.night.records]
    assert seeds == [43, 44] and "more A" in str(agent.kinds()) and agent.kinds()["more A"] == "open"
    second.work()  # it was killed, and is started again
    runs = [r["header"]["seed"] for r in agent.team.night.records if r["description"] == "baseline"]
    assert sorted(runs) == [42, 43, 44]
    assert one_verdict_each(agent) == {"more A": "keep"} and worker.done == 0


def test_the_baseline_does_not_run_again_under_a_seed_that_it_crashed_under(tmp_path, monkeypatch):
    agent = Proposer(tmp_path / "agent")
    agent.run(1.0)
    agent.recorded("baseline")
    agent.run(tail="FAIL: loss is nan\n", seed=43)
    assert agent.recorded().verdict == "crash"
    tree = agent.worktree("w1")
    with inside(tree):
        worker, asked = tree.worker(), []
        monkeypatch.setattr(worker, "slot", lambda queue, id, *args: asked.append(id))
        worker.measure_baseline(worker.board.look(), worker.team())
    assert asked == ["baseline-44", "baseline-45"]


@pytest.mark.slow
def test_what_the_rule_wants_repeated_is_repeated_under_a_new_seed(agent):
    agent.simplified()
    agent.worktree("w1").work()
    (item,) = agent.queue.items
    runs = [r["header"]["seed"] for r in agent.team.night.records if r["description"] == "three lines less"]
    assert item.kind == "decided" and len(runs) == 2 and len(set(runs)) == 2


@pytest.mark.slow
def test_a_proposal_that_is_no_longer_simpler_is_judged_as_any_other(agent):
    """What was kept in the meantime may have removed the same lines: the run is not thrown away for that."""
    agent.proposed("more A", **KEEP)
    tree = agent.worktree("w1")
    worker = tree.worker()
    worker.change(worker.board.look().items[0], simpler=True)
    tree.work()
    (item,) = agent.queue.items
    assert item.kind == "decided" and item.state["verdict"] == "keep" and item.state["simpler"]
    assert [r["simpler"] for r in agent.team.night.records if r["description"] == "more A"] == [False]


def meanwhile(worker, first, second):
    """While `worker` of the tree `first` does its next training, the tree `second` works until its queue is empty."""
    train = worker.train

    def slow(seed, once=[1]):  # noqa: B006
        status = train(seed)
        if once:
            once.clear()
            with locks.hold(first.path / ".lab" / "worker.lock"):
                (first.path / ".lab" / "worker.lock").write_text(worker.member.name)
                second.work()
            os.chdir(first.path)
        return status

    worker.train = slow


@pytest.mark.slow
def test_a_late_gain_is_tried_again_on_the_new_best_by_itself(agent):
    """While one worker trains, another keeps something better that does not conflict."""
    agent.proposed("more A", **KEEP)
    agent.proposed("much B", B=0.05)
    first, second = agent.worktree("w1"), agent.worktree("w2")
    with inside(first):
        worker = first.worker()
        meanwhile(worker, first, second)
        worker.begin()
        while worker.step():
            pass
    assert one_verdict_each(agent) == {"more A": "keep", "much B": "keep"}
    assert any("late gain" in sentence for sentence in worker.said_all)
    best = agent.team.best
    assert {"A = 0.01", "B = 0.05"} <= set(agent.git("show", f"{best['commit']}:train.py").splitlines())


@pytest.mark.parametrize("told", ["late", pytest.param("keep", marks=pytest.mark.slow)])
def test_of_two_keeps_that_are_recorded_at_the_same_time_the_weaker_is_tried_again(agent, told):
    """Neither knows the other when it judges. told: what the worker of the weaker one says, which is "keep" if it looks before
    the better one is published; the order of two records that are made at the same time is that of their members' names."""
    better, weaker = sorted([agent.worktree("w1"), agent.worktree("w2")], key=lambda tree: tree.member())
    first, second = (weaker, better) if told == "late" else (better, weaker)
    ideas = {weaker: ("more A", KEEP), better: ("much B", {"B": 0.05})}
    for tree in (first, second):
        agent.proposed(ideas[tree][0], **ideas[tree][1])
    with inside(first):
        worker = first.worker()
        recorded = worker.recorded

        def slow(*args, once=[1]):  # noqa: B006
            if once:
                once.clear()
                with locks.hold(first.path / ".lab" / "worker.lock"):
                    (first.path / ".lab" / "worker.lock").write_text(worker.member.name)
                    second.work()
                os.chdir(first.path)
                assert agent.kinds()[ideas[second][0]] == "keep"
            return recorded(*args)

        worker.recorded = slow
        worker.begin()
        while worker.step():
            pass
    assert one_verdict_each(agent) == {"more A": "keep", "much B": "keep"}
    assert ("late gain" in str(worker.said_all)) == (told == "late")
    assert [(r["description"], bool(r.get("late"))) for r in agent.team.night.rows[1:]] == [("much B", False), ("more A", True), ("more A", False)]
    assert {"A = 0.01", "B = 0.05"} <= set(agent.git("show", f"{agent.team.best['commit']}:train.py").splitlines())


def test_a_late_gain_may_be_the_first_experiment_of_a_tree_that_ran_a_part_of_the_baseline(tmp_path):
    """Such a run has no row of its own by which the verdict could name it."""
    agent = Proposer(tmp_path / "agent")
    first, second = agent.worktree("w1"), agent.worktree("w2")
    with inside(first):
        worker = first.worker()
        worker.begin()
        assert worker.step()
        with locks.hold(first.path / ".lab" / "worker.lock"):
            (first.path / ".lab" / "worker.lock").write_text(worker.member.name)
            second.work()
        agent.proposed("more A", **KEEP)
        agent.proposed("much B", B=0.05)
        meanwhile(worker, first, second)
        assert [r["row"] for r in first.records()] == [None] and worker.step()
    assert one_verdict_each(agent) == {"more A": "keep", "much B": "keep"}
    assert "which it is based" in [r for r in first.records() if r.get("late")][0]["why"]


@pytest.mark.slow
def test_a_best_in_doubt_runs_again_once(agent):
    for i in range(30):
        if agent.team.night.doubted:
            break
        agent.experiment(f"no gain {i}", 1.5 + i / 100)
    if not agent.team.night.doubted:
        pytest.skip("the rule does not doubt a baseline of three runs")
    before = len(agent.team.night.runs(agent.team.night.tip["code"]))
    agent.worktree("w1").work()
    assert len(agent.team.night.runs(agent.team.night.tip["code"])) == before + 1 and not agent.queue.slots


# --- claims -------------------------------------------------------------------


def test_a_worker_has_git_pack_its_objects_at_the_start_and_again_and_again(agent, monkeypatch):
    """Nothing else does: a worker's clone has no commits by hand, and its calls of git switch `gc --auto` off."""
    for i in range(3):
        agent.proposed(f"idea {i}", **{"ABC"[i]: 0.01})
    worker, packed = agent.worktree("w1").worker(), []
    git = worker.repo.git
    monkeypatch.setattr(worker.repo, "git", lambda *args, **kw: packed.append(worker.done) if "gc" in args else git(*args, **kw))
    monkeypatch.setattr("lab.queue.work.PACKED_AFTER", 2)
    worker.begin()
    assert packed == [0]
    for item in worker.board.look().items:
        r = {"verdict": "discard", "row": 1, "tag": "w1", "mean": None, "gain": None, "commit": item.commit, "label": "w1/0001"}
        worker.settle(worker.claim(item), r, "")
    assert packed == [0, 2] and worker.done == 3
    worker.repo.git = lambda *args, **kw: (_ for _ in ()).throw(OSError("the disk is full"))
    worker.pack()


def test_two_workers_never_have_the_same_claim(agent):
    agent.proposed("more A", **KEEP)
    trees = [agent.worktree("w1"), agent.worktree("w2")]
    workers = [tree.worker() for tree in trees]
    (item,) = workers[0].board.look().items
    assert [bool(worker.claim(item)) for worker in workers] == [True, False]


def test_a_claim_is_void_at_once_if_its_workers_lock_is_free_and_never_while_it_is_held(agent):
    if not machine():
        pytest.skip("this system does not name its boot")
    agent.proposed("more A", **KEEP)
    first, second = agent.worktree("w1"), agent.worktree("w2")
    dead = first.worker()
    item = dead.claim(dead.board.look().items[0])
    clock = [0.0]
    board = Board(second.repo, checks.member_of(second.repo), longest=100, clock=lambda: clock[0])
    with locks.hold(first.path / ".lab" / "worker.lock"):
        (first.path / ".lab" / "worker.lock").write_text(dead.member.name)
        assert not board.is_void(board.look().find(item.id))
        clock[0] = 99
        assert not board.is_void(board.look().find(item.id))
        item = dead.renew(item, "run 2", "")  # a sign of life
        clock[0] = 150
        assert not board.is_void(board.look().find(item.id))
        clock[0] = 300
        assert board.is_void(board.look().find(item.id))
    clock[0] = 301
    assert Board(second.repo, board.member).is_void(board.look().find(item.id))


@pytest.mark.parametrize("remote", [False, True], ids=["one checkout", "over a remote"])
def test_what_a_worker_that_is_gone_left_of_itself_is_removed_and_not_counted(agent, remote):
    """The one was killed on this machine, the other on one that nobody can look into."""
    trees = [agent.worktree("w1"), agent.worktree("w2")]
    if remote:
        agent.git("config", names.REMOTE, str(agent.hub()))
    clock = [0.0]
    board = Board(agent.repo, checks.member_of(agent.repo), clock=lambda: clock[0])
    near, far = (tree.worker() for tree in trees)
    far.identity["machine"] = "another"
    with locks.hold(trees[0].path / ".lab" / "worker.lock"):
        (trees[0].path / ".lab" / "worker.lock").write_text(near.member.name)
        for worker, slot in (near, "baseline-45"), (far, "baseline-46"):
            queue = worker.board.look()
            worker.sign(queue)
            assert worker.slot(queue, slot, "baseline", "baseline")

        def seen():
            queue = board.look(fresh=0)
            return [[item.state["worker_branch"] for item in sorted(items)] for items in (queue.slots, queue.workers)]

        assert board.alive(board.look(fresh=0)) == {near.member.name, far.member.name}
        assert seen()[0] == ["w1", "w2"] and sorted(seen()[1]) == ["w1", "w2"]
    assert seen() == [["w2"], ["w2"]], "its lock is free"
    clock[0] = board.longest - 1
    far.signed = float("-inf")
    far.sign(far.board.look())
    clock[0] = board.longest + 1
    assert seen() == [["w2"], ["w2"]], "it has shown that it is there"
    clock[0] = 2 * board.longest + 2
    assert seen() == [[], []]
    assert agent.queue.slots == agent.queue.workers == ()
    far.signed = float("-inf")
    far.sign(far.board.look())  # it was only asleep
    assert seen() == [[], ["w2"]]


def test_status_and_propose_show_no_worker_that_can_be_seen_to_be_gone(agent):
    """One on this machine, before it was rebooted, and one on a machine that nobody can look into. Nothing is changed."""
    agent.proposed("more A", **KEEP)
    trees = [agent.worktree("w1"), agent.worktree("w2")]
    near, far = (tree.worker() for tree in trees)
    near.identity["machine"], lock = "the boot before", trees[0].path / ".lab" / "worker.lock"
    far.identity |= {"machine": "another", "host": "elsewhere"}
    with locks.hold(lock):
        lock.write_text(near.member.name)
        for worker in (near, far):
            worker.sign(worker.board.look())
        assert near.slot(near.board.look(), "baseline-45", "baseline", "baseline") and near.claim(near.board.look().items[0])
        shown = agent.lab("status").out
        assert "queue: 0 proposals wait, 2 run, 0 decided; workers: 2\n" in shown and "\n  w1: more A (begins)\n" in shown
    before = agent.git("for-each-ref")
    shown = agent.lab("status").out
    assert "queue: 1 proposals wait, 0 run, 0 decided; workers: 1\n  waits: more A\n" in shown and "1 workers run, 1 proposals" in shown
    assert agent.git("for-each-ref") == before
    agent.git("update-ref", "-d", names.queue_ref("gpus", f"worker-{far.member.name}"))
    said = agent.proposed("more B", B=0.01).out
    assert "queue: 2 wait, 0 run" in said and "note: no worker is running yet" in said


def taken_over(worker, tree):
    """While the worker trains, one in the other tree sees that its lock is free, and takes its claim."""
    train = worker.train

    def long(seed):
        status = train(seed)
        heir = tree.worker()
        assert heir.claim(heir.free(heir.board.look())[0])
        return status

    worker.train = long


def test_a_worker_that_was_taken_for_dead_and_returns_discards_its_result(agent):
    agent.proposed("more A", **KEEP)
    first, second = agent.worktree("w1"), agent.worktree("w2")
    with inside(first):
        frozen = first.worker()
        taken_over(frozen, second)
        frozen.begin()
        frozen.step()
    assert "another worker has taken this proposal over: what was run is discarded" in frozen.said_all
    assert not (first.path / "run.log").exists() and not first.records()
    second.work()
    assert one_verdict_each(agent) == {"more A": "keep"}
    assert agent.queue.items[0].state["worker_branch"] == "w2"


@pytest.mark.parametrize("how", ["taken for dead", pytest.param("stopped between the runs", marks=pytest.mark.slow)])
def test_a_close_call_that_another_worker_decided_is_not_closed_by_the_first(agent, how):
    """It has recorded one of two runs; another worker takes the proposal over and decides it."""
    agent.simplified(A=0.0004)
    first, second = agent.worktree("w1"), agent.worktree("w2")
    with inside(first):
        worker = first.worker()
        train, runs = worker.train, []

        def second_run(seed):
            runs.append(seed)
            if len(runs) == 2 and how == "taken for dead":
                second.work()  # it sees a free lock, and takes over
            elif len(runs) == 2:
                worker.stopped_by = signal.SIGTERM
            return train(seed)

        worker.train = second_run
        worker.begin()
        if how == "taken for dead":
            worker.step()
            assert any("was run is discarded" in sentence for sentence in worker.said_all)
        else:
            with pytest.raises(work.Stopped):
                worker.step()
            second.work()
    assert len(runs) == 2 and [r["verdict"] for r in first.records()] == ["confirm"]
    (item,) = agent.queue.items
    code, said = item.state["code"], item.state["verdict"]
    assert item.kind == "decided" and item.state["worker_branch"] == "w2"
    agent.proposed("worse B", B=-0.02)
    first.work()  # before, the record of another commit closed what waited for its repeat
    assert agent.kinds() == {"three lines less": said, "worse B": "discard"}
    assert [r["verdict"] for tree in (first, second) for r in tree.records() if r["row"] and r["code"] == code] == [said]
    for tree in (agent, first, second):
        assert [r["verdict"] for r in tree.team.night.rows if r["code"] == code] == [said]
        assert tree.team.night.waiting is None
    assert one_verdict_each(first) and len(first.team.night.runs(code)) == 2
    assert [row[3] for row in first.rows()] == ["discard"] and first.rows()[0][4] == "worse B"


@pytest.mark.parametrize("returns", ["after", pytest.param("before", marks=pytest.mark.slow)])
def test_a_record_that_was_killed_and_a_second_verdict_are_one(agent, returns, monkeypatch):
    """A worker is killed with the plan of its record on disk; another one runs the proposal, and says the contrary."""
    agent.proposed("more A", **KEEP)
    first, second = agent.worktree("w1"), agent.worktree("w2")
    with inside(first), monkeypatch.context() as killed:
        killed.setattr(record, "steps", lambda repo: [lambda plan: (_ for _ in ()).throw(KeyboardInterrupt)])
        worker = first.worker()
        worker.begin()
        with pytest.raises(KeyboardInterrupt):
            worker.step()
    assert (first.path / ".lab" / "journal.json").exists() and not first.records()
    with inside(second):
        heir = second.worker()
        scores(heir, 1.2)
        train = heir.train

        def long(seed):
            status = train(seed)
            if returns == "before":
                with inside(first):
                    first.worker().begin()
            return status

        heir.train = long
        heir.begin()
        heir.step()
    said = "keep" if returns == "before" else "discard"
    assert agent.kinds() == {"more A": said}
    again = first.work()
    assert len(first.records()) == 1 and first.records()[0].get("lost", False) == (returns == "after"), again.said_all
    code = first.records()[0]["code"]
    for tree in (agent, first, second):
        assert [r["verdict"] for r in tree.team.night.rows if r["code"] == code] == [said]
        assert one_verdict_each(tree) == {"more A": said}
    assert len(second.records()) == (returns == "after")


@pytest.mark.slow
def test_a_run_under_a_seed_that_another_worker_has_published_meanwhile_is_run_again(agent):
    """A worker records a close call, and is taken for dead before others see that; the next one runs the same seed."""
    agent.simplified(A=0.0004)
    first, second = agent.worktree("w1"), agent.worktree("w2")
    first.killed("recorded")
    with inside(second):
        heir = second.worker()
        train, seeds = heir.train, []

        def long(seed):
            seeds.append(seed)
            if len(seeds) == 1:
                assert first.lab("record", "three lines less", "--simpler").rc == 0
            return train(seed)

        heir.train = long
        heir.begin()
        heir.step()
    assert seeds[0] is None and len(set(seeds)) == len(seeds) == 2
    assert one_verdict_each(agent) == {"three lines less": "keep"}
    assert [r["verdict"] for r in first.records()] == ["confirm"] and len(second.records()) == 1


def test_a_repeat_of_the_best_under_a_seed_that_another_tree_has_published_is_run_again(agent):
    """The worker has taken over the claim of one that was taken for dead, came back and published."""
    tree = agent.worktree("w1")
    with inside(tree):
        worker = tree.worker()
        worker.begin()
        queue, team = worker.board.look(), worker.team()
        used = {r["header"]["seed"] for r in team.night.runs(team.best["code"])}
        item = worker.slot(queue, "again-1-3", "again", "baseline: in doubt, again")
        worker.run_slot(item, team.best["code"], "", max(used))
    (record,) = tree.records()
    assert len(used) == 3 and record["code"] == team.best["code"] and record["header"]["seed"] not in used
    assert len(agent.team.night.runs(record["code"])) == 4 and not agent.queue.slots


def test_a_verdict_that_another_tree_has_published_is_told_as_it_was_seen(agent):
    """A moment later the refs may say something else: the other tree gives it up, or a fetch brings more."""
    agent.proposed("more A", **KEEP)
    tree, seen = agent.worktree("w1"), {**agent.team.best, "verdict": "discard"}
    with inside(tree):
        worker = tree.worker()
        worker.recorded = lambda *args: (_ for _ in ()).throw(checks.DecidedElsewhere(seen))
        worker.begin()
        worker.step()
    (item,) = agent.queue.items
    assert item.state["verdict"] == "discard" and item.state["commit"] == seen["commit"]
    assert "decided meanwhile (" in item.state["text"] and not (tree.path / "run.log").exists()


@pytest.mark.slow
def test_a_verdict_that_was_not_published_is_found_by_the_next_start(agent):
    """Killed after the record, before the verdict; the record itself may be unpublished, too."""
    agent.proposed("more A", **KEEP)
    tree = agent.worktree("w1")
    tree.killed("settle")
    assert agent.kinds() == {"more A": "claimed"} and len(tree.records()) == 1
    again = tree.work()
    assert one_verdict_each(agent) == {"more A": "keep"} and len(tree.records()) == 1 and again.done == 1


def test_a_verdict_that_a_stopped_worker_did_not_tell_is_told_though_the_best_is_another_by_now(agent):
    agent.proposed("more A", **KEEP)
    agent.proposed("worse B", B=-0.02)
    first, second = agent.worktree("w1"), agent.worktree("w2")
    with inside(first):
        worker = first.worker()
        next = worker.next

        def stopped(*args):
            raise work.Stopped

        worker.next, worker.settle = lambda *args: next(*args)[1:], stopped
        worker.begin()
        with pytest.raises(work.Stopped):
            worker.step()
    assert agent.kinds() == {"more A": "open", "worse B": "open"}
    second.work()
    assert one_verdict_each(agent) == {"more A": "keep", "worse B": "discard"}
    assert [r["description"] for r in second.records()] == ["more A"], "worse B does not run again"


@pytest.mark.slow
def test_a_run_that_was_complete_and_not_recorded_is_recorded_by_the_next_start(agent):
    agent.proposed("more A", **KEEP)
    tree = agent.worktree("w1")
    tree.killed("recorded")
    ran = json.loads(tree.read("run.log").splitlines()[0].removeprefix("run: "))["run_id"]
    tree.work()
    assert [r["run_id"] for r in tree.records()] == [ran]
    assert one_verdict_each(agent) == {"more A": "keep"}


# --- a machine that fails -----------------------------------------------------


@pytest.mark.slow
def test_a_preempted_run_runs_again_and_one_that_is_always_killed_goes_back(agent):
    agent.proposed("preempted", END="preempted", **KEEP)
    tree = agent.worktree("w1")
    tree.work()
    assert agent.kinds() == {"preempted": "keep"} and len(tree.records()) == 1
    agent.adopted()
    agent.proposed("killed", END="killed", **KEEP)
    with inside(tree):
        worker = tree.worker()
        worker.begin()
        for _ in range(work.ATTEMPTS):
            with pytest.raises(work.Fault, match="ended from outside"):
                worker.step()
    (item,) = agent.queue.of("returned")
    assert item.state["text"].count("w1: ") == work.ATTEMPTS and "killed" in item.state["text"]
    assert tree.git("status", "--porcelain", "--untracked-files=no") == "" and not worker.step()


@pytest.mark.slow
def test_a_run_that_overruns_is_run_again_twice_and_then_a_crash(agent):
    """A stall of the machine does that, or the edit: then it is no fault of the worker, which goes on."""
    agent.proposed("too long", END="overran", A=0.01)
    tree = agent.worktree("w1")
    tree.work()
    assert agent.kinds() == {"too long": "crash"} and len(tree.records()) == 1
    assert tree.read("night.log").count("the run overran its time: it is run again") == 2
    assert "failed because of this machine" not in tree.read("night.log")
    assert "nor in those of the 2 runs before it (training overran its 300 s" in tree.records()[0]["why"]


def test_a_disk_that_fills_up_between_a_crash_and_its_record_is_a_fault_of_the_machine(agent, monkeypatch):
    """And not a record that is tried again without a pause."""
    agent.proposed("crash", END="crash", A=0.01)
    tree, asked = agent.worktree("w1"), []

    def is_full(folder):  # asked after the run, and by the record
        asked.append(folder)
        assert len(asked) < 4, "it is tried again and again"
        return len(asked) > 1

    monkeypatch.setattr(files, "disk_is_full", is_full)
    with inside(tree):
        worker = tree.worker()
        worker.begin()
        with pytest.raises(work.Fault, match="the disk is full"):
            worker.step()
    assert agent.kinds() == {"crash": "open"} and not tree.records() and not (tree.path / "run.log").exists()


@pytest.mark.slow
def test_five_proposals_in_a_row_that_fail_because_of_the_machine_stop_the_worker(agent):
    for i in range(6):
        agent.proposed(f"idea {i}", END="disk", A=0.01 * i + 0.01)
    tree = agent.worktree("w1")
    done = tree.lab("work", "--no-sandbox", timeout=PATIENCE)
    assert done.rc == 1 and "5 in a row failed because of this machine" in done.err and "No space left" in done.err
    assert set(agent.kinds().values()) == {"open"}  # for a worker whose disk is not full
    assert not agent.queue.workers and not tree.records()
    assert tree.chain()[0] == "a made-up training"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["begin", "train"])
def test_a_full_disk_costs_a_worker_time_and_nothing_else(agent, moment, own_mounts):
    """It says so in one line; what the disk cut off is no result, and the proposal is decided once there is room."""
    agent.git("config", names.REMOTE, str(agent.hub()))
    agent.publish()
    agent.proposed("more A", SECONDS=2.0, PAGES=2, **KEEP)
    script = [sys.executable, str(Path(__file__).parent / "full_disk.py"), str(agent.path.parent), moment, agent.start]
    env = agent.env | {"PYTHONPATH": os.pathsep.join([agent.env["PYTHONPATH"], str(Path(__file__).parent)])}
    done = subprocess.run([*own_mounts, *script], env=env, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kinds"] == {"more A": "keep"} and found["verdicts"] == ["keep"] and found["rows"] == 1 and found["same"], found
    assert found["status"] == 143 and "error" not in found["fsck"] and found["said"].rstrip().endswith("1 proposals decided")
    if moment == "begin":
        assert found["first"] == [3, "", "lab work: the disk is full\n"]
    else:
        assert found["said"].count("No space left on device") == found["said"].count("failed because of this machine (1 in a row)") == 1
    assert one_verdict_each(agent)


@pytest.mark.slow
def test_a_crash_because_of_the_machine_is_no_verdict_when_the_worker_takes_the_proposal_again(agent):
    agent.proposed("no disk", END="disk", **KEEP)
    tree = agent.worktree("w1")
    with inside(tree):
        worker = tree.worker()
        worker.begin()
        for _ in range(work.ATTEMPTS):
            with pytest.raises(work.Fault, match="No space left"):
                worker.step()
    (item,) = agent.queue.of("returned")
    assert item.state["text"].count("No space left on device") == work.ATTEMPTS and not tree.records()
    assert "No space left" in tree.read(".lab/fault.log") and not (tree.path / "run.log").exists()


@pytest.mark.parametrize("comes_back", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["comes back", "stays away"])
def test_a_machine_that_reboots_in_the_middle_of_a_run(agent, comes_back):
    """It leaves its claim, its lock files, and a log without an end. Whether it is gone cannot be seen from another boot."""
    agent.proposed("more A", **KEEP)
    tree, other = agent.worktree("w1"), agent.worktree("w2")
    with inside(tree):
        worker = tree.worker()
        worker.identity["machine"] = "the boot before"

        def power_cut(seed):
            log = json.dumps(tree.header() | {"train_sha256": names.sha256(tree.path / "train.py")})
            (tree.path / "run.log").write_text(f"run: {log}\nstep 00123 (41.0%) | loss 3.1415")
            raise KeyboardInterrupt

        worker.train = power_cut
        worker.begin()
        with pytest.raises(KeyboardInterrupt):
            worker.step()
    git_folder = Path(tree.git("rev-parse", "--absolute-git-dir"))
    for left in (git_folder / "index.lock", agent.path / ".git" / "refs" / "heads" / "autoresearch" / "w1.lock"):
        left.parent.mkdir(parents=True, exist_ok=True)
        left.touch()
    clock = [0.0]
    board = Board(other.repo, checks.member_of(other.repo), clock=lambda: clock[0])
    assert not board.is_void(board.look(fresh=0).items[0]), "nobody can see whether the other boot's worker runs"
    if comes_back:
        again = tree.work()
        assert {"removed index.lock, which a killed git had left", "removed w1.lock, which a killed git had left"} <= set(again.said_all)
        assert again.done == 1 and len(tree.records()) == 1 and not other.records()
    else:
        with inside(other):
            heir = other.worker(board=board)
            assert not heir.step()
            clock[0] = 1 + board.longest
            assert heir.step() and not heir.step()
        assert heir.done == 1 and not tree.records()
        assert tree.work().done == 0 and not tree.records()  # at last
    assert one_verdict_each(agent) == {"more A": "keep"}
    assert tree.git("status", "--porcelain", "--untracked-files=no") == "" and tree.chain()[0] in ("more A", "a made-up training")


@pytest.mark.slow
def test_a_worker_of_another_device_says_so_and_puts_the_proposal_back(agent):
    agent.proposed("more A", **KEEP)
    tree = agent.worktree("w1")
    done = tree.lab("work", "--no-sandbox", timeout=PATIENCE, FAKE_DEVICE="another")
    assert done.rc == 1 and "device another, not cpu (a fake)" in done.err and "--ideas" in done.err
    assert agent.kinds() == {"more A": "open"} and not tree.records()
    (tree.path / "prepare.py").write_text("# other rules\n")
    tree.commit("other rules", "prepare.py")
    done = tree.lab("work", "--no-sandbox", timeout=PATIENCE)
    assert done.rc == 1 and "prepare.py is not that of the team's runs" in done.err
    assert agent.kinds() == {"more A": "open"} and not tree.records()


@pytest.mark.slow
@pytest.mark.parametrize("ideas", [False, True])
def test_a_worker_that_starts_again_on_another_device_hands_back_no_proposals(agent, ideas):
    """As a task of Slurm that was requeued, on another kind of node; or the frozen files of its tree are others."""
    tree, options = agent.worktree("w1"), ["--no-sandbox", *["--ideas"] * ideas]
    agent.proposed("more A", **KEEP)
    tree.work(ideas=ideas)
    agent.proposed("worse B", B=-0.02)
    done = tree.lab("work", *options, timeout=PATIENCE, FAKE_DEVICE="another")
    assert done.rc == 1 and "those of this branch (device another, not cpu (a fake)): start it in a new working tree" in done.err
    assert agent.kinds() == {"more A": "keep", "worse B": "open"}
    (tree.path / "prepare.py").write_text("# other rules\n")
    tree.commit("other rules", "prepare.py")
    done = tree.lab("work", *options, timeout=PATIENCE)
    assert done.rc == 1 and "prepare.py changed since this branch's first run" in done.err
    assert agent.kinds() == {"more A": "keep", "worse B": "open"} and "Traceback" not in done.err
    (tree.path / "prepare.py").write_text("# frozen\n")
    tree.commit("the rules of this branch", "prepare.py")
    assert tree.work(ideas=ideas).done == 1 and agent.kinds()["worse B"] == "discard"


def test_a_worker_of_another_device_that_was_taken_for_dead_says_that_it_is_of_another_device(agent):
    agent.proposed("more A", **KEEP)
    first, second = agent.worktree("w1"), agent.worktree("w2")
    with inside(first):
        os.environ["FAKE_DEVICE"] = "another"
        worker = first.worker()
        taken_over(worker, second)
        worker.begin()
        with pytest.raises(work.Hopeless, match="device another, not cpu"):
            worker.step()
    (item,) = agent.queue.items
    assert item.kind == "claimed" and item.state["worker_branch"] == "w2"


@pytest.mark.slow
@pytest.mark.parametrize("device, runs", [("another", 3), ("cpu (a fake)", 1)])
def test_with_ideas_a_worker_measures_the_baseline_of_its_own_device_first(agent, device, runs, monkeypatch):
    """Which one that is, only a run can say."""
    agent.proposed("more A", **KEEP)
    tree = agent.worktree("w1")
    monkeypatch.setenv("FAKE_DEVICE", device)
    assert tree.work(ideas=True).done == 1 and agent.kinds() == {"more A": "keep"}
    assert [r["description"] for r in tree.records()] == ["baseline"] * runs + ["more A"]
    assert {r["header"]["device"] for r in tree.records()} == {device}
    assert agent.best == ("more A" if runs == 1 else "baseline") and len(agent.team.ideas) == (0 if runs == 1 else 4)


@pytest.mark.slow
def test_sigterm_ends_a_worker_and_its_training_and_the_proposal_waits_again(agent):
    agent.proposed("slow", SECONDS=600, **KEEP)
    tree = agent.worktree("w1")
    process = tree.start_worker()
    try:
        until(lambda: "run: {" in tree.read("run.log"))
        assert agent.queue.of("claimed")[0].state["doing"] == "run 1"
        agent.edit(A=0.02)
        shown = agent.lab("status").out
        assert "train.py has changes that are not committed: git commit" in shown and "uv run train.py" not in shown
        agent.commit("another")
        shown = agent.lab("status").out
        assert "queue: 0 proposals wait, 1 run, 0 decided; workers: 1" in shown and "  w1: slow (run 1)" in shown
        assert "next: " in shown and 'has not run yet: uv run -m lab propose "what it tries"' in shown
        agent.git("reset", "-q", "--hard", "main")
        assert "next: 1 workers run, 0 proposals wait" in agent.lab("status").out
        assert "slow (run 1)" in agent.lab("wait", "--timeout", "0").out
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143, out
    assert agent.kinds() == {"slow": "open"} and not agent.queue.workers
    assert "preempted" in tree.read("run.log") and tree.chain()[0] == "a made-up training"


@pytest.mark.slow
def test_a_killed_worker_leaves_no_training_behind_and_the_next_start_goes_on(agent):
    agent.proposed("slow", SECONDS=600, **KEEP)
    tree = agent.worktree("w1")
    process = tree.start_worker()
    until(lambda: "run: {" in tree.read("run.log"))
    process.kill()
    process.communicate(timeout=PATIENCE)
    until(lambda: not locks.is_held(tree.path))
    agent.git("update-ref", "-d", agent.queue.items[0].ref)  # nobody waits for it longer
    agent.proposed("fast", **KEEP)
    tree.work()
    assert one_verdict_each(agent) == {"fast": "keep"}


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_takes_no_tree_that_somebody_else_uses(agent):
    agent.edit(**KEEP)
    assert "not committed" in agent.lab("work").err
    agent.commit("more A")
    assert "not recorded" in agent.lab("work").err
    with locks.hold(agent.path / ".lab" / "night.lock"):
        assert "a worker or a night is running" in agent.lab("work").err
    with locks.hold(agent.path / ".lab" / "worker.lock"):
        assert "a worker runs in this tree" in agent.lab("propose", "more A").err
    agent.git("reset", "-q", "--hard", "main")
    with locks.hold(agent.path / ".lab" / "worker.lock"):
        assert "a worker or a night is running" in agent.lab("work").err


# --- a remote -----------------------------------------------------------------


@pytest.mark.slow
def test_a_queue_over_a_remote_and_the_remote_gone_for_a_while(agent):
    hub = agent.hub()
    far = agent.clone("far", hub)
    agent.publish()
    agent.proposed("more A", **KEEP)
    assert [item.unpublished for item in agent.queue.items] == [False]
    far.work()
    assert agent.kinds() == {"more A": "keep"} and "keep: 0.98" in waits(agent)
    agent.adopted()
    hub.rename(hub.with_name("away.git"))
    agent.edit(A=0.02)
    agent.commit("A without a remote")
    result = agent.lab("propose", "A without a remote")
    assert result.rc == 0 and "the remote does not have the proposal yet" in result.out
    with inside(far):
        worker = far.worker()
        assert not worker.step() and "was not fetched" in worker.said_all[0]
    hub.with_name("away.git").rename(hub)
    assert agent.kinds()["A without a remote"] == "open" and not agent.queue.items[1].unpublished
    far.work()
    assert one_verdict_each(agent) == {"more A": "keep", "A without a remote": "keep"}


@pytest.mark.slow
def test_a_remote_that_vanishes_during_a_run_costs_neither_the_run_nor_the_verdict(agent):
    hub = agent.hub()
    far = agent.clone("far", hub)
    agent.publish()
    agent.proposed("more A", **KEEP)
    with inside(far):
        worker = far.worker()
        worker.pause = lambda seconds: hub.with_name("away.git").rename(hub)
        train = worker.train

        def during(seed):
            hub.rename(hub.with_name("away.git"))
            return train(seed)

        worker.train = during
        worker.begin()
        while worker.step():
            pass
    assert one_verdict_each(agent) == {"more A": "keep"} and len(far.records()) == 1


@pytest.mark.parametrize("restarts", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_a_worker_left_that_was_killed_before_there_was_a_remote_blocks_nobody(tmp_path, restarts):
    """Its claim on a run of the baseline, and the sign that it is there."""
    if not restarts and not machine():
        pytest.skip("this system does not name its boot, so a worker is gone for others after a quarter of an hour")
    agent = Proposer(tmp_path / "agent")
    dead, other = agent.worktree("w1"), agent.worktree("w2")
    dead.killed("run_slot")
    prefix, hub = names.queue_ref("gpus") + "/", agent.hub()
    assert len(base_git.refs(agent.path, prefix)) == 2
    agent.git("config", names.REMOTE, str(hub))
    tree = dead if restarts else other
    tree.work(most=10)
    assert sorted(r["header"]["seed"] for r in tree.records()) == [42, 43, 44]
    assert base_git.refs(agent.path, prefix) == base_git.refs(hub, prefix) == {}


@pytest.mark.parametrize("moved", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["by a look", "by the worker"])
def test_a_worker_takes_over_a_remote_that_is_configured_while_it_runs(agent, moved):
    """moved: who takes its claim to the remote: an agent that looks at the queue during the run, or nobody before the worker."""
    agent.proposed("more A", **KEEP)
    agent.proposed("worse B", B=-0.02)
    tree, hub = agent.worktree("w1"), agent.hub()
    (tree.path / ".lab").mkdir()
    with inside(tree), locks.hold(tree.path / ".lab" / "worker.lock"):
        worker = tree.worker()
        train = worker.train

        def during(seed, once=[1]):  # noqa: B006
            status = train(seed)
            if once:
                once.clear()
                agent.git("config", names.REMOTE, str(hub))
                assert not moved or [item.unpublished for item in agent.queue.running] == [False]
            return status

        worker.train = during
        worker.begin()
        while worker.step():
            pass
        assert [line for line in worker.said_all if "discarded" in line] == [] and worker.done == 2
        assert one_verdict_each(agent) == {"more A": "keep", "worse B": "discard"} and len(tree.records()) == 2
        prefix = names.queue_ref("gpus") + "/"
        assert base_git.refs(agent.path, prefix) == {} and len(base_git.refs(hub, prefix)) == 3, "two proposals and one worker"
        assert list(base_git.refs(hub, worker.member.refs + worker.member.name + "/")) == [worker.member.ref("w1")]
        agent.git("config", "--unset", names.REMOTE)
        agent.proposed("worse C", C=-0.02)
        while worker.step():
            pass
        assert agent.kinds() == {"worse C": "discard"} and worker.done == 3


@pytest.mark.parametrize("mended", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["mended", "unset"])
def test_a_remote_that_was_mistyped_while_a_worker_trains_is_mended_or_unset(agent, mended):
    agent.proposed("more A", **KEEP)
    tree, hub = agent.worktree("w1"), agent.hub()
    with inside(tree):
        worker = tree.worker()
        train, pauses = worker.train, []

        def during(seed):
            agent.git("config", names.REMOTE, str(hub) + "-mistyped")
            return train(seed)

        def pause(seconds):
            assert len(pauses) < 3, worker.said_all
            pauses.append(seconds)
            agent.git("config", *([names.REMOTE, str(hub)] if mended else ["--unset", names.REMOTE]))

        worker.train, worker.pause = during, pause
        worker.begin()
        while worker.step():
            pass
    assert pauses and worker.done == 1 and [line for line in worker.said_all if "discarded" in line] == []
    assert one_verdict_each(agent) == {"more A": "keep"} and len(tree.records()) == 1


def test_a_worker_whose_claim_was_not_answered_claims_no_other_proposal(agent):
    agent.proposed("worse A", A=-0.02)
    agent.proposed("worse B", B=-0.02)
    tree = agent.worktree("w1")
    with inside(tree):
        worker = tree.worker()
        worker.begin()
        swap = worker.board.swap

        def unanswered(changes, publish=False):
            swap(changes, publish)
            if agent.queue.of("claimed"):
                worker.board.swap = swap
                raise base_git.GitError(("push",), "no answer within 15 s")
            return True

        worker.board.swap = unanswered
        with pytest.raises(base_git.GitError):
            worker.step()
        assert agent.kinds() == {"worse A": "claimed", "worse B": "open"}
        assert worker.step() and agent.kinds() == {"worse A": "discard", "worse B": "open"}


@pytest.mark.parametrize("moment, kept", [("settle", 1), pytest.param("train", 0, marks=pytest.mark.slow)])
def test_a_worker_whose_remote_is_dead_goes_on_at_the_next_one(agent, moment, kept):
    """A record goes along; a run that was not recorded may be discarded."""
    hub, other = agent.hub(), agent.hub("other.git")
    agent.git("config", names.REMOTE, str(hub))
    agent.proposed("more A", **KEEP)
    tree = agent.worktree("w1")
    with inside(tree):
        worker = tree.worker()
        call, pauses = getattr(worker, moment), []

        def during(*args):
            if hub.exists():
                hub.rename(hub.with_name("dead.git"))
            return call(*args)

        def pause(seconds):
            assert len(pauses) < 3, worker.said_all
            pauses.append(seconds)
            agent.git("config", names.REMOTE, str(other))

        setattr(worker, moment, during)
        worker.pause = pause
        worker.begin()
        while worker.step():
            pass
        assert pauses and [r["description"] for r in tree.records()] == ["more A"] * kept
        assert len(base_git.refs(other, worker.member.refs + worker.member.name + "/")) == kept
        agent.proposed("worse B", B=-0.02)
        while worker.step():
            pass
    assert agent.kinds() == {"worse B": "discard"} and len(tree.records()) == kept + 1


def test_a_verdict_at_a_remote_that_was_moved_has_its_record_beside_it(agent):
    hub, moved = agent.hub(), agent.path.parent / "moved.git"
    agent.git("config", names.REMOTE, str(hub))
    agent.proposed("more A", **KEEP)
    tree = agent.worktree("w1")
    with inside(tree):
        worker = tree.worker()
        settle = worker.settle
        worker.settle = lambda *args: (hub.rename(moved), settle(*args))
        worker.pause = lambda seconds: agent.git("config", names.REMOTE, str(moved))
        worker.begin()
        assert worker.step()
        assert list(base_git.refs(moved, worker.member.refs + worker.member.name + "/")) == [worker.member.ref("w1")]
    assert agent.kinds() == {"more A": "keep"}


# --- reading ------------------------------------------------------------------


def test_a_state_that_git_could_not_read_is_read_again(agent, monkeypatch):
    agent.proposed("more A", **KEEP)
    with monkeypatch.context() as failing:
        failing.setattr(queue_refs, "objects", lambda *args: {})  # as of a git that ended in the middle
        queue = agent.queue
        assert not queue.items and "1 entries of the queue are not what lab writes" in queue.notes[0]
    assert agent.kinds() == {"more A": "open"} and not agent.queue.notes


def test_a_state_that_lab_would_not_write_is_left_out(agent):
    agent.proposed("more A", **KEEP)
    (item,) = agent.queue.items
    member, head = checks.member_of(agent.repo), item.state["experiment"]

    def put(id, state, parent=head):
        commit = queue_refs.written(agent.repo, state, parent)
        base_git.change_refs(agent.path, [(names.queue_ref(member.team, id), commit, None)])

    put("a1", {**item.state, "kind": "strange"})
    put("a2", {**item.state, "mean": float("inf")})
    put("a3", {**item.state, "seq": True})
    put("a4", {key: value for key, value in item.state.items() if key != "code"})
    put("a5", item.state, "HEAD^")  # the ref does not carry the experiment
    put("a6", {**item.state, "text": "x" * (queue_refs.LARGEST + 1)})
    put("a7", {**item.state, "description": "a\x1b[31m red\n‮line", "text": "one\x1b[2J\ntwo"})
    queue = agent.queue
    assert [item.id for item in queue.items] == sorted([item.id, "a7"], key=lambda id: id) and "6 entries" in queue.notes[0]
    odd = queue.find("a7").state
    assert odd["description"] == "a[31m red line" and odd["text"] == "one[2J\ntwo"


BEFORE = "".join(f"KNOB_{i} = {i}\n" for i in range(10))


@pytest.mark.parametrize("ours, theirs, merged", [
    ([("2", "20")], [("7", "70")], "0 1 20 3 4 5 6 70 8 9"),  # far apart
    ([("2", "20")], [("3", "30")], "0 1 20 30 4 5 6 7 8 9"),  # neighbours
    ([("2", "20"), ("4", "40")], [("3", "30")], "0 1 20 30 40 5 6 7 8 9"),
    ([("9", "90")], [("8", "80")], "0 1 2 3 4 5 6 7 80 90"),
    ([("2", "20")], [("2", "21")], None),  # the same
    ([("2", "20"), ("3", "30")], [("3", "31")], None),
    ([("2", "(20,")], [("3", "30")], None),  # no Python either way: a conflict shows it
])
def test_changes_of_the_same_line_conflict_and_those_of_neighbours_do_not(ours, theirs, merged):
    def edited(edits):
        text = BEFORE
        for old, new in edits:
            text = text.replace(f"KNOB_{old} = {old}\n", f"KNOB_{old} = {new}\n")
        return text.encode()

    found, conflict = merge(edited(ours), BEFORE.encode(), edited(theirs), ["a", "b", "c"])
    assert conflict == (merged is None) and (b"<<<<<<<" in found) == conflict
    if merged:
        assert [line.split(" = ")[1] for line in found.decode().splitlines()] == merged.split()


@pytest.mark.parametrize("ours, theirs", [
    ("KNOB_2 = 20\nNEW = 1\n", "KNOB_2 = 2\nNEW = 1\n"),  # the best has this idea and another: the line would be there twice
    ("KNOB_2 = 2\nNEW = 1\n", "KNOB_2 = 2\nOTHER = 1\n"),  # in which order?
    ("NEW = 1\nKNOB_2 = 2\n", "KNOB_2 = 20\n"),
    ("KNOB_2 = 20\n", ""),
])
def test_lines_that_were_added_or_removed_where_the_other_side_has_edits_conflict(ours, theirs):
    sides = [BEFORE.replace("KNOB_2 = 2\n", new).encode() for new in (ours, theirs)]
    for one, other in (sides, sides[::-1]):
        assert merge(one, BEFORE.encode(), other, ["a", "b", "c"])[1]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_neighbours_are_merged_whatever_ends_a_line_and_the_file(end):
    before = BEFORE.replace("\n", end).removesuffix(end).encode()
    ours, theirs = before.replace(b"8 = 8", b"8 = 80"), before.replace(b"9 = 9", b"9 = 90")
    merged, conflict = merge(ours, before, theirs, ["a", "b", "c"])
    assert not conflict and merged.removesuffix(end.encode()) == ours.replace(b"9 = 9", b"9 = 90")


def test_what_one_has_removed_and_the_other_changed_conflicts():
    without = BEFORE.replace("KNOB_2 = 2\nKNOB_3 = 3\n", "")
    found, conflict = merge(without.encode(), BEFORE.encode(), BEFORE.replace("3 = 3", "3 = 30").encode(), ["a", "b", "c"])
    assert conflict and b"<<<<<<< a\n" in found
    found, conflict = merge(without.encode(), BEFORE.encode(), BEFORE.replace("5 = 5", "5 = 50").encode(), ["a", "b", "c"])
    assert not conflict and found.decode() == without.replace("5 = 5", "5 = 50")


def test_decided_proposals_leave_the_queue_once_they_were_told_and_the_latest_stay(agent, monkeypatch):
    agent.proposed("handed back", A=0.01)
    (item,) = agent.queue.items
    repo = agent.repo
    board = Board(repo, checks.member_of(repo))

    def put(n, **changes):
        commit, _ = board.written(item.state, item.state["experiment"], seq=n + 2, **changes)
        assert board.swap([(names.queue_ref(board.member.team, f"{n:04d}"), commit, None)])

    for n in range(8):
        done = {"kind": "decided", "verdict": "discard", "mean": 1.0}
        put(n, description=f"idea {n}", member="0" * 12 if n == 1 else board.member.name, **done)
    commit, _ = board.written(item.state, item.state["experiment"], kind="returned", text="a conflict")
    assert board.swap([(item.ref, commit, item.commit)])
    monkeypatch.setattr(queue_refs, "KEPT", 3)
    with inside(agent):
        wait.run(argparse.Namespace(timeout=0.0))
    left = agent.kinds()
    assert list(left) == ["handed back", "idea 1", "idea 5", "idea 6", "idea 7"], "idea 1 is another member's"
    put(8, description="idea 8", member=board.member.name, **done)
    assert "idea 8" in waits(agent) and "nothing was decided" in waits(agent, "--timeout", "0")
    assert set(json.loads(agent.read(".lab/waited.json"))["told"]) == {item.id for item in agent.queue.items}
    assert agent.queue.next_seq == 11


@pytest.mark.slow
def test_wait_returns_as_soon_as_something_is_decided(agent):
    agent.proposed("more A", **KEEP)
    tree = agent.worktree("w1")
    with locks.hold(tree.path / ".lab" / "worker.lock"):
        with inside(tree):
            worker = tree.worker()
            worker.begin()
            worker.sign(worker.board.look())
            told = []
            thread = threading.Thread(target=lambda: told.append(agent.lab("wait", "--timeout", "100", timeout=PATIENCE)))
            thread.start()
            while worker.step():
                pass
            thread.join()
    assert told[0].rc == 0 and "keep: 0.98" in told[0].out, told
    remembered = json.loads(agent.read(".lab/waited.json"))
    assert list(remembered["told"]) == [agent.queue.items[0].id] and wait.told_before(agent.path / ".lab" / "waited.json")
