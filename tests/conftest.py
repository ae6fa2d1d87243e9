"""Settings of the whole suite."""

import os

import pytest
import torch
from hypothesis import settings

# Two contended threads make small tensors fifty times slower than one, and two workers share two cores.
torch.set_num_threads(1)

# CI repeats the same examples, so that a red run can be looked into, and judges no example by its time, which other processes
# share; on a developer's machine each run draws new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests(monkeypatch):
    """What one test gives as a secret must not be hidden in what another one writes."""
    monkeypatch.setattr("bandpo._system.secrets._remembered", set())
