"""How much time does a run spend outside training? From process start to the summary, stage by stage.

    uv run benchmarks/overhead.py                              the defaults of this device, 3 runs
    uv run benchmarks/overhead.py --compile                    compiled: with an empty compile cache, then 3 with a warm one
    uv run benchmarks/overhead.py --budget 20 --repeats 5

Each run is the real `train.py` in its own process, in a copy of the code with a shorter budget. Wrappers around the
functions that begin and end the stages take the times. Data: those prepared for AUTORESEARCH_DATASET, otherwise random
tokens with the real number of evaluation rows. Prints a table of medians and appends a line to benchmarks/results.jsonl.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

STAGES = ["imports", "begin_run", "model", "warm_up", "dry_run", "training", "evaluation", "checkpoint", "exit"]

TIMED = '''
"""Runs train.py and records when its stages end."""
import json, sys, time
from frozen.process import process_age
born = time.monotonic() - process_age()
import prepare, train
marks = [("imports", time.monotonic())]

def until(module, name, stage, before=None):
    inner = getattr(module, name)
    def timed(*args, **kwargs):
        if before:
            marks.append((before, time.monotonic()))
        result = inner(*args, **kwargs)
        marks.append((stage, time.monotonic()))
        return result
    setattr(module, name, timed)

until(train, "begin_run", "begin_run")
until(train, "warm_up", "warm_up", before="model")
until(prepare.Run, "start", "dry_run")
until(train, "train", "training")
until(prepare, "score_and_audit", "evaluation")
until(train, "save_checkpoint", "checkpoint")
train.main()
seconds, last = {}, born
for stage, when in marks:
    seconds[stage], last = when - last, when
print("RESULT", json.dumps(seconds), flush=True)
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compile", action="store_true", help="compiled on a CPU too, cold and warm")
    parser.add_argument("--budget", type=int, default=10, help="seconds of training (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, help="runs, beside the cold one (default: 3)")
    args = parser.parse_args()
    prepare, _ = common.core()
    with tempfile.TemporaryDirectory() as folder, common.data(prepare) as data:
        folder = Path(folder)
        copy(folder, args)
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compile")}
        runs = [run(folder, env) for _ in range(args.repeats + 1)]
    cold, warm = runs[0], runs[1:]
    stages = [stage for stage in STAGES if stage in cold]
    print(f"{'':<12}{'first':>9}{'later':>9}   seconds; later: median of {len(warm)}; {data} data")
    medians = {stage: statistics.median(r[stage] for r in warm) for stage in stages}
    for stage in stages:
        print(f"{stage:<12}{cold[stage]:>9.2f}{medians[stage]:>9.2f}")
    beyond = [sum(r.values()) - r["training"] for r in runs]
    later = statistics.median(beyond[1:])
    print(
        f"{'beyond training':<12}{beyond[0]:>6.2f}{later:>9.2f}   later: {min(beyond[1:]):.2f} to {max(beyond[1:]):.2f}"
    )
    budget = prepare.TIME_BUDGET
    print(f"8 hours hold {8 * 3600 / (budget + later):.0f} runs of {budget} s, without the agent's own time")
    result = {"data": data, "compile": args.compile, "budget": args.budget, "repeats": args.repeats}
    common.record("overhead", result | {"first": cold, "later": warm, "beyond_training": beyond})


def copy(folder, args):
    common.copy_code(folder)
    shutil.copy(common.ROOT / "train.py", folder)
    edit(folder / "constants.py", r"^TIME_BUDGET = \d+", f"TIME_BUDGET = {args.budget}")
    if args.compile:
        edit(folder / "train.py", r"^COMPILE = GPU", "COMPILE = True")


def edit(path, pattern, replacement):
    text, n = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    assert n == 1, f"{path.name} has {n} places like {pattern}: expected 1"
    path.write_text(text)


def run(folder, env):
    """{stage: seconds} of one run."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", TIMED], cwd=folder, env=env, capture_output=True, text=True)
    whole = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"the run ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    seconds = json.loads(re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)[1])
    return seconds | {"exit": whole - sum(seconds.values())}


if __name__ == "__main__":
    main()
