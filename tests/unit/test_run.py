"""Whole runs of `bandpo train`, and the parts they are made of."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from command_line import bandpo, warm_bandpo

SMALL = [
    "--max_steps", "8", "--per_device_train_batch_size", "16", "--num_generations", "4", "--warm_up_steps", "100",
    "--eval_prompts", "6", "--eval_samples", "4", "--logging_steps", "2", "--save_steps", "3",
]  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dppo-topk-kl", ["--divergence_top_k", "5"]),  # a region that is no interval
        ("troll", ["--divergence_top_k", "8", "--radius", "0.001"]),  # a gradient through other tokens
        ("quatro-reading", []),  # one ratio for a sequence, statistics of groups
        ("bapo", []),  # bounds of the batch
        ("bandpo-kl", ["--radius_target", "clip_fraction=0.01", "--dynamic_sampling", "2"]),
        ("ppo-kl", ["--kl_penalty_target", "1e-9"]),  # no region: a penalty that adapts
    ],
)
def test_any_region_trains_and_has_a_report(name, options, tmp_path):
    result = warm_bandpo("train", "--objective", name, *options, *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert name in (folder / "report.html").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "clip_fraction_by_prob/any/0.1:0.5" in rows[0]
    if name == "ppo-kl":
        betas = [row["band/kl_penalty"] for row in rows if "band/kl_penalty" in row]
        assert betas[0] == 1 and betas[-1] > 1
    if options and name == "bandpo-kl":
        assert {"band/radius", "dynamic_sampling/rounds"} <= {key for row in rows for key in row}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("task", ["countdown", "chain_sum", "letter_counting"])
def test_train_leaves_everything_it_promises(task, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = warm_bandpo("train", "--task", task, *SMALL, cwd=tmp_path)
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
        == {"mean@4", "pass@1", "pass@2", "pass@4", "maj@4", "groups with signal", "unscored"}
    )
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["stage"] for s in samples] == ["before"] * 6 + ["after"] * 6
    environment = json.loads((folder / "env.json").read_text())
    assert environment["seed"] == 0
    assert set(environment["versions"]) >= {"bandpo", "torch", "trl"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_steps"] == 8
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 5 + 2  # the curves, and the trust region
    assert page.count("mean@4</td>") == 1 and "pass@1</td>" not in page and "What the doctor finds" in page
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|<script""", page)  # nothing is fetched, nothing runs
    AutoModelForCausalLM.from_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder / "model")
    scored = warm_bandpo(
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
    assert warm_bandpo("train", "--task", task, "--output_dir", str(folder), *SMALL, cwd=tmp_path).returncode == 2


@pytest.mark.usefixtures("offline")
def test_same_seed_same_run_and_config_repeats_it_and_resume_joins_it(tmp_path):
    first = bandpo("train", *SMALL, "--output_dir", "a", cwd=tmp_path)  # a new process; the others are forks
    assert first.returncode == 0, first.stderr
    again = warm_bandpo("train", "--config", "a/config.yaml", "--output_dir", "b", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    starts = Path(os.environ["BANDPO_CACHE"], "warmup").glob("countdown-*/model.safetensors")
    assert weights[0] not in [start.read_bytes() for start in starts]  # it did learn something to be equal in

    numbers = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("a", "b")]
    assert numbers[0] == numbers[1]
    # step 3 falls inside a rollout's four optimisation steps, and between two logs: resumed from there, the run ends as it did
    options = [*SMALL, "--output_dir", "c", "--save_total_limit", "5"]
    for resume in ([], ["--resume_from_checkpoint", "c/checkpoint-3"]):
        result = warm_bandpo("train", *options, *resume, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "c" / "model" / "model.safetensors").read_bytes() == weights[0]
    assert (tmp_path / "c" / "metrics.jsonl").read_bytes() == numbers[0]
    samples = (tmp_path / "c" / "samples.jsonl").read_text()
    assert samples == (tmp_path / "a" / "samples.jsonl").read_text()


@pytest.mark.usefixtures("offline")
def test_any_model_and_dataset_with_a_reward_of_yours(tmp_path):
    from bandpo.toy.models import WarmUp, build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(WarmUp(hidden_size=16, layers=1), tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"what is {i}+1?", "reward_model": {"ground_truth": str(i + 1)}} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions, answer, **_):\n    assert all(a.isdigit() for a in answer)\n"
        "    return [float(len(c) < 5) for c in completions]\n\n\n"
        "def steps(prompts, completions, **_):\n    return [None if i % 2 else 0.5 for i in range(len(completions))]\n"
    )
    (tmp_path / "run.yaml").write_text(
        "model: model\ndataset: data.jsonl\nprompt_column: question\nanswer_column: reward_model.ground_truth\n"
        "reward: [my_rewards:short, my_rewards:steps]\nreward_weights: [1.0, 0.25]\n"
        "system_prompt: Be brief.\nobjective: bandpo-tv\nradius: 0.1\nmax_completion_length: 6\nnum_iterations: 2\n"
        "per_device_train_batch_size: 8\nnum_generations: 4\nsteps_per_generation: 2\nmax_steps: 4\nuse_cpu: true\n"
        "bf16: false\ngradient_checkpointing: false\nreport_to: none\neval_prompts: 8\neval_samples: 2\nlora_rank: 2\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = warm_bandpo("train", "--config", "run.yaml", "--output_dir", "out", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "report.html").exists()
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["prompt"].startswith("Be brief.\n\nwhat is")
    assert {r for row in samples for r in row["rewards"]} <= {0.0, 1.0}  # the first reward scores the evaluation
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        parts = (row["rewards/short/mean"], row["rewards/steps/mean"])
        assert parts[1] == 0.5 and row["reward"] == pytest.approx(parts[0] + 0.25 * 0.5 * 0.5)  # half of them unscored
    assert "my_rewards:steps' left" in result.stdout and "1 my_rewards:short + 0.25 my_rewards:steps" in card(tmp_path)
    again = warm_bandpo(
        "evaluate", "out", "--reward", "my_rewards:short", "--prompts", "2", cwd=tmp_path, env=environment
    )
    assert again.returncode == 0 and "reward my_rewards:short" in again.stdout, again.stderr


def card(folder):
    return (folder / "out" / "README.md").read_text()


def test_datasets_and_rewards_are_checked(tmp_path):
    from bandpo.train.data import load_prompts, split_prompts
    from bandpo.train.rewards import get_reward, math_reward

    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "", "answer": "2"}\n')
    common = {"config": None, "split": "train", "system_prompt": None, "chat": False}
    with pytest.raises(ValueError, match="1 rows have no 'prompt', the first is row 2"):
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
    from bandpo.toy.tasks import TASKS, make_splits, score

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
    from matplotlib.figure import Figure

    from bandpo.train.report import write_report

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
    page = write_report(folder, title=attack, figures={attack: Figure()})
    text = page.read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 7


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("seed", [0, 1, 2] if os.environ.get("BANDPO_NIGHTLY") else [0])
def test_main_job_learns(tmp_path, seed):
    """`bandpo train` as `make train` runs it: held-out mean@8 rises by at least 0.10; each night for three seeds.

    One seed tells. By the five seeds of docs/start.md the rise is 0.132, with a standard deviation of 0.0064 between seeds
    (0.008 = 2.78 * 0.0064 / sqrt(5)), so that the bound is five of them below it. What has learned nothing differs from 0 by
    the noise of 2 * 2048 samples, at most sqrt(2 * 0.277 * 0.723 / 2048) = 0.014: the bound is seven of these above it.
    """
    result = warm_bandpo("train", "--output_dir", "run", "--seed", str(seed), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["mean@8"] >= evaluation["before"]["mean@8"] + 0.10
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["clip_ratio/region_mean"] for row in rows if "clip_ratio/region_mean" in row) > 0.001


def test_progress_is_a_bar_on_a_terminal(tmp_path):
    import io

    from rich.console import Console
    from transformers import TrainerControl, TrainerState

    from bandpo.train.progress import Progress, TrainingProgress

    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n{"step": 4, "cut o')
    callback = TrainingProgress(progress, tmp_path)
    state, control = TrainerState(max_steps=4, global_step=2, is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(None, state, control)
    state.global_step = 4
    callback.on_log(None, state, control, logs={"reward": 0.25, "step_time": 1.5})
    callback.on_train_end(None, state, control)
    shown = progress.console.file.getvalue()
    assert "4/4" in shown
    assert "reward 0.250" in shown
    # the steps after the checkpoint are run again, and so logged again
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 4, "reward": 0.25}\n'
    assert (tmp_path / "timings.jsonl").read_text() == '{"step": 4, "step_time": 1.5}\n'


@pytest.mark.usefixtures("offline")
def test_a_mistake_in_the_data_leaves_no_folder_behind(tmp_path):
    options = ["--task", "chain_sum", "--reward", "nowhere:f", "--use_cpu", "true", "--bf16", "false", *SMALL]
    result = warm_bandpo("train", *options, "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 2
    assert "could not be imported" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("offline")
def test_kl_to_the_warmed_up_model(tmp_path):
    result = warm_bandpo("train", *SMALL, "--beta", "0.05", "--delta", "10", "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["kl"] > 0
