"""`make gpu`: everything that can only be known on a GPU, in one run of under nine minutes: `python benchmarks/gpu`.

Each part runs in a process of its own, because an illegal access to the memory of a GPU spoils everything after it in the same
process. A part that fails or hangs is recorded, and the next one starts. Rows are flushed to `gpu.jsonl` as they come;
at the end `gpu.json` has them all, with the card, the versions and the commit, and one table is printed.

    python benchmarks/gpu --model FOLDER      # on a GPU
    python benchmarks/gpu --tiny --out DIR    # on a CPU, at sizes that only show that it runs
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = {
    "tests": ("suite", 100),
    "kernel": ("kernel", 80),
    "loss": ("loss", 110),
    "head": ("head", 50),
    "train": ("train", 400),
}
"""Module and seconds of each part; training has what the others leave of the whole."""
GRACE = 15  # seconds after which a part that does not end by itself is ended


def options() -> argparse.Namespace:
    """What the command was given."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: does everything run?")
    parser.add_argument("--out", type=Path, help="folder of gpu.json (default: benchmarks/, with --tiny runs/gpu)")
    parser.add_argument("--model", default="", help="folder of a Llama with its tokenizer (with --tiny a random one)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--total", type=float, default=515.0, help="seconds of all parts together")
    parser.add_argument("--commit", default="", help="the commit, where the copy of the sources has no git history")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the process of one part
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    found = parser.parse_args()
    unknown = sorted(set(found.only.split(",")) - set(PARTS))
    if unknown:
        parser.error(f"--only: no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    found.out = found.out or ROOT / ("runs/gpu" if found.tiny else "benchmarks")
    return found


def run_part(o: argparse.Namespace) -> int:
    """In the process of one part: its rows, or the error that ended it."""
    sys.path.insert(0, str(HERE))
    import torch
    from measure import Part

    torch.manual_seed(0)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    part = Part(o.part, o.tiny, time.monotonic() + o.seconds, o.out / "gpu.jsonl", o.model)
    try:
        importlib.import_module(PARTS[o.part][0]).run(part)
    except Exception as error:
        part.write({"error": f"{type(error).__name__}: {error}"[:2000], "where": traceback.format_exc()[-3000:]})
        return 1
    return 0


def main() -> int:
    """All parts, one after the other."""
    o = options()
    if o.part:
        return run_part(o)
    machine = about(o.commit)
    if not o.tiny and machine["device"] == "cpu":
        print("no CUDA device is found: --tiny runs everything at a small size on the CPU", file=sys.stderr)
        return 2
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "gpu.jsonl").unlink(missing_ok=True)
    began, parts = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as work:
        if o.tiny and not o.model:
            sys.path.insert(0, str(HERE))
            from weights import random_model

            o.model = work
            random_model(Path(work))
        for name in (name for name in PARTS if name in o.only.split(",")):
            left = o.total - (time.monotonic() - began)
            parts.append(one(o, name, min(PARTS[name][1], left), machine["device"]))
            write(o, machine, parts)
    print(table(o, machine, parts))
    return int(any(part["outcome"] not in ("done", "left out") for part in parts))


def one(o: argparse.Namespace, name: str, seconds: float, device: str) -> dict[str, Any]:
    """Run a part in a process, and say how it ended."""
    if seconds < 10:
        return {
            "part": name,
            "seconds": 0.0,
            "budget": 0.0,
            "outcome": "left out",
            "reason": "the time of all parts was spent",
        }
    command = [
        sys.executable,
        str(HERE),
        "--part",
        name,
        "--seconds",
        str(seconds),
        "--out",
        str(o.out),
        "--model",
        o.model,
    ]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = f"{ROOT / 'src'}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":  # the kernel cannot be run otherwise
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    start, outcome, reason = time.monotonic(), "done", ""
    print(f"--- {name}: at most {seconds:.0f} s", flush=True)
    process = subprocess.Popen([*command, *(["--tiny"] if o.tiny else [])], env=environment, start_new_session=True)
    try:
        if process.wait(timeout=seconds + GRACE):
            outcome, reason = "failed", f"status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its compilers and tests as well
        process.wait()
        outcome, reason = "stopped", "it did not end in its time"
    return {
        "part": name,
        "seconds": round(time.monotonic() - start, 1),
        "budget": seconds,
        "outcome": outcome,
        "reason": reason,
    }


def about(commit: str) -> dict[str, Any]:
    """Card, driver, versions and commit."""
    import torch

    found: dict[str, Any] = {"device": "cpu", "card": platform.machine(), "date": time.strftime("%Y-%m-%d")}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {
            "device": "cuda", "card": card.name, "memory_GiB": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count, "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }  # fmt: skip
    found["python"] = platform.python_version()
    for name in ("torch", "triton", "transformers", "numpy", "liger-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    changed = bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "--", "src", "benchmarks"))
    here = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    found["commit"] = here + (" with changes" if changed else "") if here else commit or "unknown"
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def lines(o: argparse.Namespace) -> list[dict[str, Any]]:
    """What the parts have written; a line that was cut off is dropped."""
    found, path = list[dict[str, Any]](), o.out / "gpu.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def write(o: argparse.Namespace, machine: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """`gpu.json`: machine, how each part ended, and a line for each row; anew after each part."""
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in lines(o))
    ends = ",\n".join("  " + json.dumps(part) for part in parts)
    about = json.dumps({**machine, "tiny": o.tiny}, ensure_ascii=False)
    (o.out / "gpu.json").write_text(
        f'{{"machine": {about},\n"parts": [\n{ends}\n],\n"rows": [\n{rows}\n]}}\n', encoding="utf-8"
    )


def table(o: argparse.Namespace, machine: dict[str, Any], parts: list[dict[str, Any]]) -> str:
    """All rows, then what failed, then how each part ended."""
    text = [
        f"\n{machine['card']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit'][:12]}"
    ]
    for row in lines(o):
        if "what" in row:
            value = "-" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
            aim = f"  (aim {row['aim']}{': MISSED' if row['met'] == 'no' else ''})" if row["aim"] else ""
            note = f"  {row['note']}" if row["note"] and row["value"] is None else ""
            text.append(f"{row['part']:7} {row['what']:72} {value:>22}{aim}{note}")
        elif "error" in row:
            text.append(f"{row['part']:7} ERROR {row['error']}\n{row['where']}")
    return "\n".join([*text, *(f"{p['part']}: {p['outcome']} in {p['seconds']} s {p['reason']}" for p in parts)])


if __name__ == "__main__":
    sys.exit(main())
