"""Supervised warm-up of several checkpoints of a problem at once, cached."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional as F

from bandpo._system.cache import cache_root, is_usable, sole_maker, store
from bandpo.lab.comparison.architecture import shape_of
from bandpo.lab.comparison.devices import device_kind, find_device, seeded
from bandpo.lab.comparison.problems import END, PAD, PROBLEMS, Problem
from bandpo.lab.comparison.stack import Adam, Stack
from bandpo.toy.models import build_llama

_FORMAT = 1  # part of the cache's key: raise it when the same configuration gives other weights
_RISE = 50  # steps in which the learning rate rises to its peak

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
        steps: Supervised steps; None takes the problem's number.
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
        RunError: If a checkpoint is not in the cache, and the cache cannot be written.
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
    if not missing:  # another process has just made them
        return
    device = find_device(missing[0].device)
    stack = Stack.load([_fresh(c) for c in missing], device)
    _learn(stack, missing, PROBLEMS[missing[0].problem]().to(device))
    for run, checkpoint in enumerate(missing):
        weights = {name: w[run].cpu().clone() for name, w in stack.weights.items()}
        store(checkpoint.path, lambda folder, weights=weights: torch.save(weights, folder / _WEIGHTS))


def _fresh(c: Checkpoint) -> object:
    vocabulary = PROBLEMS[c.problem]().vocabulary
    return build_llama(vocabulary, PAD, END, hidden_size=c.hidden_size, layers=c.layers, seed=c.seed)


def _learn(stack: Stack, checkpoints: list[Checkpoint], problem: Problem) -> None:
    first = checkpoints[0].resolved()
    size, rate, steps = (cast("Any", getattr(first, name)) for name in ("batch_size", "learning_rate", "steps"))
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
