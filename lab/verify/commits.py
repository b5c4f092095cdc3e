"""The commits that `lab prove` compares, each in its own folder with the files that a training needs.

An arm is a commit. Its files are extracted from git into .lab/prove/ID/ARM/, so that branch, index and working tree do
not change. Arms are comparable if their rules are identical, byte for byte: the files listed in a recorded run of one of
them, or otherwise constants.py, prepare.py and all of the frozen folders.
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
from lab.share.team import team_of
from lab.store import archive, names, rules, runs_jsonl
from lab.store.repository import Repo

DATASET = "AUTORESEARCH_DATASET"
NEEDED = {*rules.FIRST_FILES, "corpus"}


class Arm(NamedTuple):
    short: str
    commit: str
    top: Path  # a working tree of the repository that has the commit
    code: str  # sha256 of its train.py
    rules: dict  # {path: git's name for the contents} of its frozen files
    listed: set  # paths of the rules in the header of a recorded run of it; empty if that has no list
    description: str
    seconds: float | None  # mean duration of its recorded runs; None if there are none
    dataset: dict  # {DATASET: name} if a run of it, or of one that it is compared with, is recorded, else {}


def find(given, tops):
    """(arms, seeds used so far): the commits with the given names in these working trees; without names, the first
    tree's baseline and best."""
    repos = [Repo.find(top) for top in tops]
    nights = [path for repo in repos for path in (repo.top / names.RUNS_JSONL, *repo.top.glob("runs/**/runs.jsonl"))]
    earlier = [record for path in nights for record in runs_jsonl.read_runs(path)[0]]
    earlier.sort(key=lambda r: dataset_of(r) == os.environ.get(DATASET))
    # The last record of a commit counts: that of the present night, and the first tree's before the others'.
    records = earlier + [record for repo in repos[::-1] for record in present(repo)]
    used = {r["header"]["seed"] for r in records if r.get("header")}
    if not given:
        given = default(repos[0])
    arms = [find_one(name, repos, records) for name in given]
    datasets = [{dataset_of(r) for r in records if r["code"] == arm.code and r["summary"]} for arm in arms]
    if len(set().union(*datasets)) > 1:  # a baseline may be that of several nights, on several datasets
        common = set.intersection(*filter(None, datasets))
        if not common:
            raise Refused("these commits were trained on different datasets: they cannot be compared")
        own = [r for r in records if r["code"] in {arm.code for arm in arms} and r["summary"] and dataset_of(r) in common]
        records = [r for r in records if dataset_of(r) == dataset_of(own[-1])]
        arms = [find_one(arm.commit, repos, records) for arm in arms]
    for arm in arms[1:]:
        paths = arm.listed | arms[0].listed or {*arm.rules, *arms[0].rules}
        if others := sorted(path for path in paths if arm.rules.get(path) != arms[0].rules.get(path)):
            raise Refused(
                f"{arms[0].short} and {arm.short} have different rules or data code ({', '.join(others[:3])}): they cannot "
                "be compared"
            )
    if len({arm.code for arm in arms}) < len(arms):
        raise Refused("two of these commits have the same train.py: name each once")
    known = next((arm.dataset for arm in arms if arm.dataset), {})
    return [arm._replace(dataset=known) for arm in arms], used


def dataset_of(record):
    return (record.get("header") or {}).get("dataset")


def night_of(repo):
    """The Night of the branch; of the team if the tree is in one: the runs of all that compare with its own."""
    tag, team = repo.tag(), team_of(repo)
    return team.night if team else Night(records=archive.records_of(repo.top, tag))


def present(repo):
    """The records of the present night, oldest first; () on a branch that is not a night's."""
    try:
        return night_of(repo).records
    except Refused:
        return ()


def default(repo):
    """The baseline and the best of the present night."""
    history = night_of(repo)
    if not history.kept:
        raise Refused("nothing was kept on this branch yet: name the commits, or record a baseline first")
    baseline, best = min(history.kept, key=lambda r: r["row"]), history.best_record
    return [baseline["commit"]] + [best["commit"]] * (best is not baseline)


def find_one(name, repos, records):
    if not re.fullmatch(r"[\w./@^~-]+", name) or name.startswith("-"):
        raise Refused(f"{name!r} is not a commit")
    for repo in repos:
        commit = repo.ask("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        if commit:
            break
    else:
        raise Refused(f"there is no commit {name}: name one that `git log` shows, or its tree with --tree")
    needed = sorted({*NEEDED, names.TRAIN})
    if not NEEDED <= {*rules.places_in(repo, commit)} or repo.ask("cat-file", "-e", f"{commit}:{names.TRAIN}") is None:
        raise Refused(f"commit {name} lacks one of {', '.join(needed)}: it is not an experiment of this project")
    code = hashlib.sha256(repo.git("show", f"{commit}:train.py", raw=True)).hexdigest()
    own = [r for r in records if r["code"] == code and r["summary"]]
    described = own[-1]["description"] if own else repo.git("log", "-1", "--format=%s", commit).strip()
    seconds = sum(r["summary"]["total_seconds"] for r in own) / len(own) if own else None
    listed = {path for r in own[-1:] for path in rules.listed(r["header"]) or ()}
    dataset = {DATASET: dataset_of(own[-1])} if own else {}
    described = text.one_line(described, 200)
    frozen = rules.objects_of(repo, commit)
    return Arm(repo.short(commit), commit, repo.top, code, frozen, listed, described, seconds, dataset)


def check_out(arm, place):
    """Extracts the arm's files, and nothing else, into a folder of `place`, which it returns. An existing folder is
    replaced, because the code that was trained there last may have changed its files."""
    folder = place / arm.short
    shutil.rmtree(folder, ignore_errors=True)
    building = place / f".{arm.short}.partial"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    repo = Repo(arm.top)
    places = [*rules.places_in(repo, arm.commit), names.TRAIN]
    packed = repo.git("archive", "--format=tar", arm.commit, "--", *places, raw=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(building, filter="data")
    os.replace(building, folder)
    return folder
