"""A team with a queue and made-up trainings: an agent's working tree, workers' trees beside it.

    agent = Proposer(tmp_path / "agent")        on autoresearch/test, member of the team "gpus"
    agent.propose("more A", A=0.01)             edits train.py, commits, proposes
    tree = agent.worktree("w1")                 a tree for a worker
    tree.work(until=...)                        runs a worker in this process, step by step
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import fake_training
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

    def start_worker(self, *args, **env):
        """A worker as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "lab", "work", "--no-sandbox", *args], cwd=self.path, env=self.env | env,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

