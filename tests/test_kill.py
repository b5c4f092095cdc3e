"""prepare.py killed (SIGKILL) before each of its writes, and at random moments: the next run makes it good.

The first part forks: a child imports nothing anew, prepares, and kills itself before the n-th time it opens a file
for writing, renames, removes or makes a folder below the cache (an audit hook sees them all). A file about to be
moved in is cut in half first, which is what a kill in the middle of writing it would have left.
"""

import json
import random
import signal
import textwrap
import time

import psutil
import pytest
from conftest import kill_group, leftovers, made_up_text, manifest_digests
from hub import Fault

HARNESS = """
    import json, os, shutil, signal, sys, sysconfig
    from concurrent.futures import Future
    from pathlib import Path
    import prepare, corpus.build, corpus.download, pyarrow.parquet, rustbpe

    cache = Path(os.environ["AUTORESEARCH_CACHE"])
    library = sys.argv[1]

    class InThisProcess:
        "ProcessPoolExecutor's place: forked children start no processes of their own"
        def __init__(self, workers, context, initializer, args):
            initializer(args[0], os.getppid())
        def submit(self, function, *args):
            future = Future()
            future.set_result(function(*args))
            return future
        def shutdown(self, **kwargs):
            pass

    corpus.build.ProcessPoolExecutor = InThisProcess
    get_path = sysconfig.get_path
    corpus.datasets.sysconfig.get_path = lambda name, *a, **k: library if name == "stdlib" else get_path(name, *a, **k)

    def in_child(work, kill_at=None):
        "True where the child was killed, False where it ended well"
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            left = kill_at
            def audit(event, args):
                nonlocal left
                writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
                if left is not None and (writes or event in ("os.rename", "os.remove", "os.mkdir")):
                    if str(args[0]).startswith(str(cache)):
                        left -= 1
                        if left == 0:
                            left = None
                            if event == "os.rename":
                                os.truncate(args[0], os.path.getsize(args[0]) // 2)
                            os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(audit)
            try:
                work()
            except BaseException as e:
                os.write(2, f"{type(e).__name__}: {e} (to be killed at write {kill_at})".encode())
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            return True
        if os.WEXITSTATUS(status):
            sys.exit(1)
        return False

    def digests():
        "as the one manifest says them, each checked against the file itself; {} without a manifest"
        path = corpus.layout.data_dir() / "manifest.json"
        if not path.exists():
            return {}
        entries = json.loads(path.read_text())["files"]
        for name, entry in entries.items():
            assert corpus.system.sha256_files(path.parent / name) == entry["sha256"], f"{name} is not what the manifest says"
        return {name: entry["sha256"] for name, entry in entries.items()}

    def files():
        "what lies in the cache; a finished manifest.partial.json may stay behind, it does no harm"
        return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.name != "manifest.partial.json")

    def put_back(saved):
        shutil.rmtree(cache, ignore_errors=True)
        if saved:
            shutil.copytree(saved, cache)

    def kill_everywhere(work, saved=None):
        "kills a run before its first write, a fresh one before its second ...; completes each; returns how many"
        put_back(saved)
        in_child(work)
        undisturbed = digests()
        undisturbed_files = files()
        n = 1
        while True:
            put_back(saved)
            if not in_child(work, kill_at=n):
                break
            digests()  # what a manifest speaks of is there, at any moment
            in_child(work)
            assert digests() == undisturbed, f"killed at write {n}"
            assert files() == undisturbed_files, f"killed at write {n}"
            n += 1
        assert undisturbed
        print(n - 1)
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """A folder of a few modules, in the place of the standard library."""
    folder = tmp_path_factory.mktemp("library")
    rng = random.Random(1)
    for i in range(40):
        (folder / f"module{i:02d}.py").write_text(
            "".join(f"def f{j}():\n    '{made_up_text(rng, 25)}'\n" for j in range(8))
        )
    return folder


def kill_everywhere(repo, library, call):
    """Runs `call` in the harness; returns at how many writes it was killed."""
    (repo.path / "harness.py").write_text(textwrap.dedent(HARNESS) + call + "\n")
    result = repo.run("harness.py", library, timeout=280)
    assert result.rc == 0, result.err
    return int(result.out.splitlines()[-1])


@pytest.mark.slow  # a quarter of a minute
def test_killed_before_any_write_of_preparing(make_repo, library):
    repo = make_repo("stdlib", rules=(32, 32 * 16, 300))
    assert kill_everywhere(repo, library, "kill_everywhere(corpus.build.prepare)") > 25


def test_killed_before_any_write_of_downloading(make_repo, hub, library, climbmix_files):
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    call = """
raw = cache / "climbmix" / "raw"
def work():
    raw.mkdir(parents=True, exist_ok=True)
    corpus.download.download_all("karpathy/climbmix-400b-shuffle", ["shard_00000.parquet", "shard_06542.parquet"], raw, 1)
digests = lambda: {p.name: corpus.system.sha256_files(p) for p in raw.glob("*.parquet")}
kill_everywhere(work)
"""
    assert kill_everywhere(repo, library, call) >= 5


DOWNLOAD_THIRD = (
    "corpus.download.download_all('karpathy/climbmix-400b-shuffle', ['shard_00002.parquet'], "
    "corpus.layout.cache_dir() / 'climbmix' / 'raw', 1)"
)


@pytest.mark.slow  # a minute and a half
def test_killed_before_any_write_of_preparing_more_shards(
    make_repo, prepared_climbmix, hub, library, tmp_path
):
    """With fewer than four shards the tokenizer changes too, and with it every file the manifest names."""
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    repo.copy_cache(prepared_climbmix)
    repo.run_code("import corpus.download, prepare\n" + DOWNLOAD_THIRD)
    saved = tmp_path / "saved"
    repo.cache.rename(saved)
    call = f"kill_everywhere(lambda: corpus.build.prepare(3), {str(saved)!r})"
    assert kill_everywhere(repo, library, call) > 25


@pytest.mark.slow
def test_killed_at_five_random_moments(make_repo, prepared_climbmix, hub):
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    for name in hub.files:
        hub.faults[name] = Fault(chunk_seconds=0.05)  # so that downloading has its share of the moments
    began = time.monotonic()
    assert repo.run("prepare.py", "--num-shards", "2").rc == 0
    seconds = time.monotonic() - began
    undisturbed = manifest_digests(repo.cache)
    rng = random.Random(42)
    for moment in sorted(rng.uniform(0.15, 0.95) for _ in range(5)):
        repo.env["AUTORESEARCH_CACHE"] = str(repo.path.parent / f"cache_{moment}")
        process = repo.start("prepare.py", "--num-shards", "2")
        time.sleep(moment * seconds)
        kill_group(process)
        result = repo.run("prepare.py", "--num-shards", "2")
        assert result.rc == 0, f"killed after {moment:.0%}: {result.err}"
        assert manifest_digests(repo.cache) == undisturbed
        assert leftovers(repo.cache) == []


def test_worker_processes_end_with_a_prepare_that_is_killed(make_repo, hub):
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    process = repo.start("prepare.py", "--num-shards", "4")
    workers = []
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and not workers and time.monotonic() < deadline:
            workers = [
                p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())
            ]
            time.sleep(0.005)
        assert workers, "no worker was seen"
        process.send_signal(signal.SIGKILL)  # to it alone, not to the group
        process.wait()
        gone, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive
    finally:
        kill_group(process)


def test_a_worker_that_is_killed_is_one_line(make_repo, hub, prepared_climbmix):
    repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)
    process = repo.start("prepare.py", "--num-shards", "4")
    killed = []
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and not killed and time.monotonic() < deadline:
            killed = [
                p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())
            ]
            for worker in killed:
                worker.kill()  # as the kernel does where memory runs out
            time.sleep(0.005)
        out, err = process.communicate(timeout=60)
    finally:
        kill_group(process)
    assert killed and process.returncode == 1
    assert len(err.splitlines()) == 1 and "memory" in err
    assert repo.run("prepare.py", "--num-shards", "2").rc == 0
    assert json.loads(next(repo.cache.rglob("manifest.json")).read_text())["train_shards"] == 2
