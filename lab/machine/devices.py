"""What a night, or each slot of a fleet, trains on: a GPU (or a MIG slice of one), or a part of the cores on a machine
without GPUs.

Torch is not imported. The GPUs are counted from the variable that the user or the cluster has set, from nvidia-smi, or
from the kernel's device files.
"""

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lab.base.errors import Refused

PATIENCE = 60  # seconds that nvidia-smi may take: ten on a machine with many idle GPUs, no end with a broken driver
CUDA, ROCM = ["CUDA_VISIBLE_DEVICES"], ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]


def for_rocm():
    """Whether the installed torch is the ROCm build."""
    found = importlib.util.find_spec("torch")  # locates torch without importing it
    version = found and found.origin and Path(found.origin).with_name("version.py")
    return bool(version and version.is_file() and re.search(r"(?m)^hip\b[^=]*=\s*['\"]", version.read_text()))


def gpus():
    """(the variable that selects visible GPUs, their names in it, where they were counted). Without a GPU the names
    are []."""
    variables = ROCM if for_rocm() else CUDA
    variable = variables[0]
    for name in variables:  # a list set by the user or the cluster is divided further
        if name in os.environ:
            given = [part.strip() for part in os.environ[name].split(",") if part.strip()]
            return name, ([] if given == ["-1"] else given), f"{name}={os.environ[name]}"
    if variables is ROCM:
        nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
        count = sum(number(node) not in ("", "0") for node in nodes)
        return variable, [str(i) for i in range(count)], "/sys/class/kfd"
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=PATIENCE)
            if done.returncode == 0:
                return variable, listed(done.stdout), "nvidia-smi"
    return variable, [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))], "/dev"


def number(node):
    """The id of a GPU of AMD's; "" if a container or a job hides it, which the kernel answers with an error."""
    try:
        return node.read_text().strip()
    except OSError:
        return ""


def listed(text):
    """The names of the devices in the output of `nvidia-smi -L`: the GPU's number, or the UUIDs of its MIG slices."""
    found = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+): ", line):
            found.append((gpu[1], []))
        elif (piece := re.search(r"\(UUID: (MIG-[^)]+)\)", line)) and found:
            found[-1][1].append(piece[1])
    return [name for number, pieces in found for name in (pieces or [number])]


def one_of_several():
    """(environment that leaves the first GPU alone visible, a sentence that says so) if the machine has several and neither
    the user nor the cluster selected any; ({}, "") otherwise. It is the first each time, because a record compares
    results of the same device only."""
    variable, visible, source = gpus()
    if len(visible) < 2 or variable in os.environ:
        return {}, ""
    sentence = f"{len(visible)} GPUs ({source}): trainings use {variable}={visible[0]}; set it for another one, or use lab fleet for all"
    return {variable: visible[0]}, sentence


def cores():
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def shares(slots):
    """[(environment, its own cores or []) of each slot], and a sentence that says what was divided. Raises Refused if
    there are fewer GPUs than slots."""
    variable, visible, source = gpus()
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if apple:
        visible, source = ["the one"], "Apple silicon"
    if visible:
        if slots > len(visible):
            one = "one GPU" if len(visible) == 1 else f"{len(visible)} GPUs"
            raise Refused(f"{slots} slots and {one} ({source}): two trainings on one GPU would slow each other down. --slots {len(visible)}")  # fmt: skip
        return [
            ({} if apple else {variable: name}, []) for name in visible[:slots]
        ], f"{slots} of {len(visible)} GPUs ({source})"
    own = cores()
    each = len(own) // slots
    if not each:
        note = f"no GPU ({source}), and {slots} slots share {len(own)} cores: each slows the others down"
        return [({"OMP_NUM_THREADS": "1"}, [])] * slots, note
    parts = [own[i * each : (i + 1) * each] for i in range(slots)]
    return [({"OMP_NUM_THREADS": str(each)}, part) for part in parts], f"no GPU ({source}): {each} cores per slot"
