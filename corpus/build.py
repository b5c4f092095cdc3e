"""What `uv run prepare.py` does once: download, train the tokenizer, tokenise, pack, write the manifest."""

import base64
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import numpy as np
import tiktoken
from filelock import FileLock, Timeout
from tqdm import tqdm

from constants import DATASET, EVAL_TOKENS, MAX_SEQ_LEN, VOCAB_SIZE
from corpus.documents import CLIMBMIX_HOLDOUT, document_batches, raw_sources
from corpus.hub import download_all, one_line
from prepare import (
    DATA_RULES,
    FA3_KERNEL,
    NUM_ORDINARY,
    SPLIT_PATTERN,
    Tokenizer,
    cache_dir,
    damaged_file,
    data_dir,
    offsets_path,
    pack_rows,
    read_manifest,
    sha256_files,
)

HUB = {"climbmix": "karpathy/climbmix-400b-shuffle", "tinystories": "karpathy/tinystories-gpt4-clean"}
DEFAULT_SHARDS = 10
TOKENIZER_SHARDS, TOKENIZER_CHARACTERS, DOCUMENT_CHARACTERS = 4, 1_000_000_000, 10_000


@contextmanager
def replacing(path):
    """Yields a path beside `path` to write to; moves it in when the block ends well, removes it when not."""
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temp
        with open(temp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def train_tokenizer(path, batches):
    import rustbpe

    def sample():
        left = TOKENIZER_CHARACTERS
        for batch in batches:
            for text in batch:
                yield text[: min(DOCUMENT_CHARACTERS, left)]
                left -= min(len(text), DOCUMENT_CHARACTERS)
                if left <= 0:
                    return

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(sample(), NUM_ORDINARY, pattern=SPLIT_PATTERN)
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
    if len(ranks) != NUM_ORDINARY:
        raise SystemExit(f"the text yields {len(ranks)} tokens, VOCAB_SIZE wants {VOCAB_SIZE}: prepare more shards")
    with replacing(path) as temp:
        temp.write_bytes(b"".join(base64.b64encode(bytes(token)) + b" %d\n" % rank for token, rank in ranks))
    with replacing(path.with_name("token_bytes.npy")) as temp, open(temp, "wb") as f:
        np.save(f, Tokenizer(path).token_bytes())
    return {}


_worker_tokenizer = None


def encode_documents(tokenizer, texts):
    """BOS + tokens of each document: one uint16 array of them all, and each one's length (int64)."""
    bos = np.array([tokenizer.bos_id], dtype=np.uint16)
    parts, lengths = [], []
    for text in texts:
        ids = [tokenizer.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in tokenizer.pieces(text)]
        parts += [bos, *(i.astype(np.uint16) for i in ids)]
        lengths.append(1 + sum(map(len, ids)))
    return np.concatenate(parts), np.array(lengths, dtype=np.int64)


def _start_worker(path, parent):
    global _worker_tokenizer

    def end_with_parent():  # one that was killed can't tell its workers, and they would wait for ever
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _worker_tokenizer = Tokenizer(path)


def _encode_in_worker(texts):
    return encode_documents(_worker_tokenizer, texts)


def encoded_batches(batches, tokenizer, pool):
    """encode_documents of each batch, in order. At most a few batches a worker are in flight at any time, so
    that memory does not grow with the data. Without a pool, in this process."""
    if pool is None:
        yield from (encode_documents(tokenizer, batch) for batch in batches)
        return
    waiting = deque()
    for batch in batches:
        waiting.append(pool.submit(_encode_in_worker, batch))
        if len(waiting) > 3 * (os.cpu_count() or 1):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_shard(path, encoded):
    """Streams tokens into `path`, uint16 (N,), and document offsets, int64 (documents + 1,), beside it."""
    header = {"descr": "<u2", "fortran_order": False}
    lengths, total = [np.zeros(1, dtype=np.int64)], 0
    with replacing(path) as temp:
        with open(temp, "wb") as f:
            np.lib.format.write_array_header_1_0(f, header | {"shape": (0,)})  # leaves room for a longer shape
            header_size = f.tell()
            for tokens, document_lengths in encoded:
                f.write(tokens.tobytes())
                lengths.append(document_lengths)
                total += len(tokens)
            f.seek(0)
            np.lib.format.write_array_header_1_0(f, header | {"shape": (total,)})
            assert f.tell() == header_size, f"the header grew from {header_size} to {f.tell()} bytes"
        with replacing(offsets_path(path)) as offsets_temp, open(offsets_temp, "wb") as f:
            np.save(f, np.cumsum(np.concatenate(lengths)))
    return {"tokens": total, "documents": sum(map(len, lengths)) - 1}


def write_eval_rows(path, encoded, tokenizer):
    """The first EVAL_TOKENS / T packed rows of a split, uint16 (rows, T + 1)."""

    def documents():
        for tokens, lengths in encoded:
            start = 0
            for length in lengths.tolist():
                yield length, tokens, start
                start += length

    rows = np.empty((EVAL_TOKENS // MAX_SEQ_LEN, MAX_SEQ_LEN + 1), dtype=np.uint16)
    state = Counter()
    packed = pack_rows(documents(), MAX_SEQ_LEN + 1, state)
    for i, out in enumerate(rows):
        segments = next(packed, None)
        if segments is None:
            raise SystemExit(f"{path.name}: the documents fill {i} rows, EVAL_TOKENS wants {len(rows)}: lower it")
        np.concatenate([tokens[start : start + n] for tokens, start, n in segments], out=out)
    with replacing(path) as temp, open(temp, "wb") as f:
        np.save(f, rows)
    target_bytes = tokenizer.token_bytes()[rows[:, 1:]]
    return {
        "rows": len(rows), "targets": int((target_bytes > 0).sum()), "text_bytes": int(target_bytes.sum()),
        "cropped_share": round(state["cropped"] / (state["cropped"] + rows.size), 4),
    }  # fmt: skip


def build(root, raw, num_shards, workers):
    """Makes files one by one, noting in manifest.partial.json which are whole; a second start goes on from there."""
    sources = {split: raw_sources(split, num_shards) for split in ("train", "val", "holdout")}
    if DATASET in HUB:
        download_all(
            HUB[DATASET], sorted({name for of_split in sources.values() for name, *_ in of_split}), raw, workers
        )
    partial = root / "manifest.partial.json"
    described = (read_manifest(root / "manifest.json") or {"files": {}})["files"]
    known = (read_manifest(partial) or {"files": described})["files"]
    files = {}

    def save(path, **content):
        with replacing(path) as temp:
            temp.write_text(json.dumps({"rules": DATA_RULES, **content}, indent=1, sort_keys=True))

    def make(names, made_from, write, *args):
        """write(path of names[0], *args) -> counts, unless the files are there, whole and made from the same."""
        entries = {name: known.get(name, {"bytes": -1}) for name in names}
        if entries[names[0]].get("made_from") != made_from or damaged_file(root, entries):
            if names[0] in described:  # manifest.json never speaks of files that are no more
                save(partial, files=known)
                (root / "manifest.json").unlink(missing_ok=True)
            counts = write(root / names[0], *args)
            for name in names:
                digest = sha256_files(root / name)
                known[name] = {"bytes": (root / name).stat().st_size, "sha256": digest, "made_from": made_from}
            known[names[0]] |= counts
            save(partial, files=known)
        files.update({name: known[name] for name in names})

    seen = sources["train"][:TOKENIZER_SHARDS]
    make(["tokenizer.tiktoken", "token_bytes.npy"], str(seen), train_tokenizer, document_batches(raw, seen))
    tokenizer = Tokenizer(root / "tokenizer.tiktoken")
    made_by = files["tokenizer.tiktoken"]["sha256"][:16]
    pool = None
    if DATASET in HUB:  # the standard library is tokenised sooner than worker processes have started
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(cores, context, _start_worker, (root / "tokenizer.tiktoken", os.getpid()))
    try:
        for split in ("val", "holdout"):
            encoded = encoded_batches(document_batches(raw, sources[split]), tokenizer, pool)
            make([f"{split}_rows.npy"], f"{made_by} {sources[split]}", write_eval_rows, encoded, tokenizer)
        for i, source in enumerate(sources["train"]):
            path = root / f"train_{i:05d}.npy"
            encoded = encoded_batches(document_batches(raw, [source]), tokenizer, pool)
            encoded = tqdm(encoded, desc=f"tokenise {source[0]}", unit=" batches", disable=None)
            make([path.name, offsets_path(path).name], f"{made_by} {source}", write_shard, encoded)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "tiktoken": tiktoken.__version__}
    digests = json.dumps({name: entry["sha256"] for name, entry in files.items()}, sort_keys=True)
    save(
        root / "manifest.json", files=files, train_shards=len(sources["train"]), versions=versions,
        data_sha256=hashlib.sha256(digests.encode()).hexdigest(),
    )  # fmt: skip
    partial.unlink()


def whole_manifest(root, num_shards):
    manifest = read_manifest(root / "manifest.json")
    if manifest and manifest["train_shards"] >= num_shards and not damaged_file(root, manifest["files"]):
        return manifest
    return None


def prepare(num_shards=None, workers=8):
    """Makes all that a run reads, or sees at once that it is there."""
    if num_shards is not None and DATASET != "climbmix":
        raise SystemExit(f"--num-shards is for climbmix: {DATASET} has no shards to choose from, leave it out")
    if num_shards is not None and num_shards != -1 and not 1 <= num_shards <= CLIMBMIX_HOLDOUT:
        raise SystemExit(f"--num-shards {num_shards}: take 1 to {CLIMBMIX_HOLDOUT}, or -1 for all")
    if workers < 1:
        raise SystemExit(f"--download-workers {workers}: at least 1 must fetch")
    num_shards = num_shards or (DEFAULT_SHARDS if DATASET == "climbmix" else 1)
    num_shards = CLIMBMIX_HOLDOUT if num_shards == -1 else num_shards
    root, raw = data_dir(), cache_dir() / DATASET / "raw"
    try:
        if not whole_manifest(root, num_shards):
            root.mkdir(parents=True, exist_ok=True)
            raw.mkdir(exist_ok=True)
            lock = FileLock(root.parent / "prepare.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                print(f"another prepare.py is at work in {root.parent}: waiting for it to end", flush=True)
                lock.acquire()
            with lock:
                for temp in root.glob("*.tmp"):  # left by a prepare.py that was killed
                    temp.unlink()
                if not whole_manifest(root, num_shards):
                    print(f"preparing {DATASET} in {root}", flush=True)
                    build(root, raw, num_shards, workers)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: run again, it goes on where it stopped") from None
    except BrokenProcessPool:
        raise SystemExit(
            "a tokenising process was killed (out of memory?): free some, then run again, it goes on where it stopped"
        ) from None
    except OSError as e:
        raise SystemExit(
            f"{e.filename or root}: {e.strerror or one_line(e)}: free space or mend permissions there, or set "
            "AUTORESEARCH_CACHE to another folder; then run again, it goes on where it stopped"
        ) from e
    files = whole_manifest(root, num_shards)["files"]
    train = [entry for entry in files.values() if "documents" in entry]
    val = files["val_rows.npy"]
    print(
        f"{DATASET} is prepared in {root}: {sum(e['tokens'] for e in train):,} tokens in "
        f"{sum(e['documents'] for e in train):,} documents ({len(train)} shards) to train on; val is {val['rows']:,} "
        f"rows, {val['text_bytes']:,} bytes (packing them cropped away {val['cropped_share']:.1%} of the tokens)"
    )


def fetch_attention_kernel():
    """Fetches FlashAttention-3 into the Hugging Face cache where the GPU is a Hopper. Not having it is no failure:
    train.py then attends by other means and says so. This has not been run on a GPU."""
    if not shutil.which("nvidia-smi"):
        return
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        try:
            from kernels import get_kernel

            get_kernel(**FA3_KERNEL)
            print(f"FlashAttention-3 is there ({FA3_KERNEL['repo_id']})")
        except Exception as e:  # a kernel is a download, a build and an import: anything may be wrong with it
            print(f"FlashAttention-3 cannot be loaded ({one_line(e)}): training uses FlexAttention", file=sys.stderr)
