"""lab status: what an agent that knows nothing else reads first. It must name the right next step in every state."""

import fcntl
import json
import os
import sys
import time

import pytest
from fakenight import CLOSE, PROGRESS, FakeNight

RUN = "uv run train.py > run.log 2>&1"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    night = FakeNight(tmp_path_factory.mktemp("status") / "night")
    night.baseline()
    return night


@pytest.fixture
def begun(template, tmp_path):
    return template.copy(tmp_path / "night")


def status(night, *args):
    """(its text, the sentence after `next:`); nothing has changed by asking."""
    before = night.state()
    result = night.lab("status", *args)
    assert result.rc == 0 and result.err == "", result.err
    assert night.state() == before
    return result.out, result.out.rpartition("next: ")[2].strip()


def as_json(night):
    return json.loads(night.lab("status", "--json").out)


def test_before_anything_ran_the_baseline_is_next(tmp_path):
    night = FakeNight(tmp_path / "night")
    assert status(night)[1] == f"the baseline has not run: {RUN}"
    night.run(1.0)
    assert 'not recorded: uv run -m lab record "baseline"' in status(night)[1]
    night.recorded("baseline")
    text, sentence = status(night)
    assert sentence.endswith(f"waits for a repeat: AUTORESEARCH_SEED=43 {RUN}") and "not known yet" in text
    night.run(1.0, seed=43)
    assert sentence != status(night)[1] and status(night)[1].endswith("not recorded: uv run -m lab record")


def test_each_step_of_an_experiment_is_followed_by_the_next(begun):
    assert "is recorded: edit train.py, commit it as the next experiment" in status(begun)[1]
    begun.change_train()
    assert "commit them as the next experiment" in status(begun)[1]
    commit = begun.commit("idea")
    assert status(begun)[1] == f"{commit[:7]} has not run yet: {RUN}"
    begun.run(tail="\npreempted\n")
    assert status(begun)[1] == f"the last run was preempted, it is no result: {RUN}"
    begun.run(tail="")
    assert "the last run was killed" in status(begun)[1]
    begun.run(tail="FAIL: loss is nan\n")
    assert "is over and not recorded" in status(begun)[1]
    begun.recorded("explodes")
    begun.fails()
    begun.change_train()
    commit = begun.commit("idea")
    begun.run(CLOSE)
    assert f'the run of {commit[:7]} is over and not recorded: uv run -m lab record "what this tried"' in status(begun)[1]
    begun.recorded("idea")
    assert status(begun)[1] == f"{commit[:7]} waits for a repeat: AUTORESEARCH_SEED=43 {RUN}"
    begun.run(tail="\ninterrupted\n", seed=43)
    assert status(begun)[1] == f"the last run was interrupted, it is no result: AUTORESEARCH_SEED=43 {RUN}"
    begun.run(0.99, seed=43)
    assert status(begun)[1].endswith("uv run -m lab record")
    begun.recorded()
    assert "is recorded" in status(begun)[1]


def test_code_that_was_tried_in_vain_is_sent_back(begun):
    commit, _ = begun.experiment("good", 0.99)
    begun.experiment("worse", 1.02)
    begun.git("cherry-pick", "refs/autoresearch/test/0003")
    assert status(begun)[1] == f"{begun.head()[:7]} was tried already (row 0003): git reset --keep {commit[:7]}"


def test_a_run_that_record_would_refuse_is_not_to_be_recorded(begun):
    begun.run(0.9)
    assert "is recorded: edit train.py" in status(begun)[1]
    begun.change_train("def main(:\n")
    begun.commit("crash")
    begun.run(tail="SyntaxError: bad\n")
    begun.recorded("typo")
    begun.git("cherry-pick", "refs/autoresearch/test/0002")
    begun.run(tail="SyntaxError: bad\n")
    assert "was tried already (row 0002): git reset --keep" in status(begun)[1]


def test_a_run_of_code_that_was_not_committed_is_committed_and_recorded(begun):
    begun.change_train()
    begun.run(0.9)
    assert "of train.py as it is now, which is not committed: git commit" in status(begun)[1]


# --- status, record's last lines and its refusals are one answer ---------------------


def refused_as_status_says(night):
    """The sentence after `next:`, which is what record refuses with."""
    sentence = status(night)[1]
    assert night.refused("idea") == f"lab record: {sentence}\n"
    return sentence


def test_what_stops_a_record_is_next(begun):
    base = begun.head()
    begun.change_train()
    (begun.path / "prepare.py").write_text("tampered")
    both = begun.commit("idea", "train.py", "prepare.py")
    assert f"git reset --soft {both[:7]}^" in status(begun)[1], "it was not said before the run"
    begun.run(0.9)
    assert "touches prepare.py" in refused_as_status_says(begun)
    begun.git("reset", "-q", "--hard", base)
    begun.change_train()
    begun.commit("idea")
    begun.run(0.9, device="cuda (H100)")
    assert "the device changed" in refused_as_status_says(begun)
    begun.run(float("nan"))
    assert "not a possible number" in refused_as_status_says(begun)
    begun.run(tail="---\nval_bpb:          0.9")
    assert f"Run it again: {RUN}" in refused_as_status_says(begun)
    (begun.path / "run.log").write_text("error: no such thing\n")
    assert "the run did not begin (error: no such thing)" in refused_as_status_says(begun)


def test_newer_edits_wait_until_the_run_before_them_is_recorded(begun):
    begun.change_train()
    begun.commit("idea")
    begun.run(0.99)
    begun.change_train("# the next idea, begun early\n")
    sentence = refused_as_status_says(begun)
    first, second = (part.split("then: ")[-1] for part in sentence.split(", then: ")[:2])
    begun.git(*first.partition("git ")[2].split())
    assert second == 'uv run -m lab record "what this tried"' and begun.recorded("idea").verdict == "keep"
    begun.git("stash", "pop", "-q")
    assert begun.read("train.py") == "# the next idea, begun early\n"
    assert "commit them as the next experiment" in refused_as_status_says(begun)


def test_an_idea_before_the_baseline_is_sent_back_before_it_runs(tmp_path):
    night = FakeNight(tmp_path / "night")
    night.change_train()
    commit = night.commit("idea")
    assert f"the baseline comes first, and {commit[:7]}" in status(night)[1]


@pytest.mark.parametrize("kept", [False, True])
def test_a_repeat_that_was_killed_is_run_again_under_a_new_seed(begun, kept):
    begun.fails()
    begun.experiment("idea", 0.99 if kept else CLOSE)
    begun.run(tail="", seed=43)
    again = f"AUTORESEARCH_SEED=43 {RUN}"
    assert status(begun)[1] == f"the last run was killed, it is no result: {again}"
    assert f"Run it again: {again}; to give the idea up" in begun.refused(rc=75)
    begun.run(0.99, seed=43)
    assert begun.recorded().verdict == "keep"


def test_a_crash_of_the_baseline_is_mended_first(tmp_path):
    night = FakeNight(tmp_path / "night")
    night.run(tail="torch.OutOfMemoryError: CUDA out of memory.\n")
    said = night.recorded("baseline").out
    mend = f"mend what stops the run, commit it if it is in train.py, then: {RUN}"
    assert said.endswith(f"crashed: {mend}\n") and status(night)[1].endswith(f"crashed: {mend}")
    night.change_train()
    night.commit("smaller batch")
    assert status(night)[1] == f"the baseline has not run: {RUN}"


def test_a_repeat_of_the_baseline_that_crashed_runs_under_another_seed(tmp_path):
    night = FakeNight(tmp_path / "night")
    night.run(1.0)
    night.recorded("baseline")
    for seed in (43, 44):
        assert status(night)[1].endswith(f"AUTORESEARCH_SEED={seed} {RUN}")
        night.run(tail="FAIL: loss is nan\n", seed=seed)
        assert night.recorded().verdict == "crash"
    assert status(night)[1].endswith(f"AUTORESEARCH_SEED=45 {RUN}")


@pytest.mark.parametrize("value, verdict", [(0.99, "keep"), (1.02, "discard"), (CLOSE, "confirm"), (None, "crash")])
def test_record_ends_with_what_status_says(begun, value, verdict):
    begun.fails()
    tail = {"tail": "FAIL: loss is nan\n"} if value is None else {}
    _, result = begun.experiment("idea", value, **tail)
    said = result.out.rpartition("next: ")[2].strip().removeprefix("train.py is as it was before this experiment. ")
    command, _, then = said.partition("\nthen: ")
    assert result.verdict == verdict and then == ("uv run -m lab record" if verdict == "confirm" else "")
    assert ("train.py is as it was" in result.out) == (verdict in ("discard", "crash"))
    assert status(begun)[1].lower().endswith(f": {command}".lower())


def test_a_run_in_progress_is_shown_and_waited_for(begun):
    begun.change_train()
    begun.commit("idea")
    begun.run(tail=PROGRESS.replace("41.0", "77.0"))
    fd = os.open(begun.path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        text, sentence = status(begun)
    finally:
        os.close(fd)
    assert "run in progress: step 00123 (77.0%)" in text and sentence.startswith("a run is still going on: wait")


def test_a_screen_shows_the_best_the_noise_the_counts_and_the_dead_ends(begun):
    begun.experiment("good", 0.99)
    begun.experiment("hopeless", 1.02)
    begun.change_train()
    begun.commit("crash")
    begun.run(tail="FAIL: loss is nan\n")
    begun.recorded("explodes")
    text, _ = status(begun)
    assert "best: 0.990000 (mean of 1), row 0002" in text and "0.010000 below the baseline" in text
    assert "noise: σ 0.002000, 2 degrees of freedom" in text
    assert "rows: 2 keep, 1 discard, 1 crash" in text
    dead = text.partition("dead ends")[2]
    assert "hopeless" in dead and "explodes" in dead and "good" not in dead


@pytest.mark.parametrize("tokens, steps, params, told", [
    (400.0, 763, 50.3, True),  # a fifth fewer steps, of the same size
    (480.0, 916, 50.3, False),  # a twentieth fewer
    (400.0, 763, 60.3, False),  # another model may be slower
    (400.0, 1526, 50.3, False),  # and so may another batch
])
def test_a_failure_that_ran_slower_for_no_reason_in_the_model_says_so(begun, tokens, steps, params, told):
    begun.change_train()
    begun.commit("other betas")
    begun.run(1.02)
    log = begun.read("run.log")
    for old, new in [("499.6", tokens), ("953", steps), ("50.3", params)]:
        log = log.replace(old, str(new))
    (begun.path / "run.log").write_text(log)
    said = begun.recorded("other betas").out
    assert ("20% slower: if the change does not explain" in said) == told
    text, _ = status(begun)
    assert ("other betas (20% slower than its base: was the machine busy?)" in text) == told and "other betas" in text


def test_near_misses_are_listed_until_they_were_tried_together(begun):
    for i, name in enumerate(["almost", "nearly", "no good"]):
        begun.experiment(name, [0.9996, 1.0005, 1.01][i])
    known = as_json(begun)
    assert [r["description"] for r in known["near_misses"]] == ["almost", "nearly"]
    assert [r["description"] for r in known["dead_ends"]] == ["no good"]
    begun.experiment("embedding lr 0.0002, x0 .0003", 1.01)
    assert len(as_json(begun)["near_misses"]) == 2, "a number is not a row"
    begun.experiment("0002 and 0003 together", 1.01)
    assert as_json(begun)["near_misses"] == []


def test_one_screen_is_short_and_all_is_all(begun):
    for i in range(20):
        begun.experiment(f"idea {i} " + "with a long description " * 9, 1.02)
    text, _ = status(begun)
    everything, _ = status(begun, "--all")
    assert len(text.splitlines()) <= 50 and len(text) < 6000
    assert "idea 0 " not in text and "idea 0 " in everything
    assert "the last 8 of 21 (--all shows all)" in text


def test_json_is_what_a_program_reads(begun):
    begun.experiment("good", 0.99)
    known = as_json(begun)
    assert known["tag"] == "test" and known["best"]["row"] == 2 and known["counts"] == {"keep": 2}
    assert known["sigma"] == pytest.approx(0.002) and known["dof"] == 2 and known["runs"] == 4
    assert known["in_progress"] is False and "next" in known


@pytest.mark.parametrize("where, needle", [("main", "git switch -c autoresearch/TAG"), ("--detach", "HEAD is detached")])
def test_away_from_a_nights_branch_it_says_how_to_get_there(begun, where, needle):
    begun.git("switch", "-q", where)
    assert needle in status(begun)[1]
    assert needle in as_json(begun)["next"]


def test_outside_a_checkout_it_is_refused(begun, tmp_path):
    result = begun.lab("status", cwd=tmp_path)
    assert result.rc == 1 and len(result.err.splitlines()) == 1


def test_with_broken_files_it_still_speaks(begun):
    (begun.path / "runs.jsonl").write_bytes(b"\xff\xfe{}\n[]\n" + (begun.path / "runs.jsonl").read_bytes())
    (begun.path / "results.tsv").write_text("nonsense")
    (begun.path / "run.log").write_bytes(bytes(range(256)) * 100)
    assert "rows: 1 keep" in status(begun)[0]


def test_the_state_of_one_tree_is_a_function_of_its_path(begun, monkeypatch, tmp_path):
    from lab.loop.status import gather, text

    monkeypatch.chdir(tmp_path)
    known = gather(begun.path)
    assert known["tag"] == "test" and "best: 1.000000" in text(known)


def a_thousand_rows(night):
    """Rows, refs and records as a thousand discards leave them, without making each."""
    (first,) = [r for r in night.records() if r["row"]]
    commit, refs, lines = night.head(), [], night.read("runs.jsonl").splitlines()
    for i in range(2, 1002):
        record = first | {
            "run_id": f"{i:032x}", "log": f"{i:016x}", "row": i, "verdict": "discard", "baseline": False, "gain": -1.0,
            "code": f"{i:064x}", "parent": first["commit"], "description": f"idea {i}", "short": f"{i:07x}",
        }  # fmt: skip
        lines.append(json.dumps(record))
        refs.append(f"create refs/autoresearch/test/{i:04d} {commit}\n")
    (night.path / "runs.jsonl").write_text("\n".join(lines) + "\n")
    night.git("update-ref", "--stdin", stdin="".join(refs))


def test_a_thousand_rows(begun):
    """Prints what record and status take; the limit here only catches what is absurd."""
    a_thousand_rows(begun)
    begun.change_train()
    begun.commit("idea")
    begun.run(1.02)
    start = time.monotonic()
    begun.recorded("idea")
    recorded = time.monotonic()
    text, _ = status(begun)
    print(f"record {recorded - start:.2f} s, status {time.monotonic() - recorded:.2f} s", file=sys.stderr)
    assert "1001 discard" in text and len(text) < 6000
    assert len(begun.rows()) == 1002
    assert time.monotonic() - start < 30
