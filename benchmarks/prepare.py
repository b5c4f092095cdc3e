"""How long does `prepare.py` take on climbmix's layout, and how much memory?

    uv run benchmarks/prepare.py            4 training shards of 60 MB of text, validation and holdout (5 minutes, 1 GB of disk)
    uv run benchmarks/prepare.py --cores 1                         the same on one core: how does it scale?
    uv run benchmarks/prepare.py --shards 10 --characters 250e6    ClimbMix's own size (half an hour, 8 GB of disk)

A local server replaces the hub and the text is made up; everything else, including the rules, is real. Prints a table
and appends a line to benchmarks/results.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import common
import psutil

EVAL_CHARACTERS = 130_000_000  # of validation and of holdout: enough to pack EVAL_TOKENS from


def main():
    sys.path.append(str(common.ROOT / "tests"))
    from hub import Hub

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=4, help="training shards (default: 4)")
    parser.add_argument("--characters", type=float, default=60e6, help="of text in each (default: 60e6)")
    parser.add_argument("--cores", type=int, help="cores that prepare.py may use (default: all)")
    args = parser.parse_args()
    shards = [(i, args.characters) for i in range(args.shards)] + [(i, EVAL_CHARACTERS) for i in (6541, 6542)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {f"shard_{i:05d}.parquet": folder / f"{i}.parquet" for i, _ in shards}
        print("making up text")
        with ProcessPoolExecutor() as pool:
            jobs = [pool.submit(common.write_shard, folder / f"{i}.parquet", i, n) for i, n in shards]
            for job in jobs:
                job.result()
        code = folder / "code"
        code.mkdir()
        common.copy_code(code)
        with Hub(files) as hub:
            env = os.environ | {
                "AUTORESEARCH_DATASET": "climbmix",
                "AUTORESEARCH_CACHE": str(folder / "cache"),
            }
            env |= {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": "*"}
            command = [sys.executable, "prepare.py", "--num-shards", str(args.shards)]
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores[: args.cores])  # child processes inherit it
            result = vars(args) | measure(command, code, env, folder / "cache" / "climbmix")
            os.sched_setaffinity(0, cores)
        again = time.perf_counter()
        subprocess.run(command, cwd=code, env=env, check=True, stdout=subprocess.DEVNULL)
        result["second_run_seconds"] = round(time.perf_counter() - again, 2)
    print()
    for key, value in result.items():
        print(f"{key:<32}{'all' if value is None else f'{value:,}':>16}")
    print(common.hardware())
    common.record("prepare", result)


def measure(command, code, env, data):
    """Runs prepare.py; the modification times of its files separate the stages."""
    start = time.time()
    process = subprocess.Popen(command, cwd=code, env=env)
    peak_tree = peak_process = 0
    cpu_seconds, samples = {}, []  # of each process by its id; (time, sum over all)
    while process.poll() is None:
        sizes = [0]
        for p in [(parent := psutil.Process(process.pid)), *parent.children(recursive=True)]:
            try:
                sizes.append(p.memory_info().rss)
                cpu_seconds[p.pid] = sum(p.cpu_times()[:2])
            except psutil.NoSuchProcess:
                pass
        peak_tree, peak_process = max(peak_tree, sum(sizes)), max(peak_process, *sizes)
        samples.append((time.time(), sum(cpu_seconds.values())))
        time.sleep(0.1)
    end = time.time()
    if process.returncode:
        raise SystemExit(f"prepare.py ended with {process.returncode}")
    (manifest,) = data.glob("*/manifest.json")
    root = manifest.parent
    downloaded = max(p.stat().st_mtime for p in (data / "raw").glob("*.parquet"))
    trained, packed = ((root / name).stat().st_mtime for name in ("tokenizer.tiktoken", "holdout_rows.npy"))
    tokenised = max(p.stat().st_mtime for p in root.glob("train_*.npy"))
    files = json.loads(manifest.read_text())["files"]
    tokens = sum(entry["tokens"] for entry in files.values() if "documents" in entry)
    before, after = (
        next((cpu for when, cpu in samples if when >= t), samples[-1][1]) for t in (packed, tokenised)
    )
    return {
        "train_tokens": tokens,
        "download_seconds": round(downloaded - start, 1),
        "tokenizer_seconds": round(trained - downloaded, 1),
        "evaluation_rows_seconds": round(packed - trained, 1),
        "tokenise_train_seconds": round(tokenised - packed, 1),
        "seconds": round(end - start, 1),
        "tokenise_train_cpu_seconds": round(after - before, 1),
        "tokens_per_cpu_second": round(tokens / (after - before)),
        "peak_rss_mb_of_all_processes": round(peak_tree / 1e6),
        "peak_rss_mb_of_one_process": round(peak_process / 1e6),
    }


if __name__ == "__main__":
    main()
