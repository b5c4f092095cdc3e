"""Writes a job array for Slurm: each task is a separate night with its own program, working tree and branch.

    uv run -m lab slurm --tag nov21 --hours 8 --programs programs/*.md --agent 'COMMAND' --partition gpu --submit
    uv run -m lab slurm --tag nov21 --hours 8 --workers 16 --partition gpu --submit

Writes the script and makes the folders $SCRATCH/autoresearch/TAG and .../TAG/logs. The script contains all of
lab/fleet/slurm_task.sh, the part that every task runs. deploy/slurm/ has a worked example for compute nodes without
internet.
"""

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from frozen.device import kernel_cache
from lab.base import files
from lab.base.errors import Refused, Unfinished
from lab.store import names
from lab.store.names import PREFIX
from lab.store.repository import Repo

HELP = "write (and submit) a Slurm job array: a night per program, or workers, each on its own GPU and branch"
DESCRIPTION = """\
Writes an sbatch script: an array with one task per program, or with --workers N an array of N workers. Each task clones this checkout's HEAD into
SCRATCH/autoresearch/TAG/TASK/tree, on the branch autoresearch/TAG-TASK, and keeps the agent running there with
`lab night`. A task that was preempted, requeued or stopped by its time limit resumes, until the hours since its
first start are over.

With --workers every task runs `lab work` and no agent. The tasks are a team, TAG, on a git remote: this checkout's
(git config autoresearch.remote), or a bare repository SCRATCH/autoresearch/TAG/team.git. An agent, on the login node or
elsewhere, feeds them by programs/team.md from a clone of the same team and remote.

A task writes nothing outside its work directory ($HOME is SCRATCH/autoresearch/TAG/TASK/home; start an agent that
needs your own as 'HOME=$REAL_HOME agent ...'), and trains without a network: prepare the data and `uv sync` first.
All tasks read this Python environment, or an Apptainer image, which must then contain the agent too.

In the morning: uv run -m lab status --trees 'SCRATCH/autoresearch/TAG/*/tree'. A task's best model is in
tree/runs/best, and --from TREE starts the next array from there.

Exit status: 0 written (and submitted); 1 refused, nothing was changed; 2 wrong usage; 3 written, not submitted."""

BODY = Path(__file__).with_name("slurm_task.sh")
WARNING = 90  # seconds before the time limit at which Slurm sends TERM; a night ends within 25 seconds of it
TEAM_REPOSITORY = "team.git"  # in the folder of the array
COARSE = 60  # seconds: Slurm checks time limits about once a minute and may be early by as much


def add_arguments(parser):
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tag", required=True, help="name of the nights; task K uses the branch autoresearch/TAG-K")
    add("--hours", required=True, type=float, help="how long each night is, from its first start")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--agent", metavar="COMMAND", help="shell command that starts the agent")
    what.add_argument("--workers", type=int, metavar="N", help="N tasks that run a team's proposals, and no agent")
    add("--programs", nargs="+", default=[names.PROGRAM], metavar="FILE", help="one task for each (program.md)")
    add("--from", dest="origin", metavar="TREE", help="start from the best train.py of an earlier night")
    add("--scratch", help="folder that all nodes share, for the work directories ($SCRATCH)")
    add("--data", help="folder that prepare.py filled ($AUTORESEARCH_CACHE, or ~/.cache/autoresearch)")
    add("--copy-data", action="store_true", help="copy the data to the node's own disk first")
    add("--container", metavar="IMAGE", help="Apptainer image to run the tasks in (deploy/apptainer.def)")
    add("--group-readable", action="store_true", help="let your group read results, logs and models")
    add("--limit", type=float, metavar="HOURS", help="longest job of the partition: a longer night takes several jobs")
    add("--partition")
    add("--account")
    gpu = parser.add_mutually_exclusive_group()
    gpu.add_argument("--gres", default="gpu:1", help="generic resources of a task (gpu:1); none: no GPU")
    gpu.add_argument("--gpus", help="Slurm's --gpus, such as h100:1; replaces --gres")
    add("--cpus", type=int, default=8, help="cores of a task (8)")
    add("--mem", default="32G", help="memory of a task (32G)")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="a further option, as --sbatch=--qos=long")
    add("--output", metavar="FILE", help="the script (SCRATCH/autoresearch/TAG/array.sbatch); -: standard output")
    add("--submit", action="store_true", help="call sbatch")


# ---------------------------------------------------------------------------------------------------
# What is refused


def tasks_of(args):
    """The program.md of each task. Without the one of an agent that feeds workers, which programs/*.md names too."""
    if args.workers is not None:
        return [names.PROGRAM] * args.workers
    return [p for p in args.programs if Path(p).parts[-2:] != Path(names.TEAM_PROGRAM).parts]


def existing(path, what, test):
    path = Path(path).absolute()
    if not test(path):
        raise Refused(f"{what}: there is no {path}")
    return path


def check(args):
    """Raises Refused for options that no task could work with. Returns the folder for the work directories."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_-]|\.(?=[A-Za-z0-9_-]))*(?<!\.lock)", args.tag):
        raise Refused(f"--tag {args.tag!r}: use letters and digits, with - _ . between them")
    if args.workers is not None and len(args.tag) > 63:
        raise Refused(f"--tag {args.tag!r}: workers are a team of that name, which may have 63 characters at most")
    for name in ("hours", "limit"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise Refused(f"--{name} {value} must be a number of hours above 0")
    if args.workers is not None and (args.workers < 1 or args.programs != [names.PROGRAM]):
        raise Refused("--workers must be at least 1, and workers have no --programs: their agent has")
    if not tasks_of(args):
        raise Refused(f"{names.TEAM_PROGRAM} is for an agent that feeds workers and trains nothing: add --workers N instead")
    if args.cpus < 1:
        raise Refused(f"--cpus {args.cpus} must be at least 1")
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (re.search(r"[\x00-\x1f\x7f]", text) or not text.strip()):
                raise Refused(f"--{name.replace('origin', 'from').replace('_', '-')} is empty or holds a line break")
    for option in args.sbatch:
        if not option.startswith("-"):
            raise Refused(f"--sbatch {option!r} is not an option: write it as --sbatch=--qos=long")
    if args.submit and not shutil.which("sbatch"):
        raise Refused("there is no sbatch here: leave --submit out, and submit the script on the cluster's login node")
    scratch = args.scratch or os.environ.get("SCRATCH")
    if not scratch:
        raise Refused("name a folder that all nodes share: --scratch DIR, or set $SCRATCH")
    scratch = existing(scratch, "--scratch", Path.is_dir)
    if args.container and (bad := next((p for p in (scratch, args.data or "") if re.search("[:,]", str(p))), None)):
        raise Refused(f"{bad}: Apptainer cannot bind a path with a colon or a comma")
    return scratch


def check_checkout(repo):
    """The commit that the tasks clone."""
    commit = repo.head()
    if changed := repo.git("diff", "--name-only", "HEAD").split("\n")[:-1]:
        raise Refused(
            f"uncommitted changes in {', '.join(changed[:3])}: tasks clone HEAD, so commit or undo them first"
        )
    return commit


def check_data(args):
    """(root of the data, dataset, folder of the prepared data below the root)"""
    if args.data:
        os.environ["AUTORESEARCH_CACHE"] = str(Path(args.data).absolute())
    import prepare  # imported here because it takes half a second (without torch)

    try:
        if not (args.container and prepare.DATASET == "stdlib"):  # whose data depend on Python's version
            prepare.load_manifest()
    except SystemExit as refusal:
        raise Refused(str(refusal)) from None
    return prepare.cache_dir().absolute(), prepare.DATASET, prepare.data_dir().relative_to(prepare.cache_dir())


# ---------------------------------------------------------------------------------------------------
# The script


def minutes(args):
    """The time limit of a job in minutes: the hours, plus the last run and its record (lab night), plus Slurm's
    warning."""
    from lab.base.processes import PATIENCE
    from lab.keeper.night import LONGEST_RUN, TIME_TO_RECORD

    after = LONGEST_RUN + TIME_TO_RECORD + PATIENCE + WARNING + COARSE
    whole = math.ceil((args.hours * 3600 + after) / 60)
    if args.limit is None:
        return whole
    if args.limit * 3600 < after:
        raise Refused(
            f"--limit {args.limit:g}: a job shorter than {after / 60:.0f} minutes may not complete a single run"
        )
    return min(whole, math.floor(args.limit * 60))


def header(args, folder):
    """The #SBATCH lines. Slurm removes quotes like a shell, and expands %A and %a in the log's name only."""
    log = str(folder / "logs").replace("%", "%%") + "/%A_%a.log"
    options = {
        "--job-name": f"autoresearch-{args.tag}", "--array": f"0-{len(tasks_of(args)) - 1}", "--time": str(minutes(args)),
        "--signal": f"B:TERM@{WARNING}", "--requeue": None, "--open-mode": "append", "--output": log, "--nodes": "1",
        "--ntasks": "1", "--cpus-per-task": str(args.cpus), "--mem": args.mem, "--partition": args.partition or "",
        "--account": args.account or "", "--gpus": args.gpus or "",
        "--gres": "" if args.gpus or args.gres == "none" else args.gres,
    }  # fmt: skip
    given = [
        name if value is None else f"{name}={shlex.quote(value)}" for name, value in options.items() if value != ""
    ]
    return [f"#SBATCH {option}" for option in given + args.sbatch]


def script(args, repo, folder, commit, data, dataset, prepared):
    uv, quote = shutil.which("uv"), shlex.quote
    values = {
        "tag": args.tag, "agent": args.agent or "", **team(args, repo, folder), "scratch": folder.parent.parent, "source": repo.top, "commit": commit,
        "from": existing(args.origin, "--from", is_night) if args.origin else "", "data": data, "dataset": dataset,
        "copy": prepared if args.copy_data else "", "hub_cache": kernel_cache().absolute(),
        "container": container(args.container), "environment": sys.prefix, "uv": Path(uv).parent if uv else "",
        "mask": "027" if args.group_readable else "077", "seconds": round(args.hours * 3600),
    }  # fmt: skip
    programs = [quote(str(existing(name, "--programs", Path.is_file))) for name in tasks_of(args)]
    kind = "nights" if args.workers is None else "workers"
    return "\n".join([
        "#!/bin/bash", *header(args, folder),
        f"# Written by `uv run -m lab slurm`: {len(programs)} {kind} of {args.hours:g} hours. These differ between arrays:",
        "# shellcheck disable=SC2016 # single-quoted text must not be expanded here",
        *(f"{name}={quote(str(value))}" for name, value in values.items()), f"programs=({' '.join(programs)})",
        BODY.read_text(encoding="utf-8"),
    ])  # fmt: skip


def team(args, repo, folder):
    """The variables of the script that make its tasks workers; empty for nights."""
    if args.workers is None:
        return {"team": "", "remote": ""}
    return {"team": args.tag.replace(".", "-"), "remote": remote_of(repo) or folder / TEAM_REPOSITORY}


def remote_of(repo):
    """The team's remote as a clone elsewhere can use it, which has no remote of that name and another folder: a URL or an
    absolute path; None if the checkout has none. Raises Refused for what is no remote here."""
    given = repo.ask("config", names.REMOTE)
    if not given:
        return None
    url = repo.ask("ls-remote", "--get-url", "--", given) or given  # of a remote's name; without its insteadOf
    if (repo.top / url).exists():
        return str((repo.top / url).resolve())
    if ":" not in url and not url.startswith("/"):
        raise Refused(f"{names.REMOTE} is {given!r}, neither a remote of this checkout nor a path: git config {names.REMOTE} NAME-OR-PATH-OR-URL")
    return url


def make_remote(args, repo, folder):
    """Makes the repository through which the tasks share, unless the checkout has a remote."""
    if args.workers is not None and not repo.ask("config", names.REMOTE) and not (folder / TEAM_REPOSITORY).exists():
        repo.git("init", "--quiet", "--bare", str(folder / TEAM_REPOSITORY))


def is_night(tree):
    return (tree / names.RUNS / names.BEST / names.TRAIN).is_file()


def container(image):
    """The image as a task gets it: a path made absolute; a name such as docker://... or library://... unchanged."""
    if not image or "://" in image:
        return image or ""
    return existing(image, "--container", Path.exists)


def submit(path):
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise Unfinished(f"{path} was written, but sbatch refused it: {reason}")
    return done.stdout.strip().split(";")[0]


def run(args):
    repo, scratch = Repo.find(Path.cwd()), check(args)
    folder, commit = scratch / "autoresearch" / args.tag, check_checkout(repo)
    text = script(args, repo, folder, commit, *check_data(args))
    mode = 0o750 if args.group_readable else 0o700
    for path in (folder, folder / "logs"):  # Slurm does not create a log's folder
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
    make_remote(args, repo, folder)
    if args.output == "-" and not args.submit:
        print(text)
        return 0
    path = folder / "array.sbatch" if args.output in (None, "-") else Path(args.output).absolute()
    files.write(path, text + "\n")
    again = sum((folder / str(task) / "tree").is_dir() for task in range(len(tasks_of(args))))
    kind = "nights" if args.workers is None else "workers"
    print(f"{path}: {len(tasks_of(args))} {kind} on {PREFIX}{args.tag}-0 and so on, logs in {folder / 'logs'}")
    if again:
        print(f"note: {again} of these nights have started before and continue with their own program and code")
    if args.workers is None and len(tasks_of(args)) < len(args.programs):
        print(f"note: {names.TEAM_PROGRAM} is left out: its agent feeds workers (--workers) and trains nothing")
    job = submit(path) if args.submit else None
    print(f"submitted: job {job}; scancel {job} ends it" if job else f"next: sbatch {shlex.quote(str(path))}")
    if args.workers is not None:
        given = team(args, repo, folder)
        print(f"to feed them, in a clone: git config {names.TEAM} {given['team']}; git config {names.REMOTE} {shlex.quote(str(given['remote']))}")
    print(f"later: uv run -m lab status --trees {shlex.quote(str(folder / '*' / 'tree'))}")
    return 0
