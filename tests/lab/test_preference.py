"""The preference experiments: rates and directions that theory asks for, and the committed results."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from bandpo.cli import main
from bandpo.lab.experiments import preference
from bandpo.lab.experiments.preference_figures import FIGURES

PUBLISHED = Path(__file__).parents[2] / "docs" / "preference.json"


def mean(rows):
    return np.array([np.mean(r) for r in rows])


@pytest.fixture(scope="module")
def published():
    return json.loads(PUBLISHED.read_text())


# φ(z) and dφ/dΔ = z φ'(z), by hand
LINKS = {
    "log": (np.log, lambda z: np.ones_like(z)),
    "chi2-kl": (lambda z: z + np.log(z), lambda z: z + 1),
    "chi2": (lambda z: z - 1, lambda z: z),
    "forward-kl": (lambda z: 1 - 1 / z, lambda z: 1 / z),
    "js": (lambda z: np.log(2 * z / (1 + z)), lambda z: 1 / (1 + z)),
}


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_weights_of_both_sides_of_a_link_are_the_closed_forms(beta):
    found = preference.link_weights(beta=beta)
    delta = np.array(found["delta"])
    assert set(found["links"]) == set(LINKS) and delta[0] == -8 and delta[-1] == 8
    for name, (phi, slope) in LINKS.items():

        def pull(d, sign, phi=phi, slope=slope):
            """σ(-h) φ' over ½, with h = ±β(φ(e^d) - φ(1)): the moving side is the first or the second of the pair."""
            z = np.exp(d)
            return 2 * slope(z) * scipy.special.expit(-sign * beta * (phi(z) - phi(1.0)))

        curves = found["links"][name]
        for side, sign in (("chosen", 1), ("rejected", -1)):
            np.testing.assert_allclose(curves[side], pull(delta, sign), rtol=1e-10, err_msg=f"{name} {side}")
            end = curves["end"][side]
            where = scipy.optimize.brentq(
                lambda d, sign=sign: pull(d, sign) - 0.01, *sorted((sign * 0.5, sign * 100.0))
            )
            assert end == pytest.approx(where, rel=1e-3), (name, side)  # steps of the grid are 0.07%


def test_the_page_has_the_ends_of_the_links(published):
    page = (PUBLISHED.parent / "preference.md").read_text()
    rows = {
        "log": "log z (DPO)",
        "chi2-kl": "z + log z (χPO)",
        "js": "log(2z/(1 + z))",
        "chi2": "z - 1",
        "forward-kl": "1 - 1/z",
    }
    for name, title in rows.items():
        end = published["links"]["links"][name]["end"]
        said = [
            f"e^{abs(d):.0f}" if abs(d) > 10 else f"{math.exp(abs(d)):.0f}" for d in (end["chosen"], end["rejected"])
        ]
        assert f"| {title} | {said[0]} | {said[1]} |" in page, (title, said)


def test_regret_falls_like_one_over_log_n_for_dpo_and_polynomially_for_chipo():
    found = preference.best_beta_regret()
    n, dpo, chipo = np.array(found["n"]), np.array(found["dpo"]), np.array(found["chipo"])
    scaled = dpo * np.log(n)
    assert scaled.min() > 0.3 and scaled.max() < 0.5  # DPO: regret x log n is bounded from both sides over six decades
    assert (np.diff(np.log(chipo)) / np.diff(np.log(n)) < -0.5).all()  # χPO: faster than 1/√n everywhere
    # The first trials' numbers, from an implementation with scipy's Lambert W.
    np.testing.assert_allclose(dpo, [0.1027, 0.0625, 0.0439, 0.0269, 0.0191], atol=6e-5)
    np.testing.assert_allclose(chipo, [0.0613, 0.0124, 0.00206, 4.4e-5, 7.7e-7], rtol=0.01)


def test_dpo_runs_away_from_its_reference_and_chipo_does_not():
    found = preference.concentrability_over_epochs(seeds=3, betas=(0.5,), epochs=(100, 400))
    dpo, chipo = (mean(c["concentrability"]) for c in found["curves"])
    assert dpo[1] / dpo[0] > 2 and chipo[1] / chipo[0] < 2
    assert dpo[1] > 3 * chipo[1]


def test_on_policy_pairs_cover_the_target_and_old_ones_do_not():
    found = preference.coverage_by_round(seeds=3, settings=((5.0, 2000),), rounds=4)["settings"][0]
    on, hybrid = mean(found["coverage"]["on-policy"]), mean(found["coverage"]["hybrid"])
    assert on[0] > 20 and on[-1] < 5 and hybrid[1] < 3  # from the skewed reference to near the target
    assert (mean(found["coverage"]["off-policy"]) == on[0]).all()
    assert mean(found["error"]["on-policy"])[-1] < mean(found["error"]["off-policy"])[-1]


def test_labels_cost_one_over_n_and_probabilities_nothing():
    found = preference.labels_against_distillation(seeds=8, sizes=(200, 5000))
    labels = mean(found["labels"])
    slope = math.log(labels[1] / labels[0]) / math.log(25)
    assert -1.5 < slope < -0.6
    assert mean(found["distillation"]).max() < 1e-12


def test_rebel_goes_past_the_target_and_calibration_stops():
    found = preference.calibration_by_round(seeds=4, rounds=8)
    rebel, between, at = (mean(c) for c in found["curves"].values())
    assert (np.diff(rebel) > 0).all()
    assert rebel[-1] > between[-1] > 0.01
    assert at.max() < 1e-6


def test_published_results_have_the_directions_and_sizes_that_the_page_states(published):
    assert all("command" in e and "seconds" in e for e in published.values())
    curves = {(c["objective"], c["beta"]): mean(c["concentrability"]) for c in published["concentrability"]["curves"]}
    for beta in (0.5, 0.05):
        dpo, chipo = curves["dpo", beta], curves["chipo", beta]
        assert dpo[-1] / dpo[-3] > 3 and chipo[-1] / chipo[-3] < 2  # steps 200 to 800
    for setting in published["coverage"]["settings"]:
        assert mean(setting["coverage"]["on-policy"])[-1] < 2
    hard = published["coverage"]["settings"][0]["error"]
    assert mean(hard["off-policy"])[-1] > 1.5 * mean(hard["on-policy"])[-1]
    mild = published["coverage"]["settings"][1]["error"]
    assert mean(mild["off-policy"])[-1] < 1.3 * mean(mild["on-policy"])[-1]  # little to gain where the skew is mild
    for row in published["design"]["designs"]:
        assert abs(row["conditional"] - row["d"]) < 1e-2 and row["leverage"] <= row["bound"]
    arms = published["reranking"]["arms"]
    assert len(arms["online"]["after"]) >= 5
    tokens = {name: np.mean(rows["tokens"]) for name, rows in arms.items()}
    assert tokens["online"] > 5 * tokens["re-ranked"]
    for name, rows in arms.items():
        assert np.mean(rows["after"]) > np.mean(rows["before"]) + 0.2, name
        assert not rows["probe"] or np.mean(rows["probe"]) > 0.9  # the probe ranks as the reward does


def test_the_exact_experiment_is_the_published_one(published):
    found = preference.best_beta_regret()
    np.testing.assert_allclose(found["chipo"], published["regret"]["chipo"], rtol=1e-6)


def test_figures_are_drawn_from_the_published_results(published):
    for name, found in published.items():
        assert FIGURES[name](found).axes[0].get_title()


def test_command_line(tmp_path, capsys):
    assert main(["lab", "preference", "--only", "design,regret", "--output", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"design.json", "design.png", "regret.json", "regret.png"}
    assert "bandpo" in json.loads((tmp_path / "design.json").read_text())
    assert main(["lab", "preference", "--only", "nope"]) == 2
    assert "choose from links, regret" in capsys.readouterr().err
    assert main(["lab", "preference", "--seeds", "1"]) == 2
