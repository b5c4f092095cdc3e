"""Makes the prepared data: downloads, trains the tokenizer, tokenises, packs, writes the manifest last.

Every step is skipped if its files exist, are complete and were made from the same sources, so that a preparation that
was killed continues where it stopped. `prepare()` is the entry point; prepare.py's main and begin_run call it.
"""

import base64
import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from constants import DATASET, EVAL_TOKENS, MAX_SEQ_LEN, VOCAB_SIZE
from corpus.datasets import CLIMBMIX_HOLDOUT, DEFAULT_SHARDS, HUB, document_batches, raw_sources
from corpus.layout import DATA_RULES, damaged_file, data_dir, data_hash, raw_dir, read_manifest
from corpus.packing import pack_rows
from corpus.shards import offsets_path, shard_path, write_shard
from corpus.system import one_line, replacing, sha256_files, usable_cores
from corpus.tokenizer import NUM_ORDINARY, SPLIT_PATTERN, Tokenizer

# The tokenizer is trained on the first shards only, so that more shards later do not change it, and on the beginning
# of each document, so that a few very long ones do not decide it.
TOKENIZER_SHARDS, TOKENIZER_CHARACTERS, DOCUMENT_CHARACTERS = 4, 1_000_000_000, 10_000
BATCHES_IN_FLIGHT = 3  # for each worker: one being tokenised, one waiting, one finished and not yet written


# ---------------------------------------------------------------------------------------------------
# Tokenizer


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
        raise SystemExit(
            f"the text yields {len(ranks) + VOCAB_SIZE - NUM_ORDINARY} tokens, VOCAB_SIZE is {VOCAB_SIZE}: "
            "prepare more shards"
        )
    with replacing(path) as temp:
        temp.write_bytes(b"".join(base64.b64encode(bytes(token)) + b" %d\n" % rank for token, rank in ranks))
    return {}


# ---------------------------------------------------------------------------------------------------
# Tokens, in worker processes

_worker_tokenizer = None


def encode_documents(tokenizer, texts):
    """BOS + tokens of each document: all in one uint16 array, and the length of each (int64)."""
    bos = np.array([tokenizer.bos_id], dtype=np.uint16)
    parts, lengths = [], []
    for text in texts:
        ids = [tokenizer.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in tokenizer.pieces(text)]
        parts += [bos, *(i.astype(np.uint16) for i in ids)]
        lengths.append(1 + sum(map(len, ids)))
    return np.concatenate(parts), np.array(lengths, dtype=np.int64)


def _start_worker(path, parent):
    global _worker_tokenizer

    def end_with_parent():  # a parent that was killed cannot stop its workers, and they would wait for ever
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _worker_tokenizer = Tokenizer(path)


def _encode_in_worker(texts):
    return encode_documents(_worker_tokenizer, texts)


def encoded_batches(batches, tokenizer, pool):
    """encode_documents of each batch, in order; in this process if pool is None.

    Only a few batches for each worker are in flight, so that memory does not grow with the data."""
    if pool is None:
        yield from (encode_documents(tokenizer, batch) for batch in batches)
        return
    waiting = deque()
    for batch in batches:
        waiting.append(pool.submit(_encode_in_worker, batch))
        if len(waiting) > BATCHES_IN_FLIGHT * usable_cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_eval_rows(path, encoded, tokenizer):
    """Writes the first EVAL_TOKENS / T packed rows of a split, uint16 (rows, T + 1). Returns their counts."""

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
            raise SystemExit(f"{path.name}: the documents fill {i} rows, EVAL_TOKENS needs {len(rows)}: lower it")
        np.concatenate([tokens[start : start + n] for tokens, start, n in segments], out=out)
    with replacing(path) as temp, open(temp, "wb") as f:
        np.save(f, rows)
    target_bytes = tokenizer.token_bytes()[rows[:, 1:]]
    return {
        "rows": len(rows), "targets": int((target_bytes > 0).sum()), "text_bytes": int(target_bytes.sum()),
        "cropped_share": round(state["cropped"] / (state["cropped"] + rows.size), 4),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# All files


def build(root, raw, num_shards, workers):
    """Makes the files one by one. manifest.partial.json lists the complete ones, for the next start after a kill."""
    sources = {split: raw_sources(split, num_shards) for split in ("train", "val", "holdout")}
    if DATASET in HUB:
        from corpus.download import download_all  # here, so that a training run does not load it

        download_all(
            HUB[DATASET], sorted({name for of_split in sources.values() for name, *_ in of_split}), raw, workers
        )
    partial = root / "manifest.partial.json"
    described = (read_manifest(root / "manifest.json") or {"files": {}})["files"]
    known = (read_manifest(partial) or {"files": described})["files"]
    files = {}

    def save(path, **content):
        with replacing(path) as temp:
            text = json.dumps({"rules": DATA_RULES, **content}, indent=1, sort_keys=True)
            temp.write_text(text, encoding="utf-8")

    def make(names, made_from, write, *args):
        """Calls write(path of names[0], *args) -> counts, unless the files are complete and made from the same."""
        entries = {name: known.get(name, {"bytes": -1}) for name in names}
        if entries[names[0]].get("made_from") != made_from or damaged_file(root, entries):
            if names[0] in described:  # manifest.json must never describe files that no longer exist
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
    make(["tokenizer.tiktoken"], str(seen), train_tokenizer, document_batches(raw, seen))
    tokenizer = Tokenizer(root / "tokenizer.tiktoken")
    made_by = files["tokenizer.tiktoken"]["sha256"][:16]
    pool = None
    if DATASET in HUB:  # the standard library is tokenised before worker processes would have started
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(usable_cores(), context, _start_worker, (root / "tokenizer.tiktoken", os.getpid()))
    try:
        for split in ("val", "holdout"):
            encoded = encoded_batches(document_batches(raw, sources[split]), tokenizer, pool)
            make([f"{split}_rows.npy"], f"{made_by} {sources[split]}", write_eval_rows, encoded, tokenizer)
        for i, source in enumerate(sources["train"]):
            path = shard_path(root, i)
            encoded = encoded_batches(document_batches(raw, [source]), tokenizer, pool)
            encoded = tqdm(encoded, desc=f"tokenise {source[0]}", unit=" batches", disable=None)
            make([path.name, offsets_path(path).name], f"{made_by} {source}", write_shard, encoded)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "tiktoken": version("tiktoken")}
    save(
        root / "manifest.json", files=files, train_shards=len(sources["train"]), versions=versions,
        data_sha256=data_hash(files),
    )  # fmt: skip
    partial.unlink()


def complete_manifest(root, num_shards):
    """The manifest if it has at least num_shards training shards and all files have the right size; None otherwise."""
    manifest = read_manifest(root / "manifest.json")
    if manifest and manifest["train_shards"] >= num_shards and not damaged_file(root, manifest["files"]):
        return manifest
    return None


def chosen_shards(num_shards, root):
    """The number of training shards that --num-shards means; SystemExit if it makes no sense for the data set. Without
    the option those that are prepared stay as they are: more would be other data in the middle of a night."""
    if num_shards is not None and DATASET != "climbmix":
        raise SystemExit(f"--num-shards is for climbmix: {DATASET} has no shards to choose from, leave it out")
    if num_shards is not None and num_shards != -1 and not 1 <= num_shards <= CLIMBMIX_HOLDOUT:
        raise SystemExit(f"--num-shards {num_shards}: choose 1 to {CLIMBMIX_HOLDOUT}, or -1 for all")
    if num_shards == -1:
        return CLIMBMIX_HOLDOUT
    if num_shards is None and (manifest := read_manifest(root / "manifest.json")):
        return manifest["train_shards"]
    return num_shards or (DEFAULT_SHARDS if DATASET == "climbmix" else 1)


def prepare(num_shards=None, workers=8):
    """Makes all files that a run reads; returns within a second if they exist already.

    num_shards: climbmix's training shards, -1 for all; None for those that are prepared, or else DEFAULT_SHARDS.
    workers: simultaneous downloads. SystemExit on any failure."""
    root, raw = data_dir(), raw_dir()
    num_shards = chosen_shards(num_shards, root)
    if workers < 1:
        raise SystemExit(f"--download-workers {workers}: use at least 1")
    try:
        if not complete_manifest(root, num_shards):
            root.mkdir(parents=True, exist_ok=True)
            raw.mkdir(exist_ok=True)
            lock = FileLock(root.parent / "prepare.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                print(f"another prepare.py is running in {root.parent}: waiting for it to end", flush=True)
                lock.acquire()
            with lock:
                for temp in root.glob("*.tmp"):  # of a prepare.py that was killed
                    temp.unlink()
                if not complete_manifest(root, num_shards):
                    print(f"preparing {DATASET} in {root}", flush=True)
                    build(root, raw, num_shards, workers)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: run the same command again to continue") from None
    except BrokenProcessPool:
        raise SystemExit(
            "a tokenising process was killed (out of memory?): free some memory, then run the same command again "
            "to continue"
        ) from None
    except OSError as e:
        raise SystemExit(
            f"{e.filename or root}: {e.strerror or one_line(e)}: free space or correct the permissions there, or set "
            "AUTORESEARCH_CACHE to another folder; then run the same command again to continue"
        ) from e
    files = complete_manifest(root, num_shards)["files"]
    train = [entry for entry in files.values() if "documents" in entry]
    val = files["val_rows.npy"]
    print(
        f"{DATASET} is prepared in {root}: {sum(e['tokens'] for e in train):,} tokens in "
        f"{sum(e['documents'] for e in train):,} documents ({len(train)} shards) to train on; val has {val['rows']:,} "
        f"rows, {val['text_bytes']:,} bytes (packing cropped {val['cropped_share']:.1%} of its tokens)"
    )
