"""What record prints: the verdict first, then what it rests on, then exactly what to do next."""

from lab.analysis.history import speed
from lab.loop.next_step import RECORD

OFF = 0.01  # a repeat whose speed is further from its first run's was disturbed by the machine


def number(record):
    return f"{record['mean']:.6f}" + (f" (mean of {record['n']})" if record["n"] > 1 else "")


def noise(record):
    if record["sigma"] is None:
        return "σ unknown"
    return f"σ {record['sigma']:.6f} from {record['dof']} degree{'s' * (record['dof'] != 1)} of freedom"


def pace(run):
    """Steps a second; 0.0 where the run says nothing of it."""
    seconds = run["summary"]["training_seconds"]
    return run["summary"]["num_steps"] / seconds if seconds > 0 else 0.0


def speeds(record, history):
    """Tokens a second against the best's; for a repeat, whether the machine was the same."""
    runs, own = history.runs(record["code"]), speed([record])
    if len(runs) > 1 and pace(runs[0]):
        change = pace(runs[-1]) / pace(runs[0]) - 1
        slack = max(OFF, 1.5 / max(runs[0]["summary"]["num_steps"], 1))
        if abs(change) > slack:
            slower = "slower" if change < 0 else "faster"
            return [f"speed: {abs(change):.1%} {slower} than this code's first run: that is the machine's doing"]
    best = history.best_record
    reference = speed(history.runs(best["code"])) if best and best["code"] != record["code"] else None
    if not own:
        return []
    against = f", {own / reference - 1:+.1%} against the best's" if reference else ""
    return [f"speed: {own:,.0f} tokens/s{against}"]


def lines(case, record, history, closed):
    """All but what to do next."""
    said = []
    if record["verdict"] == "crash":
        said += [f"crash: {record['why']}", *(["the end of run.log:", case.log.trace()] if case.log.lines else [])]
    else:
        gain = "" if record["gain"] is None else f", {record['gain']:+.2f}σ against {record['best_known']:.6f}"
        said += [f"{record['verdict']}: val_bpb {number(record)}{gain}: {record['why']}", f"noise: {noise(record)}"]
        said += speeds(record, history)
    for other in closed:
        said.append(f"closed: row {other['row']:04d} {other['short']} is a {other['verdict']}: {other['why']}")
    if record["row"]:
        kept = f", archived in runs/{record['row']:04d}-{record['short']}" if record["verdict"] == "keep" else ""
        said.append(f"row {record['row']:04d}: {record['short']} {record['verdict']}{kept}")
    if best := history.best_record:
        said.append(f"best: {best['mean']:.6f}, row {best['row']:04d} {best['short']} ({best['description'][:80]})")
    return said


def what_next(step, plan):
    """The last lines: the Step that follows once the plan is carried out."""
    if step.kind == "repeat":
        return [f"next: {step.do}", f"then: {RECORD}"]
    if step.kind != "edit":
        return [f"next: {step.sentence}"]
    undone = "train.py is as it was before this experiment. " if plan["drop"] else ""
    return [f"next: {undone}{step.do[0].upper()}{step.do[1:]}"]
