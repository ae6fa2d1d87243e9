"""What pruning must not do in silence: remember NaN, let unscored completions count, or keep a gradient it cannot keep."""

import itertools
import math
from functools import partial

import pytest
import torch

from bandpo import OBJECTIVES, Clip, Objective, group_advantages, policy_loss
from bandpo.experimental import clip_cov
from bandpo.selection import Informative, Pruning, check_nothing_lost
from bandpo.surrogates import kl_penalty, traits

nan = math.nan


def test_one_nan_does_not_switch_prompt_pruning_off():
    prune = Pruning(prompts=0.5)
    keys = [f"q{i}" for i in range(8)]
    a = torch.tensor([[0.0, 0.0]] * 4 + [[1.0, -1.0]] * 4)
    prune.update(keys, a)
    poisoned = Pruning(prompts=0.5)
    poisoned.update(keys, a)
    poisoned.update([keys[7], "new"], torch.tensor([[nan, nan], [nan, nan]]))
    assert poisoned.history == prune.history  # a prompt without a score keeps what was known of it
    for one in (prune, poisoned):
        kept = one.select_prompts(keys, generator=torch.Generator().manual_seed(0)).keep
        assert kept[4:].all() and kept[:4].sum() == 2
    assert poisoned.select_prompts(["new"]).keep.all()


@pytest.mark.parametrize("bad", [nan, math.inf, -math.inf])
def test_a_checkpoint_that_holds_nan_is_read_as_unknown(bad):
    prune = Pruning(prompts=0.5)
    prune.load_state_dict({"history": {"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0, "e": bad}})
    found = prune.select_prompts(list("abcde"), generator=torch.Generator().manual_seed(0))
    assert found.keep[2:].all() and found.keep[:2].sum() == 1


def test_unscored_completions_say_nothing_of_their_prompt():
    prune = Pruning()
    rewards = torch.tensor([[1.0, nan, 0.0, nan], [nan, nan, nan, nan]])
    a = group_advantages(rewards.flatten(), 4, kind="mean").view(2, 4)
    prune.update(["some", "none"], a, rewards)
    assert prune.history == {"some": 0.5}
    prune.update(["some"], torch.tensor([[nan, 2.0, nan, -1.0]]))
    assert prune.history == {"some": 1.5}


def test_unscored_completions_move_no_mean_of_a_group():
    rewards = torch.tensor([[3.0, 0.0, 1.0, 2.0, nan, nan, nan]])
    a = torch.tensor([[2.0, -1.0, 0.9, -1.2, 0.0, 0.0, 0.0]])  # mean |A| of the scored ones 1.275; of all 0.73
    found = Pruning(completions=0.5, zeros=False)(rewards, a, generator=torch.Generator().manual_seed(0))
    assert (found.dropping > 0).tolist() == [[False, True, True, True, False, False, False]]
    assert found.keep[0, 4:].all()
    dropped = Pruning(completions=0.5)(rewards, a, generator=torch.Generator().manual_seed(0))
    assert not dropped.keep[0, 4:].any() and torch.equal(dropped.keep[0, :4], found.keep[0, :4])
    bad = Pruning(completions=0.5)(
        rewards, a.masked_fill(rewards.isnan(), nan), generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(bad.keep, dropped.keep) and bad.weight.isfinite().all()


def test_shapes_of_rewards_and_advantages_are_one():
    with pytest.raises(ValueError, match=r"rewards \(1, 3\) and advantages \(1, 4\)"):
        Pruning()(torch.ones(1, 3), torch.ones(1, 4))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("options", [{"prompts": 0.5}, {"completions": 0.5}, {"completions": 0.5, "zeros": False}])
def test_objectives_that_pruning_cannot_keep_are_refused(name, options):
    objective, prune = OBJECTIVES[name], Pruning(**options)
    if name in ("bapo", "clip-cov", "kl-cov", "m2po"):
        with pytest.raises(ValueError, match=f"pruning with objective '{name}'.*looks at the whole batch"):
            prune.check(objective)
    elif name in ("ppo-kl", "quatro-reading", "dro", "pmd-mean", "troll") and options == {"completions": 0.5}:
        with pytest.raises(ValueError, match=f"advantage 0.*objective '{name}' has a gradient there.*zeros=False"):
            prune.check(objective)
    elif objective.kl_coef and options == {"completions": 0.5}:
        with pytest.raises(ValueError, match=r"the KL term \(kl_coef=0.001\) has a gradient there.*zeros=False"):
            prune.check(objective)
    else:
        prune.check(objective)


def test_wrapped_ones_too_and_a_kl_term():
    for surrogate in (partial(clip_cov, share=0.1), traits("of_batch")(lambda x, a, b: x * a.mean())):
        with pytest.raises(ValueError, match="looks at the whole batch"):
            Pruning(prompts=0.1).check(Objective(bounds=Clip(), surrogate=surrogate))
    with pytest.raises(ValueError, match=r"has a gradient there.*zeros=False"):
        Pruning(completions=0.1).check(Objective(bounds=Clip(), surrogate=partial(kl_penalty, beta=0.1)))
    with pytest.raises(ValueError, match=r"the KL term \(kl_coef=0.1\) has a gradient there"):
        Pruning(completions=0.5).check(OBJECTIVES["grpo"], kl_coef=0.1)
    Pruning(completions=0.5, zeros=False).check(OBJECTIVES["grpo"], kl_coef=0.1)
    Pruning().check(OBJECTIVES["clip-cov"])  # nothing is pruned
    with pytest.raises(ValueError, match="keep these groups"):
        check_nothing_lost(OBJECTIVES["ppo-kl"], fix="keep these groups")
    check_nothing_lost(OBJECTIVES["bandpo-kl"], fix="")


def gradient_of(objective, x, old, a, rows, weight, kl_coef=0.0):
    loss, _ = policy_loss(
        logprobs=x[rows], old_logprobs=old[rows], advantages=a[rows], mask=torch.ones(len(rows), x.shape[1]),
        objective=objective, normalizer=float(x.numel()), sample_weight=weight, ref_logprobs=old[rows] - 0.2, kl_coef=kl_coef,
    )  # fmt: skip
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize(("name", "kl_coef"), [("ppo-kl", 0.0), ("dapo", 0.1), ("dapo", 0.0)])
def test_what_is_refused_is_biased_and_what_is_not_is_not(name, kl_coef):
    """All outcomes of one group of six, of which two have advantage 0."""
    g = torch.Generator().manual_seed(1)
    a = torch.tensor([1.5, -0.2, 0.0, 0.3, -1.4, 0.0], dtype=torch.float64)
    x = (-2 + torch.randn(6, 3, generator=g, dtype=torch.float64)).clamp(max=-0.1).requires_grad_()
    old = x.detach() - 0.1
    full = gradient_of(name, x, old, a, torch.arange(6), None, kl_coef)
    for zeros in (True, False):
        prune = Pruning(completions=0.5, zeros=zeros)
        low = (a.abs() < a.abs().mean()) & ~((a == 0) & zeros)
        count = int(0.5 * low.sum())
        mean, outcomes = 0.0, list(itertools.combinations(low.nonzero().flatten().tolist(), count))
        for dropped in outcomes:
            kept = [i for i in range(6) if i not in dropped and not (zeros and a[i] == 0)]
            weight = torch.tensor(
                [1 / (1 - count / low.sum().item()) if low[i] else 1.0 for i in kept], dtype=torch.float64
            )
            mean = mean + gradient_of(name, x, old, a, torch.tensor(kept), weight, kl_coef) / len(outcomes)
        bias = (mean - full).abs().max() / full.abs().max()
        try:
            prune.check(OBJECTIVES[name], kl_coef=kl_coef)
        except ValueError:
            assert bias > 0.01
        else:
            assert bias < 1e-12


def test_unscored_groups_are_not_informative():
    rewards = torch.tensor([[nan, 1.0, 1.0], [nan, 1.0, 0.0]])
    assert Informative()(rewards, torch.zeros(2, 3)).keep.tolist() == [[False] * 3, [True] * 3]
