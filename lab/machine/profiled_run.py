"""Runs train.py for some steps and measures them: the child process of `lab profile`.

train.py runs as `uv run train.py` runs it, with its own warm-up and its own loop. Only what it gets from prepare.py is
replaced: a clock that measures and ends the process in place of the run's; random tokens in place of the text, through
the real loader; no evaluation. So any edit can be profiled that calls what every train.py has to call: begin_run,
clock.start(model, batch_size), make_dataloader, and clock.progress() once a step.

This process is the tree's: its prepare.py and train.py are imported, and nothing in lab that this module imports may
import corpus or constants before.
"""

import json
import os
import resource
import runpy
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from inspect import isfunction
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from lab.store import names

HALF = 0.5  # the progress that train.py reads: its schedules are those of the middle of the run
WARM = 2  # steps before anything is measured
WHOLE = 3, 30, 10.0  # blocks of steps timed as a whole: at least, at most, and seconds after which no more begin
SPLIT = 2, 10, 5.0  # the same of the steps whose parts are timed
PROFILED = 3, 3.0  # steps under torch.profiler after its first one: at most, and seconds
PER_BLOCK = 4  # steps of a block on a GPU, which is waited for once a block
TOP = 10  # operators and kernels
DOCUMENTS = 600, 1.0  # median length in tokens of the random documents, and standard deviation of its logarithm


class Failed(Exception):
    """One sentence, without the subject train.py."""


def random_documents(shards, state):
    """In place of corpus.shards.endless_documents: (length, tokens, start) of documents of random ordinary tokens."""
    import numpy as np

    from corpus.tokenizer import NUM_ORDINARY

    rng, state["epoch"] = np.random.default_rng(0), 1
    tokens = rng.integers(0, NUM_ORDINARY, 1 << 20, dtype=np.uint16)
    while True:
        lengths = np.clip(rng.lognormal(np.log(DOCUMENTS[0]), DOCUMENTS[1], 4096), 2, len(tokens) // 2).astype(int)
        starts = rng.integers(0, len(tokens) // 2, len(lengths))
        yield from ((length, tokens, start) for length, start in zip(lengths.tolist(), starts.tolist(), strict=True))


@contextmanager
def profiling():
    """Around calls of torch.profiler: if one fails (a driver may forbid tracing), that is no fault of train.py."""
    try:
        yield
    except Exception as error:
        raise Failed(f"could not be measured: torch.profiler fails with {type(error).__name__}: {error}") from error


class Parts:
    """Seconds per part of a step. While `on`, the device is waited for before and after each part."""

    def __init__(self, synchronize):
        self.synchronize, self.on, self.seconds, self.open = synchronize, False, {}, None
        self.thread = threading.get_ident()

    def begin(self, name):
        """Whether the part began: not inside another one, nor in another thread."""
        if not self.on or self.open or threading.get_ident() != self.thread:
            return False
        self.synchronize()
        self.open = name, time.perf_counter()
        return True

    def end(self):
        self.synchronize()
        (name, began), self.open = self.open, None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def timed(self, name):
        began = self.begin(name)
        try:
            yield
        finally:
            if began:
                self.end()

    def wrapped(self, name, function):
        def call(*args, **kwargs):
            with self.timed(name):
                return function(*args, **kwargs)

        return call


class Loader:
    """The real loader, timed and counted."""

    def __init__(self, batches, parts):
        self.batches, self.parts, self.tokens = batches, parts, 0

    def __iter__(self):
        return self

    def __next__(self):
        with self.parts.timed("data"):
            batch = next(self.batches)
        self.tokens += batch[0].numel()
        return batch


class MeasuringClock:
    """What train.py calls `clock`. Each progress() ends a step; measure() says what is measured in the steps."""

    def __init__(self, prepare, torch, answer):
        self.prepare, self.torch, self.answer = prepare, torch, answer
        self.device, self.device_name = prepare.pick_device()
        self.seed, self.run_id, self.manifest = prepare.DEFAULT_SEED, "profile", {}
        self.started = self.stopped = self.model = None
        self.parts, self.loaders, self.optimizers, self.gradients = Parts(self.settle), [], {}, {}
        self.steps, self.measuring = -1, None

    # --- what train.py and prepare call ---

    def start(self, model, batch_size=None):
        self.model, self.started = model, time.perf_counter()
        self.measuring = self.measure()

    def progress(self):
        if self.started is None:
            raise Failed("calls clock.progress() before clock.start(model, batch_size)")
        self.steps += 1
        next(self.measuring)
        return HALF

    def training_seconds(self):
        return time.perf_counter() - self.started

    def mfu_percent(self, *args):
        return self.prepare.devices.mfu_percent(self.device_name, *args)

    def check_running(self):
        pass

    def settle(self):
        self.prepare.devices.synchronize(self.device)

    def ended(self, *args, **kwargs):
        """In place of what follows training: the loop has ended before the measurement."""
        raise Failed(f"ends its training after {max(self.steps, 0)} steps although clock.progress() is {HALF}")

    stop = summary = ended

    # --- the measurement ---

    def measure(self):
        """A generator: train.py takes one step at each yield. At the end it writes the answer and ends the process."""
        graphs = self.prepare.devices.compiled_graphs()
        self.install()
        for _ in range(1 + WARM):
            yield
        found = {"device": f"{self.device.type} ({self.device_name})", "steps": (yield from self.whole_steps())}
        found["split"] = yield from self.split_steps()
        found["profile"] = yield from self.profiled_steps()
        found["memory"] = self.memory(found["profile"].pop("peak_above_start"))
        found["graphs"] = self.graphs(graphs)
        write(self.answer, found)
        sys.stdout.flush()
        os._exit(0)

    def install(self):
        """Hooks on what a step consists of. Those that cost time are idle until `parts.on`."""
        from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        torch, parts = self.torch, self.parts
        torch.autograd.backward = parts.wrapped("backward", torch.autograd.backward)
        torch.autograd.grad = parts.wrapped("backward", torch.autograd.grad)

        def before(optimizer, args, kwargs):
            self.optimizers[id(optimizer)] = optimizer
            if not parts.on:
                self.gradients |= {id(p): nbytes([p.grad]) for g in optimizer.param_groups for p in g["params"]}
            parts.begin("optimizer")

        def after(optimizer, args, kwargs):
            if parts.open and parts.open[0] == "optimizer":
                parts.end()

        register_optimizer_step_pre_hook(before)
        register_optimizer_step_post_hook(after)

        def hooked(step):
            def call(optimizer, *args, **kwargs):
                if not hasattr(optimizer, "param_groups"):  # a schedule, say
                    return step(optimizer, *args, **kwargs)
                before(optimizer, args, kwargs)
                try:
                    return step(optimizer, *args, **kwargs)
                finally:
                    after(optimizer, args, kwargs)

            return call

        for cls in vars(sys.modules["__main__"]).values():  # train.py's own optimizers, which torch's hooks do not know
            if isinstance(cls, type) and isfunction(vars(cls).get("step")) and not issubclass(cls, Optimizer):
                cls.step = hooked(cls.step)

    def whole_steps(self):
        """Blocks of steps, undisturbed: seconds of one step, tokens of one, faults and CPU seconds."""
        per_block, times = PER_BLOCK if self.device.type == "cuda" else 1, []
        if self.device.type == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        tokens, before, begin = self.tokens(), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        while len(times) < WHOLE[0] or (len(times) < WHOLE[1] and time.perf_counter() - begin < WHOLE[2]):
            self.settle()
            began = time.perf_counter()
            for _ in range(per_block):
                yield
            self.settle()
            times.append((time.perf_counter() - began) / per_block)
        after, n = resource.getrusage(resource.RUSAGE_SELF), len(times) * per_block
        tokens, flops = (self.tokens() - tokens) / n, getattr(self.model, "flops_per_token", None)
        mfu = self.mfu_percent(flops(), tokens, min(times)) if callable(flops) and tokens else None
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        return {
            "seconds": min(times), "median": median(times), "n": n, "per_block": per_block, "tokens": tokens, "mfu_percent": mfu or None,
            "minor_faults": (after.ru_minflt - before.ru_minflt) / n, "major_faults": (after.ru_majflt - before.ru_majflt) / n,
            "system_share": system / (user + system) if user + system > 0 else 0.0,
        }  # fmt: skip

    def split_steps(self):
        """The fastest of some steps in which each part is waited for: {"seconds", "parts": {name: seconds}}."""
        best, n, begin, hooks = None, 0, time.perf_counter(), []
        if hasattr(self.model, "register_forward_pre_hook"):

            def after(*_):
                if self.parts.open and self.parts.open[0] == "forward":
                    self.parts.end()

            hooks.append(self.model.register_forward_pre_hook(lambda *_: self.parts.begin("forward") and None))
            hooks.append(self.model.register_forward_hook(after))
        while n < SPLIT[0] or (n < SPLIT[1] and time.perf_counter() - begin < SPLIT[2]):
            self.settle()
            self.parts.on, self.parts.seconds, began = True, {}, time.perf_counter()
            yield
            self.settle()
            seconds, n = time.perf_counter() - began, n + 1
            if best is None or seconds < best["seconds"]:
                best = {"seconds": seconds, "parts": self.parts.seconds}
        self.parts.on = False
        for hook in hooks:
            hook.remove()
        return best

    def profiled_steps(self):
        """Operators and kernels by their own time: [name, seconds a step, calls a step], and what they are shares of."""
        torch, on_cpu, n = self.torch, self.device.type == "cpu", 0
        self.settle()
        with profiling():
            profiler = torch.profiler.profile(profile_memory=on_cpu)
            profiler.start()  # takes seconds on a GPU
        yield  # its operators count, its time does not: the tracer still sets itself up
        self.settle()
        begin = time.perf_counter()
        while n < 1 or (n < PROFILED[0] and time.perf_counter() - begin < PROFILED[1]):
            yield
            n += 1
        self.settle()
        wall = (time.perf_counter() - begin) / n
        with profiling():
            profiler.stop()
            events = [e for e in profiler.key_averages() if not getattr(e, "is_user_annotation", False)]
        n += 1
        cpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
        kernels = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
        own = "self_device_time_total" if kernels else "self_cpu_time_total"
        found = {"operators": top(cpu, own, n), "kernels": top(kernels, own, n) if kernels else None, "wall": wall, "n": n}
        for name, those in [("operators_total", cpu), ("kernels_total", kernels)]:
            found[name] = sum(getattr(e, own) for e in those) / 1e6 / n
        return found | {"peak_above_start": peak_of(profiler) if on_cpu else None}

    def tokens(self):
        return sum(loader.tokens for loader in self.loaders)

    def memory(self, peak_above_start):
        """Bytes by kind; None for what is not known."""
        torch, owned = self.torch, getattr(self.model, "parameters", list)
        parameters = nbytes([*owned(), *getattr(self.model, "buffers", list)()])
        gradients = sum(self.gradients.values()) if self.gradients else None
        states = [list(getattr(optimizer, "state", {}).values()) for optimizer in self.optimizers.values()]
        state = nbytes(tensors_in(torch, states)) if self.optimizers else None
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        elif peak_above_start is not None:
            peak = parameters + (state or 0) + peak_above_start
        rest = None if peak is None else max(0, peak - parameters - (gradients or 0) - (state or 0))
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "parameters": parameters, "gradients": gradients, "optimizer state": state,
            "activations and temporaries": rest, "peak": peak, "resident": resident,
        }  # fmt: skip

    def graphs(self, before):
        """Of torch.compile in this process; None if it compiled nothing."""
        dynamo = sys.modules.get("torch._dynamo.utils")
        total = self.prepare.devices.compiled_graphs()
        if not dynamo or not total:
            return None
        breaks = dynamo.counters["graph_break"]
        reasons = [reason for reason, _ in breaks.most_common(2)]
        return {"graphs": total, "in_training": total - before, "breaks": sum(breaks.values()), "reasons": reasons}


# ---------------------------------------------------------------------------------------------------
# Small things


def nbytes(tensors):
    """Bytes of these tensors, each counted once; None among them counts nothing."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors if t is not None}.values())


def tensors_in(torch, value):
    """The tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(torch, inner)


def top(events, own, n):
    ordered = sorted(events, key=lambda e: -getattr(e, own))[:TOP]
    return [[e.key, getattr(e, own) / 1e6 / n, e.count / n] for e in ordered if getattr(e, own) > 0]


def peak_of(profiler):
    """The most bytes that were allocated at once in the profiled steps beyond those at their start; None if this torch
    does not report allocations one by one."""
    results = getattr(getattr(profiler, "profiler", None), "kineto_results", None)
    try:
        changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    except AttributeError:
        return None
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak if changes else None


def write(answer, found):
    temporary = answer.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, answer)


def place_of(error):
    """" (train.py, line 12)": the innermost line of train.py in the traceback, or where its syntax is wrong."""
    if isinstance(error, SyntaxError):
        line = error.lineno if Path(error.filename or "").name == names.TRAIN else None
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if Path(f.filename).name == names.TRAIN), None)
    return f" ({names.TRAIN}, line {line})" if line else ""


# ---------------------------------------------------------------------------------------------------
# Instead of a run


def instead(prepare, torch, clock):
    """Replaces what train.py imports from prepare."""

    def begin_run(train_file=None, **_):
        prepare.make_output_safe()
        prepare.choose_compile_cache()
        torch.set_float32_matmul_precision("high")
        prepare.choose_seed(True)
        if clock.device.type == "cpu":
            prepare.devices.keep_freed_memory()
        prepare._run = clock
        return clock

    real_loader, real_tokenizer = prepare.make_dataloader, prepare.load_tokenizer

    def make_dataloader(*args, **kwargs):
        clock.loaders.append(Loader(real_loader(*args, **kwargs), clock.parts))
        return clock.loaders[-1]

    def load_tokenizer():
        try:
            return real_tokenizer()
        except (OSError, SystemExit):  # the data are not prepared: the size of the vocabulary is known anyway
            return SimpleNamespace(vocab_size=prepare.VOCAB_SIZE)

    prepare.begin_run, prepare.make_dataloader, prepare.load_tokenizer = begin_run, make_dataloader, load_tokenizer
    prepare.open_shards, prepare.endless_documents = list, random_documents
    prepare.evaluate_bpb = clock.ended
    show_compiled_kernels(torch, clock.device)


def show_compiled_kernels(torch, device):
    """On a CPU, has inductor name its kernels for the profiler; else a compiled graph is one operator. (Triton's kernels are
    named without this.) Set at the first torch.compile, since its configuration takes a second to import."""
    compile_ = torch.compile

    def named(*args, **kwargs):
        if device.type == "cpu":
            import torch._inductor.config as config

            config.cpp.enable_kernel_profile = True
        return compile_(*args, **kwargs)

    torch.compile = named


def profile(answer):
    """Writes the measurement of the train.py in this directory to the file `answer`, and ends the process."""
    import torch

    import prepare

    clock = MeasuringClock(prepare, torch, answer)
    instead(prepare, torch, clock)
    try:
        runpy.run_path(names.TRAIN, run_name="__main__")
    except Exception as error:
        if isinstance(error, Failed):
            raise
        text = error.msg if isinstance(error, SyntaxError) else error
        raise Failed(f"fails with {type(error).__name__}: {text}{place_of(error)}") from None
    except SystemExit as error:
        if error.code not in (None, 0):
            raise Failed(f"stops: {error.code}") from None
    if clock.started is None:
        what = "begin_run(__file__)" if prepare._run is None else "clock.start(model, batch_size)"
        raise Failed(f"ends without calling {what}")
    clock.ended()


def main():
    answer = Path(sys.argv[1])
    try:
        profile(answer)
    except Failed as failed:
        write(answer, {"failed": " ".join(str(failed).split())})
