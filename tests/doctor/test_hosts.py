"""Scripts and configurations of other hosts: what is read, and each rule where it fires and where it does not."""

import math
import re
from pathlib import Path

import pytest

from bandpo import Clip
from bandpo.bounds import Band
from bandpo.divergences import KL, TV
from bandpo.doctor import examine_setup, nemo_rl, openrlhf, prime_rl, rllm, setup, skyrl, slime
from bandpo.doctor.command import read_config
from bandpo.doctor.settings import Settings
from bandpo.surrogates.corrections import TIS, IcePop

A = "trainer.algorithm"
# A run in which every rule is content, as the beginning of a script or a file; the settings of a test follow and win.
RUNS = {
    "OpenRLHF": "ray job submit --address=http://x -- python3 -m openrlhf.cli.train_ppo_ray --rollout.batch_size 128 "
    "--rollout.n_samples_per_prompt 8 --train.batch_size 128 --algo.advantage.estimator group_norm "
    "--algo.advantage.is_correction_enable",
    "OpenRLHF before 0.10": "python3 -m openrlhf.cli.train_ppo_ray --rollout_batch_size 128 --n_samples_per_prompt 8 "
    "--train_batch_size 128 --advantage_estimator group_norm --enable_vllm_is_correction",
    "SkyRL": f"uv run --extra fsdp -m skyrl.train.entrypoints.main_base {A}.off_policy_correction.tis_ratio_type=token "
    f"{A}.use_kl_loss=false",
    "slime": "ray job submit -- python3 train.py --num-rollout 9 --rollout-batch-size 32 --n-samples-per-prompt 8 "
    "--global-batch-size 64 --use-tis",
    "NeMo-RL": "uv run examples/run_grpo.py policy.train_global_batch_size=128 loss_fn.use_importance_sampling_correction=true",
    "rLLM": "python -u train.py rllm/backend=verl rllm.data.train_batch_size=512 actor_rollout_ref.rollout.name=vllm "
    "rllm.algorithm.rollout_correction.tis_mode=token",
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(text, name="run.sh"):
    Path(name).write_text(text)
    return read_config(Path(name))


def level(host, settings, rule):
    found = {f.rule: f for f in examine_setup(read(f"{RUNS[host]} {settings}\n"))}
    return found[rule].level if rule in found else ""


@pytest.mark.parametrize("host", RUNS)
def test_a_run_without_a_fault_has_no_warning(host):
    found = examine_setup(read(RUNS[host] + "\n"))
    assert {f.rule for f in found if f.level in ("warning", "problem")} == set()
    assert {f.rule for f in found if f.seen.startswith("not known")} == set()


@pytest.mark.parametrize(
    ("host", "settings", "rule", "expected"),
    [
        ("OpenRLHF", "--rollout.batch_size 16", "inert", "problem"),
        ("OpenRLHF", "--rollout.batch_size 16 --train.max_epochs 2", "inert", "ok"),
        ("OpenRLHF", "--actor.policy_loss_type gspo --rollout.batch_size 16", "inert", "note"),  # against the sampler
        ("OpenRLHF", "--train.batch_size=$N", "inert", "note"),
        ("OpenRLHF", "--algo.kl.use_loss --algo.kl.estimator k2", "kl", "note"),
        ("OpenRLHF", "--algo.kl.use_loss", "kl", "warning"),  # the default is a plain k1
        ("OpenRLHF", "--algo.kl.estimator k1", "kl", ""),  # part of the reward
        ("OpenRLHF", "--rollout.top_p 0.9", "sampling", "warning"),
        ("OpenRLHF", "--rollout.temperature 0.6", "sampling", "note"),
        ("OpenRLHF", "--rollout.n_samples_per_prompt 1", "group", "problem"),
        ("OpenRLHF", "--rollout.n_samples_per_prompt 1 --algo.advantage.estimator gae", "group", ""),
        ("OpenRLHF", "--rollout.n_samples_per_prompt 1 --algo.advantage.estimator $E", "group", "note"),
        ("OpenRLHF before 0.10", "--rollout_batch_size 16", "inert", "problem"),
        ("OpenRLHF before 0.10", "--use_kl_loss --kl_estimator k3", "kl", "note"),
        ("OpenRLHF before 0.10", "--n_samples_per_prompt 1", "group", "problem"),
        ("OpenRLHF before 0.10", "--top_p 0.9", "sampling", "warning"),
        ("SkyRL", "trainer.train_batch_size=256", "inert", "problem"),
        ("SkyRL", "trainer.train_batch_size=256 trainer.update_epochs_per_batch=2", "inert", "ok"),
        ("SkyRL", f"trainer.train_batch_size=256 {A}.policy_loss_type=rollout_is", "inert", "note"),
        ("SkyRL", f"{A}.off_policy_correction.tis_ratio_type=null", "anchor", "warning"),
        ("SkyRL", f"{A}.off_policy_correction.tis_ratio_type=null {A}.policy_loss_type=dppo", "anchor", "ok"),
        ("SkyRL", f"{A}.use_kl_loss=true", "kl", "note"),
        ("SkyRL", f"{A}.use_kl_loss=true {A}.kl_estimator_type=k1", "kl", "warning"),
        ("SkyRL", f"{A}.use_kl_loss=true {A}.kl_estimator_type=abs", "kl", "warning"),
        ("SkyRL", "generator.sampling_params.min_p=0.1", "sampling", "warning"),
        ("SkyRL", "generator.sampling_params.temperature=$T", "sampling", "note"),
        ("SkyRL", "generator.n_samples_per_prompt=1", "group", "problem"),
        ("SkyRL", f"generator.n_samples_per_prompt=1 {A}.advantage_estimator=gae", "group", ""),
        ("SkyRL", f"{A}.policy_loss_type=mine", "bypass", "note"),
        ("slime", "--global-batch-size 256", "inert", "problem"),
        ("slime", "--num-steps-per-rollout 4", "inert", "ok"),
        ("slime", "--num-steps-per-rollout 1", "inert", "problem"),
        ("slime", "--use-kl-loss --kl-loss-coef 0.01", "kl", "warning"),  # the default is a plain k1
        ("slime", "--use-kl-loss --kl-loss-coef 0.01 --kl-loss-type low_var_kl", "kl", "note"),
        ("slime", "--use-kl-loss --kl-loss-coef 0.01 --kl-loss-type low_var_kl --use-unbiased-kl", "kl", "ok"),
        ("slime", "--use-kl-loss --kl-loss-type k1", "kl", ""),  # with a coefficient of 0
        ("slime", "--rollout-top-k 50", "sampling", "warning"),
        ("slime", "--rollout-top-p 0.9", "sampling", "ok"),  # the trainer takes the same tokens
        ("slime", "--n-samples-per-prompt 1", "group", "problem"),
        ("slime", "--n-samples-per-prompt 1 --disable-rewards-normalization", "group", ""),
        ("slime", "--n-samples-per-prompt 1 --advantage-estimator ppo", "group", ""),
        ("slime", "--loss-type custom_loss --custom-loss-function-path their.loss", "bypass", "note"),
        ("NeMo-RL", "policy.train_global_batch_size=512", "inert", "problem"),
        ("NeMo-RL", "loss_fn.force_on_policy_ratio=true", "inert", "problem"),
        ("NeMo-RL", "loss_fn.use_importance_sampling_correction=false", "anchor", "warning"),
        ("NeMo-RL", "loss_fn.use_on_policy_kl_approximation=true", "kl", "ok"),
        ("NeMo-RL", "", "kl", "note"),
        ("NeMo-RL", "loss_fn.use_kl_in_reward=true", "kl", ""),
        ("NeMo-RL", "policy.generation.top_p=0.9", "sampling", "ok"),  # the trainer filters its logits in the same way
        ("NeMo-RL", "policy.generation.temperature=0", "sampling", "problem"),
        ("NeMo-RL", "grpo.num_generations_per_prompt=1", "group", "problem"),
        ("NeMo-RL", "grpo.num_generations_per_prompt=1 grpo.adv_estimator.name=raw_reward", "group", ""),
        ("NeMo-RL", "--config their/recipe.yaml", "sampling", "note"),
        ("NeMo-RL", "--config examples/configs/grpo_math_1B.yaml", "sampling", "ok"),
        ("rLLM", "rllm.data.train_batch_size=256", "inert", "problem"),
        ("rLLM", "rllm.async_training.enable=true", "inert", "note"),
        ("rLLM", "rllm.algorithm.rollout_correction.tis_mode=null", "anchor", "warning"),
        ("rLLM", "rllm.algorithm.rollout_correction.bypass_mode=true", "anchor", "ok"),
        ("rLLM", "rllm.algorithm.kl_beta=0.01", "kl", "note"),
        ("rLLM", "rllm.algorithm.kl_beta=0.01 actor_rollout_ref.actor.use_kl_loss=false", "kl", ""),
        ("rLLM", "rllm.rollout.train.top_p=0.9", "sampling", "warning"),
        ("rLLM", "rllm.rollout.n=1", "group", "problem"),
        ("rLLM", "rllm.rollout.n=1 rllm.algorithm.adv_estimator=reinforce", "group", ""),
        ("rLLM", "rllm.algorithm.loss_fn=bandpo:bandpo-kl", "bypass", "ok"),
    ],
)  # fmt: skip
def test_each_rule_fires_where_it_should_and_nowhere_else(host, settings, rule, expected):
    assert level(host, settings, rule) == expected


TOML = """seq_len = 2048
[orchestrator]
batch_size = 128
group_size = 8
[[orchestrator.train.source]]
name = "reverse-text"
[trainer.optim]
lr = 3e-6
"""


@pytest.mark.parametrize(
    ("settings", "rule", "expected"),
    [
        ("", "inert", "ok"),  # of a sampler that may be older
        ("[orchestrator]\nmax_off_policy_steps = 0\ngroup_size = 8", "inert", "note"),
        ("", "anchor", "ok"),
        ("[orchestrator]\ngroup_size = 1", "group", "problem"),
        ('[orchestrator]\ngroup_size = 1\nalgo = {type = "rae"}', "group", ""),
        ("[orchestrator]\ntrain.sampling = {temperature = 0.7}", "sampling", "note"),
        ('[trainer.model]\noptimization_dtype = "bfloat16"\n[trainer]\noptim = {lr = 1e-6}', "precision", "warning"),
        ('[trainer.loss]\ntype = "custom"\nimport_path = "bandpo.integrations.prime_rl.policy_loss"', "bypass", "note"),
    ],
)
def test_rules_for_the_toml_of_prime_rl(settings, rule, expected):
    text = settings if settings.startswith("[orchestrator]") else f"[orchestrator]\ngroup_size = 8\n{settings}\n"
    found = {f.rule: f for f in examine_setup(read(text, "rl.toml"))}
    assert (found[rule].level if rule in found else "") == expected


def test_an_older_name_of_prime_rl_s_sampler_is_not_taken_for_its_default():
    setup = read("[orchestrator]\ngroup_size = 8\nsampling = {temperature = 0.7}\n", "rl.toml")
    assert setup.temperature is None
    assert "orchestrator.sampling.temperature: no setting of this version" in " ".join(setup.unread)


def objective(host, settings=""):
    return read(f"{RUNS[host]} {settings}\n").objective


@pytest.mark.parametrize(
    ("host", "settings", "fields"),
    [
        ("OpenRLHF", "--actor.eps_clip_low_high 0.2 0.27", {"bounds": Clip(0.2, 0.27), "aggregation": "token-mean"}),
        ("OpenRLHF", "--actor.eps_clip_low_high=0.2 --actor.eps_clip 0.1", None),
        ("OpenRLHF", "--algo.advantage.is_correction_type icepop", {"correction": IcePop(0.5, 5.0)}),
        ("OpenRLHF", "--algo.advantage.is_correction_type tis", {"correction": None}),  # it has a lower bound
        ("OpenRLHF", "--actor.policy_loss_type gspo", {"ratio_level": "sequence", "anchor": "rollout"}),
        ("SkyRL", f"{A}.policy_loss_type=gspo {A}.loss_reduction=sequence_mean",
         {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean", "correction": TIS(2.0)}),
        ("SkyRL", f"{A}.policy_loss_type=cispo", {"bounds": Clip(1.0, 4.0), "name": "cispo"}),
        ("SkyRL", f"{A}.policy_loss_type=dppo", {"bounds": Band(TV, 0.2, max_ratio=None), "anchor": "rollout"}),
        ("SkyRL", f"{A}.policy_loss_type=dppo {A}.dppo.dppo_type=binary_kl {A}.dppo.delta_low=0.05 {A}.dppo.delta_high=0.1",
         {"bounds": Band(KL, (0.05, 0.1), max_ratio=None)}),
        ("SkyRL", f"{A}.policy_loss_type=sapo", {"bounds": Clip(1.0, math.inf)}),
        ("slime", "--eps-clip-high 0.28", {"bounds": Clip(0.2, 0.28), "correction": TIS(2.0), "anchor": "old"}),
        ("slime", "--advantage-estimator gspo --eps-clip 4e-4", {"bounds": Clip(4e-4, 4e-4), "ratio_level": "sequence"}),
        ("slime", "--advantage-estimator cispo --eps-clip 1.0 --eps-clip-high 4.0", {"bounds": Clip(1.0, 4.0)}),
        ("slime", "--use-rollout-logprobs", {"anchor": "rollout", "correction": None}),
        ("slime", "--calculate-per-token-loss", {"aggregation": "token-mean"}),
        ("NeMo-RL", "loss_fn.sequence_level_importance_ratios=true loss_fn.token_level_loss=false",
         {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean", "correction": TIS(math.inf, "sequence")}),
        ("NeMo-RL", "loss_fn.truncated_importance_sampling_type=icepop loss_fn.truncated_importance_sampling_ratio=5 "
         "loss_fn.truncated_importance_sampling_ratio_min=0.5", {"correction": IcePop(0.5, 5.0)}),
        ("NeMo-RL", "loss_fn.ratio_clip_max=0.28 loss_fn.use_cispo=true", {"bounds": Clip(0.2, 0.28), "name": "cispo"}),
        ("rLLM", "rllm.algorithm.eps_clip=0.1", {"bounds": Clip(0.1, 0.1), "aggregation": "token-mean"}),
        ("rLLM", "actor_rollout_ref.actor.clip_ratio_high=0.28", {"bounds": Clip(0.2, 0.28)}),
        ("rLLM", "actor_rollout_ref.actor.clip_ratio_high=0.28 rllm.algorithm.eps_clip_high=0.3", {"bounds": Clip(0.2, 0.3)}),
        ("rLLM", "rllm.algorithm.loss_fn=gspo", {"ratio_level": "sequence"}),
        ("rLLM", "rllm.algorithm.rollout_correction.bypass_mode=true", {"anchor": "rollout"}),
    ],
)  # fmt: skip
def test_the_objective_is_the_configured_loss(host, settings, fields):
    if fields is None:
        with pytest.raises(ValueError, match="is not 2 numbers"):
            objective(host, settings)
        return
    found = objective(host, settings)
    assert {name: getattr(found, name) for name in fields} == fields


def test_the_loss_of_prime_rl():
    assert read(TOML, "rl.toml").objective.bounds == Band(TV, 0.2, max_ratio=None)
    loss = '[trainer.loss]\ntype = "ipo"\nipo_threshold = 0.05\n'
    assert read(TOML + loss, "rl.toml").objective.bounds == Band(TV, 0.05, max_ratio=None)
    loss = "[trainer.loss]\ndppo_mask_low = 0.1\n"
    assert read(TOML + loss, "rl.toml").objective.bounds == Band(TV, (0.1, 0.2), max_ratio=None)
    found = read(TOML.replace("group_size = 8", 'group_size = 8\nalgo = {type = "opd"}'), "rl.toml")
    assert found.objective is None
    assert any("algo.type=opd" in line for line in found.unread)
    found = read(TOML.replace('name = "reverse-text"', 'name = "x"\ngroup_size = 4'), "rl.toml")
    assert found.group is None
    assert any("group_size" in line for line in found.unread)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nname = 'x'\n[optim]\nlr = 1e-6\n", "a part of prime-rl"),
        ("[tool.ruff]\nline-length = 9\n", "is not recognised"),
        ("[orchestrator\n", "TOMLDecodeError"),
        ("x = " + "[" * 9000, "rl.toml"),
        ("[orchestrator]\ngroup_size = 'many'\n", "group_size: 'many' is not a number"),
        ("[orchestrator]\n[trainer.loss]\ntype = 'dpo'\n", "none of prime-rl's"),
        ("x" * (1 << 18) + "y", "more than"),
    ],
)
def test_toml_that_is_not_prime_rl_s_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(text, "rl.toml")


def test_arrays_and_continued_lines_are_read_as_argparse_would():
    found = read(
        """GRPO_ARGS=(
   --advantage-estimator gspo  # a comment
   # --eps-clip 0.1
   --eps-clip=1e-4 --eps-clip-high 2e-4
)
python3 /root/slime/train_async.py \\
   --rollout-batch-size 64 --n-samples-per-prompt 8 --global-batch-size 128 \\
   --eval-prompt-data aime $DATA/aime.jsonl --wandb-key $KEY \\
   ${GRPO_ARGS[@]} --rollout-temperature 0.8 --rollout-temperature 0.9 --unknown-flag -1 --rollout-top-k -1
"""
    )
    assert found.objective.bounds == Clip(1e-4, 2e-4)
    assert (found.steps, found.temperature, found.top_k, found.lag) == (4.0, 0.9, 0, None)
    assert found.unread == ()


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ("$EXTRA", "$EXTRA (line 1) is not resolved and may set anything"),
        ("--colocate $EXTRA_ARGS", "$EXTRA_ARGS (line 1) is not resolved and may set anything"),
        ("--colocate $X", "$X (line 1) is not resolved and may set anything"),  # a flag takes no value
        ("--load $DIR ${OTHERS[@]}", "${OTHERS[@]} (line 1) is not resolved and may set anything"),
    ],
)
def test_a_word_that_may_hold_options_makes_defaults_unknown(settings, unread):
    found = read(f"{RUNS['slime']} {settings}\n")
    assert any(unread in line for line in found.unread)
    assert (found.temperature, found.group) == (None, 8)


def test_the_value_of_an_option_that_is_not_resolved_is_that_option_s_alone():
    found = read(f"{RUNS['slime']} --save $DIR --eps-clip $EPS\n")
    assert (found.objective, found.temperature) == (None, 1.0)
    assert found.unread == ("not resolved: --eps-clip $EPS (line 1)",)


def test_the_shape_of_a_model_in_a_sourced_file_is_said_and_taken_as_such():
    found = read(
        "source scripts/models/qwen3-4B.sh\n" + RUNS["slime"] + " ${MODEL_ARGS[@]} --rollout-temperature 0.8\n"
    )
    assert found.temperature == 0.8
    assert found.objective is not None
    assert any("it is taken as the shape of a model" in line for line in found.unread)


@pytest.mark.parametrize(
    ("host", "settings", "unread"),
    [
        ("SkyRL", f"{A}.eps_clip_hihg=0.28", "is not trainer.algorithm.eps_clip_high, which may have been meant"),
        ("SkyRL", f"{A}.foo=1", "not known to this reader, and not looked at: trainer.algorithm.foo"),
        ("slime", "--eps_clip_high 0.28", "'eps_clip_high' is not eps-clip-high, which may have been meant"),
        ("slime", "--custom-config-path x.yaml", "custom-config-path: that file may replace any option"),
        ("slime", "--use-opsm", "use-opsm masks sequences"),
        ("OpenRLHF", "--algo.kl.target 0.1", "algo.kl.target moves the coefficient of the KL"),
        ("OpenRLHF", "--algo.kl.foo 1", "not known to this reader, and not looked at: algo.kl.foo"),
        ("NeMo-RL", "loss_fn.foo=1", "not known to this reader, and not looked at: loss_fn.foo"),
        ("NeMo-RL", "--config a.yaml", "--config a.yaml: that configuration is not read, so what this script does not set is"),
        ("rLLM", "rllm.algorithm.adv_estimator=mine", "adv_estimator='mine' is not known"),
    ],
)  # fmt: skip
def test_keys_that_the_reader_does_not_know_are_listed(host, settings, unread):
    assert any(unread in line for line in read(f"{RUNS[host]} {settings}\n").unread)


def test_a_key_that_is_nearly_one_that_counts_makes_that_one_unknown():
    assert read(f"{RUNS['SkyRL']} {A}.eps_clip_hihg=0.28\n").objective is None
    assert read(f"{RUNS['SkyRL']} generator.sampling_params.stop=x\n").top_k == 0
    assert read(f"{RUNS['SkyRL']} generator.eval_sampling_params.temperature=0\n").temperature == 1.0


@pytest.mark.parametrize(
    ("host", "settings", "message"),
    [
        ("OpenRLHF", "--train.batch_size 0", "train.batch_size=0 must be positive"),
        ("OpenRLHF", "--rollout.temperature hot", "'hot' is not a number"),
        ("OpenRLHF", "--actor.policy_loss_type dpo", "none of OpenRLHF's"),
        ("SkyRL", f"{A}.use_kl_loss=7", "7 is neither true nor false"),
        ("slime", "--loss-type sft_loss", "this is slime with loss-type sft_loss"),
        ("NeMo-RL", "loss_fn.ratio_clip_min=-1", "low"),
        ("rLLM", "rllm/backend=tinker", "this looks like rLLM with its backend 'tinker'"),
    ],
)
def test_values_that_no_run_can_have_are_refused(host, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(f"{RUNS[host]} {settings}\n")


def test_configurations_that_nemo_rl_extends():
    Path("own").mkdir()
    Path("own/base.yaml").write_text("defaults: ../../grpo_math_8B.yaml\ngrpo: {num_generations_per_prompt: 4}\n")
    Path("top.yaml").write_text("grpo: {num_prompts_per_step: 2}\npolicy: {}\n")
    found = read(
        "defaults: own/base.yaml\nloss_fn: {ratio_clip_max: 0.3}\npolicy: {train_global_batch_size: 64}\n", "a.yaml"
    )
    assert (found.steps, found.group, found.temperature) == (4.0, 4, 1.0)  # 64 x 4 / 64
    assert found.objective.bounds == Clip(0.2, 0.3)
    assert found.unread == ("defaults: '../../grpo_math_8B.yaml' is taken to be NeMo-RL's own file of that name",)

    found = read("defaults: ../top.yaml\ngrpo: {num_prompts_per_step: 2}\npolicy: {}\n", "own/b.yaml")
    assert (found.steps, found.temperature, found.objective) == (None, None, None)  # it is outside of the folder
    assert found.unread[0] == "defaults: '../top.yaml' is not read, and what it sets is not known"

    found = read(
        "grpo: {num_prompts_per_step: 2, num_generations_per_prompt: '${a.b}'}\na: {b: 3}\npolicy: {}\nloss_fn: {}\n",
        "c.yaml",
    )
    assert (found.steps, found.group, found.top_p) == (None, 3, None)
    assert found.objective.bounds == Clip(0.2, 0.2)  # a default of the class

    found = read(
        "defaults: c.yaml\nloss_fn: {_override_: true}\ngrpo: {_override_: true, num_prompts_per_step: 9}\n", "d.yaml"
    )
    assert (found.group, found.steps) == (None, None)


def test_a_configuration_that_extends_itself_ends():
    found = read("defaults: a.yaml\ngrpo: {num_prompts_per_step: 2}\npolicy: {}\n", "a.yaml")
    assert found.steps is None


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    (tmp_path / "secret.yaml").write_text("grpo: {num_generations_per_prompt: 3}\n")
    Path("in").mkdir()
    Path("in/link.yaml").symlink_to(tmp_path / "secret.yaml")
    text = "defaults: link.yaml\ngrpo: {num_prompts_per_step: 2}\npolicy: {}\n"
    found = read(text, "in/a.yaml")
    assert found.group is None
    assert found.unread[0] == "defaults: 'link.yaml' is not read, and what it sets is not known"


def test_yaml_of_skyrl():
    text = "trainer: {train_batch_size: 64, policy_mini_batch_size: 64, algorithm: {eps_clip_high: 0.28}}\n"
    found = read(text + "generator: {n_samples_per_prompt: 4}\n", "sky.yaml")
    assert (found.host, found.steps, found.group) == ("SkyRL", 1.0, 4)
    assert found.objective.bounds == Clip(0.2, 0.28)
    found = read("defaults: [their_base]\n" + text + "generator: {n_samples_per_prompt: 4}\n", "sky.yaml")
    assert (found.temperature, found.group) == (None, 4)


def test_overrides_of_the_command_line_win():
    Path("run.sh").write_text(RUNS["OpenRLHF"] + " --rollout.temperature 0.5\n")
    found = read_config(Path("run.sh"), ["rollout.temperature=1.0", "train_batch_size=1024", "use_kl_loss=true"])
    assert (found.temperature, found.steps, found.kl_coef) == (1.0, 1.0, 0.01)


def test_programs_of_the_host_s_examples_are_said_and_taken_to_keep_its_defaults():
    found = read(f"uv run -m examples.train.algorithms.dapo.main_dapo {A}.policy_loss_type=dual_clip\n")
    assert found.temperature == 1.0
    assert any("is taken to have the defaults of SkyRL's main_base" in line for line in found.unread)
    found = read(f"uv run -m mine.main_dapo {A}.policy_loss_type=dual_clip\n")
    assert found.temperature is None
    assert any("the program that this runs is not SkyRL's main_base" in line for line in found.unread)


def test_a_program_behind_an_unknown_folder_is_known():
    found = read(f"python3 $ROOT/train.py {RUNS['slime'].partition('train.py ')[2]}\n")
    assert (found.host, found.temperature) == ("slime", 1.0)


@pytest.mark.parametrize("module", [openrlhf, skyrl, slime, nemo_rl, prime_rl, rllm])
def test_every_reader_says_from_which_commit_its_facts_are(module):
    assert re.search(r"commit [0-9a-f]{40} of\s20\d\d-\d\d-\d\d", module.__doc__)


@pytest.mark.parametrize("host", ["OPENRLHF", "SKYRL", "SLIME", "NEMO_RL", "PRIME_RL", "RLLM"])
def test_the_hosts_have_knobs_of_their_own(host):
    assert {"more steps", "no truncation", "group", "use"} <= set(getattr(setup, f"{host}_KNOBS"))


def test_settings_of_several_numbers():
    found = Settings({}, {"a": "0.1 0.2", "b": [1, 2], "c": 3})
    assert found.numbers("a", 2) == [0.1, 0.2]
    assert found.numbers("b", 2) == [1.0, 2.0]
    with pytest.raises(ValueError, match="is not 2 numbers"):
        found.numbers("c", 2)
