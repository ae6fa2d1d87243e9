"""`BandDPOTrainer` against TRL's own losses, and the online trainer's rounds."""

import json

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from bandpo.integrations.trl.dpo import BandDPOConfig, BandDPOTrainer
from bandpo.integrations.trl.generate import score_completions
from bandpo.integrations.trl.online import OnlinePreferenceConfig, OnlinePreferenceTrainer
from bandpo.preference import LayerProbe
from trl_runs import log_of

COMMON = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant", "max_steps": 2, "logging_steps": 1,
    "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a * b + 100), "reward_gap": 1.0}
        for a in range(2, 6)
        for b in range(1, 5)
    ]
    return Dataset.from_list(rows)


def ours(folder, make_model, tokenizer, pairs, *, probe=None, ref=True, **changes):
    return BandDPOTrainer(
        model=make_model(), ref_model=make_model(1) if ref else None, probe=probe, train_dataset=pairs,
        processing_class=tokenizer, args=BandDPOConfig(str(folder), **{**COMMON, **changes}),
    )  # fmt: skip


def theirs(folder, make_model, tokenizer, pairs, **changes):
    return DPOTrainer(
        model=make_model(), ref_model=make_model(1), train_dataset=pairs.remove_columns("reward_gap"),
        processing_class=tokenizer, args=DPOConfig(str(folder), **{**COMMON, **changes}),
    )  # fmt: skip


def loss_and_gradient(trainer):
    trainer.model.train().zero_grad()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer._compute_loss(trainer.model, batch, False)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), log_of(trainer)


EQUAL = [
    ({"objective": "dpo"}, {}),
    ({"objective": "dpo", "beta": 0.37}, {"beta": 0.37}),
    ({"objective": "slic"}, {"loss_type": "hinge"}),
    ({"objective": "ipo"}, {"loss_type": "ipo"}),
    ({"objective": "robust-dpo", "label_smoothing": 0.2}, {"loss_type": "robust", "label_smoothing": 0.2}),
    ({"objective": "chi2-dpo"}, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0}),
    (
        {"objective": "dpo", "link": "alpha:0.5"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    ),
    ({"objective": "js-dpo"}, {"f_divergence_type": "js_divergence"}),
    ({"objective": "forward-kl-dpo"}, {"f_divergence_type": "forward_kl"}),
]


@pytest.mark.parametrize(("mine", "host"), EQUAL, ids=lambda x: "-".join(map(str, x.values())))
def test_losses_that_both_have_are_equal(tmp_path, make_model, tokenizer, pairs, mine, host):
    loss, gradient, metrics = loss_and_gradient(ours(tmp_path, make_model, tokenizer, pairs, **mine))
    expected, expected_gradient, host_metrics = loss_and_gradient(
        theirs(tmp_path, make_model, tokenizer, pairs, **host)
    )
    # The same float32 numbers in another order: a few units in the last place of sums of ~10 log-probs.
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-4, atol=1e-5 * expected_gradient.abs().max().item())
    assert metrics["logps/chosen"] == host_metrics["logps/chosen"]
    if "f_divergence_type" not in host and mine["objective"] != "ipo":  # TRL's rewards know no link and no length
        assert metrics["rewards/margins"][-1] == pytest.approx(host_metrics["rewards/margins"][-1], abs=1e-4)


def test_chipo_adds_the_log_ratio_to_trls_alpha_score(tmp_path, make_model, tokenizer, pairs):
    trainer = ours(tmp_path, make_model, tokenizer, pairs)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, dict(batch), False)
        ref = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        new = trainer.compute_ref_log_probs(trainer.model, batch)
    d = [(n - r).double() for n, r in zip(new, ref, strict=True)]
    h = 0.1 * (d[0].exp() + d[0] - d[1].exp() - d[1])
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(-h).mean().item(), rel=1e-4)


@pytest.mark.parametrize("objective", ["chipo", "cdpo", "pdfr", "vcb", "simpo"])
def test_other_objectives_train(tmp_path, make_model, tokenizer, pairs, objective):
    trainer = ours(tmp_path, make_model, tokenizer, pairs, ref=objective != "simpo", objective=objective)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    log = trainer.state.log_history[0]
    assert {"rewards/margins", "pairs/log_ratio/chosen", "pairs/clipped", "entropy"} <= set(log)
    assert any((p != q).any() for p, q in zip(trainer.model.parameters(), before, strict=True))


def test_the_probe_trains_along_and_gives_the_confidence(tmp_path, make_model, tokenizer, pairs):
    model = make_model()
    probe = LayerProbe(model.config.num_hidden_layers, model.config.hidden_size)
    before = probe.weight.clone()
    trainer = ours(tmp_path, make_model, tokenizer, pairs, probe=probe, objective="rbrm")
    trainer.train()
    assert (probe.weight != before).any()
    assert 0.5 <= trainer.state.log_history[0]["pairs/probe/confidence"] <= 1
    with pytest.raises(ValueError, match="needs a probe"):
        ours(tmp_path, make_model, tokenizer, pairs, objective="rbrm")
    with pytest.raises(ValueError, match="no soft target"):
        ours(tmp_path, make_model, tokenizer, pairs, objective="dpo", probe=probe)


@pytest.mark.parametrize(
    "changes",
    [{"loss_type": "hinge"}, {"f_divergence_type": "js_divergence"}, {"use_weighting": True}, {"ld_alpha": 0.5},
     {"objective": "nope"}, {"link": "nope"}, {"objective": "simpo", "link": "js"}, {"beta": -1.0}],
)  # fmt: skip
def test_options_that_would_be_ignored_are_refused(tmp_path, changes):
    with pytest.raises(ValueError):
        BandDPOConfig(str(tmp_path), **{**COMMON, **changes})


def test_pairs_of_unequal_micro_batches_are_pooled(tmp_path, make_model, tokenizer, pairs):
    """Sums over pairs, in our keys and in TRL's; pairs that are no numbers count in their share alone."""
    trainer = ours(tmp_path, make_model, tokenizer, pairs)
    trainer.model.train()
    log = trainer._metrics["train"]
    for chosen, strange, count in ((1.0, 0.0, 4), (3.0, 0.5, 2), (float("nan"), 1.0, 1)):
        log["rewards/chosen"].append(99.0)  # TRL's own, which knows no link
        metrics = {"rewards/chosen": chosen, "clipped": chosen / 4, "nonfinite_fraction": strange}
        trainer._log_pairs({k: torch.tensor(v) for k, v in metrics.items()}, count)
    trainer.settle()
    assert log["rewards/chosen"] == [pytest.approx((1.0 * 4 + 3.0 * 1) / 5)]
    assert log["pairs/clipped"] == [pytest.approx((0.25 * 4 + 0.75 * 1) / 5)]
    assert log["pairs/nonfinite_fraction"] == [pytest.approx((0.5 * 2 + 1.0) / 7)]


# ---- rounds


def reward(prompts, completions, **_):
    return [float(sum(map(ord, c)) % 3 == 0) + 0.1 * (len(c) % 4) for c in completions]


def online(folder, make_model, tokenizer, prompts, **changes):
    settings = {"rounds": 3, "prompts_per_round": 6, "samples_per_prompt": 4, "max_completion_length": 5, "max_steps": -1,
                "objective": "dpo"}  # fmt: skip
    args = OnlinePreferenceConfig(str(folder), **{**COMMON, **settings, **changes})
    return OnlinePreferenceTrainer(make_model(), reward, args, prompts, tokenizer)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": "pdfr", "label_scale": 4.0}, {"objective": "rdrc", "beta": 0.5}, {"labels": "bradley-terry"},
     {"objective": "chipo", "resample": False}, {"data": "accumulate"},
     {"objective": "rbrm", "labels": "probe", "resample": False, "samples_per_prompt": 8, "prompts_per_round": 16,
      "probe_prompts": 10}],
    ids=lambda c: "-".join(map(str, c.values())) or "online-dpo",
)  # fmt: skip
def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path, make_model, tokenizer, prompts, changes):
    whole = online(tmp_path / "whole", make_model, tokenizer, prompts, **changes)
    history = whole.train()
    part = online(tmp_path / "part", make_model, tokenizer, prompts, **changes)
    save = part._save
    part._save = lambda k, *rest: save(k, *rest) if k == 0 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):  # at the end of round 1, before anything of it is written
        part.train()
    resumed = online(tmp_path / "part", make_model, tokenizer, prompts, **changes)
    with pytest.warns(UserWarning, match=r"rounds/1 is not used: it was not written to its end"):
        assert resumed.train(resume=True) == history
    assert torch.equal(weights(resumed), weights(whole))


def test_pairs_carry_what_was_sampled(tmp_path, make_model, tokenizer, prompts):
    trainer = online(tmp_path, make_model, tokenizer, prompts, rounds=1, objective="rebel", beta=1.0)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "rounds/0/pairs.jsonl").read_text().splitlines()]
    for side in ("chosen", "rejected"):
        texts = tokenizer.batch_decode([r[f"{side}_ids"] for r in rows], skip_special_tokens=True)
        r = torch.tensor(reward(None, texts))
        gap = r if side == "chosen" else gap - r  # noqa: F821
        logps, _ = score_completions(
            make_model(), [x["prompt_ids"] for x in rows], [x[f"{side}_ids"] for x in rows], pad=tokenizer.pad_token_id
        )
        torch.testing.assert_close(logps, torch.tensor([x[f"ref_{side}_logps"] for x in rows]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gap, torch.tensor([x["reward_gap"] for x in rows]))


def test_offline_rounds_sample_once(tmp_path, make_model, tokenizer, prompts, monkeypatch):
    trainer = online(tmp_path, make_model, tokenizer, prompts, resample=False)
    calls = []
    sample = trainer._sample
    monkeypatch.setattr(trainer, "_sample", lambda k: calls.append(k) or sample(k))
    trainer.train()
    assert calls == [0]


def test_no_signal_is_an_error(tmp_path, make_model, tokenizer, prompts):
    trainer = online(tmp_path, make_model, tokenizer, prompts)
    trainer.reward = lambda prompts, completions, **_: [0.0] * len(completions)
    with pytest.raises(ValueError, match="no pair to learn from"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rounds": 0}, "rounds"), ({"labels": "oracle"}, "labels"), ({"objective": "rbrm"}, "probe"),
     ({"pairs_per_prompt": 3}, "samples_per_prompt"), ({"objective": "rdrc", "data": "accumulate"}, "latest")],
)  # fmt: skip
def test_rounds_that_make_no_sense_are_refused(tmp_path, make_model, tokenizer, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        online(tmp_path, make_model, tokenizer, prompts, **changes)


def test_an_older_trl_is_refused_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("bandpo.integrations.trl.dpo.trl_version", "1.14.2")
    with pytest.raises(ImportError, match=r"need trl>=1.16, and trl 1.14.2 is installed"):
        BandDPOTrainer("no/such-model")
