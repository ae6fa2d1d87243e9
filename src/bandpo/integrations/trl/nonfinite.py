"""Tokens whose log-probs are NaN or infinite. TRL has no rule for them; with these values they add nothing to its loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from bandpo._inputs import as_columns, is_logprob
from bandpo.integrations.trl.host import Batch
from bandpo.integrations.trl.rollout import mask_of
from bandpo.objective import RatioLevel
from bandpo.surrogates import MAX_LOG_RATIO
from bandpo.terms import sequence_log_ratio


class Scored(NamedTuple):
    """Log-probs of a batch after the rule for tokens that are NaN or infinite."""

    logprobs: Tensor
    """Log-probs of the policy in training, `(batch, time)`, float32, with gradient where a token is used."""
    silenced: bool
    """Whether the advantage of some valid token was set to 0."""


def without_nonfinite(new: Tensor, batch: Batch, ratio_level: RatioLevel) -> Scored:
    """Change a batch of TRL so that tokens whose log-probs are NaN or infinite add nothing to the loss.

    The rule is that of `token_objective`: such tokens count in the denominators, their advantage is 0, and the ratio of a
    sequence is taken without them. Log-ratios beyond ±40, whose exponentials would overflow, have no gradient. TRL reads the
    other tensors of the batch after it has called for the log-probs, so they are replaced in `batch` itself.

    Args:
        new: Log-probs of the policy in training, `(batch, time)`.
        batch: TRL's inputs. Its log-probs and advantages may be replaced.
        ratio_level: `Objective.ratio_level`.

    Returns:
        The log-probs to give to TRL, and whether an advantage was set to 0.
    """
    old, ref = batch.get("old_per_token_logps"), batch.get("ref_per_token_logps")
    old = new.detach() if old is None else old
    strange = ~(is_logprob(new) & is_logprob(old))  # also in the padding: TRL multiplies it by 0, and NaN stays NaN
    valid = mask_of(batch) != 0
    by_sequence, used = ratio_level == "sequence", valid & ~strange
    if strange.any():
        old, new = zero_where(strange, old), zero_where(strange, new)
        if (
            by_sequence
        ):  # TRL averages over all valid tokens: with this value at the others, the mean is that of the used ones
            new = torch.where(strange, old + sequence_log_ratio(new - old, used), new)
    log_ratio = (new - old).detach()
    held = (sequence_log_ratio(log_ratio, used) if by_sequence else log_ratio).abs() > MAX_LOG_RATIO
    batch["old_per_token_logps"] = torch.where(held, new.detach(), old)
    silent = valid & (strange | held)
    silenced = bool(silent.any())
    if silenced:
        batch["advantages"] = zero_where(silent, as_columns(batch["advantages"], new).expand(new.shape))
    if ref is not None:  # the KL of equal log-probs is 0 and has no gradient
        off = strange | ~is_logprob(ref) | ((ref - new.detach()).abs() > MAX_LOG_RATIO)
        batch["ref_per_token_logps"] = torch.where(off, new.detach(), ref)
    return Scored(new, silenced)


def zero_where(where: Tensor, x: Tensor) -> Tensor:
    """The tensor `x` with 0 in the places where the bool tensor `where` is true."""
    return x.masked_fill(where, 0.0)
