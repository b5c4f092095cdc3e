"""analysis.ipynb runs from top to bottom on any results.tsv that a night, or another harness, leaves behind.

In one kernel, through nbclient: what it shows of each kind. In fresh processes, as a script: that it is whole.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from fakenight import ROOT, FakeNight
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from lab.charts import notebook

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
NIGHT = (
    HEADER
    + "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\n"
    + "b2c3d4e\t0.993200\t44.2\tkeep\tcosts $5 and _more_ \"quotes\" <b onclick='x'>\n"
    + "c3d4e5f\t1.005000\t44.0\tdiscard\tGeLU\n"
    + "d4e5f60\t0.000000\t0.0\tcrash\ttwice the width\n"
    + "e5f6071\t0.991000\t44.0\tkeep\tbatch 2**18\n"
)
BY_HAND = "\ufeffdescription\tCommit\tval_bpb\tmemory_gb\tstatus\r\n" + "\r\n".join(
    [
        "first\ta1b2c3d\t1.5\t44\tOK",
        "no number\tb2c3d4e\tgood\t44 GB\tok",
        "",
        "half a row\tc3",
        "best\td4\t1.25\t\tKEEP",
    ]
)
KINDS = {
    "by hand": BY_HAND,
    "only crashes": HEADER + "a1b2c3d\t0.000000\t0.0\tcrash\tout of memory\n" * 3,
    "one row": HEADER + "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\n",
    "empty": "",
    "missing": None,
    "a night without runs.jsonl": NIGHT,
}
MINUTE = 60


def prepare(folder, results):
    """A folder that is to the notebook what the root of a checkout is."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "analysis.ipynb", folder)
    os.symlink(ROOT / "lab", folder / "lab")
    if results is not None:
        (folder / "results.tsv").write_bytes(results if isinstance(results, bytes) else results.encode())
    return folder


def recorded(folder):
    """This project's kind, by lab record itself: a night with runs.jsonl, of which a run began every 9 minutes."""
    night = FakeNight(folder)
    night.baseline()
    night.close_call("a close call", seconds=150.0)
    night.run(1.001, seed=43, seconds=150.0)
    night.recorded()
    night.experiment("wider", 0.99)
    night.change_train()
    night.commit("too wide")
    night.run(tail="RuntimeError: out of memory\n")
    night.recorded("too wide")
    with open(folder / "runs.jsonl") as f:
        records = [json.loads(line) for line in f]
    for i, record in enumerate(records):
        begin = 9 * i
        record["start"], record["end"] = (
            f"2026-11-21T{m // MINUTE:02d}:{m % MINUTE:02d}:00+00:00" for m in (begin, begin + 6)
        )
    (folder / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return prepare(folder, None)


class Shown:
    """What an executed notebook shows: by the id of its cell the text, the HTML, the pictures."""

    def __init__(self, cells):
        self.text, self.html, self.pictures = {}, {}, {}
        for cell in cells:
            for output in cell.get("outputs", []):
                assert output["output_type"] != "stream" or output["name"] == "stdout", output["text"]
                data = output.get("data", {})
                text = output.get("text", data.get("text/plain", ""))
                self.text[cell["id"]] = self.text.get(cell["id"], "") + text
                self.html[cell["id"]] = data.get("text/html", "")
                if "image/png" in data:
                    self.pictures[cell["id"]] = base64.b64decode(data["image/png"])


@pytest.fixture(scope="module")
def kernel():
    """execute(folder) -> Shown, all in one kernel, which is emptied and sent to the folder each time."""
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        with client.setup_kernel():

            def execute(folder):
                book = nbformat.read(folder / "analysis.ipynb", as_version=4)
                nbformat.validate(book)
                go = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(folder)!r})")
                client.nb = nbformat.v4.new_notebook(cells=[go, *book.cells])
                client.reset_execution_trackers()
                for i, cell in enumerate(client.nb.cells):
                    client.execute_cell(cell, i)
                return Shown(client.nb.cells[1:])

            yield execute


@pytest.fixture(scope="module")
def shown(kernel, tmp_path_factory):
    """Kind -> (folder, Shown)."""
    folders = {"recorded": recorded(tmp_path_factory.mktemp("recorded") / "tree")}
    for kind, results in KINDS.items():
        folders[kind] = prepare(tmp_path_factory.mktemp("night"), results)
    before = {kind: sorted(p.name for p in folder.iterdir()) for kind, folder in folders.items()}
    found = {kind: (folder, kernel(folder)) for kind, folder in folders.items()}
    for kind, folder in folders.items():
        new = sorted({p.name for p in folder.iterdir()} - set(before[kind]))
        assert new == ["progress.png"], f"{kind}: the notebook left {new}"
    return found


ALL = ["recorded", *KINDS]


@pytest.mark.parametrize("kind", ALL)
def test_every_section_shows_something_and_the_picture_that_is_saved(shown, kind):
    folder, out = shown[kind]
    sections = {"load", "progress", "experiments-table", "gains-table", "effort-table", "curves-picture", "memory-picture", "pace-line"}
    assert set(out.text) == sections
    assert out.pictures["progress"] == (folder / "progress.png").read_bytes()
    assert len(out.pictures["progress"]) > 20_000 and out.pictures["memory-picture"].startswith(b"\x89PNG")


def test_a_recorded_night_is_told_with_its_noise_and_its_time(shown):
    _, out = shown["recorded"]
    lines = out.text["load"].splitlines()
    assert lines[:3] == [
        "5 experiments: 2 keep, 2 discard, 1 crash",
        "kept: 1 of 4 after the baseline (25%)",
        "baseline: 1.000000 (row 1, the first that is not a crash)",
    ]
    assert lines[3].startswith("best: 0.990000 (row 4, ") and "), 0.010000 = " in lines[3]
    assert lines[4].startswith("noise of one run: σ 0.00")
    assert out.text["gains-table"].splitlines()[0] == "1 gain over the best before"
    head, _, row = out.text["gains-table"].splitlines()[1:]
    assert head.split() == ["commit", "val_bpb", "gain", "in", "σ", "description"]
    assert row.split()[0] == "4" and row.split()[2:4] == ["0.99", "0.01"] and row.endswith("wider")
    assert out.text["effort-table"].splitlines()[0] == (
        "1 gain, each at the cost of 3.0 experiments and 15 minutes of training; 1 experiment since the last"
    )
    assert out.text["effort-table"].splitlines()[3].split() == ["4", "3", "15", "0.01", "wider"]
    # 8 runs from 0:00 to 1:09; 5 of them of five minutes and 2 of half of that
    assert out.text["pace-line"].strip() == (
        "4.3 experiments an hour: 5 experiments in 8 runs and 1.15 hours, of which 43% was training"
    )


def test_another_harness_is_read_with_its_own_words_and_what_is_left_out_is_said(shown):
    _, out = shown["by hand"]
    assert out.text["load"].splitlines() == [
        "note: line 5: 2 of 5 fields; left out",
        "3 experiments: 1 keep, 2 ok",
        "kept: 1 of 2 after the baseline (50%)",
        "baseline: 1.500000 (row 1, the first that is not a crash)",
        "best: 1.250000 (row 3, d4), 0.250000 below the baseline; it is the lowest kept value, as runs.jsonl has no runs "
        "to estimate from",
        "noise of one run: not known, because runs.jsonl has no repeated run",
    ]
    assert out.text["gains-table"].splitlines()[-1].split() == ["3", "d4", "1.25", "0.25", "best"]
    assert "1 gain, each at the cost of 2.0 experiments; 0 experiments since" in out.text["effort-table"]
    assert "not known" in out.text["pace-line"]


def test_a_crash_is_never_the_best_value(shown):
    _, out = shown["a night without runs.jsonl"]
    assert "5 experiments: 3 keep, 1 discard, 1 crash" in out.text["load"]
    assert "best: 0.991000 (row 5, e5f6071), 0.006900 below the baseline" in out.text["load"]
    rows = [line.split()[:4] for line in out.text["gains-table"].splitlines()[3:]]
    assert rows == [["2", "b2c3d4e", "0.9932", "0.0047"], ["5", "e5f6071", "0.9910", "0.0022"]]
    rows = [line.split()[:3] for line in out.text["effort-table"].splitlines()[3:]]
    assert rows == [["2", "1", "0.0047"], ["5", "3", "0.0022"]]


def test_only_crashes_one_row_and_none_say_so(shown):
    crashes, one = shown["only crashes"][1].text, shown["one row"][1].text
    assert crashes["load"].splitlines() == [
        "3 experiments: 3 crash", "kept: 0 of 3 after the baseline (0%)", "no experiment has a value yet",
    ]  # fmt: skip
    assert one["load"].splitlines()[:2] == [
        "1 experiment: 1 keep", "baseline: 0.997900 (row 1, the first that is not a crash)",
    ]  # fmt: skip
    for kind in ("empty", "missing"):
        assert shown[kind][1].text["load"].strip() == "0 experiments: results.tsv is missing or empty"
    for kind in ("only crashes", "one row", "empty", "missing"):
        assert shown[kind][1].text["gains-table"].splitlines()[0] == "no experiment has gained anything yet"
        assert shown[kind][1].text["effort-table"].startswith("no gain yet in ")


def test_a_description_is_text_in_the_tables_too(shown):
    for table in ("gains-table", "experiments-table"):
        html = shown["a night without runs.jsonl"][1].html[table]
        assert """costs $5 and _more_ "quotes" &lt;b onclick='x'&gt;</td>""" in html
        assert "<b" not in html and "mathjax_ignore" in html
        assert html.count("<tr>") == {"gains-table": 3, "experiments-table": 6}[table]  # the names of the index too


def test_the_tables_are_data_frames_to_go_on_with(tmp_path, capsys):
    prepare(tmp_path / "night", NIGHT)
    night = notebook.load(tmp_path / "night")
    frame = notebook.experiments(night)
    assert list(frame.index) == [1, 2, 3, 4, 5] and frame.index.name == "row"
    assert list(frame.columns) == ["commit", "val_bpb", "best", "memory_gb", "status", "runs", "minutes", "description"]
    assert frame.val_bpb.dtype == frame.minutes.dtype == float and frame.isna().val_bpb[4]  # a crash has no value
    assert frame.val_bpb.min() == 0.991 and frame.val_bpb.count() == 4
    assert list(frame.best) == [0.9979, 0.9932, 0.9932, 0.9932, 0.991]
    assert frame.groupby("status").size().to_dict() == {"crash": 1, "discard": 1, "keep": 3}
    assert frame.description[2] == "costs $5 and _more_ \"quotes\" <b onclick='x'>"
    assert notebook.gains(night).gain.to_dict() == {2: 0.0047, 5: 0.0022}
    assert notebook.effort(night).experiments.to_dict() == {2: 1, 5: 3}
    out = capsys.readouterr().out.splitlines()
    assert out == ["2 gains over the best before",
                   "2 gains, each at the cost of 2.0 experiments; 0 experiments since the last"]  # fmt: skip


def test_a_recorded_night_has_its_runs_in_the_frame_and_an_estimate_of_its_best(tmp_path):
    recorded(tmp_path / "tree")
    night = notebook.load(tmp_path / "tree")
    frame = notebook.experiments(night)
    assert list(frame.runs) == [3, 1, 2, 1, 1] and list(frame.minutes[:4]) == [15.0, 5.0, 5.0, 5.0]
    assert night.by_estimate and "lowest kept value" not in notebook.outcomes(night)


@pytest.mark.parametrize(
    "results, needle",
    [("a\tb\n1\t2\n", "there is no column commit"), (b"\x89PNG\r\n\x1a\n\0\0", "binary"), ("folder", "is not a file")],
)
def test_a_wrong_file_is_one_sentence_and_nothing_is_drawn(kernel, tmp_path, results, needle):
    folder = prepare(tmp_path / "night", None if results == "folder" else results)
    if results == "folder":
        (folder / "results.tsv").mkdir()
    with pytest.raises(CellExecutionError) as failed:
        kernel(folder)
    assert needle in failed.value.traceback and "results.tsv" in failed.value.traceback
    shown = failed.value.traceback.split("------------------")[-1].strip().splitlines()
    assert len(shown) == 1, shown
    assert not (folder / "progress.png").exists()


def test_a_picture_that_cannot_be_saved_is_one_sentence(kernel, tmp_path):
    folder = prepare(tmp_path / "night", NIGHT)
    (folder / "progress.png").mkdir()
    with pytest.raises(CellExecutionError, match="progress.png is not written"):
        kernel(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["analysis.ipynb", "lab", "progress.png", "results.tsv"]


def test_in_a_fresh_process_from_the_root_of_a_checkout(tmp_path):
    folder = prepare(tmp_path / "night", NIGHT)
    cells = json.loads((folder / "analysis.ipynb").read_text())["cells"]
    source = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "5 experiments" in done.stdout and (folder / "progress.png").stat().st_size > 20_000


def test_it_is_stored_without_outputs_and_only_calls_and_shows():
    book = json.loads(Path(ROOT / "analysis.ipynb").read_text())
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert len(cell["source"].splitlines()) <= 7
            assert not any(line.split()[:1] in (["def"], ["for"], ["if"]) for line in cell["source"].splitlines())
