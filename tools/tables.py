"""Writes the tables of the documentation that the source has, or a file that was measured.

They are the options of a region, the names that have moved, the tested versions, and how far updates move a rare token on
the bandit (docs/realised.json, from `bandpo.lab.comparison.sweeps.realised` with 1000 seeds).

* `python tools/tables.py`: writes them.
* `python tools/tables.py --measure`: runs `realised` first (a minute).
* `python tools/tables.py --check`: changes nothing; status 1 if a page is out of date.
"""

import argparse
import inspect
import json
import re
import sys
from pathlib import Path

import tomllib

import bandpo._public  # noqa: F401  (it imports all modules of the core)
from bandpo._deprecations import LAST, MODULES, NAMES, RENAMED_OBJECTIVES
from bandpo._system import supported
from bandpo.integrations.options import HELP

DOCS = Path(__file__).parents[1] / "docs"
REALISED = DOCS / "realised.json"


def options_table() -> str:
    """The options of a region, with the help texts of `RegionOptions`."""
    rows = [f"| `{name}` | {text} |" for name, text in HELP.items()]
    return "\n".join(["| option | meaning |", "|---|---|", *rows])


def moved_table() -> str:
    """Old names and new names, without private ones."""
    moved = {**MODULES, **NAMES}
    for name, module in list(sys.modules.items()):
        finder = vars(module).get("__getattr__") if name.startswith("bandpo.") else None
        if finder is not None and finder.__module__ == "bandpo._deprecations":  # made by `moved_within`
            names = inspect.getclosurevars(finder).nonlocals["names"]
            moved |= {f"{name.partition('.')[2]}.{old}": new for old, new in names.items()}
    public = {old: new for old, new in sorted(moved.items()) if not any(p.startswith("_") for p in old.split("."))}
    rows = [f"| `bandpo.{old}` | `bandpo.{new}` | {LAST} |" for old, new in public.items()]
    rows += [f"| the objective `{old}` | `{new}` | {LAST} |" for old, (new, _) in RENAMED_OBJECTIVES.items()]
    return "\n".join(["| old name | new name | works up to |", "|---|---|---|", *rows])


def realised_table() -> str:
    """The ratio of a rare token of the bandit after the steps on one rollout: median, 95% quantile, share beyond 1.2."""
    found = json.loads(REALISED.read_text(encoding="utf-8"))
    names = {"grpo": "fixed clip 0.2", "bandpo-kl": "KL band 0.05", "no-clip": "no clip"}
    rows = [f"| rate | epochs x steps | {' | '.join(names.values())} |", f"|---|---|{'---|' * len(names)}"]
    for j, rate in enumerate(found["rates"]):
        for k, (epochs, steps) in enumerate(found["reuse"]):
            if epochs > 1:
                cells = [
                    f"{found['median'][n][0][j][k]:.2f}, {found['high'][n][0][j][k]:.2f}, {found['beyond'][n][0][j][k][0]:.0%}"
                    for n in names
                ]
                rows.append(f"| {rate:g} | {epochs} x {steps} | {' | '.join(cells)} |")
    return "\n".join(rows)


RUNS = {"make test": "", "make test-lowest": "-lowest", "make test-verl": "-verl"}
"""The commands that run tests with the versions of a constraints file, and the end of its name."""
PYTHONS = {"make test": "3.11", "make test-lowest": "3.10", "make test-verl": "3.11"}
"""The Python that each command ran on so far; the classifiers of pyproject.toml name these and no others."""


def expected_pythons() -> list[str]:
    """The versions of Python that the hosted workflow names, and that no test has run on yet."""
    workflow = (DOCS.parent / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    named = {f"3.{minor}" for minor in re.findall(r'"3\.(\d+)"', workflow)}
    return sorted(named - set(PYTHONS.values()), key=lambda version: int(version.partition(".")[2]))


def versions_table() -> str:
    """Packages and hosts with the accepted range of pyproject.toml and the version that each command ran with, and Python."""
    root = DOCS.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    ranges: dict[str, str] = {}
    for line in lines:
        if match := re.match(r"([\w.-]+)([<>=!~][^;]*)", line):
            ranges.setdefault(supported.normal(match[1]), match[2].strip().replace(",", ", "))
    ran = [_pinned(root / f"constraints{end}.txt") for end in RUNS.values()]
    wheels: dict[str, list[str]] = {}
    for wheel in tomllib.loads((root / "tests/hosts/wheels.toml").read_text(encoding="utf-8"))["wheel"]:
        name, _, version = wheel["requirement"].partition("==")
        wheels.setdefault(supported.normal(name), []).append(version)
    heads = ["package", "accepted", *(f"`{command}`" for command in RUNS), "`make test-hosts`"]
    python = f"{project['requires-python']}; {', '.join(expected_pythons())} expected, not run"
    rows = [heads, ["---"] * len(heads), ["Python", python, *PYTHONS.values(), "3.11"]]
    for name, versions in (supported.PACKAGES | supported.HOSTS).items():
        key = supported.normal(name)
        hosts = ", ".join(sorted(wheels.get(key, []))) if versions else "its source"
        rows.append([f"`{name}`", ranges.get(key, "not limited"), *(file.get(key, "") for file in ran), hosts])
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)


def _pinned(path: Path) -> dict[str, str]:
    """The versions of a constraints file, by the normalised name of the package."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {
        supported.normal(name): version.strip() for name, _, version in (x.partition("==") for x in lines) if version
    }


TABLES = {
    ("objectives.md", "options"): options_table,
    ("stability.md", "moved"): moved_table,
    ("theory.md", "realised"): realised_table,
    ("stability.md", "versions"): versions_table,
}


def page(text: str, name: str, table: str) -> str:
    """A page with one of its tables brought up to date.

    Args:
        text: The page.
        name: The name in the marks around the table.
        table: The table.

    Raises:
        ValueError: If the page does not have the marks.
    """
    begin, end = f"<!-- {name}: begin, written by tools/tables.py -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin} ... {end}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main() -> int:
    """Writes the tables, or compares them."""
    parser = argparse.ArgumentParser(description="The tables of the documentation that the source has.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a table is out of date")
    parser.add_argument("--measure", action="store_true", help="run the bandit for the table of realised ratios first")
    options = parser.parse_args()
    check = options.check
    if options.measure:
        from bandpo.lab.comparison.sweeps import realised

        REALISED.write_text(json.dumps(realised(1000)) + "\n", encoding="utf-8")
    stale = 0
    for (file, name), table in TABLES.items():
        old = (DOCS / file).read_text(encoding="utf-8")
        new = page(old, name, table())
        if old != new and check:
            print(f"docs/{file} is out of date; run python tools/tables.py")
            stale += 1
        elif old != new:
            (DOCS / file).write_text(new, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
