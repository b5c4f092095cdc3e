"""What `lab prove` compares: commits, each as a folder of its own with the files that a training needs.

An arm is a commit. Its files come out of git into .lab/prove/ID/ARM/, so that branch, index and working tree stay as
they are. Arms are comparable where their rules (constants.py, prepare.py, corpus/) are the same, byte for byte.
"""

import hashlib
import io
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import NamedTuple

from lab.analysis.history import Night
from lab.base import text
from lab.base.errors import Refused
from lab.base.git import GitError
from lab.store import archive, names, runs_jsonl
from lab.store.repository import Repo

FILES = [names.CONSTANTS, "prepare.py", "corpus", names.TRAIN]


class Arm(NamedTuple):
    short: str
    commit: str
    top: Path  # a working tree of the repository that has the commit
    code: str  # sha256 of its train.py
    rules: str  # sha256 over the other files
    description: str
    seconds: float | None  # that a run of it took in all, where one is recorded
    dataset: dict  # {"AUTORESEARCH_DATASET": name}, where a run of it is recorded


def find(given, tops):
    """(arms, seeds used so far): what the given names mean in these working trees; the first tree's baseline and best
    if there are none."""
    repos = [Repo.find(top) for top in tops]
    nights = [path for repo in repos for path in (repo.top / names.RUNS_JSONL, *repo.top.glob("runs/**/runs.jsonl"))]
    records = [record for path in nights for record in runs_jsonl.read_runs(path)[0]]
    if not given:
        given = default(repos[0])
    arms = [find_one(name, repos, records) for name in given]
    for arm in arms[1:]:
        if arm.rules != arms[0].rules:
            raise Refused(f"{arms[0].short} and {arm.short} have other rules or data code: they cannot be compared")
    if len({arm.code for arm in arms}) < len(arms):
        raise Refused("two of these commits have the same train.py: name each once")
    if len({arm.dataset["AUTORESEARCH_DATASET"] for arm in arms if arm.dataset}) > 1:
        raise Refused("these commits were trained on different datasets: they cannot be compared")
    return arms, {r["header"]["seed"] for r in records if r.get("header")}


def default(repo):
    tag = repo.tag()
    history = Night(records=archive.records_of(repo.top, tag))
    if not history.kept:
        raise Refused("nothing was kept on this branch yet: name the commits, or record a baseline first")
    baseline, best = min(history.kept, key=lambda r: r["row"]), history.best_record
    return [baseline["commit"]] + [best["commit"]] * (best is not baseline)


def find_one(name, repos, records):
    if not re.fullmatch(r"[\w./@^~-]+", name) or name.startswith("-"):
        raise Refused(f"{name!r} is no commit")
    for repo in repos:
        commit = repo.ask("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        if commit:
            break
    else:
        raise Refused(f"there is no commit {name}: name one that `git log` shows, or its tree with --tree")
    try:
        objects = [repo.git("rev-parse", f"{commit}:{file}").strip() for file in FILES]
    except GitError:
        raise Refused(f"commit {name} lacks one of {', '.join(FILES)}: it is no experiment of this project") from None
    code = hashlib.sha256(repo.git("show", f"{commit}:train.py", raw=True)).hexdigest()
    own = [r for r in records if r["code"] == code and r["summary"]]
    described = own[-1]["description"] if own else repo.git("log", "-1", "--format=%s", commit).strip()
    seconds = sum(r["summary"]["total_seconds"] for r in own) / len(own) if own else None
    rules = hashlib.sha256("".join(objects[:-1]).encode()).hexdigest()
    dataset = {"AUTORESEARCH_DATASET": own[-1]["header"]["dataset"]} if own else {}
    described = text.one_line(described, 200)
    return Arm(repo.short(commit), commit, repo.top, code, rules, described, seconds, dataset)


def check_out(arm, place):
    """The arm's files, and nothing else, in a folder of `place`: built beside it and moved in. Every time anew, as the
    code that was trained there last may have changed them."""
    folder = place / arm.short
    shutil.rmtree(folder, ignore_errors=True)
    building = place / f".{arm.short}.partial"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    packed = Repo(arm.top).git("archive", "--format=tar", arm.commit, "--", *FILES, raw=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(building, filter="data")
    os.replace(building, folder)
    return folder
