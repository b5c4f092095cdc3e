"""kill -9 of workers, proposers and git at random moments: no row is lost or doubled, and every proposal ends with exactly
one verdict or is handed back."""

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from fakequeue import Proposer

PROPOSALS, WORKER_KILLS, PROPOSER_KILLS, GIT_KILLS = 30, 80, 20, 20
PATIENCE = 900  # seconds for what is over in two minutes on an idle machine


def lab(tree, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "lab", *args], cwd=tree.path, env=tree.env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def kill_worker(tree, rng):
    """Starts a worker and kills it, and sometimes a git of its before that. How many gits were killed."""
    process, gits = lab(tree, "work", "--no-sandbox"), 0
    until = time.monotonic() + rng.uniform(0.3, 5.0)
    wants_git = rng.random() < 0.7
    while time.monotonic() < until and process.poll() is None:
        if wants_git and not gits:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children():
                    if child.name() == "git":
                        child.kill()
                        gits += 1
        time.sleep(0.005)
    ended = process.poll()
    process.kill()
    out, _ = process.communicate()
    # Nothing that a kill leaves behind may end a worker; the kill of a git before its first line does, with status 3.
    assert ended is None or ended == 3 and gits and "was killed" in out, out
    return gits


def propose(agent, description, rng, kills):
    """Proposes, killed up to `kills` times on the way."""
    for attempt in range(kills + 1):
        process = lab(agent, "propose", description)
        if attempt < kills:
            time.sleep(rng.uniform(0.0, 1.2))
            process.kill()
        out, _ = process.communicate(timeout=PATIENCE)
        if process.returncode == 0:
            return
        if process.returncode > 0:  # not killed: an earlier call has queued it, and may have moved the branch, too
            assert "recorded already" in out or "runs already" in out or "too: commit the experiment" in out, out
            assert description in [item.state["description"] for item in agent.queue.items]
            agent.git("reset", "-q", "--keep", "main")
            return


def check(agent):
    queue, descriptions = agent.queue, [f"idea {i}" for i in range(PROPOSALS)]
    assert sorted(item.state["description"] for item in queue.items) == sorted(descriptions)
    assert all(item.kind in ("decided", "returned") for item in queue.items), agent.kinds()
    rows = [r["code"] for r in agent.team.night.rows]
    assert len(rows) == len(set(rows))
    runs = [r["run_id"] for tree in agent.team.trees for r in tree.records]
    assert len(runs) == len(set(runs))
    for item in queue.of("decided"):
        decided = [r for r in agent.team.night.rows if r["description"] == item.state["description"]]
        assert decided and decided[-1]["verdict"] == item.state["verdict"] or decided[0].get("late"), item
    assert agent.git("fsck", "--strict").count("error") == 0


def check_tree(tree):
    """Rows, records, archives and refs of a worker's tree agree, and nothing is half written."""
    tag = tree.git("branch", "--show-current").removeprefix("autoresearch/")
    rows, numbered = tree.rows(), [r for r in tree.records() if r["row"]]
    assert sorted(r["row"] for r in numbered) == list(range(1, len(rows) + 1))
    refs = dict(line.split() for line in tree.git("for-each-ref", "--format=%(refname:lstrip=3) %(objectname)", f"refs/autoresearch/{tag}").splitlines())
    refs.pop("log")
    assert refs == {f"{r['row']:04d}": r["commit"] for r in numbered}
    assert tree.records_in_git() == tree.records()
    kept = {f"{r['row']:04d}-{r['short']}" for r in numbered if r["verdict"] == "keep" or r.get("given_up")}
    assert set(tree.archives()) == kept
    assert not (tree.path / ".lab" / "journal.json").exists() and not list((tree.path / ".lab").glob("*.tmp"))
    assert tree.git("status", "--porcelain", "--untracked-files=no") == ""


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True], ids=["one checkout", "over a remote"])
def test_kills_at_random_moments_lose_and_double_nothing(tmp_path, remote):
    agent = Proposer(tmp_path / "agent", SECONDS=0.3)
    if remote:
        hub = agent.hub()
        trees = [agent.clone(f"w{i}", hub) for i in range(3)]
    else:
        trees = [agent.worktree(f"w{i}") for i in range(3)]
    gits, errors, deadline = [], [], time.monotonic() + PATIENCE

    def kills(tree, seed):
        rng = random.Random(seed)
        try:
            rounds = WORKER_KILLS // len(trees) + 1
            for i in range(3 * rounds):  # a busy machine may need more of them to meet enough gits
                if i >= rounds and sum(gits) >= GIT_KILLS:
                    break
                gits.append(kill_worker(tree, rng))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=kills, args=(tree, i)) for i, tree in enumerate(trees)]
    for thread in threads:
        thread.start()
    rng = random.Random(99)
    for i in range(PROPOSALS):  # most are worse, so that the best, and with it conflicts, change seldom
        knob, value = [("A", -0.01 * i), ("B", 0.03 if i == 7 else -0.01 * i), ("C", -0.02 * i)][i % 3]
        agent.edit(**{knob: value or -0.5})
        agent.commit(f"idea {i}")
        propose(agent, f"idea {i}", rng, kills=i * PROPOSER_KILLS // PROPOSALS - (i - 1) * PROPOSER_KILLS // PROPOSALS if i else 1)
    for thread in threads:
        thread.join(PATIENCE)
    assert not errors, errors
    assert sum(gits) >= GIT_KILLS
    last = [lab(tree, "work", "--no-sandbox") for tree in trees]
    try:
        while any(item.kind in ("open", "claimed") for item in agent.queue.items):
            assert time.monotonic() < deadline, agent.kinds()
            time.sleep(1)
    finally:
        for process in last:
            process.send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=PATIENCE)[0] for process in last]
    assert {process.returncode for process in last} <= {143, -signal.SIGTERM}, said  # or it had not begun yet
    check(agent)
    for tree in trees:
        check_tree(tree)
