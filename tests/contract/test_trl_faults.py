"""What used to go wrong in silence in the TRL trainer: each case with its right value."""

import errno
import json
import math
import os
import pickle
import shutil
import time
import warnings
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from trl import GRPOTrainer

from bandpo import OBJECTIVES, Clip, Objective, policy_loss, policy_metrics
from bandpo._system.files import seal
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.integrations.trl.checkpoint import CheckpointError, _delete_oldest
from bandpo.integrations.trl.precision import lost_updates, moved_share
from bandpo.integrations.trl.signal import SignalWatch, without_signal
from bandpo.surrogates import dual_clip
from trl_runs import joined, log_of, loss_and_gradient, reward, rollout, settings, token_logprobs, trl_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of",
    "ignore:Objective .* corrects for a sampler",
)  # fmt: skip

NAN = math.nan


@pytest.fixture
def make(make_model, tokenizer, prompts, tmp_path):
    def make(
        folder="run", *, reward_funcs=reward, model=None, data=None, rollout_func=None, objective_object=None, **changes
    ):
        more = {} if rollout_func is None else {"rollout_func": rollout_func}
        return BandGRPOTrainer(
            model=model or make_model(), reward_funcs=reward_funcs, train_dataset=data or prompts,
            args=BandGRPOConfig(**settings(tmp_path / folder, **changes)), processing_class=tokenizer,
            objective=objective_object, **more,
        )  # fmt: skip

    return make


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def last(log):
    return {k: v[-1] for k, v in log.items() if v}


# ---- a batch without a valid token


@pytest.mark.parametrize("target", ["clip_fraction=0.01", "divergence=0.001"])
def test_a_fully_masked_batch_is_no_evidence(make, target):
    """Nothing ends in 6 tokens, and cut completions are masked: no weight, no radius moves and no number is logged."""
    never = {"mask_truncated_completions": True, "max_completion_length": 2}
    # The end token would have to come as one of the first two; a bias of the logits makes sure that it does not.
    trainer = make(radius=0.05, radius_target=target, max_steps=8, **never)
    end = trainer._tokenizer.eos_token_id
    with torch.no_grad():
        trainer.model.generation_config.suppress_tokens = [end]
    before = weights(trainer).clone()
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 8
    assert all(row["band/radius"] == pytest.approx(0.05, rel=1e-6) for row in rows)
    for name in ("ratio/mean", "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_max", "kl/old_new", "entropy",
                 "band/divergence_mean", "band/divergence_max", "nonfinite_fraction"):  # fmt: skip
        assert all(name not in row for row in rows), name
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize("objective", ["bandpo-kl", "cispo", "gspo"])
def test_a_log_has_no_name_without_a_number(make, objective):
    trainer = make(objective=objective, logging_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows and all(value is not None and value == value for row in rows for value in row.values())
    assert any("token_fraction_by_prob/>=0.99" in row for row in rows)


# ---- micro-batches


@pytest.mark.parametrize("objective", ["bandpo-kl", "dapo", "cispo"])
def test_micro_batches_of_unequal_size_are_pooled(make, objective):
    trainer = make(objective=objective)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    kept = []
    trainer._after_loss = lambda logprobs, inputs, given, terms: kept.append(terms)
    entropies = []
    scores = trainer._get_per_token_logps_and_entropies

    def scored(*args, **kwargs):
        out = scores(*args, **kwargs)
        entropies.append(out[1])
        return out

    trainer._get_per_token_logps_and_entropies = scored
    for seed, width in ((0, 6), (1, 1)):
        inputs = rollout(None, seed)
        inputs["completion_mask"] = inputs["completion_mask"] * (torch.arange(6) < width)
        trainer._compute_loss(trainer.model, inputs)
    log = {k: sum(v) / len(v) for k, v in log_of(trainer).items()}  # as TRL makes a line of it
    whole = joined(kept)
    want = policy_metrics(whole, entropy=torch.cat(entropies))
    names = {
        "clip_fraction/low": "clip_ratio/low_mean",
        "clip_fraction/high": "clip_ratio/high_mean",
        "clip_fraction/any": "clip_ratio/region_mean",
    }
    assert set(names) <= set(want)
    for name, value in want.items():
        if value.isnan():
            assert names.get(name, name) not in log
        else:
            assert log[names.get(name, name)] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    means = sum(policy_metrics(terms)["ratio/mean"] for terms in kept) / 2
    assert abs(means - want["ratio/mean"]) > 1e-3  # a mean of means is another number here


# ---- the logged policy loss


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_policy_loss_beside_an_entropy_bonus_is_trl_s(loss_type, make, make_model, tokenizer, prompts, tmp_path):
    """A clip that does not go through TRL's epsilon, against TRL's own."""
    aggregation = {"grpo": "seq-mean-token-mean", "dapo": "token-mean"}[loss_type]
    mine = Objective(
        bounds=Clip(0.2, 0.28), surrogate=partial(dual_clip, c=math.inf), aggregation=aggregation, name=loss_type
    )
    common = {"entropy_coef": 0.01, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "loss_type": loss_type}
    theirs = trl_trainer(tmp_path, make_model, tokenizer, prompts, epsilon=0.2, epsilon_high=0.28, **common)
    ours = make(objective=loss_type, objective_object=mine, **common)
    inputs = rollout(tokenizer)
    want, found = loss_and_gradient(theirs, inputs), loss_and_gradient(ours, inputs)
    torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-6)
    assert abs(want[2]["policy_loss"]) > 0.01
    assert found[2]["policy_loss"] == pytest.approx(want[2]["policy_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["gmpo", "cispo", "cfpo"])
def test_policy_loss_of_a_replaced_surrogate(name, make, tokenizer):
    trainer = make(objective=name, entropy_coef=0.01)
    inputs = rollout(tokenizer)
    found = loss_and_gradient(trainer, inputs)[2]["policy_loss"]
    want, _ = policy_loss(
        logprobs=token_logprobs(trainer.model, inputs), old_logprobs=inputs["old_per_token_logps"],
        advantages=inputs["advantages"], mask=inputs["completion_mask"], objective=trainer.objective,
    )  # fmt: skip
    assert found == pytest.approx(want.item(), rel=1e-4, abs=1e-5) and found != 0


# ---- unscored, and groups without signal


def generate(trainer, prompts, count):
    trainer.model.train()
    return trainer._generate_and_score_completions([prompts[i] for i in range(count // 4) for _ in range(4)])


def test_groups_with_one_unscored_and_equal_others_are_refilled(make, prompts):
    """[None, 1, 1, 1]: TRL says that no group has signal; dynamic sampling agrees now."""
    one_missing = lambda completions, **_: [None if i % 4 == 0 else 1.0 for i in range(len(completions))]  # noqa: E731
    trainer = make(objective="dapo", dynamic_sampling=3, reward_funcs=one_missing)
    out = generate(trainer, prompts, 16)
    log = trainer._metrics["train"]
    assert log["dynamic_sampling/dull_before"] == [1.0] and log["dynamic_sampling/rounds"] == [3.0]
    assert (out["advantages"] == 0).all()
    assert log["frac_reward_zero_std"] == [1.0] * 4
    assert trainer.last_rewards.isnan().float().mean() == 0.25


def test_what_is_dull_is_judged_by_the_advantages(make, prompts):
    """Two rewards whose sums are equal teach where each is normalised by itself, and nothing where they are summed first."""
    half = lambda completions, **_: [float(i % 2) for i in range(len(completions))]  # noqa: E731
    other = lambda completions, **_: [1.0 - i % 2 for i in range(len(completions))]  # noqa: E731
    for aggregation, weight, dull in (("sum_then_normalize", [1.0, 1.0], 1.0), ("normalize_then_sum", [1.0, 2.0], 0.0),
                                      ("normalize_then_sum", [1.0, 1.0], 1.0)):  # fmt: skip
        trainer = make(
            objective="dapo", dynamic_sampling=1, reward_funcs=[half, other], multi_objective_aggregation=aggregation,
            reward_weights=weight,
        )  # fmt: skip
        out = generate(trainer, prompts, 16)
        assert trainer._metrics["train"]["dynamic_sampling/dull_before"] == [dull], (aggregation, weight)
        assert (out["advantages"] != 0).all() == (dull == 0.0)
    # sums that are equal by their weights: 2·[0,1,0,1] + 1·[2,0,2,0]
    double = lambda completions, **_: [2.0 - 2 * (i % 2) for i in range(len(completions))]  # noqa: E731
    trainer = make(
        objective="dapo", dynamic_sampling=1, reward_funcs=[half, double], reward_weights=[2.0, 1.0],
        multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    out = generate(trainer, prompts, 16)
    assert trainer._metrics["train"]["dynamic_sampling/dull_before"] == [0.0]
    assert out["advantages"].abs().min() > 0.5


@pytest.mark.parametrize("value", [12345.678, 0.1, 1e-3, -7.7e6])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_advantages_of_exactly_0(make, prompts, value, scale):
    """Groups of 7, whose mean in float32 is not the value."""
    trainer = make(
        objective="grpo", scale_rewards=scale, num_generations=7, per_device_train_batch_size=7,
        reward_funcs=lambda completions, **_: [value] * len(completions),
    )  # fmt: skip
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([prompts[i] for i in range(2) for _ in range(7)])
    assert (rollout["advantages"] == 0).all()


def test_signal_of_groups_by_hand():
    rewards = torch.tensor([[1.0, NAN], [1.0, 3.0], [1.0, 3.0], [NAN, NAN], [0.0, 0.0], [0.1, 0.0]])
    assert without_signal(rewards, torch.ones(2), 2, summed_first=True).tolist() == [False, True, False]
    assert without_signal(rewards, torch.ones(2), 2, summed_first=False).tolist() == [True, True, False]
    assert without_signal(torch.full((7, 1), 12345.678), torch.ones(1), 7, summed_first=True).tolist() == [True]


def test_a_run_that_never_had_signal_says_so_at_its_end(make):
    trainer = make(reward_funcs=lambda completions, **_: [1.0] * len(completions), max_steps=2)
    said = []
    trainer.say = said.append
    before = weights(trainer).clone()
    trainer.train()
    assert torch.equal(weights(trainer), before)
    assert len(said) == 1 and "no group of this run ever had rewards that differ (every reward was 1" in said[0]
    assert all(row["frac_reward_zero_std"] == 1 for row in trainer.state.log_history if "frac_reward_zero_std" in row)
    useful = make()
    useful.say = said.append
    useful.train()
    assert len(said) == 1


def test_the_watch_over_signal():
    watch, quiet, loud = SignalWatch(3), torch.tensor([True, True]), torch.tensor([True, False])
    rewards = torch.tensor([0.0, NAN])
    assert [watch.note(quiet, rewards) is not None for _ in range(5)] == [False, False, True, False, False]
    assert "every reward was 0, in 5 rollouts" in watch.verdict()
    assert watch.note(loud, torch.tensor([0.0, 1.0])) is None and watch.verdict() is None
    again = SignalWatch(3)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert [again.note(quiet, rewards) is not None for _ in range(3)] == [False, False, True]
    unscored = SignalWatch()
    unscored.note(torch.tensor([True]), torch.tensor([NAN]))
    assert "no completion was scored" in unscored.verdict()
    assert SignalWatch().verdict() is None  # nothing was sampled


def test_unscored_completions_are_in_no_history_of_pruning(make, prompts):
    """Scores of a group: the mean |A| of those that have a reward; a group without any leaves no score."""
    trainer = make(pruning={"prompts": 0.5}, per_device_train_batch_size=8)
    rows = [prompts[i] for i in range(4) for _ in range(4)]
    trainer.model.train()
    trainer.state.max_steps = 10
    trainer.last_rewards = torch.tensor([NAN, 1, 0, 0.5, NAN, NAN, NAN, NAN, 1, 1, 1, 1, 0, 1, 0, 1])
    advantages = torch.tensor([0, 3.0, -2, 1, 0, 0, 0, 0, 0, 0, 0, 0, -1, 1, -1, 1])
    batch = {"advantages": advantages, "completion_mask": torch.ones(16, 3), "prompt_ids": torch.zeros(16, 2)}
    trainer._pruned.after(rows, batch, [1.0] * 16)
    history = {p: trainer._pruned.prune.history.get(p) for p in (prompts[i]["prompt"] for i in range(4))}
    assert list(history.values()) == [2.0, None, 0.0, 1.0]


# ---- values that are no numbers


@pytest.mark.parametrize("objective", ["bandpo-kl", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("where", ["old", "new"])
@pytest.mark.parametrize("value", [NAN, -math.inf])
def test_tokens_that_are_no_numbers_carry_nothing_and_are_told(
    make, make_model, tokenizer, tmp_path, objective, where, value
):
    """Loss and gradient are those of the same batch where these tokens have an advantage of 0 and no part in a ratio."""
    path = str(tmp_path / "reference")
    make_model().save_pretrained(path)
    trainer = make(objective=objective, beta=0.04, model=path)
    inputs, strange = rollout(tokenizer), torch.zeros(8, 6, dtype=torch.bool)
    strange[0, 1] = strange[2, 0] = strange[3, 0] = True  # row 3 has no other token
    clean = dict(inputs)
    scores = trainer._get_per_token_logps_and_entropies
    if where == "old":
        inputs["old_per_token_logps"] = inputs["old_per_token_logps"].masked_fill(strange, value)
    else:
        real = GRPOTrainer._get_per_token_logps_and_entropies

        def broken(self, *args, **kwargs):
            out = real(self, *args, **kwargs)
            return out[0].masked_fill(strange, value), *out[1:]

        pytest.MonkeyPatch().setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", broken)
    said = []
    trainer.say = said.append
    try:
        loss, gradient, log = loss_and_gradient(trainer, inputs)
    finally:
        if where == "new":
            setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", real)  # noqa: B010
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0
    assert log["nonfinite_fraction"] == pytest.approx(3 / inputs["completion_mask"].sum().item())
    assert len(said) == 1 and "3 of 33 valid tokens" in said[0]
    assert all(value == value for value in log.values())
    # the oracle: by hand from the model's own log-probs
    want, want_gradient = by_hand(trainer, clean, strange, scores)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-3, atol=1e-5 * want_gradient.abs().max().item())


def by_hand(trainer, inputs, strange, scores):
    trainer.model.zero_grad()
    mask = inputs["completion_mask"].bool()
    used = mask & ~strange
    new, old, ref = token_logprobs(trainer.model, inputs), inputs["old_per_token_logps"], inputs["ref_per_token_logps"]
    a = inputs["advantages"].unsqueeze(1)
    x = torch.where(used, new - old, 0.0)
    bounds, ratio = trainer.objective.bounds(old), x.exp()
    if trainer.objective.ratio_level == "sequence":
        x = (x.sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp(min=1)).expand(mask.shape)
    if trainer.objective.name == "cispo":
        value = x.detach().exp().clamp(max=float(trainer.objective.bounds.high) + 1) * a * new
    else:
        value = torch.minimum(x.exp() * a, x.exp().clamp(bounds.lower, bounds.upper) * a)
    kl = (ref - new).exp() - (ref - new) - 1
    if trainer.args.kl_term == "k3-ratio":  # that of the token, whatever the level of the objective's ratio
        kl = kl * ratio
    per_token = torch.where(used, -value + 0.04 * kl, 0.0)
    if trainer.loss_type == "dapo":  # num_items_in_batch is that of two micro-batches
        loss = per_token.sum() / mask.sum()
    else:
        loss = (per_token.sum(1) / mask.sum(1)).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return loss.detach(), gradient


# ---- what is refused or told before anything is sampled


def test_packing_a_mixture_of_experts_with_a_router_loss_is_refused_with_the_remedy(make, tokenizer):
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=16,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for options, what in (({"packing": True}, "packing"), ({"pruning": {"completions": 0.5}}, "pruning completions")):
        with pytest.raises(ValueError, match=f"{what}.*router loss.*set router_aux_loss_coef=0"):
            make(model=model, router_aux_loss_coef=0.001, **options)
        make(model=model, router_aux_loss_coef=0.0, **options)


@pytest.mark.parametrize(
    "changes", [{"entropy_coef": 0.01}, {"use_adaptive_entropy": True}, {"top_entropy_quantile": 0.2}, {"beta": 0.1}],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_pruning_completions_refuses_terms_without_weights(changes, tmp_path):
    name = next(iter(changes))
    options = {"objective": "grpo", **changes}
    with pytest.raises(ValueError, match=f"pruning completions with {name}=.*set {name}=.*or prune prompts only"):
        BandGRPOConfig(**settings(tmp_path, pruning={"completions": 0.5}, **options))
    BandGRPOConfig(**settings(tmp_path, pruning={"prompts": 0.5}, **options))


def test_weights_are_not_said_to_be_1_where_the_sampler_is_the_user_s(make):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make(objective="tis", rollout_func=lambda prompts, trainer: {})
    assert not [w for w in seen if "all weights are 1" in str(w.message)]
    with pytest.raises(ValueError, match="does not take from a rollout_func"):
        make(objective="dppo-topk-kl", rollout_func=lambda prompts, trainer: {})
    # against π_old, the trainer itself scores the top-K tokens, whoever samples
    assert make(objective="troll", rollout_func=lambda prompts, trainer: {}).objective.top_k == 64


def test_a_projection_refuses_a_head_that_it_does_not_use(make):
    with pytest.raises(ValueError, match=r"cast_lm_head_to_fp32=True would be ignored.*'troll'"):
        make(objective="troll", cast_lm_head_to_fp32=True)
    make(objective="grpo", cast_lm_head_to_fp32=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_that_would_hardly_move_are_told_before_training(make, make_model, dtype):
    said = []
    trainer = make(model=make_model().to(dtype), learning_rate=1e-7, max_steps=1)
    trainer.say = said.append
    trainer.train()
    assert "16-bit" in said[0] and "learning_rate=1e-07 changes" in said[0] and "float32" in said[0]
    for rate, model in ((1e-1, make_model().to(dtype)), (1e-7, make_model())):
        trainer, said = make(model=model, learning_rate=rate, max_steps=1), []
        trainer.say = said.append
        trainer.train()
        assert not [s for s in said if "16-bit" in s]


def test_the_share_that_moves_is_counted_by_trying(make_model):
    """Against Adam itself: the share of bfloat16 weights that differ after its first step of the given rate."""
    model = make_model().to(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p) * torch.where(p > 0, 1.0, -1.0).to(p.dtype)
    torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0).step()
    moved = sum((p != q).sum().item() for p, q in zip(model.parameters(), before, strict=True))
    total = sum(p.numel() for p in before)
    assert moved_share(before, 1e-4) == pytest.approx(moved / total, abs=0.05)
    assert moved_share([torch.zeros(4, dtype=torch.bfloat16)], 1e-6) == 1.0  # a LoRA's second matrix
    assert lost_updates(before, 1e-6, "sgd") is None and lost_updates(before, 1e-6, "adamw_torch") is not None


# ---- checkpoints


def test_with_the_clock_set_back_the_checkpoint_just_written_stays(make, monkeypatch, tmp_path):
    saved = BandGRPOTrainer._save_checkpoint

    def in_the_past(self, *args):
        saved(self, *args)
        newest = tmp_path / "run" / f"checkpoint-{self.state.global_step}"
        long_ago = time.time() - 1e6 * self.state.global_step
        os.utime(newest, (long_ago, long_ago))

    monkeypatch.setattr(BandGRPOTrainer, "_save_checkpoint", in_the_past)
    make(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_the_checkpoint_just_written_and_the_best_outlive_higher_steps(tmp_path):
    for step in (2, 5, 9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    _delete_oldest(tmp_path, 3, keep=[tmp_path / "checkpoint-5", tmp_path / "checkpoint-2"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-100",
        "checkpoint-2",
        "checkpoint-5",
        "checkpoint-x",
    ]
    _delete_oldest(tmp_path, 1, keep=[tmp_path / "checkpoint-5", tmp_path / "checkpoint-2"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-5", "checkpoint-x"]
    _delete_oldest(tmp_path, None, keep=[])
    assert len(list(tmp_path.iterdir())) == 3


def failing(error):
    def save(*_, **__):
        raise error

    return save


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_as_one(make, monkeypatch, number):
    monkeypatch.setattr(torch, "save", failing(OSError(number, os.strerror(number))))
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-1 .*MiB are free"):
        make(max_steps=1, save_strategy="steps", save_steps=1).train()


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyError("x"), PermissionError(errno.EACCES, "no"), OSError(errno.EIO, "broken"),
              RuntimeError("PytorchStreamWriter failed: my own bug")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_another_error_while_saving_keeps_its_own_name_and_message(make, monkeypatch, error):
    monkeypatch.setattr(torch, "save", failing(error))
    with pytest.raises(type(error)) as seen:
        make(max_steps=1, save_strategy="steps", save_steps=1).train()
    assert seen.value is error


@pytest.fixture
def checkpoint(make, tmp_path):
    make(max_steps=2, save_strategy="steps", save_steps=1, logging_steps=1).train()
    return tmp_path / "run" / "checkpoint-1"


@pytest.mark.parametrize(
    "changes",
    [{"steps_per_generation": 4}, {"per_device_train_batch_size": 4}, {"num_generations": 2}, {"num_iterations": 3},
     {"gradient_accumulation_steps": 2, "steps_per_generation": 2}],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_a_checkpoint_of_other_batches_is_refused_by_name(make, checkpoint, changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"was written with .*{name}=.*and this run has .*{name}={changes[name]}"):
        make("other", max_steps=2, **changes).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_another_number_of_processes_is_refused(make, checkpoint):
    state = torch.load(checkpoint / "bandpo_state_0.pt", weights_only=True)
    torch.save({**state, "settings": {**state["settings"], "processes": 2}}, checkpoint / "bandpo_state_0.pt")
    seal(checkpoint)
    with pytest.raises(ValueError, match=r"processes=2, and this run has processes=1.*cannot|cannot.*processes=2"):
        make("other", max_steps=2).train(resume_from_checkpoint=str(checkpoint))


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/bandpo-pwned",))


@pytest.mark.parametrize("name", ["bandpo_state_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("content", ["pickle", "torch", "text", "empty", "other"])
def test_a_state_that_cannot_be_read_is_one_sentence_and_runs_nothing(make, checkpoint, name, content):
    """Sealed anew, as a stranger would."""
    path = checkpoint / name
    if content == "torch":
        torch.save({"x": Evil()}, path)
    else:
        path.write_bytes(
            {"pickle": pickle.dumps(Evil(), protocol=2), "text": b"hello", "empty": b"", "other": b""}[content]
        )
    if content == "other":
        torch.save([1, 2, 3], path)
    seal(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be resumed: "):
        make("other", max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    assert not os.path.exists("/tmp/bandpo-pwned")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 20_000 + "]" * 20_000, '{"global_step": "x"}', '{"nope": 1}'])
def test_a_trainer_state_that_is_none_is_one_sentence(make, checkpoint, text):
    (checkpoint / "trainer_state.json").write_text(text)
    seal(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be resumed: "):
        make("other", max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_resume_inside_a_line_of_the_log_writes_the_same_line(make, tmp_path):
    """The sums behind the metrics travel along: a line that spans the checkpoint is the one of a run that never stopped."""
    common = {"max_steps": 6, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    whole, again = make("whole", **common), make("again", **common)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    drop = ("step_time", "update_time", "train_runtime")
    lines = [
        [{k: v for k, v in row.items() if k not in drop} for row in t.state.log_history if row["step"] == 4]
        for t in (whole, again)
    ]
    assert lines[0] == lines[1] and lines[0][0]["ratio/mean"] != 1
    shutil.rmtree(tmp_path / "whole")


def test_data_sets_without_signal_in_an_evaluation_do_not_count(make, prompts):
    trainer = make(reward_funcs=lambda completions, **_: [1.0] * len(completions), per_device_eval_batch_size=8)
    trainer.eval_dataset = Dataset.from_list([prompts[i] for i in range(2)])
    trainer.evaluate()
    assert trainer._signal.rollouts == 0


def test_options_of_a_region_beside_an_objective_as_an_object_are_refused(make):
    """They change the objective that the configuration names, which is not the one that is trained."""
    with pytest.raises(ValueError, match=r"radius=0.3, and the objective has bounds=Clip\(low=0.2, high=0.2\)"):
        make(objective_object=OBJECTIVES["grpo"], objective="bandpo-kl", radius=0.3)
    same = OBJECTIVES["bandpo-kl"].with_radius(0.3)
    assert make(objective_object=same, objective="bandpo-kl", radius=0.3).objective == same


def test_an_objective_of_sequences_as_an_object_sets_the_level(make):
    own = Objective(bounds=Clip(1e-3), ratio_level="sequence", aggregation="seq-mean-token-mean")
    for name in ("bandpo-kl", "gspo"):  # whatever the configuration names
        trainer = make(objective_object=own, objective=name)
        assert trainer.objective is own and trainer.importance_sampling_level == "sequence"


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_a_beta_that_is_no_coefficient_is_refused(beta, make):
    with pytest.raises(ValueError, match="beta must be a number >= 0"):
        make(beta=beta)
