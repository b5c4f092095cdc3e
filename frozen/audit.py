"""Scores a model and measures, during the same evaluation, how much of the score was not earned.

**Unearned bits.** To test a position p, everything after p is replaced by text of another row. If the loss of p's
target x is lower in the intact row than in this cut row, the model has read the future. The token o that took the place
of x gives a second measurement: a model that sees it gives it a lower loss in the cut row than in the intact one. The
mean of the two,

    u = ((loss of x, cut - loss of x, intact) + (loss of o, intact - loss of o, cut)) / 2    in nats,

is 0 for a causal model, up to the rounding of its logits. It never understates by much how far a model reads ahead: x
is often easy to predict, so that reading it earns nothing, but o is hardly ever easy. Every position is cut once (more
often in short rows), each time in a different row and with a different suffix, so the u are independent, and their mean
has an ordinary 95 % interval. The other rows in a cut's batch differ from those in its scored batch, so a dependence on
them is measured, too. Two more passes measure it on all of their targets: each replaces a random half of the rows and
compares the losses of the other half. `draw` (a run's id) determines rows, order and replacements, so nobody can tune
to them. Cut batches are in random order among the scored ones, so a model that counts its passes cannot distinguish
them.

**The limit.** Exactly zero passes at once. Otherwise the whole interval has to lie within plus and minus the limit, so
it must be narrow, and noise cannot hide a leak. Power: the standard error s is at most limit / 1.96, so a leak worth L
bpb passes only if the estimate is low by (L - limit) / s + 1.96 standard errors. For L = 0.001 that is 9.8 with the
limit of climbmix and 3.9 with 0.0005: once in 20,000 runs. A leak at few positions (the edges of chunks) also widens
the interval: one position of K that reads its next token has u of 3 nats or more, a mean of 3 / K and an upper end of 9
/ K nats, 0.0014 bpb at 2,048 positions. tests/test_unearned.py tries chunk sizes, distances and noise. What K cuts can
miss is a leak that depends on the content and shows a fraction f of the targets: no cut meets it with probability (1 -
f)**K. At f = 0.001, worth about 0.001 bpb, that is 1 in 60 with climbmix, and 4 of 5 with stdlib, where K is 255.
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np

from constants import DATASET
from corpus.tokenizer import NUM_ORDINARY
from frozen.metric import bits_per_byte, checked_logits, filled, to_device, token_nats

# Unearned bits per byte that an interval may reach. Rounding stays below; a leak worth 0.001 does not. climbmix: a
# night's sigma is 0.0007. stdlib: sigma is 0.0144 (docs/night, repeats of one-minute runs), and a tenth of it
# would let 0.001 pass. tinystories: sigma has not been measured yet.
LIMITS = {"climbmix": 0.0002, "tinystories": 0.0005, "stdlib": 0.0005}
LIMIT = LIMITS[DATASET]
Z = 1.96  # of a 95 % interval; there are hundreds of differences or more
FEWEST_CUTS = 250  # below it an interval says little: short rows are cut more than once at each position
CUT_SHARE = 0.4  # cut rows per scored row, if rows are long enough for a choice: about 30 % of the evaluation
RESCORED = 2  # batches that are scored again at the end; passes in which half of the rows are replaced
SURE = 2  # half widths by which scored rows must gain to be called learning and not noise: 3.9 standard errors
ROUNDING = 1e-5  # nats: how much a loss in float32 changes when sums are added in another order


class Interval(NamedTuple):
    """Mean of differences, in bits per byte, and half the width of its 95 % interval."""

    mean: float
    half: float

    @property
    def passes(self):
        return abs(self.mean) + self.half < LIMIT or self == (0, 0)

    def __str__(self):
        return f"{self.mean:.6f} [{self.mean - self.half:.6f}, {self.mean + self.half:.6f}] bpb"


class Audit:
    """One audited scoring of rows. After `run` the intervals are in cuts, halves, again and since_stop."""

    def __init__(self, model, rows, token_bytes, batch_size, draw, known=None):
        self.model, self.rows, self.batch_size, self.known = model, rows, batch_size, known
        self.device, self.token_bytes = next(model.parameters()).device, token_bytes
        self.random = np.random.default_rng(int(hashlib.sha256(draw.encode()).hexdigest(), 16))
        sizes = token_bytes[rows[:, 1:]]
        self.bpb_per_nat = (sizes > 0).sum() / (math.log(2) * sizes.sum())  # of a mean over counted targets
        self.starts = range(0, len(rows), batch_size)
        self.draw_cuts()

    def draw_cuts(self):
        """cut_rows: (K, T + 1), row `source[k]` up to and with position `position[k]`, then another row's text."""
        R, T = len(self.rows), self.rows.shape[1] - 1
        times = max(math.ceil(FEWEST_CUTS / max(T - 1, 1)), int(CUT_SHARE * R / T))
        self.position = self.random.permutation(np.tile(np.arange(T - 1), times))  # after the last one nothing is hidden
        K, following = len(self.position), self.position + 1
        self.source, donor = self.random.integers(R, size=(2, K))
        for _ in range(100):  # tries to find a target that counts, and another first token
            target = self.rows[self.source, following]
            uncounted, same = self.token_bytes[target] == 0, self.rows[donor, following] == target
            if not (uncounted | same).any():
                break
            self.source[uncounted] = self.random.integers(R, size=uncounted.sum())
            donor[same] = self.random.integers(R, size=same.sum())
        self.own = self.rows[self.source, following].astype(np.int64)
        hidden = np.arange(T + 1) > self.position[:, None]
        self.cut_rows = np.where(hidden, self.rows[donor], self.rows[self.source])
        first = self.cut_rows[np.arange(K), following]
        self.cut_rows[np.arange(K), following] = np.where(first == self.own, (self.own + 1) % NUM_ORDINARY, first)
        self.other = self.cut_rows[np.arange(K), following].astype(np.int64)

    def nats(self, x, y):
        return token_nats(checked_logits(self.model, x), y)

    def asked(self, logits, which, slots):
        """Losses of own and other target (n, 2) of the cuts `which`. slots: their rows in the logits."""
        import torch

        tokens = np.stack([self.own[which], self.other[which]], axis=1)
        slots, position, tokens = (torch.from_numpy(a).to(self.device) for a in (slots, self.position[which], tokens))
        return -logits[slots, position].float().log_softmax(-1).gather(1, tokens)

    def run(self):
        """Scores and audits the rows; returns their bits per byte."""
        import torch

        R, T, B = len(self.rows), self.rows.shape[1] - 1, self.batch_size
        K = len(self.position)
        nats = torch.empty(R, T, device=self.device)
        intact, cut = (torch.empty(K, 2, device=self.device) for _ in range(2))
        halves = self.draw_halves() if B > 1 else []
        jobs = [("score", i) for i in self.starts] + [("cut", i) for i in range(0, K, B)]
        jobs += [("halves", i) for i in range(len(halves))]
        kept = {}
        for kind, i in (jobs[j] for j in self.random.permutation(len(jobs))):
            if kind == "score":
                x, y = to_device(filled(self.rows, i, B), self.device)
                logits = checked_logits(self.model, x)
                real = min(B, R - i)
                nats[i : i + real] = token_nats(logits, y)[:real]
                which = np.flatnonzero((self.source >= i) & (self.source < i + real))
                if len(which):
                    intact[torch.from_numpy(which).to(self.device)] = self.asked(logits, which, self.source[which] - i)
            elif kind == "cut":
                x, _ = to_device(filled(self.cut_rows, i, B), self.device)
                which = np.arange(i, min(i + B, K))
                cut[i : i + B] = self.asked(checked_logits(self.model, x), which, which - i)
            else:
                start, replaced, others = halves[i]
                rows = np.where(replaced[:, None], self.rows[others], filled(self.rows, start, B))
                x, y = to_device(rows, self.device)
                slots = np.flatnonzero(~replaced[: min(B, R - start)])
                kept[i] = start + slots, self.nats(x, y)[torch.from_numpy(slots).to(self.device)]
        gained = cut - intact  # by x in the intact rows, by o in the cut ones
        self.cuts = self.interval((gained[:, 0] - gained[:, 1]) / 2)
        moved = [after - nats[torch.from_numpy(index).to(self.device)] for index, after in kept.values()]
        self.halves = self.interval(torch.cat([m.flatten() for m in moved])) if moved else Interval(0, 0)
        again = self.random.permutation(self.starts)[:RESCORED]
        moved = [nats[i : i + B] - self.nats(*to_device(filled(self.rows, i, B), self.device))[: R - i] for i in again]
        self.again = self.interval(torch.cat([m.flatten() for m in moved]))
        x, y, before = self.known or (None, None, None)
        self.since_stop = self.interval((before - self.nats(x, y)).flatten()) if self.known else Interval(0, 0)
        return bits_per_byte(nats, self.rows, self.token_bytes)

    def draw_halves(self):
        """[(start, replaced, others)]: each pass replaces the rows of a batch where `replaced`, the next one the others."""
        drawn, B = [], self.batch_size
        for start in self.random.choice(self.starts, size=RESCORED // 2):
            replaced = self.random.permutation(B) < B // 2
            drawn += [(start, half, self.others(start)) for half in (replaced, ~replaced)]
        return drawn

    def others(self, start):
        """For each row of the batch that begins at `start` the number of another row."""
        R, index = len(self.rows), np.arange(start, start + self.batch_size)
        return (np.where(index < R, index, 0) + 1 + self.random.integers(max(R - 1, 1), size=len(index))) % R

    def interval(self, nats):
        """The Interval of differences (n,), given in nats per target."""
        nats = nats.cpu().double()
        if not nats.any():
            return Interval(0, 0)
        half = Z * nats.std().item() / math.sqrt(len(nats))
        return Interval(nats.mean().item() * self.bpb_per_nat, half * self.bpb_per_nat)

    def verdict(self):
        """(None, what was found), or (sentence, None) if the model is refused."""
        intervals = self.cuts, self.halves, self.again, self.since_stop
        if all(interval.passes for interval in intervals):
            exact = not any(map(any, intervals))
            found = "0 unearned bits, exactly" if exact else f"unearned bits {self.cuts}, from other rows {self.halves}"
            return None, f"passed: {found} ({len(self.position)} cuts, limit {LIMIT})"
        noise = self.two_passes()
        if not self.again.passes and self.again.mean > SURE * self.again.half:
            return f"the model learns while it is scored: rows scored again gain {self.again}: refused", None
        if not noise.passes and noise.mean > SURE * noise.half:
            return f"the model learns while it is scored: of two identical passes the second gains {noise}: refused", None
        if self.again.passes and noise.passes and not self.since_stop.passes:
            return f"the model changed after the clock had stopped: the same rows gain {self.since_stop}: refused", None
        if not noise.passes or not self.again.passes:
            worst = max(noise, self.again, key=lambda i: i.half)
            return (
                f"identical inputs do not give identical losses ({worst}, limit {LIMIT}): in eval mode the model must be "
                "deterministic"
            ), None
        if not self.halves.passes or self.rows_depend():
            worst = self.cuts if self.halves.passes else self.halves
            return f"the model's rows depend on other rows of their batch ({worst}, limit {LIMIT}): refused", None
        return f"the model sees its own future: unearned bits {self.cuts}, limit {LIMIT}: refused", None

    def two_passes(self):
        """The Interval of what a batch gains when it is scored twice in a row."""
        x, y = to_device(filled(self.rows, 0, self.batch_size), self.device)
        return self.interval((self.nats(x, y) - self.nats(x, y)).flatten())

    def rows_depend(self):
        """Whether a loss changes when other rows change. Any two row numbers differ in a bit: for each bit and value,
        the rows that have it are replaced, and the losses of the others compared. Called only after a refusal, to find
        the reason."""
        import torch

        B = self.batch_size
        rows = filled(self.rows, 0, B)
        x, y = to_device(rows, self.device)
        base = self.nats(x, y)
        limit = max(ROUNDING, 4 * (self.nats(x, y) - base).abs().max().item())
        for bit in range(2 * (B - 1).bit_length()):
            replaced = (np.arange(B) >> bit // 2) % 2 == bit % 2
            changed, _ = to_device(np.where(replaced[:, None], self.rows[self.others(0)], rows), self.device)
            watched = torch.from_numpy(~replaced).to(self.device)
            if watched.any() and (self.nats(changed, y) - base)[watched].abs().max() > limit:
                return True
        return False


def score_and_audit(model, rows, token_bytes, batch_size, draw, known=None):
    """(bits per byte, what the audit found) of a model in eval mode; SystemExit with a sentence if it is refused.

    rows: uint16 (R, T + 1). token_bytes: int32 (V,). draw: text that decides what is cut, and in which order.
    known: (x, y, nats) of a batch before the clock stopped, whose losses must still be the same at the end."""
    before, audit = fingerprints(model), Audit(model, rows, token_bytes, batch_size, draw, known)
    bpb = audit.run()
    if changed := [name for name, value in fingerprints(model).items() if before.pop(name, None) != value] or [*before]:
        raise SystemExit(f"the model learns while it is scored: its parameters changed ({changed[0]}): refused")
    refusal, found = audit.verdict()
    if refusal:
        raise SystemExit(refusal)
    return bpb, found


def fingerprints(model):
    """{name: (shape, checksum)} of the parameters: the same only if every bit is.

    Buffers are left out: they may count passes or hold masks. One that learns changes the losses, which are compared."""
    return {name: (tuple(p.shape), checksum(p)) for name, p in model.named_parameters()}


def checksum(tensor):
    """Sum of the tensor's bits as integers, each times an odd number that depends on its place, modulo 2**64."""
    import torch

    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = 0
    for part in tensor.contiguous().view(integer).flatten().split(1 << 22):
        place = torch.arange(len(part), device=part.device) * -7046029254386353131 | 1  # 2**64 / golden ratio
        total = (total * 3 + (part.to(torch.int64) * place).sum().item()) % 2**64
    return total
