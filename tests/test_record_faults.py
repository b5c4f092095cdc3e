"""lab record where files are broken, the machine fails, or it is killed: one row, one archive, nothing lost."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile

import pytest
from fakenight import PROGRESS, ROOT, FakeNight

from lab.store import run_log

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A baseline, a keep, a discard."""
    night = FakeNight(tmp_path_factory.mktemp("faults") / "night")
    night.baseline()
    night.experiment("good", 0.99)
    night.experiment("bad", 1.01)
    return night


@pytest.fixture
def night(template, tmp_path):
    return template.copy(tmp_path / "night")


def ready(night, val_bpb=0.98, **run):
    """An experiment that has run and is not recorded; its commit."""
    night.change_train()
    commit = night.commit("idea")
    night.run(val_bpb, **run)
    return commit


# --- results.tsv ---------------------------------------------------------------------

GOOD_ROWS = ["keep", "keep", "discard", "keep"]


@pytest.mark.parametrize(
    "broken, strange",
    [
        (None, False),
        ("", False),
        (HEADER, False),
        ("crlf", False),
        ("\ufeff" + HEADER, False),
        ("commit,val_bpb,status\n", True),
        (HEADER + "abc1234\t0.9\t44.0\tok\twritten by hand\n", True),
        (HEADER + "abc1234\tabout 0.9\t44.0\tkeep\ttext for a number\n", True),
        (HEADER + "abc1234\t0.900000\t44.0\tkeep\ta row that no record wrote\n", True),
        (HEADER + "abc1234\t0.9\n\n\n", True),
        (b"\xff\xfe\x00binary\n", True),
    ],
)
def test_results_tsv_is_made_right_again_and_what_was_in_it_is_kept(night, broken, strange):
    path = night.path / "results.tsv"
    if broken is None:
        path.unlink()
    elif broken == "crlf":
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    else:
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    before = path.read_bytes() if path.exists() else b""
    ready(night)
    result = night.recorded("idea")
    assert [row[3] for row in night.rows()] == GOOD_ROWS
    assert ("results.tsv held what record did not write" in result.out) == strange
    copies = list((night.path / ".lab").glob("results-*.tsv"))
    assert len(copies) == strange
    if strange and isinstance(broken, str):
        assert copies[0].read_bytes() == before
    night.check()


def test_a_last_line_of_runs_jsonl_cut_short_is_left_out_and_foreign_lines_stay(night):
    path = night.path / "runs.jsonl"
    path.write_text("# a note of mine\n" + path.read_text() + '{"run_id": "cut sho')
    ready(night)
    night.recorded("idea")
    text = path.read_text()
    assert text.startswith("# a note of mine\n") and "cut sho" not in text
    assert [row[3] for row in night.rows()] == GOOD_ROWS


def test_numbers_go_on_where_the_refs_are_even_if_the_results_were_deleted(night):
    for name in ("runs.jsonl", "results.tsv"):
        (night.path / name).unlink()
    ready(night)
    night.recorded("idea")
    assert "refs/autoresearch/test/0004" in night.refs() and len(night.refs().splitlines()) == 5
    assert [row[3] for row in night.rows()] == GOOD_ROWS


# --- descriptions --------------------------------------------------------------------


@pytest.mark.parametrize(
    "description",
    [
        "tabs\tand\ttabs",
        "lines\nand\r\nlines\u2028and\u2029more\x0b\x0c\x85",
        'quotes " and \' and \\ and `$(rm -rf x)`',
        "emoji 🚀👩‍🚀 and ünïcödé",
        "x" * 10_000,
        "word " * 2_000,
        "\x1b[31mred\x1b[0m\x07",
        "--looks like=an option",
        "NaN",
    ],
)
def test_any_description_makes_a_row_that_every_reader_reads(night, description):
    import csv
    import io

    import pandas

    ready(night)
    night.recorded("--", description)
    rows = night.rows()
    assert len(rows) == 4 and len(rows[-1][4]) <= 200 and '"' not in rows[-1][4]
    assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in rows[-1][4])
    text = night.read("results.tsv")
    assert list(csv.reader(io.StringIO(text), delimiter="\t"))[1:] == rows
    table = pandas.read_csv(io.StringIO(text), sep="\t", dtype=str, keep_default_na=False)
    assert table.shape == (4, 5) and table["description"].tolist() == [row[4] for row in rows]
    night.check()


# --- run.log and checkpoint.pt ---------------------------------------------------------


@pytest.mark.parametrize(
    "content, needle",
    [
        (None, "there is no run.log: uv run train.py > run.log 2>&1"),
        (b"", "run.log is empty"),
        (b"\n\n", "run.log is empty"),
        (bytes(range(256)) * 4000, "the run did not begin"),
        (b"bash: uv: command not found\n", "the run did not begin (bash: uv: command not found)"),
        (b"climbmix is not prepared in /x: uv run prepare.py once\n", "uv run prepare.py once"),
        (b'run: {"run_id": "cut', "the run did not begin"),
        (b'run: {"run_id": 7}\n---\nval_bpb: 0.1\n', "run it again"),
    ],
)
def test_a_log_that_is_none_is_refused_with_what_it_says(night, content, needle):
    ready(night)
    path = night.path / "run.log"
    path.unlink() if content is None else path.write_bytes(content)
    assert needle.lower() in night.refused("idea").lower()


def test_a_log_from_another_commit_is_refused(night):
    ready(night)
    night.change_train()
    night.commit("another")
    assert "another train.py than HEAD's: uv run train.py" in night.refused("idea")


def test_a_log_without_a_header_that_is_older_than_the_commit_is_refused(night):
    (night.path / "run.log").write_text("Traceback (most recent call last):\nSyntaxError: of yesterday\n")
    os.utime(night.path / "run.log", (1e9, 1e9))
    night.change_train()
    night.commit("idea")
    assert "older than HEAD" in night.refused("idea")


def test_a_log_of_200_mb_is_read_at_both_ends_and_archived_short(night):
    ready(night)
    path = night.path / "run.log"
    head, _, tail = path.read_text().partition("step 00123")
    with open(path, "w") as f:
        f.write(head)
        for _ in range(200):
            f.write("noise " * 174_762 + "\n")
        f.write("step 00123" + tail)
    assert path.stat().st_size > 200e6
    start = time.monotonic()
    assert night.recorded("idea").verdict == "keep"
    assert time.monotonic() - start < 20
    assert (night.path / "runs" / "best" / "run.log").stat().st_size < 20e6
    night.check()


def test_carriage_returns_and_noise_after_the_summary_do_no_harm(night):
    ready(night, steps=1000)
    path = night.path / "run.log"
    progress = "".join(f"\rstep {i:05d} ({i / 10:.1f}%) | loss 3.1" for i in range(1000))
    path.write_text(path.read_text().replace("---\n", f"{progress}\n---\n") + "sys:1: ResourceWarning: unclosed\n")
    assert night.recorded("idea").verdict == "keep"


def test_one_log_holds_one_run(night):
    """Neither the better nor the last of two is taken: which one counts is not for the log to say."""
    ready(night, 0.5)
    first = night.read("run.log")
    night.run(0.98)
    (night.path / "run.log").write_text(first + night.read("run.log"))
    refusal = night.refused("idea")
    assert "run.log holds two runs" in refusal and "uv run train.py > run.log 2>&1" in refusal
    night.run(0.5)
    first = night.read("run.log")
    night.run(tail="")
    (night.path / "run.log").write_text(first + night.read("run.log"))
    assert "killed" in night.refused("idea", rc=75)


# --- runs that the machine ended -------------------------------------------------------

OVERRAN = (
    "training overran its 300 s by 4.2 s, 3.0 s are allowed: call progress() once a step, stop when it is 1, and take "
    "shorter steps\n"
)
TRACE = 'Traceback (most recent call last):\n  File "train.py", line 648, in main\n    {code}\n{error}\n'
ENDS = {  # what the log ends with: how the run ended, in which words
    "OSError: [Errno 28] No space left on device: 'checkpoint.pt.tmp'": ("machine", "No space left on device"),
    "RuntimeError: [enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0": ("machine", "unexpected pos 64 vs 0"),
    "OSError: [Errno 5] Input/output error": ("machine", "Input/output error"),
    "RuntimeError: No CUDA GPUs are available": ("machine", "No CUDA GPUs are available"),
    "AcceleratorError: CUDA error: uncorrectable ECC error encountered (train.py, line 9, in train): if nvidia-smi shows":
        ("machine", "ECC error"),
    "AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy or unavailable (train.py, line 9): if":
        ("machine", "CUDA-capable device"),
    "RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp": ("machine", "NVML"),
    OVERRAN.strip(): ("overran", "training overran its 300 s by 4.2 s, 3.0 s are allowed"),
    "AcceleratorError: CUDA error: unspecified launch failure (train.py, line 9, in train): if nvidia-smi": ("crash", None),
    "RuntimeError: CUDA driver error: out of memory (train.py, line 9): see nvidia-smi": ("crash", None),
    "RuntimeError: CUDA driver error: an illegal memory access was encountered": ("crash", None),
    "RuntimeError: CUDA driver version is insufficient for CUDA runtime version": ("machine", "CUDA driver version"),
    "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)":
        ("crash", None),
    "ValueError: size": ("crash", None),
    "UserWarning: Can't initialize NVML\n" + TRACE.format(code='assert x == 1, "No space left on device"', error="AssertionError"):
        ("crash", None),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("traced", [False, True])
def test_errors_of_the_machine_are_told_from_those_of_train_py(night, end, traced):
    how, words = ENDS[end]
    trace = TRACE.format(code="save_checkpoint(path, model, clock.run_id)", error=end)
    night.run(tail=trace if traced and how != "overran" else f"{end}\n")
    log = run_log.read(night.path / "run.log")
    assert (log.ended, log.fault) == (how, words)


SAVES = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch.nn import Linear
import train
from types import SimpleNamespace
model = Linear(600, 600)
model.config = SimpleNamespace()
train.save_checkpoint("checkpoint.pt", model, "abc")
"""


@pytest.mark.slow
def test_what_torch_says_on_a_full_disk_is_the_machines_and_half_a_file_does_not_stay(night, own_mounts):
    """torch.save names neither the disk nor the reason."""
    night.run(tail="")
    (night.path / "save.py").write_text(SAVES.format(root=str(ROOT)))
    script = f"mkdir small && mount -t tmpfs -o size=1m none small && cd small && {sys.executable} ../save.py >> ../run.log 2>&1; ls -A"
    done = subprocess.run([*own_mounts, "sh", "-c", script], cwd=night.path, env=night.env, capture_output=True, text=True)
    log = run_log.read(night.path / "run.log")
    assert (log.ended, done.stdout) == ("machine", ""), night.read("run.log") + done.stderr


def next_of(night):
    return night.lab("status").out.rpartition("next: ")[2].strip()


FULL_DISK = TRACE.format(code="torch.save(weights, temporary)", error="OSError: [Errno 28] No space left on device")


@pytest.mark.parametrize("end, says", [
    (FULL_DISK, "this machine ended the last run (No space left on device), it is no result; mend that first"),
    (OVERRAN, "a stall of this machine, or the edit, made the last run too long (training overran its 300 s by 4.2 s, "
     "3.0 s are allowed), it is no result"),
    ("", "the last run was killed, it is no result"),
])  # fmt: skip
def test_what_the_machine_did_is_run_again_twice_and_then_it_is_a_crash(night, end, says):
    commit = ready(night, tail=end)
    for _ in range(2):
        for _ in range(2):  # the same run counts once
            refusal = night.refused("idea", rc=75)
            assert f"{says}. Run it again: uv run train.py > run.log 2>&1; " in refusal
            assert refusal.endswith("; 3 such runs in a row are a crash\n")
        assert next_of(night) == f"{says}: uv run train.py > run.log 2>&1"
        assert night.head() == commit
        night.run(tail=end)
    assert "is over and not recorded: uv run -m lab record" in next_of(night)
    result = night.recorded("idea")
    assert result.verdict == "crash" and "nor in those of the 2 runs before it" in result.out and night.head() != commit
    night.check()
    ready(night, tail=end)  # another idea has its own three
    assert says in night.refused("another", rc=75)


def test_a_result_in_between_or_other_code_begins_the_count_anew(night):
    commit = ready(night, tail="")
    night.refused("idea", rc=75)
    night.run(tail=FULL_DISK)
    night.refused("idea", rc=75)
    night.git("reset", "-q", "--hard", "HEAD^")
    ready(night, tail="")
    night.refused("another", rc=75)
    night.git("reset", "-q", "--hard", commit)
    for _ in range(2):
        night.run(tail="")
        night.refused("idea", rc=75)
    night.run(1.02)
    assert night.recorded("idea").verdict == "discard"
    assert not (night.path / ".lab" / "ends.json").exists()
    night.check()


def test_a_preempted_run_is_run_again_however_often_that_happens(night):
    ready(night, tail="\npreempted\n")
    for _ in range(4):
        assert "the last run was preempted, it is no result" in night.refused("idea", rc=75)
        night.run(tail="\npreempted\n")


@pytest.mark.parametrize("content", ["", "[]", '{"code": 7}', "cut sho", "\x00" * 9])
def test_a_damaged_count_is_none(night, content):
    ready(night, tail="")
    (night.path / ".lab" / "ends.json").write_text(content)
    assert "the last run was killed" in night.refused("idea", rc=75)


def test_the_agent_may_give_up_what_the_machine_ended(night):
    ready(night, tail=FULL_DISK)
    result = night.recorded("idea", "--discard")
    assert result.verdict == "crash" and "(No space left on device)" in result.out and "the runs before" not in result.out
    night.check()


def test_on_a_full_disk_no_log_is_believed_and_nothing_is_counted(night, own_mounts):
    """The log may be cut off anywhere, here after a line that says nothing."""
    commit = ready(night, tail="attent")
    record = f"{sys.executable} -m lab record idea"
    script = f"mount -t tmpfs -o size=64k none .lab; head -c 1000000 /dev/zero > .lab/filler 2> /dev/null; {record}; {record}; {record}"
    done = subprocess.run([*own_mounts, "sh", "-c", script], cwd=night.path, env=night.env, capture_output=True, text=True)
    assert done.returncode == 75 and done.stderr.count("this machine ended the last run (the disk is full)") == 3, done.stderr
    assert night.head() == commit and len(night.rows()) == 3
    assert night.recorded("idea").verdict == "crash"  # now it is what the log says


def test_a_segmentation_fault_is_a_crash_with_its_stack(night):
    """Not a run that somebody killed, which would be run again."""
    ready(night)
    code = (
        f"import ctypes, sys; sys.path.insert(0, {str(ROOT)!r}); from frozen import process; process.end_on_signals()\n"
        f"print('run: ' + {json.dumps(night.header())!r}); print({PROGRESS!r}, flush=True)\n"
        "def into_nothing():\n    ctypes.string_at(0)\ninto_nothing()\n"
    )
    with open(night.path / "run.log", "wb") as log:
        done = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log, cwd=night.path)
    assert done.returncode == -signal.SIGSEGV
    result = night.recorded("idea")
    assert result.verdict == "crash" and "Fatal Python error: Segmentation fault" in result.out and "in into_nothing" in result.out
    night.check()


def test_a_checkpoint_of_another_run_is_not_archived_and_left_alone(night):
    night.run(0.5)
    other = (night.path / "checkpoint.pt").read_bytes()
    ready(night, checkpoint=False)
    result = night.recorded("idea")
    assert "checkpoint.pt is another run's: not archived" in result.out
    assert (night.path / "checkpoint.pt").read_bytes() == other
    assert not (night.path / "runs" / "best" / "checkpoint.pt").exists()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut"])
def test_a_missing_or_broken_checkpoint_does_not_stop_a_record(night, content):
    ready(night, checkpoint=False)
    (night.path / "checkpoint.pt").unlink(missing_ok=True)
    if content is not None:
        (night.path / "checkpoint.pt").write_bytes(content)
    result = night.recorded("idea")
    assert result.verdict == "keep" and "checkpoint.pt" in result.out
    night.check()


# --- the machine -------------------------------------------------------------------------


def test_git_without_a_name_can_record_everything(night):
    night.git("config", "user.useConfigOnly", "true")
    assert night.git("config", "user.name", check=False) == "Some One"  # by -c, in this test's own calls only
    night.change_train()
    night.commit("idea")
    night.human_commits("on top")
    night.run(1.02)
    assert night.recorded("idea").verdict == "discard"
    assert night.chain()[0] == "human: on top"
    night.check()


def test_two_records_at_once_make_one_row(night):
    ready(night)
    command = [sys.executable, "-m", "lab", "record", "idea"]
    both = [
        subprocess.Popen(command, cwd=night.path, env=night.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    ends = [(process.communicate(timeout=60), process.returncode) for process in both]
    assert sorted(rc for _, rc in ends) == [0, 1]
    (refusal,) = [err for (_, err), rc in ends if rc == 1]
    assert "recorded already" in refusal
    assert [row[3] for row in night.rows()] == GOOD_ROWS
    night.check()


def test_runs_that_cannot_be_written_stop_it_in_one_line_and_the_same_command_completes_it(night):
    commit = ready(night)
    (night.path / "runs").rename(night.path / "away")
    (night.path / "runs").write_text("a file in the way")
    result = night.record("idea")
    assert result.rc == 3 and len(result.err.splitlines()) == 1 and "nothing is lost" in result.err
    assert len(night.rows()) == 3 and night.head() == commit and (night.path / "checkpoint.pt").exists()
    (night.path / "runs").unlink()
    (night.path / "away").rename(night.path / "runs")
    again = night.recorded("idea")
    assert again.verdict == "keep" and len(night.rows()) == 4
    assert (night.path / "runs" / "best" / "checkpoint.pt").exists()
    night.check()


def test_a_folder_without_permission_stops_it_in_one_line(night, no_privileges):
    ready(night)
    os.chmod(night.path / "runs", 0o555)
    command = [*no_privileges, sys.executable, "-m", "lab", "record", "idea"]
    process = subprocess.run(command, cwd=night.path, env=night.env, capture_output=True, text=True)
    os.chmod(night.path / "runs", 0o755)
    assert process.returncode == 3 and len(process.stderr.splitlines()) == 1, process.stderr
    assert "Permission denied" in process.stderr
    night.recorded("idea")
    night.check()


@pytest.mark.parametrize("limit", [100, 12_000])
def test_a_full_disk_stops_it_in_one_line_and_the_same_command_completes_it(night, limit):
    """No file may grow beyond `limit` bytes: at 100 not even the plan can be written, at 12,000 the archive cannot."""
    commit = ready(night)
    log = night.path / "run.log"
    log.write_text(log.read_text().replace("---\n", "x" * 79 + "\n" + "some line\n" * 5000 + "---\n"))
    process = subprocess.run(
        [sys.executable, "-m", "lab", "record", "idea"], cwd=night.path, env=night.env, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert process.returncode == 3 and len(process.stderr.splitlines()) == 1, process.stderr
    assert "the disk is full" in process.stderr
    assert len(night.rows()) == 3 and night.head() == commit
    assert night.recorded("idea").verdict == "keep"
    assert (night.path / "runs" / "best" / "checkpoint.pt").exists()
    night.check()


def test_archives_on_another_file_system_that_is_full_then_has_room(night, own_mounts):
    ready(night)
    with zipfile.ZipFile(night.path / "checkpoint.pt", "a") as f:
        f.writestr("checkpoint/data/1", random.randbytes(300_000))
    size = (night.path / "checkpoint.pt").stat().st_size
    kept = night.path.parent / "kept"  # what is left of the mount when its namespace ends
    record = f"{sys.executable} -m lab record idea"

    def under_mount(kilobytes):
        script = f"mount -t tmpfs -o size={kilobytes}k none runs && {record}; code=$?; cp -a runs {kept}; exit $code"
        return subprocess.run(
            [*own_mounts, "sh", "-c", script], cwd=night.path, env=night.env, capture_output=True, text=True
        )

    full = under_mount(64)
    assert full.returncode == 3 and "the disk is full" in full.stderr, full.stderr
    assert (night.path / "checkpoint.pt").stat().st_size == size and len(night.rows()) == 3
    shutil.rmtree(kept)
    done = under_mount(4096)
    assert done.returncode == 0, done.stderr
    assert (kept / "best" / "checkpoint.pt").stat().st_size == size
    assert not (night.path / "checkpoint.pt").exists() and len(night.rows()) == 4


def test_a_lock_that_a_killed_git_left_is_removed(night):
    ready(night, 1.02)
    (night.path / ".git" / "index.lock").write_text("")
    assert night.recorded("idea").verdict == "discard"
    night.check()


def test_a_lock_that_a_living_git_holds_is_waited_for(night):
    ready(night, 1.02)
    lock = night.path / ".git" / "index.lock"
    lock.write_text("")
    holder = subprocess.Popen(["git", "cat-file", "--batch"], cwd=night.path, stdin=subprocess.PIPE)
    try:
        result = night.record("idea")
        assert result.rc == 3 and "another git holds" in result.err and lock.exists()
    finally:
        holder.communicate()
    lock.unlink()
    night.recorded("idea")
    night.check()


# --- kills ---------------------------------------------------------------------------------

# Runs `lab record` and dies by its own hand just before the n-th event (argument 1) that changes anything: a file
# opened for writing, renamed or removed, a folder or link made, a git that writes. n = 0 prints how many there are.
KILL_AT = """
import os, sys
n, count, died = int(sys.argv.pop(1)), 0, os._exit
GIT = {"fast-import", "update-ref", "read-tree", "update-index", "write-tree", "commit-tree", "hash-object", "reset", "checkout"}
def changes(event, args):
    if event == "open":
        return isinstance(args[0], str) and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if event == "subprocess.Popen":
        return bool(GIT & set(args[1]))
    return event in ("os.rename", "os.remove", "os.mkdir", "os.symlink")
def hook(event, args):
    global count
    if changes(event, args):
        count += 1
        if count == n:
            died(137)
from lab.__main__ import main
sys.addaudithook(hook)
status = main(sys.argv[1:])
if not n:
    print("EVENTS", count)
sys.exit(status)
"""


def scenario(night, name):
    """Leaves a run to be recorded; the arguments of its record."""
    if name == "keep":
        ready(night)
    elif name == "discard under a human's commit":
        night.change_train()
        night.commit("idea")
        night.human_commits("on top")
        night.run(1.02)
    elif name == "crash":
        night.change_train()
        night.commit("idea")
        night.run(tail="FAIL: loss is nan\n")
    elif name == "close a commit that waits, and keep":
        night.change_train(night.read("train.py").replace("WIDTH = 512\n", ""))
        night.commit("waits")
        night.run(0.99)
        assert night.recorded("waits", "--simpler").verdict == "confirm"
        night.git("reset", "-q", "--keep", "HEAD^")
        ready(night)
    elif name == "step back":
        ready(night, 0.9872)
        night.recorded("lucky")
        night.human_commits("on top")
        night.run(1.0, seed=43)
    return ["record", "idea"]


SCENARIOS = ["keep", "discard under a human's commit", "crash", "close a commit that waits, and keep", "step back"]


def what_is_left(night):
    """All that must be the same however often a record was interrupted."""
    night.check()
    rows = [row[1:] for row in night.rows()]
    files = sorted(str(p.relative_to(night.path / "runs"))[5:] for p in (night.path / "runs").rglob("*"))
    best = os.readlink(night.path / "runs" / "best")
    return rows, [len(files), best[:4]], night.chain(), night.git("status", "--porcelain"), night.read("train.py")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in SCENARIOS]
)
def test_killed_at_any_step_the_same_command_completes_it(template, tmp_path, name):
    first = template.copy(tmp_path / "first")
    args = scenario(first, name)

    def attempt(path, n):
        twin = first.copy(path)
        done = subprocess.run(
            [sys.executable, "-c", KILL_AT, str(n), *args], cwd=twin.path, env=twin.env, capture_output=True, text=True
        )  # fmt: skip
        return twin, done

    whole, done = attempt(tmp_path / "whole", 0)
    assert done.returncode == 0, done.stderr
    events = int(done.stdout.rpartition("EVENTS ")[2])
    expected = what_is_left(whole)
    assert events > 10
    for n in range(1, events + 1):
        twin, done = attempt(tmp_path / f"kill{n}", n)
        assert done.returncode == 137, f"event {n}: {done.stdout}{done.stderr}"
        again = twin.lab(*args)
        completed = again.rc == 0 or (again.rc == 1 and "recorded already" in again.err)
        assert completed, f"killed at event {n} of {events}: {again.err}"
        assert what_is_left(twin) == expected, f"killed at event {n} of {events}"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_killed_at_a_random_moment_with_all_its_children_the_same_command_completes_it(template, tmp_path, seed):
    name = SCENARIOS[seed % len(SCENARIOS)]
    night = template.copy(tmp_path / "night")
    args = scenario(night, name)
    whole = night.copy(tmp_path / "whole")
    command = [sys.executable, "-m", "lab", *args]
    start = time.monotonic()
    assert whole.lab(*args).rc == 0
    duration = time.monotonic() - start
    process = subprocess.Popen(
        command, cwd=night.path, env=night.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )  # fmt: skip
    time.sleep(random.Random(seed).uniform(0.2, 1) * duration)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = night.lab(*args)
    assert again.rc == 0 or "recorded already" in again.err, again.err
    assert what_is_left(night) == what_is_left(whole)


def test_another_record_completes_an_interrupted_one_first(night):
    ready(night)
    killed = subprocess.run(
        [sys.executable, "-c", KILL_AT.replace("count == n", 'event == "os.rename" and "runs.jsonl" in str(args[1])'),
         "1", "record", "idea"], cwd=night.path, env=night.env, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == 137 and len(night.rows()) == 3
    assert "a record was interrupted: uv run -m lab record" in night.lab("status").out
    night.change_train()
    night.commit("worse")
    night.run(1.03)
    result = night.recorded("worse")
    assert result.out.startswith("first, an interrupted record was completed: keep")
    assert [row[3] for row in night.rows()] == [*GOOD_ROWS, "discard"]
    night.check()


def test_an_interrupted_discard_leaves_alone_what_was_committed_on_top_of_it(night):
    ready(night, 1.02)
    killed = subprocess.run(
        [sys.executable, "-c", KILL_AT.replace("count == n", 'event == "os.rename" and "runs.jsonl" in str(args[1])'),
         "1", "record", "idea"], cwd=night.path, env=night.env, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == 137
    night.change_train()
    night.commit("on top of the discard")
    night.run(0.97)
    result = night.recorded("both")
    assert "keep" in result.out and night.chain()[:2] == ["on top of the discard", "idea"]
    assert [row[3] for row in night.rows()] == ["keep", "keep", "discard", "discard", "keep"]


def test_on_another_branch_an_interrupted_record_is_not_touched(night):
    ready(night)
    subprocess.run(
        [sys.executable, "-c", KILL_AT.replace("count == n", 'event == "os.rename" and "runs.jsonl" in str(args[1])'),
         "1", "record", "idea"], cwd=night.path, env=night.env, capture_output=True,
    )  # fmt: skip
    night.git("switch", "-q", "-c", "autoresearch/other", "main")
    result = night.record("idea")
    assert result.rc == 1 and "git switch autoresearch/test" in result.err
    night.git("switch", "-q", "autoresearch/test")
    night.recorded("idea")
    night.check()


def test_the_fakes_close_call_is_one(template, tmp_path):
    night = FakeNight(tmp_path / "fresh")
    night.baseline()
    night.close_call()
    assert ROOT.is_dir()


# --- records in git --------------------------------------------------------------------------

LOG = "refs/autoresearch/test/log"


def cleaned(night):
    """What `git clean -fdx` takes away."""
    night.git("clean", "-qfdx")
    assert not (night.path / "runs.jsonl").exists()


def test_after_git_clean_the_night_goes_on_where_it_was(night):
    records, head = night.records(), night.head()
    cleaned(night)
    shown = night.lab("status").out
    assert "best: 0.990000" in shown and "rows: 2 keep, 1 discard" in shown
    assert f"note: runs.jsonl is gone: its 5 records are read from {LOG}" in shown
    assert "is recorded: edit train.py" in shown and not (night.path / "runs.jsonl").exists()
    ready(night)
    result = night.recorded("idea")
    assert result.verdict == "keep" and "note: runs.jsonl is gone: its 5 records" in result.out
    assert night.records()[:5] == records and [row[3] for row in night.rows()] == GOOD_ROWS
    assert night.git("rev-parse", "HEAD^") == head and night.records_in_git() == night.records()
    assert "note" not in night.lab("status").out


def test_a_discard_after_git_clean_undoes_its_own_commit_alone(night):
    head = night.head()
    cleaned(night)
    ready(night, 1.02)
    assert night.recorded("worse").verdict == "discard" and night.head() == head


def test_a_line_that_is_lost_or_changed_comes_back_in_its_place(night):
    before = night.records()
    lines = night.read("runs.jsonl").splitlines()
    lines[3] = lines[3].replace('"verdict": "keep"', '"verdict": "discard"')
    del lines[1]
    (night.path / "runs.jsonl").write_text("\n".join(lines) + "\n")
    assert "best: 0.990000" in night.lab("status").out
    ready(night)
    result = night.recorded("idea")
    assert "in runs.jsonl 1 records were missing and 1 differed from git's" in result.out
    assert night.records()[:5] == before
    night.check()


def test_records_are_what_git_holds_after_a_collection_of_garbage(night):
    night.git("gc", "-q", "--prune=now", "--aggressive")
    night.git("reflog", "expire", "--expire=now", "--all")
    night.git("gc", "-q", "--prune=now")
    cleaned(night)
    ready(night)
    night.recorded("idea")
    assert [row[3] for row in night.rows()] == GOOD_ROWS
    assert all(night.git("cat-file", "-t", r["commit"]) == "commit" for r in night.records())
    assert len(night.git("log", "--format=%h", LOG).splitlines()) == 6, "a commit for each record"


@pytest.mark.parametrize("damage", ["gone", "garbage", "of another object"])
def test_a_night_without_its_ref_gets_one_at_the_next_record(night, damage):
    ref = night.path / ".git" / LOG
    if damage == "gone":
        night.git("update-ref", "-d", LOG)
    else:
        ref.write_text("garbage\n" if damage == "garbage" else "1" * 40 + "\n")
    ready(night)
    result = night.recorded("idea")
    assert ("was damaged: it is written anew" in result.out) == (damage != "gone"), result.out
    assert len(night.records_in_git()) == 6
    night.check()


def test_where_the_records_are_lost_it_names_the_loss_and_stops(night):
    night.git("update-ref", "-d", LOG)
    cleaned(night)
    ready(night)
    refusal = night.refused("idea")
    assert "the records of this night are lost: 3 recorded commits are in refs/autoresearch/test/" in refusal
    assert "git switch -c autoresearch/test-2" in refusal and "reset" not in refusal
    assert "next: the records of this night are lost" in night.lab("status").out
    night.git("switch", "-q", "-c", "autoresearch/test-2")
    night.run(0.98)
    assert night.recorded("baseline").verdict == "confirm"


def test_a_keep_whose_record_is_lost_is_not_undone_with_the_next_experiment(night):
    night.git("update-ref", "-d", LOG)
    lines = night.read("runs.jsonl").splitlines()
    (night.path / "runs.jsonl").write_text("\n".join(lines[:3] + lines[4:]) + "\n")
    ready(night, 1.02)
    assert "the record of row 0002" in night.refused("worse")
    assert "the record of row 0002" in night.lab("status").out


def test_a_row_whose_number_is_taken_by_an_interrupted_record_is_recorded(night):
    """The journal of a record that was killed is gone: its commit has a number already, and no record."""
    commit = ready(night)
    night.git("update-ref", "refs/autoresearch/test/0004", commit)
    assert night.recorded("idea").verdict == "keep"
    assert night.rows()[-1][0] == commit[:7] and night.records()[-1]["row"] == 5


def test_the_name_of_a_night_has_no_slash(night):
    night.git("switch", "-q", "-c", "autoresearch/a/b")
    assert "git branch -m autoresearch/a/b autoresearch/a-b" in night.refused("idea")
    assert "git branch -m autoresearch/a/b autoresearch/a-b" in night.lab("status").out


def test_a_run_id_of_any_characters_is_a_file_in_git(night):
    ready(night, run_id="../../x y\n\"'" + "z" * 300)
    night.recorded("idea")
    (night.path / "runs.jsonl").unlink()
    assert "6 records are read from" in night.lab("status").out


def test_growth(template, tmp_path):
    """A record adds a few kilobytes to git, as loose objects, at the 300th run as at the first."""
    from lab.store import records_in_git
    from lab.store.repository import Repo

    night = template.copy(tmp_path / "night")
    repo, records = Repo(night.path), night.records()
    records += [records[-1] | {"run_id": f"{i:032x}"} for i in range(300)]
    records_in_git.save(repo, "test", records, [])

    def loose():
        return int(night.git("count-objects").split()[2])  # kilobytes on disk

    before = loose()
    for i in range(10):
        records.append(records[-1] | {"run_id": f"{10**9 + i:032x}"})
        records_in_git.save(repo, "test", records, [records[-1]])
    assert loose() - before <= 10 * 24
    assert len(records_in_git.files(night.path, "test")) == len(records)
    assert records_in_git.save(repo, "test", records, records) is None
    assert night.git("fsck", "--strict") == ""


# --- one run, one log -------------------------------------------------------------------------

SUMMARY_AGAIN = "---\nval_bpb:          0.500000\ntraining_seconds: 300.0\n"


@pytest.mark.parametrize(
    "change, needle",
    [
        (lambda log: log + log[log.index("---\n") :].replace("0.98", "0.50"), "more than one line `val_bpb:`"),
        (lambda log: log + SUMMARY_AGAIN, "the summary in run.log is not complete"),
        (lambda log: log + "val_bpb: 0.5\n", "more than one line `val_bpb:`"),
        (lambda log: log.replace("---\n", "val_bpb: 0.5\n---\n"), "more than one line `val_bpb:`"),
        (lambda log: log + "num_steps: 9000\n", "more than one line `num_steps:`"),
        (lambda log: log + log, "holds two runs"),
        (lambda log: log.replace("training_seconds: 300.0", "training_seconds: 900.0"), "900 s of 325.9 s in all"),
        (lambda log: log.replace("total_seconds:    325.9", "total_seconds:    12.5"), "300 s of 12.5 s in all"),
        (lambda log: log.replace("training_seconds: 300.0", "training_seconds: 900.0").replace("325.9", "950.0"), "the budget is 300 s"),
        (lambda log: log.replace("training_seconds: 300.0", "training_seconds: -1"), "negative training_seconds"),
        (lambda log: log.replace("45060.2", "-45060.2"), "negative peak_vram_mb"),
        (lambda log: log.replace("39.80\ntotal", "-1\ntotal"), "negative mfu_percent"),
        (lambda log: log.replace("953", "100"), "step 123, and its summary says 100 steps"),
        (lambda log: log.replace("953", "9530000"), "its progress lines show"),
        (lambda log: log.replace("499.6", "49960.0"), "524,064 to 524,064 tokens a step"),
        (lambda log: log.replace("499.6", "0.0"), "953 steps trained on"),
        (lambda log: log.replace("953", "953.5"), "953.5 steps"),
        (lambda log: log.replace("loss 3.14", "loss -3.14"), "negative training loss"),
        (lambda log: log.replace("val_bpb:          0.98", "val_bpb:          -0.98"), "val_bpb in the summary is not a possible number"),
        (lambda log: log.replace("45060.2", "1e300"), "peak_vram_mb in the summary is not a possible number"),
        (lambda log: log.replace("45060.2", "inf"), "peak_vram_mb in the summary is not a possible number"),
    ],
)  # fmt: skip
def test_a_summary_that_contradicts_itself_or_the_rules_is_refused(night, change, needle):
    (night.path / "constants.py").write_text("import os\n\nTIME_BUDGET = 300  # seconds\n")
    ready(night)
    path = night.path / "run.log"
    log = path.read_text()
    path.write_text(change(log))
    assert path.read_text() != log
    assert needle in night.refused("idea")
    given_up = night.recorded("--discard", "idea")
    assert given_up.verdict == "crash" and night.records()[-1]["summary"] is None, "no value of it counts"
    night.check()


@pytest.mark.parametrize("budget, seconds", [("300", 303.0), ("300", 150.0), ("60 * 5", 340.0), ("600", 600.0), (None, 301.0)])
def test_a_run_within_its_budget_is_recorded(night, budget, seconds):
    if budget:
        (night.path / "constants.py").write_text(f"TIME_BUDGET = {budget}\n")
    ready(night, seconds=seconds)
    log = night.read("run.log").replace("total_seconds:    325.9", "total_seconds:    900.0")
    (night.path / "run.log").write_text(log)
    assert night.recorded("idea").verdict == "keep"


def test_a_summary_without_a_header_is_nobodys(night):
    ready(night)
    path = night.path / "run.log"
    path.write_text(path.read_text().replace("run: {", "run {"))
    assert "the summary in run.log is not complete" in night.refused("idea")
    assert night.recorded("--discard", "idea").verdict == "crash"
    night.check()


# --- the log, as other systems write it ----------------------------------------------------------

COLOURED = {"run: ": "\x1b[32mrun: ", "---\n": "\x1b[1m---\x1b[0m\n", "val_bpb: ": "\x1b[31;1mval_bpb\x1b[0m: ", "step 0": "\x1b[2K\x1b[Gstep 0"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "colours"])
@pytest.mark.parametrize("size", [pytest.param(0, marks=pytest.mark.slow), 700_000])
def test_a_log_in_utf_16_or_with_colours_reads_like_any_other(night, encoding, size):
    ready(night)
    path, log = night.path / "run.log", night.read("run.log")
    log = log.replace("---\n", "größer noch\n" * (size // 13) + "---\n")
    if encoding == "colours":
        for plain, coloured in COLOURED.items():
            log = log.replace(plain, coloured)
        path.write_text(log, encoding="utf-8")
    else:
        path.write_bytes(log.replace("\n", "\r\n").encode(encoding))
    assert "is over and not recorded" in night.lab("status").out
    assert night.recorded("idea").out.startswith("keep: val_bpb 0.980000")
    night.check()


@pytest.mark.parametrize(
    "data, encoding",
    [
        (b"", "utf-8"), (b"step", "utf-8"), (b"\0" * 5000, "utf-8"), (bytes(range(256)) * 20, "utf-8"),
        ("größer".encode() * 900, "utf-8"), ("大".encode() * 4000, "utf-8"), (("大" * 4000).encode("utf-16"), "utf-16-le"),
        (("step " * 900).encode("utf-16-be"), "utf-16-be"), (("step " * 900).encode("utf-16-le"), "utf-16-le"),
    ],
)  # fmt: skip
def test_the_encoding_of_a_log_is_told_by_its_first_bytes(data, encoding):
    from lab.store.run_log import encoding_of

    assert encoding_of(data[:262144]) == encoding


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_progress_is_read_in_any_encoding(tmp_path, encoding):
    from lab.store import run_log

    path = tmp_path / "run.log"
    path.write_bytes(("run: {}\n" + "\x1b[32mstep 00007 (1.0%) | loss 3.2 |\n" * 500).encode(encoding))
    assert run_log.progress_of(run_log.progress(path))["step"] == 7


# --- sentences in place of traces ----------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"tag": "test"}', "[" * 100_000, b"\xff\xfe\x00"])
def test_a_journal_that_cannot_be_read_is_kept_aside_and_the_run_is_recorded(night, content):
    ready(night)
    data = content if isinstance(content, bytes) else content.encode()
    (night.path / ".lab" / "journal.json").write_bytes(data)
    assert "is over and not recorded" in night.lab("status").out
    result = night.recorded("idea")
    assert "the plan of an interrupted record could not be read: it is kept in .lab/journal-damaged.json" in result.out
    assert (night.path / ".lab" / "journal-damaged.json").read_bytes() == data
    assert [row[3] for row in night.rows()] == GOOD_ROWS
    night.check()


@pytest.mark.parametrize("line", ['{"run_id": "x", "tag": "test", "commit": "c", "verdict": "keep"}', "[" * 100_000, '{"run_id": []}'])
def test_a_line_that_is_no_whole_record_is_not_counted(night, line):
    with open(night.path / "runs.jsonl", "a") as f:
        f.write(line + "\n")
    assert "5 runs recorded" in night.lab("status").out
    ready(night)
    assert night.recorded("idea").verdict == "keep"
    assert [row[3] for row in night.rows()] == GOOD_ROWS


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "won"}, {"row": "2"}, {"row": -2}, {"mean": None}, {"short": ["x"]}, {"commit": "--all"}, {"header": {}},
        {"summary": {"val_bpb": 0.5}}, {"summary": None}, {"gain": "much"}, {"n": 1e99}, {"start": "yesterday"}, {"parent": 7},
    ],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_a_record_with_a_field_of_another_kind_is_read_from_git(night, change):
    before, lines = night.records(), night.read("runs.jsonl").splitlines()
    lines[3] = json.dumps(before[3] | change)
    (night.path / "runs.jsonl").write_text("\n".join(lines) + "\n")
    assert "best: 0.990000" in night.lab("status").out
    night.git("update-ref", "-d", LOG)
    shown = night.lab("status")
    assert shown.rc == 0 and "the record of row 0002" in shown.out, "it is not half believed"


def test_a_damaged_index_is_named_with_its_remedy(night):
    ready(night)
    (night.path / ".git" / "index").write_bytes(b"DIRC\0\0\0\2cut")
    for result in (night.record("idea"), night.lab("status")):
        assert result.rc == 1 and len(result.err.splitlines()) == 1
        assert "cannot read its index" in result.err and "rm .git/index" in result.err and "git reset" in result.err
    (night.path / ".git" / "index").unlink()
    night.git("reset", "-q")
    night.recorded("idea")
    night.check()


@pytest.mark.parametrize("args", [("record", "idea"), ("status", "--all"), ("--help",), ("record", "--help")])
def test_a_reader_that_leaves_is_no_error(night, args):
    ready(night)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lab", *args], cwd=night.path, env=night.env, stdout=write, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    if args == ("record", "idea"):
        assert [row[3] for row in night.rows()] == GOOD_ROWS
        night.check()


NARROW = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "no locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("encoding", ["ascii", *(pytest.param(e, marks=pytest.mark.slow) for e in ("cp1252", "no locale"))])
def test_every_help_and_message_can_be_shown_in_a_narrow_encoding(night, encoding):
    from lab.__main__ import COMMANDS

    ready(night)
    commands = [["--help"], *([name, "--help"] for name in COMMANDS)]
    for args in [*commands, ["status", "--all"], ["status", "--json"], ["record", "größer → 大"], ["record", "again"]]:
        done = subprocess.run(
            [sys.executable, "-m", "lab", *args], cwd=night.path, env=night.env | NARROW[encoding], capture_output=True
        )
        assert b"Traceback" not in done.stderr and done.returncode == (args[1:] == ["again"]), (args, done.stderr)
        assert done.stdout or done.returncode
    assert night.records()[-1]["description"] == "größer → 大", "the argument was UTF-8 whatever the locale"


def test_a_results_tsv_that_is_a_link_is_written_through(night, tmp_path):
    path, shared = night.path / "results.tsv", tmp_path / "shared.tsv"
    path.rename(shared)
    path.symlink_to(shared)
    ready(night)
    night.recorded("idea")
    assert path.is_symlink() and shared.read_text().count("\n") == 5
    assert [row[3] for row in night.rows()] == GOOD_ROWS
    assert list(tmp_path.glob("*.tmp")) == []


def test_the_advice_about_a_second_file_leaves_nothing_that_git_does_not_hold(night):
    base = night.head()
    (night.path / "helper.py").write_text("X = 1\n")
    (night.path / "prepare.py").write_text("# changed\n")
    night.change_train()
    short = night.commit("two files", "train.py", "helper.py", "prepare.py")[:7]
    night.run(0.98)
    refusal = night.refused("idea")
    assert f"{short} touches helper.py, prepare.py" in refusal
    steps = [
        f"git reset --soft {short}^", "git commit -m ... -- train.py", f"git checkout {short}^ -- prepare.py",
        "git rm -f -- helper.py",
    ]  # fmt: skip
    for step in steps:
        assert step in refusal
        night.git(*step.replace("...", "idea").split()[1:])
    assert not (night.path / "helper.py").exists() and night.read("prepare.py") == "# frozen\n"
    assert night.git("status", "--porcelain") == "" and night.git("rev-parse", "HEAD^") == base
    assert "uv run train.py > run.log 2>&1" in refusal, "what ran had the helper: it runs again without"
    night.run(0.98)
    night.recorded("idea")
    night.check()
