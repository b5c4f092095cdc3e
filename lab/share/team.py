"""A team as one night: everybody's records, checked, in one order, judged by one rule.

    team = team_night(repo, member, own, header)
    team.night        a Night (lab.analysis.history) of all runs that compare with this tree's
    team.trees        who is in the team, what each did last
    team.ideas        records from other hardware, data or rules: descriptions to learn from, never values to beat

Two results compare if rules, data and device are the same. Then all runs of one train.py (by its sha256) belong together,
whoever made them. The order of the records is the same for every member, whatever the clocks say: each record has a number
`seq`, one more than the highest that its member knew of, and records made at the same time are ordered by member.

A keep advances the team's line if it was measured against the team's best, or if it beats what is the best by now. If
not, it is a late gain: for its own base an improvement, for the team not.

What others published is parsed and checked here, never executed; a record that fails a check is left out, with a note.
"""

import hashlib
import json
import re
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from lab.analysis import history, verdict
from lab.analysis.history import Night, Replay, is_measurement, kind
from lab.base import text
from lab.base.errors import Refused, Stop
from lab.base.git import GitError
from lab.share.exchange import REASON, STATE_KEYS
from lab.share.membership import NAME, Member, members_here, membership
from lab.store import archive, names, records_in_git, results_tsv, rules, runs_jsonl
from lab.store.repository import Repo

LARGEST_RECORD, LARGEST_TREE, LARGEST_TRAIN = 1 << 16, 1 << 20, 1 << 20  # bytes; a record has about 3,000
MOST_RUNS, MOST_TREES = 20_000, 2_000  # of one member's branch; of a team
ABANDONED = 3600  # seconds after which nobody waits for what a member said it would run
ESCAPE = re.compile(r'(?<!\\)(?:\\\\)*\\[^"\\]')  # in JSON: lab writes only \" and \\
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SHOWN_NOTES = 6


class Tree(NamedTuple):
    """A branch of a member."""

    member: str  # its name; two trees may have the same branch name
    tag: str
    records: list  # as its log has them, oldest first
    state: dict  # what it said last, as lab.share.exchange.state_of returns it; {} if nothing can be read
    is_own: bool  # this working tree's
    is_here: bool  # of a working tree of this checkout: its refs were read where it writes them
    commit: str = ""  # that it published; the own tree's is not read

    @property
    def kind(self):
        return kind(next((r["header"] for r in self.records if r["header"]), None))


class Team(NamedTuple):
    member: object  # the lab.share.membership.Member that looks
    tag: str  # of its branch
    trees: tuple  # of Tree, the own one first
    night: Night  # of what compares with this tree
    ideas: tuple  # records of other hardware, data or rules, oldest first, each with "member" and "label"
    notes: tuple  # sentences on what was left out
    header: dict | None  # what "compares" means here; None: nothing is known of this tree's device yet
    next_seq: int  # of the next record that this member makes

    @property
    def best(self):
        """The record that the next experiment should be based on: the tip, or before there is one the baseline that the
        team is measuring; None before its first run. r["member"] found it, r["label"] names it."""
        return self.night.tip or self.night.baseline_record

    @property
    def bases(self):
        """What an experiment may be based on: the team's keeps, then those that were kept once, by their tree or by all."""
        once = [r for r in self.night.rows if r.get("late") or r.get("given_up")]
        return [*self.night.anchors, *once[::-1]]

    def after(self, changed):
        """The Team once these records of the own branch were recorded, too."""
        own = self.trees[0]
        trees = (own._replace(records=runs_jsonl.merged(own.records, changed)), *self.trees[1:])
        return assembled(self.member, self.tag, trees, self.notes, self.header)

    def comparing(self, header):
        """The same team, judged by what compares with this header."""
        return assembled(self.member, self.tag, self.trees, self.notes, header)

    def who(self, record):
        """Whose record this is, in words: "this tree", or the name of a branch."""
        return "this tree" if record["member"] == self.member.name and record["tag"] == self.tag else self.name_of(record)

    def name_of(self, record):
        """The name of the tree: its branch's, and its member's where two have the same."""
        twins = {tree.member for tree in self.trees if tree.tag == record["tag"]}
        return record["tag"] if len(twins) < 2 else f"{record['tag']} ({record['member'][:4]})"

    def decided(self, code):
        """The record that decided this code for the team; None if it is not decided."""
        return next((r for r in self.night.rows if r["code"] == code and r["verdict"] in ("keep", "discard", "crash")), None)

    def runs_it(self, code):
        """Whether another member said, less than an hour ago, that it runs this code next."""
        now = datetime.now(timezone.utc)
        said = [tree.state for tree in self.trees if not tree.is_own and tree.state.get("code") == code]
        return any(abs((now - datetime.fromisoformat(state["when"])).total_seconds()) < ABANDONED for state in said)


def team_night(repo, member, tag, own, header=None, refs=None):
    """The Team as this member sees it, from the refs that are here; fetch first (lab.share.exchange). own: the records of
    autoresearch/TAG, which is the member's. header: that of a run of this tree, if `own` has none: it says which records
    compare; without either, those of the kind that the team has most runs of, if this tree's rules are the same. refs:
    lab.share.exchange.refs_of, if just read."""
    trees, notes = read_trees([repo], member, tag, refs)
    known = {r["run_id"] for r in own}
    trees = [tree for tree in trees if not tree.records or any(r["run_id"] not in known for r in tree.records)]  # an old name
    own = Tree(member.name, tag, own, {}, True, True)
    header = next((r["header"] for r in own.records if r["header"]), header) or likely(repo, trees)
    trees = (own, *trees)
    if not _latest or (_latest[0].member, _latest[0].trees, _latest[0].header) != (member, trees, header):
        _latest[:] = [assembled(member, tag, trees, notes, header)]
    return _latest[0]


def team_seen(repos, name, tag=None):
    """The Team of this name for an onlooker, from the refs of these checkouts (lab.store.repository.Untrusted will do): no
    tree is its own, and nothing is fetched, written or named. It compares what the tree of branch autoresearch/TAG does, or
    without one the kind that most runs are of. Not for several threads at once."""
    onlooker = Member(name, "", None, None)
    trees, notes = read_trees(repos, onlooker, "")
    own = next((tree for tree in trees if tree.is_here and tree.tag == tag and tree.kind), None)
    header = next(r["header"] for r in own.records if r["header"]) if own else usual(trees)
    return assembled(onlooker, "", trees, notes, header)


_latest = []  # the last Team that was asked for: one `lab record` asks three times, of the same refs


def team_of(repo):
    """The Team of a working tree on a night's branch, for those that only read; None if it is in no team. Raises Refused
    elsewhere than on such a branch."""
    member = membership(repo)
    return member and team_night(repo, member, repo.tag(), archive.records_of(repo.top, repo.tag()))


def read_night(tree, results=None):
    """What lab.analysis.history.read_night returns of a tree, or, of a member of a team, the Night of the team."""
    try:
        team = None if results else team_of(Repo.find(tree))
    except (Refused, GitError):
        team = None
    if not team or not team.night.records:
        return history.read_night(tree, results)
    night = team.night
    night.tree, night.notes = Path(tree), team.notes
    return night


def likely(repo, trees):
    """A header of the kind that most runs have, if its rules are this tree's; None otherwise."""
    header = usual(trees)
    return header if header and not rules.changed(header, rules.tree(repo.top)) else None


def usual(trees):
    """A header of the kind that most runs have, in this checkout if any were made here; None without runs."""
    near = [tree for tree in trees if tree.is_here and tree.kind] or trees
    headers = [r["header"] for tree in near for r in tree.records if r["header"]]
    if not headers:
        return None
    most = Counter(json.dumps(kind(h)) for h in headers).most_common(1)[0][0]
    return next(h for h in headers if json.dumps(kind(h)) == most)


# ---------------------------------------------------------------------------------------------------
# One order, one line


def assembled(member, tag, trees, notes, header):
    """The Team of these trees, the own one first."""
    wanted, twice = kind(header), Counter(t for t, _ in {(tree.tag, tree.member) for tree in trees})
    ours, ideas, seen, highest = [], [], set(), 0
    for tree in trees:
        last, name = 0, tree.tag if twice[tree.tag] < 2 else f"{tree.tag} ({tree.member[:4]})"
        for i, r in enumerate(tree.records):
            last = max(last, r.get("seq") or 0)
            if r["run_id"] in seen:  # of a tree that was copied, its records included
                continue
            seen.add(r["run_id"])
            record = {**r, "member": tree.member, "home_row": r["row"], "label": label_of(tree, name, r), "found_by": name}
            same = (kind(r["header"]) or tree.kind) == wanted  # a run that crashed early may have no header
            (ours if tree.is_own or wanted and same else ideas).append(((last, tree.member, tree.tag, i), tree.is_own, record))
        highest = max(highest, last)
    ours, ideas = (sorted(found, key=lambda item: item[0]) for found in (ours, ideas))
    whole = one_line_of([(r, is_own) for _, is_own, r in ours])
    night = Night(records=[r for _, _, r in ours], spread=member.apart)
    night.replayed = whole.search, whole.line  # what Night would find, too, with a second replay
    return Team(member, tag, tuple(trees), night, tuple(r for _, _, r in ideas), tuple(notes), header, highest + 1)


def found_by(night):
    """{number of an experiment: name of the tree that made it} of a team's Night; {} of another."""
    return {r["row"]: r["found_by"] for r in night.rows if "found_by" in r}


def label_of(tree, name, r):
    """What to call an experiment: its ref is refs/autoresearch/LABEL, where the tree is of this checkout."""
    if not r["row"]:
        return f"{name}, {r['short']}"
    return f"row {r['row']:04d}" if tree.is_own else f"{name}/{r['row']:04d}"


def one_line_of(records):
    """Makes the records of a team, [(record, whether it is this tree's)] in their order, those of a single branch, so that
    a Night reads them: with rows from 1, one for each train.py that was decided, and with the verdicts as they are for the
    team. The records are changed in place. Returns their Replay.

    Where one tree discarded a code and another one kept it later, the keep is the code's only row: the first had given it up,
    or had not seen the other's runs.

    late: kept by its tree and not by the team. same_seed: another run of the code had the seed, so it measured nothing
    new. lost: its worker was given up before it could say so, and another one decides. given_up: somebody ran the keep again, and its gain does not hold."""
    whole, seeds, row, decided = Replay([r for r, _ in records]), {}, 0, {}
    baselines = [r for r, _ in records if r["baseline"] and r["summary"] and r["header"]]
    base = {r["header"]["seed"]: r["summary"]["val_bpb"] for r in baselines if r["code"] == baselines[0]["code"]}
    is_complete = len(verdict.distinct(list(base.values()))) >= verdict.BASELINE_RUNS
    kept_at = {r["code"]: i for i, (r, _) in enumerate(records) if r["row"] and r["verdict"] == "keep" and not r.get("lost")}
    for i, (r, is_own) in enumerate(records):
        if r["verdict"] == "confirm" and not is_own:
            r["verdict"] = "elsewhere"  # its own tree runs it again
        is_older = r["verdict"] in ("discard", "crash") and not r.get("given_up") and i < kept_at.get(r["code"], -1)
        if r["row"] and (is_older or r.get("lost")):
            r.update(verdict="elsewhere", row=None)
        if r["summary"] and r["header"]:
            used = seeds.setdefault(r["code"], set())
            r["same_seed"] = r["header"]["seed"] in used
            used.add(r["header"]["seed"])
        codes = [keep["code"] for keep in whole.line]
        if codes and not whole.line[0]["row"] and r["row"] and r["code"] != codes[0]:
            row += 1  # somebody went on from a baseline that ran less often than it should
            whole.line[0].update(verdict="keep", row=row)
            decided[codes[0]] = whole.line[0]
        if r["code"] in codes and (codes[0] != r["code"] or whole.line[0]["row"]):
            again(whole, r)
        elif r["baseline"] and r["summary"] and (not codes or r["code"] == codes[0]):
            settle_baseline(whole, r, is_complete)
        elif r["row"] and r["summary"] and whole.line and whole.kept(r):
            judge_keep(whole, r)
        if r["row"] and r["verdict"] in ("keep", "discard", "crash"):
            first = decided.get(r["code"])
            if first and r["verdict"] != "keep":
                r["row"] = None  # somebody else has tried it before
            else:
                decided[r["code"]] = r
                row += 1
                r["row"] = row
        else:
            r["row"] = None
        whole.add(r)
    return whole


def again(whole, r):
    """Another run of a keep of the line."""
    r["row"] = None
    r.pop("given_up", None)
    if not r["summary"]:
        return
    if r["verdict"] != "discard":
        r["verdict"] = "keep"
    elif r["code"] == whole.line[-1]["code"] and len(whole.line) > 1 and is_measurement(r) and not r["home_row"]:
        whole.line[-1].update(verdict="discard", given_up=r["run_id"], why=f"its gain did not hold when {r['tag']} ran it again")
    else:
        r["verdict"] = "keep"
        for keep in whole.line:
            if keep.get("given_up") == r["run_id"]:  # its tree gave it up; the team had something else by then
                keep.pop("given_up")
                keep["verdict"] = "keep"


def settle_baseline(whole, r, is_complete):
    """A run of the baseline, which is kept after BASELINE_RUNS runs of the whole team. is_complete: there are as many, though
    a tree may have closed its own as a keep before it saw the last."""
    values = [o["summary"]["val_bpb"] for o in [*whole.runs.get(r["code"], []), *[r] * is_measurement(r)]]  # slowed ones, too
    if is_measurement(r) and (len(verdict.distinct(values)) >= verdict.BASELINE_RUNS or r["verdict"] == "keep" and r["row"] and not is_complete):
        r.update(verdict="keep", row=r["row"] or 1, mean=verdict.mean(values), n=len(values))
    else:
        r["row"] = None


def judge_keep(whole, r):
    """A keep of one tree: late, if the best is another by now than the one that it was measured against, and better."""
    tip, values = whole.line[-1]["code"], whole.counted(r)
    measured_against = r.get("beat") or whole.code_of.get(str(r["parent"]))
    if measured_against == tip:
        return
    bar = verdict.bar(whole.search, len(verdict.distinct(values)), simpler=bool(r.get("simpler")))
    if verdict.mean(verdict.distinct(values)) >= bar.keep:
        r.pop("given_up", None)
        r.update(verdict="discard", late=True, why="a late gain: the team's best is another by now, and better")


# ---------------------------------------------------------------------------------------------------
# Reading what members published


class Published(NamedTuple):
    """What a commit that a member published holds."""

    records: list
    state: dict
    notes: list  # sentences on what was left out
    by_file: dict  # {(name of a run, its blob): (record, why it is left out or None)}


_read = {}  # (commit that a member published, branch): Published; one `lab record` looks three times


def read_trees(repos, member, tag, refs=None):
    """([Tree], notes) of all other branches of the team: from their own refs if they are of one of these checkouts, from a
    mirror of the remote if not. refs: those of the only repository, if just read."""
    found, notes = {}, []
    refs = {repo: repo.refs(member.refs, member.mirror) if refs is None else refs for repo in repos}
    for where, is_here, repo in [(member.refs, True, r) for r in repos] + [(member.mirror, False, r) for r in repos]:
        for ref, commit in refs[repo].items():
            if not ref.startswith(where):
                continue
            name, _, branch = ref.removeprefix(where).partition("/")
            if name == names.QUEUE:
                continue
            if not NAME.fullmatch(name) or not branch or "/" in branch:
                notes.append(f"{ref} is not what a member publishes: left out")
            elif (name, branch) != (member.name, tag) and (is_here or name != member.name):
                known = found.setdefault((name, branch), (commit, is_here, repo))
                if known[0] != commit and not is_here and is_left_behind(repo, member, name, known[0], commit):
                    found[name, branch] = commit, is_here, repo
    if len(found) > MOST_TREES:
        notes.append(f"the team has {len(found)} branches: the first {MOST_TREES} are read")
    wanted = dict(sorted(found.items())[:MOST_TREES])
    for repo in repos:
        read_commits(repo, member, [(commit, branch) for (_, branch), (commit, _, its) in wanted.items() if its is repo])
    trees = []
    for (name, branch), (commit, is_here, _) in wanted.items():
        records, state, why, _ = _read[commit, branch]
        notes += [f"{branch} ({name[:4]}): {sentence}" for sentence in why]
        trees.append(Tree(name, branch, records, state, False, is_here, commit))
    for key in _read.keys() - {(commit, branch) for (_, branch), (commit, _, _) in wanted.items()}:
        del _read[key]  # a worker and an onlooker look for days
    more = [f"{len(notes) - SHOWN_NOTES} more such notes"] * (len(notes) > SHOWN_NOTES)
    return trees, [*notes[:SHOWN_NOTES], *more]


def is_left_behind(repo, member, name, here, there):
    """Whether the ref of a member is here only because the git folder is a copy: its tree is elsewhere, and went on."""
    if not member.shared or name in members_here(member.shared.parent):
        return False
    return repo.ask("merge-base", "--is-ancestor", here, there) is not None


def read_commits(repo, member, wanted):
    """Puts what these commits hold into _read. wanted: [(commit, the branch that it should be of)]."""
    new = [key for key in wanted if key not in _read]
    if not new:
        return
    branches, known = {branch for _, branch in new}, {}
    for (_, branch), entry in _read.items():  # a branch grows: most of its records were read when it was shorter
        if branch in branches:
            known.setdefault(branch, {}).update({file: found for file, found in entry.by_file.items() if not found[1]})
    with repo.reader() as reader:
        read_new(repo, reader, member, new, known)


def read_new(repo, reader, member, new, known):
    """Puts what these commits hold into _read. known: {branch: Published.by_file of its earlier commits}."""
    files, states, bad = published_files(repo, reader, list(dict.fromkeys(commit for commit, _ in new)))
    wanted = {(branch, name, blob) for commit, branch in new for name, (_, blob) in files.get(commit, {}).items()}
    wanted = {(branch, name, blob) for branch, name, blob in wanted if (name, blob) not in known.get(branch, ())}
    data = objects(repo, sorted({blob for _, _, blob in wanted}), LARGEST_RECORD, "blob", reader)
    parsed = {(branch, name, blob): parse(data.get(blob), name, branch) for branch, name, blob in wanted}
    fits = fitting(repo, reader, member, [record for record, why in parsed.values() if not why])
    for (branch, name, blob), (record, why) in parsed.items():
        if not why and not fits.get((record["commit"], record["blob"], record["code"])):
            record, why = None, "has a hash that does not fit its commit"
        known.setdefault(branch, {})[name, blob] = record, why
    said = objects(repo, states.values(), LARGEST_RECORD, "blob", reader)
    for commit, branch in new:
        by_file = {(name, blob): known[branch][name, blob] for name, (_, blob) in files.get(commit, {}).items()}
        problems = Counter([*bad.get(commit, ()), *(why for _, why in by_file.values() if why)])
        notes = [f"{n} record{'s' * (n > 1)} left out: {why}" for why, n in problems.items()]
        good = [record for record, why in by_file.values() if not why]
        _read[commit, branch] = Published(good, state(said.get(states.get(commit))), notes, by_file)


def published_files(repo, reader, commits):
    """({commit: {name of a run: (number, blob)}}, {commit: blob of its state}, {commit: what is wrong})"""
    roots = objects(repo, [f"{commit}^{{tree}}" for commit in commits], LARGEST_TREE, "tree", reader)
    folders, states, bad = {}, {}, {}
    for commit in commits:
        if (root := roots.get(f"{commit}^{{tree}}")) is None:
            bad[commit] = ["it cannot be read"]
            continue
        entries = entries_of(root, len(commit) // 2)
        states[commit] = next((name for path, name, is_tree in entries if path == names.STATE and not is_tree), None)
        folders[commit] = [(path, name) for path, name, is_tree in entries if is_tree]
    states = {commit: blob for commit, blob in states.items() if blob}
    inner, files = objects(repo, [name for own in folders.values() for _, name in own], LARGEST_TREE, "tree", reader), {}
    for commit, own in folders.items():
        found = {}
        for folder, name in own:
            for path, blob, is_tree in entries_of(inner.get(name, b""), len(commit) // 2):
                match = records_in_git.FILE.fullmatch(f"{folder}/{path}")
                if match and not is_tree and len(match[1]) < 9:
                    found[match[2]] = int(match[1]), blob
        if len(found) > MOST_RUNS:
            bad[commit] = [f"it has {len(found)} runs"]
            continue
        files[commit] = dict(sorted(found.items(), key=lambda item: item[1]))
    return files, states, bad


def entries_of(tree, length):
    """[(name, object name, whether it is a tree)] of git's tree object."""
    entries, at = [], 0
    while (zero := tree.find(b"\0", at)) >= 0:
        mode, _, path = tree[at:zero].partition(b" ")
        entries.append((path.decode(errors="replace"), tree[zero + 1 : zero + 1 + length].hex(), mode == b"40000"))
        at = zero + 1 + length
    return entries


def objects(repo, wanted, largest, of_type, reader=None):
    """{name as given: bytes} of those objects that are here, of this type and at most this large: what is larger is never
    read. reader: one of repo's that is open, to ask more than once."""
    if reader is None:
        with repo.reader() as reader:
            return objects(repo, wanted, largest, of_type, reader)
    return {name: data for name, (_, data) in reader.read(wanted, largest, of_type).items()}


def parse(data, name, tag):
    """(record, None), or (None, why it is left out). name: that of its file, without the number."""
    if data is None:
        return None, "is missing, or too large"
    try:
        shown = data.decode()
        record = text.json_of(shown, text.FINITE.decode)
    except ValueError:
        return None, "is not JSON as lab writes it, or has numbers that are not finite"
    if not shown[:-1].isprintable() and CONTROL.search(shown) or "\\" in shown and ESCAPE.search(shown):
        return None, "has control characters"
    if not isinstance(record, dict) or not runs_jsonl.whole(record) or not shared_fields(record):
        return None, "is not a whole record"
    if record["tag"] != tag or records_in_git.name_of(record["run_id"]) != name:
        return None, "is of another branch or run than its place"
    if not is_one_line(record["description"]):
        return None, "has a description that lab would not write"
    return record, None


def shared_fields(record):
    """Whether the fields that only a team's records have are of the right types."""
    seq, beat = record.get("seq"), record.get("beat")
    return (seq is None or type(seq) is int and 0 <= seq < 1e9) and (beat is None or isinstance(beat, str)) and (
        "given_up" not in record or isinstance(record["given_up"], str)
    )  # fmt: skip


def is_one_line(description):
    """Whether the description is as lab writes it; the first test is quick, and true of most."""
    quick = description.isascii() and description.isprintable() and len(description) <= results_tsv.DESCRIPTION
    if quick and '"' not in description and "  " not in description and description.strip() == description:
        return True
    return description == text.one_line(description, results_tsv.LONG_DESCRIPTION)


def state(data):
    """What a member says of itself; {} if it cannot be read."""
    try:
        found = text.json_of(data.decode())
        found = {key: text.one_line(found[key], REASON) for key in STATE_KEYS}
        return found if datetime.fromisoformat(found["when"]).tzinfo else {}
    except (AttributeError, ValueError, KeyError, TypeError):
        return {}


_checked = {}  # {file: the lines that it had when this process read it, and what was compared since}


def fitting(repo, reader, member, records):
    """{(commit, blob, code): True} of those whose commit is here and has that train.py: git's name for it, and its sha256.
    What was compared once is remembered in a file beside git's, since it cannot change; an onlooker has none."""
    wanted = {(r["commit"], r["blob"], r["code"]) for r in records}
    memory = member.shared and member.shared / f"{member.team}-checked"
    known = compared_before(memory) if wanted else set()
    new = sorted(wanted - known)
    if not new:
        return dict.fromkeys(wanted, True)
    found = reader.read([f"{commit}:{names.TRAIN}" for commit, _, _ in new], LARGEST_TRAIN, "blob")
    contents = {key: found.get(f"{key[0]}:{names.TRAIN}", ("", b"")) for key in new}
    fits = [key for key, (blob, data) in contents.items() if blob == key[1] and hashlib.sha256(data).hexdigest() == key[2]]
    known.update(fits)
    if memory:
        try:
            member.shared.mkdir(exist_ok=True)
            with open(memory, "a", encoding="ascii") as f:
                f.write("".join(f"{' '.join(key)}\n" for key in fits))
        except (OSError, Stop):
            pass
    return dict.fromkeys([*fits, *(wanted & known)], True)


def compared_before(memory):
    """The set of what was compared before, to add to; read once a process, as other processes only add what this one may
    compare again."""
    if memory is None:
        return set()
    if memory not in _checked:
        try:
            _checked[memory] = {tuple(line.split()) for line in memory.read_text(encoding="ascii", errors="replace").splitlines()}
        except OSError:
            return _checked.setdefault(memory, set())
    return _checked[memory]
