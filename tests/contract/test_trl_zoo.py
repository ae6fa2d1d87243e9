"""Every named objective in TRL: it trains, it is `policy_loss`, and where TRL has it too, it is TRL's."""

import dataclasses
import json
import math

import pytest
import torch
from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from bandpo import KL, OBJECTIVES, TV, Band, Clip, Objective, policy_loss
from bandpo.bounds import BySign, Intersection, Union
from bandpo.groups import group_signal
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.integrations.trl.rollout import PREFIX, top_logprobs
from bandpo.integrations.trl.strategy import HostComputes, WeCompute
from bandpo.projection import project
from bandpo.surrogates import Projected, gamma_weighted
from trl_runs import (
    band_trainer,
    loss_and_gradient,
    named,
    reward,
    rollout,
    saved,
    settings,
    token_logprobs,
    trl_trainer,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of",
    "ignore:Objective .* corrects for a sampler", "ignore:.*experimental", "ignore:The loss has a KL to the reference",
)  # fmt: skip


def run_of(make_model, tokenizer, prompts):
    def make(folder, *, reward_funcs=reward, **changes):
        return BandGRPOTrainer(
            model=make_model(), reward_funcs=reward_funcs, args=BandGRPOConfig(**settings(folder, **changes)),
            train_dataset=prompts, processing_class=tokenizer,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_five_steps(name, make_model, tokenizer, prompts, tmp_path):
    make_model = saved(make_model, tmp_path) if OBJECTIVES[name].kl_coef else make_model
    trainer = named(tmp_path, make_model, tokenizer, prompts, name, max_steps=5)
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 5
    assert all(math.isfinite(row["loss"]) and row["nonfinite_fraction"] == 0 for row in rows)
    assert after.isfinite().all() and not torch.equal(before, after)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_in_trl_it_is_policy_loss(name, make_model, tokenizer, prompts, tmp_path):
    source = saved(make_model, tmp_path) if OBJECTIVES[name].kl_coef else make_model
    trainer = named(tmp_path, source, tokenizer, prompts, name)
    inputs = rollout(tokenizer)
    objective = trainer.objective
    g = torch.Generator().manual_seed(3)
    extras = {}
    if objective.group_stats is not None:
        extras = objective.group_inputs(torch.rand(8, generator=g), inputs["advantages"], 4)
        inputs |= {PREFIX + k: v for k, v in extras.items()}
    if objective.anchor == "rollout" or objective.correction is not None:
        noise = 0.5 * torch.randn(8, 6, generator=g)
        inputs["sampling_per_token_logps"] = (inputs["old_per_token_logps"] + noise).clamp(max=-0.01)
    if "topk_logprobs" in objective.extras:
        other = make_model(seed=1)
        inputs[f"{PREFIX}top_logprobs"], ids = top_logprobs(trainer, other, inputs, None, objective.top_k)
        inputs[f"{PREFIX}top_ids"] = ids
        extras = {
            "old_topk_logprobs": inputs[f"{PREFIX}top_logprobs"], "sampled_in_topk": (
                ids == inputs["completion_ids"].unsqueeze(-1)).any(-1),
            "topk_logprobs": logits_of(trainer.model, inputs).log_softmax(-1).gather(-1, ids),
        }  # fmt: skip
    torch.manual_seed(0)  # Clip-Cov draws
    loss, gradient, metrics = loss_and_gradient(trainer, inputs)
    trainer.model.zero_grad()
    torch.manual_seed(0)
    want, ours = policy_loss(
        logprobs=token_logprobs(trainer.model, inputs), old_logprobs=inputs["old_per_token_logps"],
        advantages=inputs["advantages"], mask=inputs["completion_mask"], objective=objective, extras=extras,
        rollout_logprobs=inputs.get("sampling_per_token_logps"),
        ref_logprobs=inputs["ref_per_token_logps"] if objective.kl_coef else None,
        max_length=6 if objective.aggregation == "seq-mean-token-sum-norm" else None,
    )  # fmt: skip
    want.backward()
    want_gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    scale = want_gradient.abs().max().item()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-3, atol=1e-5 * scale)
    for key in ("kl/old_new", "ratio/mean", "nonfinite_fraction"):
        assert metrics[key] == pytest.approx(ours[key].item(), rel=1e-3, abs=1e-6)


REGIONS = {  # the region, and whether TRL computes its clip from our bounds
    "sequence": (Objective(bounds=Band(KL, 1e-4), ratio_level="sequence", aggregation="seq-mean-token-mean"), False),
    "product": (Objective(bounds=Band(KL, 0.05), ratio_level="product", aggregation="seq-mean-token-mean"), False),
    "intersection": (
        Objective(bounds=Intersection(Clip(0.3), Band(TV, 0.02)), aggregation="seq-mean-token-mean"),
        True,
    ),
    "signs": (Objective(bounds=Union(Clip(0.05), BySign(Band(), Clip(0.1))), aggregation="seq-mean-token-mean"), False),
}


@pytest.mark.parametrize("name", REGIONS)
def test_combined_regions_and_sequence_bands_are_policy_loss(name, make_model, tokenizer, prompts, tmp_path):
    objective, by_trl = REGIONS[name]
    options = {"loss_type": "grpo"} | ({"objective": "gspo"} if name == "sequence" else {})
    trainer = BandGRPOTrainer(
        model=make_model(), reward_funcs=reward, args=BandGRPOConfig(**settings(tmp_path, **options)),
        train_dataset=prompts, processing_class=tokenizer, objective=objective,
    )  # fmt: skip
    assert isinstance(trainer._strategy, HostComputes if by_trl else WeCompute)
    inputs = rollout(tokenizer)
    loss, gradient, metrics = loss_and_gradient(trainer, inputs)
    trainer.model.zero_grad()
    want, ours = policy_loss(
        logprobs=token_logprobs(trainer.model, inputs), old_logprobs=inputs["old_per_token_logps"],
        advantages=inputs["advantages"], mask=inputs["completion_mask"], objective=objective, metrics="full",
    )  # fmt: skip
    want.backward()
    want_gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-3, atol=1e-5 * want_gradient.abs().max().item())
    assert (ours["clip_fraction/any"] > 0) == (
        name != "product"
    )  # where p is that of the whole sequence, nothing is outside
    for key in ("outside_fraction/any", "band/upper_mean", "band/saturated_fraction"):
        assert metrics[key] == pytest.approx(ours[key].item(), rel=1e-3, abs=1e-6)


def logits_of(model, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return model(ids, attention_mask=mask).logits[:, 3:-1]


THEIRS = {
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    "luspo": {
        "loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3, "epsilon_high": 2.5e-3,
    },
    "vespo": {"loss_type": "vespo"},
}  # fmt: skip


def same_loss_and_gradient(theirs, ours, tokenizer):
    for seed in range(3):
        inputs = rollout(tokenizer, seed)
        want, got = loss_and_gradient(theirs, inputs), loss_and_gradient(ours, inputs)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
        scale = want[1].abs().max().item()
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("name", THEIRS)
def test_cispo_sapo_luspo_and_vespo_are_trl_s(name, make_model, tokenizer, prompts, tmp_path):
    theirs = trl_trainer(tmp_path, make_model, tokenizer, prompts, **THEIRS[name])
    ours = named(tmp_path, make_model, tokenizer, prompts, name)
    same_loss_and_gradient(theirs, ours, tokenizer)


@pytest.mark.parametrize("spread", [0.01, 0.3, 4.0])
def test_the_weights_of_vespo_are_trl_s(spread):
    """`get_gamma_weights` itself: near and far from on-policy, with holes, and log W past both ends of its range."""
    g = torch.Generator().manual_seed(5)
    x = spread * torch.randn(64, 9, generator=g, dtype=torch.float64)
    x[:4, 0], x[4:8, 0] = 30.0, -30.0
    a = torch.randn(64, 1, generator=g, dtype=torch.float64)
    valid = torch.rand(64, 9, generator=g) < 0.7
    want = GRPOTrainer.get_gamma_weights(a, x, valid.double(), None)
    ours = gamma_weighted(x, a, None, logprobs=torch.ones_like(x), mask=valid) / a
    torch.testing.assert_close(ours, want.expand_as(ours), rtol=1e-12, atol=1e-300)
    shifted = GRPOTrainer.get_gamma_weights(a, x, valid.double(), None, 1.5, 0.75, 4.0, 2.5)
    ours = gamma_weighted(
        x, a, None, logprobs=torch.ones_like(x), mask=valid, positive=(1.5, 0.75), negative=(4.0, 2.5)
    )
    torch.testing.assert_close(ours / a, shifted.expand_as(ours), rtol=1e-12, atol=1e-300)


def test_gmpo_is_trl_s(make_model, tokenizer, prompts, tmp_path):
    theirs = GMPOTrainer(
        model=make_model(), reward_funcs=reward, args=GMPOConfig(**settings(tmp_path), epsilon=0.4, epsilon_high=0.4),
        train_dataset=prompts, processing_class=tokenizer,
    )  # fmt: skip
    ours = named(tmp_path, make_model, tokenizer, prompts, "gmpo")
    same_loss_and_gradient(theirs, ours, tokenizer)


def generate(trainer, prompts, count):
    trainer.model.train()
    rows = [prompts[i] for i in range(count // 4) for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


def test_group_statistics_reach_their_rows(make_model, tokenizer, prompts, tmp_path):
    trainer = run_of(make_model, tokenizer, prompts)(tmp_path, objective="etr-reading")
    out = generate(trainer, prompts, 16)
    rewards = trainer.last_rewards
    want = group_signal(rewards.view(-1, 4)).expand(-1, 4).flatten()
    torch.testing.assert_close(out[f"{PREFIX}signal"], want.to(out["advantages"].dtype))
    assert want.unique().numel() > 1
    text = tokenizer.batch_decode(out["completion_ids"], skip_special_tokens=True)
    torch.testing.assert_close(torch.tensor(reward(None, text)), rewards.cpu(), check_dtype=False)


def test_top_logprobs_are_those_of_the_softmax(make_model, tokenizer, prompts, tmp_path):
    trainer = named(tmp_path, make_model, tokenizer, prompts, "dppo-topk-kl", temperature=0.7, divergence_top_k=5)
    inputs = rollout(tokenizer)
    values, ids = top_logprobs(trainer, trainer.model, inputs, None, 5)
    want = (logits_of(trainer.model, inputs) / 0.7).log_softmax(-1)
    torch.testing.assert_close(values, want.topk(5).values.detach(), rtol=1e-5, atol=1e-5)
    again, _ = top_logprobs(trainer, trainer.model, inputs, ids, 5)
    assert torch.equal(again, values)
    out = generate(trainer, prompts, 8)
    assert out[f"{PREFIX}top_ids"].shape == (*out["completion_ids"].shape, 5)


def off_policy(trainer, make_model, inputs, k=None):
    """The batch with old log-probs, sampled and top-K, of another model."""
    other = make_model(seed=1)
    values, ids = top_logprobs(trainer, other, inputs, None, k or trainer.objective.top_k)
    with torch.no_grad():
        logits = logits_of(other, inputs) / trainer.temperature
        old = logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return inputs | {f"{PREFIX}top_logprobs": values, f"{PREFIX}top_ids": ids, "old_per_token_logps": old}


def kl_to(old, logits):
    """KL(softmax(logits) || old) of each place, in float64 over the whole vocabulary."""
    new = logits.detach().double().log_softmax(-1)
    return (new.exp() * (new - old.double().log_softmax(-1))).sum(-1)


TROLL = [{}, {"packing": True}, {"gradient_checkpointing": True}, {"divergence_top_k": 5, "divergence": "kl"}]


@pytest.mark.parametrize("changes", TROLL, ids=str)
def test_troll_has_the_gradient_of_policy_loss_by_the_projection(changes, make_model, tokenizer, prompts, tmp_path):
    trainer = named(tmp_path, make_model, tokenizer, prompts, "troll", radius=0.02, temperature=0.8, **changes)
    inputs = off_policy(trainer, make_model, rollout(tokenizer))
    loss, gradient, metrics = loss_and_gradient(trainer, inputs)
    trainer.model.zero_grad()
    new = logits_of(trainer.model, inputs) / 0.8
    old = logits_of(make_model(seed=1), inputs).detach() / 0.8
    sampled = inputs["completion_ids"].unsqueeze(-1)
    order = old.argsort(-1, descending=True)[..., : trainer.objective.top_k]
    logp, old_logp = new.log_softmax(-1), old.log_softmax(-1)
    extras = {
        "topk_logprobs": logp.gather(-1, order), "old_topk_logprobs": old_logp.gather(-1, order),
        "sampled_in_topk": (order == sampled).any(-1),
    }  # fmt: skip
    valid = inputs["completion_mask"] != 0
    assert 0.2 < (kl_to(old, new)[valid] > 0.02).double().mean() < 0.8  # the projection acts on some tokens
    forward = {"direction": "forward"} if "divergence" in changes else {}
    assert trainer.objective.surrogate == Projected(0.02, changes.get("divergence_top_k", 64), **forward)
    want, _ = policy_loss(
        logprobs=logp.gather(-1, sampled).squeeze(-1), old_logprobs=old_logp.gather(-1, sampled).squeeze(-1),
        advantages=inputs["advantages"], mask=inputs["completion_mask"], objective=trainer.objective, extras=extras,
    )  # fmt: skip
    want.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert metrics["nonfinite_fraction"] == 0


def test_after_its_projection_no_position_of_troll_is_outside_of_the_ball(make_model, tokenizer, prompts, tmp_path):
    trainer = named(tmp_path, make_model, tokenizer, prompts, "troll", radius=0.02, max_steps=8, learning_rate=0.03)
    seen = []
    terms = trainer._strategy.terms

    def captured(model, logprobs, batch, given):
        old = batch[f"{PREFIX}top_logprobs"], batch[f"{PREFIX}top_ids"], batch["completion_mask"] != 0
        seen.append((*old, logits_of(model, batch).detach().log_softmax(-1)))
        return terms(model, logprobs, batch, given)

    trainer._strategy.terms = captured
    trainer.train()
    acted = 0.0
    for old, ids, valid, new in seen:
        # 64 of 98 tokens, and one for the rest
        whole = [torch.cat([x, (-x.exp().sum(-1, keepdim=True)).log1p()], -1) for x in (new.gather(-1, ids), old)]
        before = (whole[0].exp() * (whole[0] - whole[1])).sum(-1)
        q = project(*whole, 0.02)
        assert ((q.exp() * (q - whole[1])).sum(-1)[valid] <= 0.02 + 1e-6).all()  # float32
        inside = valid & (before < 0.0199)
        assert torch.equal(q[inside], whole[0][inside])
        acted = max(acted, (before > 0.02)[valid].float().mean().item())
    assert len(seen) == 8 and acted > 0.05


def half_dull(prompts, completions, **_):
    """Only prompts that begin with an even digit tell good from bad."""
    return [
        float(sum(map(ord, c)) % 2) if int(p[0]) % 2 == 0 else 1.0 for p, c in zip(prompts, completions, strict=True)
    ]


def test_dynamic_sampling_replaces_dull_groups(make_model, tokenizer, prompts, tmp_path):
    make = run_of(make_model, tokenizer, prompts)
    trainer = make(tmp_path, objective="dapo", dynamic_sampling=6, reward_funcs=half_dull, num_iterations=2)
    out = generate(trainer, prompts, 32)
    log = {k: v[-1] for k, v in trainer._metrics["train"].items() if k.startswith("dynamic_sampling")}
    assert log["dynamic_sampling/dull_before"] >= 0.5
    assert log["dynamic_sampling/dull_after"] < 0.2 and 1 <= log["dynamic_sampling/rounds"] <= 6
    groups = out["advantages"].view(-1, 4)
    assert (groups != 0).any(1).float().mean() > 0.8
    torch.testing.assert_close(groups.sum(1), torch.zeros(len(groups)), rtol=0, atol=1e-5)
    # every tensor of a row came along: scoring the merged rows anew gives their log-probs and rewards
    want = token_logprobs(trainer.model, out)
    valid = out["completion_mask"] != 0
    torch.testing.assert_close(out["old_per_token_logps"][valid], want.detach()[valid], rtol=1e-4, atol=1e-4)
    assert out["num_items_in_batch"] == valid.sum()
    texts = tokenizer.batch_decode(out["prompt_ids"], skip_special_tokens=True)
    completions = tokenizer.batch_decode(out["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor(half_dull(texts, completions)).view(-1, 4)
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(groups, centred / (rewards.std(1, keepdim=True) + 1e-4), rtol=1e-4, atol=1e-4)
    assert len({tuple(row.tolist()) for row in out["prompt_ids"]}) > 1
    # without signal anywhere it stops after its rounds and says so
    nothing = make(
        tmp_path, objective="dapo", dynamic_sampling=2, reward_funcs=lambda completions, **_: [1.0] * len(completions)
    )
    generate(nothing, prompts, 16)
    assert nothing._metrics["train"]["dynamic_sampling/dull_after"] == [1.0]
    assert nothing._metrics["train"]["dynamic_sampling/rounds"] == [2.0]


def test_radius_schedule_and_target(make_model, tokenizer, prompts, tmp_path):
    make = run_of(make_model, tokenizer, prompts)
    trainer = make(tmp_path, radius=0.1, radius_schedule="linear", radius_end=0.02, max_steps=4)
    trainer.train()
    seen = [row["band/radius"] for row in trainer.state.log_history if "band/radius" in row]
    assert seen == pytest.approx([0.1, 0.08, 0.06, 0.04])
    adaptive = make(tmp_path, radius=1e-4, radius_target="clip_fraction=0.01", max_steps=12, learning_rate=0.1)
    adaptive.train()
    seen = [row["band/radius"] for row in adaptive.state.log_history if "band/radius" in row]
    assert seen[0] == pytest.approx(1e-4) and seen[-1] == pytest.approx(1e-4 * 1.25**2)  # 12 steps are 3 rollouts of 4
    shrinks = make(tmp_path, radius=10.0, radius_target="divergence=1e-9", max_steps=8, learning_rate=0.1)
    shrinks.train()
    assert shrinks.state.log_history[-2]["band/radius"] == pytest.approx(8.0)


def test_the_penalty_of_ppo_kl_follows_its_target(make_model, tokenizer, prompts, tmp_path):
    """β doubles above 1.5 times the target and halves below the target / 1.5, by the logged KL of each rollout's steps."""
    make = run_of(make_model, tokenizer, prompts)
    common = {"objective": "ppo-kl", "max_steps": 16, "learning_rate": 0.1, "logging_steps": 1}
    rows = {}
    for target in (1e-9, 0.02, 1e3):
        trainer = make(tmp_path / str(target), kl_penalty_target=target, **common)
        trainer.train()
        rows[target] = [row for row in trainer.state.log_history if "band/kl_penalty" in row]
        betas = [row["band/kl_penalty"] for row in rows[target]]
        kls = [row["kl/old_new"] for row in rows[target]]
        assert len(betas) == 16
        for k in range(1, 4):  # 16 steps are 4 rollouts of 4
            kl = sum(kls[4 * k - 4 : 4 * k]) / 4  # rows of equally many tokens, up to cut completions
            last, now = betas[4 * k - 1], betas[4 * k]
            assert now in (last, 2 * last, last / 2)
            if kl > 1.6 * target:
                assert now == 2 * last
            elif kl < target / 1.6:
                assert now == last / 2
            elif target / 1.4 < kl < 1.4 * target:
                assert now == last
        assert betas[0:4] == [1.0] * 4
        assert trainer.objective.penalty == betas[-1]
    assert rows[1e-9][-1]["band/kl_penalty"] == 8 and rows[1e3][-1]["band/kl_penalty"] == 1 / 8
    with pytest.raises(ValueError, match="one optimiser step for each rollout"):
        make(tmp_path, objective="ppo-kl", kl_penalty_target=0.01, num_iterations=1, steps_per_generation=1)


def test_resume_is_bit_exact_with_an_adaptive_penalty(make_model, tokenizer, prompts, tmp_path):
    make = run_of(make_model, tokenizer, prompts)
    common = {
        "max_steps": 12, "save_strategy": "steps", "save_steps": 6, "learning_rate": 0.1, "objective": "ppo-kl",
        "kl_penalty_target": 1e-9,
    }  # fmt: skip
    whole = make(tmp_path / "whole", **common)
    whole.train()
    resumed = make(tmp_path / "resumed", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))  # within the second rollout
    a, b = (torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in (whole, resumed))
    assert torch.equal(a, b)
    betas = [[r["band/kl_penalty"] for r in t.state.log_history if "band/kl_penalty" in r] for t in (whole, resumed)]
    assert betas[0] == betas[1] == [1.0] * 4 + [2.0] * 4 + [4.0] * 4


def test_resume_is_bit_exact_with_a_moving_radius_and_refilled_groups(make_model, tokenizer, prompts, tmp_path):
    make = run_of(make_model, tokenizer, prompts)
    common = {
        "max_steps": 12, "save_strategy": "steps", "save_steps": 6, "learning_rate": 0.1, "dynamic_sampling": 2,
        "reward_funcs": half_dull, "radius_target": "clip_fraction=0.01",
    }  # fmt: skip
    whole = make(tmp_path / "whole", **common)
    whole.train()
    resumed = make(tmp_path / "resumed", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    a, b = (torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in (whole, resumed))
    assert torch.equal(a, b)
    radii = [[r["band/radius"] for r in t.state.log_history if "band/radius" in r] for t in (whole, resumed)]
    assert json.dumps(radii[0]) == json.dumps(radii[1])
    assert radii[0][-1] != radii[0][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "grpo", "radius_end": 0.1, "radius_schedule": "linear"}, "has no radius"),
        ({"radius_upper": 0.1, "radius_end": 0.1, "radius_schedule": "linear"}, r"has the radius \(0.05, 0.1\)"),
        ({"radius_end": 0.1}, "would be ignored"),
        ({"radius_schedule": "step", "radius_end": 0.1}, "step.*constant, linear, cosine"),
        ({"radius_target": "clip=0.1"}, "write outside_fraction=0.01"),
        ({"radius_target": "divergence=x"}, "write outside_fraction=0.01"),
        ({"radius_target": "divergence=0.1", "radius_end": 0.1}, "choose one"),
        ({"objective": "dppo-topk-kl", "radius_target": "divergence=0.1"}, "only a Band"),
        ({"objective": "kpop", "radius_target": "divergence=0.1"}, "only a Band"),
        ({"objective": "dppo-topk-kl", "max_ratio": 5.0}, "max_ratio=5.0 would be ignored"),
        ({"divergence_top_k": 5}, "divergence_top_k=5 would be ignored"),
        (
            {"objective": "troll", "radius_target": "outside_fraction=0.1"},
            "projects onto its ball; use a radius_schedule",
        ),
        ({"objective": "troll", "radius_upper": 0.1}, "radius_upper=0.1 would be ignored.*one radius"),
        ({"objective": "troll", "max_ratio": 5.0}, "max_ratio=5.0 would be ignored"),
        ({"objective": "troll", "epsilon": 0.1}, "epsilon=0.1 would be ignored"),
        ({"objective": "troll", "divergence": "tv"}, "divergence='tv'.*reverse_kl or kl"),
        ({"objective": "sapo", "epsilon": 0.1}, "epsilon=0.1 would be ignored.*has no interval"),
        (
            {"objective": "sapo", "sapo_temperature_pos": 5.0},
            "sapo_temperature_pos=5.0 would be ignored.*loss_type='sapo'",
        ),
        ({"objective": "vespo", "vespo_k_pos": 9.0}, "vespo_k_pos=9.0 would be ignored.*loss_type='vespo'"),
        ({"sapo_temperature_neg": 0.5}, "sapo_temperature_neg=0.5 would be ignored"),
        ({"dynamic_sampling": -1}, "dynamic_sampling"),
        ({"kl_penalty_target": 0.01}, "'bandpo-kl' has none; use objective='ppo-kl'"),
        ({"objective": "ppo-kl", "kl_penalty_target": 0.0}, "positive number of nats, got 0.0"),
        ({"objective": "ppo-kl", "kl_penalty_target": math.inf}, "positive number of nats, got inf"),
    ],
)
def test_config_refuses_what_would_be_ignored(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        BandGRPOConfig(**settings(tmp_path, **changes))


def test_config_moves_the_ball_of_top_k(tmp_path):
    made = BandGRPOConfig(
        **settings(tmp_path, objective="dppo-topk-tv", divergence="kl", radius=0.1, divergence_top_k=5)
    )
    assert made.resolve().bounds == dataclasses.replace(
        OBJECTIVES["dppo-topk-tv"].bounds, divergence=KL, radius=0.1, k=5
    )
    assert BandGRPOConfig(**settings(tmp_path, objective="dppo-kl", radius=0.2)).resolve().bounds == Band(KL, 0.2, None)


def test_trainer_refuses_to_count_the_sampler_twice(make_model, tokenizer, prompts, tmp_path):
    for name in ("dppo-kl", "tis"):
        with pytest.raises(ValueError, match="count the mismatch twice"):
            named(tmp_path, make_model, tokenizer, prompts, name, use_vllm=True)
    with pytest.raises(ValueError, match="does not pass on from vLLM"):
        named(
            tmp_path, make_model, tokenizer, prompts, "dppo-topk-kl", use_vllm=True,
            vllm_importance_sampling_correction=False,
        )  # fmt: skip
    with pytest.warns(UserWarning, match="all weights are 1, and the difference that rounding makes"):
        named(tmp_path, make_model, tokenizer, prompts, "tis")
    uneven = band_trainer(tmp_path, make_model, tokenizer, prompts, dynamic_sampling=1)
    with pytest.raises(ValueError, match="6 completions are no multiple"):
        uneven._refill({"advantages": torch.zeros(6)}, lambda _: {})


def test_both_spellings_of_the_share_outside_are_one_rule(tmp_path):
    rules = []
    for name in ("outside_fraction", "clip_fraction"):
        args = BandGRPOConfig(
            str(tmp_path), radius=0.05, radius_target=f"{name}=0.01", report_to=[], bf16=False, use_cpu=True
        )
        rules.append(args.radius_rule(args.resolve(), steps=1))
    assert rules[0].target == rules[1].target == 0.01 and not rules[0].rises and not rules[1].rises
