"""How fast is the dashboard with 1,000 experiments, and how much memory does it take?

    uv run benchmarks/dashboard.py

Makes a tree with 1,000 rows and their runs.jsonl, starts `lab dashboard` on it and requests over HTTP: the page (first
with nothing cached, then a second time, then after a row was added), the strip of the run in progress, the chart, and the
whole night as JSON. Prints a table (medians of REPEATS, with their range) and appends a line to benchmarks/results.jsonl.
"""

import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import common
import psutil

ROWS = 1000
REPEATS = 20


def write_tree(folder):
    """Writes results.tsv and runs.jsonl of ROWS experiments as lab record does, and a run.log."""
    sys.path[0] = str(common.ROOT)
    sys.path.append(str(common.ROOT / "tests"))
    from fakenight import PROGRESS

    from lab.store import results_tsv, runs_jsonl

    rng, best, records = random.Random(0), 1.0, []
    for i in range(1, ROWS + 1):
        value = best + rng.gauss(0.002, 0.002)
        kept = value < best or i == 1
        best = min(best, value)
        commit = f"{rng.getrandbits(160):040x}"
        summary = {"val_bpb": value, "training_seconds": 300.1, "total_seconds": 325.9, "peak_vram_mb": 45060.2, "mfu_percent": 39.8,
                   "total_tokens_M": 499.6, "num_steps": 953, "num_params_M": 50.3, "depth": 8}  # fmt: skip
        start = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(1.79e9 + 330 * i))
        records.append({
            "run_id": f"{i:032x}", "tag": "x", "commit": commit, "short": commit[:7], "row": i, "verdict": "keep" if kept else "discard",
            "description": f"experiment {i}: " + "some words on what was changed " * 3, "baseline": i == 1, "code": f"{i:064x}", "parent": None,
            "header": {"seed": 42, "device": "cuda (x)"}, "summary": summary, "mean": value, "n": 1, "gain": None, "sigma": 0.002,
            "memory_gb": 44.0, "start": start, "end": start,
        })  # fmt: skip
    runs_jsonl.save_runs(folder / "runs.jsonl", records)
    (folder / "results.tsv").write_text(results_tsv.table(records))
    (folder / "run.log").write_text("run: {}\n" + PROGRESS * 30)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_tree(folder)
        command = [sys.executable, "-m", "lab", "dashboard", "--port", "0", "--tree", str(folder)]
        env = os.environ | {"PYTHONPATH": str(common.ROOT)}
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
        try:
            url = re.match(r"(http://\S+/)", process.stdout.readline())[1]
            result = measure(url, folder, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait()
    print(f"\n{ROWS} experiments; medians of {REPEATS} (from, to), milliseconds")
    for name, values in result["milliseconds"].items():
        print(f"{name:<34}{statistics.median(values):>8.1f}   {min(values):.1f} to {max(values):.1f}")
    print(f"{'resident memory, MB':<34}{result['rss_mb']:>8}")
    common.record("dashboard", result | {"rows": ROWS, "repeats": REPEATS})


def measure(url, folder, process):
    def milliseconds(path):
        began = time.perf_counter()
        with urllib.request.urlopen(url + path) as answer:
            answer.read()
        return 1000 * (time.perf_counter() - began)

    for _ in range(200):
        try:
            milliseconds("health")
            break
        except OSError:
            time.sleep(0.05)
    times = {"first page, nothing read yet": [milliseconds("")]}
    times["page again"] = [milliseconds("") for _ in range(REPEATS)]
    after = times["page after a row was added"] = []
    table = folder / "results.tsv"
    for i in range(REPEATS):
        table.write_text(table.read_text() + f"{i + 1:07x}\t1.000000\t44.0\tdiscard\tone more\n")
        after.append(milliseconds(""))
    for name, path in [
        ("live strip", "api/live"),
        ("chart", "api/chart"),
        ("the whole night as JSON", "api/experiments"),
    ]:
        times[name] = [milliseconds(path) for _ in range(REPEATS)]
    rounded = {name: [round(t, 2) for t in values] for name, values in times.items()}
    return {"milliseconds": rounded, "rss_mb": round(process.memory_info().rss / 1e6)}


if __name__ == "__main__":
    main()
