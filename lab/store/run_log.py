"""What a run left in run.log: its header, how it ended, its summary. Of a long log, only beginning and end are read.

A run's own lines are documented in prepare.py: `run: {json}` near the start, and after a line `---` the nine lines of
the summary. One run, one log: a log with two runs, two summaries or numbers that contradict each other is not a result;
RunLog.wrong says why.
"""

import ast
import codecs
import errno
import hashlib
import math
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import NamedTuple

from lab.base.text import json_of, printable, without_colours
from lab.store import names

PART = 1 << 18  # bytes read from each end of a long log
LARGEST = 1e15  # no number of a run is as large
MAX_OVERRUN = 10  # seconds that training may take beyond its budget, at most: one long step
ROUNDING = 0.05e6  # tokens: total_tokens_M has one decimal
UNEVEN = 4  # how far tokens a step may be from what the progress lines show: batches may grow and rows be short
FEW = 8  # progress lines: fewer say nothing about how even the speed was
CURVE = 50  # points of a loss curve, at most
TRACE = 3600  # characters of a crash's trace that are shown
SUMMARY = [
    "val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps",
    "num_params_M", "depth",
]  # fmt: skip
HEADER = ["run_id", "start", "train_sha256", "rules_sha256", "data_sha256", "dataset", "seed", "device", "clock"]
STEP = re.compile(r"step (\d{1,12}) \((\d{1,3}(?:\.\d+)?)%\)(.*)")
FIELDS = {"loss": r"loss (-?[\d.]+)", "milliseconds": r"([\d,]+) ms", "tokens_per_second": r"([\d,]+) tok/s",
          "mfu_percent": r"mfu ([\d.]+)%", "epoch": r"epoch (\d+)", "seconds_left": r"(\d+) s left"}  # fmt: skip
BATCH = re.compile(r"device batch: (\d{1,9}) x (\d{1,9}) tokens, (\d{1,9}) micro-batches a step")
PROGRESS = re.compile(r"step \d+ \(.*")
# Lines that a healthy run prints before its summary. A log that ends with such a line is of a run that was killed. A #
# log that ends with anything else has the reason for the failure.
HEALTHY = re.compile(
    r"run: \{|step \d+ \(|(stdlib|climbmix|tinystories) is prepared|dtype: |model: |attention: |torch\.compile: |"
    r"device batch: |warm-up again: |audit: |graphs compiled "
)
ENDED_BY_ITSELF = re.compile(
    r"^(Traceback \(most recent call last\)|FAIL|watchdog: |Fatal Python error|Segmentation fault|Aborted|"
    r"terminate called|[A-Za-z_][\w.]*(Error|Exception|Warning as error|ExceptionGroup)\b.*)",
    re.MULTILINE,
)
# What an error looks like that the machine caused, not train.py: any other train.py would have ended like this. The second
# line is what torch.save says on a full disk.
MACHINE = re.compile(
    r"No space left on device|Disk quota exceeded|Input/output error|Read-only file system|Stale file handle|"
    r"iostream error|unexpected pos \d+ vs \d+|PytorchStreamWriter failed|"
    r"Transport endpoint is not connected|Bus error|Cannot allocate memory|is not prepared|"
    r"No CUDA GPUs are available|CUDA driver (version|initiali[sz]ation)|cuda driver combination|(CUDA|ROCm)-capable device|cudaErrorDevicesUnavailable|"
    r"(CUDA|HIP) error: unknown error|ECC error|NVLink error|NVML|[Ff]allen off the bus|GPU is lost"
)
OVERRAN = re.compile(r"^training overran its .*?(?=:)", re.MULTILINE)  # in prepare.py; a stall of the machine may cause it
NOT_STARTED = re.compile(r"^(error: |bash: |sh: |zsh: |uv: |.*command not found)", re.MULTILINE)


class RunLog(NamedTuple):
    ended: str  # complete, contradictory, incomplete, crash, machine, overran, preempted, interrupted, killed, refused, nothing
    header: dict | None  # None: the run ended before it printed its header
    summary: dict | None  # the nine numbers of a complete run
    identity: str  # of this very file: its size, time and contents
    end: str  # when the file was last written, UTC
    lines: list  # the last lines that are not progress, oldest first
    wrong: str | None = None  # what the log contradicts, itself or the rules, if `ended` is "contradictory"
    told: tuple = ()  # its progress lines, as progress_of() reads them
    fault: str | None = None  # if `ended` is "machine" or "overran": what happened, in the log's words

    @property
    def slowed(self):
        """How far something temporary slowed the run's steps: the fraction by which their mean speed is below that of
        the fastest quarter, from the progress lines. 0.0 if there are fewer than FEW."""
        speeds = sorted(told["tokens_per_second"] for told in self.told if told["tokens_per_second"])
        if len(speeds) < FEW:
            return 0.0
        return 1 - len(speeds) / sum(1 / v for v in speeds) / speeds[-(len(speeds) // 4)]

    @property
    def curve(self):
        """Its loss curve as curve_of() makes it."""
        return curve_of(self.told)

    @property
    def tokens(self):
        """Tokens that the run trained on, as counted: its steps times the tokens of one, if the log has them and they
        agree with the summary's rounded number. None otherwise."""
        batch = next((found for line in reversed(self.lines) if (found := BATCH.match(line))), None)
        if not self.summary or not batch:
            return None
        counted = math.prod(map(int, batch.groups())) * int(self.summary["num_steps"])
        return counted if abs(counted - self.summary["total_tokens_M"] * 1e6) <= 1.1 * ROUNDING else None

    @property
    def run_id(self):
        return self.header["run_id"] if self.header else f"log-{self.identity}"

    def trace(self, limit=TRACE):
        """The end of the log without progress lines; long lines are shortened."""
        kept, room = [], limit
        for line in reversed(self.lines):
            line = line if len(line) <= 400 else f"{line[:200]} … {line[-180:]}"
            room -= len(line) + 1
            if room < 0:
                break
            kept.append(line)
        return "\n".join(reversed(kept))


def read(path):
    """The RunLog of a file; None if there is no such file."""
    try:
        with open(path, "rb") as f:
            stat = os.fstat(f.fileno())
            head = f.read(PART)
            gap = stat.st_size - PART > len(head)
            start = stat.st_size - PART if gap else len(head)
            start += gap and start % 2  # in UTF-16 a character starts at an even byte
            f.seek(start)
            tail = f.read(PART + 4096)  # it may have grown
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.EISDIR:
            return None
        raise
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + head + tail).hexdigest()[:16]
    encoding = encoding_of(head)
    beginning = head.decode(encoding, "replace")
    if gap:  # the line before it may be cut within a number
        beginning = beginning[: max(map(beginning.rfind, "\r\n")) + 1]
    text = without_colours(beginning + tail.decode(encoding, "replace")).lstrip("\ufeff")
    text = printable(re.sub(r"\r\n?", "\n", text), keep="\n\t")
    header = last_header(text)
    after = text[text.rindex("\nrun: {") :] if header and "\nrun: {" in text else text
    block, summary = last_summary(after)
    summary = summary if header else None  # without a header it belongs to no known run
    lines = [line.rstrip() for line in after.split("\n")]
    lines = [line for line in lines if line and not PROGRESS.match(line)]
    ended, fault = how_it_ended(after, header, block, summary)
    told = tuple(found for line in after.split("\n") if (found := progress_of(line)))
    wrong = contradiction(text, after, header, summary, time_budget(path), told) if ended == "complete" else None
    ended, summary = ("contradictory", None) if wrong else (ended, summary)
    end = datetime.fromtimestamp(stat.st_mtime, timezone.utc).isoformat(timespec="seconds")
    return RunLog(ended, header, summary, digest, end, lines[-200:], wrong, told, fault)


def last_header(text):
    """The JSON of the last `run:` line that has all its fields; None if there is no such line."""
    for line in reversed(re.findall(r"^run: (\{.*\})$", text, re.MULTILINE)):
        try:
            header = json_of(line)
        except ValueError:
            continue
        if is_header(header):
            return header
    return None


def is_header(header):
    """Whether a JSON object has the fields of a `run:` line, with the right types."""
    return all(type(header.get(key)) is (int if key == "seed" else str) for key in HEADER) and is_time(header["start"])


def is_time(text):
    """Whether the text is a time with its zone, in ISO 8601."""
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def encoding_of(head):
    """The encoding of a log by its first bytes: UTF-8, or the UTF-16 that PowerShell's `>` writes, which may lack its
    byte order mark: then nearly every second byte of a log in English is zero."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16-le" if head.startswith(codecs.BOM_UTF16_LE) else "utf-16-be"
    sample = head[:4096]
    for encoding, zeros, others in [("utf-16-le", sample[1::2], sample[::2]), ("utf-16-be", sample[::2], sample[1::2])]:
        if zeros.count(0) > 0.8 * len(zeros) and others.count(0) < 0.2 * len(others):
            return encoding
    return "utf-8"


def last_summary(text):
    """(whether a `---` line is followed by any part of a summary, its nine numbers or None)"""
    _, line, block = ("\n" + text).rpartition("\n---\n")
    found = dict(re.findall(r"^(\w+):[ \t]+(\S+)[ \t]*$", block, re.MULTILINE))
    try:
        return bool(line and found), {key: float(found[key]) for key in SUMMARY} if line else None
    except (KeyError, ValueError):
        return bool(line and found), None


def how_it_ended(text, header, block, summary):
    """(RunLog.ended, RunLog.fault) of what follows the last header."""
    if header and summary:
        return "complete", None
    last = next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")
    if not last:
        return "nothing", None
    if last in ("preempted", "interrupted"):
        return last, None
    if re.search(r"^KeyboardInterrupt\b", last):
        return "interrupted", None
    steps = list(re.finditer(r"^step \d+ \(.*$", text, re.MULTILINE))
    if error := ENDED_BY_ITSELF.search(text, steps[-1].end() if steps else 0):
        return why_it_crashed(text[error.start() :]) if header or not NOT_STARTED.search(last) else ("refused", None)
    if block:
        return "incomplete", None
    if not header:  # one sentence of a set-up that refused, or no log of train.py at all
        return "refused", None
    return ("killed", None) if HEALTHY.match(last) else why_it_crashed(last)  # a sentence: a shape was wrong


def why_it_crashed(error):
    """(crash, machine or overran; what happened in the log's words, or None) of the error that ended a run. Lines of code in
    its trace, which are indented, may contain anything. A run lives on after a warning, and what ran out of memory asked for
    too much."""
    if overran := OVERRAN.search(error):
        return "overran", overran[0]
    for line in error.split("\n"):
        if line[:1].strip() and not re.search("Warning:|out of memory|tried to allocate", line) and (found := MACHINE.search(line)):
            return "machine", found[0]
    return "crash", None


def not_finite(summary):
    """Names of the numbers that are not finite or beyond LARGEST, and val_bpb if its value is impossible."""
    wrong = [key for key, value in summary.items() if not abs(value) < LARGEST]
    return wrong or (["val_bpb"] if summary["val_bpb"] <= 0 else [])


def contradiction(text, after, header, summary, budget, told):
    """Why a log with a summary is not a result: a clause without a subject; None if nothing is wrong.

    text: the whole log; after: what follows its last header; budget: TIME_BUDGET in seconds, or None if unknown; told: its
    progress lines.
    Numbers that are not finite are left to not_finite()."""
    if len(re.findall(r"^run: \{", text, re.MULTILINE)) > 1:
        return "holds two runs: one run, one log"
    if len(re.findall(r"^val_bpb:", after, re.MULTILINE)) > 1:
        return "has more than one line `val_bpb:`: one run prints one summary"
    block = ("\n" + after).rpartition("\n---\n")[2]
    keys = re.findall(r"^(\w+):[ \t]", block, re.MULTILINE)
    if twice := [key for key in SUMMARY if keys.count(key) > 1]:
        return f"has more than one line `{twice[0]}:`: one run prints one summary"
    if not_finite(summary):
        return None
    if negative := [key for key, value in summary.items() if value < 0]:
        return f"has a negative {negative[0]}"
    seconds, tokens, steps = summary["training_seconds"], summary["total_tokens_M"] * 1e6, summary["num_steps"]
    if summary["total_seconds"] < seconds - 0.2:  # both are rounded
        return f"says that training took {seconds:g} s of {summary['total_seconds']:g} s in all"
    if budget is not None and seconds > budget + max(0.02 * budget, MAX_OVERRUN) + 0.1:
        return f"says that training took {seconds:g} s, and the budget is {budget:g} s"
    if steps != int(steps):
        return f"says that training took {steps:g} steps"
    if told and told[-1]["step"] > steps:
        return f"has a progress line of step {told[-1]['step']}, and its summary says {steps:.0f} steps"
    if any(found["loss"] is not None and found["loss"] < 0 for found in told):
        return "has a negative training loss, which no cross-entropy is"
    if tokens > 0 if steps == 0 else tokens + ROUNDING < steps:
        return f"says that {steps:.0f} steps trained on {tokens / 1e6:g} million tokens"
    a_step = [f["milliseconds"] * f["tokens_per_second"] / 1000 for f in told if f["milliseconds"] and f["tokens_per_second"]]
    if steps and a_step:
        least, most = (tokens - ROUNDING) / steps, (tokens + ROUNDING) / steps
        if most < min(a_step) / UNEVEN or least > max(a_step) * UNEVEN:
            return (
                f"says that {steps:.0f} steps trained on {tokens / 1e6:g} million tokens, and its progress lines show "
                f"{min(a_step):,.0f} to {max(a_step):,.0f} tokens a step"
            )
    return None


def time_budget(path):
    """TIME_BUDGET of the constants.py beside a run.log: a number, or None. It is read and not imported: the log may be
    of another tree than the one that this program was started from."""
    try:
        tree = ast.parse((Path(path).parent / names.CONSTANTS).read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["TIME_BUDGET"]:
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            return value if isinstance(value, int | float) and not isinstance(value, bool) else None
    return None


def progress_of(line):
    """{"step", "percent", "loss", ...: number, or None if the line lacks it} of a progress line; None for another line.
    A run may print anything: a value that is not a finite number is None."""
    step = STEP.match(line)
    if not step:
        return None
    found = {"step": int(step[1]), "percent": float(step[2])}
    for key, pattern in FIELDS.items():
        match = re.search(pattern, step[3])
        found[key] = finite(match[1]) if match else None
    return found


def curve_of(told):
    """At most CURVE points [progress in [0, 1], smoothed training loss in nats, tokens/s or None] of these progress lines
    (progress_of), in the order of progress. Of more lines, each point stands for several: it has the last one's progress
    and loss, and the median of their tokens/s. A line without a loss, or with less progress than the one before it, is
    left out."""
    points = []
    for found in told:
        progress, loss, speed = round(found["percent"] / 100, 4), found["loss"], found["tokens_per_second"]
        if loss is None or not 0 <= loss < LARGEST or progress > 1 or (points and progress < points[-1][0]):
            continue
        if points and progress == points[-1][0]:
            points.pop()
        points.append([progress, loss, speed if speed is not None and 0 <= speed < LARGEST else None])
    if len(points) <= CURVE:
        return points
    bounds = [i * len(points) // CURVE for i in range(CURVE + 1)]
    groups = [points[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return [[*group[-1][:2], median([p[2] for p in group if p[2] is not None] or [None])] for group in groups]


def is_curve(value):
    """Whether a JSON value is a curve as curve_of() makes it."""
    return (
        isinstance(value, list) and len(value) <= CURVE
        and all(isinstance(point, list) and len(point) == 3 for point in value)
        and all(is_number(x) or i == 2 and x is None for point in value for i, x in enumerate(point))
        and all(a[0] < b[0] for a, b in zip(value, value[1:], strict=False))
    )  # fmt: skip


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST  # NaN is not


def finite(text):
    """The finite number that a text shows, or None."""
    try:
        value = float(str(text).replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def progress(path):
    """The last progress line of a run in progress; "" before the first."""
    try:
        with open(path, "rb") as f:
            encoding = encoding_of(f.read(4096))
            f.seek(max(0, os.fstat(f.fileno()).st_size // 2 * 2 - 4096))
            lines = re.split(r"[\r\n]+", without_colours(f.read().decode(encoding, "replace")))
    except OSError:
        return ""
    return next((line for line in reversed(lines) if PROGRESS.match(line)), "")
