"""bandpo in TRL: `BandGRPOTrainer` is `GRPOTrainer` with the trust region of any `Objective`, without a copy of TRL's code.

How an objective reaches TRL's loss is described in `strategy.py`: TRL computes a clipped objective itself, from our bounds; the
loss of any other surrogate is added to TRL's. Both are exact (tests/contract/test_trl.py).
"""

import functools
import math
import re
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from trl import GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from bandpo._system import citation
from bandpo.integrations._host import over_ranks
from bandpo.integrations.trl.base import BandTrainer, Mode
from bandpo.integrations.trl.config import BandGRPOConfig as BandGRPOConfig
from bandpo.integrations.trl.config import trl_computes_kl
from bandpo.integrations.trl.generate import end_tokens, sampling_by
from bandpo.integrations.trl.host import Accelerator, Batch, TrainerState
from bandpo.integrations.trl.kept import KeptObjective
from bandpo.integrations.trl.kl import kl_of_batch, kl_of_run
from bandpo.integrations.trl.nonfinite import Scored, without_nonfinite
from bandpo.integrations.trl.packing import packed_scores, probe_packing, refuse_packing
from bandpo.integrations.trl.pooled import Measured, PooledLog, Total
from bandpo.integrations.trl.radius import MovingPenalty, MovingRadius
from bandpo.integrations.trl.refusals import (
    refuse_patched_loss,
    refuse_sampler,
    warn_if_never_binding,
)
from bandpo.integrations.trl.rollout import PREFIX, Refill, group_extras, local_rows, mask_of, top_logprobs
from bandpo.integrations.trl.sampler import SAMPLED, SamplerLogprobs, cast_once, mismatch
from bandpo.integrations.trl.selection import PrunedRollouts
from bandpo.integrations.trl.signal import SignalWatch, normalized_then_summed, total_rewards, without_signal
from bandpo.integrations.trl.strategy import GivenToTRL, strategy_for
from bandpo.integrations.trl.top import learns_from_top, refuse_images, top_scores
from bandpo.metrics import EFFECTIVE_SAMPLE_SIZE, Detail, PooledSum, effective_size, policy_sums
from bandpo.monitoring.names import metrics_of
from bandpo.objective import Objective
from bandpo.terms import TokenObjective


class BandGRPOTrainer(BandTrainer, GRPOTrainer):
    """TRL's `GRPOTrainer` with the trust region of a bandpo objective; everything else is inherited.

    Args:
        model: The model to train, or where to load it from, as in `GRPOTrainer`.
        reward_funcs: The reward functions, as in `GRPOTrainer`.
        args: A `BandGRPOConfig`.
        objective: An `Objective` to use instead of `args.objective`, with any bounds and any surrogate. Aggregation,
            advantages, ratio level and KL are the objective's; `trainer.args` has the fields of TRL that follow from them.
        **kwargs: The other arguments of `GRPOTrainer`, by name; `GRPOTrainer` refuses an unknown one.

    Raises:
        TypeError: If `args` is no `BandGRPOConfig`.
        ValueError: If TRL could not honour the objective together with another option, or an option that was set contradicts
            an objective that is an object.

    Examples:
        >>> BandGRPOTrainer._paper["id"]
        '2603.04918'
    """

    _tag_names = ["trl", "grpo", "bandpo"]  # noqa: RUF012 (TRL's convention)
    _name = "BandPO"
    _paper = {"title": citation.TITLE, "id": citation.ARXIV, "citation": citation.bibtex()}  # noqa: RUF012

    if TYPE_CHECKING:  # attributes of TRL and transformers, which leave their types open
        args: BandGRPOConfig
        accelerator: Accelerator
        state: TrainerState
        num_generations: int
        num_generations_eval: int
        reward_weights: Tensor
        multi_objective_aggregation: str
        loss_type: str
        max_completion_length: int
        use_vllm: bool
        vllm_importance_sampling_correction: bool
        current_gradient_accumulation_steps: int
        aux_loss_enabled: bool
        temperature: float
        epsilon_low: float | Tensor
        epsilon_high: float | Tensor
        beta: float
        _tokenizer: Any
        _step: int
        _buffered_inputs: list[Batch] | None

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
        args = args if objective is None else args.following(objective)
        chosen = args.resolve()
        self._kept = KeptObjective(chosen, args)
        self.objective = over_ranks(chosen)
        self._strategy = strategy_for(self.objective)(self)
        self._name, self._paper = _of_the_card(self.objective)
        refuse_patched_loss()
        refuse_sampler(self.objective, args, own_sampler=kwargs.get("rollout_func") is not None)
        self._strategy.refuse(args)
        in_trl = ("k3-ratio" if args.use_bias_correction_kl else "k3") == args.kl_term
        self._own_kl = bool(args.beta) and not (in_trl and trl_computes_kl(args.kl_term, self.objective))
        self._from_top = learns_from_top(self.objective)
        self._signal = SignalWatch()
        self.last_rewards = self._rewards_of_functions = torch.empty(0)
        self._groups_without_signal = torch.empty(0, dtype=torch.bool)
        self._scored_batch: Batch | None = None  # the batch in `_compute_loss`, None while a rollout is scored
        self._last_logprobs: Tensor | None = None
        self._last_scored: Scored | None = None
        self._radius_in_use: float = math.nan
        self.last_top: Tensor | None = (
            None  # log-probs of the top-K tokens from the same pass, where they have a gradient
        )
        self._told_nonfinite = self._packs = False
        self._sampling_seconds = 0.0
        self._sampler: SamplerLogprobs | None = None
        super().__init__(model, reward_funcs, args, **kwargs)
        self._set_end_tokens()
        self._refill = Refill(self) if args.dynamic_sampling else None
        self._pruned = self._make_pruning()
        rule = args.radius_rule(self.objective, steps=1)
        self._radius = None if rule is None else MovingRadius(rule)
        penalty = args.penalty_rule(self.objective)
        self._penalty = None if penalty is None else MovingPenalty(penalty)
        self._check_packing()
        warn_if_never_binding(self.objective, args)
        self._tell(kl_of_run(self.objective, args))

    def _set_end_tokens(self) -> None:
        self.eos_token_ids = end_tokens(self.model, self._tokenizer)
        if not self.use_vllm and "eos_token_id" not in (self.args.generation_kwargs or {}):
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def _make_pruning(self) -> PrunedRollouts | None:
        pruning = self.args.selector()
        if pruning is None:
            return None
        pruning.check(self.objective)  # which may have been given as an object
        if pruning.completions and self.aux_loss_enabled:
            raise ValueError(
                "pruning completions cannot weigh what a router loss averages, and this mixture of experts has a router loss "
                f"(router_aux_loss_coef={self.router_aux_loss_coef}): set router_aux_loss_coef=0, or prune prompts only"
            )
        return PrunedRollouts(self, pruning)

    # ---- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in transformers, with a message before it if updates would be lost, and after it if nothing was learned.

        Args:
            *args: Arguments of transformers' `Trainer.train`.
            **kwargs: Arguments of transformers' `Trainer.train`.

        Returns:
            transformers' `TrainOutput`, or None if the resumed run was finished.
        """
        out = super().train(*args, **kwargs)
        self._tell(self._signal.verdict())
        return out

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._sampling_seconds, started = 0.0, time.perf_counter()
        out = super().training_step(*args, **kwargs)
        self._metrics["train"]["update_time"].append(time.perf_counter() - started - self._sampling_seconds)
        return out

    # ---- rollouts

    @property
    def group_size(self) -> int:
        """Completions of each prompt, in training or in evaluation."""
        return self.num_generations if self.model.training else self.num_generations_eval

    @property
    def pad_token(self) -> int:
        """The token that fills short completions."""
        return self._tokenizer.pad_token_id

    @property
    def radius_moves(self) -> bool:
        """Whether the radius may change between two steps."""
        return self._radius is not None

    @property
    def micro_batch(self) -> int:
        """Number of the micro-batch, counted by TRL over the run."""
        return self._step

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        started = time.perf_counter()
        rollout = self._chosen_rollout(inputs)
        self._sampling_seconds = time.perf_counter() - started
        return rollout

    def _chosen_rollout(self, inputs: Any) -> Batch:
        """A rollout after pruning or dynamic sampling."""
        if self._pruned is None or not self.model.training:
            rollout = self._generate_with_extras(inputs)
        else:
            inputs, weights = self._pruned.before(inputs)
            rollout = self._pruned.after(inputs, self._generate_with_extras(inputs), weights)
        if self.model.training and self._refill is not None:
            rollout = self._refill(rollout, self._generate_with_extras)
        if self.model.training and (self._radius is not None or self._penalty is not None):
            self.settle()  # they follow what was measured
        if self.model.training and self._radius is not None:
            self._radius.after_rollout()
        if self.model.training and self._penalty is not None:
            self.objective = self.objective.with_penalty(self._penalty.after_rollout())
        return rollout

    def _generate_with_extras(self, inputs: Any) -> Batch:
        """TRL's rollout, sampled by TRL's options alone and not by the model's file, with the extras of the objective."""
        own = getattr(self, "generation_config", None)  # there is none with vLLM
        self._sampler = None
        with nullcontext() if own is None else sampling_by(self.model, own):
            rollout = cast("Batch", super()._generate_and_score_completions(inputs))
        if self._sampler is not None:
            rollout[SAMPLED], self._sampler = self._sampler.of(rollout["completion_ids"]), None
        rollout["advantages"] = self._exact_advantages(rollout["advantages"])
        if self.current_log.get("frac_reward_zero_std"):
            self.current_log["frac_reward_zero_std"][-1] = self._groups_without_signal.float().mean().item()
        if self.model.training:
            self._tell(self._signal.note(self._groups_without_signal, self.last_rewards))
        rollout |= group_extras(self, rollout) | self._strategy.of_rollout(rollout)
        if self.objective.top_k is not None:
            values, ids = top_logprobs(self, self.model, rollout, None, self.objective.top_k)
            rollout |= {f"{PREFIX}top_logprobs": values, f"{PREFIX}top_ids": ids}
        return rollout

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's sampling; transformers' own sampler is listened to for the log-probs that it draws from."""
        batched = getattr(self.args, "use_transformers_continuous_batching", False)
        if self.use_vllm or batched or getattr(self, "tools", None):
            return cast("Any", super()._generate_single_turn(*args, **kwargs))
        self._sampler = SamplerLogprobs(self.temperature)
        with self._sampler.listening(self.model), cast_once(self.accelerator):
            return cast("Any", super()._generate_single_turn(*args, **kwargs))

    def _exact_advantages(self, advantages: Tensor) -> Tensor:
        """TRL's advantages without the rounding of a group's mean.

        In a group without signal they are exactly 0. If rewards are normalised for each function, a function that gives the
        same reward to a whole group adds nothing to its advantages.
        """
        mine = local_rows(self, len(advantages))
        if self.multi_objective_aggregation == "normalize_then_sum" and self.group_size > 1:
            exact = normalized_then_summed(self._rewards_of_functions, self.reward_weights, self.group_size)
            advantages = exact[mine].to(advantages)
        silent = self._groups_without_signal.repeat_interleave(self.group_size)[mine].to(advantages.device)
        return advantages.masked_fill(silent, 0.0)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = cast("Tensor", super()._calculate_rewards(*args, **kwargs))
        # TRL leaves NaN out of its group statistics. An infinite reward is no score either, and would spoil its whole group.
        rewards = rewards.masked_fill(rewards.isinf(), math.nan)
        self._rewards_of_functions = rewards
        self.last_rewards = total_rewards(rewards, self.reward_weights)
        self.current_log["reward/unscored"].append(self.last_rewards.isnan().float().mean().item())
        self._groups_without_signal = without_signal(
            rewards,
            self.reward_weights,
            self.group_size,
            summed_first=self.multi_objective_aggregation == "sum_then_normalize",
        )
        return rewards

    # ---- log-probs

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._scored_batch is not None and self._from_top:
            out = self._scores_with_top(*args, **kwargs)
        elif self.args.packing:
            out = self._packed_scores(*args, **kwargs)
        else:
            out = cast("tuple[Any, ...]", super()._get_per_token_logps_and_entropies(*args, **kwargs))
        self._last_logprobs = out[0]
        if self._scored_batch is None:
            return out
        if (
            self._strategy.replaces_loss and not self.beta
        ):  # for advantages of 0 its policy loss is 0 with any log-probs
            zeros = torch.zeros_like(out[0])
            self._scored_batch["old_per_token_logps"] = zeros
            scored = Scored(zeros, zeros)
        else:
            scored = without_nonfinite(out[0], self._scored_batch, self.objective.ratio_level)
        self._last_scored = scored
        return scored.logprobs, *out[1:]

    def _scores_with_top(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if any(value is not None for value in more.values()):
            refuse_images(self.objective)
        if self.args.packing and not self._packs:
            self._probe_packing()
        found = top_scores(
            self,
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            cast("Batch", self._scored_batch)[f"{PREFIX}top_ids"],
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
        )
        self.last_top = found.top
        return found.logprobs, found.entropy, found.router_loss

    def _packed_scores(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        extras = [name for name, value in more.items() if value is not None]
        if extras or compute_aux_loss:
            raise ValueError(
                f"packing scores text without auxiliary losses; this batch has {extras or 'a router loss'}"
            )
        if not self._packs:
            self._probe_packing()
        return *packed_scores(self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy), None

    def _check_packing(self) -> None:
        if self.args.packing:
            refuse_packing(self.model, router_loss=self.aux_loss_enabled)
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # a sharded model runs within `train` alone
                self._probe_packing()

    def _probe_packing(self) -> None:
        probe_packing(self.model, self._tokenizer, self.accelerator.device)
        self._packs = True

    # ---- the loss

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        self._set_radius()
        log = self.current_log
        logged = {name: len(log.get(name, ())) for name in _FROM_TRL}
        given = self._strategy.given_to_trl(inputs)
        loss, logprobs, scored = self._loss_of_trl(model, inputs, given)
        found = {name: log[name].pop() for name, count in logged.items() if len(log.get(name, ())) > count}
        for name in [name for name in found if not log[name]]:
            del log[name]  # so that there is no name without a number
        detail = self._detail()
        basic = None
        if detail == "basic" and not self._own_kl:
            with torch.no_grad():
                basic = self._strategy.basic_sums(scored, inputs, given)
        terms = None if basic is not None else self._strategy.terms(model, logprobs, inputs, given)
        sums: dict[str, PooledSum] = basic or {}
        if terms is not None:
            own = self._strategy.own_loss(terms, inputs)
            if own is not None:
                loss = loss + own.value
                if "policy_loss" in found:  # TRL logs it beside an entropy bonus, here of advantages of 0
                    found["policy_loss"] += self.accelerator.gather(own.as_logged).mean().item()
            if self._own_kl:
                kl = kl_of_batch(self, terms, logprobs, inputs)
                sums, loss = {"kl": kl.logged}, loss + self.beta * kl.loss
            sums |= policy_sums(terms, detail=detail)
        if not (self.use_vllm and self.vllm_importance_sampling_correction):  # then TRL logs it
            sums |= mismatch(inputs, logprobs)
        if "policy_loss" in found:
            log["policy_loss"].append(found.pop("policy_loss"))
        self._after_loss(logprobs, inputs, given, terms)
        self._measure(sums, found, scored, inputs)
        return loss

    def _detail(self) -> Detail:
        """The metrics of this micro-batch; all those of an optimizer step have the same ones."""
        if self._radius is not None and self._radius.measures and self.model.training:
            return "full"  # it follows one of them
        every = self.args.full_metrics_every
        due = every > 0 and (not self.model.training or self.state.global_step % every == 0)
        return "full" if due else "basic"

    def _after_loss(self, logprobs: Tensor, inputs: Batch, given: GivenToTRL, terms: TokenObjective | None) -> None:
        """For subclasses, after the loss of a micro-batch. The terms are None where only TRL's loss needed them."""

    def _set_radius(self) -> None:
        if self._radius is None or not self.model.training:
            return
        radius = self._radius.value(self.state.global_step, self.state.max_steps)
        if radius != self._radius_in_use:
            # As a tensor: with a number, a table would be made for each radius, which takes longer than to solve for it.
            self.objective = self.objective.with_radius(torch.tensor(radius, dtype=torch.float64))
            self._radius_in_use = radius

    def _loss_of_trl(self, model: Any, inputs: Batch, given: GivenToTRL) -> tuple[Tensor, Tensor, Scored]:
        """TRL's loss for other advantages and another interval, and the log-probs of the model, and those that it was given."""
        self._last_logprobs = self._last_scored = self.last_top = None
        self._scored_batch = {**inputs, "advantages": given.advantages}
        try:
            with self._clamping_to(given.epsilon), self._without_kl() if self._own_kl else nullcontext():
                loss = cast("Tensor", super()._compute_loss(model, self._scored_batch))
        finally:
            self._scored_batch = None
        # Set in `_get_per_token_logps_and_entropies`
        logprobs, scored = cast("tuple[Tensor | None, Scored | None]", (self._last_logprobs, self._last_scored))
        self._last_logprobs = self._last_scored = None
        if logprobs is None or scored is None:
            raise RuntimeError(
                "GRPOTrainer._compute_loss did not call _get_per_token_logps_and_entropies: this version of TRL is not "
                "supported (pip install 'bandpo[trl]'), or a patch replaced the loss"
            )
        return loss, logprobs, scored

    @contextmanager
    def _clamping_to(self, epsilon: tuple[float | Tensor, float | Tensor]) -> Generator[None, None, None]:
        """TRL clamps the ratio to `[1 - epsilon_low, 1 + epsilon_high]`; both may be tensors of one entry per token."""
        saved = self.epsilon_low, self.epsilon_high
        self.epsilon_low, self.epsilon_high = epsilon
        try:
            yield
        finally:
            self.epsilon_low, self.epsilon_high = saved

    @contextmanager
    def _without_kl(self) -> Generator[None, None, None]:
        """TRL's loss without its KL to the reference, where bandpo computes it."""
        beta, self.beta = self.beta, 0.0
        try:
            yield
        finally:
            self.beta = beta

    # ---- metrics

    @torch.no_grad()
    def _measure(self, sums: dict[str, PooledSum], found: dict[str, float], scored: Scored, inputs: Batch) -> None:
        """Keep what a micro-batch measured, ours as sums and TRL's as numbers, until the next line of the log."""
        count = sums["nonfinite_fraction"].denominator
        if scored.silent is not None or self.accelerator.num_processes > 1:  # on every process, or on none
            silent = count.new_zeros(()) if scored.silent is None else scored.silent.any().to(count.dtype)
            sums = sums | {"silenced": PooledSum(silent, count)}
        if self.objective.ratio_level == "sequence":
            mask = mask_of(inputs)
            rows = count.new_full((), float(len(mask)))
            sums = sums | {"sequences": PooledSum((mask != 0).any(1).sum(), rows)}
        train = self.model.training
        if train and self._radius is not None:
            self.current_log["band/radius"].append(self._radius_in_use)
        if train and self._penalty is not None:
            self.current_log["band/kl_penalty"].append(self._penalty.rule.value)
        self._wait(Measured(sums, functools.partial(self._add, self._mode, found, self._radius_in_use)))

    def _add(self, mode: Mode, trls: Mapping[str, float], radius: float, found: dict[str, Total]) -> None:
        """Add the totals of a micro-batch, and TRL's numbers for it, to what is pooled for the log."""
        pooled = self._pooled[mode]
        silenced, sequences = found.pop("silenced", None), found.pop("sequences", None)
        for name, total in found.items():
            if name not in _CLIP_NAMES:
                pooled.put(name, total)
        tokens = found["nonfinite_fraction"].denominator
        for name in ("kl", "entropy"):
            if name in trls and name not in found:  # with another KL, ours
                pooled.put(name, Total(trls[name] * tokens, tokens))
        if self._strategy.replaces_loss or (
            silenced is not None and silenced.numerator > 0
        ):  # TRL has counted clips for advantages of 0
            for ours, theirs in _CLIP_NAMES.items():
                # Without a number of ours it is not known which gradients the surrogate takes away; TRL has extremes too.
                if ours in found and theirs in trls:
                    pooled.put(theirs, found[ours])
        else:
            _put_clip_metrics(pooled, trls, tokens, sequences)
        self._tell_nonfinite(found["nonfinite_fraction"])
        if mode == "train" and self._radius is not None:
            self._radius.measure(found, radius)
        if mode == "train" and self._penalty is not None:
            self._penalty.measure(found)

    def _settle(self, mode: Mode) -> None:
        super()._settle(mode)
        # The effective sample size is no mean itself; it is made from two pooled means.
        log = self._metrics[mode]
        means = [log.get(f"correction/weight_{name}") for name in ("mean", "square_mean")]
        if all(means):
            log[EFFECTIVE_SAMPLE_SIZE] = [effective_size(*(values[0] for values in means if values))]

    def _tell_nonfinite(self, share: Total) -> None:
        if share.numerator and not self._told_nonfinite:
            self._told_nonfinite = True
            self._tell(
                f"{share.numerator:.0f} of {share.denominator:.0f} valid tokens of a batch have a log-probability or an "
                "advantage that is NaN or infinite. They are left out of the loss; nonfinite_fraction in the log counts them. "
                "Look at the model's logits, at the sampler's log-probs and at the rewards"
            )

    # ---- checkpoints

    def state_to_keep(self) -> dict[str, Any]:
        # TRL alone forgets the rollout that is being reused; a resumed run would continue with another one.
        return {
            **super().state_to_keep(),
            "objective": self._kept.state_dict(),
            "step": self._step,
            "rollout": self._buffered_inputs,
            "signal": self._signal.state_dict(),
            "pruning": self._pruned.prune.state_dict() if self._pruned is not None else {},
            "drawn": self._refill.drawn if self._refill is not None else 0,
            **(self._radius.state_dict() if self._radius is not None else {}),
            **(self._penalty.state_dict() if self._penalty is not None else {}),
        }

    def take_state(self, state: dict[str, Any]) -> None:
        step, rollout = state["step"], state["rollout"]
        if type(step) is not int or not _is_rollout(rollout):
            raise ValueError("the rollout in use is not as it was saved")
        self._tell(self._kept.changed_since(state.get("objective"), rollout is not None))
        super().take_state(state)
        self._step, self._buffered_inputs = step, rollout
        self._signal.load_state_dict(state["signal"])
        if self._pruned is not None:
            self._pruned.prune.load_state_dict(state["pruning"])
        if self._refill is not None:
            self._refill.drawn = state["drawn"]
        if self._radius is not None:
            self._radius.load_state_dict(state)
        if self._penalty is not None:
            self.objective = self.objective.with_penalty(self._penalty.load_state_dict(state))


_CLIP_NAMES = {ours: theirs for ours, theirs in metrics_of("TRL").items() if theirs.startswith("clip_ratio/")}
_CLIP_EXTREMES: dict[str, Literal["min", "max"]] = {"clip_ratio/low_min": "min", "clip_ratio/high_max": "max"}
_FROM_TRL = ("entropy", "kl", "policy_loss", *_CLIP_NAMES.values(), *_CLIP_EXTREMES)
"""What TRL's loss logs for each micro-batch and the trainer pools or changes."""


def _put_clip_metrics(pooled: PooledLog, trls: Mapping[str, float], tokens: float, sequences: Total | None) -> None:
    """Pool TRL's clip metrics, which are means over the tokens or the sequences of a micro-batch, and their extremes."""
    weight, count = (tokens, tokens) if sequences is None else (sequences.denominator, sequences.numerator)
    for theirs in _CLIP_NAMES.values():
        if theirs in trls:
            pooled.put(theirs, Total(trls[theirs] * weight, count))
    for theirs, kind in _CLIP_EXTREMES.items():
        if theirs in trls:
            pooled.put(theirs, Total(trls[theirs], tokens, kind))


def _is_rollout(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and all(isinstance(part, dict) for part in cast("list[object]", value))


def _of_the_card(objective: Objective) -> tuple[str, dict[str, str]]:
    """The method and its paper as TRL writes them into the card of a model: BandPO's only where the objective is BandPO's."""
    if citation.ARXIV in objective.paper:
        return BandGRPOTrainer._name, BandGRPOTrainer._paper  # pyright: ignore[reportPrivateUsage]
    found = re.search(r"arXiv:(\d{4}\.\d{5})", objective.paper)
    paper = {"title": objective.paper, "id": found[1]} if found else {}
    return f"the objective {objective.name!r} of bandpo", paper
