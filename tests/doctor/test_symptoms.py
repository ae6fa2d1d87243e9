"""Every symptom: a log that has it, a log that has not; and the radius that a batch gives."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bandpo import KL, OBJECTIVES, TV, Band, policy_loss
from bandpo.bounds.calibration import outside_fraction, radius_for
from bandpo.doctor import examine_batch, examine_log
from bandpo.doctor.batch import load_batch
from bandpo.doctor.scoring import examine_saved
from doctor_cases import SICK, WELL, batch, log


def named(findings, rule):
    [found] = [f for f in findings if f.rule == rule]
    return found


@pytest.mark.parametrize(("rule", "level", "series", "words"), SICK)
def test_symptom_is_seen(rule, level, series, words):
    found = named(examine_log(log(**series)), rule)
    assert found.level == level
    assert re.search(words, found.seen)
    assert found.knob
    assert found.cause


@pytest.mark.parametrize(("rule", "series"), WELL)
def test_no_symptom(rule, series):
    assert named(examine_log(log(**series)), rule).level == "ok"


def test_every_rule_has_both():
    everything = {k: v for _, _, series, _ in SICK for k, v in series.items()}
    # a log without any signal says nothing of single groups, and one without finite values nothing of their course
    everything |= {"frac_reward_zero_std": 0.8, "reward_std": 1.0, "critic/advantages/max": 1.0, "entropy": 1.0}
    rules = {f.rule for f in examine_log(log(**everything))} - {"reward", "columns"}
    assert rules == {rule for rule, *_ in SICK} == {rule for rule, _ in WELL}


def test_rewards_are_told_and_a_log_without_any_metric_is_an_error():
    assert "from 0.050 to 0.950" in named(examine_log(log(n=11, reward=lambda x: 0.05 + 0.9 * x)), "reward").seen
    with pytest.raises(ValueError, match="2 rows and none of the metrics that are looked for: entropy"):
        examine_log([{"step": 1}, {"step": 2, "entropy": "high"}])


@pytest.mark.parametrize("name", ["grpo", "dapo", "dcpo", "bandpo-kl", "bandpo-tv", "bandpo-chi2"])
def test_expected_clip_fraction_is_what_the_loss_then_counts(name):
    b = batch()
    _, metrics = policy_loss(**b, objective=name)
    row = next(r for r in named(examine_batch(b), "clipping").details if r.startswith(f"{name} "))
    assert float(row.split()[-1]) == pytest.approx(metrics["clip_fraction/any"].item(), abs=5e-5)


@settings(max_examples=40, deadline=None)
@given(target=st.floats(0.002, 0.3), seed=st.integers(0, 1000), divergence=st.sampled_from([KL, TV]))
def test_recommended_radius_clips_the_target(target, seed, divergence):
    b = batch(seed=seed)
    tokens = {"log_ratio": b["logprobs"] - b["old_logprobs"], "old_logprobs": b["old_logprobs"],
              "advantages": b["advantages"].unsqueeze(1), "mask": b["mask"]}  # fmt: skip
    radius = radius_for(divergence, target, tokens)
    count = int(b["mask"].sum())
    assert outside_fraction(Band(divergence, radius, max_ratio=None), tokens) == pytest.approx(
        round(target * count) / count
    )


def test_batch_symptoms():
    b = batch()
    still = {**b, "logprobs": b["old_logprobs"]}
    assert named(examine_batch(still), "ratios").level == "problem"
    assert named(examine_batch(still), "radius").level == "note"
    assert named(examine_batch(b), "ratios").level == "ok"
    broken = {**b, "logprobs": b["logprobs"].masked_fill(b["old_logprobs"] < -2.9, math.nan)}
    assert named(examine_batch(broken), "nonfinite").level == "problem"
    positive = {**b, "logprobs": b["logprobs"] + 5}
    assert named(examine_batch(positive), "positive").level == "problem"
    far = {**b, "rollout_logprobs": b["old_logprobs"] + 0.1}
    near = {**b, "rollout_logprobs": b["old_logprobs"] + 0.001}
    assert named(examine_batch(far), "mismatch").level == "warning"
    assert named(examine_batch(near), "mismatch").level == "ok"
    everything = {**b, "logprobs": torch.full_like(b["logprobs"], math.nan)}
    assert [f.rule for f in examine_batch(everything)] == ["nonfinite"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize(
    "names",
    [("logprobs", "old_logprobs", "mask"), ("per_token_logps", "old_per_token_logps", "completion_mask"),
     ("log_prob", "old_log_prob", "response_mask"), ("trainer_logprobs", "inference_logprobs", "loss_mask")],
)  # fmt: skip
def test_batches_are_read_in_every_host_s_names(suffix, names, tmp_path):
    b = batch(400)
    tensors = {names[0]: b["logprobs"], names[1]: b["old_logprobs"], names[2]: b["mask"], "advantages": b["advantages"]}
    path = tmp_path / f"batch{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".pt":
        torch.save(tensors, path)
    else:
        np.savez(path, **{k: v.numpy() for k, v in tensors.items()})
    assert examine_batch(load_batch(path)) == examine_batch(b)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch pwned",)


def test_bad_batches_are_errors_and_nothing_in_them_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"logprobs": Evil()}, tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", logprobs=np.array([Evil()], dtype=object))
    for name in ("evil.pt", "evil.npz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a batch"):
            load_batch(tmp_path / name)
    assert not (tmp_path / "pwned").exists()
    good = batch(400)
    for changes, message in (
        ({"logprobs": None, "old_logprobs": None}, r"lacks logprobs \(or per_token_logps"),
        ({"old_logprobs": None}, "lacks old"),
        ({"advantages": torch.ones(3)}, r"advantages has the shape \(3,\)"), ({"mask": torch.ones(2, 2)}, "mask has the shape"),
        ({"logprobs": torch.ones(20, 20, dtype=torch.long)}, "must be floating point, got torch.int64"),
        ({"mask": torch.zeros(20, 20)}, "no valid token"),
        ({k: torch.tensor(-1.0) for k in good}, "is one number"), ({k: torch.zeros(0, 4) for k in good}, "is empty"),
    ):  # fmt: skip
        b = {k: v for k, v in {**good, **changes}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            examine_batch(b)
    torch.save({**good, "mask": torch.zeros(20, 20)}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"none\.pt: the batch has no valid token"):
        examine_saved(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="target must be between 0 and 1, got 2"):
        examine_batch(good, target=2)
    with pytest.raises(ValueError, match="a batch ends in"):
        load_batch(tmp_path / "batch.pickle")
    assert OBJECTIVES["grpo"]
