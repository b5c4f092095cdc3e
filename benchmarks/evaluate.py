"""How long does the evaluation take, and how much of that is the model's own forward pass?

    uv run benchmarks/evaluate.py                     this device's defaults, compiled if train.py compiles
    uv run benchmarks/evaluate.py --batch 64 --compile no

Times three things in turn, with an untrained model of the default size: the audited scoring of all val rows as a run does
it, their scoring alone, and a bare forward pass over as many rows (`model(x)`, nothing computed from the logits). The
audit costs the difference of the first two. Prints a table of medians of --repeats and appends a line to
benchmarks/results.jsonl.
"""

import argparse
import statistics
import time

import common


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, help="device batch in rows (default: train.py's)")
    parser.add_argument("--compile", choices=["yes", "no"], help="default: as train.py does here")
    parser.add_argument(
        "--attention", help="fa3, varlen, varlen4, flash4, flex, flex4 or sdpa (default: what train.py chooses)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each of the three (default: 5)")
    args = parser.parse_args()
    import numpy as np
    import torch

    prepare, train = common.core()
    with common.data(prepare) as data, common.clock(prepare) as clock:
        device = clock.device
        batch_size = args.batch or train.DEVICE_BATCH_SIZE
        model, optimizer = common.model(train, prepare, device)
        compiled = train.choose_compile(device)[0] if args.compile is None else args.compile == "yes"
        model.attention, _ = train.choose_attention(device, model.dtype, compiled)
        if args.attention:
            model.attention = common.attention(args.attention, train, device)
        train.set_compile(model, optimizer, compiled, device)
        model.eval()
        rows = np.load(prepare.data_dir() / "val_rows.npy")
        token_bytes = prepare.load_tokenizer().token_bytes()

        def score():
            prepare.score_rows(model, rows, token_bytes, batch_size)

        def audited():
            prepare.score_and_audit(model, rows, token_bytes, batch_size, draw="benchmark")

        @torch.no_grad()
        def forward():
            for x, _, _ in prepare.eval_batches(rows, batch_size, device):
                model(x)

        def seconds(work):
            began = time.perf_counter()
            work()
            getattr(torch, device.type).synchronize()
            return time.perf_counter() - began

        first = seconds(forward)
        times = {"audited": [], "scoring": [], "bare forward": []}
        for _ in range(args.repeats):
            for name, work in zip(times, (audited, score, forward), strict=True):
                times[name].append(seconds(work))
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    print(
        f"{model.attention.name}, {'compiled' if compiled else 'eager'}, batch {batch_size} x {rows.shape[1] - 1}, {data} data"
    )
    print(f"first forward pass (compiles, where it does): {first:.2f} s")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<14}{median:>8.3f} s   from {min(values):.3f} to {max(values):.3f}", end="")
        print("" if name == "audited" else f"   {tokens / median:,.0f} tokens/s")
    both, alone = (statistics.median(times[name]) for name in ("audited", "scoring"))
    print(f"the audit takes {both - alone:.2f} s, {100 * (both - alone) / both:.0f} % of the evaluation")
    result = {"attention": model.attention.name, "compiled": compiled, "batch": batch_size, "tokens": tokens}
    result |= {"device": clock.device_name, "data": data, "first_forward_seconds": first, "seconds": times}
    common.record("evaluate", result)


if __name__ == "__main__":
    main()
