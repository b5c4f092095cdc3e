"""How long does `lab status --trees` take over a thousand working trees of a hundred rows each?

    uv run benchmarks/trees.py [TREES ROWS]

Makes up the trees in a temporary folder, with the files that `lab record` writes (results.tsv, runs.jsonl with a third of
the rows kept or repeated, run.log). Runs the command REPEATS times as a user would, prints the wall-clock time of each, and
appends a line to benchmarks/results.jsonl. Files come from the page cache: a shared file system adds its latency for
each of the three files of a tree.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

sys.path.append(str(common.ROOT))
from lab.store import results_tsv, runs_jsonl  # noqa: E402

REPEATS = 3
DEVICES = ["cuda (NVIDIA H100 80GB HBM3)", "cuda (NVIDIA A100-SXM4-80GB)"]
VERSIONS = {"python": "3.11.7", "torch": "2.9.0", "numpy": "2.4.6", "tiktoken": "0.14.0", "platform": "linux"}
SUMMARY = {
    "training_seconds": 300.1, "total_seconds": 325.9, "peak_vram_mb": 45060.2, "mfu_percent": 39.8,
    "total_tokens_M": 499.6, "num_steps": 953.0, "num_params_M": 50.3, "depth": 8.0,
}  # fmt: skip


def night(tag, device, rows, rng):
    """The records of a night: three runs of the baseline, then rows - 1 experiments, every seventh run twice."""
    best, records = 1.0, []
    for row in range(1, rows + 1):
        code, commit = f"{rng.getrandbits(256):064x}", f"{rng.getrandbits(160):040x}"
        value = 1.0 if row == 1 else best + rng.gauss(0.0005, 0.001)
        verdict = "keep" if row == 1 or value < best - 0.0007 else "crash" if row % 20 == 0 else "discard"
        best = min(best, value) if verdict == "keep" else best
        for i in range(n := 3 if row == 1 else 2 if row % 7 == 0 else 1):
            header = {
                "run_id": f"{rng.getrandbits(128):032x}", "start": f"2026-11-21T{row % 24:02d}:{i:02d}:00+00:00",
                "train_sha256": code, "rules_sha256": "a" * 64, "data_sha256": "b" * 64, "dataset": "climbmix",
                "seed": 42 + i, "device": device, "clock": "monotonic", "versions": VERSIONS,
            }  # fmt: skip
            last = i == n - 1
            records.append({
                "run_id": header["run_id"], "log": f"{rng.getrandbits(64):016x}", "tag": tag, "commit": commit,
                "short": commit[:7], "parent": None, "row": row if last else None,
                "verdict": verdict if last else "confirm", "description": f"experiment {row}: batch of 2**18 tokens",
                "mean": value, "n": n, "gain": None if row == 1 else (best - value) / 0.001, "best_known": best,
                "sigma": 0.001, "dof": 2, "memory_gb": 44.0, "why": "one run must gain 1.1σ", "discard": False,
                "simpler": False, "baseline": row == 1, "code": code, "blob": commit, "ended": "complete",
                "start": header["start"], "end": f"2026-11-21T{row % 24:02d}:{i + 6:02d}:00+00:00",
                "recorded": f"2026-11-21T{row % 24:02d}:{i + 7:02d}:00+00:00", "header": header,
                "summary": None if verdict == "crash" else SUMMARY | {"val_bpb": value + 0.0005 * i},
            })  # fmt: skip
    return records


def main():
    trees, rows = map(int, sys.argv[1:]) if len(sys.argv) == 3 else (1000, 100)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        size = 0
        for i in range(trees):
            place = Path(folder, f"user{i % 10}", f"task{i:04d}")
            place.mkdir(parents=True)
            records = night(f"nov21-{i}", DEVICES[i % 2], rows, rng)
            runs_jsonl.save_runs(place / "runs.jsonl", records)
            results_tsv.save_table(place / "results.tsv", records, place)
            (place / "run.log").write_text("step 00123 (41.0%) | loss 3.141593\n")
            size += (place / "runs.jsonl").stat().st_size
        print(f"{trees} trees of {rows} rows, {size / trees / 1000:.0f} kB of runs.jsonl each")
        seconds = []
        for _ in range(REPEATS):
            began = time.monotonic()
            command = [sys.executable, "-m", "lab", "status", "--trees", f"{folder}/*/*", "--json"]
            done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=True)
            seconds.append(round(time.monotonic() - began, 2))
            found = json.loads(done.stdout)["trees"]
            assert len(found) == trees and all(tree["rows"] == rows and tree["best"] for tree in found)
    print(f"{statistics.median(seconds)} s (median of {seconds}); {common.hardware()}")
    common.record("trees", {"trees": trees, "rows": rows, "runs_jsonl_mb": round(size / 1e6, 1), "seconds": seconds})


if __name__ == "__main__":
    main()
