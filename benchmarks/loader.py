"""How fast is the dataloader on one core, compared with a naive one that tokenises during training?

    uv run benchmarks/loader.py                                  made-up text of natural lengths (2 minutes)
    uv run benchmarks/loader.py --readers 1 2 8                  several trainings that read the same shards at once
    AUTORESEARCH_DATASET=stdlib uv run benchmarks/loader.py      the prepared standard library

Prints a table and appends a line to benchmarks/results.jsonl. The naive loader is the tests' oracle, and the first rows
of both are compared before anything is timed. Time is the CPU time of this one thread, which on an idle core equals
wall-clock time. With --readers each reader is a process on any core, and time is wall-clock time over all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import common

SHAPES = [(128, 2048), (16, 512)]  # (B, T)
REPEATS = 7
SHARD_CHARACTERS = 40_000_000


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--readers", type=int, nargs="+", help="how many trainings read at once")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read or args.readers:
        prepare, _ = common.core()
        with common.data(prepare):
            return read(prepare, float(args.read)) if args.read else measure_readers(prepare, args.readers)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core for both
    if os.environ.get("AUTORESEARCH_DATASET") == "stdlib":
        return measure(common.ROOT, "stdlib")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["AUTORESEARCH_DATASET"] = "climbmix"
        os.environ["AUTORESEARCH_CACHE"] = str(folder / "cache")
        raw = folder / "cache" / "climbmix" / "raw"
        raw.mkdir(parents=True)
        print("making up text")
        for seed, (shard, characters) in enumerate(
            [(0, SHARD_CHARACTERS), (1, SHARD_CHARACTERS), (6541, 4e6), (6542, 4e6)]
        ):
            common.write_shard(raw / f"shard_{shard:05d}.parquet", seed, characters)
        common.copy_code(folder, eval_tokens=2048 * 64)
        subprocess.run([sys.executable, "prepare.py", "--num-shards", "2"], cwd=folder, check=True)
        measure(folder, "made up")


def read(prepare, until):
    """One reader: prints the number of tokens that it read between a given start time and its end."""
    import torch

    torch.set_num_threads(1)
    B, T = SHAPES[0]
    with common.clock(prepare):
        batches = prepare.make_dataloader(prepare.load_tokenizer(), B, T, "train")
        for _ in range(64):
            next(batches)
        print("ready", flush=True)
        begin = float(input())
        time.sleep(max(0, begin - time.time()))
        n = 0
        while time.time() < begin + until:
            next(batches)
            n += 1
    print(n * B * T)


def measure_readers(prepare, counts, seconds=5):
    rows = []
    for readers in counts:
        command = [sys.executable, __file__, "--read", str(seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, **pipes) for _ in range(readers)]
        for process in processes:
            assert process.stdout.readline() == "ready\n", "a reader failed: its message stands above"
        begin = time.time() + 0.5
        for process in processes:
            process.stdin.write(f"{begin}\n")
            process.stdin.flush()
        totals = [json.loads(process.communicate()[0]) for process in processes]
        rows.append({"readers": readers, "tokens_per_second": round(sum(totals) / seconds)})
        rows[-1] |= {"slowest": round(min(totals) / seconds), "fastest": round(max(totals) / seconds)}
    print(f"{'readers':>8} {'all':>14} {'slowest':>14} {'fastest':>14}   tokens/s over {seconds} s, {SHAPES[0]}")
    for r in rows:
        print(f"{r['readers']:>8}", *(f"{r[name]:>14,}" for name in ("tokens_per_second", "slowest", "fastest")))
    common.record("loader_readers", {"B": SHAPES[0][0], "T": SHAPES[0][1], "seconds": seconds, "results": rows})


def measure(folder, data):
    sys.path[0] = str(folder)  # not benchmarks/, which has another prepare.py
    sys.path.append(str(common.ROOT / "tests"))
    import oracle
    import torch

    import prepare
    from corpus.datasets import document_batches, raw_sources
    from corpus.layout import raw_dir

    torch.set_num_threads(1)
    prepare._run = SimpleNamespace(started=0.0, stopped=None, device=torch.device("cpu"))
    tokenizer = prepare.load_tokenizer()
    sources = raw_sources("train", prepare.load_manifest()["train_shards"])

    def read_texts():
        return (text for batch in document_batches(raw_dir(), sources) for text in batch)

    for T in (512, 2048):
        naive = oracle.rows_from_tokens(
            (tokenizer.encode(t) for t in read_texts()), T, tokenizer.bos_id, epochs=1
        )
        for _, (x, y, _) in zip(range(20), prepare.make_dataloader(tokenizer, 1, T, "train"), strict=False):
            assert x[0].tolist() + y[0, -1:].tolist() == next(naive), "the loader's rows are not the oracle's"

    def tokens_per_second(batches, B, T, n):
        """Median over REPEATS of n batches each, after the buffer has settled."""
        for _ in range(3 * n):
            next(batches)
        rates = []
        for _ in range(REPEATS):
            began = time.process_time()
            for _ in range(n):
                next(batches)
            rates.append(n * B * T / (time.process_time() - began))
        return statistics.median(rates)

    rows = []
    for B, T in SHAPES:
        batch_tokens = B * T
        ours = prepare.make_dataloader(tokenizer, B, T, "train")
        naive = oracle.batches_from_text(read_texts, tokenizer.encoding, B, T, tokenizer.bos_id)
        ours = tokens_per_second(ours, B, T, 2**26 // batch_tokens)
        naive = tokens_per_second(naive, B, T, max(1, 2**18 // batch_tokens))
        rows.append(
            {
                "B": B,
                "T": T,
                "tokens_per_second": round(ours),
                "oracle": round(naive),
                "ratio": round(ours / naive),
            }
        )
    print(
        f"\n{'B x T':>10} {'loader':>14} {'oracle':>14} {'ratio':>7}   tokens/s on one core, medians of {REPEATS}; {data}"
    )
    for r in rows:
        shape = f"{r['B']} x {r['T']}"
        print(f"{shape:>10} {r['tokens_per_second']:>14,} {r['oracle']:>14,} {r['ratio']:>7}")
    print(common.hardware())
    common.record("loader", {"data": data, "repeats": REPEATS, "results": rows})


if __name__ == "__main__":
    main()
