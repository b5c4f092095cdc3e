"""Data, tokenizer, dataloader, clock and metric: everything about a run that the agent must not edit.

    uv run prepare.py                                  download, tokenise, pack; continues after a kill
    uv run prepare.py --num-shards 4                   a smaller ClimbMix; -1 for all of it
    AUTORESEARCH_DATASET=stdlib uv run prepare.py      no download: Python's own standard library

Writes only below ~/.cache/autoresearch (AUTORESEARCH_CACHE replaces it) and, with a Hopper GPU, an attention kernel into
the Hugging Face cache. A tour, in the order in which a run calls:

    clock = begin_run(__file__)      watchdog on, folder locked, header printed          "The run"
    warmup_batch(B, T)               random tokens: compile and tune on these            "Data"
    clock.start(model, batch_size)   checks the untrained model; time counts             "The run"
    make_dataloader(...)             packed rows of the training text                    "Data"
    clock.progress()                 fraction of the time budget used, once a step       "The clock"
    evaluate_bpb(...)                stops the clock, audits the model, scores it        "Metric"
    clock.summary(...)               the block of numbers that ends a run                "The run"

corpus/ has the format of the data and makes them; frozen/ has metric, audit, device, watchdog and lock. The hash of the
rules (corpus/rules.py) covers all of it. A refusal is a SystemExit with one sentence. torch is imported inside the
functions that use it: preparing the data does not need it, and loading it costs seconds and memory.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import time
import uuid
from collections import Counter, deque
from datetime import datetime, timezone
from pathlib import Path
from statistics import median_high

import numpy as np

from constants import DATASET, GRACE, MAX_SEQ_LEN, TIME_BUDGET, VOCAB_SIZE
from corpus import rules
from corpus.layout import cache_dir, data_dir, load_manifest
from corpus.packing import pack_rows
from corpus.shards import endless_documents, open_shards
from corpus.system import sha256_files
from corpus.tokenizer import NUM_ORDINARY, Tokenizer
from frozen import device as devices
from frozen import guard
from frozen.audit import score_and_audit
from frozen.device import FA3_KERNEL, fa3_kernel, is_out_of_memory, pick_device  # noqa: F401 (imported from here)
from frozen.metric import checked_logits, eval_batches, score_rows, token_nats  # noqa: F401
from frozen.process import Watchdog, end_on_device_errors, end_on_signals, lock_folder, process_age

# ---------------------------------------------------------------------------------------------------
# The clock

# Training may overrun by this much: a last step that was expected to fit, synchronising, a short stall of the machine.
SLACK = max(0.01 * TIME_BUDGET, 1)  # seconds
MEDIAN_STEPS = 9  # the next step is expected to take the median of this many last ones
NEAR_END = 5  # for this many steps before the end progress() waits for the device, which may lag behind


class Clock:
    """Times the training of one run: begins once, stops once, and is read once a step."""

    def __init__(self, now=time.monotonic):
        self.now = now
        self.started = self.last = self.stopped = None
        self.steps = deque(maxlen=MEDIAN_STEPS)  # seconds between two calls of progress()

    def begin(self, at=None):
        self.started = self.last = self.now() if at is None else at

    def settle(self):
        """Waits until the device has finished its work; a plain Clock has no device."""

    def progress(self):
        """Fraction of the time budget that has passed, in [0, 1]. Call it once a step: it also times the steps.

        It is 1 as soon as the median step no longer fits into the budget and SLACK seconds."""
        if self.started is None:
            raise SystemExit("clock.progress: the clock has not been started: call clock.start(model, batch_size)")
        if self.steps and self.last - self.started + NEAR_END * median_high(self.steps) > TIME_BUDGET:
            self.settle()
        now = self.now()
        if now > self.last:
            self.steps.append(now - self.last)
        self.last = now
        next_end = now - self.started + (median_high(self.steps) if self.steps else 0)
        return 1.0 if next_end > TIME_BUDGET + SLACK else min((now - self.started) / TIME_BUDGET, 1.0)

    def training_seconds(self):
        """Seconds of training up to the last progress(), or up to the stop."""
        return (self.stopped or self.last) - self.started

    def check_running(self):
        if self.started is None:
            raise SystemExit("evaluate_bpb: the clock was never started: call clock.start(model, batch_size) first")
        if self.stopped is not None:
            raise SystemExit("evaluate_bpb: this run was evaluated already; a run has one val_bpb")

    def stop(self):
        """Ends the training; refuses one that took longer than its budget and SLACK."""
        self.check_running()
        self.settle()
        self.stopped = self.now()
        overrun = self.stopped - self.started - TIME_BUDGET
        if overrun > SLACK:
            raise SystemExit(
                f"training overran its {TIME_BUDGET} s by {overrun:.1f} s, {SLACK:.1f} s are allowed: call progress() "
                "once a step, stop when it is 1, and take shorter steps"
            )


# ---------------------------------------------------------------------------------------------------
# The run

_run = None  # the run in progress: evaluate_bpb stops its clock without relying on train.py to pass it in

# The watchdog ends training a little after the clock would refuse it.
TRAINING_LIMIT = TIME_BUDGET + SLACK + 30  # seconds
DEFAULT_SEED = 42
SEED_AT_IMPORT = os.environ.get("AUTORESEARCH_SEED")  # before code of train.py could set it
# An untrained model has a loss of about ln V or more. Below this fraction of it, the model has been trained on the
# text: one that knows only how often each token occurs stays above.
UNTRAINED_LOSS = 0.7


def the_run():
    return _run or sys.exit("no run was begun: call clock = begin_run(__file__) first")


class Run(Clock):
    """What train.py calls `clock`: the clock of a run together with its device, seed, data and watchdog."""

    def __init__(self, now, watchdog, device, seed, manifest, folder_fd, train_file=None, injected=True):
        super().__init__(now)
        self.run_started = now() - process_age()
        self.watchdog, self.folder_fd = watchdog, folder_fd
        self.device, self.device_name = device
        self.seed, self.manifest = seed, manifest
        self.run_id, self.val_bpb, self.summarised = uuid.uuid4().hex, None, False
        self.train_file, self.train_sha256 = train_file, train_file and sha256_files(train_file)
        self.injected = injected

    def start(self, model, batch_size):
        """Checks the untrained model and starts the clock, in whose time the model first sees text: from here every
        second and every step counts.

        batch_size: rows per batch of the later evaluation, whose memory and only compiled graph are tried here."""
        if self.started is not None:
            raise SystemExit("clock.start: the clock was started already; a run has one clock")
        self.check_code()
        check_seed(self.seed)
        model.eval()
        held = checked_logits(model, warmup_batch(batch_size, MAX_SEQ_LEN)[0])  # train.py rehearses with two
        self.known_batch = text_batch(batch_size, self.device)
        self.graphs_before = devices.compiled_graphs()
        devices.synchronize(self.device)
        began = self.now()  # what the model does when it first sees text is training
        check_untrained(model, *self.known_batch)
        del held
        model.train()
        self.watchdog.enter("training", TRAINING_LIMIT)
        self.begin(began)

    def settle(self):
        devices.synchronize(self.device)

    def stop(self):
        super().stop()
        self.watchdog.enter("evaluation", GRACE)

    def check_code(self):
        """Checks what a run has read, loaded and computed on so far; a test with its own clock may load any module."""
        guard.check_refusals()
        if sentence := devices.several_gpus():
            raise SystemExit(sentence)
        if not self.injected and (sentence := guard.foreign_module(self.train_file)):
            raise SystemExit(sentence)

    def mfu_percent(self, flops_per_token, tokens, seconds):
        return devices.mfu_percent(self.device_name, flops_per_token, tokens, seconds)

    def summary(self, *, num_steps, total_tokens, num_params, flops_per_token, depth):
        """Prints the block that ends a complete run. What train.py passes in is printed unchecked."""
        if self.val_bpb is None:
            raise SystemExit("clock.summary: there is no val_bpb yet: call evaluate_bpb first")
        if self.summarised:
            raise SystemExit("clock.summary: this run has its summary already; a run has one")
        self.check_code()
        self.summarised, seconds = True, self.training_seconds()
        self.watchdog.close()
        if self.train_file and sha256_files(self.train_file) != self.train_sha256:
            print(f"{self.train_file} changed while this run went on: the result is that of sha256 {self.train_sha256}")
        print(
            f"graphs compiled after the clock started: {devices.compiled_graphs() - self.graphs_before}",
            "---",
            f"val_bpb:          {self.val_bpb:.6f}",
            f"training_seconds: {seconds:.1f}",
            f"total_seconds:    {self.now() - self.run_started:.1f}",
            f"peak_vram_mb:     {devices.peak_memory_mb(self.device):.1f}",
            f"mfu_percent:      {self.mfu_percent(flops_per_token, total_tokens, seconds):.2f}",
            f"total_tokens_M:   {total_tokens / 1e6:.1f}",
            f"num_steps:        {num_steps}",
            f"num_params_M:     {num_params / 1e6:.1f}",
            f"depth:            {depth}",
            sep="\n", flush=True,
        )  # fmt: skip

    def close(self):
        self.watchdog.close()
        guard.allow()
        if self.folder_fd is not None:
            os.close(self.folder_fd)


def text_batch(batch_size, device):
    """The first rows of the training text: x and y, (batch_size, T) int64 each on the device."""
    with guard.prepare_reads():
        packed = pack_rows(endless_documents(open_shards(), Counter()), MAX_SEQ_LEN + 1, Counter())
        rows = np.stack([np.concatenate([t[a : a + n] for t, a, n in next(packed)]) for _ in range(batch_size)])
    x, y, _ = next(eval_batches(rows, batch_size, device))
    return x, y


def check_untrained(model, x, y):
    """Refuses a model that knows the training text already."""
    loss = token_nats(checked_logits(model, x), y).mean().item()
    if loss < UNTRAINED_LOSS * math.log(VOCAB_SIZE):
        raise SystemExit(f"the model knows the text before training (loss {loss:.2f}): start from fresh weights")


def choose_seed(injected):
    """Seeds all generators and returns the seed: AUTORESEARCH_SEED if it is set, else the same one in every run."""
    import torch

    text = os.environ.get("AUTORESEARCH_SEED")
    if text != SEED_AT_IMPORT and not injected:
        raise SystemExit("train.py sets AUTORESEARCH_SEED: take that out, since the seed is not the program's to choose")
    text = text or str(DEFAULT_SEED)
    if not text.isdecimal() or int(text) >= 2**63:
        raise SystemExit(f"AUTORESEARCH_SEED={text!r}: a whole number below 2**63 is needed")
    random.seed(int(text))
    np.random.seed(int(text) % 2**32)
    torch.manual_seed(int(text))  # of every device
    return int(text)


def check_seed(seed):
    import torch

    if (found := torch.initial_seed()) != seed:
        raise SystemExit(
            f"torch's generator was seeded with {found}, this run's seed is {seed}: take torch.manual_seed out of "
            "train.py, since another seed is luck and not progress (a torch.Generator of its own is fine)"
        )


def begin_run(train_file, *, now=time.monotonic, watchdog_now=time.monotonic):
    """Call it first, as begin_run(__file__). Seeds all generators, starts the watchdog, prints the header, returns the
    Run (with .device, .seed and .run_id). A process has one run.

    now, watchdog_now: other sources of seconds, for tests; the header then says so and such a run is not recorded."""
    global _run
    injected = not now is watchdog_now is time.monotonic
    if _run and not injected:
        raise SystemExit("begin_run: this process has begun a run already; a process has one run")
    make_output_safe()
    with guard.prepare_reads():
        if DATASET == "stdlib":  # takes seconds and no network, so a run prepares it itself
            from corpus.build import prepare

            prepare()
        manifest = load_manifest()
    if _run:
        _run.close()
    watchdog = Watchdog(watchdog_now)
    watchdog.enter("set-up", GRACE)
    folder_fd = lock_folder(Path(train_file).resolve().parent)
    choose_compile_cache()
    if injected:
        guard.allow()
    else:
        guard.forbid(train_file)
        if sentence := guard.running_code_differs(train_file):
            raise SystemExit(sentence)
    import torch

    torch.set_float32_matmul_precision("high")  # TF32 where the device has it: the same for all
    end_on_signals()
    end_on_device_errors()
    _run = run = Run(now, watchdog, pick_device(), choose_seed(injected), manifest, folder_fd, train_file, injected)
    if run.device.type == "cpu":
        devices.keep_freed_memory()
    run.check_code()
    rules_files = rules.file_hashes(Path(__file__).parent)
    header = {
        "run_id": run.run_id, "start": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "train_sha256": run.train_sha256, "rules_sha256": rules.combined_hash(rules_files),
        "data_sha256": manifest["data_sha256"], "dataset": DATASET, "seed": run.seed,
        "device": f"{run.device.type} ({run.device_name})",
        "clock": "injected" if injected else "monotonic",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "rules_files": rules_files,
    }  # fmt: skip
    print(f"run: {json.dumps(header)}")
    return run


def make_output_safe():
    """Flushes after every line, so that a killed run keeps its log, and escapes characters that stdout cannot encode (a
    non-ASCII path under cp1252 or ascii)."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


def choose_compile_cache():
    """Compiled graphs go below the cache, so that they survive a reboot; if that is read-only, to a temporary folder. A
    cache that is all of $TMPDIR, say, moves one folder down: guard tells its files from what else is there by its name."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        if guard.is_shared(path := os.environ.get(name)):
            os.environ[name] = os.path.join(path, "torchinductor")
    folder = cache_dir() / "compile"
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        pass
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


# ---------------------------------------------------------------------------------------------------
# Data


def load_tokenizer():
    with guard.prepare_reads():
        return Tokenizer(data_dir() / "tokenizer.tiktoken")


def warmup_batch(B, T):
    """Random ordinary tokens, two (B, T) int64 on the run's device: to compile and tune on before the clock starts."""
    import torch

    x = torch.randint(0, NUM_ORDINARY, (2, B, T), generator=torch.Generator().manual_seed(0))
    return tuple(x.to(the_run().device))


def make_dataloader(tokenizer, B, T, split="train"):
    """Yields (inputs, targets, epoch) without end: (B, T) int64 each on the run's device, epoch from 1.

    Rows of T + 1 tokens that start with BOS, packed best-fit; their stream does not depend on B."""
    import torch

    if split != "train":
        raise SystemExit(f"make_dataloader: split {split!r} is not available to training; evaluate_bpb scores it")
    if tokenizer.vocab_size != VOCAB_SIZE:
        raise SystemExit(f"make_dataloader: the tokenizer has {tokenizer.vocab_size} tokens, the data {VOCAB_SIZE}")
    state, run, device = Counter(), the_run(), the_run().device
    with guard.prepare_reads():
        packed = pack_rows(endless_documents(open_shards(), state), T + 1, state)
    # Two pinned buffers alternate: before one is filled again, the non-blocking copy that reads it must be done.
    pinned = device.type == "cuda"
    buffers = [torch.empty(B * (T + 1), dtype=torch.int16, pin_memory=pinned) for _ in range(2 if pinned else 1)]
    copied = [torch.cuda.Event() if pinned else None for _ in buffers]
    turn = 0
    while True:
        if run.started is None:
            raise SystemExit("make_dataloader: no data before clock.start(model, batch_size); warm up on warmup_batch")
        if run.stopped is not None:
            raise SystemExit("make_dataloader: no data after evaluate_bpb has stopped the clock")
        turn = (turn + 1) % len(buffers)
        if pinned:
            copied[turn].synchronize()
        segments = (segment for _ in range(B) for segment in next(packed))
        flat = buffers[turn].numpy().view(np.uint16)
        np.concatenate([tokens[start : start + length] for tokens, start, length in segments], out=flat)
        rows = buffers[turn].to(device, non_blocking=True)
        if pinned:
            copied[turn].record()
        rows = rows.view(B, T + 1)
        x, y = rows[:, :-1].to(torch.int64), rows[:, 1:].to(torch.int64)
        if VOCAB_SIZE > 2**15:  # the buffer is int16, as not every device can copy uint16: undo the sign
            x, y = x.bitwise_and_(0xFFFF), y.bitwise_and_(0xFFFF)
        yield x, y, state["epoch"]


# ---------------------------------------------------------------------------------------------------
# Metric (frozen/metric.py, frozen/audit.py)


def evaluate_bpb(model, tokenizer, batch_size):
    """Stops the clock and returns the run's val_bpb (bits per byte, lower is better), or refuses the run.

    The model is put into eval mode and called once before the stop, so that this costs training time. After the stop it
    may not learn: the loader returns no data, and parameters and losses must not change."""
    run = the_run()
    run.check_running()
    model.eval()
    x, y = run.known_batch
    known = x, y, token_nats(checked_logits(model, x), y)
    run.stop()
    root, files = data_dir(), run.manifest["files"]
    with guard.prepare_reads():
        if sha256_files(root / "val_rows.npy") != files["val_rows.npy"]["sha256"]:
            raise SystemExit(f"{root / 'val_rows.npy'} changed since it was prepared: run prepare.py again")
        rows, token_bytes = np.load(root / "val_rows.npy"), load_tokenizer().token_bytes()
    if int(token_bytes[rows[:, 1:]].sum()) != files["val_rows.npy"]["text_bytes"]:
        raise SystemExit("the tokenizer and the val text do not belong together: run prepare.py again")
    if not np.array_equal(tokenizer.token_bytes(), token_bytes):
        raise SystemExit("the tokenizer counts other bytes than the prepared one: take load_tokenizer()'s as it is")
    val_bpb, found = score_and_audit(model, rows, token_bytes, batch_size, draw=run.run_id, known=known)
    print(f"audit: {found}")
    run.check_code()
    run.val_bpb = val_bpb
    return run.val_bpb


def main():
    make_output_safe()
    parser = argparse.ArgumentParser(description="Download and prepare the data of AUTORESEARCH_DATASET, once.")
    parser.add_argument("--num-shards", type=int, help="climbmix: training shards, -1 for all (default: those prepared before, or 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="files downloaded at once (default: 8)")
    args = parser.parse_args()
    from corpus import build

    build.prepare(args.num_shards, args.download_workers)
    devices.fetch_attention_kernel()


if Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve() == Path(__file__).with_name("train.py").resolve():
    guard.forbid(sys.modules["__main__"].__file__)  # before begin_run: train.py may do things at its top level

if __name__ == "__main__":
    main()
