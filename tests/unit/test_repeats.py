"""Same seed, same machine, same result: every command, twice; and what each artefact says about itself."""

import json

import pytest

from bandpo.cli import main

ABOUT = {"command", "versions", "git", "python", "platform"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def twice(capsys, *arguments):
    outputs = []
    for _ in range(2):
        assert main(list(arguments)) == 0
        outputs.append(capsys.readouterr().out)
    return outputs


@pytest.mark.parametrize(
    "arguments",
    [
        ["bounds", "--no-figure"],
        ["bounds", "--divergence", "kl,tv,js", "--match", "max_shift", "--no-figure"],
        ["objectives"],
    ],
)
def test_tables(arguments, capsys):
    first, second = twice(capsys, *arguments)
    assert first == second


def test_figures_are_the_same_bytes(capsys, tmp_path):
    found = []
    for name in ("a.png", "b.png"):
        assert main(["bounds", "--output", name]) == 0
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1]


def test_evaluate(tmp_path, capsys):
    from bandpo.toy.models import WarmUp, warmed_up_model

    model = str(warmed_up_model(WarmUp(steps=100)))
    found = []
    for name in ("a.json", "b.json"):
        assert (
            main(["evaluate", model, "--task", "countdown", "--prompts", "8", "--samples", "4", "--output", name]) == 0
        )
        found.append(json.loads((tmp_path / name).read_text()))
    about = [f.pop("about") for f in found]
    assert found[0] == found[1]
    assert set(about[0]) >= ABOUT | {"seed", "options"}


def test_lab(tmp_path):
    found = []
    for name in ("a", "b"):
        assert main(["lab", "preference", "--only", "concentrability,design", "--output", name]) == 0
        found.append({p.name: json.loads(p.read_text()) for p in (tmp_path / name).glob("*.json")})
    assert len(found[0]) == 2
    for experiments in found:
        for result in experiments.values():
            assert set(result) >= ABOUT
            result.pop("seconds")
    assert found[0] == found[1]


@pytest.mark.slow
def test_compare(tmp_path):
    found = []
    for name in ("a", "b"):
        options = ["--preset", "smoke", "--tasks", "paths", "--objectives", "grpo", "--seeds", "0-1", "--updates", "2"]
        assert main(["compare", *options, "--output", name]) == 0
        found.append(json.loads((tmp_path / name / "summary.json").read_text()))
    assert set(found[0]["about"]["environment"]) >= ABOUT
    for summary in found:
        summary.pop("about")
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_run_says_all_about_itself_from_its_first_second(tmp_path, capsys, monkeypatch):
    """The files are there before the first step; `--config RUN/config.yaml` repeats it (test_run.py)."""
    import yaml

    from bandpo.train.grpo import GRPORun

    seen = {}

    def look(self, resume):
        seen.update(
            {
                name: (tmp_path / "run" / name).read_text()
                for name in ("config.yaml", "config.resolved.yaml", "env.json")
            }
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(GRPORun, "train", look)
    options = [
        "--eval_prompts",
        "4",
        "--eval_samples",
        "2",
        "--warm_up_steps",
        "100",
        "--seed",
        "3",
        "--output_dir",
        "run",
    ]
    assert main(["train", *options]) == 130
    assert yaml.safe_load(seen["config.yaml"])["seed"] == 3
    resolved = yaml.safe_load(seen["config.resolved.yaml"])
    assert (resolved["radius"], resolved["adam_beta2"], resolved["reward_errors"]) == (None, 0.95, "stop")
    assert len(resolved) > 150
    environment = json.loads(seen["env.json"])
    assert set(environment) >= ABOUT | {"seed", "device", "processes"}
    assert environment["seed"] == 3
