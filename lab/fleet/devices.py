"""What each slot of a fleet trains on: a GPU (or a MIG slice of one), or a share of the cores of a machine without.

Torch is not imported: the count comes from the user's or the cluster's own setting, from nvidia-smi, or from the
devices that the kernel shows.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lab.base.errors import Refused

CUDA, ROCM = ["CUDA_VISIBLE_DEVICES"], ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]

def for_rocm():
    """Whether the installed torch is ROCm's build."""
    found = importlib.util.find_spec("torch")  # finds it and does not import it
    version = found and found.origin and Path(found.origin).with_name("version.py")
    return bool(version and version.is_file() and re.search(r"(?m)^hip\b[^=]*=\s*['\"]", version.read_text()))


def gpus():
    """(the variable that makes GPUs visible, their names in it, where they were counted). The names are [] where
    there is no GPU."""
    variables = ROCM if for_rocm() else CUDA
    variable = variables[0]
    for name in variables:  # what the user or the cluster gave is divided further
        if name in os.environ:
            given = [part.strip() for part in os.environ[name].split(",") if part.strip()]
            return name, ([] if given == ["-1"] else given), f"{name}={os.environ[name]}"
    if variables is ROCM:
        nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
        count = sum(node.read_text().strip() not in ("", "0") for node in nodes)
        return variable, [str(i) for i in range(count)], "/sys/class/kfd"
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if done.returncode == 0:
            return variable, listed(done.stdout), "nvidia-smi"
    return variable, [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))], "/dev"


def listed(text):
    """The names of what `nvidia-smi -L` lists: numbers of GPUs; where a GPU is cut into MIG slices, those."""
    found = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+): ", line):
            found.append((gpu[1], []))
        elif (piece := re.search(r"\(UUID: (MIG-[^)]+)\)", line)) and found:
            found[-1][1].append(piece[1])
    return [name for number, pieces in found for name in (pieces or [number])]


def cores():
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def shares(slots):
    """For each slot (environment, its own cores or []), and a sentence on what was divided; a refusal where there
    are fewer GPUs."""
    variable, visible, source = gpus()
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if apple:
        visible, source = ["the one"], "Apple silicon"
    if visible:
        if slots > len(visible):
            one = "one GPU" if len(visible) == 1 else f"{len(visible)} GPUs"
            raise Refused(f"{slots} slots and {one} ({source}): two trainings on one GPU measure each other. --slots {len(visible)}")  # fmt: skip
        return [
            ({} if apple else {variable: name}, []) for name in visible[:slots]
        ], f"{slots} of {len(visible)} GPUs ({source})"
    own = cores()
    each = len(own) // slots
    if not each:
        note = f"no GPU ({source}), and {slots} slots share {len(own)} cores: each disturbs the others' results"
        return [({"OMP_NUM_THREADS": "1"}, [])] * slots, note
    parts = [own[i * each : (i + 1) * each] for i in range(slots)]
    return [({"OMP_NUM_THREADS": str(each)}, part) for part in parts], f"no GPU ({source}): {each} cores a slot"
