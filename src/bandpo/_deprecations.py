"""Names that have moved. An old name works until a named release, with one warning; after it, an error names the new one."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")

LAST = "1"
"""The last release in which the old names below work: all of 1.x."""

_INTERNAL = {name: f"_system.{name.removeprefix('_')}" for name in ("_errors", "_files", "_locks", "_secrets")}
_TRL = {
    "trl_online": "trl.online",
    "trl_preference": "trl.dpo",
    "_overrides": "options",
    **{f"_trl_{name}": f"trl.{name}" for name in ("checkpoint", "config", "packing", "rollout", "selection", "signal")},
}
_RUN = ("answers", "config", "data", "evaluate", "folder", "grpo", "preference", "progress", "report", "rewards")

_COMPARISON = (
    *("exact", "figures", "loop", "plan", "problems", "report", "stack", "study", "summary", "sweeps"),
    "warmup",
)
_EXPERIMENTS = ("command", "preference", "preference_figures", "reranking", "selection", "selection_figures", "tabular")

MODULES: dict[str, str] = {
    "advantages": "groups",
    "calibration": "bounds.calibration",
    "composition": "objective",
    "corrections": "surrogates.corrections",
    "doctor.findings": "monitoring.findings",
    "doctor.symptoms": "monitoring.symptoms",
    "integrations.names": "monitoring.names",
    "lab.compare": "lab.comparison.command",
    "lab.models": "toy.models",
    "lab.stats": "statistics",
    "lab.tasks": "toy.tasks",
    "objectives": "zoo",
    "plots_zoo": "plots.zoo",
    "regions": "bounds.regions",
    "run": "train",
    "sequence_surrogates": "surrogates.sequence",
    "tokens": "terms",
    **{f"lab.{name}": f"lab.comparison.{name}" for name in _COMPARISON},
    **{f"lab.{name}": f"lab.experiments.{name}" for name in _EXPERIMENTS},
    **{f"run.{name}": f"train.{name}" for name in (*_RUN, "verification")},
    "run.about": "_system.about",
    "run.commands": "train.evaluate_command",
    "run.compare": "lab.comparison.command",
    "run.compare_report": "lab.comparison.report",
    "run.doctor": "doctor.command",
    "run.lab": "lab.experiments.command",
    "run.tables": "plots.command",
    "run.train": "train.command",
    **{f"integrations.{old}": f"integrations.{new}" for old, new in _TRL.items()},
    **_INTERNAL,  # configurations that are pickled in checkpoints name them
}
"""Old module to new module, both without `bandpo.`."""

NAMES: dict[str, str] = {
    "DIVERGENCES": "divergences.DIVERGENCES",
    "TokenLogprobs": "logprobs.TokenLogprobs",
    "binary_divergence": "divergences.binary_divergence",
    "clip_fraction": "bounds.outside_fraction",
    "compile": "losses.compiled",
    "gradient_weight": "terms.gradient_weight",
    "sequence_log_ratio": "terms.sequence_log_ratio",
}
"""Old name in `bandpo` to its module and name, without `bandpo.`."""

RENAMED_OBJECTIVES: dict[str, tuple[str, str]] = {
    "bapo-reading": ("bapo", "which has the authors' dual clip at 3 besides"),
}
"""Former name of an objective to its name, and what else has changed ("" for nothing)."""

_SUBMODULES = (
    *("bounds", "divergences", "doctor", "groups", "logprobs", "losses", "metrics", "preference", "schedules"),
    *("selection", "surrogates", "testing"),
)
_MOVED_SUBMODULES = (
    *("advantages", "calibration", "composition", "corrections", "objectives", "regions", "sequence_surrogates"),
    "tokens",
)


def warn_moved(old: str, new: str, *, last: str = LAST, version: str | None = None, stacklevel: int = 3) -> None:
    """Warn once for each place that uses an old name, or refuse it after its last release.

    Args:
        old: The old name, in full.
        new: The new one.
        last: The last release in which the old name works, with as many numbers as count: "0.2", or "1" for all of 1.x.
        version: The version of bandpo; by default this one.
        stacklevel: How many frames up the user's line is, as in `warnings.warn`.

    Raises:
        ImportError: If `version` is later than `last`.

    Examples:
        >>> warn_moved("bandpo.tokens", "bandpo.terms", last="0.2", version="0.3.1")
        Traceback (most recent call last):
            ...
        ImportError: bandpo.tokens was removed after bandpo 0.2; use bandpo.terms
    """
    if version is None:
        from bandpo import __version__ as version
    end = tuple(int(number) for number in last.split("."))
    if tuple(int(number) for number in version.split(".")[: len(end)]) > end:
        raise ImportError(f"{old} was removed after bandpo {last}; use {new}")
    warnings.warn(f"{old} is now {new}; the old name works up to bandpo {last}.*", FutureWarning, stacklevel=stacklevel)


def renamed(kind: str, old: str, names: Mapping[str, tuple[str, str]]) -> str:
    """The present name of an entry that has been renamed, with a warning.

    Args:
        kind: What the entry is, for the message.
        old: A key of `names`.
        names: Former name to name, and what else has changed.

    Raises:
        ImportError: If the former name works no longer.
    """
    new, change = names[old]
    warn_moved(f"{kind} {old!r}", f"{new!r}{f', {change}' if change else ''}", stacklevel=4)
    return new


def moved_within(module: str, names: dict[str, str]) -> Callable[[str], object]:
    """A module's `__getattr__` for names that have moved out of it.

    Args:
        module: `__name__` of the module.
        names: Old name to new module and name, without `bandpo.`.

    Examples:
        >>> from bandpo import bounds
        >>> bounds.Elastic  # doctest: +SKIP
        FutureWarning: bandpo.bounds.Elastic is now bandpo.experimental.Elastic; the old name works up to bandpo 1.*
    """

    def find(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_moved(f"{module}.{name}", f"bandpo.{names[name]}")
        home, _, attribute = names[name].rpartition(".")
        return getattr(import_module(f"bandpo.{home}"), attribute)

    return find


def needs(*names: str) -> Callable[[T], T]:
    """The old mark of a component's inputs, without effect: keyword-only parameters without a default are the inputs.

    Args:
        *names: Not used.
    """
    del names
    warn_moved("@needs(...)", "a keyword-only parameter without a default, and no mark")
    return lambda component: component


def moved_name(name: str) -> object:
    """What an old name of the package `bandpo` stands for.

    Raises:
        AttributeError: If there never was such a name.
    """
    if name == "needs":
        return needs
    if name in NAMES:
        module, _, attribute = NAMES[name].rpartition(".")
        warn_moved(f"bandpo.{name}", f"bandpo.{NAMES[name]}", stacklevel=4)
        return getattr(import_module(f"bandpo.{module}"), attribute)
    if name in _SUBMODULES and not _is_from_import():
        warn_moved(f"bandpo.{name} without an import", f"import bandpo.{name}", stacklevel=4)
        return import_module(f"bandpo.{name}")
    if name in _MOVED_SUBMODULES and not _is_from_import():
        warn_moved(f"bandpo.{name}", f"bandpo.{MODULES[name]}", stacklevel=4)
        return import_module(f"bandpo.{MODULES[name]}")
    raise AttributeError(f"module 'bandpo' has no attribute {name!r}")


class MovedModules(MetaPathFinder, Loader):
    """Finds modules of the package under their old names, and gives the very same module object."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "bandpo" and name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"bandpo.{MODULES[spec.name.partition('.')[2]]}"
        warn_moved(spec.name, new, stacklevel=3)  # frames of the import system do not count
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put the old name's specification there.
        module.__spec__ = module.__spec__.loader_state if module.__spec__ else None


def _is_from_import() -> bool:
    """Whether `from bandpo import name` asks, which finds a submodule without our help."""
    from inspect import currentframe

    frame = currentframe()
    for _ in range(3):  # moved_name, bandpo.__getattr__, and what called it
        frame = frame.f_back if frame else None
    return frame is not None and frame.f_code.co_name == "_handle_fromlist"
