"""Which small defaults learn the most? Trains train.py with other hyperparameters, for the same CPU time each.

    uv run benchmarks/defaults.py DEPTH=2 'DEPTH=2 MATRIX_LR=0.08' 'WARMDOWN_RATIO=0.9'      53 s each, on one core
    uv run benchmarks/defaults.py --seconds 530 --seeds 42 43 44 --cores 0 1 -- '' DEPTH=2     as long as a run on two

An argument is one setting: NAME=VALUE pairs, separated by spaces; '' changes nothing. Each training has a process, a
core and a thread of its own, and its clock is the CPU time of that process: other work on the machine then costs it
little, and several trainings can go side by side. Five minutes on two cores do about what 530 s of CPU time do on one.
Scores are those of the frozen metric on the val rows and on the holdout rows, without the audit. Prints a line for each
training as it ends, and appends it to benchmarks/results.jsonl.
"""

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from itertools import product
from queue import SimpleQueue

import common

COLUMNS = ["val_bpb", "holdout_bpb", "steps", "tokens", "epoch"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="+", metavar="'NAME=VALUE ...'")
    parser.add_argument("--seconds", type=float, default=53, help="CPU time of each training (default: 53)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--cores", type=int, nargs="+", default=[0], help="one training at a time on each (default: 0)")
    args = parser.parse_args()
    if args.settings[0].startswith("{"):
        return print("RESULT " + json.dumps(train_one(json.loads(args.settings[0]))))
    cores = SimpleQueue()
    for core in args.cores:
        cores.put(core)

    def job(setting, seed):
        core = cores.get()
        plan = json.dumps({"setting": setting, "seed": seed, "seconds": args.seconds, "core": core})
        done = subprocess.run([sys.executable, __file__, plan], capture_output=True, text=True)
        cores.put(core)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return print(f"{setting or 'as it is'}, seed {seed}: not run: {reason[:160]}", flush=True)
        result = json.loads(done.stdout.partition("RESULT ")[2])
        print(*(f"{result[c]:>11.6f}" if "bpb" in c else f"{result[c]:>9,}" for c in COLUMNS), end="")
        print(f" {seed:>5}   {setting or 'as it is'}", flush=True)
        return result

    print(*(f"{c:>{11 if 'bpb' in c else 9}}" for c in COLUMNS), " seed   setting")
    with ThreadPoolExecutor(len(args.cores)) as pool:
        results = [r for r in pool.map(lambda pair: job(*pair), product(args.settings, args.seeds)) if r]
    if not results:
        raise SystemExit("no training ended: the reasons are above")
    common.record("defaults", {"seconds": args.seconds, "results": results})


class CpuClock:
    """Replaces prepare's clock: its seconds are CPU seconds of this process."""

    def __init__(self, seconds):
        self.budget, self.began = seconds, time.process_time()

    def training_seconds(self):
        return time.process_time() - self.began

    def progress(self):
        return min(1.0, self.training_seconds() / self.budget)

    def mfu_percent(self, *_):
        return 0.0


def train_one(plan):
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [plan["core"]])
    import numpy as np
    import torch

    torch.set_num_threads(1)
    prepare, train = common.core()
    prepare.devices.keep_freed_memory()  # as begin_run does
    torch.manual_seed(plan["seed"])
    for name, _, value in (pair.partition("=") for pair in plan["setting"].split()):
        if not hasattr(train, name):
            raise SystemExit(f"train.py has no {name}")
        setattr(train, name, ast.literal_eval(value))
    scores, text = {}, io.StringIO()
    with common.clock(prepare) as clock, redirect_stdout(text):
        tokenizer, device = prepare.load_tokenizer(), clock.device
        dtype, _ = train.choose_dtype(device)
        model = train.GPT(train.build_config(tokenizer.vocab_size, dtype))
        model.init_weights()
        optimizer = train.build_optimizer(model, dtype)
        batch_size = train.warm_up(model, optimizer, device)
        loader = prepare.make_dataloader(tokenizer, batch_size, train.MAX_SEQ_LEN, "train")
        steps, tokens = train.train(CpuClock(plan["seconds"]), model, optimizer, loader, batch_size)
        _, _, epoch = next(loader)
        model.eval()
        with torch.no_grad():
            for split in ("val", "holdout"):
                rows = np.load(prepare.data_dir() / f"{split}_rows.npy")
                scores[f"{split}_bpb"] = prepare.score_rows(model, rows, tokenizer.token_bytes(), batch_size)
    return dict(setting=plan["setting"], seed=plan["seed"], steps=steps, tokens=tokens, epoch=epoch, **scores)


if __name__ == "__main__":
    main()
