"""Folders as `bandpo train` leaves them, written by hand: small, and with numbers that a test knows."""

import json
from pathlib import Path

import yaml

from bandpo.metrics import PROB_BINS
from bandpo.plots.figures import drawn_interval
from bandpo.train.record import Parts
from bandpo.zoo import OBJECTIVES

SETTINGS = {
    "method": "grpo", "task": "countdown", "dataset": None, "pairs": None, "objective": "bandpo-kl", "reward": None,
    "max_steps": 8, "seed": 0, "model": None, "eval_samples": 2, "learning_rate": 4e-4, "num_generations": 8,
    "per_device_train_batch_size": 8, "steps_per_generation": 2, "logging_steps": 2, "use_cpu": True, "bf16": False,
}  # fmt: skip


def metrics_row(step, **more):
    bins = {
        f"{kind}/{name}": 0.125
        for name in PROB_BINS
        for kind in ("clip_fraction_by_prob/low", "clip_fraction_by_prob/high", "token_fraction_by_prob")
    }
    return {
        "step": step, "reward": 0.1 * step, "entropy": 1.0 - 0.05 * step, "clip_ratio/high_mean": 0.02,
        "clip_ratio/low_mean": 0.01, "clip_ratio/region_mean": 0.03, "num_tokens": 1000.0 * step,
        "completions/mean_length": 7.0, "completions/max_length": 9.0, "grad_norm": 0.5, "loss": 0.1,
        "frac_reward_zero_std": 0.2, "reward_std": 0.4, **bins, **more,
    }  # fmt: skip


def run_folder(folder: Path, *, after=(), finished=True, steps=8, prompts=("a", "b", "c", "d"), given=(), **settings):
    """A run whose prompts have the rewards (0, 1) before training, and `after` of each prompt afterwards."""
    folder.mkdir(parents=True)
    resolved = {**SETTINGS, "output_dir": str(folder), **settings}
    shown = {k: v for k, v in resolved.items() if k in ("task", "objective", "max_steps", "seed", *given, *settings)}
    (folder / "config.yaml").write_text(yaml.safe_dump({"task": "countdown", **shown}, sort_keys=False))
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(resolved))
    versions = {"bandpo": "0.1.0", "torch": "2.13.0"}
    environment = {
        "command": "bandpo train",
        "seed": resolved["seed"],
        "device": "cpu",
        "versions": versions,
        "git": None,
    }
    (folder / "env.json").write_text(json.dumps(environment | ({"seconds": 12.0} if finished else {})))
    rows = [metrics_row(step) for step in range(2, steps + 1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    times = [{"step": row["step"], "step_time": 0.5} for row in rows]
    (folder / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    after = after or [(1.0, 1.0)] * len(prompts)
    stages = {"before": [(0.0, 1.0)] * len(prompts)} | ({"after": after} if finished else {})
    samples = [
        {"stage": stage, "prompt": prompt, "completions": ["x"] * len(scores), "rewards": list(scores)}
        for stage, found in stages.items()
        for prompt, scores in zip(prompts, found, strict=True)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if finished:
        mean = sum(map(sum, after)) / sum(map(len, after))
        scores = {"before": {"mean@2": 0.5, "pass@1": 0.5}, "after": {"mean@2": mean, "pass@1": mean}}
        change = {"value": mean - 0.5, "low": mean - 0.6, "high": mean - 0.4}
        evaluation = {
            **scores,
            "change": change,
            "prompts": len(prompts),
            "samples": 2,
            "temperature": 1.0,
            "top_p": 1.0,
        }
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    name = resolved["objective"]
    band = drawn_interval(OBJECTIVES[name].bounds) if name in OBJECTIVES else None
    tokens = {"p": [0.5, 0.1], "ratio": [1.0, 3.0], "clipped": [0.0, 1.0]} if finished else {}
    title = f"{name} on countdown, seed {resolved['seed']}"
    Parts(title, finished=finished, band=band, name=name, tokens=tokens).write(folder)
    return folder
