"""The judgements of doctor: pure functions from what probes.py found to checks.

A check is {"name", "level", "text", "remedy"}. FAIL: a night cannot run, or would not be worth anything, before this is
mended. warn: it can run, but slower, or something will be missing.
"""

import re

from lab.machine import advice
from lab.store import names

OLDEST_PYTHON = (3, 10)
# Oldest NVIDIA driver (major version) that runs programs built for a CUDA major version, from the release notes of CUDA.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
NOISE_MB = 500  # a process that holds less GPU memory than this is a desktop's, and costs a training little
UNSEEN_MB = 1500  # in use without a visible process: more than a driver and a desktop need
BUSY_PERCENT = 20  # utilization of a GPU on which somebody computes
HOT = 87  # degrees Celsius: data-center GPUs slow down from about here
# Bits of NVML's clocks event reasons that slow a GPU down, from nvml.h. A GPU that is idle reports others.
SLOWED = {
    0x8: "hardware slowdown",
    0x20: "too hot (software limit)",
    0x40: "too hot (hardware limit)",
    0x80: "power brake",
}
FULL = 100 << 20  # bytes: with less, a folder for temporary files is of no use
SMALL_SHM = 32 << 20  # bytes; docker's default is 64 MiB
COMPILE_CACHE = 2 << 30  # bytes that compiled graphs and temporary files may take
AGENTS = ("claude", "codex")
SHOWN = 3  # files in a line


def ok(name, text):
    return {"name": name, "level": "ok", "text": text, "remedy": ""}


def warn(name, text, remedy):
    return {"name": name, "level": "warn", "text": text, "remedy": remedy}


def fail(name, text, remedy):
    return {"name": name, "level": "FAIL", "text": text, "remedy": remedy}


def gb(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# ---------------------------------------------------------------------------------------------------
# The machine and the checkout


def system(facts):
    text = f"{facts['system']} {facts['release']} ({facts['machine']}), {facts['cores']} cores"
    if facts["system"] == "Windows":
        return warn("system", text, "lab night, fleet and sandbox need Linux or macOS: use WSL for a night")
    return ok("system", text)


def python(version):
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return fail("python", version, f"{oldest} or newer is needed: call it by `uv run`, which fetches one")
    return ok("python", version)


def uv(found):
    if not found:
        return fail("uv", "not on PATH", "install it from https://docs.astral.sh/uv/: runs are started by `uv run`")
    return ok("uv", found)


def git(installed, answer):
    """answer: (exit status, output) of `git --version`."""
    if not installed:
        return fail("git", "not on PATH", "install git: the loop keeps and discards experiments with it")
    if answer[0] != 0:
        return fail("git", f"does not run ({first_line(answer[1])})", "reinstall git")
    return ok("git", answer[1].strip().removeprefix("git version "))


def identity(answer):
    """answer: (exit status, output) of `git var GIT_AUTHOR_IDENT`, which fails where a commit would."""
    if answer[0] != 0:
        return fail(
            "git identity", "git does not know who commits",
            "git config --global user.name NAME; git config --global user.email ADDRESS",
        )  # fmt: skip
    return ok("git identity", answer[1].partition(" <")[0])  # the address does not belong into a bug report


def signing(answer):
    """answer: (exit status, output) of `git config --type=bool commit.gpgsign`."""
    if answer[0] == 0 and answer[1].strip() == "true":
        return warn(
            "git signing", "commit.gpgsign is on: a commit of the agent may wait for a passphrase all night",
            "git config commit.gpgsign false, here; only `lab night` switches it off by itself",
        )  # fmt: skip
    return None


def checkout(inside, has_train, branch, changed):
    """inside: (exit status, output) of `git rev-parse --show-toplevel`; changed: files that differ from HEAD."""
    if inside[0] != 0:
        reason = first_line(inside[1])
        if "dubious ownership" in reason:
            return fail("checkout", reason, "git config --global --add safe.directory FOLDER")
        return fail("checkout", "this folder is not in a git checkout", "call it in your clone of autoresearch")
    if not has_train:
        return fail("checkout", "there is no train.py here", "call it in the root of your clone of autoresearch")
    where = f"on branch {branch}" if branch else "HEAD is detached"
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        return warn(
            "checkout",
            f"{where}; not committed: {', '.join(changed[:SHOWN])}{more}",
            "commit or undo this before the night",
        )
    return ok("checkout", where)


def tree_writable(writable):
    if not writable:
        return fail(
            "folder",
            "files cannot be created here",
            "train.py writes checkpoint.pt beside itself: use a folder of yours",
        )
    return None


# ---------------------------------------------------------------------------------------------------
# GPU


def number(text):
    """The float in a field of nvidia-smi; None for "[N/A]", "[Not Supported]" and the like."""
    found = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*\w*\s*", text or "")
    return float(found[1]) if found else None


def table(text, fields):
    """The rows of `nvidia-smi --query-...=FIELDS --format=csv,noheader,nounits` as dicts; other lines are left out."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def driver(smi, header, torch):
    """smi: (exit status, output) of nvidia-smi, None if there is no such program; header: its plain output."""
    if smi is None:
        return None
    if smi[0] != 0:
        reason = first_line(smi[1])
        if torch.get("available"):
            return warn(
                "driver", f"nvidia-smi fails ({reason})", "torch sees the GPU; memory and neighbours are not checked"
            )
        if "mismatch" in reason:
            remedy = "the driver was updated under a running system: reboot"
        else:
            remedy = (
                "reinstall the NVIDIA driver and reboot; in a container, start it with the GPU (docker run --gpus all)"
            )
        return fail("driver", f"nvidia-smi fails ({reason})", remedy)
    version, cuda = driver_versions(header)
    if version is None:
        return warn("driver", "nvidia-smi names no driver version", "look at the output of nvidia-smi")
    return ok("driver", f"NVIDIA {version}" + (f", for CUDA up to {cuda}" if cuda else ""))


def driver_versions(header):
    """(driver, newest CUDA that it supports) as nvidia-smi prints them; None for what it does not say."""
    version = re.search(r"(?:Driver|KMD) Version:\s*([\d.]+)", header)
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", header)
    return version and version[1], cuda and cuda[1]


def torch_build(torch, gpus, header, nvidia, amd, hidden):
    """Whether torch is usable, and uses the GPU that is there.

    gpus: rows of nvidia-smi; header: its plain output; nvidia, amd: whether the machine has a GPU of theirs; hidden: a
    variable's setting that hides the GPUs, or None."""
    if "error" in torch:
        return fail("torch", f"cannot be imported ({torch['error']})", "uv sync --reinstall-package torch")
    kind = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU build"
    text = f"{torch['version']} ({kind})"
    if torch["available"] or not (gpus or nvidia or amd):
        return ok("torch", text)
    if hidden:
        return warn("torch", f"{text}, no GPU is visible: {hidden}", "unset it to train on the GPU")
    if not gpus and not nvidia:
        if torch["hip"]:
            return fail(
                "torch",
                f"{text} sees no GPU ({torch['why']})",
                "look at rocminfo: user and groups (render, video), driver",
            )
        return warn(
            "torch",
            f"{text}, which cannot use the AMD GPU of this machine",
            "install PyTorch's ROCm build, see pytorch.org; then export UV_NO_SYNC=1",
        )
    name = gpus[0]["name"] if gpus else "the NVIDIA GPU of this machine"
    if not torch["cuda"]:
        return fail("torch", f"{text}, which cannot use {name}", "install PyTorch's CUDA build, see pytorch.org; then export UV_NO_SYNC=1")
    if not gpus:
        remedy = "install NVIDIA's driver; to train on the CPU on purpose, set CUDA_VISIBLE_DEVICES=-1"
        return fail("torch", f"{text} cannot use {name}: no driver answers", remedy)
    version, newest = driver_versions(header)
    if newest and int(float(newest)) < int(float(torch["cuda"])):
        oldest = OLDEST_DRIVER.get(int(float(torch["cuda"])))
        wanted = f"driver {oldest} or newer" if oldest else "a newer driver"
        return fail(
            "torch", f"{text}; driver {version} is too old for it: it runs CUDA up to {newest}", f"install {wanted}"
        )
    if gpus[0].get("compute_mode") == "Prohibited":
        return fail("torch", f"{text}, but the GPU's compute mode is Prohibited", "sudo nvidia-smi -c DEFAULT")
    if gpus[0].get("mig") == "Enabled":
        remedy = "make a slice (sudo nvidia-smi mig -cgi PROFILE -C), or switch MIG off (sudo nvidia-smi -mig 0)"
        return fail("torch", f"{text}, MIG is on and no slice can be used", remedy)
    return fail(
        "torch",
        f"{text} does not see {name} ({torch['why']})",
        "reboot; if that does not help, reinstall driver and torch",
    )


def gpu(torch, gpus, dataset):
    """Which device trains: a check, and the GPU's row of nvidia-smi (None if unknown)."""
    if torch.get("mps"):
        return ok("gpu", "Apple silicon: trains on mps, eager, float32"), None
    if not torch.get("available"):
        stdlib = "AUTORESEARCH_DATASET=stdlib suits it: small models, short rows, no download"
        remedy = "fine for a try" if dataset == "stdlib" else stdlib
        return warn("gpu", "none: training runs on the CPU", remedy), None
    first = torch["devices"][0]
    row = next((r for r in gpus if first["uuid"] and first["uuid"] in r["uuid"]), gpus[0] if len(gpus) == 1 else None)
    memory = f", {first['memory'] / 2**30:.0f} GiB" if first["memory"] else ""
    text = f"{first['name']}{memory}, capability {'.'.join(map(str, first['capability']))}"
    if torch["hip"]:
        text = f"{first['name']}{memory}, {first['arch']}"
    if (others := len(torch["devices"]) - 1) > 0:
        text += f"; {others} more, which `lab fleet launch TAG --slots {others + 1}` uses too"
    if not supported(torch, first):
        arch = first["arch"] if torch["hip"] else f"capability {'.'.join(map(str, first['capability']))}"
        return fail(
            "gpu", f"{text}; torch {torch['version']} has no code for {arch}", "install a torch that supports this GPU"
        ), row
    if torch["hip"]:
        return warn(
            "gpu", text, "this project was never run on an AMD GPU: read the lines above the first run's summary"
        ), row
    if tuple(first["capability"]) < (7, 0):
        return warn("gpu", text, "triton needs capability 7.0: training runs without torch.compile, slowly"), row
    if tuple(first["capability"]) < (8, 0):
        return warn("gpu", text, "no fast bfloat16: trains in float32, with half the rows in the same memory"), row
    return ok("gpu", text), row


def supported(torch, device):
    """Whether torch has code for the device: for its own architecture, an older one of the same generation, or in an
    intermediate form that the driver compiles."""
    if not torch["arch_list"]:
        return True
    if torch["hip"]:
        return device["arch"].partition(":")[0] in [name.partition(":")[0] for name in torch["arch_list"]]
    own = device["capability"][0] * 10 + device["capability"][1]
    built = [(kind, int(value)) for kind, value in re.findall(r"(sm|compute)_(\d+)", " ".join(torch["arch_list"]))]
    return any(value <= own and (kind == "compute" or value // 10 == own // 10) for kind, value in built)


def neighbours(row, apps, is_slice):
    """Who else uses the GPU of `row`: the check, and whether measurements would disturb or be disturbed.

    apps: rows of nvidia-smi's list of compute processes (gpu_uuid, pid, process_name, used_memory)."""
    if row is None or is_slice:  # a MIG slice is not shared
        return None, False
    used, total = number(row["memory.used"]), number(row["memory.total"])
    mine = [app for app in apps if app["gpu_uuid"] == row["uuid"]]
    large = [app for app in mine if (number(app["used_memory"]) or NOISE_MB) >= NOISE_MB]
    share = (
        f"{used / 1000:.1f} of {total / 1000:.1f} GB in use" if used is not None and total else "memory in use unknown"
    )
    if large:
        who = ", ".join(f"{app['process_name'].rpartition('/')[2]} (pid {app['pid']})" for app in large[:3])
        more = f" and {len(large) - 3} more" if len(large) > 3 else ""
        return warn(
            "gpu use", f"another process uses this GPU: {who}{more}, {share}",
            "end it before the night, which otherwise trains fewer tokens: results would not compare",
        ), True  # fmt: skip
    percent = number(row["utilization.gpu"]) or 0
    if (used or 0) - sum(number(app["used_memory"]) or 0 for app in mine) >= UNSEEN_MB or percent >= BUSY_PERCENT:
        return warn(
            "gpu use", f"another process uses this GPU, not visible from here: {share}, {percent:.0f} % busy",
            "find it on the host with nvidia-smi, and end it before the night",
        ), True  # fmt: skip
    return ok("gpu use", f"no other process; {share}"), False


def neighbours_on_rocm(device):
    """As `neighbours`, from the memory in use that torch reports."""
    if device["used"] is None:
        return None, False
    share = f"{gb(device['used'])} of {gb(device['memory'])} in use"
    if device["used"] >= UNSEEN_MB << 20:
        return warn(
            "gpu use", f"another process uses this GPU: {share}", "find it with rocm-smi, and end it before the night"
        ), True
    return ok("gpu use", f"no other process; {share}"), False


def limits(row, reasons):
    """Power and temperature limits in force. reasons: NVML's bits as text ("0x0000000000000004")."""
    if row is None:
        return None
    power, usual, heat = (number(row[name]) for name in ("power.limit", "power.default_limit", "temperature.gpu"))
    try:
        bits = int(reasons or "0", 16)
    except ValueError:
        bits = 0
    found = [word for bit, word in SLOWED.items() if bits & bit]
    if power and usual and power < 0.98 * usual:
        found.append(f"power limited to {power:.0f} of {usual:.0f} W")
    if heat and heat >= HOT:
        found.append(f"{heat:.0f} °C")
    if found:
        remedy = "improve the cooling, or keep the limit for the whole night: results under another one do not compare"
        return warn("gpu limits", ", ".join(found), remedy)
    known = [f"{power:.0f} W" if power else "", f"{heat:.0f} °C" if heat else ""]
    return ok("gpu limits", "none in force" + "".join(f", {text}" for text in known if text))


def mig(row, name):
    if "MIG" in name:
        return warn(
            "mig",
            f"trains on a slice ({name})",
            "MFU is printed as 0: no peak is known for a slice; slices of one size compare",
        )
    if row and row.get("mig") == "Enabled":
        return warn("mig", "on, but the whole GPU trains", "check CUDA_VISIBLE_DEVICES")
    return None


# ---------------------------------------------------------------------------------------------------
# torch and train.py


def triton(torch):
    if not torch.get("available") or "error" in torch:
        return None
    if torch["triton"]:
        return ok("triton", torch["triton"])
    return warn(
        "triton",
        f"cannot be imported ({torch['triton_error']})",
        "uv sync: without it training is eager, at a fraction of the speed",
    )


def compiler(torch, found, has_headers):
    """found: the C compiler that triton would use; has_headers: whether Python.h is there, which it includes."""
    if not torch.get("available"):
        return None
    if not found:
        return warn(
            "compiler",
            "no C compiler, which triton needs",
            "install gcc (Debian, Ubuntu: apt-get install gcc), or training is eager and slow",
        )
    if not has_headers:
        return warn(
            "compiler",
            f"{found}, but Python.h is missing",
            "install python3-dev, or use uv's own Python: uv python install",
        )
    return ok("compiler", found)


def dtype(train):
    if train.get("rewritten"):
        return warn(
            names.TRAIN, f"is not as doctor knows it ({train['error']})", "to examine this machine, call doctor on main"
        )
    if "error" in train:
        return fail(names.TRAIN, f"cannot be used ({train['error']})", "mend it, or git checkout -- train.py")
    return ok("dtype", f"{train['dtype']} ({train['dtype_why']})")


def compiled(train):
    if "error" in train:
        return None
    text = f"{'yes' if train['compile'] else 'no, eager'} ({train['compile_why']})"
    if train["device"] == "cuda" and not train["compile"]:
        return warn("compile", text, "eager training on a GPU reaches a fraction of its speed")
    return ok("compile", text)


def attention(train):
    """Which back end is used, and why not the others."""
    if "error" in train:
        return None
    others = "; ".join(f"{name}: {state}" for name, state in train["attentions"].items() if name != train["attention"])
    text = f"{train['attention']}{f' ({others})' if others else ''}"
    if train["device"] == "cuda" and train["attention"] == "sdpa":
        return warn("attention", text, "SDPA with a mask is slow: get torch.compile to work, for FlexAttention")
    if train["hopper"] and train["attention"] != "fa3":
        return warn(
            "attention",
            text,
            "FlashAttention-3 is faster on this GPU: `uv run prepare.py` puts it into the kernel cache",
        )
    return ok("attention", text)


# ---------------------------------------------------------------------------------------------------
# Data and disk


def data(dataset, root, prepared, command):
    """prepared: True, or a sentence that says what is wrong."""
    if prepared is True:
        return ok("data", f"{dataset}, prepared in {root}")
    if dataset == "stdlib":
        return ok("data", "stdlib, which the first run prepares in seconds")
    return fail(
        "data",
        prepared.partition(": run ")[0],
        f"{command} (downloads about 1 GB)" if dataset == "climbmix" else command,
    )


def cache(root, writable, is_prepared):
    if writable:
        return ok("cache", f"{root} is writable")
    if is_prepared:
        return warn(
            "cache",
            f"{root} is read-only",
            "compiled graphs go to a temporary folder: the first run after a reboot starts slowly",
        )
    return fail(
        "cache",
        f"{root} cannot be written, and the data are not prepared",
        "set AUTORESEARCH_CACHE to a folder of yours",
    )


def disk(free, params, cache_free):
    """free: bytes in the working tree's file system; params: of the model, or None; cache_free: bytes for the cache."""
    checkpoint = 4 * params if params else None  # float32
    night = checkpoint and advice.night_of_archives(checkpoint)
    text = f"{gb(free)} free here"
    if checkpoint:
        text += f"; a night of archives takes about {gb(night)} ({gb(checkpoint)} each)"
    if free < 3 * (checkpoint or 100_000_000):  # the new checkpoint, the old one, and a copy in runs/
        return fail("disk", text, "delete something: not even one run could save its model")
    if night and free < night:
        return warn("disk", text, "delete something, or remove old folders from runs/ during the night")
    if cache_free < COMPILE_CACHE:
        return warn("disk", f"{text}; {gb(cache_free)} free in the cache", "delete something: compiled graphs go there")
    return ok("disk", text)


def temporary(folder, free):
    if folder is None:
        return fail("temp", "no folder for temporary files can be written", "set TMPDIR to one")
    if free < FULL:
        return fail("temp", f"{gb(free)} free in {folder}", "delete something, or set TMPDIR to a folder with space")
    if free < COMPILE_CACHE:
        return warn(
            "temp", f"{gb(free)} free in {folder}", "torch.compile keeps files there: delete something, or set TMPDIR"
        )
    return ok("temp", f"{gb(free)} free in {folder}")


def shared_memory(is_there, writable, free):
    """/dev/shm of Linux: locks between processes, which torch.compile's workers and the preparation use, are in it."""
    if not is_there or not writable:
        return warn(
            "/dev/shm",
            "missing" if not is_there else "read-only",
            "mount it as tmpfs: torch.compile and prepare.py start processes that need it",
        )
    if free < SMALL_SHM:
        return warn("/dev/shm", f"{free / 2**20:.0f} MiB free", "make it larger (docker run --shm-size=1g)")
    return ok("/dev/shm", f"{free / 2**30:.1f} GiB free")


# ---------------------------------------------------------------------------------------------------
# Programs


def sandbox(found, answer):
    """answer: (exit status, output) of a bubblewrap that does nothing."""
    if not found:
        return warn(
            "bubblewrap",
            "not installed",
            "only `lab sandbox` needs it: apt-get install bubblewrap, dnf install bubblewrap",
        )
    if answer[0] != 0:
        return warn(
            "bubblewrap",
            f"does not work ({first_line(answer[1])})",
            "only `lab sandbox` needs it: allow unprivileged user namespaces",
        )
    return ok("bubblewrap", found)


def tmux(found):
    if not found:
        return warn("tmux", "not installed", "only `lab fleet` uses it, and prints the commands instead")
    return ok("tmux", found)


def agent(wanted, found):
    """found: {program: path} of those that are installed. wanted: the program of --agent, or None."""
    if wanted:
        if wanted not in found:
            return fail("agent", f"{wanted} is not on PATH", "install it, or name its full path")
        return ok("agent", found[wanted])
    if not found:
        return warn(
            "agent", f"neither {' nor '.join(AGENTS)} is on PATH", "install an agent; name another one with --agent"
        )
    return ok("agent", ", ".join(found.values()))


def load(cores, average):
    """For a machine that trains on its CPU."""
    if average is not None and average > max(0.5, cores / 2):
        return warn("cpu use", f"other programs keep {average:.1f} of {cores} cores busy", "end them before the night")
    return None


def first_line(text):
    return next((line.strip()[:200] for line in (text or "").splitlines() if line.strip()), "no message")
