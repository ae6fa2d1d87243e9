"""Writes docs/evidence.md and docs/evidence-data.md anew from docs/evidence.json; only `--measure` runs something.

* `python tools/evidence.py`: the two pages.
* `python tools/evidence.py --figures`: the pictures in docs/assets/evidence too.
* `python tools/evidence.py --measure`: measures the realised ratios of rare tokens anew (half a minute), with the seeds of
  the recorded plan, and puts them into docs/evidence.json before the pages are written. Nothing else in it changes.
* `python tools/evidence.py --check`: changes nothing; status 1 if a page is not what the JSON file gives.
"""

import argparse
import json
import sys
from pathlib import Path

from bandpo.lab.comparison.report import evidence_pages, write_evidence
from bandpo.lab.comparison.sweeps import realised

DOCS = Path(__file__).parents[1] / "docs"


def main() -> int:
    """Writes the pages, or compares them."""
    parser = argparse.ArgumentParser(description="The evidence pages from docs/evidence.json.")
    parser.add_argument("--figures", action="store_true", help="draw the pictures too")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is out of date")
    parser.add_argument("--measure", action="store_true", help="measure the realised ratios anew")
    options = parser.parse_args()
    summary = json.loads((DOCS / "evidence.json").read_text(encoding="utf-8"))
    if options.measure and not options.check:
        summary["realised"] = json.loads(json.dumps(realised(summary["about"]["plan"]["exact_seeds"])))
        (DOCS / "evidence.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")
    if options.figures and not options.check:
        write_evidence(DOCS, summary)
        return 0
    stale = {name: text for name, text in evidence_pages(summary).items() if _content(DOCS / name) != text}
    for name, text in stale.items():
        if options.check:
            print(f"docs/{name} is out of date; run python tools/evidence.py")
        else:
            (DOCS / name).write_text(text, encoding="utf-8")
    return 1 if options.check and stale else 0


def _content(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
