"""The zoo: edits of train.py, run for real, each judged as tests/zoo.py says.

The plain suite runs a few of them and stops after the run. The slow test takes all of them through `lab record` and
`lab audit`, too: minutes. Five rounds of all: `uv run python tests/zoo.py --rounds 5`.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, TINY_RULES
from zoo import EDITS, judged_right, table
from zookeeper import KNOBS, Outcome, Train, Zoo

QUICK = [e for e in EDITS if e.quick]


def plain_train():
    train = Train((ROOT / "train.py").read_text())
    for name, value in KNOBS.items():
        train.knob(name, value)
    return train.text


def futures(request, zoo, through):
    """{name: future Outcome} of the edits of the selected tests, two at once."""
    fixture = request.fixturename
    chosen = [item.callspec.params["edit"] for item in request.session.items if fixture in item.fixturenames]
    with zoo, ThreadPoolExecutor(2) as pool:
        zoo.open(through)
        yield {e.name: pool.submit(zoo.judge, e, through) for e in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def quick_outcomes(request, tmp_path_factory, prepared_stdlib):
    yield from futures(request, Zoo(tmp_path_factory.mktemp("zoo"), TINY_RULES["stdlib"], prepared_stdlib), "run")


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    yield from futures(request, Zoo(tmp_path_factory.mktemp("zoo")), "audit")


@pytest.mark.parametrize("edit", QUICK, ids=lambda e: e.name)
def test_the_run_judges_it_right(edit, quick_outcomes):
    outcome = quick_outcomes[edit.name].result()
    assert judged_right(edit, outcome, "run"), f"{edit.what}: {outcome}, expected {edit.stage} {edit.sentence!r}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
def test_run_record_and_audit_judge_it_right(edit, outcomes):
    outcome = outcomes[edit.name].result()
    assert judged_right(edit, outcome), f"{edit.what}: {outcome}, expected {edit.stage} {edit.sentence!r}"


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
def test_it_still_edits_the_default_train(edit):
    """An anchor that is gone is an error here, in a millisecond, rather than in the slow test."""
    before = plain_train()
    train = Train(before)
    edit.change(train)
    compile(train.text, edit.name, "exec")
    assert train.text != before or train.files, "it changes nothing"


def test_the_zoo_is_large_and_half_of_it_honest():
    names = [e.name for e in EDITS]
    assert len(set(names)) == len(names) >= 60
    assert sum(e.honest for e in EDITS) >= 30 and sum(not e.honest for e in EDITS) >= 30
    assert all(e.stage == "accepted" for e in EDITS if e.honest)


def test_the_command_prints_the_table_without_running_anything():
    done = subprocess.run([sys.executable, "tests/zoo.py", "--table"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == table()
    assert table() in (ROOT / "docs" / "proof.md").read_text(), "docs/proof.md: copy what `uv run python tests/zoo.py --table` prints"
    for edit in EDITS:
        assert edit.what in done.stdout


def test_an_outcome_is_right_only_at_its_stage_and_with_its_sentence():
    (honest,) = [e for e in EDITS if e.name == "ema"]
    (second_block,) = [e for e in EDITS if e.name == "second_block"]
    (leaks,) = [e for e in EDITS if e.name == "chunks_of_16"]
    future = Outcome("run", "the model sees its own future", None, {})
    refused = Outcome("record", "run.log has two summaries", None, {})
    accepted = Outcome("accepted", "", 1.0, {})
    for edit, right in (honest, accepted), (leaks, future), (second_block, refused):
        assert [o for o in (accepted, future, refused) if judged_right(edit, o)] == [right]
    assert not judged_right(leaks, Outcome("run", "ZeroDivisionError", None, {}))
    assert judged_right(second_block, accepted, "run")  # where record is not asked
