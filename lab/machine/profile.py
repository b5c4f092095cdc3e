"""What the working train.py spends its time and memory on.

    uv run -m lab profile

It runs train.py in another process for some steps on random tokens (lab.machine.profiled_run), with its own warm-up and
loop, and leaves run.log, checkpoint.pt and the data alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lab.base import locks
from lab.base.errors import Refused
from lab.base.text import aligned, printable
from lab.store import names

HELP = "time, memory, operators and kernels of a step of the working train.py"
DESCRIPTION = """\
Profiles train.py as it is in this directory, committed or not, on random tokens; the data need not be prepared. It runs
train.py's own warm-up and some steps of its own loop, with the schedules of the middle of a run, in a process of its own,
and takes less than a minute, plus what torch.compile takes. It does not touch run.log, checkpoint.pt or the data.

  step        the fastest block of steps, undisturbed
  parts       of the fastest step in which each part is waited for; gaps: what is in none of the parts
  operators   by their own time, in all threads; on a GPU by the time of the kernels that they start
  memory      activations and temporaries: the peak without parameters, gradients and optimizer state
  faults      pages that the system had to map anew. Many, and much system time, mean that memory is freed and fetched
              again in each step

Exit status: 0, or 1 with one sentence: a run is in progress, train.py or the profiler fails, or the agent
has no GPU here: it feeds a fleet's workers, or its trainings go to a compute node."""

TIME_LIMIT = 900  # seconds; a cold torch.compile of a large model takes minutes
WIDTH = 100  # columns
TOLD = ("dtype: ", "attention: ", "torch.compile: ", "device batch: ", "warm-up again: ")  # lines of train.py that are shown
MOST_TOLD, FEW = 5, 5  # of those lines; operators beside ten kernels, so that all fits on a screen
PARTS = ("data", "forward", "backward", "optimizer")
# lab is the one running here; prepare.py and train.py are the tree's.
CHILD = """
import sys
sys.path.insert(0, {lab!r})
from lab.machine import profiled_run
sys.path.insert(0, {tree!r})
profiled_run.main()
"""


def add_arguments(parser):
    parser.description = DESCRIPTION


def measured(tree, time_limit=TIME_LIMIT):
    """(the answer of lab.machine.profiled_run, what train.py printed). Raises Refused with one sentence."""
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        code = CHILD.format(lab=str(Path(__file__).resolve().parents[2]), tree=str(tree))
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, str(answer)], cwd=tree, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=time_limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Refused(f"{names.TRAIN} took longer than {time_limit} s for its warm-up and a few steps") from None
        if not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise Refused(f"the process that runs {names.TRAIN} ended with status {done.returncode}: {printable(lines[-1])[:300]}")
        found = json.loads(answer.read_text())
    if failed := found.get("failed"):
        raise Refused(f"{names.TRAIN} {printable(failed)[:400]}")
    return found, done.stdout


# ---------------------------------------------------------------------------------------------------
# The screen


def cut(text, width):
    return text if len(text) <= width else text[: width - 1] + "…"


def ms(seconds):
    return f"{1000 * seconds:,.2f}" if seconds < 0.1 else f"{1000 * seconds:,.1f}"


def megabytes(n):
    return "–" if n is None else f"{n / 2**20:,.1f}"


def of_step(steps, split):
    """The lines of a step and its parts."""
    speed = f"{steps['tokens'] / steps['seconds']:,.0f} tokens/s" if steps["tokens"] else "tokens/s not known"
    mfu = "mfu not known" if steps["mfu_percent"] is None else f"mfu {steps['mfu_percent']:.1f}%"
    size = steps["per_block"]  # a time is the mean of a block
    of = f"{steps['n']} steps" if size == 1 else f"{steps['n'] // size} blocks of {size} steps"
    lines = [f"step {ms(steps['seconds'])} ms, best of {of} (median {ms(steps['median'])}); {speed}, {mfu}"]
    parts = {name: split["parts"].get(name) for name in PARTS}
    parts["gaps"] = split["seconds"] - sum(split["parts"].values())
    lines.append(f"its parts, in a step of {ms(split['seconds'])} ms that waits for each:")
    rows = [
        [f"  {name:<9}", *(["not seen", ""] if s is None else [ms(s), f"{s / split['seconds']:.1%}"])]
        for name, s in parts.items()
    ]  # fmt: skip
    return lines + aligned([["  part     ", "ms", "share"], *rows], left={0})


def of_operators(profile):
    """Lines of the most expensive operators, or of fewer operators and the most expensive kernels if there are kernels."""
    lists = [("operators", profile["operators"][: FEW if profile["kernels"] else None], profile["operators_total"])]
    if profile["kernels"]:
        lists.append(("kernels", profile["kernels"], profile["kernels_total"]))
    lines, width = [], WIDTH - 28
    for title, entries, total in lists:
        lines.append(f"{'most expensive ' + title:<{width}}{'share':>7} {'ms a step':>10} {'calls':>9}")
        for name, seconds, calls in entries:
            share = seconds / total if total else 0.0
            lines.append(f"{'  ' + cut(printable(name), width - 3):<{width}}{share:>7.1%} {ms(seconds):>10} {calls:>9,.0f}")
    if profile["kernels"]:
        lines.append(f"the device is busy for {min(1.0, profile['kernels_total'] / profile['wall']):.0%} of a profiled step")
    return lines


def of_memory(memory):
    kinds = [f"{kind} {megabytes(memory[kind])}" for kind in ("parameters", "gradients", "optimizer state")]
    rest = f"activations and temporaries {megabytes(memory['activations and temporaries'])}"
    return [f"memory in MB: {', '.join([*kinds, rest])}", f"  peak {megabytes(memory['peak'])}; the process has {megabytes(memory['resident'])}"]


def of_graphs(graphs):
    if graphs is None:
        return ["graphs: nothing was compiled"]
    late = f", {graphs['in_training']} of them after the clock had started" if graphs["in_training"] else ""
    lines = [f"graphs: {graphs['graphs']} compiled{late}; {graphs['breaks']} graph breaks"]
    return lines + [f"  {cut(printable(reason), WIDTH - 2)}" for reason in graphs["reasons"]]


def screen(found, printed):
    """The lines of the profile."""
    steps = found["steps"]
    told = [cut(printable(line), WIDTH) for line in printed.splitlines() if line.startswith(TOLD)]
    faults = f"page faults: {steps['minor_faults']:,.0f} a step" + (
        f" and {steps['major_faults']:,.1f} from disk" if steps["major_faults"] else "")  # fmt: skip
    return [
        cut(f"{names.TRAIN} on {printable(found['device'])}, random tokens", WIDTH), *told[:MOST_TOLD],
        *of_step(steps, found["split"]), *of_operators(found["profile"]), *of_memory(found["memory"]),
        f"{faults}; {steps['system_share']:.0%} of the CPU time is the system's", *of_graphs(found["graphs"]),
    ]  # fmt: skip


def run(args):
    tree = Path.cwd()
    if not (tree / names.TRAIN).is_file():
        raise Refused(f"there is no {names.TRAIN} in {tree}: call it in the root of the checkout")
    if os.environ.get(names.FEEDER):
        raise Refused(
            "the agent of this fleet has no GPU: this would measure the settings for a CPU, and take cores from the workers; "
            "profile on a GPU that no worker uses"
        )
    if os.environ.get(names.SRUN_JOB_FILE):
        raise Refused(
            "trainings of this night run on a compute node: this would measure the login node instead; "
            "compare the tokens/s that their logs print"
        )
    if locks.run_in_progress(tree):
        raise Refused("a run is in progress in this tree, and both would be slow: wait for its end (uv run -m lab status)")
    found, printed = measured(tree)
    print("\n".join(screen(found, printed)))
    if locks.run_in_progress(tree):
        print("note: a run began in this tree meanwhile, so these times are too long")
    return 0
