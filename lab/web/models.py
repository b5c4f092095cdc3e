"""The API's responses. Unknown numbers are null, never 0 or NaN."""

from pydantic import BaseModel


class Experiment(BaseModel):
    number: int  # row in results.tsv
    commit: str
    val_bpb: float | None  # null for a crash
    memory_gb: float | None
    status: str
    description: str
    gain: float | None  # of a kept experiment over the best before it
    runs: int  # how many runs.jsonl has
    archived: bool
    given_up: str | None  # why the branch stepped back from it, if it was kept at first
    best: bool
    linked: bool  # whether the other routes accept its commit


class Night(BaseModel):
    tree: str
    problem: str | None  # why nothing can be shown
    notes: list[str]  # lines that could not be read
    sigma: float | None
    runs_per_hour: float | None
    best: Experiment | None
    best_by_estimate: bool  # false: the lowest kept value of a table, as there are no records to estimate from
    baseline: Experiment | None
    counts: dict[str, int]
    experiments: list[Experiment]


class Detail(Experiment):
    tree: str
    run_facts: list[dict[str, float | str | None]]  # one object per run
    diff: str | None
    diff_of: str
    log: str | None
    log_of: str


class Sample(BaseModel):
    commit: str
    text: str | None
    reason: str | None  # why there is no text


class Live(BaseModel):
    tree: str
    running: bool
    version: str  # changes whenever the night's files change
    experiments: int
    stage: str | None = None  # set-up, training, evaluation
    step: int | None = None
    percent: float | None = None
    loss: float | None = None
    milliseconds: float | None = None
    tokens_per_second: float | None = None
    mfu_percent: float | None = None
    epoch: float | None = None
    seconds_left: float | None = None


class Latest(BaseModel):
    tree: str
    experiment: Experiment | None  # the last row
    best: Experiment | None
    live: Live


class TeamExperiment(Experiment):
    label: str  # TREE/NNNN: its tree and its row there; number is that of the team
    found_by: str  # name of the tree
    page: str | None  # the working tree of this dashboard that shows it
    late: bool  # kept by its tree, when the team had something better


class Member(BaseModel):
    name: str
    host: str
    here: bool  # whether it is a working tree of this checkout
    page: str | None  # the working tree of this dashboard
    compares: bool  # false: other hardware, data or rules, or no runs yet
    runs: int
    experiments: int  # that it was the first to try
    kept: int
    gain: float | None  # sum of its gains over the team's best
    best: float | None  # its lowest kept val_bpb
    last: str | None  # when its last recorded run ended
    runs_now: str
    colour: str | None  # and sign: of its points in the chart
    sign: str


class Idea(BaseModel):
    label: str
    device: str
    description: str


class Team(BaseModel):
    tree: str
    team: str
    version: str  # changes whenever a member's records do
    notes: list[str]  # what was left out
    sigma: float | None
    runs: int
    runs_per_hour: float | None
    best: TeamExperiment | None
    best_by_estimate: bool
    baseline: TeamExperiment | None
    counts: dict[str, int]
    members: list[Member]  # the one that gained most first
    experiments: list[TeamExperiment]
    ideas: list[Idea]  # kept on other hardware, data or rules: their values do not compare


class MemberNow(BaseModel):
    name: str
    runs_now: str


class TeamLive(BaseModel):
    tree: str
    version: str
    members: list[MemberNow]


class Health(BaseModel):
    status: str


class Problem(BaseModel):
    detail: str
