"""The rules of a run: everything that two val_bpb must share before they can be compared.

Never edited during a run, neither by the agent nor by the human. To use other rules (smaller
hardware, a shorter budget), fork, edit this file, run `uv run prepare.py` again and start a new
branch: `lab record` refuses to mix results from different rules.
"""

import os
from typing import NamedTuple

TIME_BUDGET = 300  # seconds of training, wall clock, from the first counted step to evaluation
GRACE = 300  # seconds allowed for set-up, and again for evaluation, before the watchdog ends the run


class Rules(NamedTuple):
    max_seq_len: int  # T: tokens in a row of training or evaluation
    eval_tokens: int  # targets scored for val_bpb, a multiple of max_seq_len
    vocab_size: int  # V: ordinary tokens plus the four special ones; below 2**16 (stored as uint16)


DATASETS = {
    "climbmix": Rules(max_seq_len=2048, eval_tokens=40 * 524288, vocab_size=8192),
    "tinystories": Rules(max_seq_len=512, eval_tokens=2**20, vocab_size=4096),
    "stdlib": Rules(max_seq_len=256, eval_tokens=2**17, vocab_size=2048),
}

DATASET = os.environ.get("AUTORESEARCH_DATASET") or "climbmix"
if DATASET not in DATASETS:
    raise SystemExit(f"AUTORESEARCH_DATASET={DATASET!r} is unknown: set it to one of {', '.join(DATASETS)}")

MAX_SEQ_LEN, EVAL_TOKENS, VOCAB_SIZE = DATASETS[DATASET]
