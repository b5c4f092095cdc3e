"""Several GPUs of one machine as one team: a working tree and a branch for each, with an agent or a worker in it.

    uv run -m lab fleet launch nov21 --slots 4 --agent 'claude -p "Read program.md and follow it." --settings ...'
    uv run -m lab fleet launch nov21 --slots 8 --agents 1 --agent ...      one agent feeds eight workers
    uv run -m lab fleet status nov21        uv run -m lab fleet stop nov21        uv run -m lab fleet clean nov21

.lab/fleet/TAG.json in the launching checkout describes the fleet; a slot's night.lock tells whether it is running.
"""

import argparse
import json
import os
import re
import time
import uuid
from pathlib import Path

from lab.base import locks
from lab.base.errors import Refused, Unfinished
from lab.base.files import write
from lab.base.processes import named
from lab.fleet import bring_home, slot_processes, tmux, worktrees
from lab.keeper import cleanup
from lab.loop import many_trees
from lab.machine import devices
from lab.store import names
from lab.store.repository import Repo

HELP = "several GPUs of this machine as one team: launch, status, stop, clean"
DESCRIPTION = """\
launch   makes a working tree beside this checkout for every slot (a GPU, or a part of the cores if there is no
         GPU), on a branch autoresearch/TAG-gpuK from HEAD, and starts `lab night` with the agent's command in it,
         in a tmux window; without tmux it prints the commands. The slots are a team (git config autoresearch.team
         TAG): they judge by everybody's results. They share the data, the compile cache and the Python environment.
         With --agents M, fewer than slots, every slot runs a worker (`lab work`), and M agents, each in a working
         tree of its own without a GPU, feed them by programs/team.md; --agents 0: workers only. After the first launch, `launch TAG` alone resumes: it starts the slots that are dead
         and does not touch the running ones
status   prints one table of all slots, and the best of them
stop     ends what launch started, trainings included, and nothing else; `launch TAG` resumes
clean    moves every slot's results to runs/TAG-gpuK of this checkout, then removes its working tree; the branches
         stay. It refuses if anything would be lost

Exit status: 0 done; 1 refused, nothing was changed; 2 wrong usage; 3 stopped half-way, the same command resumes."""
FOLDER = Path(names.LAB, names.FLEET)
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", names.FEEDER: "1"}  # for an agent that trains nothing
START_LIMIT = 60  # seconds that a keeper may take to lock its tree: `uv run` and imports on a busy machine


def add_arguments(parser):
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(metavar="launch|status|stop|clean", dest="what", required=True)
    parsers = {name: commands.add_parser(name) for name in ("launch", "status", "stop", "clean")}
    for sub in parsers.values():
        sub.add_argument("tag", metavar="TAG", help="the fleet's name: branches are autoresearch/TAG-gpu0 and so on")
    launch = parsers["launch"]
    launch.add_argument("--slots", type=int, metavar="N", help="how many trainings at once")
    launch.add_argument("--agents", type=int, metavar="M", help="how many agents (as many as slots); fewer: they feed workers")
    launch.add_argument("--no-team", action="store_true", help="nights that know nothing of each other, to compare their results")
    launch.add_argument("--agent", metavar="COMMAND", help="shell command that starts an agent, as for lab night")
    launch.add_argument("--programs", nargs="+", metavar="FILE", help="program.md of agent 0, 1, ...; repeated if fewer than agents")
    launch.add_argument("--hours", type=float, help="how long each night is, from its start (8)")
    launch.add_argument("--folder", metavar="DIR", help="where the working trees go (beside this checkout)")


# ---------------------------------------------------------------------------------------------------
# What a fleet is


def file_of(top, tag):
    return top / FOLDER / f"{tag}.json"


def load(top, tag):
    """The fleet's state; None if there is no such fleet."""
    try:
        return json.loads(file_of(top, tag).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def known(top, tag):
    state = load(top, tag)
    if state is None:
        there = sorted(path.relative_to(top / FOLDER).with_suffix("") for path in (top / FOLDER).rglob("*.json"))
        others = f"; known fleets: {', '.join(map(str, there))}" if there else ""
        raise Refused(f"there is no fleet {tag} in this checkout{others}")
    return state


def save(top, state):
    path = file_of(top, state["tag"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(state, indent=1, ensure_ascii=False))


def plan(repo, args):
    """The state of a new fleet, before anything is created."""
    agents = args.slots if args.agents is None else args.agents
    if not args.slots or agents != 0 and not args.agent:
        raise Refused(f"there is no fleet {args.tag} yet: --slots N and --agent 'COMMAND' are needed")
    if args.slots < 1:
        raise Refused("--slots must be at least 1")
    if not 0 <= agents <= args.slots:
        raise Refused(f"--agents must be 0 to {args.slots}, the number of slots")
    if args.no_team and agents < args.slots:
        raise Refused("--no-team needs an agent in each slot: workers without a team have no queue; leave out --agents")
    worktrees.check_name(repo, args.tag, None if args.no_team else team_of(args.tag))
    worktrees.check_checkout(repo)
    shares, note = devices.shares(args.slots)
    top, works = repo.top.resolve(), agents < args.slots
    beside = Path(args.folder).expanduser().absolute() if args.folder else top.parent
    folder, slots = f"{top.name}-{args.tag}", [f"gpu{i}" for i in range(args.slots)]
    feeders = [f"agent{i}" for i in range(agents)] if works else []
    folders = {name: beside / f"{folder}-{name}" for name in [*slots, *feeders]}
    worktrees.check_free(repo, args.tag, folders)
    programs_given = args.programs or ([str(top / names.TEAM_PROGRAM)] if works and feeders else [None])
    given = worktrees.programs_of(None if programs_given == [None] else programs_given, len(feeders) if works else args.slots)
    programs = [*[None] * args.slots, *given] if works else given
    worktrees.check_room(beside, args.slots)
    shares = [*shares, *[(NO_GPU, None)] * len(feeders)]
    made = []
    for i, ((environment, own), program, (name, place)) in enumerate(zip(shares, programs, folders.items(), strict=True)):
        named = None if program is None else programs_given[(i - args.slots * works) % len(programs_given)]
        made.append({
            "number": i, "name": name, "works": works and name in slots, "branch": worktrees.branch_of(args.tag, name),
            "folder": str(place), "program": named, "start": worktrees.beginning(repo, program, named),
            "environment": environment, "cores": own, "made": False, "cleaned": False,
        })  # fmt: skip
    print(note)
    return {
        "tag": args.tag, "id": uuid.uuid4().hex, "count": args.slots, "agents": agents, "team": not args.no_team, "agent": args.agent, "hours": 8 if args.hours is None else args.hours,
        "programs": args.programs, "folder": str(beside), "settings": slot_processes.settings(),
        "python": slot_processes.environment_folder(), "slots": made,
    }  # fmt: skip


def check_same(state, args):
    """Refuses options that differ from those that the fleet was launched with."""
    given = {"--slots": args.slots, "--agents": args.agents, "--agent": args.agent, "--programs": args.programs}
    given["--folder"] = args.folder and str(Path(args.folder).expanduser().absolute())
    count = state.get("count", len(state["slots"]))
    was = {"--slots": count, "--agents": state.get("agents", count), "--agent": state["agent"], "--programs": state["programs"]}
    was["--folder"] = state["folder"]
    given["--no-team"], was["--no-team"] = args.no_team or None, not is_team(state)
    given |= {name: slot_processes.settings().get(name) for name in slot_processes.SETTINGS}
    was |= {name: state["settings"].get(name) for name in slot_processes.SETTINGS}
    for name, value in given.items():
        if value is not None and value != was[name]:
            raise Refused(
                f"the fleet {state['tag']} was launched with {name} {was[name]}: `lab fleet launch {state['tag']}` resumes "
                "with that; for other settings choose another TAG"
            )
    if any(slot["cleaned"] for slot in state["slots"]):
        raise Refused(f"the fleet {state['tag']} is being cleaned: uv run -m lab fleet clean {state['tag']}")


def is_team(state):
    """Whether the fleet was launched as a team; older ones were not."""
    return state.get("team", "agents" in state)


def team_of(tag):
    """The name of the fleet's team."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", tag)


def check_team(repo, tag):
    """Refuses if another fleet of this checkout is running: git's configuration, which its working trees share, says which
    team they are."""
    team = repo.ask("config", names.TEAM)
    for path in sorted((repo.top / FOLDER).rglob("*.json")):
        other = load(repo.top, path.relative_to(repo.top / FOLDER).with_suffix("").as_posix())
        apart = other and not is_team(other) and "team" in other
        if other and other["tag"] != tag and (apart or team == team_of(other["tag"])) and any(map(slot_processes.is_running, other["slots"])):
            raise Refused(
                f"the fleet {other['tag']} is running, and a checkout has one team at a time: uv run -m lab fleet stop "
                f"{other['tag']}, or launch from another clone"
            )


# ---------------------------------------------------------------------------------------------------
# The commands


def launch(repo, args):
    if args.hours is not None and args.hours <= 0:
        raise Refused("--hours must be above 0")
    state = load(repo.top, args.tag)
    if state is None or "agents" in state:
        check_team(repo, args.tag)
    if state is None:
        state = plan(repo, args)
        save(repo.top, state)
    else:
        check_same(state, args)
    if is_team(state):
        repo.git("config", names.TEAM, team_of(args.tag))
    elif "team" in state:
        repo.ask("config", "--unset", names.TEAM)  # of a fleet before this one
    for slot in state["slots"]:
        if slot["made"]:
            worktrees.check_made(repo, slot)
            continue
        worktrees.make(repo, state, slot)
        slot["made"] = True
        save(repo.top, state)
    dead = [slot for slot in state["slots"] if not slot_processes.is_running(slot)]
    commands = [slot_processes.command(state, slot, args.hours or state["hours"]) for slot in dead]
    if not dead:
        print(f"all {len(state['slots'])} slots are running")
    elif not tmux.is_there():
        print("tmux is not installed: start each of these in a terminal of its own\n")
        print("\n\n".join(commands))
        return 0
    else:
        server = tmux.server(repo.top, args.tag)
        for slot, command in zip(dead, commands, strict=True):
            tmux.start(server, slot_processes.name_of(slot), f"({command}) 2> {bring_home.errors_of(slot)}")
        await_up(server, dead)
        print(f"{len(dead)} slots started, {len(state['slots']) - len(dead)} were running; {tmux.attach(server)}")
    print(f"uv run -m lab fleet status {args.tag}")
    return 0


def await_up(server, started):
    """Waits until each slot's keeper holds its lock. Raises Unfinished, with its last message, for one that died."""
    deadline, waiting = time.monotonic() + START_LIMIT, list(started)
    while waiting:
        windows = tmux.windows(server)
        for slot in [slot for slot in waiting if slot_processes.is_running(slot)]:
            waiting.remove(slot)
        gone = [slot for slot in waiting if slot_processes.name_of(slot) not in windows and not slot_processes.is_running(slot)]
        if gone or time.monotonic() > deadline:
            slot = (gone or waiting)[0]
            raise Unfinished(f"slot {slot['number']} did not start: {bring_home.last_words(slot)}; the same command tries again")  # fmt: skip
        time.sleep(0.1)


def status(repo, args):
    state = known(repo.top, args.tag)
    places = [bring_home.home_of(repo, slot) if slot["cleaned"] else Path(slot["folder"]) for slot in state["slots"]]
    found = [many_trees.read(place) for place in places]
    many_trees.as_teams(found)
    for slot, tree in zip(state["slots"], found, strict=True):
        tree["tree"] = slot_processes.name_of(slot)
        tree["state"] = "cleaned" if slot["cleaned"] else ("running" if slot_processes.is_running(slot) else "dead") + (
            f", {tree['state']}" if tree["state"] not in ("", "night") else "")  # fmt: skip
    print(f"fleet {args.tag}: " + f"{state['folder']}/*, branches {worktrees.branch_of(args.tag, 'gpuK')}")
    print(many_trees.table(found))
    return 0


def stop(repo, args):
    state = known(repo.top, args.tag)
    stopped, ended, foreign = slot_processes.stop(state)
    print(f"{stopped} slots stopped" + (f", {ended.killed} processes had to be killed" if ended.killed else ""))
    if ended.left:
        print(f"{named(ended.left)} cannot be ended and may slow the next fleet down")
    for slot in foreign:
        print(f"{slot['folder']}: the night there was not started by this fleet and is still running")
    return Unfinished.code if ended.left else 0


def clean(repo, args):
    state = known(repo.top, args.tag)
    for slot in state["slots"]:
        if not slot["cleaned"]:
            if slot_processes.is_running(slot) or slot_processes.processes_of(state, slot) or cleanup.orphans(slot["folder"]):
                raise Refused(f"slot {slot['number']} is running: uv run -m lab fleet stop {args.tag}")
            bring_home.check(repo, slot)
    for slot in state["slots"]:
        if not slot["cleaned"]:
            bring_home.bring_home(repo, state, slot)
            slot["cleaned"] = True
            save(repo.top, state)
        print(f"{slot['branch']}: results in {bring_home.home_of(repo, slot).relative_to(repo.top)}, working tree removed")
    os.unlink(file_of(repo.top, args.tag))
    return 0


def run(args):
    repo = Repo.find(Path.cwd())
    (repo.top / names.LAB).mkdir(exist_ok=True)
    if args.what == "status":
        return status(repo, args)
    with locks.one_at_a_time(repo.top / FOLDER, "fleet command", patience=1):
        return {"launch": launch, "stop": stop, "clean": clean}[args.what](repo, args)
