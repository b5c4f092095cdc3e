"""The report of a proof: a table, and a sentence for each comparison. Pure functions of the runs of `lab prove`."""

from lab.analysis import intervals
from lab.analysis.verdict import distinct, mean
from lab.base.text import aligned

SPLITS = ("val", "holdout")


def results(arm, runs, split):
    """The arm's values on a split, from the runs that completed and were not refused. Six decimals, as runs print them."""
    return [round(r[split], 6) for r in runs if r["code"] == arm.code and r[split] is not None and not r.get("refused")]


def values(arm, runs, split):
    """The different ones of `results`: equal values under several seeds are one measurement, not several."""
    return distinct(results(arm, runs, split))


def too_few(arms, runs, split):
    """Why these arms have too few values, in words."""
    pinned = [arm.short for arm in arms if len(values(arm, runs, split)) == 1 < len(results(arm, runs, split))]
    return f"the seed changes nothing in {' and '.join(pinned)}: cannot be told" if pinned else "too few runs to tell"


def report(arms, runs, seeds):
    """The text of proof.txt: the table of the arms, then one sentence per comparison."""
    runs = [r for r in runs if r["seed"] in seeds]
    lines = [table(arms, runs), ""]
    for arm in arms:
        own = [r for r in runs if r["code"] == arm.code]
        crashes = [r for r in own if r["val"] is None]
        refused = [r for r in own if r.get("refused")]
        if crashes:
            lines.append(f"{arm.short}: {len(crashes)} of {len(own)} runs crashed and are in no mean")
        if refused:
            lines.append(f"{arm.short}: {len(refused)} of {len(own)} runs were refused and are in no mean: {refused[0]['refused']}")
        equal = len(results(arm, runs, "val")) - len(values(arm, runs, "val"))
        if equal:
            lines.append(f"{arm.short}: {equal} of {len(own)} runs had the val of another seed: equal values count as one")
    lines += noise(arms[0], runs) if len(arms) == 1 else [s for arm in arms[1:] for s in gain(arms[0], arm, runs)]
    return "\n".join(lines)


def table(arms, runs):
    head = ["commit", "n", "val mean", "σ", "holdout mean", "σ", "tokens/s", ""]
    lines = [head]
    for arm in arms:
        cells = [arm.short, str(len(values(arm, runs, "val")))]
        for split in SPLITS:
            own = values(arm, runs, split)
            cells.append(f"{mean(own):.6f}" if own else "")
            cells.append(f"{intervals.spread(own):.6f}" if len(own) > 1 else "")
        speeds = [r["tokens_per_second"] for r in runs if r["code"] == arm.code and r["val"] is not None]
        lines.append([*cells, f"{mean(speeds):,.0f}" if speeds else "", arm.description[:60]])
    return "\n".join(aligned(lines))


def noise(arm, runs):
    """The noise of a single commit: the standard deviation of its runs, with a 95 % interval."""
    lines = []
    for split in SPLITS:
        own = values(arm, runs, split)
        if len(own) < 2:
            lines.append(f"{split}: {too_few([arm], runs, split)}")
            continue
        low, high = intervals.spread_interval(own)
        lines.append(f"{split}: σ of one run {intervals.spread(own):.6f} [{low:.6f}, {high:.6f}] with 95 %, n = {len(own)}")
    return lines


def gain(base, arm, runs):
    """A sentence for each split: the arm's gain over the base, its interval, and the conclusion."""
    lines, real = [], {}
    for split in SPLITS:
        before, after = values(base, runs, split), values(arm, runs, split)
        if min(len(before), len(after)) < 2:
            lines.append(f"{arm.short} against {base.short} on {split}: {too_few([base, arm], runs, split)}")
            continue
        difference, interval = intervals.gain(before, after)
        real[split] = (interval.low > 0) - (interval.high < 0)
        lines.append(
            f"{arm.short} against {base.short} on {split}: gain {difference:+.6f} "
            f"[{interval.low:+.6f}, {interval.high:+.6f}] with 95 %, n = {len(before)} + {len(after)}: "
            + {1: "real", -1: "really worse", 0: "cannot be told from noise"}[real[split]]
        )
    if real.get("val") == 1 and real.get("holdout", 1) < 1:
        lines.append(f"{arm.short}: its gain on val does not appear on the holdout: do not trust it yet")
    return lines
