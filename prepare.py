"""Data, tokenizer, dataloader, clock and metric: everything about a run that the agent must not edit.

    uv run prepare.py                                  download, tokenise, pack; continues after a kill
    uv run prepare.py --num-shards 4                   a smaller ClimbMix; -1 for all of it
    AUTORESEARCH_DATASET=stdlib uv run prepare.py      no download: Python's own standard library

Writes only below ~/.cache/autoresearch (AUTORESEARCH_CACHE replaces it). A tour, in the order in which a run calls:

    clock = begin_run(__file__)      watchdog on, folder locked, header printed          "The run"
    warmup_batch(B, T)               random tokens: compile and tune on these            "Data"
    clock.start(model, batch_size)   checks the untrained model, then time counts        "The run"
    make_dataloader(...)             packed rows of the training text                    "Data"
    clock.progress()                 fraction of the time budget used, once a step       "The clock"
    evaluate_bpb(...)                stops the clock, audits the model, scores it        "Metric"
    clock.summary(...)               the block of numbers that ends a run                "The run"

What the data look like and how they are made is in corpus/; device, watchdog and lock are in frozen/. All of it is
covered by the hash of the rules (corpus/rules.py). A refusal is a SystemExit with one sentence. torch is imported
inside the functions that use it: preparing the data does not need it, and loading it costs seconds and memory.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
import uuid
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from constants import DATASET, GRACE, MAX_SEQ_LEN, TIME_BUDGET, VOCAB_SIZE
from corpus import rules
from corpus.layout import cache_dir, data_dir, load_manifest
from corpus.packing import pack_rows
from corpus.shards import endless_documents, open_shards
from corpus.system import sha256_files
from corpus.tokenizer import NUM_ORDINARY, Tokenizer
from frozen import device as devices
from frozen.device import FA3_KERNEL, pick_device  # noqa: F401 (train.py and lab take them from here)
from frozen.process import Watchdog, end_on_signals, lock_folder, process_age

# ---------------------------------------------------------------------------------------------------
# The clock

# Training may end late by one step, because it ends between two steps, but no step may be so long that a run gains
# by it. Shorter overruns are always allowed: synchronising, a machine that hiccups.
ALLOWED_OVERRUN = 0.02 * TIME_BUDGET  # seconds, whatever the steps
LONGEST_ALLOWED_STEP = 10  # seconds


class Clock:
    """Times the training of one run: begins once, stops once, and is read once a step."""

    def __init__(self, now=time.monotonic):
        self.now = now
        self.started = self.last = self.stopped = None
        self.longest_step = 0.0

    def begin(self):
        self.started = self.last = self.now()

    def progress(self):
        """Fraction of the time budget that has passed, in [0, 1]. Call it once a step: it also times the steps."""
        if self.started is None:
            raise SystemExit("clock.progress: the clock has not been started: call clock.start(model, batch_size)")
        now = self.now()
        self.longest_step, self.last = max(self.longest_step, now - self.last), now
        return min((now - self.started) / TIME_BUDGET, 1.0)

    def training_seconds(self):
        """Seconds of training up to the last progress(), or up to the stop."""
        return (self.stopped or self.last) - self.started

    def stop(self):
        """Ends the training; refuses one that took longer than its budget."""
        if self.started is None:
            raise SystemExit("evaluate_bpb: the clock was never started: call clock.start(model, batch_size) first")
        if self.stopped is not None:
            raise SystemExit("evaluate_bpb: this run was evaluated already; a run has one val_bpb")
        self.stopped = self.now()
        overrun = self.stopped - self.started - TIME_BUDGET
        if overrun > max(ALLOWED_OVERRUN, min(self.longest_step, LONGEST_ALLOWED_STEP)):
            raise SystemExit(
                f"training overran its {TIME_BUDGET} s by {overrun:.1f} s: stop at progress 1, with shorter steps"
            )


# ---------------------------------------------------------------------------------------------------
# The run

_run = None  # the run in progress: evaluate_bpb stops its clock without relying on train.py to pass it in

# The watchdog ends training a little after the clock would refuse it. 30 s are for a last step on a slow machine.
TRAINING_LIMIT = 1.02 * TIME_BUDGET + 30  # seconds
# An untrained model has a loss of about ln V or more. Below this fraction of it, it has seen the text: a model that
# knows no more than how often each token occurs stays above.
UNTRAINED_LOSS = 0.7


def the_run():
    return _run or sys.exit("no run was begun: call clock = begin_run(__file__) first")


class Run(Clock):
    """What train.py calls `clock`: the clock of a run together with its device, seed, data and watchdog."""

    def __init__(self, now, watchdog, device, seed, manifest, folder_fd):
        super().__init__(now)
        self.run_started = now() - process_age()
        self.watchdog, self.folder_fd = watchdog, folder_fd
        self.device, self.device_name = device
        self.seed, self.manifest = seed, manifest
        self.run_id, self.val_bpb = uuid.uuid4().hex, None

    def start(self, model, batch_size):
        """Checks the untrained model, then starts the clock: from here every second and every step counts.

        batch_size: rows of the later evaluation, whose memory and whose only graph are tried here."""
        if self.started is not None:
            raise SystemExit("clock.start: the clock was started already; a run has one clock")
        check_untrained(model, batch_size, self.device)
        self.graphs_before = devices.compiled_graphs()
        devices.synchronize(self.device)
        self.watchdog.enter("training", TRAINING_LIMIT)
        self.begin()

    def stop(self):
        devices.synchronize(self.device)
        super().stop()
        self.watchdog.enter("evaluation", GRACE)

    def mfu_percent(self, flops_per_token, tokens, seconds):
        return devices.mfu_percent(self.device_name, flops_per_token, tokens, seconds)

    def summary(self, *, num_steps, total_tokens, num_params, flops_per_token, depth):
        """Prints the block that ends a complete run. What train.py passes in is printed unchecked."""
        if self.val_bpb is None:
            raise SystemExit("clock.summary: there is no val_bpb yet: call evaluate_bpb first")
        seconds = self.training_seconds()
        self.watchdog.close()
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
        if self.folder_fd is not None:
            os.close(self.folder_fd)


def check_untrained(model, batch_size, device):
    """Refuses a model that cannot be evaluated, or that knows the training text already. Leaves it in train mode."""
    packed = pack_rows(endless_documents(open_shards(), Counter()), MAX_SEQ_LEN + 1, Counter())
    rows = np.stack([np.concatenate([t[a : a + n] for t, a, n in next(packed)]) for _ in range(batch_size)])
    model.eval()
    held = checked_logits(model, warmup_batch(batch_size, MAX_SEQ_LEN)[0])  # the audit needs room for two
    x, y, _ = next(eval_batches(rows, batch_size, device))
    loss = token_nats(checked_logits(model, x), y).mean().item()
    del held
    if loss < UNTRAINED_LOSS * math.log(VOCAB_SIZE):
        raise SystemExit(f"the model knows the text before training (loss {loss:.2f}): start from fresh weights")
    model.train()


def begin_run(train_file, seed=42, *, now=time.monotonic, watchdog_now=time.monotonic):
    """Call it first. Starts the watchdog, prints the header, returns the Run (with .device, .seed and .run_id).

    now, watchdog_now: other sources of seconds, for tests; the header then says so and such a run is not recorded."""
    global _run
    seed_text = os.environ.get("AUTORESEARCH_SEED") or str(seed)
    if not seed_text.isdecimal() or int(seed_text) >= 2**63:
        raise SystemExit(f"AUTORESEARCH_SEED={seed_text!r}: a whole number below 2**63 is needed")
    make_output_safe()
    if DATASET == "stdlib":  # takes seconds and no network, so a run does it by itself
        from corpus.build import prepare

        prepare()
    manifest = load_manifest()
    if _run:
        _run.close()
    watchdog = Watchdog(watchdog_now)
    watchdog.enter("set-up", GRACE)
    folder_fd = lock_folder(Path(train_file).resolve().parent)
    choose_compile_cache()
    import torch

    end_on_signals()
    _run = run = Run(now, watchdog, pick_device(), int(seed_text), manifest, folder_fd)
    rules_files = rules.file_hashes(Path(__file__).parent)
    header = {
        "run_id": run.run_id, "start": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "train_sha256": sha256_files(train_file), "rules_sha256": rules.combined_hash(rules_files),
        "data_sha256": manifest["data_sha256"], "dataset": DATASET, "seed": run.seed,
        "device": f"{run.device.type} ({run.device_name})",
        "clock": "monotonic" if now is watchdog_now is time.monotonic else "injected",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "rules_files": rules_files,
    }  # fmt: skip
    print(f"run: {json.dumps(header)}")
    return run


def make_output_safe():
    """A run that is killed keeps every line of its log, and no character stops it that stdout cannot encode (a
    non-ASCII path under cp1252 or ascii)."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


def choose_compile_cache():
    """Compiled graphs go below the cache, so that they survive a reboot; if that is read-only, to a temporary folder."""
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
    packed = pack_rows(endless_documents(open_shards(), state), T + 1, state)
    # Two pinned buffers in turn: before one is filled again, the non-blocking copy that reads it must be done.
    pinned = device.type == "cuda"
    buffers = [torch.empty(B * (T + 1), dtype=torch.int16, pin_memory=pinned) for _ in range(2 if pinned else 1)]
    copied = [torch.cuda.Event() if pinned else None for _ in buffers]
    turn = 0
    while True:
        if run.started is None:
            raise SystemExit("make_dataloader: no data before clock.start(model, batch_size); warm up on warmup_batch")
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
# Metric

# Logits that a batch may move by between two identical passes: the distance between neighbouring bf16 numbers at 15,
# where the default model caps its logits. Kernels that add in another order each time stay below; dropout does not.
NOISE_LIMIT = 0.125
# Logits that may move when what the model must not see changes. An honest model moves by 0, or by its noise between
# identical passes; one that leaks a thousandth of the mean of the sequence by 0.001 to 0.05.
LEAK_LIMIT, LEAK_NOISE_RATIO = 1e-4, 4
AUDITED_CUTS = 8  # positions after which the future is replaced, over all rows and passes
# Nats that any target of the first batch may move by from the first pass to the last: more than rounding does.
LEARNING_LIMIT = 0.1
NATS_AT_ONCE = 2**15  # targets whose logits are converted to float32 together, to save memory


def checked_logits(model, x):
    """model(x) without gradients: (B, T, V) and finite, or a SystemExit."""
    import torch

    with torch.no_grad():
        logits = model(x)
    expected = (*x.shape, VOCAB_SIZE)
    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SystemExit(f"model(x) returned {got}: evaluation needs logits of shape (B, T, V) = {expected}")
    if not torch.isfinite(logits.sum(dtype=torch.float32)):
        raise SystemExit("model(x) returned logits that are not finite (NaN or infinity): the training diverged")
    return logits


def token_nats(logits, y):
    """Cross-entropy of each target in nats, float32 (B, T)."""
    import torch
    import torch.nn.functional as F

    step = max(1, NATS_AT_ONCE // y.shape[1])  # rows
    parts = zip(logits.split(step), y.split(step), strict=True)
    nats = [F.cross_entropy(a.float().flatten(0, 1), b.flatten(), reduction="none").view_as(b) for a, b in parts]
    return torch.cat(nats)


def eval_batches(rows, batch_size, device):
    """Yields (x, y, real) for rows (uint16 (R, T + 1)): x and y are (batch_size, T) int64 on the device, of which the
    first `real` rows count. The last batch is filled up with row 0, so that all batches have one shape."""
    import torch

    for i in range(0, len(rows), batch_size):
        index = np.arange(i, i + batch_size)
        part = rows[np.where(index < len(rows), index, 0)].astype(np.int64)
        part = torch.from_numpy(part).to(device)
        yield part[:, :-1].contiguous(), part[:, 1:].contiguous(), min(batch_size, len(rows) - i)


def score_rows(model, rows, token_bytes, batch_size):
    """Bits per byte of a model in eval mode: sum of nats over ln 2 times the bytes that the scored targets stand for.

    rows: uint16 (R, T + 1). token_bytes: int32 (V,); targets of zero bytes are left out of both sums.
    The model sees only the inputs. It sees the first batch again at the end: if its answer changed, it is refused."""
    import torch

    device = next(model.parameters()).device
    token_bytes = torch.from_numpy(token_bytes).to(device)
    sums, first = [], None
    for x, y, real in eval_batches(rows, batch_size, device):
        nats, sizes = token_nats(checked_logits(model, x), y)[:real], token_bytes[y[:real]]
        first = (x, y, nats) if first is None else first
        sums.append(torch.stack([(nats * (sizes > 0)).sum(), sizes.sum().float()]))
    nats, text_bytes = torch.stack(sums).cpu().double().sum(0).tolist()
    x, y, before = first
    moved = (token_nats(checked_logits(model, x), y)[: len(before)] - before).abs().max().item()
    if moved > LEARNING_LIMIT:
        raise SystemExit(f"the model learns while it is scored: the first rows moved by {moved:.3f} nats: refused")
    return nats / (math.log(2) * text_bytes)


def audit(model, rows, batch_size, device):
    """Refuses a model whose prediction depends on what it must not see: its own future, or the other rows.

    It needs trained weights, because zero-initialised projections hide a leak. What the model must not see is replaced
    by one other token a row (a mixture of tokens would move a mean 5 to 20 times less)."""
    import torch

    generator = torch.Generator().manual_seed(len(rows))
    x = next(eval_batches(rows, batch_size, device))[0]
    B, T = x.shape
    other = torch.randint(NUM_ORDINARY - 1, (B, 1), generator=generator).to(device)
    other = other + (x == other)
    base = checked_logits(model, x)

    def moves(changed, watched):
        """Largest change of the logits where `watched`, bool (B, T), after replacing x where `changed`."""
        logits = checked_logits(model, torch.where(changed, other, x))
        return max(((a - b).abs().amax(-1) * w).max().item() for a, b, w in zip(logits, base, watched, strict=True))

    def check(changed, sentence):
        if (moved := moves(changed, ~changed)) > limit:
            if moves(~everything, everything) > limit:  # the logits of unchanged inputs have moved, too
                sentence = "the model learns while it is scored"
            raise SystemExit(f"{sentence} (logits moved by {moved:.2g}): refused")

    everything = torch.ones_like(x, dtype=torch.bool)
    noise = moves(~everything, everything)
    if noise > NOISE_LIMIT:
        raise SystemExit(f"two identical passes differ by {noise:.3f}: in eval mode the model must be deterministic")
    limit = max(LEAK_LIMIT, LEAK_NOISE_RATIO * noise)
    row = torch.arange(B, device=device)[:, None].expand(B, T)
    for bit in range(2 * (B - 1).bit_length()):  # any two row numbers differ in a bit: one is watched while the other changes
        check((row >> bit // 2) % 2 == bit % 2, "the model's rows depend on other rows of their batch")
    for i in range(max(2, AUDITED_CUTS // B)):
        cuts = torch.randint(1, T, (B, 1), generator=generator)
        cuts[0] = (T - 1, T // 8)[i] if i < 2 else cuts[0]
        check(torch.arange(T, device=device) >= cuts.to(device), "the model sees its own future")
    print(f"audit: passed (identical passes differ by {noise:.2g}, limit {limit:.2g})")


def evaluate_bpb(model, tokenizer, batch_size):
    """Stops the clock and returns the run's val_bpb (bits per byte, lower is better), or refuses the run."""
    run = the_run()
    run.stop()
    root, files = data_dir(), run.manifest["files"]
    if sha256_files(root / "val_rows.npy") != files["val_rows.npy"]["sha256"]:
        raise SystemExit(f"{root / 'val_rows.npy'} changed since it was prepared: run prepare.py again")
    rows, token_bytes = np.load(root / "val_rows.npy"), tokenizer.token_bytes()
    if (counted := int(token_bytes[rows[:, 1:]].sum())) != files["val_rows.npy"]["text_bytes"]:
        raise SystemExit(f"the tokenizer counts {counted} bytes of val text, the manifest has another number: refused")
    model.eval()
    audit(model, rows, batch_size, run.device)
    run.val_bpb = score_rows(model, rows, token_bytes, batch_size)
    return run.val_bpb


def main():
    make_output_safe()
    parser = argparse.ArgumentParser(description="Download and prepare the data of AUTORESEARCH_DATASET, once.")
    parser.add_argument("--num-shards", type=int, help="climbmix: training shards, -1 for all (default: 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="files downloaded at once (default: 8)")
    args = parser.parse_args()
    from corpus import build

    build.prepare(args.num_shards, args.download_workers)
    devices.fetch_attention_kernel()


if __name__ == "__main__":
    main()
