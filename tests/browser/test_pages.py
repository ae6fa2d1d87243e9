"""Reports and the explorer in a real browser: what models write does nothing, figures are drawn, numbers are the library's."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

EXPLORER = Path(__file__).parents[2] / "docs" / "assets" / "explorer.html"
ATTACKS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "</code></td></table><script>document.title='pwned'</script>",
    '"><svg onload=alert(3)>', "javascript:alert(4)", "<iframe src='http://example.com'></iframe>",
    "{{ 7*7 }}", "<style>*{display:none}</style>",
    "<a href='javascript:alert(5)'>x</a>", "<meta http-equiv=refresh content='0;url=http://example.com'>",
]  # fmt: skip


def report(folder, title="A run"):
    from bandpo.train.report import write_report

    rows = [
        {"stage": s, "prompt": a, "completions": [a, a], "rewards": [1.0, None]}
        for s in ("before", "after")
        for a in ATTACKS
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    numbers = {"mean@1": 0.5}
    whole = {"before": numbers, "after": numbers, "prompts": 1, "samples": 1, "temperature": 1.0}
    (folder / "evaluation.json").write_text(json.dumps(whole))
    (folder / "config.yaml").write_text(f"objective: {json.dumps(ATTACKS[0])}\n")
    (folder / "env.json").write_text(
        json.dumps({"command": ATTACKS[1], "versions": {"bandpo": "0"}, "seconds": 1.0, "device": "cpu"})
    )
    figure = Figure()
    figure.subplots().set_title(ATTACKS[0])
    return write_report(folder, title=title, figures={ATTACKS[3]: figure})


def outside(page):
    return [url for url in page.asked if not url.startswith(("file:", "data:"))]


def test_what_a_model_writes_does_nothing_in_the_report(page, tmp_path):
    page.goto(report(tmp_path, title=ATTACKS[2]).as_uri())
    page.wait_for_timeout(300)
    assert page.said == []
    assert outside(page) == []
    assert page.title() == ATTACKS[2]  # as text
    assert page.locator("script, iframe, img, meta[http-equiv=refresh]").count() == 0
    shown = page.locator("table.samples").inner_text()
    assert all(attack in shown for attack in ATTACKS)
    assert page.locator("figure svg").count() == 1


def test_the_policy_of_the_page_would_stop_a_script_that_got_in(page, tmp_path):
    """Two locks: with the escaping taken out by hand, the page's content security policy still holds."""
    path = report(tmp_path)
    path.write_text(
        path.read_text().replace("<h1>", "<script>document.title='pwned'</script><img src=x onerror=alert(1)><h1>")
    )
    page.goto(path.as_uri())
    page.wait_for_timeout(300)
    assert page.title() == "A run"
    assert not any(said.startswith("dialog") for said in page.said)
    assert any("Content Security Policy" in said for said in page.said)


SIZES = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


def shown_as(browser, path, width, scheme):
    found = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found.said = []
    found.on("console", lambda message: found.said.append(message.text))
    found.goto(path.as_uri())
    return found


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The report of a run, and that of two runs side by side."""
    from bandpo.cli import main
    from run_folders import run_folder

    folder = tmp_path_factory.mktemp("reports")
    a, b = run_folder(folder / "a"), run_folder(folder / "b", objective="grpo", system_prompt="x" * 300)
    assert main(["report", str(a)]) == 0
    assert main(["compare", str(a), str(b), "--output", str(folder / "c")]) == 0
    return [a / "report.html", folder / "c" / "report.html"]


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_reports_of_runs_fit_and_follow_light_and_dark(browser, reports, width, scheme):
    for path in reports:
        page = shown_as(browser, path, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        figures = page.locator(".panels figure svg")
        boxes = [figures.nth(i).bounding_box() for i in range(figures.count())]
        assert len(boxes) >= 7
        assert all(box["width"] > 260 for box in boxes)  # legible: a figure is made for 300 to 360 points
        assert (len({box["x"] for box in boxes}) == 1) == (width == 390)  # below each other on a phone
        paper = page.evaluate("getComputedStyle(document.querySelector('.panels svg #patch_1 path')).fill")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 26)"}[scheme]
        text = page.evaluate("getComputedStyle(document.querySelector('.panels svg #text_1 use')).fill")
        assert text == {"light": "rgb(0, 0, 0)", "dark": "rgb(232, 232, 232)"}[scheme]
        assert page.said == []
        page.close()


@pytest.mark.slow
def test_the_report_of_a_comparison(page, tmp_path, monkeypatch):
    from bandpo.cli import main

    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "smoke", "--tasks", "paths", "--objectives", "grpo,bandpo-kl", "--output", "c"]
    assert main(["compare", *arguments]) == 0
    page.goto((tmp_path / "c" / "report.html").as_uri())
    figures = page.locator("figure svg")
    assert figures.count() == page.locator("figure").count() > 3
    assert all(figures.nth(i).bounding_box()["height"] > 50 for i in range(figures.count()))
    assert page.said == []
    assert outside(page) == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
