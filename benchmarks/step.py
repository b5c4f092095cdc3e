"""How is the time of a training step spent, by attention back end and compile mode?

    uv run benchmarks/step.py                                    every back end that this machine has, compiled and eager
    uv run benchmarks/step.py --attention flex --compile yes     one combination
    uv run benchmarks/step.py --attention flex --compile yes --set WINDOW_PATTERN=L     another hyperparameter
    uv run benchmarks/step.py --attention sdpa --compile no --profile     with a profile of one step, by operator
    uv run benchmarks/step.py --against COMMIT --compile no     two versions in turn: is this train.py faster?

Each combination runs in its own process. There, train.py's own `train` (data, schedules, deferred read-out of the loss,
log lines) alternates with the bare forward + backward + optimizer on one batch that is already on the device, BLOCKS
times each, so that drift of the machine affects both; `loop/bare` is the ratio of their speeds. The split into data,
forward, backward and optimizer is measured on other steps, with a synchronisation after each part. `gaps` is the time of
a step beyond the four parts (negative if the device overlaps them). Data: those prepared for AUTORESEARCH_DATASET,
otherwise random tokens in documents of natural lengths. Prints a table and appends a line to benchmarks/results.jsonl.

With --against a commit's train.py and this one take steps in turn, pinned to the same core (--cores: to others), from
the same weights and with the same batches and hyperparameters: the ratio of their speeds, and whether their losses
agree (in_turn.py says more). --type bfloat16 or float32: the type of the matmuls.
"""

import argparse
import ast
import io
import json
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout

import common

BLOCKS = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--attention", nargs="+", default=["fa3", "varlen", "flex", "sdpa"])
    parser.add_argument("--compile", nargs="+", default=["yes", "no"], choices=["yes", "no"])
    parser.add_argument("--batch", type=int, help="device batch in rows (default: train.py's)")
    parser.add_argument("--steps", type=int, default=10, help="steps a block (default: 10)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other hyperparameters of train.py")
    parser.add_argument("--profile", action="store_true", help="print what one step of each spends, by operator")
    parser.add_argument("--against", metavar="COMMIT", help="compare with a commit's train.py, step by step")
    parser.add_argument("--type", choices=["float32", "bfloat16"], help="with --against (default: train.py's choice)")
    parser.add_argument("--cores", type=int, nargs="+", default=[0], help="with --against: run on these (default: 0)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print("RESULT " + json.dumps(measure(args)))
    if args.against:
        import in_turn  # not on Windows

        settings = {name: ast.literal_eval(value) for name, _, value in (s.partition("=") for s in args.set)}
        for compiled in args.compile:
            plan = dict(compiled=compiled == "yes", dtype=args.type, cores=args.cores, steps=args.steps, blocks=BLOCKS)
            common.record("step in turn", in_turn.against(args.against, settings, **plan))
        return
    rows = []
    for attention in args.attention:
        for compiled in args.compile:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", f"{attention},{compiled}"]
            done = subprocess.run(command, capture_output=True, text=True)
            print(done.stdout.partition("RESULT ")[0], end="")
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{attention}, {'compiled' if compiled == 'yes' else 'eager'}: not run: {reason[:160]}", flush=True)
            else:
                rows.append(json.loads(done.stdout.partition("RESULT ")[2]))
                show(rows[-1:], header=len(rows) == 1)
    if not rows:
        raise SystemExit("none of these combinations ran")
    common.record("step", {"set": args.set, "blocks": BLOCKS, "steps": args.steps, "results": rows})


def show(rows, header):
    names = ["data_ms", "forward_ms", "backward_ms", "optimizer_ms", "gaps_ms", "step_ms", "bare_ms"]
    if header:
        print(f"{'attention':<10} {'mode':<8} {'batch':>7}", *(f"{n.replace('_ms', ''):>9}" for n in names), end="")
        print(f" {'loop/bare':>9} {'tok/s':>10} {'MFU %':>6} {'peak MB':>8}   times in ms, medians")
    for r in rows:
        print(f"{r['attention']:<10} {r['mode']:<8} {r['batch']:>7}", *(f"{r[n]:>9.2f}" for n in names), end="")
        print(f" {r['loop_over_bare']:>9.3f} {r['tokens_per_second']:>10,.0f} {r['mfu_percent']:>6.2f} {r['peak_mb']:>8,.0f}")
        print(f"{'':<10} step from {min(r['step_blocks_ms']):.1f} to {max(r['step_blocks_ms']):.1f}", flush=True)


class CountingClock:
    """Replaces prepare's clock: progress counts steps, and seconds are real."""

    def __init__(self, clock, steps):
        self.clock, self.steps, self.done, self.began = clock, steps, -1, time.perf_counter()

    def progress(self):
        self.done += 1
        return self.done / self.steps

    def training_seconds(self):
        return time.perf_counter() - self.began

    def mfu_percent(self, *args):
        return self.clock.mfu_percent(*args)


def measure(args):
    attention, compiled = args.child.split(",")
    import torch

    prepare, train = common.core()
    if args.threads:
        torch.set_num_threads(args.threads)
    with common.data(prepare), common.clock(prepare) as clock:
        device = clock.device
        for setting in args.set:
            name, _, value = setting.partition("=")
            setattr(train, name, ast.literal_eval(value))
        batch_size = args.batch or train.DEVICE_BATCH_SIZE
        micro_batches = train.TOTAL_BATCH_SIZE // (batch_size * train.MAX_SEQ_LEN)
        model, optimizer = common.model(train, prepare, device)
        model.attention = common.attention(attention, train, device)
        train.set_compile(model, optimizer, compiled == "yes", device)

        def synchronize():
            getattr(torch, device.type).synchronize()

        began = time.perf_counter()
        train.rehearse(model, optimizer, device, batch_size, [train.MAX_SEQ_LEN])
        warm_up_seconds = time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        tokenizer = prepare.load_tokenizer()
        loader = prepare.make_dataloader(tokenizer, batch_size, train.MAX_SEQ_LEN, "train")
        x, y, _ = next(loader)
        fixed = ((x, y, 1) for _ in iter(int, 1))

        def loop():
            with redirect_stdout(io.StringIO()):
                train.train(CountingClock(clock, args.steps), model, optimizer, loader, batch_size)

        def bare():
            for _ in range(args.steps):
                train.train_step(model, optimizer, fixed, micro_batches, train.MAX_SEQ_LEN)

        def timed(block):
            synchronize()
            began = time.perf_counter()
            block()
            synchronize()
            return 1000 * (time.perf_counter() - began) / args.steps

        timed(loop), timed(bare)
        looped, bared = [], []
        for _ in range(BLOCKS):
            looped.append(timed(loop))
            bared.append(timed(bare))
        peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
        parts = split(train, model, optimizer, loader, micro_batches, synchronize, args.steps)
        if args.profile:
            step = lambda: train.train_step(model, optimizer, loader, micro_batches, train.MAX_SEQ_LEN)  # noqa: E731
            profile(step, device, synchronize)
        step_ms = statistics.median(looped)
        tokens = train.TOTAL_BATCH_SIZE
        return {
            "attention": attention,
            "mode": "compiled" if compiled == "yes" else "eager",
            "batch": f"{batch_size}x{micro_batches}",
            "device": clock.device_name,
            "threads": torch.get_num_threads(),
            "warm_up_seconds": round(warm_up_seconds, 1),
            "step_ms": round(step_ms, 3),
            "bare_ms": round(statistics.median(bared), 3),
            "step_blocks_ms": [round(ms, 3) for ms in looped],
            "bare_blocks_ms": [round(ms, 3) for ms in bared],
            "loop_over_bare": round(statistics.median(b / a for a, b in zip(looped, bared, strict=True)), 4),
            **{f"{name}_ms": round(ms, 3) for name, ms in parts.items()},
            "gaps_ms": round(step_ms - sum(parts.values()), 3),
            "tokens_per_second": round(1000 * tokens / step_ms),
            "mfu_percent": round(clock.mfu_percent(model.flops_per_token(), tokens, step_ms / 1000), 2),
            "peak_mb": round(peak),
        }


def split(train, model, optimizer, loader, micro_batches, synchronize, steps):
    """{part: median milliseconds per step}, with a synchronisation after each part."""
    seen = {name: [] for name in ("data", "forward", "backward", "optimizer")}
    for _ in range(steps):
        spent = dict.fromkeys(seen, 0.0)
        mark = time.perf_counter()

        def lap(name, spent=spent):
            nonlocal mark
            synchronize()
            now = time.perf_counter()
            spent[name] += 1000 * (now - mark)
            mark = now

        for _ in range(micro_batches):
            x, y, _ = next(loader)
            lap("data")
            loss = model(x, y) / micro_batches
            lap("forward")
            loss.backward()
            lap("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lap("optimizer")
        for name, ms in spent.items():
            seen[name].append(ms)
    return {name: statistics.median(values) for name, values in seen.items()}


def profile(step, device, synchronize):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    step()
    with profiler(activities=activities) as profiled:
        began = time.perf_counter()
        step()
        synchronize()
        wall = 1e6 * (time.perf_counter() - began)
    events = profiled.key_averages()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    busy = sum(getattr(e, name) for e in events)
    print(events.table(sort_by=name, row_limit=16, max_name_column_width=60))
    where = "the device is busy" if on_gpu else "operators take"
    print(f"one step: {wall / 1000:.2f} ms under the profiler, of which {where} {busy / 1000:.2f} ms ({busy / wall:.1%})")


if __name__ == "__main__":
    main()
