"""`Doctor.observe`: it tells each finding once, in bounded memory, and ends with what `examine_log` finds."""

import math
import random
import sys

import pytest
import torch

from bandpo.doctor import Doctor, examine_log
from bandpo.monitoring.series import Running, stats_of
from doctor_cases import SICK, WELL, log


def observed(rows, **options):
    doctor = Doctor(**options)
    for row in rows:
        doctor.observe(row)
    return doctor


def seen(findings):
    """All but what is about the log as a file."""
    return [(f.rule, f.level, f.seen, f.cause, f.knob) for f in findings if f.rule not in ("columns", "log")]


@pytest.mark.parametrize("series", [series for _, _, series, _ in SICK] + [series for _, series in WELL])
@pytest.mark.parametrize("rows", [1, 9, 20, 300])
def test_at_the_end_it_finds_what_the_log_has(series, rows):
    rows = log(n=rows, **series) if rows > 1 else log(n=2, **series)[:1]
    assert seen(observed(rows).findings()) == seen(examine_log(rows))


def test_random_logs_with_holes_and_two_names_of_a_metric():
    r = random.Random(0)
    for _ in range(30):
        rows = []
        for _ in range(r.randint(1, 80)):
            row = {"entropy": r.random(), "actor/entropy": r.random(), "critic/rewards/mean": r.choice([1.0, math.nan]),
                   "critic/score/mean": r.random(), "clip_ratio/region_mean": r.choice([0.0, 0.3]),
                   "kl": r.choice([0.1, math.inf]), "frac_reward_zero_std": r.choice([0.0, 1.0]),
                   "grad_norm": r.choice([0.0, 1.0]), "note": "text"}  # fmt: skip
            rows.append({k: v for k, v in row.items() if r.random() < 0.6})
        if any(row.keys() - {"note", "kl"} for row in rows):
            assert seen(observed(rows).findings()) == seen(examine_log(rows))


@pytest.mark.parametrize("n", [1, 7, 2047, 2048, 2049, 5000, 70_001])
def test_a_running_series_has_the_numbers_of_the_whole(n):
    r = random.Random(n)
    values = [math.sin(i / 500) + r.random() for i in range(n)]
    running = Running()
    for value in values:
        running.add(value)
    found, whole = running.stats(), stats_of(values)
    exact = n <= 2048
    assert (found.count, found.largest, found.smallest, found.zeros) == (n, whole.largest, whole.smallest, whole.zeros)
    assert found.mean == pytest.approx(whole.mean, rel=1e-12)
    # a block has less than a hundredth of the tenth's values, each within the range of the series
    allowed = 1e-12 if exact else 0.01 * (whole.largest - whole.smallest)
    assert found.start == pytest.approx(whole.start, abs=allowed)
    assert found.end == pytest.approx(whole.end, abs=allowed)


def test_memory_and_work_do_not_grow_with_the_run():
    def held(doctor):
        return sum(sys.getsizeof(s._blocks) + 32 * len(s._blocks) for _, _, s in doctor._run._found.values())

    rows = [{"entropy": 1.0 + 0.01 * (i % 7), "reward": i % 3, "other": 1.0} for i in range(9000)]
    short, long = observed(rows[:4500]), observed(rows)
    assert held(long) < 1.5 * held(short)
    assert all(len(s._blocks) < 2048 for _, _, s in long._run._found.values())


def test_it_tells_once_with_the_step_and_again_if_worse():
    doctor = Doctor()
    collapse = [{"entropy": math.exp(-i / 8), "clip_ratio/region_mean": 0.01} for i in range(60)]
    told = [t for i, row in enumerate(collapse) for t in doctor.observe(row, step=10 * i)]
    assert [(t.finding.rule, t.finding.level) for t in told] == [("entropy", "warning")]
    assert told == doctor.told
    assert 190 <= told[0].step <= 300
    assert str(told[0]).startswith(f"step {told[0].step}, doctor: entropy: entropy went from")
    worse = doctor.observe({"entropy": math.nan}, step=600)
    assert [(t.step, t.finding.rule, t.finding.level) for t in worse] == [(600, "nonfinite", "problem")]
    assert not doctor.observe({"entropy": math.nan}, step=601)
    rows = [{"metric": math.nan, "entropy": 1.0}, {"metric": 1.0, "grad_norm": math.inf}]
    doctor = Doctor()
    levels = [(t.step, t.finding.rule, t.finding.level) for row in rows for t in doctor.observe(row)]
    assert levels == [(1, "nonfinite", "warning"), (2, "nonfinite", "problem")]


def test_it_is_silent_on_a_healthy_run_and_on_one_odd_row():
    r = random.Random(1)
    doctor = Doctor()
    for i in range(400):
        row = {"entropy": 0.5 - 0.0006 * i + 0.02 * r.random(), "clip_ratio/region_mean": 0.02 * r.random(),
               "ratio/mean": 1 + 0.001 * r.random(), "frac_reward_zero_std": 0.6 * r.random(), "grad_norm": 0.4 + r.random(),
               "reward": 0.3 + 0.001 * i, "band/divergence_mean": 0.7 * r.random(), "band/divergence_max": 100 * r.random(),
               "completions/clipped_ratio": 0.2 * r.random(), "nonfinite_fraction": 0.0, "step": i}  # fmt: skip
        if i == 30:  # one odd row: a spike that is gone in the next
            row |= {"entropy": 5.0, "completions/clipped_ratio": 1.0}
        assert not doctor.observe(row), (i, doctor.told)


def test_a_late_change_is_noticed_within_twenty_rows():
    doctor = Doctor()
    rows = [{"sampling/sampling_logp_difference/mean": 0.003 if i < 1000 else 0.05} for i in range(1100)]
    told = [t for i, row in enumerate(rows) for t in doctor.observe(row, step=i)]
    assert [t.finding.rule for t in told] == ["mismatch"]
    assert 1000 <= told[0].step < 1020


def test_stop_and_what_is_refused():
    flat = [{"grad_norm": 0.0, "entropy": 0.1 * i} for i in range(30)]
    assert observed(flat, stop=True).should_stop
    assert not observed(flat).should_stop
    assert not observed(flat, stop=["clipping"]).should_stop
    assert observed(flat, stop="still").should_stop
    with pytest.raises(ValueError, match=r"stop: 'inert' is no rule of a log; choose True, or of .*nonfinite, signal"):
        Doctor(stop=["inert"])
    with pytest.raises(ValueError, match="patience must be at least 1 row, got 0"):
        Doctor(patience=0)


def test_tensors_steps_and_other_values():
    doctor = Doctor(patience=1)
    assert not doctor.observe({"entropy": torch.tensor(0.5), "list": [1, 2], "many": torch.zeros(3), "text": "high"})
    [told] = doctor.observe({"entropy": torch.tensor(math.nan), "step": torch.tensor(7)})
    assert (told.step, told.finding.rule) == (7, "nonfinite")
    assert not Doctor().findings()
    assert not observed([{"loss_of_my_own": 1.0}]).findings()


def test_a_milder_finding_is_not_told_after_a_worse_one():
    doctor = Doctor(patience=3)
    inert = [{"clip_ratio/region_mean": 0.0, "ratio/mean": 1.0, "entropy": 1.0 - 0.01 * i} for i in range(6)]
    moved = [{"clip_ratio/region_mean": 0.0, "ratio/mean": 1.1, "entropy": 0.9 - 0.01 * i} for i in range(6)]
    levels = [(t.finding.rule, t.finding.level) for row in inert + moved for t in doctor.observe(row)]
    assert levels == [("clipping", "problem")]
    assert [(f.rule, f.level) for f in doctor.findings() if f.rule == "clipping"] == [("clipping", "warning")]


@pytest.mark.parametrize(("rows", "told"), [(2, 0), (3, 1)])
def test_three_rows_in_succession_must_show_it(rows, told):
    clipped = [0.19] * 24 + [0.6] + [0.19] * (rows - 1) + [0.0] + [0.19] * 5
    doctor, found = Doctor(), []
    for i, share in enumerate(clipped):
        found += doctor.observe({"clip_ratio/region_mean": share, "entropy": 1.0 - 0.01 * (i % 3)})
    assert len(found) == told
