"""lab/analysis/history.py and lab/store/results_tsv.py: a night read from disk, and nothing taken for a value that is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakenight import ROOT, FakeNight

from lab.analysis.history import read_night
from lab.base.errors import Refused

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def night_of(folder, text, **files):
    """The Night of a folder with this results.tsv (str or bytes)."""
    folder.mkdir(exist_ok=True)
    (folder / "results.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    return read_night(folder)


def rows(*lines):
    """A results.tsv; a line is status, val_bpb and perhaps a description."""
    told = [
        f"{i:07x}\t{value}\t44.0\t{status}\t{(*more, 'idea')[0]}\n" for i, (status, value, *more) in enumerate(lines, 1)
    ]
    return HEADER + "".join(told)


# ---------------------------------------------------------------------------------------------------
# Whoever wrote it


@pytest.mark.parametrize("text", [None, "", "\n \n", HEADER, "\ufeff" + HEADER.strip()])
def test_without_rows_there_is_a_night_without_experiments(tmp_path, text):
    night = read_night(tmp_path) if text is None else night_of(tmp_path, text)
    assert night.experiments == () and night.notes == ()
    assert (night.baseline, night.best, night.sigma, night.runs_per_hour) == (None,) * 4
    assert night.running_best() == [] and night.gains() == []


def test_a_folder_that_does_not_exist_is_an_empty_night(tmp_path):
    assert read_night(tmp_path / "nowhere").experiments == ()


PLAIN = HEADER + "a1b2c3d\t0.997900\t44.0\tkeep\tbase line\nb2c3d4e\t0.993200\t44.2\tdiscard\tsay ü\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", "\n\n  \n"),
        PLAIN.encode("utf-16"),
        PLAIN.replace("keep", "KEEP").replace("discard", " Discarded "),
        PLAIN.replace("0.997900", '"0.9979"').replace("base line", '"base line"').replace("commit", '"Commit"'),
        PLAIN.replace("commit\t", "status_was\tcommit\t").replace("a1b", "x\ta1b").replace("b2c3d4e\t", "y\tb2c3d4e\t"),
        "description\tstatus\tval_bpb\tcommit\tmemory_gb\nbase line\tkeep\t.9979\ta1b2c3d\t44\n"
        "say ü\tdiscard\t9.932e-1\tb2c3d4e\t4.42E1\n",
    ],
    ids=["plain", "mark", "crlf", "cr", "blank lines", "utf-16", "capitals", "quotes", "another column", "order"],
)
def test_the_same_night_however_it_is_written(tmp_path, text):
    night = night_of(tmp_path, text)
    assert [(e.number, e.commit, e.val_bpb, e.memory_gb, e.status, e.description) for e in night.experiments] == [
        (1, "a1b2c3d", 0.9979, 44.0, "keep", "base line"),
        (2, "b2c3d4e", 0.9932, 44.2, "discard", "say ü"),
    ]
    assert night.notes == ()


def test_lines_that_cannot_be_read_are_named_and_the_others_count_on(tmp_path):
    night = night_of(
        tmp_path, PLAIN + "half a row\t0.9\n" + HEADER + "c3\t0.99\t44\tkeep\tone\ttwo\nd4\t0.98\t44\tkeep\n"
    )
    assert [(e.number, e.commit, e.description) for e in night.experiments[2:]] == [(3, "c3", "one two"), (4, "d4", "")]
    assert [note.split(":")[0] for note in night.notes] == ["line 4", "line 5", "line 6", "line 7"]
    assert "2 of 5 fields; left out" in night.notes[0] and "once more" in night.notes[1]


def test_rows_without_the_names_of_the_columns_are_read_and_it_is_said(tmp_path):
    night = night_of(tmp_path, PLAIN.removeprefix(HEADER))
    assert [e.val_bpb for e in night.experiments] == [0.9979, 0.9932] and "line 1" in night.notes[0]


def test_descriptions_are_plain_text_and_nothing_is_lost_of_them(tmp_path):
    wild = "=1+1 <script>alert(1)</script> $x$ 'one' 50\" %{y} &lt; \x1b[31m\x07 \u2028 \u202eevil \x85"
    night = night_of(tmp_path, rows(("keep", 1.0, wild)) + "\n")
    (e,) = night.experiments
    for part in ("=1+1 <script>alert(1)</script> $x$ 'one' 50\" %{y} &lt;", "[31m", "evil"):
        assert part in e.description
    assert not any(c in e.description for c in "\x1b\x07\u2028\u202e\x85\n")


def test_quotes_are_taken_off_only_where_a_writer_of_tables_put_them(tmp_path):
    wanted = {'"a ""b"" c"': 'a "b" c', '"a" and "b"': '"a" and "b"', '"open': '"open', '""': ""}
    night = night_of(tmp_path, rows(*[("keep", 1.0, written) for written in wanted]))
    assert [e.description for e in night.experiments] == list(wanted.values())


def test_bytes_that_are_no_utf8_cost_a_letter_not_the_night(tmp_path):
    (e,) = night_of(tmp_path, rows(("keep", 1.0, "caf\xe9")).encode("latin-1")).experiments
    assert e.description == "caf�" and e.val_bpb == 1.0


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "1e308", "1e-300", "0", "0.000000", "-1.0", "good", "", "1_0", "0,99"])
def test_what_is_no_finite_positive_number_is_no_value(tmp_path, value):
    night = night_of(tmp_path, rows(("keep", value), ("keep", 1.0), ("ok", value)))
    assert [e.val_bpb for e in night.experiments] == [None, 1.0, None]
    assert night.baseline.number == night.best.number == 2 and night.running_best() == [None, 1.0, 1.0]


def test_two_thousand_rows_are_read_in_no_time(tmp_path):
    night = night_of(tmp_path, rows(*[("keep" if i % 9 == 0 else "discard", 2 - i / 2000) for i in range(2000)]))
    assert len(night.experiments) == 2000 and night.best.number == 1999 and len(night.gains()) == 222


# ---------------------------------------------------------------------------------------------------
# What is no results.tsv


@pytest.mark.parametrize(
    "content, needle",
    [
        ("commit,val_bpb,memory_gb,status,description\n1,2,3,keep,x\n", "no column commit, val_bpb"),
        ("commit\tval_bpb\tmemory_gb\tstatus\n", "no column description"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00", "binary"),
        (b"\x00" * 5000, "binary"),
        ("# a readme\n\nof something else\n", "is this a results.tsv?"),
    ],
)
def test_another_kind_of_file_is_refused_in_one_line(tmp_path, content, needle):
    with pytest.raises(Refused) as refused:
        night_of(tmp_path, content)
    assert needle in str(refused.value) and "results.tsv" in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path):
    (tmp_path / "results.tsv").mkdir()
    with pytest.raises(Refused, match="is not a file"):
        read_night(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="is not a file"):
        read_night(tmp_path, tmp_path / "pipe")
    with pytest.raises(Refused, match="cannot read"):
        read_night(tmp_path, tmp_path / "a\0b")
    with open(tmp_path / "huge", "wb") as f:
        f.truncate(2**30)
    with pytest.raises(Refused, match="1024 MB"):
        read_night(tmp_path, tmp_path / "huge")


# ---------------------------------------------------------------------------------------------------
# Baseline, best, gains


def test_the_baseline_is_the_first_row_that_is_not_a_crash(tmp_path):
    night = night_of(tmp_path, rows(("crash", "0.000000"), ("discard", 1.01), ("keep", 1.0), ("keep", 0.9)))
    assert night.baseline.number == 2


def test_a_crash_is_never_a_value_whatever_stands_in_its_row(tmp_path):
    night = night_of(tmp_path, rows(("keep", 1.0), ("crash", 0.5), ("CRASHED", 0.4)))
    assert [(e.status, e.val_bpb, e.memory_gb) for e in night.experiments[1:]] == [("crash", None, None)] * 2
    assert night.best.val_bpb == 1.0 and night.running_best() == [1.0] * 3


def test_gains_are_counted_against_the_best_before_and_a_simplification_may_cost_a_little(tmp_path):
    night = night_of(
        tmp_path, rows(("keep", 1.0), ("discard", 0.7), ("keep", 0.9), ("crash", 0), ("keep", 0.91), ("keep", 0.85))
    )
    assert night.running_best() == [1.0, 1.0, 0.9, 0.9, 0.9, 0.85]
    assert [(e.number, round(gain, 9)) for e, gain in night.gains()] == [(3, 0.1), (5, -0.01), (6, 0.05)]
    assert night.best.number == 6


def test_statuses_of_another_harness_are_not_kept_but_its_baseline_stands(tmp_path):
    night = night_of(tmp_path, rows(("ok", 1.0), ("ok", 0.8), ("keep", 0.95), ("baseline", 0.7)))
    assert [e.status for e in night.experiments] == ["ok", "ok", "keep", "baseline"]
    assert [e.kept for e in night.experiments] == [False, False, True, False]
    assert night.running_best() == [1.0, 1.0, 0.95, 0.95] and night.best.number == 3
    assert [(e.number, round(gain, 9)) for e, gain in night.gains()] == [(3, 0.05)]


def test_where_nothing_is_kept_the_baseline_is_the_best(tmp_path):
    night = night_of(tmp_path, rows(("crash", 0), ("discard", 1.0), ("discard", 0.9)))
    assert night.best is night.baseline and night.running_best() == [None, 1.0, 1.0] and night.gains() == []


def test_a_discarded_first_row_does_not_stand_in_the_way_of_what_was_kept(tmp_path):
    night = night_of(tmp_path, rows(("discard", 0.9), ("keep", 1.0), ("keep", 0.95)))
    assert night.baseline.number == 1 and night.best.number == 3
    assert night.running_best() == [None, 1.0, 0.95] and [e.number for e, _ in night.gains()] == [3]


def test_only_crashes_have_no_baseline(tmp_path):
    night = night_of(tmp_path, rows(("crash", "0.000000"), ("crash", 0.9)))
    assert night.baseline is night.best is None and night.running_best() == [None, None]


# ---------------------------------------------------------------------------------------------------
# This project's own: runs.jsonl and runs/


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A night by lab record itself: baseline of three runs, a discard, a close call of two, a keep, a crash."""
    night = FakeNight(tmp_path_factory.mktemp("recorded") / "tree")
    night.baseline()
    night.close_call(seconds=150.0)
    night.run(1.001, seed=43, seconds=150.0)
    night.recorded()
    night.experiment("wider", 0.99)
    night.change_train()
    night.commit("too wide")
    night.run(tail="Traceback (most recent call last):\nRuntimeError: out of memory\n")
    night.recorded("too wide")
    return night


def test_each_row_has_its_own_runs_in_order_and_its_archive(recorded):
    night = read_night(recorded.path)
    assert [(e.status, len(e.runs)) for e in night.experiments] == [
        ("keep", 3),
        ("discard", 1),
        ("discard", 2),
        ("keep", 1),
        ("crash", 1),
    ]
    assert [r["header"]["seed"] for r in night.experiments[0].runs] == [42, 43, 44]
    assert [r["summary"]["val_bpb"] for r in night.experiments[0].runs] == [1.0, 1.002, 0.998]
    assert all(r["commit"].startswith(e.commit) for e in night.experiments for r in e.runs)
    first, fourth = recorded.archives()
    assert [e.archive and e.archive.name for e in night.experiments] == [first, None, None, fourth, None]
    assert [e.training_minutes for e in night.experiments] == [15, 5, 5, 5, None]
    assert night.notes == ()


def test_sigma_is_the_one_that_record_judged_by(recorded):
    assert read_night(recorded.path).sigma == recorded.records()[-2]["sigma"] > 0.0015


def test_nothing_is_written_and_git_is_not_asked(recorded, monkeypatch):
    before = recorded.state(), sorted(recorded.path.rglob("*"))
    monkeypatch.setenv("PATH", "")
    assert len(read_night(recorded.path).experiments) == 5
    monkeypatch.undo()
    assert (recorded.state(), sorted(recorded.path.rglob("*"))) == before


def spread(records, minutes):
    """The records as if one had begun every `minutes` minutes and lasted 6."""

    def clock(minute):
        return f"2026-11-21T{minute // 60:02d}:{minute % 60:02d}:00+00:00"

    return [{**r, "start": clock(i * minutes), "end": clock(i * minutes + 6)} for i, r in enumerate(records)]


def lines(records):
    return "".join(json.dumps(r) + "\n" for r in records)


def test_runs_an_hour_count_repeats(recorded, tmp_path):
    night = night_of(tmp_path, recorded.read("results.tsv"), runs_jsonl=lines(spread(recorded.records(), 9)))
    assert night.runs_per_hour == pytest.approx(8 / (7 * 9 + 6) * 60)


def test_damaged_lines_of_runs_jsonl_are_told_and_the_others_count(recorded, tmp_path):
    good = recorded.records()
    last = {**good[3]["summary"], "val_bpb": 10**400}
    bad = [{"run_id": "x", "tag": "test", "commit": "c", "verdict": "keep"}, {**good[3], "summary": {"val_bpb": "no"}},
           {**good[3], "start": "yesterday"}, {**good[3], "summary": last}, []]  # fmt: skip
    text = lines(good) + lines(bad) + "{cut in the mid\n" + '{"last line, cut sho'
    night = night_of(tmp_path, recorded.read("results.tsv"), runs_jsonl=text)
    assert night.notes == ("runs.jsonl: 6 lines are no record of a run; left out",)
    assert [len(e.runs) for e in night.experiments] == [3, 1, 2, 1, 1]


def test_another_tags_records_and_another_nights_are_left_aside(recorded, tmp_path):
    own = recorded.records()
    foreign = [{**r, "tag": "older", "commit": "f" * 40, "summary": {**own[0]["summary"], "val_bpb": 9.0 + i}}
               for i, r in enumerate(own[:3])]  # fmt: skip
    table = recorded.read("results.tsv")
    assert night_of(tmp_path / "a", table, runs_jsonl=lines(foreign + own)).sigma == read_night(recorded.path).sigma
    by_hand = night_of(tmp_path / "b", rows(("keep", 1.0)), runs_jsonl=lines(own))
    assert by_hand.sigma is None and by_hand.runs_per_hour is None and by_hand.experiments[0].runs == ()


def test_a_runs_jsonl_that_cannot_be_read_costs_the_noise_only(recorded, tmp_path):
    (tmp_path / "runs.jsonl").mkdir()
    night = night_of(tmp_path, recorded.read("results.tsv"))
    assert len(night.experiments) == 5 and night.sigma is None and "runs.jsonl" in night.notes[0]


def test_a_commit_name_from_a_table_reaches_no_other_folder(tmp_path):
    (tmp_path / "runs" / "0001-abcd").mkdir(parents=True)
    for name in ("abcd", "../0001-abcd", "ABCD", "/etc", "."):
        night = night_of(tmp_path, HEADER + f"{name}\t1.0\t44.0\tkeep\tx\n")
        assert (night.experiments[0].archive is not None) == (name == "abcd")


def test_the_same_commit_in_two_rows_shares_no_runs(recorded, tmp_path):
    first, *others = recorded.read("results.tsv").splitlines()[1:]
    night = night_of(tmp_path, HEADER + "\n".join([first, *others, first]) + "\n", runs_jsonl=lines(recorded.records()))
    assert [len(e.runs) for e in night.experiments] == [1, 1, 2, 1, 1, 0]


def test_reading_a_night_loads_nothing_heavy():
    code = "import sys, lab.analysis.history, lab.charts.plotly_charts; print([m for m in sys.modules if m.split('.')[0] in " \
           "('torch', 'pandas', 'prepare', 'matplotlib', 'plotly', 'numpy')])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_night_put_aside_is_found_beside_its_table(recorded, tmp_path):
    night = read_night(tmp_path, Path(recorded.path) / "results.tsv")
    assert len(night.experiments[0].runs) == 3 and night.sigma
