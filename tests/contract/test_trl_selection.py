"""Pruning and packing inside TRL: off is TRL's own run, on keeps the expected loss, packed is padded, resume is exact."""

import pytest
import torch

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.selection import Informative
from trl_runs import loss_and_gradient, reward, rollout, settings

TIMES = (
    "train_runtime",
    "step_time",
    "update_time",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
)


def band_trainer(folder, make_model, tokenizer, prompts, **changes):
    return BandGRPOTrainer(
        model=make_model(), reward_funcs=reward, args=BandGRPOConfig(**settings(folder, **changes)), train_dataset=prompts,
        processing_class=tokenizer,
    )  # fmt: skip


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def run(folder, make_model, tokenizer, prompts, resume=None, **changes):
    trainer = band_trainer(folder, make_model, tokenizer, prompts, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer), [{k: v for k, v in row.items() if k not in TIMES} for row in trainer.state.log_history]


@pytest.mark.parametrize("objective", ["bandpo-kl", "grpo", "cispo"])
def test_rates_of_zero_are_the_baseline_bit_for_bit(objective, tmp_path, make_model, tokenizer, prompts):
    plain, _ = run(tmp_path / "a", make_model, tokenizer, prompts, objective=objective)
    pruned, _ = run(tmp_path / "b", make_model, tokenizer, prompts, objective=objective, pruning={"completions": 0.0})
    assert torch.equal(plain, pruned)


@pytest.mark.parametrize("objective", ["bandpo-kl", "grpo", "dr_grpo", "cfpo", "dppo-tv"])
@pytest.mark.parametrize(
    "rates", [{"completions": 0.5}, {"prompts": 0.5, "completions": 0.5}], ids=["completions", "both"]
)
def test_the_expected_loss_of_a_pruned_rollout_is_that_of_the_whole(
    objective, rates, tmp_path, make_model, tokenizer, prompts
):
    """400 draws on one rollout; a loss without gradient steps in between."""
    trainer = band_trainer(
        tmp_path, make_model, tokenizer, prompts, objective=objective, pruning=rates, per_device_train_batch_size=16,
        num_generations=8,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = 100
    batch = next(iter(trainer.get_train_dataloader()))
    # Its rows, without sampling: what TRL would hand on.
    whole = rollout(tokenizer)
    whole = {k: torch.cat([v] * 4) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in whole.items()}
    g = torch.Generator().manual_seed(3)
    whole["advantages"] = torch.randn(32, generator=g)
    trainer.last_rewards = torch.randn(32, generator=g)
    # The mean-type losses divide by rows, token-mean by the number of tokens that TRL counts.
    whole["num_items_in_batch"] = whole["completion_mask"].sum().float()
    keys = [row["prompt"] for row in batch[::8]]
    history = dict(zip(keys, [0.1, 0.2, 5.0, 5.0], strict=True))

    def loss(rows):
        parts = [
            {k: v[i::2] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in rows.items()} for i in range(2)
        ]
        with torch.no_grad():
            return sum(trainer._compute_loss(trainer.model, part) for part in parts).item()

    full = loss({k: v for k, v in whole.items() if "ref" not in k})
    found = []
    for draw in range(400):
        trainer._step = draw
        trainer._pruned.prune.load_state_dict({"history": history})
        inputs, weight = trainer._pruned.before(batch)
        places = [i for i, row in enumerate(batch) if row["prompt"] in {r["prompt"] for r in inputs}]
        rows = {
            k: v[places] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in whole.items() if "ref" not in k
        }
        rewards, trainer.last_rewards = trainer.last_rewards, trainer.last_rewards[places]
        found.append(loss(trainer._pruned.after(inputs, rows, weight)))
        trainer.last_rewards = rewards
    mean, error = sum(found) / 400, torch.tensor(found).std().item() / 20
    # Token-mean over prompts that were not sampled has an estimated denominator: a bias of the order of its relative variance.
    slack = 0.1 * abs(full) if "prompts" in rates and trainer.loss_type == "dapo" else 0.0
    assert abs(mean - full) < 4 * error + slack + 1e-6
    assert error > 0


def test_fewer_rows_are_trained_on_and_the_log_says_so(tmp_path, make_model, tokenizer, prompts):
    rates = {"prompts": 0.5, "completions": 0.5}
    few = prompts.select(range(16))  # two rollouts see them all, the later ones know them
    _, log = run(tmp_path, make_model, tokenizer, few, pruning=rates, max_steps=24, per_device_train_batch_size=16)
    rows = [row for row in log if "selection/kept" in row]
    assert all(row["selection/kept"] < 1 and 0 < row["selection/tokens"] < 1 for row in rows)
    assert all(0 < row["selection/effective_sample_size"] <= 1 for row in rows)
    assert rows[0]["selection/prompts_kept"] == 1 and min(row["selection/prompts_kept"] for row in rows) < 1


@pytest.mark.parametrize("objective", ["bandpo-kl", "gspo", "cispo"])
@pytest.mark.parametrize("changes", [{}, {"packing_tokens": 40, "packing_window": 3}], ids=["default", "small"])
def test_packed_is_padded(objective, changes, tmp_path, make_model, tokenizer, prompts):
    inputs = rollout(tokenizer)
    loss, gradient = loss_and_gradient(
        band_trainer(tmp_path, make_model, tokenizer, prompts, objective=objective), inputs
    )[:2]
    packed = band_trainer(tmp_path, make_model, tokenizer, prompts, objective=objective, packing=True, **changes)
    found, found_gradient = loss_and_gradient(packed, inputs)[:2]
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-6)  # float32, other orders of addition in attention
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    log = packed._metrics["train"]
    assert log["packing/density"][-1] > log["packing/padded_density"][-1]


def test_packed_runs_end_where_padded_ones_do(tmp_path, make_model, tokenizer, prompts):
    changes = {"learning_rate": 1e-3}
    padded, _ = run(tmp_path / "a", make_model, tokenizer, prompts, **changes)
    packed, log = run(tmp_path / "b", make_model, tokenizer, prompts, packing=True, **changes)
    torch.testing.assert_close(
        packed, padded, rtol=0, atol=2e-4
    )  # Adam turns rounding of tiny gradients into a part of lr
    assert log[0]["packing/density"] > 0.5


def test_resume_is_bit_exact(tmp_path, make_model, tokenizer, prompts):
    common = {"max_steps": 16, "save_strategy": "steps", "save_steps": 10, "learning_rate": 0.05, "packing": True,
              "pruning": {"prompts": 0.5, "completions": 0.5}}  # fmt: skip
    whole, log = run(tmp_path / "a", make_model, tokenizer, prompts, **common)
    resumed, rest = run(
        tmp_path / "b", make_model, tokenizer, prompts, resume=str(tmp_path / "a/checkpoint-10"), **common
    )
    assert torch.equal(whole, resumed)
    pick = lambda rows: [r for r in rows if r["step"] > 10 and "selection/kept" in r]  # noqa: E731
    assert pick(log) == pick(rest) and pick(log)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning": {"completions": 0.5}, "beta": 0.1}, "KL term has no weights"),
        ({"pruning": {"completions": 0.5}, "loss_type": "bnpo"}, "bnpo"),
        ({"pruning": {"completions": 0.5, "mode": "bernoulli"}}, "fixed count"),
        ({"pruning": {"rows": 0.5}}, "use a mapping with"),
        ({"pruning": "{"}, "not JSON"),
        ({"pruning": {"completions": 1.5}}, r"\[0, 1\)"),
        ({"pruning": {"completions": 0.5}, "dynamic_sampling": 2}, "set one"),
        ({"packing_tokens": 100}, "would be ignored"),
        ({"packing": True, "packing_window": 0}, "packing_window"),
    ],
)
def test_what_would_be_wrong_is_refused(changes, message, tmp_path, make_model, tokenizer, prompts):
    with pytest.raises(ValueError, match=message):
        band_trainer(tmp_path, make_model, tokenizer, prompts, **changes)


def test_selectors_are_exchangeable_in_python():
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert Informative()(rewards, rewards - rewards.mean(1, keepdim=True)).keep.tolist() == [
        [True, True],
        [False, False],
    ]
