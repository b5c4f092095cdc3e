"""A night that can be killed at any moment: FakeNight's tree, the scripted agent under the real `lab night`, and a
training of a second in which nothing is trained.

    night = Killed(tmp_path)
    night.start();  night.wait();  night.kill()       whatever was going on
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from fakenight import FakeNight

TESTS = Path(__file__).resolve().parent
TRAIN_PY = 'LR = 0.04\n\n\nif __name__ == "__main__":\n    pass\n'
# What a run leaves, in its order, without a run: the value is what comments in train.py announce.
TRAINING = '''
import fcntl, hashlib, json, os, re, signal, sys, time, uuid, zipfile
from datetime import datetime, timezone
def preempted(*_):
    print("preempted", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, preempted)
code = open("train.py", "rb").read()
seed, seconds = int(os.environ.get("AUTORESEARCH_SEED", 42)), float(os.environ.get("FAKE_SECONDS", 0.05))
if b"# effect" in code:  # an experiment, not the baseline
    seconds = float(os.environ.get("FAKE_EFFECT_SECONDS", seconds))
fd = os.open(".", os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
header = {"run_id": uuid.uuid4().hex, "start": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "train_sha256": hashlib.sha256(code).hexdigest(), "rules_sha256": "a" * 64, "data_sha256": "b" * 64,
    "dataset": "stdlib", "seed": seed, "device": os.environ.get("FAKE_DEVICE", "cpu (a fake)"),
    "clock": "monotonic", "versions": {}}
print("run: " + json.dumps(header), flush=True)
for i in range(3):
    print(f"step {i:05d} ({30 * i}.0%) | loss 3.1 | lrm 1.00 | 318 ms | 1,648,000 tok/s | mfu 0.0% | epoch 1 | 1 s left", flush=True)
    time.sleep(seconds / 3)
effects = [float(x) for x in re.findall(rb"^# effect: (\\S+)", code, re.M)]
under = re.findall(rb"^# under %d: (\\S+)" % seed, code, re.M)
if b"# crash" in code:
    sys.exit("FAIL: loss is nan")
value = 1.0 + sum(effects) + (float(under[-1]) if under else {43: 0.002, 44: -0.002}.get(seed, 0))
with zipfile.ZipFile("checkpoint.pt.tmp", "w") as f:
    f.writestr("checkpoint/data.pkl", header["run_id"])
os.replace("checkpoint.pt.tmp", "checkpoint.pt")
print(f"""---
val_bpb:          {value:.6f}
training_seconds: 300.0
total_seconds:    325.9
peak_vram_mb:     1024.0
mfu_percent:      0.00
total_tokens_M:   499.6
num_steps:        953
num_params_M:     50.3
depth:            8""", flush=True)
'''
# In place of git: counts its calls. At the one that the file `limit` names it stops for ever, before it did anything,
# in the middle (the index is locked), or when it is done.
GIT = """#!/bin/sh
cd_to={place}
echo x >> $cd_to/calls
if [ $(wc -l < $cd_to/calls) -ne $(cat $cd_to/limit) ]; then exec {git} "$@"; fi
case $(cat $cd_to/how) in
before) ;;
locked) : > "$({git} rev-parse --absolute-git-dir)/index.lock" ;;
after) {git} "$@" ;;
esac
: > $cd_to/stopped
exec sleep 600
"""
UV = """#!/bin/sh
shift
if [ "$1" = train.py ]; then exec {python} {place}/training.py; fi
exec {python} "$@"
"""
PLAN = [
    ["a loss", "# effect: 0.03", ""],
    ["close, and does not hold", "# effect: -0.00232\n# under 43: 0.003", ""],
    ["a gain", "# effect: -0.03", ""],
    ["explodes", "# crash", ""],
]
NEVER = 10**9


def tools(place, **environment):
    """Puts uv, git, the training, the plan and the agent into `place`; the environment that uses them."""
    (place / "bin").mkdir(parents=True)
    names = {"python": sys.executable, "place": place, "git": shutil.which("git")}
    for name, text in [("git", GIT), ("uv", UV)]:
        (place / "bin" / name).write_text(text.format(**names))
        (place / "bin" / name).chmod(0o755)
    (place / "training.py").write_text(TRAINING)
    (place / "plan.json").write_text(json.dumps(PLAN))
    (place / "limit").write_text(str(NEVER))
    (place / "how").write_text("before")
    shutil.copy(TESTS / "scripted_agent.py", place)
    return {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", **environment}


def agent_command(place):
    return f"{sys.executable} {place}/scripted_agent.py {place}/plan.json"


def processes_in(*trees):
    """Ids of what runs with one of these folders as its current one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") in map(str, trees):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def kill_all(*trees):
    """kill -9 of all that runs in these folders, until nothing does, as when the machine is switched off."""
    while found := processes_in(*trees):
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.01)


class Killed(FakeNight):
    def __init__(self, place, **environment):
        super().__init__(place / "tree", branch=None)
        self.place = place
        (self.path / "train.py").write_text(TRAIN_PY)
        self.commit("train.py to begin with")
        self.git("switch", "-q", "-c", "autoresearch/test")
        self.night_env = self.env | tools(place, **environment)
        self.starts = 0

    def start(self, limit=NEVER, how="before"):
        """The same command every time."""
        for name, text in [("limit", str(limit)), ("how", how), ("calls", "")]:
            (self.place / name).write_text(text)
        (self.place / "stopped").unlink(missing_ok=True)
        self.starts += 1
        self.out = open(self.place / "out", "a")
        self.keeper = subprocess.Popen(
            [sys.executable, "-m", "lab", "night", "--hours", "1", "--agent", agent_command(self.place)],
            cwd=self.path, env=self.night_env, stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.out,
            start_new_session=True,
        )  # fmt: skip

    @property
    def over(self):
        return "every idea was tried" in self.read(".lab/agent.log").rpartition("--- start")[2]

    def wait(self, seconds=200, until=lambda: False):
        """Until the night has nothing left to do, git stopped, until() or the time; whether all was tried."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not (self.place / "stopped").exists() and not until():
            assert self.keeper.poll() is None, (self.place / "out").read_text() + self.read(".lab/agent.log")[-2000:]
            if self.over:
                return True
            time.sleep(0.01)
        return self.over

    def kill(self):
        self.keeper.kill()
        kill_all(self.path)
        self.keeper.wait()
        self.out.close()

    def outcome(self):
        """All that the morning looks at, but for names that are random."""
        from lab.loop.status import gather

        known, records = gather(self.path), self.records()
        rows = [[r["row"], r["verdict"], r["mean"], r["n"], r["gain"], r["description"]] for r in known["rows"]]
        runs = [[r["description"], r["header"] and r["header"]["seed"], r["verdict"], r["mean"]] for r in records]
        best = os.readlink(self.path / "runs" / "best")[:4]
        archives = {name[:4]: sorted(os.listdir(self.path / "runs" / name)) for name in self.archives()}
        subjects = [self.git("log", "-1", "--format=%s", line.split()[1]) for line in self.refs().splitlines() if "/log " not in line]
        table = [row[1:] for row in self.rows()]
        return {
            "rows": rows, "runs": runs, "sigma": known["sigma"], "best": best, "archives": archives,
            "refs": subjects, "chain": self.chain(), "results.tsv": table, "branch": known["tag"],
        }  # fmt: skip
