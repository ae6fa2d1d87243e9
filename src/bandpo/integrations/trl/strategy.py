"""The two ways in which an objective reaches the loss of TRL's `GRPOTrainer`.

TRL's clipped loss takes the two widths of its interval as tensors. If an objective is this loss with other bounds, TRL
computes it (`HostComputes`). The loss of any other objective is added to what TRL computes for advantages of 0 (`WeCompute`).
The trainer asks once which of the two it needs (`strategy_for`).
"""

import functools
import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from bandpo._inputs import as_columns, is_logprob
from bandpo.bounds import Band, Bounds, Clip, RatioBounds, outside
from bandpo.integrations._host import refuse_denominators
from bandpo.integrations.trl.config import AGGREGATION_OF, BandGRPOConfig
from bandpo.integrations.trl.host import Batch, GRPOHost
from bandpo.integrations.trl.nonfinite import Scored
from bandpo.integrations.trl.rollout import PREFIX, mask_of, top_logprobs
from bandpo.integrations.trl.selection import WEIGHT
from bandpo.integrations.trl.top import learns_from_top
from bandpo.losses import aggregate
from bandpo.metrics import PooledSum
from bandpo.objective import Objective
from bandpo.surrogates import clip, hold
from bandpo.terms import TokenObjective, sequence_log_ratio, token_objective

_NO_CLIP = (1.0, math.inf)  # the interval [0, inf)
_LOWER, _UPPER = f"{PREFIX}lower", f"{PREFIX}upper"  # the bounds of a rollout's tokens


class GivenToTRL(NamedTuple):
    """What TRL's loss is computed from, in place of its own values."""

    advantages: Tensor
    """`(batch,)` or `(batch, time)`."""
    epsilon: tuple[float | Tensor, float | Tensor]
    """Widths of the interval below and above 1: numbers, or tensors of one entry for each token or sequence."""
    bounds: RatioBounds | None = None
    """The interval of each token, where it was computed."""


class OwnLoss(NamedTuple):
    """A policy loss that TRL does not know."""

    value: Tensor
    """To add to TRL's loss; a number with gradient."""
    as_logged: Tensor
    """The same number as TRL logs its `policy_loss`: before the division by the accumulation steps, without gradient."""


class Strategy(ABC):
    """How the objective of a trainer is computed.

    Args:
        trainer: The trainer. Its objective may change during training, by its radius.
    """

    replaces_loss: ClassVar[bool]
    """Whether TRL computes its loss for advantages of 0, so that its policy loss is 0 and its counts of clips are wrong."""

    def __init__(self, trainer: GRPOHost) -> None:
        self.trainer = trainer

    @abstractmethod
    def refuse(self, args: BandGRPOConfig) -> None:
        """Refuse options of TRL that would have no effect.

        Args:
            args: The options of the run.

        Raises:
            ValueError: If such an option is set.
        """

    def of_rollout(self, rollout: Batch) -> dict[str, Tensor]:
        """What can be computed once for a rollout, because no step on it changes it; tensors to add to the rollout.

        Args:
            rollout: TRL's rollout.
        """
        del rollout
        return {}

    @abstractmethod
    def given_to_trl(self, batch: Batch) -> GivenToTRL:
        """Advantages and epsilon for TRL's loss.

        Args:
            batch: TRL's inputs.
        """

    @abstractmethod
    def terms(self, model: nn.Module, logprobs: Tensor, batch: Batch, given: GivenToTRL) -> TokenObjective:
        """The terms of each token, for the metrics and for `own_loss`.

        Args:
            model: The policy in training.
            logprobs: Log-probs of the sampled tokens under the policy in training, `(batch, time)`.
            batch: TRL's inputs.
            given: What `given_to_trl` returned for this batch.
        """

    def basic_sums(self, scored: Scored, batch: Batch, given: GivenToTRL) -> dict[str, PooledSum] | None:
        """The basic metrics of `policy_sums`, where they can be had without the terms; otherwise None.

        Args:
            scored: The log-probs that TRL's loss was computed from.
            batch: TRL's inputs.
            given: What `given_to_trl` returned for this batch.
        """
        del scored, batch, given
        return None

    @abstractmethod
    def own_loss(self, terms: TokenObjective, batch: Batch) -> OwnLoss | None:
        """The loss to add to TRL's; None if TRL has computed the whole objective.

        Args:
            terms: What `terms` returned for this batch.
            batch: TRL's inputs.
        """


class HostComputes(Strategy):
    """TRL computes the clipped objective; bandpo gives it the bounds as its two epsilons."""

    replaces_loss = False
    _region_of_rollout: Bounds | None = (
        None  # whose bounds travel with the rollout in use; a resumed run does not know it
    )

    @staticmethod
    def can_compute(objective: Objective) -> bool:
        """Whether an objective is TRL's clipped loss with other bounds."""
        alone = objective.correction is None and not objective.bounds_inputs and not objective.filters
        # TRL takes the bounds of tokens, or one interval for all sequences.
        at_level = objective.ratio_level == "token" or (
            objective.ratio_level == "sequence" and isinstance(objective.bounds, Clip)
        )
        return objective.surrogate is clip and objective.anchor == "old" and at_level and alone

    def refuse(self, args: BandGRPOConfig) -> None:
        del args  # TRL honours all of its options: the loss is its own

    def given_to_trl(self, batch: Batch) -> GivenToTRL:
        region = self.trainer.objective.bounds
        old, advantages = batch.get("old_per_token_logps"), batch["advantages"]
        if WEIGHT in batch:  # the clipped objective is linear in the advantage
            advantages = advantages * batch[WEIGHT]
        if isinstance(region, Clip):  # one number for all tokens, which also fits the ratio of a sequence
            return GivenToTRL(advantages, (region.low, cast("float", region.high)))  # `Clip` fills `high` in
        if old is None:  # every ratio is 1
            return GivenToTRL(advantages, _NO_CLIP)
        if _LOWER in batch and self._region_of_rollout is region:
            bounds = RatioBounds(batch[_LOWER], batch[_UPPER])
        else:
            bounds = cast("RatioBounds", region(_usable(old)))  # `clip` takes an interval
        return GivenToTRL(advantages, (1 - bounds.lower, bounds.upper - 1), bounds)

    def terms(self, model: nn.Module, logprobs: Tensor, batch: Batch, given: GivenToTRL) -> TokenObjective:
        del model
        return token_objective(
            self.trainer.objective,
            logprobs=logprobs.detach(),
            old_logprobs=_old_logprobs(batch, logprobs),
            advantages=batch["advantages"],
            mask=mask_of(batch),
            bounds=given.bounds,
        )

    def own_loss(self, terms: TokenObjective, batch: Batch) -> OwnLoss | None:
        del terms, batch
        return None

    def of_rollout(self, rollout: Batch) -> dict[str, Tensor]:
        old, region = rollout.get("old_per_token_logps"), self.trainer.objective.bounds
        if old is None or self.trainer.radius_moves or not isinstance(region, Band):
            return {}
        bounds, self._region_of_rollout = region(_usable(old)), region
        return {_LOWER: bounds.lower, _UPPER: bounds.upper}

    def basic_sums(self, scored: Scored, batch: Batch, given: GivenToTRL) -> dict[str, PooledSum] | None:
        objective, mask = self.trainer.objective, mask_of(batch)
        simple = isinstance(objective.bounds, Clip | Band)  # their interval holds 1, and no edge is NaN
        if given.bounds is None and not simple:
            return None
        used = valid = mask != 0
        if scored.strange is not None:
            used = used & ~scored.strange & as_columns(batch["advantages"], mask).isfinite()
        if given.bounds is not None and not simple:
            used = used & ~(given.bounds.lower.isnan() | given.bounds.upper.isnan())
        log_ratio = scored.log_ratio
        if objective.ratio_level == "sequence":
            log_ratio = sequence_log_ratio(log_ratio, used).expand(used.shape)
        log_ratio = log_ratio if scored.strange is None else hold(log_ratio)
        r, zero = log_ratio.exp(), _zero(log_ratio.dtype, log_ratio.device)
        count = used.sum(dtype=r.dtype)
        nonfinite = PooledSum(zero, count)
        if used is not valid:
            total = valid.sum(dtype=r.dtype)
            nonfinite = PooledSum(total - count, total)
        sums = {
            "ratio/mean": PooledSum(torch.where(used, r, zero).sum(), count),
            "kl/old_new": PooledSum(torch.where(used, r - log_ratio - 1, zero).sum(), count),
            "nonfinite_fraction": nonfinite,
        }
        if scored.silent is None and self.trainer.accelerator.num_processes == 1:
            return sums  # TRL's counts are right; ours are for a batch in which any process has silent tokens
        edges = RatioBounds(r, r) if given.bounds is None else given.bounds  # every ratio is 1 where they are not known
        if isinstance(objective.bounds, Clip):
            edges = objective.bounds(r)
        clipped = outside(log_ratio, as_columns(batch["advantages"], mask), edges, ratio=r) & used
        high = (clipped & (log_ratio > 0)).sum(dtype=r.dtype)
        every = clipped.sum(dtype=r.dtype)
        return sums | {
            "clip_fraction/low": PooledSum(every - high, count),
            "clip_fraction/high": PooledSum(high, count),
            "clip_fraction/any": PooledSum(every, count),
        }


class WeCompute(Strategy):
    """bandpo computes the objective and adds it to TRL's loss, which TRL computes for advantages of 0.

    Filters take this way too, because TRL has no place for a weight that depends on the policy.

    With advantages of 0, TRL's loss holds its other terms alone: the KL to the reference, the entropy bonus, auxiliary losses.
    """

    replaces_loss = True

    def __init__(self, trainer: GRPOHost) -> None:
        super().__init__(trainer)
        self._top_k = trainer.objective.top_k  # a moving radius does not change it, and it takes a while to find

    def refuse(self, args: BandGRPOConfig) -> None:
        refuse_denominators("TRL", self.trainer.objective)
        unsupported = {
            "delta": args.delta is not None,
            "top_entropy_quantile": args.top_entropy_quantile < 1,
            "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
        }
        for name, is_set in unsupported.items():
            if is_set:
                instead = "; use filter=bandpo.surrogates.filters.opsm" if name == "off_policy_mask_threshold" else ""
                raise ValueError(
                    f"{name}={getattr(args, name)} acts on TRL's own clipped loss, which this objective replaces{instead}"
                )

    def given_to_trl(self, batch: Batch) -> GivenToTRL:
        return GivenToTRL(torch.zeros_like(batch["advantages"]), _NO_CLIP)

    def terms(self, model: nn.Module, logprobs: Tensor, batch: Batch, given: GivenToTRL) -> TokenObjective:
        del given
        objective, old = self.trainer.objective, _old_logprobs(batch, logprobs)
        # Without an inference engine this model samples, with the weights of π_old: the recomputed log-probs are taken for the
        # sampler's, which differ by rounding alone (`sampler.mismatch` measures it). vLLM sends NaN for a token that it could
        # not score.
        sampled = batch.get("sampling_per_token_logps")
        sampled = old if sampled is None else torch.where(sampled.isnan(), old, sampled)
        return token_objective(
            objective,
            logprobs=logprobs,
            old_logprobs=old,
            rollout_logprobs=sampled,
            advantages=batch["advantages"],
            mask=mask_of(batch),
            extras=self._extras(model, batch),
        )

    def _extras(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The extras of the objective that travel with the batch, and the policy's log-probs of the sampler's top K."""
        objective = self.trainer.objective
        found = {name: batch[PREFIX + name] for name in objective.extras if PREFIX + name in batch}
        if not self._top_k:
            return found
        ids = batch[f"{PREFIX}top_ids"]
        top = self.trainer.last_top if learns_from_top(objective) else None
        if top is None:
            top = top_logprobs(self.trainer, model, batch, ids, self._top_k)[0]
        return found | {
            "old_topk_logprobs": batch[f"{PREFIX}top_logprobs"],
            "topk_logprobs": top,
            "sampled_in_topk": (ids == batch["completion_ids"].unsqueeze(-1)).any(-1),
        }

    def own_loss(self, terms: TokenObjective, batch: Batch) -> OwnLoss:
        trainer, per_token = self.trainer, -terms.value
        if WEIGHT in batch:
            per_token = per_token * batch[WEIGHT].unsqueeze(1)
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            per_token = per_token * batch["importance_sampling_ratio"]
        return averaged(trainer, per_token, batch)


def averaged(trainer: GRPOHost, per_token: Tensor, batch: Batch) -> OwnLoss:
    """A loss of each token as one number, averaged like TRL's loss of the same `loss_type`.

    Args:
        trainer: The trainer.
        per_token: The loss of each token, `(batch, time)`.
        batch: TRL's inputs.
    """
    accumulation = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
    loss = aggregate(
        per_token,
        mask_of(batch),
        AGGREGATION_OF[trainer.loss_type],
        normalizer=_normalizer(trainer, batch, accumulation),
        max_length=trainer.max_completion_length if trainer.loss_type == "dr_grpo" else None,
    )
    # The normaliser of "dapo" is that of the whole accumulation window already.
    return OwnLoss(loss, loss.detach() * (1 if trainer.loss_type == "dapo" else accumulation))


def _normalizer(trainer: GRPOHost, batch: Batch, accumulation: int) -> Tensor | float:
    """What TRL's loss of the same `loss_type` is divided by."""
    mask = mask_of(batch)
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1.0) * accumulation
    if trainer.loss_type != "dapo":
        return mask.size(0) * accumulation
    # num_items_in_batch counts the tokens of a rollout over all processes; one accumulation window has its share of them.
    normalizer = batch["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return normalizer * accumulation / trainer.args.steps_per_generation if trainer.model.training else normalizer


def strategy_for(objective: Objective) -> type[Strategy]:
    """The strategy that an objective needs."""
    return HostComputes if HostComputes.can_compute(objective) else WeCompute


@functools.lru_cache(maxsize=8)
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0 on the device, which is not made anew in each micro-batch."""
    return torch.zeros((), dtype=dtype, device=device)


def _usable(logprobs: Tensor) -> Tensor:
    """Log-probs with 0 in place of those that are NaN or infinite."""
    return torch.where(is_logprob(logprobs), logprobs, 0.0)


def _old_logprobs(batch: Batch, logprobs: Tensor) -> Tensor:
    """Log-probs before the update; TRL leaves them out where every ratio is 1."""
    old = batch.get("old_per_token_logps")
    return logprobs.detach() if old is None else old
