"""Statistics of the groups of a batch: advantages, KL duals, signal, informative completions, and a penalty of length.

A reward that is NaN or infinite is not a score. A completion without a score has advantage 0 and is left out of all statistics
of the group; a group whose scores are all equal has a signal of exactly 0.
"""

import math
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from bandpo._inputs import check_int, check_tensor

__all__ = [
    "AdvantageKind",
    "GroupIds",
    "KLDual",
    "group_advantages",
    "group_signal",
    "informative",
    "kl_dual",
    "soft_overlong",
]

_STEPS = 100  # bisections of log λ, which reach the last bit of float64 from any bracket

GroupIds = Tensor | Sequence[Hashable]
AdvantageKind = Literal["std", "mean", "leave-one-out"]


class Groups:
    """The groups of completions, and values of completions as a table with one row for each group.

    Args:
        count: Number of completions.
        group_size: Completions of each group, which are consecutive.
        group_ids: Instead of the size, an id for each completion: an integer tensor, or a sequence such as a list of names.
            Completions with equal ids are one group; groups may differ in size and be in any order.

    Raises:
        TypeError: If the size is not an integer, or the ids have another type.
        ValueError: If not exactly one of the two is given, or it does not fit the number of completions.

    Examples:
        >>> groups = Groups(3, group_ids=["a", "b", "a"])
        >>> groups.table(torch.tensor([1.0, 2.0, 3.0]))
        tensor([[1., 3.],
                [2., nan]])
    """

    def __init__(self, count: int, group_size: int | None = None, group_ids: GroupIds | None = None) -> None:
        if (group_size is None) == (group_ids is None):
            raise ValueError(
                f"pass group_size={group_size} (groups of one size, one after the other) or group_ids (an id for each "
                "completion), and not both"
            )
        self._size, self._places, self._width = group_size, torch.empty(0, dtype=torch.int64), 1
        if group_size is not None:
            check_int("group_size", group_size)
            if group_size < 1 or count % group_size:
                raise ValueError(
                    f"{count} completions do not split into groups of {group_size}; group_size is {group_size}"
                )
            return
        assert group_ids is not None
        members: dict[Hashable, list[int]] = {}
        for i, key in enumerate(_ids(group_ids, count)):
            members.setdefault(key, []).append(i)
        self._width = max(map(len, members.values()), default=1)
        places = [0] * count
        for row, group in enumerate(members.values()):
            for column, i in enumerate(group):
                places[i] = row * self._width + column
        self._places, self._rows = torch.tensor(places, dtype=torch.int64), len(members)

    def table(self, x: Tensor) -> Tensor:
        """Values `(count,)` as `(groups, largest group)`, NaN where a group is smaller."""
        if self._size is not None:
            return x.reshape(-1, self._size)
        table = x.new_full((self._rows * self._width,), math.nan)
        return table.scatter(0, self._places.to(x.device), x).view(self._rows, self._width)

    def flat(self, table: Tensor) -> Tensor:
        """Values `(groups, largest group)`, or `(groups, 1)` for all of a group, as `(count,)`."""
        if self._size is not None:
            return table.expand(-1, self._size).reshape(-1)
        return table.expand(-1, self._width).reshape(-1)[self._places.to(table.device)]


def _ids(group_ids: GroupIds, count: int) -> list[Hashable]:
    if isinstance(group_ids, Tensor) and (group_ids.is_floating_point() or group_ids.is_complex()):
        raise TypeError(f"group_ids: a tensor must have an integer dtype, got {group_ids.dtype}")
    # A set and a mapping have no order that could be the order of the completions.
    if isinstance(group_ids, str | bytes | Set | Mapping) or not hasattr(group_ids, "__len__"):
        raise TypeError(
            f"group_ids: pass an integer tensor or a list with an id for each completion, got {group_ids!r}"
        )
    # A numpy array of names also has tolist.
    listed: Any = group_ids.tolist() if hasattr(group_ids, "tolist") else list(group_ids)  # type: ignore[union-attr]
    found = cast("list[Hashable]", listed)
    if len(found) != count or (isinstance(group_ids, Tensor) and group_ids.dim() != 1):
        raise ValueError(f"group_ids: {count} completions need as many ids in one dimension, got {len(found)}")
    for i, key in enumerate(found):
        # Two tensors never have the same hash: each completion would be a separate group, without any signal.
        if isinstance(key, Tensor) or not isinstance(key, Hashable):
            raise TypeError(f"group_ids[{i}] is {key!r}; an id must be hashable, such as an integer or a string")
        if key is None or key != key:
            raise ValueError(f"group_ids[{i}] is {key!r}; a completion without an id belongs to no group")
    return found


def scored(x: Tensor) -> Tensor:
    """Whether each entry is a score, that is finite; bool, the same shape."""
    return x.isfinite()


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores less the mean of their row in float64, `(..., group)`, and the number of scores, at least 1, `(..., 1)`.

    The difference is 0 where there is no score. Scores are measured from the largest one, so that equal scores give exactly 0
    at any magnitude.
    """
    wide, counts = x.detach().to(torch.float64), scored(x)
    n = counts.sum(-1, keepdim=True, dtype=torch.float64).clamp_min(1)
    below = torch.where(counts, wide - wide.masked_fill(~counts, -math.inf).amax(-1, keepdim=True), 0.0)
    return torch.where(counts, below - below.sum(-1, keepdim=True) / n, 0.0), n


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: GroupIds | None = None,
    kind: AdvantageKind = "std",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages of completions within their group, one group for each prompt.

    `std`: `(R - mean) / (std + eps)` with the unbiased std (GRPO, arXiv:2402.03300). `mean`: `R - mean` (Dr.GRPO,
    arXiv:2503.20783). `leave-one-out`: `R - mean of the others` (RLOO, arXiv:2402.14740).

    A reward that is NaN or infinite is not a score: its advantage is 0, and mean and std are those of the scored completions
    of the group. If these all have the same reward, or there is only one, every advantage is exactly 0.

    Args:
        rewards: `(completions,)`, float.
        group_size: Completions per prompt, at least 2, for groups that are consecutive and of one size.
        group_ids: Instead, an id for each completion, for groups of different sizes or in any order: an integer tensor
            `(completions,)`, or a sequence such as a list of the prompts' names.
        kind: The formula: "std", "mean" or "leave-one-out".
        eps: Added to the std, at least 0; 1e-4 in TRL.

    Returns:
        Tensor of the same shape and dtype as `rewards`, computed in float64.

    Raises:
        ValueError: If not exactly one of `group_size` and `group_ids` is given, or it does not fit, or the kind is unknown.
        TypeError: If `rewards` is not a float tensor, the group size is not an integer, or an id is not hashable.

    Examples:
        >>> import torch
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, kind="mean")
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
        >>> group_advantages(torch.tensor([1.0, 5.0, 0.0, float("nan")]), group_ids=[7, 8, 7, 7], kind="mean")
        tensor([ 0.5000,  0.0000, -0.5000,  0.0000])
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"kind: got {kind!r}; choose one of {', '.join(get_args(AdvantageKind))}")
    check_tensor("rewards", rewards)
    if not isinstance(eps, int | float) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
    if group_size is not None:
        check_int("group_size", group_size)
        if group_size < 2:
            raise ValueError(
                f"group_size must be at least 2 (one completion has nothing to be compared to), got {group_size}"
            )
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be (completions,), got shape {tuple(rewards.shape)}")
    groups = Groups(len(rewards), group_size, group_ids)
    differences, n = centred(groups.table(rewards))
    others = (n - 1).clamp_min(1)
    if kind == "std":
        # In units of the largest difference, whose square neither overflows nor vanishes.
        unit = differences.abs().amax(1, keepdim=True)
        x = differences / unit
        std = (x.square().sum(1, keepdim=True) / others).sqrt()
        differences = torch.where(unit > 0, x / (std + eps / unit), 0.0)
    elif kind == "leave-one-out":
        differences = differences * (n / others)
    return groups.flat(differences).to(rewards.dtype)


class KLDual(NamedTuple):
    """Multiplier and baseline of a KL ball, one of each for every group."""

    dual: Tensor
    """λ >= 0, `(..., 1)`, in the units of the advantages; 0 for a group without spread."""
    baseline: Tensor
    """`b = λ log mean exp(A/λ)`, `(..., 1)`; the solution is `ρ = exp((A - b)/λ)`."""


def kl_dual(advantages: Tensor, radius: float = 0.05, *, floor: float = 0.05) -> KLDual:
    """Multiplier of the KL trust region of each prompt, `max_ρ mean ρA  s.t.  mean ρ log ρ <= δ, mean ρ = 1`.

    The convex dual `g(λ) = λδ + λ log mean exp(A/λ)` (as in REPS and MPO) is least where KL(softmax(A/λ) ‖ uniform) = δ. That
    KL falls from log(G/k), for k completions that share the maximum, to 0: one root, found by bisection in log λ. If
    δ >= log(G/k), the best completions alone are within the ball, the constraint is slack, and λ is `floor` times the spread;
    if all advantages are equal, there is nothing to gain, and λ = 0. For small δ, `λ -> std(A)/√(2δ)`: division by the group's
    std, as in GRPO, is this trust region to first order. This is part of our own reading of QUATRO, arXiv:2602.04620.

    Args:
        advantages: A, `(..., group_size)`; a constant added to a group changes only the baseline. NaN and infinite entries
            are left out.
        radius: δ > 0, in nats for each sequence.
        floor: Smallest λ, in units of `max A - min A`.

    Returns:
        λ and b, `(..., 1)`, in the dtype of `advantages`; solved in float64, without gradient.

    Raises:
        ValueError: If `radius` or `floor` is not positive.

    Examples:
        >>> kl_dual(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])).dual
        tensor([[1.4973],
                [0.0000]])
    """
    if not (0 < radius < math.inf and 0 < floor < math.inf):
        raise ValueError(f"kl_dual: radius and floor must be positive numbers, got {radius} and {floor}")
    with torch.no_grad():
        a = advantages.detach().to(torch.float64)
        counts = scored(a)
        n = counts.sum(-1, keepdim=True)
        top = a.masked_fill(~counts, -math.inf).amax(-1, keepdim=True)
        bottom = a.masked_fill(~counts, math.inf).amin(-1, keepdim=True)
        spread = torch.where(n > 0, top - bottom, 0.0)
        top = torch.where(n > 0, top, 0.0)
        unit = torch.where(spread > 0, spread, 1.0)
        # In [-1, 0], so that the search does not depend on the scale of rewards; entries that are left out weigh e^-inf.
        x = torch.where(counts, (a - top) / unit, -math.inf)
        x = torch.where(n > 0, x, 0.0)
        log_n = n.clamp_min(1).to(torch.float64).log()
        # KL <= 1/(8λ²) by Hoeffding's lemma, so the root is below √(1/(8δ)).
        low, high = (torch.full_like(top, math.log(v)) for v in (floor, max(floor, math.sqrt(0.125 / radius))))
        for _ in range(_STEPS):
            middle = (low + high) / 2
            too_far = _tilted_kl(x, middle, log_n) > radius
            low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)
        # `high` is feasible; where the floor is the solution, the bisection converges to it.
        dual = torch.where(spread > 0, high.exp() * unit, 0.0)
        log_mean = (x / high.exp()).logsumexp(-1, keepdim=True) - log_n
        return KLDual(*(v.to(advantages.dtype) for v in (dual, top + dual * log_mean)))


def group_signal(rewards: Tensor, *, reward_range: float = 1.0) -> Tensor:
    """How much a group can teach, in [0, 1]: the variance of the rewards over the largest possible one, `4·var/range²`.

    For rewards of 0 and 1 and a share q of right answers this is `4q(1-q)`: 1 if half are right, 0 if all agree or none is
    scored. It is the macro signal in our own reading of ETR (arXiv:2601.03723).

    Args:
        rewards: `(..., group_size)`; NaN and infinite entries are not scores and are left out.
        reward_range: Largest less smallest possible reward.

    Returns:
        `(..., 1)`, in the dtype of `rewards`.

    Raises:
        ValueError: If `reward_range` is not a positive number.

    Examples:
        >>> group_signal(torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
        tensor([[1.],
                [0.]])
    """
    if not 0 < reward_range < math.inf:
        raise ValueError(f"group_signal: reward_range must be a positive number, got {reward_range}")
    differences, n = centred(rewards)
    variance = differences.square().sum(-1, keepdim=True) / n
    return (4 * variance / reward_range**2).clamp(max=1.0).to(rewards.dtype)


def informative(rewards: Tensor, group_size: int | None = None, *, group_ids: GroupIds | None = None) -> Tensor:
    """Which completions are in a group whose scores differ: those that DAPO's dynamic sampling keeps (arXiv:2503.14476).

    Args:
        rewards: `(completions,)`; NaN and infinite entries are not scores and are left out of the comparison.
        group_size: Completions per prompt, for groups that are consecutive and of one size.
        group_ids: Instead, an id for each completion; see `bandpo.group_advantages`.

    Returns:
        Bool tensor of the same shape.

    Raises:
        ValueError: If `rewards` does not have one dimension, or the groups do not fit.

    Examples:
        >>> informative(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
        tensor([ True,  True, False, False])
    """
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be (completions,), got shape {tuple(rewards.shape)}")
    groups = Groups(len(rewards), group_size, group_ids)
    table = groups.table(rewards if rewards.is_floating_point() else rewards.to(torch.float64))
    counts = scored(table)
    first = table.gather(1, counts.to(torch.int8).argmax(1, keepdim=True))
    return groups.flat((counts & (table != first)).any(1, keepdim=True))


def soft_overlong(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's penalty of long completions, added to the reward (arXiv:2503.14476, eq. 13).

    0 up to `max_length - buffer`, then falling linearly to -1 at `max_length`, and -1 beyond.

    Args:
        lengths: Number of tokens of each completion, any shape, integer or float.
        max_length: L_max in tokens, 20480 in the paper.
        buffer: L_cache in tokens, 4096 in the paper; `0 < buffer <= max_length`.

    Returns:
        float32 tensor of the same shape.

    Raises:
        ValueError: If `buffer` is out of range.

    Examples:
        >>> soft_overlong(torch.tensor([10, 18, 20, 25]), max_length=20, buffer=4)
        tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"soft_overlong: 0 < buffer <= max_length is required, got buffer={buffer}, max_length={max_length}"
        )
    return ((max_length - buffer - lengths.to(torch.float32)) / buffer).clamp(-1.0, 0.0)


def _tilted_kl(x: Tensor, log_dual: Tensor, log_n: Tensor) -> Tensor:
    """KL(softmax(x/λ) ‖ uniform) along the last dimension, in nats, over the n entries that are not -inf, `(..., 1)`."""
    z = (x / log_dual.exp()).log_softmax(-1)
    return (z.exp() * z.clamp_min(torch.finfo(z.dtype).min)).sum(-1, keepdim=True) + log_n
