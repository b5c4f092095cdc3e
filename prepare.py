"""Data, tokenizer, dataloader, clock and metric: everything about a run that is not the agent's to edit.

    uv run prepare.py                                  download, tokenise, pack: once, resumed after any kill
    uv run prepare.py --num-shards 4                   a smaller ClimbMix; -1 for all of it
    AUTORESEARCH_DATASET=stdlib uv run prepare.py      no download: Python's own standard library

Writes only below ~/.cache/autoresearch (AUTORESEARCH_CACHE moves it). What is done once stands in corpus/, so
that this file, the half of every run that the agent must not touch, is read at one sitting:
begin_run -> warmup_batch -> clock.start -> make_dataloader, clock.progress -> evaluate_bpb -> clock.summary.

A refusal is a SystemExit with one sentence. torch is imported inside the functions that compute with it:
preparing needs none, and its workers and its second run would spend seconds and memory on loading it.
"""

import argparse
import base64
import faulthandler
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import uuid
from bisect import bisect_left, insort
from collections import Counter
from datetime import datetime, timezone
from itertools import repeat
from pathlib import Path

import numpy as np
import tiktoken

from constants import DATASET, EVAL_TOKENS, GRACE, MAX_SEQ_LEN, TIME_BUDGET, VOCAB_SIZE

# GPT-4's split pattern, but digits in groups of one or two: a small vocabulary has no room for a thousand triples.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>"]
NUM_ORDINARY = VOCAB_SIZE - len(SPECIAL_TOKENS)  # ids below are text, BOS is the first from here on
PACKING_BUFFER = 1000  # documents that best-fit chooses from
DATA_RULES = {  # what the data depends on: prepared again, in a folder of its own, where any of it differs
    "format": 1, "dataset": DATASET, "max_seq_len": MAX_SEQ_LEN, "eval_tokens": EVAL_TOKENS, "vocab_size": VOCAB_SIZE,
    "split_pattern": SPLIT_PATTERN, "packing_buffer": PACKING_BUFFER,
    "python": platform.python_version() if DATASET == "stdlib" else "any",
}  # fmt: skip
# FlashAttention-3, pinned to a version that its publisher keeps stable; fetched by prepare.py, never by a run.
FA3_KERNEL = {"repo_id": "kernels-community/flash-attn3", "version": 1}

# ---------------------------------------------------------------------------------------------------
# What is on disk


def cache_dir():
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def data_dir():
    digest = hashlib.sha256(json.dumps(DATA_RULES, sort_keys=True).encode()).hexdigest()
    return cache_dir() / DATASET / digest[:12]


def sha256_files(*paths):
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def offsets_path(shard):
    return shard.with_name(shard.stem + "_offsets.npy")


def read_manifest(path):
    """The manifest at `path`, or None where there is none of these rules."""
    try:
        manifest = json.loads(path.read_text())
        return manifest if manifest["rules"] == DATA_RULES else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def damaged_file(root, files):
    """A sentence on the first file that is not as long as its manifest entry says; None where all are."""
    for name, entry in files.items():
        size = (root / name).stat().st_size if (root / name).exists() else 0
        if size != entry["bytes"]:
            return f"{root / name} is damaged: {size:,} of {entry['bytes']:,} bytes are there"
    return None


def load_manifest():
    root = data_dir()
    command = f"run `{'' if DATASET == 'climbmix' else f'AUTORESEARCH_DATASET={DATASET} '}uv run prepare.py`"
    if not (manifest := read_manifest(root / "manifest.json")):
        raise SystemExit(f"{DATASET} is not prepared in {root}: {command} once")
    if sentence := damaged_file(root, manifest["files"]):
        raise SystemExit(f"{sentence}: {command} to mend it")
    return manifest


class Tokenizer:
    """BPE over bytes: ordinary tokens first, then the four special ones, of which the first is BOS."""

    def __init__(self, path):
        lines = [line.split() for line in Path(path).read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self.num_ordinary, self.vocab_size = len(ranks), len(ranks) + len(specials)
        self.bos_id = len(ranks)

    def pieces(self, text):
        """The text in pieces: on a run of a million spaces the regular expression would overflow tiktoken's stack."""
        return [text[i : i + 100_000] for i in range(0, len(text), 100_000)]

    def encode(self, text):
        return [i for piece in self.pieces(text) for i in self.encoding.encode_ordinary(piece)]

    def decode(self, ids):
        return self.encoding.decode(list(ids))

    def token_bytes(self):
        """Bytes each token stands for, int32 (V,): what its rank was made of, not what it would decode to by
        itself (a lone continuation byte is 1 byte, its replacement character 3). Special tokens have none."""
        sizes = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.num_ordinary)]
        return np.array(sizes + [0] * len(SPECIAL_TOKENS), dtype=np.int32)


def pack_rows(documents, capacity, state):
    """Best-fit packing: yields each row as a list of (tokens, start, length) that together fill `capacity`.

    documents: iterator of (length, tokens, start). A row takes, as long as it has room, the longest buffered
    document that fits whole; where none does, the shortest, cropped to fill. Equal lengths: first come, first
    served. The buffer is kept in order of length, so that a choice is one bisection and not a scan.
    state, a Counter: "cropped" grows by the tokens that are thrown away."""
    order = []  # ints: length << 40 | (2**40 - 1 - arrival), so that of equal lengths the first comes last
    where = {}  # the low 40 bits -> document
    arrival = low_bits = (1 << 40) - 1
    while True:
        row, room = [], capacity
        while room:
            while len(order) < PACKING_BUFFER and (document := next(documents, None)):
                insort(order, document[0] << 40 | arrival)
                where[arrival] = document
                arrival -= 1
            if not order:
                return
            i = bisect_left(order, (room + 1) << 40) - 1
            if i < 0:
                i = bisect_left(order, ((order[0] >> 40) + 1) << 40) - 1
            length, tokens, start = where.pop(order.pop(i) & low_bits)
            if length > room:
                state["cropped"] += length - room
                length = room
            row.append((tokens, start, length))
            room -= length
        yield row


# ---------------------------------------------------------------------------------------------------
# A run: clock and watchdog

_clock = None  # of the run in progress: evaluate_bpb stops it without having to trust train.py to hand it over


def the_clock():
    return _clock or sys.exit("no run was begun: call clock = begin_run(__file__) first")


# Dense bf16 TFLOP/s with float32 accumulation, from the vendors' datasheets; the first that the name matches.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989.5, "H200 NVL": 835.5, "H200": 989.5, "H100 NVL": 835.5,
    "H100 PCIe": 756.5, "H100": 989.5, "A100": 312, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125, "L40S": 362,
    "L40": 181, "L4": 121, "RTX A6000": 154.8, "RTX 6000 Ada": 364.2, "RTX 5090$": 209.5, "RTX 4090$": 165.2,
    "RTX 4080$": 97.5, "RTX 3090$": 71, "MI325X": 1307.4, "MI300X": 1307.4, "MI250X": 191.5, "MI210": 181,
}  # fmt: skip


def pick_device():
    """The device a run trains on, and its name for the log. ROCm answers as cuda."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    name = f"{model[1] if model else platform.processor() or platform.machine()}, {cores} cores"
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu"), name


def process_age():
    """Seconds since this process started (0.0 where /proc does not tell): imports belong to a run's total too."""
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return 0.0


class Clock:
    """Set-up, training, evaluation, done: what a run may spend on each, and what it spent."""

    def __init__(self, now, watchdog_now):
        self.now, self.watchdog_now, self.real = now, watchdog_now, watchdog_now is time.monotonic
        self.run_started = now() - process_age()
        self.started = self.last = self.stopped = self.val_bpb = None
        self.longest_step = 0.0
        self.folder_fd = None
        self.enter("set-up", GRACE)
        threading.Thread(target=self.watch, daemon=True).start()

    def enter(self, stage, limit):
        self.stage, self.deadline, self.limit = stage, self.watchdog_now() + limit, limit
        faulthandler.cancel_dump_traceback_later()
        if self.real and stage != "done":  # for a hang that holds the interpreter's lock, where watch() never wakes
            faulthandler.dump_traceback_later(limit + 10, exit=True, file=sys.__stderr__)

    def close(self):
        self.enter("done", 0)
        if self.folder_fd is not None:
            os.close(self.folder_fd)

    def watch(self):
        while self.stage != "done":
            time.sleep(0.2)
            if self.stage != "done" and self.watchdog_now() > self.deadline:
                message = f"\nwatchdog: {self.stage} took longer than {self.limit:.0f} s; all stacks follow\n"
                os.write(2, message.encode())
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                os._exit(1)

    def start(self, model, batch_size):
        """Looks the untrained model over, then starts the clock: from here every second and every step counts.

        batch_size: rows of the later evaluation, whose memory and whose one graph are tried here."""
        import torch

        if self.stage != "set-up":
            raise SystemExit(f"clock.start: the clock was started already (now: {self.stage}); a run has one clock")
        packed = pack_rows(train_documents(open_shards(), Counter()), MAX_SEQ_LEN + 1, Counter())
        rows = np.stack([np.concatenate([t[a : a + n] for t, a, n in next(packed)]) for _ in range(batch_size)])
        model.eval()
        held = checked_logits(model, warmup_batch(batch_size, MAX_SEQ_LEN)[0])  # the audit needs room for two
        x, y, _ = next(eval_batches(rows, batch_size, self.device))
        loss = token_nats(checked_logits(model, x), y).mean().item()
        del held
        if loss < 0.7 * math.log(VOCAB_SIZE):
            raise SystemExit(f"the model knows the text before training (loss {loss:.2f}): start from fresh weights")
        model.train()
        self.graphs = compiled_graphs()
        getattr(torch, self.device.type).synchronize()
        self.enter("training", 1.02 * TIME_BUDGET + 30)
        self.started = self.last = self.now()

    def progress(self):
        """Share of the time budget that has passed, in [0, 1]. Call it once a step: it also times the steps."""
        if self.started is None:
            raise SystemExit("clock.progress: the clock has not been started: call clock.start(model, batch_size)")
        now = self.now()
        self.longest_step, self.last = max(self.longest_step, now - self.last), now
        return min((now - self.started) / TIME_BUDGET, 1.0)

    def training_seconds(self):
        return (self.stopped or self.last) - self.started

    def stop(self):
        import torch

        if self.started is None:
            raise SystemExit("evaluate_bpb: the clock was never started: call clock.start(model, batch_size) first")
        if self.stopped is not None:
            raise SystemExit("evaluate_bpb: this run was evaluated already; a run has one val_bpb")
        getattr(torch, self.device.type).synchronize()
        self.stopped = self.now()
        over = self.stopped - self.started - TIME_BUDGET
        if over > max(0.02 * TIME_BUDGET, min(self.longest_step, 10)):
            raise SystemExit(
                f"training overran its {TIME_BUDGET} s by {over:.1f} s: stop at progress 1, with shorter steps"
            )
        self.enter("evaluation", GRACE)

    def mfu_percent(self, flops_per_token, tokens, seconds):
        """0.0 where no datasheet was looked up: an unknown peak is not guessed."""
        peaks = [peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}(?!\w|.* MIG)", self.device_name)]
        return 100 * flops_per_token * tokens / (seconds * peaks[0] * 1e12) if peaks and seconds else 0.0

    def summary(self, *, num_steps, total_tokens, num_params, flops_per_token, depth):
        """Prints the block that ends a complete run; what train.py passes in is reported, not verified."""
        import torch

        if self.val_bpb is None:
            raise SystemExit("clock.summary: there is no val_bpb yet: call evaluate_bpb first")
        seconds = self.training_seconds()
        vram = torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else 0.0
        self.enter("done", 0)
        print(
            f"graphs compiled after the clock started: {compiled_graphs() - self.graphs}",
            "---",
            f"val_bpb:          {self.val_bpb:.6f}",
            f"training_seconds: {seconds:.1f}",
            f"total_seconds:    {self.now() - self.run_started:.1f}",
            f"peak_vram_mb:     {vram:.1f}",
            f"mfu_percent:      {self.mfu_percent(flops_per_token, total_tokens, seconds):.2f}",
            f"total_tokens_M:   {total_tokens / 1e6:.1f}",
            f"num_steps:        {num_steps}",
            f"num_params_M:     {num_params / 1e6:.1f}",
            f"depth:            {depth}",
            sep="\n", flush=True,
        )  # fmt: skip


def compiled_graphs():
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported: nothing was compiled, nor need it be loaded
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def end_early(number, _frame):
    """SIGTERM: the machine is wanted elsewhere. No result and no crash: such a run is simply run again."""
    word, code = {signal.SIGTERM: ("preempted", 75), signal.SIGINT: ("interrupted", 130)}[number]
    os.write(1, f"\n{word}\n".encode())
    os._exit(code)


def begin_run(train_file, seed=42, *, now=time.monotonic, watchdog_now=time.monotonic):
    """Call it first. Arms the watchdog, prints who runs what on what, returns the Clock (with .device and .seed).

    now, watchdog_now: other sources of seconds, for tests; the header then says so and no such run is recorded."""
    global _clock
    seed_text = os.environ.get("AUTORESEARCH_SEED") or str(seed)
    if not seed_text.isdecimal() or int(seed_text) >= 2**63:
        raise SystemExit(f"AUTORESEARCH_SEED={seed_text!r}: a whole number below 2**63 is needed")
    sys.stdout.reconfigure(line_buffering=True)  # a run that is killed leaves its log
    if DATASET == "stdlib":  # seconds, and no network: nobody needs to be told to do it
        from corpus.build import prepare

        prepare()
    manifest, compile_dir = load_manifest(), cache_dir() / "compile"
    if _clock:
        _clock.close()
    _clock = clock = Clock(now, watchdog_now)
    clock.folder_fd = lock_folder(Path(train_file).resolve().parent)
    try:
        compile_dir.mkdir(exist_ok=True)
    except OSError:
        pass  # read-only data: compiled graphs then go to the system's temporary folder
    if os.access(compile_dir, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_dir))
    import torch

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end_early)
        signal.signal(signal.SIGINT, end_early)
    clock.device, clock.device_name = pick_device()
    clock.seed, clock.manifest = int(seed_text), manifest
    header = {
        "run_id": uuid.uuid4().hex, "start": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "train_sha256": sha256_files(train_file),
        "rules_sha256": sha256_files(*(Path(__file__).with_name(name) for name in ("constants.py", "prepare.py"))),
        "data_sha256": manifest["data_sha256"], "dataset": DATASET, "seed": clock.seed,
        "device": f"{clock.device.type} ({clock.device_name})",
        "clock": "monotonic" if now is watchdog_now is time.monotonic else "injected",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    clock.run_id = header["run_id"]
    print(f"run: {json.dumps(header)}")
    return clock


def lock_folder(folder):
    """Locks the folder of train.py until this process ends: two runs there would overwrite each other's
    checkpoint.pt, and `lab record` must know that a run is going on. None where there is no flock (Windows)."""
    try:
        import fcntl

        fd = os.open(folder, os.O_RDONLY)
        for _ in range(20):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:  # perhaps somebody who only looks: status and dashboard hold it for a moment
                time.sleep(0.05)
        raise SystemExit(f"another run is going on in {folder}: wait for it, or train in another checkout")
    except (ImportError, OSError):
        return None  # a file system without locks


# ---------------------------------------------------------------------------------------------------
# A run: data


def load_tokenizer():
    return Tokenizer(data_dir() / "tokenizer.tiktoken")


def warmup_batch(B, T):
    """Random ordinary tokens, two (B, T) int64 on the run's device: to compile and tune on before the clock starts."""
    import torch

    x = torch.randint(0, NUM_ORDINARY, (2, B, T), generator=torch.Generator().manual_seed(0))
    return tuple(x.to(the_clock().device))


def open_shards():
    """The training shards as [(tokens uint16 (N,), offsets int64 (documents + 1,))], memory-mapped."""
    paths = [data_dir() / f"train_{i:05d}.npy" for i in range(load_manifest()["train_shards"])]
    return [(np.asarray(np.load(p, mmap_mode="r")), np.load(offsets_path(p), mmap_mode="r")) for p in paths]


def train_documents(shards, state):
    """Endless (length, tokens, start), in order; state, a Counter, counts each "epoch"."""
    while True:
        state["epoch"] += 1
        for tokens, offsets in shards:
            for i in range(0, len(offsets) - 1, 1 << 16):
                bounds = np.asarray(offsets[i : i + (1 << 16) + 1])
                yield from zip(np.diff(bounds).tolist(), repeat(tokens), bounds[:-1].tolist())  # noqa: B905 (repeat)


def make_dataloader(tokenizer, B, T, split="train"):
    """Yields (inputs, targets, epoch) without end: (B, T) int64 each on the run's device, epoch from 1.

    Rows of T + 1 tokens that start with BOS, packed best-fit; their stream does not depend on B."""
    import torch

    if split != "train":
        raise SystemExit(f"make_dataloader: split {split!r} is not handed out; evaluate_bpb scores it")
    if tokenizer.vocab_size != VOCAB_SIZE:
        raise SystemExit(f"make_dataloader: the tokenizer has {tokenizer.vocab_size} tokens, the data {VOCAB_SIZE}")
    state, clock, device = Counter(), the_clock(), the_clock().device
    packed = pack_rows(train_documents(open_shards(), state), T + 1, state)
    # Two pinned buffers take turns, and each waits for the copy that reads it before it is filled again.
    pinned = device.type == "cuda"
    buffers = [torch.empty(B * (T + 1), dtype=torch.int16, pin_memory=pinned) for _ in range(2 if pinned else 1)]
    copied = [torch.cuda.Event() if pinned else None for _ in buffers]
    turn = 0
    while True:
        if clock.started is None:
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
        if VOCAB_SIZE > 2**15:  # int16 stands in for uint16, which not every device can copy
            x, y = x.bitwise_and_(0xFFFF), y.bitwise_and_(0xFFFF)
        yield x, y, state["epoch"]


# ---------------------------------------------------------------------------------------------------
# A run: metric


def checked_logits(model, x):
    """model(x) without gradients: (B, T, V) and finite, or a refusal."""
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
    """Cross-entropy of each target in nats, float32 (B, T), a few rows at a time to bound the float32 copy."""
    import torch
    import torch.nn.functional as F

    step = max(1, 2**15 // y.shape[1])
    parts = zip(logits.split(step), y.split(step), strict=True)
    nats = [F.cross_entropy(a.float().flatten(0, 1), b.flatten(), reduction="none").view_as(b) for a, b in parts]
    return torch.cat(nats)


def eval_batches(rows, batch_size, device):
    """(x, y, real) for each batch of rows (uint16 (R, T + 1)): the last one filled up with row 0, real rows counted."""
    import torch

    for i in range(0, len(rows), batch_size):
        index = np.arange(i, i + batch_size)
        part = rows[np.where(index < len(rows), index, 0)].astype(np.int64)
        part = torch.from_numpy(part).to(device)
        yield part[:, :-1].contiguous(), part[:, 1:].contiguous(), min(batch_size, len(rows) - i)


def score_rows(model, rows, token_bytes, batch_size):
    """Bits per byte of a model in eval mode: sum of nats over ln 2 times the bytes that the scored targets stand for.

    rows: uint16 (R, T + 1). token_bytes: int32 (V,); targets of zero bytes are left out of both sums.
    The model sees the inputs alone, and the first batch again at the end: had scoring changed it, it is refused."""
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
    if moved > 0.1:
        raise SystemExit(f"the model learns while it is scored: the first rows moved by {moved:.3f} nats: refused")
    return nats / (math.log(2) * text_bytes)


def audit(model, rows, batch_size, device):
    """Refuses a model whose prediction depends on what it may not see: its own future, or the other rows.
    Run on trained weights (zero-initialised projections hide a leak). What it may not see becomes one other token a
    row (a mix would move a mean 5 to 20 times less), and no logit may move by more than max(1e-4, 4 x what identical
    passes differ by): leaking a thousandth of the sequence mean moves one by 0.001 to 0.05, an honest model by 0."""
    import torch

    generator = torch.Generator().manual_seed(len(rows))
    x = next(eval_batches(rows, batch_size, device))[0]
    B, T = x.shape
    other = torch.randint(NUM_ORDINARY - 1, (B, 1), generator=generator).to(device)
    other = other + (x == other)
    base = checked_logits(model, x)

    def moves(changed, watched):
        """Largest move of the watched logits, bool (B, T), when the model reads x with `changed` replaced."""
        logits = checked_logits(model, torch.where(changed, other, x))
        return max(((a - b).abs().amax(-1) * w).max().item() for a, b, w in zip(logits, base, watched, strict=True))

    def check(changed, sentence):
        if (moved := moves(changed, ~changed)) > limit:
            if moves(~everything, everything) > limit:  # unchanged inputs have other logits by now
                sentence = "the model learns while it is scored"
            raise SystemExit(f"{sentence} (logits moved by {moved:.2g}): refused")

    everything = torch.ones_like(x, dtype=torch.bool)
    noise = moves(~everything, everything)
    if noise > 0.125:  # the spacing of bf16 numbers at 15, where the default model caps its logits
        raise SystemExit(f"two identical passes differ by {noise:.3f}: in eval mode the model must be deterministic")
    limit = max(1e-4, 4 * noise)
    row = torch.arange(B, device=device)[:, None].expand(B, T)
    for bit in range(2 * (B - 1).bit_length()):  # any two rows differ in a bit: each is watched as the other changes
        check((row >> bit // 2) % 2 == bit % 2, "the model's rows depend on other rows of their batch")
    for i in range(max(2, 8 // B)):
        cuts = torch.randint(1, T, (B, 1), generator=generator)
        cuts[0] = (T - 1, T // 8)[i] if i < 2 else cuts[0]
        check(torch.arange(T, device=device) >= cuts.to(device), "the model sees its own future")
    print(f"audit: passed (identical passes differ by {noise:.2g}, limit {limit:.2g})")


def evaluate_bpb(model, tokenizer, batch_size):
    """Stops the clock and returns the run's val_bpb (bits per byte, lower is better); refuses what is not earned."""
    clock = the_clock()
    clock.stop()
    root, files = data_dir(), clock.manifest["files"]
    if sha256_files(root / "val_rows.npy") != files["val_rows.npy"]["sha256"]:
        raise SystemExit(f"{root / 'val_rows.npy'} changed since it was prepared: run prepare.py again")
    rows, token_bytes = np.load(root / "val_rows.npy"), tokenizer.token_bytes()
    if (counted := int(token_bytes[rows[:, 1:]].sum())) != files["val_rows.npy"]["text_bytes"]:
        raise SystemExit(f"the tokenizer counts {counted} bytes of val text, the manifest has another number: refused")
    model.eval()
    audit(model, rows, batch_size, clock.device)
    clock.val_bpb = score_rows(model, rows, token_bytes, batch_size)
    return clock.val_bpb


def main():
    parser = argparse.ArgumentParser(description="Download and prepare the data of AUTORESEARCH_DATASET, once.")
    parser.add_argument("--num-shards", type=int, help="climbmix: shards to train on, -1 for all (default: 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="files fetched at once (default: 8)")
    args = parser.parse_args()
    from corpus import build

    build.prepare(args.num_shards, args.download_workers)
    build.fetch_attention_kernel()


if __name__ == "__main__":
    main()
