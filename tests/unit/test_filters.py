"""Sequence filters against loops in numpy, written from the rules of the frameworks, one sequence and one token at a time."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

from bandpo import OBJECTIVES, Objective, aggregate, policy_loss, token_objective
from bandpo.bounds import Clip
from bandpo.integrations._host import host_objective
from bandpo.integrations.verl_options import with_region
from bandpo.losses import compiled
from bandpo.metrics import effective_size, policy_metrics, policy_sums
from bandpo.selection.pruning import Pruning
from bandpo.surrogates.corrections import TIS, IcePop
from bandpo.surrogates.filters import (
    SequenceFilter,
    geometric_mask,
    opsm,
    outlier_mask,
    product_mask,
    rollout_rs,
    seq_mis,
    trust_region_mask,
    vaco,
)
from batches import B, T, batch, complete

OF_TOKEN = {
    "log_ratio": lambda x: x, "k1": lambda x: -x, "k2": lambda x: x * x / 2,
    "k3": lambda x: math.exp(x) - 1 - x, "tv": lambda x: abs(math.exp(x) - 1),
}  # fmt: skip
OF_TOKENS = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max}


def data_of(seed=0, dtype=torch.float64, *, per_token=False, spread=0.3):
    """A batch with holes in its masks, a row without tokens, and log-probs of a sampler."""
    g = torch.Generator().manual_seed(50 + seed)
    data = batch(seed, dtype, spread=spread)
    data["mask"] = data["mask"] & (torch.rand(B, T, generator=g) > 0.25)
    data["mask"][1] = False
    data["mask"][2, 0] = True
    noise = spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    data["rollout_logprobs"] = (data["old_logprobs"].double() + noise).clamp(max=-1e-6).to(dtype)
    if per_token:
        data["advantages"] = torch.randn(B, T, generator=g, dtype=torch.float64).to(dtype)
    return data


def pair(data, policies):
    names = {"policy": "logprobs", "old": "old_logprobs", "rollout": "rollout_logprobs"}
    first, second = policies.split("/")
    return (data[names[first]].double() - data[names[second]].double()).numpy()


def drop_by_loop(rule, data):
    """1 and 0 for each token, by loops over sequences and tokens."""
    x, mask = pair(data, rule.policies), data["mask"].numpy()
    a = data["advantages"].double().numpy().reshape(B, -1) * np.ones((B, T))
    low, high = (-math.inf if rule.low is None else rule.low), (math.inf if rule.high is None else rule.high)
    of_token, everything = OF_TOKEN[rule.statistic], []
    for i in range(B):
        everything += [of_token(x[i, t]) for t in range(T) if mask[i, t]]
    keep = np.ones((B, T))
    for i in range(B):
        own = [of_token(x[i, t]) for t in range(T) if mask[i, t]]
        if not own:
            continue
        if rule.reduction == "batch-mean":
            value = sum(everything) / len(everything)
            inside = low <= value <= high
        elif rule.reduction == "max":
            inside = min(own) >= low and max(own) <= high
        elif rule.reduction != "token":
            inside = low <= OF_TOKENS[rule.reduction](own) <= high
        for t in range(T):
            ok = low <= of_token(x[i, t]) <= high if rule.reduction == "token" else inside
            may = {"all": True, "negative": a[i, t] < 0, "outward": a[i, t] * x[i, t] > 0}[rule.drops]
            keep[i, t] = ok or not may
    return keep


def middle(rule, data):
    """The same rule with thresholds in the middle of its statistic, so that both answers occur."""
    loose = dataclasses.replace(rule, low=-1e9 if rule.statistic in ("log_ratio", "k1") else None, high=1e9)
    x, mask = pair(data, rule.policies), data["mask"].numpy()
    values = []
    for i in range(B):
        own = [OF_TOKEN[rule.statistic](x[i, t]) for t in range(T) if mask[i, t]]
        if own:
            values += own if rule.reduction == "token" else [OF_TOKENS.get(rule.reduction, OF_TOKENS["mean"])(own)]
    high = float(np.quantile(values, 0.6)) + 1e-6
    low = float(np.quantile(values, 0.2)) - 1e-6 if loose.low is not None and rule.reduction != "max" else None
    return dataclasses.replace(rule, low=low, high=high)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("drops", ["all", "negative", "outward"])
@pytest.mark.parametrize("reduction", ["token", "sum", "mean", "max", "batch-mean"])
@pytest.mark.parametrize("statistic", ["log_ratio", "k1", "k2", "k3", "tv"])
def test_a_filter_is_the_loop(statistic, reduction, drops, per_token):
    seen = set()
    for seed, policies in enumerate(("old/rollout", "policy/rollout", "policy/old")):
        data = data_of(seed, per_token=per_token)
        rule = middle(SequenceFilter(statistic, reduction, high=1.0, policies=policies, drops=drops), data)
        objective = dataclasses.replace(OBJECTIVES["grpo"], filter=rule)
        terms = token_objective(objective, **data)
        keep = terms.filter_weights.expand(B, T).numpy()
        want = drop_by_loop(rule, data)
        on = data["mask"].numpy()
        np.testing.assert_array_equal(keep[on], want[on])
        seen |= set(want[on])
    assert seen == {0.0, 1.0} or reduction == "batch-mean"


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_composes_with_every_objective(name, per_token):
    """A dropped token has value and gradient 0; the others have what they have without the filter."""
    plain = OBJECTIVES[name]
    policies = "policy/rollout" if plain.anchor == "rollout" else "policy/old"
    data = {k: v for k, v in data_of(3, per_token=per_token).items() if k != "rollout_logprobs"}
    data = complete(plain, data)
    rule = SequenceFilter("k1", "mean", low=-0.12, high=0.05, policies=policies)
    value, gradient = {}, {}
    for filtered in (False, True):
        x = data["logprobs"].clone().requires_grad_()
        torch.manual_seed(0)
        objective = dataclasses.replace(plain, filter=rule) if filtered else plain
        terms = token_objective(objective, **{**data, "logprobs": x})
        (gradient[filtered],) = torch.autograd.grad(terms.value.sum(), x)
        value[filtered] = terms.value.detach()
    keep = terms.filter_weights.expand(B, T).bool()
    assert keep[data["mask"]].any() and not keep[data["mask"]].all()
    torch.testing.assert_close(value[True], value[False] * keep, rtol=0, atol=0)
    torch.testing.assert_close(gradient[True], gradient[False] * keep, rtol=0, atol=0)
    assert not value[True][~keep].any() and not gradient[True][~keep].any()


# --- the rules of other frameworks, as loops over lists


def skyrl_geometric(old, mu, low, high):
    ratio = math.exp(sum(o - m for o, m in zip(old, mu, strict=True)) / len(old))
    return low <= ratio <= high


def slime_opsm(new, reference, advantage, delta):
    kl = sum(r - n for n, r in zip(new, reference, strict=True)) / len(new)
    return not (advantage < 0 and kl > delta)


def rows_of(data):
    for i in range(B):
        on = data["mask"][i].numpy()
        if on.any():
            yield i, *(data[k][i].numpy()[on] for k in ("logprobs", "old_logprobs", "rollout_logprobs")), on


def kept(filters, data):
    return token_objective(dataclasses.replace(OBJECTIVES["grpo"], filter=filters), **data).filter_weights.expand(B, T)


@pytest.mark.parametrize("seed", range(4))
def test_recipes_are_the_rules_of_the_frameworks(seed):
    data = data_of(seed)
    masks = {
        name: kept(rule, data)
        for name, rule in {
            "geometric": geometric_mask(0.9, 1.1), "product": product_mask(0.6, 1.5), "outlier": outlier_mask(0.6, 1.6),
            "veto": outlier_mask(0.6), "opsm": opsm(0.02), "drift": opsm(0.02, policies="policy/old"),
        }.items()
    }  # fmt: skip
    for i, new, old, mu, _ in rows_of(data):
        ratios, a = [math.exp(o - m) for o, m in zip(old, mu, strict=True)], data["advantages"][i].item()
        want = {
            "geometric": skyrl_geometric(old, mu, 0.9, 1.1), "product": 0.6 <= math.prod(ratios) <= 1.5,
            "outlier": all(0.6 <= r <= 1.6 for r in ratios), "veto": not any(r < 0.6 for r in ratios),
            "opsm": slime_opsm(new, mu, a, 0.02), "drift": slime_opsm(new, old, a, 0.02),
        }  # fmt: skip
        assert {name: bool(mask[i, 0]) for name, mask in masks.items()} == want


@pytest.mark.parametrize("seed", range(4))
def test_trust_region_masking_is_the_largest_and_the_mean(seed):
    data = data_of(seed)
    for estimator in ("k2", "k3"):
        mask = kept(trust_region_mask(0.2, 0.06, estimator=estimator), data)
        for i, new, _, mu, _ in rows_of(data):
            ks = [OF_TOKEN[estimator](n - m) for n, m in zip(new, mu, strict=True)]
            assert bool(mask[i, 0]) == (max(ks) <= 0.2 and sum(ks) / len(ks) <= 0.06)


@pytest.mark.parametrize("per_token", [False, True])
def test_vaco_drops_what_raises_the_total_variation_of_a_sequence_above_its_budget(per_token):
    data = data_of(1, per_token=per_token)
    budget = 0.2
    mask, dropped = kept(vaco(budget), data), 0
    for i, _, old, mu, on in rows_of(data):
        rho = np.exp(old - mu)
        a = data["advantages"][i].numpy() if per_token else np.full(T, data["advantages"][i].item())
        over = np.abs(rho - 1).mean() > budget
        want = ~(over & (np.sign(np.log(rho)) * a[on] > 0))
        np.testing.assert_array_equal(mask[i].numpy()[on].astype(bool), want)
        dropped += (~want).sum()
    assert dropped > 0


def test_a_token_of_advantage_0_is_neither_bad_nor_pushed_outward():
    x, zero, on = torch.full((1, 2), -3.0), torch.zeros(1), torch.ones(1, 2)
    assert opsm(0.1)(x, zero, on).tolist() == [[1]] and vaco(0.1)(x, zero, on).tolist() == [[1, 1]]


def test_the_example_of_open_instruct_s_own_test():
    """Rows with a mean |ρ - 1| of 1.25 and 3, budget 2, A = 1: only the second row is dropped."""
    x = torch.tensor([[0.25, 1.0, 4.0], [4.0, 4.0, 4.0]]).log()
    assert vaco(2.0)(x, torch.ones(2, 3), torch.ones(2, 3)).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_seq_mask_tis_keeps_the_untruncated_weights_of_kept_sequences():
    """NeMo-RL and OpenRLHF: the geometric mean decides, the weights of tokens are π_old/μ as they are."""
    data = data_of(2)
    objective = dataclasses.replace(OBJECTIVES["grpo"], filter=geometric_mask(0.9, 1.2), correction=TIS(math.inf))
    plain = token_objective(OBJECTIVES["grpo"], **{k: v for k, v in data.items() if k != "rollout_logprobs"}).value
    terms = token_objective(objective, **data)
    for i, _, old, mu, on in rows_of(data):
        weights = np.exp(old - mu) * skyrl_geometric(old, mu, 0.9, 1.2)
        np.testing.assert_allclose(terms.value[i].numpy()[on], plain[i].numpy()[on] * weights, rtol=1e-12, atol=0)


def test_seq_mis_is_icepop_at_the_level_of_sequences_and_a_weight_alone_is_tis():
    data = data_of(4)
    pairs = [
        (seq_mis(0.7, 1.4), IcePop(0.7, 1.4, level="sequence")),
        (SequenceFilter("log_ratio", "sum", high=math.log(1.3), action="weight"), TIS(1.3, level="sequence")),
        (SequenceFilter("log_ratio", "token", high=math.log(1.3), action="weight"), TIS(1.3)),
    ]
    for filters, correction in pairs:
        x = [data["logprobs"].clone().requires_grad_() for _ in range(2)]
        one, two = (
            policy_loss(objective=dataclasses.replace(OBJECTIVES["grpo"], **part), **{**data, "logprobs": leaf})
            for part, leaf in zip(({"filter": filters}, {"correction": correction}), x, strict=True)
        )
        torch.testing.assert_close(one[0], two[0], rtol=1e-13, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(found[0], leaf)[0] for found, leaf in zip((one, two), x, strict=True))
        )
        for name in ("correction/weight_mean", "correction/effective_sample_size", "correction/zero_fraction"):
            torch.testing.assert_close(one[1][name], two[1][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["token", "sum"])
def test_a_weight_multiplies_the_ratio_of_the_kl_as_that_of_a_correction_does(reduction):
    """Without it the KL's gradient is that of tokens of π_old, which the sampler's tokens are not."""
    data = data_of(6)
    data["ref_logprobs"] = data["old_logprobs"] - 0.2
    rule = SequenceFilter("log_ratio", reduction, high=math.log(1.3), action="weight")
    correction = TIS(1.3, level="sequence" if reduction == "sum" else "token")
    found = []
    for part in ({"filter": rule}, {"correction": correction}, {"filter": (rule, opsm(0.0, policies="policy/old"))}):
        leaf = data["logprobs"].clone().requires_grad_()
        objective = dataclasses.replace(OBJECTIVES["grpo"], kl_coef=0.7, **part)
        loss, metrics = policy_loss(objective=objective, **{**data, "logprobs": leaf})
        found.append((loss - metrics["loss/policy"], *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found[0][0], found[2][0])  # what another filter drops stays in the KL


# --- denominators, numbers that are not finite, dtypes


@pytest.mark.parametrize("aggregation", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_dropped_tokens_stay_in_the_denominators_or_leave_them(aggregation):
    data = data_of(5)
    for rule in (SequenceFilter("k3", "mean", high=0.03), SequenceFilter("k3", "token", high=0.03)):
        objective = dataclasses.replace(OBJECTIVES["grpo"], aggregation=aggregation)
        keep = token_objective(dataclasses.replace(objective, filter=rule), **data).filter_weights.expand(B, T).bool()
        assert 0 < (keep & data["mask"]).sum() < data["mask"].sum()
        # The sampler is not used without the filter, and the objective looks at single tokens.
        plain = {k: v for k, v in data.items() if k != "rollout_logprobs"}
        values = token_objective(objective, **plain).value
        for counts in ("all", "kept"):
            filtered = dataclasses.replace(objective, filter=dataclasses.replace(rule, counts=counts))
            got, _ = policy_loss(objective=filtered, **data)
            left = data["mask"] if counts == "all" else data["mask"] & keep
            want = -aggregate(values * keep, left, aggregation)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
            if counts == "kept":  # the loss of the batch with the mask off there
                without, _ = policy_loss(objective=objective, **{**plain, "mask": data["mask"] & keep})
                torch.testing.assert_close(got, without, rtol=1e-13, atol=0)


def test_the_kl_to_the_reference_is_not_filtered_unless_tokens_leave_the_mask():
    data = data_of(5)
    data["ref_logprobs"] = data["old_logprobs"] - 0.3
    rule = SequenceFilter("k3", "mean", high=-0.0)  # drops everything
    for counts in ("all", "kept"):
        objective = dataclasses.replace(OBJECTIVES["grpo"], filter=dataclasses.replace(rule, counts=counts))
        loss, metrics = policy_loss(objective=objective, kl_coef=0.5, **data)
        assert metrics["loss/policy"] == 0 and (loss > 0) == (counts == "all")
        assert metrics["filter/kept_fraction"] == 0


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf, -1e30])
def test_a_token_without_a_number_has_no_part_in_the_filter(bad):
    data, rule = data_of(6), SequenceFilter("k1", "mean", low=-0.05, high=0.05)
    objective = dataclasses.replace(OBJECTIVES["grpo"], filter=rule)
    token = tuple(data["mask"].nonzero()[3])
    without = {**data, "mask": data["mask"].clone()}
    without["mask"][token] = False
    data["rollout_logprobs"] = data["rollout_logprobs"].clone()
    data["rollout_logprobs"][token] = bad
    x = [data["logprobs"].clone().requires_grad_() for _ in range(2)]
    terms, want = (
        token_objective(objective, **{**d, "logprobs": leaf}) for d, leaf in zip((data, without), x, strict=True)
    )
    assert terms.nonfinite.sum() == 1 and terms.nonfinite[token]
    torch.testing.assert_close(terms.value, want.value, rtol=0, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(t.value.sum(), leaf)[0] for t, leaf in zip((terms, want), x, strict=True))
    )
    metrics = policy_metrics(terms)
    assert metrics["nonfinite_fraction"] > 0 and all(v.isfinite() for k, v in metrics.items() if "filter" in k)


def test_a_filter_that_does_not_measure_the_sampler_does_not_look_at_it():
    data = data_of(6)
    objective = dataclasses.replace(OBJECTIVES["grpo"], filter=opsm(0.01, policies="policy/old"))
    want = policy_loss(objective=objective, **{k: v for k, v in data.items() if k != "rollout_logprobs"})[0]
    data["rollout_logprobs"] = torch.full_like(data["rollout_logprobs"], math.nan)
    assert policy_loss(objective=objective, **data)[0] == want


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [opsm(0.02), vaco(0.2), *seq_mis(0.5, 2.0), *trust_region_mask(0.2, 0.06)])
def test_dtypes_and_no_gradient_through_the_filter(dtype, rule):
    data = data_of(7, dtype)
    x = data["logprobs"].clone().requires_grad_()
    objective = dataclasses.replace(OBJECTIVES["grpo"], filter=rule)
    terms = token_objective(objective, **{**data, "logprobs": x})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert terms.filter_weights.dtype == terms.value.dtype == wide and not terms.filter_weights.requires_grad
    exact = token_objective(objective, **{k: v.double() if v.is_floating_point() else v for k, v in data.items()})
    torch.testing.assert_close(terms.filter_weights.double(), exact.filter_weights, rtol=1e-5, atol=0)
    torch.autograd.grad(terms.value.sum(), x)


def test_extreme_log_ratios_are_dropped_and_stay_finite():
    x = torch.tensor([[200.0, -200.0], [-200.0, -200.0]])
    one, on = torch.ones(2), torch.ones(2, 2)
    for statistic in OF_TOKEN:
        assert SequenceFilter(statistic, "max", low=-0.9, high=0.9)(x, one, on).tolist() == [[0], [0]]
    assert SequenceFilter("log_ratio", "sum", high=90.0, action="weight")(x.abs(), one, on).isfinite().all()


# --- metrics


def test_metrics_are_those_of_the_weights_and_pool_over_parts():
    data = data_of(8)
    objective = dataclasses.replace(
        OBJECTIVES["grpo"], filter=(geometric_mask(0.94, 1.06), opsm(0.02)), correction=TIS(1.3)
    )
    terms = token_objective(objective, **data)
    metrics, on = policy_metrics(terms), data["mask"].numpy()
    weights = (terms.weights * terms.filter_weights).numpy()[on]
    assert metrics["correction/effective_sample_size"].item() == pytest.approx(
        weights.sum() ** 2 / (len(weights) * (weights**2).sum()), rel=1e-6
    )
    assert metrics["correction/weight_mean"].item() == pytest.approx(weights.mean(), rel=1e-6)
    keep = terms.filter_weights.expand(B, T).numpy() > 0
    rows = [keep[i][on[i]] for i in range(B) if on[i].any()]
    assert metrics["filter/kept_fraction"].item() == pytest.approx(np.concatenate(rows).mean(), rel=1e-6)
    assert metrics["filter/kept_sequence_fraction"].item() == pytest.approx(np.mean([r.any() for r in rows]), rel=1e-6)
    assert 0 < metrics["filter/kept_sequence_fraction"] < 1
    parts = [
        policy_sums(token_objective(objective, **{k: v[i : i + 2] for k, v in data.items()})) for i in range(0, B, 2)
    ]
    for name in (n for n in parts[0] if n.startswith(("filter/", "correction/"))):
        pooled = sum(p[name].numerator for p in parts) / sum(p[name].denominator for p in parts)
        assert pooled.item() == pytest.approx(metrics[name].item(), rel=1e-6)


def test_an_empty_batch_and_weights_of_zero_give_no_number():
    assert math.isnan(effective_size(0.0, 0.0))
    data = data_of(8)
    data["mask"] = torch.zeros_like(data["mask"])
    loss, metrics = policy_loss(objective=dataclasses.replace(OBJECTIVES["grpo"], filter=opsm(0.1)), **data)
    assert loss == 0 and metrics["filter/kept_fraction"].isnan()


def test_without_filters_nothing_is_added():
    data = {k: v for k, v in data_of(0).items() if k != "rollout_logprobs"}
    terms = token_objective(OBJECTIVES["grpo"], **data)
    assert terms.filter_weights is None and terms.counted is None and OBJECTIVES["grpo"].filters == ()
    assert not [n for n in policy_sums(terms) if n.startswith(("filter", "correction"))]


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistic": "k4"}, "statistic is 'k4'"), ({"reduction": "median"}, "reduction is 'median'"),
        ({"high": None}, "set at least one"), ({"low": 2.0}, "nothing would be kept"), ({"high": math.nan}, "high must be"),
        ({"high": math.inf}, "high must be"), ({"high": True}, "high must be"), ({"high": -1.0}, "would drop everything"),
        ({"policies": "old/policy"}, "policies is"), ({"drops": "positive"}, "drops is"), ({"counts": "none"}, "counts is"),
        ({"action": "weight"}, "needs statistic='log_ratio'"),
    ],
)  # fmt: skip
def test_a_filter_refuses_what_it_cannot_mean(change, message):
    with pytest.raises(ValueError, match=message):
        SequenceFilter(**{"statistic": "k3", "reduction": "mean", "high": 0.1, **change})


def test_recipes_refuse_what_they_cannot_mean():
    for call in (
        lambda: geometric_mask(1.1, 0.9), lambda: product_mask(-1.0, 2.0), lambda: outlier_mask(0.0),
        lambda: trust_region_mask(None), lambda: trust_region_mask(0.1, estimator="k1"), lambda: vaco(0.1, over="group"),
        lambda: vaco(-0.1), lambda: rollout_rs("seq_max_k1", 2.0), lambda: rollout_rs("token_k2", "0.1_0.2"),
        lambda: rollout_rs("token_k1,token_k2", "1,2,3"), lambda: rollout_rs("token_k1", "0.5_x"),
        lambda: rollout_rs("", 1.0), lambda: rollout_rs("token_k3", -1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call()


def test_an_objective_refuses_filters_that_do_not_fit_it():
    clip = Clip()
    with pytest.raises(TypeError, match="filter must be"):
        Objective(bounds=clip, filter="opsm")
    with pytest.raises(TypeError, match="filter must be"):
        Objective(bounds=clip, filter=[opsm(0.1)])
    with pytest.raises(ValueError, match="measures π_old"):
        Objective(bounds=clip, filter=geometric_mask(), anchor="rollout")
    with pytest.raises(ValueError, match="count it twice"):
        Objective(bounds=clip, filter=seq_mis(0.5, 2.0), correction=TIS())
    data = {k: v for k, v in data_of(0).items() if k != "rollout_logprobs"}
    with pytest.raises(ValueError, match=r"filters by the sampler.*pass rollout_logprobs"):
        policy_loss(objective=Objective(bounds=clip, filter=geometric_mask()), **data)


def test_a_budget_of_the_batch_is_refused_where_samples_are_left_out():
    objective = dataclasses.replace(OBJECTIVES["dapo"], filter=vaco(0.1, over="batch"))
    assert objective.traits == ("of_batch",)
    with pytest.raises(ValueError, match="looks at the whole batch"):
        Pruning(completions=0.5).check(objective)
    with pytest.raises(ValueError, match="looks at the whole batch"):
        policy_loss(objective=objective, sample_weight=torch.ones(B, dtype=torch.float64), **data_of(0))
    assert dataclasses.replace(OBJECTIVES["dapo"], filter=vaco(0.1)).traits == ()


def test_objectives_with_filters_are_equal_by_value_and_survive_a_pickle():
    one, two = (dataclasses.replace(OBJECTIVES["dapo"], filter=trust_region_mask(0.1, 0.01)) for _ in range(2))
    assert one == two and hash(one) == hash(two) and one != OBJECTIVES["dapo"]
    assert pickle.loads(pickle.dumps(one)) == one


def test_hosts_take_a_filter_that_they_have_the_log_probs_for():
    old, rollout, both = (
        dataclasses.replace(OBJECTIVES["dapo"], filter=geometric_mask(policies=p))
        for p in ("policy/old", "policy/rollout", "old/rollout")
    )
    for objective in (old, rollout, both):
        assert host_objective("H", objective, {}, sampler="beside").filters == objective.filters
    assert host_objective("H", rollout, {}, sampler="only").anchor == "rollout"
    for objective, sampler in ((both, "none"), (rollout, "none"), (both, "only"), (old, "only")):
        with pytest.raises(ValueError, match="for a filter with policies="):
            host_objective("H", objective, {}, sampler=sampler)
    with pytest.raises(ValueError, match="whole sequences"):
        host_objective("H", old, {}, sampler="none", rows="packed")
    of_token = dataclasses.replace(
        OBJECTIVES["dapo"], filter=SequenceFilter("k3", "token", high=0.1, policies="policy/old")
    )
    assert host_objective("H", of_token, {}, sampler="none", rows="packed").filters
    with pytest.raises(ValueError, match="the other sequences"):
        host_objective("H", dataclasses.replace(old, filter=vaco(0.1, over="batch")), {}, sampler="beside", rows="one")
    with pytest.raises(ValueError, match="counts='kept'"):
        host_objective("H", dataclasses.replace(old, filter=geometric_mask(counts="kept")), {}, sampler="beside")


DRIFT = dataclasses.replace(OBJECTIVES["dapo"], filter=opsm(0.01, policies="policy/old"))
SAMPLER = dataclasses.replace(OBJECTIVES["dppo-kl"], filter=opsm(0.01))
MISMATCH = dataclasses.replace(OBJECTIVES["dapo"], filter=geometric_mask())


def test_verl_takes_a_filter_of_the_two_policies_that_it_gives():
    assert with_region(f"{__name__}:DRIFT", {}).filters
    assert with_region(f"{__name__}:SAMPLER", {"bypass_mode": True}).filters
    with pytest.raises(ValueError, match="rollout_rs"):
        with_region(f"{__name__}:MISMATCH", {})


def test_under_torch_compile():
    data = data_of(9)
    objective = dataclasses.replace(OBJECTIVES["grpo"], filter=(opsm(0.02), *rollout_rs("seq_max_k3", 0.1)))
    want, got = policy_loss(objective=objective, **data)[0], compiled()(objective=objective, **data)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
