"""The records of signatures.toml, and where the tests find a host: its public source if there is one, else a stand-in.

`BANDPO_SOURCE=/path/to/slime python -m pytest tests/hosts/test_slime.py` runs the same tests inside the host's own source, as
was done on the day that a record says.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import tomllib
from isolation import stub, without_init

RECORDS = tomllib.loads((Path(__file__).parent / "signatures.toml").read_text())
SOURCE = os.environ.get("BANDPO_SOURCE")


def own_source(root, packages, stubs):
    """Make a checkout importable without its heavy parts."""
    sys.path.insert(0, root)
    without_init(root, *packages)
    stub(*stubs)


def modules(monkeypatch, **contents):
    """Stand-in modules for one test: `a__b__c={...}` is `a.b.c`."""
    for path, values in contents.items():
        names = path.split("__")
        for i in range(1, len(names) + 1):
            name = ".".join(names[:i])
            if name not in sys.modules:
                module = ModuleType(name)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, name, module)
                if i > 1:
                    monkeypatch.setattr(sys.modules[".".join(names[: i - 1])], names[i - 1], module, raising=False)
        for key, value in values.items():
            monkeypatch.setattr(sys.modules[name], key, value, raising=False)
    return importlib.import_module(name)
