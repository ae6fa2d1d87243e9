"""Part `tests`: the tests that are marked with `device`, on the device, without interpreter mode."""

import importlib.util
import os
import re
import subprocess
import sys

from measure import DEVICE, ROOT, Part

FILES = ("test_kernel.py", "test_host_sync.py", "test_on_device.py")
SMALL = "held_on_both or accuracy"


def run(part: Part) -> None:
    """One run of pytest with settings of its own, and one line for each test that failed."""
    if importlib.util.find_spec("pytest") is None:
        part.row("tests on the device", None, note="left out: pytest is not installed")
        return
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={ROOT}",
        "-o", f"pythonpath={ROOT / 'tests'} {ROOT / 'src'}", "--import-mode=importlib", "-ra", "--tb=short", "--noconftest",
        "-m", "device and not slow", *(["-k", SMALL] if part.tiny else []),
        *(str(ROOT / "tests" / "unit" / name) for name in FILES),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "BANDPO_DEVICE": DEVICE.type,
        "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
    }
    environment.pop("TRITON_INTERPRET", None)  # on a CPU the tests choose the interpreter themselves
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(10, part.left()))
        text, ended = done.stdout + done.stderr, True
    except subprocess.TimeoutExpired as late:
        text, ended = (late.stdout or b"").decode(errors="replace"), False
    (part.out.parent / "gpu-tests.log").write_text(text, encoding="utf-8")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    note = ", ".join(f"{n} {word}" for word, n in counts.items()) or text[-300:]
    failed = counts.get("failed", 0) + counts.get("error", 0)
    broken = not ended or not counts.get("passed")
    part.row(
        "tests that fail on the device",
        None if broken else failed,
        "",
        "<= 0",
        note if ended else f"stopped: {note}",
        exact=True,
    )
    for line in re.findall(r"^FAILED (.*)$", text, re.MULTILINE)[:20]:
        part.row("a test that failed", None, note=line[:300])
