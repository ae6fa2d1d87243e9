"""The commands as a user types them."""

import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import yaml

from bandpo.cli import main


def bandpo(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "bandpo", *arguments], capture_output=True, text=True, check=False, timeout=300, **kwargs
    )


def imported_by(code):
    """Names of the top-level packages that a piece of Python imports."""
    report = "import sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_help_does_not_import_torch_and_is_quick():
    assert "torch" not in imported_by("from bandpo.cli import _parser; _parser().format_help()")
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        result = bandpo("--help")
        seconds.append(time.perf_counter() - started)
    assert result.returncode == 0
    for command in ("train", "evaluate", "bounds", "objectives"):
        assert f"bandpo {command}" in result.stdout
    assert min(seconds) < 0.5


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


def test_objectives_lists_name_formula_and_paper(capsys):
    from bandpo import OBJECTIVES

    assert main(["objectives"]) == 0
    out = capsys.readouterr().out
    for name, objective in OBJECTIVES.items():
        assert name in out
        assert objective.formula in out
        assert objective.paper in out


def test_no_command_prints_the_help_and_version_the_version(capsys):
    import bandpo as package

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
        (["evaluate", "/no/such/model"], "cannot load /no/such/model"),
        (["evaluate", "x", "--task", "chess"], "chess.*countdown"),
        (["evaluate", "x", "--task", "countdown", "--dataset", "y"], "both set"),
        (["evaluate", "x", "--dataset", "y"], "needs --reward"),
        (["evaluate", "x", "--samples", "0"], "samples must be at least 1"),
        (["train", "--radiu", "0.1"], "unknown option 'radiu'; did you mean 'radius'"),
        (["train", "--task", "chess"], "chess.*countdown"),
        (["train", "--objective", "bandpo"], "did you mean 'bandpo-"),
        (["train", "--radius", "-1"], "radius.*-1"),
        (["train", "--epsilon", "0.3"], "epsilon=0.3.*would be ignored"),
        (["train", "--config", "/no/such.yaml"], "cannot read /no/such.yaml"),
        (["train", "--config"], "--config needs a file"),
        (["train", "--model", "x"], "nothing to train on"),
        (["train", "--model", "x", "--dataset", "y.jsonl"], "needs reward"),
        (["train", "--eval_prompts", "0"], "eval_prompts must be at least 1"),
        (["train", "--resume_from_checkpoint", "latest", "--output_dir", "/no/such"], "has no checkpoint"),
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


def parsed(*arguments):
    from bandpo.run.config import parse

    return parse(list(arguments))


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


SMALL = [
    "--max_steps", "8", "--per_device_train_batch_size", "16", "--num_generations", "4", "--warm_up_steps", "5",
    "--eval_prompts", "6", "--eval_samples", "4", "--logging_steps", "2", "--save_steps", "3",
]  # fmt: skip


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("task", ["countdown", "chain_sum", "letter_counting"])
def test_train_leaves_everything_it_promises(task, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = bandpo("train", "--task", task, *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == f"bandpo-kl-{task}-seed0"
    assert "\x1b" not in result.stdout  # plain lines without a terminal
    assert "step    2/8" in result.stdout
    assert "mean@4" in result.stdout
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"reward", "entropy", "clip_ratio/region_mean", "band/divergence_mean", "band/region_fraction"} <= set(
        rows[0]
    )
    assert [row["step"] for row in rows if "train_runtime" not in row] == [2, 4, 6, 8]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert (
        set(evaluation["before"])
        == set(evaluation["after"])
        == {"mean@4", "pass@1", "pass@2", "pass@4", "groups with signal"}
    )
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["stage"] for s in samples] == ["before"] * 6 + ["after"] * 6
    environment = json.loads((folder / "env.json").read_text())
    assert environment["seed"] == 0
    assert set(environment["versions"]) >= {"bandpo", "torch", "trl"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_steps"] == 8
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|<script""", page)  # nothing is fetched, nothing runs
    AutoModelForCausalLM.from_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder / "model")
    scored = bandpo(
        "evaluate",
        str(folder / "model"),
        "--task",
        task,
        "--prompts",
        "6",
        "--samples",
        "4",
        "--output",
        "e.json",
        cwd=tmp_path,
    )
    assert scored.returncode == 0, scored.stderr
    # the same prompts, the same seed: the very numbers of the run
    assert json.loads((tmp_path / "e.json").read_text())["mean@4"] == evaluation["after"]["mean@4"]
    # a second run goes beside the first, and into its folder only to resume
    assert bandpo("train", "--task", task, "--output_dir", str(folder), *SMALL, cwd=tmp_path).returncode == 2


@pytest.mark.usefixtures("cache")
def test_same_seed_same_run_and_config_repeats_it_and_resume_joins_it(tmp_path):
    first = bandpo("train", *SMALL, "--output_dir", "a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    again = bandpo("train", "--config", "a/config.yaml", "--output_dir", "b", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]

    def numbers(name):
        timing = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in timing} for row in rows if "train_runtime" not in row]

    assert numbers("a") == numbers("b")
    # resume b's checkpoint of step 6, inside a rollout's optimisation steps: the run ends as it did
    assert (tmp_path / "b" / "checkpoint-8").exists() or (tmp_path / "b" / "checkpoint-6").exists()
    stopped = bandpo("train", *SMALL, "--output_dir", "c", "--save_total_limit", "5", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    resumed = bandpo(
        "train",
        *SMALL,
        "--output_dir",
        "c",
        "--save_total_limit",
        "5",
        "--resume_from_checkpoint",
        "c/checkpoint-3",
        cwd=tmp_path,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "c" / "model" / "model.safetensors").read_bytes() == weights[0]
    assert numbers("c") == numbers("a")
    samples = (tmp_path / "c" / "samples.jsonl").read_text()
    assert samples == (tmp_path / "a" / "samples.jsonl").read_text()


@pytest.mark.usefixtures("cache")
def test_any_model_and_dataset_with_a_reward_of_yours(tmp_path):
    from bandpo.lab.models import WarmUp, build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(WarmUp(hidden_size=16, layers=1), tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"what is {i}+1?", "solution": str(i + 1)} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions, answer, **_):\n    return [float(len(c) < 5) for c in completions]\n"
    )
    (tmp_path / "run.yaml").write_text(
        "model: model\ndataset: data.jsonl\nprompt_column: question\nanswer_column: solution\nreward: my_rewards:short\n"
        "system_prompt: Be brief.\nobjective: bandpo-tv\nradius: 0.1\nmax_completion_length: 6\nnum_iterations: 2\n"
        "per_device_train_batch_size: 8\nnum_generations: 4\nsteps_per_generation: 2\nmax_steps: 4\nuse_cpu: true\n"
        "bf16: false\ngradient_checkpointing: false\nreport_to: none\neval_prompts: 8\neval_samples: 2\nlora_rank: 2\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = bandpo("train", "--config", "run.yaml", "--output_dir", "out", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "report.html").exists()
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["prompt"].startswith("Be brief.\n\nwhat is")


def test_datasets_and_rewards_are_checked(tmp_path):
    from bandpo.run.data import get_reward, load_prompts, math_reward, split_prompts

    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "", "answer": "2"}\n')
    common = {"config": None, "split": "train", "system_prompt": None, "chat": False}
    with pytest.raises(ValueError, match="1 rows have no 'prompt', the first is row 1"):
        load_prompts(str(file), prompt_column="prompt", answer_column="answer", **common)
    with pytest.raises(ValueError, match="no column 'question'; set prompt_column"):
        load_prompts(str(file), prompt_column="question", answer_column="answer", **common)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_prompts("nowhere.jsonl", prompt_column="prompt", answer_column="answer", **common)
    file.write_text("".join(json.dumps({"prompt": f"q{i // 2}", "answer": "1"}) + "\n" for i in range(20)))
    data = load_prompts(str(file), prompt_column="prompt", answer_column="answer", config=None, split="train",
                        system_prompt="S", chat=True)  # fmt: skip
    assert data[0]["prompt"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "q0"}]
    train, held_out = split_prompts(data, 4, seed=0)
    assert (len(train), len(held_out)) == (12, 4)
    assert not {str(p) for p in train["prompt"]} & {str(p) for p in held_out["prompt"]}
    with pytest.raises(ValueError, match="10 different prompts; holding out 10"):
        split_prompts(data, 10, seed=0)
    with pytest.raises(ValueError, match="'maths' is unknown"):
        get_reward("maths")
    with pytest.raises(ValueError, match="could not be imported"):
        get_reward("nowhere:f")
    with pytest.raises(ValueError, match="must be a function"):
        get_reward("math:pi")
    wrong_right = [r"\boxed{2}", [{"role": "assistant", "content": r"\boxed{\frac{1}{2}}"}]]
    assert math_reward(["", ""], wrong_right, ["$0.5$", "$0.5$"]) == [0.0, 1.0]


def test_tasks_split_without_leakage_and_score_their_answers():
    from bandpo.lab.tasks import TASKS, make_splits, score

    for task in TASKS.values():
        train, held_out = make_splits(task, 800)
        keys = [{task.key(json.loads(row["metadata"])) for row in rows} for rows in (train, held_out)]
        assert not keys[0] & keys[1]
        assert len(keys[1]) == len(held_out) == 256
        assert len({row["prompt"] for row in train}) == 800
        assert all(score(task.name, row["answer"], row["metadata"]) == 1 for row in [*train[:100], *held_out])
        assert all(len(row["answer"]) < task.max_completion_length for row in train)
        for junk in ("", " ", "((", "9" * 80, "9**9**9", "__import__('os')", "1+", "nan", "\x00", "½"):
            assert score(task.name, junk, held_out[0]["metadata"]) == 0
        assert make_splits(task, 50)[0] != make_splits(task, 50, seed=1)[0]
        assert make_splits(task, 50)[1] == make_splits(task, 50, seed=1)[1]
    with pytest.raises(ValueError, match=r"only .* different train rows"):
        make_splits(TASKS["chain_sum"], 50_000)
    with pytest.raises(ValueError, match="at most 512"):
        make_splits(TASKS["chain_sum"], 50, 513)
    row = {"numbers": [2, 3, 4], "target": 5}
    assert score("countdown", "4+3-2", json.dumps(row)) == 1  # another right answer than the generator's
    assert score("countdown", "4+3-2+0", json.dumps(row)) == 0
    assert score("countdown", "2+3", json.dumps(row)) == 0


def test_report_escapes_what_models_write(tmp_path):
    from bandpo import Band
    from bandpo.run.report import write_report

    folder = Path(tmp_path)
    attack = "<script>alert(1)</script>"
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5, "entropy": 0.3}) + "\n")
    (folder / "samples.jsonl").write_text(
        "".join(
            json.dumps({"stage": s, "prompt": attack, "completions": [attack], "rewards": [1.0]}) + "\n"
            for s in ("before", "after")
        )
    )
    numbers = {"mean@1": 0.5}
    (folder / "evaluation.json").write_text(
        json.dumps({"before": numbers, "after": numbers, "prompts": 1, "samples": 1, "temperature": 1.0})
    )
    (folder / "config.yaml").write_text(f"objective: '{attack}'\n")
    (folder / "env.json").write_text(
        json.dumps({"command": attack, "versions": {"bandpo": "0"}, "seconds": 1.0, "device": "cpu"})
    )
    page = write_report(
        folder, title=attack, bounds=Band(), bounds_label="x", tokens={"p": [], "ratio": [], "clipped": []}
    )
    text = page.read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 7


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_main_job_learns(seed, tmp_path):
    """`bandpo train` as `make train` runs it: held-out mean@8 rises by at least 0.10, for each of three seeds."""
    result = bandpo("train", "--seed", str(seed), "--output_dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["mean@8"] >= evaluation["before"]["mean@8"] + 0.10
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["clip_ratio/region_mean"] for row in rows if "clip_ratio/region_mean" in row) > 0.001


def test_progress_is_a_bar_on_a_terminal(tmp_path):
    import io

    from rich.console import Console
    from transformers import TrainerControl, TrainerState

    from bandpo.run.progress import Progress, TrainingProgress

    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
    callback = TrainingProgress(progress, tmp_path / "m.jsonl")
    state, control = TrainerState(max_steps=4, global_step=2, is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(None, state, control)
    state.global_step = 4
    callback.on_log(None, state, control, logs={"reward": 0.25})
    callback.on_train_end(None, state, control)
    shown = progress.console.file.getvalue()
    assert "4/4" in shown
    assert "reward 0.250" in shown
    # the steps after the checkpoint are run again, and so logged again
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [1, 4]
