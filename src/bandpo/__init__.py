"""bandpo: trust regions for LLM reinforcement learning, as `bounds x surrogate x aggregation`.

The public names are listed in `bandpo._public`, and imported on first use, so that `bandpo --help` does not wait for torch.
"""

import sys as _sys
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from bandpo import _deprecations

if TYPE_CHECKING:
    from bandpo._public import *  # noqa: F403

__version__ = "1.0.0rc1"

_sys.meta_path.insert(0, _deprecations.MovedModules())


def __getattr__(name: str) -> object:
    if name == "__all__":
        return __dir__()
    if name.startswith("_"):
        raise AttributeError(f"module 'bandpo' has no attribute {name!r}")
    found = vars(_import_module("bandpo._public")).get(name)
    return _deprecations.moved_name(name) if found is None else found


def __dir__() -> list[str]:
    names = (name for name in vars(_import_module("bandpo._public")) if not name.startswith("_"))
    return [*sorted(names), "__version__"]
