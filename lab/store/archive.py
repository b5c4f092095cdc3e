"""The folder of a keep, runs/NNNN-<commit>/: all that is needed to inspect a result, or run it again, later.

train.py, run.log, checkpoint.pt, model_info.txt, git_log.txt, results.tsv as it was; sample_output.txt comes a
little later, from `lab sample` in the background. runs/best is a symbolic link to the best of them (on a system without
links, a text file with its name).
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from lab.base import files
from lab.store import names, records_in_git, run_log, runs_jsonl

LONG_LOG = 16 * 2**20  # bytes; of a longer run.log the beginning and the end are archived


def make(repo, record, table):
    """Archives the record's run and returns a note for the reader, or None. Safe to repeat: the folder is built beside
    its place, and moved in once all of it is on the disk, so that a power cut leaves no archive with empty files."""
    runs = repo.top / names.RUNS
    place, building = runs / names.archive(record), runs / f".{names.archive(record)}.partial"
    if place.exists():
        return None
    building.mkdir(parents=True, exist_ok=True)
    missing = move_checkpoint(repo.top / names.CHECKPOINT, building / names.CHECKPOINT, record["run_id"])
    aside = repo.top / names.LAB / names.ASIDE / names.CHECKPOINT
    if missing and aside.exists():  # a sandbox that hid it from another program was killed before it put it back
        missing = move_checkpoint(aside, building / names.CHECKPOINT, record["run_id"])
    files.write(building / names.TRAIN, repo.git("show", f"{record['commit']}:train.py", raw=True))
    log = run_log.read(repo.top / names.RUN_LOG)
    if log and log.identity == record["log"]:
        copy_log(repo.top / names.RUN_LOG, building / names.RUN_LOG)
    files.write(building / "git_log.txt", repo.git("log", "-1", "--stat", "--format=fuller", record["commit"]))
    files.write(building / "model_info.txt", model_info(record))
    files.write(building / names.RESULTS_TSV, table)
    os.replace(building, place)
    return missing


def move_checkpoint(source, target, run_id):
    """Moves the checkpoint of this run; returns why none was archived, or None. It is moved because a copy may not fit
    on the disk, and the next run writes another."""
    if target.exists():
        return None
    try:
        with zipfile.ZipFile(source) as archive:
            pickled = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    except FileNotFoundError:
        return "there is no checkpoint.pt: none is archived"
    except (zipfile.BadZipFile, OSError) as error:
        return f"checkpoint.pt cannot be read ({error}): not archived"
    if not any(run_id.encode() in data for data in pickled):
        return "checkpoint.pt is another run's: not archived"
    files.flush(source)
    try:
        os.replace(source, target)
    except OSError:  # runs/ is on another file system
        partial = target.with_name(f"{names.CHECKPOINT}.tmp")
        shutil.copyfile(source, partial)
        files.flush(partial)
        os.replace(partial, target)
        source.unlink()
    return None


def copy_log(source, target):
    with open(source, "rb") as f, open(target, "wb") as out:
        size = os.fstat(f.fileno()).st_size
        if size > LONG_LOG:
            out.write(f.read(LONG_LOG // 2))
            out.write(f"\n... {size - LONG_LOG} bytes are left out here ...\n".encode())
            f.seek(size - LONG_LOG // 2)
        shutil.copyfileobj(f, out)
    files.flush(target)


def model_info(record):
    """What is known of the model, one fact a line."""
    facts = {key: record[key] for key in ("commit", "parent", "description", "mean", "n", "sigma", "start", "end")}
    facts |= record["summary"] or {}
    facts |= {key: value for key, value in (record["header"] or {}).items() if key not in facts}
    return "".join(f"{key}: {value}\n" for key, value in facts.items() if value is not None)


def point_best(top, name):
    """Points runs/best at the archive `name`, atomically."""
    best, beside = top / names.RUNS / names.BEST, top / names.RUNS / ".best.tmp"
    beside.unlink(missing_ok=True)
    try:
        os.symlink(name, beside, target_is_directory=True)
    except (OSError, NotImplementedError):
        beside.write_text(name)
    os.replace(beside, best)


def sample_in_background(top, name):
    """Starts `lab sample` for the archive and does not wait for it. It may fail: nothing depends on it."""
    place = top / names.RUNS / name
    wanted = (top / "lab" / "verify" / "sample.py").is_file() and (place / names.CHECKPOINT).is_file()
    if not wanted or os.environ.get("AUTORESEARCH_NO_SAMPLE") or (place / names.SAMPLE).exists():
        return
    command = [sys.executable, "-m", "lab", "sample", f"runs/{name}", "--output", f"runs/{name}/sample_output.txt"]
    if nice := shutil.which("nice"):
        command = [nice, "-n", "19", *command]
    try:
        with open(top / names.LAB / names.SAMPLE_LOG, "w") as log:
            subprocess.Popen(
                command, cwd=top, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
    except OSError:
        pass


# ---------------------------------------------------------------------------------------------------
# Another branch's night in the same tree


def place_of(top, tag):
    """Where this branch's runs.jsonl is or will be: in the tree, or in runs/TAG while another branch's is in the tree."""
    here = top / names.RUNS_JSONL
    records, _ = runs_jsonl.read_runs(here)
    away = top / names.RUNS / tag / names.RUNS_JSONL
    is_here = bool(records) and records[-1]["tag"] == tag
    return here if is_here or not away.exists() else away


def records_of(top, tag):
    """The records of a branch, oldest first: runs.jsonl's, and those that only git has."""
    return records_in_git.completed(top, tag, in_file(top, tag), place_of(top, tag))


def in_file(top, tag):
    """The records of a branch in runs.jsonl; what is not a whole record is left out."""
    found = runs_jsonl.read_runs(place_of(top, tag))[0]
    return [record for record in found if record["tag"] == tag and runs_jsonl.whole(record)]


def change_branch(top, tag):
    """Moves what another branch left (results.tsv, runs.jsonl, archives) to runs/ITS-TAG, and restores what this branch
    left. Safe to repeat: runs.jsonl, which says whose files they are, is moved last."""
    records, _ = runs_jsonl.read_runs(top / names.RUNS_JSONL)
    theirs = records[-1]["tag"] if records else tag
    if theirs != tag:
        move_night(top, top / names.RUNS, top / names.RUNS / theirs, top / names.RUNS / theirs)
    if (away := top / names.RUNS / tag / names.RUNS_JSONL).exists() and not (top / names.RUNS_JSONL).exists():
        move_night(away.parent, away.parent, top, top / names.RUNS)
    return f"runs/{theirs} now holds what branch autoresearch/{theirs} left" if theirs != tag else None


def move_night(source, source_runs, target, target_runs):
    target.mkdir(parents=True, exist_ok=True)
    numbered = Path(source_runs).glob("[0-9][0-9][0-9][0-9]-*")  # a night's folder may match too: tag 2026-nov21
    archives = [p for p in numbered if not (p / names.RUNS_JSONL).exists()] + [Path(source_runs) / names.BEST]
    for path in archives:
        if os.path.lexists(path):
            os.replace(path, target_runs / path.name)
    for name in (names.RESULTS_TSV, names.RUNS_JSONL):
        if (source / name).exists():
            os.replace(source / name, target / name)
