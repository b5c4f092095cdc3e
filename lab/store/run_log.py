"""What a run left in run.log: who it was, how it ended, its summary. Reads a long log's beginning and end only.

A run's own lines are documented in prepare.py: `run: {json}` near the start, and after a line `---` the nine
lines of the summary.
"""

import errno
import hashlib
import json
import math
import os
import re
from datetime import datetime, timezone
from typing import NamedTuple

from lab.base.text import printable, without_colours

PART = 1 << 18  # bytes read from each end of a long log
TRACE = 3600  # characters of a crash's trace that are shown
SUMMARY = [
    "val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps",
    "num_params_M", "depth",
]  # fmt: skip
HEADER = ["run_id", "start", "train_sha256", "rules_sha256", "data_sha256", "dataset", "seed", "device", "clock"]
STEP = re.compile(r"step (\d{1,12}) \((\d{1,3}(?:\.\d+)?)%\)(.*)")
FIELDS = {"loss": r"loss ([\d.]+)", "milliseconds": r"([\d,]+) ms", "tokens_per_second": r"([\d,]+) tok/s",
          "mfu_percent": r"mfu ([\d.]+)%", "epoch": r"epoch (\d+)", "seconds_left": r"(\d+) s left"}  # fmt: skip
PROGRESS = re.compile(r"step \d+ \(.*")
# What a run in good health says of itself before its summary: one that ends with such a line was killed. One that
# ends with anything else said why it gave up.
HEALTHY = re.compile(
    r"run: \{|step \d+ \(|(stdlib|climbmix|tinystories) is prepared|dtype: |model: |attention: |torch\.compile: |"
    r"device batch: |warm-up again: |audit: |graphs compiled "
)
ENDED_BY_ITSELF = re.compile(
    r"^(Traceback \(most recent call last\)|FAIL|watchdog: |Fatal Python error|Segmentation fault|Aborted|"
    r"terminate called|[A-Za-z_][\w.]*(Error|Exception|Warning as error|ExceptionGroup)\b.*)",
    re.MULTILINE,
)
NOT_STARTED = re.compile(r"^(error: |bash: |sh: |zsh: |uv: |.*command not found)", re.MULTILINE)


class RunLog(NamedTuple):
    ended: str  # complete, incomplete, crash, preempted, interrupted, killed, refused, nothing
    header: dict | None  # None: the run ended before it said who it was
    summary: dict | None  # the nine numbers of a complete run
    identity: str  # of this very file: its size, time and contents
    end: str  # when the file was last written, UTC
    lines: list  # the last lines that are not progress, oldest first

    @property
    def run_id(self):
        return self.header["run_id"] if self.header else f"log-{self.identity}"

    def trace(self, limit=TRACE):
        """The end of the log without progress lines, and shorter where a line is long."""
        kept, room = [], limit
        for line in reversed(self.lines):
            line = line if len(line) <= 400 else f"{line[:200]} … {line[-180:]}"
            room -= len(line) + 1
            if room < 0:
                break
            kept.append(line)
        return "\n".join(reversed(kept))


def read(path):
    """The RunLog of a file; None where there is none."""
    try:
        with open(path, "rb") as f:
            stat = os.fstat(f.fileno())
            head = f.read(PART)
            start = max(len(head), stat.st_size - PART)
            f.seek(start)
            tail = f.read(PART + 4096)  # it may have grown
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.EISDIR:
            return None
        raise
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + head + tail).hexdigest()[:16]
    gap = b"\n" if start > len(head) else b""
    text = re.sub(r"\r\n?", "\n", without_colours((head + gap + tail).decode(errors="replace")))
    text = printable(text, keep="\n\t")
    header = last_header(text)
    after = text[text.rindex("\nrun: {") :] if header and "\nrun: {" in text else text
    block, summary = last_summary(after)
    lines = [line.rstrip() for line in after.split("\n")]
    lines = [line for line in lines if line and not PROGRESS.match(line)]
    ended = how_it_ended(after, header, block, summary)
    end = datetime.fromtimestamp(stat.st_mtime, timezone.utc).isoformat(timespec="seconds")
    return RunLog(ended, header, summary, digest, end, lines[-200:])


def last_header(text):
    """The JSON of the last `run:` line that has all its fields; None where there is none."""
    for line in reversed(re.findall(r"^run: (\{.*\})$", text, re.MULTILINE)):
        try:
            header = json.loads(line)
        except ValueError:
            continue
        if all(isinstance(header.get(key), int if key == "seed" else str) for key in HEADER):
            return header
    return None


def last_summary(text):
    """(there is a `---` line with something of a summary after it, its nine numbers or None)"""
    _, line, block = ("\n" + text).rpartition("\n---\n")
    found = dict(re.findall(r"^(\w+):[ \t]+(\S+)[ \t]*$", block, re.MULTILINE))
    try:
        return bool(line and found), {key: float(found[key]) for key in SUMMARY} if line else None
    except (KeyError, ValueError):
        return bool(line and found), None


def how_it_ended(text, header, block, summary):
    if header and summary:
        return "complete"
    last = next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")
    if not last:
        return "nothing"
    if last in ("preempted", "interrupted"):
        return last
    if re.search(r"^KeyboardInterrupt\b", last):
        return "interrupted"
    steps = list(re.finditer(r"^step \d+ \(.*$", text, re.MULTILINE))
    if ENDED_BY_ITSELF.search(text, steps[-1].end() if steps else 0):
        return "crash" if header or not NOT_STARTED.search(last) else "refused"
    if block:
        return "incomplete"
    if not header:  # one sentence of a set-up that refused, or no log of train.py at all
        return "refused"
    return "killed" if HEALTHY.match(last) else "crash"  # a sentence: evaluation refused, a shape was wrong


def not_finite(summary):
    """Names of the numbers that are not finite, and val_bpb where it is no possible value."""
    wrong = [key for key, value in summary.items() if not math.isfinite(value)]
    return wrong or (["val_bpb"] if summary["val_bpb"] <= 0 else [])


def progress_of(line):
    """{"step", "percent", "loss", ...: number, or None if the line does not tell} of a progress line; None for another
    line. A run prints what it likes: what is not a finite number is None."""
    step = STEP.match(line)
    if not step:
        return None
    found = {"step": int(step[1]), "percent": float(step[2])}
    for key, pattern in FIELDS.items():
        match = re.search(pattern, step[3])
        found[key] = finite(match[1]) if match else None
    return found


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
            f.seek(max(0, os.fstat(f.fileno()).st_size - 4096))
            lines = re.split(r"[\r\n]+", f.read().decode(errors="replace"))
    except OSError:
        return ""
    return next((line for line in reversed(lines) if PROGRESS.match(line)), "")
