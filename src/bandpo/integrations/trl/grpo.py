"""bandpo in TRL: `BandGRPOTrainer` is `GRPOTrainer` with the trust region of any `Objective`, and nothing copied.

A region that is an interval for the ratio reaches TRL through the tensors it clamps with; any other surrogate adds its own
term to what TRL computes around it. Both are exact (tests/contract/test_trl.py).
"""

import dataclasses
import math
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from bandpo._inputs import as_columns, is_logprob
from bandpo.bounds import Clip, RatioBounds
from bandpo.bounds.regions import TopK
from bandpo.integrations.trl.checkpoint import WholeCheckpoints
from bandpo.integrations.trl.config import AGGREGATION_OF, SCALE_REWARDS_OF
from bandpo.integrations.trl.config import BandGRPOConfig as BandGRPOConfig
from bandpo.integrations.trl.generate import end_tokens, sampling_by
from bandpo.integrations.trl.packing import packed_scores, probe_packing, refuse_packing
from bandpo.integrations.trl.pooled import PooledLog, checked_metrics, over_processes, without_empty
from bandpo.integrations.trl.precision import lost_updates_of
from bandpo.integrations.trl.rollout import PREFIX, Refill, group_extras, local_rows, mask_of, top_logprobs
from bandpo.integrations.trl.selection import WEIGHT, PrunedRollouts
from bandpo.integrations.trl.signal import SignalWatch, normalized_then_summed, total_rewards, without_signal
from bandpo.losses import aggregate
from bandpo.metrics import TRL_NAMES, PooledSum, policy_sums
from bandpo.objective import Objective
from bandpo.schedules import Adaptive, Schedule
from bandpo.surrogates import MAX_LOG_RATIO, clip
from bandpo.terms import TokenObjective, sequence_log_ratio, token_objective


class BandGRPOTrainer(WholeCheckpoints, GRPOTrainer):
    """TRL's `GRPOTrainer` with the trust region of a bandpo objective; everything else is inherited.

    Args:
        model: As in `GRPOTrainer`; so are all other arguments.
        reward_funcs: As in `GRPOTrainer`.
        args: A `BandGRPOConfig`.
        objective: An `Objective` to use instead of `args.objective`, whose bounds and surrogate may be anything.
        **kwargs: The other arguments of `GRPOTrainer`, by name; a wrong one is refused there.

    Raises:
        TypeError: If `args` is no `BandGRPOConfig`.
        ValueError: If TRL could not honour the objective together with another option.

    Examples:
        >>> BandGRPOTrainer._paper["id"]
        '2603.04918'
    """

    _tag_names = ["trl", "grpo", "bandpo"]  # noqa: RUF012 (TRL's convention)
    _name = "BandPO"
    _paper = {  # noqa: RUF012
        "title": "BandPO",
        "id": "2603.04918",
        "citation": textwrap.dedent("""\
            @article{bandpo2026,
                title  = {{BandPO}},
                year   = 2026,
                eprint = {arXiv:2603.04918},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: BandGRPOConfig | None = None,
        *,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        args = BandGRPOConfig("BandPO") if args is None else args
        if not isinstance(args, BandGRPOConfig):
            raise TypeError(
                f"args: pass a BandGRPOConfig (its fields are GRPOConfig's and more), got {type(args).__name__}"
            )
        self.objective = args.resolve() if objective is None else objective
        self._goes_through_epsilon = _goes_through_epsilon(self.objective)
        self._last_logprobs: Tensor | None = None
        self._scored_batch: dict[str, Any] | None = None
        self.last_rewards = self._rewards_of_functions = torch.empty(0)
        self._groups_without_signal = torch.empty(0, dtype=torch.bool)
        self._sampling_seconds = 0.0
        _refuse_unsupported(
            self.objective, args, given=objective is not None, own_sampler=kwargs.get("rollout_func") is not None
        )
        super().__init__(model, reward_funcs, args, **kwargs)
        self.eos_token_ids = end_tokens(self.model, self._tokenizer)
        if not self.use_vllm and "eos_token_id" not in (args.generation_kwargs or {}):
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        self._refill = Refill(self) if args.dynamic_sampling else None
        self._pruned = PrunedRollouts(self, pruning) if (pruning := args.selector()) is not None else None
        if pruning is not None and pruning.completions and self.aux_loss_enabled:
            raise ValueError(
                "pruning completions cannot weigh what a router loss averages, and this mixture of experts has a router loss "
                f"(router_aux_loss_coef={self.router_aux_loss_coef}): set router_aux_loss_coef=0, or prune prompts only"
            )
        self._radius_rule = args.radius_rule(self.objective, steps=1)
        self._measured = [0.0, 0.0]  # numerator and denominator since the adaptive radius was last moved
        self._pooled = {"train": PooledLog(), "eval": PooledLog()}
        self._signal = SignalWatch()
        self._told_nonfinite = self._silenced = False
        self.say: Callable[[str], Any] = lambda text: warnings.warn(text, stacklevel=3)
        """Takes the main process's sentences to the user."""
        self._packs = False  # whether the model is known to keep packed sequences apart
        if args.packing:
            refuse_packing(self.model, router_loss=self.aux_loss_enabled)
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # sharded weights run within `train` alone
                self._probe_packing()
        if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0:
            warnings.warn(
                f"The trust region of {self.objective.name!r} can never bind: with num_iterations={args.num_iterations}, "
                f"steps_per_generation={args.steps_per_generation} and gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} each rollout is used for one optimiser step, where every ratio is 1. "
                "Set num_iterations >= 2, or steps_per_generation to a multiple of gradient_accumulation_steps.",
                stacklevel=2,
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; says before it where updates would be lost, and after it where nothing was learned.

        Args:
            *args: As in transformers.
            **kwargs: As in transformers.
        """
        self._tell(lost_updates_of(self))
        out = super().train(*args, **kwargs)
        self._tell(self._signal.verdict())
        return out

    def _tell(self, text: str | None) -> None:
        if text is not None and self.accelerator.is_main_process:
            self.say(text)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        without_empty(self._metrics[self._mode])
        super().log(logs, start_time)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.packing:
            out = self._packed_scores(*args, **kwargs)
        else:
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logprobs = out[0]
        if self._scored_batch is None:
            return out
        return self._without_nonfinite(out[0], self._scored_batch), *out[1:]

    def _without_nonfinite(self, new: Tensor, batch: dict[str, Any]) -> Tensor:
        """Log-probs for TRL, which has no rule for NaN and infinity: such tokens add nothing to its loss.

        The rule is that of `token_objective`: they count in the denominators, with an advantage of 0, and a ratio of the
        sequence leaves them out. Log-ratios beyond ±40, whose exponentials would overflow, have no gradient. TRL reads the rest
        of the batch after it has called us.
        """
        old, ref = batch.get("old_per_token_logps"), batch.get("ref_per_token_logps")
        old = new.detach() if old is None else old
        strange = ~(is_logprob(new) & is_logprob(old))  # padding too: TRL multiplies it by 0, and NaN stays NaN
        valid = mask_of(batch) != 0
        by_sequence, used = self.objective.ratio_level == "sequence", valid & ~strange
        if strange.any():
            old, new = _or_zero(old, strange), _or_zero(new, strange)
            if by_sequence:  # TRL takes the mean over all valid tokens: of the others, it is this
                new = torch.where(strange, old + sequence_log_ratio(new - old, used), new)
        log_ratio = (new - old).detach()
        held = (sequence_log_ratio(log_ratio, used) if by_sequence else log_ratio).abs() > MAX_LOG_RATIO
        batch["old_per_token_logps"] = torch.where(held, new.detach(), old)
        silent = valid & (strange | held)
        self._silenced = bool(silent.any())
        if self._silenced:
            batch["advantages"] = _or_zero(as_columns(batch["advantages"], new).expand(new.shape), silent)
        if ref is not None:  # equal log-probs have no KL, and no gradient of it
            off = strange | ~is_logprob(ref) | ((ref - new.detach()).abs() > MAX_LOG_RATIO)
            batch["ref_per_token_logps"] = torch.where(off, new.detach(), ref)
        return new

    def _packed_scores(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        compute_entropy: bool = False, compute_aux_loss: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        extras = [name for name, value in more.items() if value is not None]
        if extras or compute_aux_loss:
            raise ValueError(
                f"packing scores text without auxiliary losses; this batch has {extras or 'a router loss'}"
            )
        if not self._packs:
            self._probe_packing()
        return *packed_scores(self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy), None

    def _probe_packing(self) -> None:
        probe_packing(self.model, self._tokenizer, self.accelerator.device)
        self._packs = True

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        per_function = super()._calculate_rewards(*args, **kwargs)
        # TRL leaves NaN out of its group statistics; an infinite reward is no score either, and would spoil its whole group.
        per_function = per_function.masked_fill(per_function.isinf(), math.nan)
        self._rewards_of_functions = per_function
        self.last_rewards = total_rewards(per_function, self.reward_weights)
        self._metrics[self._mode]["reward/unscored"].append(self.last_rewards.isnan().float().mean().item())
        self._groups_without_signal = without_signal(
            per_function, self.reward_weights, self._group_size,
            summed_first=self.multi_objective_aggregation == "sum_then_normalize",
        )  # fmt: skip
        return per_function

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        started = time.perf_counter()
        rollout = self._chosen_rollout(inputs)
        self._sampling_seconds = time.perf_counter() - started
        return rollout

    def _chosen_rollout(self, inputs: Any) -> dict[str, Any]:
        """A rollout after pruning, or after dynamic sampling."""
        if self._pruned is None or not self.model.training:
            rollout = self._generate_with_extras(inputs)
        else:
            inputs, weights = self._pruned.before(inputs)
            rollout = self._pruned.after(inputs, self._generate_with_extras(inputs), weights)
        if self.model.training:
            if self._refill is not None:
                rollout = self._refill(rollout, self._generate_with_extras)
            if isinstance(self._radius_rule, Adaptive) and self._measured[1] > 0:  # some valid token was measured
                self._radius_rule.update(self._measured[0] / self._measured[1])
                self._measured = [0.0, 0.0]
        return rollout

    def _generate_with_extras(self, inputs: Any) -> dict[str, Any]:
        """TRL's rollout, sampled as its options say and not as the model's file does, and what the objective needs of it.

        A group without signal has advantages of exactly 0, and not the rounding of its mean; nor has a reward function that
        says the same of all of a group a share in the advantages that are normalised for each function.
        """
        own = getattr(self, "generation_config", None)  # none with vLLM
        with nullcontext() if own is None else sampling_by(self.model, own):
            rollout = super()._generate_and_score_completions(inputs)
        silent = self._groups_without_signal
        mine = local_rows(self, len(rollout["advantages"]))
        if self.multi_objective_aggregation == "normalize_then_sum" and self._group_size > 1:
            exact = normalized_then_summed(self._rewards_of_functions, self.reward_weights, self._group_size)
            rollout["advantages"] = exact[mine].to(rollout["advantages"])
        rows = silent.repeat_interleave(self._group_size)[mine].to(rollout["advantages"].device)
        rollout["advantages"] = rollout["advantages"].masked_fill(rows, 0.0)
        log = self._metrics[self._mode]
        if log.get("frac_reward_zero_std"):
            log["frac_reward_zero_std"][-1] = silent.float().mean().item()
        if self.model.training:
            self._tell(self._signal.note(silent, self.last_rewards))
        rollout |= group_extras(self, rollout)
        if isinstance(self.objective.bounds, TopK):
            values, ids = top_logprobs(self, self.model, rollout, None, self.objective.bounds.k)
            rollout |= {f"{PREFIX}top_logprobs": values, f"{PREFIX}top_ids": ids}
        return rollout

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._sampling_seconds, started = 0.0, time.perf_counter()
        out = super().training_step(*args, **kwargs)
        self._metrics["train"]["update_time"].append(time.perf_counter() - started - self._sampling_seconds)
        return out

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._move_radius()
        log = self._metrics[self._mode]
        self._pooled[self._mode].begin(log)
        policy_losses = len(log.get("policy_loss", ()))
        old = inputs.get("old_per_token_logps")
        bounds = None
        if self._goes_through_epsilon and old is not None:
            bounds = self.objective.bounds(_or_zero(old, ~is_logprob(old)))
        self._last_logprobs = None
        theirs = dict(inputs)
        if WEIGHT in inputs and self._goes_through_epsilon:  # the clipped objective is linear in A
            theirs["advantages"] = inputs["advantages"] * inputs[WEIGHT]
        if not self._goes_through_epsilon:
            # With advantages 0 what is left is TRL's own: KL to the reference, entropy bonus, auxiliary losses, their metrics.
            theirs["advantages"] = torch.zeros_like(inputs["advantages"])
        self._scored_batch = theirs
        try:
            with self._as_epsilon(bounds):
                loss = super()._compute_loss(model, theirs)
        finally:
            self._scored_batch = None
        new = self._last_logprobs
        if new is None:
            raise RuntimeError(
                "GRPOTrainer._compute_loss did not call _get_per_token_logps_and_entropies: this version of TRL is not "
                "supported (pip install 'bandpo[trl]'), or a patch replaced the loss"
            )
        old = new.detach() if old is None else old  # TRL leaves them out where every ratio is 1
        if self._goes_through_epsilon:
            terms = self._inherited_terms(new.detach(), old, bounds, inputs)
        else:
            terms = self._own_terms(model, new, old, inputs)
            own_term = self._policy_term(terms.value, inputs)
            loss = loss + own_term
            if len(log.get("policy_loss", ())) > policy_losses:  # logged beside an entropy bonus, of advantages of 0
                log["policy_loss"][-1] += self._in_trl_s_units(own_term.detach())
        self._log_band(terms, inputs)
        return loss

    def _in_trl_s_units(self, own_term: Tensor) -> float:
        """Our term as TRL logs its `policy_loss`: averaged over processes, before the division by the accumulation steps."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.loss_type == "dapo":  # its normaliser is that of the whole accumulation window already
            accumulation = 1
        return self.accelerator.gather(own_term * accumulation).mean().item()

    def _own_terms(self, model: Any, new: Tensor, old: Tensor, inputs: dict[str, Any]) -> TokenObjective:
        """The objective of each token, with the sampler's log-probs and the extras that TRL carried along."""
        # Without an inference engine the sampler is this model, at the weights of π_old: the same log-probs. vLLM sends NaN for
        # a token that it could not score.
        sampled = inputs.get("sampling_per_token_logps")
        sampled = old if sampled is None else torch.where(sampled.isnan(), old, sampled)
        extras = {name: inputs[PREFIX + name] for name in self.objective.extras if PREFIX + name in inputs}
        if isinstance(self.objective.bounds, TopK):
            ids = inputs[f"{PREFIX}top_ids"]
            extras = {
                "old_topk_logprobs": inputs[f"{PREFIX}top_logprobs"],
                "topk_logprobs": top_logprobs(self, model, inputs, ids, self.objective.bounds.k)[0],
                "sampled_in_topk": (ids == inputs["completion_ids"].unsqueeze(-1)).any(-1),
            }
        return token_objective(
            self.objective, logprobs=new, old_logprobs=old, rollout_logprobs=sampled, advantages=inputs["advantages"],
            mask=mask_of(inputs), extras=extras,
        )  # fmt: skip

    def _inherited_terms(
        self, new: Tensor, old: Tensor, bounds: RatioBounds | None, inputs: dict[str, Any]
    ) -> TokenObjective:
        """The terms of the objective that TRL has computed itself, for the metrics."""
        return token_objective(
            self.objective,
            logprobs=new,
            old_logprobs=old,
            advantages=inputs["advantages"],
            mask=mask_of(inputs),
            bounds=bounds,
        )

    def _move_radius(self) -> None:
        if self._radius_rule is None or not self.model.training:
            return
        rule = self._radius_rule
        if isinstance(rule, Schedule):
            radius = dataclasses.replace(rule, steps=self.state.max_steps)(self.state.global_step)
        else:
            radius = rule.value
        # A tensor, because a table for each radius would take longer than to solve for it.
        self.objective = self.objective.with_radius(torch.tensor(radius, dtype=torch.float64))

    @contextmanager
    def _as_epsilon(self, bounds: RatioBounds | None) -> Iterator[None]:
        """TRL clamps the ratio to `[1 - epsilon_low, 1 + epsilon_high]`; both may be tensors of one entry per token."""
        saved = self.epsilon_low, self.epsilon_high
        if isinstance(self.objective.bounds, Clip):  # one number for all tokens, and for whole sequences
            self.epsilon_low, self.epsilon_high = self.objective.bounds.low, self.objective.bounds.high
        elif bounds is None:  # every ratio is 1
            self.epsilon_low, self.epsilon_high = 1.0, math.inf
        else:
            self.epsilon_low, self.epsilon_high = 1 - bounds.lower, bounds.upper - 1
        try:
            yield
        finally:
            self.epsilon_low, self.epsilon_high = saved

    def _policy_term(self, value: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The policy loss of a surrogate that TRL does not know, normalised as TRL's `loss_type` is."""
        mask, per_token = mask_of(inputs), -value
        if WEIGHT in inputs:
            per_token = per_token * inputs[WEIGHT].unsqueeze(1)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            per_token = per_token * inputs["importance_sampling_ratio"]
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        if self.loss_type == "dapo":
            # num_items_in_batch spans the generation batch over all processes; one accumulation window is its share of it
            normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            normalizer = normalizer * accumulation / self.args.steps_per_generation if training else normalizer
        elif self.loss_type == "bnpo":
            normalizer = mask.sum().clamp(min=1.0) * accumulation
        else:
            normalizer = mask.size(0) * accumulation
        return aggregate(
            per_token,
            mask,
            AGGREGATION_OF[self.loss_type],
            normalizer=normalizer,
            max_length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
        )

    @torch.no_grad()
    def _log_band(self, terms: TokenObjective, inputs: dict[str, Any]) -> None:
        """Our metrics into TRL's log, pooled over processes and micro-batches, with one transfer to the host."""
        mask = mask_of(inputs)
        sums = policy_sums(terms)
        rows = torch.tensor(float(len(mask)), device=mask.device)
        silenced = torch.tensor(float(self._silenced), device=mask.device)
        around = {"sequences": PooledSum((mask != 0).any(1).sum(), rows), "silenced": PooledSum(silenced, rows)}
        found = over_processes(self.accelerator, sums | around)
        sequences, silenced = found.pop("sequences"), found.pop("silenced")
        # TRL has counted clips under advantages of 0.
        replaced = not self._goes_through_epsilon or silenced.numerator > 0
        log, pooled = self._metrics[self._mode], self._pooled[self._mode]
        for name, total in found.items():
            if name not in TRL_NAMES:
                pooled.put(log, name, total)
        tokens = found["nonfinite_fraction"].denominator
        for name in ("kl", "entropy"):
            pooled.take(log, name, weight=tokens, count=tokens)
        for ours, theirs in TRL_NAMES.items():
            if not theirs.startswith("clip_ratio/"):
                continue
            if replaced:
                if log.get(theirs):
                    pooled.put(log, theirs, found[ours])
            elif self.objective.ratio_level == "sequence":
                pooled.take(log, theirs, weight=sequences.denominator, count=sequences.numerator)
            else:
                pooled.take(log, theirs, weight=tokens, count=tokens)
        for name, kind in (("clip_ratio/low_min", "min"), ("clip_ratio/high_max", "max")):
            if replaced:
                pooled.drop(log, name)
            else:
                pooled.take(log, name, weight=1.0, count=tokens, kind=kind)
        if found["nonfinite_fraction"].numerator and not self._told_nonfinite:
            self._told_nonfinite = True
            self._tell(
                f"{found['nonfinite_fraction'].numerator:.0f} of {tokens:.0f} valid tokens of a batch have a log-probability "
                "or an advantage that is NaN or infinite. They are left out of the loss; nonfinite_fraction in the log counts "
                "them. Look at the model's logits, at the sampler's log-probs and at the rewards"
            )
        if self._radius_rule is None or not self.model.training:
            return
        radius = float(self.objective.bounds.radius)  # type: ignore[union-attr]
        log["band/radius"].append(radius)
        if isinstance(self._radius_rule, Adaptive):
            by_divergence = self._radius_rule.rises
            seen = found["band/divergence_mean" if by_divergence else "outside_fraction/any"]
            self._measured[0] += seen.numerator * (radius if by_divergence else 1.0)
            self._measured[1] += seen.denominator

    def state_to_keep(self) -> dict[str, Any]:
        # TRL alone forgets the rollout that is being reused; a resumed run would continue with another one.
        return {
            "step": self._step, "rollout": self._buffered_inputs, "metrics": dict(self._metrics["train"]),
            "pooled": self._pooled["train"].parts, "signal": self._signal.state_dict(),
            "pruning": self._pruned.prune.state_dict() if self._pruned is not None else {},
            "drawn": self._refill.drawn if self._refill is not None else 0, "measured": self._measured,
            "radius": self._radius_rule.state_dict() if isinstance(self._radius_rule, Adaptive) else {},
        }  # fmt: skip

    def take_state(self, state: dict[str, Any]) -> None:
        step, rollout, (numerator, denominator) = state["step"], state["rollout"], state["measured"]
        parts = rollout is None or (isinstance(rollout, list) and all(isinstance(part, dict) for part in rollout))
        if type(step) is not int or not parts:
            raise ValueError("the rollout in use is not as it was saved")
        self._step, self._buffered_inputs, self._measured = step, rollout, [float(numerator), float(denominator)]
        self._metrics["train"].update(checked_metrics(state["metrics"]))
        self._pooled["train"].load(state["pooled"])
        self._signal.load_state_dict(state["signal"])
        if self._pruned is not None:
            self._pruned.prune.load_state_dict(state["pruning"])
        if self._refill is not None:
            self._refill.drawn = state["drawn"]
        if isinstance(self._radius_rule, Adaptive):
            self._radius_rule.load_state_dict(state["radius"])


def _goes_through_epsilon(objective: Objective) -> bool:
    """Whether TRL computes the whole objective itself when it is handed the bounds."""
    alone = objective.correction is None and not objective.bounds_inputs
    return objective.surrogate is clip and objective.anchor == "old" and objective.ratio_level != "product" and alone


def _or_zero(x: Tensor, where: Tensor) -> Tensor:
    return x.masked_fill(where, 0.0)


def _refuse_unsupported(objective: Objective, args: BandGRPOConfig, *, given: bool, own_sampler: bool) -> None:
    """What TRL would silently not do is an error."""
    if not GRPOTrainer._compute_loss.__module__.startswith("trl."):
        raise ValueError(
            f"GRPOTrainer._compute_loss comes from {GRPOTrainer._compute_loss.__module__}: a patched loss (unsloth?) would "
            "bypass the trust region. Import bandpo.integrations.trl without the patch."
        )
    if objective.anchor == "rollout" or objective.correction is not None:
        if args.use_vllm and args.vllm_importance_sampling_correction:
            raise ValueError(
                f"objective {objective.name!r} accounts for the sampler itself; TRL's correction on top would count the "
                "mismatch twice: set vllm_importance_sampling_correction=False"
            )
        if objective.correction is not None and not args.use_vllm and not own_sampler:
            warnings.warn(
                f"Objective {objective.name!r} corrects for a sampler that differs from the trainer, and without use_vllm the "
                "trainer samples itself: all its weights will be 1.",
                stacklevel=3,
            )
    if isinstance(objective.bounds, TopK) and args.use_vllm:
        raise ValueError(
            f"objective {objective.name!r} needs the sampler's top-K log-probs, which TRL does not pass on from vLLM; "
            "choose dppo-kl or dppo-tv, or use_vllm=False"
        )
    if isinstance(objective.bounds, TopK) and own_sampler:
        raise ValueError(
            f"objective {objective.name!r} needs the sampler's top-K log-probs, which TRL does not take from a rollout_func; "
            "choose dppo-kl or dppo-tv"
        )
    level = "sequence" if objective.ratio_level == "sequence" else "token"
    # An objective given as an object can no longer set TRL's fields: they must say the same.
    for name, ours, option, theirs in (
        ("ratio_level", level, "importance_sampling_level", args.importance_sampling_level),
        ("aggregation", objective.aggregation, "loss_type", AGGREGATION_OF[args.loss_type]),
    ):
        if ours != theirs and given:
            raise ValueError(
                f"the objective's {name}={ours!r} differs from {option}={getattr(args, option)!r} ({theirs}); "
                f"set {option} in the BandGRPOConfig"
            )
    if given and args.scale_rewards not in ("batch", SCALE_REWARDS_OF.get(objective.advantage)):
        raise ValueError(
            f"the objective's advantage={objective.advantage!r} differs from scale_rewards={args.scale_rewards!r}; "
            "set scale_rewards in the BandGRPOConfig"
        )
    if not _goes_through_epsilon(objective):
        unsupported = {
            "delta": args.delta is not None,
            "top_entropy_quantile": args.top_entropy_quantile < 1,
            "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
        }
        for name, is_set in unsupported.items():
            if is_set:
                raise ValueError(
                    f"{name}={getattr(args, name)} acts on TRL's own clipped loss, which this objective replaces"
                )
