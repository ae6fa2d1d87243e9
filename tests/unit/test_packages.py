"""What `make packages` refuses: the checks of a wheel, an sdist and their metadata see what is missing and what is foreign.

Building, installing and running are `make packages` itself, which CI runs (.ci/run).
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bandpo
from sources import ROOT, tool

packages = tool("packages")
VERSION = packages.source_version()
INFO = f"bandpo-{VERSION}.dist-info"
ABOUT = [
    f"{INFO}/{x}" for x in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
]
METADATA = f"""Metadata-Version: 2.4
Name: bandpo
Version: {VERSION}
License-Expression: Apache-2.0
Requires-Python: >=3.10
Provides-Extra: trl
Provides-Extra: plot
Provides-Extra: lab
Provides-Extra: verl
Requires-Dist: torch>=2.6
Requires-Dist: trl<2,>=1.12; extra == 'trl'
"""


@pytest.fixture(scope="module")
def source():
    return packages.tracked()


def test_the_source_that_is_expected_is_what_git_knows(source):
    assert bandpo.__version__ == VERSION
    there = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/bandpo").rglob("*") if p.is_file()}
    assert source <= there and "bandpo/py.typed" in source and "bandpo/recipes/verl/train.sh" in source
    assert not any(re.search(packages.FOREIGN, name) for name in source)


def test_a_complete_wheel_has_no_fault(source):
    assert packages.faults_of_wheel([*source, *ABOUT], source, VERSION) == []


@pytest.mark.parametrize("name", ["bandpo/py.typed", "bandpo/recipes/trl/paper.yaml", "bandpo/surrogates/kernel.py"])
def test_a_wheel_without_a_file_of_the_source_is_refused(source, name):
    wrong = packages.faults_of_wheel([*(source - {name}), *ABOUT], source, VERSION)
    assert f"the wheel lacks {name}" in wrong


@pytest.mark.parametrize("what", packages.KINDS)
def test_a_kind_of_files_that_the_source_lost_is_missed_too(source, what):
    """A rename in the source changes what is expected; the kinds are named by hand."""
    left = {name for name in source if not re.fullmatch(packages.KINDS[what], name)}
    assert left < source
    assert packages.faults_of_wheel([*left, *ABOUT], left, VERSION) == [f"the wheel lacks {what}"]


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_x.py",
        "bandpo/tests/test_x.py",
        "bandpo/runs/a/report.html",
        "bandpo/bounds/__pycache__/band.pyc",
        "docs/x.md",
    ],
)
def test_a_foreign_file_in_a_wheel_is_refused(source, name):
    wrong = packages.faults_of_wheel([*source, name, *ABOUT], source, VERSION)
    assert wrong == [
        f"the wheel has {name}, which git does not know in src",
        f"the wheel has {name}, which belongs to no package",
    ]
    # and also if somebody committed it
    wrong = packages.faults_of_wheel([*source, name, *ABOUT], source | {name}, VERSION)
    assert wrong == [f"the wheel has {name}, which belongs to no package"]


@pytest.mark.parametrize("name", ABOUT)
def test_a_wheel_without_licence_or_metadata_is_refused(source, name):
    wrong = packages.faults_of_wheel([*source, *(x for x in ABOUT if x != name)], source, VERSION)
    assert wrong == [f"the wheel lacks {name}"]


def test_an_sdist_has_the_source_and_what_is_beside_it(source):
    top = f"bandpo-{VERSION}/"
    complete = [
        *(f"{top}src/{name}" for name in source),
        *(f"{top}{name}" for name in packages.BESIDE),
        f"{top}PKG-INFO",
    ]
    assert packages.faults_of_sdist(complete, source, VERSION) == []
    for name in packages.BESIDE:
        assert (ROOT / name).exists()
        left = [x for x in complete if x != top + name]
        assert packages.faults_of_sdist(left, source, VERSION) == [f"the sdist lacks {name}"]
    for name in ("tests/conftest.py", "docs/index.md", ".github/workflows/tests.yml"):
        assert packages.faults_of_sdist([*complete, top + name], source, VERSION) == [
            f"the sdist has {name}, which belongs to no package"
        ]
    assert packages.faults_of_sdist([*complete, "../evil"], source, VERSION) == [
        f"the sdist has ../evil, which is not below {top}"
    ]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (f"Version: {VERSION}", "Version: 9.9.9", f"the version is 9.9.9, and the source has {VERSION}"),
        ("torch>=2.6", "torch>=2.6\nRequires-Dist: numpy", "needs torch alone; it needs torch>=2.6, numpy"),
        ("Requires-Dist: torch>=2.6\n", "", "needs torch alone|need torch alone; it needs nothing"),
        ("Provides-Extra: lab\n", "", "the extra lab is missing"),
        (">=3.10", ">=3.11", "Requires-Python is >=3.11, expected >=3.10"),
        ("Apache-2.0", "MIT", "License-Expression is MIT, expected Apache-2.0"),
    ],
)
def test_wrong_metadata_are_refused(old, new, fault):
    assert packages.faults_of_metadata(METADATA, VERSION) == []
    (wrong,) = packages.faults_of_metadata(METADATA.replace(old, new, 1), VERSION)
    assert re.search(fault.replace("needs torch alone", "need torch alone"), wrong), wrong


def test_a_command_that_fails_is_told_with_what_it_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.delenv("BANDPO_CACHE", raising=False)
    code = "import os, sys; print(os.environ.get('PYTHONPATH'), os.environ.get('BANDPO_CACHE')); sys.exit(int(sys.argv[1]))"
    assert packages.run([sys.executable, "-c", code, "0"], cwd=tmp_path, cache=tmp_path) == f"None {tmp_path}\n"
    with pytest.raises(packages.Fault, match=r"(?s)ended with status 3, expected 0:\nNone None"):
        packages.run([sys.executable, "-c", code, "3"], cwd=tmp_path)
    with pytest.raises(packages.Fault, match="ended with status 0, expected 2"):
        packages.run([sys.executable, "-c", code, "0"], cwd=tmp_path, status=2)
    with pytest.raises(packages.Fault, match="expected 'x' in:\ny"):
        packages.expect("y", "x")


def test_the_loss_that_is_tried_runs_here(tmp_path):
    """The core install runs the same lines; this finds a mistake in them without an install."""
    command = [sys.executable, "-c", packages.LOSS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(done.stdout.splitlines()[0]) == Path(bandpo.__file__)
