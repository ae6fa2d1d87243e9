"""The lab's training loop: many runs of one problem side by side, each with its own objective, seed, warm-up and rates.

A rollout is Q prompts x G samples from the sampler's weights (the policy's own, or older ones); it is used for K epochs of M
mini-batches. The ratio is taken against the sampler, with the log-probs it drew with. Runs of one seed see the same prompts,
noise and mini-batches whatever their objective, so their differences are paired; and a run's numbers do not depend on what it
is stacked with beyond the rounding of a batched matrix product (tests/lab/test_loop.py).
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bandpo.groups import group_advantages
from bandpo.lab.comparison.problems import END, PAD, PROBLEMS, Problem
from bandpo.lab.comparison.stack import Adam, Rollout, Stack
from bandpo.lab.comparison.warmup import Checkpoint, warmed_up
from bandpo.losses import aggregate
from bandpo.metrics import PROB_BINS, pass_at_k, policy_sums
from bandpo.objective import Objective
from bandpo.terms import TokenObjective, token_objective


@dataclass(frozen=True)
class Setting:
    """What all runs of a stack share.

    Args:
        problem: A name in `PROBLEMS`.
        updates: Rollouts.
        prompts: Q, prompts of a rollout.
        group: G, samples of each.
        epochs: K.
        minibatches: M, optimiser steps of an epoch.
        lag: Rollouts that the sampler is behind.
        temperature: Of sampling; the policy is the one at this temperature.
        hidden_size: Width of the model.
        layers: Its depth.
        eval_samples: k of mean@k and pass@k, on the held-out prompts.
        warm_up_steps: Supervised steps before; None takes the problem's.
    """

    problem: str
    updates: int = 80
    prompts: int = 32
    group: int = 8
    epochs: int = 2
    minibatches: int = 4
    lag: int = 0
    temperature: float = 1.0
    hidden_size: int = 64
    layers: int = 2
    eval_samples: int = 16
    warm_up_steps: int | None = None

    def __post_init__(self) -> None:
        if self.problem not in PROBLEMS:
            raise ValueError(f"problem: got {self.problem!r}; choose one of {', '.join(PROBLEMS)}")
        for name in ("updates", "prompts", "epochs", "minibatches", "eval_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.group < 2:
            raise ValueError(f"group must be at least 2, got {self.group}")
        if self.lag < 0 or not 0 < self.temperature < math.inf:
            raise ValueError(f"lag >= 0 and temperature > 0 are required, got {self.lag} and {self.temperature}")
        if self.prompts * self.group % self.minibatches:
            raise ValueError(
                f"{self.prompts} prompts x {self.group} samples do not split into {self.minibatches} mini-batches"
            )


@dataclass(frozen=True)
class Run:
    """One run of a stack.

    Args:
        objective: What it optimises; its extras must come from groups, or be none.
        learning_rate: Of Adam.
        seed: Of prompts, noise and mini-batches.
        warm_up: Which warmed-up checkpoint it starts from.
    """

    objective: Objective
    learning_rate: float
    seed: int = 0
    warm_up: int = 0


@dataclass
class Result:
    """What a run did.

    Args:
        reward: Mean reward of each rollout.
        entropy: Of each rollout, nats per token (the mean of -log p of what was sampled).
        clip: Share of clipped tokens by bin of p, over the run: `{"low": {bin: share}, "high": ...}`.
        tokens: Share of tokens in each bin.
        before: Evaluation of the start.
        after: Evaluation of the end.
        rewards: `(prompts, k)` of the final evaluation.
        samples: Some prompts with completions at the end.
    """

    reward: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    clip: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    rewards: list[list[float]] = field(default_factory=list)
    samples: list[tuple[str, list[str]]] = field(default_factory=list)


class Loop:
    """Trains a stack of runs, one rollout at a time.

    Args:
        setting: What they share.
        runs: The runs.
    """

    def __init__(self, setting: Setting, runs: Sequence[Run]) -> None:
        self.setting, self.runs = setting, list(runs)
        for run in self.runs:
            if run.objective.extras and run.objective.group_stats is None:
                raise ValueError(
                    f"objective {run.objective.name!r} needs extras the lab does not have: {run.objective.extras}"
                )
        self.problem: Problem = PROBLEMS[setting.problem]()
        self.stack = warmed_up(
            [
                Checkpoint(setting.problem, r.warm_up, setting.hidden_size, setting.layers, steps=setting.warm_up_steps)
                for r in self.runs
            ]
        )
        for w in self.stack.weights.values():
            w.requires_grad_()
        self.optimizer = Adam(self.stack.weights, torch.tensor([r.learning_rate for r in self.runs]))
        self.draws = [torch.Generator().manual_seed(1_000_003 * r.seed + r.warm_up) for r in self.runs]
        self.results = [Result() for _ in self.runs]
        self.done = 0
        self._past: deque[dict[str, Tensor]] = deque(maxlen=setting.lag + 1)
        self._counts = torch.zeros(len(self.runs), 3, len(PROB_BINS))

    def train(self, report: Any = None) -> list[Result]:
        """All rollouts that are left, with an evaluation before and after."""
        if self.done == 0:
            self._evaluate("before")
        while self.done < self.setting.updates:
            self.update()
            if report is not None:
                report(self.done)
        self._evaluate("after")
        for result, (low, high, n) in zip(self.results, self._counts, strict=True):
            names = list(PROB_BINS)
            result.clip = {
                "low": dict(zip(names, (low / n).nan_to_num().tolist(), strict=True)),
                "high": dict(zip(names, (high / n).nan_to_num().tolist(), strict=True)),
            }
            result.tokens = dict(zip(names, (n / n.sum().clamp_min(1)).tolist(), strict=True))
        return self.results

    def update(self) -> None:
        """One rollout and its epochs."""
        s = self.setting
        prompts = self._prompts()
        rollout = self._rollout(prompts)
        rewards = torch.stack([self.problem.rewards(p, c) for p, c in zip(prompts, rollout.tokens, strict=True)])
        for i, result in enumerate(self.results):
            result.reward.append(rewards[i].mean().item())
            result.entropy.append(-(rollout.logprobs[i].sum() / rollout.mask[i].sum()).item())
        advantages = [
            group_advantages(r, s.group, kind=run.objective.advantage)
            for r, run in zip(rewards, self.runs, strict=True)
        ]
        extras = [
            run.objective.group_inputs(r, a, s.group) for run, r, a in zip(self.runs, rewards, advantages, strict=True)
        ]
        rows = s.prompts * s.group
        for epoch in range(s.epochs):
            order = torch.stack([torch.randperm(rows, generator=g) for g in self.draws])
            for part in order.chunk(s.minibatches, 1):
                self._step(prompts, rollout, advantages, extras, part, last=epoch == s.epochs - 1)
        self.done += 1

    def _step(
        self, prompts: Tensor, rollout: Rollout, advantages: list[Tensor], extras: list[dict[str, Tensor]], part: Tensor,
        *, last: bool,
    ) -> None:  # fmt: skip
        s = self.setting
        pick = part.unsqueeze(-1)
        chosen = [x.gather(1, pick.expand(-1, -1, x.shape[-1])) for x in (prompts, *rollout)]
        length = int(chosen[3].any(1).any(0).sum())
        new = self.stack.logprobs(chosen[0], chosen[1][..., :length], s.temperature)
        old, mask = chosen[2][..., :length], chosen[3][..., :length]
        losses: list[Tensor] = []
        for i, run in enumerate(self.runs):
            terms = token_objective(
                run.objective, logprobs=new[i], old_logprobs=old[i], rollout_logprobs=old[i],
                advantages=advantages[i][part[i]], mask=mask[i], extras={k: v[part[i]] for k, v in extras[i].items()},
            )  # fmt: skip
            maximum = self.problem.length if run.objective.aggregation == "seq-mean-token-sum-norm" else None
            losses.append(-aggregate(terms.value, mask[i], run.objective.aggregation, max_length=maximum))
            if last:
                self._count(i, terms)
        self.optimizer.step(torch.autograd.grad(torch.stack(losses).sum(), list(self.stack.weights.values())))

    @torch.no_grad()
    def _count(self, run: int, terms: TokenObjective) -> None:
        sums = policy_sums(terms)
        for j, name in enumerate(PROB_BINS):
            for side, key in enumerate(("low", "high")):
                self._counts[run, side, j] += sums[f"clip_fraction_by_prob/{key}/{name}"].numerator
            self._counts[run, 2, j] += sums[f"token_fraction_by_prob/{name}"].numerator

    def _prompts(self) -> Tensor:
        picked = [torch.randint(len(self.problem.prompts), (self.setting.prompts,), generator=g) for g in self.draws]
        return torch.stack([self.problem.prompts[i].repeat_interleave(self.setting.group, 0) for i in picked])

    def _rollout(self, prompts: Tensor) -> Rollout:
        if self.setting.lag:
            self._past.append({name: w.detach().clone() for name, w in self.stack.weights.items()})
        sampler = Stack(self._past[0], self.stack.shape) if self.setting.lag else self.stack
        noise = torch.stack([torch.rand(prompts.shape[1], self.problem.length, generator=g) for g in self.draws])
        return sampler.sample(
            prompts[:, :: self.setting.group], noise, end=END, pad=PAD, repeats=self.setting.group,
            temperature=self.setting.temperature,
        )  # fmt: skip

    def _evaluate(self, stage: str) -> None:
        k, held_out = self.setting.eval_samples, self.problem.held_out
        prompts = held_out.repeat_interleave(k, 0)
        noise = torch.rand(len(prompts), self.problem.length, generator=torch.Generator().manual_seed(20_261_124))
        # Before training, runs from one checkpoint are one model.
        same = [r.warm_up for r in self.runs] if stage == "before" else list(range(len(self.runs)))
        which = list(dict.fromkeys(same))
        stack = Stack({n: w[[same.index(x) for x in which]] for n, w in self.stack.weights.items()}, self.stack.shape)
        rollout = stack.sample(
            held_out.expand(len(which), -1, -1), noise.expand(len(which), -1, -1), end=END, pad=PAD, repeats=k,
            temperature=self.setting.temperature,
        )  # fmt: skip
        for result, i in zip(self.results, (which.index(x) for x in same), strict=True):
            rewards = self.problem.rewards(prompts, rollout.tokens[i]).view(-1, k)
            right = rewards.sum(1).to(torch.int64)
            report = {f"mean@{k}": rewards.mean().item()}
            for j in (1, 2, 4, 8, 16, 32):
                if j <= k:
                    report[f"pass@{j}"] = pass_at_k(k, right, j).mean().item()
            report["entropy"] = -(rollout.logprobs[i].sum() / rollout.mask[i].sum()).item()
            report["groups with signal"] = ((right > 0) & (right < k)).double().mean().item()
            setattr(result, stage, report)
            if stage == "after":
                result.rewards = rewards.tolist()
                tokens = rollout.tokens[i].view(-1, k, rollout.tokens.shape[-1])
                result.samples = [
                    (self.problem.text(held_out[p].tolist()), [self.problem.text(t.tolist()) for t in tokens[p, :4]])
                    for p in range(8)
                ]

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on bit for bit."""
        return {
            "weights": {name: w.detach().clone() for name, w in self.stack.weights.items()},
            "moments": [(m.clone(), v.clone()) for m, v in self.optimizer.moments],
            "steps": self.optimizer.steps, "draws": [g.get_state() for g in self.draws], "done": self.done,
            "past": [{k: w.clone() for k, w in past.items()} for past in self._past], "counts": self._counts.clone(),
            "results": [(list(r.reward), list(r.entropy), dict(r.before)) for r in self.results],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same setting and runs."""
        with torch.no_grad():
            for name, w in self.stack.weights.items():
                w.copy_(state["weights"][name])
            for (m, v), (saved_m, saved_v) in zip(self.optimizer.moments, state["moments"], strict=True):
                m.copy_(saved_m)
                v.copy_(saved_v)
        self.optimizer.steps, self.done = state["steps"], state["done"]
        for g, saved in zip(self.draws, state["draws"], strict=True):
            g.set_state(saved)
        self._past = deque(state["past"], maxlen=self.setting.lag + 1)
        self._counts = state["counts"].clone()
        for r, (reward, entropy, before) in zip(self.results, state["results"], strict=True):
            r.reward, r.entropy, r.before = list(reward), list(entropy), dict(before)
