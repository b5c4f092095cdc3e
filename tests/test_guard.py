"""What a run may read outside its own folder: nothing that an earlier run may have left there.

One child process says of many files, all older than it, why it may not read them. (Whole runs: test_run.py, zoo.py.)
"""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, clean_environment

# /tmp is left out: everything here is below it.
ASK = """
import json, os, sys
from frozen import guard
guard.TEMPORARY = (os.environ["TMPDIR"],)
guard.forbid(sys.argv[1])
print(json.dumps({path: guard.why_not(path) for path in json.load(sys.stdin)}))
"""
LEFT, FOREIGN, WEIGHTS, DATA = "is older than this run", "neither train.py nor frozen", "holds weights", "is not for train.py to read"
HUB = "home/.cache/huggingface/hub"

FILES = {  # path: what the sentence says, None if a run may read it
    "home/stats.json": LEFT,
    "home/stats.npy": LEFT,
    "home/.config/stats.txt": LEFT,
    "home/weights.pt": WEIGHTS,
    "home/source/module.py": None,  # an installed package may be a link to its source
    "home/source/module.npz": LEFT,
    "home/.triton/cache/ab/kernel.json": None,
    "home/.triton/cache/ab/kernel.npy": LEFT,
    "home/.triton/triton.json": None,
    "home/triton.json": LEFT,
    "home/.cache/torch_extensions/py311/add/build.ninja": None,
    "home/.cache/matplotlib/fontlist.json": None,
    "home/.cache/huggingface/token": None,
    "home/.cache/huggingface/.agent_harnesses.json": None,
    "home/.cache/huggingface/token_counts.npy": LEFT,
    "home/.cache/huggingface/stats.json": LEFT,
    f"{HUB}/kernels--a--b/snapshots/1/build/torch-cuda/__init__.py": None,
    f"{HUB}/kernels--a--b/snapshots/1/build/torch-cuda/table.npy": None,
    f"{HUB}/kernels--a--b/blobs/0123": None,
    f"{HUB}/models--kernels-community--flash-attn3/refs/v1": None,
    f"{HUB}/models--a--b/snapshots/1/config.json": LEFT,
    f"{HUB}/models--a--b/snapshots/1/model.safetensors": WEIGHTS,
    "tmp/bigram.npy": LEFT,
    "tmp/stats.json": LEFT,
    "tmp/stats.py": LEFT,
    "tmp/torchinductor_me/ab/kernel.py": None,
    "tmp/torchinductor_me/ab/best_config.json": None,
    "tmp/torchinductor_me/ab/stats.pkl": LEFT,
    "tmp/torchinductor_me/precompiled_headers/locks/ab.lock": None,  # there even if TORCHINDUCTOR_CACHE_DIR is elsewhere
    "tmp/me/quack_cache/kernel.o": None,
    "work/tree/stats.json": FOREIGN,
    "work/tree/train.py": None,
    "work/tree/frozen/guard.py": None,
    "work/tree/venv.npy": FOREIGN,
    "work/tree/.venv/lib/package/table.npy": None,
    "work/other/stats.json": LEFT,
    "work/stats.csv": LEFT,
    "cache/compile/ab/kernel.py": None,
    "cache/compile/fxgraph/ab/entry": None,
    "cache/compile/stats.npz": LEFT,
    "cache/compile/stats.dat.gz": LEFT,
    "cache/stdlib/val_rows.npy": DATA,
    "cache/stats.json": DATA,
    "inductor/kernel.json": None,
    "inductor/stats.parquet": LEFT,
    "packages/module/table.npy": None,
    "elsewhere/notes.txt": None,  # a system's folders are not all known
    "elsewhere/stats.npy": LEFT,
    "elsewhere/stats.h5": LEFT,
    "elsewhere/STATS.BIN": LEFT,
}  # fmt: skip


def asked(base, paths, **variables):
    """{path below base: the sentence or None} of files, which are made here, an hour old unless their name begins with
    "new". variables: of the environment, paths below base."""
    for path in paths:
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        if not (base / path).exists():
            (base / path).write_bytes(b"")
        hour = 3600 if "/new" in path else -3600  # seconds from now
        os.utime(base / path, (time.time() + hour,) * 2)
    extra = dict(TMPDIR="tmp", TORCHINDUCTOR_CACHE_DIR="inductor", PYTHONPATH="packages") | variables
    extra = {name: os.pathsep.join(str(base / part) for part in value.split(":")) for name, value in extra.items()}
    env = clean_environment(base / "home", base / "cache", **extra)
    env["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(base / "work/tree/train.py")], cwd=base, env=env, text=True, capture_output=True,
        input=json.dumps([str(base / path) for path in paths]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {os.path.relpath(path, base): why for path, why in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return asked(tmp_path_factory.mktemp("guard"), FILES)


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_is_older_than_the_run_is_read_only_if_no_run_can_have_left_it(path, answers):
    expected, why = FILES[path], answers[path]
    assert why is None if expected is None else why and expected in why and path in why, why


def test_the_sentence_says_what_to_do(answers):
    assert re.search(r"tmp/bigram\.npy is older than this run, .*: compute it in train\.py$", answers["tmp/bigram.npy"])


def test_what_the_run_itself_wrote_it_may_read(tmp_path):
    paths = ["home/new.npy", "tmp/new.json", "work/tree/new.pt", "work/other/new.txt", "inductor/new.bin", "elsewhere/new.npz"]
    assert asked(tmp_path, paths) == dict.fromkeys(paths)


@pytest.mark.parametrize("name", ["HF_HUB_CACHE", "KERNELS_CACHE"])
@pytest.mark.parametrize("place", ["work/tree/kernels", "cache/hub", "tmp/hub"])
def test_downloaded_kernels_are_read_wherever_their_cache_is(name, place, tmp_path):
    kernel, model = f"{place}/kernels--a--b/refs/v1", f"{place}/models--a--b/config.json"
    said = asked(tmp_path, [kernel, model], **{name: place})
    assert said[kernel] is None and said[model]


def test_a_link_is_judged_by_both_of_its_names(tmp_path):
    """Installers and the hub's cache link to files without a suffix in a cache of theirs."""
    links = {
        "packages/module/data.json": "home/.cache/uv/archive/data.json",  # uv's UV_LINK_MODE=symlink
        f"{HUB}/models--a--b/snapshots/1/model.safetensors": f"{HUB}/models--a--b/blobs/0123",
        f"{HUB}/kernels--a--b/snapshots/1/build/x.json": f"{HUB}/kernels--a--b/blobs/0123",
        "elsewhere/notes.txt": "elsewhere/notes.npy",
        "work/tree/train.txt": "tmp/stats.json",
    }
    for link, target in links.items():
        for path in (link, target):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / target).write_bytes(b"")
        (tmp_path / link).symlink_to(tmp_path / target)
    assert [why and re.search(f"{LEFT}|{WEIGHTS}", why)[0] for why in asked(tmp_path, list(links)).values()] == [
        None, WEIGHTS, None, LEFT, LEFT,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PYTHONPYCACHEPREFIX"])
def test_a_variable_does_not_make_the_whole_home_a_cache(name, tmp_path):
    paths = ["home/stats.json", "tmp/stats.json", "work/tree/stats.json", "cache/stats.json"]
    for place in ("home", "tmp", "work/tree", "cache"):
        assert all(asked(tmp_path, paths, **{name: place}).values()), place


def test_a_folder_of_the_tree_is_not_an_installed_package(tmp_path):
    """Wherever PYTHONPATH points."""
    paths = ["work/tree/lib/helper.py", "work/tree/lib/stats.json"]
    assert all(FOREIGN in why for why in asked(tmp_path, paths, PYTHONPATH="work/tree/lib").values())


DO = """
import os, socket, sys
from frozen import guard
guard.forbid(sys.argv[1])
folder = os.path.dirname(sys.argv[1])
try:
    exec(sys.stdin.read())
except SystemExit as refusal:
    print(refusal)
except OSError:
    print("asked the system")
"""


@pytest.mark.parametrize(
    "code, says",
    [
        # os.open's event does not have the folder that dir_fd stands for.
        ("os.open('checkpoint.pt', os.O_RDONLY, dir_fd=os.open(folder + '/runs', os.O_RDONLY))", WEIGHTS),
        ("os.open(b'notes', os.O_RDONLY, dir_fd=os.open(folder + '/runs', os.O_RDONLY))", FOREIGN),
        ("os.open('train.py', os.O_RDONLY, dir_fd=os.open(folder, os.O_RDONLY)), print('open')", "open"),
        ("fd = os.open(folder + '/runs', os.O_RDONLY)\nos.open('notes', os.O_WRONLY, dir_fd=fd), os.utime(folder + '/runs/notes')"
         "\nopen(folder + '/runs/notes')", FOREIGN),
        ("socket.create_connection(('203.0.113.1', 80), timeout=0.01)", "may not use the network"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendmsg([b''], [], 0, ('203.0.113.1', 9))", "may not use the network"),
        ("a, b = socket.socketpair(); print(a.sendmsg([b'x']), a.send(b'x'))", "1 1"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('203.0.113.1', 9))", "may not use the network"),
        ("print(guard.is_local(socket.socket(), ('a.name', 80)), guard.is_local(socket.socket(), ('127.0.0.2', 80)))", "False True"),
        ("socket.create_connection(('127.0.0.1', 9))", "asked the system"),
        ("socket.socket(socket.AF_UNIX).connect('/nowhere')", "asked the system"),
    ],
)
def test_what_a_run_may_not_do_by_a_folder_s_descriptor_or_a_socket(tmp_path, code, says):
    tree = tmp_path / "work" / "tree"
    (tree / "runs").mkdir(parents=True)
    for name in ("train.py", "runs/checkpoint.pt", "runs/notes"):
        (tree / name).write_text("")
        os.utime(tree / name, (time.time() - 3600,) * 2)
    env = clean_environment(tmp_path / "home", tmp_path / "cache", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", DO, str(tree / "train.py")]
    done = subprocess.run(command, input=code, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert says in done.stdout, done.stdout + done.stderr


def test_a_home_at_the_root_hides_no_system(tmp_path):
    code = """
import os
from frozen import guard
guard.forbid("/work/tree/train.py")
for path in ("/etc/passwd", "/usr/bin/env", os.__file__, "/proc/self/status", "/dev/null"):
    assert guard.why_not(path) is None, guard.why_not(path)
print(guard.place("/somewhere/stats.json")[1])
"""
    env = clean_environment("/", tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "home\n"), done.stderr


ASK_AGAIN = """
import json, os, sys
from frozen import guard
guard.TEMPORARY = (os.environ["TMPDIR"],)
guard.forbid(sys.argv[1])
path = sys.argv[2]
with guard.prepare_reads():
    old = guard.why_not(path)
exec(sys.stdin.read())
print(json.dumps([old, guard.why_not(path)]))
"""


@pytest.mark.parametrize("code, is_read", [
    ("open(path, 'a').write('a line')", False), ("os.close(os.open(path, os.O_WRONLY))\nos.utime(path)", False),
    ("open(path, 'w').write('new')", True), ("os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))\nos.utime(path)", True),
    ("os.remove(path)\nopen(path, 'a').write('new')", True),
])  # fmt: skip
def test_a_line_appended_makes_an_old_file_no_newer(tmp_path, code, is_read):
    path = tmp_path / "home" / "history.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("what an earlier run has learned\n")
    os.utime(path, (time.time() - 3600,) * 2)
    env = clean_environment(tmp_path / "home", tmp_path / "cache", TMPDIR=str(tmp_path / "tmp"), PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", ASK_AGAIN, str(tmp_path / "work/tree/train.py"), str(path)], input=code, cwd=tmp_path, env=env,
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    old, now = json.loads(done.stdout)
    assert LEFT in old and (now is None if is_read else LEFT in now)


def test_what_a_variable_says_makes_no_cache_of_the_tree_nor_of_a_whole_home(tmp_path):
    paths = ["work/tree/helpers/stats.json", "work/tree/helpers/helper.py", "home/stats.json", "tmp/ab/kernel.json"]
    found = asked(tmp_path, paths, MPLCONFIGDIR="work/tree/helpers", TORCHINDUCTOR_CACHE_DIR="home", TRITON_CACHE_DIR="tmp")
    assert [why for why in found.values() if why is None] == [], found
    assert FOREIGN in found[paths[0]] and FOREIGN in found[paths[1]]


def test_weights_of_a_project_in_a_wide_pythonpath_are_weights(tmp_path):
    paths = ["home/code/other/checkpoint.pt", "home/code/other/module.py", "home/code/other/table.json"]
    found = asked(tmp_path, paths, PYTHONPATH="home/code")
    assert WEIGHTS in found[paths[0]] and found[paths[1]] is found[paths[2]] is None


def test_a_compile_cache_that_is_all_of_tmpdir_moves_one_folder_down(tmp_path):
    """Or its files would count as what an earlier run has left, and every run after the first would be refused."""
    code = """
import os
import prepare
prepare.guard.forbid("/work/tree/train.py")
prepare.choose_compile_cache()
print(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"])
"""
    tmp = tmp_path / "job"
    for folder in (tmp, tmp_path / "triton", tmp_path / "home"):
        folder.mkdir(exist_ok=True)
    env = clean_environment(tmp_path / "home", tmp_path / "cache", TMPDIR=str(tmp), TORCHINDUCTOR_CACHE_DIR=str(tmp))
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "AUTORESEARCH_DATASET": "stdlib"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.stdout.split() == [str(tmp / "torchinductor"), str(tmp_path / "triton")], done.stderr
