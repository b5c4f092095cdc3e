"""lab doctor: the right line, remedy and exit status for machines that are described, not there; and for this one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, left_out
from test_run import TINY, set_knob

import train
from frozen.process import lock_folder
from lab.machine import advice, checks, doctor, measurements, probes
from lab.machine.diagnosis import APP_FIELDS, ATTENTION_ERROR, MEASURED, diagnose

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
HEADER = """
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver}              Driver Version: {driver}      CUDA Version: {cuda}     |
+-----------------------------------------------------------------------------------------+
"""
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "memory": 85_017_493_504}
RTX4090 = {"name": "NVIDIA GeForce RTX 4090", "capability": [8, 9], "memory": 25_251_020_800}
T4 = {"name": "Tesla T4", "capability": [7, 5], "memory": 15_655_829_504}
MI300X = {
    "name": "AMD Instinct MI300X",
    "capability": [9, 4],
    "memory": 206_141_652_992,
    "arch": "gfx942:sramecc+:xnack-",
}


def torch_facts(*gpus, **others):
    devices = [{"uuid": f"{i:08d}-aaaa", "arch": "", "used": None} | gpu for i, gpu in enumerate(gpus)]
    facts = {
        "version": "2.15.0", "cuda": "13.0", "hip": None, "available": bool(gpus), "why": "torch gives no reason", "mps": False,
        "arch_list": ARCHITECTURES, "devices": devices, "triton": "3.7.0", "triton_error": None,
    }  # fmt: skip
    return facts | others


def train_facts(**others):
    facts = {
        "device": "cuda", "dtype": "bfloat16", "dtype_why": "CUDA capability 8.9", "compile": True, "compile_why": "triton",
        "hopper": False, "attention": "flex", "attention_why": "FA3 not used", "params": 50_332_176, "flops_per_token": 239e6,
        "attentions": {"fa3": "needs a Hopper GPU", "flex": "loaded", "sdpa": "loaded"}, "DEPTH": 8, "TOTAL_BATCH_SIZE": 2**19,
        "DEVICE_BATCH_SIZE": 128, "WINDOW_PATTERN": "SSSL", "MAX_SEQ_LEN": 2048,
    }  # fmt: skip
    return facts | others


CPU_TRAIN = train_facts(
    device="cpu", dtype="float32", compile=False, compile_why="COMPILE is off", attention="sdpa", attentions={"sdpa": "loaded"},
    params=11_500_000, DEPTH=4, TOTAL_BATCH_SIZE=2**11, DEVICE_BATCH_SIZE=1, WINDOW_PATTERN="L",
)  # fmt: skip
MEASURES = {
    "setup": {
        "seconds": 70.0, "device_batch": 32, "attention": "flex", "compiled": True, "graphs": 9, "device_name": "NVIDIA GPU",
    },
    "training": {
        "seconds": 20.0, "steps": 12, "tokens": 12 * 2**19, "tokens_per_second": 310_000.0, "step_ms": 1690.0,
        "mfu_percent": 44.9, "peak_memory_mb": 12_000.0, "late_graphs": 0,
    },
    "evaluation": {"seconds": 20.0},
    "attention": {"flex": {"error": 0.004, "ms": 2.0}, "sdpa": {"error": 0.004, "ms": 9.0}},
    "compiled": {"compiled": [9.0, 3.0], "eager": [9.0, 3.0], "loss_difference": 0.1, "gradient_difference": 0.01},
}  # fmt: skip


class Described(probes.Machine):
    """A machine of which everything is described: by default Linux, all programs there, an ample disk, no GPU."""

    def __init__(self, torch=None, train=None, driver="580.65.06", cuda="13.0", smi=None, apps=(), bits="0x0", **row):
        super().__init__(ROOT)
        self.torch, self.train = torch or torch_facts(), train or (train_facts() if torch else CPU_TRAIN)
        self.driver, self.cuda, self.apps, self.bits, self.row = driver, cuda, apps, bits, row
        self.smi = bool(torch and torch["cuda"] and torch["devices"]) if smi is None else smi
        self.gpus = [dict(d) for d in self.torch["devices"]] if "error" not in self.torch else []
        self.missing, self.variables, self.running, self.nvidia, self.amd = set(), {}, False, self.smi, False
        self.space, self.denied, self.results, self.measured = 500e9, set(), MEASURES, []
        self.answers, self.temp = {}, Path("/tmp")

    def system(self):
        return {"system": "Linux", "release": "6.1", "machine": "x86_64", "python": "3.11.7", "cores": 16, "load": 0.1}

    def environ(self, name):
        return self.variables.get(name)

    def which(self, program):
        if program in self.missing or (program == "nvidia-smi" and not self.smi):
            return None
        return f"/usr/bin/{program}"

    def exists(self, path):
        return str(path) not in self.missing

    def output(self, *command):
        if command in self.answers:
            return self.answers[command]
        if command[0] == "nvidia-smi":
            return 0, self.nvidia_smi(*command[1:])
        return 0, {
            "--version": "git version 2.39.5",
            "symbolic-ref": "autoresearch/nov21",
            "var": "A Person <a@b.c> 1 +0000",
        }.get(command[1], "")

    def nvidia_smi(self, query="", *_):
        if not query:
            return HEADER.format(driver=self.driver, cuda=self.cuda)
        kind, _, names = query.removeprefix("--query-").partition("=")
        if kind == "compute-apps":
            assert names.split(",") == list(APP_FIELDS)
            return "\n".join(", ".join(app) for app in self.apps)
        defaults = {
            "memory.used": "450", "utilization.gpu": "0", "temperature.gpu": "41", "power.limit": "400.00",
            "power.default_limit": "400.00", "compute_mode": "Default", "mig.mode.current": "Disabled",
            "clocks_event_reasons.active": self.bits,
        }  # fmt: skip
        rows = [
            defaults | {"index": str(i), "uuid": f"GPU-{i:08d}-aaaa", "name": gpu["name"]}
            | {"memory.total": str(gpu["memory"] >> 20)} | self.row
            for i, gpu in enumerate(self.gpus)
        ]  # fmt: skip
        return "\n".join(", ".join(row[name] for name in names.split(",")) for row in rows)

    def nvidia_hardware(self):
        return self.nvidia

    def amd_hardware(self):
        return self.amd

    def in_progress(self):
        return self.running

    def writable(self, path):
        return not any(Path(path).is_relative_to(place) for place in self.denied)

    def free(self, path):
        return self.space

    def temporary_folder(self):
        return self.temp

    def facts(self, touch_gpu):
        self.touched = touch_gpu
        return {"torch": self.torch, "train": self.train}

    def measure(self, stages, seconds, limit, cache):
        assert Path(cache).is_dir() and Path(cache) != ROOT
        self.measured.append(stages)
        found = {stage: dict(self.results[stage]) for stage in stages}
        if len(self.measured) > 1:
            found["setup"]["seconds"] = 25.0  # from the compile cache
        return found


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    """The data are prepared, in tmp_path."""
    import corpus.layout

    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(corpus.layout, "load_manifest", lambda: {})
    return tmp_path


def examine(machine, **options):
    """(the diagnosis, {name: the line as it is printed}); each check is also said once, in order."""
    said = []
    found = diagnose(machine, say=said.append, **options)
    assert said == found["checks"] and found["can_run"] == all(check["level"] != "FAIL" for check in said)
    for check in said:
        assert set(check) == {"name", "level", "text", "remedy"} and check["level"] in ("ok", "warn", "FAIL")
        assert check["text"] and (check["remedy"] or check["level"] == "ok"), check
        assert "\n" not in doctor.line(check) and "Traceback" not in check["text"]
        assert "could not be checked" not in check["text"], check
    assert set(MEASURED) <= found["measured"].keys()
    json.dumps(found, allow_nan=False)
    return found, {check["name"]: doctor.line(check) for check in said}


# ---------------------------------------------------------------------------------------------------
# GPUs


def test_a_4090_is_ready_and_gets_its_numbers_and_advice(prepared):
    machine = Described(torch_facts(RTX4090))
    found, lines = examine(machine)
    assert found["can_run"] and found["verdict"].startswith("a night can run here")
    assert lines["driver"] == "ok    driver       NVIDIA 580.65.06, for CUDA up to 13.0"
    assert "RTX 4090, 24 GiB, capability 8.9" in lines["gpu"] and lines["gpu"].startswith("ok")
    assert (
        lines["gpu use"].startswith("ok") and lines["gpu limits"].startswith("ok") and lines["triton"].startswith("ok")
    )
    assert machine.measured == [["setup", "training", "evaluation"], ["setup", "attention", "compiled"]]
    measured = found["measured"]
    assert (measured["setup_cold_seconds"], measured["setup_warm_seconds"], measured["device_batch"]) == (70, 25, 32)
    assert (
        measured["tokens_per_second"] == 310_000
        and measured["attention_flex_ms"] == 2
        and measured["mfu_percent"] == 44.9
    )
    assert measured["experiments_a_night"] == 8 * 3600 // (300 + 25 + 20 + 42)
    assert found["advice"] == {"DEVICE_BATCH_SIZE": 32, "TOTAL_BATCH_SIZE": 2**17}, "177 steps in five minutes are few"
    assert "310,000 tokens/s" in lines["training"] and "44.9 %" in lines["training"]


def test_an_h100_with_a_neighbour_is_not_measured(prepared):
    gpu = torch_facts(H100)
    app = ("GPU-00000000-aaaa", "4711", "/opt/venv/bin/python3", "30210")
    machine = Described(gpu, train_facts(hopper=True, attention="fa3"), apps=[app], **{"memory.used": "30690"})
    found, lines = examine(machine)
    assert found["can_run"], "it can run; that its results suffer is said"
    assert lines["gpu use"].startswith("warn") and "python3 (pid 4711), 30.7 of 81.1 GB in use" in lines["gpu use"]
    assert (
        not machine.measured
        and "another process uses the GPU" in lines["measured"]
        and found["measured"]["step_ms"] is None
    )
    assert lines["attention"].startswith("ok")
    own_desktop = Described(gpu, apps=[("GPU-00000000-aaaa", "12", "/usr/bin/kwin", "120")])
    assert examine(own_desktop)[1]["gpu use"].startswith("ok") and own_desktop.measured
    elsewhere = Described(gpu, apps=[("GPU-00000001-bbbb", "12", "python", "30210")])
    assert examine(elsewhere)[1]["gpu use"].startswith("ok"), "another GPU's process"
    unseen = examine(Described(gpu, **{"memory.used": "9000", "utilization.gpu": "97"}))[1]  # from inside a container
    assert (
        unseen["gpu use"].startswith("warn")
        and "not visible from here: 9.0 of 81.1 GB in use, 97 % busy" in unseen["gpu use"]
    )


def test_a_hopper_without_its_kernel_is_told_how_to_get_it(prepared):
    train = train_facts(
        hopper=True, attentions={"fa3": "LocalEntryNotFoundError: not cached", "flex": "loaded", "sdpa": "loaded"}
    )
    lines = examine(Described(torch_facts(H100), train))[1]
    assert lines["attention"].startswith("warn  attention    flex (fa3: LocalEntryNotFoundError")
    assert "uv run prepare.py" in lines["attention"]


def test_a_t4_trains_in_float32_with_fewer_rows(prepared):
    train = train_facts(dtype="float32", dtype_why="CUDA capability 7.5")
    found, lines = examine(Described(torch_facts(T4), train), quick=True)
    assert found["can_run"] and lines["gpu"].startswith("warn") and "no fast bfloat16" in lines["gpu"]
    assert lines["dtype"] == "ok    dtype        float32 (CUDA capability 7.5)"
    assert found["advice"] == {"DEVICE_BATCH_SIZE": 16, "TOTAL_BATCH_SIZE": 2**16}, "estimated, as nothing was measured"
    assert "estimated" in lines["advice"]


def test_an_mi300x_runs_on_the_rocm_build(prepared):
    torch = torch_facts(MI300X, cuda=None, hip="7.0", arch_list=["gfx90a", "gfx942"])
    machine = Described(torch)
    found, lines = examine(machine)
    assert found["can_run"] and "ROCm 7.0" in lines["torch"] and "gfx942" in lines["gpu"] and "driver" not in lines
    assert lines["gpu"].startswith("warn") and machine.measured
    older = examine(Described(torch | {"arch_list": ["gfx90a", "gfx1100"]}))
    assert not older[0]["can_run"] and "no code for gfx942" in older[1]["gpu"]
    torch["devices"][0]["used"] = 60 << 30
    machine = Described(torch)
    assert examine(machine)[1]["gpu use"].startswith("warn") and not machine.measured
    machine = Described()
    machine.amd = True  # torch's CUDA build, which is what uv installs
    assert "PyTorch's ROCm build" in examine(machine)[1]["torch"]


def test_a_driver_that_is_too_old_names_the_one_that_is_needed(prepared):
    old = "The NVIDIA driver on your system is too old (found version 11040)"
    machine = Described(torch_facts(available=False, why=old), CPU_TRAIN, driver="470.256.02", cuda="11.4", smi=True)
    machine.gpus = [RTX4090]
    found, lines = examine(machine)
    assert not found["can_run"] and found["verdict"] == "a night cannot run here yet: mend torch"
    assert (
        lines["torch"].startswith("FAIL")
        and "driver 470.256.02 is too old for it: it runs CUDA up to 11.4" in lines["torch"]
    )
    assert lines["torch"].endswith("install driver 580 or newer") and not machine.measured


@pytest.mark.parametrize(
    "change, needle",
    [
        (dict(compute_mode="Prohibited"), "sudo nvidia-smi -c DEFAULT"),
        ({"mig.mode.current": "Enabled"}, "MIG is on and no slice can be used: make a slice"),
        ({}, "does not see NVIDIA GeForce RTX 4090 (CUDA unknown error)"),
    ],
    ids=["prohibited", "MIG without a slice", "unknown"],
)
def test_a_gpu_that_torch_does_not_see_stops_a_night(prepared, change, needle):
    machine = Described(torch_facts(available=False, why="CUDA unknown error"), CPU_TRAIN, smi=True, **change)
    machine.gpus = [RTX4090]
    found, lines = examine(machine)
    assert (
        not found["can_run"] and lines["torch"].startswith("FAIL") and needle in lines["torch"] and not machine.measured
    )


def test_commits_that_are_signed_are_warned_of_for_agents_that_are_started_by_hand(prepared):
    machine = Described()
    command = ("git", "config", "--type=bool", "commit.gpgsign")
    for answer in [(0, "false\n"), (1, "")]:
        machine.answers = {command: answer}
        assert "git signing" not in examine(machine)[1]
    machine.answers = {command: (0, "true\n")}
    found, lines = examine(machine)
    assert found["can_run"] and lines["git signing"].startswith("warn")
    assert "git config commit.gpgsign false" in lines["git signing"]


def test_a_gpu_that_is_hidden_on_purpose_is_a_warning(prepared):
    machine = Described(torch_facts(available=False), CPU_TRAIN, smi=True)
    machine.gpus, machine.variables = [RTX4090], {"CUDA_VISIBLE_DEVICES": ""}
    found, lines = examine(machine)
    assert found["can_run"] and "CUDA_VISIBLE_DEVICES is ''" in lines["torch"] and lines["torch"].startswith("warn")


def test_a_driver_that_does_not_answer_or_is_not_there(prepared):
    machine = Described(torch_facts(available=False), CPU_TRAIN, smi=True)
    machine.answers = {
        ("nvidia-smi",): (18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library: 580.65")
    }
    found, lines = examine(machine)
    assert not found["can_run"] and lines["driver"].startswith("FAIL") and lines["driver"].endswith(": reboot")
    hangs = Described(torch_facts(available=False), CPU_TRAIN, smi=True)
    hangs.answers = {("nvidia-smi",): (None, "no answer in 20 s")}
    assert "no answer in 20 s" in examine(hangs)[1]["driver"]
    bare = Described(torch_facts(available=False), CPU_TRAIN)
    bare.nvidia = True  # on the PCI bus
    found, lines = examine(bare)
    assert not found["can_run"] and "no driver answers: install NVIDIA's driver" in lines["torch"]


def test_a_mig_slice_and_several_gpus_are_named(prepared):
    piece = H100 | {"name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "memory": 10_468_982_784, "uuid": "bbbb"}
    machine = Described(
        torch_facts(piece), apps=[("GPU-00000000-aaaa", "7", "python", "9000")], **{"mig.mode.current": "Enabled"}
    )
    found, lines = examine(machine, quick=True)
    assert found["can_run"] and lines["mig"].startswith("warn") and "1g.10gb" in lines["mig"] and "gpu use" not in lines
    assert found["advice"]["DEVICE_BATCH_SIZE"] == 16
    two = torch_facts(H100, H100)
    lines = examine(Described(two, apps=[("GPU-00000001-aaaa", "7", "python", "9000")]))[1]
    assert "1 more, which `lab fleet launch TAG --slots 2` uses too" in lines["gpu"] and lines["gpu use"].startswith(
        "ok"
    )


def test_limits_in_force_are_named(prepared):
    limits = {"power.limit": "250.00", "power.default_limit": "400.00", "temperature.gpu": "90"}
    line = examine(Described(torch_facts(H100), bits="0x0000000000000068", **limits))[1]["gpu limits"]
    assert line.startswith("warn")
    for needle in (
        "hardware slowdown",
        "too hot (software limit)",
        "too hot (hardware limit)",
        "250 of 400 W",
        "90 °C",
    ):
        assert needle in line, line
    unknown = examine(Described(torch_facts(H100), bits="[N/A]", **dict.fromkeys(limits, "[N/A]")))[1]["gpu limits"]
    assert unknown == "ok    gpu limits   none in force"
    idle = examine(Described(torch_facts(H100), bits="0x0000000000000005"))[1]["gpu limits"]
    assert idle.startswith("ok"), "idle, and at its power cap, which every busy GPU is"


@pytest.mark.parametrize(
    "capability, built, works",
    [
        ([8, 9], ARCHITECTURES, True), ([7, 0], ARCHITECTURES, False), ([12, 1], ARCHITECTURES, True),
        ([10, 3], ["sm_90a", "sm_100a"], True), ([11, 0], ["sm_90", "sm_100"], False), ([11, 0], ["sm_90", "compute_90"], True),
        ([6, 1], ["compute_70"], False), ([6, 1], [], True),
    ],
)  # fmt: skip
def test_torch_has_code_for_a_gpu(capability, built, works):
    assert checks.supported(torch_facts(arch_list=built), {"capability": capability}) == works


def test_a_gpu_that_torch_has_no_code_for_stops_a_night(prepared):
    v100 = {"name": "Tesla V100-SXM2-16GB", "capability": [7, 0], "memory": 16_935_682_048}
    found, lines = examine(Described(torch_facts(v100), train_facts(dtype="float32")))
    assert not found["can_run"] and "torch 2.15.0 has no code for capability 7.0" in lines["gpu"]


# ---------------------------------------------------------------------------------------------------
# The machine around it


def test_without_a_gpu_it_runs_with_a_warning(prepared):
    machine = Described()
    machine.results = MEASURES | {"setup": MEASURES["setup"] | {"compiled": False, "attention": "sdpa", "seconds": 9.0}}
    found, lines = examine(machine)
    assert found["can_run"] and lines["gpu"].startswith("warn  gpu          none: training runs on the CPU")
    assert machine.measured == [["setup", "training", "evaluation", "attention"]], "one process: nothing is compiled"
    assert found["measured"]["setup_warm_seconds"] == 9 and found["measured"]["setup_cold_seconds"] is None
    assert "COMPILE is off" in lines["compiled"] and {"triton", "compiler", "driver", "mig"}.isdisjoint(lines)


def test_without_git_the_loop_cannot_run(prepared):
    machine = Described()
    machine.missing = {"git"}
    found, lines = examine(machine)
    assert not found["can_run"] and lines["git"].startswith("FAIL") and "install git" in lines["git"]
    assert "git identity" not in lines and "checkout" not in lines


def test_git_without_a_name_outside_a_checkout_or_of_another_user(prepared):
    machine = Described()
    machine.answers = {
        ("git", "var", "GIT_AUTHOR_IDENT"): (128, "fatal: no email was given and auto-detection is disabled"),
        ("git", "rev-parse", "--show-toplevel"): (
            128,
            "fatal: not a git repository (or any of the parent directories): .git",
        ),
    }
    found, lines = examine(machine)
    assert found["verdict"] == "a night cannot run here yet: mend git identity, checkout"
    assert "git config --global user.name" in lines["git identity"] and "not in a git checkout" in lines["checkout"]
    machine = Described()
    machine.answers = {
        ("git", "rev-parse", "--show-toplevel"): (128, "fatal: detected dubious ownership in repository at '/x'")
    }
    assert "safe.directory" in examine(machine)[1]["checkout"]
    machine.answers = {("git", "status", "--porcelain", "--untracked-files=no"): (0, " M train.py\n M constants.py\n")}
    assert examine(machine)[1]["checkout"].startswith(
        "warn  checkout     on branch autoresearch/nov21; not committed: train.py, const"
    )


def test_without_a_compiler_triton_or_its_headers_it_says_what_that_costs(prepared):
    machine = Described(torch_facts(RTX4090))
    machine.missing = {"gcc", "clang"}
    found, lines = examine(machine)
    assert (
        found["can_run"]
        and lines["compiler"].startswith("warn  compiler     no C compiler")
        and "apt-get install gcc" in lines["compiler"]
    )
    machine.missing = {"gcc"}
    assert examine(machine)[1]["compiler"] == "ok    compiler     /usr/bin/clang"
    machine.variables, machine.missing = {"CC": "icx -O2"}, {"icx"}
    assert "no C compiler" in examine(machine)[1]["compiler"], "triton takes CC and nothing else where it is set"
    eager = train_facts(compile=False, compile_why="triton is not installed", attention="sdpa")
    machine = Described(
        torch_facts(RTX4090, triton=None, triton_error="ModuleNotFoundError: No module named 'triton'"), eager
    )
    lines = examine(machine)[1]
    assert all(lines[name].startswith("warn") for name in ("triton", "compile", "attention"))


def test_a_full_disk_stops_a_night_and_a_small_one_is_named(prepared):
    machine = Described(torch_facts(RTX4090))
    machine.space = 5e6
    found, lines = examine(machine)
    assert not found["can_run"] and lines["disk"].startswith(
        "FAIL  disk         5 MB free here; a night of archives takes about 3.6 GB"
    )
    assert lines["temp"].startswith("FAIL") and not machine.measured
    machine.space = 3e9
    found, lines = examine(machine)
    assert (
        found["can_run"]
        and lines["disk"].startswith("warn  disk         3.0 GB free here")
        and "(201 MB each)" in lines["disk"]
    )
    machine.temp = None
    assert "set TMPDIR" in examine(machine)[1]["temp"]


def test_a_read_only_home(prepared, monkeypatch):
    machine = Described()
    machine.denied = {prepared}
    found, lines = examine(machine)
    assert found["can_run"] and lines["cache"].startswith("warn") and "is read-only" in lines["cache"]
    monkeypatch.undo()
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(prepared))
    found, lines = examine(machine)
    assert not found["can_run"] and lines["data"].startswith("FAIL") and "uv run prepare.py" in lines["data"]
    assert lines["cache"].startswith("FAIL") and "AUTORESEARCH_CACHE" in lines["cache"]
    machine.denied = {ROOT}
    assert "files cannot be created here" in examine(machine)[1]["folder"]


def test_while_a_training_runs_nothing_disturbs_it(prepared):
    machine = Described(torch_facts(H100), apps=[("GPU-00000000-aaaa", "9", "python", "45000")])
    machine.running = True
    found, lines = examine(machine)
    assert found["can_run"] and lines["run"].startswith("warn") and "would lose time" in lines["measured"]
    assert not machine.measured and machine.touched is False and "gpu use" not in lines, "the process is that training"


def test_programs_that_a_night_may_use(prepared):
    machine = Described()
    machine.missing = {"bwrap", "tmux", "claude", "codex", "uv"}
    found, lines = examine(machine)
    assert found["verdict"] == "a night cannot run here yet: mend uv"
    assert all(lines[name].startswith("warn") for name in ("bubblewrap", "tmux", "agent"))
    machine.missing = {"myagent"}
    machine.answers = {("bwrap", "--ro-bind", "/", "/", "true"): (1, "bwrap: No permissions to create new namespace")}
    found, lines = examine(machine, agent="myagent --yes")
    assert lines["agent"].startswith("FAIL") and "No permissions to create new namespace" in lines["bubblewrap"]
    for command in ("myagent --yes", "HOME=$REAL_HOME A='b c' myagent --yes", "myagent \"it's"):
        assert examine(Described(), agent=command)[1]["agent"] == "ok    agent        /usr/bin/myagent"
    machine.missing = {"/dev/shm"}
    assert examine(machine)[1]["/dev/shm"].startswith("warn")


@pytest.mark.slow
def test_an_unknown_dataset_is_one_line(tmp_path):
    done = lab("--quick", cwd=ROOT, AUTORESEARCH_DATASET="nonsense", AUTORESEARCH_CACHE=str(tmp_path), PATH="/nowhere")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "AUTORESEARCH_DATASET='nonsense' is unknown: set it to one of" in done.stdout
    assert "a night cannot run here yet: mend " in done.stdout and "git" in done.stdout.rpartition("mend ")[2]


def test_a_check_that_fails_is_a_line_and_the_others_are_made(prepared):
    machine = Described()
    machine.which = lambda program: 1 / 0
    found = diagnose(machine)
    lines = {check["name"]: check for check in found["checks"]}
    assert lines["uv"]["text"] == "could not be checked (ZeroDivisionError: division by zero)"
    assert lines["data"]["level"] == "ok" and lines["system"]["level"] == "ok"
    machine = Described()
    machine.facts = lambda touch_gpu: 1 / 0
    found = diagnose(machine)
    assert not found["can_run"] and "torch" in found["verdict"]


# ---------------------------------------------------------------------------------------------------
# What the measurements say


@pytest.mark.parametrize(
    "stage, change, name, level, needle",
    [
        ("setup", {"error": "out of memory at one row: make the model smaller"}, "set-up", "FAIL", "a run cannot start here (out of"),
        ("setup", {"error": "AttributeError: module 'train' has no attribute 'warm_up'", "rewritten": True}, "set-up", "warn", "on main"),
        ("setup", {"seconds": 400.0}, "set-up", "FAIL", "the limit is 300 s"),
        ("setup", {"compiled": False}, "set-up", "warn", "torch.compile failed"),
        ("training", {"error": "FAIL: loss nan at step 3"}, "training", "FAIL", "loss nan at step 3"),
        ("training", {"late_graphs": 2}, "training", "warn", "2 graphs compiled after the warm-up"),
        ("evaluation", {"seconds": 700.0}, "evaluation", "FAIL", "about 700 s to score a run, 300 s are allowed"),
        ("attention", {"flex": {"error": 0.2, "ms": 1.0}}, "exactness", "FAIL", "flex is what a run would use"),
        ("attention", {"flex": {"failed": "RuntimeError: no kernel"}}, "exactness", "FAIL", "flex failed (RuntimeError: no kernel)"),
        ("attention", {"flash4": {"error": 0.2, "ms": 1.0}}, "exactness", "warn", "do not use flash4 here"),
        ("compiled", {"loss_difference": 0.7}, "compiled", "FAIL", "by 0.7000 nats while the loss fell by 6.00"),
        ("compiled", {"gradient_difference": 0.2}, "compiled", "FAIL", "set COMPILE = False"),
        ("compiled", {"error": "it ended with status -9"}, "compiled", "warn", "status -9"),
    ],
)  # fmt: skip
def test_what_is_measured_decides(prepared, stage, change, name, level, needle):
    machine = Described(torch_facts(RTX4090))
    machine.results = MEASURES | {stage: MEASURES[stage] | change}
    found, lines = examine(machine)
    assert lines[name].startswith(level) and needle in lines[name], lines[name]
    assert found["can_run"] == (level != "FAIL")


def test_rows_that_fit_are_those_of_the_readme():
    table = {80: 128, 48: 64, 24: 32, 32: 64, 16: 32, 12: 16, 8: 8, 6: 8}  # GB of memory -> rows
    assert {size: min(128, advice.rows_that_fit(size * 1e9, 2048)) for size in table} == table
    assert advice.rows_that_fit(24e9, 2048, is_float32=True) == 16
    assert advice.rows_that_fit(0.5e9, 2048) == 0
    assert advice.rows_that_fit(24e9, 512) == 128, "shorter rows take less"


@pytest.mark.parametrize(
    "dataset, rows, speed, advised",
    [
        ("climbmix", 128, 1_600_000, {}),
        ("climbmix", 128, None, {}),
        ("climbmix", 8, None, {"DEPTH": 4, "AUTORESEARCH_DATASET": "tinystories", "TOTAL_BATCH_SIZE": 2**14, "DEVICE_BATCH_SIZE": 8}),
        ("tinystories", 8, None, {"DEPTH": 4, "TOTAL_BATCH_SIZE": 2**14, "DEVICE_BATCH_SIZE": 8}),
        ("climbmix", 32, 500_000, {"DEVICE_BATCH_SIZE": 32, "TOTAL_BATCH_SIZE": 2**18}),
        ("climbmix", 128, 20_000, {"TOTAL_BATCH_SIZE": 2**14}),
        ("climbmix", 128, 5_000, {"TOTAL_BATCH_SIZE": 2**14, "DEPTH": 4}),
    ],
)  # fmt: skip
def test_advice_follows_memory_and_speed(dataset, rows, speed, advised):
    assert advice.knobs(train_facts(), dataset, 300, rows, speed) == advised


# ---------------------------------------------------------------------------------------------------
# The command, for real


def lab(*args, cwd, timeout=280, **env):
    env = os.environ | {"PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, "-m", "lab", "doctor", *args]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def tiny(make_repo):
    """A clone with a tiny model, committed, whose runs may take any time: the machine may be busy."""
    repo = make_repo(time_budget=300, grace=3000)
    for name, value in TINY.items():
        set_knob(repo, name, value)
    commands = [
        ["init", "-qb", "main"],
        ["config", "user.name", "A Person"],
        ["config", "user.email", "a@b.c"],
        ["add", "-A"],
    ]
    for command in [*commands, ["commit", "-qm", "start"]]:
        subprocess.run(["git", *command], cwd=repo.path, env=repo.env, check=True)
    return repo


def everything(*folders):
    """{path: content} of all files below the folders, and the folders."""
    found = [path for folder in folders for path in Path(folder).rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


@pytest.mark.slow
def test_the_whole_command_on_this_machine(tiny):
    home = Path(tiny.env["HOME"])
    before = everything(tiny.path, home)
    result = tiny.run("-m", "lab", "doctor", "--json", "--seconds", "1", timeout=280)
    found = json.loads(result.out)
    failed = [check for check in found["checks"] if check["level"] == "FAIL"]
    assert result.rc == 0 and found["can_run"] and not failed and not result.err, (failed, result.err)
    measured = found["measured"]
    assert measured["steps"] >= 1 and measured["device_batch"] == 8 and measured["late_graphs"] == 0
    for name in ("tokens_per_second", "step_ms", "setup_warm_seconds", "eval_seconds", "experiments_a_night"):
        assert measured[name] > 0, name
    assert measured["tokens_per_second"] == pytest.approx(16 * 64 * 1000 / measured["step_ms"])
    assert measured["attention_sdpa_error"] < 1e-4 and measured["setup_cold_seconds"] is None and found["device"]
    assert everything(tiny.path, home) == before, "it changes nothing"
    assert not tiny.cache.exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_train_py_is_measured_cold_and_warm_and_compared_with_eager(tiny):
    if not shutil.which("g++"):
        left_out("torch.compile needs a C++ compiler")
    set_knob(tiny, "COMPILE", "True")
    set_knob(tiny, "DEPTH", "1")
    result = tiny.run("-m", "lab", "doctor", "--json", "--seconds", "1", timeout=1100)
    found = json.loads(result.out)
    measured = found["measured"]
    assert result.rc == 0, [check for check in found["checks"] if check["level"] == "FAIL"]
    assert measured["setup_cold_seconds"] > 0 and measured["setup_warm_seconds"] > 0 and measured["late_graphs"] == 0
    assert measured["compiled_gradient_difference"] < 1e-3, "float32: only the order of sums differs"
    assert measured["compiled_loss_difference"] < 0.4, "a tenth of what ten steps gain; see measurements.py"
    (checkout,) = [check for check in found["checks"] if check["name"] == "checkout"]
    assert checkout["level"] == "warn" and "train.py" in checkout["text"]


@pytest.mark.slow
def test_a_read_only_machine_with_a_small_tmp_gets_lines_and_no_trace(tiny):
    """All but /tmp is read-only, so whatever doctor would write elsewhere would fail."""
    wrap = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    if not shutil.which("bwrap") or subprocess.run([*wrap, "true"], capture_output=True).returncode:
        left_out("bubblewrap does not run here")
    shown = [tiny.path, sys.prefix, sys.base_prefix]  # any of them may be below /tmp
    tree = [part for path in shown for part in ("--ro-bind", str(path), str(path))]
    result = tiny.run("-m", "lab", "doctor", "--seconds", "1", wrap=[*wrap, "--tmpfs", "/tmp", *tree], timeout=280)
    assert result.rc == 1 and not result.err, result.out + result.err
    assert "\nFAIL  folder       files cannot be created here" in result.out
    assert "tokens/s" in result.out and "Traceback" not in result.out, "measured all the same"
    small = [*wrap, "--size", "1000000", "--tmpfs", "/tmp", *tree]
    result = tiny.run("-m", "lab", "doctor", wrap=small, timeout=280)
    assert result.rc == 1 and not result.err and "\nFAIL  temp " in result.out, result.out + result.err
    assert "not measured: first mend temp" in result.out and "Traceback" not in result.out


@pytest.mark.slow
def test_without_git_and_compiler_and_with_a_read_only_home_for_real(tiny, no_privileges, tmp_path):
    home = Path(tiny.env["HOME"])
    home.chmod(0o555)
    cache = home / ".cache" / "autoresearch"
    wrap = [shutil.which(part) or part for part in no_privileges[:1]] + no_privileges[1:]  # found without a PATH, too
    result = tiny.run(
        "-m", "lab", "doctor", "--quick", wrap=wrap, PATH="/nowhere", AUTORESEARCH_CACHE=cache, timeout=280
    )
    assert result.rc == 1 and not result.err, result.out + result.err
    for needle in ("FAIL  git          not on PATH", "FAIL  uv ", "FAIL  cache ", "ok    dtype "):
        assert f"\n{needle}" in result.out, result.out
    assert result.out.rstrip().endswith("a night cannot run here yet: mend uv, git, cache")


# ---------------------------------------------------------------------------------------------------
# The child process, and what it measures with


def answering(monkeypatch, code):
    monkeypatch.setattr(probes, "CHILD", code.replace("{", "{{").replace("}", "}}"))


def test_a_child_that_crashes_hangs_or_prints_keeps_what_it_found(monkeypatch, tmp_path):
    machine = probes.Machine(tmp_path)
    answering(
        monkeypatch,
        """import os, sys; print('{"torch": {"version": "1"}}\\n{"tra', flush=True); sys.exit("no libcuda")""",
    )
    found = machine.facts(touch_gpu=True)
    assert found == {"torch": {"version": "1"}, "train": {"error": "it ended with status 1 (no libcuda)"}}
    code = """import time; print('{"torch": {"version": "1"}}', flush=True); time.sleep(3600)"""
    answering(monkeypatch, code)
    found = machine.child({"stages": ["torch", "train"]}, limit=5)
    assert found["train"] == {"error": "it took longer than 5 s"}


def test_a_broken_torch_is_a_line(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "train.py").write_text("print('words of train.py')\nimport torch")
    machine = probes.Machine(tmp_path / "tree")
    found = machine.facts(touch_gpu=False)
    assert found["torch"] == {
        "error": "ImportError: libcudart.so.13: cannot open shared object file",
        "rewritten": False,
    }
    check = checks.torch_build(found["torch"], [], "", False, False, None)
    assert check["level"] == "FAIL" and "libcudart" in check["text"] and "uv sync" in check["remedy"]
    assert "error" in found["train"]


def test_a_training_in_progress_is_seen(tmp_path):
    machine = probes.Machine(tmp_path)
    assert not machine.in_progress()
    held = lock_folder(tmp_path)
    assert machine.in_progress()
    os.close(held)
    assert not machine.in_progress()


@pytest.mark.parametrize("kind, expected", [("cpu", ["keeps memory", "builds"]), ("cuda", ["builds"])])
def test_a_cpu_is_measured_as_runs_train_on_it(kind, expected, monkeypatch):
    device, events = SimpleNamespace(type=kind), []
    monkeypatch.setattr("frozen.device.keep_freed_memory", lambda: events.append("keeps memory"))
    monkeypatch.setattr("torch.set_float32_matmul_precision", lambda text: None)
    prepare = SimpleNamespace(pick_device=lambda: device, Run=lambda *_: SimpleNamespace(device=device, device_name="a device"))
    session = measurements.Session({})
    model = SimpleNamespace(attention=SimpleNamespace(name="sdpa"))
    session.core = lambda: (prepare, SimpleNamespace(warm_up=lambda *_: 8))
    session.build = lambda: events.append("builds") or (model, None)
    assert session.setup()["device_batch"] == 8 and events == expected


def test_a_back_end_that_attends_other_keys_or_has_wrong_gradients_is_found():
    import torch

    model = SimpleNamespace(config=SimpleNamespace(n_embd=64, n_head=4), dtype=torch.float32)
    error = lambda attention: measurements.largest_error(attention, model, torch.device("cpu"), T=64)  # noqa: E731
    sdpa = train.SDPA
    assert error(sdpa) < 1e-5
    changed = [
        sdpa._replace(make_mask=lambda T, window, device: sdpa.make_mask(T, window + 1, device)),
        sdpa._replace(attend=lambda q, k, v, window, mask: sdpa.attend(q, k, v.detach() + 0 * v, window, mask)),
        sdpa._replace(attend=lambda q, k, v, window, mask: sdpa.attend(q, k.flip(2), v, window, mask)),
        sdpa._replace(attend=lambda q, k, v, window, mask: sdpa.attend(q, k, v, window, mask) * float("nan")),
    ]
    for attention in changed:
        assert error(attention) > 0.05
    model.dtype = torch.bfloat16
    assert 1e-4 < error(sdpa) < ATTENTION_ERROR["bfloat16"]


@pytest.mark.slow
def test_what_the_child_reports_of_this_machine_has_the_keys_that_the_tests_describe():
    found = probes.Machine(ROOT).facts(touch_gpu=False)
    assert found["torch"].keys() == torch_facts().keys() and found["train"].keys() == train_facts().keys()
    assert found["train"]["attentions"]["sdpa"] == "loaded" and found["train"]["params"] > 1e6
