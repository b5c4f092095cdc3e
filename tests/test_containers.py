"""The images of deploy/Dockerfile, built without a registry by deploy/build.sh, and what is in them at work: as user
1000, on a read-only root, without a network. There is no Docker engine in this: buildah builds, chroot starts."""

import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import left_out

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
GIGABYTES = 25  # of disk while it builds

# Starts a command as the image's user in the image's tree, which is mounted read-only, with /work and /data on it.
START = """
set -eu
image=$1 work=$2 data=$3
shift 3
mount --bind "$image" "$image"
mount -o remount,ro,bind "$image"
mount -t tmpfs -o mode=1777 tmpfs "$image/tmp"
mount --bind "$work" "$image/work"
mount --bind "$data" "$image/data"
mount -t proc proc "$image/proc"
mount --rbind /dev "$image/dev"
ip link set lo up 2> /dev/null || true
exec chroot --userspec=1000:1000 --groups= "$image" "$@"
"""


class Built:
    """Images below a folder of their own."""

    def __init__(self, base):
        self.base = base
        self.buildah = ["buildah", "--root", str(base / "images"), "--runroot", str(base / "run")]

    def build(self, *options):
        home = Path(
            pwd.getpwuid(os.getuid()).pw_dir
        )  # what was downloaded for this environment is not downloaded again
        cache = Path(os.environ.get("UV_CACHE_DIR") or home / ".cache" / "uv")
        cached = ["--uv-cache", str(cache)] if cache.is_dir() else []
        done = subprocess.run(
            [ROOT / "deploy" / "build.sh", "--debootstrap", "--root", self.base, *cached,
             "--build-arg", "UV_COMPILE_BYTECODE=0", *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=2400,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]

    def ask(self, *args):
        return subprocess.run([*self.buildah, *args], check=True, capture_output=True, text=True).stdout.strip()

    def config(self, name):
        return json.loads(self.ask("inspect", "--type", "image", name))["Docker"]["config"]

    def mount(self, name):
        """(the image's tree, its configuration)"""
        return self.ask("mount", self.ask("from", name)), self.config(name)

    def remove(self):
        for command in (["umount", "--all"], ["rm", "--all"], ["rmi", "--all", "--force"]):
            subprocess.run([*self.buildah, *command], capture_output=True)
        for folder in ("images/overlay", "run/overlay"):  # storage drivers keep a mount of their own
            subprocess.run(["umount", self.base / folder], capture_output=True)
        shutil.rmtree(self.base, ignore_errors=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    if missing := [name for name in ("buildah", "debootstrap", "unshare", "chroot") if not shutil.which(name)]:
        left_out(f"{', '.join(missing)} is not installed (apt-get install buildah debootstrap)")
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"]).returncode:
        left_out("debootstrap and mounts need root")
    base = tmp_path_factory.mktemp("containers")
    if shutil.disk_usage(base).free < GIGABYTES * 1e9:
        pytest.skip(f"less than {GIGABYTES} GB of disk are free")  # in CI too: no component that it could install
    built = Built(base)
    try:
        yield built
    finally:
        built.remove()


def command_in(image, config, work, data, *command, **env):
    """The command line that starts a command in the image's tree as its configuration says."""
    words = [f"{key}={value}" for key, value in env.items()]
    return [
        "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-c", START, "sh", image, str(work),
        str(data), "env", "-i", *config["Env"], *words, *(config.get("Entrypoint") or []), *command,
    ]  # fmt: skip


@pytest.fixture
def volumes(tmp_path):
    for name in ("work", "data"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, 1000, 1000)
    return tmp_path / "work", tmp_path / "data"


def test_the_image_trains_on_the_standard_library_as_user_1000_with_a_read_only_root(images, volumes):
    images.build()
    tree, config = images.mount("localhost/autoresearch")
    assert config["User"] == "1000" and set(config["Volumes"]) == {"/data", "/work"}
    assert config["Cmd"] == ["uv", "run", "train.py"]
    work, data = volumes
    script = """
        id -u; id -g
        touch /x /opt/venv/x /opt/autoresearch/x 2>&1 | grep -c "Read-only file system"
        sed -i 's/^TIME_BUDGET = .*/TIME_BUDGET = 5/' constants.py
        g++ --version > /dev/null && echo compiler
        exec uv run train.py
    """
    done = subprocess.run(
        command_in(tree, config, work, data, "sh", "-c", script, AUTORESEARCH_DATASET="stdlib", OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.startswith("1000\n1000\n3\ncompiler\n")
    assert 0.5 < float(re.search(r"^val_bpb: +(\S+)", done.stdout, re.MULTILINE)[1]) < 4
    assert '"python": "3.11' in done.stdout
    checkpoint = work / "autoresearch" / "checkpoint.pt"
    assert checkpoint.stat().st_uid == 1000 and list(data.rglob("manifest.json"))
    again = command_in(tree, config, work, data, "uv", "run", "-m", "lab", "status")
    said = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0 and "next: on branch main" in said.stdout, said.stderr


def test_the_dashboard_answers_its_health_check(images, volumes):
    if not (ROOT / "lab" / "web" / "dashboard.py").exists():
        pytest.skip("there is no lab dashboard yet")
    images.build("--target", "dashboard")
    tree, config = images.mount("localhost/autoresearch-dashboard")
    health = config["Healthcheck"]["Test"]
    assert (
        config["User"] == "1000"
        and health[0] == "CMD"
        and not (Path(tree) / "opt/venv/lib/python3.11/site-packages/torch").exists()
    )
    work, data = volumes
    subprocess.run(["git", "init", "-q", "-b", "main", work / "autoresearch"], check=True)
    subprocess.run(["chown", "-R", "1000:1000", work], check=True)
    # The check runs beside it, in the same network, as Docker runs it.
    check = shlex.join(health[1:])
    script = f"""
        "$@" & server=$!
        for _ in $(seq 40); do
            sleep 0.5
            if {check} 2> /tmp/why; then echo healthy; kill $server; exit 0; fi
        done
        cat /tmp/why; kill $server; exit 1
    """
    started = time.monotonic()
    done = subprocess.run(
        command_in(tree, config, work, data, "sh", "-c", script, "sh", *config["Cmd"], AUTORESEARCH_TOKEN="0123456789abcdef"),
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and "healthy" in done.stdout, done.stdout + done.stderr
    assert time.monotonic() - started < 60
