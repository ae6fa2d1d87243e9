"""The built site in a real browser: no other host, nothing broken, accessible in light and dark, and each feature works."""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

import bandpo
from sources import ROOT

SIZES = [(1280, "light"), (390, "dark")]
STANDARD = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
"""The criteria of WCAG 2.1, A and AA. Beyond them, axe would have other landmarks in the theme's frame."""
CONFIG = (ROOT / "mkdocs.yml").read_text()
ADDRESS = "https://github.com/somebody/bandpo"


def build(folder, config):
    """A site from a copy of the documentation, with a configuration of its own."""
    zensical = shutil.which("zensical", path=Path(sys.executable).parent) or shutil.which("zensical")
    if zensical is None:
        pytest.skip("no zensical in this environment: pip install 'bandpo[docs]', or `make docs`")
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "src").symlink_to(ROOT / "src")
    (folder / "mkdocs.yml").write_text(config)
    made = subprocess.run([zensical, "build", "--strict"], cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "site"


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    return build(tmp_path_factory.mktemp("site"), CONFIG)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def pages(site):
    return sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))


# ---- all pages ----


class Links(HTMLParser):
    """The links and the anchors of a page, and its pictures without a text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.silent = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "img" and not (given.get("alt") or "").strip():
            self.silent.append(given.get("src"))


def test_links_anchors_and_texts_of_pictures(site):
    read = {path.resolve(): Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(read) > 45
    inside = 0
    for path, page in read.items():
        if path.name == "404.html":  # its links are absolute
            continue
        assert page.silent == [], path
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                assert link.startswith(("https://", "mailto:")), f"{path}: {link}"
                continue
            target, _, anchor = link.partition("#")
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            assert file.exists(), f"{path}: {link}"
            inside += 1
            if anchor and file in read and anchor != "__skip":
                assert anchor in read[file].ids, f"{path}: {link}"
    assert inside > 3000


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_every_page_is_whole_fits_asks_no_other_host_and_is_accessible(browser, site, address, width, scheme):
    """Fonts, scripts and pictures come from the site: every request is counted."""
    wrong = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: wrong.append((name, message.text)))
    page.on("pageerror", lambda error: wrong.append((name, str(error))))
    page.on("request", lambda request: asked.append(request.url))
    for name in pages(site):
        asked = []
        page.goto(address + ("" if name == "." else f"{name}/"))
        page.wait_for_function("!document.querySelector('.arithmatex:not(:has(.katex))')")
        wrong += [(name, url) for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert any(url.endswith(".woff2") for url in asked), name
        broken = page.evaluate(
            "async () => { const all = [...document.images]; all.forEach(i => { i.loading = 'eager' });"
            " await Promise.allSettled(all.map(i => i.decode())); return all.filter(i => !i.naturalWidth).map(i => i.src) }"
        )
        over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        wrong += [(name, f"broken {src}") for src in broken] + [
            (name, f"too wide by {over}") for over in [over] if over > 0
        ]
        result = Axe().run(page, options={"iframes": False, "runOnly": STANDARD})
        for rule in result.response["violations"]:
            wrong += [(name, f"{rule['id']}: {node['html'][:200]}") for node in rule["nodes"][:3]]
    page.close()
    assert wrong == [], "\n".join(f"{name}: {what}" for name, what in wrong)


# ---- features ----


@pytest.fixture
def at(page, address):
    """Opens a page of the site; at the end nothing was said and no other host was asked."""

    def go(name):
        page.goto(address + name)
        return page

    yield go
    assert page.said == []
    assert [url for url in page.asked if not url.startswith((address, "data:", "blob:"))] == []


def test_colours_can_be_chosen_and_pictures_follow(at):
    page = at("zoo/")
    seen = []
    for _ in range(3):
        page.locator("form[data-md-component=palette] label:visible").click()
        scheme = page.evaluate("document.body.dataset.mdColorScheme")
        picture = page.evaluate("getComputedStyle(document.querySelector('.zoo-cards img')).colorScheme")
        seen.append((scheme, picture))
    assert set(seen) == {("default", "light"), ("slate", "dark")}
    page.evaluate("document.querySelector('#__palette_2').click()")
    page.reload()
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"


def test_search_finds_a_page(at):
    page = at("")
    page.keyboard.press("Control+k")
    page.keyboard.type("match_radius")
    page.wait_for_selector(
        "[data-md-component=search] a[href*='radii'], .md-search a[href*='radii'], a[href*='radii'] mark",
        timeout=15_000,
    )


def test_code_can_be_copied(at):
    page = at("")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    block = page.locator(".highlight", has_text="BandGRPOTrainer").first
    block.hover()
    block.locator("button").first.click()
    page.wait_for_function("navigator.clipboard.readText().then(t => t.includes('BandGRPOTrainer('))")


def test_pages_lead_to_the_previous_and_the_next_one_and_show_the_version(at):
    page = at("concepts/")
    foot = page.locator("footer")
    assert "start" in foot.locator("a.md-footer__link--prev").get_attribute("href")
    assert "choose" in foot.locator("a.md-footer__link--next").get_attribute("href")
    assert f"bandpo {bandpo.__version__}" in foot.inner_text()


def test_formulas_are_typeset(at):
    page = at("theory/")
    page.wait_for_selector(".katex-display")
    assert (
        page.locator(".arithmatex").count()
        == page.locator(".arithmatex > *:first-child:is(.katex, .katex-display)").count()
        > 15
    )
    assert page.locator(".katex-error").count() == 0
    page.asked.clear()
    at("faq/")
    assert page.asked
    assert not any("katex" in url for url in page.asked)  # a page without formulas does not load it


def test_the_explorer_in_its_page(at):
    page = at("explorer/#divergence=tv")
    frame = page.frame_locator("iframe")
    assert frame.locator("#divergence").input_value() == "tv"
    page.wait_for_function("document.querySelector('iframe').clientHeight > 900")
    inner = next(f for f in page.frames if "explorer.html" in f.url)
    assert inner.evaluate("document.documentElement.scrollHeight - innerHeight") <= 1  # no second scroll bar
    for scheme, option in (("dark", "#__palette_2"), ("light", "#__palette_1")):
        page.evaluate("option => document.querySelector(option).click()", option)
        inner.wait_for_function("s => getComputedStyle(document.documentElement).colorScheme === s", arg=scheme)


def test_the_zoo_as_cards_and_as_a_table(at):
    page, count = at("zoo/"), len(bandpo.OBJECTIVES)
    assert page.locator(".zoo-cards > li").count() == count
    assert page.locator(".zoo-cards > li:visible").count() == count
    assert page.locator(".zoo-controls output").inner_text() == f"{count} of {count} objectives"
    page.get_by_role("button", name="Table", exact=True).press("Enter")
    assert page.locator(".zoo-cards > li:visible").count() == 0
    names = ".zoo-table tbody tr:not([hidden]) td:first-child"
    assert page.locator(names).all_inner_texts() == list(bandpo.OBJECTIVES)
    head = page.locator(".zoo-table th", has_text="name")
    head.get_by_role("button").press("Enter")
    ordered = page.evaluate("names => names.sort((a, b) => a.localeCompare(b))", list(bandpo.OBJECTIVES))
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.locator(names).all_inner_texts() == ordered
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert page.locator(names).all_inner_texts() == ordered[::-1]
    page.locator("#zoo-filter").fill("2602.04879")
    shown = page.locator(names).all_inner_texts()
    assert set(shown) == {name for name, x in bandpo.OBJECTIVES.items() if "2602.04879" in x.paper}
    page.get_by_role("button", name="Cards", exact=True).click()
    assert page.locator(".zoo-cards > li:visible").count() == len(shown)
    assert page.locator(".zoo-controls output").inner_text() == f"{len(shown)} of {count} objectives"


# ---- edit links: `python tools/release.py --write` sets repo_url once the repository has an address ----


def test_no_page_has_an_edit_link_while_the_repository_has_no_address(at):
    if re.search(r"^repo_url: https", CONFIG, re.MULTILINE):
        pytest.skip("the repository has an address")
    assert at("concepts/").locator("a[rel=edit]").count() == 0


def test_with_an_address_each_page_leads_to_its_source(tmp_path):
    without = re.sub(r"^repo_url: .*\n", "", CONFIG, flags=re.MULTILINE)
    site = build(tmp_path, f"repo_url: {ADDRESS}\n{without}")
    for name in ("concepts", "api/bounds"):
        assert f'{ADDRESS}/edit/main/docs/{name}.md"' in (site / name / "index.html").read_text()
