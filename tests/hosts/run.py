"""Install the wheels of wheels.toml and run each host's tests in a process of its own: `make test-hosts`.

    python tests/hosts/run.py [--only skyrl] [--into .hosts] [--main .venv/bin/python] [--verl .venv-verl/bin/python]

A wheel is installed once, without its dependencies. Where the registry cannot be reached its tests are skipped, and said so.
`--newest` takes the newest release of each host in place of the versions of wheels.toml, to see what has changed there.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
UNREACHABLE = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ProxyError", "Read timed out")


def install(wheel, folder, python):
    """Put a wheel and what it lacks into the folder; the reason where the registry does not answer."""
    done = folder / ".installed"
    wanted = [wheel["requirement"], *wheel.get("also", [])]
    if done.exists() and done.read_text().split() == wanted:
        return None
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile",
               "--ignore-requires-python", "--upgrade", "--target", folder, *wanted]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        if any(word in found.stderr for word in UNREACHABLE):
            return "the package registry cannot be reached"
        raise RuntimeError(f"{wheel['requirement']}: {found.stderr.strip()}")
    done.write_text("\n".join(wanted))
    return None


def newest(wheels, python):
    """One wheel for each host, of its newest release."""
    found = {}
    for wheel in wheels:
        name = wheel["requirement"].partition("==")[0]
        if name in found:
            continue
        command = [python, "-m", "pip", "index", "versions", "--disable-pip-version-check",
                   "--ignore-requires-python", name]  # fmt: skip
        said = subprocess.run(command, capture_output=True, text=True)
        version = re.match(r"\S+ \(([^)]+)\)", said.stdout)
        if version is None:
            raise RuntimeError(f"the newest version of {name} is not known: {said.stderr.strip()[-500:]}")
        found[name] = {**wheel, "requirement": f"{name}=={version[1]}"}
    return list(found.values())


def run(wheel, options):
    """The outcome of one host: its name, the exit code, and what pytest printed."""
    name = wheel["requirement"].replace("==", " ")
    python = {"main": options.main, "verl": options.verl}[wheel["environment"]]
    folder = options.into / wheel["requirement"].replace("==", "-")
    skipped = install(wheel, folder, options.main)
    if skipped:
        return name, 0, f"SKIPPED: {skipped}\n"
    command = [python, "-m", "pytest", HERE / wheel.get("tests", f"in_{wheel['host']}.py"), "-q", "-p", "no:cacheprovider",
               "-o", "filterwarnings=default", "-o", "addopts=--import-mode=importlib -ra", "--disable-warnings",
               *options.pytest]  # fmt: skip
    environment = {**os.environ, "BANDPO_HOST": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    return name, found.returncode, found.stdout + (found.stderr if found.returncode else "")


def run_contract_verl(options):
    """The outcome of the contract tests with verl, in its own environment; `make test-verl` runs them alone."""
    command = [options.verl, "-m", "pytest", HERE.parent / "contract_verl", "-q", "-p", "no:cacheprovider",
               "-o", "filterwarnings=default", *options.pytest]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True)
    return "verl (contract)", found.returncode, found.stdout + (found.stderr if found.returncode else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a host; may be repeated")
    parser.add_argument("--into", type=Path, default=Path(".hosts"))
    parser.add_argument("--main", default=sys.executable)
    parser.add_argument("--verl", default=".venv-verl/bin/python")
    parser.add_argument("--newest", action="store_true", help="the newest release of each host")
    parser.add_argument("--contract-verl", action="store_true", help="run tests/contract_verl beside the hosts' tests")
    options, options.pytest = parser.parse_known_args()
    options.into = options.into.resolve()
    wheels = tomllib.loads((HERE / "wheels.toml").read_text())["wheel"]
    wheels = [w for w in wheels if not options.only or w["host"] in options.only]
    wheels = newest(wheels, options.main) if options.newest else wheels
    jobs = [partial(run, wheel, options) for wheel in wheels]
    if options.contract_verl:
        jobs.insert(0, partial(run_contract_verl, options))  # the longest of all comes first
    failed = []
    with ThreadPoolExecutor(2) as pool:
        for name, code, text in pool.map(lambda job: job(), jobs):
            print(f"{name}: {'FAILED' if code else text.strip().splitlines()[-1]}", flush=True)
            if code:
                print(text)
                failed.append(name)
    sys.exit(f"tests against these hosts failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
