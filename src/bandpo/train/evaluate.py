"""mean@k and pass@k on held-out prompts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from bandpo._system.files import read_jsonl, write_jsonl
from bandpo.integrations.trl.generate import as_completion, sample_batches
from bandpo.metrics import pass_at_powers
from bandpo.train.rewards import RewardFunction


@dataclass(frozen=True)
class Evaluation:
    """Samples of every prompt and their rewards.

    Args:
        prompts: One for each row.
        completions: k for each row.
        rewards: k for each row; a sample counts as right from 0.5 on. NaN where the reward function gave None.
    """

    prompts: list[Any]
    completions: list[list[str]]
    rewards: list[list[float]]

    @property
    def samples(self) -> int:
        """Samples of each prompt, k."""
        return len(self.rewards[0])

    def summary(self) -> dict[str, float]:
        """`mean@k` (mean over prompts of the mean reward), unbiased `pass@j` for j = 1, 2, 4 … k, share of prompts with signal.

        Samples that the reward function could not score take no part: a prompt's mean is over its scored samples, pass@j is
        over the prompts with at least j of them (NaN if there are none), and a prompt has signal if its scored rewards differ.
        `unscored` counts the samples.

        Raises:
            ValueError: If it could score none.
        """
        rewards = torch.tensor(self.rewards, dtype=torch.float64)
        scored = (~rewards.isnan()).sum(1)
        kept = rewards[scored > 0]
        if not len(kept):
            raise ValueError(
                f"none of the {len(rewards)} held-out prompts could be scored: the reward gave no number for them"
            )
        count = scored[scored > 0]
        right = (kept >= 0.5).sum(1)  # NaN is not
        report = {f"mean@{self.samples}": kept.nanmean(1).mean().item(), **pass_at_powers(right, count, self.samples)}
        lowest, highest = kept.nan_to_num(nan=math.inf).amin(1), kept.nan_to_num(nan=-math.inf).amax(1)
        report["groups with signal"] = (highest > lowest).double().mean().item()
        report["unscored"] = float(rewards.isnan().sum())
        return report

    def write(self, path: Path, stage: str) -> None:
        """Add the samples to a JSONL file, one prompt a line; those of the same stage that it had go."""
        kept = [row for row in read_jsonl(path) if row["stage"] != stage] if path.exists() else []
        rows = zip(self.prompts, self.completions, self.rewards, strict=True)
        own = [{"stage": stage, "prompt": p, "completions": c, "rewards": [_or_none(x) for x in r]} for p, c, r in rows]
        write_jsonl(path, [*kept, *own])

    @classmethod
    def read(cls, path: Path, stage: str) -> "Evaluation | None":
        """What `write` wrote, None where there is nothing of that stage."""
        rows = [row for row in read_jsonl(path) if row["stage"] == stage] if path.exists() else []
        if not rows:
            return None
        rewards = [[math.nan if x is None else x for x in row["rewards"]] for row in rows]
        return cls([row["prompt"] for row in rows], [row["completions"] for row in rows], rewards)


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    reward: RewardFunction,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    sampler: dict[str, Any] | None = None,
) -> Evaluation:
    """Sample `samples` completions of every row and score them; the rows are divided among the processes.

    Args:
        model: A causal LM with `generate`.
        tokenizer: Its tokenizer, padding on the left.
        rows: Dataset with "prompt" and what the reward needs.
        reward: A reward function.
        samples: Completions of each prompt.
        max_new_tokens: Their maximal length.
        temperature: Of sampling; 0 is greedy.
        top_p: Of sampling.
        batch_size: Completions at once.
        seed: Of sampling; the state of the random generators is restored.
        sampler: What else the sampler is, from `sampler_of` the trainer's config: without it, none of a model's own options.
    """
    state = PartialState()
    found: list[tuple[int, list[str], list[float]]] = []
    batches = sample_batches(
        model, tokenizer, rows["prompt"], samples=samples, max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, batch_size=batch_size, seed=seed, **(sampler or {}),
    )  # fmt: skip
    for chosen, _, completions in batches:
        batch = [rows[i] for i in chosen]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        columns = {c: [row[c] for row in batch for _ in range(samples)] for c in rows.column_names if c != "prompt"}
        asked = [row["prompt"] for row in batch for _ in range(samples)]
        scores = reward(asked, [as_completion(p, t) for p, t in zip(asked, texts, strict=True)], **columns)
        values = [math.nan if s is None else float(s) for s in scores]
        for j, i in enumerate(chosen):
            part = slice(j * samples, (j + 1) * samples)
            found.append((i, texts[part], values[part]))
    everything = sorted(gather_object(found)) if state.num_processes > 1 else found
    return Evaluation(
        [rows[i]["prompt"] for i, _, _ in everything], [t for _, t, _ in everything], [s for _, _, s in everything]
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
