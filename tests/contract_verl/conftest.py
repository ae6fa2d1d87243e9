"""The tests of verl's metrics read all of them; test_verl.py has the basic set."""

import os

os.environ.setdefault("BANDPO_METRICS", "full")
