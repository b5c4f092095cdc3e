"""benchmarks/gpu.py without a GPU, the back ends that only benchmarks use, and README's lines for FlashAttention-4."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def benchmark(name, monkeypatch):
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """benchmarks/gpu.py, with another results.jsonl."""
    module = benchmark("gpu", monkeypatch)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.jsonl")
    return module


def code(text):
    return ["-S", "-c", text]  # without site: starts in milliseconds


MACHINE = {"gpu": "NVIDIA H200", "memory_mb": 143771, "driver": "580", "cores": 16, "python": "3.12", "torch": "2.15"}
STEP = dict.fromkeys(("data", "forward", "backward", "optimizer", "gaps", "step", "bare"), 1.0)
STEP = {f"{name}_ms": ms for name, ms in STEP.items()} | {
    "mode": "compiled", "batch": "128x2", "loop_over_bare": 1.0, "tokens_per_second": 2_100_000, "warm_up_seconds": 40.0,
}  # fmt: skip


def test_a_part_that_fails_hangs_or_has_no_time_is_a_line_and_the_rest_goes_on(gpu, tmp_path):
    """Every part ends with all of its processes, and the report holds what came before and after a failure."""
    mark = tmp_path / "grandchild"
    step = {"results": [STEP | {"attention": "flex", "mfu_percent": 51.0, "peak_mb": 44_000}]}
    appends = f"open({str(gpu.RESULTS)!r}, 'a').write({json.dumps(step)!r} + chr(10))"
    hangs = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']); open({str(mark)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    plan = [
        gpu.Part("machine", 60, 0, code(f"print('RESULT', {json.dumps(json.dumps(MACHINE))})")),
        gpu.Part("data", 60, 0, code("print('RESULT {\"cache\": \"/nowhere\", \"kind\": \"random\", \"lowest_bpb\": 2.5}')")),
        gpu.Part("step-refused", 60, 0, code("print('flex, compiled: not run: no kernel image'); raise SystemExit('none ran')")),
        gpu.Part("step-broken", 60, 0, code("raise ValueError('three')")),
        gpu.Part("step-hangs", 2, 0, code(hangs)),
        gpu.Part("step-later", 60, 100_000, code("raise SystemExit('was begun')")),
        gpu.Part("step-absent", 60, 0, code("raise SystemExit('was begun')"), "no_such_module.inside"),
        gpu.Part("step-flex", 60, 0, code(appends)),
        gpu.Part("doctor", 60, 0, code("print('{\"verdict\": \"no\", \"checks\": [], \"measured\": {}}'); raise SystemExit(1)")),
    ]  # fmt: skip
    out = tmp_path / "out"
    gpu.measure(plan, out, time.monotonic() + 1000, tmp_path)
    report = json.loads((out / "gpu.json").read_text())
    found = {part["name"]: (part["status"], part["reason"]) for part in report["parts"]}
    assert list(found) == [part.name for part in plan]
    assert found["step-refused"] == ("failed", "no kernel image")
    assert found["step-broken"] == ("failed", "ValueError: three")
    assert found["step-hangs"] == ("timed out", "was ended after 2 s")
    assert found["step-later"][0] == "no time" and "it needs 100000" in found["step-later"][1]
    assert found["step-absent"] == ("not installed", "it needs no_such_module.inside")
    assert found["step-flex"] == ("ok", "") and found["doctor"] == ("ok", "no")
    if mark.exists():  # it was ended before it got so far, otherwise
        assert not alive(int(mark.read_text()))
    text = (out / "gpu.md").read_text()
    assert "- step-broken: failed: ValueError: three" in text and "`lab doctor`: no" in text
    assert "| MFU of the best back end, % (at least 50) | 51.00 | yes |" in text
    assert "three" in (out / "gpu.log").read_text()
    assert "Traceback" not in text


def alive(pid):
    """Whether a process runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_measures_nothing_has_failed(gpu, tmp_path):
    gpu.RESULTS.write_text('{"results": "of another day"}\n')
    part = gpu.Part("step-flex", 60, 0, code("pass"))
    done = gpu.run_part(part, time.monotonic() + 100, dict(os.environ), tmp_path / "log")
    assert (done["status"], done["result"]) == ("failed", None) and "no result" in done["reason"]


def report_with(gpu, **results):
    parts = [
        {"name": n.replace("_", "-"), "status": "ok", "reason": "", "seconds": 1.0, "result": r}
        for n, r in results.items()
    ]
    return {"when": "today", "commit": "abc", "machine": MACHINE, "data": {}, "missing": {}, "parts": parts}


def test_targets_are_met_missed_or_unknown(gpu):
    steps = {
        "step_flex": {"results": [STEP | {"attention": "flex", "mfu_percent": 39.0, "peak_mb": 46_000}]},
        "step_fa3": {"results": [STEP | {"attention": "fa3", "mfu_percent": 50.0, "peak_mb": 45_500}]},
        "step_L_fa3": {"results": [STEP | {"attention": "fa3", "mfu_percent": 70.0, "peak_mb": 1_000}]},
    }
    seconds = {"audited": [9.0, 5.0, 6.0], "scoring": [4.0, 4.0, 4.0]}
    evaluate = {"seconds": seconds, "tokens": 20_971_520, "attention": "flex"}
    overhead = {"first": {"imports": 2.0}, "later": [{"imports": 1.0}], "beyond_training": [80.0, 15.5, 14.5]}
    report = report_with(gpu, **steps, evaluate=evaluate, overhead=overhead)
    met = {name.partition(" (")[0]: (measured, met) for name, measured, met in gpu.goals(report)}
    assert met["MFU of the best back end, %"] == (50.0, True)  # of the default windows only
    assert met["MFU with FlexAttention, %"] == (39.0, False)
    assert met["peak memory at 128 rows, MB"] == (45_500, False)
    assert met["audited evaluation of all val rows, s"] == (6.0, True)
    assert met["seconds besides training, cold"] == (80.0, None)
    assert met["seconds besides training, warm"] == (14.5, True)
    assert "| step-L-fa3 | compiled | 128x2 |" in gpu.markdown(report)
    unknown = gpu.goals(report_with(gpu))
    assert all(measured is None and met is None for _, measured, met in unknown)
    cpu = {"step_sdpa": {"results": [STEP | {"attention": "sdpa", "mfu_percent": 0.0, "peak_mb": 0, "batch": "8x1"}]}}
    assert all(measured is None for _, measured, _ in gpu.goals(report_with(gpu, **cpu)))


def test_a_python_without_torch_is_refused_in_one_sentence(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "lacks torch, numpy, tiktoken: use a Python that has them" in done.stderr


def test_every_part_has_a_command_that_exists(gpu, monkeypatch):
    for dry in (False, True):
        plan = gpu.parts(dry)
        assert [p.name for p in plan[:2]] == list(gpu.ALWAYS) and len({p.name for p in plan}) == len(plan)
        for part in plan:
            assert part.command[0] == "-m" or (ROOT / part.command[0]).is_file(), part
            assert part.least < part.limit


def test_random_tokens_have_the_entropy_that_is_reported(monkeypatch):
    """The best predictor, which knows the rule, needs that many nats per token."""
    common = benchmark("common", monkeypatch)
    tokens = common.random_tokens(np.random.default_rng(0), (400, 500), 300).astype(np.int64)
    before, after = tokens[:, :-1], tokens[:, 1:]
    right = after == (5 * before + 3) % 300
    p = common.REPEATABLE + (1 - common.REPEATABLE) / 300
    nats = -np.where(right, math.log(p), math.log((1 - common.REPEATABLE) / 300)).mean()
    assert nats == pytest.approx(common.entropy_of_random_tokens(300), abs=0.02)
    assert len(np.unique(tokens)) == 300


# ---------------------------------------------------------------------------------------------------
# Back ends


def naive(q, k, v, window):
    """Attention by definition: (B, T, H, D), query q attends to the keys k with 0 <= q - k <= window."""
    T, share = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    age = torch.arange(T)[:, None] - torch.arange(T)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.size(-1) ** 0.5
    scores = scores.masked_fill((age < 0) | (age > window), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def flash_stand_in(asked):
    """The package flash-attn-4 as far as train.py sees it: (y, log-sum-exp), a window of (left, right) keys."""

    def flash_attn_func(q, k, v, causal=False, window_size=(None, None), **others):
        asked.append((q.shape, k.shape, causal, window_size, others))
        return naive(q, k, v, q.size(1) if window_size[0] is None else window_size[0]), None

    package, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    package.cute, cute.flash_attn_func = cute, flash_attn_func
    return {"flash_attn": package, "flash_attn.cute": cute}


def qkv(heads, kv_heads, T=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, T, n, 8, generator=generator) for n in (heads, kv_heads, kv_heads)]


def lines_in_readme():
    """The three lines that turn on FlashAttention-4, from the README."""
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n\s*(from flash_attn\.cute .*?)```", text, re.DOTALL)
    lines = [line.strip() for line in block.strip().splitlines()]
    assert len(lines) == 3 and max(map(len, lines)) <= 120
    return lines


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_readmes_three_lines_turn_on_flash_attention_4(kv_heads, tmp_path, monkeypatch):
    """Pasted below ATTENTIONS they make it the first choice, with train.py's windows and grouped queries."""
    asked, excluded = [], []
    monkeypatch.setattr(
        torch.compiler, "disable", lambda function: excluded.append(function) or function
    )  # slow import
    for name, module in flash_stand_in(asked).items():
        monkeypatch.setitem(sys.modules, name, module)
    source = (ROOT / "train.py").read_text()
    (place,) = re.findall(r"^ATTENTIONS = .*\n", source, re.MULTILINE)
    path = tmp_path / "train.py"
    path.write_text(source.replace(place, place + "\n".join(lines_in_readme()) + "\n"))
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location("train_with_flash4", path)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)

    assert len(excluded) == 1, "torch.compile would trace the package"
    assert list(train.ATTENTIONS)[0] == "flash4" and {"fa3", "flex", "sdpa"} < set(train.ATTENTIONS)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    attention, reason = train.choose_attention(torch.device("cuda"), torch.bfloat16)
    assert attention.name == "flash4", reason
    q, k, v = qkv(4, kv_heads)
    for window in (5, 24):
        assert attention.make_mask(24, window, q.device) is None
        y = attention.attend(q, k, v, window, None)
        assert asked[-1] == (q.shape, k.shape, True, (window, 0), {})
        torch.testing.assert_close(y, train.SDPA.attend(q, k, v, window, train.sdpa_mask(24, window, q.device)))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_varlen_gets_each_row_as_a_sequence_with_its_window(kv_heads, monkeypatch):
    """Full context as (-1, 0), for which torch may use cuDNN; a window as (window, 0); grouped queries are announced."""
    import torch.nn.attention.varlen as module

    asked = []

    def varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size, enable_gqa=False):
        if q.size(1) != k.size(1) and not enable_gqa:
            raise ValueError("set enable_gqa")
        asked.append(window_size)
        rows = [slice(a, b) for a, b in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True)]
        window = longest_q if window_size[0] == -1 else window_size[0]
        return torch.cat([naive(q[None, r], k[None, r], v[None, r], window)[0] for r in rows])

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    common = benchmark("common", monkeypatch)
    monkeypatch.syspath_prepend(str(ROOT))
    import train

    attention = common.attention("varlen", train, torch.device("cpu"))
    q, k, v = qkv(4, kv_heads)
    for window, expected in ((5, (5, 0)), (24, (-1, 0)), (23, (-1, 0))):
        torch.testing.assert_close(attention.attend(q, k, v, window, None), naive(q, k, v, window))
        assert asked[-1] == expected


def test_flex4_is_flex_attention_with_the_back_end_flash(monkeypatch):
    import torch.nn.attention.flex_attention as module

    asked = []

    def flex_attention(q, k, v, block_mask, enable_gqa, kernel_options=None):
        asked.append(kernel_options)
        return q

    monkeypatch.setattr(module, "flex_attention", flex_attention)
    common = benchmark("common", monkeypatch)
    monkeypatch.syspath_prepend(str(ROOT))
    import train

    q, k, v = qkv(4, 2)
    for name in ("flex4", "flex"):
        attention = common.attention(name, train, torch.device("cpu"))
        assert attention.name == name
        attention.attend(q, k, v, 5, None)
    assert asked == [{"BACKEND": "FLASH"}, None]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_on_a_cpu_measures_every_part(make_repo, tmp_path):
    """Tiny sizes, real parts: data, doctor, steps, overhead, evaluation, a whole run of train.py."""
    repo = make_repo("stdlib", time_budget=2, grace=600)
    shutil.copytree(ROOT / "benchmarks", repo.path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path / "out"
    result = repo.run("benchmarks/gpu.py", "--dry", "--out", out, "--minutes", "28", timeout=1750)
    assert result.rc == 0, result.out + result.err
    parts = {part["name"]: part for part in json.loads((out / "gpu.json").read_text())["parts"]}
    log = (out / "gpu.log").read_text()
    absent = parts.pop("step-flash4")
    assert absent["status"] in ("not installed", "failed")
    from lab.__main__ import COMMANDS

    doctor = ["doctor"] if "doctor" in COMMANDS else []  # its absence is a line
    for name in ("machine", "data", *doctor, "step-sdpa", "overhead", "evaluate", "step-L", "run"):
        assert parts[name]["status"] == "ok", f"{name}: {parts[name]['reason']}\n{log}"
    data, run = parts["data"]["result"], parts["run"]["result"]["summary"]
    assert data["kind"] == "random" and run["num_steps"] > 0 and run["val_bpb"] > data["lowest_bpb"]
    assert parts["evaluate"]["result"]["tokens"] == data["eval_tokens"]
    assert [stage for stage in parts["overhead"]["result"]["later"][0]][-1] == "exit"
    text = (out / "gpu.md").read_text()
    assert "| step-sdpa | eager |" in text and f"| val_bpb | {run['val_bpb']} |" in text
    assert not (repo.path / "checkpoint.pt").exists()
