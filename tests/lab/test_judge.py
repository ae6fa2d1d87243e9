"""Verdicts on claims with known answers, by simulation, and the symmetry of the rule."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bandpo.lab.evidence.judge import Judged, judge, verdict_of
from bandpo.lab.evidence.protocol import Claim, Contrast, Experiment, Measure, Place, Protocol, read
from bandpo.lab.evidence.study import diverged_in

MEAN = Measure("mean reward", 0.02, (0.0, 1.0), "worst")
ENTROPY = Measure("entropy", 0.1, (0.0, 4.0), "undecided")
MOVED = Measure("log-ratio", 0.05, None, "left out")
ARMS = ("a", "b")


def protocol_of(seeds: int = 300, interval: Any = "bounded", claimed: Any = "better", places: int = 2) -> Protocol:
    names = [f"p{i}" for i in range(places)]
    measures = {"mean": MEAN, "entropy": ENTROPY, "moved": MOVED}
    experiment = Experiment(interval, seeds, 1000, 4, 0, {name: Place(ARMS, measures, seeds, 1000) for name in names})
    claims = tuple(
        Claim(
            m,
            f"a's {m} is {claimed}",
            "a test",
            "primary",
            tuple(Contrast("e", n, "a", "b", m, claimed) for n in names),
        )
        for m in measures
    )
    return Protocol("2026-01-01", (), "full", 0.8, "b", measures, {"e": experiment}, claims, (), "0" * 64)


def values_of(protocol: Protocol, shift: float, deviation: float = 0.02, seed: int = 0) -> dict[str, Any]:
    """Arm b is 0.5, and a differs from it by `shift`, in every place and measure."""
    rng = np.random.default_rng(seed)
    return {
        "e": {
            name: {
                "a": {m: (0.5 + shift + deviation * rng.standard_normal(place.seeds)).tolist() for m in place.measures},
                "b": {m: [0.5] * place.seeds for m in place.measures},
            }
            for name, place in protocol.experiments["e"].places.items()
        }
    }


def only_mean(protocol: Protocol) -> Protocol:
    return replace(protocol, claims=tuple(c for c in protocol.claims if c.id == "mean"))


def claim(judged: list[Judged], name: str = "mean") -> Judged:
    return next(x for x in judged if x.id == name)


@pytest.mark.parametrize("interval", ["bounded", "t"])
def test_each_verdict_is_found_where_it_is_true(interval: str) -> None:
    protocol = protocol_of(interval=interval)
    for shift, verdict, state in (
        (0.06, "holds", "better"),
        (-0.06, "the opposite holds", "worse"),
        (0.0, "no difference that matters", "equivalent"),
    ):
        found = claim(judge(protocol, values_of(protocol, shift)))
        assert found.verdict == verdict and [c.verdict for c in found.contrasts] == [state] * 2
        assert all(c.interval == interval and c.pairs == 300 and c.low <= shift <= c.high for c in found.contrasts)


def test_few_seeds_leave_a_claim_undecided_and_say_how_many_it_would_take() -> None:
    protocol = protocol_of(seeds=12, interval="t")
    found = claim(judge(protocol, values_of(protocol, 0.01, 0.1)))
    needed = [c.needed for c in found.contrasts]
    most = max(n for n in needed if n)
    assert found.verdict == f"undecided (a difference of 0.02 would need about {most:,} seeds)"
    assert all(n is not None and n > 12 for n in needed)


def test_so_many_seeds_decide() -> None:
    """With the seeds that are asked for, a true difference of the smallest effect is found in 80% of studies."""
    protocol = protocol_of(seeds=12, interval="t", places=1)
    values = values_of(protocol, 0.0)
    pilot = np.array(values["e"]["p0"]["a"]["mean"])
    values["e"]["p0"]["a"]["mean"] = (
        0.5 + 0.05 * (pilot - pilot.mean()) / pilot.std(ddof=1)
    ).tolist()  # the true deviation
    needed = claim(judge(protocol, values)).contrasts[0].needed
    assert needed is not None
    larger = only_mean(protocol_of(seeds=needed, interval="t", places=1))
    found = [claim(judge(larger, values_of(larger, 0.02, 0.05, seed=i))).verdict for i in range(300)]
    assert found.count("holds") / 300 == pytest.approx(0.8, abs=0.02 + 3 * math.sqrt(0.16 / 300))


def test_equal_seeds_are_not_equivalent_while_failures_could_be_unseen() -> None:
    for interval in ("bounded", "t"):
        protocol = protocol_of(seeds=64, interval=interval, places=1)
        found = claim(judge(protocol, values_of(protocol, 0.0, 0.0))).contrasts[0]
        assert found.verdict == "undecided" and found.hidden and found.unseen == pytest.approx(0.056, abs=5e-4)
        assert found.needed == 183
        enough = protocol_of(seeds=183, interval=interval, places=1)
        assert claim(judge(enough, values_of(enough, 0.0, 0.0))).verdict == "no difference that matters"


def test_a_measure_without_a_range_has_students_interval() -> None:
    protocol = protocol_of()
    assert {c.interval for c in claim(judge(protocol, values_of(protocol, 0.1)), "moved").contrasts} == {"t"}


def test_the_opposite_claim_gets_the_opposite_verdict_and_arms_can_be_exchanged() -> None:
    protocol, opposite = protocol_of(claimed="better"), protocol_of(claimed="worse")
    swap = {"holds": "the opposite holds", "the opposite holds": "holds"}
    for shift in (-0.06, 0.0, 0.015, 0.06):
        values = values_of(protocol, shift, 0.1)
        turned = {"e": {p: {"a": x["b"], "b": x["a"]} for p, x in values["e"].items()}}
        for name in ("mean", "entropy", "moved"):
            verdict = claim(judge(protocol, values), name).verdict
            assert claim(judge(opposite, turned), name).verdict == verdict
            if "in" not in verdict:
                assert claim(judge(opposite, values), name).verdict == swap.get(verdict, verdict)


def test_the_verdict_of_every_combination_is_symmetric() -> None:
    turned = {"holds": "opposite", "opposite": "holds"}
    seen: set[str] = set()
    for h in range(3):
        for o in range(3):
            for e in range(3):
                for u in range(3):
                    counts = {"holds": h, "opposite": o, "equivalent": e, "undecided": u}
                    text = verdict_of(counts)
                    other = verdict_of({turned.get(k, k): v for k, v in counts.items()})
                    if h == o:
                        assert text == other
                    elif not (h and o):
                        assert ("opposite" in text) != ("opposite" in other) or not (h or o)
                    seen.add(text.split(" in ")[0])
    assert seen >= {
        "holds",
        "the opposite holds",
        "no difference that matters",
        "undecided",
        "the opposite",
        "not measured",
    }


def test_a_place_with_several_contrasts_is_counted_by_contrasts() -> None:
    protocol = only_mean(protocol_of())
    (one,) = protocol.claims
    values = values_of(protocol, 0.1)
    values["e"]["p1"] = {**values["e"]["p1"], "a": values["e"]["p1"]["b"]}  # no difference there
    assert claim(judge(protocol, values)).verdict == "holds in 1 of 2 places"
    several = replace(
        one, contrasts=(*one.contrasts, replace(one.contrasts[0], first="b", second="a", claimed="worse"))
    )
    assert claim(judge(replace(protocol, claims=(several,)), values)).verdict == "holds in 2 of 3 contrasts"


def test_intervals_of_a_claim_hold_together() -> None:
    """Wrong verdicts on a claim with 5 contrasts and no difference come in at most 5% of studies."""
    protocol = only_mean(protocol_of(seeds=20, interval="t", places=5))
    wrong = sum(
        any(
            c.verdict in ("better", "worse")
            for c in claim(judge(protocol, values_of(protocol, 0.0, 0.1, seed=i))).contrasts
        )
        for i in range(400)
    )
    assert wrong / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def first_seeds(values: dict[str, Any], arm: str, count: int, measures: tuple[str, ...]) -> dict[str, Any]:
    """The values without numbers on the first seeds of an arm, and these seeds as those that diverged."""
    for m in measures:
        values["e"]["p0"][arm][m][:count] = [math.nan] * count
    return {"e": {"p0": {arm: list(range(count))}}}


def test_a_run_that_diverged_counts_as_the_worst_or_leaves_the_contrast_undecided() -> None:
    protocol = protocol_of(seeds=300, places=1)
    values = values_of(protocol, 0.3)
    gone = first_seeds(values, "a", 3, ("mean", "entropy", "moved"))
    assert diverged_in(protocol, values) == gone
    judged = judge(protocol, values, gone)
    found = {name: claim(judged, name).contrasts[0] for name in ("mean", "entropy", "moved")}
    assert found["mean"].pairs == 300 and found["mean"].missing == found["mean"].diverged == (3, 0)
    assert found["mean"].verdict == "better" and found["mean"].reason == ""
    assert found["mean"].value == pytest.approx(0.3 - 3 * 0.8 / 300, abs=0.01)
    assert found["entropy"].verdict == "undecided" and found["entropy"].needed is None
    assert found["entropy"].reason == "3 seeds lack a number of one arm or of both"
    assert found["moved"].pairs == 297 and found["moved"].verdict == "better"
    assert json.loads(json.dumps([x.as_json() for x in judged], allow_nan=False))


def test_what_was_not_computed_is_not_judged_as_the_worst() -> None:
    """The mean alone has no number on these seeds, so that they did not diverge."""
    protocol = protocol_of(seeds=300, places=1)
    for count, reason in ((3, "3 seeds lack a number of one arm or of both"), (300, "no run of b gave a number")):
        values = values_of(protocol, -0.3)
        first_seeds(values, "b", count, ("mean",))
        gone = diverged_in(protocol, values)
        assert gone == {}
        found = claim(judge(protocol, values, gone)).contrasts[0]
        assert (found.verdict, found.reason, found.needed) == ("undecided", reason, None)
        assert found.missing == (0, count) and found.diverged == (0, 0)


def test_an_arm_that_diverged_on_every_seed_is_the_worst_and_two_such_arms_are_not_equal() -> None:
    protocol = protocol_of(seeds=300, places=1)
    values = values_of(protocol, 0.0)
    gone = first_seeds(values, "b", 300, ("mean", "entropy", "moved"))
    found = claim(judge(protocol, values, gone)).contrasts[0]
    assert found.verdict == "better" and found.value == pytest.approx(0.5, abs=0.01) and found.diverged == (0, 300)
    assert claim(judge(protocol, values, gone), "moved").contrasts[0].reason == "no run of b gave a number"
    gone["e"]["p0"] |= first_seeds(values, "a", 300, ("mean", "entropy", "moved"))["e"]["p0"]
    for name in ("mean", "entropy", "moved"):
        judged = claim(judge(protocol, values, gone), name)
        assert judged.verdict == "undecided" and judged.contrasts[0].reason == "no run of either arm gave a number"
    with pytest.raises(ValueError, match="values of e, p0, a, mean: seed 0 diverged and has a number"):
        judge(protocol, values_of(protocol, 0.0), gone)


def test_seeds_with_a_number_of_one_arm_only_make_no_pair() -> None:
    protocol = protocol_of(seeds=4, places=1)
    values = values_of(protocol, 0.1)
    values["e"]["p0"]["a"]["moved"][:2] = [math.nan] * 2
    values["e"]["p0"]["b"]["moved"][2:] = [math.nan] * 2
    found = claim(judge(protocol, values), "moved").contrasts[0]
    assert (found.verdict, found.reason, found.pairs) == ("undecided", "no seed has a number of both arms", 0)


def test_a_measure_without_a_range_is_never_equivalent() -> None:
    """Student's interval of equal seeds has no width, and allows no failure that they have not shown."""
    for interval in ("bounded", "t"):
        protocol = protocol_of(seeds=300, interval=interval, places=1)
        for shift, state in ((0.0, "undecided"), (0.06, "better"), (-0.06, "worse")):
            found = claim(judge(protocol, values_of(protocol, shift)), "moved").contrasts[0]
            assert found.verdict == state and found.needed is None and not found.hidden
            assert ("no range" in found.reason) == (shift == 0.0)
        assert claim(judge(protocol, values_of(protocol, 0.0)), "mean").verdict == "no difference that matters"


def test_what_a_preset_leaves_out_is_not_measured_and_what_is_missing_is_refused() -> None:
    protocol = protocol_of()
    values = values_of(protocol, 0.06)
    assert {x.verdict for x in judge(protocol, {})} == {"not measured"}
    one = replace(protocol.experiments["e"], places={"p0": protocol.experiments["e"].places["p0"]})
    found = claim(judge(replace(protocol, experiments={"e": one}), values))
    assert found.verdict == "holds (1 place not measured)" and [c.verdict for c in found.contrasts] == [
        "better",
        "not measured",
    ]
    without = {"e": {"p0": values["e"]["p0"]}}
    assert claim(judge(protocol, without)).verdict == "holds (1 place not measured)"
    del values["e"]["p1"]["a"]
    with pytest.raises(ValueError, match="values of e, p1: 'a' is missing; there are b"):
        judge(protocol, values)
    short = values_of(protocol, 0.06)
    short["e"]["p0"]["a"]["mean"].pop()
    with pytest.raises(ValueError, match="got 299; the preset of the protocol has 300 seeds"):
        judge(protocol, short)
    outside = values_of(protocol, 0.06)
    outside["e"]["p0"]["b"]["mean"][0] = 1.2
    with pytest.raises(ValueError, match=r"got 1.2, which is outside the range \[0, 1\]"):
        judge(protocol, outside)


@pytest.mark.parametrize("preset", ["full", "quick", "smoke"])
def test_the_registered_protocol_judges_values_of_its_presets(preset: str) -> None:
    """Values that are made up: every arm the same, so that no claim may hold and none may be refuted."""
    protocol = read(preset)
    rng = np.random.default_rng(0)

    def made(place: Place) -> dict[str, dict[str, list[float]]]:
        level = {m: 0.2 + 0.1 * rng.random(place.seeds) for m in place.measures}
        return {arm: {m: level[m].tolist() for m in place.measures} for arm in place.arms}

    values = {name: {p: made(place) for p, place in e.places.items()} for name, e in protocol.experiments.items()}
    judged = judge(protocol, values)
    assert len(judged) == len(protocol.claims)
    assert all(x.counts["holds"] == x.counts["opposite"] == 0 for x in judged)
    assert json.dumps([x.as_json() for x in judged], allow_nan=False)
