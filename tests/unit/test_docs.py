"""What the README and the docs show runs, and every public name has an entry."""

import json
import pkgutil
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

import bandpo
from bandpo.divergences import DIVERGENCES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    return [
        pytest.param(code, id=f"{page.name}-{i}")
        for page in PAGES
        for i, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize("code", blocks("python"))
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
        exec(code, {})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_in_the_docs_has_known_keys(text):
    from dataclasses import fields

    from bandpo.integrations.trl import BandGRPOConfig
    from bandpo.train.config import RunConfig

    known = {f.name for cls in (RunConfig, BandGRPOConfig) for f in fields(cls)}
    assert set(yaml.safe_load(text)) <= known


def test_every_public_name_has_an_entry_in_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in bandpo.__all__:
        assert name == "__version__" or re.search(rf"(::: bandpo\.{name}$|\b{name}\b.*\])", page, re.MULTILINE), name


def test_every_entry_of_the_api_page_exists():
    page = (ROOT / "docs" / "api.md").read_text()
    for path, members in re.findall(r"^::: (\S+)$(?:\n    options:\n      members: \[(.*)\])?", page, re.MULTILINE):
        found = pkgutil.resolve_name(path)
        assert all(hasattr(found, name) for name in members.split(", ") if members), (path, members)


def test_every_objective_and_divergence_has_a_row():
    zoo, theory = (ROOT / "docs" / "zoo.md").read_text(), (ROOT / "docs" / "theory.md").read_text()
    assert all(f"| `{d.name}`" in theory for d in DIVERGENCES.values())
    rows = {row.split("|")[2].strip(" `"): row for row in zoo.splitlines() if row.startswith("| ![")}
    assert list(rows) == list(bandpo.OBJECTIVES)
    for name, objective in bandpo.OBJECTIVES.items():
        for text in (objective.formula.replace("|", "∣"), objective.paper, objective.aggregation, f"zoo/{name}.png"):
            assert text in rows[name], (name, text)


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
        assert f"`{surrogate.__name__}`" in page
        assert re.search(rf"`(regions\.)?{type(objective.bounds).__name__}`", page)


@pytest.mark.slow
def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in sorted((ROOT / "examples").glob("*.py")):
        out = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr
        assert "figure:" in out.stdout


def test_tests_that_the_docs_name_exist():
    named = {m for page in PAGES for m in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text())}
    assert len(named) > 10
    for file, test in named:
        text = (ROOT / file).read_text()
        assert not test or f"def {test}(" in text, f"{file}::{test}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in PAGES} - {"README.md"}


def test_the_notebook_is_the_example():
    """`make notebook` writes one from the other; both have the same cells."""
    script = (ROOT / "examples" / "first_steps.py").read_text()
    expected = []
    for head, body in (cell.split("\n", 1) for cell in script.split("# %%")[1:]):
        lines = body.strip().splitlines()
        expected.append("\n".join((x[2:] if x.startswith("# ") else x[1:]) if "markdown" in head else x for x in lines))
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text())
    cells = notebook["cells"][1:]  # the first is the script's docstring
    assert ["".join(cell["source"]) for cell in cells] == expected
    assert not any(cell.get("outputs") for cell in cells)


def test_links_inside_the_docs_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
