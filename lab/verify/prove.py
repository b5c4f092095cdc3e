"""Checks the night's result: retrains the baseline and the best alternately under fresh seeds, and compares them.

    uv run -m lab prove                          baseline and best of this branch, three seeds each
    uv run -m lab prove 1a2b3c4 5d6e7f8 --seeds 5
    uv run -m lab prove 1a2b3c4                  one commit: how noisy is it?
    uv run -m lab prove A B --tree ../other      commits of several working trees

Every round trains each commit once under the same new seed. Every other round reverses the order, so that a machine
that slows down affects all commits equally. Writes .lab/prove/ID/ and proof.txt; branch, results.tsv and runs.jsonl do
not change. If it is stopped, the same command resumes. docs/proof.md says how to read the table.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from lab.analysis import intervals
from lab.base import files, locks, processes
from lab.base.errors import Again, Refused, Unfinished
from lab.store import ends, names, rules, run_log
from lab.store.repository import Repo
from lab.verify import commits, comparison, scoring

HELP = "retrain baseline and best under fresh seeds, and compare them"
FEWEST = 3  # seeds: with two, Welch's 95 % interval of a gain is at least 1.9 times as wide (t is 4.3, not 2.8)
FIRST_SEED = 1000  # far above the seeds that a night uses
MARK = "AUTORESEARCH_PROOF"  # environment variable of every process that a proof starts: the proof's folder


def add_arguments(parser):
    parser.description = (
        "Trains the named commits (by default the baseline and the best of this branch) in turn, under seeds that were "
        "never used, scores them on val and on the holdout, and prints means, noise and gains with 95 % intervals."
    )
    parser.epilog = "exit status: 0 done; 1 refused; 3 stopped half-way, the same command resumes; 75 it was terminated"
    parser.add_argument("commits", metavar="COMMIT", nargs="*", help="the others are compared with the first")
    parser.add_argument("--seeds", type=int, default=FEWEST, help=f"runs of each commit, at least {FEWEST} ({FEWEST})")
    parser.add_argument("--tree", action="append", default=[], metavar="PATH", help="another tree to find commits in")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run and how long it takes")


class Proof:
    """One comparison: its folder, its seeds, its runs so far."""

    def __init__(self, top, found, used, seeds, clocks=("monotonic",)):
        self.top, self.arms, self.clocks = top, found, clocks
        environ = os.environ.get(commits.DATASET)
        arms = [(arm.code, sorted(arm.rules.items()), arm.dataset.get(commits.DATASET, environ)) for arm in found]
        name = hashlib.sha256(repr(arms).encode()).hexdigest()[:8]
        self.place = top / names.LAB / names.PROVE / name
        plan = self.read("plan.json")
        first = json.loads(plan)["first_seed"] if plan else max({FIRST_SEED - 1, *used}) + 1
        self.first_seed = first
        self.seeds = range(first, first + seeds)
        self.runs = [json.loads(line) for line in self.read(names.RUNS_JSONL).splitlines()]

    def read(self, name):
        path = self.place / name
        return path.read_text() if path.is_file() else ""

    def done(self, arm, seed):
        return any(r["code"] == arm.code and r["seed"] == seed for r in self.runs)

    def todo(self):
        """The remaining [(arm, seed)], round by round; every other round goes from the last arm to the first."""
        rounds = [(self.arms if i % 2 == 0 else self.arms[::-1], seed) for i, seed in enumerate(self.seeds)]
        return [(arm, seed) for order, seed in rounds for arm in order if not self.done(arm, seed)]

    def minutes(self):
        """Estimated from recorded runs of these commits; None if there are none."""
        known = [arm.seconds for arm in self.arms if arm.seconds]
        usual = sum(known) / len(known) if known else None
        return usual and sum(arm.seconds or usual for arm, _ in self.todo()) / 60

    def add(self, run):
        self.runs.append(run)
        ends.forget(self.place)
        lines = [json.dumps(r, ensure_ascii=False) for r in self.runs]
        files.write(self.place / names.RUNS_JSONL, "".join(f"{line}\n" for line in lines))

    def train(self, arm, seed):
        """Trains once, scores the result and adds it to the runs; a crash is a run without values."""
        folder = commits.check_out(arm, self.place)
        with open(folder / names.RUN_LOG, "w") as log:
            training = subprocess.Popen(
                [sys.executable, names.TRAIN], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
                env=os.environ | arm.dataset | {"AUTORESEARCH_SEED": str(seed), MARK: str(self.place)},
            )  # fmt: skip
            try:
                training.wait()
            finally:
                if training.poll() is None:
                    processes.send(signal.SIGKILL, [*processes.descendants(training.pid), training.pid])
                    training.wait()
        left = [name for name in (names.RUN_LOG, names.CHECKPOINT) if (folder / name).is_file()]
        for name in left:
            os.replace(folder / name, self.place / name)
        commits.check_out(arm, self.place)  # scored by the commit's prepare.py, even if the training changed its copy
        for name in left:
            os.replace(self.place / name, folder / name)
        try:
            self.judge(arm, seed, folder)
        finally:
            os.replace(folder / names.RUN_LOG, self.place / f"{arm.short}-{seed}.log")
            (folder / names.CHECKPOINT).unlink(missing_ok=True)

    def end_orphans(self):
        """Ends processes that a killed proof left running: they would slow these trainings down."""
        if alive := processes.end(lambda: processes.marked(MARK, str(self.place))).left:
            raise Refused(f"{processes.named(alive)} of a proof that was killed cannot be ended: wait until they are gone, or reboot")

    def judge(self, arm, seed, folder):
        """Adds the result of the training in `folder` to the runs. Raises Refused or Again if it has none."""
        log = run_log.read(folder / names.RUN_LOG)
        run = {"code": arm.code, "commit": arm.short, "seed": seed, "val": None, "holdout": None, "end": log.end}
        if log.ended == "refused":
            raise Refused(f"{arm.short} was not trained: {log.trace(300)}")
        if log.ended == "machine":
            raise Again(f"this machine ended the training of {arm.short} ({log.fault}): mend that, then the same command repeats it")
        if log.ended == "overran" and ends.before(self.place, arm.code, log.run_id) < ends.REPEATS:
            ends.note(self.place, arm.code, log.run_id)
            raise Again(f"{arm.short}: {log.fault}; this machine may have stalled: the same command repeats the training")
        if log.ended in ("killed", "preempted", "interrupted", "nothing"):
            raise Again(f"the training of {arm.short} was {log.ended}: the same command repeats it")
        if log.ended != "complete":
            return self.add(run | {"crash": log.trace(300)})
        self.check(arm, seed, log.header, folder)
        summary = log.summary
        if (folder / names.CHECKPOINT).is_file():
            scores = scoring.score(folder, folder)
        else:
            scores = {"refused": "it left no checkpoint.pt"}
        if "refused" not in scores and (sentence := scoring.off(folder, log.header, summary["val_bpb"], scores)):
            scores = {"refused": sentence}
        self.add(run | {
            "device": log.header["device"], "data": log.header["data_sha256"], "val": summary["val_bpb"],
            "holdout": scores.get("holdout"), "refused": scores.get("refused"), "seconds": summary["total_seconds"],
            "tokens_per_second": summary["total_tokens_M"] * 1e6 / max(summary["training_seconds"], 1e-9),
        })  # fmt: skip

    def check(self, arm, seed, header, folder):
        if others := rules.changed(header, rules.tree(folder)):
            raise Refused(
                f"{arm.short} ran under other rules than the commit has: its train.py changes the frozen files "
                f"({', '.join(others[:3])})"
            )
        if header["train_sha256"] != arm.code or header["seed"] != seed:
            raise Refused(f"the log of {arm.short} comes from other code or another seed than was started")
        if header["clock"] not in self.clocks:
            raise Refused(f"{arm.short} ran with an injected clock: such runs are for tests and prove nothing")
        for name, value in (("device", header["device"]), ("data", header["data_sha256"])):
            others = {r[name] for r in self.runs if r.get(name)} - {value}
            if others:
                raise Refused(f"another {name} than in the runs so far ({value}, {others.pop()}): rm -r {self.place}")


def run(args, clocks=("monotonic",)):
    if args.seeds < FEWEST:
        raise Refused(f"--seeds {args.seeds}: fewer than {FEWEST} are too few to estimate the noise")
    intervals.distributions()
    top = Repo.find(Path.cwd()).top
    trees = [top, *map(Path, args.tree)]
    found, used = commits.find(args.commits, trees)
    for tree in trees:
        if tree.is_dir() and locks.run_in_progress(tree):
            raise Refused(f"a run is in progress in {tree}, which would slow these down: wait for its end")
    with locks.one_at_a_time(top / names.LAB / names.PROVE, "proof", patience=0.5):
        it = Proof(top, found, used, args.seeds, clocks)
        todo, minutes = it.todo(), it.minutes()
        cost = f"about {minutes:.0f} minutes" if minutes else "duration unknown, because none of these commits has a recorded run"
        where = next((f" on {arm.dataset[commits.DATASET]}" for arm in found if arm.dataset), "")
        print(f"{len(todo)} runs to do{where}, {len(found) * args.seeds - len(todo)} done: {cost}", flush=True)
        if args.dry_run:
            return 0
        (it.place / names.LAB).mkdir(parents=True, exist_ok=True)
        it.end_orphans()
        files.write(it.place / "plan.json", json.dumps({"first_seed": it.first_seed}) + "\n")
        work(it, todo)
        text = comparison.report(found, it.runs, it.seeds)
    print(text)
    files.write(top / names.PROOF, text + "\n")
    return 0


def work(it, todo):
    def stop(number, _frame):
        signal.signal(number, signal.SIG_IGN)
        raise Again("terminated: the same command resumes")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        for i, (arm, seed) in enumerate(todo, 1):
            print(f"{i}/{len(todo)}: {arm.short} under seed {seed}", end=" ", flush=True)
            it.train(arm, seed)
            last = it.runs[-1]
            value = "crashed" if last["val"] is None else f"val {last['val']:.6f}"
            print(value + ("" if last["holdout"] is None else f", holdout {last['holdout']:.6f}"), flush=True)
    except KeyboardInterrupt:
        raise Unfinished("interrupted: the same command resumes") from None
    finally:
        signal.signal(signal.SIGTERM, before)
