"""Which tokens a surrogate takes the gradient away from: a rule beside the surrogate, or else automatic differentiation."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from bandpo._eager import Slopes, is_plain, with_slope
from bandpo._inputs import inputs_of
from bandpo.bounds import RatioBounds, outside

T = TypeVar("T", bound=Callable[..., Any])


class StopRule(NamedTuple):
    """The rule of one surrogate, with what it takes besides `(log_ratio, advantages, bounds)`."""

    rule: Callable[..., Tensor]
    marks: Callable[..., Tensor]
    """The surrogate itself: a wrapper that copies its attributes is another function, and its rule is not known."""
    keywords: frozenset[str]
    """Names of the keywords of the surrogate, inputs included, that the rule takes as well."""
    inputs: tuple[str, ...]
    """Names of the inputs of the batch that it takes, and `value` for the value of the surrogate."""
    slopes: Slopes | None = None
    """The surrogate and its derivative by hand, which takes the keywords of the surrogate."""


def stops(rule: Callable[..., Tensor], *, slopes: Slopes | None = None) -> Callable[[T], T]:
    """Mark a surrogate (a function, or the class of one) with the rule that says which tokens it takes the gradient away from.

    The share of these tokens is the metric `clip_fraction`. Without a mark it is found by automatic differentiation, which
    costs one backward pass through the surrogate, and is left out of the metrics under `torch.compile`.

    Args:
        rule: A function `(log_ratio, advantages, bounds) -> bool tensor`, True where the gradient is taken away. It is given
            those keywords of the surrogate (fixed by `functools.partial`, or fields of its class) that it takes as well, and
            by its own keyword-only parameters without a default any input that a surrogate can have, or `value`, the value
            of the surrogate. Its result does not matter where `A = 0`. `bandpo.bounds.outside` is the rule of a clip, `never`
            that of a surrogate that keeps every gradient.
        slopes: The same surrogate by hand, `(ratio, advantages, bounds) -> ByHand` with its keywords, which saves eager code
            the backward pass through the surrogate, and the rule. The ratio is that of `log_ratio` held within ±40, and the
            bounds are an interval without gradient; for others the surrogate itself is called. This is for surrogates that
            ask for no input; None for automatic differentiation.

    Returns:
        A decorator that gives back the surrogate itself.

    Examples:
        >>> @stops(outside)
        ... def surrogate(log_ratio, advantages, bounds):
        ...     return (log_ratio.exp() * advantages).masked_fill(outside(log_ratio, advantages, bounds), 0.0)
    """
    inputs = inputs_of(rule)
    taken = set(list(inspect.signature(rule).parameters)[3:])

    def mark(surrogate: T) -> T:
        keywords = taken.intersection(inspect.signature(surrogate).parameters)
        cast("Any", surrogate).stops = StopRule(rule, surrogate, frozenset(keywords), inputs, slopes)
        return surrogate

    return mark


def never(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds | Tensor) -> Tensor:
    """The rule of a surrogate that keeps every gradient: False in the shape of `log_ratio`.

    It is the rule of the formula: a gradient that fades until float32 rounds it to 0 still counts as kept.

    Args:
        log_ratio: `log r`, any shape.
        advantages: Not used, any shape.
        bounds: Not used, any shape.

    Examples:
        >>> never(torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.bool))
        tensor([False, False])
    """
    del advantages, bounds
    return torch.zeros_like(log_ratio, dtype=torch.bool)


def stop_rule_of(surrogate: Callable[..., Tensor]) -> tuple[StopRule | None, dict[str, Any]]:
    """The mark of a surrogate, also through `functools.partial`, and the keywords that are fixed there.

    Args:
        surrogate: Any surrogate.

    Returns:
        None and no keywords where the surrogate carries no rule of its own.
    """
    keywords = _keywords(surrogate)
    while isinstance(surrogate, partial):
        if surrogate.args:  # positions have moved: nothing is known
            return None, {}
        surrogate = surrogate.func
    mark = getattr(surrogate, "stops", None)
    if isinstance(mark, StopRule) and mark.marks is type(surrogate):
        return mark, {name: getattr(surrogate, name) for name in mark.keywords}
    if not isinstance(mark, StopRule) or mark.marks is not surrogate:
        return None, {}
    return mark, {name: value for name, value in keywords.items() if name in mark.keywords}


def _keywords(surrogate: Callable[..., Tensor]) -> dict[str, Any]:
    """The keywords that `functools.partial` has fixed."""
    keywords: dict[str, Any] = {}
    while isinstance(surrogate, partial):
        keywords = {**surrogate.keywords, **keywords}
        surrogate = surrogate.func
    return keywords


def stops_outside(surrogate: Callable[..., Tensor]) -> bool:
    """Whether a surrogate takes the gradient away exactly from the tokens that are `outside` the region."""
    mark, _ = stop_rule_of(surrogate)
    return mark is not None and mark.rule is outside


def value_and_stopped(
    surrogate: Callable[..., Tensor],
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds | Tensor,
    *,
    ratio: Tensor,
    inputs: Mapping[str, Tensor],
    asked: tuple[str, ...],
) -> tuple[Tensor, Tensor | None]:
    """The value of a surrogate, and which tokens it takes the gradient away from.

    Args:
        surrogate: Any surrogate.
        log_ratio: `log r` at the ratio level of the objective, with gradient.
        advantages: A, `(batch, 1)` or `(batch, time)`.
        bounds: What the surrogate is given.
        ratio: `exp(log_ratio)` without gradient.
        inputs: What a surrogate can ask for, by name; `logprobs` are those of the tokens, with gradient.
        asked: The names that this surrogate asks for.

    Returns:
        The value, and a bool tensor that broadcasts to `(batch, time)`; None in place of it where the surrogate has no rule
        and nothing can be differentiated here (under `torch.compile`, `torch.func` or `torch.inference_mode`).
    """
    mark, keywords = stop_rule_of(surrogate)
    if mark is None:
        return _by_autograd(surrogate, log_ratio, advantages, bounds, inputs, asked)
    if mark.slopes is not None and isinstance(bounds, RatioBounds) and _without_gradient(log_ratio, bounds):
        with torch.no_grad():
            found = mark.slopes(ratio, advantages, bounds, **_keywords(surrogate))

        def plain(x: Tensor, advantages: Tensor, *edges: Tensor) -> Tensor:
            return surrogate(x, advantages, RatioBounds(*edges))

        of = advantages, *bounds
        value = with_slope(log_ratio, plain, found.value, found.slope, advantages, found.inside, of=of)
        return value, found.stopped
    value = surrogate(log_ratio, advantages, bounds, **{name: inputs[name] for name in asked})
    with torch.no_grad():
        if mark.rule is outside:
            return value, outside(log_ratio.detach(), advantages, bounds, ratio=ratio)
        asked_by_rule = [name for name in mark.inputs if name not in keywords]  # a fixed input is a keyword
        given = {name: (value if name == "value" else inputs[name]).detach() for name in asked_by_rule}
        stopped = mark.rule(log_ratio.detach(), advantages, bounds, **keywords, **given)
        return value, stopped & (advantages != 0)


def _without_gradient(log_ratio: Tensor, bounds: RatioBounds) -> bool:
    """Whether a derivative by the log-ratio is all that can be asked for, and nothing transforms the tensors."""
    return is_plain(log_ratio) and not (bounds.lower.requires_grad or bounds.upper.requires_grad)


def _by_autograd(
    surrogate: Callable[..., Tensor],
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds | Tensor,
    inputs: Mapping[str, Tensor],
    asked: tuple[str, ...],
) -> tuple[Tensor, Tensor | None]:
    """The surrogate is called once, so that one that draws random numbers is judged by the draw that it used."""
    if not _can_differentiate(log_ratio):
        return surrogate(log_ratio, advantages, bounds, **{name: inputs[name] for name in asked}), None
    tracked = inputs["logprobs"].requires_grad
    with torch.enable_grad():
        # Two leaves: the gradient by the log-ratio is that before `hold`, with which a held ratio does not count as stopped.
        logprobs, log_ratio = (
            x.view_as(x) if tracked else x.detach().requires_grad_() for x in (inputs["logprobs"], log_ratio)
        )
        inputs = {**inputs, "logprobs": logprobs, "log_ratio": log_ratio}
        value = surrogate(log_ratio, advantages, bounds, **{name: inputs[name] for name in asked})
        slope = torch.zeros_like(logprobs)
        if value.requires_grad:
            leaves = (logprobs, log_ratio)
            grads = torch.autograd.grad(
                value.sum(), leaves, retain_graph=tracked, allow_unused=True, materialize_grads=True
            )
            slope = sum(grads, slope)
    stopped = (advantages != 0) & (slope == 0)
    return value if tracked else value.detach(), stopped


def _can_differentiate(x: Tensor) -> bool:
    functorch = cast("Any", torch._C)._functorch  # pyright: ignore[reportPrivateUsage]
    hidden = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or x.is_inference()
    return not hidden and not functorch.is_functorch_wrapped_tensor(x)
