"""Verdicts on made-up results whose answer is known, and the bandit's planes against closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bandpo import OBJECTIVES, Band
from bandpo.lab.comparison import sweeps
from bandpo.lab.comparison.claims import FAILS, HOLDS, OPPOSED, PARTLY, UNDECIDED, UNMEASURED, claims, duels
from bandpo.lab.comparison.exact import Tree, run_tree
from bandpo.lab.comparison.plan import ABLATIONS, KL_TARGET, Arm, Plan, report_arms

NOISE = np.random.default_rng(0).normal(0, 0.01, (4, 10))


def summary_of(tasks):
    """`{task: {arm: mean@4}}` with the same noise of runs under every arm, and a little of its own."""
    rng = np.random.default_rng(1)
    made = {}
    for task, arms in tasks.items():
        shared = rng.normal(0, 0.05, 10)
        made[task] = {
            "values": {
                label: {
                    name: (level + shared + rng.normal(0, 0.002, 10)).tolist()
                    for name in ("mean@4", "pass@4", "entropy", "rare clipped")
                }
                for label, level in arms.items()
            }
        }
    return {"tasks": made, "sweeps": {}}


def named(found, words):
    [claim] = [c for c in found if words in c.text]
    return claim


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (((0.5, 0.4), (0.5, 0.4)), HOLDS),
        (((0.5, 0.4), (0.4, 0.4)), PARTLY),
        (((0.4, 0.4), (0.4, 0.4)), FAILS),
        (((0.3, 0.4), (0.4, 0.4)), OPPOSED),
        (((0.5, 0.4), (0.3, 0.4)), FAILS),
    ],
)
def test_a_verdict_follows_from_the_sign_on_every_task(levels, expected):
    tasks = {f"t{i}": {"bandpo-kl": band, "grpo": clip} for i, (band, clip) in enumerate(levels)}
    claim = named(claims(summary_of(tasks)), "BandPO's mean@k is better than GRPO's")
    assert claim.verdict == expected
    assert len(claim.evidence) == 2
    assert all(line.startswith(f"t{i}, mean@4: ") for i, line in enumerate(claim.evidence))
    for line, (band, clip) in zip(claim.evidence, levels, strict=True):
        assert float(line.split(": ")[1].split(" ")[0]) == pytest.approx(band - clip, abs=0.005)


def test_what_was_not_run_has_no_verdict_and_too_few_seeds_have_none_either():
    found = claims(summary_of({"t": {"bandpo-kl": 0.5, "grpo": 0.4}}))
    assert named(found, "Clip-Higher's").verdict == UNMEASURED
    assert named(found, "rare best action").verdict == UNMEASURED
    few = summary_of({"t": {"bandpo-kl": 0.5, "grpo": 0.4}})
    for measures in few["tasks"]["t"]["values"].values():
        for name in measures:
            measures[name] = measures[name][:5]  # 2 / 2^5 > 0.05
    claim = named(claims(few), "keeps the entropy")
    assert claim.verdict == UNDECIDED
    assert claim.evidence[0] == "5 seeds cannot reach p < 0.05"


def moved(beyond, against):
    """A measurement of one rarity, one rate and two reuses."""
    return {
        "rarities": [0.01], "rates": [0.1], "reuse": [[1, 1], [2, 4]], "seeds": 100, "drawn": [50], "versions": "made up",
        "beyond": {"grpo": [[beyond]]}, "against": {"bandpo-kl": [[against]]},
        "median": {"grpo": [[[1.1, 1.3]]]}, "high": {"grpo": [[[1.15, 1.5]]]},
    }  # fmt: skip


NONE, SOME, MANY = [0.0, 0.0, 0.07], [0.06, 0.02, 0.15], [0.8, 0.67, 0.89]
SAME, MORE, LESS, OPEN = [0.0, 0.0, 0.0], [0.1, 0.05, 0.15], [-0.1, -0.15, -0.05], [0.1, -0.1, 0.3]


@pytest.mark.parametrize(
    ("beyond", "expected"),
    [((NONE, NONE), HOLDS), ((NONE, SOME), HOLDS), ((NONE, MANY), FAILS), ((MANY, NONE), FAILS)],
)
def test_a_clip_bounds_an_update_unless_tokens_are_measured_beyond_it(beyond, expected):
    claim = named(claims({"tasks": {}, "realised": moved(list(beyond), [SAME, SAME])}), "gain at most ε·p")
    assert claim.verdict == expected
    assert "2 epochs of 4 steps: ratio 1.3 in the median, 1.5 at 95%" in claim.evidence[-1]


@pytest.mark.parametrize(("difference", "expected"), [(MORE, HOLDS), (LESS, OPPOSED), (OPEN, FAILS)])
def test_the_gain_under_the_band_is_judged_where_there_are_several_steps(difference, expected):
    found = claims({"tasks": {}, "realised": moved([NONE, NONE], [SAME, difference])})
    assert named(found, "gains more in an update").verdict == expected


def test_mixed_and_partial_gains():
    two = moved([NONE, NONE], [MORE, LESS])
    two["reuse"] = [[1, 4], [2, 4]]
    assert named(claims({"tasks": {}, "realised": two}), "gains more").verdict == FAILS
    two["against"]["bandpo-kl"] = [[[MORE, OPEN]]]
    assert named(claims({"tasks": {}, "realised": two}), "gains more").verdict == PARTLY
    assert named(claims({"tasks": {}}), "gains more").verdict == UNMEASURED


def test_the_table_of_the_theory_page_is_the_measurement():
    docs = Path(__file__).parents[2] / "docs"
    found, page = json.loads((docs / "evidence.json").read_text())["realised"], (docs / "theory.md").read_text()
    assert found["rarities"][0] == 0.01
    for j, rate in enumerate(found["rates"]):
        for k, (epochs, steps) in enumerate(found["reuse"]):
            cells = [
                f"{found['median'][name][0][j][k]:.2f}, {found['high'][name][0][j][k]:.2f}, "
                f"{found['beyond'][name][0][j][k][0]:.0%}"
                for name in ("grpo", "bandpo-kl", "no-clip")
            ]
            assert (f"| {rate:g} | {epochs} x {steps} | {' | '.join(cells)} |" in page) == (epochs > 1)


def test_duels_correct_over_all_pairs_of_a_measure():
    arms = {"bandpo-kl": 0.5, "bandpo-tv": 0.4, "grpo": 0.4, "no-clip": 0.3}
    found = duels(summary_of({"t": arms}))["t"]["mean@4"]
    assert set(found) == {(b, r) for b in ("bandpo-kl", "bandpo-tv") for r in ("grpo", "no-clip")}
    assert found["bandpo-kl", "grpo"].mean.value == pytest.approx(0.1, abs=0.005)
    assert found["bandpo-kl", "grpo"].p_holm == pytest.approx(4 * 2 / 1024)  # ten pairs of one sign, four tests
    assert found["bandpo-tv", "grpo"].p_holm > 0.05
    assert duels(summary_of({"t": {"grpo": 0.4}})) == {}


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


def test_the_evidence_pages_are_what_their_json_says():
    from bandpo.lab.comparison.report import evidence_pages, evidence_pictures

    docs = Path(__file__).parents[2] / "docs"
    summary = json.loads((docs / "evidence.json").read_text())
    pages = {name: (docs / name).read_text() for name in ("evidence.md", "evidence-data.md")}
    assert evidence_pages(summary) == pages
    assert summary["failures"] == summary["incomplete"] == []
    assert {row["runs"] for found in summary["tasks"].values() for row in found["table"].values()} == {10}
    files = {file for _, file, _ in evidence_pictures(summary)}
    assert {p.name for p in (docs / "assets" / "evidence").iterdir()} == files
    assert all("".join(pages.values()).count(f"assets/evidence/{file})") == 1 for file in files)
