"""The trust regions in ms-swift's GRPO, by a plug-in file.

    # bandpo_plugin.py
    from bandpo.integrations.ms_swift import register

    register("bandpo-kl", radius=0.05)

    swift rlhf --rlhf_type grpo --external_plugins bandpo_plugin.py ...  # and every other option as before

The trainer is ms-swift's `GRPOTrainer`, whose clip is given the interval of each token; everything around it is inherited,
including `loss_type` (grpo, bnpo, dapo or dr_grpo) and `delta`. Only objectives that clip single tokens can be used; ms-swift
has GSPO, CISPO and SAPO of its own. `megatron rlhf` has another trainer, which this does not change.
"""

import importlib
from typing import Any

from bandpo._inputs import fill
from bandpo.bounds import RatioBounds
from bandpo.integrations._host import attributes, check_host_kl, host_objective, refuse_ignored
from bandpo.objective import Objective
from bandpo.surrogates import clip

_DEFAULTS = {"epsilon": 0.2, "epsilon_high": None, "importance_sampling_level": "token", "use_liger_kernel": False}
_LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
_registered: list[Objective] = []


def register(objective: Objective | str = "bandpo-kl", **options: Any) -> None:
    """Make `swift rlhf --rlhf_type grpo` train with the objective's trust region; call it in a file of `--external_plugins`.

    Args:
        objective: A name of `bandpo objectives`, "package.module:NAME", or an `Objective`.
        options: Changes of the objective's region: fields of `RegionOptions`, except `divergence_top_k`.

    Raises:
        ValueError: If an option would be ignored, or ms-swift's trainer cannot express the objective.
    """
    from swift.trainers import TrainerFactory

    chosen = host_objective("ms-swift", objective, options, sampler="none", kl="")
    if chosen.surrogate is not clip or chosen.ratio_level != "token" or chosen.bounds_inputs:
        raise ValueError(
            f"ms-swift: objective {chosen.name!r} does not clip single tokens, and this trainer can do nothing else; choose "
            "bandpo-kl, bandpo-tv, bandpo-chi2, dcpo, grpo or dapo, or ms-swift's own loss_type"
        )
    if chosen.filters:
        raise ValueError(
            f"ms-swift: objective {chosen.name!r} has a filter, which this trainer would ignore: it takes our bounds and "
            "does the rest itself; use ms-swift's --off_policy_sequence_mask_delta, or an objective without a filter"
        )
    _registered[:] = [chosen]
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.BandGRPOTrainer"


class _IntervalOfEachToken:
    """The methods that are put before those of ms-swift's trainer."""

    args: Any
    loss_type: str
    beta: float
    kl_in_reward: bool
    epsilon_low: Any
    epsilon_high: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refuse_ignored()

    def refuse_ignored(self) -> None:
        """Refuse options of ms-swift that the registered objective would ignore.

        Raises:
            ValueError: If there is such an option.
        """
        refuse_ignored("ms-swift", attributes(self.args, _DEFAULTS), _DEFAULTS)
        objective = _registered[0]
        in_loss = 0.0 if self.kl_in_reward else self.beta
        check_host_kl("ms-swift", objective, in_loss, f"--beta {objective.kl_coef:g} --kl_in_reward false")
        if self.loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"ms-swift: loss_type={self.loss_type!r} is a loss of its own, without bandpo; choose one of "
                f"{', '.join(_LOSS_TYPES)}"
            )
        if getattr(self, "use_liger_loss", False):
            raise ValueError("ms-swift: the Liger loss clips by two numbers, and bandpo by one interval for each token")

    def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        theirs: Any = super()
        old = grpo_batch.old_per_token_logps
        if old is None:  # the policy is still the old one: every ratio is 1, inside every interval
            return theirs._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        bounds = _registered[0].bounds(fill(old, grpo_batch.completion_mask != 0))
        assert isinstance(bounds, RatioBounds)
        saved = self.epsilon_low, self.epsilon_high
        self.epsilon_low, self.epsilon_high = 1 - bounds.lower, bounds.upper - 1
        try:
            return theirs._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        finally:
            self.epsilon_low, self.epsilon_high = saved


def __getattr__(name: str) -> Any:
    """The trainer, made when ms-swift imports it by path."""
    if name != "BandGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    host = importlib.import_module("swift.rlhf_trainers").GRPOTrainer
    own = {"__module__": __name__, "__doc__": "ms-swift's GRPOTrainer with the interval of each token in its clip."}
    return globals().setdefault(name, type(name, (_IntervalOfEachToken, host), own))
