"""The trust regions in ms-swift's GRPO, by a plug-in file.

    # bandpo_plugin.py
    from bandpo.integrations.ms_swift import register

    register("bandpo-kl", radius=0.05)

    swift rlhf --rlhf_type grpo --external_plugins bandpo_plugin.py ...  # and every other option as before

The trainer is ms-swift's `GRPOTrainer`, whose clip gets the interval of each token; everything around it is inherited,
`loss_type` (grpo, bnpo, dapo or dr_grpo) and `delta` included. Only objectives that clip single tokens fit in; ms-swift has
GSPO, CISPO and SAPO of its own. `megatron rlhf` has another trainer, which this does not change.
"""

import importlib
from typing import Any

from bandpo._inputs import fill
from bandpo.bounds import RatioBounds
from bandpo.integrations._host import attributes, host_objective, refuse_ignored
from bandpo.objective import Objective
from bandpo.surrogates import clip

_DEFAULTS = {"epsilon": 0.2, "epsilon_high": None, "importance_sampling_level": "token", "use_liger_kernel": False}
_LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
_registered: list[Objective] = []


def register(objective: Objective | str = "bandpo-kl", **options: Any) -> None:
    """Make `swift rlhf --rlhf_type grpo` train with the objective's trust region; call it in a file of `--external_plugins`.

    Args:
        objective: A name of `bandpo objectives`, "package.module:NAME", or an `Objective`.
        options: `radius`, `radius_upper`, `divergence`, `max_ratio`, `relax`; `epsilon`, `epsilon_high` of fixed intervals.

    Raises:
        ValueError: If an option would be ignored, or ms-swift's trainer cannot express the objective.
    """
    from swift.trainers import TrainerFactory

    chosen = host_objective("ms-swift", objective, options, sampler="none")
    if chosen.surrogate is not clip or chosen.ratio_level != "token" or chosen.bounds_inputs:
        raise ValueError(
            f"ms-swift: objective {chosen.name!r} is no clip of single tokens, and its trainer can do nothing else; choose "
            "bandpo-kl, bandpo-tv, bandpo-chi2, dcpo, grpo or dapo, or ms-swift's own loss_type"
        )
    _registered[:] = [chosen]
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.BandGRPOTrainer"


def __getattr__(name: str) -> Any:
    """The trainer, made when ms-swift imports it by path."""
    if name != "BandGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    host = importlib.import_module("swift.rlhf_trainers").GRPOTrainer

    class BandGRPOTrainer(host):
        """ms-swift's GRPOTrainer with the interval of each token in its clip."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.refuse_ignored()

        def refuse_ignored(self) -> None:
            refuse_ignored("ms-swift", attributes(self.args, _DEFAULTS), _DEFAULTS)
            if self.loss_type not in _LOSS_TYPES:
                raise ValueError(
                    f"ms-swift: loss_type={self.loss_type!r} is a loss of its own, without bandpo; choose one of "
                    f"{', '.join(_LOSS_TYPES)}"
                )
            if getattr(self, "use_liger_loss", False):
                raise ValueError(
                    "ms-swift: the Liger loss clips by two numbers, and bandpo by one interval for each token"
                )

        def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
            old = grpo_batch.old_per_token_logps
            if old is None:  # the policy is still the old one: every ratio is 1, inside every interval
                return super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
            bounds = _registered[0].bounds(fill(old, grpo_batch.completion_mask != 0))
            assert isinstance(bounds, RatioBounds)
            saved = self.epsilon_low, self.epsilon_high
            self.epsilon_low, self.epsilon_high = 1 - bounds.lower, bounds.upper - 1
            try:
                return super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
            finally:
                self.epsilon_low, self.epsilon_high = saved

    BandGRPOTrainer.__module__ = __name__
    BandGRPOTrainer.__qualname__ = name
    return globals().setdefault(name, BandGRPOTrainer)
