"""lab record: what it writes, what it undoes, what it refuses. Real git, made-up runs."""

import errno
import os
import re
import shutil
import subprocess

import pytest
from fakenight import CLOSE, PROGRESS, ROOT, TRAIN, FakeNight

from lab.store import archive
from lab.store.repository import Repo


@pytest.fixture
def night(tmp_path):
    return FakeNight(tmp_path / "night")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    night = FakeNight(tmp_path_factory.mktemp("baseline") / "night")
    night.baseline()
    return night


@pytest.fixture
def begun(baseline, tmp_path):
    """A night with its baseline: mean 1.0, σ 0.002."""
    return baseline.copy(tmp_path / "begun")


def next_command(result):
    """The shell command after `next:`."""
    (line,) = [line for line in result.out.splitlines() if line.startswith("next: ")]
    return line


# --- the verdicts --------------------------------------------------------------


def test_the_baseline_runs_three_times_under_three_seeds_and_becomes_one_row(night):
    night.run(1.0)
    first = night.recorded("baseline")
    assert first.verdict == "confirm" and "AUTORESEARCH_SEED=43 uv run train.py > run.log 2>&1" in first.out
    assert night.rows() == [] and night.archives() == []
    night.run(1.002, seed=43)
    assert "AUTORESEARCH_SEED=44 " in night.recorded().out  # a repeat needs no description
    night.run(0.998, seed=44)
    third = night.recorded()
    assert third.verdict == "keep"
    assert night.rows() == [[night.head()[:7], "1.000000", "44.0", "keep", "baseline"]]
    assert [r["verdict"] for r in night.records()] == ["confirm", "confirm", "keep"]
    assert night.records()[-1]["sigma"] == pytest.approx(0.002) and night.records()[-1]["dof"] == 2
    night.check()


def test_the_same_result_under_different_seeds_counts_once_and_is_named(night):
    night.run(1.0)
    assert "same result" not in night.recorded("baseline").out
    night.run(1.0, seed=43)
    assert "the same result under different seeds (42 and 43): these runs count as one" in night.recorded().out
    night.run(1.002, seed=44)
    assert "(42 and 43)" in night.recorded().out
    assert night.records()[-1]["sigma"] == pytest.approx(0.002 / 2**0.5), "two results, not three"


def test_a_keep_advances_the_branch_and_is_archived_whole(begun):
    commit, result = begun.experiment("wider", 0.99)
    run_id = begun.records()[-1]["run_id"]
    assert result.verdict == "keep" and begun.head() == commit
    folder = begun.path / "runs" / f"0002-{commit[:7]}"
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint.pt", "git_log.txt", "model_info.txt", "results.tsv", "run.log", "train.py",
    ]  # fmt: skip
    assert (folder / "train.py").read_text() == begun.read("train.py")
    assert (folder / "run.log").read_text() == begun.read("run.log")
    assert run_id.encode() in (folder / "checkpoint.pt").read_bytes()
    assert (folder / "results.tsv").read_text() == begun.read("results.tsv")
    assert "wider" in (folder / "git_log.txt").read_text() and commit in (folder / "git_log.txt").read_text()
    info = (folder / "model_info.txt").read_text()
    assert f"commit: {commit}" in info and "num_params_M: 50.3" in info and "depth: 8" in info
    assert os.readlink(begun.path / "runs" / "best") == folder.name
    assert not (begun.path / "checkpoint.pt").exists()  # moved: the next run writes its own
    begun.check()


@pytest.mark.parametrize("other_disk", [False, True])
def test_every_file_of_an_archive_is_on_the_disk_before_the_folder_is_moved_in(begun, monkeypatch, other_disk):
    """Or a power cut may leave an archive with an empty checkpoint, which no later record makes again."""
    commit, _ = begun.experiment("wider", 0.99)
    record, folder = begun.records()[-1], begun.path / "runs" / f"0002-{commit[:7]}"
    os.replace(folder / "checkpoint.pt", begun.path / "checkpoint.pt")
    shutil.rmtree(folder)
    flushed, fsync, replace, seen = set(), os.fsync, os.replace, []

    def note(fd):
        fsync(fd)
        flushed.add(os.fstat(fd).st_ino)

    def look(source, target):
        if target == folder:
            seen.extend((path.name, path.stat().st_ino in flushed) for path in source.iterdir())
        if other_disk and source == begun.path / "checkpoint.pt":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", look)
    assert archive.make(Repo.find(begun.path), record, "a table\n") is None
    assert len(seen) == 6 and all(whole for _, whole in seen), seen


def test_a_checkpoint_that_a_killed_sandbox_has_hidden_is_archived(begun):
    begun.change_train()
    begun.commit("wider")
    begun.run(0.99)
    (begun.path / ".lab" / "aside").mkdir(parents=True)
    hidden = begun.path / ".lab" / "aside" / "checkpoint.pt"
    weights = (begun.path / "checkpoint.pt").read_bytes()
    os.replace(begun.path / "checkpoint.pt", hidden)
    result = begun.recorded("wider")
    assert result.verdict == "keep" and "no checkpoint.pt" not in result.out
    assert (begun.path / "runs" / "best" / "checkpoint.pt").read_bytes() == weights and not hidden.exists()


def test_a_discard_undoes_the_commit_and_keeps_it_to_be_looked_at(begun):
    before = begun.head()
    commit, result = begun.experiment("worse", 1.01)
    assert result.verdict == "discard" and "-5.00σ" in result.out
    assert begun.head() == before and begun.read("train.py") == TRAIN.format(0)
    assert begun.rows()[-1] == [commit[:7], "1.010000", "44.0", "discard", "worse"]
    assert begun.git("rev-parse", "refs/autoresearch/test/0002") == commit
    assert begun.archives() == [f"0001-{before[:7]}"]
    begun.check()


@pytest.mark.parametrize("second, expected", [(0.995, "keep"), (1.001, "discard")])
def test_a_close_call_is_run_again_under_a_new_seed_and_the_mean_decides(begun, second, expected):
    base = begun.head()
    commit, first = begun.close_call()
    assert next_command(first) == "next: AUTORESEARCH_SEED=43 uv run train.py > run.log 2>&1"
    assert begun.head() == commit and len(begun.rows()) == 2
    assert [line.split()[0].rpartition("/")[2] for line in begun.refs().splitlines()] == ["0001", "0002", "log"]
    begun.run(second, seed=43)
    last = begun.recorded()
    assert last.verdict == expected
    assert begun.head() == (commit if expected == "keep" else base)
    assert begun.rows()[2:] == [[commit[:7], f"{(CLOSE + second) / 2:.6f}", "44.0", expected, "close"]]
    record = begun.records()[-1]
    assert record["n"] == 2 and record["dof"] == 3 and record["parent"] == base
    begun.check()


def test_recording_another_commit_closes_one_that_waits_as_a_discard(begun):
    base = begun.head()
    waiting, _ = begun.close_call()
    begun.git("reset", "-q", "--keep", base)
    commit, result = begun.experiment("good", 0.99)
    assert result.verdict == "keep" and f"closed: row 0003 {waiting[:7]} is a discard" in result.out
    assert [row[3:] for row in begun.rows()] == [["keep", "baseline"], ["discard", "no gain 0"], ["discard", "close"], ["keep", "good"]]
    assert begun.chain() == ["good", "start"]
    begun.check()


def test_an_experiment_on_top_of_one_that_waits_is_judged_and_undone_with_it(begun):
    base = begun.head()
    begun.close_call()
    _, result = begun.experiment("worse on top", 1.01)
    assert result.verdict == "discard" and begun.head() == base
    assert [row[3] for row in begun.rows()] == ["keep", "discard", "discard", "discard"]
    begun.check()


def test_a_commit_that_waits_can_be_given_up_without_its_repeat(begun):
    base = begun.head()
    commit, _ = begun.close_call()
    result = begun.recorded("--discard")
    assert result.verdict == "discard" and begun.head() == base
    assert begun.rows()[-1] == [commit[:7], "0.997680", "44.0", "discard", "close"]
    assert len(begun.records()) == 5
    begun.check()


def test_a_baseline_that_ran_once_is_closed_as_a_keep_and_the_comparison_is_plain(night):
    night.run(1.0)
    night.recorded("baseline")
    _, result = night.experiment("better", 0.9999)
    assert result.verdict == "keep" and "σ is not known" in result.out
    assert [row[3] for row in night.rows()] == ["keep", "keep"]
    night.check()


def test_the_agent_can_be_stricter_but_not_more_generous(begun):
    base = begun.head()
    _, result = begun.experiment("ugly", 0.9, "--discard")
    assert result.verdict == "discard" and begun.head() == base
    begun.change_train()
    begun.commit()
    begun.run(1.01)
    assert begun.record("no better", "--keep").rc == 2


def test_a_crash_shows_the_end_of_its_trace_and_undoes_the_commit(begun):
    base = begun.head()
    begun.change_train()
    commit = begun.commit("crash")
    trace = "Traceback (most recent call last):\n" + "  File x, line 1\n" * 900 + "ValueError: " + "shape " * 200 + "\n"
    begun.run(tail=PROGRESS * 500 + trace)
    result = begun.recorded("wrong shape")
    assert result.verdict == "crash" and "ValueError: shape" in result.out and "step 00123" not in result.out
    assert len(result.out) <= 4800
    assert begun.head() == base
    assert begun.rows()[-1] == [commit[:7], "0.000000", "0.0", "crash", "wrong shape"]
    begun.check()


@pytest.mark.parametrize(
    "tail",
    [
        "FAIL: loss is nan\n",
        "\nwatchdog: training took longer than 336 s; every thread's stack follows\nThread 0x1 (most recent call first):\n",
        "torch.OutOfMemoryError: CUDA out of memory.\n",
        "AcceleratorError: CUDA error: unspecified launch failure (train.py, line 503, in train_step): if nvidia-smi shows\n",
        "the model sees its own future (earlier logits moved by 0.500): refused\n",
        "model(x) returned (2, 3): evaluation needs logits of shape (B, T, V) = (2, 3, 4)\n",
        "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n",
    ],
)
def test_every_way_to_fail_is_a_crash(begun, tail):
    begun.change_train()
    begun.commit()
    begun.run(tail=tail)
    assert begun.recorded("an idea").verdict == "crash"
    begun.check()


def test_a_syntax_error_is_a_crash_although_the_run_never_said_who_it_was(begun):
    begun.change_train("def main(:\n")
    begun.commit()
    (begun.path / "run.log").write_text('  File "train.py", line 1\n    def main(:\n             ^\nSyntaxError: bad\n')
    result = begun.recorded("typo")
    assert result.verdict == "crash" and "SyntaxError: bad" in result.out
    assert "recorded already" in begun.refused("typo")
    begun.check()


@pytest.mark.parametrize("tail", ["\npreempted\n", "\ninterrupted\n", "", "---\nval_bpb:          0.9"])
def test_a_run_that_the_machine_ended_is_run_again_and_not_recorded(begun, tail):
    begun.change_train()
    commit = begun.commit()
    begun.run(tail=tail)
    refusal = begun.refused("an idea", rc=1 if "---" in tail else 75)
    assert "un it again: uv run train.py > run.log 2>&1" in refusal
    assert begun.head() == commit
    result = begun.recorded("an idea", "--discard")  # the agent may give it up
    assert result.verdict == "crash"
    begun.check()


def test_a_crash_of_the_baseline_is_no_row_and_its_mending_is_no_experiment(night):
    night.run(tail="torch.OutOfMemoryError: CUDA out of memory.\n")
    result = night.recorded("baseline")
    assert result.verdict == "crash" and night.rows() == []
    night.change_train()
    fixed = night.commit("smaller batch")
    night.baseline()
    assert night.rows() == [[fixed[:7], "1.000000", "44.0", "keep", "baseline"]] and night.head() == fixed
    night.check()


def test_a_simplification_needs_two_runs_and_less_code(begun):
    base = begun.head()
    begun.change_train(TRAIN.format(0).replace("WIDTH = 512\n", ""))
    commit = begun.commit("no width")
    begun.run(1.0003)
    assert begun.recorded("no width", "--simpler").verdict == "confirm"
    begun.run(1.0001, seed=43)
    result = begun.recorded()  # the command that was printed: the claim was made with the first run
    assert result.verdict == "keep" and "simpler" in result.out and begun.head() == commit != base
    assert os.readlink(begun.path / "runs" / "best").startswith("0001-")  # what is best stays best
    begun.check()


def test_a_simplification_that_does_not_remove_lines_is_refused(begun):
    begun.change_train(TRAIN.format(0).replace("LR = 0.04", "LR = 0.05\n\n\n"))
    begun.commit()
    begun.run(1.0)
    assert "adds 1 lines and removes 1" in begun.refused("no", "--simpler")


def test_another_run_of_what_is_kept_adds_to_what_is_known_but_no_row(begun):
    commit, _ = begun.experiment("good", 0.99)
    begun.run(0.992, seed=43)
    assert begun.recorded().verdict == "keep"
    assert len(begun.rows()) == 2 and begun.records()[-1]["mean"] == pytest.approx(0.991)
    assert begun.records()[-1]["dof"] == 3 and begun.head() == commit
    _, worse = begun.experiment("against the mean of both", 0.9915)
    assert begun.records()[-1]["best_known"] > 0.991
    begun.check()


def test_the_same_code_in_another_commit_is_the_same_experiment(begun):
    begun.experiment("worse", 1.01)
    begun.change_train(TRAIN.format(begun.ideas))
    begun.commit("once more")
    begun.run(0.9)
    assert "tried before under seed 42 (row 0002): git reset --keep" in begun.refused("once more")
    begun.run(0.9, seed=43)
    assert begun.recorded("once more").verdict == "keep" and begun.records()[-1]["mean"] == pytest.approx(0.955)


def test_a_repeat_at_another_speed_is_said_to_be_the_machines_doing(begun):
    begun.close_call()
    begun.run(CLOSE, seed=43, steps=900)
    assert "5.6% slower than this code's first run: that is the machine's doing" in begun.recorded().out


def test_the_commands_it_prints_are_those_of_program_md(begun):
    begun.human_commits("Run it: `uv run -m lab sandbox > run.log 2>&1`\n")
    _, result = begun.close_call()
    assert next_command(result) == "next: AUTORESEARCH_SEED=43 uv run -m lab sandbox > run.log 2>&1"


def test_what_it_prints_is_short(begun):
    begun.fails()
    for value in (CLOSE, 1.01, 0.99):
        _, result = begun.experiment("a long description " * 20, value)
        assert len(result.out) + len(result.err) <= 1000


# --- the human's work -------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "during", "between"])
def test_a_humans_commits_survive_a_discard(begun, when):
    base = begun.head()
    if when in ("before", "between"):
        begun.human_commits("before")
    begun.change_train()
    begun.commit("one")
    if when == "between":
        begun.human_commits("between")
        begun.change_train()
        begun.commit("two")
    if when in ("during", "between"):
        begun.human_commits("during")
    said = begun.git("log", "--format=%an %ae %ad %s", "--", "program.md")
    begun.run(1.01)
    assert begun.recorded("worse").verdict == "discard"
    humans = {"before": ["human: before"], "during": ["human: during"]}
    expected = humans.get(when, ["human: during", "human: between", "human: before"])
    assert begun.chain() == [*expected, "start"]
    assert begun.git("log", "--format=%an %ae %ad %s", "--", "program.md") == said
    assert begun.read("program.md") == expected[0].removeprefix("human: ")
    assert begun.read("train.py") == TRAIN.format(0) and begun.git("status", "--porcelain") == ""
    assert begun.git("merge-base", base, "HEAD") == base
    begun.check()


def test_where_git_signs_commits_and_has_no_key_every_commit_of_lab_is_made_unsigned(night):
    night.who += ["-c", "commit.gpgsign=false"]  # this test's own
    for key, value in [("commit.gpgsign", "true"), ("gpg.program", "false")]:
        night.git("config", key, value)
    night.baseline()
    night.change_train()
    night.commit("worse")
    night.human_commits("on top of it")
    night.run(1.05)
    assert night.recorded("worse").verdict == "discard"
    assert night.chain() == ["human: on top of it", "start"]
    repo = Repo(night.path)
    old, new = night.git("rev-parse", "HEAD:train.py"), night.git("hash-object", "-w", "--stdin", stdin="LR = 1\n")
    assert repo.restore(old, new, "a step back, or what another tree kept")
    assert night.read("train.py") == "LR = 1\n" and night.chain()[0] == "a step back, or what another tree kept"
    night.check()


def test_uncommitted_and_staged_work_survives_a_discard(begun):
    begun.human_commits("committed")
    (begun.path / "program.md").write_text("half a sentence")
    (begun.path / "notes.txt").write_text("mine")
    (begun.path / "staged.md").write_text("staged")
    begun.git("add", "staged.md")
    begun.change_train()
    begun.git("add", "train.py")
    begun.git("commit", "-q", "-m", "idea", "--", "train.py")
    begun.run(1.01)
    assert begun.recorded("worse").verdict == "discard"
    assert begun.read("program.md") == "half a sentence"
    assert begun.read("notes.txt") == "mine" and begun.read("staged.md") == "staged"
    assert begun.read("train.py") == TRAIN.format(0)


def test_a_train_py_that_was_only_touched_does_not_stop_a_discard(begun):
    begun.change_train()
    begun.commit("idea")
    begun.run(1.02)
    os.utime(begun.path / "train.py", (1e9, 1e9))
    assert begun.recorded("worse").verdict == "discard"
    begun.check()


def test_dropping_a_commit_does_not_take_a_touched_file_for_an_edited_one(begun):
    from lab.store.repository import Repo

    base = begun.head()
    begun.change_train()
    commit = begun.commit("idea")
    os.utime(begun.path / "train.py", (1e9, 1e9))
    assert Repo(begun.path).drop([commit]) and begun.head() == base
    assert Repo(begun.path).drop([commit]) and begun.head() == base  # again: nothing happens


def test_a_keep_under_a_humans_commit_is_the_experiments_commit(begun):
    begun.change_train()
    commit = begun.commit("idea")
    human = begun.human_commits("meanwhile")
    begun.run(0.99)
    assert begun.recorded("idea").verdict == "keep"
    assert begun.rows()[-1][0] == commit[:7] and begun.head() == human
    begun.experiment("worse", 1.01)
    assert begun.chain() == ["human: meanwhile", "idea", "start"] and begun.head() == human


def test_a_kept_commit_is_found_again_after_the_human_rewrote_the_branch(begun):
    begun.experiment("good", 0.99)
    begun.git("commit", "-q", "--amend", "-m", "good, in better words")
    rewritten = begun.head()
    _, result = begun.experiment("worse", 1.01)
    assert result.verdict == "discard" and begun.head() == rewritten
    begun.check()


def test_a_merge_that_the_human_made_survives(begun):
    begun.git("switch", "-q", "main")
    (begun.path / "notes.md").write_text("from main")
    begun.git("add", "notes.md")
    begun.git("commit", "-q", "-m", "notes")
    begun.git("switch", "-q", "autoresearch/test")
    begun.change_train()
    begun.commit("idea")
    begun.git("merge", "-q", "--no-ff", "-m", "merge", "main")
    begun.run(1.01)
    assert begun.recorded("worse").verdict == "discard"
    assert begun.chain()[0] == "merge" and begun.read("notes.md") == "from main"
    assert len(begun.git("log", "-1", "--format=%P").split()) == 2 and begun.read("train.py") == TRAIN.format(0)


# --- refusals ----------------------------------------------------------------------


def prepared(night):
    night.change_train()
    night.commit("idea")


@pytest.mark.parametrize(
    "changes, needle",
    [
        ({"rules_sha256": "c" * 64}, "constants.py or prepare.py changed"),
        ({"data_sha256": "c" * 64}, "the prepared data changed"),
        ({"dataset": "tinystories"}, "(stdlib → tinystories)"),
        ({"device": "cuda (H100)"}, "the device changed"),
        ({"clock": "injected"}, "clock was not the real one"),
        ({"train_sha256": "c" * 64}, "another train.py than HEAD's"),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused(begun, changes, needle):
    prepared(begun)
    begun.run(0.9, **changes)
    assert needle in begun.refused("an idea")


def test_a_run_is_recorded_once(begun):
    begun.experiment("good", 0.99)
    assert "recorded already (row 0002, keep)" in begun.refused("good")


def test_a_repeat_under_a_used_seed_is_refused(begun):
    begun.close_call()
    begun.run(0.99)
    assert "AUTORESEARCH_SEED=43 uv run train.py" in begun.refused()


def test_the_kept_code_run_again_under_its_seed_is_refused(begun):
    begun.run(0.9)
    assert "make the next experiment" in begun.refused("again")


def test_code_that_crashed_gets_no_second_row_for_crashing_again(begun):
    begun.change_train("def main(:\n")
    begun.commit()
    begun.run(tail="SyntaxError: bad\n")
    begun.recorded("typo")
    begun.git("cherry-pick", "refs/autoresearch/test/0002")
    begun.run(tail="SyntaxError: bad\n")
    assert "crashed before (row 0002): git reset --keep" in begun.refused("typo, once more")
    begun.run(0.99)
    assert begun.recorded("it was the machine").verdict == "keep"


def test_a_run_of_code_that_was_not_committed_needs_no_second_one(begun):
    begun.change_train()
    begun.run(0.99)
    assert "git commit" in begun.refused("idea") and "no second run" in begun.refused("idea")
    begun.commit("idea")
    assert begun.recorded("idea").verdict == "keep"


def test_a_checkout_where_git_knows_no_name_can_commit_after_the_baseline(night):
    env = night.env | {"HOME": str(night.path), "EMAIL": "", "USER": ""}

    def commit():
        (night.path / "train.py").write_text("LR = 0.05\n")
        return subprocess.run(["git", "commit", "-qm", "x", "train.py"], cwd=night.path, env=env, capture_output=True)

    night.git("config", "user.useConfigOnly", "true")
    assert commit().returncode
    night.git("checkout", "-q", "--", "train.py")
    night.run(1.0)
    assert "note: git knew no name" in night.recorded("baseline").out
    assert commit().returncode == 0


@pytest.mark.parametrize("other", ["prepare.py", "results.md"])
def test_an_experiment_changes_train_py_alone(begun, other):
    base = begun.head()
    begun.change_train()
    (begun.path / other).write_text("tampered")
    commit = begun.commit("idea", "train.py", other)
    begun.run(0.9)
    refusal = begun.refused("idea")
    assert other in refusal and f"git reset --soft {commit[:7]}^" in refusal
    begun.git("reset", "-q", "--soft", f"{commit[:7]}^")  # the remedy it names works
    begun.git("commit", "-q", "-m", "idea", "--", "train.py")
    assert begun.recorded("idea").verdict == "keep"
    assert begun.git("diff", "--name-only", base, "HEAD") == "train.py"


def test_uncommitted_code_is_refused(begun):
    prepared(begun)
    begun.run(0.9)
    begun.change_train()
    assert "not committed" in begun.refused("idea")
    begun.git("add", "train.py")
    assert "not committed" in begun.refused("idea")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0.0", "-1.0"])
def test_impossible_numbers_are_refused(begun, value):
    prepared(begun)
    begun.run(float(value))
    assert "val_bpb in the summary is not a possible number" in begun.refused("idea")
    assert begun.recorded("idea", "--discard").verdict == "crash"
    begun.check()


def test_a_run_that_is_still_going_is_refused(begun):
    import fcntl

    prepared(begun)
    begun.run(0.9)
    fd = os.open(begun.path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        assert "still going" in begun.refused("idea")
    finally:
        os.close(fd)
    begun.recorded("idea")


def test_an_idea_before_the_baseline_is_refused(night):
    base = night.head()
    night.change_train()
    commit = night.commit("idea")
    night.run(0.9)
    refusal = night.refused("idea")
    assert "the baseline comes first" in refusal and f"git cherry-pick {commit[:7]}" in refusal
    night.git("reset", "-q", "--keep", f"{commit[:7]}^")
    assert night.head() == base
    night.baseline()
    night.git("cherry-pick", commit[:7])
    night.run(0.99)
    assert night.recorded("idea").verdict == "keep"


def test_a_description_is_needed_once(begun):
    prepared(begun)
    begun.run(0.9)
    for empty in ([], [""], [" \t\n"]):
        assert "say in a few words" in begun.refused(*empty)


def test_the_baseline_cannot_be_discarded(night):
    night.run(1.0)
    assert "cannot be discarded" in night.refused("baseline", "--discard")


@pytest.mark.parametrize(
    "prepare, needle",
    [
        (["switch", "-q", "main"], "git switch autoresearch/TAG"),
        (["switch", "-q", "--detach"], "HEAD is detached"),
        (["switch", "-q", "-c", "other/test"], "on branch other/test"),
    ],
)
def test_it_works_on_the_branch_of_a_night_only(begun, prepare, needle):
    begun.run(0.9)
    begun.git(*prepare)
    assert needle in begun.refused("idea")


def test_outside_a_checkout_it_says_so(tmp_path, begun):
    result = begun.lab("record", "idea", cwd=tmp_path)
    assert result.rc == 1 and "not in a git checkout" in result.err and len(result.err.splitlines()) == 1


def test_an_empty_repository_is_refused(tmp_path):
    night = FakeNight(tmp_path / "night")
    night.git("switch", "-q", "--orphan", "autoresearch/empty")
    assert "no commit yet" in night.record("idea").err


def test_from_a_folder_below_it_works_as_from_the_top(begun):
    prepared(begun)
    begun.run(0.99)
    (begun.path / "below").mkdir()
    result = begun.lab("record", "idea", cwd=begun.path / "below")
    assert result.rc == 0, result.err
    begun.check()


# --- several nights, several trees ---------------------------------------------------


def test_a_new_branch_begins_its_own_results_and_the_old_ones_come_back_with_their_branch(begun):
    begun.experiment("good", 0.99)
    old = begun.read("results.tsv"), begun.read("runs.jsonl"), begun.archives()
    begun.git("switch", "-q", "-c", "autoresearch/next")
    begun.run(0.99, seed=42)
    assert "runs/test now holds" in begun.recorded("baseline").out
    assert begun.read("runs/test/results.tsv") == old[0] and len(begun.records()) == 1
    begun.git("switch", "-q", "autoresearch/test")
    assert "0002" in begun.lab("status").out
    begun.experiment("worse", 1.01)
    assert begun.read("results.tsv").startswith(old[0]) and begun.read("runs.jsonl").startswith(old[1])
    assert [name for name in begun.archives() if name[0].isdigit()] == old[2]
    assert begun.read("runs/next/runs.jsonl")


def test_it_works_in_a_git_worktree(begun, tmp_path):
    begun.git("worktree", "add", "-q", "-b", "autoresearch/two", str(tmp_path / "two"), "main")
    two = FakeNight.__new__(FakeNight)
    two.path, two.env, two.who, two.ideas = tmp_path / "two", begun.env, begun.who, 50
    two.baseline()
    _, result = two.experiment("worse", 1.01)
    assert result.verdict == "discard" and len(two.rows()) == 2 and len(begun.rows()) == 1
    assert "refs/autoresearch/two/0002" in begun.refs()


# --- the command line ------------------------------------------------------------------


def test_help_names_the_verdicts_and_the_exit_codes(begun):
    text = begun.lab("record", "--help").out
    assert all(word in text for word in ("keep", "discard", "crash", "confirm", "--simpler", "Exit status", "75"))
    top = begun.lab("--help")
    assert top.rc == 0 and all(name in top.out for name in ("record", "status", "sample", "night", "sandbox"))
    assert begun.lab().rc == 2 and begun.lab("nonsense").rc == 2


@pytest.mark.parametrize("command", ["record", "status"])
def test_what_is_called_often_imports_neither_torch_nor_prepare(command):
    import subprocess
    import sys

    code = f"""
import sys
from lab.__main__ import main
try:
    main([{command!r}, "--help"])
except SystemExit:
    pass
import lab.loop.{command}
standard = sys.stdlib_module_names
print("FOREIGN", sorted({{m.split(".")[0] for m in sys.modules if not m.startswith("_")}} - set(standard) - {{"lab", "corpus"}}))
"""
    out = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert "FOREIGN []" in out, out


def test_a_sample_is_made_in_the_background_and_its_failure_is_nobodys(begun):
    import time

    (begun.path / "lab" / "verify").mkdir(parents=True)
    (begun.path / "lab" / "verify" / "sample.py").write_text("")
    begun.change_train()
    begun.commit()
    begun.run(0.99)
    result = begun.record("good", AUTORESEARCH_NO_SAMPLE="", PYTHONPATH=str(ROOT))
    assert result.rc == 0, result.err
    log = begun.path / ".lab" / "sample.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and re.search("sample|Error", log.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.read_text(), "no sample was tried"
