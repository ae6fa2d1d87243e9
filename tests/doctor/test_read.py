"""The doctor says only what it read: other frameworks are named, what is not resolved is unread, defaults are assumed."""

import json
from pathlib import Path

import pytest
import torch

from bandpo import Clip
from bandpo._system.files import read_yaml
from bandpo.cli import main
from bandpo.doctor import command, examine_batch, examine_setup, verl
from bandpo.doctor.command import read_config
from bandpo.doctor.shell import read_script
from bandpo.doctor.verl import read_verl


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return Path(name)


def examined(path, capsys, *overrides):
    """Status, and findings by rule; `unread` as a list."""
    status = main(["doctor", str(path), *overrides, "--json"])
    captured = capsys.readouterr()
    if status == 2:
        return 2, captured.err
    found = [f for section in json.loads(captured.out) for f in section["findings"]]
    rules = {f["rule"]: f for f in found if f["rule"] != "unread"}
    return status, {**rules, "unread": [f["seen"] for f in found if f["rule"] == "unread"]}


OTHERS = {
    "SkyRL": ("sft.sh", "uv run --isolated --extra fsdp -m skyrl.train.main_sft sft.epochs=2\n"),
    "slime": ("convert.sh", "PYTHONPATH=/root/slime python tools/convert_hf_to_torch_dist.py --save x\n"),
    "OpenRLHF": ("dpo.sh", "python3 -m openrlhf.cli.train_dpo --actor.model_name_or_path x --kl=1e-3\n"),
    "NeMo-RL": ("dpo.yaml", "defaults: dpo.yaml\ncluster: {gpus_per_node: 8}\n"),
    "NeMo-RL, but not its GRPO": ("ppo.yaml", "defaults: ppo.yaml\nppo: {ppo_epochs: 2}\nloss_fn: {}\npolicy: {}\n"),
    "rLLM with its backend 'tinker'": ("tinker.sh", "python train.py rllm/backend=tinker rllm.rollout.train.top_p=1.0\n"),
    "miles": ("miles.sh", "cd /root/miles/ && python3 train.py --rollout-batch-size 8\n"),
    "prime-rl": ("rl.yaml", "trainer: {}\norchestrator: {batch_size: 512}\ninference: {}\n"),
    "EasyR1": ("easy.yaml", "data: {}\nalgorithm: {adv_estimator: grpo}\nworker: {actor: {}, rollout: {n: 5}}\ntrainer: {}\n"),
    "verl's SFT trainer": ("sft.sh", "torchrun -m verl.trainer.fsdp_sft_trainer data.train_files=a.parquet \\\n"
                           "  data.train_batch_size=256 model.partial_pretrain=Qwen trainer.total_epochs=2 optim.lr=1e-5\n"),
    "verl's SFT trainer ": ("sft.yaml", "data: {}\nmodel: {partial_pretrain: x}\noptim: {lr: 1e-5}\ntrainer: {}\n"),
    "accelerate": ("fsdp.yaml", "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 8\n"),
    "a launch line of accelerate; examine recipes/grpo.yaml": (
        "run.sh", "ACCELERATE_LOG_LEVEL=info accelerate launch --config_file zero3.yaml --num_processes=7 src/grpo.py \\\n"
        "  --config recipes/grpo.yaml --a.b=1 output.dir=x\n"),
    "a launch line of TRL; examine grpo.yaml": ("trl.sh", "trl grpo --config grpo.yaml\n"),
    "LLaMA-Factory": ("llama.yaml", "stage: grpo\ndo_train: true\nfinetuning_type: lora\ntemplate: qwen\nnum_generations: 4\n"),
    "ms-swift": ("swift.sh", "swift sft --model Qwen/Qwen2.5-7B --dataset x\n"),
    "Axolotl": ("axolotl.yaml", "base_model: x\nrl: grpo\ndatasets: [{path: y}]\n"),
    "DeepSpeed": ("zero.yaml", "zero_optimization: {stage: 3}\n"),
}  # fmt: skip


def test_what_ray_is_told_is_no_setting_of_verl():
    path = write(
        "dapo.sh",
        'ray job submit --runtime-env="${PWD}/env.yaml" --working-dir "${PWD}" -- python3 -m recipe.dapo.main_dapo '
        "data.train_batch_size=64 actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.actor.clip_ratio_high=0.28 "
        "actor_rollout_ref.rollout.n=4",
    )
    setup = read_config(path)
    assert (setup.host, setup.group) == ("verl", 4) and not any("may set anything" in line for line in setup.unread)


@pytest.mark.parametrize("host", OTHERS)
def test_another_framework_s_file_is_named_and_refused(host, capsys):
    status, message = examined(write(*OTHERS[host]), capsys)
    assert status == 2
    assert f"this looks like {host.strip()}" in message
    assert "the doctor reads files of TRL's GRPOConfig, of verl's main_ppo" in message


@pytest.mark.parametrize(
    ("name", "text"),
    [("compose.yaml", "services: {web: {image: x}}\n"), ("sft.yaml", "model_name_or_path: x\npacking: true\n"),
     ("dpo.yaml", "beta: 0.1\nloss_type: sigmoid\n"), ("x.sh", "python train.py data.train_batch_size=8\n"),
     ("data.yaml", "data: {}\nalgorithm: {adv_estimator: grpo}\n"), ("hydra.yaml", "defaults: [base, _self_]\n"),
     ("x.txt", "algorithm.adv_estimator=grpo\ndata.train_batch_size=8\n"), ("empty.yaml", "{}\n")],
)  # fmt: skip
def test_a_file_without_a_key_of_its_own_is_nobody_s(name, text, capsys):
    status, message = examined(write(name, text), capsys)
    assert status == 2
    assert "is not recognised: it has no setting that only one of these has" in message


VERL = "python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo actor_rollout_ref.rollout.name=vllm "


@pytest.mark.parametrize(
    ("script", "rule", "unread"),
    [
        (VERL + "actor_rollout_ref.rollout.n=$N", "group", "not resolved: actor_rollout_ref.rollout.n=$N"),
        (VERL + 'actor_rollout_ref.rollout.n="$1"', "group", "actor_rollout_ref.rollout.n=$1"),
        (VERL + "algorithm.rollout_correction.bypass_mode=$bypass", "anchor", "bypass_mode=$bypass"),
        (VERL + "algorithm.rollout_correction.rollout_is=$is", "anchor", "rollout_is=$is"),
        (VERL + "data.train_batch_size=$B actor_rollout_ref.actor.ppo_mini_batch_size=64", "inert", "train_batch_size=$B"),
        (VERL + "actor_rollout_ref.rollout.temperature=${T}", "sampling", "temperature=${T}"),
        (VERL + "actor_rollout_ref.actor.policy_loss.loss_mode=$loss", "bypass", "loss_mode=$loss"),
        (VERL + "actor_rollout_ref.actor.clip_ratio_high=$high", "interval", "clip_ratio_high=$high"),
        ("source env.sh\n" + VERL + "$EXTRA", "group", "$EXTRA (line 2) is not resolved and may set anything"),
        ("A=actor_rollout_ref.rollout.n=1\n" + VERL + "${!A}", "group", "A sets actor_rollout_ref.rollout.n"),
        (f'ssh host "{VERL} actor_rollout_ref.rollout.n=1"', "group", "a quoted text sets"),
        ("source env.sh\n" + VERL + "actor_rollout_ref.rollout.n=${N:-8}", "group", "line 1: source env.sh' may set"),
        ("[ -f x ] && N=1\n" + VERL + "actor_rollout_ref.rollout.n=${N:-8}", "group", "rollout.n=${N:-8} (line 2)"),
        (VERL + "actor_rollout_ref.rollout.n={1,2}", "group", "rollout.n={1,2} (line 1)"),
        (VERL + "${ARGS[@]}", "inert", "${ARGS[@]} (line 1) is not resolved"),
        (VERL + "--config-name=mine", "group", "--config-name mine: that configuration is not read"),
        (VERL + "--config-path /x --config-name ppo_trainer", "inert", "--config-path /x"),
        (VERL + "\\\n  # a comment ends the command\n  actor_rollout_ref.rollout.n=1", "group", "outside of the command sets"),
        (VERL + "actor_rollout_ref.rollout.n=1\n" + VERL + "actor_rollout_ref.rollout.n=8", "group", "2 commands run verl, a"),
        ("python -m recipe.dapo.main_dapo actor_rollout_ref.actor.ppo_epochs=1", "group", "is not verl's main_ppo"),
        (VERL + "<<EOF\nactor_rollout_ref.rollout.n=1\nEOF", "", "here-document that ends with EOF"),
        (VERL + "$@", "", "$@ (the arguments of the script) is taken as empty"),
    ],
)  # fmt: skip
def test_what_a_script_leaves_open_is_unread_and_no_rule_judges_by_it(script, rule, unread, capsys):
    _, found = examined(write("run.sh", script + "\n"), capsys)
    assert any(unread in line for line in found["unread"]), found["unread"]
    if rule:
        assert found[rule]["level"] == "note"
        assert found[rule]["seen"].startswith("not known") or "is not known" in found[rule]["seen"]


@pytest.mark.parametrize(
    ("script", "note"),
    [
        (VERL + "actor_rollout_ref.rollout.n=${N:-1}", "taken as not set in the environment: N"),
        (VERL + "actor_rollout_ref.rollout.n=${1:-1}", "$@ (the arguments of the script) is taken as empty"),
        (VERL + "actor_rollout_ref.rollout.n=$((8 / (2 * 4)))", ""),
        ("N=2\nM=$((N - 1))\n" + VERL + "actor_rollout_ref.rollout.n=$M", ""),
        ("A=(actor_rollout_ref.rollout.n=1)\n" + VERL + '"${A[@]}"', ""),
        ('A="actor_rollout_ref.rollout.n=1 trainer.x=2"\n' + VERL + "$A", ""),
        ("A=(\n  actor_rollout_ref.rollout.n=1  # one\n)\nB=(${A[@]})\n" + VERL + "${B[@]}", ""),
        ("A=(a.b=1)\nA+=(actor_rollout_ref.rollout.n=1)\n" + VERL + '"${A[@]}"', ""),
        ('A="\n  data.train_files=$HOME/x \\\n  actor_rollout_ref.rollout.n=1"\n' + VERL + "$A", "train_files=$HOME/x"),
        ("if [ -z $N ]; then N=1; fi\n" + VERL + "actor_rollout_ref.rollout.n=$N", "not set in the environment: N"),
        ("case big in big) N=1;; *) N=8;; esac\n" + VERL + "actor_rollout_ref.rollout.n=$N", ""),
        ("run() { " + VERL + "actor_rollout_ref.rollout.n=$1; }\nrun 1", ""),
        ("while [ $# -gt 0 ]; do N=$1; shift; done\n" + VERL + "actor_rollout_ref.rollout.n=${N:-1}", "environment: N"),
        ('eval "$(conda shell.bash hook)"\nsource venv/bin/activate\n' + VERL + "actor_rollout_ref.rollout.n=${N:-1}", ": N"),
        ("A=a-1-x\nB=${A#*-}\n" + VERL + "actor_rollout_ref.rollout.n=${B%%-*}", ""),
        (f'bash -c "{VERL} actor_rollout_ref.rollout.n=1"', ""),
        (f'export N=1\nbash -c \'{VERL} actor_rollout_ref.rollout.n=$N\'', ""),
        (f'CMD="{VERL} actor_rollout_ref.rollout.n=1"\neval $CMD', ""),
    ],
)  # fmt: skip
def test_what_a_shell_would_expand_is_read(script, note, capsys):
    _, found = examined(write("run.sh", script + "\n"), capsys)
    assert found["group"]["level"] == "problem"
    assert found["group"]["seen"] == "one completion for each prompt"
    assert any(note in line for line in found["unread"]) if note else not found["unread"], found["unread"]


def test_what_a_script_says_is_read(capsys):
    path = write("run.sh", """#!/usr/bin/env bash
set -xeuo pipefail
NNODES=${NNODES:-1}
LOG=(trainer.logger='["console","wandb"]')
if [ "$NNODES" = 1 ]; then echo one; fi
CUDA_VISIBLE_DEVICES=0 python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo "data.train_batch_size=256" \\
    data.train_files="$HOME/a.parquet" actor_rollout_ref.actor.ppo_mini_batch_size='64' \\
    +actor_rollout_ref.actor.ppo_epochs=2 actor_rollout_ref.rollout.n=8 actor_rollout_ref.rollout.n=16 \\
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.actor.clip_ratio_high=0.28 "${LOG[@]}" $@ 2>&1 | tee log.txt
""")  # fmt: skip
    setup = read_verl(path)
    assert (setup.steps, setup.group, setup.engine) == (8.0, 16, "vllm")  # Hydra takes the later one
    assert setup.objective.bounds == Clip(0.2, 0.28)
    assert "data.train_files" in " ".join(setup.unread)
    status, found = examined(path, capsys)
    assert (status, found["group" if "group" in found else "inert"]["level"]) == (0, "ok")


def test_defaults_are_marked_as_assumed(capsys):
    _, found = examined(write("run.sh", VERL + "actor_rollout_ref.actor.ppo_epochs=2\n"), capsys)
    assumed = found["assumed"]["seen"]
    assert "verl's defaults are assumed" in assumed
    assert "actor_rollout_ref.rollout.n=1" in assumed and "data.train_batch_size=1024" in assumed
    assert "ppo_epochs" not in assumed
    assert (
        "train_batch_size=1024 (assumed) / ppo_mini_batch_size=256 (assumed) x ppo_epochs=2" in found["inert"]["seen"]
    )
    _, found = examined(write("grpo.yaml", "num_generations: 4\nper_device_train_batch_size: 8\n"), capsys)
    assert "num_iterations=1" in found["assumed"]["seen"] and "num_generations" not in found["assumed"]["seen"]


@pytest.mark.parametrize("estimator", ["", "gae", "remax", "reinforce_plus_plus"])
def test_an_advantage_without_groups_needs_none(estimator, capsys):
    """verl's own default is PPO with a critic, and n=1."""
    set_it = f"algorithm.adv_estimator={estimator} " if estimator else ""
    path = write(
        "run.sh",
        f"python3 -m verl.trainer.main_ppo {set_it}actor_rollout_ref.rollout.name=vllm data.train_batch_size=512\n",
    )
    status, found = examined(path, capsys)
    assert (status, "group" in found) == (0, False)


def test_what_groups_an_unknown_estimator_needs_is_not_judged(capsys):
    path = write(
        "run.sh", "python3 -m verl.trainer.main_ppo algorithm.adv_estimator=mine actor_rollout_ref.rollout.n=1\n"
    )
    status, found = examined(path, capsys)
    assert (status, "group" in found) == (0, False)
    assert "adv_estimator='mine' is not known" in " ".join(found["unread"])


def test_rloo_alone_is_a_warning_and_grpo_alone_a_problem(capsys):
    for estimator, expected in (("rloo", (0, "warning")), ("grpo", (1, "problem"))):
        path = write(
            "run.sh",
            f"python3 -m verl.trainer.main_ppo algorithm.adv_estimator={estimator} actor_rollout_ref.rollout.n=1\n",
        )
        status, found = examined(path, capsys)
        assert (status, found["group"]["level"]) == expected
        assert "reward" in found["group"]["cause"]


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "cispo"])
def test_bypass_mode_with_verl_s_own_loss_is_no_problem(mode, capsys):
    """verl then puts its bypass-mode loss in place, whose ratio is against the sampler."""
    text = f"{VERL}actor_rollout_ref.actor.policy_loss.loss_mode={mode} algorithm.rollout_correction.bypass_mode=True "
    text += "actor_rollout_ref.rollout.n=8 "
    status, found = examined(write("run.sh", f"{text}\n"), capsys)
    assert (status, found["anchor"]["level"]) == (0, "ok")
    assert "ppo_clip of verl's bypass mode" in found["bypass"]["seen"]
    path = write("run.sh", f"{text}algorithm.rollout_correction.loss_type=reinforce\n")
    status, found = examined(path, capsys)
    assert (status, found["interval"]["seen"]) == (0, "not known: the region")


OURS = "actor_rollout_ref.actor.policy_loss."
TYPED = f"{OURS}loss_mode=bandpo {OURS}_target_=bandpo.integrations.verl.BandPolicyLossConfig "
BYPASS = "algorithm.rollout_correction.bypass_mode"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (f"{OURS}loss_mode=bandpo:dppo-kl {BYPASS}=True", "policy_loss.bypass_mode is None"),
        (f"{TYPED}+{OURS}objective=dppo-kl {BYPASS}=False +{OURS}bypass_mode='${{{BYPASS}}}'", "bypass_mode is False"),
        (f"{TYPED}{BYPASS}=True +{OURS}bypass_mode=True", "verl's bypass mode puts the rollout's log-probs there"),
        (f"{TYPED}actor_rollout_ref.actor.clip_ratio_high=0.28", "clip_ratio_high=0.28 would be ignored"),
        (f"{OURS}loss_mode=bandpo {OURS}dro_beta=0.1", "dro_beta=0.1 would be ignored"),
        (f"{OURS}loss_mode=bandpo:cispo actor_rollout_ref.actor.clip_ratio_c=2", "clip_ratio_c=2.0 would be ignored"),
        (f"{OURS}loss_mode=bandpo actor_rollout_ref.actor.clip_ratio_c=1", "clip_ratio_c=1.0 must be greater than 1"),
        (f"{OURS}loss_mode=bandpo:tis", "needs rollout log-probs beside the old ones"),
        (f"{TYPED}+{OURS}objective=grpo {OURS}loss_mode=bandpo:dapo", "loss_mode=bandpo:dapo and objective=grpo"),
    ],
)
def test_what_the_adapter_of_verl_would_refuse_is_a_problem(settings, words, capsys):
    """The doctor used to find nothing wrong with these, and training ended with the error."""
    status, found = examined(write("run.sh", f"{VERL}actor_rollout_ref.rollout.n=8 {settings}\n"), capsys)
    assert (status, found["refused"]["level"]) == (1, "problem")
    assert words in found["refused"]["seen"]
    assert "bypass" not in found


@pytest.mark.parametrize(
    "settings",
    [
        f"{TYPED}+{OURS}objective=dppo-kl {BYPASS}=True +{OURS}bypass_mode='${{{BYPASS}}}'",
        f"{TYPED}+{OURS}objective=dppo-kl {BYPASS}=True +{OURS}bypass_mode=$B",
        f"{TYPED}actor_rollout_ref.actor.clip_ratio_high=$HIGH +{OURS}radius='1e-1' +{OURS}relax='True'",
        f"{OURS}loss_mode=bandpo actor_rollout_ref.actor.clip_ratio_c=10 {OURS}dro_beta=null",
        f"{OURS}loss_mode=bandpo:dppo-kl {BYPASS}=True $EXTRA",
    ],
)
def test_what_the_adapter_takes_or_nobody_knows_is_not_refused(settings, capsys):
    _, found = examined(write("run.sh", f"{VERL}actor_rollout_ref.rollout.n=8 {settings}\n"), capsys)
    assert "refused" not in found
    assert found["bypass"]["level"] == "ok"


def test_the_names_of_an_option_of_ours_without_our_class_are_refused_by_verl(capsys):
    text = f"{VERL}actor_rollout_ref.rollout.n=8 {OURS}loss_mode=bandpo +{OURS}objective=dapo\n"
    _, found = examined(write("run.sh", text), capsys)
    assert found["bypass"]["level"] == "problem"
    assert "policy_loss has objective without _target_" in found["bypass"]["seen"]


def test_a_configuration_of_verl_is_read_once(monkeypatch):
    path = write("run.yaml", f"defaults: [ppo_trainer, _self_]\n{OURS}loss_mode: bandpo\nactor_rollout_ref: {{}}\n")
    read = []
    monkeypatch.setattr(command, "read_yaml", lambda *given, **more: read.append(given) or read_yaml(*given, **more))
    monkeypatch.setattr(verl, "read_yaml", lambda *given, **more: read.append(given) or read_yaml(*given, **more))
    command.read_config(path)
    assert len(read) == 1


def test_a_loss_that_is_not_known_is_not_shown_as_another(capsys):
    _, found = examined(write("run.sh", VERL + "actor_rollout_ref.actor.policy_loss.loss_mode=gpg\n"), capsys)
    assert found["bypass"]["seen"] == "not known: which loss runs"
    assert "loss_mode='gpg' is not known here" in " ".join(found["unread"])
    _, found = examined(
        write("a.yaml", "num_generations: 4\nper_device_train_batch_size: 8\nloss_type: mine\n"), capsys
    )
    assert found["interval"]["seen"] == "not known: the region"


def test_an_asynchronous_run_without_a_train_batch_is_not_counted(capsys):
    _, found = examined(write("run.sh", VERL + "data.train_batch_size=0\n"), capsys)
    assert found["inert"]["seen"].startswith("not known")
    assert "asynchronous" in found["inert"]["cause"]


def test_hydra_s_defaults_are_read_in_their_order_or_named(capsys):
    write("method/a.yaml", "# @package _global_\nactor_rollout_ref: {rollout: {n: 4}}\n")
    own = "actor_rollout_ref: {rollout: {n: 8, name: vllm}}\nalgorithm: {adv_estimator: grpo}\n"
    for entries, n in (
        ("ppo_trainer, method: a, _self_", 8),
        ("ppo_trainer, _self_, method: a", 4),
        ("ppo_trainer, method: a", 8),
    ):
        listed = "".join(f"  - {entry}\n" for entry in entries.split(", "))
        assert read_config(write("a.yaml", f"defaults:\n{listed}{own}")).group == n
    for entry, why in (
        ("mine", "mine is not read"), ("method: b", "no such file"), ("method: ../../etc", "no plain name"),
        ("..: a", "no plain name"),
    ):  # fmt: skip
        _, found = examined(write("a.yaml", f"defaults:\n  - {entry}\n  - _self_\n{own}"), capsys)
        assert why in " ".join(found["unread"])
        assert found["inert"]["seen"].startswith("not known")  # it may be set there
        assert "group" not in found  # n = 8 is in the file itself


@pytest.mark.parametrize("value", ["${oc.env:N}", "${trainer.n}", "???"])
def test_what_yaml_leaves_to_others_is_not_known(value, capsys):
    path = write("a.yaml", f"actor_rollout_ref: {{rollout: {{n: '{value}'}}}}\nalgorithm: {{adv_estimator: grpo}}\n")
    assert examined(path, capsys)[1]["group"]["seen"] == "not known: how many completions a prompt has"
    group = write("b.yaml", "actor_rollout_ref: {rollout: '${mine}'}\nalgorithm: {adv_estimator: grpo}\n")
    assert examined(group, capsys)[1]["group"]["level"] == "note"


def test_keys_that_are_not_trl_s_are_unread(capsys):
    """A public recipe has its script's keys, those of older versions, and one that `bandpo train` has too."""
    text = ("model_name_or_path: Qwen/Qwen2.5-1.5B\ntorch_dtype: bfloat16\ndataset_name: x\nsystem_prompt: Think.\n"
            "dataset_prompt_column: problem\nreward_funcs: [accuracy, format]\nnum_generations: 16\nnum_iterations: 2\n"
            "max_prompt_length: 512\nmax_completion_length: 2048\nper_device_train_batch_size: 16\nwarmup_ratio: 0.1\n"
            "learning_rate: 2.0e-05\nbf16: true\nuse_vllm: true\nvllm_device: auto\n")  # fmt: skip
    path = write("grpo.yaml", text)
    setup = read_config(path)
    assert (setup.host, setup.ours, setup.steps, setup.group) == ("TRL", False, 2.0, 16)
    unread = " ".join(setup.unread)
    for key in ("torch_dtype", "dataset_prompt_column", "max_prompt_length", "vllm_device", "system_prompt"):
        assert f"{key!r} is no key of TRL's GRPOConfig" in unread
    assert examined(path, capsys)[0] == 0
    count = sum("is no key of TRL's GRPOConfig" in line for line in setup.unread)
    typo = read_config(write("typo.yaml", text.replace("num_iterations", "num_iteration")))
    assert typo.steps is None  # it may have been meant for what decides
    with pytest.raises(ValueError, match="101 keys are none of TRL's GRPOConfig"):
        read_config(write("many.yaml", text + "".join(f"k{i}: 1\n" for i in range(101 - count))))


def test_generation_kwargs_win_as_in_trl():
    base = "num_generations: 4\nper_device_train_batch_size: 8\ntop_p: 1.0\n"
    assert read_config(write("a.yaml", base + "generation_kwargs: {top_p: 0.9}\n")).top_p == 0.9
    assert read_config(write("a.yaml", base + "generation_kwargs: '{\"top_p\": 0.9}'\n")).top_p is None


@pytest.mark.parametrize(
    ("line", "message"),
    [("num_iterations: 0", "must be at least 1"), ("num_generations: 0", "TRL cannot work with these settings"),
     ("temperature: .nan", "temperature: nan is not a number of a run"), ("top_p: [1]", "top_p: list is not a number"),
     (f"max_completion_length: {10**13}", "is not a number of a run"), ("use_vllm: 3", "use_vllm: 3 is not true or false"),
     ("num_iterations: 1.5", "num_iterations: 1.5 is not a whole number"), ("loss_type: 3", "loss_type: 3 is not a name")],
)  # fmt: skip
def test_values_that_no_run_can_have(line, message, capsys):
    status, error = examined(write("a.yaml", f"per_device_train_batch_size: 8\nepsilon: 0.2\n{line}\n"), capsys)
    assert status == 2
    assert message in error


def test_16_bit_weights_at_a_tiny_learning_rate(capsys):
    """Against torch: the share of normal weights that a step of the learning rate moves."""
    weights = 0.02 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    base = "num_generations: 4\nper_device_train_batch_size: 8\nnum_iterations: 2\n"
    for dtype, rate in (("bfloat16", 1e-6), ("bfloat16", 1e-3), ("float16", 1e-6), ("float16", 1e-4)):
        kept = weights.to(getattr(torch, dtype))
        moved = ((kept - rate) != kept).float().mean().item()
        _, found = examined(write("a.yaml", f"{base}learning_rate: {rate}\ntorch_dtype: {dtype}\n"), capsys)
        assert found["precision"]["level"] == ("warning" if moved < 0.5 else "ok"), (dtype, rate, moved)
    for line in (
        "dtype: float32\nbf16: true",
        "bf16: true",
        "torch_dtype: bfloat16\nuse_peft: true",
        "model_init_kwargs: {}",
    ):
        assert "precision" not in examined(write("a.yaml", f"{base}learning_rate: 1e-6\n{line}\n"), capsys)[1]
    _, found = examined(write("a.yaml", f"{base}learning_rate: 1e-6\nmodel_init_kwargs: {{dtype: bfloat16}}\n"), capsys)
    assert found["precision"]["level"] == "warning"
    actor = "actor_rollout_ref.actor"
    path = write("run.sh", VERL + f"{actor}.fsdp_config.model_dtype=bf16 {actor}.optim.lr=1e-6\n")
    assert examined(path, capsys)[1]["precision"]["level"] == "warning"


def test_a_batch_without_advantages_names_the_cause():
    x = torch.full((4, 5), -1.0)
    found = {f.rule: f for f in examine_batch({"logprobs": x, "old_logprobs": x, "advantages": torch.zeros(4)})}
    assert found["signal"].level == "problem"
    assert found["ratios"].level == "note" and "rollout is used once" not in found["ratios"].cause


def test_a_log_without_signal_names_the_cause(capsys):
    row = {
        "reward": 0.0,
        "reward_std": 0.0,
        "frac_reward_zero_std": 1.0,
        "clip_ratio/region_mean": 0.0,
        "ratio/mean": 1.0,
    }
    status, found = examined(write("m.jsonl", (json.dumps(row) + "\n") * 12), capsys)
    assert (status, found["signal"]["level"], found["clipping"]["level"]) == (1, "problem", "note")
    assert "every advantage is 0" in found["signal"]["cause"]
    assert "num_iterations" not in found["clipping"]["knob"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"NaN"', "1e999"])
def test_a_log_of_nan_is_a_problem(value, capsys):
    rows = f'{{"reward": {value}, "entropy": {value}, "grad_norm": {value}}}\n' * 20
    status, found = examined(write("m.jsonl", rows), capsys)
    assert (status, found["nonfinite"]["level"]) == (1, "problem")
    assert "reward is not finite in 20 of 20 rows" in found["nonfinite"]["seen"]
    assert not {rule for rule, f in found.items() if rule != "unread" and f["level"] == "ok"}


def test_words_of_scripts():
    script = read_script('x=1 y=\'a b\' run "$x"\'$x\'\\$x "a\\"b" ${y:-"("}z $(echo "a)" \')\') >out # c\n')
    assert [(w.text, w.known) for w in script.commands[0]] == [
        ("run", 3), ("$x$x$x", 0), ('a"b', 3), ("(z", 2), ("$(echo \"a)\" ')')", 0),
    ]  # fmt: skip
    assert [w.text for w in script.variables["y"]] == ["a b"]


def test_rules_without_a_value_give_no_verdict():
    from bandpo.doctor import Setup

    nothing = Setup("verl", None, steps=None, engine=None, corrected=None, old_is_rollout=None, temperature=None, top_p=None,
                    top_k=None, min_p=None, group=None)  # fmt: skip
    assert {f.level for f in examine_setup(nothing)} == {"note"}
