"""What the records of one branch say: which runs belong together, what is kept, what the noise is. No git here.

Runs of the same train.py (`code`, its sha256) belong together, whatever commit it came in.
"""

from lab import verdict


class History:
    def __init__(self, records):
        self.records = records
        self.first = next((r for r in records if r["header"]), None)  # whose rules, data and device count
        self.baseline = next((r for r in records if r["baseline"] and r["summary"]), None)
        self.kept = [r for r in records if r["verdict"] == "keep" and r["row"]]
        self.rows = sorted((r for r in records if r["row"]), key=lambda r: r["row"])
        self.complete = [r for r in records if r["summary"]]
        self.by_code = {}
        for r in self.complete:
            self.by_code.setdefault(r["code"], []).append(r)

    def runs(self, code):
        """Complete runs of this code, oldest first."""
        return self.by_code.get(code, [])

    def values(self, code):
        return [r["summary"]["val_bpb"] for r in self.runs(code)]

    def is_baseline(self, code):
        return self.baseline is not None and code == self.baseline["code"]

    @property
    def anchors(self):
        """What an experiment may stand on: keeps, and the baseline while its repeats are made. Latest first."""
        return self.kept[::-1] or ([self.baseline] if self.baseline else [])

    @property
    def waiting(self):
        """The latest run of the commit that waits for a repeat; None where none does."""
        if self.baseline and not self.kept:
            return self.runs(self.baseline["code"])[-1]
        latest = {r["code"]: r for r in self.records}
        return next((r for r in latest.values() if r["verdict"] == "confirm"), None)

    def noise(self):
        if not self.baseline:
            return verdict.Noise(None, 0)
        others = [self.values(code) for code in self.by_code if not self.is_baseline(code)]
        return verdict.noise(self.values(self.baseline["code"]), others)

    def failures(self, anchor):
        """How many experiments were measured against the anchor and discarded."""
        return sum(r["verdict"] == "discard" and r["parent"] == anchor["commit"] for r in self.rows)

    def best_known(self, anchor, noise):
        """What the code of a keep or of the baseline is believed to be worth, by all its runs."""
        failures = self.failures(anchor)
        return verdict.best_known(self.values(anchor["code"]), failures, noise, self.is_baseline(anchor["code"]))

    def best(self):
        """The keep that is believed to be the best; None before there is one."""
        noise = self.noise()
        return min(reversed(self.kept), key=lambda r: self.best_known(r, noise), default=None)

    def price(self, best):
        return verdict.price(verdict.mean(self.values(self.baseline["code"])), best, len(self.complete))


def speed(runs):
    """Mean tokens a second of these runs; None where they say nothing of it."""
    speeds = [
        r["summary"]["total_tokens_M"] * 1e6 / r["summary"]["training_seconds"]
        for r in runs
        if r["summary"]["training_seconds"] > 0 and r["summary"]["total_tokens_M"] > 0
    ]
    return verdict.mean(speeds) if speeds else None
