"""What must be true before a release: `python tools/release.py --check`, and with `--tag v1.0.0` also that it is the version.

    python tools/release.py --check    # status 1, with the list of what is open
    python tools/release.py --date     # CHANGELOG.md: what is under [Unreleased] becomes the section of the version, of today
    python tools/release.py --write    # the addresses of tools/addresses.toml, in CITATION.cff and mkdocs.yml

The version is in `src/bandpo/__init__.py` alone. Only the standard library is needed.
"""

import argparse
import datetime
import re
import sys
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).parents[1]
_VERSION = re.compile(
    r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?"
)  # what PEP 440 and SemVer both order, in the spelling of PEP 440
_KEYS = {
    "CITATION.cff": {"repository-code": "repository", "url": "site"},
    "mkdocs.yml": {"repo_url": "repository", "site_url": "site"},
}
"""The keys at the top of other files that have an address, and which."""


class State(NamedTuple):
    """What a release is checked by: the texts of the files, so that tests can check other texts.

    Args:
        version: The version.
        addresses: The content of tools/addresses.toml.
        changelog: The text of CHANGELOG.md.
        files: The texts of `_KEYS` by name.
    """

    version: str
    addresses: dict[str, str]
    changelog: str
    files: dict[str, str]


def read(root: Path = ROOT) -> State:
    """The state of a checkout.

    Args:
        root: Its folder.

    Raises:
        ValueError: If the version is not where it must be, or the file of addresses has other keys.
    """
    text = (root / "src/bandpo/__init__.py").read_text(encoding="utf-8")
    version = re.findall(r'^__version__ = "([^"]*)"$', text, re.MULTILINE)
    if len(version) != 1:
        raise ValueError(f'src/bandpo/__init__.py must have one line __version__ = "...", found {len(version)}')
    addresses = tomllib.loads((root / "tools/addresses.toml").read_text(encoding="utf-8"))
    if sorted(addresses) != ["repository", "site"]:
        raise ValueError(
            f"tools/addresses.toml must have the keys repository and site, found {', '.join(sorted(addresses))}"
        )
    files = {name: (root / name).read_text(encoding="utf-8") for name in _KEYS}
    return State(version[0], addresses, (root / "CHANGELOG.md").read_text(encoding="utf-8"), files)


def faults(state: State, tag: str | None = None) -> list[str]:
    """What is open before a release, one line for each; empty if nothing is.

    Args:
        state: The state.
        tag: The tag that the release is made from; None if there is none yet.
    """
    return [*_of_version(state, tag), *_of_addresses(state), *_of_changelog(state)]


def _of_version(state: State, tag: str | None) -> list[str]:
    wrong: list[str] = []
    if not _VERSION.fullmatch(state.version):
        wrong.append(f"version {state.version!r} must be X.Y.Z, or X.Y.ZaN, X.Y.ZbN or X.Y.ZrcN before a release")
    if tag is not None and tag != f"v{state.version}":
        wrong.append(
            f"the tag is {tag}, and the version of the source is {state.version}: the tag must be v{state.version}"
        )
    if (cited := value(state.files["CITATION.cff"], "version")) != state.version:
        wrong.append(f"CITATION.cff has version {cited}, and the source {state.version}")
    if (foot := value(state.files["mkdocs.yml"], "copyright")) and f"bandpo {state.version} " not in foot:
        wrong.append(f"the foot of the site is {foot!r}, and the version {state.version}; run python tools/site.py")
    return wrong


def _of_addresses(state: State) -> list[str]:
    wrong: list[str] = []
    for name, address in state.addresses.items():
        if not address:
            wrong.append(f"tools/addresses.toml: {name} is empty")
        elif not re.fullmatch(r"https://[\w.-]+(?:/[\w.~-]+)*/?", address):
            wrong.append(f"tools/addresses.toml: {name} must be an https address without a query, got {address!r}")
    for file, keys in _KEYS.items():
        for key, name in keys.items():
            found = value(state.files[file], key)
            if found != (state.addresses[name] or None):
                wrong.append(
                    f"{file}: {key} is {found!r}, and {name} in tools/addresses.toml is {state.addresses[name]!r}; "
                    "run python tools/release.py --write"
                )
    return wrong


def _of_changelog(state: State) -> list[str]:
    sections = parts(state.changelog)
    open_ = [line for line in sections.get("Unreleased", "").splitlines() if line.startswith(("-", "*"))]
    wrong = (
        [f"CHANGELOG.md has {len(open_)} entries under [Unreleased]; run python tools/release.py --date"]
        if open_
        else []
    )
    titles = [title for title in sections if title.startswith(f"{state.version} - ")]
    if not titles:
        wrong.append(f"CHANGELOG.md has no section `## [{state.version}] - YYYY-MM-DD`")
    for title in sections:
        if title != "Unreleased" and not _is_dated(title):
            wrong.append(
                f"CHANGELOG.md: section {title!r} must be a version and a date, such as `## [1.0.0] - 2026-12-01`"
            )
    return wrong


def _is_dated(title: str) -> bool:
    version, _, date = title.partition(" - ")
    try:
        return bool(_VERSION.fullmatch(version)) and datetime.date.fromisoformat(date) is not None
    except ValueError:
        return False


def parts(changelog: str) -> dict[str, str]:
    """The sections of a changelog: the title without brackets, and the text below it.

    Args:
        changelog: The text.
    """
    found: dict[str, str] = {}
    for section in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        found[title.replace("[", "").replace("]", "").strip()] = text
    return found


def dated(changelog: str, version: str, day: datetime.date) -> str:
    """A changelog whose unreleased entries are the section of a version.

    Args:
        changelog: The text.
        version: The version.
        day: The date of the release.

    Raises:
        ValueError: If there is a section of this version already, or none of unreleased changes.
    """
    sections = parts(changelog)
    if any(title.partition(" - ")[0] == version for title in sections):
        raise ValueError(f"CHANGELOG.md has a section of {version} already; raise the version first")
    if "Unreleased" not in sections:
        raise ValueError("CHANGELOG.md has no section ## [Unreleased]")
    return changelog.replace("## [Unreleased]\n", f"## [Unreleased]\n\n## [{version}] - {day.isoformat()}\n", 1)


def value(text: str, key: str) -> str | None:
    """The text value of a key at the top of a YAML file, None without one.

    Args:
        text: The file.
        key: The key.
    """
    found = re.search(rf"^{re.escape(key)}: *[\"']?([^\"'\n]*)[\"']? *$", text, re.MULTILINE)
    return found[1] if found else None


def with_value(text: str, key: str, new: str) -> str:
    """A YAML file with a key at its top changed, added behind the first key, or taken out where the value is empty.

    Args:
        text: The file.
        key: The key.
        new: The value.
    """
    lines = [line for line in text.splitlines() if not line.startswith(f"{key}:")]
    if new:
        before = next((i for i, line in enumerate(text.splitlines()) if line.startswith(f"{key}:")), 1)
        lines.insert(before, f"{key}: {new}")
    return "\n".join([*lines, ""])


def main() -> int:
    """Check, date or write."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--check", action="store_true", help="status 1 if something is open")
    chosen.add_argument(
        "--date", action="store_true", help="give the unreleased changes the version and the date of today"
    )
    chosen.add_argument("--write", action="store_true", help="write the addresses into the other files")
    parser.add_argument("--tag", help="with --check: the tag of the release, which must be v and the version")
    options = parser.parse_args()
    if options.tag and not options.check:
        parser.error("--tag belongs to --check")
    state = read()
    if options.date:
        today = datetime.datetime.now(datetime.timezone.utc).date()
        (ROOT / "CHANGELOG.md").write_text(dated(state.changelog, state.version, today), encoding="utf-8")
    elif options.write:
        for file, keys in _KEYS.items():
            text = state.files[file]
            for key, name in keys.items():
                text = with_value(text, key, state.addresses[name])
            (ROOT / file).write_text(text, encoding="utf-8")
    else:
        wrong = faults(state, options.tag)
        print("\n".join(wrong) or f"bandpo {state.version}: nothing is open")
        return int(bool(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
