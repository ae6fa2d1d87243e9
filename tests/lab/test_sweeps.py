"""The arms of a comparison, and the bandit's planes against closed forms and simulations."""

import numpy as np
import pytest
from scipy import stats

from bandpo import OBJECTIVES, Band
from bandpo.lab.comparison import sweeps
from bandpo.lab.comparison.exact import Tree, run_tree
from bandpo.lab.comparison.plan import ABLATIONS, KL_TARGET, Arm, Plan, report_arms

NOISE = np.random.default_rng(0).normal(0, 0.01, (4, 10))


def test_every_ablation_changes_one_thing():
    base = OBJECTIVES["bandpo-kl"].bounds
    assert isinstance(base, Band)
    for name in ABLATIONS:
        built = Arm("bandpo-kl", name).build()
        assert built.bounds != base
        assert built.surrogate is OBJECTIVES["bandpo-kl"].surrogate
    assert Arm("bandpo-kl", "4δ").build().bounds.radius == pytest.approx(0.2)
    assert Arm("bandpo-kl", "no cap").build().bounds.max_ratio is None


def test_a_kl_penalty_gets_an_arm_whose_beta_adapts():
    arms = report_arms(Plan(("ppo-kl", "grpo"), ("paths",), (0,), tuning_seeds=0, ablations=False))
    targets = {arm.label: arm.kl_target for arm in arms}
    assert targets == {"ppo-kl": None, "grpo": None, "no-clip": None, "ppo-kl adaptive": KL_TARGET}
    assert Arm("ppo-kl", "adaptive").build() == OBJECTIVES["ppo-kl"]


def test_expected_best_of_random_settings_against_a_simulation():
    values = np.array([0.1, 0.7, 0.3, 0.9, 0.2])
    draws = np.random.default_rng(0).choice(values, (200_000, max(sweeps.TRIALS)))
    for n, expected in zip(sweeps.TRIALS, sweeps.best_of(values), strict=True):
        best = draws[:, :n].max(1)
        assert expected == pytest.approx(best.mean(), abs=5 * best.std() / np.sqrt(len(best)) + 1e-12)


def test_the_interval_of_a_share_is_the_normal_one():
    x = NOISE > 0
    for row, (mean, low, high) in zip(x, sweeps._normal(x.astype(float)), strict=True):
        expected = stats.norm.interval(0.95, row.mean(), row.std(ddof=1) / np.sqrt(len(row)))
        assert (mean, low, high) == pytest.approx((row.mean(), *expected))


def test_with_one_step_a_batch_no_region_does_anything():
    found = sweeps.regimes(("grpo", "bandpo-kl", "no-clip"), seeds=20)
    assert found["reuse"][0] == (1, 1)
    first = [commit[0] for commit in found["commit"].values()]
    assert first[0] == first[1] == first[2]
    assert not np.array(found["against"]["bandpo-kl"])[0].any()
    assert found["commit"]["grpo"][2][0] == 1.0  # a common best arm is found by all


def test_a_stale_sampler_is_the_same_at_first_and_another_later():
    runs = {lag: run_tree(Tree(), OBJECTIVES["grpo"], batches=4, seeds=20, lag=lag).curve for lag in (0, 1)}
    assert (runs[0][0] == runs[1][0]).all()
    assert (runs[0][2] != runs[1][2]).any()
    with pytest.raises(ValueError, match="lag must be at least 0, got -1"):
        run_tree(Tree(), OBJECTIVES["grpo"], lag=-1)
