"""Learning rate, momentum and weight decay are functions of progress alone, and none of them starts a run at zero."""

from types import SimpleNamespace

import pytest
from test_model import train_on

import train

GRID = [i / 1000 for i in range(1001)]


@pytest.fixture
def lrs(monkeypatch):
    """lrs(...): the multipliers over a run with these hyperparameters."""

    def values(warmup=0.0, start=0.1, warmdown=0.5, final=0.0):
        knobs = dict(WARMUP_RATIO=warmup, WARMUP_START=start, WARMDOWN_RATIO=warmdown, FINAL_LR_FRAC=final)
        for name, value in knobs.items():
            monkeypatch.setattr(train, name, value)
        return [train.lr_multiplier(p) for p in GRID]

    return values


def rises(values):
    return all(a < b for a, b in zip(values, values[1:], strict=False))


def test_learning_rate_hits_its_end_points(lrs):
    values = lrs(warmup=0.2, start=0.1, warmdown=0.5, final=0.05)
    assert values[0] == pytest.approx(0.1)
    assert values[100] == pytest.approx(0.55)  # half-way up
    assert values[200] == values[350] == values[500] == 1.0
    assert values[750] == pytest.approx(0.525)  # half-way down
    assert values[1000] == pytest.approx(0.05)


def test_learning_rate_rises_then_holds_then_falls(lrs):
    values = lrs(warmup=0.2, start=0.1, warmdown=0.5, final=0.05)
    assert rises(values[:201])
    assert set(values[200:501]) == {1.0}
    assert rises(values[500:][::-1])


def test_without_warmdown_it_stays_up_to_the_end(lrs):
    assert set(lrs(warmdown=0.0)) == {1.0}


def test_with_a_warmdown_of_everything_it_falls_from_the_first_step(lrs):
    values = lrs(warmdown=1.0, final=0.25)
    assert values[0] == 1.0 and values[-1] == pytest.approx(0.25) and rises(values[::-1])


@pytest.mark.parametrize("warmup", [0.0, 0.001, 0.1, 0.5])
def test_learning_rate_is_not_zero_at_the_first_step(warmup, monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", warmup)
    group = dict(kind="adamw", initial_lr=0.6, lr=0.0)
    assert train.set_schedules(SimpleNamespace(param_groups=[group]), progress=0) >= 0.01
    assert group["lr"] >= 0.006


def muon_at(progress):
    group = dict(kind="muon", initial_lr=0.04)
    multiplier = train.set_schedules(SimpleNamespace(param_groups=[group]), progress)
    assert group["lr"] == pytest.approx(0.04 * multiplier)
    return group


def test_momentum_goes_from_one_end_to_the_other_within_its_share_of_the_run():
    start, end = train.MUON_MOMENTUM
    over = train.MUON_MOMENTUM_RAMP
    assert 0.15 <= over <= 0.3
    assert muon_at(0)["momentum"] == pytest.approx(start)
    assert muon_at(over / 2)["momentum"] == pytest.approx((start + end) / 2)
    assert muon_at(over)["momentum"] == muon_at(1)["momentum"] == pytest.approx(end)
    assert rises([muon_at(over * i / 10)["momentum"] for i in range(11)])


def test_weight_decay_falls_linearly_to_zero():
    decay = [muon_at(p)["weight_decay"] for p in (0, 0.25, 0.5, 1)]
    assert decay == pytest.approx([train.WEIGHT_DECAY * share for share in (1, 0.75, 0.5, 0)])


@pytest.mark.parametrize("gpu", [True, False])
def test_the_defaults_start_at_the_full_learning_rate_and_end_low(gpu):
    defaults = train_on(gpu)
    assert max(defaults.lr_multiplier(p) for p in GRID) == defaults.lr_multiplier(0) == 1.0
    assert defaults.lr_multiplier(1.0) <= 0.2
    assert {defaults.batch_schedule(p) for p in GRID} == {(defaults.TOTAL_BATCH_SIZE, defaults.MAX_SEQ_LEN)}


def test_a_ramp_of_length_zero_is_at_its_end():
    assert train.ramp(0.0, 0.0, 0.85, 0.95) == train.ramp(1.0, 0.0, 0.85, 0.95) == 0.95
