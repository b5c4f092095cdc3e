"""Downloading from the Hugging Face hub: parallel, resumed where it was cut, checked before it is moved in.

HF_ENDPOINT and HF_TOKEN are honoured as the ecosystem does. Every failure is a SystemExit with one sentence.
"""

import os
import random
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pyarrow.parquet as pq
import requests
import urllib3
from tqdm import tqdm


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def hub_session():
    """A requests session that waits out 429, 5xx and refused connections, with back-off, jitter and Retry-After."""
    retry = requests.adapters.Retry(
        total=5, backoff_factor=0.5, backoff_jitter=0.5, status_forcelist=[429, 500, 502, 503, 504],
        allowed_methods=["GET", "HEAD"], respect_retry_after_header=True,
    )  # fmt: skip
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # a compressed body would not have its Content-Length
    if token := os.environ.get("HF_TOKEN"):
        session.headers["Authorization"] = f"Bearer {token}"
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    return session


def hub_request(session, method, repo, name, **kwargs):
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/datasets/{repo}/resolve/main/{name}"
    try:
        response = session.request(method, url, timeout=(10, 60), allow_redirects=True, **kwargs)
    except requests.RequestException as e:
        raise SystemExit(f"{name}: {url} cannot be fetched ({one_line(e)}): check the network, then run again") from e
    if response.status_code in (401, 403):
        raise SystemExit(f"{name}: {url} answered {response.status_code}: set HF_TOKEN to a token that may read it")
    if response.status_code >= 400 and response.status_code != 416:
        raise SystemExit(f"{name}: {url} answered {response.status_code} {response.reason}: is HF_ENDPOINT right?")
    return response


def check_parquet(path):
    try:
        with pq.ParquetFile(path) as parquet:
            schema = parquet.schema_arrow
    except (pyarrow.ArrowException, OSError) as e:
        raise SystemExit(f"{path.name}: what arrived is no whole parquet file ({one_line(e)}): run again") from e
    if "text" not in schema.names or schema.field("text").type not in (pyarrow.string(), pyarrow.large_string()):
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise SystemExit(f"{path.name}: has no column 'text' of strings ({columns}): is HF_ENDPOINT right?")


def download(session, repo, name, target, bar):
    """Fetches one file, going on with Range where an earlier attempt was cut; checked before it is moved in."""
    part = target.with_name(name + ".part")
    fruitless = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with hub_request(session, "GET", repo, name, headers=headers, stream=True) as response:
            size = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
            size = int(size[1]) if size else int(response.headers.get("Content-Length", -1))
            if response.status_code == 416:  # nothing left to send: the part is whole, or longer than the file
                if have == size:
                    break
                part.unlink()
            else:
                start = have if response.status_code == 206 else 0
                error = "it ends early"
                with open(part, "ab" if start else "wb") as f:
                    try:
                        while block := response.raw.read1(1 << 20):  # read would drop what a cut leaves of a block
                            f.write(block)
                            bar.update(len(block))
                    except urllib3.exceptions.HTTPError as e:
                        error = one_line(e)
                if size in (-1, part.stat().st_size):
                    break
                fruitless = 0 if part.stat().st_size > have else fruitless + 1
                if fruitless == 5:
                    raise SystemExit(f"{name}: the connection broke at {have:,} of {size:,} bytes ({error}): run again")
                time.sleep(min(0.2 * 2**fruitless, 5) * random.uniform(0.5, 1))
    try:
        check_parquet(part)
    except SystemExit:
        part.unlink()
        raise
    os.replace(part, target)


def download_all(repo, names, raw, workers):
    """Fetches what is missing of `names` (files of the data set `repo`, \"owner/name\") into the folder `raw`."""
    missing = [name for name in names if not (raw / name).exists()]
    if not missing:
        return
    session = hub_session()
    with ThreadPoolExecutor(workers) as pool:
        heads = pool.map(lambda name: hub_request(session, "HEAD", repo, name), missing)
        sizes = [int(head.headers.get("Content-Length", 0)) for head in heads]
        # Tokens as uint16 take about 1.3 bytes for each byte of zstd parquet; the rest is slack.
        need, free = int(2.5 * sum(sizes)), shutil.disk_usage(raw).free
        if need > free:
            raise SystemExit(
                f"{raw}: needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, "
                "take fewer with --num-shards, or set AUTORESEARCH_CACHE to another disk"
            )
        print(f"downloading {len(missing)} files, {sum(sizes) / 1e6:,.0f} MB, to {raw}")
        with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="download", disable=None) as bar:
            jobs = [pool.submit(download, session, repo, name, raw / name, bar) for name in missing]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
