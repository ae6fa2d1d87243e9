"""Pruning in TRL: rows are removed from a rollout before it is split into micro-batches."""

from typing import Any, cast

import torch
from torch import Tensor

from bandpo.integrations.trl.host import Batch, GRPOHost, gathered, ints
from bandpo.integrations.trl.rollout import PREFIX, local_rows, mask_of
from bandpo.selection.pruning import PromptScores, Pruning, Selection, effective_sample_size

WEIGHT = f"{PREFIX}weight"
"""Name of the weights of completions in a batch, `(batch,)`."""

_SEEDS = (1_000_003, 101, 7)  # between the seeds of runs, micro-batches and processes


class PrunedRollouts:
    """Leaves out prompts before TRL samples, and completions before it trains, on each process by itself.

    Args:
        trainer: The trainer.
        prune: The rule that chooses, with its history of the prompts.

    Raises:
        ValueError: If a process does not have whole groups.
    """

    def __init__(self, trainer: GRPOHost, prune: Pruning) -> None:
        self.trainer, self.prune = trainer, prune
        if self._rows % trainer.num_generations:
            raise ValueError(
                "pruning needs whole groups on each process: make per_device_train_batch_size x steps_per_generation a "
                f"multiple of num_generations={trainer.num_generations}"
            )

    def before(self, inputs: list[Any]) -> tuple[list[Any], list[float]]:
        """Choose the prompts to sample.

        Args:
            inputs: Rows of the data set, each `num_generations` times, as TRL has them.

        Returns:
            The rows to sample for, each `num_generations` times, and the weight of each of them.
        """
        size = self.trainer.num_generations
        if not self.prune.prompts or self._over():
            return inputs, [1.0] * len(inputs)
        keys = [_key(row) for row in inputs[::size]]
        chosen = self.prune.select_prompts(keys, generator=self._generator(0))
        drop = ints((~chosen.keep).nonzero().flatten())
        # Equal work on every process, and whole micro-batches: put back as many as that takes, at random.
        least = min(gathered([len(drop)]))
        steps = self._steps
        while least and (len(keys) - least) * size % steps:
            least -= 1
        weight = _put_back(chosen, drop, least, self._generator(1), biased=self.prune.mode == "topk_biased")
        rows = ints((weight > 0).nonzero().flatten())
        log = self.trainer.current_log
        log["selection/prompts_kept"].append(len(rows) / len(keys))
        return [inputs[i * size + j] for i in rows for j in range(size)], [
            float(weight[i]) for i in rows for _ in range(size)
        ]

    def after(self, inputs: list[Any], rollout: Batch, weights: list[float]) -> Batch:
        """Choose the completions to train on.

        Args:
            inputs: The rows that were sampled for.
            rollout: TRL's rollout of them.
            weights: Their weights.

        Returns:
            The rollout of the chosen completions, with their weights under `WEIGHT`.
        """
        trainer, size = self.trainer, self.trainer.num_generations
        advantages = rollout["advantages"].view(-1, size)
        rewards = trainer.last_rewards[local_rows(trainer, len(weights))].view(-1, size).to(advantages.device)
        keys = [_key(row) for row in inputs[::size]]
        scores = (cast("list[list[float]]", x.tolist()) for x in (advantages, rewards))
        groups = gathered(list(zip(keys, *scores, strict=True)))
        self.prune.update([key for key, _, _ in groups], *(torch.tensor([g[i] for g in groups]) for i in (1, 2)))
        before = torch.tensor(weights, device=advantages.device)
        tokens = mask_of(rollout).sum(1)
        log = trainer.current_log
        if not torch.equal(before, torch.ones_like(before)):
            # Tokens that were never sampled cannot be counted: their number is estimated with the same weights.
            everywhere = trainer.accelerator.gather(
                torch.stack([(tokens * before).sum(), tokens.sum().float()]).unsqueeze(0)
            )
            estimate, seen = everywhere.sum(0)
            rollout["num_items_in_batch"] = estimate.to(torch.float32)
            log["selection/tokens_estimated"].append((estimate / seen.clamp(min=1)).item())
        rows = torch.arange(len(before), device=before.device)
        weight = before
        if self.prune.completions and not self._over():
            chosen = self.prune(rewards, advantages, generator=self._generator(2))
            drop = ints((~chosen.keep.flatten()).nonzero().flatten())
            steps = self._steps
            least = min(gathered([len(drop)]))
            least = min(least - (least - len(before)) % steps, len(before) - steps)
            flat = Selection(*(x.flatten() for x in chosen))
            biased = self.prune.mode == "topk_biased"
            weight = before * _put_back(flat, drop, max(least, 0), self._generator(3), biased=biased).to(before.device)
            rows = weight.nonzero().flatten()
        kept = tokens[rows].sum() / tokens.sum().clamp(min=1)
        if trainer.loss_type != "dapo":  # the others divide by the rows that they are handed
            weight = weight * (len(rows) / self._rows)
            if self.prune.mode == "topk_biased":
                weight = (weight > 0).to(weight.dtype)  # the baseline's mean is that of the survivors
        log["selection/kept"].append(trainer.accelerator.gather(torch.tensor(len(rows) / len(before))).mean().item())
        log["selection/tokens"].append(trainer.accelerator.gather(kept).mean().item())
        size = effective_sample_size(weight[rows])
        log["selection/effective_sample_size"].append(trainer.accelerator.gather(size).mean().item())
        out = {name: x[rows] if _has_rows(x, len(before)) else x for name, x in rollout.items()}
        return out | {WEIGHT: weight[rows]}

    @property
    def _steps(self) -> int:
        """Micro-batches of a rollout."""
        return cast("int", self.trainer.args.steps_per_generation)

    @property
    def _rows(self) -> int:
        """Completions of a rollout on each process."""
        return self.trainer.args.per_device_train_batch_size * self._steps

    def _over(self) -> bool:
        """Whether pruning has ended for the rest of the run."""
        state = self.trainer.state
        return state.global_step >= self.prune.until * state.max_steps

    def _generator(self, stream: int) -> torch.Generator:
        trainer = self.trainer
        counts = (trainer.args.seed, trainer.micro_batch, trainer.accelerator.process_index)
        seed = sum(n * step for n, step in zip(counts, _SEEDS, strict=True)) + stream
        return torch.Generator().manual_seed(seed)


def _put_back(chosen: Selection, drop: list[int], count: int, generator: torch.Generator, *, biased: bool) -> Tensor:
    """The weights if only `count` of the dropped entries stay dropped.

    Entries that add nothing to the gradient are put back first. Each of the others is as likely to be put back, so their
    probabilities of being dropped get smaller by one factor.
    """
    if not drop:
        return chosen.weight
    nothing = [i for i in drop if chosen.dropping[i] == 1]
    others = [i for i in drop if chosen.dropping[i] < 1]
    back = len(drop) - count
    returned = nothing[: min(back, len(nothing))]
    rest = back - len(returned)
    if rest:
        returned += [others[i] for i in ints(torch.randperm(len(others), generator=generator)[:rest])]
    keep = chosen.keep.clone()
    keep[returned] = True
    if biased:
        return keep.to(chosen.weight.dtype)
    dropping = torch.where(chosen.dropping == 1, 0.0, chosen.dropping * (1 - rest / max(1, len(others))))
    return (1 / (1 - dropping)).masked_fill(~keep, 0.0)


def _key(row: Any) -> bytes:
    """The key by which the history knows the prompt of a row."""
    prompt = row["prompt"]
    return PromptScores.key(prompt if isinstance(prompt, str) else repr(prompt))


def _has_rows(x: Any, rows: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and len(x) == rows
