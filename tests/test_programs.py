"""What agents are told and allowed: program.md, programs/, agents/. A command that a program names must exist, and
every permission file must let it through; what is frozen, none lets an agent change."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from lab.__main__ import COMMANDS
from lab.keeper import sandbox
from lab.loop import checks

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = [ROOT / "program.md", *sorted((ROOT / "programs").glob("*.md"))]
TEAM = ROOT / "programs" / "team.md"  # its agent trains nothing: it feeds workers
TRAINING = [path for path in PROGRAMS if path != TEAM]
COMMON = [1, 2, 4, 5, 6]  # sections that are the same in all programs
RUN = "uv run train.py > run.log 2>&1"
SANDBOXED = "uv run -m lab sandbox > run.log 2>&1"
# What record and status tell an agent to do, in the form that they have for some commit.
TOLD = [
    "git reset --keep 1a2b3c4", "git reset --keep 1a2b3c4^", "git reset --soft 1a2b3c4^", "git cherry-pick 1a2b3c4",
    'git commit -m "x" -- train.py', "git stash push -- train.py", "git stash pop", "git checkout -- train.py",
    "git switch autoresearch/nov21", "git switch -c autoresearch/nov21", "uv run -m lab record", "uv run -m lab adopt",
    "uv run -m lab wait",
    *(f"AUTORESEARCH_SEED={seed} {run}" for seed in (43, 44, 45, 60) for run in (RUN, SANDBOXED)),
]  # fmt: skip
# What an agent must not be let do, by whatever rule.
HARM = [
    "git reset --hard HEAD", "git reset --keep HEAD --hard", "git push", "git clean -fd", "git rebase main",
    "git checkout -b autoresearch/x -f", "git switch -c autoresearch/x --discard-changes", "git checkout program.md",
    "git checkout main", "git restore program.md", "git stash", "git add -A", "git add prepare.py", "git commit -am x",
    "git commit -m x prepare.py", "git commit --amend -m x train.py", "git commit -m x --amend train.py",
    "git show HEAD^ | git apply", "git apply x.patch", "git apply --include=train.py x.patch --include=*",
    "git diff --output=prepare.py", "git log --output prepare.py", "git -c core.pager=sh log", "git config a.b c",
    "uv add numpy", "uv sync", "uv pip install x", "pip install x", "uv run python -c pass", "uv run prepare.py --num-shards 3",
    "uv run -m lab night --agent x", "uv run -m lab work", "uv run -m lab work --hours 8", "uv run -m lab wait > prepare.py", "uv run -m lab sample --output prepare.py", "uv run -m lab sandbox -- sh -c true",
    "uv run -m lab sandbox -- uv run -m lab record x", "uv run -m lab sandbox -- uv run python -c pass",
    "uv run -m lab sandbox -- uv run -m lab profile > prepare.py", "uv run -m lab sandbox -- uv run -m lab profile; touch y",
    "AUTORESEARCH_SEED=43 sh -c true uv run train.py", "AUTORESEARCH_SEED=x uv run train.py > run.log 2>&1",
    "AUTORESEARCH_DATASET=stdlib uv run train.py > run.log 2>&1", "uv run train.py > prepare.py 2>&1",
    'uv run -m lab record "x" > results.tsv', 'uv run -m lab record "$(touch x)"', "uv run -m lab record `touch x`",
    'uv run -m lab record "x"; touch y', 'uv run -m lab record "x" && rm y', "grep x run.log | tee prepare.py",
    "rm run.log", "mv train.py x", "cp train.py prepare.py", "sed -i s/1/2/ prepare.py", "python train.py", "sh x.sh",
    "curl http://example.com", "wget http://example.com", "echo 'val_bpb: 0.1' > run.log", "sudo true",
]  # fmt: skip


def program_id(path):
    return path.stem


def sections(path):
    """{number: text of that section, its heading included}; 0 is what comes before the first."""
    parts = re.split(r"(?m)^(?=## \d\. )", path.read_text())
    return {int(match[1]) if (match := re.match(r"## (\d)", part)) else 0: part for part in parts}


def commands(path):
    """What a program tells the agent to type: the lines of its code blocks, and commands within its sentences."""
    text = path.read_text()
    blocks = re.findall(r"(?ms)^ *```\n(.*?)^ *```$", text)
    prose = re.sub(r"(?ms)^ *```\n.*?^ *```$", "", text)
    inline = [code for code in re.findall(r"`([^`\n]+)`", prose) if re.match(r"(uv|git|grep|tail|sleep) \S+ \S", code)]
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()] + inline


ALL_COMMANDS = sorted({command for path in PROGRAMS for command in commands(path)})


# --- the programs -------------------------------------------------------------


def test_there_are_the_programs_that_were_asked_for():
    assert [path.stem for path in PROGRAMS] == ["program", "architecture", "conservative", "optimizer", "plateau", "team"]


@pytest.mark.parametrize("path", TRAINING, ids=program_id)
def test_a_program_is_complete_and_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 121
    assert sorted(sections(path)) == [0, 1, 2, 3, 4, 5, 6, 7]
    named = commands(path)
    needed = ["uv run -m lab status", "git checkout -b autoresearch/", "uv run prepare.py", RUN, 'grep "^val_bpb:" run.log']
    needed += ["git commit -m ", "uv run -m lab record ", "uv run -m lab record --simpler ", "uv run -m lab record --discard "]
    for start in needed:
        assert any(command.startswith(start) for command in named), f"{path.name} does not say {start}"
    for words in ("val_bpb", "seed", "keep", "discard", "crash", "confirm", "`next:`", "Memory is a soft limit"):
        assert words in path.read_text() or (words.startswith("Memory") and path.stem == "conservative")


@pytest.mark.parametrize("path", TRAINING[1:], ids=program_id)
def test_what_is_common_to_all_programs_is_the_same_in_each(path):
    ours, theirs = sections(ROOT / "program.md"), sections(path)
    for number in COMMON:
        assert theirs[number] == ours[number], f"section {number} of {path.name} is not program.md's"
    for number in (0, 3, 7):
        assert theirs[number] != ours[number]


def test_the_program_of_a_team_names_what_its_agent_needs_and_trains_nothing():
    lines, named = TEAM.read_text().splitlines(), commands(TEAM)
    assert len(lines) <= 120 and max(map(len, lines)) <= 121 and sorted(sections(TEAM)) == list(range(8))
    needed = ["uv run -m lab status", "git checkout -b autoresearch/", "git commit -m ", "uv run -m lab propose ",
              "uv run -m lab propose --simpler ", "uv run -m lab wait", "uv run -m lab adopt"]  # fmt: skip
    for start in needed:
        assert any(command.startswith(start) for command in named), f"team.md does not say {start}"
    assert not [command for command in named if "train.py >" in command or "lab record" in command or "lab work" in command]
    for words in ("keep", "discard", "crash", "handed back", "late gain", "conflict", "grid", "`next:`", "seed", "A worker is gone"):
        assert words.lower() in TEAM.read_text().lower(), words


@pytest.mark.parametrize("path", TRAINING, ids=program_id)
def test_the_run_command_stands_once_and_one_word_switches_it_to_the_sandbox(path, tmp_path):
    text = path.read_text()
    assert text.count("> run.log") == text.count(RUN) == 1
    (tmp_path / "program.md").write_text(text)
    assert checks.run_command(tmp_path) == RUN  # what `lab record` prints
    (tmp_path / "program.md").write_text(text.replace(RUN, RUN.replace("train.py", "-m lab sandbox")))
    assert checks.run_command(tmp_path) == SANDBOXED


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if c.startswith("uv run -m lab ")])
def test_lab_commands_that_programs_name_exist(command):
    name, *args = shlex.split(command)[4:]
    assert name in COMMANDS
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"lab.{COMMANDS[name]}.{name}").add_arguments(parser)
    parser.parse_args(args)


def test_files_that_programs_name_exist():
    for path in PROGRAMS:
        for name in re.findall(r"`([\w./]+\.(?:py|md))`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_a_commit_as_the_programs_have_it_leaves_the_humans_edits_alone(tmp_path):
    """Even where the human has staged them."""

    def git(*args):
        return subprocess.run(["git", *args], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("config", "user.name", "a")
    git("config", "user.email", "a@b.c")
    for name in ("train.py", "program.md"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    for name in ("train.py", "program.md"):
        (tmp_path / name).write_text("2")
    git("add", "program.md")
    command = next(c for c in commands(ROOT / "program.md") if c.startswith("git commit"))
    git(*shlex.split(command)[1:])
    assert git("show", "--name-only", "--format=", "HEAD").split() == ["train.py"]
    assert (tmp_path / "program.md").read_text() == "2"


# --- Claude Code --------------------------------------------------------------

CLAUDE = json.loads((ROOT / "agents" / "claude.json").read_text())
ALLOW, DENY = CLAUDE["permissions"]["allow"], CLAUDE["permissions"]["deny"]


def parts(command):
    """(simple commands without their redirections, files that output goes to). None where a part cannot be told
    before it runs. As Claude Code has it: each simple command needs a rule, each output file an Edit rule."""
    if re.search(r"`|\$\(", re.sub(r"'[^']*'", "", command)):
        return None
    bare = re.sub(r"\"[^\"]*\"|'[^']*'", lambda quoted: "Q" * len(quoted[0]), command)  # quotes hide operators
    files = [match[1] for match in re.finditer(r"\d?>+\s*(?!&)(\S+)", bare)]
    cut = [match.span() for match in re.finditer(r"\s*\d?>+(&\d|\s*\S+)", bare)]
    ends = [match.span() for match in re.finditer(r"\s*(&&|\|\||[;|&])\s*", bare) if not any(a <= match.start() < b for a, b in cut)]
    simple, start = [], 0
    for begin, end in [*ends, (len(command), len(command))]:
        keep = [i for i in range(start, begin) if not any(a <= i < b for a, b in cut)]
        simple.append("".join(command[i] for i in keep).strip())
        start = end
    return simple, files


def rule_matches(rule, command):
    """Bash(...) rules: * is any text; a last " *" is also nothing."""
    if not rule.startswith("Bash("):
        return False
    pattern = re.escape(rule[5:-1]).replace(r"\*", ".*")
    pattern = re.sub(r"\\ \.\*$", "( .*)?", pattern)
    return re.fullmatch(pattern, command, re.DOTALL) is not None


def edit_allowed(name):
    def named(rules):
        return any(fnmatch(f"./{name}", rule[5:-1].replace("**", "*")) for rule in rules if rule.startswith("Edit("))

    return named(ALLOW) and not named(DENY)


def claude_allows(command):
    if not (found := parts(command)):
        return False
    simple, files = found
    return all(edit_allowed(file) for file in files) and all(
        any(rule_matches(rule, one) for rule in ALLOW) and not any(rule_matches(rule, one) for rule in DENY) for one in simple
    )


def test_the_matcher_reads_commands_as_a_shell_does():
    assert parts('uv run -m lab record "a > b; c" > x.log 2>&1') == (['uv run -m lab record "a > b; c"'], ["x.log"])
    assert parts("a 2>&1 | b && c; d") == (["a", "b", "c", "d"], [])
    assert parts("a $(b)") is None and parts('a "`b`"') is None and parts("a '$(b)'") is not None
    assert rule_matches("Bash(git log *)", "git log") and not rule_matches("Bash(git log *)", "git logx")


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if not c.startswith("sleep")])
def test_claude_code_may_do_what_the_programs_say(command):
    assert claude_allows(command), command


@pytest.mark.parametrize("command", TOLD)
def test_claude_code_may_do_what_record_and_status_tell_it(command):
    assert claude_allows(command), command


def test_nothing_that_record_and_status_tell_is_forgotten_here():
    """Each git command in their sentences is one of TOLD."""
    said = set()
    for path in [*(ROOT / "lab" / "loop").glob("*.py"), ROOT / "lab" / "store" / "repository.py"]:
        source = path.read_text()
        said |= set(re.findall(r"git (?:reset --\w+|stash \w+|cherry-pick|rebase|restore|checkout --|switch -c|switch)", source))
    assert said and all(any(told.startswith(command) for told in TOLD) for command in said), said


@pytest.mark.parametrize("command", HARM)
def test_claude_code_may_do_no_harm(command):
    assert not claude_allows(command), command


def frozen_files():
    """Everything in the checkout that is not train.py: tracked files, and what record writes."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    written = ["results.tsv", "runs.jsonl", "runs/0001-1a2b3c4/train.py", ".lab/journal.json", ".git/config", ".venv/x.py"]
    return [name for name in {*listed, *written, "constants.py", "prepare.py"} if name != "train.py"]


def test_claude_code_may_edit_train_py_and_nothing_that_is_frozen():
    assert edit_allowed("train.py") and edit_allowed("run.log")
    assert [name for name in frozen_files() if edit_allowed(name)] == []
    assert [rule for rule in ALLOW if rule.startswith(("Edit", "Write"))] == ["Edit(./train.py)", "Edit(./run.log)"]
    for name in ("constants.py", "prepare.py", "lab/loop/record.py", "program.md", "results.tsv", "runs/0001-1a2b3c4/train.py"):
        pattern = [rule for rule in DENY if rule.startswith("Edit(") and fnmatch(f"./{name}", rule[5:-1].replace("**", "*"))]
        assert pattern, f"{name} is left to the mode alone"


def test_claude_code_asks_nobody_reaches_no_network_and_waits_long_enough():
    assert CLAUDE["permissions"]["defaultMode"] == "dontAsk"
    assert {"WebFetch", "WebSearch", "AskUserQuestion", "Write", "Agent"} <= set(DENY)
    assert CLAUDE["autoMemoryEnabled"] is False
    import constants

    seconds = constants.TIME_BUDGET + 2 * constants.GRACE
    for name in ("BASH_DEFAULT_TIMEOUT_MS", "BASH_MAX_TIMEOUT_MS"):
        assert int(CLAUDE["env"][name]) > 1000 * seconds
    assert not [rule for rule in ALLOW if rule in ("Bash", "Edit", "Write", "Read", "Bash(*)")]


# --- Codex --------------------------------------------------------------------

SHELL = ["/bin/bash", "-lc"]


def codex_rules():
    """[(decision, pattern)] of the rules file: its language is a subset of Python."""
    rules = []

    def prefix_rule(pattern, decision="allow", justification="", match=(), not_match=()):
        rules.append((decision, pattern))
        for example in match:
            assert codex_matches(pattern, example if isinstance(example, list) else shlex.split(example))
        for example in not_match:
            assert not codex_matches(pattern, example if isinstance(example, list) else shlex.split(example))

    path = ROOT / "agents" / "codex" / "rules" / "autoresearch.rules"
    exec(compile(path.read_text(), str(path), "exec"), {"prefix_rule": prefix_rule})
    return rules


def codex_matches(pattern, argv):
    return len(argv) >= len(pattern) and all(
        word in wanted if isinstance(wanted, list) else word == wanted for wanted, word in zip(pattern, argv, strict=False)
    )


def codex_decides(command):
    """forbidden, allow (outside the sandbox) or inside. A command with more than plain words counts as one whole."""
    found = parts(command)
    plain = found and len(found[0]) == 1 and not found[1] and "$" not in command and "=" not in command.split(" ")[0]
    argv = shlex.split(command) if plain else [*SHELL, command]
    decisions = {decision for decision, pattern in codex_rules() if codex_matches(pattern, argv)}
    return next((d for d in ("forbidden", "prompt", "allow") if d in decisions), "inside")


@pytest.mark.parametrize("command", sorted({*ALL_COMMANDS, *TOLD}))
def test_codex_may_do_what_it_is_told(command):
    outside = "train.py >" in command or "uv run" in command  # needs the GPU, uv's cache, or what record writes
    assert codex_decides(command) == ("allow" if outside else "inside")


@pytest.mark.parametrize("command", HARM)
def test_codex_lets_no_harm_out_of_its_sandbox(command):
    assert codex_decides(command) in ("forbidden", "inside")


def test_codex_forbids_what_its_sandbox_would_let_happen():
    for command in ("git reset --hard HEAD", "git push", "git clean -fd", "git restore program.md", "uv add numpy"):
        assert codex_decides(command) == "forbidden"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_codex_can_write_nothing_that_is_frozen():
    import tomllib

    config = tomllib.loads((ROOT / "agents" / "codex" / "config.toml").read_text())
    assert config["approval_policy"] == "never" and config["web_search"] == "disabled"
    profile = config["permissions"][config["default_permissions"]]
    assert profile["network"]["enabled"] is False and profile["filesystem"][":root"] == "read"
    places = profile["filesystem"][":workspace_roots"]
    assert places["."] == "write" and places[".git"] == "write"
    top = {name.split("/")[0] for name in frozen_files() if not name.startswith(".git/")}
    harmless = {"LICENSE", "README.md", ".gitignore", ".python-version", "analysis.ipynb", ".ci"}
    missing = sorted(name for name in top - harmless if places.get(name) != "read")
    assert not missing, f"an agent could write {missing}"


# --- the skill and the instructions -------------------------------------------


def test_the_skill_has_its_front_matter():
    path = ROOT / "agents" / "skills" / "autoresearch" / "SKILL.md"
    match = re.fullmatch(r"---\nname: (.+)\ndescription: (.+)\n---\n(.+)", path.read_text(), re.DOTALL)
    assert match, "front matter: name and description, a line each"
    assert match[1] == path.parent.name and len(match[2]) <= 1024 and "\n" not in match[2]
    for command in re.findall(r"`(uv run -m lab [^`]+)`", match[3]):
        assert shlex.split(command)[4] in COMMANDS


def test_the_commands_of_the_instructions_exist(tmp_path):
    text = (ROOT / "agents" / "README.md").read_text()
    nights = re.findall(r"`(uv run -m lab night --hours [^`]+)`", text)
    assert len(nights) == 2
    for command in nights:
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module("lab.keeper.night").add_arguments(parser)
        agent = shlex.split(parser.parse_args(shlex.split(command)[5:]).agent)
        assert agent[0] in ("claude", "codex") and "Read program.md and follow it." in agent
        for word in agent:
            if word.startswith("agents/"):
                assert (ROOT / word).exists()
    for name in re.findall(r"(?:cp -r |`)(agents/[\w./]+|skills/[\w./]+|rules/[\w./]+)", text):
        assert any((base / name).exists() for base in (ROOT, ROOT / "agents", ROOT / "agents" / "codex")), name
    assert SANDBOXED in text


def test_agents_may_call_the_sandboxed_profile_that_the_instructions_name():
    text = (ROOT / "agents" / "README.md").read_text()
    named = set(re.findall(r"`(uv run -m lab sandbox -- [^`]+)`", text))
    assert named == {"uv run -m lab sandbox -- uv run -m lab profile"}
    for command in named:
        assert claude_allows(command) and codex_decides(command) == "allow"
        parser = argparse.ArgumentParser(exit_on_error=False)
        sandbox.add_arguments(parser)
        inner = parser.parse_args(shlex.split(command)[5:]).command
        assert sandbox.resolve(inner[1:] if inner[:1] == ["--"] else inner) == [sys.executable, "-m", "lab", "profile"]
