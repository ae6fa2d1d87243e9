"""What a rollout of TRL carries for an objective: statistics of groups, top-K log-probs, refilled groups, its radius."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

PREFIX = "bandpo_"  # of the tensors that travel with TRL's own, through its shuffling and splitting


def group_extras(trainer: Any, rollout: dict[str, Any]) -> dict[str, Tensor]:
    """Extras from the rewards and advantages of this process's completions, whose groups may span processes."""
    objective = trainer.objective
    if objective.group_stats is None:
        return {}
    advantages = trainer.accelerator.gather(rollout["advantages"])
    stats = objective.group_inputs(trainer.last_rewards.to(advantages.dtype), advantages, trainer._group_size)
    mine = local_rows(trainer, len(rollout["advantages"]))
    return {PREFIX + name: x[mine] for name, x in stats.items()}


def top_logprobs(trainer: Any, model: Any, batch: dict[str, Any], ids: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Log-probs of the K most likely tokens at each place of the completions, or of the given ones, and their ids.

    Args:
        trainer: The trainer, for its temperature and batch size.
        model: Policy to score with.
        batch: TRL's inputs.
        ids: `(batch, time, K)`; None finds the most likely ones.
        k: How many.
    """
    if "pixel_values" in batch or "images" in batch:
        raise ValueError("dppo-topk-* objectives score text; this batch has images: choose dppo-kl or dppo-tv")
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for rows in torch.arange(len(input_ids), device=input_ids.device).split(
            trainer.args.per_device_train_batch_size
        ):
            out = model(
                input_ids=input_ids[rows], attention_mask=attention[rows], logits_to_keep=length + 1, use_cache=False
            )
            logits = out.logits[:, -length - 1 : -1].float() / trainer.temperature
            chosen = logits.topk(min(k, logits.shape[-1])).indices if ids is None else ids[rows]
            found.append((logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True), chosen))
    values, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, chosen


class Refill:
    """DAPO's dynamic sampling (arXiv:2503.14476): groups whose advantages are all equal give way to those of other prompts.

    The other prompts are drawn from the training set in an order of their own, which the seed fixes; `drawn` is all its state.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.drawn = trainer, 0
        if not hasattr(trainer.train_dataset, "__len__"):
            raise ValueError("dynamic_sampling draws prompts by their number: the dataset must not be iterable only")

    def __call__(self, rollout: dict[str, Any], score: Callable[[list[Any]], dict[str, Any]]) -> dict[str, Any]:
        """The rollout with its dull groups replaced, as far as the rounds suffice."""
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
            rollout = _merge(rollout, fresh, replaced, source, trainer._tokenizer.pad_token_id)
            dull[dull.nonzero().flatten()[:count]] = False
            rounds += 1
        rollout["num_items_in_batch"] = accelerator.gather(mask_of(rollout).sum()).sum()
        log = trainer._metrics["train"]
        log["dynamic_sampling/rounds"].append(float(rounds))
        log["dynamic_sampling/dull_before"].append(before)
        log["dynamic_sampling/dull_after"].append(accelerator.gather(dull.float()).mean().item())
        return rollout

    def _dull(self, rollout: dict[str, Any]) -> Tensor:
        """Which of this process's groups teach nothing: judged by the advantages, which are what the loss is given."""
        advantages = rollout["advantages"].view(-1, self.trainer.num_generations)
        return (advantages == advantages[:, :1]).all(1)

    def _prompts(self, count: int, size: int) -> list[Any]:
        """Rows of the dataset, each `size` times; every process takes other ones."""
        trainer = self.trainer
        data, accelerator = trainer.train_dataset, trainer.accelerator
        first = self.drawn + accelerator.process_index * count
        self.drawn += count * accelerator.num_processes
        numbers = torch.arange(first, first + count)
        chosen: list[Any] = []
        for epoch in numbers.div(len(data), rounding_mode="floor").unique().tolist():
            order = torch.randperm(
                len(data), generator=torch.Generator().manual_seed(trainer.args.seed + 7919 * (epoch + 1))
            )
            places = numbers[numbers.div(len(data), rounding_mode="floor") == epoch] % len(data)
            chosen += [data[i] for i in order[places].tolist() for _ in range(size)]
        return chosen


def mask_of(batch: dict[str, Any]) -> Tensor:
    """The valid tokens of a batch or rollout of TRL: those of the completions, without what tools wrote."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def local_rows(trainer: Any, rows: int) -> slice:
    """Places of this process's completions among those of all processes."""
    start = trainer.accelerator.process_index * rows
    return slice(start, start + rows)


def _rows(groups: Tensor, count: int, size: int) -> Tensor:
    first = groups.nonzero().flatten()[:count] * size
    return (first.unsqueeze(1) + torch.arange(size, device=groups.device)).flatten()


def _merge(old: dict[str, Any], new: dict[str, Any], rows: Tensor, source: Tensor, pad_token: int) -> dict[str, Any]:
    """Rows of one rollout replaced by rows of another, both padded to the longer one: prompts left, completions right."""
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
            chosen = list(both.split([len(x), len(source)]))
        merged[name] = chosen[0].clone()
        merged[name][rows] = chosen[1]
    return merged
