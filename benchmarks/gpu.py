"""Everything that this project wants to know from a GPU, in one command that ends in time.

    python benchmarks/gpu.py --out FOLDER --minutes 9          all parts, the most wanted first
    python benchmarks/gpu.py --out FOLDER --parts run          only these, such as a whole run of five minutes
    python benchmarks/gpu.py --list                            the parts, with their limits

Needs this repository and a Python with torch, numpy and tiktoken (others on PYTHONPATH count); no network. Each part is a
process of its own with a limit of its own. A part that fails, hangs or finds no time left becomes a line, and the next
one begins. If ClimbMix is not prepared, the data are random tokens in its layout, of which a model can learn half; the
lowest bits per byte that is possible on them is in the report. Writes to FOLDER after each part: gpu.json (everything),
gpu.md (the tables of benchmarks/README.md), gpu.log (what the parts printed); and as each benchmark does, a line to
benchmarks/results.jsonl. Exit status: 0 if something was measured.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
RESULTS = HERE / "results.jsonl"
NEEDED = ("torch", "numpy", "tiktoken")
WANTED = {  # module: what is lost without it
    "kernels": "FlashAttention-3",
    "flash_attn.cute": "FlashAttention-4 and the back ends on it",
    "triton": "torch.compile",
    "rustbpe": "preparing data",
    "pyarrow": "preparing data",
    "requests": "downloads",
    "filelock": "preparing data",
    "tqdm": "preparing data",
    "psutil": "lab night",
}
NEEDS = {"fa3": "kernels", "varlen4": "flash_attn.cute", "flash4": "flash_attn.cute", "flex4": "flash_attn.cute"}
ALWAYS = ("machine", "data")
RESERVE = 3  # seconds of the whole that are left for writing the report


class Part(NamedTuple):
    name: str
    limit: int  # seconds
    least: int  # with fewer seconds left it is not begun
    command: list  # arguments of python, from ROOT
    needs: str = ""  # a module without which it is not begun


def parts(dry):
    """The parts in order: what the targets in benchmarks/README.md need comes first. dry: tiny sizes, for a test."""

    def step(attention, *settings, name=None, compiled="yes"):
        command = ["benchmarks/step.py", "--attention", attention, "--compile", compiled]
        command += ["--steps", "1", "--batch", "4"] if dry else ["--steps", "5"]
        settings += (f"TOTAL_BATCH_SIZE={4 * row_length()}", "DEPTH=2", "MODEL_DIM=64") if dry else ()
        command += ["--set", *settings] if settings else []
        return Part(name or f"step-{attention}", 120, 25, command, NEEDS.get(attention, ""))

    full = 'WINDOW_PATTERN="L"'
    if dry:
        steps, later = [step("sdpa", compiled="no"), step("flash4")], [step("sdpa", full, name="step-L", compiled="no")]
    else:
        steps = [step(attention) for attention in ("flex", "fa3", "varlen4", "flash4", "flex4")]
        later = [
            step("flex", full, name="step-L-flex"),
            step("fa3", full, name="step-L-fa3"),
            step("varlen"),
            step("sdpa"),
        ]
        later += [step("sdpa", name="step-eager", compiled="no")]
    evaluate = ["--repeats", "1", "--compile", "no"] if dry else ["--repeats", "3"]
    return [
        Part("machine", 90, 0, ["benchmarks/gpu.py", "--child", "machine"]),
        Part("data", 90, 10, ["benchmarks/gpu.py", "--child", "data"]),
        Part("doctor", 120, 20, ["-m", "lab", "doctor", "--json", *(["--quick"] if dry else ["--seconds", "10"])]),
        *steps,
        Part("overhead", 180, 60, ["benchmarks/overhead.py", "--budget", "1" if dry else "5", "--repeats", "1"]),
        Part("evaluate", 120, 40, ["benchmarks/evaluate.py", *evaluate]),
        *later,
        Part("run", 900, 10 if dry else 340, ["benchmarks/gpu.py", "--child", "run"]),
    ]


def row_length():
    sys.path.insert(0, str(ROOT))
    from constants import MAX_SEQ_LEN

    return MAX_SEQ_LEN


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-report"), help="folder of the report (default: gpu-report)"
    )
    parser.add_argument("--minutes", type=float, default=9, help="the whole takes no longer (default: 9)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these (and the data for them)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes: checks this script on a machine without a GPU")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--child", choices=["machine", "data", "run"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print("RESULT " + json.dumps({"machine": machine, "data": data, "run": whole_run}[args.child]()))
    plan = parts(args.dry)
    if args.list:
        return print("\n".join(f"{p.name:<12} at most {p.limit:>3} s   python {' '.join(p.command)}" for p in plan))
    if unknown := set(args.parts or ()) - {p.name for p in plan}:
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such part: --list prints them")
    chosen = [p for p in plan if not args.parts or p.name in (*args.parts, *ALWAYS)]
    deadline = time.monotonic() + 60 * args.minutes - RESERVE
    if missing := [name for name in NEEDED if not installed(name)]:
        raise SystemExit(
            f"{sys.executable} lacks {', '.join(missing)}: use a Python that has them, or add them to PYTHONPATH"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM: the report holds the parts that ended"))
    with tempfile.TemporaryDirectory(prefix="autoresearch-gpu-") as folder:
        report = measure(chosen, args.out, deadline, Path(folder))
    print(f"{args.out / 'gpu.md'}, {args.out / 'gpu.json'}")
    if not any(part["status"] == "ok" for part in report["parts"] if part["name"] not in ALWAYS):
        raise SystemExit(f"nothing was measured: {args.out / 'gpu.log'} says why")


def measure(chosen, out, deadline, folder):
    """Runs the parts and writes the report after each; returns it. folder: for caches that end with this process."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    absent = {name: lost for name, lost in WANTED.items() if not installed(name)}
    report = {"format": 1, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": commit(), "machine": {}, "data": {}}
    report |= {"missing": absent, "parts": []}
    if absent:
        print("not installed: " + ", ".join(f"{name} ({lost})" for name, lost in absent.items()), flush=True)
    env = os.environ | {"AUTORESEARCH_GPU_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compile"))  # shared, so that only the first part is cold
    env.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # flash-attn-4 otherwise compiles in each process
    env.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder / "flash4"))
    for part in chosen:
        done = run_part(part, deadline, env, log)
        report["parts"].append(done)
        if part.name == "machine" and done["result"]:
            report["machine"] = done["result"]
        if part.name == "data" and done["result"]:
            report["data"] = done["result"]
            env["AUTORESEARCH_CACHE"] = done["result"]["cache"]
        write(out / "gpu.json", json.dumps(report, indent=1) + "\n")
        write(out / "gpu.md", markdown(report))
        print(f"{part.name:<12} {done['seconds']:>6.1f} s  {done['status']}  {done['reason']}".rstrip(), flush=True)
        if part.name == "machine" and done["status"] != "ok":
            raise SystemExit(f"torch does not work here: {done['reason']}")
    return report


def run_part(part, deadline, env, log):
    """{name, status, seconds, reason, result} of a part. status: ok, failed, timed out, no time, not installed. Ends with all of its
    processes."""
    left = deadline - time.monotonic()
    answer = {"name": part.name, "status": "no time", "seconds": 0.0, "reason": "", "result": None}
    if part.needs and not installed(part.needs):
        return answer | {"status": "not installed", "reason": f"it needs {part.needs}"}
    if left < part.least:
        return answer | {"reason": f"{max(left, 0):.0f} s were left, it needs {part.least}"}
    before, limit = size(RESULTS), min(part.limit, left)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
        try:
            rc = process.wait(limit)
        except subprocess.TimeoutExpired:
            rc = None
        finally:
            end_group(process)
        out.seek(0), err.seek(0)
        printed, complaint = out.read(), err.read()
    seconds = time.monotonic() - began
    with log.open("a") as f:
        f.write(f"--- {part.name}: python {' '.join(part.command)}\n{printed}\n{complaint}\n")
    answer |= {"seconds": round(seconds, 1), "result": result_of(part, printed, before)}
    if rc is None:
        return answer | {"status": "timed out", "reason": f"was ended after {limit:.0f} s"}
    if part.name == "doctor" and answer["result"]:  # exit status 1 is a verdict
        return answer | {"status": "ok", "reason": answer["result"].get("verdict", "")}
    if rc or answer["result"] is None:
        return answer | {"status": "failed", "reason": reason_of(rc, printed, complaint)}
    return answer | {"status": "ok"}


def result_of(part, printed, before):
    """What a part measured: the line it added to results.jsonl, or the JSON it printed. None if it has nothing."""
    try:
        if part.name == "doctor":
            return json.loads(printed)
        if found := re.search(r"^RESULT (.*)$", printed, re.MULTILINE):
            return json.loads(found[1])
        with RESULTS.open("rb") as f:
            f.seek(before)
            lines = f.read().decode().splitlines()
        return json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None


def reason_of(rc, printed, complaint, limit=300):
    """The line that says most about a failure."""
    for line in printed.splitlines():
        if ": not run: " in line:
            return line.partition(": not run: ")[2][:limit]
    lines = [line for line in complaint.splitlines() if line.strip()]
    return lines[-1].strip()[:limit] if lines else f"exit status {rc} and no result"


def end_group(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def installed(name):
    try:
        return find_spec(name) is not None
    except ImportError:  # its parent package is missing
        return False


def size(path):
    return path.stat().st_size if path.exists() else 0


def write(path, text):
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def commit():
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


# ---------------------------------------------------------------------------------------------------
# Children: they may import torch


def machine():
    """Hardware and versions. A GPU that does not answer is an error here and not in each part."""
    import platform

    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
    found |= {"hip": torch.version.hip, "cores": os.cpu_count(), "system": platform.platform()}
    if torch.cuda.is_available():
        torch.ones(8, device="cuda").sum().item()
        device = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": device.name,
            "memory_mb": device.total_memory // 2**20,
            "capability": f"{device.major}.{device.minor}",
        }
        found |= {"multiprocessors": device.multi_processor_count, "gpus": torch.cuda.device_count()}
        if torch.version.cuda:
            found["driver"] = driver()
    return found


def driver():
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def data():
    """{"cache": folder, "kind": "prepared" or "random", ...}: data for all other parts."""
    import common

    prepare, _ = common.core()
    layout = sys.modules["corpus.layout"]
    facts = {"dataset": layout.DATASET, "eval_tokens": layout.EVAL_TOKENS}
    if layout.read_manifest(prepare.data_dir() / "manifest.json"):
        return facts | {"cache": str(layout.cache_dir()), "kind": "prepared"}
    os.environ["AUTORESEARCH_CACHE"] = os.environ["AUTORESEARCH_GPU_CACHE"]
    lowest = common.write_random_tokens(prepare, 20_000_000 if layout.DATASET == "climbmix" else 200_000)
    return facts | {"cache": str(layout.cache_dir()), "kind": "random", "lowest_bpb": round(lowest, 6)}


def whole_run():
    """A run of train.py as a night has it, in a copy of the code: its summary and the lines above it."""
    import shutil

    import common

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        common.copy_code(folder)
        shutil.copy(ROOT / "train.py", folder)
        lines = []
        with subprocess.Popen([sys.executable, "train.py"], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:  # printed at once, so that the log has them if time runs out
                print(line, end="", flush=True)
                lines.append(line)
    if process.returncode:
        raise SystemExit(process.returncode)  # its own last line says why
    above, _, summary = "".join(lines).rpartition("\n---\n")
    values = {key: float(value) for key, value in re.findall(r"^(\w+):\s+([\d.]+)$", summary, re.MULTILINE)}
    said = dict(re.findall(r"^(attention|torch\.compile|device batch|dtype): (.*)$", above, re.MULTILINE))
    return {
        "summary": values,
        "said": said,
        "progress": [line for line in above.splitlines() if line.startswith("step ")],
    }


# ---------------------------------------------------------------------------------------------------
# The report


def steps_of(report):
    """(part's name, row of step.py) of each combination that was measured."""
    found = [(p["name"], p["result"]) for p in report["parts"] if p["name"].startswith("step-") and p["result"]]
    return [(name, row) for name, result in found for row in result.get("results", [])]


def goals(report):
    """[(target, measured or None, met or None)]. Unknown is None, never a guess."""
    by_name = {p["name"]: p["result"] for p in report["parts"] if p["result"]}
    defaults = [row for name, row in steps_of(report) if not name.startswith(("step-L", "step-eager"))]
    known = [row["mfu_percent"] for row in defaults if row["mfu_percent"] > 0]
    flex = next((row for row in defaults if row["attention"] == "flex"), None)
    peak = min((row["peak_mb"] for row in defaults if row["peak_mb"] and row["batch"].startswith("128x")), default=None)
    beyond = by_name.get("overhead", {}).get("beyond_training")
    audited = by_name.get("evaluate", {}).get("seconds", {}).get("audited")
    evaluation = sorted(audited)[len(audited) // 2] if audited else None
    flex_mfu = flex["mfu_percent"] if flex and flex["mfu_percent"] > 0 else None
    return [
        goal("MFU of the best back end, %", max(known, default=None), least=50),
        goal("MFU with FlexAttention, %", flex_mfu, least=40),
        goal("seconds besides training, cold", beyond[0] if beyond else None, most=None),
        goal("seconds besides training, warm", min(beyond[1:]) if beyond else None, most=15),
        goal("audited evaluation of all val rows, s", evaluation, most=6),
        goal("peak memory at 128 rows, MB", peak, most=45_000),
    ]


def goal(name, measured, least=None, most=None):
    if least is not None:
        return f"{name} (at least {least:,})", measured, None if measured is None else measured >= least
    if most is not None:
        return f"{name} (at most {most:,})", measured, None if measured is None else measured <= most
    return name, measured, None


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells]) + "\n"


def markdown(report):
    """The report as text for benchmarks/README.md."""
    m, data = report["machine"], report["data"]
    gpu = f"{m['gpu']}, {m['memory_mb']:,} MB, driver {m.get('driver')}" if m.get("gpu") else "no GPU"
    origin = {"prepared": "prepared", "random": "random tokens in its layout"}.get(data.get("kind"), "not provided")
    text = [
        "## On a GPU\n",
        f"`python benchmarks/gpu.py`, {report['when']}, commit {report['commit']}: {gpu}, {m.get('cores')} cores, Python "
        f"{m.get('python')}, torch {m.get('torch')}. Data: {data.get('dataset')}, {origin}.\n",
    ]
    shown = [
        (name, "-" if value is None else f"{value:,.2f}", {True: "yes", False: "no", None: "-"}[met])
        for name, value, met in goals(report)
    ]
    text.append(table(["target", "measured", "met"], shown))
    if steps := steps_of(report):
        names = ["data", "forward", "backward", "optimizer", "gaps", "step", "bare"]
        head = ["part", "mode", "batch", *names, "loop / bare", "tokens/s", "MFU %", "peak MB", "warm-up, s"]
        rows = [
            [name, r["mode"], r["batch"], *(f"{r[f'{n}_ms']:.2f}" for n in names), f"{r['loop_over_bare']:.3f}"]
            + [f"{r['tokens_per_second']:,}", r["mfu_percent"], f"{r['peak_mb']:,}", r["warm_up_seconds"]]
            for name, r in steps
        ]
        text.append("Training steps, milliseconds (`step.py`):\n\n" + table(head, rows))
    by_name = {p["name"]: p["result"] for p in report["parts"] if p["result"]}
    if "overhead" in by_name:
        first, later = by_name["overhead"]["first"], by_name["overhead"]["later"]
        rows = [[s.replace("_", " "), f"{v:.2f}", f"{later[0].get(s, 0):.2f}"] for s, v in first.items()]
        text.append("A run's stages, seconds (`overhead.py`):\n\n" + table(["stage", "cold", "warm"], rows))
    if "evaluate" in by_name:
        e = by_name["evaluate"]
        rows = [
            [name, *(f"{min(v):.2f}", f"{sorted(v)[len(v) // 2]:.2f}", f"{max(v):.2f}")]
            for name, v in e["seconds"].items()
        ]
        text.append(
            f"Evaluation of {e['tokens']:,} tokens with {e['attention']}, seconds (`evaluate.py`):\n\n"
            + table(["what", "least", "median", "most"], rows)
        )
    if "run" in by_name:
        text.append("A whole run:\n\n" + table(["key", "value"], by_name["run"]["summary"].items()))
        if data.get("lowest_bpb"):
            text.append(
                f"No model can score lower than {data['lowest_bpb']:.4f} bits per byte on these random tokens.\n"
            )
    if "doctor" in by_name:
        d = by_name["doctor"]
        text.append(f"`lab doctor`: {d.get('verdict')}\n")
        rows = [[c["name"], c["level"], c["text"], c["remedy"]] for c in d.get("checks", []) if c["level"] != "ok"]
        if rows:
            text.append(table(["check", "level", "finding", "remedy"], rows))
        if measured := [[k, v] for k, v in d.get("measured", {}).items() if v is not None]:
            text.append(table(["measured", "value"], measured))
    rest = [f"- {p['name']}: {p['status']}: {p['reason']}" for p in report["parts"] if p["status"] != "ok"]
    rest += [f"- {name} is not installed: {lost}" for name, lost in report["missing"].items()]
    if rest:
        text.append("Not measured:\n\n" + "\n".join(rest) + "\n")
    return "\n".join(text)


if __name__ == "__main__":
    main()
