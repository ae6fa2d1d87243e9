"""The release check: what it refuses, the one place of version and addresses, and the README of the package index."""

import datetime
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import bandpo
from sources import ROOT, tool

release = tool("release")
LOG = """# Changelog

Text.

## [Unreleased]

## [1.2.3] - 2026-12-01

### Added

- A thing.

## [1.0.0rc1] - 2026-11-27

- B
"""
ADDRESSES = {"repository": "https://host.org/o/bandpo", "site": "https://o.site.org/bandpo/"}
CITED = "cff-version: 1.2.0\nversion: 1.2.3\n"
FILES = {
    "CITATION.cff": f'{CITED}repository-code: "{ADDRESSES["repository"]}"\nurl: {ADDRESSES["site"]}\n',
    "mkdocs.yml": f"site_name: bandpo\nsite_url: {ADDRESSES['site']}\nrepo_url: {ADDRESSES['repository']}\n",
}
READY = release.State("1.2.3", ADDRESSES, LOG, FILES)


def test_a_state_in_which_nothing_is_open():
    assert release.faults(READY) == release.faults(READY, "v1.2.3") == []


def changed(**more):
    return READY._replace(**more)


@pytest.mark.parametrize(
    ("state", "tag", "fault"),
    [
        (READY, "v1.2.4", "the tag is v1.2.4, and the version of the source is 1.2.3: the tag must be v1.2.3"),
        (READY, "1.2.3", "the tag must be v1.2.3"),
        (READY, "", "the tag must be v1.2.3"),
        (changed(addresses={**ADDRESSES, "repository": ""}), None, "tools/addresses.toml: repository is empty"),
        (changed(addresses={**ADDRESSES, "site": ""}), None, "tools/addresses.toml: site is empty"),
        (
            changed(addresses={**ADDRESSES, "site": "http://x.org"}),
            None,
            "site must be an https address without a query",
        ),
        (changed(addresses={**ADDRESSES, "site": "https://x.org/?a"}), None, "without a query, got 'https://x.org/"),
        (changed(files={**FILES, "mkdocs.yml": "site_name: bandpo\n"}), None, "mkdocs.yml: site_url is None"),
        (
            changed(changelog=LOG.replace("[Unreleased]\n", "[Unreleased]\n\n- New.\n")),
            None,
            "has 1 entries under .Unreleased.",
        ),
        (changed(changelog=LOG.replace("1.2.3", "1.2.2")), None, r"has no section `## \[1\.2\.3\] - YYYY-MM-DD`"),
        (
            changed(changelog=LOG.replace("2026-12-01", "soon")),
            None,
            "section '1.2.3 - soon' must be a version and a date",
        ),
        (changed(changelog=LOG.replace("2026-11-27", "2026-13-27")), None, "section '1.0.0rc1 - 2026-13-27' must be"),
        (
            changed(files={**FILES, "CITATION.cff": FILES["CITATION.cff"].replace("1.2.3", "1.2.2")}),
            None,
            "has version 1.2.2",
        ),
        (
            changed(files={**FILES, "mkdocs.yml": FILES["mkdocs.yml"] + "copyright: bandpo 1.2 · x\n"}),
            None,
            r"tools/site\.py",
        ),
        (changed(version="1.2"), None, "version '1.2' must be X.Y.Z"),
        (changed(version="1.2.3-rc1"), None, "version '1.2.3-rc1' must be X.Y.Z"),
    ],
)
def test_what_is_open_is_told(state, tag, fault):
    wrong = release.faults(state, tag)
    assert wrong and any(re.search(fault, line) for line in wrong), wrong


def test_dating_the_changelog():
    log = LOG.replace("[Unreleased]\n", "[Unreleased]\n\n### Added\n\n- New.\n")
    new = release.dated(log, "1.3.0", datetime.date(2027, 1, 2))
    assert list(release.parts(new)) == [
        "Unreleased",
        "1.3.0 - 2027-01-02",
        "1.2.3 - 2026-12-01",
        "1.0.0rc1 - 2026-11-27",
    ]
    assert "- New." in release.parts(new)["1.3.0 - 2027-01-02"] and not release.parts(new)["Unreleased"].strip()
    files = {**FILES, "CITATION.cff": FILES["CITATION.cff"].replace("1.2.3", "1.3.0")}
    assert release.faults(release.State("1.3.0", ADDRESSES, new, files)) == []
    with pytest.raises(ValueError, match=r"has a section of 1\.2\.3 already"):
        release.dated(log, "1.2.3", datetime.date(2027, 1, 2))
    with pytest.raises(ValueError, match=r"no section ## \[Unreleased\]"):
        release.dated("# Changelog\n", "1.2.3", datetime.date(2027, 1, 2))


def test_addresses_are_written_and_taken_out_again():
    for file, keys in release._KEYS.items():
        original = (ROOT / file).read_text()
        text = original
        for key, name in keys.items():
            text = release.with_value(text, key, ADDRESSES[name])
        read = yaml.safe_load(re.sub(r"!!python\S*", "", text))
        assert {key: read[key] for key in keys} == {key: ADDRESSES[name] for key, name in keys.items()}
        assert all(release.value(text, key) == ADDRESSES[name] for key, name in keys.items())
        twice = text
        for key, name in keys.items():
            twice = release.with_value(twice, key, ADDRESSES[name])
        assert twice == text
        empty = text
        for key in keys:
            empty = release.with_value(empty, key, "")
        expected = original
        for key in keys:
            expected = release.with_value(expected, key, "")
        assert empty == expected


def test_this_checkout_is_ready_but_for_what_a_person_decides():
    """The addresses of repository and site, and the day of the release; nothing else may be open at any time."""
    state = release.read(ROOT)
    assert state.version == bandpo.__version__
    decided = r"tools/addresses\.toml: \w+ is empty|CHANGELOG\.md has (\d+ entries under|no section)"
    assert [line for line in release.faults(state, f"v{state.version}") if not re.match(decided, line)] == []


def test_no_file_has_an_address_of_its_own():
    """Once the repository has an address, other files must not write it by hand."""
    addresses = [a.rstrip("/") for a in release.read(ROOT).addresses.values() if a]
    allowed = {"tools/addresses.toml", *release._KEYS}
    command = ["git", "-C", str(ROOT), "ls-files"]
    files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    texts = [
        f
        for f in files
        if f not in allowed and Path(f).suffix in (".md", ".py", ".toml", ".yml", ".yaml", ".cff", ".html")
    ]
    for address in addresses:
        assert not [f for f in texts if (ROOT / f).exists() and address in (ROOT / f).read_text()], address


# ---- the metadata of the build ----


@pytest.fixture(scope="module")
def hook():
    """The hook; the tests' environment has no hatchling, from which it takes a class without a method of its own."""
    names = ["hatchling", "hatchling.metadata", "hatchling.metadata.plugin", "hatchling.metadata.plugin.interface"]
    if importlib.util.find_spec("hatchling") is None:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        sys.modules[names[-1]].MetadataHookInterface = type("MetadataHookInterface", (), {})
    module = tool("hatch_metadata")
    yield module
    for name in names:
        if not getattr(sys.modules.get(name), "__file__", None):
            sys.modules.pop(name, None)


def test_links_of_the_readme_are_absolute_at_the_index(hook):
    text = (ROOT / "README.md").read_text()
    assert hook.absolute_links(text, "", "1.0.0") == text
    new = hook.absolute_links(text, "https://host.org/o/bandpo/", "1.0.0")
    targets = re.findall(r"\]\(([^)\s]+)\)", new)
    assert len(targets) > 5 and all(t.startswith(("https://", "#")) for t in targets)
    for kind, path in re.findall(r"\]\(https://host\.org/o/bandpo/(blob|raw)/v1\.0\.0/([^)#]+)", new):
        assert (ROOT / path).exists(), path
        assert (kind == "raw") == (path.endswith((".png", ".svg", ".gif"))), (kind, path)
    assert hook.absolute_links("[![p](a.png)](b.md)", "https://h/r", "2") == (
        "[![p](https://h/r/raw/v2/a.png)](https://h/r/blob/v2/b.md)"
    )


def test_the_hook_gives_readme_and_urls(hook, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "README.md").write_text("[a](b.md)")
    one = object.__new__(hook.get_metadata_hook())
    one.__dict__["root"] = str(tmp_path)
    if isinstance(getattr(type(one), "root", None), property):  # hatchling's own
        one._MetadataHookInterface__root = str(tmp_path)
    for repository, site, expected in (
        ("", "", {}),
        ("https://h/r", "https://s/", {"Repository", "Issues", "Changelog", "Documentation"}),
    ):
        (tmp_path / "tools/addresses.toml").write_text(f'repository = "{repository}"\nsite = "{site}"\n')
        metadata = {"version": "1.0.0"}
        one.update(metadata)
        assert set(metadata["urls"]) == set(expected)
        assert metadata["readme"]["text"] == ("[a](https://h/r/blob/v1.0.0/b.md)" if repository else "[a](b.md)")
        assert metadata["readme"]["content-type"] == "text/markdown"
