"""How each host spells the metrics and tensors that bandpo has its own names for: one table for each.

The adapters report under these names, the TRL trainer replaces TRL's numbers under them, and `bandpo doctor` looks for them in
logs and saved batches. A name that means something else in another host is not an entry of that host: `clip_ratio`, for
example, means three different things.
"""

from collections.abc import Mapping

METRICS: Mapping[str, Mapping[str, str]] = {
    "clip_fraction/any": {
        "TRL": "clip_ratio/region_mean",
        "verl": "actor/pg_clipfrac",
        "slime": "pg_clipfrac",
        "SkyRL": "clip_ratio",
    },
    "clip_fraction/low": {"TRL": "clip_ratio/low_mean"},
    "clip_fraction/high": {"TRL": "clip_ratio/high_mean"},
    "ratio/mean": {"NeMo-RL": "probs_ratio"},
    "ratio/min": {"NeMo-RL": "probs_ratio_min"},
    "ratio/max": {"NeMo-RL": "probs_ratio_max"},
    "kl/old_new_k1": {"verl": "actor/ppo_kl", "slime": "ppo_kl"},
    "kl/ref": {"TRL": "kl", "verl": "actor/kl_loss", "slime": "kl_loss"},
    "entropy": {"TRL": "entropy", "verl": "actor/entropy", "slime": "entropy_loss"},
    "loss/policy": {"TRL": "policy_loss", "verl": "actor/pg_loss", "slime": "pg_loss", "ROLL": "actor/pg_loss"},
    "loss": {"TRL": "loss", "slime": "loss", "ROLL": "actor/total_loss", "NeMo-RL": "loss"},
    "grad_norm": {"TRL": "grad_norm", "verl": "actor/grad_norm"},
    "reward/mean": {"TRL": "reward", "verl": "critic/score/mean"},
    "reward/mean_with_kl": {"verl": "critic/rewards/mean"},
    "reward/std": {"TRL": "reward_std"},
    "reward/zero_variance": {"TRL": "frac_reward_zero_std"},
    "advantages/max": {"verl": "critic/advantages/max"},
    "advantages/min": {"verl": "critic/advantages/min"},
    "correction/effective_sample_size": {"verl": "rollout_corr/rollout_is_eff_sample_size"},
    "rollout/difference": {
        "TRL": "sampling/sampling_logp_difference/mean",
        "verl": "training/rollout_probs_diff_mean",
    },
    "length/cut_off": {"TRL": "completions/clipped_ratio", "verl": "response_length/clip_ratio"},
}
"""Our name of a metric, and each host's own name for the same quantity, where the host has one.

`kl/old_new_k1` is the mean of `-log r`; `reward/mean_with_kl` has the KL penalty subtracted; `rollout/difference` is the mean
difference between sampler and trainer, of log-probs in TRL and of probabilities in verl.
"""

LOG_PREFIX: Mapping[str, tuple[str, ...]] = {
    "TRL": ("", "train/"),
    "ms-swift": ("", "train/"),
    "slime": ("train/",),
    "NeMo-RL": ("train/",),
    "SkyRL": ("policy/loss_metrics/",),
}
"""What a host puts before the names that its loss reports, when it logs them; nothing for other hosts.

transformers' callbacks for TensorBoard, W&B and trackio put `train/` before all names; its `trainer_state.json` and console
have them without it.
"""

LOGGED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "clip_fraction/any": {
        "TRL": ("clip_ratio",),
        "ms-swift": ("clip_ratio/region_mean", "clip_ratio"),
        "OpenRLHF": ("train/ppo_clip_ratio",),
        "prime-rl": ("is_masked/mean",),
    },
    "clip_fraction/low": {"ms-swift": ("clip_ratio/low_mean",), "prime-rl": ("is_masked_low/mean",)},
    "clip_fraction/high": {"ms-swift": ("clip_ratio/high_mean",), "prime-rl": ("is_masked_high/mean",)},
    "kl/old_new_k1": {"OpenRLHF": ("train/ppo_kl",)},
    "kl/ref": {
        "ms-swift": ("kl",),
        "OpenRLHF": ("train/kl",),
        "NeMo-RL": ("train/kl_penalty",),
        "SkyRL": ("policy/policy_kl",),
    },
    "entropy": {
        "ms-swift": ("entropy/mean",),
        "verl": ("actor/entropy_loss",),
        "OpenRLHF": ("train/entropy_loss",),
        "NeMo-RL": ("train/approx_entropy",),
        "SkyRL": ("policy/policy_entropy",),
        "prime-rl": ("entropy/all/mean",),
    },
    "loss/policy": {"OpenRLHF": ("train/policy_loss",), "SkyRL": ("policy/policy_loss",)},
    "loss": {"ms-swift": ("loss",), "SkyRL": ("policy/final_loss",), "prime-rl": ("loss/mean",)},
    "grad_norm": {
        "ms-swift": ("grad_norm",),
        "slime": ("train/grad_norm",),
        "OpenRLHF": ("train/actor_grad_norm",),
        "NeMo-RL": ("train/grad_norm",),
        "SkyRL": ("policy/grad_norm",),
        "prime-rl": ("optim/grad_norm",),
    },
    "reward/mean": {
        "ms-swift": ("reward",),
        "slime": ("rollout/raw_reward",),
        "OpenRLHF": ("train/reward",),
        "NeMo-RL": ("train/reward",),
        "SkyRL": ("reward/avg_raw_reward",),
    },
    "reward/std": {"ms-swift": ("reward_std",), "OpenRLHF": ("train/group_reward_std",)},
    "reward/zero_variance": {"ms-swift": ("frac_reward_zero_std",)},
    "rollout/difference": {
        "slime": ("train/train_rollout_logprob_abs_diff",),
        "SkyRL": ("policy/rollout_train_logprobs_abs_diff_mean",),
    },
    "length/cut_off": {
        "ms-swift": ("completions/clipped_ratio",),
        "slime": ("rollout/truncated_ratio",),
        "OpenRLHF": ("train/rollout/truncated_rate",),
    },
}
"""Further names in the logs of hosts, complete: of metrics that the loss does not report, and those of older versions.

`is_masked` of prime-rl is a mean over sequences, `approx_entropy` of NeMo-RL an estimate from the sampled tokens, and
`entropy_loss` the mean entropy itself, in every host that has it. The names were read in the hosts' public source: slime
624b824a, OpenRLHF 3c3be623, NeMo-RL 7ea279ab, SkyRL a9564572, prime-rl 559b4477, ms-swift 3602360a; `clip_ratio` is that of
TRL 0.16, `actor/entropy_loss` that of verl 0.2.
"""

STEPS: tuple[str, ...] = (
    "step",
    "training/global_step",
    "train/global_step",
    "trainer/global_step",
    "global_step",
    "train/step",
    "rollout/step",
    "_step",
)
"""Names of the training step in logs, those of the host before that of W&B's own counter."""

OWN_PREFIX: Mapping[str, str] = {
    "verl": "actor/band/",
    "ROLL": "actor/band/",
    "NeMo-RL": "band/",
    "SkyRL": "band/",
    "Tinker": "band/",
    "prime-rl": "band/",
    "slime": "band/",
}
"""What an adapter puts before our own names in the log of its host."""

TENSORS: Mapping[str, Mapping[str, str]] = {
    "logprobs": {"TRL": "per_token_logps", "verl": "log_prob", "OpenRLHF": "log_probs", "prime-rl": "trainer_logprobs"},
    "old_logprobs": {
        "TRL": "old_per_token_logps",
        "verl": "old_log_prob",
        "OpenRLHF": "old_log_probs",
        "verl's DataProto": "old_log_probs",
        "OpenRLHF's Experience": "action_log_probs",
        "SkyRL": "action_log_probs",
    },
    "rollout_logprobs": {
        "TRL": "sampling_per_token_logps",
        "verl": "rollout_log_probs",
        "OpenRLHF": "rollout_log_probs",
        "prime-rl": "inference_logprobs",
    },
    "ref_logprobs": {
        "TRL": "ref_per_token_logps",
        "verl": "ref_log_prob",
        "OpenRLHF's Experience": "base_action_log_probs",
        "SkyRL": "base_action_log_probs",
    },
    "advantages": {},
    "mask": {
        "TRL": "completion_mask",
        "verl": "response_mask",
        "prime-rl": "loss_mask",
        "SkyRL": "loss_mask",
        "OpenRLHF": "action_mask",
    },
}
"""Our name of a tensor, and each host's name for it, where the host has another one.

`verl's DataProto` and `OpenRLHF's Experience` are what these hosts pass to an update; their losses have names of their own.
slime is not among them: its `log_probs` are those of the old policy, OpenRLHF's those of the policy in training.
"""


def metrics_of(host: str) -> dict[str, str]:
    """The host's own names of metrics, by our names.

    Args:
        host: A host of the table, such as "TRL" or "verl".

    Examples:
        >>> metrics_of("SkyRL")
        {'clip_fraction/any': 'clip_ratio'}
    """
    return {ours: theirs[host] for ours, theirs in METRICS.items() if host in theirs}


def logged_names(ours: str) -> tuple[str, ...]:
    """Every name that a metric has in the log of some host: those of TRL and verl first.

    Args:
        ours: Our name of the metric.

    Examples:
        >>> logged_names("length/cut_off")[:3]
        ('completions/clipped_ratio', 'response_length/clip_ratio', 'train/completions/clipped_ratio')
    """
    reported = METRICS.get(ours, {})
    found = [reported[host] for host in ("TRL", "verl") if host in reported]
    found += [f"{prefix}{name}" for host, name in reported.items() for prefix in LOG_PREFIX.get(host, ("",))]
    for host, names in LOGGED.get(ours, {}).items():
        also = LOG_PREFIX[host] if host in ("TRL", "ms-swift") else ("",)
        found += [f"{prefix}{name}" for name in names for prefix in also]
    return tuple(dict.fromkeys(found))


def own_names(ours: str) -> tuple[str, ...]:
    """Every name that a metric of bandpo has in a log: in TRL and verl, in another loop, and as each adapter reports it.

    Args:
        ours: A name of `bandpo.metrics`.

    Examples:
        >>> own_names("ratio/mean")[:4]
        ('ratio/mean', 'actor/band/ratio/mean', 'train/ratio/mean', 'train/band/ratio/mean')
    """
    averaged = averaged_name(ours)
    reported = f"{OWN_PREFIX['verl']}{averaged}"
    found = [TRL_NAMES.get(ours, ours), reported, VERL_NAMES.get(ours, reported), ours, f"train/{ours}"]
    for host, prefix in OWN_PREFIX.items():
        ending = "/mean" if host == "prime-rl" else ""
        found += [f"{before}{prefix}{averaged}{ending}" for before in LOG_PREFIX.get(host, ("",))]
    return tuple(dict.fromkeys((*found, *logged_names(ours))))


TRL_NAMES: Mapping[str, str] = metrics_of("TRL")
"""TRL's own names of metrics, by our names."""

VERL_NAMES: Mapping[str, str] = metrics_of("verl")
"""verl's own names of metrics, by our names."""


def averaged_name(name: str) -> str:
    """The name that a metric of `bandpo.metrics` has in hosts that average each metric over micro-batches.

    A share of some of the tokens is reported as a share of all valid tokens there, with `_of_all` in its name (see
    `mean_proof`); `band/` at the beginning is left out, because the prefix of the adapter says it already.

    Args:
        name: A name of `bandpo.metrics.policy_metrics`.

    Examples:
        >>> [averaged_name(n) for n in ("band/cap_fraction", "band/upper_mean", "ratio/mean")]
        ['cap_fraction_of_all', 'upper_mean', 'ratio/mean']
    """
    family, slash, rest = name.partition("/")
    if family == "clip_fraction_by_prob":
        return f"{family}_of_all{slash}{rest}"
    if family == "band":
        return f"{rest}_of_all" if rest.endswith("_fraction") else rest
    return name
