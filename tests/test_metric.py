"""The metric: bits per byte by hand, the same for every batch size, and refused where it was not earned."""
# ruff: noqa: F401, F811 (run is a fixture)

import base64
import functools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from begun import Uniform, run

V, T = 512, 32
TWO = np.full(V, 2, dtype=np.int32)  # each token two bytes


@pytest.fixture
def score(run):
    return run.prepare.score_rows


def some_rows(n, length=T, seed=0):
    return np.random.default_rng(seed).integers(0, V - 4, (n, length + 1)).astype(np.uint16)


def val_rows(run):
    return np.load(run.prepare.data_dir() / "val_rows.npy")


class Lookup(nn.Module):
    """Logits of the next token by the last one alone."""

    def __init__(self, table, dtype=torch.float32):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table).to(dtype))  # (V, V)

    def forward(self, x):
        return self.table[x]


class Toy(nn.Module):
    """A transformer of one layer with random weights, none of them zero. sin: a function of the model, the tokens
    (B, T) and the hidden states (B, T, C), which returns the hidden states as a cheat would have them."""

    def __init__(self, sin=None, dtype=torch.float32, window=(-T, 0), C=32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.sin, self.dtype = sin, dtype
        shapes = dict(wte=(V, C), wpe=(T, C), qkv=(3 * C, C), c_proj=(C, C), c_fc=(4 * C, C), back=(C, 4 * C))
        for name, shape in (shapes | dict(lm_head=(V, C))).items():
            weight = torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(weight / (1 if name in ("wte", "wpe") else shape[1] ** 0.5)))
        age = torch.arange(T) - torch.arange(T)[:, None]  # k - q
        self.register_buffer("visible", (window[0] <= age) & (age <= window[1]))
        self.sinned = torch.zeros(())

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            h = self.wte[x] + self.wpe[: x.shape[1]]
            q, k, v = F.linear(F.rms_norm(h, h.shape[-1:]), self.qkv).chunk(3, dim=-1)
            h = h + F.linear(F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible), self.c_proj)
            if self.sin:
                h = self.sin(self, x, h)
            h = h + F.linear(F.relu(F.linear(F.rms_norm(h, h.shape[-1:]), self.c_fc)).square(), self.back)
            logits = F.linear(F.rms_norm(h, h.shape[-1:]), self.lm_head).float()
        return 15 * torch.tanh(logits / 15)


def trained(run, model, steps=30):
    """The model after a few steps on the data of the run."""
    run.begin()
    run.start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = run.prepare.make_dataloader(run.tokenizer, 8, T, "train")
    for _, (x, y, _) in zip(range(steps), batches, strict=False):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.9 * math.log(V), f"loss {loss:.2f}: it has learnt nothing yet"
    return model


# --- The score ----------------------------------------------------------------


def test_a_uniform_model_scores_the_bits_of_a_token_over_its_bytes(score):
    bytes_of = np.arange(V, dtype=np.int32) % 7 + 1
    rows = some_rows(20)
    expected = math.log2(V) * rows[:, 1:].size / bytes_of[rows[:, 1:]].sum()
    assert score(Uniform(), rows, bytes_of, 8) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_is_right_with_probability_one_half_needs_one_bit_a_token(score):
    rows = np.stack([(np.arange(T + 1) + start) % 100 for start in range(30)]).astype(np.uint16)
    table = torch.zeros(V, V)
    table[torch.arange(V), (torch.arange(V) + 1) % 100] = math.log(V - 1)
    assert score(Lookup(table), rows, TWO, 8) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lookup_model_scores_what_a_plain_loop_makes_of_it(run, dtype):
    """On the validation text, whose bytes are read off the tokenizer's file; the sums in Python's own floats."""
    rows = val_rows(run)
    model = Lookup(torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 2, dtype)
    tokens = (run.prepare.data_dir() / "tokenizer.tiktoken").read_text().split()[::2]
    sizes = [len(base64.b64decode(token)) for token in tokens] + [0] * 4
    table = model.table.double().tolist()
    log_total = [math.log(sum(math.exp(logit) for logit in logits)) for logits in table]
    nats = size = 0
    for row in rows.tolist():
        for token, target in zip(row, row[1:]):  # noqa: B905 (the second is one shorter)
            if sizes[target]:
                nats += log_total[token] - table[token][target]
                size += sizes[target]
    assert run.evaluate(model) == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_targets_without_bytes_count_in_neither_sum(score):
    rows = some_rows(16)
    bytes_of = TWO.copy()
    table = torch.zeros(V, V)
    expected = score(Lookup(table), rows, bytes_of, 8)
    bytes_of[V - 4 :] = 0
    rows[:, 0] = rows[:, 5] = V - 4  # as an input and as a target
    table[:, V - 4] = -50  # which is not foreseen, at 50 nats a time
    table[:, :4] += math.log(5 / 4)  # and the probabilities of the others stay as they were on the whole
    rows[rows < 4] = 4
    table[:, 4 : V - 4] = 0
    table[:, :4] = 0
    table[:, V - 3 :] = -50
    bits = math.log2(V - 4)
    assert score(Lookup(table), rows, bytes_of, 8) == pytest.approx(expected * bits / math.log2(V), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16, 63, 64, 65, 100])
def test_the_score_does_not_depend_on_the_batch_size(score, batch_size):
    rows, model = some_rows(64), Toy()
    bytes_of = np.arange(V, dtype=np.int32) % 5
    assert score(model, rows, bytes_of, batch_size) == pytest.approx(score(model, rows, bytes_of, 32), rel=1e-6)


def test_a_batch_of_many_tokens_scores_as_many_batches_of_few(score):
    rows, model = some_rows(1100), Lookup(torch.randn(V, V, generator=torch.Generator().manual_seed(0)))
    assert 1100 * T > 2**15
    assert score(model, rows, TWO, 1100) == pytest.approx(score(model, rows, TWO, 100), rel=1e-6)


def test_the_score_of_a_run_does_not_depend_on_the_batch_size(run):
    model = Toy()
    expected = run.evaluate(model, 32)
    for batch_size in (3, 24, 64):
        assert run.evaluate(model, batch_size) == pytest.approx(expected, rel=1e-6)


def test_the_model_gets_the_inputs_alone_and_always_in_one_shape(run):
    calls = []

    class Witness(Uniform):
        def forward(self, *args, **kwargs):
            calls.append((args, kwargs, self.training, torch.is_grad_enabled()))
            return super().forward(*args)

    run.evaluate(Witness(), batch_size=24)  # 64 rows: the third batch is ragged
    rows = torch.from_numpy(val_rows(run).astype(np.int64))
    seen = set()
    for (x,), kwargs, training, grad in calls:
        assert x.shape == (24, T) and x.dtype == torch.int64
        assert (kwargs, training, grad) == ({}, False, False)
        seen |= {tuple(row) for row in x.tolist()}
    assert {tuple(row) for row in rows[:, :-1].tolist()} <= seen


def test_validation_rows_that_changed_are_refused(run):
    path = run.prepare.data_dir() / "val_rows.npy"
    rows = np.load(path)
    np.save(path, np.roll(rows, 1, axis=0))
    with pytest.raises(SystemExit, match=r"val_rows\.npy changed since it was prepared: run prepare\.py again"):
        run.evaluate(Uniform())


def test_a_tokenizer_that_counts_other_bytes_is_refused(run):
    run.begin()
    run.start()
    plain = run.tokenizer.token_bytes()
    moved = np.roll(plain, 1)  # the same sum over the vocabulary
    with pytest.raises(SystemExit, match="the tokenizer counts other bytes than the prepared one"):
        run.prepare.evaluate_bpb(Uniform(), SimpleNamespace(vocab_size=V, token_bytes=lambda: moved), 8)


def test_a_manifest_of_another_text_is_refused(run):
    run.begin()
    run.start()
    run.clock.manifest["files"]["val_rows.npy"]["text_bytes"] += 1
    with pytest.raises(SystemExit, match="do not belong together: run prepare.py again"):
        run.prepare.evaluate_bpb(Uniform(), run.tokenizer, 8)


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ready", ["random", "trained"])
def test_an_honest_model_passes(run, dtype, ready, capsys):
    model = Toy(dtype=dtype)
    if ready == "trained":
        trained(run, model)
    for batch_size in (1, 2, 8, 64):
        assert 1 < run.evaluate(model, batch_size) < 20
        assert "audit: passed" in capsys.readouterr().out


def test_an_honest_model_whose_kernels_round_differently_each_time_passes(run):
    jitter = torch.Generator().manual_seed(0)
    run.evaluate(Toy(lambda model, x, h: h + 1e-4 * torch.randn(h.shape, generator=jitter)))


def peek(model, x, h):
    return h + 0.5 * model.wte[x.roll(-1, dims=1)]


def leak_the_mean(model, x, h, share=0.1):
    return h + share * h.mean(1, keepdim=True)


def peek_from_halfway(model, x, h):
    return torch.cat([h[:, : T // 2], peek(model, x, h)[:, T // 2 :]], dim=1)


def know_the_last_token(model, x, h):
    return h + 0.1 * model.wte[x[:, -1:]]


FUTURE = {
    "peeks one token ahead": dict(sin=peek),
    "an attention mask off by one": dict(window=(-T, 1)),
    "attends to everything": dict(window=(-T, T)),
    "leaks a tenth of the mean of the sequence": dict(sin=leak_the_mean),
    "peeks in the second half": dict(sin=peek_from_halfway),
    "knows the last token": dict(sin=know_the_last_token),
}


@pytest.mark.parametrize("ready", ["random", "trained"])
@pytest.mark.parametrize("name", FUTURE)
def test_a_model_that_sees_its_own_future_is_refused(run, name, ready):
    model = Toy(**FUTURE[name])
    if ready == "trained":
        trained(run, model)
    for batch_size in (1, 8):
        with pytest.raises(SystemExit, match=r"the model sees its own future: unearned bits \S+ \["):
            run.evaluate(model, batch_size)


def test_a_leak_that_earns_nothing_passes_and_is_in_the_log(run, capsys):
    """A thousandth of the mean of the sequence: the interval is near zero, but not zero."""
    run.evaluate(Toy(functools.partial(leak_the_mean, share=0.001)))
    found = re.search(r"audit: passed: unearned bits (\S+) \[(\S+), (\S+)\] bpb, .* limit 0.0002\)", capsys.readouterr().out)
    mean, low, high = map(float, found.groups())
    assert low < mean < high and abs(mean) < 5e-5 and 1e-6 < high - low < 2e-4


def test_a_causal_model_has_no_unearned_bits_exactly(run, capsys):
    run.evaluate(Toy())
    assert re.search(r"audit: passed: 0 unearned bits, exactly \(\d{3} cuts", capsys.readouterr().out)


def mean_of_the_batch(model, x, h):
    return h + 0.1 * h.mean(0, keepdim=True)


def normalised_over_the_batch(model, x, h):
    return h / h.square().mean((0, 1), keepdim=True).sqrt()


def capacity(model, x, h):
    """As experts of limited capacity: of each token the first few occurrences in the batch are served."""
    served = F.one_hot(x.flatten() % 4, 4).cumsum(0).gather(1, x.flatten()[:, None] % 4).view(x.shape) < x.numel() / 5
    return torch.where(served[..., None], h, 0.5 * h)


@pytest.mark.parametrize("ready", ["random", "trained"])
@pytest.mark.parametrize("sin", [mean_of_the_batch, normalised_over_the_batch, capacity])
def test_a_model_whose_rows_depend_on_each_other_is_refused(run, sin, ready):
    model = Toy(sin)
    if ready == "trained":
        trained(run, model)
    with pytest.raises(SystemExit, match=r"rows depend on other rows of their batch \(\S+ \["):
        run.evaluate(model)


@pytest.mark.parametrize("batch_size", [2, 3, pytest.param(6, marks=pytest.mark.slow)])
def test_one_row_that_reads_one_other_is_found_whichever_they_are(run, batch_size):
    for source in range(batch_size):
        for reader in set(range(batch_size)) - {source}:

            def copy(model, x, h, source=source, reader=reader):
                return h + F.one_hot(torch.tensor(reader), len(h))[:, None, None] * 0.1 * h[source]

            with pytest.raises(SystemExit, match="depend on other rows"):
                run.evaluate(Toy(copy), batch_size)


class Sly(torch.Tensor):
    """Logits that answer for the cross-entropy themselves."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 0.9 * result.as_subclass(torch.Tensor) if function is F.cross_entropy else result


class SlyMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        return 0.9 * result if function is F.cross_entropy else result


class SlyDispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


def test_logits_that_answer_for_the_cross_entropy_are_refused(run):
    class Toy2(Toy):
        def forward(self, x):
            return super().forward(x).as_subclass(Sly)

    with pytest.raises(SystemExit, match="returned Sly: evaluation needs logits"):
        run.evaluate(Toy2())


@pytest.mark.parametrize("mode", [SlyMode, SlyDispatch])
def test_a_mode_that_sees_every_operation_of_the_metric_is_refused(run, mode):
    with mode(), pytest.raises(SystemExit, match=f"{mode.__name__} is on while the model is scored"):
        run.evaluate(Toy())


def test_a_default_device_is_no_such_mode(run):
    with torch.device("cpu"):
        run.evaluate(Toy())


class Learner(Toy):
    """Takes a step of gradient descent on each batch it is shown, after it has answered."""

    def __init__(self, rate=0.3):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        logits = super().forward(x)
        with torch.enable_grad():
            loss = F.cross_entropy(super().forward(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, list(self.parameters()))
        with torch.no_grad():
            for p, gradient in zip(self.parameters(), gradients, strict=True):
                p -= self.rate * gradient
        return logits


class Cache(Toy):
    """Counts in a buffer which token followed which, from some call on, and trusts the counts of the calls before."""

    def __init__(self, first_call=1):
        super().__init__()
        self.register_buffer("counts", torch.zeros(V, V))
        self.calls, self.first_call = 0, first_call

    def forward(self, x):
        logits = super().forward(x) + (self.counts[x] + 1).log()
        self.calls += 1
        if self.calls >= self.first_call:
            self.counts.index_put_((x[:, :-1], x[:, 1:]), torch.ones(()), accumulate=True)
        return logits


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_a_model_that_learns_a_little_from_each_batch_is_refused(run, rate):
    with pytest.raises(SystemExit, match=r"the model learns while it is scored: its parameters changed \(wte\)"):
        run.evaluate(Learner(rate))


def test_a_model_that_begins_to_learn_after_the_audit_is_refused(run):
    with pytest.raises(SystemExit, match=r"the model learns while it is scored: rows scored again gain \d"):
        run.evaluate(Cache(first_call=30), batch_size=1)


@pytest.mark.parametrize("make", [Learner, Cache])
def test_a_model_that_learns_fast_is_refused(run, make):
    with pytest.raises(SystemExit, match="the model learns while it is scored: (its parameters|rows scored again)"):
        run.evaluate(make())


def test_a_model_that_changes_between_the_stop_and_the_first_scored_batch_is_refused(run):
    """By buffers, at the first call after the clock has stopped: every scored batch then agrees with itself."""

    class Late(Toy):
        def forward(self, x):
            if run.clock.stopped is not None and not self.sinned:
                self.visible |= torch.eye(T, dtype=torch.bool).roll(-2, 1)
                self.sinned += 1
            return super().forward(x)

    with pytest.raises(SystemExit, match="the model changed after the clock had stopped"):
        run.evaluate(Late())


def test_evaluation_mode_costs_training_time_and_no_data_come_after_it(run):
    class Calibrating(Toy):
        def eval(self):
            if run.clock.started is not None:
                run.seconds += 60
            return super().eval()

    with pytest.raises(SystemExit, match="training overran its 300 s by 60.0 s"):
        run.evaluate(Calibrating())

    class Late(Toy):
        def forward(self, x):
            if run.clock.stopped is not None:
                next(self.batches)
            elif run.clock.started is not None:
                self.batches = run.prepare.make_dataloader(run.tokenizer, 8, T, "train")
                next(self.batches)
            return super().forward(x)

    with pytest.raises(SystemExit, match="no data after evaluate_bpb has stopped the clock"):
        run.evaluate(Late())


def test_dropout_left_on_is_refused(run):
    with pytest.raises(SystemExit, match="identical inputs do not give identical losses .* must be deterministic"):
        run.evaluate(Toy(lambda model, x, h: F.dropout(h, 0.1)))


def test_dropout_of_a_module_is_off_while_it_is_evaluated(run):
    model = Toy(lambda model, x, h: model.dropout(h))
    model.dropout = nn.Dropout(0.1)
    model.train()
    run.evaluate(model)


class Answers(Uniform):
    """Returns what `answer` makes of its logits."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(super().forward(x).clone())


SHAPES = {
    "its own loss": (lambda logits: logits.logsumexp(-1).mean(), r"returned \(\)"),
    "a loss a token": (lambda logits: logits.logsumexp(-1), r"returned \(8, 32\)"),
    "logits without the special tokens": (lambda logits: logits[..., :-4], r"returned \(8, 32, 508\)"),
    "more logits than tokens": (lambda logits: F.pad(logits, (0, 4)), r"returned \(8, 32, 516\)"),
    "only the last position": (lambda logits: logits[:, -1:], r"returned \(8, 1, 512\)"),
    "flat logits": (lambda logits: logits.flatten(0, 1), r"returned \(256, 512\)"),
    "logits and loss": (lambda logits: (logits, logits.mean()), "returned tuple"),
    "a number": (lambda logits: 0.5, "returned float"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_anything_but_logits_is_refused(run, what):
    answer, says = SHAPES[what]
    expected = says + r": evaluation needs logits of shape \(B, T, V\) = \(8, 32, 512\)"
    with pytest.raises(SystemExit, match=expected):
        run.evaluate(Answers(answer))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [1, -1])
def test_logits_that_are_not_finite_are_refused(run, value, call):
    """One of them, in the first pass or in the last."""
    calls = []

    def spoil(logits):
        calls.append(1)
        if len(calls) == spoil.at:
            logits[-1, -1, 7] = value
        return logits

    spoil.at = 0
    run.evaluate(Answers(spoil))
    spoil.at = {1: 1, -1: len(calls)}[call]
    calls.clear()
    with pytest.raises(SystemExit, match="logits that are not finite.* diverged, or the model masks tokens with -inf"):
        run.evaluate(Answers(spoil))


def test_a_mask_of_the_value_that_the_refusal_names_is_scored(run):
    def mask(logits):
        logits[..., -4:] = -1e4  # the special tokens: fewer tokens share the probability, so the value is lower
        return logits

    assert 0 < run.evaluate(Answers(mask)) < run.evaluate(Uniform())


def test_a_refusal_leaves_no_score(run):
    with pytest.raises(SystemExit):
        run.evaluate(Toy(peek))
    with pytest.raises(SystemExit, match="no val_bpb"):
        run.clock.summary(num_steps=1, total_tokens=1, num_params=1, flops_per_token=1, depth=1)
