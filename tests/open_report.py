"""Open a report in a headless Chromium (QtWebEngine): exit 1 on console messages, missing or empty figures, or network use.

`python tests/open_report.py REPORT.html [SCREENSHOT.png]`, in an environment with PySide6 (`make test-browser`).
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

COUNT = """JSON.stringify({
  figures: document.querySelectorAll('figure').length,
  drawn: [...document.querySelectorAll('figure svg')].filter(s => s.getBoundingClientRect().height > 50).length,
  tables: document.querySelectorAll('table').length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


class Page(QWebEnginePage):
    """Keeps what the page says on its console."""

    messages: list[str]

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.messages.append(f"{message} ({source}:{line})")


class Requests(QWebEngineUrlRequestInterceptor):
    """Keeps what the page asks for."""

    asked: list[str]

    def interceptRequest(self, info):
        self.asked.append(info.requestUrl().toString())


def main(report: Path, picture: Path | None) -> int:
    application = QApplication([sys.argv[0], "--no-sandbox", "--disable-gpu"])
    view = QWebEngineView()
    page, requests = Page(view), Requests()
    page.messages, requests.asked = [], []
    page.profile().setUrlRequestInterceptor(requests)
    view.setPage(page)
    view.resize(1250, 1500)
    found = {}

    def loaded(ok):
        found["loaded"] = ok
        page.runJavaScript(COUNT, lambda text: found.update(json.loads(text)))
        QTimer.singleShot(2500, done)

    def done():
        if picture is not None:
            view.grab().save(str(picture))
        application.quit()

    page.loadFinished.connect(loaded)
    view.load(QUrl.fromLocalFile(str(report.resolve())))
    view.show()
    application.exec()
    outside = [url for url in requests.asked if not url.startswith(("file:", "data:"))]
    print(json.dumps({**found, "console": page.messages, "network": outside}))
    fine = found.get("loaded") and found.get("figures", 0) > 0 and found["figures"] == found["drawn"]
    return 0 if fine and not page.messages and not outside and found["overflow"] <= 0 else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
