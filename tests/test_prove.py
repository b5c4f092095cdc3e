"""lab prove: what it trains, in which order, what it concludes, and how it goes on after it was stopped.

The trainings are made up (a train.py that prints what a run prints, its value a known truth plus the seed's noise) and
so are the holdout's scores; one slow test trains for real, on an injected clock.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import assert_refused, tiny_repo
from fakenight import FakeNight

from lab.base import processes
from lab.base.errors import Again, Refused, Unfinished
from lab.store import ends, run_log
from lab.verify import commits, comparison, prove, scoring

SIGMA = 0.002
TRAINING = '''
import hashlib, json, os, random, sys
TRUE = {true}
seed = int(os.environ["AUTORESEARCH_SEED"])
code = hashlib.sha256(open(__file__, "rb").read()).hexdigest()
rules = hashlib.sha256(open("constants.py", "rb").read() + open("prepare.py", "rb").read()).hexdigest()
assert sorted(p for p in os.listdir(".") if not p.endswith(".log")) == ["constants.py", "corpus", "prepare.py", "train.py"]
with open(os.environ["ORDER"], "a") as f:
    f.write(f"{{TRUE}} {{seed}}\\n")
print("run:", json.dumps(dict(
    run_id=f"{{code[:8]}}{{seed}}-{{os.getpid()}}", start="2026-01-01T00:00:00+00:00", train_sha256=code, rules_sha256=rules, data_sha256="b",
    dataset="stdlib", seed=seed, device="cpu (x)", clock=os.environ.get("CLOCK", "injected"))))
{extra}
val = TRUE + random.Random(seed * 1000 + round(TRUE * 1000)).gauss(0, {sigma})
open("checkpoint.pt", "w").write(str(val))
{late}
print(f"---\\nval_bpb: {{val:.6f}}\\ntraining_seconds: 300.0\\ntotal_seconds: 320.0\\npeak_vram_mb: 0.0\\nmfu_percent: 0.0")
print("total_tokens_M: 3.0\\nnum_steps: 10\\nnum_params_M: 1.0\\ndepth: 4")
'''


class Night:
    def __init__(self, path, monkeypatch):
        self.fake = FakeNight(path / "night")
        self.path, self.order = self.fake.path, path / "order.txt"
        (self.path / "constants.py").write_text("TIME_BUDGET = 300\n")
        (self.path / "corpus").mkdir()
        (self.path / "corpus" / "build.py").write_text("# data\n")
        self.fake.git("add", ".")
        self.fake.git("commit", "-q", "-m", "rules")
        monkeypatch.chdir(self.path)
        monkeypatch.setenv("ORDER", str(self.order))
        monkeypatch.setattr(scoring, "score", self.score)
        self.holdout_share, self.prepare = 1.0, (self.path / "prepare.py").read_text()

    def score(self, tree, folder):
        assert tree == folder and (folder / "prepare.py").read_text() == self.prepare
        value = float((folder / "checkpoint.pt").read_text())
        noise = random.Random(str(value)).gauss(0, SIGMA / 10)
        return {"val": value, "holdout": 1.1 - (1.0 - value) * self.holdout_share + noise, "device": "cpu"}

    def commit(self, true, extra="", sigma=SIGMA, late=""):
        (self.path / "train.py").write_text(TRAINING.format(true=true, extra=extra, sigma=sigma, late=late))
        self.fake.git("commit", "-q", "-am", f"truth {true}")
        return self.fake.head()

    def prove(self, *commits, seeds=3, clocks=("injected",), **options):
        args = argparse.Namespace(commits=list(commits), seeds=seeds, tree=[], dry_run=False)
        vars(args).update(options)
        return prove.run(args, clocks)

    def trained(self):
        lines = self.order.read_text().splitlines() if self.order.exists() else []
        return [tuple(map(float, line.split())) for line in lines]


@pytest.fixture
def night(tmp_path, monkeypatch):
    return Night(tmp_path, monkeypatch)


def untouched(night):
    """What a proof must leave alone."""
    head = night.fake.git("rev-parse", "HEAD").strip()
    return head, night.fake.git("status", "--porcelain").replace("?? comparison.txt\n", ""), night.fake.git("worktree", "list")


def test_arms_are_trained_in_turn_under_the_same_fresh_seeds_and_nothing_else_is_touched(night, capsys):
    a, b = night.commit(1.0), night.commit(0.95)
    before = untouched(night)
    assert night.prove(a, b) == 0
    assert night.trained() == [(1.0, 1000), (0.95, 1000), (0.95, 1001), (1.0, 1001), (1.0, 1002), (0.95, 1002)]
    assert untouched(night) == before and not (night.path / "results.tsv").exists()
    out = capsys.readouterr().out
    assert "6 runs to do, 0 done" in out and out.endswith((night.path / "proof.txt").read_text())
    assert out.count(": real\n") == 2 and f"{b[:7]} against {a[:7]} on holdout" in out
    assert not list((night.path / ".lab" / "prove").rglob("checkpoint.pt"))


@pytest.mark.parametrize("gain", [0.02, 0.0])
def test_the_interval_of_a_known_gain_covers_it(night, gain, capsys):
    """And no gain is called one. The noise is that of the seeds."""
    a, b = night.commit(1.0), night.commit(1.0 - gain, extra="'another commit'")
    night.prove(a, b, seeds=5)
    line = next(ln for ln in capsys.readouterr().out.splitlines() if " on val: gain " in ln)
    low, high = (float(x) for x in line.partition("[")[2].partition("]")[0].split(","))
    assert low <= gain <= high and high - low < 10 * SIGMA
    assert line.endswith("n = 5 + 5: real" if gain else "n = 5 + 5: cannot be told from noise")


def test_a_gain_on_val_that_the_holdout_does_not_show_is_said(night, capsys):
    night.holdout_share = 0.0
    night.prove(night.commit(1.0), night.commit(0.95))
    assert "does not appear on the holdout" in capsys.readouterr().out


def test_one_commit_is_a_measurement_of_noise(night, capsys):
    night.prove(night.commit(1.0), seeds=4)
    out = capsys.readouterr().out
    assert "val: σ of one run 0.00" in out and "n = 4" in out and "against" not in out


def test_stopped_in_the_middle_it_goes_on_with_the_run_it_was_in(night, monkeypatch, capsys):
    a, b = night.commit(1.0), night.commit(0.95)
    calls = []

    def interrupted(tree, folder):
        calls.append(folder)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return night.score(tree, folder)

    monkeypatch.setattr(scoring, "score", interrupted)
    with pytest.raises(Unfinished):
        night.prove(a, b)
    assert night.prove(a, b) == 0
    assert "3 runs to do, 3 done" in capsys.readouterr().out
    assert night.trained()[3:5] == [(1.0, 1001), (1.0, 1001)] and len(night.trained()) == 7
    assert night.prove(a, b) == 0 and len(night.trained()) == 7  # all is there
    assert night.prove(a, b, seeds=4) == 0 and len(night.trained()) == 9


def test_more_seeds_later_do_not_change_what_a_smaller_table_says(night):
    a, b = night.commit(1.0), night.commit(0.95)
    night.prove(a, b)
    text = (night.path / "proof.txt").read_text()
    night.prove(a, b, seeds=5)
    night.prove(a, b)
    assert (night.path / "proof.txt").read_text() == text


def test_a_crash_is_counted_and_said_and_in_no_mean(night, capsys):
    a = night.commit(1.0)
    b = night.commit(0.95, extra="if seed == 1001: raise ValueError('a shape')")
    night.prove(a, b, seeds=3)
    out = capsys.readouterr().out
    assert f"{b[:7]}: 1 of 3 runs crashed and are in no mean" in out and "n = 3 + 2" in out
    assert "crashed" in out.splitlines()[3]


def test_a_refused_run_is_in_no_mean_and_no_gain(night, monkeypatch, capsys):
    a, b = night.commit(1.0), night.commit(0.5)

    def score(tree, folder):
        scores = night.score(tree, folder)
        return scores if scores["val"] > 0.8 else {"refused": "the model sees its own future", "device": "cpu"}

    monkeypatch.setattr(scoring, "score", score)
    night.prove(a, b)
    out = capsys.readouterr().out
    assert f"{b[:7]}: 3 of 3 runs were refused and are in no mean: the model sees its own future" in out
    assert "real" not in out and out.count("too few runs to tell") == 2


def test_a_value_that_the_frozen_metric_does_not_give_is_refused(night, capsys):
    a, b = night.commit(1.0), night.commit(0.95, late="val -= 0.4  # what is printed")
    night.prove(a, b)
    out = capsys.readouterr().out
    assert f"{b[:7]}: 3 of 3 runs were refused and are in no mean: does not reproduce: +0.4" in out
    assert "real" not in out


def test_what_a_training_does_to_its_folder_is_gone_before_it_is_scored_and_before_the_next(night):
    spoil = "open('prepare.py', 'w').write('spoilt'); open('seen', 'w').write('')"
    assert night.prove(night.commit(1.0, late=spoil)) == 0  # Night.score and the training itself look at the files
    assert len(night.trained()) == 3


def test_a_train_py_that_changes_the_rules_before_it_begins_is_refused(night):
    a = night.commit(1.0)
    text = (night.path / "train.py").read_text()
    spoilt = text.replace("rules = ", "open('prepare.py', 'a').write('# mine')\nrules = ", 1)
    (night.path / "train.py").write_text(spoilt)
    night.fake.git("commit", "-q", "-am", "spoils")
    with pytest.raises(Refused, match="other rules than the commit has"):
        night.prove(a, night.fake.head())


def test_what_a_killed_proof_left_running_is_ended_first(night):
    a, flag = night.commit(1.0), night.path.parent / "once"
    extra = f"import time\nif not os.path.exists({str(flag)!r}): open({str(flag)!r}, 'w'); time.sleep(600)"
    a = night.commit(0.9, extra)
    env = night.fake.env | {"ORDER": str(night.order)}
    process = subprocess.Popen([sys.executable, "-m", "lab", "prove", a], cwd=night.path, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    (place,) = (p.parent for p in (night.path / ".lab" / "prove").rglob("plan.json"))
    assert len(processes.marked(prove.MARK, str(place))) == 1
    assert night.prove(a) == 0 and processes.marked(prove.MARK, str(place)) == []


def test_a_preempted_training_is_run_again(night):
    flag = night.path.parent / "once"
    extra = f"if not os.path.exists({str(flag)!r}): open({str(flag)!r}, 'w'); print('preempted'); sys.exit(75)"
    a = night.commit(1.0, extra)
    with pytest.raises(Again, match="preempted: the same command repeats it"):
        night.prove(a)
    assert night.prove(a) == 0
    assert night.trained() == [(1.0, 1000), (1.0, 1000), (1.0, 1001), (1.0, 1002)]


def test_a_training_that_the_machine_ended_is_run_again_and_no_crash(night):
    flag = night.path.parent / "once"
    extra = f"if not os.path.exists({str(flag)!r}): open({str(flag)!r}, 'w'); raise OSError(28, 'No space left on device')"
    a = night.commit(1.0, extra)
    with pytest.raises(Again, match="this machine ended the training of .* \\(No space left on device\\): mend that"):
        night.prove(a)
    assert night.prove(a) == 0
    assert night.trained() == [(1.0, 1000), (1.0, 1000), (1.0, 1001), (1.0, 1002)]


OVERRUN = "if {when}: raise SystemExit('training overran its 300 s by 40.0 s, 3.0 s are allowed: call progress() once a step')"


def test_a_training_that_overran_is_run_again_as_a_stall_of_the_machine_may_have_slowed_it(night, capsys):
    flag = night.path.parent / "once"
    a = night.commit(1.0, OVERRUN.format(when=f"not os.path.exists({str(flag)!r}) and not open({str(flag)!r}, 'w').close()"))
    with pytest.raises(Again, match="training overran its 300 s by 40.0 s, .* may have stalled: the same command repeats"):
        night.prove(a)
    assert night.prove(a) == 0 and "crashed" not in capsys.readouterr().out
    assert night.trained() == [(1.0, 1000), (1.0, 1000), (1.0, 1001), (1.0, 1002)]


def test_a_training_that_overruns_each_time_is_a_crash_in_the_end(night, capsys):
    """Each seed has its own repeats: a run with another end forgets them."""
    a = night.commit(1.0, OVERRUN.format(when="seed > 1000"))
    for _ in range(2 * ends.REPEATS):
        with pytest.raises(Again, match="may have stalled: the same command repeats"):
            night.prove(a)
    assert night.prove(a) == 0 and "2 of 3 runs crashed and are in no mean" in capsys.readouterr().out
    assert len(night.trained()) == 1 + 2 * (1 + ends.REPEATS)


def test_seeds_are_new_to_every_tree(night):
    record = {"run_id": "x", "tag": "test", "commit": "0" * 40, "verdict": "keep", "code": "c", "summary": None}
    (night.path / "runs.jsonl").write_text(json.dumps(record | {"header": {"seed": 1004}}) + "\n")
    night.prove(night.commit(1.0))
    assert [seed for _, seed in night.trained()] == [1005, 1006, 1007]


def test_the_dataset_is_that_of_the_present_night_although_an_earlier_one_ran_the_same_baseline(night, monkeypatch):
    """Night 1 was on tinystories, night 2 is on stdlib; both begin with the same train.py."""
    base = night.fake.head()
    night.fake.baseline()
    first = [r | {"tag": "first", "run_id": f"x{i}", "header": r["header"] | {"dataset": "tinystories"}}
             for i, r in enumerate(night.fake.records())]  # fmt: skip
    best, old = night.fake.experiment("better", 0.95)[0], night.commit(0.9)
    first.append(first[-1] | {"run_id": "x", "commit": old, "code": hashlib.sha256(night.fake.read("train.py").encode()).hexdigest()})
    (night.path / "runs" / "first").mkdir()
    (night.path / "runs" / "first" / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in first))

    def found(*names):
        return [(arm.commit, arm.dataset["AUTORESEARCH_DATASET"]) for arm in commits.find(names, [night.path])[0]]

    assert found() == [(base, "stdlib"), (best, "stdlib")]
    assert found(base) == [(base, "stdlib")]
    assert found(base, old) == [(base, "tinystories"), (old, "tinystories")]
    with pytest.raises(Refused, match="different datasets"):
        found(best, old)
    assert found(new := night.commit(0.8), best) == [(new, "stdlib"), (best, "stdlib")], "a commit without a run"
    night.fake.git("switch", "-q", "--detach")  # on no night's branch the shell's dataset decides, if the commit ran on it
    monkeypatch.setenv("AUTORESEARCH_DATASET", "stdlib")
    assert found(base) == [(base, "stdlib")]
    monkeypatch.setenv("AUTORESEARCH_DATASET", "tinystories")
    assert found(base) == [(base, "tinystories")] and found(best) == [(best, "stdlib")]


def test_runs_on_another_dataset_are_another_proof(night, monkeypatch):
    commit = night.commit(1.0)
    for dataset, runs in [("stdlib", 3), ("tinystories", 6), ("stdlib", 6)]:
        monkeypatch.setenv("AUTORESEARCH_DATASET", dataset)
        night.prove(commit)
        assert len(night.trained()) == runs


@pytest.mark.parametrize("dtype, limit", [("float32", scoring.SAME), ("bfloat16", scoring.OTHER)])
def test_a_score_stands_if_a_few_rows_have_it_in_a_process_of_their_own(tmp_path, monkeypatch, dtype, limit):
    header = {key: "x" for key in run_log.HEADER} | {"start": "2026-01-01T00:00:00+00:00", "seed": 1, "device": "cpu (x)"}
    (tmp_path / "run.log").write_text(f"run: {json.dumps(header)}\ndtype: {dtype} (why)\n")
    among = {"device": "cpu", "data_sha256": "b", "val": 0.9, "holdout": 0.91, "rows": [7, 3], "of_rows": 0.905}
    result, asked = {key: among[key] for key in ("device", "data_sha256", "val", "holdout")}, []

    def scored(alone):
        def in_process(tree, folder, device, time_limit, rows=()):
            asked.append(rows)
            return among | alone if rows else dict(among)

        monkeypatch.setattr(scoring, "in_process", in_process)
        return scoring.score(tmp_path, tmp_path)

    assert scored({"of_rows": 0.905 + 0.9 * limit}) == scored({"of_rows": 0.905 - 0.9 * limit}) == result
    assert asked == [(), [7, 3]] * 2
    for difference in (1.1 * limit, -1.1 * limit):
        assert f"after other rows ({difference:+.6f} bpb" in scored({"of_rows": 0.905 + difference})["refused"]
    assert scored({"refused": "not finite"})["refused"] == "not finite"


def test_refusals(night, monkeypatch):
    a = night.commit(1.0)
    for given, options, says in [
        ([a], {"seeds": 2}, "fewer than 3"),
        (["nothing"], {}, "there is no commit nothing"),
        (["--help"], {}, "is not a commit"),
        ([a, a], {}, "the same train.py"),
        ([], {}, "nothing was kept on this branch yet"),
        ([a], {"clocks": ("monotonic",)}, "injected clock"),
    ]:
        with pytest.raises(Refused, match=says):
            night.prove(*given, **options)
    (night.path / "constants.py").write_text("TIME_BUDGET = 600\n")
    b = night.commit(0.9)
    with pytest.raises(Refused, match="different rules"):
        night.prove(a, b)
    night.fake.git("rm", "-q", "-r", "corpus")
    with pytest.raises(Refused, match="lacks one of constants.py"):
        night.prove(a, night.commit(0.8))
    monkeypatch.setattr(prove.locks, "run_in_progress", lambda top: True)
    with pytest.raises(Refused, match="a run is in progress"):
        night.prove(a)


def test_another_device_is_not_mixed_in(night):
    a = night.commit(1.0, extra="")
    night.prove(a)
    (runs,) = (night.path / ".lab" / "prove").rglob("runs.jsonl")
    runs.write_text(runs.read_text().replace("cpu (x)", "cuda (y)"))
    with pytest.raises(Refused, match="another device"):
        night.prove(a, seeds=4)


def test_dry_run_says_what_it_would_cost(night, capsys):
    a = night.commit(1.0)
    assert night.prove(a, dry_run=True) == 0
    assert "3 runs to do" in capsys.readouterr().out
    assert night.trained() == [] and not (night.path / "proof.txt").exists()


def test_terminated_it_leaves_no_training_behind(night):
    a, env = night.commit(1.0, extra="import time; time.sleep(600)"), night.fake.env | {"ORDER": str(night.order)}
    process = subprocess.Popen(
        [sys.executable, "-m", "lab", "prove", a], cwd=night.path, env=env, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not night.trained() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = subprocess.run(
        [sys.executable, "-m", "lab", "prove", a], cwd=night.path, env=env, capture_output=True, text=True
    )
    assert second.returncode == 1 and "another proof is running" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "lab prove: terminated: the same command resumes\n")
    left = subprocess.run(["pgrep", "-f", str(night.path / ".lab")], capture_output=True, text=True).stdout
    assert left == ""


def test_a_report_of_made_up_runs():
    arm = argparse.Namespace(code="c", short="abc1234", description="as it was")
    rng = random.Random(0)
    runs = [{"code": "c", "seed": s, "val": rng.gauss(1, SIGMA), "holdout": None, "tokens_per_second": 10.0, "refused": "it peeks"}
            for s in range(3)]  # fmt: skip
    text = comparison.report([arm], runs, range(3))
    assert "3 of 3 runs were refused and are in no mean: it peeks" in text and "holdout: too few runs to tell" in text


@pytest.mark.parametrize("jitter", [0.0, 1e-9])  # of the holdout's sums, which a GPU may add in another order
def test_equal_values_under_all_seeds_prove_nothing(jitter):
    """A train.py that seeds a generator itself has one training under all seeds."""
    arms = [argparse.Namespace(code=c, short=c * 7, description="") for c in "abc"]
    runs = [{"code": c, "seed": s, "val": val, "holdout": val + s * jitter, "tokens_per_second": 1.0}
            for c, mean in (("a", 1.0), ("b", 0.9999), ("c", 0.8)) for s in range(3)
            for val in [mean if c < "c" else mean + 0.001 * s]]  # fmt: skip
    text = comparison.report(arms, runs, range(3))
    for split in ("val", "holdout"):
        assert f"bbbbbbb against aaaaaaa on {split}: the seed changes nothing in aaaaaaa and bbbbbbb: cannot be told" in text
        assert f"ccccccc against aaaaaaa on {split}: the seed changes nothing in aaaaaaa: cannot be told" in text
    assert "real" not in text and "aaaaaaa: 2 of 3 runs had the val of another seed: equal values count as one" in text
    text = comparison.report(arms[:1], runs, range(3))
    assert "val: the seed changes nothing in aaaaaaa: cannot be told" in text and "σ of one run" not in text


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_real_trainings_on_an_injected_clock(tmp_path, prepared_stdlib):
    """A model that does not learn against one that does: a gain that nobody doubts, on both splits."""
    cache = tmp_path / "cache"
    repo = tiny_repo(tmp_path / "clone", tmp_path, cache, "stdlib", time_budget=40, AUTORESEARCH_DATASET="stdlib")
    repo.copy_cache(prepared_stdlib)
    text = (repo.path / "train.py").read_text()
    main = 'if __name__ == "__main__":\n    main()\n'
    assert text.endswith(main)
    injected = (
        "if __name__ == '__main__':\n    import functools, itertools\n"
        "    begin_run = functools.partial(begin_run, now=itertools.count(1000.0).__next__, watchdog_now=lambda: 0.0)\n"
        "    main()\n"
    )
    text = text.removesuffix(main) + injected

    def git(*args):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", *who, *args], cwd=repo.path, check=True, capture_output=True, text=True).stdout

    git("init", "-q", "-b", "autoresearch/test")
    commits = []
    for rate in ("0.0", "0.04"):
        edited = text.replace("MATRIX_LR = 0.04", f"MATRIX_LR = {rate}").replace("EMBEDDING_LR = 0.6", f"EMBEDDING_LR = {float(rate) * 15}")
        (repo.path / "train.py").write_text(edited.replace("UNEMBEDDING_LR = 0.004", f"UNEMBEDDING_LR = {float(rate) / 10}"))
        git("add", ".")
        git("commit", "-q", "-m", f"rate {rate}")
        commits.append(git("rev-parse", "HEAD").strip())
    result = repo.run("-m", "lab", "prove", *commits)
    assert_refused(result, "injected clock")
    script = (
        "import argparse; from lab.verify import prove\n"
        f"args = argparse.Namespace(commits={commits}, seeds=3, tree=[], dry_run=False)\n"
        "raise SystemExit(prove.run(args, ('injected',)))\n"
    )
    result = repo.run("-c", script, timeout=1200, PYTHONPATH=os.fspath(repo.path))
    assert result.rc == 0, result.err
    assert result.out.count(": real") == 2, result.out
