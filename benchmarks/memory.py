"""How much GPU memory does a training step need, by device batch? Computed from the compiler's graphs, without a GPU.

    uv run benchmarks/memory.py                        the rows of README's table
    uv run benchmarks/memory.py --attention flex       with FlexAttention instead of FlashAttention-3
    uv run benchmarks/memory.py --set DEPTH=12         another hyperparameter of train.py

train.py's step, with the hyperparameters of a large GPU, is compiled on fake tensors, which have shapes and dtypes but no
data. Inductor's graphs of forward pass, backward pass, optimizer and evaluation are caught before it generates code.
They hold what a GPU would execute, and the partitioner has decided which activations are saved. FlashAttention-3 is a
stand-in with its inputs and outputs, log-sum-exp included. A walk over each graph in its order then adds up what is
alive at the same time, under the assumption that elementwise operations and reductions are fused into the kernel that
needs them: a buffer is made for the output of a matmul, attention or a reduction, for what these read, and for what a
graph returns. What it leaves out: the allocator's rounding and fragmentation, cuBLAS workspaces (tens of MB), the CUDA
context (about half a GB, which torch's own count leaves out, too).

Compared with the one published figure of this configuration, PUBLISHED_MIB, the total is off by the percentage that the
last line prints. tests/test_graphs.py checks the same graphs, and README's table, against this file.
"""

import argparse
import ast
import importlib.util
import operator
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED_MIB, PUBLISHED_ROWS = 45_060, 128  # karpathy/autoresearch on an H100: FlashAttention-3, compiled, its own code
MIB = 2**20
T, V = 2048, 8192  # climbmix
ROWS = [128, 64, 32, 16, 8]


def gpu_train(**knobs):
    """train.py as a module, with the hyperparameters of a machine with a GPU and these."""
    sys.path.insert(0, str(ROOT))
    try:
        spec = importlib.util.spec_from_file_location("train_on_gpu", ROOT / "train.py")
        train = importlib.util.module_from_spec(spec)
        with mock.patch("torch.cuda.is_available", lambda: True):
            spec.loader.exec_module(train)
    finally:
        sys.path.remove(str(ROOT))
    for name, value in {"MAX_SEQ_LEN": T, **knobs}.items():
        assert hasattr(train, name), f"train.py has no hyperparameter {name}"
        setattr(train, name, value)
    return train


# --- FlashAttention-3, as a stand-in for the compiler -------------------------


@torch.library.custom_op("stand_in::flash", mutates_args=())
def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("for fake tensors only")


@flash.register_fake
def _(q, k, v, window):
    B, length, H, D = q.shape
    assert k.shape == v.shape == (B, length, k.size(2), D) and H % k.size(2) == 0, (q.shape, k.shape, v.shape)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16, f"FlashAttention takes bfloat16: {q.dtype, k.dtype, v.dtype}"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "FlashAttention needs contiguous heads"
    return torch.empty_like(q), q.new_empty(B, H, length, dtype=torch.float32)


@torch.library.custom_op("stand_in::flash_backward", mutates_args=())
def flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, lse: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError("for fake tensors only")


@flash_backward.register_fake
def _(grad, q, k, v, y, lse, window):
    assert grad.shape == y.shape and grad.dtype == torch.bfloat16, (grad.shape, grad.dtype)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    ctx.window = inputs[-1]
    ctx.save_for_backward(*inputs[:3], *output)


flash.register_autograd(
    lambda ctx, grad, _: (*torch.ops.stand_in.flash_backward(grad, *ctx.saved_tensors, ctx.window), None), setup_context=_save
)


def attention(train, name):
    """The back end `fa3` (the stand-in) or `flex` or `sdpa` (train.py's own)."""
    if name != "fa3":
        return train.ATTENTIONS[name]()
    attend = lambda q, k, v, window, mask: torch.ops.stand_in.flash(q, k, v, window)[0]  # noqa: E731
    return train.Attention("fa3", lambda T, window, device: None, attend)


# --- Autocast as on CUDA ------------------------------------------------------

FLOAT32_ON_CUDA = ["pow.Tensor_Scalar", "rms_norm"]  # of the operators that train.py uses, those that run in bfloat16 on a CPU


@contextmanager
def autocast_as_on_cuda():
    """Inside, torch.autocast("cpu") treats the operators of train.py as torch.autocast("cuda") does."""
    library = torch.library.Library("aten", "IMPL")
    for name in FLOAT32_ON_CUDA:
        operator_packet, _, overload = name.partition(".")
        function = getattr(getattr(torch.ops.aten, operator_packet), overload or "default")

        def in_float32(*args, function=function, **kwargs):
            args = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
                return function(*args, **kwargs)

        library.impl(name, in_float32, "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


# --- Graphs -------------------------------------------------------------------


class Step(NamedTuple):
    graphs: dict  # name -> GraphModule, each node with its fake value in meta["val"]
    static: dict  # what a run holds all the time: {name: bytes}


@contextmanager
def traced(graphs, label):
    """Yields a back end for torch.compile, which is Inductor up to its graphs: it files them as `graphs[label()]`."""
    from torch._inductor.compile_fx import compile_fx

    def inner(module, inputs, is_backward=False, is_inference=False, **_):
        name = label() if not is_backward else "backward"
        while name in graphs:
            name += "'"
        graphs[name] = module

        def run(args):
            return module.forward(*args)

        run._boxed_call = True
        return run

    torch.compiler.reset()
    with (
        mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *qkv: None),  # it refuses CPU gradients
        torch._dynamo.config.patch(recompile_limit=64),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        autocast_as_on_cuda(),
    ):
        yield lambda module, inputs: compile_fx(module, inputs, inner_compile=inner)
    torch.compiler.reset()


def trace(train, rows, back_end="fa3", length=T, vocab=V, optimizer_too=True):
    """The Step of `rows` rows per micro-batch in bfloat16: all its graphs, each traced without a graph break. The
    optimizer's depend on neither rows nor attention: they are left out unless optimizer_too."""
    graphs, stage = {}, ["forward"]
    with traced(graphs, lambda: stage[0]) as backend, FakeTensorMode():
        model = train.GPT(train.build_config(vocab, torch.bfloat16))
        model.attention = attention(train, back_end)
        optimizer = train.build_optimizer(model, torch.bfloat16)
        batch = [torch.zeros(rows, length, dtype=torch.int64) for _ in range(2)]

        def compiled(function):
            return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)

        model.network = compiled(model.eager_network)
        loss = model(*batch)
        assert loss.shape == () and loss.dtype == torch.float32
        loss.backward()
        adamw, muon = compiled(train.adamw_step), compiled(train.muon_step)

        def staged(name, function):
            def step(p, *args):
                stage[0] = f"{name} {tuple(p.shape)}"
                return function(p, *args)

            return step

        optimizer.adamw_step, optimizer.muon_step = staged("adamw", adamw), staged("muon", muon)
        if optimizer_too:
            optimizer.step()
        stage[0] = "evaluation"
        model.eval()
        with torch.no_grad():
            logits = model(batch[0])
        assert logits.shape == (rows, length, vocab) and logits.dtype == torch.float32
        for p in model.parameters():
            assert p.dtype == p.grad.dtype == torch.float32 and p.grad.shape == p.shape
        state = [t for group in optimizer.state.values() for t in group.values()]
        static = {
            "parameters": size(*model.parameters()), "gradients": size(*(p.grad for p in model.parameters())),
            "optimizer": size(*state), "buffers and batch": size(*model.buffers(), *batch),
        }  # fmt: skip
    return Step(graphs, static)


def size(*tensors):
    """Bytes of the tensors' storages."""
    return sum(t.untyped_storage().nbytes() for t in tensors)


def on_cuda(graph):
    """Executes a graph on fake CUDA tensors. Returns the number of tensors whose shape, dtype, strides and device were
    compared with the graph's; a difference is an AssertionError."""
    from torch.utils._pytree import tree_map

    mode = next(v.fake_mode for n in graph.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor))
    compared = 0

    def move(value):
        if isinstance(value, torch.device):
            return torch.device("cuda:0")
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
        return value

    class OnCuda(torch.fx.Interpreter):
        def run_node(self, node):
            nonlocal compared
            if node.op == "call_function":
                args, kwargs = self.fetch_args_kwargs_from_env(node)
                result = node.target(*tree_map(move_device, args), **tree_map(move_device, kwargs))
            else:
                result = super().run_node(node)
            expected = node.meta.get("val")
            if isinstance(expected, torch.Tensor) and node.op != "output":
                for what in ("shape", "dtype"):
                    got, wanted = getattr(result, what), getattr(expected, what)
                    assert got == wanted, f"{node.name} ({node.target}): {what} {got} on CUDA, {wanted} in the graph"
                assert result.device.type == "cuda", f"{node.name} ({node.target}) is on {result.device}"
                compared += 1
            return result

    def move_device(value):
        return torch.device("cuda:0") if isinstance(value, torch.device) else value

    with mode, torch.no_grad():
        inputs = [tree_map(move, node.meta["val"]) for node in graph.graph.nodes if node.op == "placeholder"]
        OnCuda(graph).run(*inputs)
    return compared


# --- Memory -------------------------------------------------------------------

VIEWS = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "squeeze", "unsqueeze", "split",
    "alias", "detach", "as_strided", "split_with_sizes",
}  # fmt: skip
# What Inductor leaves to a kernel of its own, besides operators that are not aten's or prims': its inputs and outputs
# are in memory.
KERNELS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate",
           "embedding_dense_backward", "sort", "cumsum"}  # fmt: skip


def operator_name(node):
    """("aten", "mm") of a call of aten.mm.default; ("", "") of what is no operator of torch."""
    target = node.target
    return (target.namespace, target._opname) if isinstance(target, torch._ops.OpOverload) else ("", str(target))


def nbytes(value):
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def is_view(node):
    return node.target is operator.getitem or operator_name(node)[1] in VIEWS


def is_kernel(node):
    namespace, name = operator_name(node)
    own = namespace not in ("aten", "prims") or name in KERNELS or name.startswith("_scaled_dot_product")
    return node.op == "call_function" and not is_view(node) and own


def owner(node):
    """The node whose memory a view shows."""
    while node.op == "call_function" and is_view(node):
        source = node.args[0]
        if node.target is operator.getitem and not is_view(source):
            return node  # one of several outputs
        node = source
    return node


def peak(graph, owned=lambda node: False):
    """(bytes at the peak, bytes of what the graph returns) of one graph beyond its inputs. owned: whether an input is
    freed after its last use, such as a saved activation in the backward graph; it counts until then."""
    nodes = list(graph.graph.nodes)
    returned = {owner(n) for n in nodes[-1].all_input_nodes}
    buffers = set(returned)
    for node in nodes:
        if is_kernel(node):
            buffers |= {owner(n) for n in node.all_input_nodes}
            if isinstance(node.meta.get("val"), torch.Tensor):
                buffers.add(node)
        elif node.target is operator.getitem and owner(node) is node:
            buffers.add(node)
        elif node.op == "placeholder" or is_reduction(node):
            buffers.add(node)
    reads = {}  # node -> the buffers that computing it needs
    last = {}  # buffer -> index of the last node that needs it
    for i, node in enumerate(nodes):
        sources = set()
        for argument in node.all_input_nodes:
            argument_owner = owner(argument)
            sources |= {argument_owner} if argument_owner in buffers else reads[argument_owner]
        reads[node] = sources
        if node in buffers or is_kernel(node) or node.op == "output":
            last |= dict.fromkeys(sources, i)
    inputs = [n for n in nodes if n.op == "placeholder"]
    alive = {n for n in inputs if owned(n)}
    total = highest = sum(nbytes(n.meta.get("val")) for n in alive)
    for i, node in enumerate(nodes):
        dying = [n for n in reads[node] if last.get(n) == i and n in alive and n not in returned]
        if node in buffers and node.op != "placeholder":
            made = nbytes(node.meta.get("val"))
            in_place = not is_kernel(node) and any(nbytes(n.meta.get("val")) == made for n in dying)
            highest = max(highest, total + (0 if in_place else made))
            total += made
            alive.add(node)
        if node in buffers or is_kernel(node):
            for dead in dying:
                alive.remove(dead)
                total -= nbytes(dead.meta.get("val"))
        highest = max(highest, total)
    return highest, sum(nbytes(n.meta.get("val")) for n in returned if n.op != "placeholder")


def is_reduction(node):
    return operator_name(node)[1] in {"sum", "mean", "amax", "amin", "argmax", "var_mean", "prod", "any", "all", "linalg_vector_norm"}


def memory(step):
    """{phase: bytes at its peak}, what a run always holds included; "saved" is what the forward pass keeps."""
    static = sum(step.static.values())
    forward, saved = peak(step.graphs["forward"])
    backward, _ = peak(step.graphs["backward"], owned=lambda node: not node.name.startswith("primals"))
    optimizer = max((peak(g)[0] for name, g in step.graphs.items() if name.startswith(("adamw", "muon"))), default=0)
    scoring, logits = peak(step.graphs["evaluation"])
    without_gradients = static - step.static["gradients"]
    return {
        "static": static, "saved": saved, "forward": static + forward, "backward": static + backward,
        "optimizer": static + 2 * step.static["gradients"] + optimizer,  # Muon's stacks of parameters and gradients
        "evaluation": without_gradients + scoring + logits,  # the audit holds the logits of two passes
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help=f"device batches (default: {ROWS})")
    parser.add_argument("--attention", choices=["fa3", "flex", "sdpa"], default="fa3")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other hyperparameters of train.py")
    args = parser.parse_args()
    knobs = {name: ast.literal_eval(value) for name, _, value in (setting.partition("=") for setting in args.set)}
    train = gpu_train(**knobs)
    names = ["static", "saved", "forward", "backward", "optimizer", "evaluation"]
    print(f"{'rows':>5}", *(f"{name:>11}" for name in names), f"{'peak':>8}   MiB, {args.attention}, bfloat16")
    optimizer = 0
    for i, rows in enumerate(args.rows):
        found = memory(trace(train, rows, args.attention, optimizer_too=i == 0))
        found["optimizer"] = optimizer = found["optimizer"] if i == 0 else optimizer
        highest = max(found[name] for name in names)
        print(f"{rows:>5}", *(f"{found[name] / MIB:>11,.0f}" for name in names), f"{highest / MIB:>8,.0f}", flush=True)
        if rows == PUBLISHED_ROWS and not knobs:
            off = highest / MIB / PUBLISHED_MIB - 1
            note = f"a published run of this configuration, with other code, took {PUBLISHED_MIB:,} MiB"
            print(f"{'':>5} {note}: the computed peak is {off:+.1%}", flush=True)


if __name__ == "__main__":
    main()
