"""`bandpo lab forks`: exact measures against enumeration, gradients against autograd, and what the page says of the data."""

import importlib.util
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bandpo import policy_loss
from bandpo.lab.experiments.arguments import add_arguments, run
from bandpo.lab.forks.figures import plot_map
from bandpo.lab.forks.plan import PRESETS, REPORT_SEED, TUNING_SEED, Cell, Store, tuned_rate
from bandpo.lab.forks.policy import Fork
from bandpo.lab.forks.regimes import ARMS, REGIMES, mixed
from bandpo.lab.forks.summary import compared, summarise_map
from bandpo.lab.forks.training import Batch, Schedule, loss, sample, train
from bandpo.statistics import Interval, t_interval, verdict

ROOT = Path(__file__).parents[2]
TINY = Fork(options=4, common=0.6, good=2, rare=0.1, common_solves=1, good_solves=2, types=3, certain=1, certainty=0.9)
SHORT = Schedule(rollouts=3, queries=4, group=4, epochs=2, minibatches=2)


def logits(fork, seed=0):
    noise = torch.randn(fork.places, fork.options, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return fork.start() + noise


def test_measures_are_those_of_enumeration():
    theta, solves = logits(TINY), TINY.solves()
    p = theta.softmax(-1)
    ways = list(itertools.product(range(4), repeat=2))
    chance = [p[0, a].item() * p[1, b].item() for a, b in ways]
    right = [[bool(solves[kind, a]) and b == 0 for a, b in ways] for kind in range(3)]
    found = TINY.measure(theta, k=2)
    assert found.mean.item() == pytest.approx(np.mean([np.dot(chance, row) for row in right]))
    passed = [
        sum(x * y for (x, i), (y, j) in itertools.product(zip(chance, row, strict=True), repeat=2) if i or j)
        for row in right
    ]
    assert found.passed.item() == pytest.approx(np.mean(passed))
    whole = -sum(x * math.log(x) for x in chance)
    assert found.token_entropy.item() == pytest.approx(whole / 2)  # places are independent
    assert found.right.item() == pytest.approx(p[1, 0].item())
    assert solves.tolist() == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, True, False],
    ]


def test_the_profile_is_that_of_a_language_model():
    for fork in REGIMES.values():
        p = fork.start().exp()
        torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=torch.float64))
        assert p[1:, 0].tolist() == pytest.approx([0.995] * 3) and p[0, 0].item() == pytest.approx(0.9)
        assert (p[0, 1:] < 0.05).all()


def test_the_gradient_is_that_of_the_exact_objective():
    """The mean over all completions, weighted by their chance, of advantages R: -∇E[R] over the number of places."""
    theta = logits(TINY).unsqueeze(0).requires_grad_()
    before = theta.detach().log_softmax(-1)
    ways = torch.tensor(list(itertools.product(range(4), repeat=2)))
    chance = before[0, 0, ways[:, 0]].exp() * before[0, 1, ways[:, 1]].exp()
    reward = TINY.solves()[1, ways[:, 0]] & (ways[:, 1] == 0)
    value = loss(ARMS["grpo"], theta, before, Batch(ways.unsqueeze(0), (chance * reward * len(ways)).unsqueeze(0)))
    (gradient,) = torch.autograd.grad(value, theta)
    p = theta.softmax(-1)[0]
    exact = (p[0] * TINY.solves()[1]).sum() * p[1, 0]
    (wanted,) = torch.autograd.grad(exact, theta)
    torch.testing.assert_close(gradient, -wanted / 2)


def batch_of(fork, seeds=3):
    theta = torch.stack([logits(fork, s) for s in range(seeds)])
    generator = torch.Generator().manual_seed(5)
    before = theta.log_softmax(-1)
    return before, sample(fork, before, SHORT, generator, fork.solves())


def test_the_loss_is_policy_loss_of_each_seed():
    before, batch = batch_of(TINY)
    theta = (before + 0.3 * torch.randn(before.shape, dtype=torch.float64)).requires_grad_()
    (found,) = torch.autograd.grad(loss(ARMS["bandpo-kl"], theta, before, batch), theta)
    for i in range(3):
        at = batch.tokens[i].T
        value, _ = policy_loss(
            logprobs=theta[i].log_softmax(-1).gather(1, at).T,
            old_logprobs=before[i].gather(1, at).T,
            advantages=batch.advantages[i],
            mask=torch.ones(16, 2),
            objective=ARMS["bandpo-kl"],
        )
        (own,) = torch.autograd.grad(value, theta)
        torch.testing.assert_close(found[i], own[i])


def test_all_arms_are_one_at_the_first_step():
    before, batch = batch_of(TINY)
    gradients = {}
    for name, arm in ARMS.items():
        theta = before.clone().requires_grad_()
        (gradients[name],) = torch.autograd.grad(loss(arm, theta, before, batch), theta)
    for name, found in gradients.items():
        torch.testing.assert_close(found, gradients["grpo"], msg=name)
    assert gradients["grpo"].any()
    assert {(a.aggregation, a.advantage, a.anchor, a.kl_coef) for a in ARMS.values()} == {
        ("seq-mean-token-mean", "std", "old", 0.0)
    }


def test_one_sgd_step_has_a_closed_form():
    """One step on one rollout: θ + rate/(rows·places)·Σ A (e - π), in numpy; every arm agrees."""
    schedule = Schedule(rollouts=1, queries=4, group=4, epochs=1, minibatches=1, optimizer="sgd")
    start = TINY.start().log_softmax(-1).expand(2, -1, -1)
    batch = sample(TINY, start, schedule, torch.Generator().manual_seed(9), TINY.solves())
    theta = start.numpy().copy()
    for s, row, place in itertools.product(range(2), range(16), range(2)):
        step = -np.exp(start[s, place].numpy())
        step[batch.tokens[s, row, place]] += 1
        theta[s, place] += 0.7 / 32 * batch.advantages[s, row].item() * step
    wanted = TINY.measure(torch.from_numpy(theta))
    for name in ("grpo", "bandpo-kl-upper", "no-clip"):
        found = train(TINY, ARMS[name], schedule, rate=0.7, seeds=2, seed=9)
        torch.testing.assert_close(found.final["mean"], wanted.mean)
        torch.testing.assert_close(found.final["entropy"], wanted.entropy)


def test_runs_are_deterministic_and_paired():
    first, again = (train(TINY, ARMS["bandpo-kl"], SHORT, rate=0.1, seeds=4, seed=3) for _ in range(2))
    assert torch.equal(first.curve, again.curve)
    other = train(TINY, ARMS["bandpo-kl"], SHORT, rate=0.1, seeds=4, seed=4)
    assert not torch.equal(first.curve, other.curve)
    assert torch.equal(first.curve[0], other.curve[0]) and first.curve.shape == (4, 4)
    assert torch.equal(first.final["speed"], first.curve.mean(0))


def test_a_wide_upper_edge_finds_the_needle_faster():
    """A regime with a known answer: only rare options are right, nothing is noisy, and few tokens are punished."""
    schedule = Schedule(rollouts=12, epochs=4)
    speed = {
        arm: train(REGIMES["needle"], ARMS[arm], schedule, rate=0.2, seeds=16, seed=0).final["speed"]
        for arm in ("grpo", "bandpo-kl-upper")
    }
    assert t_interval((speed["bandpo-kl-upper"] - speed["grpo"]).tolist()).low > 0


def test_bad_numbers_are_refused():
    for bad in ({"common": 0.99, "rare": 0.01}, {"flip": 0.6}, {"good": 63}, {"common_solves": 9}):
        with pytest.raises(ValueError, match="Fork"):
            Fork(**bad)
    for bad in ({"minibatches": 3}, {"rollouts": 0}, {"optimizer": "adamw"}):
        with pytest.raises(ValueError, match=r"Schedule|optimizer"):
            Schedule(**bad)


def cell(**changes):
    return Cell("test", TINY, "grpo", SHORT, 0.1, 2, REPORT_SEED)._replace(**changes)


def test_results_are_kept_and_made_anew_where_they_do_not_fit(tmp_path):
    first = Store(tmp_path, lambda _: None)
    made = first.result(cell())
    second = Store(tmp_path, lambda _: None)
    assert second.result(cell()) == made and (second.made, second.found) == (0, 1)
    second.result(cell(rate=0.2))
    second.result(cell(arm="bandpo-kl"))
    assert second.made == 2
    assert "0x" not in json.dumps([cell(arm=arm).describe() for arm in ARMS])  # an address would differ in each process
    [kept] = [p for p in tmp_path.glob("*.json") if json.loads(p.read_text())["cell"] == cell().describe()]
    kept.write_text(json.dumps({"cell": "of another run", "result": {}}))
    assert Store(tmp_path, lambda _: None).result(cell()) == made


def test_a_grid_grows_while_its_best_cell_is_at_an_end():
    class Fake(Store):
        def __init__(self, best):
            self.best, self.asked = best, []

        def result(self, cell):
            self.asked.append((cell.rate, cell.seed))
            return {"final": {"speed": [-abs(math.log(cell.rate / self.best))]}}

    for best, wanted in ((0.05, 0.05), (0.4, 0.4), (0.0125, 0.0125)):
        store = Fake(best)
        assert tuned_rate(store, cell(seed=TUNING_SEED), (0.025, 0.05, 0.1)) == pytest.approx(wanted)
        assert {seed for _, seed in store.asked} == {TUNING_SEED}
        rates = [rate for rate, _ in store.asked]
        assert min(rates) < wanted < max(rates)
    assert TUNING_SEED != REPORT_SEED


def test_verdicts_are_symmetrical_and_known():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 64)
    noise -= noise.mean()
    for shift, wanted in ((0.1, "better"), (-0.1, "worse"), (0.0, "equivalent")):
        assert compared(noise + shift, np.zeros(64), "mean", 1)["verdict"] == wanted
    assert compared(10 * noise, np.zeros(64), "mean", 1)["verdict"] == "undecided"
    assert verdict(Interval(0.01, 0.005, 0.015), 0.02) == "equivalent"  # not 0, but too small to matter
    nan = float("nan")
    assert verdict(t_interval([1.0, nan]), 0.1) == "undecided" and math.isnan(t_interval([1.0, nan]).value)
    with pytest.raises(ValueError, match="positive"):
        verdict(Interval(0, 0, 0), 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        t_interval([1.0, 2.0], 0)


def test_intervals_cover_what_they_promise():
    rng = np.random.default_rng(1)
    for n in (8, 64):
        draws = rng.normal(0.3, 1, (2000, n))
        inside = [x.low < 0.3 < x.high for x in map(t_interval, draws.tolist())]
        assert 0.935 < np.mean(inside) < 0.965
        families = [[t_interval(row.tolist(), 5) for row in draws[i : i + 5]] for i in range(0, 2000, 5)]
        families = [[t_interval(row, 5) for row in draws[i : i + 5].tolist()] for i in range(0, 2000, 5)]
        together = [all(x.low < 0.3 < x.high for x in family) for family in families]
        assert np.mean(together) > 0.93


def test_the_map_has_a_winner_only_where_there_is_one():
    def arms(**values):
        measures = ("mean", "passed", "entropy", "speed", "right")
        final = {a: {m: (v + 0.001 * np.arange(8)).tolist() for m in measures} for a, v in values.items()}
        return {a: {"rate": 0.1, "own": {"final": f}} for a, f in final.items()}

    [found] = summarise_map(
        [
            {
                "share": 0.2,
                "steps": 4,
                "flip": 0.0,
                "arms": arms(**{"grpo": 0.1, "bandpo-kl": 0.1, "bandpo-kl-upper": 0.5}),
            }
        ]
    )
    assert found["winners"]["mean"] == "bandpo-kl-upper"
    [tie] = summarise_map([{"share": 0.2, "steps": 4, "flip": 0.0, "arms": arms(**{"grpo": 0.1, "bandpo-kl": 0.1})}])
    assert tie["winners"]["mean"] is None
    [base] = summarise_map([{"share": 0.2, "steps": 4, "flip": 0.0, "arms": arms(**{"grpo": 0.5, "bandpo-kl": 0.1})}])
    assert base["winners"]["mean"] == "grpo"
    assert "upper half" in plot_map([found]) and mixed(0.2, 0.0).good == 13


def test_the_command_on_its_smallest_preset(tmp_path, monkeypatch):
    import argparse

    from bandpo.lab.forks import plan

    small = replace(PRESETS["smoke"], rollouts=1, seeds=3, tuning_seeds=2, drift_seeds=2)
    monkeypatch.setitem(plan.PRESETS, "smoke", small)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["forks", "--preset", "smoke", "--output", str(tmp_path)]
    assert run(parser.parse_args(options)) == 0
    found = json.loads((tmp_path / "forks.json").read_text())
    assert set(found["regimes"]) == {"diversity/adam", "noise/adam"} and len(found["map"]) == 1
    names = {"halves-reach", "halves-drift", "halves-regimes-adam", "halves-map"}
    assert {p.stem for p in tmp_path.glob("*.svg")} == names
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    assert run(parser.parse_args(options)) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == before
    for wrong, message in (("--only=nothing", "choose from drift"), ("--device=cuda", "float64")):
        with pytest.raises(ValueError, match=message):
            run(parser.parse_args([*options, wrong]))


def test_the_page_is_what_the_data_give():
    """If it fails: `python tools/halves.py`."""
    spec = importlib.util.spec_from_file_location("tools_halves", ROOT / "tools" / "halves.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    data = json.loads(tool.DATA.read_text())
    assert tool.PAGE.read_text() == tool.page(data)
    for name, picture in tool.draw(data).items():
        assert (tool.FIGURES / f"{name}.svg").read_text() == picture, name
    ends, theory = data["drift"]["ends"]["sgd 1"], data["theory"]["drift"]
    assert all((ends[x]["value"] > data["drift"]["start"]) == (theory[x] > 0) for x in ends)


def test_what_the_page_says_in_words_is_in_the_data():
    """The sentences of tools/halves.md that have no number: both halves, the negative result, the direction of the edges."""
    found = json.loads((ROOT / "docs" / "halves.json").read_text())
    regimes = {key: x["differences"] for key, x in found["regimes"].items() if key.endswith("/adam")}
    learnt = {key: x["own"] for key, x in regimes.items() if not key.startswith("noise")}
    passed = {
        arm: [x[f"{arm} - grpo"]["passed"]["verdict"] for x in learnt.values()]
        for arm in ("neutral", "bandpo-kl-upper", "bandpo-kl", "bandpo-kl-lower")
    }
    assert "better" in passed["bandpo-kl-upper"] and "worse" not in passed["bandpo-kl-upper"]
    assert all("better" not in passed[arm] for arm in ("neutral", "bandpo-kl", "bandpo-kl-lower"))
    noise = {pair: x["entropy"]["verdict"] for pair, x in regimes["noise/adam"]["same"].items()}
    assert noise["bandpo-kl-upper - grpo"] == "better" and noise["bandpo-kl-lower - grpo"] == "worse"
    assert 1.15 < found["theory"]["neutral"]["0.9"][1] < 1.25
