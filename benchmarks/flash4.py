"""Does flash-attn-4's compiler build the kernels that train.py would use, for GPUs that this machine does not have?

    uv run --with flash-attn-4==4.0.0b36 benchmarks/flash4.py
    uv run --with flash-attn-4==4.0.0b36 benchmarks/flash4.py --archs sm_90 --kv-heads 2

The package is installed for this command only. Its compiler runs on a CPU: the tensors are fake, the kernels are compiled
to machine code and not started. For each architecture, in a process of its own: the forward and backward kernels with a
sliding window (`flash_attn_func`, and torch's varlen_attn with it), and those of FlexAttention's back end FLASH, which
take the window as a mask with blocks. Prints seconds and what the compiler reserved: registers per thread and bytes of
stack (spills included), read with the cuobjdump that triton brings.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

B, T, D, WINDOW = 8, 2048, 128, 1024
SPARSE_BLOCKS = {"flex": (128, 128), "flex256": (256, 128)}  # queries, keys: of FlexAttention's block masks


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archs", nargs="+", default=["sm_80", "sm_90", "sm_100", "sm_120"])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4, help="key/value heads (default: 4)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.heads, args.kv_heads)
    print(f"{'':<8}{'call':<8}{'pass':<10}seconds   kernels: registers, bytes of stack", flush=True)
    for arch in args.archs:
        target = arch + "a" * (arch in ("sm_90", "sm_100", "sm_120"))  # with the instructions of this architecture only
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {"FLASH_ATTENTION_ARCH": arch, "CUTE_DSL_ARCH": target, "FLASH_ATTENTION_NUM_SMS": "132"}
            env |= {"CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": folder, "FLASH4_ARCH": arch}
            command = [
                sys.executable,
                __file__,
                "--child",
                "--heads",
                str(args.heads),
                "--kv-heads",
                str(args.kv_heads),
            ]
            done = subprocess.run(command, env=env, cwd=folder, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{arch:<8}{(done.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)


def child(heads, kv_heads):
    warnings.simplefilter("ignore")
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    began = time.process_time()
    from flash_attn.cute import interface
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    arch = os.environ["FLASH4_ARCH"]
    print(f"{arch:<8}{'import':<8}{'':<10}{time.process_time() - began:>7.1f}   (CPU seconds, after torch)", flush=True)

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda")

    def blocks(queries, keys, forward):
        """Of each block of queries its blocks of keys; for the backward pass the other way round."""
        rows, columns = (T // queries, T // keys) if forward else (T // keys, T // queries)
        count, index = tensor(1, 1, rows, dtype=torch.int32), tensor(1, 1, rows, columns, dtype=torch.int32)
        return BlockSparseTensorsTorch(count, index, count, index, block_size=(queries, keys))

    with FakeTensorMode():
        q, k, v = tensor(B, T, heads, D), tensor(B, T, kv_heads, D), tensor(B, T, kv_heads, D)
        lse = tensor(B, heads, T, dtype=torch.float32)
        for call in ("window", *SPARSE_BLOCKS):
            for name in ("forward", "backward"):
                if call == "window":
                    options = dict(causal=True, window_size_left=WINDOW, window_size_right=0)
                else:
                    sparse = blocks(*SPARSE_BLOCKS[call], name == "forward")
                    options = dict(mask_mod=window_mask(), block_sparse_tensors=sparse)
                began = time.perf_counter()
                try:
                    if name == "forward":
                        interface._flash_attn_fwd(q, k, v, return_lse=True, **options)
                    else:
                        interface._flash_attn_bwd(q, k, v, q, q, lse, **options)
                    text = resources()
                except Exception as error:  # refused, or the compiler failed
                    text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                print(f"{arch:<8}{call:<8}{name:<10}{time.perf_counter() - began:>7.1f}   {text}", flush=True)


def window_mask():
    """The mask of FlexAttention's windows, as the package takes it."""
    import cutlass.cute as cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def mask(b, h, q, kv, seqlen_info, aux_tensors):
        return (kv <= q) & (q - kv <= scalar_to_ssa(WINDOW, q.dtype))

    return mask


def resources():
    """'name registers, stack' of each kernel in the dump folder, which is emptied."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = []
    for path in sorted(Path(os.environ["CUTE_DSL_DUMP_DIR"]).rglob("*.cubin")):
        said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
        name = re.search(r"flash_(fwd|bwd_preprocess|bwd_postprocess|bwd)", path.name)
        use = re.search(r"REG:(\d+) STACK:(\d+)", said)
        path.unlink()  # the next call writes kernels with the same names
        found.append(f"{name[1] if name else path.name[:20]} {use[1]}, {use[2]}" if use else path.name)
    return "; ".join(found) or "compiled"


if __name__ == "__main__":
    main()
