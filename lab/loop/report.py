"""What record prints: the verdict, the number to beat, what it means, and what to do next."""

import os
import time
from statistics import median

from lab.analysis import verdict
from lab.analysis.history import SLOWED, label, not_slowed, speed, steps_per_second
from lab.loop.next_step import RECORD, doubt
from lab.store import names

STEPS_OFF = 1.5  # steps: in a short run a difference this small is rounding
BRIEF = 80  # characters of the best's description
UNEXPLAINED = 0.1  # slower than its base by more: the machine may have been busy
SAME_COST = ("num_params_M", "depth")  # of the summary
SAME_BATCH = 0.1  # tokens a step differ by less: the summary's are rounded
LATELY = 12  # experiments: how large ideas have been lately
PLATEAU = 10  # experiments in a row without a keep: then `record` suggests larger steps
PLATEAU_RICH = 25  # the same, once the night has gained verdict.PROVEN σ


def number(record):
    return f"{record['mean']:.6f}" + (f" (mean of {record['n']})" if record["n"] > 1 else "")


# ---------------------------------------------------------------------------------------------------
# What the rule knows, in words


def to_beat(night):
    """The number that decides on the next run, as a sentence; None before the baseline is kept."""
    if not night.tip:
        return None
    waiting = night.waiting
    if not waiting:
        return f"keep below {verdict.bar(night.search).keep:.6f}: one run of the next experiment"
    values = [r["summary"]["val_bpb"] for r in not_slowed(night.runs(waiting["code"]))]  # those that count beside the next one
    runs = len(verdict.distinct(values)) + 1
    keep = verdict.bar(night.search, runs, len(values) + 1, waiting["simpler"]).keep
    if runs == 1:
        return f"keep below {keep:.6f}: one more run of {waiting['short']}, if the machine does not slow it, too"
    return f"keep below {keep:.6f}: the mean of {runs} runs of {waiting['short']}"


def lately(night):
    """How large the latest ideas have been against the noise; None if none was measured in σ."""
    gains = [r["gain"] for r in night.rows if r["gain"] is not None][-LATELY:]
    if not gains:
        return None
    if len(gains) == 1:
        return f"the last experiment gained {gains[0]:+.1f}σ"
    return f"the last {len(gains)} experiments gained {max(gains):+.1f}σ at most, {median(gains):+.1f}σ in the median"


def noise(night):
    """σ and how large ideas have been lately against it."""
    if night.sigma is None:
        return "noise: σ is not known, as no commit ran twice"
    recent = lately(night)
    return f"noise: σ {night.sigma:.6f}" + (f"; {recent}" if recent else "")


def plateau(night):
    """A sentence if the night has stopped gaining; None otherwise."""
    if not night.tip:
        return None
    failures, unproven = night.search.tip.failures, verdict.unproven(night.search)
    if failures < (PLATEAU if unproven > 0 else PLATEAU_RICH):
        return None
    gained = f", and the night has gained {verdict.earned(night.search):.1f}σ in all" if unproven > 0 else ""
    return (
        f"plateau: {failures} experiments in a row did not beat {label(night.tip)}{gained}. Larger steps are wanted: "
        "programs/plateau.md"
    )


def cost(night):
    """What a run costs in wall-clock time, and how many fit into the rest of the night if its end is known; None before
    the first run."""
    if not night.cost:
        return None
    seconds, training = night.cost
    told = f"time: {seconds:.0f} s from one run to the next, {training:.0f} s of it training"
    try:
        left = float(os.environ.get(names.NIGHT_ENDS, "")) - time.time()
    except ValueError:
        return told
    return f"{told}; {max(0, int(left / seconds))} more fit into the night" if seconds > 0 else told


# ---------------------------------------------------------------------------------------------------
# One record


def codes_of(history):
    """{commit: its train.py's hash}, to find what experiments were made from."""
    return {r["commit"]: r["code"] for r in history.records}


def slower(record, codes, history):
    """How much slower than its base's its steps went, if both have the same size and batch, so that it may have been the
    machine: 0.2 is a fifth. 0.0 if less than UNEXPLAINED, or if it is not known. codes: codes_of(history)."""
    runs, before = history.runs(record["code"]), history.runs(codes.get(record["parent"], ""))
    if not runs or not before or any(runs[0]["summary"].get(k) != before[0]["summary"].get(k) for k in SAME_COST):
        return 0.0
    own, others, batches = speed(runs), speed(before), [tokens_a_step(run) for run in (runs[0], before[0])]
    if not own or not others or not all(batches) or abs(batches[0] / batches[1] - 1) > SAME_BATCH:
        return 0.0
    return 1 - own / others if 1 - own / others > UNEXPLAINED else 0.0


def tokens_a_step(run):
    """Tokens of one optimizer step; 0.0 if they are not known."""
    return (run.get("tokens") or run["summary"]["total_tokens_M"] * 1e6) / max(run["summary"]["num_steps"], 1)


def speeds(record, history):
    """Tokens a second compared with the best's, and how far something other than the code slowed the run."""
    said, runs, own = [], history.runs(record["code"]), speed([record])
    best, base = history.best_record, codes_of(history).get(record["parent"])
    reference, whose = (base, "its base's") if base and best and base != best["code"] else (best and best["code"], "the best's")
    other = reference and reference != record["code"] and speed(history.runs(reference))
    if own:
        against = f", {own / other - 1:+.1%} against {whose}" if other else ""
        said.append(f"speed: {own:,.0f} tokens/s{against}")
    first = steps_per_second(runs[0])
    if len(runs) > 1 and first:
        change = steps_per_second(runs[-1]) / first - 1
        if abs(change) > max(SLOWED, STEPS_OFF / max(runs[0]["summary"]["num_steps"], 1)):
            slower = "slower" if change < 0 else "faster"
            said.append(f"slowed: {abs(change):.1%} {slower} than this code's first run: that is the machine's doing")
    elif (record.get("slowed") or 0.0) > SLOWED:
        said.append(
            f"slowed: its steps were {record['slowed']:.0%} slower in the mean than the fastest quarter of them: that is "
            "the machine's doing, unless the code changes what a step does"
        )
    return said


def same_results(record, history):
    """A sentence if runs of this code have the same val_bpb under different seeds: then the seed decides nothing."""
    runs = history.runs(record["code"])
    values = [r["summary"]["val_bpb"] for r in runs]
    if len(set(values)) == len(values):
        return []
    seeds = " and ".join(str(r["header"]["seed"]) for r in runs if values.count(r["summary"]["val_bpb"]) > 1)
    return [f"note: the same result under different seeds ({seeds}): these runs count as one and say nothing about the noise"]


def lines(case, record, history, changed, team=None):
    """All lines except what to do next. history: the Night of the branch; changed: earlier records that this one changes;
    team: its Team, if it has one, whose Night judges."""
    said, history = [], team.night if team else history
    if record["verdict"] == "crash":
        said += [f"crash: {record['why']}", *(["the end of run.log:", case.log.trace()] if case.log.lines else [])]
        if history.tip and record["code"] == history.tip["code"] and not history.doubted and (why := doubt(history)):
            said.append(f"doubt: {why}")
    else:
        gain = "" if record["gain"] is None else f", {record['gain']:+.2f}σ"
        said += [f"{record['verdict']}: val_bpb {number(record)}{gain}: {record['why']}"]
        said += [*speeds(record, history), *same_results(record, history)]
        if record["verdict"] == "discard" and (share := slower(record, codes_of(history), history)):
            said.append(
                f"note: as many parameters and tokens a step as what it is based on, and {share:.0%} slower: if the change does not "
                "explain that, the machine was busy, and the verdict says little"
            )
        base = case.anchor if team and case.edits else None
        base = base and next((r for r in history.rows if r["code"] == base["code"]), base)  # the own record may have no row
        if base and record["row"] and not record.get("late") and history.tip and history.tip["code"] not in (base["code"], record["code"]):
            value = f" ({base['mean']:.6f})" if base["mean"] is not None else ""
            said.append(f"based on: {label(base)} {base['short']}{value}; the best is another by now")
    for other in changed:
        if not other["row"]:
            said.append(f"left: {other['short']}: {other['why']}")
            continue
        what = "given up" if other.get("given_up") else "closed"
        said.append(f"{what}: row {other['row']:04d} {other['short']} is a {other['verdict']}: {other['why']}")
    if record["row"]:
        kept = f", archived in runs/{record['row']:04d}-{record['short']}" if record["verdict"] == "keep" else ""
        said.append(f"row {record['row']:04d}: {record['short']} {record['verdict']}{kept}")
    if best := history.best_record:
        finder = f", found by {team.who(best)}" if team else ""
        said.append(f"best: {label(best)} {best['short']} ({best['description'][:BRIEF]}){finder}")
    return [*said, *filter(None, [noise(history), to_beat(history), plateau(history), cost(history)])]


def late(plan):
    """Whether the plan records a late gain."""
    return bool(plan["records"][-1].get("late"))


def what_next(step, plan):
    """The last lines: the Step that follows once the plan is carried out."""
    if step.kind in ("repeat", "doubt"):
        why = [f"doubt: {step.why}"] if step.kind == "doubt" else []
        return [*why, f"next: {step.do}", f"then: {RECORD}"]
    if step.kind == "adopt" and late(plan):
        again = f"git cherry-pick {plan['records'][-1]['short']} (if it conflicts, make the edit by hand)"
        return [f"next: {step.sentence}", f"then: {again}, run it and record it again"]
    if step.kind != "edit":
        return [f"next: {step.sentence}"]
    undone = "train.py is as it was before this experiment. " if plan["drop"] else ""
    return [f"next: {undone}{step.do[0].upper()}{step.do[1:]}"]
