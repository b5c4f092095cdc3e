"""What the dashboard tells of an experiment. Commits come from the table, never from a request; texts are cut short."""

import re
import unicodedata
from pathlib import Path

from lab import runlog
from lab.web.trees import git, number

LONGEST = 200_000  # characters of a diff
TAIL, SAMPLE = 16_000, 20_000  # of a log, of a sample
HEX = re.compile(r"[0-9a-f]{4,40}")
FACTS = ["seed", "val_bpb", "training_seconds", "total_seconds", "total_tokens_M", "num_steps", "num_params_M", "depth",
         "mfu_percent", "peak_vram_mb"]  # fmt: skip


def lookup(night, commit):
    """The experiment of this commit, the last where it stands in several rows; None for none or several commits."""
    found = [e for e in night.experiments if HEX.fullmatch(e.commit) and (e.commit.startswith(commit) or commit.startswith(e.commit))]
    return found[-1] if len({e.commit for e in found}) == 1 else None


def plain(text, limit):
    """The text without control characters, its beginning where it is too long."""
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return text if len(text) <= limit else f"{text[:limit]}\n… cut here"


def brief(experiment, gains, best):
    """The fields of models.Experiment. gains: {number: gain} of the kept ones; best: the night's best."""
    return {
        "number": experiment.number, "commit": experiment.commit, "val_bpb": experiment.val_bpb,
        "memory_gb": experiment.memory_gb, "status": experiment.status, "description": experiment.description,
        "gain": gains.get(experiment.number), "runs": len(experiment.runs), "archived": experiment.archive is not None,
        "best": experiment is best, "linked": HEX.fullmatch(experiment.commit) is not None,
    }  # fmt: skip


def all_briefs(night):
    gains = {e.number: gain for e, gain in night.gains()}
    best = night.best  # reckoned anew at every call
    return [brief(e, gains, best) for e in night.experiments]


def run_facts(record):
    facts = (record["summary"] or {}) | {"seed": (record["header"] or {}).get("seed")}
    known = {key: number(facts[key]) for key in FACTS if facts.get(key) is not None}
    header = record["header"] or {}
    return known | {"verdict": record["verdict"], "start": record["start"], "device": str(header.get("device", ""))[:200]}


def diff(tree, experiment):
    """(text, what it compares): the change of this experiment, from git."""
    commit, parent = experiment.commit, None
    if experiment.runs:
        commit, parent = experiment.runs[-1]["commit"], experiment.runs[-1]["parent"]
    if not HEX.fullmatch(commit):
        return None, "its commit is no git commit"
    options = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"]
    if isinstance(parent, str) and HEX.fullmatch(parent):
        text = git(tree.path, "diff", *options, parent, commit, "--", "train.py", limit=4 * LONGEST)
        against = f"train.py against {parent[:7]}"
    else:
        text = git(tree.path, "show", *options, "--format=", commit, "--", "train.py", limit=4 * LONGEST)
        against = "train.py against the commit before it"
    if text is None:
        return None, f"git does not know commit {commit[:7]} here"
    return plain(text, LONGEST), against


def log_tail(tree, experiment):
    """(text, where it is from): the end of the experiment's log without its progress lines."""
    places = [experiment.archive / "run.log"] if experiment.archive else []
    latest = tree.path / "run.log"
    if experiment.runs and (log := runlog.read(latest)) and log.run_id == experiment.runs[-1]["run_id"]:
        places.append(latest)
    for place in places:
        if log := runlog.read(place):
            return plain("\n".join(log.lines)[-TAIL:], TAIL), "runs/ of this experiment" if place != latest else "the latest run.log"
    return None, "only the logs of kept runs are archived, and the latest one stays"


def sample(experiment):
    """(text, why there is none)"""
    if not experiment.archive:
        return None, "only kept runs are sampled"
    try:
        with open(Path(experiment.archive) / "sample_output.txt", encoding="utf-8", errors="replace") as f:
            return plain(f.read(SAMPLE + 1), SAMPLE).rstrip(), None
    except OSError:
        return None, f"no sample yet: uv run -m lab sample {experiment.number}"
