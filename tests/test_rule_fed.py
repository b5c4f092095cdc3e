"""What record feeds the rule: the replay of records, doubt and the step back, slowed runs. Real git, made-up runs."""

import copy
import json
import math
import random
import re
import time
from pathlib import Path

import pytest
from fakenight import CLOSE, PROGRESS, SUMMARY, TRAIN, FakeNight
from test_one_best import records

from lab.analysis import holdout, verdict
from lab.analysis.history import SLOWED, Night, measured, read_night
from lab.loop import report
from lab.store import names, run_log

BASELINE = [1.0, 1.002, 0.998]


def made(*more):
    """Records of a baseline and of experiments (status, value, runs) after it, each on the latest keep."""
    found = records(1.0, more)
    for r, value in zip(found, BASELINE, strict=False):
        r["summary"]["val_bpb"] = value
    return found


def search_of(found):
    return Night(records=found).search


# ---------------------------------------------------------------------------------------------------
# The replay


def test_a_replay_is_the_rules_own_calls_in_order():
    found = made(("discard", 1.02, 1), ("keep", 0.99, 2), ("crash", 1.0, 1), ("discard", 1.03, 1))
    expected = verdict.begin(BASELINE)
    expected = verdict.ended(expected, [1.02], False)
    expected = verdict.ended(expected, [0.99, 0.991], True)
    expected = verdict.ended(expected, [1.03], False)
    night = Night(records=found)
    assert night.search == expected and night.sigma == expected.sigma
    assert [r["row"] for r in night.replayed[1]] == [1, 3] and night.tip["row"] == 3
    assert night.estimates == {1: verdict.belief(expected, 1), 3: verdict.belief(expected)}


def test_a_discard_that_was_not_measured_against_the_tip_is_no_failure_of_it():
    found = made(("keep", 0.99, 1), ("discard", 1.02, 1), ("discard", 1.03, 1))
    assert search_of(found).tip.failures == 2
    found[-1] = found[-1] | {"parent": found[0]["commit"]}  # the human went back to the baseline for this one
    assert search_of(found).tip.failures == 1 and search_of(found).experiments == 3
    found[-2] = found[-2] | {"parent": None}
    assert search_of(found).tip.failures == 0


def test_crashes_are_left_out_and_runs_that_wait_are_not_fed():
    with_crash = made(("keep", 0.99, 1), ("crash", 1.0, 1), ("discard", 1.02, 1))
    without = [r for r in with_crash if r["verdict"] != "crash"]
    assert search_of(with_crash) == search_of(without)
    waiting = [*without, {**without[-1], "run_id": "w", "code": "w", "commit": "w", "row": None, "verdict": "confirm"}]
    assert search_of(waiting) == search_of(without)


def again(found, row, value, run_id, status="keep"):
    """Another run of what row was kept for."""
    own = next(r for r in found if r["row"] == row)
    summary = own["summary"] | {"val_bpb": value}
    return {**own, "run_id": run_id, "log": run_id, "row": None, "summary": summary, "verdict": status, "parent": None}


def test_another_run_of_a_keep_is_the_tips_or_an_earlier_ones():
    found = made(("keep", 0.99, 1), ("discard", 1.02, 1))
    tip, base = again(found, 2, 0.991, "a"), again(found, 1, 1.004, "b")
    search = search_of(found)
    assert search_of([*found, tip]) == verdict.remeasured(search, 0.991)
    older = search_of([*found, base])
    assert older.line[0].values == (*BASELINE, 1.004) and older.line[1] == search.line[1] and older.repeats == 1
    assert older.tip.failures == search.tip.failures


def test_a_step_back_is_replayed_as_it_was_and_only_if_the_run_that_showed_it_is_there():
    found = made(("keep", 0.99, 1), ("keep", 0.985, 1), ("discard", 1.02, 1))
    before = search_of(found)
    back = again(found, 3, 0.999, "back", "discard")
    given_up = [r | {"verdict": "discard", "given_up": "back"} if r["row"] == 3 else r for r in found]
    night = Night(records=[*given_up, back])
    assert night.search == verdict.stepped_back(verdict.remeasured(before, 0.999))
    assert night.tip["row"] == 2 and [r["row"] for r in night.given_up] == [3] and night.best.number == 2
    assert night.search.tip.failures == 0, "what failed against the commit that was given up is counted against another"
    assert Night(records=given_up).tip["row"] == 2


def test_a_keep_that_is_simpler_is_remembered_as_one():
    found = made(("keep", 1.0, 2))
    found[-1]["simpler"] = True
    assert search_of(found).tip.simpler and not search_of(found[:3]).tip.simpler


def test_the_same_result_under_two_seeds_counts_once_and_the_order_of_ties_changes_nothing():
    same = made(("keep", 0.99, 1))
    same.append(again(same, 2, same[-1]["summary"]["val_bpb"], "twice"))
    once = search_of(same[:-1])
    assert search_of(same).tip.runs == 1 and search_of(same).sigma == once.sigma
    assert verdict.belief(search_of(same)) == verdict.belief(once)
    found = made(("keep", 0.99, 1), *[("discard", value, 1) for value in (1.02, 1.03, 1.02)])
    swapped = [*found[:-3], found[-1], found[-2], found[-3]]
    assert verdict.bar(search_of(found)) == verdict.bar(search_of(swapped))


def scaled(found, factor):
    found = copy.deepcopy(found)
    for r in found:
        if r["summary"]:
            r["summary"]["val_bpb"] *= factor
    return found


@pytest.mark.parametrize("seed", range(20))
def test_ten_times_the_val_bpb_is_the_same_night_and_nothing_is_nan(seed):
    rng = random.Random(seed)
    more = [(rng.choice(["keep", "discard", "discard", "crash"]), 1 - 0.01 * rng.random(), rng.randint(1, 3)) for _ in range(25)]
    found = made(*more)
    one, ten = Night(records=found), Night(records=scaled(found, 10))
    assert ten.sigma == pytest.approx(10 * one.sigma) and ten.doubted == one.doubted and ten.tip["row"] == one.tip["row"]
    assert verdict.bar(ten.search).keep == pytest.approx(10 * verdict.bar(one.search).keep)
    assert {row: value / 10 for row, value in ten.estimates.items()} == pytest.approx(one.estimates)
    assert all(math.isfinite(v) for v in (*one.estimates.values(), *verdict.bar(one.search), one.sigma))
    assert one.estimates.keys() == {r["row"] for r in one.kept} and one.tip is one.kept[-1]


def test_nights_of_the_old_rule_go_on_as_they_were_recorded():
    night = read_night(Path(__file__).parent / "data" / "night_55ea82e")
    assert night.tip is night.best_record is night.kept[-1] and night.search.experiments == 27 - night_crashes(night)
    assert len(night.search.line) == len(night.kept) and night.search.runs == sum(r["summary"] is not None for r in night.records)
    assert night.sigma < 0.015, "the close results of the end do not bound the noise of the baseline"
    assert verdict.bar(night.search).keep == pytest.approx(1.25, abs=0.003)


def night_crashes(night):
    return sum(r["verdict"] == "crash" for r in night.rows)


# ---------------------------------------------------------------------------------------------------
# Doubt and the step back, by lab record


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A night whose tip (row 3) was not beaten seven times: it is doubted."""
    night = FakeNight(tmp_path_factory.mktemp("doubted") / "night")
    night.baseline()
    night.experiment("small", 0.9975)
    night.human_commits("be bold")
    night.experiment("lucky", 0.9965)
    for i in range(7):
        result = night.experiment(f"worse {i}", 1.02 + 0.01 * i)[1]
    return night, result


@pytest.fixture
def doubted(template, tmp_path):
    return template[0].copy(tmp_path / "night"), template[1]


AGAIN = "AUTORESEARCH_SEED=43 uv run train.py > run.log 2>&1"


def until_stepped_back(night, value=1.0):
    """Runs the tip again, as `next:` says, until the branch steps back; what record said."""
    tip = night.read("train.py")
    for seed in range(43, 51):
        night.run(value, seed=seed)
        result = night.recorded()
        if night.read("train.py") != tip:
            return result
    raise AssertionError("the branch did not step back")


def test_a_doubted_tip_is_asked_for_with_its_command_and_its_reason(doubted):
    night, result = doubted
    said = result.out.splitlines()
    assert f"next: {AGAIN}" in said and said[-1] == "then: uv run -m lab record"
    assert any(line.startswith("doubt: 7 experiments in a row did not beat row 0003, which 1 run decided") for line in said)
    shown = night.lab("status").out
    assert shown.rstrip().endswith(AGAIN) and "doubt: 7 experiments in a row" in shown
    night.run(0.996, seed=43)
    kept = night.recorded()
    assert kept.verdict == "keep" and "doubt" not in kept.out and "Edit train.py" in kept.out
    night.check()


def test_the_branch_steps_back_by_a_new_commit_and_everybody_sees_it(doubted):
    night, _ = doubted
    chain, small = night.chain(), night.rows()[1]
    (night.path / "program.md").write_text("half a sentence")
    result = until_stepped_back(night)
    assert result.verdict == "discard" and "the branch steps back to" in result.out
    assert "given up: row 0003" in result.out and f"best: row 0002 {small[0]} (small)" in result.out
    assert night.chain() == [f"back to {small[0]}: small", *chain], "the branch was rewritten"
    assert night.read("train.py") == TRAIN.format(1) and night.read("program.md") == "half a sentence"
    assert night.git("status", "--porcelain") == "M program.md"
    assert night.git("diff", "--name-only", "HEAD^", "HEAD") == "train.py"
    row = night.rows()[2]
    assert row[3:] == ["discard", "lucky"] and float(row[1]) > 0.995 and len(night.rows()) == 10
    assert (night.path / "runs" / "best").resolve().name.startswith("0002-")
    night.check()
    shown = night.lab("status").out
    assert "stepped back: row 0003" in shown and "did not confirm its gain" in shown and "best: 0.997500" in shown
    kept = [float(r[1]) for r in night.rows() if r[3] == "keep"]  # what upstream's reader takes the minimum of
    assert min(kept) == 0.9975 == read_night(night.path).best.val_bpb
    commit, after = night.experiment("better than small", 0.98)
    assert after.verdict == "keep" and night.records()[-1]["parent"].startswith(small[0])
    assert night.chain()[1] == f"back to {small[0]}: small"
    night.experiment("hopeless", 1.05)
    assert night.head() == commit
    night.check()


def test_a_doubted_tip_that_holds_is_shown_with_the_mean_of_all_its_runs_and_keeps_its_row(doubted):
    from lab.loop import many_trees

    night, _ = doubted
    rows, tip = night.rows(), night.read("train.py")
    night.run(0.9971, seed=43)
    assert "keep: val_bpb 0.996800 (mean of 2)" in night.recorded().out and night.read("train.py") == tip
    shown = night.lab("status").out
    assert "best: 0.996800 (mean of 2), row 0003" in shown and "0.003200 below the baseline" in shown
    known = many_trees.read(night.path)
    assert known["best"]["mean"] == pytest.approx(0.9968) and known["best"]["n"] == 2 and known["baseline"] == pytest.approx(1.0)
    assert night.rows() == rows and rows[2][1] == "0.996500"


def test_a_run_that_was_ignored_stays_so_when_its_keep_runs_again():
    """As the rule has it: a slowed run does not count once there is one that is not."""
    found = made(("keep", 0.99, 2))
    found[-2]["slowed"], found[-1]["mean"], found[-1]["n"] = 0.5, found[-1]["summary"]["val_bpb"], 1
    night = Night(records=found)
    assert night.mean_of(night.best_record) == {"mean": 0.991, "n": 1}
    night = Night(records=[*found, again(found, 2, 0.993, "a")])
    assert night.mean_of(night.best_record) == {"mean": pytest.approx(0.992), "n": 2} and night.search.tip.mean == pytest.approx(0.992)


def test_a_doubted_tip_whose_repeats_crash_gets_new_seeds_and_after_two_crashes_no_more_runs(doubted):
    night, _ = doubted
    train, rows = night.read("train.py"), night.rows()
    night.run(tail="FAIL: loss is nan\n", seed=43)
    once = night.recorded()
    assert once.verdict == "crash" and AGAIN.replace("43", "44") in once.out and "crashed, so" not in once.out
    assert night.lab("status").out.rstrip().endswith(AGAIN.replace("43", "44"))
    night.run(tail="FAIL: loss is nan\n", seed=44)
    twice = night.recorded()
    dropped = "doubt: 2 more runs of row 0003 crashed, so 1 run alone decided it and it does not run again"
    assert twice.verdict == "crash" and dropped in twice.out and "Edit train.py" in twice.out
    shown = night.lab("status").out
    assert dropped in shown and "edit train.py" in shown and "best: 0.996500 (mean of 1), row 0003" in shown
    assert night.read("train.py") == train and night.rows() == rows
    night.check()


def test_crashes_before_a_commit_was_kept_do_not_end_the_doubt_of_it():
    found = made(("keep", 0.995, 1), *[("discard", 1.02 + i / 100, 1) for i in range(12)])
    assert Night(records=found).doubted
    crash = again(found, 2, 1.0, "crash", "crash") | {"summary": None}
    crashes = [{**crash, "run_id": f"crash {i}"} for i in range(2)]
    assert Night(records=[*found, crashes[0]]).doubted and not Night(records=[*found, *crashes]).doubted
    place = next(i for i, r in enumerate(found) if r["row"] == 2)
    assert Night(records=[*found[:place], *crashes, *found[place:]]).doubted


def test_what_was_given_up_can_be_tried_again_under_a_new_seed_only(doubted):
    night, _ = doubted
    until_stepped_back(night)
    head = night.head()
    night.git("cherry-pick", "refs/autoresearch/test/0003", check=False)
    night.change_train(TRAIN.format(2))
    night.git("add", "train.py")
    night.git("commit", "-q", "--allow-empty", "-m", "lucky once more", "--", "train.py", check=False)
    night.run(0.99)
    refusal = night.refused("once more")
    assert "tried before under seed 42 (row 0003)" in refusal and f"git reset --keep {head[:7]}" in refusal


def test_page_picture_and_notebook_show_what_was_given_up(doubted):
    from starlette.testclient import TestClient

    from lab.charts import figures, notebook, plotly_charts
    from lab.web import app, working_trees

    night, _ = doubted
    until_stepped_back(night)
    client = TestClient(app.create(working_trees.find([night.path])), base_url="http://127.0.0.1:8000")
    assert "(given up: " in client.get("/").text
    (e,) = [e for e in client.get("/api/experiments").json()["experiments"] if e["given_up"]]
    assert e["number"] == 3 and e["status"] == "discard" and "stepped back to row 0002" in e["given_up"]
    read = read_night(night.path)
    labels = figures.progress(read).axes[0].get_legend_handles_labels()[1]
    assert "given up (1)" in labels
    (others,) = [t for t in plotly_charts.progress(read)["data"] if t["name"].startswith("not kept")]
    assert others["marker"]["symbol"].count("circle-open") == 1
    assert "stepped back: row 3 (lucky)" in notebook.outcomes(read)
    assert read.running_best()[-1] == 0.9975


# ---------------------------------------------------------------------------------------------------
# The machine


def log_of(tmp_path, speeds, steps=953, tokens_M=499.6, batch="device batch: 128 x 2048 tokens, 2 micro-batches a step\n"):
    header = {"run_id": "a", "start": "2026-11-21T00:00:00+00:00", "train_sha256": "c", "rules_sha256": "r",
              "data_sha256": "d", "dataset": "x", "seed": 42, "device": "cpu", "clock": "monotonic"}  # fmt: skip
    lines = [f"step {i:05d} ({i}.0%) | loss 3.1 | lrm 1.00 | {524288e3 / v:.0f} ms | {v:,.0f} tok/s | mfu 1.0% | epoch 1 | 9 s left\n"
             for i, v in enumerate(speeds)]  # fmt: skip
    end = SUMMARY.format(val_bpb=1.0, seconds=300.0, steps=steps).replace("499.6", f"{tokens_M:.1f}")
    (tmp_path / "run.log").write_text(f"run: {json.dumps(header)}\n{batch}{''.join(lines)}{end}")
    return run_log.read(tmp_path / "run.log")


def test_a_run_says_how_far_its_steps_were_slowed(tmp_path):
    assert log_of(tmp_path, [1e6] * 20).slowed == pytest.approx(0)
    slow = log_of(tmp_path, [1e6] * 10 + [5e5] * 10).slowed  # half of the lines at half the speed: 1.5 times the time
    assert slow == pytest.approx(1 / 3)
    assert log_of(tmp_path, [1e6, 5e5]).slowed == 0, "two lines say nothing"


def test_tokens_are_counted_and_not_read_from_a_rounded_number(tmp_path):
    assert log_of(tmp_path, [1e6]).tokens == 953 * 128 * 2048 * 2
    assert log_of(tmp_path, [1e6], tokens_M=400.0).tokens is None, "the batch changed during the run"
    assert log_of(tmp_path, [1e6], batch="").tokens is None


def test_a_discard_that_a_slow_machine_could_explain_is_run_again_and_the_slow_run_does_not_count(tmp_path):
    night = FakeNight(tmp_path / "night")
    night.baseline()

    def with_speeds(speeds, value, seed):
        night.run(value, seed=seed)
        lines = "".join(PROGRESS.replace("1,648,000", f"{v:,}") for v in speeds)
        log = night.read("run.log").replace(PROGRESS, lines)
        (night.path / "run.log").write_text(log)

    for value, slow, expected in [(1.0, True, "confirm"), (1.0, False, "discard"), (1.2, True, "discard")]:
        night.change_train()
        night.commit("idea")
        with_speeds([1_648_000] * 10 + [800_000 if slow else 1_648_000] * 10, value, 42)
        result = night.recorded("idea")
        assert result.verdict == expected, result.out
        assert ("slowed: its steps were" in result.out) == slow
        if expected == "confirm":
            keep, short = verdict.bar(read_night(night.path).search).keep, night.head()[:7]
            assert f"keep below {keep:.6f}: one more run of {short}, if the machine does not slow it, too" in result.out
            with_speeds([1_648_000] * 20, 0.99, 43)
            assert night.recorded().verdict == "keep" and night.records()[-1]["mean"] == 0.99
    assert read_night(night.path).replayed[0].line[1].values == (0.99,)
    with_speeds([1_648_000] * 20, 0.992, 44)
    assert "keep: val_bpb 0.991000 (mean of 2)" in night.recorded().out, "the slowed run counts again"
    assert "best: 0.991000 (mean of 2)" in night.lab("status").out


def test_a_slowed_run_counts_where_all_are_slow():
    run = {"summary": {"num_steps": 100, "training_seconds": 10.0}, "slowed": 0.2}
    assert measured([run]) == [run]
    assert measured([run, {**run, "slowed": 0.0}]) == [{**run, "slowed": 0.0}]
    old = {"summary": run["summary"]}  # of a version that did not say
    assert measured([old, run]) == [old] and measured([old, {**run, "slowed": SLOWED}]) == [old, {**run, "slowed": SLOWED}]


# ---------------------------------------------------------------------------------------------------
# Words


def test_one_number_to_beat_is_printed_and_it_is_the_rules(doubted):
    night, _ = doubted
    result = night.experiment("another", 1.05)[1]
    (line,) = [line for line in result.out.splitlines() if "keep below" in line]
    assert line.startswith(f"keep below {verdict.bar(read_night(night.path).search).keep:.6f}: one run")
    assert not re.search(r"against \d|best: \d", result.out) and "the last 10 experiments gained" in result.out
    assert json.loads(night.lab("status", "--json").out)["keep_below"] == verdict.bar(read_night(night.path).search).keep


def test_after_a_confirm_it_is_the_number_for_the_mean_of_two(tmp_path):
    night = FakeNight(tmp_path / "night")
    night.baseline()
    commit, result = night.close_call()
    keep = verdict.bar(read_night(night.path).search, 2).keep
    assert f"keep below {keep:.6f}: the mean of 2 runs of {commit[:7]}" in result.out


def test_the_number_after_a_confirm_is_for_the_runs_that_will_count(tmp_path):
    night = FakeNight(tmp_path / "night")
    night.baseline()
    commit, _ = night.close_call()
    night.run(CLOSE + 1e-5, seed=43, steps=880)
    result, keep = night.recorded(), verdict.bar(read_night(night.path).search, 2).keep
    assert result.verdict == "confirm" and f"keep below {keep:.6f}: the mean of 2 runs of {commit[:7]}" in result.out
    night.run(keep - (CLOSE - keep) - 1e-5, seed=44)
    result = night.recorded()
    assert result.verdict == "keep" and f"the mean of 2 runs must be below {keep:.6f}" in result.out


@pytest.mark.parametrize("simpler", [False, True])
def test_a_close_call_whose_repeats_are_all_slowed_ends_after_three_runs(tmp_path, simpler):
    night = FakeNight(tmp_path / "night")
    night.baseline()
    if simpler:
        night.change_train(night.read("train.py").replace("WIDTH = 512\n", ""))
        night.commit("no width")
        night.run(1.0)
        assert night.recorded("no width", "--simpler").verdict == "confirm"
    else:
        night.close_call()
    row = len(night.rows()) + 1
    said = []
    for seed in (43, 44):
        night.run(CLOSE + seed * 1e-6, seed=seed, steps=880)
        said.append(night.recorded())
    assert [result.verdict for result in said] == ["confirm", "discard"]
    assert "3 runs did not decide it, as the machine slowed 2 of them" in said[1].out
    assert len(night.rows()) == row and night.rows()[-1][3] == "discard"
    night.check()


def test_the_cost_of_a_run_and_how_many_fit_are_told(monkeypatch):
    found = made(("discard", 1.02, 1))
    for i, r in enumerate(found):
        r["start"], r["end"] = f"2026-11-21T00:{10 * i:02d}:00+00:00", f"2026-11-21T00:{10 * i + 6:02d}:00+00:00"
        r["summary"]["total_seconds"] = 360.0
    night = Night(records=found)
    assert night.cost == (600.0, 300.0)
    monkeypatch.delenv(names.NIGHT_ENDS, raising=False)
    assert report.cost(night) == "time: 600 s from one run to the next, 300 s of it training"
    monkeypatch.setenv(names.NIGHT_ENDS, f"{time.time() + 3605:.0f}")
    assert report.cost(night).endswith("; 6 more fit into the night")
    monkeypatch.setenv(names.NIGHT_ENDS, "soon")
    assert report.cost(night).endswith("training")


def test_a_plateau_is_said_with_the_program_for_it():
    some = made(("keep", 0.995, 1), *[("discard", 1.0 + 0.01 * i, 1) for i in range(report.PLATEAU - 1)])
    assert report.plateau(Night(records=some)) is None
    more = made(("keep", 0.995, 1), *[("discard", 1.0 + 0.01 * i, 1) for i in range(report.PLATEAU)])
    said = report.plateau(Night(records=more))
    assert said.startswith("plateau: 10 experiments in a row did not beat row 0002") and "programs/plateau.md" in said
    rich = made(("keep", 0.9, 1), *[("discard", 1.0 + 0.01 * i, 1) for i in range(report.PLATEAU)])
    assert report.plateau(Night(records=rich)) is None


def test_a_gap_that_widens_is_told_and_a_steady_one_is_not(tmp_path):
    rng = random.Random(0)
    steady = [0.01 + rng.gauss(0, 0.001) for _ in range(20)]
    assert holdout.widening(steady) is None and "does not widen" in holdout.sentence(steady)
    wider = [v + 0.001 * i for i, v in enumerate(steady)]
    early, late = holdout.widening(wider)
    assert late - early == pytest.approx(0.01, rel=0.2) and "widens" in holdout.sentence(wider)
    assert holdout.widening(wider[::-1]) is None and "too few" in holdout.sentence(wider[:3]) and holdout.sentence([]) is None
    columns = "row\tcommit\tval_logged\tval_again\tholdout\tval_gain\tholdout_gain\tflags\tdescription\n"
    rows = [f"{i:04d}\tabcd\t1\t1\t1\t{0.1 + g:+.6f}\t+0.100000\tok\tx\n" for i, g in enumerate(wider)]
    (tmp_path / names.AUDIT_TSV).write_text(columns + "0001\tabcd\t1\t1\t1\t\t\tok\tx\n" + "".join(rows))
    assert holdout.read_gaps(tmp_path) == pytest.approx(wider, abs=1e-6)
    assert holdout.read_gaps(tmp_path / "nowhere") == []


def test_the_audits_table_has_the_gap_of_each_kept_commit():
    from lab.verify import audit

    rows = [{"row": f"{i:04d}", "commit": "abcd", "description": "x", "flags": [], "val_logged": v, "val_again": v, "holdout": h}
            for i, (v, h) in enumerate([(1.0, 1.1), (0.9, 1.01), (0.8, 0.95)], 1)]  # fmt: skip
    audit.compare(rows, 0.5)
    assert [row.get("gap") for row in rows] == [None, pytest.approx(0.01), pytest.approx(0.05)]
    head, *lines = audit.table(rows).splitlines()
    assert head.rstrip().endswith("gap")
    assert "+0.010000" in lines[1] and "+0.050000" in lines[2]
