"""Writes the version into the foot of every page of the site: the line `copyright` of mkdocs.yml.

* `python tools/site.py`: writes it.
* `python tools/site.py --check`: changes nothing; status 1 if mkdocs.yml is out of date.
"""

import argparse
import re
import sys
from pathlib import Path

import bandpo

CONFIG = Path(__file__).parents[1] / "mkdocs.yml"


def config(text: str, version: str) -> str:
    """The text of mkdocs.yml with a version.

    Args:
        text: The old text.
        version: Version that the foot of every page shows.

    Raises:
        ValueError: If the text has no line of the copyright, or several.
    """
    new, found = re.subn(r"^copyright: .*$", f"copyright: bandpo {version} · Apache-2.0", text, flags=re.MULTILINE)
    if found != 1:
        raise ValueError(f"mkdocs.yml must have one line that begins with 'copyright: ', and has {found}")
    return new


def main() -> int:
    """Writes mkdocs.yml, or compares it."""
    parser = argparse.ArgumentParser(description="The version that the site shows.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if mkdocs.yml is out of date")
    check = parser.parse_args().check
    old = CONFIG.read_text(encoding="utf-8")
    new = config(old, bandpo.__version__)
    if check and new != old:
        print("mkdocs.yml is out of date; run python tools/site.py")
        return 1
    CONFIG.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
