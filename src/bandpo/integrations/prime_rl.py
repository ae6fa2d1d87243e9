"""The objectives as prime-rl's custom loss, by import path.

    [trainer.loss]
    type = "custom"
    import_path = "bandpo.integrations.prime_rl.policy_loss"
    kwargs = { objective = "bandpo-kl", radius = 0.05 }

prime-rl calls its loss once for each sequence with the trainer's and the inference engine's log-probs, multiplies each token by
its weight, and divides the sum over all sequences by the tokens of the global batch. This is a token mean; the objective's own
aggregation is not used. There is no recomputed π_old, so the ratio of every objective is taken against the sampler.
"""

import functools
from typing import Any

from bandpo.integrations._host import evaluate, host_objective
from bandpo.monitoring.names import OWN_PREFIX
from bandpo.objective import Objective


def policy_loss(inputs: Any, objective: str = "bandpo-kl", **options: Any) -> Any:
    """The loss of one sequence, `-Σ_t w_t s(log r_t, A_t, b_t)`, with r against the sampler and the host's weights w.

    Args:
        inputs: prime-rl's LossInputs: `trainer_logprobs`, `inference_logprobs`, `advantages`, `loss_mask` and, since June 2026,
            `loss_weights`, each `(time,)`.
        objective: A name of `bandpo objectives`, or "package.module:NAME".
        options: Changes of the objective's region: fields of `RegionOptions`, except `divergence_top_k`.

    Returns:
        prime-rl's LossOutputs: a 0-d `loss`, and `metrics` under `band/`; prime-rl logs their mean, maximum and other
        statistics over the sequences.

    Raises:
        ValueError: If an option would be ignored, or the objective needs an input that prime-rl does not pass to a loss.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    found = evaluate(
        _objective(objective, **options),
        logprobs=inputs.trainer_logprobs.unsqueeze(0),
        old_logprobs=None,
        rollout_logprobs=inputs.inference_logprobs.unsqueeze(0),
        advantages=inputs.advantages.unsqueeze(0),
        mask=inputs.loss_mask.unsqueeze(0),
    )
    value = found.value.squeeze(0)
    weights = getattr(inputs, "loss_weights", None)
    if weights is not None:
        value = value * weights.masked_fill(inputs.loss_mask == 0, 0.0)
    return LossOutputs(
        loss=-value.sum(), metrics={f"{OWN_PREFIX['prime-rl']}{name}": x for name, x in found.metrics.items()}
    )


@functools.lru_cache(maxsize=16)
def _objective(name: str, **options: Any) -> Objective:
    return host_objective("prime-rl", name, options, sampler="only", rows="one")
