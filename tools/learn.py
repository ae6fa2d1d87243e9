"""Writes the pages of the learn path and all notebooks from the scripts in examples/.

A script is split at its lines `# %%`: `# %% [markdown]` begins a text, `# %%` code, and `# %% solution` the code that solves
the exercise, which the page and the notebook hide until the reader asks for it. The page shows what each piece of code prints.

* `python tools/learn.py`: runs the scripts of examples/learn, half a minute, and writes docs/learn/NAME.md and NAME.ipynb,
  and the notebook of examples/first_steps.py.
* `python tools/learn.py --only NAME`: one lesson.
* `python tools/learn.py --check`: changes nothing; status 1 if a page or a notebook is out of date.
"""

import argparse
import hashlib
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:  # hatchling and pytest require it there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "learn"
BADGE = "../assets/open-in-colab.svg"

LESSONS = {
    "one_token": "bandpo",
    "rare_tokens": "bandpo",
    "loss": "bandpo",
    "acting": "bandpo",
    "own_region": "bandpo",
    "fair_comparison": "bandpo scipy",
}
"""The lessons in their order, each with what pip has to install for it."""
FIRST_STEPS = (ROOT / "examples" / "first_steps.py", "bandpo[plot]")


class Cell(NamedTuple):
    """A piece of a script."""

    kind: Literal["text", "code", "solution"]
    source: str
    """The text without its comment signs, or the code."""


def script(name: str) -> Path:
    """The script of a lesson."""
    return ROOT / "examples" / "learn" / f"{name}.py"


def cells(path: Path) -> list[Cell]:
    """The pieces of a script; what comes before the first `# %%` is left out.

    Args:
        path: The script.

    Raises:
        ValueError: If a piece is marked in a way that is not known.
    """
    kinds = {"": "code", "[markdown]": "text", "solution": "solution"}
    found: list[Cell] = []
    for piece in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        mark, _, body = piece.partition("\n")
        if mark.strip() not in kinds:
            raise ValueError(f"{path.name}: a piece is marked {mark.strip()!r}; use nothing, [markdown] or solution")
        kind = kinds[mark.strip()]
        body = body.strip("\n")
        if kind == "text":
            body = "\n".join(re.sub(r"^# ?", "", line) for line in body.splitlines())
        found.append(Cell(kind, body))  # pyright: ignore[reportArgumentType]
    return found


def run(path: Path) -> list[str]:
    """What each piece of a script prints; nothing for a text.

    Args:
        path: The script.
    """
    scope: dict[str, object] = {"__name__": "__main__"}
    printed: list[str] = []
    for cell in cells(path):
        out = io.StringIO()
        if cell.kind != "text":
            with redirect_stdout(out):
                exec(compile(cell.source, str(path), "exec"), scope)
        printed.append(out.getvalue().rstrip("\n"))
    return printed


def title(name: str) -> str:
    """The heading of a lesson."""
    return cells(script(name))[0].source.splitlines()[0].removeprefix("# ")


def repository() -> str:
    """The address of the repository, from tools/addresses.toml, which alone has it; empty as long as there is none."""
    path = ROOT / "tools" / "addresses.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["repository"] if path.exists() else ""


def badge(name: str, address: str) -> str:
    """The button that opens a lesson's notebook in Colab; empty without an address on GitHub, which is all that Colab reads.

    Args:
        name: The lesson.
        address: The address of the repository, or an empty text.
    """
    found = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(?:\.git)?/?", address)
    if not found:
        return ""
    target = f"https://colab.research.google.com/github/{found[1]}/blob/main/docs/learn/{name}.ipynb"
    return f"[![Open in Colab]({BADGE})]({target})"


def page(name: str, printed: list[str], address: str) -> str:
    """The page of a lesson.

    Args:
        name: The lesson.
        printed: What its pieces print, from `run`.
        address: The address of the repository, or an empty text.
    """
    parts = [f"<!-- made by tools/learn.py from examples/learn/{name}.py -->"]
    for i, (cell, out) in enumerate(zip(cells(script(name)), printed, strict=True)):
        code = f"```python\n{cell.source}\n```" + (f"\n\n```text\n{out}\n```" if out else "")
        if cell.kind == "text":
            head, _, rest = cell.source.partition("\n\n")
            parts += [head, *filter(None, [badge(name, address)]), rest] if i == 0 else [cell.source]
        elif cell.kind == "code":
            parts.append(code)
        else:
            parts.append(f'<details markdown="1">\n<summary>Solution</summary>\n\n{code}\n\n</details>')
    return "\n\n".join([*parts, _links(name)]) + "\n"


def _links(name: str) -> str:
    names = list(LESSONS)
    after = names[names.index(name) + 1 :]
    here = f"This page as [a notebook]({name}.ipynb) and as a script: `examples/learn/{name}.py`."
    onward = (
        f"Next: [{title(after[0])}]({after[0]}.md)." if after else "Next: [how to choose](../choose.md) for your run."
    )
    return f"---\n\n{onward}\n\n{here}"


def notebook(path: Path, needs: str) -> str:
    """The notebook of a script, without outputs, as JSON. Its first cell installs what is needed where bandpo is missing.

    Args:
        path: The script.
        needs: What pip installs.
    """
    install = (
        "import importlib.util\n\n"
        'if importlib.util.find_spec("bandpo") is None:  # in Colab\n'
        f'    get_ipython().run_line_magic("pip", "install --quiet {needs}")'
    )
    made = [_notebook_cell(Cell("code", install), path, 0)]
    for i, cell in enumerate(cells(path), 1):
        if cell.kind == "solution":
            made.append(_notebook_cell(Cell("code", "# Your answer:"), path, -i))
        made.append(_notebook_cell(cell, path, i))
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    whole = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _notebook_cell(cell: Cell, path: Path, place: int) -> dict[str, object]:
    """One cell; its id depends on its place alone, so that the file changes only where the script does."""
    hidden = {"cellView": "form", "jupyter": {"source_hidden": True}}  # for Colab, and for JupyterLab
    source = f"# @title Solution\n{cell.source}" if cell.kind == "solution" else cell.source
    made: dict[str, object] = {
        "cell_type": "markdown" if cell.kind == "text" else "code",
        "id": hashlib.sha256(f"{path.name} {place}".encode()).hexdigest()[:8],
        "metadata": hidden if cell.kind == "solution" else {},
        "source": source.splitlines(keepends=True),
    }
    return made if cell.kind == "text" else {**made, "execution_count": None, "outputs": []}


def files(names: list[str], address: str) -> dict[Path, str]:
    """All files that this tool writes, with what they should have: those of the lessons, and the notebook of the first steps.

    Args:
        names: The lessons.
        address: The address of the repository, or an empty text.
    """
    first, needs = FIRST_STEPS
    found = {first.with_suffix(".ipynb"): notebook(first, needs)}
    for name in names:
        found[PAGES / f"{name}.md"] = page(name, run(script(name)), address)
        found[PAGES / f"{name}.ipynb"] = notebook(script(name), LESSONS[name])
    return found


def main() -> int:
    """Writes the files, or compares them."""
    parser = argparse.ArgumentParser(description="The pages of the learn path, and the notebooks.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a file is out of date")
    parser.add_argument("--only", choices=LESSONS, help="one lesson")
    options = parser.parse_args()
    stale = 0
    for path, text in files([options.only] if options.only else list(LESSONS), repository()).items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            print(f"{path.relative_to(ROOT)} is out of date; run python tools/learn.py")
            stale += 1
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
