"""lab audit: runs scored again by the frozen metric. One tiny training for all; what is wrong is made so by hand."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, assert_refused, tiny_repo
from test_sandbox import needs_bubblewrap

from lab.__main__ import main
from lab.base.errors import Refused
from lab.verify import scoring

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each score is a process that loads torch: minutes in all
PEEKING = """

class GPT(GPT):
    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        if targets is None:  # the next token, from the row itself
            logits = logits + 0.5 * F.one_hot(idx.roll(-1, 1), logits.size(-1))
        return logits
"""
LEARNING = """

class Memory:  # of the module: what two instances of the model share, too
    counts, snapshots, chosen = None, [], {}

class GPT(GPT):
    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        if targets is None:  # adds how often each token came in the rows scored before; the first tokens of a row fix which rows
            if Memory.counts is None:
                Memory.counts = torch.ones(logits.size(-1))
                Memory.snapshots.append(torch.zeros(logits.size(-1)))
            for i, row in enumerate(idx.tolist()):
                at = Memory.chosen.setdefault(tuple(row[:4]), len(Memory.snapshots) - 1)
                logits[i, 3:] = 0.5 * logits[i, 3:] + 0.5 * Memory.snapshots[at]
            Memory.counts += torch.bincount(idx.flatten(), minlength=logits.size(-1))
            Memory.snapshots.append(Memory.counts.log())
        return logits
"""
SHRINKING = "\nimport prepare, types\nprepare.math = types.SimpleNamespace(log=lambda x: 100.0)\n"
PATCHING = "\nimport prepare\nprepare.token_nats = lambda logits, y: torch.zeros_like(y, dtype=torch.float32)\n"


def in_fork(tree, env, task):
    """Result of the status that task() returns, in a fork of this process: in that directory, with that environment."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if (pid := os.fork()) == 0:
            status = 1
            try:
                os.chdir(tree)
                os.environ.clear()
                os.environ.update(env)
                sys.stdout, sys.stderr = out, err
                status = task()
            except SystemExit as error:
                err.write(f"{error}\n")
            except BaseException:
                traceback.print_exc(file=err)
            finally:
                out.flush()
                err.flush()
                os._exit(status or 0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return Result(status, out.read(), err.read())


def score_in_fork(tree, folder, device, time_limit, rows=()):
    """As scoring.in_process, whose own process test_a_tree_with_an_older_lab... starts."""
    answer = tree / ".lab" / "answer.json"
    answer.unlink(missing_ok=True)

    def task():
        for name in [name for name in sys.modules if name.split(".")[0] in ("constants", "prepare", "corpus", "frozen")]:
            del sys.modules[name]
        sys.path.insert(0, str(tree))
        sys.argv = ["", str(folder), device or "", str(answer), json.dumps([*rows])]
        return scoring.main()

    result = in_fork(tree, dict(os.environ), task)
    if result.rc:
        raise Refused(f"{folder}: {result.err.strip()}")
    return json.loads(answer.read_text())


def call(args):
    scoring.in_process = score_in_fork
    for name in ("stdout", "stderr"):
        getattr(sys, name).reconfigure(errors="replace")
    return main(["audit", *args])


class Night:
    """A tree with archived runs, as `lab record` leaves them."""

    def __init__(self, repo):
        self.repo, self.path, self.records = repo, repo.path, []

    def git(self, *args):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", *who, *args], cwd=self.path, check=True, capture_output=True, text=True).stdout

    def keep(self, val=None, train=None, edit=None, sigma_of=()):
        """Archives the one real run again as another kept row: with this val_bpb in its log, this text added to its
        train.py, its checkpoint edited. sigma_of: val_bpb of further runs of the same code."""
        row = len({r["row"] for r in self.records if r["row"]}) + 1
        short = f"{row:07x}"
        folder = self.path / "runs" / f"{row:04d}-{short}"
        folder.mkdir(parents=True)
        for name in ("train.py", "checkpoint.pt", "run.log"):
            shutil.copy(self.path / "one" / name, folder / name)
        log = (folder / "run.log").read_text()
        val = float(re.search(r"^val_bpb: +(\S+)", log, re.MULTILINE)[1]) if val is None else val
        (folder / "run.log").write_text(re.sub(r"(?m)^(val_bpb: +)\S+", rf"\g<1>{val:.6f}", log))
        if train:
            text = (folder / "train.py").read_text()
            (folder / "train.py").write_text(text.replace('\nif __name__ == "__main__":', f'{train}\n\nif __name__ == "__main__":'))
        if edit:
            checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
            edit(checkpoint)
            torch.save(checkpoint, folder / "checkpoint.pt")
        header = json.loads(re.search(r"^run: (.*)$", log, re.MULTILINE)[1])
        code = hashlib.sha256(f"{row}".encode()).hexdigest()
        for i, value in enumerate([*sigma_of, val]):
            last = i == len(sigma_of)
            summary = {"val_bpb": value, "training_seconds": 1.0, "total_seconds": 2.0, "peak_vram_mb": 0.0, "mfu_percent": 0.0,
                       "total_tokens_M": 0.1, "num_steps": 9, "num_params_M": 0.1, "depth": 4}  # fmt: skip
            self.records.append({
                "run_id": f"{row}-{i}", "tag": "test", "commit": short + "0" * 33, "short": short, "code": code,
                "verdict": "keep" if last else "confirm", "row": row if last else None, "baseline": row == 1, "parent": None,
                "header": header | {"seed": 42 + i}, "summary": summary, "mean": value, "n": 1, "sigma": None, "gain": None,
                "memory_gb": 0.0, "description": f"what {row} tried", "start": header["start"], "end": header["start"],
                "log": f"{row}-{i}", "why": "", "blob": "b" * 40, "ended": "complete", "discard": False, "simpler": False,
                "dof": 0, "best_known": None,
            })  # fmt: skip
        (self.path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.records))
        return folder

    def audit(self, *args, **env):
        """The command, in a fork of the test's process, where torch is loaded: each row costs a second, not ten."""
        return in_fork(self.path, self.repo.env | {key: str(value) for key, value in env.items()}, lambda: call(args))

    def table(self):
        head, *lines = (self.path / "audit.tsv").read_text().splitlines()
        return {int(line.split("\t")[0]): dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prepared_stdlib):
    """A checkout with one real run in the folder `one`, on a branch. Copied, never changed."""
    base = tmp_path_factory.mktemp("audited")
    repo = tiny_repo(base / "clone", base, prepared_stdlib, "stdlib", time_budget=2, AUTORESEARCH_DATASET="stdlib")
    for name, value in dict(DEPTH=2, MODEL_DIM=64, HEAD_DIM=32, DTYPE="torch.float32").items():
        repo.edit("train.py", rf"^{name} = .*", f"{name} = {value}")
    result = repo.run("train.py", timeout=250)
    assert result.rc == 0, result.err
    (repo.path / "one").mkdir()
    (repo.path / "one" / "run.log").write_text(result.out)
    shutil.move(repo.path / "checkpoint.pt", repo.path / "one")
    shutil.copy(repo.path / "train.py", repo.path / "one")
    Night(repo).git("init", "-q", "-b", "autoresearch/test")
    Night(repo).git("add", ".gitignore")
    Night(repo).git("commit", "-q", "-m", "start")
    return repo


@pytest.fixture
def night(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "tree")
    repo = object.__new__(type(trained))
    repo.path, repo.env = tmp_path / "tree", trained.env
    return Night(repo)


@needs_bubblewrap
def test_in_the_sandbox_a_run_trains_without_the_last_ones_weights_and_an_audit_scores(night):
    """The real train.py, to which read_by_a_child of the zoo's edits is added, and the command of docs/proof.md."""
    repo, read = night.repo, 'subprocess.run(["cat", "checkpoint.pt", "runs/0001-0000001/checkpoint.pt"], capture_output=True).stdout'
    night.keep()
    shutil.copy(night.path / "one" / "checkpoint.pt", night.path)
    repo.edit("train.py", r"^( +)clock = begin_run\(__file__\)", rf"\g<0>\n\1import subprocess\n\1print('the child read', len({read}), 'bytes')")
    result = repo.run("-m", "lab", "sandbox", timeout=250)
    assert result.rc == 0 and "the child read 0 bytes" in result.out and "\nval_bpb: " in result.out, result.out + result.err
    run_id = json.loads(re.search(r"^run: (.*)$", result.out, re.MULTILINE)[1])["run_id"]
    assert run_id in str(torch.load(night.path / "checkpoint.pt", weights_only=True))

    (night.path / "audit.tsv").write_text("of yesterday\n")
    result = repo.run("-m", "lab", "sandbox", "--archives", "--", "uv", "run", "-m", "lab", "audit", timeout=250)
    assert result.rc == 0, result.err
    assert "1 runs, 0 flagged; read-only here, not written: audit.tsv, .lab/audit.json" in result.out
    assert (night.path / "audit.tsv").read_text() == "of yesterday\n" and not (night.path / ".lab" / "audit.json").exists()


def learn_val(checkpoint_path, repo, rows_path, steps=30):
    """Trains the checkpoint on the validation rows themselves, by the train.py beside it."""
    code = f"""
        import numpy as np, torch, torch.nn.functional as F
        from train import load_model
        model = load_model({str(checkpoint_path)!r}, "cpu").train()
        rows = torch.from_numpy(np.load({str(rows_path)!r}).astype(np.int64))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range({steps}):
            loss = model(rows[:, :-1], rows[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        checkpoint = torch.load({str(checkpoint_path)!r}, weights_only=True)
        checkpoint["model"] = model.state_dict()
        torch.save(checkpoint, {str(checkpoint_path)!r})
    """
    result = repo.run_code(code, timeout=250)
    assert result.rc == 0, result.err


def test_honest_runs_reproduce_and_dishonest_ones_are_flagged(night):
    """One audit over all of them: each is told apart from the others."""
    night.keep()
    first = night.records[-1]["mean"]
    night.records.clear()
    shutil.rmtree(night.path / "runs")
    night.keep(sigma_of=[first - 0.002, first + 0.002])
    night.keep()
    altered = night.keep(edit=lambda c: c["model"]["lm_head.weight"].mul_(1.5))
    night.keep(train=PEEKING)
    night.keep(train=PATCHING)
    night.keep(train=SHRINKING)
    gone = night.keep()
    (gone / "checkpoint.pt").unlink()
    log = night.keep()
    (log / "run.log").write_text("run: it was killed\n")
    (rows,) = night.repo.cache.rglob("val_rows.npy")
    learnt = night.keep()
    learn_val(learnt / "checkpoint.pt", night.repo, rows)

    result = night.audit()
    assert (result.rc, result.err) == (4, "")
    table = night.table()
    assert [table[i]["flags"] for i in (1, 2)] == ["ok", "ok"]
    assert table[2]["val_again"] == table[1]["val_logged"] and table[2]["val_gain"] == "+0.000000"
    assert float(table[1]["holdout"]) > 0 and table[1]["holdout"] != table[1]["val_again"]
    assert "does not reproduce" in table[3]["flags"], altered
    assert "sees its own future" in table[4]["flags"] and table[4]["val_again"] == ""
    assert "replaces parts of the frozen code" in table[5]["flags"]
    assert "replaces parts of the frozen code" in table[6]["flags"]
    assert table[7]["flags"] == "its checkpoint.pt is gone" and "run.log is missing" in table[8]["flags"]
    # What was learnt from the rows reproduces once the log says so: then it is the holdout that tells.
    assert "does not reproduce" in table[9]["flags"]
    text = (learnt / "run.log").read_text()
    (learnt / "run.log").write_text(re.sub(r"(?m)^(val_bpb: +)\S+", rf"\g<1>{table[9]['val_again']}", text))
    result = night.audit("9")
    flags = night.table()[9]
    assert result.rc == 4 and flags["flags"] == "the gain is on val alone: was it trained on the validation rows?"
    assert float(flags["val_gain"]) > 0.1 and float(flags["holdout_gain"]) < float(flags["val_gain"]) / 2
    assert list(night.table()) == [1, 9] and "FLAGGED: the gain is on val alone" in result.out


def test_a_model_that_learns_from_row_to_row_and_agrees_with_itself_is_flagged(night, monkeypatch):
    """Its logits are the same for each prefix of a row, whenever it is scored, so that the audit inside a process passes."""
    night.keep()
    learning = night.keep(train=LEARNING)
    assert night.audit().rc == 4 and night.table()[1]["flags"] == "ok"
    assert "scores a batch differently after other rows (+" in night.table()[2]["flags"]
    for name, value in night.repo.env.items():
        monkeypatch.setenv(name, value)
    scores = score_in_fork(night.path, learning, "cpu", None)
    assert "refused" not in scores and scores["val"] > 0


def test_scores_are_remembered_until_something_changes(night):
    folder = night.keep()
    assert night.audit().rc == 0
    known = night.path / ".lab" / "audit.json"
    (digest,) = json.loads(known.read_text())
    known.write_text(known.read_text().replace('"holdout": ', '"holdout": 1'))  # 1 in front: remembered, not scored
    assert night.audit().rc == 0 and float(night.table()[1]["holdout"]) > 10
    assert night.audit("--again").rc == 0 and float(night.table()[1]["holdout"]) < 10
    with open(folder / "train.py", "a") as f:
        f.write("# another\n")
    assert night.audit("--best").rc == 0 and len(json.loads(known.read_text())) == 2


def test_a_tree_with_an_older_lab_is_audited_by_this_one(night, tmp_path):
    """Rules, data code and metric are the tree's, from wherever it is called; nothing of lab is."""
    night.keep()
    for name in ("audit.py", "scoring.py"):
        (night.path / "lab" / "verify" / name).unlink()
    result = night.repo.run("-m", "lab", "audit", "--tree", night.path, timeout=250, wrap=["env", "-C", str(ROOT)])
    assert (result.rc, result.err) == (0, "") and night.table()[1]["flags"] == "ok"
    with open(night.path / "prepare.py", "a") as f:
        f.write("# another\n")
    result = night.repo.run("-m", "lab", "audit", "--tree", night.path, timeout=250, wrap=["env", "-C", str(ROOT)])
    assert "it ran under other rules" in result.out


def test_refusals(night, tmp_path):
    assert_refused(night.audit(), "nothing was kept on this branch yet")
    folder = night.keep()
    assert_refused(night.audit("7"), "row 7 is not a kept run")
    night.git("switch", "-q", "-c", "other")
    assert_refused(night.audit(), "on branch other")
    night.git("switch", "-q", "autoresearch/test")
    (folder / "checkpoint.pt").unlink()
    result = night.audit()
    assert_refused(result, "none of these runs could be scored")
    assert "its checkpoint.pt is gone" in result.out
    (night.path / "constants.py").write_text((night.path / "constants.py").read_text() + "# changed\n")
    assert "it ran under other rules" in night.audit().out


def test_a_holdout_that_was_edited_is_refused(night, tmp_path):
    night.keep()
    cache = tmp_path / "edited"
    shutil.copytree(night.repo.cache, cache)
    (path,) = cache.rglob("holdout_rows.npy")
    rows = np.load(path)
    rows[0, 1] ^= 1
    np.save(path, rows)
    result = night.audit(AUTORESEARCH_CACHE=cache)
    assert "holdout_rows.npy changed since it was prepared" in result.out and result.rc == 1
