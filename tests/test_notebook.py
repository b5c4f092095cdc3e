"""analysis.ipynb runs from top to bottom on any results.tsv that a night, or another harness, leaves behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
NIGHTS = {
    "missing": None,
    "empty": "",
    "header only": HEADER,
    "one row": HEADER + "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\n",
    "only crashes": HEADER + "a1b2c3d\t0.000000\t0.0\tcrash\tout of memory\n" * 3,
    "a night": HEADER
    + "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\n"
    + "b2c3d4e\t0.993200\t44.2\tkeep\tcosts $5 and _more_ \"quotes\"\n"
    + "c3d4e5f\t1.005000\t44.0\tdiscard\tGeLU\n"
    + "d4e5f60\t0.000000\t0.0\tcrash\ttwice the width\n"
    + "e5f6071\t0.991000\t44.0\tkeep\tbatch 2**18\n",
    "by hand": HEADER + "a1b2c3d\tgood\t44\tok\tno number\n" + "b2c3d4e\t0.9\t1.0\tkeep\tfine\n",
}


def run_cells(folder):
    """Executes the notebook's code in a fresh process, as nbclient would, without its seconds of start-up."""
    cells = json.loads((ROOT / "analysis.ipynb").read_text())["cells"]
    source = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")
    source = "import matplotlib; matplotlib.use('Agg')\n" + source + "\nprint('GAINS', gains.to_json())\n"
    return subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("night", NIGHTS)
def test_every_kind_of_results(night, tmp_path):
    if NIGHTS[night] is not None:
        (tmp_path / "results.tsv").write_text(NIGHTS[night])
    done = run_cells(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "progress.png").stat().st_size > 5000


def test_a_crash_is_never_the_best_value(tmp_path):
    (tmp_path / "results.tsv").write_text(NIGHTS["a night"])
    out = run_cells(tmp_path).stdout
    assert "5 experiments: 3 keep, 1 discard, 1 crash" in out
    assert "baseline 0.997900, best kept 0.991000: +0.006900" in out
    gains = json.loads(out.split("GAINS ")[1])["gain"]
    assert gains["2"] == pytest.approx(0.0047) and gains["5"] == pytest.approx(0.0022)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "results.tsv").write_text("a\tb\n1\t2\n")
    done = run_cells(tmp_path)
    assert done.returncode == 1 and "is this a results.tsv?" in done.stderr


@pytest.mark.slow
def test_the_notebook_itself_executes(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    shutil.copy(ROOT / "analysis.ipynb", tmp_path)
    (tmp_path / "results.tsv").write_text(NIGHTS["a night"])
    notebook = nbformat.read(tmp_path / "analysis.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "progress.png").exists()
