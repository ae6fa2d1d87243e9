"""Does the trust region act, and does the run look well? Rules over a configuration, a log of metrics, or a batch.

Each rule gives a `Finding` with what was seen, its cause and the knob. `examine` takes whatever there is, `Doctor` watches a
run while it trains, and `bandpo doctor` reads files and prints the findings. The names are imported on first use:
`bandpo doctor --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bandpo.doctor.batch import examine_batch
    from bandpo.doctor.entry import examine
    from bandpo.doctor.noise import Noise, noise
    from bandpo.doctor.rules import examine_setup
    from bandpo.doctor.scoring import examine_model, measure_noise
    from bandpo.doctor.setup import Setup
    from bandpo.doctor.truncation import Truncation, kept_mass
    from bandpo.monitoring.findings import Finding
    from bandpo.monitoring.live import Doctor, Told
    from bandpo.monitoring.symptoms import examine_log

__all__ = [
    "Doctor",
    "Finding",
    "Noise",
    "Setup",
    "Told",
    "Truncation",
    "examine",
    "examine_batch",
    "examine_log",
    "examine_model",
    "examine_setup",
    "kept_mass",
    "measure_noise",
    "noise",
]

_MODULES = {
    "Doctor": "monitoring.live",
    "Finding": "monitoring.findings",
    "Noise": "doctor.noise",
    "Setup": "doctor.setup",
    "Told": "monitoring.live",
    "Truncation": "doctor.truncation",
    "examine": "doctor.entry",
    "examine_batch": "doctor.batch",
    "examine_log": "monitoring.symptoms",
    "examine_model": "doctor.scoring",
    "examine_setup": "doctor.rules",
    "kept_mass": "doctor.truncation",
    "measure_noise": "doctor.scoring",
    "noise": "doctor.noise",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"bandpo.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bandpo.doctor' has no attribute {name!r}")
