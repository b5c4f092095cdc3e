"""What the defaults of train.py should become on a machine, and how many experiments a night has there."""

import math

NIGHT_HOURS = 8
AGENT_SECONDS = 42  # between two runs, in the mean of a published night of 126 experiments
KEPT = 0.25  # fraction of the experiments that are archived at most; 22 of 126 in that night
# Memory of the default model in bfloat16, as `uv run benchmarks/memory.py` computes it (README's table): parameters,
# gradients and optimizer state take 0.8 GB, the CUDA context and the allocator about 1 GB, the rest grows with the rows.
FIXED_GB, GB_PER_TOKEN = 1.8, 48.2 / (128 * 2048)
USABLE = 0.93  # of a GPU's memory: driver and fragmentation take the rest
FEW_STEPS, ENOUGH_STEPS = 300, 500  # optimizer steps in a run; the published run has 953
SMALL_TOKENS = 8 * 2048  # in a device batch of the default model: of a GPU with 6 GB
SMALLEST_BATCH = 2**14  # tokens in an optimizer step that is advised


def rows_that_fit(memory, row_tokens, is_float32=False):
    """Estimate of the device batch (rows, a power of two) of the default model in `memory` bytes; 0 if none fits."""
    per_row = GB_PER_TOKEN * row_tokens * (2 if is_float32 else 1)
    rows = (USABLE * memory / 1e9 - FIXED_GB) / per_row
    return 2 ** int(math.log2(rows)) if rows >= 1 else 0


def night_of_archives(checkpoint, seconds_a_run=360):
    """Bytes that runs/ takes after a night, for checkpoints of that many bytes."""
    return checkpoint * math.ceil(KEPT * NIGHT_HOURS * 3600 / (seconds_a_run + AGENT_SECONDS))


def experiments(budget, setup_seconds, eval_seconds):
    """Experiments in a night: training, the rest of a run, and the time that the agent thinks."""
    return int(NIGHT_HOURS * 3600 / (budget + setup_seconds + eval_seconds + AGENT_SECONDS))


def knobs(train, dataset, budget, rows, tokens_per_second):
    """{knob: value} to try, as README's table of smaller hardware has them. train: its knobs, as probes report them.

    rows: of the device batch that fits, measured or estimated, or None; tokens_per_second: measured, or None."""
    advised, total = {}, train["TOTAL_BATCH_SIZE"]
    if train["device"] == "cuda" and rows is not None and rows < train["DEVICE_BATCH_SIZE"]:
        advised["DEVICE_BATCH_SIZE"] = max(rows, 1)
        tokens = rows * train["MAX_SEQ_LEN"]  # that fit into memory at once
        if tokens <= SMALL_TOKENS:
            advised |= {"DEPTH": min(4, train["DEPTH"])} | (
                {"AUTORESEARCH_DATASET": "tinystories"} if dataset == "climbmix" else {}
            )
        total = min(total, 2**14 if tokens <= SMALL_TOKENS else 2**16 if tokens <= 2 * SMALL_TOKENS else total)
    if tokens_per_second:
        steps = budget * tokens_per_second / total
        if steps < FEW_STEPS:
            while total > SMALLEST_BATCH and steps < ENOUGH_STEPS:
                total, steps = total // 2, 2 * steps
            if steps < FEW_STEPS and train["DEPTH"] > 4:
                advised["DEPTH"] = 4
    if total < train["TOTAL_BATCH_SIZE"]:
        advised["TOTAL_BATCH_SIZE"] = total
    if advised.get("DEVICE_BATCH_SIZE") and advised.get("TOTAL_BATCH_SIZE"):  # a micro-batch is no larger than a step
        most = max(1, advised["TOTAL_BATCH_SIZE"] // train["MAX_SEQ_LEN"])
        advised["DEVICE_BATCH_SIZE"] = min(advised["DEVICE_BATCH_SIZE"], most)
    return advised
