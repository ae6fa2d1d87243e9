"""The objectives as a loss function of NeMo-RL, one line in a copy of its `examples/run_grpo.py`.

    from bandpo.integrations.nemo_rl import BandLoss
    ...
    (policy, ..., loss_fn, ...) = setup(config, tokenizer, dataset, val_dataset)
    loss_fn = BandLoss(loss_fn, objective="bandpo-kl", radius=0.05)  # this line; then grpo_train(..., loss_fn, ...) as before

The object is sent to the workers, whose environments need bandpo (`uv add bandpo` in NeMo-RL's project). NeMo-RL itself
determines the reduction (`loss_fn.token_level_loss`), the KL penalty and the diagnostics: its own loss computes them, with all
advantages set to zero.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bandpo._inputs import fill
from bandpo.integrations._host import attributes, check_host_kl, evaluate, host_objective, refuse_ignored
from bandpo.integrations._host_metrics import as_floats
from bandpo.losses import aggregate
from bandpo.monitoring.names import OWN_PREFIX, metrics_of
from bandpo.objective import Objective
from bandpo.surrogates.corrections import TIS, Correction, IcePop

_NAMES = metrics_of("NeMo-RL")
_DEFAULTS = {
    "disable_ppo_ratio": False,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.2,
    "ratio_clip_c": None,
    "sequence_level_importance_ratios": False,
    "use_cispo": False,
    "force_on_policy_ratio": False,
    "positive_example_nll_weight": 0.0,
}
_LOGPROBS = ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs")


class BandLoss:
    """NeMo-RL's `ClippedPGLossFn` with a bandpo objective.

    Args:
        host_loss: The `loss_fn` that NeMo-RL's `setup` returned.
        objective: A name of `bandpo objectives`, "package.module:NAME", or an `Objective`.
        options: Changes of the objective's region: fields of `RegionOptions`, except `divergence_top_k`.

    Raises:
        ValueError: If an option of bandpo or of NeMo-RL would be ignored.
    """

    def __init__(self, host_loss: Any, objective: Objective | str = "bandpo-kl", **options: Any) -> None:
        refuse_ignored("NeMo-RL", attributes(host_loss, _DEFAULTS), _DEFAULTS)
        chosen = host_objective("NeMo-RL", objective, options, sampler="beside", kl="")
        check_host_kl(
            "NeMo-RL",
            chosen,
            host_loss.reference_policy_kl_penalty,
            f"loss_fn.reference_policy_kl_penalty={chosen.kl_coef:g} and reference_policy_kl_type",
        )
        correction = _correction(host_loss)
        if correction is not None:
            if chosen.correction is not None or chosen.anchor == "rollout":
                raise ValueError(
                    f"NeMo-RL: use_importance_sampling_correction is on, and objective {chosen.name!r} accounts for the "
                    "sampler itself; use one"
                )
            chosen = dataclasses.replace(chosen, correction=correction)
        self.objective = chosen
        self.loss_type, self.input_type = host_loss.loss_type, host_loss.input_type
        self.reference_policy_kl_penalty = host_loss.reference_policy_kl_penalty
        self.use_fused_linear_logprobs = getattr(host_loss, "use_fused_linear_logprobs", False)
        self.metric_normalizations = _normalizations(host_loss, chosen)
        # It computes the KL penalty and the diagnostics alone: without a ratio, which could overflow, and without weights.
        self.rest = copy.copy(host_loss)
        self.rest.disable_ppo_ratio, self.rest.use_importance_sampling_correction = True, False
        self.rest.truncated_importance_sampling_ratio = None

    def __call__(
        self, next_token_logprobs: Tensor, data: Mapping[str, Any], global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss and metrics of a micro-batch, as parts that add up over micro-batches and ranks.

        Args:
            next_token_logprobs: Log-probs `(batch, time - 1)` of the policy in training, with gradient.
            data: NeMo-RL's batch; the first token of each sequence is not a prediction.
            global_valid_seqs: Number of valid sequences of the global batch, 0-d.
            global_valid_toks: Number of valid tokens of the global batch, 0-d.
        """
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        valid = mask != 0
        clean = dict(data)
        for name in _LOGPROBS:
            if name in clean:
                clean[name] = torch.cat([clean[name][:, :1], fill(clean[name][:, 1:], valid)], 1)
        found = evaluate(
            self.objective,
            logprobs=next_token_logprobs,
            old_logprobs=clean["prev_logprobs"][:, 1:],
            rollout_logprobs=clean["generation_logprobs"][:, 1:],
            advantages=data["advantages"][:, 1:],
            mask=mask,
        )
        token_level = self.loss_type.value == "token_level"
        how, count = ("token-mean", global_valid_toks) if token_level else ("seq-mean-token-mean", global_valid_seqs)
        loss = aggregate(-found.value * mask, valid, how, normalizer=count.clamp_min(1))
        clean["advantages"] = torch.zeros_like(data["advantages"])
        if "curr_logprobs_unfiltered" in clean:
            clean["curr_logprobs_unfiltered"] = fill(clean["curr_logprobs_unfiltered"], valid)
        rest, metrics = self.rest(fill(next_token_logprobs, valid), clean, global_valid_seqs, global_valid_toks)
        if self.reference_policy_kl_penalty:
            loss = loss + rest
        share = valid.sum() / global_valid_toks.clamp_min(1)
        prefix = OWN_PREFIX["NeMo-RL"]
        own = {f"{prefix}{name}": x * share for name, x in found.metrics.items() if not name.endswith("_max")}
        metrics = {name: x for name, x in metrics.items() if not name.startswith(_NAMES["ratio/mean"])}
        ratio = found.log_ratio.exp()
        own |= {
            _NAMES["loss"]: loss.detach(),
            _NAMES["ratio/mean"]: own[f"{prefix}ratio/mean"],
            _NAMES["ratio/min"]: ratio.masked_fill(~valid, torch.inf).amin(),
            _NAMES["ratio/max"]: ratio.masked_fill(~valid, -torch.inf).amax(),
        }
        return loss, metrics | as_floats(own)


def _correction(host_loss: Any) -> Correction | None:
    """NeMo-RL's weights for the sampler as one of ours."""
    if not host_loss.use_importance_sampling_correction:
        return None
    kind, high = host_loss.truncated_importance_sampling_type, host_loss.truncated_importance_sampling_ratio
    low = host_loss.truncated_importance_sampling_ratio_min
    if kind is None:
        return TIS(float("inf") if high is None else high)
    if kind == "tis" and not low:
        return TIS(high)
    if kind == "icepop":
        return IcePop(low, high)
    raise ValueError(
        f"NeMo-RL: truncated_importance_sampling_type={kind!r} between {low} and {high} cannot be expressed; there are tis "
        "without a lower bound and icepop"
    )


def _normalizations(host_loss: Any, objective: Objective) -> dict[str, Any]:
    """NeMo-RL's table of what each metric is divided by, extended by ours: by all tokens, like its `gen_kl_error`."""
    table = dict(getattr(host_loss, "metric_normalizations", {}))
    if "gen_kl_error" not in table:
        return table
    one = torch.zeros(1, 1)
    names = evaluate(
        objective, logprobs=one, old_logprobs=one, rollout_logprobs=one, advantages=one, mask=one + 1
    ).metrics
    return {**table, **{f"{OWN_PREFIX['NeMo-RL']}{name}": table["gen_kl_error"] for name in names}}
