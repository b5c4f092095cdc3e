"""What differs on Windows, macOS, AMD and Apple GPUs, as far as it can be tried on Linux: a Python without fcntl, most
signals and symbolic links; a file that cannot be replaced because somebody reads it; another encoding; what torch says
of devices that are not there. (dtype, compile and attention by device: test_model.py, test_attention.py.)
"""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakenight import FakeNight
from test_run import TINY, set_knob

import prepare
import train
from frozen import device as devices
from lab.base import locks

# Runs `python ARGS` in a Python that lacks what Windows' has not. What is imported before that is the libraries' own
# business: they have their Windows code, which is not to be tried on Linux.
WINDOWS = """
import asyncio, ctypes, logging, multiprocessing.connection, os, platform, runpy, shutil, signal, socket, subprocess, sys
import filelock, psutil, tempfile, time
if any(arg.endswith("train.py") for arg in sys.argv):
    import numpy, requests, tiktoken, torch

sys.modules["fcntl"] = None
for module, names in {
    signal: "SIGHUP SIGKILL SIGUSR1 SIGUSR2 SIGQUIT SIGALRM SIGCHLD SIGCONT SIGSTOP SIGPIPE alarm pthread_sigmask",
    os: "killpg getpgid getpgrp setsid fork getuid geteuid getgid sched_getaffinity sysconf statvfs getloadavg mkfifo WNOHANG",
    time: "clock_gettime CLOCK_BOOTTIME",
}.items():
    for name in names.split():
        delattr(module, name)

def symlink(*args, **kwargs):
    raise OSError(22, "A required privilege is not held by the client")

really_open = os.open
def open_no_folder(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return really_open(path, *args, **kwargs)

os.symlink, os.open, sys.platform = symlink, open_no_folder, "win32"
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class WindowsNight(FakeNight):
    """A night whose commands run in such a Python."""

    def lab(self, *args, cwd=None, timeout=60, **env):
        done = subprocess.run(
            [sys.executable, "-c", WINDOWS, "-m", "lab", *args], cwd=cwd or self.path, env=self.env | env, timeout=timeout,
            capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return SimpleNamespace(rc=done.returncode, out=done.stdout, err=done.stderr)


# --- Windows ------------------------------------------------------------------


@pytest.mark.slow
def test_a_night_is_recorded_without_locks_signals_and_links(tmp_path):
    night = WindowsNight(tmp_path / "tree")
    night.baseline()
    kept, result = night.experiment("wider", 0.95)
    assert result.out.startswith("keep")
    _, result = night.experiment("worse", 1.05)
    assert result.out.startswith("discard")
    assert night.head() == kept and night.archives() == [f"0001-{night.rows()[0][0]}", f"0002-{night.rows()[1][0]}"]
    best = tmp_path / "tree" / "runs" / "best"
    assert not best.is_symlink() and best.read_text() == night.archives()[1], "a file that names it, in place of a link"
    status = night.lab("status")
    assert status.rc == 0 and "row 0002" in status.out and not status.err
    assert json.loads(night.lab("status", "--json").out)["in_progress"] is False
    with locks.hold(night.path / ".lab" / "lock"):
        result = night.lab("record", "at the same time", timeout=120)
    assert result.rc == 1 and "another record is running in this tree" in result.err


def test_the_help_of_every_command_is_there(tmp_path):
    from lab.__main__ import COMMANDS

    night = WindowsNight(tmp_path)
    shown = night.lab("--help")
    assert shown.rc == 0, shown.err
    for name in COMMANDS:
        if (Path(train.__file__).parent / "lab" / f"{name}.py").exists():
            assert re.search(rf"^    {name}\s", shown.out, re.MULTILINE), name


@pytest.mark.parametrize(
    "command, needle", [(["night", "--agent", "x"], "Linux or macOS"), (["sandbox"], "for Linux only")], ids=["night", "sandbox"]
)  # fmt: skip
def test_what_windows_cannot_do_is_one_line(tmp_path, command, needle):
    result = WindowsNight(tmp_path).lab(*command, PATH=f"{bare_path(tmp_path)}")
    assert result.rc == 1 and needle in result.err and len(result.err.splitlines()) == 1, result.err


def bare_path(folder):
    """A PATH with git alone."""
    (folder / "bin").mkdir()
    git = subprocess.run(["sh", "-c", "command -v git"], capture_output=True, text=True).stdout.strip()
    (folder / "bin" / "git").symlink_to(git)
    return folder / "bin"


def test_a_training_runs_to_its_end(make_repo, prepared_stdlib):
    repo = make_repo(time_budget=1, grace=250)
    repo.copy_cache(prepared_stdlib)
    for name, value in TINY.items():
        set_knob(repo, name, value)
    result = repo.run("-c", WINDOWS, "train.py", timeout=200)
    assert result.rc == 0, result.err
    assert re.search(r"^val_bpb: +\d+\.\d{6}$", result.out, re.MULTILINE) and (repo.path / "checkpoint.pt").exists()
    assert re.search(r"^total_seconds: +\d", result.out, re.MULTILINE)


HELD = """
import os, sys, errno
from lab import __main__
really, held = os.replace, sys.argv.pop(1)

def replace(source, target):
    if os.path.basename(target) == held:
        raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used", str(target))
    really(source, target)

os.replace = replace
raise SystemExit(__main__.main())
"""


@pytest.mark.parametrize("held", ["results.tsv", "runs.jsonl", "best"])
def test_a_file_that_another_program_holds_open_stops_a_record_half_way_and_nothing_is_lost(tmp_path, held):
    night = FakeNight(tmp_path / "tree")
    night.baseline()
    night.change_train()
    night.commit("wider")
    night.run(0.95)
    done = subprocess.run(
        [sys.executable, "-c", HELD, held, "record", "wider"],
        cwd=night.path,
        env=night.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1 and held in done.stderr, done.stderr
    assert "nothing is lost: run the same command again" in done.stderr
    result = night.recorded("wider")
    assert result.out.startswith("keep") and [row[4] for row in night.rows()] == ["baseline", "wider"]
    night.check()


def test_what_files_hold_does_not_depend_on_the_locale(tmp_path):
    """Windows' own encoding is not UTF-8; here it is ASCII, which is less."""
    night = FakeNight(tmp_path / "tree")
    night.baseline()
    night.experiment("größer → 大", 0.95)
    night.env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (night.path / "program.md").write_text("Größe zählt.\n", encoding="utf-8")
    night.change_train("# Größe → 大\n" + night.read("train.py"))
    night.commit("größer noch")
    night.run(0.90)
    assert night.recorded("another").out.startswith("keep")
    assert [row[4] for row in night.rows()] == ["baseline", "größer → 大", "another"]
    assert night.lab("status").rc == 0
    night.check()


# --- devices ------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """machine(gpu=None, capability=None, hip=None, mps=False): what torch reports."""

    def be(gpu=None, capability=(8, 0), hip=None, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return be


@pytest.mark.parametrize(
    "reported, device, name",
    [
        (dict(gpu="NVIDIA H100 80GB HBM3", capability=(9, 0)), "cuda", "NVIDIA H100 80GB HBM3"),
        (dict(gpu="NVIDIA A100-SXM4-80GB", mps=True), "cuda", "NVIDIA A100-SXM4-80GB"),
        (dict(gpu="NVIDIA A100-SXM4-80GB MIG 3g.40gb"), "cuda", "NVIDIA A100-SXM4-80GB MIG 3g.40gb"),
        (dict(gpu="AMD Instinct MI300X", capability=(9, 4), hip="6.4"), "cuda", "AMD Instinct MI300X"),
        (dict(mps=True), "mps", ", [0-9]+ cores"),
        (dict(), "cpu", ", [0-9]+ cores"),
    ],
    ids=["H100", "A100", "MIG", "ROCm", "Apple", "CPU"],
)
def test_the_device_is_the_best_that_torch_reports(machine, reported, device, name):
    machine(**reported)
    chosen, said = devices.pick_device()
    assert chosen.type == device and re.search(name, said)


def test_a_rocm_gpu_trains_in_bfloat16_compiled_by_triton_on_flex(machine, monkeypatch):
    machine(gpu="AMD Instinct MI300X", capability=(9, 4), hip="6.4")
    device = torch.device("cuda")
    assert train.choose_dtype(device)[0] == torch.bfloat16
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(train, "COMPILE", True)
    assert train.choose_compile(device) == (True, "triton")
    attention, reason = train.choose_attention(device, torch.bfloat16)
    assert attention.name == "flex", reason


def test_of_two_gpus_the_first_visible_one_decides_everything(monkeypatch):
    """Name, dtype, attention and peak speed are those of one device, the one that the tensors are on."""
    names, capabilities = ["Tesla T4", "NVIDIA H100 80GB HBM3"], [(7, 5), (9, 0)]

    def index(device=None):
        return torch.device(device or "cuda").index or 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: names[index(device)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[index(device)])
    for first in range(2):
        if first:
            names.reverse(), capabilities.reverse()
        device, name = devices.pick_device()
        assert device.type == "cuda" and name == names[0]
        dtype, why = train.choose_dtype(device)
        assert dtype == (torch.bfloat16 if first else torch.float32) and f"{capabilities[0][0]}." in why
        monkeypatch.setitem(train.ATTENTIONS, "fa3", lambda: train.SDPA._replace(name="fa3"))
        assert train.choose_attention(device, dtype)[0].name == ("fa3" if first else "flex")
        assert (devices.mfu_percent(name, 1e9, 1e6, 1.0) > 0) == bool(first)


class Gpus:
    """Stands in for torch.cuda's memory statistics. allocated: of each GPU, how many tensors it has had."""

    def __init__(self, monkeypatch, *allocated, initialized=True, key="allocation.all.allocated"):
        self.allocated, self.key, self.asked = allocated, key, []
        for name, value in {
            "is_available": lambda: True, "is_initialized": lambda: initialized, "device_count": lambda: len(allocated),
            "memory_stats": self.memory_stats,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def memory_stats(self, device):
        self.asked.append(device)
        return {self.key: self.allocated[device]} if self.allocated[device] is not None else {}


@pytest.mark.parametrize("key", ["allocation.all.allocated", "allocated_bytes.all.peak"])
def test_a_run_that_has_used_more_than_one_gpu_is_refused(monkeypatch, key):
    Gpus(monkeypatch, 7, 3, 0, 1, key=key)
    sentence = devices.several_gpus()
    assert sentence.startswith("this run used GPUs [0, 1, 3]: a run has one, so that results compare"), sentence
    assert "clock.device" in sentence and "\n" not in sentence
    run = prepare.Run.__new__(prepare.Run)
    run.injected = True
    with pytest.raises(SystemExit, match=re.escape("this run used GPUs [0, 1, 3]")):
        run.check_code()


@pytest.mark.parametrize("allocated", [(7,), (7, 0, 0), (0, 7), (7, None), ()])
def test_one_gpu_of_many_or_none_is_fine(monkeypatch, allocated):
    Gpus(monkeypatch, *allocated)
    assert devices.several_gpus() is None


def test_before_cuda_is_used_nothing_is_asked_of_it(monkeypatch):
    gpus = Gpus(monkeypatch, 7, 7, initialized=False)
    assert devices.several_gpus() is None and gpus.asked == []


def test_cores_are_counted_where_there_is_no_affinity_and_no_proc(machine, monkeypatch):
    machine()
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(devices, "CPUINFO", Path("/nowhere"))
    monkeypatch.setattr(devices.platform, "processor", lambda: "Apple M4")
    assert devices.pick_device()[1] == f"Apple M4, {os.cpu_count()} cores"


def test_macos_compiles_with_the_compiler_it_has(monkeypatch):
    asked = []
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(train, "COMPILE", True)
    monkeypatch.setattr(train.shutil, "which", lambda name: asked.append(name) or name)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert train.choose_compile(torch.device("cpu")) == (True, "clang++") and asked == ["clang++"]


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_stays_in_the_process():
    """In a child process: allocating the same block again takes no new page faults, which by default it does."""

    def faults(call):
        script = (
            "from resource import RUSAGE_SELF, getrusage\n"
            "from frozen.device import keep_freed_memory\n"
            f"{call}\n"
            "import torch\n"
            "for _ in range(8): torch.ones(2**24)\n"  # 64 MiB each: above glibc's largest threshold of its own
            "before = getrusage(RUSAGE_SELF).ru_minflt\n"
            "for _ in range(4): torch.ones(2**24)\n"
            "print(getrusage(RUSAGE_SELF).ru_minflt - before)"
        )
        command, folder = [sys.executable, "-c", script], Path(train.__file__).parent
        return int(subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout)

    assert 4 * faults("keep_freed_memory()") < faults("pass")  # with huge pages both are few


def test_other_c_libraries_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(devices.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: pytest.fail("there is no mallopt to call"))
    devices.keep_freed_memory()
