"""The learn path: each script prints what its page shows, with torch alone, and pages and notebooks are the scripts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sources import ROOT, tool

LESSONS = list(tool("learn").LESSONS)
SCRIPTS = [*(ROOT / "examples" / "learn" / f"{name}.py" for name in LESSONS), ROOT / "examples" / "first_steps.py"]

ALONE = """
import runpy, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Nothing())
runpy.run_path({script!r}, run_name="__main__")
"""
EXTRAS = ("trl", "transformers", "datasets", "yaml", "matplotlib", "rich", "jinja2", "numpy", "scipy")


def shown(name: str) -> str:
    """The page of a lesson."""
    return (ROOT / "docs" / "learn" / f"{name}.md").read_text()


def code_of(script: Path) -> list[str]:
    """The pieces of code of a script, split as editors and Jupytext do."""
    pieces = [piece.split("\n", 1) for piece in script.read_text().split("# %%")[1:]]
    return [body.strip("\n") for head, body in pieces if "markdown" not in head]


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_prints_what_its_page_shows(name, tmp_path):
    """In a fresh folder, without the packages that the page does not tell the reader to install."""
    needs = re.search(r"You\s+need\s+`pip\s+install\s+([^`]+)`", shown(name))[1].split()
    assert needs[0] == "bandpo" and needs == tool("learn").LESSONS[name].split()
    blocked = [package for package in EXTRAS if package not in needs and not ("scipy" in needs and package == "numpy")]
    program = ALONE.format(blocked=tuple(blocked), script=str(ROOT / "examples" / "learn" / f"{name}.py"))
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "".join(re.findall(r"```text\n(.*?)```", shown(name), re.DOTALL))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LESSONS)
def test_the_code_of_a_page_is_all_to_be_seen(name):
    """A window of 1280 pixels shows 86 columns of code; examples/learn/ruff.toml has the formatter keep to them."""
    code = "\n".join(re.findall(r"```(?:python|text)\n(.*?)\n```", shown(name), re.DOTALL))
    assert [line for line in code.splitlines() if len(line) > 86] == []


@pytest.mark.parametrize("name", LESSONS)
def test_the_page_is_the_script(name):
    """If it fails: `python tools/learn.py --only NAME`."""
    made, page = tool("learn"), shown(name)
    assert re.findall(r"```python\n(.*?)\n```", page, re.DOTALL) == code_of(made.script(name))
    printed = re.findall(r"```python\n.*?\n```(?:\n\n```text\n(.*?)\n```)?", page, re.DOTALL)
    outputs = ["" if cell.kind == "text" else printed.pop(0) for cell in made.cells(made.script(name))]
    assert made.page(name, outputs, made.repository()) == page
    exercise = page.partition("\n## Exercise\n")[2]
    assert exercise.count("<details") == page.count("<details") == 1  # the solution is hidden, and after the exercise


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_the_script(script):
    """If it fails: `python tools/learn.py`."""
    made = tool("learn")
    lesson = script.stem in LESSONS
    path = ROOT / "docs" / "learn" / f"{script.stem}.ipynb" if lesson else script.with_suffix(".ipynb")
    text = path.read_text()
    assert text == made.notebook(script, made.LESSONS[script.stem] if lesson else made.FIRST_STEPS[1])
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"]) and cell["cell_type"] in ("code", "markdown")
        assert (cell["cell_type"] == "markdown") or (cell["outputs"] == [] and cell["execution_count"] is None)
    codes = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "pip" in codes[0]
    asked = [code for code in codes[1:] if code != "# Your answer:"]
    assert [code.removeprefix("# @title Solution\n") for code in asked] == code_of(script)
    hidden = [cell for cell in notebook["cells"] if cell["metadata"]]
    assert len(hidden) == lesson and all("Solution" in cell["source"][0] for cell in hidden)


def test_the_lessons_are_in_order_and_lead_to_each_other():
    pages = [shown(name) for name in LESSONS]
    for i, page in enumerate(pages, 1):
        assert re.search(rf"^# {i}\. ", page, re.MULTILINE)
    for page, after in zip(pages, LESSONS[1:], strict=False):
        assert f"]({after}.md).\n" in page.rpartition("Next: ")[2]
    listed = re.findall(r": learn/(\w+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert (
        listed
        == LESSONS
        == [p.stem for p in sorted((ROOT / "examples" / "learn").glob("*.py"), key=lambda p: LESSONS.index(p.stem))]
    )


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("", None),
        ("https://example.org/team/bandpo", None),  # Colab reads GitHub alone
        ("https://github.com/team/bandpo", "github/team/bandpo/blob/main/docs/learn/loss.ipynb"),
        ("https://github.com/team/bandpo.git", "github/team/bandpo/blob/main/docs/learn/loss.ipynb"),
    ],
)
def test_a_badge_needs_an_address(address, found):
    made = tool("learn")
    badge = made.badge("loss", address)
    if found is None:
        assert badge == ""
    else:
        assert f"https://colab.research.google.com/{found})" in badge
        assert (ROOT / "docs" / "learn" / made.BADGE).exists()
    page = made.page("loss", [""] * len(made.cells(made.script("loss"))), address)
    assert ("colab" in page) == (found is not None)


def test_an_unknown_mark_is_refused(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text("# %% solutoin\nprint(1)\n")
    with pytest.raises(ValueError, match=r"wrong\.py: a piece is marked 'solutoin'; use nothing, \[markdown\] or"):
        tool("learn").cells(script)
