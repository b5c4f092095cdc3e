"""The training step as a GPU would execute it, without a GPU: on fake tensors, which have a shape, a dtype and a device
but no data. benchmarks/memory.py traces the step with the hyperparameters of a GPU; here its graphs run on fake CUDA
tensors. Nothing is allocated and no kernel is tried: what is checked is every shape, dtype and device.
"""

import importlib.util
import operator
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from frozen import audit, metric

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="a torch without CUDA has no fake CUDA tensors"
)


def load_memory():
    """benchmarks/memory.py as a module; its folder is not put on the path, as it has another prepare.py."""
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")  # the operators of its stand-in are registered once in a process
def memory():
    return load_memory()


SMALL = dict(DEPTH=2, MODEL_DIM=256)


def compared(memory, step):
    """{graph: number of tensors compared} of a step on CUDA."""
    return {name: memory.on_cuda(graph) for name, graph in step.graphs.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_layers_run_on_cuda_with_the_shapes_and_dtypes_of_the_trace(memory):
    """Grouped queries and a window in one layer, full context in the other."""
    step = memory.trace(memory.gpu_train(**SMALL, QUERIES_PER_KV=2), 8, optimizer_too=False)
    found = compared(memory, step)
    assert found.keys() == {"forward", "backward", "evaluation"} and all(n > 100 for n in found.values())
    windows = [n.args[3] for n in step.graphs["forward"].graph.nodes if n.target is torch.ops.stand_in.flash.default]
    assert windows == [1024, 2048]
    phases = memory.memory(step)
    assert 8 * 2048 * 8192 * 2 < phases["saved"] < phases["forward"] - phases["static"] + 1
    assert phases["backward"] >= phases["static"] + phases["saved"], "all that is saved is alive when the backward pass begins"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attention", ["fa3", "flex", "sdpa"])
@pytest.mark.parametrize("pattern, queries_per_kv", [("SSSL", 1), ("L", 2), ("SL", 1), ("S", 4)])
def test_every_window_pattern_and_attention_runs_on_cuda_with_its_optimizer(memory, attention, pattern, queries_per_kv):
    knobs = dict(DEPTH=4, MODEL_DIM=512, WINDOW_PATTERN=pattern, QUERIES_PER_KV=queries_per_kv)
    found = compared(memory, memory.trace(memory.gpu_train(**knobs), 8, attention))
    assert {name.split()[0] for name in found} == {"forward", "backward", "evaluation", "adamw", "muon"}
    assert found["backward"] > 500


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rows", [128, 64, 32, 16, 8])
def test_the_default_configuration_runs_on_cuda_and_readmes_memory_is_what_it_needs(memory, rows):
    """Depth 8, 2,048 tokens, vocabulary 8,192, SSSL, bfloat16. README's table is the one of benchmarks/memory.py."""
    step = memory.trace(memory.gpu_train(), rows, optimizer_too=rows == 8)
    found = compared(memory, step)
    assert found["forward"] > 700 and found["backward"] > 1250, found
    windows = [n.args[3] for n in step.graphs["forward"].graph.nodes if n.target is torch.ops.stand_in.flash.default]
    assert windows == [1024, 1024, 1024, 2048] * 2
    phases = memory.memory(step)
    highest = max(phases.values())
    assert readme_table()[rows] == round(highest / 1e9, 1)
    if rows == memory.PUBLISHED_ROWS:
        assert abs(highest / memory.MIB / memory.PUBLISHED_MIB - 1) < 0.1, "the published figure is another one"
        text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
        assert f"{memory.PUBLISHED_MIB:,} MiB" in text and f"{highest / memory.MIB:,.0f} MiB" in text


def readme_table():
    """{rows: GB} of README's table of memory."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return {int(rows): float(gb) for rows, gb in re.findall(r"^\| [^|]+ GB[^|]*\| (\d+) \| ([\d.]+) GB \|", text, re.MULTILINE)}


def test_readmes_table_of_memory_has_every_row_that_the_benchmark_computes(memory):
    table = readme_table()
    assert sorted(table, reverse=True) == memory.ROWS
    per_row = [(table[a] - table[b]) / (a - b) for a, b in zip(memory.ROWS, memory.ROWS[1:], strict=False)]
    assert max(per_row) - min(per_row) < 0.02, "memory is linear in the rows: one line of the table is stale"


# --- What CUDA's autocast does ------------------------------------------------


class Functions(TorchFunctionMode):
    """Notes every call of a function of torch with the dtypes and shapes that it returns."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [(t.dtype, tuple(t.shape)) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.calls.append((getattr(function, "__name__", str(function)), tensors))
        return result


def with_autocast_on_cuda():
    """Without a driver torch.autocast("cuda") switches itself off: not here."""
    stack = ExitStack()
    stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
    stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True))
    return stack


def model_on_cuda(memory, train):
    model = train.GPT(train.build_config(8192, torch.bfloat16))
    model.attention = memory.attention(train, "fa3")
    return model


def test_autocast_gives_the_same_dtypes_on_cuda_as_on_the_cpu_of_the_trace(memory):
    """CUDA computes relu's square and the norms in float32, which a CPU's autocast does not."""
    train, seen = memory.gpu_train(**SMALL), {}
    for device in ("cpu", "cuda"):
        with memory.autocast_as_on_cuda(), with_autocast_on_cuda(), FakeTensorMode(), torch.device(device), torch.no_grad():
            model, x = model_on_cuda(memory, train), torch.zeros(8, 2048, dtype=torch.int64)
            with Functions() as functions:
                loss = model(x, x)
        assert loss.device.type == device
        seen[device] = [(name, tensors) for name, tensors in functions.calls if tensors]
    matmuls = [tensors[0][0] for name, tensors in seen["cuda"] if name == "linear"]
    assert len(matmuls) == 2 * 4 + 2 and set(matmuls) == {torch.bfloat16}
    assert not [(a, b) for a, b in zip(seen["cpu"], seen["cuda"], strict=True) if a != b]


# --- Scoring and audit --------------------------------------------------------


def test_audit_and_scoring_run_on_cuda_at_the_default_shapes(memory, monkeypatch):
    """All of the audit's loop, with the model's eager pass at 128 x 2,048; what leaves the device is a float64 sum."""
    train, returned = memory.gpu_train(**SMALL), []

    def interval(self, nats):
        returned.append(nats)
        return audit.Interval(0, 0)

    def bits_per_byte(nats, rows, token_bytes):
        returned.append(nats)
        return 1.0

    monkeypatch.setattr(audit.Audit, "interval", interval)
    monkeypatch.setattr(audit, "bits_per_byte", bits_per_byte)
    monkeypatch.setattr(metric, "VOCAB_SIZE", 8192)
    monkeypatch.setattr(metric, "watching_modes", lambda: [])  # that of the fake tensors is one
    monkeypatch.setattr(torch, "isfinite", lambda tensor: tensor.device.type == "cuda")  # the one value that is read
    rows = np.random.default_rng(0).integers(0, 8000, (300, 2049), dtype=np.uint16)  # a ragged last batch: 44 rows
    with with_autocast_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = model_on_cuda(memory, train).eval()
            x = torch.zeros(128, 2048, dtype=torch.int64)
        known = x, x, metric.token_nats(metric.checked_logits(model, x), x)
        job = audit.Audit(model, rows, np.ones(8192, np.int32), 128, "draw", known)
        assert job.run() == 1.0 and job.device.type == "cuda"
    K = len(job.position)
    shapes = [(K,), (sum(len(n) for n in returned[1:2]),), None, (300, 2048), None]
    assert K == 2047 and len(returned) == 5
    assert returned[0].shape == shapes[0] and returned[4].shape == shapes[3]
    for nats in returned:
        assert nats.device.type == "cuda" and nats.dtype == torch.float32


# --- The walk that adds up the memory -----------------------------------------


def graph_of(function, *shapes):
    """The graph of a function of float32 tensors, with fake values."""
    with FakeTensorMode():
        return make_fx(function, tracing_mode="fake")(*(torch.zeros(shape) for shape in shapes))


KB = 1024
SQUARE = (16, 16)  # 1 KB


@pytest.mark.parametrize(
    "function, expected, why",
    [
        (lambda a, b: a @ b, (1, 1), "the product"),
        (lambda a, b: ((a * 2).exp() + b).tanh(), (1, 1), "elementwise operations share one kernel and one buffer"),
        (lambda a, b: (a @ b).relu() @ b, (2, 1), "relu goes into the place of the first product, then the second is made"),
        (lambda a, b: (a @ b).relu().sum(), (1 + 4 / KB, 4 / KB), "a reduction reads the product and makes one number"),
        (lambda a, b: ((c := a @ b), c @ b), (2, 2), "what is returned stays"),
        (lambda a, b: ((a @ b) @ b) @ b, (2, 1), "the first product is freed before the third is made"),
        (lambda a, b: (a @ b).t()[:, :4] * 1, (1 + 1 / 4, 1 / 4), "a view has no memory of its own"),
    ],
)  # fmt: skip
def test_the_walk_counts_what_is_alive_at_the_same_time(memory, function, expected, why):
    highest, returned = memory.peak(graph_of(function, SQUARE, SQUARE))
    assert (highest / KB, returned / KB) == pytest.approx(expected), why


def test_a_saved_activation_is_freed_after_its_last_use(memory):
    def backward(saved, grad):
        one = saved @ grad
        two = one @ one  # here `saved` is free
        return two @ two

    graph = graph_of(backward, SQUARE, SQUARE)
    assert memory.peak(graph)[0] == 2 * KB
    assert memory.peak(graph, owned=lambda node: "saved" in node.name)[0] == 2 * KB
    assert memory.peak(graph, owned=lambda node: True)[0] == 3 * KB


def test_a_tensor_that_stays_on_the_cpu_is_found(memory):
    """So that a graph that runs on CUDA says something: a constant, a shape and a dtype that would differ there."""
    constant = torch.ones(16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(lambda a: a + constant, tracing_mode="fake")(torch.zeros(16))
    with pytest.raises((AssertionError, RuntimeError), match="cpu"):
        memory.on_cuda(graph)
    for change, says in [(lambda t: t[:8], "shape"), (lambda t: t.double(), "dtype")]:
        graph = graph_of(lambda a: a.relu().tanh(), SQUARE)
        node = next(n for n in graph.graph.nodes if n.name == "relu")
        with node.meta["val"].fake_mode:
            node.meta["val"] = change(node.meta["val"])
        with pytest.raises(AssertionError, match=f"relu.*{says}"):
            memory.on_cuda(graph)


def test_views_are_told_from_outputs(memory):
    graph = graph_of(lambda a, b: torch.split((a @ b).t(), 8)[1] + a.max(1).indices, SQUARE, SQUARE)
    owners = {memory.owner(n).target for n in graph.graph.nodes if n.target is operator.getitem}
    assert owners == {torch.ops.aten.mm.default, operator.getitem}


# --- Machine code -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_every_kernel_of_flexattentions_step_compiles_for_an_h100_and_a_4090():
    """Inductor, Triton and ptxas for a GPU that is not here; registers and shared memory within what it has."""
    command = [sys.executable, ROOT / "benchmarks" / "kernels.py", "--attention", "flex", "--arch", "90", "89"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.findall(r"^\| (\d+) \(.*\) \| flex \| (\d+) \| 0 \| (\d+) of 255 \|.*\| ([\d.]+) of (\d+) KB \|$", done.stdout, re.MULTILINE)
    assert [row[0] for row in table] == ["90", "89"], done.stdout
    for _, kernels, registers, shared, limit in table:
        assert int(kernels) > 20 and int(registers) <= 255 and 0 < float(shared) <= float(limit)
