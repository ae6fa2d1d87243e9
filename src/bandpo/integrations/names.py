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
    "old_logprobs": {"TRL": "old_per_token_logps", "verl": "old_log_prob", "OpenRLHF": "old_log_probs"},
    "rollout_logprobs": {
        "TRL": "sampling_per_token_logps",
        "verl": "rollout_log_probs",
        "prime-rl": "inference_logprobs",
    },
    "ref_logprobs": {"TRL": "ref_per_token_logps", "verl": "ref_log_prob"},
    "advantages": {},
    "mask": {"TRL": "completion_mask", "verl": "response_mask", "prime-rl": "loss_mask", "OpenRLHF": "action_mask"},
}
"""Our name of a tensor, and each host's name for it, where the host has another one."""


def metrics_of(host: str) -> dict[str, str]:
    """The host's own names of metrics, by our names.

    Args:
        host: A host of the table, such as "TRL" or "verl".

    Examples:
        >>> metrics_of("SkyRL")
        {'clip_fraction/any': 'clip_ratio'}
    """
    return {ours: theirs[host] for ours, theirs in METRICS.items() if host in theirs}


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
