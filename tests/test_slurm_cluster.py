"""The script of lab slurm on a real Slurm of one node, with the real train.py, record, night and workers, and agents that
follow program.md: preempted, requeued and cancelled, every experiment is recorded once, every proposal decided once.

The cluster is Debian's packages, run by this test below a temporary folder and ended with it: slurmctld, slurmd and
munged with a key and a socket of its own. The metric is staged as in test_night_scripted.py, to call up verdicts.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import kill_group, left_out, tiny_repo
from scripted_agent import Agent
from test_night_scripted import STAGE

from lab.loop import checks
from lab.share import exchange
from lab.store.repository import Repo

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["slurmctld", "slurmd", "sbatch", "srun", "munged"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

# config_overrides: tasks side by side on a machine of one core. cred_expire: a requeued job starts again when its
# credential has expired, by default after two minutes.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.pid
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
KillWait=5
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Slurm:
    def __init__(self, base):
        self.base, self.daemons = base, []
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (base / name).mkdir()
        (base / "munge.key").write_bytes(os.urandom(128))
        (base / "munge.key").chmod(0o400)
        (base / "slurm.conf").write_text(CONFIG.format(base=base, host=host, ctld=free_port(), slurmd=free_port()))
        self.env = os.environ | {"SLURM_CONF": str(base / "slurm.conf")}
        self.start(
            "munged", "--foreground", "--force", f"--key-file={base}/munge.key", f"--socket={base}/munge.socket",
            f"--pid-file={base}/munge.pid", f"--log-file={base}/munge.log", f"--seed-file={base}/munge.seed",
        )  # fmt: skip
        self.until(lambda: (base / "munge.socket").exists(), 10, "munged is not up")
        self.start("slurmctld", "-D")
        self.start("slurmd", "-D", "-N", host)
        self.until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), 30, "the node is not up")

    def start(self, name, *args):
        with open(self.base / f"{name}.out", "ab") as out:
            self.daemons.append(
                subprocess.Popen([name, *args], env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                 start_new_session=True)
            )  # fmt: skip

    def ask(self, *command, **kwargs):
        return subprocess.run(command, env=self.env, capture_output=True, text=True, **kwargs).stdout.strip()

    def do(self, *command):
        subprocess.run(command, env=self.env, check=True, capture_output=True, text=True)

    def state(self, job):
        """The state of a job that runs or waits; "" of one that is over."""
        return self.ask("squeue", "-h", "-j", str(job), "-o", "%T")

    def until(self, condition, seconds, otherwise):
        deadline = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in self.base.glob("*.out"))
            assert time.monotonic() < deadline, f"{otherwise}\n{logs}"
            time.sleep(0.3)

    def end(self):
        self.ask("scancel", "--user=root")
        deadline = time.monotonic() + 20
        while self.ask("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.3)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                pass
            kill_group(daemon)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        left_out(f"Slurm is not installed: {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)")
    if os.geteuid():
        left_out("only root can start a Slurm whose tasks are its own")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.end()
    assert all(daemon.poll() is not None for daemon in cluster.daemons)


@pytest.fixture(scope="module")
def source(slurm, tmp_path_factory, prepared_stdlib):
    """(path, environment) of a checkout to call lab slurm in: tiny rules, a staged metric, data prepared."""
    base = tmp_path_factory.mktemp("source")
    (base / "home").mkdir()
    (base / "a scratch").mkdir()
    repo = tiny_repo(
        base / "clone", base / "home", base / "cache", "stdlib", None, 1, 90,
        AUTORESEARCH_DATASET="stdlib", AUTORESEARCH_NO_SAMPLE="1", SLURM_CONF=slurm.env["SLURM_CONF"],
        SCRATCH=base / "a scratch", GIT_CONFIG_GLOBAL=os.devnull,
    )  # fmt: skip
    repo.copy_cache(prepared_stdlib)
    shutil.copytree(ROOT / "deploy", repo.path / "deploy")
    # A busy machine must neither ask for further runs nor let one overrun its second.
    repo.edit("lab/analysis/history.py", r"^SLOWED = \S+", "SLOWED = 10.0")
    repo.edit("prepare.py", r"^SLACK = .*", "SLACK = 20")
    repo.edit("prepare.py", r"\{self\.val_bpb:\.6f\}", "{staged_bpb(self):.6f}")
    with open(repo.path / "prepare.py", "a") as f:
        f.write("\nimport re\n" + STAGE)
    # `uv run` would make an environment of its own: this one runs what the tests run in.
    (base / "bin").mkdir()
    (base / "bin" / "uv").write_text(
        '#!/bin/sh\nshift\n[ "$1" = --no-sync ] && shift\n'
        f'case "$1" in *.sh) exec "$@";; esac\nexec {sys.executable} "$@"\n'
    )
    (base / "bin" / "uv").chmod(0o755)
    path = f"{base / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    repo.env |= {"PATH": path}
    (repo.path / "other.md").write_text((repo.path / "program.md").read_text() + "\nTry the optimizer first.\n")
    agent = Agent(repo.path, repo.env)
    agent.git("init -q -b main")
    agent.git("add -A")
    agent.git("commit -q -m start")
    return repo, agent


def test_an_array_of_two_nights_is_preempted_requeued_and_cancelled(slurm, source):
    repo, _ = source
    base = repo.path.parent
    plan = [["a gain", "# effect: -0.03", ""], ["a loss", "# effect: 0.03", ""], ["more", "# effect: -0.02", ""]]
    (base / "plan.json").write_text(json.dumps(plan))
    shutil.copy(ROOT / "tests" / "scripted_agent.py", base)
    written = repo.run(
        "-m", "lab", "slurm", "--tag", "nov21", "--hours", "0.5", "--programs", "program.md", "other.md", "--gres", "none",
        "--cpus", "1", "--mem", "100M", "--group-readable", "--submit",
        "--agent", shlex.join([sys.executable, f"{base}/scripted_agent.py", f"{base}/plan.json"]),
    )  # fmt: skip
    assert written.rc == 0, written.err
    job, folder = re.search(r"submitted: job (\d+)", written.out)[1], base / "a scratch" / "autoresearch" / "nov21"
    trees = [folder / str(task) / "tree" for task in (0, 1)]

    def records(tree):
        path = tree / "runs.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def training(tree):
        log = tree / "run.log"
        return log.exists() and "dtype: " in (text := log.read_text()) and "---" not in text

    def log(task):
        return (folder / "logs" / f"{job}_{task}.log").read_text()

    def in_the_middle(tree):
        slurm.until(lambda: len(records(tree)) >= 2 and training(tree), 400, f"no training in {tree}")

    in_the_middle(trees[1])
    slurm.do("scontrol", "requeue", f"{job}_1")  # what a preemption does
    in_the_middle(trees[0])
    slurm.do("scancel", "--signal=TERM", "--batch", f"{job}_0")  # what --signal=B:TERM does near the time limit
    for task in (0, 1):
        slurm.until(lambda t=task: " start 2 on " in log(t), 300, "the task did not come back")
        slurm.until(
            lambda t=trees[task]: "every idea was tried" in (t / ".lab" / "agent.log").read_text(), 600,
            f"task {task} did not go on",
        )  # fmt: skip
    assert "back into the queue" in log(0) and "back into the queue" not in log(1)

    for task, tree in enumerate(trees):
        agent = Agent(tree, repo.env)
        rows = [line.split("\t") for line in (tree / "results.tsv").read_text().splitlines()[1:]]
        assert [row[3:] for row in rows] == [
            ["keep", "baseline"], ["keep", "a gain"], ["discard", "a loss"], ["keep", "more"],
        ], log(task)  # fmt: skip
        runs = records(tree)
        assert len({r["run_id"] for r in runs}) == len(runs)
        scored = [(r["code"], r["header"]["seed"]) for r in runs if r["summary"]]
        assert len(set(scored)) == len(scored) == 3 + 3, "three runs of the baseline, and one of each idea"
        assert agent.git("branch --show-current").strip() == f"autoresearch/nov21-{task}"
        subjects = agent.git("log --format=%s").splitlines()
        assert subjects == ["more", "a gain", *(["task 1: other.md"] if task else []), "start"]
        assert "error" not in agent.git("fsck --strict")
        assert os.readlink(tree / "runs" / "best") == f"0004-{rows[-1][0]}"
        night = (tree / "night.log").read_text()
        assert night.count("of the agent, process") == 2 and night.count("ended by SIGTERM") == 1, night
    assert not any((base / "home").iterdir()), "something was written to the user's home"

    table = repo.run("-m", "lab", "status", "--trees", str(folder / "*" / "tree"))
    assert table.rc == 0 and "nov21-0" in table.out and "nov21-1" in table.out, table.err

    slurm.do("scancel", job)
    slurm.until(lambda: not slurm.state(job), 30, "a cancelled array came back")
    assert all(len(re.findall(r"task \d: start \d", log(task))) == 2 for task in (0, 1))


def test_of_two_workers_one_is_requeued_in_a_run_and_every_proposal_has_one_verdict(slurm, source):
    repo, _ = source
    base = repo.path.parent
    written = repo.run(
        "-m", "lab", "slurm", "--tag", "pair", "--hours", "0.5", "--workers", "2", "--gres", "none", "--cpus", "1",
        "--mem", "100M", "--submit",
    )  # fmt: skip
    assert written.rc == 0, written.err
    job, folder = re.search(r"submitted: job (\d+)", written.out)[1], base / "a scratch" / "autoresearch" / "pair"
    trees = [folder / str(task) / "tree" for task in (0, 1)]
    subprocess.run(["git", "clone", "-q", repo.path, base / "feeder"], env=repo.env, check=True)
    feeder = Agent(base / "feeder", repo.env)
    feeder.shell(re.search(r"to feed them, in a clone: (.*)", written.out)[1])
    feeder.git("switch -q -c autoresearch/feeder")
    ideas = {"a gain": ("# effect: -0.03", "class GPT("), "a loss": ("# effect: 0.03", "def norm("), "more": ("# effect: -0.02", "def main(")}
    for description, (effect, place) in ideas.items():  # far from each other, so that they do not conflict
        train = feeder.tree / "train.py"
        text = train.read_text()
        assert text.count(f"\n{place}") == 1
        train.write_text(text.replace(f"\n{place}", f"\n{effect}\n{place}"))
        feeder.git(f'commit -q -m "{description}" -- train.py')
        feeder.shell(f'uv run -m lab propose "{description}"')

    def proposals():
        """What the remote says of them."""
        queue = "log --no-walk --format=%B '--glob=refs/autoresearch-team/pair/queue/*'"
        listed = feeder.shell(f"git -C {shlex.quote(str(folder / 'team.git'))} {queue}", check=False)
        states = [json.loads(line) for line in listed.splitlines() if line.startswith("{")]
        return {state["description"]: state for state in states if state["task"] == "experiment"}

    assert proposals().keys() == ideas.keys()

    def in_a_run():
        """The number of the task that trains what was proposed, or None."""
        for state in proposals().values():
            for task, tree in enumerate(trees):
                if state["worker_branch"] == f"pair-{task}" and state["running"] and (tree / "run.log").exists():
                    text = (tree / "run.log").read_text()
                    if f'"{state["running"]}"' in text and "dtype: " in text and "---" not in text:
                        return task
        return None

    def log(task):
        return (folder / "logs" / f"{job}_{task}.log").read_text()

    found = []
    slurm.until(lambda: found.append(in_a_run()) or found[-1] is not None, 600, "no proposal runs")
    slurm.do("scontrol", "requeue", f"{job}_{found[-1]}")  # what a preemption does
    slurm.until(lambda: " start 2 on " in log(found[-1]), 300, "the task did not come back")
    slurm.until(lambda: {state["kind"] for state in proposals().values()} <= {"decided", "returned"}, 600, "not decided")
    slurm.do("scancel", job)
    slurm.until(lambda: not slurm.state(job), 60, "the workers go on")

    logs = "\n".join(map(log, (0, 1)))
    wanted = {"a gain": "keep", "a loss": "discard", "more": "keep"}
    assert {name: state["verdict"] for name, state in proposals().items()} == wanted, logs
    told = re.findall(r"^(\w+): \S+ .*?(a gain|a loss|more) \[", feeder.shell("uv run -m lab wait"), re.MULTILINE)
    assert sorted(told) == sorted((verdict, name) for name, verdict in wanted.items()), logs
    tree = Repo.find(feeder.tree)
    assert exchange.fetch(tree, checks.member_of(tree)) is None
    team = checks.team_of(tree, checks.night_of(tree))
    runs, rows = team.night.records, team.night.rows
    assert len({r["run_id"] for r in runs}) == len(runs) and len({r["code"] for r in rows}) == len(rows), logs
    for name, state in proposals().items():  # a late gain was tried again: its row is a second one, of another code
        verdicts = [r["verdict"] for r in rows if r["description"] == name and not r.get("late")]
        assert verdicts == [state["verdict"]] and state["commit"] in [r["commit"] for r in rows], logs
    best = feeder.git(f"show {team.best['commit']}:train.py")  # it lacks "more" if that was kept first, and the gain beat it
    assert "# effect: -0.03" in best and "# effect: 0.03" not in best
    for tree in trees:
        assert "error" not in Agent(tree, repo.env).git("fsck --strict")


def test_a_training_under_srun_is_recorded_and_one_that_is_ended_is_not_a_result(slurm, source):
    repo, agent = source
    run = "uv run deploy/slurm/train-under-srun.sh > run.log 2>&1"
    options = {"SRUN_OPTIONS": "--cpus-per-task=1 --mem=100M"}
    agent = Agent(repo.path, repo.env | options)
    agent.shell(r"sed -i 's#uv run train\.py#uv run deploy/slurm/train-under-srun.sh#g' program.md")
    agent.git("switch -q -c autoresearch/login")
    agent.git('commit -q -m "runs go to a compute node" -- program.md')
    assert run in agent.next(), "lab takes the run command from program.md"
    agent.train(run)
    log = (repo.path / "run.log").read_text()
    assert "\nval_bpb:" in log, log
    said = agent.record("baseline")
    assert f"AUTORESEARCH_SEED=43 {run}" in said

    (repo.path / "run.log").write_text("")
    process = subprocess.Popen(
        ["sh", "-c", f"AUTORESEARCH_SEED=43 {run}"], cwd=repo.path, env=agent.env, start_new_session=True
    )
    slurm.until(lambda: "dtype:" in (repo.path / "run.log").read_text(), 120, "it did not begin")
    os.killpg(process.pid, signal.SIGTERM)  # as lab night ends what it started
    process.wait(timeout=30)
    slurm.until(lambda: not slurm.ask("squeue", "-h"), 30, "it goes on on the node")
    said = agent.next()
    assert "the last run was preempted" in said, f"{said}\n{(repo.path / 'run.log').read_text()}"
    assert f"AUTORESEARCH_SEED=43 {run}" in said


def test_a_login_night_replaces_its_lost_allocation(slurm, source):
    repo, _ = source
    base, scratch = repo.path.parent, repo.path.parent / "a scratch"
    subprocess.run(["git", "clone", "-q", "-b", "main", repo.path, base / "home clone"], env=repo.env, check=True)
    agent = Agent(base / "home clone", repo.env)
    shutil.copytree(ROOT / "agents", agent.tree / "agents")
    agent.git("add agents")
    agent.git("commit -q -m agents")
    (scratch / "autoresearch-data").symlink_to(repo.cache)
    train = "uv run deploy/slurm/train-under-srun.sh > run.log 2>&1; cp run.log"
    night = subprocess.Popen(
        ["deploy/slurm/login-night.sh", "away", "1", f'{train} 1.log; scancel "$(cat "$SRUN_JOB_FILE")"; {train} 2.log; sleep 600'],
        cwd=agent.tree, env=repo.env | {"PARTITION": "main", "GRES": "none", "CPUS": "1", "MEM": "100M"}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    tree = scratch / "autoresearch" / "away" / "login" / "tree"
    try:
        slurm.until((tree / "2.log").exists, 600, "no second training")
    finally:
        os.killpg(night.pid, signal.SIGTERM)
        said, _ = night.communicate(timeout=60)
    for name in ("1.log", "2.log"):
        assert "\nval_bpb:" in (tree / name).read_text(), said
    first, second = re.findall(r"Granted job allocation (\d+)", said)
    assert f"job {first} is lost" in said
    slurm.until(lambda: not slurm.state(second), 60, "the allocation outlived the night")
