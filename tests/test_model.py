"""The model against a naive one, its FLOPs, what the warm-up restores and survives, and the checkpoint."""

import ast
import importlib.util
import itertools
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
CPU_FEATURES = ["", "avx512_bf16", "amx_tile"]  # with which choose_dtype takes bfloat16 on a CPU; "" is none of them


def train_on(gpu):
    """train.py with the hyperparameters of a machine with a GPU, or of one without, whatever this machine is."""
    spec = importlib.util.spec_from_file_location("train_on", train.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: gpu)
        spec.loader.exec_module(module)
    return module


def pretend_cpu_has(feature, monkeypatch):
    """This CPU has that feature, and none of the others that choose_dtype asks for."""
    for name in filter(None, CPU_FEATURES):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda n=name: n == feature, raising=False)


def tiny_model(init="torch", **overrides):
    """init: "fresh" as a run begins, "torch" with the modules' own random weights. In float32 unless dtype is given."""
    torch.manual_seed(0)
    config = dict(sequence_len=16, vocab_size=64, n_head=2, n_kv_head=2, n_embd=32, mlp_ratio=4)
    config |= dict(rope_base=10_000, softcap=15.0, dtype="float32")
    n_layer = overrides.pop("n_layer", 2)
    config |= dict(windows=[5] * (n_layer - 1) + [16]) | overrides
    model = train.GPT(SimpleNamespace(**config))
    model.init_weights()
    return model if init == "fresh" else random_weights(model)


def random_weights(model):
    """Nothing zero, so that nothing hides."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.5))
    return model


def tokens(B=2, T=16, seed=0, V=64):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


# --- The function -------------------------------------------------------------


def naive_gpt(model, row):
    """The architecture in words of one syllable: one row, one position, one head at a time, in float64."""
    c, T = model.config, len(row)
    W = {name: p.detach().double() for name, p in model.named_parameters()}
    D, n_layer = c.n_embd // c.n_head, len(c.windows)

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(x, position):
        y = x.clone()
        for i in range(D // 2):
            angle = torch.tensor(position * c.rope_base ** (-2 * i / D), dtype=torch.float64)
            a, b = x[i], x[i + D // 2]
            y[i], y[i + D // 2] = a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()
        return y

    x = x0 = norm(W["wte.weight"][row])
    for layer in range(n_layer):
        w = {k.removeprefix(f"blocks.{layer}."): v for k, v in W.items() if k.startswith(f"blocks.{layer}.")}
        x = W["resid_lambdas"][layer] * x + W["x0_lambdas"][layer] * x0
        h = norm(x)
        q = (h @ w["attn.c_q.weight"].T).view(T, c.n_head, D)
        k = (h @ w["attn.c_k.weight"].T).view(T, c.n_kv_head, D)
        v = (h @ w["attn.c_v.weight"].T).view(T, c.n_kv_head, D)
        if (n_layer - 1 - layer) % 2 == 0:  # the last layer and every other one before it
            gate = 2 * torch.sigmoid(h[:, :32] @ w["attn.ve_gate.weight"].T)
            v = v + gate[:, :, None] * W[f"value_embeds.{layer}.weight"][row].view(T, c.n_kv_head, D)
        y = torch.zeros(T, c.n_head, D, dtype=torch.float64)
        for head in range(c.n_head):
            group = head // (c.n_head // c.n_kv_head)
            for i in range(T):
                keys = range(max(0, i - c.windows[layer]), i + 1)
                mine = norm(turn(q[i, head], i))
                scores = torch.stack([mine @ norm(turn(k[j, group], j)) / D**0.5 for j in keys])
                y[i, head] = scores.softmax(0) @ v[list(keys), group]
        x = x + y.view(T, -1) @ w["attn.c_proj.weight"].T
        x = x + (norm(x) @ w["c_fc.weight"].T).clamp(min=0) ** 2 @ w["c_proj.weight"].T
    return c.softcap * torch.tanh(norm(x) @ W["lm_head.weight"].T / c.softcap)


@pytest.mark.parametrize("overrides", [dict(n_layer=3), dict(n_layer=2, n_head=4, n_kv_head=2, windows=[1, 16])])
def test_the_model_is_the_naive_one(overrides):
    model, idx = tiny_model(**overrides), tokens(T=12)
    for logits, row in zip(model(idx), idx, strict=True):
        torch.testing.assert_close(logits.double(), naive_gpt(model, row), rtol=1e-3, atol=1e-3)


def test_logits_are_float32_and_capped_and_the_loss_is_their_mean_cross_entropy():
    model, idx, targets = tiny_model(), tokens(), tokens(seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    logits = model(idx)
    assert logits.shape == (2, 16, 64) and logits.dtype == torch.float32
    assert 14 < logits.abs().max() <= 15
    torch.testing.assert_close(model(idx, targets), F.cross_entropy(logits.view(-1, 64), targets.view(-1)))


def test_in_bfloat16_it_owns_its_autocast_and_stays_near_float32():
    idx = tokens()
    expected, model = tiny_model()(idx), tiny_model(dtype="bfloat16")
    logits = model(idx)
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    assert (logits - expected).norm() / expected.norm() < 0.05
    model(idx, idx).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("T", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shorter_row_gets_the_logits_of_its_beginning(T, dtype):
    model, idx = tiny_model(dtype=str(dtype)[6:]), tokens()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.25}[dtype]  # bfloat16: a few times its spacing at 15
    torch.testing.assert_close(model(idx[:, :T]), model(idx)[:, :T], rtol=0, atol=tolerance)


def test_a_longer_row_is_refused_with_both_lengths():
    with pytest.raises(AssertionError, match="17 tokens.* 16"):
        tiny_model()(tokens(T=17))


def test_a_fresh_model_knows_nothing_and_its_blocks_are_the_identity():
    model, idx = tiny_model(init="fresh"), tokens()
    assert model(idx, tokens(seed=1)).item() == pytest.approx(math.log(64), abs=0.02)
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    args = (model.cos[:4], model.sin[:4], train.sdpa_attend, 5, None)
    assert torch.equal(model.blocks[0](x, None, *args), x)
    assert model.x0_lambdas.tolist() == pytest.approx([train.X0_INIT] * 2)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_baseline_has_the_published_size(monkeypatch):
    baseline = train_on(gpu=True)
    monkeypatch.setattr(baseline, "MAX_SEQ_LEN", 2048)
    with torch.device("meta"):
        model = baseline.GPT(baseline.build_config(8192, torch.bfloat16))
    assert (model.config.n_embd, len(model.config.windows)) == (512, 8)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(50.3, abs=0.05)
    assert model.flops_per_token() / 1e6 == pytest.approx(239.1, abs=0.05)


def test_a_vector_in_a_block_adds_no_matmul_flops():
    model = tiny_model()
    before = model.flops_per_token()
    model.blocks[0].gain = torch.nn.Parameter(torch.ones(32))
    assert model.flops_per_token() == before


@pytest.mark.parametrize("width, n_embd", [(9 * 57, 640), (640, 640), (641, 768), (1, 128)])
def test_the_width_is_rounded_up_to_whole_heads(width, n_embd, monkeypatch):
    for name, value in dict(DEPTH=9, MODEL_DIM=width, HEAD_DIM=128).items():
        monkeypatch.setattr(train, name, value)
    config = train.build_config(64, torch.float32)
    assert (config.n_embd, config.n_head, config.n_kv_head) == (n_embd, n_embd // 128, n_embd // 128)


def test_query_heads_share_key_value_heads_only_in_whole_groups(monkeypatch):
    for name, value in dict(MODEL_DIM=640, HEAD_DIM=128, QUERIES_PER_KV=5).items():
        monkeypatch.setattr(train, name, value)
    assert train.build_config(64, torch.float32).n_kv_head == 1
    monkeypatch.setattr(train, "QUERIES_PER_KV", 2)
    with pytest.raises(AssertionError, match="QUERIES_PER_KV 2 does not divide 5 heads"):
        train.build_config(64, torch.float32)


# --- Hyperparameters ----------------------------------------------------------


def test_each_hyperparameter_is_set_once_and_nothing_shadows_it():
    """So an edit of its line takes effect on every machine."""
    tree = ast.parse(Path(train.__file__).read_text())
    bound = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    bound += [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    knobs = {name for name in bound if name.isupper() and len(name) > 1}
    assert {"DEPTH", "MODEL_DIM", "TOTAL_BATCH_SIZE", "MATRIX_LR", "COMPILE", "GPU"} <= knobs
    assert {name for name in knobs if bound.count(name) > 1} == set()
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"globals", "setattr", "exec"}


def test_the_hyperparameters_are_one_block_near_the_top():
    lines = Path(train.__file__).read_text().splitlines()
    at = {line.split(" = ")[0]: number for number, line in enumerate(lines, 1) if re.match(r"[A-Z][A-Z0-9_]+ = ", line)}
    assert at["DEPTH"] < 45 and at["TOTAL_BATCH_SIZE"] < 60
    assert at["COMPILE"] - at["DEPTH"] < 50
    assert lines.index("def batch_schedule(progress):") < lines.index("def lr_multiplier(progress):") < at["COMPILE"] + 20


@pytest.mark.parametrize("gpu, depth, width", [(True, 8, 512), (False, 4, 128)])
def test_defaults_follow_the_machine(gpu, depth, width):
    defaults = train_on(gpu)
    config = defaults.build_config(64, torch.float32)
    assert (defaults.DEPTH, len(config.windows), config.n_embd) == (depth, depth, width)
    assert defaults.COMPILE is gpu


# --- A step and the warm-up ---------------------------------------------------


class Recorder:
    """An optimizer that keeps the gradients of its only step."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.grads = [p.grad.clone() for p in self.model.parameters()]

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)


def test_a_step_does_not_depend_on_the_device_batch_size():
    model, rows = tiny_model(), tokens(8)
    model.lm_head.weight.data.mul_(0.05)

    def step(device_batch_size):
        recorder = Recorder(model)
        batches = ((x, x.flip(1), 3) for x in rows.split(device_batch_size))
        loss, epoch = train.train_step(model, recorder, batches, 8 // device_batch_size, 16)
        assert epoch == 3 and all(p.grad is None for p in model.parameters())
        return [loss, *recorder.grads]

    for a, b, c in zip(step(8), step(4), step(1), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-6)


def test_a_row_is_cut_into_the_rows_that_the_schedule_asks_for():
    model, x, y = tiny_model(), tokens(2), tokens(2, seed=1)
    model.lm_head.weight.data.mul_(0.05)

    def step(batch, T):
        recorder = Recorder(model)
        return [train.train_step(model, recorder, iter([batch]), 1, T)[0], *recorder.grads]

    cut = x.view(2, 4, 4).flatten(0, 1), y.view(2, 4, 4).flatten(0, 1), 1
    assert cut[0].shape == (8, 4) and torch.equal(cut[0][1], x[0, 4:8])
    for a, b in zip(step((x, y, 1), 4), step(cut, 4), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(step((x, y, 1), 4)[1], step((x, y, 1), 16)[1])


class Drifting(torch.nn.Module):
    """The model, with a buffer that every forward changes and no state_dict holds, and a draw of each RNG."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("seen", torch.zeros(3), persistent=False)
        self.register_buffer("count", torch.zeros(3))

    def forward(self, *args):
        self.seen += random.random()
        self.count += torch.rand(())
        return self.model(*args)


@pytest.fixture
def warmup(monkeypatch):
    """Warm-up batches of 16 random tokens per row, eager; 8 rows per step and per micro-batch."""
    monkeypatch.setattr(train, "MAX_SEQ_LEN", 16)
    monkeypatch.setattr(train, "COMPILE", False)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 8 * 16)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 8)
    monkeypatch.setattr(train, "warmup_batch", lambda B, T: (tokens(B, T), tokens(B, T, seed=1)))


def everything(model, optimizer):
    """Every tensor that a step may change, by name."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for i, state in enumerate(optimizer.state.values()):
        found |= {f"state {i} {key}": value for key, value in state.items()}
    return found


def test_restore_puts_back_every_parameter_buffer_state_and_rng_in_place(warmup):
    inner = tiny_model()
    model, optimizer = Drifting(inner), train.build_optimizer(inner, torch.float32)
    train.rehearse(model, optimizer, CPU, 2, [16])  # so that the state is that of a run under way
    before = {name: tensor.detach().clone() for name, tensor in everything(model, optimizer).items()}
    places = {name: tensor.data_ptr() for name, tensor in everything(model, optimizer).items()}
    rng = random.getstate(), torch.get_rng_state()

    restore = train.snapshot(model, optimizer, CPU)
    train.rehearse(model, optimizer, CPU, 2, [16])
    changed = [n for n, t in everything(model, optimizer).items() if not torch.equal(t, before[n])]
    constant = {"model.cos", "model.sin"}
    assert set(changed) == set(before) - constant  # otherwise this test would prove nothing
    inner.cos.add_(1)
    restore()

    after = everything(model, optimizer)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) and tensor.data_ptr() == places[name], name
    assert random.getstate() == rng[0] and torch.equal(torch.get_rng_state(), rng[1])
    assert all(p.grad is None for p in model.parameters())


def test_restore_forgets_state_that_an_optimizer_creates_at_its_first_step():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    restore = train.snapshot(model, optimizer, CPU)
    model(tokens(), tokens()).backward()
    optimizer.step()
    restore()
    assert not optimizer.state


def warm_up(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch_size = train.warm_up(model, train.build_optimizer(model, model.dtype), CPU)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return batch_size


def short_of_memory(model, limit, error):
    """Above `limit` rows the forward fails, after it has allocated."""
    network = model.eager_network

    def eager_network(idx, targets, masks):
        out = network(idx, targets, masks)
        if len(idx) > limit:
            raise error
        return out

    model.eager_network = eager_network
    return model


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        pytest.param(RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), marks=pytest.mark.slow),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_halves_the_device_batch_and_says_so(error, warmup, capsys):
    assert warm_up(short_of_memory(tiny_model(), 2, error)) == 2
    out = capsys.readouterr().out
    assert re.findall(r"warm-up again: out of memory, with a device batch of (\d+)", out) == ["4", "2"]
    assert "device batch: 2 x 16 tokens, 4 micro-batches a step" in out


# As torch prints it on a GPU that another process fills.
NEIGHBOUR = (
    "CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.25 GiB is free. "
    "Process 4242 has 70.10 GiB memory in use. Of the allocated memory 6.91 GiB is allocated by PyTorch\nSee documentation"
)


@pytest.mark.parametrize("stage", ["backward", "evaluation", *(pytest.param(s, marks=pytest.mark.slow) for s in ("forward", "optimizer"))])
@pytest.mark.parametrize("fits", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 2, 0))])  # after one size that is too large, two, three, and all of them
def test_memory_that_runs_out_anywhere_in_the_warm_up_halves_the_batch(stage, fits, warmup, monkeypatch, capsys):
    class Stage(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, rows):
            ctx.rows = rows
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            allocate("backward", ctx.rows)
            return grad, None

    seen = []

    def allocate(where, rows):
        seen.append(rows)
        if where == stage and rows > fits:
            raise torch.OutOfMemoryError(NEIGHBOUR)

    model = tiny_model()
    network = model.eager_network

    def eager_network(idx, targets, masks):
        allocate("evaluation" if targets is None else "forward", len(idx))
        out = network(idx, targets, masks)
        return out if targets is None else Stage.apply(out, len(idx))

    model.eager_network = eager_network
    step = train.MuonAdamW.step
    monkeypatch.setattr(train.MuonAdamW, "step", lambda self: (step(self), allocate("optimizer", seen[-1])))
    if fits:
        assert warm_up(model) == fits and model.training  # warm_up also compares the weights
    else:
        with pytest.raises(SystemExit, match=r"out of memory at one row.*or free the GPU.*Process 4242 has 70\.10 GiB"):
            train.warm_up(model, train.build_optimizer(model, model.dtype), CPU)
    out = capsys.readouterr().out
    tried = re.findall(r"warm-up again: out of memory, with a device batch of (\d) \(.* Process 4242 has 70\.10 GiB", out)
    assert tried == [size for size in "421" if int(size) >= fits]


@pytest.mark.parametrize("rows, limit, expected", [(8, 8, 8), (8, 100, 8), (27, 20, 9), (12, 8, 6), (7, 6, 1), (256, 128, 128)])
def test_the_device_batch_is_the_largest_divisor_of_a_steps_rows_within_the_limit(rows, limit, expected, warmup, monkeypatch):
    monkeypatch.setattr(train, "rehearse", lambda *args: None)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", rows * 16)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", limit)
    assert warm_up(tiny_model()) == expected


def test_the_smaller_device_batch_divides_the_rows_of_a_step(warmup, monkeypatch):
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 27 * 16)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 9)
    error = torch.OutOfMemoryError("out of memory")
    assert warm_up(short_of_memory(tiny_model(), 4, error)) == 3


FITS = [(80, 128), (48, 64), (32, 64), (24, 32), (16, 32), (12, 16), (8, 8), (6, 8)]


@pytest.mark.parametrize(
    "gigabytes, fits", [pytest.param(*fit, marks=[pytest.mark.slow] * (fit[0] != 24)) for fit in FITS]
)
def test_the_default_batch_finds_what_fits_into_a_gpu_by_itself(gigabytes, fits, monkeypatch, capsys):
    """By README's table: 0.8 GB for any batch, 46.6 GB more at 128 rows, 1 GB for CUDA, and a tenth of the memory taken
    by others. Only the memory is simulated; the decisions and the defaults are train.py's own."""
    baseline = train_on(gpu=True)
    monkeypatch.setattr(baseline, "MAX_SEQ_LEN", 2048)

    def rehearse(model, optimizer, device, batch_size, lengths):
        assert lengths == [2048]
        if 0.8 + 46.6 * batch_size / 128 + 1 > 0.9 * gigabytes:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(baseline, "rehearse", rehearse)
    assert (baseline.DEVICE_BATCH_SIZE, baseline.TOTAL_BATCH_SIZE) == (128, 2**19)
    model = tiny_model()
    assert baseline.warm_up(model, baseline.build_optimizer(model, model.dtype), CPU) == fits
    assert f"device batch: {fits} x 2048 tokens, {256 // fits} micro-batches a step" in capsys.readouterr().out


def test_out_of_memory_at_one_row_is_refused_in_a_sentence(warmup):
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(SystemExit, match="out of memory at one row: make the model smaller"):
        warm_up(short_of_memory(tiny_model(), 0, error))


def test_a_failed_attempt_leaves_no_activations_behind(warmup):
    """The retry must not stand on the memory that the failed attempt still holds."""
    held = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    model = tiny_model()
    network = model.eager_network

    def eager_network(idx, targets, masks):
        import weakref

        assert not [ref for ref in held if ref() is not None], "an activation of the failed attempt is alive"
        out = Watched.apply(network(idx, targets, masks))
        if len(idx) > 4:
            held.append(weakref.ref(out))
            raise torch.OutOfMemoryError("out of memory")
        return out

    model.eager_network = eager_network
    assert warm_up(model) == 4 and held


def test_shared_memory_is_not_memory():
    for text in ("out of resource: shared memory, Required: 1", "No valid triton configs. out of resource: x"):
        assert not train.is_out_of_memory(torch.OutOfMemoryError(text))
    assert not train.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_attention_that_fails_in_the_warm_up_makes_way_for_the_next(warmup, monkeypatch, capsys):
    """FA3 of the wrong build, then flex without shared memory, then SDPA; the batch stays as it is."""

    def broken(name, error):
        def attend(*args):
            raise error

        return train.Attention(name, lambda T, window, device: None, attend)

    backends = {
        "fa3": broken("fa3", RuntimeError("no kernel image is available")),
        "flex": broken("flex", torch.OutOfMemoryError("out of resource: shared memory, Required: 200000")),
        "sdpa": train.SDPA,
    }

    def choose(device, dtype, compiled, failed):
        name = next(n for n in backends if n not in failed)
        return backends[name], "; ".join(failed.values())

    monkeypatch.setattr(train, "choose_attention", choose)
    assert warm_up(tiny_model()) == 8
    out = capsys.readouterr().out
    assert "fa3 failed, with the next attention: RuntimeError: no kernel image is available" in out
    assert "flex failed, with the next attention: OutOfMemoryError: out of resource" in out
    assert "attention: sdpa (RuntimeError: no kernel image" in out


def fake_compile(monkeypatch, error=None):
    def compile(function, dynamic):
        def compiled(*args):
            if error:
                raise error
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(train, "choose_compile", lambda device: (True, "fake"))


def test_a_compiler_that_fails_means_eager_and_the_reason(warmup, monkeypatch, capsys):
    fake_compile(monkeypatch, RuntimeError("C++ compile error"))
    model = tiny_model()
    assert warm_up(model) == 8
    assert model.network == model.eager_network
    out = capsys.readouterr().out
    assert "torch.compile failed, in eager mode: RuntimeError: C++ compile error" in out
    assert "torch.compile: no, eager (RuntimeError: C++ compile error)" in out


def test_a_mistake_in_the_model_is_raised_as_it_is(warmup):
    model = tiny_model()
    model.lm_head = torch.nn.Linear(3, 64, bias=False)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        train.warm_up(model, train.build_optimizer(model, model.dtype), CPU)


# --- What the machine can do --------------------------------------------------


@pytest.mark.parametrize(
    "capability, expected",
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_dtype_on_cuda(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    dtype, reason = train.choose_dtype(torch.device("cuda"))
    assert dtype == expected and f"{capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize("has", CPU_FEATURES)
def test_dtype_on_cpu_is_bfloat16_only_if_the_cpu_has_it(has, monkeypatch):
    pretend_cpu_has(has, monkeypatch)
    dtype, reason = train.choose_dtype(CPU)
    assert dtype == (torch.bfloat16 if has else torch.float32)
    assert has in reason


def test_dtype_on_mps_is_float32_and_a_set_one_wins(monkeypatch):
    assert train.choose_dtype(torch.device("mps"))[0] == torch.float32
    monkeypatch.setattr(train, "DTYPE", torch.bfloat16)
    assert train.choose_dtype(CPU) == (torch.bfloat16, "set by DTYPE")


def test_compile_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "COMPILE", True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train.choose_compile(CPU) == (False, "no C++ compiler: no-such-compiler not found")
    assert train.choose_compile(torch.device("mps"))[0] is False
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert train.choose_compile(CPU)[0] is True
    monkeypatch.setattr(train, "COMPILE", False)
    assert train.choose_compile(CPU) == (False, "COMPILE is off")


# --- The run ------------------------------------------------------------------


class FakeClock:
    """A step takes 4 seconds of a budget of 100."""

    def __init__(self):
        self.calls = self.seconds = 0

    def progress(self):
        self.seconds = 4 * self.calls
        self.calls += 1
        return min(self.seconds / 100, 1.0)

    def training_seconds(self):
        return float(self.seconds)

    def mfu_percent(self, flops_per_token, tokens, seconds):
        return 12.5


def loop(model, losses=None, rows=2):
    """train() over random batches, or with these losses; returns steps, tokens and the number of calls of the clock."""
    clock, optimizer = FakeClock(), train.build_optimizer(model, torch.float32)
    loader = ((tokens(rows, seed=i), tokens(rows, seed=i + 1), 1) for i in itertools.count())
    if losses is not None:
        values, network = iter(losses), model.eager_network
        model.network = lambda *args: network(*args) * 0 + next(values)
    return *train.train(clock, model, optimizer, loader, rows), clock.calls


@pytest.fixture
def two_rows(monkeypatch):
    """A step of two rows of 16 tokens."""
    monkeypatch.setattr(train, "MAX_SEQ_LEN", 16)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 32)


def test_training_ends_when_the_budget_is_spent_and_asks_the_clock_once_a_step(two_rows, capsys):
    assert loop(tiny_model(init="fresh")) == (25, 25 * 32, 26)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line[5:10]) for line in lines] == [2, 5, 8, 11, 14, 17, 20, 23, 25]  # one about every 10 seconds
    for line in lines:
        assert re.fullmatch(
            r"step \d{5} \(\d+\.\d%\) \| loss \d\.\d{6} \| lrm [01]\.\d\d \| 4000 ms \| 8 tok/s"
            r" \| mfu 12\.5% \| epoch 1 \| \d+ s left",
            line,
        ), line


def test_the_printed_loss_is_an_unbiased_running_mean(two_rows, capsys):
    losses = [4.0, 2.0] + [3.0] * 23
    loop(tiny_model(), losses)
    first, second = re.findall(r"loss (\S+)", capsys.readouterr().out)[:2]
    mean = weight = 0.0
    seen = []
    for loss in losses:
        mean, weight = 0.9 * mean + 0.1 * loss, 0.9 * weight + 0.1
        seen.append(mean / weight)
    assert [float(first), float(second)] == pytest.approx([seen[0], seen[3]], abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 100.5])
@pytest.mark.parametrize("at", [1, 7, 25])  # the last: a loss that is read after the loop
def test_a_loss_that_diverged_ends_the_run(bad, at, two_rows):
    losses = [3.0] * 25
    losses[at - 1] = bad
    with pytest.raises(SystemExit, match=rf"^FAIL: loss {bad} at step {at}: "):
        loop(tiny_model(), losses)


def test_a_batch_schedule_changes_the_steps_and_every_token_is_counted(two_rows, monkeypatch, capsys):
    """Half the run with 2 rows of 4 x 4 tokens, then with 5 rows, rounded to 2 micro-batches of 2."""
    seen = []
    train_step = train.train_step

    def watched(model, optimizer, batches, micro_batches, T):
        seen.append((micro_batches, T))
        return train_step(model, optimizer, batches, micro_batches, T)

    monkeypatch.setattr(train, "batch_schedule", lambda progress: (32, 4) if progress < 0.5 else (5 * 16, 16))
    monkeypatch.setattr(train, "train_step", watched)
    steps, total, _ = loop(tiny_model(init="fresh"))
    assert seen == [(1, 4)] * 13 + [(2, 16)] * 12 and steps == 25
    assert total == 13 * 32 + 12 * 64
    speeds = re.findall(r"(\d+) tok/s", capsys.readouterr().out)
    assert speeds[0] == "8" and speeds[-1] == "16"


def test_every_row_length_of_the_schedule_is_compiled_in_the_warm_up(warmup, monkeypatch, capsys):
    lengths = []
    model = tiny_model()
    network = model.eager_network
    model.eager_network = lambda idx, *args: lengths.append(idx.shape) or network(idx, *args)
    monkeypatch.setattr(train, "batch_schedule", lambda p: (4 * 16 if p < 0.3 else 8 * 16, 4 if p < 0.5 else 16))
    assert warm_up(model) == 4  # the largest that divides the smallest step
    assert set(lengths) == {(16, 4), (4, 16)}
    assert lengths[-1] == (4, 16)  # the evaluation's


@pytest.mark.parametrize("total, remedy", [(1000, 1024), (5000, 5120), (128, 256), (0, 256)])
def test_a_total_batch_that_is_not_whole_rows_is_refused_with_the_numbers(total, remedy, monkeypatch):
    monkeypatch.setattr(train, "MAX_SEQ_LEN", 256)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", total)
    with pytest.raises(SystemExit) as refusal:
        train.plan_batches()
    text = str(refusal.value)
    assert f"TOTAL_BATCH_SIZE {total} " in text and "MAX_SEQ_LEN 256:" in text and f"set it to {remedy}" in text
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", remedy)
    assert train.plan_batches() == (remedy // 256, [256])


def test_a_row_length_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(train, "MAX_SEQ_LEN", 256)
    monkeypatch.setattr(train, "batch_schedule", lambda progress: (1024, 96))
    with pytest.raises(AssertionError, match=r"row lengths \{96\}.* 256"):
        train.plan_batches()


# --- Checkpoint ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("has", CPU_FEATURES)
def test_a_checkpoint_loads_in_eval_mode_with_the_same_logits_at_any_length(tmp_path, monkeypatch, dtype, compiled, has):
    """On a CPU with and without fast bfloat16: a checkpoint is computed with the dtype it was trained with."""
    pretend_cpu_has(has, monkeypatch)
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    model = tiny_model(n_layer=3, n_head=4, n_kv_head=2, dtype=name)
    fake_compile(monkeypatch)
    train.set_compile(model, SimpleNamespace(), compiled, CPU)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"an older one")
    train.save_checkpoint(path, model, "abc123")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["checkpoint.pt"]

    saved = torch.load(path, weights_only=True)
    assert saved.keys() == {"model", "config", "run_id"} and saved["run_id"] == "abc123"
    assert saved["model"].keys() == dict(model.named_parameters()).keys()
    assert saved["config"]["dtype"] == name
    assert json.loads(json.dumps(saved["config"])) == saved["config"]  # plain values only

    loaded = train.load_model(path, "cpu")
    assert not loaded.training and loaded.dtype == dtype
    # The two dtypes differ by more than 0.01 here, see below: loading with the other one would fail.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-3}[dtype]
    for T in (16, 5):
        torch.testing.assert_close(loaded(tokens(T=T)), model(tokens(T=T)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("trained, asked", [("float32", torch.bfloat16), ("bfloat16", torch.float32)])
def test_a_caller_may_ask_for_another_dtype_than_the_checkpoints(tmp_path, trained, asked):
    model = tiny_model(dtype=trained)
    train.save_checkpoint(tmp_path / "checkpoint.pt", model, "abc123")
    loaded = train.load_model(tmp_path / "checkpoint.pt", "cpu", dtype=asked)
    assert loaded.dtype == asked == getattr(torch, loaded.config.dtype)
    other = tiny_model(dtype=str(asked).removeprefix("torch."))
    torch.testing.assert_close(loaded(tokens()), other(tokens()), rtol=0, atol=1e-3)
    assert (loaded(tokens()) - model(tokens())).abs().max() > 0.01


@pytest.mark.parametrize("has", CPU_FEATURES)
def test_a_checkpoint_from_before_dtypes_were_saved_gets_this_machines(tmp_path, monkeypatch, has):
    pretend_cpu_has(has, monkeypatch)
    model = tiny_model()
    del model.config.dtype
    train.save_checkpoint(tmp_path / "checkpoint.pt", model, "abc123")
    assert train.load_model(tmp_path / "checkpoint.pt", "cpu").dtype == train.choose_dtype(CPU)[0]
    assert train.load_model(tmp_path / "checkpoint.pt", "cpu", torch.float32).dtype == torch.float32


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"an older one")

    def save(value, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space"):
        train.save_checkpoint(path, tiny_model(), "abc123")
    assert path.read_bytes() == b"an older one" and not path.with_name("checkpoint.pt.tmp").exists()


# --- What replaces plain formulas, because it is faster ------------------------


def test_relu_squared_is_exactly_what_autograd_makes_of_the_formula():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x.data[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    ours, plain = train.ReluSquared.apply(x), F.relu(x).square()
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, plain)))
    assert torch.autograd.gradcheck(train.ReluSquared.apply, x.detach()[1:3].double().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_turns_each_pair_of_channels_and_keeps_the_dtype(dtype):
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    D = model.cos.size(-1)
    x, grad = (torch.randn(2, 9, 3, D, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    cos, sin = model.cos[:9, :, : D // 2], model.sin[:9, :, : D // 2]
    x1, x2 = x.chunk(2, dim=-1)
    plain = torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(dtype)
    ours = train.rotate(x, model.cos[:9], model.sin[:9])
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad.detach())[0] for y in (ours, plain)))
