"""mean@k, pass@k and maj@k on held-out prompts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from bandpo._system.files import read_jsonl, write_jsonl
from bandpo.integrations.trl.generate import as_completion, sample_batches
from bandpo.metrics import pass_at_powers
from bandpo.statistics import Interval, interval
from bandpo.train.measures import RIGHT_FROM, Tally, majority, tally
from bandpo.train.rewards import RewardFunction
from bandpo.train.votes import Voter


@dataclass(frozen=True)
class Evaluation:
    """The samples of each prompt and their rewards.

    Args:
        prompts: Prompts, text or messages.
        completions: k completions of each prompt.
        rewards: k rewards for each prompt; a sample counts as right if its reward is at least 0.5. NaN where the reward
            function gave None.
        answers: The answers of the completions, by which they vote for maj@k; None for one without an answer. None for all
            where the reward has no answers.
    """

    prompts: list[Any]
    completions: list[list[str]]
    rewards: list[list[float]]
    answers: list[list[str | None]] | None = None

    @property
    def samples(self) -> int:
        """The number of samples of each prompt, k."""
        return len(self.rewards[0])

    def tallies(self) -> list[Tally]:
        """The counts of each prompt, from which all measures and their intervals are computed."""
        answers = self.answers or [None] * len(self.rewards)
        return [tally(r, a) for r, a in zip(self.rewards, answers, strict=True)]

    def summary(self) -> dict[str, float]:
        """`mean@k`, unbiased `pass@j` for j = 1, 2, 4 ... k, `maj@k`, and the share of prompts with a learning signal.

        `maj@k`, the share of prompts whose most frequent answer is right, is there from three samples on, if these have answers
        to vote by.

        `mean@k` is the mean over prompts of the mean reward. Samples that the reward function could not score are left out: the
        mean of a prompt is over its scored samples, pass@j is over the prompts with at least j of them (NaN if there are none),
        and a prompt has a signal if its scored rewards differ. `unscored` is the number of the other samples.

        Raises:
            ValueError: If no sample could be scored.
        """
        rewards = torch.tensor(self.rewards, dtype=torch.float64)
        scored = (~rewards.isnan()).sum(1)
        kept = rewards[scored > 0]
        if not len(kept):
            raise ValueError(
                f"none of the {len(rewards)} held-out prompts could be scored: the reward gave no number for them"
            )
        count = scored[scored > 0]
        right = (kept >= RIGHT_FROM).sum(1)  # NaN is not
        report = {f"mean@{self.samples}": kept.nanmean(1).mean().item(), **pass_at_powers(right, count, self.samples)}
        if self.answers is not None and self.samples > 2:  # of two votes the winner is drawn, or both agree
            voted = [v for v in majority(self.tallies(), self.samples) if not math.isnan(v)]
            report[f"maj@{self.samples}"] = math.fsum(voted) / len(voted) if voted else math.nan
        lowest, highest = kept.nan_to_num(nan=math.inf).amin(1), kept.nan_to_num(nan=-math.inf).amax(1)
        report["groups with signal"] = (highest > lowest).double().mean().item()
        report["unscored"] = float(rewards.isnan().sum())
        return report

    def change_to(self, other: "Evaluation") -> Interval:
        """The mean change of a prompt's mean reward to another evaluation, with its 95% interval over the prompts.

        The prompts are resampled (BCa bootstrap), so the interval has the noise of prompts and samples,
        and not that of other seeds of training. Prompts without a scored sample in either evaluation are left out.

        Args:
            other: An evaluation of the same prompts in the same order.

        Returns:
            The change with the ends of its interval; NaN where too few prompts were scored, or the numbers of prompts differ.

        Examples:
            >>> before = Evaluation(["a", "b", "c"], [["", ""]] * 3, [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
            >>> before.change_to(Evaluation(["a", "b", "c"], [["", ""]] * 3, [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])).value
            0.3333333333333333
        """
        if len(self.rewards) != len(other.rewards):  # a run that was resumed with other prompts
            return Interval(math.nan, math.nan, math.nan)
        own, theirs = (torch.tensor(e.rewards, dtype=torch.float64).nanmean(1) for e in (self, other))
        changes = theirs - own
        kept = cast("list[float]", changes[~changes.isnan()].tolist())
        return interval(kept, np.mean) if kept else Interval(math.nan, math.nan, math.nan)

    def write(self, path: Path, stage: str) -> None:
        """Add the samples to a JSONL file, one prompt per line; rows of the same stage in the file are replaced.

        Args:
            path: File to write.
            stage: Name of the evaluation, "before" or "after".
        """
        kept = [row for row in read_jsonl(path) if row["stage"] != stage] if path.exists() else []
        rows = zip(self.prompts, self.completions, self.rewards, strict=True)
        own = [{"stage": stage, "prompt": p, "completions": c, "rewards": [_or_none(x) for x in r]} for p, c, r in rows]
        if self.answers is not None:
            own = [{**row, "answers": answers} for row, answers in zip(own, self.answers, strict=True)]
        write_jsonl(path, [*kept, *own])

    @classmethod
    def read(cls, path: Path, stage: str) -> "Evaluation | None":
        """Read what `write` wrote; None if the file has no rows of that stage.

        Args:
            path: File to read; it may not exist.
            stage: Name of the evaluation, "before" or "after".

        Returns:
            The evaluation of that stage, or None.
        """
        rows = [row for row in read_jsonl(path) if row["stage"] == stage] if path.exists() else []
        if not rows:
            return None
        rewards = [[math.nan if x is None else x for x in row["rewards"]] for row in rows]
        answers = [row["answers"] for row in rows] if all("answers" in row for row in rows) else None
        return cls([row["prompt"] for row in rows], [row["completions"] for row in rows], rewards, answers)


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
    autocast: torch.dtype | None = None,
    voter: Voter | None = None,
) -> Evaluation:
    """Sample completions of every row and score them; the rows are divided among the processes.

    Args:
        model: Causal LM with `generate`.
        tokenizer: Tokenizer of the model, padding on the left.
        rows: Dataset with the column "prompt" and the columns that the reward needs.
        reward: Reward function.
        samples: Number of completions of each prompt.
        max_new_tokens: Number of tokens of the longest completion.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Probability mass that is sampled from.
        batch_size: Number of completions that are sampled at once.
        seed: Seed of the sampling; the state of the random generators is restored afterwards.
        sampler: Further options of the sampler, from `sampler_of` the trainer's config; the generation config that a model
            brings is not used.
        autocast: Dtype of the forward passes; None for that of the model.
        voter: Reads the answers that the samples vote by; None for no votes.

    Returns:
        The samples of all processes, in the order of the rows.
    """
    batches = sample_batches(
        model,
        tokenizer,
        cast("list[Any]", rows["prompt"]),
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
        autocast=autocast,
        **(sampler or {}),
    )
    found: list[_Scored] = []
    for chosen, _, completions in batches:
        batch = [cast("dict[str, Any]", rows[i]) for i in chosen]
        texts = cast("list[str]", tokenizer.batch_decode(completions, skip_special_tokens=True))
        scores = _score(batch, texts, samples, reward)
        for j, i in enumerate(chosen):
            part = slice(j * samples, (j + 1) * samples)
            answers = None if voter is None else [voter(text, batch[j]) for text in texts[part]]
            found.append((i, texts[part], scores[part], answers))
    if PartialState().num_processes > 1:
        found = sorted(cast("list[_Scored]", gather_object(found)), key=lambda one: one[0])
    prompts = [cast("dict[str, Any]", rows[i])["prompt"] for i, *_ in found]
    answers = [a for *_, a in found if a is not None]
    return Evaluation(prompts, [t for _, t, _, _ in found], [s for _, _, s, _ in found], answers if voter else None)


_Scored = tuple[int, list[str], list[float], list[str | None] | None]
"""Number of a row, its completions, their rewards, and their answers."""


def _score(batch: list[dict[str, Any]], texts: list[str], samples: int, reward: RewardFunction) -> list[float]:
    """The rewards of all completions of a batch of rows; NaN where there is none."""
    prompts = [row["prompt"] for row in batch for _ in range(samples)]
    columns = {name: [row[name] for row in batch for _ in range(samples)] for name in batch[0] if name != "prompt"}
    completions = [as_completion(p, t) for p, t in zip(prompts, texts, strict=True)]
    return [math.nan if s is None else float(s) for s in reward(prompts, completions, **columns)]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
