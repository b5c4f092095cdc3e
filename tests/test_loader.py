"""The dataloader packs what the oracle packs, bit for bit, and hands out nothing before the clock has started."""

import importlib
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT, assert_refused

T, VOCAB_SIZE = 32, 512
BOS = VOCAB_SIZE - 4


class Loader:
    """prepare.py of a copy of the repo over token shards made up by the test."""

    def __init__(self, repo, prepare):
        self.repo, self.prepare = repo, prepare
        self.shards, self.layout = (importlib.import_module(f"corpus.{name}") for name in ("shards", "layout"))
        self.tokenizer = SimpleNamespace(vocab_size=prepare.VOCAB_SIZE)
        prepare._run = SimpleNamespace(started=0.0, stopped=None, device=torch.device("cpu"))

    def fill(self, *shards, bos_id=BOS):
        """shards: lists of documents, each a list of ids without BOS. Writes them as prepare.py does."""
        root = self.layout.data_dir()
        root.mkdir(parents=True, exist_ok=True)
        files = {}
        for i, documents in enumerate(shards):
            path = root / f"train_{i:05d}.npy"
            arrays = [np.array([bos_id, *document], dtype=np.uint16) for document in documents]
            halves = [arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]]  # two batches a shard
            self.shards.write_shard(
                path, [(np.concatenate(h), np.array([len(a) for a in h])) for h in halves if h]
            )
            for each in (path, self.shards.offsets_path(path)):
                files[each.name] = {"bytes": each.stat().st_size, "sha256": ""}
        manifest = {"rules": self.layout.DATA_RULES, "files": files, "train_shards": len(shards)}
        (root / "manifest.json").write_text(json.dumps(manifest))

    def batches(self, B, T=T):
        return self.prepare.make_dataloader(self.tokenizer, B, T, "train")

    def rows(self, n, B=3, T=T):
        """The first n rows of T + 1 ids, put together from inputs and targets."""
        rows = []
        for x, y, _ in self.batches(B, T):
            rows += torch.cat([x, y[:, -1:]], dim=1).tolist()
            if len(rows) >= n:
                return rows[:n]


@pytest.fixture
def loader(make_repo, import_prepare):
    repo = make_repo("climbmix")
    return Loader(repo, import_prepare(repo))


def documents_of(rng, n, length, ids=BOS):
    return [[rng.randrange(ids) for _ in range(length(rng))] for _ in range(n)]


LENGTHS = {
    "natural": lambda rng: max(1, int(rng.lognormvariate(2.5, 1.2))),
    "all longer than a row": lambda rng: rng.randint(T + 1, 5 * T),
    "many of equal length": lambda rng: rng.choice([3, 7, 8, 31, 32, 33, 60]),
    "short": lambda rng: rng.randint(1, 6),
    "one token to a whole row": lambda rng: rng.choice([1, T - 1, T, T + 1]),
}


SIZES = {"one shard": (1300,), "three shards": (500, 700, 100), "few documents": (90,)}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sizes", SIZES)
def test_rows_equal_the_oracles(loader, lengths, sizes):
    rng = random.Random(f"{lengths} {sizes}")
    shards = [documents_of(rng, n, LENGTHS[lengths]) for n in SIZES[sizes]]
    loader.fill(*shards)
    naive = oracle.rows_from_tokens(sum(shards, []), T, BOS)
    for x, y, epoch in loader.batches(3):
        rows = torch.cat([x, y[:, -1:]], dim=1).tolist()
        assert rows == [next(naive) for _ in rows]
        assert all(row[0] == BOS for row in rows)
        if epoch == (40 if sizes == "few documents" else 4):
            break


def test_epochs_are_counted_from_one(loader):
    documents = documents_of(random.Random(0), 5000, lambda rng: T)  # each document is a row
    loader.fill(documents)
    epochs = [epoch for _, (_, _, epoch) in zip(range(9000), loader.batches(1), strict=False)]
    # the buffer holds 1,000 documents that wait: the loader reads that far ahead
    assert (epochs[0], epochs[3999], epochs[4002], epochs[8998]) == (1, 1, 2, 2)
    assert epochs == sorted(epochs)


def test_targets_are_inputs_one_token_on(loader):
    loader.fill(documents_of(random.Random(1), 500, LENGTHS["natural"]))
    for _, (x, y, epoch) in zip(range(50), loader.batches(4), strict=False):
        assert x.shape == y.shape == (4, T)
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert (x[:, 0] == BOS).all()
        assert isinstance(epoch, int)


def test_the_stream_of_rows_does_not_depend_on_the_batch_size(loader):
    loader.fill(documents_of(random.Random(2), 1200, LENGTHS["natural"]))
    rows = loader.rows(600, B=1)
    for B in (2, 7, 64):
        assert loader.rows(600, B=B) == rows


def test_two_loaders_of_the_same_data_are_equal_and_independent(loader):
    loader.fill(documents_of(random.Random(3), 1200, LENGTHS["natural"]))
    one, two = loader.batches(5), loader.batches(5)
    next(one)  # one is a batch ahead
    ahead = [next(one)[0] for _ in range(20)]
    next(two)
    assert all(torch.equal(x, next(two)[0]) for x in ahead)


def test_a_batch_stays_as_it_was_while_later_ones_are_made(loader):
    loader.fill(documents_of(random.Random(4), 1200, LENGTHS["natural"]))
    batches = loader.batches(5)
    kept = [next(batches) for _ in range(20)]
    again = loader.batches(5)
    for x, y, _ in kept:
        x2, y2, _ = next(again)
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_other_row_lengths_than_the_rules(loader):
    documents = documents_of(random.Random(5), 1500, LENGTHS["natural"])
    loader.fill(documents)
    for other in (8, 100):
        naive = oracle.rows_from_tokens(documents, other, BOS)
        assert loader.rows(300, T=other) == [next(naive) for _ in range(300)]


def test_ids_above_32767_survive(make_repo, import_prepare):
    vocab_size = 65000
    repo = make_repo("climbmix", rules=(T, T * 64, vocab_size))
    loader = Loader(repo, import_prepare(repo))
    documents = documents_of(random.Random(6), 1500, LENGTHS["natural"], ids=vocab_size - 4)
    loader.fill(documents, bos_id=vocab_size - 4)
    rows = loader.rows(800)
    naive = oracle.rows_from_tokens(documents, T, vocab_size - 4)
    assert rows == [next(naive) for _ in range(800)]
    assert max(map(max, rows)) == vocab_size - 4 and min(map(min, rows)) >= 0


@pytest.mark.parametrize("split", ["val", "holdout", "test"])
def test_only_train_is_handed_out(loader, split):
    loader.fill(documents_of(random.Random(7), 1200, LENGTHS["natural"]))
    with pytest.raises(SystemExit, match=split):
        next(loader.prepare.make_dataloader(loader.tokenizer, 2, T, split))


def test_a_tokenizer_of_another_size_is_refused(loader):
    loader.fill(documents_of(random.Random(8), 1200, LENGTHS["natural"]))
    with pytest.raises(SystemExit, match="300"):
        next(loader.prepare.make_dataloader(SimpleNamespace(vocab_size=300), 2, T, "train"))


CLOCK = """
    import prepare, torch

    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.w.expand(*x.shape, prepare.VOCAB_SIZE)

    clock = prepare.begin_run(prepare.__file__)
    loader = lambda: prepare.make_dataloader(prepare.load_tokenizer(), 2, prepare.MAX_SEQ_LEN, "train")
    try:
        next(loader())
    except SystemExit as e:
        print("refused:", e)
    clock.start(Uniform(), 2)
    print(next(loader())[0].shape)
    next(prepare.make_dataloader(prepare.load_tokenizer(), 2, prepare.MAX_SEQ_LEN, "val"))
"""


def test_no_data_before_the_clock_has_started(make_repo, prepared_climbmix):
    repo = make_repo("climbmix")
    repo.copy_cache(prepared_climbmix)
    result = repo.run_code(CLOCK)
    refused, shape = result.out.splitlines()[-2:]
    assert refused.startswith("refused:") and "clock.start" in refused
    assert shape == "torch.Size([2, 32])"
    assert_refused(result, "val")


def test_a_run_gets_the_documents_of_train_and_no_others(
    make_repo, import_prepare, prepared_climbmix, climbmix_files
):
    import pyarrow.parquet as pq

    repo = make_repo("climbmix")
    repo.copy_cache(prepared_climbmix)
    prepare = import_prepare(repo)
    tokenizer = prepare.load_tokenizer()
    texts = {name: pq.read_table(path)["text"].to_pylist() for name, path in climbmix_files.items()}
    starts = {text[:12]: name for name in texts for text in texts[name] if len(text) > 30}

    def origins(rows):
        pieces = tokenizer.decode([int(t) for t in np.asarray(rows).ravel()]).split("<|bos|>")
        return {starts[piece[:12]] for piece in pieces if piece[:12] in starts}

    loader = Loader(repo, prepare)
    rows = loader.rows(6000, B=16)  # about three epochs
    assert origins(rows) == {"shard_00000.parquet", "shard_00001.parquet"}
    assert origins(np.load(prepare.data_dir() / "val_rows.npy")) == {"shard_06542.parquet"}
    assert origins(np.load(prepare.data_dir() / "holdout_rows.npy")) == {"shard_06541.parquet"}


@pytest.mark.parametrize("name", ["train_00001.npy", "train_00000_offsets.npy", "val_rows.npy"])
def test_a_truncated_file_is_one_line_that_names_it(make_repo, prepared_climbmix, name):
    repo = make_repo("climbmix")
    repo.copy_cache(prepared_climbmix)
    (path,) = repo.cache.rglob(name)
    path.write_bytes(path.read_bytes()[:-2])
    result = repo.run_code("import prepare\nprepare.begin_run(prepare.__file__)")
    assert_refused(result, name, "prepare.py")


def test_not_prepared_is_one_line_with_the_command(make_repo):
    result = make_repo("climbmix").run_code("import prepare\nprepare.begin_run(prepare.__file__)")
    assert_refused(result, "uv run prepare.py")


@pytest.mark.slow
def test_the_benchmark_of_the_loader_runs(make_repo, prepared_stdlib):
    """It stands in for a run, so it breaks where the loader asks a run for more."""
    repo = make_repo("stdlib")
    repo.copy_cache(prepared_stdlib)
    shutil.copytree(ROOT / "benchmarks", repo.path / "benchmarks")
    (repo.path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "oracle.py", repo.path / "tests")
    result = repo.run("benchmarks/loader.py", timeout=280)
    assert result.rc == 0, result.err
    assert result.out.count(" x ") >= 2 and "tokens/s on one core" in result.out
