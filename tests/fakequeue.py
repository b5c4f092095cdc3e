"""A team with a queue and made-up trainings: an agent's working tree, workers' trees beside it.

    agent = Proposer(tmp_path / "agent")        on autoresearch/test, member of the team "gpus"
    agent.propose("more A", A=0.01)             edits train.py, commits, proposes
    tree = agent.worktree("w1")                 a tree for a worker
    tree.work()                                 runs a worker in this process, step by step
    tree.killed("settle")                       the same, killed when it is about to publish its first verdict
"""

import os
import re
import subprocess
import sys
from contextlib import contextmanager

import fake_training
import pytest
from faketeam import Teammate

from lab.loop import checks
from lab.queue.board import Board
from lab.queue.work import Worker
from lab.share import exchange


@contextmanager
def inside(tree):
    """The tree as the working directory, with its environment."""
    before, environment = os.getcwd(), dict(os.environ)
    os.chdir(tree.path)
    os.environ.update(tree.env)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)


def scores(worker, val_bpb):
    """From now on the worker's trainings end with this val_bpb."""
    train, log = worker.train, worker.repo.top / "run.log"

    def trained(seed):
        status = train(seed)
        log.write_text(re.sub(r"val_bpb: .*", f"val_bpb:          {val_bpb:.6f}", log.read_text()))
        return status

    worker.train = trained


class Proposer(Teammate):
    def __init__(self, path, **constants):
        super().__init__(path)
        self.git("config", "user.name", "Some One")
        self.git("config", "user.email", "one@example.org")
        self.git("switch", "-q", "main")
        self.constants = constants
        (self.path / "train.py").write_text(fake_training.train(**constants))
        self.start = self.commit("a made-up training")
        self.git("switch", "-q", "-C", "autoresearch/test", "main")

    def edit(self, **constants):
        (self.path / "train.py").write_text(fake_training.train(**(self.constants | constants)))

    def idea(self, description="an idea", **constants):
        self.edit(**constants)
        return self.commit(description)

    def proposed(self, description, *args, **constants):
        self.idea(description, **constants)
        result = self.lab("propose", description, *args)
        assert result.rc == 0, result.err
        return result

    def simplified(self, **constants):
        """Proposes a train.py that is three lines shorter, which the rule wants to see twice."""
        self.edit(**constants)
        (self.path / "train.py").write_text(self.read("train.py").replace(fake_training.GAP, "#\n", 1))
        self.commit("three lines less")
        result = self.lab("propose", "three lines less", "--simpler")
        assert result.rc == 0, result.err

    def publish(self):
        """What `lab record` does after each record."""
        repo = self.repo
        assert exchange.publish(repo, checks.member_of(repo), "test", exchange.state_of(repo, "test")) is None

    # --- the queue, in this process ---

    @property
    def queue(self):
        repo = self.repo
        board = Board(repo, checks.member_of(repo))
        return board.look(fresh=0)

    def kinds(self):
        """{description: kind, or the verdict where there is one}"""
        return {item.state["description"]: item.state["verdict"] or item.kind for item in self.queue.items}

    def worker(self, hours=1, **options):
        repo = self.repo
        (self.path / ".lab").mkdir(exist_ok=True)
        member = checks.member_of(repo)
        (self.path / ".lab" / "worker.lock").write_text(member.name)
        worker = Worker(repo, member, hours, **options)
        look = worker.board.look
        worker.board.look = lambda fresh=0: look(fresh=0)  # nothing that is two seconds old
        worker.said_all = []
        say = worker.say
        worker.say = lambda sentence, once=False: (worker.said_all.append(sentence), say(sentence, once))[1]
        return worker

    def work(self, most=50, **options):
        """Runs a worker in this process until it finds nothing to do; the Worker."""
        with inside(self):
            worker = self.worker(**options)
            worker.begin()
            for _ in range(most):
                if not worker.step() and not worker.board.note:  # a note: the remote was gone a moment ago
                    worker.leave()
                    return worker
        raise AssertionError(f"{most} steps: {worker.said_all}")

    def killed(self, moment):
        """Runs a worker up to its first call of the method `moment`, at which it is killed."""

        def kill(*args):
            raise KeyboardInterrupt

        with inside(self):
            worker = self.worker()
            worker.begin()
            setattr(worker, moment, kill)
            with pytest.raises(KeyboardInterrupt):
                worker.step()

    def start_worker(self, *args, **env):
        """A worker as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "lab", "work", "--no-sandbox", *args], cwd=self.path, env=self.env | env,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

