"""`bandpo doctor` on configurations of each host, logs, batches and runs' folders."""

import json
from pathlib import Path

import pytest

from bandpo import KL, Band, Clip
from bandpo.cli import main
from bandpo.doctor.command import read_config

RECIPES = Path(__file__).parents[2] / "src" / "bandpo" / "recipes"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write(name, text):
    Path(name).write_text(text)
    return Path(name)


def rules(capsys, *arguments):
    status = main(["doctor", *map(str, arguments), "--json"])
    out = json.loads(capsys.readouterr().out)
    return status, {f["rule"]: f["level"] for section in out for f in section["findings"]}


def test_a_plain_trl_file_is_that_of_trl_s_own_loss(capsys):
    path = write("grpo.yaml", "model_name_or_path: Qwen/Qwen2.5-0.5B\ndataset_name: trl-lib/x\nlearning_rate: 1e-6\n"
                 "per_device_train_batch_size: 8\ngradient_accumulation_steps: 4\nepsilon: 0.2\nepsilon_high: "
                 "0.28\nbf16: true\n"
                 "loss_type: dr_grpo\nuse_vllm: true\ntop_p: 0.95\n")  # fmt: skip
    setup = read_config(path)
    assert (setup.host, setup.ours, setup.steps) == ("TRL", False, 1.0)
    assert (setup.objective.bounds, setup.objective.aggregation) == (Clip(0.2, 0.28), "seq-mean-token-sum-norm")
    status, found = rules(capsys, path)
    assert status == 1
    assert found["inert"] == "problem" and found["sampling"] == "warning" and found["bypass"] == "note"
    assert found["unread"] == "note"  # the vocabulary of a model that is not here
    # one more pass over each rollout, no truncation: well
    status, found = rules(capsys, path, "num_iterations=2", "top_p=1.0")
    assert status == 0
    assert found["inert"] == "ok" and found["sampling"] == "ok"


@pytest.mark.parametrize(
    ("lines", "steps"),
    [("", 1.0), ("num_iterations: 3", 3.0), ("steps_per_generation: 8\ngradient_accumulation_steps: 2", 4.0),
     ("generation_batch_size: 64", 2.0), ("gradient_accumulation_steps: 4\nnum_iterations: 2", 2.0)],
)  # fmt: skip
def test_steps_for_each_rollout_as_trl_counts_them(lines, steps):
    """Against what TRL's trainer does: it keeps old log-probs exactly where a rollout serves more than one step."""
    path = write("a.yaml", f"objective: bandpo-kl\nper_device_train_batch_size: 8\nnum_generations: 4\n{lines}\n")
    assert read_config(path, processes=4).steps == steps


def test_generation_batch_size_is_shared_by_processes():
    path = write(
        "a.yaml",
        "objective: bandpo-kl\nper_device_train_batch_size: 8\nnum_generations: 8\ngeneration_batch_size: 256\n",
    )
    assert read_config(path, processes=8).steps == 4.0
    assert read_config(path, processes=1).steps == 32.0


def test_recipes_are_well(capsys):
    for path in (RECIPES / "trl" / "paper.yaml", RECIPES / "trl" / "paper_server.yaml"):
        setup = read_config(path, processes=8, vocabulary=151_936)
        assert (setup.host, setup.ours, setup.steps, setup.engine) == ("bandpo train", True, 4.0, "vLLM")
        assert setup.objective.bounds == Band(KL, 0.05, max_ratio=10.0)
    for method, level in (("bandpo-kl", "warning"), ("dppo-kl", "ok"), ("dppo-tv", "ok"), ("no-clip", "warning")):
        status, found = rules(capsys, RECIPES / "verl" / "config" / "paper.yaml", f"method={method}")
        assert (status, found["inert"], found["anchor"]) == (0, "ok", level)


def test_verl_s_overrides_as_text(capsys):
    path = write(
        "run.sh",
        """#!/bin/bash
# actor_rollout_ref.actor.ppo_epochs=7 in a comment does not count
python -m verl.trainer.main_ppo data.train_batch_size=256 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.rollout.name=sglang actor_rollout_ref.rollout.n=8 \\
    actor_rollout_ref.actor.policy_loss._target_=bandpo.integrations.verl.BandPolicyLossConfig \\
    actor_rollout_ref.actor.policy_loss.loss_mode=bandpo +actor_rollout_ref.actor.policy_loss.radius=0.03
""",
    )
    setup = read_config(path)
    assert (setup.host, setup.steps, setup.engine, setup.group) == ("verl", 1.0, "sglang", 8)
    assert setup.objective.bounds == Band(KL, 0.03, max_ratio=10.0)
    status, found = rules(capsys, path)
    assert (status, found["inert"]) == (1, "problem")
    status, found = rules(
        capsys, path, "actor_rollout_ref.actor.ppo_epochs=2", "algorithm.rollout_correction.rollout_is=token"
    )
    assert (status, found["inert"], found["anchor"]) == (0, "ok", "ok")
    bare = write(
        "bare.txt",
        "actor_rollout_ref.actor.policy_loss.loss_mode=bandpo\n+actor_rollout_ref.actor.policy_loss.radius=0.1\n",
    )
    assert rules(capsys, bare)[1]["bypass"] == "problem"  # verl refuses the key without the typed configuration
    vanilla = write("vanilla.txt", "actor_rollout_ref.actor.clip_ratio_high=0.28\n")
    assert read_config(vanilla).objective.bounds == Clip(0.2, 0.28)
    assert rules(capsys, vanilla)[1] == {
        "bypass": "note", "inert": "ok", "anchor": "warning", "sampling": "ok", "interval": "note",
        "assumed": "note",  # verl's own estimator, gae, has a critic and needs no groups
    }  # fmt: skip


def test_a_log_and_what_is_printed(capsys):
    write(
        "metrics.jsonl",
        "".join(json.dumps({"entropy": 0.9**i, "clip_ratio/region_mean": 0.01}) + "\n" for i in range(60)),
    )
    assert main(["doctor", "metrics.jsonl"]) == 0
    out = capsys.readouterr().out
    assert " ?? entropy: entropy went from 0.7" in out
    assert "\n      why: " in out and "\n      set: " in out
    assert out.rstrip().endswith("1 warning")
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "radiu: 0.1\nobjective: grpo", "unknown key 'radiu'; did you mean 'radius'"),
        ("a.yaml", "- 1\n- 2", "must hold keys and values, got list"),
        ("a.yaml", "a: [1", "is not YAML"),
        ("a.yaml", "!!python/object/apply:os.system ['touch pwned']", "is not YAML"),
        ("a.yaml", "objective: bandpo-kl\nradius: -1", "radius"),
        ("a.yaml", "objective: bandpo", "did you mean 'bandpo-"),
        ("a.yaml", "task: countdown\nmethod: dpo", "method='dpo' has no trust region"),
        ("a.yaml", "actor_rollout_ref: {actor: {ppo_epochs: many}}", "ppo_epochs: 'many' is not a number"),
        ("a.yaml", "actor_rollout_ref: {actor: {ppo_mini_batch_size: 0}}", "must be positive"),
        ("a.txt", "nothing here", "no override of the form key=value"),
        ("a.jsonl", "{}\n", "1 rows and none of the metrics"),
        ("a.jsonl", "[]\n", "a row is an object"),
        ("a.safetensors", "junk", "cannot be read as a batch"),
        ("a.doc", "", "use .yaml"),
    ],
)
def test_what_cannot_be_examined_is_one_line(name, text, message, capsys):
    write(name, text)
    assert main(["doctor", name]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("pwned").exists()


def test_a_log_after_a_file_that_cannot_be_read_is_still_a_log(capsys):
    write("run.jsonl", '{"entropy": 1.0}\n' * 3)
    Path("link.jsonl").symlink_to("run.jsonl")
    assert main(["doctor", "link.jsonl", "run.jsonl", "--json"]) == 2
    first, second = sorted(json.loads(capsys.readouterr().out), key=lambda section: section["file"])
    assert "symbolic link" in first["error"]
    assert "error" not in second and "columns" in {finding["rule"] for finding in second["findings"]}


def test_a_name_with_a_line_end_is_one_line(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "x\nbandpo: all is well.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\\nbandpo: all is well" in error


def test_other_mistakes(capsys):
    Path("empty").mkdir()
    write("m.jsonl", '{"entropy": 1.0}\n')
    for arguments, message in (
        (["empty"], "it is no run's folder"), (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["a=1"], "nothing to examine"), (["m.jsonl", "radius=1"], "overrides change a configuration, and none is given"),
        (["m.jsonl", "--processes", "0"], "--processes must be at least 1, got 0"),
    ):  # fmt: skip
        assert main(["doctor", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_patched_or_fused_loss_in_trl_is_a_problem(capsys, monkeypatch):
    from trl import GRPOTrainer

    path = write("a.yaml", "objective: bandpo-kl\nnum_iterations: 2\nper_device_train_batch_size: 8\n")
    assert rules(capsys, path)[1]["bypass"] == "ok"
    liger = write("b.yaml", "use_liger_kernel: true\nnum_iterations: 2\nper_device_train_batch_size: 8\n")
    assert rules(capsys, liger)[1]["bypass"] == "note"  # since 1.16 TRL's loss stays its own
    with monkeypatch.context() as m:
        m.setattr("bandpo.doctor.trl.importlib.metadata.version", lambda _: "1.15.2")
        assert rules(capsys, liger)[1]["bypass"] == "problem"

    def _compute_loss(self, model, inputs):
        return 0.0

    _compute_loss.__module__ = "unsloth_zoo.losses"
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", _compute_loss)
    status, found = rules(capsys, path)
    assert (status, found["bypass"]) == (1, "problem")
