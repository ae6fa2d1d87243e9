"""Rounds of preference learning: what is scored, by whom, in which precision, on which samples, and what is logged of it."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from bandpo._system.progress import Progress
from bandpo.integrations.trl.dpo import BandDPOConfig, BandDPOTrainer
from bandpo.integrations.trl.online import OnlinePreferenceConfig, OnlinePreferenceTrainer
from bandpo.train.config import RunConfig
from bandpo.train.preference import PreferenceRun

COMMON = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
}  # fmt: skip
ROUNDS = {"rounds": 2, "prompts_per_round": 6, "samples_per_prompt": 4, "max_completion_length": 5, "objective": "dpo"}
PROBE = {"objective": "rbrm", "labels": "probe", "samples_per_prompt": 8, "prompts_per_round": 16, "probe_prompts": 10}


def reward(prompts, completions, **_):
    return [float(sum(map(ord, c)) % 3 == 0) + 0.1 * (len(c) % 4) for c in completions]


def online(folder, model, tokenizer, prompts, score=reward, **changes):
    args = OnlinePreferenceConfig(str(folder), **{**COMMON, **ROUNDS, **changes})
    return OnlinePreferenceTrainer(model, score, args, prompts, tokenizer)


# ---- precision


def test_a_half_precision_model_is_trained_in_float32(tmp_path, make_model, tokenizer, prompts):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    trainer = online(tmp_path / "run", str(tmp_path / "half"), tokenizer, prompts, learning_rate=1e-6, rounds=1)
    before = torch.cat([p.detach().clone().flatten() for p in trainer.model.parameters()])
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    # Adam moves a weight by about the learning rate, far below bfloat16's step at usual sizes. Rows of the embedding that no
    # pair needs have no gradient.
    assert (before != after).float().mean() > 0.8
    assert (before.bfloat16() != after.bfloat16()).float().mean() < 0.1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated")
def test_half_precision_on_purpose_is_said(tmp_path, make_model, tokenizer, prompts):
    make_model().save_pretrained(tmp_path / "model")
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "rounds": 1, "learning_rate": 1e-6}
    trainer = online(tmp_path / "run", str(tmp_path / "model"), tokenizer, prompts, **options)
    with pytest.warns(UserWarning, match="weights are 16-bit numbers.*Train float32 weights"):
        trainer.train()


@pytest.mark.parametrize("objective", ["dpo", "chipo", "rebel", "rdrc"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_log_ratios_of_equal_weights_are_0(objective, precision, tmp_path, make_model, tokenizer, prompts):
    model = make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # far from uniform: rounding in bfloat16 is large
    trainer = online(
        tmp_path,
        model,
        tokenizer,
        prompts,
        objective=objective,
        learning_rate=0.0,
        generation_batch_size=7,
        **precision,
    )
    for row in trainer.train():
        assert row["pairs/log_ratio/chosen"] == row["pairs/log_ratio/rejected"] == 0
        assert row["concentrability/log_mean"] == 0 and row["concentrability/max"] == 1


@pytest.mark.parametrize("objective", ["dpo", "rebel"])
def test_the_reference_is_the_start_or_the_policy_of_the_round_before(
    objective, tmp_path, make_model, tokenizer, prompts
):
    trainer = online(tmp_path, make_model(), tokenizer, prompts, objective=objective, learning_rate=1e-2)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    seen = []
    fit = trainer._fit

    def watched(rows, k):
        policy = [p.detach().clone() for p in trainer.model.parameters()]
        fit(rows, k)
        reference = trainer._trainer.ref_model
        seen.append((policy, [p.detach().clone() for p in reference.parameters()]))

    trainer._fit = watched
    trainer.train()
    for k, (policy, reference) in enumerate(seen):
        expected = start if objective == "dpo" else policy
        assert all(torch.equal(a, b) for a, b in zip(reference, expected, strict=True))
        assert k == 0 or not all(torch.equal(a, b) for a, b in zip(policy, start, strict=True))


# ---- length


def test_samples_longer_than_max_length_are_refused_with_a_count(tmp_path, make_model, tokenizer, prompts):
    trainer = online(tmp_path, make_model(), tokenizer, prompts, max_length=6)
    with pytest.raises(ValueError, match=r"max_length=6: \d+ of 24 samples are longer.*max_completion_length=5"):
        trainer.train()


def test_no_limit_stands_against_long_completions_by_default(tmp_path):
    args = OnlinePreferenceConfig(str(tmp_path), **{**COMMON, **ROUNDS, "max_completion_length": 2048})
    assert args.max_length is None


# ---- what a round logs


@pytest.mark.parametrize("logging_steps", [1, 2, 3, 1000])
def test_the_metrics_of_a_round_are_its_means_however_often_it_is_logged(
    logging_steps, tmp_path, make_model, tokenizer, prompts
):
    trainer = online(tmp_path, make_model(), tokenizer, prompts, learning_rate=1e-2, logging_steps=logging_steps,
                     prompts_per_round=24, per_device_train_batch_size=6)  # fmt: skip
    losses = []
    fit = trainer._fit

    def watched(rows, k):
        from bandpo.integrations.trl import dpo as trl_preference

        original = trl_preference.pair_loss

        def noting(**kwargs):
            out = original(**kwargs)
            losses.append((k, out[1]["rewards/margins"].item(), out[1]["log_ratio/chosen"].item(), len(out[0])))
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trl_preference, "pair_loss", noting)
            fit(rows, k)

    trainer._fit = watched
    history = trainer.train()
    for k, row in enumerate(history):
        own = [x for x in losses if x[0] == k]
        assert len(own) > 3 and row["steps"] == len(own)
        pairs = sum(x[3] for x in own)
        assert pairs == row["pairs"] and own[-1][3] < own[0][3]  # the last batch is a smaller one
        for place, name in ((1, "rewards/margins"), (2, "pairs/log_ratio/chosen")):
            expected = sum(x[place] * x[3] for x in own) / pairs
            assert row[name] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("changes", [{"objective": "dpo"}, {"objective": "chipo"}, PROBE], ids=["dpo", "chipo", "rbrm"])
def test_old_samples_say_nothing_of_the_policy(changes, tmp_path, make_model, tokenizer, prompts):
    trainer = online(
        tmp_path, make_model(), tokenizer, prompts, resample=False, learning_rate=3e-2, rounds=3, **changes
    )
    first, *rest = trainer.train()
    assert first["concentrability/log_mean"] == 0 and first["concentrability/mean"] == 1 and "reward" in first
    for row in rest:
        assert not any(name.startswith("concentrability") or name == "reward" for name in row)
        assert row["generated_tokens"] == 0


@pytest.mark.parametrize("changes", [{"temperature": 0.5}, {"top_p": 0.9}], ids=["temperature", "top_p"])
def test_samples_of_another_sampler_do_not_tell_the_distance(changes, tmp_path, make_model, tokenizer, prompts):
    """Their mean log-ratio is no KL of the policy, and can be below 0."""
    for row in online(tmp_path, make_model(), tokenizer, prompts, rounds=2, **changes).train():
        assert "reward" in row and not any(name.startswith("concentrability") for name in row)


def test_the_distance_from_the_start_is_that_of_the_policys_own_samples(tmp_path, make_model, tokenizer, prompts):
    """KL cannot be negative: its mean over many samples of the policy is above 0 by many standard errors."""
    options = {"learning_rate": 3e-2, "rounds": 2, "prompts_per_round": 64, "samples_per_prompt": 8}
    trainer = online(tmp_path, make_model(), tokenizer, prompts, **options)
    _, second = trainer.train()
    assert second["concentrability/log_mean"] > 0.1
    assert second["concentrability/mean"] > 1


# ---- the probe's prompts


def test_the_reward_is_asked_for_the_prompts_that_teach_and_no_other(tmp_path, make_model, tokenizer, prompts):
    asked = []
    score = lambda prompts, completions, **_: asked.extend(prompts) or reward(prompts, completions)  # noqa: E731
    trainer = online(tmp_path / "a", make_model(), tokenizer, prompts, score, rounds=2, resample=False, **PROBE)
    history = trainer.train()
    assert len(set(asked)) == 10 and len(asked) == 80
    assert "probe/agrees_with_reward" not in history[0] and history[0]["unscored"] == 0
    asked.clear()
    audited = online(
        tmp_path / "b", make_model(), tokenizer, prompts, score, rounds=2, resample=False, probe_audit=True, **PROBE
    )
    found = audited.train()
    assert len(set(asked)) == 16 and 0 <= found[1]["probe/agrees_with_reward"] <= 1
    # To look is not to touch: the same pairs, and the same weights.
    for one, other in zip(trainer.model.parameters(), audited.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("resample", [True, False])
def test_a_prompt_that_has_taught_is_never_ranked(resample, tmp_path, make_model, tokenizer, prompts):
    """40 rows of 20 different prompts, so that prompts come back within a round and in later ones."""
    few = Dataset.from_list([dict(prompts[i % 20]) for i in range(40)])
    trainer = online(
        tmp_path,
        make_model(),
        tokenizer,
        few,
        rounds=2,
        resample=resample,
        **{**PROBE, "probe_prompts": 7, "prompts_per_round": 24},
    )
    taught, ranked = set(), set()
    teach = trainer._teach_probe

    def watched(hidden, rewards):
        assert len(rewards) >= 7
        return teach(hidden, rewards)

    trainer._teach_probe = watched
    for k in range(2):
        texts = [few[i]["prompt"] for i in trainer._places(k)]
        taught |= {t for t, teaches in zip(texts, trainer._teachers(k), strict=True) if teaches}
    trainer.train()
    for k in range(2):
        rows = [json.loads(line) for line in (tmp_path / f"rounds/{k}/pairs.jsonl").read_text().splitlines()]
        ranked |= {tokenizer.decode(row["prompt_ids"], skip_special_tokens=True).replace(" ", "") for row in rows}
    first_round = {
        few[i]["prompt"] for i, teaches in zip(trainer._places(0), trainer._teachers(0), strict=True) if teaches
    }
    assert len(first_round) == 7 and ranked and not ranked & first_round
    assert not resample or taught >= first_round


def test_when_every_prompt_has_taught_nothing_is_left_to_rank(tmp_path, make_model, tokenizer, prompts):
    few = prompts.select(range(12))
    trainer = online(
        tmp_path, make_model(), tokenizer, few, rounds=9, **{**PROBE, "probe_prompts": 8, "prompts_per_round": 9}
    )
    with pytest.raises(ValueError, match="each of its prompts has taught the probe"):
        trainer.train()


# ---- pairs in the trainer


def pairs(rows):
    return Dataset.from_list(
        [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a + 20)} for a in range(rows)]
    )


def dpo(folder, make_model, tokenizer, data, **changes):
    ref = changes.pop("ref_model", make_model(1))
    return BandDPOTrainer(
        model=make_model(), ref_model=ref, train_dataset=data, processing_class=tokenizer,
        args=BandDPOConfig(str(folder), objective="dpo", **{**COMMON, "max_steps": 1, **changes}),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated")
def test_pairs_that_max_length_drops_or_cuts_are_counted(tmp_path, make_model, tokenizer):
    data = Dataset.from_list([*pairs(4), {"prompt": "1+1+1+1+1+1+1=", "chosen": "7", "rejected": "8"},
                              {"prompt": "2+2=", "chosen": "4444444444", "rejected": "5"}])  # fmt: skip
    with pytest.warns(UserWarning, match="max_length=9 drops 1 of 6 pairs, whose prompts fill it, and cuts 1"):
        dpo(tmp_path, make_model, tokenizer, data, max_length=9)


def test_no_pair_left_is_an_error_that_says_why(tmp_path, make_model, tokenizer):
    with pytest.raises(ValueError, match="none of 4 pairs is left, each prompt fills max_length=3"):
        dpo(tmp_path, make_model, tokenizer, pairs(4), max_length=3)


def test_a_cut_that_makes_both_sides_equal_is_an_error(tmp_path, make_model, tokenizer):
    data = Dataset.from_list([{"prompt": "1+1=", "chosen": "222223", "rejected": "222224"}] * 3 + list(pairs(2)))
    with pytest.raises(ValueError, match="max_length=8 makes chosen and rejected equal in 3 of 5 pairs"):
        dpo(tmp_path, make_model, tokenizer, data, max_length=8)


def test_reference_log_probs_save_the_reference_model(tmp_path, make_model, tokenizer, monkeypatch):
    data = pairs(4).map(lambda _: {"ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0})
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a model is loaded"))
    trainer = dpo(tmp_path / "a", make_model, tokenizer, data, ref_model=None)
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["ref_chosen_logps"] == -5).all()
    trainer.train()
    with pytest.raises(ValueError, match="give one of the two"):
        dpo(tmp_path / "b", make_model, tokenizer, data)


def test_reference_log_probs_of_pairs_that_are_cut_are_refused(tmp_path, make_model, tokenizer):
    data = pairs(4).map(lambda _: {"ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0})
    with pytest.raises(ValueError, match=r"4 of 4 pairs are longer than max_length=6, and their reference log-probs"):
        dpo(tmp_path, make_model, tokenizer, data, max_length=6, ref_model=None)


# ---- titles


def test_a_run_is_named_by_its_method(tmp_path, make_model, tokenizer, prompts):
    args = OnlinePreferenceConfig(str(tmp_path), **{**COMMON, **ROUNDS})
    run = RunConfig(method="online-dpo", task="countdown")
    assert PreferenceRun(run, args, make_model(), tokenizer, prompts, reward, None, Progress()).name == "online-dpo"
