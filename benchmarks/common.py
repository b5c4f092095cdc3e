"""What the benchmarks share: text of natural lengths, a copy of the code to run it through, a line in results.jsonl."""

import json
import os
import platform
import random
import re
import shutil
import subprocess
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
MEDIAN_CHARACTERS = 2600  # of a document; lengths are log-normal, as on the web


def natural_documents(seed, characters):
    """Yields texts of about so many characters in all: half code, half prose, from the standard library's sources.

    The sources are a few dozen MB and the benchmarks want hundreds, so each document gets some of its words
    replaced by made-up ones: without that the same chunks would come back and both BPE and caches would look good.
    """
    rng = random.Random(seed)
    code, prose = _sources()
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    while characters > 0:
        lines = rng.choice((code, prose))
        wanted = int(rng.lognormvariate(0, 1.0) * MEDIAN_CHARACTERS) + 20
        start = rng.randrange(len(lines))
        piece, length = [], 0
        while length < wanted:
            line = lines[start % len(lines)]
            piece.append(line)
            length += len(line)
            start += 1
        text = "".join(piece)[:wanted]
        for _ in range(1 + len(text) // 400):
            words = text[rng.randrange(len(text)) :][:200].split(None, 2)
            if len(words) > 1 and words[1].isalpha():
                made_up = "".join(rng.choice(syllables) for _ in range(rng.randint(2, 5)))
                text = text.replace(words[1], made_up, 4)
        characters -= len(text)
        yield text


def _sources():
    """(lines of code, lines of prose), in a fixed order: prose is what stands in docstrings and comments."""
    code, prose = [], []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        code += text.splitlines(keepends=True)
        for docstring in re.findall(r'"""(.{80,}?)"""', text, flags=re.DOTALL):
            prose += [line.strip() + "\n" for line in docstring.splitlines()]
    return code, prose


def write_shard(path, seed, characters):
    """A parquet file in climbmix's layout: zstd, a column `text`, row groups of 1,024 documents."""
    texts = list(natural_documents(seed, characters))
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1024, compression="zstd")


def copy_code(folder, eval_tokens=None):
    """A copy of the code in `folder`; with eval_tokens, one whose climbmix scores so many tokens."""
    for name in ("constants.py", "prepare.py"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "corpus", folder / "corpus")
    if eval_tokens:
        rules = (folder / "constants.py").read_text()
        rules, n = re.subn(r'("climbmix": .*eval_tokens=)[^,]+', rf"\g<1>{eval_tokens}", rules)
        assert n == 1, f"constants.py has {n} lines for climbmix's eval_tokens: expected 1"
        (folder / "constants.py").write_text(rules)


def hardware():
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2)}


def record(benchmark, result):
    """Appends one line to benchmarks/results.jsonl."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    packages = ("torch", "numpy", "pyarrow", "tiktoken", "rustbpe")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    line = {
        "benchmark": benchmark,
        "when": when,
        "commit": commit,
        "hardware": hardware(),
        "versions": versions,
    }
    with RESULTS.open("a") as f:
        f.write(json.dumps(line | result) + "\n")
