"""The clock: what a run must do in which order, what it may spend, and what the frozen half says of it."""
# ruff: noqa: F401, F811 (run is a fixture)

import fcntl
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from begun import Uniform, run
from conftest import ROOT, assert_refused, kill_group

from corpus import rules
from frozen import device as devices
from frozen import process

V, T = 512, 32
FILES = rules.FILES
NUMBERS = dict(num_steps=953, total_tokens=499_646_464, num_params=50_332_176, flops_per_token=239e6, depth=8)


def header(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run: ")]
    assert len(lines) == 1
    return json.loads(lines[0].removeprefix("run: "))


# --- The header ---------------------------------------------------------------


def test_the_header_says_who_runs_what_on_what(run, capsys):
    began = datetime.now(timezone.utc).replace(microsecond=0)
    clock = run.begin()
    said = header(capsys)
    (manifest,) = run.repo.cache.rglob("manifest.json")
    files = {name: hashlib.sha256((run.repo.path / name).read_bytes()).hexdigest() for name in ("train.py", *FILES)}
    train_sha256 = files.pop("train.py")
    assert said.pop("run_id") == clock.run_id and re.fullmatch("[0-9a-f]{32}", clock.run_id)
    assert began <= datetime.fromisoformat(said.pop("start")) <= datetime.now(timezone.utc)
    assert re.fullmatch(r"cpu \(.+, \d+ cores\)", said.pop("device")) and clock.device == torch.device("cpu")
    assert said.pop("versions").items() >= {"torch": torch.__version__}.items()
    assert said == {
        "train_sha256": train_sha256,
        "rules_files": files,
        "rules_sha256": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "data_sha256": json.loads(manifest.read_text())["data_sha256"],
        "dataset": "climbmix",
        "seed": 42,
        "clock": "injected",
    }


def test_each_run_has_an_id_of_its_own(run):
    assert len({run.begin().run_id for _ in range(3)}) == 3


@pytest.mark.parametrize("real", ["now", "watchdog_now"])
def test_one_injected_clock_of_the_two_is_enough_to_say_so(run, capsys, real):
    run.begin(**{real: time.monotonic})
    assert header(capsys)["clock"] == "injected"


def test_other_rules_have_another_hash(run, capsys):
    """One byte more in any file that decides a score, and the header says in which."""
    run.begin()
    hashes = [header(capsys)]
    for file in FILES:
        with open(run.repo.path / file, "a") as f:
            f.write("\n")
        run.begin()
        hashes.append(header(capsys))
        before, after = hashes[-2:]
        assert after["rules_sha256"] != before["rules_sha256"] and after["train_sha256"] == before["train_sha256"]
        assert [name for name in FILES if before["rules_files"][name] != after["rules_files"][name]] == [file]
        assert rules.combined_hash(rules.file_hashes(run.repo.path)) == after["rules_sha256"]
    assert len({each["rules_sha256"] for each in hashes}) == len(FILES) + 1


def test_files_that_are_not_rules_leave_the_hash_alone(run, capsys):
    run.begin()
    before = header(capsys)
    for file in ("corpus/download.py", "train.py", "program.md"):
        with open(run.repo.path / file, "a") as f:
            f.write("\n")
    run.begin()
    assert header(capsys)["rules_sha256"] == before["rules_sha256"]


def test_every_module_of_the_core_but_the_download_is_a_rule():
    found = {f"{room}/{path.name}" for room in ("corpus", "frozen") for path in (ROOT / room).rglob("*.py")}
    assert {"constants.py", "prepare.py", *found} - set(FILES) == {"corpus/download.py"}
    assert len(set(FILES)) == len(FILES) and all((ROOT / name).is_file() for name in FILES)


LOADED = """
    import json, os, sys, prepare, torch

    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.w.expand(*x.shape, prepare.VOCAB_SIZE)

    clock, tokenizer = prepare.begin_run(__file__), prepare.load_tokenizer()
    clock.start(Uniform(), 8)
    next(prepare.make_dataloader(tokenizer, 8, prepare.MAX_SEQ_LEN))
    clock.progress()
    prepare.evaluate_bpb(Uniform(), tokenizer, 8)
    clock.summary(num_steps=1, total_tokens=1, num_params=1, flops_per_token=1, depth=1)
    files = [module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)]
    print(json.dumps([os.path.relpath(file) for file in files if file.startswith(os.getcwd() + os.sep)]))
"""


@pytest.mark.parametrize("dataset", ["climbmix", "stdlib"])
def test_a_run_loads_nothing_from_its_folder_but_rules(make_repo, prepared_climbmix, prepared_stdlib, dataset):
    """stdlib is built by the run itself, all of it but the tokenizer."""
    repo = make_repo(dataset, time_budget=60)
    repo.copy_cache(prepared_climbmix if dataset == "climbmix" else prepared_stdlib)
    if dataset == "stdlib":
        (manifest,) = repo.cache.rglob("manifest.json")
        (manifest.parent / "val_rows.npy").unlink()
        manifest.rename(manifest.with_name("manifest.partial.json"))
    (repo.path / "train.py").write_text(textwrap.dedent(LOADED))
    result = repo.run("train.py")
    assert result.rc == 0, result.err
    loaded = {name for name in json.loads(result.out.splitlines()[-1])} - {"train.py"}
    needed = set(FILES) if dataset == "stdlib" else set(FILES) - {"corpus/build.py", "corpus/datasets.py"}
    assert loaded == needed


@pytest.mark.parametrize("text, seed", [(None, 42), ("", 42), ("0", 0), ("7", 7), ("4294967296", 4294967296)])
def test_the_seed_is_42_unless_the_environment_names_one(run, monkeypatch, capsys, text, seed):
    if text is not None:
        monkeypatch.setenv("AUTORESEARCH_SEED", text)
    draws = []
    for _ in range(2):
        assert run.begin().seed == torch.initial_seed() == seed
        draws.append((random.random(), np.random.random(), torch.rand(()).item()))
        assert header(capsys)["seed"] == seed
    assert draws[0] == draws[1]
    random.seed(seed)
    assert draws[0][0] == random.random()


def test_a_seed_that_train_py_chose_is_refused(run):
    run.begin()
    torch.manual_seed(7)
    assert re.search("seeded with 7, this run's seed is 42: .* torch.Generator of its own is fine", refusal(run.start))
    torch.manual_seed(42)
    torch.Generator().manual_seed(7)
    run.start()


@pytest.mark.parametrize("text", ["seven", "-1", "1.5", "1e3", "0x10", " 7", "9" * 30])
def test_a_seed_that_is_none_is_refused(run, monkeypatch, text):
    monkeypatch.setenv("AUTORESEARCH_SEED", text)
    with pytest.raises(SystemExit, match=rf"AUTORESEARCH_SEED='{re.escape(text)}': a whole number below 2\*\*63 is needed"):
        run.begin()


@pytest.mark.parametrize("chosen", [None, "/elsewhere"])
def test_compiled_graphs_go_below_the_cache_unless_the_human_chose_a_place(run, monkeypatch, chosen):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen or "")
    if not chosen:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    run.begin()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == (chosen or str(run.repo.cache / "compile"))
    assert (run.repo.cache / "compile").is_dir()


# --- The order of a run -------------------------------------------------------


def refusal(call, *args, **kwargs):
    with pytest.raises(SystemExit) as error:
        call(*args, **kwargs)
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_nothing_can_be_had_before_the_run_has_begun(run):
    tokenizer = run.prepare.load_tokenizer()
    for call in (
        lambda: run.prepare.warmup_batch(2, T),
        lambda: next(run.prepare.make_dataloader(tokenizer, 2, T, "train")),
        lambda: run.prepare.evaluate_bpb(Uniform(), tokenizer, 2),
    ):
        assert "call clock = begin_run(__file__) first" in refusal(call)


def test_no_data_before_the_clock_has_started(run):
    run.begin()
    batches = run.prepare.make_dataloader(run.tokenizer, 2, T, "train")
    assert "no data before clock.start" in refusal(next, batches)
    run.start()
    x, y, _ = next(run.prepare.make_dataloader(run.tokenizer, 2, T, "train"))
    assert x.shape == y.shape == (2, T)


def test_the_warm_up_gets_random_ordinary_tokens_at_any_time(run):
    run.begin()
    x, y = run.prepare.warmup_batch(64, T)
    assert x.shape == y.shape == (64, T) and x.dtype == y.dtype == torch.int64
    for part in (x, y):
        assert part.min() >= 0 and part.max() < V - 4 and len(part.unique()) > 400
    assert not torch.equal(x, y)
    run.start()
    assert run.prepare.warmup_batch(3, 5)[0].shape == (3, 5)


def test_start_tries_the_evaluation_and_leaves_the_model_as_it_was(run):
    calls = []

    class Witness(Uniform):
        def forward(self, x):
            calls.append((tuple(x.shape), self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = Witness()
    run.begin()
    run.start(model, batch_size=24)
    assert set(calls) == {((24, T), False, False)}
    assert model.training and model.level.grad is None and not model.level.any()


def test_what_a_model_computes_when_it_first_sees_text_is_training(run):
    """Random tokens come before the clock, the training text after it."""
    seen = []

    class Slow(Uniform):
        def forward(self, x):
            seen.append(x)
            run.seconds += 7
            return super().forward(x)

    run.begin()
    run.start(Slow(), batch_size=24)
    random, text = seen
    assert torch.equal(text, run.clock.known_batch[0]) and not torch.equal(random, text)
    assert run.clock.progress() == pytest.approx(7 / 300)


class Bigrams(torch.nn.Module):
    """Knows how often each token follows each other one in the training shards."""

    def __init__(self, folder):
        super().__init__()
        counts = torch.full((V, V), 0.01)
        for path in folder.glob("train_0000?.npy"):
            tokens = torch.from_numpy(np.load(path).astype(np.int64))
            counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(()), accumulate=True)
        self.table = torch.nn.Parameter((counts / counts.sum(1, keepdim=True)).log())

    def forward(self, x):
        return self.table[x]


def test_a_model_that_knows_the_text_already_is_refused(run):
    run.begin()
    text = refusal(run.start, Bigrams(run.prepare.data_dir()))
    assert re.search(r"knows the text before training \(loss [34]\.\d\d\): start from fresh weights", text)
    assert "clock.start" in refusal(run.clock.progress)  # which has not started


def test_random_weights_are_no_knowledge(run):
    model = Bigrams(run.prepare.data_dir())
    with torch.no_grad():
        model.table.copy_(torch.randn(V, V, generator=torch.Generator().manual_seed(0)))
    run.begin()
    run.start(model)


@pytest.mark.parametrize(
    "answer, says",
    [
        (lambda logits: logits.mean(), "evaluation needs logits of shape"),
        (lambda logits: logits[..., :-4], "evaluation needs logits of shape"),
        (lambda logits: logits / 0, "logits that are not finite"),
    ],
)
def test_a_model_that_cannot_be_evaluated_is_refused_before_it_is_trained(run, answer, says):
    class Answers(Uniform):
        def forward(self, x):
            return answer(super().forward(x))

    run.begin()
    assert says in refusal(run.start, Answers())


def test_a_clock_that_was_never_started_measures_nothing(run):
    run.begin()
    assert "never started" in refusal(run.prepare.evaluate_bpb, Uniform(), run.tokenizer, 8)
    assert "has not been started" in refusal(run.clock.progress)
    assert "no val_bpb" in refusal(run.clock.summary, **NUMBERS)


def test_a_clock_is_started_once(run):
    run.begin()
    run.start()
    run.steps(1, until=299)
    assert "started already" in refusal(run.start)
    assert run.clock.progress() == pytest.approx(299 / 300)


def test_a_run_is_evaluated_once(run):
    run.evaluate(Uniform())
    assert "evaluated already" in refusal(run.prepare.evaluate_bpb, Uniform(), run.tokenizer, 8)
    assert "started already" in refusal(run.start)


# --- What it may spend --------------------------------------------------------


def test_progress_is_the_share_of_the_budget_and_ends_at_one(run):
    run.begin()
    run.seconds += 50  # set-up is not counted
    run.start()
    assert (run.clock.progress(), run.clock.training_seconds()) == (0.0, 0.0)
    run.seconds += 75
    assert run.clock.training_seconds() == 0.0  # of the last progress(): no tick of its own
    assert (run.clock.progress(), run.clock.training_seconds()) == (0.25, 75.0)
    run.seconds += 250
    assert (run.clock.progress(), run.clock.training_seconds()) == (1.0, 325.0)


@pytest.mark.parametrize("step, stopped", [(0.1, 302.9), (1, 300.1), (8, 302.9), (60, 303)])
def test_the_end_may_be_late_by_one_per_cent(run, step, stopped):
    run.begin()
    run.start()
    run.steps(step, until=step * 2)
    run.seconds = 1000 + stopped
    run.prepare.evaluate_bpb(Uniform(), run.tokenizer, 8)
    assert run.clock.training_seconds() == pytest.approx(stopped)


@pytest.mark.parametrize("step, stopped", [(0.1, 303.1), (1, 360), (8, 304), (60, 303.1), (100, 400)])
def test_a_run_that_overran_is_refused_however_long_its_steps_are(run, step, stopped):
    run.begin()
    run.start()
    run.steps(step, until=step * 2)
    run.seconds = 1000 + stopped
    text = refusal(run.prepare.evaluate_bpb, Uniform(), run.tokenizer, 8)
    assert f"overran its 300 s by {stopped - 300:.1f} s, 3.0 s are allowed" in text and "shorter steps" in text


@pytest.mark.parametrize("step, last", [(2, 300), (3.5, 301), (8, 296), (70, 280), (100, 300), (200, 200)])
def test_progress_is_one_when_another_step_does_not_fit(run, step, last):
    """Into the budget and three seconds: the run then ends at `last`, and is not refused."""
    run.begin()
    run.start()
    while run.clock.progress() < 1:
        run.seconds += step
    assert run.seconds == 1000 + last
    run.prepare.evaluate_bpb(Uniform(), run.tokenizer, 8)


def test_one_slow_step_does_not_end_a_run(run):
    run.begin()
    run.start()
    run.steps(1, until=280)
    run.seconds += 15
    assert run.clock.progress() == pytest.approx(295 / 300)


def test_near_the_end_progress_waits_for_the_device(run):
    """Which lags behind, so that the steps look shorter than they are."""
    run.begin()
    run.start()
    waits = []
    run.clock.settle = lambda: waits.append(run.seconds)
    run.steps(1, until=300)
    assert waits == [1000 + s for s in range(297, 301)]


def test_no_data_after_the_clock_has_stopped(run):
    run.begin()
    run.start()
    batches = run.prepare.make_dataloader(run.tokenizer, 2, T, "train")
    next(batches)
    run.steps(1, until=300)
    run.prepare.evaluate_bpb(Uniform(), run.tokenizer, 8)
    assert "no data after evaluate_bpb has stopped the clock" in refusal(next, batches)
    assert "no data after" in refusal(next, run.prepare.make_dataloader(run.tokenizer, 2, T, "train"))


def test_a_run_has_one_summary(run):
    run.evaluate(Uniform())
    run.clock.summary(**NUMBERS)
    assert "has its summary already" in refusal(run.clock.summary, **NUMBERS)


def test_a_giant_last_step_is_refused_though_the_loop_saw_it(run):
    run.begin()
    run.start()
    run.steps(1, until=299)
    run.seconds += 60
    assert run.clock.progress() == 1.0
    assert "overran its 300 s by 59.0 s" in refusal(run.prepare.evaluate_bpb, Uniform(), run.tokenizer, 8)


def test_evaluation_is_not_training(run, capsys):
    class Slow(Uniform):
        def forward(self, x):
            run.seconds += 5 if run.clock.stopped else 0
            return super().forward(x)

    run.evaluate(Slow())
    assert run.clock.training_seconds() == 300
    run.clock.summary(**NUMBERS)
    assert "training_seconds: 300.0\n" in capsys.readouterr().out


# --- The summary --------------------------------------------------------------

BLOCK = """\
---
val_bpb:          {val_bpb:.6f}
training_seconds: 300.1
total_seconds:    {total}
peak_vram_mb:     0.0
mfu_percent:      {mfu}
total_tokens_M:   499.6
num_steps:        953
num_params_M:     50.3
depth:            8
"""


def summary(run, capsys, device_name):
    """(val_bpb, everything printed) of a run of 300.06 seconds."""
    run.begin()
    run.start()
    run.steps(1, until=300)
    run.seconds += 0.06
    val_bpb = run.prepare.evaluate_bpb(Uniform(), run.tokenizer, 8)
    run.seconds += 25
    run.clock.device_name = device_name
    run.clock.summary(**NUMBERS)
    return val_bpb, capsys.readouterr().out


@pytest.mark.parametrize("device_name, mfu", [("NVIDIA H100 80GB HBM3", "40.22"), ("Some CPU, 2 cores", "0.00")])
def test_a_run_ends_with_the_block_byte_for_byte(run, capsys, device_name, mfu):
    val_bpb, out = summary(run, capsys, device_name)
    (total,) = re.findall(r"^total_seconds:    (\d+\.\d)$", out, re.MULTILINE)
    assert out.endswith("\n" + BLOCK.format(val_bpb=val_bpb, total=total, mfu=mfu))
    assert out.count("---\n") == 1
    assert float(total) >= 325  # and the age of this process when the run began


def test_grep_finds_every_key_in_the_log(run, capsys, tmp_path):
    val_bpb, out = summary(run, capsys, "NVIDIA H100 80GB HBM3")
    (tmp_path / "run.log").write_text(out)
    for line in BLOCK.splitlines()[1:]:
        found = subprocess.check_output(["grep", f"^{line.split()[0]}", tmp_path / "run.log"], text=True)
        key, value = found.split()  # one line, one value
        assert f"{key} " == line.split()[0] + " " and float(value) >= 0
    assert f"\nval_bpb:          {val_bpb:.6f}\n" in out


# Dense bf16 TFLOP/s with float32 accumulation. Where a name could be taken for its neighbour's, both are here.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA GB200": 2500,
    "NVIDIA B200": 2250,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71,
    "AMD Instinct MI300X": 1307.4,
}
UNKNOWN = [
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4080 SUPER",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H20",
    "AMD Radeon RX 7900 XTX",
    "AMD Radeon Graphics",
    "AMD Instinct MI300A",
    "NVIDIA A100X",
    "Tesla T4",
    "Intel(R) Xeon(R) Processor @ 2.50GHz, 2 cores",
    "Apple M4 Max",
    "",
]


@pytest.fixture
def clock(run):
    return run.begin()


def test_mfu_of_a_known_device_is_the_share_of_its_peak(clock):
    for clock.device_name, peak in PEAKS.items():
        half = clock.mfu_percent(1e9, peak * 500, 1.0)  # FLOPs a token, tokens, seconds
        assert half == pytest.approx(50), clock.device_name
    assert clock.mfu_percent(1e9, 1000, 0) == 0.0  # no time, no rate


@pytest.mark.parametrize("name", UNKNOWN)
def test_mfu_of_an_unknown_device_is_zero_and_not_a_guess(clock, name):
    clock.device_name = name
    assert clock.mfu_percent(239e6, 524288, 0.318) == 0.0


# --- One run a folder ---------------------------------------------------------


def locked(folder):
    """Whether a run is going on there, asked as the bookkeeping asks it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


BEGIN = """
import os, time, prepare
prepare.begin_run(__file__)
print("begun", flush=True)
while not os.path.exists("enough"):
    time.sleep(0.05)
"""


def test_who_only_looks_whether_a_run_goes_on_stops_none_from_beginning(run):
    """status and the dashboard hold a shared lock for a moment."""
    looking = os.open(run.repo.path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.3, os.close, [looking]).start()
    run.begin()
    assert locked(run.repo.path)


@pytest.mark.parametrize("end", ["by itself", "killed"])
def test_a_second_run_in_the_folder_is_refused_while_the_first_goes_on(run, make_repo, end):
    (run.repo.path / "begin.py").write_text(BEGIN)
    assert not locked(run.repo.path)
    first = run.repo.start("begin.py")
    try:
        assert any(line == "begun\n" for line in first.stdout)
        assert locked(run.repo.path)
        assert_refused(run.repo.run("begin.py"), f"another run is going on in {run.repo.path}", "another checkout")
        assert locked(run.repo.path) and first.poll() is None
        neighbour = make_repo("climbmix")
        assert not locked(neighbour.path)
        if end == "killed":
            os.kill(first.pid, signal.SIGKILL)
        else:
            (run.repo.path / "enough").touch()
        assert first.wait(60) == (-9 if end == "killed" else 0)
    finally:
        kill_group(first)
        first.stdout.close()
        first.stderr.close()
    assert not locked(run.repo.path)
    run.begin()
    assert locked(run.repo.path)


# --- Any machine --------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


CPUINFO = {
    "x86": (b"processor\t: 0\nmodel name\t: Some Xeon @ 2.00GHz\nflags\t: fpu\n", "Some Xeon @ 2.00GHz"),
    "not UTF-8": (b"model name\t: Some \xae CPU\n", "Some \ufffd CPU"),
    "ARM": (b"processor\t: 0\nCPU implementer\t: 0x41\n", "aarch64"),
    "macOS": (None, "aarch64"),
}


@pytest.mark.parametrize("system", CPUINFO)
@pytest.mark.parametrize("affinity, count, cores", [({0, 5, 7}, 64, 3), (None, 64, 64), (None, None, 1)])
def test_a_cpu_is_named_with_the_cores_that_the_run_may_use(no_gpu, monkeypatch, tmp_path, system, affinity, count, cores):
    content, name = CPUINFO[system]
    if content is not None:
        (tmp_path / "cpuinfo").write_bytes(content)
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    if affinity is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: affinity, raising=False)
    assert devices.pick_device() == (torch.device("cpu"), f"{name}, {cores} cores")


@pytest.mark.parametrize("missing", ["CLOCK_BOOTTIME", "sysconf", None])
def test_the_age_of_the_process_is_zero_where_the_system_does_not_tell(monkeypatch, missing):
    if missing:
        monkeypatch.delattr(time if missing == "CLOCK_BOOTTIME" else os, missing)
        assert process.process_age() == 0.0
    elif os.path.exists("/proc/self/stat"):
        assert 0.1 < process.process_age() < 86400


def test_a_folder_without_locks_stops_no_run(monkeypatch, tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None

    def flock(fd, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert process.lock_folder(tmp_path) is None
    assert before is None or len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    assert process.lock_folder(tmp_path) is None


def test_logs_can_be_written_where_stdout_is_not_utf8(make_repo, prepared_stdlib, tmp_path):
    """A cache in a folder with a name that cp1252 and ascii lack, and the same name in the device's."""
    repo = make_repo("stdlib", AUTORESEARCH_CACHE=tmp_path / "\u76ee")
    repo.copy_cache(prepared_stdlib)
    name = "prepare.pick_device = lambda: (prepare.devices.pick_device()[0], 'a \u76ee device, 2 cores')"
    result = repo.run("prepare.py", PYTHONIOENCODING="cp1252")
    assert (result.rc, result.err) == (0, "") and "is prepared in" in result.out and "\\u76ee" in result.out
    code = f"import prepare\n{name}\nprepare.begin_run(__file__)\nprint('\\u03c3 \\u76ee')"
    (repo.path / "train.py").write_text(code, encoding="utf-8")
    result = repo.run("train.py", PYTHONIOENCODING="ascii")
    assert (result.rc, result.err) == (0, "")
    said = json.loads(re.search("^run: (.*)$", result.out, re.MULTILINE)[1])
    assert said["device"] == "cpu (a \u76ee device, 2 cores)" and result.out.endswith("\\u03c3 \\u76ee\n")
