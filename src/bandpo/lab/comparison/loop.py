"""The training loop: many runs of one problem side by side, each with its own objective, seed, warm-up and learning rate.

A rollout is Q prompts x G samples from the sampler's weights, which are the policy's own or older ones. Each rollout is used
for K epochs of M mini-batches. The ratio is taken against the sampler, with the log-probs of the sampling itself. Runs with the
same seed see the same prompts, noise and mini-batches under every objective, so that their differences are paired. The other
runs of the stack change a run's numbers only by the rounding of a batched matrix product (tests/lab/test_loop.py).
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from bandpo.bounds import RatioBounds
from bandpo.groups import group_advantages
from bandpo.lab.comparison.clock import Clock
from bandpo.lab.comparison.devices import check_sampler, device_kind, find_device, seeded
from bandpo.lab.comparison.exact import on_bandits
from bandpo.lab.comparison.problems import END, PAD, PROBLEMS, Problem
from bandpo.lab.comparison.stack import Adam, Rollout, Stack
from bandpo.lab.comparison.top import TopTokens, has_inputs, top_extras, top_tokens
from bandpo.lab.comparison.trial import looks_at_neighbours
from bandpo.lab.comparison.warmup import Checkpoint, warmed_up
from bandpo.losses import aggregate
from bandpo.metrics import PROB_BINS, PROB_EDGES, approx_kl, pass_at_powers, policy_sums
from bandpo.objective import Objective
from bandpo.reference import reference_kl
from bandpo.schedules import Adaptive
from bandpo.terms import TokenObjective, token_objective

_SEED_STRIDE = 1_000_003  # a run's generator starts from seed * stride + warm-up: no two pairs share a stream
_EVALUATION_SEED = 20_261_124  # the noise of evaluations depends on this and the warm-up, and on nothing else of a run
_SHOWN_PROMPTS, _SHOWN_SAMPLES = 8, 4  # of the final evaluation, kept as text


@dataclass(frozen=True)
class Setting:
    """The settings that all runs of a stack share.

    Args:
        problem: A name in `PROBLEMS`.
        updates: Number of rollouts.
        prompts: Q, prompts of a rollout.
        group: G, samples of each prompt.
        epochs: K, passes over a rollout.
        minibatches: M, optimiser steps of an epoch.
        lag: How many rollouts the sampler's weights are behind the policy's.
        temperature: Sampling temperature; log-probs and ratios are those of the policy at this temperature.
        hidden_size: Width of the model.
        layers: Number of layers of the model.
        eval_samples: k of mean@k and pass@k, on the held-out prompts.
        warm_up_steps: Supervised steps before the first rollout; None takes the problem's number.
        device: `cpu`, `cuda`, or one card as `cuda:0`. Another kind of device draws other random numbers.
        sampler: `eager`, or `graph`: each new token by a CUDA graph.
        split: `report`, or `tuning`: the problem's prompts for the choice of a learning rate, in training and evaluation.

    Raises:
        ValueError: If the problem, the device, the split or the sampler is unknown, a number is out of range, or a rollout does
            not split into the mini-batches.
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
    device: str = "cpu"
    sampler: str = "eager"
    split: str = "report"

    def __post_init__(self) -> None:
        if self.split not in ("report", "tuning"):
            raise ValueError(f"split: got {self.split!r}; choose report or tuning")
        if self.problem not in PROBLEMS:
            raise ValueError(f"problem: got {self.problem!r}; choose one of {', '.join(PROBLEMS)}")
        device_kind(self.device)
        check_sampler(self.sampler, self.device)
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
        objective: The objective that it optimises. Its extra inputs come from groups, or are top-K tokens.
        learning_rate: Learning rate of Adam.
        seed: Seed of prompts, noise and mini-batches.
        warm_up: Number of the warmed-up checkpoint that it starts from.
        kl_target: Mean KL(π_old ‖ π) of a token, in nats, that the β of the objective's KL penalty follows by PPO's rule
            (arXiv:1707.06347, sec. 4), measured over all steps on a rollout; None for a constant β.
    """

    objective: Objective
    learning_rate: float
    seed: int = 0
    warm_up: int = 0
    kl_target: float | None = None


@dataclass
class Result:
    """The measurements of a run.

    Args:
        reward: Mean reward of each rollout.
        entropy: Entropy estimate of each rollout, in nats per token: the mean of -log p over the sampled tokens.
        clip: Share of clipped tokens by bin of p, over the run: `{"low": {bin: share}, "high": ...}`.
        tokens: Share of tokens in each bin of p.
        pushed: Share of sampled tokens with an advantage above and below 0 by bin of p: `{"up": {bin: share}, "down": ...}`.
        before: Evaluation before training.
        after: Evaluation after training.
        rewards: `(prompts, k)`, rewards of the final evaluation.
        samples: Some prompts with completions of the final evaluation, as text.
    """

    reward: list[float] = field(default_factory=list[float])
    entropy: list[float] = field(default_factory=list[float])
    clip: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    tokens: dict[str, float] = field(default_factory=dict[str, float])
    pushed: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    before: dict[str, float] = field(default_factory=dict[str, float])
    after: dict[str, float] = field(default_factory=dict[str, float])
    rewards: list[list[float]] = field(default_factory=list[list[float]])
    samples: list[tuple[str, list[str]]] = field(default_factory=list[tuple[str, list[str]]])


class _Batch(NamedTuple):
    """A part of the rollouts of runs that are alike.

    `(runs, sequences, time)` log-probs of policy and sampler and mask, `(runs, sequences)` advantages, and the extras of a run
    that is alone.
    """

    logprobs: Tensor
    old: Tensor
    mask: Tensor
    advantages: Tensor
    extras: dict[str, Tensor]


class Loop:
    """Trains a stack of runs, one rollout at a time.

    Args:
        setting: The settings that the runs share.
        runs: The runs.

    Raises:
        ValueError: If an objective needs extra inputs that are neither of groups nor top-K tokens, or has no KL
            penalty to adapt.
        RunError: If this machine does not have the device.
    """

    def __init__(self, setting: Setting, runs: Sequence[Run]) -> None:
        self.setting, self.runs, self.clock = setting, list(runs), Clock()
        for run in self.runs:
            if not has_inputs(run.objective):
                raise ValueError(
                    f"objective {run.objective.name!r} needs extras the lab does not have: {run.objective.extras}"
                )
        self.device = find_device(setting.device)
        with self.clock.part("warm-up"):
            problem = PROBLEMS[setting.problem]()
            self.problem: Problem = (problem.for_tuning() if setting.split == "tuning" else problem).to(self.device)
            self.stack = warmed_up([checkpoint_of(setting, r.warm_up) for r in self.runs])
        self._start: Stack | None = None  # the reference, where an objective has a KL to it
        if any(run.objective.kl_coef for run in self.runs):
            self._start = Stack({name: w.detach().clone() for name, w in self.stack.weights.items()}, self.stack.shape)
        for w in self.stack.weights.values():
            w.requires_grad_()
        self.optimizer = Adam(
            self.stack.weights, torch.tensor([r.learning_rate for r in self.runs], device=self.device)
        )
        self.draws = [seeded(self.device, _SEED_STRIDE * r.seed + r.warm_up) for r in self.runs]
        self.results = [Result() for _ in self.runs]
        self.done = 0
        self._joins = [_joins(run) for run in self.runs]
        self.penalties = [_Penalty(r) if r.kl_target is not None else None for r in self.runs]
        self._past: deque[dict[str, Tensor]] = deque(maxlen=setting.lag + 1)
        self._counts = torch.zeros(len(self.runs), 3, len(PROB_BINS), device=self.device)
        self._pushes = torch.zeros(len(self.runs), 3, len(PROB_BINS), device=self.device)

    def train(self) -> list[Result]:
        """Make the rollouts that are left, and evaluate before the first and after the last.

        Returns:
            A `Result` for each run.
        """
        if self.done == 0:
            with self.clock.part("evaluation"):
                self._evaluate("before")
        while self.done < self.setting.updates:
            self.update()
        with self.clock.part("evaluation"):
            self._evaluate("after")
        for result, (low, high, n) in zip(self.results, self._counts, strict=True):
            result.clip = {"low": _by_bin((low / n).nan_to_num()), "high": _by_bin((high / n).nan_to_num())}
            result.tokens = _by_bin(n / n.sum().clamp_min(1))
        for result, (up, down, n) in zip(self.results, self._pushes, strict=True):
            result.pushed = {"up": _by_bin((up / n).nan_to_num()), "down": _by_bin((down / n).nan_to_num())}
        return self.results

    def update(self) -> None:
        """Sample one rollout and train on it for its epochs."""
        with self.clock.part("rollouts"):
            prompts = self._prompts()
            rollout = self._rollout(prompts)
            rewards = torch.stack([self.problem.rewards(p, c) for p, c in zip(prompts, rollout.tokens, strict=True)])
        with self.clock.part("updates"):
            self._learn(prompts, rollout, rewards)
        self.done += 1

    def _learn(self, prompts: Tensor, rollout: Rollout, rewards: Tensor) -> None:
        """The epochs of a rollout."""
        s = self.setting
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
        self._count_pushes(rollout, torch.stack(advantages))
        top = self._top_tokens(prompts, rollout)
        rows = s.prompts * s.group
        for epoch in range(s.epochs):
            order = torch.stack([torch.randperm(rows, generator=g, device=self.device) for g in self.draws])
            for part in order.chunk(s.minibatches, 1):
                self._step(prompts, rollout, advantages, extras, part, last=epoch == s.epochs - 1, top=top)
        for penalty in filter(None, self.penalties):
            penalty.after_rollout()

    def _step(
        self,
        prompts: Tensor,
        rollout: Rollout,
        advantages: list[Tensor],
        extras: list[dict[str, Tensor]],
        part: Tensor,
        *,
        last: bool,
        top: Mapping[int, TopTokens] | None = None,
    ) -> None:
        s = self.setting
        pick = part.unsqueeze(-1)
        prompts, *made = [x.gather(1, pick.expand(-1, -1, x.shape[-1])) for x in (prompts, *rollout)]
        length = int(made[2].any(1).any(0).sum())
        chosen = Rollout(*(x[..., :length] for x in made))
        gradients: list[tuple[Tensor, ...]] = []
        for which in self.stack.parts(part.shape[1] * (prompts.shape[-1] + length)):
            stack, tokens = self.stack.part(which), chosen.tokens[which]
            scores = stack.distributions(prompts[which], tokens, s.temperature)
            new = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            ref = None
            if self._start is not None:
                with torch.no_grad():
                    ref = self._start.part(which).logprobs(prompts[which], tokens, s.temperature)
            losses: list[Tensor] = []
            for alike in self._alike(range(*which.indices(len(self.runs)))):
                at = slice(alike.start - which.start, alike.stop - which.start)
                i, j = alike.start, at.start
                given = {k: v[part[i]] for k, v in extras[i].items()}
                if top and i in top:
                    mine = TopTokens(*(x[part[i], :length] for x in top[i]))
                    given |= top_extras(mine, scores[j])
                old, mask = (x[alike.start : alike.stop] for x in (chosen.logprobs, chosen.mask))
                batch = _Batch(new[at], old, mask, torch.stack([advantages[k][part[k]] for k in alike]), given)
                losses += self._losses(alike, batch, None if ref is None else ref[j], count=last)
            gradients.append(torch.autograd.grad(torch.stack(losses).sum(), list(stack.weights.values())))
        self.optimizer.step([torch.cat(g) if len(g) > 1 else g[0] for g in zip(*gradients, strict=True)])  # pyright: ignore[reportGeneralTypeIssues]

    def _alike(self, runs: range) -> list[range]:
        """Consecutive runs whose loss is computed in one call: those of one objective that treats each token by itself."""
        found: list[range] = []
        for i in runs:
            before = found[-1] if found else None
            joins = before is not None and self._joins[i] and self._joins[before.start]
            if before and joins and self.runs[before.start].objective == self.runs[i].objective:
                found[-1] = range(before.start, i + 1)
            else:
                found.append(range(i, i + 1))
        return found

    def _losses(self, runs: range, batch: "_Batch", ref: Tensor | None, *, count: bool) -> list[Tensor]:
        """The loss of each of some runs that are alike; `ref` is that of the reference, where a run of the stack has one."""
        run, penalty = self.runs[runs.start], self.penalties[runs.start]
        joined = token_objective(
            run.objective if penalty is None else penalty.objective,
            logprobs=batch.logprobs.flatten(0, 1),
            old_logprobs=batch.old.flatten(0, 1),
            rollout_logprobs=batch.old.flatten(0, 1),
            advantages=batch.advantages.flatten(),
            mask=batch.mask.flatten(0, 1),
            extras=batch.extras,
        )
        maximum = self.problem.length if run.objective.aggregation == "seq-mean-token-sum-norm" else None
        if penalty is not None:
            penalty.measure(joined)
        losses: list[Tensor] = []
        for j, i in enumerate(runs):
            terms, mask, value = joined, batch.mask[j], joined.value
            if len(runs) > 1:
                terms = _rows_of(joined, slice(j * len(mask), (j + 1) * len(mask)))
                value = terms.value
            if ref is not None and run.objective.kl_coef:
                used = mask & ~terms.nonfinite
                term = reference_kl(
                    batch.logprobs[j],
                    ref,
                    run.objective.kl,
                    old_logprobs=batch.old[j],
                    mask=used,
                    weights=terms.weights,
                )
                value = value - run.objective.kl_coef * term
            if count:
                self._count(i, terms)
            counted = mask if terms.counted is None else mask & terms.counted
            losses.append(-aggregate(value, counted, run.objective.aggregation, max_length=maximum))
        return losses

    @torch.no_grad()
    def _count(self, run: int, terms: TokenObjective) -> None:
        sums = policy_sums(terms, detail="full")  # the bins of p
        names = ("clip_fraction_by_prob/low", "clip_fraction_by_prob/high", "token_fraction_by_prob")
        counts = [sums[f"{name}/{of}"].numerator for name in names for of in PROB_BINS]
        self._counts[run] += torch.stack(counts).view(3, -1)

    @torch.no_grad()
    def _count_pushes(self, rollout: Rollout, advantages: Tensor) -> None:
        """Count the tokens of a rollout by p and by the sign of their advantages `(runs, sequences)`."""
        edges = torch.tensor(PROB_EDGES, device=self.device)
        cell = torch.bucketize(rollout.logprobs.exp(), edges, right=True).flatten(1)
        used, sign = rollout.mask.float(), advantages.unsqueeze(-1)
        for kind, counted in enumerate((used * (sign > 0), used * (sign < 0), used)):
            self._pushes[:, kind].scatter_add_(1, cell, counted.flatten(1))

    def _prompts(self) -> Tensor:
        known, count = self.problem.prompts, (self.setting.prompts,)
        picked = [torch.randint(len(known), count, generator=g, device=self.device) for g in self.draws]
        return torch.stack([known[i].repeat_interleave(self.setting.group, 0) for i in picked])

    def _rollout(self, prompts: Tensor) -> Rollout:
        if self.setting.lag:
            self._past.append({name: w.detach().clone() for name, w in self.stack.weights.items()})
        sampler = Stack(self._sampler_weights(), self.stack.shape)
        size = (prompts.shape[1], self.problem.length)
        noise = torch.stack([torch.rand(size, generator=g, device=self.device) for g in self.draws])
        return sampler.sample(
            prompts[:, :: self.setting.group],
            noise,
            end=END,
            pad=PAD,
            repeats=self.setting.group,
            temperature=self.setting.temperature,
            fixed=self.setting.sampler == "graph",
        )

    def _sampler_weights(self) -> dict[str, Tensor]:
        return self._past[0] if self.setting.lag else self.stack.weights

    @torch.no_grad()
    def _top_tokens(self, prompts: Tensor, rollout: Rollout) -> dict[int, TopTokens]:
        """The sampler's top-K tokens, for the runs whose objective asks for them."""
        asking = [i for i, run in enumerate(self.runs) if run.objective.top_k is not None]
        if not asking:
            return {}
        sampler = Stack(self._sampler_weights(), self.stack.shape).select(asking)
        given, drawn = (torch.stack([x[i] for i in asking]) for x in (prompts, rollout.tokens))
        scores = sampler.distributions(given, drawn, self.setting.temperature)
        return {
            i: top_tokens(x, rollout.tokens[i], cast("int", self.runs[i].objective.top_k))
            for i, x in zip(asking, scores, strict=True)
        }

    def _evaluate(self, stage: Literal["before", "after"]) -> None:
        k, held_out = self.setting.eval_samples, self.problem.held_out
        prompts = held_out.repeat_interleave(k, 0)
        # Before training, all runs that start from one checkpoint are one model: it is evaluated once.
        same = [r.warm_up for r in self.runs] if stage == "before" else list(range(len(self.runs)))
        which = list(dict.fromkeys(same))
        first = [same.index(x) for x in which]
        noise = {r.warm_up: self._evaluation_noise(len(prompts), r.warm_up) for r in self.runs}
        rollout = self.stack.select(first).sample(
            held_out.expand(len(which), -1, -1),
            torch.stack([noise[self.runs[i].warm_up] for i in first]),
            end=END,
            pad=PAD,
            repeats=k,
            temperature=self.setting.temperature,
            fixed=self.setting.sampler == "graph",
        )
        for result, i in zip(self.results, (which.index(x) for x in same), strict=True):
            rewards = self.problem.rewards(prompts, rollout.tokens[i]).view(-1, k)
            right = rewards.sum(1).to(torch.int64)
            report = {
                f"mean@{k}": rewards.mean().item(),
                **pass_at_powers(right, torch.full_like(right, k), k),
                "entropy": -(rollout.logprobs[i].sum() / rollout.mask[i].sum()).item(),
                "groups with signal": ((right > 0) & (right < k)).double().mean().item(),
                "near-certain": (rollout.logprobs[i][rollout.mask[i]].exp() >= PROB_EDGES[-1]).double().mean().item(),
                **self._entropy_of_forks(rollout.logprobs[i], rollout.mask[i]),
            }
            setattr(result, stage, report)
            if stage == "after":
                result.rewards = rewards.tolist()
                result.samples = self._samples_as_text(rollout.tokens[i].view(-1, k, rollout.tokens.shape[-1]))

    def _evaluation_noise(self, rows: int, warm_up: int) -> Tensor:
        """The noise of an evaluation: the same for every objective and stage, and another one for each warm-up."""
        draw = seeded(self.device, _EVALUATION_SEED + _SEED_STRIDE * warm_up)
        return torch.rand(rows, self.problem.length, generator=draw, device=self.device)

    def _entropy_of_forks(self, logprobs: Tensor, mask: Tensor) -> dict[str, float]:
        """The entropy of each fork of a problem, of completions `(rows, time)`: the mean of -log p, in nats."""
        found: dict[str, float] = {}
        for number, place in enumerate(self.problem.forks, 1):
            if count := int(mask[:, place].sum()):  # a ruined policy may never come to a later fork
                found[f"entropy of fork {number}"] = -logprobs[:, place].sum().item() / count
        return found

    def _samples_as_text(self, completions: Tensor) -> list[tuple[str, list[str]]]:
        """The first held-out prompts and the first completions of each, of `(prompts, k, time)` tokens."""
        asked = cast("list[list[int]]", self.problem.held_out[:_SHOWN_PROMPTS].tolist())
        shown = cast("list[list[list[int]]]", completions[:_SHOWN_PROMPTS, :_SHOWN_SAMPLES].tolist())
        text = self.problem.text
        return [
            (text(prompt), [text(tokens) for tokens in samples]) for prompt, samples in zip(asked, shown, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The state from which `load_state_dict` resumes bit for bit."""
        return {
            "weights": {name: w.detach().clone() for name, w in self.stack.weights.items()},
            "moments": [(m.clone(), v.clone()) for m, v in self.optimizer.moments],
            "steps": self.optimizer.steps,
            "device": self.device.type,
            "draws": [g.get_state() for g in self.draws],
            "done": self.done,
            "past": [{k: w.clone() for k, w in past.items()} for past in self._past],
            "counts": self._counts.clone(),
            "pushes": self._pushes.clone(),
            "penalties": [penalty and penalty.rule.value for penalty in self.penalties],
            "results": [(list(r.reward), list(r.entropy), dict(r.before)) for r in self.results],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state of the same setting and runs.

        Args:
            state: A state that `state_dict` returned.

        Raises:
            ValueError: If the state is that of another kind of device, whose generators have no state for this one.
        """
        before = state.get("device", "cpu")
        if before != self.device.type:
            raise ValueError(
                f"the state was saved on {before}, and its random numbers cannot be continued on {self.device.type}: resume on "
                f"{before}, or start anew"
            )
        with torch.no_grad():
            for name, w in self.stack.weights.items():
                w.copy_(state["weights"][name])
            for (m, v), (saved_m, saved_v) in zip(self.optimizer.moments, state["moments"], strict=True):
                m.copy_(saved_m)
                v.copy_(saved_v)
        self.optimizer.steps, self.done = state["steps"], state["done"]
        for g, saved in zip(self.draws, state["draws"], strict=True):
            g.set_state(saved)
        past = [{name: w.to(self.device) for name, w in weights.items()} for weights in state["past"]]
        self._past = deque(past, maxlen=self.setting.lag + 1)
        self._counts = state["counts"].to(self.device, copy=True)
        self._pushes = state["pushes"].to(self.device, copy=True)
        for penalty, value in zip(self.penalties, state["penalties"], strict=True):
            if penalty is not None:
                penalty.rule.value = value
        for r, (reward, entropy, before) in zip(self.results, state["results"], strict=True):
            r.reward, r.entropy, r.before = list(reward), list(entropy), dict(before)


class _Penalty:
    """The β of a run's KL penalty, and the KL that was measured since it was last changed.

    Args:
        run: A run with a target.
    """

    def __init__(self, run: Run) -> None:
        if not run.objective.penalty:
            raise ValueError(
                f"objective {run.objective.name!r} has no KL penalty for kl_target={run.kl_target} to move"
            )
        self._base = run.objective
        self.rule = Adaptive(float(run.objective.penalty), cast("float", run.kl_target), rises=False)
        self._kl = self._tokens = 0.0

    @property
    def objective(self) -> Objective:
        """The objective with the present β."""
        return self._base.with_penalty(self.rule.value)

    def measure(self, terms: TokenObjective) -> None:
        """Add the KL of a step.

        Args:
            terms: The terms of the step's tokens.
        """
        used = terms.mask & ~terms.nonfinite
        self._kl += torch.where(used, approx_kl(terms.log_ratio.detach()), 0.0).sum().item()
        self._tokens += int(used.sum())

    def after_rollout(self) -> None:
        """Change β by what was measured since the last change."""
        if self._tokens:
            self.rule.update(self._kl / self._tokens)
        self._kl = self._tokens = 0.0


def _joins(run: Run) -> bool:
    """Whether the loss of a run can be computed with those of others: nothing in it but its own tokens decides about them."""
    objective = run.objective
    alone = run.kl_target is not None or objective.kl_coef or not on_bandits(objective)
    return not alone and not objective.extras and not looks_at_neighbours(objective)


def _rows_of(terms: TokenObjective, rows: slice) -> TokenObjective:
    """The terms of some sequences."""
    count = len(terms.mask)

    def cut(value: Any) -> Any:
        if isinstance(value, RatioBounds):
            return RatioBounds(*map(cut, value))
        return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value

    return TokenObjective(*map(cut, terms))


def checkpoint_of(setting: Setting, number: int) -> Checkpoint:
    """The checkpoint of a number that runs of a setting start from.

    Args:
        setting: The setting.
        number: Number of the checkpoint, `Run.warm_up`.
    """
    return Checkpoint(
        PROBLEMS[setting.problem]().base or setting.problem,
        number,
        setting.hidden_size,
        setting.layers,
        steps=setting.warm_up_steps,
        device=setting.device,
    )


def _by_bin(values: Tensor) -> dict[str, float]:
    """The values of the bins of p, by the names of the bins."""
    return dict(zip(PROB_BINS, cast("list[float]", values.tolist()), strict=True))
