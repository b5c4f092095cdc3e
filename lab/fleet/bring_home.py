"""Moves a slot's results from its working tree to runs/TAG-gpuK of the checkout, then removes the tree. `lab record`
and `lab status` look there for the night of a branch that was recorded in another tree.

Everything that git does not track is moved, except what can be regenerated. The files are collected under a temporary
name, compared with the originals, and renamed into place. Every step can be killed; the next call completes it.
"""

import errno
import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path

from lab.base import locks
from lab.base.errors import Refused, Stop, Unfinished
from lab.base.files import write
from lab.fleet import worktrees
from lab.store import archive, journal, names, run_log
from lab.store.names import PREFIX
from lab.store.repository import Repo

TRASH = {".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"}  # can be regenerated
LAST_CHECKPOINT = {names.CHECKPOINT, f"{names.CHECKPOINT}.tmp"}  # of a recorded run: that of a keep is in runs/
NOTE = "fleet.json"  # in the target folder: the slot's state, and the size of each file


def errors_of(slot):
    """The path of the file for a keeper's own errors, quoted for a shell."""
    return shlex.quote(str(Path(slot["folder"], names.LAB, names.FLEET_ERRORS)))


def last_words(slot):
    """The last line that the slot's keeper left behind."""
    for name in (Path(names.LAB, names.FLEET_ERRORS), names.NIGHT_LOG):
        path = Path(slot["folder"], name)
        if path.exists() and (lines := path.read_text(errors="replace").split("\n")) and any(lines):
            return [line for line in lines if line.strip()][-1][:300]
    return "it printed nothing"


def tag_of(slot):
    return slot["branch"][len(PREFIX) :]


def home_of(repo, slot):
    return repo.top / names.RUNS / tag_of(slot)


def is_home(repo, slot):
    """Whether the results of this very slot were moved already."""
    try:
        note = json.loads((home_of(repo, slot) / NOTE).read_text(encoding="utf-8"))
    except OSError:
        return False
    return note["folder"] == slot["folder"] and note["start"] == slot["start"]


def check(repo, slot):
    """Raises Refused if anything would be lost or is unfinished."""
    folder, home = Path(slot["folder"]), home_of(repo, slot)
    if not slot["made"] or (is_home(repo, slot) and not (folder / ".git").exists()):
        return
    if home.exists() and not is_home(repo, slot):
        raise Refused(f"{home} holds another night: move it away")
    worktrees.check_made(repo, slot)
    if locks.run_in_progress(folder):
        raise Refused(f"a run is in progress in {folder}: wait for it, or end it")
    if changed := Repo(folder).git("status", "--porcelain", "--untracked-files=no").split("\n")[0][3:]:
        raise Refused(f"{changed} in {folder} has uncommitted changes: commit them there, or git checkout -- {changed}")
    if journal.read(folder) != (None, False):  # a damaged one, too, holds a record that was interrupted
        raise Refused(f"a record was interrupted in {folder}: there, uv run -m lab record")
    log, records = run_log.read(folder / names.RUN_LOG), archive.records_of(folder, tag_of(slot))
    if log and log.ended in ("complete", "crash") and log.header:
        if all(r["run_id"] != log.run_id for r in records):
            raise Refused(f"the last run in {folder} is not recorded: there, uv run -m lab record, or delete run.log")


def untracked(folder):
    """Relative paths of everything that git does not track there. A folder without tracked files is one path, except
    runs/, whose entries are listed one by one."""
    listed = Repo(folder).git("status", "--porcelain", "--ignored", "--untracked-files=normal", "-z")
    paths = [Path(entry[3:]) for entry in listed.split("\0") if entry[:2] in ("??", "!!")]
    paths = [path for path in paths if not TRASH & set(path.parts) and str(path) not in LAST_CHECKPOINT]
    inside = [Path(names.RUNS, name) for name in os.listdir(folder / names.RUNS)] if Path(names.RUNS) in paths else []
    return [path for path in paths if path != Path(names.RUNS)] + inside


def target_of(path):
    """The path in the target folder of a path in the tree: runs/0001-1a2b3c4 becomes 0001-1a2b3c4."""
    return Path(*path.parts[1:]) if path.parts[0] == names.RUNS else path


def digest(path):
    """The content of a file, a link or a folder: {relative path: sha256 or target of the link}."""
    if path.is_dir() and not path.is_symlink():
        return {str(Path(child.name, k)): v for child in path.iterdir() for k, v in digest(child).items()}
    if path.is_symlink():
        return {"": os.readlink(path)}
    content = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            content.update(part)
    return {"": content.hexdigest()}


def sizes(path):
    """Sizes in bytes: {relative path: size} of the files and links below a folder; {"": size} of a file or a link."""
    if path.is_symlink() or not path.is_dir():
        return {"": path.lstat().st_size}
    return {str(Path(child.name, name)): size for child in path.iterdir() for name, size in sizes(child).items()}


def move(source, target):
    """Renames, or, to another file system, copies, compares and removes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        try:
            return os.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        partial = target.with_name(f"{target.name}.copying")
        remove(partial)
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, partial, symlinks=True)
        else:
            shutil.copy2(source, partial, follow_symlinks=False)
        os.sync()  # the copy must be on disk before the original is removed
        os.rename(partial, target)
    if digest(source) != digest(target):
        raise Refused(f"{target} differs from {source}: move it away")
    remove(source)


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def bring_home(repo, state, slot):
    """Moves the slot's results and removes its working tree. The slot must have passed check()."""
    folder, home = Path(slot["folder"]), home_of(repo, slot)
    if not slot["made"]:
        if worktrees.registered(repo, folder):
            worktrees.drop_half_made(repo, folder)
        return
    if not is_home(repo, slot):
        move_results(state, slot, folder, home)
    if (folder / ".git").exists():
        for path in [folder / ".venv", *(folder / name for name in LAST_CHECKPOINT)]:
            if path.is_symlink() or path.is_file():
                path.unlink()
        try:
            repo.git("worktree", "remove", str(folder))  # git refuses if any file is left
        except Stop as stop:
            raise Unfinished(f"{folder}: {stop}; the results are in {home}: the same command resumes") from None


def move_results(state, slot, folder, home):
    building = home.parent / f".{home.name}.partial"
    building.mkdir(parents=True, exist_ok=True)
    for path in list(building.rglob("*.copying")):
        remove(path)
    paths, expected = untracked(folder), sizes(building)
    for path in paths:
        expected |= {str(target_of(path) / name): size for name, size in sizes(folder / path).items()}
    for path in paths:
        move(folder / path, building / target_of(path))
    there = sizes(building)
    if wrong := [name for name, size in expected.items() if there.get(name) != size]:
        raise Unfinished(f"{building / wrong[0]} is not complete: the same command resumes")
    about = {key: state[key] for key in ("tag", "agent", "settings")}
    write(building / NOTE, json.dumps({**about, **slot, "files": expected}, indent=1, ensure_ascii=False))
    os.rename(building, home)
