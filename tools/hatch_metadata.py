"""A hook of the build: addresses of the project in the metadata, and a README whose links work outside of the repository.

The addresses are in `tools/addresses.toml`. While they are empty, the metadata have none, and the README is as it is.
"""

import re
import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

if sys.version_info >= (3, 11):
    import tomllib
else:  # hatchling requires it there
    import tomli as tomllib

_TARGET = r"(?!https?:|mailto:|#)([^)\s]+)"
_PICTURE, _LINK = re.compile(rf"(!\[[^\]]*\]\(){_TARGET}"), re.compile(rf"(\]\(){_TARGET}")


def absolute_links(text: str, repository: str, version: str) -> str:
    """A page of the repository with links to files made absolute, to their state at the tag of a version.

    Args:
        text: The page, in Markdown.
        repository: Address of the repository; "" leaves the page as it is.
        version: The version.

    Examples:
        >>> absolute_links("[a](docs/a.md#b) ![p](docs/p.png) [c](#d)", "https://host/o/r", "1.0")
        '[a](https://host/o/r/blob/v1.0/docs/a.md#b) ![p](https://host/o/r/raw/v1.0/docs/p.png) [c](#d)'
    """
    if not repository:
        return text
    root = repository.rstrip("/")
    text = _PICTURE.sub(rf"\g<1>{root}/raw/v{version}/\g<2>", text)  # first, because a link may be around a picture
    return _LINK.sub(rf"\g<1>{root}/blob/v{version}/\g<2>", text)


def urls(repository: str, site: str) -> dict[str, str]:
    """The links that a package index shows beside the package; none while the addresses are empty.

    Args:
        repository: Address of the repository.
        site: Address of the documentation.
    """
    found = {"Documentation": site} if site else {}
    if repository:
        root = repository.rstrip("/")
        found |= {"Repository": root, "Issues": f"{root}/issues", "Changelog": f"{root}/blob/main/CHANGELOG.md"}
    return found


class Hook(MetadataHookInterface):
    """Adds `readme` and `urls`, which pyproject.toml declares as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the fields.

        Args:
            metadata: The metadata, which are changed.
        """
        root = Path(self.root)
        addresses = tomllib.loads((root / "tools" / "addresses.toml").read_text(encoding="utf-8"))
        text = (root / "README.md").read_text(encoding="utf-8")
        text = absolute_links(text, addresses["repository"], metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(addresses["repository"], addresses["site"])


def get_metadata_hook() -> type[MetadataHookInterface]:
    """The hook, for hatchling."""
    return Hook
