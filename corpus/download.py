"""Downloads from the Hugging Face hub: in parallel, resumed after a broken connection, checked when complete.

HF_ENDPOINT and HF_TOKEN have the same meaning as in other tools. Every failure is a SystemExit with one sentence.
"""

import os
import random
import re
import shutil
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import pyarrow
import pyarrow.parquet as pq
import requests
import urllib3
from tqdm import tqdm

from corpus.system import one_line

CONNECT_SECONDS, READ_SECONDS = 10, 60  # time-outs of a request
BLOCK_BYTES = 1 << 20
ATTEMPTS_WITHOUT_PROGRESS = 5  # broken connections in a row that brought no byte, before the download is given up
# Free disk space that a download needs, in multiples of its size: the parquet files themselves, and tokens as uint16,
# which need about 1.3 times the size of the zstd-compressed parquet. The rest is reserve.
SPACE_RATIO = 2.5


class Stopped(Exception):
    """Another download failed, or Ctrl-C was pressed."""


def hub_session():
    """A requests session that retries after 429, 5xx and refused connections, with back-off, jitter, Retry-After."""
    retry = requests.adapters.Retry(
        total=5, backoff_factor=0.5, backoff_jitter=0.5, status_forcelist=[429, 500, 502, 503, 504],
        allowed_methods=["GET", "HEAD"], respect_retry_after_header=True,
    )  # fmt: skip
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # Content-Length would be that of the compressed body
    if token := os.environ.get("HF_TOKEN"):
        session.headers["Authorization"] = f"Bearer {token}"
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    return session


def hub_request(session, method, repo, name, **kwargs):
    """The response for the file `name` of the data set `repo`; SystemExit if the file does not exist or the request
    fails."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/datasets/{repo}/resolve/main/{name}"
    try:
        response = session.request(method, url, timeout=(CONNECT_SECONDS, READ_SECONDS), allow_redirects=True, **kwargs)
    except requests.RequestException as e:
        raise SystemExit(f"{name}: {url} cannot be fetched ({one_line(e)}): check the network, then run again") from e
    if response.status_code in (401, 403):
        raise SystemExit(f"{name}: {url} answered {response.status_code}: set HF_TOKEN to a token that may read it")
    if response.status_code >= 400 and response.status_code != 416:
        raise SystemExit(f"{name}: {url} answered {response.status_code} {response.reason}: is HF_ENDPOINT right?")
    return response


def check_parquet(path):
    """SystemExit if the file is not a parquet file with a column `text` of strings."""
    try:
        with pq.ParquetFile(path) as parquet:
            schema = parquet.schema_arrow
    except (pyarrow.ArrowException, OSError) as e:
        raise SystemExit(f"{path.name}: the download is not a complete parquet file ({one_line(e)}): run again") from e
    if "text" not in schema.names or schema.field("text").type not in (pyarrow.string(), pyarrow.large_string()):
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise SystemExit(f"{path.name}: has no column 'text' of strings ({columns}): is HF_ENDPOINT right?")


def download(session, repo, name, target, bar, stop):
    """Downloads one file to `target`, continuing an earlier attempt with a Range request; checked before it is renamed.

    stop: a threading.Event that ends it early; what has arrived stays for the next attempt."""
    part = target.with_name(name + ".part")
    fruitless = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with hub_request(session, "GET", repo, name, headers=headers, stream=True) as response:
            size = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
            size = int(size[1]) if size else int(response.headers.get("Content-Length", -1))
            if response.status_code == 416:  # nothing left to send: the part is complete, or longer than the file
                if have == size:
                    break
                part.unlink()
            else:
                start = have if response.status_code == 206 else 0
                error = "it ends early"
                with open(part, "ab" if start else "wb") as f:
                    try:
                        while block := response.raw.read1(BLOCK_BYTES):  # read() would lose the last, incomplete block
                            f.write(block)
                            bar.update(len(block))
                            if stop.is_set():
                                raise Stopped
                    except urllib3.exceptions.HTTPError as e:
                        error = one_line(e)
                if size in (-1, part.stat().st_size):
                    break
                fruitless = 0 if part.stat().st_size > have else fruitless + 1
                if fruitless == ATTEMPTS_WITHOUT_PROGRESS:
                    raise SystemExit(f"{name}: the connection broke at {have:,} of {size:,} bytes ({error}): run again")
                if stop.wait(min(0.2 * 2**fruitless, 5) * random.uniform(0.5, 1)):
                    raise Stopped
    try:
        check_parquet(part)
    except SystemExit:
        part.unlink()
        raise
    os.replace(part, target)


def download_all(repo, names, raw, workers):
    """Downloads those of `names` that are missing in the folder `raw`; repo: "owner/name" of the data set."""
    missing = [name for name in names if not (raw / name).exists()]
    if not missing:
        return
    session = hub_session()
    with ThreadPoolExecutor(workers) as pool:
        heads = pool.map(lambda name: hub_request(session, "HEAD", repo, name), missing)
        sizes = [int(head.headers.get("Content-Length", 0)) for head in heads]
        need, free = int(SPACE_RATIO * sum(sizes)), shutil.disk_usage(raw).free
        if need > free:
            raise SystemExit(
                f"{raw}: needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, "
                "take fewer with --num-shards, or set AUTORESEARCH_CACHE to another disk"
            )
        print(f"downloading {len(missing)} files, {sum(sizes) / 1e6:,.0f} MB, to {raw}")
        with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="download", disable=None) as bar:
            stop = threading.Event()
            jobs = [pool.submit(download, session, repo, name, raw / name, bar, stop) for name in missing]
            try:
                for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    job.result()
            except BaseException:  # a failure or Ctrl-C: downloads in progress would take minutes more
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
