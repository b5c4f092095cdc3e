"""Will a night work on this machine? One line for each check, then measurements, then a verdict.

    uv run -m lab doctor                 a minute or two
    uv run -m lab doctor --quick         seconds: without the measurements
    uv run -m lab doctor --json          one JSON object, for programs (benchmarks/gpu.py reads it)

The JSON object:
    format      1
    can_run     whether a night can run: no check is FAIL
    verdict     the same as a sentence
    checks      [{"name", "level": "ok" | "warn" | "FAIL", "text": finding, "remedy": what to do, or ""}]
    measured    {name: number, or null if it was not or could not be measured}; the names of MEASURED, then
                attention_NAME_error (relative, against the naive reference) and attention_NAME_ms of each back end
    advice      {knob: value} to try on this machine; {} if the defaults suit it
    device      name of the device that trains
"""

import json
from pathlib import Path

from lab.machine import diagnosis, probes

HELP = "whether a night will work on this machine: checks, short measurements, a verdict"
DESCRIPTION = """\
Checks the machine, git, the GPU and its driver, torch, the data and the disk, one line each: ok, warn or FAIL with the
remedy. Then measures: each attention back end against a naive reference, compiled steps against eager ones, and some
seconds of real training of train.py on random tokens. Writes only to a temporary folder. While a training is running
here, or another process uses the GPU, it does not measure.

exit status: 0 if a night can run, 1 if not. A bug report should contain the output."""


def add_arguments(parser):
    parser.description = DESCRIPTION
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="checks only, no measurements")
    parser.add_argument("--seconds", type=float, default=20, help="seconds of training to measure (20)")
    parser.add_argument(
        "--agent", metavar="COMMAND", help="the agent's command, to check that its program is installed"
    )


def run(args):
    machine = probes.Machine(probes.tree_of(Path.cwd()))
    say = (lambda check: None) if args.json else (lambda check: print(line(check), flush=True))
    found = diagnosis.diagnose(machine, quick=args.quick, seconds=args.seconds, agent=args.agent, say=say)
    print(json.dumps(found, ensure_ascii=False) if args.json else f"\n{found['verdict']}")
    return 0 if found["can_run"] else 1


def line(check):
    remedy = f": {check['remedy']}" if check["remedy"] else ""
    return f"{check['level']:<4}  {check['name']:<12} {check['text']}{remedy}"
