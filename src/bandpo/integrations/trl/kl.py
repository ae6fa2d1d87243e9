"""The KL to the reference in TRL: what is said about it, and the terms that TRL's own loss does not have."""

from typing import NamedTuple

from torch import Tensor

from bandpo._inputs import is_logprob
from bandpo.integrations.trl.config import BandGRPOConfig
from bandpo.integrations.trl.host import Batch, GRPOHost
from bandpo.integrations.trl.rollout import mask_of
from bandpo.integrations.trl.strategy import averaged
from bandpo.metrics import PooledSum
from bandpo.objective import Objective
from bandpo.reference import DESCENDS, reference_kl
from bandpo.terms import TokenObjective


class KLOfBatch(NamedTuple):
    """The KL term of a batch that bandpo computes."""

    loss: Tensor
    """To add to TRL's loss, times beta; a number with gradient."""
    logged: PooledSum
    """The k3 of the tokens, for the log."""


def kl_of_batch(trainer: GRPOHost, terms: TokenObjective, logprobs: Tensor, batch: Batch) -> KLOfBatch:
    """The KL term of `bandpo.policy_loss`, averaged like TRL's loss.

    Args:
        trainer: The trainer.
        terms: The terms of the objective for this batch.
        logprobs: Log-probs of the sampled tokens under the policy in training, `(batch, time)`, with gradient.
        batch: TRL's inputs.
    """
    ref = batch["ref_per_token_logps"]
    known = (mask_of(batch) != 0) & ~terms.nonfinite & is_logprob(ref)
    kl, old = trainer.args.kl_term, terms.anchor_logprobs
    term = reference_kl(logprobs, ref, kl, old_logprobs=old, mask=known, weights=terms.weights)
    shown = reference_kl(logprobs.detach(), ref, "k3", mask=known)
    return KLOfBatch(averaged(trainer, term, batch).value, PooledSum(shown.sum(), known.sum()))


def kl_of_run(objective: Objective, args: BandGRPOConfig) -> str | None:
    """What to tell the user at the start about a KL that came with the objective; None where there is nothing to tell.

    Args:
        objective: The objective of the run.
        args: The options of the run.
    """
    if not objective.kl_coef or not args.beta:
        return None
    found = DESCENDS[args.kl_term]
    return (
        f"The loss has a KL to the reference of beta={args.beta:g}, the {args.kl_term} of objective {objective.name!r}. Its "
        f"expected gradient is {found.on_policy} for tokens of the policy in training, and {found.off_policy} for tokens of "
        "the policy before the update. Set beta=0 to leave it out, or kl for another one"
    )
