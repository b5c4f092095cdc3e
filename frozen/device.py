"""The device of a run: which one, its name, its peak speed, and FlashAttention-3, which only Hopper can use.

torch is imported inside the functions: `uv run prepare.py` does not need it.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
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
# Named as a branch and not as `version`: only for a branch the cache keeps which commit it was.
FA3_KERNEL = {"repo_id": "kernels-community/flash-attn3", "revision": "v1"}


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


def several_gpus():
    """A sentence if tensors of this process have been on more than one GPU, else None."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    counts = "allocation.all.allocated", "allocated_bytes.all.peak"  # the second one with cudaMallocAsync, too
    stats = [torch.cuda.memory_stats(i) for i in range(torch.cuda.device_count())]  # starts nothing on an unused GPU
    used = [i for i, each in enumerate(stats) if any(each.get(name) for name in counts)]
    if len(used) < 2:
        return None
    return f"this run used GPUs {used}: a run has one, so that results compare: keep all tensors on clock.device"


def compiled_graphs():
    """Number of graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # if it is not loaded, nothing was compiled
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def mfu_percent(device_name, flops_per_token, tokens, seconds):
    """Model FLOPs utilisation in per cent of the device's peak; 0.0 for a device that is not in PEAK_TFLOPS."""
    peaks = [peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}(?!\w|.* MIG)", device_name)]
    return 100 * flops_per_token * tokens / (seconds * peaks[0] * 1e12) if peaks and seconds > 0 else 0.0


def kernel_cache():
    """The folder of downloaded kernels, as `kernels` and huggingface_hub choose it, without loading them."""
    get = os.environ.get
    home = get("HF_HOME") or os.path.join(get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    path = get("KERNELS_CACHE") or get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(path)).expanduser()


def fa3_kernel():
    """FlashAttention-3 as prepare.py downloaded it. Does not use the network; any exception means that it is not there.

    kernels.get_kernel cannot do this: offline it takes a download for incomplete that lacks the builds for other
    versions of torch and CUDA, and online it downloads only one build."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when kernels is imported: nothing there waits for a network
    from kernels import get_kernel, get_local_kernel

    name = FA3_KERNEL["repo_id"]
    if f"{name}=" in os.environ.get("LOCAL_KERNELS", ""):
        return get_kernel(**FA3_KERNEL)
    refs = sorted(kernel_cache().glob(f"*--{name.replace('/', '--')}/refs/{FA3_KERNEL['revision']}"))
    if not refs:
        raise FileNotFoundError(f"{name} is not in {kernel_cache()}: run prepare.py on this machine, with a network")
    # A download that was cut off has noted its commit already. An older one that is whole still works.
    noted, error = refs[0].read_text(encoding="utf-8").strip(), None
    found = (refs[0].parents[1] / "snapshots").iterdir()
    for snapshot in sorted(found, key=lambda path: (path.name != noted, -path.stat().st_mtime)):
        try:
            return get_local_kernel(snapshot)
        except Exception as e:
            error = error or e
    raise error or FileNotFoundError(f"{refs[0]} names a download that is not there: run prepare.py with a network")


def fetch_attention_kernel():
    """Downloads FlashAttention-3 into the Hugging Face cache if the GPU is a Hopper, and loads it as a run will. A
    failure is only printed: train.py then uses another attention and prints that."""
    if not shutil.which("nvidia-smi"):
        return
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return
    failure = None
    try:
        from kernels import install_kernel

        install_kernel(**FA3_KERNEL)
    except Exception as e:  # no network, or no build for this torch: an earlier download may still do
        failure = one_line(e)
    if (why := fa3_in_a_run()) is None:
        print(f"FlashAttention-3 is available ({FA3_KERNEL['repo_id']})")
    elif why.startswith("SystemExit"):
        print(f"FlashAttention-3: a run that loads it would be refused: {why.partition(': ')[2]}", file=sys.stderr)
    else:
        print(f"FlashAttention-3 cannot be loaded ({failure or why}): training uses FlexAttention", file=sys.stderr)


# As a run loads it: without a network, and reading no more than a run may.
LOAD_FA3 = """
from frozen import device, guard
guard.forbid("train.py")
try:
    device.fa3_kernel()
except BaseException as e:
    print(f"{type(e).__name__}: {device.one_line(e)}")
    raise SystemExit(1)
"""


def fa3_in_a_run():
    """None if a process of its own can load FlashAttention-3 as a run does; else one line that says why not."""
    env, root = {**os.environ, "HF_HUB_OFFLINE": "1"}, Path(__file__).resolve().parent.parent
    child = subprocess.run([sys.executable, "-c", LOAD_FA3], cwd=root, env=env, stdin=subprocess.DEVNULL,
                           capture_output=True, encoding="utf-8", errors="replace")  # fmt: skip
    return None if child.returncode == 0 else (child.stdout.splitlines() or [f"exit status {child.returncode}"])[-1]
