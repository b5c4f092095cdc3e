"""train.py as a whole, in processes of its own: a short training to its end, and every way it can end otherwise."""

import ast
import functools
import hashlib
import json
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, Result, assert_refused, clean_environment, kill_group, left_out

from lab.store import run_log

KEYS = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth"""
TINY = {  # on any machine: of the two dtypes, with and without a compiler, the one that needs least of it
    "DEPTH": "2", "MODEL_DIM": "32", "HEAD_DIM": "16", "WINDOW_PATTERN": '"SL"', "DEVICE_BATCH_SIZE": "8",
    "TOTAL_BATCH_SIZE": "16 * MAX_SEQ_LEN", "DTYPE": "torch.float32", "COMPILE": "False",
}  # fmt: skip
MAIN = 'if __name__ == "__main__":'


def set_knob(repo, name, value):
    """Replaces the whole right side, as an agent does."""
    repo.edit("train.py", rf"^{name} = .*", f"{name} = {value}")


@pytest.fixture
def make_training(make_repo, prepared_climbmix):
    """make_training(code, ...): a copy with a tiny model, knobs of its own, and this code before its last lines."""

    def make(code="", dataset="climbmix", time_budget=2, grace=250, knobs=None, **kwargs):
        repo = make_repo(dataset, time_budget=time_budget, grace=grace, **kwargs)
        if dataset == "climbmix":
            repo.copy_cache(prepared_climbmix)
        for name, value in (TINY if knobs is None else knobs).items():
            set_knob(repo, name, value)
        source = (repo.path / "train.py").read_text()
        assert source.count(f"\n{MAIN}\n") == 1
        (repo.path / "train.py").write_text(source.replace(f"\n{MAIN}\n", f"{code}\n\n{MAIN}\n"))
        return repo

    return make


SERVER = """
import json, os, runpy, sys
import filelock, numpy, pyarrow.parquet, requests, tiktoken, torch, torch._dynamo, tqdm

for line in sys.stdin:
    job = json.loads(line)
    if (pid := os.fork()) == 0:
        os.setsid()
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["env"])
        for fd, name, flags in (0, os.devnull, os.O_RDONLY), (1, job["out"], os.O_RDWR), (2, job["err"], os.O_RDWR):
            os.dup2(os.open(name, flags), fd)
        sys.argv, sys.path[0] = job["args"], job["folder"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        break
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Python:
    """Runs scripts as the interpreter does, but each in a fork of a process that has imported torch already: a
    training then costs a second instead of ten."""

    def __init__(self, folder):
        self.folder, self.jobs, self.pid = folder, 0, None
        command, env = [sys.executable, "-c", SERVER], clean_environment(folder, folder)
        pipe = functools.partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.server = pipe(command, env=env, cwd=folder, start_new_session=True)

    def start(self, repo, *args, **env):
        self.jobs += 1
        self.out, self.err = (self.folder / f"{self.jobs}.{name}" for name in ("out", "err"))
        self.out.touch()
        self.err.touch()
        env = repo.env | {key: str(value) for key, value in env.items()}
        job = dict(folder=str(repo.path), args=args, env=env, out=str(self.out), err=str(self.err))
        print(json.dumps(job), file=self.server.stdin, flush=True)
        self.pid = int(self.server.stdout.readline())

    def wait(self):
        rc = int(self.server.stdout.readline())
        self.pid = None
        return Result(rc, self.out.read_text(), self.err.read_text())

    def run(self, repo, *args, **env):
        self.start(repo, *args, **env)
        return self.wait()

    def wait_for(self, text, seconds=120):
        """Until the process in progress has printed that."""
        deadline = time.monotonic() + seconds
        while text not in self.out.read_text():
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.out.read_text()}\n{self.err.read_text()}"
            time.sleep(0.02)


@pytest.fixture(scope="session")  # and not "module": the tests here may then be shared out to several workers
def server(tmp_path_factory):
    python = Python(tmp_path_factory.mktemp("server"))
    with python.server:
        yield python
        kill_group(python.server)


@pytest.fixture
def python(server):
    yield server
    if server.pid:  # a training that the test gave up
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def header(out):
    (line,) = [line for line in out.splitlines() if line.startswith("run: ")]
    return json.loads(line.removeprefix("run: "))


def summary(out):
    """The block that ends a log, as {key: text}; nothing may come after it."""
    block = out[out.index("\n---\n") + 5 :]
    assert re.fullmatch(r"(\w+: +\S+\n){9}", block), block
    return dict(line.split(": ", 1) for line in block.replace(":  ", ": ").splitlines())


def left_in(repo):
    """What a run left beside train.py."""
    return {p.name for p in repo.path.iterdir()} & {"checkpoint.pt", "checkpoint.pt.tmp"}


# --- To the end ---------------------------------------------------------------


def test_a_short_training_from_start_to_end(make_training):
    repo = make_training()
    result = repo.run("train.py", timeout=280)
    assert (result.rc, result.err) == (0, "")
    values = {key: text.strip() for key, text in summary(result.out).items()}
    assert " ".join(values) == KEYS
    steps = int(values["num_steps"])
    seconds = float(values["training_seconds"])
    assert steps > 1 and 2 <= seconds < 2 + max(2 * seconds / steps, 0.1) + 0.5
    assert seconds < float(values["total_seconds"])
    assert 0.5 < float(values["val_bpb"]) < 8
    assert (values["depth"], values["peak_vram_mb"], values["mfu_percent"]) == ("2", "0.0", "0.00")
    assert float(values["total_tokens_M"]) == pytest.approx(steps * 16 * 32 / 1e6, abs=0.05)

    said = header(result.out)
    assert (said["clock"], said["dataset"], said["seed"]) == ("monotonic", "climbmix", 42)
    for line in ("dtype: ", "attention: sdpa", "torch.compile: no, eager (COMPILE", "device batch: 8 x 32 tokens, 2"):
        assert f"\n{line}" in result.out
    progress = re.findall(r"^step \d{5} \(\d+\.\d%\) \| loss \d\.\d{6} \| .* s left$", result.out, re.MULTILINE)
    assert progress and progress[-1].startswith(f"step {steps:05d} (100.0%)") and "\r" not in result.out

    checkpoint = torch.load(repo.path / "checkpoint.pt", weights_only=True)
    assert checkpoint.keys() == {"model", "config", "run_id"} and checkpoint["run_id"] == said["run_id"]
    assert f"{sum(p.numel() for p in checkpoint['model'].values()) / 1e6:.1f}" == values["num_params_M"]
    assert left_in(repo) == {"checkpoint.pt"}


NOTHING_BUT_READING = """
mount --bind "$AUTORESEARCH_CACHE" "$AUTORESEARCH_CACHE"
mount -o remount,bind,ro "$AUTORESEARCH_CACHE"
if touch "$AUTORESEARCH_CACHE/file" 2> /dev/null; then echo "this cache can be written" >&2; exit 1; fi
exec "$@"
"""


def offline_and_read_only(repo, *args, **kwargs):
    return repo.run(*(args or ["train.py"]), wrap=["unshare", "-rnm", "sh", "-c", NOTHING_BUT_READING, "sh"], timeout=280, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("compile_folder", ["there", "not there"])
def test_a_training_needs_no_network_and_only_reads_the_data(make_training, no_network, own_mounts, compile_folder):
    """And inductor's cache goes where it can be written."""
    repo = make_training(time_budget=1)
    if compile_folder == "there":
        (repo.cache / "compile").mkdir()
    main = (
        "import os, runpy, socket\n"
        "assert socket.socket().connect_ex(('127.0.0.1', 80)) == 101, 'a network is there'\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
        "compiled = os.environ.get('TORCHINDUCTOR_CACHE_DIR', '')\n"
        "assert not compiled.startswith(os.environ['AUTORESEARCH_CACHE']), compiled\n"
    )
    result = offline_and_read_only(repo, "-c", main)
    assert (result.rc, result.err) == (0, "")
    assert "\nval_bpb: " in result.out and left_in(repo) == {"checkpoint.pt"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_training_on_the_standard_library_offline_and_read_only(
    make_training, no_network, own_mounts, prepared_stdlib, tmp_path, dtype
):
    if not shutil.which(os.environ.get("CXX", "g++")):
        left_out("no C++ compiler")
    knobs = TINY | {"COMPILE": "True", "DTYPE": f"torch.{dtype}"}
    repo = make_training(dataset="stdlib", knobs=knobs, AUTORESEARCH_CACHE=tmp_path / "stdlib", TMPDIR=tmp_path)
    repo.copy_cache(prepared_stdlib)
    result = offline_and_read_only(repo)
    # Where nvcc is installed and no GPU is, torch says so in a line of its log, on importing its compiler.
    told = [line for line in result.err.splitlines() if "No CUDA runtime is found" not in line]
    assert (result.rc, told) == (0, [])
    assert "\nval_bpb: " in result.out and "graphs compiled after the clock started: 0\n" in result.out
    assert "\ntorch.compile: yes" in result.out and f"\ndtype: {dtype} (set by DTYPE)\n" in result.out


AS_ON_A_GPU = """
import functools

torch.compile = functools.partial(torch.compile, fullgraph=True)  # a graph break is an error


def set_compile(model, optimizer, compiled, device, set_compile=set_compile):
    set_compile(model, optimizer, compiled, torch.device("cuda"))
    assert optimizer.adamw_step is not adamw_step and optimizer.muon_step is not muon_step
"""


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_with_everything_compiled_that_a_gpu_compiles_no_graph_is_made_after_the_warm_up(make_training):
    """Network and both optimizer steps in one graph each, two micro-batches, a batch that does not divide the rows that
    are scored, and schedules that change every value. In a process of its own: compiling starts threads."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        left_out("no C++ compiler")
    knobs = TINY | {"GPU": "True", "COMPILE": "True", "DTYPE": "torch.bfloat16", "DEVICE_BATCH_SIZE": "7", "TOTAL_BATCH_SIZE": "14 * 32"}
    knobs |= {"WARMUP_RATIO": "0.2", "EMBEDDING_WEIGHT_DECAY": "0.01"}
    result = make_training(AS_ON_A_GPU, knobs=knobs, grace=1500).run("train.py", timeout=1900)
    assert result.rc == 0, result.err
    assert "\ntorch.compile: yes" in result.out and "warm-up again" not in result.out
    assert "\ndevice batch: 7 x 32 tokens, 2 micro-batches a step\n" in result.out
    assert int(summary(result.out)["num_steps"]) > 2
    assert "\ngraphs compiled after the clock started: 0\n" in result.out


CPU_WITH = """
torch.cuda.is_available = lambda: False
for name in ("avx512_bf16", "amx_tile"):
    setattr(torch.cpu, f"_is_{{name}}_supported", lambda name=name: name == {feature!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("feature, dtype", [("", "float32"), ("avx512_bf16", "bfloat16"), ("amx_tile", "bfloat16")])
def test_a_training_on_a_cpu_with_and_without_fast_bfloat16_and_no_compiler(make_training, python, feature, dtype):
    """Whatever this CPU has: the dtype that is chosen, a compiler that is missing, and a checkpoint that says so."""
    knobs = {name: value for name, value in TINY.items() if name != "DTYPE"} | {"COMPILE": "True"}
    repo = make_training(CPU_WITH.format(feature=feature), knobs=knobs, time_budget=1)
    result = python.run(repo, "train.py", CXX="no-such-compiler")
    assert (result.rc, result.err) == (0, "") and " ".join(summary(result.out)) == KEYS
    assert re.search(rf"^dtype: {dtype} \(.*{feature}.*\)$", result.out, re.MULTILINE)
    assert "\ntorch.compile: no, eager (no C++ compiler: no-such-compiler not found)\n" in result.out
    assert torch.load(repo.path / "checkpoint.pt", weights_only=True)["config"]["dtype"] == dtype


# --- Edits an agent makes -----------------------------------------------------


def settings(out):
    """(number of parameters, configuration) from the log's line about the model."""
    count, config = re.search(r"^model: ([\d,]+) parameters, (\{.*\})$", out, re.MULTILINE).groups()
    return int(count.replace(",", "")), ast.literal_eval(config)


def trained(python, repo):
    """The log of a run that ended with the whole summary and a checkpoint, and what it said of the model."""
    result = python.run(repo, "train.py")
    assert (result.rc, result.err) == (0, ""), result.err
    values = summary(result.out)
    assert " ".join(values) == KEYS and int(values["num_steps"]) > 1 and left_in(repo) == {"checkpoint.pt"}
    return result.out, values, *settings(result.out)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [False, True])
def test_a_depth_of_three_is_three_and_the_width_follows(make_training, python, gpu):
    """With the hyperparameters of a CPU and of a GPU: one line, nothing else."""
    knobs = {"DEPTH": "3", "GPU": str(gpu)}
    if gpu:  # small enough for a CPU; what follows from the depth stays as it is
        knobs |= {name: TINY[name] for name in ("TOTAL_BATCH_SIZE", "DEVICE_BATCH_SIZE", "COMPILE", "DTYPE")}
    _, values, _, config = trained(python, make_training(knobs=knobs, time_budget=4))
    assert values["depth"].strip() == "3" and len(config["windows"]) == 3
    assert config["n_embd"] == (256 if gpu else 128)  # 3 * 64 and 3 * 32, rounded up to whole heads


@pytest.mark.slow
def test_the_width_need_not_follow_from_the_depth(make_training, python):
    knobs = TINY | {"DEPTH": "3", "MODEL_DIM": "128"}
    _, values, _, config = trained(python, make_training(knobs=knobs, time_budget=1))
    assert values["depth"].strip() == "3" and config["n_embd"] == 128 and len(config["windows"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("rows, device_batch, micro_batches", [(4, 4, 1), (24, 8, 3), (12, 6, 2)])
def test_the_total_batch_is_one_edit(make_training, python, rows, device_batch, micro_batches):
    repo = make_training(knobs=TINY | {"TOTAL_BATCH_SIZE": f"{rows} * 32"}, time_budget=1)
    out, _, _, _ = trained(python, repo)
    assert f"\ndevice batch: {device_batch} x 32 tokens, {micro_batches} micro-batches a step\n" in out


BLOCK = "        self.attn = CausalSelfAttention(config, gated)"
EDITS = {  # what an agent tries: (text, its replacement) as often as it needs, and the parameters that it adds
    "a vector in each block": (
        [(BLOCK, BLOCK + "\n        self.gain = nn.Parameter(torch.ones(config.n_embd))"),
         ("return x + self.c_proj(", "return x + self.gain * self.c_proj(")],
        2 * 32),
    "a scalar in each block": (
        [(BLOCK, BLOCK + "\n        self.gain = nn.Parameter(torch.tensor(1.0))"),
         ("return x + self.c_proj(", "return x + self.gain * self.c_proj(")],
        2),
    "a further embedding": (
        [("        self.lm_head = ", "        self.bigrams = nn.Embedding(97, config.n_embd)\n        self.lm_head = "),
         ("norm(self.wte(idx).to(self.dtype))", "norm((self.wte(idx) + self.bigrams((31 * idx.roll(1, 1).masked_fill("
          "torch.arange(idx.size(1)) == 0, 0) + idx) % 97)).to(self.dtype))")],
        97 * 32),
    "a learning rate": ([("VECTOR_LR = 0.005", "VECTOR_LR = 0.01")], 0),
    "a named back end": ([("ATTENTION = None", 'ATTENTION = "sdpa"')], 0),
    "an attention variant": (
        [("is_causal=mask is None, ", "is_causal=mask is None, scale=0.2, ")], 0),
    "a cosine schedule": (
        [("    return min(warmup, ", "    return 0.5 + 0.5 * __import__('math').cos(3.14159 * progress)\n    return min(warmup, ")],
        0),
    "a batch that grows": (
        [("return TOTAL_BATCH_SIZE, MAX_SEQ_LEN", "return TOTAL_BATCH_SIZE * (1 if progress < 0.5 else 2), MAX_SEQ_LEN")], 0),
    "rows that grow": (
        [("return TOTAL_BATCH_SIZE, MAX_SEQ_LEN", "return TOTAL_BATCH_SIZE, MAX_SEQ_LEN // (4 if progress < 0.5 else 1)")], 0),
}  # fmt: skip


@pytest.fixture(scope="session")
def parameters():
    """"unedited" -> number of parameters of train.py as it is, from when the first test has trained it."""
    return {}


@pytest.mark.parametrize(
    "edit", [edit if i < 1 else pytest.param(edit, marks=pytest.mark.slow) for i, edit in enumerate(EDITS)]
)
def test_an_edit_at_one_place_trains_to_the_end(make_training, python, parameters, edit):
    replacements, added = EDITS[edit]
    if "unedited" not in parameters:
        parameters["unedited"], _ = settings(python.run(make_training(time_budget=1), "train.py").out)
    repo = make_training(time_budget=1)
    source = (repo.path / "train.py").read_text()
    for old, new in replacements:
        assert source.count(old) == 1, f"{source.count(old)} times: {old}"
        source = source.replace(old, new)
    (repo.path / "train.py").write_text(source)
    out, _, count, _ = trained(python, repo)
    assert count - parameters["unedited"] == added
    if edit == "a named back end":
        assert "\nattention: sdpa (set by ATTENTION)\n" in out


INJECTED = """
import functools, itertools, train

now = itertools.count(1000.0).__next__  # a second passes whenever the clock is read
train.begin_run = functools.partial(train.begin_run, now=now, watchdog_now=lambda: 0.0)
train.main()
"""


@pytest.mark.slow
def test_a_seed_decides_the_whole_run(make_training, python):
    """The clock injected: then two runs are one, in processes of their own; another seed is another run."""

    def curve(run, **env):
        repo = make_training(time_budget=40)
        (repo.path / "injected.py").write_text(INJECTED)
        result = run(repo, **env)
        assert (result.rc, result.err) == (0, "")
        said, values = header(result.out), summary(result.out)
        assert said["clock"] == "injected" and said["seed"] == int(env.get("AUTORESEARCH_SEED", 42))
        lines = re.findall(r"^step .*", result.out, re.MULTILINE)
        assert len(lines) == 5 and values["num_steps"].strip() == "39"
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", "\n".join(lines))]
        assert losses[-1] < losses[0]
        weights = torch.load(repo.path / "checkpoint.pt", weights_only=True)["model"]
        return lines, values["val_bpb"], weights

    def forked(repo, **env):
        return python.run(repo, "injected.py", **env)

    one = curve(lambda repo: repo.run("injected.py", timeout=280))
    two = curve(forked)
    assert one[:2] == two[:2] and all(torch.equal(one[2][name], two[2][name]) for name in one[2])
    three = curve(forked, AUTORESEARCH_SEED=43)
    assert not set(one[0]) & set(three[0]) and one[1] != three[1]


# --- Refused before it trains -------------------------------------------------


def test_data_that_was_not_prepared_is_one_line_with_the_command(make_repo, python):
    repo = make_repo("climbmix")
    assert_refused(python.run(repo, "train.py"), "climbmix is not prepared", "run `uv run prepare.py`")
    result = python.run(repo, "train.py", AUTORESEARCH_DATASET="tinystories")
    assert_refused(result, "tinystories is not prepared", "run `AUTORESEARCH_DATASET=tinystories uv run prepare.py`")
    assert left_in(repo) == set() and not repo.cache.exists()


def test_the_standard_library_is_prepared_by_the_run_itself(make_training, python, prepared_stdlib, tmp_path):
    """From the cache as a prepare.py that was killed before its last step left it."""
    repo = make_training(dataset="stdlib", AUTORESEARCH_CACHE=tmp_path / "stdlib", time_budget=1)
    repo.copy_cache(prepared_stdlib)
    (manifest,) = repo.cache.rglob("manifest.json")
    manifest.rename(manifest.with_name("manifest.partial.json"))
    result = python.run(repo, "train.py")
    assert (result.rc, result.err) == (0, "")
    assert result.out.startswith("preparing stdlib") and header(result.out)["dataset"] == "stdlib"
    assert "\nval_bpb: " in result.out and manifest.exists()


@pytest.mark.parametrize(
    "name",
    ["val_rows.npy", *(pytest.param(n, marks=pytest.mark.slow) for n in ("train_00000_offsets.npy", "train_00001.npy", "tokenizer.tiktoken"))],
)
def test_a_truncated_file_of_the_data_is_one_line(make_training, python, name):
    repo = make_training()
    (path,) = repo.cache.rglob(name)
    path.write_bytes(path.read_bytes()[:-2])
    assert_refused(python.run(repo, "train.py"), f"{path} is damaged", "run `uv run prepare.py` to mend it")
    assert left_in(repo) == set()


@pytest.mark.parametrize("rule", ["vocab_size", "max_seq_len", "split_pattern", "format"])
def test_a_manifest_of_other_rules_is_not_believed(make_training, python, rule):
    repo = make_training()
    (path,) = repo.cache.rglob("manifest.json")
    manifest = json.loads(path.read_text())
    manifest["rules"][rule] = 99
    path.write_text(json.dumps(manifest))
    assert_refused(python.run(repo, "train.py"), "climbmix is not prepared", "run `uv run prepare.py`")


def test_other_rules_need_other_data(make_training, python):
    repo = make_training()
    repo.set_rules("climbmix", 32, 32 * 32, 512)
    assert_refused(python.run(repo, "train.py"), "climbmix is not prepared", "run `uv run prepare.py`")


def test_a_seed_that_is_none_is_one_line(make_training, python):
    result = python.run(make_training(), "train.py", AUTORESEARCH_SEED="forty-two")
    assert_refused(result, "AUTORESEARCH_SEED='forty-two'", "whole number")


def test_an_unknown_dataset_is_one_line(make_training, python):
    result = python.run(make_training(), "train.py", AUTORESEARCH_DATASET="wikipedia")
    assert_refused(result, "AUTORESEARCH_DATASET='wikipedia'", "climbmix, tinystories, stdlib")


def test_a_total_batch_that_does_not_divide_is_one_line_with_one_that_does(make_training, python):
    repo = make_training()
    set_knob(repo, "TOTAL_BATCH_SIZE", "1000")
    assert_refused(python.run(repo, "train.py"), "TOTAL_BATCH_SIZE 1000", "MAX_SEQ_LEN 32", "set it to 1024")


# --- Refused while or after it trains -----------------------------------------

LOSS = """
forward = GPT.forward

def spoilt(self, idx, targets=None):
    return forward(self, idx) if targets is None else forward(self, idx, targets) {}

GPT.forward = spoilt
"""


@pytest.mark.parametrize("change, loss", [("* float('nan')", "nan"), pytest.param("* float('inf')", "inf", marks=pytest.mark.slow), ("+ 200", "206")])
def test_a_loss_that_is_none_fails(make_training, python, change, loss):
    repo = make_training(LOSS.format(change))
    result = python.run(repo, "train.py")
    assert_refused(result, "FAIL: loss ", loss, "lower the learning rates")
    assert result.rc == 1 and result.err.strip().startswith("FAIL")
    assert "val_bpb" not in result.out and left_in(repo) == set()


def test_out_of_memory_at_the_smallest_batch_is_one_line(make_training, python):
    repo = make_training("""
def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

GPT.forward = out_of_memory
""")
    result = python.run(repo, "train.py")
    assert_refused(result, "out of memory at one row", "make the model smaller", "20.00 GiB")
    assert "out of memory, with a device batch of 4" in result.out


LOST = "CUDA error: unspecified launch failure\\nCUDA kernel errors might be asynchronously reported\\nFor debugging"
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.25 GiB is free. "
    "Process 4242 has 70.10 GiB memory in use."
)
FAILS_AT = """
def {function}(*args, {function}={function}, calls=[], **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        raise torch.{error}
    return {function}(*args, **kwargs)
"""
DEVICE_FAILURES = {  # what fails: (function of train.py, at which call, the error, what the line says)
    "the GPU, in training": ("train_step", 7, f'AcceleratorError("{LOST}")', "CUDA error: unspecified launch failure (train.py"),
    "the GPU, in the first call": ("build_optimizer", 1, f'AcceleratorError("{LOST}")', "in build_optimizer"),
    "the GPU, in evaluation": ("evaluate_bpb", 1, 'AcceleratorError("CUDA error: device not ready")', "in evaluate_bpb"),
    "ROCm's GPU": ("train_step", 7, 'AcceleratorError("HIP error: unspecified launch failure")', "HIP error: unspecified"),
    "memory, in training": ("train_step", 7, f'OutOfMemoryError("{FULL}")', "Process 4242 has 70.10 GiB memory in use."),
    "memory, in evaluation": ("evaluate_bpb", 1, f'OutOfMemoryError("{FULL}")', "see nvidia-smi for other processes"),
}


PLAIN = "the GPU, in training", "the GPU, in evaluation", "memory, in training"


@pytest.mark.parametrize("what", [pytest.param(what, marks=[pytest.mark.slow] * (what not in PLAIN)) for what in DEVICE_FAILURES])
def test_a_device_that_fails_ends_the_run_with_one_line(make_training, python, what):
    """And the line is a crash to whoever reads the log, so that a night records it and goes on."""
    function, call, error, says = DEVICE_FAILURES[what]
    repo = make_training(FAILS_AT.format(function=function, call=call, error=error))
    result = python.run(repo, "train.py")
    assert result.rc == 1 and "val_bpb" not in result.out and left_in(repo) == set()
    assert_refused(result, says, f"in {function}): ", "nvidia-smi")
    (repo.path / "run.log").write_text(result.out + result.err)
    log = run_log.read(repo.path / "run.log")
    assert log.ended == "crash" and log.lines[-1] == result.err.strip()


def test_a_mistake_that_is_not_the_devices_keeps_its_trace(make_training, python):
    error = """RuntimeError("Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu")"""
    repo = make_training(FAILS_AT.format(function="train_step", call=7, error=error).replace("torch.Runtime", "Runtime"))
    result = python.run(repo, "train.py")
    assert result.rc == 1 and result.err.startswith("Traceback") and "in train_step\n" in result.err


GIANT = """
def train(clock, *args, train=train):
    steps = train(clock, *args)
    now = clock.now
    clock.now = lambda: now() + 60
    return steps
"""


def test_a_giant_last_step_has_no_score(make_training, python):
    """One that the loop began at progress 0.99, here by a clock that leaps when the loop ends."""
    repo = make_training(GIANT, time_budget=20)
    (repo.path / "injected.py").write_text(INJECTED)
    assert_refused(python.run(repo, "injected.py"), "training overran its 20 s by 61.0 s", "shorter steps")
    assert left_in(repo) == set()


CHEAT = """
network = GPT.eager_network

def peeking(self, idx, targets, masks):
    return network(self, {}, targets, masks)

GPT.eager_network = peeking
"""


@pytest.mark.parametrize(
    "inputs, says",
    [
        ("idx.roll(-1, dims=1)", "sees its own future"),
        ("idx.roll(1, dims=0)", "depend on other rows"),
    ],
)
def test_a_cheat_trains_to_the_end_and_has_no_score(make_training, python, inputs, says):
    repo = make_training(CHEAT.format(inputs), time_budget=1)
    result = python.run(repo, "train.py")
    assert_refused(result, says)
    assert "val_bpb" not in result.out and left_in(repo) == set()


# --- A run is train.py, read as it is in git, and reads nothing but through prepare.py ---

MUST_NOT = {  # name: (code at the top level of train.py, what the sentence says)
    "weights of another run": ("torch.load('runs/0001/checkpoint.pt')", "checkpoint.pt holds weights"),
    "weights from anywhere": ("torch.load(os.environ['HOME'] + '/some.ckpt')", "some.ckpt holds weights"),
    "weights, and carries on if that fails": (
        "try:\n    torch.load('runs/0001/checkpoint.pt')\nexcept:\n    pass", "checkpoint.pt holds weights"),
    "the evaluation rows": (
        "import numpy, glob\nnumpy.load(glob.glob(os.environ['AUTORESEARCH_CACHE'] + '/**/val_rows.npy', recursive=True)[0])",
        "val_rows.npy is not for train.py to read"),
    "the downloaded files": ("open(os.environ['AUTORESEARCH_CACHE'] + '/climbmix/raw/shard.parquet')", "not for train.py"),
    "what another run left in the home": ("open(os.environ['HOME'] + '/stats.json')", "stats.json is older than this run"),
    "what another run left in the compile cache": (
        "import numpy\nnumpy.load(os.environ['AUTORESEARCH_CACHE'] + '/compile/stats.npy')", "stats.npy is older than this run"),
    "a file of its home, opened to append": ("open(os.environ['HOME'] + '/stats.json', 'a+')", "stats.json is older than this run"),
    "a module beside it": ("import helper", "helper"),
    "constants in a file": ("open('settings.json').read()", "settings.json is neither train.py nor frozen"),
    "code in a file": ("exec(open('helper.py').read())", "helper.py is neither train.py nor frozen"),
}  # fmt: skip


# One of each kind; tests/test_guard.py asks the guard itself about many more paths.
RUN_WITH = "weights, and carries on if that fails", "the evaluation rows", "what another run left in the home", "a module beside it", "code in a file"


@pytest.mark.parametrize("what", [pytest.param(what, marks=[pytest.mark.slow] * (what not in RUN_WITH)) for what in MUST_NOT])
def test_a_run_reads_nothing_that_git_does_not_decide(make_training, python, what):
    code, says = MUST_NOT[what]
    repo = make_training(code, time_budget=1)
    for name, content in {
        "runs/0001/checkpoint.pt": b"", "helper.py": b"X = 1\n", "settings.json": b"{}", "../home/some.ckpt": b"", "../home/stats.json": b"{}",
        repo.cache / "compile/stats.npy": b"",
    }.items():  # fmt: skip
        (repo.path / name).parent.mkdir(parents=True, exist_ok=True)
        (repo.path / name).write_bytes(content)
    torch.save({}, repo.path / "runs/0001/checkpoint.pt")
    result = python.run(repo, "train.py")
    assert_refused(result, says)
    assert result.rc == 1 and "val_bpb" not in result.out and left_in(repo) == set()


def test_a_run_may_read_what_it_wrote(make_training, python):
    code = """
def evaluate_bpb(model, *args, evaluate=evaluate_bpb):
    for folder in (".", os.environ["HOME"]):
        torch.save(model.state_dict(), f"{folder}/best.pt")
        model.load_state_dict(torch.load(f"{folder}/best.pt"))
    return evaluate(model, *args)
"""
    result = python.run(make_training(code, time_budget=1), "train.py")
    assert (result.rc, result.err) == (0, "") and "\nval_bpb: " in result.out


def test_a_module_loaded_from_its_bytecode_is_refused(make_training, python):
    """Without a source, and before prepare could see it."""
    repo = make_training(time_budget=1)
    (repo.path / "helper.py").write_text("X = 1\n")
    py_compile.compile(repo.path / "helper.py", cfile=repo.path / "helper.pyc")
    (repo.path / "helper.py").unlink()
    repo.edit("train.py", "^import torch$", "import helper\nimport torch")
    assert_refused(python.run(repo, "train.py"), "module helper", "a run is train.py alone")


EDITED_BEFORE = """
source = Path(__file__).read_text()
Path(__file__).write_text(source.replace("SOFTCAP = 15.0", "SOFTCAP = 16.0"))
"""
EDITED_WITHIN = """
def train(*args, train=train):
    source = Path(__file__).read_text()
    Path(__file__).write_text(source.replace("SOFTCAP = 15.0", "SOFTCAP = 16.0"))
    return train(*args)
"""


def test_a_file_that_changed_before_the_run_began_is_refused(make_training, python):
    repo = make_training(EDITED_BEFORE, time_budget=1)
    assert_refused(python.run(repo, "train.py"), "changed since this process read it", "run it again")


def test_a_file_that_changes_during_the_run_is_named_at_its_end(make_training, python):
    repo = make_training(EDITED_WITHIN, time_budget=1)
    before = hashlib.sha256((repo.path / "train.py").read_bytes()).hexdigest()
    result = python.run(repo, "train.py")
    assert (result.rc, result.err) == (0, "") and header(result.out)["train_sha256"] == before
    assert f"train.py changed while this run went on: the result is that of sha256 {before}\n" in result.out


def test_a_process_has_one_run(make_training, python):
    repo = make_training("if __name__ == '__main__':\n    main()", time_budget=1)
    result = python.run(repo, "train.py")
    assert_refused(result, "this process has begun a run already")
    assert result.out.count("val_bpb:") == 1


def test_the_seed_is_not_for_train_py_to_choose(make_training, python):
    repo = make_training("def load_tokenizer(load=load_tokenizer):\n    torch.manual_seed(7)\n    return load()")
    assert_refused(python.run(repo, "train.py"), "torch's generator was seeded with 7, this run's seed is 42")


# --- Hangs and signals --------------------------------------------------------

HANG = """
import time

def hang_here():
    {before}
    while True:
        time.sleep(0.1)
"""
HANGS = {
    "set-up": "def load_tokenizer():\n    hang_here()",
    "training": """
def make_dataloader(*args, loader=make_dataloader):
    for i, batch in enumerate(loader(*args)):
        if i == 8:
            hang_here()
        yield batch
""",
    "evaluation": """
def evaluate_bpb(model, *args, evaluate=evaluate_bpb, called=[]):
    # The first forward pass in eval mode comes before the clock stops.
    model.register_forward_hook(lambda *_: hang_here() if called else called.append(True))
    return evaluate(model, *args)
""",
}
WATCHED = """
import functools, time, train

train.elapsed = 0.0
train.begin_run = functools.partial(train.begin_run, watchdog_now=lambda: train.elapsed)
train.main()
"""


def assert_watchdog_ended(result, stage, seconds):
    assert result.rc == 1
    lines = [line for line in result.err.splitlines() if line]
    assert lines[0] == f"watchdog: {stage} took longer than {seconds} s; all stacks follow"
    assert re.search(r'train\.py", line \d+ in hang_here$', result.err, re.MULTILINE)
    assert re.search(r'train\.py", line \d+ in main$', result.err, re.MULTILINE)
    assert "val_bpb" not in result.out


@pytest.mark.parametrize("stage, seconds", [("set-up", 250), ("training", 131), ("evaluation", 250)])
def test_a_hang_is_ended_by_the_watchdog_with_every_stack(make_training, python, stage, seconds):
    """By a watchdog whose clock jumps, once the hang is reached, to just before and then past the limit."""
    waits = f"global elapsed; elapsed += {seconds} - 1; time.sleep(0.5); print('before', flush=True); elapsed += 2"
    repo = make_training(HANG.format(before=waits) + HANGS[stage], time_budget=100 if stage == "training" else 1)
    (repo.path / "watched.py").write_text(WATCHED)
    result = python.run(repo, "watched.py")
    assert_watchdog_ended(result, stage, seconds)
    assert result.out.endswith("before\n")
    assert left_in(repo) == set()


def test_the_watchdog_goes_by_the_time_of_day(make_training, python):
    repo = make_training(HANG.format(before="pass") + HANGS["set-up"], grace=2)
    began = time.monotonic()
    result = python.run(repo, "train.py")
    assert_watchdog_ended(result, "set-up", 2)
    assert 2 < time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("stage", HANGS)
@pytest.mark.parametrize(
    "number, status, word", [(signal.SIGTERM, 75, "preempted"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_the_run_with_a_word(make_training, python, number, status, word, stage):
    """It is no result and no failure: nothing is said on stderr, nothing is left behind."""
    says = "print('here', flush=True)"
    repo = make_training(HANG.format(before=says) + HANGS[stage], time_budget=100 if stage == "training" else 1)
    (repo.path / "checkpoint.pt").write_bytes(b"an older one")
    python.start(repo, "train.py")
    python.wait_for("here\n")
    os.kill(python.pid, number)
    result = python.wait()
    assert (result.rc, result.err) == (status, "")
    assert result.out.endswith(f"\n{word}\n") and "val_bpb" not in result.out
    assert (repo.path / "checkpoint.pt").read_bytes() == b"an older one" and left_in(repo) == {"checkpoint.pt"}


def own_process(code, **kwargs):
    """The code in a process of its own, with frozen.process at hand and without torch."""
    start = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom frozen import process\n"
    return subprocess.run([sys.executable, "-c", start + code], stderr=subprocess.PIPE, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", ["full disk", "closed pipe"])
def test_a_signal_ends_the_run_with_its_status_where_the_word_cannot_be_written(number, status, where):
    if where == "full disk" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    if where == "full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        other, out = os.pipe()
        os.close(other)
    done = own_process(f"process.end_on_signals()\nos.kill(os.getpid(), {int(number)})\nsignal.pause()", stdout=out)
    os.close(out)
    assert (done.returncode, done.stderr) == (status, "")


def test_a_second_training_in_the_folder_is_refused_and_the_first_goes_on(make_training, python):
    repo = make_training(HANG.format(before="print('here', flush=True)") + HANGS["training"], time_budget=100)
    python.start(repo, "train.py")
    python.wait_for("here\n")
    second = repo.run("train.py")
    assert_refused(second, f"another run is going on in {repo.path}", "another checkout")
    os.kill(python.pid, signal.SIGTERM)
    assert python.wait().rc == 75
