"""lab sandbox: no network, a read-only file system, $HOME hidden. What needs bubblewrap is marked slow."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import kill_group

from corpus import layout
from lab.base.errors import Refused
from lab.keeper import sandbox

ROOT = Path(__file__).resolve().parent.parent

# Tries what is given as JSON, [[name, expression], ...], and prints {name: the value, or the exception's name}.
PROBE = """
import json, os, socket, sys
results = {}
for name, expression in json.loads(sys.argv[1]):
    try:
        results[name] = repr(eval(expression))
    except Exception as error:
        results[name] = type(error).__name__
print(json.dumps(results))
"""
REFUSED = {"OSError", "PermissionError"}  # EROFS, EBUSY; EACCES


def bubblewrap_works():
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed: " + sandbox.HOW_TO_GET
    probe = ["bwrap", "--ro-bind", "/", "/", "--unshare-net", "--unshare-pid", "--proc", "/proc", "true"]
    result = subprocess.run(probe, capture_output=True, text=True)
    return result.returncode and f"bubblewrap does not work here: {result.stderr.strip()}"


def needs_bubblewrap(test):
    reason = bubblewrap_works()
    return pytest.mark.slow(pytest.mark.skipif(bool(reason), reason=str(reason))(test))


class Tree:
    def __init__(self, path, home, cache):
        self.path, self.home, self.cache = path, home, cache
        path.mkdir()
        for name in ("prepare.py", "program.md", "results.tsv", "runs.jsonl", "checkpoint.pt"):
            (path / name).write_text(f"this is {name}\n")
        shutil.copy(ROOT / "constants.py", path)
        (path / ".git").mkdir()
        (path / "probe.py").write_text(PROBE)
        self.data = cache / layout.data_dir().relative_to(layout.cache_dir())
        self.data.mkdir(parents=True)
        (self.data / "manifest.json").write_text("{}")
        (home / ".ssh").mkdir()
        (home / ".cache" / "huggingface" / "hub").mkdir(parents=True)
        (home / ".cache" / "huggingface" / "token").write_text("hf_secret")
        (home / ".cache" / "huggingface" / "hub" / "kernel").write_text("a kernel")

    def environment(self, **env):
        return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | env

    def start(self, *command, stdout=subprocess.PIPE, **env):
        return subprocess.Popen(
            [sys.executable, "-m", "lab", "sandbox", *command], cwd=self.path, env=self.environment(**env),
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *command, **env):
        process = self.start(*command, **env)
        try:
            out, err = process.communicate(timeout=30)
        finally:
            kill_group(process)
        return process.returncode, out, err

    def probe(self, expressions, **env):
        status, out, err = self.run(
            "--", "uv", "run", "probe.py", json.dumps(list(expressions.items())), **env
        )
        assert status == 0, err
        return json.loads(out)

    def listing(self):
        return sorted(
            str(p.relative_to(self.path)) for p in self.path.rglob("*") if "__pycache__" not in str(p)
        )


@pytest.fixture
def tree(tmp_path, isolated):
    return Tree(tmp_path / "tree", isolated, tmp_path / "cache")


# --- without bubblewrap -------------------------------------------------------


def test_where_bubblewrap_is_missing_one_line_says_how_to_get_it(tree, tmp_path):
    status, out, err = tree.run("--", "uv", "run", "train.py", PATH=str(tmp_path))
    assert status == 1 and not out
    assert len(err.splitlines()) == 1
    if sys.platform == "linux":
        assert "apt-get install bubblewrap" in err


def test_where_bubblewrap_does_not_work_it_says_so_and_runs_nothing(tree, tmp_path):
    fake = tmp_path / "bin" / "bwrap"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    status, out, err = tree.run("--", "touch", "new", PATH=f"{fake.parent}:{os.environ['PATH']}")
    assert status == 1 and not out
    assert "uid map: Permission denied" in err and "user namespaces may be forbidden" in err.lower()
    assert not (tree.path / "new").exists()


@pytest.mark.parametrize(
    "given, run",
    [
        ("uv run train.py", "PY train.py"),
        ("uv run --no-sync train.py --x", "PY train.py --x"),
        ("uv run -m lab sample", "PY -m lab sample"),
        ("uv run python -c pass", "PY -c pass"),
        ("uv run pytest -q", "pytest -q"),
        ("sh -c true", "sh -c true"),
    ],
)
def test_uv_run_becomes_this_python(given, run):
    assert sandbox.resolve(given.split()) == run.replace("PY", sys.executable).split()


@pytest.mark.parametrize("command", ["uv run", "uv run --with torch train.py", "uv run --project x train.py"])
def test_what_uv_alone_can_do_is_refused(command):
    with pytest.raises(Refused, match="only `uv run"):
        sandbox.resolve(command.split())


def test_the_cache_is_where_prepare_keeps_it(monkeypatch, tmp_path):
    import prepare

    assert sandbox.layout.cache_dir() == prepare.cache_dir() == Path(os.environ["AUTORESEARCH_CACHE"])
    monkeypatch.delenv("AUTORESEARCH_CACHE")
    assert sandbox.layout.cache_dir() == prepare.cache_dir() == Path.home() / ".cache" / "autoresearch"


def test_devices_that_are_there_are_bound_as_devices(monkeypatch, tree):
    there = {"/dev/nvidia*": ["/dev/nvidiactl", "/dev/nvidia0"], "/dev/dri": ["/dev/dri"]}
    monkeypatch.setattr(sandbox, "glob", lambda pattern: there.get(pattern, []))
    line = " ".join(sandbox.arguments(tree.path))
    for node in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dri"):
        assert f"--dev-bind {node} {node} " in line
    assert "/dev/kfd" not in line
    assert line.index("--dev /dev ") < line.index("--dev-bind")  # or --dev would hide them


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "KERNELS_CACHE"])
def test_downloaded_kernels_are_shown_read_only_wherever_they_are(variable, tmp_path, monkeypatch):
    kernels, tree = tmp_path / "kernels", tmp_path / "tree"
    kernels.mkdir()
    tree.mkdir()
    monkeypatch.delenv("KERNELS_CACHE", raising=False)
    for name, path in {"AUTORESEARCH_CACHE": tmp_path / "cache", variable: kernels}.items():
        monkeypatch.setenv(name, str(path))
    assert f"--ro-bind {kernels} {kernels} " in " ".join(sandbox.arguments(tree))


def writable(tree):
    """What a sandbox in `tree` binds to be written, besides the tree."""
    args = sandbox.arguments(tree.path)
    return {Path(args[i + 2]) for i, word in enumerate(args) if word == "--bind"} - {tree.path}


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"])
def test_the_compile_caches_that_variables_name_are_created_and_can_be_written(variable, tree, tmp_path, monkeypatch):
    """Or inductor could write nothing, and every such training would run eager."""
    monkeypatch.setenv(variable, str(tmp_path / "caches" / "one"))
    assert writable(tree) == {tree.cache / "compile", tmp_path / "caches" / "one"}
    assert (tmp_path / "caches" / "one").is_dir()


@pytest.mark.parametrize("place", ["home", "TMPDIR", "cache", "above", "data"])
def test_a_compile_cache_that_is_a_shared_folder_moves_one_folder_down(place, tree, tmp_path, isolated, monkeypatch):
    folders = {"home": isolated, "TMPDIR": tmp_path / "job", "cache": tree.cache, "above": tmp_path, "data": tree.data}
    folders["TMPDIR"].mkdir()
    monkeypatch.setenv("TMPDIR", str(folders["TMPDIR"]))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folders[place]))
    assert writable(tree) == {tree.cache / "compile", folders[place] / "torchinductor"}
    assert os.environ["TRITON_CACHE_DIR"] == str(folders[place] / "torchinductor")


def test_no_variable_makes_more_of_the_tree_writable_nor_settings_of_matplotlib(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tree.path / ".git"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/nowhere")  # cannot be created
    assert writable(tree) == {tree.cache / "compile"}


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "ANTHROPIC_API_KEY", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "DB_PASSWORD"]
)
def test_secrets_are_told_by_their_names(name):
    assert sandbox.SECRET.search(name)


@pytest.mark.parametrize(
    "name", ["AUTORESEARCH_SEED", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PATH", "HF_HUB_CACHE"]
)
def test_what_a_training_needs_to_know_is_no_secret(name):
    assert not sandbox.SECRET.search(name)


# --- with bubblewrap ----------------------------------------------------------


@needs_bubblewrap
def test_no_network_not_even_to_this_machine(tree):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = tree.probe(
            {
                "here": f"socket.create_connection(('127.0.0.1', {port}), 3)",
                "out": "socket.create_connection(('1.1.1.1', 53), 3)",
            }
        )
    assert found == {"here": "ConnectionRefusedError", "out": "OSError"}


@needs_bubblewrap
def test_only_the_tree_and_the_compile_cache_can_be_written(tree, tmp_path):
    cache = tree.cache
    (tree.path / "runs").mkdir()
    found = tree.probe(
        {
            "new": "open('new.txt', 'w').write('x')",
            "save": "open('checkpoint.pt.tmp', 'w').write('weights')",
            "move": "os.replace('checkpoint.pt.tmp', 'checkpoint.pt')",
            "compile": f"open('{cache}/compile/graph', 'w').write('x')",
            "named cache": "open(os.environ['TORCHINDUCTOR_CACHE_DIR'] + '/graph', 'w').write('x')",
            "tmp": "open('/tmp/x', 'w').write('x')",
            "frozen": "open('constants.py', 'a').write('x')",
            "replace": "os.replace('new.txt', 'prepare.py')",
            "delete": "os.remove('results.tsv')",
            "results": "open('results.tsv', 'a').write('x')",
            "runs": "open('runs.jsonl', 'a').write('x')",
            "lab": "open('.lab/journal', 'w').write('x')",
            "git": "open('.git/config', 'w').write('x')",
            "bytecode": "open('__pycache__/prepare.cpython-311.pyc', 'w').write('x')",
            "environment": "open(sys.prefix + '/x', 'w').write('x')",
            "beside": f"open('{tmp_path}/beside', 'w').write('x')",
            "etc": "open('/etc/x', 'w').write('x')",
            "data": f"open('{tree.data}/manifest.json', 'w').write('x')",
            "more data": f"open('{cache}/more', 'w').write('x')",
            "archive": "open('runs/x', 'w').write('x')",
            "hub": "open(os.path.expanduser('~/.cache/huggingface/hub/kernel'), 'w').write('x')",
        },
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    allowed = {"new", "save", "move", "compile", "named cache", "tmp"}
    assert {name for name, result in found.items() if result not in REFUSED} - {"beside"} == allowed
    assert (tree.path / "checkpoint.pt").read_text() == "weights"
    assert (cache / "compile" / "graph").exists() and (tmp_path / "inductor" / "graph").exists()
    assert not (tmp_path / "beside").exists()  # it was written to the sandbox's own /tmp, where this one lies
    for name in ("prepare.py", "results.tsv", "runs.jsonl"):
        assert (tree.path / name).read_text() == f"this is {name}\n"
    assert (tree.path / "constants.py").read_text() == (ROOT / "constants.py").read_text()
    own = {".lab/aside", ".lab/aside.lock"}
    assert not any(name.startswith((".git/", ".lab/", "runs/")) for name in set(tree.listing()) - own)


@needs_bubblewrap
def test_home_and_its_secrets_are_out_of_sight_but_what_is_needed_is_there(tree):
    found = tree.probe(
        {
            "home": "sorted(os.listdir(os.path.expanduser('~')))",
            "ssh": "os.listdir(os.path.expanduser('~/.ssh'))",
            "login": "open(os.path.expanduser('~/.cache/huggingface/token')).read()",
            "kernel": "open(os.path.expanduser('~/.cache/huggingface/hub/kernel')).read()",
            "data": f"open('{tree.data}/manifest.json').read()",
            "offline": "os.environ['HF_HUB_OFFLINE']",
            "key": "os.environ.get('SOME_API_KEY')",
            "seed": "os.environ.get('AUTORESEARCH_SEED')",
            "run": "os.listdir('/run')",
            "processes": "sum(name.isdigit() for name in os.listdir('/proc'))",
            "standard library": "__import__('ast').__file__ != ''",
            "packages": "__import__('numpy').arange(3).sum()",
            "shared memory": "open('/dev/shm/x', 'w').write('x')",
        },
        SOME_API_KEY="secret",
        AUTORESEARCH_SEED="43",
        HF_HUB_OFFLINE="0",
    )
    assert found["home"] == "['.cache']" and found["ssh"] == "FileNotFoundError"
    assert (
        found["login"] == "FileNotFoundError" and found["kernel"] == "'a kernel'" and found["data"] == "'{}'"
    )
    assert found["offline"] == "'1'" and found["key"] == "None" and found["seed"] == "'43'"
    assert found["run"] == "[]" and found["processes"] == "2"
    assert (
        found["standard library"] == "True"
        and found["packages"].endswith("3)")
        and found["shared memory"] == "1"
    )


class Elsewhere(Tree):
    """A working tree and its data in no folder that is hidden as a whole, with all that a run must not read."""

    def __init__(self, base, home):
        super().__init__(base / "tree", home, base / "cache")
        (self.path / ".git").rmdir()
        self.git("init", "-q")
        self.git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "--allow-empty", "-m", "x")
        self.git("worktree", "add", "-q", "../other")
        other, data = base / "other", self.data
        self.secret = [
            self.path / "checkpoint.pt", self.path / "checkpoint.pt.tmp", self.path / "best.safetensors",
            self.path / "runs/0001-abc/checkpoint.pt", self.path / ".lab/prove/1f/checkpoint.pt",
            other / "runs/0001-abc/checkpoint.pt", other / "checkpoint.pt", data / "holdout_rows.npy",
            data.with_name("raw") / "shard_06542.parquet", data.with_name("of-other-rules") / "holdout_rows.npy",
            self.cache / "another" / data.name / "val_rows.npy",
        ]  # fmt: skip
        for path in [*self.secret, data / "val_rows.npy"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"this is {path.name}\n")

    def git(self, *args):
        subprocess.run(["git", *args], cwd=self.path, check=True, capture_output=True)

    def read(self, path):
        """Expressions that read the file in another process, and in code that is not Python's."""
        native = "(lambda c: (lambda libc, text: libc.read(libc.open(%r, 0), text, 99) > 0 and text.value)"
        native += "(c.CDLL(None), c.create_string_buffer(99)))(__import__('ctypes'))"
        child = f"__import__('subprocess').run(['cat', {str(path)!r}], capture_output=True).stdout"
        return {f"{path}, child": child, f"{path}, native": native % str(path).encode()}

    def found(self, paths, *options):
        """{(file, reader): what the reader got in the sandbox}."""
        expressions = {name: code for path in paths for name, code in self.read(path).items()}
        command = [*options, "--", "uv", "run", "probe.py", json.dumps(list(expressions.items()))]
        status, out, err = self.run(*command)
        assert status == 0, err
        return json.loads(out)


@pytest.fixture
def elsewhere(isolated, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as base:
        monkeypatch.setenv("AUTORESEARCH_CACHE", f"{base}/cache")
        yield Elsewhere(Path(base).resolve(), isolated)


@needs_bubblewrap
def test_no_reader_finds_weights_or_data_but_the_prepared_rows(elsewhere):
    """What Python's own open() may read, prepare.py says; this is about child processes and native readers."""
    assert not [str(path) for path in elsewhere.secret if not path.is_file()]
    found = elsewhere.found(elsewhere.secret)
    assert {name for name, text in found.items() if "this is" in text} == set()
    rows = elsewhere.data / "val_rows.npy"
    assert all("this is val_rows.npy" in text for text in elsewhere.found([rows]).values())  # prepare.py reads them itself
    holdout = elsewhere.data / "holdout_rows.npy"
    assert elsewhere.found([holdout])[f"{holdout}, child"] == repr(bytes(holdout.stat().st_size))  # as long, for the manifest
    for path in elsewhere.secret:
        assert path.read_text() == f"this is {path.name}\n", "it has its content outside, and afterwards"


@needs_bubblewrap
def test_the_audit_sees_archives_and_holdout(elsewhere):
    found = elsewhere.found(elsewhere.secret, "--archives")
    assert all(f"this is {Path(name.partition(', ')[0]).name}" in text for name, text in found.items())


@needs_bubblewrap
def test_a_new_checkpoint_takes_the_place_of_the_last_ones(tree):
    save = "echo new > checkpoint.pt.tmp; mv checkpoint.pt.tmp checkpoint.pt"
    assert tree.run("--", "sh", "-c", f"cat checkpoint.pt; {save}")[:2] == (0, "")
    assert (tree.path / "checkpoint.pt").read_text() == "new\n" and not list((tree.path / ".lab/aside").iterdir())
    assert tree.run("--", "sh", "-c", "cat checkpoint.pt; exit 3")[:2] == (3, "")
    assert (tree.path / "checkpoint.pt").read_text() == "new\n", "as a run that failed leaves it"


@needs_bubblewrap
def test_a_cache_behind_a_link_and_one_inside_the_tree(tree, isolated, tmp_path, monkeypatch):
    (isolated / ".cache" / "autoresearch").symlink_to(tree.cache)
    for place in (isolated / ".cache" / "autoresearch", tree.path / "cache"):
        if not place.exists():
            shutil.copytree(tree.cache, place)
        data = place / tree.data.relative_to(tree.cache)
        (data.with_name("raw")).mkdir(exist_ok=True)
        found = tree.probe(
            {"data": f"open('{data}/manifest.json').read()", "all": f"sorted(os.listdir('{place}'))",
             "of it": f"os.listdir('{data.parent}')", "compile": f"open('{place}/compile/x', 'w').write('x')"},
            AUTORESEARCH_CACHE=str(place),
        )  # fmt: skip
        assert found == {"data": "'{}'", "all": repr(sorted(["compile", data.parent.name])), "of it": repr([data.name]), "compile": "1"}


@needs_bubblewrap
def test_links_in_a_tree_below_a_hidden_folder(tree, tmp_path):
    """runs/ on another disk, and the environment of another tree."""
    for name in ("runs", ".lab"):
        real = tmp_path / "another disk" / name
        real.mkdir(parents=True)
        (real / "checkpoint.pt").write_text("weights")
        shutil.rmtree(tree.path / name, ignore_errors=True)
        (tree.path / name).symlink_to(real)
    args = sandbox.arguments(tree.path)
    done = subprocess.run([shutil.which("bwrap"), *args, "sh", "-c", "cat runs/* .lab/*; echo >> new && cat new"], text=True, capture_output=True)
    assert done.returncode == 0 and "weights" not in done.stdout, done.stderr


def test_a_tree_is_not_another_one_whatever_its_path(tree, tmp_path):
    subprocess.run(["git", "init", "-q", str(tree.path)], check=True)
    link = tmp_path / "link"
    link.symlink_to(tree.path)
    assert sandbox.other_trees(tree.path) == sandbox.other_trees(link) == []


def test_a_checkpoint_that_a_run_in_progress_is_writing_stays(tree):
    (tree.path / ".lab").mkdir(exist_ok=True)
    (tree.path / "checkpoint.pt.tmp").write_text("half")
    fd = os.open(tree.path, os.O_RDONLY)  # as a training does
    fcntl.flock(fd, fcntl.LOCK_EX)
    with sandbox.without_checkpoint(tree.path):
        assert (tree.path / "checkpoint.pt.tmp").exists()
    os.close(fd)


def test_a_second_sandbox_leaves_the_checkpoint_where_the_first_has_put_it(tree):
    checkpoint = tree.path / "checkpoint.pt"
    (tree.path / ".lab").mkdir()
    with sandbox.without_checkpoint(tree.path):
        code = "import sys; from pathlib import Path; from lab.keeper import sandbox\n"
        code += "with sandbox.without_checkpoint(Path.cwd()): Path('checkpoint.pt.tmp').write_text('half')"
        subprocess.run([sys.executable, "-c", code], cwd=tree.path, env=tree.environment(), check=True)
        assert not checkpoint.exists()
    assert checkpoint.read_text() == "this is checkpoint.pt\n"


@needs_bubblewrap
def test_a_sandboxed_process_cannot_make_itself_more(tree):
    status, out, err = tree.run(
        "--", "sh", "-c", "mount -o remount,rw / 2>/dev/null || umount constants.py 2>/dev/null || echo no"
    )
    assert (status, out) == (0, "no\n"), err


@needs_bubblewrap
@pytest.mark.parametrize("status", [0, 1, 75, 130])
def test_the_exit_status_is_passed_on(tree, status):
    assert tree.run("--", "sh", "-c", f"exit {status}")[0] == status


@needs_bubblewrap
def test_a_command_that_a_signal_ended_or_that_is_not_there(tree):
    assert tree.run("--", "sh", "-c", "kill -9 $$")[0] == 137
    status, _, err = tree.run("--", "no-such-command")
    assert status == 1 and err == "sandbox: no-such-command: No such file or directory\n"


TRAIN = """
import fcntl, os, signal, sys, time
def preempted(*_):
    print("preempted", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, preempted)
fd = os.open(os.path.dirname(os.path.abspath(__file__)), os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("seed", os.environ.get("AUTORESEARCH_SEED"), flush=True)
time.sleep(600)
"""


def locked(folder):
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def start_training(tree):
    """The default command, with its output in run.log as program.md has it; returns when it trains."""
    (tree.path / "train.py").write_text(TRAIN)
    log = tree.path / "run.log"
    with open(log, "w") as f:
        process = tree.start(stdout=f, AUTORESEARCH_SEED="43")
    deadline = time.monotonic() + 20
    while "seed 43\n" not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process, log


@needs_bubblewrap
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_signals_reach_the_training_and_its_lock_is_seen_outside(tree, number, status):
    process, log = start_training(tree)
    try:
        assert locked(tree.path)
        process.send_signal(number)
        assert process.wait(timeout=10) == status
        deadline = time.monotonic() + 5
        while locked(tree.path):
            assert time.monotonic() < deadline, "the training outlived the sandbox"
            time.sleep(0.02)
        assert ("preempted" in log.read_text()) == (number == signal.SIGTERM)
    finally:
        kill_group(process)


@needs_bubblewrap
def test_a_signal_to_every_process_of_the_sandbox_still_lets_the_training_speak(tree):
    """So does `lab night` end things: bubblewrap must not fall first and take the training with it."""
    from lab.base.processes import descendants, send

    process, log = start_training(tree)
    try:
        send(signal.SIGTERM, [process.pid, *descendants(process.pid)])
        assert process.wait(timeout=10) == 75
        assert log.read_text().count("preempted") == 1
    finally:
        kill_group(process)


@needs_bubblewrap
def test_a_second_training_in_the_tree_is_seen_inside_too(tree):
    (tree.path / "train.py").write_text(TRAIN)
    fd = os.open(tree.path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    status, _, err = tree.run()
    os.close(fd)
    assert status == 1 and "BlockingIOError" in err


@needs_bubblewrap
def test_code_and_settings_that_a_run_leaves_are_put_aside(tree):
    plant = "touch json.py CLAUDE.md uv.toml .mcp.json notes.txt; mkdir torch data .claude; touch torch/__init__.py"
    status, _, err = tree.run("--", "sh", "-c", plant)
    assert status == 1
    assert "left .claude, .mcp.json, CLAUDE.md, json.py, torch, uv.toml in the working tree" in err
    left = {path.name.split("-", 1)[1] for path in (tree.path / ".lab" / "left").iterdir()}
    assert left == {".claude", ".mcp.json", "CLAUDE.md", "json.py", "torch", "uv.toml"}
    names = {path.name for path in tree.path.iterdir()}
    assert not names & left and {"notes.txt", "data", "probe.py"} <= names


@needs_bubblewrap
def test_a_human_can_replace_a_file_while_a_run_goes_on(tree):
    process, _ = start_training(tree)
    try:
        (tree.path / "edited").write_text("new words")
        os.replace(tree.path / "edited", tree.path / "program.md")  # as editors save
        assert (tree.path / "program.md").read_text() == "new words"
    finally:
        process.terminate()
        process.wait(timeout=10)
        kill_group(process)


@needs_bubblewrap
def test_a_home_that_lies_in_no_other_hidden_place(tree, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as home:
        Path(home, "diary").write_text("dear diary")
        found = tree.probe({"home": "os.listdir(os.path.expanduser('~'))", "diary": f"open('{home}/diary').read()"}, HOME=home)
    assert found == {"home": "[]", "diary": "FileNotFoundError"}


@needs_bubblewrap
def test_a_tree_in_home_and_a_cache_in_home(tmp_path, isolated, monkeypatch):
    monkeypatch.delenv("AUTORESEARCH_CACHE")
    cache = isolated / ".cache" / "autoresearch"
    tree = Tree(isolated / "autoresearch", isolated, cache)
    found = tree.probe(
        {"save": "open('checkpoint.pt', 'w').write('x')", "data": f"open('{tree.data}/manifest.json').read()",
         "compile": f"open('{cache}/compile/x', 'w').write('x')", "home": "sorted(os.listdir(os.path.expanduser('~')))"}
    )  # fmt: skip
    assert found == {"save": "1", "data": "'{}'", "compile": "1", "home": "['.cache', 'autoresearch']"}


def test_a_signal_goes_to_the_child_of_the_first_process_and_to_nothing_if_that_has_ended():
    """Without bubblewrap: a shell is the first process, and has perhaps not started its command yet."""
    first = subprocess.Popen(["sh", "-c", "sleep 626 & wait $!; echo $?"], stdout=subprocess.PIPE, text=True)
    sandbox.signal_command(first.pid, signal.SIGTERM)
    assert first.communicate(timeout=10)[0] == f"{128 + signal.SIGTERM}\n"
    sandbox.signal_command(first.pid, signal.SIGTERM)  # returns at once
