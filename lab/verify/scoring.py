"""Scores a checkpoint with the frozen metric, in a separate process: on the val rows and on the holdout rows.

An agent wrote the train.py beside the checkpoint. It is imported to build the model, after this process has bound the
functions that score. It could still do anything that a Python program can. What this process detects is a train.py that
replaces anything in prepare.py, torch's cross-entropy, or the files of the rules, and does not restore it.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from lab.base.errors import Refused
from lab.store import names, run_log

TIME_LIMIT = 3600  # seconds for one checkpoint: the default data take minutes on a GPU, hours on a CPU
SAME = 1e-4  # val_bpb: largest difference of a second score in float32 on the same kind of device; docs/proof.md
OTHER = 1e-3  # in bfloat16 or on another kind of device, where sums round differently
# lab is the one running here; prepare.py, corpus/ and frozen/ are the tree's, whose own lab may be older or missing.
# So nothing in lab that this process imports may import corpus or constants.
CHILD = """
import sys
sys.path.insert(0, {lab!r})
from lab.verify import scoring
sys.path.insert(0, {tree!r})
scoring.main()
"""


def score(tree, folder, device=None, time_limit=TIME_LIMIT):
    """The scores of the checkpoint in `folder` by the frozen code of `tree`: {"val", "holdout"} in bits per byte, or
    {"refused": sentence} if the causality audit or the metric refuses it. Raises Refused if it cannot be scored at
    all (no data, no memory, a train.py that cannot be imported)."""
    log = run_log.read(Path(folder) / names.RUN_LOG)
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    if log and log.header:
        env["AUTORESEARCH_DATASET"] = log.header["dataset"]
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        code = CHILD.format(lab=str(Path(__file__).resolve().parents[2]), tree=str(Path(tree).resolve()))
        command = [sys.executable, "-c", code, str(Path(folder).resolve()), device or "", str(answer)]
        try:
            done = subprocess.run(
                command, cwd=tree, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=time_limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Refused(f"{folder}: scoring took longer than {time_limit} s (--time-limit)") from None
        if done.returncode or not answer.is_file():
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
            raise Refused(f"{folder}: {lines[-1].strip()[:300]}")
        return json.loads(answer.read_text())


def off(folder, header, val, scores):
    """A sentence if the second score of val differs from the first by more than rounding explains, else None."""
    text = (Path(folder) / names.RUN_LOG).read_text(errors="replace")
    same = "\ndtype: float32" in text and header["device"].partition(" ")[0] == scores["device"]
    limit = SAME if same else OTHER
    if abs(scores["val"] - val) <= limit:
        return None
    return f"does not reproduce: {scores['val'] - val:+.6f} from the logged value (limit {limit})"


def batch_size_of(folder):
    """The batch size in rows of the run's own evaluation, from its log; 8 if the log does not have it."""
    log = Path(folder) / names.RUN_LOG
    text = log.read_text(errors="replace")[:200_000] if log.is_file() else ""
    found = re.findall(r"^device batch: (\d+) x ", text, re.MULTILINE)
    return int(found[-1]) if found else 8


def frozen_modules():
    """The loaded modules of the frozen code."""
    rooms = ("constants", "prepare", "corpus", "frozen")
    return [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] in rooms]


def fingerprint(modules, cross_entropy):
    """Identifies these modules in memory and on disk: if the value changes, part of the code was replaced."""
    parts = [
        (module.__name__, name, id(value), id(getattr(value, "__code__", None)), repr(getattr(value, "__defaults__", None)))
        for module in modules
        for name, value in vars(module).items()
    ]
    return parts, id(cross_entropy), [Path(module.__file__).read_bytes() for module in modules if module.__file__]


def audited_scoring(prepare):
    """The function that audits and scores rows, with other cuts than the run had, so nobody can tune to both. A tree
    with older frozen files has two functions for it."""
    if hasattr(prepare, "score_and_audit"):
        draw = uuid.uuid4().hex
        return lambda *args: prepare.score_and_audit(*args, draw=draw)[0]

    def score_audited(model, rows, token_bytes, batch_size):
        prepare.audit(model, rows, batch_size, next(model.parameters()).device)
        return prepare.score_rows(model, rows, token_bytes, batch_size)

    return score_audited


def score_here(folder, device):
    """Like `score`, but in this process. The working directory must be the tree whose prepare.py scores."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    import prepare
    from lab.verify.sample import load_train

    device = torch.device(device) if device else prepare.pick_device()[0]
    manifest, root = prepare.load_manifest(), prepare.data_dir()
    rows = {}
    for split in ("val", "holdout"):
        path = root / f"{split}_rows.npy"
        if prepare.sha256_files(path) != manifest["files"][path.name]["sha256"]:
            raise SystemExit(f"{path} changed since it was prepared: run prepare.py again")
        rows[split] = np.load(path)
    token_bytes, batch_size = prepare.load_tokenizer().token_bytes(), batch_size_of(folder)
    score_audited, score_rows = audited_scoring(prepare), prepare.score_rows
    modules = frozen_modules()
    before = fingerprint(modules, F.cross_entropy)

    result = {"device": device.type, "data_sha256": manifest["data_sha256"]}
    model = load_train(Path(folder) / names.TRAIN).load_model(Path(folder) / names.CHECKPOINT, device)
    model.eval()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            scores = {"val": score_audited(model, rows["val"], token_bytes, batch_size)}
        scores["holdout"] = score_rows(model, rows["holdout"], token_bytes, batch_size)
    except SystemExit as refusal:
        scores = {"refused": str(refusal)}
    if fingerprint(modules, F.cross_entropy) != before:
        scores = {"refused": "its train.py replaces parts of the frozen code"}
    return result | scores


def main():
    folder, device, answer = sys.argv[1:]
    try:
        result = score_here(folder, device or None)
    except (Exception, SystemExit) as error:  # an agent's code: anything may be wrong with it
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        sys.exit(f"{kind}{' '.join(str(error).split())[:300]}")
    Path(answer).write_text(json.dumps(result))

