"""Downloading from a hub that misbehaves in every way one does: the right bytes arrive, or one line says what is wrong.

Most of it calls corpus.download as prepare.py does; the last part runs prepare.py from end to end.
"""

import concurrent.futures
import importlib
import json
import time
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    HOLDOUT_SHARD,
    NOWHERE,
    VAL_SHARD,
    assert_refused,
    leftovers,
    made_up_documents,
    manifest_digests,
    write_parquet,
)
from hub import Fault, Hub

DATA_SET = "karpathy/climbmix-400b-shuffle"
SHARD = "shard_00001.parquet"
FILES = ["shard_00000.parquet", SHARD, HOLDOUT_SHARD, VAL_SHARD]


@pytest.fixture
def fetch(make_repo, hub, import_prepare, tmp_path, monkeypatch):
    """fetch(workers=8): downloads FILES into fetch.raw. One that fails raises SystemExit."""
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    repo.be_impatient()
    import_prepare(repo)
    download_all = importlib.import_module("corpus.download").download_all

    def fetch(workers=8):
        download_all(DATA_SET, FILES, fetch.raw, workers)

    fetch.raw = tmp_path / "raw"
    fetch.raw.mkdir()
    return fetch


def assert_whole(raw, climbmix_files):
    """Everything that was asked for, byte by byte, and nothing else."""
    assert sorted(p.name for p in raw.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (raw / name).read_bytes() == climbmix_files[name].read_bytes(), name


def assert_sentence(raised, *needles):
    sentence = raised.value.code
    assert isinstance(sentence, str) and "\n" not in sentence
    for needle in needles:
        assert needle in sentence


@pytest.mark.parametrize("workers", [1, 8])
def test_what_arrives_is_what_was_served(fetch, hub, climbmix_files, workers):
    fetch(workers)
    assert_whole(fetch.raw, climbmix_files)
    hub.log.clear()
    fetch(workers)
    assert hub.requests() == []  # all is there


def test_a_connection_cut_at_every_tenth_is_resumed_where_it_broke(fetch, hub, climbmix_files):
    tenth = climbmix_files[SHARD].stat().st_size // 10
    hub.faults[SHARD] = Fault(cut_after=tenth)
    fetch()
    assert_whole(fetch.raw, climbmix_files)
    starts = [r.range for r in hub.requests("cdn", SHARD, "GET")]
    assert starts[:10] == ["", *(f"bytes={i * tenth}-" for i in range(1, 10))]


def test_what_an_earlier_run_left_of_a_file_is_not_fetched_again(fetch, hub, climbmix_files):
    (fetch.raw / f"{SHARD}.part").write_bytes(climbmix_files[SHARD].read_bytes()[:12345])
    (fetch.raw / f"{VAL_SHARD}.part").write_bytes(climbmix_files[VAL_SHARD].read_bytes())
    fetch()
    assert_whole(fetch.raw, climbmix_files)
    assert [r.range for r in hub.requests("cdn", SHARD, "GET")] == ["bytes=12345-"]
    assert [r.status for r in hub.requests("cdn", VAL_SHARD, "GET")] == [416]


def test_a_part_longer_than_its_file_is_thrown_away(fetch, climbmix_files):
    (fetch.raw / f"{SHARD}.part").write_bytes(bytes(10**6))
    fetch()
    assert_whole(fetch.raw, climbmix_files)


def test_a_server_that_ignores_range_is_taken_from_the_start(fetch, hub, climbmix_files):
    (fetch.raw / f"{SHARD}.part").write_bytes(b"x" * 1000)
    hub.faults[SHARD] = Fault(ignore_range=True)
    fetch()
    assert_whole(fetch.raw, climbmix_files)


@pytest.mark.parametrize("at", ["hub", "cdn"])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_out_of_order_for_a_while_is_waited_for(fetch, hub, climbmix_files, status, at):
    for name in (SHARD, VAL_SHARD):
        hub.faults[name] = Fault(status=status, times=2, at=at)
    fetch()
    assert_whole(fetch.raw, climbmix_files)
    assert [fault.times for fault in hub.faults.values()] == [0, 0]


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(fetch, hub, status):
    hub.faults[SHARD] = Fault(status=status, times=2, retry_after="1")
    fetch()
    first, second, third = hub.requests("hub", SHARD)[:3]
    assert (first.status, second.status, third.status) == (status, status, 302)
    assert second.seconds - first.seconds >= 0.99
    assert third.seconds - second.seconds >= 0.99


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


REFUSED = {  # fault -> what the one line must hold besides the name of the file
    "404": (Fault(status=404), ["404"]),
    "404 behind the redirect": (Fault(status=404, at="cdn"), ["404"]),
    "403": (Fault(status=403), ["403", "HF_TOKEN"]),
    "503 for ever": (Fault(status=503), ["503"]),
    "429 for ever": (Fault(status=429), ["429"]),
    "500 for ever, behind the redirect": (Fault(status=500, at="cdn"), ["500"]),
    "shorter than its content-length": (Fault(length_off_by=5000), ["run again"]),
    "longer than its content-length": (Fault(length_off_by=-5000), ["run again"]),
    "no byte comes through": (Fault(body=b"PAR1", length_off_by=5000), ["run again"]),
    "garbage": (Fault(body=bytes(range(256)) * 64), ["parquet"]),
    "garbage between parquet's magic bytes": (Fault(body=b"PAR1" + bytes(5000) + b"PAR1"), ["parquet"]),
    "empty": (Fault(body=b""), ["parquet"]),
    "a page": (Fault(body=b"<!DOCTYPE html><title>Please log in</title>" * 20), ["parquet"]),
    "no column text": (Fault(body=parquet(content=["a", "b"])), ["text", "content"]),
    "a column text of numbers": (Fault(body=parquet(text=[1, 2, 3])), ["text"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_had_is_one_sentence_and_costs_no_other(fetch, hub, climbmix_files, case):
    fault, needles = REFUSED[case]
    hub.faults[SHARD] = Fault(**vars(fault))
    with pytest.raises(SystemExit) as raised:
        fetch()
    assert_sentence(raised, SHARD, *needles)
    assert not (fetch.raw / SHARD).exists()
    kept = {p.name for p in fetch.raw.glob("*.parquet")}
    hub.faults.clear()
    hub.log.clear()
    fetch()
    assert_whole(fetch.raw, climbmix_files)
    assert {r.file for r in hub.requests("cdn", method="GET")} == set(FILES) - kept


def test_one_failure_upon_another_leaves_nothing_behind(fetch, hub, climbmix_files):
    for case in REFUSED:
        hub.faults[SHARD] = Fault(**vars(REFUSED[case][0]))
        with pytest.raises(SystemExit):
            fetch()
    hub.faults.clear()
    fetch()
    assert_whole(fetch.raw, climbmix_files)


@pytest.mark.parametrize("why", ["failure", "Ctrl-C"])
def test_what_is_in_progress_ends_at_once_when_all_is_lost_and_is_resumed(fetch, hub, climbmix_files, monkeypatch, why):
    """A large file that arrives slowly does not hold up the failure of another one. If it were waited for, its part would
    be gone: what arrives is no parquet file."""
    slow, size = FILES[0], 8 * 10**6
    hub.files[slow] = bytes(size)
    hub.faults[slow] = Fault(chunk_seconds=0.05)  # 24 s in all
    part = fetch.raw / f"{slow}.part"

    def until_it_arrives(*args, **kwargs):
        deadline = time.monotonic() + 100
        while not (part.exists() and part.stat().st_size):
            assert time.monotonic() < deadline, "nothing arrives"
            time.sleep(0.01)
        if why == "failure":
            return concurrent.futures.wait(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("corpus.download"), "wait", until_it_arrives)
    if why == "failure":
        hub.faults[SHARD] = Fault(body=b"garbage")
    with pytest.raises(SystemExit if why == "failure" else KeyboardInterrupt):
        fetch()
    assert 0 < part.stat().st_size < size and not (fetch.raw / slow).exists()
    hub.files[slow] = climbmix_files[slow]
    part.write_bytes(climbmix_files[slow].read_bytes()[:1000])
    hub.faults.clear()
    monkeypatch.setattr(importlib.import_module("corpus.download"), "wait", concurrent.futures.wait)
    fetch()
    assert_whole(fetch.raw, climbmix_files)
    assert "bytes=1000-" in [r.range for r in hub.requests("cdn", slow, "GET")]


@pytest.mark.parametrize("short_of", [1, 0])
def test_free_space_is_checked_before_anything_is_downloaded(fetch, hub, climbmix_files, monkeypatch, short_of):
    """Two and a half times the size of the download: the files themselves, and the tokens made of them."""
    need = int(2.5 * sum(climbmix_files[name].stat().st_size for name in FILES))
    hub_module = importlib.import_module("corpus.download")
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=need - short_of))
    if not short_of:
        fetch()
        return assert_whole(fetch.raw, climbmix_files)
    with pytest.raises(SystemExit) as raised:
        fetch()
    assert_sentence(raised, str(fetch.raw), "make room", "--num-shards", "AUTORESEARCH_CACHE")
    assert hub.requests(method="GET") == []


def test_nobody_listening_is_one_sentence(fetch, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with pytest.raises(SystemExit) as raised:
        fetch()
    assert_sentence(raised, NOWHERE, "network")
    assert list(fetch.raw.iterdir()) == []


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(fetch, hub, climbmix_files, monkeypatch, capfd):
    hub.token = "hf_secret"
    for wrong in ("", "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", wrong)
        with pytest.raises(SystemExit) as raised:
            fetch()
        assert_sentence(raised, "HF_TOKEN")
        assert "hf_wrong" not in raised.value.code
    hub.log.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")  # the same with a slash at its end
    fetch()
    assert_whole(fetch.raw, climbmix_files)
    assert {r.authorization for r in hub.requests("hub")} == {"Bearer hf_secret"}
    assert {r.authorization for r in hub.requests("cdn")} == {""}
    assert len(hub.requests("cdn", method="GET")) == len(FILES)
    assert "hf_secret" not in "".join(capfd.readouterr())


# --- from end to end --------------------------------------------------------


@pytest.fixture
def repo(make_repo, hub):
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    repo.be_impatient()
    return repo


@pytest.fixture(scope="session")
def undisturbed(prepared_climbmix):
    return manifest_digests(prepared_climbmix)


def prepare(repo, **kwargs):
    return repo.run("prepare.py", "--num-shards", "2", **kwargs)


def test_a_failed_download_is_exit_1_with_one_line_and_the_next_run_completes(repo, hub, undisturbed):
    for case in ("503 for ever", "longer than its content-length"):
        hub.faults[SHARD] = Fault(**vars(REFUSED[case][0]))
        result = prepare(repo)
        assert_refused(result, SHARD)
        assert result.rc == 1
        assert not list(repo.cache.rglob("manifest.json"))
    hub.faults.clear()
    hub.faults[VAL_SHARD] = Fault(cut_after=20_000)
    result = prepare(repo)
    assert (result.rc, result.err) == (0, "")
    assert manifest_digests(repo.cache) == undisturbed
    assert leftovers(repo.cache) == []


def test_a_second_run_asks_the_hub_for_nothing_and_says_all_is_there(make_repo, prepared_climbmix):
    result = prepare(make_repo("climbmix", HF_ENDPOINT=NOWHERE, AUTORESEARCH_CACHE=prepared_climbmix))
    assert (result.rc, result.err) == (0, "")
    assert "is prepared in" in result.out


def test_more_shards_later_fetch_those_and_keep_the_rest(repo, hub, prepared_climbmix, undisturbed):
    repo.edit("corpus/build.py", r"^TOKENIZER_SHARDS, (.*) = 4,", r"TOKENIZER_SHARDS, \1 = 2,")
    repo.copy_cache(prepared_climbmix)
    result = repo.run("prepare.py", "--num-shards", "3")
    assert result.rc == 0, result.err
    assert {r.file for r in hub.requests(method="GET")} == {"shard_00002.parquet"}
    after = manifest_digests(repo.cache)
    assert {key: after[key] for key in undisturbed} == undisturbed
    assert set(after) - set(undisturbed) == {"train_00002.npy", "train_00002_offsets.npy"}


def test_no_network_at_all_is_one_line(repo, no_network):
    del repo.env["HF_ENDPOINT"]  # the real hub, from where there is no way to it
    assert_refused(prepare(repo, wrap=no_network), "huggingface.co", "network")
    assert leftovers(repo.cache) == []


def test_a_parquet_damaged_in_the_middle_is_one_line_that_says_what_to_do(
    repo, hub, climbmix_files, undisturbed
):
    body = bytearray(climbmix_files[SHARD].read_bytes())
    body[2000:4000] = bytes(2000)  # the footer is whole, the pages are not
    hub.faults[SHARD] = Fault(body=bytes(body))
    assert_refused(prepare(repo), SHARD, "delete it, then run again")
    (repo.cache / "climbmix" / "raw" / SHARD).unlink()
    hub.faults.clear()
    result = prepare(repo)
    assert result.rc == 0, result.err
    assert manifest_digests(repo.cache) == undisturbed


def test_null_and_empty_documents_are_left_out(make_repo, climbmix_files, tmp_path, undisturbed):
    texts = made_up_documents(SHARD, 500)
    holes = [None, "", *texts[:200], None, None, *texts[200:], ""]
    with Hub(climbmix_files | {SHARD: write_parquet(tmp_path / "holes.parquet", holes)}) as hub:
        result = prepare(
            make_repo(
                "climbmix",
                HF_ENDPOINT=hub.endpoint,
            )
        )
        assert result.rc == 0, result.err
    assert manifest_digests(tmp_path / "cache") == undisturbed


@pytest.mark.parametrize("name", [VAL_SHARD, "shard_00000.parquet"])
def test_a_parquet_of_nothing_but_nulls_is_refused(make_repo, climbmix_files, tmp_path, name):
    nulls = write_parquet(tmp_path / "nulls.parquet", [None, "", None])
    with Hub(climbmix_files | {name: nulls}) as hub:
        repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
        assert_refused(repo.run("prepare.py", "--num-shards", "1"))


NUMBERS = [
    ("--num-shards", "0"),
    ("--num-shards", "-2"),
    ("--num-shards", "100000"),
    ("--download-workers", "0"),
]


@pytest.mark.parametrize("flag, value", NUMBERS)
def test_numbers_that_make_no_sense_are_refused_before_anything_is_fetched(repo, hub, flag, value):
    assert_refused(repo.run("prepare.py", flag, value), flag, value)
    assert hub.requests() == []


def test_tinystories_is_one_file_cut_by_rows(make_repo, import_prepare, tmp_path):
    import numpy as np

    texts = [f"{i} {text}" for i, text in enumerate(made_up_documents("tiny", 700))]
    name = "tinystories_gpt4_clean.parquet"
    with Hub({name: write_parquet(tmp_path / name, texts)}, repo="karpathy/tinystories-gpt4-clean") as hub:
        repo = make_repo("tinystories", HF_ENDPOINT=hub.endpoint)
        repo.edit("corpus/datasets.py", r"^TINYSTORIES_EVAL_ROWS = \S+", "TINYSTORIES_EVAL_ROWS = 200")
        result = repo.run("prepare.py")
    assert result.rc == 0, result.err
    module = import_prepare(repo)
    tokenizer, root = module.load_tokenizer(), module.data_dir()

    def rows_of_the_file(file):
        pieces = tokenizer.decode(np.load(root / file).ravel().tolist()).split("<|bos|>")
        words = [piece.split(" ") for piece in pieces]
        return [int(first) for first, *more in words if more]  # not those cropped within the number

    assert rows_of_the_file("train_00000.npy") == list(range(400, 700))
    for file, low in (("holdout_rows.npy", 0), ("val_rows.npy", 200)):
        assert len(set(rows_of_the_file(file))) > 20
        assert set(rows_of_the_file(file)) <= set(range(low, low + 200))
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["files"]["train_00000.npy"]["documents"] == 300
