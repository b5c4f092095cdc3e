"""Run in a mount namespace of its own: a worker whose checkout is on a disk that is full for a while.

    unshare -rm python tests/full_disk.py FOLDER MOMENT      FOLDER/agent: a Proposer's tree that has published, FOLDER/hub.git

MOMENT: begin (it is full when the worker starts), train (it fills while the training runs).
Prints JSON: what the worker said, its exit status, what became of the proposals, the worker's records.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fakequeue import Proposer
from faketeam import Teammate

PATIENCE = 200  # seconds
SLOW = """
from lab.queue import work
work.LONGEST_BACKOFF, work.BACKOFF, work.REMOTE_POLL = 2, 1, 1.0
from lab.__main__ import main
import sys
sys.exit(main(["work", "--no-sandbox"]))
"""


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


def fill(place):
    """Leaves no byte on the disk."""
    with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as f:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    f.write(b"x" * size)


def main():
    folder, moment = Path(sys.argv[1]), sys.argv[2]
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)], check=True)
    agent = Teammate.__new__(Proposer)
    agent.path, agent.who = folder / "agent", ["-c", "user.name=Some One", "-c", "user.email=one@example.org"]
    agent.env, agent.start, agent.ideas, agent.constants = dict(os.environ), sys.argv[3], 0, {}
    tree = agent.clone("disk/w1", folder / "hub.git", branch="w1")
    said = tree.path / "night.log"

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", SLOW], cwd=tree.path, env=tree.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    first, filler = None, disk / "filler"
    if moment == "begin":
        fill(disk)
        first = subprocess.run([sys.executable, "-m", "lab", "work", "--no-sandbox"], cwd=tree.path, env=tree.env, capture_output=True, text=True)
        filler.unlink()
    process = start()
    try:
        until(lambda: (tree.path / "run.log").exists() and "run: {" in (tree.path / "run.log").read_text())
        if moment == "train":
            fill(disk)
            time.sleep(8)  # it may do in this time what it likes, and must lose nothing
            filler.unlink()
        until(lambda: all(item.kind in ("decided", "returned") for item in agent.queue.items))
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    records = tree.records()
    print(json.dumps({
        "said": out, "status": process.returncode, "kinds": agent.kinds(), "first": first and [first.returncode, first.stdout, first.stderr], "verdicts": [r["verdict"] for r in records],
        "texts": [item.state["text"] for item in agent.queue.of("returned")],
        "rows": len(tree.rows()), "same": tree.records_in_git() == records, "fsck": tree.git("fsck", "--strict", check=False),
        "log": said.read_text(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
