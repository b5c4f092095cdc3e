"""All checks in order, then the measurements, then the verdict. What fails inside a check becomes its line."""

import importlib
import re
import shlex
import sysconfig
import tempfile
from pathlib import Path

from lab.machine import advice, checks
from lab.machine.checks import fail, ok, warn
from lab.store import names

# Measured, or None: seconds of set-up until the first counted step with an empty and with a filled compile cache, and of
# scoring all evaluation tokens; peak memory in MiB as torch counts it; compiled against eager: see measurements.py.
MEASURED = (
    "tokens_per_second", "step_ms", "steps", "mfu_percent", "peak_memory_mb", "device_batch", "setup_cold_seconds",
    "setup_warm_seconds", "eval_seconds", "experiments_a_night", "compiled_loss_difference", "compiled_gradient_difference", "late_graphs",
)  # fmt: skip
GPU_FIELDS = (
    "index", "uuid", "name", "memory.total", "memory.used", "utilization.gpu", "temperature.gpu", "power.limit",
    "power.default_limit", "compute_mode",
)  # fmt: skip
APP_FIELDS = ("gpu_uuid", "pid", "process_name", "used_memory")
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
SETUP_LIMIT = 600  # seconds for set-up in the child, beyond the seconds of training
# Largest relative error of an attention back end: bfloat16 has 8 bits, float32 may multiply in TF32 with 11.
ATTENTION_ERROR = {"bfloat16": 0.03, "float32": 0.005}
LOSS_DIFFERENCE = 0.1  # largest in ten steps between compiled and eager, relative to the fall of the loss
GRADIENT_DIFFERENCE = {"bfloat16": 0.1, "float32": 0.01}  # relative, at the same weights
BLOCKING = ("torch", "gpu", "driver", "temp")  # checks without which nothing can be measured


class Doctor:
    """One diagnosis. Each check may raise: add() turns that into a line."""

    def __init__(self, machine, say):
        self.machine, self.say = machine, say
        self.checks, self.measured = [], dict.fromkeys(MEASURED)
        self.advice, self.device = {}, None
        self.torch = self.train = {"error": "it was not examined"}
        self.training = self.busy = False  # a training runs in this folder; another process uses the GPU
        self.gpus, self.row = [], None  # nvidia-smi's rows; that of the GPU that trains
        self.dataset, self.budget = "unknown", 300

    def add(self, name, function, *args):
        """Appends the check that function(*args) returns, if it returns one."""
        try:
            check = function(*args)
        except (Exception, SystemExit) as error:
            check = warn(name, f"could not be checked ({one_line(error)})", "report this line as a bug")
        if check:
            self.checks.append(check)
            self.say(check)

    def attempt(self, function, default):
        """What function() returns, or `default` if it fails: for probes that several checks share."""
        try:
            return function()
        except (Exception, SystemExit):
            return default

    # --- the checks ---

    def environment(self):
        m = self.machine
        self.add("system", lambda: checks.system(m.system()))
        self.add("python", lambda: checks.python(m.system()["python"]))
        self.add("uv", lambda: checks.uv(m.which("uv")))
        self.add("git", lambda: checks.git(m.which("git"), m.output("git", "--version")))
        if self.attempt(lambda: m.which("git"), None):
            self.add("git identity", lambda: checks.identity(m.output("git", "var", "GIT_AUTHOR_IDENT")))
            self.add("git signing", lambda: checks.signing(m.output("git", "config", "--type=bool", "commit.gpgsign")))
            self.add("checkout", self.checkout)
        self.add("folder", lambda: checks.tree_writable(m.writable(m.tree)))
        self.add("run", self.run_in_progress)

    def programs(self, agent):
        m = self.machine
        self.add("bubblewrap", self.sandbox)
        self.add("tmux", lambda: checks.tmux(m.which("tmux")))
        self.add("agent", lambda: self.agent(agent))

    def checkout(self):
        m = self.machine
        changed = m.output("git", "status", "--porcelain", "--untracked-files=no")
        changed = [line[3:] for line in changed[1].splitlines()] if changed[0] == 0 else []
        branch = m.output("git", "symbolic-ref", "--quiet", "--short", "HEAD")
        return checks.checkout(
            m.output("git", "rev-parse", "--show-toplevel"), m.exists(m.tree / names.TRAIN),
            branch[1].strip() if branch[0] == 0 else None, changed,
        )  # fmt: skip

    def run_in_progress(self):
        self.training = self.machine.in_progress()
        if self.training:
            return warn("run", "a training is running in this folder", "call this again when it has ended, to measure")
        return None

    def gpus_and_torch(self):
        m = self.machine
        found = self.attempt(lambda: m.facts(touch_gpu=not self.training), {})
        missing = {"error": "the child process that imports it gave no answer"}
        self.torch, self.train = found.get("torch", missing), found.get("train", missing)
        smi = self.attempt(self.nvidia_smi, None)
        header, self.gpus, apps = smi[1:] if smi else ("", [], [])
        self.add("driver", lambda: checks.driver(smi and smi[0], header, self.torch))
        self.dataset, self.budget = self.attempt(self.rules, (self.dataset, self.budget))
        nvidia, amd = self.attempt(m.nvidia_hardware, False), self.attempt(m.amd_hardware, False)
        hidden = next((f"{name} is {m.environ(name)!r}" for name in HIDING if m.environ(name) in ("", "-1")), None)
        self.add("torch", lambda: checks.torch_build(self.torch, self.gpus, header, nvidia, amd, hidden))
        self.add("gpu", self.gpu)
        self.add("gpu use", lambda: self.neighbours(apps))
        name = self.torch["devices"][0]["name"] if self.torch.get("devices") else ""
        self.add("gpu limits", lambda: checks.limits(self.row, self.reasons()))
        self.add("mig", lambda: checks.mig(self.row, name))
        self.add("triton", lambda: checks.triton(self.torch))
        self.add("compiler", self.compiler)
        self.add("dtype", lambda: checks.dtype(self.train))
        self.add("compile", lambda: checks.compiled(self.train))
        self.add("attention", lambda: checks.attention(self.train))
        if not self.torch.get("available"):
            system = m.system()
            self.add("cpu use", lambda: None if self.training else checks.load(system["cores"], system["load"]))

    def nvidia_smi(self):
        """(its answer, its plain output, rows of GPUs, rows of compute processes); None without nvidia-smi."""
        m = self.machine
        if not m.which("nvidia-smi"):
            return None
        plain = m.output("nvidia-smi")
        if plain[0] != 0:
            return plain, "", [], []
        rows = checks.table(self.query("gpu", GPU_FIELDS), GPU_FIELDS)
        modes = checks.table(self.query("gpu", ["uuid", "mig.mode.current"]), ["uuid", "mig"])  # unknown to old drivers
        for row in rows:
            row["mig"] = next((mode["mig"] for mode in modes if mode["uuid"] == row["uuid"]), None)
        return plain, plain[1], rows, checks.table(self.query("compute-apps", APP_FIELDS), APP_FIELDS)

    def query(self, what, fields):
        status, text = self.machine.output(
            "nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"
        )
        return text if status == 0 else ""

    def reasons(self):
        """The limits that slow our GPU down, as NVML's bits; the field was renamed."""
        for field in ("clocks_event_reasons.active", "clocks_throttle_reasons.active") if self.row else ():
            for row in checks.table(self.query("gpu", ["uuid", field]), ["uuid", "bits"]):
                if row["uuid"] == self.row["uuid"]:
                    return row["bits"]
        return None

    def rules(self):
        """(dataset, seconds of training in a run) of constants.py."""
        constants = importlib.import_module("constants")
        return constants.DATASET, constants.TIME_BUDGET

    def gpu(self):
        check, self.row = checks.gpu(self.torch, self.gpus, self.dataset)
        return check

    def neighbours(self, apps):
        device = self.torch["devices"][0] if self.torch.get("devices") else None
        if device and self.torch["hip"]:
            check, self.busy = checks.neighbours_on_rocm(device)
        else:
            check, self.busy = checks.neighbours(self.row, apps, bool(device) and "MIG" in device["name"])
        if self.training:  # the line of the run says it already
            return None
        return check

    def compiler(self):
        m = self.machine
        given = m.environ("CC")
        found = m.which(given.split()[0]) if given else m.which("gcc") or m.which("clang")
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        return checks.compiler(self.torch, found, m.exists(header))

    def data_and_disk(self):
        m, layout = self.machine, None
        with_reason = None
        try:
            layout = importlib.import_module("corpus.layout")
        except (Exception, SystemExit) as error:  # an unknown dataset is a SystemExit with a sentence
            with_reason = one_line(error)
        if layout is None:
            self.add("data", lambda: fail("data", with_reason, "mend this, then call doctor again"))
            return
        prepared = self.attempt_prepared(layout)
        root, command = layout.cache_dir(), "uv run prepare.py"
        if self.dataset != "climbmix":
            command = f"AUTORESEARCH_DATASET={self.dataset} {command}"
        self.add("data", lambda: checks.data(self.dataset, layout.data_dir(), prepared, command))
        self.add("cache", lambda: checks.cache(root, m.writable(root), prepared is True))
        self.add("disk", lambda: checks.disk(m.free(m.tree), self.train.get("params"), m.free(root)))
        folder = self.attempt(m.temporary_folder, None)
        self.add("temp", lambda: checks.temporary(folder, m.free(folder) if folder else 0))
        if m.system()["system"] == "Linux":
            self.add("/dev/shm", self.shared_memory)

    def attempt_prepared(self, layout):
        """True, or why the data cannot be used."""
        try:
            layout.load_manifest()
            return True
        except SystemExit as refusal:
            return str(refusal)
        except OSError as error:
            return f"{layout.data_dir()} cannot be read ({one_line(error)})"

    def shared_memory(self):
        m, place = self.machine, "/dev/shm"
        there = m.exists(place)
        return checks.shared_memory(there, there and m.writable(place), m.free(place) if there else 0)

    def sandbox(self):
        m = self.machine
        if m.system()["system"] != "Linux":
            return None
        found = m.which("bwrap")
        return checks.sandbox(found, m.output("bwrap", "--ro-bind", "/", "/", "true") if found else None)

    def agent(self, command):
        m = self.machine
        try:
            words = shlex.split(command or "")
        except ValueError:  # an open quote
            words = command.split()
        wanted = next((word for word in words if not re.match(r"\w+=", word)), None)  # after HOME=$REAL_HOME and the like
        programs = [wanted] if wanted else checks.AGENTS
        return checks.agent(wanted, {program: found for program in programs if (found := m.which(program))})

    # --- the measurements ---

    def why_not_measured(self, quick):
        if quick:
            return "not measured (--quick)"
        if self.training:
            return "not measured: a training is running here, and would lose time"
        if self.busy:
            return "not measured: another process uses the GPU, so both would be slower"
        if "error" in self.torch or "error" in self.train:
            return "not measured: torch or train.py cannot be used"
        blocking = [c["name"] for c in self.checks if c["level"] == "FAIL" and c["name"] in BLOCKING]
        return f"not measured: first mend {', '.join(blocking)}" if blocking else None

    def measure(self, quick, seconds):
        if reason := self.why_not_measured(quick):
            self.add(
                "measured",
                lambda: ok("measured", reason) if quick else warn("measured", reason, "call this again afterwards"),
            )
            return
        with tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True) as cache:
            limit, stages = SETUP_LIMIT + seconds, ["setup", "training", "evaluation"]
            first = self.machine.measure(stages + ["attention"] * (not self.train["compile"]), seconds, limit, cache)
            compares = bool(first["setup"].get("compiled"))
            second = {}
            if self.train["compile"] and "error" not in first["setup"]:
                # Another process, with the compile cache that the first one filled, as all runs but the first have it.
                stages = ["setup", "attention"] + ["compiled"] * compares
                second = self.machine.measure(stages, seconds, limit, cache)
        self.add("set-up", lambda: self.setup(first["setup"], second.get("setup", {}), compares))
        if "error" in first["setup"]:
            return
        self.add("exactness", lambda: self.attention((second or first)["attention"], first["setup"]["attention"]))
        self.add("compiled", lambda: self.compiled(second.get("compiled")))
        self.add("training", lambda: self.trained(first["training"]))
        self.add("evaluation", lambda: self.evaluated(first["evaluation"]))
        self.add("a night", self.night)

    def setup(self, cold, warm, compares):
        grace = importlib.import_module("constants").GRACE
        if cold.get("rewritten"):
            return warn(
                "set-up",
                f"train.py is not as doctor knows it ({cold['error']})",
                "to measure this machine, call doctor on main",
            )
        if "error" in cold:
            remedy = "read the reason; with an edited train.py, try main's"
            return fail("set-up", f"a run cannot start here ({cold['error']})", remedy)
        self.device = cold["device_name"]
        cold_seconds, warm_seconds = cold["seconds"], warm.get("seconds")
        self.measured |= {
            "device_batch": cold["device_batch"], "setup_cold_seconds": cold_seconds if compares else None,
            "setup_warm_seconds": warm_seconds if compares else cold_seconds,
        }  # fmt: skip
        text = f"{cold_seconds:.0f} s, eager"
        if compares:
            text = f"{cold_seconds:.0f} s for the first run, which compiles"
            text += f", {warm_seconds:.0f} s for the others" if warm_seconds else ""
        text += f"; attention {cold['attention']}, device batch {cold['device_batch']} rows"
        if "error" in warm:
            return warn("set-up", f"{text}; a second run failed ({warm['error']})", "report this line as a bug")
        if cold_seconds > grace:
            return fail("set-up", text, f"the limit is {grace} s: make the model smaller, or set COMPILE = False")
        if self.train["compile"] and not compares:
            return warn(
                "set-up", f"{text}: torch.compile failed", "see the line `torch.compile:` in a run's log for the reason"
            )
        return ok("set-up", text)

    def attention(self, found, used):
        if "error" in found and not isinstance(found["error"], dict):
            return warn("exactness", f"not compared with the reference ({found['error']})", "report this line as a bug")
        limit, texts, wrong = ATTENTION_ERROR.get(self.train["dtype"], 0.03), [], []
        for name, result in found.items():
            self.measured[f"attention_{name}_error"] = result.get("error")
            self.measured[f"attention_{name}_ms"] = result.get("ms")
            if "failed" in result:
                texts.append(f"{name} failed ({result['failed']})")
                continue
            texts.append(f"{name} within {result['error']:.1e}" + (f" ({result['ms']:.1f} ms)" if result["ms"] else ""))
            if not result["error"] <= limit:
                wrong.append(name)
        text = f"of the naive reference, forward and backward: {', '.join(texts)}"
        if used in wrong or "failed" in found.get(used, {}):
            return fail("exactness", text, f"{used} is what a run would use: set ATTENTION in train.py to another one")
        if wrong:
            return warn("exactness", text, f"do not use {', '.join(wrong)} here")
        return ok("exactness", text)

    def compiled(self, found):
        if found is None:
            return ok("compiled", f"not compared with eager: runs are eager ({self.train['compile_why']})")
        if "error" in found:
            return warn("compiled", f"not compared with eager ({found['error']})", "report this line as a bug")
        losses, gradients = found["loss_difference"], found["gradient_difference"]
        self.measured |= {"compiled_loss_difference": losses, "compiled_gradient_difference": gradients}
        fall = found["eager"][0] - found["eager"][-1]
        text = (
            f"differs from eager by {losses:.4f} nats while the loss fell by {fall:.2f}, gradients by {gradients:.1e}"
        )
        if not (losses <= LOSS_DIFFERENCE * fall and gradients <= GRADIENT_DIFFERENCE.get(self.train["dtype"], 0.1)):
            return fail("compiled", text, "set COMPILE = False in train.py, and report this line")
        return ok("compiled", text)

    def trained(self, found):
        if "error" in found:
            return fail(
                "training", f"failed ({found['error']})", "read the reason; with an edited train.py, try main's"
            )
        peak, mfu = found["peak_memory_mb"] or None, found["mfu_percent"] or None
        kept = ("tokens_per_second", "step_ms", "steps", "late_graphs")
        self.measured |= {name: found[name] for name in kept} | {"peak_memory_mb": peak, "mfu_percent": mfu}
        text = f"{found['tokens_per_second']:,.0f} tokens/s, {found['step_ms']:.0f} ms a step"
        text += f", MFU {mfu:.1f} %" if mfu else ""
        text += f", peak {peak:,.0f} MB" if peak else ""
        if found["late_graphs"]:
            remedy = "each costs training time: report this line with train.py's settings"
            return warn("training", f"{text}; {found['late_graphs']} graphs compiled after the warm-up", remedy)
        return ok("training", text)

    def evaluated(self, found):
        if "error" in found:
            return fail(
                "evaluation", f"failed ({found['error']})", "read the reason; with an edited train.py, try main's"
            )
        grace = importlib.import_module("constants").GRACE
        seconds = self.measured["eval_seconds"] = found["seconds"]
        text = f"about {seconds:.0f} s to score a run"
        if seconds > grace:
            remedy = (
                "make the model smaller, or set AUTORESEARCH_DATASET to one with fewer evaluation tokens (constants.py)"
            )
            return fail("evaluation", f"{text}, {grace} s are allowed", remedy)
        return ok("evaluation", text)

    def night(self):
        measured = self.measured
        if None in (measured["setup_warm_seconds"], measured["eval_seconds"], measured["tokens_per_second"]):
            return None
        steps = self.budget * measured["tokens_per_second"] / self.train["TOTAL_BATCH_SIZE"]
        measured["experiments_a_night"] = advice.experiments(
            self.budget, measured["setup_warm_seconds"], measured["eval_seconds"]
        )
        text = f"about {measured['experiments_a_night']} experiments in {advice.NIGHT_HOURS} hours, of {steps:,.0f} steps each"
        return ok("a night", text)

    def advise(self):
        rows, devices = self.measured["device_batch"], self.torch.get("devices")
        if "error" in self.train:
            return
        if rows is None and devices and devices[0]["memory"]:
            rows = advice.rows_that_fit(
                devices[0]["memory"], self.train["MAX_SEQ_LEN"], self.train["dtype"] == "float32"
            )
        self.advice = advice.knobs(self.train, self.dataset, self.budget, rows, self.measured["tokens_per_second"])
        if self.advice:
            knobs = ", ".join(f"{name} = {value}" for name, value in self.advice.items())
            how = "measured" if self.measured["tokens_per_second"] else "estimated from the GPU's memory"
            self.add(
                "advice",
                lambda: warn("advice", f"to try on this machine, {how}", f"{knobs} (README, On smaller hardware)"),
            )
        else:
            self.add("advice", lambda: ok("advice", "train.py's defaults suit this machine"))


def one_line(error):
    kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:200]}"


def diagnose(machine, *, quick=False, seconds=20, agent=None, say=lambda check: None):
    """The JSON object that doctor.py describes, for the machine (probes.Machine); say(check) is called as each is made."""
    doctor = Doctor(machine, say)
    for name, part in [
        ("environment", doctor.environment), ("devices", doctor.gpus_and_torch), ("data", doctor.data_and_disk),
        ("programs", lambda: doctor.programs(agent)), ("measured", lambda: doctor.measure(quick, seconds)),
        ("advice", doctor.advise),
    ]:  # fmt: skip
        doctor.add(name, part)  # each adds lines of its own
    failed = [check["name"] for check in doctor.checks if check["level"] == "FAIL"]
    warned = sum(check["level"] == "warn" for check in doctor.checks)
    if failed:
        verdict = f"a night cannot run here yet: mend {', '.join(failed)}"
    else:
        verdict = "a night can run here" + (f"; {warned} warning{'s' * (warned > 1)} above" if warned else "")
    return {
        "format": 1, "can_run": not failed, "verdict": verdict, "checks": doctor.checks, "measured": doctor.measured,
        "advice": doctor.advice, "device": doctor.device,
    }  # fmt: skip
