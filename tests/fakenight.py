"""A night without training: real git, real `lab record`, and run.log and checkpoint.pt as a run leaves them.

    night = FakeNight(tmp_path)         a clone on branch autoresearch/test, its first commit on main
    night.baseline()                    three runs, recorded
    commit = night.experiment("wider", 0.99)     edits train.py, commits, runs, records
"""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TRAIN = "# line {0}\nLR = 0.04\nDEPTH = 8\nWIDTH = 512\n"
CLOSE = 0.99768  # is run again after FakeNight.baseline() and one failure: below 0.99765 it would be kept, above 0.9977 not
SUMMARY = """\
---
val_bpb:          {val_bpb:.6f}
training_seconds: {seconds:.1f}
total_seconds:    325.9
peak_vram_mb:     45060.2
mfu_percent:      39.80
total_tokens_M:   499.6
num_steps:        {steps}
num_params_M:     50.3
depth:            8
"""
PROGRESS = "step 00123 (41.0%) | loss 3.141593 | lrm 1.00 | 318 ms | 1,648,000 tok/s | mfu 39.8% | epoch 1 | 177 s left\n"
RULES, DATA = "a" * 64, "b" * 64


class Result(NamedTuple):
    rc: int
    out: str
    err: str

    @property
    def verdict(self):
        return self.out.partition(":")[0]


class FakeNight:
    def __init__(self, path, branch="autoresearch/test", identity=True):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.env = os.environ | {
            "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "AUTORESEARCH_NO_SAMPLE": "1",
            "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        self.who = ["-c", "user.name=Some One", "-c", "user.email=one@example.org"]
        self.git("init", "-q", "-b", "main")
        (self.path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
        (self.path / "train.py").write_text(TRAIN.format(0))
        (self.path / "prepare.py").write_text("# frozen\n")
        (self.path / "program.md").write_text("# program\n")
        self.git("add", ".")
        self.git("commit", "-q", "-m", "start")
        if branch:
            self.git("switch", "-q", "-c", branch)
        self.ideas = 0

    def copy(self, path):
        """The same night somewhere else; of a team's member a new one."""
        shutil.copytree(self.path, path, symlinks=True, ignore=lambda folder, names: [n for n in names if n == "autoresearch-member"])
        twin = copy.copy(self)
        twin.path = Path(path)
        twin.git("status", "--short")  # the index knows the files by their old inodes
        return twin

    # --- git and files ---

    def git(self, *args, check=True, stdin=None):
        done = subprocess.run(
            ["git", *self.who, *args], cwd=self.path, env=self.env, capture_output=True, text=True, input=stdin
        )
        assert not check or done.returncode == 0, f"git {args}: {done.stderr}"
        return done.stdout.strip()

    def head(self):
        return self.git("rev-parse", "HEAD")

    def read(self, name):
        path = self.path / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def change_train(self, text=None):
        self.ideas += 1
        (self.path / "train.py").write_text(text or TRAIN.format(self.ideas))

    def commit(self, message="an idea", *paths):
        self.git("add", *(paths or ["train.py"]))
        self.git("commit", "-q", "-m", message, "--", *(paths or ["train.py"]))
        return self.head()

    def human_commits(self, text):
        (self.path / "program.md").write_text(text)
        return self.commit(f"human: {text}", "program.md")

    # --- what a run leaves ---

    def header(self, seed=42, **changes):
        sha = hashlib.sha256((self.path / "train.py").read_bytes()).hexdigest()
        header = {
            "run_id": uuid.uuid4().hex, "start": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "train_sha256": sha, "rules_sha256": RULES, "data_sha256": DATA, "dataset": "stdlib", "seed": seed,
            "device": "cpu (a fake)", "clock": "monotonic", "versions": {"python": "3.11", "torch": "2"},
        }  # fmt: skip
        return header | changes

    def run(self, val_bpb=None, seed=42, tail=None, checkpoint=True, seconds=300.0, steps=953, progress=PROGRESS, **changes):
        """Writes run.log and checkpoint.pt of a run of train.py as it is; tail: what stands for the summary;
        progress: its progress lines."""
        header = self.header(seed, **changes)
        end = SUMMARY.format(val_bpb=val_bpb, seconds=seconds, steps=steps) if tail is None else tail
        log = f"run: {json.dumps(header)}\ndtype: bfloat16 (fast)\nattention: sdpa (no GPU)\n{progress}{end}"
        (self.path / "run.log").write_text(log)
        if checkpoint and tail is None:
            with zipfile.ZipFile(self.path / "checkpoint.pt", "w") as f:
                f.writestr("checkpoint/data.pkl", b"\x80\x02X\x20\x00\x00\x00" + header["run_id"].encode() + b"q.")
                f.writestr("checkpoint/data/0", b"\0" * 64)
        return header["run_id"]

    # --- lab ---

    def lab(self, *args, cwd=None, timeout=60, **env):
        done = subprocess.run(
            [sys.executable, "-m", "lab", *args], cwd=cwd or self.path, env=self.env | env, timeout=timeout,
            capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    def record(self, *args, **env):
        return self.lab("record", *args, **env)

    def recorded(self, *args):
        result = self.record(*args)
        assert result.rc == 0, result.err
        return result

    def refused(self, *args, rc=1):
        """The one line of a refusal, which has changed nothing."""
        before = self.state()
        result = self.record(*args)
        assert result.rc == rc, f"exit {result.rc}: {result.out}{result.err}"
        assert result.out == "" and len(result.err.splitlines()) == 1, result.out + result.err
        assert result.err.startswith("lab record: ")
        assert self.state() == before, "a refusal changed something"
        return result.err

    def baseline(self, values=(1.0, 1.002, 0.998)):
        """Mean 1.0, σ 0.002."""
        for i, value in enumerate(values):
            self.run(value, seed=42 + i)
            self.recorded("baseline")

    def experiment(self, description, val_bpb, *args, **run):
        """Edits, commits, runs and records one idea; (its commit, the result)."""
        self.change_train()
        commit = self.commit(description)
        self.run(val_bpb, **run)
        return commit, self.recorded(description, *args)

    def fails(self, times=1):
        """So many experiments that are far from a gain."""
        for i in range(times):
            assert self.experiment(f"no gain {i}", 1.02 + 0.01 * i)[1].verdict == "discard"

    def close_call(self, description="close", **run):
        """A failure, which makes the rule stricter, and an experiment that is run again; its commit and the result."""
        self.fails()
        commit, result = self.experiment(description, CLOSE, **run)
        assert result.verdict == "confirm", result.out
        return commit, result

    # --- what is there ---

    def rows(self):
        """The rows of results.tsv as lists, each checked for its form."""
        from lab.store.results_tsv import COLUMNS, is_row

        text = self.read("results.tsv")
        if not text:
            return []
        assert text.endswith("\n") and "\r" not in text
        first, *rest = text[:-1].split("\n")
        assert first.split("\t") == COLUMNS
        assert all(map(is_row, rest)), text
        return [line.split("\t") for line in rest]

    def records(self):
        return [json.loads(line) for line in self.read("runs.jsonl").splitlines()]

    def records_in_git(self):
        """The records in refs/autoresearch/TAG/log, in order."""
        ref = self.git("branch", "--show-current").replace("autoresearch/", "refs/autoresearch/") + "/log"
        files = self.git("ls-tree", "-r", "--name-only", ref, check=False).splitlines()
        assert files == sorted(files)
        return [json.loads(self.git("show", f"{ref}:{name}")) for name in files]

    def archives(self):
        return sorted(p.name for p in (self.path / "runs").glob("*") if p.name != "best")

    def refs(self):
        return self.git("for-each-ref", "--format=%(refname) %(objectname)", "refs/autoresearch")

    def chain(self):
        """Subjects of the branch's commits, newest first."""
        return self.git("log", "--format=%s").splitlines()

    def state(self):
        """All that a record may change."""
        files = ["results.tsv", "runs.jsonl", "train.py", "program.md", "checkpoint.pt"]
        contents = {name: (self.path / name).read_bytes() for name in files if (self.path / name).is_file()}
        return contents, self.head(), self.refs(), self.archives(), self.git("status", "--porcelain")

    def check(self):
        """What must hold after anything that happened."""
        assert self.git("fsck", "--strict").replace("\n", " ").count("error") == 0
        rows = self.rows()
        assert len({row[0] for row in rows}) == len(rows), "a commit has two rows"
        for row in rows:
            self.git("show", "--quiet", row[0])
        numbered = [r for r in self.records() if r["row"]]
        assert sorted(r["row"] for r in numbered) == list(range(1, len(rows) + 1))
        expected = {f"{r['row']:04d}-{r['short']}" for r in numbered if r["verdict"] == "keep" or r.get("given_up")}
        assert {name for name in self.archives()} == expected
        assert not (self.path / ".lab" / "journal.json").exists()
        assert not list((self.path / ".lab").glob("*.tmp"))
        refs = {line.split()[0][-4:]: line.split()[1] for line in self.refs().splitlines() if not line.split()[0].endswith("/log")}
        assert refs == {f"{r['row']:04d}": r["commit"] for r in numbered}
        assert len({r["run_id"] for r in self.records()}) == len(self.records())
        assert self.records_in_git() == self.records()
