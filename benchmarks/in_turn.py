"""Two versions of train.py in turn on one machine: which one's steps are faster, and do both compute the same?

`uv run benchmarks/step.py --against COMMIT` runs this. Each version has a process of its own, which takes steps only
when told to, so drift of the machine affects both. Hyperparameters are the older version's small or large defaults,
with --set on top, in both versions. Starting weights are the older version's too. The tokens are made up: every other one
on average follows from the one before it, so that there is something to learn.

As a script it is such a process: its only argument is JSON with the version's folder and what to do.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import common

LOSSES = 25  # steps whose losses are compared
RENAMED = {"X0_LR": "SCALAR_LR", "VECTOR_LR": "RESID_LR"}  # today's name: the name in older versions
ADDED = ("ATTENTION", "COMPILE", "GPU", "SEED", "SMALL", "ASPECT_RATIO")  # not taken from one version to the other


class Version:
    """A process that steps one version's model. Its answers are lines of JSON."""

    def __init__(self, **plan):
        command = [sys.executable, __file__, json.dumps(plan)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"a version's process ended with code {self.process.wait()}: its message is above")

    def ask(self, what, steps):
        print(what, steps, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def against(commit, settings, compiled, dtype, cores, steps, blocks):
    """Compares the working tree with a commit; prints and returns the result.

    settings: {hyperparameter: value} for both; cores: the numbers of those to run on; steps: of a block."""
    name = subprocess.run(
        ["git", "rev-parse", "--short", "--verify", f"{commit}^{{commit}}"], cwd=common.ROOT, capture_output=True, text=True
    )
    if name.returncode:
        raise SystemExit(f"{commit!r} is no commit of this repository: give one that `git log` shows")
    commit = name.stdout.strip()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / commit).mkdir()
        archive = subprocess.run(["git", "archive", commit], cwd=common.ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder / commit], input=archive, check=True)
        plan = dict(compiled=compiled, dtype=dtype, cores=cores, weights=str(folder / "weights.pt"))
        old = Version(folder=str(folder / commit), settings=settings, **plan)
        stack.callback(old.close)
        new = Version(folder=str(common.ROOT), settings=old.hello["settings"] | settings, **plan)
        stack.callback(new.close)
        losses = [version.ask("losses", LOSSES) for version in (old, new)]
        apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
        shape = {key: old.hello[key] for key in ("parameters", "tokens", "dtype")}
        print(f"{shape['parameters']:,} parameters, {shape['tokens']:,} tokens per step, {shape['dtype']}, ", end="")
        print(f"{'compiled' if compiled else 'eager'}, core{'s' * (len(cores) > 1)} {', '.join(map(str, cores))}")
        print(f"losses of {LOSSES} steps: {losses[0][0]:.4f} to {losses[0][-1]:.4f}, at most {apart:.1e} apart", flush=True)
        spent = {"wall": [], "cpu": [], "system": [], "faults": []}
        for _ in range(blocks):
            pair = [version.ask("steps", steps) for version in (old, new)]
            for key, values in spent.items():
                values.append([block[key] for block in pair])
    result = dict(against=commit, compiled=compiled, cores=cores, settings=settings, loss_difference=apart, **shape)
    print(f"{'ms per step, medians':<24} {commit:>10} {'this tree':>10} {'ratio':>7}   from, to")
    for key in ("wall", "cpu"):
        ratios = [a / b for a, b in spent[key]]
        medians = [statistics.median(column) for column in zip(*spent[key], strict=True)]
        result |= {f"{key}_ms": [round(m, 2) for m in medians], f"{key}_ratio": round(statistics.median(ratios), 3)}
        label = "wall clock" if key == "wall" else "CPU time"
        print(f"{label:<24} {medians[0]:>10.1f} {medians[1]:>10.1f} {statistics.median(ratios):>7.3f}", end="")
        print(f"   {min(ratios):.2f}, {max(ratios):.2f}")
    for key, label in (("system", "of it in the kernel"), ("faults", "page faults per step")):
        medians = [statistics.median(column) for column in zip(*spent[key], strict=True)]
        print(f"{label:<24} {medians[0]:>10.1f} {medians[1]:>10.1f}")
    return result


# ------------------------------------------------------------------------------------------------
# In the process of one version

def child(plan):
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, plan["cores"])
    import torch

    torch.set_num_threads(len(plan["cores"]))
    prepare, train = common.core(plan["folder"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and hasattr(getattr(prepare, "devices", None), "keep_freed_memory"):  # as begin_run does
        prepare.devices.keep_freed_memory()
    if device.type != "cuda":
        vars(train).update(getattr(train, "SMALL", {}))
    apply(train, plan["settings"])
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    dtype = getattr(torch, plan["dtype"]) if plan["dtype"] else train.choose_dtype(device)[0]
    older = hasattr(train, "SMALL")  # the configuration had no dtype then, and train_step no row length
    vocabulary = prepare.VOCAB_SIZE
    model = train.GPT(*[train.build_config(vocabulary), dtype] if older else [train.build_config(vocabulary, dtype)])
    model.init_weights()
    model.to(device)
    weights = Path(plan["weights"])
    if weights.exists():
        model.load_state_dict(torch.load(weights))
    else:
        torch.save(model.state_dict(), weights)
    optimizer = train.build_optimizer(model, dtype)
    model.attention, _ = train.choose_attention(device, dtype, plan["compiled"])
    train.set_compile(model, optimizer, plan["compiled"], device)
    T, rows = train.MAX_SEQ_LEN, train.DEVICE_BATCH_SIZE
    micro_batches = max(1, train.TOTAL_BATCH_SIZE // (rows * T))
    row_length = [] if older else [T]
    batches = made_up(rows, T, vocabulary, device)
    restore = train.snapshot(model, optimizer, device)
    train.train_step(model, optimizer, iter([next(batches)] * micro_batches), micro_batches, *row_length)  # compiles
    restore()
    number_of_parameters = sum(p.numel() for p in model.parameters())
    tokens = micro_batches * rows * T
    say(dict(settings=settings(train), parameters=number_of_parameters, tokens=tokens, dtype=str(dtype)[6:]))
    for line in sys.stdin:
        what, steps = line.split()
        synchronize(device)
        before, began, losses = getrusage(RUSAGE_SELF), time.perf_counter(), []
        for _ in range(int(steps)):
            losses.append(train.train_step(model, optimizer, batches, micro_batches, *row_length)[0])
        synchronize(device)
        after, seconds = getrusage(RUSAGE_SELF), {"wall": time.perf_counter() - began}
        seconds["system"] = after.ru_stime - before.ru_stime
        seconds["cpu"] = after.ru_utime - before.ru_utime + seconds["system"]
        per_step = {key: 1000 * value / int(steps) for key, value in seconds.items()}
        per_step["faults"] = (after.ru_minflt - before.ru_minflt) / int(steps)
        say([loss.item() for loss in losses] if what == "losses" else per_step)


def say(answer):
    print("RESULT " + json.dumps(answer), flush=True)


def synchronize(device):
    import torch

    getattr(torch, device.type).synchronize()


def settings(train):
    """{name: value} of a version's plain hyperparameters, in today's names."""
    older = {old: new for new, old in RENAMED.items()}
    plain = (int, float, str, list, tuple)
    found = {name: value for name, value in vars(train).items() if name.isupper() and isinstance(value, plain)}
    found = {older.get(name, name): value for name, value in found.items()}
    if "ASPECT_RATIO" in found:
        found["MODEL_DIM"] = found["DEPTH"] * found["ASPECT_RATIO"]
    left_out = ("MAX_SEQ_LEN", "POLAR_EXPRESS", "SDPA", *ADDED)  # rules, or no hyperparameters
    return {name: value for name, value in found.items() if name not in left_out}


def apply(train, values):
    for name, value in values.items():
        if name == "MODEL_DIM" and not hasattr(train, name):
            train.ASPECT_RATIO = value // values.get("DEPTH", train.DEPTH)
            continue
        older = RENAMED.get(name, name)
        name = older if not hasattr(train, name) else name
        assert hasattr(train, name), f"{name} is no hyperparameter of {train.__file__}"
        setattr(train, name, tuple(value) if isinstance(value, list) else value)


def made_up(rows, T, vocabulary, device):
    """Endless batches (x, y, epoch), the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    follower = torch.randint(vocabulary, (vocabulary,), generator=generator)
    for epoch in count(1):
        tokens = torch.randint(vocabulary, (rows, T + 1), generator=generator)
        follows = torch.rand(rows, T + 1, generator=generator) < 0.5
        for t in range(1, T + 1):
            tokens[:, t] = torch.where(follows[:, t], follower[tokens[:, t - 1]], tokens[:, t])
        yield tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device), epoch


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
