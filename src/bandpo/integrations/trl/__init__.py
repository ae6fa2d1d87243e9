"""bandpo in TRL: GRPO with the trust region of any objective, offline and online preference learning.

The names are imported on first use, because the doctor reads configurations of the trainer without loading TRL's trainer.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bandpo.integrations.trl.config import BandGRPOConfig as BandGRPOConfig
    from bandpo.integrations.trl.doctor import DoctorCallback as DoctorCallback
    from bandpo.integrations.trl.dpo import BandDPOConfig as BandDPOConfig
    from bandpo.integrations.trl.dpo import BandDPOTrainer as BandDPOTrainer
    from bandpo.integrations.trl.grpo import BandGRPOTrainer as BandGRPOTrainer
    from bandpo.integrations.trl.online import OnlinePreferenceConfig as OnlinePreferenceConfig
    from bandpo.integrations.trl.online import OnlinePreferenceTrainer as OnlinePreferenceTrainer

_MODULE_OF = {
    "BandDPOConfig": "dpo",
    "BandDPOTrainer": "dpo",
    "BandGRPOConfig": "config",
    "BandGRPOTrainer": "grpo",
    "DoctorCallback": "doctor",
    "OnlinePreferenceConfig": "online",
    "OnlinePreferenceTrainer": "online",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'bandpo.integrations.trl' has no attribute {name!r}")
    return getattr(_import_module(f"bandpo.integrations.trl.{_MODULE_OF[name]}"), name)
