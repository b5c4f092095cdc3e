"""prepare.py, run once: the tokenizer, the files, the splits, and what happens where it cannot work."""

import ast
import hashlib
import importlib
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import oracle
import psutil
import pytest
import regex
from conftest import (
    HOLDOUT_SHARD,
    ROOT,
    TINY_RULES,
    VAL_SHARD,
    assert_refused,
    kill_group,
    leftovers,
    made_up_documents,
    made_up_text,
    manifest_digests,
    write_parquet,
)
from hub import Fault, Hub

T, EVAL_TOKENS, VOCAB_SIZE = TINY_RULES["climbmix"]
TEXTS = [
    "plain words, and nothing else",
    "naïve façade — “quoted” £20 ½",
    "Привет, мир! Ελληνικά. 日本語のテキスト。 한국어 עברית العربية",
    "🙂🚀👩‍🚀🇩🇪 emoji, joined and flagged",
    "a\u0301 combining, \u200b zero width, \ufeff mark, \U0010ffff last",
    "def f(x):\n\treturn  x ** 2   # tabs\r\n\n\n",
    "<|bos|> is text here, and so is <|reserved_1|>",
    "0 12 345 6789 3.14159 2026-11-21",
    "\x00\x01\x7f control",
    "",
]


@pytest.fixture
def prepared(make_repo, import_prepare, prepared_climbmix):
    """(prepare module, folder of the prepared data)"""
    repo = make_repo("climbmix", AUTORESEARCH_CACHE=prepared_climbmix)
    prepare = import_prepare(repo)
    return prepare, prepare.data_dir()


@pytest.fixture
def small_stdlib(make_repo, tmp_path):
    """(repo, folder): a copy whose prepare.py, run as small.py, takes this folder of modules for the library."""
    folder = tmp_path / "library"
    rng = random.Random(0)
    for i in range(80):
        package = [f"package{i:02d}/{name}.py" for name in ("__init__", "one", "deep/__init__", "deep/two")]
        for name in [f"module{i:02d}.py"] if i % 4 else package:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            texts = (made_up_text(rng, 30) for _ in range(12 if i % 4 else 3))
            (folder / name).write_text(
                "".join(f"def f{i:02d}_{j}():\n    '{t}'\n" for j, t in enumerate(texts))
            )
    repo = make_repo("stdlib", rules=(32, 32 * 32, 400))
    (repo.path / "small.py").write_text(
        "import runpy, sysconfig\nimport corpus.build\n"
        f"sysconfig.get_path = lambda *args: {str(folder)!r}\n"
        "runpy.run_path('prepare.py', run_name='__main__')\n"
    )
    return repo, folder


# --- the tokenizer ----------------------------------------------------------


def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(prepared):
    prepare, root = prepared
    tokenizer = prepare.load_tokenizer()
    token_bytes = tokenizer.token_bytes()
    for text in [*TEXTS, *made_up_documents("unseen", 50)]:
        ids = tokenizer.encode(text)
        assert token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_every_single_byte_is_a_token_of_one_byte(prepared):
    """A lone continuation byte decodes to a replacement character of 3 bytes: it must count 1."""
    prepare, _ = prepared
    tokenizer = prepare.load_tokenizer()
    ids = [tokenizer.encoding.encode_single_token(bytes([b])) for b in range(256)]
    assert sorted(ids) == list(range(256))
    assert (tokenizer.token_bytes()[ids] == 1).all()
    partial = [i for i in range(tokenizer.bos_id) if "\ufffd" in tokenizer.decode([i])]
    assert len(partial) > 128 + 5  # the text has scripts enough that some merges end within a character


def test_special_tokens_stand_last_have_no_bytes_and_never_come_from_text(prepared):
    prepare, _ = prepared
    tokenizer = prepare.load_tokenizer()
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.bos_id == VOCAB_SIZE - 4
    assert tokenizer.token_bytes().shape == (VOCAB_SIZE,)
    assert (tokenizer.token_bytes() > 0).tolist() == [True] * (VOCAB_SIZE - 4) + [False] * 4
    names = [tokenizer.decode([tokenizer.bos_id + i]) for i in range(4)]
    assert len(set(names)) == 4
    for name in names:
        assert max(tokenizer.encode(name)) < tokenizer.bos_id


def test_numbers_are_cut_into_groups_of_at_most_two_digits(prepared):
    prepare, _ = prepared
    pieces = regex.findall(importlib.import_module("corpus.tokenizer").SPLIT_PATTERN, "it's 0 12 345,6789 3.14159 v2026")
    assert "".join(pieces) == "it's 0 12 345,6789 3.14159 v2026"
    assert [p for p in pieces if p.isdigit()] == [
        "0",
        "12",
        "34",
        "5",
        "67",
        "89",
        "3",
        "14",
        "15",
        "9",
        "20",
        "26",
    ]


@pytest.mark.parametrize(
    "text", [" " * 10**6 + "x", "\n" * 10**6, "x" * 10**6], ids=["spaces", "lines", "letters"]
)
def test_a_document_that_is_one_long_run_is_tokenised(prepared, text):
    prepare, _ = prepared
    tokenizer = prepare.load_tokenizer()
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text)


def test_documents_that_hold_the_names_of_special_tokens_do_not_start_rows(
    make_repo, climbmix_files, tmp_path
):
    texts = [f"<|bos|>{text}<|reserved_1|>" for text in made_up_documents("specials", 500)]
    with Hub(climbmix_files | {VAL_SHARD: write_parquet(tmp_path / "specials.parquet", texts)}) as hub:
        repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
        result = repo.run("prepare.py", "--num-shards", "1")
    assert result.rc == 0, result.err
    rows = np.load(next(repo.cache.rglob("val_rows.npy")))
    assert rows.max() == VOCAB_SIZE - 4
    assert (rows == VOCAB_SIZE - 4).sum() < len(texts) + len(rows)


# --- the files --------------------------------------------------------------


def test_evaluation_rows_are_what_the_oracle_packs_of_their_split(prepared, climbmix_files):
    import pyarrow.parquet as pq

    prepare, root = prepared
    tokenizer = prepare.load_tokenizer()
    for split, shard in (("val", VAL_SHARD), ("holdout", HOLDOUT_SHARD)):
        rows = np.load(root / f"{split}_rows.npy")
        assert rows.dtype == np.uint16 and rows.shape == (EVAL_TOKENS // T, T + 1)
        texts = pq.read_table(climbmix_files[shard])["text"].to_pylist()
        naive = oracle.rows_from_tokens([tokenizer.encode(t) for t in texts], T, tokenizer.bos_id, epochs=1)
        assert rows.tolist() == [next(naive) for _ in rows]


def test_training_shards_hold_every_token_of_every_document(prepared, climbmix_files):
    import pyarrow.parquet as pq

    prepare, root = prepared
    tokenizer = prepare.load_tokenizer()
    for i in range(2):
        texts = pq.read_table(climbmix_files[f"shard_{i:05d}.parquet"])["text"].to_pylist()
        tokens, offsets = np.load(root / f"train_{i:05d}.npy"), np.load(root / f"train_{i:05d}_offsets.npy")
        assert tokens.dtype == np.uint16 and offsets.dtype == np.int64
        assert len(offsets) == len(texts) + 1 and (offsets[0], offsets[-1]) == (0, len(tokens))
        for text, start, end in zip(texts, offsets, offsets[1:], strict=False):
            assert tokens[start:end].tolist() == [tokenizer.bos_id, *tokenizer.encode(text)]


def test_the_manifest_says_what_was_counted_and_by_which_versions(prepared):
    prepare, root = prepared
    manifest = json.loads((root / "manifest.json").read_text())
    tokenizer, rows = prepare.load_tokenizer(), np.load(root / "val_rows.npy")
    by_decoding = sum(
        len(tokenizer.encoding.decode_bytes([t]))
        for t in rows[:, 1:].ravel().tolist()
        if t < tokenizer.bos_id
    )
    assert manifest["files"]["val_rows.npy"]["text_bytes"] == by_decoding
    assert manifest["files"]["val_rows.npy"]["rows"] == EVAL_TOKENS // T
    assert manifest["rules"]["vocab_size"] == VOCAB_SIZE
    assert manifest["versions"]["python"] == sys.version.split()[0]


def test_no_file_of_the_cache_can_execute_code(prepared):
    _, root = prepared
    for path in root.iterdir():
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        else:
            path.read_text()  # JSON, or tiktoken's text


def test_everything_is_written_below_the_cache(make_repo, hub, tmp_path):
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    assert repo.run("prepare.py", "--num-shards", "1").rc == 0
    assert list((tmp_path / "home").iterdir()) == []
    del repo.env["AUTORESEARCH_CACHE"]
    result = repo.run("prepare.py", "--num-shards", "1")
    assert result.rc == 0, result.err
    assert manifest_digests(tmp_path / "home" / ".cache" / "autoresearch") == manifest_digests(
        tmp_path / "cache"
    )
    assert [p.name for p in (tmp_path / "home").iterdir()] == [".cache"]


def test_without_the_option_what_is_prepared_stays(make_repo, hub):
    """program.md calls prepare.py without options: more shards would be other data than a human chose."""
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    assert repo.run("prepare.py", "--num-shards", "1").rc == 0
    before = manifest_digests(repo.cache)
    result = repo.run("prepare.py")
    assert result.rc == 0, result.err
    assert manifest_digests(repo.cache) == before


def test_other_rules_are_prepared_beside_and_not_over_the_first(make_repo, hub, prepared_climbmix):
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    repo.copy_cache(prepared_climbmix)
    before = manifest_digests(repo.cache)
    repo.set_rules("climbmix", T, EVAL_TOKENS, VOCAB_SIZE + 20)
    assert_refused(repo.run_code("import prepare\nprepare.begin_run(prepare.__file__)"), "prepare.py")
    assert repo.run("prepare.py", "--num-shards", "2").rc == 0
    assert hub.requests() == []  # the shards as downloaded serve every rule
    repo.set_rules("climbmix", T, EVAL_TOKENS, VOCAB_SIZE)
    old, new = sorted(repo.cache.rglob("manifest.json"), key=lambda p: p.stat().st_mtime)
    assert json.loads(new.read_text())["rules"]["vocab_size"] == VOCAB_SIZE + 20
    assert {n: e["sha256"] for n, e in json.loads(old.read_text())["files"].items()} == before


def test_a_manifest_of_other_rules_is_not_believed(make_repo, prepared_climbmix):
    repo = make_repo("climbmix")
    repo.copy_cache(prepared_climbmix)
    (path,) = repo.cache.rglob("manifest.json")
    manifest = json.loads(path.read_text())
    manifest["rules"]["eval_tokens"] = EVAL_TOKENS * 2  # someone's folder, copied to this one's place
    path.write_text(json.dumps(manifest))
    assert_refused(repo.run_code("import prepare\nprepare.begin_run(prepare.__file__)"), "uv run prepare.py")
    result = repo.run("prepare.py", "--num-shards", "2")
    assert result.rc == 0, result.err
    assert manifest_digests(repo.cache) == manifest_digests(prepared_climbmix)


@pytest.mark.parametrize("content", ["", "[]", '{"rules": {}}'])
def test_a_manifest_that_is_none_is_made_again(make_repo, prepared_climbmix, content):
    repo = make_repo("climbmix")
    repo.copy_cache(prepared_climbmix)
    (path,) = repo.cache.rglob("manifest.json")
    path.write_text(content)
    assert_refused(repo.run_code("import prepare\nprepare.begin_run(prepare.__file__)"), "uv run prepare.py")


@pytest.mark.parametrize(
    "name", ["train_00001.npy", "tokenizer.tiktoken", "train_00000_offsets.npy", "holdout_rows.npy"]
)
def test_a_lost_or_truncated_file_is_made_again(make_repo, prepared_climbmix, name):
    repo = make_repo("climbmix")
    repo.copy_cache(prepared_climbmix)
    (path,) = repo.cache.rglob(name)
    path.write_bytes(path.read_bytes()[:-1])
    result = repo.run("prepare.py", "--num-shards", "2")
    assert result.rc == 0, result.err
    assert manifest_digests(repo.cache) == manifest_digests(prepared_climbmix)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["manifest.json", "manifest.partial.json"])
def test_a_cache_of_an_older_version_is_read_and_counts_as_the_same_data(
    make_repo, import_prepare, prepared_climbmix, name, there
):
    """It has a token_bytes.npy, in its manifest and in its data_sha256. Nothing is downloaded or made again."""
    repo = make_repo("climbmix")
    repo.copy_cache(prepared_climbmix)
    (path,) = repo.cache.rglob("manifest.json")
    manifest = json.loads(path.read_text())
    today = manifest["data_sha256"]
    if there:
        (path.parent / "token_bytes.npy").write_bytes(b"12345")
    manifest["files"]["token_bytes.npy"] = {"bytes": 5, "made_from": "", "sha256": hashlib.sha256(b"12345").hexdigest()}
    manifest["data_sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    path.rename(path.with_name(name))
    before = {p.name: p.stat().st_mtime_ns for p in path.parent.glob("*.npy")}
    result = repo.run("prepare.py", "--num-shards", "2")
    assert result.rc == 0, result.err
    assert {p.name: p.stat().st_mtime_ns for p in path.parent.glob("*.npy")} == before
    assert import_prepare(repo).load_manifest()["data_sha256"] == today


def test_preparing_loads_prepare_once_and_nothing_that_only_training_needs(make_repo, prepared_stdlib):
    repo = make_repo("stdlib", AUTORESEARCH_CACHE=prepared_stdlib)
    result = repo.run_code("""
        import runpy, sys
        runpy.run_path("prepare.py", run_name="__main__")
        print(sorted({"prepare", "train", "lab", "torch"} & {name.split(".")[0] for name in sys.modules}))
    """)
    assert (result.rc, result.err, result.out.splitlines()[-1]) == (0, "", "[]")


HEAVY = {"numpy", "torch", "tiktoken", "pyarrow", "requests", "urllib3", "rustbpe", "pandas", "matplotlib", "kernels"}


@pytest.mark.parametrize(
    "module, loads",
    [("corpus.rules", set()), ("corpus.layout", set()), ("corpus.system", set()), ("frozen.device", set()), ("prepare", {"numpy"})],
)
def test_importing_the_core_loads_nothing_heavy(make_repo, module, loads):
    result = make_repo("stdlib").run_code(f"import {module}, sys; print(*sys.modules)")
    assert HEAVY & set(result.out.split()) == loads


def test_the_core_imports_one_way():
    """constants <- corpus <- frozen <- prepare <- train: lazy imports included, and nothing imports lab."""
    order = ["constants", "corpus", "frozen", "prepare", "train", "lab"]
    for name in order[:-1]:
        paths = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else (ROOT / name).rglob("*.py")
        for path in paths:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            imported = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
            imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            rooms = {each.split(".")[0] for each in imported} & set(order)
            allowed = order[: order.index(name)] + ([name] if path.parent.name == name else [])
            assert rooms <= set(allowed), f"{path} imports {rooms - set(allowed)}"


# --- stdlib -----------------------------------------------------------------


def test_stdlib_splits_share_no_package(small_stdlib, import_prepare, monkeypatch):
    repo, folder = small_stdlib
    import_prepare(repo)
    import corpus.datasets

    monkeypatch.setattr(corpus.datasets.sysconfig, "get_path", lambda *args: str(folder))
    modules = {}
    for split in ("train", "val", "holdout"):
        modules[split] = {
            m for text in corpus.datasets.stdlib_documents(split) for m in re.findall(r"f(\d\d)_", text)
        }
        assert modules[split], f"no module in {split}"
    assert sum(map(len, modules.values())) == len(set().union(*modules.values())) == 80


def test_stdlib_leaves_out_tests_and_what_was_installed(small_stdlib, import_prepare, monkeypatch):
    repo, folder = small_stdlib
    for left_out in ("test", "package04/tests", "idlelib/idle_test", "site-packages/numpy", "lib-dynload"):
        (folder / left_out).mkdir(parents=True)
        (folder / left_out / "some.py").write_text("secret = 1\n")
    import_prepare(repo)
    import corpus.datasets

    monkeypatch.setattr(corpus.datasets.sysconfig, "get_path", lambda *args: str(folder))
    for split in ("train", "val", "holdout"):
        assert not any("secret" in text for text in corpus.datasets.stdlib_documents(split))


def test_pieces_of_a_module_put_together_are_the_module(make_repo, import_prepare):
    import_prepare(make_repo("stdlib"))
    import corpus.datasets

    for path in sorted(Path(json.__file__).parent.parent.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        assert "".join(corpus.datasets.cut_module(source)) == source, path


def test_a_module_is_cut_before_definitions_and_a_decorator_stays_with_its_own(make_repo, import_prepare):
    import_prepare(make_repo("stdlib"))
    import corpus.datasets

    source = (
        "import x\n\nclass A:\n    def inner(self):\n        pass\n\n@one\n@two(\n    3)\nclass B:\n    pass\n"
        "async def c():\n    pass\ndefault = 1\nclassic = 2\ndef d(): pass\n"
    )
    starts = [piece.splitlines()[0] for piece in corpus.datasets.cut_module(source)]
    assert starts == ["import x", "class A:", "@one", "async def c():", "def d(): pass"]


def test_stdlib_survives_a_module_that_is_neither_utf8_nor_python(small_stdlib):
    repo, folder = small_stdlib
    (folder / "latin.py").write_bytes(b"# caf\xe9\ndef broken(:\n")
    (folder / "empty.py").write_text("")
    result = repo.run("small.py")
    assert result.rc == 0, result.err


def test_stdlib_is_the_same_every_time(small_stdlib):
    repo, _ = small_stdlib
    assert repo.run("small.py", PYTHONHASHSEED=1).rc == 0
    once = manifest_digests(repo.cache)
    shutil.rmtree(repo.cache)
    assert repo.run("small.py", PYTHONHASHSEED=2).rc == 0
    assert manifest_digests(repo.cache) == once


def test_the_real_stdlib(prepared_stdlib, make_repo, import_prepare):
    repo = make_repo("stdlib", AUTORESEARCH_CACHE=prepared_stdlib)
    prepare = import_prepare(repo)
    tokenizer, root = prepare.load_tokenizer(), prepare.data_dir()
    digests = manifest_digests(prepared_stdlib)
    assert {
        "tokenizer.tiktoken",
        "val_rows.npy",
        "holdout_rows.npy",
        "train_00000.npy",
    } <= set(digests)
    lengths = np.diff(np.load(root / "train_00000_offsets.npy"))
    assert len(lengths) > 2000 and lengths.sum() > 10**6
    texts = {
        s: {tokenizer.decode([int(t) for t in r]) for r in np.load(root / f"{s}_rows.npy")}
        for s in ("val", "holdout")
    }
    assert not texts["val"] & texts["holdout"]
    result = repo.run("prepare.py")
    assert (result.rc, result.err) == (0, "")
    assert "is prepared in" in result.out


# --- where it cannot work ---------------------------------------------------


def test_an_unknown_dataset_is_one_line_that_names_the_known_ones(make_repo):
    result = make_repo("climbmix", AUTORESEARCH_DATASET="imagenet").run("prepare.py")
    assert_refused(result, "imagenet", "climbmix", "tinystories", "stdlib")


def test_num_shards_is_refused_for_data_without_shards(make_repo):
    assert_refused(make_repo("stdlib").run("prepare.py", "--num-shards", "4"), "--num-shards", "stdlib")


def test_too_little_text_for_the_vocabulary_is_one_line(make_repo, climbmix_files):
    with Hub(climbmix_files) as hub:
        repo = make_repo("climbmix", rules=(T, EVAL_TOKENS, 60000), HF_ENDPOINT=hub.endpoint)
        assert_refused(repo.run("prepare.py", "--num-shards", "1"), "VOCAB_SIZE", "60000")


def test_too_little_text_for_the_evaluation_rows_is_one_line(make_repo, climbmix_files):
    with Hub(climbmix_files) as hub:
        repo = make_repo("climbmix", rules=(T, EVAL_TOKENS * 1000, VOCAB_SIZE), HF_ENDPOINT=hub.endpoint)
        assert_refused(repo.run("prepare.py", "--num-shards", "1"), "val", "EVAL_TOKENS")


@pytest.mark.parametrize("dataset", ["climbmix", "stdlib"])
def test_a_cache_below_a_file_is_one_line(make_repo, tmp_path, dataset):
    (tmp_path / "file").write_text("in the way\n")
    repo = make_repo(dataset, AUTORESEARCH_CACHE=tmp_path / "file" / "cache")
    assert_refused(repo.run("prepare.py"), str(tmp_path / "file"), "AUTORESEARCH_CACHE")


def test_a_read_only_cache_is_one_line(make_repo, own_mounts):
    repo = make_repo("climbmix")
    repo.cache.mkdir()
    script = 'mount -t tmpfs -o ro tmpfs "$AUTORESEARCH_CACHE" && exec "$@"'
    result = repo.run("prepare.py", wrap=[*own_mounts, "sh", "-c", script, "sh"])
    assert_refused(result, str(repo.cache), "AUTORESEARCH_CACHE")


def test_a_disk_too_small_for_the_download_is_said_before_it_begins(make_repo, hub, own_mounts):
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    repo.cache.mkdir()
    script = 'mount -t tmpfs -o size=200k tmpfs "$AUTORESEARCH_CACHE" && exec "$@"'
    result = repo.run("prepare.py", "--num-shards", "2", wrap=[*own_mounts, "sh", "-c", script, "sh"])
    assert_refused(result, str(repo.cache), "AUTORESEARCH_CACHE", "--num-shards")
    assert hub.requests(method="GET") == []


@pytest.mark.parametrize("kilobytes", [8, 48])
def test_a_disk_that_fills_up_is_one_line_and_no_loss(small_stdlib, own_mounts, tmp_path, kilobytes):
    """On a disk of its own that is full, then made larger: the second run completes what the first began."""
    repo, _ = small_stdlib
    assert repo.run("small.py").rc == 0
    undisturbed = manifest_digests(repo.cache)
    shutil.rmtree(repo.cache)
    repo.cache.mkdir()
    script = """
        mount -t tmpfs -o size=$0k tmpfs "$AUTORESEARCH_CACHE"
        "$@" 2> first.err
        echo $? > first.rc
        find "$AUTORESEARCH_CACHE" -name '*tmp*' > first.left
        mount -o remount,size=100m tmpfs "$AUTORESEARCH_CACHE"
        "$@"
        rc=$?
        cp -r "$AUTORESEARCH_CACHE" saved
        exit $rc
    """
    second = repo.run("small.py", wrap=[*own_mounts, "sh", "-c", script, str(kilobytes)])
    first = ((repo.path / f"first.{name}").read_text() for name in ("rc", "err", "left"))
    rc, err, left = first
    assert_refused(second._replace(rc=int(rc), err=err), str(repo.cache), "space")
    assert left == ""
    assert (second.rc, second.err) == (0, "")
    assert manifest_digests(repo.path / "saved") == undisturbed


@pytest.mark.parametrize("bytes_per_file", [60_000, 81_500])
def test_a_file_that_cannot_grow_is_one_line_and_no_loss(make_repo, hub, prepared_climbmix, bytes_per_file):
    """The same for a download and for the tokens of a shard, by a limit on the size of a file."""
    if not shutil.which("prlimit"):
        pytest.skip("prlimit (util-linux) is not installed")
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    result = repo.run("prepare.py", "--num-shards", "2", wrap=["prlimit", f"--fsize={bytes_per_file}"])
    assert_refused(result, str(repo.cache))
    assert not [name for name in leftovers(repo.cache) if name.endswith(".tmp")]
    result = repo.run("prepare.py", "--num-shards", "2")
    assert result.rc == 0, result.err
    assert manifest_digests(repo.cache) == manifest_digests(prepared_climbmix)


def test_two_at_once_do_the_work_once(make_repo, hub, prepared_climbmix):
    hub.faults[VAL_SHARD] = Fault(chunk_seconds=0.3)
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    one = repo.start("prepare.py", "--num-shards", "2")
    try:
        deadline = time.monotonic() + 60
        while not hub.requests("cdn", VAL_SHARD, "GET") and time.monotonic() < deadline:
            time.sleep(0.02)
        two = repo.run("prepare.py", "--num-shards", "2")
        out, err = one.communicate(timeout=60)
    finally:
        kill_group(one)
    assert (one.returncode, two.rc) == (0, 0), err + two.err
    assert len(hub.requests("cdn", method="GET")) == 4
    assert manifest_digests(repo.cache) == manifest_digests(prepared_climbmix)
    assert leftovers(repo.cache) == []


@pytest.mark.slow  # a minute
def test_memory_stays_below_2_gb_and_does_not_grow_with_the_shards(make_repo, climbmix_files, tmp_path):
    documents = made_up_documents("memory", 500)
    rng = random.Random(0)
    texts = [
        " ".join(rng.sample(documents, 12)) for _ in range(8000)
    ]  # some 20 MB, and the same in every shard
    shard = write_parquet(tmp_path / "shard.parquet", texts, row_group_size=1000)
    peaks = []
    for shards in (1, 6):
        files = {name: climbmix_files[name] for name in (VAL_SHARD, HOLDOUT_SHARD)}
        with Hub(files | {f"shard_{i:05d}.parquet": shard for i in range(shards)}) as hub:
            repo = make_repo(
                "climbmix", HF_ENDPOINT=hub.endpoint, AUTORESEARCH_CACHE=tmp_path / f"cache{shards}"
            )
            process = repo.start("prepare.py", "--num-shards", shards)
            peak = 0
            try:
                while process.poll() is None:
                    peak = max(peak, resident_bytes(psutil.Process(process.pid)))
                    time.sleep(0.05)
                assert process.returncode == 0, process.stderr.read()
            finally:
                kill_group(process)
        peaks.append(peak)
    assert peaks[1] < 2e9
    assert peaks[1] < 1.3 * peaks[0], (
        f"{peaks[0] / 1e6:.0f} MB with one shard, {peaks[1] / 1e6:.0f} MB with six"
    )


def resident_bytes(process):
    """Of a process and its children, as far as they still live."""
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            total += p.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total
