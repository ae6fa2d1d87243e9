"""The explorer in a real browser: its numbers are the library's, its address holds its state, and a keyboard is enough."""

import math
import re
from pathlib import Path

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe

import bandpo
from bandpo import OBJECTIVES, Band, Clip, Objective
from bandpo.bounds.regions import Sides
from bandpo.divergences import DIVERGENCES
from bandpo.reference import DESCENDS, reference_kl
from bandpo.surrogates import soft_edge
from bandpo.surrogates.filters import SequenceFilter
from bandpo.surrogates.token import clip
from bandpo.terms import gradient_weight

EXPLORER = Path(__file__).parents[2] / "docs" / "assets" / "explorer.html"
LOGITS = [-9.0, -4.6, -2.2, -0.5, 0.0, 0.7, 2.2, 4.6, 6.8]


@pytest.fixture
def explorer(page):
    page.goto(EXPLORER.as_uri())
    yield page
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []


def logps():
    return torch.nn.functional.logsigmoid(torch.tensor(LOGITS, dtype=torch.float64))


def go(page, state):
    """Open an address; the same page with another hash is not loaded again."""
    page.goto(f"{EXPLORER.as_uri()}#{state}")
    page.wait_for_function("state => location.hash.length > 1 || !state", arg=state)


# ---- numbers ----


@pytest.mark.parametrize("radius", [0.001, 0.05, 0.3])
def test_the_bounds_are_the_library_s(explorer, radius):
    names = explorer.evaluate("bandpo.divergences")
    assert set(names) == set(DIVERGENCES)
    for name in names:
        for cap in (10.0, None):
            got = explorer.evaluate(
                "([d, r, xs, c]) => xs.map(x => bandpo.bounds(d, r, x, c ?? Infinity))", [name, radius, LOGITS, cap]
            )
            lower, upper = Band(name, radius, max_ratio=cap)(logps())
            # the page bisects r - 1 in doubles with plain f: relative 1e-9 of the shift is what is left near r = 1
            assert [b["upper"] for b in got] == pytest.approx(upper.tolist(), rel=1e-8), name
            assert [b["lower"] for b in got] == pytest.approx(lower.tolist(), rel=1e-6, abs=1e-9), name
            for b, x, most in zip(got, LOGITS, upper.tolist(), strict=True):
                assert b["by"] == ("cap" if most == cap else "simplex" if saturates(name, -x, radius) else "region"), (
                    name,
                    x,
                )
                assert b["lowerBy"] == ("simplex" if saturates(name, x, radius) else "region"), (name, x)


def saturates(name, logit, radius):
    """Whether an event of this logit may lose all of its probability (item 5 of docs/theory.md)."""
    p, rest = (torch.tensor(x, dtype=torch.float64).sigmoid() for x in (logit, -logit))
    f = DIVERGENCES[name]
    return (p * f(torch.zeros((), dtype=torch.float64)) + rest * f(1 / rest)).item() <= radius


@pytest.mark.parametrize("eps", [0.1, 0.2])
def test_each_half_is_the_library_s(explorer, eps):
    for name in ("kl", "tv", "chi2"):
        band, fixed = Band(name, 0.05, max_ratio=10.0), Clip(eps)
        for sides, region in (("upper", Sides(lower=fixed, upper=band)), ("lower", Sides(lower=band, upper=fixed))):
            got = explorer.evaluate(
                "([d, xs, s, e]) => xs.map(x => bandpo.bounds(d, 0.05, x, 10, s, e))", [name, LOGITS, sides, eps]
            )
            lower, upper = region(logps())
            assert [b["upper"] for b in got] == pytest.approx(upper.tolist(), rel=1e-8), (name, sides)
            assert [b["lower"] for b in got] == pytest.approx(lower.tolist(), rel=1e-6, abs=1e-9), (name, sides)


def test_the_halves_of_the_page_are_the_named_objectives(explorer):
    go(explorer, "sides=upper")
    shown = eval(
        explorer.locator("#python").inner_text(),
        {**vars(bandpo), "Objective": Objective, "Band": Band, "Clip": Clip, "Sides": Sides, "clip": clip},
    )
    for end, named in zip(shown.bounds(logps()), OBJECTIVES["bandpo-kl-upper"].bounds(logps()), strict=True):
        torch.testing.assert_close(end, named, rtol=0, atol=0)


def test_the_weights_are_the_library_s(explorer):
    objectives = {"clip": OBJECTIVES["bandpo-kl"], "soft edge": Objective(bounds=Band(), surrogate=soft_edge)}
    ratios = [0.3, 0.7, 0.95, 1.0, 1.05, 1.4, 2.5]
    for name in explorer.evaluate("bandpo.surrogates"):
        for advantage in (1.0, -1.0):
            got = explorer.evaluate(
                "([s, rs, a]) => "
                "{ const b = bandpo.bounds('kl', 0.05, Math.log(3 / 7), 10); return rs.map(r => bandpo.weight(s, r, a, b)) }",
                [name, ratios, advantage],
            )
            if name not in objectives:  # CISPO over a band: w = clamp(r)/r, its definition
                lower, upper = (b.item() for b in Band()(torch.tensor([0.3], dtype=torch.float64).log()))
                expected = [min(max(r, lower), upper) / r for r in ratios]
            else:
                p = torch.full((len(ratios),), 0.3, dtype=torch.float64)
                expected = gradient_weight(
                    objectives[name], torch.tensor(ratios, dtype=torch.float64), p, advantage
                ).tolist()
            assert got == pytest.approx(expected, rel=1e-6), (name, advantage)


def test_the_filters_are_the_library_s(explorer):
    xs = [-2.0, -0.5, -0.11, -0.02, 0.0, 0.02, 0.09, 0.4, 1.5]
    for statistic in explorer.evaluate("bandpo.statistics"):
        for reduction in explorer.evaluate("bandpo.reductions"):
            for low, high, drops in (
                (None, 0.1, "all"),
                (-0.1, 0.1, "all"),
                (None, 0.01, "negative"),
                (None, 0.01, "outward"),
            ):
                rule = SequenceFilter(statistic, reduction, low, high, drops=drops)
                for moved, tokens, advantage in ((2, 7, -1.0), (7, 7, 1.0), (1, 5, 1.0)):
                    x = torch.zeros(len(xs), tokens, dtype=torch.float64)
                    x[:, :moved] = torch.tensor(xs, dtype=torch.float64)[:, None]
                    weights = rule(
                        x, torch.full((len(xs),), advantage, dtype=torch.float64), torch.ones(len(xs), tokens)
                    )
                    given = {"statistic": statistic, "reduction": reduction, "high": high, "drops": drops}
                    got = explorer.evaluate(
                        "([rule, low, xs, m, t, a]) => xs.map(x => bandpo.keeps({...rule, low: low ?? -Infinity}, x, m, t, a))",
                        [given, low, xs, moved, tokens, advantage],
                    )
                    assert got == weights[:, 0].tolist(), (rule, moved, tokens, advantage)


def test_the_kept_log_ratios_are_the_edges_of_the_filter(explorer):
    go(explorer, "page=filter&statistic=k3&reduction=mean&high=0.01&tokens=100&moved=0.1")
    rows = [row.split("\t") for row in explorer.locator("#kept tbody").inner_text().splitlines()]
    _, moved, low, high = next(row for row in rows if row[0] == "100")
    assert moved == "10"
    for edge in (
        low,
        high,
    ):  # the mean of k3 over the sequence is the threshold there, to the three digits that are shown
        x = float(edge)
        assert (math.expm1(x) - x) * 0.1 == pytest.approx(0.01, rel=1e-2)


def test_the_kl_terms_are_the_library_s(explorer):
    xs, r = [-2.5, -0.7, 0.0, 0.3, 1.9], 1.7
    descends = explorer.evaluate("bandpo.descends")
    assert {name: tuple(text) for name, text in descends.items()} == {
        name: tuple(text) for name, text in DESCENDS.items()
    }
    for term in DESCENDS:
        logp = torch.full((len(xs),), -1.0, dtype=torch.float64, requires_grad=True)
        reference, old = logp.detach() + torch.tensor(xs, dtype=torch.float64), logp.detach() - math.log(r)
        value = reference_kl(logp, reference, term, old_logprobs=old)
        (gradient,) = torch.autograd.grad(value.sum(), logp)
        values, weights = explorer.evaluate(
            "([t, xs, r]) => [xs.map(x => bandpo.klValue(t, x, r)), xs.map(x => bandpo.klWeight(t, x, r))]",
            [term, xs, r],
        )
        assert values == pytest.approx(value.tolist(), rel=1e-12, abs=1e-12), term
        assert weights == pytest.approx(gradient.tolist(), rel=1e-12, abs=1e-12), term


# ---- what a reader does ----


def test_the_controls_redraw_it_and_it_fits(explorer):
    curve = "document.querySelectorAll('#bounds path')[3].getAttribute('d')"
    seen = {explorer.evaluate(curve)}
    for name, value in (("radius", "400"), ("cap", "200"), ("divergence", "tv")):
        explorer.evaluate(
            "([id, v]) => { const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input')) }",
            [name, value],
        )
        seen.add(explorer.evaluate(curve))
    assert len(seen) == 4
    assert explorer.locator("#numbers tbody tr").count() == 8
    for width in (390, 900, 1250):
        explorer.set_viewport_size({"width": width, "height": 900})
        for name in ("region", "filter", "kl"):
            explorer.locator(f"#tab-{name}").click()
            assert explorer.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_the_address_holds_the_state(explorer):
    explorer.locator("#divergence").select_option("chi2")
    explorer.locator("#sides").select_option("lower")
    explorer.locator("#cap-exact").fill("")
    explorer.locator("#p-exact").fill("0.03")
    explorer.locator("#p-exact").press("Tab")
    address = explorer.url
    assert set(address.partition("#")[2].split("&")) == {"divergence=chi2", "cap=none", "sides=lower", "p=0.03"}
    before = explorer.evaluate("[JSON.stringify(bandpo.state), document.getElementById('numbers').innerText]")
    explorer.goto("about:blank")
    explorer.goto(address)
    assert explorer.evaluate("[JSON.stringify(bandpo.state), document.getElementById('numbers').innerText]") == before
    explorer.locator("#reset").click()
    assert "#" not in explorer.url
    assert explorer.evaluate("bandpo.state.divergence") == "kl"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("radius=abc", "radius=abc: must be a number from 0.0001 to 2; 0.05 is shown"),
        ("cap=-1", "cap=-1: must be a number from 1.25 to 1000, or none; 10 is shown"),
        ("divergence=k", "divergence=k: must be one of kl, reverse_kl"),
        ("page=zoo", "page=zoo: choose one of region, filter, kl"),
        ("width=3", "width is no setting of this page"),
        ("page=filter&tokens=2.5", "tokens=2.5: must be a whole number from 1 to 10000"),
        ("p=%3Cimg src=x onerror=alert(1)%3E", "p=<img src"),
    ],
)
def test_a_mistake_in_the_address_is_told(explorer, state, message):
    go(explorer, state)
    assert message in explorer.locator("#problem").inner_text()
    assert explorer.evaluate("bandpo.state.radius") == 0.05
    assert explorer.locator("main img").count() == 0


def test_the_link_is_copied(explorer, browser):
    explorer.context.grant_permissions(["clipboard-read", "clipboard-write"])
    go(explorer, "page=kl&form=plain")
    explorer.locator("#share").click()
    explorer.wait_for_function("document.getElementById('shared').textContent !== ''")
    assert explorer.locator("#shared").inner_text() == "Link copied"
    copied = explorer.evaluate("navigator.clipboard.readText()")
    assert copied == explorer.url
    assert copied.endswith("#page=kl&form=plain")


def test_a_keyboard_is_enough(explorer):
    """Every control is reached with Tab in the order of the page, the tabs move by arrows, the sliders by arrows and Home."""
    reached = []
    for _ in range(30):
        explorer.keyboard.press("Tab")
        reached.append(explorer.evaluate("document.activeElement.id || document.activeElement.className"))
        if "scroll" in reached:
            break
    order = [
        "share",
        "reset",
        "tab-region",
        "divergence",
        "radius-exact",
        "radius",
        "cap-exact",
        "cap",
        "sides",
        "eps-exact",
        "eps",
    ]
    assert reached == [*order, "p-exact", "p", "surrogate", "scroll"]
    explorer.locator("#tab-region").focus()
    for key, tab in (
        ("ArrowRight", "filter"),
        ("ArrowRight", "kl"),
        ("ArrowRight", "region"),
        ("End", "kl"),
        ("Home", "region"),
        ("ArrowLeft", "kl"),
    ):
        explorer.keyboard.press(key)
        assert explorer.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert [explorer.locator(f"#{x}").is_visible() for x in ("region", "filter", "kl")] == [
            x == tab for x in ("region", "filter", "kl")
        ]
    explorer.keyboard.press("Home")
    explorer.locator("#cap").focus()
    explorer.keyboard.press("End")
    assert explorer.locator("#cap").get_attribute("aria-valuetext") == "none"
    assert explorer.evaluate("bandpo.state.cap === Infinity")
    explorer.keyboard.press("Home")
    assert explorer.evaluate("bandpo.state.cap") == 1.25
    for _ in range(40):  # a step of the slider is never lost by the rounding of the shown value
        before = explorer.evaluate("+document.getElementById('cap').value")
        explorer.keyboard.press("ArrowRight")
        assert explorer.evaluate("+document.getElementById('cap').value") == before + 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["sides=upper", "page=filter", "page=kl", "radius=x"])
def test_it_is_accessible(browser, scheme, state):
    found = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme=scheme)
    found.goto(f"{EXPLORER.as_uri()}#{state}")
    ids = found.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)) > 20
    result = Axe().run(found)
    assert result.violations_count == 0, result.generate_report()
    paper = found.evaluate("getComputedStyle(document.body).backgroundColor")
    assert re.sub(r"\s", "", paper) == {"light": "rgb(255,255,255)", "dark": "rgb(22,24,26)"}[scheme]
    found.close()
