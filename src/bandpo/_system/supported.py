"""The packages that bandpo works with: the range that it accepts, and the versions that its tests ran with.

The ranges are those of the package's own metadata. The versions are those of the constraint files and of the hosts' wheels
that `make test`, `make test-lowest` and `make test-hosts` install; a test compares this table with them.
"""

import operator
import re
from importlib import metadata
from typing import NamedTuple

PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ("2.6.0", "2.13.0"),
    "transformers": ("4.56.2", "5.10.4", "5.23.0"),
    "accelerate": ("1.4.0", "1.15.0"),
    "datasets": ("4.7.0", "5.2.0"),
    "peft": ("0.15.0", "0.21.2"),
    "numpy": ("1.26.0", "2.4.6"),
    "triton": ("3.9.0",),
}
"""Packages that are no hosts, with the versions that tests ran with."""
HOSTS: dict[str, tuple[str, ...]] = {
    "trl": ("1.12.0", "1.16.0"),
    "verl": ("0.7.1", "0.8.0", "0.9.1"),
    "skyrl": ("0.3.0", "0.4.0"),
    "openrlhf": ("0.11.2",),
    "areal": ("1.0.4",),
    "tinker": ("0.38.0",),
    "ms_swift": ("4.6.0",),
    "unsloth": ("2026.10.9",),
    "prime_rl": (),
    "slime": (),
    "miles": (),
    "nemo_rl": (),
    "roll": (),
    "open_instruct": (),
    "torchtune": (),
    "rllm": (),
}
"""Hosts, by the name of their distribution. The adapters of those without versions were compared with the hosts' source."""
HELPERS = ("ray", "vllm", "deepspeed", "reasoning-gym", "math-verify", "matplotlib", "gguf")
"""Further packages whose version a report should name if they are installed; no test is run with several of them."""


class Found(NamedTuple):
    """A package on this machine.

    Args:
        name: Name of the distribution.
        version: The installed version; None if there is none.
        accepts: The range that bandpo's metadata accepts, such as `>=2.6`; "" where it names none.
        tested: The versions that tests ran with.
    """

    name: str
    version: str | None
    accepts: str
    tested: tuple[str, ...]

    @property
    def remark(self) -> str:
        """What a reader should know about the version: the accepted range, and whether the version was tested."""
        parts = [f"bandpo accepts {self.accepts}"] if self.accepts else []
        if self.version is not None and self.accepts and not within(self.version, self.accepts):
            parts = [f"OUTSIDE of what bandpo accepts: {self.accepts}"]
        if self.tested and self.version is not None:
            same = plain(self.version) in self.tested
            parts.append("tested" if same else f"tested: {', '.join(self.tested)}")
        elif self.name in HOSTS:
            parts.append("compared with its source")
        return "; ".join(parts)


def installed(name: str) -> str | None:
    """The version of a distribution, None if it is not installed; nothing is imported.

    Args:
        name: Name of the distribution.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def accepted() -> dict[str, str]:
    """The ranges in the metadata of bandpo, by the normalised name of the package; empty where bandpo is not installed."""
    try:
        required = metadata.requires("bandpo") or []
    except metadata.PackageNotFoundError:  # run from a folder on the path
        return {}
    found: dict[str, str] = {}
    for requirement in required:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([<>=!~][^;]*)?", requirement)
        if match and match[2]:
            limits = sorted((limit.strip() for limit in match[2].split(",")), key=lambda limit: limit[0] != ">")
            found.setdefault(normal(match[1]), ",".join(limits))
    return found


def found(names: dict[str, tuple[str, ...]]) -> list[Found]:
    """Packages with their versions on this machine.

    Args:
        names: Names of distributions with the versions that tests ran with.
    """
    ranges = accepted()
    return [Found(name, installed(name), ranges.get(normal(name), ""), tested) for name, tested in names.items()]


def normal(name: str) -> str:
    """The normalised name of a distribution (PEP 503).

    Args:
        name: The name in any spelling.

    Examples:
        >>> normal("Math_Verify")
        'math-verify'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def plain(version: str) -> str:
    """A version without the label of a local build.

    Args:
        version: The version, such as `2.13.0+cpu`.

    Examples:
        >>> plain("2.13.0+cpu")
        '2.13.0'
    """
    return version.partition("+")[0]


def within(version: str, accepts: str) -> bool:
    """Whether a version fulfils limits with `>=`, `<`, `==` and their kin, by the numbers of its release alone.

    Args:
        version: The version; a suffix such as `rc1` is not looked at.
        accepts: Limits, separated by commas.

    Examples:
        >>> within("1.16.0", ">=1.12,<2"), within("2.0.0rc1", ">=1.12,<2"), within("2.13.0+cpu", ">=2.6")
        (True, False, True)
    """
    release = _numbers(version)
    compare = {
        ">=": operator.ge,
        "<=": operator.le,
        "==": operator.eq,
        "!=": operator.ne,
        ">": operator.gt,
        "<": operator.lt,
    }
    for limit in accepts.split(","):
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([\d.]+)\s*", limit)
        if match is None:
            raise ValueError(f"limit {limit!r} is not understood; known are {', '.join(compare)} and a release number")
        if not compare[match[1]](release, _numbers(match[2])):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a release without zeros at its end: 1.2 and 1.2.0 are equal."""
    match = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in match[1].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
