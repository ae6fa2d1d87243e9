"""Writes into mkdocs.yml what the site takes from elsewhere: the version, and the address of the repository once there is one.

* `python tools/site.py`: writes them.
* `python tools/site.py --check`: changes nothing; status 1 if mkdocs.yml is out of date.

With an address every page has a link to edit it; without one there is none.
"""

import argparse
import re
import sys
from pathlib import Path

import bandpo

CONFIG = Path(__file__).parents[1] / "mkdocs.yml"


def config(text: str, version: str, repository: str) -> str:
    """The text of mkdocs.yml with a version and an address.

    Args:
        text: The old text.
        version: Version that the foot of every page shows.
        repository: Address of the repository on GitHub, as in https://github.com/OWNER/NAME; empty while there is none.

    Raises:
        ValueError: If the address is not of that form, or the text has no line of the copyright.
    """
    if repository and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", repository):
        raise ValueError(
            f"the address of the repository must be https://github.com/OWNER/NAME or empty, got {repository!r}"
        )
    text = re.sub(r"^(repo_url|edit_uri): .*\n", "", text, flags=re.MULTILINE)
    lines = [f"copyright: bandpo {version} · Apache-2.0"]
    if repository:
        lines += [f"repo_url: {repository}", "edit_uri: edit/main/docs/"]
    new, found = re.subn(r"^copyright: .*$", "\n".join(lines), text, flags=re.MULTILINE)
    if found != 1:
        raise ValueError(f"mkdocs.yml must have one line that begins with 'copyright: ', and has {found}")
    return new


def address() -> str:
    """The address of the repository; empty while there is none."""
    return ""


def main() -> int:
    """Writes mkdocs.yml, or compares it."""
    parser = argparse.ArgumentParser(description="What mkdocs.yml takes from elsewhere.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if mkdocs.yml is out of date")
    check = parser.parse_args().check
    old = CONFIG.read_text(encoding="utf-8")
    new = config(old, bandpo.__version__, address())
    if check and new != old:
        print("mkdocs.yml is out of date; run python tools/site.py")
        return 1
    CONFIG.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
