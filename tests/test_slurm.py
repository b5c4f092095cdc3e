"""lab slurm: the script that it writes, and what a task does, with fakes in place of Slurm's commands.

A task is run as slurmd would: `bash SCRIPT` in the environment of an array task, with a stub of squeue and scontrol.
test_slurm_cluster.py does the same on a real Slurm.
"""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import assert_refused, kill_group

ROOT = Path(__file__).resolve().parent.parent
FAKES = {
    "squeue": 'echo "$*" >> "$FAKES/squeue.called"; cat "$FAKES/state" 2> /dev/null',
    "scontrol": 'echo "$*" >> "$FAKES/scontrol.called"',
    "sbatch": 'echo "$*" >> "$FAKES/sbatch.called"; cp "$2" "$FAKES/submitted"; echo "4711;cluster"',
    "uv": 'shift; exec python "$@"',
    "apptainer": 'printf "%s\\n" "$@" > "$FAKES/apptainer.called"; while [ "$1" != python ]; do shift; done; '
    'shift; exec "$REAL_PYTHON" "$@"',
}
AGENT = "env > $PWD/seen.env; echo {} >> runs.jsonl; sleep 100"


class Cluster:
    """A checkout to call `lab slurm` in, a folder that all nodes see, and the fakes on PATH."""

    def __init__(self, repo, base, data):
        self.repo, self.scratch, self.fakes, self.data = repo, base / "a scratch's 5% & $HOME", base / "fakes", data
        self.scratch.mkdir()
        self.fakes.mkdir()
        for name, body in FAKES.items():
            self.fake(name, body)
        self.env = repo.env | {
            "PATH": f"{self.fakes}:{os.environ['PATH']}", "FAKES": str(self.fakes), "SCRATCH": str(self.scratch),
            "GIT_CONFIG_GLOBAL": os.devnull, "REAL_PYTHON": sys.executable, "AUTORESEARCH_CACHE": str(data),
        }  # fmt: skip
        self.git("init -q -b main")
        self.git("add -A")
        self.git("commit -q -m start")
        self.started = []

    def fake(self, name, body):
        (self.fakes / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.fakes / name).chmod(0o755)

    def called(self, name):
        path = self.fakes / f"{name}.called"
        return path.read_text().splitlines() if path.exists() else []

    def git(self, command, tree=None):
        given = ["git", "-c", "user.name=human", "-c", "user.email=human@example.org", *shlex.split(command)]
        tree = tree or self.repo.path
        return subprocess.run(given, cwd=tree, env=self.env, check=True, capture_output=True, text=True).stdout.strip()

    def lab(self, *args, tag="nov21", hours=1, agent=AGENT):
        options = [*(["--tag", tag] if tag else []), "--hours", hours, *(["--agent", agent] if agent else [])]
        return self.repo.run("-m", "lab", "slurm", *options, *args, **self.env)

    def write(self, *args, **kwargs):
        """The script that the arguments give."""
        result = self.lab(*args, **kwargs)
        assert result.rc == 0, result.err
        return self.folder / "array.sbatch"

    @property
    def folder(self):
        return self.scratch / "autoresearch" / "nov21"

    def tree(self, task=0):
        return self.folder / str(task) / "tree"

    def start(self, script, task=0, job=500, **env):
        """The Popen of a task: its own group, its output in one pipe."""
        process = subprocess.Popen(
            ["bash", str(script)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, cwd=self.repo.path,
            env=self.env | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": str(job), "SLURM_ARRAY_JOB_ID": "499"} | env,
        )  # fmt: skip
        self.started.append(process)
        return process

    def until(self, condition, process):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline and process.poll() is None, process.communicate(timeout=5)[0]
            time.sleep(0.05)

    def until_at_work(self, process, task=0):
        before = len(self.recorded(task))
        self.until(lambda: len(self.recorded(task)) > before, process)

    def recorded(self, task=0):
        path = self.tree(task) / "runs.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def end(self, process, state="COMPLETING", everybody=True):
        """Slurm's TERM, in the state that squeue tells: (exit status, what the task printed)."""
        (self.fakes / "state").write_text(state + "\n")
        (os.killpg if everybody else os.kill)(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        (self.fakes / "state").unlink()
        return process.returncode, out

    def seen(self, task=0):
        """The environment that the agent saw."""
        lines = (self.tree(task) / "seen.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def cluster(make_repo, tmp_path, prepared_stdlib):
    cluster = Cluster(make_repo(), tmp_path, prepared_stdlib)
    yield cluster
    for process in cluster.started:
        kill_group(process)
    for entry in Path("/proc").iterdir():  # an agent has a session of its own
        try:
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(tmp_path):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


def sbatch_options(script):
    """{option: value} of the #SBATCH lines, as Slurm reads them; a flag's value is True."""
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines]
    assert all(len(word) == 1 for word in words), lines
    return {name: value if "=" in word[0] else True for word in words for name, _, value in [word[0].partition("=")]}


# --- the script ---------------------------------------------------------------


def test_the_options_of_an_array(cluster):
    (cluster.repo.path / "b program's.md").write_text("another\n")
    script = cluster.write("--programs", "program.md", "b program's.md", "program.md", hours=8)
    options = sbatch_options(script)
    # 8 hours; the last run: 60 + 3 + 60 + 60; to record it 180, to end 20; Slurm's warning 90, and 60 that it may be early
    assert options.pop("--time") == str(8 * 60 + -(-(60 + 3 + 60 + 60 + 180 + 20 + 90 + 60) // 60))
    assert options.pop("--output") == str(cluster.folder).replace("%", "%%") + "/logs/%A_%a.log"
    assert (cluster.folder / "logs").is_dir(), "Slurm makes no folder for a log: the job would fail without a word"
    assert options == {
        "--job-name": "autoresearch-nov21", "--array": "0-2", "--signal": "B:TERM@90", "--requeue": True, "--nodes": "1",
        "--open-mode": "append", "--ntasks": "1", "--cpus-per-task": "8", "--mem": "32G", "--gres": "gpu:1",
    }  # fmt: skip
    assert script.read_text().splitlines()[1].startswith("#SBATCH"), "a comment or command before them ends the options"


def test_the_program_of_an_agent_that_feeds_workers_is_no_night(cluster):
    result = cluster.lab("--programs", "program.md", "programs/team.md")
    assert result.rc == 0 and "programs/team.md is left out" in result.out, result
    assert sbatch_options(cluster.folder / "array.sbatch")["--array"] == "0-0"
    alone = cluster.lab("--programs", "programs/team.md")
    assert alone.rc == 1 and "--workers N" in alone.err


def test_options_of_ones_own(cluster):
    script = cluster.write(
        "--partition", "gpu", "--account", "a b", "--gpus", "h100:1", "--cpus", "3", "--mem", "9G", "--limit", "2",
        "--sbatch=--qos=long", "--sbatch=--exclusive", hours=8,
    )  # fmt: skip
    options = sbatch_options(script)
    assert "--gres" not in options and options["--gpus"] == "h100:1" and options["--cpus-per-task"] == "3"
    assert options["--partition"] == "gpu" and options["--account"] == "a b" and options["--mem"] == "9G"
    assert options["--qos"] == "long" and options["--exclusive"] is True
    assert options["--time"] == "120", "a night longer than the partition's limit takes several jobs"
    assert not {"--gres", "--gpus"} & sbatch_options(cluster.write("--gres", "none")).keys()


@pytest.mark.parametrize(
    "more", [[], ["--copy-data", "--group-readable", "--container", "docker://x"]], ids=["", "more"]
)
def test_shellcheck_and_bash_find_nothing(cluster, more):
    script = cluster.write(*more, agent="""claude -p "it's $5; `rm x`" """.strip())
    found = subprocess.run([Path(sys.executable).with_name("shellcheck"), script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert max(map(len, script.read_text().splitlines()[20:])) <= 130, "to be read by an admin"


def test_workers_are_tasks_of_one_team_on_one_remote(cluster):
    result = cluster.lab("--workers", "3", agent=None)
    assert result.rc == 0, result.err
    script, remote = cluster.folder / "array.sbatch", cluster.folder / "team.git"
    assert sbatch_options(script)["--array"] == "0-2" and "3 workers on autoresearch/nov21-0" in result.out
    assert f"git config autoresearch.team nov21; git config autoresearch.remote {shlex.quote(str(remote))}" in result.out
    assert cluster.git("rev-parse --is-bare-repository", tree=remote) == "true"
    text = script.read_text()
    assert "\nagent=''\n" in text and "\nteam=nov21\n" in text and f"\nremote={shlex.quote(str(remote))}\n" in text
    cluster.git("config autoresearch.remote /elsewhere/team.git")
    assert "autoresearch.remote /elsewhere/team.git" in cluster.lab("--workers", "3", agent=None).out
    for args, agent in [(["--workers", "0"], None), (["--workers", "2", "--programs", "program.md", "prepare.py"], None)]:
        refused = cluster.lab(*args, agent=agent)
        assert refused.rc == 1 and "--workers must be at least 1" in refused.err
    assert cluster.lab("--workers", "2").rc == 2 and "not allowed with argument" in cluster.lab("--workers", "2").err


@pytest.mark.parametrize("given", ["hub", "../hub.git", "rewritten:hub.git"])
def test_the_remote_of_workers_means_in_their_clones_what_it_means_here(cluster, given):
    """In a clone there is no remote "hub", no folder beside it, and nothing of the user's configuration."""
    hub = cluster.repo.path.parent / "hub.git"
    cluster.git(f"init -q --bare {shlex.quote(str(hub))}")
    cluster.git("remote add hub ../hub.git")
    cluster.git(f"config url.{shlex.quote(str(hub.parent))}/.insteadOf rewritten:")
    cluster.git(f"config autoresearch.remote {given}")
    result = cluster.lab("--workers", "1", agent=None)
    assert result.rc == 0, result.err
    assert f"; git config autoresearch.remote {shlex.quote(str(hub))}\n" in result.out
    assert f"\nremote={shlex.quote(str(hub))}\n" in (cluster.folder / "array.sbatch").read_text()
    assert not (cluster.folder / "team.git").exists()


def test_a_remote_that_is_nothing_here_is_refused_before_workers_idle(cluster):
    cluster.git("config autoresearch.remote huv")
    assert_refused(cluster.lab("--workers", "1", agent=None), "autoresearch.remote is 'huv'")
    assert not any(cluster.scratch.iterdir()), "nothing was changed"
    assert cluster.lab().rc == 0, "nights need none"


def test_what_it_says_after_writing(cluster):
    first = cluster.lab()
    assert first.rc == 0 and f"next: sbatch {shlex.quote(str(cluster.folder / 'array.sbatch'))}" in first.out
    assert f"lab status --trees {shlex.quote(str(cluster.folder / '*' / 'tree'))}" in first.out
    printed = cluster.lab("--output", "-")
    assert printed.out == (cluster.folder / "array.sbatch").read_text()
    elsewhere = cluster.scratch / "elsewhere.sh"
    assert cluster.lab("--output", str(elsewhere)).rc == 0 and elsewhere.read_text() == printed.out
    assert cluster.lab(tag="x" * 64).rc == 0, "only a team has a shorter name"
    cluster.tree().mkdir(parents=True)
    assert "1 of these nights have started before" in cluster.lab().out


@pytest.mark.parametrize(
    "args, kwargs, needle",
    [
        ([], {"tag": "a b"}, "--tag 'a b'"),
        ([], {"tag": "-x"}, None),
        ([], {"tag": "a..b"}, "--tag"),
        ([], {"tag": "x.lock"}, "--tag"),
        ([], {"tag": "a/b"}, "--tag"),
        (["--workers", "1"], {"tag": "x" * 64, "agent": None}, "workers are a team of that name"),
        ([], {"hours": 0}, "--hours 0"),
        ([], {"hours": "nan"}, "--hours nan"),
        ([], {"hours": "inf"}, "--hours inf"),
        ([], {"hours": "eight"}, None),
        ([], {"agent": "one\ntwo"}, "--agent is empty or holds a line break"),
        ([], {"agent": "  "}, "--agent is empty or holds a line break"),
        (["--programs", "program.md", "nowhere.md"], {}, "--programs: there is no"),
        (["--programs", "lab"], {}, "--programs: there is no"),
        (["--partition", "a\n#SBATCH --uid=0"], {}, "--partition is empty or holds a line break"),
        (["--sbatch", "qos=long"], {}, "--sbatch 'qos=long' is not an option"),
        (["--cpus", "0"], {}, "--cpus 0"),
        (["--limit", "0.1"], {}, "--limit 0.1: a job shorter than 9 minutes"),
        (["--limit", "-1"], {}, "--limit -1"),
        (["--scratch", "nowhere"], {}, "--scratch: there is no"),
        (["--from", "nowhere"], {}, "--from: there is no"),
        (["--container", "nowhere.sif"], {}, "--container: there is no"),
        (["--container", "docker://x", "--data", "/a:b"], {}, "colon"),
        (["--data", "nowhere"], {}, "stdlib is not prepared in"),
        (["--gres", "gpu:2", "--gpus", "2"], {}, None),
    ],
)
def test_what_no_task_could_work_with_is_refused(cluster, args, kwargs, needle):
    result = cluster.lab(*args, **kwargs)
    if needle is None:
        assert result.rc == 2 and "Traceback" not in result.err
    else:
        assert result.rc == 1
        assert_refused(result, needle)
    assert not any(cluster.scratch.iterdir()), "nothing was changed"


def test_code_that_is_not_committed_is_refused_as_no_task_would_have_it(cluster):
    cluster.repo.edit("constants.py", r"^GRACE = \S+", "GRACE = 61")
    assert_refused(cluster.lab(), "uncommitted changes in constants.py")
    assert not any(cluster.scratch.iterdir())


def test_without_a_scratch_folder_it_says_so(cluster):
    del cluster.env["SCRATCH"]
    assert_refused(cluster.lab(), "--scratch DIR, or set $SCRATCH")


# --- submitting ---------------------------------------------------------------


def test_submit_calls_sbatch_and_prints_the_job(cluster):
    result = cluster.lab("--submit")
    assert result.rc == 0 and "submitted: job 4711;" in result.out and "next: sbatch" not in result.out
    assert cluster.called("sbatch") == [f"--parsable {cluster.folder / 'array.sbatch'}"]
    assert (cluster.fakes / "submitted").read_text() == (cluster.folder / "array.sbatch").read_text()


def test_submit_where_sbatch_refuses_is_one_line_and_the_script_stays(cluster):
    cluster.fake("sbatch", 'echo "sbatch: error: invalid account" >&2; echo "or partition" >&2; exit 1')
    result = cluster.lab("--submit")
    assert result.rc == 3
    assert_refused(result, "array.sbatch was written", "sbatch: error: invalid account or partition")
    assert (cluster.folder / "array.sbatch").exists()


def test_submit_without_sbatch_is_one_line_and_nothing_is_written(cluster, tmp_path):
    for name in ("git", "uv"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    cluster.env["PATH"] = str(tmp_path / "bin")
    assert_refused(cluster.lab("--submit"), "there is no sbatch here")
    assert not any(cluster.scratch.iterdir())


# --- a task -------------------------------------------------------------------


@pytest.mark.slow
def test_a_task_is_preempted_comes_back_and_goes_on_until_the_hours_are_over(cluster, isolated):
    (cluster.repo.path / "other.md").write_text("Tune the optimizer.\n")
    agent = AGENT + """; : "it's" '$(touch ../marker)' \\` $PWD"""
    script = cluster.write("--programs", "program.md", "other.md", agent=agent)
    first = cluster.start(script, 1)
    cluster.until_at_work(first, 1)
    tree, head = cluster.tree(1), cluster.git("rev-parse HEAD", cluster.tree(1))
    assert cluster.git("branch --show-current", tree) == "autoresearch/nov21-1"
    assert cluster.git("log --format=%s", tree).splitlines() == ["task 1: other.md", "start"]
    assert (tree / "program.md").read_text() == "Tune the optimizer.\n" and not cluster.git("diff HEAD --stat", tree)
    assert f"agent: {agent}\n" in (tree / "night.log").read_text(), "the agent's command came through word for word"
    deadline = next(tree.parent.glob("deadline-*"))
    assert deadline.name == "deadline-499" and abs(int(deadline.read_text()) - time.time() - 3600) < 60

    seen, work = cluster.seen(1), tree.parent
    writable = [value for key, value in seen.items() if re.fullmatch(
        r"HOME|XDG_\w+|UV_CACHE_DIR|MPLCONFIGDIR|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|CUDA_CACHE_PATH", key)]  # fmt: skip
    assert len(writable) == 10 and all(Path(value).is_relative_to(work) for value in writable), writable
    assert seen["REAL_HOME"] == str(isolated) and seen["AUTORESEARCH_CACHE"] == str(cluster.data)
    assert seen["UV_OFFLINE"] == seen["HF_HUB_OFFLINE"] == seen["UV_NO_SYNC"] == "1"
    assert seen["UV_PROJECT_ENVIRONMENT"] == sys.prefix and seen["AUTORESEARCH_DATASET"] == "stdlib"

    rc, out = cluster.end(first, "RUNNING", everybody=False)  # the batch shell alone, as --signal=B: does
    assert rc == 143 and "back into the queue" in out and cluster.called("scontrol") == ["requeue 500"]
    assert "the night ended by SIGTERM" in (tree / "night.log").read_text()
    assert not [e for e in Path("/proc").iterdir() if e.name.isdigit() and in_tree(e, tree)], "nothing is left running"

    before = deadline.read_text()
    second = cluster.start(script, 1, SLURM_RESTART_COUNT="1")
    cluster.until_at_work(second, 1)
    assert cluster.git("rev-parse HEAD", tree) == head and deadline.read_text() == before
    assert cluster.end(second)[0] == 143
    assert len(cluster.called("scontrol")) == 1, "a task that Slurm requeues or cancels does not requeue itself"

    deadline.write_text(f"{int(time.time())}\n")
    out, _ = (third := cluster.start(script, 1, SLURM_RESTART_COUNT="2")).communicate(timeout=30)
    assert third.returncode == 0 and "the hours are over" in out and len(cluster.recorded(1)) == 2
    assert not (tree.parent / "marker").exists() and not any(isolated.iterdir()), (
        "something was written to the user's home"
    )


def in_tree(entry, tree):
    try:
        return Path(os.readlink(entry / "cwd")) == tree
    except OSError:
        return False


def test_a_night_that_ends_by_itself_ends_the_task_with_its_status(cluster):
    script = cluster.write(hours=0.0005, agent="true")
    out, _ = (process := cluster.start(script)).communicate(timeout=60)
    assert process.returncode == 1 and "nothing recorded" in out, out
    assert "next: the baseline has not run" in out, "the log ends with where the night stands"
    assert cluster.called("scontrol") == []


def test_a_clone_that_was_cut_short_is_made_again(cluster):
    cut = cluster.folder / "0" / "new-17"
    (cut / ".git").mkdir(parents=True)
    script = cluster.write()
    cluster.fake("git", f'PATH="{os.environ["PATH"]}"; case "$*" in *switch*) kill -9 $PPID;; esac; exec git "$@"')
    process = cluster.start(script)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL and not cluster.tree().exists(), "only a whole tree is moved in"
    (cluster.fakes / "git").unlink()
    again = cluster.start(script, SLURM_RESTART_COUNT="1")
    cluster.until_at_work(again)
    assert not list(cluster.tree().parent.glob("new-*"))
    assert cluster.git("branch --show-current", cluster.tree()) == "autoresearch/nov21-0"


@pytest.fixture
def signing(tmp_path):
    """Settings of a person who signs commits, where nobody can type the passphrase."""
    (tmp_path / "gitconfig").write_text("[commit]\n\tgpgsign = true\n[gpg]\n\tprogram = false\n")
    return {"GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig")}


def test_a_task_commits_its_program_without_a_signature(cluster, signing):
    (cluster.repo.path / "other.md").write_text("Tune the optimizer.\n")
    script = cluster.write("--programs", "program.md", "other.md")
    cluster.until_at_work(process := cluster.start(script, 1, **signing), 1)
    assert cluster.git("log -1 --format=%s", cluster.tree(1)) == "task 1: other.md"
    cluster.end(process)


@pytest.fixture
def settings(cluster):
    """An agent's settings in the checkout, untracked: {path: text}; and a working tree that Claude Code made there. .claude
    is a link to the user's own settings, which change while tar reads them."""
    (cluster.repo.path.parent / "own" / "claude").mkdir(parents=True)
    (cluster.repo.path / ".claude").symlink_to("../own/claude")
    cluster.fake("tar", f'{shutil.which("tar")} "$@" || exit; case "$*" in *-cf*) exit 1;; esac')
    made = {".codex/rules/own.rules": "RUNS = uv run train.py\n", ".claude/settings.json": '"Bash(uv run train.py)"\n',
            ".agents/skills/SKILL.md": "a skill\n"}  # fmt: skip
    for name, text in {**made, ".claude/worktrees/one/train.py": "another tree\n"}.items():
        (cluster.repo.path / name).parent.mkdir(parents=True, exist_ok=True)
        (cluster.repo.path / name).write_text(text)
    return made


def test_a_task_has_the_agents_settings_of_the_checkout(cluster, settings):
    cluster.until_at_work(process := cluster.start(cluster.write()))
    tree = cluster.tree()
    assert {name: (tree / name).read_text() for name in settings} == settings
    assert not (tree / ".claude" / "worktrees").exists()
    cluster.end(process)


def test_two_jobs_do_not_work_in_one_tree(cluster):
    script = cluster.write()
    work = cluster.folder / "0"
    work.mkdir()
    (work / "job").write_text("77\n")
    (cluster.fakes / "state").write_text("77\n")
    out, _ = (process := cluster.start(script)).communicate(timeout=30)
    assert process.returncode == 1 and "job 77 is running in" in out and (work / "job").read_text() == "77\n"
    (cluster.fakes / "state").unlink()  # the job is over
    process = cluster.start(script)
    cluster.until_at_work(process)
    assert (work / "job").read_text() == "500\n"


def test_a_tree_on_another_branch_is_not_touched(cluster):
    script = cluster.write()
    cluster.until_at_work(process := cluster.start(script))
    cluster.end(process)
    cluster.git("switch -q main", cluster.tree())
    out, _ = (process := cluster.start(script)).communicate(timeout=30)
    assert process.returncode == 1 and "is on main: git switch autoresearch/nov21-0" in out


@pytest.mark.parametrize("group, mode", [([], 0o700), (["--group-readable"], 0o750)], ids=["private", "group"])
def test_who_may_read_the_results(cluster, group, mode):
    cluster.until_at_work(process := cluster.start(cluster.write(*group)))
    cluster.end(process)

    def rights(path):
        return stat.S_IMODE(path.stat().st_mode)

    assert rights(cluster.folder) == rights(cluster.folder / "logs") == rights(cluster.tree()) == mode
    assert rights(cluster.tree() / "runs.jsonl") == (0o640 if group else 0o600)
    assert rights(cluster.tree().parent / "home") == 0o700, "logins and transcripts of agents are nobody else's"


def test_data_are_copied_to_the_node_and_removed_with_the_task(cluster, tmp_path):
    (tmp_path / "local").mkdir()
    script = cluster.write("--copy-data")
    cluster.until_at_work(process := cluster.start(script, TMPDIR=str(tmp_path / "local")))
    local = Path(cluster.seen()["AUTORESEARCH_CACHE"])
    assert local == tmp_path / "local" / "autoresearch-500"
    (here,), (there,) = local.rglob("manifest.json"), cluster.data.rglob("manifest.json")
    assert here.relative_to(local) == there.relative_to(cluster.data) and here.read_bytes() == there.read_bytes()
    assert not list(local.rglob("raw")), "what was downloaded is not read by a run"
    cluster.end(process)
    assert not local.exists()


def test_data_that_a_killed_task_copied_in_part_are_copied_anew(cluster, tmp_path):
    """A requeued job may start on the same node again, with the same id."""
    prepared = next(cluster.data.rglob("manifest.json")).parent
    (left := tmp_path / "autoresearch-500" / prepared.relative_to(cluster.data)).mkdir(parents=True)
    (left / "manifest.json").write_text("cut sho")
    script = cluster.write("--copy-data")
    cluster.until_at_work(process := cluster.start(script, TMPDIR=str(tmp_path)))
    assert {path.name for path in left.iterdir()} == {path.name for path in prepared.iterdir()}
    assert (left / "manifest.json").read_bytes() == (prepared / "manifest.json").read_bytes()
    cluster.end(process)


@pytest.mark.slow
def test_a_node_without_room_for_the_data_reads_them_where_they_are(cluster, tmp_path):
    script = cluster.write("--copy-data")
    cluster.fake("cp", 'case "$*" in *-R*) echo "cp: no space" >&2; exit 1;; esac; exec /bin/cp "$@"')
    cluster.until_at_work(process := cluster.start(script, TMPDIR=str(tmp_path)))
    assert cluster.seen()["AUTORESEARCH_CACHE"] == str(cluster.data)
    assert "the data do not fit" in cluster.end(process)[1]


def test_in_a_container_the_night_sees_its_work_directory_and_the_data_read_only(cluster):
    (cluster.repo.path.parent / "plain").mkdir()
    cluster.scratch = cluster.repo.path.parent / "plain"  # Apptainer takes no odd characters in a path
    cluster.env["SCRATCH"] = str(cluster.scratch)
    script = cluster.write("--container", "library://lab/autoresearch:1")
    cluster.until_at_work(process := cluster.start(script))
    called, work = cluster.called("apptainer"), cluster.folder / "0"
    assert called[:2] == ["exec", "--nv"] and called[called.index("--home") + 1] == str(work / "home")
    assert [called[i + 1] for i, word in enumerate(called) if word == "--bind"] == [
        work.as_posix(),
        f"{cluster.data}:{cluster.data}:ro",
    ]
    assert called[called.index("--pwd") + 1] == str(work / "tree")
    image = called.index("library://lab/autoresearch:1")
    assert called[image + 1 : image + 5] == ["python", "-m", "lab", "night"]
    assert "UV_PROJECT_ENVIRONMENT" not in cluster.seen(), "the image has an environment of its own"
    assert cluster.end(process)[0] == 143
    for name in ("apptainer", "singularity"):
        (cluster.fakes / name).unlink(missing_ok=True)
    if not shutil.which("apptainer") and not shutil.which("singularity"):
        out, _ = (process := cluster.start(script)).communicate(timeout=30)
        assert process.returncode == 1 and "there is no apptainer on this node" in out


def test_an_array_begins_from_the_best_of_an_earlier_night_whose_baseline_it_then_is(cluster):
    from lab.store.repository import Repo

    old = cluster.scratch / "old"
    (old / "runs" / "best").mkdir(parents=True)
    best = (cluster.repo.path / "train.py").read_text() + "# better\n"
    (old / "runs" / "best" / "train.py").write_text(best)
    cluster.until_at_work(process := cluster.start(cluster.write("--from", str(old))))
    tree = cluster.tree()
    assert cluster.git("show HEAD:train.py", tree) == best.strip() and str(old) in cluster.git(
        "log -1 --format=%s", tree
    )
    assert Repo(tree).own_edits("nov21-0") == [], "lab record would ask for the baseline without this edit"
    cluster.end(process)
    assert json.loads(cluster.recorded()[0]) == {}


# --- a night on the login node --------------------------------------------------

# jobs: one file for each job that exists, with the options it was asked for by. srun prints the job that it was given.
OF_A_LOGIN_NODE = {
    "sinfo": "",
    "sleep": "exec /bin/sleep 0.01",
    "salloc": 'n=$(($(cat "$FAKES/granted" 2> /dev/null || echo 100) + 1)); echo $n > "$FAKES/granted"; mkdir -p "$FAKES/jobs"; '
    'echo "$*" >> "$FAKES/salloc.called"; echo "$*" > "$FAKES/jobs/$n"; echo "salloc: Granted job allocation $n" >&2',
    "squeue": 'for job in "$FAKES"/jobs/*; do [ -e "$job" ] || continue; job=${job##*/}; case "$*" in *--jobs=$job\\ *|*--user*) echo "$job";; esac; done',
    "scancel": 'for job in $(grep -l -e "--job-name ${2#--name=} " "$FAKES"/jobs/*); do rm "$job"; done; exit 1',
    "srun": 'echo "$*" >> "$FAKES/srun.called"; echo "val_bpb: 1.0"',
    "uv": 'shift; case "$1" in *.sh) PATH=${REAL_PYTHON%/*}:$PATH exec "$@";; esac; exec "$REAL_PYTHON" "$@"',
}


@pytest.fixture
def login_night(cluster):
    """Starts login-night.sh with an agent, a shell command."""
    for name in ("deploy", "agents"):
        shutil.copytree(ROOT / name, cluster.repo.path / name)
    cluster.git("add -A")
    cluster.git("commit -q -m deploy")
    for name, body in OF_A_LOGIN_NODE.items():
        cluster.fake(name, body)

    def start(agent, **env):
        process = subprocess.Popen(
            ["deploy/slurm/login-night.sh", "nov21", "1", agent], cwd=cluster.repo.path, env=cluster.env | env, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        cluster.started.append(process)
        return process

    return start


def test_a_lost_allocation_is_replaced_and_the_next_training_uses_the_new_one(cluster, login_night):
    train = "uv run deploy/slurm/train-under-srun.sh > run.log 2>&1 || echo failed >> failed"
    process = login_night(f'{train}; rm "$FAKES"/jobs/*; {train}; echo {{}} >> runs.jsonl; exec /bin/sleep 100')
    cluster.until_at_work(process, "login")
    assert [re.search(r"--jobid=(\d+)", line)[1] for line in cluster.called("srun")] == ["101", "102"]
    assert not (cluster.tree("login") / "failed").exists()
    first, second = (int(re.search(r"--time (\d+)", line)[1]) for line in cluster.called("salloc"))
    assert first == 85 and 0 < second <= first, "the new one is for the rest of the night"
    out = cluster.end(process)[1]
    assert not any((cluster.fakes / "jobs").iterdir()) and "job 101 is lost" in out
    assert [path.name for path in cluster.tree("login").parent.iterdir()] == ["tree"], "the file with the job's id is gone"


def test_a_job_that_was_granted_as_the_night_ends_is_cancelled_too(cluster, login_night):
    """salloc has not told its id yet. A job of the same user and TAG, an array's, goes on."""
    told = OF_A_LOGIN_NODE["salloc"].replace('; echo "salloc:', '; [ "$n" = 101 ] || exec /bin/sleep 1000; echo "salloc:')
    cluster.fake("salloc", told)
    process = login_night('rm "$FAKES"/jobs/*; echo {} >> runs.jsonl; exec /bin/sleep 100')
    cluster.until_at_work(process, "login")
    cluster.until((cluster.fakes / "jobs" / "102").exists, process)
    (cluster.fakes / "jobs" / "7").write_text("--job-name autoresearch-nov21 --array 0-3\n")
    cluster.end(process)
    assert [path.name for path in (cluster.fakes / "jobs").iterdir()] == ["7"]
    assert [path.name for path in cluster.tree("login").parent.iterdir()] == ["tree"], "though scancel fails"


def test_no_job_is_allocated_for_a_night_whose_script_was_killed(cluster, login_night):
    """Not even the one that the script was waiting for."""
    late = OF_A_LOGIN_NODE["salloc"].replace("n=$", 'while [ -e "$FAKES/jobs" ] && [ ! -e "$FAKES/now" ]; do sleep; done; n=$', 1)
    cluster.fake("salloc", late)
    process = login_night('rm "$FAKES"/jobs/*; echo {} >> runs.jsonl; exec /bin/sleep 100')
    cluster.until_at_work(process, "login")
    process.kill()
    process.wait()
    (cluster.fakes / "now").touch()
    deadline = time.monotonic() + 30
    while in_progress := [e for e in Path("/proc").iterdir() if e.name.isdigit() and is_script(e, cluster.tree("login"))]:
        assert time.monotonic() < deadline, f"{in_progress} goes on without the night"
        time.sleep(0.05)
    assert not any((cluster.fakes / "jobs").iterdir())


def is_script(entry, tree):
    try:
        return in_tree(entry, tree) and b"login-night.sh" in (entry / "cmdline").read_bytes()
    except OSError:
        return False


def test_a_training_that_gets_no_allocation_is_no_result(cluster, login_night):
    train = "uv run deploy/slurm/train-under-srun.sh > run.log 2>&1; echo $? > status"
    waiting = 'touch "$FAKES/asked"; exec /bin/sleep 1000'  # in the queue
    cluster.fake("salloc", f'[ -e "$FAKES/jobs" ] && {{ {waiting}; }}; {OF_A_LOGIN_NODE["salloc"]}')
    agent = f'rm "$FAKES"/jobs/*; {train}; echo {{}} >> runs.jsonl; exec /bin/sleep 100'
    process = login_night(agent, SRUN_JOB_WAIT="1")
    cluster.until_at_work(process, "login")
    assert (cluster.tree("login") / "status").read_text() == "75\n" and not cluster.called("srun")
    log = (cluster.tree("login") / "run.log").read_text()
    assert "the allocation is lost" in log and log.endswith("\npreempted\n")
    cluster.until((cluster.fakes / "asked").exists, process)
    cluster.end(process)  # waits until nothing holds its output: a salloc left behind would be granted a job for nobody


@pytest.mark.slow
def test_a_slurm_that_does_not_answer_makes_no_training_wait_longer(cluster, login_night):
    """With the 10 minutes that it may wait, an agent's command would reach its time limit."""
    cluster.fake("squeue", 'case "$*" in *--jobs*) echo >> "$FAKES/squeue.called"; exec /bin/sleep 1000;; esac')
    cluster.fake("timeout", f'[ "$1" = 20 ] && shift && exec {shutil.which("timeout")} 2 "$@"')
    train = "uv run deploy/slurm/train-under-srun.sh > run.log 2>&1; echo $? > status"
    process = login_night(f"{train}; echo {{}} >> runs.jsonl; exec /bin/sleep 100", SRUN_JOB_WAIT="1")
    cluster.until_at_work(process, "login")
    assert (cluster.tree("login") / "status").read_text() == "75\n" and len(cluster.called("squeue")) == 1
    cluster.end(process)


def test_a_login_night_commits_the_run_command_without_a_signature(cluster, login_night, signing):
    process = login_night("echo {} >> runs.jsonl; exec /bin/sleep 100", **signing)
    cluster.until_at_work(process, "login")
    assert cluster.git("log -1 --format=%s", cluster.tree("login")) == "runs go to a compute node"
    cluster.end(process)


def test_a_login_night_has_the_agents_settings_with_its_own_run_command(cluster, login_night, settings):
    process = login_night("echo {} >> runs.jsonl; exec /bin/sleep 100")
    cluster.until_at_work(process, "login")
    tree, train = cluster.tree("login"), "uv run deploy/slurm/train-under-srun.sh"
    assert {name: (tree / name).read_text() for name in settings} == {
        name: text.replace("uv run train.py", train) for name, text in settings.items()
    }
    assert {name: (cluster.repo.path / name).read_text() for name in settings} == settings, "the user's own are as they were"
    for name in ("program.md", "agents/claude.json", "agents/codex/rules/autoresearch.rules"):
        text = (tree / name).read_text()
        assert train in text and "uv run train.py" not in text
    cluster.end(process)
