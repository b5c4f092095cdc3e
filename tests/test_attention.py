"""Every attention back end attends exactly the keys k with 0 <= q - k <= window, and the choice among them never fails."""

import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention
from test_model import random_weights, tiny_model

import train
from frozen.device import FA3_KERNEL

# A kernel in FlashAttention's manner: (B, T, H, D), grouped heads, window_size=(left, right) besides the own key.
STAND_IN = '''
import torch

def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    (B, T, H, D), groups = q.shape, q.size(2) // k.size(2)
    left, right = window_size
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    hidden = torch.zeros(T, T, dtype=torch.bool)
    if left >= 0:
        hidden |= i - j > left
    if right >= 0:
        hidden |= j - i > right
    if causal:
        hidden |= j > i
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5
    y = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
    return {returns}
'''


def stand_in(returns="y"):
    module = ModuleType("stand_in")
    exec(STAND_IN.replace("{returns}", returns), module.__dict__)
    return module


def put_kernels(monkeypatch, get_kernel):
    """A `kernels` package whose get_kernel is this, asked because LOCAL_KERNELS names FlashAttention-3."""
    monkeypatch.setenv("LOCAL_KERNELS", f"{FA3_KERNEL['repo_id']}=/a/build")
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel, get_local_kernel=None))


def backend(name, monkeypatch):
    if name == "sdpa":
        return train.SDPA
    if name == "flex":
        return train.load_flex()
    kernel = {
        "fa3": stand_in(),
        "fa3 with log-sum-exp": stand_in("(y, None)"),
        "fa3 in a submodule": SimpleNamespace(flash_attn_interface=stand_in()),
    }[name]
    put_kernels(monkeypatch, lambda repo_id, **pin: kernel)
    return train.load_fa3()


@pytest.fixture(autouse=True)
def flex_with_gradients_on_cpu(monkeypatch):
    """torch refuses FlexAttention's backward on a CPU for want of a fast kernel; its eager one is right."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *qkv: None)


def attend(attention, q, k, v, window):
    return attention.attend(q, k, v, window, attention.make_mask(q.size(1), window, q.device))


def qkv(B, T, H, KV, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, D, generator=generator, requires_grad=True) for heads in (H, KV, KV)]


def naive(q, k, v, window):
    """One query, one head, one key at a time, in float64."""
    (B, T, H, D), KV = q.shape, k.size(2)
    q, k, v = q.double(), k.double(), v.double()
    y = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            kv = h // (H // KV)
            for i in range(T):
                keys = [j for j in range(T) if 0 <= i - j <= window]
                scores = torch.stack([q[b, i, h] @ k[b, j, kv] / D**0.5 for j in keys])
                y[b, i, h] = sum(w * v[b, j, kv] for w, j in zip(scores.softmax(0), keys, strict=True))
    return y.float()


BACKENDS = ["sdpa", "flex", "fa3", "fa3 with log-sum-exp", "fa3 in a submodule"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("T, window", [(13, 0), (13, 1), (13, 5), (13, 11), (13, 12), (13, 64), (3, 5), (1, 2)])
def test_backend_attends_as_the_naive_loop(name, heads, T, window, monkeypatch):
    q, k, v = qkv(2, T, *heads, 16)
    y = attend(backend(name, monkeypatch), q, k, v, window)
    assert y.shape == q.shape
    torch.testing.assert_close(y, naive(q, k, v, window), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", BACKENDS[:3])
def test_query_12_with_window_5_touches_keys_7_to_12_and_no_others(name, monkeypatch):
    q, k, v = qkv(1, 16, 2, 2, 16)
    attend(backend(name, monkeypatch), q, k, v, 5)[:, 12].square().sum().backward()
    for x in (k, v):
        touched = x.grad.abs().sum(dim=(0, 2, 3)).nonzero().flatten().tolist()
        assert touched == [7, 8, 9, 10, 11, 12]


def test_full_context_has_no_mask_so_that_sdpa_may_take_a_fused_kernel():
    assert train.sdpa_mask(16, 16, torch.device("cpu")) is None
    assert train.sdpa_mask(16, 15, torch.device("cpu")) is None
    assert train.sdpa_mask(16, 14, torch.device("cpu")).shape == (16, 16)


def test_windows_follow_the_pattern_and_the_last_layer_sees_everything(monkeypatch):
    monkeypatch.setattr(train, "MAX_SEQ_LEN", 64)
    monkeypatch.setattr(train, "SHORT_WINDOW_RATIO", 0.25)

    def windows(pattern, depth):
        monkeypatch.setattr(train, "WINDOW_PATTERN", pattern)
        monkeypatch.setattr(train, "DEPTH", depth)
        return train.build_config(128, torch.float32).windows

    assert windows("SSSL", 8) == [16, 16, 16, 64] * 2
    assert windows("SSSSL", 7) == [16, 16, 16, 16, 64, 16, 64]
    assert windows("S", 2) == [16, 64]


@pytest.mark.slow
def test_flex_stays_in_one_graph_for_training_and_evaluation():
    """What is compiled on CUDA, as far as a CPU can follow it: no graph break, and a graph for each of the two."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = random_weights(tiny_model(n_layer=2, windows=[5, 16]))
    x = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = model(x, x)
    model.attention = train.load_flex()
    model.network = torch.compile(model.eager_network, backend=count, dynamic=False, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(model(x, x), expected, rtol=1e-4, atol=1e-5)
        model.eval()
        with torch.no_grad():
            assert model(x).shape == (2, 16, 64)
        model.train()
    assert len(graphs) == 2
    torch.compiler.reset()


# --- The choice ---------------------------------------------------------------

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability): what torch says of a GPU that is not there."""

    def be(*capability, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    return be


def failing(error):
    def get_kernel(repo_id, **pin):
        raise error

    return get_kernel


def test_a_hopper_gpu_in_bfloat16_gets_the_pinned_fa3(gpu, monkeypatch):
    asked = {}
    gpu(9, 0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    put_kernels(monkeypatch, lambda **kwargs: asked.update(kwargs) or stand_in())
    attention, reason = train.choose_attention(CUDA, torch.bfloat16)
    assert (attention.name, reason) == ("fa3", "a Hopper GPU and bfloat16")
    assert asked == FA3_KERNEL and ("version" in asked) != ("revision" in asked)
    assert train.os.environ["HF_HUB_OFFLINE"] == "1"  # a run touches no network


@pytest.mark.parametrize(
    "capability, dtype, hip",
    [((8, 0), torch.bfloat16, None), ((10, 0), torch.bfloat16, None), ((9, 0), torch.float32, None)]
    + [((9, 0), torch.bfloat16, "6.4")],
)
def test_other_gpus_do_not_even_import_kernels(capability, dtype, hip, gpu, monkeypatch):
    gpu(*capability, hip=hip)
    put_kernels(monkeypatch, failing(AssertionError("asked for a kernel")))
    attention, reason = train.choose_attention(CUDA, dtype)
    assert (attention.name, reason) == ("flex", "FA3 not used: needs a Hopper GPU and bfloat16")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Version 1 is not available in the local cache\nand a second line"),
        ValueError("publisher is not trusted: pass trust_remote_code"),
        ImportError("libcudart.so.13: cannot open shared object file"),
        OSError("undefined symbol"),
    ],
)
def test_a_kernel_that_cannot_be_had_means_flex_and_the_reason(error, gpu, monkeypatch):
    gpu(9, 0)
    put_kernels(monkeypatch, failing(error))
    attention, reason = train.choose_attention(CUDA, torch.bfloat16)
    assert attention.name == "flex"
    assert reason == f"FA3 not used: {type(error).__name__}: {str(error).splitlines()[0]}"


def test_kernels_that_is_not_installed_means_flex(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setitem(sys.modules, "kernels", None)
    attention, reason = train.choose_attention(CUDA, torch.bfloat16)
    assert attention.name == "flex" and "ModuleNotFoundError" in reason


def test_what_failed_in_the_warm_up_is_not_chosen_again(gpu, monkeypatch):
    gpu(9, 0)
    put_kernels(monkeypatch, lambda **kwargs: stand_in())
    failed = {"fa3": "RuntimeError: wrong build"}
    assert train.choose_attention(CUDA, torch.bfloat16, failed=failed)[0].name == "flex"
    failed["flex"] = "InductorError: out of resource"
    attention, reason = train.choose_attention(CUDA, torch.bfloat16, failed=failed)
    assert attention is train.SDPA
    assert reason == "FA3 not used: RuntimeError: wrong build; FLEX not used: InductorError: out of resource"


def test_flex_is_for_compiled_graphs_only(gpu):
    gpu(8, 9)
    attention, reason = train.choose_attention(CUDA, torch.bfloat16, compiled=False)
    assert attention is train.SDPA and "FLEX not used: needs torch.compile" in reason


@pytest.mark.parametrize("device", [CUDA, torch.device("cpu")])
def test_a_named_back_end_is_taken_on_any_machine(device, gpu, monkeypatch):
    gpu(9, 0)
    put_kernels(monkeypatch, lambda **kwargs: stand_in())
    for name in ("sdpa", "flex", "fa3"):
        monkeypatch.setattr(train, "ATTENTION", name)
        attention, reason = train.choose_attention(device, torch.bfloat16)
        assert (attention.name, reason) == (name, "set by ATTENTION")
    monkeypatch.setattr(train, "ATTENTION", "linear")
    with pytest.raises(AssertionError, match="'linear' is unknown: use one of fa3, flex, sdpa"):
        train.choose_attention(device, torch.bfloat16)


def test_a_named_back_end_that_fails_is_an_error_and_not_replaced(monkeypatch):
    """Otherwise a run would report the result of another attention than the one that was asked for."""

    def attend(q, k, v, window, mask):
        raise RuntimeError("wrong shape")

    broken = train.Attention("mine", lambda T, window, device: None, attend)
    for name, value in dict(ATTENTION="mine", COMPILE=False, MAX_SEQ_LEN=16, TOTAL_BATCH_SIZE=32).items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setitem(train.ATTENTIONS, "mine", lambda: broken)
    monkeypatch.setattr(train, "warmup_batch", lambda B, T: torch.zeros(2, B, T, dtype=torch.int64))
    model = tiny_model()
    with pytest.raises(RuntimeError, match="wrong shape"):
        train.warm_up(model, train.build_optimizer(model, torch.float32), torch.device("cpu"))


NO_IMAGE = "CUDA error: no kernel image is available for execution on the device"
OUT_OF_RESOURCE = "out of resource: shared memory, Required: 246016, Hardware limit: 232448"


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("this build has no backward")


def raises(error):
    def flash_attn_func(*args, **kwargs):
        raise error

    return flash_attn_func


def without_backward(q, k, v, **kwargs):
    return FailsInBackward.apply(stand_in().flash_attn_func(q, k, v, **kwargs))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "kernel, name, says",
    [
        (stand_in(), "fa3", "a Hopper GPU and bfloat16"),
        (stand_in("(y, None)"), "fa3", "a Hopper GPU and bfloat16"),
        (ValueError("not in the local cache"), "flex", "FA3 not used: ValueError: not in the local cache"),
        pytest.param(SimpleNamespace(), "flex", "FA3 not used: AttributeError: ", marks=pytest.mark.slow),
        (SimpleNamespace(flash_attn_func=raises(RuntimeError(NO_IMAGE))), "flex", f"FA3 not used: RuntimeError: {NO_IMAGE}"),
        pytest.param(
            SimpleNamespace(flash_attn_func=raises(TypeError("unexpected keyword argument"))), "flex", "FA3 not used: TypeError",
            marks=pytest.mark.slow,
        ),
        (SimpleNamespace(flash_attn_func=raises(torch.OutOfMemoryError(OUT_OF_RESOURCE))), "flex", "FA3 not used: OutOfMemory"),
        (SimpleNamespace(flash_attn_func=without_backward), "flex", "FA3 not used: RuntimeError: this build has no backward"),
        pytest.param(
            SimpleNamespace(flash_attn_func=lambda q, k, v, **kwargs: v[:, :1]), "flex", "FA3 not used: RuntimeError: mm",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["present", "a tuple", "missing", "another interface", "no kernel image", "other arguments", "shared memory", "backward",
         "a wrong shape"],
)  # fmt: skip
def test_on_a_hopper_gpu_the_warm_up_ends_with_what_works(kernel, name, says, gpu, monkeypatch, capsys):
    """The whole warm-up, with the choice of a Hopper GPU in bfloat16, and kernels that stand in for FlashAttention-3."""
    gpu(9, 0)
    put_kernels(monkeypatch, failing(kernel) if isinstance(kernel, Exception) else lambda **pin: kernel)
    choose = train.choose_attention
    monkeypatch.setattr(train, "choose_attention", lambda device, dtype, *rest: choose(CUDA, torch.bfloat16, *rest))
    monkeypatch.setattr(train, "choose_compile", lambda device: (True, "triton"))
    monkeypatch.setattr(train, "set_compile", lambda *args: None)
    for knob, value in dict(MAX_SEQ_LEN=16, TOTAL_BATCH_SIZE=64, DEVICE_BATCH_SIZE=4).items():
        monkeypatch.setattr(train, knob, value)
    monkeypatch.setattr(train, "warmup_batch", lambda B, T: torch.zeros(2, B, T, dtype=torch.int64))
    model = random_weights(tiny_model(n_head=4, n_kv_head=2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert train.warm_up(model, train.build_optimizer(model, torch.float32), torch.device("cpu")) == 4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.attention.name == name
    out = capsys.readouterr().out
    assert f"\nattention: {name} ({says}" in f"\n{out}", out
    assert out.count("warm-up again") == ("failed, with the next attention" in out) <= 1
    assert "\ndevice batch: 4 x 16 tokens, 1 micro-batches a step\n" in out


def test_an_error_that_outlives_the_attention_is_printed_before_the_run_ends_by_it(gpu, monkeypatch, capsys):
    """After an illegal access every further call of CUDA fails: no other attention can help within this process."""
    broken = train.Attention("fa3", lambda T, window, device: None, raises(torch.AcceleratorError("CUDA error: illegal access")))

    def restore():
        raise torch.AcceleratorError("CUDA error: illegal access")

    monkeypatch.setattr(train, "choose_attention", lambda *args: (broken, ""))
    monkeypatch.setattr(train, "snapshot", lambda *args: restore)
    for knob, value in dict(COMPILE=False, MAX_SEQ_LEN=16, TOTAL_BATCH_SIZE=64).items():
        monkeypatch.setattr(train, knob, value)
    monkeypatch.setattr(train, "warmup_batch", lambda B, T: torch.zeros(2, B, T, dtype=torch.int64))
    model = tiny_model()
    with pytest.raises(torch.AcceleratorError):
        train.warm_up(model, train.build_optimizer(model, torch.float32), torch.device("cpu"))
    assert "fa3 failed, with the next attention: AcceleratorError: CUDA error: illegal access" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_without_cuda_it_is_sdpa(kind, monkeypatch):
    put_kernels(monkeypatch, failing(AssertionError("asked for a kernel")))
    assert train.choose_attention(torch.device(kind), torch.float32) == (train.SDPA, f"on {kind}")


def test_the_real_loader_takes_a_local_kernel_and_misses_one_at_once(gpu, monkeypatch, tmp_path):
    """The `kernels` package itself, on a kernel made here, then on the one that was never fetched."""
    gpu(9, 0)
    build = tmp_path / "kernel" / "torch-universal"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(STAND_IN.replace("{returns}", "y"))
    metadata = {"id": "flash_attn3_stand_in", "name": "flash-attn3", "version": 1, "license": "MIT"}
    (build / "metadata.json").write_text(
        json.dumps(metadata | {"python-depends": [], "backend": {"type": "cpu"}})
    )
    monkeypatch.setenv("LOCAL_KERNELS", f"{FA3_KERNEL['repo_id']}={build.parent}")
    attention, _ = train.choose_attention(CUDA, torch.bfloat16)
    assert attention.name == "fa3"
    q, k, v = qkv(1, 9, 4, 2, 8)
    torch.testing.assert_close(attend(attention, q, k, v, 3), naive(q, k, v, 3), rtol=1e-4, atol=1e-5)

    monkeypatch.delenv("LOCAL_KERNELS")
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "empty"))
    began = time.monotonic()
    attention, reason = train.choose_attention(CUDA, torch.bfloat16)
    assert attention.name == "flex" and "run prepare.py" in reason
    assert time.monotonic() - began < 20
