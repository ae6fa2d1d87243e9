"""A headless Chromium, where this machine has one: $CHROMIUM, or chromium on the path. CI installs it (.ci/run)."""

import os
import shutil

import pytest

EXECUTABLE = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser():
    if EXECUTABLE is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or set $CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=EXECUTABLE,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A page that keeps what it says, does and asks for: `page.said`, `page.asked`."""
    found = browser.new_page(viewport={"width": 1250, "height": 1500})
    found.said, found.asked = [], []
    found.on("console", lambda message: found.said.append(message.text))
    found.on("pageerror", lambda error: found.said.append(str(error)))
    found.on("dialog", lambda dialog: (found.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    found.on("request", lambda request: found.asked.append(request.url))
    yield found
    found.close()
