"""A host's real modules without what they import but do not use in a loss: stubs, and packages without their `__init__`."""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock


class _Stub(ModuleType):
    """A module or package that has whatever name is asked of it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = tuple(names)

    def find_spec(self, fullname, path=None, target=None):
        if any(fullname == n or fullname.startswith(f"{n}.") for n in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        module.__path__ = []


def stub(*names):
    """Make these modules, and all below them, importable and empty."""
    sys.meta_path.insert(0, _StubFinder(names))


def without_init(root, *names):
    """Make these packages importable without running their `__init__`, which pulls in the whole host."""
    for name in names:
        module = ModuleType(name)
        module.__path__ = [str(Path(root) / name.replace(".", "/"))]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
