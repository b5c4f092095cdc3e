"""The records of a night in git, where neither `git clean -fdx` nor a lost folder removes them.

refs/autoresearch/TAG/log is a commit whose tree holds one file a run, 0007/0712-<run_id>.json: the number of the run in
its night, in folders of a hundred, so that a record adds one small file and two short trees to git, however long the
night. Each commit has the one before it as its parent, so `git gc` never removes one, and
`git log -p refs/autoresearch/TAG/log` shows what each record changed.

runs.jsonl is the copy for reading. If the two differ, git's version counts.
"""

import hashlib
import re
import time

from lab.base.errors import Refused
from lab.base.git import GitError, git
from lab.store import names, run_log, runs_jsonl
from lab.store.names import PREFIX

FOLDER = 100  # runs in a folder of the tree
FILE = re.compile(r"\d{4}/(\d{4,})-([\w-]+)\.json", re.ASCII)
# git writes loose objects and refs through to the disk before it reports success, so that they survive a power cut.
DURABLE = ["-c", "core.fsync=loose-object,pack,pack-metadata,reference"]


def ref_of(tag):
    return f"refs/{PREFIX}{tag}/{names.LOG_REF}"


def name_of(run_id):
    """The run's id as a part of a file name."""
    safe = re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII)
    return run_id if safe else f"id-{hashlib.sha256(run_id.encode()).hexdigest()[:32]}"


def content(record):
    return f"{runs_jsonl.line_of(record)}\n".encode()


def blob_of(data, digits):
    """git's name for a file of these bytes, in a repository whose names have this many digits."""
    return hashlib.new("sha1" if digits == 40 else "sha256", b"blob %d\0" % len(data) + data).hexdigest()


def files(top, tag):
    """{name of a run: (its number, its blob)} in the order of the numbers; None if there is no such ref, or it is
    damaged."""
    try:
        listed = git(top, "ls-tree", "-r", "-z", ref_of(tag)).split("\0")
    except GitError:
        return None
    found = []
    for line in filter(None, listed):
        about, path = line.split("\t", 1)
        if match := FILE.fullmatch(path):
            found.append((int(match[1]), match[2], about.split()[2]))
    return {name: (number, blob) for number, name, blob in sorted(found)}


def blobs(top, wanted):
    """{blob: its bytes} of those that git can read."""
    return blobs_in(git(top, "cat-file", "--batch", stdin="".join(f"{blob}\n" for blob in wanted), raw=True))


def blobs_in(shown):
    """{object: its bytes} of what `git cat-file --batch` prints."""
    found, at = {}, 0
    while at < len(shown):
        end = shown.index(b"\n", at)
        blob, *about = shown[at:end].decode().split()
        if len(about) != 2:  # "missing"
            at = end + 1
            continue
        size = int(about[1])
        found[blob] = shown[end + 1 : end + 1 + size]
        at = end + 1 + size + 1
    return found


def completed(top, tag, known, path):
    """The records of a night in their order: those in git, and those of `known` that git does not have yet. A record
    that git cannot read is taken from `known`. known: the records in runs.jsonl, which is at `path`: a record whose
    line is identical in git is not read from there."""
    stored = files(top, tag)
    if not stored:
        return known
    by_name = {name_of(r["run_id"]): r for r in known}
    digits = len(next(iter(stored.values()))[1])
    same = {blob_of(line + b"\n", digits) for line in path.read_bytes().split(b"\n")} if known else set()
    differing = {name: blob for name, (_, blob) in stored.items() if name not in by_name or blob not in same}
    try:
        read = blobs(top, differing.values()) if differing else {}
    except (GitError, ValueError):
        read = {}
    found = {}
    for name in stored:
        record = by_name.get(name)
        if data := read.get(differing.get(name)):
            record = next(iter(runs_jsonl.parse(data.decode(errors="replace"))[0]), record)
        if record and record["tag"] == tag:
            found[name] = record
    return [*found.values(), *(r for name, r in by_name.items() if name not in stored)]


def save(repo, tag, records, changed):
    """Writes those records of the night to the ref that are in `changed` or that it lacks; without a ref, or with a
    damaged one, that is all of them. A second call changes nothing. Returns a sentence for the reader, or None."""
    ref, stored = ref_of(tag), files(repo.top, tag)
    parent = repo.ask("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}") if stored is not None else None
    damaged = parent is None and repo.has_ref(ref)
    stored, changes = stored if parent else {}, []
    number = max((number for number, _ in stored.values()), default=0)
    new = {r["run_id"] for r in changed}
    for record in records:
        name = name_of(record["run_id"])
        if name not in stored:
            number += 1
            changes.append((number, name, content(record)))
        elif record["run_id"] in new:
            old_number, blob = stored[name]
            if blob_of(content(record), len(blob)) != blob:
                changes.append((old_number, name, content(record)))
    if not changes:
        return None
    if damaged:
        repo.remove_ref(ref)
    lines = [f"commit {ref}", f"committer autoresearch <autoresearch@localhost> {int(time.time())} +0000"]
    message = f"{len(changes)} record{'s' * (len(changes) > 1)} of autoresearch/{tag}\n".encode()
    stream = ["\n".join(lines).encode(), b"\ndata %d\n" % len(message), message]
    stream += [f"from {parent}\n".encode()] if parent else []
    for number, name, data in changes:
        path = f"{number // FOLDER:04d}/{number:04d}-{name}.json"
        stream += [f"M 100644 inline {path}\ndata {len(data)}\n".encode(), data, b"\n"]
    repo.git(*DURABLE, "fast-import", "--quiet", "--done", stdin=b"".join([*stream, b"\ndone\n"]))
    return f"{ref} was damaged: it is written anew" if damaged else None


def restored(tag, in_file, records):
    """A sentence on the records that runs.jsonl lacked, or that differed from git's; None if there were none."""
    known = {r["run_id"]: r for r in in_file}
    missing = sum(r["run_id"] not in known for r in records)
    other = sum(r["run_id"] in known and known[r["run_id"]] != r for r in records)
    if not missing and not other:
        return None
    if not known:
        return f"runs.jsonl is gone: its {missing} records are read from {ref_of(tag)}"
    what = [f"{missing} records were missing"] * bool(missing) + [f"{other} differed from git's"] * bool(other)
    return f"in runs.jsonl {' and '.join(what)}: they are read from {ref_of(tag)}"


def run_of_head(repo):
    """Whether run.log is of the present train.py."""
    log, train = run_log.read(repo.top / names.RUN_LOG), repo.top / names.TRAIN
    return bool(log and log.header and train.is_file() and log.header["train_sha256"] == names.sha256(train))


def check_not_lost(repo, tag, records):
    """Refuses a night whose commits are numbered in git and whose records are gone: continuing would judge by a wrong
    best and undo commits that were kept. The latest commit to train.py may be numbered and not recorded if run.log is
    of it: its record was interrupted, and is made again."""
    known = {r["commit"] for r in records}
    lost = {number: commit for number, commit in repo.numbers(tag).items() if commit not in known}
    if not lost:
        return
    edits = [edit.commit for edit in repo.edits()]
    own = edits[:1] if run_of_head(repo) else []
    if not records and not set(lost.values()) <= set(own):
        raise Refused(
            f"the records of this night are lost: {len(lost)} recorded commits are in refs/{PREFIX}{tag}/, but neither "
            f"runs.jsonl nor {ref_of(tag)} is there: copy runs.jsonl back from where you have it, or begin a new "
            f"night: git switch -c {PREFIX}{tag}-2"
        )
    for number, commit in lost.items():
        if commit in edits and commit not in own:
            raise Refused(
                f"the record of row {number:04d} ({commit[:7]}), on which HEAD is based, is lost: copy runs.jsonl back from "
                f"where you have it, or begin a new night from here: git switch -c {PREFIX}{tag}-2"
            )

