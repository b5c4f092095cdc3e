"""Scores a checkpoint with the frozen metric, in a separate process: on the val rows and on the holdout rows.

An agent wrote the train.py beside the checkpoint. It is imported to build the model, after this process has bound the
functions that score. It could still do anything that a Python program can. What this process detects is a train.py that
replaces anything in prepare.py, torch's cross-entropy, or the files of the rules, and does not restore it.

A second process scores a few of these rows, and nothing before them: one batch, drawn at random by the first process from
all rows. A model that has learned from the rows scored before, wherever it keeps that in memory, scores them worse there.
"""

import contextlib
import json
import math
import os
import random
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
FEWEST = 8  # rows that are scored in the second process, in several batches if they are smaller
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
    {"refused": sentence} if the causality audit or the metric refuses it, or if it scores rows differently after others.
    Raises Refused if it cannot be scored at all (no data, no memory, a train.py that cannot be imported)."""
    scores = in_process(tree, folder, device, time_limit)
    if "refused" in scores:
        return scores
    drawn, among = scores.pop("rows"), scores.pop("of_rows")
    alone = in_process(tree, folder, device, time_limit, drawn)
    if "refused" in alone:
        return alone
    log = run_log.read(Path(folder) / names.RUN_LOG)
    difference, limit = alone["of_rows"] - among, limit_of(folder, log and log.header, scores)
    if abs(difference) > limit:
        return {key: scores[key] for key in ("device", "data_sha256")} | {"refused": (
            f"scores a batch differently after other rows ({difference:+.6f} bpb in a process that scored none before, limit "
            f"{limit}): it learns while it is scored, so its value was not earned"
        )}  # fmt: skip
    return scores


def in_process(tree, folder, device, time_limit, rows=()):
    """What score_here returns, from a process of its own. rows: as for score_here."""
    log = run_log.read(Path(folder) / names.RUN_LOG)
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    if log and log.header:
        env["AUTORESEARCH_DATASET"] = log.header["dataset"]
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        code = CHILD.format(lab=str(Path(__file__).resolve().parents[2]), tree=str(Path(tree).resolve()))
        command = [sys.executable, "-c", code, str(Path(folder).resolve()), device or "", str(answer), json.dumps([*rows])]
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


def limit_of(folder, header, scores):
    """The largest difference between two scores that rounding explains, in bits per byte. header: of the run."""
    text = (Path(folder) / names.RUN_LOG).read_text(errors="replace") if header else ""
    same = "\ndtype: float32" in text and header["device"].partition(" ")[0] == scores["device"]
    return SAME if same else OTHER


def off(folder, header, val, scores):
    """A sentence if the second score of val differs from the first by more than rounding explains, else None."""
    limit = limit_of(folder, header, scores)
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


class Watched:
    """A model that keeps the losses of certain rows when they come up, in whatever batch. Otherwise it is that model."""

    def __init__(self, model, rows, device):
        """rows: uint16 (N, T + 1)."""
        import torch

        self.model, self.rows, rows = model, rows, torch.from_numpy(rows.astype("int64")).to(device)
        self.x, self.y = rows[:, :-1], rows[:, 1:]  # (N, T)
        self.nats = {}  # {index of a row: (T,)}

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x):
        import torch.nn.functional as F

        logits = self.model(x)
        for i, j in (x[:, None] == self.x).all(-1).nonzero().tolist():
            self.nats[j] = F.cross_entropy(logits[i].float(), self.y[j], reduction="none").cpu().double().numpy()
        return logits

    def bits_per_byte(self, token_bytes):
        """Of the rows, all of which were scored."""
        sizes = token_bytes[self.rows[:, 1:]]
        nats = sum((self.nats[j] * (sizes[j] > 0)).sum() for j in range(len(self.rows)))
        return float(nats / (math.log(2) * sizes.sum()))


def score_here(folder, device, alone=()):
    """{"val", "holdout", "rows", "of_rows"} or {"refused"}, and {"device", "data_sha256"}, computed in this process. Its
    working directory must be the tree whose prepare.py scores.

    rows: numbers of a few random rows, of val's and then the holdout's; of_rows: their bits per byte, as they were scored
    among all others. alone: only these rows are scored, for of_rows."""
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
    both = np.concatenate([rows["val"], rows["holdout"]])
    drawn = [*alone] or random.SystemRandom().sample(range(len(both)), min(max(batch_size, FEWEST), len(both)))
    modules = frozen_modules()
    before = fingerprint(modules, F.cross_entropy)

    result = {"device": device.type, "data_sha256": manifest["data_sha256"]}
    model = load_train(Path(folder) / names.TRAIN).load_model(Path(folder) / names.CHECKPOINT, device)
    model.eval()
    model = Watched(model, both[drawn], device)
    try:
        if alone:
            score_rows(model, both[drawn], token_bytes, batch_size)
            scores = {}
        else:
            with contextlib.redirect_stdout(sys.stderr):
                scores = {"val": score_audited(model, rows["val"], token_bytes, batch_size)}
            scores["holdout"] = score_rows(model, rows["holdout"], token_bytes, batch_size)
        scores |= {"rows": drawn, "of_rows": model.bits_per_byte(token_bytes)}
    except SystemExit as refusal:
        scores = {"refused": str(refusal)}
    if fingerprint(modules, F.cross_entropy) != before:
        scores = {"refused": "its train.py replaces parts of the frozen code"}
    return result | scores


def main():
    folder, device, answer, alone = sys.argv[1:]
    try:
        result = score_here(folder, device or None, json.loads(alone))
    except (Exception, SystemExit) as error:  # an agent's code: anything may be wrong with it
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        sys.exit(f"{kind}{' '.join(str(error).split())[:300]}")
    Path(answer).write_text(json.dumps(result))

