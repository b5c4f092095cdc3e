"""FlashAttention-3 comes with prepare.py and is loaded by a run without a network.

The slow tests have the real `kernels` and huggingface_hub download a small kernel from a local server that answers as
the hub does: an organization, branches, trees of files, and the files of a commit.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch
from conftest import NOWHERE, ROOT, clean_environment

from frozen import device as devices

REPO, BRANCH = devices.FA3_KERNEL["repo_id"], devices.FA3_KERNEL["revision"]
METADATA = {"name": "flash-attn3", "version": 1, "license": "MIT", "python-depends": [], "backend": {"type": "cpu"}}


def kernel(said, build="torch-universal"):
    """{path: bytes} of a build whose module has NAME = said."""
    name = f"flash_attn3_{said.replace(' ', '_')}"
    return {
        f"build/{build}/__init__.py": f"NAME = {said!r}\n".encode(),
        f"build/{build}/metadata.json": json.dumps(METADATA | {"id": name}).encode(),
    }


class KernelHub:
    """The hub, with one kernel: commits {hash: {path: bytes}}, of which `head` is the branch's."""

    def __init__(self):
        self.commits, self.head, self.asked = {}, None, []

    def commit(self, files):
        self.head = hashlib.sha1(str(sorted(files)).encode() + str(len(self.commits)).encode()).hexdigest()
        self.commits[self.head] = files

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: KernelHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        if path == f"/api/organizations/{REPO.split('/')[0]}/overview":
            return self.say(json.dumps({"name": REPO.split("/")[0], "trustedKernelPublisher": True}))
        for prefix, what in ((f"/api/kernels/{REPO}/", self.api), (f"/kernels/{REPO}/resolve/", self.file)):
            if path.startswith(prefix):
                return what(path[len(prefix) :])
        self.say("Not Found", 404)

    def commit(self, revision):
        return self.hub.head if revision == BRANCH else revision

    def api(self, path):
        what, _, rest = path.partition("/")
        if what == "refs":
            branch = {"name": BRANCH, "ref": f"refs/heads/{BRANCH}", "targetCommit": self.hub.head}
            return self.say(json.dumps({"branches": [branch], "converts": [], "tags": []}))
        if what == "revision":
            return self.say(json.dumps({"id": REPO, "sha": self.commit(rest)}))
        revision, _, folder = rest.partition("/")  # of "tree"
        files, entries = self.hub.commits[self.commit(revision)], {}
        for name, content in sorted(files.items()):
            if not folder:  # asked for recursively
                oid = hashlib.sha1(content).hexdigest()
                entries[name] = {"type": "file", "path": name, "size": len(content), "oid": oid}
            elif name.startswith(f"{folder}/"):
                below = "/".join(name.split("/")[: folder.count("/") + 2])
                entries[below] = {"type": "directory", "path": below, "oid": "0" * 40}
        self.say(json.dumps(list(entries.values())))

    def file(self, path):
        revision, _, name = path.partition("/")
        commit = self.commit(revision)
        content = self.hub.commits[commit].get(name)
        if content is None:
            return self.say("Entry not found", 404, {"X-Error-Code": "EntryNotFound"})
        self.say(content, 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def say(self, body, status=200, headers=None):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub():
    with KernelHub() as hub:
        # Beside the build for this machine one that is not: a download leaves it out.
        hub.commit(kernel("the first") | kernel("another", "torch21-cxx98-cu118-aarch64-linux"))
        yield hub


# What prepare.py does on a Hopper GPU, without one.
PREPARE = """
import shutil, torch
shutil.which = lambda name: name
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
from frozen import device
device.fetch_attention_kernel()
"""
# A training run, as far as the kernel goes: restricted as from the import of prepare on, and without a network.
RUN = """
from frozen import device, guard
guard.forbid("train.py")
print("loaded:", device.fa3_kernel().NAME)
"""


def python(code, env):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def environment(tmp_path, hub, **caches):
    env = clean_environment(tmp_path / "home", tmp_path / "cache", HF_ENDPOINT=hub.endpoint, **caches)
    del env["HF_HUB_OFFLINE"]
    return {key: value.replace("TMP", str(tmp_path)) for key, value in env.items()}


CACHES = [
    {},
    {"HF_HUB_CACHE": "TMP/cache/hub"},  # below the folder of the prepared data
    {"HF_HUB_CACHE": "TMP/other", "KERNELS_CACHE": "TMP/kernels"},
]


@pytest.mark.slow
@pytest.mark.parametrize("caches", CACHES, ids=" ".join)
def test_a_run_loads_without_a_network_what_prepare_has_downloaded(caches, hub, tmp_path):
    env = environment(tmp_path, hub, **caches)
    done = python(PREPARE, env)
    assert (done.returncode, done.stdout) == (0, f"FlashAttention-3 is available ({REPO})\n"), done.stderr
    assert any(path.endswith("torch-universal/__init__.py") for path in hub.asked)
    assert not any("cu118" in path for path in hub.asked), "one build, not all"
    asked = len(hub.asked)
    done = python(RUN, env | {"HF_ENDPOINT": NOWHERE})
    assert (done.returncode, done.stdout) == (0, "loaded: the first\n"), done.stderr
    assert len(hub.asked) == asked


@pytest.mark.slow
def test_a_later_prepare_fetches_the_branch_as_it_is_then_and_an_unreachable_hub_leaves_what_there_is(hub, tmp_path):
    env = environment(tmp_path, hub)
    assert python(PREPARE, env).stdout == f"FlashAttention-3 is available ({REPO})\n"
    hub.commit(kernel("the second"))
    assert python(PREPARE, env).stdout == f"FlashAttention-3 is available ({REPO})\n"
    assert python(RUN, env).stdout == "loaded: the second\n"
    assert python(PREPARE, env | {"HF_HUB_OFFLINE": "1"}).stdout == f"FlashAttention-3 is available ({REPO})\n"


@pytest.mark.slow
def test_prepare_calls_a_kernel_available_only_if_a_run_can_load_it(hub, tmp_path):
    files = kernel("broken")
    files["build/torch-universal/__init__.py"] = b"raise ImportError('libcudart.so.99: cannot open shared object file')\n"
    hub.commit(files)
    done = python(PREPARE, environment(tmp_path, hub))
    assert (done.returncode, done.stdout) == (0, "")
    assert "FlashAttention-3 cannot be loaded (ImportError: libcudart.so.99" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("training uses FlexAttention")


# --- without the packages, in milliseconds ---


@pytest.fixture
def loaded(monkeypatch):
    """The folders that kernels.get_local_kernel was asked for."""
    asked = []
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=None, get_local_kernel=asked.append))
    for name in ("LOCAL_KERNELS", "KERNELS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return asked


@pytest.mark.parametrize(
    "variables, hub",
    [
        (dict(HOME="a"), "a/.cache/huggingface/hub"),
        (dict(HOME="a", XDG_CACHE_HOME="b"), "b/huggingface/hub"),
        (dict(HF_HOME="a", XDG_CACHE_HOME="b"), "a/hub"),
        (dict(HUGGINGFACE_HUB_CACHE="a", HF_HOME="b"), "a"),
        (dict(HF_HUB_CACHE="a", HUGGINGFACE_HUB_CACHE="b"), "a"),
        (dict(KERNELS_CACHE="a", HF_HUB_CACHE="b"), "a"),
        (dict(HOME="a", HF_HUB_CACHE="~/b"), "a/b"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_commit_that_prepare_noted_is_loaded_from_the_folder_that_the_variables_name(
    variables, hub, loaded, tmp_path, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value if value.startswith("~") else str(tmp_path / value))
    repo = tmp_path / hub / f"kernels--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / BRANCH).write_text("1234")
    for commit in ("0123", "1234", "2345"):
        (repo / "snapshots" / commit).mkdir(parents=True)
    devices.fa3_kernel()
    assert loaded == [repo / "snapshots" / "1234"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_download_that_was_cut_off_leaves_the_one_before_it_in_use(loaded, tmp_path, monkeypatch):
    """The ref names the new commit before its files are there."""
    cached = tmp_path / f"kernels--{REPO.replace('/', '--')}"
    for name in ("snapshots/old", "snapshots/new", "refs"):
        (cached / name).mkdir(parents=True)
    (cached / "refs" / BRANCH).write_text("new")
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))

    def load(path):
        if path.name not in whole:
            raise FileNotFoundError(f"no build in {path.name}")
        return path.name

    monkeypatch.setattr(sys.modules["kernels"], "get_local_kernel", load)
    whole = ["old"]
    assert devices.fa3_kernel() == "old"
    whole.append("new")
    assert devices.fa3_kernel() == "new"
    whole.clear()
    with pytest.raises(FileNotFoundError, match="no build in new"):
        devices.fa3_kernel()


def test_a_kernel_that_was_not_downloaded_is_one_sentence_with_the_folder(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{REPO} is not in {tmp_path}: run prepare.py"):
        devices.fa3_kernel()
    assert loaded == []


@pytest.mark.parametrize(
    "download, load, out, err",
    [
        (None, None, "is available", ""),
        (OSError("no network"), None, "is available", ""),
        (None, "ImportError: wrong build", "", "ImportError: wrong build"),
        (OSError("no\nnetwork"), "FileNotFoundError: not there", "", "no network"),
    ],
)
def test_what_prepare_says_is_what_a_run_can_load(download, load, out, err, monkeypatch, capsys):
    def install_kernel(**asked):
        assert asked == devices.FA3_KERNEL
        if download:
            raise download

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(install_kernel=install_kernel))
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(devices, "fa3_in_a_run", lambda: load)
    devices.fetch_attention_kernel()
    said = capsys.readouterr()
    assert out in said.out and bool(said.out) == bool(out)
    assert err in said.err and bool(said.err) == bool(err)


def test_the_pin_is_a_branch_since_the_cache_notes_no_other():
    assert set(devices.FA3_KERNEL) == {"repo_id", "revision"}
    assert BRANCH[0] == "v" and BRANCH[1:].isdigit()
