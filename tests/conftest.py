"""Settings of the whole suite."""

import os

from hypothesis import settings

# CI repeats the same examples, so that a red run can be looked into; on a developer's machine each run draws new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
