"""The names of what a night leaves on disk and in git, each defined once.

In a working tree: run.log, checkpoint.pt and train.py of the latest run; runs.jsonl and results.tsv, the records;
runs/NNNN-<commit>/, the archived keeps; .lab/, what lab keeps for itself. In git: branches autoresearch/TAG, and
recorded commits as refs/autoresearch/TAG/NNNN, the records of runs in refs/autoresearch/TAG/log.

Of a team, here and on its remote under the same names: refs/autoresearch-team/TEAM/MEMBER/TAG, one ref a member and branch,
which only that member writes; refs/autoresearch-team/TEAM/queue/..., which any member may change by compare-and-swap.
What was fetched is in refs/autoresearch-mirror/TEAM/..., so that it never replaces a ref that is written here.
"""

import hashlib

TRAIN, CONSTANTS, PROGRAM = "train.py", "constants.py", "program.md"
TEAM_PROGRAM = "programs/team.md"  # of an agent that feeds workers
RUN_LOG, CHECKPOINT = "run.log", "checkpoint.pt"
RUNS_JSONL, RESULTS_TSV = "runs.jsonl", "results.tsv"
RUNS, BEST, SAMPLE = "runs", "best", "sample_output.txt"
NIGHT_LOG, AUDIT_TSV, PROOF = "night.log", "audit.tsv", "proof.txt"

LAB = ".lab"  # ignored by git; everything below is in it
JOURNAL, DAMAGED_JOURNAL, INDEX, LOCK = "journal.json", "journal-damaged.json", "index", "lock"
ENDS = "ends.json"  # of runs without a result
NIGHT_LOCK, AGENT_LOG, FLEET_ERRORS = "night.lock", "agent.log", "fleet.err"
WORKER_LOCK, WAITED, FAULT_LOG = "worker.lock", "waited.json", "fault.log"
PROPOSED = "proposed"  # empty; when this tree made its latest proposal, or `lab wait` found no worker for those that wait
AUDIT_MEMORY, PROVE, FLEET, LEFT, SAMPLE_LOG = "audit.json", "prove", "fleet", "left", "sample.log"
ASIDE, ASIDE_LOCK, BLANK = "aside", "aside.lock", "blank"  # of the sandbox: checkpoints it hides; what it shows as the holdout

NIGHT_ENDS = "AUTORESEARCH_NIGHT_ENDS"  # environment variable: when `lab night` ends, in seconds since 1970
FEEDER = "AUTORESEARCH_FEEDER"  # environment variable of an agent that feeds a fleet's workers and has no GPU
SRUN_JOB_FILE = "SRUN_JOB_FILE"  # environment variable of an agent on a cluster's login node: where its trainings run

PREFIX = "autoresearch/"  # of a night's branch
LOG_REF = "log"  # beside the numbers of recorded commits

TEAM, REMOTE = "autoresearch.team", "autoresearch.remote"  # in git's configuration
TEAM_REFS, MIRROR_REFS = "refs/autoresearch-team/", "refs/autoresearch-mirror/"
QUEUE = "queue"  # in place of a member's name
STATE = "state.json"  # beside the records in what a member publishes
MEMBER, MADE = "autoresearch-member", "autoresearch-made"  # in the git folder of a working tree: its name; an empty file
SHARE, FETCHED = "autoresearch", "fetched.json"  # in the git folder that all working trees share


def archive(record):
    """The folder of a record in runs/: 0007-1a2b3c4."""
    return f"{record['row']:04d}-{record['short']}"


def member_ref(team, member, tag):
    """Where a member publishes what it recorded on a branch."""
    return f"{TEAM_REFS}{team}/{member}/{tag}"


def queue_ref(team, *parts):
    """A ref of the team's queue: queue_ref("gpus", "1f2e", "claim"). Random ids keep two writers apart."""
    return "/".join([f"{TEAM_REFS}{team}", QUEUE, *parts])


def mirror_of(ref):
    """Where the remote's state of this ref of a team is kept after a fetch."""
    return MIRROR_REFS + ref.removeprefix(TEAM_REFS)


def sha256(path):
    """Hex digest of a file's bytes. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
