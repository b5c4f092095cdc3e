"""The house's plan: packages in one direction of imports, lazy imports included, and each name on disk in one place."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab.__main__ import COMMANDS
from lab.store import names

ROOT = Path(__file__).resolve().parent.parent
# room -> rooms whose modules it may import, besides its own
ALLOWED = {
    "base": set(),
    "store": {"base"},
    "analysis": {"base", "store"},
    "share": {"base", "store", "analysis"},
    "loop": {"base", "store", "analysis", "share"},
    "queue": {"base", "store", "analysis", "share", "loop", "keeper"},
    "machine": {"base", "store"},
    "verify": {"base", "store", "analysis", "share"},
    "charts": {"base", "store", "analysis", "share"},
    "web": {"base", "store", "analysis", "share", "loop", "verify", "charts"},
    "keeper": {"base", "store", "analysis", "share", "loop", "verify", "machine"},
    "fleet": {"base", "store", "analysis", "share", "loop", "verify", "machine", "keeper"},
}
CORE = {  # top-level module -> those of the core that it may import
    "constants": set(),
    "corpus": {"constants"},
    "frozen": {"constants", "corpus"},
    "prepare": {"constants", "corpus", "frozen"},
    "train": {"constants", "prepare"},
    "lab": {"constants", "corpus", "frozen", "prepare"},
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for path in [*ROOT.glob("*.py"), *(path for room in ("corpus", "frozen", "lab") for path in (ROOT / room).rglob("*.py"))]
}


def imported(path):
    """Names of our own modules that the file imports, anywhere in it; those of strings with code in them too."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            found |= set(re.findall(r"^(?:from|import) ((?:lab|corpus|frozen|prepare|constants|train)\b[\w.]*)", node.value, re.M))
    whole = set()
    for name in found:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        whole |= {name} - {""}
    return whole


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def test_rooms_import_in_one_direction():
    for name, targets in IMPORTS.items():
        if not name.startswith("lab.") or name.count(".") < 2:
            continue
        room = name.split(".")[1]
        used = {target.split(".")[1] for target in targets if target.startswith("lab.")} - {room}
        assert used <= ALLOWED[room], f"{name} imports {used - ALLOWED[room]}, which are not below {room}"


def test_the_core_imports_in_one_direction():
    for name, targets in IMPORTS.items():
        top = name.split(".")[0]
        used = {target.split(".")[0] for target in targets} & CORE.keys() - {top}
        assert top not in CORE or used <= CORE[top], f"{name} imports {used - CORE[top]}"


def test_no_circle_of_imports():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for target in sorted(IMPORTS[name]):
            if target != name and not (path and target == name.rpartition(".")[0]):  # its own package
                visit(target)
        done.add(path.pop())

    for name in IMPORTS:
        visit(name)


def test_every_room_is_known_and_lab_itself_holds_only_its_command_line():
    assert {path.name for path in (ROOT / "lab").glob("*.py")} <= {"__init__.py", "__main__.py"}
    rooms = {path.name for path in (ROOT / "lab").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == ALLOWED.keys()
    for init in (ROOT / "lab").rglob("__init__.py"):
        body = ast.parse(init.read_text()).body
        assert all(isinstance(node, ast.Expr) for node in body), f"{init} does something on import"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_a_module_of_its_name(command):
    assert f"lab.{COMMANDS[command]}.{command}" in MODULES


def test_a_name_on_disk_is_written_once():
    """The names in store/names.py occur as literals nowhere else in lab/."""
    values = {v for k, v in vars(names).items() if k.isupper() and isinstance(v, str) and ("." in v or "/" in v)}
    assert {"run.log", ".lab", "results.tsv", "runs.jsonl"} <= values
    for name, path in MODULES.items():
        if not name.startswith("lab.") or name == "lab.store.names":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in values:
                pytest.fail(f"{path}:{node.lineno}: {node.value!r} is named in lab/store/names.py")


def test_nothing_heavy_is_imported_by_importing_a_room():
    light = [name for name in MODULES if re.match(r"lab\.(base|store|analysis|share|loop)\b", name)]
    code = f"import sys\nfor name in {light!r}: __import__(name)\nprint(sorted(m for m in sys.modules if m in "
    code += "('torch', 'prepare', 'train', 'numpy', 'pandas', 'matplotlib', 'scipy')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_documents_link_to_is_in_git():
    """.gitignore leaves out the pictures and tables of a night, which docs/ shows: they are there, and not in a clone."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    tracked, links = {ROOT / name for name in listed.stdout.splitlines()}, 0
    for path in sorted(path for path in tracked if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#:\s]+)\)", path.read_text(encoding="utf-8")):
            links += 1
            assert (path.parent / target).resolve() in tracked, f"{path.name} links to {target}, which git does not have"
    assert links > 10
