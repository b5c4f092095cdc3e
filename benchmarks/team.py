"""How long `lab status` takes in a team of many members, and publishing to their one remote.

    uv run benchmarks/team.py [--members 64] [--rows 100]

Makes a team out of nothing: a repository with real commits and records, no training. Each member's ref is in a bare
repository, from which a clone fetches. Prints seconds and CPU seconds: the first status, which fetches and checks everything; later ones;
and one record of that clone, which is judged by all of them.
"""

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faketeam import Teammate  # noqa: E402


def make(first, hub, members, rows):
    """Pushes `members` refs with `rows` records each to the hub."""
    base, train = first.records()[-1], (ROOT / "train.py").read_text()
    start, rng = datetime.now(timezone.utc) - timedelta(hours=9), random.Random(1)
    git = ["git", "-C", str(hub)]
    subprocess.run([*git, "fetch", "-q", str(first.path), "+refs/heads/*:refs/heads/*"], check=True)
    stream, texts = [], []
    for m in range(members):
        for i in range(rows):
            text = f"# member {m}, experiment {i}\n{train}".encode()
            texts.append(text)
            ref = f"refs/tmp/{m}-{i}".encode()
            stream.append(
                b"reset %s\nfrom %s\n\ncommit %s\ncommitter x <x@x> 1700000000 +0000\ndata 1\nx\n"
                b"M 100644 inline train.py\ndata %d\n%s\n\n" % (ref, base["commit"].encode(), ref, len(text), text)
            )
    subprocess.run([*git, "fast-import", "--quiet"], input=b"".join(stream), check=True)
    listed = subprocess.run([*git, "for-each-ref", "--format=%(refname) %(objectname)", "refs/tmp"], capture_output=True, text=True)
    commits = dict(line.split() for line in listed.stdout.splitlines())
    asked = "".join(f"{commit}:train.py\n" for commit in commits.values())
    blobs = subprocess.run([*git, "cat-file", "--batch-check"], input=asked, capture_output=True, text=True).stdout.splitlines()
    blob_of = {commit: line.split()[0] for commit, line in zip(commits.values(), blobs, strict=True)}
    stream = []
    for m in range(members):
        ref = f"refs/autoresearch-team/gpus/{m:012x}/tree{m}"
        own, files = [commits[f"refs/tmp/{m}-{i}"] for i in range(rows)], []
        for i in range(rows):
            when = start + timedelta(seconds=300 * i + rng.random() * 200)
            value = 0.99 - 0.0004 * i + rng.random() * 0.02
            text = texts[m * rows + i]
            record = base | {
                "run_id": hashlib.md5(f"{m}-{i}".encode()).hexdigest(), "tag": f"tree{m}", "commit": own[i], "short": own[i][:7],
                "row": i + 1, "verdict": "keep" if rng.random() < 0.15 else "discard", "parent": base["commit"],
                "description": f"experiment {i} of member {m}: something wider, something deeper", "mean": value, "n": 1,
                "code": hashlib.sha256(text).hexdigest(), "blob": blob_of[own[i]], "baseline": False, "seq": i + 1, "beat": "x",
                "start": when.isoformat(timespec="seconds"), "end": (when + timedelta(seconds=290)).isoformat(timespec="seconds"),
                "header": base["header"], "summary": base["summary"] | {"val_bpb": value}, "simpler": False,
            }  # fmt: skip
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            files.append(b"M 100644 inline %04d/%04d-%s.json\ndata %d\n%s\n" % (
                (i + 1) // 100, i + 1, record["run_id"].encode(), len(line), line))  # fmt: skip
        for at in range(0, rows, 12):
            parents = b"".join(b"merge %s\n" % commit.encode() for commit in own[at : at + 12])
            stream.append(b"commit %s\ncommitter x <x@x> 1700000000 +0000\ndata 0\n%s" % (ref.encode(), parents))
            stream += [] if at else files
            stream.append(b"\n")
    subprocess.run([*git, "fast-import", "--quiet", "--force"], input=b"".join(stream), check=True)
    deleted = "".join(f"delete {ref}\n" for ref in commits)
    subprocess.run([*git, "update-ref", "--stdin"], input=deleted, text=True, check=True)


def timed(what, call):
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{what}: {time.monotonic() - began:.2f} s, of it {cpu:.2f} s CPU", flush=True)
    assert result.rc == 0, result.err
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--rows", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first = Teammate(Path(folder) / "first", team=None)
        first.baseline()
        hub = first.hub()
        began = time.monotonic()
        make(first, hub, args.members, args.rows)
        print(f"made {args.members} members of {args.rows} rows in {time.monotonic() - began:.1f} s")
        first.git("config", "autoresearch.team", "gpus")
        first.git("config", "autoresearch.remote", str(hub))
        out = timed("first status, which fetches and checks all", lambda: first.lab("status", timeout=600)).out
        timed("status again", lambda: first.lab("status", timeout=600))
        first.change_train()
        first.commit("wider")
        first.run(0.9)
        timed("record, published to the remote", lambda: first.lab("record", "wider", timeout=600))
        timed("status after it", lambda: first.lab("status", timeout=600))
        print(out)


if __name__ == "__main__":
    main()
