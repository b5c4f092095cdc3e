"""lab profile: what it measures of a train.py, how it shows it, and what it refuses. Nothing of the tree changes."""

import fcntl
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Repo, clean_environment

from lab.base.errors import Refused
from lab.fleet import fleet
from lab.machine import profile, profiled_run
from lab.store import names

TINY = {"DEPTH": "2", "MODEL_DIM": "32", "HEAD_DIM": "16", "DEVICE_BATCH_SIZE": "4", "TOTAL_BATCH_SIZE": "8 * MAX_SEQ_LEN",
        "DTYPE": "torch.float32", "COMPILE": "False"}  # fmt: skip


@pytest.fixture
def tiny(make_repo):
    """A copy with a tiny model, whose data are not prepared; steps take a millisecond, so few are measured."""
    repo = make_repo("stdlib")
    for name, value in TINY.items():
        repo.edit("train.py", rf"^{name} = .*", f"{name} = {value}")
    repo.edit("lab/machine/profiled_run.py", r"^WHOLE = .*", "WHOLE = 3, 5, 10.0")
    return repo


def everything_below(path):
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in Path(path).rglob("*") if "__pycache__" not in p.parts}


def found(**changes):
    """A measurement as lab.machine.profiled_run writes it, on a CPU."""
    return {
        "device": "cpu (a fake, 2 cores)",
        "steps": {"seconds": 0.1, "median": 0.125, "n": 20, "per_block": 1, "tokens": 2048.0, "mfu_percent": None, "minor_faults": 1234.4,
                  "major_faults": 0.0, "system_share": 0.21},
        "split": {"seconds": 0.11, "parts": {"data": 0.0011, "forward": 0.033, "backward": 0.055, "optimizer": 0.0165}},
        "profile": {"operators": [["aten::mm", 0.04, 81.0], ["aten::mul\x1b[31m", 0.01, 2.5]], "operators_total": 0.08,
                    "kernels": None, "kernels_total": 0.0, "wall": 0.1, "n": 3},
        "memory": {"parameters": 2**20, "gradients": 2**20, "optimizer state": 2**21, "activations and temporaries": 2**22,
                   "peak": 2**23, "resident": 2**30},
        "graphs": None,
    } | changes  # fmt: skip


def on_gpu():
    names = [f"void at::native::vectorized_elementwise_kernel<4, at::native::{i}, at::detail::Array<char*, 3>>" for i in range(10)]
    return found(
        profile={"operators": [[f"aten::op{i}", 0.004, 10.0] for i in range(10)], "operators_total": 0.08,
                 "kernels": [[name, 0.008, 123456.0] for name in names], "kernels_total": 0.09, "wall": 0.1, "n": 3},
        graphs={"graphs": 5, "in_training": 2, "breaks": 1, "reasons": ["a call of something\nthat dynamo cannot trace " * 9]},
        steps=found()["steps"] | {"mfu_percent": 39.84, "major_faults": 1.5, "n": 120, "per_block": 4},
    )  # fmt: skip


# --- the screen ------------------------------------------------------------------


def test_the_screen_says_what_was_measured():
    lines = profile.screen(found(), "run: {}\nattention: sdpa (on cpu)\nstep 00001 (50.0%)\n")
    text = "\n".join(lines)
    assert lines[0] == "train.py on cpu (a fake, 2 cores), random tokens" and lines[1] == "attention: sdpa (on cpu)"
    assert "step 100.0 ms, best of 20 steps (median 125.0); 20,480 tokens/s, mfu not known" in lines
    parts = {m[1]: (m[2], m[3]) for line in lines if (m := re.fullmatch(r"  (\w+) +([\d.,]+) +([\d.]+)%", line))}
    assert parts == {"data": ("1.10", "1.0"), "forward": ("33.00", "30.0"), "backward": ("55.00", "50.0"),
                     "optimizer": ("16.50", "15.0"), "gaps": ("4.40", "4.0")}  # fmt: skip
    assert re.search(r"^  aten::mm +50\.0% +40\.00 +81$", text, re.MULTILINE) and "\x1b" not in text
    assert "memory in MB: parameters 1.0, gradients 1.0, optimizer state 2.0, activations and temporaries 4.0" in lines
    assert "page faults: 1,234 a step; 21% of the CPU time is the system's" in lines
    assert lines[-1] == "graphs: nothing was compiled"


def test_kernels_stand_beside_operators_and_all_fits_on_a_screen():
    lines = profile.screen(on_gpu(), "".join(f"{start}{'x' * 300}\n" for start in profile.TOLD))
    assert len(lines) <= 40 and max(map(len, lines)) <= profile.WIDTH and all(line.isprintable() for line in lines)
    text = "\n".join(lines)
    assert re.search(r"^  aten::op0 +5\.0% +4\.00 +10$", text, re.MULTILINE) and text.count("aten::op") == 5
    assert re.search(r"^  void at::native::vectorized_\S*… +8\.9% +8\.00 +123,456$", text.replace(", ", ","), re.MULTILINE), text
    assert text.count("void at") == 10
    assert "the device is busy for 90% of a profiled step" in lines and "mfu 39.8%" in text and "1.5 from disk" in text
    assert any("ms, best of 30 blocks of 4 steps (median 125.0);" in line for line in lines)
    assert "graphs: 5 compiled, 2 of them after the clock had started; 1 graph breaks" in lines


def test_what_is_not_known_is_not_made_up():
    memory = dict.fromkeys(found()["memory"]) | {"parameters": 0, "resident": 2**20}
    bare = found(memory=memory, split={"seconds": 0.1, "parts": {"data": 0.02}}, steps=found()["steps"] | {"tokens": 0})
    text = "\n".join(profile.screen(bare, ""))
    assert "tokens/s not known" in text and "gradients –" in text and "peak –" in text
    assert re.search(r"^  forward +not seen$", text, re.MULTILINE) and re.search(r"^  gaps +80\.00 +80\.0%$", text, re.MULTILINE)


# --- a real one ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_profile_of_a_real_train_py_changes_nothing(tiny, compiled):
    tiny.edit("train.py", "^COMPILE = .*", f"COMPILE = {compiled}")
    (tiny.path / "run.log").write_text("of the run before\n")
    (tiny.path / "checkpoint.pt").write_bytes(b"its weights")
    tiny.cache.mkdir()
    before = everything_below(tiny.path)
    done = tiny.run("-m", "lab", "profile", timeout=850)
    assert done.rc == 0, done.err
    assert everything_below(tiny.path) == before
    assert {p.name for p in tiny.cache.iterdir()} <= {"compile"}, "the data were touched"
    lines = done.out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= profile.WIDTH
    assert "device batch: 4 x 64 tokens, 2 micro-batches a step" in lines
    for part in ("data", "forward", "backward", "optimizer", "gaps"):
        assert re.search(rf"^  {part} +[\d.,]+ +[\d.]+%$", done.out, re.MULTILINE), done.out
    assert re.search(r"^step [\d.,]+ ms, best of 5 steps .*; [\d,]+ tokens/s, mfu not known$", done.out, re.MULTILINE)
    if compiled and "torch.compile: yes" in done.out:
        assert re.search(r"^graphs: [1-9]\d* compiled; 0 graph breaks$", done.out, re.MULTILINE), done.out
        assert re.search(r"^  graph_\d+_cpp_fused|^  cpp_fused", done.out, re.MULTILINE), "kernels have no names"
    else:
        assert "aten::mm" in done.out and lines[-1] == "graphs: nothing was compiled"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("optimizer", ["train.py's own", "torch's"])
def test_the_numbers_of_a_real_profile_agree_with_each_other(tiny, optimizer):
    """The train.py tells its number of parameters; each is a float32 with a gradient. A step has 8 rows of 64 tokens."""
    code = """
        import json
        from pathlib import Path
        from lab.machine import profile
        print("FOUND " + json.dumps(profile.measured(Path.cwd())))
    """
    if optimizer == "torch's":
        group = 'dict(params=model.parameters(), lr=0.01, initial_lr=0.01, kind="own")'
        tiny.edit("train.py", r"^    optimizer = build_optimizer\(.*", f"    optimizer = torch.optim.AdamW([{group}])")
    tiny.edit("train.py", r'^(    batch_size = warm_up\(model.*)$', r'\1\n    print(f"parameters {params}")')
    done = tiny.run_code(code, timeout=850)
    assert done.rc == 0, done.err
    result, printed = json.loads(done.out.partition("FOUND ")[2])
    params = int(re.search(r"^parameters (\d+)$", printed, re.MULTILINE)[1])
    memory, steps, split = result["memory"], result["steps"], result["split"]
    assert memory["gradients"] == 4 * params and memory["parameters"] > 4 * params  # rotary buffers too
    assert memory["optimizer state"] > 4 * params and steps["tokens"] == 8 * 64
    assert memory["peak"] == sum(memory[kind] or 0 for kind in list(memory)[:4])
    assert memory["activations and temporaries"] > 4 * 64 * 512 * 4, "the logits of a micro-batch alone have more"
    assert set(split["parts"]) == set(profile.PARTS) and sum(split["parts"].values()) <= split["seconds"]
    assert steps["seconds"] <= steps["median"] and steps["minor_faults"] >= 0 and 0 <= steps["system_share"] <= 1
    seconds = [s for _, s, _ in result["profile"]["operators"]]
    assert seconds == sorted(seconds, reverse=True) and 0 < sum(seconds) <= result["profile"]["operators_total"]


# --- refused, in a sentence --------------------------------------------------------


class Prepare(SimpleNamespace):
    """As much of prepare as train.py and the child need before the first step."""

    def __init__(self):
        torch_device, self.kept = SimpleNamespace(type="cpu"), []
        super().__init__(
            DEFAULT_SEED=42, VOCAB_SIZE=512, _run=None, make_output_safe=lambda: None, choose_compile_cache=lambda: None,
            choose_seed=lambda injected: 42, pick_device=lambda: (torch_device, "fake"), make_dataloader=None,
            load_tokenizer=lambda: sys.exit("stdlib is not prepared"),
            devices=SimpleNamespace(
                synchronize=lambda device: None, compiled_graphs=lambda: 0, keep_freed_memory=lambda: self.kept.append(True)
            ),
        )  # fmt: skip


@pytest.fixture
def failure(tmp_path, monkeypatch):
    """failure(code) -> the sentence about a train.py with this code, without torch and without another process."""
    backward = SimpleNamespace(backward=None, grad=None)
    torch = SimpleNamespace(autograd=backward, compile=None, set_float32_matmul_precision=lambda text: None)
    hooks = SimpleNamespace(register_optimizer_step_pre_hook=len, register_optimizer_step_post_hook=len)
    hooks.register_optimizer_step_pre_hook = hooks.register_optimizer_step_post_hook = lambda hook: None
    hooks.Optimizer = type("Optimizer", (), {})
    monkeypatch.chdir(tmp_path)

    def fails(code):
        for name, module in [("torch", torch), ("torch.optim.optimizer", hooks), ("prepare", Prepare())]:
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys, "argv", ["profile", str(tmp_path / "answer.json")])
        (tmp_path / "train.py").write_text(code)
        profiled_run.main()
        return json.loads((tmp_path / "answer.json").read_text())["failed"]

    return fails


BEGIN = "from prepare import begin_run, load_tokenizer\nclock = begin_run(__file__)\n"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("x = 1\n", "ends without calling begin_run(__file__)"),
        (BEGIN, "ends without calling clock.start(model, batch_size)"),
        (BEGIN + "clock.progress()\n", "calls clock.progress() before clock.start(model, batch_size)"),
        (BEGIN + "clock.start(None, 8)\nclock.progress()\nclock.progress()\n",
         "ends its training after 1 steps although clock.progress() is 0.5"),
        (BEGIN + "clock.start(None, 8)\nclock.progress()\nclock.summary(num_steps=3)\n",
         "ends its training after 0 steps although clock.progress() is 0.5"),
        (BEGIN + "\n1 / 0\n", "fails with ZeroDivisionError: division by zero (train.py, line 4)"),
        (BEGIN + "def build():\n    return GPT()\n\nbuild()\n", "fails with NameError: name 'GPT' is not defined (train.py, line 4)"),
        ("def main(:\n", "fails with SyntaxError: invalid syntax (train.py, line 1)"),
        ("from prepare import begin_runs\n", "fails with ImportError: cannot import name 'begin_runs'"),
        (BEGIN + "raise SystemExit('out of memory at one row: make the model smaller')\n",
         "stops: out of memory at one row: make the model smaller"),
        (BEGIN + "assert load_tokenizer().vocab_size == 512 and clock.seed == 42\n"
             "import prepare\nassert prepare.kept == [True], 'as a run does on a CPU'\nraise SystemExit('as wanted')\n", "stops: as wanted"),
    ],
)  # fmt: skip
def test_a_train_py_that_cannot_be_profiled_is_refused_in_a_sentence(failure, code, sentence):
    assert failure(code).startswith(sentence) and failure(code).count("train.py, line") <= 1


def test_a_child_that_dies_or_hangs_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "CHILD", "import os, sys; print('Killed', file=sys.stderr, flush=True); os._exit(9)")
    with pytest.raises(Refused, match=r"^the process that runs train.py ended with status 9: Killed$"):
        profile.measured(tmp_path)
    monkeypatch.setattr(profile, "CHILD", "import time; time.sleep(600)")
    with pytest.raises(Refused, match=r"^train.py took longer than 1 s"):
        profile.measured(tmp_path, time_limit=1)


def lab(path):
    """`lab profile` in this folder, without anything that would let it begin to measure."""
    repo = Repo.__new__(Repo)
    repo.path, repo.env = path, clean_environment(path, path / "cache", PYTHONPATH=ROOT)
    return repo.run("-m", "lab", "profile")


def test_it_refuses_while_a_run_is_in_progress_and_where_there_is_no_train_py(tmp_path):
    done = lab(tmp_path)
    assert done.rc == 1 and done.err.startswith("lab profile: there is no train.py in ") and done.out == ""
    (tmp_path / "train.py").write_text("raise SystemExit\n")
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        done = lab(tmp_path)
    finally:
        os.close(fd)
    assert done.rc == 1 and done.err.startswith("lab profile: a run is in progress in this tree") and done.out == ""
    assert len(done.err.splitlines()) == 1


def test_it_refuses_where_a_fleet_has_an_agent_without_a_gpu(tmp_path, monkeypatch):
    """Such an agent feeds workers. A person who hides the GPUs of a machine is not refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit\n")

    def measured(tree):
        raise Refused("measured")

    monkeypatch.setattr(profile, "measured", measured)
    for name, value in fleet.NO_GPU.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match="^the agent of this fleet has no GPU: .*; profile on a GPU that no worker uses$"):
        profile.run(None)
    monkeypatch.delenv(names.FEEDER)
    with pytest.raises(Refused, match="^measured$"):
        profile.run(None)
    monkeypatch.setenv(names.SRUN_JOB_FILE, "job-1")  # as login-night.sh does
    with pytest.raises(Refused, match="^trainings of this night run on a compute node: .*; compare the tokens/s"):
        profile.run(None)


# --- the parts ----------------------------------------------------------------------


def test_a_part_inside_another_counts_once_and_only_while_on(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(profiled_run.time, "perf_counter", lambda: next(now))
    parts = profiled_run.Parts(lambda: None)
    with parts.timed("forward"):
        pass
    assert parts.seconds == {}
    parts.on = True
    with parts.timed("backward"), parts.timed("forward"):
        pass
    assert parts.wrapped("data", lambda x: x + 1)(1) == 2
    with pytest.raises(StopIteration), parts.timed("data"):
        raise StopIteration
    assert parts.seconds == {"backward": 1, "data": 2} and parts.open is None


def clock_of(monkeypatch, tmp_path, kind="cpu", fails_at=None, events=()):
    """(a MeasuringClock on a made-up device, a function that returns what one of its generators does if train.py's steps
    take these seconds). torch.profiler takes 100 s to start, and raises at `fails_at`."""
    now = [0.0]

    def call(name, seconds):
        def called(*args, **kwargs):
            now[0] += seconds
            if name == fails_at:
                raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")
            return SimpleNamespace(start=call("start", 100.0), stop=call("stop", 50.0), key_averages=lambda: list(events))

        return called

    torch = SimpleNamespace(
        profiler=SimpleNamespace(profile=call("profile", 10.0)), cuda=SimpleNamespace(reset_peak_memory_stats=lambda: None),
        autograd=SimpleNamespace(DeviceType=SimpleNamespace(CPU="cpu")),
    )  # fmt: skip
    prepare = Prepare()
    prepare.pick_device = lambda: (SimpleNamespace(type=kind), "fake")
    monkeypatch.setattr(profiled_run.time, "perf_counter", lambda: now[0])
    clock = profiled_run.MeasuringClock(prepare, torch, tmp_path / "answer.json")

    def through(steps, seconds):
        taken = iter(seconds)
        try:
            while True:
                next(steps)
                now[0] += next(taken)
        except StopIteration as stop:
            return stop.value

    return clock, through


def test_the_start_of_the_profiler_is_no_time_of_a_step(monkeypatch, tmp_path):
    """Nor is that of its first step, which is slow; the operators of all four steps count."""
    kernel = SimpleNamespace(key="a_kernel", device_type="cuda", self_device_time_total=2e6, self_cpu_time_total=0, count=8)
    clock, through = clock_of(monkeypatch, tmp_path, "cuda", events=[kernel])
    found = through(clock.profiled_steps(), [7.0, 1.0, 1.0, 0.5])
    assert found["wall"] == pytest.approx(2.5 / 3) and found["n"] == 4, "the start used up the limit of seconds"
    assert found["kernels"] == [["a_kernel", 0.5, 2.0]] and found["kernels_total"] == 0.5
    assert "the device is busy for 60% of a profiled step" in profile.of_operators(found)


@pytest.mark.parametrize("fails_at", ["profile", "start", "stop"])
def test_a_profiler_that_fails_is_not_blamed_on_train_py(monkeypatch, tmp_path, fails_at):
    clock, through = clock_of(monkeypatch, tmp_path, "cuda", fails_at)
    sentence = r"^could not be measured: torch.profiler fails with RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES$"
    with pytest.raises(profiled_run.Failed, match=sentence):
        through(clock.profiled_steps(), [1.0] * 9)


@pytest.mark.parametrize(("kind", "size"), [("cpu", 1), ("cuda", 4)])
def test_the_best_of_a_gpu_is_a_mean_over_a_block_of_steps(monkeypatch, tmp_path, kind, size):
    clock, through = clock_of(monkeypatch, tmp_path, kind)
    found = through(clock.whole_steps(), [1.0, 0.2, 0.3, 0.5] * 30)
    assert found["per_block"] == size and found["seconds"] == pytest.approx({1: 0.2, 4: 0.5}[size]) and found["n"] % size == 0


def test_random_documents_are_ordinary_tokens_of_natural_lengths():
    state, lengths = {}, []
    documents = profiled_run.random_documents([], state)
    for _ in range(2000):
        length, tokens, start = next(documents)
        lengths.append(length)
        assert 2 <= length and start + length <= len(tokens)
    from corpus.tokenizer import NUM_ORDINARY

    assert state["epoch"] == 1 and tokens.max() < NUM_ORDINARY and 400 < sorted(lengths)[1000] < 900
