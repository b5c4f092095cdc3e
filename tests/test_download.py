"""prepare.py against a hub that misbehaves in every way one does: it gets the right bytes or says what is wrong."""

import json
import shutil

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

SHARD = "shard_00001.parquet"
FILES = ["shard_00000.parquet", SHARD, HOLDOUT_SHARD, VAL_SHARD]


@pytest.fixture
def repo(make_repo, hub):
    """Set to download two shards, the holdout and validation from a hub that the test may break."""
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    repo.be_impatient()
    return repo


@pytest.fixture(scope="session")
def undisturbed(prepared_climbmix):
    return manifest_digests(prepared_climbmix)


def prepare(repo, *args, **env):
    return repo.run("prepare.py", "--num-shards", "2", *args, **env)


def raw(repo, name=SHARD):
    return repo.cache / "climbmix" / "raw" / name


def other_parquet(tmp_path, name="other.parquet", **columns):
    pq.write_table(pa.table(columns), tmp_path / name)
    return (tmp_path / name).read_bytes()


def test_what_arrives_is_what_was_served(repo, hub, climbmix_files, undisturbed):
    result = prepare(repo)
    assert result.rc == 0, result.err
    for name in FILES:
        assert raw(repo, name).read_bytes() == climbmix_files[name].read_bytes()
    assert sorted(p.name for p in raw(repo).parent.glob("*.parquet")) == sorted(FILES)
    assert {r.file for r in hub.requests()} == set(FILES)
    assert manifest_digests(repo.cache) == undisturbed


def test_a_second_run_asks_the_hub_for_nothing_and_says_all_is_there(repo, hub, undisturbed):
    assert prepare(repo).rc == 0
    hub.log.clear()
    result = prepare(repo, HF_ENDPOINT=NOWHERE)
    assert (result.rc, result.err) == (0, "")
    assert "is prepared in" in result.out
    assert hub.requests() == []
    assert manifest_digests(repo.cache) == undisturbed


def test_more_shards_later_keep_the_tokenizer_and_the_rows(repo, hub, undisturbed):
    repo.edit("corpus/build.py", r"^TOKENIZER_SHARDS, (.*) = 4,", r"TOKENIZER_SHARDS, \1 = 2,")
    assert prepare(repo).rc == 0
    hub.log.clear()
    result = repo.run("prepare.py", "--num-shards", "3")
    assert result.rc == 0, result.err
    assert {r.file for r in hub.requests(method="GET")} == {"shard_00002.parquet"}
    after = manifest_digests(repo.cache)
    assert {key: after[key] for key in undisturbed} == undisturbed


def test_a_connection_cut_at_every_tenth_is_resumed_where_it_broke(repo, hub, climbmix_files, undisturbed):
    size = climbmix_files[SHARD].stat().st_size
    hub.faults[SHARD] = Fault(cut_after=size // 10)
    result = prepare(repo)
    assert result.rc == 0, result.err
    assert raw(repo).read_bytes() == climbmix_files[SHARD].read_bytes()
    starts = [r.range for r in hub.requests("cdn", SHARD, "GET")]
    assert starts[:10] == ["", *(f"bytes={i * (size // 10)}-" for i in range(1, 10))]
    assert manifest_digests(repo.cache) == undisturbed


def test_what_an_earlier_run_left_of_a_file_is_not_fetched_again(repo, hub, climbmix_files):
    whole = climbmix_files[SHARD].read_bytes()
    part = raw(repo, SHARD + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:12345])
    result = prepare(repo)
    assert result.rc == 0, result.err
    assert raw(repo).read_bytes() == whole
    assert [r.range for r in hub.requests("cdn", SHARD, "GET")] == ["bytes=12345-"]


def test_a_server_that_ignores_range_is_taken_from_the_start(repo, hub, climbmix_files):
    part = raw(repo, SHARD + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)  # what an earlier attempt left; here not even the right bytes
    hub.faults[SHARD] = Fault(ignore_range=True)
    result = prepare(repo)
    assert result.rc == 0, result.err
    assert raw(repo).read_bytes() == climbmix_files[SHARD].read_bytes()


def test_a_server_out_of_order_for_a_while_is_waited_for(repo, hub, undisturbed):
    for name, status, at in zip(FILES, (429, 500, 502, 503), ("hub", "cdn", "hub", "cdn"), strict=True):
        hub.faults[name] = Fault(status=status, times=2, at=at)
    result = prepare(repo)
    assert result.rc == 0, result.err
    assert all(fault.times == 0 for fault in hub.faults.values())
    assert manifest_digests(repo.cache) == undisturbed


def test_retry_after_is_obeyed(repo, hub):
    hub.faults[SHARD] = Fault(status=429, times=2, retry_after="1")
    assert prepare(repo).rc == 0
    first, second, third = hub.requests("hub", SHARD)[:3]
    assert (first.status, second.status, third.status) == (429, 429, 302)
    assert second.seconds - first.seconds >= 0.99
    assert third.seconds - second.seconds >= 0.99


REFUSED = {  # fault -> what the one line must hold
    "404": (Fault(status=404), ["404"]),
    "404 behind the redirect": (Fault(status=404, at="cdn"), ["404"]),
    "403": (Fault(status=403), ["403", "HF_TOKEN"]),
    "503 for ever": (Fault(status=503), ["503"]),
    "429 for ever": (Fault(status=429), ["429"]),
    "500 for ever, behind the redirect": (Fault(status=500, at="cdn"), ["500"]),
    "shorter than its content-length": (Fault(length_off_by=5000), ["run again"]),
    "longer than its content-length": (Fault(length_off_by=-5000), ["run again"]),
    "nothing but cuts": (Fault(cut_after=1, length_off_by=-1, body=b"PA"), []),
    "garbage": (Fault(body=bytes(range(256)) * 64), ["parquet"]),
    "garbage between parquet's magic bytes": (Fault(body=b"PAR1" + bytes(5000) + b"PAR1"), ["parquet"]),
    "empty": (Fault(body=b""), []),
    "a page": (Fault(body=b"<!DOCTYPE html><title>Please log in</title>" * 20), ["parquet"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_shard_that_cannot_be_had_is_one_line(repo, hub, case):
    fault, needles = REFUSED[case]
    hub.faults[SHARD] = Fault(**vars(fault))
    assert_refused(prepare(repo), SHARD, *needles)
    assert not raw(repo).exists()
    assert not list(repo.cache.rglob("manifest.json"))


def test_after_one_failure_upon_another_a_good_run_completes(repo, hub, undisturbed):
    for case in (
        "nothing but cuts",
        "longer than its content-length",
        "garbage",
        "503 for ever",
        "a page",
        "empty",
    ):
        hub.faults[SHARD] = Fault(**vars(REFUSED[case][0]))
        assert_refused(prepare(repo), SHARD)
    hub.faults[SHARD] = Fault(length_off_by=5000)  # leaves a part with all the bytes in it
    assert_refused(prepare(repo), SHARD)
    hub.faults.clear()
    result = prepare(repo)
    assert result.rc == 0, result.err
    assert manifest_digests(repo.cache) == undisturbed
    assert leftovers(repo.cache) == []


def test_a_shard_that_fails_does_not_cost_the_others(repo, hub):
    hub.faults[VAL_SHARD] = Fault(body=b"garbage")
    assert_refused(prepare(repo), VAL_SHARD)
    kept = {p.name for p in raw(repo).parent.glob("*.parquet")}
    hub.faults.clear()
    hub.log.clear()
    assert prepare(repo).rc == 0
    assert {r.file for r in hub.requests("cdn", method="GET")} == set(FILES) - kept


def test_a_parquet_without_text_is_refused(repo, hub, tmp_path):
    hub.faults[SHARD] = Fault(body=other_parquet(tmp_path, content=["a", "b"]))
    assert_refused(prepare(repo), SHARD, "text")
    assert not raw(repo).exists()


def test_a_text_column_of_numbers_is_refused(repo, hub, tmp_path):
    hub.faults[SHARD] = Fault(body=other_parquet(tmp_path, text=[1, 2, 3]))
    assert_refused(prepare(repo), SHARD, "text")
    assert not raw(repo).exists()


def test_a_parquet_damaged_in_the_middle_is_refused(repo, hub, climbmix_files):
    body = bytearray(climbmix_files[SHARD].read_bytes())
    body[2000:4000] = bytes(2000)  # the footer is whole, the pages are not
    hub.faults[SHARD] = Fault(body=bytes(body))
    assert_refused(prepare(repo), SHARD, "run again")
    hub.faults.clear()
    result = prepare(repo)
    assert result.rc == 0, result.err


def test_null_and_empty_documents_are_left_out(make_repo, climbmix_files, tmp_path):
    texts = made_up_documents(SHARD, 500)
    holes = [None, "", *texts[:200], None, None, *texts[200:], ""]
    with Hub(climbmix_files | {SHARD: write_parquet(tmp_path / "holes.parquet", holes)}) as hub:
        repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
        result = prepare(repo)
        assert result.rc == 0, result.err
        with_holes = manifest_digests(repo.cache)
        hub.files[SHARD] = write_parquet(tmp_path / "whole.parquet", texts)
        shutil.rmtree(repo.cache)
        assert prepare(repo).rc == 0
        assert manifest_digests(repo.cache) == with_holes


def test_a_parquet_of_nothing_but_nulls_is_refused(make_repo, climbmix_files, tmp_path):
    nulls = write_parquet(tmp_path / "nulls.parquet", [None, "", None])
    with Hub(climbmix_files | {VAL_SHARD: nulls}) as hub:
        repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
        assert_refused(prepare(repo), "val")


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(make_repo, climbmix_files):
    with Hub(climbmix_files, token="hf_secret") as hub:
        repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
        assert_refused(prepare(repo), "HF_TOKEN")
        hub.log.clear()
        result = prepare(repo, HF_TOKEN="hf_secret")
        assert result.rc == 0, result.err
        assert {r.authorization for r in hub.requests("hub")} == {"Bearer hf_secret"}
        assert {r.authorization for r in hub.requests("cdn")} == {""}
        assert hub.requests("cdn", method="GET")
        assert "hf_secret" not in result.out + result.err


def test_a_wrong_token_is_named_and_not_printed(make_repo, climbmix_files):
    with Hub(climbmix_files, token="hf_secret") as hub:
        repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
        result = prepare(repo, HF_TOKEN="hf_wrong")
        assert_refused(result, "HF_TOKEN")
        assert "hf_wrong" not in result.out + result.err


def test_an_endpoint_with_a_slash_at_its_end_is_the_same_endpoint(repo, hub):
    result = prepare(repo, HF_ENDPOINT=hub.endpoint + "/")
    assert result.rc == 0, result.err


def test_nobody_listening_is_one_line(repo):
    assert_refused(prepare(repo, HF_ENDPOINT=NOWHERE), "network")
    assert leftovers(repo.cache) == []


def test_no_network_at_all_is_one_line(repo, no_network):
    del repo.env["HF_ENDPOINT"]  # the real hub, from where there is no way to it
    result = prepare(repo, wrap=no_network)
    assert_refused(result, "huggingface.co", "network")


def test_one_download_worker_fetches_the_same(repo, undisturbed):
    assert prepare(repo, "--download-workers", "1").rc == 0
    assert manifest_digests(repo.cache) == undisturbed


@pytest.mark.parametrize("flag, value", [("--num-shards", v) for v in ("0", "-2", "100000", "many")]
                         + [("--download-workers", v) for v in ("0", "-1")])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused_before_anything_is_fetched(repo, hub, flag, value):
    result = repo.run("prepare.py", flag, value)
    assert result.rc != 0
    assert flag in result.err.splitlines()[-1] and value in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert hub.requests() == []


def test_tinystories_is_one_file_cut_by_rows(make_repo, tmp_path):
    texts = [f"{i} {text}" for i, text in enumerate(made_up_documents("tiny", 700))]
    name = "tinystories_gpt4_clean.parquet"
    with Hub({name: write_parquet(tmp_path / name, texts)}, repo="karpathy/tinystories-gpt4-clean") as hub:
        repo = make_repo("tinystories", HF_ENDPOINT=hub.endpoint)
        repo.edit("corpus/documents.py", r"^TINYSTORIES_EVAL_ROWS = \S+", "TINYSTORIES_EVAL_ROWS = 200")
        result = repo.run("prepare.py")
        assert result.rc == 0, result.err
    code = """
        import json, prepare, numpy as np
        tokenizer = prepare.load_tokenizer()
        first = {}
        for split in ("val", "holdout"):
            rows = np.load(next(prepare.data_dir().glob(f"{split}_rows.npy")))
            text = tokenizer.decode([int(t) for t in rows.ravel()])
            documents = [t.split(" ") for t in text.split("<|bos|>")]
            first[split] = [int(t[0]) for t in documents if len(t) > 1]  # not those cropped within the number
        tokens = np.load(prepare.data_dir() / "train_00000.npy")
        text = tokenizer.decode([int(t) for t in tokens])
        first["train"] = [int(t.split(" ")[0]) for t in text.split("<|bos|>")[1:]]
        print(json.dumps(first))
    """
    first = json.loads(repo.run_code(code).out)
    assert first["train"] == list(range(400, 700))
    assert set(first["holdout"]) <= set(range(200)) and len(set(first["holdout"])) > 20
    assert set(first["val"]) <= set(range(200, 400)) and len(set(first["val"])) > 20
