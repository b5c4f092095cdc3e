"""deploy/: linters find nothing, and Dockerfile, Apptainer definition, manifests and scripts say the same.

What they build and start is tried in test_containers.py and test_slurm_cluster.py.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DOCKERFILE, APPTAINER = (DEPLOY / "Dockerfile").read_text(), (DEPLOY / "apptainer.def").read_text()


def said(*command, **kwargs):
    """(exit status, all that a command prints)"""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    return done.returncode, done.stdout


def instructions(stage=None):
    """(word, rest) of each instruction of the Dockerfile, or of one stage and those it stands on."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found, stages, parents = [line.split(None, 1) for line in text.splitlines() if line.strip()], {}, {}
    name = ""
    for word, rest in found:
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            parents[name] = base
        stages.setdefault(name, []).append((word, rest))
    if stage is None:
        return [tuple(line) for line in found]
    return (instructions(parents[stage]) if parents[stage] in stages else []) + stages[stage]


def section(name):
    """The lines of a section of the Apptainer definition."""
    return re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", APPTAINER, re.MULTILINE | re.DOTALL)[1]


def manifests(kind=None):
    found = [(path.name, m) for path in MANIFESTS for m in yaml.safe_load_all(path.read_text())]
    return [(name, m) for name, m in found if kind in (None, m["kind"])]


def pods():
    """{name of the workload: (labels, spec of its pod)}"""
    specs = {}
    for _, m in manifests():
        if m["kind"] == "Pod":
            specs[m["metadata"]["name"]] = (m["metadata"]["labels"], m["spec"])
        elif m["kind"] in ("Job", "Deployment"):
            template = m["spec"]["template"]
            specs[m["metadata"]["name"]] = (template["metadata"]["labels"], template["spec"])
    return specs


# --- linters ------------------------------------------------------------------


def test_hadolint_finds_nothing():
    assert said(BIN / "hadolint", DEPLOY / "Dockerfile") == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_and_the_script_can_be_started(script):
    assert said(BIN / "shellcheck", "-x", script) == (0, "")
    assert os.access(script, os.X_OK) or script.name == "site.sh", "it is called by its name"


def test_the_manifests_are_valid_to_the_letter():
    code, text = said(BIN / "kubernetes-validate", "--strict", *MANIFESTS)
    assert code == 0 and text.count(" passed ") == len(manifests()) >= 10, text


def test_the_linters_would_find_something(tmp_path):
    """Or a linter that does not run would pass for a clean one."""
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\n")
    (tmp_path / "x.sh").write_text("#!/bin/sh\nrm $1\n")
    pod = (DEPLOY / "kubernetes" / "pod.yaml").read_text().replace("runAsNonRoot:", "runAsNonRoots:")
    (tmp_path / "pod.yaml").write_text(pod)
    assert said(BIN / "hadolint", tmp_path / "Dockerfile")[0] and said(BIN / "shellcheck", tmp_path / "x.sh")[0]
    assert said(BIN / "kubernetes-validate", "--strict", tmp_path / "pod.yaml")[0]


# --- Dockerfile and Apptainer agree -------------------------------------------


def test_what_is_copied_is_there_and_reaches_the_build():
    allowed = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]}
    tracked = set(said("git", "ls-files")[1].split()) if (ROOT / ".git").exists() else None
    for name in copied:
        assert (ROOT / name).exists(), f"{name} is not there"
        assert tracked is None or name in tracked or any(t.startswith(f"{name}/") for t in tracked), name
    assert copied == allowed, "what the ignore file lets through is what is copied"
    assert {"results.tsv", "runs", ".venv", ".git"} & copied == set()


def test_every_file_that_a_training_and_lab_import_is_in_the_image():
    copied = {name for word, rest in instructions("train") if word == "COPY" for name in rest.split()[:-1]}
    assert {*conftest.CORE_FILES, "uv.lock", ".python-version"} - {".gitignore"} <= copied | {".gitignore"}


def test_apptainer_says_what_the_dockerfile_says():
    args = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)
    assert f"From: {args['BASE']}\n" in APPTAINER and f"UV={args['UV']}\n" in section("arguments")
    docker = " ".join(rest for word, rest in instructions("train") if word == "RUN")
    post = section("post").replace("\\\n", " ")
    packages = [re.search(r"--no-install-recommends\s+(.*?)\s*(?:&&|\n)", text)[1].split() for text in (docker, post)]
    assert packages[0] == packages[1] and {"g++", "git", "python3-dev", "ca-certificates"} <= set(packages[0])
    for same in ("uv sync --frozen --no-dev", "useradd --uid 1000", "install -d -o 1000 -g 1000 /data /work"):
        assert same in docker and same in post, same
    copied = {name for word, rest in instructions("train") if word == "COPY" for name in rest.split()[:-1]}
    assert {line.split()[0] for line in section("files").strip().splitlines()} == copied
    env = dict(
        pair.split("=", 1) for word, rest in instructions("train") if word == "ENV" for pair in shlex.split(rest)
    )
    theirs = dict(re.findall(r"(\w+)=(?:\$\{\w+:-)?([^\s}]+)", section("environment")))
    assert env.pop("HOME") == "/work/home", "with Apptainer it is the user's, or the task's"
    assert theirs == env


def test_python_is_the_one_that_the_repository_is_pinned_to():
    version = (ROOT / ".python-version").read_text().strip()
    assert f"UV_PYTHON=/usr/bin/python{version}" in DOCKERFILE, "Debian 12 has Python 3.11; another base, another one"


@pytest.mark.parametrize("target", ["train", "dashboard"])
def test_no_image_runs_as_root_or_keeps_results_in_itself(target):
    lines = instructions(target)
    assert [rest for word, rest in lines if word == "USER"] == ["1000"]
    assert lines.index(("USER", "1000")) > max(i for i, (word, _) in enumerate(lines) if word in ("RUN", "COPY"))
    volumes = {"train": '["/data", "/work"]', "dashboard": "/work"}
    assert ("VOLUME", volumes[target]) in lines


def test_the_training_image_is_the_one_that_is_built_by_default_and_the_dashboard_is_asked_for_its_health():
    assert [rest for word, rest in instructions() if word == "FROM"][-1].endswith(" AS train")
    (health,) = [rest for word, rest in instructions("dashboard") if word == "HEALTHCHECK"]
    port = re.search(r'"--port", "(\d+)"', DOCKERFILE)[1]
    assert f"http://127.0.0.1:{port}/health" in health and ("EXPOSE", port) in instructions("dashboard")


# --- Kubernetes ---------------------------------------------------------------


@pytest.mark.parametrize("name", pods())
def test_every_pod_is_without_root_privilege_and_a_writable_root(name):
    _, spec = pods()[name]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["fsGroup"] == 1000, "or the volumes belong to root"
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    claims = {m["metadata"]["name"] for _, m in manifests("PersistentVolumeClaim")}
    for volume in spec["volumes"]:
        assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims} and "hostPath" not in volume
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert {"cpu", "memory"} <= limits.keys() and limits.keys() == requests.keys()
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in spec["volumes"]} and mounts["tmp"]["mountPath"] == "/tmp"
        gpu = limits.get("nvidia.com/gpu")
        assert gpu == ("1" if name in ("train", "autoresearch") else None)
        if gpu:
            assert mounts["data"].get("readOnly"), "a training only reads the data"
        if name == "dashboard":
            assert mounts["work"].get("readOnly")


def test_training_reaches_nothing_and_only_preparing_downloads():
    policies = [m["spec"] for _, m in manifests("NetworkPolicy")]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies, "nothing, unless another one says so"
    out = [p["podSelector"]["matchLabels"] for p in policies if p.get("egress")]
    assert out == [{"app.kubernetes.io/component": "prepare"}]
    components = {name: labels["app.kubernetes.io/component"] for name, (labels, _) in pods().items()}
    assert components == {"autoresearch": "train", "train": "train", "prepare": "prepare", "dashboard": "dashboard"}


def test_probes_service_policy_and_image_speak_of_one_port():
    _, spec = pods()["dashboard"]
    (container,) = spec["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    ((_, service),) = manifests("Service")
    numbers = {container["ports"][0]["containerPort"], service["spec"]["ports"][0]["port"]}
    policy = next(m for _, m in manifests("NetworkPolicy") if m["metadata"]["name"] == "dashboard-answers")
    numbers |= {policy["spec"]["ingress"][0]["ports"][0]["port"], int(re.search(r"EXPOSE (\d+)", DOCKERFILE)[1])}
    assert len(numbers) == 1
    assert service["spec"]["selector"].items() <= pods()["dashboard"][0].items()


def test_a_preempted_training_runs_again_and_a_crash_does_not():
    job = next(m for _, m in manifests("Job") if m["metadata"]["name"] == "train")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = {tuple(r["onExitCodes"]["values"]): r["action"] for r in rules if "onExitCodes" in r}
    assert codes == {(75,): "Ignore", (1,): "FailJob"}
    from constants import GRACE, TIME_BUDGET

    assert job["spec"]["activeDeadlineSeconds"] > TIME_BUDGET + 2 * GRACE


# --- scripts ------------------------------------------------------------------


def test_the_entry_makes_a_checkout_once_and_runs_the_command_in_it(tmp_path):
    work = tmp_path / "work"
    env = os.environ | {
        "AUTORESEARCH_TREE": str(work / "tree"),
        "HOME": str(work / "home"),
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    code = tmp_path / "code"
    (code / "deploy").mkdir(parents=True)
    (code / "train.py").write_text("print('hello')\n")
    entry = code / "deploy" / "entrypoint.sh"
    entry.write_bytes((DEPLOY / "entrypoint.sh").read_bytes())
    entry.chmod(0o755)
    status, text = said(entry, "sh", "-c", "pwd; git log --format=%s; ls; exit 7", env=env)
    assert (status, text.split("\n")[:2]) == (7, [str(work / "tree"), "the code of the image"]), text
    (work / "tree" / "train.py").write_text("print('edited')\n")
    assert said(entry, sys.executable, "train.py", env=env) == (0, "edited\n"), "a tree that is there is left alone"
    assert sorted(p.name for p in work.iterdir()) == ["home", "tree"]


def test_the_example_for_slurm_names_files_and_options_that_exist():
    text = "\n".join(path.read_text() for path in (DEPLOY / "slurm").glob("*.sh"))
    for name in set(re.findall(r"deploy/slurm/[\w.-]+", text)):
        assert (ROOT / name).exists(), name
    usage = said(sys.executable, "-m", "lab", "slurm", "--help")[1]
    for option in ("--tag", "--hours", "--agent", "--programs", "--partition", "--account"):
        assert option in usage and option in text
    readme = (DEPLOY / "README.md").read_text()
    for name in set(re.findall(r"`((?:deploy|lab|agents|programs)/[\w./-]+\w)`", readme)):
        assert (ROOT / name).exists(), name
    for path in [*SCRIPTS, *MANIFESTS, DEPLOY / "Dockerfile", DEPLOY / "apptainer.def"]:
        assert path.name in readme, f"deploy/README.md does not say what {path.name} is for"


def test_array_sh_hands_tag_hours_agent_and_programs_to_lab_slurm(tmp_path):
    (tmp_path / "uv").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "uv").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SCRATCH": str(tmp_path), "ACCOUNT": "a b"}
    status, text = said(
        DEPLOY / "slurm" / "array.sh", "nov21", "8", "an 'agent' $X", "a.md", "b c.md", "--", "--submit", env=env
    )
    assert (status, text.splitlines()) == (0, [
        "run", "--no-sync", "-m", "lab", "slurm", "--tag", "nov21", "--hours", "8", "--agent", "an 'agent' $X",
        "--programs", "a.md", "b c.md", "--partition", "gpu", "--account", "a b", "--submit",
    ])  # fmt: skip


def test_what_is_left_out_fails_in_ci_and_is_skipped_elsewhere(monkeypatch):
    monkeypatch.setattr(conftest, "MUST_RUN", False)
    with pytest.raises(pytest.skip.Exception, match="no slurm"):
        conftest.left_out("no slurm")
    monkeypatch.setattr(conftest, "MUST_RUN", True)
    with pytest.raises(pytest.fail.Exception, match="left out in CI: no slurm"):
        conftest.left_out("no slurm")
