"""Filters: rules that drop or weigh whole sequences (or tokens) by how far two policies are apart on them.

A region bounds the ratio of a token and a correction weighs it. A filter judges a sequence as a whole. It measures the
log-ratio `x = log π_a - log π_b` of each token for a pair of policies, makes one number of the sequence from it, and keeps the
sequence where that number is within thresholds. `Objective(filter=...)` takes one filter or a tuple, of which all must keep a
token. No gradient flows into a filter.

Functions below make the published filters. The sources that were read are named there; the thresholds are those of the source
where it has defaults.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bandpo._inputs import Trait, as_columns, as_mask, check_shapes, check_tensor, fill
from bandpo.surrogates.token import hold, ratio

Statistic = Literal["log_ratio", "k1", "k2", "k3", "tv"]
Reduction = Literal["token", "sum", "mean", "max", "batch-mean"]
Policies = Literal["old/rollout", "policy/rollout", "policy/old"]
Action = Literal["drop", "weight"]
Drops = Literal["all", "negative", "outward"]
Counts = Literal["all", "kept"]


@dataclass(frozen=True)
class SequenceFilter:
    """Keeps a sequence where a statistic of the mismatch between two policies is within thresholds.

    With x the log-ratio of a token under the pair `a/b` in `policies`, `log π_a` minus `log π_b`, the statistics are

    * `log_ratio`: `x`; its sum is the log of the ratio of the sequence, its mean that of the geometric mean of the ratios;
    * `k1`: `-x`, `k2`: `x²/2`, `k3`: `e^x - 1 - x`: estimators of KL(b ‖ a) with samples of b (Schulman 2020);
    * `tv`: `|e^x - 1|`, whose mean with samples of b is twice the total variation.

    `x` is held within ±40. A token that the objective leaves out (NaN) has no part in the statistic, and a sequence without a
    token that counts is kept.

    Args:
        statistic: One of the five names.
        reduction: `sum`, `mean` or `max` over the tokens of the sequence; `token` judges each token by itself; `batch-mean` is
            the mean over all tokens of the call. With `max`, `high` bounds the largest value and `low` the smallest one.
        low: Smallest value that is kept, in the units of the statistic; None for no limit.
        high: Largest value that is kept; None for no limit.
        action: `drop` multiplies the objective of a token by 1 or 0. `weight` multiplies it by `exp` of the reduced log-ratio,
            clamped to `[low, high]` before, and drops nothing; like the weight of a correction, it also multiplies a KL to the
            reference that has the ratio (`k3-ratio`).
        policies: The pair `a/b`: `old/rollout` is the mismatch of the sampler, constant in an update; `policy/old` the drift
            since the update began; `policy/rollout` both together.
        drops: Which tokens a filter may drop: `all`; `negative`, those with A < 0; or `outward`, those with `A·x > 0`, whose
            update moves the two policies further apart.
        counts: `all`: dropped tokens stay in the denominators of the loss. `kept`: they leave them, as if the mask were off.

    Raises:
        ValueError: If a name is unknown, thresholds are missing or out of order, or an action does not fit the rest.

    Examples:
        >>> rule = SequenceFilter("log_ratio", "mean", low=-0.1, high=0.1)
        >>> rule(torch.tensor([[0.3, -0.3], [0.3, 0.3]]), torch.ones(2), torch.ones(2, 2))
        tensor([[1.],
                [0.]])
    """

    statistic: Statistic
    reduction: Reduction
    low: float | None = None
    high: float | None = None
    action: Action = "drop"
    policies: Policies = "old/rollout"
    drops: Drops = "all"
    counts: Counts = "all"

    def __post_init__(self) -> None:
        kinds = {"statistic": Statistic, "reduction": Reduction, "action": Action, "policies": Policies}
        for name, kind in (kinds | {"drops": Drops, "counts": Counts}).items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"SequenceFilter: {name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(kind))}"
                )
        for name, edge in (("low", self.low), ("high", self.high)):
            if edge is not None and (isinstance(edge, bool) or not math.isfinite(edge)):
                raise ValueError(f"SequenceFilter: {name} must be a finite number, or None for no limit, got {edge!r}")
        if self.low is None and self.high is None:
            raise ValueError("SequenceFilter: without low and high it would keep everything; set at least one")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"SequenceFilter: low={self.low} is above high={self.high}; nothing would be kept")
        if self.high is not None and self.high < 0 and self.statistic in ("k2", "k3", "tv"):
            raise ValueError(
                f"SequenceFilter: {self.statistic} is never negative, and high={self.high} would drop everything"
            )
        if self.action == "weight":
            self._check_weight()

    def _check_weight(self) -> None:
        fits = {
            "statistic": ("log_ratio",),
            "reduction": ("token", "sum", "mean"),
            "policies": ("old/rollout",),
            "drops": ("all",),
            "counts": ("all",),
        }
        for name, allowed in fits.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"SequenceFilter: action='weight' needs {name}={' or '.join(map(repr, allowed))}, got "
                    f"{getattr(self, name)!r}: the weight is the ratio of π_old to the sampler, and drops nothing"
                )

    @property
    def traits(self) -> tuple[Trait, ...]:
        """`of_batch` where a sequence is judged by the other sequences of the call; see `bandpo.surrogates.traits`."""
        return ("of_batch",) if self.reduction == "batch-mean" else ()

    @property
    def needs(self) -> tuple[str, str]:
        """The two policies of the pair, `a` and `b`."""
        first, _, second = self.policies.partition("/")
        return first, second

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """The weights of the tokens, without gradient: 0 and 1 where the action is `drop`.

        Args:
            log_ratio: `x` of each token, `(batch, time)`, float.
            advantages: `(batch,)`, `(batch, 1)` or `(batch, time)`, float; their signs matter where `drops` is not `all`.
            mask: The tokens that count, bool or 0/1, `(batch, time)`.

        Returns:
            `(batch, time)`, or `(batch, 1)` for one weight of each sequence, at least float32.

        Raises:
            TypeError: If a dtype does not fit.
            ValueError: If a shape does not fit.
        """
        check_shapes(log_ratio, mask=mask)
        check_tensor("advantages", advantages)
        with torch.no_grad():
            valid, columns = as_mask(mask), as_columns(advantages, log_ratio)
            x = hold(fill(log_ratio.detach(), valid))
            if self.action == "weight":
                return ratio(_reduced(x, valid, self.reduction).clamp(self.low, self.high))
            keep = self._inside(self._statistic(x), valid)
            if self.drops == "negative":
                keep = keep | ~(columns < 0)
            elif self.drops == "outward":
                keep = keep | ~(x * columns > 0)
            return keep.to(x.dtype)

    def _statistic(self, x: Tensor) -> Tensor:
        if self.statistic == "log_ratio":
            return x
        if self.statistic == "k1":
            return -x
        if self.statistic == "k2":
            return x.square() / 2
        return x.expm1() - x if self.statistic == "k3" else x.expm1().abs()

    def _inside(self, value: Tensor, valid: Tensor) -> Tensor:
        """Whether the reduced statistic is within the thresholds; True where no token counts."""
        extreme = self.reduction == "max"  # all tokens must be inside, which holds for both ends
        value = value if extreme else _reduced(value, valid, self.reduction)
        known = valid if extreme or self.reduction == "token" else valid.any(-1, keepdim=True)
        outside = torch.zeros_like(known)
        if self.low is not None:
            outside = outside | (value < self.low)
        if self.high is not None:
            outside = outside | (value > self.high)
        keep = ~(outside & known)
        return keep.all(-1, keepdim=True) if extreme else keep


def opsm(threshold: float, *, policies: Policies = "policy/rollout") -> SequenceFilter:
    """Off-policy sequence masking (OPSM, DeepSeek-V3.2, arXiv:2512.02556): drops bad sequences that have become unlikely.

    A sequence of A < 0 is dropped where its mean `log μ - log π` is above the threshold. The rule, with `>` and the mean over
    the valid tokens, is that of slime (`compute_opsm_mask`) and of TRL (`off_policy_mask_threshold`). slime measures against
    π_old, or against the sampler with `--use-rollout-logprobs`; TRL against the sampler with vLLM, else against π_old. With
    advantages per token each token is judged by its own sign. Dropped tokens stay in the denominators. The paper
    itself is known to us from these two.

    Args:
        threshold: δ, the largest mean that is kept, in nats; slime's default is 1e-4.
        policies: `policy/rollout`, or `policy/old` where the sampler is the policy before the update.

    Examples:
        >>> opsm(0.1)(torch.tensor([[-0.3, -0.1], [-0.3, -0.1]]), torch.tensor([1.0, -1.0]), torch.ones(2, 2))
        tensor([[1.],
                [0.]])
    """
    return SequenceFilter("k1", "mean", high=threshold, policies=policies, drops="negative")


def geometric_mask(
    low: float = 0.99, high: float = 1.01, *, policies: Policies = "old/rollout", counts: Counts = "all"
) -> SequenceFilter:
    """Keeps sequences whose geometric mean of the ratios, `exp(mean x)`, is in `[low, high]`.

    SkyRL's `sequence_mask_metric="geometric"`, with its defaults (`compute_sequence_mask`). Beside
    `correction=TIS(math.inf)` it is seq-mask-TIS, as in NeMo-RL and OpenRLHF: the mean decides, and the kept tokens keep their
    own untruncated weights (NeMo-RL's documentation has the thresholds 0.999 and 1.002). All three keep the two edges, take the
    ratio π_old/μ and leave dropped tokens in the denominators. verl's `seq_mean_k1` judges μ/π_old; see `rollout_rs`.

    Args:
        low: Smallest ratio that is kept, at least 0; 0 for no limit.
        high: Largest ratio that is kept.
        policies: The pair of policies.
        counts: Whether dropped tokens stay in the denominators; see `SequenceFilter`.

    Raises:
        ValueError: If the numbers are not `0 <= low <= high`.

    Examples:
        >>> geometric_mask(0.5, 2.0)(torch.tensor([[4.0, 0.25], [4.0, 4.0]]).log(), torch.ones(2), torch.ones(2, 2))
        tensor([[1.],
                [0.]])
    """
    return SequenceFilter("log_ratio", "mean", *_logs(low, high), policies=policies, counts=counts)


def product_mask(
    low: float = 0.5, high: float = 2.0, *, policies: Policies = "old/rollout", counts: Counts = "all"
) -> SequenceFilter:
    """Keeps sequences whose ratio, the product of those of its tokens, is in `[low, high]`.

    SkyRL's `sequence_mask_metric="product"`, with its defaults. The longer a sequence is, the sooner it is dropped.

    Args:
        low: Smallest ratio that is kept, at least 0; 0 for no limit.
        high: Largest ratio that is kept.
        policies: The pair of policies.
        counts: Whether dropped tokens stay in the denominators; see `SequenceFilter`.

    Raises:
        ValueError: If the numbers are not `0 <= low <= high`.

    Examples:
        >>> product_mask(0.5, 3.0)(torch.tensor([[2.0, 2.0], [2.0, 1.0]]).log(), torch.ones(2), torch.ones(2, 2))
        tensor([[0.],
                [1.]])
    """
    return SequenceFilter("log_ratio", "sum", *_logs(low, high), policies=policies, counts=counts)


def outlier_mask(
    low: float, high: float = math.inf, *, policies: Policies = "old/rollout", counts: Counts = "all"
) -> SequenceFilter:
    """Drops a sequence if the ratio of any of its tokens is outside `[low, high]`.

    SkyRL's `outlier_token_is_threshold_low` and `_high`; with `high=inf` slime's `rs_veto_threshold` (1e-4 in its example).

    Args:
        low: Smallest ratio that is kept, at least 0; 0 for no limit.
        high: Largest ratio that is kept; inf for no limit.
        policies: The pair of policies.
        counts: Whether dropped tokens stay in the denominators; see `SequenceFilter`.

    Raises:
        ValueError: If the numbers are not `0 <= low <= high`, or set no limit.

    Examples:
        >>> outlier_mask(1e-4)(torch.tensor([[1.0, 1e-5], [1.0, 1e-3]]).log(), torch.ones(2), torch.ones(2, 2))
        tensor([[0.],
                [1.]])
    """
    return SequenceFilter("log_ratio", "max", *_logs(low, high), policies=policies, counts=counts)


def trust_region_mask(
    largest: float | None,
    mean: float | None = None,
    *,
    estimator: Literal["k2", "k3"] = "k3",
    policies: Policies = "policy/rollout",
    counts: Counts = "all",
) -> tuple[SequenceFilter, ...]:
    """Trust region masking (TRM, arXiv:2512.23075): drops a sequence with too large a divergence at any token, or on average.

    The paper bounds the KL divergence of whole distributions, sampler to policy. From the sampled tokens alone it can only be
    estimated; verl's `rollout_rs` has `seq_max_k2`, `seq_max_k3`, `seq_mean_k2` and `seq_mean_k3` for this, with the pair
    `old/rollout`, and with `counts="kept"`. The estimate of one token is no bound of the divergence there. The paper's own
    thresholds and denominators are not confirmed.

    Args:
        largest: Largest estimate of a token that is kept, in nats; None for no such limit.
        mean: Largest mean over the sequence that is kept; None for no such limit.
        estimator: k3 or k2 as the estimator of the divergence.
        policies: The pair of policies.
        counts: Whether dropped tokens stay in the denominators; see `SequenceFilter`.

    Returns:
        One filter for each limit.

    Raises:
        ValueError: If there is no limit, or the estimator is unknown.

    Examples:
        >>> [rule.reduction for rule in trust_region_mask(0.05, 0.001)]
        ['max', 'mean']
    """
    if estimator not in ("k2", "k3"):
        raise ValueError(f"trust_region_mask: estimator is {estimator!r}; choose one of k2, k3")
    if largest is None and mean is None:
        raise ValueError("trust_region_mask: set largest, mean, or both; without a limit it would keep everything")
    limits: tuple[tuple[Reduction, float | None], ...] = (("max", largest), ("mean", mean))
    return tuple(
        SequenceFilter(estimator, reduction, high=limit, policies=policies, counts=counts)
        for reduction, limit in limits
        if limit is not None
    )


def seq_mis(low: float, high: float) -> tuple[SequenceFilter, SequenceFilter]:
    """Masked importance sampling of sequences (Seq-MIS): π_old/μ of the sequence as weight, dropped outside `[low, high]`.

    The same as `correction=IcePop(low, high, level="sequence")`, and as TRL's `vllm_importance_sampling_mode="sequence_mask"`,
    in which the upper limit is 3. In verl it is `rollout_is="sequence"` beside `rollout_rs="seq_sum_k1"`. A KL to the reference
    keeps the dropped sequences, with the weight of the nearest edge; beside `IcePop` a KL with the ratio is 0 there.

    Args:
        low: Smallest ratio that is kept, at least 0; 0 for no limit.
        high: Largest ratio that is kept.

    Returns:
        The filter that drops, and the one that weighs.

    Raises:
        ValueError: If the numbers are not `0 <= low <= high`.

    Examples:
        >>> x, one = torch.tensor([[2.0, 1.0], [2.0, 2.0]]).log(), torch.ones(2, 2)
        >>> drop, weigh = seq_mis(0.0, 3.0)
        >>> drop(x, one, one) * weigh(x, one, one)
        tensor([[2.],
                [0.]])
    """
    edges = _logs(low, high)
    return SequenceFilter("log_ratio", "sum", *edges), SequenceFilter("log_ratio", "sum", *edges, action="weight")


def vaco(
    budget: float,
    *,
    over: Literal["sequence", "batch"] = "sequence",
    policies: Policies = "old/rollout",
) -> SequenceFilter:
    """Budget of total variation (TVPO in open-instruct, after VACO, arXiv:2603.01365).

    Where the mean of `|r - 1|` exceeds the budget, it drops the tokens whose update would raise it: those with `A·log r > 0`.
    With `over="sequence"` and `old/rollout` it is open-instruct's `rho_mask_tv_divergence` (its upper bound must be above 1).
    With `over="batch"` the mean is over all tokens of the call: our reading of a budget of the batch, which open-instruct does
    not have. The paper's own rule is not confirmed. Dropped tokens stay in the denominators.

    Args:
        budget: Largest mean of `|r - 1|` that is kept whole, at least 0; twice the total variation.
        over: Whether each sequence has the budget, or the batch as a whole.
        policies: The pair of policies, whose ratio is r.

    Raises:
        ValueError: If the budget is negative, or `over` is unknown.

    Examples:
        >>> vaco(0.5)(torch.tensor([[2.0, 0.25]]).log(), torch.ones(1), torch.ones(1, 2))
        tensor([[0., 1.]])
    """
    if over not in ("sequence", "batch"):
        raise ValueError(f"vaco: over is {over!r}; choose one of sequence, batch")
    reduction: Reduction = "mean" if over == "sequence" else "batch-mean"
    return SequenceFilter("tv", reduction, high=budget, policies=policies, drops="outward")


def rollout_rs(
    options: str, threshold: float | str, *, policies: Policies = "old/rollout"
) -> tuple[SequenceFilter, ...]:
    """The filters of verl's `algorithm.rollout_correction.rollout_rs`, by its own spelling.

    The names are `token_k1`, `seq_mean_k3` and so on (verl 0.9.1, `compute_rollout_rejection_mask`). The thresholds of k1 are
    ratios μ/π_old, and a single one stands for itself and its reciprocal. verl takes the dropped tokens out of the mask, so
    these filters have `counts="kept"`. verl holds the log-ratio within ±20 instead of ±40.

    Args:
        options: One or more of verl's names, separated by commas.
        threshold: One threshold for all, or one for each name, separated by commas: `upper`, and for k1 also `lower_upper`.
        policies: The pair of policies; verl's is `old/rollout`, and `policy/rollout` in its bypass mode.

    Raises:
        ValueError: If a name is unknown, or a threshold is missing, no positive number or of the wrong form.

    Examples:
        >>> [(f.statistic, f.reduction, f.high) for f in rollout_rs("token_k2,seq_mean_k3", "0.1,0.01")]
        [('k2', 'token', 0.1), ('k3', 'mean', 0.01)]
    """
    names = list(dict.fromkeys(name.strip() for name in options.split(",") if name.strip()))
    limits = [limit.strip() for limit in str(threshold).split(",") if limit.strip()]
    if not names or len(limits) not in (1, len(names)):
        raise ValueError(
            f"rollout_rs: {len(names)} options in {options!r} and {len(limits)} thresholds in {threshold!r}; give one "
            "threshold for all, or one for each"
        )
    limits = limits * len(names) if len(limits) == 1 else limits
    found: list[SequenceFilter] = []
    for name, limit in zip(names, limits, strict=True):
        if name not in _VERL:
            raise ValueError(f"rollout_rs: unknown option {name!r}; choose from {', '.join(_VERL)}")
        reduction, statistic = _VERL[name]
        low, high = _verl_edges(name, limit, both=statistic == "k1")
        found.append(SequenceFilter(statistic, reduction, low, high, policies=policies, counts="kept"))
    return tuple(found)


_PREFIXES: dict[str, Reduction] = {"token": "token", "seq_sum": "sum", "seq_mean": "mean", "seq_max": "max"}
_KS: tuple[Statistic, ...] = ("k1", "k2", "k3")
_VERL: dict[str, tuple[Reduction, Statistic]] = {
    f"{p}_{k}": (r, k) for p, r in _PREFIXES.items() for k in _KS if (p, k) != ("seq_max", "k1")
}
"""Reduction and statistic of each option of verl's `rollout_rs`."""


def as_filters(
    given: SequenceFilter | Iterable[SequenceFilter] | None, *, anchor: str, corrected: bool
) -> tuple[SequenceFilter, ...]:
    """The filters of an objective as a tuple, empty for None.

    Args:
        given: What the objective was given.
        anchor: The anchor of the objective, `old` or `rollout`.
        corrected: Whether the objective has a correction for the sampler.

    Raises:
        TypeError: If it is something else.
        ValueError: If a filter measures π_old and the objective has none, or the sampler would be weighed twice.
    """
    if given is None:
        return ()
    filters = (given,) if isinstance(given, SequenceFilter) else given
    if not isinstance(filters, tuple) or not all(isinstance(f, SequenceFilter) for f in filters):
        raise TypeError(f"Objective: filter must be a SequenceFilter, a tuple of them, or None, got {given!r}")
    for rule in filters:
        if anchor == "rollout" and "old" in rule.needs:
            raise ValueError(
                f"Objective: a filter with policies={rule.policies!r} measures π_old, which an objective with anchor='rollout' "
                "is not given; use policies='policy/rollout'"
            )
    weighing = corrected + sum(rule.action == "weight" for rule in filters)
    if weighing > 1:
        raise ValueError(
            "Objective: more than one weight for the mismatch of the sampler (correction, filters with action='weight'), which "
            "would count it twice; keep one"
        )
    return filters


def _reduced(value: Tensor, valid: Tensor, reduction: Reduction) -> Tensor:
    """The sum or mean over the tokens that count, as a column; the value of each token for `token`."""
    if reduction == "token":
        return value
    value = value.masked_fill(~valid, 0.0)
    if reduction == "batch-mean":
        return (value.sum() / valid.sum().clamp_min(1)).expand(len(value), 1)
    total = value.sum(-1, keepdim=True)
    return total / valid.sum(-1, keepdim=True).clamp_min(1) if reduction == "mean" else total


def _logs(low: float, high: float) -> tuple[float | None, float | None]:
    """Logs of two ratios, None for 0 and for inf."""
    if not 0 <= low <= high or high == 0 or math.isinf(low):
        raise ValueError(f"the ratios of a filter must satisfy 0 <= low <= high, got {low} and {high}")
    return math.log(low) if low > 0 else None, math.log(high) if math.isfinite(high) else None


def _verl_edges(name: str, limit: str, *, both: bool) -> tuple[float | None, float]:
    """Thresholds as verl reads them: of k1 the logs of two ratios, of the others an upper limit."""
    try:
        numbers = [float(part) for part in limit.split("_")]
    except ValueError:
        numbers = [math.nan]
    if len(numbers) > 1 + both or not all(0 < number < math.inf for number in numbers):
        form = "'upper' or 'lower_upper', ratios above 0" if both else "one number above 0"
        raise ValueError(f"rollout_rs: the threshold of {name} is {limit!r}; write {form}")
    if not both:
        return None, numbers[0]
    low, high = numbers if len(numbers) == 2 else (1 / numbers[0], numbers[0])
    return math.log(low), math.log(high)
