"""Does the trust region act, and does the run look well? Rules over a configuration, a log of metrics, or a batch.

Each rule gives a `Finding` with what was seen, its cause and the knob. `bandpo doctor` reads the files and prints them.
"""

from bandpo.doctor.batch import examine_batch
from bandpo.doctor.findings import Finding
from bandpo.doctor.rules import examine_setup
from bandpo.doctor.setup import Setup
from bandpo.doctor.symptoms import examine_log

__all__ = ["Finding", "Setup", "examine_batch", "examine_log", "examine_setup"]
