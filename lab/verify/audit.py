"""Scores every kept run again with the frozen metric: on val, and on the holdout that nothing was tuned on.

    uv run -m lab audit                 the baseline and all kept runs of this branch
    uv run -m lab audit --best          the baseline and the best
    uv run -m lab audit 7 12            runs by number (and the baseline, to compute gains)

Each run is scored in a separate process, from the train.py and the checkpoint archived in runs/. Prints a table and
writes it to audit.tsv; scores are cached in .lab/audit.json. docs/proof.md says how to read the table.
"""

import errno
import hashlib
import json
import sys
from pathlib import Path

from lab.analysis import holdout
from lab.analysis.history import Night, label
from lab.base import files, locks, text
from lab.base import git as base_git
from lab.base.errors import Refused
from lab.base.text import aligned
from lab.share.team import team_of
from lab.store import archive, names, rules, run_log
from lab.store.repository import Repo
from lab.verify import scoring

HELP = "score the kept runs again, also on the holdout"
FLAGGED = 4  # exit status if a row is flagged
# A val gain above SURE σ is hardly noise. If less than FRACTION of it appears on the holdout, the rest is too much for a
# night's selection bias (in docs/night it is 1 % of the gain).
SURE, FRACTION = 3, 0.5
READ_ONLY = (errno.EROFS, errno.EBUSY, errno.EACCES, errno.EPERM)  # EBUSY: a file that the sandbox has mounted
COLUMNS = ["row", "commit", "val_logged", "val_again", "holdout", "val_gain", "holdout_gain", "flags", "description"]


def add_arguments(parser):
    parser.description = (
        "Scores archived runs again with the frozen metric, each in a separate process: on the validation rows, where "
        "the value must equal the one that the run logged, and on the holdout. Prints a table, writes audit.tsv."
    )
    parser.epilog = f"exit status: 0 nothing is flagged; {FLAGGED} a row is flagged; 1 nothing could be audited"
    parser.add_argument("numbers", metavar="NUMBER", nargs="*", type=int, help="rows of results.tsv (all kept ones)")
    parser.add_argument("--best", action="store_true", help="the baseline and the best only")
    parser.add_argument("--tree", metavar="PATH", default=".", help="the working tree to audit (this one)")
    parser.add_argument("--device", help="cpu, cuda, mps (as a run would choose)")
    parser.add_argument("--again", action="store_true", help="score again what was scored already")
    parser.add_argument(
        "--time-limit", type=int, default=scoring.TIME_LIMIT, help=f"seconds for one run ({scoring.TIME_LIMIT})"
    )


# ---------------------------------------------------------------------------------------------------
# One run


def logged(folder):
    """(header, val_bpb) of an archived run. Raises Refused if its log is not that of a complete run."""
    log = run_log.read(folder / names.RUN_LOG)
    if not log or log.ended != "complete":
        raise Refused("its run.log is missing or incomplete")
    return log.header, log.summary["val_bpb"]


def score(top, folder, args, known):
    """The scores of the archive, from the cache if they are in it; new scores are added to the cache."""
    missing = [name for name in (names.TRAIN, names.CHECKPOINT) if not (folder / name).is_file()]
    if missing:
        raise Refused(f"its {' and '.join(missing)} is gone")
    digest = scoring_digest(top, folder, args.device)
    if args.again or digest not in known:
        known[digest] = scoring.score(top, folder, args.device, args.time_limit)
        keep(top, known)
    return known[digest]


def keep(top, known):
    """Writes the cache of scores; returns whether it could be written."""
    return write(top / names.LAB / names.AUDIT_MEMORY, json.dumps(known, indent=1) + "\n")


def write(path, content):
    """Writes the file; returns whether it could be. In the sandbox it cannot, and the printed table is what counts."""
    try:
        files.write(path, content)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        return False
    return True


def scoring_digest(top, folder, device):
    """Hex digest of everything a score depends on: checkpoint, code, frozen files, the scoring code, device."""
    digest = hashlib.sha256(f"{device}".encode())
    frozen = [top / name for name in rules.files_in(top)]
    for path in (folder / names.CHECKPOINT, folder / names.TRAIN, *frozen, Path(scoring.__file__)):
        with open(path, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def examine(top, record, args, known):
    """{column: value} of a record's row: the logged value, the new scores, and the flags so far."""
    found = {"row": named(record), "commit": record["short"], "description": record["description"], "flags": []}
    folder = folder_of(top, record)
    try:
        header, found["val_logged"] = logged(folder)
        if others := rules.changed(header, rules.tree(top)):
            raise Refused(f"it ran under other rules than there are here: {', '.join(others[:3])} differs")
        scores = score(top, folder, args, known)
    except Refused as refused:
        found["flags"].append(f"{refused}".removeprefix(f"{folder}: "))
        return found
    if scores["data_sha256"] != header["data_sha256"]:
        found["flags"].append("it ran on other data than the prepared ones here")
        return found
    if "refused" in scores:
        found["flags"].append(scores["refused"])
        return found
    found["val_again"], found["holdout"] = scores["val"], scores["holdout"]
    if sentence := scoring.off(folder, header, found["val_logged"], scores):
        found["flags"].append(sentence)
    return found


# ---------------------------------------------------------------------------------------------------
# All of them


def compare(rows, sigma):
    """Adds to each row its gains over the baseline (the first row) on val and holdout, and the flag for a gain on val
    alone. Adds nothing if the baseline has no scores."""
    base = rows[0]
    for row in rows[1:]:
        if "holdout" not in row or "holdout" not in base:
            continue
        row["val_gain"] = base["val_again"] - row["val_again"]
        row["holdout_gain"] = base["holdout"] - row["holdout"]
        row["gap"] = row["val_gain"] - row["holdout_gain"]
        if sigma is not None and row["val_gain"] > SURE * sigma and row["holdout_gain"] < FRACTION * row["val_gain"]:
            row["flags"].append("the gain is on val alone: was it trained on the validation rows?")


def cells(row):
    numbers = [row.get(name) for name in COLUMNS[2:7]]
    shown = ["" if v is None else f"{v:+.6f}" if name.endswith("_gain") else f"{v:.6f}"
             for name, v in zip(COLUMNS[2:7], numbers, strict=True)]  # fmt: skip
    flags = text.one_line("; ".join(row["flags"]), 300) or "ok"
    return [row["row"], row["commit"], *shown, flags, text.one_line(row["description"], 200)]


def table(rows):
    """The printed table, with aligned columns."""
    head = ["row", "commit", "val logged", "val again", "holdout", "val gain", "holdout gain"]
    lines = [[*head, "", ""], *map(cells, rows)]
    gaps = ["gap", *(f"{row['gap']:+.6f}" if "gap" in row else "" for row in rows)]
    shown = []
    for (*line, flags, description), gap in zip(lines, gaps, strict=True):
        line.append(gap)
        last = description[:60] if flags in ("", "ok") else f"{description[:60]}\n      FLAGGED: {flags}"
        shown.append([*line, last])
    return "\n".join(aligned(shown))


def chosen(history, kept, args):
    """The records to audit, the baseline's first if it is among them. kept: those whose archive is here."""
    kept = sorted(kept, key=lambda r: r["row"])
    if not kept:
        raise Refused("nothing was kept on this branch yet: `lab record` archives what it keeps")
    if args.numbers and "folder" in kept[0]:
        raise Refused("the rows of a team are those of its trees: name the tree, too (--tree PATH)")
    if args.best:
        best = history.best_record
        if best and best["run_id"] not in {r["run_id"] for r in kept}:
            raise Refused(f"the best ({label(best)}) is archived on another machine: audit it there")
        return [kept[0]] + [r for r in [history.best_record] if r is not kept[0]]
    unknown = sorted(set(args.numbers) - {r["row"] for r in kept})
    if unknown:
        raise Refused(f"row {unknown[0]} is not a kept run: only those are archived; `lab status --all` lists them")
    return [kept[0]] + [r for r in kept[1:] if not args.numbers or r["row"] in args.numbers]


def named(record):
    """0007; of a team's night TREE/0007."""
    return label(record).removeprefix("row ")


def folder_of(top, record):
    """Where the run is archived: in this tree, or in a tree of its team."""
    return record.get("folder") or top / names.RUNS / names.archive(record)


def night_of(repo):
    """(Night, its kept runs that can be audited, the baseline's first). Those of the branch or, for a tree that only feeds
    workers, what the team has kept and a working tree of this checkout has archived: their "folder" says where."""
    history = Night(records=archive.records_of(repo.top, repo.tag()))
    team = None if history.kept else team_of(repo)
    if not team or not team.night.kept:
        return history, list(history.kept)
    history, folders = team.night, {}
    for path in base_git.worktrees(repo.top):
        for found in path.glob(f"{names.RUNS}/*/{names.RUN_LOG}"):
            log = run_log.read(found)
            if log and log.header:
                folders[log.header["run_id"]] = found.parent
    for r in history.kept:  # of the baseline, which ran in several trees, any run will do
        r["folder"] = next((folders[run["run_id"]] for run in history.runs(r["code"])[::-1] if run["run_id"] in folders), None)
    here = [r for r in history.kept if r["folder"]]
    if not here:
        raise Refused("what the team has kept is archived in no working tree of this checkout: audit it where the workers ran")
    return history, here


def run(args):
    repo = Repo.find(args.tree)
    top = repo.top
    history, here = night_of(repo)
    records, left_out = chosen(history, here, args), len(history.kept) - len(here)
    if any(locks.run_in_progress(tree) for tree in {top, *(folder_of(top, r).parent.parent for r in records)}):
        raise Refused("a run is in progress in this tree, and each would slow the other down: wait for its end")
    (top / names.LAB).mkdir(exist_ok=True)
    try:
        known = json.loads((top / names.LAB / names.AUDIT_MEMORY).read_text())
    except (FileNotFoundError, ValueError):
        known = {}
    rows = []
    for i, record in enumerate(records, 1):
        if sys.stdout.isatty():
            print(f"\r{i}/{len(records)}: {named(record)} {record['short']} ", end="", flush=True)
        rows.append(examine(top, record, args, known))
    if sys.stdout.isatty():
        print(f"\r{'':30}\r", end="")
    sigma = history.sigma
    has_base = records[0]["code"] == min(history.kept, key=lambda r: r["row"])["code"]
    if has_base:
        compare(rows, sigma)
    print(table(rows))
    flagged = [row for row in rows if row["flags"]]
    known_sigma = "σ is not known, so gains on val alone are not checked" if sigma is None else f"σ {sigma:.6f}"
    if ("holdout" not in rows[0] or not has_base) and len(rows) > 1:
        known_sigma = f"the baseline has no scores{'' if has_base else ' here'}, so there are no gains; {known_sigma}"
    lines = "".join("\t".join(line) + "\n" for line in [COLUMNS, *map(cells, rows)])
    unwritten = [] if write(top / names.AUDIT_TSV, lines) else [names.AUDIT_TSV]
    unwritten += [] if keep(top, known) else [f"{names.LAB}/{names.AUDIT_MEMORY}"]
    where = f"read-only here, not written: {', '.join(unwritten)}" if unwritten else f"written to {names.AUDIT_TSV}"
    print(f"{known_sigma}; {len(rows)} runs, {len(flagged)} flagged; {where}")
    if left_out:
        print(f"{left_out} more kept runs are archived on other machines: audit them there")
    if trend := holdout.sentence([row["gap"] for row in rows if "gap" in row]):
        print(trend)
    if not any("holdout" in row for row in rows):
        raise Refused("none of these runs could be scored: the table has the reasons")
    return FLAGGED if flagged else 0
