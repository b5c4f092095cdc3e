"""lab fleet: several nights on one machine, each in a tree and on a branch of its own, and nothing lost on the way.

Git is real. tmux is a script that writes down what it was asked, where the logic is what counts; the slow tests have
the real one, two agents at once, and a slot that is killed.
"""

import copy
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_repo
from fakenight import FakeNight
from killed import NEVER, TRAIN_PY, agent_command, kill_all, processes_in, tools

from lab.base import locks, processes
from lab.base.errors import Refused
from lab.fleet import bring_home, slot_processes, tmux
from lab.machine import devices
from lab.share.membership import team_name
from lab.store.repository import Repo

AGENT = 'claude -p "it\'s $HOME"'
SERVER_SAYS = """#!/bin/sh
# What tmux was asked for; its windows end at once.
echo "$*" >> {place}/asked
case "$*" in *new-*) for last; do :; done; echo "$last" >> {place}/commands ;; esac
"""


class Fleet(FakeNight):
    """A checkout on main, beside which slots grow."""

    def __init__(self, place):
        super().__init__(place / "repo", branch=None)
        self.place = place
        (self.path / "train.py").write_text(TRAIN_PY)
        (self.path / "programs").mkdir()
        (self.path / "programs" / "wild.md").write_text("# be wild\n")
        (self.path / "programs" / "tame.md").write_text("# be tame\n")
        self.git("add", ".")
        self.git("commit", "-q", "-m", "a night's beginning")
        self.git("config", "user.name", "Some One")
        self.git("config", "user.email", "one@example.org")
        self.env = self.env | tools(place / "tools") | {"AUTORESEARCH_CACHE": str(place / "cache")}
        (place / "cache").mkdir()
        (place / "cache" / "data").write_text("tokens")

    def fake_tmux(self):
        (self.place / "tools" / "bin" / "tmux").write_text(SERVER_SAYS.format(place=self.place))
        (self.place / "tools" / "bin" / "tmux").chmod(0o755)
        self.env["PATH"] = str(self.place / "tools" / "bin") + ":" + os.environ["PATH"]

    def no_tmux(self):
        """A PATH on which there is everything that is needed but tmux."""
        folder = self.place / "bin"
        folder.mkdir()
        for name in ("sh", "env", "git", "cat", "sleep", "wc", "taskset"):
            if found := shutil.which(name):
                (folder / name).symlink_to(found)
        self.env["PATH"] = f"{self.place / 'tools' / 'bin'}:{folder}"

    def fleet(self, *args, **kwargs):
        return self.lab("fleet", *args, **kwargs)

    def launch(self, *args, tag="nov21", slots=2, agent="true", **kwargs):
        return self.fleet("launch", tag, "--slots", str(slots), "--agent", agent, *args, **kwargs)

    def tree(self, k, tag="nov21"):
        return self.place / f"repo-{tag}-gpu{k}"

    def state_of_fleet(self, tag="nov21"):
        return json.loads((self.path / ".lab" / "fleet" / f"{tag}.json").read_text())

    def everything(self):
        """What a refusal must not change."""
        trees = sorted(p.name for p in self.place.iterdir())
        fleets = sorted(p.name for p in (self.path / ".lab").rglob("*") if p.is_file() and p.name != "lock")
        return trees, fleets, self.git("for-each-ref"), self.git("worktree", "list"), self.git("status", "--porcelain")

    def night_in(self, k, tag="nov21"):
        """A FakeNight in the slot's tree."""
        night = FakeNight.__new__(FakeNight)
        night.path, night.env, night.who, night.ideas = self.tree(k, tag), self.env, self.who, 10 * k
        return night


@pytest.fixture
def fleet(tmp_path):
    fleet = Fleet(tmp_path)
    yield fleet
    kill_all(*tmp_path.glob("repo*"), *(p for p in tmp_path.glob("elsewhere/*")))


def one_line(result, *needles, rc=1):
    assert result.rc == rc and result.out == "" and len(result.err.splitlines()) == 1, result
    for needle in needles:
        assert needle in result.err, result.err
    return result.err


# --- launch: what is made -----------------------------------------------------


def test_without_tmux_the_trees_are_made_and_the_commands_printed(fleet):
    fleet.no_tmux()
    result = fleet.launch("--hours", "3", agent=AGENT, CUDA_VISIBLE_DEVICES="4,7")
    assert result.rc == 0 and result.err == "", result.err
    commands = [line for line in result.out.splitlines() if line.startswith("cd ")]
    assert len(commands) == 2
    for k, command in enumerate(commands):
        words = shlex.split(command)
        assert words[:4] == ["cd", str(fleet.tree(k)), "&&", "env"]
        assert f"CUDA_VISIBLE_DEVICES={[4, 7][k]}" in words
        assert f"AUTORESEARCH_CACHE={fleet.place / 'cache'}" in words and "UV_NO_SYNC=1" in words
        assert words[words.index("uv") :] == ["uv", "run", "-m", "lab", "night", "--hours", "3", "--agent", AGENT]
        tree = fleet.tree(k)
        assert fleet.git("-C", str(tree), "branch", "--show-current") == f"autoresearch/nov21-gpu{k}"
        assert fleet.git("-C", str(tree), "status", "--porcelain") == ""
        assert fleet.git("-C", str(tree), "rev-parse", "HEAD") == fleet.head()
        assert os.path.realpath(tree / ".venv") == os.path.realpath(sys.prefix)
    assert fleet.git("status", "--porcelain") == "" and fleet.git("branch", "--show-current") == "main"


@pytest.mark.slow
def test_each_slot_has_its_own_program_in_a_commit_that_outlives_the_tree(fleet):
    fleet.no_tmux()
    result = fleet.launch("--programs", "programs/wild.md", "programs/tame.md", slots=3, CUDA_VISIBLE_DEVICES="0,1,2")
    assert result.rc == 0, result.err
    texts = [(fleet.tree(k) / "program.md").read_text() for k in range(3)]
    assert texts == ["# be wild\n", "# be tame\n", "# be wild\n"]
    assert (fleet.path / "program.md").read_text() == "# program\n"
    for k in range(3):
        at = str(fleet.tree(k))
        assert fleet.git("-C", at, "status", "--porcelain") == ""
        assert fleet.git("-C", at, "log", "-1", "--format=%s %an") == (
            f"program of this slot: programs/{['wild', 'tame', 'wild'][k]}.md Some One"
        )
        assert fleet.git("-C", at, "show", "--name-only", "--format=", "HEAD") == "program.md"
    night = fleet.night_in(1)
    night.baseline()
    night.experiment("wider", 0.99)
    assert [row[3] for row in night.rows()] == ["keep", "keep"]
    night.experiment("narrower", 1.02)
    assert night.read("program.md") == "# be tame\n"


def test_one_agent_feeds_workers_in_every_slot(fleet):
    """--agents 1: every GPU gets a worker, the agent none; --agents 0: an agent elsewhere feeds them."""
    fleet.no_tmux()
    one_line(fleet.launch("--agents", "3"), "--agents must be 0 to 2")
    (fleet.path / "programs" / "team.md").write_text("# feed them\n")
    fleet.commit("team", "programs/team.md")
    result = fleet.launch("--agents", "1", agent=AGENT, CUDA_VISIBLE_DEVICES="4,7")
    assert result.rc == 0, result.err
    words = [shlex.split(command) for command in commands_of(result)]
    assert [w[w.index("lab") + 1] for w in words] == ["work", "work", "night"]
    assert [next(x for x in w if x.startswith("CUDA_VISIBLE")) for w in words] == [
        "CUDA_VISIBLE_DEVICES=4", "CUDA_VISIBLE_DEVICES=7", "CUDA_VISIBLE_DEVICES="]  # fmt: skip
    feeder = fleet.place / "repo-nov21-agent0"
    assert (feeder / "program.md").read_text() == "# feed them\n" and (fleet.tree(0) / "program.md").read_text() == "# program\n"
    assert fleet.git("config", "autoresearch.team") == "nov21"
    assert fleet.git("-C", str(feeder), "branch", "--show-current") == "autoresearch/nov21-agent0"
    assert fleet.launch("--agents", "1", agent=AGENT, CUDA_VISIBLE_DEVICES="4,7").rc == 0
    one_line(fleet.launch("--agents", "0", agent=AGENT, CUDA_VISIBLE_DEVICES="4,7"), "was launched with --agents 1")
    assert fleet.fleet("clean", "nov21").rc == 0 and not feeder.exists()
    result = fleet.fleet("launch", "nov22", "--slots", "2", "--agents", "0", CUDA_VISIBLE_DEVICES="4,7")
    assert [shlex.split(command)[-3] for command in commands_of(result)] == ["work", "work"], result.err
    assert fleet.git("config", "autoresearch.team") == "nov22"


def test_a_fleet_without_a_team_is_independent_nights(fleet):
    fleet.no_tmux()
    fleet.git("config", "autoresearch.team", "of-an-earlier-fleet")
    result = fleet.launch("--no-team", "--agents", "1", agent=AGENT, CUDA_VISIBLE_DEVICES="4,7")
    one_line(result, "--no-team needs an agent in each slot")
    assert fleet.git("config", "autoresearch.team") == "of-an-earlier-fleet"
    assert fleet.launch("--no-team", agent=AGENT, CUDA_VISIBLE_DEVICES="4,7").rc == 0
    assert "autoresearch.team" not in fleet.git("config", "--list", "--name-only")
    assert fleet.launch(agent=AGENT, CUDA_VISIBLE_DEVICES="4,7").rc == 0, "resumed as it was launched"
    assert "autoresearch.team" not in fleet.git("config", "--list", "--name-only")
    team = fleet.fleet("launch", "nov22", "--slots", "2", "--agent", AGENT, CUDA_VISIBLE_DEVICES="4,7")
    assert team.rc == 0 and fleet.git("config", "autoresearch.team") == "nov22"
    one_line(fleet.fleet("launch", "nov22", "--no-team", CUDA_VISIBLE_DEVICES="4,7"), "was launched with --no-team False")


def test_where_git_knows_no_name_a_program_is_committed_all_the_same(fleet):
    fleet.no_tmux()
    for key in ("user.name", "user.email"):
        fleet.git("config", "--unset", key)
    env = {"EMAIL": "", "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "user.useConfigOnly", "GIT_CONFIG_VALUE_0": "true"}
    result = fleet.launch("--programs", "programs/wild.md", CUDA_VISIBLE_DEVICES="0,1", **env)
    assert result.rc == 0, result.err
    assert fleet.git("log", "-1", "--format=%an", "autoresearch/nov21-gpu0") == "autoresearch"


def test_windows_are_opened_on_a_server_that_is_the_fleets_own(fleet):
    fleet.fake_tmux()
    result = fleet.launch(CUDA_VISIBLE_DEVICES="0,1", timeout=120)
    commands = (fleet.place / "commands").read_text().splitlines()
    asked = (fleet.place / "asked").read_text()
    assert len(commands) == 2 and all("lab night" in command for command in commands)
    names = {line.split()[1] for line in asked.splitlines()}
    assert names == {tmux.server(fleet.path, "nov21")} and all("-f /dev/null" in line for line in asked.splitlines())
    assert "kill" not in asked
    assert result.rc == 3 and "slot 0 did not start" in result.err  # as nothing came up in the faked windows


# --- launch: what is refused ----------------------------------------------------


@pytest.mark.parametrize(
    "prepare, args, needle",
    [
        ("git branch autoresearch/nov21-gpu1", {}, "the branch autoresearch/nov21-gpu1 exists"),
        ("git update-ref refs/autoresearch/nov21-gpu0/0001 HEAD", {}, "holds experiments of an earlier night"),
        ("mkdir -p ../repo-nov21-gpu1/x", {}, "repo-nov21-gpu1 exists"),
        ("echo x >> train.py", {}, "train.py has uncommitted changes"),
        ("git switch -q --detach", {}, "HEAD is detached"),
        ("true", {"tag": "no..name"}, "cannot name a fleet"),
        ("true", {"tag": "two words"}, "cannot name a fleet"),
        ("true", {"tag": "exp/a"}, "cannot name a fleet"),
        ("true", {"tag": "_x"}, "cannot name a fleet"),
        ("true", {"tag": "ä1"}, "cannot name a fleet"),
        ("true", {"tag": "x" * 64}, "cannot name a fleet"),
        ("true", {"slots": 3}, "3 slots and 2 GPUs (CUDA_VISIBLE_DEVICES=0,1)"),
        ("true", {"slots": 0}, "--slots"),
        ("true", {"more": ["--programs", "programs/none.md"]}, "programs/none.md: No such file"),
        ("true", {"more": ["--programs", *["programs/wild.md"] * 3]}, "3 programs for 2 slots"),
        ("true", {"more": ["--hours", "0"]}, "--hours must be above 0"),
        ("rm -r .git", {}, "not in a git checkout"),
    ],
)
def test_what_cannot_be_launched_is_one_line_and_nothing_is_made(fleet, prepare, args, needle):
    fleet.no_tmux()
    subprocess.run(["sh", "-c", prepare], cwd=fleet.path, check=True)
    is_git = (fleet.path / ".git").exists()
    before = is_git and (fleet.everything(), fleet.git("config", "--list"))
    more = args.pop("more", [])
    one_line(fleet.launch(*more, CUDA_VISIBLE_DEVICES="0,1", **args), needle)
    assert not is_git or (fleet.everything(), fleet.git("config", "--list")) == before


def test_a_tag_is_accepted_up_to_the_longest_and_oddest_that_a_team_can_have(fleet):
    fleet.no_tmux()
    for tag in ("x" * 63, "9_nov.21-"):
        assert fleet.launch(tag=tag, slots=1, CUDA_VISIBLE_DEVICES="0").rc == 0
        assert team_name(Repo(fleet.tree(0, tag)))


def test_without_a_team_a_tag_need_be_no_name_of_one(fleet):
    fleet.no_tmux()
    result = fleet.launch("--no-team", agent=AGENT, tag="_" + "x" * 64, slots=1, CUDA_VISIBLE_DEVICES="0")
    assert result.rc == 0, result.err
    one_line(fleet.launch("--no-team", agent=AGENT, tag="no..name", CUDA_VISIBLE_DEVICES="0,1"), "cannot name a fleet")


def test_a_disk_that_is_nearly_full_is_refused_before_anything_is_made(fleet, monkeypatch):
    from lab.fleet import worktrees

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 15 * 10**8))
    with pytest.raises(Refused, match=r"1\.5 GB free, and each slot needs 1 GB"):
        worktrees.check_room(fleet.place / "not" / "there", 2)
    worktrees.check_room(fleet.place, 1)


def test_a_disk_that_fills_while_a_tree_is_made_loses_nothing_and_is_completed_later(fleet, own_mounts):
    (fleet.path / "large").write_bytes(os.urandom(300_000))
    fleet.commit("a large file", "large")
    fleet.no_tmux()
    (fleet.place / "elsewhere").mkdir()
    code = "from lab import __main__; from lab.fleet import worktrees; worktrees.FREE_PER_SLOT = 0; raise SystemExit(__main__.main())"
    launch = [sys.executable, "-c", code, "fleet", "launch", "nov21", "--slots", "2", "--agent", "true"]
    launch = f"PATH={fleet.env['PATH']} {shlex.join(launch)} --folder {fleet.place}/elsewhere"
    script = f"""
        mount -t tmpfs -o size=400k none {fleet.place}/elsewhere
        cd {fleet.path}; {launch}; echo first $?
        mount -o remount,size=4m {fleet.place}/elsewhere
        {launch}; echo second $?
        ls {fleet.place}/elsewhere/*/large
    """
    env = fleet.env | {"CUDA_VISIBLE_DEVICES": "0,1", "PATH": os.environ["PATH"]}
    done = subprocess.run([*own_mounts, "sh", "-c", script], env=env, capture_output=True, text=True)
    assert "first 3" in done.stdout and "second 0" in done.stdout, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and "the same command completes it" in done.stderr
    assert done.stdout.count("/large\n") == 2


def test_what_fleet_is_asked_without_a_fleet_is_one_line(fleet):
    for what in ("status", "stop", "clean"):
        one_line(fleet.fleet(what, "nov21"), "there is no fleet nov21 in this checkout")
    one_line(fleet.fleet("launch", "nov21"), "--slots N and --agent 'COMMAND' are needed")
    assert fleet.fleet("launch").rc == 2


# --- launch, once more ------------------------------------------------------------


@pytest.fixture
def launched(fleet):
    fleet.no_tmux()
    result = fleet.launch(CUDA_VISIBLE_DEVICES="0,1")
    assert result.rc == 0, result.err
    return fleet


def commands_of(result):
    assert result.rc == 0, result.err
    return [line for line in result.out.splitlines() if line.startswith("cd ")]


def hold(path):
    """Holds the lock file as a keeper does; the open file."""
    f = open(path, "a")
    fcntl.flock(f, fcntl.LOCK_EX)
    return f


def test_launched_again_it_starts_the_dead_and_leaves_the_living_alone(launched):
    before = launched.everything()
    assert len(commands_of(launched.launch(CUDA_VISIBLE_DEVICES="5"))) == 2  # the slots keep the GPUs that they had
    with hold(launched.tree(0) / ".lab" / "night.lock"):
        (command,) = commands_of(launched.fleet("launch", "nov21"))
        assert "CUDA_VISIBLE_DEVICES=1" in command and str(launched.tree(1)) in command
        with hold(launched.tree(1) / ".lab" / "night.lock"):
            assert "all 2 slots are running" in launched.fleet("launch", "nov21").out
    assert launched.everything() == before


@pytest.mark.parametrize(
    "args, env, needle",
    [
        (["--slots", "3"], {}, "was launched with --slots 2"),
        (["--agent", "other"], {}, "was launched with --agent true"),
        (["--programs", "programs/wild.md"], {}, "was launched with --programs None"),
        (["--folder", "/tmp"], {}, "was launched with --folder"),
        ([], {"AUTORESEARCH_DATASET": "stdlib"}, "was launched with AUTORESEARCH_DATASET None"),
        ([], {"AUTORESEARCH_CACHE": "/tmp"}, "was launched with AUTORESEARCH_CACHE"),
    ],
)
def test_launched_again_with_other_settings_is_refused(launched, args, env, needle):
    before = launched.everything()
    one_line(launched.fleet("launch", "nov21", *args, **env), needle)
    assert launched.everything() == before


def test_a_launch_that_was_killed_half_way_is_completed(launched):
    """git worktree add was killed: the tree is registered and locked, and holds a part of the files."""
    state = launched.state_of_fleet()
    for slot, step in zip(state["slots"], ["checkout", "folder"], strict=True):
        slot["made"] = False
        tree = Path(slot["folder"])
        (tree / ".venv").unlink()
        (tree / "prepare.py").unlink()
        registered = launched.path / ".git" / "worktrees" / tree.name
        (registered / "locked").write_text("initializing")
        if step == "folder":
            shutil.rmtree(tree)
            tree.mkdir()
            (registered / "index").unlink()
    (launched.path / ".lab" / "fleet" / "nov21.json").write_text(json.dumps(state))
    assert len(commands_of(launched.fleet("launch", "nov21"))) == 2
    for k in range(2):
        night = launched.night_in(k)
        assert night.git("status", "--porcelain") == "" and (night.path / ".venv").is_symlink()
        assert not (launched.path / ".git" / "worktrees" / night.path.name / "locked").exists()
    assert all(slot["made"] for slot in launched.state_of_fleet()["slots"])


def test_an_agent_finds_its_settings_in_every_slot(fleet):
    """git does not carry .codex, and Codex follows no symbolic link."""
    fleet.no_tmux()
    (fleet.path / ".git" / "info" / "exclude").write_text(".codex\n.claude\n")
    (fleet.path / ".codex" / "rules").mkdir(parents=True)
    (fleet.path / ".codex" / "rules" / "one.rules").write_text("allow")
    (fleet.path / ".claude").mkdir()
    (fleet.path / ".claude" / "settings.json").write_text("{}")
    assert fleet.launch().rc == 0
    for k in range(2):
        tree = fleet.tree(k)
        assert (tree / ".codex" / "rules" / "one.rules").read_text() == "allow"
        assert (tree / ".claude" / "settings.json").read_text() == "{}" and not (tree / ".codex").is_symlink()
        assert not (tree / ".agents").exists()
    assert fleet.fleet("clean", "nov21").rc == 0
    kept = fleet.path / "runs" / "nov21-gpu0"
    assert not fleet.tree(0).exists() and (kept / ".codex" / "rules" / "one.rules").read_text() == "allow"


@pytest.mark.parametrize("calls", [3, 12, 20, 27, 33])
def test_a_launch_that_is_killed_at_any_call_of_git_is_completed(fleet, calls):
    fleet.no_tmux()
    tools_of = fleet.place / "tools"
    (tools_of / "limit").write_text(str(calls + 1))
    (tools_of / "how").write_text("before" if calls % 2 else "after")
    launch = [sys.executable, "-m", "lab", "fleet", "launch", "nov21", "--slots", "2", "--agent", "true"]
    launch += ["--programs", "programs/wild.md"]
    env = fleet.env | {"CUDA_VISIBLE_DEVICES": "0,1"}
    process = subprocess.Popen(launch, cwd=fleet.path, env=env, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tools_of / "stopped").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    kill_all(fleet.path)
    (tools_of / "limit").write_text(str(NEVER))
    done = subprocess.run(launch, cwd=fleet.path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for k in range(2):
        night = fleet.night_in(k)
        assert night.git("status", "--porcelain") == "" and night.read("program.md") == "# be wild\n"
        assert night.git("branch", "--show-current") == f"autoresearch/nov21-gpu{k}"
        assert night.chain() == ["program of this slot: programs/wild.md", "a night's beginning", "start"]
    assert fleet.git("status", "--porcelain") == ""


def test_a_tree_that_is_gone_or_on_another_branch_is_named(launched):
    launched.git("-C", str(launched.tree(1)), "switch", "-q", "-c", "mine")
    one_line(launched.fleet("launch", "nov21"), "is on mine: there, git switch autoresearch/nov21-gpu1")
    shutil.rmtree(launched.tree(1))
    one_line(launched.fleet("launch", "nov21"), "repo-nov21-gpu1 is gone")


def test_one_fleet_command_at_a_time(launched):
    with hold(launched.path / ".lab" / "fleet" / "lock"):
        one_line(launched.fleet("stop", "nov21"), "another fleet command is running")
        assert launched.fleet("status", "nov21").rc == 0


# --- status -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A fleet with a night in each slot: three rows in the first, two in the second."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    fleet.no_tmux()
    assert fleet.launch(CUDA_VISIBLE_DEVICES="0,1").rc == 0
    fleet.git("config", "--unset", "autoresearch.team")  # two nights that know nothing of each other
    for k, ideas in enumerate([[("wider", 0.99), ("narrower", 1.02)], [("deeper", 0.98)]]):
        night = fleet.night_in(k)
        night.baseline()
        for idea, value in ideas:
            night.experiment(idea, value)
    return fleet


@pytest.fixture
def nights(template, tmp_path):
    """The same somewhere else: what holds the old place's name gets the new one's."""
    place = tmp_path / "copy"
    shutil.copytree(template.place, place, symlinks=True)
    twin = copy.copy(template)
    twin.place, twin.path = place, place / "repo"
    twin.env = {key: value.replace(str(template.place), str(place)) for key, value in template.env.items()}
    named = [
        *place.glob("repo-*/.git"),
        *place.glob("repo/.git/worktrees/*/gitdir"),
        *place.glob("repo/.lab/fleet/*.json"),
    ]
    for path in [*named, *place.glob("tools/bin/*")]:
        path.write_text(path.read_text().replace(str(template.place), str(place)))
    for tree in place.glob("repo*"):
        twin.git("-C", str(tree), "status", "--short")  # the index knows the files by their old inodes
    yield twin
    kill_all(*place.glob("repo*"))


def test_status_is_one_table_and_one_best(nights):
    with hold(nights.tree(0) / ".lab" / "night.lock"):
        out = nights.fleet("status", "nov21").out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("gpu")}
    assert rows["gpu0"][1:6] == ["nov21-gpu0", "3", "2", "0.990000", "0.010000"] and "running," in rows["gpu0"]
    assert rows["gpu1"][1:6] == ["nov21-gpu1", "2", "2", "0.980000", "0.020000"] and "dead," in rows["gpu1"]
    (best,) = [line for line in out.splitlines() if line.startswith("best: ")]
    assert "0.980000" in best and "gpu1, row 0002" in best and "deeper" in best
    assert "not to be compared" not in out


@pytest.mark.slow
def test_slots_on_different_devices_have_no_common_best(launched):
    for k, device in enumerate(["cuda (A)", "cuda (B)"]):
        night = launched.night_in(k)
        night.run(1.0 - k / 10, device=device)
        night.recorded("baseline")
        for seed in (43, 44):
            night.run(1.0 - k / 10, device=device, seed=seed)
            night.recorded()
    out = launched.fleet("status", "nov21").out
    assert out.count("best of the team: ") == 2 and "not to be compared" in out


# --- stop ---------------------------------------------------------------------------


def start_by_hand(fleet, commands):
    """The printed commands in terminals of their own, as a person would start them."""
    started = [
        subprocess.Popen(["sh", "-c", command], env=fleet.env, stdout=subprocess.DEVNULL, start_new_session=True)
        for command in commands
    ]
    until(lambda: all((fleet.tree(k) / ".lab" / "agent.log").exists() for k in range(len(commands))))
    return started


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def running(pid):
    return processes.is_alive(pid)


def test_stop_ends_what_was_launched_and_nothing_else(fleet):
    fleet.no_tmux()
    agent = "echo up > up; (setsid sleep 611 &); sleep 612"
    commands = commands_of(fleet.launch(agent=agent, CUDA_VISIBLE_DEVICES="0,1"))
    started = start_by_hand(fleet, commands)
    other = subprocess.Popen(["sleep", "613"], cwd=fleet.tree(0), env=fleet.env)  # the human's own, in a slot's tree
    until(lambda: all((fleet.tree(k) / "up").exists() for k in range(2)))
    try:
        assert "gpu0" in fleet.fleet("status", "nov21").out
        one_line(fleet.fleet("clean", "nov21"), "slot 0 is running")
        result = fleet.fleet("stop", "nov21")
        assert result.rc == 0 and "2 slots stopped" in result.out and "killed" not in result.out
        assert all(process.wait(timeout=5) == 143 for process in started)
        assert processes_in(fleet.tree(0), fleet.tree(1)) == [other.pid]
        assert "the night ended by SIGTERM" in (fleet.tree(1) / "night.log").read_text()
        assert "0 slots stopped" in fleet.fleet("stop", "nov21").out
    finally:
        other.kill()
        other.wait()


def test_a_night_that_somebody_else_started_in_a_slots_tree_goes_on(fleet):
    fleet.no_tmux()
    fleet.launch(CUDA_VISIBLE_DEVICES="0,1")
    night = [sys.executable, "-m", "lab", "night", "--agent", "sleep 614"]
    foreign = subprocess.Popen(night, cwd=fleet.tree(0), env=fleet.env, stdout=subprocess.DEVNULL)
    until(lambda: (fleet.tree(0) / ".lab" / "agent.log").exists())
    result = fleet.fleet("stop", "nov21")
    assert "repo-nov21-gpu0: the night there was not started by this fleet" in result.out
    assert foreign.poll() is None
    one_line(fleet.fleet("clean", "nov21"), "slot 0 is running")
    foreign.terminate()
    foreign.wait(timeout=20)


def test_an_agent_that_outlived_its_keeper_is_ended_too(fleet):
    fleet.no_tmux()
    (first, _) = commands_of(fleet.launch(agent="echo up > up; sleep 615", CUDA_VISIBLE_DEVICES="0,1"))
    (started,) = start_by_hand(fleet, [first])
    until((fleet.tree(0) / "up").exists)
    keeper = int((fleet.tree(0) / ".lab" / "night.lock").read_text())
    os.kill(keeper, signal.SIGKILL)
    started.wait(timeout=5)
    assert processes_in(fleet.tree(0))
    one_line(fleet.fleet("clean", "nov21"), "slot 0 is running")
    assert "1 slots stopped" in fleet.fleet("stop", "nov21").out
    assert not processes_in(fleet.tree(0))


# --- clean --------------------------------------------------------------------------


def contents(folder):
    """{relative path: bytes, or where a link points}"""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def inventory(fleet):
    """What clean must bring home of each slot."""
    found = []
    for k in range(2):
        tree = fleet.tree(k)
        (tree / "night.log").write_text(f"a night {k}\n")
        (tree / ".lab" / "agent.log").write_text("many words\n")
        (tree / "notes of the human.txt").write_text("an idea\n")
        files = {name: (tree / name).read_bytes() for name in ("results.tsv", "runs.jsonl", "night.log", "run.log")}
        files |= {name: (tree / name).read_bytes() for name in (".lab/agent.log", "notes of the human.txt")}
        found.append(files | contents(tree / "runs"))
    return found


def check_home(fleet, expected):
    for k in range(2):
        home = fleet.path / "runs" / f"nov21-gpu{k}"
        there = contents(home)
        assert {name: there.get(name) for name in expected[k]} == expected[k]
        assert os.readlink(home / "best").startswith("000")
        assert not fleet.tree(k).exists()
        assert fleet.git("rev-parse", "--verify", f"autoresearch/nov21-gpu{k}")
        assert len(fleet.git("for-each-ref", f"refs/autoresearch/nov21-gpu{k}").splitlines()) == 4 - k, "a ref for each row, and the log"
    assert not list((fleet.path / "runs").glob(".*"))
    assert fleet.git("worktree", "list").count("\n") == 0 and fleet.git("status", "--porcelain") == ""
    assert not (fleet.path / ".lab" / "fleet" / "nov21.json").exists()


def test_clean_brings_every_file_home_and_removes_the_trees(nights):
    expected = inventory(nights)
    result = nights.fleet("clean", "nov21")
    assert result.rc == 0, result.err
    assert "autoresearch/nov21-gpu0: results in runs/nov21-gpu0, working tree removed" in result.out
    check_home(nights, expected)
    # the branch's night is where record and status look for it
    nights.git("switch", "-q", "autoresearch/nov21-gpu1")
    out = nights.lab("status").out
    assert "best: 0.980000" in out and "4 runs recorded" in out
    nights.ideas = 20
    nights.experiment("deeper still", 0.97)
    assert [row[3] for row in nights.rows()] == ["keep", "keep", "keep"]
    nights.git("switch", "-q", "main")
    one_line(nights.fleet("launch", "nov21", "--slots", "2", "--agent", "x", CUDA_VISIBLE_DEVICES="0,1"), "exists")


def test_the_table_of_a_fleet_that_is_half_cleaned_is_whole(nights, monkeypatch):
    state = nights.state_of_fleet()
    repo = Repo(nights.path)
    bring_home.bring_home(repo, state, state["slots"][0])
    state["slots"][0]["cleaned"] = True
    (nights.path / ".lab" / "fleet" / "nov21.json").write_text(json.dumps(state))
    out = nights.fleet("status", "nov21").out
    assert "cleaned" in out and "0.990000" in out and "0.980000" in out
    one_line(nights.fleet("launch", "nov21"), "is being cleaned")
    assert nights.fleet("clean", "nov21").rc == 0


def spoil(fleet, how):
    night = fleet.night_in(1)
    if how == "edited":
        (night.path / "program.md").write_text("a new thought\n")
    elif how == "unrecorded":
        night.change_train("# another idea\n")
        night.commit("idea")
        night.run(0.9)
    elif how == "journal":
        (night.path / ".lab" / "journal.json").write_text('{"tag": "nov21-gpu1"}')
    elif how == "branch":
        night.git("switch", "-q", "--detach")
    elif how == "home":
        (fleet.path / "runs" / "nov21-gpu1").mkdir(parents=True)


@pytest.mark.parametrize(
    "how, needle",
    [
        ("edited", "program.md in "),
        ("unrecorded", "is not recorded: there, uv run -m lab record"),
        ("journal", "a record was interrupted in "),
        ("branch", "git switch autoresearch/nov21-gpu1"),
        ("home", "holds another night: move it away"),
    ],
)
def test_clean_refuses_where_anything_would_be_lost(nights, how, needle):
    spoil(nights, how)
    before = [contents(nights.tree(k)) for k in range(2)]
    one_line(nights.fleet("clean", "nov21"), needle)
    assert [contents(nights.tree(k)) for k in range(2)] == before


def test_clean_refuses_during_a_run(nights):
    fd = os.open(nights.tree(1), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        one_line(nights.fleet("clean", "nov21"), "a run is in progress in ")
    finally:
        os.close(fd)


CHAOS = """
import os, sys
from lab import __main__
from lab.fleet import bring_home
left = [int(sys.argv.pop(1))]
other_disk = sys.argv.pop(1) == "copy"
def wrapped(real):
    def call(*args, **kwargs):
        if "runs" in str(args) or "worktree" in args:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            if other_disk and real is rename and "copying" not in str(args[0]) and "partial" in str(args[1]) and (
                    "partial" not in str(args[0])):
                raise OSError(18, "another file system")
        return real(*args, **kwargs)
    return call
rename = os.rename
bring_home.os.rename, bring_home.remove, bring_home.write = wrapped(rename), wrapped(bring_home.remove), wrapped(bring_home.write)
bring_home.Repo.git = wrapped(bring_home.Repo.git)
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("how", ["move", "copy"])
def test_a_clean_that_is_killed_again_and_again_loses_nothing(nights, how):
    expected = inventory(nights)
    kills = 0
    while True:
        command = [sys.executable, "-c", CHAOS, str(3 + 3 * (kills % 5)), how, "fleet", "clean", "nov21"]
        done = subprocess.run(command, cwd=nights.path, env=nights.env, capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
        kills += 1
        assert kills < 60
    assert kills > 2
    check_home(nights, expected)


def test_two_files_of_one_name_that_differ_are_both_kept(tmp_path):
    for name, text in [("source", "a result"), ("target", "another")]:
        (tmp_path / name).write_text(text)
    with pytest.raises(Refused, match="differs from"):
        bring_home.move(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "source").read_text() == "a result" and (tmp_path / "target").read_text() == "another"


def test_a_fleet_that_never_began_is_cleaned(fleet):
    fleet.no_tmux()
    fleet.launch(CUDA_VISIBLE_DEVICES="0,1")
    state = fleet.state_of_fleet()
    state["slots"][1]["made"] = False
    (fleet.path / ".lab" / "fleet" / "nov21.json").write_text(json.dumps(state))
    assert fleet.fleet("clean", "nov21").rc == 0
    assert fleet.git("worktree", "list").count("\n") == 0 and not fleet.tree(1).exists()


# --- GPUs and cores -----------------------------------------------------------------


def test_mig_slices_are_gpus_and_a_whole_gpu_is_its_number():
    text = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
  MIG 3g.40gb     Device  0: (UUID: MIG-1111)
  MIG 3g.40gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)
"""
    assert devices.listed(text) == ["MIG-1111", "MIG-2222", "1"]
    assert devices.listed("No devices found.\n") == []


@pytest.mark.parametrize(
    "environment, rocm, expected",
    [
        ({"CUDA_VISIBLE_DEVICES": "3, 5"}, False, ("CUDA_VISIBLE_DEVICES", ["3", "5"])),
        ({"CUDA_VISIBLE_DEVICES": ""}, False, ("CUDA_VISIBLE_DEVICES", [])),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, False, ("CUDA_VISIBLE_DEVICES", [])),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,MIG-b"}, False, ("CUDA_VISIBLE_DEVICES", ["GPU-a", "MIG-b"])),
        ({"HIP_VISIBLE_DEVICES": "1"}, False, ("CUDA_VISIBLE_DEVICES", None)),
        ({"HIP_VISIBLE_DEVICES": "1,2"}, True, ("HIP_VISIBLE_DEVICES", ["1", "2"])),
        ({"ROCR_VISIBLE_DEVICES": "0"}, True, ("ROCR_VISIBLE_DEVICES", ["0"])),
    ],
)
def test_what_the_user_or_the_cluster_made_visible_is_divided(monkeypatch, environment, rocm, expected):
    for name in devices.ROCM:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "for_rocm", lambda: rocm)
    variable, names, _ = devices.gpus()
    assert variable == expected[0] and (expected[1] is None or names == expected[1])


def test_rocms_torch_is_known_by_its_version_file(monkeypatch, tmp_path):
    for text, expected in [("hip: Optional[str] = '6.2.4'\n", True), ("hip: Optional[str] = None\n", False)]:
        (tmp_path / "version.py").write_text(f"__version__ = '2'\ncuda = None\n{text}")
        spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
        monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert devices.for_rocm() is expected


def test_without_a_gpu_the_cores_are_divided_and_none_is_shared(monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: ("CUDA_VISIBLE_DEVICES", [], "nvidia-smi"))
    monkeypatch.setattr(devices, "cores", lambda: [0, 1, 4, 5, 6, 7, 9])
    parts, note = devices.shares(3)
    assert [own for _, own in parts] == [[0, 1], [4, 5], [6, 7]] and "2 cores per slot" in note
    assert all(environment == {"OMP_NUM_THREADS": "2"} for environment, _ in parts)
    parts, note = devices.shares(8)
    assert all(own == [] for _, own in parts) and "slows the others down" in note
    monkeypatch.setattr(slot_processes.shutil, "which", lambda name: f"/usr/bin/{name}")
    state = {"id": "x", "settings": {}, "python": None, "agent": "true"}
    slot = {"number": 0, "environment": {}, "cores": [4, 5], "folder": "/t"}
    assert "taskset -c 4,5 uv run -m lab night" in slot_processes.command(state, slot, 8)


# --- the real thing -----------------------------------------------------------------


@pytest.fixture
def real(fleet):
    if not shutil.which("tmux"):
        pytest.skip("tmux is not installed")
    with open(fleet.path / "README", "w") as f:
        f.write("two slots\n")
    fleet.commit("readme", "README")
    fleet.env |= {"TMUX_TMPDIR": str(fleet.place), "CUDA_VISIBLE_DEVICES": ""}
    fleet.env.pop("TMUX", None)
    yield fleet
    subprocess.run(["tmux", "-L", tmux.server(fleet.path, "nov21"), "kill-server"], env=fleet.env, capture_output=True)
    subprocess.run(["tmux", "kill-server"], env=fleet.env, capture_output=True)


def is_over(fleet, k):
    path = fleet.tree(k) / ".lab" / "agent.log"
    return path.exists() and "every idea was tried" in path.read_text().rpartition("--- start")[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_agents_at_once_and_one_that_is_killed(real):
    fleet, mine = real, ["tmux", "new-session", "-d", "-s", "fleet", "-n", "gpu0", "sleep 616"]
    subprocess.run(mine, env=fleet.env, check=True)  # the human's own, of the same names
    settings = {"agent": agent_command(fleet.place / "tools"), "FAKE_SECONDS": "0.5"}
    result = fleet.launch("--no-team", "--programs", "programs/wild.md", "programs/tame.md", timeout=120, **settings)
    assert result.rc == 0 and "2 slots started, 0 were running" in result.out, result
    one_line(fleet.fleet("clean", "nov21"), "slot 0 is running")

    # a slot dies in the middle of a run, with all that it started
    until(lambda: (fleet.tree(1) / "results.tsv").exists() and locks.run_in_progress(fleet.tree(1)), 120)
    kill_all(fleet.tree(1))
    out = fleet.fleet("status", "nov21").out
    states = {line.split()[0]: line for line in out.splitlines() if line.startswith("gpu")}
    assert "running" in states["gpu0"] and "dead" in states["gpu1"]
    alive = (fleet.tree(0) / ".lab" / "night.lock").read_text()
    result = fleet.fleet("launch", "nov21", timeout=120, FAKE_SECONDS="0.5")
    assert result.rc == 0 and "1 slots started, 1 were running" in result.out, result
    assert (fleet.tree(0) / ".lab" / "night.lock").read_text() == alive
    until(lambda: is_over(fleet, 0) and is_over(fleet, 1), 240)

    # a window that the human opened on the fleet's server, and the other server, are not the fleet's to end
    server = ["tmux", "-L", tmux.server(fleet.path, "nov21")]
    subprocess.run([*server, "new-window", "-d", "-n", "gpu0", "sleep 617"], env=fleet.env, check=True)
    result = fleet.fleet("stop", "nov21", timeout=120)
    assert result.rc == 0 and "2 slots stopped" in result.out, result
    assert not processes_in(fleet.tree(0), fleet.tree(1))
    for tmux_of in (server, ["tmux"]):
        listed = subprocess.run([*tmux_of, "list-windows", "-a"], env=fleet.env, capture_output=True, text=True)
        assert listed.stdout.count("gpu0") == 1, listed

    # two branches, two logs, and in each tree its own rows alone
    expected = ["keep", "discard", "discard", "keep", "crash"]
    ids = []
    for k in range(2):
        night = fleet.night_in(k)
        night.path = fleet.tree(k)
        assert [row[3] for row in night.rows()] == expected
        records = night.records()
        assert {r["tag"] for r in records} == {f"nov21-gpu{k}"} and len(records) == 8
        ids.append({r["run_id"] for r in records})
        program = f"program of this slot: programs/{['wild', 'tame'][k]}.md"
        assert night.chain() == ["a gain", program, "readme", "a night's beginning", "start"]
        keeps = {f"{r['row']:04d}-{r['short']}" for r in records if r["row"] and r["verdict"] == "keep"}
        assert set(night.archives()) == keeps
        for name in keeps:
            assert {"train.py", "run.log", "checkpoint.pt"} <= set(os.listdir(night.path / "runs" / name))
        assert (night.path / "night.log").read_text().count("night of ") == 1 + k
    assert not ids[0] & ids[1]
    assert contents(fleet.place / "cache") == {"data": b"tokens"}

    expected = inventory(fleet)
    assert fleet.fleet("clean", "nov21").rc == 0
    for k in range(2):
        there = contents(fleet.path / "runs" / f"nov21-gpu{k}")
        assert {name: there.get(name) for name in expected[k]} == expected[k]
        assert not fleet.tree(k).exists()
    assert fleet.git("fsck", "--strict").count("error") == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_agents_with_real_trainings_share_the_data_and_leave_it_as_it_was(tmp_path, prepared_stdlib):
    if not shutil.which("tmux"):
        pytest.skip("tmux is not installed")
    (tmp_path / "home").mkdir(exist_ok=True)
    repo = tiny_repo(tmp_path / "repo", tmp_path / "home", tmp_path / "cache", "stdlib", None, 1, 90)
    repo.copy_cache(prepared_stdlib)
    fleet = Fleet.__new__(Fleet)
    fleet.place, fleet.path, fleet.who = tmp_path, repo.path, ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    plan = [["one comment", "# one", ""], ["a crash", "def broken(:", ""]]
    fleet.env = repo.env | tools(tmp_path / "tools") | {
        "AUTORESEARCH_DATASET": "stdlib", "AUTORESEARCH_NO_SAMPLE": "1", "GIT_CONFIG_GLOBAL": os.devnull,
        "TMUX_TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    (tmp_path / "tools" / "plan.json").write_text(json.dumps(plan))
    uv = tmp_path / "tools" / "bin" / "uv"
    uv.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} "$@"\n')  # the training is the real one
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "start"]):
        fleet.git(*command)
    data = {name: value for name, value in contents(repo.cache).items() if not name.startswith("compile/")}
    try:
        result = fleet.launch("--no-team", agent=agent_command(tmp_path / "tools"), timeout=180)
        assert result.rc == 0, result.err
        until(lambda: (fleet.tree(1) / "results.tsv").exists() and locks.run_in_progress(fleet.tree(1)), 600)
        kill_all(fleet.tree(1))
        assert fleet.fleet("launch", "nov21", timeout=180).rc == 0
        until(lambda: is_over(fleet, 0) and is_over(fleet, 1), 600)
        result = fleet.fleet("stop", "nov21", timeout=120)
        assert "2 slots stopped" in result.out
    finally:
        kill_all(fleet.tree(0), fleet.tree(1))
        subprocess.run(
            ["tmux", "-L", tmux.server(fleet.path, "nov21"), "kill-server"], env=fleet.env, capture_output=True
        )
    for k in range(2):
        night = fleet.night_in(k)
        rows, records = night.rows(), night.records()
        assert [row[4] for row in rows] == ["baseline", "one comment", "a crash"] and rows[2][3] == "crash"
        assert {r["tag"] for r in records} == {f"nov21-gpu{k}"} and all(0 < float(row[1]) < 20 for row in rows[:2])
        for r in records:
            if r["row"] and r["verdict"] == "keep":
                there = set(os.listdir(night.path / "runs" / f"{r['row']:04d}-{r['short']}"))
                assert {"train.py", "run.log", "checkpoint.pt", "model_info.txt"} <= there
    assert {name: value for name, value in contents(repo.cache).items() if not name.startswith("compile/")} == data
    assert fleet.fleet("clean", "nov21").rc == 0
    assert all((fleet.path / "runs" / f"nov21-gpu{k}" / "runs.jsonl").exists() for k in range(2))
