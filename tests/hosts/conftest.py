"""Tests inside the hosts' own code: `make test-hosts` runs each file in a process of its own, see run.py.

BANDPO_HOST names the folder with the host's wheel or source. Without it, as in the main suite, only what needs no host runs.
"""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("BANDPO_METRICS", "full")
HERE = Path(__file__).parent
HOST = os.environ.get("BANDPO_HOST")
sys.path.insert(0, str(HERE))
if HOST:
    sys.path.insert(0, HOST)
else:
    collect_ignore_glob = ["in_*.py"]


@pytest.fixture(scope="session")
def host_root():
    return Path(HOST)
