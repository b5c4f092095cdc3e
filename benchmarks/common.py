"""Shared by the benchmarks: text with natural document lengths, a copy of the code to run, a line in results.jsonl."""

import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from base64 import b64encode
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
MEDIAN_CHARACTERS = 2600  # of a document; lengths are log-normal, as on the web


def natural_documents(seed, characters):
    """Yields texts of about `characters` characters in all: half code, half prose, from the standard library's sources.

    The sources are a few dozen MB and the benchmarks need hundreds, so some words of each document are replaced by
    made-up ones: otherwise the same chunks would repeat, and BPE and caches would look too good.
    """
    rng = random.Random(seed)
    code, prose = _sources()
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    while characters > 0:
        lines = rng.choice((code, prose))
        wanted = int(rng.lognormvariate(0, 1.0) * MEDIAN_CHARACTERS) + 20
        start = rng.randrange(len(lines))
        piece, length = [], 0
        while length < wanted:
            line = lines[start % len(lines)]
            piece.append(line)
            length += len(line)
            start += 1
        text = "".join(piece)[:wanted]
        for _ in range(1 + len(text) // 400):
            words = text[rng.randrange(len(text)) :][:200].split(None, 2)
            if len(words) > 1 and words[1].isalpha():
                made_up = "".join(rng.choice(syllables) for _ in range(rng.randint(2, 5)))
                text = text.replace(words[1], made_up, 4)
        characters -= len(text)
        yield text


def _sources():
    """(lines of code, lines of prose), in a fixed order: the prose is the text of docstrings."""
    code, prose = [], []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        code += text.splitlines(keepends=True)
        for docstring in re.findall(r'"""(.{80,}?)"""', text, flags=re.DOTALL):
            prose += [line.strip() + "\n" for line in docstring.splitlines()]
    return code, prose


def write_shard(path, seed, characters):
    """Writes a parquet file in climbmix's layout: zstd, a column `text`, row groups of 1,024 documents."""
    import pyarrow as pa  # here, so that what a GPU is measured with runs without it
    import pyarrow.parquet as pq

    texts = list(natural_documents(seed, characters))
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1024, compression="zstd")


def copy_code(folder, eval_tokens=None):
    """Copies the code to `folder`; eval_tokens replaces the number of tokens that climbmix scores."""
    for name in ("constants.py", "prepare.py"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("corpus", "frozen"):
        shutil.copytree(ROOT / name, folder / name)
    if eval_tokens:
        rules = (folder / "constants.py").read_text()
        rules, n = re.subn(r'("climbmix": .*eval_tokens=)[^,]+', rf"\g<1>{eval_tokens}", rules)
        assert n == 1, f"constants.py has {n} lines for climbmix's eval_tokens: expected 1"
        (folder / "constants.py").write_text(rules)


def core(folder=ROOT):
    """(prepare, train): the modules of a copy of the code."""
    sys.path[0] = str(folder)  # not benchmarks/, which has another prepare.py
    return import_module("prepare"), import_module("train")


@contextmanager
def clock(prepare):
    """A started clock of prepare, without a model to check, so that the loader hands out data."""
    watchdog = import_module("frozen.process").Watchdog(lambda: 0.0)
    clock = prepare._run = prepare.Run(time.monotonic, watchdog, prepare.pick_device(), 0, None, None)
    clock.begin()
    try:
        yield clock
    finally:
        clock.close()


@contextmanager
def data(prepare, tokens=20_000_000):
    """Provides data: the prepared ones, or random ones in a temporary folder. Yields which."""
    if manifest := import_module("corpus.layout").read_manifest(prepare.data_dir() / "manifest.json"):
        yield "random" if manifest.get("random") else "prepared"
        return
    kept = os.environ.get("AUTORESEARCH_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTORESEARCH_CACHE"] = folder
        write_random_tokens(prepare, tokens)
        try:
            yield "random"
        finally:
            os.environ.pop("AUTORESEARCH_CACHE")
            if kept is not None:
                os.environ["AUTORESEARCH_CACHE"] = kept


REPEATABLE = 0.5  # share of random tokens that follow from the one before: a model can learn these


def random_tokens(rng, shape, ordinary):
    """uint16 tokens of this shape. Along the last axis half of them are a fixed function of the token before and the
    others are uniform, so their entropy is known (entropy_of_random_tokens) and a training has something to learn."""
    tokens = rng.integers(0, ordinary, shape, dtype=np.uint16)
    follows = rng.random(shape, dtype=np.float32) < REPEATABLE
    for t in range(1, shape[-1]):
        successor = (5 * tokens[..., t - 1].astype(np.uint32) + 3) % ordinary
        tokens[..., t] = np.where(follows[..., t], successor, tokens[..., t])
    return tokens


def entropy_of_random_tokens(ordinary):
    """Nats per token of random_tokens, given the token before: no model can score lower on average."""
    other = (1 - REPEATABLE) / ordinary
    right = REPEATABLE + other
    return -right * math.log(right) - (ordinary - 1) * other * math.log(other)


def write_random_tokens(prepare, tokens):
    """Writes one shard of random tokens in documents of natural lengths, an untrained tokenizer and a manifest.

    Returns the bits per byte of the val rows that no model can beat on average."""
    layout = import_module("corpus.layout")
    root, rng = prepare.data_dir(), np.random.default_rng(0)
    root.mkdir(parents=True)
    V = prepare.NUM_ORDINARY
    lengths = (rng.lognormal(0, 1.0, 2 * tokens // 700) * MEDIAN_CHARACTERS / 4).astype(np.int64) + 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    chains = random_tokens(rng, (-(-offsets[-1] // 1000), 1000), V)
    shard = chains.reshape(-1)[: offsets[-1]]
    shard[offsets[:-1]] = V  # BOS
    path = root / "train_00000.npy"
    np.save(path, shard)
    np.save(import_module("corpus.shards").offsets_path(path), offsets)
    T = prepare.MAX_SEQ_LEN
    rows = random_tokens(rng, (layout.EVAL_TOKENS // T, T + 1), V)
    np.save(root / "val_rows.npy", rows)
    longer = (bytes(pair) for pair in product(range(256), repeat=2))
    ranks = [bytes([i]) for i in range(256)] + [next(longer) for _ in range(V - 256)]
    text = "".join(f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (root / "tokenizer.tiktoken").write_text(text)
    token_bytes = prepare.load_tokenizer().token_bytes()
    val = {
        "bytes": (root / "val_rows.npy").stat().st_size,
        "sha256": prepare.sha256_files(root / "val_rows.npy"),
        "text_bytes": int(token_bytes[rows[:, 1:]].sum()),
        "rows": len(rows),
        "cropped_share": 0.0,
    }
    manifest = {"rules": layout.DATA_RULES, "train_shards": 1, "files": {"val_rows.npy": val}, "random": True}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return entropy_of_random_tokens(V) * rows[:, 1:].size / (math.log(2) * val["text_bytes"])


def model(train, prepare, device):
    """(model, optimizer), built as train.main builds them."""
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    dtype, _ = train.choose_dtype(device)
    model = train.GPT(train.build_config(prepare.VOCAB_SIZE, dtype))
    model.init_weights()
    model.to(device)
    return model, train.build_optimizer(model, dtype)


def attention(name, train, device):
    """A back end of train.py by its name, or one that train.py does not use, to measure its benefit."""
    others = back_ends().OTHERS | {"varlen4": varlen4, "flex4": flex4}
    if name in others:
        return others[name](train)
    return {"fa3": train.load_fa3, "flex": train.load_flex, "sdpa": lambda: train.SDPA}[name]()


def back_ends():
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return import_module("lab.machine.back_ends")


def varlen4(train):
    """The same with FlashAttention-4's kernels, which torch takes from the package flash-attn-4: in one graph."""
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl("FA4")
    return back_ends().varlen(train, "varlen4")


def flex4(train):
    """FlexAttention with FlashAttention-4's kernels (its back end FLASH), which need the package flash-attn-4."""
    from functools import partial

    from torch.nn.attention import flex_attention as module

    plain = module.flex_attention
    module.flex_attention = partial(plain, kernel_options={"BACKEND": "FLASH"})
    try:
        return train.load_flex()._replace(name="flex4")
    finally:
        module.flex_attention = plain


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware():
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2)}


def record(benchmark, result):
    """Appends one line to benchmarks/results.jsonl."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    packages = ("torch", "numpy", "pyarrow", "tiktoken", "rustbpe")
    versions = {"python": platform.python_version()} | {name: installed(name) for name in packages}
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    line = {
        "benchmark": benchmark,
        "when": when,
        "commit": commit,
        "hardware": hardware(),
        "versions": versions,
    }
    with RESULTS.open("a") as f:
        f.write(json.dumps(line | result) + "\n")
