"""benchmarks/step.py --against: two versions of train.py in turn. Seconds are not asserted."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TINY = "DEPTH=1 MODEL_DIM=32 HEAD_DIM=16 DEVICE_BATCH_SIZE=2 TOTAL_BATCH_SIZE=512".split()


@pytest.fixture
def repo(make_repo):
    """A copy whose HEAD is this tree's core."""
    repo = make_repo("stdlib")
    shutil.copytree(ROOT / "benchmarks", repo.path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "the older version"]):
        identity = ["-c", "user.name=a test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", *identity, *command], cwd=repo.path, env=repo.env, check=True)
    return repo


def against(repo, commit):
    command = [sys.executable, "benchmarks/step.py", "--against", commit, "--compile", "no", "--steps", "1"]
    return subprocess.run([*command, "--set", *TINY], cwd=repo.path, env=repo.env, capture_output=True, text=True)


def apart(done):
    assert done.returncode == 0, done.stderr
    return float(re.search(r"at most (\S+) apart", done.stdout)[1])


@pytest.mark.slow
def test_two_versions_that_compute_the_same_have_the_same_losses_and_another_one_is_seen(repo):
    assert apart(against(repo, "HEAD")) == 0
    result = json.loads((repo.path / "benchmarks" / "results.jsonl").read_text().splitlines()[-1])
    assert result["loss_difference"] == 0 and len(result["wall_ms"]) == 2 and min(result["cpu_ms"]) > 0
    repo.edit("train.py", r"torch\.tanh\(logits", "torch.tanh(0.9 * logits")
    assert apart(against(repo, "HEAD")) > 1e-5


def test_a_commit_that_does_not_exist_is_one_line(repo):
    done = against(repo, "nosuchcommit")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "'nosuchcommit' is no commit of this repository" in done.stderr
