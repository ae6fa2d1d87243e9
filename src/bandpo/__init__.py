"""bandpo: trust regions for LLM reinforcement learning, as `bounds x surrogate x aggregation`.

The names below are imported on first use, so that `bandpo --help` does not wait for torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bandpo._inputs import needs as needs
    from bandpo.advantages import group_advantages as group_advantages
    from bandpo.bounds import DCPO as DCPO
    from bandpo.bounds import Band as Band
    from bandpo.bounds import Clip as Clip
    from bandpo.bounds import RatioBounds as RatioBounds
    from bandpo.bounds import in_band as in_band
    from bandpo.bounds import ratio_bounds as ratio_bounds
    from bandpo.calibration import clip_fraction as clip_fraction
    from bandpo.calibration import match_radius as match_radius
    from bandpo.calibration import radius_for as radius_for
    from bandpo.composition import Objective as Objective
    from bandpo.divergences import CHI2 as CHI2
    from bandpo.divergences import DIVERGENCES as DIVERGENCES
    from bandpo.divergences import HELLINGER as HELLINGER
    from bandpo.divergences import JEFFREYS as JEFFREYS
    from bandpo.divergences import JS as JS
    from bandpo.divergences import KL as KL
    from bandpo.divergences import LE_CAM as LE_CAM
    from bandpo.divergences import NEYMAN as NEYMAN
    from bandpo.divergences import REVERSE_KL as REVERSE_KL
    from bandpo.divergences import TV as TV
    from bandpo.divergences import FDivergence as FDivergence
    from bandpo.divergences import alpha as alpha
    from bandpo.divergences import binary_divergence as binary_divergence
    from bandpo.logprobs import TokenLogprobs as TokenLogprobs
    from bandpo.logprobs import token_logprobs as token_logprobs
    from bandpo.losses import aggregate as aggregate
    from bandpo.losses import compile as compile
    from bandpo.losses import loss_normalizer as loss_normalizer
    from bandpo.losses import policy_loss as policy_loss
    from bandpo.metrics import approx_kl as approx_kl
    from bandpo.metrics import pass_at_k as pass_at_k
    from bandpo.metrics import policy_metrics as policy_metrics
    from bandpo.objectives import OBJECTIVES as OBJECTIVES
    from bandpo.tokens import TokenObjective as TokenObjective
    from bandpo.tokens import gradient_weight as gradient_weight
    from bandpo.tokens import sequence_log_ratio as sequence_log_ratio
    from bandpo.tokens import token_objective as token_objective

__version__ = "0.1.0"

_HOME = {
    "_inputs": ["needs"],
    "advantages": ["group_advantages"],
    "bounds": ["Band", "Clip", "DCPO", "RatioBounds", "in_band", "ratio_bounds"],
    "calibration": ["clip_fraction", "match_radius", "radius_for"],
    "composition": ["Objective"],
    "divergences": [
        *("KL", "REVERSE_KL", "TV", "CHI2", "NEYMAN", "HELLINGER", "LE_CAM", "JS", "JEFFREYS"),
        *("DIVERGENCES", "FDivergence", "alpha", "binary_divergence"),
    ],
    "logprobs": ["TokenLogprobs", "token_logprobs"],
    "losses": ["aggregate", "compile", "loss_normalizer", "policy_loss"],
    "metrics": ["approx_kl", "pass_at_k", "policy_metrics"],
    "objectives": ["OBJECTIVES"],
    "tokens": ["TokenObjective", "gradient_weight", "sequence_log_ratio", "token_objective"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_SUBMODULES = (
    *(name for name in _HOME if not name.startswith("_")),
    *(
        "corrections",
        "doctor",
        "groups",
        "preference",
        "regions",
        "schedules",
        "selection",
        "sequence_surrogates",
        "surrogates",
        "testing",
    ),
)

__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(_import_module(f"bandpo.{_MODULE_OF[name]}"), name)
    if name in _SUBMODULES:
        return _import_module(f"bandpo.{name}")
    raise AttributeError(f"module 'bandpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
