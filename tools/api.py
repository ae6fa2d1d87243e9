"""Writes the API pages, docs/api/*.md, from the docstrings: a table of each area, and its entries.

* `python tools/api.py`: writes the pages.
* `python tools/api.py --check`: changes nothing; status 1 if a page is out of date.

Which names belong to which area is in `AREAS`; `tests/unit/test_docs.py` compares them with the public API. The entries
themselves are made by mkdocstrings when the site is built.
"""

import argparse
import ast
import functools
import html
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from sources import definition, modules, public_names  # noqa: E402

FOLDER = ROOT / "docs" / "api"
INDEX = FOLDER / "index.md"
TOP = "bandpo._public"


@dataclass(frozen=True)
class Area:
    """A page of the API.

    Args:
        title: Its heading.
        about: What the area is for, in Markdown; links are relative to docs/api.
        entries: Names of `bandpo`; and modules without `bandpo.`, such as `bounds.regions`, whose public names are all listed,
            unless some are named after a colon: `zoo: OBJECTIVES get_objective`.
    """

    title: str
    about: str
    entries: tuple[str, ...]


AREAS = {
    "bounds": Area(
        "Bounds",
        "The interval that a trust region leaves to the ratio of a token. [Radii](../radii.md) tells how wide to make it.",
        (
            *("ratio_bounds", "in_band", "RatioBounds", "Band", "Clip", "DCPO", "match_radius", "radius_for"),
            "bounds: Intersection Union max_shift outside outside_fraction",
            *("bounds.regions", "schedules"),
        ),
    ),
    "divergences": Area(
        "Divergences",
        "f-divergences of policies. [Theory](../theory.md#divergences) has a table of them.",
        (
            *(
                "FDivergence",
                "alpha",
                "KL",
                "REVERSE_KL",
                "TV",
                "CHI2",
                "NEYMAN",
                "HELLINGER",
                "LE_CAM",
                "JS",
                "JEFFREYS",
            ),
            "divergences: DIVERGENCES binary_divergence",
        ),
    ),
    "loss": Area(
        "Loss",
        "From log-probs to a loss. [Your own loop](../hosts.md#your-own-loop) shows how to call it.",
        (
            *("policy_loss", "aggregate", "loss_normalizer", "token_objective", "TokenObjective", "token_logprobs"),
            *(
                "losses: compiled",
                "terms: TokenSums UsedTokens gradient_weight level_logprobs sequence_log_ratio",
                "logprobs: TokenLogprobs",
                "reference",
            ),
        ),
    ),
    "objectives": Area(
        "Objectives",
        "The parts of an objective, and [the zoo](../zoo.md) of named ones.",
        (
            *("Objective", "OBJECTIVES", "traits", "zoo: get_objective", "surrogates.token", "surrogates.sequence"),
            *(
                "surrogates.projected",
                "surrogates.stops: stops never",
                "surrogates.corrections",
                "surrogates: SequenceFilter",
                "projection",
            ),
        ),
    ),
    "groups": Area(
        "Advantages and metrics",
        "Advantages of groups of completions, and what a log should have. [Metrics](../objectives.md#metrics) explains each.",
        (
            *("group_advantages", "policy_metrics", "approx_kl", "pass_at_k", "groups"),
            "metrics: Detail EFFECTIVE_SAMPLE_SIZE PROB_BINS PROB_EDGES PooledSum policy_sums",
            "metrics: effective_size masked_mean pass_at_powers",
        ),
    ),
    "experimental": Area(
        "Experimental",
        "These may change in [any release](../stability.md#bandpoexperimental).",
        ("experimental",),
    ),
    "testing": Area("Checks", "Tests for a divergence, a region or a surrogate of your own.", ("testing",)),
    "doctor": Area(
        "Doctor",
        "What [`bandpo doctor`](../doctor.md) does, as functions. [The rules](../rules.md) are on a page of their own.",
        ("doctor: examine_setup examine_log examine_batch Setup Finding",),
    ),
    "preference": Area(
        "Preference learning",
        "Losses, links, designs and exact tables for [learning from pairs](../preference.md).",
        tuple(f"preference.{x}" for x in ("losses", "objectives", "links", "tabular", "design", "sampling", "probe")),
    ),
    "selection": Area(
        "Pruning and packing",
        "Which samples an update is made of, and how they share rows: [the page](../selection.md).",
        ("selection.pruning", "selection.packing"),
    ),
    "trl": Area(
        "TRL",
        "Trainers of [TRL](../trl.md) with a trust region. Needs the extra `trl`.",
        (
            "integrations.trl: BandGRPOConfig BandGRPOTrainer",
            "integrations.trl.dpo: BandDPOConfig BandDPOTrainer",
            "integrations.trl.online: OnlinePreferenceConfig OnlinePreferenceTrainer",
        ),
    ),
    "lab": Area(
        "Lab",
        "Experiments and their statistics, as far as others may want to use them. Needs scipy, which the extra `lab` brings.",
        (
            *("statistics", "lab.comparison.exact", "lab.comparison.loop", "lab.experiments.tabular"),
            *("lab.experiments.preference", "lab.experiments.reranking", "lab.experiments.selection"),
        ),
    ),
}
"""The pages in their order."""


def listed(entry: str) -> tuple[str, tuple[str, ...]]:
    """The module of an entry of an area, and the names that the page has of it.

    Args:
        entry: As in `Area.entries`.
    """
    path, _, names = (part.strip() for part in entry.partition(":"))
    if f"bandpo.{path}" not in modules():
        return TOP, (path,)
    if names:
        return f"bandpo.{path}", tuple(names.split())
    module = f"bandpo.{path}"
    return module, tuple(n for n in public_names(module) if summary(module, n) and made(module, n) not in _of_top())


@functools.cache
def _of_top() -> frozenset[tuple[str, str]]:
    """What the pages have under `bandpo` itself, and need not have again under the module that makes it."""
    entries = (e for area in AREAS.values() for e in area.entries if ":" not in e and f"bandpo.{e}" not in modules())
    return frozenset(made(TOP, name) for name in entries)


def summary(module: str, name: str) -> str:
    """The first paragraph of a docstring, on one line; empty if there is none.

    Args:
        module: Full name of the module.
        name: A public name of it.
    """
    home, node = definition(module, name)
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node) or ""
    else:
        body = list(home.statements())
        after = body[body.index(node) + 1 : body.index(node) + 2]
        found = after[0].value if after and isinstance(after[0], ast.Expr) else None
        text = found.value if isinstance(found, ast.Constant) and isinstance(found.value, str) else ""
    return " ".join(text.strip().partition("\n\n")[0].split())


def documented() -> set[tuple[str, str]]:
    """All that the pages have, each with the module in which it is made."""
    return {
        made(module, name)
        for area in AREAS.values()
        for e in area.entries
        for module, names in [listed(e)]
        for name in names
    }


def made(module: str, name: str) -> tuple[str, str]:
    """Where a name is made, through any number of re-exports.

    Args:
        module: Full name of a module that has it.
        name: The name.
    """
    home, node = definition(module, name)
    bound = getattr(node, "name", None)
    return home.name, bound or name


def page(area: Area) -> str:
    """The text of the page of an area.

    Args:
        area: The area.
    """
    rows = [
        f"| [`{name}`][{_path(module, name)}] | {_cell(summary(module, name))} |"
        for entry in area.entries
        for module, names in [listed(entry)]
        for name in names
    ]
    made_by = "<!-- written by tools/api.py -->"
    return "\n".join(
        [
            *(f"# {area.title}", "", made_by, "", textwrap.fill(area.about, 120), ""),
            *("| name | what it is |", "|---|---|", *rows, ""),
            *(line for entry in area.entries for line in _entry(entry)),
        ]
    )


def index() -> str:
    """The text of docs/api/index.md: the areas, and the names of `bandpo` itself."""
    areas = [f"| [{area.title}]({slug}.md) | {_cell(area.about)} |" for slug, area in AREAS.items()]
    names = [f"| [`{name}`][bandpo.{name}] | {_cell(summary(TOP, name))} |" for name in public_names(TOP)]
    return "\n".join(
        [
            *("# API", "", "<!-- written by tools/api.py -->", ""),
            "A name is imported from the module that its heading shows. [Stability](../stability.md) is what you can rely on.",
            *("", "| area | what it is for |", "|---|---|", *areas, ""),
            *("## Names of `bandpo` itself", "", "| name | what it is |", "|---|---|", *names, ""),
        ]
    )


def _entry(entry: str) -> Iterator[str]:
    module, names = listed(entry)
    if module == TOP:
        yield from (f"::: bandpo.{names[0]}", "")
    elif ":" in entry:
        yield from (line for name in names for line in (f"::: {module}.{name}", ""))
    else:
        yield from (f"::: {module}", "    options:", "      members:", *(f"        - {name}" for name in names), "")


def _path(module: str, name: str) -> str:
    return f"bandpo.{name}" if module == TOP else f"{module}.{name}"


def _cell(text: str) -> str:
    """Text for a cell: a stroke would end it, and the site shows the backslash of an escaped one within code."""
    code = re.sub(r"`([^`]*\|[^`]*)`", lambda found: f"<code>{html.escape(found[1], quote=False)}</code>", text)
    return code.replace("|", "&#124;")


def main() -> int:
    """Writes the pages, or compares them."""
    parser = argparse.ArgumentParser(description="The API pages.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is out of date")
    check = parser.parse_args().check
    pages = {INDEX: index(), **{FOLDER / f"{slug}.md": page(area) for slug, area in AREAS.items()}}
    stale = 0
    for path, text in pages.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if check:
            print(f"{path.relative_to(ROOT)} is out of date; run python tools/api.py")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
