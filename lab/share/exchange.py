"""How a member publishes what it recorded, and gets what others did: git refs, here and on a remote.

    publish(repo, member, tag, state)     after each record: own refs only; never raises, returns a note
    fetch(repo, member)                   before each record and in status; never raises, returns a note
    swap(repo, member, changes)           compare-and-swap of refs on the remote, for the queue

A member has one ref for each branch, refs/autoresearch-team/TEAM/MEMBER/TAG. It is a commit whose tree is that of
refs/autoresearch/TAG/log (one file a run), with state.json beside it, and which has the recorded commits among its
parents: the ref carries them to the remote, and no gc removes them. Working trees of one checkout read each other's refs
where they are. What a remote has is fetched into refs/autoresearch-mirror/TEAM/..., and read, never run.

A remote that does not answer costs a record at most FETCH_SECONDS + PUSH_SECONDS. What was not published is published
with the next record.
"""

import json
import os
import re
import time
from pathlib import Path

from lab.base import git as base_git
from lab.base import locks
from lab.base.errors import Refused, Stop, os_reason
from lab.base.files import write
from lab.base.git import GitError
from lab.base.text import json_of, one_line
from lab.store import archive, names, records_in_git
from lab.store.names import PREFIX

FETCH_SECONDS, PUSH_SECONDS = 15, 15  # of one call; a queue's call may use other limits
LOOSE = 200  # refs of the queue with a file each, after which they are packed
LOCK_SECONDS = 20  # that another working tree's fetch may take
STALE_LOCK = 60  # seconds that a lock file of the remote is in the way: every push is ended sooner, here and elsewhere
PARENTS = 12  # recorded commits that one commit carries: git limits a commit's parents to 16
UNNAMED = "autoresearch-team"  # what a push calls a remote that the configuration has no name for
REASON = 200  # characters of git's message in a note
STATE_KEYS = {"tree": str, "host": str, "branch": str, "when": str, "next": str, "code": str}
LOST = r"could not read Username|terminal prompts disabled|Permission denied|Authentication failed|Host key verification"
REFUSED = (r"\[(rejected|remote rejected)\] \((stale info|.*fetch first|.*non-fast-forward|.*failed to update ref|"
           r".*reference already exists|.*cannot lock ref.*|.*incorrect old value.*)\)")  # fmt: skip
RACE = "(atomic transaction failed)"  # another push changed a ref between git's look at it and its change
REWRITTEN = "on the remote somebody removed or rewrote what members published"
MISSING = r"does not appear to be a git repository|not a git repository|repository .* not found|No such remote|no such remote"


# ---------------------------------------------------------------------------------------------------
# Publishing


def publish(repo, member, tag, state, push=True):
    """Publishes the records and recorded commits of autoresearch/TAG: to the member's own ref at once, and all of the
    member's refs to the remote in one push. state: {"next": what the tree does now, "code": sha256 of the train.py that
    it will run, or ""}, see state_of. push=False: the caller calls pushed() or swap() next. Returns a sentence if the remote
    did not take it, or None. Never raises."""
    try:
        update_own(repo, member, tag, state)
    except (Stop, OSError, ValueError) as error:
        return later(error)
    return pushed(repo, member) if push else None


def pushed(repo, member):
    """Takes the member's refs to the remote, if there is one. Returns and raises as publish."""
    try:
        return push_own(repo, member) if member.remote else None
    except (Stop, OSError, ValueError) as error:
        return later(error)


def later(error):
    return f"this record is not shared with the team yet: {reason(error)}; the next one takes it along"


def state_of(repo, tag, next="", code=""):
    """What a member says of itself beside its records."""
    return {
        "tree": str(repo.top), "host": os.uname().nodename if hasattr(os, "uname") else "", "branch": f"{PREFIX}{tag}",
        "when": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "next": one_line(next, REASON), "code": code,
    }  # fmt: skip


def update_own(repo, member, tag, state):
    """Makes the member's ref of this branch hold all records of the branch. Raises GitError."""
    ref, log = member.ref(tag), records_in_git.ref_of(tag)
    asked = f"{log}^{{tree}}\n{ref}^{{commit}}\n"
    tree, before = (line.split()[0] if len(line.split()) == 3 else None
                    for line in repo.git("cat-file", "--batch-check", stdin=asked).splitlines())  # fmt: skip
    if not tree:
        raise GitError(("cat-file",), f"{log} is missing")
    # Also those that have no number yet, and another member's commit that this one ran again.
    recorded = list(dict.fromkeys(r["commit"] for r in archive.records_of(repo.top, tag)))
    wanted = "\n".join([*recorded, *[f"^{before}"] * bool(before)])
    listed = set((repo.ask("rev-list", "--ignore-missing", "--stdin", stdin=wanted) or "").split())
    new = [commit for commit in recorded if commit in listed]
    data = json.dumps(state, ensure_ascii=False).encode() + b"\n"
    stream = []
    for i in range(0, max(len(new), 1), PARENTS):
        stream += [f"commit {ref}\ncommitter autoresearch <autoresearch@localhost> {int(time.time())} +0000\ndata 0\n".encode()]
        stream += [f"from {before}\n".encode()] if before and not i else []
        stream += [f"merge {commit}\n".encode() for commit in new[i : i + PARENTS]]
        stream += [f'M 040000 {tree} ""\nM 100644 inline {names.STATE}\ndata {len(data)}\n'.encode(), data, b"\n"]
    stream += [b"done\n"]
    repo.git("fast-import", "--quiet", "--force", "--done", stdin=b"".join(stream))


def push_own(repo, member):
    """Pushes the member's refs to the remote in one atomic push. Returns None. Raises GitError, and Refused if the remote
    holds another project. The push is forced: nobody else writes these refs, so what differs was damaged."""
    check_remote(repo, member)
    push(repo, member, [own_refspec(member)], PUSH_SECONDS)


def own_refspec(member):
    mine = f"{member.refs}{member.name}/*"
    return f"+{mine}:{mine}"


def push(repo, member, refspecs, seconds, *options):
    """git push to the team's remote, without the repository's hooks. What the remote has taken git writes to the mirror, too.
    Raises GitError."""
    url = url_of(repo, member)
    name = member.remote if url else UNNAMED
    config = [] if url else [(f"remote.{name}.url", member.remote)]
    config += [(f"remote.{name}.fetch", f"+{member.refs}*:{member.mirror}*")]
    try:
        return base_git.with_remote(
            repo.top, "-c", "core.hooksPath=/dev/null", "push", "--porcelain", "--no-verify", "--atomic", *options, "--",
            name, *refspecs, seconds=seconds, config=config,
        )  # fmt: skip
    except GitError as error:
        _urls.pop((repo.top, member.remote), None)
        unlock(repo, url or member.remote, str(error))
        raise


_locks = {}  # a lock file that was in the way: (which file that was, when it was first met)


def unlock(repo, url, message):
    """Removes the lock file that git's message names, if a killed git left it in a remote that is a folder."""
    found, folder = re.search(r"'([^']+\.lock)': File exists", message), (repo.top / url).resolve()
    if not found or not folder.is_dir() or not (lock := Path(found[1]).resolve()).is_relative_to(folder):
        return
    known, now = base_git.identity(lock), time.monotonic()
    before, since = _locks.get(lock, (None, now))
    if known != before:
        _locks[lock] = known, now
    elif known and now - since > STALE_LOCK:
        base_git.remove_stale(folder, lock, patience=0)


_urls = {}  # (top, a remote): its URL; asked again after a call that failed


def url_of(repo, member):
    """The URL of the team's remote if the configuration names it, "" if the remote is itself a path or URL."""
    key = repo.top, member.remote
    if key not in _urls:
        _urls[key] = repo.ask("config", f"remote.{member.remote}.url") or ""
    return _urls[key]


def unpublished(repo, member):
    """How many of this member's records the remote does not have, as far as is known; 0 without a remote."""
    if not member.remote:
        return 0
    mine, behind = base_git.refs(repo.top, f"{member.refs}{member.name}/"), 0
    there = base_git.refs(repo.top, names.mirror_of(f"{member.refs}{member.name}/"))
    for ref, commit in mine.items():
        published = there.get(names.mirror_of(ref))
        if published != commit:
            behind += len(runs_in(repo, commit) - (runs_in(repo, published) if published else set()))
    return behind


def runs_in(repo, commit):
    listed = repo.ask("ls-tree", "-r", "--name-only", commit) or ""
    return {line for line in listed.splitlines() if records_in_git.FILE.fullmatch(line)}


# ---------------------------------------------------------------------------------------------------
# Fetching


def fetch(repo, member, seconds=FETCH_SECONDS, fresh=0.0):
    """Gets what the team's remote has into the mirror: members' refs, and the queue's, which are removed where the remote
    has removed them. A member's ref that was removed or rewritten there keeps what was known here: only the member itself
    writes it, and it only grows. Nothing is fetched if another working tree of this checkout has done it less than `fresh`
    seconds ago, or while this call waited for it. Returns a sentence if something is wrong, or None. Never raises."""
    return fetch_and_look(repo, member, seconds, fresh)[0]


def fetch_and_look(repo, member, seconds=FETCH_SECONDS, fresh=0.0, before=None):
    """(what fetch() returns, {ref: commit} of the team's refs and the mirror's as they are then, None if they were not
    read). before: what an earlier call of this process has read, which the fetch is compared with."""
    if not member.remote:
        return None, None
    try:
        began = time.time()
        member.shared.mkdir(exist_ok=True)
        with locks.hold(member.shared / f"{member.team}.lock", LOCK_SECONDS) as held:
            known = last_fetch(member)
            if known and began - fresh <= known["when"] <= time.time() + 1:
                return known["note"], None
            late = "another fetch takes too long; this one was left out"
            note, refs = fetched(repo, member, seconds, before) if held else (late, None)
            write(member.shared / f"{member.team}-{names.FETCHED}", json.dumps({"when": time.time(), "note": note}))
            return note, refs
    except (Stop, OSError, ValueError) as error:
        return f"what the team did elsewhere was not fetched: {reason(error)}", None


def refs_of(repo, member):
    """{ref: commit} of the team's refs here, and with a remote of the mirror's."""
    return base_git.refs(repo.top, member.refs, *[member.mirror] * bool(member.remote))


def last_fetch(member):
    """{"when": seconds since 1970, "note": its sentence or None} of the last fetch of this checkout; None if unknown."""
    try:
        known = json_of((member.shared / f"{member.team}-{names.FETCHED}").read_text(encoding="utf-8"))
        when, note = known["when"], known["note"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if isinstance(when, int | float) and (note is None or isinstance(note, str)) else None


def fetched(repo, member, seconds, before=None):
    """Fetches. Returns (a sentence if a ref was rewritten, or if that failed; refs_of() after it, None if it failed)."""
    before = refs_of(repo, member) if before is None else before
    try:
        check_remote(repo, member, seconds)
        base_git.with_remote(
            repo.top, "fetch", "--quiet", "--no-tags", "--prune", "--no-write-fetch-head", "--no-recurse-submodules",
            "--no-auto-maintenance", "--refmap=", "--", member.remote, f"+{member.refs}*:{member.mirror}*", seconds=seconds,
        )  # fmt: skip
    except Stop as error:
        _urls.pop((repo.top, member.remote), None)
        return f"what the team did elsewhere was not fetched: {reason(error)}", None
    pack_refs(repo, member)
    after = refs_of(repo, member)
    return keep_what_was_known(repo, member, before, after), after


def pack_refs(repo, member):
    """Writes the refs of this checkout into one file once the queue has many: git then reads one file and not each ref's."""
    try:
        loose = len(os.listdir(member.shared.parent / f"{member.mirror}{names.QUEUE}"))
    except OSError:
        return
    if loose > LOOSE:
        repo.ask("pack-refs", "--all")


def keep_what_was_known(repo, member, before, after):
    """Restores members' refs of the mirror that the remote has no longer, or has rewritten; in `after`, too."""
    queue = f"{member.mirror}{names.QUEUE}/"
    old = {ref: commit for ref, commit in before.items() if ref.startswith(member.mirror) and not ref.startswith(queue)}
    here = {names.mirror_of(ref): commit for ref, commit in after.items() if ref.startswith(member.refs)}  # published from here
    old = {ref: commit for ref, commit in old.items() if after.get(ref) not in (commit, here.get(ref, commit))}
    if not old:
        return None
    present = [f"^{after[ref]}" for ref in old if ref in after]
    lost = repo.ask("rev-list", "--stdin", "--max-count=1", stdin="\n".join([*old.values(), *present]))
    if lost == "":  # everything that was known is still reachable
        lost = [ref for ref in old if ref not in after]
    else:
        lost = [ref for ref in old if ref not in after or repo.ask("merge-base", "--is-ancestor", old[ref], after[ref]) is None]
    for ref in lost:
        repo.git("update-ref", ref, old[ref])
        after[ref] = old[ref]
    if not lost:
        return None
    who = ", ".join(sorted(ref.removeprefix(member.mirror) for ref in lost)[:3])
    return f"{REWRITTEN} ({who}): what was known here stays"


def check_remote(repo, member, seconds=FETCH_SECONDS):
    """Refuses a remote that cannot be read, or that holds another project: it is neither empty nor has it a ref of this
    team, nor a branch or tag that this checkout knows. Asked once for each remote. Raises Refused."""
    url = url_of(repo, member) or member.remote
    seen = member.shared / f"{member.team}-remote"
    if seen.is_file() and seen.read_text(encoding="utf-8", errors="replace") == url:
        return
    try:
        shown = base_git.with_remote(repo.top, "ls-remote", "--refs", "--", member.remote, seconds=seconds)
    except GitError as error:
        raise Refused(f"the remote {clean(member.remote)} cannot be used: {reason(error)}") from None
    there = dict(reversed(line.split("\t", 1)) for line in shown.splitlines() if "\t" in line)
    team = any(ref.startswith(names.TEAM_REFS) for ref in there)
    if there and not team:
        objects = "".join(f"{name}\n" for name in sorted(set(there.values())))
        known = repo.git("cat-file", "--batch-check", stdin=objects).splitlines()
        if all(line.endswith(" missing") for line in known):
            raise Refused(
                f"the remote {clean(member.remote)} holds another project (it shares no commit with this one): git fetch it "
                f"first if it is only ahead, or git config {names.REMOTE} ANOTHER"
            )
    member.shared.mkdir(exist_ok=True)
    write(seen, url)


# ---------------------------------------------------------------------------------------------------
# Compare-and-swap on the remote


def swap(repo, member, changes, seconds=PUSH_SECONDS, publish=False):
    """Changes refs on the remote, all or none. changes: [(ref, new, old)] as lab.base.git.change_refs takes them: old None:
    there must be no such ref; new None: it is deleted (also "done" if it was gone already). publish: the member's own refs
    are pushed with them. Returns

        "done"     this call has changed them
        "same"     they were so already: an earlier attempt whose answer was lost, if the new object is the caller's own
                   (two callers that push one and the same object are both told that all is well: make each unique)
        "refused"  a ref is not what `old` says; nothing was changed

    Raises GitError if the remote does not answer: whether it was done is then unknown until it does."""
    leases = [f"--force-with-lease={ref}:{old or ''}" for ref, _, old in changes]
    refspecs = [f"{new or ''}:{ref}" for ref, new, _ in changes] + [own_refspec(member)] * publish
    if publish:
        check_remote(repo, member)
    try:
        try:
            shown = push(repo, member, refspecs, seconds, *leases)
        except GitError as error:
            if RACE not in error.shown:
                raise
            shown = push(repo, member, refspecs, seconds, *leases)  # it now sees what the other one has written
    except GitError as error:
        if any(flag == "!" and re.search(REFUSED, said) for flag, said in answers(error.shown, changes)):
            return "refused"
        raise
    flags = [flag for flag, _ in answers(shown, changes)]
    return "done" if flags and "=" not in flags else "same"


def answers(shown, changes):
    """[(flag, what git says)] of these changes, of what `git push --porcelain` prints."""
    wanted = {ref for ref, _, _ in changes}
    found = [match for match in re.finditer(r"^(.)\t[^:\n]*:(\S+)\t(.*)$", shown, re.MULTILINE) if match[2] in wanted]
    return [(match[1], match[3]) for match in found]


# ---------------------------------------------------------------------------------------------------
# Words


def clean(text):
    """A remote's name or message for the screen: one line, and no password of a URL."""
    return one_line(re.sub(r"(\w+://)[^/@\s]*@", r"\1", text), REASON)


def reason(error):
    """The error as a clause."""
    if isinstance(error, Refused):
        return clean(str(error))
    if isinstance(error, OSError):
        return os_reason(error)
    text = str(error)
    if re.search(LOST, text):
        return f"the remote wants a password or a key that git does not have ({clean(text)})"
    if re.search(MISSING, text):
        return f"it is not a git repository ({clean(text)})"
    return clean(text)
