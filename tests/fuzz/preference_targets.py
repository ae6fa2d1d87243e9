"""Bad and odd arguments of the preference losses and designs, and packing of any lengths on a tiny model.

`TARGETS` maps a name to (inputs, check, whether every input is bad, whether it is slow); see targets.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from bandpo.preference import (
    PREFERENCES,
    PairObjective,
    kto_loss,
    pair_loss,
    preference_confidence,
    preferential_g_optimal,
    reward_calibration,
)
from bandpo.selection import pack_rows, packed_logprobs

PAIRS = 3


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


# ---- losses with one bad argument

no_column = st.one_of(
    st.none(),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.floats(), max_size=3),
    st.just(np.zeros(PAIRS)),
    st.lists(st.integers(0, 4), max_size=3).map(tuple).filter(lambda s: s != (PAIRS,)).map(torch.zeros),
    st.sampled_from([torch.bool, torch.complex64]).map(lambda d: torch.zeros(PAIRS, dtype=d)),
)
not_finite = st.sampled_from([math.nan, math.inf, -math.inf])
no_number = st.one_of(st.text(max_size=4), st.none(), st.booleans(), st.lists(st.floats(), max_size=2), not_finite)
no_probability = st.one_of(not_finite, st.floats(max_value=-1e-6), st.floats(min_value=1.001))


def one_bad(values: st.SearchStrategy[float]) -> st.SearchStrategy[torch.Tensor]:
    """A column in which one value is bad."""
    return st.tuples(st.integers(0, PAIRS - 1), values).map(
        lambda x: torch.tensor([x[1] if i == x[0] else 0.5 for i in range(PAIRS)])
    )


BAD_PAIRS = st.one_of(
    st.tuples(
        st.sampled_from(["chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs"]),
        st.sampled_from([name for name, o in PREFERENCES.items() if o.reference != "none"]),
        no_column,
    ),
    st.tuples(st.sampled_from(["chosen_lengths", "rejected_lengths"]), st.sampled_from(["ipo", "simpo"]), no_column),
    st.tuples(
        st.sampled_from(["chosen_lengths", "rejected_lengths"]),
        st.just("ipo"),
        one_bad(st.one_of(st.just(math.nan), st.floats(max_value=0.99, allow_nan=False))),
    ),
    st.tuples(st.just("confidence"), st.just("rbrm"), st.one_of(no_column, one_bad(no_probability))),
    st.tuples(
        st.just("reward_gap"), st.sampled_from(["vcb", "rebel", "rdrc"]), st.one_of(no_column, one_bad(not_finite))
    ),
    st.tuples(
        st.sampled_from(["reward_gap", "confidence", "chosen_lengths"]),
        st.sampled_from(["dpo", "chipo", "slic"]),
        st.just(torch.full((PAIRS,), 0.5)),
    ),
)


def good_pairs(name: str) -> dict[str, Any]:
    objective = PREFERENCES[name]
    given: dict[str, Any] = {
        "chosen_logprobs": torch.tensor([-1.0, -9, -4]),
        "rejected_logprobs": torch.tensor([-2.0, -3, -8]),
    }
    if objective.reference != "none":
        given |= {
            "ref_chosen_logprobs": torch.tensor([-2.0, -8, -4]),
            "ref_rejected_logprobs": torch.tensor([-2.0, -4, -9]),
        }
    if objective.length == "mean":
        given |= {"chosen_lengths": torch.tensor([1, 2, 3]), "rejected_lengths": torch.tensor([3, 2, 1])}
    if objective.target == "squared" or name == "pdfr":
        given["reward_gap"] = torch.tensor([1.0, 0.0, -1.0])
    if name == "rbrm":
        given["confidence"] = torch.tensor([0.9, 0.5, 0.6])
    return given


def bad_pairs(draw: tuple[str, str, Any]) -> str:
    argument, name, value = draw
    return refused(lambda: pair_loss(**{**good_pairs(name), argument: value}, objective=name))


many_values = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(torch.zeros)
no_divergence = st.one_of(not_finite, st.floats(max_value=-1e-9)).map(torch.tensor)
BAD_OTHERS = st.one_of(
    st.tuples(st.sampled_from(["log_ratio", "desirable"]), no_column.filter(lambda x: getattr(x, "dtype", 0) != torch.bool)),
    st.tuples(st.just("kl"), st.one_of(st.floats(), st.none(), many_values, no_divergence)),
    st.tuples(st.sampled_from(["beta", "alpha"]), st.one_of(no_number, st.floats(max_value=0.0))),
    st.tuples(st.sampled_from(["desirable_weight", "calibration"]), st.one_of(no_number, st.floats(max_value=-1e-9))),
    st.tuples(st.just("floor"), st.one_of(no_number, st.floats(max_value=-1e-9), st.floats(min_value=1.0))),
    st.tuples(st.just("rewards"), st.one_of(no_column, one_bad(st.just(math.nan)))),
    st.tuples(st.just("calibrated"), st.one_of(no_column, one_bad(not_finite))),
    st.tuples(
        st.sampled_from(["objective.beta", "objective.label_scale", "objective.margin", "objective.calibration"]), no_number
    ),
)  # fmt: skip


def bad_others(draw: tuple[str, Any]) -> str:
    argument, x = draw
    column, labels = torch.zeros(PAIRS), torch.ones(PAIRS, dtype=torch.bool)
    kto = {"log_ratio": column, "desirable": labels, "kl": torch.tensor(0.1)}
    calls: dict[str, Callable[[], object]] = {
        "alpha": lambda: preference_confidence(column, column, alpha=x),
        "floor": lambda: preference_confidence(column, column, floor=x),
        "rewards": lambda: preference_confidence(x, column),
        "calibration": lambda: reward_calibration(column, column, x),
        "calibrated": lambda: reward_calibration(column, x, 0.1),
    }
    if argument.startswith("objective."):
        return refused(lambda: PairObjective(**{argument.partition(".")[2]: x}))
    return refused(calls.get(argument, lambda: kto_loss(**{**kto, argument: x})))


# ---- any values of good ones

any_float = st.floats(allow_nan=True, allow_infinity=True, width=32)
ANY_PAIRS = st.tuples(
    st.sampled_from(sorted(PREFERENCES)),
    st.lists(st.tuples(any_float, any_float, any_float, any_float), min_size=1, max_size=5),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)


def any_pairs(draw: tuple[str, list[tuple[float, ...]], torch.dtype]) -> str:
    """Pairs that are numbers have the loss that they have alone; the others have loss 0 and gradient 0."""
    name, rows, dtype = draw
    columns = [torch.tensor(x, dtype=torch.float64).to(dtype) for x in zip(*rows, strict=True)]
    new = [c.clone().requires_grad_(True) for c in columns[:2]]
    n, objective = len(rows), PREFERENCES[name]
    extras: dict[str, Any] = {}
    if objective.reference != "none":
        extras |= {"ref_chosen_logprobs": columns[2], "ref_rejected_logprobs": columns[3]}
    if objective.length == "mean":
        extras |= {"chosen_lengths": torch.full((n,), 3), "rejected_lengths": torch.full((n,), 5)}
    if objective.target == "squared" or name == "pdfr":
        extras["reward_gap"] = torch.linspace(-2, 2, n)
    if name == "rbrm":
        extras["confidence"] = torch.linspace(0, 1, n)
    losses, metrics = pair_loss(chosen_logprobs=new[0], rejected_logprobs=new[1], objective=name, **extras)
    losses.sum().backward()
    wide = [c.float() if c.element_size() < 4 else c for c in columns]
    sides = [wide[i] - wide[i + 2] if objective.reference != "none" else wide[i] for i in range(2)]
    finite = sides[0].isfinite() & sides[1].isfinite()
    assert not losses.isnan().any() and (losses.detach()[~finite] == 0).all()
    for leaf in new:
        assert leaf.grad is not None and (leaf.grad[~finite] == 0).all()
    assert abs(metrics["nonfinite_fraction"].item() - (~finite).double().mean().item()) < 1e-6
    for i in finite.nonzero().flatten().tolist():
        one = {k: v[i : i + 1] for k, v in extras.items()}
        alone, _ = pair_loss(
            chosen_logprobs=columns[0][i : i + 1], rejected_logprobs=columns[1][i : i + 1], objective=name, **one
        )
        assert torch.equal(alone[0], losses.detach()[i]), (alone, losses)
    return "fine"


# ---- designs

sizes = st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(1, 3))
FEATURES = st.tuples(
    sizes,
    st.integers(0, 10**6),
    st.floats(-300, 300),
    st.floats(-1e4, 1e4),
    st.sampled_from(["plain", "equal actions", "equal features", "rank one", "one hot"]),
    st.sampled_from(["design", "uniform"]),
)


def any_features(draw: tuple[Any, ...]) -> str:
    """Weights are probabilities and the largest leverage is the rank, in any units and around any origin."""
    (prompts, actions, d), seed, power, shift, kind, marginal = draw
    g = torch.Generator().manual_seed(seed)
    phi = torch.randn(prompts, actions, d, generator=g, dtype=torch.float64)
    if kind == "equal actions":
        phi = phi[:, :1].expand(prompts, actions, d)
    elif kind == "equal features":
        phi = phi[..., :1].expand(prompts, actions, d)
    elif kind == "rank one":
        phi = phi[..., :1] * torch.arange(1.0, d + 1, dtype=torch.float64)
    elif kind == "one hot":
        phi = torch.nn.functional.one_hot(torch.arange(actions) % d, d).double().expand(prompts, actions, d)
    centred = phi - phi.mean(1, keepdim=True)
    ranks = torch.linalg.matrix_rank(centred, atol=1e-9)
    design = preferential_g_optimal((phi + shift) * 10.0 ** (power * 0.9), prompts=marginal, tolerance=0.05)
    ones = torch.ones(prompts, dtype=torch.float64)
    torch.testing.assert_close(design.actions.sum(1), ones)
    torch.testing.assert_close(design.prompts.sum(), ones[0])
    assert (
        (design.actions >= 0).all()
        and (design.prompts >= 0).all()
        and design.leverage.isfinite() | (marginal == "design")
    )
    assert (design.conditional <= ranks + 0.05 * (ranks + 1) + 1e-9).all() and (
        design.conditional >= ranks - 1e-6
    ).all()
    return "fine"


BAD_FEATURES = st.one_of(
    st.tuples(st.just("features"), no_column.filter(lambda x: not isinstance(x, torch.Tensor) or x.dim() != 3)),
    st.tuples(st.just("features"), st.tuples(st.integers(0, 11), not_finite).map(
        lambda x: torch.arange(12.0).index_fill(0, torch.tensor(x[0]), x[1]).view(2, 3, 2))),
    st.tuples(st.just("features"), st.sampled_from([(0, 3, 2), (2, 1, 2), (2, 3, 0)]).map(torch.zeros)),
    st.tuples(st.just("prompts"), st.one_of(st.text(max_size=5), st.none(), st.integers())),
    st.tuples(st.just("tolerance"), st.one_of(no_number, st.floats(max_value=0.0))),
    st.tuples(st.just("steps"), st.one_of(no_number, st.integers(max_value=0), st.floats())),
)  # fmt: skip


def bad_features(draw: tuple[str, Any]) -> str:
    name, x = draw
    good = {"features": torch.eye(3).unsqueeze(0)}
    return refused(lambda: preferential_g_optimal(**{**good, name: x}))


# ---- packing


@functools.cache
def windowed() -> Any:
    """A tiny model of full attention and windows of 5 tokens in turn, in float64."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double().eval()


LENGTHS = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(0, 60), st.integers(1, 9), st.integers(0, 10**6)
)


def any_packing(draw: tuple[list[int], int, int, int]) -> str:
    """Log-probs of packed sequences are those of each sequence alone, wherever its padding is."""
    lengths, spare, window, seed = draw
    g = torch.Generator().manual_seed(seed)
    width = max(lengths) + 3
    starts = torch.stack([torch.randint(0, width - n + 1, (1,), generator=g) for n in lengths])
    at = torch.arange(width)
    mask = (at >= starts) & (at < starts + torch.tensor(lengths).unsqueeze(1))
    ids = torch.randint(1, 40, mask.shape, generator=g) * mask
    net = windowed()
    with torch.no_grad():
        found = packed_logprobs(
            lambda **kw: net(**kw, use_cache=False).logits,
            ids,
            mask,
            capacity=max(lengths) + spare,
            window=window,
            check=False,
        )
        for row, real, values in zip(ids, mask, found, strict=True):
            assert (values[~real] == 0).all()
            sequence = row[real]
            alone = net(input_ids=sequence.unsqueeze(0), use_cache=False).logits[0, :-1].log_softmax(-1)
            expected = alone.gather(-1, sequence[1:, None]).squeeze(-1)
            torch.testing.assert_close(values[real][1:], expected, rtol=1e-10, atol=1e-10)
    return "fine"


BAD_MASKS = st.tuples(
    st.lists(st.sampled_from([-100.0, 0.0, 0.5, 1.0, 2.0, math.nan]), min_size=6, max_size=6).filter(
        lambda x: not set(x) <= {0.0, 1.0} or not any(x[:3]) or not any(x[3:])
    ),
    st.integers(1, 9),
)


def bad_masks(draw: tuple[list[float], int]) -> str:
    values, capacity = draw
    return refused(
        lambda: pack_rows(torch.ones(2, 3, dtype=torch.long), torch.tensor(values).view(2, 3), capacity=capacity)
    )


TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str], bool, bool]] = {
    "bad arguments of pair_loss": (BAD_PAIRS, bad_pairs, True, False),
    "bad arguments of other preference losses": (BAD_OTHERS, bad_others, True, False),
    "any pairs": (ANY_PAIRS, any_pairs, False, False),
    "any features of a design": (FEATURES, any_features, False, True),
    "bad features of a design": (BAD_FEATURES, bad_features, True, False),
    "any packed lengths": (LENGTHS, any_packing, False, True),
    "bad masks of packing": (BAD_MASKS, bad_masks, True, False),
}
