"""The built site in a real browser: no other host, nothing broken, accessible in light and dark, and each feature works."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from axe_playwright_python.base import AXE_FILE_PATH

import bandpo
from sources import ROOT

STANDARD = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
"""The criteria of WCAG 2.1, A and AA. Beyond them, axe would have other landmarks in the theme's frame."""
SIZES = ((1280, "light"), (390, "dark"))
FRAME = [".md-header", ".md-tabs", ".md-sidebar--primary", ".md-footer"]
"""What is the same on every page."""
LOOKS = """seen => {
  window.looks = []
  const known = new Set(seen), texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const parent = texts.currentNode.parentElement
    if (!texts.currentNode.data.trim() || !parent.checkVisibility()) continue
    const {color, fontSize, fontWeight} = getComputedStyle(parent), look = [color, fontSize, fontWeight]
    for (let e = parent; e; e = e.parentElement) {
      const {backgroundColor, backgroundImage, opacity} = getComputedStyle(e)
      look.push(...[backgroundColor, backgroundImage, opacity].filter(x => !["rgba(0, 0, 0, 0)", "none", "1"].includes(x)))
    }
    if (!known.has(look.join())) window.looks.push(parent)
    known.add(look.join())
  }
  return [...known]
}"""
"""Finds one element for each look of text that is not in a list: its colour and size, and what lies below it. axe takes
seconds to find out where each of thousands of texts lies, and a contrast follows from the look alone."""
CONFIG = (ROOT / "mkdocs.yml").read_text()
ADDRESS = "https://github.com/somebody/bandpo"


def build(folder, config, ignore=None):
    """A site from a copy of the documentation, with a configuration of its own; a site of some pages has links that miss."""
    zensical = shutil.which("zensical", path=Path(sys.executable).parent) or shutil.which("zensical")
    if zensical is None:
        pytest.skip("no zensical in this environment: pip install 'bandpo[docs]', or `make docs`")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=ignore)
    (folder / "src").symlink_to(ROOT / "src")
    (folder / "mkdocs.yml").write_text(config)
    command = [zensical, "build", *(() if ignore else ("--strict",))]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
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


def violations(page, context, **options):
    """What axe finds: the rule and the element, at most three elements for each rule."""
    script = f"""async options => {{
      const found = await axe.run({context}, {{iframes: false, resultTypes: ["violations"], ...options}})
      return found.violations.flatMap(rule => rule.nodes.slice(0, 3).map(node => `${{rule.id}}: ${{node.html.slice(0, 200)}}`))
    }}"""
    return page.evaluate(script, options)


def faults_of_page(page, seen, sizes=SIZES):
    """What is wrong with the page that is open: all criteria where it is wide, and those of colours and layout in all sizes.

    `seen` has the looks of the pages before, whose contrast and whose frame are known.
    """
    page.add_style_tag(content="*, *::before, *::after { transition: none !important }")  # no colour is half way
    page.evaluate(Path(AXE_FILE_PATH).read_text())
    wrong, context = [], json.dumps({"exclude": FRAME}) if seen else "document"
    for width, scheme in sizes:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.wait_for_function(
            f"document.body.dataset.mdColorScheme === '{SCHEMES[scheme]}'"
            " && !document.querySelector('.arithmatex:not(:has(.katex))')"
        )
        over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        wrong += [f"too wide by {over} at {width}"] if over > 0 else []
        seen[scheme] = page.evaluate(LOOKS, seen.get(scheme, []))
        if page.evaluate("window.looks.length"):
            only = {"type": "rule", "values": ["color-contrast"]}
            wrong += [f"{scheme}: {x}" for x in violations(page, "window.looks", runOnly=only)]
        if width == 1280:
            wrong += violations(page, context, runOnly=STANDARD, rules={"color-contrast": {"enabled": False}})
        else:
            only = {"type": "rule", "values": ["scrollable-region-focusable"]}
            wrong += violations(page, context, runOnly=only)
    return wrong + page.evaluate(
        "async () => { const all = [...document.images]; all.forEach(i => { i.loading = 'eager' });"
        " await Promise.allSettled(all.map(i => i.decode()));"
        " return all.filter(i => !i.naturalWidth).map(i => `broken ${i.src}`) }"
    )


SCHEMES = {"light": "default", "dark": "slate"}


@pytest.mark.slow
def test_every_page_is_whole_fits_asks_no_other_host_and_is_accessible(browser, site, address):
    """Fonts, scripts and pictures come from the site: every request is counted."""
    wrong, seen = [], {}
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda message: wrong.append((name, message.text)))
    page.on("pageerror", lambda error: wrong.append((name, str(error))))
    page.on("request", lambda request: asked.append(request.url))
    for i, name in enumerate(pages(site)):
        asked = []
        page.goto(address + ("" if name == "." else f"{name}/"))
        # each page is first laid out in the size that the page before was left in
        wrong += [(name, fault) for fault in faults_of_page(page, seen, SIZES[:: -1 if i % 2 else 1])]
        wrong += [(name, url) for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert any(url.endswith(".woff2") for url in asked), name
    page.close()
    assert wrong == [], "\n".join(f"{name}: {what}" for name, what in wrong)


def test_faults_of_a_page_are_found(browser, address):
    """Each fault is put into a table that is right, so that other elements with nearly the same look come before it."""
    page, seen = browser.new_page(), {}
    page.goto(address + "start/")
    assert faults_of_page(page, seen) == []
    page.evaluate("""() => {
      const cell = document.querySelector("article table tbody tr:last-child td")
      cell.insertAdjacentHTML("beforeend", `<i class="pale">pale</i> <b style="color: #666; background: #888">dim</b>
        <span style="opacity: 0.4">faint</span> <img src="/none.png">`)
      document.querySelector("article").insertAdjacentHTML("beforeend", `<p style="width: 900px">wide</p>`)
      document.head.insertAdjacentHTML("beforeend", "<style>[data-md-color-scheme=slate] .pale { color: #333 }</style>")
    }""")
    found = "\n".join(faults_of_page(page, seen))
    page.close()
    for fault in (
        "broken ",
        "image-alt: <img",
        "too wide by ",
        "light: color-contrast: <b",
        "light: color-contrast: <span",
    ):
        assert fault in found, found
    assert 'dark: color-contrast: <i class="pale"' in found and 'light: color-contrast: <i class="pale"' not in found


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
    for _ in range(30):  # the shortcut works once the theme's script has run, which a busy machine delays
        page.keyboard.press("Control+k")
        page.wait_for_timeout(500)
        if page.evaluate("document.activeElement !== document.body"):
            break
    page.keyboard.type("match_radius")
    page.wait_for_selector(
        "[data-md-component=search] a[href*='radii'], .md-search a[href*='radii'], a[href*='radii'] mark",
        timeout=30_000,
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


def test_what_scrolls_sideways_on_a_phone_shows_it_and_can_be_reached(at, page):
    page.set_viewport_size({"width": 390, "height": 900})
    at("zoo/").get_by_role("button", name="Table", exact=True).click()
    table = page.locator(".zoo-table")
    page.wait_for_function("document.querySelector('.zoo-table').hasAttribute('data-more')")
    assert "linear-gradient" in table.evaluate("e => getComputedStyle(e).maskImage")
    table.evaluate("e => e.scrollTo(e.scrollWidth, 0)")
    page.wait_for_function("!document.querySelector('.zoo-table').hasAttribute('data-more')")
    at("")
    page.wait_for_function("document.querySelectorAll('.gallery .wide .picture-scroll[data-more]').length === 4")
    box = page.locator(".picture-scroll").first
    assert box.get_attribute("tabindex") == "0" and box.evaluate("e => e.scrollWidth / e.clientWidth") > 1.5
    assert page.locator(".gallery img").count() == 6
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_function("!document.querySelector('.picture-scroll[data-more]')")  # also after a phone was turned
    assert page.evaluate("[...document.querySelectorAll('pre > code')].every(e => e.scrollWidth <= e.clientWidth)")


def test_tables_of_much_text_have_room_on_a_phone(at, page):
    """Columns of a few letters once made rows of a screen's height, with the last column out of sight."""
    page.set_viewport_size({"width": 390, "height": 900})
    at("choose/")
    page.wait_for_function("document.querySelector('article table').hasAttribute('data-roomy')")
    assert page.evaluate("Math.max(...[...document.querySelectorAll('article tr')].map(e => e.offsetHeight))") < 180
    assert page.evaluate("[...document.querySelectorAll('article td')].every(e => e.offsetWidth >= 90)")
    at("stability/")
    page.wait_for_function("document.querySelector('article .md-typeset__scrollwrap')")
    fits = "e => e.scrollWidth <= e.clientWidth"  # a table of little text is all to be seen
    assert page.locator("article .md-typeset__scrollwrap").first.evaluate(fits)


def test_names_in_code_are_broken_only_inside_of_them(at, page):
    page.set_viewport_size({"width": 390, "height": 900})
    parts = "[...document.querySelectorAll('td code')].flatMap(e => [...e.innerHTML.split('<wbr>')])"
    pieces = at("architecture/").evaluate(parts)
    assert "_inputs" in pieces and not {"_", "-", "/", "."} & set(pieces)
    lines = "[...document.querySelectorAll('code .option')].map(e => [e.textContent, e.getClientRects().length])"
    options = at("faq/").evaluate(lines)
    assert ["--resume_from_checkpoint", 1] in options and ["--target", 1] in options and {n for _, n in options} == {1}


# ---- edit links: `python tools/release.py --write` sets repo_url once the repository has an address ----


def test_no_page_has_an_edit_link_while_the_repository_has_no_address(at):
    if re.search(r"^repo_url: https", CONFIG, re.MULTILINE):
        pytest.skip("the repository has an address")
    assert at("concepts/").locator("a[rel=edit]").count() == 0


def test_with_an_address_each_page_leads_to_its_source(tmp_path):
    """A site of two pages is enough, and its build takes a second."""
    config = re.sub(r"^repo_url: .*\n|^nav:\n(?: .*\n)+", "", CONFIG, flags=re.MULTILINE)

    def others(folder, names):
        return [n for n in names if n.endswith((".md", ".ipynb")) and (Path(folder).name, n) not in kept]

    kept = {("docs", "concepts.md"), ("api", "bounds.md")}
    site = build(tmp_path, f"repo_url: {ADDRESS}\nnav: [concepts.md, api/bounds.md]\n{config}", ignore=others)
    for name in ("concepts", "api/bounds"):
        assert f'{ADDRESS}/edit/main/docs/{name}.md"' in (site / name / "index.html").read_text()
