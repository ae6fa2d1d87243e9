"""Bad arguments of the public functions, and any values of good ones."""

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from hypothesis import strategies as st

import bandpo
from bandpo import DCPO, KL, OBJECTIVES, Band, Clip, FDivergence, Objective, alpha
from bandpo.divergences import DIVERGENCES, binary_divergence
from bandpo.groups import AdvantageKind
from bandpo.integrations.options import Overrides
from bandpo.objective import Aggregation, Anchor, RatioLevel
from bandpo.schedules import Schedule, Shape
from bandpo.selection.pruning import Mode, Pruning
from bandpo.zoo import get_objective


def refused(call: Callable[[], object]) -> str:
    """ "refused" where a call says what is wrong, "fine" where it returns."""
    try:
        call()
    except (ValueError, TypeError) as error:
        message = str(error)
    else:
        return "fine"
    assert len(message) > 10, "an error without a message"
    return "refused"


# ---- arguments of the public functions, each with one that is wrong

not_positive = st.one_of(
    st.floats(max_value=0.0),
    st.just(math.nan),
    st.just(math.inf),
    st.integers(max_value=0),
    st.text(max_size=5),
    st.none(),
    st.complex_numbers(allow_nan=False),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.booleans(),
    st.binary(max_size=3),
)
no_tensor = st.one_of(
    st.none(), st.floats(), st.lists(st.floats(), max_size=3), st.text(max_size=5), st.integers(), st.just(np.ones(3))
)
wrong_dtype = st.sampled_from([torch.int64, torch.bool, torch.int8, torch.complex64]).map(
    lambda d: torch.ones(2, 3, dtype=d)
)
shapes = st.lists(st.integers(0, 4), min_size=0, max_size=4).map(tuple)
names = st.text(max_size=12).filter(lambda s: ":" not in s)
LOGP = torch.tensor([[-0.1, -2.0, -5.0], [-1.0, -0.5, -9.0]])


def bad_bounds(draw: tuple[str, Any]) -> str:
    kind, x = draw
    calls: dict[str, Callable[[], object]] = {
        "radius": lambda: bandpo.ratio_bounds(LOGP, KL, x),
        "band radius": lambda: Band(KL, x)(LOGP),
        "pair": lambda: Band(KL, (0.1, x))(LOGP),
        "in_band radius": lambda: bandpo.in_band(LOGP, LOGP, KL, x),
        "divergence": lambda: bandpo.ratio_bounds(LOGP, x, 0.1),
        "logprobs": lambda: bandpo.ratio_bounds(x, KL, 0.1),
        "band logprobs": lambda: Band()(x),
        "max_ratio": lambda: bandpo.ratio_bounds(LOGP, KL, 0.1, max_ratio=x),
        "clip": lambda: Clip(x)(LOGP),
        "clip high": lambda: Clip(0.2, x)(LOGP),
        "dcpo": lambda: DCPO(x)(LOGP),
        "alpha": lambda: alpha(x),
        "generator": lambda: FDivergence("mine", x),
        "binary": lambda: binary_divergence(LOGP, x, KL),
        "in_band shapes": lambda: bandpo.in_band(torch.zeros(x), LOGP),
    }
    return refused(calls[kind])


BAD_BOUNDS = st.one_of(
    st.tuples(
        st.sampled_from(["radius", "band radius", "pair", "in_band radius"]),
        not_positive.filter(lambda x: not _is_pair(x)),
    ),
    st.tuples(
        st.just("divergence"),
        st.one_of(
            names.filter(lambda s: s.lower() not in DIVERGENCES),
            not_positive.filter(lambda x: not isinstance(x, str)),
        ),
    ),
    st.tuples(st.sampled_from(["logprobs", "band logprobs", "binary"]), st.one_of(no_tensor, wrong_dtype)),
    st.tuples(
        st.just("max_ratio"),
        st.one_of(st.floats(max_value=0.999), st.just(math.nan), st.text(max_size=3), st.booleans()),
    ),
    st.tuples(
        st.sampled_from(["clip", "dcpo"]),
        st.one_of(
            st.floats(max_value=-1e-9), st.just(math.nan), st.text(max_size=3), st.lists(st.floats(), max_size=2)
        ),
    ),
    st.tuples(
        st.just("clip high"),
        st.one_of(
            st.floats(max_value=-1e-9), st.just(math.nan), st.text(max_size=3), st.lists(st.floats(), max_size=2)
        ),
    ),
    st.tuples(
        st.just("alpha"), st.one_of(st.sampled_from([math.nan, math.inf, -math.inf]), st.text(max_size=3), st.none())
    ),
    st.tuples(st.just("generator"), st.one_of(st.none(), st.integers(), st.text(max_size=4))),
    st.tuples(st.just("in_band shapes"), shapes.filter(lambda s: s != (2, 3))),
)


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2


GOOD = {
    "logprobs": LOGP,
    "old_logprobs": LOGP - 0.01,
    "advantages": torch.tensor([1.0, -1.0]),
    "mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    "objective": "bandpo-kl",
}


def bad_loss(change: tuple[str, Any]) -> str:
    name, value = change
    return refused(lambda: bandpo.policy_loss(**{**GOOD, name: value}))


wrong_shape = shapes.filter(lambda s: s != (2, 3)).map(torch.zeros)
BAD_LOSS = st.one_of(
    st.tuples(st.sampled_from(["logprobs", "old_logprobs"]), st.one_of(no_tensor, wrong_dtype, wrong_shape)),
    st.tuples(st.just("mask"), st.one_of(no_tensor, wrong_shape)),
    st.tuples(
        st.just("advantages"),
        st.one_of(no_tensor, shapes.filter(lambda s: s not in ((2, 3), (2,), (2, 1))).map(torch.zeros)),
    ),
    st.tuples(
        st.sampled_from(["ref_logprobs", "rollout_logprobs", "entropy"]),
        st.one_of(no_tensor.filter(lambda x: x is not None), wrong_shape),
    ),
    st.tuples(
        st.just("sample_weight"),
        st.one_of(no_tensor.filter(lambda x: x is not None), shapes.filter(lambda s: s != (2,)).map(torch.zeros)),
    ),
    st.tuples(
        st.just("objective"),
        st.one_of(
            names.filter(lambda s: s not in OBJECTIVES), st.integers(), st.none(), st.lists(st.text(), max_size=2)
        ),
    ),
    st.tuples(
        st.just("kl_coef"),
        st.one_of(st.floats(max_value=-1e-9), st.just(math.nan), st.floats(min_value=1e-9), st.text(max_size=3)),
    ),
    st.tuples(st.just("max_length"), st.one_of(st.integers(), st.text(max_size=3))),
    st.tuples(st.just("extras"), st.dictionaries(names, st.just(LOGP), min_size=1, max_size=2)),
)


def bad_small(draw: tuple[str, Any]) -> str:
    kind, x = draw
    rewards = torch.ones(8)
    calls: dict[str, Callable[[], object]] = {
        "group_size": lambda: bandpo.group_advantages(rewards, x),
        "kind": lambda: bandpo.group_advantages(rewards, 4, kind=x),
        "rewards": lambda: bandpo.group_advantages(x, 4),
        "aggregation": lambda: bandpo.aggregate(LOGP, torch.ones(2, 3), x),
        "k": lambda: bandpo.pass_at_k(8, 2, x),
        "c": lambda: bandpo.pass_at_k(8, x, 2),
        "n": lambda: bandpo.pass_at_k(x, 0, 9),
        "match": lambda: bandpo.match_radius("kl", like=Clip(0.2), by=x),
        "match divergence": lambda: bandpo.match_radius(x, like=Clip(0.2)),
        "surrogate": lambda: Objective(bounds=Clip(), surrogate=x),
        "bounds": lambda: Objective(bounds=x),
        "level": lambda: Objective(bounds=Clip(), ratio_level=x),
        "anchor": lambda: Objective(bounds=Clip(), anchor=x),
        "schedule": lambda: Schedule(0.1, 0.2, 10, x),
        "steps": lambda: Schedule(0.1, 0.2, x),
        "prompts": lambda: Pruning(prompts=x),
        "completions": lambda: Pruning(completions=x),
        "mode": lambda: Pruning(prompts=0.5, mode=x),
        "name": lambda: get_objective(x),
    }
    return refused(calls[kind])


# hypothesis tries words that it finds in the source, the allowed ones too
ALLOWED = {w for kind in (AdvantageKind, Aggregation, RatioLevel, Anchor, Mode, Shape) for w in get_args(kind)} | {
    "max_shift"
}
texts = st.one_of(
    st.text(max_size=8).filter(lambda x: x not in ALLOWED),
    st.none(),
    st.integers(),
    st.lists(st.text(max_size=2), max_size=2),
)
no_share = st.one_of(
    st.floats(max_value=-1e-9), st.floats(min_value=1.0), st.just(math.nan), st.text(max_size=3), st.none()
)
BAD_SMALL = st.one_of(
    st.tuples(
        st.just("group_size"),
        st.one_of(
            st.integers(max_value=1),
            st.integers(min_value=9),
            st.sampled_from([3, 5, 6, 7]),
            texts.filter(lambda x: not isinstance(x, int)),
        ),
    ),
    st.tuples(st.sampled_from(["kind", "aggregation", "level", "anchor", "mode", "match"]), texts),
    st.tuples(st.just("schedule"), texts),
    st.tuples(
        st.just("rewards"),
        st.one_of(no_tensor, wrong_dtype, shapes.filter(lambda s: len(s) != 1 or s[0] % 4).map(torch.zeros)),
    ),
    st.tuples(st.just("k"), st.one_of(st.integers(max_value=0), st.integers(min_value=9))),
    st.tuples(st.just("c"), st.one_of(st.integers(max_value=-1), st.integers(min_value=9))),
    st.tuples(st.just("n"), st.integers(max_value=8)),
    st.tuples(st.just("match divergence"), texts.filter(lambda x: str(x).lower() not in DIVERGENCES)),
    st.tuples(st.sampled_from(["surrogate", "bounds"]), st.one_of(texts, st.floats())),
    st.tuples(st.just("steps"), st.one_of(st.integers(max_value=0), st.text(max_size=2), st.none())),
    st.tuples(st.sampled_from(["prompts", "completions"]), no_share),
    st.tuples(st.just("name"), st.one_of(names.filter(lambda s: s not in OBJECTIVES), st.integers(), st.none())),
)


def bad_override(draw: tuple[str, str, Any]) -> str:
    objective, option, value = draw
    return refused(lambda: Overrides(**{option: value}).apply(OBJECTIVES[objective], objective).bounds(LOGP))


BAD_OVERRIDE = st.one_of(
    st.tuples(
        st.just("grpo"),
        st.sampled_from(["radius", "max_ratio", "radius_upper", "divergence", "divergence_top_k"]),
        st.floats(min_value=0.01, max_value=5),
    ),
    st.tuples(
        st.just("bandpo-kl"),
        st.sampled_from(["epsilon", "epsilon_high", "divergence_top_k"]),
        st.floats(min_value=0.01, max_value=5),
    ),
    st.tuples(
        st.sampled_from(["bandpo-kl", "bandpo-tv"]),
        st.just("radius"),
        not_positive.filter(lambda x: x is not None and x is not False),
    ),
    st.tuples(st.just("bandpo-kl"), st.just("divergence"), names.filter(lambda s: s.lower() not in DIVERGENCES)),
)

# ---- any values: what comes out keeps its promises

any_float = st.integers(0, 2**32 - 1).map(lambda bits: np.array([bits], dtype=np.uint32).view(np.float32)[0].item())


def any_logprobs(draw: tuple[list[float], str, float]) -> str:
    values, divergence, radius = draw
    logp = torch.tensor(values, dtype=torch.float32)
    lower, upper = bandpo.ratio_bounds(logp, divergence, radius)
    bad = logp.isnan()
    assert (lower.isnan() == bad).all() and (upper.isnan() == bad).all()
    low, high = lower[~bad], upper[~bad]
    assert ((low >= 0) & (low <= 1) & (high >= 1)).all()
    assert (high.double().log() <= -logp[~bad].clamp(max=0).double() + 1e-6).all()
    alone = bandpo.ratio_bounds(logp[:1], divergence, radius)
    assert torch.equal(alone.lower.nan_to_num(-1), lower[:1].nan_to_num(-1))
    return "fine"


ANY_LOGPROBS = st.tuples(
    st.lists(st.one_of(any_float, st.floats(-100, 0, width=32)), min_size=1, max_size=8),
    st.sampled_from(["kl", "reverse_kl", "tv", "chi2", "js", "hellinger"]),
    st.sampled_from([1e-6, 0.01, 0.05, 1.0]),
)


def any_batch(draw: tuple[list[float], list[float], list[bool], str]) -> str:
    """Whatever stands where the mask is off, loss and gradient are those of zeros there."""
    new, garbage, mask, objective = draw
    valid = torch.tensor(mask).view(2, 3)
    logp, junk = torch.tensor(new).view(2, 3), torch.tensor(garbage).view(2, 3)
    results = []
    for filler in (junk, torch.zeros(2, 3)):
        x = torch.where(valid, logp, filler).requires_grad_()
        old = torch.where(valid, logp - 0.3, filler)
        loss, _ = bandpo.policy_loss(
            logprobs=x, old_logprobs=old, advantages=torch.tensor([1.0, -2.0]), mask=valid, objective=objective
        )
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert results[0][0].isfinite() and torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    return "fine"


ANY_BATCH = st.tuples(
    st.lists(st.floats(-20, -0.0009765625, width=32), min_size=6, max_size=6),
    st.lists(any_float, min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.sampled_from(["bandpo-kl", "grpo", "gspo", "cispo", "sapo", "dcpo"]),
)
