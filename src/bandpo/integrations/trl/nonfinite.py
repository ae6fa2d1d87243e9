"""Tokens whose log-probs are NaN or infinite. TRL has no rule for them; with these values they add nothing to its loss."""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bandpo._inputs import LOWEST_LOGPROB, as_columns, is_logprob
from bandpo.integrations.trl.host import Batch
from bandpo.integrations.trl.rollout import mask_of
from bandpo.objective import RatioLevel
from bandpo.surrogates import MAX_LOG_RATIO
from bandpo.terms import sequence_log_ratio


class Scored(NamedTuple):
    """Log-probs of a batch after the rule for tokens that are NaN or infinite."""

    logprobs: Tensor
    """Log-probs of the policy in training, `(batch, time)`, float32, with gradient where a token is used."""
    log_ratio: Tensor
    """Log-ratio of each token, `(batch, time)`, without gradient; 0 where `strange`."""
    strange: Tensor | None = None
    """Tokens with a log-prob that is NaN or infinite, bool, `(batch, time)`; None where the host has seen that all log-probs
    and advantages are finite."""
    silent: Tensor | None = None
    """Valid tokens whose advantage was set to 0, bool, `(batch, time)`; None where it is known that there is none."""


def without_nonfinite(new: Tensor, batch: Batch, ratio_level: RatioLevel) -> Scored:
    """Change a batch of TRL so that tokens whose log-probs are NaN or infinite add nothing to the loss.

    The rule is that of `token_objective`: such tokens count in the denominators, their advantage is 0, and the ratio of a
    sequence is taken without them. Log-ratios beyond ±40, whose exponentials would overflow, have no gradient. TRL reads the
    other tensors of the batch after it has called for the log-probs, so they are replaced in `batch` itself. Tensors of an
    accelerator are not read by the host, apart from one flag where the ratio is that of a sequence.

    Args:
        new: Log-probs of the policy in training, `(batch, time)`.
        batch: TRL's inputs. Its log-probs and advantages may be replaced.
        ratio_level: `Objective.ratio_level`.

    Returns:
        The log-probs to give to TRL, and which tokens are strange.
    """
    old = batch.get("old_per_token_logps")
    old = new.detach() if old is None else old
    log_ratio = new.detach() - old
    if new.device.type == "cpu" and _all_usual(log_ratio, old, new.detach(), batch):
        batch["old_per_token_logps"] = old
        return Scored(new, log_ratio)
    return _replaced(new, old, batch, by_sequence=ratio_level == "sequence")


def _all_usual(log_ratio: Tensor, old: Tensor, new: Tensor, batch: Batch) -> bool:
    """Whether no rule applies to any token, the padding included, so that nothing has to be replaced; read by the host."""
    if not old.numel():
        return False
    ref = batch.get("ref_per_token_logps")
    found = [old, batch["advantages"], log_ratio, *([] if ref is None else [ref - new])]
    # The largest magnitudes; NaN is the largest one of all.
    largest = cast("list[float]", torch.stack([torch.linalg.vector_norm(x, math.inf) for x in found]).tolist())
    # Half of the limit for one of the two log-probs: the other one is then within the limit too.
    return largest[0] <= -LOWEST_LOGPROB / 2 and largest[1] < math.inf and all(x <= MAX_LOG_RATIO for x in largest[2:])


def _replaced(new: Tensor, old: Tensor, batch: Batch, *, by_sequence: bool) -> Scored:
    """The batch with other values at the tokens that a rule applies to, whether or not there are such tokens."""
    ref = batch.get("ref_per_token_logps")
    strange = ~(is_logprob(new) & is_logprob(old))  # also in the padding: TRL multiplies it by 0, and NaN stays NaN
    valid = mask_of(batch) != 0
    used = valid & ~strange
    old, new = zero_where(strange, old), zero_where(strange, new)
    log_ratio = whole = (new - old).detach()
    if by_sequence:
        # TRL averages over all valid tokens: with this value at the others, the mean is that of the used ones.
        new = torch.where(strange, old + sequence_log_ratio(new - old, used), new)
        whole = sequence_log_ratio((new - old).detach(), used)
    held = whole.abs() > MAX_LOG_RATIO
    batch["old_per_token_logps"] = torch.where(held, new.detach(), old)
    silent = valid & (strange | held)
    # TRL tells by its advantages whether to count clipped sequences or tokens: they stay a column where they can.
    silenced = not by_sequence or bool(silent.any())
    if silenced:
        batch["advantages"] = zero_where(silent, as_columns(batch["advantages"], new).expand(new.shape))
    if ref is not None:  # the KL of equal log-probs is 0 and has no gradient
        off = strange | ~is_logprob(ref) | ((ref - new.detach()).abs() > MAX_LOG_RATIO)
        batch["ref_per_token_logps"] = torch.where(off, new.detach(), ref)
    return Scored(new, log_ratio, strange, silent if silenced else None)


def zero_where(where: Tensor, x: Tensor) -> Tensor:
    """The tensor `x` with 0 in the places where the bool tensor `where` is true."""
    return x.masked_fill(where, 0.0)
