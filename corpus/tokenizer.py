"""The tokenizer: byte-pair encoding over bytes, read from tiktoken's own text format.

tiktoken and numpy are imported where they are used, so that lab can import corpus.layout without loading them.
"""

import base64
from pathlib import Path

from constants import VOCAB_SIZE

# GPT-4's split pattern, but with digits in groups of one or two: a small vocabulary has no room for all groups of three.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>"]
NUM_ORDINARY = VOCAB_SIZE - len(SPECIAL_TOKENS)  # ids below this are text; this one is BOS
PIECE_CHARACTERS = 100_000  # tiktoken's regular expression overflows its stack on a run of a million spaces


class Tokenizer:
    """Ordinary tokens first, then the four special ones, the first of which is BOS."""

    def __init__(self, path):
        import tiktoken

        lines = [line.split() for line in Path(path).read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self.num_ordinary, self.vocab_size = len(ranks), len(ranks) + len(specials)
        self.bos_id = len(ranks)

    def pieces(self, text):
        """The text in pieces that are short enough for tiktoken, each tokenised separately."""
        return [text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS)]

    def encode(self, text):
        """Token ids of the text, without BOS. Names of special tokens are treated as text."""
        return [i for piece in self.pieces(text) for i in self.encoding.encode_ordinary(piece)]

    def decode(self, ids):
        return self.encoding.decode(list(ids))

    def token_bytes(self):
        """Number of bytes of each token, int32 (V,): of the bytes it stands for, not of its text when decoded alone.
        (A lone continuation byte is 1 byte; the replacement character it decodes to has 3.) Special tokens have 0."""
        import numpy as np

        sizes = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.num_ordinary)]
        return np.array(sizes + [0] * len(SPECIAL_TOKENS), dtype=np.int32)
