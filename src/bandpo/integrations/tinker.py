"""The objectives as a custom loss of the Tinker SDK.

    from functools import partial
    from bandpo.integrations.tinker import policy_loss

    training_client.forward_backward_custom(data, partial(policy_loss, objective="bandpo-kl", radius=0.05))

The `loss_fn_inputs` of each datum must contain, in addition to `target_tokens`: `logprobs` (those of the sampler), `advantages`
and `mask`, with one number for each target token. The loss runs on your machine; only `target_tokens` and the gradient are sent
to the server (SDK 0.38; older versions sent all fields, and the server refused unknown names).
Tinker has no recomputed π_old: the ratio of every objective is taken against the sampler.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bandpo.integrations._host import evaluate, host_objective
from bandpo.integrations._host_metrics import as_floats
from bandpo.losses import aggregate
from bandpo.monitoring.names import OWN_PREFIX


def policy_loss(
    data: Sequence[Any],
    logprobs: Sequence[Tensor],
    *,
    objective: Any = "bandpo-kl",
    max_length: int | None = None,
    normalizer: float | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """`bandpo.policy_loss` of the data of one call, with the objective's own aggregation.

    Args:
        data: Tinker's `Datum` objects.
        logprobs: Log-probs of their target tokens under the model in training, from Tinker, with gradient, `(tokens,)` each.
        objective: A name of `bandpo objectives`, "package.module:NAME", or an `Objective`.
        max_length: The argument `max_length` of `bandpo.policy_loss`.
        normalizer: The argument `normalizer` of `bandpo.policy_loss`, when several calls share one optimiser step.
        options: Changes of the objective's region: fields of `RegionOptions`, except `divergence_top_k`.

    Returns:
        The loss, and metrics under `band/`. A datum with an empty mask is in none of them.

    Raises:
        ValueError: If an option would be ignored, a datum lacks a field, or the objective needs an
            input that Tinker does not provide.
    """
    chosen = host_objective("Tinker", objective, options, sampler="only")
    columns = {name: [_field(datum, name, new) for datum, new in zip(data, logprobs, strict=True)] for name in _FIELDS}
    columns["new"] = list(logprobs)
    new, sampler, advantages, mask = (
        pad_sequence(columns[name], batch_first=True) for name in ("new", "logprobs", "advantages", "mask")
    )
    found = evaluate(
        chosen, logprobs=new, old_logprobs=None, rollout_logprobs=sampler, advantages=advantages, mask=mask
    )
    loss = -aggregate(found.value, mask, chosen.aggregation, normalizer=normalizer, max_length=max_length)
    return loss, as_floats(found.metrics, OWN_PREFIX["Tinker"])


_FIELDS = ("logprobs", "advantages", "mask")


def _field(datum: Any, name: str, like: Tensor) -> Tensor:
    if name not in datum.loss_fn_inputs:
        raise ValueError(f"Tinker: loss_fn_inputs of a datum has no {name!r}; it must contain {', '.join(_FIELDS)}")
    found = datum.loss_fn_inputs[name].to_torch()
    if found.shape != like.shape or like.dim() != 1:
        raise ValueError(
            f"Tinker: {name} of a datum has shape {tuple(found.shape)}, its log-probs {tuple(like.shape)}; "
            "give one number for each target token"
        )
    return found.to(like.device, like.dtype if found.is_floating_point() else found.dtype)
