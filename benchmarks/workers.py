"""What a queue costs: experiments an hour and idle time of one and two workers, and many workers on one remote.

    uv run benchmarks/workers.py                     one worker and then two, made-up trainings of 20 s that only sleep
    uv run benchmarks/workers.py --real              the same with train.py on `stdlib`, a budget of 20 s and one thread each
    uv run benchmarks/workers.py --many 64           64 workers, each in a clone of its own, on one bare remote

Workers are `lab work` as a user starts it; each is pinned to a core where there are enough. Made-up trainings sleep, so that
what is measured is everything else: claiming, merging, recording, publishing. Real ones show what two cores are worth, which
share caches and memory. Prints experiments an hour, the idle share of a worker (of the time between its first and last
training, that in which no training process runs), the seconds that publishing a record with its verdict takes (median, 95th
percentile, largest), the CPU seconds of that and of all that a proposal costs (the start of its made-up training included),
and whether a proposal was decided twice or lost. Many workers start one after the other. Appends a line to
benchmarks/results.jsonl.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import common

sys.path[:0] = [str(common.ROOT), str(common.ROOT / "tests")]
from fakequeue import Proposer  # noqa: E402

# `lab work` that writes down the begin and end of each training and, for each proposal: the seconds that publishing its record
# and verdict took, the CPU seconds of that, and the CPU seconds of worker, git and trainings so far. And which claims another
# worker was faster with.
TIMED = """
import resource, sys, time
from lab.queue.work import Worker
from lab.share import exchange
def cpu():
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)
publish, settle, claim, train, spent = exchange.publish, Worker.settle, Worker.claim, Worker.train, [0.0, 0.0]
def trained(*args):
    began = time.time()
    try:
        return train(*args)
    finally:
        with open(".lab/trained", "a") as f:
            f.write(f"{began} {time.time()}\\n")
def timed(call, *args, **options):
    began, before = time.monotonic(), cpu()
    try:
        return call(*args, **options)
    finally:
        spent[:] = spent[0] + time.monotonic() - began, spent[1] + cpu() - before
def settled(*args):
    timed(settle, *args)
    with open(".lab/published", "a") as f:
        f.write(f"{spent[0]:.3f} {spent[1]:.3f} {cpu():.3f}\\n")
    spent[:] = 0.0, 0.0
def claimed(*args, **options):
    item = claim(*args, **options)
    with open(".lab/claims", "a") as f:
        f.write(f"{int(item is None)}\\n")
    return item
exchange.publish = lambda *args, **options: timed(publish, *args, **options)
Worker.settle, Worker.claim, Worker.train = settled, claimed, trained
from lab.__main__ import main
sys.exit(main(["work", "--no-sandbox", "--hours", "5"]))
"""


STARTS = 2  # trainings over which the starts of many workers are spread: a start costs more CPU than a proposal


def start(tree, core):
    pinned = ["taskset", "-c", str(core)] if core is not None and shutil.which("taskset") else []
    log = open(tree.path / ".lab-worker.log", "w")  # noqa: SIM115
    return subprocess.Popen([*pinned, sys.executable, "-c", TIMED], cwd=tree.path, env=tree.env, stdout=log, stderr=log)


def spans(tree):
    """[(start, end)] of the trainings that a tree recorded, in seconds since 1970."""
    found = [(r["start"], r["end"]) for r in tree.records()]
    return sorted(tuple(datetime.fromisoformat(when).timestamp() for when in pair) for pair in found)


def trainings(tree):
    """[(start, end)] of the training processes that a tree's worker started, in seconds since 1970."""
    return [tuple(map(float, line.split())) for line in tree.read(".lab/trained").splitlines()]


def idle_share(trees):
    """Of the time from a worker's first to its last training, the share in which none ran; the worst of them."""
    shares = []
    for tree in trees:
        runs = trainings(tree)
        shares.append(1 - sum(end - begin for begin, end in runs) / (runs[-1][1] - runs[0][0]) if runs else 0.0)
    return max(shares)


class RealProposer(Proposer):
    """A working tree of a copy of this code, with a budget of `seconds`; its experiments learn nothing, so the best stays."""

    def __init__(self, path, cache, seconds):
        self.path, self.ideas, self.constants = path, 0, {}
        self.who = ["-c", "user.name=Some One", "-c", "user.email=one@example.org"]
        self.env = os.environ | {
            "AUTORESEARCH_DATASET": "stdlib", "AUTORESEARCH_CACHE": str(cache), "AUTORESEARCH_NO_SAMPLE": "1", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        path.mkdir()
        common.copy_code(path)
        for name in ("train.py", "program.md", "pyproject.toml", ".gitignore"):
            shutil.copy(common.ROOT / name, path / name)
        shutil.copytree(common.ROOT / "lab", path / "lab", ignore=shutil.ignore_patterns("__pycache__"))
        rules, n = re.subn(r"^TIME_BUDGET = \S+", f"TIME_BUDGET = {seconds:g}", (path / "constants.py").read_text(), flags=re.MULTILINE)
        assert n == 1
        (path / "constants.py").write_text(rules)
        self.text = (path / "train.py").read_text()
        for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "start"], ["switch", "-q", "-c", "autoresearch/test"]):
            self.git(*command)
        self.git("config", "autoresearch.team", "gpus")
        self.start = self.head()

    def edit(self, A=0.0, B=0.0):
        """Another learning rate for each B, far below what learns."""
        text, n = re.subn(r"^EMBEDDING_LR = \S+", f"EMBEDDING_LR = {1e-6 - B / 1000:.9f}", self.text, flags=re.MULTILINE)
        assert n == 1
        (self.path / "train.py").write_text(text)


def with_baseline(place, seconds):
    """The RealProposer of a team whose baseline is measured, which fills the compile cache, too."""
    agent = RealProposer(place / "agent", place / "cache", seconds)
    subprocess.run([sys.executable, "prepare.py"], cwd=agent.path, env=agent.env, check=True, stdout=subprocess.DEVNULL)
    baseline = agent.worktree("baseline")
    process = start(baseline, min(cores(), default=None))
    while len(baseline.records()) < 3:
        time.sleep(1.0)
        assert process.poll() is None, (baseline.path / ".lab-worker.log").read_text()
    stop([process])
    agent.git("worktree", "remove", "--force", str(baseline.path))
    return agent


def cores():
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def stop(processes):
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def propose(agent, count, rng):
    """Fills the queue with experiments that are all a little worse, so that the best does not change meanwhile."""
    seconds, before = {}, len(agent.queue.items)
    for i in range(before, before + count):
        agent.idea(f"idea {i}", A=-0.02 - rng.random() / 10, B=-0.001 * i)
        began = time.monotonic()
        result = agent.lab("propose", f"idea {i}")
        assert result.rc == 0, result.err
        seconds[agent.queue.items[-1].id] = time.monotonic() - began
    return seconds


def made_up(place, seconds):
    """A Proposer whose trainings sleep, with a baseline."""
    agent = Proposer(place / "agent", SECONDS=seconds)
    agent.constants["SECONDS"] = 0.0
    agent.edit()
    agent.git("switch", "-q", "main")
    quick = agent.commit("a baseline that takes no time")
    agent.git("switch", "-q", "-C", "autoresearch/test", "main")
    agent.start = quick
    agent.work()  # the baseline
    agent.constants["SECONDS"] = seconds
    return agent


def measure(agent, workers, proposals, seconds, remote=False):
    """Runs `workers` workers until the queue is empty; what was measured."""
    rng = random.Random(1)
    if remote:
        hub = agent.hub()
        trees = [agent.clone(f"w{i}", hub) for i in range(workers)]
        agent.publish()
    else:
        trees = [agent.worktree(f"w{workers}-{i}") for i in range(workers)]
    proposing = propose(agent, proposals, rng)
    known, pinned = {item.id for item in agent.queue.items} - proposing.keys(), cores()
    began = time.monotonic()
    processes = []
    for i, tree in enumerate(trees):  # many start one after the other, as their trainings would not end at the same moment
        time.sleep(max(0.0, began + i * STARTS * seconds / workers - time.monotonic()) if remote else 0.0)
        processes.append(start(tree, pinned[i] if workers <= len(pinned) else None))
    while any(item.kind in ("open", "claimed") for item in agent.queue.items):
        time.sleep(2.0 if remote else 1.0)
        died = [i for i, process in enumerate(processes) if process.poll() is not None]
        assert not died, (trees[died[0]].path / ".lab-worker.log").read_text()
    took = time.monotonic() - began
    stop(processes)
    items = [item for item in agent.queue.items if item.id not in known]
    decided = [item.state["description"] for item in items if item.kind == "decided"]
    rows = [r["code"] for tree in trees for r in tree.records() if r["row"]]
    written = [[[float(number) for number in line.split()] for line in tree.read(".lab/published").splitlines()] for tree in trees]
    cycles = [after[2] - before[2] for lines in written for before, after in zip(lines, lines[1:], strict=False)]
    lost_claims = sum(tree.read(".lab/claims").split().count("1") for tree in trees)
    runs = [span for tree in trees for span in spans(tree)]
    whole = max(end for _, end in runs) - min(begin for begin, _ in runs)
    return {
        "workers": workers, "proposals": proposals, "training_seconds": seconds, "remote": remote, "seconds": round(took, 1),
        "experiments_an_hour": round(3600 * len(runs) / whole, 1), "idle_share": round(idle_share(trees), 4),
        "decided": len(decided), "lost": proposals - len(items), "decided_twice": len(rows) - len(set(rows)),
        "handed_back": sum(item.kind == "returned" for item in items),
        "propose_seconds": [round(q, 3) for q in quantiles(proposing.values())],
        "publish_seconds": [round(q, 3) for q in quantiles([line[0] for lines in written for line in lines])],
        "publish_cpu_seconds": [round(q, 3) for q in quantiles([line[1] for lines in written for line in lines])],
        "proposal_cpu_seconds": [round(q, 3) for q in quantiles(cycles)],
        "claims_lost": lost_claims, "load": [round(number, 1) for number in os.getloadavg()[:2]],
    }  # fmt: skip


def quantiles(values):
    """Median, 95th percentile, largest."""
    ordered = sorted(values)
    return [statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], ordered[-1]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--many", type=int, metavar="N", help="N workers on one remote, instead of one and two")
    parser.add_argument("--real", action="store_true", help="real trainings, of train.py")
    parser.add_argument("--seconds", type=float, default=20, help="of a training (20); with --real its budget")
    parser.add_argument("--each", type=int, default=6, help="proposals for each worker (6)")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        real = with_baseline(Path(folder), args.seconds) if args.real else None
        for workers in [args.many] if args.many else [1, 2]:
            place = Path(folder, str(workers))
            agent = real or made_up(place, args.seconds)
            result = measure(agent, workers, args.each * workers, args.seconds, remote=bool(args.many)) | {"real": args.real}
            print(json.dumps(result, indent=1), flush=True)
            found.append(result)
    if not args.many:
        ratio = found[1]["experiments_an_hour"] / found[0]["experiments_an_hour"]
        print(f"two workers make {ratio:.2f} times as many experiments an hour as one")
    common.record("workers", {"runs": found})


if __name__ == "__main__":
    main()
