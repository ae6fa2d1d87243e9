"""The lab's loop: paired, deterministic, resumable, and the loss of `policy_loss`."""

import dataclasses

import pytest
import torch

from bandpo import OBJECTIVES, Clip, Objective, policy_loss
from bandpo._system.errors import RunError
from bandpo.lab.comparison import warmup
from bandpo.lab.comparison.loop import Loop, Run, Setting
from bandpo.lab.comparison.problems import PROBLEMS, Problem, one_by_one
from bandpo.lab.comparison.stack import Stack
from bandpo.lab.comparison.warmup import Checkpoint
from bandpo.surrogates.filters import SequenceFilter
from bandpo.toy.models import build_llama

TOP_K = [name for name, objective in OBJECTIVES.items() if objective.top_k is not None]


def tiny():
    """Say the prompt's first letter; the demonstrations are right in a third of the cases."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 9, (200, 2), generator=g)
    said = torch.where(torch.rand(200, generator=g) < 0.34, prompts[:, 0], torch.randint(3, 9, (200,), generator=g))
    demonstrations = torch.cat([prompts, said.unsqueeze(1), torch.ones(200, 1, dtype=torch.int64)], 1)
    return Problem(
        "tiny",
        "",
        prompts[:150],
        prompts[150:],
        demonstrations,
        3,
        one_by_one(lambda p, c: float(c[:1] == p[:1])),
        str,
        200,
    )


@pytest.fixture(autouse=True)
def problem(monkeypatch):
    made = tiny()
    monkeypatch.setattr("bandpo.lab.comparison.loop.PROBLEMS", {**PROBLEMS, "tiny": lambda: made})
    monkeypatch.setattr("bandpo.lab.comparison.warmup.PROBLEMS", {**PROBLEMS, "tiny": lambda: made})


def setting(**changes):
    small = {"updates": 6, "prompts": 8, "group": 4, "hidden_size": 32, "layers": 1, "eval_samples": 4}
    return Setting(**{"problem": "tiny", **small, **changes})


def runs(*names, seeds=(0, 1), rate=3e-3):
    return [Run(OBJECTIVES[n], rate, s, warm_up=s) for n in names for s in seeds]


def weights(loop):
    return torch.cat([w.detach().flatten(1) for w in loop.stack.weights.values()], 1)


def test_same_seed_same_run_bit_for_bit_and_pairs_start_alike():
    first, second = (Loop(setting(), runs("grpo", "bandpo-kl")) for _ in range(2))
    a, b = first.train(), second.train()
    assert torch.equal(weights(first), weights(second))
    assert [dataclasses.asdict(r) for r in a] == [dataclasses.asdict(r) for r in b]
    assert a[0].reward[0] == a[2].reward[0] and a[1].reward[0] == a[3].reward[0]  # paired by seed
    assert a[0].reward[0] != a[1].reward[0]
    assert a[0].before == a[2].before


def test_resume_is_bit_exact():
    for lag in (0, 2):
        shared = setting(lag=lag)
        whole = Loop(shared, runs("bandpo-kl"))
        results = whole.train()
        half = Loop(shared, runs("bandpo-kl"))
        half._evaluate("before")
        for _ in range(3):
            half.update()
        resumed = Loop(shared, runs("bandpo-kl"))
        resumed.load_state_dict(half.state_dict())
        again = resumed.train()
        assert torch.equal(weights(whole), weights(resumed))
        assert [dataclasses.asdict(r) for r in results] == [dataclasses.asdict(r) for r in again]


@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e3, 0.5)])
def test_an_adaptive_penalty_is_the_penalty_with_beta_changed_by_hand(target, factor):
    """Far from its target, PPO's rule doubles or halves β after each rollout."""
    base = OBJECTIVES["ppo-kl"]
    adaptive = [Run(base, 3e-3, s, warm_up=s, kl_target=target) for s in (0, 1)]
    loop, by_hand = Loop(setting(), adaptive), Loop(setting(), runs("ppo-kl"))
    constant = Loop(setting(), runs("ppo-kl"))
    for update in range(4):
        by_hand.runs = [dataclasses.replace(r, objective=base.with_penalty(factor**update)) for r in by_hand.runs]
        for each in (loop, by_hand, constant):
            each.update()
    assert torch.equal(weights(loop), weights(by_hand))
    assert not torch.equal(weights(loop), weights(constant))
    assert [p.rule.value for p in loop.penalties] == [factor**4] * 2


def test_an_adaptive_penalty_follows_the_measured_kl_and_resumes():
    made = [Run(OBJECTIVES["ppo-kl"], 1e-2, 0, kl_target=0.002), *runs("grpo", seeds=(0,))]
    loop = Loop(setting(updates=8), made)
    seen, measured = [], []
    inner = loop.penalties[0].rule.update
    loop.penalties[0].rule.update = lambda kl: measured.append(kl) or inner(kl)
    for _ in range(4):
        loop.update()
        seen.append(loop.penalties[0].rule.value)
    before = 1.0
    for kl, beta in zip(measured, seen, strict=True):
        assert kl > 0
        assert beta == before * (2 if kl > 0.003 else 0.5 if kl < 0.002 / 1.5 else 1)
        before = beta
    resumed = Loop(setting(updates=8), made)
    resumed.load_state_dict(loop.state_dict())
    for each in (loop, resumed):
        each.update()
    assert torch.equal(weights(loop), weights(resumed))
    assert loop.penalties[0].rule.value == resumed.penalties[0].rule.value
    with pytest.raises(ValueError, match=r"'grpo' has no KL penalty for kl_target=0\.1"):
        Loop(setting(), [Run(OBJECTIVES["grpo"], 1e-3, kl_target=0.1)])


def test_a_run_is_the_same_alone_and_in_a_stack():
    together = Loop(setting(), runs("grpo", "no-clip")).train()
    alone = Loop(setting(), runs("no-clip", seeds=(1,))).train()
    assert alone[0].reward[:2] == together[3].reward[:2]
    assert alone[0].after["mean@4"] == pytest.approx(together[3].after["mean@4"], abs=0.1)  # float32, six updates on


FILTERED = dataclasses.replace(
    OBJECTIVES["dapo"],
    name="filtered",
    filter=SequenceFilter("k3", "token", high=0.05, policies="policy/old", counts="kept"),
)


@pytest.mark.parametrize("objective", [OBJECTIVES["bandpo-kl"], OBJECTIVES["bandpo-kl-paper"], FILTERED])
def test_one_step_is_policy_loss(objective):
    name = objective.name
    loop = Loop(setting(), [Run(objective, 3e-3, 0, warm_up=0)])
    start = weights(loop).clone()
    loop.update()  # off policy from here on
    prompts = loop._prompts()
    rollout = loop._rollout(prompts)
    advantages = [torch.randn(32, generator=torch.Generator().manual_seed(5))]
    seen = []
    loop.optimizer.step = seen.append
    part = torch.randperm(32, generator=torch.Generator().manual_seed(6))[:16].unsqueeze(0)
    with torch.no_grad():
        for w in loop.stack.weights.values():
            w += 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(7))
    loop._step(prompts, rollout, advantages, [{}], part, last=False)
    chosen = part[0]
    new, reference = loop.stack.logprobs(prompts[:, chosen], rollout.tokens[:, chosen], 1.0), None
    if name == "bandpo-kl-paper":
        first = Loop(setting(), [Run(objective, 3e-3, 0, warm_up=0)])  # the model before training
        assert torch.equal(weights(first), start)
        reference = first.stack.logprobs(prompts[:, chosen], rollout.tokens[:, chosen], 1.0)[0].detach()
    loss, metrics = policy_loss(
        logprobs=new[0],
        old_logprobs=rollout.logprobs[0, chosen],
        advantages=advantages[0][chosen],
        mask=rollout.mask[0, chosen],
        objective=objective,
        ref_logprobs=reference,
        kl_coef=0.001 if name == "bandpo-kl-paper" else None,
    )
    assert name != "filtered" or 0.1 < metrics["filter/kept_fraction"] < 0.9
    want = torch.autograd.grad(loss, list(loop.stack.weights.values()))
    for a, b in zip(seen[0], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_stale_rollouts_come_from_older_weights():
    loop = Loop(setting(lag=2), runs("grpo", seeds=(0,)))
    start = weights(loop).clone()
    for expected_age in (0, 1, 2, 2):
        prompts = loop._prompts()
        loop._rollout(prompts)
        assert len(loop._past) == expected_age + 1
        loop.optimizer.step([torch.ones_like(w) for w in loop.stack.weights.values()])
    oldest = torch.cat([w.flatten(1) for w in loop._past[0].values()], 1)
    assert not torch.equal(oldest, start)
    assert not torch.equal(oldest, weights(loop))


def test_it_learns():
    shared = setting(updates=40, prompts=16)
    for result in Loop(shared, runs("bandpo-kl")).train():
        assert result.after["mean@4"] > result.before["mean@4"] + 0.2
        assert result.after["entropy"] < result.before["entropy"]
        assert len(result.reward) == len(result.entropy) == 40
        assert sum(result.tokens.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"problem": "chess"}, "chess.*countdown"),
        ({"group": 1}, "group"),
        ({"minibatches": 3}, "do not split into 3"),
        ({"lag": -1}, "lag"),
        ({"updates": 0}, "updates"),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(ValueError, match=words):
        setting(**changes)


def test_objectives_that_need_what_the_lab_does_not_have_are_refused():
    def bonus(log_ratio, advantages, bounds, *, bonus):
        return log_ratio.exp() * advantages + bonus

    with pytest.raises(ValueError, match=r"'mine' needs extras the lab does not have.*bonus"):
        Loop(setting(), [Run(Objective(bounds=Clip(), surrogate=bonus, name="mine"), 1e-3)])
    Loop(setting(updates=1), runs("quatro-reading", "etr-reading")).train()


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("lag", [0, 1])
def test_top_k_objectives_are_policy_loss_on_the_whole_distribution(name, lag):
    objective = OBJECTIVES[name]
    loop = Loop(setting(lag=lag), [Run(OBJECTIVES["grpo"], 3e-3), Run(objective, 3e-3)])
    loop.update()
    prompts = loop._prompts()
    rollout = loop._rollout(prompts)
    top = loop._top_tokens(prompts, rollout)
    assert list(top) == [1]  # the other run pays nothing
    sampler = loop._past[0] if lag else {n: w.detach().clone() for n, w in loop.stack.weights.items()}
    with torch.no_grad():
        for w in loop.stack.weights.values():
            w += 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(7))
    advantages = [torch.randn(32, generator=torch.Generator().manual_seed(5))] * 2
    seen = []
    loop.optimizer.step = seen.append
    part = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(6))[:16]] * 2)
    loop._step(prompts, rollout, advantages, [{}, {}], part, last=True, top=top)
    # from the logits of a forward pass, by the sampled tokens and the K that the sampler ranks highest
    chosen, ids = part[1], torch.cat([prompts, rollout.tokens], -1)[..., :-1]
    tokens = rollout.tokens[1, chosen]
    new = loop.stack.logits(ids[:, chosen], 3)[1].log_softmax(-1)
    old = Stack(sampler, loop.stack.shape).logits(ids[:, chosen], 3)[1].log_softmax(-1).detach()
    order = old.argsort(-1, descending=True)[..., : objective.top_k]
    extras = {
        "topk_logprobs": new.gather(-1, order), "old_topk_logprobs": old.gather(-1, order),
        "sampled_in_topk": (order == tokens.unsqueeze(-1)).any(-1),
    }  # fmt: skip
    loss, _ = policy_loss(
        logprobs=new.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), old_logprobs=rollout.logprobs[1, chosen],
        rollout_logprobs=rollout.logprobs[1, chosen], advantages=advantages[1][chosen], mask=rollout.mask[1, chosen],
        objective=objective, extras=extras,
        max_length=3 if objective.aggregation == "seq-mean-token-sum-norm" else None,
    )  # fmt: skip
    want = torch.autograd.grad(loss, list(loop.stack.weights.values()))
    for a, b in zip(seen[0], want, strict=True):
        torch.testing.assert_close(a[1], b[1], rtol=1e-4, atol=1e-7)
    assert any(w[1].abs().max() > 0 for w in want)


@pytest.mark.parametrize("name", TOP_K)
def test_a_top_k_objective_trains_beside_others(name):
    loop = Loop(setting(), runs("grpo", name))
    start = weights(loop)
    results = loop.train()
    assert weights(loop).isfinite().all() and (weights(loop) != start).any(1).all()
    assert results[0].reward[0] == results[2].reward[0]  # paired with the other run of its seed


def unlearned(monkeypatch, **changes):
    """The tiny problem with a warm-up of five steps, under a name whose checkpoints no other test has."""
    made = dataclasses.replace(tiny(), name="short", warm_up_steps=5, **changes)
    for module in ("loop", "warmup"):
        monkeypatch.setattr(f"bandpo.lab.comparison.{module}.PROBLEMS", {**PROBLEMS, "short": lambda: made})
    return [Checkpoint("short", seed, hidden_size=16, layers=1) for seed in (0, 1)]


def test_a_warm_up_without_the_profile_is_made_again_from_other_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path))
    checkpoints = unlearned(monkeypatch, near_certain=0.6)
    answers = [[0.7, 0.2], [0.6]]  # the second one fails once
    starts = []
    fresh = warmup._fresh
    monkeypatch.setattr(warmup, "near_certain", lambda stack, problem: answers.pop(0))
    monkeypatch.setattr(warmup, "_fresh", lambda c: (starts.append(c.seed), fresh(c))[1])
    found = warmup.warmed_up(checkpoints)
    assert starts[:3] == [0, 1, 1 + warmup._START_STRIDE] and not answers
    again = warmup.warmed_up(checkpoints)
    assert all(torch.equal(w, again.weights[name]) for name, w in found.weights.items())


def test_a_warm_up_that_never_learns_ends_with_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path))
    checkpoints = unlearned(monkeypatch, near_certain=1.0)
    with pytest.raises(RunError, match=r"\[0, 1\] of short do not have its token profile after 4 starts"):
        warmup.warmed_up(checkpoints)
    given = [dataclasses.replace(c, steps=3) for c in checkpoints]  # who gives the steps takes what comes
    assert warmup.warmed_up(given).runs == 2


def test_near_certain_tokens_are_counted_in_completions_without_padding(monkeypatch):
    problem = tiny()
    stack = Stack.load([build_llama(98, 0, 1, hidden_size=16, layers=1, seed=0)])
    rows = problem.demonstrations
    p = stack.logprobs(rows[:, :2].unsqueeze(0), rows[:, 2:].unsqueeze(0)).exp()
    monkeypatch.setattr(warmup, "PROB_EDGES", (p.median().item(),))
    assert warmup.near_certain(stack, problem)[0] == pytest.approx(0.5, abs=0.01)
