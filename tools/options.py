"""Writes the table of the options of `bandpo train`, which `--help` and the check of names use instead of importing TRL.

* `python tools/options.py`: writes src/bandpo/train/options.json.
* `python tools/options.py --check`: changes nothing; status 1 if the table is out of date.
"""

import argparse
import sys

from bandpo.train.options import PACKAGED, as_text, make_table


def main() -> int:
    """Writes the table, or compares it."""
    parser = argparse.ArgumentParser(description="The table of the options of bandpo train.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the table is out of date")
    check = parser.parse_args().check
    new = as_text(make_table())
    if PACKAGED.exists() and PACKAGED.read_text(encoding="utf-8") == new:
        return 0
    if check:
        print("src/bandpo/train/options.json is out of date; run python tools/options.py")
        return 1
    PACKAGED.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
