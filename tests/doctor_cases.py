"""Cases of the doctor's rules: for each one on which it fires, and one on which it has nothing against the run.

tools/rules.py names them on the page of the rules, and tests/doctor/test_catalog.py requires both for each rule.
"""

import dataclasses
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from bandpo import OBJECTIVES, TV, Band
from bandpo.doctor import Setup, Truncation, examine, examine_batch, examine_log, examine_setup

GOOD = Setup("TRL", OBJECTIVES["bandpo-kl"], steps=4.0, steps_from="four")
"""A configuration without faults."""

SETUPS_THAT_FIRE = [
    ("bypass", {"bypassed": "a patch"}, "problem", "a patch"),
    ("bypass", {"ours": False}, "note", "TRL's own"),
    ("inert", {"steps": 1.0, "steps_from": "one"}, "problem", "can never bind"),
    ("inert", {"steps": 1.0, "objective": OBJECTIVES["dppo-kl"], "engine": "vLLM"}, "note", "one optimiser step"),
    ("inert", {"steps": 1.0, "objective": OBJECTIVES["dppo-kl"]}, "problem", "can never bind"),
    ("anchor", {"engine": "vLLM"}, "warning", "not weighed"),
    ("anchor", {"host": "verl", "objective": OBJECTIVES["dppo-kl"]}, "problem", "gives recomputed log-probs"),
    ("anchor", {"host": "verl", "old_is_rollout": True}, "problem", "gives the sampler's log-probs"),
    ("kl", {"kl_coef": 0.1, "kl": "k3", "kl_from": "x"}, "note", r"of 0.1 \(x\), the k3"),
    ("kl", {"kl_coef": 0.1, "kl": "k3-unbiased"}, "note", "the k3-unbiased"),
    ("kl", {"kl_coef": 0.1, "kl": "k2-ratio"}, "note", "the k2-ratio"),
    ("kl", {"kl_coef": 0.1, "kl": "k1"}, "warning", "does not pull to the reference"),
    ("kl", {"kl_coef": 0.1, "kl": "", "kl_from": "kl_loss_type=abs"}, "warning", "kl_loss_type=abs"),
    ("kl", {"kl_coef": None}, "note", "not known"),
    ("kl", {"kl_coef": 0.1, "kl": None}, "note", "not known"),
    ("sampling", {"top_p": 0.9}, "warning", "top_p=0.9 cut"),
    ("sampling", {"top_k": 50, "min_p": 0.1}, "warning", "top_k=50, min_p=0.1 cut"),
    ("sampling", {"temperature": 0.0}, "problem", "greedily"),
    ("sampling", {"temperature": 0.7}, "note", "temperature=0.7"),
    ("group", {"group": 1}, "problem", "one completion"),
    ("cap", {}, "note", "p < 0.00714"),
    ("memory", {"tokens": 4096, "vocabulary": 151_936}, "warning", r"2\.32 GiB in float32, about 9\.3 GiB"),
    ("memory", {"tokens": 4096, "vocabulary": 151_936, "fused_head": True}, "ok", "does not make them"),
    ("refused", {"refused": "an option would be ignored"}, "problem", "would be ignored"),
    ("precision", {"weights": "bfloat16", "learning_rate": 1e-6}, "warning", "most updates are lost"),
    ("interval", {}, "note", "at p = 0.5"),
    ("interval", {"objective": OBJECTIVES["dapo"]}, "note", "a clip of 0.2 below and 0.28 above for every p"),
    ("assumed", {"assumed": ("top_p=1.0",)}, "note", "defaults are assumed: top_p=1.0"),
    ("unread", {"unread": ("line 3: $N is not set",)}, "note", "line 3"),
]
"""Rule, changes of `GOOD`, level, and a regular expression for what is seen."""

SETUPS_THAT_PASS = [
    ("bypass", {}),
    ("inert", {}),
    ("anchor", {}),
    ("anchor", {"engine": "vLLM", "corrected": True}),
    ("kl", {"kl_coef": 0.1, "kl": "k3-ratio"}),
    ("kl", {"kl_coef": 0.1, "kl": "k1-ratio"}),
    ("anchor", {"engine": "vLLM", "objective": OBJECTIVES["dppo-kl"]}),
    ("anchor", {"host": "verl", "engine": "vllm", "objective": OBJECTIVES["dppo-tv"], "old_is_rollout": True}),
    ("sampling", {}),
    ("cap", {"objective": dataclasses.replace(GOOD.objective, bounds=Band(TV, 0.05, max_ratio=1e40))}),
    ("memory", {"tokens": 100, "vocabulary": 1000}),
    ("precision", {"weights": "bfloat16", "learning_rate": 1e-2}),
]
"""Rule, and changes of `GOOD`."""


def log(n=20, **series):
    return [{name: (f(i / (n - 1)) if callable(f) else f) for name, f in series.items()} for i in range(n)]


def _half(x):
    return 1.0 - 0.6 * x


SICK = [
    ("clipping", "problem", {"clip_ratio/region_mean": 0.0, "ratio/mean": 1.0}, "the region is inert"),
    ("clipping", "warning", {"actor/pg_clipfrac": 0.0}, "is 0 in all 20 rows"),
    ("clipping", "warning", {"clip_ratio/region_mean": 0.0, "outside_fraction/any": 0.0}, "is 0 in all 20 rows"),
    ("clipping", "note", {"clip_ratio/region_mean": 0.0, "band/saturated_fraction": 1.0}, "is 0 in all 20 rows"),
    ("clipping", "warning", {"clip_fraction/any": 0.3}, r"0\.300 on average"),
    ("entropy", "warning", {"entropy": lambda x: math.exp(-4 * x)}, "collapse"),
    ("entropy", "warning", {"actor/entropy": lambda x: 0.3 + x}, "explosion"),
    ("overshoot", "warning", {"band/divergence_mean": lambda x: 0.1 + 1.1 * (x == 1)}, r"1\.20 in the worst row"),
    ("overshoot", "warning", {"actor/band/divergence_mean": 1.5, "actor/band/divergence_max": 9.0}, r"1\.50 radii"),
    ("mismatch", "warning", {"sampling/sampling_logp_difference/mean": lambda x: 0.1 * x}, "at the end"),
    ("mismatch", "warning", {"training/rollout_probs_diff_mean": 0.05}, "0.0500"),
    ("groups", "warning", {"frac_reward_zero_std": 0.9}, r"0\.90"),
    ("length", "warning", {"completions/clipped_ratio": lambda x: x}, r"0\.9"),
    ("length", "warning", {"response_length/clip_ratio": 0.7}, r"0\.70"),
    ("cap", "warning", {"actor/band/band/cap_fraction": 0.9}, r"0\.90"),
    ("nonfinite", "problem", {"nonfinite_fraction": lambda x: float(x > 0.9)}, "in 2 rows"),
    ("nonfinite", "problem", {"grad_norm": lambda x: math.nan if x == 1 else 1.0}, "not finite in 1"),
    ("unscored", "warning", {"reward/unscored": 0.2}, r"0\.200"),
    ("signal", "problem", {"frac_reward_zero_std": 1.0}, "no group ever had a signal: frac_reward_zero_std is 1"),
    ("signal", "problem", {"reward_std": 0.0}, "no group ever had a signal: reward_std is 0"),
    ("signal", "problem", {"critic/advantages/max": 0.0, "critic/advantages/min": 0.0}, "every advantage is 0 in all rows"),
    ("still", "problem", {"grad_norm": 0.0, "entropy": lambda x: x}, "grad_norm is 0 in all 20 rows"),
    ("still", "warning", {"reward": 0.5, "entropy": 1.0}, "each of the 2 metrics looked at has one value in all rows"),
    ("nonfinite", "problem", {"reward": math.nan, "loss": math.inf}, "reward is not finite in 20 of 20 rows; loss is not"),
    ("nonfinite", "problem", {"entropy": "NaN"}, "entropy is not finite in 20 of 20"),
    ("entropy cause", "warning", {"entropy": _half, "clip_ratio/low_mean": 0.001, "clip_ratio/high_mean": 0.02}, "upper edge"),
    ("effective size", "warning", {"actor/band/correction/effective_sample_size": 0.2}, r"0\.200 at the end"),
    ("age", "warning", {"async/staleness_mean": 12.0}, r"12\.00 updates"),
    ("nonfinite", "problem", {"kl": 0.1, "actor/entropy": lambda x: math.nan if x > 0.9 else 1.0}, "in 2 of 20 rows"),
]  # fmt: skip
WELL = [
    ("nonfinite", {"nonfinite_fraction": 0.0, "band/upper_mean": math.inf}),  # no-clip: its upper edge is at infinity
    ("clipping", {"clip_ratio/region_mean": 0.01, "ratio/mean": 1.001}),
    ("clipping", {"clip_ratio/region_mean": 0.0, "outside_fraction/any": 0.05}),  # `soft_edge` takes no gradient away
    ("clipping", {"actor/pg_clipfrac": 0.0, "actor/band/outside_fraction/any": 0.05}),
    ("entropy", {"entropy": lambda x: 1.0 - 0.5 * x}),
    ("entropy", {"entropy": lambda x: 0.02 + 0.001 * x}),  # low from the start is no explosion
    ("overshoot", {"band/divergence_mean": 0.7, "band/divergence_max": 100.0}),
    ("overshoot", {"band/divergence_max": 100.0}),  # the furthest token says nothing: it is far in runs that learn, too
    ("mismatch", {"sampling/sampling_logp_difference/mean": 0.003}),
    ("groups", {"frac_reward_zero_std": lambda x: 0.2 + 0.4 * x}),  # many prompts are solved at the end
    ("length", {"completions/clipped_ratio": 0.1}),
    ("cap", {"band/cap_fraction": 0.01}),
    ("nonfinite", {"nonfinite_fraction": 0.0, "grad_norm": 1.0}),
    ("unscored", {"reward/unscored": 0.0}),
    ("signal", {"frac_reward_zero_std": lambda x: float(x < 1), "reward_std": lambda x: float(x == 1)}),
    ("signal", {"critic/advantages/max": lambda x: x, "critic/advantages/min": 0.0}),
    ("still", {"grad_norm": lambda x: 1 + x, "reward": 0.5}),
    ("entropy cause", {"entropy": lambda x: 1 - 0.1 * x, "clip_ratio/low_mean": 0.001, "clip_ratio/high_mean": 0.02}),
    ("effective size", {"actor/band/correction/effective_sample_size": 0.9}),
    ("age", {"async/staleness_mean": 2.0}),
]  # fmt: skip


def batch(n=4000, scale=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(20, n // 20, generator=g, dtype=torch.float64) - 0.01
    new = (old + scale * torch.randn(old.shape, generator=g, dtype=torch.float64)).clamp(max=-1e-6)
    return {"logprobs": new, "old_logprobs": old, "advantages": torch.randn(20, generator=g, dtype=torch.float64),
            "mask": torch.rand(old.shape, generator=g) < 0.9}  # fmt: skip


def _changed(name, change):
    return {**batch(), name: change(batch())}


def _with(**columns):
    return {**batch(), **columns}


def _noisy(size):
    b = batch()
    return {**b, "again_logprobs": b["logprobs"] + size * torch.linspace(-1, 1, b["mask"].numel()).view_as(b["mask"])}


def _groups(*, same):
    ids = torch.arange(20 * 200).view(20, 200)
    ids = ids[:1].expand(20, 200).clone() if same else ids
    return _with(group=torch.arange(20) // 4, completion_ids=ids, mask=torch.ones(20, 200, dtype=torch.bool))


def _reference(shift):
    return _with(ref_logprobs=batch()["logprobs"] + shift)


def _one_token():
    found = torch.zeros(20, 200, dtype=torch.float64)
    row, column = batch()["mask"].nonzero()[7].tolist()
    found[row, column] = 1.0
    return found


def _cut():
    old = torch.log_softmax(torch.randn(20, 200, 8, generator=torch.Generator().manual_seed(1)), -1).double()
    b = {**batch(), "old_topk_logprobs": old, "old_logprobs": old[..., 0]}
    return {**b, "logprobs": old[..., 0] + 0.01}


def _logits(top_p):
    b = _cut()
    return examine_batch(b, truncation=Truncation(top_p, 0, 0.0))


BATCHES = [
    ("noise", True, "two scorings 0.5 nats apart", lambda: _noisy(0.5)),
    ("noise", False, "two scorings 1e-6 nats apart", lambda: _noisy(1e-6)),
    ("effective size", True, "log-ratios of 3 nats", lambda: batch(scale=3.0)),
    ("effective size", False, "log-ratios of 0.3 nats", batch),
    ("age", True, "tokens 20 updates old", lambda: _with(age=torch.full((20,), 20))),
    ("age", False, "tokens 1 update old", lambda: _with(age=torch.ones(20, dtype=torch.int64))),
    ("gradient", True, "log-ratios of 3 nats", lambda: batch(scale=3.0)),
    ("gradient", False, "log-ratios of 0.05 nats", lambda: batch(scale=0.05)),
    ("duplicates", True, "equal completions", lambda: _groups(same=True)),
    ("duplicates", False, "completions that differ", lambda: _groups(same=False)),
    ("groups", True, "groups with advantages of 0", lambda: {**_groups(same=False), "advantages": batch()["advantages"] * 0}),
    ("groups", False, "groups with signal", lambda: _groups(same=False)),
    ("length bias", True, "sequences of several lengths", batch),
    ("kl estimate", True, "a reference that likes one token far more", lambda: _reference(12.0 * _one_token())),
    ("kl estimate", False, "a reference near by", lambda: _reference(0.1)),
    ("nonfinite", True, "NaN", lambda: _changed("logprobs", lambda b: b["logprobs"].masked_fill(b["mask"], math.nan))),
    ("nonfinite", False, "finite log-probs", batch),
    ("positive", True, "log-probs above 0", lambda: _changed("logprobs", lambda b: b["logprobs"] + 5)),
    ("positive", False, "log-probs below 0", batch),
    ("signal", True, "advantages of 0", lambda: _changed("advantages", lambda b: b["advantages"] * 0)),
    ("signal", False, "advantages that differ", batch),
    ("ratios", True, "ratios of 1", lambda: _changed("logprobs", lambda b: b["old_logprobs"])),
    ("ratios", False, "ratios that differ", batch),
    ("mismatch", True, "a sampler 0.1 nats off", lambda: _changed("rollout_logprobs", lambda b: b["old_logprobs"] + 0.1)),
    ("mismatch", False, "a sampler 0.001 nats off", lambda: _changed("rollout_logprobs", lambda b: b["old_logprobs"] + 1e-3)),
    ("clipping", True, "tokens outside of some regions", batch),
    ("radius", True, "tokens that moved", batch),
    ("radius", False, "only tokens that are not finite", lambda: _changed("logprobs", lambda b: b["logprobs"] * math.nan)),
]  # fmt: skip
"""Rule, whether it fires, what the batch is, and a function that makes it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A case of a rule.

    Args:
        rule: The rule.
        fires: Whether it has something to report: a finding that is not ok, for a rule that only informs any finding.
        reads: What the rule looks at.
        what: The case in a few words.
        run: Gives all findings.
    """

    rule: str
    fires: bool
    reads: str
    what: str
    run: object


def _of_setup(rule, changes, *, fires):
    what = ", ".join(f"{name}={getattr(value, 'name', value)!r}" for name, value in changes.items())
    run = lambda: examine_setup(dataclasses.replace(GOOD, **changes))  # noqa: E731
    return Case(rule, fires, "configuration", what or "bandpo-kl, 4 steps a rollout", run)


def _of_log(rule, series, *, fires):
    def shown(value):
        return f"from {value(0.0):g} to {value(1.0):g}" if callable(value) else f"{value}"

    what = ", ".join(f"{name}: {shown(value)}" for name, value in series.items())
    return Case(rule, fires, "log", what, lambda: examine_log(log(**series)))


def _of_a_file():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch.safetensors"
        save_file(batch(), path)
        return examine(path)


CASES = [
    *(_of_setup(rule, changes, fires=level != "ok") for rule, changes, level, _ in SETUPS_THAT_FIRE),
    *(_of_setup(rule, changes, fires=False) for rule, changes in SETUPS_THAT_PASS),
    *(
        _of_setup(rule, changes, fires=False)
        for rule, changes in (
            ("refused", {}), ("group", {}), ("assumed", {}), ("unread", {}), ("cap", {"objective": OBJECTIVES["grpo"]}),
        )
    ),
    *(_of_log(rule, series, fires=True) for rule, _, series, _ in SICK),
    *(_of_log(rule, series, fires=False) for rule, series in WELL),
    _of_log("reward", {"reward": lambda x: 0.1 + 0.8 * x}, fires=True),
    _of_log("reward", {"entropy": lambda x: 1.0 - 0.5 * x}, fires=False),
    Case("kept mass", True, "batch", "top_p=0.5", lambda: _logits(0.5)),
    Case("kept mass", False, "batch", "no truncation", lambda: _logits(1.0)),
    Case("memory", True, "batch", "4000 tokens of 151,936 words", lambda: examine_batch(batch(), vocabulary=1_519_360)),
    Case("log", True, "log", "steps that go back", lambda: examine_log([{"step": i, "entropy": 0.5} for i in (1, 2, 3, 2, 3)])),
    Case("log", False, "log", "steps that rise", lambda: examine_log([{"step": i, "entropy": 0.5} for i in (1, 2, 3)])),
    Case("columns", True, "log", "any log", lambda: examine_log(log(entropy=0.5, other=1.0))),
    Case("columns", True, "batch", "any file", _of_a_file),
    *(Case(rule, fires, "batch", what, lambda make=make: examine_batch(make())) for rule, fires, what, make in BATCHES),
]  # fmt: skip
