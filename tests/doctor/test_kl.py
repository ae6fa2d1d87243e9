"""What the doctor says about the KL to the reference in files of TRL and verl."""

import pytest

from bandpo.doctor import examine_setup
from bandpo.doctor.trl import read_trl
from bandpo.doctor.verl import read_verl

ACTOR = "actor_rollout_ref.actor."


def found(setup):
    return [f for f in examine_setup(setup) if f.rule == "kl"]


@pytest.mark.parametrize(
    ("given", "level", "words"),
    [
        ({"num_generations": 8}, None, ""),
        ({"beta": 0.04, "num_generations": 8}, "ok", "use_bias_correction_kl=True), the k3-ratio"),
        ({"beta": 0.04, "use_bias_correction_kl": False, "num_generations": 8}, "note", "the k3"),
        ({"beta": 0.04, "importance_sampling_level": "sequence", "num_generations": 8}, "warning", "use_bias_corr"),
        ({"objective": "bandpo-kl"}, None, ""),
        ({"objective": "bandpo-kl-paper"}, "note", "0.001 (beta=0.001, kl=k3), the k3"),
        ({"objective": "bandpo-kl-paper", "beta": 0}, None, ""),
        ({"objective": "gspo", "beta": 0.1}, "ok", "the k3-ratio"),
        ({"objective": "gspo", "beta": 0.1, "kl": "k1"}, "warning", "plain k1"),
    ],
)  # fmt: skip
def test_trl(given, level, words):
    findings = found(read_trl(given))
    assert [f.level for f in findings] == ([] if level is None else [level])
    assert all(words in f.seen for f in findings)


@pytest.mark.parametrize(
    ("given", "level", "words"),
    [
        ([], None, ""),
        (["use_kl_loss=True"], "note", "0.001 (kl_loss_type='low_var_kl'), the k3"),
        (["use_kl_loss=True", "kl_loss_type=low_var_kl+"], "note", "the k3-unbiased"),
        (["use_kl_loss=True", "kl_loss_type=kl"], "warning", "plain k1"),
        (["use_kl_loss=True", "kl_loss_type=abs"], "warning", "abs"),
        (["use_kl_loss=True", "kl_loss_type=$KIND"], "note", "not known"),
        (["use_kl_loss=$IT"], "note", "not known"),
    ],
)
def test_verl(given, level, words, tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(
        "python -m verl.trainer.main_ppo " + " ".join([f"{ACTOR}ppo_epochs=2", *(ACTOR + x for x in given)])
    )
    findings = found(read_verl(script))
    assert [f.level for f in findings] == ([] if level is None else [level])
    assert all(words in f.seen for f in findings)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ([], "has a KL to the reference"),
        (["use_kl_loss=True"], ""),
        (["use_kl_loss=True", "kl_loss_coef=0.1"], "kl_loss_coef=0.1"),
        (["use_kl_loss=$IT"], ""),
    ],
)
def test_what_the_adapter_would_refuse(given, refused, tmp_path):
    mode = f"{ACTOR}policy_loss.loss_mode=bandpo:bandpo-kl-paper"
    script = tmp_path / "run.sh"
    script.write_text("python -m verl.trainer.main_ppo " + " ".join([mode, *(ACTOR + x for x in given)]))
    setup = read_verl(script)
    assert refused in setup.refused and bool(setup.refused) == bool(refused)
