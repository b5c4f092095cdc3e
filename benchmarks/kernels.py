"""Do the kernels of a training step compile for a GPU that is not here? Inductor and Triton to machine code.

    uv run benchmarks/kernels.py                                  all architectures, FlashAttention-3's step and FlexAttention's
    uv run benchmarks/kernels.py --arch 90 --attention flex       one of them
    uv run benchmarks/kernels.py --arch 89 --attention flex --list      every kernel of it

memory.py's graphs (train.py's step on fake tensors) are moved to a device of that architecture, whose properties are
made up from the vendor's tables. Inductor generates its Triton kernels, Triton and its ptxas compile them, and cuobjdump
reads registers, stack (spills) and shared memory from the machine code. FlashAttention itself and matmuls are calls of
libraries, which nothing here tries. No kernel runs: a result says that it compiles and fits, not that it is right or
fast. Of the configurations that a run would choose between, the first is compiled (--configs all: every one).
Each combination runs in its own process. Exit status 1 if a kernel does not compile.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Compute capability: (a GPU that has it, multiprocessors, threads per multiprocessor, KB of shared memory per block).
# CUDA's programming guide, table of technical specifications: a block can have the multiprocessor's less 1 KB.
ARCHITECTURES = {80: ("A100", 108, 2048, 163), 89: ("RTX 4090", 128, 1536, 99), 90: ("H100", 132, 2048, 227), 100: ("B200", 148, 2048, 227)}
MOST_REGISTERS = 255  # per thread, on all of them


def load_memory():
    spec = importlib.util.spec_from_file_location("memory", Path(__file__).with_name("memory.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pretence(ExitStack):
    """Inside, torch, Inductor and Triton take this machine for one with a GPU of that architecture, and code is generated
    but not loaded: `codes` has the source of each graph."""

    def __init__(self, arch):
        super().__init__()
        self.arch, self.codes = arch, []

    def put(self, name, value):
        self.enter_context(mock.patch(name, value))

    def __enter__(self):
        import torch
        import torch.utils._triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        super().__enter__()
        arch, capability = self.arch, divmod(self.arch, 10)
        name, processors, threads, shared_kb = ARCHITECTURES[arch]
        properties = SimpleNamespace(
            name=name, major=capability[0], minor=capability[1], multi_processor_count=processors, warp_size=32,
            regs_per_multiprocessor=2**16, max_threads_per_multi_processor=threads, max_threads_per_block=1024,
            total_memory=80 << 30, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=shared_kb << 10,
            shared_memory_per_multiprocessor=(shared_kb + 1) << 10, L2_cache_size=40 << 20, gcnArchName="",
        )  # fmt: skip

        class Driver:
            """What Triton asks of its driver to compile."""

            utils = property(lambda self: self)

            def get_current_target(self):
                return GPUTarget("cuda", arch, 32)

            def get_current_device(self):
                return 0

            def get_active_torch_device(self):
                return torch.device("cuda:0")

            def get_device_interface(self):
                return torch.cuda

            def get_device_properties(self, device=None):
                return {"max_shared_mem": shared_kb << 10, "max_num_regs": 2**16, "multiprocessor_count": processors, "warpSize": 32}

        driver.set_active(Driver())
        for function, value in {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties, "synchronize": None,
            "get_device_capability": capability, "get_device_name": name, "_lazy_init": None, "is_initialized": False,
            "get_rng_state": torch.empty(0, dtype=torch.uint8), "set_rng_state": None, "_exchange_device": 0,
            "_maybe_exchange_device": 0, "set_device": None,
        }.items():  # fmt: skip
            self.put(f"torch.cuda.{function}", lambda *args, value=value: value)
        for function, value in {
            "Worker.get_device_properties": properties, "get_device_properties": properties, "is_available": True, "current_device": 0,
            "device_count": 1, "get_compute_capability": arch, "is_triton_capable": True, "raise_if_triton_unavailable": None,
        }.items():  # fmt: skip
            self.put(f"torch._dynamo.device_interface.CudaInterface.{function}", staticmethod(lambda *args, value=value: value))
        self.put("torch._dynamo.utils.preserve_rng_state", nullcontext)
        heuristics = "torch._inductor.runtime.triton_heuristics"
        self.put(f"{heuristics}.triton_helpers.set_driver_to_gpu", lambda: None)
        self.put(f"{heuristics}.StaticTritonCompileResult.can_statically_launch", staticmethod(lambda *args: None))

        def keep(graph):
            self.codes.append(graph.codegen()[0].value)
            raise Generated

        self.put("torch._inductor.graph.GraphLowering._compile_to_module", keep)
        for function in vars(torch.utils._triton).values():  # what was found out before
            if hasattr(function, "cache_clear"):
                function.cache_clear()
        return self


class Generated(Exception):
    """Ends a compilation once its code is generated."""


def generate(pretence, graph, name):
    """Generates the code of a graph of memory.trace for the GPU; changes the graph."""
    import torch
    from torch._inductor import compile_fx
    from torch.utils._pytree import tree_map

    def device(value):
        return torch.device("cuda:0") if isinstance(value, torch.device) else value

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")

    nodes = list(graph.graph.nodes)
    mode = next(v.fake_mode for n in nodes if isinstance(v := n.meta.get("val"), torch.Tensor))
    with mode:
        for node in nodes:
            node.args = torch.fx.node.map_aggregate(node.args, device)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, device)
            if "val" in node.meta:
                node.meta["val"] = tree_map(move, node.meta["val"])
        inputs = [node.meta["val"] for node in nodes if node.op == "placeholder"]
    graph.recompile()
    before = len(pretence.codes)
    try:
        with mode, torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1):
            kwargs = {"is_backward": name == "backward", "is_inference": name == "evaluation"}
            compile_fx.compile_fx_inner(graph, inputs, **kwargs)
    except Exception:  # of any kind: loading the generated code needs a driver. What counts is that it was generated
        if len(pretence.codes) == before:
            raise


def compiled(pretence, every_configuration):
    """[{"kernel", "registers", "stack", "shared", "warps"} or {"kernel", "failed"}] of all generated kernels."""
    import triton
    from torch._inductor.codecache import PyCodeCache

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    pattern = r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''"
    sources = {source: name for code in pretence.codes for name, source in re.findall(pattern, code, re.MULTILINE | re.DOTALL)}
    found = []
    for source, name in sources.items():
        kernel = getattr(PyCodeCache.load(source), name)
        for config in kernel.configs if every_configuration else kernel.configs[:1]:
            try:
                binary = kernel._precompile_config(config).kernel
            except Exception as error:
                found.append({"kernel": name, "failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
                continue
            with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
                f.write(binary.asm["cubin"])
                f.flush()
                usage = subprocess.run([cuobjdump, "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
            used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
            found.append({
                "kernel": name, "registers": used["REG"], "stack": max(used["STACK"], used["LOCAL"]),
                "shared": binary.metadata.shared, "warps": config.num_warps,
            })  # fmt: skip
    return found


def measure(args, attention):
    """Traces the step once and prints, for each architecture, a line `RESULT {json}` from a fork of this process."""
    memory = load_memory()
    train = memory.gpu_train(DEPTH=args.depth, MODEL_DIM=512)
    step = memory.trace(train, args.rows, attention, optimizer_too=attention == "fa3")
    broken = False
    for arch in args.arch:
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            try:
                began = time.process_time()
                with Pretence(arch) as pretence:
                    for name, graph in step.graphs.items():
                        generate(pretence, graph, name)
                    kernels = compiled(pretence, args.configs == "all")
                seconds = round(time.process_time() - began)
                found = {"arch": arch, "attention": attention, "kernels": kernels, "graphs": list(step.graphs), "seconds": seconds}
                print("RESULT " + json.dumps(found), flush=True)
                os._exit(0)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                print(f"{arch}, {attention}: stopped before any kernel: {reason[:300]}", flush=True)
                os._exit(1)
        broken |= os.waitpid(pid, 0)[1] != 0
    return int(broken)


def show(result, header, every):
    name, _, _, shared_kb = ARCHITECTURES[result["arch"]]
    good = [k for k in result["kernels"] if "failed" not in k]
    failed = [k for k in result["kernels"] if "failed" in k]
    if header:
        print("| architecture | step with | kernels | failed | most registers | kernels with spills | largest stack | most shared memory |")
        print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {result['arch']} ({name}) | {result['attention']} | {len(result['kernels'])} | {len(failed)}"
        f" | {max(k['registers'] for k in good)} of {MOST_REGISTERS} | {sum(k['stack'] > 0 for k in good)}"
        f" | {max(k['stack'] for k in good)} B | {max(k['shared'] for k in good) / 1024:.1f} of {shared_kb} KB |", flush=True,
    )  # fmt: skip
    for kernel in sorted(good, key=lambda k: (-k["stack"], -k["shared"])) if every else []:
        print(f"    {kernel['registers']:>3} registers {kernel['stack']:>5} B stack {kernel['shared']:>7} B shared  {kernel['kernel']}")
    for kernel, count in Counter((k["kernel"], k["failed"]) for k in failed).items():
        print(f"    {kernel[0]}: {kernel[1]} ({count} configurations)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--attention", nargs="+", choices=["fa3", "flex"], default=["fa3", "flex"])
    parser.add_argument("--depth", type=int, default=2, help="layers (default: 2, one with a window)")
    parser.add_argument("--rows", type=int, default=8, help="rows per micro-batch (default: 8)")
    parser.add_argument("--configs", choices=["first", "all"], default="first", help="configurations of a kernel to compile")
    parser.add_argument("--list", action="store_true", help="print every kernel")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measure(args, args.child)
    header, broken = True, False
    for attention in args.attention:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", attention]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                if not line.startswith("RESULT "):
                    print(line, end="", flush=True)
                    continue
                result = json.loads(line.removeprefix("RESULT "))
                show(result, header, args.list)
                header, broken = False, broken or any("failed" in k for k in result["kernels"])
        broken |= child.returncode != 0
    if broken:
        raise SystemExit("not every kernel compiles")


if __name__ == "__main__":
    sys.exit(main())
