"""Fuzzed: numbers that are none in valid places, any split of a batch, any rewards of groups, any mask.

Each entry of TARGETS is `(inputs, check, bad, slow)`, as `Target` in targets.py.
"""

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import bandpo
from bandpo import OBJECTIVES
from bandpo.groups import AdvantageKind, group_signal, informative, kl_dual
from bandpo.selection import Pruning
from bandpo.terms import sequence_log_ratio
from bandpo.zoo import get_objective

ROWS, TIME = 3, 4
SIZE = ROWS * TIME
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

any_float = st.integers(0, 2**32 - 1).map(lambda bits: np.array([bits], dtype=np.uint32).view(np.float32)[0].item())
log_probs = st.floats(-200, 0, width=32)
any_number = st.one_of(log_probs, log_probs, any_float, st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -3.4e38]))
advantage = st.one_of(
    st.floats(-100, 100, width=32),
    st.floats(-100, 100, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0]),
)


def table(numbers: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(ROWS, TIME).to(dtype)


def extras_of(objective: Any, numbers: list[float]) -> dict[str, torch.Tensor]:
    """Extras in their range, of which some are NaN."""
    out: dict[str, torch.Tensor] = {}
    for i, name in enumerate(objective.extras):
        if "topk" not in name:
            x = torch.tensor(numbers[i * ROWS :][:ROWS]).abs().clamp(max=100.0)
            out[name] = torch.where(x.isinf(), math.nan, x)
        elif name == "sampled_in_topk":
            out[name] = torch.zeros(ROWS, TIME, dtype=torch.bool)
        else:
            out[name] = torch.tensor(numbers[:SIZE]).clamp(max=-2.0).view(ROWS, TIME, 1).expand(-1, -1, 2)
    return out


def any_valid_tokens(draw: tuple[Any, ...]) -> str:
    """Loss and gradient are finite whatever a valid token holds; a token that is no number has none and counts."""
    name, new, old, more, advantages, per_token, mask, dtype, kl = draw
    objective = get_objective(name)
    x = table(new, dtype).requires_grad_()
    anchor, other, valid = table(old, dtype), table(more, dtype), torch.tensor(mask).view(ROWS, TIME)
    a = table(advantages) if per_token else torch.tensor(advantages[:ROWS])
    extras = extras_of(objective, more)
    loss, metrics = bandpo.policy_loss(
        logprobs=x, old_logprobs=anchor, rollout_logprobs=anchor if objective.anchor == "rollout" else other, advantages=a,
        mask=valid, objective=objective, ref_logprobs=other, kl_coef=kl, extras=extras,
        max_length=12 if objective.aggregation == "seq-mean-token-sum-norm" else None,
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite(), loss
    assert x.grad is not None and x.grad.isfinite().all(), x.grad

    def bad(v: torch.Tensor) -> torch.Tensor:
        return ~(v.detach().float().abs() <= 1e9)

    out = bad(x) | bad(anchor) | ~(a if per_token else a.unsqueeze(1)).isfinite()
    out = out | bad(other) if objective.correction is not None or kl else out
    for v in extras.values():
        nan = v.isnan()
        out = out | (nan.unsqueeze(1) if nan.dim() == 1 else nan.flatten(2).any(-1) if nan.dim() == 3 else nan)
    assert (x.grad[out | ~valid] == 0).all()
    share = (out & valid).sum() / valid.sum().clamp_min(1)
    assert torch.isclose(metrics["nonfinite_fraction"].nan_to_num(0.0), share.float())
    return "fine"


VALID_TOKENS = st.tuples(
    st.sampled_from(list(OBJECTIVES)),
    *[st.lists(any_number, min_size=SIZE, max_size=SIZE)] * 3,
    st.lists(advantage, min_size=SIZE, max_size=SIZE),
    st.booleans(),
    st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([0.0, 0.1]),
)


def any_split(draw: tuple[Any, ...]) -> str:
    """The parts of a batch add up to the whole, in value and gradient, wherever it is cut and whatever is masked."""
    values, mask, aggregation, cuts, order, as_float = draw
    rows = len(mask) // TIME
    x = torch.tensor(values[: rows * TIME], dtype=torch.float64).view(rows, TIME).requires_grad_()
    valid = torch.tensor(mask[: rows * TIME], dtype=torch.bool).view(rows, TIME)
    length = 12 if aggregation == "seq-mean-token-sum-norm" else None
    whole = bandpo.aggregate(x, valid, aggregation, max_length=length)
    index = torch.tensor([i for i in order if i < rows], dtype=torch.int64)
    ends = sorted(min(c, rows) for c in cuts)
    parts = [index[a:b] for a, b in zip([0, *ends], [*ends, rows], strict=True)]
    total: Any = sum(bandpo.loss_normalizer(valid[p], aggregation) for p in parts)
    assert total == bandpo.loss_normalizer(valid, aggregation)
    if aggregation == "token-sum":
        total = None
    elif as_float:
        total = float(total)
    added = sum(bandpo.aggregate(x[p], valid[p], aggregation, normalizer=total, max_length=length) for p in parts)
    torch.testing.assert_close(added, whole, rtol=1e-12, atol=1e-9)
    (a,), (b,) = (torch.autograd.grad(v, x, retain_graph=True) for v in (added, whole))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    return "fine"


SPLITS = st.tuples(
    st.lists(st.floats(-1e3, 1e3), min_size=6 * TIME, max_size=6 * TIME),
    st.lists(st.booleans(), min_size=TIME, max_size=6 * TIME),
    st.sampled_from(AGGREGATIONS),
    st.lists(st.integers(0, 6), max_size=4),
    st.permutations(range(6)),
    st.booleans(),
)


def any_groups(draw: tuple[Any, ...]) -> str:
    """Advantages of any rewards: 0 where nothing is scored or all scores are equal, else of their sign and sum."""
    rewards, ids, kind, dtype = draw
    n = min(len(rewards), len(ids))
    x, keys = torch.tensor(rewards[:n], dtype=torch.float64).to(dtype), ids[:n]
    a = bandpo.group_advantages(x, group_ids=keys, kind=kind)
    kept = informative(x, group_ids=keys)
    known = x.isfinite()
    assert a.dtype == dtype and not a.isnan().any() and (a[~known] == 0).all()
    for key in set(keys):
        mine = torch.tensor([k == key for k in keys]) & known
        scores = x[mine].double()
        signal = len(set(scores.tolist())) > 1
        everyone = torch.tensor([k == key for k in keys])
        assert (kept[everyone] == signal).all()
        if not signal:
            assert (a[everyone] == 0).all()
            assert group_signal(x[everyone]).item() == 0
            assert kl_dual(x[everyone]).dual.item() == 0
            continue
        # the best is above the mean, the worst below (or at it, where the result underflows its dtype)
        assert a[mine][scores.argmax()] >= 0 >= a[mine][scores.argmin()]
        order = scores.argsort()
        assert (a[mine][order].diff() >= 0).all(), "a larger reward has a smaller advantage"
        if a.isfinite().all():
            assert (
                abs(a[mine].double().sum())
                <= 8 * len(scores) * torch.finfo(dtype).eps * a[mine].double().abs().max() + 1e-30
            )
        dual, baseline = kl_dual(x[everyone].double())
        assert dual > 0 and baseline.isfinite()
    prune = Pruning(prompts=0.5, completions=0.5)
    prune.update([str(k) for k in keys], a.double().unsqueeze(1), x.double().unsqueeze(1))
    assert all(math.isfinite(v) for v in prune.history.values())
    found = prune.select_prompts([str(k) for k in keys], generator=torch.Generator().manual_seed(0))
    assert found.weight.isfinite().all()
    return "fine"


reward = st.one_of(
    st.floats(-1e6, 1e6, width=32),
    st.sampled_from([0.0, 1.0, 0.1, 12345.678, 1e30, -1e30, math.nan, math.inf, -math.inf]),
)
same = st.tuples(reward, st.integers(1, 9)).map(lambda pair: [pair[0]] * pair[1])
GROUPS = st.tuples(
    st.one_of(
        st.lists(reward, min_size=1, max_size=9),
        same,
        st.lists(same, min_size=1, max_size=3).map(lambda x: [y for part in x for y in part]),
    ),
    st.lists(st.one_of(st.integers(0, 2), st.sampled_from(["a", "b"])), min_size=1, max_size=9),
    st.sampled_from(AdvantageKind.__args__),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)


def odd_mask(draw: tuple[list[float], int, float, str, str]) -> str:
    """A mask with another number than 0 and 1 is refused wherever one is taken."""
    numbers, place, odd, dtype, call = draw
    mask = torch.tensor(numbers).view(ROWS, TIME)
    mask.view(-1)[place] = odd
    mask = mask.to(getattr(torch, dtype)) if float(odd).is_integer() and abs(odd) < 2**31 else mask
    x = torch.full((ROWS, TIME), -1.0)
    calls = {
        "policy_loss": lambda: bandpo.policy_loss(
            logprobs=x, old_logprobs=x, advantages=x, mask=mask, objective="grpo"
        ),
        "aggregate": lambda: bandpo.aggregate(x, mask),
        "loss_normalizer": lambda: bandpo.loss_normalizer(mask, "token-mean"),
        "sequence_log_ratio": lambda: sequence_log_ratio(x, mask),
        "token_objective": lambda: bandpo.token_objective(
            OBJECTIVES["gspo"], logprobs=x, old_logprobs=x, advantages=x, mask=mask
        ),
    }
    try:
        calls[call]()
    except (ValueError, TypeError) as error:
        if "mask must be bool, or 0 and 1" not in str(error):
            raise
        return "refused"
    return "fine"


ODD_MASKS = st.tuples(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=SIZE, max_size=SIZE),
    st.integers(0, SIZE - 1),
    st.one_of(any_float, st.sampled_from([-100.0, 2.0, -1.0, 3.0, 0.5])).filter(lambda v: v not in (0.0, 1.0)),
    st.sampled_from(["float32", "float64", "int64", "int32"]),
    st.sampled_from(["policy_loss", "aggregate", "loss_normalizer", "sequence_log_ratio", "token_objective"]),
)

TARGETS: dict[str, tuple[st.SearchStrategy[Any], Any, bool, bool]] = {
    "any numbers in valid tokens": (VALID_TOKENS, any_valid_tokens, False, False),
    "any split of a batch": (SPLITS, any_split, False, False),
    "any rewards of groups": (GROUPS, any_groups, False, False),
    "odd masks": (ODD_MASKS, odd_mask, True, False),
}
