"""What is added to a rollout of TRL for an objective: statistics of groups, top-K log-probs, groups of other prompts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from bandpo.integrations.trl.host import Batch, GRPOHost, ints, split
from bandpo.integrations.trl.top import refuse_images

PREFIX = "bandpo_"
"""Prefix of our tensors in a rollout. They go through TRL's shuffling and splitting like TRL's own."""

_SEEDS_PER_PASS = 7919  # between the seeds of two passes over the data


def group_extras(trainer: GRPOHost, rollout: Batch) -> dict[str, Tensor]:
    """The extras of the objective that its groups give, for the completions of this process; a group may span processes.

    Args:
        trainer: The trainer.
        rollout: TRL's rollout.

    Returns:
        Tensors to add to the rollout, `(completions,)` or `(completions, ...)`; none if the objective has no such extras.
    """
    objective = trainer.objective
    if objective.group_stats is None:
        return {}
    advantages = trainer.accelerator.gather(rollout["advantages"])
    stats = objective.group_inputs(trainer.last_rewards.to(advantages.dtype), advantages, trainer.group_size)
    mine = local_rows(trainer, len(rollout["advantages"]))
    return {PREFIX + name: x[mine] for name, x in stats.items()}


def top_logprobs(trainer: GRPOHost, model: Any, batch: Batch, ids: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Log-probs of the K most likely tokens, or of given tokens, at each place of the completions.

    Args:
        trainer: The trainer, for its temperature and batch size.
        model: The policy that gives the log-probs.
        batch: TRL's inputs.
        ids: Ids of the given tokens, `(batch, time, K)`; None finds the most likely ones.
        k: Number of tokens, K.

    Returns:
        Log-probs, float32, and ids of the tokens; `(batch, time, K)` both.

    Raises:
        ValueError: If the batch has images.
    """
    if "pixel_values" in batch or "images" in batch:
        refuse_images(trainer.objective)
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        places = torch.arange(len(input_ids), device=input_ids.device)
        for rows in split(places, trainer.args.per_device_train_batch_size):
            out = model(
                input_ids=input_ids[rows], attention_mask=attention[rows], logits_to_keep=length + 1, use_cache=False
            )
            logits = out.logits[:, -length - 1 : -1].float() / trainer.temperature
            chosen = logits.topk(min(k, logits.shape[-1])).indices if ids is None else ids[rows]
            found.append((logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True), chosen))
    values, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, chosen


class Refill:
    """DAPO's dynamic sampling (arXiv:2503.14476): groups whose advantages are all equal are replaced.

    The groups that replace them are of other prompts, which are drawn from the training set in an order of their own, given by
    the seed.

    Args:
        trainer: The trainer.

    Raises:
        ValueError: If the training set has no length.
    """

    def __init__(self, trainer: GRPOHost) -> None:
        self.trainer = trainer
        self.drawn = 0
        """Prompts drawn so far, by all processes; the whole state."""
        if not hasattr(trainer.train_dataset, "__len__"):
            raise ValueError("dynamic_sampling draws prompts by their number: the dataset must not be iterable only")

    def __call__(self, rollout: Batch, score: Callable[[list[Any]], Batch]) -> Batch:
        """Replace the groups without signal in a rollout, as far as the allowed rounds suffice.

        Args:
            rollout: The rollout of this process.
            score: Samples completions for prompts, and scores them.

        Returns:
            The rollout with other groups in place of those without signal.

        Raises:
            ValueError: If the rollout has images, or parts of groups.
        """
        trainer = self.trainer
        size, accelerator = trainer.num_generations, trainer.accelerator
        rows = len(rollout["advantages"])
        if rows % size:
            raise ValueError(
                f"dynamic_sampling needs whole groups on each process: {rows} completions are no multiple of "
                f"num_generations={size}"
            )
        if any(isinstance(v, list) or k == "pixel_values" for k, v in rollout.items()):
            raise ValueError("dynamic_sampling merges text rollouts; this one has images")
        dull, rounds = self._dull(rollout), 0
        before = accelerator.gather(dull.float()).mean().item()
        while rounds < trainer.args.dynamic_sampling and accelerator.gather(dull.sum()).sum() > 0:
            fresh = score(self._prompts(rows // size, size))
            useful = ~self._dull(fresh)
            count = min(int(dull.sum()), int(useful.sum()))
            replaced, source = (_rows(mask, count, size) for mask in (dull, useful))
            rollout = _merge(rollout, fresh, replaced, source, trainer.pad_token)
            dull[dull.nonzero().flatten()[:count]] = False
            rounds += 1
        rollout["num_items_in_batch"] = accelerator.gather(mask_of(rollout).sum()).sum()
        log = trainer.current_log
        log["dynamic_sampling/rounds"].append(float(rounds))
        log["dynamic_sampling/dull_before"].append(before)
        log["dynamic_sampling/dull_after"].append(accelerator.gather(dull.float()).mean().item())
        return rollout

    def _dull(self, rollout: Batch) -> Tensor:
        """Which groups of this process teach nothing, by their advantages: the loss depends on these."""
        advantages = rollout["advantages"].view(-1, self.trainer.num_generations)
        return (advantages == advantages[:, :1]).all(1)

    def _prompts(self, count: int, size: int) -> list[Any]:
        """Rows of the data set, each `size` times, different ones on each process."""
        data, accelerator = self.trainer.train_dataset, self.trainer.accelerator
        first = self.drawn + accelerator.process_index * count
        self.drawn += count * accelerator.num_processes
        places = shuffled_places(first, count, of=len(data), seed=self.trainer.args.seed)
        return [data[i] for i in places for _ in range(size)]


def shuffled_places(first: int, count: int, *, of: int, seed: int) -> list[int]:
    """Places of consecutive draws from a data set that is shuffled again for each pass over it.

    Args:
        first: Number of the first draw, counted over all passes.
        count: Number of draws.
        of: Rows of the data set.
        seed: Seed of the run.

    Examples:
        >>> sorted(shuffled_places(0, 4, of=4, seed=0))
        [0, 1, 2, 3]
        >>> shuffled_places(1, 6, of=4, seed=0) == shuffled_places(0, 7, of=4, seed=0)[1:]
        True
    """
    draws = torch.arange(first, first + count)
    epochs = draws.div(of, rounding_mode="floor")
    chosen: list[int] = []
    for epoch in sorted(set(ints(epochs))):
        order = torch.randperm(of, generator=torch.Generator().manual_seed(seed + _SEEDS_PER_PASS * (epoch + 1)))
        chosen += ints(order[draws[epochs == epoch] % of])
    return chosen


def mask_of(batch: Batch) -> Tensor:
    """The valid tokens of a batch or rollout of TRL: those of the completions, without the output of tools; `(batch, time)`."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def local_rows(trainer: GRPOHost, rows: int) -> slice:
    """Places of the completions of this process among those of all processes.

    Args:
        trainer: The trainer.
        rows: Completions of each process.
    """
    start = trainer.accelerator.process_index * rows
    return slice(start, start + rows)


def _rows(groups: Tensor, count: int, size: int) -> Tensor:
    """Indices `(count * size,)` of the rows of the first `count` marked groups; `groups` is `(groups,)`, bool."""
    first = groups.nonzero().flatten()[:count] * size
    return (first.unsqueeze(1) + torch.arange(size, device=groups.device)).flatten()


def _merge(old: Batch, new: Batch, rows: Tensor, source: Tensor, pad_token: int) -> Batch:
    """Replace rows of one rollout by rows of another. Both are padded to the longer one: prompts left, completions right."""
    merged: dict[str, Any] = {}
    for name, x in old.items():
        if not isinstance(x, Tensor) or x.dim() == 0:
            merged[name] = x
            continue
        chosen = [x, new[name][source]]
        if x.dim() > 1 and x.shape[1] != new[name].shape[1]:
            value = pad_token if name in ("prompt_ids", "completion_ids") else 0
            side = "left" if name.startswith("prompt") else "right"
            both = pad([*x.unbind(), *chosen[1].unbind()], padding_value=value, padding_side=side)
            chosen = [both[: len(x)], both[len(x) :]]
        merged[name] = chosen[0].clone()
        merged[name][rows] = chosen[1]
    return merged
