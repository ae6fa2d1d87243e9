"""An objective of a user in the trainer: by import path or as an object, in the configuration or in the trainer."""

import copy
import dataclasses
import pickle

import pytest
import torch

from bandpo import JS, KL, OBJECTIVES, Band, Clip, FDivergence, Objective, policy_loss
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.integrations.trl.kept import KeptObjective
from own_objective import BAND, FADES, OF_SEQUENCES
from trl_runs import band_trainer, loss_and_gradient, reward, rollout, settings, token_logprobs

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of"
)

FIELDS = ("loss_type", "scale_rewards", "importance_sampling_level", "beta", "kl", "use_bias_correction_kl")


def config(folder, **changes):
    return BandGRPOConfig(**settings(folder, **changes))


def fields_of(args):
    return {name: getattr(args, name) for name in FIELDS}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("BAND", ("dapo", "none", "token")),
        ("FADES", ("dr_grpo", "none", "token")),
        ("OF_SEQUENCES", ("grpo", "group", "sequence")),
    ],
)
def test_fields_of_trl_follow_the_objective_however_it_is_given(name, fields, tmp_path):
    own = {"BAND": BAND, "FADES": FADES, "OF_SEQUENCES": OF_SEQUENCES}[name]
    named, given = config(tmp_path, objective=f"own_objective:{name}"), config(tmp_path, objective=own)
    plain = config(tmp_path)
    before = fields_of(plain)
    followed = plain.following(own)
    for args in (named, given, followed):
        assert tuple(fields_of(args).values())[:3] == fields
        assert fields_of(args) == fields_of(named)
        assert args.resolve() == own
    assert fields_of(plain) == before and plain.objective == "bandpo-kl"  # the caller's is as it was
    assert given.objective == followed.objective == f"{own.name} (an Objective object)"
    assert config(tmp_path).following(OBJECTIVES["dapo"]).objective == "dapo"


@pytest.mark.parametrize("how", ["name", "config", "trainer"])
@pytest.mark.parametrize("name", ["BAND", "FADES", "OF_SEQUENCES"])
def test_the_gradient_is_that_of_policy_loss(name, how, make_model, tokenizer, prompts, tmp_path):
    own = {"BAND": BAND, "FADES": FADES, "OF_SEQUENCES": OF_SEQUENCES}[name]
    changes = {"name": {"objective": f"own_objective:{name}"}, "config": {"objective": own}, "trainer": {}}[how]
    trainer = BandGRPOTrainer(
        model=make_model(), reward_funcs=reward, args=config(tmp_path, **changes), train_dataset=prompts,
        processing_class=tokenizer, objective=own if how == "trainer" else None,
    )  # fmt: skip
    inputs = rollout(tokenizer)
    loss, gradient, _ = loss_and_gradient(trainer, inputs)
    trainer.model.zero_grad()
    want, _ = policy_loss(
        logprobs=token_logprobs(trainer.model, inputs), old_logprobs=inputs["old_per_token_logps"],
        advantages=inputs["advantages"], mask=inputs["completion_mask"], objective=own,
        max_length=6 if own is FADES else None,
    )  # fmt: skip
    want.backward()
    want_gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert want_gradient.abs().max() > 1e-3
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-6)
    # and the advantages are those that the objective asks for
    assert trainer.scale_rewards == ("group" if own is OF_SEQUENCES else "none")


@pytest.mark.parametrize(
    ("changes", "own", "words"),
    [
        ({"loss_type": "grpo"}, BAND, r"loss_type='grpo' \(aggregation='seq-mean-token-mean'\), and the objective has "
         r"aggregation='token-mean'\. Leave loss_type out.*replace\(objective, aggregation='seq-mean-token-mean'\)"),
        ({"scale_rewards": "group"}, BAND, r"scale_rewards='group', and the objective has advantage='mean'.*"
         r"advantage='std'"),
        ({"scale_rewards": True}, BAND, r"scale_rewards='group', and the objective has advantage='mean'"),
        ({"importance_sampling_level": "token"}, OF_SEQUENCES, "importance_sampling_level='token', and the objective has "
         "ratio_level='sequence'"),
        ({"radius": 0.3}, BAND, r"radius=0.3, and the objective has bounds=Band\(.*radius=0.02.*make it with the bounds"),
        ({"objective": "grpo", "epsilon": 0.3}, OF_SEQUENCES, r"epsilon=0.3, and the objective has bounds=Clip\(low=0.1"),
        ({"beta": 0.1}, OBJECTIVES["bandpo-kl-paper"], r"beta=0.1, and the objective has kl_coef=0.001.*kl_coef=0.1"),
        ({"kl": "k2"}, OBJECTIVES["bandpo-kl-paper"], r"kl='k2', and the objective has kl="),
        ({"use_bias_correction_kl": True}, dataclasses.replace(BAND, kl_coef=0.1, kl="k3"),
         r"use_bias_correction_kl=True, and the objective has kl='k3'"),
    ],
)  # fmt: skip
def test_what_contradicts_an_object_is_refused_with_both_values(changes, own, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **changes).following(own)
    if "objective" not in changes:
        with pytest.raises(ValueError, match=words):
            config(tmp_path, objective=own, **changes)


def test_every_contradiction_is_in_one_message(make_model, tokenizer, prompts, tmp_path):
    with pytest.raises(
        ValueError, match=r"loss_type='grpo'.*scale_rewards='group'.*Leave loss_type, scale_rewards out"
    ):
        band_trainer(tmp_path, make_model, tokenizer, prompts, objective=BAND, loss_type="grpo", scale_rewards="group")


def test_what_agrees_with_an_object_may_be_set(tmp_path):
    agree = {"loss_type": "bnpo", "scale_rewards": "none", "radius": 0.02, "importance_sampling_level": "token"}
    args = config(tmp_path, **agree).following(BAND)
    assert args.loss_type == "bnpo"  # a token mean too
    assert config(tmp_path, scale_rewards="batch").following(BAND).scale_rewards == "batch"
    assert config(tmp_path, beta=0.1).following(BAND).beta == 0.1  # it has no KL of its own


def test_a_field_that_was_changed_later_counts_as_set(tmp_path):
    args = config(tmp_path)
    args.loss_type = "dr_grpo"
    with pytest.raises(ValueError, match=r"loss_type='dr_grpo'"):
        args.following(BAND)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (Objective(bounds=Clip(), aggregation="token-sum"), "'token-sum', which no TRL loss_type does; give it"),
        (
            Objective(bounds=Clip(), advantage="leave-one-out"),
            r"no 'leave-one-out' advantages; give it advantage='std' or 'mean'",
        ),
    ],
)
def test_what_trl_cannot_do_is_refused_with_the_fix_for_an_object(own, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        config(tmp_path, objective=own)


def test_named_objectives_and_import_paths_still_take_options(tmp_path):
    args = config(tmp_path, objective="own_objective:BAND", loss_type="grpo", radius=0.3)
    assert (args.loss_type, args.resolve().radius) == ("grpo", 0.3)
    assert config(tmp_path, loss_type="dr_grpo").loss_type == "dr_grpo"


def test_an_object_without_a_pickle_goes_through_files_and_copies(make_model, tokenizer, prompts, tmp_path):
    own = Objective(bounds=Band(FDivergence("local", lambda u: 2 * (1 + u) - 4 * u.sqrt()), 0.02), name="local")
    args = config(tmp_path, objective=own)
    assert copy.deepcopy(args).resolve().name == "local"
    assert '"local (an Objective object)"' in args.to_json_string()
    again = pickle.loads(pickle.dumps(args))
    with pytest.raises(ValueError, match=r"local \(an Objective object\).* is unknown"):
        again.resolve()
    trainer = band_trainer(tmp_path, make_model, tokenizer, prompts, objective=own)
    trainer.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "training_args.bin").exists()
    assert trainer.args.objective == "local (an Objective object)"


# ---- checkpoints


def parted(shift=0.1):
    """An objective whose text is the same for each value of `shift`, as after a change of its code."""

    def surrogate(log_ratio, advantages, bounds):
        ratio = log_ratio.exp()
        inside = ratio.clamp(bounds.lower, bounds.upper)
        return advantages * (inside + shift * (ratio - inside))

    return Objective(bounds=Clip(0.2, 0.28), surrogate=surrogate, name="parted")


def trained(folder, make_model, tokenizer, prompts, objective, *, resume=None, **changes):
    common = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "logging_steps": 1, **changes}
    trainer = band_trainer(folder, make_model, tokenizer, prompts, objective=objective, **common)
    said = []
    trainer.say = said.append
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), said


def told(said):
    return [text for text in said if "objective" in text or "Objective" in text]


def test_an_own_objective_resumes_bit_for_bit_and_in_silence(make_model, tokenizer, prompts, tmp_path):
    whole, _ = trained(tmp_path, make_model, tokenizer, prompts, parted())
    again, said = trained(
        tmp_path / "again", make_model, tokenizer, prompts, parted(), resume=tmp_path / "checkpoint-1"
    )
    assert torch.equal(whole, again) and not told(said)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (parted(0.2), "Objective 'parted' computes other numbers for the same tokens"),
        (dataclasses.replace(parted(), bounds=Clip(0.1, 0.3)), r"bounds Clip\(low=0.2, high=0.28\) -> Clip\(low=0.1"),
        (OBJECTIVES["cispo"], "name 'parted' -> 'cispo'"),
        (dataclasses.replace(parted(), aggregation="seq-mean-token-mean"), "loss_type 'dapo' -> 'grpo'"),
    ],
)
def test_another_objective_after_a_resume_is_said(other, words, make_model, tokenizer, prompts, tmp_path):
    trained(tmp_path, make_model, tokenizer, prompts, parted(), max_steps=1)
    _, said = trained(tmp_path, make_model, tokenizer, prompts, other, resume=tmp_path / "checkpoint-1", max_steps=2)
    (text,) = told(said)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(text)


def test_inputs_that_the_half_used_rollout_does_not_have_are_refused(make_model, tokenizer, prompts, tmp_path):
    trained(tmp_path, make_model, tokenizer, prompts, parted(), max_steps=1)
    with pytest.raises(
        ValueError, match=r"objective 'troll' asks for inputs.*resume with the objective of the checkpoint"
    ):
        trained(tmp_path, make_model, tokenizer, prompts, OBJECTIVES["troll"], resume=tmp_path / "checkpoint-1")


def test_a_moving_radius_is_no_other_objective(make_model, tokenizer, prompts, tmp_path):
    moves = {"radius_schedule": "linear", "radius_end": 0.01}
    whole, _ = trained(tmp_path, make_model, tokenizer, prompts, BAND, **moves)
    again, said = trained(
        tmp_path / "again", make_model, tokenizer, prompts, BAND, resume=tmp_path / "checkpoint-2", **moves
    )
    assert torch.equal(whole, again) and not told(said)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_checkpoint_keeps_tells_named_objectives_apart(name, tmp_path):
    args = config(tmp_path)
    kept = KeptObjective(OBJECTIVES[name], args).state_dict()
    assert kept["numbers"]  # each can be computed
    assert KeptObjective(OBJECTIVES[name], args).changed_since(kept, half_used=True) is None
    assert not any(" at 0x" in text for text in kept["parts"].values())
    for other in OBJECTIVES:
        if other != name:
            assert KeptObjective(OBJECTIVES[other], args).changed_since(kept, half_used=False)


def test_old_and_damaged_states(tmp_path):
    kept = KeptObjective(Objective(bounds=Band(JS, 0.02)), config(tmp_path))
    assert kept.changed_since(None, half_used=True) is None  # a checkpoint of an earlier version
    for damaged in (3, {}, {"parts": {}, "inputs": 3, "numbers": []}):
        with pytest.raises(ValueError, match="not as it was saved"):
            kept.changed_since(damaged, half_used=True)

    def fails(log_ratio, advantages, bounds):
        raise RuntimeError("only on a Tuesday")

    silent = KeptObjective(Objective(bounds=Band(KL, 0.02), surrogate=fails), config(tmp_path))
    assert silent.state_dict()["numbers"] == [] and silent.changed_since(silent.state_dict(), half_used=True) is None


def test_the_numbers_draw_nothing_from_the_run(tmp_path):
    def noisy(log_ratio, advantages, bounds):
        return log_ratio.exp() * advantages * (1 + 0 * torch.rand(()))

    before = torch.random.get_rng_state()
    assert KeptObjective(Objective(bounds=Clip(), surrogate=noisy), config(tmp_path)).state_dict()["numbers"]
    assert torch.equal(before, torch.random.get_rng_state())
