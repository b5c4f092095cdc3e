"""How well does a general compressor compress the text that val_bpb is measured on?

    AUTORESEARCH_DATASET=stdlib uv run benchmarks/xz.py

Prints bits per byte of `xz -9e` on the bytes of all scored targets of val_rows.npy, in order: a reference value for val_bpb.
"""

import lzma
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from constants import DATASET
from corpus.layout import data_dir, load_manifest
from corpus.tokenizer import NUM_ORDINARY, Tokenizer


def main():
    load_manifest()
    encoding = Tokenizer(data_dir() / "tokenizer.tiktoken").encoding
    targets = np.load(data_dir() / "val_rows.npy")[:, 1:].ravel()
    text = encoding.decode_bytes(targets[targets < NUM_ORDINARY].tolist())
    packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    print(f"{DATASET}: {len(text):,} bytes, xz -9e {8 * len(packed) / len(text):.4f} bits per byte")


if __name__ == "__main__":
    main()
