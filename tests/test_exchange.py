"""A look at the team, a claim, a record with its verdict: few git processes, and nothing less safe for it."""

import errno
import signal
import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fakequeue import Proposer, inside, scores

from lab.base import git as base_git
from lab.base.git import GitError, Objects
from lab.loop import checks, record
from lab.queue import propose, work
from lab.queue.board import Board
from lab.share import exchange, queue_refs
from lab.store import journal, names

MOST_GITS = 55  # that one proposal may start over a remote; 47 do
BLOB = 1 << 20


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A team whose baseline is measured, in the agent's own tree."""
    agent = Proposer(tmp_path_factory.mktemp("team") / "agent")
    agent.work()
    (agent.path / ".lab" / "worker.lock").unlink()
    return agent


@pytest.fixture
def agent(measured, tmp_path):
    return measured.copy(tmp_path / "agent")


@pytest.fixture
def apart(agent):
    """(the agent, a worker's clone, the bare repository that they share through)"""
    hub = agent.hub()
    far = agent.clone("far", hub)
    agent.publish()
    return agent, far, hub


def published(tree, hub):
    """{ref: commit} of what the remote has of the tree's records."""
    member = checks.member_of(tree.repo)
    return base_git.refs(hub, f"{member.refs}{member.name}/")


# --- pushes -------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True], ids=["a path", "a name"])
def test_a_push_writes_what_the_remote_has_taken_to_the_mirror(apart, named):
    agent, _, hub = apart
    if named:
        agent.git("remote", "add", "hub", str(hub))
        agent.git("config", "autoresearch.remote", "hub")
    repo, ref = agent.repo, names.queue_ref("gpus", "1")
    member, (new, old) = checks.member_of(repo), agent.git("rev-list", "-2", "HEAD").split()

    def mirror():
        return base_git.refs(agent.path, names.mirror_of(ref)).get(names.mirror_of(ref))

    assert exchange.swap(repo, member, [(ref, old, None)]) == "done" and mirror() == old
    assert exchange.swap(repo, member, [(ref, new, new)]) == "refused" and mirror() == old
    base_git.change_refs(agent.path, [(names.mirror_of(ref), None, old)])
    assert exchange.swap(repo, member, [(ref, old, None)]) == "same" and mirror() == old
    assert exchange.swap(repo, member, [(ref, new, old)]) == "done" and mirror() == new
    assert exchange.swap(repo, member, [(ref, None, new)]) == "done" and mirror() is None
    assert exchange.unpublished(repo, member) == 0 and not agent.git("config", "--get-regexp", "^remote[.]autoresearch", check=False)


def test_records_and_a_verdict_go_in_one_push_or_not_at_all(apart):
    agent, far, hub = apart
    repo, ref, own = far.repo, names.queue_ref("gpus", "1"), far.git("rev-parse", "HEAD")
    member, (new, old) = checks.member_of(repo), far.git("rev-list", "-2", "HEAD").split()
    mine = member.ref("far")
    far.git("update-ref", mine, own)
    assert exchange.swap(repo, member, [(ref, new, old)], publish=True) == "refused"
    assert base_git.refs(hub, mine, ref) == {}
    assert exchange.swap(repo, member, [(ref, old, None)], publish=True) == "done"
    assert base_git.refs(hub, mine, ref) == {mine: own, ref: old}
    assert exchange.swap(repo, member, [(ref, new, old)], publish=True) == "done", "the records are there already"
    assert exchange.swap(repo, member, [(ref, new, old)], publish=True) == "same"
    (hub / "hooks").mkdir(exist_ok=True)
    hook = hub / "hooks" / "update"
    hook.write_text(f'#!/bin/sh\ncase "$1" in {mine}) exit 1;; esac\n')
    hook.chmod(0o755)
    far.git("update-ref", mine, old)
    with pytest.raises(GitError):  # the records were refused, the claim is not lost
        exchange.swap(repo, member, [(ref, None, new)], publish=True)
    assert base_git.refs(hub, mine, ref) == {mine: own, ref: new}


@pytest.mark.slow
def test_what_was_recorded_is_published_if_the_claim_is_lost_meanwhile(apart):
    agent, far, hub = apart
    agent.proposed("more A", A=0.01)
    heir_tree = agent.clone("heir", hub)
    with inside(far):
        worker, before = far.worker(), []
        recorded, catch_up = worker.recorded, worker.catch_up
        worker.catch_up = lambda: (before.append(published(far, hub)), catch_up())

        def then_lost(*args):
            said = recorded(*args)
            heir = heir_tree.worker()
            heir.board.is_void = lambda item: True
            assert heir.claim(heir.free(heir.board.look())[0])
            return said

        worker.recorded = then_lost
        worker.begin()
        worker.step()
    assert any("taken this proposal over" in sentence for sentence in worker.said_all)
    assert before == [{}, {}], "nothing before it is known whether the other one has decided: at the start, and then"
    assert list(published(far, hub)) == [worker.member.ref("far")]
    heir_tree.work()
    (item,) = agent.queue.items
    assert item.state["verdict"] == "keep" and item.state["worker_branch"] == "heir"
    assert [r["description"] for r in agent.team.night.rows] == ["baseline", "more A"]


def test_a_baseline_is_published_though_its_claim_was_lost_meanwhile(apart):
    agent, far, hub = apart
    slot = "baseline-45", "baseline", "baseline"
    with inside(far):
        worker = far.worker()
        recorded = worker.recorded

        def then_lost(*args):
            said = recorded(*args)
            heir = agent.worker()
            heir.board.is_void = lambda item: True
            assert heir.slot(heir.board.look(), *slot)
            return said

        worker.recorded = then_lost
        worker.begin()
        worker.run_slot(worker.slot(worker.board.look(), *slot), agent.team.best["code"], "baseline", 45)
    assert list(published(far, hub)) == [worker.member.ref("far")] and len(far.records()) == 1
    assert [item.state["worker_branch"] for item in agent.queue.slots] == ["test"]


def test_a_record_that_was_interrupted_is_not_published_before_it_is_known_who_has_decided(apart, monkeypatch):
    agent, far, hub = apart
    agent.proposed("more A", A=0.01)
    with monkeypatch.context() as half:
        half.setattr(record, "steps", lambda repo: [lambda plan: (_ for _ in ()).throw(KeyboardInterrupt)])
        with inside(far), pytest.raises(KeyboardInterrupt):
            far.work()
    assert journal.pending(far.path)
    with inside(far):
        worker, before = far.worker(), []
        catch_up = worker.catch_up
        worker.catch_up = lambda: (before.append(published(far, hub)), catch_up())
        worker.begin()
    assert before == [{}] and list(published(far, hub)) == [worker.member.ref("far")]
    assert [r["verdict"] for r in far.records()] == ["keep"] and not journal.pending(far.path)


def test_a_record_that_is_tried_again_knows_what_the_team_has_done_meanwhile(apart, monkeypatch):
    agent, far, _ = apart
    agent.proposed("more A", A=0.01)
    recorded = record.recorded

    def full(*args, **kwargs):
        monkeypatch.setattr(record, "recorded", recorded)
        raise OSError(errno.ENOSPC, "No space left on device")

    with inside(far):
        worker = far.worker()
        worker.pause = lambda seconds: agent.experiment("no gain", 1.5)  # until there is room
        monkeypatch.setattr(record, "recorded", full)
        worker.begin()
        worker.step()
    assert worker.done == 1 and far.records()[-1]["seq"] == agent.records()[-1]["seq"] + 1


def test_what_another_process_of_the_checkout_has_fetched_is_not_forgotten(apart):
    """A board looks, another process fetches more, and then the remote is restored from a backup."""
    agent, far, hub = apart
    member, ref = checks.member_of(far.repo), checks.member_of(agent.repo).ref("test")
    board, old = Board(far.repo, member), base_git.refs(hub, ref)[ref]
    board.look(fresh=0)
    agent.experiment("no gain", 1.5)
    new = base_git.refs(hub, ref)[ref]
    assert new != old and exchange.fetch(far.repo, member) is None
    base_git.change_refs(hub, [(ref, old, new)])
    board.look(fresh=0)
    assert base_git.refs(far.path, member.mirror)[names.mirror_of(ref)] == new
    assert [r["description"] for r in far.team.night.rows] == ["baseline", "no gain"]


def test_a_ref_that_somebody_removes_on_the_remote_stops_no_worker(apart):
    agent, far, hub = apart
    agent.proposed("more A", A=0.01)
    assert exchange.fetch(far.repo, checks.member_of(far.repo)) is None
    base_git.change_refs(hub, [(ref, None, at) for ref, at in base_git.refs(hub, checks.member_of(agent.repo).ref("test")).items()])
    assert exchange.fetch(far.repo, checks.member_of(far.repo)).startswith(exchange.REWRITTEN)
    assert far.work().done == 1 and agent.kinds() == {"more A": "keep"}


def test_a_proposal_whose_push_was_not_answered_does_not_come_back_once_it_is_removed(apart):
    agent, far, hub = apart
    agent.proposed("more A", A=0.01)
    (item,) = agent.queue.items
    base_git.change_refs(agent.path, [(item.ref, item.commit, None)])  # as a propose leaves it that was killed after its push
    far.work()
    (item,) = agent.queue.items
    assert item.kind == "decided" and base_git.refs(agent.path, item.ref) == {}
    assert exchange.swap(agent.repo, checks.member_of(agent.repo), [(item.ref, None, item.commit)]) == "done"
    assert agent.queue.items == () and base_git.refs(hub, item.ref) == {}


def test_a_proposal_that_the_remote_refuses_stays_here_until_the_remote_has_it(apart, monkeypatch):
    agent, _, hub = apart
    agent.idea("more A", A=0.01)
    with monkeypatch.context() as refusing, inside(agent):
        refusing.setattr(exchange, "swap", lambda *args, **kwargs: "refused")
        assert propose.run(Namespace(description="more A", simpler=False)) == 0
        (item,) = agent.queue.items
        assert item.unpublished and base_git.refs(hub, item.ref) == {}
    (item,) = agent.queue.items
    assert not item.unpublished and base_git.refs(hub, item.ref) == {item.ref: item.commit}


@pytest.mark.slow
@pytest.mark.parametrize("expired", [False, True], ids=["decided", "decided, told and removed"])
def test_a_worker_that_returns_before_the_remote_does_leaves_the_verdict_to_the_other(apart, expired):
    agent, far, hub = apart
    heir_tree = agent.clone("heir", hub)
    agent.proposed("more A", A=0.01)
    far.killed("settle")
    assert far.records()[-1]["verdict"] == "keep"
    with inside(heir_tree):
        heir = heir_tree.worker()
        heir.board.is_void = lambda item: True
        scores(heir, 1.2)
        heir.begin()
        heir.step()
    assert agent.kinds() == {"more A": "discard"}
    if expired:
        (item,) = agent.queue.items
        assert exchange.swap(agent.repo, checks.member_of(agent.repo), [(item.ref, None, item.commit)]) == "done"
    hub.rename(hub.with_name("away"))
    with inside(far):
        worker = far.worker()
        worker.begin()
        assert worker.behind and "lost" not in far.records()[-1]
        hub.with_name("away").rename(hub)
        worker.step()
    assert not worker.behind and far.records()[-1]["lost"]
    for tree in (agent, far, heir_tree):
        assert tree.queue.notes == () and [(r["description"], r["verdict"]) for r in tree.team.night.rows[1:]] == [("more A", "discard")]


def test_a_push_that_takes_too_long_leaves_no_lock_in_a_remote_that_is_a_folder(apart, monkeypatch):
    """The remote's git runs on this machine then, and ends with the push: here while it waits for a hook."""
    agent, _, hub = apart
    repo, ref = agent.repo, names.queue_ref("gpus", "1")
    hook, at, communicate = hub / "hooks" / "reference-transaction", hub / "at", subprocess.Popen.communicate
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f'#!/bin/sh\n[ "$1" = prepared ] && touch {at} && exec sleep 600\nexit 0\n')
    hook.chmod(0o755)

    def late(process, input=None, timeout=None):
        if "push" in process.args and not at.exists():
            deadline = time.monotonic() + 100
            while not at.exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            assert (hub / f"{ref}.lock").exists()
            raise subprocess.TimeoutExpired(process.args, timeout)
        return communicate(process, input, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", late)
    with pytest.raises(GitError, match="no answer within 15 s"):
        exchange.swap(repo, checks.member_of(repo), [(ref, agent.git("rev-parse", "HEAD"), None)])
    assert not [*hub.rglob("*.lock")] and base_git.refs(hub, ref) == {}
    hook.unlink()
    assert exchange.swap(repo, checks.member_of(repo), [(ref, agent.git("rev-parse", "HEAD"), None)]) == "done"


def test_a_lock_that_a_killed_git_left_in_the_remote_keeps_one_proposal_waiting_and_not_for_ever(apart, monkeypatch):
    agent, far, hub = apart
    agent.proposed("more A", A=0.01)
    agent.proposed("worse B", B=-0.02)
    lock = hub / f"{agent.queue.items[0].ref}.lock"
    lock.touch()
    with inside(far):
        worker = far.worker()
        worker.pause = lambda seconds: pytest.fail("it is tried again and again, and nothing else is")
        worker.begin()
        assert worker.step() and agent.kinds() == {"more A": "open", "worse B": "discard"}
        with pytest.raises(GitError, match="File exists"):
            worker.step()
        assert lock.exists(), "another git may hold it for so long"
        monkeypatch.setattr(exchange, "STALE_LOCK", -1)
        with subprocess.Popen(["git", "cat-file", "--batch"], cwd=hub, stdin=subprocess.PIPE) as running:
            with pytest.raises(GitError, match="File exists"):
                worker.step()
            assert lock.exists()
            running.stdin.close()
        assert worker.step() and not lock.exists()
    assert agent.kinds() == {"more A": "keep", "worse B": "discard"}


def test_no_lock_is_removed_that_is_not_in_the_remotes_folder(apart, monkeypatch, tmp_path):
    """The remote names it in its message."""
    agent, _, hub = apart
    monkeypatch.setattr(exchange, "STALE_LOCK", -1)
    own, other = hub / "refs" / "x.lock", tmp_path / "x.lock"
    for lock in (own, other, hub / ".." / "x.lock"):
        lock.touch()
        for _ in range(2):
            exchange.unlock(agent.repo, str(hub), f"Unable to create '{lock}': File exists.")
    assert not own.exists() and other.exists()
    exchange.unlock(agent.repo, "ssh://example.org/x.git", f"Unable to create '{other}': File exists.")
    assert other.exists()


@pytest.mark.parametrize("lost", ["answer", "push"])
def test_a_verdict_that_the_remote_did_not_answer_survives_a_worker_that_is_stopped(apart, lost, monkeypatch):
    """The remote answers again when the worker puts its claim back: it may have the verdict, or the claim as it was."""
    agent, far, hub = apart
    agent.proposed("more A", A=0.01)
    push = exchange.push
    with inside(far):
        worker, tries = far.worker(), []
        settle = worker.settle

        def unanswered(*args, **kwargs):
            tries.append(1)
            if lost == "answer":
                push(*args, **kwargs)
            if len(tries) == 3:
                worker.stopped_by = signal.SIGTERM
                monkeypatch.setattr(exchange, "push", push)
            raise GitError(("push",), "no answer within 15 s")

        worker.settle = lambda *args: (monkeypatch.setattr(exchange, "push", unanswered), settle(*args))
        worker.begin()
        with pytest.raises(work.Stopped):
            worker.step()
    assert len(tries) == 3 and [item.kind for item in agent.queue.items] == ["decided" if lost == "answer" else "open"]
    assert list(published(far, hub)) == [worker.member.ref("far")], "for whoever takes the proposal"
    assert agent.worktree("w1").work().done == (lost == "push")
    (item,) = agent.queue.items
    assert (item.kind, item.state["verdict"], item.state["commit"]) == ("decided", "keep", far.records()[-1]["commit"])
    assert [r["description"] for r in agent.team.night.records[3:]] == ["more A"], "it does not run again"


# --- a worker -----------------------------------------------------------------


def test_a_proposal_over_a_remote_starts_few_gits(apart):
    agent, far, _ = apart
    for i in range(2):
        agent.proposed(f"worse {i}", A=-0.02 - i / 100)
    started = []
    sys.addaudithook(lambda event, args: event == "subprocess.Popen" and started.append(list(map(str, args[1]))))
    with inside(far):
        worker = far.worker()
        worker.begin()
        assert worker.step()
        started.clear()
        assert worker.step()
    gits = [command for command in started if command[0] == "git"]
    assert worker.done == 2 and len(gits) <= MOST_GITS, "\n".join(" ".join(command)[:160] for command in gits)
    assert sum("push" in command for command in gits) == 2, "one claims, one has the record and the verdict"


def test_a_claim_is_held_while_others_see_it_and_nobody_may_think_it_void(agent):
    agent.proposed("more A", A=0.01)
    first, second = agent.worktree("w1").worker(), agent.worktree("w2").worker()
    item = first.claim(first.board.look().items[0])
    assert first.is_held(item) and not first.is_held(item._replace(commit=item.state["experiment"]))
    clock, first.now = first.now, lambda: clock() + work.LONGEST - work.RECORD_SECONDS
    assert not first.is_held(item), "so old that it is renewed first"
    first.now = clock
    assert first.is_held(item)
    assert second.claim(second.board.look().items[0]) and not first.is_held(item)


def test_many_workers_begin_with_different_proposals_and_few_with_the_oldest(agent):
    worker = agent.worker()
    items = [SimpleNamespace(id=i, kind="open", state={"failed": []}) for i in range(40)]
    worker.free = lambda queue, late: list(items)
    alone, many = (SimpleNamespace(workers=range(n), running=[]) for n in (1, 40))
    assert [item.id for item in worker.next(alone)] == list(range(40))
    tries = [[item.id for item in worker.next(many)] for _ in range(20)]
    assert len({order[0] for order in tries}) > 5 and all(order[21:] == list(range(21, 40)) for order in tries)
    assert all(sorted(order) == list(range(40)) for order in tries)
    items[3].state["failed"] = ["test: it failed here"]
    assert [item.id for item in worker.next(many)] == list(range(40)), "what failed here stays last"


# --- reading ------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [True, False])
def test_objects_are_read_by_one_git_and_those_that_cannot_be_are_left_out(agent, trusted):
    small = [agent.git("hash-object", "-w", "--stdin", stdin=f"file {i}") for i in range(250)]
    large = agent.git("hash-object", "-w", "--stdin", stdin="x" * (3 << 20))
    medium = agent.git("hash-object", "-w", "--stdin", stdin="x" * 5000)
    broken = agent.git("hash-object", "-w", "--stdin", stdin="to be damaged")
    path = agent.path / ".git" / "objects" / broken[:2] / broken[2:]
    path.chmod(0o600)
    path.write_bytes(b"no object")
    wanted = [*small[:100], large, "HEAD:none", broken, medium, "HEAD", "0" * 40, *small[100:], "HEAD:train.py"]
    with Objects(agent.path, trusted=trusted) as objects:
        found = objects.read(wanted, 4000, "blob")
        assert found.keys() == {*small, "HEAD:train.py"}
        assert found[small[249]] == (small[249], b"file 249")
        assert found["HEAD:train.py"] == (agent.git("rev-parse", "HEAD:train.py"), (agent.path / "train.py").read_bytes())
        assert list(objects.read(["HEAD", "HEAD:train.py"], BLOB, "commit")) == ["HEAD"]
    assert objects.process is None
    with pytest.raises(GitError), Objects(agent.path.parent, trusted=trusted) as objects:
        objects.read(small, BLOB, "blob")


def test_a_look_reads_only_what_is_new(apart, monkeypatch):
    agent, far, _ = apart
    assert exchange.fetch(far.repo, checks.member_of(far.repo)) is None
    assert len(far.team.night.records) == 3
    agent.experiment("no gain", 1.5)
    asked, read = [], Objects.read
    monkeypatch.setattr(Objects, "read", lambda self, wanted, *args: (asked.extend(wanted), read(self, wanted, *args))[1])
    assert exchange.fetch(far.repo, checks.member_of(far.repo)) is None
    assert len(far.team.night.records) == 4
    records = {line.split()[2] for line in agent.git("ls-tree", "-r", "refs/autoresearch/test/log").splitlines()}
    assert len(records & set(asked)) == 1


def test_the_refs_of_a_large_queue_are_packed(apart, monkeypatch):
    agent, far, _ = apart
    monkeypatch.setattr(exchange, "LOOSE", 2)
    for i in range(3):
        agent.proposed(f"worse {i}", A=-0.02 - i / 100)
    assert exchange.fetch(far.repo, checks.member_of(far.repo)) is None
    folder = far.path / ".git" / names.MIRROR_REFS / "gpus" / names.QUEUE
    assert not folder.is_dir() or not list(folder.iterdir())
    assert len(queue_refs.read(far.repo, checks.member_of(far.repo)).items) == 3
