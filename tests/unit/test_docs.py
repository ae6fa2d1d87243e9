"""What the README and the docs show runs, every public name has an entry, and each page is written as CONTRIBUTING asks."""

import ast
import fnmatch
import json
import pkgutil
import re
import runpy
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
import yaml

import bandpo
from bandpo.divergences import DIVERGENCES
from sources import ROOT, tool

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAPERS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]  # written as the pages are, and no part of the site


def loop():
    """What a reader's own training loop has at hand before the loss."""
    old = torch.randn(16, 5).sub(3)
    return {
        "logprobs": (old + 0.1 * torch.randn(16, 5)).requires_grad_(),
        "old_logprobs": old,
        "mask": torch.ones(16, 5),
        "rewards": torch.tensor([0.0, 1.0] * 8),
    }


def prose(page):
    """A page without its code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page):
    """Where a link into the page may lead, as the site and GitHub spell it."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}
    return slugs | set(re.findall(r'<a id="([\w-]+)">', page.read_text()))


def blocks(language):
    return [
        pytest.param(code, id=f"{page.name}-{i}")
        for page in PAGES
        if page.parent.name != "learn"  # tests/unit/test_learn.py: each piece of a lesson needs those before it
        for i, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


ELSEWHERE = ("migrate_trl.md-",)  # tests/contract/test_migrate.py runs it, beside TRL's own trainer


@pytest.mark.parametrize("code", [p for p in blocks("python") if not p.id.startswith(ELSEWHERE)])
def test_python_in_the_docs_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = re.search(r"Band(GRPO|DPO)Trainer", code)
    if trained:  # with a tiny local model in place of the Hub's, and one step
        from datasets import Dataset

        from bandpo.toy.models import WarmUp, build_model, build_tokenizer

        tokenizer = build_tokenizer()
        build_model(WarmUp(hidden_size=16, layers=1), tokenizer).save_pretrained("model")
        tokenizer.save_pretrained("model")
        code = re.sub(r'model="[^"]+"', 'model="model"', code)
        tiny = "use_cpu=True, bf16=False, gradient_checkpointing=False, report_to='none', max_steps=1"
        if trained[1] == "GRPO":
            tiny += ", max_completion_length=4"
        config = f"args=Band{trained[1]}Config("
        code = code.replace(config, f"{config}{tiny}, ")
        scope = {
            "reward": lambda completions, **_: [float(i % 2) for i in range(len(completions))],  # groups with signal
            "dataset": Dataset.from_list([{"prompt": "1+1="}] * 16),
            "pairs": Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 16),
        }
        with pytest.warns(FutureWarning, match="gradient_checkpointing"):
            exec(code, scope)
    else:
        torch.manual_seed(0)
        scope, reached, backward = loop(), {}, torch.Tensor.backward

        def recorded(loss, *args, **kwargs):
            """A task that is solved may end without a gradient, so that of every step counts."""
            backward(loss, *args, **kwargs)
            for name, x in scope.items():
                if isinstance(x, torch.Tensor) and x.is_leaf and x.grad is not None:
                    reached.setdefault(name, []).append(x.grad.clone())

        monkeypatch.setattr(torch.Tensor, "backward", recorded)
        exec(code, scope)
        if "loss.backward()" in code:
            assert reached
            for grads in map(torch.stack, reached.values()):
                assert grads.isfinite().all() and grads.any()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_in_the_docs_has_known_keys_and_numbers_that_fit(text, tmp_path):
    from dataclasses import fields

    from bandpo.integrations.trl import BandGRPOConfig
    from bandpo.train.config import RunConfig

    options, given = {f.name for f in fields(BandGRPOConfig)}, yaml.safe_load(text)
    assert set(given) <= {f.name for f in fields(RunConfig)} | options
    host = {name: value for name, value in given.items() if name in options and name != "objective"}
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):  # the numbers fit together
        BandGRPOConfig(**{**host, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False})


def test_every_public_name_that_is_explained_is_on_an_api_page():
    """Types without a docstring are aliases, which the signatures that use them show."""
    from sources import CORE, public_names

    api, missing = tool("api"), []
    documented = api.documented()
    for module in [api.TOP, *CORE]:
        for name in public_names(module):
            if api.summary(module, name) and api.made(module, name) not in documented:
                missing.append(f"{module}.{name}")
    assert not missing, "add to AREAS in tools/api.py"
    assert {name for _, name in documented} > set(bandpo.__all__) - {"__version__"}


def test_api_pages_are_those_of_the_docstrings():
    """If it fails: `python tools/api.py`."""
    api = tool("api")
    assert api.INDEX.read_text() == api.index()
    assert {path.stem for path in api.FOLDER.glob("*.md")} == {"index", *api.AREAS}
    for slug, area in api.AREAS.items():
        assert (api.FOLDER / f"{slug}.md").read_text() == api.page(area), slug
        for entry in area.entries:
            module, names = api.listed(entry)
            assert names, entry
            assert all(api.summary(module, name) for name in names), entry
            assert all(hasattr(pkgutil.resolve_name(module), name) for name in names), entry


def test_every_objective_and_divergence_has_a_row():
    zoo, theory = (ROOT / "docs" / "zoo.md").read_text(), (ROOT / "docs" / "theory.md").read_text()
    assert all(f"| `{d.name}`" in theory for d in DIVERGENCES.values())
    rows = {row.split("|")[2].strip(" `"): row for row in zoo.splitlines() if row.startswith("| ![")}
    assert list(rows) == list(bandpo.OBJECTIVES)
    for name, objective in bandpo.OBJECTIVES.items():
        for text in (objective.formula.replace("|", "∣"), objective.paper, objective.aggregation, f"zoo/{name}.svg"):
            assert text in rows[name], (name, text)


def test_what_an_objective_needs_is_in_the_table_of_the_zoo():
    zoo = (ROOT / "docs" / "zoo.md").read_text()
    table = zoo.partition("| objective | also needs |\n")[2].partition("\n\n")[0].splitlines()[1:]
    told = {}
    for row in table:
        names, needs = row.strip("| ").split(" | ")
        for pattern in re.findall(r"`([^`]+)`", names):
            for name in fnmatch.filter(bandpo.OBJECTIVES, pattern):
                told[name] = told.get(name, "") + needs
    for name, objective in bandpo.OBJECTIVES.items():
        needs = {
            "`rollout_logprobs`": objective.anchor == "rollout" or objective.correction is not None,
            "`topk_logprobs`": "topk_logprobs" in objective.extras,
            "group_inputs": objective.group_stats is not None,
            "`ref_logprobs`": bool(objective.kl_coef),
        }
        assert {word: word in told.get(name, "") for word in needs} == needs, name


def test_every_paper_and_every_objective_is_in_the_paper_index():
    page = (ROOT / "docs" / "papers.md").read_text()
    for name, objective in bandpo.OBJECTIVES.items():
        for number in re.findall(r"arXiv:(\d{4}\.\d{5})", objective.paper):
            assert f"https://arxiv.org/abs/{number}" in page, number
        assert f"`{name}`" in page or name in ("no-clip", "ppo-kl"), name


def test_surrogates_and_regions_have_rows():
    page = (ROOT / "docs" / "objectives.md").read_text()
    for objective in bandpo.OBJECTIVES.values():
        surrogate = objective.surrogate
        surrogate = surrogate.func if isinstance(surrogate, partial) else surrogate
        name = getattr(surrogate, "__name__", type(surrogate).__name__)
        assert re.search(rf"`(experimental\.)?{name}`", page)
        assert re.search(rf"`(experimental\.)?{type(objective.bounds).__name__}`", page)


@pytest.mark.slow
def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = {"own_objective.py": ["--quick"]}
    for example in sorted((ROOT / "examples").glob("*.py")):
        if example.name == "trl_script.py":  # tests/contract/test_examples.py
            continue
        command = [sys.executable, str(example), *quick.get(example.name, [])]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr
        assert "figure:" in out.stdout


def test_tests_that_the_docs_name_exist():
    named = {m for page in PAGES for m in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text())}
    assert len(named) > 10
    for file, test in named:
        text = (ROOT / file).read_text()
        assert not test or f"def {test}(" in text, f"{file}::{test}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[-:] ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}


def test_no_cell_has_an_escaped_stroke_within_code():
    """The site shows its backslash."""
    for page in PAGES:
        for row in re.findall(r"^\|.*\|$", page.read_text(), re.MULTILINE):
            assert not any("\\|" in code for code in re.findall(r"`[^`]*`", row)), f"{page.name}: {row}"


def test_links_inside_the_docs_lead_somewhere():
    for page in [*PAGES, *PAPERS]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose(page)):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"
            assert anchor.isascii(), (
                f"{page.name}: {anchor}: GitHub and the site make different anchors of such a heading"
            )


OF_HOSTS = {"examples/run_grpo.py"}  # a file of NeMo-RL


def test_files_of_the_repository_that_pages_name_exist():
    for page in [*PAGES, *PAPERS]:
        for name in re.findall(r"`((?:src|tools|tests|examples|docs|benchmarks|docker)/[\w./-]*)`", page.read_text()):
            assert (ROOT / name).exists() or name in OF_HOSTS, f"{page.name}: {name}"


# ---- pages that programs write ----


def test_contributing_names_every_program_that_writes_files():
    rows = re.findall(r"^\|.*$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    for path in (ROOT / "tools").glob("*.py"):
        if '"--check"' in path.read_text() and path.name != "release.py":
            assert any(f"tools/{path.name}" in row for row in rows), path.name


def test_the_picture_of_the_architecture_is_that_of_the_imports():
    """If it fails: `python tools/architecture.py`."""
    tool_, page = tool("architecture"), ROOT / "docs" / "architecture.md"
    graph = tool_.imports()
    assert tool_.mistakes(graph) == []
    assert tool_.picture(graph) == tool_.PICTURE.read_text()
    assert tool_.page(graph, page.read_text()) == page.read_text()
    assert (
        len(graph) > 20 and "bounds" in graph["surrogates"] and "lab" not in graph["train"] | graph["integrations.trl"]
    )


def test_every_room_of_the_picture_is_inside_of_it():
    """A row of too many rooms once stood beyond the left edge."""
    text = tool("architecture").PICTURE.read_text()
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', text).groups())
    boxes = re.findall(r'class="box" x="(-?\d+)" y="(-?\d+)" width="(\d+)" height="(\d+)"', text)
    assert len(boxes) == len(tool("architecture").imports())
    spans = sorted((float(y), float(x), float(x) + float(w), float(y) + float(h)) for x, y, w, h in boxes)
    assert all(
        left > 100 and right < width and bottom < height for _, left, right, bottom in spans
    )  # right of the floor's name
    assert all(b[1] > a[2] for a, b in pairwise(spans) if a[0] == b[0])  # no box covers the next one of its row


def test_the_architecture_has_a_rule_that_can_break():
    tool_ = tool("architecture")
    graph = {room: set(used) for room, used in tool_.imports().items()}
    graph["bounds"].add("train")
    assert "bounds imports train, which stands on a higher floor" in tool_.mistakes(graph)
    graph["bounds"].remove("train")
    graph["divergences"].add("surrogates")
    assert "bounds imports itself by way of other rooms" in tool_.mistakes(graph)
    graph["new"] = {"bounds"}
    assert any(x.startswith("no floor lists new") for x in tool_.mistakes(graph))
    assert ">new<" in tool_.picture(graph)  # and it is drawn all the same
    assert tool_.main.__doc__


def test_every_room_has_a_paragraph_and_a_floor():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = re.findall(r"^\*\*`([\w.]+)`\*\* [a-z]", page, re.MULTILINE)
    assert sorted(rooms) == sorted(tool("architecture").imports())


def test_where_to_change_what_names_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \| (.+) \|$", page.partition("## Where do I change")[2], re.MULTILINE)[
        2:
    ]
    assert len(rows) >= 12
    for row in rows:
        files = [x for cell in row for x in re.findall(r"`((?:src|tests|tools)/[\w/.]+)`", cell)]
        assert files and all((ROOT / x).exists() for x in files), row


def test_tables_that_the_source_has():
    """If it fails: `python tools/tables.py`."""
    tables = tool("tables")
    for (file, name), table in tables.TABLES.items():
        text = (ROOT / "docs" / file).read_text()
        assert tables.page(text, name, table()) == text, file
    with pytest.raises(ValueError, match="the page has no"):
        tables.page("nothing", "moved", "")


@pytest.mark.slow
def test_figures_that_formulas_and_committed_numbers_make():
    """If it fails: `python tools/figures.py`, with the matplotlib of constraints.txt."""
    made = tool("figures")
    drawn = made.figures()
    assert {path.stem for path in (made.ASSETS / "zoo").iterdir()} == set(bandpo.OBJECTIVES)
    for name in drawn:
        assert made.current(name), f"docs/assets/{name} is out of date"


def test_the_page_of_tabular_ppo_has_the_numbers_of_its_figure():
    example = runpy.run_path(str(ROOT / "examples/tabular_ppo_clip.py"))
    table = example["table"](json.loads((ROOT / "docs/tabular.json").read_text()))
    shown = (ROOT / "docs/tabular.md").read_text()
    assert [line.split() for line in table.splitlines()] == [
        line.split() for line in re.search(r"```\n(.*?)```", shown, re.DOTALL)[1].splitlines()
    ]


def test_a_figure_that_differs_is_noticed():
    made = tool("figures")
    text = (made.ASSETS / "zoo" / "grpo.svg").read_text()
    other = (made.ASSETS / "zoo" / "dapo.svg").read_text()
    assert made.same(text, text)
    assert not made.same(text, other)  # they differ in the embedded pixels alone
    assert not made.same(text, text.replace("#000000", "#000001"))


def test_the_site_shows_the_version():
    """If it fails: `python tools/site.py`."""
    site = tool("site")
    text = site.CONFIG.read_text()
    assert site.config(text, bandpo.__version__) == text
    assert "\ncopyright: bandpo 9.9 · Apache-2.0\n" in site.config(text, "9.9")
    with pytest.raises(ValueError, match="has 0"):
        site.config("nav: []", "9.9")


def test_table_of_the_default_job():
    """If it fails: `python tools/main_job.py`; after a change of the job itself with `--measure FOLDER`, half an hour."""
    made = tool("main_job")
    data = json.loads(made.DATA.read_text())
    assert data["job"] == made.job(), "the table belongs to other settings of the default job"
    assert {(row["objective"], row["seed"]) for row in data["runs"]} == {(a, s) for a in made.ARMS for s in made.SEEDS}
    text = made.PAGE.read_text()
    assert made.page(text, made.table(data)) == text
    with pytest.raises(ValueError, match=r"start\.md has no"):
        made.page("nothing", "")


def test_options_of_a_region_are_tabled_once_and_completely():
    from dataclasses import fields

    from bandpo.integrations.options import RegionOptions

    for option in fields(RegionOptions):
        pages = [page for page in PAGES if page.name != "evidence-data.md"]  # which has an arm of the name `radius`
        rows = [page.name for page in pages if re.search(rf"^\| `{option.name}` \|", page.read_text(), re.MULTILINE)]
        assert rows == ["objectives.md"], option.name


def test_every_old_name_is_in_the_table_of_moved_names():
    from bandpo import _deprecations

    page = (ROOT / "docs" / "stability.md").read_text()
    for old, new in {**_deprecations.MODULES, **_deprecations.NAMES}.items():
        private = any(part.startswith("_") for part in old.split("."))
        assert private != (f"| `bandpo.{old}` | `bandpo.{new}` | {_deprecations.LAST} |" in page), old
    assert "| `bandpo.bounds.Elastic` | `bandpo.experimental.Elastic` |" in page  # moved out of a module that stays


# ---- how the pages are written ----

FACTS = {
    r"0\.00714": "theory.md",
    r"every ratio is 1": "concepts.md",
    r"\b53\.5-fold": "radii.md",
    r"as the official implementation is described": "performance.md",
    r"came out as follows": "evidence.md",
    r"\bGPL-3\.0\. |code is GPL-3\.0": "README.md",
    r"steps_per_generation = gradient_accumulation_steps": "concepts.md",
    r"0\.659 ± 0\.037": "start.md",
}


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_is_said_once(fact):
    found = [page.name for page in PAGES for _ in re.findall(fact, re.sub(r"\s+", " ", prose(page)))]
    assert found == [FACTS[fact]]


def test_lines_are_wrapped():
    """At most 120 columns, but for tables and for links and pictures, which nobody can break."""
    for page in [*PAGES, *PAPERS]:
        for i, line in enumerate(page.read_text().splitlines(), 1):
            free = line.lstrip().startswith(("|", "![", "<iframe")) or re.search(
                r"\]\(\S{40,}\)|https?://\S{40,}", line
            )
            assert len(line) <= 120 or free, f"{page.name}:{i}: {len(line)} columns"


def test_code_on_the_pages_for_users_is_not_cut():
    """What is wider than the column of the site at 1280 pixels scrolls, and hides the end of a command."""
    pages = re.findall(
        r"([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text().partition("- Use it:")[2].partition("- Trust regions:")[0]
    )
    assert len(pages) >= 12
    for name in pages:
        for code in re.findall(r"^```.*?\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.DOTALL | re.MULTILINE):
            for line in code.splitlines():
                whole = "policy_loss._target_=bandpo." in line  # an argument that cannot be broken, of known length
                assert len(line) <= 84 or whole, f"{name}: {len(line)} columns: {line}"


def test_the_readme_is_short_and_its_first_screen_has_everything():
    text = (ROOT / "README.md").read_text()
    screen, *sections = text.split("\n## ")
    assert len(text.splitlines()) <= 80 and len(screen.splitlines()) <= 30
    assert screen.count("![") == text.count("![") == 1
    assert len(re.findall(r"[.?!](?=\s|$)", screen.split("\n\n")[1])) == 1  # what it is, in one sentence
    assert all(command in screen for command in ("pip install bandpo", "make train", "make test"))
    assert [section.splitlines()[0] for section in sections] == [
        "In your own loop",
        "In TRL and in verl",
        "What we found",
        "Where to go",
    ]
    for section in sections:
        for paragraph in re.split(r"\n\n|\n\* ", section):
            assert paragraph.count("](") <= 2, paragraph
    assert f"{len(bandpo.OBJECTIVES)} objectives" in text


def test_the_own_loop_of_the_readme_is_that_of_the_first_page_of_the_site():
    """Its lines are shorter there, so that none is cut; the program is the same."""
    first = [
        ast.dump(ast.parse(re.search(r"## In your own loop\n+```python\n(.*?)```", path.read_text(), re.DOTALL)[1]))
        for path in (ROOT / "README.md", ROOT / "docs/index.md")
    ]
    assert first[0] == first[1]


def test_tables_of_numbers_are_on_the_data_page():
    claims, data = ((ROOT / "docs" / name).read_text() for name in ("evidence.md", "evidence-data.md"))
    assert "evidence-data.md#the-registered-contrasts" in claims
    assert len(claims.splitlines()) < 150 < len(data.splitlines())
    assert not re.search(r"\[[+-]\d\.\d+, [+-]\d", claims)  # an interval


def test_no_page_speaks_the_old_dialect():
    old = (
        r"goes on|gone on|nobody's|serves? only|\bhas go\b|turns? round|would turn|say so\b|says so\b|as there\b|mend\b"
    )
    for page in [*PAGES, *PAPERS]:
        found = re.search(old, re.sub(r"\s+", " ", prose(page)))
        assert not found, f"{page.name}: {found[0]}"


def test_no_page_names_what_has_moved():
    from bandpo import _deprecations

    gone = {**_deprecations.MODULES, **_deprecations.NAMES}
    for page in PAGES:
        text = page.read_text() if page.name != "stability.md" else ""  # which names them on purpose
        for name in re.findall(r"\bbandpo\.([\w.]+)", text):
            assert name.rstrip(".") not in gone, f"{page.name}: bandpo.{name}"
