"""What the dashboard shows of an experiment. Commits come from the table, never from a request; texts are truncated."""

import difflib
import os
import re
import stat

from lab.base import git
from lab.base.text import printable
from lab.store import names, run_log

# Limits in characters, so that no text an agent writes makes a page too large for a browser.
LONGEST_DIFF, LOG_TAIL, LONGEST_SAMPLE = 200_000, 16_000, 20_000
HEX = re.compile(r"[0-9a-f]{4,40}")
FACTS = ["seed", "val_bpb", "training_seconds", "total_seconds", "total_tokens_M", "num_steps", "num_params_M", "depth",
         "mfu_percent", "peak_vram_mb"]  # fmt: skip


def lookup(night, commit):
    """The experiment with this commit or prefix of a commit; the last row if it has several rows. None if no commit
    matches, or more than one. results.tsv has short commits; the full ones come from runs.jsonl."""
    rows = [(e, {e.commit, *(run["commit"] for run in e.runs)}) for e in night.experiments if HEX.fullmatch(e.commit)]
    found = [e for e, known in rows if commit in known] or [
        e for e, known in rows if any(n.startswith(commit) for n in known)
    ]
    return found[-1] if len({e.commit for e in found}) == 1 else None


def plain(text, limit):
    """The text without control characters, cut after `limit` characters."""
    text = printable(text, keep="\n\t")
    return text if len(text) <= limit else f"{text[:limit]}\n… cut here"


def own_file(folder, name):
    """The path of a regular file directly in this folder, or None. A link or a pipe gives None: an agent could use a
    link to show another file, and a pipe would block the reader."""
    try:
        ours = not folder.is_symlink() and stat.S_ISREG(os.lstat(folder / name).st_mode)
    except OSError:
        return None
    return folder / name if ours else None


def text_of(folder, name, limit):
    """The first `limit` characters of such a file; None if it cannot be read."""
    path = own_file(folder, name)
    try:
        with open(path, encoding="utf-8", errors="replace") if path else open(os.devnull) as f:
            return f.read(limit) if path else None
    except OSError:
        return None


def log_of(folder):
    path = own_file(folder, names.RUN_LOG)
    try:
        return run_log.read(path) if path else None
    except OSError:
        return None


def brief(experiment, gains, best):
    """The fields of models.Experiment. gains: {number: gain} of the kept experiments; best: the night's best."""
    return {
        "number": experiment.number, "commit": experiment.commit, "val_bpb": experiment.val_bpb,
        "memory_gb": experiment.memory_gb, "status": experiment.status, "description": experiment.description,
        "gain": gains.get(experiment.number), "runs": len(experiment.runs), "archived": experiment.archive is not None,
        "given_up": experiment.given_up, "best": experiment is best, "linked": HEX.fullmatch(experiment.commit) is not None,
    }  # fmt: skip


def all_briefs(night):
    gains = {e.number: gain for e, gain in night.gains()}
    best = night.best  # a property that computes it at every access
    return [brief(e, gains, best) for e in night.experiments]


def run_facts(record):
    facts = (record["summary"] or {}) | {"seed": (record["header"] or {}).get("seed")}
    known = {key: run_log.finite(facts[key]) for key in FACTS if facts.get(key) is not None}
    header = record["header"] or {}
    device = plain(str(header.get("device", "")), 200)
    return known | {"verdict": plain(record["verdict"], 40), "start": record["start"], "device": device}


def diff(tree, night, experiment):
    """(text, what it compares): the change of this experiment from git, or from the archives if git lacks the commit."""
    commit, parent = experiment.commit, None
    if experiment.runs:
        commit, parent = experiment.runs[-1]["commit"], experiment.runs[-1]["parent"]
    if not HEX.fullmatch(commit):
        return None, "its commit is not a git commit"
    options = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--end-of-options"]
    if isinstance(parent, str) and HEX.fullmatch(parent):
        text = git.read_only(tree.path, "diff", *options, parent, commit, "--", names.TRAIN, limit=4 * LONGEST_DIFF)
        against = f"train.py against {parent[:7]}"
    else:
        text = git.read_only(tree.path, "show", "--format=", *options, commit, "--", names.TRAIN, limit=4 * LONGEST_DIFF)
        against = "train.py against the commit before it"
    if text is None:
        text, against = diff_of_archives(night, experiment)
    return (None if text is None else plain(text, LONGEST_DIFF)), against


def diff_of_archives(night, experiment):
    before = [e for e in night.experiments[: experiment.number - 1] if e.archive]
    if experiment.archive and before:
        new, old = (text_of(e.archive, names.TRAIN, LONGEST_DIFF) for e in (experiment, before[-1]))
        if new is not None and old is not None:
            lines = difflib.unified_diff(old.split("\n"), new.split("\n"), "a/train.py", "b/train.py", lineterm="")
            return "\n".join(lines), f"the archived train.py against row {before[-1].number}'s"
    return None, f"git does not know commit {experiment.commit[:7]} here"


def log_tail(tree, experiment):
    """(text, source): the end of the experiment's log without its progress lines."""
    log, where = experiment.archive and log_of(experiment.archive), "runs/ of this experiment"
    if not log and experiment.runs:
        log, where = log_of(tree.path), "the latest run.log"
        if log and log.run_id != experiment.runs[-1]["run_id"]:
            log = None
    if not log:
        return None, "there is no log: only those of kept runs and of the latest run are stored"
    return plain("\n".join(log.lines)[-LOG_TAIL:], LOG_TAIL), where


def sample(experiment):
    """(text, None) or (None, reason)."""
    if not experiment.archive:
        return None, "only kept runs are sampled"
    text = text_of(experiment.archive, names.SAMPLE, LONGEST_SAMPLE + 1)
    if text is None:
        return None, f"no sample yet: uv run -m lab sample {experiment.number}"
    return plain(text, LONGEST_SAMPLE).rstrip(), None
