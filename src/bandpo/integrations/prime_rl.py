"""The objectives as prime-rl's custom loss, by import path.

    [trainer.loss]
    type = "custom"
    import_path = "bandpo.integrations.prime_rl.policy_loss"
    kwargs = { objective = "bandpo-kl", radius = 0.05 }

prime-rl calls its loss once for each sequence, with the trainer's and the inference engine's log-probs, and divides the sum
over sequences itself. There is no recomputed π_old: the ratio of every objective is taken against the sampler here. Written
from prime-rl's documented signature and tested against a stand-in of it; prime-rl itself was not run.
"""

import dataclasses
import functools
from typing import Any

from bandpo._inputs import as_mask
from bandpo.composition import Objective
from bandpo.integrations._overrides import Overrides
from bandpo.metrics import averaged_by_host, policy_sums
from bandpo.objectives import get_objective
from bandpo.tokens import token_objective


def policy_loss(inputs: Any, objective: str = "bandpo-kl", **options: Any) -> Any:
    """The loss of one sequence: `-Σ_t s(log r_t, A_t, b_t)`, r against the sampler.

    Args:
        inputs: prime-rl's LossInputs: `trainer_logprobs`, `inference_logprobs`, `advantages` and `loss_mask`, each `(time,)`.
        objective: A name of `bandpo objectives`, or "package.module:NAME".
        options: `radius`, `radius_upper`, `divergence`, `max_ratio`, `relax`; `epsilon`, `epsilon_high` of fixed intervals.

    Returns:
        prime-rl's LossOutputs: a 0-d `loss`, and `metrics` under `band/`.

    Raises:
        ValueError: If an option would be ignored, or the objective needs what prime-rl does not give a loss.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    chosen = _objective(objective, **options)
    row = {name: getattr(inputs, name).unsqueeze(0) for name in ("trainer_logprobs", "inference_logprobs", "loss_mask")}
    mask = as_mask(row["loss_mask"], "loss_mask")
    terms = token_objective(
        chosen, logprobs=row["trainer_logprobs"], old_logprobs=None, rollout_logprobs=row["inference_logprobs"],
        advantages=inputs.advantages.unsqueeze(0), mask=mask,
    )  # fmt: skip
    sums = policy_sums(
        log_ratio=terms.log_ratio.detach(), old_logprobs=terms.anchor_logprobs, advantages=terms.advantages, mask=mask,
        bounds=terms.bounds, bounds_of=chosen.bounds, nonfinite=terms.nonfinite,
    )  # fmt: skip
    metrics = {f"band/{name}": value for name, value in averaged_by_host(sums).items()}
    return LossOutputs(loss=-terms.value.sum(), metrics=metrics)


@functools.lru_cache(maxsize=16)
def _objective(name: str, **options: Any) -> Objective:
    known = {f.name for f in dataclasses.fields(Overrides)}
    if unknown := set(options) - known:
        raise ValueError(
            f"unknown options {', '.join(sorted(unknown))}; choose from objective, {', '.join(sorted(known))}"
        )
    objective = Overrides(**options).apply(get_objective(name), name)
    if objective.extras or objective.correction is not None:
        need = ", ".join(objective.extras) or "π_old beside the sampler"
        raise ValueError(f"objective {name!r} needs {need}, which prime-rl does not give a loss")
    return dataclasses.replace(objective, anchor="rollout")
