"""Settings of the whole suite."""

import gc
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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """With several workers the slow tests come first: at the end none waits for a long test of another."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """A million objects of collected tests and imported libraries live to the end: no search for garbage visits them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Libraries complain of what nobody frees at the end."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory, request):
    """All tests of all workers find warmed-up models in one cache, which is not the user's; its locks let them share it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BANDPO_CACHE", str(folder))
        yield


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests(monkeypatch):
    """What one test gives as a secret must not be hidden in what another one writes."""
    monkeypatch.setattr("bandpo._system.secrets._remembered", set())
