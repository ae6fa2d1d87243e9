"""Components and names of the core that have moved or changed their name: the old ones work, with a warning."""

import pickle

import pytest
import torch

import bandpo
from bandpo import Clip, Objective, bounds, experimental, losses, match_radius, surrogates
from bandpo._inputs import needs

X = torch.linspace(-0.4, 0.4, 21)
BATCH = {"log_ratio": X, "old_logprobs": X - 1, "advantages": X.sign()}


@pytest.mark.parametrize(
    ("module", "name", "new"),
    [
        (surrogates, "clip_cov", "experimental.clip_cov"), (surrogates, "kl_cov", "experimental.kl_cov"),
        (surrogates, "log_stabilized", "experimental.log_stabilized"),
        (surrogates.sequence, "clip_cov", "experimental.clip_cov"), (surrogates.sequence, "kl_cov", "experimental.kl_cov"),
        (surrogates.token, "log_stabilized", "experimental.log_stabilized"),
        (bounds, "Elastic", "experimental.Elastic"), (bounds, "Balanced", "experimental.Balanced"),
        (bounds.regions, "Elastic", "experimental.Elastic"), (bounds.regions, "Balanced", "experimental.Balanced"),
        (bounds, "clip_fraction", "bounds.outside_fraction"), (bounds.calibration, "clip_fraction", "bounds.outside_fraction"),
        (losses, "compile", "losses.compiled"), (bandpo, "compile", "losses.compiled"),
        (bandpo, "clip_fraction", "bounds.outside_fraction"),
    ],
)  # fmt: skip
def test_the_old_name_is_the_new_object_and_warns(module, name, new):
    home, _, attribute = new.rpartition(".")
    want = getattr({"experimental": experimental, "bounds": bounds, "losses": losses}[home], attribute)
    with pytest.warns(
        FutureWarning, match=rf"{module.__name__}\.{name} is now bandpo\.{new}; the old name works up to"
    ) as said:
        assert getattr(module, name) is want
    assert said[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_a_pickle_from_before_the_move_is_read():
    text = pickle.dumps(experimental.Elastic(0.1), protocol=0).replace(
        b"cbandpo.experimental", b"cbandpo.bounds.regions"
    )
    with pytest.warns(FutureWarning, match="Elastic is now bandpo.experimental.Elastic"):
        assert pickle.loads(text) == experimental.Elastic(0.1)


def test_the_mark_of_inputs_has_no_effect_and_warns():
    assert bandpo.needs is needs

    with pytest.warns(FutureWarning, match=r"@needs\(...\) is now a keyword-only parameter without a default") as said:

        @needs("old_logprobs")
        def mine(log_ratio, advantages, bounds, *, bonus):
            return log_ratio * advantages + bonus

    assert said[0].filename == __file__
    assert Objective(bounds=Clip(), surrogate=mine).surrogate_inputs == ("bonus",)


def test_the_old_measure_of_a_radius_warns():
    with pytest.warns(FutureWarning, match=r"by='clip_fraction'\) is now match_radius\(by='outside_fraction'\)"):
        found = match_radius("kl", like=Clip(0.2), by="clip_fraction", batch=BATCH)
    assert found == match_radius("kl", like=Clip(0.2), by="outside_fraction", batch=BATCH)
