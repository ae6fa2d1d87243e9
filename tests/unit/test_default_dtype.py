"""Nothing depends on torch's default dtype: every public function gives the same bits under each of them."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from bandpo import (
    DCPO,
    KL,
    OBJECTIVES,
    Band,
    Clip,
    FDivergence,
    aggregate,
    alpha,
    approx_kl,
    group_advantages,
    in_band,
    loss_normalizer,
    match_radius,
    pass_at_k,
    policy_loss,
    radius_for,
    ratio_bounds,
    token_logprobs,
)
from bandpo.bounds import table as _table
from bandpo.bounds.calibration import outside_fraction
from bandpo.bounds.regions import topk_divergence
from bandpo.divergences import DIVERGENCES, binary_divergence
from bandpo.doctor.batch import examine_batch
from bandpo.groups import group_signal, informative, kl_dual, soft_overlong
from bandpo.preference import (
    LINKS,
    PREFERENCES,
    HybridDesign,
    LayerProbe,
    Offline,
    OnPolicy,
    concentrability,
    estimate_concentrability,
    feature_coverage,
    first_wins,
    fit_pairs,
    kto_loss,
    linear_softmax,
    mad_coverage,
    pair_loss,
    pool_hidden,
    preference_confidence,
    preferential_g_optimal,
    rerank,
    tabular_optimum,
)
from bandpo.selection import Informative, Pruning, effective_sample_size, packed_logprobs, packing_error, stratified
from bandpo.surrogates.corrections import TIS, IcePop
from bandpo.terms import gradient_weight, sequence_log_ratio
from bandpo.testing import check_bounds, check_divergence, check_logprobs, check_surrogate

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
B, T, K = 6, 5, 4


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def logprobs(*shape, seed=0, dtype=torch.float32):
    return (-normal(*shape, seed=seed).abs() * 2 - 1e-3).to(dtype)


def bounds(dtype):
    logp = torch.cat(
        [logprobs(40, seed=1).double(), torch.tensor([0.0, -1e-9, -60.0, -math.inf], dtype=torch.float64)]
    ).to(dtype)
    found = []
    for divergence in (*DIVERGENCES.values(), alpha(0.3), alpha(2.0), FDivergence("own", lambda u: (u - 1).square())):
        found += [
            *ratio_bounds(logp, divergence, 0.05),
            *ratio_bounds(logp, divergence, (0.05, 0.3), log=True, max_ratio=9.0),
        ]
        found += [*ratio_bounds(logp, divergence, torch.full((), 0.05, dtype=torch.float64))]
        found += [
            in_band(logp * 0.1, logp, divergence, 0.05),
            in_band(logp * 0.1, logp, divergence, torch.full_like(logp, 0.05)),
        ]
        found += [binary_divergence(logp * 0.1, logp, divergence)]
    for region in (Band(KL, 0.05, relax=Clip()), Clip(0.2, 0.28), DCPO()):
        found += [*region(logp)]
    return found


def objective(name):
    o = OBJECTIVES[name]
    new, old, mu, ref = (logprobs(B, T, seed=i) for i in range(4))
    advantages = normal(B, seed=5)
    mask = normal(B, T, seed=6) > -1
    made = o.group_inputs(normal(B, seed=7), advantages, 3)
    top = {
        "topk_logprobs": logprobs(B, T, K, seed=8) - 2, "old_topk_logprobs": logprobs(B, T, K, seed=9) - 2,
        "sampled_in_topk": mask,
    }  # fmt: skip
    x = new.clone().requires_grad_()
    torch.manual_seed(0)
    loss, metrics = policy_loss(
        logprobs=x, old_logprobs=old, rollout_logprobs=mu, advantages=advantages, mask=mask, objective=o, ref_logprobs=ref,
        kl_coef=0.1, entropy=-old, extras={n: made[n] if n in made else top[n] for n in o.extras},
        max_length=9 if o.aggregation.endswith("norm") else None,
        sample_weight=advantages.abs() if not {"bapo", "clip-cov", "kl-cov"} & {name} else None,
        normalizer=3.5 if o.aggregation.startswith("seq") else None,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, x)
    weights = gradient_weight(
        o, torch.full((3,), 1.1, dtype=torch.float32), torch.full((3,), 0.5, dtype=torch.float32), -1.0,
        extras={n: x[:3, :1].detach() if n in made else (top[n][:3, :1]) for n in o.extras},
    ) if name not in ("clip-cov",) else loss  # fmt: skip
    return [loss, gradient, weights, *(metrics[k] for k in sorted(metrics))]


def groups():
    rewards = normal(12, seed=1).round()
    grid = rewards.view(-1, 4)
    generator = torch.Generator().manual_seed(0)
    prune = Pruning(prompts=0.5, completions=0.5)
    prune.update(["a", "b", "c"], grid)
    found = [group_advantages(rewards, 4, kind=k) for k in ("std", "mean", "leave-one-out")]
    found += [
        group_signal(grid),
        informative(rewards, 4),
        *kl_dual(grid),
        soft_overlong(torch.tensor([10, 18, 20]), max_length=20, buffer=4),
    ]
    for mode in ("fixed_count", "bernoulli", "topk_biased"):
        found += [*stratified(grid, grid < 0, 0.5, mode=mode, generator=generator)]
        found += [*Pruning(completions=0.5, mode=mode)(grid, grid, generator=generator)]
    found += [*prune.select_prompts(["a", "b", "d"], generator=generator), *Informative()(grid, grid)]
    found += [torch.tensor(list(prune.history.values()), dtype=torch.float64), effective_sample_size(grid.abs())]
    found += [TIS()(grid, grid > 0), IcePop(level="sequence")(grid, grid > 0), pass_at_k(8, torch.tensor([0, 1, 8]), 4)]
    for a in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"):
        found += [aggregate(grid, grid > 0, a), loss_normalizer(grid > 0, a)]
    return [*found, sequence_log_ratio(grid, grid > 0), approx_kl(grid)]


def preference():
    new, ref = [logprobs(B, seed=i) for i in range(2)], [logprobs(B, seed=i) for i in range(2, 4)]
    lengths, gap = torch.arange(1, B + 1), normal(B, seed=5)
    found = []
    for o in PREFERENCES.values():
        x, y = (v.clone().requires_grad_() for v in new)
        needs_gap = o.target == "squared" or (o.target == "soft" and not o.label_smoothing)
        loss, metrics = pair_loss(
            chosen_logprobs=x, rejected_logprobs=y, objective=o,
            ref_chosen_logprobs=None if o.reference == "none" else ref[0],
            ref_rejected_logprobs=None if o.reference == "none" else ref[1],
            chosen_lengths=lengths if o.length == "mean" else None, rejected_lengths=lengths if o.length == "mean" else None,
            reward_gap=gap if needs_gap else None,
        )  # fmt: skip
        found += [loss, *torch.autograd.grad(loss.sum(), (x, y)), *(metrics[k] for k in sorted(metrics))]
    for link in LINKS.values():
        found += [
            link(new[0] - ref[0]),
            link.inverse_log(gap),
            tabular_optimum(gap, ref[0].log_softmax(-1), beta=0.3, link=link),
        ]
    x = (new[0] - ref[0]).requires_grad_()
    z = torch.zeros((), dtype=torch.float32)
    kto = kto_loss(x, gap > 0, z)
    found += [
        kto,
        *torch.autograd.grad(kto.sum(), x),
        preference_confidence(gap, -gap),
        preference_confidence(gap, -gap, level="pair"),
    ]
    features = normal(2, 3, 2, seed=6, dtype=torch.float64)
    prompts = torch.tensor([0.25, 0.75], dtype=torch.float64)
    policy = normal(2, 3, seed=7, dtype=torch.float64).softmax(-1)
    design = preferential_g_optimal(features)
    found += [
        *design,
        *preferential_g_optimal(features.float(), prompts="uniform"),
        feature_coverage(policy, design.actions, features, prompts),
    ]
    found += [mad_coverage(policy, design.actions, features.permute(2, 0, 1), prompts)]
    for pairing in ("iid_conditional", "same_component"):
        sampler = HybridDesign(prompts, design, pairing=pairing)
        found += [*sampler(policy, 5, torch.Generator().manual_seed(0))]
    for sampler in (OnPolicy(prompts), Offline(prompts, policy)):
        found += [*sampler(policy, 5, torch.Generator().manual_seed(0))]
    found += [
        first_wins(gap, generator=torch.Generator().manual_seed(0)),
        concentrability(policy.log(), policy.flip(0).log()),
    ]
    found += [*estimate_concentrability(gap), linear_softmax(features[0, 0], features, policy.log())]
    found += [fit_pairs(features[0], policy[0], policy[1], beta=0.1, radius=1.0), *rerank(gap.view(2, 3))]
    hidden = normal(B, 3, K, seed=8)
    probe = LayerProbe(3, K)
    found += [probe.weight, probe.bias, probe.vote, probe(hidden), probe.loss(hidden, -hidden)]
    probe.fit(hidden, -hidden + normal(B, 3, K, seed=9), epochs=2)
    found += [
        probe.weight,
        pool_hidden([hidden, -hidden], torch.ones(B, 3, dtype=torch.bool), "mean"),
        pool_hidden([hidden], torch.ones(B, 3)),
    ]
    return found


def others():
    x, logp = normal(200, seed=1) * 0.3, logprobs(200, seed=2)
    batch = {"log_ratio": x, "old_logprobs": logp, "advantages": normal(200, seed=3)}
    found: list[object] = [radius_for("kl", 0.1, batch), outside_fraction(Clip(0.2), batch)]
    for by in ("max_shift", "upper@0.1", "lower@0.5"):
        found += [match_radius("tv", like=Band(KL, 0.05), by=by)]
    found += [match_radius("js", like=Clip(0.2), by="outside_fraction", batch=batch)]
    saved = {"logprobs": (logp + x).clamp_max(0), "old_logprobs": logp, "advantages": normal(200, seed=3)}
    found += [examine_batch({k: v.view(10, 20) for k, v in saved.items()})]
    hidden, weight = normal(7, 6, seed=1).requires_grad_(), normal(11, 6, seed=2).requires_grad_()
    out = token_logprobs(hidden, weight, torch.arange(7), entropy=True, top_k=3, temperature=0.7, chunk_size=3)
    found += [*out, *torch.autograd.grad((out.logprobs + out.entropy).sum(), (hidden, weight))]
    ids, mask = torch.tensor([[1, 2, 3], [0, 3, 1]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    table = normal(4, 4, seed=3)
    found += [packed_logprobs(lambda input_ids, position_ids: table[input_ids], ids, mask, capacity=5)]
    found += [packing_error(lambda x: table[x], lambda packed: table[packed.input_ids], torch.arange(4))[1]]
    found += [topk_divergence(
        KL, logprobs=logprobs(3), old_logprobs=logprobs(3, seed=1), topk_logprobs=logprobs(3, K, seed=2) - 2,
        old_topk_logprobs=logprobs(3, K, seed=3) - 2, sampled_in_topk=torch.tensor([True, False, True]),
    )]  # fmt: skip
    check_divergence(FDivergence("own", lambda u: (u - 1).square()))
    check_bounds(Band())
    from bandpo.surrogates import clip

    check_surrogate(clip)
    check_logprobs(logp)
    return found


CASES: dict[str, Callable[[], list[object]]] = {
    **{f"bounds-{str(d)[6:]}": (lambda d=d: bounds(d)) for d in DTYPES},
    **{f"objective-{name}": (lambda name=name: objective(name)) for name in OBJECTIVES},
    "groups": groups, "preference": preference, "others": others,
}  # fmt: skip


def bits(values):
    return [(v.dtype, v.detach().clone()) if isinstance(v, torch.Tensor) else v for v in values]


def equal(a, b):
    if isinstance(a, tuple) and isinstance(a[0], torch.dtype):
        return (
            a[0] == b[0]
            and a[1].shape == b[1].shape
            and torch.equal(a[1].nan_to_num(nan=7e7), b[1].nan_to_num(nan=7e7))
            and torch.equal(a[1].isnan(), b[1].isnan())
        )
    return a == b


@pytest.mark.parametrize("case", CASES)
def test_the_default_dtype_changes_no_bit(case):
    before, want = torch.get_default_dtype(), None
    try:
        for dtype in DTYPES:
            torch.set_default_dtype(dtype)
            _table._cached_table.cache_clear()  # tables are made under the default dtype, too
            got = bits(CASES[case]())
            want = got if want is None else want
            assert len(got) == len(want)
            wrong = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not equal(a, b)]
            assert not wrong, (dtype, wrong, [(got[i], want[i]) for i in wrong][:2])
    finally:
        torch.set_default_dtype(before)
        _table._cached_table.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_importing_under_another_default_dtype_changes_nothing(dtype):
    code = f"""
import torch
torch.set_default_dtype(torch.{dtype})
import bandpo
from bandpo import *
from bandpo.divergences import DIVERGENCES
logp = torch.tensor([-0.1, -2.0, -9.0], dtype=torch.float32)
print([d.recession for d in DIVERGENCES.values()], [ratio_bounds(logp, d, 0.05) for d in (bandpo.KL, bandpo.alpha(0.3))])
"""
    runs = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, code.replace(f"torch.{dtype})", "torch.float32)"))
    ]
    assert runs[0].replace(f", dtype=torch.{dtype}", "").replace(", dtype=torch.float32", "") == runs[1].replace(
        ", dtype=torch.float32", ""
    )
