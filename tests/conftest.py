"""What every test stands on: a home and a cache of its own, no network, and copies of the repo to break.

    def test_something(make_repo, hub):
        repo = make_repo("climbmix", HF_ENDPOINT=hub.endpoint)     # a copy of the core files, with tiny rules
        result = repo.run("prepare.py", "--num-shards", "2")
        assert result.rc == 0, result.err

`prepared_stdlib` and `prepared_climbmix` are caches made once a session under the tiny rules: read them, or
`repo.copy_cache(prepared_stdlib)`; never write into them.

Tests run in three processes per two cores (pytest-xdist, -n in pyproject.toml). Two tests of a module run in the same process
if that has fixtures of its own (scope="module"); the others go wherever there is room. The tests of QUIET_FILES
measure times or wait for other processes: all of them run in one process, one after the other.
`-n 0` runs everything in this process; `--shuffle SEED` runs the tests in another order.
"""

import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hub import Hub
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
CORE_FILES = [
    "constants.py",
    "prepare.py",
    "corpus",
    "frozen",
    "train.py",
    "pyproject.toml",
    "program.md",
    ".gitignore",
    "lab",
]
TINY_RULES = {  # dataset -> (max_seq_len, eval_tokens, vocab_size)
    "climbmix": (32, 32 * 64, 512),
    "tinystories": (32, 32 * 64, 512),
    "stdlib": (64, 64 * 64, 512),
}
VAL_SHARD, HOLDOUT_SHARD = "shard_06542.parquet", "shard_06541.parquet"
NOWHERE = "http://127.0.0.1:9"  # the discard port, closed: what a test would reach that forgot its hub


# Where CI sets AUTORESEARCH_CI=1, a test that would be left out fails: there every component can be had.
MUST_RUN = os.environ.get("AUTORESEARCH_CI") == "1"


def left_out(reason):
    """Skips a test whose component is missing; fails it in CI."""
    if MUST_RUN:
        pytest.fail(f"left out in CI: {reason}", pytrace=False)
    pytest.skip(reason)


# Before a test module imports torch: there is a worker per core, and threads of several workers would get in each
# other's way. Tests then also compute in one order whatever the number of cores.
os.environ["OMP_NUM_THREADS"] = "1"

MOST_WORKERS = 8  # each holds torch, and its own copy of what tests build once in a module
QUIET_FILES = {"test_night.py", "test_preemption.py", "test_slurm.py"}
# Groups and files with slow tests that take minutes: they begin first, so that no worker is left alone with one at the end.
LONGEST = [
    "quiet", "test_night_scripted.py", "test_containers.py", "test_slurm_cluster.py", "test_damaged.py", "test_prove.py",
    "test_queue_real.py", "test_queue_kill.py", "test_zoo.py", "test_doctor.py", "test_run.py", "test_prepare.py",
    "test_verdict.py", "test_profile.py",
]  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--shuffle", metavar="SEED", help="run the tests in another order: modules, and the tests in each of them"
    )


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_xdist_auto_num_workers(config):
    """Three workers for two cores, as a fifth of the suite's time is waiting; none for tests named one by one."""
    if all("::" in arg for arg in config.args):
        return 0
    return min(cores() + cores() // 2, MOST_WORKERS)


class Together(LoadScopeScheduling):
    """Which tests run in the same worker: those of a module that has fixtures of its own, and all that are quiet. The
    others go one by one to whichever worker is free. The longest come first, then large groups."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        if os.path.basename(file) in QUIET_FILES:
            return "quiet"
        return file if 'scope="module"' in (ROOT / file).read_text(encoding="utf-8") else nodeid

    def _assign_work_unit(self, node):
        if not any(self.assigned_work.values()):  # the first of all
            self.workqueue = type(self.workqueue)(sorted(self.workqueue.items(), key=lambda unit: place_in_line(unit[0])))
        super()._assign_work_unit(node)


def place_in_line(scope):
    name = os.path.basename(scope.partition("::")[0])
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # Not --dist loadgroup: xdist 3.8 hands its groups over in a private field that pytest 9.2 no longer has.
    return Together(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_modifyitems(config, items):
    if seed := config.getoption("--shuffle"):
        # Whole modules stay together: fixtures are then built as often as without.
        modules = sorted({item.path for item in items})
        place = dict(zip(random.Random(seed).sample(modules, len(modules)), range(len(modules)), strict=True))
        turn = {item.nodeid: random.Random(f"{seed} {item.nodeid}").random() for item in items}
        items.sort(key=lambda item: (place[item.path], turn[item.nodeid]))


# Python processes that tests start import torch much faster where its bytecode is on disk. So what is imported while
# the tests are collected may write bytecode, whatever PYTHONDONTWRITEBYTECODE says; nothing may write any later: a
# module of a temporary repository that is edited twice within a second would be taken for the old one.
sys.dont_write_bytecode = False


def pytest_collection_finish():
    sys.dont_write_bytecode = True


class Result(NamedTuple):
    rc: int
    out: str
    err: str


def clean_environment(home, cache, **extra):
    """The environment of a test's processes: nothing of the developer's own settings, no way to the network."""
    ours = re.compile(
        r"(?i)^(.*_proxy|HF_.*|HUGGING.*|AUTORESEARCH_.*|TORCHINDUCTOR_.*|XDG_.*|LOCAL_KERNELS|PYTHON.*)$"
    )
    env = {key: value for key, value in os.environ.items() if not ours.match(key)}
    env |= {
        "HOME": str(home),
        "AUTORESEARCH_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    env |= {"HF_ENDPOINT": NOWHERE, "NO_PROXY": "*", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return env | {key: str(value) for key, value in extra.items()}


class Repo:
    """A temporary copy of the core files, whose rules a test may edit as a human who forks would."""

    def __init__(self, path, env):
        self.path, self.env = Path(path), env
        self.path.mkdir(parents=True)
        for name in CORE_FILES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.path / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, self.path / name)

    @property
    def cache(self):
        return Path(self.env["AUTORESEARCH_CACHE"])

    def edit(self, file, pattern, replacement):
        """Replaces the regular expression, which must match exactly once."""
        text, n = re.subn(pattern, replacement, (self.path / file).read_text(), flags=re.MULTILINE)
        assert n == 1, f"{pattern!r} matches {n} times in {file}: expected once"
        (self.path / file).write_text(text)

    def set_rules(self, dataset, max_seq_len, eval_tokens, vocab_size):
        rules = f"Rules(max_seq_len={max_seq_len}, eval_tokens={eval_tokens}, vocab_size={vocab_size})"
        self.edit("constants.py", rf'(?<="{dataset}": )Rules\(.*\)', rules)

    def set_seconds(self, time_budget=None, grace=None):
        if time_budget is not None:
            self.edit("constants.py", r"^TIME_BUDGET = \S+", f"TIME_BUDGET = {time_budget}")
        if grace is not None:
            self.edit("constants.py", r"^GRACE = \S+", f"GRACE = {grace}")

    def be_impatient(self):
        """Retries come after hundredths of a second and the server is given up after the third."""
        self.edit(
            "corpus/download.py",
            r"total=\d+, backoff_factor=[\d.]+, backoff_jitter=[\d.]+",
            "total=3, backoff_factor=0.01",
        )
        self.edit("corpus/download.py", r"stop\.wait\(min\(0\.2 \*", "stop.wait(0.01 * min(0.2 *")

    def copy_cache(self, source):
        shutil.copytree(source, self.cache, dirs_exist_ok=True)

    def start(self, *args, wrap=(), **env):
        """Popen of `python ARGS` in the copy, as the leader of a process group of its own."""
        return subprocess.Popen(
            [*wrap, sys.executable, *map(str, args)],
            cwd=self.path,
            env=self.env | {key: str(value) for key, value in env.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *args, timeout=120, wrap=(), **env):
        """`python ARGS` in the copy, to its end. wrap: a command to put in front, such as ["unshare", "-rn"]."""
        process = self.start(*args, wrap=wrap, **env)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            kill_group(process)
        return Result(process.returncode, out, err)

    def run_code(self, code, **kwargs):
        """Runs a snippet with the copy's modules importable."""
        return self.run("-c", textwrap.dedent(code), **kwargs)


def kill_group(process):
    """Ends the process and whatever it started and left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if process.poll() is None:
        process.wait(timeout=10)


def assert_refused(result, *needles):
    """Non-zero exit and exactly one line on stderr that holds each needle."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert result.rc not in (0, None), f"exit {result.rc}\n{result.out}\n{result.err}"
    assert len(lines) == 1, f"{len(lines)} lines on stderr:\n{result.err}"
    assert "Traceback" not in result.out
    for needle in needles:
        assert needle in lines[0], f"{needle!r} is not in: {lines[0]}"


def manifest_digests(cache):
    """File name -> sha256 of the one manifest below `cache`, each checked against the file it speaks of."""
    (path,) = Path(cache).rglob("manifest.json")
    digests = {name: entry["sha256"] for name, entry in json.loads(path.read_text())["files"].items()}
    for name, digest in digests.items():
        assert hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == digest, (
            f"{name} is not {digest}"
        )
    return digests


def leftovers(cache):
    """Half-written files below `cache`."""
    return sorted(str(p.relative_to(cache)) for p in Path(cache).rglob("*") if re.search(r"tmp|part", p.name))


def can(*command):
    return (
        shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    )


@pytest.fixture(scope="session")
def no_network():
    """A command to put in front of another, which then has no network, not even a loopback."""
    if not can("unshare", "-rn"):
        pytest.skip("this system lets no one make a network namespace (unshare -rn)")
    return ["unshare", "-rn"]


@pytest.fixture(scope="session")
def own_mounts():
    """A command to put in front of another, which may then mount things that nobody else sees."""
    if not can("unshare", "-rm"):
        pytest.skip("this system lets no one make a mount namespace (unshare -rm)")
    return ["unshare", "-rm"]


@pytest.fixture(scope="session")
def no_privileges():
    """A command to put in front of another, which then may read and write only what permissions let it: of root too."""
    if os.geteuid():
        return []
    caps = "-dac_override,-dac_read_search"
    wrap = ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}"]
    if not can(*wrap):
        left_out("root may read and write everything, and there is no setpriv to take that away (util-linux)")
    return wrap


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """A temporary home and cache, one thread, no hub, for what a test does in its own process."""
    home = tmp_path / "home"
    home.mkdir()
    env = clean_environment(home, tmp_path / "cache")
    for key in set(os.environ) - set(env):
        if not key.startswith(("PYTEST", "PYTHON")):
            monkeypatch.delenv(key)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    return home


@pytest.fixture
def make_repo(tmp_path):
    """make_repo(dataset="stdlib", rules=None, time_budget=None, grace=None, **environment) -> Repo"""
    made = []

    def make(dataset="stdlib", rules=None, time_budget=3, grace=60, **extra):
        place = tmp_path / f"clone{len(made)}"
        made.append(place)
        home, cache = tmp_path / "home", tmp_path / "cache"
        extra.setdefault("AUTORESEARCH_DATASET", dataset)
        return tiny_repo(place, home, cache, dataset, rules, time_budget, grace, **extra)

    return make


@pytest.fixture
def import_prepare(monkeypatch):
    """import_prepare(repo) -> the copy's prepare.py, imported into this process under the copy's environment.
    What else is imported until the test ends (corpus.build, train) is the copy's too."""

    def ours():
        return [
            name for name in sys.modules if name.split(".")[0] in ("constants", "prepare", "corpus", "frozen", "train")
        ]

    before = {name: sys.modules.pop(name) for name in ours()}

    def load(repo):
        for name in ours():
            del sys.modules[name]
        for key, value in repo.env.items():
            monkeypatch.setenv(key, value)
        monkeypatch.syspath_prepend(repo.path)
        return importlib.import_module("prepare")

    yield load
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


def tiny_repo(place, home, cache, dataset, rules=None, time_budget=3, grace=60, **extra):
    repo = Repo(place, clean_environment(home, cache, **extra))
    for name, tiny in TINY_RULES.items():
        repo.set_rules(name, *(rules if rules and name == dataset else tiny))
    repo.set_seconds(time_budget, grace)
    return repo


# --- data ---------------------------------------------------------------------


def made_up_text(rng, words):
    """Sentences of made-up words in several scripts, with numbers, accents and emoji."""
    alphabets = [
        "etaoinshrdlu",
        "etaoinshrdlu",
        "etaoinshrdlu",
        "éàüñçøß",
        "абвгдежз",
        "αβγδεζ",
        "日月火水木金土",
        "🙂🚀🌍👩‍🚀",
    ]
    out = []
    for i in range(words):
        alphabet = rng.choice(alphabets)
        length = rng.randint(1, 2) if alphabet is alphabets[-1] else rng.randint(1, 8)
        word = "".join(rng.choice(alphabet) for _ in range(length))
        out.append(
            rng.choice([word, word, word.capitalize(), str(rng.randint(0, 99999)), f"{word}'s", f"({word})"])
        )
        out.append(rng.choice([" ", " ", " ", " ", ", ", ". ", "\n", "\n\n"]) if i < words - 1 else ".")
    return "".join(out)


def made_up_documents(seed, n):
    """n documents whose lengths are spread as natural ones are: many short, a few very long."""
    rng = random.Random(seed)
    return [made_up_text(rng, max(1, min(600, int(rng.lognormvariate(2.5, 1.0))))) for _ in range(n)]


def write_parquet(path, texts, column="text", row_group_size=100):
    table = pa.table({column: pa.array(texts, pa.string()), "source": pa.array(["made up"] * len(texts))})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, request):
    """made_once(name, make) -> a folder that make(folder) has filled, in the first of the workers that asks for it."""
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent  # that of all the workers of this session

    def get(name, make):
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # another worker failed at it
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def climbmix_files(made_once):
    """File name -> Path of a small data set in climbmix's layout: shards 0 to 3, holdout and validation."""
    names = [*(f"shard_{i:05d}.parquet" for i in range(4)), HOLDOUT_SHARD, VAL_SHARD]

    def make(folder):
        for name in names:
            write_parquet(folder / name, made_up_documents(name, 500))

    folder = made_once("climbmix", make)
    return {name: folder / name for name in names}


@pytest.fixture
def hub(climbmix_files):
    with Hub(climbmix_files) as server:
        yield server


@pytest.fixture(scope="session")
def prepared_climbmix(made_once, climbmix_files):
    """A cache with the small climbmix prepared under the tiny rules, two training shards. Read only."""

    def make(base):
        with Hub(climbmix_files) as server:
            repo = tiny_repo(base / "clone", base, base / "cache", "climbmix", HF_ENDPOINT=server.endpoint)
            result = repo.run("prepare.py", "--num-shards", "2")
        assert result.rc == 0, result.err

    return made_once("prepared_climbmix", make) / "cache"


@pytest.fixture(scope="session")
def prepared_stdlib(made_once):
    """A cache with the standard library prepared under the tiny rules. Read only."""

    def make(base):
        repo = tiny_repo(base / "clone", base, base / "cache", "stdlib", AUTORESEARCH_DATASET="stdlib")
        result = repo.run("prepare.py", timeout=250)
        assert result.rc == 0, result.err

    return made_once("prepared_stdlib", make) / "cache"
