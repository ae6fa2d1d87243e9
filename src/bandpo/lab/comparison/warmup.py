"""Supervised warm-up of several checkpoints of a problem at once, cached."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch.nn import functional as F

from bandpo._system.cache import cache_root, is_usable, sole_maker, store
from bandpo._system.errors import RunError
from bandpo.lab.comparison.architecture import shape_of
from bandpo.lab.comparison.devices import device_kind, find_device, seeded
from bandpo.lab.comparison.problems import END, PAD, PROBLEMS, Problem
from bandpo.lab.comparison.stack import Adam, Stack
from bandpo.metrics import PROB_EDGES
from bandpo.toy.models import build_llama

_FORMAT = 2  # part of the cache's key: raise it when the same configuration gives other weights
_RISE = 50  # steps in which the learning rate rises to its peak

_STARTS = 4  # from how many weights a checkpoint is tried
_START_STRIDE = 1_000_003  # between the seeds of these weights
_PROBED = 512  # demonstrations on which it is tried whether a checkpoint has learned

_WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Checkpoint:
    """The configuration of a warmed-up model, which decides its place in the cache.

    Args:
        problem: A name in `PROBLEMS`.
        seed: Seed of weights and batches.
        hidden_size: Width of the model.
        layers: Number of layers of the model.
        batch_size: Demonstrations of a step; None takes the problem's number.
        learning_rate: Peak of the cosine schedule; None takes the problem's.
        steps: Supervised steps; None takes the problem's number, after which a checkpoint without the problem's token profile
            is made again from other weights.
        device: Name of the device on which it is made and used. Another kind of device has other random numbers, and so a
            checkpoint of its own; the cards of a machine share theirs.
    """

    problem: str
    seed: int = 0
    hidden_size: int = 64
    layers: int = 2
    batch_size: int | None = None
    learning_rate: float | None = None
    steps: int | None = None
    device: str = "cpu"

    @property
    def path(self) -> Path:
        """The folder of the weights, in the user's cache directory or $BANDPO_CACHE."""
        problem = PROBLEMS[self.problem]()
        data = hashlib.sha256(problem.demonstrations.numpy().tobytes()).hexdigest()
        full = self.resolved()
        settings = {name: value for name, value in asdict(full).items() if name not in ("device", "steps")}
        settings["steps"] = self.steps  # the names of checkpoints are as they were before there were other usual values
        kind = device_kind(self.device)
        if kind != "cpu":  # the name of a checkpoint of the CPU is as it was before there was a choice
            settings["device"] = kind
        decides = json.dumps([_FORMAT, settings, full.steps, data], sort_keys=True)
        return cache_root() / "lab" / f"{self.problem}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"

    def resolved(self) -> "Checkpoint":
        """The same with the problem's values where this one has None."""
        problem = PROBLEMS[self.problem]()
        usual = {
            "batch_size": problem.warm_up_batch,
            "learning_rate": problem.warm_up_rate,
            "steps": problem.warm_up_steps,
        }
        return replace(self, **{name: value for name, value in usual.items() if getattr(self, name) is None})


def warmed_up(checkpoints: list[Checkpoint], say: Callable[[str], object] = print) -> Stack:
    """A stack with one run for each checkpoint; the checkpoints that are not in the cache are made together.

    Args:
        checkpoints: One checkpoint for each run, all of one problem, size and device.
        say: Function that is called with a message for each damaged checkpoint that is made again, and before a wait.

    Raises:
        RunError: If a checkpoint is not in the cache, and the cache cannot be written or the checkpoint cannot be learned.
    """
    wanted = list(dict.fromkeys(checkpoints))
    usable = [is_usable(c.path, say) for c in wanted]
    if not all(usable):
        with sole_maker(wanted[0].path.with_name(wanted[0].problem), say):  # one process at a time for each problem
            _make([c for c in wanted if not is_usable(c.path, lambda _: None)])
    loaded = {c: torch.load(c.path / _WEIGHTS, weights_only=True, map_location="cpu") for c in wanted}
    shape, device = shape_of([_fresh(checkpoints[0])]), find_device(checkpoints[0].device)
    weights = {name: torch.stack([loaded[c][name] for c in checkpoints]) for name in loaded[wanted[0]]}
    return Stack({name: w.to(device) for name, w in weights.items()}, shape)


def _make(missing: list[Checkpoint]) -> None:
    """Make checkpoints together. Where one has not learned what its problem asks for, it is made again from other weights.

    Raises:
        RunError: If a checkpoint has not learned it from four starts.
    """
    for attempt in range(_STARTS):
        if not missing:  # another process has just made them, or all are made
            return
        starts = [replace(c, seed=c.seed + attempt * _START_STRIDE) for c in missing]
        problem, device = PROBLEMS[missing[0].problem](), find_device(missing[0].device)
        stack = Stack.load([_fresh(c) for c in starts], device)
        _learn(stack, starts, problem.to(device))
        learned = [
            c.steps is not None or share >= problem.near_certain
            for c, share in zip(missing, near_certain(stack, problem.to(device)), strict=True)
        ]
        for run, checkpoint in enumerate(missing):
            if learned[run]:
                weights = {name: w[run].cpu().clone() for name, w in stack.weights.items()}
                store(checkpoint.path, lambda folder, weights=weights: torch.save(weights, folder / _WEIGHTS))
        missing = [c for c, done in zip(missing, learned, strict=True) if not done]
    if missing:
        raise RunError(
            f"the warm-ups {[c.seed for c in missing]} of {missing[0].problem} do not have its token profile after "
            f"{_STARTS} starts; give its warm-up more steps"
        )


@torch.no_grad()
def near_certain(stack: Stack, problem: Problem) -> list[float]:
    """The share of tokens of demonstrations that have p >= 0.99 under each model of a stack.

    Args:
        stack: The models.
        problem: The problem, on the device of the stack.
    """
    rows, width = problem.demonstrations[:_PROBED].expand(stack.runs, -1, -1), problem.prompts.shape[1]
    completions = rows[..., width:]
    p, used = stack.logprobs(rows[..., :width], completions).exp(), completions != PAD
    share = ((p >= PROB_EDGES[-1]) & used).flatten(1).sum(1) / used.flatten(1).sum(1)
    return cast("list[float]", share.tolist())


def _fresh(c: Checkpoint) -> object:
    vocabulary = PROBLEMS[c.problem]().vocabulary
    return build_llama(vocabulary, PAD, END, hidden_size=c.hidden_size, layers=c.layers, seed=c.seed)


def _learn(stack: Stack, checkpoints: list[Checkpoint], problem: Problem) -> None:
    first = checkpoints[0].resolved()
    assert first.batch_size is not None and first.learning_rate is not None and first.steps is not None
    size, rate, steps = first.batch_size, first.learning_rate, first.steps
    rows, width = problem.demonstrations, problem.prompts.shape[1]
    for w in stack.weights.values():
        w.requires_grad_()
    rates = torch.full((stack.runs,), rate, device=stack.device)
    optimizer = Adam(stack.weights, rates)
    draws = [seeded(stack.device, c.seed) for c in checkpoints]
    for step in range(steps):
        picks = [torch.randint(len(rows), (size,), generator=g, device=stack.device) for g in draws]
        x = torch.stack([rows[pick] for pick in picks])
        done = step / steps
        optimizer.rates = rates * min(1.0, step / _RISE) * (1 + math.cos(math.pi * done)) / 2
        logits = stack.logits(x[..., :-1], x.shape[-1] - width)
        targets = x[..., width:]
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=PAD, reduction="none")
        per_run = loss.view(stack.runs, -1).sum(1) / (targets != PAD).flatten(1).sum(1)
        optimizer.step(torch.autograd.grad(per_run.sum(), list(stack.weights.values())))
    for w in stack.weights.values():
        w.requires_grad_(False)
