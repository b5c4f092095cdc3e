"""A run in the test's own process: prepare.py of a copy of the repo, over a small climbmix, on a clock that stands
still until the test moves it. `from begun import run` makes the fixture known."""

import signal

import pytest
import torch


class Uniform(torch.nn.Module):
    """Every token is as likely as any other."""

    def __init__(self, vocab_size=512):
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x):
        return self.level.expand(*x.shape, -1)


class Run:
    def __init__(self, repo, prepare):
        self.repo, self.prepare = repo, prepare
        self.seconds = 1000.0

    def begin(self, **kwargs):
        times = {"now": lambda: self.seconds, "watchdog_now": lambda: 0.0}
        self.clock = self.prepare.begin_run(self.repo.path / "train.py", **(times | kwargs))
        self.tokenizer = self.prepare.load_tokenizer()
        return self.clock

    def start(self, model=None, batch_size=8):
        self.clock.start(model or Uniform(), batch_size)

    def steps(self, seconds_each, until):
        """Steps of that many seconds, up to so many seconds of training."""
        began = self.seconds
        for i in range(1, round((until - self.clock.training_seconds()) / seconds_each) + 1):
            self.seconds = began + i * seconds_each
            self.clock.progress()

    def evaluate(self, model, batch_size=8):
        """val_bpb of the model, at the end of a run that was as it should be but for the model."""
        self.begin()
        self.start(batch_size=batch_size)
        self.steps(1, until=self.prepare.TIME_BUDGET)
        return self.prepare.evaluate_bpb(model, self.tokenizer, batch_size)


@pytest.fixture
def run(make_repo, import_prepare, prepared_climbmix):
    repo = make_repo("climbmix", time_budget=300)
    repo.copy_cache(prepared_climbmix)
    prepare = import_prepare(repo)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Run(repo, prepare)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if prepare._run:
        prepare._run.close()
