"""A whole night with the real train.py, real git and the real commands, by an agent that follows program.md.

Only the numbers are staged: the copy's prepare.py prints, in place of val_bpb, 1.0 plus the effects and the noise
that comments in train.py announce, so that every verdict can be called up. Everything else is as it is.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_repo
from scripted_agent import GUARD, Agent, Refused

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# The staged metric: "# effect: -0.01" adds to every run, "# under 43: 0.002" to runs with that seed.
STAGE = '''

def staged_bpb(clock):
    text = Path(__file__).with_name("train.py").read_text()
    effects = [float(x) for x in re.findall(r"^# effect: (\\S+)", text, re.MULTILINE)]
    noise = re.findall(rf"^# under {clock.seed}: (\\S+)", text, re.MULTILINE)
    assert 0 < clock.val_bpb < 20, "the true metric was computed too"
    return 1.0 + sum(effects) + (float(noise[-1]) if noise else {43: 0.002, 44: -0.002}.get(clock.seed, 0))
'''
SPARE = "# a line that nothing needs\nSPARE = [1, 2, 3]\nSPARE_TOO = SPARE\n"
NAN = """
_forward = GPT.forward
def forward(self, *args, **kwargs):
    out = _forward(self, *args, **kwargs)
    return out * float("nan") if out.dim() == 0 else out
GPT.forward = forward
"""
OUT_OF_MEMORY = """
def forward(self, *args, **kwargs):
    return torch.empty(10**15)
GPT.forward = forward
"""
HANG = """
import time
import prepare
prepare.Clock.progress = lambda self: time.sleep(10**6)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory, prepared_stdlib):
    """(path, environment) of a tree on branch autoresearch/test: a copy of the repo under tiny rules, staged."""
    base = tmp_path_factory.mktemp("scripted")
    (base / "home").mkdir()
    repo = tiny_repo(
        base / "clone", base / "home", base / "cache", "stdlib", None, 1, 90,
        AUTORESEARCH_DATASET="stdlib", AUTORESEARCH_NO_SAMPLE="1",
    )  # fmt: skip
    repo.copy_cache(prepared_stdlib)
    # Verdicts are staged, so a busy machine must neither ask for further runs nor let one overrun its second.
    repo.edit("lab/analysis/history.py", r"^SLOWED = \S+", "SLOWED = 10.0")
    repo.edit("prepare.py", r"^SLACK = .*", "SLACK = 20")
    repo.edit("prepare.py", r"\{self\.val_bpb:\.6f\}", "{staged_bpb(self):.6f}")
    with open(repo.path / "prepare.py", "a") as f:
        f.write("\nimport re\n" + STAGE)
    text = (repo.path / "train.py").read_text()
    assert text.count(GUARD) == 1
    (repo.path / "train.py").write_text(text.replace(GUARD, SPARE + "\n\n" + GUARD))
    # `uv run` in the copy would make an environment of its own: this one runs what the tests run in.
    (base / "bin").mkdir()
    (base / "bin" / "uv").write_text(f'#!/bin/sh\nshift\nexec {sys.executable} "$@"\n')
    (base / "bin" / "uv").chmod(0o755)
    env = repo.env | {"PATH": f"{base / 'bin'}:{os.environ['PATH']}", "GIT_CONFIG_GLOBAL": os.devnull}
    git = Agent(repo.path, env).git
    git("init -q -b main")
    git("add -A")
    git("commit -q -m start")
    git("switch -q -c autoresearch/test")
    return repo.path, env


def check_night(tree, agent, expected_chain):
    """What the morning finds."""
    from lab.store.results_tsv import is_row
    from lab.store.run_log import HEALTHY

    rows = [line.split("\t") for line in (tree / "results.tsv").read_text().splitlines()[1:]]
    assert all(is_row("\t".join(row)) for row in rows)
    for row in rows:
        agent.git(f"show --quiet {row[0]}")
    records = [json.loads(line) for line in (tree / "runs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows, 1):
        assert agent.git(f"rev-parse refs/autoresearch/test/{number:04d}").startswith(row[0])
    keeps = {f"{n:04d}-{row[0]}" for n, row in enumerate(rows, 1) if row[3] == "keep"}
    assert {p.name for p in (tree / "runs").iterdir()} == keeps | {"best"}
    for name in keeps:
        files = {p.name for p in (tree / "runs" / name).iterdir()}
        assert files == {"train.py", "run.log", "checkpoint.pt", "model_info.txt", "git_log.txt", "results.tsv"}
        log, _, _ = (tree / "runs" / name / "run.log").read_text().partition("---\n")
        unknown = [line for line in log.splitlines() if line.strip() and not HEALTHY.match(line)]
        assert not unknown, "lab takes a run that was killed after such a line for one that gave up"
        commit = agent.git(f"rev-parse {name[5:]}").strip()
        assert (tree / "runs" / name / "train.py").read_text() == agent.git(f"show {commit}:train.py")
    assert agent.git("log --format=%s").splitlines() == expected_chain
    assert "error" not in agent.git("fsck --strict") and agent.git("status --porcelain --untracked-files=no").strip() in (
        "", "M program.md",
    )  # fmt: skip
    return rows, records


def test_a_scripted_night(tree):
    tree, env = tree
    agent = Agent(tree, env)

    def verdict(said):
        return said.partition(":")[0]

    def tried(name, code, options="", expect=None):
        said = agent.try_out(name, code, options)
        assert verdict(said) == expect, said
        assert agent.context <= (4800 if expect == "crash" else 1600), agent.context
        return said

    def refused(needle, status=1, description="an idea"):
        with pytest.raises(Refused) as caught:
            agent.record(description)
        assert caught.value.status == status and needle in str(caught.value), caught.value
        assert len(str(caught.value).splitlines()) == 1

    # the baseline, then what the verdict makes of close and clear cases
    said = agent.baseline()
    assert verdict(said) == "keep", said
    tried("a loss at first", "# effect: 0.02", expect="discard")
    tried("close, and does not hold", "# effect: -0.00232\n# under 43: 0.003", expect="discard")
    tried("close, and holds", "# effect: -0.00238\n# under 43: -0.004", expect="keep")
    tried("equal", "# effect: 0", expect="discard")
    tried("a loss", "# effect: 0.03", expect="discard")
    tried("a gain", "# effect: -0.03", expect="keep")

    # what fails
    tried("a syntax error", "def broken(:", expect="crash")
    tried("a nan", NAN, expect="crash")
    assert "FAIL" in (tree / "run.log").read_text()
    tried("out of memory", OUT_OF_MEMORY, expect="crash")
    (tree / "program.md").write_text((tree / "program.md").read_text() + "\nhalf a sentence of the human")
    tried("a hang", HANG, expect="crash")
    assert "watchdog: training took longer" in (tree / "run.log").read_text()

    # the machine is wanted elsewhere
    agent.edit("# effect: -0.01")
    agent.git('commit -q -m "preempted first" -- train.py')
    (tree / "run.log").write_text("")  # or the last run's lines would pass for this one's
    process = subprocess.Popen(
        ["sh", "-c", "uv run train.py > run.log 2>&1"], cwd=tree, env=env, start_new_session=True
    )  # fmt: skip
    while "model:" not in (tree / "run.log").read_text() and process.poll() is None:
        time.sleep(0.1)
    refused("still going")
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    time.sleep(0.5)
    refused("Run it again: uv run train.py > run.log 2>&1", status=75)

    # the agent loses its memory: from here on, what it knows it has from `lab status`
    agent = Agent(tree, env)
    assert "the last run was preempted" in agent.next()
    for _ in range(2):
        agent.step([])
    assert "is recorded" in agent.next()

    # a simplification, and a human who commits while it runs
    agent.edit("-" + SPARE.partition("\n")[2])
    agent.git('commit -q -m "less code" -- train.py')
    agent.git('commit -q -m "human: program" -- program.md')
    agent.train("uv run train.py > run.log 2>&1")
    assert verdict(agent.obey(agent.record("less code", "--simpler"))) == "keep"

    # what is not true is refused
    log = (tree / "run.log").read_text()
    refused("recorded already")
    agent.edit("# effect: -0.5")
    agent.git('commit -q -m "cheats" -- train.py')
    (tree / "run.log").write_text(re.sub(r'"run_id": "\w+"', '"run_id": "feed"', log))
    refused("another train.py than HEAD's")
    agent.train("uv run train.py > run.log 2>&1")
    honest = (tree / "run.log").read_text()
    (tree / "run.log").write_text(honest.replace('"dataset": "stdlib"', '"dataset": "tinystories"'))
    refused("stdlib → tinystories")
    agent.git("reset -q --keep HEAD^")
    frozen = (tree / "prepare.py").read_text()
    (tree / "prepare.py").write_text(frozen.replace("return 1.0 + sum", "return 0.1 + sum"))
    agent.edit("# effect: 0.001")
    agent.git('commit -q -m "cheats more" -- train.py prepare.py')
    agent.train("uv run train.py > run.log 2>&1")
    refused("prepare.py changed since this branch's first run")
    agent.git("reset -q --keep HEAD^")
    assert (tree / "prepare.py").read_text() == frozen

    tried("one more gain", "# effect: -0.02", expect="keep")
    chain = ["one more gain", "human: program", "less code", "preempted first", "a gain", "close, and holds", "start"]
    rows, records = check_night(tree, agent, chain)
    assert [row[3] for row in rows] == (
        ["keep", "discard", "discard", "keep", "discard", "discard", "keep", *["crash"] * 4, "keep", "keep", "keep"]
    )
    runs = {row[4]: sum(r["commit"].startswith(row[0]) for r in records) for row in rows}
    again = {"baseline": 3, "close, and does not hold": 2, "close, and holds": 2, "less code": 2}
    assert runs == {row[4]: again.get(row[4], 1) for row in rows}  # a second run where one does not decide
    assert (tree / "program.md").read_text().endswith("half a sentence of the human")
    assert os.readlink(tree / "runs" / "best") == f"0014-{rows[-1][0]}"


def test_a_night_kept_by_lab_night_whose_agent_dies_three_times(tree, tmp_path):
    source, env = tree
    place = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "-b", "main", source, place], check=True, env=env)
    agent = Agent(place, env)
    agent.git("switch -q -c autoresearch/test")
    plan = [["a gain", "# effect: -0.03", ""], ["a loss", "# effect: 0.03", ""], ["another gain", "# effect: -0.02", ""]]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    shutil.copy(ROOT / "tests" / "scripted_agent.py", tmp_path)
    command = f"{sys.executable} {tmp_path}/scripted_agent.py {tmp_path}/plan.json"
    dying = f"test $(grep -c 'start [0-9] of' night.log) -le 3 && exec {command} --die-after 2; exec {command}"
    keeper = subprocess.Popen(
        [sys.executable, "-m", "lab", "night", "--hours", "0.5", "--agent", dying], cwd=place, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 900
    try:
        while time.monotonic() < deadline and keeper.poll() is None:
            log = place / ".lab" / "agent.log"
            if log.exists() and "every idea was tried" in log.read_text():
                break
            time.sleep(1)
    finally:
        keeper.send_signal(signal.SIGTERM)
        out, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 143, out
    assert out.count("of the agent, process") == 4 and out.count("the agent ended with status 1") == 3, out
    rows, _ = check_night(place, agent, ["another gain", "a gain", "start"])
    assert [row[3:] for row in rows] == [
        ["keep", "baseline"], ["keep", "a gain"], ["discard", "a loss"], ["keep", "another gain"],
    ]  # fmt: skip
