"""bandpo as its user runs it: another process."""

import subprocess
import sys


def bandpo(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "bandpo", *arguments], capture_output=True, text=True, check=False, timeout=300, **kwargs
    )
