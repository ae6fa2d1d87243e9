"""Builds the wheel and the sdist, checks what is in them, and uses the wheel as a stranger would: `python tools/packages.py`.

1. The sdist is built from this folder, and the wheel from the sdist.
2. Their content: every file of `src/bandpo` that git knows, licence and notice, and nothing else; the metadata.
3. Core: the wheel in an environment of its own, where pip brings torch and what torch needs. The loss, `bandpo bounds`,
   `bandpo doctor` on a log, `bandpo env` and `bandpo recipes` run there.
4. Lab: `bandpo[lab]` from the wheel; `bandpo train --max_steps 4` runs in an empty folder.

The environments are made in a temporary folder. With `--reuse` that of the lab sees the packages of the Python that runs
this script, so that pip has nothing to download; bandpo itself comes from the wheel there too. Needs a package registry.
"""

import argparse
import email.parser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE = (
    *("LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"),
    *("tools/addresses.toml", "tools/hatch_metadata.py"),  # what the build itself runs and reads
)
"""What the sdist has beside `src/bandpo`."""
KINDS = {
    "the mark of a typed package": r"bandpo/py\.typed",
    "recipes": r"bandpo/recipes/(trl/paper\.yaml|verl/train\.sh|verl/config/method/\S+\.yaml)",
    "configurations": r"bandpo/configs/\S+\.yaml",
    "templates": r"bandpo/(_system|train|doctor|lab/comparison)/templates/\S+",
    "the protocol of the evidence": r"bandpo/lab/evidence/protocol\.yaml",
    "the table of options": r"bandpo/train/options\.json",
    "the schema of findings": r"bandpo/doctor/findings\.schema\.json",
    "the kernel": r"bandpo/surrogates/kernel\.py",
}
"""What a wheel must have at least, as patterns of its files; a rename in the source must not pass unseen."""
FOREIGN = (
    r"(^|/)(tests?|runs|docs|benchmarks|tools|examples|site|\.\w+|__pycache__)(/|$)|\.(pyc|safetensors|pt|whl|log)$"
)
"""What belongs to no package."""
LOSS = """
import sys, torch, bandpo
from bandpo import group_advantages, policy_loss
torch.manual_seed(0)
old = torch.randn(16, 5).sub(3)
logprobs = (old + 0.1 * torch.randn(16, 5)).requires_grad_()
advantages = group_advantages(torch.tensor([0.0, 1.0] * 8), group_size=8)
loss, metrics = policy_loss(logprobs=logprobs, old_logprobs=old, advantages=advantages, mask=torch.ones(16, 5))
loss.backward()
assert loss.isfinite() and logprobs.grad.abs().sum() > 0 and "clip_fraction/any" in metrics, (loss, metrics)
assert not {"transformers", "matplotlib", "yaml", "rich"} & set(sys.modules)
print(bandpo.__file__)
"""


class Fault(Exception):
    """Something that a package must not be."""


def tracked(root: Path = ROOT) -> set[str]:
    """The files of `src/bandpo` that git knows, as paths of a wheel."""
    command = ["git", "-C", str(root), "ls-files", "src/bandpo"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.removeprefix("src/") for line in lines if (root / line).exists()}


def faults_of_wheel(names: Iterable[str], expected: set[str], version: str) -> list[str]:
    """What is wrong with the files of a wheel.

    Args:
        names: The files in it.
        expected: The files of the source.
        version: The version.
    """
    info = f"bandpo-{version}.dist-info"
    found = {name for name in names if not name.endswith("/")}
    about = {name.removeprefix(f"{info}/") for name in found if name.startswith(f"{info}/")}
    code = {name for name in found if not name.startswith(f"{info}/")}
    wrong = [f"the wheel lacks {name}" for name in sorted(expected - code)]
    wrong += [f"the wheel has {name}, which git does not know in src" for name in sorted(code - expected)]
    wrong += [f"the wheel has {name}, which belongs to no package" for name in sorted(code) if re.search(FOREIGN, name)]
    wrong += [
        f"the wheel lacks {what}" for what, pattern in KINDS.items() if not any(re.fullmatch(pattern, n) for n in code)
    ]
    needed = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
    return wrong + [f"the wheel lacks {info}/{name}" for name in needed if name not in about]


def faults_of_sdist(names: Iterable[str], expected: set[str], version: str) -> list[str]:
    """What is wrong with the files of an sdist.

    Args:
        names: The files in it.
        expected: The files of the source, as paths of a wheel.
        version: The version.
    """
    top = f"bandpo-{version}/"
    outside = [f"the sdist has {name}, which is not below {top}" for name in sorted(names) if not name.startswith(top)]
    found = {name.removeprefix(top) for name in names if name.startswith(top)} - {"PKG-INFO", ".gitignore"}
    wanted = {f"src/{name}" for name in expected} | {*BESIDE}
    wrong = [f"the sdist lacks {name}" for name in sorted(wanted - found)]
    return outside + wrong + [f"the sdist has {name}, which belongs to no package" for name in sorted(found - wanted)]


def faults_of_metadata(text: str, version: str) -> list[str]:
    """What is wrong with the metadata of a wheel.

    Args:
        text: Its file METADATA.
        version: The version.
    """
    about = email.parser.Parser().parsestr(text)
    required = about.get_all("Requires-Dist") or []
    core = [line for line in required if "extra ==" not in line]
    wrong = [] if about["Version"] == version else [f"the version is {about['Version']}, and the source has {version}"]
    if [re.split(r"[ <>=!~;\[]", line)[0] for line in core] != ["torch"]:
        wrong.append(f"without an extra the package must need torch alone; it needs {', '.join(core) or 'nothing'}")
    extras = set(about.get_all("Provides-Extra") or [])
    wrong += [f"the extra {name} is missing" for name in sorted({"trl", "plot", "lab", "verl"} - extras)]
    if about["Requires-Python"] != ">=3.10":
        wrong.append(f"Requires-Python is {about['Requires-Python']}, expected >=3.10")
    if about["License-Expression"] != "Apache-2.0":
        wrong.append(f"License-Expression is {about['License-Expression']}, expected Apache-2.0")
    return wrong


def source_version(root: Path = ROOT) -> str:
    """The version that `src/bandpo/__init__.py` has, the one place of it."""
    match = re.search(
        r'^__version__ = "([^"]+)"$', (root / "src/bandpo/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    if match is None:
        raise Fault('src/bandpo/__init__.py has no line __version__ = "..."')
    return match[1]


def build(out: Path, work: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it.

    Args:
        out: Folder for both.
        work: Folder for the environment of the build.

    Returns:
        The wheel and the sdist.
    """
    python = environment(work / "build")
    pip(python, "build", "hatchling")
    run([python, "-m", "build", "--no-isolation", "--outdir", out, ROOT], cwd=work)
    version = source_version()
    wheel, sdist = out / f"bandpo-{version}-py3-none-any.whl", out / f"bandpo-{version}.tar.gz"
    for path in (wheel, sdist):
        if not path.exists():
            raise Fault(f"the build made no {path.name}; there are: {', '.join(p.name for p in sorted(out.iterdir()))}")
    return wheel, sdist


def check_content(wheel: Path, sdist: Path) -> None:
    """Raise `Fault` if a package has something that it must not have, or lacks something."""
    version, expected = source_version(), tracked()
    with zipfile.ZipFile(wheel) as found:
        wrong = faults_of_wheel(found.namelist(), expected, version)
        metadata = f"bandpo-{version}.dist-info/METADATA"
        if metadata in found.namelist():
            wrong += faults_of_metadata(found.read(metadata).decode(), version)
    with tarfile.open(sdist) as opened:
        wrong += faults_of_sdist([m.name for m in opened.getmembers() if m.isfile()], expected, version)
    if wrong:
        raise Fault("\n".join(wrong))
    print(
        f"   {len(expected)} files; wheel {wheel.stat().st_size / 1e6:.1f} MB, sdist {sdist.stat().st_size / 1e6:.1f} MB"
    )


def try_core(wheel: Path, work: Path, constraints: Path) -> None:
    """Install the wheel alone, and run what needs torch only.

    Args:
        wheel: The wheel.
        constraints: File with the versions to install.
        work: Folder for the environment, outside of the repository.
    """
    python = environment(work / "core")
    pip(python, "-c", constraints, "torch")  # first, by this version: see the Makefile
    pip(python, "-c", constraints, wheel)
    place = work / "core-runs"
    place.mkdir()
    where = run([python, "-c", LOSS], cwd=place).splitlines()[0]  # torch warns that there is no numpy
    if not Path(where).is_relative_to(work / "core"):
        raise Fault(f"bandpo was imported from {where}, which is not the installed wheel")
    bandpo = python.parent / "bandpo"
    expect(run([bandpo, "--version"], cwd=place), f"bandpo {source_version()}")
    expect(run([bandpo, "bounds", "--no-figure"], cwd=place), "radius 0.05|δ|0.05")
    expect(run([bandpo, "objectives", "--filter", "bandpo"], cwd=place), "bandpo-kl")
    (place / "log.jsonl").write_text('{"reward": 0.1, "entropy": 2.0}\n' * 20)
    expect(run([bandpo, "doctor", "log.jsonl"], cwd=place), "log.jsonl")
    report = run([bandpo, "env"], cwd=place)
    expect(report, rf"bandpo +{re.escape(source_version())}\n")
    expect(report, r"torch +\S+ .*tested")
    expect(report, "not installed +transformers")
    run([bandpo, "recipes", "copy"], cwd=place)
    if not (place / "recipes/trl/paper.yaml").exists() or not os.access(place / "recipes/verl/train.sh", os.X_OK):
        raise Fault("`bandpo recipes copy` left out a recipe, or the permission to run a script")
    refused = run([bandpo, "train", "--task", "countdown"], cwd=place, status=2)
    expect(refused, r"pip install 'bandpo\[lab\]'")


def try_lab(wheel: Path, work: Path, constraints: Path, *, reuse: bool) -> None:
    """Install `bandpo[lab]` from the wheel, and train four steps in an empty folder.

    Args:
        wheel: The wheel.
        work: Folder for the environment, outside of the repository.
        constraints: File with the versions to install.
        reuse: Whether the environment sees the packages of the running Python.
    """
    python = environment(work / "lab")
    if reuse:
        site = next(p for p in map(Path, sys.path) if p.name == "site-packages" and p.is_relative_to(sys.prefix))
        own = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=work).strip())
        (own / "reused.pth").write_text(f"{site}\n")  # behind its own folder; `.pth` files in `site` are not read
    else:
        pip(python, "-c", constraints, "torch")
    pip(python, "--ignore-installed", "--no-deps", wheel)  # another bandpo may be among the reused packages
    pip(python, "-c", constraints, f"bandpo[lab] @ {wheel.resolve().as_uri()}")
    place = work / "lab-runs"
    place.mkdir()
    where = run([python, "-c", "import bandpo; print(bandpo.__file__)"], cwd=place).splitlines()[0]
    if not Path(where).is_relative_to(work / "lab"):
        raise Fault(f"bandpo was imported from {where}, which is not the installed wheel")
    run([python.parent / "bandpo", "train", "--max_steps", "4"], cwd=place, cache=work / "cache")
    runs = [path.parent for path in place.glob("runs/*/report.html")]
    if len(runs) != 1 or not list(runs[0].glob("model/*.safetensors")):
        raise Fault(f"`bandpo train` left no report and model; there are: {sorted(map(str, place.rglob('*')))[:30]}")


def environment(folder: Path) -> Path:
    """Make a virtual environment, and return its Python.

    Args:
        folder: The folder of the environment.
    """
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def pip(python: Path, *arguments: Path | str) -> None:
    """Install packages into an environment.

    Args:
        python: Its Python.
        *arguments: Arguments of `pip install`.
    """
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments], cwd=python.parent)


def run(command: Sequence[Path | str], *, cwd: Path, status: int = 0, cache: Path | None = None) -> str:
    """What a command prints; it sees no source folder, and no cache of this machine's user if one is given.

    Args:
        command: The words of the command.
        cwd: The folder that it runs in.
        status: The status that it must end with.
        cache: The folder of bandpo's cache.

    Raises:
        Fault: If it ends with another status.
    """
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"BANDPO_CACHE": str(cache)} if cache else {}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode != status:
        shown = (done.stdout + done.stderr)[-3000:]
        raise Fault(f"{' '.join(words)[:300]} ended with status {done.returncode}, expected {status}:\n{shown}")
    return done.stdout + done.stderr


def expect(text: str, pattern: str) -> None:
    """Raise `Fault` if a text does not have a pattern."""
    if not re.search(pattern, text):
        raise Fault(f"expected {pattern!r} in:\n{text[-2000:]}")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what a step does, and how long it took."""
    start = time.monotonic()
    print(f"-- {what}", flush=True)
    yield
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    """Run the steps; status 1 if a package is not what it must be."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder for wheel and sdist (default: a temporary one)")
    add("--only", choices=("content", "core", "lab"), help="build, and this step alone")
    add(
        "--constraints",
        type=Path,
        default=ROOT / "constraints.txt",
        help="versions to install (default: constraints.txt)",
    )
    add("--reuse", action="store_true", help="the lab's environment sees the packages of this Python")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bandpo-packages-") as folder:
        work = Path(folder).resolve()
        out = (options.out or work / "dist").resolve()
        out.mkdir(parents=True, exist_ok=True)
        try:
            with timed("sdist, and the wheel from it"):
                wheel, sdist = build(out, work)
            if options.only in (None, "content"):
                with timed("content"):
                    check_content(wheel, sdist)
            if options.only in (None, "core"):
                with timed("core: torch alone"):
                    try_core(wheel, work, options.constraints.resolve())
                shutil.rmtree(work / "core")
            if options.only in (None, "lab"):
                with timed("lab: bandpo train --max_steps 4"):
                    try_lab(wheel, work, options.constraints.resolve(), reuse=options.reuse)
        except Fault as fault:
            print(f"FAULT: {fault}", file=sys.stderr)
            return 1
    print(f"bandpo {source_version()}: the packages are as they must be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
