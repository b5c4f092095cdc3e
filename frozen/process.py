"""The process of a run: its age, its watchdog, how signals and errors of the device end it, and the lock on its folder."""

import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

LOOK_SECONDS = 0.2  # between two checks of the watchdog's deadline
# A hang that holds the interpreter's lock also stops the watchdog's thread: faulthandler, which needs no lock, ends the
# process this many seconds after the deadline.
FALLBACK_SECONDS = 10
DEVICE_ERROR = re.compile(r"(CUDA|HIP|cuDNN|Triton)( driver)? error", re.IGNORECASE)  # of RuntimeErrors
LOCK_ATTEMPTS, LOCK_WAIT_SECONDS = 20, 0.05  # `lab status` and the dashboard hold the lock for some milliseconds


def process_age():
    """Seconds since this process started: a run's total includes its imports. 0.0 if the system does not report it."""
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return 0.0


class Watchdog:
    """Ends the process, with the stacks of all threads, when a stage takes longer than its limit."""

    def __init__(self, now=time.monotonic):
        self.now = now
        self.current = None  # (stage, limit, deadline), replaced as a whole: another thread reads it

    def enter(self, stage, limit):
        """Begins `stage`, which may take `limit` seconds."""
        is_first, self.current = self.current is None, (stage, limit, self.now() + limit)
        faulthandler.cancel_dump_traceback_later()
        if self.now is time.monotonic:  # faulthandler has no other clock
            faulthandler.dump_traceback_later(limit + FALLBACK_SECONDS, exit=True, file=sys.__stderr__)
        if is_first:
            threading.Thread(target=self._watch, daemon=True).start()

    def close(self):
        """Stops watching."""
        self.current = (None, 0, float("inf"))
        faulthandler.cancel_dump_traceback_later()

    def _watch(self):
        while (current := self.current)[0]:
            stage, limit, deadline = current
            if self.now() > deadline and self.current is current:
                os.write(2, f"\nwatchdog: {stage} took longer than {limit:.0f} s; all stacks follow\n".encode())
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                os._exit(1)
            time.sleep(LOOK_SECONDS)


def _end(number, _frame):
    word, code = {signal.SIGTERM: ("preempted", 75), signal.SIGINT: ("interrupted", 130)}[number]
    try:
        os.write(1, f"\n{word}\n".encode())
    finally:  # on a full disk or a closed pipe too: an error would end the run like a crash
        os._exit(code)


def end_on_signals():
    """SIGTERM (the machine is needed for something else) and Ctrl-C end the run at once, with one word in the log: it
    is neither a result nor a crash and is simply run again. A segmentation fault and its like print their stacks, so that
    the log does not look like that of a run that was killed; the exit status stays the signal's."""
    if not faulthandler.is_enabled():
        faulthandler.enable(file=sys.__stderr__)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
        signal.signal(signal.SIGINT, _end)


def end_on_device_errors():
    """An error of the device that nobody handles ends the run with one line and exit status 1; all other errors keep
    their trace. The exit is immediate: libraries that clean up on a lost device may hang or abort."""
    previous = sys.excepthook

    def hook(kind, error, trace):
        if sentence := device_failure(error, trace):
            print(sentence, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)
        previous(kind, error, trace)

    sys.excepthook = hook


def device_failure(error, trace):
    """One line about an error of the device (lost, out of memory, a kernel that failed); None for any other error."""
    import torch

    text = str(error).strip().partition("\n")[0]
    short = isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|ALLOC_FAILED", text)
    if not short and not isinstance(error, torch.AcceleratorError) and not DEVICE_ERROR.match(text):
        return None
    frames = [f for f in traceback.extract_tb(trace) if os.path.basename(f.filename) == "train.py"]
    where = f" (train.py, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    remedy = "see nvidia-smi for other processes, or lower DEVICE_BATCH_SIZE in train.py"
    if not short:
        remedy = "if nvidia-smi shows a healthy GPU, CUDA_LAUNCH_BLOCKING=1 shows the line of train.py that fails"
    return f"{type(error).__name__}: {text}{where}: {remedy}"


def lock_folder(folder):
    """Locks the folder of train.py until this process ends, and returns the file descriptor that holds the lock.

    Two runs in one folder would overwrite each other's checkpoint.pt, and `lab record` must know if a run is in
    progress. None if there is no flock (Windows, some network file systems). SystemExit if another run holds the
    lock."""
    try:
        import fcntl

        fd = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            time.sleep(LOCK_WAIT_SECONDS)
        except OSError:  # a file system without locks
            os.close(fd)
            return None
    raise SystemExit(f"another run is going on in {folder}: wait for it, or train in another checkout")
