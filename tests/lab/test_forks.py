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
from bandpo._system.errors import RunError
from bandpo._system.files import read_checked_json, write_checked_json
from bandpo.lab.evidence.protocol import read
from bandpo.lab.experiments.arguments import add_arguments, run
from bandpo.lab.forks.figures import plot_map
from bandpo.lab.forks.plan import (
    BLOCK,
    CONFIRMATION_SEED,
    PRESETS,
    REPORT_SEED,
    SLOW,
    TUNING_SEED,
    Preset,
    joined,
    report_cells,
    tuned_rates,
)
from bandpo.lab.forks.policy import Fork
from bandpo.lab.forks.regimes import ARMS, FACTORS, PEAK, REGIMES, families, mixed, objective_of
from bandpo.lab.forks.store import Cell, Store
from bandpo.lab.forks.study import results, values_of
from bandpo.lab.forks.summary import MEASURED, WIDTHS, compared, range_of, smallest_of, summarise_map
from bandpo.lab.forks.training import MEASURES, MOVES, Batch, Schedule, _edges, count_moves, loss, sample, train
from bandpo.lab.forks.widths import SHARE, best_of, width_values
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


def result_of(store, found):
    """As text, in which two NaN are equal."""
    [result] = store.results("test", [found])
    return json.dumps({name: x for name, x in result.items() if name != "cpu_seconds"})


def test_results_are_kept_and_made_anew_where_they_do_not_fit(tmp_path):
    first = Store(tmp_path, lambda _: None)
    made = result_of(first, cell())
    second = Store(tmp_path, lambda _: None)
    assert result_of(second, cell()) == made and (second.made, second.found) == (0, 1)
    assert second.seconds == first.seconds
    both = second.results("test", [cell(rate=0.2), cell(arm="bandpo-kl"), cell(rate=0.2)])
    assert second.made == 2 and both[0] == both[2] != both[1]
    everything = [*ARMS, *(width for family in families().values() for width in family)]
    assert "0x" not in json.dumps(
        [cell(arm=arm).describe() for arm in everything]
    )  # addresses differ between processes
    [kept] = [p for p in tmp_path.glob("*.json") if json.loads(p.read_text())["cell"] == cell().describe()]
    kept.write_text(json.dumps({"cell": "of another run", "result": {}}))
    assert result_of(Store(tmp_path, lambda _: None), cell()) == made


def _without_result(kept):
    del kept["result"]


def _one_seed_too_few(kept):
    kept["result"]["final"]["mean"].pop()


def _without_a_start(kept):
    """Nothing in it was computed; a run that diverged has numbers at its start."""
    kept["result"]["curve"] = [None] * len(kept["result"]["curve"])
    kept["result"]["final"]["mean"] = [None] * len(kept["result"]["final"]["mean"])


@pytest.mark.parametrize("harm", [None, _without_result, _one_seed_too_few, _without_a_start])
def test_a_damaged_result_is_made_anew(tmp_path, harm):
    made = result_of(Store(tmp_path, lambda _: None), cell())
    [path] = tmp_path.glob("*.json")
    if harm is None:
        path.write_text(path.read_text()[:100])
    else:
        kept = read_checked_json(path)
        harm(kept)
        write_checked_json(path, kept)
    said: list[str] = []
    store = Store(tmp_path, said.append)
    assert result_of(store, cell()) == made and store.made == 1
    assert f"{path} is damaged: the run is made again" in said[0]


@pytest.mark.parametrize("kind", ["changed", "without a checksum"])
def test_a_result_whose_checksum_does_not_fit_is_made_anew(tmp_path, kind):
    """A value that was changed in the file keeps its form, and only the checksum shows it."""
    made = result_of(Store(tmp_path, lambda _: None), cell())
    [path] = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())
    if kind == "changed":
        kept["result"]["final"]["mean"][0] = 1.0
    else:
        del kept["crc32"]
    path.write_text(json.dumps(kept))
    said: list[str] = []
    store = Store(tmp_path, said.append)
    assert result_of(store, cell()) == made and store.made == 1
    assert f"{path} is damaged: the run is made again" in said[0]
    assert result_of(again := Store(tmp_path, said.append), cell()) == made and again.made == 0


def test_the_files_of_results_are_strict_json_with_the_checksum_first(tmp_path):
    sure = Fork(options=3, common=0.4, good=1, rare=0.3, common_solves=3, good_solves=3, types=3, certain=0)
    result_of(Store(tmp_path, lambda _: None), cell(fork=sure))  # its moves are not numbers
    [path] = tmp_path.glob("*.json")

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert list(found) == ["crc32", "cell", "result"] and found["result"]["final"]["moved_up"][0] is None


def test_a_number_that_is_missing_stays_one(tmp_path):
    """Without a rare token with A > 0 a seed has no move: NaN in the process that made it and in one that reads it."""
    sure = Fork(options=3, common=0.4, good=1, rare=0.3, common_solves=3, good_solves=3, types=3, certain=0)
    made = [result_of(Store(tmp_path, lambda _: None), cell(fork=sure)) for _ in range(2)]
    for result in map(json.loads, made):
        assert all(math.isnan(x) for name in MOVES for x in result["final"][name])
        assert all(math.isfinite(x) for name in MEASURES for x in result["final"][name])


def test_results_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    cells = [cell(arm=arm) for arm in ("grpo", "bandpo-kl", "dppo-kl")]
    one = Store(tmp_path / "one", lambda _: None).results("test", cells)
    monkeypatch.setattr("bandpo.lab.forks.store._WORTH", 0)
    two = Store(tmp_path / "two", lambda _: None, 2).results("test", cells)
    for first, second in zip(one, two, strict=True):
        first.pop("cpu_seconds"), second.pop("cpu_seconds")
        assert json.dumps(first) == json.dumps(second)


def test_an_error_of_a_process_names_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("bandpo.lab.forks.store._WORTH", 0)
    broken = Fork(options=64)
    object.__setattr__(broken, "flip", "much")
    store = Store(tmp_path, lambda _: None, 2)
    with pytest.raises(RunError, match=r"test, grpo, rate 0\.[12], seed"):
        store.results("test", [cell(fork=broken), cell(fork=broken, rate=0.2)])


class Fake(Store):
    """A store that makes its results up and remembers what it was asked for."""

    def __init__(self, speed=lambda cell: 0.0):
        self.speed, self.asked = speed, []

    def results(self, what, cells):
        self.asked += cells
        return [self._made_up(cell) for cell in cells]

    def _made_up(self, cell):
        row = [self.speed(cell)] * cell.seeds
        return {
            "final": dict.fromkeys((*MEASURES, *MOVES), row),
            "curve": [0.0],
            "entropies": [0.0],
            "moves": {name: [0.0] for name in MOVES},
        }


def test_a_grid_grows_while_its_best_cell_is_at_an_end():
    wanted = {"low": 0.0125, "in": 0.05, "high": 0.4}
    best = {"grpo": wanted["low"], "bandpo-kl": wanted["in"], "no-clip": wanted["high"]}
    store = Fake(lambda cell: -abs(math.log(cell.rate / best[cell.arm])))
    cells = {arm: cell(arm=arm, seed=TUNING_SEED) for arm in best}
    assert tuned_rates(store, "test", cells, {"adam": (0.025, 0.05, 0.1)}) == pytest.approx(best)
    assert {x.seed for x in store.asked} == {TUNING_SEED}
    for arm, rate in best.items():
        rates = [x.rate for x in store.asked if x.arm == arm]
        assert len(set(rates)) == len(rates) and min(rates) < rate < max(rates)
    assert tuned_rates(store, "test", cells, {"adam": (0.3,)}) == dict.fromkeys(best, 0.3)


def test_nothing_that_was_tuned_on_enters_the_report():
    store = Fake()
    full = PRESETS["full"]
    confirmed = results(full, store, ("confirmation",))
    assert {x.seed for x in store.asked} == {TUNING_SEED, *range(CONFIRMATION_SEED, CONFIRMATION_SEED + 22)}
    assert {x.seeds for x in store.asked if x.seed != TUNING_SEED} == {BLOCK} and full.confirmation_seeds == 22 * BLOCK
    fresh = values_of(confirmed)
    assert set(fresh) == {f"{regime}/confirmation{rate}" for regime in full.regimes for rate in ("", "/same-rate")}
    assert set(fresh["noisy/confirmation/same-rate"]) == {"grpo", "bandpo-kl", "bandpo-kl-upper"}
    assert {len(x) for arms in fresh.values() for row in arms.values() for x in row.values()} == {22 * BLOCK}
    store = Fake()
    found = results(full, store, ("regimes", "widths", "map", "drift"))
    assert {x.seeds for x in store.asked if x.seed == TUNING_SEED} == {PRESETS["full"].tuning_seeds}
    report = {x.seed for x in store.asked} - {TUNING_SEED}
    assert report == {REPORT_SEED, REPORT_SEED + 1, REPORT_SEED + 2} and PRESETS["full"].seeds == 3 * BLOCK
    values = values_of(found)
    assert {"noisy/adam", "noisy/sgd", "noisy/adam/same-rate", "moves/noisy", "width/noisy"} < set(values)
    for place, arms in values.items():
        sizes = {arm: {len(x) for x in row.values()} for arm, row in arms.items()}
        seeds = BLOCK if place.startswith("width/") else 3 * BLOCK
        assert all(size == {BLOCK if arm in SLOW else seeds} for arm, size in sizes.items()), place
    assert set(values["noisy/adam"]) == set(ARMS) and set(values["race/adam"]) == set(ARMS) - set(SLOW)


def test_blocks_of_seeds_are_the_same_for_every_arm():
    first, second = (
        report_cells("test", TINY, arm, SHORT, rate, 192) for arm, rate in (("grpo", 0.1), ("no-clip", 0.3))
    )
    assert [(x.seed, x.seeds) for x in first] == [(x.seed, x.seeds) for x in second]
    assert [x.seeds for x in report_cells("test", TINY, "grpo", SHORT, 0.1, 8)] == [8]
    both = joined(
        [{"final": {"mean": [i]}, "curve": [i], "entropies": [i], "moves": {"moved_up": [i]}} for i in (1.0, 3.0)]
    )
    assert both == {"final": {"mean": [1.0, 3.0]}, "curve": [2.0], "entropies": [2.0], "moves": {"moved_up": [2.0]}}
    for wrong in ({"seeds": 100}, {"map_seeds": 0}, {"width_rates": (0.1,), "width_factors": (1.0,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Preset(**wrong)


def test_edges_of_the_table_are_those_of_the_tokens():
    before, batch = batch_of(REGIMES["noisy"])
    theta = (before + 0.3 * torch.randn(before.shape, dtype=torch.float64)).requires_grad_()
    known = 0
    for arm in ARMS.values():
        edges = _edges(arm, before)
        known += edges is not None
        values = [loss(arm, theta, before, batch, x) for x in (edges, None)]
        torch.testing.assert_close(*(torch.autograd.grad(x, theta)[0] for x in values), rtol=1e-12, atol=1e-14)
    assert known >= 10  # bounds that also ask for the new log-probs, such as those of dppo, are not in the table


def test_moves_are_counted_token_by_token(monkeypatch):
    monkeypatch.setattr("bandpo.lab.forks.training.RARE", 0.3)
    before = 0.4 * torch.stack([logits(TINY, seed) for seed in range(3)])  # flat, so that rare tokens are sampled
    before = before.log_softmax(-1)
    batch = sample(TINY, before, SHORT, torch.Generator().manual_seed(5), TINY.solves())
    after = (before + 0.4 * torch.randn(before.shape, dtype=torch.float64)).log_softmax(-1)
    found = count_moves(before, after, batch)
    for seed, (side, sign) in itertools.product(range(3), enumerate((1, -1))):
        moves = [
            (after - before)[seed, place, token].item()
            for row, tokens in enumerate(batch.tokens[seed].tolist())
            for place, token in enumerate(tokens)
            if before[seed, place, token].exp() < 0.3 and sign * batch.advantages[seed, row] > 0
        ]
        beyond = sum(sign * x > (math.log(1.2) if sign == 1 else -math.log(0.8)) for x in moves)
        assert found[side, :, seed].tolist() == pytest.approx([len(moves), sum(moves), beyond])
    assert found[:, 0].min() > 0


def test_one_step_of_sgd_moves_a_token_by_its_gradient():
    """After one step from a policy that gives each option 1/n, log-ratios have a closed form that no edge changes."""
    even = Fork(options=20, common=0.05, good=18, rare=0.05, common_solves=0, good_solves=1, types=2, certain=0)
    schedule = Schedule(rollouts=1, queries=2, group=8, epochs=1, minibatches=1, optimizer="sgd")
    batch = sample(even, even.start().log_softmax(-1)[None], schedule, torch.Generator().manual_seed(4), even.solves())
    step = torch.zeros(20, dtype=torch.float64)
    for row, token in enumerate(batch.tokens[0, :, 0].tolist()):
        step += 0.7 / 16 * batch.advantages[0, row] * (torch.arange(20) == token)
    moved = step - torch.logsumexp(step - math.log(20), 0)
    up = [moved[batch.tokens[0, row, 0]].item() for row in range(16) if batch.advantages[0, row] > 0]
    found = train(even, ARMS["bandpo-kl"], schedule, rate=0.7, seeds=1, seed=4).final
    assert found["moved_up"].item() == pytest.approx(np.mean(up))
    assert found["beyond_up"].item() == np.mean([x > math.log(1.2) for x in up])


def test_grids_of_widths_match():
    found = families()
    assert {name: len(family) for name, family in found.items()} == {"radius": 5, "upper": 5, "eps": 5, "two": 25}
    assert set(found["eps"]) < set(found["two"]) and 1.0 in FACTORS
    for family, default in (("radius", "bandpo-kl"), ("eps", "grpo"), ("upper", "bandpo-kl-upper")):
        middle = [*found[family]][FACTORS.index(1.0)]
        old = torch.tensor([[-7.0, -1.0, -0.01]], dtype=torch.float64)
        for mine, theirs in zip(objective_of(middle).bounds(old), ARMS[default].bounds(old), strict=True):
            torch.testing.assert_close(mine, theirs, msg=family)


def test_the_best_of_a_few_trials_by_enumeration():
    scores = [0.3, 0.9, 0.1, 0.5, 0.7]
    for trials in (1, 2, 3, 5):
        draws = list(itertools.combinations(range(5), trials))
        wins = [sum(max(draw, key=lambda i: scores[i]) == cell for draw in draws) / len(draws) for cell in range(5)]
        assert best_of(scores, trials).tolist() == pytest.approx(wins)
    for wrong in (0, 6):
        with pytest.raises(ValueError, match="from 1 to the number of cells, 5"):
            best_of(scores, wrong)


def test_areas_and_best_of_a_grid_that_is_known():
    good, bad = SHARE * PEAK["noisy"] + 0.01, SHARE * PEAK["noisy"] - 0.01
    nan = float("nan")
    rows = ((0.4, [good, bad]), (0.1, [bad, bad]), (0.2, [good, bad]), (0.3, [good, 1.0]))
    cells = [{"tuning": tuning, "mean": mean} for tuning, mean in rows]
    found = width_values({"noisy/adam": {"eps": cells, "radius": [*cells[:3], {"tuning": 0.0, "mean": [nan, 0.0]}]}})
    assert found["noisy/adam"]["eps"] == {"area": [0.75, 0.25], "best": pytest.approx([good, bad])}
    assert math.isnan(found["noisy/adam"]["radius"]["area"][0]) and found["noisy/adam"]["radius"]["area"][1] == 0


def test_verdicts_are_symmetrical_and_known():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 512)
    noise -= noise.mean()
    for shift, wanted in ((0.1, "better"), (-0.1, "worse"), (0.0, "equivalent")):
        assert compared(noise + shift, np.zeros(512), "mean", 1)["verdict"] == wanted
    assert compared(5 * noise, np.zeros(512), "mean", 1)["verdict"] == "undecided"
    assert verdict(Interval(0.01, 0.005, 0.015), 0.02) == "equivalent"  # not 0, but too small to matter
    nan = float("nan")
    assert verdict(t_interval([1.0, nan]), 0.1) == "undecided" and math.isnan(t_interval([1.0, nan]).value)
    with pytest.raises(ValueError, match="positive"):
        verdict(Interval(0, 0, 0), 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        t_interval([1.0, 2.0], 0)


def test_no_number_of_equal_seeds_excludes_a_rare_failure():
    """64 seeds without a failure leave 5.6% of failures possible; a narrower range or more seeds can exclude what matters."""
    same = [0.4] * 64
    found = compared(same, same, "mean", 1)
    assert found["verdict"] == "undecided" and found["high"] == pytest.approx(1 - 0.025 ** (1 / 64), rel=1e-4)
    assert compared(same, same, "mean", 1, "noisy")["high"] == pytest.approx(0.5 * found["high"], rel=1e-4)
    assert compared(same * 3, same * 3, "mean", 1, "noisy")["verdict"] == "equivalent"
    assert range_of("race", "mean") == (0, 0.75) and range_of("race", "passed") == (0, 1)


def test_seeds_without_such_a_token_are_left_out_and_longer_lists_are_cut():
    nan = float("nan")
    found = compared([1.0, nan, 1.2, 9.0], [0.0, 0.0, 0.0], "moved_up", 1)
    assert found["value"] == pytest.approx(1.1)
    assert math.isnan(compared([0.1, nan], [0.1, 0.1], "mean", 1)["value"])  # a run that diverged is not left out


def test_how_far_tokens_move_has_no_range_and_is_never_equivalent():
    """The share beyond an edge has a range, and can be."""
    small = [0.01 * (i % 3 - 1) for i in range(300)]
    assert compared(small, [0.0] * 300, "moved_up", 1)["verdict"] == "undecided"
    assert compared([0.1 + x for x in small], [0.0] * 300, "moved_up", 1)["verdict"] == "better"
    level = [0.5 + x for x in small]
    assert compared(level, [0.5] * 300, "beyond_up", 1)["verdict"] == "equivalent"


def test_the_smallest_effects_are_those_of_the_protocol(monkeypatch):
    """They stand in one place: another number there is another verdict here."""
    protocol = read()
    level = [0.53 + 0.001 * (i % 3 - 1) for i in range(300)]
    assert compared(level, [0.5] * 300, "mean", 1)["verdict"] == "better"
    measures = {**protocol.measures, "mean": replace(protocol.measures["mean"], smallest=0.2)}
    monkeypatch.setattr("bandpo.lab.forks.summary._protocol", lambda: replace(protocol, measures=measures))
    assert compared(level, [0.5] * 300, "mean", 1)["verdict"] == "equivalent"


def test_the_protocol_and_the_study_agree():
    full, experiment = PRESETS["full"], read("full").experiments["forks"]
    assert (experiment.seeds, experiment.report_seed) == (full.seeds, REPORT_SEED)
    assert (experiment.tuning_seeds, experiment.tuning_seed) == (full.tuning_seeds, TUNING_SEED)
    places = {f"{regime}/{optimizer}" for regime in full.regimes for optimizer in full.optimizers}
    places |= {f"width/{regime}" for regime in full.width_regimes}
    places |= {f"{regime}/confirmation" for regime in full.confirmation_regimes}
    assert places == {name for name in experiment.places if not name.startswith("moves/")}
    for name, place in experiment.places.items():
        if name.startswith("width/"):
            assert set(place.arms) == set(families())
        elif name.endswith("/confirmation"):
            assert place.arms == full.confirmation_arms
        else:
            assert set(place.arms) == set(ARMS) - set(SLOW)
        for measure, registered in place.measures.items():
            if measure in (*MEASURED, *MOVES, *WIDTHS):
                assert registered.smallest == smallest_of(measure), (name, measure)
                ours = range_of(name.split("/")[name.startswith(("width/", "moves/"))], measure)
                if measure in MEASURED:
                    assert registered.range == (None if ours is None else pytest.approx(ours, abs=1e-4)), (
                        name,
                        measure,
                    )


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
        final = {a: {m: (v + 0.001 * np.arange(64)).tolist() for m in measures} for a, v in values.items()}
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

    small = replace(PRESETS["smoke"], rollouts=1, seeds=3, tuning_seeds=2, drift_seeds=2, map_seeds=2, width_seeds=2)
    monkeypatch.setitem(plan.PRESETS, "smoke", small)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["forks", "--preset", "smoke", "--output", str(tmp_path)]
    assert run(parser.parse_args(options)) == 0
    found = json.loads((tmp_path / "forks.json").read_text())
    assert set(found["regimes"]) == {"diversity/adam", "noise/adam"} and len(found["map"]) == 1
    assert set(found["moves"]["places"]) == set(found["regimes"]) and set(found["widths"]["places"]) == {"noisy/adam"}
    names = {f"halves-{name}" for name in ("reach", "drift", "regimes-adam", "moves", "widths", "map")}
    assert {p.stem for p in tmp_path.glob("*.svg")} == names
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    assert run(parser.parse_args(options)) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == before
    part = ["--only=regimes", "--regimes=noise", "--arms=grpo, bandpo-kl"]
    assert run(parser.parse_args([*options, *part])) == 0
    reduced = json.loads((tmp_path / "forks.json").read_text())
    assert set(reduced) & {"drift", "widths", "map"} == set() and set(reduced["regimes"]) == {"noise/adam"}
    assert set(reduced["regimes"]["noise/adam"]["rates"]) == {"grpo", "bandpo-kl"}
    for wrong, message in (
        ("--only=nothing", "choose from drift"),
        ("--device=cuda", "float64"),
        ("--jobs=0", "at least 1, got 0"),
        ("--arms=bandpo-kl", "compared with grpo"),
        ("--arms=grpo,gpro", "--arms gpro: choose from grpo"),
        ("--regimes=race", "choose from diversity, noise, noisy"),
        ("--optimizers=sgd", "choose from adam"),
    ):
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
