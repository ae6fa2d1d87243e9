"""Commands on other inputs than those first reported: other hosts, secrets that a file holds, models that name code."""

import json
import os
from pathlib import Path

import pytest

from bandpo._system.secrets import HIDDEN, hide, redact_text
from bandpo.cli import main
from bandpo.train.data import load_tokenizer
from bandpo.train.rewards import CheckedReward, RewardError

TOKEN = "hf_" + "Q" * 34
PLAIN = "plain-secret-987"
MAIN = "python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8 "
GRPO = "reward_funcs: [a]\nnum_generations: 8\n"
VERL = "actor_rollout_ref: {rollout: {n: 8}}\n"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.sh", f"{MAIN} +trainer.api_key={PLAIN}$X +x.password={PLAIN}${{Y}}"),
        ("b.sh", f"{MAIN} --config-path https://u:{PLAIN}@h/p?token={PLAIN}"),
        ("c.sh", f"{MAIN} --token {PLAIN}$Z --token={PLAIN}$Z 'password: {PLAIN}'$C Authorization=Bearer\\ {PLAIN}$D"),
        ("d.sh", f"{MAIN} {TOKEN}$A a.b={TOKEN}$A"),
        ("e.sh", f"{MAIN} a.b=https://u{'x' * 60}:{PLAIN}@h$A {'x' * 330},https://uuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuu:{PLAIN}@h$A"),
        ("f.yaml", f"{GRPO}model_name_or_path: https://u:{PLAIN}@h/x?token={PLAIN}\nloss_type: {TOKEN}\n"),
        ("g.yaml", f"{GRPO}objective: '{TOKEN}:of'\n"),
        ("h.yaml", f"{GRPO}https://u:{PLAIN}@h: 3\n"),
        ("i.yaml", f"{VERL}algorithm: {{adv_estimator: '{TOKEN}'}}\n"),
        ("j.yaml", f"defaults: ['{TOKEN}', {{'model': 'https://u:{PLAIN}@h'}}]\n{VERL}"),
        ("k.yaml", f"actor_rollout_ref: {{rollout: {{n: 8, name: 'https://u:{PLAIN}@h'}}}}\n"),
        ("l.yaml", f"actor_rollout_ref: {{actor: {{policy_loss: {{loss_mode: '{TOKEN}'}}}}, rollout: {{n: 8}}}}\n"),
        ("m.yaml", f"{VERL}algorithm: {{adv_estimator: 'https://{'u' * 60}:{PLAIN}@h'}}\n"),
    ],
)  # fmt: skip
def test_the_doctor_does_not_print_the_secrets_of_a_file(name, text, form, capsys):
    Path(name).write_text(text)
    main(["doctor", name, *form])
    output = "".join(capsys.readouterr())
    assert HIDDEN in output
    assert PLAIN[:9] not in output and TOKEN not in output


OTHERS = {
    "torchtune": "loss: {_component_: torchtune.dev.grpo.loss.GRPOSimpleLoss, epsilon: 0.2}\ntemperature: 1.0\ntop_k: null\n",
    "LLaMA-Factory": "model_name_or_path: x\nstage: ppo\ndo_train: true\ntop_k: 0\ntop_p: 0.9\n",
    "Axolotl": "base_model: x\nrl: grpo\nmax_steps: 100\n",
    "ROLL": "rollout_batch_size: 64\nadv_estimator: grpo\nactor_train: {model_args: {dtype: bf16}}\npretrain: q\n",
    "TRL's RLOOTrainer": "num_generations: 2\nnum_iterations: 1\nnormalize_advantages: true\n",
    "one of TRL's distillation trainers": "teacher_model_name_or_path: x\nnum_generations: 2\ntop_k: 0\n",
}


@pytest.mark.parametrize("host", OTHERS)
def test_other_hosts_are_named(host, capsys):
    Path("other.yaml").write_text(OTHERS[host])
    assert main(["doctor", "other.yaml"]) == 2
    assert f"this looks like {host}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "model_name_or_path: x\ntrust_remote_code: true\nlearning_rate: 2e-5\npacking: true\n",
        "model_name_or_path: x\nbeta: 0.1\nloss_type: sigmoid\ndisable_dropout: true\nsync_ref_model: true\n",
        "reward_model_path: y\nmax_new_tokens: 64\ntemperature: 0.9\ntop_p: 0.9\nvllm_mode: colocate\n",
        "beta: 0.1\nmax_completion_length: 256\nloss_type: simpo\n",
        "temperature: 0.6\ntop_p: 0.95\ntop_k: 20\nmin_p: 0\nrepetition_penalty: 1.05\n",
    ],
)
def test_settings_that_other_trainers_have_too_do_not_make_a_file_grpo_s(text, capsys):
    Path("other.yaml").write_text(text)
    assert main(["doctor", "other.yaml"]) == 2
    assert "is not recognised" in capsys.readouterr().err


def folder(name, **files):
    Path(name).mkdir()
    for file, content in files.items():
        Path(name, f"{file}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("base", ["plain", os.curdir])
def test_an_adapter_that_names_code_is_refused(base):
    folder("plain", config={"model_type": "llama"})
    folder("adapter", adapter_config={
        "peft_type": "LORA", "base_model_name_or_path": base, "megatron_config": {"a": 1}, "megatron_core": "pwn"
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"adapter_config.json: megatron_.* names code that is elsewhere"):
        load_tokenizer("adapter", trust_remote_code=False)


def test_an_adapter_s_base_that_names_code_is_refused():
    folder(
        "base", config={"model_type": "llama", "text_config": {"_attn_implementation_internal": "stranger/attention"}}
    )
    folder("adapter", adapter_config={
        "peft_type": "LORA", "base_model_name_or_path": "base", "megatron_config": None, "megatron_core": "megatron.core"
    })  # fmt: skip
    for name in ("base", "adapter"):
        with pytest.raises(ValueError, match=r"base.config.json: _attn_implementation_internal names code"):
            load_tokenizer(name, trust_remote_code=False)


def test_a_model_that_names_code_is_refused_before_training(capsys):
    folder("model", config={"model_type": "llama", "attn_implementation": "stranger/attention"})
    Path("data.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 8)
    command = ["train", "--model", "model", "--dataset", "data.jsonl", "--reward", "math", "--output_dir", "out"]
    command += ["--bf16", "false", "--use_cpu", "true"]
    assert main(command) == 2
    assert "attn_implementation names code that is elsewhere" in capsys.readouterr().err


def test_the_working_directory_of_a_shell_is_no_secret(monkeypatch, tmp_path):
    """Every shell has it in the environment, under a name that means a password elsewhere."""
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("MYSQL_PWD", PLAIN)
    assert hide(f"{tmp_path}/rw.py") == f"{tmp_path}/rw.py"
    assert redact_text(f"at {tmp_path}/rw.py:2 with {PLAIN}") == f"at {tmp_path}/rw.py:2 with {HIDDEN}"


@pytest.mark.parametrize("name", ["kl", "policy_loss", "actor/ppo_kl", "actor/kl_loss", "critic/vf_loss", "loss/aux"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", '"nan"', '"-Infinity"'])
def test_a_log_in_which_anything_of_the_update_is_nan_is_a_problem(name, value, capsys):
    Path("log.jsonl").write_text(f'{{"entropy": 1.0, "loss": 0.1, "{name}": {value}}}\n' * 6)
    assert main(["doctor", "log.jsonl"]) == 1
    assert f"!! nonfinite: {name} is not finite in 6 rows" in " ".join(capsys.readouterr().out.split())


def test_a_log_in_which_a_score_has_no_number_is_a_warning(capsys):
    Path("log.jsonl").write_text('{"entropy": 1.0, "rewards/format/mean": NaN, "n": 1e999}\n' * 6)
    assert main(["doctor", "log.jsonl"]) == 0
    assert "?? nonfinite: not finite in some rows: rewards/format/mean, n" in " ".join(capsys.readouterr().out.split())


def test_a_log_of_nothing_but_nan_is_examined(capsys):
    Path("log.jsonl").write_text('{"kl": NaN}\n' * 6)
    assert main(["doctor", "log.jsonl"]) == 1
    assert "kl is not finite in 6 rows" in capsys.readouterr().out


def test_what_a_failed_reward_says_is_kept_without_secrets(tmp_path):
    def asks_a_server(completions, **_):
        raise ValueError(f"cannot reach https://me:{PLAIN}@host/x?sig={PLAIN} with token={PLAIN}")

    reward = CheckedReward(asks_a_server, "mine", folder=tmp_path)
    with pytest.raises(RewardError):
        reward(prompts=["p"], completions=["token=of-the-model"])
    [row] = [json.loads(line) for line in (tmp_path / "failed_reward.jsonl").read_text().splitlines()]
    assert "cannot reach https://<hidden>@host" in row["error"]
    assert "https://<hidden>@host" in row["traceback"]
    assert PLAIN not in row["error"] + row["traceback"]
    assert row["completion"] == "token=of-the-model"
