"""The device of a run: which one, its name, its peak speed, and FlashAttention-3, which only Hopper can use.

torch is imported inside the functions: `uv run prepare.py` does not need it.
"""

import ctypes
import platform
import re
import shutil
import sys
from pathlib import Path

from corpus.system import one_line, usable_cores

CPUINFO = Path("/proc/cpuinfo")
# Dense bf16 TFLOP/s with float32 accumulation, from the vendors' datasheets. The first name that matches counts.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989.5, "H200 NVL": 835.5, "H200": 989.5, "H100 NVL": 835.5,
    "H100 PCIe": 756.5, "H100": 989.5, "A100": 312, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125, "L40S": 362,
    "L40": 181, "L4": 121, "RTX A6000": 154.8, "RTX 6000 Ada": 364.2, "RTX 5090$": 209.5, "RTX 4090$": 165.2,
    "RTX 4080$": 97.5, "RTX 3090$": 71, "MI325X": 1307.4, "MI300X": 1307.4, "MI250X": 191.5, "MI210": 181,
}  # fmt: skip
# FlashAttention-3, at a version whose interface its publisher keeps stable. prepare.py downloads it, a run never does.
FA3_KERNEL = {"repo_id": "kernels-community/flash-attn3", "version": 1}


def pick_device():
    """(torch.device, name) of the device that a run trains on: a GPU (ROCm calls itself cuda too), mps, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    cpuinfo = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    name = f"{model[1] if model else platform.processor() or platform.machine()}, {usable_cores()} cores"
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu"), name


def synchronize(device):
    """Waits until the device has finished all queued work."""
    import torch

    getattr(torch, device.type).synchronize()


def keep_freed_memory():
    """Makes glibc keep freed memory for the next allocation instead of returning it to the system.

    It would return every large tensor, so a training step on a CPU would take thousands of page faults to get the
    memory back: 8 % of its CPU time (benchmarks/README.md). Other C libraries are left as they are."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # parameters in malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)  # bytes at the end of the heap that are not returned
        if not libc.mallopt(mmap_threshold, 2**30):  # larger blocks get pages of their own, which free returns
            libc.mallopt(mmap_threshold, 2**25)  # the most that older versions accept


def is_out_of_memory(error):
    """Whether a smaller batch may help against an exception; not all back ends raise torch.OutOfMemoryError."""
    import torch

    signs = ("out of memory", "alloc_failed", "not enough memory", "can't allocate memory")
    found = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in signs)
    return found and "out of resource" not in str(error)  # of shared memory: a smaller batch does not help


def peak_memory_mb(device):
    """Largest memory allocated by tensors so far; 0.0 except on CUDA, as the others do not count it."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0


def compiled_graphs():
    """Number of graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # if it is not loaded, nothing was compiled
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def mfu_percent(device_name, flops_per_token, tokens, seconds):
    """Model FLOPs utilisation in per cent of the device's peak; 0.0 for a device that is not in PEAK_TFLOPS."""
    peaks = [peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}(?!\w|.* MIG)", device_name)]
    return 100 * flops_per_token * tokens / (seconds * peaks[0] * 1e12) if peaks and seconds > 0 else 0.0


def fetch_attention_kernel():
    """Downloads FlashAttention-3 into the Hugging Face cache if the GPU is a Hopper. A failure is only printed:
    train.py then uses another attention and prints that."""
    if not shutil.which("nvidia-smi"):
        return
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        try:
            from kernels import get_kernel

            get_kernel(**FA3_KERNEL)
            print(f"FlashAttention-3 is available ({FA3_KERNEL['repo_id']})")
        except Exception as e:  # a kernel is a download, a build and an import: all three can fail in many ways
            print(f"FlashAttention-3 cannot be loaded ({one_line(e)}): training uses FlexAttention", file=sys.stderr)
