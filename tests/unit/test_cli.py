"""The commands as a user types them."""

import argparse
import json
import re
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import bandpo as package
from bandpo.cli import COMMANDS, _parser, main
from command_line import bandpo


def imported_by(code):
    """Names of the top-level packages that a piece of Python imports."""
    report = "import sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_help_lists_the_commands():
    result = bandpo("--help")
    assert result.returncode == 0
    for command in ("train", "evaluate", "bounds", "objectives"):
        assert f"bandpo {command}" in result.stdout


def parsers(parser):
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_every_option_of_every_command_has_a_help_text():
    for command in COMMANDS:
        for parser in parsers(_parser(command)):
            for action in parser._actions:
                assert action.help or isinstance(action, argparse._SubParsersAction), (parser.prog, action.dest)


def test_the_choices_that_the_options_name_are_those_of_the_lab():
    from bandpo.lab.backends import BACKENDS
    from bandpo.lab.comparison.plan import PRESETS
    from bandpo.lab.comparison.problems import PROBLEMS
    from bandpo.lab.experiments.preference import EXPERIMENTS

    def options(name):
        parser = argparse.ArgumentParser("bandpo")
        import_module(f"bandpo.lab.{name}.arguments").add_arguments(parser)
        return {(p.prog.split()[-1], a.dest): a for p in parsers(parser) for a in p._actions}

    compare = options("comparison")
    assert compare["bandpo", "preset"].choices == tuple(PRESETS)
    assert compare["bandpo", "backend"].choices == tuple(BACKENDS)
    assert compare["bandpo", "tasks"].help.startswith(", ".join(PROBLEMS))
    assert ", ".join([*EXPERIMENTS, "reranking"]) in options("experiments")["preference", "only"].help


def test_tables_need_no_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; from bandpo.cli import main; import bandpo.plots"
    code += "\nassert main(['bounds', '--no-figure']) == main(['objectives']) == 0"
    code += "\nassert main(['bounds']) == 2"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bandpo.plots needs matplotlib: pip install 'bandpo[plot]'" in done.stderr
    assert "bandpo: --no-figure prints the table only" in done.stderr


def test_the_command_line_leaves_out_torchs_warning_about_numpy():
    code = "import warnings; from bandpo.cli import main; main(['env', '--json'])"
    code += "\nwarnings.warn('Failed to initialize NumPy: No module'); warnings.warn('another one')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "another one" in done.stderr and "NumPy" not in done.stderr.replace(code, "")


def test_training_depends_on_nothing_of_the_lab():
    for path in (Path(package.__file__).parent / "train").rglob("*.py"):
        assert "bandpo.lab" not in path.read_text(), path


def test_importing_the_package_brings_torch_and_nothing_else_of_weight():
    names = imported_by("import bandpo; bandpo.policy_loss; bandpo.Band; bandpo.testing")
    assert "torch" in names
    heavy = {
        "transformers",
        "trl",
        "datasets",
        "accelerate",
        "matplotlib",
        "reasoning_gym",
        "rich",
        "jinja2",
        "pandas",
        "scipy",
    }
    assert not names & heavy


def test_bounds_prints_the_table_and_writes_the_figure(capsys, tmp_path):
    figure = tmp_path / "new" / "band.svg"
    assert main(["bounds", "--divergence", "kl", "--radius", "0.05", "--output", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "7.8098" in out  # p = 0.01
    assert "1.3085" in out  # p = 0.5
    assert figure.read_text().startswith("<?xml")
    assert main(["bounds", "--max-ratio", "10", "--no-figure"]) == 0
    assert "cap 10" in capsys.readouterr().out
    assert main(["bounds", "--divergence", "alpha:2", "--radius", "0.025", "--no-figure"]) == 0
    alpha_rows = capsys.readouterr().out.splitlines()[3:]
    assert main(["bounds", "--divergence", "chi2", "--radius", "0.05", "--no-figure"]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == alpha_rows


def test_bounds_of_families_with_matched_radii(capsys, tmp_path):
    figure = tmp_path / "families.svg"
    command = ["bounds", "--divergence", "kl, tv,chi2", "--match", "upper@0.01", "--output", str(figure)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert all(label in out for label in ("KL, radius 0.05", "TV, radius 0.0681", "CHI2, radius 0.4684"))
    row = next(line for line in out.splitlines() if line.split()[0] == "0.01")
    assert row.count("7.8098") == 3
    assert figure.read_text().startswith("<?xml")
    assert main(["bounds", "--divergence", "kl,tv", "--no-figure"]) == 0
    assert "TV, radius 0.05" in capsys.readouterr().out


def test_objectives_plot_is_one_figure_or_a_folder(capsys, tmp_path):
    from bandpo import OBJECTIVES

    assert main(["objectives", "--plot", str(tmp_path / "new" / "zoo.svg")]) == 0
    picture = (tmp_path / "new" / "zoo.svg").read_text()
    assert picture.startswith("<?xml")
    assert main(["objectives", "--plot", str(tmp_path / "zoo")]) == 0
    assert {p.stem for p in (tmp_path / "zoo").iterdir()} == set(OBJECTIVES)
    assert "figures:" in capsys.readouterr().out


def test_objectives_lists_name_formula_and_paper(capsys):
    from bandpo import OBJECTIVES

    assert main(["objectives"]) == 0
    out = capsys.readouterr().out
    for name, objective in OBJECTIVES.items():
        assert name in out
        assert objective.formula in out
        assert objective.paper in out


OWN = """
from bandpo import Clip, FDivergence, Objective

MINE = Objective(bounds=Clip(0.1, 0.3), name="mine", formula="clip of .1 and .3", paper="ours")
F = FDivergence("own", lambda u: 2 * (1 + u) - 4 * u.sqrt())
"""


def test_objectives_and_divergences_of_your_own_are_found_in_the_current_folder(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN)
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    assert main(["objectives", "own_parts:MINE", "grpo", "--plot", "figures"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("own_parts:MINE\n    clip of .1 and .3\n    ours\n") and "\n\ngrpo\n" in out
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"own_parts.MINE.png", "grpo.png"}
    assert main(["bounds", "--divergence", "own_parts:F,kl", "--no-figure"]) == 0
    assert "own, radius 0.05" in capsys.readouterr().out
    assert str(tmp_path) not in sys.path  # a folder `wandb` in it is no package
    wrong_ones = {"own_parts:NOPE": "could not be imported", "own_parts:MINE": "must be an FDivergence, got Objective"}
    for wrong, message in wrong_ones.items():
        assert main(["bounds", "--divergence", wrong, "--no-figure"]) == 2
        assert message in capsys.readouterr().err
    assert main(["objectives", "own_parts:F"]) == 2
    assert "pass a name" in capsys.readouterr().err


def test_objectives_are_filtered_and_printed_as_json(capsys):
    from bandpo import OBJECTIVES

    assert main(["objectives", "--filter", "GSPO"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["gspo", "luspo"]
    assert main(["objectives", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found] == list(OBJECTIVES)
    for row in found:
        objective = OBJECTIVES[row["name"]]
        assert (row["anchor"], row["extras"]) == (objective.anchor, sorted(objective.extras))
    assert main(["objectives", "--filter", "nothing like it"]) == 2
    assert "none of 49 objectives has it" in capsys.readouterr().err
    assert main(["objectives", "--filter", "gspo", "--plot", "x.png"]) == 2
    assert "name a folder for 2" in capsys.readouterr().err


def test_no_command_prints_the_help_and_version_the_version(capsys):
    assert main([]) == 0
    assert "commands" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert package.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bounds", "--divergence", "foo"], "'foo'.*kl, reverse_kl"),
        (["bounds", "--divergence", "alpha:x"], "alpha:x.*finite number"),
        (["bounds", "--radius", "-1"], "radius.*-1"),
        (["bounds", "--max-ratio", "0.2", "--no-figure"], "max_ratio.*0.2"),
        (["bounds", "--output", "band.doc"], "must end in .png"),
        (["bounds", "--match", "max_shift"], "--match max_shift needs several divergences"),
        (["bounds", "--divergence", "kl,tv", "--match", "upper", "--no-figure"], "choose 'upper@P'"),
        (["bounds", "--divergence", "kl,tv", "--match", "upper@2", "--no-figure"], "--match upper@2: .*probability"),
        (["bounds", "--divergence", "kl,tv", "--match", "outside_fraction"], "needs the tokens of a batch.*batch="),
        (["bounds", "--divergence", "kl,tv", "--match", "foo"], "--match foo: choose .* or 'max_shift'$"),
        (["bounds", "--divergence", "kl,tvv"], "'tvv'; did you mean 'tv'"),
        (["objectives", "--plot", "zoo.doc"], "must end in .png"),
        (["evaluate", "/no/such/model"], "model /no/such/model: there is no such folder"),
        (["evaluate", "x", "--task", "chess"], "chess.*countdown"),
        (["evaluate", "x", "--task", "countdown", "--dataset", "y"], "both set"),
        (["evaluate", "x", "--dataset", "y"], "needs --reward"),
        (["evaluate", "x", "--samples", "0"], "samples must be at least 1"),
        (["train", "--radiu", "0.1"], "unknown option 'radiu'; did you mean 'radius'"),
        (["train", "--task", "chess"], "chess.*countdown"),
        (["train", "--task", "countdwn"], "'countdwn'; did you mean 'countdown'. Choose one of countdown, "),
        (["train", "--method", "onlin-dpo"], "'onlin-dpo'; did you mean 'online-dpo'. Choose one of grpo, "),
        (["train", "--preset", "smolm2"], "'smolm2'; did you mean 'smollm2'"),
        (["train", "--objective", "bandpo"], "did you mean 'bandpo-"),
        (["train", "--radius", "-1"], "radius.*-1"),
        (["train", "--epsilon", "0.3"], "epsilon=0.3.*would be ignored"),
        (["train", "--config", "/no/such.yaml"], "cannot read /no/such.yaml"),
        (["train", "--config"], "--config needs a file"),
        (["train", "--model", "x"], "nothing to train on"),
        (["train", "--model", "x", "--dataset", "y.jsonl"], "needs reward"),
        (["train", "--eval_prompts", "0"], "eval_prompts must be at least 1"),
        (["train", "--resume_from_checkpoint", "/no/such"], "/no/such is no folder"),
        (["train", "--output_dir", "/dev/null"], "/dev/null is a file"),
        (["train", "--reward_errors", "ignore"], "reward_errors.*'ignore'.*stop, skip"),
        (["train", "--reward_timeout", "0"], "reward_timeout must be a positive number"),
        (["train", "--report_to", "paper"], "report_to: got 'paper'; choose from none, .*tensorboard"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("bandpo: ")
    assert re.search(words, error, flags=re.DOTALL), error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["tensorboard", "comet_ml"])
def test_a_logger_without_its_package_is_a_mistake_in_the_input(name, capsys, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, f"is_{name.removesuffix('_ml')}_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--report_to", name]) == 2
    error = capsys.readouterr().err
    assert f"report_to={name} needs a package: pip install {name.replace('_', '-')}, or set report_to: none" in error
    assert "bug" not in error
    assert list(tmp_path.iterdir()) == []


def parsed(*arguments):
    from bandpo.train.config import parse

    return parse(list(arguments))[:3]


@pytest.fixture(autouse=True)
def _hosts_are_noisy():
    """transformers warns of its own renamed options when a config is made."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


def test_command_line_wins_over_yaml_and_the_main_job_is_a_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("task: chain_sum\nlearning_rate: 1e-5\nradius: 0.1\nuse_cpu: true\nbf16: false\n")
    run, args, given = parsed("--config", str(file), "--radius", "0.2", "--seed=7")
    assert (run.task, args.learning_rate, args.radius, args.seed) == ("chain_sum", 1e-5, 0.2, 7)
    assert given == {
        "task": "chain_sum", "learning_rate": 1e-5, "radius": 0.2, "use_cpu": True, "bf16": False, "seed": 7,
    }  # fmt: skip
    run, args, given = parsed("--max_steps", "3")
    assert (run.task, args.objective, args.max_steps, args.num_generations) == ("countdown", "bandpo-kl", 3, 8)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(given))
    assert parsed("--config", str(again))[2] == given


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: countdown\nradiuss: 0.1\n", "unknown key 'radiuss'; did you mean 'radius'"),
        ("task: countdown\nlearning_rate: fast\n", "learning_rate: 'fast' is not a number"),
        ("radiuss: 0.1\nlearning_rate: fast\n", "(?s)2 mistakes.*unknown key 'radiuss'.*'fast' is not a number"),
        ("- a\n- b\n", "must hold keys and values"),
        ("a: [1\n", "is not YAML"),
        ("task: countdown\ndataset: x.jsonl\n", "both set"),
    ],
)
def test_bad_yaml_is_named(text, words, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        parsed("--config", str(file))


def test_help_of_train_starts_with_our_options(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "--config FILE.yaml" in shown
    assert shown.index("--task") < shown.index("--learning_rate")
    assert "--radius" in shown


def test_dry_run_prints_the_configuration(capsys):
    assert main(["train", "--dry_run", "--seed", "5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 5
    assert shown["objective"] == "bandpo-kl"
