"""`bandpo env`: versions, devices, paths and variables of this machine, as a block to paste into a report.

Nothing heavy is imported: versions come from the metadata of the packages, the build of torch from the text of its
`version.py`, and GPUs from `nvidia-smi`. So the command is fast, and it works where an import of torch would fail.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from bandpo import __version__
from bandpo._system.options import add_examples
from bandpo._system.secrets import is_secret, redact, redact_text
from bandpo._system.supported import HELPERS, HOSTS, PACKAGES, Found, found, installed

SCHEMA = 1
"""Version of the form of `--json`. It rises when a field changes its meaning or is gone; a new field does not raise it."""

_VARIABLES = re.compile(
    r"BANDPO_\w+|(?:CUDA|HIP|ROCR|NVIDIA)_VISIBLE_DEVICES|CUDA_(?:HOME|LAUNCH_BLOCKING)|CUBLAS_WORKSPACE_CONFIG"
    r"|(?:OMP|MKL|OPENBLAS|NUMEXPR)_NUM_THREADS|(?:HF|TRANSFORMERS|TOKENIZERS|ACCELERATE|FSDP)_\w+|PYTORCH_\w+|TORCH\w*_\w+"
    r"|TRITON_\w+|NCCL_\w+|VLLM_\w+|SGLANG_\w+|RAY_\w+|WANDB_\w+|TRACKIO_\w+|(?:LOCAL_|NODE_)?RANK|(?:LOCAL_)?WORLD_SIZE"
    r"|MASTER_(?:ADDR|PORT)|SLURM_(?:JOB_ID|NTASKS|PROCID)|PYTHON(?:PATH|HASHSEED|WARNINGS|UNBUFFERED)|LD_PRELOAD|VIRTUAL_ENV"
    r"|CONDA_PREFIX|XDG_CACHE_HOME|TMPDIR|NO_COLOR|CI"
)
"""Names of variables that change what bandpo, torch or a host does."""
_SHOWN = re.compile(r"-?\d+(?:[.,:]-?\d+)*|true|false|yes|no|on|off|basic|full", re.IGNORECASE)
"""Values that are shown: numbers, switches and levels. Of all others the report only tells that they are set."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_QUERY = ("--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits")
_PATIENCE = 10  # seconds for nvidia-smi, which may wait for a driver that hangs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo env`.

    Args:
        parser: Parser of the command.
    """
    parser.description = (
        "Prints the versions of bandpo and of what it works with, the hosts that are installed, devices, paths, and the names "
        "of environment variables that matter. Values other than numbers and switches are not shown, and secrets never."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_examples(parser, "env            # a block to paste into an issue", "env --json")


def run(options: argparse.Namespace) -> None:
    """Print the report.

    Args:
        options: The options of the command.
    """
    report = environment()
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else as_text(report))


def environment() -> dict[str, Any]:
    """What a reader of a bug report needs, as plain values.

    Returns:
        `schema`, `bandpo`, `python`, `torch`, `packages`, `hosts`, `devices`, `paths` and `variables`. Secrets are hidden, and
        the folder of the user is written `~`.
    """
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "bandpo": {"version": __version__, "installed": installed("bandpo")},
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "platform": platform.platform(),
        },
        "torch": torch_build(),
        "packages": _rows(found(PACKAGES | dict.fromkeys(HELPERS, ()))),
        "hosts": _rows([host for host in found(HOSTS) if host.version is not None]),
        "devices": devices(),
        "paths": {name: _home(str(path)) for name, path in paths().items()},
    }
    return {**redact(report), "variables": variables(os.environ)}


def torch_build() -> dict[str, str | None]:
    """The version of torch with what it was built for (`cuda`, `hip`, `xpu`), read from its files; None for what it lacks."""
    build: dict[str, str | None] = {"version": installed("torch"), "cuda": None, "hip": None, "xpu": None}
    try:
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError, UnicodeDecodeError):
        return build
    for key in ("cuda", "hip", "xpu"):
        match = re.search(rf"^{key}\b[^=\n]*=\s*'([^']+)'", text, re.MULTILINE)
        build[key] = match[1] if match else None
    return build


def devices() -> dict[str, Any]:
    """Processor, cores (of the machine, and those that this process may use), memory in GiB, and GPUs."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        usable = os.cpu_count()
    gpus, remark = _gpus()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "memory_gib": _memory(),
        "gpus": gpus,
        "gpus_remark": remark,
    }


def paths() -> dict[str, Path | str]:
    """Folders: of the package, of Python and its environment, of the caches, and the present one."""
    root = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    try:
        from bandpo._system.cache import cache_root

        cache: Path | str = cache_root()
    except ImportError:  # a core install, which makes no cache
        cache = os.environ.get("BANDPO_CACHE") or "none: platformdirs is not installed ('bandpo[lab]')"
    return {
        "package": Path(__file__).parents[1],
        "python": sys.executable,
        "environment": sys.prefix if sys.prefix != sys.base_prefix else "none: Python's own packages",
        "cache of bandpo": cache,
        "cache of Hugging Face": Path(root),
        "current folder": _current(),
    }


def variables(environ: Any) -> dict[str, str]:
    """The variables that matter, by name: their values where these are numbers or switches, else "set" or "set, but empty".

    Args:
        environ: The environment, as `os.environ`.

    Examples:
        >>> variables({"BANDPO_METRICS": "full", "HF_TOKEN": "1234", "HF_HOME": "/data/hub", "EDITOR": "vi", "CI": ""})
        {'BANDPO_METRICS': 'full', 'CI': 'set, but empty', 'HF_HOME': 'set', 'HF_TOKEN': 'set'}
    """
    shown: dict[str, str] = {}
    for name in sorted(environ):
        if _VARIABLES.fullmatch(name):
            value = environ[name]
            plain = _SHOWN.fullmatch(value) and not is_secret(name)
            shown[name] = value if plain else "set" if value else "set, but empty"
    return shown


def as_text(report: dict[str, Any]) -> str:
    """The report as a block of Markdown.

    Args:
        report: What `environment` returns.
    """
    python, torch, machine = report["python"], report["torch"], report["devices"]
    builds = ", ".join(f"{k} {torch[k]}" for k in ("cuda", "hip", "xpu") if torch[k]) or "CPU only"
    version = report["bandpo"]["version"]
    if (other := report["bandpo"]["installed"]) != version:
        version += f" (the installed distribution is {other or 'none'})"
    head = {"bandpo": version, "python": f"{python['version']}, {python['implementation']}, {python['platform']}"}
    packages = {
        row["name"]: f"{row['version']}{_remark(row, builds if row['name'] == 'torch' else '')}"
        for row in report["packages"]
        if row["version"] is not None
    }
    absent = [row["name"] for row in report["packages"] if row["version"] is None]
    hosts = {row["name"]: f"{row['version']}{_remark(row)}" for row in report["hosts"]}
    cores = f"{machine['cores']} ({machine['usable_cores']} usable)"
    memory = "unknown" if machine["memory_gib"] is None else f"{machine['memory_gib']} GiB"
    gpus = {
        f"GPU {i}": f"{gpu['name']}, {gpu['memory_mib']} MiB, driver {gpu['driver']}, compute capability {gpu['capability']}"
        for i, gpu in enumerate(machine["gpus"])
    }
    hardware = {"processor": machine["processor"], "cores": cores, "memory": memory}
    hardware |= gpus or {"GPUs": machine["gpus_remark"]}
    sections: list[tuple[str, dict[str, str]]] = [
        ("", {**head, **packages, "not installed": ", ".join(absent) or "nothing of the above"}),
        ("hosts", hosts or {"none": "of " + ", ".join(HOSTS)}),
        ("devices", hardware),
        ("paths", report["paths"]),
        ("variables", report["variables"] or {"none": "of those that matter"}),
    ]
    lines: list[str] = []
    for title, rows in sections:
        wide = max(map(len, rows))
        lines += ["", title] if title else []
        lines += [f"{'  ' if title else ''}{key:<{wide}}  {value}" for key, value in rows.items()]
    return "\n".join(["```text", *(redact_text(line) for line in lines), "```"])


def _rows(packages: list[Found]) -> list[dict[str, Any]]:
    return [{**package._asdict(), "tested": list(package.tested), "remark": package.remark} for package in packages]


def _remark(row: dict[str, Any], first: str = "") -> str:
    parts = [part for part in (first, row["remark"]) if part]
    return f" ({'; '.join(parts)})" if parts else ""


def _home(path: str) -> str:
    """A path with `~` for the folder of the user, whose name a report need not tell."""
    home = str(Path.home())
    return f"~{path[len(home) :]}" if home != "/" and (path == home or path.startswith(home + os.sep)) else path


def _current() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it was removed
        return "unknown: the folder does not exist any more"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> float | None:
    """Memory of the machine in GiB, or less where the control group of this process has a lower limit; None if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this platform
        return None
    try:
        limit = _CGROUP.read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    return round(min(total, int(limit) if limit.isdigit() else total) / 2**30, 1)


def _gpus() -> tuple[list[dict[str, str]], str]:
    """The GPUs that `nvidia-smi` lists, and a remark about what is not known."""
    program = shutil.which("nvidia-smi")
    if program is None:
        if platform.system() == "Darwin" and platform.machine() == "arm64":
            return [], "Apple's, which torch uses as `mps`"
        return [], "none found: there is no nvidia-smi (other makers' GPUs are not listed)"
    try:
        done = subprocess.run([program, *_QUERY], capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"unknown: nvidia-smi failed ({type(error).__name__})"
    if done.returncode:
        return [], f"unknown: nvidia-smi failed ({(done.stdout + done.stderr).strip()[:200]})"
    fields = ("name", "memory_mib", "driver", "capability")
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    listed = [cast("dict[str, str]", dict(zip(fields, row, strict=True))) for row in rows if len(row) == len(fields)]
    return listed, "" if listed else "none, says nvidia-smi"
