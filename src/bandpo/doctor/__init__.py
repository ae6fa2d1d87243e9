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
    from bandpo.doctor.findings import Finding
    from bandpo.doctor.live import Doctor, Told
    from bandpo.doctor.rules import examine_setup
    from bandpo.doctor.setup import Setup
    from bandpo.doctor.symptoms import examine_log

__all__ = ["Doctor", "Finding", "Setup", "Told", "examine", "examine_batch", "examine_log", "examine_setup"]

_MODULES = {
    "Doctor": "live",
    "Finding": "findings",
    "Setup": "setup",
    "Told": "live",
    "examine": "entry",
    "examine_batch": "batch",
    "examine_log": "symptoms",
    "examine_setup": "rules",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"bandpo.doctor.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bandpo.doctor' has no attribute {name!r}")
