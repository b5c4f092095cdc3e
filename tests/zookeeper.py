"""Runs edits of train.py for real: each in a git checkout of its own, through the run, `lab record` and `lab audit`.

    with Zoo(folder) as zoo:
        zoo.open()                       data, a fork server, a baseline of three runs that is recorded
        outcome = zoo.judge(edit)        what stopped it, and the sentence

The rules are tiny: rows of 128 tokens, a budget of a second, a model with two layers. The baseline has a learning rate
of 0, so that any edit that trains at all is kept, archived and audited. Nothing is replaced by a test double: the clock
is the real one.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

from conftest import clean_environment, tiny_repo

ROOT = Path(__file__).resolve().parent.parent
RULES = (128, 128 * 64, 512)  # max_seq_len, eval_tokens, vocab_size: rows with an edge of a chunk of 64 inside
BUDGET, GRACE = 1, 60  # seconds
KNOBS = {
    "DEPTH": "2", "MODEL_DIM": "64", "HEAD_DIM": "32", "WINDOW_PATTERN": '"L"', "DEVICE_BATCH_SIZE": "8",
    "TOTAL_BATCH_SIZE": "8 * MAX_SEQ_LEN", "DTYPE": "torch.float32", "COMPILE": "False", "ATTENTION": "None",
}  # fmt: skip
TIME_LIMIT = 150  # seconds for a job on a busy machine
GUARD = r'^if __name__ == "__main__":$'


class Train:
    """The text of a train.py, and the files beside it, to be edited. An anchor that is gone or ambiguous is an error."""

    def __init__(self, text):
        self.text = text
        self.files = {}  # name -> (text or a function of its text, whether it is committed with the experiment)
        self.commit_after_run = False

    def _find(self, pattern):
        found = list(re.finditer(pattern, self.text, re.MULTILINE))
        assert len(found) == 1, f"the anchor {pattern!r} matches {len(found)} times in train.py: expected once"
        return found[0]

    def replace(self, pattern, replacement):
        match = self._find(pattern)
        self.text = self.text[: match.start()] + replacement + self.text[match.end() :]

    def _insert(self, pattern, code, after):
        match = self._find(pattern)
        start = self.text.rfind("\n", 0, match.start()) + 1
        end = self.text.index("\n", match.end()) + 1
        line = self.text[start:end]
        code = textwrap.indent(textwrap.dedent(code).strip("\n"), line[: len(line) - len(line.lstrip())]) + "\n"
        place = end if after else start
        self.text = self.text[:place] + code + self.text[place:]

    def before(self, pattern, code):
        """Puts the code before the line that matches, at its indentation."""
        self._insert(pattern, code, after=False)

    def after(self, pattern, code):
        self._insert(pattern, code, after=True)

    def knob(self, name, value):
        self.replace(rf"^{name} = .*", f"{name} = {value}")

    def add(self, code):
        """Code at the end of the module, before it starts: a name that it defines again replaces the earlier one."""
        self.before(GUARD, textwrap.dedent(code).strip("\n") + "\n\n")

    # --- places of the default train.py ---

    def layer(self, made, used="x = x + self.extra(norm(x))", classes=""):
        """A module `extra`, made in the model's __init__ and used on the features x (B, T, C) before the head."""
        if classes:
            self.before(r"^class GPT\(nn\.Module\):", textwrap.dedent(classes).strip("\n") + "\n\n\n")
        self.after(r"^ +self\.lm_head = nn\.Linear\(", f"self.extra = {made}")
        self.before(r"^ +logits = self\.lm_head\(norm\(x\)\)", used)

    def logits(self, code):
        """Code that changes logits (B, T, V), with idx (B, T) at hand, after the soft cap."""
        self.before(r"^ +if targets is None:", code)

    def loss(self, code):
        """Code that computes `loss` from logits, targets and x, instead of the cross-entropy."""
        self.before(r"^ +return F\.cross_entropy\(logits\.flatten", code)
        self.replace(r"return F\.cross_entropy\(logits\.flatten.*", "return loss")

    def before_evaluation(self, code):
        self.before(r"^ +evaluate_bpb\(model", code)

    def after_summary(self, code):
        self.after(r"^ +clock\.summary\(", code)


class Outcome(NamedTuple):
    stage: str  # accepted, noted, or what stopped it: run, record, audit; kept: the run failed, and yet its result counts
    sentence: str  # what that said
    val_bpb: float | None
    seconds: dict  # of run, record, audit


# ------------------------------------------------------------------------------------------------
# A process that has imported torch, and forks for each job

SERVER = """
import json, os, runpy, signal, socket, sys
import filelock, numpy, pyarrow.parquet, requests, tiktoken, torch, torch._dynamo, torch.utils.checkpoint, tqdm

def job(task):
    os.setsid()
    os.chdir(task["folder"])
    os.environ.clear()
    os.environ.update(task["env"])
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(task["out"], flags, 0o644), 1)
    os.dup2(1 if task["err"] is None else os.open(task["err"], flags, 0o644), 2)
    sys.argv, sys.path[0] = task["args"], task["folder"]
    if task["code"]:
        exec(compile(task["code"], "job", "exec"), {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")

server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen(64)
print("ready", flush=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    connection, _ = server.accept()
    if os.fork():
        connection.close()
        continue
    server.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    task = json.loads(connection.makefile().readline())
    if (pid := os.fork()) == 0:
        connection.close()
        job(task)
        break
    connection.sendall(f"{pid}\\n".encode())
    _, status, used = os.wait4(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}\\n".encode())
    os._exit(0)
"""

# `lab audit` scores in a process that loads torch. Here that process is a fork, which has it loaded: the same code
# runs (lab.verify.scoring.CHILD), on the same modules, imported anew.
AUDIT = """
import os, sys, tempfile, json
from pathlib import Path
from lab.base.errors import Refused
from lab.verify import scoring
from lab.__main__ import main

def in_process(tree, folder, device, time_limit, rows=()):
    answer, said = Path(tree, ".lab", "answer.json"), Path(tree, ".lab", "said.txt")
    answer.unlink(missing_ok=True)
    if (pid := os.fork()) == 0:
        status = 1
        try:
            sys.stderr = open(said, "w")
            for name in [n for n in sys.modules if n.split(".")[0] in ("constants", "prepare", "corpus", "frozen")]:
                del sys.modules[name]
            sys.path.insert(0, str(tree))
            sys.argv = ["", str(Path(folder).resolve()), device or "", str(answer), json.dumps([*rows])]
            scoring.main()
            status = 0
        except BaseException as error:
            sys.stderr.write(str(error))
        finally:
            sys.stderr.flush()
            os._exit(status)
    if os.waitpid(pid, 0)[1] or not answer.is_file():
        raise Refused(f"{folder}: {said.read_text().strip()}")
    return json.loads(answer.read_text())

scoring.in_process = in_process
sys.exit(main(["audit", *sys.argv[1:]]))
"""


class Server:
    def __init__(self, folder, env):
        self.cpu_seconds = 0.0  # of all jobs; those of two threads may overwrite each other: for a summary alone
        self.address = str(Path(folder) / "server")
        command = [sys.executable, "-c", SERVER, self.address]
        self.process = subprocess.Popen(
            command, env=env, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait(self):
        assert self.process.stdout.readline() == "ready\n", "the fork server did not start"

    def run(self, folder, args, env, out, err=None, code=None, time_limit=TIME_LIMIT):
        """Exit status of `python ARGS` in the folder, its output in the files out and err (None: out has both)."""
        task = dict(folder=str(folder), args=args, env=env, out=str(out), err=err and str(err), code=code)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(time_limit)
            connection.connect(self.address)
            connection.sendall(f"{json.dumps(task)}\n".encode())
            lines = connection.makefile()
            pid = int(lines.readline())
            try:
                status, seconds = lines.readline().split()
                self.cpu_seconds += float(seconds)
                return int(status)
            except TimeoutError:
                return -1
            finally:  # threads and children that it left behind
                try:
                    os.killpg(pid, 9)
                except ProcessLookupError:
                    pass

    def close(self):
        self.process.kill()
        self.process.wait()


# ------------------------------------------------------------------------------------------------


class Zoo:
    def __init__(self, folder, rules=RULES, cache=None):
        self.folder, self.rules, self.cache, self.count = Path(folder).resolve(), rules, cache, 0
        self.base = self.server = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.server:
            self.server.close()

    def open(self, through="audit"):
        """Starts the fork server, prepares the data, and records a baseline of three runs, as far as the stages up to
        `through` need that."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.cache or self.folder / "cache"
        env = clean_environment(self.folder, own)
        del env["PYTHONDONTWRITEBYTECODE"]  # the copies of the base take its bytecode along
        self.server = Server(self.folder, env)
        git = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C.UTF-8"}
        repo = tiny_repo(
            self.folder / "base", self.folder, own, "stdlib", self.rules, BUDGET, GRACE,
            AUTORESEARCH_DATASET="stdlib", AUTORESEARCH_NO_SAMPLE="1", **git,
        )  # fmt: skip
        self.base, self.env = repo.path, repo.env
        del self.env["PYTHONDONTWRITEBYTECODE"]
        if self.cache is None:
            result = repo.run("prepare.py", timeout=300)
            assert result.rc == 0, result.err
        train = Train((self.base / "train.py").read_text())
        for name, value in KNOBS.items():
            train.knob(name, value)
        self.plain = train.text
        train.add("def lr_multiplier(progress):\n    return 0.0")
        (self.base / "train.py").write_text(train.text)
        self.git(self.base, "init", "-q", "-b", "main")
        self.git(self.base, "add", ".")
        self.git(self.base, "commit", "-q", "-m", "start")
        self.git(self.base, "switch", "-q", "-c", "autoresearch/zoo")
        self.server.wait()
        if through == "run":  # only what an edit may find in the folder
            rc, log = self.train(self.base)
            assert rc == 0, f"the baseline does not run:\n{log}"
            (self.base / "runs" / "0001-0000000").mkdir(parents=True)
            shutil.copy2(self.base / "checkpoint.pt", self.base / "runs" / "0001-0000000")
            return
        for seed in (42, 43, 44):
            rc, log = self.train(self.base, seed)
            assert rc == 0, f"the baseline does not run:\n{log}"
            rc, out, err = self.lab(self.base, "record", "baseline")
            assert rc == 0, err
        assert out.startswith("keep"), out
        shutil.copy2(next((self.base / "runs").glob("0001-*")) / "checkpoint.pt", self.base)  # as after a discard
        if through == "record":
            return
        rc, out, err = self.audit(self.base)  # what it scored is remembered, also by the copies
        assert rc == 0, f"the baseline does not pass the audit:\n{out}{err}"

    def git(self, folder, *args):
        who = ["-c", "user.name=zoo", "-c", "user.email=zoo@example.org"]
        subprocess.run(["git", *who, *args], cwd=folder, env=self.env, check=True, capture_output=True)

    def train(self, folder, seed=None):
        """(exit status, log) of a run, as `uv run train.py > run.log 2>&1`."""
        env = self.env | ({"AUTORESEARCH_SEED": str(seed)} if seed else {})
        rc = self.server.run(folder, ["train.py"], env, folder / "run.log")
        return rc, (folder / "run.log").read_text(errors="replace")

    def lab(self, folder, *args, code=None):
        out, err = folder / ".lab-out", folder / ".lab-err"
        rc = self.server.run(folder, ["" if code else "-m", *([] if code else ["lab"]), *args], self.env, out, err, code)
        texts = [path.read_text(errors="replace") for path in (out, err)]
        out.unlink()
        err.unlink()
        return rc, *texts

    def audit(self, folder, *args):
        return self.lab(folder, *args, code=AUDIT)

    def judge(self, edit, through="audit", keep=False):
        """The Outcome of one edit, in a copy of the base. through: the last stage to run. keep: leave the copy there."""
        train = Train(self.plain)
        edit.change(train)
        compile(train.text, edit.name, "exec")
        folder = self.folder / f"{edit.name}-{self.count}"
        self.count += 1
        shutil.copytree(self.base, folder, symlinks=True)
        try:
            return self._judge(edit, train, folder, through)
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _judge(self, edit, train, folder, through):
        (folder / "train.py").write_text(train.text)
        for name, (text, _) in train.files.items():
            (folder / name).write_text(text((folder / name).read_text()) if callable(text) else text)
        seconds, began = {}, time.monotonic()

        def commit():
            paths = ["train.py", *(name for name, (_, tracked) in train.files.items() if tracked)]
            self.git(folder, "add", *paths)
            self.git(folder, "commit", "-q", "-m", edit.name, "--", *paths)

        if not train.commit_after_run:
            commit()
        for seed in edit.seeds:
            rc, log = self.train(folder, seed)
            if train.commit_after_run:
                commit()
            seconds["run"], began = time.monotonic() - began, time.monotonic()
            ran_rc, ran_log = rc, log
            if through == "run" and rc == 0 and seed != edit.seeds[-1]:
                continue
            if through == "run":
                return Outcome("run", last_line(log), None, seconds) if rc else accepted(log, seconds)
            rc, out, err = self.lab(folder, "record", edit.name)
            seconds["record"], began = time.monotonic() - began, time.monotonic()
            if ran_rc:
                kept = out.startswith(("keep", "confirm"))
                return Outcome("kept" if kept else "run", last_line(ran_log), None, seconds)
            if rc:
                return Outcome("record", last_line(err), None, seconds)
        if not out.startswith("keep"):
            return Outcome("record", out.partition("\n")[0], None, seconds)
        if through == "record":
            return accepted(log, seconds)
        row = max(int(path.name[:4]) for path in (folder / "runs").glob("[0-9]*"))
        rc, table, err = self.audit(folder, str(row))
        seconds["audit"] = time.monotonic() - began
        if rc not in (0, 4):
            return Outcome("audit", last_line(err), None, seconds)
        rows = [line.split("\t") for line in (folder / "audit.tsv").read_text().splitlines()]
        flags = next(dict(zip(rows[0], cells, strict=True))["flags"] for cells in rows[1:] if int(cells[0]) == row)
        if flags != "ok":
            return Outcome("audit", flags, None, seconds)
        if edit.stage == "noted":
            return Outcome("noted", out, None, seconds)
        return accepted(log, seconds)


def accepted(log, seconds):
    value = re.findall(r"^val_bpb: +(\S+)", log, re.MULTILINE)
    return Outcome("accepted", audit_line(log), float(value[0]) if value else None, seconds)


def audit_line(log):
    """What the run's own audit found."""
    return ([""] + re.findall(r"^audit: .*", log, re.MULTILINE))[-1]


def last_line(text):
    """The last line that says something, of a log or a stderr."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""
