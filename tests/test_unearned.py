"""Unearned bits: honest models have none, or an interval that passes; a leak worth 0.001 bpb is found in every run."""
# ruff: noqa: F401, F811 (run is a fixture)

import importlib
import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from begun import run

V, T, B, R = 256, 128, 8, 128
BYTES = np.full(V, 3, dtype=np.int32)
BITS = math.log(2) * 3  # nats a target that make one bit per byte


@pytest.fixture(scope="module")
def text():
    """(rows, log-probabilities): random walks over a random table (V, V), which predicts them as well as can be."""
    random = np.random.default_rng(0)
    table = torch.from_numpy(random.normal(size=(V, V)) * 2.5).float().log_softmax(-1)
    table[:, V - 4 :] = -30
    cumulative = table.exp().double().cumsum(-1).numpy()
    rows = np.zeros((R, T + 1), dtype=np.int64)
    rows[:, 0] = random.integers(V - 4, size=R)
    for p in range(T):
        u = random.random(R)[:, None] * cumulative[rows[:, p], -1:]
        rows[:, p + 1] = (cumulative[rows[:, p]] < u).sum(-1).clip(max=V - 5)
    return rows.astype(np.uint16), table


@pytest.fixture
def audited(run, text, monkeypatch):
    """audited(model, draw) -> the sentence of the refusal, or None."""
    audit, metric = importlib.import_module("frozen.audit"), importlib.import_module("frozen.metric")
    monkeypatch.setattr(metric, "VOCAB_SIZE", V)
    monkeypatch.setattr(audit, "NUM_ORDINARY", V - 4)

    def call(model, draw="a run"):
        try:
            with torch.no_grad():
                audit.score_and_audit(model.eval(), text[0], BYTES, B, draw)
        except SystemExit as refusal:
            return str(refusal)

    call.audit = audit
    return call


class Leaky(nn.Module):
    """Knows the table. leak: a function of x (B, T) that returns what is added to the logit of each position's own
    next token (B, T - 1); noise: of each logit in each pass."""

    def __init__(self, table, leak=None, noise=0.0):
        super().__init__()
        self.table, self.leak, self.noise = nn.Parameter(table), leak, noise

    def forward(self, x):
        logits = self.table[x]
        if self.leak:
            bonus = self.leak(x)[..., None]
            logits[:, :-1].scatter_add_(2, x[:, 1:, None], bonus)
        return logits + self.noise * torch.randn(logits.shape) if self.noise else logits


def worth(table, rows, leak):
    """bits per byte that the leak earns on these rows."""
    x, y = torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))
    losses = [F.cross_entropy(Leaky(table, one)(x).flatten(0, 1), y.flatten()).item() for one in (None, leak)]
    return (losses[0] - losses[1]) / BITS


def worth_a_thousandth(table, rows, leak):
    """leak(strength) at the strength that earns 0.001 bpb, or at 20 nats if it never earns that much."""
    low, high = 0.0, 20.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if worth(table, rows[:32], leak(middle)) < 0.001 else (low, middle)
    return leak(high)


def at_the_edges(chunk):
    """The last position of each chunk sees one token of the next chunk."""

    def leak(strength):
        edges = (torch.arange(T - 1) % chunk == chunk - 1) * strength
        return lambda x: edges.expand(len(x), -1)

    return leak


def within_chunks(chunk):
    """Each position sees to the end of its chunk."""

    def leak(strength):
        inside = (torch.arange(T - 1) % chunk != chunk - 1) * strength
        return lambda x: inside.expand(len(x), -1)

    return leak


def at_distance(distance):
    """A position learns something of its target where the token so far ahead has a certain remainder."""

    def leak(strength):
        def bonus(x):
            ahead = F.pad(x, (0, distance), value=1)[:, distance : distance + T - 1]
            return strength * ((ahead + x[:, 1:]) % 4 == 0)

        return bonus

    return leak


LEAKS = {f"edges of {n}": at_the_edges(n) for n in (2, 4, 8, 16, 32, 64)}
LEAKS |= {f"chunks of {n}": within_chunks(n) for n in (2, 8, 64)}
LEAKS |= {f"distance {n}": at_distance(n) for n in (1, 2, 8, 32, 64)}


# Much noise is refused for itself, and may look like learning.
FOUND = re.compile(r"its own future: unearned|depend on other rows|identical inputs do not|learns while .*: (rows|of two)")


@pytest.mark.parametrize("noise", [0.0, pytest.param(0.001, marks=pytest.mark.slow), 0.02])
@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_worth_a_thousandth_of_a_bit_is_found(audited, text, name, noise):
    rows, table = text
    leak = worth_a_thousandth(table, rows, LEAKS[name])
    assert worth(table, rows[:32], leak) == pytest.approx(0.001, rel=0.01)
    model = Leaky(table, leak, noise)
    for draw in "abc":
        torch.manual_seed(ord(draw))
        assert FOUND.search(audited(model, draw) or "it passed"), f"{name} with noise {noise} under draw {draw}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("noise", [0.0, 0.0005, 0.001, 0.002, 0.02])
@pytest.mark.parametrize("name", LEAKS)
def test_it_is_found_in_twenty_runs_of_twenty(audited, text, name, noise):
    rows, table = text
    model = Leaky(table, worth_a_thousandth(table, rows, LEAKS[name]), noise)
    assert all(FOUND.search(audited(model, f"run {i}") or "it passed") for i in range(20))


def test_the_same_models_without_a_leak_pass(audited, text):
    assert audited(Leaky(text[1])) is None
    assert all(audited(Leaky(text[1], noise=0.0005), draw) is None for draw in "abc")


def test_noise_that_could_hide_a_leak_is_refused_as_such(audited, text):
    assert "in eval mode the model must be deterministic" in audited(Leaky(text[1], noise=0.02))


class Mixer(nn.Module):
    """Embedding, one way of mixing the positions before, two matrices, logits; random weights, none of them zero."""

    def __init__(self, mix, dtype=torch.float32, C=32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape, scale=1.0):
            return nn.Parameter(scale * torch.randn(shape, generator=generator))

        self.wte, self.c_fc, self.lm_head = weight(V, C), weight(C, C, scale=C**-0.5), weight(C, V, scale=C**-0.5)
        self.taps = weight(C, T, scale=0.1)
        self.mix, self.dtype, self.extra = mix, dtype, nn.BatchNorm1d(C)
        self.extra.running_mean.normal_(generator=generator)

    def forward(self, x):
        h = self.wte[x].to(self.dtype)  # (B, T, C)
        h = h + self.mix(self, h, x).to(self.dtype)
        h = F.relu(h @ self.c_fc.to(self.dtype))
        return (h @ self.lm_head.to(self.dtype)).float()


def direct(model, h, x):
    kernel = model.taps[:, :8].to(h.dtype)
    return F.conv1d(F.pad(h.mT, (7, 0)), kernel[:, None], groups=h.shape[-1]).mT


def by_fft(model, h, x):
    """A causal convolution as long as the row, whose rounding depends on all of the row."""
    spectrum = torch.fft.rfft(h.float().mT, 2 * T) * torch.fft.rfft(model.taps, 2 * T)
    return torch.fft.irfft(spectrum, 2 * T)[..., :T].mT


def running_mean(model, h, x):
    return h.cumsum(1) / torch.arange(1, T + 1)[:, None]


def batch_norm(model, h, x):
    return model.extra(h.mT.float()).mT


def bigram_cache(model, h, x):
    """The mean of what followed this token so far in its row."""
    same = (x[:, :, None] == x[:, None, :]).float().tril(-1)  # position q was followed by q + 1, at most p
    following = F.pad(h[:, 1:].float(), (0, 0, 0, 1)) * 1.0
    return same @ following / same.sum(-1, keepdim=True).clamp_min(1)


HONEST = [direct, by_fft, running_mean, batch_norm, bigram_cache]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mix", HONEST)
def test_honest_ways_of_mixing_pass(audited, mix, dtype):
    for draw in "ab":
        assert audited(Mixer(mix, dtype), draw) is None


@pytest.mark.parametrize("mix", [by_fft, running_mean, bigram_cache])
def test_the_same_with_a_look_ahead_is_refused(audited, mix):
    def ahead(model, h, x):
        return mix(model, h, x).roll(-1, dims=1)

    assert "sees its own future" in audited(Mixer(ahead))


def test_the_interval_is_that_of_a_sample_mean(audited, text):
    """Against a plain computation; and nothing at all is exactly zero."""
    audit = audited.audit.Audit(Leaky(text[1]), text[0], BYTES, B, "x")
    values = torch.tensor([0.1, -0.2, 0.4, 0.0])
    mean, half = audit.interval(values)
    assert mean == pytest.approx(0.075 / BITS) and half == pytest.approx(1.96 * 0.25 / 2 / BITS, rel=1e-3)
    assert audit.interval(torch.zeros(5)) == (0, 0) and audit.interval(torch.zeros(5)).passes


def test_every_position_is_cut_and_what_follows_is_real_text_with_another_first_token(audited, text):
    rows = text[0]
    audit = audited.audit.Audit(Leaky(text[1]), rows, BYTES, B, "x")
    counts = np.bincount(audit.position, minlength=T)
    assert (counts[: T - 1] == counts[0]).all() and counts[T - 1] == 0 and len(audit.position) >= 250
    for cut, p, source in zip(audit.cut_rows, audit.position, audit.source, strict=True):
        assert (cut[: p + 1] == rows[source, : p + 1]).all() and cut[p + 1] != rows[source, p + 1]
        assert (cut[p + 1 :] == rows[:, p + 1 :]).all(1).any()  # some row's text
    other = audited.audit.Audit(Leaky(text[1]), rows, BYTES, B, "y")
    assert (other.source != audit.source).any() and (other.position != audit.position).any()


def test_parameters_differ_in_their_fingerprint_if_a_bit_does(audited):
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64):
        model = nn.Module()
        model.w = nn.Parameter(torch.randn(3000, 7).to(dtype))
        model.scalar = nn.Parameter(torch.ones((), dtype=dtype))
        before = audited.audit.fingerprints(model)
        assert audited.audit.fingerprints(model) == before
        with torch.no_grad():
            model.w[[5, 9]] = model.w[[9, 5]]  # the same values in other places
        after = audited.audit.fingerprints(model)
        assert after["w"] != before["w"] and after["scalar"] == before["scalar"]
