"""Changes a module of a host in all Ray workers, for hosts that build their loss there and have no hook."""

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from bandpo.integrations._host import ENVIRONMENT, host_objective
from bandpo.integrations.options import HELP, OPTIONS, parse_options


def launch(host: str, target: str, hook: str, check: dict[str, Any], arguments: Sequence[str] | None = None) -> None:
    """Run a host's training module with the loss replaced in this process and in every Ray worker that it starts.

    Args:
        host: Name of the host, for error messages.
        target: The host's module, which is run as by `python -m`.
        hook: "package.module.function" that changes the host's module; every worker calls it when it starts.
        check: Keyword arguments of `host_objective`; they are used to refuse a wrong objective before anything starts.
        arguments: The command line `[--objective NAME] [--radius X] ... -- HOST'S ARGUMENTS`; None for that of the process.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {hook.rpartition('.')[0]}",
        description=f"{host} with a bandpo objective",
        usage="%(prog)s [--objective NAME] [--radius X] [...] -- ARGUMENTS OF THE HOST",
    )
    parser.add_argument(
        "--objective", default="bandpo-kl", help="name (see `bandpo objectives`) or package.module:NAME"
    )
    for name in OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, default=None, help=HELP[name])
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    ours = vars(parser.parse_args(given[:cut]))
    options = parse_options({name: ours[name] for name in OPTIONS})
    host_objective(host, ours["objective"], options, **check)
    os.environ[ENVIRONMENT] = json.dumps({"objective": ours["objective"], **options})
    module, _, function = hook.rpartition(".")
    getattr(importlib.import_module(module), function)()
    carry_to_ray_workers(hook)
    sys.argv = [target, *given[cut + 1 :]]
    runpy.run_module(target, run_name="__main__", alter_sys=True)


def carry_to_ray_workers(hook: str) -> None:
    """Make the host's own `ray.init` call `hook` at the start of each worker.

    Args:
        hook: "package.module.function" to call.

    Raises:
        RuntimeError: If Ray is running already (its workers could not be reached), or the host has a setup hook of its own.
    """
    ray: Any = importlib.import_module("ray")
    if ray.is_initialized():
        raise RuntimeError(
            "Ray is initialised already, so bandpo's loss would not reach its workers; start it before ray.init"
        )
    original = ray.init

    def init(*args: Any, **kwargs: Any) -> Any:
        environment = dict(kwargs.get("runtime_env") or {})
        if environment.get("worker_process_setup_hook") not in (None, hook):
            raise RuntimeError(
                f"runtime_env has a worker_process_setup_hook, {environment['worker_process_setup_hook']!r}; "
                f"call {hook} from it"
            )
        variables = {**environment.get("env_vars", {}), ENVIRONMENT: os.environ.get(ENVIRONMENT, "{}")}
        kwargs["runtime_env"] = {**environment, "env_vars": variables, "worker_process_setup_hook": hook}
        return original(*args, **kwargs)

    ray.init = init


def when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call `change` with a module as soon as it has been imported, or at once if it already is.

    A worker's setup hook must not import the host itself: the import may use a GPU before Ray has assigned one.

    Args:
        name: Full name of the module.
        change: Function to call with the module.
    """
    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, change))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module with the other finders, and calls a function after it has been executed."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute, change = spec.loader.exec_module, self.change

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
